"""Numbered rows: the same arrays from every source and on every machine, or a refusal that names row and column."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import BLOCK_ROWS, SPLITS, Rows, Splits, fingerprint
from akd_dist.data.splitting import split_of_rows, subset_of_rows
from akd_dist.data.text import Tokens
from akd_dist.recipe import DataSpec, Digits, Parquet

DIGITS = DataSpec(train=Digits())


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def png(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, inputs: Any, labels: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": inputs, "y": labels}), path, **options)
    return path


def parquet(path: Path | str, **options: Any) -> DataSpec:
    """Data of one Parquet source whose columns are x and y."""
    return DataSpec(train=Parquet(path=str(path), input="x", label="y", **options), validation=0.2, test=0.2)


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
    index.write_text("[]")
    assert prepare(DIGITS, cache_root).train.fingerprint == first.train.fingerprint


def test_a_killed_preparation_leaves_nothing_that_is_read(cache_root: Path) -> None:
    """Killed while it writes, it leaves a partial folder; the next one removes that and prepares."""
    code = """
import os, sys
from pathlib import Path
from akd_dist.data import row_cache
from akd_dist.recipe import DataSpec, Digits
row_cache._write_index = lambda *_: os.kill(os.getpid(), 9)
row_cache.prepare(DataSpec(train=Digits()), Path(sys.argv[1]))
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
from akd_dist.data import row_cache
from akd_dist.recipe import DataSpec, Digits
print(row_cache.prepare(DataSpec(train=Digits()), Path(sys.argv[1])).test.fingerprint)
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


def some_rows() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(0, 256, (9000, 4), dtype=np.uint8), np.zeros(9000, dtype=np.int64)


def made_of(inputs: np.ndarray, labels: np.ndarray, classes: int = 10, **meaning: Any) -> Rows:
    digest, blocks = fingerprint(inputs, labels, classes, **meaning)
    return Rows(inputs, labels, classes, digest, blocks, Path(), **meaning)


def mutate(what: str, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    match what:
        case "byte":
            inputs[5000, 3] ^= 1
        case "label":
            labels[5000] = 3
        case "swap":
            inputs[[4999, 5000]] = inputs[[5000, 4999]]
        case "drop":
            inputs, labels = np.delete(inputs, 5000, axis=0), np.delete(labels, 5000)
        case "add":
            inputs, labels = np.insert(inputs, 5000, 7, axis=0), np.insert(labels, 5000, 7)
        case "cut":
            inputs, labels = inputs[:BLOCK_ROWS], labels[:BLOCK_ROWS]
    return inputs, labels


@pytest.mark.parametrize("what", ["byte", "label", "swap", "drop", "add", "cut"])
def test_other_rows_are_refused_with_their_first_block(what: str) -> None:
    described = json.loads(json.dumps(made_of(*some_rows()).describe()))
    made_of(*some_rows()).check_same(described)
    with pytest.raises(RefusedError, match="not the one the store was made from") as refused:
        made_of(*mutate(what, *some_rows())).check_same(described)
    inputs = some_rows()[0], mutate(what, *some_rows())[0]
    last = min(2 * BLOCK_ROWS, max(map(len, inputs)))
    told = f"rows {BLOCK_ROWS:,} to {last:,} are the first that differ"
    counts = f", of {len(inputs[1]):,} rows now and {len(inputs[0]):,} before" if what in ("drop", "add", "cut") else ""
    assert str(refused.value.got).endswith(told + counts)


TOKENS = Tokens(vocabulary=300, padding=0)
MEANINGS: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"classes": 11}, "classes: 10 -> 11"),
    "names": ({"class_names": tuple("abcdefghij")}, "class_names: nothing -> ['a', 'b'"),
    "task": ({"task": "regression"}, "task: nothing -> regression"),
    "tokens": ({"tokens": TOKENS}, "tokens.vocabulary: nothing -> 300"),
}


@pytest.mark.parametrize("what", MEANINGS)
def test_the_same_rows_with_another_meaning_are_refused(what: str) -> None:
    changed, told = MEANINGS[what]
    with pytest.raises(RefusedError) as refused:
        made_of(*some_rows(), **changed).check_same(made_of(*some_rows()).describe())
    assert "the rows are the same" in str(refused.value.got)
    assert told in str(refused.value.got)


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_the_fingerprint_changes_with_the_form_of_the_inputs(change: str) -> None:
    inputs, labels = some_rows()
    other = inputs.view(np.int8) if change == "dtype" else inputs.reshape(-1, 2, 2)
    assert fingerprint(inputs, labels, 10)[0] != fingerprint(other, labels, 10)[0]
    assert fingerprint(inputs, labels, 10)[1] == fingerprint(other, labels, 10)[1]


