"""Prompts through a frozen bidirectional text tower of Hugging Face (BERT and kin), as open_clip wraps it.

Every token sees every other, so nothing can be shared between classes; what can be saved is the padding.
Prompts are encoded in groups of equal length, every token a real one: [start | prefix_n | suffix_c | end]
goes in as embeddings, and the tower's own pooling and projection give the feature (method of the paper,
section 3).

Must never: pad a prompt, or let one prompt of a group see another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmpt_core.model.backbone.text_causal import Tokenizer, check_prompts


class HuggingFaceText:
    """open_clip's `HFTextEncoder`.

    Args:
        tower: module with `transformer`, `pooler` and `proj`.
        tokenizer: its tokenizer.
    """

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer) -> None:
        """See the class."""
        self.tower: Any = tower
        self.tokenizer = tokenizer
        self._table: nn.Embedding = self.tower.transformer.get_input_embeddings()
        self.width: int = self._table.weight.shape[1]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """L ids -> (L,E); through the module, because some towers scale their embeddings in it."""
        return self._table(torch.tensor(ids, dtype=torch.long, device=self._table.weight.device)).detach()

    def encode(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        """(Lp_n,E) and (Ls_c,E) -> (N,C,D); see `Backbone.encode_prompts`."""
        check_prompts(prefixes, suffixes, self.width, self.tokenizer)
        start, end = self.embed(self.tokenizer.before), self.embed(self.tokenizer.after)
        prompts = [torch.cat([start, p.to(start), s.to(start), end]) for p in prefixes for s in suffixes]
        order, parts = [], []
        for length in sorted({len(prompt) for prompt in prompts}):
            members = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
            embeddings = torch.stack([prompts[k] for k in members])  # (G,L,E)
            real = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            with sdpa_kernel(SDPBackend.MATH):  # the one whose gradient `torch.func` can batch
                output = self.tower.transformer(inputs_embeds=embeddings, attention_mask=real)
            parts.append(self.tower.proj(self.tower.pooler(output, real)))  # (G,D)
            order += members
        back = torch.tensor(order, device=start.device).argsort()
        features = torch.cat(parts).index_select(0, back)
        return features.unflatten(0, (len(prefixes), len(suffixes)))  # (N,C,D)
