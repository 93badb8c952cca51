"""The self-test passes the real mechanism, again and again, and stops every broken one that we could think of."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy import charged_training
from fedmpt_core.privacy.accounting.epsilon import Steps
from fedmpt_core.privacy.charged_training import ChargedTraining
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.sampling import poisson_batches
from fedmpt_core.privacy.mechanism.self_test import Check, SelfTestFailed, require_self_test, self_test
from fedmpt_core.training.local import LocalUpdate, TrainingRecords
from tests.fakes import FakeBackbone

CONDITIONS = ("color", "pose")
CLASSES = ("cat", "dog", "tv monitor")
KEY = bytes(range(32))
GROUPS = {"contexts": 2.0, "gate": 0.5, "head": 0.25}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(trained: str = "contexts+gate", **privacy: Any) -> tuple[FedMPT, JobConfig, Mechanism]:
    config = ModelConfig(conditions=CONDITIONS, trained=trained)  # type: ignore[arg-type]
    chosen = PrivacyConfig(**{"noise_multiplier": 1.0, "max_grad_norm": 0.7, **privacy})
    job = JobConfig("job", CLASSES, model=config, privacy=chosen)
    return FedMPT(FakeBackbone(), CLASSES, CONDITIONS, config, 0), job, Mechanism.of(job)


def failed(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def private(owner: PrivateOptimizer | GradientEngine) -> list[Any]:
    return list(owner.private.values())


class Unclipped(PrivateOptimizer):
    def clip_and_accumulate(self) -> None:
        for p in private(self):
            total = p.grad_sample.double().sum(0)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


class BatchMeanClipped(PrivateOptimizer):
    """Bounds the mean of the batch and not its units."""

    def clip_and_accumulate(self) -> None:
        units = len(private(self)[0].grad_sample)
        before = [p.summed_grad for p in private(self)]
        for p in private(self):
            p.grad_sample = p.grad_sample.sum(0, keepdim=True) / max(units, 1)
        super().clip_and_accumulate()
        for p, old in zip(private(self), before, strict=True):
            p.summed_grad = (p.summed_grad - (0 if old is None else old)) * units + (0 if old is None else old)


class ClippedByTensor(PrivateOptimizer):
    """Bounds each tensor, so that a unit of two tensors passes more than the bound."""

    def clip_and_accumulate(self) -> None:
        for group in self._groups:
            for p in (p for n, p in zip(self.private, private(self), strict=True) if n in group.names):
                rows = torch.nan_to_num(p.grad_sample.double(), posinf=0, neginf=0)
                factor = (group.max_grad_norm / rows.flatten(1).norm(dim=1)).clamp(max=1)
                total = torch.tensordot(factor, rows, dims=1)
                p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


class NotFinitePasses(PrivateOptimizer):
    """Replaces NaN and infinity by numbers after clipping."""

    def clip_and_accumulate(self) -> None:
        for p in private(self):
            p.grad_sample = torch.nan_to_num(p.grad_sample)
        super().clip_and_accumulate()


class Quieter(PrivateOptimizer):
    by = 1.2

    def noise_stds(self) -> list[float]:
        return [std / self.by for std in super().noise_stds()]


class HalfNoise(Quieter):
    by = 2.0


class NoNoise(Quieter):
    by = float("inf")


class QuietOnEmptyBatches(PrivateOptimizer):
    def noise_stds(self) -> list[float]:
        empty = len(private(self)[0].grad_sample) == 0
        return [std * (not empty) for std in super().noise_stds()]


class UniformNoise(PrivateOptimizer):
    """The right variance, the wrong tails."""

    def _normals(self, count: int) -> np.ndarray:
        return (self._keystream.words("noise", count) * 2.0**-64 - 0.5) * 12**0.5


class OffTheGrid(PrivateOptimizer):
    """Textbook Gaussian noise in floating point."""

    def add_noise(self) -> None:
        for group, std in zip(self._groups, self.noise_stds(), strict=True):
            for name in group.names:
                p: Any = self.private[name]
                noise = std * torch.from_numpy(self._normals(p.numel())).reshape(p.shape)
                p.grad = (p.summed_grad + noise).to(p.dtype)


class NoisePerPart(PrivateOptimizer):
    """Adds noise in every physical part of a batch."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        if self._step_skip_queue and self._step_skip_queue[0]:
            for group, std in zip(self._groups, self.noise_stds(), strict=True):
                for name in group.names:
                    p: Any = self.private[name]
                    p.summed_grad += std * torch.from_numpy(self._normals(p.numel())).reshape(p.shape)


