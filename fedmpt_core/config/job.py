"""Everything a job agrees on, as frozen dataclasses with one strict schema.

`JobConfig` is what every site and the server agree on: its digest goes into every record of a run. It is plain
values, so the same classes check a `job.toml`, the arguments of an exported FLARE job and the configuration stored in
a result. What a site has and allows is `site`; reading and writing files is `toml`.
"""

from dataclasses import asdict, field
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field

from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.common.text import alike
from fedmpt_core.config.checks import Name, Once, changed, checked, pattern
from fedmpt_core.config.federation import EarlierRun, FederationConfig, ResumeConfig
from fedmpt_core.config.methods import METHODS, MethodName
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.server_step import Factor, Group, ServerStepConfig
from fedmpt_core.secagg.headroom import headroom
from fedmpt_core.secagg.policy import LEAST_COHORT

SCHEMA_VERSION = 1

Label = Annotated[
    str,
    pattern(r"^[^\s|;]([^|;]*[^\s|;])?$", "a label may not be empty, hold '|' or ';', or start or end blank"),
]
Bound = Annotated[float, Field(gt=0, le=1e6, description="Bound of this group.")]


@checked
class BackboneConfig:
    """Which frozen pair of towers is tuned."""

    kind: Literal["embedded", "open_clip"] = "embedded"
    """`open_clip` for a CLIP-like model of open_clip, `embedded` for the stand-in that needs no CLIP weights."""
    architecture: str = ""
    """open_clip architecture (`ViT-B-16`), `hf-hub:org/name` or a model folder. Unused if embedded."""
    weights: str = ""
    """Pretrained tag known to open_clip, a file, or `random:SEED`. Unused if embedded; may be empty for a model folder
    or `hf-hub:` name, which bring their own."""
    image_size: Annotated[int, Field(ge=96, le=448, multiple_of=32)] = 224
    """Side of the square picture in pixels (embedded only; open_clip models bring their own)."""
    precision: Literal["auto", "float32"] = "auto"
    """`auto` is half precision on a GPU and float32 on a CPU; `float32` is float32 everywhere."""

    def __post_init__(self) -> None:
        """Raises ValueError when a field does not belong to this kind."""
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


