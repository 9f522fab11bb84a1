"""Sources -> files of arrays: converted by several threads, and written in the order of rows."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import framing
from akd_dist.data.blocks import Block, default_threads, map_blocks
from akd_dist.data.columns import Images, Inputs, inputs_of
from akd_dist.data.encoded import COLUMNS, meaning_of
from akd_dist.data.labels import Classes, Labels, NoLabels, labels_of, unknown
from akd_dist.data.noted import MixedSizesError
from akd_dist.data.picture_sizes import with_sizes
from akd_dist.data.row_files import RowsFile
from akd_dist.data.sources.base import Kind, Source
from akd_dist.data.sources.kinds import kind_of, open_kind
from akd_dist.data.text import tokenizer_of

# The most rows read and decoded at a time.
_READ_ROWS = 512
READ_BYTES = 1 << 20
"""The most bytes of inputs decoded at a time, if more than one row."""
# The most labels read at a time, where inputs are not needed.
_LABEL_ROWS = 1 << 14
# How many encoded pictures are weighed, to say how much room all of them take.
_WEIGHED = 64
# What a label takes on disk: int64 of a class; float32 of regression takes half.
_LABEL_BYTES = 8


@dataclass(frozen=True)
class OpenedSource:
    """A source that is about to be read."""

    source: Source
    first: Block
    """Its first row."""
    inputs: Inputs
    """What turns its inputs into arrays."""
    unlabelled: Literal["all", "missing"] | None = None
    """Which of its rows have no label; None where every row needs one."""
    encoded: int = 0
    """Bytes of one input that stays encoded, the mean of the first few; 0 where they become pixels."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one input, of which that is known only roughly where they stay encoded."""
        if self.encoded:
            return self.encoded + COLUMNS * 8
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
        if self.unlabelled == "all":
            return NoLabels(task)
        source, missing = self.source, self.unlabelled == "missing"
        return labels_of(self.first.labels, 0, source.label_place, task, classes, source.class_names, missing=missing)


@dataclass(frozen=True)
class Part:
    """Rows of a source that go together into a split's files."""

    rows: np.ndarray
    """Which, bool [rows of the source]."""
    file: RowsFile
    """That of the split."""


def kinds_of(data: recipe.DataSpec) -> dict[str, Kind]:
    """The kinds of source of a recipe's data by split, that of the train rows first; a share has none.

    Rows without labels come last, as `unlabelled`: a column of labels is not looked for there.
    """
    return {name: kind_of(without_labels(one) if name == "unlabelled" else one) for name, one in data.sources.items()}


def without_labels(spec: recipe.Source) -> recipe.Source:
    """The same source, whose labels are not looked for; those that come with the inputs are not read."""
    nothing = {"label": "", "labels": None, "classes": None}
    return spec.model_copy(update={key: none for key, none in nothing.items() if key in type(spec).model_fields})


def open_sources(
    data: recipe.DataSpec, kinds: dict[str, Kind], known: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, OpenedSource]:
    """Look at all sources and their first rows: what they have in common is checked before anything long begins.

    Args:
        data: task, text, images and shapes.
        kinds: the sources by split, that of the train rows first.
        known: what the planning process found of them, `Source.known`; in tasks.

    Raises:
        RefusedError, RecipeError, MachineError: as `rows.prepare`.
    """
    if data.task == "language_model":
        raise RefusedError(
            "the rows of a language model are blocks of several documents, and lie nowhere in its sources",
            got="task: language_model",
            expected="data whose rows are those of its sources",
            next="use this with classification or regression",
        )
    sources = {name: open_kind(kind, known.get(name)) for name, kind in kinds.items()}
    first = {name: next(source.blocks(1)) for name, source in sources.items()}
    pair = any(len(block.inputs) == 2 for block in first.values())
    tokenizer = tokenizer_of(data.text, pair) if data.text is not None else None
    readings: dict[str, OpenedSource] = {}
    for name, source in sources.items():
        shape = getattr(getattr(data, name), "shape", None)
        inputs = inputs_of(first[name].inputs, 0, source.input_place, shape, tokenizer, data.image)
        without: Literal["all", "missing"] | None = "all" if name == "unlabelled" else None
        if name == "train" and data.unlabelled == "missing":
            without = "missing"
        readings[name] = OpenedSource(source, first[name], inputs, without)
    lead = next(iter(readings))
    if data.image != recipe.Image() and not any(isinstance(one.inputs, Images) for one in readings.values()):
        raise RefusedError(
            "data.image is given, and the inputs are not images",
            got=f"{readings[lead].inputs.dtype} {list(readings[lead].inputs.shape)} in {sources[lead].name}",
            expected="encoded images, or those of Pillow",
            next="leave out data.image",
        )
    readings = _kept(data, _of_one_colour(readings))
    _check_alike(readings, data.task)
    return readings


