"""Files of a split's rows, written as the rows come: inputs, labels, and the index of pictures that stay encoded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from akd_dist.data.encoded import COLUMNS, encoded_of


def names_of(folder: Path, split: str, *, encoded: bool) -> tuple[Path, ...]:
    """The files of a split: of inputs, labels, and, where these are encoded, of the index."""
    kinds = ("inputs", "labels", "index") if encoded else ("inputs", "labels")
    return tuple(folder / f"{split}-{kind}.npy" for kind in kinds)


class Like(Protocol):
    """What all inputs of a file have in common."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Of one input."""


class RowsFile:
    """The inputs of so many rows, in a .npy file that grows: `np.save` would want all of them in memory.

    Args:
        files: as `names_of`.
        rows: how many there will be.
        inputs: what they are like.
    """

    def __init__(self, files: Sequence[Path], rows: int, inputs: Like) -> None:
        self._rows, self._inputs, self._files = rows, inputs, files
        self._file = open(files[0], "wb")  # noqa: SIM115  # closed by `finish`, or with the object
        self._index = list[np.ndarray]()
        self._write_header(0)

    def write(self, inputs: np.ndarray) -> None:
        """Add rows."""
        if (encoded := encoded_of(inputs)) is not None:
            index, inputs = encoded.stored.part(0, len(encoded))
            self._index.append(index)
        self._file.write(np.ascontiguousarray(inputs).data)

    def finish(self, labels: np.ndarray) -> None:
        """Write what is known once all rows were seen; durable, before the index that vouches for it."""
        np.save(self._files[1], labels)
        if len(self._files) > 2:
            index = np.concatenate([np.empty((0, COLUMNS), np.int64), *self._index])
            np.save(self._files[2], index)
            self._file.seek(0)
            self._write_header(int(index[:, 0].sum()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write_header(self, data_bytes: int) -> None:
        """The head of the file, as long whatever number it says: NumPy leaves room for a longer one."""
        shape = (data_bytes,) if len(self._files) > 2 else (self._rows, *self._inputs.shape)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._inputs.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self._file, header)