@checked
class ModelConfig:
    """FedMPT's modules (method of the paper, sections 3 to 5), or a baseline in their place."""

    method: MethodName = "fedmpt"
    """`fedmpt`, or a baseline, which takes only what `METHODS` lists."""
    conditions: Once[Annotated[tuple[Annotated[str, pattern(r"\S", "name a condition")], ...], Field(min_length=1)]] = (
        *("color", "background", "scene type", "spatial layout", "pose"),
    )
    """Condition words, resolved from a preset, a file or a list when the job is read."""
    components: Once[tuple[Literal["prompts", "adapters", "transport", "gate"], ...]] = (
        *("prompts", "adapters", "transport", "gate"),
    )
    """Parts in use; leaving one out is the ablation of that part."""
    trained: Literal["contexts", "contexts+gate", "adapters", "all"] = "all"
    """Which parameters are trained and travel; the others stay as they start. `contexts`; `contexts+gate` with the
    head's scale and bias; `adapters`: the adapters' `up` matrices (`down` stays random) with the head's scale and bias;
    or `all`."""
    condition_tokens: Annotated[int, Field(ge=0, le=32)] = 4
    """Learnable vectors before each condition (paper: beta_cond = 4)."""
    class_tokens: Annotated[int, Field(ge=0, le=32)] = 4
    """Learnable vectors before the class, shared by all classes (paper: beta_cls = 4)."""
    class_init: str = "a photo of a"
    """Words whose embeddings start the class context."""
    context_tokens: Annotated[int, Field(ge=1, le=64)] = 16
    """Learnable vectors of a baseline's prompt (CoOp: 16)."""
    adapter_width: Annotated[int, Field(ge=1, le=4096)] = 32
    """Inner width of an adapter (paper: D_s = 32)."""
    adapter_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the adapter's output that is added to the frozen patch."""
    patch_temperature: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Temperature of the patch importance on the cosine."""
    similarity_scale: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Cosine scale inside the transport cost; not given takes the backbone's."""
    reg: Annotated[float, Field(ge=0.005, le=10)] = 0.1
    """Entropic regularisation of the transport."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 50
    """Sinkhorn iterations, always all of them."""
    gate_width: Annotated[int, Field(ge=1, le=4096)] = 32
    """Inner width of the gate."""
    gate_temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softmax temperature of the gate."""
    mixture: Literal["probabilities", "logits"] = "probabilities"
    """`probabilities`, the front-door sum; `logits` takes the weighted mean of the conditions' logits instead, a
    product of experts, for comparison."""
    prediction: Literal["sigmoid", "literal"] = "sigmoid"
    """`sigmoid` of a scaled cosine with a bias, or the paper's `literal` sum of plan times similarity."""
    scale: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Initial scale of a label's logit; not given takes the backbone's constant."""
    bias: Annotated[float | None, Field(ge=-1000, le=1000)] = None
    """Initial bias of a label's logit; not given takes the backbone's constant."""

    @property
    def trains_gate(self) -> bool:
        """Whether the weights of the conditions can move: there are several, and a gate over them is trained."""
        gated = self.method == "fedmpt" and "gate" in self.components and self.trained in ("contexts+gate", "all")
        return gated and len(self.conditions) > 1

    def __post_init__(self) -> None:
        """Raises ValueError when a setting is not the method's."""
        taken = METHODS[self.method].settings
        for name in changed(self):
            if name != "method" and name not in taken:
                raise ValueError(
                    f"method='{self.method}' has no {name}, given is {getattr(self, name)!r}: remove it; the method "
                    f"takes {', '.join(taken)}"
                )


@checked
class LossConfig:
    """Asymmetric loss (Ridnik et al. 2021; paper, section on optimisation)."""

    gamma_negative: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Focusing exponent of absent labels; at least `gamma_positive`."""
    gamma_positive: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Focusing exponent of present labels."""
    margin: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Absent labels with a probability below it cost nothing."""

    def __post_init__(self) -> None:
        """Raises ValueError when positives are focused on harder than negatives."""
        if self.gamma_negative < self.gamma_positive:
            raise ValueError(
                f"gamma_negative={self.gamma_negative} is below gamma_positive={self.gamma_positive}: "
                "the loss must focus at least as hard on negatives"
            )


@checked
class TrainingConfig:
    """What a site does in a round, and for how many rounds."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Communication rounds."""
    local_steps: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Optimiser steps per round and site; not given means `local_epochs` passes over the site's records."""
    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over the site's records per round when `local_steps` is not given. Under differential privacy a pass is
    1 / sample_rate steps."""
    batch_size: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Records per step; not given is 32. Not given under differential privacy, where `privacy.sample_rate` decides."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """`sgd` (paper) or `adam`; its state starts anew in every round."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.001
    """Step size."""
    group_rates: dict[Group, Factor] = field(default_factory=dict)
    """Factors on the step size by group of parameters (`contexts`, `adapters`, `gate`, `head`); 1 for a group that is
    not named."""
    momentum: Annotated[float, Field(ge=0, le=0.9999)] = 0.9
    """Momentum of sgd, or beta1 of adam."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-5
    """L2 penalty."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` over the rounds (paper), or `constant`."""
    loss_weight: Annotated[float, Field(gt=0, le=1000)] = 0.64
    """Factor on the loss summed over classes and averaged over records."""


