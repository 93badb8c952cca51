"""The server's half of a run against scripted sites: whom it asks, what it makes of answers, what it keeps."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmpt_core.config.federation import EarlierRun
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, ResumeConfig, TrainingConfig
from fedmpt_core.federation.figures import are_figures
from fedmpt_core.federation.joined import Joined
from fedmpt_core.federation.run.record import RunRecord, mean_figures
from fedmpt_core.federation.server.checkpoint import Checkpoint, CheckpointError
from fedmpt_core.federation.server.rounds import (
    Evaluation,
    Keeper,
    MeanUpdate,
    RoundFailed,
    Rounds,
    RoundUsedUp,
    Training,
)
from fedmpt_core.model.vector import ParameterLayout
from tests.settings import UNMASKED, UNPROTECTED

LAYOUT = ParameterLayout(("head.scale",), ((3,),))
OTHER_LAYOUT = ParameterLayout(("head.bias",), ((3,),))
INITIAL = np.array([1, 2, 3], np.float32)
STEPS = {"a": 1.0, "b": 2.0, "c": 6.0}
PRIVATE = PrivacyConfig(epsilon=8.0, delta=1e-5, sample_rate=0.5, noise_multiplier=1.5)
Answer = Callable[[Training, str], None]


def job(rounds: int = 2, privacy: PrivacyConfig = UNPROTECTED, **federation: Any) -> JobConfig:
    return JobConfig(
        "r",
        ("cat", "dog"),
        training=TrainingConfig(rounds=rounds, learning_rate=100.0),  # the sites of these tests take long steps
        privacy=privacy,
        secagg=UNMASKED,
        federation=FederationConfig(**{"min_sites": 2, "max_movement": 1e4, **federation}),
    )


def joined(**changes: Any) -> Joined:
    return replace(Joined(LAYOUT, INITIAL, True, "fake", True, "00", "cpu", {"fedmpt": "1"}), **changes)


def wire(step: float) -> bytes:
    return LAYOUT.encode(np.full(3, step, np.float32))


def spent(training: Training, site: str) -> dict[str, Any]:
    """What a site says of its budget; its ledger has an entry per attempt."""
    head = {"seq": 10 * training.round + training.attempt, "hash": "ab" * 32, "sig": ""}
    return {"epsilon": 0.5 * training.round, "delta": 1e-5, "head": head}


def silent(training: Training, site: str) -> None:
    """The site dies, hangs or refuses."""


class Sites:
    """A carriage to sites that move every parameter by their step; `script` replaces an answer."""

    def __init__(self, script: Mapping[tuple[str, int, int], Answer] | None = None, **steps: float) -> None:
        self.script, self.steps = script or {}, steps or STEPS
        self.stopped = False
        self.trained: list[Training] = []
        self.evaluated: list[Evaluation] = []
        self.dropped: list[str] = []

    def train(self, training: Training) -> None:
        self.trained.append(training)
        for site in self.order(training.sites):
            try:
                self.script.get((site, training.round, training.attempt), self.update)(training, site)
            except ValueError as error:
                self.dropped.append(f"{site}: {error}")

    def order(self, sites: list[str]) -> list[str]:
        return sites

    def update(self, training: Training, site: str) -> None:
        training.take(site, wire(self.steps[site]), 1.0, spent(training, site))

    def evaluate(self, evaluation: Evaluation) -> None:
        self.evaluated.append(evaluation)
        for site in evaluation.sites:
            evaluation.take(site, {"mAP": float(evaluation.state[0])})


class Kept(Keeper):
    """Remembers all that was kept, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.order: list[str] = []
        self.records: list[RunRecord] = []
        self.checkpoints: list[Checkpoint] = []
        self.models: list[np.ndarray] = []

    def event(self, kind: str, **values: Any) -> None:
        self.events.append((kind, values))
        self.order.append(kind)

    def write_record(self, record: RunRecord) -> None:
        self.records.append(record)
        self.order.append("record")

    def write_model(self, layout: ParameterLayout, state: np.ndarray) -> None:
        self.models.append(state)
        self.order.append("model")

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)
        self.order.append("checkpoint")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [values for name, values in self.events if name == kind]


