"""Where rows come from: one small class per kind of source. A source yields its rows as they are stored.

`key` is cheap and says when rows may have changed; `open` looks at the rows without reading them.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from akd_dist import hub, pictures, recipe
from akd_dist.arguments import listing, named, placed
from akd_dist.blocks import Block, Stream
from akd_dist.columns import Place, check_schema, class_label_names, input_columns, label_columns, plain
from akd_dist.factories import call_factory, source_of, whole
from akd_dist.parquet_files import find_parquet, nothing_at
from akd_dist.storage.errors import RefusedError
from akd_dist.storage.files import sha256

_BUFFER_BYTES = 1 << 20  # read ahead in a column; pre_buffer would hold whole row groups
_BLOCK_BYTES = 1 << 21  # of a Parquet column, uncompressed, read at a time
_STREAM_ROWS = 1 << 14  # of sources that can be read from any row
_SAMPLE_ROWS = 18


@dataclass(frozen=True)
class Source:
    """Rows in an order that never changes, looked at and not yet read."""

    name: str
    """For messages."""
    rows: int
    """How many."""
    streams: Sequence[Stream]
    """How to read them."""
    where: Callable[[int], str]
    """A row's place, for messages."""
    label_streams: Sequence[Stream] = ()
    """How to read labels alone, in blocks without columns of inputs; none where they come with the inputs only."""
    notes: tuple[str, ...] = ()
    """What a user should know of the source, a line each."""
    inputs: tuple[str, ...] = ()
    """The columns of inputs, if they have names."""
    label: tuple[str, ...] = ()
    """The column of labels, if it has a name."""
    class_names: tuple[str, ...] | None = None
    """What the source calls its class ids."""
    classes: int | None = None
    """How many classes there are, if it is known beforehand."""
    sample: Callable[[], str] | None = None
    """A hash of a few rows, by which a change is noticed that no file shows; of sources of the user's own."""

    def __post_init__(self) -> None:
        if self.rows == 0:
            raise _no_rows(self.name)

    @property
    def input_place(self) -> Place:
        """Where inputs stand."""
        return Place(self.where, self.inputs)

    @property
    def label_place(self) -> Place:
        """Where labels stand."""
        return Place(self.where, self.label)


def _no_rows(name: str) -> RefusedError:
    return RefusedError(
        f"{name} has no rows",
        got="0 rows",
        expected="at least one",
        next="correct the source in the recipe",
    )


class Kind(Protocol):
    """A place that rows may come from."""

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed; cheap. Refuses what is not there."""

    def open(self) -> Source:
        """Look at the rows: how many there are, and whether they have the columns that the recipe names."""


def kind_of(spec: recipe.Source) -> Kind:
    """The kind of source that a recipe names."""
    match spec:
        case recipe.Digits():
            return _Digits()
        case recipe.Idx():
            return _Idx(spec)
        case recipe.Parquet():
            return _Parquet(spec)
        case recipe.HuggingFaceData():
            return _HuggingFace(spec)
        case recipe.CustomData():
            return _Custom(spec)


def _slices(rows: int, read: Callable[[int, int], tuple[Sequence[Any], Any]], per_stream: int) -> list[Stream]:
    """Streams over rows that can be read from anywhere: `read(start, stop)` gives columns of inputs, and labels."""

    def blocks(first: int, last: int, most: int) -> Iterator[Block]:
        for start in range(first, last, most):
            yield Block(start, *read(start, min(start + most, last)))

    return [
        Stream(first, functools.partial(blocks, first, min(first + per_stream, rows)))
        for first in range(0, rows, per_stream)
    ]


def _stats(files: Sequence[Path]) -> list[list[Any]]:
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _row_of(name: str) -> Callable[[int], str]:
    return lambda row: f"row {row} of {name}"


# ---- digits


class _Digits:
    """scikit-learn's 1,797 handwritten digits, the built-in example: uint8 [1, 8, 8], ten classes."""

    def key(self) -> dict[str, Any]:
        return {"kind": "digits", "scikit-learn": version("scikit-learn")}

    def open(self) -> Source:
        # Here, because it takes a second.
        from sklearn.datasets import load_digits

        grey, labels = load_digits(return_X_y=True)
        # Their grey levels are 0 to 16.
        inputs, ids = np.rint(grey * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), pa.array(labels)
        name = "the digits of scikit-learn"
        streams = _slices(len(ids), lambda start, stop: ([inputs[start:stop]], ids[start:stop]), len(ids))
        return Source(name, len(ids), streams, _row_of(name), classes=10)


