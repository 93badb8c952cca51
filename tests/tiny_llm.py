"""Language models for tests: a tiny random one of transformers, and fakes that answer as they are told."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmpt_core.conditions.answers import Answer
from fedmpt_core.conditions.language_model import LanguageModel

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def tokenizer(template: str | None = None, *, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>", "unk_token": "<unknown>"} | ({"pad_token": "<end>"} if pad else {})
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = template
    return made


def network(words: PreTrainedTokenizerFast, *, context: int = 8192, seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config)


def tiny(*, template: str | None = None, pad: bool = True, context: int = 8192, seed: int = 0) -> LanguageModel:
    """A random model: it babbles bytes."""
    words = tokenizer(template, pad=pad)
    return LanguageModel(network(words, context=context, seed=seed), words, "tiny random")


class Scripted:
    """A `LanguageModel` whose answers are a function of the prompt; it counts what it was asked."""

    name = "scripted"
    context = 4096

    def __init__(self, say: Callable[[str], Answer | str], score: Callable[[str, str], float] | None = None) -> None:
        self._say, self._score = say, score
        self.asked: list[str] = []

    def identity(self) -> dict[str, str]:
        names = ("name", "revision", "weights", "tokenizer", "dtype", "device", "library")
        return dict(zip(names, ("scripted", "", "0" * 64, "1" * 64, "float32", "cpu", "none"), strict=True))

    def tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def answer(self, prompts: Sequence[str], numbers: Sequence[int], **_: object) -> list[Answer]:
        assert len(prompts) == len(numbers)
        self.asked += prompts
        answers = [self._say(prompt) for prompt in prompts]
        return [answer if isinstance(answer, Answer) else Answer(answer, cut=False) for answer in answers]

    def log_probabilities(self, prompt: str, phrases: Sequence[str]) -> np.ndarray:
        assert self._score is not None
        self.asked.append(prompt)
        return np.array([self._score(prompt, phrase) for phrase in phrases])
