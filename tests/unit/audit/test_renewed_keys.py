"""A site's key is renewed between two runs: both audit with either roster, and no forged change of key does."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import Examination, examine
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader, time_of
from fedmpt_core.audit.run_evidence import load_run
from fedmpt_core.audit.site_ledger import is_ledger, load_ledger
from fedmpt_core.privacy.ledger.export import export_ledger
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.start_up_kit import key_card_of, write_roster
from fedmpt_flare.cli.main import app
from fedmpt_flare.cli.options import WrongUse
from tests.audited import SITES, Federation, lines, renewed_kit, roster_of, write, written_by

SITE, OTHER = SITES[:2]
UNKNOWN = {("key-not-in-the-roster", SITE)}


class Renewed:
    """The run `before`, the renewal, the run `after`, the site's export; both rosters, and a key of nobody's."""

    def __init__(self, root: Path, kits: Path) -> None:
        self.federation = Federation(root, kits)
        self.before = self.federation.run("before")
        self.old = roster_of(kits).roster or pytest.fail("no roster")
        self.federation.renew(SITE)
        self.after = self.federation.run("after")
        card = key_card_of(self.federation.kit(SITE))
        self.new = Roster(self.old.root, {**self.old.members, SITE: Member(card.fingerprint, card.org)})
        self.export = root / "export"
        export_ledger(self.federation.policy(SITE), SITE, self.federation.kit(SITE), self.export)
        self.rotation = next(i for i, line in enumerate(lines(self.after)) if json.loads(line)["kind"] == "rotate")
        self.when = time_of(json.loads(lines(self.after)[self.rotation])["time"])
        self.thief = renewed_kit(kits, SITE, root / "thief")  # whoever holds the root's key can make one


@pytest.fixture(scope="module")
def renewed(provisioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Renewed:
    return Renewed(tmp_path_factory.mktemp("renewed"), provisioned)


def examined(keys: KnownKeys, *places: Path) -> Examination:
    reader = LedgerReader()
    runs = [load_run(place, keys, reader) for place in places if not is_ledger(place)]
    return examine(runs, [load_ledger(place, keys, reader) for place in places if is_ledger(place)])


def codes(examination: Examination, severity: str = "fail") -> set[tuple[str, str]]:
    findings = [f for one in (*examination.audits, *examination.ledgers) for f in one.findings]
    return {(f.code, f.where) for f in [*findings, *examination.between] if f.severity == severity}


def test_a_run_from_after_the_renewal_audits_with_the_old_roster(renewed: Renewed) -> None:
    """Its ledger has the change of key, which the old key signed."""
    audit = examined(KnownKeys(renewed.old), renewed.after)
    assert audit.passed
    assert ("key-rotated", SITE) in codes(audit, "note")
    assert examined(KnownKeys(renewed.old), renewed.after, renewed.export).passed


@pytest.mark.parametrize("beside", ["after", "export"])
def test_a_run_from_before_the_renewal_audits_with_the_new_roster_beside_a_ledger_that_has_the_change(
    renewed: Renewed, beside: str
) -> None:
    alone = examined(KnownKeys(renewed.new), renewed.before)
    assert codes(alone) == UNKNOWN
    assert "give the roster of that time" in alone.audits[0].findings[0].remedy
    both = examined(KnownKeys(renewed.new), renewed.before, getattr(renewed, beside))
    assert both.passed
    assert SITE in both.audits[0].spending
    assert ("key-rotated", SITE) in codes(both, "note")


def test_rosters_with_their_days_need_nothing_else(renewed: Renewed) -> None:
    keys = KnownKeys(renewed.old, {renewed.when: renewed.new})
    for places in ([renewed.before], [renewed.after], [renewed.before, renewed.after, renewed.export]):
        audit = examined(keys, *places)
        assert audit.passed
        assert codes(audit, "note") <= {("retries-charged", site) for site in SITES} | {("key-rotated", SITE)}


def test_before_the_first_day_the_oldest_roster_counts(renewed: Renewed) -> None:
    later = {renewed.when: renewed.old, renewed.when + timedelta(days=1): renewed.new}
    assert examined(KnownKeys(None, later), renewed.before).passed
    assert KnownKeys().at(renewed.when) is None


def without(site: str, roster: Roster) -> Roster:
    return Roster(roster.root, {name: m for name, m in roster.members.items() if name != site})


def forged_after(renewed: Renewed, folder: Path, change: Callable[[list[bytes]], list[bytes]], kit: Path) -> Path:
    """A copy of the run `after`, whose server puts a forger's ledger and certificate there, and signs that."""
    shutil.copytree(renewed.after, folder)
    write(folder, change(lines(folder)))
    shutil.copy(kit / "client.crt", folder / "privacy" / f"{SITE}.crt")
    renewed.federation.resign(folder)
    return folder