# ---- IDX

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_DIMENSIONS = 8  # more than anybody has, and fewer than NumPy takes
_MOST_GZIP_SAVES = 1032  # times; deflate cannot do better


class _Idx:
    """Images and labels in IDX files: [n, height, width] become [n, 1, height, width]."""

    def __init__(self, spec: recipe.Idx) -> None:
        self.spec = spec

    def key(self) -> dict[str, Any]:
        files = [_existing_file(path, "IDX file") for path in (self.spec.images, self.spec.labels)]
        return {**self.spec.model_dump(mode="json"), "files": _stats(files)}

    def open(self) -> Source:
        images, labels = _IdxFile(self.spec.images), _IdxFile(self.spec.labels)
        if images.dtype != np.uint8 or len(images.shape) < 2:
            raise images.refused(
                "inputs are uint8 of two dimensions or more", f"{images.dtype.name} {list(images.shape)}"
            )
        if len(labels.shape) != 1:
            raise labels.refused("labels have one dimension", list(labels.shape))
        if images.shape[0] != labels.shape[0]:
            raise RefusedError(
                f"{images.path} and {labels.path} do not belong together",
                got=f"{images.shape[0]:,} inputs and {labels.shape[0]:,} labels",
                expected="as many labels as inputs",
                next="correct `images` and `labels` in the recipe",
            )
        shape = images.shape[1:] if len(images.shape) != 3 else (1, *images.shape[1:])

        def blocks(most: int) -> Iterator[Block]:
            for inputs, block in zip(images.blocks(most), labels_alone(most), strict=True):
                yield Block(block.start, [inputs.reshape(len(block), *shape)], block.labels)

        def labels_alone(most: int) -> Iterator[Block]:
            start = 0
            for ids in labels.blocks(most):
                yield Block(start, [], pa.array(ids.astype(ids.dtype.newbyteorder("="))))
                start += len(ids)

        rows, name = images.shape[0], f"{images.path} and {labels.path.name}"
        return Source(
            name,
            rows,
            [Stream(0, blocks)],
            _row_of(name),
            label_streams=[Stream(0, labels_alone)],
            classes=self.spec.classes,
        )


