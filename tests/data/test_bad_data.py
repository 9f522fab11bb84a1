"""Bad data, for every kind of source and every fault: refused with exit code 4, row and column named, nothing left."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import zlib
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from akd_dist.base.errors import RefusedError
from akd_dist.data import prepare as preparing
from akd_dist.data.row_cache import prepare
from akd_dist.recipe import ByteText, CustomData, DataSpec, HuggingFaceData, Idx, Parquet
from tests import sources
from tests.fleets import own
from tests.sources import idx, idx_bytes, refused_whole

LABELS = [0, 1] * 5
VECTORS = np.arange(40, dtype=np.float32).reshape(10, 4)
PIXELS = np.zeros((10, 4, 4), dtype=np.uint8)
TEXT: dict[str, Any] = {"text": ByteText(length=8)}

Maker = Callable[[Path], Any]
"""Makes a source of train rows in a folder; a Data where more than that is said."""
Case = tuple[Maker, list[str]]
"""And what its refusal says."""


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(99)), b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


ENCODED = pa.struct({"bytes": pa.binary(), "path": pa.string()})
IMAGES = [png(np.full((4, 4, 3), shade, np.uint8)) for shade in range(10)]


def but(values: Any, row: int, value: Any) -> list[Any]:
    """The values with another one in a row."""
    return [*values[:row], value, *values[row + 1 :]]


def lists(values: Any = VECTORS) -> Any:
    return pa.array([list(map(float, row)) for row in values], pa.list_(pa.float64()))


# ---- faults of tables, whatever they come from: (inputs, labels, options of the source and of the data, words)

NAN, INF = float("nan"), float("inf")
REGRESSION: dict[str, Any] = {"task": "regression"}
TABLES: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "no such input": (
        lists(),
        LABELS,
        {"input": "inputs"},
        ["no column inputs", "input, label", "set `input` to input"],
    ),
    "no such label": (lists(), LABELS, {"label": "lable"}, ["no column lable", "set `label` to label"]),
    "labels of lists": (lists(), lists(), {}, ["column label of", "cannot be the label", "list"]),
    "labels of floats": (lists(), [0.5, 1.0] * 5, {}, ["row 0 of", "column label", "double", "data.task: regression"]),
    "ids as floats": (lists(), [1.0, 2.0] * 5, {}, ["row 0 of", "double: 1.0", "cast the column to integers"]),
    "ids with a gap": (lists(), pa.array([None] + [1.0] * 9), {}, ["row 0 of", "missing values make floats of them"]),
    "decimal labels": (lists(), [Decimal(1)] * 10, {}, ["decimal128(1, 0)", "cast decimals to integers (int64)"]),
    "decimal inputs": (pa.array([[Decimal("1.5")]] * 10), LABELS, {}, ["decimal128", "cast decimals to floats"]),
    "dates as labels": (lists(), [date(2020, 1, 1)] * 10, {}, ["date32", "days as integers"]),
    "labels of nothing": (lists(), pa.nulls(10), {}, ["type null", "all its values are missing"]),
    "numbers as text": ([["1", "2"]] * 10, LABELS, {}, ["list<", "write numbers as numbers"]),
    "booleans as inputs": ([[True]] * 10, LABELS, {}, ["cast booleans to uint8"]),
    "the mark -1": (lists(), but(LABELS, 6, -1), {}, ["row 6 of", "-1 marks rows without a label"]),
    "counted from 1": (lists(), but(LABELS, 6, 2), {"classes": 2}, ["row 6 of", "counted from 1, subtract 1"]),
    "the mark 255": (lists(), but(LABELS, 6, 255), {"classes": 2}, ["row 6 of", "255 marks rows without a label"]),
    "an integer beyond 2^24": ([[2**24]] * 4 + [[2**24 + 1]] * 6, LABELS, {}, ["row 4 of", "16777217", "to floats"]),
    "a quantity beyond 2^24": (lists(), but([1] * 10, 3, 2**40 + 1), REGRESSION, ["row 3 of", "1099511627777"]),
    "names in regression": (lists(), ["a", "b"] * 5, REGRESSION, ["row 0 of", "column label", "string"]),
    "a column of numbers": (list(range(10)), LABELS, {}, ["column input of", "cannot be the input", "column of lists"]),
    "a struct": ([{"path": "a.png"}] * 10, LABELS, {}, ["column input of", "cannot be the input", "struct"]),
    "no rows": (pa.array([], pa.list_(pa.float32())), pa.array([], pa.int64()), {}, ["has no rows"]),
    "too few rows": (lists(VECTORS[:2]), [0, 1], {}, ["no rows are left for validation and test"]),
    "no label": (lists(), but(LABELS, 2, None), {}, ["no value in row 2 of", "column label", "null"]),
    "no input": (pa.array(but(IMAGES, 7, None)), LABELS, {}, ["no value in row 7 of", "column input"]),
    "no bytes": (
        pa.array([{"bytes": None, "path": "a.png"}] * 10, ENCODED),
        LABELS,
        {},
        ["no value in row 0 of", "bytes embedded"],
    ),
    "a negative label": (
        lists(),
        but(LABELS, 6, -3),
        {},
        ["out of range in row 6 of", "column label", "-3", "from 0"],
    ),
    "a label of no class": (lists(), but(LABELS, 4, 4), {"classes": 4}, ["row 4 of", "got: 4", "0 to 3"]),
    "an enormous label": (lists(), but(LABELS, 9, 2**31), {}, ["row 9 of", "2147483648", "set `classes`"]),
    "an unsigned label": (lists(), pa.array(but(LABELS, 3, 2**63), pa.uint64()), {}, ["range in row 3 of", f"{2**63}"]),
    "no class name": (lists(), but(["a", "b"] * 5, 3, " "), {}, ["no value in row 3 of", "a class name"]),
    "too many names": (lists(), but(["a", "b"] * 5, 3, "c"), {"classes": 2}, ["3 names: a, b, c", "expected: 2"]),
    "a label of NaN": (lists(), but([0.5] * 10, 8, NAN), REGRESSION, ["row 8 of", "column label", "nan", "finite"]),
    "an infinite label": (lists(), but([0.5] * 10, 8, INF), REGRESSION, ["row 8 of", "column label", "inf"]),
    "a label beyond float32": (lists(), but([0.5] * 10, 1, 1e300), REGRESSION, ["row 1 of", "1e+300"]),
    "not an image": (
        but(IMAGES, 7, b"GIF89a"),
        LABELS,
        {},
        ["cannot decode", "row 7 of", "column input", "6 bytes: of none"],
    ),
    "no image at all": (but(IMAGES, 0, b""), LABELS, {}, ["cannot decode", "row 0 of", "column input"]),
    "a cut image": (but(IMAGES, 3, IMAGES[3][:-30]), LABELS, {}, ["cannot decode", "row 3 of", "column input"]),
    "a first image that bursts": (but(IMAGES, 0, bomb(9000)), LABELS, {}, ["cannot decode", "row 0 of"]),
    "an image that bursts": (
        but(IMAGES, 5, bomb(9000)),
        LABELS,
        {},
        ["cannot decode", "row 5 of", "9,000 x 9,000 pixels"],
    ),
    "an image that really bursts": (but(IMAGES, 5, bomb(40000)), LABELS, {}, ["cannot decode", "row 5 of"]),
    "a deep image": ([png(np.zeros((4, 4), np.uint16))] * 10, LABELS, {}, ["row 0 of", "8 bits"]),
    "image sizes": (
        but(IMAGES, 5, png(np.zeros((4, 5, 3), np.uint8))),
        LABELS,
        {},
        ["another shape in row 5 of", "column input", "[3, 4, 5]", "[3, 4, 4]"],
    ),
    "colour where shape says grey": (
        [png(PIXELS[0])] * 5 + IMAGES[5:],
        LABELS,
        {"shape": [1, 4, 4]},
        ["row 5 of", "[3, 4, 4]", "[1, 4, 4]", "`shape` says"],
    ),
    "shape of images": (IMAGES, LABELS, {"shape": [3, 8, 8]}, ["row 0 of", "`shape` says"]),
    "lengths": (pa.array(but(VECTORS.tolist(), 4, [1.0])), LABELS, {}, ["another shape in row 4 of", "[1]", "[4]"]),
    "nested lengths": ([[[1, 2], [3, 4]]] * 4 + [[[1, 2], [3]]] * 6, LABELS, {}, ["another shape in row 4 of"]),
    "nested shapes": ([[[1, 2], [3, 4]]] * 4 + [[[1, 2, 3, 4]]] * 6, LABELS, {}, ["row 4 of", "[1, 4]", "[2, 2]"]),
    "shape of lists": (lists(), LABELS, {"shape": [2, 3]}, ["row 0 of", "[4]", "[2, 3]", "`shape` says"]),
    "empty lists": (pa.array([[]] * 10, pa.list_(pa.int8())), LABELS, {}, ["the input is empty in row 0 of"]),
    "an input of NaN": (but(VECTORS.tolist(), 6, [NAN] * 4), LABELS, {}, ["not finite", "row 6 of", "column input"]),
    "an input with a null": (but(VECTORS.tolist(), 6, [1, None, 1, 1]), LABELS, {}, ["not finite", "row 6 of"]),
    "an input beyond float32": (but(VECTORS.tolist(), 9, [1e300] * 4), LABELS, {}, ["not finite", "row 9 of"]),
    "text and no tokenizer": (["a"] * 10, LABELS, {}, ["data.text is missing", "row 0 of", "kind: bytes, length: 256"]),
    "a tokenizer and no text": (
        IMAGES,
        LABELS,
        TEXT,
        ["the inputs are not text", "images in row 0 of", "column input"],
    ),
    "no text": (but(["a"] * 10, 3, None), LABELS, TEXT, ["no value in row 3 of", "column input"]),
    "empty text": (but(["a"] * 10, 3, ""), LABELS, TEXT, ["empty text in row 3 of", "column input"]),
    "blank text": (but(["a"] * 10, 9, " \n\t"), LABELS, TEXT, ["empty text in row 9 of"]),
    "not UTF-8": (pa.array([b"a", b"\xff"] * 5).view(pa.string()), LABELS, TEXT, ["not UTF-8 in row 1 of"]),
    "empty second text": (
        pa.StructArray.from_arrays([pa.array(["a"] * 10), pa.array(but(["b"] * 10, 4, " "))], ["one", "two"]),
        LABELS,
        {"input": ["one", "two"], **TEXT},
        ["empty text in row 4 of", "column two"],
    ),
    "a pair of no texts": (
        pa.StructArray.from_arrays([lists(), lists()], ["one", "two"]),
        LABELS,
        {"input": ["one", "two"]},
        ["no texts", "columns one and two"],
    ),
}
OF_DATA = ("task", "text")


def of_table(kind: str, fault: str) -> Case:
    """A table with this fault, in a source of this kind."""
    inputs, labels, options, words = TABLES[fault]
    write: Any = {"parquet": sources.parquet, "huggingface": sources.huggingface, "table": sources.table}[kind]

    def make(folder: Path) -> DataSpec:
        pair = isinstance(options.get("input"), list)
        columns = inputs.flatten() if pair else [pa.array(inputs) if isinstance(inputs, list) else inputs]
        made = pa.table([*columns, pa.array(labels)], [*(options["input"] if pair else ["input"]), "label"])
        spec = write(folder / kind, made, **{key: value for key, value in options.items() if key not in OF_DATA})
        return DataSpec(train=spec, **{key: value for key, value in options.items() if key in OF_DATA})

    return make, words


# ---- faults of files


def file(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def whole_parquet(folder: Path) -> Path:
    values = pa.array(np.random.default_rng(0).random((4000, 4)).tolist())
    folder.mkdir(exist_ok=True)
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"input": values, "label": [0, 1] * 2000}), folder / "whole.parquet", **options)
    return folder / "whole.parquet"


def cut_parquet(folder: Path) -> Parquet:
    path = whole_parquet(folder)
    path.write_bytes(path.read_bytes()[:-40])
    return Parquet(path=str(path))


def damaged_parquet(folder: Path) -> Parquet:
    path = whole_parquet(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return Parquet(path=str(path))


def second_file(second: Any) -> Maker:
    def make(folder: Path) -> Parquet:
        first = pa.table({"input": VECTORS.tolist(), "label": LABELS})
        sources.parquet(folder / "many" / "a", first)
        sources.parquet(folder / "many" / "b", second)
        return Parquet(path=str(folder / "many"))

    return make


def with_test(first: Any, **second: Any) -> Maker:
    """Train rows, and test rows that do not go with them."""

    def make(folder: Path) -> DataSpec:
        train = sources.parquet(folder / "train", pa.table(first))
        return DataSpec(train=train, test=sources.parquet(folder / "test", pa.table(second)))

    return make


def named_folder(kind: str, content: Callable[[Path], None]) -> Maker:
    def make(folder: Path) -> HuggingFaceData:
        place = folder / kind
        sources.huggingface(place, pa.table({"input": VECTORS.tolist(), "label": LABELS}))
        content(place)
        return HuggingFaceData(path=str(place))

    return make


def arrow_file(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


def idx_of(images: bytes, labels: bytes | None = None, suffix: str = "") -> Maker:
    return lambda folder: idx(folder / f"idx{suffix}", images, labels or idx_bytes(np.array(LABELS, dtype=np.uint8)))


def cut_gzip(keep: Callable[[bytes], bytes]) -> Maker:
    def make(folder: Path) -> Idx:
        spec = idx(folder / "idx.gz", idx_bytes(RANDOM), idx_bytes(np.array(LABELS, dtype=np.uint8)))
        Path(spec.images).write_bytes(keep(Path(spec.images).read_bytes()))
        return spec

    return make


RANDOM = np.random.default_rng(0).integers(0, 256, (10, 40, 40), dtype=np.uint8)
HEADER = struct.pack(">HBB", 0, 8, 3)
HUGE = HEADER + struct.pack(">3I", 2**31, 2**10, 2**10)
FILES: dict[str, Case] = {
    "parquet, missing": (lambda folder: Parquet(path=str(folder / "dat.parquet")), ["no Parquet file", "data.parquet"]),
    "parquet, a URI": (
        lambda folder: Parquet(path="https://host/rows.parquet"),
        ["not read from https://host", "s3://", "custom"],
    ),
    "parquet, no match": (lambda folder: Parquet(path=str(folder / "*.csv")), ["no Parquet file", "a glob"]),
    "parquet, no glob": (
        lambda f: Parquet(path=str(f / "**x" / "*.parquet")),
        ["cannot be read as a glob", "any folders"],
    ),
    "parquet, second file, bytes": (
        second_file(pa.table({"input": pa.array([[1, 2, 3, 4]] * 10, pa.list_(pa.uint8())), "label": LABELS})),
        ["an input of another type than the first in row 10 of", "got: uint8", "not uint8"],
    ),
    "parquet, empty folder": (lambda folder: Parquet(path=str(folder / "sub")), ["no Parquet file", "a folder"]),
    "parquet, empty": (lambda f: Parquet(path=file("a.parquet", b"")(f)), ["a.parquet cannot be read as Parquet"]),
    "parquet, other": (
        lambda f: Parquet(path=file("a.parquet", b"no" * 99)(f)),
        ["a.parquet cannot be read as Parquet"],
    ),
    "parquet, cut": (cut_parquet, ["whole.parquet cannot be read as Parquet", "copied whole"]),
    "parquet, damaged": (damaged_parquet, ["whole.parquet is damaged"]),
    "parquet, second file, label": (
        second_file(pa.table({"input": VECTORS.tolist(), "label": but(LABELS, 3, -3)})),
        ["row 13 of", "(data.parquet, row 3)", "column label", "-3"],
    ),
    "parquet, second file, type": (
        second_file(pa.table({"input": VECTORS.tolist(), "label": ["a", "b"] * 5})),
        ["b/data.parquet is not what it is in the files before", "column label", "string", "int64"],
    ),
    "parquet, second file, column": (
        second_file(pa.table({"input": VECTORS.tolist(), "lable": LABELS})),
        ["b/data.parquet has no column label", "set `label` to lable"],
    ),
    "test, shape": (
        with_test({"input": VECTORS.tolist(), "label": LABELS}, input=[[1.0] * 5], label=[1]),
        ["inputs of data.test", "float32 [5]", "float32 [4]"],
    ),
    "test, type": (
        with_test({"input": VECTORS.tolist(), "label": LABELS}, input=IMAGES, label=LABELS),
        ["inputs of data.test", "uint8 [3, 4, 4]", "float32 [4]"],
    ),
    "test, label": (
        with_test({"input": VECTORS.tolist(), "label": LABELS}, input=VECTORS.tolist(), label=but(LABELS, 2, 2)),
        ["label out of range in row 2 of", "test", "0 to 1, as the data has 2 classes"],
    ),
    "idx, missing": (
        lambda f: Idx(images=file("images", b"")(f), labels=str(f / "label")),
        ["no IDX file at", "label"],
    ),
    "idx, a folder": (lambda f: Idx(images=str(f), labels=str(f)), ["no IDX file at", "a folder"]),
    "idx, empty": (idx_of(b""), ["images cannot be used", "4 bytes are missing"]),
    "idx, other": (idx_of(b"\x89PNG" * 9), ["images cannot be used", "an IDX file"]),
    "idx.gz, other": (idx_of(b"\x89PNG" * 9, suffix=".gz"), ["images cannot be used", "an IDX file"]),
    "idx, cut in the header": (idx_of(HEADER + b"\0"), ["images cannot be used", "reads to its end"]),
    "idx, cut": (idx_of(idx_bytes(PIXELS)[:-1]), ["images cannot be used", "as its header says: [10, 4, 4]"]),
    "idx, too long": (idx_of(idx_bytes(PIXELS) + b"\0"), ["images cannot be used", "as its header says"]),
    "idx.gz, too long": (idx_of(idx_bytes(PIXELS) + b"\0", suffix=".gz"), ["images cannot be used", "more bytes"]),
    "idx.gz, too short": (
        idx_of(idx_bytes(RANDOM)[:-9], suffix=".gz"),
        ["images cannot be used", "9 bytes are missing"],
    ),
    "idx.gz, cut": (cut_gzip(lambda data: data[:-4000]), ["images cannot be used", "reads to its end"]),
    "idx.gz, cut in its sum": (cut_gzip(lambda data: data[:-3]), ["images cannot be used", "reads to its end"]),
    "idx.gz, wrong sum": (cut_gzip(lambda data: data[:-8] + bytes(8)), ["images cannot be used", "CRC"]),
    "idx.gz, damaged": (
        cut_gzip(lambda data: data[:3000] + bytes(99) + data[3099:]),
        ["images cannot be used", "reads to its end"],
    ),
    "idx, terabytes": (idx_of(HUGE), ["images cannot be used", "2,251,799,813,685,264 bytes"]),
    "idx.gz, terabytes": (idx_of(HUGE, suffix=".gz"), ["images cannot be used", "2,251,799,813,685,264 bytes"]),
    "idx, dimensions": (
        idx_of(HEADER[:3] + b"\xff" + struct.pack(">I", 1) * 255 + b"\0"),
        ["images cannot be used", "dimensions"],
    ),
    "idx, no such type": (idx_of(idx_bytes(PIXELS, code=7)), ["images cannot be used", "a type"]),
    "idx, type of images": (
        idx_of(idx_bytes(PIXELS.astype(np.int16))),
        ["uint8 of two dimensions", "int16 [10, 4, 4]"],
    ),
    "idx, images and labels swapped": (
        idx_of(idx_bytes(np.array(LABELS, dtype=np.uint8)), idx_bytes(PIXELS)),
        ["uint8 of two dimensions", "uint8 [10]"],
    ),
    "idx, labels of images": (
        idx_of(idx_bytes(PIXELS), idx_bytes(PIXELS)),
        ["labels have one dimension", "[10, 4, 4]"],
    ),
    "idx, counts": (
        idx_of(idx_bytes(PIXELS), idx_bytes(np.zeros(9, np.uint8))),
        ["do not belong together", "10 inputs and 9 labels"],
    ),
    "idx, no rows": (idx_of(idx_bytes(PIXELS[:0]), idx_bytes(np.zeros(0, np.uint8))), ["has no rows"]),
    "idx, negative label": (
        idx_of(idx_bytes(PIXELS), idx_bytes(np.array(but(LABELS, 3, -1), np.int8))),
        ["label out of range in row 3 of", "labels", "-1"],
    ),
    "idx, text": (
        lambda folder: DataSpec(train=idx_of(idx_bytes(PIXELS))(folder), **TEXT),
        ["the inputs are not text", "row 0 of"],
    ),
    "idx, labels of NaN": (
        lambda folder: DataSpec(
            train=idx_of(idx_bytes(PIXELS), idx_bytes(np.array(but([0.5] * 10, 6, NAN))))(folder), **REGRESSION
        ),
        ["a label that is not finite in float32 in row 6 of"],
    ),
    "huggingface, missing": (
        named_folder("birds", lambda place: void(place.rename(place.parent / "bird"))),
        ["no dataset at", "near it: bird"],
    ),
    "huggingface, empty": (
        lambda folder: HuggingFaceData(path=str(Path(file("x", b"")(folder / "a")).parent)),
        ["cannot be read as a Hugging Face dataset", "save_to_disk"],
    ),
    "huggingface, cut": (
        named_folder("a", lambda place: void(arrow_file(place).write_bytes(arrow_file(place).read_bytes()[:300]))),
        ["cannot be read as a Hugging Face dataset", "copied whole"],
    ),
    "huggingface, other": (
        named_folder("a", lambda place: void(arrow_file(place).write_bytes(b"nothing" * 99))),
        ["cannot be read as a Hugging Face dataset"],
    ),
    "huggingface, no state": (
        named_folder("a", lambda place: void((place / "state.json").write_text("{"))),
        ["cannot be read as a Hugging Face dataset"],
    ),
}


def void(_: object) -> None:
    """So that a lambda gives nothing."""


# ---- faults of the user's own code


def items(inputs: Any, labels: Any = LABELS, **data: Any) -> Maker:
    return lambda folder: DataSpec(train=sources.dataset(folder / "own", inputs, labels), **data)


def code(text: str) -> Maker:
    return lambda folder: own(CustomData(factory=f"{sources.module(folder / 'own', text)}:make"), folder / "own")


ROWS = list(VECTORS)
OWN: dict[str, Case] = {
    "no module": (
        lambda folder: own(CustomData(factory="nowhere:make"), folder),
        ["nowhere:make cannot be imported", "nowhere.py"],
    ),
    "no function": (code("def mak(): ..."), ["has no function make", "mak"]),
    "a module that fails": (code("1 / 0"), ["cannot be imported", "ZeroDivisionError", "Traceback"]),
    "a function that fails": (code("def make():\n    1 / 0"), ["failed", "ZeroDivisionError", "in make"]),
    "nothing": (code("def make(): ..."), ["something else than data", "NoneType"]),
    "a stream that fails": (
        code(
            "import pyarrow as pa\ndef make():\n    schema = pa.schema({'input': pa.int8()})\n    def batches():\n"
            "        raise OSError('my disk')\n        yield\n"
            "    return pa.RecordBatchReader.from_batches(schema, batches())"
        ),
        ["cannot be read", "my disk"],
    ),
    "no length": (
        code("class Items:\n    def __len__(self): 1 / 0\n    def __getitem__(self, row): ...\nmake = Items"),
        ["asked how many rows", "ZeroDivisionError"],
    ),
    "no rows": (items([], []), ["has no rows"]),
    "an item that fails": (items(ROWS, but(LABELS, 6, KeyError("mine"))), ["fails at row 6", "mine", "Traceback"]),
    "no pairs": (code("def make(): return [3] * 10"), ["of the item in row 0 of", "int", "a pair (input, label)"]),
    "no input": (items(but(ROWS, 3, None)), ["of the input in row 3 of", "NoneType"]),
    "objects": (items([np.array([None])] * 10), ["of the input in row 0 of", "an array of object"]),
    "single numbers": (
        items(np.arange(10.0)),
        ["the input is a single number in row 0 of", "one list of all its numbers"],
    ),
    "shapes": (items(but(ROWS, 4, np.zeros(5))), ["another shape in row 4 of", "[5]", "[4]"]),
    "types": (items(but(ROWS, 4, "text")), ["of the item in row 4 of", "['str', 'int']", "['ndarray', 'int']"]),
    "floats among bytes": (items(but(list(PIXELS), 4, np.zeros((4, 4)))), ["another type than the first in row 4 of"]),
    "bytes among floats": (items(but(ROWS, 4, np.zeros(4, np.uint8))), ["another type than the first in row 4 of"]),
    "an image of 16 bits": (
        items([Image.fromarray(one) for one in but(list(PIXELS), 5, np.full((4, 4), 9999, np.uint16))]),
        ["of the input in row 5 of", "mode I;16"],
    ),
    "a sparse tensor": (items([torch.eye(4).to_sparse()] * 10), ["of the input in row 0 of", "a dense tensor"]),
    "an input of NaN": (items(but(ROWS, 7, VECTORS[7] * NAN)), ["not finite in float32 in row 7 of"]),
    "no label": (items(ROWS, but(LABELS, 5, None)), ["of the label in row 5 of", "NoneType"]),
    "a list as a label": (items(ROWS, but(LABELS, 5, [1])), ["of the label in row 5 of", "list"]),
    "a negative label": (items(ROWS, but(LABELS, 5, -1)), ["label out of range in row 5 of", "-1"]),
    "a label beyond all": (items(ROWS, but(LABELS, 5, 2**70)), ["of the label in row 5 of"]),
    "labels of floats": (items(ROWS, [0.5] * 10), ["labels that do not go with data.task: classification in row 0 of"]),
    "a label of NaN": (items(ROWS, but([0.5] * 10, 2, NAN), **REGRESSION), ["not finite in float32 in row 2 of"]),
    "image sizes": (
        items([Image.fromarray(one) for one in but(list(PIXELS), 8, np.zeros((4, 5), np.uint8))]),
        ["another shape in row 8 of", "[1, 4, 5]", "[1, 4, 4]"],
    ),
    "empty text": (items(but(["a"] * 10, 2, " "), **TEXT), ["empty text in row 2 of"]),
    "half a character": (items(but(["a"] * 10, 2, "\ud800"), **TEXT), ["of the text in row 2 of", "surrogate"]),
    "empty second text": (items([("a", "b")] * 9 + [("a", "")], **TEXT), ["empty text in row 9 of"]),
}

CASES: dict[str, Case] = {
    **{
        f"{kind}, {fault}": of_table(kind, fault)
        for kind, fault in itertools.product(("parquet", "huggingface", "table"), TABLES)
    },
    **FILES,
    **{f"own, {fault}": case for fault, case in OWN.items()},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ten rows are several blocks."""
    monkeypatch.setattr(preparing, "_READ_ROWS", 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "data.parquet").touch()
    refused_whole(*CASES[case], tmp_path)


def test_of_several_mistakes_the_first_is_named(tmp_path: Path) -> None:
    """Not that of the column that is looked at first, nor that of the thread that is first."""
    images, labels = but(but(IMAGES, 4, b"no image"), 7, b"none"), but(but(LABELS, 5, -1), 8, None)
    spec = sources.parquet(tmp_path / "data", pa.table({"input": images, "label": labels}))
    for attempt in range(5):
        with pytest.raises(RefusedError, match=r"cannot decode the image in row 4 of .*, column input"):
            prepare(DataSpec(train=spec), tmp_path / f"cache{attempt}")


def test_a_compressed_file_may_have_any_name(tmp_path: Path) -> None:
    """What counts is what a file holds."""
    spec = idx(tmp_path / "data", idx_bytes(PIXELS), gzip.compress(idx_bytes(np.array(LABELS, dtype=np.uint8))))
    assert len(prepare(DataSpec(train=spec), tmp_path / "cache").train) == 7
