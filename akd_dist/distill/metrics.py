"""Evaluation of a model on a split: accuracy, F1 and Matthews for classes, Pearson and Spearman for numbers.

They are a few lines of counts each. Tests compare them with torchmetrics, whose import would take every worker two
seconds.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from akd_dist.data.encoded import ahead, batches_ahead, begin
from akd_dist.data.rows import Rows
from akd_dist.distill.hooks import own_measure
from akd_dist.distill.losses import at_least_float32, label_losses
from akd_dist.models.device import autocast
from akd_dist.recipe import LOWEST_IS_BEST, CustomMetric, Metric, Precision, Task

EVALUATION_ROWS = 512  # fixed, so that evaluation gives the same bits everywhere
_EVALUATION_LOGITS = 1 << 24  # the most of a block: fewer rows where there are tens of thousands of classes
_COUNTS = 1 << 22  # counts of classes that several models have at a time


def is_better(metric: Metric, one: float, than: float) -> bool:
    """Whether a model is strictly better by a metric."""
    return one < than if metric in LOWEST_IS_BEST else one > than


def evaluation_rows(classes: int) -> int:
    """Rows of a block of an evaluation: a matter of the number of classes alone."""
    return max(1, min(EVALUATION_ROWS, _EVALUATION_LOGITS // classes))


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    rows: Rows,
    device: torch.device,
    precision: Precision = "float32",
    own: CustomMetric | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Every metric of the task (see `measure`) and the mean label loss of a module on rows, un-augmented.

    Args:
        module: on `device`, its weights in `weights_dtype(precision)`.
        own: a metric of the user's own, measured as `custom` beside the others; all logits are held for it.

    Returns:
        The metrics with `loss`, mean cross-entropy or squared error; and what the module says of each row: the class,
        int64 [n], or for regression the number, float [n].
    """
    module.eval()
    loss, said, true, kept = 0.0, [], [], []
    size = evaluation_rows(rows.classes)
    begun = (begin_block(rows, start, size) for start in range(0, len(rows), size))
    for copied, labelled in ahead(begun, min(1, batches_ahead(rows.inputs, size))):
        inputs, labels = copied.to(device), labelled.to(device)
        true.append(labelled)
        with autocast(device, precision):
            logits = module(inputs)
        logits = at_least_float32(logits)
        loss += float(label_losses(logits, labels).double().sum())
        said.append(predictions(rows.task, logits).cpu())
        kept += [] if own is None else [logits.cpu()]
    together = torch.cat(said)
    metrics = measure(rows.task, together, torch.cat(true), rows.classes)
    if own is not None:
        metrics["custom"] = own_measure(own, torch.cat(kept), torch.cat(true))
    return metrics | {"loss": loss / len(rows)}, together.numpy()


def begin_block(rows: Rows, start: int, size: int) -> Callable[[], list[torch.Tensor]]:
    """A block of rows, begun to be decoded if it has to be: called, it gives inputs and labels."""
    inputs, labels = rows.read(start, min(start + size, len(rows)))
    pixels = begin(inputs)
    # Copied, since torch warns of tensors over memory that is read-only, as a memory map is.
    return lambda: [torch.from_numpy(np.array(part)) for part in (pixels(), labels)]


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
    return measure_together(task, predictions[None], labels, classes)[0]


def measure_together(
    task: Task, predictions: torch.Tensor, labels: torch.Tensor, classes: int | None = None
) -> list[dict[str, float]]:
    """The same for several models on the same rows: to the same bits as each alone.

    Args:
        predictions: [models, n].
    """
    if task == "regression":
        found = [_of_numbers(one.double(), labels.double()) for one in predictions]
    else:
        several = classes or int(torch.cat([predictions.flatten(), labels]).max()) + 1
        at_once = max(1, _COUNTS // several)
        found = [one for part in torch.split(predictions, at_once) for one in _of_classes(part, labels, several)]
    # Some are divided in float32, whose digits beyond the seventh mean nothing and may end just outside of -1 to 1.
    return [
        {name: max(-1.0, min(1.0, round(value, 7))) if math.isfinite(value) else 0.0 for name, value in one.items()}
        for one in found
    ]


def _of_classes(predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> list[dict[str, float]]:
    """From counts per class: memory and time grow with rows + models x classes, never with classes x classes.

    Libraries take macro F1 and Matthews from the confusion matrix, and importing one of them takes each worker two
    seconds. Accuracy and F1 are divided in float32, as torchmetrics does, to the same bits as ever; Matthews in whole
    numbers, where float32 loses digits beyond some thousand rows.
    """
    several, count = max(classes, 2), len(predictions)
    true, own = torch.bincount(labels, minlength=several), several * torch.arange(count)[:, None]

    def counted(chosen: torch.Tensor) -> torch.Tensor:
        return torch.bincount(chosen, minlength=several * count).view(count, several)

    said, hits = counted((predictions + own).flatten()), counted((predictions + own)[predictions == labels])
    accuracies = (hits.sum(dim=1) / len(labels)).tolist()
    f1 = _macro_f1(true, said, hits) if classes > 2 else (2.0 * hits / (true + said).clamp(min=1))[:, 1].tolist()
    each = zip(accuracies, f1, _matthews(true, said, hits), strict=True)
    return [dict(zip(("accuracy", "f1", "matthews"), one, strict=True)) for one in each]


def _macro_f1(true: torch.Tensor, said: torch.Tensor, hits: torch.Tensor) -> list[float]:
    """The mean F1 of the classes that occur among labels or predictions, float32, by model.

    Args:
        true: int64 [classes], how often each class is true.
        said, hits: int64 [models, classes], how often each model says it, and is right.
    """
    occurring = (true + said > 0).float()
    scores = 2.0 * hits / (true + said).clamp(min=1)
    # Row by row: a sum over all rows at once may add in another order.
    return [float(one.sum()) for one in occurring * scores / occurring.sum(dim=1, keepdim=True)]


def _matthews(true: torch.Tensor, said: torch.Tensor, hits: torch.Tensor) -> list[float]:
    """R_K (Gorodkin, 2004) by model; 0.0 where one class takes all of the labels or predictions.

    With n rows, of class k t_k true and p_k predicted, and c hits in all:
    (c n - sum_k t_k p_k) / sqrt((n^2 - sum_k t_k^2) (n^2 - sum_k p_k^2)).

    Args:
        true, said, hits: as of `_macro_f1`.
    """
    rows = int(true.sum())
    truly = rows * rows - int((true * true).sum())
    sums = [counts.sum(dim=1).tolist() for counts in (hits, true * said, said * said)]
    found = []
    for right, agreeing, squares in zip(*sums, strict=True):
        spread = truly * (rows * rows - squares)
        found.append((right * rows - agreeing) / math.sqrt(spread) if spread else 0.0)
    return found


def _of_numbers(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    if not (_varies(predictions) and _varies(labels)):
        return {"pearson": 0.0, "spearman": 0.0}
    # Divided by its largest, so that no square overflows; a correlation does not change by that.
    scaled = predictions / predictions.abs().max()
    # Spearman's is Pearson's of the ranks.
    return {
        "pearson": _correlation(scaled, labels),
        "spearman": _correlation(_ranks(predictions), _ranks(labels)),
    }


def _correlation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])


def _varies(values: torch.Tensor) -> bool:
    """Whether values are finite and not all the same."""
    return bool(torch.isfinite(values).all() and (values != values[0]).any())


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each value from 1, equal ones sharing their mean rank: float64 [n]."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: torch.Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[places]
