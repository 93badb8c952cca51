"""Which of K candidate conditions are kept: coverage, visual usefulness, non-redundancy.

    coverage_k = share of the M units (sentences, or label sets) that touch condition k
    visual_k   = variance over public pictures of cos(picture, "a photo, {condition k}")
    score_k    = coverage_k, or coverage_k * visual_k / max visual when pictures were given

A unit touches the quarter of the candidates to which it is bound most strongly. Candidates are taken in falling score;
one whose text feature has a cosine above a bound with a condition kept before is left out as the same thing in other
words. Pictures must be public: the words that result are seen by everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpt_core.data.pictures import Picture
from fedmpt_core.model.backbone.base import Backbone

TOUCHED = 0.25  # share of the candidates that a unit touches (chosen)
MOST_PIECES = 48  # word pieces of a text that are read; the shortest text towers take 77 (chosen)
TEMPLATE = "a photo, {}"
MOST_COSINE = {False: 0.9, True: 0.7}
"""Default bounds on the cosine: of CLIP-like towers, whose features of short texts all lie close together, and of the
stand-in, whose sentence embeddings are centred: "lighting" has 0.76 with "lighting conditions", 0.49 with "color".
"""
_BATCH = 32


@dataclass(frozen=True)
class Candidate:
    """One condition in the ranking.

    Attributes:
        condition: its words.
        coverage: share of the units that touch it, [0, 1].
        visual: variance over pictures, or None without pictures.
        score: what it was ranked by.
        closest: the kept condition of higher score that is most like it, "" when there is none; `cosine` between them.
        kept: whether it is in the list.
    """

    condition: str
    coverage: float
    visual: float | None
    score: float
    closest: str
    cosine: float
    kept: bool


def rank(
    conditions: Sequence[str],
    strength: np.ndarray,
    features: Tensor,
    *,
    count: int,
    most_cosine: float,
    visual: np.ndarray | None = None,
) -> tuple[Candidate, ...]:
    """All candidates in falling score; ties go to the greater mean strength, then to the earlier.

    Args:
        conditions: K candidates.
        strength: (M, K) how strongly each unit is bound to each candidate; only its order within a unit and its mean
            matter.
        features: (K, D) unit text features.
        count: how many to keep; fewer are kept where too few differ.
        most_cosine: largest cosine between two kept ones, [-1, 1].
        visual: (K,) at least 0, or None.

    Raises:
        ValueError: shapes that do not fit, or a number that is not finite.
    """
    k = len(conditions)
    if strength.ndim != 2 or strength.shape[1] != k or not len(strength) or len(features) != k:
        raise ValueError(f"strength has shape {strength.shape}, features {tuple(features.shape)}: give {k} columns")
    if not np.isfinite(strength).all() or not torch.isfinite(features).all():
        raise ValueError("strength or features are not finite: the model or the text tower cannot be used")
    coverage = touches(strength).mean(0)
    score = coverage if visual is None else coverage * visual / max(visual.max(), np.finfo(float).tiny)
    order = np.lexsort((np.arange(k), -strength.mean(0), -score))
    cosine = (features.double() @ features.double().T).cpu().numpy()
    kept: list[int] = []
    candidates = []
    for i in order:
        nearest = max(kept, key=lambda j: cosine[i, j], default=None)
        near = float(cosine[i, nearest]) if nearest is not None else 0.0
        keep = len(kept) < count and (nearest is None or near <= most_cosine)
        candidates.append(
            Candidate(
                condition=str(conditions[i]),
                coverage=float(coverage[i]),
                visual=None if visual is None else float(visual[i]),
                score=float(score[i]),
                closest="" if nearest is None else conditions[nearest],
                cosine=near,
                kept=keep,
            )
        )
        kept += [i] * keep
    return tuple(candidates)


def touches(strength: np.ndarray) -> np.ndarray:
    """(M, K) -> (M, K) bool: of each unit the ceil(K / 4) strongest; ties go to the earlier."""
    most = ceil(TOUCHED * strength.shape[1])
    best = np.argsort(-strength, axis=1, kind="stable")[:, :most]
    votes = np.zeros(strength.shape, bool)
    np.put_along_axis(votes, best, True, axis=1)
    return votes


@torch.no_grad()
def text_features(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """(len(texts), D) float32 unit features of plain texts; only the first 48 word pieces of each are read.

    Raises:
        ValueError: a text that the tower cannot read.
    """
    empty = backbone.embed([])
    pieces = [backbone.embed(backbone.tokenize(text)[:MOST_PIECES]) for text in texts]
    rows = [backbone.encode_prompts([empty], pieces[i : i + _BATCH])[0] for i in range(0, len(pieces), _BATCH)]
    return F.normalize(torch.cat(rows).float(), dim=-1)


def readable(backbone: Backbone, text: str) -> bool:
    """Whether the tower's vocabulary has word pieces for all of a text."""
    try:
        return bool(backbone.tokenize(text))
    except ValueError:
        return False


@torch.no_grad()
def visual_usefulness(backbone: Backbone, conditions: Sequence[str], pictures: Sequence[Picture]) -> np.ndarray:
    """Variance over pictures of the cosine between a picture and `a photo, {condition}`.

    Args:
        backbone: the towers.
        conditions: K words.
        pictures: public ones, at least 2. A picture's feature is the mean of its patches' unit features.

    Returns:
        (K,) float64, at least 0.

    Raises:
        ValueError: fewer than two pictures.
    """
    if len(pictures) < 2:
        raise ValueError(f"pictures={len(pictures)}: a variance needs at least 2")
    text = text_features(backbone, [TEMPLATE.format(condition) for condition in conditions])
    rows = []
    for i in range(0, len(pictures), _BATCH):
        batch = torch.stack([backbone.preprocess(picture.load()) for picture in pictures[i : i + _BATCH]])
        patches = F.normalize(backbone.patches(batch).float(), dim=-1)  # (B,P,D)
        rows.append(F.normalize(patches.mean(1), dim=-1) @ text.T)  # (B,K)
    return torch.cat(rows).double().var(0, unbiased=False).cpu().numpy()
