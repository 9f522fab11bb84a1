"""Train rows without labels: where they come from, that they follow those with labels, and what is refused."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from akd_dist.base.errors import RefusedError
from akd_dist.data import row_blocks, row_store, rows
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import fetch_rows
from akd_dist.data.row_store import RowsPlan, Take, ensure_rows
from akd_dist.data.rows import Rows, Splits
from akd_dist.data.splitting import subset_of_rows
from akd_dist.recipe import DataSpec, Idx, Parquet

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(150, 3)).astype(np.float32)
LABELS = RNG.integers(3, size=150)


def table(folder: Path, name: str, rows: slice, label: Any = None, column: str = "label") -> Parquet:
    """Some of the rows as Parquet; without a column of labels if there are none."""
    columns: dict[str, Any] = {"input": list(VECTORS[rows])}
    if label is not None:
        columns[column] = label
    pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=20)
    return Parquet(path=str(folder / f"{name}.parquet"))


def four_tables(folder: Path) -> DataSpec:
    """50 train rows with labels, 60 without, and 20 each to validate and test."""
    return DataSpec(
        train=table(folder, "train", slice(50), LABELS[:50]),
        validation=table(folder, "validation", slice(50, 70), LABELS[50:70]),
        test=table(folder, "test", slice(70, 90), LABELS[70:90]),
        unlabelled=table(folder, "unlabelled", slice(90, 150)),
    )


def no_train(folder: Path) -> DataSpec:
    return DataSpec.model_validate(four_tables(folder).model_dump() | {"train": None})


def rest(folder: Path) -> DataSpec:
    data = four_tables(folder)
    return DataSpec(train=data.train, validation=0.2, test=0.2, subset=7, unlabelled="rest")


def missing(folder: Path) -> DataSpec:
    labels = [None if row % 3 == 0 else int(label) for row, label in enumerate(LABELS)]
    return DataSpec(
        train=table(folder, "some", slice(150), pa.array(labels)), validation=0.2, test=0.2, unlabelled="missing"
    )


def numbers_missing(folder: Path) -> DataSpec:
    labels = np.where(np.arange(150) % 3 == 0, np.nan, LABELS).astype(np.float32)
    train = table(folder, "numbers", slice(150), labels)
    return DataSpec(train=train, validation=0.2, test=0.2, unlabelled="missing", task="regression")


def pictures(folder: Path) -> DataSpec:
    """PNGs that stay encoded in prepared rows."""
    made = []
    for pixels in np.random.default_rng(1).integers(256, size=(60, 6, 6)).astype(np.uint8):
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        made.append(file.getvalue())
    pq.write_table(pa.table({"input": made, "label": LABELS[:60]}), folder / "pictures.parquet")
    return DataSpec.model_validate(
        {
            "train": {"kind": "parquet", "path": str(folder / "pictures.parquet")},
            "validation": 0.2,
            "test": 0.2,
            "subset": 10,
            "unlabelled": "rest",
            "image": {"size": 6, "keep": "encoded"},
        }
    )


KINDS: dict[str, Callable[[Path], DataSpec]] = {
    "a source": four_tables,
    "all": no_train,
    "rest": rest,
    "missing": missing,
    "numbers": numbers_missing,
    "encoded": pictures,
}


def check(train: Rows, labelled: int, unlabelled: int) -> None:
    assert (train.labelled, train.unlabelled, len(train)) == (labelled, unlabelled, labelled + unlabelled)
    known = ~np.isnan(train.labels) if train.task == "regression" else train.labels >= 0
    assert known.tolist() == [True] * labelled + [False] * unlabelled
    assert train.describe()["labelled"] == labelled


def test_a_source_of_its_own_follows_the_labelled_rows(tmp_path: Path) -> None:
    splits = prepare(four_tables(tmp_path), tmp_path / "cache")
    check(splits.train, 50, 60)
    np.testing.assert_array_equal(splits.train.inputs, np.concatenate([VECTORS[:50], VECTORS[90:]]))
    np.testing.assert_array_equal(splits.train.labels[:50], LABELS[:50])
    assert splits.train.class_counts().tolist() == np.bincount(LABELS[:50]).tolist()
    assert "60 of 110 train rows have no label: they are learned from the teacher" in splits.findings
    again = prepare(four_tables(tmp_path), tmp_path / "cache", again=True)
    assert again.fingerprints == splits.fingerprints


def test_a_column_of_labels_there_is_not_read(tmp_path: Path) -> None:
    data = four_tables(tmp_path)
    expected = prepare(data, tmp_path / "cache").fingerprints
    table(tmp_path, "unlabelled", slice(90, 150), ["what", "ever"] * 30)
    assert prepare(data, tmp_path / "cache").fingerprints == expected


def test_no_row_with_a_label(tmp_path: Path) -> None:
    splits = prepare(no_train(tmp_path), tmp_path / "cache")
    check(splits.train, 0, 60)
    assert splits.train.classes == 3
    np.testing.assert_array_equal(splits.validation.labels, LABELS[50:70])


def test_the_rest_of_a_subset(tmp_path: Path) -> None:
    data = rest(tmp_path)
    all_rows = prepare(data.model_copy(update={"subset": None, "unlabelled": None}), tmp_path / "cache")
    splits = prepare(data, tmp_path / "cache")
    check(splits.train, 7, 23)
    chosen = subset_of_rows(30, 7, data.seed)
    order = np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])
    np.testing.assert_array_equal(splits.train.inputs, all_rows.train.inputs[order])
    np.testing.assert_array_equal(splits.train.labels[:7], all_rows.train.labels[order[:7]])
    assert splits.test.fingerprint == all_rows.test.fingerprint


def labels_as(kind: str) -> Any:
    """The labels of all rows in which each third is missing, as people have them."""
    gone = np.arange(150) % 3 == 0
    match kind:
        case "null":
            return pa.array(LABELS, mask=gone)
        case "-1":
            return np.where(gone, -1, LABELS)
        case "NaN":  # what pandas makes of class ids
            return np.where(gone, np.nan, LABELS)
        case _:
            return pa.array([None if out else f"class {one}" for one, out in zip(LABELS, gone, strict=True)])


@pytest.mark.parametrize("kind", ["null", "-1", "NaN", "names"])
def test_missing_labels(tmp_path: Path, kind: str) -> None:
    """Shares are taken of the rows with labels alone."""
    data = DataSpec(
        train=table(tmp_path, "some", slice(150), labels_as(kind)), validation=0.2, test=0.2, unlabelled="missing"
    )
    splits = prepare(data, tmp_path / "cache")
    check(splits.train, 60, 50)
    assert (len(splits.validation), len(splits.test)) == (20, 20)
    np.testing.assert_array_equal(splits.train.inputs[60:], VECTORS[::3])
    known = {VECTORS[row].tobytes(): int(LABELS[row]) for row in range(150)}
    for part in (splits.validation, splits.test):
        assert [known[one.tobytes()] for one in part.inputs] == part.labels.tolist()
    assert [known[one.tobytes()] for one in splits.train.inputs[:60]] == splits.train.labels[:60].tolist()


def test_images_alone(tmp_path: Path) -> None:
    images = RNG.integers(256, size=(20, 4, 4)).astype(np.uint8)

    def write(name: str, values: np.ndarray) -> str:
        head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / name).write_bytes(gzip.compress(head + values.tobytes()))
        return str(tmp_path / name)

    train = Idx(images=write("images", images[:12]), labels=write("labels", np.arange(12, dtype=np.uint8) % 2))
    data = DataSpec(train=train, validation=0.2, test=0.2, unlabelled=Idx(images=write("others", images[12:])))
    splits = prepare(data, tmp_path / "cache")
    check(splits.train, 8, 8)
    np.testing.assert_array_equal(splits.train.inputs[8:, 0], images[12:])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_cluster_are_the_same_rows(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows: rows with labels end within one."""
    for module in (rows, row_store):
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr("akd_dist.data.row_entry.BLOCK_ROWS", 16)
    seen = []

    def compute(plan: RowsPlan, take: Take) -> None:
        for run in plan.runs:
            seen.append(run)
            take(row_blocks.write_run(plan.job, run))

    data = KINDS[kind](tmp_path)
    here = prepare(data, tmp_path / "cache")
    sealed = ensure_rows(data, str(tmp_path / "stores"), compute).sealed
    there: Splits = fetch_rows(sealed, tmp_path / "other")
    assert there.fingerprints == here.fingerprints
    assert there.findings == here.findings
    assert there.train.describe() == here.train.describe()
    np.testing.assert_array_equal(there.train.labels, here.train.labels)
    np.testing.assert_array_equal(
        there.train.inputs.take(np.arange(20), axis=0), here.train.inputs.take(np.arange(20), axis=0)
    )
    assert (there.train.labelled, there.train.unlabelled) == (here.train.labelled, here.train.unlabelled)
    across = [run for run in seen if len(run.stretches) == 2]
    assert [run.numbers for run in across] == [(here.train.labelled // 16,)] * (kind != "all")
    if here.train.task == "classification":
        assert there.train.class_counts().tolist() == here.train.class_counts().tolist()


def refused(data: DataSpec, folder: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        prepare(data, folder / "cache")
    return str(caught.value)


def test_inputs_of_another_shape(tmp_path: Path) -> None:
    data = four_tables(tmp_path)
    pq.write_table(pa.table({"input": [[1.0, 2.0]] * 4}), tmp_path / "unlabelled.parquet")
    assert "the inputs of data.unlabelled are not like those of data.train" in refused(data, tmp_path)


def test_missing_labels_that_nobody_spoke_of(tmp_path: Path) -> None:
    for kind in ("null", "-1", "NaN", "names"):
        data = DataSpec(train=table(tmp_path, kind, slice(150), labels_as(kind)))
        assert "set data.unlabelled: missing" in refused(data, tmp_path), kind


def test_labels_that_are_all_missing(tmp_path: Path) -> None:
    train = table(tmp_path, "none", slice(150), np.full(150, -1))
    message = refused(DataSpec(train=train, unlabelled="missing"), tmp_path)
    assert "has a label" in message
    assert "leave data.train out" in message


def test_floats_that_are_no_class_ids(tmp_path: Path) -> None:
    train = table(tmp_path, "floats", slice(150), np.where(np.arange(150) == 4, 1.5, LABELS))
    message = refused(DataSpec(train=train, unlabelled="missing"), tmp_path)
    assert "no class id in row 4" in message
    assert "1.5" in message


def test_rows_that_are_tested_on_are_told_of(tmp_path: Path) -> None:
    data = four_tables(tmp_path)
    table(tmp_path, "unlabelled", slice(80, 150))
    found = prepare(data, tmp_path / "cache").findings
    assert "10 of 20 test rows have the very inputs of a train row: they do not show how models do on new rows" in found


def test_none_of_them_is_told(tmp_path: Path) -> None:
    train = table(tmp_path, "whole", slice(150), LABELS)
    found = prepare(DataSpec(train=train, unlabelled="missing"), tmp_path / "cache").findings
    assert "data.unlabelled is given, and every train row has a label" in found
