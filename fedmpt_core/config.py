"""Everything a job agrees on and everything a site owns, as frozen dataclasses with one strict schema.

`JobConfig` is what every site and the server agree on: its digest goes into every record of a run. `SiteConfig` is what
one site has and allows; it never travels. Both are plain values, so the same classes check a `job.toml`, the arguments
of an exported FLARE job and the configuration stored in a result.

Types, unknown keys and non-finite numbers are refused by pydantic (strict, extra forbidden); ranges are checked in
`__post_init__`, so that a config built in Python is held to the same rules. Reading and writing files is `config_file`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def _range(owner: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    value = getattr(owner, name)
    if not (low < value if open_low else low <= value) or value > high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}={value} is out of range: allowed is {bracket}{low:g}, {high:g}]")


def _unique(owner: object, name: str) -> None:
    values = getattr(owner, name)
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ValueError(f"{name} lists {', '.join(map(repr, twice))} more than once: list each once")


@dataclass(frozen=True)
class BackboneConfig:
    """Which frozen pair of towers is tuned.

    Attributes:
        kind: `open_clip` for a CLIP-like model of open_clip, `embedded` for the stand-in that needs no CLIP weights.
        architecture: open_clip architecture (`ViT-B-16`), `hf-hub:org/name` or a model folder. Unused if embedded.
        weights: pretrained tag known to open_clip, a file, or `random:SEED`. Unused if embedded; may be empty for a
            model folder or `hf-hub:` name, which bring their own.
        image_size: side of the square picture in pixels (embedded only; open_clip models bring their own), 96..448.
        precision: `auto` is half precision on a GPU and float32 on a CPU; `float32` is float32 everywhere.
    """

    kind: Literal["embedded", "open_clip"] = "embedded"
    architecture: str = ""
    weights: str = ""
    image_size: int = 224
    precision: Literal["auto", "float32"] = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is impossible or does not belong to this kind."""
        if self.kind == "open_clip" and not self.architecture:
            raise ValueError("architecture='' : name an open_clip architecture, for example 'ViT-B-16'")
        brings_weights = "/" in self.architecture  # a folder, or hf-hub:org/name
        if self.kind == "open_clip" and not self.weights and not brings_weights:
            raise ValueError("weights='' : name a pretrained tag such as 'openai', or a weights file")
        if self.kind == "embedded" and (self.architecture or self.weights):
            raise ValueError(
                f"architecture={self.architecture!r}, weights={self.weights!r}: the embedded stand-in takes neither; "
                "set kind = 'open_clip' or remove them"
            )
        _range(self, "image_size", 96, 448)


@dataclass(frozen=True)
class ModelConfig:
    """FedMPT's modules (method of the paper, sections 3 to 5).

    Attributes:
        conditions: condition words, resolved from a preset, a file or a list when the job is read.
        components: parts in use; leaving one out is the ablation of that part.
        condition_tokens: learnable vectors before each condition (paper: beta_cond = 4), 0..32.
        class_tokens: learnable vectors before the class, shared by all classes (paper: beta_cls = 4), 0..32.
        class_init: words whose embeddings start the class context.
        adapter_width: inner width of an adapter (paper: D_s = 32), 1..4096.
        adapter_ratio: share of the adapter's output that is added to the frozen patch, (0, 1].
        patch_temperature: temperature of the patch importance on the cosine, (0, 10].
        similarity_scale: cosine scale inside the transport cost; None takes the backbone's.
        reg: entropic regularisation of the transport, [0.005, 10].
        iterations: Sinkhorn iterations, always all of them, 1..1000.
        gate_width: inner width of the gate, 1..4096.
        gate_temperature: softmax temperature of the gate, (0, 100].
        prediction: `sigmoid` of a scaled cosine with a bias, or the paper's `literal` sum of plan times similarity.
        scale: initial scale of a label's logit; None takes the backbone's constant.
        bias: initial bias of a label's logit; None takes the backbone's constant.
    """

    conditions: tuple[str, ...] = ("color", "background", "scene type", "spatial layout", "pose")
    components: tuple[Literal["prompts", "adapters", "transport", "gate"], ...] = (
        "prompts",
        "adapters",
        "transport",
        "gate",
    )
    condition_tokens: int = 4
    class_tokens: int = 4
    class_init: str = "a photo of a"
    adapter_width: int = 32
    adapter_ratio: float = 0.2
    patch_temperature: float = 0.1
    similarity_scale: float | None = None
    reg: float = 0.1
    iterations: int = 50
    gate_width: int = 32
    gate_temperature: float = 1.0
    prediction: Literal["sigmoid", "literal"] = "sigmoid"
    scale: float | None = None
    bias: float | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        if not self.conditions or any(not c.strip() for c in self.conditions):
            raise ValueError(f"conditions={list(self.conditions)}: give at least one condition, none of them empty")
        _unique(self, "conditions")
        _unique(self, "components")
        for name in ("condition_tokens", "class_tokens"):
            _range(self, name, 0, 32)
        for name in ("adapter_width", "gate_width"):
            _range(self, name, 1, 4096)
        _range(self, "adapter_ratio", 0, 1, open_low=True)
        _range(self, "patch_temperature", 0, 10, open_low=True)
        _range(self, "gate_temperature", 0, 100, open_low=True)
        _range(self, "reg", 0.005, 10)
        _range(self, "iterations", 1, 1000)
        for name in ("similarity_scale", "scale"):
            if getattr(self, name) is not None:
                _range(self, name, 0, 1000, open_low=True)
        if self.bias is not None:
            _range(self, "bias", -1000, 1000)


