"""Real processes with real keys: what each site's policy allows is what its ledger shows, whatever the server asks.

One federation for all tests of this file; they run in order, and budgets that one has spent are spent for the next.
Without the thorough ones it is submitted a job, trains it with masks and differential privacy, and is audited.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w

from fedmpt_core.audit.auditor import Examination, audit_run, examine
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader
from fedmpt_core.audit.run_evidence import load_run
from fedmpt_core.audit.site_ledger import load_ledger
from fedmpt_core.config.job import (
    BackboneConfig,
    FederationConfig,
    JobConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
)
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.toml import load_job, without_none
from fedmpt_core.federation.run.manifest import read_manifest
from fedmpt_core.federation.run.record import load_model
from fedmpt_core.federation.server.averaging import apply, average
from fedmpt_core.federation.server.checkpoint import load_checkpoint
from fedmpt_core.federation.site.session import SiteSession
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger import succession
from fedmpt_core.privacy.ledger.budget import history
from fedmpt_core.privacy.ledger.chain import LedgerHead
from fedmpt_core.privacy.ledger.export import export_ledger
from fedmpt_core.privacy.ledger.ledger import Entries
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_core.secagg.roster import Roster
from fedmpt_core.secagg.start_up_kit import load_identity, load_roster, write_roster
from fedmpt_flare import tasks
from fedmpt_flare.site.refusals import REFUSALS
from fedmpt_flare.workspace import SITE_FILE
from tests.audited import renewed_kit
from tests.command_line import Fedmpt
from tests.federation import LEAD, ROSTER, SERVER, Federation, Outcome
from tests.pictures import CLASSES, small_sites
from tests.settings import REHEARSED, UNMASKED, UNPROTECTED

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.xdist_group("federation")]
SITES = ("site-1", "site-2", "site-3", "site-4")
DELTA, STEPS = 1e-5, 2
MASKED = SecAggConfig(rounding="deterministic", phase_timeout=60)
PRIVACY = PrivacyConfig(epsilon=8.0, delta=DELTA, sample_rate=0.5, noise_multiplier=1.5)

# A server that shows the sites the job that they agreed to, and then asks for the rounds of another.
GREEDY = """
from fedmpt_core.config.toml import job_from_dict
from fedmpt_flare.server.workflow import FedMPTWorkflow


class Greedy(FedMPTWorkflow):
    def __init__(self, job, shown):
        super().__init__(job)
        self.shown = shown

    def start_controller(self, fl_ctx):
        super().start_controller(fl_ctx)
        shown = job_from_dict({k: v for k, v in self.shown.items() if k != "config_type"}).digest()
        object.__setattr__(self._config, "digest", lambda: shown)
"""

# A filter that lets the figures of single pictures slip into an answer.
LEAKY = """
from nvflare.apis.filter import Filter


class Leaky(Filter):
    def process(self, shareable, fl_ctx):
        if "figures" in shareable.get("fields", {}):
            shareable["fields"]["figures"]["scores"] = [0.25]
        return shareable
"""


def job(
    name: str, rounds: int, privacy: PrivacyConfig = PRIVACY, secagg: SecAggConfig = MASKED, **federation: Any
) -> JobConfig:
    return JobConfig(
        name,
        CLASSES,
        seed=4,
        backbone=BackboneConfig(image_size=96),
        model=ModelConfig(conditions=("color", "pose"), trained="contexts"),
        training=TrainingConfig(rounds=rounds, local_steps=STEPS, optimizer="adam", learning_rate=0.01),
        privacy=privacy,
        secagg=secagg,
        federation=FederationConfig(
            **{"join_timeout": 300, "round_timeout": 120, "max_failed_rounds": 0, **federation}
        ),
    )


def spends(rounds: int) -> float:
    """Epsilon of so many rounds."""
    return epsilon([Steps(PRIVACY.sample_rate, 1.5, STEPS * rounds)], DELTA)


def cap_for(rounds: int) -> float:
    """A cap that so many rounds stay below, and one more does not."""
    return (spends(rounds) + spends(rounds + 1)) / 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("federation")
    (root / "pictures").mkdir()
    sites = {
        name: dataclasses.replace(
            site, privacy=dataclasses.replace(site.privacy, allow_unprotected=False, epsilon=cap_for(2))
        )
        for name, site in small_sites(root / "pictures", len(SITES)).items()
        if site.privacy
    }
    federation = Federation(root / "all", sites)
    federation.allow_at_server("greedy.Greedy", GREEDY)
    with federation:
        yield federation
    assert federation.processes() == []


def ledger(federation: Federation, site: str) -> Entries:
    """A site's ledger, every line checked with the certificate of its kit."""
    policy = federation.policies[site].privacy
    assert policy is not None
    return read_site_ledger(policy, federation.kit(site))


