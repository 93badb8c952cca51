"""Which label sets a language model is asked about: pairs in a balanced order, and random triples.

All 2^C subsets (the paper's "every combination") cannot be asked. Pairs come in the rounds of a round-robin tournament
(circle method) over shuffled labels: every round holds each label once, no pair comes twice, so any number of pairs
from the front covers the labels evenly, and all rounds are all pairs. A fifth of the budget is for triples, and
whatever pairs leave over.

Co-occurrence counts of the sites, if they are given, draw half of the pairs and all triples; the other half stays
balanced, so that no label is left out for being rare. Labels are the only input: no picture, no text.
"""

from collections.abc import Iterator
from math import comb

import numpy as np

MOST_SETS = 100_000  # chosen: a model is asked about each
TRIPLES = 0.2  # share of the budget (chosen)
STEERED = 0.5  # share of the pairs that counts decide (chosen)

LabelSet = tuple[int, ...]


def label_sets(classes: int, budget: int, seed: int, weights: np.ndarray | None = None) -> tuple[LabelSet, ...]:
    """Label sets to ask about.

    Args:
        classes: C, at least 2.
        budget: most sets, 1..100000; fewer only when there are no more pairs and triples.
        seed: fixes order and draw, at least 0.
        weights: (C, C) symmetric, at least 0; how strongly each pair is wanted. The diagonal is ignored. None, or
            all zero, is without preference.

    Returns:
        Ascending class indices of each set; no set twice.

    Raises:
        ValueError: an argument out of range.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: conditions are why labels occur together, give at least 2 classes")
    if not 1 <= budget <= MOST_SETS:
        raise ValueError(f"budget={budget} is out of range: allowed is [1, {MOST_SETS}]")
    if weights is not None:
        if weights.shape != (classes, classes) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"weights has shape {weights.shape}: give ({classes}, {classes}) finite numbers, at least 0"
            )
        if (weights != weights.T).any():
            raise ValueError("weights is not symmetric: a pair has one weight")
    rng = np.random.default_rng(seed)
    triples = min(int(TRIPLES * budget), comb(classes, 3))
    pairs = min(budget - triples, comb(classes, 2))
    triples = min(budget - pairs, comb(classes, 3))
    balanced = list(_balanced_pairs(classes, rng))
    wanted = _weighted_pairs(balanced, weights, int(STEERED * pairs), rng) if weights is not None else []
    known = set(wanted)
    chosen = wanted + [p for p in balanced if p not in known][: pairs - len(wanted)]
    return (*chosen, *_triples(classes, triples, rng, weights))


def _balanced_pairs(classes: int, rng: np.random.Generator) -> Iterator[LabelSet]:
    """All pairs, round by round; in a round every label occurs once (an odd number leaves one out)."""
    seats = [int(i) for i in rng.permutation(classes)] + [-1] * (classes % 2)  # -1 sits out
    fixed, turning = seats[0], seats[1:]
    for turn in rng.permutation(len(turning)):
        row = [fixed, *turning[turn:], *turning[:turn]]
        for i in range(len(row) // 2):
            a, b = row[i], row[-1 - i]
            if a >= 0 and b >= 0:
                yield (min(a, b), max(a, b))


def _weighted_pairs(pairs: list[LabelSet], weights: np.ndarray, count: int, rng: np.random.Generator) -> list[LabelSet]:
    """At most `count` pairs of positive weight, drawn one after the other in proportion to it, without repeats.

    The largest of log(weight) + Gumbel noise are such a draw (Efraimidis and Spirakis 2006).
    """
    at = np.array(pairs)
    weight = weights[at[:, 0], at[:, 1]]
    noise = rng.gumbel(size=len(pairs))
    with np.errstate(divide="ignore"):
        keys = np.log(weight) + noise
    order = np.argsort(-keys, kind="stable")[:count]
    return [pairs[i] for i in order if weight[i] > 0]


def _triples(classes: int, count: int, rng: np.random.Generator, weights: np.ndarray | None) -> list[LabelSet]:
    """`count` different triples; with weights the third label follows a wanted pair, where that gives enough."""
    chosen: dict[LabelSet, None] = {}
    if weights is not None:
        upper = np.triu(weights, 1)
        rows, columns = np.nonzero(upper)
        share = upper[rows, columns] / max(upper.sum(), np.finfo(float).tiny)
        for _ in range(8 * count if len(rows) else 0):  # repeats are drawn again, but not for ever
            if len(chosen) == count:
                break
            drawn = rng.choice(len(rows), p=share)
            a, b = int(rows[drawn]), int(columns[drawn])
            third = weights[a] + weights[b]
            third[[a, b]] = 0
            if third.sum() > 0:
                chosen[tuple(sorted((a, b, int(rng.choice(classes, p=third / third.sum())))))] = None
    if 2 * count > comb(classes, 3):  # few are left over: a draw would mostly repeat
        every = [(a, b, c) for a in range(classes) for b in range(a + 1, classes) for c in range(b + 1, classes)]
        rest = [t for t in every if t not in chosen]
        return [*chosen, *(rest[i] for i in rng.permutation(len(rest))[: count - len(chosen)])]
    while len(chosen) < count:
        chosen[tuple(sorted(int(i) for i in rng.choice(classes, 3, replace=False)))] = None
    return list(chosen)
