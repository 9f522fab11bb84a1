"""Blocks of rows, written under a store root: what a task does that reads a source for a cluster."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, cast

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import findings
from akd_dist.data.blocks import Block, map_blocks
from akd_dist.data.columns import Images, Inputs, NotGreyError
from akd_dist.data.documents import Documents, OpenedDocuments, open_documents, read_documents
from akd_dist.data.encoded import EncodedPictures, Mapped, encoded_of
from akd_dist.data.labels import Classes, unknown
from akd_dist.data.noted import Noted
from akd_dist.data.origins import Origin, sha256_of, size_and_time
from akd_dist.data.packing import Layout, cut, target_counts
from akd_dist.data.prepare import OpenedSource, chosen_rows, in_colour, kinds_of, open_sources, telling_sizes
from akd_dist.data.sources.base import local_files, remote_files
from akd_dist.data.text import Tokens
from akd_dist.storage.content import Arrays
from akd_dist.storage.rows import BlockReceipt, RowsCreation, RowsWriter, write_block


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as the planning process saw it."""

    size: int
    modified: int
    """In ns; of many files, a hash of their sizes and times."""
    sha256: str


@dataclass(frozen=True)
class RowsJob:
    """What a task needs to write any blocks: small, picklable."""

    writer: RowsWriter
    data: recipe.DataSpec
    classes: Classes
    """All that is known of them."""
    colour: bool
    """Whether grey images get three channels, since others have colours."""
    files: tuple[SourceFile, ...]
    """The files of all sources, in their order."""
    objects: list[list[Any]]
    """Those in object storage: URI, size and entity tag of each."""
    known: dict[str, Any] = field(default_factory=dict)
    """What tasks need not look for again, by source: `Source.known`."""


@dataclass(frozen=True)
class Stretch:
    """Rows of a source that are read one after the other."""

    source: str
    """The split whose source they are read from; `unlabelled` for that of rows without labels."""
    start: int
    """The rows of the source to read: from this one on."""
    stop: int
    rows: int
    """How many of them are wanted."""
    chosen: bytes | None
    """Which of the rows that are read those are, a bit each; None for all."""
    labelled: bool = True
    """Whether their labels are kept."""

    def wanted(self) -> np.ndarray:
        """The same as bool [stop - start]."""
        if self.chosen is None:
            return np.ones(self.stop - self.start, dtype=np.bool_)
        bits = np.unpackbits(np.frombuffer(self.chosen, np.uint8), count=self.stop - self.start)
        return bits.view(np.bool_)


@dataclass(frozen=True)
class BlockRun:
    """Blocks of a split that are read in one go."""

    split: str
    numbers: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    """What they are made of: one, or two where rows with labels end within a block and others follow."""
    layout: Layout | None = None
    """Of a language model, whose runs are of one block: where the documents of the stretch go in it."""

    @property
    def rows(self) -> int:
        """How many rows the blocks have."""
        return sum(one.rows for one in self.stretches) if self.layout is None else self.layout.blocks

    def __str__(self) -> str:
        first, last = self.numbers[0], self.numbers[-1]
        return f"{f'block {first}' if first == last else f'blocks {first} to {last}'} of the {self.split} rows"


def write_run(job: RowsJob, run: BlockRun, threads: int = 1) -> list[BlockReceipt] | None:
    """Read rows of a source and publish their blocks, each with its receipt. Harmless to repeat, and to do twice.

    Args:
        threads: how many decode.

    Returns:
        The receipts; None where an image has colours, and all before it were grey.

    Raises:
        RefusedError: a row is wrong, which is named; or this node's files are not those that were planned with.
        MachineError: the root cannot be written.
    """
    creation, began = job.writer.creation, time.perf_counter()
    receipts, filling = list[BlockReceipt](), _Filling(creation, run)
    try:
        for part in _parts(job, run, threads):
            if (whole := filling.add(*part)) is None:
                continue
            seconds, began = time.perf_counter() - began, time.perf_counter()
            number, noted = run.numbers[part[0]], dataclasses.asdict(filling.noted)
            told = base64.b64encode(findings.stable_hashes(filling.inputs).tobytes()).decode()
            targets = 0 if run.layout is None else int(part[2].sum())
            receipts.append(
                write_block(
                    job.writer, run.split, number, whole, **noted, hashes=told, seconds=seconds, targets=targets
                )
            )
    except NotGreyError:
        return None
    return receipts


