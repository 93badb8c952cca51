"""Noisy co-occurrence counts: sensitivity, noise, what is charged, what a site refuses, and files of others."""

import hashlib
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedmpt_core.conditions import cooccurrence
from fedmpt_core.conditions.cooccurrence import (
    CountRelease,
    CountsError,
    NoisyCounts,
    clipped_counts,
    noisy_counts,
    read_counts,
    steering_weights,
    write_counts,
)
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.data.scenes import CLASSES
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import PrivacyRefused
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.ledger import read_ledger
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path
from fedmpt_core.privacy.mechanism.keystream import Keystream
from tests.settings import OPEN

GRID = 2.0**-20


def pairs(classes: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(classes), 2))


def slow_counts(targets: np.ndarray, units: np.ndarray, max_norm: float) -> np.ndarray:
    """The formula, unit by unit, in floats."""
    total = np.zeros(math.comb(targets.shape[1], 2))
    for unit in np.unique(units):
        rows = targets[units == unit]
        x = np.array([float((rows[:, a] & rows[:, b]).any()) for a, b in pairs(targets.shape[1])])
        norm = np.linalg.norm(x)
        total += x * min(1.0, max_norm / norm) if norm else 0
    return total


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_clipped_sum_is_the_formula(max_norm: float, grouped: bool) -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 7)) < 0.4).astype(np.uint8)
    units = rng.permutation(np.arange(60) % (17 if grouped else 60))
    found = clipped_counts(targets, units, max_norm)
    assert found.dtype == np.int64
    assert np.allclose(found * max_norm * GRID, slow_counts(targets, units, max_norm), atol=60 * max_norm * GRID)
    order = rng.permutation(60)
    assert np.array_equal(found, clipped_counts(targets[order], units[order], max_norm))


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 2.5, 1000.0])
def test_a_unit_moves_the_sum_by_the_bound_at_most(max_norm: float) -> None:
    """Exactly, in integers: for any number of labels, and for a group whatever its records are."""
    for labels in range(12):
        row = (np.arange(12) < labels).astype(np.uint8)[None]
        norm2 = sum(int(n) ** 2 for n in clipped_counts(row, np.zeros(1, np.int64), max_norm))
        assert norm2 <= 2**40
    rng = np.random.default_rng(1)
    for _ in range(20):
        targets = (rng.random((30, 9)) < 0.5).astype(np.uint8)
        units = np.arange(30) % 6
        kept = units != 5
        moved = clipped_counts(targets, units, max_norm) - clipped_counts(targets[kept], units[kept], max_norm)
        assert sum(int(n) ** 2 for n in moved) <= 2**40
        assert moved.any()


def test_without_clipping_a_crowded_picture_would_pass_the_bound() -> None:
    row = np.ones((1, 12), np.uint8)
    assert np.linalg.norm(slow_counts(row, np.zeros(1, np.int64), 1e9)) > 8


def test_nothing_to_count() -> None:
    none = np.zeros(0, np.int64)
    assert not clipped_counts(np.zeros((0, 4), np.uint8), none, 1.0).any()
    assert not clipped_counts(np.eye(4, dtype=np.uint8), np.arange(4), 1.0).any()


def test_the_noise_is_normal_of_the_right_size_on_the_grid() -> None:
    targets = np.zeros((3, 80), np.uint8)
    targets[0, :3] = 1
    units = np.arange(3)
    found = noisy_counts(targets, units, 2.0, 1.5, Keystream(bytes(32)))
    exact = clipped_counts(targets, units, 2.0) * 2.0 * GRID
    assert np.array_equal(np.rint(found / (2.0 * GRID)), found / (2.0 * GRID))
    noise = (found - exact) / 3.0
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert stats.kstest(noise * 1.15, "norm").pvalue < 1e-3  # the test can tell
    assert not np.array_equal(found, noisy_counts(targets, units, 2.0, 1.5, Keystream()))


POLICY = SitePrivacyConfig("scenes", units=50, epsilon=8.0, delta=1e-5)
DATA = DataConfig(source="scenes", train=12)


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    found = SiteConfig(DATA, privacy=replace(POLICY, ledger=str(tmp_path / "ledgers")), secagg=OPEN)
    assert found.privacy
    create_ledger(found.privacy, "north", None)
    return found


