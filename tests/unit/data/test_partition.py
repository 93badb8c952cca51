"""Partitions cover every record once, repeat, and follow the published formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from fedmpt_core.data.partition import divide, sites_for
from fedmpt_core.data.pictures import Dataset, FilePicture


def dataset(targets: np.ndarray, groups: np.ndarray | None = None) -> Dataset:
    classes = tuple(f"class {c}" for c in range(targets.shape[1]))
    names = None if groups is None else tuple(f"patient {g}" for g in groups)
    return Dataset(classes, tuple(FilePicture(f"{r}.png") for r in range(len(targets))), targets, names)


def by_labels(data: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    return divide(data, "labels", sites, seed)


def uniform(data: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    return divide(data, "uniform", sites, seed)


def evenly(data: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    return divide(data, "dirichlet", sites, seed, alpha=0.3)


def alike(data: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    return divide(data, "features", sites, seed, vectors=data.targets + np.float32(0.1))


ALL = [by_labels, alike, evenly, uniform]


def random_targets(records: int, classes: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((records, classes)) < 0.3).astype(np.uint8)


@pytest.mark.parametrize("split", ALL)
@settings(max_examples=15, deadline=None)
@given(records=st.integers(1, 40), classes=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_every_record_is_in_exactly_one_part_and_no_part_is_empty(
    split, records: int, classes: int, share: float, seed: int
) -> None:
    sites = max(1, round(share * records))
    parts = split(dataset(random_targets(records, classes, seed)), sites, seed)
    assert len(parts) == sites
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(records))


@pytest.mark.parametrize("split", ALL)
def test_the_seed_fixes_the_partition(split) -> None:
    data = dataset(random_targets(200, 8))
    again = [p.tolist() for p in split(data, 4, 7)]
    assert [p.tolist() for p in split(data, 4, 7)] == again
    assert [p.tolist() for p in split(data, 4, 8)] != again


def test_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    for split in ALL:
        split(dataset(random_targets(50, 4)), 3, 1)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_clusters_are_those_of_k_means_on_the_formula() -> None:
    targets = random_targets(150, 6, seed=3)
    e, count, classes = np.e, targets.sum(1, keepdims=True), targets.shape[1]
    vectors = (1 + (e - 1) * targets) / (classes + (e - 1) * count)
    labels = KMeans(3, n_init=10, random_state=5, algorithm="lloyd").fit_predict(vectors)  # type: ignore[arg-type]
    expected = {tuple(np.flatnonzero(labels == k)) for k in range(3)}
    assert {tuple(p) for p in by_labels(dataset(targets), 3, 5)} == expected


def test_separate_label_sets_become_separate_sites() -> None:
    kinds = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    of = np.random.default_rng(0).integers(0, 3, 90)
    parts = by_labels(dataset(kinds[of]), 3, 0)
    assert sorted(len(set(of[part])) for part in parts) == [1, 1, 1]
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)


def test_fewer_label_sets_than_sites_halves_the_largest_part() -> None:
    targets = np.array([[1, 0]] * 10 + [[0, 1]] * 2)
    parts = by_labels(dataset(targets), 4, 0)
    assert sorted(len(part) for part in parts) == [2, 2, 3, 5]
    assert all(len({tuple(targets[i]) for i in part}) == 1 for part in parts)


def test_records_without_labels_are_records_too() -> None:
    parts = by_labels(dataset(np.zeros((5, 3), int)), 5, 0)
    assert sorted(len(part) for part in parts) == [1] * 5


def test_uniform_parts_differ_by_one_record_at_most_and_mix_labels() -> None:
    targets = np.repeat(np.eye(2, dtype=int), 51, axis=0)
    parts = uniform(dataset(targets), 4, 0)
    assert sorted(len(part) for part in parts) == [25, 25, 26, 26]
    assert all(0.2 < targets[part, 0].mean() < 0.8 for part in parts)


@pytest.mark.parametrize("split", ALL)
@pytest.mark.parametrize("sites", [0, 6])
def test_a_number_of_sites_out_of_range_is_refused(split, sites: int) -> None:
    with pytest.raises(ValueError, match=f"sites={sites}"):
        split(dataset(random_targets(5, 2)), sites, 0)


@pytest.mark.parametrize("split", ALL)
def test_groups_stay_together_and_bound_the_number_of_sites(split) -> None:
    groups = np.random.default_rng(1).integers(0, 30, 200)
    parts = split(dataset(random_targets(200, 5), groups), 4, 3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(200))
    owners = [set(groups[part]) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 30
    with pytest.raises(ValueError, match="data set of 2 groups, which stay together, makes 1 to as many"):
        split(dataset(random_targets(6, 3), np.array([0, 1, 0, 1, 0, 1])), 3, 0)


@pytest.mark.parametrize("split", ALL)
def test_groups_of_one_record_are_split_like_records(split) -> None:
    targets = random_targets(60, 4)
    plain = split(dataset(targets), 3, 2)
    grouped = split(dataset(targets, np.array([f"{r:03d}" for r in range(60)])), 3, 2)
    assert [p.tolist() for p in plain] == [p.tolist() for p in grouped]


@pytest.mark.parametrize(
    ("share", "classes", "sites"),
    [
        (0.1, 20, 2),
        (0.1, 80, 8),
        (0.1, 81, 8),
        (1.0, 20, 20),
        (0.01, 20, 1),
        (0.125, 20, 3),
        (0.3, 20, 6),
        (1.0, 80, 80),
    ],
)
def test_as_many_sites_as_a_share_of_the_classes(share: float, classes: int, sites: int) -> None:
    assert sites_for(share, classes) == sites


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_heterogeneity_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="heterogeneity="):
        sites_for(share, 20)


def test_records_that_look_alike_go_together_whatever_the_length_of_their_vectors() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 120)
    directions = np.eye(3, 16, dtype=np.float32)[kind] + 0.05 * rng.standard_normal((120, 16)).astype(np.float32)
    vectors = directions * rng.uniform(0.1, 10, (120, 1)).astype(np.float32)
    parts = divide(dataset(random_targets(120, 4)), "features", 3, 0, vectors=vectors)
    assert [len(set(kind[part])) for part in parts] == [1, 1, 1]
    with pytest.raises(ValueError, match="one finite vector for each of 120 records"):
        divide(dataset(random_targets(120, 4)), "features", 3, 0, vectors=vectors[1:])
    vectors[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        divide(dataset(random_targets(120, 4)), "features", 3, 0, vectors=vectors)


def skew(parts: tuple[np.ndarray, ...], targets: np.ndarray) -> float:
    """Mean over labels of the largest share that one site has of it."""
    counts = np.array([targets[part].sum(0) for part in parts])
    return float((counts.max(0) / counts.sum(0)).mean())


def test_a_small_concentration_is_uneven_and_a_large_one_even() -> None:
    targets = np.eye(10, dtype=int)[np.random.default_rng(0).integers(0, 10, 2000)]
    uneven, some, even = (skew(divide(dataset(targets), "dirichlet", 4, 0, alpha=a), targets) for a in (0.02, 0.5, 500))
    assert uneven > 0.85
    assert uneven > some > even
    assert even < 0.35


def test_a_record_of_two_labels_goes_with_either() -> None:
    targets = np.zeros((1500, 3), int)
    targets[:500, 0] = targets[500:1000, 1] = 1
    targets[1000:, :2] = 1
    for seed in range(20):
        parts = divide(dataset(targets), "dirichlet", 2, seed, alpha=0.01)  # each label at one site
        site = np.concatenate([np.full(len(part), k) for k, part in enumerate(parts)])[
            np.argsort(np.concatenate(parts))
        ]
        first, second = (np.bincount(site[i : i + 500]).argmax() for i in (0, 500))
        if first != second:
            assert 0.4 < (site[1000:] == first).mean() < 0.6
            assert 0.4 < (site[1000:] == second).mean() < 0.6
            return
    pytest.fail("no seed put the two labels at different sites")


@pytest.mark.parametrize("alpha", [0.0, 0.009, 1001, float("nan")])
def test_a_concentration_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha="):
        divide(dataset(random_targets(9, 3)), "dirichlet", 2, 0, alpha=alpha)