def _kept(data: recipe.DataSpec, readings: dict[str, OpenedSource]) -> dict[str, OpenedSource]:
    """The same sources, whose pictures stay encoded where the recipe says so and they come so."""
    others = [
        name for name, one in readings.items() if not (isinstance(one.inputs, Images) and one.inputs.come_encoded)
    ]
    if not data.asks_for_encoded or (others and data.image.keep == "auto"):
        return readings
    if others:
        raise RefusedError(
            "data.image.keep is `encoded`, and the inputs are no encoded images",
            got=f"images that are decoded already, or numbers, in {readings[others[0]].source.name}",
            expected="bytes of encoded images",
            next="leave out data.image.keep",
        )
    return {name: _encoded(one) for name, one in readings.items()}


def _encoded(reading: OpenedSource) -> OpenedSource:
    inputs = reading.inputs
    assert isinstance(inputs, Images)
    first = next(reading.source.blocks(_WEIGHED))
    return dataclasses.replace(
        reading, inputs=inputs.kept_encoded(), encoded=inputs.mean_bytes(first.inputs, first.rows)
    )


def kept_as(reading: OpenedSource) -> dict[str, Any] | None:
    """What is said of pictures that stay encoded, see `meaning_of`; None of other inputs."""
    inputs = reading.inputs
    if not reading.encoded or not isinstance(inputs, Images):
        return None
    return meaning_of(inputs.shape, inputs.image)


def read_labels(
    reading: OpenedSource, task: recipe.Task, classes: Classes, tell: Callable[[int, int], None]
) -> tuple[Classes, np.ndarray]:
    """The labels of a source, int64 or float32 [rows]; without its inputs, where the kind of source allows it.

    Args:
        reading: the source.
        task: what labels are.
        classes: what is known of the dataset's classes; not complete for the source of the train rows.
        tell: called with rows done, and rows in all.

    Returns:
        As `write_source`.

    Raises:
        RefusedError: names the first row whose label is wrong.
    """
    source = reading.source
    if reading.unlabelled == "all":
        return classes, unknown(task, source.rows)
    classes = classes if classes.complete else Classes(source.classes)
    _check_number(source, task, classes)
    convert = reading.labels(task, classes)
    labels = unknown(task, source.rows)

    def work(block: Block) -> int:
        # Each thread writes the rows of its own block, so no lock is needed.
        labels[block.rows] = convert(block.labels, block.rows)
        return len(block)

    blocks = source.label_blocks(_LABEL_ROWS) if source.label_blocks else source.blocks(reading.block_rows)
    for done in itertools.accumulate(map_blocks(blocks, work, default_threads())):
        tell(done, source.rows)
    return _finished(source, task, classes, convert, labels)


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


@contextlib.contextmanager
def telling_sizes(readings: Mapping[str, OpenedSource]) -> Iterator[None]:
    """A block that refuses pictures of several sizes with the sizes of all sources, and with what suits all of them."""
    try:
        yield
    except MixedSizesError as error:
        raise with_sizes(error, _pictures_of(readings)) from error


def _pictures_of(readings: Mapping[str, OpenedSource]) -> dict[str, tuple[Source, Images]]:
    return {name: (one.source, one.inputs) for name, one in readings.items() if isinstance(one.inputs, Images)}


