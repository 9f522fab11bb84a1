"""Pictures as files: a folder for each class, or a table that gives the label of each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.formatting import some_of
from akd_dist.data.blocks import Block, read_ahead
from akd_dist.data.file_sets import FileSet
from akd_dist.data.label_tables import find_table, labels_by_file
from akd_dist.data.picture_files import TABLES, find_pictures
from akd_dist.data.sources.base import Source, slices, stats_of
from akd_dist.storage.remote import RemoteFile

# The most bytes of encoded pictures in one block.
_BLOCK_BYTES = 1 << 23
_NO_TABLE = recipe.ImageFolder(path="")
_TRAIN = {"train", "training"}
_SPLITS = frozenset(["train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"])


class ImageFolderSource:
    """Pictures of a folder and below it; rows are in the order of their names, folder by folder."""

    def __init__(self, spec: recipe.ImageFolder) -> None:
        self.spec = spec
        self.found = find_pictures(spec.path)
        self.table = self._table() if spec.label else None

    @functools.cached_property
    def file_set(self) -> FileSet | None:
        """The pictures, if they are files: a key does not name each."""
        return None if self.found.remote else FileSet(self.found.folder, self.found.names)

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed: it looks at every file, and names none of the pictures."""
        files = stats_of([] if self.table is None else [self.table])
        return {**self.spec.model_dump(mode="json"), "listing": self.found.listing(), "files": files}

    def open(self) -> Source:
        """Look at the rows, without reading any picture."""
        found = self.found
        labels, chosen = self._labels()
        self.found.check(chosen)
        names = [self.found.names[number] for number in chosen]
        sizes = [self.found.sizes[number] for number in chosen]
        name, rows = self.spec.path, len(names)
        left_out = self.found.left_out([] if self.table is None else [self.table.name])
        if (unlisted := len(self.found.names) - rows) and self.table is not None:
            left_out += (f"left out of {name}, as {self.table} does not list them: {unlisted:,} pictures",)

        def blocks(most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            last = rows if stop is None else min(stop, rows)
            encoded = read_ahead(chosen[start:last], found.read, found.sizes.__getitem__, waits=found.remote)
            for first, end in _cut(sizes, most, start, last):
                pictures = pa.array(list(itertools.islice(encoded, end - first)), pa.large_binary())
                yield Block(first, [pictures], labels[first:end])

        def labels_alone(first: int, last: int) -> tuple[Sequence[Any], Any]:
            return [], labels[first:last]

        return Source(
            name,
            rows,
            blocks,
            lambda row: f"row {row} of {name} ({names[row]})",
            label_blocks=functools.partial(slices, rows, labels_alone),
            notes=left_out,
            label=() if self.table is None else (f"{self.spec.label} of {self.table.name}",),
            classes=self.spec.classes,
            files=tuple(f"{self.found.folder}/{one}" for one in names),
            file_starts=np.arange(rows, dtype=np.int64),
            names=lambda first, last: names[first:last],
            labels_at_hand=True,
        )

    def _table(self) -> Path | RemoteFile | None:
        """The table of labels: the one that the recipe names, or the one that lies beside the pictures."""
        if self.spec.labels is not None:
            return find_table(self.spec.labels)
        there = [name for name in TABLES if name in self.found.others]
        if len(there) > 1:
            raise RefusedError(
                f"there are several tables of labels in {self.spec.path}",
                got=", ".join(there),
                expected="one",
                next="remove the others, or say which with `labels`",
            )
        return find_table(f"{self.found.folder}/{there[0]}") if there else None

    def _labels(self) -> tuple[Any, Sequence[int]]:
        """The labels of the rows, and which pictures are rows."""
        everything = range(len(self.found.names))
        if not self.spec.label:  # rows that are only predicted
            return pa.nulls(len(everything)), everything
        if self.table is None:
            return self._folders(), everything
        labels, chosen = labels_by_file(self.table, self.spec.file, self.spec.label, self.found.names)
        missing = len(everything) - len(chosen)
        if missing and self.spec.unlisted == "refuse":
            listed = set(chosen)
            first = next(number for number in everything if number not in listed)
            raise RefusedError(
                f"pictures in {self.spec.path} have no label",
                got=f"no row of {self.table} for {missing:,} of {len(everything):,}, such as {self.found.names[first]}",
                expected="a row for each picture",
                next="add the rows; or set `unlisted: leave_out` if the table names a part of the pictures on purpose",
            )
        return labels, chosen

    def _folders(self) -> Any:
        """The name of each picture's class, that of the folder in `path` which it lies in: an Arrow array."""
        names, place = self.found.names, self.spec.path
        if (self.spec.file, self.spec.label) != (_NO_TABLE.file, _NO_TABLE.label):
            raise RefusedError(
                f"there is no table of labels in {place}",
                got=f"the columns {self.spec.file} and {self.spec.label}, and no {', '.join(TABLES)}",
                expected="a table that has them",
                next="name it, `labels: labels.csv`; or leave out `file` and `label` where folders are the classes",
            )
        loose = [name for name in names if "/" not in name]
        if loose:
            alone = not self.found.folders
            raise RefusedError(
                f"{'the pictures' if alone else 'some pictures'} in {place} have no label",
                got=f"{'no folders' if alone else 'beside the folders of classes'}: {some_of(loose, most=3)}",
                expected="a folder for each class, or a table with the label of each file",
                next="name the table, `labels: labels.csv`, or move the pictures into folders called as their classes",
            )
        classes = pa.array([name.partition("/")[0] for name in names]).dictionary_encode()
        there = set(classes.dictionary.to_pylist())
        if empty := [folder for folder in self.found.folders if folder not in there]:
            others = [name for name in self.found.others if name.startswith(f"{empty[0]}/")]
            raise RefusedError(
                f"a folder in {place} holds no pictures",
                got=f"{empty[0]}: {f'other files: {some_of(others, most=3)}' if others else 'empty'}",
                expected="at least one picture in the folder of each class",
                next="remove the folder, or add pictures",
            )
        if there <= _SPLITS and all(name.count("/") > 1 for name in names):
            raise RefusedError(
                f"the folders in {place} are called as splits, and not as classes",
                got=", ".join(sorted(there)),
                expected="a folder for each class",
                next=f"name {place.rstrip('/')}/{max(there & _TRAIN, default=min(there))}, and each as its own source",
            )
        return classes


def _cut(sizes: Sequence[int], most: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The rows of blocks: as many as are asked for, or as have few enough bytes."""
    first, held = start, 0
    for row in range(start, stop):
        if row > first and (row - first == most or held + sizes[row] > _BLOCK_BYTES):
            yield first, row
            first, held = row, 0
        held += sizes[row]
    if first < stop:
        yield first, stop