class _IdxFile:
    """The header of an IDX file, plain or gzip-compressed, checked against the size of the file."""

    def __init__(self, path: str) -> None:
        self.path = _existing_file(path, "IDX file")
        with self._reading() as file:
            zeros, code, dimensions = struct.unpack(">HBB", self._exactly(file, 4))
            if zeros or code not in _IDX_TYPES or not 0 < dimensions <= _IDX_DIMENSIONS:
                raise self.refused(
                    "an IDX file: two zero bytes, a type and a number of dimensions", "another beginning"
                )
            self.shape = struct.unpack(f">{dimensions}I", self._exactly(file, 4 * dimensions))
        self.dtype = np.dtype(_IDX_TYPES[code])
        self._header = 4 + 4 * dimensions
        self._check_size()

    def blocks(self, most: int) -> Iterator[np.ndarray]:
        """Its values, so many at a time."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._reading() as file:
            self._exactly(file, self._header)
            for start in range(0, self.shape[0], most):
                rows = min(most, self.shape[0] - start)
                values = np.frombuffer(self._exactly(file, rows * size), dtype=self.dtype)
                yield values.reshape(rows, *self.shape[1:])
            if self._exactly(file, 1, at_least=0):  # also lets gzip check its sum
                raise self.refused(f"no more than {list(self.shape)} values, as its header says", "more bytes")

    def refused(self, expected: object, got: object) -> RefusedError:
        """This file is not what it should be."""
        return RefusedError(
            f"{self.path} cannot be used", got=got, expected=expected, next="check that it is the right file, and whole"
        )

    def _check_size(self) -> None:
        """A header may claim anything: nothing is allocated by it that the file could not hold."""
        claimed = self._header + math.prod(self.shape) * self.dtype.itemsize
        size = self.path.stat().st_size
        if claimed > size * _MOST_GZIP_SAVES if self._compressed else claimed != size:
            raise self.refused(f"{claimed:,} bytes, as its header says: {list(self.shape)}", f"{size:,} bytes")

    @functools.cached_property
    def _compressed(self) -> bool:
        with open(self.path, "rb") as file:
            return file.read(2) == b"\x1f\x8b"

    def _reading(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self._compressed else open(self.path, "rb")

    def _exactly(self, file: BinaryIO, size: int, at_least: int | None = None) -> bytes:
        try:
            data = file.read(size)
        except (EOFError, OSError, zlib.error) as error:  # cut, or damaged
            raise self.refused("a file that reads to its end", error) from error
        if len(data) < (size if at_least is None else at_least):
            raise self.refused("a file that reads to its end", f"{size - len(data):,} bytes are missing")
        return data


def _existing_file(path: str, what: str) -> Path:
    place = Path(path)
    if not place.is_file():
        raise nothing_at(place, what, f"a{'n' * (what[0] in 'AEIOU')} {what}")
    return place


# ---- Parquet


class _Parquet:
    """One or more Parquet files, in the order of their names; rows are numbered through all of them."""

    def __init__(self, spec: recipe.Parquet) -> None:
        self.spec = spec
        self.found = find_parquet(spec.path)
        self.files = self.found.files

    def key(self) -> dict[str, Any]:
        return {**self.spec.model_dump(mode="json"), "files": _stats(self.files)}

    def open(self) -> Source:
        streams: list[Stream] = []
        label_streams: list[Stream] = []
        starts, schema = [0], None
        for file in self.files:
            with _opened(file) as parquet:
                whole = _with_path_columns(parquet.schema_arrow, self.found.columns)
                self._check_above(whole)
                check_schema(whole, self.spec, str(file), schema)
                schema = schema or whole
                at = starts[-1]
                for number in range(parquet.num_row_groups):
                    group = parquet.metadata.row_group(number)
                    for into, spec in ((streams, self.spec), (label_streams, _labels_alone(self.spec))):
                        blocks = functools.partial(self._blocks, spec, file, number, at)
                        into.append(Stream(at, blocks, open_bytes=sum(_sizes(group, _columns_of(spec)))))
                    at += group.num_rows
                starts.append(at)

        def where(row: int) -> str:
            file = int(np.searchsorted(starts, row, side="right")) - 1
            inside = f" ({self.files[file].name}, row {row - starts[file]})" if len(self.files) > 1 else ""
            return f"row {row} of {self.spec.path}{inside}"

        return _table(self.spec, self.spec.path, starts[-1], (streams, label_streams), where, schema, self._notes())

    def _blocks(self, spec: recipe.Table, file: Path, group: int, start: int, most: int) -> Iterator[Block]:
        columns = _columns_of(spec)
        with _opened(file) as parquet:
            # Long texts and large images do not add up.
            metadata = parquet.metadata.row_group(group)
            fitting = _BLOCK_BYTES * metadata.num_rows // max(_sizes(metadata, columns)[0], 1)
            most = max(1, min(most, fitting))
            stored = [name for name in columns if name in parquet.schema_arrow.names]
            batches = parquet.iter_batches(most, row_groups=[group], columns=stored)
            while (batch := _next_batch(file, batches)) is not None:
                yield Block(start, *_columns(spec, self._with_path(file, batch, columns)))
                start += len(batch)

    def _with_path(self, file: Path, batch: Any, columns: Sequence[str]) -> Any:
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
        parts = Path(self.spec.path).parts
        for name in _columns_of(self.spec):
            at = next((number for number, part in enumerate(parts) if part.startswith(f"{name}=")), None)
            if name not in schema.names and at is not None:
                raise RefusedError(
                    f"the column {name} stands in the path above what is read",
                    got=f"{parts[at]} in {self.spec.path}",
                    expected=f"a folder that holds folders {name}=...",
                    next=f"set `path` to {Path(*parts[:at])}",
                )

    def _notes(self) -> tuple[str, ...]:
        others = self.found.left_out
        if not others:
            return ()
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        return (f"left out of {self.spec.path}, as they hold no Parquet: {shown}",)


def _with_path_columns(schema: Any, columns: Any) -> Any:
    """The schema of a file with the columns that stand in its path, if it does not have them itself."""
    for column in columns:
        if column.name not in schema.names:
            schema = schema.append(column)
    return schema


def _check_agrees(file: Path, name: str, value: Any, column: Any) -> None:
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


def _sizes(group: Any, names: Sequence[str]) -> tuple[int, int]:
    """Bytes of columns in a row group, uncompressed and as stored. A page may be all of it."""
    columns = [group.column(number) for number in range(group.num_columns)]
    ours = [one for one in columns if one.path_in_schema.partition(".")[0] in names]
    return sum(one.total_uncompressed_size for one in ours), sum(one.total_compressed_size for one in ours)


def _columns_of(spec: recipe.Table) -> list[str]:
    return list(dict.fromkeys([*input_columns(spec), *label_columns(spec)]))


def _columns(spec: recipe.Table, table: Any) -> tuple[list[Any], Any]:
    labels = [table.column(name) for name in label_columns(spec)] or [pa.nulls(len(table))]
    return [table.column(name) for name in input_columns(spec)], labels[0]


def _combined(spec: recipe.Table, table: Any) -> tuple[list[Any], Any]:
    """The same of a table of chunks: each column as one array."""
    inputs, labels = _columns(spec, table)
    return [one.combine_chunks() for one in inputs], labels.combine_chunks()


def _labels_alone(spec: recipe.Table) -> recipe.Table:
    """The same table without its inputs."""
    return spec.model_copy(update={"input": []})


def _table(
    spec: recipe.Table, name: str, rows: int, streams: tuple[Sequence[Stream], Sequence[Stream]],
    where: Callable[[int], str], schema: Any, notes: tuple[str, ...] = (),
) -> Source:  # fmt: skip
    """A source of a table: `streams` are those of its rows, and those of its labels alone."""
    return Source(
        name,
        rows,
        streams[0],
        where,
        label_streams=streams[1],
        notes=notes,
        inputs=input_columns(spec),
        label=label_columns(spec),
        class_names=class_label_names(schema, spec.label),
        classes=spec.classes,
    )


def column_names(path: str) -> list[str]:
    """The columns of the first Parquet file that a path, a folder or a glob names, those in its path included.

    Raises:
        RefusedError: there is no such file, or it is no Parquet file.
    """
    found = find_parquet(path)
    with _opened(found.files[0]) as parquet:
        names: list[str] = _with_path_columns(parquet.schema_arrow, found.columns).names
    return names


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} cannot be read as Parquet",
            got=str(error).partition("\n")[0],
            expected="a Parquet file",
            next="check that it was copied whole",
        ) from error


def _next_batch(file: Path, batches: Iterator[Any]) -> Any:
    """The next batch of a file, None at its end; a damaged page is a refusal that names the file."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} is damaged", got=str(error).partition("\n")[0], expected="a Parquet file that reads to its end"
        ) from error


