"""What is wrong with a site before it joins a federation: its kit, its own files, its guards, its disk and device.

Each check reads what the running site would read, and gives a sentence for whoever operates the site.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import WorkspaceConstants as Names

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import load_site
from fedmpt_core.secagg.start_up_kit import check_kit, key_card_of, load_roster
from fedmpt_flare.tasks import CLASS_ALLOW_LIST
from fedmpt_flare.workspace import SITE_FILE

FLARE = "2.9."  # what this release was built for and tested on
GUARD, GATE = "fedmpt_flare.site.egress_guard.EgressGuard", "fedmpt_flare.site.budget_gate.BudgetGate"
LOG_STREAMER = "nvflare.app_common.logging.site_log_streamer.SiteLogStreamer"
# keys of a resources file that must be as deploy/site/local has them
GUARDED = {"app_validator", "class_allow_list", "class_list_enforcement_mode", "allow_log_streaming"}
FREE_GIB = 1.0  # chosen: ledgers and logs grow for years in it


class Wrong(ValueError):
    """A check failed; the sentence says what to do."""


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome: `what` was looked at, whether it is fine, and what was seen or is to be done."""

    what: str
    fine: bool
    text: str


def check_site_folder(workspace: Path) -> Iterator[CheckResult]:
    """Check a site's workspace, that is, its start-up kit with `startup` and `local`.

    Yields:
        A result per check. After a site file that cannot be read nothing that depends on it is looked at.
    """
    local, kit = workspace / Names.SITE_FOLDER_NAME, workspace / Names.STARTUP_FOLDER_NAME
    name = ""

    def certificate() -> str:
        nonlocal name
        card = key_card_of(kit)
        name = card.name
        return f"{card.name} of {card.org}, valid until {card.expires.isoformat()}"

    yield _try("start-up kit", certificate)
    yield _try("versions", _versions)
    yield _try("guards", lambda: _guards(local))
    yield _try("rights", lambda: _rights(local))
    readable: list[SiteConfig] = []

    def site_file() -> str:
        readable.append(load_site(local / SITE_FILE, name))
        return f"{local / SITE_FILE}"

    yield _try("site file", site_file)
    for site in readable:
        yield _try("roster", partial(_roster, site, kit))
        yield _try("ledger", partial(_ledger, site, kit))
        yield _try("pictures", partial(_pictures, site))
        yield _try("disk", partial(_disk, site))
        yield _try("device", partial(_device, site))


