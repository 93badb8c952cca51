"""The whole model on tiny towers: start, independence of records, ablations, per-record gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.fedmpt.fedmpt import NO_CONDITION, FedMPT, Head, Prediction, zero_shot_model
from fedmpt_core.model.fedmpt.transport import patch_importance, solve
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import FakeBackbone

CLASSES = ("cat", "dining table", "potted plant", "person")
CONDITIONS = ("color", "scene type", "pose")
CONFIG = ModelConfig(adapter_width=3, gate_width=3, iterations=20)
B, P, D, N, C = 5, 9, 16, len(CONDITIONS), len(CLASSES)
FIELDS = ("probabilities", "log_positive", "log_negative", "gate", "condition_probabilities", "plan")
ABLATIONS = [
    (),
    ("prompts",),
    ("adapters",),
    ("prompts", "adapters"),
    ("prompts", "adapters", "gate"),
    ("prompts", "adapters", "transport"),
    ("prompts", "adapters", "transport", "gate"),
]


def model(
    config: ModelConfig = CONFIG, *, seed: int = 3, trained: bool = False, classes: tuple[str, ...] = CLASSES
) -> FedMPT:
    """A model in float64; `trained` moves every parameter off its start."""
    made = FedMPT(FakeBackbone(), classes, CONDITIONS, config, seed).double()
    if trained:
        rng = np.random.default_rng(11)
        with torch.no_grad():
            for parameter in made.trainable_parameters().values():
                parameter.add_(torch.from_numpy(0.3 * rng.standard_normal(tuple(parameter.shape))))
    return made


def patches(records: int = B, seed: int = 5) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((records, P, D)) + rng.standard_normal((records, 1, D)))


def without(prediction: Prediction, rows: list[int]) -> list[Tensor]:
    return [getattr(prediction, f)[rows] for f in FIELDS if getattr(prediction, f) is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def written_out(made: FedMPT, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N,C) condition probabilities and (C,) mixture of one record, from the formulas, in numpy and plain
    loops."""
    config, head = made.config, made.head
    text = made.text_features().detach()
    features = x.numpy()
    each = np.zeros((N, C))
    for n in range(N):
        down, up = head.adapters.down[n].detach().numpy(), head.adapters.up[n].detach().numpy()
        adapted = features + config.adapter_ratio * features @ down @ up
        adapted /= np.linalg.norm(adapted, axis=1, keepdims=True)
        cosine = adapted @ text[n].numpy().T
        scores = np.exp(20.0 * cosine)
        cost = torch.from_numpy(1 - scores / scores.sum(1, keepdims=True))
        a = patch_importance(torch.from_numpy(cosine), config.patch_temperature)
        b = torch.full((C,), 1 / C, dtype=torch.float64)
        plan = solve(cost, a, b, reg=config.reg, iterations=config.iterations).numpy()
        scale, bias = float(head.scale[n].detach()), float(head.bias[n].detach())
        for c in range(C):
            evidence = sum(C * plan[m, c] * cosine[m, c] for m in range(P))
            each[n, c] = 1 / (1 + math.exp(-(scale * evidence + bias)))
    mean = features.mean(0)
    mean = mean / np.sqrt((mean**2).mean())
    router = np.exp(mean @ head.gate.down.detach().numpy() @ head.gate.up.detach().numpy() / config.gate_temperature)
    return each, (router / router.sum()) @ each


def test_the_prediction_is_the_method_written_out() -> None:
    made, x = model(trained=True), patches()
    got = made(x)
    for b in range(B):
        each, mixture = written_out(made, x[b])
        np.testing.assert_allclose(got.condition_probabilities[b].detach().numpy(), each, rtol=1e-9)
        np.testing.assert_allclose(got.probabilities[b].detach().numpy(), mixture, rtol=1e-9)


