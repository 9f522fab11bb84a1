"""How far a teacher from elsewhere agrees with labelled rows, and what may be wrong where it does not.

Weights do not say which normalisation, which order of classes and of channels they were trained with. A few hundred
rows with labels do, in seconds, before logits are stored that teach the wrong thing.
"""

import math
import time

import numpy as np
import torch
from torch import nn

from akd_dist.data.findings import near_chance
from akd_dist.data.rows import Rows
from akd_dist.distill.teacher import teacher_logits
from akd_dist.documents.check import TeacherCheck
from akd_dist.storage.reader import LogitStore

ASKED = 512
"""The most rows that a teacher is asked of."""
_BATCH = 16
_SECONDS = 20.0  # of a large teacher: fewer rows are asked, one batch at least
_PLACES = 8  # where rows lie elsewhere in blocks, they are read from so many places alone
_FEWEST = 20  # rows that say something of chance and of an order
_MUCH_BETTER = 0.2
_SHOWN = 5
_CAUSES = (
    "Likely causes: data.normalize is not what it was trained with, its classes are in another order, or its channels "
    "are (RGB and BGR), or it was made for other data"
)


def check_on_rows(module: nn.Module, rows: Rows, name: str = "the teacher") -> TeacherCheck:
    """Ask a teacher of validation rows, as many as some seconds allow.

    Args:
        module: in eval mode, raw inputs [n, *shape] -> logits [n, classes].
        rows: the validation rows.
        name: of the teacher, for warnings.
    """
    numbers, found, began = _asked(rows), [], time.monotonic()
    for start in range(0, len(numbers), _BATCH):
        inputs = torch.from_numpy(np.asarray(rows.inputs.take(numbers[start : start + _BATCH], axis=0)))
        said = teacher_logits(module, inputs, len(inputs))
        # Of many classes, what is chosen is all that is kept.
        found.append(said[:, 0] if rows.task == "regression" else said.argmax(axis=1))
        if time.monotonic() - began > _SECONDS:
            break
    said = np.concatenate(found)
    return _check(said, rows.labels.take(numbers[: len(said)]), rows, name)


def check_in_store(store: LogitStore, rows: Rows, name: str = "the teacher") -> TeacherCheck:
    """The same from the stored logits of the validation rows, which say it of all of them; of a regression of some."""
    if rows.task == "regression":
        stop = min(len(rows), ASKED)
        return check_of(store.rows(0, 0, stop), rows.labels.take(np.arange(stop)), rows, name)
    shards = store.manifest.records()
    asked = store.layout.rows
    accuracy = min(1.0, sum(shard.rows * (shard.label_agreement or 0.0) for shard in shards) / asked)
    if rows.task == "language_model":
        return TeacherCheck(name=name, rows=asked, asked_of="tokens", accuracy=accuracy)
    warnings = _of_chance(name, accuracy, rows.class_counts())
    return TeacherCheck(name=name, rows=len(rows), accuracy=accuracy, warnings=warnings)


def check_of(logits: np.ndarray, labels: np.ndarray, rows: Rows, name: str = "the teacher") -> TeacherCheck:
    """What logits say of labels.

    Args:
        logits: float32 [n, classes].
        labels: int64 [n], or float32 [n] of a regression.
        rows: what they are of.
    """
    return _check(logits[:, 0] if rows.task == "regression" else logits.argmax(axis=1), labels, rows, name)


def _check(said: np.ndarray, labels: np.ndarray, rows: Rows, name: str) -> TeacherCheck:
    """What values, or chosen classes, say of labels."""
    if rows.task == "regression":
        return _of_values(said, labels, name)
    chosen = said
    accuracy = float((chosen == labels).mean())
    warnings = _of_chance(name, accuracy, np.bincount(labels, minlength=rows.classes))
    if (reordered := _in_another_order(chosen, labels, rows.class_names)) is not None:
        warnings.append(f"{name} {reordered}")
    return TeacherCheck(name=name, rows=len(labels), accuracy=accuracy, warnings=warnings)


def _asked(rows: Rows) -> np.ndarray:
    """Row numbers to ask of, mixed, so that any first few of them stand for all."""
    count = min(len(rows), ASKED)
    if rows.held:
        numbers = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    else:
        run = count // _PLACES or count
        starts = np.linspace(0, len(rows) - run, count // run).astype(np.int64)
        numbers = (starts[:, None] + np.arange(run)).ravel()
    return np.random.default_rng(0).permutation(np.unique(numbers))


def _of_chance(name: str, accuracy: float, counts: np.ndarray) -> list[str]:
    line = near_chance(name, accuracy, counts, "validation") if counts.sum() >= _FEWEST else None
    return [] if line is None else [f"{line} {_CAUSES}"]


def _of_values(values: np.ndarray, labels: np.ndarray, name: str) -> TeacherCheck:
    """Of a regression: a correlation that luck would give too, or a negative one, is warned of."""
    count = len(labels)
    if count < 2 or not np.isfinite(values).all() or np.ptp(values) == 0 or np.ptp(labels) == 0:
        return TeacherCheck(name=name, rows=count)
    found = float(np.corrcoef(values, labels)[0, 1])
    warnings = []
    if abs(found) < 2 / math.sqrt(count):
        warnings = [f"{name} is near chance: its values hardly go with the labels. {_CAUSES}"]
    elif found < 0:
        warnings = [f"{name} says large values where the labels are small: its sign may be the other way round"]
    return TeacherCheck(name=name, rows=count, correlation=found, warnings=warnings)


def _in_another_order(chosen: np.ndarray, labels: np.ndarray, names: tuple[str, ...] | None) -> str | None:
    """What to say of a teacher whose classes fit the labels much better in another order.

    The order is found on one half of the rows and tried on the other: of few rows for many classes, some order fits
    any teacher.

    Args:
        chosen: the class that the teacher chooses, int64 [n].
        labels: int64 [n].
    """
    half = len(labels) // 2
    ours, at_ours = np.unique(chosen[:half], return_inverse=True)
    from scipy.optimize import linear_sum_assignment  # takes a second, and few runs need it

    theirs, at_theirs = np.unique(labels[:half], return_inverse=True)
    counts = np.zeros((len(ours), len(theirs)), dtype=np.int64)
    np.add.at(counts, (at_ours, at_theirs), 1)
    meant = {int(ours[row]): int(theirs[column]) for row, column in zip(*linear_sum_assignment(-counts), strict=True)}
    tried = np.isin(chosen[half:], list(meant))
    if tried.sum() < _FEWEST:
        return None
    there, wanted = chosen[half:][tried], labels[half:][tried]
    as_it_is = float((there == wanted).mean())
    reordered = float(np.mean([meant[int(one)] == label for one, label in zip(there, wanted, strict=True)]))
    if reordered < as_it_is + _MUCH_BETTER:
        return None
    moved = [f"{_name(one, None)} means {_name(other, names)}" for one, other in sorted(meant.items()) if one != other]
    more = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
    return (
        f"has its classes in another order, as it seems: if its output {', '.join(moved[:_SHOWN])}{more}, it would "
        f"choose the label of {reordered:.1%} of rows that this order was not taken from; give the labels as numbers "
        "in its order, or reorder its last layer"
    )


def _name(number: int, names: tuple[str, ...] | None) -> str:
    return str(number) if names is None else f"{number} ({names[number]})"
