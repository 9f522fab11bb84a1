"""Rows: a dataset as numbered rows. The row number joins inputs and logits, so nothing can slip by one.

`prepare` turns the sources of a recipe into memory-mapped arrays, once per node, under a lock; every process there
shares them. The fingerprint of a split is over content and order, not over files.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from akd_dist import recipe
from akd_dist.storage.errors import MachineError, RefusedError
from akd_dist.storage.files import PARTIAL_SUFFIX, canonical_json, file_lock, replace, sha256
from akd_dist.storage.node_cache import IN_USE, hold, make_room
from akd_dist.text import Tokens

BLOCK_ROWS = 4096
"""Rows of one block of the fingerprint."""
SPLITS = ("train", "validation", "test")
_FORMAT = 1  # of the prepared folder; part of its key
_READ_ROWS = 1024  # rows decoded at a time
_BUFFER_BYTES = 1 << 22  # read ahead in a column; pre_buffer would hold whole row groups
# Decoders without an interpreter inside (Pillow hands EPS to Ghostscript).
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Progress = Callable[[str, int, int], None]
"""Called with (what is being read, rows done, rows in all)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbered rows of a split, memory-mapped and read-only."""

    inputs: np.ndarray
    """uint8, float32 or int32 [rows, *shape]: images [channels, height, width], numbers, or ids of tokens [length]."""
    labels: np.ndarray
    """int64 [rows], each in 0..classes - 1; float32 [rows] for regression."""
    classes: int
    """Number of logits a row has: the classes; 1 for regression."""
    fingerprint: str
    """sha256 over dtype, shape, classes and the digests of all blocks."""
    blocks: tuple[str, ...]
    """sha256 of each BLOCK_ROWS rows: bytes of the inputs, then of the labels."""
    folder: Path
    """Where the arrays lie."""
    task: recipe.Task = "classification"
    """What a label is."""
    class_names: tuple[str, ...] | None = None
    """The names of classes 0, 1, ..., where the data has names."""
    tokens: Tokens | None = None
    """What ids mean, where inputs are text."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.inputs.shape[1:]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of rows start..stop - 1, without a copy."""
        return self.inputs[start:stop], self.labels[start:stop]

    def describe(self) -> dict[str, Any]:
        """What a store remembers of its dataset, enough to name the first block that differs."""
        return {
            "fingerprint": self.fingerprint,
            "rows": len(self),
            "block_rows": BLOCK_ROWS,
            "blocks": list(self.blocks),
        }

    def check_same(self, described: dict[str, Any]) -> None:
        """Refuse if these are not the very rows that `describe` once told of.

        Raises:
            RefusedError: names the first block that differs.
        """
        if described["fingerprint"] == self.fingerprint:
            return
        raise RefusedError(
            "the dataset is not the one the store was made from",
            got=f"fingerprint {self.fingerprint[:16]}, {len(self):,} rows; "
            f"{first_difference(self.describe(), described)}",
            expected=f"fingerprint {described['fingerprint'][:16]}, {described['rows']:,} rows",
            next="bring back the data, its order and its split, or cache the teacher anew",
        )


