"""Which row of which file a row of a split was."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.data.row_cache import prepare
from akd_dist.data.source_rows import source_rows
from akd_dist.data.splitting import rows_of_split
from akd_dist.recipe import DataSpec, Digits, ImageFolder, Parquet, WebDataset
from tests.pictures import of_classes, samples, tar


def a_folder(folder: Path, *counts: int) -> Path:
    """Parquet files of so many rows each; an input tells its file and row, and a class is its row modulo 3."""
    folder.mkdir()
    for number, rows in enumerate(counts):
        inputs = [[float(number), float(row)] for row in range(rows)]
        made = pa.table(
            {
                "input": pa.array(inputs, pa.list_(pa.float32(), 2)),
                "label": pa.array([row % 3 for row in range(rows)], pa.int64()),
            }
        )
        pq.write_table(made, folder / f"part-{number}.parquet")
    return folder


def test_rows_of_a_split_are_those_that_were_assigned_to_it_in_order() -> None:
    assigned = np.array([0, 2, 0, 1, 3, 0], dtype=np.uint8)  # 3 is in no split
    assert rows_of_split(assigned, "train").tolist() == [0, 2, 5]
    assert rows_of_split(assigned, "validation").tolist() == [3]
    assert rows_of_split(assigned, "test").tolist() == [1]


@pytest.mark.parametrize("drawn", [{}, {"subset": 20}, {"subset": 20, "stratify": True}])
def test_every_row_of_a_split_is_found_in_its_file(drawn: dict[str, Any], tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "rows", 20, 0, 15, 7)
    data = DataSpec(train=Parquet(path=str(folder)), validation=0.2, test=0.2, seed=3, **drawn)
    splits, found = prepare(data, tmp_path / "cache"), source_rows(data)
    for split, where in found.items():
        rows = getattr(splits, split)
        assert len(where) == len(rows)
        told = [(f"part-{int(one[0])}.parquet", int(one[1])) for one in np.asarray(rows.inputs)]
        assert [(Path(file).name, row) for file, row in map(where.where, range(len(rows)))] == told
        assert where.rows.tolist() == sorted(where.rows.tolist())
    together = np.concatenate([where.rows for where in found.values()])
    assert len(np.unique(together)) == len(together)


def test_splits_of_their_own_source_name_its_files(tmp_path: Path) -> None:
    train, test = a_folder(tmp_path / "train", 30), a_folder(tmp_path / "test", 4, 5)
    data = DataSpec(train=Parquet(path=str(train)), validation=0.2, test=Parquet(path=str(test)))
    found = source_rows(data)
    assert found["test"].files == tuple(str(test / f"part-{number}.parquet") for number in (0, 1))
    assert found["test"].where(6) == (str(test / "part-1.parquet"), 2)
    assert set(found["validation"].files) == {str(train / "part-0.parquet")}


def test_a_source_without_files_is_one_whole() -> None:
    found = source_rows(DataSpec(train=Digits(), validation=0.1, test=0.1))["train"]
    assert len(found.files) == 1
    assert found.where(5)[1] == found.rows[5]
    for row in (-1, len(found), 10_000):
        with pytest.raises(IndexError, match=rf"rows \[{row}\] of 1,437"):
            found.where(row)


def test_rows_of_two_kinds_of_files_are_each_found_as_they_are_known(tmp_path: Path) -> None:
    """Those with labels in a folder of pictures, those without in tar files."""
    folder = of_classes(tmp_path / "pictures", 30)
    tar(tmp_path / "more.tar", samples(range(5)))
    data = DataSpec(
        train=ImageFolder(path=str(folder)), unlabelled=WebDataset(path=str(tmp_path / "more.tar")), validation=0.2
    )
    found = source_rows(data)["train"]
    assert [found.where(row)[1] for row in range(len(found))][-6:] == [0, "0000", "0001", "0002", "0003", "0004"]
    assert found.where(len(found) - 1) == (str(tmp_path / "more.tar"), "0004")


def test_rows_of_pictures_are_found_in_their_files(tmp_path: Path) -> None:
    folder = of_classes(tmp_path / "pictures", 30)
    for number in range(2):
        tar(tmp_path / "shards" / f"{number}.tar", samples(range(number * 10, number * 10 + 10)))
    data = DataSpec(train=ImageFolder(path=str(folder)), test=WebDataset(path=str(tmp_path / "shards"), label="name"))
    found = source_rows(data)
    assert len(found["train"]) == 27
    assert found["test"].where(13) == (str(tmp_path / "shards" / "1.tar"), "0013")
    assert found["test"].file_rows[13] == 3
    assert repr(found["test"]) == f"SourceRows(20 rows of {tmp_path}/shards, in 2 files)"
    for row in (-1, 20):
        with pytest.raises(IndexError, match=rf"rows \[{row}\] of 20"):
            found["test"].where(row)
    together = sorted(found[name].where(row)[0] for name in ("train", "validation") for row in range(len(found[name])))
    assert together == sorted(map(str, folder.rglob("*.jpg")))
