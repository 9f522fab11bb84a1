"""What models say of rows, as Parquet: one file that is whole or absent, for whatever reads tables."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.storage.files import replace


def write_predictions(path: Path, columns: Mapping[str, np.ndarray[Any, Any] | None]) -> None:
    """Write columns of one length in place of an older file; a column that is None becomes one of nulls.

    Equal columns make equal bytes.

    Raises:
        MachineError: the folder cannot be written to, or the disk is full.
    """
    length = next(len(values) for values in columns.values() if values is not None)
    table = pa.table(
        {name: pa.nulls(length) if values is None else pa.array(values) for name, values in columns.items()}
    )
    encoded = io.BytesIO()
    pq.write_table(table, encoded)
    replace(path, encoded.getvalue())
