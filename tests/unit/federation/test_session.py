"""A site's session and the evaluation: thresholds from val, zero-shot at the start, refusals before any work."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.config.job import FederationConfig, JobConfig, ModelConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.data.manifest_rows import ManifestRow, write_manifest
from fedmpt_core.federation import preflight
from fedmpt_core.federation.site.session import SiteSession
from fedmpt_core.model.device import pick_device
from tests.fakes import FakeBackbone
from tests.settings import OPEN, POLICY, UNMASKED, UNPROTECTED

CLASSES = ("cat", "dog", "bus")
JOB = JobConfig(
    "s",
    CLASSES,
    model=ModelConfig(conditions=("color", "pose")),
    training=TrainingConfig(rounds=2, local_steps=3, batch_size=4, learning_rate=0.05),
    privacy=UNPROTECTED,
    secagg=UNMASKED,
)


def opened(job: JobConfig, site: SiteConfig, name: str) -> SiteSession:
    return SiteSession(job, site, name, backbone=FakeBackbone())


def pictures(folder: Path, *, train: int = 8, val: int = 6, test: int = 6) -> SiteConfig:
    """A site with random small pictures and labels."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        for i in range(count):
            name = f"{split}{i}.png"
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / name)
            labels = (CLASSES[i % 3], CLASSES[(i + 1) % 3]) if i % 2 else (CLASSES[i % 3],)
            rows.append(ManifestRow(name, labels, split))
    write_manifest(rows, folder / "manifest.csv")
    data = DataConfig(path=str(folder / "manifest.csv"), evaluate=True)
    return SiteConfig(data, privacy=POLICY, secagg=OPEN, cache_dir=str(folder / "cache"), device="cpu")