def blocks_in_common(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """How many blocks two descriptions (`Rows.describe`) share before the first that differs."""
    pairs = itertools.zip_longest(ours["blocks"], theirs["blocks"])
    return next((number for number, (one, other) in enumerate(pairs) if one != other), len(ours["blocks"]))


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Where two datasets that are not the same begin to differ, from their descriptions (`Rows.describe`)."""
    common = blocks_in_common(ours, theirs)
    if common == len(ours["blocks"]) == len(theirs["blocks"]):
        changed = "; ".join(recipe.differences(theirs.get("meaning", {}), ours.get("meaning", {})))
        return f"the rows are the same, but not what they mean{changed and ': '}{changed}"
    return f"rows {common * BLOCK_ROWS:,} to {(common + 1) * BLOCK_ROWS:,} are the first that differ"


@dataclass(frozen=True, eq=False)
class Splits:
    """The three disjoint parts of a recipe's data."""

    train: Rows
    """What teachers and students learn from; the only rows that are augmented."""
    validation: Rows
    """What picks the best epoch."""
    test: Rows
    """What is reported, once."""


def prepare(
    data: recipe.Data, cache_root: Path, *, budget: int | None = None, on_progress: Progress | None = None
) -> Splits:
    """The splits of a recipe's data as memory-mapped arrays, prepared on this node if they are not yet.

    A fraction is cut from the train source by an order seeded with `data.seed`; within a split rows keep the order of
    their source. Memory stays bounded: some thousand rows at a time, and about 40 bytes for each row of the source.

    Args:
        data: sources, split and seed.
        cache_root: prepared data lies in `<cache_root>/rows/<key>/`; the key is over sources, sizes and times of files,
            and the split.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being read, rows done, and rows in all.

    Raises:
        RefusedError: a file or column is missing, a label out of range, an image not decodable; names row and column.
        MachineError: no room under `cache_root`, or it cannot be written.
    """
    tell = on_progress or (lambda what, done, total: None)
    sources = _sources(data)
    key = sha256(canonical_json(_key(data, sources)))[:32]
    folder = cache_root / "rows" / key
    with file_lock(folder.with_suffix(".lock"), what=f"the prepared data {folder}"):
        splits = _open(folder)
        if splits is None:
            _write(folder, data, sources, cache_root, budget, tell)
            splits = _open(folder)
    if splits is None:
        raise MachineError(
            f"the prepared data {folder} cannot be read back", expected="the files just written", next="check the disk"
        )
    return splits


def fingerprint(inputs: np.ndarray, labels: np.ndarray, classes: int) -> tuple[str, tuple[str, ...]]:
    """The fingerprint of rows and the digests of their blocks: changes with any bit, any label, any swap."""
    blocks = []
    for start in range(0, len(labels), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        blocks.append(sha256(inputs[start:stop].tobytes() + labels[start:stop].tobytes()))
    header = {
        "dtype": inputs.dtype.str,
        "shape": list(inputs.shape[1:]),
        "rows": len(labels),
        "classes": classes,
        "block_rows": BLOCK_ROWS,
    }
    return sha256(canonical_json({**header, "blocks": blocks})), tuple(blocks)


# ---- splitting


def split_of_rows(rows: int, validation: float, test: float, seed: int) -> np.ndarray:
    """Which split each row belongs to: uint8 [rows], an index into SPLITS.

    A function of its arguments alone: raw Philox words are the same in every version of NumPy.
    """
    order = np.argsort(np.random.Philox(key=[seed, 0]).random_raw(rows), kind="stable")
    for_test, for_validation = round(rows * test), round(rows * validation)
    split = np.zeros(rows, dtype=np.uint8)
    split[order[:for_test]] = SPLITS.index("test")
    split[order[for_test : for_test + for_validation]] = SPLITS.index("validation")
    return split


def _key(data: recipe.Data, sources: dict[str, Source]) -> dict[str, Any]:
    fractions = {name: getattr(data, name) for name in SPLITS if name not in sources}
    return {
        "format": _FORMAT,
        "sources": {name: source.key() for name, source in sources.items()},
        "fractions": fractions,
        "seed": data.seed if fractions else None,
    }


def _write(
    folder: Path, data: recipe.Data, sources: dict[str, Source], cache_root: Path, budget: int | None, tell: Progress
) -> None:
    """Prepare all splits in a folder beside `folder`, then give it its name: it appears whole or not at all."""
    labels = {name: source.labels(tell) for name, source in sources.items()}
    classes = _classes(sources["train"], labels["train"])
    splits = {name: _split_of_source(name, data, len(labels[name]), sources) for name in sources}
    first = {name: next(source.inputs()) for name, source in sources.items()}
    for name, source in sources.items():
        _check_labels(source, labels[name], classes)
        _check_alike(name, first[name], first["train"])
    needed = sum(map(len, labels.values())) * (first["train"][0].nbytes + 8)
    make_room(cache_root, needed, budget)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        # Left by killed processes: the lock is ours.
        _remove(folder, *folder.parent.glob(f"{folder.name}.*{PARTIAL_SUFFIX}"))
        partial.mkdir(parents=True)
        for name, source in sources.items():
            _write_source(partial, source, labels[name], splits[name], first[name][0], tell)
        _write_index(partial, classes)
        (partial / IN_USE).touch()
        partial.rename(folder)
    except OSError as error:
        raise MachineError(
            f"cannot prepare the data in {folder}",
            got=error.strerror or str(error),
            expected=f"{needed:,} bytes free in a folder that this user can write to",
            next="free some space, or choose another folder with --cache-root",
        ) from error
    finally:
        _remove(partial)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _split_of_source(name: str, data: recipe.Data, rows: int, sources: dict[str, Source]) -> np.ndarray:
    """Which split each row of a source belongs to, uint8 [rows]: all to its own, but shares of the train source."""
    if name != "train":
        return np.full(rows, SPLITS.index(name), dtype=np.uint8)
    shares = {other: 0.0 if other in sources else float(getattr(data, other)) for other in ("validation", "test")}
    split = split_of_rows(rows, seed=data.seed, **shares)
    needed = {"train", *(other for other, share in shares.items() if share)}
    empty = [other for other in SPLITS if other in needed and not (split == SPLITS.index(other)).any()]
    if empty:
        raise RefusedError(
            f"no rows are left for {' and '.join(empty)}",
            got=f"{rows:,} rows in {sources['train'].name}, with the shares {shares}",
            expected="at least one row in each split",
            next="change data.validation and data.test, or add rows",
        )
    return split


def _write_source(
    folder: Path, source: Source, labels: np.ndarray, split: np.ndarray, like: np.ndarray, tell: Progress
) -> None:
    """Append each row of a source to the arrays of its split."""
    with contextlib.ExitStack() as files:
        outputs: dict[int, BinaryIO] = {}
        for index in np.unique(split).tolist():
            inputs_file, labels_file = _files(folder, SPLITS[index])
            np.save(labels_file, labels[split == index])
            outputs[index] = files.enter_context(open(inputs_file, "wb"))
            _write_header(outputs[index], (int((split == index).sum()), *like.shape), like.dtype)
        start = 0
        for block in source.inputs():
            here = split[start : start + len(block)]
            for index, output in outputs.items():
                output.write(block[here == index].tobytes())
            start += len(block)
            tell(source.name, start, len(labels))
        for output in outputs.values():
            output.flush()
            os.fsync(output.fileno())


def _write_header(output: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(output, header)


def _write_index(folder: Path, classes: int) -> None:
    index: dict[str, Any] = {"classes": classes}
    for name in SPLITS:
        digest, blocks = fingerprint(*_arrays(folder, name), classes)
        index[name] = {"fingerprint": digest, "blocks": blocks, "files": _stats(folder, name)}
    replace(folder / "index.json", json.dumps(index, indent=1).encode())


def _open(folder: Path) -> Splits | None:
    """The prepared splits; None where there are none, or not whole ones."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        splits = [_rows(folder, name, index) for name in SPLITS]
    except (OSError, ValueError, KeyError):
        return None
    return Splits(*splits)


def _rows(folder: Path, name: str, index: dict[str, Any]) -> Rows:
    split = index[name]
    if _stats(folder, name) != split["files"]:
        raise ValueError(f"{folder}: the arrays of {name} are not the files that were fingerprinted")
    return Rows(*_arrays(folder, name), index["classes"], split["fingerprint"], tuple(split["blocks"]), folder)


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}-inputs.npy", folder / f"{name}-labels.npy"


def _stats(folder: Path, name: str) -> list[list[int]]:
    """Size and time of a split's files: one that was touched since it was fingerprinted is not trusted."""
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in _files(folder, name)]


def _arrays(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a split, memory-mapped."""
    inputs, labels = _files(folder, name)
    return _mapped(inputs), _mapped(labels)


def _mapped(file: Path) -> np.ndarray:
    """A read-only map that keeps its folder from being evicted; a plain array, as indexing np.memmap costs more."""
    with hold(file.parent) as keep:
        mapped = np.load(file, mmap_mode="r")
        keep.until_unmapped(mapped)
    return np.asarray(mapped)


# ---- checks


def _classes(source: Source, labels: np.ndarray) -> int:
    """How many classes the train source has: as it says, or the largest label plus one."""
    if source.classes is not None:
        return source.classes
    row = int(labels.argmax())
    if labels[row] >= max(len(labels), 2):
        raise RefusedError(
            f"label out of range in {source.where(row)}",
            got=f"{labels[row]}, which makes {labels[row] + 1:,} classes for {len(labels):,} rows",
            expected="labels 0 to classes - 1",
            next="correct the labels, or set `classes` of data.train if there really are so many",
        )
    return max(int(labels[row]) + 1, 1)


def _check_labels(source: Source, labels: np.ndarray, classes: int) -> None:
    if source.classes not in (None, classes):
        raise RefusedError(
            f"{source.name} has another number of classes than data.train", got=source.classes, expected=classes
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        more = f", and {len(wrong) - 1:,} more rows" if len(wrong) > 1 else ""
        raise RefusedError(
            f"label out of range in {source.where(int(wrong[0]))}",
            got=f"{labels[wrong[0]]}{more}",
            expected=f"0 to {classes - 1}, as the data has {classes} classes",
            next="correct the labels, or set `classes` of data.train",
        )


def _check_alike(name: str, inputs: np.ndarray, train: np.ndarray) -> None:
    got, expected = (f"{block.dtype} {list(block.shape[1:])}" for block in (inputs, train))
    if got != expected:
        raise RefusedError(f"the inputs of data.{name} are not like those of data.train", got=got, expected=expected)


# ---- sources


class Source(Protocol):
    """Where rows come from, in an order that never changes."""

    name: str
    """For messages."""
    classes: int | None
    """How many classes there are, if it is known beforehand."""

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed; cheap."""

    def labels(self, tell: Progress) -> np.ndarray:
        """All labels, int64 [rows]."""

    def inputs(self) -> Iterator[np.ndarray]:
        """All inputs in blocks of at least one row: uint8 or float32 [n, *shape]."""

    def where(self, row: int) -> str:
        """A row's place, for messages."""


def _sources(data: recipe.Data) -> dict[str, Source]:
    """The sources of a recipe's data by split; a split that is a fraction has none of its own."""
    specs = {name: getattr(data, name) for name in SPLITS}
    return {name: _source(spec) for name, spec in specs.items() if not isinstance(spec, float)}


def _source(spec: recipe.Source) -> Source:
    match spec:
        case recipe.Digits():
            return _Digits()
        case recipe.Parquet():
            return _Parquet(spec)
        case _:
            raise NotImplementedError(spec.kind)


class _Digits:
    """scikit-learn's 1,797 handwritten digits, the built-in example: uint8 [1, 8, 8], ten classes."""

    name = "the digits of scikit-learn"
    classes: int | None = 10

    def key(self) -> dict[str, Any]:
        return {"kind": "digits", "scikit-learn": version("scikit-learn")}

    def labels(self, tell: Progress) -> np.ndarray:
        return self._load()[1].astype(np.int64)

    def inputs(self) -> Iterator[np.ndarray]:
        # Their grey levels are 0 to 16.
        yield np.rint(self._load()[0] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)

    def where(self, row: int) -> str:
        return f"row {row} of {self.name}"

    @staticmethod
    def _load() -> tuple[np.ndarray, np.ndarray]:
        # Here, because it takes a second.
        from sklearn.datasets import load_digits

        inputs, labels = load_digits(return_X_y=True)
        return inputs, labels


class _Parquet:
    """One or more Parquet files: a column of encoded images or of number lists, and a column of integer labels.

    Files are taken in the order of their names; rows are numbered through all of them.

    Raises:
        RefusedError: no such file, not Parquet, a column missing or of an unusable type, no rows.
    """

    def __init__(self, spec: recipe.Parquet) -> None:
        self.spec, self.name, self.classes = spec, spec.path, spec.classes
        self.files = _find_files(spec.path)
        self.starts = [0]
        for file in self.files:
            self.starts.append(self.starts[-1] + self._check_file(file))
        if self.starts[-1] == 0:
            raise RefusedError(f"{spec.path} has no rows", got="0 rows", expected="at least one")

    def key(self) -> dict[str, Any]:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return {**self.spec.model_dump(mode="json"), "files": stats}

    def labels(self, tell: Progress) -> np.ndarray:
        blocks, done = [], 0
        for start, column in self._column(self.spec.label):
            blocks.append(self._labels_of(column, start))
            done += len(column)
            tell(f"the labels of {self.name}", done, self.starts[-1])
        return np.concatenate(blocks)

    def inputs(self) -> Iterator[np.ndarray]:
        shape: tuple[int, ...] | None = None
        for start, column in self._column(self.spec.input):
            self._refuse_nulls(column, start, self.spec.input)
            read = self._images if _holds_images(column.type) else self._lists
            block = read(column, start, tuple(self.spec.shape) if self.spec.shape else shape)
            shape = block.shape[1:]
            yield block

    def where(self, row: int) -> str:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row} of {self.name}" + (
            f" ({self.files[file].name}, row {row - self.starts[file]})" if len(self.files) > 1 else ""
        )

    def _check_file(self, file: Path) -> int:
        """Rows of a file, its columns checked."""
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            for key in ("input", "label"):
                _check_column(file, schema, key, getattr(self.spec, key))
            return int(parquet.metadata.num_rows)

    def _column(self, name: str) -> Iterator[tuple[int, Any]]:
        """(number of its first row, values) of a column, a block at a time."""
        row = 0
        for file in self.files:
            with _opened(file) as parquet:
                for batch in _unspoilt(file, parquet.iter_batches(_READ_ROWS, columns=[name])):
                    yield row, batch.column(0)
                    row += len(batch)

    def _labels_of(self, column: Any, start: int) -> np.ndarray:
        self._refuse_nulls(column, start, self.spec.label)
        try:
            labels: np.ndarray = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:  # uint64 beyond int64
            raise RefusedError(
                f"label out of range among {self.where(start)} and the {len(column)} rows from there",
                got=error,
                expected="labels 0 to classes - 1",
            ) from error
        return labels

    def _refuse_nulls(self, column: Any, start: int, name: str) -> None:
        if column.null_count:
            row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise RefusedError(
                f"no value in column {name}, {self.where(row)}",
                got="null",
                expected="a value in every row",
                next="remove the row, or fill it in",
            )

    def _images(self, column: Any, start: int, shape: tuple[int, ...] | None) -> np.ndarray:
        """Decode encoded images: uint8 [n, channels, height, width], as the first one is if no shape is given."""
        data = column.field("bytes") if pa.types.is_struct(column.type) else column
        self._refuse_nulls(data, start, self.spec.input)
        images = []
        for offset, encoded in enumerate(data):
            image = self._image(encoded.as_py(), start + offset, shape)
            shape = shape or image.shape
            if image.shape != shape:
                raise self._mixed(start + offset, image.shape, shape)
            images.append(image)
        return np.stack(images)

    def _image(self, encoded: bytes, row: int, shape: tuple[int, ...] | None) -> np.ndarray:
        """One image as uint8 [channels, height, width]; grey if the first one was, else RGB."""
        try:
            with Image.open(io.BytesIO(encoded), formats=_IMAGE_FORMATS) as image:
                grey = image.mode in ("1", "L")
                wanted = grey if shape is None else len(shape) == 3 and shape[0] == 1
                if wanted and not grey:
                    raise self._mixed(row, (len(image.getbands()), image.height, image.width), shape or ())
                if image.mode[0] in "IF":
                    raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
                pixels = np.asarray(image.convert("L" if wanted else "RGB"))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise RefusedError(
                f"the image in {self.where(row)}, column {self.spec.input}, cannot be decoded",
                got=f"{len(encoded):,} bytes: {error}",
                expected="an image as " + ", ".join(_IMAGE_FORMATS),
                next="remove the row, or write the image again",
            ) from error
        return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _lists(self, column: Any, start: int, shape: tuple[int, ...] | None) -> np.ndarray:
        """Lists of numbers: uint8 if they are stored so, else float32; [n, *shape], by default as the first list is."""
        lengths: np.ndarray = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        shape = shape or (max(int(lengths[0]), 1),)
        wrong = np.flatnonzero(lengths != math.prod(shape))
        if len(wrong):
            raise self._mixed(start + int(wrong[0]), (int(lengths[wrong[0]]),), shape)
        flat = column.flatten()
        dtype = np.uint8 if flat.type == pa.uint8() and not flat.null_count else np.float32
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused below
            values = flat.to_numpy(zero_copy_only=False).astype(dtype).reshape(len(column), -1)
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(wrong):
            raise RefusedError(
                f"the input in {self.where(start + int(wrong[0]))}, column {self.spec.input}, is not finite in float32",
                got=f"null, NaN or infinity in {len(wrong)} of {len(column)} rows from row {start}",
                expected="finite numbers",
            )
        return np.reshape(values, (len(column), *shape))

    def _mixed(self, row: int, got: tuple[int, ...], expected: tuple[int, ...]) -> RefusedError:
        return RefusedError(
            f"the input in {self.where(row)}, column {self.spec.input}, has another shape",
            got=list(got),
            expected=f"{list(expected)}, as " + ("`shape` says" if self.spec.shape else "the rows before"),
            next="bring all inputs to one shape",
        )


def _find_files(path: str) -> list[Path]:
    """The Parquet files that a path, a folder or a glob names, in order."""
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.parquet"))
    elif any(character in path for character in "*?[") and not place.exists():
        files = sorted(one for one in Path(place.anchor).glob(str(place.relative_to(place.anchor))) if one.is_file())
    else:
        files = [place] if place.is_file() else []
    if not files:
        near = difflib.get_close_matches(place.name, _names_beside(place), n=3)
        raise RefusedError(
            f"no Parquet file at {path}",
            got=f"near it: {', '.join(near)}" if near else "nothing there",
            expected="a file, a folder with *.parquet files, or a glob",
            next="correct `path` in the recipe; it is relative to the recipe's folder",
        )
    return files


def _names_beside(place: Path) -> list[str]:
    return [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} cannot be read as Parquet",
            got=str(error).partition("\n")[0],
            expected="a Parquet file",
            next="check that it was copied whole",
        ) from error


def _unspoilt(file: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of a file; a damaged page is a refusal that names the file."""
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{file} is damaged", got=str(error).partition("\n")[0], expected="a Parquet file that reads to its end"
        ) from error


def _check_column(file: Path, schema: Any, key: str, name: str) -> None:
    if name not in schema.names:
        near = difflib.get_close_matches(name, schema.names, n=1)
        raise RefusedError(
            f"{file} has no column {name}",
            got=f"the columns {', '.join(schema.names)}",
            expected=f"the column that `{key}` names",
            next=f"set `{key}` to {near[0] if near else 'one of these'}",
        )
    kind = schema.field(name).type
    usable = pa.types.is_integer(kind) if key == "label" else _holds_images(kind) or _holds_numbers(kind)
    if not usable:
        raise RefusedError(
            f"column {name} of {file} cannot be the {key}",
            got=f"type {kind}",
            expected="integers" if key == "label" else "encoded images (binary), or lists of numbers",
        )


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):  # as Hugging Face writes images
        return bool(kind.get_field_index("bytes") >= 0) and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_numbers(kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)))
