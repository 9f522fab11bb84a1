"""Metrics of a model on a split: accuracy, F1 and Matthews for classes, Pearson and Spearman for numbers.

torchmetrics computes them. It takes more than a second to import, so it is imported where it is first needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from akd_dist.recipe import Task


def predictions(task: Task, logits: torch.Tensor) -> torch.Tensor:
    """What a model says of each row: logits [n, classes] -> class ids int64 [n]; for regression numbers, float [n]."""
    return logits[:, 0] if task == "regression" else logits.argmax(dim=1)


def measure(
    task: Task, predictions: torch.Tensor, labels: torch.Tensor, classes: int | None = None
) -> dict[str, float]:
    """Every metric of the task; the higher the better, and never NaN.

    Classification: `accuracy`; `f1`, of class 1 where there are two classes, as GLUE has it, else the mean of all that
    occur; `matthews`, the correlation of predicted and true classes. Regression: `pearson` and `spearman`.

    A correlation with something constant, or with numbers that are not finite, is undefined and counts as 0.0. So does
    the F1 of class 1 where it neither occurs nor is predicted.

    Args:
        predictions: as `predictions` gives them, on the CPU.
        labels: int64 [n], or float [n] for regression, on the CPU.
        classes: how many there are; None takes the largest id that occurs, plus one. Unread for regression.
    """
    if task == "regression":
        found = _of_numbers(predictions.double(), labels.double())
    else:
        found = _of_classes(predictions, labels, classes or int(torch.cat([predictions, labels]).max()) + 1)
    # torchmetrics divides in float32, whose digits beyond the seventh mean nothing and may end just outside of -1 to 1.
    return {name: _within_one(round(value, 7)) if math.isfinite(value) else 0.0 for name, value in found.items()}


def _of_classes(predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, float]:
    from torchmetrics.functional import classification

    several: dict[str, Any] = {"num_classes": max(classes, 2), "validate_args": False}
    with _counting_plainly():
        accuracy = classification.multiclass_accuracy(predictions, labels, average="micro", **several)
        if classes <= 2:
            f1 = classification.binary_f1_score(predictions, labels, validate_args=False)
        else:
            f1 = classification.multiclass_f1_score(predictions, labels, average="macro", **several)
        matthews = torch.zeros(())
        if _varies(predictions) and _varies(labels):  # where not, torchmetrics gives small numbers other than 0
            matthews = classification.multiclass_matthews_corrcoef(predictions, labels, **several)
    return {"accuracy": float(accuracy), "f1": float(f1), "matthews": float(matthews)}


def _of_numbers(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    from torchmetrics.functional.regression import pearson_corrcoef

    if not (_varies(predictions) and _varies(labels)):
        return {"pearson": 0.0, "spearman": 0.0}
    # Divided by its largest, so that no square overflows; a correlation does not change by that.
    scaled = predictions / predictions.abs().max()
    # Spearman's is Pearson's of the ranks. The function of that name sums ranks in int32, too small for many ties.
    return {
        "pearson": float(pearson_corrcoef(scaled, labels)),
        "spearman": float(pearson_corrcoef(_ranks(predictions), _ranks(labels))),
    }


def _within_one(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _varies(values: torch.Tensor) -> bool:
    """Whether values are finite and not all the same."""
    return bool(torch.isfinite(values).all() and (values != values[0]).any())


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each value from 1, equal ones sharing their mean rank: float64 [n]."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: torch.Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[places]


@contextlib.contextmanager
def _counting_plainly() -> Iterator[None]:
    """Let torchmetrics count with `bincount`, which is exact on the CPU anyway.

    Where deterministic algorithms are asked for, it compares every row with every pair of classes instead: 0.8 GB and
    most of a second for 10,000 rows of 100 classes (measured).
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
