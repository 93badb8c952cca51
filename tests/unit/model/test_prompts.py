"""Prompt halves: which tokens, in which order, and which of them learn."""

import numpy as np
import pytest
import torch

from fedmpt_core.model.fedmpt.prompts import PromptLearner
from tests.fakes import FakeBackbone

CLASSES = ("cat", "dining table", "potted plant")
CONDITIONS = ("color", "scene type")


def learner(backbone: FakeBackbone | None = None, **changes: object) -> PromptLearner:
    arguments: dict[str, object] = {
        "classes": CLASSES,
        "conditions": CONDITIONS,
        "condition_tokens": 4,
        "class_tokens": 4,
        "class_init": "a photo of a",
        "generator": np.random.default_rng(7),
        **changes,
    }
    return PromptLearner(backbone or FakeBackbone(), arguments.pop("classes"), arguments.pop("conditions"), **arguments)


def words(text: str) -> torch.Tensor:
    backbone = FakeBackbone()
    return backbone.embed(backbone.tokenize(text))


def test_the_halves_of_a_prompt() -> None:
    prompts = learner()
    prefixes, suffixes = prompts()
    assert prompts.condition_context is not None
    for n, condition in enumerate(CONDITIONS):
        expected = torch.cat([prompts.condition_context[n], words(condition), words("a photo of a")])
        assert torch.equal(prefixes[n], expected)
    for suffix, name in zip(suffixes, CLASSES, strict=True):
        assert torch.equal(suffix, torch.cat([words(name), words(".")]))


def test_words_of_several_tokens_keep_them_all() -> None:
    prefixes, suffixes = learner()()
    assert [len(p) for p in prefixes] == [4 + 1 + 4, 4 + 2 + 4]
    assert [len(s) for s in suffixes] == [1 + 1, 2 + 1, 2 + 1]


def test_the_start() -> None:
    prompts = learner()
    assert torch.equal(prompts.class_context, words("a photo of a"))
    expected = 0.02 * np.random.default_rng(7).standard_normal((2, 4, 12))
    np.testing.assert_array_equal(prompts.condition_context.detach().numpy(), expected.astype(np.float32))
    assert not torch.equal(prompts.condition_context, learner(generator=np.random.default_rng(8)).condition_context)


@pytest.mark.parametrize(("count", "expected"), [(2, "a photo"), (4, "a photo of a"), (7, "a photo of a a photo of")])
def test_class_context_of_another_length(count: int, expected: str) -> None:
    assert torch.equal(learner(class_tokens=count).class_context, words(expected))


def test_no_context_at_all() -> None:
    prompts = learner(condition_tokens=0, class_tokens=0)
    assert list(prompts.parameters()) == []
    prefixes, _ = prompts()
    assert torch.equal(prefixes[1], words("scene type"))


def test_no_condition_gives_the_plain_prompt() -> None:
    prompts = learner(conditions=())
    prefixes, _ = prompts()
    assert len(prefixes) == 1
    assert torch.equal(prefixes[0], words("a photo of a"))
    assert [name for name, _ in prompts.named_parameters()] == ["class_context"]
    empty, _ = learner(conditions=(), class_tokens=0)()
    assert empty[0].shape == (0, 12)


def test_only_contexts_learn_and_only_they_are_stored() -> None:
    backbone = FakeBackbone()
    before = backbone.digest()
    prompts = learner(backbone)
    features = backbone.encode_prompts(*prompts())
    features.square().sum().backward()
    assert set(prompts.state_dict()) == {"condition_context", "class_context"}
    for parameter in prompts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.add_(1)
    assert backbone.digest() == before


def test_a_condition_s_context_reaches_only_its_own_prompts() -> None:
    backbone = FakeBackbone()
    prompts = learner(backbone)
    backbone.encode_prompts(*prompts())[0].sum().backward()
    gradient = prompts.condition_context.grad
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": ("cat", "  ")}, "class '  ' cannot be tokenised"),
        ({"conditions": ("color", "")}, "condition '' cannot be tokenised"),
        ({"class_init": ""}, "class_init '' cannot be tokenised"),
        ({"classes": ()}, "classes is empty"),
    ],
)
def test_words_without_a_token_are_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        learner(**change)


def test_a_tokenizer_that_returns_nothing_is_caught_too() -> None:
    class Silent(FakeBackbone):
        def tokenize(self, words: str) -> list[int]:
            return [] if words == "dining table" else super().tokenize(words)

    with pytest.raises(ValueError, match="class 'dining table' has no token"):
        learner(Silent())