def test_shapes_and_ranges() -> None:
    got = model(trained=True)(patches())
    shapes = [tuple(getattr(got, f).shape) for f in FIELDS]
    assert shapes == [(B, C), (B, C), (B, C), (B, N), (B, N, C), (B, N, P, C)]
    assert ((got.probabilities >= 0) & (got.probabilities <= 1)).all()
    torch.testing.assert_close(got.log_positive.exp() + got.log_negative.exp(), torch.ones(B, C).double())
    torch.testing.assert_close(got.gate.sum(-1), torch.ones(B).double())
    torch.testing.assert_close(got.plan.sum(-2), torch.full((B, N, C), 1 / C).double())
    assert not got.plan.requires_grad


def test_a_new_model_is_the_uniform_mixture_of_unadapted_conditions() -> None:
    full, x = model(), patches()
    got = full(x)
    torch.testing.assert_close(got.gate, torch.full((B, N), 1 / N).double())
    torch.testing.assert_close(got.probabilities, got.condition_probabilities.mean(1))
    bare = model(replace(CONFIG, components=("prompts", "transport")))(x)
    torch.testing.assert_close(got.probabilities, bare.probabilities, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.plan, bare.plan, rtol=1e-12, atol=0)


def test_one_condition_is_the_single_condition() -> None:
    single = FedMPT(FakeBackbone(), CLASSES, ("color",), CONFIG, 0).double()
    got = single(patches())
    torch.testing.assert_close(got.probabilities, got.condition_probabilities[:, 0])
    assert torch.equal(got.gate, torch.ones(B, 1).double())
    assert not [n for n in single.trainable_parameters() if n.startswith("gate")]


@pytest.mark.parametrize("prediction", ["sigmoid", "literal"])
@pytest.mark.parametrize("components", [("prompts", "adapters", "transport", "gate"), ("prompts", "adapters", "gate")])
def test_permuting_the_batch_permutes_the_rows_bit_for_bit(components: tuple[str, ...], prediction: str) -> None:
    made = model(replace(CONFIG, components=components, prediction=prediction), trained=True)
    for records in (2, 5, 13, 30):
        x = patches(records)
        order = np.random.default_rng(records).permutation(records).tolist()
        with torch.no_grad():
            text = made.text_features()
            assert same(without(made(x, text), order), without(made(x[order], text), list(range(records))))


@given(st.integers(2, 9), st.integers(0, 8), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_changing_one_record_leaves_the_others_bit_identical(records: int, j: int, size: float, seed: int) -> None:
    made, x, j = model(trained=True), patches(records, seed), j % records
    changed = x.clone()
    changed[j] = size * patches(1, seed + 1)[0]
    kept = [i for i in range(records) if i != j]
    with torch.no_grad():
        assert same(without(made(x), kept), without(made(changed), kept))


def test_permuting_classes_permutes_the_columns() -> None:
    order = [2, 0, 3, 1]
    one = model(trained=True)(patches())
    other = model(trained=True, classes=tuple(CLASSES[c] for c in order))(patches())
    torch.testing.assert_close(other.probabilities, one.probabilities[:, order])
    torch.testing.assert_close(other.plan, one.plan[..., order])


def test_features_are_normalised_over_the_channels() -> None:
    made, x = model(trained=True), patches()
    text = made.text_features()
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(N, C).double())
    lengths = torch.linspace(0.2, 5, B).double().reshape(B, 1, 1)
    torch.testing.assert_close(made(x * lengths, text).probabilities, made(x, text).probabilities)
    wrong = F.normalize(FakeBackbone().encode_prompts(*made.prompts()), dim=-2)  # the broken twin: over the classes
    assert (made(x, wrong).probabilities - made(x, text).probabilities).abs().max() > 0.01


def test_a_single_record_gives_the_numbers_of_the_batch() -> None:
    made, x = model(trained=True), patches()
    text = made.text_features()
    whole = made(x, text)
    for b in range(B):
        single = made(x[b], text)
        for field in FIELDS:
            torch.testing.assert_close(getattr(single, field), getattr(whole, field)[b], rtol=1e-11, atol=1e-13)
    assert made(x[:0], text).probabilities.shape == (0, C)


