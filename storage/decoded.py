"""The logits of a sealed store as this node decodes them: a view at a time, or a few windows of one.

A view is an entry of the cache. Those behind stay while its budget has room for them.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from akd_dist.base.files import PARTIAL_SUFFIX
from akd_dist.base.locks import is_locked
from akd_dist.storage.checked import note_of
from akd_dist.storage.content import Guard
from akd_dist.storage.holder import Holder
from akd_dist.storage.interleaved import ITEMS, interleaved
from akd_dist.storage.layout import LOGITS, StoreLayout
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.mean import AnyStore
from akd_dist.storage.node_cache import IN_USE, Progress, evict, room_in
from akd_dist.storage.pieces import Arrays, Field, Held, Pieces, Span, hold_pieces, resting
from akd_dist.storage.reader import LogitStore

Tokens = Callable[[], dict[str, str]]
"""What names each shard's object as it is, by key."""


def view_pieces(store: AnyStore, view: int, cache_root: Path, tokens: Tokens | None = None) -> Pieces:
    """A view of a store as pieces, one a shard: of one field `logits`, [rows, classes] in the stored dtype, or of one
    of bytes, in which all that describes a target lies together.

    Args:
        tokens: by default the store is asked each time.
    """
    layout, asked, together = store.layout, tokens or store.tokens, interleaved(store.layout)

    def fetch(numbers: Sequence[int]) -> Iterator[Arrays]:
        shards = [layout.shard(view, number) for number in numbers]
        if together is not None and isinstance(store, LogitStore):
            return ((together.join(tuple(arrays.values())),) for arrays in store.shard_arrays(shards))
        return ((logits,) for logits in store.shards(shards))

    def named(numbers: Sequence[int]) -> list[str]:
        known = asked()
        return ["+".join(known[key] for key in layout.shard(view, number).keys) for number in numbers]

    return Pieces(
        cache_root / LOGITS,
        f"{store.name[:32]}-{view}",
        layout.rows,
        layout.shard_rows,
        (_field(layout),),
        fetch,
        lambda numbers: [store.content(layout.shard(view, number)) for number in numbers],
        named,
        f"the {'targets' if layout.several else 'logits'} of view {view}, {'numbers' if layout.several else 'rows'}",
        # The seal is over the arrays of a shard, one after the other.
        hashed=lambda arrays: arrays if together is None else tuple(together.split(arrays[0]).values()),
    )


def _field(layout: StoreLayout) -> Field:
    """The one array of a view in the cache."""
    together = interleaved(layout)
    if together is not None:
        return Field(ITEMS, "uint8", (together.item_bytes,))
    (array,) = layout.fields
    return Field(array.name, array.dtype, array.shape)


def open_decoded(
    store: LogitStore,
    cache_root: Path,
    view: int = 0,
    *,
    budget: int | None = None,
    on_progress: Progress | None = None,
) -> npt.NDArray[Any]:
    """A view's logits [rows, classes] in the stored dtype as a read-only memory map, decoded once per node.

    The store itself is looked at every time: a shard whose object changed since it was decoded is read again and must
    still be what was sealed, whether there is a decoded copy or not. The copy is not read here: that is for a `Guard`.

    Args:
        budget: bytes that all entries together may take; None for the default budget.
        on_progress: called with how many shards are read or checked, and of how many.

    Returns:
        What is not evicted while it, or a slice of it, is alive.

    Raises:
        DamagedError: a shard is not what was sealed; names its key.
        MachineError: no room within the budget or on the disk; names need, free and budget.
    """
    return hold_view(store, cache_root, view, budget=budget, on_progress=on_progress).arrays[LOGITS]


def hold_view(
    store: LogitStore,
    cache_root: Path,
    view: int = 0,
    *,
    budget: int | None = None,
    on_progress: Progress | None = None,
) -> Held:
    """The same, with what it must hash to."""
    pieces = view_pieces(store, view, cache_root)
    return hold_pieces(pieces, range(pieces.count), budget=budget, on_progress=on_progress)


class Decoded(NamedTuple):
    """What of a store is decoded on this node."""

    bytes: int
    """Bytes that it takes."""
    in_use: bool
    """Whether a living process has some of it mapped."""


def find_decoded(manifest: Manifest, cache_root: Path) -> Decoded | None:
    """What of a sealed store is decoded on this node, if anything is."""
    sizes, used = list[int](), False
    for entry in _entries(manifest, cache_root):
        try:
            sizes.append((entry / f"{_field(manifest.identity.layout).name}.npy").stat().st_size)
        except OSError:
            continue
        used = used or is_locked(entry / IN_USE, shared=True)
    return Decoded(sum(sizes), used) if sizes else None


