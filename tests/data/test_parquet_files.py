"""A path of Parquet: what is taken, what is left out, what is refused, as the tables of docs/reference/data.md say.

What is taken is compared with what pyarrow.dataset reads of the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data.parquet_files import find_parquet
from akd_dist.data.prepare import open_sources
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.sources.parquet import column_names
from akd_dist.recipe import ByteText, DataSpec, Parquet

ROWS = 4  # of a file


def write(path: Path, number: int, *, label: bool = True, **columns: Any) -> Path:
    """A file whose rows can be told from those of other numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = pa.array([[float(number * ROWS + row)] for row in range(ROWS)], pa.list_(pa.float32()))
    labels = {"y": [0, 1] * (ROWS // 2)} if label else {}
    pq.write_table(pa.table({"x": inputs, **labels, **columns}), path)
    return path


def read(path: Path | str, cache_root: Path, **options: Any) -> Splits:
    """All rows of a path, as the train rows."""
    spec = Parquet(path=str(path), input="x", label="y")
    return prepare(DataSpec(train=spec, validation=spec, test=spec, **options), cache_root)


def numbers(splits: Splits) -> list[int]:
    """Which files were read, in the order of their rows."""
    found = splits.train.inputs[:, 0].astype(int)
    assert found.tolist() == [first + row for first in found[::ROWS].tolist() for row in range(ROWS)]
    return [int(first) // ROWS for first in found[::ROWS]]


Lay = Callable[[Path], object]
"""Lays something into a folder that holds a.parquet, which is file 0, and z.parquet, which is file 9."""


def foreign(name: str, content: bytes = b"a line\n") -> Lay:
    def lay(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return lay


def parquet(name: str) -> Lay:
    return lambda folder: write(folder / name, 1)


def half(name: str) -> Lay:
    def lay(folder: Path) -> None:
        whole = write(folder / name, 1)
        whole.write_bytes(whole.read_bytes()[:-20])

    return lay


def linked(name: str, to: str) -> Lay:
    """A link to something beside the folder: a file of number 1, alone or in a folder."""

    def lay(folder: Path) -> None:
        write(folder.parent / "elsewhere" / "one.parquet", 1)
        (folder / name).symlink_to(folder.parent / to)

    return lay


TAKEN: dict[str, tuple[Lay, list[int]]] = {
    "in a folder": (parquet("more/m.parquet"), [0, 1, 9]),
    "a folder called .parquet": (parquet("b.parquet/m.parquet"), [0, 1, 9]),
    "another suffix": (parquet("b.parq"), [0, 1, 9]),
    "no suffix": (parquet("part-00000"), [0, 1, 9]),
    "another suffix yet": (parquet("b.parquet.gzip"), [0, 1, 9]),
    "a link to a file": (linked("b.parquet", "elsewhere/one.parquet"), [0, 1, 9]),
    "a link to a folder": (linked("b", "elsewhere"), [0, 1, 9]),
    "no rows": (lambda f: pq.write_table(pq.read_table(f / "a.parquet").slice(0, 0), f / "b.parquet"), [0, 9]),
}
LEFT_OUT: dict[str, tuple[Lay, str | None]] = {
    "_SUCCESS": (foreign("_SUCCESS", b""), None),
    "_metadata": (parquet("_metadata"), None),
    "a checksum of Spark": (foreign(".b.parquet.crc"), None),
    "a folder of Spark": (parquet("_temporary/0/b.parquet"), None),
    "a checkpoint of a notebook": (parquet(".ipynb_checkpoints/b-checkpoint.parquet"), None),
    "a resource fork": (foreign("._b.parquet"), None),
    "a copy of rsync": (half(".b.parquet.Xy12Zz"), None),
    "a readme": (foreign("README.md"), "README.md"),
    "a table of text": (foreign("b.csv"), "b.csv"),
    "a notebook": (foreign("b.ipynb"), "b.ipynb"),
    "a marker": (foreign("more_$folder$", b""), "more_$folder$"),
    "a checksum": (foreign("more/b.parquet.md5"), "more/b.parquet.md5"),
    "a link to nothing": (lambda f: (f / "b.parquet").symlink_to(f / "gone.parquet"), None),
}
REFUSED: dict[str, tuple[Lay, list[str]]] = {
    "nothing in it": (foreign("b.parquet", b""), ["b.parquet cannot be read as Parquet", "copied whole"]),
    "half a file": (half("b.parquet"), ["b.parquet cannot be read as Parquet"]),
    "half a file without a suffix": (half("b"), ["b cannot be read as Parquet"]),
    "a download of Firefox": (half("b.parquet.part"), ["looks like a copy", "ends in .part", "wait for the copy"]),
    "a download of Chrome": (half("Unconfirmed 1.crdownload"), ["looks like a copy", "ends in .crdownload"]),
    "a download that has not begun": (foreign("b.parquet.crdownload", b""), ["looks like a copy"]),
    "the copy of an editor": (parquet("a.parquet~"), ["looks like a copy", "ends in ~", "a glob such as *.parquet"]),
    "a copy to be sure": (parquet("a.parquet.bak"), ["looks like a copy", "ends in .bak"]),
    "compressed": (foreign("b.parquet.zst", b"\x28\xb5\x2f\xfd"), ["b.parquet.zst is not Parquet", "unpack it"]),
    "a circle": (lambda f: (f / "up").symlink_to(f), ["links lead in a circle", "remove the link"]),
    "no UTF-8 in a value": (parquet("k=%FF/b.parquet"), ["cannot be listed", "%FF"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "rows" / "a.parquet", 0)
    write(tmp_path / "rows" / "z.parquet", 9)
    return tmp_path / "rows"


def of_pyarrow(folder: Path) -> list[float]:
    """The same folder as pyarrow reads it, without what it cannot read."""
    table = ds.dataset(folder, partitioning="hive", exclude_invalid_files=True).to_table()
    return sorted(value for [value] in table["x"].to_pylist())


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str, folder: Path, tmp_path: Path) -> None:
    lay, expected = TAKEN[case]
    lay(folder)
    splits = read(folder, tmp_path / "cache")
    assert numbers(splits) == expected
    assert sorted(splits.train.inputs[:, 0].tolist()) == of_pyarrow(folder)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out_and_told_if_it_may_have_been_meant(case: str, folder: Path, tmp_path: Path) -> None:
    lay, told = LEFT_OUT[case]
    lay(folder)
    splits = read(folder, tmp_path / "cache")
    assert numbers(splits) == [0, 9]
    if case != "a link to nothing":  # that makes pyarrow fail where it looks into files
        assert sorted(splits.train.inputs[:, 0].tolist()) == of_pyarrow(folder)
    lines = [line for line in splits.findings if "left out" in line]
    assert lines == ([f"left out of {folder}, as they hold no Parquet: {told}"] if told else [])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folder: Path, tmp_path: Path) -> None:
    lay, words = REFUSED[case]
    lay(folder)
    with pytest.raises(RefusedError) as caught:
        read(folder, tmp_path / "cache")
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.glob("cache/rows/*/index.json"))


def test_files_that_are_encrypted_are_refused(tmp_path: Path) -> None:
    """What a footer that nobody can read looks like."""
    path = write(tmp_path / "rows" / "a.parquet", 0)
    path.write_bytes(b"PARE" + path.read_bytes()[4:-4] + b"PARE")
    with pytest.raises(RefusedError, match=r"a\.parquet cannot be read as Parquet"):
        read(tmp_path / "rows", tmp_path / "cache")


def test_what_is_there_is_named_where_nothing_is_taken(tmp_path: Path) -> None:
    foreign("rows/b.csv")(tmp_path)
    foreign("rows/_c.parquet")(tmp_path)
    with pytest.raises(RefusedError, match="no Parquet file at") as refused:
        read(tmp_path / "rows", tmp_path / "cache")
    assert refused.value.got == "a folder with other files: b.csv; names that begin with . or _ are skipped"
    assert "from the recipe's folder, or from the working folder if --set gives it" in str(refused.value.next)


def test_rows_are_in_the_order_of_names_folder_by_folder(tmp_path: Path) -> None:
    """As they were before pyarrow looked for the files: it puts a-b/ before a/, as - comes before /."""
    for number, name in enumerate(["a/2.parquet", "a/B/1.parquet", "a/b/1.parquet", "a-b/1.parquet", "a.parquet"]):
        write(tmp_path / "rows" / name, number)
    expected = [str(path) for path in sorted((tmp_path / "rows").rglob("*.parquet"))]
    assert [str(path) for path in find_parquet(str(tmp_path / "rows")).files] == expected
    assert numbers(read(tmp_path / "rows", tmp_path / "cache")) == [0, 1, 2, 3, 4]


GLOBS: dict[str, list[int]] = {
    "*.parquet": [0],
    "**/*.parquet": [0, 1, 3],
    "*/*.parquet": [1, 3],
    "_*.parquet": [2],
    ".hidden/*": [4],
    "[a-b]*": [0],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_wildcards_skip_hidden_names_and_follow_links(pattern: str, tmp_path: Path) -> None:
    for number, name in enumerate(
        ["a.parquet", "k/b.parquet", "_c.parquet", "../other/d.parquet", ".hidden/e.parquet"]
    ):
        write(tmp_path / "rows" / name, number)
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "other")
    assert numbers(read(tmp_path / "rows" / pattern, tmp_path / "cache")) == GLOBS[pattern]


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    for name in ("_rows", "a.parquet~", ".rows.parquet"):
        assert numbers(read(write(tmp_path / name, 3), tmp_path / "cache")) == [3]


# ---- columns in the path


def test_a_label_may_stand_in_the_path(tmp_path: Path) -> None:
    """As pyarrow, Spark and pandas write it."""
    table = pa.table({"x": [[float(row)] for row in range(12)], "y": ["cat", "dog", "an emu/ü"] * 4})
    parts = ds.partitioning(pa.schema([("y", pa.string())]), flavor="hive")
    ds.write_dataset(table, tmp_path / "rows", format="parquet", partitioning=parts)
    for path in (tmp_path / "rows", tmp_path / "rows" / "y=*" / "*.parquet"):
        rows = read(path, tmp_path / "cache").train
        assert rows.class_names == ("an emu/ü", "cat", "dog")
        assert rows.inputs[:, 0].tolist() == [2, 5, 8, 11, 0, 3, 6, 9, 1, 4, 7, 10]
        assert rows.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    [one, *_] = (tmp_path / "rows" / "y=cat").iterdir()
    assert read(one, tmp_path / "cache").train.class_names == ("cat",)
    assert column_names(str(tmp_path / "rows")) == ["x", "y"]


def test_a_column_in_the_path_to_the_folder_names_the_parent(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "y=0" / "more" / "a.parquet", 0, label=False)
    with pytest.raises(RefusedError, match="the column y stands in the path above what is read") as refused:
        read(tmp_path / "rows" / "y=0" / "more", tmp_path / "cache")
    assert refused.value.next == f"set `path` to {tmp_path / 'rows'}"


def test_values_in_paths_have_the_types_of_pyarrow(tmp_path: Path) -> None:
    """Integers if all are: then they are class ids."""
    for number, name in enumerate(["y=0", "y=01", "y=2"]):
        write(tmp_path / "rows" / name / "a.parquet", number, label=False)
    assert read(tmp_path / "rows", tmp_path / "cache").train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    write(tmp_path / "rows" / "y=cat" / "a.parquet", 3, label=False)
    assert read(tmp_path / "rows", tmp_path / "cache").train.class_names == ("0", "01", "2", "cat")


def test_a_text_may_stand_in_the_path_and_all_columns_may(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    for x, y in (("good%20day", 0), ("bad", 1)):
        (path / f"x={x}" / f"y={y}").mkdir(parents=True)
        pq.write_table(pa.table({"other": [1, 2, 3]}), path / f"x={x}" / f"y={y}" / "a.parquet")
    spec = Parquet(path=str(path), input="x", label="y")
    rows = prepare(DataSpec(train=spec, validation=spec, test=spec, text=ByteText(length=12)), tmp_path / "cache").train
    texts = [bytes(token for token in row.tolist() if token < 256).decode() for row in rows.inputs]
    assert texts == ["bad"] * 3 + ["good day"] * 3
    assert rows.labels.tolist() == [1] * 3 + [0] * 3


def test_a_row_without_a_value_in_its_path_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "y=0" / "a.parquet", 0, label=False)
    for place in ("y=__HIVE_DEFAULT_PARTITION__", "other"):
        path = write(tmp_path / "rows" / place / "b.parquet", 1, label=False)
        with pytest.raises(RefusedError, match=r"no value in row \d of .*, column y"):
            read(tmp_path / "rows", tmp_path / "cache")
        path.unlink()


def test_a_column_in_files_and_paths_must_say_the_same(tmp_path: Path) -> None:
    """Of another integer type pyarrow.dataset would refuse even the same; it is one column all the same."""
    for number in range(2):
        write(tmp_path / "rows" / f"y={number}" / "a.parquet", number, label=False, y=[number] * ROWS)
    assert read(tmp_path / "rows", tmp_path / "cache").train.labels.tolist() == [0] * 4 + [1] * 4
    write(tmp_path / "rows" / "y=1" / "a.parquet", 1, label=False, y=[1, 1, 0, 1])
    with pytest.raises(RefusedError, match=r"column y of .*y=1/a.parquet is not what its path says") as refused:
        read(tmp_path / "rows", tmp_path / "cache")
    assert refused.value.expected == "1, as in the path"


def test_columns_in_paths_that_nobody_names_change_nothing(tmp_path: Path) -> None:
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    for number, name in enumerate(["fold=1/a.parquet", "fold=2/a.parquet"]):
        write(deep / name, number)
        write(flat / f"{number}.parquet", number)
    prints = {read(path, tmp_path / "cache").train.fingerprint for path in (flat, deep, deep / "*" / "*")}
    assert len(prints) == 1
    inside = write(tmp_path / "y=7" / "rows.parquet", 0)  # where a file lies is no part of it
    assert read(inside, tmp_path / "cache").train.labels.tolist() == [0, 1, 0, 1]


# ---- schemas that differ, and labels alone


def test_files_may_differ_in_types_and_unnamed_columns(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "a.parquet", 0, z=["text"] * ROWS)
    write(tmp_path / "rows" / "b.parquet", 1, label=False, y=pa.array([1, 0, 1, 0], pa.uint8()))
    assert read(tmp_path / "rows", tmp_path / "cache").train.labels.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]


def test_labels_are_read_without_inputs(tmp_path: Path) -> None:
    """As a stratified split needs them before anything is decoded."""
    write(tmp_path / "rows" / "y=1" / "a.parquet", 0, label=False)
    write(tmp_path / "rows" / "b" / "b.parquet", 1)
    source = kind_of(Parquet(path=str(tmp_path / "rows"), input="x", label="y")).open()
    assert source.label_blocks is not None
    blocks = list(source.label_blocks(3))
    assert all(not block.inputs for block in blocks)
    labels = np.concatenate([block.labels.to_numpy(zero_copy_only=False) for block in blocks])
    assert labels.tolist() == [0, 1, 0, 1, 1, 1, 1, 1]
    assert [row for block in blocks for row in block.rows.tolist()] == list(range(8))


def test_a_file_is_opened_only_where_its_name_leaves_doubt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a command looks for the files; of thousands on a network it must not read them."""
    opened: list[str] = []
    monkeypatch.setattr("builtins.open", lambda name, *_: opened.append(os.fspath(name)))
    assert len(find_parquet(str(folder)).files) == 2
    assert not opened


def test_sources_are_read_as_before_by_pair(tmp_path: Path) -> None:
    """The blocks of rows keep their columns: two of text, and the label that stands in the path."""
    path = tmp_path / "pairs" / "y=1" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"one": ["a", "b"], "two": ["c", "d"]}), path)
    data = DataSpec(
        train=Parquet(path=str(tmp_path / "pairs"), input=["one", "two"], label="y"), text=ByteText(length=8)
    )
    reading = open_sources(data, {"train": kind_of(data.sources["train"])})["train"]
    assert [column.to_pylist() for column in reading.first.inputs] == [["a"], ["c"]]
    assert reading.first.labels.to_pylist() == [1]