def begun(agreed: JobConfig, kept: Kept | None = None, /, **answers: Joined) -> Rounds:
    rounds = Rounds(agreed, "run-1", kept)
    rounds.join(answers or {"a": joined(), "b": joined(evaluates=False), "c": joined(evaluates=False)})
    return rounds


def test_rounds_move_the_parameters_by_the_mean_update() -> None:
    rounds, sites = begun(job()), Sites()
    rows = list(rounds.run(sites))
    assert rounds.state.tolist() == [7, 8, 9]
    assert rounds.state.dtype == np.float32
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["mAP"] for row in rows] == [1, 4, 7]
    assert rows[0]["sites"] == []
    assert rows[1] | {"seconds": 0.0} == {
        "round": 1,
        "seconds": 0.0,
        "sites": ["a", "b", "c"],
        "bytes_sent": dict.fromkeys("abc", 32 + 12),
        "privacy": {},
        "secagg": {},
        "mAP": 4.0,
    }
    assert [(t.round, t.attempt, t.sites, t.heads) for t in sites.trained] == [
        (1, 0, ["a", "b", "c"], {}),
        (2, 0, ["a", "b", "c"], {}),
    ]
    assert [t.state.tolist() for t in sites.trained] == [[1, 2, 3], [4, 5, 6]]
    assert LAYOUT.decode(sites.trained[1].vector()).tolist() == [4, 5, 6]
    assert rounds.record.rounds == tuple(rows)


def test_every_round_is_kept_before_the_next_one_starts() -> None:
    kept = Kept()
    rounds = begun(job(rounds=2, evaluate_every=2), kept)
    list(rounds.run(Sites()))
    rounds.end("completed")
    assert kept.order == [
        *("joined", "evaluating", "record", "round"),
        *("training", "model", "checkpoint", "record", "round"),
        *("training", "evaluating", "model", "checkpoint", "record", "round"),
        "record",
    ]
    assert kept.of("joined") == [{"sites": ["a", "b", "c"], "backbone": "fake", "stand_in": True}]
    assert kept.of("training")[1] == {"round": 2, "sites": ["a", "b", "c"]}
    assert kept.of("round")[1] == rounds.record.rounds[1]
    assert [(c.round, c.state.tolist(), c.run_id) for c in kept.checkpoints] == [
        (1, [4, 5, 6], "run-1"),
        (2, [7, 8, 9], "run-1"),
    ]
    assert [len(c.record.rounds) for c in kept.checkpoints] == [2, 3]
    assert (kept.records[-1].outcome, bool(kept.records[-1].ended)) == ("completed", True)
    assert kept.records[-2].outcome == "running"


def test_a_job_that_is_ended_while_it_is_evaluated_keeps_the_round_that_was_trained() -> None:
    class Ended(Sites):
        def train(self, training: Training) -> None:
            if self.stopped:
                raise RoundFailed("the job was aborted")
            super().train(training)

        def evaluate(self, evaluation: Evaluation) -> None:
            self.stopped = evaluation.round == 1
            if self.stopped:
                raise RoundFailed("the job was aborted")

    kept = Kept()
    rounds = begun(job(rounds=3), kept)
    with pytest.raises(RuntimeError, match="round 2 failed: the job was aborted"):
        list(rounds.run(Ended()))
    assert [c.round for c in kept.checkpoints] == [1]
    assert [row["round"] for row in kept.records[-1].rounds] == [0, 1]


def test_who_answers_first_changes_no_bit() -> None:
    class Backwards(Sites):
        def order(self, sites: list[str]) -> list[str]:
            return sites[::-1]

    steps = {"a": 0.1, "b": 1e7, "c": -1e7}
    one, other = begun(job()), begun(job())
    list(one.run(Sites(**steps)))
    list(other.run(Backwards(**steps)))
    assert np.array_equal(one.state, other.state)