def _try(what: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(what, True, check())
    except (ValueError, OSError) as error:
        return CheckResult(what, False, str(error))


def _versions() -> str:
    flare = importlib.metadata.version("nvflare")
    if not flare.startswith(FLARE):
        raise Wrong(f"nvflare {flare} is installed, fedmpt {RELEASE} runs on {FLARE}*: install it")
    return f"fedmpt {RELEASE}, nvflare {flare}"


def _guards(local: Path) -> str:
    """That no job is deployed and no answer leaves unchecked, and that a job builds our classes alone."""
    resources = _first(local, Names.RESOURCES_CONFIG, Names.DEFAULT_RESOURCES_CONFIG)
    values, others = _json(resources), _other_resources(local)
    for path in others:
        if doubled := sorted(GUARDED & set(_json(path))):
            raise Wrong(f"{path}: holds {', '.join(doubled)}, which only {resources.name} may say: take it away there")
    gate = values.get("app_validator")
    if not isinstance(gate, dict) or gate.get("path") != GATE:
        raise Wrong(f'{resources}: "app_validator" must be {{"path": "{GATE}"}}: copy deploy/site/local')
    allowed = values.get("class_allow_list")
    if not isinstance(allowed, list) or not set(allowed) <= set(CLASS_ALLOW_LIST) or CLASS_ALLOW_LIST[0] not in allowed:
        raise Wrong(f'{resources}: "class_allow_list" must hold {", ".join(CLASS_ALLOW_LIST)} and nothing else')
    if values.get("class_list_enforcement_mode", "enforce") != "enforce":
        raise Wrong(f'{resources}: "class_list_enforcement_mode" must be "enforce"')
    streams = any(LOG_STREAMER in path.read_text(encoding="utf-8") for path in (resources, *others))
    if values.get("allow_log_streaming") is not False or streams:
        raise Wrong(f'{resources}: "allow_log_streaming" must be false, and {LOG_STREAMER} may not be a component')
    privacy = _first(local, Names.PRIVACY_CONFIG)
    scopes = _json(privacy).get("scopes")
    if not isinstance(scopes, list) or not scopes or not _json(privacy).get("default_scope"):
        raise Wrong(f"{privacy}: needs scopes and a default_scope: copy deploy/site/local")
    for scope in scopes:
        filters = scope.get("task_result_filters") if isinstance(scope, dict) else None
        if not filters or not isinstance(filters[-1], dict) or filters[-1].get("path") != GUARD:
            raise Wrong(f"{privacy}: the last task_result_filter of every scope must be {GUARD}")
    return "budget gate, egress guard, allow list, no log streaming"


def _other_resources(local: Path) -> list[Path]:
    """Every other file that FLARE merges into the resources of the parent process, of jobs, or of both."""
    kit = local.parent / Names.STARTUP_FOLDER_NAME
    named = [kit / Names.CLIENT_STARTUP_CONFIG, local / Names.JOB_RESOURCES_CONFIG]
    return [p for p in named if p.exists()] + [p for f in (kit, local) for p in sorted(f.glob("*__*resources.json"))]


def _rights(local: Path) -> str:
    """That nobody may bring code or run commands."""
    path = _first(local, Names.AUTHORIZATION_CONFIG, Names.DEFAULT_AUTHORIZATION_CONFIG)
    roles = _json(path).get("permissions")
    if not isinstance(roles, dict) or not roles:
        raise Wrong(f"{path}: has no permissions: copy deploy/site/local")
    for role, rights in roles.items():
        for right in ("byoc", "shell_commands"):
            given = rights.get(right, "none") if isinstance(rights, dict) else rights
            if given != "none":
                raise Wrong(f'{path}: the role {role} has the right {right}: write "{right}": "none" for every role')
    return f"no code and no commands for {', '.join(roles)}"


def _roster(site: SiteConfig, kit: Path) -> str:
    if not site.secagg.roster:
        if site.secagg.allow_unmasked:
            return "none: the site takes part in unmasked jobs only"
        raise Wrong("secagg.roster is empty: collect the roster of all sites' keys (`fedmpt roster`) and name it")
    roster = load_roster(Path(site.secagg.roster))
    check_kit(roster, key_card_of(kit))
    return f"{len(roster.members)} members, digest {roster.digest().hex()[:16]}"


def _ledger(site: SiteConfig, kit: Path) -> str:
    from fedmpt_core.privacy.accounting.epsilon import epsilon
    from fedmpt_core.privacy.ledger.budget import held, history
    from fedmpt_core.privacy.ledger.ledger import successor_of
    from fedmpt_core.privacy.ledger.site_ledger import ledger_path, read_site_ledger

    if site.privacy is None:
        raise Wrong("the site file has no [privacy] table, so the site trains in no job")
    entries = read_site_ledger(site.privacy, kit)
    if successor := successor_of(entries):
        raise Wrong(f"'{site.privacy.dataset}' is closed: its records go on as '{successor}', name that data set")
    path = ledger_path(site.privacy)
    if not os.access(path, os.W_OK):
        raise Wrong(f"{path}: cannot be written to, so the site refuses every job: correct its owner or rights")
    spent, holds = history(entries), held(entries)
    text = f"{site.privacy.dataset}: epsilon {epsilon(spent, site.privacy.delta):.3f} of {site.privacy.epsilon:g} spent"
    reach = epsilon([*spent, *(h.steps for h in holds)], site.privacy.delta)
    return f"{text} in {len(entries)} entries" + (f", {reach:.3f} with what jobs hold" if holds else "")


def _pictures(site: SiteConfig) -> str:
    if site.data.source == "scenes":
        return "embedded scenes"
    path = Path(site.data.path)
    if not path.exists():
        raise Wrong(f"data.path = {path}: no such file or folder: write the manifest, or correct the path")
    if not os.access(path, os.R_OK):
        raise Wrong(f"data.path = {path}: cannot be read: correct its owner or rights")
    return f"{path}"


def _disk(site: SiteConfig) -> str:
    places = {"cache_dir": site.cache} | ({"privacy.ledger": Path(site.privacy.ledger)} if site.privacy else {})
    rooms = []
    for name, place in places.items():
        existing = next(p for p in (place, *place.parents) if p.exists())
        probe = existing / f".fedmpt-{name}.probe"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise Wrong(
                f"{name} = {place}: cannot be written to ({error.strerror}): correct its owner or rights"
            ) from None
        free = shutil.disk_usage(existing).free / 2**30
        if free < FREE_GIB:
            raise Wrong(f"{name} = {place}: {free:.2f} GiB are free, at least {FREE_GIB:g} are needed: make room")
        rooms.append(f"{name} {free:.0f} GiB free")
    return ", ".join(rooms)


def _device(site: SiteConfig) -> str:
    from fedmpt_core.model.device import device_name, pick_device

    return device_name(pick_device(site.device))


def _first(local: Path, *names: str) -> Path:
    for name in names:
        if (local / name).exists():
            return local / name
    raise Wrong(f"{local / names[0]} is missing: copy deploy/site/local there")


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Wrong(f"{path}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Wrong(f"{path}: is not a JSON object")
    return values
