"""Everything a job agrees on, as frozen dataclasses with one strict schema.

`JobConfig` is what every site and the server agree on: its digest goes into every record of a run. It is plain
values, so the same classes check a `job.toml`, the arguments of an exported FLARE job and the configuration stored in
a result. What a site has and allows is `site_config`.

Types, unknown keys and non-finite numbers are refused by pydantic (strict, extra forbidden); ranges are checked in
`__post_init__`, so that a config built in Python is held to the same rules. Reading and writing files is
`config_file`.
"""

from dataclasses import asdict, dataclass, field, fields
from math import ceil
from typing import Any, Literal

from fedmpt_core.config.checks import STRICT, canonical_digest, check_labels, check_range, check_unique
from fedmpt_core.config.federation import FederationConfig, ResumeConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.secagg.policy import LEAST_COHORT

SCHEMA_VERSION = 1

_OUTPUT = ("scale", "bias")
METHOD_SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": ("bias",),
    "coop": ("context_tokens", "patch_temperature", *_OUTPUT),
    "dualcoop": ("context_tokens", "patch_temperature", *_OUTPUT),
    "poscoop": ("context_tokens", "patch_temperature", *_OUTPUT),
    "fedtpg": ("context_tokens", "patch_temperature", *_OUTPUT),
    "fedmvp": ("adapter_width", "adapter_ratio", "patch_temperature", *_OUTPUT),
    "released": (
        "conditions",
        "context_tokens",
        "adapter_width",
        "adapter_ratio",
        "patch_temperature",
        "gate_temperature",
        *_OUTPUT,
    ),
}
"""What each baseline takes of `ModelConfig`; everything else must stay at its default."""


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
        check_range(self, "image_size", 96, 448)