# ---- Hugging Face datasets


class _HuggingFace:
    """A dataset of the `datasets` library: its Arrow table, so that nothing is decoded but by us."""

    def __init__(self, spec: recipe.HuggingFaceData) -> None:
        self.spec = spec
        self.name = str(spec.path or spec.name) + (f" [{spec.split}]" if spec.split else "")

    def key(self) -> dict[str, Any]:
        """By name, the name alone: the hub is not asked again once the rows are prepared."""
        files = [] if self.spec.path is None else sorted(one for one in self._folder().rglob("*") if one.is_file())
        return {**self.spec.model_dump(mode="json"), "files": _stats(files)}

    def open(self) -> Source:
        dataset = self._from_folder() if self.spec.path is not None else self._from_hub()
        schema = dataset.features.arrow_schema
        check_schema(schema, self.spec, self.name)
        rows: int = len(dataset)

        def streams(spec: recipe.Table) -> list[Stream]:
            chosen = dataset.select_columns(_columns_of(spec)).with_format("arrow")

            def read(start: int, stop: int) -> tuple[list[Any], Any]:
                try:
                    table = chosen[start:stop]
                except (pa.ArrowException, OSError) as error:
                    raise self._refused(error) from error
                return _combined(spec, table)

            return _slices(rows, read, _STREAM_ROWS)

        both = streams(self.spec), streams(_labels_alone(self.spec))
        return _table(self.spec, self.name, rows, both, _row_of(self.name), schema)

    def _folder(self) -> Path:
        folder = Path(self.spec.path or "")
        if not folder.is_dir():
            raise nothing_at(folder, "dataset", "a folder that save_to_disk wrote")
        return folder

    def _from_folder(self) -> Any:
        datasets = hub.extra("datasets")
        folder = self._folder()
        try:
            found = datasets.load_from_disk(str(folder))
        except IndexError as error:  # what the library says of a dataset without rows
            raise _no_rows(self.name) from error
        except Exception as error:  # of many kinds: whatever a damaged folder leads to
            raise self._refused(error) from error
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
        if self.spec.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if self.spec.split not in splits:
            raise RefusedError(
                f"{folder} holds several splits" if self.spec.split is None else f"{folder} has no such split",
                got=self.spec.split or "no `split` in the recipe",
                expected=f"one of {', '.join(splits)}",
                next="correct `split` in the recipe",
            )
        return splits[self.spec.split]

    def _from_hub(self) -> Any:
        datasets = hub.extra("datasets")
        name = str(self.spec.name)
        hub.reach("dataset", name)
        try:
            return datasets.load_dataset(name, self.spec.config, split=self.spec.split)
        except ConnectionError as error:
            raise hub.unreachable("dataset", name, error) from error
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> RefusedError:
        return RefusedError(
            f"{self.name} cannot be read as a Hugging Face dataset",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            expected="a folder that save_to_disk wrote, or a dataset with such a configuration and split",
            next="check that it was copied whole, and `config` and `split` in the recipe",
        )