def test_records_weigh() -> None:
    script: dict[tuple[str, int, int], Answer] = {
        ("a", 1, 0): lambda training, site: training.take(site, wire(0.0), 1.0),
        ("b", 1, 0): lambda training, site: training.take(site, wire(4.0), 3.0),
        ("c", 1, 0): silent,
    }
    rounds = begun(job(rounds=1))
    list(rounds.run(Sites(script)))
    assert rounds.state.tolist() == [4, 5, 6]


BROKEN: dict[str, tuple[Answer, str]] = {
    "nothing": (silent, ""),
    "no bytes": (lambda t, s: t.take(s, "text", 1.0, spent(t, s)), "the update is of the kind str"),  # type: ignore[arg-type]
    "cut": (lambda t, s: t.take(s, wire(9.0)[:-1], 1.0, spent(t, s)), "43 bytes, expected 44"),
    "another layout": (
        lambda t, s: t.take(s, OTHER_LAYOUT.encode(INITIAL), 1.0, spent(t, s)),
        "of another layout",
    ),
    "no number": (
        lambda t, s: t.take(s, bytes.fromhex(LAYOUT.digest()) + np.full(3, np.nan, "<f4").tobytes(), 1.0, spent(t, s)),
        "NaN or infinity",
    ),
    **{
        f"weight {weight}": (
            lambda t, s, weight=weight: t.take(s, wire(9.0), weight, spent(t, s)),
            "must be a positive finite number",
        )
        for weight in (0.0, -1.0, float("inf"), float("nan"), "1", None, 10**400)
    },
    "no budget": (lambda t, s: t.take(s, wire(9.0), 1.0), "does not say what it has spent"),
    "half a budget": (lambda t, s: t.take(s, wire(9.0), 1.0, {"epsilon": 1.0}), "does not say what it has spent"),
    "a list": (lambda t, s: t.take(s, wire(9.0), 1.0, ["epsilon"]), "does not say what it has spent"),
    "no head": (
        lambda t, s: t.take(s, wire(9.0), 1.0, spent(t, s) | {"head": {"seq": -1, "hash": "", "sig": ""}}),
        "not a ledger head",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_costs_its_own_contribution(name: str) -> None:
    answer, reason = BROKEN[name]
    rounds, sites = begun(job(rounds=1, privacy=PRIVATE)), Sites({("c", 1, 0): answer})
    row = list(rounds.run(sites))[1]
    assert (row["sites"], sorted(row["privacy"])) == (["a", "b"], ["a", "b"])
    assert rounds.state.tolist() == [2.5, 3.5, 4.5]
    assert sites.dropped == [] if not reason else reason in sites.dropped[0]


def test_a_round_with_too_few_sites_is_tried_again() -> None:
    kept = Kept()
    sites = Sites({(site, 1, attempt): silent for site in "bc" for attempt in (0, 1)})
    rows = list(begun(job(), kept).run(sites))
    assert [(t.round, t.attempt) for t in sites.trained] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert [row["round"] for row in rows] == [0, 1, 2]
    sentence = "train: 1 sites answered, min_sites=2; each site's log says why it did not"
    assert kept.of("round_failed") == [{"round": 1, "reason": sentence}] * 2


def test_failed_attempts_are_counted_over_the_whole_job() -> None:
    kept = Kept()
    sites = Sites({("b", number, 0): silent for number in (1, 2, 3)}, a=1.0, b=1.0)
    rounds = begun(job(rounds=3, max_failed_rounds=2), kept, a=joined(), b=joined())
    with pytest.raises(RuntimeError, match=r"^round 3 failed: train: 1 sites answered, min_sites=2"):
        list(rounds.run(sites))
    assert len(kept.of("round_failed")) == 3
    assert [c.round for c in kept.checkpoints] == [1, 2]
    assert rounds.state.tolist() == [3, 4, 5]


def test_a_job_that_was_stopped_ends_at_the_first_failure() -> None:
    sites = Sites()

    def stop(training: Training, site: str) -> None:
        sites.stopped = True

    sites.script = dict.fromkeys([(site, 1, 0) for site in "abc"], stop)
    with pytest.raises(RuntimeError, match="round 1 failed: train: 0 sites answered"):
        list(begun(job(max_failed_rounds=9)).run(sites))
    assert len(sites.trained) == 1


def test_a_carriage_that_fails_otherwise_ends_the_job_at_once() -> None:
    def full(training: Training, site: str) -> None:
        raise OSError("no space left")

    sites = Sites({("a", 1, 0): full})
    with pytest.raises(OSError, match="no space left"):
        list(begun(job(max_failed_rounds=9)).run(sites))
    assert len(sites.trained) == 1


def test_a_mean_that_masks_gave_is_applied_as_it_is() -> None:
    facts = {"cohort": ["a", "b", "c"], "threshold": 3}

    class Masked(Sites):
        def train(self, training: Training) -> None:
            self.trained.append(training)
            for site in training.sites:
                training.note(site, spent(training, site))
            if training.attempt == 0:
                raise RoundFailed("2 of 3 vectors arrived, the threshold is 3")
            training.take_mean(MeanUpdate(np.full(3, 3.0), {"a": 70, "b": 71}, facts))

    kept, sites = Kept(), Masked()
    rounds = begun(job(rounds=1, privacy=PRIVATE, min_sites=3), kept)
    row = list(rounds.run(sites))[1]
    assert rounds.state.tolist() == [4, 5, 6]
    assert (row["bytes_sent"], row["secagg"]) == ({"a": 70, "b": 71}, facts)
    assert sorted(row["privacy"]) == ["a", "b"]
    assert kept.of("round_failed")[0]["reason"] == "2 of 3 vectors arrived, the threshold is 3"
    assert sites.trained[1].heads["c"]["seq"] == 10


def test_a_mean_that_no_honest_sites_can_have_is_shortened_and_said() -> None:
    kept = Kept()
    rounds = begun(job(rounds=1, max_movement=0.5), kept)
    list(rounds.run(Sites()))  # a mean of 3 in each of three numbers
    assert rounds.state.tolist() == pytest.approx([1.5, 2.5, 3.5])
    assert kept.of("shortened") == [{"round": 1}]
    rounds = begun(job(rounds=1, max_movement=3.0), kept := Kept())
    list(rounds.run(Sites()))
    assert (rounds.state.tolist(), kept.of("shortened")) == ([4, 5, 6], [])


@pytest.mark.parametrize("before", [False, True])
def test_a_round_that_is_used_up_is_left_out_by_name(before: bool) -> None:
    """One that sites had used up in the run before costs none of the attempts that may fail."""

    class Masked(Sites):
        def train(self, training: Training) -> None:
            if training.round == 2:
                raise RoundUsedUp("2 of 3 sites sent their shares", before=before)
            super().train(training)

    rounds = begun(job(rounds=3, max_failed_rounds=0 if before else 1), kept := Kept())
    assert [row["round"] for row in rounds.run(Masked())] == [0, 1, 3]
    assert rounds.record.lost == {"2": "2 of 3 sites sent their shares"}
    assert [c.round for c in kept.checkpoints] == [1, 3]
    if not before:
        with pytest.raises(RuntimeError, match="round 2 failed: 2 of 3 sites"):
            list(begun(job(rounds=3, max_failed_rounds=0)).run(Masked()))


def test_sites_are_told_the_newest_head_that_the_server_saw() -> None:
    sites = Sites({("b", 1, 0): silent, ("c", 1, 0): silent})
    kept = Kept()
    rows = list(begun(job(rounds=2, privacy=PRIVATE), kept).run(sites))
    heads = [{site: head["seq"] for site, head in t.heads.items()} for t in sites.trained]
    # what a round that failed has cost is known too
    assert heads == [{}, {"a": 10}, {"a": 11, "b": 11, "c": 11}]
    assert rows[1]["privacy"]["a"] == {
        "epsilon": 0.5,
        "delta": 1e-5,
        "head": {"seq": 11, "hash": "ab" * 32, "sig": ""},
    }
    assert [c.privacy["b"]["head"]["seq"] for c in kept.checkpoints] == [11, 20]


def test_a_share_of_the_sites_is_asked_and_others_after_a_failure() -> None:
    names = [f"s{n}" for n in range(10)]
    sites = Sites({(name, 1, 0): silent for name in names}, **dict.fromkeys(names, 1.0))
    rounds = begun(job(rounds=3, participation=0.3), **{name: joined() for name in names})
    list(rounds.run(sites))
    asked = [t.sites for t in sites.trained]
    assert [len(names) for names in asked] == [3] * 4
    assert asked == [sorted(names) for names in asked]
    assert len({tuple(names) for names in asked}) == 4


@pytest.mark.parametrize(("every", "evaluated"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3, 5]), (9, [0, 5]), (0, [])])
def test_evaluation_may_be_rare_but_never_misses_the_last_round(every: int, evaluated: list[int]) -> None:
    sites = Sites()
    rows = list(begun(job(rounds=5, evaluate_every=every)).run(sites))
    assert [row["round"] for row in rows if "mAP" in row] == evaluated
    assert [(e.round, e.sites) for e in sites.evaluated] == [(number, ["a"]) for number in evaluated]


