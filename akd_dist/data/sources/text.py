"""Documents and chats: Parquet, JSON Lines, or plain text, of which each file is a document."""

from __future__ import annotations

import dataclasses
import glob
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError, unreadable
from akd_dist.data.blocks import Block, read_ahead
from akd_dist.data.folder_walk import Walk
from akd_dist.data.parquet_files import NEXT_PATH, SKIPPED_PREFIXES, check_scheme, matches, nothing_at
from akd_dist.data.schemas import chat_kind, document_kind
from akd_dist.data.sources.base import Source, stats_of
from akd_dist.data.sources.parquet import ParquetSource
from akd_dist.storage.remote import RemoteFile, files_below, find_file, is_remote

File = Path | RemoteFile
Format = Literal["parquet", "jsonl", "txt"]
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "txt": (".txt",),
}
_FORMATS = ".parquet, .jsonl or .txt"
# Bytes of documents that are read at a time, if more than one.
_BLOCK_BYTES = 1 << 21
# Bytes of an object that are read at a time.
_BUFFER_BYTES = 1 << 23
# After how many rows a place is noted from which a file of JSON Lines can be read.
_NOTED_ROWS = 1024


class TextSource:
    """One or more files of documents, in the order of their names; rows are numbered through all of them."""

    def __init__(self, spec: recipe.TextData | recipe.ChatData) -> None:
        self.spec = spec
        self.format, self.files, self._left_out = _find(spec.path)
        if self.format == "txt" and isinstance(spec, recipe.ChatData):
            raise RefusedError(
                f"{spec.path} holds plain text, and chats have messages",
                got=str(self.files[0]),
                expected="Parquet or JSON Lines",
                next="set `kind: text`, or write the messages as JSON Lines",
            )
        self._parquet: ParquetSource | None = None
        if self.format == "parquet":
            table = recipe.Parquet(path=spec.path, input=spec.input, label="")
            self._parquet = ParquetSource(table, chat_kind if isinstance(spec, recipe.ChatData) else document_kind)

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed."""
        files = self.files if self._parquet is None else self._parquet.files
        return {**self.spec.model_dump(mode="json"), "files": stats_of(files)}

    def open(self, known: Any = None) -> Source:
        """Look at the rows: of JSON Lines each line is counted.

        Args:
            known: `Source.known` of the process that planned.
        """
        if self._parquet is not None:
            return self._parquet.open()
        return self._open_lines(known) if self.format == "jsonl" else self._open_files()

    def _open_files(self) -> Source:
        def blocks(most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            files = self.files[start:stop]
            read = read_ahead(files, _text_of, _size_of, waits=any(isinstance(one, RemoteFile) for one in files))
            yield from _in_blocks(read, len, start, most)

        return Source(
            self.spec.path,
            len(self.files),
            blocks,
            lambda row: str(self.files[row]),
            notes=self._notes(),
            files=tuple(map(str, self.files)),
            file_starts=np.arange(len(self.files), dtype=np.int64),
        )

    def _open_lines(self, known: Any) -> Source:
        places: list[tuple[int, list[int]]] = known or [_places_in(file) for file in self.files]
        starts = np.cumsum([0, *(rows for rows, _ in places)])

        def where(row: int) -> str:
            file = int(np.searchsorted(starts, row, side="right")) - 1
            inside = f" ({self.files[file].name}, row {row - starts[file]})" if len(self.files) > 1 else ""
            return f"row {row} of {self.spec.path}{inside}"

        def values(start: int, stop: int) -> Iterator[tuple[Any, int]]:
            for number, (rows, offsets) in enumerate(places):
                first, last = max(start - int(starts[number]), 0), min(stop - int(starts[number]), rows)
                if first < last:
                    for row, line in _lines(self.files[number], offsets, first, last):
                        yield self._value(line, int(starts[number]) + row, where), len(line)

        def blocks(most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            last = int(starts[-1]) if stop is None else min(stop, int(starts[-1]))
            for block in _in_blocks(values(start, last), lambda one: one[1], start, most):
                yield dataclasses.replace(block, inputs=[[value for value, _ in block.inputs[0]]])

        return Source(
            self.spec.path,
            int(starts[-1]),
            blocks,
            where,
            notes=self._notes(),
            inputs=(self.spec.input,),
            files=tuple(map(str, self.files)),
            file_starts=starts[:-1],
            known=places,
        )

    def _value(self, line: bytes, row: int, where: Callable[[int], str]) -> Any:
        """What a line holds under the key of documents or messages."""
        wanted, what = (list, "list of messages") if isinstance(self.spec, recipe.ChatData) else (str, "text")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RefusedError(
                f"no JSON in {where(row)}",
                got=str(error).partition("\n")[0],
                expected="an object in each line, as UTF-8",
                next="write the file as JSON Lines; of a single long list, write each entry into a line of its own",
            ) from error
        if isinstance(found, dict) and isinstance(found.get(self.spec.input), wanted):
            return found[self.spec.input]
        keys = f"the keys {', '.join(list(found)[:10])}" if isinstance(found, dict) else type(found).__name__
        got = keys if not isinstance(found, dict) or self.spec.input not in found else type(found[self.spec.input])
        raise RefusedError(
            f"no {what} under `{self.spec.input}` in {where(row)}",
            got=got.__name__ if isinstance(got, type) else got,
            expected=f"{what} under the key that `input` names",
            next="set `input` (of a command, --input) to the key that holds it, or correct the line",
        )

    def _notes(self) -> tuple[str, ...]:
        if not self._left_out:
            return ()
        more = f" and {len(self._left_out) - 3:,} more" if len(self._left_out) > 3 else ""
        shown = ", ".join(self._left_out[:3])
        return (f"left out of {self.spec.path}, as their names do not end in {_FORMATS}: {shown}{more}",)


def _find(path: str) -> tuple[Format, list[File], list[str]]:
    """The format of the files that a path names, these files in their order, and the names of others beside them."""
    check_scheme(path)
    files, named = _remote(path) if is_remote(path) else _local(path)
    # What is named as it is, and not found in a folder, is plain text whatever its name ends in.
    formats = [_format_of(file.name) or ("txt" if named else None) for file in files]
    there = sorted({one for one in formats if one is not None})
    left_out = [file.name for file, its in zip(files, formats, strict=True) if its is None]
    if not there:
        place = path if is_remote(path) else Path(path)
        raise nothing_at(
            place, "document", f"files that end in {_FORMATS}, a folder with such files, or a glob", left_out
        )
    if len(there) > 1:
        examples = [next(file.name for file, its in zip(files, formats, strict=True) if its == one) for one in there]
        raise RefusedError(
            f"{path} holds documents in several formats",
            got=", ".join(examples),
            expected="files of one format",
            next=f"name those of one format with a glob, such as *.{there[0]}",
        )
    return there[0], [file for file, its in zip(files, formats, strict=True) if its is not None], left_out


def _format_of(name: str) -> Format | None:
    return next((one for one, suffixes in _SUFFIXES.items() if name.lower().endswith(suffixes)), None)


def _local(path: str) -> tuple[list[File], bool]:
    place = Path(path)
    if place.is_dir():
        walk = Walk(path, "documents", lambda name: _format_of(name) is not None)
        names = sorted(name.split("/") for _, name in walk.files())
        return [place.joinpath(*parts) for parts in names if not _skipped(parts)], False
    if place.is_file() or not glob.has_magic(path):
        return [place] if place.is_file() else [], True
    # Path.glob would not follow links through **.
    found = [Path(one) for one in glob.glob(path, recursive=True)]  # noqa: PTH207
    return [*sorted((one for one in found if one.is_file()), key=lambda one: one.parts)], True


def _remote(uri: str) -> tuple[list[File], bool]:
    uri = uri.rstrip("/")
    if (one := find_file(uri)) is not None:
        return [one], True
    scheme, _, rest = uri.partition("://")
    parts = rest.split("/")
    first = next((at for at, part in enumerate(parts) if at and glob.has_magic(part)), len(parts))
    base = f"{scheme}://{'/'.join(parts[:first])}"
    below = {tuple(file.uri.removeprefix(f"{base}/").split("/")): file for file in files_below(base)}
    kept = {
        name: file
        for name, file in below.items()
        if not _skipped(name) and (first == len(parts) or matches(name, parts[first:]))
    }
    return [kept[name] for name in sorted(kept)], first < len(parts)


def _skipped(parts: Sequence[str]) -> bool:
    return any(part.startswith(SKIPPED_PREFIXES) for part in parts)


def _in_blocks(values: Iterator[Any], size_of: Callable[[Any], int], start: int, most: int) -> Iterator[Block]:
    """Values as blocks of a column without labels, bounded in rows and in bytes."""
    held: list[Any] = []
    size = 0
    for value in values:
        held.append(value)
        size += size_of(value)
        if len(held) == most or size >= _BLOCK_BYTES:
            yield Block(start, [held], pa.nulls(len(held)))
            start, held, size = start + len(held), [], 0
    if held:
        yield Block(start, [held], pa.nulls(len(held)))


def _size_of(file: File) -> int:
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def _opened(file: File) -> Any:
    try:
        return file.open("rb") if isinstance(file, Path) else file.open(_BUFFER_BYTES)
    except OSError as error:
        raise unreadable(RefusedError, file, error, expected="a file of documents", next=NEXT_PATH) from error


def _text_of(file: File) -> str:
    with _opened(file) as opened:
        data = opened.read()
    try:
        text: str = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"{file} is not UTF-8",
            got=error,
            expected="plain text as UTF-8",
            next="write it anew as UTF-8, or name only files of text; compressed files are to be unpacked",
        ) from error
    return text


def _places_in(file: File) -> tuple[int, list[int]]:
    """How many rows a file of JSON Lines has, and where every _NOTED_ROWS-th of them begins, in bytes."""
    offsets, rows, at = list[int](), 0, 0
    with _opened(file) as opened:
        for line in opened:
            if line.strip():
                if rows % _NOTED_ROWS == 0:
                    offsets.append(at)
                rows += 1
            at += len(line)
    return rows, offsets


def _lines(file: File, offsets: Sequence[int], first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """The lines of rows first..last - 1 of a file, each with its row; lines of spaces are none."""
    row = first // _NOTED_ROWS * _NOTED_ROWS
    with _opened(file) as opened:
        opened.seek(offsets[first // _NOTED_ROWS], io.SEEK_SET)
        for line in opened:
            if not line.strip():
                continue
            if row >= first:
                yield row, line
            row += 1
            if row == last:
                return
