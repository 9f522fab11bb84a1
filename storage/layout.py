"""Which rows and views a shard holds: pure arithmetic, the same on every machine and for every caller."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

# The format this version writes, and the newest it reads (docs/reference/store-format.md).
FORMAT_VERSION = 3

# What lies in a store's folder: the Zarr group with the one array of these formats, and the documents.
ARRAYS = "arrays.zarr"
LOGITS = "logits"
RECEIPTS = "receipts"
CREATION_KEY = "creation.json"
MANIFEST_KEY = "manifest.json"
SOURCE_KEY = "source.json"
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
_SHARD_TARGET_BYTES = 16 * 2**20
# A small dataset would fill a single shard, and its teacher would run on one CPU of a whole cluster.
_SHARDS_OF_A_SMALL_VIEW = 16
# As Zarr v3's sharding codec lays them out: a crc32c behind each chunk and the index; offset and size for each chunk.
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start` to `stop` of one view: the unit of work, of retry and of atomic writing."""

    view: int
    index: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many dataset rows the shard holds; the last one of a view may hold fewer than the others."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """The shard's object, relative to `arrays.zarr`."""
        # The 0 is the axis of classes, which is never cut.
        return f"{LOGITS}/c/{self.view}/{self.index}/0"

    @property
    def receipt_key(self) -> str:
        """The shard's receipt, relative to the store."""
        return f"{RECEIPTS}/{self.view}-{self.index}.json"

    def __str__(self) -> str:
        return f"view {self.view}, shard {self.index} (rows {self.start} to {self.stop})"


@dataclass(frozen=True)
class StoreLayout:
    """The shape of a store, [views, rows, classes] of `dtype`, and how it is cut into shards.

    A view's shards do not depend on how many views there are.
    """

    views: int
    rows: int
    classes: int
    dtype: str

    # Rows of an inner chunk: what one checksum covers.
    chunk_rows: ClassVar[int] = 256

    @property
    def itemsize(self) -> int:
        """Bytes of one stored logit."""
        return np.dtype(self.dtype).itemsize

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard, a multiple of `chunk_rows`: at most 16 MiB, less where a view has under 16 of them."""
        fitting = _SHARD_TARGET_BYTES // (self.classes * self.itemsize)
        sharing = -(-self.rows // _SHARDS_OF_A_SMALL_VIEW)
        chunks = min(fitting // self.chunk_rows, -(-sharing // self.chunk_rows))
        return max(1, chunks) * self.chunk_rows

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
        return Shard(view, index, start, min(start + self.shard_rows, self.rows))

    @property
    def shard_count(self) -> int:
        """How many shards there are, without naming them: a foreign document may speak of any number."""
        return self.views * self.shards_per_view

    def shards(self) -> list[Shard]:
        """Every shard, view by view, in row order."""
        return [self.shard(view, index) for view in range(self.views) for index in range(self.shards_per_view)]

    @property
    def nbytes(self) -> int:
        """Bytes of the logits themselves, without checksums, indices and padding."""
        return self.views * self.rows * self.classes * self.itemsize

    def stored_bytes(self, shard: Shard) -> int:
        """The exact size of a shard's object: padded chunks with a crc32c each, then the index with its own."""
        chunk = self.chunk_rows * self.classes * self.itemsize + CRC_BYTES
        used = -(-shard.rows // self.chunk_rows)
        return used * chunk + (self.shard_rows // self.chunk_rows) * INDEX_ENTRY_BYTES + CRC_BYTES
