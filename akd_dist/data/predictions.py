"""What models say of rows, as Parquet: one file that is whole or absent, for whatever reads tables."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.base.files import whole_file

GROUP_ROWS = 1 << 16
"""The most rows of a row group."""
GROUP_BYTES = 1 << 25
"""What a row group takes in memory, about: all that a writer holds, however many rows there are."""


def encode_predictions(columns: Mapping[str, np.ndarray[Any, Any] | None]) -> bytes:
    """Columns of one length as the bytes of a Parquet file; a column that is None becomes one of nulls.

    Equal columns make equal bytes.
    """
    length = next(len(values) for values in columns.values() if values is not None)
    table = pa.table({name: pa.nulls(length) if values is None else _arrow(values) for name, values in columns.items()})
    encoded = io.BytesIO()
    pq.write_table(table, encoded, write_page_checksum=True)
    return encoded.getvalue()


def _arrow(values: np.ndarray[Any, Any]) -> pa.Array:
    """Numbers as Arrow has them; `pa.array` would import pandas first, to ask it whether they are its own."""
    if values.dtype.kind not in "iuf":
        return pa.array(values)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


@contextlib.contextmanager
def predictions_file(path: Path, schema: Any, *, overwrite: bool = True) -> Iterator[Callable[[Any], None]]:
    """A function that adds tables to a file, which has its name at the end of the block and not before.

    Args:
        schema: of all the tables, a pyarrow.Schema; its metadata is kept in the file.
        overwrite: whether it may take the place of another file.

    Raises:
        RecipeError: there is a file of that name, and it may not be overwritten.
        MachineError: the folder cannot be written to, or the disk is full.
    """
    waiting: list[Any] = []

    with whole_file(path, overwrite=overwrite) as partial, pq.ParquetWriter(partial, schema) as file:

        def flush() -> None:
            if waiting:
                file.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
                waiting.clear()

        def write(table: Any) -> None:
            # A copy in Arrow's own memory: small arrays that live on between a model's large ones would keep the C
            # library from using that memory again, 6 MB a batch (measured: 1.5 GB instead of 0.5 GB).
            waiting.append(table.take(np.arange(len(table))))
            if sum(map(len, waiting)) >= GROUP_ROWS or sum(one.nbytes for one in waiting) >= GROUP_BYTES:
                flush()

        yield write
        flush()
