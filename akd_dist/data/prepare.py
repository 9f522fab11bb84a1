"""Sources -> files of arrays: read, converted and written by several threads, each row at its place."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block, default_threads, first_block, for_each_block
from akd_dist.data.columns import Images, Inputs, inputs_of
from akd_dist.data.labels import Classes, Labels, labels_of
from akd_dist.data.sources.base import Kind, Source
from akd_dist.data.text import tokenizer_of

_READ_ROWS = 512  # the most rows read and decoded at a time
READ_BYTES = 1 << 20
"""The most bytes of inputs decoded at a time, if more than one row."""
_LABEL_ROWS = 1 << 14  # the most labels read at a time, where inputs are not needed
_LABEL_BYTES = 8  # at most


@dataclass(frozen=True)
class OpenedSource:
    """A source that is about to be read."""

    source: Source
    first: Block
    """Its first row."""
    inputs: Inputs
    """What turns its inputs into arrays."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one input."""
        return math.prod(self.inputs.shape) * self.inputs.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """The most rows that are read and decoded at a time."""
        return max(1, min(_READ_ROWS, READ_BYTES // self.row_bytes))

    def bytes_of(self, chosen: np.ndarray) -> int:
        """Bytes of the arrays of chosen rows, bool [rows]."""
        return int(np.count_nonzero(chosen)) * (self.row_bytes + _LABEL_BYTES)

    def labels(self, task: recipe.Task, classes: Classes) -> Labels:
        """What turns its labels into arrays."""
        return labels_of(self.first.labels, 0, self.source.label_place, task, classes, self.source.class_names)


def open_sources(data: recipe.DataSpec, kinds: dict[str, Kind]) -> dict[str, OpenedSource]:
    """Look at all sources and their first rows: what they have in common is checked before anything long begins.

    Args:
        data: task, text, images and shapes.
        kinds: the sources by split, that of the train rows first.

    Raises:
        RefusedError, RecipeError, MachineError: as `rows.prepare`.
    """
    sources = {name: kind.open() for name, kind in kinds.items()}
    first = {name: first_block(source.streams) for name, source in sources.items()}
    pair = any(len(block.inputs) == 2 for block in first.values())
    tokenizer = tokenizer_of(data.text, pair) if data.text is not None else None
    readings: dict[str, OpenedSource] = {}
    for name, source in sources.items():
        shape = getattr(getattr(data, name), "shape", None)
        inputs = inputs_of(first[name].inputs, 0, source.input_place, shape, tokenizer, data.image)
        readings[name] = OpenedSource(source, first[name], inputs)
    if data.image != recipe.Image() and not any(isinstance(one.inputs, Images) for one in readings.values()):
        raise RefusedError(
            "data.image is given, and the inputs are not images",
            got=f"{readings['train'].inputs.dtype} {list(readings['train'].inputs.shape)} in {sources['train'].name}",
            expected="encoded images, or those of Pillow",
            next="leave out data.image",
        )
    readings = _of_one_colour(readings)
    for name, reading in readings.items():
        _check_alike(name, reading, readings["train"], data.task)
    return readings


def read_labels(reading: OpenedSource, tell: Callable[[int, int], None]) -> np.ndarray:
    """The class ids of a source, int64 [rows]; without its inputs, where the kind of source allows it.

    Args:
        reading: the source of the train rows.
        tell: called with rows done, and rows in all.

    Raises:
        RefusedError: names the first row whose label is wrong.
    """
    source = reading.source
    convert = reading.labels("classification", Classes(source.classes))
    labels = np.zeros(source.rows, dtype=np.int64)
    done, counting = 0, threading.Lock()

    def work(block: Block) -> None:
        nonlocal done
        labels[block.rows] = convert(block.labels, block.rows)
        with counting:
            done += len(block)
            tell(done, source.rows)

    most = _LABEL_ROWS if source.label_streams else reading.block_rows
    for_each_block(source.label_streams or source.streams, most, work, default_threads())
    return convert.finished(labels)


def in_colour(readings: dict[str, OpenedSource]) -> dict[str, OpenedSource]:
    """The same sources, whose grey images get three channels as well."""
    return {
        name: dataclasses.replace(one, inputs=one.inputs.in_colour()) if isinstance(one.inputs, Images) else one
        for name, one in readings.items()
    }


def _of_one_colour(readings: dict[str, OpenedSource]) -> dict[str, OpenedSource]:
    """Grey or in colour as a whole: grey sources go with coloured ones, where nothing holds one of them to be grey."""
    inputs = [one.inputs for one in readings.values()]
    free = [isinstance(one, Images) and (one.may_turn or one.shape[0] == 3) for one in inputs]
    if not all(free):  # numbers, or images whose `shape` is given, are what they are
        return {
            name: dataclasses.replace(one, inputs=one.inputs.as_first()) if isinstance(one.inputs, Images) else one
            for name, one in readings.items()
        }
    return in_colour(readings) if any(one.shape[0] == 3 for one in inputs) else readings


def write_source(
    reading: OpenedSource,
    files: Sequence[tuple[np.ndarray, Path, Path]],
    task: recipe.Task,
    classes: Classes,
    tell: Callable[[int, int], None],
) -> tuple[Classes, np.ndarray]:
    """Write rows of a source to array files.

    Args:
        reading: the source.
        files: rows that go together (bool [rows of the source]), and the .npy files of their inputs and labels.
        task: what labels are.
        classes: what is known of the dataset's classes; not complete for the source of the train rows.
        tell: called with rows done, and rows in all.

    Returns:
        What is known of the classes now, and the labels of all rows of the source: int64 or float32 [rows].

    Raises:
        RefusedError: names the first row in the source's order that is wrong.
    """
    source = reading.source
    classes = classes if classes.complete else Classes(source.classes)
    _check_number(source, task, classes)
    convert = reading.labels(task, classes)
    labels = np.zeros(source.rows, dtype=np.int64 if task == "classification" else np.float32)
    done, counting = 0, threading.Lock()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_Output(path, rows, reading.inputs)) for rows, path, _ in files]

        def work(block: Block) -> None:
            nonlocal done
            rows = block.rows
            labels[rows] = convert(block.labels, rows)
            here = [part[rows] for part, *_ in files]
            wanted = np.logical_or.reduce(here)
            if wanted.any():
                inputs = reading.inputs([_chosen(column, wanted) for column in block.inputs], rows[wanted])
                for output, mine in zip(outputs, here, strict=True):
                    output.write(inputs[mine[wanted]], rows[mine])
            with counting:
                done += len(block)
                tell(done, source.rows)

        for_each_block(source.streams, reading.block_rows, work, default_threads())
    labels = convert.finished(labels)
    for rows, _, path in files:
        np.save(path, labels[rows])
    if classes.complete:
        return classes, labels
    number = 1 if task == "regression" else _count_classes(source, labels, convert)
    return Classes(number, convert.names, complete=True), labels