def test_figures_are_the_mean_over_the_sites_that_gave_any() -> None:
    class Judges(Sites):
        def evaluate(self, evaluation: Evaluation) -> None:
            evaluation.take("a", {"mAP": 40.0, "gate": [0.5, 0.5]})
            if evaluation.round == 0:
                evaluation.take("b", {"mAP": 60.0, "gate": [0.1, 0.9]})
            with pytest.raises(ValueError, match="the figures are of the kind str"):
                evaluation.take("c", "excellent")  # type: ignore[arg-type]

    rows = list(begun(job(rounds=1), a=joined(), b=joined(), c=joined()).run(Judges()))
    assert [(row["mAP"], row["gate"]) for row in rows] == [(50.0, [0.3, 0.7]), (40.0, [0.5, 0.5])]


def test_a_run_that_nobody_can_judge_ends_before_any_round_unless_it_asks_for_no_figures() -> None:
    sites, silent_sites = Sites(), dict.fromkeys("abc", joined(evaluates=False))
    with pytest.raises(RuntimeError, match=r"evaluate_every = 1 asks for figures, and no site .* nothing was trained"):
        list(begun(job(), **silent_sites).run(sites))
    assert sites.trained == []
    rows = list(begun(job(evaluate_every=0), **silent_sites).run(sites))
    assert (["mAP" in row for row in rows], sites.evaluated) == ([False] * 3, [])