def release(site: SiteConfig, noise: float = 1.0, **more: object) -> CountRelease:
    return CountRelease(site, "north", None, CLASSES, noise_multiplier=noise, **more)


def entries(site: SiteConfig) -> tuple:
    assert site.privacy
    return read_ledger(ledger_path(site.privacy))


def test_a_release_is_reserved_first_and_committed_with_its_digest(site: SiteConfig, tmp_path: Path) -> None:
    made = release(site, noise=2.0, max_norm=1.5)
    assert [e.kind for e in entries(site)] == ["genesis"]
    data = made.make()
    _, reserved, committed = entries(site)
    assert (reserved.kind, committed.kind) == ("reserve", "commit")
    assert committed.release == hashlib.sha256(data).hexdigest()
    charged = {k: reserved.details[k] for k in ("sample_rate", "noise_multiplier", "steps", "max_grad_norm", "unit")}
    assert charged == {
        "sample_rate": "1.0",
        "noise_multiplier": "2.0",
        "steps": 1,
        "max_grad_norm": "1.5",
        "unit": "record",
    }
    assert reserved.details["noise_std"] == ["3.0"]
    assert reserved.details["released"] == 190
    assert made.projection.job == epsilon([Steps(1.0, 2.0, 1)], 1e-5)
    write_counts(data, tmp_path / "north.json")
    found = read_counts(tmp_path / "north.json")
    assert (found.site, found.unit, found.noise_std, found.ledger) == ("north", "record", 3.0, reserved.job)
    assert found.sha256 == committed.release
    assert len(found.counts) == 190
    # no count of pictures and no true count is in the file
    assert set(json.loads(data)) == {
        "schema",
        "kind",
        "site",
        "classes",
        "counts",
        "unit",
        "max_norm",
        "noise_multiplier",
        "ledger",
    }


def test_two_releases_have_noise_of_their_own_and_compose(site: SiteConfig) -> None:
    one, two = (json.loads(release(site, noise=2.0).make()) for _ in range(2))
    assert not set(one["counts"]) & set(two["counts"]) - {0.0}
    keys = {e.details["rng_key_id"] for e in entries(site) if e.kind == "reserve"}
    assert len(keys) == 2
    third = release(site, noise=2.0)
    assert third.projection.total == pytest.approx(epsilon([Steps(1.0, 2.0, 3)], 1e-5), abs=1e-3)
    assert third.projection.total > third.projection.job


def test_what_does_not_fit_the_budget_is_refused_and_charges_nothing(site: SiteConfig) -> None:
    with pytest.raises(PrivacyRefused, match="the cap is 8"):
        release(site, noise=0.5)
    fits = [release(site) for _ in range(3)]  # each alone, and nothing else is charged yet
    for one in fits[:2]:
        one.make()
    with pytest.raises(PrivacyRefused, match=r"would reach epsilon .* is spent and the cap is 8"):
        fits[2].make()
    assert [e.kind for e in entries(site)] == ["genesis", "reserve", "commit", "reserve", "commit"]


def test_a_crash_after_the_charge_stays_charged(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cooccurrence, "noisy_counts", dies)
    with pytest.raises(MemoryError):
        release(site).make()
    assert [e.kind for e in entries(site)] == ["genesis", "reserve"]


def test_what_a_site_refuses(site: SiteConfig) -> None:
    assert site.privacy
    with pytest.raises(PrivacyRefused, match="no privacy policy"):
        release(replace(site, privacy=None))
    masked = replace(site, secagg=replace(OPEN, allow_unmasked=False))
    with pytest.raises(PrivacyRefused, match="agree to that with --in-clear"):
        release(masked)
    release(masked, in_clear=True)
    with pytest.raises(PrivacyRefused, match=r"noise_multiplier=1.0 is below this site's least of 2"):
        release(replace(site, privacy=replace(site.privacy, min_noise_multiplier=2.0)))
    with pytest.raises(PrivacyRefused, match=r"sample_rate=1\.0 is above"):
        release(replace(site, privacy=replace(site.privacy, max_sample_rate=0.5)))
    with pytest.raises(ValueError, match="max_norm=0"):
        release(site, max_norm=0.0)
    with pytest.raises(ValueError, match="noise_multiplier=-1"):
        release(site, noise=-1)
    with pytest.raises(LedgerError, match="other"):
        release(replace(site, privacy=replace(site.privacy, dataset="other")))
    assert [e.kind for e in entries(site)] == ["genesis"]


