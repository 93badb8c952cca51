"""Every baseline: equal to its formula written out in loops, records independent, trained wherever FedMPT is."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.config.methods import METHODS
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.base import Prediction, TunedModel
from fedmpt_core.model.fedmpt.fedmpt import zero_shot_model
from fedmpt_core.model.registry import build_model
from tests.fakes import FakeBackbone
from tests.unit.privacy.test_gradients import exact, one_by_one, relative

BASELINES = tuple(m for m in METHODS if m != "fedmpt")
CLASSES = ("cat", "dining table", "tv monitor")
B, P, D, E, C, M, S = 5, 9, 16, 12, len(CLASSES), 2, 3
FIELDS = ("probabilities", "log_positive", "log_negative", "gate", "condition_probabilities")
PER_CLASS = {"contexts.context": -3, "head.negative": 0, "head.weight": 0}  # axis of the classes; dualcoop, poscoop
SIZES = {  # as the modules' docstrings have them
    "linear": C * D + C,
    "coop": M * E + 2,
    "dualcoop": 2 * C * M * E + 2,
    "poscoop": C * M * E + C * D + 2,
    "fedtpg": M * D + 4 * D**2 + (D**2 + D) + (D * E + E) + 2,
    "fedmvp": 4 * D**2 + 2 * D * S + S + D + 2,
    "released": 2 * M * E + 4 * D**2 + 2 * D * S + S + D + 2,
}


def config(method: str, **changes: Any) -> ModelConfig:
    """Small, and away from the defaults."""
    small = {
        "context_tokens": M,
        "adapter_width": S,
        "adapter_ratio": 0.5,
        "patch_temperature": 0.3,
        "gate_temperature": 0.7,
        "conditions": ("scene type", "pose"),
        "bias": -1.0,
    }
    return ModelConfig(
        **{"method": method, **{k: v for k, v in small.items() if k in METHODS[method].settings}, **changes}
    )  # type: ignore[arg-type]


def build(
    method: str, *, classes: tuple[str, ...] = CLASSES, moved: bool = True, backbone: Backbone | None = None
) -> TunedModel:
    """A model in float64, away from its start, where many gradients are zero."""
    model = build_model(backbone or FakeBackbone(), classes, config(method), 3).double()
    if moved:
        rng = np.random.default_rng(1)
        with torch.no_grad():
            for parameter in model.trainable_parameters().values():
                parameter.add_(torch.from_numpy(0.3 * rng.standard_normal(tuple(parameter.shape))))
    return model


def patches(count: int = B, seed: int = 5) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((count, P, D)) + rng.standard_normal((count, 1, D)))


def targets(count: int = B) -> Tensor:
    return torch.from_numpy((np.random.default_rng(2).random((count, C)) < 0.4).astype(np.float64))


def numbers(prediction: Prediction, rows: list[int]) -> list[Tensor]:
    return [getattr(prediction, field)[rows] for field in FIELDS]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The formulas of the modules' docstrings in numpy, one record and one class at a time.


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def rms(values: np.ndarray) -> np.ndarray:
    return values / np.sqrt((values**2).mean(-1, keepdims=True))


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    return raised / raised.sum()


def pooled(x: np.ndarray, text: np.ndarray) -> float:
    """One class's pooled cosine."""
    cosine = np.array([patch @ text for patch in unit(x)])
    return float(softmax(cosine / 0.3) @ cosine)


def encoded(words: list[np.ndarray]) -> np.ndarray:
    """(D,) unit text feature of one prompt, given the embeddings of its words."""
    prompt = torch.from_numpy(np.concatenate(words))
    return unit(FakeBackbone().encode_prompts([prompt[:0]], [prompt])[0, 0].detach().numpy())


def spelt(words: str) -> np.ndarray:
    backbone = FakeBackbone()
    return backbone.embed(backbone.tokenize(words)).double().numpy()


def attended(asked: np.ndarray, texts: np.ndarray, p: dict[str, np.ndarray], name: str, heads: int) -> np.ndarray:
    """One query vector's attention to (T, D) texts."""
    q, k, v = p[f"{name}.query"] @ asked, texts @ p[f"{name}.key"].T, texts @ p[f"{name}.value"].T
    size, out = D // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        out.append(softmax(k[:, part] @ q[part] / math.sqrt(size)) @ v[:, part])
    return p[f"{name}.out"] @ np.concatenate(out)


