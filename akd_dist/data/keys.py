"""A column of the data by which rows of something else are joined with its rows."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.schemas import plain
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.tar_shards import key_of

_KEYS_AT_ONCE = 1 << 16


def key_column(data: recipe.DataSpec, source: str, column: str) -> Any:
    """The values of a column of a source, one for each of its rows in their order: an Arrow array without nulls.

    Rows of pictures are known by their files, as `predict` names them (`file`), and samples of tar files by `__key__`.

    Args:
        source: `train`, or another split that has a source of its own.

    Raises:
        RefusedError: the source has no columns, or none of that name; or the column has nulls.
    """
    spec: Any = getattr(data, source)
    if isinstance(spec, recipe.ImageFolder | recipe.WebDataset):
        return _files(spec, source, column)
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


def has_key(data: recipe.DataSpec, source: str, column: str) -> bool:
    """Whether a source has this column, and it could be a key: integers or text, another value in each row."""
    try:
        keys = key_column(data, source, column)
    except RefusedError:
        return False
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(kind(keys.type) for kind in kinds) and pc.count_distinct(keys).as_py() == len(keys)


def _files(spec: recipe.ImageFolder | recipe.WebDataset, source: str, column: str) -> Any:
    opened = kind_of(spec).open()
    assert opened.names is not None
    names = opened.names(0, opened.rows)
    if isinstance(spec, recipe.WebDataset) and column == "__key__":
        return pa.array([key_of(name.partition("/")[2]) for name in names])
    known = ("file", spec.file) if isinstance(spec, recipe.ImageFolder) else ("file", "__key__")
    if column not in known:
        raise _no_keys(source, column, f"pictures, which are known by {' or '.join(dict.fromkeys(known))}")
    return pa.array(names)


def _no_keys(source: str, column: str, got: str) -> RefusedError:
    return RefusedError(
        f"data.{source} has no column {column} that could be a key",
        got=got,
        expected="a column of integers or text, another value in each row",
        next="choose another column, or bring logits in the order of the rows and leave --key out",
    )