def test_a_round_moves_the_parameters_and_repeats_exactly(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    updates = []
    for _ in range(2):
        one = opened(JOB, site, "site-1")
        ready = one.prepare()
        updates.append(one.train(ready.initial, 1).vector)
    assert np.abs(updates[0]).max() > 0
    assert np.array_equal(updates[0], updates[1])
    assert ready.evaluates
    assert ready.is_stand_in
    assert one.weight() == 1.0
    by_records = dataclasses.replace(JOB, federation=FederationConfig(weighting="records"))
    for name, count in (("few", 5), ("many", 8)):
        (tmp_path / name).mkdir()
        heavy = opened(by_records, pictures(tmp_path / name, train=count), "site-1")
        assert heavy.prepare().weight == heavy.weight() == 10  # what the policy declares, whatever there is


def test_sites_start_equal_but_see_their_records_in_their_own_order(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    sessions = [opened(JOB, site, name) for name in ("a", "b")]
    ready = [s.prepare() for s in sessions]
    assert ready[0].layout.encode(ready[0].initial) == ready[1].layout.encode(ready[1].initial)
    vectors = [s.train(r.initial, 1).vector for s, r in zip(sessions, ready, strict=True)]
    assert not np.array_equal(*vectors)


def test_thresholds_come_from_val_and_never_from_test(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    found = {}
    for name, val in (("with", 6), ("without", 0)):
        one = opened(JOB, pictures(tmp_path / name, val=val), "s")
        found[name] = one.evaluate(one.prepare().initial, zero_shot=True) or {}
    assert found["without"]["threshold"] == 0.5
    assert found["without"]["threshold_from_val"] == 0.0
    assert found["with"]["threshold_from_val"] == 1.0
    assert found["with"]["threshold"] != 0.5
    for figures in found.values():
        assert 0 <= figures["mAP"] <= 100
        assert len(figures["AP"]) == len(figures["share"]) == 3
        assert all(0 <= s <= 1 for s in figures["share"])
        assert abs(sum(figures["gate"]) - 1) < 1e-6
        assert figures["gate_entropy"] == pytest.approx(np.log(2), abs=1e-6)
        assert figures["zero_shot"]["gate"] == [1.0]


def test_the_test_split_does_not_move_the_threshold(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    first = opened(JOB, site, "s")
    state = first.prepare().initial
    before = first.evaluate(state) or {}
    text = (tmp_path / "manifest.csv").read_text().splitlines()
    kept = [line for line in text if "test" not in line or "test0" in line or "test1" in line or "test2" in line]
    (tmp_path / "manifest.csv").write_text("\n".join(kept) + "\n")
    second = opened(JOB, site, "s")
    after = second.evaluate(second.prepare().initial) or {}
    assert after["threshold"] == before["threshold"]
    assert after["mAP"] != before["mAP"]


def test_a_site_that_does_not_evaluate_says_so(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    silent = dataclasses.replace(site, data=dataclasses.replace(site.data, evaluate=False))
    one = opened(JOB, silent, "s")
    ready = one.prepare()
    assert not ready.evaluates
    assert one.evaluate(ready.initial) is None


def test_a_site_without_training_pictures_is_refused_before_any_round(tmp_path: Path) -> None:
    site = pictures(tmp_path, train=0)
    with pytest.raises(ValueError, match="train"):
        opened(JOB, site, "s").prepare()
    with pytest.raises(ValueError, match="hospital-b: "):
        preflight.check_data(JOB, {"hospital-b": site})


def test_an_unreadable_picture_is_named_with_its_line_and_may_be_skipped(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    (tmp_path / "train3.png").write_bytes((tmp_path / "train3.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"(?s)train3\.png.*") as caught:
        preflight.check_data(JOB, {"a": site})
    assert "line 5" in str(caught.value)
    skipping = dataclasses.replace(site, data=dataclasses.replace(site.data, on_bad_image="skip"))
    assert preflight.check_data(JOB, {"a": skipping})["a"].train == 7


def test_a_run_that_nobody_could_judge_is_refused(tmp_path: Path) -> None:
    site = pictures(tmp_path, test=0)
    with pytest.raises(ValueError, match="no site holds test pictures"):
        preflight.check_data(JOB, {"a": site})


def test_features_prepared_for_all_sites_are_not_computed_again(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    sites = {"a": site, "b": site}
    steps: list[tuple[int, int]] = []
    preflight.prepare_features(
        FakeBackbone(), sites, preflight.check_data(JOB, sites), lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (40, 40)
    one = opened(JOB, site, "a")
    one.backbone.patches = None  # type: ignore[assignment]  # calling it would fail
    one.prepare()


def test_the_size_of_an_update_is_known_beforehand() -> None:
    size = preflight.check_model(JOB, FakeBackbone())
    assert set(size.groups) == {"contexts", "adapters", "gate", "head"}
    assert size.mib_per_update == pytest.approx(size.floats * 4 / 2**20)


def test_a_class_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens|word"):
        preflight.check_model(dataclasses.replace(JOB, classes=("cat", " ".join(["dog"] * 99))), FakeBackbone())


def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="device='cuda:99'"):
        pick_device("cuda:99")
    assert pick_device("cpu").type == "cpu"


def test_unseen_classes_are_scored_and_leave_training_as_it_is(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    seen = dataclasses.replace(JOB, classes=("cat", "dog"), unseen_classes=("bus",))
    one = opened(seen, site, "site-1")
    ready = one.prepare()
    update = one.train(ready.initial, 1).vector
    found = one.evaluate(ready.initial + update, zero_shot=True) or {}
    assert len(found["AP"]) == len(found["zero_shot"]["AP"]) == 3
    assert (len(found["seen"]["AP"]), len(found["unseen"]["AP"])) == (2, 1)
    text = (tmp_path / "manifest.csv").read_text()
    kept = [line.replace("|bus", "").replace("bus|", "").replace(",bus,", ",,") for line in text.splitlines()]
    (tmp_path / "manifest.csv").write_text("\n".join(kept) + "\n")
    plain = opened(dataclasses.replace(JOB, classes=("cat", "dog")), site, "site-1")
    assert np.array_equal(plain.train(plain.prepare().initial, 1).vector, update)


def test_dropped_labels_are_not_counted_as_seen(tmp_path: Path) -> None:
    site = pictures(tmp_path)
    full = preflight.check_data(JOB, {"a": site})["a"].positives
    partial = dataclasses.replace(site.data, drop_positives=0.5, dropped="unknown")
    some = preflight.check_data(JOB, {"a": dataclasses.replace(site, data=partial)})["a"].positives
    assert (some <= full).all()
    assert some.sum() < full.sum()
    one = opened(JOB, dataclasses.replace(site, data=partial), "site-1")
    assert np.isfinite(one.train(one.prepare().initial, 1).vector).all()
