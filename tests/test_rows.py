"""Numbered rows: the same arrays from every source and on every machine, or a refusal that names row and column."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from akd_dist.recipe import Data, Digits, Parquet
from akd_dist.rows import BLOCK_ROWS, SPLITS, Rows, Splits, fingerprint, prepare, split_of_rows
from akd_dist.storage.errors import MachineError, RefusedError

DIGITS = Data(train=Digits())


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, inputs: Any, labels: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": inputs, "y": labels}), path, **options)
    return path


def parquet(path: Path | str, **options: Any) -> Data:
    """Data of one Parquet source whose columns are x and y."""
    return Data(train=Parquet(path=str(path), input="x", label="y", **options), validation=0.2, test=0.2)


def vectors(rows: int, width: int = 4) -> Any:
    return pa.array(np.arange(rows * width, dtype=np.float32).reshape(rows, width).tolist(), pa.list_(pa.float32()))


def together(splits: Splits) -> np.ndarray:
    return np.concatenate([getattr(splits, name).inputs for name in SPLITS])


# ---- digits


def test_digits_are_those_of_scikit_learn_in_their_order(cache_root: Path) -> None:
    splits = prepare(DIGITS, cache_root)
    inputs, labels = load_digits(return_X_y=True)
    split = split_of_rows(len(labels), 0.1, 0.2, seed=0)
    for index, name in enumerate(SPLITS):
        rows: Rows = getattr(splits, name)
        expected = np.rint(inputs[split == index] * 255 / 16).reshape(-1, 1, 8, 8)
        np.testing.assert_array_equal(rows.inputs, expected)
        np.testing.assert_array_equal(rows.labels, labels[split == index])
        assert rows.inputs.dtype == np.uint8
        assert rows.labels.dtype == np.int64
        assert (rows.shape, rows.classes) == ((1, 8, 8), 10)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [1258, 180, 359]


def test_rows_read_without_a_copy_and_cannot_be_written(cache_root: Path) -> None:
    rows = prepare(DIGITS, cache_root).train
    inputs, labels = rows.read(10, 20)
    assert inputs.shape == (10, 1, 8, 8)
    assert labels.tolist() == rows.labels[10:20].tolist()
    assert inputs.base is not None
    with pytest.raises(ValueError, match="read-only"):
        inputs[0] = 0


def test_the_split_is_pinned() -> None:
    """A change here would make another dataset of every recipe that splits one."""
    assert split_of_rows(20, 0.2, 0.3, seed=5).tolist() == PINNED


PINNED = [0, 1, 2, 1, 1, 0, 0, 0, 0, 2, 2, 0, 2, 2, 0, 2, 0, 0, 0, 1]


def test_shares_are_disjoint_exact_and_depend_on_the_seed() -> None:
    splits = [split_of_rows(1000, 0.1, 0.25, seed) for seed in (0, 1)]
    for split in splits:
        assert np.bincount(split).tolist() == [650, 100, 250]
    assert (splits[0] != splits[1]).any()


def test_prepared_data_is_shared_and_survives_damage(cache_root: Path) -> None:
    first = prepare(DIGITS, cache_root)
    index = first.train.folder / "index.json"
    written = index.stat().st_mtime_ns
    assert prepare(DIGITS, cache_root).train.folder == first.train.folder
    assert index.stat().st_mtime_ns == written
    for damage in ("cut", "overwritten"):
        with open(first.train.folder / "train-inputs.npy", "r+b") as handle:
            handle.truncate(1000) if damage == "cut" else handle.write(b"?")
        again = prepare(DIGITS, cache_root).train
        assert fingerprint(again.inputs, again.labels, 10)[0] == again.fingerprint == first.train.fingerprint
        assert index.stat().st_mtime_ns > written


def test_a_killed_preparation_leaves_nothing_that_is_read(cache_root: Path) -> None:
    """Killed while it writes, it leaves a partial folder; the next one removes that and prepares."""
    code = """
import os, sys
from pathlib import Path
from akd_dist import rows
from akd_dist.recipe import Data, Digits
rows._write_index = lambda *_: os.kill(os.getpid(), 9)
rows.prepare(Data(train=Digits()), Path(sys.argv[1]))
"""
    killed = subprocess.run([sys.executable, "-c", code, str(cache_root)], check=False)
    assert killed.returncode == -9
    assert list(cache_root.glob("rows/*.partial"))
    assert len(prepare(DIGITS, cache_root).train) == 1258
    assert not list(cache_root.glob("rows/*.partial"))


def test_two_processes_prepare_once(cache_root: Path) -> None:
    code = """
