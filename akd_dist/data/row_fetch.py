"""Rows that were prepared for a cluster, on a node that works with them: fetched block by block into the node's cache.

What comes of it is an entry as `row_cache.prepare` makes it, of the same arrays. A node needs none of the sources.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import MachineError
from akd_dist.base.files import PARTIAL_SUFFIX, partial_name, replace, with_checksum
from akd_dist.base.locks import file_lock
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.row_entry import INDEX, files_of, open_entry, stats_of
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.storage.node_cache import make_room, name_entry
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
        cache_root: they lie in `<cache_root>/rows/<beginning of the manifest's sha256>/`.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being fetched, rows done, and rows in all.

    Raises:
        DamagedError: a block is gone, or is not what was sealed; names it.
        MachineError: no room under `cache_root`, or it cannot be written; the store root cannot be read.
    """
    tell = on_progress or (lambda what, done, total: None)
    folder = cache_root / "rows" / sealed.sha256[:32]
    with file_lock(folder.with_suffix(".lock"), what=f"the prepared data {folder}"):
        splits = open_entry(folder)
        if splits is None:
            keep = _fetch(sealed, folder, cache_root, budget, tell)
            try:
                splits = open_entry(folder)
            finally:
                keep.release()
    if splits is None:
        raise MachineError(
            f"the prepared data {folder} cannot be read back", expected="the files just written", next="check the disk"
        )
    return dataclasses.replace(
        splits, **{name: dataclasses.replace(getattr(splits, name), sealed=sealed) for name in SPLITS}
    )


def _fetch(sealed: SealedRows, folder: Path, cache_root: Path, budget: int | None, tell: Progress) -> Any:
    """Fetch all blocks into a folder beside `folder`, then give it its name; the hold that keeps it."""
    manifest = sealed.manifest()
    creation = manifest.creation
    needed = creation.bytes_of(sum(creation.rows.values()))
    make_room(cache_root, needed, budget)
    partial = partial_name(folder)
    try:
        for left in (folder, *folder.parent.glob(f"{folder.name}.*{PARTIAL_SUFFIX}")):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        for split in SPLITS:
            _fetch_split(sealed.uri, manifest, split, partial, tell)
        index: dict[str, Any] = {**creation.meaning, "findings": manifest.findings, "origins": manifest.origins}
        for split, its in manifest.splits.items():
            index[split] = {"fingerprint": its.fingerprint, "blocks": its.blocks, "files": stats_of(partial, split)}
        replace(partial / INDEX, with_checksum(index))
        return name_entry(partial, folder)
    except OSError as error:
        raise MachineError(
            f"cannot fetch the prepared rows into {folder}",
            got=error.strerror or str(error),
            expected=f"{needed:,} bytes free in a folder that this user can write to",
            next="free some space, or choose another folder with --cache-root",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch_split(uri: str, manifest: RowsManifest, split: str, folder: Path, tell: Progress) -> None:
    creation, rows = manifest.creation, manifest.splits[split].rows
    inputs_file, labels_file = files_of(folder, split)
    size = creation.bytes_of(min(rows, creation.block_rows))
    threads = max(1, min(_AT_ONCE, _HELD_BYTES // max(size, 1)))
    with open(inputs_file, "xb") as inputs, open(labels_file, "xb") as labels:
        ends = [_begin(inputs, creation.dtype, (rows, *creation.shape)), _begin(labels, creation.labels, (rows,))]

        def fetch(number: int) -> int:
            data, count = read_block(uri, manifest, split, number), creation.rows_of(split, number)
            for file, at, array in zip((inputs, labels), ends, creation.arrays(data, count), strict=True):
                _write_at(file.fileno(), array, at + number * creation.block_rows * array[:1].nbytes)
            return count

        done = 0
        with ThreadPoolExecutor(threads) as pool:
            for count in pool.map(fetch, range(creation.blocks(split))):
                done += count
                tell(f"the {split} rows", done, rows)
        for file in (inputs, labels):
            # Durable before the index that vouches for it.
            os.fsync(file.fileno())


def _begin(file: Any, dtype: str, shape: tuple[int, ...]) -> int:
    """Write the head of a .npy file and reserve its room; where the values begin."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    begin: int = file.tell()
    os.posix_fallocate(file.fileno(), 0, begin + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return begin


def _write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
