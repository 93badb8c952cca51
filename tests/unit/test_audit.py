"""The audit on signed runs: an honest one passes, and each manipulation is found and named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import AGREEMENT, INDEPENDENT, REPORTED, SECOND, audit_run, compare
from fedmpt_core.audit.run import Anchors, NoRun, load_run
from fedmpt_core.config import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.kit import card_of, write_roster
from fedmpt_core.policy_card import PolicyCard
from fedmpt_core.privacy.budget import Budget, resolved
from fedmpt_core.privacy.chain import SIGNED_PREFIX, canonical
from fedmpt_core.privacy.signing import load_signer
from fedmpt_core.privacy.site_ledger import create_ledger, ledger_copy, open_ledger
from fedmpt_core.result import RunRecord
from fedmpt_core.run_manifest import MANIFEST, RunManifest, file_digest, read_manifest
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.site_config import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_flare.cli import app
from tests.federation import DEPLOY
from tests.kits import write_kit
from tests.unit.test_deploy import flare

SITES, SERVER = ("hospital-a", "hospital-b", "hospital-c"), "fl.example.org"
JOB = resolved(
    JobConfig(
        "audited",
        ("cat", "dog"),
        training=TrainingConfig(rounds=3, local_steps=2),
        privacy=PrivacyConfig(epsilon=6.0),
        federation=FederationConfig(max_failed_rounds=1, evaluate_every=0),
    )
)
SAID = {"device": "cpu", "versions": {"fedmpt": "1"}, "evaluates": False, "backbone_digest": "aa"}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("provisioned")
    flare("provision", "-p", DEPLOY / "provision" / "project.yml", "-w", root / "kits", home=root)
    return root / "kits" / "fedmpt" / "prod_00"


@pytest.fixture(scope="module")
def anchors(kits: Path) -> Anchors:
    cards = [card_of(kits / site / "startup") for site in SITES]
    return Anchors(Roster(cards[0].root, {c.name: Member(c.fingerprint, c.org) for c in cards}))


class Federation:
    """Ledgers that go on from run to run, and the runs that a server would leave."""

    def __init__(self, root: Path, kits: Path) -> None:
        self.root, self.kits = root, kits
        self.sites = {}
        for site in SITES:
            policy = SitePrivacyConfig("images", 1000, 20.0, 1e-5, ledger=str(root / "ledgers" / site))
            self.sites[site] = SiteConfig(DataConfig("scenes"), privacy=policy)
            create_ledger(policy, site, self.kit(site))

    def kit(self, who: str) -> Path:
        return self.kits / who / "startup"

    def run(self, run_id: str, job: JobConfig = JOB) -> Path:
        """A completed run; round 2 was tried twice."""
        folder = self.root / run_id
        (folder / "privacy").mkdir(parents=True)
        record = RunRecord.start(job, run_id).joined(
            {site: {"backbone": "b", "is_stand_in": False, **SAID} for site in SITES}
        )
        record = record.with_round(0, 0.1, {}, {})
        budgets = {site: self._budget(site, job, run_id) for site in SITES}
        details = {"unit": "record", "engine": job.privacy.engine, "config": job.digest()}
        details |= {"aggregation": "masked", "identities": "start-up kits"}
        details |= {"max_grad_norm": job.privacy.max_grad_norm, "code": f"fedmpt {version('fedmpt')}"}
        for number in range(1, job.training.rounds + 1):
            privacy = {}
            for site, budget in budgets.items():
                for attempt in range(2 if number == 2 else 1):
                    key = hashlib.sha256(f"{run_id} {site}".encode()).hexdigest()
                    reserved = budget.reserve(number, attempt, {**details, "rng_key_id": key})
                budget.commit(reserved, hashlib.sha256(f"{run_id} {site} {number}".encode()).hexdigest())
                head = budget.head().to_dict()
                privacy[site] = {"epsilon": budget.spent(), "delta": job.privacy.delta, "head": head}
            facts = {"cohort": list(SITES), "threshold": Floors(3, 1).threshold(3), "number": number, "epoch": 1}
            facts |= {"attempt": int(number == 2), "corrected": [], "transcript": f"{run_id}-{number}"}
            record = record.with_round(number, 0.1, dict.fromkeys(SITES, 10), {}, privacy, facts)
        record = record.ended_as("completed")
        files = ["result.json", "model.safetensors"]
        (folder / "result.json").write_text(json.dumps(record.to_dict()))
        (folder / "model.safetensors").write_bytes(b"model")
        copies = {}
        for site in SITES:
            ledger, certificate = ledger_copy(self._policy(site), self.kit(site))
            copies[site] = {"file": f"privacy/{site}.ledger.jsonl", "certificate": f"privacy/{site}.crt"}
            (folder / copies[site]["file"]).write_bytes(ledger)
            (folder / copies[site]["certificate"]).write_bytes(certificate)
            files += copies[site].values()
        found = RunManifest.of(
            record, folder, versions={"fedmpt": "1"}, ledgers=copies, files=files, kit=self.kit(SERVER)
        )
        (folder / MANIFEST).write_text(found.to_json())
        return folder

    def resign(self, folder: Path, **changes: Any) -> None:
        """A server that lies signs what was changed."""
        old = read_manifest(folder)
        record = json.loads((folder / "result.json").read_text())
        digests = {name: file_digest(folder / name) for name in old.files if (folder / name).exists()}
        rounds = [{"round": r["round"], "survivors": r["sites"], **r["secagg"]} for r in record["rounds"]]
        found = replace(old, files=digests, rounds=rounds, signature="", **changes)
        sign, _, _ = load_signer(self.kit(SERVER) / "server.key", self.kit(SERVER) / "server.crt")
        (folder / MANIFEST).write_text(replace(found, signature=sign(found.signed_text())).to_json())

    def card(self, site: str, cap: float) -> PolicyCard:
        changed = replace(self.sites[site], privacy=replace(self._policy(site), epsilon=cap))
        return PolicyCard.of(site, changed, open_ledger(self._policy(site), site, self.kit(site)).entries())

    def _policy(self, site: str) -> SitePrivacyConfig:
        policy = self.sites[site].privacy
        assert policy
        return policy

    def _budget(self, site: str, job: JobConfig, run_id: str) -> Budget:
        return Budget(job, self.sites[site], open_ledger(self._policy(site), site, self.kit(site)), run_id)


@pytest.fixture
def federation(tmp_path: Path, kits: Path) -> Federation:
    return Federation(tmp_path, kits)


def codes(folder: Path, anchors: Anchors, severity: str = "fail", **options: Any) -> set[str]:
    return {f.code for f in audit_run(load_run(folder, anchors), **options).findings if f.severity == severity}


def test_an_honest_run_passes_and_its_numbers_agree(federation: Federation, anchors: Anchors) -> None:
    federation.run("earlier")
    folder = federation.run("run-1")
    found = audit_run(load_run(folder, anchors), independent=True, cards=[federation.card(SITES[0], 20.0)])
    assert found.passed
    assert [(f.code, f.severity) for f in found.findings] == [("retries-charged", "note")] * 3
    for site, spent in found.spending.items():
        assert (spent.dataset, spent.jobs, spent.cap) == ("images", 2, 20.0 if site == SITES[0] else None)
        assert 0 < spent.job <= JOB.privacy.epsilon < spent.total
        assert list(spent.accountants) == [REPORTED, SECOND, INDEPENDENT]
        for value in spent.accountants.values():
            assert value == pytest.approx(spent.job, abs=AGREEMENT)
        assert sorted(spent.by_round) == [1, 2, 3]
    record = json.loads((folder / "result.json").read_text())
    assert record["rounds"][3]["privacy"][SITES[0]]["epsilon"] == pytest.approx(found.spending[SITES[0]].by_round[3])


def lines(folder: Path, site: str = SITES[0]) -> list[bytes]:
    return (folder / "privacy" / f"{site}.ledger.jsonl").read_bytes().splitlines(keepends=True)


def write(folder: Path, found: list[bytes], site: str = SITES[0]) -> None:
    (folder / "privacy" / f"{site}.ledger.jsonl").write_bytes(b"".join(found))


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "result.json").read_text())
    change(values)
    (folder / "result.json").write_text(json.dumps(values))


def edit_field(folder: Path) -> None:
    found = lines(folder)
    number = next(i for i, line in enumerate(found) if b'"reserve"' in line)
    found[number] = found[number].replace(b'"steps":2', b'"steps":1')
    write(folder, found)


def forge(folder: Path) -> None:
    found = lines(folder)
    entry = json.loads(found[-1])
    found[-1] = canonical({**entry, "sig": "00" * 256}) + b"\n"
    write(folder, found)


def swap(folder: Path) -> None:
    for kind in ("ledger.jsonl", "crt"):
        a, b = (folder / "privacy" / f"{site}.{kind}" for site in SITES[:2])
        a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
        a.write_bytes(b_bytes)
        b.write_bytes(a_bytes)


def another_key(folder: Path) -> None:
    """The whole ledger again, less one reservation's steps, by a key that its forger made."""
    kit = folder.parent / "forged"
    write_kit(kit, SITES[0])
    sign, _, spki = load_signer(kit / "client.key", kit / "client.crt")
    found, before = [], "0" * 64
    for line in lines(folder):
        entry = json.loads(line)
        genesis = {"key_spki": spki, "public_key": sign.public_key}
        entry |= {"prev": before} | (genesis if entry["kind"] == "genesis" else {})
        body = {k: v for k, v in entry.items() if k not in ("hash", "sig")}
        before = hashlib.sha256(canonical(body)).hexdigest()
        found.append(canonical({**body, "hash": before, "sig": sign(SIGNED_PREFIX + bytes.fromhex(before))}) + b"\n")
    write(folder, found)
    shutil.copy(kit / "client.crt", folder / "privacy" / f"{SITES[0]}.crt")


