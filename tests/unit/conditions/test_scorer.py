"""The score against a literal mutual information, its edge cases, and lexicons that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.conditions.scorer import Lexicon, in_words, load_lexicon, strengths

SMALL = Lexicon("small", {"light": ("dark", "bright", "dim"), "place": ("indoors", "outdoors")}, "")


def slow(table: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The formula of the module, number by number."""
    found, start = np.zeros((len(table), len(sizes))), 0
    for r, size in enumerate(sizes):
        values = range(start, start + size)
        prior = {v: np.mean([table[s, v] for s in range(len(table))]) for v in values}
        q = np.array([[np.exp(table[s, v] - prior[v]) for v in values] for s in range(len(table))])
        q /= q.sum(1, keepdims=True)
        mean = q.mean(0)
        for s in range(len(table)):
            found[s, r] = sum(q[s, i] * np.log(q[s, i] / mean[i]) for i in range(size)) / np.log(size)
        start += size
    return found


def test_it_is_the_formula() -> None:
    table = np.random.default_rng(0).normal(-20, 3, (11, 5))
    assert np.allclose(strengths(table, SMALL), slow(table, [3, 2]))


def test_what_labels_decide_comes_out_on_top_whatever_is_frequent() -> None:
    """Light follows the labels, place does not; 'indoors' is by far the more frequent word."""
    rng = np.random.default_rng(1)
    table = rng.normal(0, 0.1, (60, 5)) + np.array([-9.0, -2, -15, -1, -14])
    table[np.arange(60), np.arange(60) % 3] += 3
    found = strengths(table, SMALL)
    assert (found[:, 0] > 5 * found[:, 1]).all()
    assert found.min() >= 0
    assert found.max() <= 1
    # without dividing by the prior the rare 'dim' would hide that labels decide it
    raw = strengths(table + 0, SMALL).mean(0)
    assert np.allclose(raw, strengths(table + np.array([5.0, -7, 0, 3, 1]), SMALL).mean(0))


def test_a_condition_that_labels_decide_fully_reaches_one() -> None:
    table = np.full((4, 5), -50.0)
    table[[0, 1], 3] = table[[2, 3], 4] = 50
    assert np.allclose(strengths(table, SMALL)[:, 1], 1)
    assert np.allclose(strengths(table, SMALL)[:, 0], 0)


def test_one_set_tells_nothing() -> None:
    assert np.allclose(strengths(np.random.default_rng(0).normal(size=(1, 5)), SMALL), 0)


def test_tables_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="give 5 columns"):
        strengths(np.zeros((3, 4)), SMALL)
    with pytest.raises(ValueError, match="not finite"):
        strengths(np.full((3, 5), -np.inf), SMALL)


def test_words() -> None:
    assert in_words(["dog", "apple"]) == "a dog and an apple"
    assert in_words(["dog"]) == "a dog"
    assert in_words(["cat", "Eel", "tv monitor"]) == "a cat, an Eel and a tv monitor"


def test_the_lexicon_of_the_package() -> None:
    found = load_lexicon()
    assert len(found.values) >= 20
    assert all(len(set(values)) == len(values) >= 2 for values in found.values.values())
    assert {"background", "scene type", "spatial layout", "object pose", "lighting", "weather"} <= set(found.values)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no lexicon"),
        ([1], "is no lexicon of schema 1"),
        ({"schema": 2, "conditions": {}}, "is no lexicon of schema 1"),
        ({"schema": 1, "conditions": {}}, "give a table of conditions"),
        ({"schema": 1, "conditions": ["light"]}, "give a table of conditions"),
        ({"schema": 1, "conditions": {"light": ["dark"]}}, "light has one value"),
        ({"schema": 1, "conditions": {"light": "dark"}}, "give a list of at least one value"),
        ({"schema": 1, "conditions": {"light": ["dark", " "]}}, "value ' '"),
        ({"schema": 1, "conditions": {"light": ["dark", "dark"]}}, "lists 'dark' more than once"),
        ({"schema": 1, "conditions": {" light": ["dark", "bright"]}}, "condition ' light'"),
    ],
)
def test_a_lexicon_that_cannot_be_used(tmp_path: Path, content: object, says: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says) as caught:
        load_lexicon(path)
    assert str(path) in str(caught.value)


def test_a_lexicon_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema": 1, "conditions": {"light": ["dark", "bright"]}}))
    found = load_lexicon(path)
    assert (found.name, found.values) == ("mine.json", {"light": ("dark", "bright")})
    with pytest.raises(ValueError, match="is no lexicon"):
        load_lexicon(tmp_path / "none.json")
