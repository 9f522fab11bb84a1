"""Which row of which source a row of a split is: the way back from prepared rows to what people have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.labels import Classes
from akd_dist.data.prepare import kinds_of, open_sources, read_labels
from akd_dist.data.schemas import plain
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.splitting import SPLITS, is_drawn, split_of_source

_KEYS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class SourceRows:
    """The rows of a split in the source that they come from."""

    source: str
    """The split whose key of `data` names the source: a split that is a share comes from `train`."""
    total: int
    """How many rows the source has."""
    numbers: np.ndarray
    """The number in the source of each row of the split, int64, ascending."""


def source_rows(data: recipe.DataSpec) -> dict[str, SourceRows]:
    """Where the rows of each split come from. Reads no rows, and labels only where the split is stratified.

    Raises:
        AkdError: as `row_cache.prepare`, of sources that cannot be opened.
    """
    kinds = kinds_of(data)
    labels = None
    if data.stratify and is_drawn(data):
        _, labels = read_labels(open_sources(data, kinds)["train"], Classes(), lambda done, total: None)
    found = {}
    for name, kind in kinds.items():
        source = kind.open()
        assigned = split_of_source(name, data, source, labels)
        for number, split in enumerate(SPLITS):
            if split == name or (name == "train" and split not in kinds):
                found[split] = SourceRows(name, source.rows, np.flatnonzero(assigned == number))
    return found


def key_column(data: recipe.DataSpec, source: str, column: str) -> Any:
    """The values of a column of a source, one for each of its rows in their order: an Arrow array without nulls.

    Args:
        source: `train`, or another split that has a source of its own.

    Raises:
        RefusedError: the source has no columns, or none of that name; or the column has nulls.
    """
    spec: Any = getattr(data, source)
    if not isinstance(spec, recipe.Table):
        raise _no_keys(source, column, f"a source of kind {spec.kind}, whose columns have no names")
    try:
        keyed: Any = spec.model_copy(update={"input": [], "label": column})
        opened = kind_of(keyed).open()
    except RefusedError as error:
        raise _no_keys(source, column, error.got or error.what) from error
    read: Callable[..., Any] | None = opened.label_blocks
    if read is None:
        raise _no_keys(source, column, "rows without named columns")
    parts = [plain(block.labels) for block in read(_KEYS_AT_ONCE)]
    keys = pa.chunked_array(parts).combine_chunks()
    if keys.null_count:
        raise _no_keys(source, column, f"nulls in {keys.null_count:,} rows")
    return keys


def _no_keys(source: str, column: str, got: str) -> RefusedError:
    return RefusedError(
        f"data.{source} has no column {column} that could be a key",
        got=got,
        expected="a column of integers or text, another value in each row",
        next="choose another column, or bring logits in the order of the rows and leave --key out",
    )