def rounds_of(entries: Entries, outcome: Outcome, kind: str) -> list[int]:
    return [e.round for e in entries if e.kind == kind and e.job == outcome.job_id]


def trained(outcome: Outcome) -> list[list[str]]:
    """Who took part in each round."""
    return [r["sites"] for r in outcome.record["rounds"][1:]]


def first_refusal(outcome: Outcome, site: str, phase: str) -> str:
    dropped = [e for e in outcome.events if e["event"] == "dropped"]
    return next(e["reason"] for e in dropped if (e["site"], e["phase"]) == (site, phase))


def windows(update: np.ndarray) -> list[bytes]:
    """Pieces of an update that nothing else looks like: as floats, and as the words that are masked."""
    words = np.rint(update.astype(np.float64) * 2**20).astype(np.int64).astype("<u4")
    busy = [i for i in range(0, len(update) - 8, 8) if np.abs(update[i : i + 8]).min() > 1e-4]
    assert len(busy) > 1
    chosen = busy[0], busy[-1]
    return [a[i : i + 8].tobytes() for a in (update.astype("<f4"), words) for i in chosen]


def holds(process: psutil.Process, secrets: list[bytes]) -> bool:
    """Whether any of these bytes is anywhere in a process's memory."""
    with Path(f"/proc/{process.pid}/maps").open() as maps, Path(f"/proc/{process.pid}/mem").open("rb", 0) as memory:
        for line in maps:
            place, rights = line.split()[:2]
            start, end = (int(x, 16) for x in place.split("-"))
            if not rights.startswith("rw") or "[vvar" in line:
                continue
            with suppress(OSError, ValueError, OverflowError):
                memory.seek(start)
                data = memory.read(end - start)
                if any(secret in data for secret in secrets):
                    return True
    return False


def check_heads(federation: Federation, outcome: Outcome, earlier: str = "") -> None:
    """Every head that a site has shown the server is an entry of its ledger still."""
    seen = 0
    for done in outcome.record["rounds"]:
        for site, privacy in done["privacy"].items():
            head = LedgerHead.from_dict(privacy["head"])
            entry = ledger(federation, site)[head.seq]
            assert (entry.hash, entry.sig, entry.kind, entry.job) == (head.hash, head.sig, "commit", entry.job)
            assert entry.job in (outcome.job_id, earlier)
            assert head.sig
            seen += 1
    assert seen == sum(len(sites) for sites in trained(outcome))


def check_audit(federation: Federation, outcome: Outcome) -> None:
    """What the lead downloaded passes an audit, by two accountants; the same with a ledger cut does not."""
    run = outcome.workspace
    assert run
    keys = KnownKeys(load_roster(federation.local("site-1") / ROSTER))

    def failures() -> set[str]:
        audit = audit_run(load_run(run, keys), independent=True)
        return {finding.code for finding in audit.findings if finding.severity in ("fail", "unshown")}

    assert failures() == set()
    copy = run / "privacy" / "site-1.ledger.jsonl"
    whole = copy.read_bytes()
    copy.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert {"file-changed", "ledger-cut"} <= failures()
    copy.write_bytes(whole)


def leave_room(federation: Federation, rounds: int) -> None:
    """Caps that so many rounds fit below, whatever was spent before."""
    for site in SITES:
        spent = history(ledger(federation, site))
        caps = [epsilon([*spent, Steps(PRIVACY.sample_rate, 1.5, STEPS * n)], DELTA) for n in (rounds, rounds + 1)]
        federation.set_policy(site, epsilon=sum(caps) / 2)


