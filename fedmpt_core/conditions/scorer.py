"""Conditions without free text: which of a lexicon's conditions do label sets decide, says a small language model.

Each condition r of the lexicon has values between which photographs differ ("lighting": "in bright sunlight", "in the
dark", ...). For each label set the model says how probable every value is behind "A photo of a dog and a sofa,":

    q_s(v) = softmax_v( log p(v | set s) - mean_s' log p(v | set s') )       divided by a neutral prior
    strength_{s,r} = KL( q_s || mean_s' q_s' ) / log(number of values)       in [0, 1]

Its mean over the sets is the mutual information between label set and value: a condition whose values follow from the
labels is one that tells why labels occur together, one whose values do not is noise. The prior is the mean over the
sets themselves: that of a neutral prompt ranked conditions by how the prompt was worded. A model of 135 million
parameters can do this, where its free text is of little use.

The lexicon is written by hand; a model only chooses from it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.config.condition_lists import check_words

LEXICON = "lexicon.json"
SCHEMA_VERSION = 1
PROMPT = "A photo of {labels},"


@dataclass(frozen=True)
class Lexicon:
    """K conditions with their values.

    Attributes:
        name: file name.
        values: the values of each condition, at least two.
        digest: SHA-256 hex over them.
    """

    name: str
    values: dict[str, tuple[str, ...]]
    digest: str


def load_lexicon(path: Path | None = None) -> Lexicon:
    """The lexicon of this package, or a file of its form.

    Args:
        path: a JSON file `{"schema": 1, "note": "...", "conditions": {"lighting": ["in the dark", ...], ...}}`.

    Raises:
        ValueError: missing, damaged, or a condition with fewer than two values.
    """
    origin = str(path or LEXICON)
    try:
        text = (path or files("fedmpt_core.conditions").joinpath(LEXICON)).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: is no lexicon ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{origin}: is no lexicon of schema {SCHEMA_VERSION}")
    conditions = content.get("conditions")
    if not isinstance(conditions, dict) or not conditions:
        raise ValueError(f"{origin}: conditions={conditions!r}: give a table of conditions, each with its values")
    check_words(origin, "condition", list(conditions))
    for name, values in conditions.items():
        check_words(f"{origin}: {name}", "value", values)
        if len(values) < 2:
            raise ValueError(f"{origin}: {name} has one value: photographs must be able to differ in it")
    return Lexicon(Path(origin).name, {n: tuple(v) for n, v in conditions.items()}, canonical_digest(conditions))


def in_words(labels: Sequence[str]) -> str:
    """`a dog, a cat and an apple`."""
    *first, last = [f"{'an' if label[:1].casefold() in 'aeiou' else 'a'} {label}" for label in labels]
    return f"{', '.join(first)} and {last}" if first else last


def strengths(log_probabilities: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    """How firmly each label set decides each condition.

    Args:
        log_probabilities: (M, V) of all values of the lexicon, in its order, behind each of M label sets.
        lexicon: K conditions.

    Returns:
        (M, K) float64 in [0, 1]; all zero for one label set, which nothing can be compared with.

    Raises:
        ValueError: another shape, or numbers that are not finite.

    Edge cases: a value that no set makes more probable than another adds nothing; a constant added to a column changes
        nothing.
    """
    sizes = [len(values) for values in lexicon.values.values()]
    if log_probabilities.ndim != 2 or log_probabilities.shape[1] != sum(sizes):
        raise ValueError(f"log_probabilities has shape {log_probabilities.shape}: give {sum(sizes)} columns")
    if not np.isfinite(log_probabilities).all():
        raise ValueError("the model's probabilities are not finite: it cannot be used as a scorer")
    relative = log_probabilities - log_probabilities.mean(0)
    columns = []
    for part in np.split(relative, np.cumsum(sizes)[:-1], axis=1):
        log_q = part - np.logaddexp.reduce(part, axis=1, keepdims=True)
        q = np.exp(log_q)
        log_mean = np.logaddexp.reduce(log_q, axis=0) - np.log(len(q))
        columns.append(np.maximum((q * (log_q - log_mean)).sum(1), 0) / np.log(part.shape[1]))
    return np.stack(columns, axis=1)