# ---- the user's own


class _Custom:
    """What a function of the user's own returns: an Arrow table, or a map-style dataset of (input, label)."""

    SIGNATURE = "(...) -> pyarrow.Table or torch.utils.data.Dataset"

    def __init__(self, spec: recipe.CustomData) -> None:
        self.spec = spec

    def key(self) -> dict[str, Any]:
        """The module's own file stands for its code, and what its arguments name for what it reads.

        What else it imports or reads is not looked at.
        """
        file = source_of(self.spec, self.SIGNATURE)
        files, folders = named(placed(self.spec.arguments, self.spec.trusted.place))
        key = {**self.spec.model_dump(mode="json"), "files": _stats([*([file] if file else []), *files])}
        return key | ({"folders": [listing(folder) for folder in folders]} if folders else {})

    def open(self) -> Source:
        made = call_factory(self.spec, self.SIGNATURE, self.spec.arguments)
        if hasattr(made, "__arrow_c_stream__"):
            return self._of_table(self._read(made))
        if hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            items = _Items(made, self.spec)
            streams = [Stream(0, items.blocks)]
            return Source(items.name, items.rows, streams, items.where, classes=self.spec.classes, sample=items.sample)
        raise RefusedError(
            f"the factory {self.spec.factory} returned something else than data",
            got=type(made).__name__,
            expected="a pyarrow.Table, or a map-style torch.utils.data.Dataset",
        )

    def _read(self, made: Any) -> Any:
        """A stream of the user's own may still fail."""
        try:
            return made if isinstance(made, pa.Table) else pa.table(made)
        except Exception as error:
            raise RefusedError(
                f"what the factory {self.spec.factory} returned cannot be read", got=whole(error), expected="Arrow data"
            ) from error

    def _of_table(self, table: Any) -> Source:
        name = f"the table of {self.spec.factory}"
        check_schema(table.schema, self.spec, name)

        def streams(spec: recipe.Table) -> list[Stream]:
            return _slices(
                len(table), lambda start, stop: _combined(spec, table.slice(start, stop - start)), _STREAM_ROWS
            )

        def sample() -> str:
            rows = [table.select(_columns_of(self.spec)).slice(row, 1).to_pylist() for row in _few(len(table))]
            return sha256(repr(rows).encode())

        both = streams(self.spec), streams(_labels_alone(self.spec))
        source = _table(self.spec, name, len(table), both, _row_of(name), table.schema)
        return dataclasses.replace(source, sample=sample)