@dataclass(frozen=True)
class LossConfig:
    """Asymmetric loss (Ridnik et al. 2021; paper, section on optimisation)."""

    gamma_negative: float = 2.0
    gamma_positive: float = 1.0
    margin: float = 0.05

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        for name in ("gamma_negative", "gamma_positive"):
            _range(self, name, 0, 10)
        _range(self, "margin", 0, 0.5)
        if self.gamma_negative < self.gamma_positive:
            raise ValueError(
                f"gamma_negative={self.gamma_negative} is below gamma_positive={self.gamma_positive}: "
                "the loss must focus at least as hard on negatives"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """What a site does in a round, and for how many rounds.

    Attributes:
        rounds: communication rounds, 1..100000.
        local_steps: optimiser steps per round and site; None means `local_epochs` passes over the site's records.
        local_epochs: passes over the site's records per round when `local_steps` is not given, 1..1000.
        batch_size: records per step, 1..65536.
        optimizer: `sgd` (paper) or `adam`; its state starts anew in every round.
        learning_rate: step size, (0, 100].
        momentum: momentum of sgd, or beta1 of adam, [0, 1).
        weight_decay: L2 penalty, [0, 1].
        schedule: `cosine` over the rounds (paper), or `constant`.
        loss_weight: factor on the loss summed over classes and averaged over records, (0, 1000].
    """

    rounds: int = 50
    local_steps: int | None = None
    local_epochs: int = 1
    batch_size: int = 32
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    loss_weight: float = 0.64

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        _range(self, "rounds", 1, 100_000)
        _range(self, "local_epochs", 1, 1000)
        if self.local_steps is not None:
            _range(self, "local_steps", 1, 1_000_000)
        _range(self, "batch_size", 1, 65536)
        _range(self, "learning_rate", 0, 100, open_low=True)
        _range(self, "momentum", 0, 0.9999)
        _range(self, "weight_decay", 0, 1)
        _range(self, "loss_weight", 0, 1000, open_low=True)


@dataclass(frozen=True)
class FederationConfig:
    """How the sites work together.

    Attributes:
        min_sites: a round with fewer updates fails; below it the job ends, 1..1000.
        weighting: `equal`, or `records` (which tells the server how many records each site has).
        join_timeout: seconds for a site to start, check its data and compute missing patch features, 1..604800.
        round_timeout: seconds for a site's answer to one task, 1..604800.
        max_failed_rounds: failed attempts in the whole job before it is given up, 0..1000.
        evaluate_every: rounds between two evaluations of the global model; the last is always evaluated, 1..100000.
        gpus: GPUs that each site's job process asks FLARE for; 0 runs on what the site's device setting says, 0..64.
    """

    min_sites: int = 2
    weighting: Literal["equal", "records"] = "equal"
    join_timeout: int = 3600
    round_timeout: int = 3600
    max_failed_rounds: int = 2
    evaluate_every: int = 1
    gpus: int = 0

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        _range(self, "min_sites", 1, 1000)
        for name in ("join_timeout", "round_timeout"):
            _range(self, name, 1, 604_800)
        _range(self, "max_failed_rounds", 0, 1000)
        _range(self, "evaluate_every", 1, 100_000)
        _range(self, "gpus", 0, 64)


@dataclass(frozen=True)
class JobConfig:
    """One agreed job: classes, model, training, federation.

    Attributes:
        name: letters, digits, `_`, `-`; at most 64.
        classes: the labels, in the order of every score vector; 2..2000.
        seed: fixes initial weights, batch order and the embedded pictures; 0..2^32-1.
        schema: version of this schema.
    """

    name: str
    classes: tuple[str, ...]
    seed: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    schema: int = SCHEMA_VERSION

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is impossible."""
        if self.schema != SCHEMA_VERSION:
            raise ValueError(f"schema={self.schema} is not supported: this release reads schema {SCHEMA_VERSION}")
        if not 1 <= len(self.name) <= 64 or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.name):
            raise ValueError(f"name={self.name!r}: use 1 to 64 letters, digits, '_' or '-'")
        if not 2 <= len(self.classes) <= 2000:
            raise ValueError(f"classes has {len(self.classes)} entries: give 2 to 2000 labels")
        if any(not c.strip() or c != c.strip() or "|" in c or ";" in c for c in self.classes):
            bad = next(c for c in self.classes if not c.strip() or c != c.strip() or "|" in c or ";" in c)
            raise ValueError(f"classes holds {bad!r}: a label may not be empty, hold '|' or ';', or start or end blank")
        _unique(self, "classes")
        _range(self, "seed", 0, 2**32 - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, every field present."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON of every field."""
        return canonical_digest(self.to_dict())


@dataclass(frozen=True)
class DataConfig:
    """Where a site's pictures come from.

    Attributes:
        source: `manifest` (a site's own pictures), `voc2007` (a VOC2007 folder), `scenes` (the embedded scenes).
        path: manifest file or VOC folder. Unused for scenes.
        root: folder that relative paths of a manifest start from; empty means the manifest's own folder.
        evaluate: whether this site scores the global model on its `val` and `test` pictures.
        on_bad_image: `refuse`, or `skip` pictures that cannot be decoded.
        share: which part of `shares` parts this site takes of a data set that several simulated sites split; from 1.
        shares: number of parts; 1 means the whole set.
        partition: how a split data set is divided: by clusters of label sets, or uniformly.
        train: scenes to train on (scenes only), 1..1000000.
        val: scenes to choose thresholds on (scenes only), 0..1000000.
        test: scenes to test on (scenes only), 0..1000000.
        spurious_strength: how firmly the site's own pairs of labels occur together (scenes only), [0, 1].
    """

    source: Literal["manifest", "voc2007", "scenes"] = "manifest"
    path: str = ""
    root: str = ""
    evaluate: bool = True
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    share: int = 1
    shares: int = 1
    partition: Literal["labels", "uniform"] = "labels"
    train: int = 200
    val: int = 100
    test: int = 300
    spurious_strength: float = 0.9

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range or the source lacks its path."""
        if self.source != "scenes" and not self.path:
            raise ValueError(f"path='' : source='{self.source}' needs the path of the manifest or folder")
        _range(self, "shares", 1, 10_000)
        if not 1 <= self.share <= self.shares:
            raise ValueError(f"share={self.share} is not one of the {self.shares} shares: use 1 to {self.shares}")
        _range(self, "train", 1, 1_000_000)
        _range(self, "val", 0, 1_000_000)
        _range(self, "test", 0, 1_000_000)
        _range(self, "spurious_strength", 0, 1)


@dataclass(frozen=True)
class SiteConfig:
    """What one site has and allows; read from `local/fedmpt_site.toml`, never sent.

    Attributes:
        data: the site's pictures.
        cache_dir: folder of the patch-feature cache, as private as the pictures; empty means the user's cache folder.
        cache_max_gib: bound on that folder, (0, 100000].
        device: `auto` (a GPU where there is one), `cpu`, or a torch device such as `cuda:1`.
        threads: CPU threads of the trainer; 0 means torch's own choice, 0..1024.
    """

    data: DataConfig
    cache_dir: str = ""
    cache_max_gib: float = 20.0
    device: str = "auto"
    threads: int = 0

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        _range(self, "cache_max_gib", 0, 100_000, open_low=True)
        _range(self, "threads", 0, 1024)
        if self.device not in ("auto", "cpu", "mps") and not self.device.startswith("cuda"):
            raise ValueError(f"device={self.device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")


def canonical_digest(value: Any) -> str:
    """SHA-256 hex of `value` as JSON with sorted keys, no blanks, ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
