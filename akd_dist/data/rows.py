"""Rows: a dataset as numbered rows. The row number joins inputs and logits, so nothing can slip by one.

The fingerprint of a split is over content and order, not over files.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import splitting
from akd_dist.data.blocks import default_threads
from akd_dist.data.encoded import encoded_of
from akd_dist.data.origins import SourceCheck
from akd_dist.data.text import Tokens
from akd_dist.storage.content import Arrays, Content, Part, digest
from akd_dist.storage.holder import Moving
from akd_dist.storage.pieces import PieceArray
from akd_dist.storage.rows import SealedRows, fingerprint_of

BLOCK_ROWS = 4096
"""Rows of one block of the fingerprint."""
SPLITS = splitting.SPLITS
"""The names of the splits."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbered rows of a split, memory-mapped and read-only."""

    inputs: np.ndarray
    """uint8, float32 or int32 [rows, *shape]: images [channels, height, width], numbers, ids of tokens [length], or
    blocks of a language model [3, length]: ids, segments, and which positions are targets (`data.packing`).
    A `PieceArray` stands for one, and so for the labels, where the rows are not on this node; `EncodedPictures` do
    where pictures stay encoded: `np.asarray` of what is taken of them decodes, `views.view_of` takes it as it is."""
    labels: np.ndarray
    """int64 [rows], each in 0..classes - 1; float32 [rows] for regression. Of train rows those without a label come
    last: theirs is -1, or NaN. Of a language model how many targets each block has: their labels are its tokens."""
    classes: int
    """Number of logits a row has, or a target: the classes; 1 for regression, the vocabulary of a language model."""
    fingerprint: str
    """sha256 over dtype, shape, what labels and ids mean, and the digests of all blocks."""
    blocks: tuple[str, ...]
    """sha256 of each BLOCK_ROWS rows: bytes of the inputs, then of the labels; before those of inputs that stay
    encoded their index."""
    folder: Path
    """Where the arrays lie."""
    task: recipe.Task = "classification"
    """What a label is."""
    class_names: tuple[str, ...] | None = None
    """The names of classes 0, 1, ..., where the data has names."""
    tokens: Tokens | None = None
    """What ids mean, where inputs are text."""
    files: tuple[Path, ...] = ()
    """The files that are mapped; none for rows that are not prepared."""
    inodes: tuple[int | None, ...] = ()
    """Theirs."""
    sealed: SealedRows | None = None
    """Where they lie for every node of a cluster; None for rows that each node prepares."""
    moving: Moving | None = None
    """What is told which windows of them are read; None where all of them are held, or fetched each time."""
    counts: tuple[int, ...] | None = None
    """How many rows each class has, where that is known without the labels."""
    with_labels: int | None = None
    """How many have labels, the first ones; None where all have."""
    block_targets: tuple[int, ...] | None = None
    """Of sealed rows of a language model how many targets each BLOCK_ROWS of them have; None of others."""

    def __repr__(self) -> str:
        said = f"{len(self):,} rows of {self.inputs.dtype} {list(self.shape)}"
        kinds = {"regression": "numbers", "language_model": f"{self.classes:,} ids"}.get(self.task)
        kinds = kinds or f"{self.classes} classes"
        without = f", {self.unlabelled:,} without a label" if self.unlabelled else ""
        return f"Rows({said}, {kinds}{without}, fingerprint {self.fingerprint[:12]})"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> int:
        """How many rows have labels: the first ones."""
        return len(self) if self.with_labels is None else self.with_labels

    @property
    def unlabelled(self) -> int:
        """How many have none."""
        return len(self) - self.labelled

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.inputs.shape[1:]

    @property
    def input_bytes(self) -> int:
        """Bytes of one input, decoded."""
        return math.prod(self.shape) * self.inputs.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's input and label as they are kept, on average."""
        if encoded_of(self.inputs) is not None:
            return -(-self.nbytes // max(len(self), 1))
        return self.input_bytes + self.labels.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all of them as they are kept."""
        if encoded_of(self.inputs) is not None:
            return self.inputs.nbytes + len(self) * self.labels.dtype.itemsize
        return len(self) * self.row_bytes

    @property
    def held(self) -> bool:
        """Whether all of them are on this node."""
        if (encoded := encoded_of(self.inputs)) is not None:
            return encoded.held
        return not isinstance(self.inputs, PieceArray)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """How many targets stand before each row, and in all of them: int64 [rows + 1].

        A row has one target, its label; of a language model as many as positions whose next token is learnt.
        """
        if self.task != "language_model":
            return np.arange(len(self) + 1)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.all_labels(), dtype=np.int64)])

    @property
    def targets(self) -> int:
        """How many logits of a teacher these rows have: one each, or as many as there are positions to learn from."""
        if self.block_targets is not None:
            return sum(self.block_targets)
        return int(self.offsets[-1]) if self.task == "language_model" else len(self)

    def offsets_of(self, start: int, stop: int) -> np.ndarray:
        """`offsets` of rows start..stop - 1 and the row after them, int64 [stop - start + 1].

        Of rows that are not on this node no more are read than the blocks that these lie in.
        """
        if self.block_targets is None:
            return self.offsets[start : stop + 1]
        first = start // BLOCK_ROWS * BLOCK_ROWS
        counts = np.concatenate([np.zeros(1, np.int64), self.labels[first:stop]])
        before = sum(self.block_targets[: first // BLOCK_ROWS])
        found: np.ndarray = before + np.cumsum(counts, dtype=np.int64)[start - first :]
        return found

    def all_labels(self) -> np.ndarray:
        """A copy of the labels; of rows that are not on this node, they are read block by block once."""
        return np.array(self.labels if self.held else self._labels_read)

    @functools.cached_property
    def _labels_read(self) -> np.ndarray:
        starts = range(0, len(self), BLOCK_ROWS)
        return np.concatenate([self.labels[start : start + BLOCK_ROWS] for start in starts])

    def class_counts(self) -> np.ndarray:
        """How many rows each class has, int64 [classes]; for classification. Rows without labels are not counted."""
        if self.counts is not None:
            return np.array(self.counts)
        return np.bincount(self.labels[: self.labelled], minlength=self.classes)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of rows start..stop - 1, without a copy; `np.asarray` decodes what is encoded."""
        return self.inputs[start:stop], self.labels[start:stop]

    def content(self, start: int = 0, stop: int | None = None) -> Content:
        """What the blocks that hold rows start..stop - 1 must hash to; by default all."""
        last = len(self) if stop is None else stop

        def parts() -> Iterator[Part]:
            for number in range(start // BLOCK_ROWS, min(-(-last // BLOCK_ROWS), len(self.blocks))):
                arrays = _block(self.inputs, self.labels, number * BLOCK_ROWS)
                end = number * BLOCK_ROWS + len(arrays[-1])
                yield Part(f"rows {number * BLOCK_ROWS:,} to {end - 1:,}", arrays, self.blocks[number])

        return Content(self.files, parts, self.inodes)

    def describe(self) -> dict[str, Any]:
        """What a store remembers of its dataset, enough to name the first block that differs."""
        return {
            "fingerprint": self.fingerprint,
            "rows": len(self),
            "block_rows": BLOCK_ROWS,
            "blocks": list(self.blocks),
            "meaning": self._meaning,
            **({"labelled": self.labelled} if self.unlabelled else {}),
        }

    @property
    def _meaning(self) -> dict[str, Any]:
        meaning = meaning_of(self.classes, self.task, self.class_names, self.tokens, encoded_as(self.inputs))
        return {"dtype": self.inputs.dtype.str, "shape": list(self.shape), **meaning}

    def check_same(self, described: dict[str, Any]) -> None:
        """Refuse if these are not the very rows that `describe` once told of.

        Raises:
            RefusedError: names the first block that differs.
        """
        if described["fingerprint"] == self.fingerprint:
            return
        raise RefusedError(
            "the dataset is not the one the store was made from",
            got=f"fingerprint {self.fingerprint[:16]}, {len(self):,} rows; "
            f"{first_difference(self.describe(), described)}",
            expected=f"fingerprint {described['fingerprint'][:16]}, {described['rows']:,} rows",
            next="bring back the data, its order and its split, or cache the teacher anew",
        )


def blocks_in_common(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """How many blocks two descriptions (`Rows.describe`) share before the first that differs."""
    pairs = itertools.zip_longest(ours["blocks"], theirs["blocks"])
    return next((number for number, (one, other) in enumerate(pairs) if one != other), len(ours["blocks"]))


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Where two datasets that are not the same begin to differ, from their descriptions (`Rows.describe`)."""
    common = blocks_in_common(ours, theirs)
    if common == len(ours["blocks"]) == len(theirs["blocks"]):
        changed = "; ".join(recipe.differences(theirs.get("meaning", {}), ours.get("meaning", {})))
        return f"the rows are the same, but not what they mean{changed and ': '}{changed}"
    # A description need not say how many rows there are: then the block is named whole.
    counts = [described.get("rows") or (common + 1) * BLOCK_ROWS for described in (ours, theirs)]
    last = min((common + 1) * BLOCK_ROWS, max(counts))
    of = f", of {counts[0]:,} rows now and {counts[1]:,} before" if counts[0] != counts[1] else ""
    return f"rows {common * BLOCK_ROWS:,} to {last:,} are the first that differ{of}"


@dataclass(frozen=True, eq=False)
class Splits:
    """The three disjoint parts of a recipe's data."""

    train: Rows
    """What teachers and students learn from; the only rows that are augmented."""
    validation: Rows
    """What picks the best epoch."""
    test: Rows
    """What is reported, once."""
    sources: SourceCheck = field(default_factory=lambda: SourceCheck({}, lambda: None), kw_only=True)
    """Files that the rows are believed to be made from, still to be read."""
    findings: tuple[str, ...] = field(default=(), kw_only=True)
    """What a user should know of them, a line each: found when they were prepared, and kept with them."""
    of_teacher: Splits | None = field(default=None, kw_only=True)
    """Those that a teacher is trained on who has more labels; None where they are the same."""

    def __repr__(self) -> str:
        return f"Splits(train={self.train}, validation={self.validation}, test={self.test})"

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split."""
        return {name: getattr(self, name).fingerprint for name in SPLITS}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self._all)

    @property
    def held_bytes(self) -> int:
        """Bytes of those that are on this node for good."""
        return sum(rows.nbytes for rows in self._all if rows.held)

    def contents(self) -> list[Content]:
        """What they must hash to, as far as they are on this node for good."""
        return [rows.content() for rows in self._all if rows.held]

    @property
    def _all(self) -> tuple[Rows, ...]:
        return self.train, self.validation, self.test


def fingerprint(
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    task: recipe.Task = "classification",
    class_names: tuple[str, ...] | None = None,
    tokens: Tokens | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, tuple[str, ...]]:
    """The fingerprint of rows and the digests of their blocks: changes with any bit, any label, any swap, any meaning.

    Args:
        on_progress: called with rows done, and rows in all.
    """
    blocks = []
    # hashlib lets other threads run while it hashes, so a pool of them keeps all cores busy.
    with ThreadPoolExecutor(default_threads()) as pool:
        found = pool.map(lambda start: digest(_block(inputs, labels, start)), range(0, len(labels), BLOCK_ROWS))
        for number, block in enumerate(found, 1):
            blocks.append(block)
            if on_progress is not None:
                on_progress(min(number * BLOCK_ROWS, len(labels)), len(labels))
    meaning = meaning_of(classes, task, class_names, tokens, encoded_as(inputs))
    return block_fingerprint(inputs.dtype, inputs.shape, meaning, blocks), tuple(blocks)


def block_fingerprint(
    dtype: np.dtype[Any], shape: Sequence[int], meaning: dict[str, Any], blocks: Sequence[str]
) -> str:
    """The fingerprint of rows whose blocks have these digests.

    Args:
        dtype: of inputs.
        shape: of all inputs, [rows, ...].
    """
    return fingerprint_of(dtype.str, shape, BLOCK_ROWS, meaning, blocks)


def _block(inputs: np.ndarray, labels: np.ndarray, start: int) -> Arrays:
    """What one digest is over; labels are the last."""
    stop = start + BLOCK_ROWS
    if (encoded := encoded_of(inputs)) is not None:
        return (*encoded.stored.part(start, stop), labels[start:stop])
    return inputs[start:stop], labels[start:stop]


def encoded_as(inputs: np.ndarray) -> dict[str, Any] | None:
    """What the meaning of rows says of pictures that stay encoded; None of other inputs."""
    encoded = encoded_of(inputs)
    return None if encoded is None else encoded.meaning


def meaning_of(
    classes: int,
    task: recipe.Task,
    class_names: tuple[str, ...] | None,
    tokens: Tokens | None,
    encoded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What labels, ids and encoded pictures mean, as JSON. What is usual is left out, so that it may become a choice.

    Args:
        encoded: the shape of pictures that stay encoded, and how they become pixels.
    """
    meaning: dict[str, Any] = {"classes": classes}
    if task != "classification":
        meaning["task"] = task
    if class_names is not None:
        meaning["class_names"] = list(class_names)
    if tokens is not None:
        meaning["tokens"] = tokens.model_dump(mode="json")
    if encoded is not None:
        meaning["encoded"] = encoded
    return meaning