import sys
from pathlib import Path
from akd_dist import rows
from akd_dist.recipe import Data, Digits
print(rows.prepare(Data(train=Digits()), Path(sys.argv[1])).test.fingerprint)
"""
    command = [sys.executable, "-c", code, str(cache_root)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0] for process in both}
    assert printed == {prepare(DIGITS, cache_root).test.fingerprint + "\n"}
    assert len(list(cache_root.glob("rows/*/index.json"))) == 1


def test_a_budget_too_small_is_refused_with_the_need(cache_root: Path) -> None:
    with pytest.raises(MachineError) as refused:
        prepare(DIGITS, cache_root, budget=1000)
    assert f"{1797 * 72:,}" in str(refused.value)


# ---- fingerprint


def mutate(what: str, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    match what:
        case "pixel":
            inputs[5000, 3] ^= 1
        case "label":
            labels[5000] = 3
        case "swap":
            inputs[[4999, 5000]] = inputs[[5000, 4999]]
        case "drop":
            inputs, labels = inputs[:-1], labels[:-1]
        case "dtype":
            inputs = inputs.view(np.int8)
        case "shape":
            inputs = inputs.reshape(-1, 2, 2)
        case "classes":
            return inputs, labels, 11
    return inputs, labels, 10


def some_rows() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(0, 256, (9000, 4), dtype=np.uint8), np.zeros(9000, dtype=np.int64)


@pytest.mark.parametrize("what", ["pixel", "label", "swap", "drop", "dtype", "shape", "classes"])
def test_the_fingerprint_changes_with(what: str) -> None:
    before = fingerprint(*some_rows(), 10)
    after = fingerprint(*mutate(what, *some_rows()))
    assert before == fingerprint(*some_rows(), 10)
    assert before[0] != after[0]
    changed = [number for number, pair in enumerate(zip(before[1], after[1], strict=True)) if pair[0] != pair[1]]
    expected = {"pixel": [1], "label": [1], "swap": [1], "drop": [2]}
    assert changed == expected.get(what, [])


def test_another_dataset_is_refused_with_the_first_block_that_differs(tmp_path: Path) -> None:
    inputs, labels = some_rows()
    rows = Rows(inputs, labels, 10, *fingerprint(inputs, labels, 10), folder=tmp_path)
    rows.check_same(rows.describe())
    changed = mutate("pixel", *some_rows())
    other = Rows(*changed, *fingerprint(*changed), folder=tmp_path)
    with pytest.raises(RefusedError, match="not the one the store was made from") as refused:
        other.check_same(rows.describe())
    assert f"rows {BLOCK_ROWS:,} to {2 * BLOCK_ROWS:,}" in str(refused.value.got)


# ---- Parquet


def test_images_are_decoded_from_bytes_and_structs(tmp_path: Path, cache_root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)
    encoded = [png(image) for image in pixels]
    plain = write(tmp_path / "plain.parquet", pa.array(encoded), list(range(10)) * 3)
    struct = write(
        tmp_path / "struct.parquet", pa.array([{"bytes": one, "path": None} for one in encoded]), [0, 9] * 15
    )
    split = split_of_rows(30, 0.2, 0.2, seed=0)
    for path in (plain, struct):
        splits = prepare(parquet(path), cache_root)
        expected = pixels[split == 0].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(splits.train.inputs, expected)
        assert splits.train.classes == 10


def test_grey_images_have_one_channel(tmp_path: Path, cache_root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 5, 6), dtype=np.uint8)
    path = write(tmp_path / "grey.parquet", [png(image) for image in pixels], [0, 1] * 5)
    assert prepare(parquet(path), cache_root).train.shape == (1, 5, 6)


def test_a_grey_image_among_coloured_ones_gets_their_channels(tmp_path: Path, cache_root: Path) -> None:
    encoded = [png(np.full((4, 4, 3), 7, np.uint8))] * 5 + [png(np.full((4, 4), 7, np.uint8))] * 5
    path = write(tmp_path / "mixed.parquet", encoded, [0, 1] * 5)
    assert (together(prepare(parquet(path), cache_root)) == 7).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.list_(pa.float32()), np.float32),
        (pa.list_(pa.float64(), 4), np.float32),
        (pa.large_list(pa.int64()), np.float32),
        (pa.list_(pa.uint8()), np.uint8),
    ],
    ids=str,
)
def test_lists_of_numbers_take_the_given_shape(kind: Any, dtype: Any, tmp_path: Path, cache_root: Path) -> None:
    values = np.arange(40).reshape(10, 4)
    path = write(tmp_path / "lists.parquet", pa.array(values.tolist(), kind), [0, 1] * 5)
    splits = prepare(parquet(path, shape=[1, 2, 2]), cache_root)
    expected = values.reshape(10, 1, 2, 2)[split_of_rows(10, 0.2, 0.2, seed=0) == 0]
    np.testing.assert_array_equal(splits.train.inputs, expected)
    assert splits.train.inputs.dtype == dtype
    assert prepare(parquet(path), cache_root).train.shape == (4,)


def test_folders_and_globs_number_rows_through_their_files(tmp_path: Path, cache_root: Path) -> None:
    whole = write(tmp_path / "whole.parquet", vectors(30), [0, 1] * 15, row_group_size=7)
    for part in range(3):
        table = pq.read_table(whole).slice(part * 10, 10)
        write(tmp_path / "parts" / f"{part}.parquet", table["x"], table["y"])
    names = [whole, tmp_path / "parts", tmp_path / "parts" / "?.parquet"]
    assert len({prepare(parquet(name), cache_root).train.fingerprint for name in names}) == 1


def test_splits_may_have_sources_of_their_own(tmp_path: Path, cache_root: Path) -> None:
    train = write(tmp_path / "train.parquet", vectors(20), [0, 1] * 10)
    test = write(tmp_path / "test.parquet", vectors(3), [1, 0, 1])
    source = Parquet(path=str(test), input="x", label="y")
    splits = prepare(parquet(train).model_copy(update={"test": source}), cache_root)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [16, 4, 3]
    np.testing.assert_array_equal(splits.test.inputs, np.arange(12).reshape(3, 4))


def test_changed_files_are_prepared_again(tmp_path: Path, cache_root: Path) -> None:
    path = write(tmp_path / "data.parquet", vectors(10), [0, 1] * 5)
    before = prepare(parquet(path), cache_root).train.fingerprint
    write(path, vectors(10), [1, 0] * 5)
    assert prepare(parquet(path), cache_root).train.fingerprint != before


def test_memory_is_bounded_by_blocks_and_not_by_rows(tmp_path: Path, cache_root: Path) -> None:
    inputs = np.random.default_rng(0).random((80_000, 256), dtype=np.float32)  # 82 MB in one row group
    column = pa.FixedSizeListArray.from_arrays(pa.array(inputs.reshape(-1)), 256)
    path = write(tmp_path / "large.parquet", column, np.arange(80_000) % 10, row_group_size=80_000)
    del inputs, column
    code = f"""
