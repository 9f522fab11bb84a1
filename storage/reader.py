"""Reading a sealed store: nothing is taken for data that is not, byte for byte, what was sealed.

zarr-python returns the fill value for a missing shard, without an error. So presence and size of every object are
checked against the manifest at every open, and the sha256 of every shard that is read, before zarr sees it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.storage.dictionary import DICTIONARY, Dictionary
from akd_dist.storage.fetching import fetch_ahead
from akd_dist.storage.layout import ARRAYS, LOGITS, Shard, StoreLayout
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, Stat
from akd_dist.storage.roots import open_root
from akd_dist.storage.seal import read_manifest as read_manifest
from akd_dist.storage.sealed_objects import (
    Damage,
    damages_of,
    decode_sealed,
    key_of,
    metadata_problems,
    missing,
    shard_problem,
    table_problem,
    table_records,
)
from akd_dist.storage.tables import OFFSETS, Table, check_table, damaged_table, read_table

if TYPE_CHECKING:
    import pyarrow as pa

# A request to object storage takes some 30 ms, in which nothing else would happen.
_AT_ONCE = 16
_BYTES_AHEAD = 128 * 2**20
Arrays = dict[str, npt.NDArray[Any]]
"""What is stored of some items: the arrays of the store by name."""


@dataclass(frozen=True, eq=False)
class LogitStore:
    """A sealed store, open for reading; made by `open_store`."""

    uri: str
    manifest: Manifest = field(repr=False)
    # The shard read last: rows are mostly asked for in order.
    _last: dict[Shard, Arrays] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        """The store's id."""
        return self.manifest.id

    def __repr__(self) -> str:
        said = f"{self.views} views of {self.num_rows:,} rows, {self.classes} logits each"
        if self.layout.arrays:
            said = f"{self.views} views of {self.layout.rows:,} targets, {self.manifest.identity.encoded}"
        return f"LogitStore({self.uri!r}: {said})"

    @property
    def layout(self) -> StoreLayout:
        """How the store is cut into shards."""
        return self.manifest.identity.layout

    @property
    def views(self) -> int:
        """How many views of every row there are."""
        return self.manifest.identity.views

    @property
    def num_rows(self) -> int:
        """How many rows the dataset has."""
        return self.manifest.identity.rows

    @property
    def classes(self) -> int:
        """How many logits a row has."""
        return self.manifest.identity.classes

    @property
    def ref(self) -> str:
        """Where it lies."""
        return self.uri

    @property
    def teacher(self) -> str:
        """The fingerprint of whose logits they are."""
        return self.manifest.identity.teacher

    @property
    def dtype(self) -> str:
        """The dtype of what is stored."""
        return self.layout.dtype

    @property
    def name(self) -> str:
        """What is decoded of it is known by: not the id, since the same logits computed on another device, or in other
        batches, have other bytes."""
        return self.manifest.sha256

    @property
    def manifests(self) -> list[Manifest]:
        """Its seal."""
        return [self.manifest]

    @functools.cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Which targets are whose, int64 [rows + 1]: row r has those from offsets[r] up to offsets[r + 1].

        Raises:
            DamagedError: they are not what was sealed.
        """
        if OFFSETS not in (self.manifest.tables or {}):
            return np.arange(self.num_rows + 1)
        return self._table(OFFSETS)[OFFSETS]

    def _table(self, name: str) -> Table:
        """What is sealed under a name, which has to fit the identity: a store may have been sealed by anybody."""
        root = open_root(self.uri)
        found = read_table(root, name, (self.manifest.tables or {})[name])
        try:
            check_table(self.manifest.identity, name, found)
        except RefusedError as error:
            raise damaged_table(root, name, error.line) from error
        return found

    def dictionary(self) -> Dictionary:
        """What the targets of a `top_k` store are described by, read anew each time.

        Raises:
            RefusedError: the store holds logits.
            DamagedError: it is not what was sealed; names the object.
        """
        _ = self.manifest.identity.top_k
        return Dictionary.from_arrays(self._table(DICTIONARY))

    def content(self, shard: Shard) -> str | None:
        """The sha256 of a shard's decoded arrays; None in a store that does not say."""
        return self.manifest.content(shard)

    def tokens(self) -> dict[str, str]:
        """What names each shard's object as it is now, by key; raises as `stats`."""
        return {key: stat.token for key, stat in self.stats().items()}

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, key: Any) -> npt.NDArray[np.float32]:
        """Logits as of an array [views, rows, classes] whose rows are asked for first: float32.

        `store[rows]` gives all views of rows, [views, n, classes]; `store[view, rows]` one view, [n, classes]. `rows`
        is a number, which leaves out its axis, or a slice. Shards that hold them are read, one after the other.

        Raises:
            IndexError: there is no such view or row.
            DamagedError: as `rows`.
        """
        view, rows = key if isinstance(key, tuple) and len(key) == 2 else (None, key)
        self.check_logits()
        numbers = self._numbers(rows)
        views = range(self.views) if view is None else [self._place(view, self.views, "view")]
        found = np.stack([self._take(one, np.asarray(numbers, dtype=np.int64)) for one in views])
        found = found if isinstance(rows, slice) else found[:, 0]
        return found if view is None else found[0]

    def _take(self, view: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        found = np.empty((len(rows), self.classes), np.float32)
        owners = rows // self.layout.shard_rows
        for index in np.unique(owners).tolist():
            shard, mine = self.layout.shard(view, index), owners == index
            stored = self._shard(shard)[LOGITS][rows[mine] - shard.start]
            found[mine] = self.manifest.identity.codec.decode({LOGITS: stored})
        return found

    def _numbers(self, rows: Any) -> range:
        if isinstance(rows, slice):
            return range(*rows.indices(self.num_rows))
        first = self._place(rows, self.num_rows, "row")
        return range(first, first + 1)

    def _place(self, place: Any, count: int, what: str) -> int:
        number = operator.index(place)
        if not -count <= number < count:
            raise IndexError(f"{what} {number} of {count:,}")
        return number % count

    def to_arrow(self, views: Sequence[int] | None = None) -> pa.RecordBatchReader:
        """Views of the store as a stream of Arrow, a record batch a shard: `.read_all()` makes a `pyarrow.Table`.

        Args:
            views: which, in that order; None for all.

        Returns:
            Columns `view`, int32; `row`, int64; `logits`, a list of `classes` float32. Ordered by view and row.

        Raises:
            IndexError: there is no such view.
            DamagedError: as `rows`; of a shard also later, when it is read.
        """
        from akd_dist.storage.arrow import reader_of

        self.check_logits()
        chosen = range(self.views) if views is None else [self._place(view, self.views, "view") for view in views]
        shards = [self.layout.shard(view, index) for view in chosen for index in range(self.layout.shards_per_view)]
        decode = self.manifest.identity.codec.decode
        stored = zip(shards, self.shards(shards), strict=True)
        return reader_of(
            self.classes, ((shard.view, shard.start, decode({LOGITS: logits})) for shard, logits in stored)
        )

    def rows(self, view: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Logits of consecutive rows of a view, float32 [stop - start, classes].

        Raises:
            IndexError: the store has no such view or rows.
            DamagedError: a shard is not what was sealed; names its key.
        """
        self.check_logits()
        return self.manifest.identity.codec.decode(self.targets(view, start, stop))

    def targets(self, view: int, start: int, stop: int) -> Arrays:
        """What is stored of consecutive items, targets or rows, of a view: each array [stop - start, ...] by name.

        Raises:
            IndexError, DamagedError: as `rows`.
        """
        layout = self.layout
        if not (0 <= view < self.views and 0 <= start <= stop <= layout.rows):
            raise IndexError(f"view {view}, rows {start} to {stop}: not in {self.views} views of {layout.rows} rows")
        found = {one.name: np.empty((stop - start, *one.shape), one.dtype) for one in layout.fields}
        # No rows read no shard: the rounded end alone would name one.
        for index in range(start // layout.shard_rows, -(-stop // layout.shard_rows) if stop > start else 0):
            shard = layout.shard(view, index)
            first, last = max(start, shard.start), min(stop, shard.stop)
            for name, stored in self._shard(shard).items():
                found[name][first - start : last - start] = stored[first - shard.start : last - shard.start]
        return found

    def check_logits(self) -> None:
        """Refuse a store that has no logits, or whose rows have several targets.

        Raises:
            RefusedError: so it is; says what reads it.
        """
        _ = self.manifest.identity.codec
        if self.layout.several:
            raise RefusedError(
                "a row of this store has several targets, each with logits of its own",
                got=f"{self.layout.rows:,} targets in {self.num_rows:,} rows",
                expected="a store of one target a row",
                next="read its targets (LogitStore.targets, StoredTargets)",
            )

    def shard(self, view: int, index: int) -> npt.NDArray[Any]:
        """A whole shard of logits, [shard.rows, classes] in the stored dtype; its sha256 and every crc32c are checked.

        Raises:
            IndexError: the store has no such shard.
            DamagedError: the shard is not what was sealed; names its key.
        """
        (logits,) = self.shards([self.layout.shard(view, index)])
        return logits

    def shards(self, shards: Sequence[Shard]) -> Iterator[npt.NDArray[Any]]:
        """Several whole shards, in the order asked for, each as of `shard`; of object storage several are on their way.

        Raises:
            RefusedError: the store holds no logits.
            DamagedError: a shard is not what was sealed; names its key.
        """
        _ = self.manifest.identity.codec
        return (arrays[LOGITS] for arrays in self.shard_arrays(shards))

    def shard_arrays(self, shards: Sequence[Shard]) -> Iterator[Arrays]:
        """All arrays of several whole shards by name, [shard.rows, ...] in the stored dtypes; as `shards`."""
        pairs = [(shard, array) for shard in shards for array in self.layout.fields]
        objects, found = self._objects, Arrays()
        for (shard, array), fetch in fetch_ahead(pairs, lambda pair: objects.get(key_of(*pair)), self._most_ahead):
            key = key_of(shard, array)
            try:
                found[array.name] = decode_sealed(self.manifest, shard, array, fetch())
            except ObjectMissing:
                raise self.damaged(key, missing(objects, key)) from None
            except ValueError as error:
                raise self.damaged(key, error) from error
            if len(found) == len(self.layout.fields):
                yield found
                found = Arrays()

    @property
    def _most_ahead(self) -> int:
        """How many shards may be on their way: none of a folder, and of large ones fewer."""
        if self._objects.local_path("") is not None:
            return 0
        fields = self.layout.fields
        one = max(1, self.layout.shard_rows * self.layout.item_bytes // len(fields))
        return max(1, min(_AT_ONCE * len(fields), _BYTES_AHEAD // one))

    def stats(self) -> dict[str, Stat]:
        """Size and token of every shard's objects by key, as they are now, in the manifest's order.

        Raises:
            DamagedError: an object of a shard, or of a table, is missing or has another size; names its key.
        """
        found, sizes, fields = self._objects.list(), self.manifest.sizes(), self.layout.fields
        of_shards = ((shard, array) for shard in self.layout.shards() for array in fields)
        for (shard, array), (key, size) in zip(of_shards, sizes.items(), strict=True):
            stat = found.get(key)
            if stat is not None and stat.size == size:
                continue
            if problem := shard_problem(self._objects, self.manifest, shard, array, stat, deep=False):
                raise self.damaged(key, problem)
        for record in table_records(self.manifest):
            if problem := table_problem(self._objects, record, found.get(record.key), deep=False):
                raise self.damaged(record.key, problem)
        return {key: found[key] for key in sizes}

    def verify(self, *, deep: bool = True, on_progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Everything that is not what was sealed; empty for a good store.

        Args:
            deep: read every shard and check its sha256, not only presence and size.
            on_progress: called with how many shards are checked, and of how many.
        """
        return damages_of(open_root(self.uri), self.manifest, deep=deep, on_progress=on_progress)

    def check(self) -> None:
        """Presence and size of every shard, and the Zarr metadata: what `open_store` does.

        Raises:
            DamagedError: names the first key that is wrong.
        """
        for key, problem in metadata_problems(self._objects, self.manifest):
            raise self.damaged(key, problem)
        self.stats()

    def damaged(self, key: str, problem: object) -> DamagedError:
        """The refusal that names an object of arrays.zarr and how to mend it."""
        root = open_root(self.uri).parent.uri
        return DamagedError(
            f"{self.uri}/{ARRAYS}/{key} is damaged",
            got=problem,
            expected="the object that was sealed",
            next=f"akd-dist stores repair {self.id} --store-root {root}",
        )

    @property
    def _objects(self) -> ObjectRoot:
        return open_root(self.uri).child(ARRAYS)

    def _shard(self, shard: Shard) -> Arrays:
        found = self._last.get(shard)
        if found is None:
            (found,) = self.shard_arrays([shard])
            # One at most, since a shard takes up to 16 MiB and many stores may be open at a time.
            self._last.clear()
            self._last[shard] = found
        return found


def open_store(uri: str) -> LogitStore:
    """Open a sealed store: path or URI of its `<id>` folder.

    Raises:
        RefusedError: there is no store, it is not sealed, or its format is newer than this version reads.
        DamagedError: the manifest, the Zarr metadata or a shard's size is not what was sealed; names the key.
        MachineError: the storage does not answer.
    """
    store = LogitStore(open_root(uri).uri, read_manifest(uri))
    store.check()
    return store
