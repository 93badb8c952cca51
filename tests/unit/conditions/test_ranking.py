"""Coverage, redundancy and visual usefulness on tables that can be worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fedmpt_core.conditions.ranking import rank, readable, text_features, touches, visual_usefulness
from tests.fakes import FakeBackbone

WORDS = ["light", "lights", "pose", "place"]
FEATURES = F.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0.1, 0], [0, 1.0, 0], [0, 0, 1.0]]), dim=-1)
STRENGTH = np.array([[3.0, 2, 1, 0], [3.0, 4, 1, 0], [3.0, 2, 1, 0], [3.0, 2, 5, 0], [3.0, 2, 5, 0]])


def test_a_unit_touches_a_quarter_of_the_candidates_rounded_up() -> None:
    assert touches(STRENGTH).sum(1).tolist() == [1] * 5
    assert touches(np.arange(15.0).reshape(3, 5)).tolist() == [[False] * 3 + [True] * 2] * 3
    assert touches(np.zeros((1, 4))).tolist() == [[True, False, False, False]]


def test_the_ranking_worked_out_by_hand() -> None:
    found = rank(WORDS, STRENGTH, FEATURES, count=2, most_cosine=0.9)
    # light and pose touch two of five each; pose has the smaller mean strength
    assert [c.condition for c in found] == ["light", "pose", "lights", "place"]
    assert [c.coverage for c in found] == [0.4, 0.4, 0.2, 0.0]
    assert [c.kept for c in found] == [True, True, False, False]
    assert found[2].closest == "light"
    assert found[2].cosine == pytest.approx(1 / np.sqrt(1.01))
    assert found[0].closest == ""
    assert all(c.visual is None and c.score == c.coverage for c in found)


def test_what_says_the_same_is_left_out_for_the_next() -> None:
    strict = rank(WORDS, STRENGTH, FEATURES, count=3, most_cosine=0.9)
    loose = rank(WORDS, STRENGTH, FEATURES, count=3, most_cosine=1.0)
    assert [c.condition for c in strict if c.kept] == ["light", "pose", "place"]
    assert [c.condition for c in loose if c.kept] == ["light", "pose", "lights"]


def test_pictures_weigh_the_coverage() -> None:
    found = rank(WORDS, STRENGTH, FEATURES, count=2, most_cosine=0.9, visual=np.array([0.1, 0.1, 0.4, 0.4]))
    assert [c.condition for c in found] == ["pose", "light", "lights", "place"]
    assert [c.score for c in found] == pytest.approx([0.4, 0.1, 0.05, 0.0])
    blind = rank(WORDS, STRENGTH, FEATURES, count=2, most_cosine=0.9, visual=np.zeros(4))
    assert [c.score for c in blind] == [0.0] * 4  # and mean strength decides


def test_fewer_are_kept_where_too_few_differ() -> None:
    same = FEATURES[:1].expand(4, -1)
    assert sum(c.kept for c in rank(WORDS, STRENGTH, same, count=3, most_cosine=0.9)) == 1


@pytest.mark.parametrize(
    ("strength", "features", "says"),
    [
        (STRENGTH[:, :3], FEATURES, "give 4 columns"),
        (np.zeros((0, 4)), FEATURES, "give 4 columns"),
        (STRENGTH, FEATURES[:3], "give 4 columns"),
        (np.where(STRENGTH == 5, np.nan, STRENGTH), FEATURES, "not finite"),
        (STRENGTH, FEATURES / 0, "not finite"),
    ],
)
def test_what_cannot_be_ranked(strength: np.ndarray, features: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rank(WORDS, strength, features, count=2, most_cosine=0.9)


def test_text_features_are_those_of_the_tower() -> None:
    backbone = FakeBackbone(context_length=64)
    texts = [f"text number {i} " + "long " * (i % 60) for i in range(70)]
    found = text_features(backbone, texts)
    assert torch.allclose(found.norm(dim=-1), torch.ones(70))
    for i in (0, 33, 69):
        pieces = backbone.embed(backbone.tokenize(texts[i])[:48])
        alone = backbone.encode_prompts([pieces[:0]], [pieces])[0, 0]
        assert torch.allclose(found[i], F.normalize(alone, dim=-1), atol=1e-6)
    assert readable(backbone, "light")
    assert not readable(backbone, " ")


class Painted:
    """A picture of one colour."""

    name = "painted"

    def __init__(self, colour: tuple[int, int, int]) -> None:
        self._colour = colour

    def digest(self) -> str:
        return str(self._colour)

    def load(self) -> Image.Image:
        return Image.new("RGB", (12, 12), self._colour)


def test_usefulness_is_the_variance_over_pictures() -> None:
    backbone = FakeBackbone()
    pictures = [Painted((40 * i, 200 - 30 * i, 7 * i)) for i in range(6)]
    found = visual_usefulness(backbone, ["light", "pose"], pictures)
    text = text_features(backbone, ["a photo, light", "a photo, pose"])
    rows = []
    for picture in pictures:
        patches = F.normalize(backbone.patches(backbone.preprocess(picture.load())[None])[0], dim=-1)
        rows.append((text @ F.normalize(patches.mean(0), dim=-1)).numpy())
    assert np.allclose(found, np.array(rows).var(0), atol=1e-7)
    assert found.min() > 0
    assert np.allclose(visual_usefulness(backbone, ["light"], pictures[:1] * 40), 0, atol=1e-12)
    with pytest.raises(ValueError, match="pictures=1: a variance needs at least 2"):
        visual_usefulness(backbone, ["light"], pictures[:1])
