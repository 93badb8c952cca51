"""Canary runs: sound mechanisms stay below their claim, broken ones are told, and every run is charged."""

import dataclasses
import json
import stat
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from fedmpt_core.audit.canaries import run as canaries
from fedmpt_core.audit.canaries.bounds import Attack, Interval
from fedmpt_core.audit.canaries.planting import GradientCanaries, PictureCanaries
from fedmpt_core.audit.canaries.run import CanaryReport, Moments, judge, run_canaries
from fedmpt_core.config.job import (
    BackboneConfig,
    FederationConfig,
    JobConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
)
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.data.manifest_rows import ManifestRow, write_manifest
from fedmpt_core.data.pictures import UNKNOWN
from fedmpt_core.data.scenes import SceneConfig, scenes
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy import charged_training as site_budget
from fedmpt_core.privacy.ledger.budget import PrivacyRefused, resolved
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, read_site_ledger
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.sampling import poisson_batches
from fedmpt_core.privacy.mechanism.self_test import SelfTestFailed
from fedmpt_core.training.local import LocalUpdate, TrainingRecords
from fedmpt_flare.cli.main import app
from tests.fakes import FakeBackbone, Table, training_records
from tests.settings import UNMASKED

CLASSES = ("cat", "dog", "bus")
RECORDS = 48
KEY = bytes(range(32))
GROUPS = {"contexts": 0.5, "adapters": 0.3, "gate": 0.2, "head": 0.1}


def job_of(**privacy: Any) -> JobConfig:
    return resolved(
        JobConfig(
            "probe",
            CLASSES,
            model=ModelConfig(conditions=("color", "pose"), adapter_width=10, gate_width=4),
            training=TrainingConfig(rounds=4, local_steps=5, learning_rate=0.05),
            privacy=PrivacyConfig(**{"epsilon": 6.0, "sample_rate": 0.4, "max_grad_norm": 0.5, **privacy}),
            secagg=UNMASKED,
            federation=FederationConfig(max_failed_rounds=0),
        )
    )


JOB = job_of()


@pytest.fixture(autouse=True)
def _fake_towers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(config: BackboneConfig) -> FakeBackbone:
        return FakeBackbone()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(canaries, "load_backbone", load)
    yield
    torch.set_num_threads(threads)


def one_key() -> Keystream:
    """The same noise and coins in every run."""
    return Keystream(KEY)


