"""Functions of the user's own in training: an objective, a metric, and who is told of the end of an epoch.

They are imported only if they are trusted (`data.factories`), and tried on a few rows before anything starts. What they
get is theirs alone: copies of tensors that other students share, or a document that cannot be changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from akd_dist import recipe
from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.base.tracebacks import whole
from akd_dist.data.arguments import placed
from akd_dist.data.factories import import_factory, source_sha256

LOSSES = "(student, teacher, labels, epoch, epochs, ...) -> torch.Tensor"
METRIC = "(logits, labels, ...) -> float"
CALLBACK = "(epoch_end, ...) -> None"
_TRIED = 8  # rows that an objective is tried on
_MEASURED = 256  # rows that a metric is tried on: enough for one that needs several classes
# A row alone and in a batch may differ in the last bits: kernels treat the ends of an array otherwise than its middle.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6


@dataclass(frozen=True)
class EpochEnd:
    """What a callback is told at the end of an epoch."""

    student: str
    """Its name."""
    epoch: int
    """The epoch that is over, 0-based through all stages."""
    epochs: int
    """Epochs of all stages together."""
    stage: str
    """The kind of stage that it belonged to."""
    train_loss: float
    """The mean loss of its rows."""
    validation: tuple[tuple[str, float], ...]
    """Each metric on the validation rows, and `loss`: `dict(epoch_end.validation)["accuracy"]`."""
    folder: Path
    """The student's folder, where model and metrics will lie."""
    checkpoint: Path | None
    """The newest checkpoint that lies there by now; None before the first."""


class OwnCodeError(Exception):
    """A function of the user's own failed while a student trained: that student ends, and no other."""


def function_of(spec: recipe.Factory, signature: str) -> Callable[..., Any]:
    """The function that a spec names, with its arguments.

    Raises:
        RefusedError: as `factories.import_factory` and `arguments.placed`.
    """
    return functools.partial(import_factory(spec, signature), **placed(spec.arguments, spec.trusted.place))


def objective_by_content(objective: recipe.Objective) -> dict[str, Any]:
    """A spec as JSON, for keys of what is trained by it: the file of a user's own belongs to it.

    Raises:
        RefusedError: its factory cannot be imported.
    """
    return _by_content(objective, LOSSES)


def metric_by_content(metric: recipe.CustomMetric) -> dict[str, Any]:
    """The same of a metric."""
    return _by_content(metric, METRIC)


def _by_content(spec: recipe.Spec, signature: str) -> dict[str, Any]:
    document = spec.model_dump(mode="json")
    return document | {"source": source_sha256(spec, signature)} if isinstance(spec, recipe.Factory) else document


# ---- while a student trains


def own_losses(
    function: Callable[..., Any],
    z_student: Tensor,
    z_teacher: Tensor | None,
    labels: Tensor,
    epoch: int,
    epochs: int,
) -> Tensor:
    """The loss of each row by a function of the user's own, [n], of the dtype of the student's logits.

    Raises:
        OwnCodeError: it returns something else.
        Exception: whatever it raises.
    """
    # Other students of the cohort are about to read the same logits and labels.
    shared = None if z_teacher is None else z_teacher.clone()
    try:
        found = function(student=z_student, teacher=shared, labels=labels.clone(), epoch=epoch, epochs=epochs)
    except (AkdError, SystemExit) as error:  # either would end the others as well
        raise OwnCodeError(f"the objective ended by {type(error).__name__}: {error}") from error
    if (problem := _not_losses(found, z_student)) is not None:
        raise OwnCodeError(f"the objective returned {problem}")
    losses: Tensor = found
    return losses


def _not_losses(found: Any, z_student: Tensor) -> str | None:
    """What is wrong with what an objective returned; None for a loss of each row."""
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} instead of a tensor"
    if found.shape != z_student.shape[:1]:
        return f"a tensor {list(found.shape)} for logits {list(z_student.shape)}, instead of one loss a row"
    if found.dtype != z_student.dtype:
        return f"losses of {found.dtype} for logits of {z_student.dtype}"
    return None


def own_measure(metric: recipe.CustomMetric, logits: Tensor, labels: Tensor) -> float:
    """A metric of the user's own on a whole split, whatever it raises included.

    Args:
        logits: float [n, classes], on the CPU.
        labels: int64 or float [n], on the CPU.

    Raises:
        OwnCodeError: it is no finite number.
    """
    function = function_of(metric, METRIC)
    try:
        found = function(logits=logits.float().numpy().copy(), labels=labels.numpy().copy())
    except (AkdError, SystemExit) as error:
        raise OwnCodeError(f"the metric {metric.factory} ended by {type(error).__name__}: {error}") from error
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise OwnCodeError(f"the metric {metric.factory} returned {found!r} instead of a finite number")
    return value


