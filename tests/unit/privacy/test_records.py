"""No record gets a fresh budget under another name, and no ledger that was cut or restored goes unnoticed."""

import json
import shutil
from pathlib import Path

import pytest

from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.privacy.ledger.chain import LedgerError, LedgerHead
from fedmpt_core.privacy.ledger.fingerprint import fingerprint, site_key
from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger
from fedmpt_core.privacy.ledger.records import KEY, RecordLists, job_key
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path
from fedmpt_core.privacy.ledger.succession import migrate
from fedmpt_core.privacy.ledger.witness import Witness

PICTURES = [f"{i:064x}" for i in range(6)]


def policy(folder: Path, dataset: str) -> SitePrivacyConfig:
    return SitePrivacyConfig(dataset, units=10, epsilon=8.0, delta=1e-5, ledger=str(folder))


def started(folder: Path, *datasets: str, site: str = "a") -> list[RecordLists]:
    for dataset in datasets:
        create_ledger(policy(folder, dataset), site, None)
    return [RecordLists(folder, site, dataset) for dataset in datasets]


def charge(ledger: Ledger, job: str, records: str) -> None:
    details = {"sample_rate": 0.5, "noise_multiplier": 2.0, "steps": 1, "records": records}
    ledger.reserve(job=job, round=1, attempt=0, details=details, admit=lambda _: None)