def change_job(section: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        job = replace(JOB, **{section: replace(getattr(JOB, section), **values)})
        edit_record(folder, lambda r: r.update(config=job.to_dict(), config_digest=job.digest()))

    return change


def repeat_round(folder: Path) -> None:
    edit_record(folder, lambda r: r["rounds"].append(r["rounds"][-1]))


OLD = 1 + 3 * 2 + 1  # lines before the second run: genesis, its three rounds, one attempt more
# what is done, and what an auditor finds when the server signs the change all the same
MANIPULATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "edit a field": (edit_field, "ledger-damaged"),
    "drop an entry": (lambda f: write(f, [*lines(f)[:3], *lines(f)[4:]]), "ledger-damaged"),
    "reorder": (lambda f: write(f, [*lines(f)[:-2], *lines(f)[:-3:-1]]), "ledger-damaged"),
    "cut the tail": (lambda f: write(f, lines(f)[:-1]), "ledger-cut"),
    "replay another job's entry": (lambda f: write(f, [*lines(f), lines(f)[1]]), "ledger-damaged"),
    "swap sites": (swap, "ledger-damaged"),
    "change sigma": (change_job("privacy", noise_multiplier=9.0), "mechanism-differs"),
    "change rate": (change_job("privacy", sample_rate=0.125), "mechanism-differs"),
    "forge a signature": (forge, "ledger-damaged"),
    "re-sign with another key": (another_key, "ledger-damaged"),
    "remove a site's ledger": (lambda f: (f / "privacy" / f"{SITES[0]}.ledger.jsonl").unlink(), "ledger-missing"),
    "change the config": (change_job("training", learning_rate=0.5), "config-changed"),
    "change the model": (lambda f: (f / "model.safetensors").write_bytes(b"another"), ""),
    "duplicate a round": (repeat_round, "round-twice"),
    "change the bound": (change_job("privacy", max_grad_norm=2.0), "mechanism-differs"),
    "restore an old ledger": (lambda f: write(f, lines(f)[:OLD]), "ledger-cut"),
}


