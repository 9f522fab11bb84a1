"""Which row of which file a row of a split was: for whoever wants to go from a logit back to what it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.data.labels import Classes
from akd_dist.data.prepare import OpenedSource, kinds_of, open_sources, read_labels
from akd_dist.data.rows import SPLITS
from akd_dist.data.sources.base import Source
from akd_dist.data.splitting import reads_labels_first, rows_of_split, source_of_split, split_of_source


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Where the rows of a split lie; row n of the split is the n-th of each array."""

    source: str
    """The source, as messages name it."""
    rows: np.ndarray
    """The row of the source, counted through all of its files: int64 [rows], ascending; but train rows without labels
    follow those that have some."""
    files: tuple[str, ...]
    """The files of the source; its name alone where it is one whole, as a dataset of your own is."""
    file: np.ndarray
    """Which of the files, int64 [rows]."""
    file_rows: np.ndarray
    """The row in that file, int64 [rows]."""
    keys: Any = None
    """The key of the sample in a tar file: an Arrow array of strings, null where rows are known by their number; None
    where all of them are."""

    def __repr__(self) -> str:
        return f"SourceRows({len(self):,} rows of {self.source}, in {len(self.files):,} files)"

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> tuple[str, int | str]:
        """The file of a row of the split, and the row in it: its number, or in a tar file the key of the sample.

        Raises:
            IndexError: there is no such row; rows are counted from 0.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"rows [{row}] of {len(self):,}")
        key = None if self.keys is None else self.keys[row].as_py()
        return self.files[self.file[row]], int(self.file_rows[row]) if key is None else key


def source_rows(data: recipe.DataSpec) -> dict[str, SourceRows]:
    """Where the rows of each split lie. Sources are looked at; labels alone are read, where the split is stratified.

    Raises:
        RefusedError, RecipeError, MachineError: as `row_cache.prepare`, of a source that cannot be opened or split.
    """
    return rows_of_splits(data, open_sources(data, kinds_of(data)))


def rows_of_splits(data: recipe.DataSpec, readings: Mapping[str, OpenedSource]) -> dict[str, SourceRows]:
    """The same of sources that are open."""
    labels = None
    if reads_labels_first(data):
        _, labels = read_labels(readings["train"], data.task, Classes(), lambda done, total: None)
    assigned = {name: split_of_source(name, data, one.source, labels) for name, one in readings.items()}
    found = {}
    for split in SPLITS:
        name = source_of_split(data, split)
        found[split] = _located(readings[name].source, rows_of_split(assigned[name], split))
    if data.train is not None and "unlabelled" in readings:
        others = rows_of_split(assigned["unlabelled"], "train")
        found["train"] = _followed_by(found["train"], _located(readings["unlabelled"].source, others))
    return found


def _followed_by(first: SourceRows, then: SourceRows) -> SourceRows:
    """The rows of two sources as those of one split."""
    return SourceRows(
        f"{first.source} and {then.source}",
        np.concatenate([first.rows, then.rows]),
        first.files + then.files,
        np.concatenate([first.file, then.file + len(first.files)]),
        np.concatenate([first.file_rows, then.file_rows]),
        None if first.keys is then.keys is None else pa.concat_arrays([_keys_of(first), _keys_of(then)]),
    )


def _keys_of(rows: SourceRows) -> Any:
    return pa.nulls(len(rows), pa.string()) if rows.keys is None else rows.keys


def _located(source: Source, rows: np.ndarray) -> SourceRows:
    starts = np.zeros(1, dtype=np.int64) if source.file_starts is None else source.file_starts
    # Of files without rows, which begin where the next one does, the last one that begins there has the row.
    file = np.searchsorted(starts, rows, side="right") - 1
    keys = None if source.keys is None else source.keys(rows)
    return SourceRows(source.name, rows, source.files or (source.name,), file, rows - starts[file], keys)
