"""Which blocks of rows a task writes in one go, and which rows of a source it reads for them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from akd_dist import recipe
from akd_dist.data.columns import Images
from akd_dist.data.packing import Layout
from akd_dist.data.prepare import OpenedSource
from akd_dist.data.row_blocks import BlockRun, Stretch
from akd_dist.data.splitting import SPLITS, UNLABELLED, source_of_split
from akd_dist.storage.rows import BlockReceipt, RowsCreation, receipt_key

# The most blocks that one task writes: of pictures, and of what a function of the user's own makes, decoding takes
# long; of numbers and text reading does, and those of a row group are read together.
_SLOW_BLOCKS, _QUICK_BLOCKS = 4, 16


@dataclass(frozen=True)
class Segment:
    """Rows of a source that follow each other in a split."""

    name: str
    """Of the source."""
    reading: OpenedSource
    places: np.ndarray
    """The rows of the source, int64, rising."""
    labelled: bool
    first: int
    """Which row of the split the first of them is."""

    @property
    def after(self) -> int:
        """The row of the split after the last of them."""
        return self.first + len(self.places)

    def stretch(self, rows: np.ndarray) -> Stretch | None:
        """Those of some rows of the split that are here; None where none are."""
        here = rows[(self.first <= rows) & (rows < self.after)]
        if not len(here):
            return None
        mine = self.places[here - self.first]
        begins, ends = int(mine[0]), int(mine[-1]) + 1
        wanted = np.zeros(ends - begins, dtype=np.bool_)
        wanted[mine - begins] = True
        return Stretch(self.name, begins, ends, len(mine), _bits(wanted), self.labelled)

    @property
    def most(self) -> int:
        """The most blocks that one task writes of it."""
        source = self.reading.source
        slow = isinstance(self.reading.inputs, Images) or source.label_blocks is None
        return _SLOW_BLOCKS if slow else _QUICK_BLOCKS if source.cuts is None else len(self.places)

    def group(self, row: int) -> int:
        """Where reading has to begin for a row of the split: rows between two cuts are read together."""
        # Whoever begins between them reads those before as well.
        cuts = np.zeros(1) if self.reading.source.cuts is None else self.reading.source.cuts
        return int(np.searchsorted(cuts, self.places[row - self.first], side="right"))


def segments_of(split: str, readings: dict[str, OpenedSource], splits: dict[str, np.ndarray]) -> list[Segment]:
    """What a split is made of, in the order of its rows: those without labels come last."""
    found, first = list[Segment](), 0
    numbers = [SPLITS.index(split)] + [UNLABELLED] * (split == "train")
    for number, (name, reading) in itertools.product(numbers, readings.items()):
        places = np.flatnonzero(splits[name] == number)
        if len(places):
            found.append(Segment(name, reading, places, number != UNLABELLED, first))
            first += len(places)
    return found


def runs_of(
    split: str, segments: Sequence[Segment], creation: RowsCreation, there: dict[str, BlockReceipt]
) -> Iterator[BlockRun]:
    """The blocks that are missing of a split, cut into runs: one that lies in two segments is a run of its own."""
    size, ends = creation.block_rows, [one.after for one in segments]
    missing = [at for at in range(creation.blocks(split)) if receipt_key(split, at) not in there]
    # The segments in which each block begins and ends.
    begins = {at: bisect.bisect_right(ends, at * size) for at in missing}
    closes = {at: bisect.bisect_left(ends, at * size + creation.rows_of(split, at)) for at in missing}
    together = [[at] for at in missing if begins[at] != closes[at]]
    for number, segment in enumerate(segments):
        mine = [at for at in missing if begins[at] == closes[at] == number]
        together += _together(mine, [segment.group(at * size) for at in mine], segment.most)
    for blocks in together:
        rows = np.concatenate([at * size + np.arange(creation.rows_of(split, at)) for at in blocks])
        stretches = [stretch for one in segments if (stretch := one.stretch(rows)) is not None]
        yield BlockRun(split, tuple(blocks), tuple(stretches))


def _together(blocks: Sequence[int], groups: Sequence[int], most: int) -> Iterator[list[int]]:
    """Blocks of the same group, at most so many."""
    run: list[int] = []
    group = None
    for block, its in zip(blocks, groups, strict=True):
        if run and (its != group or len(run) == most):
            yield run
            run = []
        run, group = [*run, block], its
    if run:
        yield run


def packed_runs(
    data: recipe.DataSpec, split: str, layout: Layout, creation: RowsCreation, there: Mapping[str, BlockReceipt]
) -> Iterator[BlockRun]:
    """The blocks that are missing of a split of a language model, each a run with the documents that it is made of."""
    size = creation.block_rows
    for number in range(creation.blocks(split)):
        if receipt_key(split, number) in there:
            continue
        part = layout.part(number * size, min((number + 1) * size, layout.blocks))
        begins, ends = int(part.documents.min()), int(part.documents.max()) + 1
        wanted = np.zeros(ends - begins, dtype=np.bool_)
        wanted[part.documents - begins] = True
        stretch = Stretch(source_of_split(data, split), begins, ends, len(part.documents), _bits(wanted))
        yield BlockRun(split, (number,), (stretch,), part)


def _bits(wanted: np.ndarray) -> bytes | None:
    return None if wanted.all() else np.packbits(wanted).tobytes()
