"""Rows that were prepared as blocks under a store root, on a node that works with them: fetched into the node's cache.

A node needs none of the sources then. What its cache has no room for is fetched window by window. Who needs a few rows
only, as a driver does, fetches their blocks alone.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np

from akd_dist import recipe
from akd_dist.data.encoded import Alike, InPieces, Mapped, pictures_of
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.rows import BLOCK_ROWS, SPLITS, Rows, Splits
from akd_dist.data.text import Tokens
from akd_dist.storage.content import Guard
from akd_dist.storage.holder import Holder
from akd_dist.storage.node_cache import room_in
from akd_dist.storage.pieces import Arrays, Field, Held, PieceArray, Pieces, Span, hold_pieces, resting
from akd_dist.storage.row_documents import INDEX_BYTES, INDEX_COLUMNS
from akd_dist.storage.rows import RowsCreation, RowsManifest, SealedRows, read_block

# Object storage answers many requests at once; so many bytes of blocks are held meanwhile, or one block.
_AT_ONCE, _HELD_BYTES = 16, 1 << 27


def rows_for(
    data: recipe.DataSpec,
    cache_root: Path,
    expected: Mapping[str, str],
    sealed: SealedRows | None,
    *,
    in_order: bool = False,
) -> Splits:
    """The splits that a job works with: those that are sealed under a store root, if they are, else by this node.

    Args:
        in_order: whether rows are read one after the other: then those that this node has no room for are fetched as
            they are read. Else that is so only where `data.window` has rows read window by window.

    Raises:
        AkdError: as `fetch_rows`, or `row_cache.prepare`.
    """
    if sealed is None:
        return prepare(data, cache_root, expected=expected)
    return fetch_rows(sealed, cache_root, windowed=data.window is not None, in_order=in_order)


def held_splits(sizes: Mapping[str, int], room: int, *, windowed: bool, in_order: bool = False) -> set[str]:
    """Which splits a node holds for good, beside everything else that is read from its cache.

    Rows leave half of the room to the windows of what is read beside them: if the other half is not enough for all of
    them, the train rows are read by windows too. Who reads in order goes by the same rule, since processes that have
    cached may still hold rows while students train. Of rows that are shuffled all together all are held.

    Args:
        sizes: bytes of each split's rows.
        room: bytes that the cache may have.
        windowed, in_order: as of `fetch_rows`.
    """
    if not windowed and not in_order:
        return set(sizes)
    for_others, for_all = holding_rooms(sizes)
    if room >= for_all:
        return set(sizes)
    # Validation and test rows are read from the first to the last; held, they need not be fetched in each epoch.
    return set(sizes) - {"train"} if room >= for_others else set()


def holding_rooms(sizes: Mapping[str, int]) -> tuple[int, int]:
    """From how much room on `held_splits` holds validation and test rows where it need not hold all rows, and from how
    much on it holds the train rows as well.
    """
    whole = sum(sizes.values())
    return 4 * (whole - sizes["train"]), 2 * whole


def fetch_rows(
    sealed: SealedRows,
    cache_root: Path,
    *,
    windowed: bool = False,
    in_order: bool = False,
    budget: int | None = None,
    on_progress: Progress | None = None,
) -> Splits:
    """The splits of sealed rows as memory-mapped arrays, fetched to this node if they are not there yet.

    Args:
        cache_root: they lie in `<cache_root>/rows/`, an entry each.
        windowed: whether train rows are read window by window. Where the cache has no room for all of them, it holds
            those that `Rows.moving` is told of; the others are fetched each time that one is read.
        in_order: whether rows are read one after the other: then none are held of a split that does not fit.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being fetched, blocks done, and blocks in all.

    Raises:
        DamagedError: a block is gone, or is not what was sealed; names it.
        MachineError: no room under `cache_root`, or it cannot be written; the store root cannot be read.
    """
    manifest = sealed.manifest()
    tell = on_progress or (lambda what, done, total: None)
    room = room_in(cache_root, budget)
    held = held_splits(manifest.sizes, room, windowed=windowed, in_order=in_order)

    def of(split: str) -> Rows:
        pieces = pieces_of(sealed, manifest, split, cache_root)
        if split not in held:
            windows = RowWindows(pieces, budget) if split == "train" and windowed else None
            inputs, labels = _distant(manifest, pieces, (lambda: None) if windows is None else windows.held)
            return dataclasses.replace(_rows(sealed, manifest, split, inputs, labels), moving=windows)
        told = functools.partial(tell, f"the {split} rows")
        there = hold_pieces(pieces, range(pieces.count), budget=budget, on_progress=told)
        inputs = there.arrays["inputs"]
        if (meaning := manifest.creation.meaning.get("encoded")) is not None:
            inputs = pictures_of(Mapped(there.arrays["index"], inputs, there.ends), meaning).as_array()
        found = _rows(sealed, manifest, split, inputs, there.arrays["labels"])
        files = there.content.files
        return dataclasses.replace(found, folder=files[0].parent, files=files, inodes=there.content.inodes)

    return _splits(manifest, of)


class RowWindows:
    """Rows of which a few windows are held at a time, a `storage.holder.Moving`: every view shows the same ones.

    Args:
        pieces: the rows, as of `pieces_of`.
        budget: bytes that everything in the cache may take; None for the default budget.
    """

    def __init__(self, pieces: Pieces, budget: int | None = None) -> None:
        self._pieces, self._holder = pieces, Holder(budget)

    def held(self) -> Held | None:
        """What is held now."""
        return self._holder.now

    def watch(self, guard: Guard) -> None:
        """Have what is read from now on vouched for."""
        self._holder.guard = guard

    def move(self, view: int, spans: Sequence[Span]) -> None:
        """Hold these spans of rows from now on, and nothing else."""
        self._holder.move(self._pieces, self._pieces.of_spans(spans))

    def expect(self, view: int, spans: Sequence[Span]) -> None:
        """Fetch these meanwhile, which are read next."""
        self._holder.expect(self._pieces, self._pieces.of_spans(spans))

    def resting(self, marks: Collection[str]) -> list[Held]:
        """What this node has of them in files of these marks."""
        return resting(self._pieces, marks)

    def close(self) -> None:
        """Let everything go."""
        self._holder.close()


def distant_rows(sealed: SealedRows) -> Splits:
    """The splits of sealed rows, none of them here: those that are asked for are fetched each time, block by block.

    For whoever plans and has no use for more than the first few rows, and labels. Nothing is written to the cache.

    Raises:
        DamagedError, MachineError: as `fetch_rows`; of a block also later, when it is read.
    """
    manifest = sealed.manifest()

    def of(split: str) -> Rows:
        return _rows(sealed, manifest, split, *_distant(manifest, pieces_of(sealed, manifest, split, Path())))

    return _splits(manifest, of)


def distant_arrays(pieces: Pieces, held: Callable[[], Held | None] = lambda: None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of all rows, of which those are here that `held` gives; the others are fetched each time."""
    inputs, labels = (cast(np.ndarray, PieceArray(pieces, field.name, held)) for field in pieces.fields)
    return inputs, labels