class Mute(Sites):
    """Sites that joined to evaluate, and give no figures."""

    def evaluate(self, evaluation: Evaluation) -> None:
        self.evaluated.append(evaluation)


class Late(Mute):
    """The same, but for the last round."""

    def evaluate(self, evaluation: Evaluation) -> None:
        if evaluation.round == 2:
            Sites.evaluate(self, evaluation)


def test_a_run_that_was_to_give_figures_and_gave_none_ends_loudly_with_all_its_rounds() -> None:
    kept = Kept()
    rounds = begun(job(), kept, a=joined(), b=joined(), c=joined())
    with pytest.raises(RuntimeError, match="all rounds are done, but no site gave figures"):
        list(rounds.run(Mute()))
    assert [row["round"] for row in rounds.record.rounds] == [0, 1, 2]
    assert np.array_equal(kept.models[-1], rounds.state)
    late = begun(job(), a=joined(), b=joined(), c=joined())
    assert ["mAP" in row for row in late.run(Late())] == [False, False, True]


def test_a_site_that_starts_from_other_weights_is_left_out() -> None:
    kept = Kept()
    moved = joined(initial=INITIAL + np.float32(1e-6))
    rounds = begun(job(), kept, d=joined(backbone_digest="11"), c=joined(), b=moved, a=joined())
    assert list(rounds.sites) == ["a", "c"]
    assert rounds.record.sites is not None
    assert sorted(rounds.record.sites) == ["a", "c"]
    assert kept.of("left_out") == [{"sites": ["b", "d"], "reason": "other backbone weights or initial parameters"}]
    with pytest.raises(RoundFailed, match="join: 1 sites answered, min_sites=2"):
        begun(job(), a=joined(), b=moved)