import tracemalloc, pyarrow
from pathlib import Path
from akd_dist.recipe import Data, Parquet
from akd_dist.rows import prepare
tracemalloc.start()
prepare(Data(train=Parquet(path={str(path)!r}, input="x", label="y")), Path({str(cache_root)!r}))
print(tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60e6


# ---- refusals

Maker = Callable[[Path], Data]


def refused(inputs: Any, labels: Any, **options: Any) -> Maker:
    def make(folder: Path) -> Data:
        return parquet(write(folder / "data.parquet", inputs, labels), **options)

    return make


def not_parquet(folder: Path) -> Data:
    (folder / "data.parquet").write_bytes(b"not at all")
    return parquet(folder / "data.parquet")


def truncated(folder: Path) -> Data:
    path = write(folder / "data.parquet", vectors(10), [0, 1] * 5)
    path.write_bytes(path.read_bytes()[:-40])
    return parquet(path)


def damaged(folder: Path) -> Data:
    path = write(folder / "data.parquet", vectors(4000), [0, 1] * 2000, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    return parquet(path)


def missing_column(folder: Path) -> Data:
    path = write(folder / "data.parquet", vectors(10), [0, 1] * 5)
    return Data(train=Parquet(path=str(path), input="x", label="yy"))


def in_second_file(folder: Path) -> Data:
    write(folder / "many" / "a.parquet", vectors(10), [0, 1] * 5)
    write(folder / "many" / "b.parquet", vectors(10), [0, 1, 2, -3, 4] * 2)
    return parquet(folder / "many")


def other_test_shape(folder: Path) -> Data:
    train = write(folder / "train.parquet", vectors(10), [0, 1] * 5)
    test = write(folder / "test.parquet", vectors(10, width=5), [0, 1] * 5)
    return parquet(train).model_copy(update={"test": Parquet(path=str(test), input="x", label="y")})


IMAGES = [png(np.full((4, 4, 3), shade, np.uint8)) for shade in range(10)]
LABELS = [0, 1] * 5
NAN = [[1.0, 2.0]] * 6 + [[1.0, float("nan")]] + [[1.0, 2.0]] * 3

REFUSALS: dict[str, tuple[Maker, list[str]]] = {
    "no such file": (lambda folder: parquet(folder / "dat.parquet"), ["no Parquet file", "near.parquet"]),
    "glob of nothing": (lambda folder: parquet(folder / "*.csv"), ["no Parquet file"]),
    "not Parquet": (not_parquet, ["cannot be read as Parquet", "data.parquet"]),
    "truncated": (truncated, ["cannot be read as Parquet"]),
    "damaged": (damaged, ["data.parquet is damaged"]),
    "missing column": (missing_column, ["has no column yy", "the columns x, y", "set `label` to y"]),
    "text labels": (refused(vectors(10), ["a", "b"] * 5), ["column y", "cannot be the label", "string"]),
    "float labels": (refused(vectors(10), [0.5, 1.0] * 5), ["column y", "cannot be the label", "double"]),
    "text inputs": (refused(["a"] * 10, LABELS), ["column x", "cannot be the input", "string"]),
    "no rows": (refused(vectors(0), pa.array([], pa.int64())), ["has no rows"]),
    "too few rows": (refused(vectors(2), [0, 1]), ["no rows are left for validation and test"]),
    "null label": (refused(vectors(10), [0, 1, None, 1, 0] * 2), ["no value in column y, row 2 of", "null"]),
    "null input": (refused(pa.array([None, *IMAGES[1:]]), LABELS), ["no value in column x, row 0 of"]),
    "negative label": (in_second_file, ["label out of range in row 13 of", "(b.parquet, row 3)", "-3", "1 more"]),
    "label of no class": (refused(vectors(10), [0, 1, 2, 3, 4] * 2, classes=4), ["row 4 of", "got: 4", "0 to 3"]),
    "enormous label": (refused(vectors(10), [0] * 9 + [2**31]), ["row 9 of", "2147483648", "set `classes`"]),
    "unsigned label": (refused(vectors(2), pa.array([0, 2**63], pa.uint64())), ["label out of range among row 0"]),
    "not an image": (refused([*IMAGES[:7], b"GIF89a", *IMAGES[8:]], LABELS), ["row 7 of", "cannot be decoded"]),
    "cut image": (refused([*IMAGES[:3], IMAGES[3][:-30], *IMAGES[4:]], LABELS), ["row 3 of", "cannot be decoded"]),
    "deep image": (refused([png(np.zeros((4, 4), np.uint16))] * 10, LABELS), ["row 0 of", "8 bits"]),
    "sizes": (
        refused([*IMAGES[:5], png(np.zeros((4, 5, 3), np.uint8)), *IMAGES[6:]], LABELS),
        ["row 5 of", "[3, 4, 5]", "[3, 4, 4]"],
    ),
    "colour among grey": (
        refused([png(np.zeros((4, 4), np.uint8))] * 5 + IMAGES[5:], LABELS),
        ["row 5 of", "[3, 4, 4]"],
    ),
    "shape of images": (refused(IMAGES, LABELS, shape=[3, 8, 8]), ["row 0 of", "`shape` says"]),
    "lengths": (refused(pa.array([[1.0, 2.0]] * 4 + [[1.0]] * 6), LABELS), ["row 4 of", "another shape"]),
    "shape of lists": (refused(vectors(10), LABELS, shape=[2, 3]), ["row 0 of", "[4]", "[2, 3]"]),
    "not a number": (refused(pa.array(NAN), LABELS), ["row 6 of", "column x", "not finite"]),
    "null number": (refused(pa.array([[1, None]] * 10, pa.list_(pa.uint8())), LABELS), ["row 0 of", "not finite"]),
    "beyond float32": (refused(pa.array([[1e300]] * 10), LABELS), ["row 0 of", "not finite"]),
    "other test shape": (other_test_shape, ["data.test", "float32 [5]", "float32 [4]"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, tmp_path: Path, cache_root: Path) -> None:
    write(tmp_path / "near.parquet", vectors(10), LABELS)
    make, words = REFUSALS[case]
    with pytest.raises(RefusedError) as caught:
        prepare(make(tmp_path), cache_root)
    assert caught.value.code == 4
    for word in words:
        assert word in str(caught.value)
    assert not list(cache_root.glob("rows/*/index.json"))
    assert not list(cache_root.glob("rows/*.partial"))
