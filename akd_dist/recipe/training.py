"""How a model is trained: optimizers, schedules, objectives, and what every training has."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, JsonValue, field_validator, model_validator

from akd_dist.recipe.base import (
    FACTORY,
    Count,
    Decay,
    Epochs,
    Factory,
    Growing,
    LearningRate,
    Momentum,
    Name,
    NotRightError,
    Positive,
    Seed,
    Share,
    Spec,
    label_of_call,
)
from akd_dist.recipe.models import LanguageModel, Model

ScheduleKind = Annotated[Name, Field(description="Which kind of schedule this is.")]
OptimizerKind = Annotated[Name, Field(description="Which kind of optimizer this is.")]
ObjectiveKind = Annotated[Name, Field(description="Which kind of objective this is.")]


class Constant(Spec):
    """The learning rate stays as it is."""

    kind: ScheduleKind[Literal["constant"]] = "constant"


class Steps(Spec):
    """The learning rate is multiplied by `factor` at each of the given shares of every stage."""

    kind: ScheduleKind[Literal["steps"]] = "steps"
    at: list[Share] = Field(default=[0.5, 0.75], min_length=1)
    """Shares of the stage, rising."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What the learning rate is multiplied by."""

    @field_validator("at")
    @classmethod
    def _rising(cls, at: list[float]) -> list[float]:
        if sorted(set(at)) != at:
            raise ValueError("the shares must rise")
        return at


Warmup = Annotated[float, Field(ge=0, lt=1)]


class Linear(Growing):
    """The learning rate falls to 0 along a straight line over every stage."""

    later: ClassVar[tuple[str, ...]] = ("warmup",)

    kind: ScheduleKind[Literal["linear"]] = "linear"
    warmup: Warmup = 0.0
    """Share of every stage in which the learning rate first rises to `lr` along a straight line."""


class Cosine(Spec):
    """The learning rate falls to 0 along half a cosine over every stage."""

    kind: ScheduleKind[Literal["cosine"]] = "cosine"
    warmup: Warmup = 0.0
    """Share of every stage in which the learning rate first rises to `lr` along a straight line."""


Schedule = Annotated[Constant | Steps | Linear | Cosine, Discriminator("kind")]