def test_a_site_whose_budget_is_too_small_is_left_out_and_its_numbers_stay(federation: Federation) -> None:
    federation.set_policy("site-3", epsilon=cap_for(1))
    outcome = federation.run_job(federation.export(job("two-rounds", 2)))

    assert outcome.meta["status"] == "FINISHED:COMPLETED"
    sentence = outcome.sentence_of("site-3")
    assert sentence.endswith("privacy budget: what is left at this site does not suffice for the job")
    assert f"{cap_for(1):g}" not in sentence
    custodian = (federation.local("site-3").parent / REFUSALS).read_text()
    assert f"{outcome.job_id} " in custodian and f"the cap is {cap_for(1):g}" in custodian
    assert outcome.sentence_of("site-1").endswith("OK")
    assert trained(outcome) == [["site-1", "site-2", "site-4"]] * 2
    assert outcome.record["outcome"] == "completed"
    assert "mAP" in outcome.record["rounds"][2]
    assert (outcome.record["aggregation"], outcome.record["identities"]) == ("masked", "start-up kits")
    for site in ("site-1", "site-2", "site-4"):
        entries = ledger(federation, site)
        assert {e.details["aggregation"] for e in entries if e.kind == "reserve"} == {"masked"}
        assert rounds_of(entries, outcome, "reserve") == rounds_of(entries, outcome, "commit") == [1, 2]
        assert outcome.record["rounds"][2]["privacy"][site]["epsilon"] == pytest.approx(spends(2))
    assert [(e.kind, e.new) for e in ledger(federation, "site-3")] == [("genesis", ""), ("cap", repr(cap_for(1)))]
    check_heads(federation, outcome)
    check_audit(federation, outcome)


def test_of_two_jobs_submitted_together_one_is_refused_and_the_other_runs_to_its_end(
    federation: Federation, fedmpt: Fedmpt
) -> None:
    """Each would fit alone. The refused one costs nothing, and what the other held is free when it has ended.

    Both come after a change in the sites' files: site-3 takes part, and who looks is told that its cap was raised.
    """
    low = cap_for(1)
    leave_room(federation, 3)
    ids = federation.submit(*federation.export_all(job("together-a", 2), job("together-b", 2)))
    ended = {outcome.meta["status"]: outcome for outcome in federation.results(*ids)}
    assert sorted(ended) == ["FINISHED:COMPLETED", "FINISHED:FAILED_TO_RUN"]
    ran, refused = ended["FINISHED:COMPLETED"], ended["FINISHED:FAILED_TO_RUN"]
    assert trained(ran) == [list(SITES)] * 2
    for site in SITES:
        assert "privacy budget: what running jobs leave at this site does not suffice" in refused.sentence_of(site)
        entries = ledger(federation, site)
        assert rounds_of(entries, ran, "commit") == [1, 2]
        assert [e.kind for e in entries if e.job == ran.job_id][-1] == "free"
        assert [e for e in entries if e.job == refused.job_id] == []
    raised = cap_for(3)
    step = f"from {low:g} to {raised:g} on"
    site_file, kit = federation.local("site-3") / SITE_FILE, federation.kit("site-3")
    own = fedmpt("ledger", "show", site_file, "--name", "site-3", "--kit", kit).stdout
    assert re.search(rf"Cap {raised:g} since [^ ]+, changed from {low:g}\.", own), own
    audit = fedmpt("audit", ran.workspace, "--roster", federation.local("site-1") / ROSTER, "--json")
    findings = json.loads(audit.stdout)["runs"][0]["findings"]
    assert audit.returncode == 0
    assert [f["severity"] for f in findings if f["code"] == "cap-changed" and step in f["text"]] == ["warning"]
    assert step in fedmpt("report", ran.workspace, "--json").stdout


