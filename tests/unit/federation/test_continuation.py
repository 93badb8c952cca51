"""The job that continues a run: what it says, what sites' budgets make of it, and which runs cannot be continued."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.config.federation import EarlierRun, ResumeConfig
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.run.record import MODEL, RESULT, RunRecord, save_model
from fedmpt_core.federation.server.checkpoint import Checkpoint, CheckpointError, checkpoint_for
from fedmpt_core.federation.server.continuation import continuation, load_broken
from fedmpt_core.federation.site.latch_file import latch_path, open_latch, write_latch
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, history, resolved
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, open_ledger
from fedmpt_core.secagg.latch import Latch

LAYOUT = ParameterLayout(("head.scale",), ((3,),))
STATE = np.array([4, 5, 6], np.float32)


def job(rounds: int = 4, failures: int = 0) -> JobConfig:
    """As it is written: its noise is worked out when it is exported."""
    return JobConfig(
        "p",
        ("cat", "dog"),
        training=TrainingConfig(rounds=rounds, local_steps=2),
        privacy=PrivacyConfig(epsilon=4.0, sample_rate=0.1),
        federation=FederationConfig(max_failed_rounds=failures),
    )


class Site:
    """One site's ledger, and the runs that charge it."""

    def __init__(self, folder: Path) -> None:
        policy = SitePrivacyConfig("chest", units=1000, epsilon=20.0, delta=1e-5, ledger=str(folder / "ledgers"))
        create_ledger(policy, "a", None)
        self.config = SiteConfig(DataConfig(path="x"), privacy=policy, cache_dir=str(folder / "cache"))
        self.ledger = open_ledger(policy, "a", None)

    def run(self, agreed: JobConfig, run: str, upto: int, *broken: int) -> Budget:
        """Charges the run's rounds; of those in `broken` an attempt more, which gave nothing."""
        budget = Budget(agreed, self.config, self.ledger, run)
        for number in range(agreed.first_round, upto + 1):
            for attempt in range(1 + broken.count(number)):
                reserved = budget.reserve(number, attempt, {})
            budget.commit(reserved, "ab" * 32)
        for attempt in range(broken.count(upto + 1)):
            budget.reserve(upto + 1, attempt, {})
        return budget


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def after(agreed: JobConfig, number: int, run: str = "run-1", outcome: str = "failed: round failed") -> Checkpoint:
    """What the server keeps when a run has broken off."""
    record = RunRecord.start(agreed, run).with_round(0, 1.0, {}, {})
    for n in range(1, number + 1):
        record = record.with_round(n, 1.0, {"a": 1}, {})
    return Checkpoint(run, agreed, number, LAYOUT, STATE, record.ended_as(outcome), {})


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_job_goes_on_with_its_own_noise_whatever_it_allowed_to_fail(site: Site, failures: int) -> None:
    """The remedy of before, the same file with [resume] or a higher epsilon, gives no job that a site takes."""
    first = resolved(job(failures=failures))
    site.run(first, "run-1", 2, *[3] * (failures + 1))
    kept = after(first, 2)
    goes_on = continuation(job(failures=failures), kept, [site.ledger.entries()])
    assert goes_on.privacy.noise_multiplier == first.privacy.noise_multiplier
    assert goes_on.resume == ResumeConfig("run-1", 2, kept.digest())
    assert goes_on.training == first.training
    budget = site.run(goes_on, "run-2", 4)
    assert budget.spent() <= goes_on.privacy.epsilon < budget.spent() + 0.01
    assert budget.spent() == epsilon(history(site.ledger.entries()), 1e-5)
    assert resolved(goes_on) == goes_on
    # the twins: derived anew; and as many digits of epsilon, with less
    with pytest.raises(ValueError, match=r"noise_multiplier is missing: .*run 'run-1'.*`fedmpt resume-job` writes it"):
        resolved(replace(job(failures=failures), resume=kept.resuming()))
    stingy = replace(goes_on, privacy=replace(goes_on.privacy, epsilon=goes_on.privacy.epsilon - 0.02))
    with pytest.raises(
        PrivacyRefused, match=r"the job plans more than|plans .* after the run 'run-1' that it continues"
    ):
        Budget(stingy, site.config, site.ledger, "run-3")


def test_what_is_within_the_plan_raises_no_epsilon(site: Site) -> None:
    first = resolved(job(failures=2))
    site.run(first, "run-1", 2, 3)
    goes_on = continuation(job(failures=2), after(first, 2), [site.ledger.entries()])
    assert goes_on.privacy == first.privacy
    site.run(goes_on, "run-2", 4)


def test_without_a_ledger_all_that_the_run_can_have_tried_is_counted(site: Site) -> None:
    first = resolved(job(failures=1))
    site.run(first, "run-1", 2, 1, 3)
    blind = continuation(job(failures=1), after(first, 2))
    seeing = continuation(job(failures=1), after(first, 2), [site.ledger.entries()])
    assert blind.privacy.epsilon >= seeing.privacy.epsilon
    assert site.run(blind, "run-2", 4).spent() <= blind.privacy.epsilon


