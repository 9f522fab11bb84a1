"""Parquet: a file, a folder or a glob, read by row groups."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block
from akd_dist.data.parquet_files import find_parquet
from akd_dist.data.schemas import check_schema, input_kind, plain
from akd_dist.data.sources.base import Source, stats_of
from akd_dist.data.sources.tables import columns_of, columns_of_table, source_of_table
from akd_dist.storage.remote import RemoteFile

# Bytes read ahead in a column. With `pre_buffer`, pyarrow would hold a whole row group in memory.
_BUFFER_BYTES = 1 << 20
# The same of an object: each request takes some 30 ms, whatever it brings.
_REMOTE_BUFFER_BYTES = 1 << 23
# Bytes of columns, uncompressed, that are read at a time.
_BLOCK_BYTES = 1 << 21


class ParquetSource:
    """One or more Parquet files, in the order of their names; rows are numbered through all of them.

    Args:
        inputs: what its column of inputs may be, as of `schemas.check_schema`.
    """

    def __init__(self, spec: recipe.Parquet, inputs: Callable[[Any], str | None] = input_kind) -> None:
        self.spec, self._inputs = spec, inputs
        self.found = find_parquet(spec.path)
        self.files = self.found.files

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed."""
        return {**self.spec.model_dump(mode="json"), "files": stats_of(self.files)}

    def open(self) -> Source:
        """Look at the rows, without reading them."""
        groups: list[tuple[Path | RemoteFile, int, int]] = []  # file, row group, number of its first row
        starts, schema = [0], None
        for file in self.files:
            with _opened(file) as parquet:
                whole = _with_path_columns(parquet.schema_arrow, self.found.columns)
                self._check_above(whole)
                check_schema(whole, self.spec, str(file), schema, self._inputs)
                schema = schema or whole
                at = starts[-1]
                for number in range(parquet.num_row_groups):
                    groups.append((file, number, at))
                    at += parquet.metadata.row_group(number).num_rows
                starts.append(at)

        def where(row: int) -> str:
            file = int(np.searchsorted(starts, row, side="right")) - 1
            inside = f" ({self.files[file].name}, row {row - starts[file]})" if len(self.files) > 1 else ""
            return f"row {row} of {self.spec.path}{inside}"

        rows, cuts = starts[-1], np.array([start for *_, start in groups], dtype=np.int64)

        def blocks(spec: recipe.Table, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            stop = rows if stop is None else min(stop, rows)
            # From the row group that holds the first row to the one that holds the last one.
            first = max(0, int(np.searchsorted(cuts, start, side="right")) - 1)
            for file, number, at in groups[first : int(np.searchsorted(cuts, stop))]:
                yield from _cut(self._blocks(spec, file, number, at, most), start, stop)

        source = source_of_table(self.spec, self.spec.path, rows, blocks, where, schema, self._notes(), cuts)
        return dataclasses.replace(
            source, files=tuple(map(str, self.files)), file_starts=np.array(starts[:-1], dtype=np.int64)
        )

    def _blocks(
        self, spec: recipe.Table, file: Path | RemoteFile, group: int, start: int, most: int
    ) -> Iterator[Block]:
        columns = columns_of(spec)
        with _opened(file) as parquet:
            # As many rows as make _BLOCK_BYTES on average: where rows are long texts or large images, fewer are held.
            metadata = parquet.metadata.row_group(group)
            fitting = _BLOCK_BYTES * metadata.num_rows // max(_size(metadata, columns), 1)
            most = max(1, min(most, fitting))
            stored = [name for name in columns if name in parquet.schema_arrow.names]
            batches = parquet.iter_batches(most, row_groups=[group], columns=stored)
            while (batch := _next_batch(file, batches)) is not None:
                yield Block(start, *columns_of_table(spec, self._with_path(file, batch, columns)))
                start += len(batch)

    def _with_path(self, file: Path | RemoteFile, batch: Any, columns: Sequence[str]) -> Any:
        """The columns of a batch, and those that stand in the file's path.

        Raises:
            RefusedError: a column stands in both, and they differ.
        """
        in_path = self.found.values[file]
        for field in self.found.columns:
            if field.name not in columns:
                continue
            value = pa.scalar(in_path.get(field.name), field.type)
            if field.name not in batch.schema.names:
                batch = batch.append_column(field.name, pa.repeat(value, len(batch)))
            elif self.found.whole and field.name in in_path:
                _check_agrees(file, field.name, value, batch.column(field.name))
        return batch

    def _check_above(self, schema: Any) -> None:
        """Refuse a column that stands in the path of the folder itself: there it would have one value for all rows."""
        parts = self.spec.path.split("/")
        for name in columns_of(self.spec):
            at = next((number for number, part in enumerate(parts) if part.startswith(f"{name}=")), None)
            if name not in schema.names and at is not None:
                raise RefusedError(
                    f"the column {name} stands in the path above what is read",
                    got=f"{parts[at]} in {self.spec.path}",
                    expected=f"a folder that holds folders {name}=...",
                    next=f"set `path` to {'/'.join(parts[:at])}",
                )

    def _notes(self) -> tuple[str, ...]:
        others = self.found.left_out
        if not others:
            return ()
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        return (f"left out of {self.spec.path}, as they hold no Parquet: {shown}",)


def _cut(blocks: Iterator[Block], start: int, stop: int) -> Iterator[Block]:
    """The blocks of a row group without the rows before `start`; it is not read beyond those before `stop`."""
    for block in blocks:
        first, last = max(start - block.start, 0), min(stop - block.start, len(block))
        if first < last:
            yield block if last - first == len(block) else block.part(first, last)
        if block.start + len(block) >= stop:
            return


def _with_path_columns(schema: Any, columns: Any) -> Any:
    """The schema of a file with the columns that stand in its path, if it does not have them itself."""
    for column in columns:
        if column.name not in schema.names:
            schema = schema.append(column)
    return schema


def _check_agrees(file: Path | RemoteFile, name: str, value: Any, column: Any) -> None:
    """Refuse a column that says something else than the path of its file, as far as types go: 1 is 1 in any of them."""
    expected = pa.repeat(value, len(column))
    try:
        same = plain(column).cast(value.type).equals(expected)
    except pa.ArrowException:
        same = False
    if not same:
        raise RefusedError(
            f"column {name} of {file} is not what its path says",
            got=f"{column[0]} in the file",
            expected=f"{value}, as in the path",
            next=f"leave the column {name} out of the files, or move them to folders that are called otherwise",
        )


def _size(group: Any, names: Sequence[str]) -> int:
    """Bytes of columns in a row group, uncompressed."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema.partition(".")[0] in names)


def column_names(path: str) -> list[str]:
    """The columns of the first Parquet file that a path, a folder or a glob names, those in its path included.

    Raises:
        RefusedError: there is no such file, or it is no Parquet file.
    """
    found = find_parquet(path)
    with _opened(found.files[0]) as parquet:
        names: list[str] = _with_path_columns(parquet.schema_arrow, found.columns).names
    return names


def _opened(file: Path | RemoteFile) -> pq.ParquetFile:
    local = isinstance(file, Path)
    place, ahead = (file, _BUFFER_BYTES) if local else (file.open(), _REMOTE_BUFFER_BYTES)
    try:
        # With the checksums of pages, where the writer left any: without them a flipped bit in a number is another
        # number.
        return pq.ParquetFile(place, pre_buffer=False, buffer_size=ahead, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} cannot be read as Parquet",
            got=str(error).partition("\n")[0],
            expected="a Parquet file",
            next="check that it was copied whole",
        ) from error


def _next_batch(file: Path | RemoteFile, batches: Iterator[Any]) -> Any:
    """The next batch of a file, None at its end; a damaged page is a refusal that names the file."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} is damaged", got=str(error).partition("\n")[0], expected="a Parquet file that reads to its end"
        ) from error