@pytest.mark.thorough
def test_a_server_that_asks_for_more_than_the_job_said_gets_what_it_said(federation: Federation) -> None:
    """And one site's own software slips: what it adds to the figures stays at the site, which trains all the same."""
    leave_room(federation, 3)
    open_to_all = {"secagg": UNMASKED, "min_sites": 3}
    folder = federation.export(job("greedy", 1, **open_to_all))
    path = folder / "app" / "config" / "config_fed_server.json"
    config = json.loads(path.read_text())
    asked: dict[str, Any] = {"config_type": "dict", **job("greedy", 6, **open_to_all).to_dict()}
    shown = config["workflows"][0]["args"]["job"]
    config["workflows"][0] |= {"path": "greedy.Greedy", "args": {"job": asked, "shown": shown}}
    path.write_text(json.dumps(config))

    with federation.filter_before_guard("site-1", "leaky.Leaky", LEAKY):
        outcome = federation.run_job(folder)

    assert [outcome.sentence_of(s).endswith("OK") for s in SITES] == [True] * 4
    assert outcome.meta["status"] != "FINISHED:COMPLETED"
    assert outcome.record["outcome"].startswith("failed: round 2 failed: train: 0 sites answered")
    assert trained(outcome) == [list(SITES)]
    for site in SITES:
        entries = ledger(federation, site)
        assert rounds_of(entries, outcome, "reserve") == rounds_of(entries, outcome, "commit") == [1]
        assert first_refusal(outcome, site, "train") == "the training round is not one of 1 to 1"
    check_heads(federation, outcome)
    assert "held back its answer to validate" in first_refusal(outcome, "site-1", "validate")
    assert '"scores"' not in json.dumps([outcome.events, outcome.record])
    assert not any("mAP" in done for done in outcome.record["rounds"])


def test_an_unprotected_job_is_deployed_nowhere(federation: Federation) -> None:
    before = {site: len(ledger(federation, site)) for site in SITES}
    outcome = federation.run_job(federation.export(job("open", 1, UNPROTECTED, UNMASKED)))
    assert outcome.meta["status"] == "FINISHED:FAILED_TO_RUN"
    for site in SITES:
        sentence = outcome.sentence_of(site)
        assert "without differential privacy" in sentence and "which this site does not allow" in sentence
        assert len(ledger(federation, site)) == before[site]


def check_files(federation: Federation, secrets: list[bytes]) -> None:
    """None of these bytes is in a file of the server or of the lead."""
    for folder in (f"state/{SERVER}", f"kits/fedmpt/prod_00/{SERVER}", f"kits/fedmpt/prod_00/{LEAD}"):
        for file in (federation.root / folder).rglob("*"):
            assert not file.is_file() or not any(w in file.read_bytes() for w in secrets), file


def plain_loop(sessions: dict[str, SiteSession], initial: np.ndarray, rounds: list[dict[str, Any]]) -> np.ndarray:
    """What the model is after these rounds, averaged over who took part in each."""
    state = initial
    for done in rounds:
        updates = {s: sessions[s].train(state, done["round"]).vector for s in done["sites"]}
        state = apply(state, average(updates, dict.fromkeys(updates, 1.0)))
    return state