_Made = tuple[int, np.ndarray, np.ndarray, Noted]
"""Rows of a block of the run: which of its blocks, inputs, labels, and what is to be noted of pictures."""


def _parts(job: RowsJob, run: BlockRun, threads: int) -> Iterator[_Made]:
    """What the rows of a run become, in their order."""
    if run.layout is not None:
        yield _packed(job, run.stretches[0], run.layout, threads)
        return
    before = 0
    for stretch in run.stretches:
        for parts in _parts_of(job, stretch, before, threads):
            yield from parts
        before += stretch.rows


def _parts_of(job: RowsJob, stretch: Stretch, before: int, threads: int) -> Iterator[list[_Made]]:
    """The same of a stretch.

    Args:
        before: rows of the run in the stretches before.
    """
    readings, task = cast(Mapping[str, OpenedSource], _opened(job)), job.data.task
    reading = readings[stretch.source]
    convert, wanted = reading.labels(task, job.classes), stretch.wanted()
    # Which of the blocks a row belongs to.
    ordinals = (before + np.cumsum(wanted) - 1) // job.writer.creation.block_rows

    def work(block: Block) -> list[_Made]:
        at = block.rows - stretch.start
        made = []
        for ordinal in np.unique(ordinals[at[wanted[at]]]).tolist():
            mine = wanted[at] & (ordinals[at] == ordinal)
            rows = block.rows[mine]
            inputs = reading.inputs.afresh() if isinstance(reading.inputs, Images) else reading.inputs
            kept = convert(chosen_rows(block.labels, mine), rows) if stretch.labelled else unknown(task, len(rows))
            values = inputs([chosen_rows(column, mine) for column in block.inputs], rows)
            made.append((ordinal, values, kept, inputs.noted if isinstance(inputs, Images) else Noted()))
        return made

    with telling_sizes(readings):
        yield from map_blocks(reading.source.blocks(reading.block_rows, stretch.start, stretch.stop), work, threads)


def _packed(job: RowsJob, stretch: Stretch, layout: Layout, threads: int) -> _Made:
    """The rows of a run of a language model: all of its documents are held, and cut into blocks."""
    reading, held = cast(Mapping[str, OpenedDocuments], _opened(job))[stretch.source], dict[int, np.ndarray]()

    def take(rows: np.ndarray, found: list[np.ndarray]) -> None:
        held.update(zip(rows.tolist(), found, strict=True))

    read_documents(reading, take, threads=threads, start=stretch.start, stop=stretch.stop, wanted=stretch.wanted())
    numbers = layout.documents.tolist()
    counts = [len(held[number]) for number in numbers]
    if counts != layout.counts.tolist():
        at = next(at for at, count in enumerate(counts) if count != layout.counts[at])
        raise _other_files(
            f"{counts[at]:,} tokens in {reading.source.where(numbers[at])}", f"{layout.counts[at]:,} tokens"
        )
    blocks = cut(layout, lambda number: held[numbers[number]], reading.documents.tokens.padding)
    return 0, blocks, target_counts(blocks), Noted()