def prompted(x: np.ndarray, texts: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    seen = attended(rms(x.mean(0)), texts, p, "head.prompt.attention", 8)
    inner = np.maximum(p["head.prompt.down"] @ seen + p["head.prompt.down_bias"], 0)
    return rms(x) + 0.5 * (p["head.prompt.up"] @ inner + p["head.prompt.up_bias"])


def frozen_texts() -> np.ndarray:
    return np.stack([encoded([spelt(f"a photo of a {c}.")]) for c in CLASSES])


def linear(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    return float(p["head.weight"][c] @ rms(x.mean(0)) + p["head.bias"][c])


def coop(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    text = encoded([p["contexts.context"], spelt(f"{CLASSES[c]}.")])
    return float(p["head.output.scale"][0] * pooled(x, text) + p["head.output.bias"][0])


def dualcoop(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    present, absent = (encoded([p["contexts.context"][k, c], spelt(f"{CLASSES[c]}.")]) for k in (0, 1))
    difference = pooled(x, present) - pooled(x, absent)
    return float(p["head.output.scale"][0] * difference + p["head.output.bias"][0])


def poscoop(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    present = encoded([p["contexts.context"][0, c], spelt(f"{CLASSES[c]}.")])
    difference = pooled(x, present) - pooled(x, unit(p["head.negative"][c]))
    return float(p["head.output.scale"][0] * difference + p["head.output.bias"][0])


def fedtpg(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    context = []
    for query in p["contexts.queries"]:
        seen = attended(query, frozen_texts(), p, "contexts.attention", 4)
        inner = np.maximum(seen @ p["contexts.hidden"] + p["contexts.hidden_bias"], 0)
        context.append(inner @ p["contexts.out"] + p["contexts.out_bias"])
    return coop({**p, "contexts.context": np.stack(context)}, x, c)


def fedmvp(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    cosine = pooled(prompted(x, frozen_texts(), p), frozen_texts()[c])
    return float(p["head.output.scale"][0] * cosine + p["head.output.bias"][0])


def released(p: dict[str, np.ndarray], x: np.ndarray, c: int) -> float:
    halves = [[p["contexts.condition"], spelt(n), p["contexts.klass"]] for n in ("scene type", "pose")]
    texts = np.array([[encoded([*half, spelt(f"{k}.")]) for k in CLASSES] for half in halves])
    x = prompted(x, texts.reshape(-1, D), p)
    scores = np.array([[pooled(x, text) for text in row] for row in texts])
    scores = p["head.output.scale"][0] * scores + p["head.output.bias"][0]
    return float(softmax(scores.std(1) / 0.7) @ scores[:, c])


TWINS: dict[str, Callable[[dict[str, np.ndarray], np.ndarray, int], float]] = {
    f.__name__: f for f in (linear, coop, dualcoop, poscoop, fedtpg, fedmvp, released)
}


@pytest.mark.parametrize("method", BASELINES)
def test_the_prediction_is_the_paper_s_formula_written_out(method: str) -> None:
    model, x = build(method), patches()
    p = {n: v.detach().numpy() for n, v in model.trainable_parameters().items()}
    got = model(x)
    for b in range(B):
        for c in range(C):
            logit = TWINS[method](p, x[b].numpy(), c)
            assert float(got.log_positive[b, c].detach()) == pytest.approx(-math.log1p(math.exp(-logit)), rel=1e-6)
            assert float(got.log_negative[b, c].detach()) == pytest.approx(-math.log1p(math.exp(logit)), rel=1e-6)
    torch.testing.assert_close(got.probabilities, got.log_positive.exp())
    torch.testing.assert_close(got.gate.sum(-1), torch.ones(B).double())
    assert got.gate.shape == (B, len(model.conditions))
    assert got.condition_probabilities.shape == (B, len(model.conditions), C)


@pytest.mark.parametrize("method", ["linear", "dualcoop", "poscoop"])
def test_a_difference_starts_near_a_label_in_ten_whatever_the_towers_bias(method: str) -> None:
    backbone = FakeBackbone()
    backbone.logit_scale, backbone.logit_bias = 100.0, -27.2  # CLIP's: for the cosine of one pair
    model = build_model(backbone, CLASSES, ModelConfig(method=method), 0)  # type: ignore[arg-type]
    name = "head.bias" if method == "linear" else "head.output.bias"
    assert float(model.trainable_parameters()[name][0].detach()) == pytest.approx(-2.2)


def test_the_released_gate_weighs_conditions_by_their_spread() -> None:
    model, x = build("released"), patches()
    got = model(x)
    logits = torch.logit(got.condition_probabilities)
    torch.testing.assert_close(got.gate, torch.softmax(logits.std(-1, correction=0) / 0.7, dim=-1))
    mixed = torch.sigmoid((got.gate.unsqueeze(-1) * logits).sum(1))
    torch.testing.assert_close(got.probabilities, mixed)
    assert (got.probabilities - (got.gate.unsqueeze(-1) * got.condition_probabilities).sum(1)).abs().max() > 1e-4


@pytest.mark.parametrize("method", BASELINES)
def test_as_many_numbers_are_trained_as_documented(method: str) -> None:
    model = build(method)
    assert model.layout().size == SIZES[method] == sum(model.group_sizes().values())
    assert {n.split(".")[0] for n in model.trainable_parameters()} <= {"contexts", "head"}
    assert all(p.requires_grad for p in model.trainable_parameters().values())
    assert set(model.state_dict()) == {  # the backbone is no part of it, and buffers are not stored
        n.replace("contexts.", "words.") for n in model.trainable_parameters()
    }


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("method", BASELINES)
def test_every_gradient_is_that_of_the_record_alone(method: str, count: int) -> None:
    # 6 records are as many as prompts where a class has two
    model, features = build(method), patches(count)
    found = exact(model, features, targets(count))  # type: ignore[arg-type]
    wanted = one_by_one(model, features, targets(count))  # type: ignore[arg-type]
    assert relative(found, wanted) <= 1e-10
    if count:
        assert all(float(rows.norm()) > 0 for rows in found.values())


@pytest.mark.parametrize("method", BASELINES)
def test_a_real_text_tower_takes_the_prompts(method: str, tmp_path: Path) -> None:
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    settings = {"model_cfg": {"embed_dim": D, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    backbone = OpenClipBackbone(str(tmp_path), "random:1")
    backbone.model.double()
    model = build(method, backbone=backbone)
    features = patches(2)
    found = exact(model, features, targets(2))  # type: ignore[arg-type]
    assert relative(found, one_by_one(model, features, targets(2))) <= 1e-10  # type: ignore[arg-type]
    assert all(float(rows.norm()) > 0 for rows in found.values())


@pytest.mark.parametrize("method", BASELINES)
def test_records_are_independent_bit_for_bit(method: str) -> None:
    model = build(method)
    with torch.no_grad():
        text = model.text_features()
        for count in (2, 5, 13, 30):
            x = patches(count)
            order = np.random.default_rng(count).permutation(count).tolist()
            assert same(numbers(model(x, text), order), numbers(model(x[order], text), list(range(count))))
        before, j = model(x, text), 7
        x[j] = 100 * patches(1, 77)[0]
        kept = [i for i in range(30) if i != j]
        after = model(x, text)
    assert same(numbers(before, kept), numbers(after, kept))
    assert not same(numbers(before, [j]), numbers(after, [j]))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", BASELINES)
def test_gradients_of_other_records_are_bit_identical(method: str, double: bool) -> None:
    model, x, y = build(method), patches(), targets()
    if not double:
        model, x, y = model.float(), x.float(), y.float()
    before = exact(model, x, y)  # type: ignore[arg-type]
    changed = x.clone()
    changed[2] = 100 * torch.randn_like(x[2])
    after, kept = exact(model, changed, y), [0, 1, 3, 4]  # type: ignore[arg-type]
    assert all(torch.equal(before[n][kept], after[n][kept]) for n in before)
    assert any(not torch.equal(before[n][2], after[n][2]) for n in before)


@pytest.mark.parametrize("method", BASELINES)
def test_permuting_classes_permutes_the_columns(method: str) -> None:
    order = [2, 0, 1]
    one, other = build(method), build(method, classes=tuple(CLASSES[c] for c in order))
    with torch.no_grad():
        for name, parameter in other.trainable_parameters().items():
            given = one.trainable_parameters()[name]
            per_class = name in PER_CLASS and method in ("dualcoop", "poscoop", "linear")
            if per_class or (method, name) == ("linear", "head.bias"):
                given = given.index_select(PER_CLASS.get(name, 0), torch.tensor(order))
            parameter.copy_(given)
        torch.testing.assert_close(other(patches()).probabilities, one(patches()).probabilities[:, order])


@pytest.mark.parametrize("method", BASELINES)
def test_no_record_and_a_single_record(method: str) -> None:
    model, x = build(method), patches()
    with torch.no_grad():
        assert model(x[:0]).probabilities.shape == (0, C)
        for field in FIELDS:
            torch.testing.assert_close(getattr(model(x[1]), field), getattr(model(x), field)[1], rtol=1e-11, atol=1e-13)
        zero = model(torch.zeros(1, P, D).double())
    assert torch.isfinite(zero.log_positive).all()
    with pytest.raises(ValueError, match="patches has shape"):
        model(x[..., :-1])
    with pytest.raises(ValueError, match="text has shape"):
        model(x, model.text_features()[:, :-1])


def test_fedmvp_starts_as_the_zero_shot_prompt_and_linear_as_a_constant() -> None:
    x = patches()
    with torch.no_grad():
        got = build("fedmvp", moved=False)(x).probabilities
        plain = ModelConfig(components=(), patch_temperature=0.3, bias=-1.0)
        wanted = zero_shot_model(FakeBackbone(), CLASSES, plain)(x.float()).probabilities
        constant = build("linear", moved=False)(x).probabilities
    torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(constant, torch.full((B, C), 1 / (1 + math.e)).double())


def test_a_baseline_s_job_compares_with_zero_shot_of_its_own_scale() -> None:
    made = zero_shot_model(FakeBackbone(), CLASSES, config("coop", scale=7.0))
    assert made.config.method == "fedmpt"
    assert made.head.scale is not None
    assert float(made.head.scale.detach()) == 7.0
