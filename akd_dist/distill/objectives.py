"""The objectives as pure functions: a student's stages, and the loss of each.

Nothing here holds state. Every loss is returned per row, so that the caller can take the exact mean of a global batch
however it is cut into ranks. A further objective is a small frozen class with `losses`, and a line in `stages`.

Where a store describes the teacher's logits, or there are too many of the student's, a loss is a `Term` on targets: of
logits that are there, or through the output head of a language model.

In formulas z_s and z_t are the raw logits of student and teacher, y the label, and ||.||^2 the squared norm over
classes. The dtype of the labels tells the task: int64 are class ids, a float type is the numbers of a regression.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from akd_dist.distill.hooks import LOSSES, function_of, own_losses
from akd_dist.distill.losses import (
    Number,
    annealed_entropies,
    annealing_losses,
    at_least_float32,
    label_losses,
    softened_losses,
)
from akd_dist.distill.orders import LABELLED, Mix
from akd_dist.distill.output_head import Head
from akd_dist.distill.schedules import continuation_temperature, phi, psi, temperature
from akd_dist.distill.sparse_losses import Annealed, Hinged, Labels, Mixed, Softened, Squared, Term
from akd_dist.distill.squared_losses import continuation_loss, squared_loss
from akd_dist.distill.stage import Stage as Stage
from akd_dist.distill.teacher_targets import Targets
from akd_dist.recipe import AnnealingKD, ContinuationKD, CustomObjective, HardLabels, Kd, Learning, Objective, Takd


@dataclass(frozen=True)
class HardLabelStage(Stage):
    """The labels alone: stage II of Annealing-KD, and the whole of training from scratch."""

    name: ClassVar[str] = "hard_labels"
    needs_logits: ClassVar[bool] = False

    @property
    def needs_raw_logits(self) -> bool:
        """No: it reads none."""
        return False

    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """Cross-entropy; the squared error for regression."""
        return label_losses(z_student, labels, label_weight)

    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """Cross-entropy."""
        return Mixed(((label_weight, Labels(labels)),))


@dataclass(frozen=True)
class AnnealingStage(Stage):
    """Stage I of Annealing-KD (Jafari et al., EACL 2021): || z_s - Phi(T_i) z_t ||^2, the labels unread.

    Or the same idea with the loss of a softmax, the cross-entropy of softmax(z_s) to softmax(Phi z_t).
    """

    name: ClassVar[str] = "annealing"

    tau_max: int
    """The temperature of the first epoch."""
    reduction: str = "mean"
    """How the squared norm is reduced over classes: `mean` or `sum`."""
    by: str = "squared"
    """What it compares by: `squared`, or `cross_entropy`."""
    center: bool = False
    """Whether the squared norm is one of centred logits, whose mean over classes is 0."""

    def numbers(self, epoch: int) -> dict[str, float]:
        """Phi."""
        return {"phi": self.phi(epoch)}

    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """The squared distance to the annealed logits; the same for regression, with its one number."""
        assert z_teacher is not None
        if self.by == "cross_entropy":
            return annealed_entropies(z_student, z_teacher, numbers["phi"])
        return annealing_losses(z_student, z_teacher, numbers["phi"], self.reduction, center=self.center)

    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """The same."""
        assert targets is not None
        if self.by == "cross_entropy":
            return Annealed(targets, self.phi(epoch))
        return Squared(targets, self.phi(epoch), self.center, self.reduction)

    def through_head(
        self, epoch: int, h: Tensor, head: Head, targets: Targets | None, labels: Tensor, total: float
    ) -> Tensor:
        """The same; the squared norm without a vocabulary where targets and head allow it."""
        if self.by == "cross_entropy":
            return super().through_head(epoch, h, head, targets, labels, total)
        assert targets is not None
        form: dict[str, Any] = {"center": self.center, "reduction": self.reduction, "total": total}
        return squared_loss(h, head, targets, self.phi(epoch), **form)

    @property
    def needs_linear_head(self) -> bool:
        """Where it is the squared norm."""
        return self.by == "squared"

    @property
    def needs_raw_logits(self) -> bool:
        """Where it is the squared norm, and of logits as they are."""
        return self.by == "squared" and not self.center

    def temperature(self, epoch: int) -> int:
        """T of a 0-based epoch: see `temperature`."""
        return temperature(epoch + 1, self.epochs, self.tau_max)

    def phi(self, epoch: int) -> float:
        """Phi(T) of a 0-based epoch."""
        return phi(self.temperature(epoch), self.tau_max)


@dataclass(frozen=True)
class KdStage(Stage):
    """KD (Hinton et al., 2015), and a hop of TAKD (Mirzadeh et al., 2020), where the teacher is an assistant."""

    name: ClassVar[str] = "kd"

    softening: float
    """The temperature that both sides' logits are divided by before the softmax."""
    alpha: float
    """Share of the teacher in the loss."""

    @property
    def needs_raw_logits(self) -> bool:
        """No: a softmax reads them."""
        return False

    def numbers(self, epoch: int) -> dict[str, float]:
        """T, and the shares of teacher and labels."""
        return {"softening": self.softening, "share_of_teacher": self.alpha, "share_of_labels": 1 - self.alpha}

    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """(1 - a) CE(y, z_s) + a T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

        A regression has no softmax to soften; there it is (1 - a) (y - z_s)^2 + a (z_s - z_t)^2, without a temperature.
        """
        assert z_teacher is not None
        if labels.is_floating_point():
            from_teacher = annealing_losses(z_student, z_teacher, 1.0)
        else:
            from_teacher = softened_losses(z_student, z_teacher, numbers["softening"])
        from_labels = label_losses(z_student, labels, label_weight)
        return numbers["share_of_labels"] * from_labels + numbers["share_of_teacher"] * from_teacher

    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """The same."""
        assert targets is not None
        return Mixed(
            (((1 - self.alpha) * label_weight, Labels(labels)), (self.alpha, Softened(targets, self.softening)))
        )