@pytest.mark.thorough
def test_trainers_killed_in_every_phase_cost_updates_and_nothing_else(federation: Federation) -> None:
    """No differential privacy here: only then can a plain loop say what the sums must be."""
    for site in SITES:
        federation.set_policy(site, allow_unprotected=True)
    training = TrainingConfig(rounds=6, local_steps=STEPS, batch_size=5, optimizer="sgd", learning_rate=0.05)
    agreed = job("killed", 6, UNPROTECTED, max_failed_rounds=4, round_timeout=60)
    agreed = dataclasses.replace(agreed, training=training)
    rehearsed, towers = dataclasses.replace(agreed, secagg=REHEARSED), load_backbone(agreed.backbone)
    sessions = {s: SiteSession(rehearsed, federation.policies[s], s, backbone=towers) for s in SITES}
    initial = {s: session.prepare().initial for s, session in sessions.items()}["site-1"]
    first = {s: session.train(initial, 1).vector for s, session in sessions.items()}
    secrets = [w for s in SITES for w in windows(first[s])]

    # what happens, and what is then done to whose trainer
    plan: list[tuple[dict[str, Any], str, list[str]]] = [
        ({"event": "phase", "phase": tasks.ADVERTISE}, "kill", ["site-1"]),
        ({"event": "phase", "phase": tasks.CONFIRM}, "kill", ["site-2"]),
        ({"event": "training", "round": 2}, "suspend", ["site-3"]),
        ({"event": "answered", "phase": tasks.TRAIN}, "kill", ["site-3"]),
        ({"event": "phase", "phase": tasks.MASK}, "kill", ["site-1"]),
        ({"event": "training", "round": 3}, "", []),
        ({"event": "phase", "phase": tasks.OPEN}, "kill", ["site-4"]),
        ({"event": "training", "round": 4}, "", []),
        ({"event": "answered", "phase": tasks.OPEN}, "kill", ["site-3"]),
        ({"event": "training", "round": 5}, "kill", ["site-2"]),
        ({"event": "training", "round": 6}, "suspend", ["site-1", "site-4"]),
    ]
    killed: list[str] = []
    seen: dict[str, bool] = {}  # by moment and place, whether an update was there

    def search(moment: str, name: str) -> None:
        server, site = federation.job_process(SERVER), federation.job_process(name)
        assert server
        assert site
        server.suspend()  # so that the round stands still
        seen[f"server, {moment}"] = holds(server, secrets)
        if moment == tasks.TRAIN:
            seen[f"site, {moment}"] = holds(site, secrets)  # the search does find what is there
        server.resume()

    def act(job_id: str, event: dict[str, Any]) -> None:
        moment = event.get("phase", "")
        if event["event"] == "answered" and moment in (tasks.TRAIN, tasks.OPEN) and f"server, {moment}" not in seen:
            search(moment, event["site"])
        if plan and plan[0][0].items() <= event.items():
            _, deed, targets = plan.pop(0)
            for trainer in (federation.trainer(site) for site in targets):
                if trainer:
                    getattr(trainer, deed)()
                    killed.append(deed)

    outcome = federation.run_job(federation.export(agreed), act)

    assert outcome.meta["status"] == "FINISHED:COMPLETED", outcome.meta
    assert not plan
    assert killed.count("kill") >= 6
    assert killed.count("suspend") == 3
    rounds = outcome.record["rounds"][1:]
    assert [r["round"] for r in rounds] == list(range(1, 7))
    assert all(3 <= len(r["sites"]) <= 4 for r in rounds)
    assert rounds[1]["sites"] == ["site-1", "site-2", "site-4"]
    # two of four hung: nothing was opened, and the round was tried again
    assert [r["secagg"]["attempt"] for r in rounds] == [0, 0, 0, 0, 0, 1]
    assert outcome.workspace
    reached = load_model(outcome.workspace)[2]
    assert np.abs(reached - initial).max() > 1e-2
    assert np.allclose(reached, plain_loop(sessions, initial, rounds), atol=5e-5)
    # a site's job process holds its update until the sum is opened; the server's processes and files never do
    assert seen == {f"server, {tasks.TRAIN}": False, f"site, {tasks.TRAIN}": True, f"server, {tasks.OPEN}": False}
    check_files(federation, secrets)


def killing(federation: Federation, number: int, *sites: str) -> Callable[[str, dict[str, Any]], None]:
    """Whoever watches a job kills trainers of so many sites, in one round, that it gives no sum."""

    def act(job_id: str, event: dict[str, Any]) -> None:
        if event["event"] == "training" and event["round"] == number:
            for site in sites:
                trainer = federation.trainer(site)
                assert trainer
                trainer.kill()

    return act


def log_of(outcome: Outcome) -> str:
    """What `nvflare job logs` shows of the server's process."""
    assert outcome.workspace
    return (outcome.workspace / "log.txt").read_text()


def resumed(federation: Federation, fedmpt: Fedmpt, agreed: JobConfig, outcome: Outcome) -> JobConfig:
    """What `fedmpt resume-job` writes from what the lead downloaded."""
    assert outcome.workspace
    folder = federation.root / "resumed" / outcome.job_id
    folder.mkdir(parents=True)
    (folder / "job.toml").write_text(tomli_w.dumps(without_none(agreed.to_dict())))
    written = fedmpt("resume-job", folder / "job.toml", outcome.workspace, "--out", folder / "again.toml")
    assert written.returncode == 0, written.stderr
    return load_job(folder / "again.toml")


