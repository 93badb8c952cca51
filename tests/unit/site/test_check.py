"""`fedmpt site`: a sound site passes, each fault is named, and a policy card refuses what its site would refuse."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.toml import ConfigError, load_site
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, resolved
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, open_ledger, read_site_ledger
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.start_up_kit import key_card_of, write_roster
from fedmpt_flare.cli.main import app
from fedmpt_flare.site import check as site_check
from fedmpt_flare.site.budget_report import budget_of
from fedmpt_flare.site.check import check_site_folder
from tests.federation import STATE
from tests.kits import write_kit
from tests.provisioning import SITE, overlay

JOB = resolved(
    JobConfig(
        "agreed",
        ("cat", "dog"),
        training=TrainingConfig(rounds=2, local_steps=2),
        privacy=PrivacyConfig(epsilon=3.0),
        federation=FederationConfig(max_failed_rounds=0),
    )
)
WHAT = ("start-up kit", "versions", "guards", "rights", "site file", "roster", "ledger", "pictures", "disk", "device")


@pytest.fixture
def site(tmp_path: Path, provisioned: Path) -> Path:
    """A site that can be started."""
    kit = tmp_path / "kit"
    shutil.copytree(provisioned / SITE, kit)
    overlay(kit, "site")
    edit(kit, "fedmpt_site.toml", lambda s: s.replace(STATE, str(tmp_path / "state")))
    edit(kit, "fedmpt_site.toml", lambda s: s.replace('source = "manifest"', 'source = "scenes"'))
    cards = [key_card_of(provisioned / name / "startup") for name in (SITE, "hospital-b", "hospital-c")]
    roster = Roster(cards[0].root, {c.name: Member(c.fingerprint, c.org) for c in cards})
    write_roster(kit / "local" / "secagg_roster.json", roster)
    policy = load_site(kit / "local" / "fedmpt_site.toml", SITE).privacy
    assert policy
    create_ledger(policy, SITE, kit / "startup")
    return kit


def edit(kit: Path, name: str, change: Callable[[str], str]) -> None:
    path = kit / "local" / name
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def edit_json(kit: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = kit / "local" / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def faults(kit: Path) -> dict[str, str]:
    return {f.what: f.text for f in check_site_folder(kit) if not f.fine}


def test_a_sound_site_can_be_started(site: Path) -> None:
    results = list(check_site_folder(site))
    assert tuple(r.what for r in results) == WHAT
    assert [r for r in results if not r.fine] == []
    done = CliRunner().invoke(app, ["site", "check", str(site)])
    assert (done.exit_code, "The site can be started." in done.output) == (0, True)
    plain = json.loads(CliRunner().invoke(app, ["site", "check", str(site), "--json"]).output)
    assert [f["what"] for f in plain] == list(WHAT)


def more(name: str, **values: Any) -> Callable[[Path], Any]:
    """Another file that FLARE merges into the resources."""
    return lambda kit: (kit / name).write_text(json.dumps(values))


STREAMER = {"id": "s", "path": site_check.LOG_STREAMER, "args": {}}
RESOURCES = "resources.json.default"
FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no certificate": (lambda k: (k / "startup" / "client.crt").unlink(), "start-up kit", "client.crt cannot be read"),
    "another federation's root": (
        lambda k: (
            write_kit(k.parent / "other", "root"),
            shutil.copy(k.parent / "other/client.crt", k / "startup/rootCA.pem"),
        ),
        "start-up kit",
        "root",
    ),
    "another key": (
        lambda k: shutil.copy(k / "startup" / "rootCA.pem", k / "startup" / "client.crt"),
        "start-up kit",
        "the private key is not that of the certificate",
    ),
    "no gate": (
        lambda k: edit_json(k, RESOURCES, lambda v: v.pop("app_validator")),
        "guards",
        '"app_validator" must be',
    ),
    "a resources.json before ours": (
        lambda k: (k / "local" / "resources.json").write_text("{}"),
        "guards",
        "resources.json",
    ),
    "a further class": (
        lambda k: edit_json(k, RESOURCES, lambda v: v["class_allow_list"].append("nvflare.")),
        "guards",
        '"class_allow_list" must hold',
    ),
    "classes only warned of": (
        lambda k: edit_json(k, RESOURCES, lambda v: v.update(class_list_enforcement_mode="warn")),
        "guards",
        "enforce",
    ),
    "log streaming": (
        lambda k: edit_json(k, RESOURCES, lambda v: v.update(allow_log_streaming=True)),
        "guards",
        '"allow_log_streaming" must be false',
    ),
    "a log streamer in another file": (
        more("local/more__j_resources.json", components=[STREAMER]),
        "guards",
        "may not be a component",
    ),
    "a log streamer of the parent": (
        more("local/more__p_resources.json", components=[STREAMER]),
        "guards",
        "may not be a component",
    ),
    "a log streamer in the kit": (
        more("startup/more__resources.json", components=[STREAMER]),
        "guards",
        "may not be a component",
    ),
    "another gate in another file": (
        more("local/more__p_resources.json", app_validator={"path": "other.Gate"}),
        "guards",
        "more__p_resources.json: holds app_validator, which only resources.json.default may say",
    ),
    "a longer allow list of jobs": (
        more("local/job_resources.json", class_allow_list=["nvflare."]),
        "guards",
        "job_resources.json: holds class_allow_list, which only",
    ),
    "no scope": (lambda k: (k / "local" / "privacy.json").unlink(), "guards", "privacy.json is missing"),
    "a scope without our guard": (
        lambda k: edit_json(k, "privacy.json", lambda v: v["scopes"].append({"name": "open"})),
        "guards",
        "the last task_result_filter of every scope",
    ),
    "a filter after our guard": (
        lambda k: edit_json(
            k, "privacy.json", lambda v: v["scopes"][0]["task_result_filters"].append({"path": "other.Filter"})
        ),
        "guards",
        "the last task_result_filter of every scope",
    ),
    "no default scope": (
        lambda k: edit_json(k, "privacy.json", lambda v: v.pop("default_scope")),
        "guards",
        "default_scope",
    ),
    "code by the lead": (
        lambda k: edit_json(k, "authorization.json", lambda v: v["permissions"]["lead"].update(byoc="any")),
        "rights",
        "the role lead has the right byoc",
    ),
    "everything for the admin": (
        lambda k: edit_json(k, "authorization.json", lambda v: v["permissions"].update(project_admin="any")),
        "rights",
        "the role project_admin has the right byoc",
    ),
    "flare's own rights": (
        lambda k: (k / "local" / "authorization.json").unlink(),
        "rights",
        "has the right",
    ),
    "a misspelt key": (
        lambda k: edit(k, "fedmpt_site.toml", lambda s: s.replace("min_cohort", "min_kohort")),
        "site file",
        "did you mean 'min_cohort'?",
    ),
    "no roster": (
        lambda k: edit(k, "fedmpt_site.toml", lambda s: s.replace('"secagg_roster.json"', '""')),
        "roster",
        "collect the roster",
    ),
    "a roster file that is gone": (
        lambda k: (k / "local" / "secagg_roster.json").unlink(),
        "roster",
        "cannot be read",
    ),
    "no ledger": (lambda k: shutil.rmtree(k.parent / "state" / "ledgers"), "ledger", "images.ledger.jsonl"),
    "no policy": (
        lambda k: edit(k, "fedmpt_site.toml", lambda s: s[: s.index("[privacy]")] + s[s.index("[secagg]") :]),
        "ledger",
        "no [privacy] table",
    ),
    "pictures elsewhere": (
        lambda k: edit(k, "fedmpt_site.toml", lambda s: s.replace('source = "scenes"', 'source = "manifest"')),
        "pictures",
        "manifest.csv: no such file or folder",
    ),
    "a GPU that is not there": (
        lambda k: edit(k, "fedmpt_site.toml", lambda s: s.replace('device = "auto"', 'device = "cuda:9"')),
        "device",
        "this machine shows",
    ),
}


@pytest.mark.parametrize(("breaks", "what", "sentence"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_named_alone(site: Path, breaks: Callable[[Path], Any], what: str, sentence: str) -> None:
    breaks(site)
    sentences = faults(site)
    assert what in sentences
    assert sentence in sentences[what]
    # one fault may hide what rests on it, and starts none elsewhere
    assert set(sentences) <= {what, *{"start-up kit": ("roster", "ledger"), "site file": ()}.get(what, ())}
    done = CliRunner().invoke(app, ["site", "check", str(site)])
    assert done.exit_code == 1
    assert "checks failed" in done.output


def test_an_expired_certificate_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = (date.today() + timedelta(days=5000)).strftime("%s")
    monkeypatch.setattr("fedmpt_core.secagg.start_up_kit.time.time", lambda: float(later))
    assert "valid" in faults(site)["start-up kit"]


def test_a_key_that_is_not_the_roster_s_is_named(site: Path, provisioned: Path) -> None:
    for name in ("client.crt", "client.key"):
        shutil.copy(provisioned / "hospital-b" / "startup" / name, site / "startup" / name)
    (site / "startup" / "fed_client.json").unlink()
    roster = json.loads((site / "local" / "secagg_roster.json").read_text())
    roster["members"]["hospital-x"] = roster["members"].pop("hospital-b")
    (site / "local" / "secagg_roster.json").write_text(json.dumps(roster))
    assert "hospital-b" in faults(site)["roster"]


def test_another_flare_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpt_flare.site.check.importlib.metadata.version", lambda name: "2.10.0")
    assert "nvflare 2.10.0 is installed" in faults(site)["versions"]


def test_a_full_disk_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert "0.00 GiB are free, at least 1 are needed: make room" in faults(site)["disk"]


def test_a_folder_that_is_no_kit_is_named(tmp_path: Path) -> None:
    assert {"start-up kit", "guards", "rights", "site file"} <= set(faults(tmp_path))


# ---- policy cards ---------------------------------------------------------------------------------------------------


def card_file(site: Path, tmp_path: Path) -> Path:
    path = tmp_path / "card.json"
    done = CliRunner().invoke(app, ["site", "policy", str(site), "--out", str(path)])
    assert done.exit_code == 0, done.output
    return path


def test_a_card_tells_limits_and_charges_and_names_no_file(site: Path, tmp_path: Path) -> None:
    settings = load_site(site / "local" / "fedmpt_site.toml", SITE)
    assert settings.privacy
    spend(site, "earlier")
    path = card_file(site, tmp_path)
    assert str(tmp_path) not in path.read_text()
    card = PolicyCard.load(path)
    assert (card.site, card.privacy.epsilon, card.privacy.ledger, card.secagg.roster) == (SITE, 8.0, "", "")
    assert [(c.job, c.steps) for c in card.charged] == [("earlier", 2)]
    assert card.spent == pytest.approx(budget_of(site, SITE)["epsilon"])


def spend(site: Path, job_id: str) -> None:
    settings = load_site(site / "local" / "fedmpt_site.toml", SITE)
    assert settings.privacy
    Budget(JOB, settings, open_ledger(settings.privacy, SITE, site / "startup"), job_id).reserve(1, 0, {})


def test_a_card_says_of_a_job_what_its_site_would_say(site: Path, tmp_path: Path) -> None:
    card = PolicyCard.load(card_file(site, tmp_path))
    card.check(JOB)
    few = replace(JOB, secagg=replace(JOB.secagg, colluders=0))
    with pytest.raises(PrivacyRefused, match=r"hospital-a would refuse the job: .*colluders=0 of the job"):
        card.check(few)
    for n in range(12):
        spend(site, f"earlier-{n}")
    settings = load_site(site / "local" / "fedmpt_site.toml", SITE)
    assert settings.privacy
    later = PolicyCard.of(SITE, settings, read_site_ledger(settings.privacy, site / "startup"))
    dear = resolved(replace(JOB, privacy=replace(JOB.privacy, epsilon=7.9, noise_multiplier=None)))
    card.check(dear)
    with pytest.raises(PrivacyRefused, match=r"hospital-a would refuse the job: privacy budget: .* the cap is 8"):
        later.check(dear)


def test_no_job_is_exported_that_a_known_site_would_refuse(site: Path, tmp_path: Path) -> None:
    path = card_file(site, tmp_path)
    job = tmp_path / "job.toml"
    job.write_text(
        'name = "dear"\nclasses = ["cat", "dog"]\n[privacy]\nepsilon = 30.0\n[training]\nrounds = 2\n[model]\n'
        'conditions = ["color"]\n'
    )
    done = CliRunner().invoke(app, ["export", str(job), "--out", str(tmp_path / "out"), "--policy", str(path)])
    assert isinstance(done.exception, PrivacyRefused)
    assert "hospital-a would refuse the job" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"site": 1}', '{"site": "a", "surprise": 1}'])
def test_what_is_no_card_is_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"card\.json"):
        PolicyCard.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        PolicyCard.load(tmp_path / "other.json")


# ---- the console's command ------------------------------------------------------------------------------------------


def test_a_site_says_of_its_budget_what_its_file_allows(site: Path) -> None:
    spend(site, "earlier")
    budget = budget_of(site, SITE)
    assert (budget["dataset"], budget["cap"], budget["entries"]) == ("images", 8.0, 2)
    assert 0 < budget["epsilon"] < 8
    edit(site, "fedmpt_site.toml", lambda s: s.replace("show_budget = true ", "show_budget = false "))
    assert budget_of(site, SITE) == {"refused": "this site does not show its budget (privacy.show_budget)"}