@checked
class PrivacyConfig:
    """Differential privacy of everything that a site's update says of its training records (DP-SGD)."""

    mechanism: Literal["dp-sgd", "none"] = "dp-sgd"
    """`dp-sgd`, or `none`, which runs only at sites that allow it (`privacy.allow_unprotected`)."""
    unit: Literal["record", "group"] = "record"
    """What is protected: a `record`, or a `group` of records (a patient; the manifest's `group` column)."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] = 8.0
    """Most that this job may spend at a site over all rounds, failed attempts included."""
    delta: Annotated[float, Field(gt=0, le=0.1)] = 1e-5
    """At this delta; must be below one over the number of units at every site."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Probability with which each unit takes part in a step (Poisson sampling)."""
    noise_multiplier: Annotated[float | None, Field(gt=0, le=10_000)] = None
    """Noise standard deviation over clip norm; not given is the least that keeps the whole job within `epsilon`, worked
    out when the job is read."""
    noise: Literal["site", "distributed"] = "site"
    """`site`: each site adds the whole noise to its own update. `distributed`: each adds a share, so that any
    `federation.min_sites` less `secagg.colluders` of them together add the whole; needs secure aggregation, one step a
    round, and a site's consent to what is left if the masks fail (`privacy.epsilon_alone` in its site file)."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Bound on the L2 norm of one unit's gradient."""
    group_norms: dict[Group, Bound] = field(default_factory=dict)
    """Bounds by group of parameters (`contexts`, `adapters`, `gate`, `head`) instead of the single one."""
    engine: Literal["exact", "feature_space"] = "feature_space"
    """`feature_space` adds noise to the gradients of the text features and pulls the noisy sum back through the text
    tower once; `exact` adds it to the gradients of the contexts themselves, at the cost of a pass through the text
    tower per record. They differ only where contexts are trained (docs/privacy.md says which to take)."""

    @property
    def private(self) -> bool:
        """Whether updates are differentially private."""
        return self.mechanism == "dp-sgd"

    @property
    def distributed(self) -> bool:
        """Whether sites share the noise of a sum."""
        return self.private and self.noise == "distributed"