@pytest.mark.parametrize(("change", "code"), MANIPULATIONS.values(), ids=MANIPULATIONS)
def test_a_manipulation_is_found_and_named(
    federation: Federation, anchors: Anchors, change: Callable[[Path], Any], code: str
) -> None:
    federation.run("earlier")
    folder = federation.run("run-1")
    assert codes(folder, anchors) == set()
    change(folder)
    found = codes(folder, anchors)
    assert "file-changed" in found
    if code:  # a server that lies may publish another model than the sum; nothing a site signs speaks of it
        record = json.loads((folder / "result.json").read_text())
        federation.resign(folder, config_digest=record["config_digest"])
        found = codes(folder, anchors)
        assert code in found
        assert "file-changed" not in found


def test_a_manifest_signed_by_somebody_else_is_not_believed(
    federation: Federation, anchors: Anchors, tmp_path: Path
) -> None:
    folder = federation.run("run-1")
    other = tmp_path / "other"
    write_kit(other, SERVER, who="server")
    old, (sign, _, _) = read_manifest(folder), load_signer(other / "server.key", other / "server.crt")
    theirs = (other / "server.crt").read_text()
    for root in (old.root, theirs):
        new = replace(old, server={**old.server, "certificate": theirs}, root=root, signature="")
        (folder / MANIFEST).write_text(replace(new, signature=sign(new.signed_text())).to_json())
        assert "manifest-signed-by-another" in codes(folder, anchors)