def test_a_run_that_is_continued_twice_counts_all_three(site: Site) -> None:
    first = resolved(job())
    site.run(first, "run-1", 1, 2)
    second = continuation(job(), after(first, 1), [site.ledger.entries()])
    site.run(second, "run-2", 2, 3)
    third = continuation(job(), after(second, 2, "run-2"), [site.ledger.entries()])
    assert third.resume
    assert third.resume.before == (EarlierRun("run-1", 1),)
    assert third.continued == ("run-2", "run-1")
    assert third.privacy.epsilon > second.privacy.epsilon > first.privacy.epsilon
    assert site.run(third, "run-3", 4).spent() == epsilon(history(site.ledger.entries()), 1e-5)
    # the twin: who forgets the first run counts less
    forgetful = Budget(replace(third, resume=replace(third.resume, before=())), site.config, site.ledger, "run-3")
    assert forgetful.spent() < epsilon(history(site.ledger.entries()), 1e-5)
    # without ledgers what all of them can have tried is counted
    assert continuation(job(), after(second, 2, "run-2")).privacy.epsilon >= third.privacy.epsilon


@pytest.mark.parametrize(
    ("kept", "changed", "says"),
    [
        (lambda j: after(j, 4, outcome="completed"), {}, "run 'run-1' has completed its job: nothing is left to do"),
        (lambda j: after(j, 3, outcome="completed"), {}, "has completed its job"),  # its last round was lost
        (lambda j: after(j, 4), {}, "has completed its job"),
        (lambda j: after(j, 2), {"seed": 9}, "was of another job: seed differ"),
        (lambda j: after(j, 2), {"training": TrainingConfig(rounds=9, local_steps=2)}, "another job: training differ"),
        (
            lambda j: after(j, 2),
            {"privacy": PrivacyConfig(epsilon=4.0, sample_rate=0.1, noise_multiplier=9.0)},
            "noise_multiplier=9.0: run 'run-1' trained with .*, and goes on with no other",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(
    kept: Callable[[JobConfig], Checkpoint], changed: dict[str, object], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        continuation(replace(job(), **changed), kept(resolved(job())))


def test_a_run_goes_on_from_the_one_that_continued_it_and_from_no_other(tmp_path: Path) -> None:
    first = resolved(job())
    kept = after(first, 1)
    kept.save(tmp_path)
    second = continuation(job(), kept)
    assert checkpoint_for(second, tmp_path) is not None
    assert checkpoint_for(first, tmp_path) is None
    with pytest.raises(CheckpointError, match=r"of run 'run-1' is of round 1: set resume.round = 1"):
        checkpoint_for(replace(second, resume=ResumeConfig("run-1", 2)), tmp_path)
    again = after(second, 1, "run-2")
    again.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"run 'run-2' went on from run 'run-1'.*: continue that one"):
        checkpoint_for(second, tmp_path)
    assert checkpoint_for(continuation(job(), again), tmp_path) is not None


def write_run(folder: Path, kept: Checkpoint) -> Path:
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps(asdict(kept.record)))
    (folder / MODEL).write_bytes(save_model(LAYOUT, STATE))
    return folder


def test_a_downloaded_run_and_its_checkpoint_say_the_same(tmp_path: Path) -> None:
    kept = after(resolved(job()), 2)
    kept.save(tmp_path / "checkpoints")
    workspace = write_run(tmp_path / "downloaded" / "workspace", kept)
    jobs = {
        continuation(job(), load_broken(place)).digest()
        for place in (tmp_path / "checkpoints" / "run-1", workspace, workspace.parent)
    }
    assert len(jobs) == 1


def test_a_run_without_a_complete_round_or_without_a_record_is_refused(tmp_path: Path) -> None:
    none = write_run(tmp_path / "none", after(resolved(job()), 0))
    with pytest.raises(CheckpointError, match=r"'run-1' ended before its first round was complete.*: submit the job"):
        load_broken(none)
    with pytest.raises(
        CheckpointError, match=r"empty: is not the folder of a run, or of its checkpoint: .*no such file"
    ):
        load_broken(tmp_path / "empty")


def test_a_site_that_missed_a_run_takes_up_what_it_said_in_the_one_before(tmp_path: Path) -> None:
    config = Site(tmp_path).config
    write_latch(latch_path(config, "run-1"), Latch("run-1", round=3, attempt=1, stage="masked"))
    taken = open_latch(config, "run-3", ("run-2", "run-1"))
    assert taken is not None
    assert (taken.job_id, taken.round, taken.stage) == ("run-3", 3, "masked")
    assert open_latch(config, "run-9", ("run-8",)) is None
