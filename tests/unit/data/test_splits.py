"""Draws hang on seed and names alone, and never on a library."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.data.public.splits import class_split, drawn

NAMES = [f"{i:06d}" for i in range(40)]


def test_the_draw_is_the_documented_one() -> None:
    first = sorted(NAMES, key=lambda n: hashlib.sha256(f"5:{n}".encode()).hexdigest())[:10]
    assert drawn(NAMES, 0.25, 5) == set(first)
    assert drawn(NAMES[::-1], 0.25, 5) == set(first)


@given(st.sets(st.text(min_size=1), min_size=3, max_size=30), st.floats(0.01, 0.6), st.integers(0, 9))
def test_a_draw_is_a_proper_part(names: set[str], share: float, seed: int) -> None:
    found = drawn(names, share, seed)
    assert found < names
    assert len(found) == max(1, round(share * len(names)))


def test_a_larger_share_draws_a_superset_and_another_seed_others() -> None:
    assert drawn(NAMES, 0.1, 0) < drawn(NAMES, 0.3, 0)
    assert drawn(NAMES, 0.3, 0) != drawn(NAMES, 0.3, 1)


@pytest.mark.parametrize("share", [0, 1, -0.5, 0.999, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="val_share="):
        drawn(NAMES, share, 0)


def test_seen_and_unseen_classes_keep_their_order_and_share_nothing() -> None:
    classes = [f"class {c}" for c in range(20)]
    seen, unseen = class_split(classes, 0.25, 3)
    assert len(unseen) == 5
    assert sorted((*seen, *unseen), key=classes.index) == classes
    assert list(seen) == [c for c in classes if c in seen]
    assert list(unseen) == [c for c in classes if c in unseen]
    assert class_split(classes, 0.25, 4)[1] != unseen
    for share in (0.0, 1.0, 0.95):
        with pytest.raises(ValueError, match="unseen_share="):
            class_split(classes, share, 0)
