"""A site's test of its own privacy mechanism before it trains: about a second, on planted gradients and random numbers.

The machinery of a round runs as its `Mechanism` says, and what leaves it is compared with that mechanism's description,
from which the ledger charges the round. A job may train ten numbers only, so statistics come from stand-in
parameters behind the same optimizer class, and gradients from a two-class model with the job's towers and settings.

The last check takes the site's own way to an update, from records to what leaves, and works the same round out by hand
(`replay`): who was drawn, whose gradients were clipped, which noise was added, what was divided by, and each step.

A statistical check fails a sound site with probability `FALSE_ALARM` at most, by the quantiles of its statistics, and
is repeated once: all ten stop one sound start in 100,000. A unit's influence is tested as in Gaussian differential
privacy (Dong, Roth and Su 2022): a shift of 1 / noise multiplier is what is promised.

It must never see a record of the site, nor touch the model: what it finds may be told to the submitter of the job.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.mechanism.gradients import TEXT, GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery, clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.replay import EXACT, HALF, Replay, Steps, Tape, batches, clipped_sums, recording
from fedmpt_core.training.local import LocalUpdate, TrainingRecords
from fedmpt_core.training.loss import asymmetric_loss

FALSE_ALARM = 1e-3  # of one statistical check, before its repetition; chosen
_UNITS = 20  # declared number of units of the stand-ins
ROWS = 2  # of a block in the rehearsal, so that a batch takes several and a group of records lies in two
_MOST = 512  # units planted on a coordinate at most; planted gradients lose sharpness above a noise multiplier of 25


class SelfTestFailed(ValueError):
    """This site's privacy mechanism does not do what is charged for it, so the site trains nothing."""


@dataclass(frozen=True)
class Check:
    """One finding: what was measured and what is allowed, in words. Nothing in it depends on a site's records."""

    name: str
    passed: bool
    detail: str


class _Measured(NamedTuple):
    what: str
    value: float
    low: float
    high: float

    def allowed(self) -> bool:
        return self.low <= self.value <= self.high  # False for NaN

    def __str__(self) -> str:
        return f"{self.what} is {self.value:.5g}, allowed {self.low:.5g} to {self.high:.5g}"


Train = Callable[..., LocalUpdate]
"""(model, records, state, round_number) -> what leaves: a site's own way to an update."""


@dataclass(frozen=True)
class Trainer:
    """How a site makes its updates.

    Attributes:
        units: its declared number of units.
        of: makes the function that trains with another mechanism, machinery and keystream; else it is the real one.
    """

    units: int
    of: Callable[[Mechanism, Machinery, Keystream], Train]


def trainer(job: JobConfig, units: int = _UNITS) -> Trainer:
    """`private_update` as it stands, for whoever has no site."""

    def of(mechanism: Mechanism, machinery: Machinery, keystream: Keystream) -> Train:
        return partial(
            private_update,
            job=job,
            mechanism=mechanism,
            declared_units=units,
            keystream=keystream,
            machinery=machinery,
            micro_batch=ROWS,
        )

    return Trainer(units, of)


def require_self_test(
    model: TunedModel, job: JobConfig, mechanism: Mechanism, machinery: Machinery = REAL, own: Trainer | None = None
) -> None:
    """Raises SelfTestFailed, naming every failed check, unless the mechanism does what is charged for it."""
    failed = [f"{c.name}: {c.detail}" for c in self_test(model, job, mechanism, machinery, own) if not c.passed]
    if failed:
        raise SelfTestFailed(
            f"the self-test of the privacy mechanism failed in {len(failed)} of {len(_CHECKS)} checks, so this site "
            f"trains nothing; {'; '.join(failed)}. Compare the installed packages with the release's"
        )


def self_test(
    model: TunedModel, job: JobConfig, mechanism: Mechanism, machinery: Machinery = REAL, own: Trainer | None = None
) -> tuple[Check, ...]:
    """Hold what runs against what is charged.

    Args:
        model: the site's model; only its towers, classes, settings and shapes are used, and it stays as it is.
        job: its loss.
        mechanism: what is charged, and what the machinery is told to do.
        machinery: what is tested.
        own: how the site makes its updates; None is `private_update` alone.

    Returns:
        Every check, in a fixed order.
    """
    subject = _Subject(model, job, mechanism, machinery, own or trainer(job))
    checks = []
    for name, measure, statistical in _CHECKS:
        check = _run(name, measure, subject)
        checks.append(_run(name, measure, subject) if statistical and not check.passed else check)
    return tuple(checks)