@pytest.mark.parametrize("answers", [{}, {"a": joined()}])
def test_no_round_starts_when_too_few_sites_join(answers: dict[str, Joined]) -> None:
    with pytest.raises(RoundFailed, match=f"join: {len(answers)} sites answered, min_sites=2; each site's log says"):
        Rounds(job(), "run-1").join(answers)


@pytest.fixture
def checkpoints() -> Iterator[list[Checkpoint]]:
    kept = Kept()
    list(begun(job(rounds=4, privacy=PRIVATE), kept).run(Sites()))
    yield kept.checkpoints


def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(checkpoints: list[Checkpoint]) -> None:
    second = checkpoints[1]
    agreed = replace(job(rounds=4, privacy=PRIVATE), resume=second.resuming())
    kept, sites = Kept(), Sites()
    rounds = Rounds(agreed, "run-2", kept)
    rounds.resume(second)
    rounds.join({site: joined() for site in "abc"})
    rows = list(rounds.run(sites))
    assert [row["round"] for row in rows] == [3, 4]
    assert [row["round"] for row in rounds.record.rounds] == [0, 1, 2, 3, 4]
    assert np.array_equal(rounds.state, checkpoints[-1].state)
    assert sites.trained[0].heads["a"]["seq"] == 20
    assert rounds.record.resumed == {"job": "run-1", "round": 2, "state": second.digest(), "before": ()}
    # who goes on from this run continues this run, also where it breaks off before a round of its own
    assert [(c.run_id, c.round) for c in kept.checkpoints] == [("run-2", 2), ("run-2", 3), ("run-2", 4)]


@pytest.mark.parametrize("joining", [{}, {"a": joined(), "b": replace(joined(), layout=OTHER_LAYOUT)}])
def test_a_run_that_cannot_go_on_keeps_its_finished_rounds_and_its_model(
    checkpoints: list[Checkpoint], joining: dict[str, Joined]
) -> None:
    second, kept = checkpoints[1], Kept()
    rounds = Rounds(replace(job(rounds=4, privacy=PRIVATE), resume=second.resuming()), "run-2", kept)
    rounds.resume(second)
    with pytest.raises(RoundFailed):
        rounds.join(joining)
    rounds.end("failed: nobody joins")
    assert kept.records[-1].rounds == second.record.rounds
    assert sorted(kept.records[-1].sites or {}) == ["a", "b", "c"]
    assert np.array_equal(kept.models[-1], second.state)


def test_a_checkpoint_that_does_not_fit_is_refused(checkpoints: list[Checkpoint]) -> None:
    first = checkpoints[0]
    agreed = replace(job(rounds=4, privacy=PRIVATE), resume=first.resuming())
    for wrong, sentence in (
        (replace(agreed, resume=ResumeConfig("run-1", 2)), "is of round 1: set resume.round = 1"),
        (replace(agreed, resume=ResumeConfig("run-1", 1, "0" * 64)), f"set resume.state = '{first.digest()}'"),
        (replace(agreed, seed=9), "was of another job: seed differ"),
        (replace(agreed, privacy=replace(PRIVATE, delta=1e-6)), "was of another job: privacy differ"),
        (
            replace(agreed, privacy=replace(PRIVATE, noise_multiplier=1.4)),
            r"noise_multiplier=1.4: run 'run-1' trained with 1.5, and goes on with no other: .*`fedmpt resume-job`",
        ),
        (
            replace(agreed, resume=ResumeConfig("run-1", 1, "", (EarlierRun("run-0", 1),))),
            "run 'run-1' continued none itself, and resume.before says otherwise",
        ),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            Rounds(wrong, "run-2").resume(first)
    with pytest.raises(CheckpointError, match="the job continues run 'run-1'"):
        next(begun(agreed).run(Sites()))
    rounds = Rounds(replace(agreed, resume=ResumeConfig("run-1", 1)), "run-2")
    rounds.resume(replace(first, layout=OTHER_LAYOUT))
    rounds.join({site: joined() for site in "abc"})
    with pytest.raises(RuntimeError, match="another layout than the sites"):
        next(rounds.run(Sites()))


def test_what_a_site_says_when_it_joins_comes_back() -> None:
    said = joined()
    back = Joined.from_message(said.fields() | {"further": 1}, LAYOUT.encode(INITIAL))
    assert (back.start, back.fields()) == (said.start, said.fields())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "{"),
        ("layout", 1),
        ("evaluates", 1),
        ("backbone_digest", b"00"),
        ("versions", []),
        ("device", None),
        ("weight", 0),
        ("weight", 1.0),
    ],
)
def test_what_a_site_says_wrong_when_it_joins_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="layout" if field == "layout" else f"{field}="):
        Joined.from_message(joined().fields() | {field: value}, LAYOUT.encode(INITIAL))


