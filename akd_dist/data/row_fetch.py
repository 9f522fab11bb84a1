"""Rows that were prepared for a cluster, on a node that works with them: fetched block by block into the node's cache.

A node needs none of the sources then. Who needs a few rows only, as a driver does, fetches their blocks alone.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np

from akd_dist import recipe
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.data.text import Tokens
from akd_dist.storage.pieces import Arrays, Field, PieceArray, Pieces, hold_pieces
from akd_dist.storage.rows import RowsManifest, SealedRows, read_block

# Object storage answers many requests at once; so many bytes of blocks are held meanwhile, or one block.
_AT_ONCE, _HELD_BYTES = 16, 1 << 28


def rows_for(data: recipe.DataSpec, cache_root: Path, expected: Mapping[str, str], sealed: SealedRows | None) -> Splits:
    """The splits that a job works with: those that were prepared for the cluster, if they were, else by this node.

    Raises:
        AkdError: as `fetch_rows`, or `row_cache.prepare`.
    """
    return prepare(data, cache_root, expected=expected) if sealed is None else fetch_rows(sealed, cache_root)


def fetch_rows(
    sealed: SealedRows, cache_root: Path, *, budget: int | None = None, on_progress: Progress | None = None
) -> Splits:
    """The splits of sealed rows as memory-mapped arrays, fetched to this node if they are not there yet.

    Args:
        cache_root: they lie in `<cache_root>/rows/`, an entry each.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being fetched, blocks done, and blocks in all.

    Raises:
        DamagedError: a block is gone, or is not what was sealed; names it.
        MachineError: no room under `cache_root`, or it cannot be written; the store root cannot be read.
    """
    manifest = sealed.manifest()
    tell = on_progress or (lambda what, done, total: None)

    def of(split: str) -> Rows:
        pieces = pieces_of(sealed, manifest, split, cache_root)
        told = functools.partial(tell, f"the {split} rows")
        held = hold_pieces(pieces, range(pieces.count), budget=budget, on_progress=told)
        found = _rows(sealed, manifest, split, held.arrays["inputs"], held.arrays["labels"])
        files = held.content.files
        return dataclasses.replace(found, folder=files[0].parent, files=files, inodes=held.content.inodes)

    return _splits(manifest, of)


def distant_rows(sealed: SealedRows) -> Splits:
    """The splits of sealed rows, none of them here: those that are asked for are fetched each time, block by block.

    For whoever plans and has no use for more than the first few rows, and labels. Nothing is written to the cache.

    Raises:
        DamagedError, MachineError: as `fetch_rows`; of a block also later, when it is read.
    """
    manifest = sealed.manifest()

    def of(split: str) -> Rows:
        pieces = pieces_of(sealed, manifest, split, Path())
        inputs, labels = (cast(np.ndarray, PieceArray(pieces, field.name)) for field in pieces.fields)
        return _rows(sealed, manifest, split, inputs, labels)

    return _splits(manifest, of)


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
        inputs, labels = (np.broadcast_to(array[0].copy(), (count, *array.shape[1:])) for array in first)
        return _rows(sealed, manifest, split, inputs, labels)

    return _splits(manifest, of)


def pieces_of(sealed: SealedRows, manifest: RowsManifest, split: str, cache_root: Path) -> Pieces:
    """The blocks of a split as pieces of the node's cache: fields `inputs` and `labels`."""
    creation = manifest.creation
    threads = max(1, min(_AT_ONCE, _HELD_BYTES // creation.bytes_of(creation.block_rows)))

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
        fields=(Field("inputs", creation.dtype, tuple(creation.shape)), Field("labels", creation.labels, ())),
        fetch=fetch,
        digests=lambda numbers: [manifest.splits[split].blocks[number] for number in numbers],
        what=f"the {split} rows",
    )


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
    )