def _run(name: str, measure: "_Measure", subject: "_Subject") -> Check:
    try:
        with torch.enable_grad(), np.errstate(all="ignore"):  # no noise at all divides by 0: infinite, not allowed
            measured = list(measure(subject))
    except Exception as error:  # whatever breaks, the mechanism is not sound
        return Check(name, False, f"stopped with {type(error).__name__}: {error}")
    shown = [m for m in measured if not m.allowed()] or measured
    return Check(name, all(m.allowed() for m in measured), "; ".join(map(str, shown)))


class _Bench:
    """Parameters behind the mechanism's m clip groups and its noise.

    Attributes:
        ratios: noise standard deviation that is charged over the clip bound, per group.
        unit: influence on `scores` of a gradient as long as the bound; 1 / noise multiplier, but for the grid.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        machinery: Machinery,
        private: Mapping[str, nn.Parameter],
        keystream: Keystream | None = None,
    ) -> None:
        charged = mechanism.describe()
        noise = charged.get("share_multiplier", charged["noise_multiplier"])
        self._bits = mechanism.grid_bits
        self._private: dict[str, Any] = dict(private)
        self._groups = clip_groups(private, replace(mechanism, bounds=charged["max_grad_norm"]))
        self._divisor = charged["sample_rate"] * _UNITS
        sizes = [sum(private[n].numel() for n in g.names) for g in self._groups]
        # written out again here, so that a slip in the optimizer shows
        self.ratios = [noise * sqrt(len(sizes)) * (1 + 2.0**-self._bits * sqrt(size)) for size in sizes]
        self.unit = sum(1 / ratio for ratio in self.ratios) / sqrt(len(sizes))
        # a step of length 1 from 0 is minus the release
        step = torch.optim.SGD(list(private.values()), lr=1.0)
        self._optimizer = machinery.noisy(mechanism, step, private, _UNITS, keystream or machinery.keystream())

    def noise(self, *pieces: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Sums that a step releases over the noise that is charged, (d_g,) float64 by group: standard normal where no
        gradient was planted. `pieces` are the batch in physical parts, (units, *shape) by name; none is no unit.
        """
        empty = {n: torch.zeros(0, *p.shape, device=p.device) for n, p in self._private.items()}
        for i, piece in enumerate(pieces or [empty]):
            for name, parameter in self._private.items():
                parameter.grad_sample = piece[name]
            self._optimizer.signal_skip_step(i < len(pieces) - 1)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        released = []
        for group, ratio in zip(self._groups, self.ratios, strict=True):
            flat = np.concatenate([self._private[n].detach().double().cpu().numpy().ravel() for n in group.names])
            released.append(flat * -self._divisor / (ratio * group.max_grad_norm))
        for parameter in self._private.values():
            parameter.data.zero_()
        return released

    def rows(self, *pieces: Mapping[str, Tensor]) -> np.ndarray:
        """`noise` of stand-ins, (2 m, width): a row for each parameter."""
        return np.concatenate([values.reshape(2, -1) for values in self.noise(*pieces)])

    def scores(self, *pieces: Mapping[str, Tensor]) -> np.ndarray:
        """`noise` of stand-ins along each planted direction, (width,): standard normal plus `unit` for each unit."""
        rows = self.rows(*pieces)
        return rows.sum(0) / sqrt(len(rows))

    def planted(self, coordinates: np.ndarray, length: np.ndarray | float) -> dict[str, Tensor]:
        """One unit per coordinate: in every group a gradient of `length` bounds, along it in both stand-ins."""
        made = {}
        for group in self._groups:
            values = np.broadcast_to(length * group.max_grad_norm / sqrt(2), coordinates.shape)
            for name in group.names:
                rows = np.zeros((len(coordinates), *self._private[name].shape), np.float32)
                rows[np.arange(len(coordinates)), coordinates] = values
                made[name] = torch.from_numpy(rows).to(self._private[name].device)
        return made