def test_the_fingerprint_is_pinned() -> None:
    """A change here would make every sealed store a store of other data."""
    inputs = np.arange(9000 * 2, dtype=np.float32).reshape(-1, 2)
    assert fingerprint(inputs, np.arange(9000) % 3, 3)[0] == PINNED_FINGERPRINT


PINNED_FINGERPRINT = "1799c7becc8e5291e8c42e9fcb34656baa0265b2cdccce40617f804cb254c832"


def test_a_dataset_is_the_same_however_it_is_written(tmp_path: Path, cache_root: Path) -> None:
    """Another folder, compression, row group size, number of files, or type of integers; changed data is not."""
    inputs, labels = np.random.default_rng(0).random((9000, 3), dtype=np.float32), np.arange(9000) % 7
    column = pa.FixedSizeListArray.from_arrays(pa.array(inputs.reshape(-1)), 3)
    paths = [
        write(tmp_path / "plain.parquet", column, labels, compression="none"),
        write(tmp_path / "elsewhere" / "zstd.parquet", column, labels, compression="zstd", row_group_size=1000),
        write(tmp_path / "tiny.parquet", column, pa.array(labels, pa.uint8()), row_group_size=77, version="1.0"),
    ]
    for part in range(3):
        write(tmp_path / "parts" / f"{part}.parquet", column[part * 3000 :][:3000], labels[part * 3000 :][:3000])
    prepared = [prepare(parquet(path), cache_root) for path in [*paths, tmp_path / "parts"]]
    for split in SPLITS:
        assert len({getattr(splits, split).fingerprint for splits in prepared}) == 1
    labels[[8000, 8001]] = labels[[8001, 8000]]
    other = prepare(parquet(write(tmp_path / "swapped.parquet", column, labels)), cache_root)
    changed = [
        (getattr(other, split), getattr(prepared[0], split))
        for split in SPLITS
        if getattr(other, split).fingerprint != getattr(prepared[0], split).fingerprint
    ]
    assert changed
    for ours, theirs in changed:
        with pytest.raises(RefusedError, match="not the one the store was made from"):
            ours.check_same(theirs.describe())


# ---- a subset


def test_a_subset_keeps_rows_of_train_in_their_order(cache_root: Path) -> None:
    whole = prepare(DIGITS, cache_root)
    few, more = (prepare(DIGITS.model_copy(update={"subset": n}), cache_root) for n in (100, 500))
    assert [len(few.train), len(more.train)] == [100, 500]
    assert few.train.classes == 10
    for name in ("validation", "test"):
        assert getattr(few, name).fingerprint == getattr(whole, name).fingerprint
    places = [position(whole.train, row) for row in few.train.inputs]
    assert places == sorted(places)
    assert set(places) <= {position(whole.train, row) for row in more.train.inputs}
    np.testing.assert_array_equal(few.train.labels, whole.train.labels[places])
    other = prepare(DIGITS.model_copy(update={"subset": 100, "seed": 1, "test": 0.2}), cache_root)
    assert other.train.fingerprint != few.train.fingerprint


def position(rows: Rows, image: np.ndarray) -> int:
    return int(np.flatnonzero((rows.inputs == image).all(axis=(1, 2, 3)))[0])


def test_the_subset_is_pinned() -> None:
    assert np.flatnonzero(subset_of_rows(20, 6, seed=5)).tolist() == PINNED_SUBSET


PINNED_SUBSET = [3, 4, 8, 9, 15, 19]


def test_a_subset_of_more_than_there_is_is_refused(cache_root: Path) -> None:
    with pytest.raises(RefusedError, match="larger than what there is") as refused:
        prepare(DIGITS.model_copy(update={"subset": 1259}), cache_root)
    assert "1,259 of 1,258 train rows" in str(refused.value.got)


def test_rows_outside_of_the_subset_are_not_decoded(tmp_path: Path, cache_root: Path) -> None:
    """They take no time, and no space either."""
    kept = subset_of_rows(10, 4, seed=0)
    images = [png(np.full((4, 4, 3), row, np.uint8)) if row == 0 or kept[row] else b"no image" for row in range(10)]
    train = write(tmp_path / "train.parquet", pa.array(images), [0, 1] * 5)
    test = Parquet(path=str(write(tmp_path / "test.parquet", pa.array(images[:1]), [1])), input="x", label="y")
    data = parquet(train).model_copy(update={"validation": test, "test": test, "subset": 4})
    assert prepare(data, cache_root).train.inputs[:, 0, 0, 0].tolist() == np.flatnonzero(kept).tolist()