def test_a_change_of_key_that_the_old_key_did_not_sign_is_damage(renewed: Renewed, tmp_path: Path) -> None:
    def forge(ledger: list[bytes]) -> list[bytes]:
        return written_by(renewed.thief, ledger, renewed.rotation)

    run = forged_after(renewed, tmp_path / "run", forge, renewed.thief)
    for keys in (KnownKeys(renewed.old), KnownKeys(renewed.new)):
        assert ("ledger-damaged", SITE) in codes(examined(keys, run, renewed.before))


def test_a_whole_ledger_under_a_key_of_nobody_s_is_not_the_site_s(renewed: Renewed, tmp_path: Path) -> None:
    run = forged_after(renewed, tmp_path / "run", lambda ledger: written_by(renewed.thief, ledger), renewed.thief)
    for keys in (KnownKeys(renewed.old), KnownKeys(renewed.new), KnownKeys(renewed.old, {renewed.when: renewed.new})):
        assert ("key-not-in-the-roster", SITE) in codes(examined(keys, run))
        assert not examined(keys, run, renewed.before, renewed.after, renewed.export).passed


@pytest.mark.parametrize("cut", ["the change alone", "the change and all after it"])
def test_a_change_of_key_that_was_cut_away_is_found(renewed: Renewed, tmp_path: Path, cut: str) -> None:
    at, whole = renewed.rotation, cut != "the change alone"
    old_kit = renewed.federation.kits / SITE / "startup"
    run = forged_after(
        renewed,
        tmp_path / "run",
        (lambda ledger: ledger[:at]) if whole else (lambda ledger: [*ledger[:at], *ledger[at + 1 :]]),
        old_kit if whole else renewed.federation.kit(SITE),
    )
    code = "ledger-cut" if whole else "ledger-damaged"
    for keys in (KnownKeys(renewed.old), KnownKeys(renewed.old, {renewed.when: renewed.new})):
        assert (code, SITE) in codes(examined(keys, run, renewed.before, renewed.export))


def test_a_change_of_key_of_another_site_s_ledger_proves_nothing(renewed: Renewed, tmp_path: Path) -> None:
    other = (renewed.before / "privacy" / f"{OTHER}.ledger.jsonl").read_bytes().splitlines(keepends=True)
    rotation = lines(renewed.after)[renewed.rotation]
    run = forged_after(renewed, tmp_path / "run", lambda _: [*other, rotation], renewed.federation.kit(SITE))
    assert ("ledger-damaged", SITE) in codes(examined(KnownKeys(renewed.old), run, renewed.export))


def test_a_ledger_that_was_handed_to_another_site_s_key_is_not_the_site_s(renewed: Renewed) -> None:
    theirs = renewed.old.members[OTHER]
    swapped = Roster(renewed.old.root, {**renewed.old.members, OTHER: renewed.new.members[SITE], "x": theirs})
    run = load_run(renewed.after, KnownKeys(swapped))
    audit = examine([run], [])
    assert ("key-not-in-the-roster", SITE) in codes(audit)
    assert "handed to the key of hospital-b" in str(audit.audits[0].findings)


@pytest.mark.parametrize("gone", [True, False], ids=["the site was revoked", "the site got another key"])
def test_a_change_of_key_after_the_old_one_was_revoked_is_not_followed(renewed: Renewed, gone: bool) -> None:
    """The thief of a key hands the ledger to one of his own; the sites had agreed on another roster by then."""
    fresh = replace(renewed.old.members[SITE], fingerprint=b"\1" * 32)
    agreed = without(SITE, renewed.old) if gone else Roster(renewed.old.root, {**renewed.old.members, SITE: fresh})
    keys = KnownKeys(renewed.old, {renewed.when - timedelta(microseconds=1): agreed})
    assert ("key-not-in-the-roster", SITE) in codes(examined(keys, renewed.after, renewed.export))
    assert examined(keys, renewed.before).passed


def test_a_ledger_without_signatures_shows_no_change_of_key(renewed: Renewed, tmp_path: Path) -> None:
    """The bare file, given without a certificate, is nobody's word."""
    bare = tmp_path / "images.ledger.jsonl"
    shutil.copy(renewed.export / bare.name, bare)
    assert codes(examined(KnownKeys(renewed.new), renewed.before, bare)) >= UNKNOWN


def test_the_command_takes_several_rosters_with_their_days(renewed: Renewed, tmp_path: Path) -> None:
    old, new = (tmp_path / f"{name}.json" for name in ("old", "new"))
    write_roster(old, renewed.old)
    write_roster(new, renewed.new)

    def run(*rosters: Any) -> Any:
        options = [text for roster in rosters for text in ("--roster", str(roster))]
        return CliRunner().invoke(app, ["audit", str(renewed.before), *options])

    day = renewed.when.isoformat()
    assert run(old, f"{day}={new}").exit_code == 0
    assert run(new).exit_code == 1
    for rosters, says in (
        ((old, new), "from which day the later one holds"),
        ((f"yesterday={new}",), "'yesterday' is no date"),
    ):
        done = run(*rosters)
        assert isinstance(done.exception, WrongUse)
        assert says in str(done.exception)