class SameSeedEveryStep(PrivateOptimizer):
    def add_noise(self) -> None:
        self._keystream = Keystream(KEY)
        super().add_noise()


class SameSeedEveryRound(PrivateOptimizer):
    """Each round has an optimizer of its own; all begin with the same random numbers."""

    def __init__(self, *parts: Any, keystream: Keystream, **options: Any) -> None:
        super().__init__(*parts, keystream=Keystream(bytes.fromhex(keystream.key_id)), **options)


class SameSeedEveryTensor(PrivateOptimizer):
    def _normals(self, count: int) -> np.ndarray:
        self._draws = getattr(self, "_draws", -1) + 1
        key = bytes([self._draws // len(self.private)]) * 32
        return Keystream(key).normals("noise", count)


class RealisedDivisor(PrivateOptimizer):
    """Divides by the batch as it came, whose size is private."""

    def scale_grad(self) -> None:
        for p in private(self):
            p.grad = p.grad / max(len(p.grad_sample), 1)


class NoRootSum(PrivateOptimizer):
    """Each group gets the noise of a mechanism of its own."""

    def noise_stds(self) -> list[float]:
        return [std / len(self._groups) ** 0.5 for std in super().noise_stds()]


class FollowsTheMedian(PrivateOptimizer):
    """The bound is the median norm of the batch, found without noise and charged to nobody; noise follows it."""

    noise_follows = True

    def clip_and_accumulate(self) -> None:
        agreed = self._groups
        adapted = []
        for group in agreed:
            members: list[Any] = [self.private[n] for n in group.names]
            norms = torch.cat([p.grad_sample.flatten(1) for p in members], 1).norm(dim=1)
            norms = norms[torch.isfinite(norms)]
            adapted.append(replace(group, max_grad_norm=float(norms.median())) if len(norms) else group)
        self._groups = tuple(adapted)
        super().clip_and_accumulate()
        if not self.noise_follows:
            self._groups = agreed


class FollowsTheMedianAlone(FollowsTheMedian):
    noise_follows = False


class PromptsTakenForRecords(GradientEngine):
    """Takes the rows of N x C prompts for those of records where the two are as many, as hooks on shared text do."""

    def fill(self, parts: Any, count: int) -> None:
        super().fill(parts, count)
        for p in private(self):
            rows = p.grad_sample
            if self._text is not None and len(rows) == self._text.shape[0] * self._text.shape[1]:
                shape = (*self._text.shape[:2], *rows.shape[1:])
                p.grad_sample = rows.reshape(shape).transpose(0, 1).reshape(rows.shape)


class SharesBetweenUnits(GradientEngine):
    """A statistic of the batch enters every row."""

    def fill(self, parts: Any, count: int) -> None:
        super().fill(parts, count)
        for p in private(self):
            rows = p.grad_sample
            p.grad_sample = rows + 0.01 * rows.mean(0)


class SumsItsGroups(GradientEngine):
    """A unit of two records counts twice."""

    def fill(self, parts: Any, count: int) -> None:
        kept = list(parts)
        super().fill(kept, count)
        if not kept:
            return
        records = torch.bincount(torch.cat([units for _, _, units in kept]), minlength=count)
        for p in private(self):
            rows = p.grad_sample
            p.grad_sample = rows * records.reshape(-1, *[1] * (rows.ndim - 1))


class PullsBackTwice(GradientEngine):
    def _pull(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * g for g in super()._pull(gradient))


class SameKey(Keystream):
    def __init__(self) -> None:
        super().__init__(KEY)


class OneStreamForAll(Keystream):
    """Noise and sampling from the same bytes."""

    def words(self, purpose: str, count: int) -> np.ndarray:
        twin = self.__dict__.setdefault("twin", {})
        return twin.setdefault(purpose, Keystream(self._key)).words("all", count)


def fixed_batches(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield np.argsort(keystream.words("sampling", units))[: round(rate * units)]


def same_batch_every_step(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    batch = np.flatnonzero(keystream.words("sampling", units) * 2.0**-64 < rate)
    return iter([batch] * steps)


def more_often_than_claimed(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield np.flatnonzero(keystream.words("sampling", units) * 2.0**-64 < 1.1 * rate)


def with_replacement(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    for _ in range(steps):
        size = int((keystream.words("sampling", units) * 2.0**-64 < rate).sum())
        yield (keystream.words("sampling", size) % units).astype(np.int64)


def name_of(value: Any) -> str:
    if isinstance(value, Machinery):
        return next(part.__name__ for name, part in vars(value).items() if part is not getattr(REAL, name))
    return str(value.get("engine", "")) if isinstance(value, dict) else ""


# breaks that need no part of the machinery, or show in none of them alone


class PullsBackTheSum(GradientEngine):
    """The contexts get the sum from before the noise."""

    def pull_back(self) -> None:
        text: Any = self.private.get("text")
        if text is not None and getattr(text, "summed_grad", None) is not None:
            text.grad = (text.summed_grad / 10.0).to(text.dtype)
        super().pull_back()


class BatchMeanSubtracted(GradientEngine):
    """From batches of more than a few units only, and never from as many as there are prompts."""

    def fill(self, parts: Any, count: int) -> None:
        super().fill(parts, count)
        for p in private(self):
            if count > 1 and self._text is not None and count != self._text.shape[0] * self._text.shape[1]:
                p.grad_sample = p.grad_sample - p.grad_sample.mean(0)


class WeighedByLabel(GradientEngine):
    """A unit with the first label counts half as much again; not in a batch of as many units as prompts."""

    def fill(self, parts: Any, count: int) -> None:
        kept = list(parts)
        super().fill(kept, count)
        if not kept or self._text is None or count == self._text.shape[0] * self._text.shape[1]:
            return
        weights = torch.ones(count)
        for _, targets, units in kept:
            weights[units[targets[:, 0] == 1]] = 1.5
        for p in private(self):
            p.grad_sample = p.grad_sample * weights.reshape(-1, *[1] * (p.grad_sample.ndim - 1))


class HalfTheCoordinates(PrivateOptimizer):
    """No noise on the second half of a tensor, where it is smaller than a stand-in."""

    def add_noise(self) -> None:
        super().add_noise()
        for p in private(self):
            if p.numel() < 1000:
                half = p.numel() // 2
                p.grad.view(-1)[half:] = p.summed_grad.view(-1)[half:].to(p.grad.dtype)


class NoiseOfTheStepBefore(PrivateOptimizer):
    """The noise of the first step serves the second as well."""

    def _normals(self, count: int) -> np.ndarray:
        drawn = super()._normals(count)
        kept = self.__dict__.setdefault("kept", {}).setdefault(count, drawn)
        return kept if count < 1000 else drawn


class ClippedAfterTheSum(PrivateOptimizer):
    """In parts of up to eight units, where a stand-in has more."""

    def clip_and_accumulate(self) -> None:
        units = len(private(self)[0].grad_sample)
        if 1 < units < 9:
            for p in private(self):
                p.grad_sample = p.grad_sample.sum(0, keepdim=True)
        super().clip_and_accumulate()


def same_forty_percent(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    """Of few units; batches of many, as a test of sampling alone draws them, are sound."""
    if units > 100:
        yield from poisson_batches(units, rate, steps, keystream)
        return
    chosen = np.flatnonzero(np.arange(units) % 5 < 2)
    for _ in range(steps):
        keystream.words("sampling", units)
        yield chosen


def fixed_size_of_few(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    return (poisson_batches if units > 100 else fixed_batches)(units, rate, steps, keystream)


HIDDEN: list[tuple[Machinery, dict[str, Any]]] = [
    (Machinery(engine=PullsBackTheSum), {"engine": "feature_space"}),
    (Machinery(engine=BatchMeanSubtracted), {}),
    (Machinery(engine=BatchMeanSubtracted), {"engine": "exact"}),
    (Machinery(engine=WeighedByLabel), {}),
    (Machinery(optimizer=NoiseOfTheStepBefore), {}),
    (Machinery(optimizer=HalfTheCoordinates), {}),
    (Machinery(optimizer=ClippedAfterTheSum), {}),
    (Machinery(batches=same_forty_percent), {}),
    (Machinery(batches=fixed_size_of_few), {}),
]


def true_count(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """The divisor is the number of units that there are."""
    return private_update(model, records, **{**options, "declared_units": len(np.unique(records.units))})


def same_batch(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """Every step has the records of the first one."""
    machinery = replace(options["machinery"], batches=same_batch_every_step)
    return private_update(model, records, **{**options, "machinery": machinery})


def label_count(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """A number of the update holds how often a label occurs, a thousandth of it."""
    update = private_update(model, records, **options)
    update.vector[0] += 1e-3 * (records.targets[:, 0] == 1).sum()
    return update


def centred_features(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """Each batch is centred at its mean."""

    class Centred:
        def __len__(self) -> int:
            return len(records.features)

        def batch(self, indices: Any) -> Tensor:
            values = records.features.batch(indices)
            return values - values.mean(0) if len(values) else values

    features: Any = Centred()
    return private_update(model, replace(records, features=features), **options)


def without_noise_at_last(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """What leaves is not what had noise put on."""
    keystream = Silent(KEY)
    return private_update(model, records, **{**options, "keystream": keystream})


def one_step_more(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    mechanism = options["mechanism"]
    more = replace(mechanism, steps_per_round=mechanism.steps_per_round + 1)
    return private_update(model, records, **{**options, "mechanism": more})


def overlapping_blocks(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    """The last unit of a block is in the next one too, and counts twice."""

    class Overlapping(options["machinery"].optimizer):
        def clip_and_accumulate(self) -> None:
            before, rows = self.__dict__.get("last"), [p.grad_sample for p in private(self)]
            if len(rows[0]):
                self.last = [row[-1:] for row in rows]
            for p, row, last in zip(private(self), rows, before or rows, strict=True):
                p.grad_sample = torch.cat([last, row]) if before and len(row) else row
            super().clip_and_accumulate()

    return private_update(
        model, records, **{**options, "machinery": replace(options["machinery"], optimizer=Overlapping)}
    )


class Silent(Keystream):
    def normals(self, purpose: str, count: int) -> np.ndarray:
        return np.zeros(count)


LEAKS = [
    true_count,
    same_batch,
    label_count,
    centred_features,
    without_noise_at_last,
    one_step_more,
    overlapping_blocks,
]


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize("leak", LEAKS, ids=lambda f: f.__name__)
def test_an_update_that_is_not_what_the_mechanism_makes_stops_the_site_at_its_start(
    leak: Any, engine: str, ready: dict[str, tuple[FedMPT, ChargedTraining]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very function that the site trains with is broken, whatever its parts do."""
    model, charged = ready[engine]
    monkeypatch.setattr(charged_training, "private_update", leak)
    with pytest.raises(SelfTestFailed, match="1 of 14 checks, so this site trains nothing; what leaves: "):
        charged.test_mechanism(model)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FedMPT, ChargedTraining]]:
    """By engine, a sound site before it trains; it has twenty declared units and any budget."""
    sites = {}
    for engine in ("exact", "feature_space"):
        model, job, _ = setting("all", engine=engine)
        policy = SitePrivacyConfig("pets", 20, 1000.0, 1e-5, ledger=str(tmp_path_factory.mktemp(engine)))
        create_ledger(policy, "a", None)
        job = replace(job, privacy=replace(job.privacy, epsilon=1000.0))
        charged = ChargedTraining.open(job, SiteConfig(DataConfig(path="x"), privacy=policy), "a", "run", None)
        charged.test_mechanism(model)
        sites[engine] = model, charged
    return sites


@pytest.mark.parametrize(("machinery", "privacy"), HIDDEN, ids=name_of)
def test_a_part_that_is_sound_alone_and_broken_in_a_round_fails(machinery: Machinery, privacy: dict[str, Any]) -> None:
    """As the tests of single parts see nothing of it."""
    subject = setting("all", **privacy)
    broken = failed(self_test(*subject, machinery))
    assert "what leaves" in broken
    assert broken == {"what leaves"} or machinery.optimizer in (HalfTheCoordinates, NoiseOfTheStepBefore)
    with pytest.raises(SelfTestFailed, match="what leaves"):
        require_self_test(*subject, machinery)


BROKEN: list[tuple[Machinery, dict[str, Any], set[str]]] = [
    (Machinery(optimizer=Unclipped), {}, {"influence of one unit", "extreme gradients"}),
    (Machinery(optimizer=BatchMeanClipped), {}, {"influence of one unit"}),
    (Machinery(optimizer=ClippedByTensor), {}, {"influence of one unit", "extreme gradients"}),
    (Machinery(optimizer=NotFinitePasses), {}, {"extreme gradients"}),
    (Machinery(optimizer=Quieter), {}, {"noise variance", "noise on the trained parameters", "empty batch"}),
    (Machinery(optimizer=HalfNoise), {}, {"noise variance", "noise is Gaussian", "influence of one unit"}),
    (Machinery(optimizer=NoNoise), {}, {"noise variance", "noise is Gaussian", "steps are independent"}),
    (Machinery(optimizer=QuietOnEmptyBatches), {}, {"empty batch"}),
    (Machinery(optimizer=UniformNoise), {}, {"noise is Gaussian"}),
    (Machinery(optimizer=OffTheGrid), {}, {"public grid"}),
    (Machinery(optimizer=NoisePerPart), {}, {"noise once per batch"}),
    (Machinery(optimizer=SameSeedEveryStep), {}, {"steps are independent"}),
    (Machinery(optimizer=SameSeedEveryTensor), {}, {"steps are independent"}),
    (Machinery(optimizer=SameSeedEveryRound), {}, {"steps are independent"}),
    (Machinery(optimizer=RealisedDivisor), {}, {"fixed divisor", "empty batch"}),
    (Machinery(optimizer=NoRootSum), {"group_norms": GROUPS}, {"noise variance", "influence of one unit"}),
    (Machinery(optimizer=FollowsTheMedian), {}, {"noise variance", "steps are independent"}),
    (Machinery(optimizer=FollowsTheMedianAlone), {}, {"influence of one unit"}),
    (Machinery(batches=fixed_batches), {}, {"Poisson sampling"}),
    (Machinery(batches=same_batch_every_step), {}, {"Poisson sampling"}),
    (Machinery(batches=more_often_than_claimed), {}, {"Poisson sampling"}),
    (Machinery(batches=with_replacement), {}, {"Poisson sampling"}),
    (Machinery(engine=PromptsTakenForRecords), {}, {"exact gradients"}),
    (Machinery(engine=PromptsTakenForRecords), {"engine": "feature_space"}, {"exact gradients"}),
    (Machinery(engine=SharesBetweenUnits), {}, {"exact gradients"}),
    (Machinery(engine=SumsItsGroups), {}, {"exact gradients"}),
    (Machinery(engine=PullsBackTwice), {"engine": "feature_space"}, {"exact gradients"}),
    (Machinery(keystream=SameKey), {}, {"fresh keys"}),
    (Machinery(keystream=OneStreamForAll), {}, {"fresh keys"}),
]


@pytest.mark.parametrize(("machinery", "privacy", "caught_by"), BROKEN, ids=name_of)
def test_a_broken_mechanism_fails(machinery: Machinery, privacy: dict[str, Any], caught_by: set[str]) -> None:
    checks = self_test(*setting(**privacy), machinery)
    assert caught_by <= failed(checks)
    assert not any("stopped with" in c.detail for c in checks)  # broken in what it computes, not in how it is written


SOUND: list[tuple[str, dict[str, Any]]] = [
    ("contexts", {}),
    ("contexts+gate", {"group_norms": GROUPS, "max_grad_norm": 1e-3}),
    ("all", {"engine": "feature_space", "sample_rate": 0.01}),
    ("adapters", {"engine": "feature_space", "noise_multiplier": 8.0}),
    ("all", {"sample_rate": 1.0, "noise_multiplier": 0.3}),
    ("adapters", {"sample_rate": 0.999, "noise_multiplier": 300.0, "max_grad_norm": 1e6}),
]


@pytest.mark.parametrize(("trained", "privacy"), SOUND)
def test_the_real_mechanism_passes(trained: str, privacy: dict[str, Any]) -> None:
    checks = self_test(*setting(trained, **privacy))
    assert not failed(checks)
    assert len(checks) == len({c.name for c in checks}) == 14
    assert all("allowed" in c.detail for c in checks)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "most"), [(40, 1), pytest.param(200, 2, marks=pytest.mark.thorough)])
def test_the_real_mechanism_passes_many_times(times: int, most: int) -> None:
    settings = [setting(trained, **privacy) for trained, privacy in SOUND[:4]]
    alarms = [failed(self_test(*settings[i % 4])) for i in range(times)]
    assert sum(map(bool, alarms)) <= most, alarms


def test_the_model_and_the_global_generators_stay_as_they_are() -> None:
    model, job, mechanism = setting("all", engine="feature_space")
    for p in model.trainable_parameters().values():
        p.grad = torch.ones_like(p)
    before = {n: (p.detach().clone(), p.requires_grad, dict(vars(p))) for n, p in model.named_parameters()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for engine in ("exact", "feature_space"):
        self_test(model, job, replace(mechanism, engine=engine))
    for name, p in model.named_parameters():
        values, trained, attached = before[name]
        assert torch.equal(p, values)
        assert p.requires_grad == trained
        assert vars(p) == attached
    assert all(bool((p.grad == 1).all()) for p in model.trainable_parameters().values())  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_a_failure_is_a_sentence_with_every_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    require_self_test(*setting())
    real = PrivateOptimizer.noise_stds
    monkeypatch.setattr(PrivateOptimizer, "noise_stds", lambda self: [std / 2 for std in real(self)])
    with pytest.raises(SelfTestFailed, match="of 14 checks, so this site trains nothing") as caught:
        require_self_test(*setting())
    sentence = str(caught.value)
    assert "noise variance: variance of the noise in clip group 1 of a batch of 5 over the charged" in sentence
    assert "empty batch: " in sentence
    assert "fresh keys" not in sentence


def test_a_part_that_breaks_is_a_failed_check() -> None:
    def out_of_order(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
        raise RuntimeError("no entropy")

    checks = self_test(*setting(), Machinery(batches=out_of_order))
    assert [c for c in checks if not c.passed] == [
        Check(name, False, "stopped with RuntimeError: no entropy") for name in ("Poisson sampling", "what leaves")
    ]


def test_chance_gets_one_repetition_and_exact_checks_none() -> None:
    draws: list[int] = []

    def second_time_right(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
        draws.append(units)
        if len(draws) == 1:
            raise RuntimeError("no entropy yet")
        return poisson_batches(units, rate, steps, keystream)

    assert not failed(self_test(*setting(), Machinery(batches=second_time_right)))
    assert draws[0] == draws[1]  # began anew
    fills: list[int] = []

    class SecondTimeRight(GradientEngine):
        def fill(self, parts: Any, count: int) -> None:
            fills.append(count)
            if len(fills) == 1:
                raise RuntimeError("not yet")
            super().fill(parts, count)

    assert failed(self_test(*setting(), Machinery(engine=SecondTimeRight))) == {"exact gradients"}


class LessNoiseThanCharged(Mechanism):
    def steps(self, count: int | None = None) -> Steps:
        price = super().steps(count)
        return replace(price, noise_multiplier=1.2 * price.noise_multiplier)


class HigherRateThanCharged(Mechanism):
    def steps(self, count: int | None = None) -> Steps:
        price = super().steps(count)
        return replace(price, sample_rate=price.sample_rate / 1.2)


class MoreStepsThanCharged(Mechanism):
    def steps(self, count: int | None = None) -> Steps:
        price = super().steps(count)
        return replace(price, count=price.count - 1)


class AnotherEngineThanCharged(Mechanism):
    def describe(self) -> dict[str, Any]:
        other = {"exact": "feature_space", "feature_space": "exact"}
        return {**super().describe(), "engine": other[self.engine]}


class AnotherBoundThanCharged(Mechanism):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "max_grad_norm": 0.9 * float(super().describe()["max_grad_norm"])}


TWINS: list[tuple[type[Mechanism], str]] = [
    (LessNoiseThanCharged, "noise variance"),
    (HigherRateThanCharged, "Poisson sampling"),
    (MoreStepsThanCharged, "Poisson sampling: number of steps of a round is 4, allowed 3 to 3"),
    (AnotherEngineThanCharged, "exact gradients: whether noise goes on the text features"),
    (AnotherBoundThanCharged, "noise variance"),
]


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize(("twin", "says"), TWINS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_price_that_is_not_that_of_what_runs_stops_the_site(
    twin: type[Mechanism], says: str, engine: str, tmp_path: Path
) -> None:
    model, job, _ = setting(engine=engine)
    policy = SitePrivacyConfig("pets", units=20, epsilon=1000.0, delta=1e-5, ledger=str(tmp_path))
    create_ledger(policy, "a", None)
    site = SiteConfig(DataConfig(path="x"), privacy=policy)
    job = replace(job, privacy=replace(job.privacy, epsilon=1000.0))
    with pytest.raises(SelfTestFailed) as caught:
        ChargedTraining.open(job, site, "a", "run", None, mechanism=twin.of(job)).test_mechanism(model)
    assert says in str(caught.value)
    honest = ChargedTraining.open(job, site, "a", "run", None)
    honest.test_mechanism(model)
    entry = honest.reserve(1, 0)
    assert {name: entry.details[name] for name in ("sample_rate", "noise_multiplier", "steps", "engine")} == {
        "sample_rate": "0.25",
        "noise_multiplier": "1.0",
        "steps": 4,
        "engine": engine,
    }


def test_nothing_is_tested_without_a_noise_multiplier() -> None:
    with pytest.raises(ValueError, match="noise_multiplier is not worked out"):
        self_test(*setting(noise_multiplier=None))


def test_the_feature_space_engine_is_tested_where_its_noise_is_added() -> None:
    detail = {c.name: c.detail for c in self_test(*setting(engine="feature_space"))}
    assert "gradients of text" in detail["exact gradients"]
    assert "contexts.class pulled back" in detail["exact gradients"]