def drop_decoded(manifest: Manifest, cache_root: Path) -> None:
    """Remove what is decoded of a store from this node, unless somebody has it mapped, and what was checked of it."""
    for entry in _entries(manifest, cache_root):
        evict(entry)
    note_of(manifest, cache_root).unlink(missing_ok=True)


def _entries(manifest: Manifest, cache_root: Path) -> list[Path]:
    # Earlier versions decoded whole stores, into entries of the bare name.
    found = (cache_root / LOGITS).glob(f"{manifest.sha256[:32]}*")
    return [entry for entry in found if entry.is_dir() and not entry.name.endswith(PARTIAL_SUFFIX)]


class StoredViews:
    """What a stream reads of a store, by the view of the epoch: whole views, or the windows of one.

    Args:
        store: the store, or those of an ensemble: what is decoded is their mean.
        cache_root: where this node decodes.
        views: so many of its views are read.
        beside: bytes of what else is read from the cache meanwhile.
        windowed: whether rows are read window by window: where the cache has no room for all views, no more than a few
            windows are held then.
        beside_windows: whether the rows themselves are held by windows, which take what room there is.
        budget: bytes that everything in the cache may take; None for the default budget.

    Raises:
        DamagedError: an object's size is not what was sealed; names the key.
    """

    def __init__(
        self,
        store: AnyStore,
        cache_root: Path,
        views: int = 1,
        *,
        beside: int = 0,
        windowed: bool = False,
        beside_windows: bool = False,
        budget: int | None = None,
    ) -> None:
        self.shape = store.views, store.num_rows, store.classes
        """Views, rows and classes of the store."""
        tokens = store.tokens()  # looked at once: each look lists all shards
        self._views = [view_pieces(store, view, cache_root, lambda: tokens) for view in range(views)]
        self._budget, self._beside, self._room = budget, beside, room_in(cache_root, budget)
        self._bytes = self._views[0].nbytes(range(self._views[0].count))
        # Others on this node may read other views: so all of them have to fit, or else each holds no more than windows.
        self.whole = not windowed or (not beside_windows and beside + views * self._bytes <= self._room)
        """Whether whole views are held."""
        self._holder = Holder(budget)

    def watch(self, guard: Guard) -> None:
        """Have what is read from now on vouched for."""
        self._holder.guard = guard

    def move(self, view: int, spans: Sequence[Span]) -> None:
        """Read some spans of a view's rows from now on, and nothing else.

        Raises:
            DamagedError: a shard is not what was sealed; names the key.
            MachineError: no room within the budget or on the disk; names need, free and budget.
        """
        pieces = self._views[view]
        self._holder.move(pieces, self._wanted(pieces, spans))

    def expect(self, view: int, spans: Sequence[Span]) -> None:
        """Fetch these meanwhile, which are read next."""
        pieces = self._views[view]
        self._holder.expect(pieces, self._wanted(pieces, spans))

    def decode(self) -> None:
        """Fetch what fits beside everything else, whole views from the first on."""
        fitting = max(0, self._room - self._beside) // self._bytes
        for pieces in self._views[:fitting]:
            hold_pieces(pieces, range(pieces.count), budget=self._budget)

    def resting(self, marks: Collection[str]) -> list[Held]:
        """What this node has of it in files of these marks."""
        return [held for pieces in self._views for held in resting(pieces, marks)]

    def close(self) -> None:
        """Let everything go."""
        self._holder.close()

    @property
    def _held(self) -> Held:
        assert self._holder.now is not None, "a stream moves before it reads"
        return self._holder.now

    def _wanted(self, pieces: Pieces, spans: Sequence[Span]) -> Sequence[int]:
        return range(pieces.count) if self.whole else pieces.of_spans(self._stored_spans(spans)) or [0]

    def _stored_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Where in a view lies what is stored of these rows."""
        return spans


class StoredLogits(StoredViews):
    """The logits that a stream reads: of a store, or the mean of several.

    Args:
        store, cache_root, views, options: as of `StoredViews`.

    Raises:
        RefusedError: a store describes logits, and does not hold them.
        DamagedError: as `StoredViews`.
    """

    def __init__(self, store: AnyStore, cache_root: Path, views: int, **options: Any) -> None:
        for manifest in store.manifests:
            _ = manifest.identity.codec  # which refuses what describes logits
        super().__init__(store, cache_root, views, **options)

    def take(self, rows: npt.NDArray[np.int64], axis: int = 0) -> npt.NDArray[Any]:
        """Logits [n, classes] of rows by number, of those that are read now."""
        return self._held.take(LOGITS, rows)