@dataclass(frozen=True)
class ContinuationStage(Stage):
    """Continuation-KD (Jafari et al., EMNLP 2022, arXiv 2212.05998), in one stage from annealed logits to labels."""

    name: ClassVar[str] = "continuation"

    tau_max: int
    """The temperature of the first epoch."""
    ramp: int
    """psi is i / ramp in epoch i = 1, 2, ..."""
    ramp_until: int
    """... up to this epoch, and 1 afterwards."""
    margin: float = 0.0
    """m: what the distance to the annealed logits may be at Phi = 1 without a cost."""
    reduction: str = "mean"
    """How the squared norm is reduced over classes, before the margin is taken off: `mean` or `sum`."""
    center: bool = False
    """Whether it is one of centred logits."""

    def numbers(self, epoch: int) -> dict[str, float]:
        """Phi, m Phi, psi and 1 - psi."""
        phi, psi = self.phi(epoch), self.psi(epoch)
        return {"phi": phi, "margin": self.margin * phi, "psi": psi, "rest": 1 - psi}

    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """psi_i CE(y, z_s) + (1 - psi_i) max(0, || z_s - Phi z_t ||^2 - m Phi); squared error for CE in regression."""
        assert z_teacher is not None
        distances = annealing_losses(z_student, z_teacher, numbers["phi"], self.reduction, center=self.center)
        hinged = (distances - numbers["margin"]).clamp(min=0)
        return numbers["psi"] * label_losses(z_student, labels, label_weight) + numbers["rest"] * hinged

    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """The same."""
        assert targets is not None
        phi, psi = self.phi(epoch), self.psi(epoch)
        distance = Hinged(Squared(targets, phi, self.center, self.reduction), self.margin * phi)
        return Mixed(((psi * label_weight, Labels(labels)), (1 - psi, distance)))

    def through_head(
        self, epoch: int, h: Tensor, head: Head, targets: Targets | None, labels: Tensor, total: float
    ) -> Tensor:
        """The same; the squared norm without a vocabulary where targets and head allow it."""
        assert targets is not None
        form: dict[str, Any] = {"center": self.center, "reduction": self.reduction, "total": total}
        shares = self.phi(epoch), self.psi(epoch), self.margin
        return continuation_loss(h, head, targets, labels, *shares, **form)

    @property
    def needs_linear_head(self) -> bool:
        """Always, for the squared norm in it."""
        return True

    @property
    def needs_raw_logits(self) -> bool:
        """Where the squared norm in it is of logits as they are."""
        return not self.center

    def temperature(self, epoch: int) -> int:
        """T of a 0-based epoch: see `continuation_temperature`."""
        return continuation_temperature(epoch + 1, self.epochs, self.tau_max)

    def phi(self, epoch: int) -> float:
        """Phi(T) of a 0-based epoch."""
        return phi(self.temperature(epoch), self.tau_max)

    def psi(self, epoch: int) -> float:
        """psi of a 0-based epoch: see `psi`."""
        return psi(epoch + 1, self.ramp, self.ramp_until)


