"""Which records are held out, and which classes: draws that stay the same in every release of every library.

A draw orders names by SHA-256 of seed and name and takes the first ones, so it hangs on the names alone, not on their
order, and no random generator's implementation. Thresholds are chosen on `val`, which is drawn from training pictures:
test pictures decide nothing.
"""

import hashlib
from collections.abc import Collection, Sequence

VAL_SHARE = 0.1
"""Share of the training pictures that becomes `val` where a data set brings no such list (chosen)."""


def drawn(names: Collection[str], share: float, seed: int) -> frozenset[str]:
    """A fixed, seeded part of some distinct names.

    Args:
        names: at least two, all different.
        share: part to draw, (0, 1), rounded, at least one name.
        seed: which names are drawn.

    Raises:
        ValueError: the share is out of range, or leaves nothing.
    """
    if not 0 < share < 1:
        raise ValueError(f"val_share={share} is out of range: allowed is (0, 1)")
    count = max(1, round(share * len(names)))
    if count >= len(names):
        raise ValueError(f"val_share={share} leaves no picture to train on: choose a smaller share")
    return frozenset(sorted(names, key=lambda name: _place(seed, name))[:count])


def class_split(classes: Sequence[str], share: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Seen and unseen classes of a zero-shot split, each in the order of `classes`.

    Args:
        classes: at least three labels.
        share: part that becomes unseen, (0, 1), rounded, at least one; two at least stay seen.
        seed: which ones.

    Raises:
        ValueError: the share is out of range, or leaves fewer than two classes to train.
    """
    if not 0 < share < 1:
        raise ValueError(f"unseen_share={share} is out of range: allowed is (0, 1)")
    count = max(1, round(share * len(classes)))
    if len(classes) - count < 2:
        raise ValueError(f"unseen_share={share} leaves {len(classes) - count} classes to train, a job needs two")
    unseen = set(sorted(classes, key=lambda name: _place(seed, f"class:{name}"))[:count])
    return tuple(c for c in classes if c not in unseen), tuple(c for c in classes if c in unseen)


def _place(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