@pytest.mark.parametrize("prediction", ["sigmoid", "literal"])
@pytest.mark.parametrize("components", ABLATIONS)
def test_per_record_gradients_by_vmap_are_those_of_single_records(components: tuple[str, ...], prediction: str) -> None:
    made = model(replace(CONFIG, components=components, prediction=prediction), trained=True)
    x, text = patches(), made.text_features().detach()
    targets = torch.from_numpy(np.random.default_rng(2).integers(0, 2, (B, C)))
    phi = {name: p.detach() for name, p in made.head.named_parameters()}

    def loss(phi: dict[str, Tensor], text: Tensor, x: Tensor, y: Tensor) -> Tensor:
        got = functional_call(made.head, phi, (text, x))
        return asymmetric_loss(got.log_positive, got.log_negative, y)

    phi_grads, text_grads = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))(phi, text, x, targets)
    for b in range(B):
        leaves = {**dict(made.head.named_parameters()), "text": text.clone().requires_grad_()}
        got = made.head(leaves["text"], x[b])
        asymmetric_loss(got.log_positive, got.log_negative, targets[b]).backward()
        for name, parameter in made.head.named_parameters():
            torch.testing.assert_close(phi_grads[name][b], parameter.grad, rtol=1e-9, atol=1e-12)
            parameter.grad = None
        torch.testing.assert_close(text_grads[b], leaves["text"].grad, rtol=1e-9, atol=1e-12)
    assert text_grads.abs().sum() > 0


@pytest.mark.parametrize("prediction", ["sigmoid", "literal"])
@pytest.mark.parametrize("components", ABLATIONS)
def test_every_trained_parameter_learns(components: tuple[str, ...], prediction: str) -> None:
    made = model(replace(CONFIG, components=components, prediction=prediction), trained=True)
    got = made(patches())
    asymmetric_loss(got.log_positive, got.log_negative, torch.eye(B, C)).sum().backward()
    for name, parameter in made.trainable_parameters().items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("components", ABLATIONS)
def test_a_component_left_out_has_no_parameters(components: tuple[str, ...]) -> None:
    made = model(replace(CONFIG, components=components))
    names = set(made.trainable_parameters())
    many = "prompts" in components
    assert ("contexts.condition" in names) == many
    assert "contexts.class" in names
    assert {"adapters.down", "adapters.up"} & names == (
        {"adapters.down", "adapters.up"} if "adapters" in components else set()
    )
    assert ("gate.up" in names) == (many and "gate" in components)
    got = made(patches())
    assert (got.plan is not None) == ("transport" in components)
    assert made.conditions == (CONDITIONS if many else (NO_CONDITION,))
    assert got.gate.shape == (B, len(made.conditions))


def test_leaving_a_component_out_does_not_move_the_others() -> None:
    full, part = model(), model(replace(CONFIG, components=("prompts", "gate")))
    for name, parameter in part.trainable_parameters().items():
        assert torch.equal(parameter, full.trainable_parameters()[name]), name


def test_without_transport_patches_are_pooled_by_softmax() -> None:
    made, x = model(replace(CONFIG, components=("prompts",)), trained=True), patches()
    text = made.text_features()
    cosine = F.normalize(x, dim=-1).unsqueeze(1) @ text.mT  # (B,N,P,C)
    pooled = (torch.softmax(cosine / CONFIG.patch_temperature, dim=2) * cosine).sum(2)
    expected = torch.sigmoid(made.head.scale[:, None] * pooled + made.head.bias[:, None])
    torch.testing.assert_close(made(x, text).condition_probabilities, expected)


def test_the_literal_prediction_is_the_transported_similarity() -> None:
    made, x = model(replace(CONFIG, prediction="literal"), trained=True), patches()
    assert not [n for n in made.trainable_parameters() if n.startswith("head")]
    text = made.text_features()
    got = made(x, text)
    adapted = F.normalize(made.head.adapters(x), dim=-1)
    similarity = torch.softmax(20.0 * adapted @ text.mT, dim=-1)
    torch.testing.assert_close(got.condition_probabilities, C * (got.plan * similarity).sum(2))


