"""Zarr arrays of others, v2 or v3, read so that nothing missing is ever taken for data.

zarr-python returns the fill value for a missing chunk, without an error. So arrays of others are opened with NaN in its
place, whatever their own is: whoever reads them refuses NaN, and thereby what was never written.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.array import AsyncArray

from akd_dist.base.errors import RefusedError
from akd_dist.storage.arrays import pinned_zarr

# The most bytes of one chunk: it is decoded as a whole, however few of its rows are wanted.
_CHUNK_BYTES = 2 * 2**30
_ADVICE = "write it again with a current zarr, as one array of floats"


class ForeignArray:
    """One array of a Zarr folder; made by `open_foreign`."""

    def __init__(self, path: Path, array: zarr.Array[Any], fill: object) -> None:
        self.path, self._array, self._fill = path, array, fill
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        self._slab: tuple[int, int, npt.NDArray[Any]] | None = None

    def check(self) -> None:
        """Refuse an array of which chunks were never written.

        Raises:
            RefusedError: says how many there are.
        """
        objects = self._array.shards or self._array.chunks
        each = math.prod(-(-whole // part) for whole, part in zip(objects, self._array.chunks, strict=True))
        expected = math.prod(-(-length // part) for length, part in zip(self.shape, objects, strict=True))
        with pinned_zarr(), _told(self.path):
            there = int(self._array.nchunks_initialized) // each  # of a sharded array, zarr counts what shards may hold
        if there < expected:
            raise RefusedError(
                f"{self.path} is not whole: chunks of it are missing, which Zarr would read as {self._fill}",
                got=f"{there:,} chunks",
                expected=f"{expected:,} chunks",
                next="copy it again, or finish writing it (with write_empty_chunks, if chunks may hold nothing else)",
            )

    def read(self, view: int | None, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start..stop - 1, of a view where the array has views: [n, ...] in the stored dtype, NaN where a part of
        a chunk is missing.

        Raises:
            RefusedError: a chunk does not decode.
        """
        axis = 0 if view is None else 1
        step = self._array.chunks[axis]  # what is decoded as a whole: neighbouring rows are mostly asked for next
        first, last = start // step * step, min(-(-stop // step) * step, self.shape[axis])
        place = -1 if view is None else view, first
        if self._slab is None or self._slab[:2] != place or first + len(self._slab[2]) < last:
            with pinned_zarr(), _told(self.path):
                found = np.asarray(self._array[first:last] if view is None else self._array[view, first:last])
            self._slab = *place, found
        return self._slab[2][start - first : stop - first]


def open_foreign(path: Path) -> ForeignArray:
    """The array in a folder, or the only one of the group that lies there.

    Raises:
        RefusedError: there is no array or several, it cannot be read, holds no floats, or leads out of its folder.
    """
    _check_links(path)
    with pinned_zarr(), _told(path):
        found = zarr.open(path, mode="r")
        if isinstance(found, zarr.Group):
            arrays = dict(found.arrays())
            if len(arrays) != 1 and "logits" not in arrays:
                raise RefusedError(
                    f"{path} is a Zarr group of {len(arrays)} arrays",
                    got=", ".join(sorted(arrays)[:10]) or "no arrays",
                    expected="one array, or one that is called logits",
                    next=f"name the array: {path}/NAME",
                )
            found = arrays.get("logits") or next(iter(arrays.values()))
        _check_array(path, found)
        metadata = dataclasses.replace(found.metadata, fill_value=found.dtype.type("nan"))
        inner = AsyncArray(metadata=metadata, store_path=found.store_path, config=found.async_array.config)
        return ForeignArray(path, zarr.Array(inner), found.fill_value)


def _check_array(path: Path, array: zarr.Array[Any]) -> None:
    if np.dtype(array.dtype).kind != "f":
        raise RefusedError(
            f"{path} holds no floats", got=f"dtype {array.dtype}", expected="float16, float32 or float64", next=_ADVICE
        )
    size = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
    if size > _CHUNK_BYTES:
        raise RefusedError(
            f"a chunk of {path} is too large to be read",
            got=f"{size:,} bytes",
            expected=f"{_CHUNK_BYTES:,} bytes at most",
            next="write it again in smaller chunks",
        )


def _check_links(path: Path) -> None:
    """Refuse a folder whose files are links to what lies elsewhere: it may have come from anyone."""
    home = path.resolve()
    for one in path.rglob("*"):
        if one.is_symlink() and not one.resolve().is_relative_to(home):
            raise RefusedError(
                f"{one} leads out of the folder {path}",
                got=f"a link to {one.resolve()}",
                expected="files of the array's own",
                next="copy what the link leads to in its place",
            )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what zarr raises into a refusal: of foreign bytes that is an error of any kind."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(
            f"{path} cannot be read as Zarr",
            got=f"{type(error).__name__}: {error}".partition("\n")[0],
            expected="an array of Zarr v2 or v3, or a group with one",
            next=_ADVICE,
        ) from error
