"""What a site signs against the job, the model, its policy card and its other entries; and ledgers that were cut."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import audit_run, compare
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader
from fedmpt_core.audit.run_evidence import Run, load_run
from fedmpt_core.audit.site_ledger import audit_ledger, load_ledger
from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.federation.run.record import MANIFEST
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.export import export_ledger
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import SITES, UNITS, Federation, edit_record

A, B, C = SITES


@pytest.fixture
def run(audited: Federation, keys: KnownKeys) -> Run:
    """Loaded anew for each test, whose entries may be changed: what a site that lies would have signed."""
    return load_run(audited.root / "run-1", keys)


def findings(run: Run, severity: str = "fail", **options: Any) -> list[tuple[str, str, str]]:
    return [(f.code, f.where, f.text) for f in audit_run(run, **options).findings if f.severity == severity]


def resigned(run: Run, change: Callable[[Entry], Entry], site: str = A) -> None:
    """A site's entries, changed and signed again."""
    run.ledgers[site] = tuple(change(entry) for entry in run.ledgers[site])


def reserving(number: int, **details: Any) -> Callable[[Entry], Entry]:
    """Other details in the reservations of a round, or of all with number 0; None removes one."""

    def change(entry: Entry) -> Entry:
        if entry.kind != "reserve" or entry.job != "run-1" or number not in (0, entry.round):
            return entry
        kept = {name: value for name, value in {**entry.details, **details}.items() if value is not None}
        return replace(entry, details=kept)

    return change


# name of the detail, another value, what the finding says
DETAILS: list[tuple[str, Any, str]] = [
    ("noise_std", ["0.001"], "the job's noise on 34 numbers is another"),
    ("noise_std", ["nan"], "the job's noise"),
    ("noise_std", [], "the job's noise"),
    ("noise_std", "much", "the job's noise"),
    ("mechanism", "gaussian co-occurrence counts", "the job says poisson-subsampled-gaussian"),
    ("unit", "group", "the job says record"),
    ("engine", "exact", "the job says feature_space"),
    ("max_grad_norm", "0.5", "the job says 1.0"),
    ("noise_multiplier", "9.0", "the job says"),
    ("sample_rate", "0.125", "the job says"),
    ("steps", 1, "the job says 2"),
    ("rng", "mt19937", "the job says AES-256-CTR"),
    ("grid_bits", 50, "the job says 20"),
    ("released", 33, "the job's noise on 33 numbers is another"),
    ("released", 19, "the model has 18 trained numbers"),
    ("released", "all", "it is no number of numbers"),
    ("trained", ["head.bias"], "the model has contexts.class, head.bias"),
    ("trained", [], "it is no list of tensors"),
    ("expected_batch_size", "250.3", "it is no sample rate times a number of units"),
    ("expected_batch_size", "inf", "it is no sample rate times a number of units"),
    ("aggregation", "unmasked", "the job says masked"),
    ("identities", "insecure", "the job says start-up kits"),
    ("config", "a" * 64, "the job says"),
    ("code", "fedmpt 0.0.1", "it ran fedmpt 0.0.1"),
    ("code", None, "it ran None"),
    ("rng_key_id", "42", "without a noise key"),
    ("rng_key_id", None, "without a noise key"),
    ("records", None, "without records"),
]


@pytest.mark.parametrize(("name", "value", "says"), DETAILS, ids=[f"{name}={value}" for name, value, _ in DETAILS])
def test_every_detail_of_a_reservation_is_compared(run: Run, name: str, value: Any, says: str) -> None:
    resigned(run, reserving(2, **{name: value}))
    failed = findings(run)
    assert any(where == A and says in text for _, where, text in failed), failed


def test_every_detail_that_a_reservation_has_is_in_the_table(run: Run) -> None:
    """One that is not would be said in a warning, and here it would be missing."""
    entry = next(e for e in run.ledgers[A] if e.kind == "reserve")
    assert {name for name, *_ in DETAILS} == set(entry.details)
    resigned(run, reserving(1, blessed="yes"))
    assert any("blessed" in text for code, _, text in findings(run, "warning") if code == "reservation-says-more")


def test_sites_that_were_charged_for_other_numbers_than_the_rest_are_named(run: Run, tmp_path: Path) -> None:
    """Also where there is no model to compare with."""
    run.folder = tmp_path
    noise = float(next(e for e in run.ledgers[A] if e.kind == "reserve").details["noise_multiplier"])
    resigned(run, reserving(0, released=36, noise_std=[repr(noise * (1 + 2.0**-20 * 6))]))
    assert ("mechanism-differs", "run") in {(code, where) for code, where, _ in findings(run)}


def test_declared_units_that_change_or_are_not_the_policy_s_are_named(run: Run, audited: Federation) -> None:
    card = audited.policy_card(A, 20.0)
    assert findings(run, policy_cards=[card]) == []
    other = replace(card, privacy=replace(card.privacy, units=2 * UNITS))
    failed = findings(run, policy_cards=[other])
    assert any(where == A and "policy card declares 2000 units" in text for _, where, text in failed), failed