@dataclass(frozen=True)
class _Subject:
    model: TunedModel
    job: JobConfig
    mechanism: Mechanism
    machinery: Machinery
    own: Trainer

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.trainable_parameters().values())).device

    def engine(self, model: TunedModel) -> GradientEngine:
        return self.machinery.gradients(self.mechanism, model, self.job)

    @property
    def rounded(self) -> float:
        """Of the way back through the text tower: 0.6 % measured in half precision; nothing else may differ."""
        half = self.device.type == "cuda" and self.job.backbone.precision == "auto"
        return HALF if half else 1e-4

    def small(self, generator: torch.Generator) -> TunedModel:
        """A two-class model with the job's towers and settings, a little off its start."""
        model, job = self.model, self.job
        small = build_model(model._frozen[0], model.classes[:2], model.config, job.seed).to(self.device)
        for parameter in small.trainable_parameters().values():  # some start at 0, where others get no gradient
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(self.device)
        return small

    def bench(self, width: int = 2048, keystream: Keystream | None = None) -> _Bench:
        """Stand-ins: two float64 parameters of `width` numbers for each clip group; with a keystream of their own."""
        bounds = self.mechanism.bounds
        groups = sorted(bounds) if isinstance(bounds, Mapping) else ["all"]
        names = [f"{group}.{side}" for group in groups for side in ("one", "two")]
        zeros = {n: nn.Parameter(torch.zeros(width, dtype=torch.float64, device=self.device)) for n in names}
        return _Bench(self.mechanism, self.machinery, zeros, keystream)


_Measure = Callable[[_Subject], Iterable[_Measured]]


def _within(what: str, value: float, distribution: Any, alpha: float) -> _Measured:
    return _Measured(what, value, float(distribution.ppf(alpha / 2)), float(distribution.isf(alpha / 2)))


def _variance(what: str, noise: np.ndarray, alpha: float) -> _Measured:
    """Mean square of numbers that must be standard normal."""
    chi2 = stats.chi2(noise.size, scale=1 / noise.size)
    return _within(f"variance of the noise {what} over the charged one", float(np.mean(noise**2)), chi2, alpha)


def _noise_beside(sizes: tuple[int, ...], subject: _Subject) -> Iterator[_Measured]:
    bench = subject.bench()
    alpha = FALSE_ALARM / len(sizes) / len(bench.ratios)
    for size in sizes:
        noise = bench.rows(bench.planted(np.zeros(size, np.int64), 10.0))[:, 1:]
        for number, values in enumerate(np.split(noise, len(bench.ratios)), 1):
            yield _variance(f"in clip group {number} of a batch of {size}", values, alpha)


def _noise_of_the_model(subject: _Subject) -> Iterator[_Measured]:
    copies = {n: nn.Parameter(torch.zeros_like(p)) for n, p in subject.engine(subject.model).private.items()}
    bench = _Bench(subject.mechanism, subject.machinery, copies)
    for number, values in enumerate(bench.noise(), 1):
        yield _variance(f"on trained group {number}", values, FALSE_ALARM / len(bench.ratios))


def _noise_is_gaussian(subject: _Subject) -> Iterator[_Measured]:
    bench = subject.bench()
    p_value = stats.kstest(bench.rows().ravel(), "norm", method="asymp").pvalue
    yield _Measured("Kolmogorov-Smirnov p-value of the noise against the normal", p_value, FALSE_ALARM, 1)


def _influence(subject: _Subject) -> Iterator[_Measured]:
    width, inside = 1024, 32
    bench = subject.bench(width)
    order = np.random.default_rng().permutation(width)
    copies = min(ceil(8 / bench.unit), _MOST)
    coordinates = np.repeat(order[:inside], copies)
    scores = bench.scores(*(bench.planted(coordinates[i : i + 256], 10.0) for i in range(0, len(coordinates), 256)))
    present, absent = scores[order[:inside]], scores[order[inside:]]
    share = (present.mean() - absent.mean()) / (copies * bench.unit)
    spread = sqrt(1 / inside + 1 / (width - inside)) / (copies * bench.unit)
    yield _within("clipped length of a unit over its bound", share, stats.norm(1, spread), FALSE_ALARM / 2)
    noise = sqrt((inside * present.var() + (width - inside) * absent.var()) / (width - 2))
    what = "influence of a unit over the noise, as a share of 1 / noise multiplier,"
    yield _within(what, share / noise, stats.nct(width - 2, 1 / spread, scale=spread), FALSE_ALARM / 2)