SEEDED = Machinery(keystream=one_key)


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test would stop a broken mechanism before canaries see it, and takes a second of the sound one."""
    monkeypatch.setattr(site_budget, "require_self_test", lambda *_: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("pictures"), RECORDS)


def drawn(folder: Path, records: int) -> Path:
    """Random pictures, two of each patient."""
    folder.mkdir(exist_ok=True)
    rows, rng = [], np.random.default_rng(0)
    for i in range(records):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(ManifestRow(f"{i}.png", (CLASSES[i % 3],), "train", f"patient-{i // 2}"))
    write_manifest(rows, folder / "manifest.csv")
    return folder


def site_of(pictures: Path, ledgers: Path | None, **policy: Any) -> SiteConfig:
    chosen = {"units": 50, "epsilon": 1000.0, "delta": 1e-5, "ledger": str(ledgers) if ledgers else "", **policy}
    site = SiteConfig(
        DataConfig(path=str(pictures / "manifest.csv")),
        privacy=SitePrivacyConfig("pets", **chosen),
        cache_dir=str(pictures / "cache"),
        device="cpu",
    )
    if ledgers:
        assert site.privacy
        create_ledger(site.privacy, "a", None)
    return site


@pytest.fixture
def run(pictures: Path, tmp_path: Path, untested: None) -> Callable[..., CanaryReport]:
    def report(job: JobConfig = JOB, machinery: Machinery = SEEDED, **policy: Any) -> CanaryReport:
        site = site_of(pictures, tmp_path / "ledgers", **policy)
        return run_canaries(job, site, "a", tmp_path / "out", machinery=machinery)

    return report


def failed(report: CanaryReport) -> set[str]:
    return {f.code for f in report.findings if f.severity == "fail"}


SOUND = [
    {},
    {"engine": "exact", "sample_rate": 0.15},
    {"group_norms": GROUPS},
    {"sample_rate": 1.0},
    {"sample_rate": 1.0, "group_norms": GROUPS, "engine": "exact"},
]


@pytest.mark.parametrize("privacy", SOUND, ids=str)
def test_a_sound_mechanism_stays_below_its_claim(run: Callable[..., CanaryReport], privacy: dict[str, Any]) -> None:
    report = run(job_of(**privacy))
    assert report.passed
    assert report.claim == pytest.approx(6.0, abs=0.01)
    assert report.steps == 20
    assert report.pictures is not None
    assert max(report.gradients.bound, report.pictures.bound) < report.claim
    assert report.moments.epsilon.low < report.claim < 1.1 * report.moments.epsilon.high
    assert report.moments.noise.low < 1 < 1.1 * report.moments.noise.high
    # the attack is a real one: it tells canaries apart, and shows some epsilon
    assert report.gradients.auroc_confidence.low > 0.57
    assert report.gradients.bound > 0.4
    assert report.pictures.auroc > 0.5
    assert {f.severity for f in report.findings} == {"note"}


class HalfNoise(PrivateOptimizer):
    def noise_stds(self) -> list[float]:
        return [std / 2 for std in super().noise_stds()]


class NoNoise(PrivateOptimizer):
    def noise_stds(self) -> list[float]:
        return [0.0 for _ in super().noise_stds()]


class Unclipped(PrivateOptimizer):
    def clip_and_accumulate(self) -> None:
        for p in dict[str, Any](self.private).values():
            total = p.grad_sample.double().sum(0)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


class SameNoiseEveryStep(PrivateOptimizer):
    def add_noise(self) -> None:
        self._keystream = Keystream(KEY)
        super().add_noise()


@pytest.mark.parametrize("privacy", [SOUND[0], SOUND[3]], ids=str)
def test_with_half_the_noise_the_interval_exceeds_the_claim(
    run: Callable[..., CanaryReport], privacy: dict[str, Any]
) -> None:
    report = run(job_of(**privacy), machinery=Machinery(optimizer=HalfNoise, keystream=one_key))
    assert not report.passed
    assert "canary-interval" in failed(report)
    assert report.moments.least_epsilon > report.claim
    assert report.moments.noise.low < 0.5 < report.moments.noise.high
    finding = report.findings[0]
    assert finding.severity == "fail"
    assert "treat the run, and every run of this release, as unprotected" in finding.remedy


@pytest.mark.parametrize(
    ("optimizer", "codes"),
    [
        (NoNoise, {"canary-interval", "gradient-canaries", "canary-update-differs"}),
        (Unclipped, {"canary-interval", "gradient-canaries"}),
        (SameNoiseEveryStep, {"canary-noise-repeats", "canary-update-differs"}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_broken_optimizers_fail(
    run: Callable[..., CanaryReport], optimizer: type[PrivateOptimizer], codes: set[str]
) -> None:
    report = run(machinery=Machinery(optimizer=optimizer, keystream=one_key))
    # without any noise its repetition is that of rounding, which may look like either
    assert failed(report) - ({"canary-noise-repeats"} if optimizer is NoNoise else set()) == codes
    json.dumps(report.to_dict(), allow_nan=False)  # no noise is an infinite epsilon, which JSON has not


class PullsBackTheSum(GradientEngine):
    """The contexts get the sum from before the noise, and the released gradient of the text features is sound."""

    def pull_back(self) -> None:
        text: Any = self.private["text"]
        kept, text.grad = text.grad, (text.summed_grad / 20.0).to(text.dtype)
        super().pull_back()
        text.grad = kept


def test_an_update_that_is_not_what_the_attacked_releases_give_fails(
    run: Callable[..., CanaryReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, noise and sampling are sound in each of them, so that no score of a canary could tell."""
    broken = run(machinery=Machinery(engine=PullsBackTheSum, keystream=one_key))
    assert failed(broken) == {"canary-update-differs"}
    assert "the update of round 1 is not what its sums" in broken.findings[0].text