@dataclass(frozen=True)
class CustomStage(Stage):
    """An objective of the user's own, in one stage."""

    name: ClassVar[str] = "custom"

    spec: CustomObjective
    """Which."""

    def losses(
        self, epoch: int, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float = 1.0
    ) -> Tensor:
        """What its function returns; what rows without a label cost is its own affair."""
        return own_losses(self._function, z_student, z_teacher, labels, epoch, self.epochs)

    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """There is none for several students: the function of somebody else is given one at a time."""
        raise NotImplementedError

    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """Never called: a user's own function takes logits, and recipes refuse it where a store only describes them."""
        raise NotImplementedError

    @property
    def alike(self) -> None:
        """Its own."""
        return None

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        return function_of(self.spec, LOSSES)


@dataclass(frozen=True)
class CustomLabelStage(CustomStage):
    """The same where it reads labels alone."""

    needs_logits: ClassVar[bool] = False

    def losses(
        self, epoch: int, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float = 1.0
    ) -> Tensor:
        """What its function returns; it is given no logits, although other students of the cohort may read them."""
        return super().losses(epoch, z_student, None, labels)


def stages_of(spec: Learning) -> tuple[Stage, ...]:
    """The stages of who learns, in order."""
    return stages(spec.objective, language=spec.is_language_model)


def stages(objective: Objective, *, language: bool = False) -> tuple[Stage, ...]:
    """The stages of an objective, in order.

    Args:
        language: whether it is a language model's, for whom some keys have other defaults.
    """
    center = language if (given := getattr(objective, "center", None)) is None else given
    match objective:
        case AnnealingKD():
            by = objective.loss_of_stage1(language=language)
            center = center and by == "squared"
            annealing = AnnealingStage(objective.stage1_epochs, objective.tau_max, objective.reduction, by, center)
            if not objective.stage2_epochs:
                return (annealing,)
            return (annealing, HardLabelStage(objective.stage2_epochs, optimizer=objective.stage2_optimizer))
        case HardLabels():
            return (HardLabelStage(objective.epochs),)
        case Kd() | Takd():
            return (KdStage(objective.epochs, objective.temperature, objective.alpha),)
        case CustomObjective():
            kind = CustomStage if objective.learns_from == "teacher" else CustomLabelStage
            return (kind(objective.epochs, objective),)
        case ContinuationKD():
            # Three quarters, as in the paper's setting for CIFAR: 150 of 200 epochs.
            ramp = objective.ramp or max(1, 3 * objective.epochs // 4)
            until, form = objective.ramp_until or ramp, (objective.margin, objective.reduction, center)
            return (ContinuationStage(objective.epochs, objective.tau_max, ramp, until, *form),)


def mix_of(stage: Stage, labelled: int | None) -> Mix:
    """Which train rows a stage shows: all, but where it learns from labels alone, only those that have one.

    Args:
        labelled: of the student, as the recipe has it.
    """
    return Mix("all", labelled) if stage.needs_logits else LABELLED


def row_losses(
    stage: Stage,
    epoch: int,
    z_student: Tensor,
    z_teacher: Tensor | None,
    labels: Tensor,
    label_weight: float = 1.0,
) -> Tensor:
    """The loss of each row in a 0-based epoch of a stage, computed in float64 where the student is, else in float32.

    Args:
        z_student: float [n, classes], of half precision too.
        z_teacher: [n, classes] in its stored dtype; None where the stage does not need it.
        labels: int64 [n], or float [n] for regression; -1 or NaN stands for none.
        label_weight: as of `Stage.losses`.

    Returns:
        float32 or float64 [n].
    """
    z_student = at_least_float32(z_student)
    if z_teacher is not None:
        z_teacher = z_teacher.to(z_student.dtype)
    if labels.is_floating_point():
        labels = labels.to(z_student.dtype)
    return stage.losses(epoch, z_student, z_teacher, labels, label_weight)