def _extreme_gradients(subject: _Subject) -> Iterator[_Measured]:
    bench = subject.bench(64)
    copies = min(ceil(20 / bench.unit), _MOST)
    cases = (
        ("of 1e6 bounds", 1e6, 0.0, 1.0),
        ("of 1e30 bounds", 1e30, 0.0, 1.0),  # the square is infinite in float32
        ("of half a bound", 0.5, 0.0, 0.5),
        ("with NaN", 10.0, nan, 0.0),
        ("with infinity", 10.0, inf, 0.0),
        ("with minus infinity", 10.0, -inf, 0.0),
    )
    pieces = [bench.planted(np.full(copies, i), case[1]) for i, case in enumerate(cases)]
    for piece, (_, _, value, _) in zip(pieces, cases, strict=True):
        piece[max(piece)][:, -1] = value  # in one stand-in only: the unit must vanish from all
    scores = bench.scores(*pieces)
    alpha, claimed = FALSE_ALARM / (len(cases) + 1), copies * bench.unit
    for score, (text, _, _, share) in zip(scores, cases, strict=False):
        yield _within(f"share passed of gradients {text}", score / claimed, stats.norm(share, 1 / claimed), alpha)
    yield _variance("beside extreme gradients", scores[len(cases) :], alpha)


def _steps(subject: _Subject) -> Iterator[_Measured]:
    bench = subject.bench()
    long, short = (bench.planted(np.zeros(7, np.int64), length) for length in (10.0, 0.01))
    noise = [bench.rows(*pieces)[:, 1:] for pieces in ([], [long], [short], [])]
    stream = subject.machinery.keystream()  # of a run, whose rounds have an optimizer each
    noise += [subject.bench(keystream=stream).rows()[:, 1:] for _ in range(2)]
    alpha = FALSE_ALARM / (len(noise) + 1)
    for number, values in enumerate(noise, 1):
        yield _variance(f"in step {number}", values, alpha)
    rows = np.concatenate(noise)
    pairs = np.abs(np.corrcoef(rows)[np.triu_indices(len(rows), 1)])
    free = rows.shape[1] - 2
    most = float(stats.t.isf(alpha / (2 * pairs.size), free))
    yield _Measured("largest correlation of two draws of noise", pairs.max(), 0, most / sqrt(free + most**2))


def _noise_once(subject: _Subject) -> Iterator[_Measured]:
    bench, units = subject.bench(), 16
    noise = bench.rows(*[bench.planted(np.zeros(units, np.int64), 10.0) for _ in range(3)])
    yield _variance("of a batch in three parts", noise[:, 1:], FALSE_ALARM / 2)
    total, expected = noise[:, 0].sum() / sqrt(len(noise)) / bench.unit, stats.norm(3 * units, 1 / bench.unit)
    yield _within(f"sum of {3 * units} units in three parts", total, expected, FALSE_ALARM / 2)