@pytest.mark.thorough
def test_a_job_that_may_lose_no_round_goes_on_twice_and_says_each_time_why_it_ended(
    federation: Federation, fedmpt: Fedmpt
) -> None:
    """It breaks in its second round, and what resume-job wrote breaks in the third."""
    leave_room(federation, 9)
    tight = dataclasses.replace(PRIVACY, epsilon=spends(3) + 1e-3)
    agreed = job("tight", 3, tight)
    runs = [federation.run_job(federation.export(agreed), killing(federation, 2, "site-1", "site-2"))]
    second = resumed(federation, fedmpt, agreed, runs[0])
    runs.append(federation.run_job(federation.export(second), killing(federation, 3, "site-3", "site-4")))
    for broken, number in zip(runs, (2, 3), strict=True):
        assert broken.meta["status"] == "FINISHED:EXECUTION_EXCEPTION"
        assert broken.record["outcome"].startswith(f"failed: round {number} failed: ")
        assert federation.detail(broken.job_id, "job: ") == f"job: {broken.record['outcome']}"
        assert f"the job {broken.record['outcome']}" in log_of(broken)
    # who writes it by hand and errs is told by the server, before any site is asked
    third = resumed(federation, fedmpt, second, runs[1])
    assert third.resume
    before = {site: len(ledger(federation, site)) for site in SITES}
    wrong = {
        "set resume.round = 2": dataclasses.replace(third.resume, round=1, before=()),
        f"run '{runs[1].job_id}' went on from run '{runs[0].job_id}'": second.resume,
    }
    jobs = [dataclasses.replace(third, name=f"wrong-{n}", resume=resume) for n, resume in enumerate(wrong.values())]
    for says, meta in zip(wrong, federation.wait_for(*federation.submit(*federation.export_all(*jobs))), strict=True):
        assert meta["status"] == "FINISHED:FAILED_TO_RUN"
        assert says in Outcome(meta["job_id"], meta, None).sentence_of("server")
    assert {site: len(ledger(federation, site)) for site in SITES} == before

    last = federation.run_job(federation.export(third))

    assert last.meta["status"] == "FINISHED:COMPLETED", last.meta
    assert [r["round"] for r in last.record["rounds"]] == [0, 1, 2, 3]
    names = [run.job_id for run in (*runs, last)]
    assert list(third.continued) == names[1::-1]
    for site in SITES:
        spent = epsilon(history(ledger(federation, site), *names), DELTA)
        assert last.record["rounds"][3]["privacy"][site]["epsilon"] == pytest.approx(spent)
        assert tight.epsilon < spent <= third.privacy.epsilon
    keys = KnownKeys(load_roster(federation.local("site-1") / ROSTER))
    assert examined(keys, *runs, last).passed


def examined(keys: KnownKeys, *places: Outcome | Path) -> Examination:
    """What an audit makes of what the lead downloaded, and of exports that sites gave."""
    reader = LedgerReader()
    runs = [
        load_run(place.workspace, keys, reader) for place in places if isinstance(place, Outcome) and place.workspace
    ]
    return examine(runs, [load_ledger(place, keys, reader) for place in places if isinstance(place, Path)])


def exported(federation: Federation, site: str, folder: Path) -> Path:
    """What a site hands to an auditor, in a new folder."""
    policy = federation.policies[site].privacy
    assert policy
    export_ledger(policy, site, federation.kit(site), folder)
    return folder


@pytest.fixture(scope="module")
def aborted(federation: Federation) -> tuple[JobConfig, Outcome]:
    """A job that its submitter ended in the second of three rounds; site-3 kept its ledger to itself."""
    leave_room(federation, 6)
    for site in SITES:
        federation.set_policy(site, allow_unprotected=False, share_ledger=site != "site-3")
    agreed = job("continued", 3, max_failed_rounds=1)

    def abort(job_id: str, event: dict[str, Any]) -> None:
        if event["event"] == "training" and event["round"] == 2:
            trainer = federation.trainer("site-1")
            assert trainer
            trainer.suspend()  # so that the round is still open when the order arrives
            federation.abort(job_id)

    outcome = federation.run_job(federation.export(agreed), abort)
    federation.set_policy("site-3", share_ledger=True)
    return agreed, outcome


@pytest.mark.thorough
def test_an_aborted_job_audits_with_the_export_of_the_site_that_keeps_its_ledger(
    federation: Federation, aborted: tuple[JobConfig, Outcome], tmp_path: Path
) -> None:
    _, broken = aborted
    assert broken.meta["status"] == "FINISHED:ABORTED"
    assert broken.record["outcome"] == "failed: round 2 failed: the job was aborted"
    # the others handed theirs over although FLARE ended their tasks first
    assert broken.workspace
    stated = read_manifest(broken.workspace).sites
    assert [site for site in SITES if "file" in stated[site]["ledger"]] == ["site-1", "site-2", "site-4"], stated
    keys = KnownKeys(load_roster(federation.local("site-1") / ROSTER))
    assert examined(keys, broken).worst == "unshown"
    completed = examined(keys, broken, exported(federation, "site-3", tmp_path / "site-3"))
    assert completed.passed, completed.findings


