"""Files of logits that others computed: NumPy, safetensors, Parquet and Zarr as one array that is read block by block.

Headers are looked at first, so that nothing is unpacked or allocated for an array of a shape that nobody asked for.
Nothing is unpickled. What cannot be read from any row on (compressed .npz, Parquet) is written once to an unnamed file
beside the prepared rows, which goes with the process; logits may be larger than memory.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.base.errors import RefusedError, unreadable
from akd_dist.data.logit_arrays import (
    BLOCK_BYTES,
    Check,
    LogitFile,
    Scratch,
    Shape,
    check_floats,
    named,
    no_such_key,
    refuse_key,
    refusing,
)
from akd_dist.data.parquet_files import find_parquet, out_of_order
from akd_dist.data.schemas import is_list
from akd_dist.storage.foreign import open_foreign

_COLUMN = "logit_"
_TEXTS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_KINDS = "a .npy, .npz, .safetensors or .parquet file, or a Zarr folder"


@contextlib.contextmanager
def open_logits(path: Path, check: Check, key: str | None, scratch: Path, *, anywhere: bool) -> Iterator[LogitFile]:
    """Open a file of logits, told by what lies at its path.

    Args:
        check: called with the shape before anything is read.
        key: the column or array that names each row; None for rows in an order.
        scratch: a folder of this node, for what cannot be read in place.
        anywhere: whether rows will be asked for in any order.

    Raises:
        RefusedError: there is no such file, it is of another kind, cut, ragged, has missing parts or holds no floats.
        MachineError: the scratch folder has no room.
    """
    if not path.exists():
        raise no_file(path)
    opened = _opener_of(path)
    with contextlib.ExitStack() as stack:
        found = opened(path, check, key, functools.partial(Scratch, scratch, stack))
        if anywhere and not found.anywhere:
            views, rows, _ = found.shape
            copy = Scratch(scratch, stack, found.shape, "<f4", found.name)
            for view in range(views):
                for start in range(0, rows, copy.block_rows):
                    copy.write(found.take(view, np.arange(start, min(start + copy.block_rows, rows))))
            found = replace(found, read=_reader(copy.array()), anywhere=True)
        yield found


def no_file(path: Path) -> RefusedError:
    """What to say where nothing lies at a path."""
    near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1)
    return RefusedError(
        f"there is no file of logits {path}",
        got=f"near it: {near[0]}" if near else "no such file",
        expected=_KINDS,
        next="correct the path; it starts from the working folder",
    )


Make = Callable[[tuple[int, int, int], str, str], Scratch]
Opener = Callable[[Path, Check, str | None, Make], LogitFile]


def _opener_of(path: Path) -> Opener:
    """What reads a file, by its first bytes and not by its name."""
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
            return _open_zarr
        if any(path.rglob("*.parquet")):
            return _open_parquet
        raise _no_logits(path, "is a folder without logits", "neither Zarr nor Parquet", "name the file in it")
    if not path.is_file():
        raise _no_logits(path, "is no file", "a pipe or a device", "write it to a file, since it is read twice")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise unreadable(RefusedError, path, error, expected="a file that this user may read") from None
    if not head:
        raise _no_logits(path, "is empty", "0 bytes", "copy or compute it again")
    for mark, opener in ((b"\x93NUMPY", _open_npy), (b"PK", _open_npz), (b"PAR1", _open_parquet)):
        if head.startswith(mark):
            return opener
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _open_safetensors
    pickled = head.startswith(b"\x80") or path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin")
    raise _unknown(path, head, pickled=pickled)


def _no_logits(path: Path, what: str, got: str | None, advice: str) -> RefusedError:
    return RefusedError(f"{path} {what}", got=got, expected=_KINDS, next=advice)


def _unknown(path: Path, head: bytes, *, pickled: bool) -> RefusedError:
    return RefusedError(
        f"{path} is no file of logits that is read",
        got="a pickle, which could run code" if pickled else f"a file that begins with {head[:8]!r}",
        expected=_KINDS,
        next="save them with numpy.save or safetensors.numpy.save_file"
        if pickled or path.suffix in _TEXTS
        else "check that it was copied whole",
    )


def _reader(array: Any) -> Callable[[int, int, int], np.ndarray]:
    """Reads an array of two or three dimensions that is mapped, or read by slices."""
    if len(array.shape) == 3:
        return lambda view, start, stop: np.asarray(array[view, start:stop])
    if len(array.shape) == 1:
        return lambda view, start, stop: np.asarray(array[start:stop])[:, None]
    return lambda view, start, stop: np.asarray(array[start:stop])


# ---- NumPy


def _open_npy(path: Path, check: Check, key: str | None, _: Make) -> LogitFile:
    refuse_key(path, key)
    with refusing(path, "a NumPy array"):
        with open(path, "rb") as file:
            shape, _order, dtype = _header(file)
        found = check_floats(str(path), dtype, shape, check)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return LogitFile(str(path), shape, found, dtype.name, _reader(array), anywhere=True)


def _header(file: Any) -> tuple[Shape, bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an array in a .npy file: its header is bounded, and no code."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _open_npz(path: Path, check: Check, key: str | None, make: Make) -> LogitFile:
    with refusing(path, "an .npz of NumPy arrays"), zipfile.ZipFile(path) as archive:
        if any(name.endswith(".pkl") for name in archive.namelist()):  # what torch.save writes
            raise _unknown(path, b"PK", pickled=True)
        names = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        wanted = named(str(path), {name: (None if name == key else 2) for name in names}, key)
        keys = None if key is None else pa.array(_small_array(archive, names[key], path))
        info = archive.getinfo(names[wanted])
        with archive.open(info) as file:
            shape, fortran, dtype = _header(file)
            found = check_floats(f"{path}: {wanted}", dtype, shape, check)
            # What a header promises and what an archive unpacks to are the same, or somebody means no good.
            if info.file_size - file.tell() != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{info.file_size:,} bytes for an array of shape {list(shape)} and dtype {dtype}")
            scratch = make(found, dtype.str, str(path))
            while data := file.read(BLOCK_BYTES):
                scratch.write(data)
        array = scratch.array(shape, "F" if fortran else "C")
    return LogitFile(str(path), shape, found, dtype.name, _reader(array), anywhere=True, key=keys)


def _small_array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """An array of keys: of one dimension, and no larger than its header says."""
    info = archive.getinfo(name)
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        if dtype.hasobject or len(shape) != 1 or info.file_size - file.tell() != math.prod(shape) * dtype.itemsize:
            raise RefusedError(
                f"{path}: {name.removesuffix('.npy')} cannot be a key",
                got=f"dtype {dtype} of shape {list(shape)}",
                expected="one integer or text for each row",
                next="save the keys as an array of one dimension: integers, or text of NumPy's dtype U",
            )
        return np.frombuffer(file.read(), dtype).astype(dtype.newbyteorder("="))  # Arrow knows no other


# ---- safetensors


class _Slices:
    """A tensor of a safetensors file, read by slices."""

    def __init__(self, part: Any) -> None:
        self._part, self.shape = part, tuple(part.get_shape())

    def __getitem__(self, place: Any) -> np.ndarray:
        import torch

        found: torch.Tensor = self._part[place]
        numbers: np.ndarray = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
        return numbers


def _open_safetensors(path: Path, check: Check, key: str | None, _: Make) -> LogitFile:
    from safetensors import safe_open

    with refusing(path, "a safetensors file"):
        # As torch tensors, since NumPy has no bfloat16.
        file: Any = safe_open(path, framework="pt")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        wanted = named(str(path), {name: len(part.get_shape()) for name, part in parts.items()}, key)
        part = parts[wanted]
        told = str(part.get_dtype())
        kinds = {"F16": "float16", "BF16": "float32", "F32": "float32", "F64": "float64"}
        shape = tuple(part.get_shape())
        dtype = np.dtype(kinds.get(told, "int64"))
        found = check_floats(f"{path}: {wanted}", dtype, shape, check)
        keys = None if key is None else pa.array(file.get_tensor(key).numpy())
    name = "bfloat16" if told == "BF16" else str(dtype)
    return LogitFile(str(path), shape, found, name, _reader(_Slices(part)), anywhere=False, key=keys)


# ---- Parquet


def _open_parquet(path: Path, check: Check, key: str | None, make: Make) -> LogitFile:
    # As the files of a source are ordered, so that parts of logits follow one another as parts of the data do.
    files = [Path(str(one)) for one in find_parquet(str(path)).files] if path.is_dir() else [path]
    with refusing(path, "Parquet"):
        opened = [pq.ParquetFile(one, page_checksum_verification=True) for one in files]
        columns, width = _columns_of(files[0], opened[0].schema_arrow, key)
        types = [_floats_of(file, one.schema_arrow, columns, key) for file, one in zip(files, opened, strict=True)]
        _check_keys(files, opened, key)
        rows = sum(one.metadata.num_rows for one in opened)
        if width is None:  # a list column: its first row says how long rows are
            filled = next((one for one in opened if one.metadata.num_rows), opened[0])
            first = next(filled.iter_batches(1, columns=columns), None)
            width = 0 if first is None or first.column(0)[0].as_py() is None else len(first.column(0)[0].as_py())
        dtype = np.result_type(*types)
        shape = rows, width
        found = check_floats(f"{path}: {columns[0]}", dtype, shape, check)
        scratch, keys, at = make(found, dtype.str, str(path)), list[pa.Array](), 0
        for one in opened:
            for batch in one.iter_batches(max(1, scratch.block_rows), columns=[*columns, *([key] if key else [])]):
                scratch.write(_matrix(path, batch, columns, width, at))
                keys += [batch.column(key)] if key else []
                at += len(batch)
    key_column = pa.chunked_array(keys).combine_chunks() if key else None
    return LogitFile(str(path), shape, found, str(dtype), _reader(scratch.array()), anywhere=True, key=key_column)


def check_parts(path: Path, of_source: Sequence[tuple[str, int]]) -> None:
    """Refuse a folder of Parquet whose order of names is not that of their numbers, for rows that go by their order.

    It is read in the order of names, as sources are, where part-10 comes before part-2. What wrote the parts had their
    numbers in mind; unless they are called as the parts of the source are, and have as many rows.

    Args:
        of_source: the name and rows of each file of the source.

    Raises:
        RefusedError: so it is; names two files.
    """
    if not path.is_dir() or _opener_of(path) is not _open_parquet:
        return
    files = [Path(str(one)) for one in find_parquet(str(path)).files]
    swapped = out_of_order([str(one.relative_to(path)) for one in files])
    if swapped is None:
        return
    with refusing(path, "Parquet"):
        ours = [(one.name, pq.read_metadata(one).num_rows) for one in files]
    if ours != [(Path(name).name, rows) for name, rows in of_source]:
        raise RefusedError(
            f"the files of {path} have another order by name than by number",
            got=f"{swapped[0]} before {swapped[1]}, as names are sorted",
            expected="numbers of equally many digits, or the names and rows of the source's own files",
            next="rename them with zeros in front, as in part-02.parquet, or join rows by --key",
        )


def _floats_of(path: Path, schema: Any, columns: Sequence[str], key: str | None) -> np.dtype[Any]:
    """The dtype that holds the logits of a file; refuses other columns than those of the first, and no floats."""
    found, _ = _columns_of(path, schema, key)
    if found != columns:
        raise RefusedError(
            f"{path} has other columns of logits than the file before it",
            got=", ".join(found[:10]),
            expected=", ".join(columns[:10]),
            next="write all files with the same columns, or take out what is none of the logits",
        )
    inner = {name: schema.field(name).type for name in columns}
    inner = {name: one.value_type if is_list(one) else one for name, one in inner.items()}
    for name, one in inner.items():
        if not pa.types.is_floating(one):
            raise RefusedError(
                f"{path}: column {name} holds no floats",
                got=f"type {schema.field(name).type}",
                expected="lists of float16, float32 or float64, or a column of them for each class",
                next="save the raw outputs of the teacher, as floats",
            )
    return np.result_type(*(np.dtype(one.to_pandas_dtype()) for one in inner.values()))


def _check_keys(files: Sequence[Path], opened: Sequence[Any], key: str | None) -> None:
    """Refuse files whose keys are of several types."""
    named_types = ((str(one.schema_arrow.field(key).type), file) for file, one in zip(files, opened, strict=True))
    types = {} if key is None else dict(named_types)
    if len(types) > 1:
        raise RefusedError(
            f"the files of {files[0].parent} have keys of several types",
            got=", ".join(f"{key} is {kind} in {file.name}" for kind, file in types.items()),
            expected="one type in all of them",
            next="write the key of every file with the type that it has in the data",
        )


def _columns_of(path: Path, schema: Any, key: str | None) -> tuple[list[str], int | None]:
    """The columns of logits, and how many there are; None for the length of one column of lists."""
    if key is not None and key not in schema.names:
        raise no_such_key(str(path), key, schema.names)
    numbered = [name for name in schema.names if name.startswith(_COLUMN) and name[len(_COLUMN) :].isdecimal()]
    if numbered:
        numbered.sort(key=lambda name: int(name[len(_COLUMN) :]))
        expected = [f"{_COLUMN}{number}" for number in range(len(numbered))]
        if numbered != expected:
            raise RefusedError(
                f"{path} lacks a column of logits",
                got=f"{len(numbered)} columns, the last {numbered[-1]}",
                expected=f"{expected[0]} to {_COLUMN}{len(numbered) - 1}, one for each class",
                next="write the columns of all classes",
            )
        return numbered, len(numbered)
    lists = {name: 2 for name in schema.names if name != key and is_list(schema.field(name).type)}
    return [named(str(path), lists, None)], None


def _matrix(path: Path, batch: Any, columns: Sequence[str], width: int, at: int) -> np.ndarray:
    """The logits of a batch of rows, [n, width]; refuses what is null or of another length, naming the row."""
    for name in columns:
        column = batch.column(name)
        values = column.flatten() if is_list(column.type) else column
        if column.null_count or values.null_count:
            rows = _null_rows(column)
            raise RefusedError(
                f"{path}: column {name} has nulls",
                got=f"row {at + rows}",
                expected="a number for each class",
                next="compute the logits of that row, or look why they were not saved",
            )
        if is_list(column.type):
            lengths = np.diff(_offsets(column))
            if (lengths != width).any():
                row = int(np.flatnonzero(lengths != width)[0])
                raise RefusedError(
                    f"{path}: the rows of column {name} are not of one length",
                    got=f"row {at + row} has {lengths[row]}",
                    expected=f"{width}, as row 0 has",
                    next="save a logit for each class in every row",
                )
            return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(batch), width)
    stacked = np.stack([batch.column(name).to_numpy(zero_copy_only=False) for name in columns], axis=1)
    return np.asarray(stacked)


def _offsets(column: Any) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        return np.arange(len(column) + 1) * int(column.type.list_size)
    return np.asarray(column.offsets.to_numpy())


def _null_rows(column: Any) -> int:
    """The first row that is null, or holds a null."""
    for row, value in enumerate(column):
        inner = value.as_py()
        if inner is None or (isinstance(inner, list) and None in inner):
            return row
    return 0


# ---- Zarr


def _open_zarr(path: Path, check: Check, key: str | None, _: Make) -> LogitFile:
    refuse_key(path, key)
    array = open_foreign(path)
    found = check_floats(str(path), array.dtype, array.shape, check)
    array.check()
    views = len(array.shape) == 3

    def read(view: int, start: int, stop: int) -> np.ndarray:
        rows = array.read(view if views else None, start, stop)
        return rows if rows.ndim == 2 else rows[:, None]

    return LogitFile(str(path), array.shape, found, str(array.dtype), read, anywhere=False)