def test_records_that_change_within_one_process_fail_and_after_a_restart_are_told(run: Run) -> None:
    resigned(run, reserving(3, records="cd" * 32))
    assert any(code == "records-changed" and where == A for code, where, _ in findings(run))
    resigned(run, reserving(3, rng_key_id="cd" * 32))
    run.findings.clear()
    assert findings(run) == []
    told = findings(run, "warning")
    assert any(code == "records-changed" and "rounds 2 and 3" in text for code, _, text in told)


def test_a_noise_key_that_comes_back_is_named(run: Run) -> None:
    resigned(run, reserving(2, rng_key_id="cd" * 32))
    assert any(code == "noise-key-reused" and where == A for code, where, _ in findings(run))


def test_rounds_charged_in_another_order_are_named(run: Run) -> None:
    numbers = {1: 3, 3: 1}
    resigned(run, lambda e: replace(e, round=numbers.get(e.round, e.round)) if e.job == "run-1" else e)
    failed = {(code, where) for code, where, _ in findings(run)}
    assert {("rounds-out-of-order", A), ("head-of-another-round", A)} <= failed


def test_a_site_that_released_in_another_attempt_than_the_rest_is_named(run: Run) -> None:
    resigned(run, lambda e: replace(e, attempt=0) if e.job == "run-1" else e)
    failed = findings(run)
    assert any(code == "attempts-differ" and where == A and "round 2" in text for code, where, text in failed), failed


# policy cards and what a ledger was started with


def renamed(card: PolicyCard, **policy: Any) -> PolicyCard:
    return replace(card, privacy=replace(card.privacy, **policy))


def test_a_card_of_another_data_set_silences_no_cap(run: Run, audited: Federation) -> None:
    """Whatever the order, and whichever site it is of."""
    low, wide = audited.policy_card(A, 1.0), renamed(audited.policy_card(A, 900.0), dataset="more-images")
    for cards in ([low, wide], [wide, low]):
        run.findings.clear()
        assert [(code, where) for code, where, _ in findings(run, policy_cards=cards)] == [("epsilon-above-the-cap", A)]
    run.findings.clear()
    (failed,) = findings(run, policy_cards=[wide])
    assert failed[:2] == ("card-of-another-data-set", A)
    assert "'more-images'" in failed[2]
    assert "'images'" in failed[2]
    run.findings.clear()
    stranger = replace(wide, site="Hospital-A")
    assert findings(run, policy_cards=[stranger]) == []
    assert any(code == "card-not-used" for code, *_ in findings(run, "warning", policy_cards=[stranger]))


def test_of_two_cards_of_one_data_set_the_lower_cap_counts(run: Run, audited: Federation) -> None:
    cards = [audited.policy_card(A, 1.0), audited.policy_card(A, 900.0)]
    for order in (cards, cards[::-1]):
        run.findings.clear()
        codes = {(code, where) for code, where, _ in findings(run, policy_cards=order)}
        assert codes == {("cards-differ", A), ("epsilon-above-the-cap", A)}


def test_a_job_that_the_site_s_card_refuses_is_named(run: Run, audited: Federation) -> None:
    strict = renamed(audited.policy_card(A, 20.0), min_noise_multiplier=50.0)
    (failed,) = findings(run, policy_cards=[strict])
    assert failed[:2] == ("policy-not-kept", A)
    assert "below this site's least of 50.0" in failed[2]


@pytest.mark.parametrize("delta", ["0.09", "0.001", "0.5"])
def test_a_genesis_whose_delta_protects_nobody_is_named(run: Run, audited: Federation, delta: str) -> None:
    """With the card, which says another one, and without it: a thousand units are in every reservation."""
    resigned(run, lambda e: replace(e, delta=delta) if e.kind == "genesis" else e)
    failed = findings(run)
    assert any(code == "delta-protects-nobody" and where == A and "1000 units" in text for code, where, text in failed)
    run.findings.clear()
    codes = {code for code, *_ in findings(run, policy_cards=[audited.policy_card(A, 20.0)])}
    assert {"delta-protects-nobody", "delta-differs"} <= codes


def test_a_genesis_below_the_job_s_delta_or_of_another_unit_than_the_card_is_named(
    run: Run, audited: Federation
) -> None:
    resigned(run, lambda e: replace(e, delta="1e-07") if e.kind == "genesis" else e)
    assert ("delta-differs", A) in {(code, where) for code, where, _ in findings(run)}
    run.findings.clear()
    resigned(run, lambda e: replace(e, delta="1e-05", unit="group") if e.kind == "genesis" else e)
    codes = {code for code, *_ in findings(run, policy_cards=[audited.policy_card(A, 20.0)])}
    assert {"delta-differs", "mechanism-differs"} <= codes


