"""The targets that a stream reads, as they are stored: of a batch of rows, whichever targets these have.

All arrays of the store are one memory map on the node, and the targets of a row lie one after the other in it, so that
a batch is a copy of one slice for each row. Nothing is decoded here: what is stored travels to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.storage.decoded import StoredViews
from akd_dist.storage.interleaved import interleaved
from akd_dist.storage.layout import LOGITS
from akd_dist.storage.pieces import Held, Span
from akd_dist.storage.reader import LogitStore

Gathered = tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]
"""The arrays of some targets by name, and how many of these each row has."""
Items = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""Some targets as a node holds them, and how many of these each row has."""


class StoredTargets(StoredViews):
    """What is stored of targets, read by rows; of a store of any encoding.

    Args:
        store: one store: what describes logits is never averaged.
        cache_root, views, options: as of `StoredViews`.

    Raises:
        DamagedError: the offsets, or an object's size, are not what was sealed; names the key.
    """

    def __init__(self, store: LogitStore, cache_root: Path, views: int = 1, **options: Any) -> None:
        super().__init__(store, cache_root, views, **options)
        self.store = store
        """The store that is read."""
        self.offsets = store.offsets if store.layout.several else None
        """int64 [rows + 1], where a row has several targets: row r has those from offsets[r] up to offsets[r + 1]."""
        self._counts = None if self.offsets is None else np.diff(self.offsets)
        self._each = 1 if self._counts is None else _equal(self._counts)
        self.together = interleaved(store.layout)
        """How all arrays of a target lie in one; None where the store holds logits."""
        self.row_bytes = -(-store.layout.item_bytes * store.layout.rows // max(1, store.num_rows))
        """What is stored of a row, in bytes on average."""

    @property
    def targets(self) -> int:
        """Targets of all rows of a view."""
        return self.store.layout.rows

    def counts(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many targets each of some rows has, int64 [n]."""
        return np.ones(len(rows), np.int64) if self._counts is None else self._counts.take(rows)

    def gather(self, rows: npt.NDArray[np.int64]) -> Gathered:
        """What is stored of the targets of some rows of the view that is read now, in the order of these rows.

        Args:
            rows: int64 [n], by their numbers in the dataset.

        Returns:
            Each array [targets, ...] by name, in the stored dtype: fresh memory, the targets of one row after those of
            the row before. And how many each row has, int64 [n], some perhaps none; their sum is the number of targets.

        Raises:
            IndexError: some rows are not held; see `move`.
        """
        items, counts = self.items(rows)
        return {LOGITS: items} if self.together is None else self.together.split(items), counts

    def items(self, rows: npt.NDArray[np.int64]) -> Items:
        """The same, whose arrays are still one: logits [targets, classes], or bytes, uint8 [targets, item_bytes], which
        `together` splits.
        """
        held = self._held
        ((name, array),) = held.arrays.items()
        counts = self.counts(rows)
        if self._each == 1:
            return held.take(name, rows), counts
        assert self.offsets is not None
        if self._each is not None and held.whole:
            by_row = array.reshape(-1, self._each, *array.shape[1:])
            return by_row.take(rows, axis=0).reshape(-1, *array.shape[1:]), counts
        starts = self.offsets.take(rows)
        if not held.whole:
            starts = _places(held, starts, counts)
        return _slices(array, starts, counts), counts

    def _stored_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        if self.offsets is not None:
            spans = [(int(self.offsets[start]), int(self.offsets[stop])) for start, stop in spans]
        return [(start, stop) for start, stop in spans if start < stop]


def _equal(counts: npt.NDArray[np.int64]) -> int | None:
    """How many targets each row has, where all have equally many and some."""
    most = int(counts.max(initial=0))
    return most if most and (counts == most).all() else None


def _places(held: Held, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the targets of rows begin in what is held, given where they do in the view; 0 for rows without any."""
    found, some = np.zeros_like(starts), counts > 0
    found[some] = held.places(starts[some])
    # A row may lie in several pieces, of which each has to be held, and so all of them stand one after the other.
    last = held.places((starts + counts - 1)[some])
    if (found < 0).any() or (last - found[some] != counts[some] - 1).any():
        raise IndexError("some of these rows are not held")
    return found


def _slices(array: npt.NDArray[Any], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Slices of an array one after the other."""
    if not len(starts):
        return np.empty((0, *array.shape[1:]), array.dtype)
    spans = zip(starts.tolist(), (starts + counts).tolist(), strict=True)
    return np.concatenate([array[start:stop] for start, stop in spans])
