"""The audit of folders made to break it: a finding or a sentence, never a traceback, never "all is well"."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt_core.audit.auditor import audit_run, compare
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader
from fedmpt_core.audit.run_evidence import NoRun, load_run
from fedmpt_core.audit.site_ledger import audit_ledger, load_ledger
from fedmpt_core.audit.spending import further_accountants
from fedmpt_core.common.canonical import canonical
from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.federation.run.record import MANIFEST
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.chain import FIRST
from tests.audited import SITES, Federation

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 1e308, float("nan"), [], {}, [[]]),
    *("", "x" * 5000, "<script>alert(1)</script>", "\x1b[2J", "../../etc"),
    *({"seq": -1, "hash": 3, "sig": None}, {"a": {"b": [None]}}),
)


@pytest.fixture(scope="module")
def honest(audited: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which a file is changed and put back, time and again."""
    return Path(shutil.copytree(audited.root / "run-1", tmp_path_factory.mktemp("honest") / "run-1"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every node of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inside for p in places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """A copy with one node replaced."""
    if not path:
        return odd
    changed = copy.deepcopy(value)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = odd
    return changed


@pytest.mark.parametrize("name", ["result.json", MANIFEST])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_no_node_of_a_run_s_files_can_be_changed_unnoticed(
    honest: Path,
    keys: KnownKeys,
    name: str,
    data: st.DataObject,
) -> None:
    path = honest / name
    before = path.read_bytes()
    plain = json.loads(before)
    where = data.draw(st.sampled_from(places(plain)))
    odd = data.draw(st.sampled_from(ODD))
    changed = json.dumps(put(plain, where, odd)).encode()
    if json.loads(changed) == plain:
        return
    try:
        path.write_bytes(changed)
        try:
            audit = audit_run(load_run(honest, keys))
        except NoRun as error:
            assert str(honest) in str(error)
            return
        assert not audit.passed, (where, odd)
        json.dumps(audit.to_dict())
    finally:
        path.write_bytes(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(data=st.data())
def test_a_simulation_s_hostile_files_are_findings_or_sentences(
    honest: Path,
    tmp_path: Path,
    keys: KnownKeys,
    data: st.DataObject,
) -> None:
    """Nothing of a simulation is signed, so whoever changes a file can also change its digest: only no traceback."""
    record = json.loads((honest / "result.json").read_text())
    manifest = json.loads((honest / MANIFEST).read_text())
    changed = record
    if data.draw(st.booleans()):
        changed = put(record, data.draw(st.sampled_from(places(record))), data.draw(st.sampled_from(ODD)))
    (tmp_path / "result.json").write_text(json.dumps(changed))
    (tmp_path / "privacy").mkdir(exist_ok=True)
    for site in SITES:
        (tmp_path / "privacy" / f"{site}.ledger.jsonl").write_bytes(forged_ledger(site, data))
        manifest["sites"][site]["ledger"] = {"file": f"privacy/{site}.ledger.jsonl"}
    digest = hashlib.sha256((tmp_path / "result.json").read_bytes()).hexdigest()
    manifest |= {"identities": "insecure", "signature": "", "files": {"result.json": digest}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    try:
        run = load_run(tmp_path, keys)
    except NoRun:
        return
    json.dumps(audit_run(run, independent=True).to_dict())
    compare([run, run])


@pytest.mark.parametrize("name", ["/dev/zero", "../result.json", "", "link", "privacy"])
@pytest.mark.parametrize("field", ["file", "certificate"])
def test_no_file_outside_the_run_is_read(
    honest: Path,
    tmp_path: Path,
    keys: KnownKeys,
    name: str,
    field: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(honest, folder)
    (folder / "link").symlink_to("/dev/zero")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sites"][SITES[0]]["ledger"][field] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    findings = audit_run(load_run(folder, keys)).findings
    assert {"file-changed"} < {f.code for f in findings if f.severity in ("fail", "unshown")}
    assert any(f.code in ("ledger-damaged", "ledger-missing") and f.where == SITES[0] for f in findings)


def forged_ledger(site: str, data: st.DataObject) -> bytes:
    """A chain that holds, with details of any kind."""
    genesis = {"delta": data.draw(st.sampled_from(["1e-5", "0.1", "9e99", "0"])), "unit": "record"}
    genesis |= {"adjacency": "add-remove", "key_spki": "", "public_key": ""}
    genesis |= {"details": data.draw(st.sampled_from([{"carried": []}, {}, {"carried": [{}]}, {"carried": 7}]))}
    details = {"sample_rate": "0.25", "noise_multiplier": "1.2", "steps": 2}
    key = data.draw(st.sampled_from(["sample_rate", "noise_multiplier", "steps", "rng_key_id", "code", "config"]))
    odd = data.draw(st.sampled_from([None, "", "nan", "-1", "1e-300", 0, -5, 10**30, [], {"a": 1}, "0.5"]))
    number = data.draw(st.integers(0, 10**9))
    entries: list[dict[str, Any]] = [
        {"kind": "genesis", **genesis},
        {"kind": "reserve", "job": "run-1", "round": number, "attempt": 0, "details": {**details, key: odd}},
    ]
    return sealed(site, entries)


def sealed(site: str, entries: list[dict[str, Any]]) -> bytes:
    """Lines of an unsigned ledger."""
    lines, before = [], FIRST
    for number, entry in enumerate(entries):
        time = "2026-01-02T03:04:05.000000Z"
        plain = {"v": 1, "seq": number, "prev": before, "site": site, "dataset": "images", "time": time, **entry}
        before = hashlib.sha256(canonical(plain)).hexdigest()
        lines.append(canonical({**plain, "hash": before, "sig": ""}) + b"\n")
    return b"".join(lines)


def test_ten_thousand_entries_are_audited(tmp_path: Path) -> None:
    """What one entry costs must not grow with their number, neither for the chain nor for an accountant."""
    genesis = {"kind": "genesis", "delta": "1e-05", "unit": "record", "adjacency": "add-remove", "details": {}}
    details = {"sample_rate": "0.01", "noise_multiplier": "2.0", "steps": 10}
    entries: list[dict[str, Any]] = [{**genesis, "key_spki": "", "public_key": ""}]
    entries += [
        {"kind": "reserve", "job": f"job-{n % 50}", "round": n // 50, "attempt": 0, "details": details}
        for n in range(10_000)
    ]
    path = tmp_path / "images.ledger.jsonl"
    path.write_bytes(sealed("hospital-a", entries))
    accountants = further_accountants(independent=True)
    card = PolicyCard("hospital-a", SitePrivacyConfig("images", 1000, 1.0, 1e-5), SiteSecAggConfig())
    audit = audit_ledger(load_ledger(path, KnownKeys(), LedgerReader()), accountants, card)
    assert audit.statement
    assert sum(job.steps for job in audit.statement.jobs) == 100_000
    assert [f.code for f in audit.findings if f.severity == "fail"] == ["epsilon-above-the-cap"]
    assert len(audit.accountants) == 3