# ---- progress


def test_progress_tells_of_each_source_and_fingerprint(cache_root: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(DIGITS, cache_root, on_progress=lambda *what: told.append(what))
    assert [what for what, done, total in told if done == total] == [
        "the rows of data.train",
        "rows in two splits",
        *(f"the fingerprint of the {split} rows" for split in SPLITS),
    ]
    assert {total for what, _, total in told if what == "the rows of data.train"} == {1797}
    prepare(DIGITS, cache_root, on_progress=lambda *_: pytest.fail("they are prepared"))


# ---- Parquet


def test_images_are_decoded_from_bytes_and_structs(tmp_path: Path, cache_root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)
    encoded = [png(image) for image in pixels]
    plain = write(tmp_path / "plain.parquet", pa.array(encoded), [0, 9] * 15)
    struct = write(
        tmp_path / "struct.parquet", pa.array([{"bytes": one, "path": None} for one in encoded]), [0, 9] * 15
    )
    split = split_of_rows(30, 0.2, 0.2, seed=0)
    for path in (plain, struct):
        splits = prepare(parquet(path), cache_root)
        expected = pixels[split == 0].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(splits.train.inputs, expected)
        assert splits.train.classes == 10


def test_images_with_alpha_palette_or_one_bit(tmp_path: Path, cache_root: Path) -> None:
    coloured = [png(np.full((4, 4, 4), 51, np.uint8)), png(np.full((4, 4, 3), 51, np.uint8), mode="P")] * 5
    path = write(tmp_path / "colour.parquet", coloured, [0, 1] * 5)
    values = together(prepare(parquet(path), cache_root))
    assert set(np.unique(values).tolist()) == {51, 214}  # with an alpha of a fifth: a fifth of 51 and four of white
    path = write(tmp_path / "grey.parquet", [png(np.full((4, 4), 255, np.uint8), mode="1")] * 10, [0, 1] * 5)
    splits = prepare(parquet(path), cache_root)
    assert (splits.train.shape, splits.train.inputs.max()) == ((1, 4, 4), 255)


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
        (pa.list_(pa.uint8(), 4), np.uint8),
        (pa.list_(pa.float16()), np.float32),
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


@pytest.mark.parametrize("inner", [pa.list_(pa.uint8()), pa.list_(pa.uint8(), 2)], ids=str)
def test_nested_lists_have_a_shape_of_their_own(inner: Any, tmp_path: Path, cache_root: Path) -> None:
    values = np.arange(60, dtype=np.uint8).reshape(10, 3, 2)
    path = write(tmp_path / "lists.parquet", pa.array(values.tolist(), pa.list_(inner)), [0, 1] * 5)
    splits = prepare(parquet(path), cache_root)
    np.testing.assert_array_equal(splits.train.inputs, values[split_of_rows(10, 0.2, 0.2, seed=0) == 0])


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


@pytest.mark.parametrize("groups", [1, 40])
@pytest.mark.parametrize("kind", ["images", "numbers"])
def test_memory_is_bounded_however_large_the_source(kind: str, groups: int, tmp_path: Path, cache_root: Path) -> None:
    """Four threads prepare more than 240 MB in a few blocks' memory, from one huge row group or from many."""
    rows = 16_000 if kind == "images" else 240_000
    if kind == "images":  # 16 kB stored, 3 kB decoded
        column = pa.array([IMAGE + bytes(16_000)] * rows)
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 256, dtype=np.float32)), 256)
    options = {"row_group_size": rows // groups, "use_dictionary": False, "write_batch_size": 64}  # small pages
    path = write(tmp_path / "large.parquet", column, np.arange(rows) % 10, **options)
    del column
    code = f"""
import tracemalloc, pyarrow
from pathlib import Path
from akd_dist.data import prepare, row_cache, rows
from akd_dist.recipe import DataSpec, Parquet
prepare.default_threads = rows.default_threads = lambda: 4
tracemalloc.start()
row_cache.prepare(DataSpec(train=Parquet(path={str(path)!r}, input="x", label="y")), Path({str(cache_root)!r}))
print(tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 70e6


IMAGE = png(np.zeros((32, 32, 3), np.uint8))
