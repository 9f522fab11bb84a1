"""Columns of labels -> arrays: class ids, class names, or numbers. Converters are used as those of `columns`."""

import difflib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.columns import Place, refuse_inexact, refuse_nulls
from akd_dist.data.schemas import label_kind, plain

_LABELS_MISSING = (
    "set data.unlabelled: missing, and students learn such rows from the teacher, whose own training leaves them out"
)


def unknown(task: recipe.Task, rows: int) -> np.ndarray:
    """The labels of rows without one: int64 or float32 [rows]."""
    return np.full(rows, -1, np.int64) if task == "classification" else np.full(rows, np.nan, np.float32)


def are_unknown(labels: np.ndarray) -> np.ndarray:
    """Which rows have no label, bool [rows], of labels int64 or float32 [rows]."""
    return np.isnan(labels) if labels.dtype.kind == "f" else labels < 0


class Labels(Protocol):
    """One source's labels -> arrays."""

    named: bool
    """Whether the source has names of classes."""
    names: tuple[str, ...] | None
    """Those of classes 0, 1, ..., as far as they are known."""

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """Labels of these rows: int64 or float32 [n]."""

    def finished(self, labels: np.ndarray) -> np.ndarray:
        """The labels of the whole source, once all rows were seen; as they are, unless a converter says otherwise."""
        return labels


@dataclass(frozen=True)
class Classes:
    """What is known of the classes of a dataset."""

    number: int | None = None
    """How many there are."""
    names: tuple[str, ...] | None = None
    """What they are called."""
    complete: bool = False
    """Whether the train rows were seen: then there are no other classes, and no other names."""


def labels_of(
    column: Any,
    row: int,
    place: Place,
    task: recipe.Task,
    classes: Classes,
    own_names: tuple[str, ...] | None,
    *,
    missing: bool = False,
) -> Labels:
    """The converter of a source's labels.

    Args:
        column: the first row.
        row: its number, for messages.
        place: for messages.
        task: what labels are.
        classes: of the dataset, as far as they are known.
        own_names: what the source calls its class ids.
        missing: whether rows may have no label: null, NaN or -1.

    Raises:
        RefusedError: the column is nothing for this task.
    """
    if missing:
        if task == "classification" and label_kind(column.type) == "numbers":
            column = pa.nulls(len(column), pa.int64())  # class ids beside missing ones, as pandas writes them
        return _OrMissing(labels_of(column, row, place, task, classes, own_names), place, task)
    kind = label_kind(column.type)
    if task == "regression" and kind in ("ids", "numbers"):
        return _Values(place)
    if task == "regression" or kind not in ("ids", "names"):
        raise RefusedError(
            f"labels that do not go with data.task: {task} in {place(row)}",
            got=f"type {column.type}: {column[0]}",
            expected="numbers" if task == "regression" else "class ids (integers) or class names",
            next=_advice(column) if kind == "numbers" else "set `label` to another column, or cast it to numbers",
        )
    if kind == "names":
        return _Names(place, classes)
    return _Ids(place, classes, own_names)


def _advice(column: Any) -> str:
    """What to do about floats where classes are wanted."""
    value = column[0].as_py()
    if value is None or not math.isfinite(value):
        return (
            "cast the column to integers if these are class ids: missing values make floats of them; remove such rows, "
            f"or {_LABELS_MISSING}"
        )
    if float(value).is_integer():
        return "cast the column to integers if these are class ids; set data.task: regression if they are quantities"
    return "set data.task: regression"


class _Ids(Labels):
    """Integers, or booleans as 0 and 1 -> int64 from 0 to classes - 1."""

    def __init__(self, place: Place, classes: Classes, own_names: tuple[str, ...] | None) -> None:
        self._place, self.named = place, own_names is not None
        self.names = classes.names if classes.complete else own_names
        self._number = classes.number if own_names is None else len(own_names)
        self._own = own_names or ()
        # This source's id -> the id that the train rows have for the class of that name, or -1 where they have no such
        # class. None where both number their classes alike.
        self._translated: np.ndarray | None = None
        if classes.complete and self.named and own_names != classes.names:
            known = {name: number for number, name in enumerate(classes.names or ())}
            self._translated = np.array([known.get(name, -1) for name in self._own], dtype=np.int64)

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """Cast and check."""
        column = plain(column)
        refuse_nulls(column, self._place, rows[0], f"remove the row, or fill it in; {_LABELS_MISSING}")
        try:
            ids: np.ndarray = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:  # a uint64 that int64 cannot hold
            raise self._out_of_range(rows[0], column[0]) from None
        wrong = ids < 0 if self._number is None else (ids < 0) | (ids >= self._number)
        if wrong.any():
            raise self._out_of_range(rows[0], ids[0])
        if self._translated is None:
            return ids
        translated: np.ndarray = self._translated[ids]
        if (translated < 0).any():
            raise _unknown_name(self._place(rows[0]), self._own[ids[0]], self.names or ())
        return translated

    def _out_of_range(self, row: int, got: object) -> RefusedError:
        last = "classes - 1" if self._number is None else self._number - 1
        value = int(str(got))
        advice = "correct the labels, or set `classes` of data.train"
        if value == -1:
            advice = f"remove the row if -1 marks rows without a label, as in many datasets; {_LABELS_MISSING}"
        elif value < 0:
            advice = "correct the labels: class ids are counted from 0"
        elif value == self._number:
            advice = "if labels are counted from 1, subtract 1 from all; else correct the row, or set `classes`"
        elif value == 255:
            advice = "remove the row if 255 marks rows without a label; else correct it, or set `classes` of data.train"
        return RefusedError(
            f"label out of range in {self._place(row)}",
            got=got,
            expected=f"0 to {last}" + ("" if self._number is None else f", as the data has {self._number} classes"),
            next=advice,
        )


