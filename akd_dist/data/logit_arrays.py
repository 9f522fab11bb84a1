"""Logits that others computed as one array that is read block by block, whatever kind of file it lies in."""

from __future__ import annotations

import contextlib
import difflib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.formatting import size

Shape = tuple[int, ...]
Check = Callable[[Shape], tuple[int, int, int]]
"""Takes the shape of an array as it is written; gives it as views, rows, classes, or refuses it."""
LOGITS = "logits"
BLOCK_BYTES = 1 << 24
"""The most bytes that are read at a time."""


@dataclass(frozen=True)
class LogitFile:
    """Logits as they lie in a file: looked at, and not yet read."""

    name: str
    """For messages."""
    written: Shape
    """The shape as it is written."""
    shape: tuple[int, int, int]
    """Views, rows, classes."""
    dtype: str
    """Of the numbers as they are written."""
    read: Callable[[int, int, int], np.ndarray]
    """`read(view, start, stop)`: rows that follow one another, [n, classes] in their own dtype."""
    anywhere: bool
    """Whether rows may be read in any order as fast as in theirs."""
    key: pa.Array | None = None
    """The key of each row, where one was asked for."""

    def take(self, view: int, rows: np.ndarray) -> np.ndarray:
        """Rows of a view by number, ascending unless `anywhere`: float32 [n, classes].

        What is larger than float32 can hold becomes infinity.
        """
        found = np.empty((len(rows), self.shape[2]), np.float32)
        step = max(1, BLOCK_BYTES // max(self.shape[2] * 8, 1))
        for first in range(0, len(rows), step):
            wanted = rows[first : first + step]
            for part in [slice(0, len(wanted))] if self.anywhere else _near(wanted, step):
                low = int(wanted[part].min())
                block = self.read(view, low, int(wanted[part].max()) + 1)
                with np.errstate(over="ignore"):
                    found[first + part.start : first + part.stop] = block[wanted[part] - low]
        return found


def _near(rows: np.ndarray, most: int) -> Iterator[slice]:
    """Cut row numbers where what lies between them is more than what is read at a time."""
    start = 0
    while start < len(rows):
        ahead = np.flatnonzero(np.abs(rows[start:] - rows[start]) >= most)
        stop = start + int(ahead[0]) if len(ahead) else len(rows)
        yield slice(start, stop)
        start = stop


class Scratch:
    """An array on disk without a name: written in order, then mapped; it takes no room once the process has ended."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, shape: tuple[int, int, int], dtype: str, name: str
    ) -> None:
        self._shape, self._dtype, self._folder = shape, np.dtype(dtype), folder
        needed = math.prod(shape) * self._dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise self._full(name, f"{size(free)} free", f"{size(needed)}, as {name} cannot be read in place")
        self._name = name
        # It has no name: no other process needs one, and it is gone with this one however that ends.
        self._file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115

    @property
    def block_rows(self) -> int:
        """Rows that are written at a time."""
        return max(1, BLOCK_BYTES // max(self._shape[2] * self._dtype.itemsize, 1))

    def write(self, data: np.ndarray | bytes) -> None:
        """The rows that follow."""
        try:
            self._file.write(data if isinstance(data, bytes) else np.ascontiguousarray(data, self._dtype).data)
        except OSError as error:
            raise self._full(self._name, error.strerror or str(error), "room for the logits") from error

    def array(self, shape: Shape | None = None, order: Any = "C") -> np.ndarray:
        """All that was written, [views, rows, classes]."""
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r", shape=shape or self._shape, order=order)

    def _full(self, name: str, got: str, expected: str) -> MachineError:
        advice = "free some space, choose another --cache-root, or bring the logits as .npy"
        return MachineError(f"{self._folder} has no room to read {name}", got=got, expected=expected, next=advice)


def check_floats(name: str, dtype: np.dtype[Any], shape: Shape, check: Check) -> tuple[int, int, int]:
    """The shape of an array of floats as views, rows, classes; refuses any other kind of numbers, and objects."""
    if dtype.hasobject:
        raise RefusedError(
            f"{name} holds Python objects, which are never unpickled",
            got=f"dtype {dtype}",
            expected="float16, float32 or float64",
            next="save rows of equal length as one array of floats",
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        whole = "; class ids are no logits, and quantised numbers need their scale" if dtype.kind in "iub" else ""
        raise RefusedError(
            f"{name} holds no floats",
            got=f"dtype {dtype} of shape {list(shape)}",
            expected=f"float16, float32 or float64{whole}",
            next="save the raw outputs of the teacher, as floats",
        )
    return check(shape)


def named(name: str, dimensions: Mapping[str, int | None], key: str | None) -> str:
    """The array of logits among several: the only one that may be one, or the one that is called `logits`."""
    if key is not None and key not in dimensions:
        raise no_such_key(name, key, dimensions)
    found = [one for one, count in dimensions.items() if one != key and (count is None or count >= 1)]
    if LOGITS in found or len(found) == 1:
        return LOGITS if LOGITS in found else found[0]
    raise RefusedError(
        f"{name} holds {'several arrays' if found else 'no array'} that may be the logits",
        got=", ".join(found[:10]) or "none",
        expected=f"one, or one that is called {LOGITS}",
        next=f"call it {LOGITS}",
    )


class NoSuchKeyError(RefusedError):
    """Nothing in a file of logits is called as the key is."""

    name: str
    """The file."""
    there: list[str]
    """What in it has a name."""


def no_such_key(name: str, key: str, there: Sequence[str] | Mapping[str, Any]) -> NoSuchKeyError:
    """What to say where nothing is called as the key is, and the data may have it."""
    error = NoSuchKeyError(
        f"{name} has no {key}, by which --key joins its rows",
        got=", ".join(list(there)[:10]) or "nothing with a name",
        expected=f"a column or an array {key} with one value for each row",
        next=_near_key(key, there),
    )
    error.name, error.there = name, list(there)
    return error


def _near_key(key: str, there: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(there), n=1)
    rename = f"call {near[0]} {key}" if near else f"save the key beside the logits as {key}"
    return f"{rename}, as the data do, or leave --key out if rows are in the order of the data"


def refuse_key(path: Path, key: str | None) -> None:
    """Refuse a key for a kind of file that has no place for one."""
    if key is not None:
        raise RefusedError(
            f"{path} has no room for a key: it is one array without names",
            got=f"--key {key}",
            expected="Parquet, .npz or safetensors with the key beside the logits",
            next="leave --key out if rows are in the order of the data, or save both in one file",
        )


@contextlib.contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Turn what a library raises of a damaged file into a refusal that names it."""
    try:
        yield
    except (RefusedError, MachineError):
        raise
    except Exception as error:  # foreign bytes make libraries raise errors of any kind
        raise RefusedError(
            f"{path} cannot be read as {kind}",
            got=f"{type(error).__name__}: {error}".partition("\n")[0],
            expected="a file that is whole",
            next="check that it was copied whole",
        ) from error