def _sampling(subject: _Subject) -> Iterator[_Measured]:
    machinery, charged = subject.machinery, subject.mechanism.describe()
    rounds = sum(1 for _ in machinery.draws(subject.mechanism, 0, machinery.keystream()))
    yield _Measured("number of steps of a round", rounds, charged["steps"], charged["steps"])
    rate = charged["sample_rate"]
    spread = rate * (1 - rate)
    # a variance of about 32 in a batch's size where that many units are affordable, and 2^19 draws in all
    units = int(np.clip(32 / max(spread, 1e-9), 128, 8192))
    steps = int(np.clip(2**19 // units, 64, 512))
    batches = machinery.draws(replace(subject.mechanism, steps_per_round=steps), units, machinery.keystream())
    taken = np.stack([np.bincount(batch, minlength=units) for batch in batches])
    yield _Measured("largest number of times that a unit is in one batch", taken.max(), 0, 1)
    yield _within("number of units drawn", taken.sum(), stats.binom(units * steps, rate), FALSE_ALARM / 3)
    for what, counts, draws in (("batch sizes", taken.sum(1), units), ("steps of a unit", taken.sum(0), steps)):
        if spread > 0:
            # a sum of squared binomials: chi-square, widened by the binomial's own kurtosis
            shape = 2 + (1 - 6 * spread) / (draws * spread)
            ratio = ((counts - draws * rate) ** 2).mean() / (draws * spread)
            gamma = stats.gamma(counts.size / shape, scale=shape / counts.size)
            yield _within(f"variance of the {what} over the binomial one", ratio, gamma, FALSE_ALARM / 3)


def _exact_gradients(subject: _Subject) -> Iterator[_Measured]:
    """Against plain autograd, without vmap and without the split at the text features. There are as many units as
    prompts, where a slip between the two has no other symptom; the last is a group of two records in two portions.
    """
    job, device = subject.job, subject.device
    generator = torch.Generator()
    generator.seed()
    small = subject.small(generator)
    trained = small.trainable_parameters()
    most = {name: subject.rounded if name.startswith("contexts.") else 1e-4 for name in [TEXT, *trained]}
    prompts = len(small.conditions) * len(small.classes)
    units = torch.tensor([*range(prompts), prompts - 1], device=device)
    patches = torch.randn(len(units), 8, small._frozen[0].feature_dim, generator=generator).to(device)
    targets = torch.eye(2, device=device)[units % 2]  # a record without a label may have no gradient to compare
    engine = subject.engine(small)
    contexts = {n: p for n, p in trained.items() if n.startswith("contexts.")}
    fast = subject.mechanism.describe()["engine"] == "feature_space" and bool(contexts)
    yield _Measured("whether noise goes on the text features", TEXT in engine.private, fast, fast)
    engine.encode()
    engine.fill(zip(*(x.split(prompts) for x in (patches, targets, units)), strict=True), prompts)
    text, rows = small.text_features(), []
    wanted = [text if name == TEXT else parameter for name, parameter in engine.private.items()]
    for record, target in zip(patches, targets, strict=True):
        prediction = small(record, text)
        loss = asymmetric_loss(prediction.log_positive, prediction.log_negative, target, job.loss)
        weighted = job.training.loss_weight * loss
        rows.append(torch.autograd.grad(weighted, wanted, retain_graph=True, materialize_grads=True))
    for (name, parameter), (*single, one, two) in zip(engine.private.items(), zip(*rows, strict=True), strict=True):
        error = _error(getattr(parameter, "grad_sample", None), torch.stack([*single, (one + two) / 2]))
        yield _Measured(f"relative error of the gradients of {name}", error, 0, most[name])
    if TEXT in engine.private:
        engine.private[TEXT].grad = planted = torch.randn(text.shape, generator=generator).to(device)
        engine.pull_back()
        pulled = torch.autograd.grad(text, [*contexts.values()], planted)
        for (name, parameter), gradient in zip(contexts.items(), pulled, strict=True):
            yield _Measured(f"relative error of {name} pulled back", _error(parameter.grad, gradient), 0, most[name])


class _Patches:
    """Features in memory."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def batch(self, indices: Any) -> Tensor:
        return self._values[torch.as_tensor(np.asarray(indices))]


def _what_leaves(subject: _Subject) -> Iterator[_Measured]:
    """The site's own way to an update on records that were made up, against the same round worked out by hand from
    the random numbers that it drew and the gradients that it clipped. The first are held against plain autograd.
    """
    generator = torch.Generator()
    generator.seed()
    small, units = subject.small(generator), np.array([0, 1, 2, 3, 4, 5, 6, 7, 7])
    patches = torch.randn(len(units), 8, small._frozen[0].feature_dim, generator=generator)
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 2], [2, 1], [0, 1], [0, 1], [1, 0]], np.uint8)
    features: Any = _Patches(patches)
    mechanism, state = _tame(subject), small.vector()
    tape, steps = Tape(subject.machinery.keystream()), Steps()
    train = subject.own.of(mechanism, recording(subject.machinery, steps), tape)
    update = train(small, TrainingRecords(features, targets, units), state=state, round_number=1)
    charged = mechanism.describe()
    yield _Measured("number of steps of an update", update.steps, charged["steps"], charged["steps"])
    drawn = batches(tape.sampled, charged["sample_rate"])
    sizes = [len(words) for words in tape.sampled]
    yield _Measured("whether each step draws for every unit", sizes == [8] * charged["steps"], True, True)
    taken = [len(next(iter(rows.values()))) for rows in steps.gradients]
    yield _Measured("whether each step has the units that were drawn", taken == [len(b) for b in drawn], True, True)
    if taken != [len(batch) for batch in drawn]:
        return
    divisor = charged["sample_rate"] * subject.own.units
    names = {"noise_multiplier": "noise_multiplier", "bounds": "max_grad_norm", "engine": "engine"}
    as_charged = replace(mechanism, **{name: charged[detail] for name, detail in names.items()})
    replay = Replay(
        small, subject.job, as_charged, state=state, round_number=1, divisor=divisor, noise=iter(tape.normal)
    )
    for batch, rows in zip(drawn, steps.gradients, strict=True):
        if len(batch):
            records = [np.flatnonzero(units == unit) for unit in batch]
            yield from _rows_differ(subject, small, rows, [(patches[i], targets[i]) for i in records])
        sums = clipped_sums(rows, as_charged, replay.shapes)
        if mechanism.shared:
            same = np.array_equal(update.vector, replay.share(sums))
            yield _Measured("whether the integers that leave are those worked out", same, True, True)
            return
        replay.step(sums)
    error = replay.error(update.vector, HALF if subject.rounded == HALF else EXACT)
    yield _Measured("difference of the update to the one worked out, over its rounding,", error, 0, 1)
    yield _Measured("number of draws of noise", len(tape.normal), *[len(steps.gradients) * len(replay.shapes)] * 2)


def _tame(subject: _Subject) -> Mechanism:
    """Three steps (one of shared noise) of half the units, with bounds by which noise moves a little: a slip shows."""
    mechanism, rate = subject.mechanism, 0.5
    bounds = mechanism.bounds
    largest = max(bounds.values()) if isinstance(bounds, Mapping) else bounds
    step = min(0.1, 0.005 / subject.job.training.learning_rate)
    scale = step * rate * subject.own.units / (largest * mechanism.noise_multiplier)
    scaled = {name: bound * scale for name, bound in bounds.items()} if isinstance(bounds, Mapping) else bounds * scale
    return replace(mechanism, sample_rate=rate, steps_per_round=1 if mechanism.shared else 3, bounds=scaled)


def _rows_differ(
    subject: _Subject, model: TunedModel, rows: Mapping[str, Tensor], batch: list[tuple[Tensor, np.ndarray]]
) -> Iterator[_Measured]:
    """Gradients that were clipped against plain autograd on the units that were drawn."""
    device, expected = subject.device, dict[str, list[Tensor]]()
    trained = model.trainable_parameters()
    text = model.text_features()
    wanted = {name: text if name == TEXT else trained[name] for name in rows}
    for patches, targets in batch:
        losses = []
        for record, labels in zip(patches, targets, strict=True):
            prediction = model(record.to(device), text)
            target = torch.from_numpy(labels).float().to(device)
            losses.append(asymmetric_loss(prediction.log_positive, prediction.log_negative, target, subject.job.loss))
        loss = subject.job.training.loss_weight * torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, [*wanted.values()], retain_graph=True, materialize_grads=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            expected.setdefault(name, []).append(gradient)
    for name, values in expected.items():
        most = subject.rounded if name.startswith("contexts.") else 1e-4
        error = _error(rows[name], torch.stack(values))
        yield _Measured(f"relative error of the clipped gradients of {name}", error, 0, most)


def _error(value: Tensor | None, expected: Tensor) -> float:
    """Largest difference over the largest expected number; infinite for no tensor or one of another shape."""
    if value is None or value.shape != expected.shape:
        return inf
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _keys(subject: _Subject) -> Iterator[_Measured]:
    streams = [subject.machinery.keystream() for _ in range(3)]
    yield _Measured("number of different keys of three keystreams", len({s.key_id for s in streams}), 3, 3)
    draws = {s.words(purpose, 4).tobytes() for s in streams for purpose in ("noise", "sampling") for _ in range(2)}
    yield _Measured("number of different draws out of twelve", len(draws), 12, 12)


def _grid(subject: _Subject) -> Iterator[_Measured]:
    bench = subject.bench()
    lengths = np.random.default_rng().random(50)  # their sums lie on no grid by themselves
    for values, ratio in zip(bench.noise(bench.planted(np.arange(50), lengths)), bench.ratios, strict=True):
        steps = values * ratio * 2.0**subject.mechanism.grid_bits
        yield _Measured("distance from the public grid, in its steps,", np.abs(steps - np.rint(steps)).max(), 0, 1e-3)


_CHECKS: tuple[tuple[str, _Measure, bool], ...] = (  # name, measurement, whether chance can fail it
    ("noise variance", partial(_noise_beside, (5,)), True),
    ("noise on the trained parameters", _noise_of_the_model, True),
    ("noise is Gaussian", _noise_is_gaussian, True),
    ("influence of one unit", _influence, True),
    ("extreme gradients", _extreme_gradients, True),
    ("steps are independent", _steps, True),
    ("noise once per batch", _noise_once, True),
    ("empty batch", partial(_noise_beside, (0,)), True),
    ("fixed divisor", partial(_noise_beside, (1, 4 * _UNITS)), True),
    ("Poisson sampling", _sampling, True),
    ("exact gradients", _exact_gradients, False),
    ("what leaves", _what_leaves, False),
    ("fresh keys", _keys, False),
    ("public grid", _grid, False),
)