class _Items:
    """A map-style dataset. One thread at a time asks it for items, as it may not expect more."""

    def __init__(self, items: Any, spec: recipe.CustomData) -> None:
        self.items = items
        self.name = f"the dataset of {spec.factory}"
        self.where = _row_of(self.name)
        self.rows = self._ask(len, "when asked how many rows it has")
        self.types: list[type] | None = None  # of the first item

    def blocks(self, most: int) -> Iterator[Block]:
        """All items."""
        for start in range(0, self.rows, most):
            items: list[tuple[list[Any], Any]] = []
            failed = None
            for row in range(start, min(start + most, self.rows)):
                try:
                    items.append(self._item(row))
                except RefusedError as error:  # told after the rows before it, which may be wrong in another way
                    failed = error
                    break
            if items:
                yield _block_of_items(start, items)
            if failed is not None:
                raise failed

    def sample(self) -> str:
        """A hash of a few items."""
        hashed = hashlib.sha256()
        for row in _few(self.rows):
            inputs, label = self._item(row)
            for value in inputs:
                if isinstance(value, Image.Image):  # with its palette, and turned
                    value = np.asarray(pictures.shown(value, recipe.Image().background))
                plain = isinstance(value, str)
                hashed.update(repr(value if plain else (value.dtype.str, value.shape)).encode())
                hashed.update(b"" if plain else value.tobytes())
            hashed.update(repr(label).encode())
        return hashed.hexdigest()

    def _item(self, row: int) -> tuple[list[Any], Any]:
        """An item as one array, one image, one string or two, and a label: int, float, bool or str."""
        item = self._ask(lambda items: items[row], f"at row {row}")
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise self._useless("item", row, type(item).__name__, "a pair (input, label)")
        pair = isinstance(item[0], tuple | list) and len(item[0]) == 2 and all(isinstance(one, str) for one in item[0])
        inputs = [self._input(one, row) for one in (item[0] if pair else [item[0]])]
        label = item[1].item() if hasattr(item[1], "item") and getattr(item[1], "ndim", 0) == 0 else item[1]
        label = self._input(label, row) if isinstance(label, str) else label
        if type(label) not in (int, float, bool, str) or (type(label) is int and abs(label) >= 2**63):
            raise self._useless("label", row, type(label).__name__, "a class id, a class name or a number")
        types = [Image.Image if isinstance(one, Image.Image) else type(one) for one in (*inputs, label)]
        self.types = self.types or types
        if types != self.types:
            names = [[one.__name__ for one in several] for several in (types, self.types)]
            raise self._useless("item", row, names[0], f"{names[1]}, as the first item has")
        return inputs, label

    def _input(self, value: Any, row: int) -> Any:
        if isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise self._useless("text", row, "half a surrogate pair", "text that UTF-8 can hold")
            return value
        if hasattr(value, "detach"):  # a tensor, known without importing torch
            value = self._array(value, row)
        if isinstance(value, Image.Image):
            return self._decoded(value, row)
        if isinstance(value, np.generic | int | float):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif":
            got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise self._useless("input", row, got, "a tensor or array of numbers, a PIL image, or text")
        return value

    def _decoded(self, image: Image.Image, row: int) -> Image.Image:
        """Loaded here: the dataset may give the same image again, and threads must not load it at once."""
        try:
            pictures.check(image)
            pictures.decode(image)
        except Exception as error:  # of many kinds: it may not have been read yet
            raise self._useless("input", row, error, "an image of 8 bits a channel, or an array") from error
        return image

    def _array(self, tensor: Any, row: int) -> np.ndarray:
        """A tensor's numbers, float32 where they are floats: NumPy has no bfloat16."""
        try:
            plain = tensor.detach().cpu()
            array: np.ndarray = (plain.float() if plain.is_floating_point() else plain).numpy()
        except (TypeError, RuntimeError) as error:  # sparse ones, quantised ones
            raise self._useless("input", row, error, "a dense tensor of numbers") from error
        return array

    def _ask(self, question: Callable[[Any], Any], when: str) -> Any:
        try:
            return question(self.items)
        except Exception as error:
            raise RefusedError(
                f"{self.name} fails {when}", got=whole(error), expected="an answer", next="mend the dataset's code"
            ) from error

    def _useless(self, what: str, row: int, got: object, expected: str) -> RefusedError:
        return RefusedError(
            f"nothing can be made of the {what} in {self.where(row)}",
            got=got,
            expected=expected,
            next="let the dataset return pairs (input, label), all of the same types",
        )


def _few(rows: int) -> list[int]:
    """Which rows of a source are a sample: the first, the last and some between."""
    return [int(row) for row in np.unique(np.linspace(0, rows - 1, _SAMPLE_ROWS).astype(np.int64))]


def _block_of_items(start: int, items: list[tuple[list[Any], Any]]) -> Block:
    columns = [list(column) for column in zip(*(inputs for inputs, _ in items), strict=True)]
    inputs = [pa.array(column, pa.large_string()) if isinstance(column[0], str) else column for column in columns]
    return Block(start, inputs, pa.array([label for _, label in items]))