def test_data_that_cannot_be_used_charges_nothing(site: SiteConfig) -> None:
    other = CountRelease(site, "north", None, ("dog", "cat"), noise_multiplier=1.0)
    with pytest.raises(ValueError, match="classes differ from those of the embedded scenes"):
        other.make()
    assert [e.kind for e in entries(site)] == ["genesis"]


def counts(site: str, numbers: dict[tuple[str, str], float], classes: tuple[str, ...] = ("a", "b", "c")) -> NoisyCounts:
    found = [numbers.get((classes[i], classes[j]), 0.0) for i, j in pairs(len(classes))]
    return NoisyCounts(site, classes, tuple(found), "record", 1.0, 3.0, "co-occurrence-1", "")


def test_sites_are_added_whatever_the_order_of_their_classes() -> None:
    north = counts("north", {("a", "b"): 40.0, ("b", "c"): -7.0})
    south = counts("south", {("c", "a"): 10.0, ("b", "a"): 2.0}, ("c", "b", "a"))
    found = steering_weights([north, south], ["a", "b", "c"])
    assert found is not None
    noise = np.sqrt(18)
    assert found[0, 1] == pytest.approx(42 - noise)
    assert found[0, 2] == pytest.approx(10 - noise)
    assert found[1, 2] == 0
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()
    assert steering_weights([], ["a", "b"]) is None


def test_counts_that_do_not_belong() -> None:
    with pytest.raises(CountsError, match=r"the counts of north are of other classes \(c, d\)"):
        steering_weights([counts("north", {})], ["a", "b", "d"])
    with pytest.raises(CountsError, match="counts of north are given twice"):
        steering_weights([counts("north", {})] * 2, ["a", "b", "c"])


GOOD = {
    "schema": 1,
    "kind": "fedmpt co-occurrence counts",
    "site": "north",
    "classes": ["a", "b"],
    "counts": [1.5],
    "unit": "record",
    "max_norm": 1.0,
    "noise_multiplier": 2.0,
    "ledger": "co-occurrence-1",
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged"),
        ("\udcff", "is damaged"),
        pytest.param("[" * 100_000, "is damaged", id="deep"),
        ({"schema": 1}, "is no file of `fedmpt conditions counts`"),
        ([], "is no file of `fedmpt conditions counts`"),
        ({**GOOD, "schema": 2}, "schema=2: this release reads 1"),
        ({**GOOD, "counts": [1.5, 2.0]}, "counts has 2 numbers, 1 pairs exist"),
        ({**GOOD, "counts": [float("nan")]}, "is damaged"),
        ({**GOOD, "counts": ["1"]}, "is damaged"),
        ({**GOOD, "classes": ["a", "a"]}, "each once"),
        ({**GOOD, "classes": ["a"], "counts": []}, "at least 2"),
        ({**GOOD, "unit": "pixel"}, "is damaged"),
        ({**GOOD, "noise_multiplier": 0.0}, "noise_multiplier=0.0 is out of range"),
        ({**GOOD, "max_norm": -1.0}, "max_norm=-1.0 is out of range"),
        ({**GOOD, "more": 1}, "unknown key 'more'"),
        ({k: v for k, v in GOOD.items() if k != "site"}, "'site' is missing"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: object, says: str) -> None:
    path = tmp_path / "counts.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CountsError, match=says) as caught:
        read_counts(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_or_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    with pytest.raises(CountsError, match="cannot be read"):
        read_counts(path)
    path.write_text(json.dumps(GOOD))
    assert read_counts(path).counts == (1.5,)
    with pytest.raises(CountsError, match="exists: name a new file"):
        write_counts(b"", path)
    with pytest.raises(CountsError, match="cannot be written"):
        write_counts(b"", tmp_path / "nowhere" / "counts.json")
    os.truncate(path, (256 << 20) + 1)  # takes no room on the disk
    with pytest.raises(CountsError, match="has more than 268435456 bytes"):
        read_counts(path)