def test_without_a_roster_the_audit_says_what_it_could_not_check(federation: Federation) -> None:
    folder = federation.run("run-1")
    assert codes(folder, Anchors()) == set()
    assert codes(folder, Anchors(), "warning") == {"no-roster"}


def test_a_site_over_its_cap_is_named(federation: Federation, anchors: Anchors) -> None:
    folder = federation.run("run-1")
    assert codes(folder, anchors, cards=[federation.card(SITES[1], 1.0)]) == {"epsilon-above-the-cap"}


def test_ledgers_that_do_not_continue_between_runs_are_named(
    federation: Federation, anchors: Anchors, tmp_path: Path, kits: Path
) -> None:
    first, second = federation.run("run-1"), federation.run("run-2")
    runs = [load_run(f, anchors) for f in (second, first)]
    assert compare(runs) == []
    kept = runs[1].ledgers[SITES[0]]  # the shorter one ends differently
    runs[1].ledgers[SITES[0]] = (*kept[:-1], replace(kept[-1], hash="f" * 64))
    assert [(f.code, f.where) for f in compare(runs)] == [("ledger-forked", SITES[0])]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["rounds"][1]["secagg"].update(threshold=2),
        lambda r: r["rounds"][1]["secagg"].pop("cohort"),
        lambda r: r["rounds"][1].update(sites=list(SITES[:2])),
        lambda r: r["rounds"][1].update(sites=["hospital-x", *SITES[:2]]),
    ],
    ids=["threshold", "no cohort", "too few", "a stranger"],
)
def test_sums_against_the_rules_are_named(
    federation: Federation, anchors: Anchors, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = federation.run("run-1")
    edit_record(folder, change)
    federation.resign(folder)
    assert "aggregation-rules" in codes(folder, anchors)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "no folder": shutil.rmtree,
    "half downloaded": lambda f: (f / MANIFEST).unlink(),
    "no record": lambda f: (f / "result.json").unlink(),
    "a later record": lambda f: edit_record(f, lambda r: r.update(schema=2)),
    "rounds of another kind": lambda f: edit_record(f, lambda r: r.update(rounds={"1": 2})),
    "a round of another kind": lambda f: edit_record(f, lambda r: r["rounds"].append(7)),
    "privacy of another kind": lambda f: edit_record(f, lambda r: r["rounds"][1].update(privacy=[])),
    "no job": lambda f: edit_record(f, lambda r: r.pop("config")),
    "a later job": lambda f: edit_record(f, lambda r: r["config"].update(surprise=1)),
    "no text": lambda f: (f / "result.json").write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_what_is_no_run_is_a_sentence(federation: Federation, anchors: Anchors, breaks: Callable[[Path], Any]) -> None:
    folder = federation.run("run-1")
    breaks(folder)
    with pytest.raises(NoRun, match="run-1"):
        load_run(folder, anchors)
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert isinstance(done.exception, NoRun)


def test_the_command_line_tells_scripts_and_people(federation: Federation, anchors: Anchors, tmp_path: Path) -> None:
    folder = federation.run("run-1")
    assert anchors.roster
    write_roster(tmp_path / "roster.json", anchors.roster)
    options = ["--roster", str(tmp_path / "roster.json")]
    done = CliRunner().invoke(app, ["audit", str(folder), *options, "--json", "--independent"])
    assert done.exit_code == 0, done.output
    plain = json.loads(done.output)
    assert plain["passed"]
    found = audit_run(load_run(folder, anchors), independent=True)
    assert plain["runs"][0]["spending"] == json.loads(json.dumps({s: asdict(v) for s, v in found.spending.items()}))
    write(folder, lines(folder)[:-1])
    done = CliRunner().invoke(app, ["audit", str(folder), *options])
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "ledger-cut" in done.output
    assert not json.loads(CliRunner().invoke(app, ["audit", str(folder), *options, "--json"]).output)["passed"]


def test_names_cannot_draw_on_the_terminal(federation: Federation) -> None:
    folder = federation.run("run-1")
    name = "\x1b[31m[red]hospital\x07"
    edit_record(folder, lambda r: r["sites"].update({name: r["sites"][SITES[0]]}))
    done = CliRunner().invoke(app, ["audit", str(folder)], terminal_width=200)
    assert done.exit_code == 1
    assert "\x1b[31m[" not in done.output
    assert "\x07" not in done.output
    assert "[red]hospital" in done.output
