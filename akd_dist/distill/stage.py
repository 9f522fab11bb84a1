"""What every stage of training says of itself: which loss of which targets it is, and what that needs to be given."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from akd_dist.distill.losses import Number
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse_losses import Term, loss_of
from akd_dist.distill.teacher_targets import Targets
from akd_dist.recipe import Optimizer


@dataclass(frozen=True)
class Stage(ABC):
    """One stage of training. It starts from the best validation weights of the stage before, with a fresh optimizer."""

    name: ClassVar[str]
    """The kind of stage, as metrics and logs call it."""
    needs_logits: ClassVar[bool] = True
    """Whether the loss reads the teacher's logits."""

    epochs: int
    """Length in epochs."""
    _: KW_ONLY
    optimizer: Optimizer | None = None
    """What its loss is descended by; None takes the student's."""

    def losses(
        self, epoch: int, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float = 1.0
    ) -> Tensor:
        """The loss of each row in a 0-based epoch of this stage.

        Args:
            z_student: float32 or float64 [n, classes].
            z_teacher: [n, classes] of the same dtype; None only where `needs_logits` is False.
            labels: int64 [n], or [n] of the same dtype as the logits for regression, where there is one "class"; -1 or
                NaN stands for none.
            label_weight: what the labels' part of a row counts, so that the mean over all rows is one over those with
                labels (`Batch.label_weight`).

        Returns:
            [n], of the dtype of the logits.
        """
        return self.formula(z_student, z_teacher, labels, label_weight, **self.numbers(epoch))

    def numbers(self, epoch: int) -> dict[str, float]:
        """The numbers in the formula in a 0-based epoch: in these alone students differ that step together."""
        return {}

    @abstractmethod
    def formula(
        self, z_student: Tensor, z_teacher: Tensor | None, labels: Tensor, label_weight: float, **numbers: Number
    ) -> Tensor:
        """The loss of each row; of one student, or of several in one go.

        Args:
            z_student: [n, classes], or [students, n, classes].
            z_teacher, labels, label_weight: as of `losses`: all students see the same rows.
            numbers: as `numbers` has them, or of each student, [students, 1].

        Returns:
            [n], or [students, n].
        """

    @abstractmethod
    def term(self, epoch: int, targets: Targets | None, labels: Tensor, label_weight: float = 1.0) -> Term:
        """The same of targets that a store describes, in a 0-based epoch.

        Args:
            targets: the teacher's; None only where `needs_logits` is False.
            labels: int64 [n]; -1 stands for none.
        """

    def through_head(
        self, epoch: int, h: Tensor, head: Head, targets: Targets | None, labels: Tensor, total: float
    ) -> Tensor:
        """The sum of the losses of targets over `total`, a number, from hidden states h [n, d] and an output head."""
        return loss_of(h, head, self.term(epoch, targets, labels), total=total)

    @property
    def needs_raw_logits(self) -> bool:
        """Whether it would be another loss if a constant were added to all logits of a row, as log-probabilities have
        it: all that a softmax alone reads are no such losses, nor those of centred logits."""
        return True

    @property
    def needs_linear_head(self) -> bool:
        """Whether it is for language models only whose logits are hidden states times the output layer."""
        return False

    @property
    def alike(self) -> Hashable:
        """What stages have in common whose formula is the same but for its numbers; None where it is one student's."""
        return type(self), *(getattr(self, name, None) for name in ("reduction", "center", "by"))

    def temperature(self, epoch: int) -> int | None:
        """T of a 0-based epoch of this stage, None where nothing is annealed."""
        return None

    def phi(self, epoch: int) -> float | None:
        """Phi(T), the factor on the teacher's logits in a 0-based epoch; None where nothing is annealed."""
        return None

    def psi(self, epoch: int) -> float | None:
        """The weight of the labels in a 0-based epoch, where it changes; else None."""
        return None
