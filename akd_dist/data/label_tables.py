"""Tables that give the label of each file: CSV, JSON Lines or Parquet."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from akd_dist.base.errors import RefusedError
from akd_dist.data.parquet_files import check_scheme, nothing_at
from akd_dist.data.schemas import label_kind, plain
from akd_dist.storage.remote import RemoteFile, find_file, is_remote

# Bytes of an object that are read at a time.
_BUFFER_BYTES = 1 << 23
_SEPARATORS = {b";": "semicolons", b"\t": "tabs", b"|": "bars"}
# Numbers as programs write them. What begins with zeros, as 007, is a name.
_INTEGER, _NUMBER = r"^-?(0|[1-9][0-9]{0,17})$", r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
# The most names in which a nearest one is looked for: it takes long.
_MOST_NEAR = 5000


def find_table(path: str) -> Path | RemoteFile:
    """The table at a path or URI.

    Raises:
        RefusedError: there is none.
        MachineError: object storage does not answer, or does not let this user in.
    """
    check_scheme(path)
    place = path if is_remote(path) else Path(path)
    found = find_file(place) if isinstance(place, str) else place if place.is_file() else None
    if found is None:
        raise nothing_at(place, "table of labels", "a CSV, JSON Lines or Parquet file")
    return found


def labels_by_file(table: Path | RemoteFile, file: str, label: str, names: Sequence[str]) -> tuple[Any, list[int]]:
    """The label of each file that a table lists, in the order of `names`.

    Args:
        table: as `find_table` finds it.
        file: its column of files, relative to their folder.
        label: its column of labels.
        names: the files that there are.

    Returns:
        An Arrow array of labels, and the places in `names` of the files that they belong to, ascending.

    Raises:
        RefusedError: it cannot be read, or has no such columns; a row has no file; a file is absolute, lies
            outside of the folder, is not there, or is listed twice; names the row and the file.
    """
    columns = _read(table, file, label)
    _check_whole(table, columns[file])
    places = {name: number for number, name in enumerate(names)}
    rows: dict[int, int] = {}  # place -> row of the table
    for row, listed in enumerate(columns[file].to_pylist()):
        place = places.get(listed)
        if place is None:
            place = places.get(_inside(table, row, listed))
        if place is None:
            raise _not_there(table, row, listed, places)
        if place in rows:
            raise RefusedError(
                f"a file is listed twice in {table}",
                got=f"{listed} in rows {rows[place]} and {row}",
                expected="each file once",
                next="remove one of the rows",
            )
        rows[place] = row
    listed_places = sorted(rows)
    return columns[label].take(pa.array([rows[place] for place in listed_places], pa.int64())), listed_places


def _read(table: Path | RemoteFile, file: str, label: str) -> dict[str, Any]:
    """Two columns of a table: text, and labels of a kind that something can be made of."""
    try:
        data = table.read_bytes() if isinstance(table, Path) else table.open(_BUFFER_BYTES).read()
        read = {".parquet": _of_parquet, ".jsonl": _of_json_lines, ".csv": _of_csv}.get(Path(table.name).suffix.lower())
        if read is None:
            raise RefusedError(
                f"nothing can be made of the table of labels {table}",
                got=f"a name that ends in {Path(table.name).suffix or 'nothing'}",
                expected=".csv, .jsonl or .parquet",
                next="write it as one of these",
            )
        if read is _of_csv:
            _check_separator(table, data)
        names, columns = read(data, (file, label))
        for key, name in (("file", file), ("label", label)):
            if names.count(name) != 1:
                raise _no_column(table, key, name, names)
        chosen = {name: plain(column) for name, column in columns().items()}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise RefusedError(
            f"the table of labels {table} cannot be read",
            got=str(error).partition("\n")[0][:300],
            expected="a whole CSV (with commas, and names of columns in its first line), JSON Lines or Parquet file",
            next="correct the file",
        ) from error
    for key, name, good in (
        ("file", file, label_kind(chosen[file].type) == "names"),
        ("label", label, label_kind(chosen[label].type) is not None),
    ):
        if not good:
            raise RefusedError(
                f"column {name} of {table} cannot be the {key}",
                got=f"type {chosen[name].type}",
                expected="names of files" if key == "file" else "integers, class names, or numbers",
                next=f"set `{key}` to another column",
            )
    return chosen


def _of_csv(data: bytes, wanted: Sequence[str]) -> tuple[list[str], Any]:
    if not data.strip():
        raise pa.ArrowInvalid("it is empty")
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    names = pyarrow.csv.open_csv(io.BytesIO(data), parse_options=parse).schema.names
    # As text, since types that are inferred make 7 of the name 007, and nothing of the name NA.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()),
        include_columns=list(dict.fromkeys(wanted)),
        strings_can_be_null=True,
        null_values=[""],
    )

    def columns() -> dict[str, Any]:
        table = pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
        return {wanted[0]: table.column(wanted[0]), wanted[1]: _numbers(plain(table.column(wanted[1])))}

    return names, columns


def _check_separator(table: Path | RemoteFile, data: bytes) -> None:
    """Refuse a table whose first line, the names of its columns, has another separator and no comma.

    Raises:
        RefusedError: so it is; says which.
    """
    head = data.lstrip().partition(b"\n")[0]
    found = [name for mark, name in _SEPARATORS.items() if mark in head and b"," not in head]
    if found:
        raise RefusedError(
            f"the columns of {table} are not separated by commas",
            got=f"{found[0]} in its first line: {head[:80].decode(errors='replace').strip()}",
            expected="a CSV with commas, and names of columns in its first line",
            next="write it again with commas; text that holds one stands in double quotes",
        )


def _of_json_lines(data: bytes, wanted: Sequence[str]) -> tuple[list[str], Any]:
    table = pyarrow.json.read_json(io.BytesIO(data))
    return table.column_names, lambda: {name: table.column(name) for name in wanted}


def _of_parquet(data: bytes, wanted: Sequence[str]) -> tuple[list[str], Any]:
    file = pq.ParquetFile(pa.BufferReader(data))
    return file.schema_arrow.names, lambda: {name: file.read([name]).column(name) for name in wanted}


def _numbers(labels: Any) -> Any:
    """Text of a CSV as integers or floats, if all of it is such numbers; else as it is."""
    for pattern, kind in ((_INTEGER, pa.int64()), (_NUMBER, pa.float64())):
        if len(labels) > labels.null_count and pc.all(pc.match_substring_regex(labels, pattern)).as_py():
            return labels.cast(kind)
    return labels


def _check_whole(table: Path | RemoteFile, files: Any) -> None:
    """Refuse a table without rows, or with one that names no file; rows without a label are told of with their file."""
    if not len(files):
        raise RefusedError(f"{table} lists no files", got="0 rows", expected="a row for each file", next="fill it in")
    if files.null_count:
        raise RefusedError(
            f"no file in row {pc.index(pc.is_null(files), True).as_py()} of {table}",
            got="nothing",
            expected="a file in every row",
            next="fill it in, or remove the row",
        )


def _inside(table: Path | RemoteFile, row: int, listed: str) -> str:
    """A relative path in its plain spelling.

    Raises:
        RefusedError: it is absolute, or leads out of the folder.
    """
    parts = [part for part in listed.split("/") if part not in ("", ".")]
    absolute = listed.startswith("/") or "://" in listed or re.match(r"[A-Za-z]:[\\/]", listed)
    if absolute or ".." in parts or ".." in listed.split("\\"):
        raise RefusedError(
            f"row {row} of {table} names a file {'by an absolute path' if absolute else 'outside of the folder'}",
            got=listed,
            expected="a path relative to the folder of pictures, without ..",
            next="write it relative to `path`, or set `path` to the folder that holds all pictures",
        )
    return "/".join(parts)


def _not_there(table: Path | RemoteFile, row: int, listed: str, places: Mapping[str, int]) -> RefusedError:
    slashes = listed.replace("\\", "/")
    if slashes != listed and slashes in places:
        near = f"write slashes: {slashes}"
    elif longer := next((name for name in places if name.rpartition(".")[0] == listed), None):
        near = f"write names with their ending: {longer}"
    else:
        few = list(places) if len(places) <= _MOST_NEAR else []
        last = listed.rpartition("/")[2]
        same = [name for name in places if name.rpartition("/")[2] == last][:1]
        nearest = same or difflib.get_close_matches(listed, few, n=1)
        near = f"correct it to {nearest[0]}" if nearest else "remove the row, or bring the picture back"
    return RefusedError(
        f"row {row} of {table} names a picture that is not there",
        got=listed,
        expected=f"a picture below the folder of pictures, as {next(iter(places))}",
        next=near,
    )


def _no_column(table: Path | RemoteFile, key: str, name: str, names: Sequence[str]) -> RefusedError:
    near = difflib.get_close_matches(name, names, n=1)
    count = names.count(name)
    return RefusedError(
        f"{table} has {f'{count} columns' if count else 'no column'} {name}",
        got=f"the columns {', '.join(names)}",
        expected=f"the column that `{key}` names",
        next=f"set `{key}` to {near[0] if near else 'one of these'}",
    )