def _chosen(column: Any, wanted: np.ndarray) -> Any:
    """The wanted rows of a column."""
    if wanted.all():
        return column
    if isinstance(column, list):
        return [value for value, one in zip(column, wanted, strict=True) if one]
    return column[wanted] if isinstance(column, np.ndarray) else column.filter(pa.array(wanted))


class _Output:
    """A .npy file of inputs that several threads write, each row at its place."""

    def __init__(self, path: Path, rows: np.ndarray, inputs: Inputs) -> None:
        self._rows = np.flatnonzero(rows)  # of the source
        self._row_bytes = math.prod(inputs.shape) * inputs.dtype.itemsize
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # closed by __exit__
        descr = np.lib.format.dtype_to_descr(inputs.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (len(self._rows), *inputs.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()
        os.posix_fallocate(self._file.fileno(), 0, self._start + len(self._rows) * self._row_bytes)

    def write(self, inputs: np.ndarray, rows: np.ndarray) -> None:
        """Write inputs [n, *shape] of rows of the source that follow each other in this file."""
        if not len(rows):
            return
        at = self._start + int(np.searchsorted(self._rows, rows[0])) * self._row_bytes
        left = np.ascontiguousarray(inputs).data.cast("B")
        while left:
            written = os.pwrite(self._file.fileno(), left, at)
            left, at = left[written:], at + written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            os.fsync(self._file.fileno())


# ---- checks


def _count_classes(source: Source, labels: np.ndarray, convert: Labels) -> int:
    """How many classes the train source has: as it says, as many as names, or the largest label plus one."""
    if convert.names is not None:
        if source.classes not in (None, len(convert.names)):
            raise RefusedError(
                f"{source.name} has another number of classes than its `classes` says",
                got=f"{len(convert.names)} names: {', '.join(convert.names[:10])}",
                expected=source.classes,
                next="correct `classes` of data.train, or leave it out",
            )
        return len(convert.names)
    if source.classes is not None:
        return source.classes
    row = int(labels.argmax())
    if labels[row] >= max(len(labels), 2):
        raise RefusedError(
            f"label out of range in {source.label_place(row)}",
            got=f"{labels[row]}, which makes {labels[row] + 1:,} classes for {len(labels):,} rows",
            expected="labels 0 to classes - 1",
            next="correct the labels, or remove rows that it marks as without one; set `classes` if there are so many",
        )
    return int(labels[row]) + 1


def _check_number(source: Source, task: recipe.Task, classes: Classes) -> None:
    if task == "classification" and source.classes not in (None, classes.number):
        raise RefusedError(
            f"{source.name} has another number of classes than data.train",
            got=source.classes,
            expected=classes.number,
            next="correct `classes`, or leave it out",
        )


def _check_alike(name: str, reading: OpenedSource, train: OpenedSource, task: recipe.Task) -> None:
    got, expected = (
        f"{one.inputs.dtype} {list(one.inputs.shape)}" + (" of pairs" if len(one.first.inputs) == 2 else "")
        for one in (reading, train)
    )
    if got != expected:
        raise RefusedError(
            f"the inputs of data.{name} are not like those of data.train",
            got=got,
            expected=expected,
            next="bring all sources to one shape and type",
        )
    named, expected_names = (
        "class names" if one.labels(task, Classes()).named else "numbers" for one in (reading, train)
    )
    if named != expected_names:
        raise RefusedError(
            f"the labels of data.{name} are not like those of data.train",
            got=named,
            expected=expected_names,
            next="write the labels of all sources alike",
        )