def label_count(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    update = private_update(model, records, **options)
    update.vector[0] += 1e-3 * (records.targets[:, 0] == 1).sum()
    return update


def true_count(model: Any, records: TrainingRecords, **options: Any) -> LocalUpdate:
    return private_update(model, records, **{**options, "declared_units": len(np.unique(records.units))})


@pytest.mark.parametrize("leak", [label_count, true_count], ids=lambda f: f.__name__)
def test_what_is_added_to_the_update_and_another_divisor_fail(
    run: Callable[..., CanaryReport], monkeypatch: pytest.MonkeyPatch, leak: Any
) -> None:
    monkeypatch.setattr(site_budget, "private_update", leak)
    assert failed(run()) == {"canary-update-differs"}


def test_a_unit_that_takes_part_more_often_than_claimed_fails(run: Callable[..., CanaryReport]) -> None:
    def always(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
        return iter([np.arange(units)] * steps)

    assert "canary-interval" in failed(run(machinery=Machinery(batches=always, keystream=one_key)))


class Silent(Keystream):
    """Real sampling and coins, no noise."""

    def normals(self, purpose: str, count: int) -> np.ndarray:
        return np.zeros(count)


def features(records: int) -> torch.Tensor:
    return torch.randn(records, 9, 16, generator=torch.Generator().manual_seed(0))


def trained(
    job: JobConfig, keystream: Keystream, plant: Callable[[FedMPT], Any] | None, rounds: int = 2
) -> tuple[np.ndarray, Any]:
    """The state after some rounds on twelve records, and what was planted."""
    model = FedMPT(FakeBackbone(), CLASSES, job.model.conditions, job.model, 0)
    planted, state = plant(model) if plant else None, model.vector()
    targets = (np.random.default_rng(0).random((12, 3)) < 0.4).astype(np.uint8)
    for number in range(1, rounds + 1):
        found = private_update(
            model,
            training_records(Table(features(12)), targets),
            state=state,
            round_number=number,
            job=job,
            mechanism=Mechanism.of(job),
            declared_units=12,
            keystream=keystream,
            plant=planted,
        )
        state = state + found.vector
    return state, planted


def gradients_in(
    job: JobConfig, keystream: Keystream, machinery: Machinery = REAL
) -> Callable[[FedMPT], GradientCanaries]:
    mechanism = Mechanism.of(job)
    return lambda model: GradientCanaries(
        machinery.gradients(mechanism, model, job).private, mechanism, keystream, machinery
    )


@pytest.mark.parametrize("privacy", SOUND, ids=str)
def test_without_noise_a_score_is_the_number_of_steps_with_the_canary(privacy: dict[str, Any]) -> None:
    taken: list[np.ndarray] = []

    def noted(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
        for batch in poisson_batches(units, rate, steps, keystream):
            taken.append(batch)
            yield batch

    job, keystream = job_of(**privacy), Silent(KEY)
    _, planted = trained(job, keystream, gradients_in(job, keystream, Machinery(batches=noted)))
    inside = np.flatnonzero(planted.trained_on)
    expected = np.zeros(len(planted.trained_on))
    expected[inside] = np.bincount(np.concatenate(taken), minlength=len(inside))
    assert planted.scores.steps == len(taken) == 10
    assert 300 < len(inside) < 700 or privacy  # about half
    # float32 releases over a divisor, and a grid of 2^-20
    assert np.abs(planted.scores.sums - expected).max() < 1e-3
    assert expected[inside].mean() == pytest.approx(10 * job.privacy.sample_rate, rel=0.1)
    likelihood = planted.scores.likelihood
    assert np.corrcoef(likelihood, expected)[0, 1] > 0.99


def test_a_score_s_noise_is_what_the_mechanism_claims() -> None:
    for privacy in SOUND:
        job, keystream = job_of(**privacy), Keystream(KEY)
        scores = trained(job, keystream, gradients_in(job, keystream))[1].scores
        _, planted = trained(job, keystream, gradients_in(job, keystream))
        outside = planted.scores.squares[~planted.trained_on].mean() / planted.scores.steps
        assert outside / planted.scores.std**2 == pytest.approx(1, abs=0.1)
        if "group_norms" not in privacy:
            assert scores.std == pytest.approx(job.privacy.noise_multiplier, rel=1e-3)


class OutOnly(Keystream):
    """All coins say that a canary is left out; sampling and noise are as ever."""

    def words(self, purpose: str, count: int) -> np.ndarray:
        return super().words(purpose, count) >> np.uint64(purpose == "canaries")


def test_canaries_that_stay_out_change_not_a_bit() -> None:
    plain, _ = trained(JOB, Keystream(KEY), None)
    without, planted = trained(JOB, OutOnly(KEY), gradients_in(JOB, OutOnly(KEY)))
    assert not planted.trained_on.any()
    assert np.array_equal(plain, without)
    assert not np.array_equal(plain, trained(JOB, Keystream(KEY), gradients_in(JOB, Keystream(KEY)))[0])


def test_too_few_released_numbers_are_a_sentence() -> None:
    small = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match="7 released numbers are too few for canaries"):
        GradientCanaries({"head.bias": small}, Mechanism.of(JOB), Keystream(KEY))


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
def test_without_noise_picture_canaries_are_all_found(engine: str) -> None:
    privacy = dataclasses.replace(JOB.privacy, engine=engine, noise_multiplier=0.01)  # type: ignore[arg-type]
    job, keystream = dataclasses.replace(JOB, privacy=privacy), Silent(KEY)
    units = np.repeat(np.arange(20), 2)  # patients with two pictures each
    right = np.tile([1, 0, 0], (40, 1)).astype(np.uint8)
    right[::2, 1] = UNKNOWN

    given: list[torch.Tensor] = []

    class Noted(GradientEngine):
        def fill(self, parts: Any, count: int) -> None:
            kept = list(parts)
            given.extend(targets for _, targets, _ in kept)
            super().fill(kept, count)

    def plant(model: FedMPT) -> PictureCanaries:
        chosen = training_records(Table(features(40)), right, units)
        return PictureCanaries(model, chosen, job, Mechanism.of(job), keystream, Machinery(engine=Noted))

    planted: PictureCanaries = trained(job, keystream, plant, rounds=4)[1]
    assert 4 < planted.trained_on.sum() < 16
    assert planted.scores[planted.trained_on].min() > planted.scores[~planted.trained_on].max()
    labels = torch.cat(given)[: len(right)].numpy()
    assert (labels != right).any(1).all()  # every record's labels are wrong
    assert (labels[::2, 1] == UNKNOWN).all()  # and nobody makes up what nobody knows
    assert np.isin(labels[1::2], [0, 1]).all()


def test_units_are_mislabelled_as_a_whole_and_train_as_nothing_else(tmp_path: Path, untested: None) -> None:
    seen: dict[int, dict[bytes, int]] = {}  # by engine: the unit of each record that it was given

    class Noted(GradientEngine):
        def fill(self, parts: Any, count: int) -> None:
            kept = list(parts)
            for patches, _, units in kept:
                mine = seen.setdefault(id(self), {})
                mine |= {p.numpy().tobytes(): int(u) for p, u in zip(patches[: len(units)], units, strict=True)}
            super().fill(kept, count)

    pictures = drawn(tmp_path / "pictures", 80)
    (tmp_path / "ledgers").mkdir()
    site = site_of(pictures, tmp_path / "ledgers", unit="group")
    engines: list[GradientEngine] = []

    def made(*args: Any, **rest: Any) -> GradientEngine:
        engines.append(Noted(*args, **rest))
        return engines[-1]

    job = job_of(unit="group", sample_rate=1.0)
    report = run_canaries(job, site, "a", tmp_path, machinery=Machinery(engine=made))  # type: ignore[arg-type]
    assert report.pictures
    assert report.pictures.canaries == 20  # half of 40 patients
    # the self-test asks engines too, for records of its own
    canaries, *rounds = [seen[id(e)] for e in engines if len(seen.get(id(e), ())) == 40]
    assert len(rounds) == 4
    for others in rounds:
        assert others == rounds[0]
    for units in (canaries, rounds[0]):
        assert np.bincount(list(units.values())).tolist() == [2] * 20
    assert not set(canaries) & set(rounds[0])
    assert len(canaries) + len(rounds[0]) == 80
    assert entries(site)[2].details["expected_batch_size"] == "50.0"  # the declared number
    assert report.unit == "group"


def test_a_site_with_few_units_has_no_picture_canaries(pictures: Path, tmp_path: Path, untested: None) -> None:
    site = site_of(pictures, tmp_path / "ledgers", unit="group")
    report = run_canaries(job_of(unit="group"), site, "a", tmp_path)
    assert report.pictures is None
    assert report.passed
    assert not any("picture" in f.code for f in report.findings)


def entries(site: SiteConfig) -> Any:
    assert site.privacy
    return read_site_ledger(site.privacy, None)


def test_every_round_is_charged_before_it_trains_and_nothing_is_released(pictures: Path, tmp_path: Path) -> None:
    """With the self-test, as a site would run it."""
    site, rounds, charged = site_of(pictures, tmp_path / "ledgers"), [], []
    keys = iter([Keystream(KEY)])

    def noted(units: int, rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
        if (now := [e.round for e in entries(site) if e.kind == "reserve"]) and now not in charged:
            charged.append(now)
        return poisson_batches(units, rate, steps, keystream)

    machinery = Machinery(batches=noted, keystream=lambda: next(keys, None) or Keystream())
    report = run_canaries(JOB, site, "a", tmp_path / "out", on_round=rounds.append, machinery=machinery)
    assert charged == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert rounds == [1, 2, 3, 4]
    assert [e.kind for e in entries(site)] == ["genesis", "hold", *["reserve"] * 4, "free"]
    assert {e.job for e in entries(site)[1:]} == {report.run_id}
    assert report.run_id.startswith("canaries-")
    details = entries(site)[2].details
    assert details["steps"] == 5
    assert details["rng_key_id"] == Keystream(KEY).key_id  # the key that made the noise
    assert report.ledger == str(tmp_path / "ledgers" / "pets.ledger.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_is_refused_before_anything_is_trained(
    pictures: Path, tmp_path: Path, untested: None
) -> None:
    site = site_of(pictures, tmp_path / "ledgers", epsilon=7.0)
    run_canaries(JOB, site, "a", tmp_path)
    with pytest.raises(PrivacyRefused, match="would reach epsilon"):
        run_canaries(JOB, site, "a", tmp_path, machinery=Machinery(batches=None))  # type: ignore[arg-type]
    assert [e.kind for e in entries(site)] == ["genesis", "hold", *["reserve"] * 4, "free"]


def test_pictures_without_a_ledger_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivacyRefused, match=r"privacy\.ledger is empty and data\.source='manifest'"):
        run_canaries(JOB, site_of(pictures, None), "a", tmp_path)
    bare = dataclasses.replace(site_of(pictures, None), privacy=None)
    with pytest.raises(PrivacyRefused, match="no privacy policy"):
        run_canaries(JOB, bare, "a", tmp_path)


def test_there_must_be_a_claim(pictures: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(JOB, privacy=PrivacyConfig(mechanism="none"))
    with pytest.raises(ValueError, match="no claim that canaries could test"):
        run_canaries(plain, site_of(pictures, tmp_path / "ledgers"), "a", tmp_path)


def test_a_mechanism_that_fails_its_self_test_trains_and_charges_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PrivateOptimizer.noise_stds
    monkeypatch.setattr(PrivateOptimizer, "noise_stds", lambda self: [std / 2 for std in real(self)])
    site = site_of(pictures, tmp_path / "ledgers")
    with pytest.raises(SelfTestFailed, match="noise variance"):
        run_canaries(JOB, site, "a", tmp_path)
    assert [e.kind for e in entries(site)] == ["genesis", "hold", "free"]


def test_divergence_is_a_sentence(pictures: Path, tmp_path: Path, untested: None) -> None:
    job = job_of()
    object.__setattr__(job.training, "learning_rate", 1e38)
    object.__setattr__(job.privacy, "max_grad_norm", 1000.0)
    with pytest.raises(ValueError, match="lower learning_rate"):
        run_canaries(job, site_of(pictures, tmp_path / "ledgers"), "a", tmp_path)


def attack_showing(epsilon: float) -> Attack:
    return Attack(1000, 500, 0.1, 0.2, epsilon, 0.7, Interval(0.6, 0.8), ())


def moments_with(low: float, least: float, ratio: float = 1.0) -> Moments:
    return Moments(Interval(0.9, 1.1), Interval(low, inf), least, ratio, Interval(0.8, 1.2))


def test_the_verdict_says_what_was_shown_and_what_was_not() -> None:
    found = judge("a", 8.0, {"gradient": attack_showing(3.456)}, moments_with(7.0, 6.0))
    assert [f.severity for f in found] == ["note", "note"]
    assert found[1].text == (
        "Empirical lower bound at 95 % confidence: this attack (gradient canaries) shows epsilon >= 3.46. It is not a "
        "certificate; a small number proves nothing. The guarantee is the accounted epsilon = 8.00. If the bound "
        "exceeds it, the implementation is wrong and the run must be treated as unprotected."
    )
    assert "epsilon 7.00 to infinity; 8.00 is claimed" in found[0].text
    assert not any(f.remedy for f in found)
    above = judge("a", 8.0, {"picture": attack_showing(8.01)}, moments_with(7.0, 6.0))
    assert (above[0].code, above[0].severity) == ("picture-canaries", "fail")
    # a sound mechanism's interval is above its claim in one run of 40
    chance = judge("a", 8.0, {}, moments_with(8.1, 7.5))
    assert [(f.code, f.severity) for f in chance] == [("canary-interval", "warning")]
    assert "run again" in chance[0].remedy
    assert [f.severity for f in judge("a", 8.0, {}, moments_with(8.5, 8.1))] == ["fail"]
    repeated = judge("a", 8.0, {}, moments_with(7.0, 6.0, ratio=40.0))
    assert (repeated[0].code, repeated[0].severity) == ("canary-noise-repeats", "fail")


@pytest.fixture
def files(pictures: Path, tmp_path: Path) -> Path:
    """A job and the sites of a simulation, in files, each with a ledger."""
    site = site_of(pictures, tmp_path / "ledgers")
    assert site.privacy
    plain = dataclasses.asdict(JOB)
    plain = {k: v for k, v in plain.items() if v is not None}
    for section in ("model", "training"):
        plain[section] = {k: v for k, v in plain[section].items() if v is not None}
    plain["secagg"] = {"mechanism": "none"}
    plain["federation"] = {"max_failed_rounds": 0}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(plain))
    policy = {"dataset": "pets", "units": 50, "epsilon": 1000.0, "delta": 1e-5, "ledger": site.privacy.ledger}
    data = {"path": site.data.path}
    one = {"data": data, "privacy": policy, "cache_dir": site.cache_dir, "device": "cpu"}
    (tmp_path / "site.toml").write_text(tomli_w.dumps({"sites": {"a": one, "b": one}}))
    (tmp_path / "own.toml").write_text(tomli_w.dumps(one))
    return tmp_path


def command(files: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["canaries", str(files / "job.toml"), *map(str, options)])


def test_the_command_shows_and_writes_what_was_found(files: Path, untested: None) -> None:
    done = command(files, "--out", files / "out")
    assert done.exit_code == 0, done.output
    shown = done.stdout
    assert "site a: 4 rounds, charged like a job" in shown
    assert "round 4 of 4" in shown
    assert "not a" in shown
    assert "they stay at this site" in shown
    result = files / "out" / "canaries.json"
    assert stat.S_IMODE(result.stat().st_mode) == 0o600
    written = json.loads(result.read_text())
    assert written["passed"] is True
    assert written["gradients"]["canaries"] > 500
    assert {f["code"] for f in written["findings"]} == {"canary-interval", "gradient-canaries", "picture-canaries"}


def test_the_command_speaks_json_and_says_no(files: Path, untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PrivateOptimizer.noise_stds
    monkeypatch.setattr(PrivateOptimizer, "noise_stds", lambda self: [std / 2 for std in real(self)])
    done = command(files, "--sites", files / "own.toml", "--site", "a", "--out", files / "out", "--json")
    assert done.exit_code == 1
    printed = done.stdout
    assert json.loads(printed) == json.loads((files / "out" / "canaries.json").read_text())
    assert json.loads(printed)["findings"][0]["severity"] == "fail"


def test_the_command_s_bad_input_is_a_sentence(files: Path) -> None:
    for option, value, sentence in (
        ("--sites", files / "own.toml", "which with --site NAME"),
        ("--site", "c", "no table [sites.c]"),
        ("--sites", files / "none.toml", "no such file"),
        ("--out", files / "job.toml", "cannot be written to"),
    ):
        done = command(files, option, value)
        assert isinstance(done.exception, ValueError)
        assert sentence in str(done.exception)


def test_embedded_scenes_get_a_ledger_of_their_own(tmp_path: Path, untested: None) -> None:
    classes = scenes(SceneConfig(seed=0), site=0, sites=1, split="train", count=1).classes
    job = dataclasses.replace(JOB, classes=classes)
    policy = SitePrivacyConfig("scenes", units=50, epsilon=8.0, delta=1e-5)
    site = SiteConfig(DataConfig("scenes", train=44), policy, cache_dir=str(tmp_path / "cache"), device="cpu")
    report = run_canaries(job, site, "a", tmp_path / "out")
    again = run_canaries(job, site, "a", tmp_path / "out")
    assert report.passed
    assert report.ledger != again.ledger
    assert Path(report.ledger).is_relative_to(tmp_path / "out" / report.run_id)
    assert Path(report.ledger).read_text().count('"kind":"reserve"') == 4