def _distant(
    manifest: RowsManifest, pieces: Pieces, held: Callable[[], Held | None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """As `distant_arrays`, also of rows that stay encoded."""
    if (meaning := manifest.creation.meaning.get("encoded")) is None:
        return distant_arrays(pieces, held)
    labels = cast(np.ndarray, PieceArray(pieces, "labels", held))
    return pictures_of(InPieces(pieces, held), meaning).as_array(), labels


def alike_rows(sealed: SealedRows) -> Splits:
    """As many rows as are sealed, all of them like the first one of their split, in its memory: to measure with.

    Raises:
        DamagedError, MachineError: as `distant_rows`.
    """
    manifest = sealed.manifest()

    def of(split: str) -> Rows:
        count = manifest.splits[split].rows
        creation, block = manifest.creation, read_block(sealed.uri, manifest, split, 0)
        first = creation.arrays(block, creation.rows_of(split, 0))
        if (meaning := creation.meaning.get("encoded")) is not None:
            one = Alike(Mapped(first[0].copy(), first[1]).take(np.zeros(1, np.int64)), count)
            labels = np.broadcast_to(first[-1][0].copy(), count)
            return _rows(sealed, manifest, split, pictures_of(one, meaning).as_array(), labels)
        inputs, labels = (np.broadcast_to(array[0].copy(), (count, *array.shape[1:])) for array in first)
        return _rows(sealed, manifest, split, inputs, labels)

    return _splits(manifest, of)


def pieces_of(sealed: SealedRows, manifest: RowsManifest, split: str, cache_root: Path) -> Pieces:
    """The blocks of a split as pieces of the node's cache: fields `inputs` and `labels`."""
    creation = manifest.creation
    threads = _at_once(creation.bytes_of(creation.block_rows))

    def read(number: int) -> Arrays:
        return creation.arrays(read_block(sealed.uri, manifest, split, number), creation.rows_of(split, number))

    # Whoever looks at the first few rows does so again and again.
    again = functools.lru_cache(maxsize=1)(read)

    def fetch(numbers: Sequence[int]) -> Iterator[Arrays]:
        return iter([again(numbers[0])]) if len(numbers) == 1 else _ahead(read, numbers, threads)

    return Pieces(
        folder=cache_root / "rows",
        key=f"{sealed.sha256[:32]}-{split}",
        rows=creation.rows[split],
        piece_rows=creation.block_rows,
        fields=_fields(creation),
        fetch=fetch,
        digests=lambda numbers: [manifest.splits[split].blocks[number] for number in numbers],
        elements=lambda number: _encoded_bytes(manifest, split, number),
        what=f"the {split} rows",
    )


def _fields(creation: RowsCreation) -> tuple[Field, ...]:
    """In the order in which they stand in a block."""
    labels = Field("labels", creation.labels, ())
    if creation.encoded is None:
        return Field("inputs", creation.dtype, tuple(creation.shape)), labels
    return Field("index", "<i8", (INDEX_COLUMNS,)), Field("inputs", "|u1", (), ragged=True), labels


def _encoded_bytes(manifest: RowsManifest, split: str, number: int) -> int:
    """Bytes of the encoded inputs of a block."""
    rows = manifest.creation.rows_of(split, number)
    other = INDEX_BYTES + np.dtype(manifest.creation.labels).itemsize
    return manifest.block_bytes(split, number) - rows * other


def bytes_ahead(row_bytes: int) -> int:
    """Bytes of blocks that a process has in its memory while it fetches rows of so many bytes each: those on their way,
    that which is written, and the one that was read last of rows that are not held.
    """
    block = BLOCK_ROWS * row_bytes
    return (_at_once(block) + 2) * block


def _at_once(block: int) -> int:
    return max(1, min(_AT_ONCE, _HELD_BYTES // block))


def _ahead(read: Callable[[int], Arrays], numbers: Sequence[int], threads: int) -> Iterator[Arrays]:
    """What is read of each, in order; so many are read at a time, and no more are held."""
    waiting: deque[Future[Arrays]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number in numbers:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(read, number))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def _splits(manifest: RowsManifest, of: Callable[[str], Rows]) -> Splits:
    return Splits(*(of(split) for split in SPLITS), findings=tuple(manifest.findings))


def _rows(sealed: SealedRows, manifest: RowsManifest, split: str, inputs: np.ndarray, labels: np.ndarray) -> Rows:
    meaning, its = manifest.creation.meaning, manifest.splits[split]
    return Rows(
        inputs,
        labels,
        classes=meaning["classes"],
        fingerprint=its.fingerprint,
        blocks=tuple(its.blocks),
        folder=Path(),
        task=meaning.get("task", "classification"),
        class_names=tuple(meaning["class_names"]) if "class_names" in meaning else None,
        tokens=Tokens.model_validate(meaning["tokens"]) if "tokens" in meaning else None,
        sealed=sealed,
        counts=tuple(its.classes) or None,
        with_labels=its.labelled,
        block_targets=None if its.targets is None else tuple(its.targets),
    )