@dataclass(frozen=True)
class ModelConfig:
    """FedMPT's modules (method of the paper, sections 3 to 5), or a baseline in their place.

    Attributes:
        method: `fedmpt`, or a baseline of `baselines`, which takes only what `METHOD_SETTINGS` lists.
        conditions: condition words, resolved from a preset, a file or a list when the job is read.
        components: parts in use; leaving one out is the ablation of that part.
        trained: which parameters are trained and travel; the others stay as they start. `contexts`; `contexts+gate`
            with the head's scale and bias; `adapters`: the adapters' `up` matrices (`down` stays random) with the
            head's scale and bias; or `all`.
        condition_tokens: learnable vectors before each condition (paper: beta_cond = 4), 0..32.
        class_tokens: learnable vectors before the class, shared by all classes (paper: beta_cls = 4), 0..32.
        class_init: words whose embeddings start the class context.
        context_tokens: learnable vectors of a baseline's prompt (CoOp: 16), 1..64.
        adapter_width: inner width of an adapter (paper: D_s = 32), 1..4096.
        adapter_ratio: share of the adapter's output that is added to the frozen patch, (0, 1].
        patch_temperature: temperature of the patch importance on the cosine, (0, 10].
        similarity_scale: cosine scale inside the transport cost; None takes the backbone's.
        reg: entropic regularisation of the transport, [0.005, 10].
        iterations: Sinkhorn iterations, always all of them, 1..1000.
        gate_width: inner width of the gate, 1..4096.
        gate_temperature: softmax temperature of the gate, (0, 100].
        mixture: `probabilities`, the front-door sum; `logits` takes the weighted mean of the conditions' logits
            instead, a product of experts, for comparison.
        prediction: `sigmoid` of a scaled cosine with a bias, or the paper's `literal` sum of plan times similarity.
        scale: initial scale of a label's logit; None takes the backbone's constant.
        bias: initial bias of a label's logit; None takes the backbone's constant.
    """

    method: Literal["fedmpt", "linear", "coop", "dualcoop", "poscoop", "fedtpg", "fedmvp", "released"] = "fedmpt"
    conditions: tuple[str, ...] = ("color", "background", "scene type", "spatial layout", "pose")
    components: tuple[Literal["prompts", "adapters", "transport", "gate"], ...] = (
        "prompts",
        "adapters",
        "transport",
        "gate",
    )
    trained: Literal["contexts", "contexts+gate", "adapters", "all"] = "all"
    condition_tokens: int = 4
    class_tokens: int = 4
    class_init: str = "a photo of a"
    context_tokens: int = 16
    adapter_width: int = 32
    adapter_ratio: float = 0.2
    patch_temperature: float = 0.1
    similarity_scale: float | None = None
    reg: float = 0.1
    iterations: int = 50
    gate_width: int = 32
    gate_temperature: float = 1.0
    mixture: Literal["probabilities", "logits"] = "probabilities"
    prediction: Literal["sigmoid", "literal"] = "sigmoid"
    scale: float | None = None
    bias: float | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        if not self.conditions or any(not c.strip() for c in self.conditions):
            raise ValueError(f"conditions={list(self.conditions)}: give at least one condition, none of them empty")
        check_unique(self, "conditions")
        check_unique(self, "components")
        for name in ("condition_tokens", "class_tokens"):
            check_range(self, name, 0, 32)
        check_range(self, "context_tokens", 1, 64)
        for name in ("adapter_width", "gate_width"):
            check_range(self, name, 1, 4096)
        check_range(self, "adapter_ratio", 0, 1, open_low=True)
        check_range(self, "patch_temperature", 0, 10, open_low=True)
        check_range(self, "gate_temperature", 0, 100, open_low=True)
        check_range(self, "reg", 0.005, 10)
        check_range(self, "iterations", 1, 1000)
        for name in ("similarity_scale", "scale"):
            if getattr(self, name) is not None:
                check_range(self, name, 0, 1000, open_low=True)
        if self.bias is not None:
            check_range(self, "bias", -1000, 1000)
        self._check_method()

    def _check_method(self) -> None:
        taken = METHOD_SETTINGS.get(self.method)
        for known in fields(self):
            mine = known.name in taken if taken is not None else known.name != "context_tokens"
            if known.name != "method" and not mine and getattr(self, known.name) != known.default:
                others = ", ".join(taken) if taken is not None else "everything but context_tokens"
                raise ValueError(
                    f"method='{self.method}' has no {known.name}, given is {getattr(self, known.name)!r}: remove it; "
                    f"the method takes {others}"
                )


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
            check_range(self, name, 0, 10)
        check_range(self, "margin", 0, 0.5)
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
        local_epochs: passes over the site's records per round when `local_steps` is not given, 1..1000. Under
            differential privacy a pass is 1 / sample_rate steps.
        batch_size: records per step, 1..65536; None is 32. Not given under differential privacy, where
            `privacy.sample_rate` decides.
        optimizer: `sgd` (paper) or `adam`; its state starts anew in every round.
        learning_rate: step size, (0, 100].
        group_rates: factors on the step size by group of parameters (`contexts`, `adapters`, `gate`, `head`), (0,
            1000]; 1 for a group that is not named.
        momentum: momentum of sgd, or beta1 of adam, [0, 1).
        weight_decay: L2 penalty, [0, 1].
        schedule: `cosine` over the rounds (paper), or `constant`.
        loss_weight: factor on the loss summed over classes and averaged over records, (0, 1000].
    """

    rounds: int = 50
    local_steps: int | None = None
    local_epochs: int = 1
    batch_size: int | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.001
    group_rates: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    loss_weight: float = 0.64

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        check_range(self, "rounds", 1, 100_000)
        check_range(self, "local_epochs", 1, 1000)
        if self.local_steps is not None:
            check_range(self, "local_steps", 1, 1_000_000)
        if self.batch_size is not None:
            check_range(self, "batch_size", 1, 65536)
        check_range(self, "learning_rate", 0, 100, open_low=True)
        _check_groups("group_rates", self.group_rates, 1000)
        check_range(self, "momentum", 0, 0.9999)
        check_range(self, "weight_decay", 0, 1)
        check_range(self, "loss_weight", 0, 1000, open_low=True)


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of everything that a site's update says of its training records (DP-SGD).

    Attributes:
        mechanism: `dp-sgd`, or `none`, which runs only at sites that allow it (`privacy.allow_unprotected`).
        unit: what is protected: a `record`, or a `group` of records (a patient; the manifest's `group` column).
        epsilon: most that this job may spend at a site over all rounds, failed attempts included, (0, 1000].
        delta: at this delta, (0, 0.1]; must be below one over the number of units at every site.
        sample_rate: probability with which each unit takes part in a step (Poisson sampling), (0, 1].
        noise_multiplier: noise standard deviation over clip norm, (0, 10000]; None is the least that keeps the whole
            job within `epsilon`, worked out when the job is read.
        max_grad_norm: bound on the L2 norm of one unit's gradient, (0, 1e6].
        group_norms: bounds by group of parameters (`contexts`, `adapters`, `gate`, `head`) instead of the single one.
        engine: `feature_space` adds noise to the gradients of the text features and pulls the noisy sum back through
            the text tower once; `exact` adds it to the gradients of the contexts themselves, at the cost of a pass
            through the text tower per record. They differ only where contexts are trained (docs/privacy.md says
            which to take).
        micro_batch: most records whose gradients are held at once; does not change results, 1..65536.
    """

    mechanism: Literal["dp-sgd", "none"] = "dp-sgd"
    unit: Literal["record", "group"] = "record"
    epsilon: float = 8.0
    delta: float = 1e-5
    sample_rate: float = 0.25
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    group_norms: dict[str, float] = field(default_factory=dict)
    engine: Literal["exact", "feature_space"] = "feature_space"
    micro_batch: int = 64

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        check_range(self, "epsilon", 0, 1000, open_low=True)
        check_range(self, "delta", 0, 0.1, open_low=True)
        check_range(self, "sample_rate", 0, 1, open_low=True)
        if self.noise_multiplier is not None:
            check_range(self, "noise_multiplier", 0, 10_000, open_low=True)
        check_range(self, "max_grad_norm", 0, 1e6, open_low=True)
        check_range(self, "micro_batch", 1, 65536)
        _check_groups("group_norms", self.group_norms, 1e6)

    @property
    def private(self) -> bool:
        """Whether updates are differentially private."""
        return self.mechanism == "dp-sgd"