def write_source(
    reading: OpenedSource,
    parts: Sequence[Part],
    task: recipe.Task,
    classes: Classes,
    tell: Callable[[int, int], None],
) -> tuple[Classes, np.ndarray]:
    """Write rows of a source to array files.

    Args:
        reading: the source.
        parts: which go where.
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
    labels = unknown(task, source.rows)

    def work(block: Block) -> tuple[int, list[np.ndarray]]:
        """How many rows the block has, and the inputs of each file."""
        rows = block.rows
        # Also of rows that are left out: which classes there are is a matter of the whole source.
        labels[rows] = convert(block.labels, rows)
        here = [part.rows[rows] for part in parts]
        wanted = np.logical_or.reduce(here)
        if not wanted.any():
            return len(block), []
        inputs = reading.inputs([chosen_rows(column, wanted) for column in block.inputs], rows[wanted])
        return len(block), [inputs[mine[wanted]] for mine in here]

    done = 0
    for count, made in map_blocks(source.blocks(reading.block_rows), work, default_threads()):
        # Not strict, since a block of which no row is wanted has nothing.
        for part, inputs in zip(parts, made, strict=False):
            part.file.write(inputs)
        done += count
        tell(done, source.rows)
    classes, labels = _finished(source, task, classes, convert, labels)
    return classes, labels


def _finished(
    source: Source, task: recipe.Task, classes: Classes, convert: Labels, labels: np.ndarray
) -> tuple[Classes, np.ndarray]:
    """What is known of the classes once all labels of a source were seen, and these as they are kept."""
    labels = convert.finished(labels)
    if classes.complete:
        return classes, labels
    number = 1 if task == "regression" else _count_classes(source, labels, convert)
    return Classes(number, convert.names, complete=True), labels


def chosen_rows(column: Any, wanted: np.ndarray) -> Any:
    """The wanted rows of a column."""
    if wanted.all():
        return column
    if isinstance(column, list):
        return [value for value, one in zip(column, wanted, strict=True) if one]
    return column[wanted] if isinstance(column, np.ndarray) else column.filter(pa.array(wanted))


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
    # More classes than rows come of a mark for rows without a label, such as 255, or of a wrong column.
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


def _check_alike(readings: Mapping[str, OpenedSource], task: recipe.Task) -> None:
    lead, first = next(iter(readings.items()))

    def inputs_are(one: OpenedSource) -> str:
        pair = " of pairs" if len(one.first.inputs) == 2 else ""
        return f"{one.inputs.dtype} {list(one.inputs.shape)}{pair}"

    def labels_are(one: OpenedSource) -> str:
        return "class names" if one.labels(task, Classes()).named else "numbers"

    for (name, reading), (what, describe, hint) in itertools.product(
        readings.items(),
        (
            ("inputs", inputs_are, "bring all sources to one shape and type"),
            ("labels", labels_are, "write the labels of all sources alike"),
        ),
    ):
        if what == "labels" and reading.unlabelled == "all":
            continue
        if (got := describe(reading)) != (expected := describe(first)):
            if what == "inputs":
                hint = _refuse_sizes(reading, first, readings) or hint
            whose = f"the {what} of data.{name} are not like those of data.{lead}"
            raise RefusedError(whose, got=got, expected=expected, next=hint)


def _refuse_sizes(reading: OpenedSource, first: OpenedSource, readings: Mapping[str, OpenedSource]) -> str | None:
    """Refuse sources that differ in the size of their pictures; else what to say in the recipe, if that helps.

    Raises:
        MixedSizesError: names the sizes in all sources, since the first pictures alone do not say whose are mixed.
    """
    ours, theirs = reading.inputs, first.inputs
    if not isinstance(ours, Images) or len(theirs.shape) != 3 or ours.shape[1:] == theirs.shape[1:]:
        return None
    if not isinstance(theirs, Images):
        return framing.advice_for(theirs.shape[1:])
    with telling_sizes(readings):
        raise MixedSizesError("pictures are of several sizes", expected="one size, or `data.image` that says which")