def test_the_mixture_is_of_probabilities_not_of_logits() -> None:
    got = model(trained=True)(patches())
    mixture = (got.gate.unsqueeze(-1) * got.condition_probabilities).sum(1)
    torch.testing.assert_close(got.probabilities, mixture)
    logits = (got.gate.unsqueeze(-1) * torch.logit(got.condition_probabilities)).sum(1)
    assert (torch.sigmoid(logits) - got.probabilities).abs().max() > 1e-3


def test_extreme_scales_stay_finite_in_float32() -> None:
    made = FedMPT(FakeBackbone(), CLASSES, CONDITIONS, replace(CONFIG, scale=1000.0, bias=-1000.0), 0)
    with torch.no_grad():
        made.head.scale.mul_(50)
    got = made(patches().float())
    assert torch.isfinite(got.log_positive).all()
    loss = asymmetric_loss(got.log_positive, got.log_negative, torch.ones(B, C)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in made.trainable_parameters().values() if p.grad is not None)


def test_the_number_of_parameters_at_the_paper_s_sizes() -> None:
    backbone = FakeBackbone(feature_dim=512, token_dim=512)
    five = ("color", "background", "scene type", "spatial layout", "pose")
    made = FedMPT(backbone, CLASSES, five, ModelConfig(), 0)
    sizes = {name: p.numel() for name, p in made.trainable_parameters().items()}
    assert sizes == {
        "contexts.condition": 10_240,
        "contexts.class": 2_048,
        "adapters.down": 81_920,
        "adapters.up": 81_920,
        "gate.down": 16_384,
        "gate.up": 160,
        "head.scale": 5,
        "head.bias": 5,
    }
    assert sum(sizes.values()) == made.layout().size == 192_682


def test_the_vector_and_its_way_back() -> None:
    one, other = model(trained=True).float(), model(seed=9).float()
    names = tuple(one.trainable_parameters())
    assert names == one.layout().names
    assert [n.split(".")[0] for n in names] == ["contexts"] * 2 + ["adapters"] * 2 + ["gate"] * 2 + ["head"] * 2
    vector = one.vector()
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, torch.cat([p.detach().ravel() for p in one.trainable_parameters().values()]))
    other.load_vector(vector)
    np.testing.assert_array_equal(other.vector(), vector)
    x = patches().float()
    assert torch.equal(other(x).probabilities, one(x).probabilities)
    vector[0] = 123  # a copy: neither model moves
    assert other.vector()[0] != 123
    assert one.vector()[0] != 123


def test_a_wrong_vector_changes_nothing() -> None:
    made = model().float()
    before = made.vector()
    bad = before.copy()
    bad[-1] = np.nan
    for vector, says in ((bad, "NaN"), (before[:-1], "shape")):
        with pytest.raises(ValueError, match=says):
            made.load_vector(vector)
    np.testing.assert_array_equal(made.vector(), before)


