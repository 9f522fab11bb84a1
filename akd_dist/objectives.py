"""The objectives as pure functions: a student's stages, the annealing schedule, the losses, the learning rate.

Nothing here holds state. Every loss is returned per row, so that the caller can take the exact mean of a global batch
however it is cut into ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from akd_dist.recipe import AnnealingKD, HardLabels, Linear, Objective, Schedule, Steps
from akd_dist.storage.errors import RecipeError


@dataclass(frozen=True)
class Stage:
    """One stage of training. It starts from the best validation weights of the stage before, with a fresh optimizer."""

    name: str
    """`annealing` (stage I) or `hard_labels` (stage II, and the whole of training from scratch)."""
    epochs: int
    """Length in epochs."""
    tau_max: int | None = None
    """The temperature of the first epoch; None without annealing."""
    reduction: str = "mean"
    """How the squared norm is reduced over classes: `mean` or `sum`."""

    @property
    def needs_logits(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return self.tau_max is not None

    def temperature(self, epoch: int) -> int | None:
        """T of a 0-based epoch of this stage, None where there is no teacher."""
        return None if self.tau_max is None else temperature(epoch + 1, self.epochs, self.tau_max)

    def phi(self, epoch: int) -> float | None:
        """Phi(T) of a 0-based epoch of this stage, None where there is no teacher."""
        return None if self.tau_max is None else phi(temperature(epoch + 1, self.epochs, self.tau_max), self.tau_max)


def stages(objective: Objective) -> tuple[Stage, ...]:
    """The stages of an objective, in order."""
    match objective:
        case AnnealingKD():
            annealing = Stage("annealing", objective.stage1_epochs, objective.tau_max, objective.reduction)
            return (annealing, Stage("hard_labels", objective.stage2_epochs))
        case HardLabels():
            return (Stage("hard_labels", objective.epochs),)
        case _:
            raise NotImplementedError(objective.kind)


def temperature(i: int, n: int, tau_max: int) -> int:
    """T_i = max(1, tau_max - floor((i - 1) * tau_max / n)): the temperature of epoch i = 1..n of stage I.

    It starts at tau_max, falls in steps as even as whole epochs allow, and always lands on 1. Where tau_max divides n
    it equals the schedule of the authors' code (Jafari et al., EACL 2021), which overshoots elsewhere.

    Raises:
        RecipeError: n < tau_max, where the temperature could not reach 1.
    """
    if n < tau_max:
        raise RecipeError(
            "stage I is too short for its temperatures",
            got=f"stage1_epochs = {n}, tau_max = {tau_max}",
            expected="stage1_epochs at least tau_max: every temperature from tau_max to 1 needs an epoch",
            next="raise stage1_epochs or lower tau_max",
        )
    return max(1, tau_max - (i - 1) * tau_max // n)


def phi(temperature: int, tau_max: int) -> float:
    """Phi(T) = 1 - (T - 1) / tau_max, the paper's annealing function: from 1 / tau_max at T = tau_max to 1 at T = 1."""
    return 1 - (temperature - 1) / tau_max


def annealing_losses(
    z_student: torch.Tensor, z_teacher: torch.Tensor, phi: float, reduction: str = "mean"
) -> torch.Tensor:
    """|| z_s(x) - Phi(T) z_t(x) ||^2 of each row: the loss of stage I (Jafari et al., EACL 2021), on raw logits.

    The paper writes the squared norm, a sum over classes; the authors' code takes the mean over batch and classes. The
    mean is the default here because the paper's learning rates belong to it.

    Args:
        z_student: float [n, classes].
        z_teacher: float [n, classes] of any float type; computed in the student's.
        phi: the annealing factor.
        reduction: `mean` or `sum` over classes.

    Returns:
        float [n].
    """
    squares = (z_student - phi * z_teacher.to(z_student.dtype)).square()
    return squares.mean(dim=1) if reduction == "mean" else squares.sum(dim=1)


def hard_label_losses(z_student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row: logits float [n, classes], labels int64 [n] -> float [n]."""
    return functional.cross_entropy(z_student, labels, reduction="none")


def row_losses(
    stage: Stage, epoch: int, z_student: torch.Tensor, z_teacher: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """The loss of each row in a 0-based epoch of a stage: float [n]."""
    factor = stage.phi(epoch)
    if factor is None:
        return hard_label_losses(z_student, labels)
    assert z_teacher is not None, "a stage with annealing needs the teacher's logits"
    return annealing_losses(z_student, z_teacher, factor, stage.reduction)


def learning_rate(base: float, schedule: Schedule, step: int, total: int) -> float:
    """The learning rate of a 0-based step in a stage of `total` steps."""
    match schedule:
        case Steps():
            drops = sum(step >= share * total for share in schedule.at)
            return float(base * schedule.factor**drops)
        case Linear():
            return base * (1 - step / total)
        case _:
            return base
