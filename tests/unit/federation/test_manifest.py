"""The run manifest: whole and signed it is accepted, with anything changed it is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.common.files import file_digest
from fedmpt_core.common.signing import DocumentError
from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.run.manifest import (
    RunManifest,
    check_manifest,
    read_manifest,
)
from fedmpt_core.federation.run.record import MANIFEST, RunRecord
from tests.kits import write_kit

JOB = JobConfig("audited", ("cat", "dog"))
HEAD = {"seq": 2, "hash": "ab" * 32, "sig": "cd"}
SITE = {"device": "cpu", "versions": {"fedmpt": "1"}, "evaluates": False, "backbone_digest": "aa", "weight": 1}
SUM = {"cohort": ["site-1"], "members": 1, "threshold": 1, "attempt": 0, "epoch": 1, "transcript": "ee"}
SUM |= {"left_out": {}, "faults": {}, "beyond": 0}
PRIVACY = {"site-1": {"epsilon": 1.0, "delta": 1e-5, "head": HEAD}}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    write_kit(folder, "fl.example.org", who="server")
    shutil.copy(folder / "server.crt", folder / "rootCA.pem")
    return folder


@pytest.fixture
def run(tmp_path: Path, kit: Path) -> Path:
    return left_by(tmp_path, kit)


def left_by(folder: Path, kit: Path | None, *, insecure: bool = False) -> Path:
    secagg = replace(JOB.secagg, insecure_identities=insecure)
    record = RunRecord.start(replace(JOB, secagg=secagg), "run-1")
    fields = {"backbone": "b", "is_stand_in": False, **SITE}
    record = record.joined({"site-1": fields, "site-2": fields}).with_round(0, 0.1, {}, {"mAP": 1.0})
    record = record.with_round(1, 0.1, {"site-1": 10}, {}, PRIVACY, {**SUM, "seconds": {"train": 1.0}})
    record = record.ended_as("completed")
    (folder / "privacy").mkdir()
    files = {"result.json": b"{}", "privacy/site-1.ledger.jsonl": b"{}\n", "privacy/site-1.crt": b"PEM"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    copies = {"site-1": {"file": "privacy/site-1.ledger.jsonl", "certificate": "privacy/site-1.crt"}}
    found = RunManifest.of(record, folder, ledgers=copies, kit=kit)
    (folder / MANIFEST).write_text(found.to_json())
    return folder


def test_a_manifest_says_who_was_in_which_sum_and_is_signed(run: Path, kit: Path) -> None:
    found = read_manifest(run)
    check_manifest(found, run)
    assert (found.run_id, found.job, found.config_digest) == ("run-1", "audited", JOB.digest())
    assert (found.outcome, found.aggregation, found.identities) == ("completed", "masked", "start-up kits")
    assert found.rounds == [{"round": 0, "survivors": []}, {"round": 1, "survivors": ["site-1"], **SUM}]
    assert found.sites["site-1"]["head"] == HEAD
    assert found.sites["site-1"]["ledger"]["file"] == "privacy/site-1.ledger.jsonl"
    assert found.sites["site-2"]["ledger"] == {"kept": "not asked for"}
    assert found.server["certificate"] == (kit / "server.crt").read_text()
    assert found.files["result.json"] == file_digest(run / "result.json")
    assert len(found.signature) == 512


def test_a_simulation_has_no_keys_and_says_so(tmp_path: Path) -> None:
    found = read_manifest(left_by(tmp_path, None, insecure=True))
    check_manifest(found, tmp_path)
    assert (found.signature, found.root, found.identities) == ("", "", "insecure")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "outcome": lambda m: m.update(outcome="completed "),
    "config digest": lambda m: m.update(config_digest="0" * 64),
    "a survivor less": lambda m: m["rounds"][1].update(survivors=[]),
    "a threshold": lambda m: m["rounds"][1].update(threshold=0),
    "a round twice": lambda m: m["rounds"].append(m["rounds"][1]),
    "a site less": lambda m: m["sites"].pop("site-2"),
    "a head": lambda m: m["sites"]["site-1"].update(head=None),
    "a version": lambda m: m["server"]["versions"].update(fedmpt="2"),
    "a file less": lambda m: m["files"].pop("result.json"),
    "signature": lambda m: m.update(signature="00" * 256),
    "signature of no hex": lambda m: m.update(signature="x"),
    "no signature": lambda m: m.update(signature=""),
    "no certificate": lambda m: m["server"].pop("certificate"),
    "certificate of another kind": lambda m: m["server"].update(certificate="PEM"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_changed_in_one_place_is_refused(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    plain = json.loads((run / MANIFEST).read_text())
    change(plain)
    (run / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(DocumentError):
        check_manifest(read_manifest(run), run)


def test_a_manifest_signed_by_another_key_is_that_key_s(run: Path, tmp_path: Path) -> None:
    """The signature holds, and the certificate says whose it is: who knows the federation sees that it is not hers."""
    other = tmp_path / "other"
    other.mkdir()
    write_kit(other, "fl.example.org", who="server")
    shutil.copy(other / "server.crt", other / "rootCA.pem")
    (tmp_path / "again").mkdir()
    again = read_manifest(left_by(tmp_path / "again", other))
    check_manifest(again, tmp_path / "again")
    assert again.server["certificate"] != read_manifest(run).server["certificate"]


@pytest.mark.parametrize("name", ["result.json", "privacy/site-1.ledger.jsonl", "privacy/site-1.crt"])
def test_a_file_that_was_changed_or_lost_is_named(run: Path, name: str) -> None:
    with (run / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(DocumentError, match=f"{name}: is not the file that was signed"):
        check_manifest(read_manifest(run), run)
    (run / name).unlink()
    with pytest.raises(DocumentError, match=f"{name}: cannot be read"):
        check_manifest(read_manifest(run), run)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "result.json\0"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    found = read_manifest(left_by(tmp_path, None, insecure=True))
    with pytest.raises(DocumentError, match="outside its folder"):
        check_manifest(replace(found, files={name: "0" * 64, **found.files}), tmp_path)


def test_a_manifest_must_name_the_record(tmp_path: Path) -> None:
    found = read_manifest(left_by(tmp_path, None, insecure=True))
    with pytest.raises(DocumentError, match=r"does not name the digest of result\.json"):
        check_manifest(replace(found, files={}), tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "the run has not ended yet"),
        ("", "is not a run manifest"),
        ("[]", "schema=None"),
        ('{"run_id": 1, "schema": 1}', "is not a run manifest"),
    ],
)
def test_what_is_no_manifest_is_a_sentence(run: Path, text: str | None, sentence: str) -> None:
    (run / MANIFEST).unlink()
    if text is not None:
        (run / MANIFEST).write_text(text)
    with pytest.raises(DocumentError, match=sentence):
        read_manifest(run)


def test_a_manifest_of_a_later_release_is_refused(run: Path) -> None:
    plain = json.loads((run / MANIFEST).read_text())
    (run / MANIFEST).write_text(json.dumps({**plain, "schema": 2}))
    with pytest.raises(DocumentError, match="this release reads schema 1"):
        read_manifest(run)
