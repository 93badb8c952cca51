"""Frozen CLIP-like towers from open_clip; the only module that imports it.

Finds an architecture and its weights, builds the model, and joins `patches` for pictures with the text
encoder that fits (method of the paper, sections 3 and 4). open_clip takes seconds to import, so
`OpenClipBackbone` imports it when one is made, and this module does not.

Must never: run code from a weights file, fall back to random weights, or touch the global random state.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import PIL.Image
import torch
from torch import Tensor

from fedmpt_core.common.canonical import canonical
from fedmpt_core.model.backbone.base import Backbone, centre_square
from fedmpt_core.model.backbone.files import (
    CONFIG_FILE,
    fetch,
    near,
    only_weights_file,
    parse_seed,
    read_config,
    refuse_code,
)
from fedmpt_core.model.backbone.patches import patch_features, patch_grid
from fedmpt_core.model.backbone.text_bidirectional import HuggingFaceText
from fedmpt_core.model.backbone.text_causal import CausalText, Tokenizer, hugging_face_tokenizer

# Towers trained with a softmax bring no bias. These public constants, taken from no data, replace it: CLIP's
# cosines lie around 0.25, and a label of that cosine starts at the probability 0.1, since labels are sparse.
TYPICAL_COSINE = 0.25
TYPICAL_LOGIT = -2.2  # log(0.1 / 0.9)


@dataclass(frozen=True)
class _Architecture:
    """What is known before any weight is read."""

    label: str
    config: dict[str, Any]
    preprocess: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    hub: str = ""


class OpenClipBackbone(Backbone):
    """A frozen CLIP-like model; see `Backbone` for the methods."""

    def __init__(self, architecture: str, weights: str, *, precision: str = "auto") -> None:
        """Builds the towers on the CPU.

        Args:
            architecture: a name known to open_clip (`ViT-B-16`), `hf-hub:org/model`, or a folder that holds
                `open_clip_config.json`. For a weights file trained with QuickGELU, as OpenAI's are, take the
                name with `-quickgelu`; with a tag either name does.
            weights: a pretrained tag known to open_clip, a file (.safetensors, .pt, .pth, .bin), or
                `random:SEED` for tests and benchmarks. Empty for `hf-hub:`, and for a folder with one weights
                file in it.
            precision: `auto` is half precision on a GPU, float32 on a CPU; `float32` is float32 everywhere.

        Raises:
            ValueError: unknown or unsupported architecture, unknown or unreachable weights, a file that is no
                plain tensor file or does not fit.
        """
        import open_clip

        if precision not in ("auto", "float32"):
            raise ValueError(f"precision={precision!r}: use 'auto' or 'float32'")
        chosen = _find_architecture(architecture)
        config, preprocess = deepcopy(chosen.config), chosen.preprocess
        seed, path, origin = 0, None, weights
        builtin = chosen.folder is None and not chosen.hub
        tag = open_clip.get_pretrained_cfg(chosen.label, weights) if builtin else {}
        if weights.startswith("random:"):
            seed = parse_seed(weights)
        elif tag:
            path = fetch(f"weights={weights!r} of {chosen.label}", lambda: open_clip.download_pretrained(tag))
            preprocess = {k: v for k, v in tag.items() if k != "size"}
            # The name does not tell which activation the tag's weights were trained with; the tag does.
            config["quick_gelu"] = bool(tag.get("quick_gelu", False))
        else:
            path = _find_weights(chosen, weights)
            origin = Path(path).name if weights else "its own weights"

        self.model: Any = _build(chosen, config, seed).eval().requires_grad_(False)
        if path is not None:
            _read_weights(self.model, Path(path), chosen.label)
        self.name, self.is_stand_in = f"open_clip {chosen.label} ({origin})", path is None
        self.grid = patch_grid(self.model.visual, chosen.label)
        self._transform, self._preprocessing = _image_transform(self.model.visual.image_size, preprocess, chosen.label)
        self._text = _text_tower(self.model, chosen, config["text_cfg"])
        self._description = _describe(self.model, config)
        self._precision, self._digest = precision, ""
        self.feature_dim, self.token_dim = int(config["embed_dim"]), self._text.width
        self.image_size = int(self._preprocessing["size"][0])
        self.logit_scale = float(self.model.logit_scale.exp().item())
        own_bias = self.model.logit_bias
        typical = TYPICAL_LOGIT - TYPICAL_COSINE * self.logit_scale
        self.logit_bias = typical if own_bias is None else float(own_bias.item())

    def digest(self) -> str:
        """See `Backbone`; computed once and kept. The same for equal weights, wherever they came from."""
        if not self._digest:
            hasher = hashlib.sha256(canonical(self._description, default=str))
            for name, tensor in sorted(self.model.state_dict().items()):
                hasher.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
                hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._digest = hasher.hexdigest()
        return self._digest

    def preprocessing_digest(self) -> str:
        """See `Backbone`."""
        return hashlib.sha256(canonical(self._preprocessing, default=str)).hexdigest()

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """See `Backbone`; open_clip's own transform for inference."""
        return self._transform(image)

    def seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """See `Backbone`; the whole picture, its centre square, or the square that it is padded to."""
        match self._preprocessing["resize_mode"]:
            case "squash":
                return image
            case "longest":
                return centre_square(image, max(image.size), self._preprocessing["fill_color"])
        return centre_square(image, min(image.size))

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """See `Backbone` and `fedmpt_core.model.backbone.patches`."""
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images has shape {tuple(images.shape)}, it must be (records, 3, {side}, {side})")
        with self._half_precision(gradients=False):
            features = patch_features(self.model.visual, images.to(self._weight)).to(self._weight.dtype)
        if not torch.isfinite(features).all():
            raise ValueError("patch features are not finite: check the pictures, or set precision = 'float32'")
        return features

    def tokenize(self, words: str) -> list[int]:
        """See `Backbone`."""
        return self._text.tokenizer.pieces(words)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """See `Backbone`."""
        return self._text.embed(ids)

    def encode_prompts(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        """See `Backbone`."""
        with self._half_precision(gradients=True):
            features = self._text.encode(prefixes, suffixes)
        return features.to(self._weight.dtype)

    def to(self, device: torch.device | str) -> Self:
        """See `Backbone`."""
        self.model.to(device)
        return self

    @property
    def _weight(self) -> Tensor:
        """A weight of every model: its device and dtype are those of all."""
        return self.model.logit_scale

    def _half_precision(self, *, gradients: bool) -> contextlib.AbstractContextManager[Any]:
        """Autocast on a GPU: bfloat16, or float16 where a GPU lacks it and no gradient can underflow."""
        if self._precision == "float32" or self._weight.device.type != "cuda":
            return contextlib.nullcontext()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext() if gradients else torch.autocast("cuda", torch.float16)


def _find_architecture(name: str) -> _Architecture:
    """By folder, hub name or open_clip's own list; raises ValueError when it is none of them."""
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("hf-hub:"):
        hub = name.removeprefix("hf-hub:")
        file = fetch(f"architecture={name!r}", lambda: download_pretrained_from_hf(hub, filename=CONFIG_FILE))
        return _Architecture(hub, *read_config(Path(file)), hub=hub)
    if name and folder.is_dir():
        return _Architecture(folder.resolve().name, *read_config(folder / CONFIG_FILE), folder=folder.resolve())
    label = name.replace("/", "-")  # people write ViT-B/16
    known = open_clip.list_models()
    if label not in known:
        raise ValueError(f"architecture={name!r} is neither a folder nor known to open_clip{near(label, known)}")
    return _Architecture(label, dict(open_clip.get_model_config(label) or {}))


def _find_weights(architecture: _Architecture, weights: str) -> Path:
    """The weights file that is meant when it is neither a tag nor `random:`."""
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    if architecture.hub:
        if weights:
            raise ValueError(f"weights={weights!r}: hf-hub:{architecture.hub} brings its own, leave weights empty")
        return Path(fetch(f"weights of {architecture.hub}", lambda: download_pretrained_from_hf(architecture.hub)))
    if architecture.folder and not weights:
        return only_weights_file(architecture.folder)
    if weights and Path(weights).is_file():
        return Path(weights)
    tags = [] if architecture.folder else open_clip.list_pretrained_tags_by_model(architecture.label)
    raise ValueError(
        f"weights={weights!r} is neither a file nor a pretrained tag of {architecture.label}{near(weights, tags)}"
    )


def _build(architecture: _Architecture, config: dict[str, Any], seed: int) -> Any:
    """The model with random weights, drawn from a generator of its own."""
    import open_clip

    if "multimodal_cfg" in config:
        raise ValueError(f"{architecture.label} is a captioning model (CoCa), not supported here: choose a CLIP model")
    arguments = deepcopy(config)
    text, vision = arguments["text_cfg"], arguments["vision_cfg"]
    hugging_face = "hf_model_name" in text
    if hugging_face:
        from transformers import AutoConfig

        text["hf_model_pretrained"] = False
        if architecture.folder and (architecture.folder / "config.json").is_file():
            text["hf_model_name"] = str(architecture.folder)
        name = text["hf_model_name"]
        fetch(f"text tower {name!r} of {architecture.label}", lambda: AutoConfig.from_pretrained(name))
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    custom = arguments.pop("custom_text", False) or hugging_face
    make = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        try:
            return make(**arguments)
        except Exception as error:
            raise ValueError(f"open_clip cannot build {architecture.label}: {error}") from error


def _read_weights(model: Any, path: Path, label: str) -> None:
    """Load a tensor file into the model, every tensor of both; open_clip fits position embeddings to the picture."""
    import open_clip

    # open_clip tries again without `weights_only` when its first attempt ends in a TypeError. In a file that
    # passes here first, nothing is left that could run.
    refuse_code(path)
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights file {path.name} does not fit architecture {label}: {reason}") from error
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ValueError(f"weights file {path.name} holds values that are not finite: get it anew")


def _image_transform(
    size: tuple[int, int], preprocess: dict[str, Any], label: str
) -> tuple[Callable[[PIL.Image.Image], Tensor], dict[str, Any]]:
    """open_clip's transform for inference, and the description that it was made from."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    if size[0] != size[1]:
        raise ValueError(f"{label} takes pictures of {size[0]} x {size[1]} pixels: choose one with square ones")
    cfg = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**preprocess, "size": tuple(size)}))
    transform: Any = image_transform_v2(cfg, is_train=False)
    return transform, asdict(cfg)


def _text_tower(model: Any, architecture: _Architecture, config: dict[str, Any]) -> CausalText | HuggingFaceText:
    """The text encoder that fits; raises ValueError when none does."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tower = getattr(model, "text", model)
    native = "hf_model_name" not in config
    if native and (
        tower.attn_mask is None
        or getattr(tower, "cls_emb", None) is not None
        or hasattr(tower.transformer.resblocks[0], "ln_attn")
    ):
        raise ValueError(
            f"the text tower of {architecture.label} is not a plain causal transformer (SigLIP, CLIPA and some "
            "MobileCLIP towers read their padding), which is not supported: choose a CLIP such as 'ViT-B-16'"
        )
    length = config.get("context_length", 77)
    options = config.get("tokenizer_kwargs") or {}
    source = config.get("hf_tokenizer_name", "")
    pool = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", "")
    if not source:
        if pool != "argmax":
            raise ValueError(f"{architecture.label} names no tokenizer for its text tower: choose another one")
        pairs = SimpleTokenizer(context_length=length, **options)  # CLIP's own, of byte pairs
        start, end, special = (pairs.sot_token_id,), (pairs.eot_token_id,), frozenset(pairs.all_special_ids)
        return CausalText(tower, Tokenizer(pairs.encode, start, end, special, length))
    mode = config.get("tokenizer_mode")
    words = fetch(
        f"tokenizer {source!r} of {architecture.label}",
        lambda: HFTokenizer(str(architecture.folder or source), length, tokenizer_mode=mode, **options),
    )
    if native:
        tokenizer = hugging_face_tokenizer(words, words.tokenizer.pad_token_id)
        end = getattr(tower, "eos_id", None) or getattr(tower, "text_eos_id", None)
        if pool != "eos" or tokenizer.after[:1] != (end,):
            raise ValueError(f"the text tower of {architecture.label} is not read at its end token: choose another one")
        return CausalText(tower, tokenizer)
    pad = tower.config.pad_token_id
    # RoBERTa counts positions from behind the padding id; 0 means that positions are not limited.
    limit = tower.context_length - (pad + 1 if "roberta" in tower.config.model_type else 0)
    words.context_length = min(length, limit) if limit > 0 else length
    return HuggingFaceText(tower, hugging_face_tokenizer(words, pad))


def _describe(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What decides the features beside the weights, without names that differ between machines."""
    config = deepcopy(config)
    if not config.get("quick_gelu"):
        config.pop("quick_gelu", None)
    for name in ("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained"):
        config["text_cfg"].pop(name, None)
    tower = getattr(getattr(model, "text", None), "config", None)
    words = {} if tower is None else tower.to_diff_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"):
        words.pop(name, None)
    return {"config": config, "text": words}