@pytest.mark.parametrize(
    "figures",
    [
        {"mAP": "x"},
        {"mAP": float("nan")},
        {"mAP": True},
        {"AP": "ab"},
        {"AP": [1.0, 2.0, 3.0]},
        {"AP": [[1.0], [2.0]]},
        {"zero_shot": 3},
        {"zero_shot": {"zero_shot": {"mAP": 1.0}}},
        {"seen": {"mAP": 1.0}},
        {"round": 7},
        {"privacy": {}, "secagg": {}},
        {"sites": []},
        {5: 1.0},
    ],
    ids=str,
)
def test_what_are_no_figures_of_the_job_is_in_no_mean_and_ends_nothing(figures: dict[Any, Any]) -> None:
    """The first site by name sends them, in every round; those of the others count, and the round's own facts stay."""

    class Liar(Sites):
        def evaluate(self, evaluation: Evaluation) -> None:
            super().evaluate(evaluation)
            evaluation.take("a", figures)

    kept = Kept()
    rounds = Rounds(job(), "run-1", kept)
    rounds.join({name: joined() for name in STEPS})
    rows = list(rounds.run(Liar()))
    assert [(row["round"], row["sites"], row["mAP"]) for row in rows[1:]] == [
        (1, ["a", "b", "c"], 4.0),
        (2, ["a", "b", "c"], 7.0),
    ]
    assert {event["site"] for event in kept.of("dropped")} == {"a"}


def test_classes_that_were_not_trained_have_figures_of_their_own() -> None:
    part = {"mAP": 1.0, "AP": [1.0]}
    whole = {"mAP": 1.0, "AP": [1.0, 2.0, 3.0], "seen": part, "unseen": part}
    apart = replace(job(), unseen_classes=("fox",))
    assert are_figures(whole | {"zero_shot": whole}, apart)
    assert not are_figures(whole, job())
    assert not are_figures({"seen": whole}, apart)


def test_a_figure_that_some_sites_give_is_their_mean() -> None:
    assert mean_figures([{"mAP": 1.0, "AP": [1.0, 2.0]}, {"mAP": 3.0, "ece": 0.5, "AP": [3.0, -1.0]}, {"AP": []}]) == {
        "mAP": 2.0,
        "ece": 0.5,
        "AP": [2.0, 2.0],
    }
    assert mean_figures([]) == {}


@pytest.mark.parametrize(
    "lie",
    [
        {"versions": {"torch": 5}},
        {"versions": {5: "1"}},
        {"versions": {f"p{i}": "1" for i in range(300)}},
        {"device": "\x1b[2J"},
        {"backbone": "x" * 257},
    ],
    ids=["number", "key", "many", "control", "long"],
)
def test_what_a_site_says_of_itself_is_short_text_or_it_does_not_join(lie: dict[str, Any]) -> None:
    """Else the record of all could not be read by an audit."""
    with pytest.raises(ValueError, match=r"short line of text|packages"):
        Joined.from_message(joined().fields() | lie, LAYOUT.encode(INITIAL))