def test_the_start_depends_on_the_seed_alone_and_not_on_torch_s_generator() -> None:
    one = model(seed=4).vector()
    torch.rand(3)
    np.testing.assert_array_equal(model(seed=4).vector(), one)
    assert not np.array_equal(model(seed=5).vector(), one)
    state = torch.get_rng_state()
    model(seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_towers_are_neither_stored_nor_trained() -> None:
    class ModuleTowers(FakeBackbone, torch.nn.Module):
        """Towers that are themselves a torch module, as real ones may be."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            FakeBackbone.__init__(self)
            self.weight = torch.nn.Parameter(torch.ones(2))

        to = FakeBackbone.to

    made = FedMPT(ModuleTowers(), CLASSES, CONDITIONS, CONFIG, 0)
    assert {id(p) for p in made.parameters()} == {id(p) for p in made.trainable_parameters().values()}
    assert len(made.state_dict()) == len(made.trainable_parameters())


def test_the_head_s_constants_come_from_the_config_or_the_backbone() -> None:
    backbone = FakeBackbone(logit_scale=33.0, logit_bias=-2.5)
    made = FedMPT(backbone, CLASSES, CONDITIONS, CONFIG, 0)
    assert made.head.scale.tolist() == [33.0] * N
    assert made.head.bias.tolist() == [-2.5] * N
    own = FedMPT(backbone, CLASSES, CONDITIONS, replace(CONFIG, scale=7.0, bias=0.0), 0)
    assert own.head.scale.tolist() == [7.0] * N
    assert own.head.bias.tolist() == [0.0] * N
    sharp = FedMPT(backbone, CLASSES, CONDITIONS, replace(CONFIG, similarity_scale=1.0), 0)
    x = patches().float()
    assert not torch.equal(sharp(x).plan, made(x).plan)


@pytest.mark.parametrize("components", [("prompts", "adapters", "transport", "gate"), ("prompts",)])
def test_zero_shot_is_the_plain_template(components: tuple[str, ...]) -> None:
    backbone, x = FakeBackbone(), patches().float()
    config = replace(CONFIG, components=components, class_tokens=7, class_init="two dogs")
    with torch.no_grad():
        got = zero_shot_model(backbone, CLASSES, config)(x)

    def words(text: str) -> Tensor:
        return backbone.embed(backbone.tokenize(text))

    text = backbone.encode_prompts([words("a photo of a")], [words(f"{c} .") for c in CLASSES])
    cosine = F.normalize(x, dim=-1).unsqueeze(1) @ F.normalize(text, dim=-1).mT  # (B,1,P,C)
    if "transport" in components:
        cost = 1 - torch.softmax(20.0 * cosine, dim=-1)
        a, b = patch_importance(cosine, 0.1), torch.full((C,), 1 / C)
        weights = C * solve(cost, a, b, reg=config.reg, iterations=config.iterations)
    else:
        weights = torch.softmax(cosine / 0.1, dim=-2)
    expected = torch.sigmoid(20.0 * (weights * cosine).sum(-2) - 4.0)
    torch.testing.assert_close(got.probabilities, expected[:, 0], rtol=1e-4, atol=1e-6)
    assert got.gate.shape == (B, 1)
    assert not got.probabilities.requires_grad
    scored = zero_shot_model(backbone, CLASSES, config)
    assert torch.equal(scored(x).probabilities, got.probabilities)


@pytest.mark.parametrize(
    ("shape", "text", "says"),
    [
        ((B, P, D + 1), None, "patches has shape"),
        ((D,), None, "patches has shape"),
        ((B, P, D), (N, C + 1, D), "text has shape"),
    ],
)
def test_features_of_another_width_are_refused(shape: tuple[int, ...], text: tuple[int, ...] | None, says: str) -> None:
    made = model()
    with pytest.raises(ValueError, match=says):
        made(torch.ones(shape).double(), None if text is None else torch.ones(text).double())


def test_a_model_of_conditions_needs_some() -> None:
    with pytest.raises(ValueError, match="conditions is empty"):
        FedMPT(FakeBackbone(), CLASSES, (), CONFIG, 0)
    with pytest.raises(ValueError, match="classes is empty"):
        FedMPT(FakeBackbone(), (), CONDITIONS, CONFIG, 0)
    with pytest.raises(ValueError, match="at most 32 fit"):
        FedMPT(FakeBackbone(), CLASSES, CONDITIONS, replace(CONFIG, class_tokens=32), 0).text_features()


def test_the_head_alone_is_callable() -> None:
    generators = (np.random.default_rng(0), np.random.default_rng(1))
    head = Head(N, D, CONFIG, similarity_scale=20.0, scale=20.0, bias=-4.0, generators=generators)
    text = F.normalize(torch.from_numpy(np.random.default_rng(3).standard_normal((N, C, D))).float(), dim=-1)
    assert head(text, patches().float()).probabilities.shape == (B, C)