class _Names(Labels):
    """Class names -> int64: the places of the names in sorted order, or in that of the train rows."""

    named = True

    def __init__(self, place: Place, classes: Classes) -> None:
        self._place, self._complete = place, classes.complete
        self.names = classes.names
        self._ids = {name: number for number, name in enumerate(classes.names or ())}
        # Threads meet new names at the same time, and the number of names is the next one's id.
        self._lock = threading.Lock()

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """Ids; of train rows in the order in which threads met the names."""
        column = plain(column)
        refuse_nulls(column, self._place, rows[0], f"remove the row, or fill it in; {_LABELS_MISSING}")
        # Python looks up each name of a block once, and not each row's.
        encoded = pc.dictionary_encode(column)
        ids = [self._id(name, rows[0]) for name in encoded.dictionary.to_pylist()]
        places: np.ndarray = np.array(ids, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
        return places

    def finished(self, labels: np.ndarray) -> np.ndarray:
        """Numbered in sorted order."""
        if self._complete:
            return labels
        self.names = tuple(sorted(self._ids))
        places = {name: place for place, name in enumerate(self.names)}
        renumbered: np.ndarray = np.array([places[name] for name in self._ids], dtype=np.int64)[labels]
        return renumbered

    def _id(self, name: str, row: int) -> int:
        if not name.strip():
            raise RefusedError(
                f"no value in {self._place(row)}", got=repr(name), expected="a class name", next="fill it in"
            )
        if self._complete:
            if name not in self._ids:
                raise _unknown_name(self._place(row), name, self.names or ())
            return self._ids[name]
        with self._lock:
            return self._ids.setdefault(name, len(self._ids))


class _Values(Labels):
    """Numbers -> float32."""

    named = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self.names: tuple[str, ...] | None = None

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """Cast and check."""
        column = plain(column)
        refuse_nulls(column, self._place, rows[0], f"remove the row, or fill it in; {_LABELS_MISSING}")
        stored = column.to_numpy(zero_copy_only=False)
        refuse_inexact(stored, self._place, rows[0], "label")
        with np.errstate(over="ignore"):
            values: np.ndarray = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise RefusedError(
                f"a label that is not finite in float32 in {self._place(rows[0])}",
                got=column[0],
                expected="a finite number",
                next="remove the row, or correct it",
            )
        return values


class NoLabels(Labels):
    """A source whose labels are not read."""

    named = False

    def __init__(self, task: recipe.Task) -> None:
        self._task: recipe.Task = task
        self.names: tuple[str, ...] | None = None

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """What stands for them."""
        return unknown(self._task, len(rows))


class _OrMissing(Labels):
    """Labels of a source in which a row may have none: null, NaN, or -1 where labels are class ids."""

    def __init__(self, known: Labels, place: Place, task: recipe.Task) -> None:
        self._known, self._place, self._task = known, place, task
        self.named = known.named

    @property
    def names(self) -> tuple[str, ...] | None:  # type: ignore[override]  # read only
        """Those of the rows that have labels."""
        return self._known.names

    def __call__(self, column: Any, rows: np.ndarray) -> np.ndarray:
        """Cast and check those that are there."""
        column = plain(column)
        missing = pc.is_null(column, nan_is_null=True)
        if label_kind(column.type) != "names" and self._task == "classification":
            missing = pc.or_(missing, pc.fill_null(pc.equal(column, -1), True))
        there = pc.invert(missing).to_numpy(zero_copy_only=False)
        labels = unknown(self._task, len(rows))
        if there.any():
            labels[there] = self._known(self._as_ids(column.filter(pa.array(there)), rows[there]), rows[there])
        return labels

    def finished(self, labels: np.ndarray) -> np.ndarray:
        """Those that are there renumbered, where they are names."""
        there = ~are_unknown(labels)
        finished = labels.copy()
        finished[there] = self._known.finished(labels[there])
        return finished

    def _as_ids(self, column: Any, rows: np.ndarray) -> Any:
        """Class ids that stand as floats beside missing ones, as integers."""
        if self._task == "regression" or not pa.types.is_floating(column.type):
            return column
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise RefusedError(
                f"a label that is no class id in {self._place(rows[0])}",
                got=column[0],
                expected="a whole number, or none",
                next="correct the label; set data.task: regression if labels are quantities",
            ) from None


def _unknown_name(where: str, name: str, names: Sequence[str]) -> RefusedError:
    """A class of a validation or test row that no train row has."""
    near = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return RefusedError(
        f"unknown class name in {where}",
        got=repr(name),
        expected=f"one of those in data.train: {shown}",
        next=f"correct it to {near[0]}, or remove the row"
        if near
        else "remove the row, or add such rows to data.train",
    )
