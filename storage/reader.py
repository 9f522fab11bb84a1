"""Reading a sealed store: nothing is taken for data that is not, byte for byte, what was sealed.

zarr-python returns the fill value for a missing shard, without an error. So presence and size of every object are
checked against the manifest at every open, and the sha256 of every shard that is read, before zarr sees it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage.arrays import decode_shard, metadata, rows_within
from akd_dist.storage.content import digest
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, LOGITS, MANIFEST_KEY, Shard, StoreLayout
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, Stat
from akd_dist.storage.records import ShardRecord
from akd_dist.storage.roots import open_root

if TYPE_CHECKING:
    import pyarrow as pa

# A request to object storage takes some 30 ms, in which nothing else would happen.
_AT_ONCE = 16
_BYTES_AHEAD = 128 * 2**20


@dataclass(frozen=True)
class Damage:
    """One object that is not what was sealed."""

    key: str
    """Relative to the store."""
    problem: str


@dataclass(frozen=True, eq=False)
class LogitStore:
    """A sealed store, open for reading; made by `open_store`."""

    uri: str
    manifest: Manifest = field(repr=False)
    # The shard read last: rows are mostly asked for in order.
    _last: dict[Shard, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        """The store's id."""
        return self.manifest.id

    def __repr__(self) -> str:
        said = f"{self.views} views of {self.num_rows:,} rows, {self.classes} logits each"
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

    def content(self, shard: Shard) -> str | None:
        """The sha256 of a shard's decoded logits; None in a store that does not say."""
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
            stored = self._shard(shard)[rows[mine] - shard.start]
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
        if not (0 <= view < self.views and 0 <= start <= stop <= self.num_rows):
            raise IndexError(f"view {view}, rows {start} to {stop}: not in {self.views} views of {self.num_rows} rows")
        shard_rows = self.layout.shard_rows
        logits = np.empty((stop - start, self.classes), np.float32)
        # No rows read no shard: the rounded end alone would name one.
        for index in range(start // shard_rows, -(-stop // shard_rows) if stop > start else 0):
            shard = self.layout.shard(view, index)
            first, last = max(start, shard.start), min(stop, shard.stop)
            stored = self._shard(shard)[first - shard.start : last - shard.start]
            logits[first - start : last - start] = self.manifest.identity.codec.decode({LOGITS: stored})
        return logits

    def shard(self, view: int, index: int) -> npt.NDArray[Any]:
        """A whole shard, [shard.rows, classes] in the stored dtype; its sha256 and every crc32c are checked.

        Raises:
            IndexError: the store has no such shard.
            DamagedError: the shard is not what was sealed; names its key.
        """
        (logits,) = self.shards([self.layout.shard(view, index)])
        return logits

    def shards(self, shards: Sequence[Shard]) -> Iterator[npt.NDArray[Any]]:
        """Several whole shards, in the order asked for, each as of `shard`; of object storage several are on their way.

        Raises:
            DamagedError: a shard is not what was sealed; names its key.
        """
        objects = self._objects
        for shard, fetch in _ahead(shards, lambda shard: objects.get(shard.key), self._most_ahead):
            try:
                yield self._decoded(shard, self.manifest.record(shard), fetch())
            except ObjectMissing:
                raise self.damaged(shard.key, _missing(objects, shard.key)) from None
            except ValueError as error:
                raise self.damaged(shard.key, error) from error

    @property
    def _most_ahead(self) -> int:
        """How many shards may be on their way: none of a folder, and of large ones fewer."""
        if self._objects.local_path("") is not None:
            return 0
        one = self.layout.shard_rows * self.classes * self.layout.itemsize
        return max(1, min(_AT_ONCE, _BYTES_AHEAD // one))

    def stats(self) -> dict[str, Stat]:
        """Size and token of every shard by key, as they are now, in the manifest's order.

        Raises:
            DamagedError: a shard is missing or has another size; names its key.
        """
        found, sizes = self._objects.list(), self.manifest.sizes()
        for shard, (key, size) in zip(self.layout.shards(), sizes.items(), strict=True):
            stat = found.get(key)
            if (stat is None or stat.size != size) and (problem := self._problem(shard, stat, deep=False)):
                raise self.damaged(key, problem)
        return {key: found[key] for key in sizes}

    def verify(self, *, deep: bool = True, on_progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Everything that is not what was sealed; empty for a good store.

        Args:
            deep: read every shard and check its sha256, not only presence and size.
            on_progress: called with how many shards are checked, and of how many.
        """
        damages = [Damage(f"{ARRAYS}/{key}", problem) for key, problem in self._metadata_problems()]
        found = self._objects.list()
        for number, shard in enumerate(self.layout.shards(), 1):
            problem = self._problem(shard, found.get(shard.key), deep=deep)
            if problem:
                damages.append(Damage(f"{ARRAYS}/{shard.key}", problem))
            if on_progress is not None:
                on_progress(number, self.layout.shard_count)
        return damages + self._creation_damage()

    def check(self) -> None:
        """Presence and size of every shard, and the Zarr metadata: what `open_store` does.

        Raises:
            DamagedError: names the first key that is wrong.
        """
        for key, problem in self._metadata_problems():
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

    def _shard(self, shard: Shard) -> npt.NDArray[Any]:
        found = self._last.get(shard)
        if found is None:
            found = self.shard(shard.view, shard.index)
            # One at most, since a shard takes up to 16 MiB and many stores may be open at a time.
            self._last.clear()
            self._last[shard] = found
        return found

    def _decoded(self, shard: Shard, record: ShardRecord, data: bytes) -> npt.NDArray[Any]:
        """A shard's logits; ValueError where its object does not hold what was sealed.

        Another version of a compressor may write other bytes for the same logits: a repair may leave such an object,
        and the sealed digest of the decoded logits vouches for it.
        """
        same = sha256(data) == record.sha256
        if not same and (record.content is None or self.manifest.identity.object_bytes(shard) is not None):
            raise ValueError(f"sha256 {sha256(data)} instead of {record.sha256}")
        if same and (written := rows_within(self.manifest.identity, shard, data)) is not None:
            return written
        logits = decode_shard(self.manifest.identity, shard, data)
        if not same and (found := digest([logits])) != record.content:
            raise ValueError(f"sha256 {found} of its logits instead of {record.content}")
        return logits

    def _problem(self, shard: Shard, stat: Stat | None, *, deep: bool) -> str | None:
        """What is wrong with a shard's object, as far as its size or, if need be, its content tells."""
        if stat is None:
            return _missing(self._objects, shard.key)
        record = self.manifest.record(shard)
        if stat.size != record.size and self.manifest.identity.object_bytes(shard) is not None:
            return f"{stat.size:,} bytes instead of {record.size:,}"
        if not deep and stat.size == record.size:
            return None
        try:
            data = self._objects.get(shard.key)
            if sha256(data) != record.sha256:
                self._decoded(shard, record, data)
        except ObjectMissing:
            return _missing(self._objects, shard.key)
        except ValueError as error:
            return str(error)
        return None

    def _metadata_problems(self) -> list[tuple[str, str]]:
        problems = []
        for key in metadata(self.manifest.identity):
            try:
                digest = sha256(self._objects.document(key))
            except ObjectMissing:
                problems.append((key, _missing(self._objects, key)))
                continue
            expected = self.manifest.zarr_json.get(key)
            if digest != expected:
                problems.append((key, f"sha256 {digest} instead of {expected}"))
        return problems

    def _creation_damage(self) -> list[Damage]:
        try:
            data = open_root(self.uri).document(CREATION_KEY)
        except ObjectMissing:
            return [Damage(CREATION_KEY, "is missing")]
        same = data == self.manifest.creation().to_bytes()
        return [] if same else [Damage(CREATION_KEY, "is not what the manifest was sealed from")]


def _ahead(
    items: Sequence[Shard], fetch: Callable[[Shard], bytes], most: int
) -> Iterator[tuple[Shard, Callable[[], bytes]]]:
    """Each item with what gives its bytes: fetched by threads before it is asked for, `most` of them at a time."""
    if not most or len(items) < 2:
        yield from ((item, functools.partial(fetch, item)) for item in items)
        return
    with ThreadPoolExecutor(most) as pool:
        coming = collections.deque[tuple[Shard, Future[bytes]]]()
        waiting = iter(items)
        try:
            for item in itertools.islice(waiting, most):
                coming.append((item, pool.submit(fetch, item)))
            while coming:
                item, future = coming.popleft()
                yield item, future.result
                for following in itertools.islice(waiting, 1):
                    coming.append((following, pool.submit(fetch, following)))
        finally:
            for _, future in coming:  # of a shard that was no good, nobody asks for those that follow
                future.cancel()


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


def read_manifest(uri: str) -> Manifest:
    """The manifest of a sealed store, checked in itself; refusals as in `open_store`."""
    root = open_root(uri)
    try:
        data = root.document(MANIFEST_KEY)
    except ObjectMissing:
        raise _not_sealed(root) from None
    try:
        manifest = Manifest.from_bytes(data, root.path_of(MANIFEST_KEY))
        for key, content in metadata(manifest.identity).items():
            # The metadata follow from the identity: a manifest that says otherwise contradicts itself, whatever lies on
            # the disk.
            if manifest.zarr_json[key] != sha256(content):
                told = f"zarr_json.{key}: {manifest.zarr_json[key]}"
                raise DamagedError(f"{root.path_of(MANIFEST_KEY)} is damaged", got=told, expected=sha256(content))
    except DamagedError as error:
        error.next = f"akd-dist stores repair {root.name} --store-root {root.parent.uri}"
        raise
    return manifest


def _not_sealed(root: ObjectRoot) -> AkdError:
    begun = root.exists(CREATION_KEY)
    return RefusedError(
        f"{root.uri} is not sealed: its shards are not all there" if begun else f"there is no store at {root.uri}",
        got=f"no {MANIFEST_KEY}",
        expected=f"a sealed store, with {MANIFEST_KEY}",
        next="akd-dist cache-teacher RECIPE: it computes what is missing"
        if begun
        else "give its whole folder, as `akd-dist stores show ID` tells it; akd-dist cache-teacher RECIPE makes one",
    )


def _missing(objects: ObjectRoot, key: str) -> str:
    path = objects.local_path(key)
    # For zarr a folder in the place of a shard is absent as well, and reads as the fill value without an error.
    return "is a folder" if path is not None and path.is_dir() else "is missing"
