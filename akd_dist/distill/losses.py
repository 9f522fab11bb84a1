"""The losses of rows, as pure functions: of one student's logits, or of several students' in one go.

In formulas z_s and z_t are the raw logits of student and teacher, y the label, and ||.||^2 the squared norm over
classes. The dtype of the labels tells the task: int64 are class ids, a float type is the numbers of a regression.
"""

import torch
from torch import Tensor
from torch.nn import functional

Number = float | Tensor
"""A number of one student; or of several students, one each, [students, 1]."""


def label_losses(z_student: Tensor, labels: Tensor, weight: float = 1.0) -> Tensor:
    """Cross-entropy of each row, or its squared error (y - z_s)^2 for regression; 0 where a row has no label.

    Args:
        z_student: float [n, classes]; [n, 1] for regression. Of several students [students, n, classes].
        labels: int64 [n], or float [n] for regression; -1 or NaN stands for none.
        weight: what each of them is multiplied by.

    Returns:
        float [n], or [students, n].
    """
    if labels.is_floating_point():
        z = z_student[..., 0]
        # Not by a mask on the losses: the gradient of what is masked would still be NaN.
        losses = (z - torch.where(labels.isnan(), z.detach(), labels)).square()
    else:
        flat, several = z_student.flatten(0, -2), z_student.shape[:-1]
        losses = functional.cross_entropy(
            flat, labels.expand(several).reshape(-1), ignore_index=-1, reduction="none"
        ).view(several)
    return losses if weight == 1 else weight * losses


def annealing_losses(
    z_student: Tensor, z_teacher: Tensor, phi: Number, reduction: str = "mean", *, center: bool = False
) -> Tensor:
    """|| z_s(x) - Phi(T) z_t(x) ||^2 of each row: the loss of stage I (Jafari et al., EACL 2021), on raw logits.

    The paper writes the squared norm, a sum over classes; the authors' code takes the mean over batch and classes. The
    mean is the default here because the paper's learning rates belong to it.

    Args:
        z_student: float [n, classes], or [students, n, classes].
        z_teacher: float [n, classes] of the same dtype.
        phi: the annealing factor; or that of each student, [students, 1].
        reduction: `mean` or `sum` over classes.
        center: whether the mean over classes is taken off both sides first.

    Returns:
        float [n], or [students, n].
    """
    apart = z_student - _of_rows(phi) * z_teacher
    if center:
        apart = apart - apart.mean(dim=-1, keepdim=True)
    squares = apart.square()
    return squares.mean(dim=-1) if reduction == "mean" else squares.sum(dim=-1)


def annealed_entropies(z_student: Tensor, z_teacher: Tensor, phi: Number) -> Tensor:
    """The cross-entropy of softmax(z_s) to softmax(Phi(T) z_t) of each row; arguments as of `annealing_losses`.

    Returns:
        float [n], or [students, n].
    """
    chances = functional.softmax(_of_rows(phi) * z_teacher, dim=-1)
    return -(chances * functional.log_softmax(z_student, dim=-1)).sum(dim=-1)


def softened_losses(z_student: Tensor, z_teacher: Tensor, temperature: Number) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) of each row (Hinton et al., 2015, arXiv 1503.02531).

    T^2 keeps the size of the gradient when T changes.

    Args:
        z_student: float [n, classes], or [students, n, classes].
        z_teacher: float [n, classes] of the same dtype.
        temperature: T, above 0; or that of each student, [students, 1].

    Returns:
        float [n], or [students, n].
    """
    student = functional.log_softmax(z_student / _of_rows(temperature), dim=-1)
    teacher = functional.log_softmax(z_teacher / _of_rows(temperature), dim=-1)
    if z_student.dim() > 2:
        # A softmax goes along each row, while exp goes over all numbers at once, and the last bit of one may depend on
        # where it stands among them: so on how many students there are.
        chances = functional.softmax(z_teacher / _of_rows(temperature), dim=-1)
        divergence = chances * (teacher - student)
    else:
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(dim=-1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32 where they are of half precision; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _of_rows(number: Number) -> Number:
    """A number of each student, [students, 1], as it stands beside logits, [students, n, classes]."""
    return number[..., None] if isinstance(number, Tensor) else number
