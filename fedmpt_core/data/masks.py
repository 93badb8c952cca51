"""Partial labels: positives of training records that nobody wrote down, for experiments with incomplete annotation.

Every positive is dropped with the same probability, as a *negative* (the released experiments, method, section 8) or as
*unknown*, which the loss leaves out. Whether one is dropped follows from the seed, the picture's content and the label
alone: not from the order of records or classes, nor from the site that holds the record. A larger probability drops a
superset.

For training records only. Must never be given records that anything is measured on.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np

from fedmpt_core.data.pictures import UNKNOWN, Dataset

_THREADS = 4  # that read pictures (chosen)


def drop_positives(dataset: Dataset, share: float, seed: int, *, become: Literal["negative", "unknown"]) -> Dataset:
    """The records with some of their positives dropped.

    Args:
        dataset: R training records.
        share: probability with which each positive is dropped, [0, 1].
        seed: fixes what is dropped.
        become: what a dropped positive turns into.

    Returns:
        The same records; targets 0 or `UNKNOWN` where a positive was dropped, unchanged elsewhere.

    Raises:
        BadPicture: a picture cannot be read.

    Edge cases:
        share = 0 -> unchanged, no picture is read. share = 1 -> no positive is left. The same picture twice -> the same
        labels are dropped.
    """
    if share == 0:
        return dataset
    value = 0 if become == "negative" else UNKNOWN
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda picture: picture.digest(), dataset.pictures))
    targets = dataset.targets.copy()
    for r, c in np.argwhere(dataset.targets == 1):
        drawn = hashlib.sha256(f"drop:{seed}:{digests[r]}:{dataset.classes[c]}".encode()).digest()
        if int.from_bytes(drawn[:6], "big") / 2**48 < share:
            targets[r, c] = value
    return replace(dataset, targets=targets)
