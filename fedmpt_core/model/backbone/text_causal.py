"""Prompts through a frozen causal text tower, each condition's half encoded once and shared by all classes.

A prompt is [start | prefix_n | suffix_c | end] (method of the paper, section 3). Under a causal mask no
prefix token sees a suffix, so the keys and values of [start | prefix_n] are the same for all C classes: they
are computed once per condition, and every suffix attends to them and to its own earlier tokens. Positions are
those of the prompt written alone, and the feature is read at the true end token. The result equals the plain
encoding of N * C padded prompts, forward and gradient, at a fraction of its cost.

Must never: let padding be attended to, read a feature at another token than the end, or keep keys and values
of learnable vectors from one call to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokenizer:
    """Word pieces of one tower, and the special tokens that it puts around a prompt.

    Attributes:
        encode: words -> word pieces without special tokens, cleaned as the tower's training text was.
        before: special tokens ahead of a prompt.
        after: special tokens behind a prompt.
        special: every id with a special meaning; words may not produce one.
        context_length: most tokens of a prompt, special ones included.
    """

    encode: Callable[[str], list[int]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    special: frozenset[int]
    context_length: int

    def pieces(self, words: str) -> list[int]:
        """Word pieces; raises ValueError when there is none, or one is special or stands for the unknown."""
        ids = [int(i) for i in self.encode(words)]
        if not ids:
            raise ValueError(f"words={words!r} give no token: write at least one letter, digit or sign")
        if self.special.intersection(ids):
            raise ValueError(f"words={words!r} give a special or unknown token of the tower: use other words")
        return ids


def hugging_face_tokenizer(tokenizer: Any, pad_id: int) -> Tokenizer:
    """A Hugging Face tokenizer in open_clip's wrapper; its special tokens are found by tokenising one word.

    Raises:
        ValueError: special tokens that do not simply stand before and behind the words.
    """

    def encode(words: str) -> list[int]:
        return tokenizer.tokenizer(tokenizer.clean_fn(words), add_special_tokens=False)["input_ids"]

    word = encode("a")
    framed = [i for i in tokenizer(["a"])[0].tolist() if i != pad_id]
    starts = [k for k in range(len(framed) - len(word) + 1) if framed[k : k + len(word)] == word]
    if not word or len(starts) != 1 or tokenizer.tokenizer_mode:
        raise ValueError("the tokenizer frames a sentence in an unknown way: choose a model with another one")
    return Tokenizer(
        encode=encode,
        before=tuple(framed[: starts[0]]),
        after=tuple(framed[starts[0] + len(word) :]),
        special=frozenset(tokenizer.tokenizer.all_special_ids),
        context_length=tokenizer.context_length,
    )


def check_prompts(prefixes: Sequence[Tensor], suffixes: Sequence[Tensor], width: int, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless all are (L, width) and every prompt fits the tower's context."""
    if not prefixes or not suffixes:
        raise ValueError(f"{len(prefixes)} conditions and {len(suffixes)} classes: give at least one of each")
    for kind, tensors in (("prefix", prefixes), ("suffix", suffixes)):
        for index, tensor in enumerate(tensors):
            if tensor.ndim != 2 or tensor.shape[1] != width:
                raise ValueError(f"{kind} {index} has shape {tuple(tensor.shape)}, it must be (tokens, {width})")
    n, prefix = max(enumerate(map(len, prefixes)), key=lambda pair: pair[1])
    c, suffix = max(enumerate(map(len, suffixes)), key=lambda pair: pair[1])
    special = len(tokenizer.before) + len(tokenizer.after)
    if special + prefix + suffix > tokenizer.context_length:
        raise ValueError(
            f"the prompt of condition {n} with class {c} has {special + prefix + suffix} tokens ({prefix} "
            f"for the condition, {suffix} for the class, {special} special), the text tower takes at most "
            f"{tokenizer.context_length}: use fewer context vectors or shorter names"
        )


_Group = tuple[int, int]
"""How many classes have halves of a prompt, end token included, of one length, and that length."""