@pytest.mark.parametrize(
    ("taken", "count"),
    [(PICTURES, 4), (PICTURES[:4], 4), (PICTURES[1:3], 2), ([*PICTURES[3:], "f" * 64], 1), (PICTURES[3::-1], 4)],
    ids=["superset", "same", "subset", "one", "other order"],
)
def test_records_under_another_name_are_refused_with_their_number(tmp_path: Path, taken: list[str], count: int) -> None:
    first, second = started(tmp_path, "x-ray", "x-ray-new")
    first.claim(PICTURES[:4])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for ask in (second.check, second.claim):
        with pytest.raises(LedgerError, match=rf"^{count} of {len(taken)} training records of 'x-ray-new' .* 'x-ray'"):
            ask(taken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_records_a_growing_set_and_another_site_are_welcome(tmp_path: Path) -> None:
    first, second = started(tmp_path, "x-ray", "ct")
    first.claim(PICTURES[:2])
    first.claim(PICTURES[1:4])  # one was taken out, two came
    second.claim(PICTURES[4:])
    (stranger,) = started(tmp_path, "shared", site="b")
    stranger.claim(PICTURES)
    with pytest.raises(LedgerError, match="1 of 1 training records of 'ct' were trained on as 'x-ray'"):
        second.claim(PICTURES[:1])  # although it is no longer in the set


def test_records_go_on_under_the_name_they_were_carried_to(tmp_path: Path) -> None:
    first, second, other = started(tmp_path, "x-ray", "ct", "mri")
    first.claim(PICTURES[:2])
    second.claim(PICTURES[2:4])
    migrate(policy(tmp_path, "all"), "a", None, ["x-ray", "ct"])
    merged = RecordLists(tmp_path, "a", "all")
    merged.claim(PICTURES)
    migrate(policy(tmp_path, "all-2027"), "a", None, ["all"])
    RecordLists(tmp_path, "a", "all-2027").claim(PICTURES)
    with pytest.raises(LedgerError, match=r"were trained on as 'all' \(and of all-2027, x-ray\)"):
        other.claim(PICTURES[:1])


def test_a_missing_list_leaves_the_fingerprints(tmp_path: Path) -> None:
    first, second = started(tmp_path, "x-ray", "x-ray-new")
    ledger = Ledger.open(
        ledger_path(policy(tmp_path, "x-ray")), site="a", dataset="x-ray", delta=1e-5, signer=None, verify=None
    )
    charge(ledger, "old", fingerprint(PICTURES[:3], site_key(tmp_path / KEY)))  # as earlier releases wrote it
    charge(ledger, "new", first.fingerprint(PICTURES, "new"))
    for taken in (PICTURES, PICTURES[:3]):
        with pytest.raises(LedgerError, match=f"{len(taken)} of {len(taken)} training records of 'x-ray-new'"):
            second.check(taken)
    second.check(PICTURES[:2])


@pytest.mark.parametrize("listed", [True, False])
def test_without_the_site_s_key_no_record_is_taken_for_a_new_one(tmp_path: Path, listed: bool) -> None:
    """A key drawn anew would know none of the marks; a folder may have been restored without it."""
    first, second = started(tmp_path, "x-ray", "x-ray-new")
    ledger = Ledger.open(
        ledger_path(policy(tmp_path, "x-ray")), site="a", dataset="x-ray", delta=1e-5, signer=None, verify=None
    )
    if listed:
        first.claim(PICTURES)
    else:
        charge(ledger, "job", first.fingerprint(PICTURES, "job"))
    (tmp_path / KEY).unlink()
    for ask in (second.check, second.claim, first.claim, lambda taken: second.fingerprint(taken, "job")):
        with pytest.raises(LedgerError, match=r"fingerprint\.key is missing"):
            ask(PICTURES)
    assert not (tmp_path / KEY).exists()


@pytest.mark.parametrize("text", ["no mark\n", "0" * 31 + "\n", "0" * 32 + "\n" + "\xff"])
def test_a_damaged_list_stops_the_site(tmp_path: Path, text: str) -> None:
    first, second = started(tmp_path, "x-ray", "ct")
    site_key(tmp_path / KEY)
    (tmp_path / "x-ray.records").write_text(text, encoding="utf-8")
    for lists in (first.claim, second.check):
        with pytest.raises(LedgerError, match=r"x-ray\.records is damaged: restore it"):
            lists(PICTURES)


def test_a_ledger_is_not_started_anew_for_records_that_were_trained_on(tmp_path: Path) -> None:
    (lists,) = started(tmp_path, "x-ray")
    lists.claim(PICTURES)
    ledger_path(policy(tmp_path, "x-ray")).unlink()
    with pytest.raises(LedgerError, match=r"x-ray\.records lists records that were trained on as 'x-ray': restore"):
        create_ledger(policy(tmp_path, "x-ray"), "a", None)


def test_a_list_says_nothing_without_the_key(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        started(tmp_path / name, "x-ray")[0].claim(PICTURES)
    lists = [(tmp_path / name / "x-ray.records").read_text() for name in ("one", "two")]
    assert not set(lists[0].split()) & set(lists[1].split())
    assert not any(digest[:32] in lists[0] for digest in PICTURES)
    assert all((tmp_path / "one" / n).stat().st_mode & 0o077 == 0 for n in ("x-ray.records", KEY))


def test_what_leaves_does_not_tell_whether_the_records_of_two_jobs_are_the_same(tmp_path: Path) -> None:
    (lists,) = started(tmp_path, "x-ray")
    values = [lists.fingerprint(records, job) for records in (PICTURES, PICTURES[1:]) for job in ("one", "two")]
    assert len(set(values)) == 4
    assert lists.fingerprint(reversed(PICTURES), "one") == values[0]
    assert values[0] == fingerprint(PICTURES, job_key(site_key(tmp_path / KEY), "one"))
    assert fingerprint(PICTURES, site_key(tmp_path / KEY)) not in values


def head(path: Path) -> LedgerHead:
    last = read_ledger(path)[-1]
    return LedgerHead(last.seq, last.hash, last.sig)


def test_the_site_remembers_what_a_cut_or_an_old_backup_takes_away(tmp_path: Path) -> None:
    path = tmp_path / "ledgers" / "x.ledger.jsonl"
    ledger = Ledger.create(path, site="a", dataset="x", delta=1e-5, signer=None)
    witness = Witness(tmp_path / "cache", read_ledger(path)[0])
    witness.check(read_ledger(path))  # nothing was noted yet
    backup = tmp_path / "backup"
    for job in ("one", "two"):
        charge(ledger, job, "")
        witness.note(head(path))
        witness.check(read_ledger(path))
        if job == "one":
            shutil.copy(path, backup)
    shutil.copy(path, tmp_path / "newest")
    for cut in (backup.read_bytes(), path.read_bytes().splitlines(keepends=True)[0]):
        path.write_bytes(cut)
        with pytest.raises(LedgerError, match=r"entry 2 was written .*: it was cut.*`fedmpt ledger show"):
            witness.check(read_ledger(path))
    shutil.copy(backup, path)  # a fork: another entry in its place
    charge(Ledger.open(path, site="a", dataset="x", delta=1e-5, signer=None, verify=None), "three", "")
    with pytest.raises(LedgerError, match="or is another one"):
        witness.check(read_ledger(path))
    shutil.copy(tmp_path / "newest", path)
    witness.check(read_ledger(path))


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"seq": -1, "hash": "0" * 64, "sig": ""})])
def test_a_note_that_cannot_be_read_stops_the_site(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.ledger.jsonl"
    Ledger.create(path, site="a", dataset="x", delta=1e-5, signer=None)
    witness = Witness(tmp_path / "cache", read_ledger(path)[0])
    witness.note(head(path))
    (note,) = (tmp_path / "cache").rglob("*.json")
    note.write_text(text)
    with pytest.raises(LedgerError, match="cannot be read"):
        witness.check(read_ledger(path))