class _Filling:
    """A block in the making: one at a time, so that a task's memory is bounded."""

    def __init__(self, creation: RowsCreation, run: BlockRun) -> None:
        self._creation, self._run = creation, run
        self._ordinal = self._rows = self._filled = -1
        self.noted = Noted()
        self._data = bytearray()
        self.inputs = self._labels = np.empty(0)
        self._encoded = list[Arrays]()

    def add(self, ordinal: int, inputs: np.ndarray, labels: np.ndarray, noted: Noted) -> bytes | None:
        """Take rows of the run's block of this place; the block once it is whole."""
        if ordinal != self._ordinal:
            self._begin(ordinal)
        here = slice(self._filled, self._filled + len(labels))
        if (encoded := encoded_of(inputs)) is None:
            self.inputs[here] = inputs
        else:
            self._encoded.append(encoded.stored.part(0, len(encoded)))
            self.inputs = inputs
        self._labels[here] = labels
        self._filled, self.noted = here.stop, self.noted + noted
        return self._whole() if self._filled == self._rows else None

    def _begin(self, ordinal: int) -> None:
        self._ordinal, self._filled, self.noted = ordinal, 0, Noted()
        self._rows = self._creation.rows_of(self._run.split, self._run.numbers[ordinal])
        if self._creation.encoded is None:
            self._data = bytearray(self._creation.bytes_of(self._rows))
            self.inputs, self._labels = self._creation.arrays(self._data, self._rows)
        else:
            self._encoded, self._labels = [], np.empty(self._rows, self._creation.labels)

    def _whole(self) -> bytes:
        if self._creation.encoded is None:
            return bytes(self._data)
        index, data = (np.concatenate(parts) for parts in zip(*self._encoded, strict=True))
        encoded = encoded_of(self.inputs)
        assert encoded is not None
        whole = EncodedPictures(Mapped(index, data), encoded.shape[1:], encoded.image)
        self.inputs, self._encoded = whole.as_array(), []
        return b"".join((index.astype("<i8", copy=False).tobytes(), data.tobytes(), self._labels.tobytes()))


_readings: dict[str, Mapping[str, OpenedSource | OpenedDocuments]] = {}


def _opened(job: RowsJob) -> Mapping[str, OpenedSource | OpenedDocuments]:
    """The job's sources, opened once in a process, and checked to be those that were planned with."""
    key = job.writer.creation.sha256
    if key not in _readings:
        kinds = kinds_of(job.data)
        keys = {name: kind.key() for name, kind in kinds.items()}
        if (found := remote_files(keys)) != job.objects:
            raise _other_files(*next((one, other) for one, other in zip_longest(found, job.objects) if one != other))
        _check_files(job, local_files(kinds, keys))
        readings: Mapping[str, OpenedSource | OpenedDocuments]
        inputs: Inputs | Documents
        if job.data.task == "language_model":
            readings = documents = open_documents(job.data, kinds, job.known)
            inputs = next(iter(documents.values())).documents
            _check_tokens(inputs.tokens, job.writer.creation.meaning["tokens"])
        else:
            sources = open_sources(job.data, kinds, job.known)
            readings = sources = in_colour(sources) if job.colour else sources
            inputs = next(iter(sources.values())).inputs
        if (inputs.dtype.str, list(inputs.shape)) != (job.writer.creation.dtype, job.writer.creation.shape):
            raise _other_files(f"{inputs.dtype} {list(inputs.shape)}", str(job.writer.creation.shape))
        _readings.clear()
        _readings[key] = readings
    return _readings[key]


def _check_files(job: RowsJob, files: Sequence[Origin]) -> None:
    """Refuse files that are not those of the planning process: a node may have copies of its own."""
    if len(files) != len(job.files):
        raise _other_files(f"{len(files):,} files", f"{len(job.files):,}")
    for path, planned in zip(files, job.files, strict=True):
        size, modified = size_and_time(path) or (0, 0)
        if size != planned.size:
            raise _other_files(f"{path} with {size:,} bytes", f"{planned.size:,} bytes")
        # A copy that keeps the time is one of `rsync -a` or `cp -p`; of any other its content is looked at.
        if modified != planned.modified and (digest := sha256_of(path)) != planned.sha256:
            raise _other_files(f"{path} with sha256 {digest[:16]}", f"sha256 {planned.sha256[:16]}")


def _check_tokens(tokens: Tokens, planned: dict[str, Any]) -> None:
    """Refuse a tokenizer that is not that of the planning process, or whose chats another version writes."""
    ours = tokens.model_dump(mode="json")
    if ours != planned:
        raise RefusedError(
            "the tokenizer on this node is not that of the driver",
            got="; ".join(recipe.differences(planned, ours)),
            expected="the same tokenizer, and for chats the same version of transformers, on every node",
            next="make the same folder visible on every node",
        )


def _other_files(got: object, expected: object) -> RefusedError:
    return RefusedError(
        "the files of the data on this node are not those of the driver",
        got=got,
        expected=expected,
        next="make the same files visible on every node, or keep them in object storage",
    )