def tell_epoch_end(callback: recipe.Callback, ended: EpochEnd) -> None:
    """Tell a callback that an epoch is over.

    Raises:
        OwnCodeError: it fails, whatever it raises: no refusal of its own ends the other students.
    """
    try:
        function_of(callback, CALLBACK)(ended)
    except (Exception, SystemExit) as error:
        raise OwnCodeError(f"on_epoch_end, {callback.factory}, failed: {type(error).__name__}: {error}") from error


# ---- tried before anything starts


def try_objective(
    spec: recipe.CustomObjective, classes: int, task: recipe.Task, workers: int = 1, *, unlabelled: bool = False
) -> None:
    """Refuse an objective whose function does not give a loss for each row by itself, in its first and last epoch.

    Args:
        classes: logits of a row.
        workers: how many share a batch: with several, one may have no rows of a small one.
        unlabelled: whether there are train rows without a label, which it is shown where it learns from the teacher.

    Raises:
        RefusedError: it cannot be imported, fails, or returns something else; says what was tried.
    """
    function = function_of(spec, LOSSES)
    generator = torch.Generator().manual_seed(0)
    z_student, z_teacher = (torch.randn(_TRIED, classes, generator=generator) for _ in range(2))
    teacher = 3 * z_teacher if spec.learns_from == "teacher" else None
    labels = torch.arange(_TRIED) % classes if task == "classification" else z_teacher[:, 0].clone()

    if unlabelled and spec.learns_from == "teacher":
        labels[::2] = -1 if task == "classification" else math.nan

    def call(rows: slice, epoch: int) -> Tensor:
        given = z_student[rows].clone().requires_grad_()
        try:
            return _called(function, given, None if teacher is None else teacher[rows], labels[rows], epoch, spec)
        except (Exception, SystemExit) as error:
            got = str(error) if isinstance(error, OwnCodeError) else whole(error)
            raise _refused(spec, got, f"def {spec.factory.partition(':')[2]}{LOSSES}") from error

    for epoch in sorted({0, spec.epochs - 1}):
        together = call(slice(None), epoch)
        if not torch.equal(together, call(slice(None), epoch)):
            raise _refused(spec, "another loss for the same rows when asked again", "a function of what it is given")
        alone = torch.cat([call(slice(row, row + 1), epoch) for row in range(_TRIED)])
        if not torch.allclose(together, alone, rtol=_RELATIVE, atol=_ABSOLUTE):
            raise _refused(
                spec,
                "another loss for a row beside others than for the row alone",
                "a loss of each row by itself: workers that share a batch see parts of it",
            )
        if workers > 1:
            call(slice(0), epoch)


def _called(
    function: Callable[..., Any],
    given: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    epoch: int,
    spec: recipe.CustomObjective,
) -> Tensor:
    before = given.detach().clone()
    losses = own_losses(function, given, teacher, labels, epoch, spec.epochs)
    if not bool(torch.isfinite(losses).all()):
        raise OwnCodeError("losses that are not finite, of logits around 0")
    if not losses.requires_grad:
        raise OwnCodeError("losses that are cut off from the student's logits: no gradient reaches them")
    (gradient,) = torch.autograd.grad(losses.sum(), given, allow_unused=True)
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        raise OwnCodeError("losses without a finite gradient")
    if not torch.equal(before, given.detach()):
        raise OwnCodeError("losses, and changed the student's logits in place")
    return losses.detach()


def try_metric(spec: recipe.CustomMetric, labels: np.ndarray, classes: int) -> None:
    """Refuse a metric whose function does not give a finite number for a few rows, the same when asked again.

    Args:
        labels: of some rows, [n].

    Raises:
        RefusedError: it cannot be imported, fails, or returns something else.
    """
    function_of(spec, METRIC)
    some = torch.from_numpy(np.array(labels[:_MEASURED]))
    logits = torch.randn(len(some), classes, generator=torch.Generator().manual_seed(0))
    try:
        values = [own_measure(spec, logits, some) for _ in range(2)]
    except (Exception, SystemExit) as error:
        got = str(error) if isinstance(error, OwnCodeError) else whole(error)
        raise _refused(spec, got, f"def {spec.factory.partition(':')[2]}{METRIC}") from error
    if values[0] != values[1]:
        raise _refused(spec, f"{values[0]} and {values[1]} for the same rows", "a function of what it is given")


def _refused(spec: recipe.Factory, got: str, expected: str) -> RefusedError:
    what = "metric" if isinstance(spec, recipe.CustomMetric) else "objective"
    return RefusedError(
        f"the {what} {spec.factory} cannot be used", got=got, expected=expected, next="correct that function"
    )
