"""A store as Arrow, for whoever reads it with something else than akd-dist. Imported only where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def schema_of(classes: int) -> pa.Schema:
    """The columns of a store: view, row, and its logits."""
    return pa.schema([("view", pa.int32()), ("row", pa.int64()), ("logits", pa.list_(pa.float32(), classes))])


def batch_of(view: int, start: int, logits: npt.NDArray[np.float32]) -> pa.RecordBatch:
    """Logits [n, classes] of consecutive rows of a view as a record batch; they are not copied."""
    rows, classes = logits.shape
    columns: list[Any] = [
        np.full(rows, view, dtype=np.int32),
        np.arange(start, start + rows, dtype=np.int64),
        pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(logits).reshape(-1), classes),
    ]
    return pa.record_batch(columns, schema=schema_of(classes))


def reader_of(classes: int, blocks: Iterator[tuple[int, int, npt.NDArray[np.float32]]]) -> pa.RecordBatchReader:
    """Blocks of consecutive rows, (view, first row, logits [n, classes]), as a stream, a record batch each."""
    return pa.RecordBatchReader.from_batches(schema_of(classes), (batch_of(*block) for block in blocks))
