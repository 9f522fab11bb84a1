"""IDX files, plain or gzipped: the MNIST family."""

from __future__ import annotations

import functools
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block
from akd_dist.data.parquet_files import check_scheme, nothing_at
from akd_dist.data.sources.base import Source, row_of, slices, stats_of
from akd_dist.storage.remote import RemoteFile, find_file, is_remote

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# More dimensions than any data set has, and fewer than NumPy takes.
_IDX_DIMENSIONS = 8
# Bytes of an object that are read at a time.
_BUFFER_BYTES = 1 << 23
# Deflate encodes 258 bytes in 2 bits at the best, so a file holds no more than 1032 times its own size.
_MOST_GZIP_SAVES = 1032


class IdxSource:
    """Images and labels in IDX files: [n, height, width] become [n, 1, height, width]."""

    def __init__(self, spec: recipe.Idx) -> None:
        self.spec = spec

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed."""
        paths = [path for path in (self.spec.images, self.spec.labels) if path is not None]
        files = [existing_file(path, "IDX file") for path in paths]
        return {**self.spec.model_dump(mode="json"), "files": stats_of(files)}

    def open(self) -> Source:
        """Look at the rows, without reading them."""
        images = _IdxFile(self.spec.images)
        if images.dtype != np.uint8 or len(images.shape) < 2:
            raise images.refused(
                "inputs are uint8 of two dimensions or more", f"{images.dtype.name} {list(images.shape)}"
            )
        labels = self._labels()
        if labels is not None and images.shape[0] != labels.shape[0]:
            raise RefusedError(
                f"{images.path} and {labels.path} do not belong together",
                got=f"{images.shape[0]:,} inputs and {labels.shape[0]:,} labels",
                expected="as many labels as inputs",
                next="correct `images` and `labels` in the recipe",
            )
        rows = images.shape[0]
        shape = images.shape[1:] if len(images.shape) != 3 else (1, *images.shape[1:])

        def blocks(most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            both = zip(images.blocks(most, start, stop), labels_alone(most, start, stop), strict=True)
            for inputs, block in both:
                yield Block(block.start, [inputs.reshape(len(block), *shape)], block.labels)

        def labels_alone(most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            if labels is None:
                yield from slices(rows, lambda first, last: ([], pa.nulls(last - first)), most, start, stop)
                return
            for ids in labels.blocks(most, start, stop):
                yield Block(start, [], pa.array(ids.astype(ids.dtype.newbyteorder("="))))
                start += len(ids)

        name = str(images.path) if labels is None else f"{images.path} and {labels.path.name}"
        compressed = images.compressed or (labels is not None and labels.compressed)
        return Source(
            name,
            rows,
            blocks,
            row_of(name),
            label_blocks=labels_alone,
            classes=self.spec.classes,
            files=(str(images.path),),
            file_starts=np.zeros(1, dtype=np.int64),
            cuts=np.zeros(1, dtype=np.int64) if compressed else None,
        )

    def _labels(self) -> _IdxFile | None:
        if self.spec.labels is None:
            return None
        labels = _IdxFile(self.spec.labels)
        if len(labels.shape) != 1:
            raise labels.refused("labels have one dimension", list(labels.shape))
        return labels


class _IdxFile:
    """The header of an IDX file, plain or gzip-compressed, checked against the size of the file."""

    def __init__(self, path: str) -> None:
        self.path = existing_file(path, "IDX file")
        with self._reading() as file:
            zeros, code, dimensions = struct.unpack(">HBB", self._exactly(file, 4))
            if zeros or code not in _IDX_TYPES or not 0 < dimensions <= _IDX_DIMENSIONS:
                raise self.refused(
                    "an IDX file: two zero bytes, a type and a number of dimensions", "another beginning"
                )
            self.shape = struct.unpack(f">{dimensions}I", self._exactly(file, 4 * dimensions))
        self.dtype = np.dtype(_IDX_TYPES[code])
        self._header = 4 + 4 * dimensions
        self._check_size()

    def blocks(self, most: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Its values start..stop - 1 of the first dimension, so many at a time."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        with self._reading() as file:
            self._skip(file, self._header + start * size)
            for first in range(start, stop, most):
                rows = min(most, stop - first)
                values = np.frombuffer(self._exactly(file, rows * size), dtype=self.dtype)
                yield values.reshape(rows, *self.shape[1:])
            if stop == self.shape[0] and self._exactly(file, 1, at_least=0):  # also lets gzip check its sum
                raise self.refused(f"no more than {list(self.shape)} values, as its header says", "more bytes")

    def refused(self, expected: object, got: object) -> RefusedError:
        """This file is not what it should be."""
        return RefusedError(
            f"{self.path} cannot be used", got=got, expected=expected, next="check that it is the right file, and whole"
        )

    def _check_size(self) -> None:
        """A header may claim anything: nothing is allocated by it that the file could not hold."""
        claimed = self._header + math.prod(self.shape) * self.dtype.itemsize
        size = self.path.stat().st_size if isinstance(self.path, Path) else self.path.size
        if claimed > size * _MOST_GZIP_SAVES if self.compressed else claimed != size:
            raise self.refused(f"{claimed:,} bytes, as its header says: {list(self.shape)}", f"{size:,} bytes")

    @functools.cached_property
    def compressed(self) -> bool:
        """Whether it is gzip-compressed: then it is read from its beginning, whatever is wanted of it."""
        with self._stored() as file:
            return file.read(2) == b"\x1f\x8b"

    def _reading(self) -> BinaryIO:
        if not self.compressed:
            return self._stored()
        return cast(BinaryIO, gzip.open(self.path if isinstance(self.path, Path) else self._stored()))

    def _stored(self) -> BinaryIO:
        return open(self.path, "rb") if isinstance(self.path, Path) else cast(BinaryIO, self.path.open(_BUFFER_BYTES))

    def _skip(self, file: BinaryIO, size: int) -> None:
        """Go to so many bytes from the beginning; a gzip-compressed file is unpacked up to there."""
        try:
            file.seek(size)
        except (EOFError, OSError, zlib.error) as error:  # cut, or damaged
            raise self.refused("a file that reads to its end", error) from error

    def _exactly(self, file: BinaryIO, size: int, at_least: int | None = None) -> bytes:
        try:
            data = file.read(size)
        except (EOFError, OSError, zlib.error) as error:  # cut, or damaged
            raise self.refused("a file that reads to its end", error) from error
        if len(data) < (size if at_least is None else at_least):
            raise self.refused("a file that reads to its end", f"{size - len(data):,} bytes are missing")
        return data


def existing_file(path: str, what: str) -> Path | RemoteFile:
    """The file at a path, or the object at a URI, that is there.

    Raises:
        RefusedError: it is not.
        MachineError: the storage does not answer, or does not let this user in.
    """
    check_scheme(path)
    place: Path | str = path if is_remote(path) else Path(path)
    there = find_file(place) if isinstance(place, str) else place if place.is_file() else None
    if there is None:
        raise nothing_at(place, what, f"a{'n' * (what[0] in 'AEIOU')} {what}")
    return there