class CausalText:
    """A causal text transformer of open_clip.

    Args:
        tower: module with `token_embedding`, `positional_embedding`, `transformer`, `ln_final` and
            `text_projection`.
        tokenizer: its tokenizer; the feature is read at the first token of `tokenizer.after`.
    """

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer) -> None:
        """See the class."""
        self.tower: Any = tower
        self.tokenizer = tokenizer
        self.width: int = self.tower.token_embedding.weight.shape[1]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """L ids -> (L,E)."""
        weight: Tensor = self.tower.token_embedding.weight
        return weight.detach()[torch.tensor(ids, dtype=torch.long, device=weight.device)]

    def encode(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        """(Lp_n,E) and (Ls_c,E) -> (N,C,D); see `Backbone.encode_prompts`."""
        check_prompts(prefixes, suffixes, self.width, self.tokenizer)
        prefix, hidden, starts = self._prefix_tokens(prefixes)
        suffix, groups, order = self._suffix_tokens(suffixes, starts)

        *blocks, final = self.tower.transformer.resblocks
        for block in blocks:
            q, k, v = _heads(block, prefix)
            attended = _suffix_attention(*_heads(block, suffix), k, v, hidden, groups)
            suffix = _finish(block, suffix, attended)
            prefix = _finish(block, prefix, _causal_attention(q, k, v))
        # Nothing but the end tokens is read from the last block, so only they go through its larger part.
        ends = torch.tensor(_ends(groups), device=suffix.device)
        _, k, v = _heads(final, prefix)
        q, own_k, own_v = _heads(final, suffix)
        q = q.index_select(2, ends)
        attended = _suffix_attention(q, own_k, own_v, k, v, hidden, groups, ends_only=True)
        suffix = _finish(final, suffix.index_select(1, ends), attended)  # (N,C,E), shorter classes first

        features = self.tower.ln_final(suffix)
        projection = self.tower.text_projection
        if isinstance(projection, nn.Linear):
            features = projection(features)
        elif projection is not None:
            features = features @ projection
        back = torch.tensor(order, device=features.device).argsort()
        return features.index_select(1, back)  # (N,C,D)

    def _prefix_tokens(self, prefixes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, list[int]]:
        """Embedded [start | prefix_n], padded at the end.

        Returns:
            (N,Lp,E); what hides the padding, (N,1,1,Lp), or None when there is none; the N true lengths.
        """
        start = self.embed(self.tokenizer.before)
        rows = [torch.cat([start, p.to(start)]) for p in prefixes]
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        padded = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        hidden = None
        if min(lengths) < longest:
            padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
            hidden = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None].to(start)
        return padded + self.tower.positional_embedding[:longest].to(start), hidden, lengths

    def _suffix_tokens(
        self, suffixes: Sequence[Tensor], starts: Sequence[int]
    ) -> tuple[Tensor, list[_Group], list[int]]:
        """Embedded [suffix_c | end] of every class behind every condition, none of them padded.

        Returns:
            (N,T,E), T = sum over classes of Ls_c + 1, shorter classes first; the groups of equal length
            along T; the classes in that order.
        """
        end = self.embed(self.tokenizer.after[:1])
        position = self.tower.positional_embedding.to(end)
        rows = [torch.cat([s.to(end), end]) for s in suffixes]
        order = sorted(range(len(rows)), key=lambda c: len(rows[c]))
        groups, parts = [], []
        for length in sorted({len(row) for row in rows}):
            tokens = torch.stack([rows[c] for c in order if len(rows[c]) == length])  # (C_g,S,E)
            places = torch.stack([position[n : n + length] for n in starts])  # (N,S,E)
            parts.append((tokens + places[:, None]).flatten(1, 2))  # (N,C_g*S,E)
            groups.append((len(tokens), length))
        return torch.cat(parts, dim=1), groups, order


def _ends(groups: Sequence[_Group]) -> list[int]:
    """Where along T each class has its end token."""
    lengths = [length for classes, length in groups for _ in range(classes)]
    return [sum(lengths[: c + 1]) - 1 for c in range(len(lengths))]


def _heads(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,T,E) -> scaled queries, keys and values, each (N,H,T,E/H)."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q * q.shape[-1] ** -0.5, k, v


def _finish(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block: output projection, residual and feed-forward, (N,T,E) -> (N,T,E)."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """(length,length), minus infinity above the diagonal."""
    return torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N,H,L,E/H) each -> (N,L,E)."""
    scores = q @ k.transpose(-1, -2) + _causal_mask(q.shape[2], q)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    hidden: Tensor | None,
    groups: Sequence[_Group],
    *,
    ends_only: bool = False,
) -> Tensor:
    """Suffix tokens attend to their condition's prefix and to the earlier tokens of their own suffix.

    Written out rather than fused: a fused kernel takes one key tensor per prompt, so it would need the prefix
    copied for every class, and `torch.func` cannot batch its gradient.

    Args:
        q: (N,H,T,E/H), or (N,H,C,E/H) with `ends_only`, when each class asks with its end token alone.
        k: own keys (N,H,T,E/H).
        v: own values (N,H,T,E/H).
        prefix_k: keys shared by all classes (N,H,Lp,E/H).
        prefix_v: values shared by all classes (N,H,Lp,E/H).
        hidden: (N,1,1,Lp), minus infinity where a prefix is padded; None when none is.
        groups: the classes in their order along T.
        ends_only: whether a class has one query instead of one per token.

    Returns:
        (N,T,E), or (N,C,E) with `ends_only`.
    """
    shared = q @ prefix_k.transpose(-1, -2)  # (N,H,T,Lp)
    if hidden is not None:
        shared = shared + hidden
    tokens = [classes * length for classes, length in groups]
    asking = [classes for classes, _ in groups] if ends_only else tokens
    sliced = (q.split(asking, 2), shared.split(asking, 2), k.split(tokens, 2), v.split(tokens, 2))
    to_prefix, from_own = [], []
    for (classes, length), *slices in zip(groups, *sliced, strict=True):
        q_g, shared_g, k_g, v_g = (x.unflatten(2, (classes, -1)) for x in slices)  # (N,H,C_g,S,.)
        own = q_g @ k_g.transpose(-1, -2)  # (N,H,C_g,S,S), or (N,H,C_g,1,S)
        if not ends_only:
            own = own + _causal_mask(length, own)
        weights = torch.cat([shared_g, own], -1).softmax(-1).to(v.dtype)
        on_prefix, on_own = weights.split([shared.shape[-1], length], -1)
        to_prefix.append(on_prefix.flatten(2, 3))
        from_own.append((on_own @ v_g).flatten(2, 3))
    attended = torch.cat(to_prefix, 2) @ prefix_v + torch.cat(from_own, 2)
    return attended.transpose(1, 2).flatten(2)
