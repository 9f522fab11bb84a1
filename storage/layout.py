"""Which rows and views a shard holds: pure arithmetic, the same on every machine and for every caller."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

# The format of stores of logits, a target a row (docs/reference/store-format.md).
FORMAT_VERSION = 3
# The format of stores that hold other arrays than logits, or several targets a row; and the newest that is read.
TARGETS_FORMAT = 4

# What lies in a store's folder: the Zarr group with the one array of these formats, and the documents.
ARRAYS = "arrays.zarr"
LOGITS = "logits"
RECEIPTS = "receipts"
CREATION_KEY = "creation.json"
MANIFEST_KEY = "manifest.json"
SOURCE_KEY = "source.json"
FIDELITY_KEY = "fidelity.json"
GROUP_KEY = "zarr.json"
ARRAY_KEY = f"{LOGITS}/zarr.json"
# Beside it: objects of the store that were found to be no good.
DAMAGED_SUFFIX = ".damaged"
# The folder beside stores of the models that recipes trained for them.
TEACHERS = "teachers"
# The folder beside stores of what students had at the end of a stage I that others may share.
STAGES = "stages"
# The folder beside stores of the rows that were prepared for a cluster, and where in each of them its blocks lie.
ROWS = "rows"
BLOCKS = "blocks"

# A shard is encoded in memory, and lost as a whole with its task, so it has a bound; object storage wants few and large
# objects.
_SHARD_BYTES = 16 * 2**20
# A small dataset would fill a single shard, and its teacher would run on one CPU of a whole cluster.
_SHARDS_OF_A_SMALL_VIEW = 16
# As Zarr v3's sharding codec lays them out: a crc32c behind each chunk and the index; offset and size for each chunk.
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
# What one checksum covers where a row has several targets, which are small: so many of them.
_CHUNK_TARGETS = 4096


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One of the arrays of a store, [views, items, *shape]: what it holds of each item."""

    name: str
    dtype: str
    """As NumPy and Zarr spell it; little-endian in the store."""
    shape: tuple[int, ...]
    """Of one item."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @property
    def metadata_key(self) -> str:
        """Its Zarr metadata, relative to `arrays.zarr`."""
        return f"{self.name}/zarr.json"

    def key(self, view: int, index: int) -> str:
        """The object of one of its shards, relative to `arrays.zarr`: no axis but the first two is ever cut."""
        return "/".join([self.name, "c", str(view), str(index), *("0" for _ in self.shape)])


@dataclass(frozen=True, slots=True)
class Shard:
    """Items `start` to `stop` of one view, rows or targets: the unit of work, of retry and of atomic writing."""

    view: int
    index: int
    start: int
    stop: int
    arrays: tuple[StoredArray, ...] = field(default=(), repr=False)
    """Those that it has an object of, in order, from format 4 on; before, all have one object of the array `logits`."""

    @property
    def rows(self) -> int:
        """How many items the shard holds; the last one of a view may hold fewer than the others."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """What names it in records: its object, relative to `arrays.zarr`; from format 4 on its view and index."""
        return f"{self.view}/{self.index}" if self.arrays else f"{LOGITS}/c/{self.view}/{self.index}/0"

    @property
    def keys(self) -> list[str]:
        """Its objects, relative to `arrays.zarr`, in the order they are published in."""
        return [array.key(self.view, self.index) for array in self.arrays] or [self.key]

    @property
    def receipt_key(self) -> str:
        """The shard's receipt, relative to the store."""
        return f"{RECEIPTS}/{self.view}-{self.index}.json"

    def __str__(self) -> str:
        return (
            f"view {self.view}, shard {self.index} ({'items' if self.arrays else 'rows'} {self.start} to {self.stop})"
        )


@dataclass(frozen=True)
class StoreLayout:
    """The shape of a store, and how it is cut into shards of items: rows, or targets where a row has several.

    By default it has one array of logits, [views, rows, classes] of `dtype`. A view's shards do not depend on how many
    views there are.
    """

    views: int
    rows: int
    """Items of a view."""
    classes: int
    dtype: str
    """Of the logits; empty where there are none."""
    arrays: tuple[StoredArray, ...] = ()
    """What it holds of each item, from format 4 on."""
    several: bool = False
    """Whether items are targets, of which a row has several."""

    # Rows of an inner chunk: what one checksum covers.
    chunk_rows: ClassVar[int] = 256

    @property
    def fields(self) -> tuple[StoredArray, ...]:
        """All arrays of the store, in the order that they are published in."""
        return self.arrays or (StoredArray(LOGITS, self.dtype, (self.classes,)),)

    @property
    def item_bytes(self) -> int:
        """Bytes of one item over all arrays."""
        if not self.arrays:
            return self.classes * np.dtype(self.dtype).itemsize
        return sum(array.item_bytes for array in self.fields)

    @property
    def chunk(self) -> int:
        """Items of an inner chunk: 4,096 targets or 256 rows, halved until all arrays of a chunk are within 16 MiB."""
        if not self.arrays:
            return self.chunk_rows
        chunk = _CHUNK_TARGETS if self.several else self.chunk_rows
        while chunk > 1 and chunk * self.item_bytes > _SHARD_BYTES:
            chunk //= 2
        return chunk

    @property
    def shard_rows(self) -> int:
        """Items of a full shard, a multiple of `chunk`: at most 16 MiB, less where a view has under 16 of them."""
        chunk, fitting = self.chunk, _SHARD_BYTES // self.item_bytes
        sharing = -(-self.rows // _SHARDS_OF_A_SMALL_VIEW)
        chunks = min(fitting // chunk, -(-sharing // chunk))
        return max(1, chunks) * chunk

    @property
    def shards_per_view(self) -> int:
        """How many shards hold one view."""
        return -(-self.rows // self.shard_rows)

    def shard(self, view: int, index: int) -> Shard:
        """The shard at a place.

        Raises:
            IndexError: the store has no such view or shard.
        """
        if not (0 <= view < self.views and 0 <= index < self.shards_per_view):
            raise IndexError(f"no shard ({view}, {index}) in {self.views} views of {self.shards_per_view} shards")
        start = index * self.shard_rows
        return Shard(view, index, start, min(start + self.shard_rows, self.rows), self.arrays)

    @property
    def shard_count(self) -> int:
        """How many shards there are, without naming them: a foreign document may speak of any number."""
        return self.views * self.shards_per_view

    def shards(self) -> list[Shard]:
        """Every shard, view by view, in row order."""
        size, rows, arrays = self.shard_rows, self.rows, self.arrays
        spans = [(index, start, min(start + size, rows)) for index, start in enumerate(range(0, rows, size))]
        return [Shard(view, index, start, stop, arrays) for view in range(self.views) for index, start, stop in spans]

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored itself, without checksums, indices and padding."""
        return self.views * self.rows * self.item_bytes

    def stored_bytes(self, shard: Shard) -> int:
        """The exact size of a shard's objects together."""
        return sum(self.object_sizes(shard))

    def object_sizes(self, shard: Shard) -> list[int]:
        """The exact size of each of a shard's objects: padded chunks with a crc32c each, the index with its own."""
        used, chunks = -(-shard.rows // self.chunk), self.shard_rows // self.chunk
        index = chunks * INDEX_ENTRY_BYTES + CRC_BYTES
        return [used * (self.chunk * array.item_bytes + CRC_BYTES) + index for array in self.fields]