class Sgd(Spec):
    """Stochastic gradient descent with momentum."""

    kind: OptimizerKind[Literal["sgd"]] = "sgd"
    lr: LearningRate
    """Learning rate at the start of each stage."""
    momentum: Momentum = 0.9
    """Momentum."""
    weight_decay: Decay = 0.0
    """Weight decay, added to the gradient."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    clip: Positive | None = None
    """The largest norm of the gradient over all weights; longer ones are scaled down to it. None does not clip."""
    schedule: Schedule = Constant()
    """How the learning rate changes within a stage."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Growing):
    """Adam with decoupled weight decay."""

    later: ClassVar[tuple[str, ...]] = ("eps",)

    kind: OptimizerKind[Literal["adamw"]] = "adamw"
    lr: LearningRate
    """Learning rate at the start of each stage."""
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the running mean and of the running square."""
    eps: Positive = 1e-8
    """What is added to the root of the running square. Gradients of a mean over a large vocabulary are as small as
    that: take 1e-12 for `stage1_loss: squared` of language models."""
    weight_decay: Decay = 0.01
    """Weight decay, apart from the gradient."""
    clip: Positive | None = None
    """The largest norm of the gradient over all weights; longer ones are scaled down to it. None does not clip."""
    schedule: Schedule = Constant()
    """How the learning rate changes within a stage."""


Optimizer = Annotated[Sgd | AdamW, Discriminator("kind")]
# Whose word a student takes: the labels alone, or also the logits of the teacher or of its last assistant.
LearnsFrom = Literal["labels", "teacher", "assistant"]


class AnnealingKD(Growing):
    """Annealing-KD (Jafari et al., EACL 2021, arXiv 2104.07163): stage I on logits, stage II on labels."""

    learns_from: ClassVar[LearnsFrom] = "teacher"
    later: ClassVar[tuple[str, ...]] = ("stage1_loss", "center")

    kind: ObjectiveKind[Literal["annealing_kd"]] = "annealing_kd"
    tau_max: Count
    """The temperature of the first epoch; it falls to 1 over stage I."""
    stage1_epochs: Epochs
    """Epochs of stage I, at least tau_max."""
    stage2_epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    """Epochs of stage II, which starts from stage I's best validation epoch; 0 leaves it out, and with it the labels.
    """
    stage2_optimizer: Optimizer | None = None
    """The optimizer of stage II, whose loss is another one; none takes the student's."""
    reduction: Literal["mean", "sum"] = "mean"
    """The squared norm over classes: `mean` as in the authors' code, to which their learning rates belong, or `sum` as
    in the paper."""
    stage1_loss: Literal["squared", "cross_entropy"] | None = None
    """What stage I compares annealed logits by: `squared`, the paper's distance; or `cross_entropy` of the student to
    their softmax. None takes cross_entropy for language models, and squared for others."""
    center: bool | None = None
    """Whether the squared norm is one of logits less their mean over classes, which no softmax sees; none does so for
    language models, whose logits are mostly that mean, and not for others."""

    @model_validator(mode="after")
    def _centers_what_is_squared(self) -> AnnealingKD:
        if self.center is not None and self.stage1_loss == "cross_entropy":
            raise NotRightError(
                "center is for the squared norm, and stage1_loss is cross_entropy: a softmax does not see the mean",
                "it left out",
                ("center",),
            )
        return self

    @model_validator(mode="after")
    def _reaches_one(self) -> AnnealingKD:
        if self.stage1_epochs < self.tau_max:
            raise ValueError(
                f"stage1_epochs is {self.stage1_epochs} and tau_max is {self.tau_max}: "
                "stage I needs at least tau_max epochs for the temperature to reach 1"
            )
        return self

    @model_validator(mode="after")
    def _optimizes_a_stage(self) -> AnnealingKD:
        if self.stage2_optimizer is not None and self.stage2_epochs == 0:
            raise ValueError("stage2_optimizer is given, and stage2_epochs is 0: there is no stage II")
        return self

    def loss_of_stage1(self, *, language: bool) -> str:
        """`squared` or `cross_entropy`; of language models, or of others."""
        return self.stage1_loss or ("cross_entropy" if language else "squared")

    def lowest_temperature(self, *, language: bool) -> float | None:
        """The lowest temperature that the teacher's softmax is asked for at; None where it is not."""
        return 1.0 if self.loss_of_stage1(language=language) == "cross_entropy" else None

    @property
    def epochs(self) -> int:
        """Epochs of both stages."""
        return self.stage1_epochs + self.stage2_epochs

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads labels."""
        return self.stage2_epochs > 0

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class HardLabels(Spec):
    """The labels alone (cross-entropy; squared error for regression): from scratch, and how a teacher is trained."""

    learns_from: ClassVar[LearnsFrom] = "labels"

    kind: ObjectiveKind[Literal["hard_labels"]] = "hard_labels"
    epochs: Epochs
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""

    def lowest_temperature(self, *, language: bool) -> float | None:
        """As of `AnnealingKD`."""
        return None

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads labels."""
        return True

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class Distilled(Spec):
    """What KD and TAKD have in common: labels and softened logits, mixed."""

    epochs: Epochs
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""
    temperature: Positive = 5.0
    """What logits of student and teacher are divided by before the softmax."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher in the loss; the rest is the labels'."""

    def lowest_temperature(self, *, language: bool) -> float | None:
        """As of `AnnealingKD`."""
        return self.temperature if self.alpha > 0 else None

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads labels."""
        return self.alpha < 1


class Kd(Distilled):
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531): labels and softened teacher, mixed.

    For regression, where there is no softmax, the squared errors to the label and to the teacher, mixed.
    """

    learns_from: ClassVar[LearnsFrom] = "teacher"

    kind: ObjectiveKind[Literal["kd"]] = "kd"

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class Takd(Distilled):
    """KD from the last assistant of `teacher.assistant` (TAKD: Mirzadeh et al., AAAI 2020, arXiv 1902.03393)."""

    learns_from: ClassVar[LearnsFrom] = "assistant"

    kind: ObjectiveKind[Literal["takd"]] = "takd"

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class ContinuationKD(Growing):
    """Continuation-KD (Jafari et al., EMNLP 2022, arXiv 2212.05998): one stage, from annealed logits to the labels."""

    learns_from: ClassVar[LearnsFrom] = "teacher"
    later: ClassVar[tuple[str, ...]] = ("center",)

    kind: ObjectiveKind[Literal["continuation_kd"]] = "continuation_kd"
    tau_max: Count
    """The temperature of the first epoch; it falls by 1 every floor(epochs / tau_max) epochs."""
    epochs: Epochs
    """Epochs, at least tau_max."""
    ramp: Count | None = None
    """psi, the weight of the labels, is i / ramp in epoch i = 1, 2, ...; none takes three quarters of the epochs."""
    ramp_until: Count | None = None
    """The last epoch of the ramp, after which psi is 1; none takes the epoch in which it arrives there."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """m: distances to the teacher's logits below m * Phi cost nothing."""
    reduction: Literal["mean", "sum"] = "mean"
    """The squared norm over classes, to which the margin applies: `mean` or `sum`."""
    center: bool | None = None
    """Whether the squared norm is one of logits less their mean over classes, which no softmax sees; none does so for
    language models, whose logits are mostly that mean, and not for others."""

    @model_validator(mode="after")
    def _reaches_one(self) -> ContinuationKD:
        if self.epochs < self.tau_max:
            raise ValueError(
                f"epochs is {self.epochs} and tau_max is {self.tau_max}: "
                "at least tau_max epochs are needed for the temperature to reach 1"
            )
        return self

    def lowest_temperature(self, *, language: bool) -> float | None:
        """As of `AnnealingKD`."""
        return None

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads labels."""
        return True

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class CustomObjective(Factory):
    """Your own objective: a function that gives the loss of each row, from logits and labels.

    It is called as function(student, teacher, labels, epoch, epochs, **arguments), as docs/howto/models.md shows.
    """

    kind: ObjectiveKind[Literal["custom"]] = "custom"
    factory: str = Field(pattern=FACTORY)
    """`module:function`; it returns a loss for each row, [n], of the dtype of the student's logits."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""
    epochs: Epochs
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""
    learns_from: Literal["teacher", "labels"] = "teacher"
    """Whether it reads the teacher's logits; with `labels` it is given none, and the store is not read for it. Rows
    without labels (`data.unlabelled`) have -1, or NaN for regression; with `labels` they are not shown to it."""

    def lowest_temperature(self, *, language: bool) -> float | None:
        """As of `AnnealingKD`."""
        return None

    @property
    def reads_labels(self) -> bool:
        """Whether it cannot do without labels."""
        return self.learns_from == "labels"

    @property
    def label(self) -> str:
        """The function's name, and its arguments as far as they are plain: `soft_loss-temperature2`."""
        return label_of_call(self.factory, self.arguments)