def test_a_bare_ledger_and_an_export_state_a_delta_that_protects(
    provisioned: Path, keys: KnownKeys, tmp_path: Path
) -> None:
    kit = provisioned / A / "startup"
    policy = SitePrivacyConfig("images", 10, 20.0, 0.09, ledger=str(tmp_path))
    create_ledger(policy, A, kit)
    export_ledger(policy, A, kit, tmp_path / "ten")
    ten = load_ledger(tmp_path / "ten", keys, LedgerReader())
    assert audit_ledger(ten, {}).passed  # below one over ten units
    for card in (replace(policy, units=11, delta=0.01), replace(policy, delta=0.08)):
        audit = audit_ledger(ten, {}, PolicyCard(A, card, SiteSecAggConfig()))
        assert "delta-differs" in {f.code for f in audit.findings}
    # who signs another number of units for the same ledger
    export_ledger(replace(policy, units=1000, delta=1e-4), A, kit, tmp_path / "thousand")
    codes = {f.code for f in audit_ledger(load_ledger(tmp_path / "thousand", keys, LedgerReader()), {}).findings}
    assert {"delta-protects-nobody", "export-differs"} <= codes


# exports, and ledgers handed over beside runs


def export_of(federation: Federation, folder: Path, site: str = A) -> Path:
    export_ledger(federation.policy(site), site, federation.kit(site), folder)
    return folder


def test_an_export_that_ends_before_the_copies_of_its_runs_is_cut(
    provisioned: Path, keys: KnownKeys, tmp_path: Path
) -> None:
    """Exported after the run from a backup of before; signed and consistent in itself."""
    federation = Federation(tmp_path / "federation", provisioned, cap=100.0)
    federation.run("first")
    ledger = Path(federation.policy(A).ledger) / "images.ledger.jsonl"
    backup = ledger.read_bytes()
    second = federation.run("second")
    ledger.write_bytes(backup)
    own = load_ledger(export_of(federation, tmp_path / "cut"), keys, LedgerReader())
    assert audit_ledger(own, {}).passed
    run = load_run(second, keys)
    assert [(f.code, f.where) for f in compare([run], [own]) if f.severity == "fail"] == [("ledger-cut", A)]
    own.export = None  # a bare file says no time
    assert [(f.code, f.where) for f in compare([run], [own]) if f.severity == "fail"] == [("ledger-cut", A)]


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n"], ids=["empty", "a line", "no entry"])
def test_an_export_of_nothing_is_named(audited: Federation, keys: KnownKeys, tmp_path: Path, content: bytes) -> None:
    folder = export_of(audited, tmp_path / "export")
    (folder / "images.ledger.jsonl").write_bytes(content)
    codes = {f.code for f in audit_ledger(load_ledger(folder, keys, LedgerReader()), {}).findings}
    assert {"ledger-damaged", "file-changed"} <= codes


def test_an_export_of_another_federation_is_named(audited: Federation, keys: KnownKeys, tmp_path: Path) -> None:
    from tests.audited import provision

    kits = provision(tmp_path, SITES)
    other = export_of(Federation(tmp_path / "other", kits), tmp_path / "export")
    codes = {f.code for f in audit_ledger(load_ledger(other, keys, LedgerReader()), {}).findings}
    assert codes == {"ledger-damaged"}  # the roster has another root
    unknown = load_ledger(other, KnownKeys(), LedgerReader())
    between = {f.code for f in compare([load_run(audited.root / "run-1", keys)], [unknown])}
    assert {"another-federation", "ledger-forked"} <= between


def test_an_export_of_a_site_that_no_run_has_is_said(audited: Federation, keys: KnownKeys, tmp_path: Path) -> None:
    own = load_ledger(export_of(audited, tmp_path / "export"), keys, LedgerReader())
    run = load_run(audited.root / "run-1", keys)
    run.ledgers.pop(A)
    assert [(f.code, f.severity) for f in compare([run], [own])] == [("ledger-of-no-run", "warning")]


def test_the_command_takes_cards_by_site_and_data_set(
    audited: Federation, folder: Path, keys: KnownKeys, tmp_path: Path
) -> None:
    assert keys.roster
    write_roster(tmp_path / "roster.json", keys.roster)
    low, wide = audited.policy_card(A, 1.0), renamed(audited.policy_card(A, 900.0), dataset="more-images")
    options = ["--roster", str(tmp_path / "roster.json")]
    for name, card in (("low", low), ("wide", wide)):
        (tmp_path / f"{name}.json").write_text(card.to_json())
        options += ["--policy", str(tmp_path / f"{name}.json")]
    done = CliRunner().invoke(app, ["audit", str(folder), *options, "--json"])
    assert done.exit_code == 1
    (run,) = json.loads(done.output)["runs"]
    assert [f["code"] for f in run["findings"] if f["severity"] == "fail"] == ["epsilon-above-the-cap"]


def test_an_older_copy_of_a_ledger_and_a_later_head_removed_with_it_are_named(
    audited: Federation, folder: Path, keys: KnownKeys
) -> None:
    """The server cuts a site's last release out of ledger, record and manifest alike."""
    ledger = folder / "privacy" / f"{A}.ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    edit_record(folder, lambda r: r["rounds"][3]["privacy"].update({A: r["rounds"][2]["privacy"][A]}))
    audited.resign(folder)
    run = load_run(folder, keys)
    failed = {(code, where) for code, where, _ in findings(run)}
    assert {("round-missing", A), ("head-of-another-round", A)} <= failed
    assert json.loads((folder / MANIFEST).read_text())["signature"]
