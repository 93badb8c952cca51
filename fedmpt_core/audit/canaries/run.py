"""The empirical privacy run: a site's whole training with canaries planted in it, attacked, and judged.

The training is that of a job, through the parts that a job uses (`private_update`), in this process, the site's own
updates applied round by round; `planting` has the canaries and the attacks, `bounds` what they prove. What leaves is
the update: it must be what the attacked releases give by public steps (`leaving`), and then shows no more than they do.

It is a private computation: every round is charged to the site's ledger before it trains. Its figures have no noise, so
they stay at the site; nothing is released, so no round is committed. It must never train on records without a ledger
that was charged, nor call a small bound a proof of privacy.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpt_core.audit.canaries import bounds
from fedmpt_core.audit.canaries.bounds import Attack, Interval
from fedmpt_core.audit.canaries.leaving import WRONG, Leaving
from fedmpt_core.audit.canaries.planting import (
    FEWEST,
    PICTURES,
    CanaryScores,
    GradientCanaries,
    PictureCanaries,
    public_generator,
)
from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.common.canonical import json_value
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.source import load_split
from fedmpt_core.federation.site.session import open_cache
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.device import pick_device
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, epsilon
from fedmpt_core.privacy.charged_training import ChargedTraining, require_apart, units_of
from fedmpt_core.privacy.ledger.budget import PrivacyRefused
from fedmpt_core.privacy.ledger.site_ledger import ledger_path, with_ledger
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.training.local import TrainingRecords

SIGNIFICANCE = 0.05  # of everything reported
FALSE_ALARM = 1e-4  # at which the interval fails a run: it is as sharp as the claim, so 2.5 % of sound runs miss it
REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Moments:
    """What the means and variances of the gradient canaries' scores say of the mechanism.

    Attributes:
        noise: 95 % interval of the noise multiplier at work, over the claimed one.
        epsilon: the same as epsilon; infinite where nothing is protected.
        least_epsilon: the low end that a sound mechanism passes once in 20,000 runs.
        steps_ratio: variance of the noise of all steps over that of independent steps, about 1.
        steps_allowed: where `steps_ratio` lies for independent steps, but once in 10,000 runs.
    """

    noise: Interval
    epsilon: Interval
    least_epsilon: float
    steps_ratio: float
    steps_allowed: Interval


@dataclass(frozen=True)
class CanaryReport:
    """One empirical run; stays at the site.

    Attributes:
        job: name of the job; `run_id` is the run's name in the ledger.
        site: the site; `unit` what the claim protects there.
        claim: accounted epsilon of the run's `steps` at `delta`.
        ledger: what was charged.
        gradients: the attack on gradient canaries; `moments` say more of them.
        pictures: the attack on picture canaries; None where the site has too few units.
        findings: the worst first.
    """

    job: str
    run_id: str
    site: str
    unit: str
    claim: float
    delta: float
    steps: int
    ledger: str
    gradients: Attack
    moments: Moments
    pictures: Attack | None
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim; it proves nothing more."""
        return worst(self.findings) != "fail"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: null instead."""
        return json_value({**asdict(self), "passed": self.passed, "schema": REPORT_SCHEMA})


def run_canaries(
    job: JobConfig,
    site: SiteConfig,
    name: str,
    out: Path,
    *,
    kit: Path | None = None,
    on_round: Callable[[int], None] | None = None,
    machinery: Machinery = REAL,
) -> CanaryReport:
    """Train one site's share of a job with canaries, attack it, and judge.

    Args:
        job: the agreed job, noise multiplier worked out. A job that continues another is run from the start.
        site: the site's settings.
        name: the site's name in the ledger.
        out: folder for the ledger of a run on embedded scenes, where the policy names none.
        kit: the site's start-up kit, whose key signs the ledger; None where ledgers are unsigned.
        on_round: called with the number of each finished round.
        machinery: what trains, is tested, and is attacked.

    Raises:
        PrivacyRefused: the policy or the budget does not allow the run, or there is no ledger to charge.
        SelfTestFailed: the mechanism fails before anything is trained.
        ValueError: the job trains without differential privacy or diverges; data, weights or ledger cannot be used.
    """
    if not job.privacy.private or job.privacy.noise_multiplier is None:
        raise ValueError("the job trains without differential privacy: there is no claim that canaries could test")
    job, run_id = replace(job, resume=None), f"canaries-{secrets.token_hex(8)}"
    site = _with_ledger(site, name, out / run_id)
    if site.threads:
        torch.set_num_threads(site.threads)
    charged = ChargedTraining.open(job, site, name, run_id, kit, machinery=machinery)
    try:
        return _run(job, site, name, charged, on_round, machinery, run_id)
    finally:
        charged.end()


def _run(
    job: JobConfig,
    site: SiteConfig,
    name: str,
    charged: ChargedTraining,
    on_round: Callable[[int], None] | None,
    machinery: Machinery,
    run_id: str,
) -> CanaryReport:
    device = pick_device(site.device)
    backbone = load_backbone(job.backbone).to(device)
    model = build_model(backbone, job.classes, job.model, job.seed).to(device)
    charged.test_mechanism(model)
    train, units = _records(job, site)
    cache = open_cache(site)
    leaving = Leaving(name, site.privacy.units if site.privacy else 1, charged, model, job)
    mechanism, keystream = charged.mechanism, charged.keystream  # the key that the ledger's entries commit to
    charged.know_records(cache.features(train.pictures, backbone).digests())
    private = machinery.gradients(mechanism, model, job).private
    gradients, pictures = GradientCanaries(private, mechanism, keystream, machinery), None
    chosen = _units_to_mislabel(int(units.max()) + 1, keystream)
    mislabelled = np.isin(units, chosen)
    if len(chosen):
        part = train.take(np.flatnonzero(mislabelled))
        owner = np.searchsorted(chosen, units[mislabelled])
        features = cache.features(part.pictures, backbone)
        mislabelled_records = TrainingRecords(features, part.targets, owner)
        pictures = PictureCanaries(model, mislabelled_records, job, mechanism, keystream, machinery, site.micro_batch)
    others = train.take(np.flatnonzero(~mislabelled))
    own = np.unique(units[~mislabelled], return_inverse=True)[1].astype(np.int64)
    records = TrainingRecords(cache.features(others.pictures, backbone), others.targets, own)

    def plant(optimizer: PrivateOptimizer) -> None:
        if pictures:
            pictures(optimizer)
        gradients(optimizer)
        leaving.note(optimizer)

    state = model.vector()
    for number in range(1, job.training.rounds + 1):
        charged.reserve(number, 0)
        try:
            update = charged.train(model, records, state=state, round_number=number, plant=plant)
        except FloatingPointError as error:
            raise ValueError(str(error)) from None
        state = leaving.after(number, state, update.vector)
        if on_round:
            on_round(number)
    delta, steps = job.privacy.delta, gradients.scores.steps
    claim = epsilon([mechanism.steps(steps)], delta)
    attacks = {"gradient": bounds.attack(gradients.scores.likelihood, gradients.trained_on, delta, SIGNIFICANCE)}
    if pictures:
        attacks["picture"] = bounds.attack(pictures.scores, pictures.trained_on, delta, SIGNIFICANCE)
    moments = moments_of(gradients.scores, gradients.trained_on, mechanism, delta)
    return CanaryReport(
        job.name,
        run_id,
        name,
        job.privacy.unit,
        claim,
        delta,
        steps,
        str(ledger_path(site.privacy)) if site.privacy else "",
        attacks["gradient"],
        moments,
        attacks.get("picture"),
        in_order([*judge(name, claim, attacks, moments), *leaving.findings]),
    )


def moments_of(scores: CanaryScores, trained_on: np.ndarray, mechanism: Mechanism, delta: float) -> Moments:
    """Hold the moments of gradient canaries against the claimed mechanism.

    At sample rate 1 the scores are normal with one spread, and the mu-test says all; below it the spread of the
    canaries left out is the noise's, and the difference of the means how much of a unit gets through.
    """
    steps, claimed, rate = scores.steps, mechanism.noise_multiplier, mechanism.sample_rate
    inside, outside = scores.sums[trained_on], scores.sums[~trained_on]
    square = float(scores.squares[~trained_on].mean()) / steps

    def interval(significance: float) -> tuple[Interval, Interval]:
        if rate == 1:
            mu = bounds.mu_interval(inside, outside, significance)
            noise = Interval(*(steps**0.5 / (scores.std * m) if m else inf for m in (mu.high, mu.low)))
        else:
            noise = bounds.noise_interval(
                inside, outside, square, steps=steps, rate=rate, std=scores.std, significance=significance
            )
        spent = (_epsilon(rate, claimed * part, steps, delta) for part in (noise.high, noise.low))
        return noise, Interval(*spent)

    return Moments(
        *interval(SIGNIFICANCE),
        interval(FALSE_ALARM)[1].low,
        *bounds.steps_ratio(outside, square, steps, FALSE_ALARM),
    )


def judge(site: str, claim: float, attacks: Mapping[str, Attack], moments: Moments) -> list[Finding]:
    """What a person must know of a run, the worst first."""
    findings = []
    for kind, attack in attacks.items():
        text = (
            f"Empirical lower bound at 95 % confidence: this attack ({kind} canaries) shows epsilon >= "
            f"{attack.bound:.2f}. It is not a certificate; a small number proves nothing. The guarantee is the "
            f"accounted epsilon = {claim:.2f}. If the bound exceeds it, the implementation is wrong and the run must "
            "be treated as unprotected."
        )
        above = attack.bound > claim
        findings.append(Finding(f"{kind}-canaries", "fail" if above else "note", site, text, WRONG if above else ""))
    low, high = (f"{end:.2f}" if isfinite(end) else "infinity" for end in (moments.epsilon.low, moments.epsilon.high))
    noise = f"{moments.noise.low:.2f} to {moments.noise.high:.2f} times the claimed"
    text = (
        f"Mechanism-aware 95 % interval: noise {noise}, epsilon {low} to {high}; {claim:.2f} is claimed. It looks at "
        "noise, clipping and sampling alone."
    )
    if moments.least_epsilon > claim:
        findings.append(Finding("canary-interval", "fail", site, text, WRONG))
    elif moments.epsilon.low > claim:
        again = "one sound run in 40 looks like this: run again, and treat it as a failure if it is so again"
        findings.append(Finding("canary-interval", "warning", site, text, again))
    else:
        findings.append(Finding("canary-interval", "note", site, text))
    ratio, allowed = moments.steps_ratio, moments.steps_allowed
    if not allowed.low <= ratio <= allowed.high:
        text = (
            f"the noise of the steps is not independent: its variance over all steps is {ratio:.3g} times what it "
            f"should be, allowed is {allowed.low:.2f} to {allowed.high:.2f}"
        )
        findings.append(Finding("canary-noise-repeats", "fail", site, text, WRONG))
    return in_order(findings)


def _with_ledger(site: SiteConfig, name: str, folder: Path) -> SiteConfig:
    """The site, with a ledger of this run alone where it trains on the embedded scenes and its policy names none."""
    if site.privacy is None:
        raise PrivacyRefused("this site has no privacy policy (a [privacy] table in its site file)")
    if site.privacy.ledger:
        return site
    if site.data.source != "scenes":
        raise PrivacyRefused(
            f"privacy.ledger is empty and data.source='{site.data.source}': a canary run on pictures is charged like a "
            "job, so name the folder of the site's ledger and start one with `fedmpt ledger create`"
        )
    return with_ledger(site, name, folder)


def _records(job: JobConfig, site: SiteConfig) -> tuple[Dataset, np.ndarray]:
    splits = {split: load_split(job, site.data, split) for split in ("train", "val", "test")}
    known = {split: (d, [p.digest() for p in d.pictures]) for split, d in splits.items() if d is not None}
    if "train" not in known:
        raise ValueError("the site has no training pictures")
    train, digests = known.pop("train")
    require_apart(train, digests, known)
    return train, units_of(train, job.privacy.unit, [judged for judged, _ in known.values()])


def _units_to_mislabel(units: int, keystream: Keystream) -> np.ndarray:
    """Ascending numbers of units; none where a site has too few."""
    count = min(PICTURES, units // 2)
    return np.sort(public_generator(keystream).permutation(units)[: count if count >= FEWEST else 0])


def _epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    """Epsilon of a noise multiplier that was measured: 0 without influence, infinite where none can be computed."""
    if noise == inf:
        return 0.0
    try:
        return epsilon([Steps(rate, noise, steps)], delta) if noise > 0 else inf
    except AccountingError:
        return inf