Objective = Annotated[AnnealingKD | HardLabels | Kd | Takd | ContinuationKD | CustomObjective, Discriminator("kind")]
Precision = Literal["float32", "float64", "bfloat16", "float16"]
LastBatch = Literal["keep", "drop", "merge"]
Stacked = Literal["auto", "always", "never"]


class Training(Growing):
    """What every training run has."""

    later: ClassVar[tuple[str, ...]] = ("epoch_steps", "micro_batch", "gradient_checkpointing")

    optimizer: Optimizer
    """The optimizer, made afresh for each stage."""
    batch: Count = 64
    """Rows of a global batch, over all workers."""
    last_batch: LastBatch = "keep"
    """What becomes of an epoch's last batch where fewer rows are left for it than `batch` says: it is kept; or dropped,
    so that other rows are left out in each epoch; or merged with the batch before it."""
    seed: Seed = 0
    """Governs initialisation and dropout; the order of rows belongs to data.seed."""
    threads: Count = 1
    """CPU threads of each worker. Part of the result: another number may change the last bits of the weights."""
    precision: Precision = "float32"
    """Numbers that it computes with: float32 or float64 throughout, or bfloat16 or float16 where autocast allows it,
    on weights kept in float32."""
    epoch_steps: Count | None = None
    """How many batches make an epoch, at whose end it is evaluated and the temperature may fall; the next epoch goes on
    in the rows where this one ended. None takes as many as one pass over the rows has."""
    micro_batch: Count | None = None
    """Of language models: rows that a worker computes at a time, of its share of a batch, so that large batches fit the
    memory. The loss stays that of the whole batch. None takes all at once."""
    gradient_checkpointing: bool = False
    """Of language models: whether states within layers are computed again for the gradient instead of being kept."""

    def why_not_for(self, model: Model) -> NotRightError | None:
        """What of it is for language models alone, where the model that is trained is none."""
        given = [key for key in ("micro_batch", "gradient_checkpointing") if getattr(self, key)]
        if not given or isinstance(model, LanguageModel):
            return None
        return NotRightError(
            f"{given[0]} is for language models, and the model is {model.kind}", "it left out", (given[0],)
        )


class Learning(Training):
    """What students and assistants have: what they learn, and from which rows."""

    model: Model
    """Its architecture."""
    objective: Objective
    """What it is trained on."""
    labelled: Count | None = None
    """How many of a batch's rows have labels, where there are rows without (data.unlabelled) and the loss mixes labels
    and teacher: an epoch is then one pass over the rows without labels, and those with labels go round. None takes the
    rows as they fall when all are shuffled together."""

    @property
    def is_language_model(self) -> bool:
        """Whether it is a language model that learns."""
        return isinstance(self.model, LanguageModel)

    @model_validator(mode="after")
    def _computes_as_its_model_can(self) -> Learning:
        if (why := self.why_not_for(self.model)) is not None:
            raise why
        return self

    @model_validator(mode="after")
    def _mixes(self) -> Learning:
        if self.labelled is None:
            return self
        mixes = isinstance(self.objective, Distilled | ContinuationKD | CustomObjective)
        if not mixes or self.objective.learns_from == "labels":
            raise NotRightError(
                f"{self.objective.kind} reads either the rows with labels or all rows, so its batches are not mixed",
                "labelled left out, or an objective that mixes labels and teacher in one batch: kd, takd, "
                "continuation_kd",
                ("labelled",),
            )
        if self.labelled >= self.batch:
            raise NotRightError(
                f"labelled is {self.labelled} and batch is {self.batch}, and a batch needs rows without labels, too",
                f"at most {self.batch - 1}" if self.batch > 1 else "a larger batch",
                ("labelled",),
            )
        return self