@pytest.mark.thorough
def test_an_aborted_job_goes_on_with_a_site_s_new_key_and_without_a_site_whose_key_is_not_in_the_roster(
    federation: Federation, aborted: tuple[JobConfig, Outcome], tmp_path: Path
) -> None:
    """Submitted again, it continues. Meanwhile site-2 renewed its key, and site-4's is another in all rosters but its.

    Neither the old roster nor the new accuses site-2, whose ledger says from which key to which it went.
    """
    agreed, broken = aborted
    kept = load_checkpoint(federation.state(SERVER) / "checkpoints", broken.job_id)
    assert kept.round == 1
    old = load_roster(federation.local("site-1") / ROSTER)
    new = renew_key(federation, "site-2", old)
    strange = with_key(new, "site-4", bytes(32))
    for site in SITES:
        write_roster(federation.local(site) / ROSTER, new if site == "site-4" else strange)

    outcome = federation.run_job(federation.export(dataclasses.replace(agreed, resume=kept.resuming())))

    assert outcome.meta["status"] == "FINISHED:COMPLETED", outcome.meta
    assert [r["round"] for r in outcome.record["rounds"]] == [0, 1, 2, 3]
    assert trained(outcome) == [list(SITES), *[list(SITES[:3])] * 2]
    reasons = [row["secagg"]["left_out"] for row in outcome.record["rounds"][kept.round + 1 :]]
    assert reasons == [{"site-4": "its roster is not that of the other sites: all must collect the same one"}] * 2
    for site in SITES:
        committed = list(range(kept.round + 1, 4)) if site != "site-4" else []
        assert rounds_of(ledger(federation, site), outcome, "commit") == committed
    assert rounds_of(ledger(federation, "site-4"), outcome, "reserve") == []
    check_heads(federation, outcome, earlier=broken.job_id)
    own = exported(federation, "site-3", tmp_path / "site-3")
    for keys in (KnownKeys(old), KnownKeys(new), KnownKeys(old, {datetime.now(UTC): new})):
        whole = examined(keys, broken, outcome, own)
        assert whole.passed, whole.findings
    assert examined(KnownKeys(with_key(new, "site-2", bytes(32))), broken, outcome, own).worst == "fail"


def renew_key(federation: Federation, site: str, roster: Roster) -> Roster:
    """The site gets a new key and hands its ledger over to it; gives the roster with that key. The site runs again."""
    kit, policy = federation.kit(site), federation.policies[site].privacy
    assert policy
    federation.kill(site)
    new_kit = renewed_kit(federation.kit(SERVER).parents[1], site, federation.root / "renewed")
    succession.rotate(policy, site, kit, new_kit)
    for name in ("client.key", "client.crt"):
        shutil.copy(new_kit / name, kit / name)
    federation.restart(site)
    return with_key(roster, site, load_identity(kit).fingerprint)


def with_key(roster: Roster, site: str, fingerprint: bytes) -> Roster:
    member = dataclasses.replace(roster.members[site], fingerprint=fingerprint)
    return dataclasses.replace(roster, members={**roster.members, site: member})


def test_a_site_accepts_nothing_from_outside_and_the_server_one_port(federation: Federation) -> None:
    """What deploy/hospital tells the firewall team. Job processes are gone by now; a site's parent has its own port."""
    open_ports = {
        ("server_train" in " ".join(_command(process)), connection.laddr.port)
        for process in federation.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1")
    }
    assert [is_server for is_server, _ in open_ports] == [True]


def test_no_process_of_a_job_runs_on(federation: Federation) -> None:
    lines = {p.pid: " ".join(_command(p)) for p in federation.processes()}
    assert not [line for line in lines.values() if "trainer_main" in line or ".runner_process" in line]
    assert len(lines) == 1 + len(SITES)


@pytest.mark.thorough
def test_the_guards_held_back_nothing_else(federation: Federation) -> None:
    for site in SITES:
        lines = (federation.local(site).parent / "console.log").read_text().splitlines()
        odd = [line for line in lines if "cannot be checked" in line or "was held back" in line]
        assert not [line for line in odd if "EgressGuard" not in line or "to validate was held back" not in line]
        assert bool(odd) == (site == "site-1")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
