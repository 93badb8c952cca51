"""Which label sets are asked about: balance, no repeats, scale, and what weights do."""

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest

from fedmpt_core.conditions.sampling import label_sets


def split(sets: tuple[tuple[int, ...], ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [s for s in sets if len(s) == 2], [s for s in sets if len(s) == 3]


@pytest.mark.parametrize("classes", [2, 3, 4, 7, 20])
def test_with_room_all_pairs_come_once_and_triples_fill_the_rest(classes: int) -> None:
    pairs, triples = split(label_sets(classes, 2000, seed=0))
    assert sorted(pairs) == list(combinations(range(classes), 2))
    assert len(triples) == min(2000 - len(pairs), comb(classes, 3))
    assert len(set(triples)) == len(triples)


def test_all_triples_can_be_reached() -> None:
    _, triples = split(label_sets(6, 1000, seed=3))
    assert sorted(triples) == list(combinations(range(6), 3))


@pytest.mark.parametrize("classes", [20, 81, 365])
def test_few_pairs_cover_the_labels_evenly(classes: int) -> None:
    """Whatever the number of pairs, no label is in two more of them than another (one sits out where C is odd)."""
    for budget in (100, 1000):
        pairs, triples = split(label_sets(classes, budget, seed=1))
        wanted = min(budget - budget // 5, comb(classes, 2))
        assert len(pairs) == wanted
        assert len(pairs) + len(triples) == budget
        seen = Counter(label for pair in pairs for label in pair)
        counts = [seen[c] for c in range(classes)]
        assert max(counts) - min(counts) <= 1 + classes % 2
        assert all(0 <= a < b < classes for a, b in pairs)
        assert len(set(pairs)) == len(pairs)


def test_the_seed_decides() -> None:
    assert label_sets(30, 50, seed=4) == label_sets(30, 50, seed=4)
    assert label_sets(30, 50, seed=4) != label_sets(30, 50, seed=5)


def weights(classes: int, wanted: list[tuple[int, int]]) -> np.ndarray:
    found = np.zeros((classes, classes))
    for a, b in wanted:
        found[a, b] = found[b, a] = 100.0
    return found


def test_weights_bring_wanted_pairs_and_leave_half_balanced() -> None:
    wanted = [(0, 1), (0, 2), (1, 2), (5, 9)]
    sets = label_sets(100, 100, 0, weights(100, wanted))
    pairs, triples = split(sets)
    assert set(wanted) <= set(pairs)
    assert len(sets) == len(set(sets)) == 100
    seen = Counter(label for pair in pairs if pair not in wanted for label in pair)
    assert max(seen.values()) - min(seen[c] for c in range(100)) <= 3
    assert (0, 1, 2) in triples  # the one triple whose pairs are all wanted


def test_pairs_are_drawn_in_proportion_to_their_weights() -> None:
    """Of two pairs for which there is one place, the one of three times the weight comes three times as often."""
    table = weights(20, [(0, 1)])
    table[2, 3] = table[3, 2] = 300.0
    first = [label_sets(20, 3, seed, table)[0] for seed in range(400)]
    share = first.count((2, 3)) / len(first)
    assert first.count((2, 3)) + first.count((0, 1)) == len(first)
    assert abs(share - 0.75) < 0.09  # four standard deviations of 400 draws


def test_weights_of_nothing_change_no_pair() -> None:
    plain, _ = split(label_sets(20, 50, 0))
    steered, _ = split(label_sets(20, 50, 0, np.zeros((20, 20))))
    assert set(plain) == set(steered)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 10, 0), "classes=1"),
        ((5, 0, 0), "budget=0 is out of range"),
        ((5, 100_001, 0), "budget=100001 is out of range"),
        ((5, 10, 0, np.zeros((4, 4))), r"weights has shape \(4, 4\)"),
        ((5, 10, 0, np.full((5, 5), -1.0)), "at least 0"),
        ((5, 10, 0, np.full((5, 5), np.nan)), "finite"),
        ((3, 10, 0, np.triu(np.ones((3, 3)))), "not symmetric"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[object, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        label_sets(*arguments)
