"""A private session: charged before it trains, noted before it answers, refused before any work is spent."""

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
from fedmpt_core.federation import preflight
from fedmpt_core.federation.site.session import SiteRecords, SiteSession
from fedmpt_core.privacy.ledger.budget import PrivacyRefused, held, history, resolved
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, read_site_ledger
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.self_test import SelfTestFailed
from tests.fakes import FakeBackbone, Table, training_records
from tests.settings import OPEN, UNMASKED

CLASSES = ("cat", "dog", "bus")
JOB = resolved(
    JobConfig(
        "s",
        CLASSES,
        model=ModelConfig(conditions=("color", "pose"), adapter_width=4, gate_width=4),
        training=TrainingConfig(rounds=3, local_steps=2, learning_rate=0.05),
        privacy=PrivacyConfig(epsilon=6.0, sample_rate=0.5, engine="exact"),
        secagg=UNMASKED,
        federation=FederationConfig(max_failed_rounds=1),
    )
)
WITHOUT_TOWERS = dataclasses.replace(
    JOB, backbone=BackboneConfig(kind="open_clip", architecture="no tower", weights="random:0")
)


def opened(job: JobConfig, site: SiteConfig, name: str, run_id: str = "local") -> SiteSession:
    return SiteSession(job, site, name, run_id=run_id, backbone=FakeBackbone())


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    """A site with twelve records of six patients, and an empty ledger."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(ManifestRow(f"{i}.png", (CLASSES[i % 3],), "train" if i < 9 else "test", f"patient-{i // 2}"))
    write_manifest(rows, tmp_path / "manifest.csv")
    policy = SitePrivacyConfig("pets", units=10, epsilon=8.0, delta=1e-5, ledger=str(tmp_path / "ledgers"))
    create_ledger(policy, "a", None)
    return SiteConfig(
        DataConfig(path=str(tmp_path / "manifest.csv")),
        privacy=policy,
        secagg=OPEN,
        cache_dir=str(tmp_path / "cache"),
        device="cpu",
    )


def changed(site: SiteConfig, **policy: Any) -> SiteConfig:
    assert site.privacy
    return dataclasses.replace(site, privacy=dataclasses.replace(site.privacy, **policy))


def ledger(site: SiteConfig) -> Any:
    assert site.privacy
    return read_site_ledger(site.privacy, None)


def test_rounds_are_charged_before_and_noted_after(site: SiteConfig) -> None:
    one = opened(JOB, site, "a", run_id="job-1")
    ready = one.prepare()
    assert [e.kind for e in ledger(site)] == ["genesis", "hold"]
    first, second = one.train(ready.initial, 1), one.train(ready.initial, 2)
    assert not np.array_equal(first.vector, second.vector)
    assert [e.kind for e in ledger(site)] == ["genesis", "hold", "reserve", "commit", "reserve", "commit"]
    assert ledger(site)[3].release == hashlib.sha256(first.block).hexdigest()
    assert second.privacy["head"] == {"seq": 5, "hash": ledger(site)[5].hash, "sig": ""}
    assert 0 < first.privacy["epsilon"] < second.privacy["epsilon"] < 6.0
    assert [h.steps.count for h in held(ledger(site))] == [4]  # 3 rounds and a failed attempt less two
    one.end()
    assert held(ledger(site)) == [] and ledger(site)[-1].kind == "free"
    details = ledger(site)[2].details
    assert details["steps"] == 2
    assert float(details["noise_multiplier"]) == JOB.privacy.noise_multiplier
    assert details["trained"] == list(ready.layout.names)
    assert details["released"] == ready.layout.size
    assert details["expected_batch_size"] == "5.0"
    assert details["config"] == JOB.digest()
    assert len(details["records"]) == 64


def test_the_true_number_of_records_is_in_no_number_that_leaves(site: SiteConfig) -> None:
    by_records = dataclasses.replace(JOB, federation=dataclasses.replace(JOB.federation, weighting="records"))
    one = opened(by_records, site, "a")
    one.prepare()
    assert one.weight() == 10.0


def test_a_round_beyond_the_plan_is_refused_and_trains_nothing(site: SiteConfig) -> None:
    one = opened(JOB, site, "a", run_id="job-1")
    state = one.prepare().initial
    for number in range(1, 5):
        one.train(state, number)
    before = one.model.vector()
    with pytest.raises(PrivacyRefused, match="round 5 would raise epsilon"):
        one.train(state, 5)
    assert np.array_equal(one.model.vector(), before)
    assert len(ledger(site)) == 10


def test_a_training_that_fails_stays_charged(site: SiteConfig) -> None:
    one = opened(JOB, site, "a")
    state = one.prepare().initial
    with pytest.raises(ValueError, match="NaN or infinity"):
        one.train(np.full_like(state, np.nan), 1)
    assert [e.kind for e in ledger(site)] == ["genesis", "hold", "reserve"]
    assert opened(JOB, site, "a") is not None


def test_a_cut_ledger_stops_the_site(site: SiteConfig) -> None:
    one = opened(JOB, site, "a", run_id="job-1")
    state = one.prepare().initial
    head = one.train(state, 1).privacy["head"]
    assert site.privacy
    path = ledger_path(site.privacy)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError):  # this process has seen more of the file
        one.train(state, 2)
    with pytest.raises(LedgerError, match="entry 3 was written"):  # nor does another begin, where the site remembers
        opened(JOB, site, "a", run_id="job-1")
    again = opened(JOB, dataclasses.replace(site, cache_dir=f"{site.cache_dir} that is new"), "a", run_id="job-1")
    again.prepare()
    with pytest.raises(PrivacyRefused, match="lacks entry 3 that it reported earlier"):
        again.train(state, 2, known_head=head)
    assert len(ledger(site)) == 3


def flipped(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"pets"', b'"pits"'), *lines[1:]]


def later(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"v":2', b'"v":3') for line in lines]


def without_a_line(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


@pytest.mark.parametrize("damage", [flipped, later, without_a_line])
def test_a_ledger_that_cannot_be_trusted_stops_the_site_and_stays_as_it_is(
    site: SiteConfig, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    one = opened(JOB, site, "a")
    one.train(one.prepare().initial, 1)
    assert site.privacy
    path = ledger_path(site.privacy)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"pets\.ledger\.jsonl"):
        SiteSession(WITHOUT_TOWERS, site, "a")
    assert path.read_bytes() == before


def test_a_full_disk_stops_the_round_before_it_trains(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened(JOB, site, "a")
    state = one.prepare().initial
    assert site.privacy
    before = ledger_path(site.privacy).read_bytes()

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerError, match="No space left"):
        one.train(state, 1)
    monkeypatch.undo()
    assert np.array_equal(one.model.vector(), state)
    assert ledger_path(site.privacy).read_bytes() == before


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"epsilon": 5.0}, r"would reach epsilon .* 0.000 is spent and the cap is 5"),
        ({"max_sample_rate": 0.1}, "sample_rate=0.5 is above"),
        ({"unit": "group"}, "this site protects each group"),
    ],
)
def test_refusals_come_before_any_tower_is_loaded(site: SiteConfig, policy: dict[str, Any], says: str) -> None:
    with pytest.raises(PrivacyRefused, match=says):
        SiteSession(WITHOUT_TOWERS, changed(site, **policy), "a")
    with pytest.raises(PrivacyRefused, match="no privacy policy"):
        SiteSession(WITHOUT_TOWERS, dataclasses.replace(site, privacy=None), "a")
    with pytest.raises(LedgerError):
        SiteSession(WITHOUT_TOWERS, site, "b")
    with pytest.raises(ValueError, match="architecture='no tower' is neither"):
        SiteSession(WITHOUT_TOWERS, site, "a")


def test_a_mechanism_that_fails_its_test_stops_the_site(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PrivateOptimizer.noise_stds
    monkeypatch.setattr(PrivateOptimizer, "noise_stds", lambda self: [std / 2 for std in real(self)])
    with pytest.raises(SelfTestFailed, match="noise variance"):
        opened(JOB, site, "a")
    assert [e.kind for e in ledger(site)] == ["genesis", "hold"]


def test_how_much_is_held_at_once_is_the_site_s_own_choice(site: SiteConfig) -> None:
    class Records(Table):
        def digests(self) -> list[str]:
            return [str(row) for row in range(len(self))]

    for rows in (2, 64):
        records = Records(torch.randn(9, 9, 16))
        own = dataclasses.replace(site, micro_batch=rows)
        one = opened(JOB, own, "a", run_id=f"run-{rows}")
        targets = np.eye(3, dtype=np.uint8)[np.arange(9) % 3]
        one.train(one.prepare(data=SiteRecords(training_records(records, targets))).initial, 1)
        one.end()
        assert 0 < records.largest <= rows
    assert JOB.digest() == ledger(site)[2].details["config"]  # a job knows nothing of it


def test_patients_are_the_unit_when_job_and_site_say_so(site: SiteConfig, tmp_path: Path) -> None:
    by_group = dataclasses.replace(JOB, privacy=dataclasses.replace(JOB.privacy, unit="group"))
    patients = changed(site, unit="group", ledger=str(tmp_path / "by-patient"))
    assert patients.privacy
    create_ledger(patients.privacy, "a", None)
    one = opened(by_group, patients, "a")
    state = one.prepare().initial
    one.train(state, 1)
    assert ledger(patients)[2].details["unit"] == "group"
    # patient-4 has a record in training and one in test, whose figures are not private
    judging = dataclasses.replace(patients, data=dataclasses.replace(patients.data, evaluate=True))
    with pytest.raises(ValueError, match=r"1 groups are in training and in val or test, the first is 'patient 4'"):
        opened(by_group, judging, "a").prepare()
    with pytest.raises(ValueError, match="patient 4"):
        preflight.check_data(by_group, {"a": judging})


def relisted(site: SiteConfig, folder: Path, rows: list[ManifestRow]) -> SiteConfig:
    write_manifest(rows, folder / "manifest.csv")
    return dataclasses.replace(site, data=dataclasses.replace(site.data, evaluate=True))


@pytest.mark.parametrize("unit", ["record", "group"])
def test_a_picture_that_is_trained_on_is_not_judged_under_another_name(
    site: SiteConfig, tmp_path: Path, unit: str
) -> None:
    (tmp_path / "copy of 3.png").write_bytes((tmp_path / "3.png").read_bytes())
    rows = [ManifestRow(f"{i}.png", ("cat",), "train" if i < 9 else "val", f"p{i}") for i in range(12)]
    judging = relisted(site, tmp_path, [*rows, ManifestRow("copy of 3.png", ("cat",), "test", "someone else")])
    if unit == "group":
        judging = changed(judging, unit=unit, ledger=str(tmp_path / "grouped"))
        assert judging.privacy
        create_ledger(judging.privacy, "a", None)
    job = dataclasses.replace(JOB, privacy=dataclasses.replace(JOB.privacy, unit=unit))
    says = r"1 pictures are in training and.*/3\.png \(train\) is .*/copy of 3\.png \(test\); take them out"
    with pytest.raises(ValueError, match=says):
        opened(job, judging, "a").prepare()
    with pytest.raises(ValueError, match=says):
        preflight.check_data(job, {"a": judging})
    assert [e.kind for e in ledger(judging)] == ["genesis", "hold"]
    opened(job, relisted(judging, tmp_path, rows), "a").prepare()


@pytest.mark.parametrize(
    "spelt", ["PATIENT-1", "patient-1\u200b", "pat\u00adient-1", "\u2060 patient-1", "Patient-1\u2800"]
)
def test_a_patient_is_one_however_the_name_is_written(site: SiteConfig, tmp_path: Path, spelt: str) -> None:
    rows = [ManifestRow(f"{i}.png", ("cat",), "train", f"patient-{i}") for i in range(9)]
    judging = changed(relisted(site, tmp_path, [*rows, ManifestRow("9.png", ("cat",), "test", spelt)]), unit="group")
    job = dataclasses.replace(JOB, privacy=dataclasses.replace(JOB.privacy, unit="group"))
    with pytest.raises(ValueError, match="1 groups are in training and in val or test, the first is 'patient 1'"):
        preflight.check_data(job, {"a": judging})


def test_the_same_pictures_get_no_fresh_budget_under_another_name(site: SiteConfig, tmp_path: Path) -> None:
    one = opened(JOB, site, "a")
    one.train(one.prepare().initial, 1)
    renamed = changed(site, dataset="kittens")
    assert renamed.privacy
    create_ledger(renamed.privacy, "a", None)
    rows = [ManifestRow(f"{i}.png", ("cat",), "train") for i in (8, 9, 10)]  # 9 and 10 were for tests
    with pytest.raises(LedgerError, match="1 of 3 training records of 'kittens' were trained on as 'pets': a new name"):
        opened(JOB, relisted(renamed, tmp_path, rows), "a").prepare()
    assert [e.kind for e in ledger(renamed)] == ["genesis", "hold"]
    grown = opened(JOB, relisted(site, tmp_path, [ManifestRow(f"{i}.png", ("cat",), "train") for i in range(12)]), "a")
    grown.train(grown.prepare().initial, 1)  # under the old name
    others = opened(JOB, relisted(renamed, tmp_path, fresh(tmp_path)), "a")
    others.train(others.prepare().initial, 1)
    assert len(ledger(renamed)) == 4


def fresh(folder: Path) -> list[ManifestRow]:
    Image.new("RGB", (12, 12), "red").save(folder / "fresh.png")
    return [ManifestRow("fresh.png", ("cat",), "train")]


def test_a_name_that_was_only_looked_at_holds_no_record(site: SiteConfig) -> None:
    opened(JOB, site, "a").prepare()
    renamed = changed(site, dataset="kittens")
    assert renamed.privacy
    create_ledger(renamed.privacy, "a", None)
    one = opened(JOB, renamed, "a")
    one.train(one.prepare().initial, 1)


def test_two_jobs_entries_do_not_tell_whether_their_records_are_the_same(site: SiteConfig) -> None:
    for run in ("job-1", "job-2"):
        one = opened(JOB, site, "a", run_id=run)
        state = one.prepare().initial
        one.train(state, 1)
        one.train(state, 2)
        one.end()
    marks = [(e.job, e.details["records"]) for e in ledger(site) if e.kind == "reserve"]
    assert len(set(marks)) == len({mark for _, mark in marks}) == 2


@pytest.mark.parametrize("keeps", ["the site", "the server"])
def test_a_ledger_restored_between_jobs_is_noticed(site: SiteConfig, keeps: str) -> None:
    assert site.privacy
    path = ledger_path(site.privacy)
    backup = path.read_bytes()
    one = opened(JOB, site, "a", run_id="job-1")
    head = one.train(one.prepare().initial, 1).privacy["head"]
    whole = path.read_bytes()
    path.write_bytes(backup)
    if keeps == "the site":
        with pytest.raises(LedgerError, match=r"entry 3 was written .* `fedmpt ledger show"):
            opened(JOB, site, "a", run_id="job-2")
        assert path.read_bytes() == backup
    else:
        site = dataclasses.replace(site, cache_dir=f"{site.cache_dir} that is new")
        later = opened(JOB, site, "a", run_id="job-2")
        state = later.prepare().initial
        with pytest.raises(PrivacyRefused, match="lacks entry 3 that it reported earlier"):
            later.train(state, 1, known_head=head)
        assert history(ledger(site)) == []
    path.write_bytes(whole)
    one.end()
    again = opened(JOB, site, "a", run_id="job-2")
    again.train(again.prepare().initial, 1, known_head=head)


def test_a_head_of_the_site_s_other_ledger_is_one_that_it_holds(site: SiteConfig, tmp_path: Path) -> None:
    one = opened(JOB, site, "a", run_id="job-1")
    head = one.train(one.prepare().initial, 1).privacy["head"]
    other = relisted(changed(site, dataset="kittens"), tmp_path, fresh(tmp_path))
    assert other.privacy
    create_ledger(other.privacy, "a", None)
    later = opened(JOB, other, "a", run_id="job-2")
    later.train(later.prepare().initial, 1, known_head=head)


def test_the_plan_is_shown_for_every_site(site: SiteConfig) -> None:
    plan = preflight.check_privacy(JOB, {"a": site, "b": site}, preflight.check_model(JOB, FakeBackbone()))
    assert plan
    assert plan.steps == 8
    assert plan.epsilons.pld == pytest.approx(6.0, abs=0.01)
    assert plan.epsilons.replace_one > plan.epsilons.pld
    ratios = plan.sites["b"].signal_to_noise
    noise = JOB.privacy.noise_multiplier or 0
    assert ratios["contexts"] == pytest.approx(5 / (noise * np.sqrt(2 * 4 * 12 + 4 * 12)))
    assert ratios["contexts"] > ratios["contexts+gate"] > ratios["all"]
    fast = dataclasses.replace(JOB, privacy=dataclasses.replace(JOB.privacy, engine="feature_space"))
    other = preflight.check_privacy(fast, {"a": site}, preflight.check_model(fast, FakeBackbone()))
    assert other
    assert other.sites["a"].signal_to_noise["contexts"] == pytest.approx(5 / (noise * np.sqrt(2 * 3 * 16)))
    with pytest.raises(PrivacyRefused, match=r"b: .*the cap is 1"):
        preflight.check_privacy(
            JOB, {"a": site, "b": changed(site, epsilon=1.0)}, preflight.check_model(JOB, FakeBackbone())
        )