@dataclass(frozen=True)
class JobConfig:
    """One agreed job: classes, model, training, privacy, secure aggregation, federation.

    Attributes:
        name: letters, digits, `_`, `-`; at most 64.
        classes: the labels, in the order of every score vector; 2..2000.
        seed: fixes initial weights, batch order and the embedded pictures; 0..2^32-1.
        unseen_classes: labels that are scored beside `classes` and never trained (generalised zero-shot).
        resume: which run to continue; None starts anew.
        schema: version of this schema.
    """

    name: str
    classes: tuple[str, ...]
    seed: int = 0
    unseen_classes: tuple[str, ...] = ()
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secagg: SecAggConfig = field(default_factory=SecAggConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    resume: ResumeConfig | None = None
    schema: int = SCHEMA_VERSION

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is impossible."""
        if self.schema != SCHEMA_VERSION:
            raise ValueError(f"schema={self.schema} is not supported: this release reads schema {SCHEMA_VERSION}")
        if not 1 <= len(self.name) <= 64 or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.name):
            raise ValueError(f"name={self.name!r}: use 1 to 64 letters, digits, '_' or '-'")
        check_labels(self.classes, self.unseen_classes)
        check_unique(self, "classes")
        check_unique(self, "unseen_classes")
        check_range(self, "seed", 0, 2**32 - 1)
        if self.privacy.private and self.training.batch_size is not None:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} has no meaning under differential privacy, where "
                f"every record takes part with probability privacy.sample_rate={self.privacy.sample_rate}: remove it"
            )
        if self.secagg.masked:
            self._check_masked()
        if self.resume and self.resume.round >= self.training.rounds:
            raise ValueError(
                f"resume.round={self.resume.round}: the job has {self.training.rounds} rounds, nothing is left to do"
            )

    def _check_masked(self) -> None:
        sites, secagg = self.federation.min_sites, self.secagg
        if not LEAST_COHORT <= sites <= secagg.max_sites:
            raise ValueError(
                f"federation.min_sites={sites}: secure aggregation hides a site among at least {LEAST_COHORT} and at "
                f"most secagg.max_sites={secagg.max_sites}; secagg.mechanism = 'none' shows updates to the server"
            )
        if self.federation.participation < 1:
            raise ValueError(
                f"federation.participation={self.federation.participation}: with secure aggregation every site is "
                "asked in every round, so that it hides among all: set it to 1, or secagg.mechanism = 'none'"
            )
        if self.federation.weighting == "records" and secagg.max_weight is None:
            raise ValueError(
                "federation.weighting='records' needs secagg.max_weight, the largest site's number of units"
            )
        if secagg.metrics and self.privacy.private:
            raise ValueError(
                f"secagg.metrics={list(secagg.metrics)}: figures of training are not covered by differential privacy: "
                "remove them"
            )

    @property
    def all_classes(self) -> tuple[str, ...]:
        """Trained, then unseen labels: the columns of `val` and `test` targets."""
        return (*self.classes, *self.unseen_classes)

    @property
    def first_round(self) -> int:
        """Number of the first round to train."""
        return self.resume.round + 1 if self.resume else 1

    @property
    def steps_per_round(self) -> int:
        """Noisy steps of a site in a round; public, since it depends on the job alone (differential privacy only)."""
        return self.training.local_steps or self.training.local_epochs * ceil(1 / self.privacy.sample_rate)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, every field present."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON of every field."""
        return canonical_digest(self.to_dict())


def _check_groups(field_name: str, values: dict[str, float], most: float) -> None:
    """Raises ValueError unless all keys are groups of parameters and all values are in (0, most]."""
    for name, value in values.items():
        if name not in ("contexts", "adapters", "gate", "head"):
            raise ValueError(f"{field_name} names {name!r}: the groups are contexts, adapters, gate, head")
        if not 0 < value <= most:
            raise ValueError(f"{field_name}.{name}={value} is out of range: allowed is (0, {most:g}]")