@checked
class JobConfig:
    """One agreed job: classes, model, training, privacy, secure aggregation, federation."""

    name: Name
    """Letters, digits, `_`, `-`; at most 64."""
    classes: Once[Annotated[tuple[Label, ...], Field(min_length=2, max_length=2000)]]
    """The labels, in the order of every score vector."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Fixes initial weights, batch order and the embedded pictures."""
    unseen_classes: Once[tuple[Label, ...]] = ()
    """Labels that are scored beside `classes` and never trained (generalised zero-shot)."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen towers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is tuned: FedMPT, or a baseline."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Rounds, steps and optimiser."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Differential privacy of what leaves a site."""
    secagg: SecAggConfig = field(default_factory=SecAggConfig)
    """Secure aggregation of the updates."""
    federation: FederationConfig = field(default_factory=FederationConfig)
    """Sites, weights and timeouts."""
    server: ServerStepConfig = field(default_factory=ServerStepConfig)
    """What the server does with sums whose noise is distributed."""
    resume: ResumeConfig | None = None
    """Which run to continue; not given starts anew."""
    schema: Annotated[int, Field(json_schema_extra={"const": SCHEMA_VERSION})] = SCHEMA_VERSION
    """Version of these keys."""

    def __post_init__(self) -> None:
        """Raises ValueError when fields contradict each other."""
        if self.schema != SCHEMA_VERSION:
            raise ValueError(f"schema={self.schema} is not supported: this release reads schema {SCHEMA_VERSION}")
        if len(self.all_classes) > 2000:
            raise ValueError(f"unseen_classes: {len(self.all_classes)} labels with classes: give at most 2000 in all")
        if same := alike(self.all_classes):
            raise ValueError(f"unseen_classes: with classes it lists {same}: give none of them in classes too")
        if self.privacy.private and self.training.batch_size is not None:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} has no meaning under differential privacy, where "
                f"every record takes part with probability privacy.sample_rate={self.privacy.sample_rate}: remove it"
            )
        if self.secagg.masked:
            self._check_masked()
        if self.privacy.noise == "distributed":
            self._check_distributed()
        elif given := changed(self.server):
            raise ValueError(
                f"server.{given[0]} is for privacy.noise = 'distributed'; else sites train by the table "
                "[training] and the server averages: remove it"
            )
        if self.resume and self.resume.round >= self.training.rounds:
            raise ValueError(
                f"resume.round={self.resume.round}: the job has {self.training.rounds} rounds, nothing is left to do"
            )

    def _check_masked(self) -> None:
        sites, secagg = self.federation.min_sites, self.secagg
        if not self.privacy.distributed:
            headroom(secagg.max_sites, secagg.value_range, secagg.fraction_bits)
        if not LEAST_COHORT <= sites <= secagg.max_sites:
            raise ValueError(
                f"federation.min_sites={sites}: secure aggregation hides a site among at least {LEAST_COHORT} and at "
                f"most secagg.max_sites={secagg.max_sites}. With two sites either alone could work out the other's: "
                "find a third, or show updates to the server, with [secagg] mechanism = 'none' in the job and "
                "[secagg] allow_unmasked = true in each site's own file"
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

    def _check_distributed(self) -> None:
        given = [name for name in changed(self.training) if name not in ("rounds", "local_steps", "loss_weight")]
        masks = [name for name in changed(self.secagg) if name in ("value_range", "fraction_bits", "rounding")]
        problems = [
            (not self.privacy.private, "it is noise of privacy.mechanism = 'dp-sgd': set that, or remove it"),
            (not self.secagg.masked, "a share protects nothing by itself: set secagg.mechanism = 'pairwise-masking'"),
            (
                self.secagg.colluders < 1,
                "secagg.colluders=0: every member knows its own share, so at least one must be reckoned with: set 1",
            ),
            (
                self.honest < 2,
                f"federation.min_sites={self.federation.min_sites} less secagg.colluders={self.secagg.colluders} "
                "leaves fewer than 2 sites to share the noise: raise min_sites, or use privacy.noise = 'site'",
            ),
            (
                self.training.local_steps != 1,
                "a second step would follow from the first one's sum, which one share alone protects: set "
                "training.local_steps = 1, and training.rounds to the steps that you want",
            ),
            (
                self.federation.weighting != "records",
                "sums are over records: set federation.weighting = 'records', and secagg.max_weight to the largest "
                "site's number of units",
            ),
            (
                self.privacy.engine != "exact",
                "noise on text features is no noise on what is summed: set privacy.engine = 'exact'",
            ),
            (bool(given), f"training.{''.join(given[:1])} is a site's, but the server steps: use the table [server]"),
            (bool(masks), f"secagg.{''.join(masks[:1])} is not used: the grid follows from the noise: remove it"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(f"privacy.noise='distributed': {sentence}")

    @property
    def honest(self) -> int:
        """Sites whose shares of the noise make up what is claimed, with `privacy.noise = "distributed"`."""
        return self.federation.min_sites - self.secagg.colluders

    @property
    def all_classes(self) -> tuple[str, ...]:
        """Trained, then unseen labels: the columns of `val` and `test` targets."""
        return (*self.classes, *self.unseen_classes)

    @property
    def first_round(self) -> int:
        """Number of the first round to train."""
        return self.resume.round + 1 if self.resume else 1

    @property
    def earlier_runs(self) -> tuple[EarlierRun, ...]:
        """Those that the job goes on from, newest first."""
        return self.resume.runs if self.resume else ()

    @property
    def continued(self) -> tuple[str, ...]:
        """Their names; what they spent counts as the job's."""
        return tuple(run.job for run in self.earlier_runs)

    @property
    def steps_per_round(self) -> int:
        """Noisy steps of a site in a round; public, since it depends on the job alone (differential privacy only)."""
        return self.training.local_steps or self.training.local_epochs * ceil(1 / self.privacy.sample_rate)

    def is_judged(self, trained: int) -> bool:
        """Whether the job asks sites for figures after so many rounds of training; 0 is the model before any."""
        every = self.federation.evaluate_every
        return every > 0 and (trained % every == 0 or trained == self.training.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, every field present."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON of every field."""
        return canonical_digest(self.to_dict())
