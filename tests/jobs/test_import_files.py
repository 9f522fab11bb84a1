"""Files of logits of every kind are read alike; what is no such file, or holds something else, is refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from akd_dist.base.errors import RefusedError
from akd_dist.data.parquet_files import find_parquet
from akd_dist.data.source_rows import source_rows
from akd_dist.documents.imported import ImportedDocument
from akd_dist.storage.reader import open_store
from tests.imported_logits import CLASSES, LABELS, ROWS, Home, Z, refused

pytestmark = pytest.mark.usefixtures("own_process_state")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def imported(home: Home) -> ImportedDocument:
    """All rows of the source, as .npy."""
    return home.bring(home.save(Z, "all.npy"))


def _npz(path: Path) -> None:
    np.savez_compressed(path, logits=Z, other=np.arange(3))


def _safetensors(path: Path) -> None:
    save_file({"z": Z}, path)


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"logits": pa.FixedSizeListArray.from_arrays(Z.ravel(), CLASSES)}), path)


def _columns(path: Path) -> None:
    pq.write_table(pa.table({f"logit_{one}": Z[:, one] for one in reversed(range(CLASSES))}), path)


def _zarr(path: Path, version: Any, shards: Any = None) -> None:
    array = zarr.create_array(path, shape=Z.shape, chunks=(70, 3), shards=shards, dtype="f4", zarr_format=version)
    array[:] = Z


SAVED: dict[str, Callable[[Path], None]] = {
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(Z)),
    "big-endian.npy": lambda path: np.save(path, Z.astype(">f4")),
    "three.npy": lambda path: np.save(path, Z[None]),
    "z.npz": _npz,
    "z.safetensors": _safetensors,
    "lists.parquet": _parquet,
    "columns.parquet": _columns,
    "v2.zarr": lambda path: _zarr(path, 2),
    "v3.zarr": lambda path: _zarr(path, 3),
    "sharded.zarr": lambda path: _zarr(path, 3, (140, 6)),
    "group.zarr": lambda path: _zarr(path / "logits", 3),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_kind_of_file_is_the_same_store(home: Home, imported: ImportedDocument, name: str) -> None:
    SAVED[name](home.root / name)
    if name == "group.zarr":
        zarr.open_group(home.root / name)
    again = home.bring(home.root / name)
    assert [part.id for part in again.splits.values()] == [part.id for part in imported.splits.values()]
    assert all(part.hit for part in again.splits.values())


def test_bfloat16_is_read(home: Home) -> None:
    save_tensors({"logits": torch.from_numpy(Z).bfloat16()}, home.root / "b.safetensors")
    found = home.bring(home.root / "b.safetensors")
    rows = source_rows(home.recipe().data)["train"].rows
    stored = open_store(found.splits["train"].store).rows(0, 0, len(rows))
    assert np.array_equal(stored, torch.from_numpy(Z).bfloat16().float().numpy()[rows])
    assert found.dtype == "bfloat16"


def test_the_parts_of_a_folder_have_the_same_columns(home: Home, imported: ImportedDocument) -> None:
    folder = home.root / "parts"
    (folder / "more").mkdir(parents=True)

    def part(name: str, rows: slice, kind: Any = np.float32, prefix: str = "logit_") -> None:
        columns = {f"{prefix}{one}": Z[rows, one].astype(kind) for one in range(CLASSES)}
        pq.write_table(pa.table(columns), folder / name)

    ordered = ["more/0.parquet", "part-02.parquet", "part-10.parquet"]
    for name, rows in zip(ordered, (slice(0, 0), slice(0, 300), slice(300, ROWS)), strict=True):
        part(name, rows)
    assert [str(one).removeprefix(f"{folder}/") for one in find_parquet(str(folder)).files] == ordered
    part("part-10.parquet", slice(300, ROWS), np.float64)
    assert home.bring(folder).teacher == imported.teacher
    part("part-10.parquet", slice(300, ROWS), np.int64)
    with pytest.raises(RefusedError, match=r"part-10\.parquet: column logit_0 holds no floats"):
        home.bring(folder)
    part("part-10.parquet", slice(300, ROWS), prefix="z")
    with pytest.raises(RefusedError, match=r"part-10\.parquet"):
        home.bring(folder)


def test_shapes_that_do_not_fit_say_what_they_seem_to_be(home: Home) -> None:
    assert "transposed" in refused(home, Z.T)
    assert "views come first" in refused(home, Z[:, None])
    assert "10 classes" not in refused(home, Z[:, :3])
    assert "all rows of the source" in refused(home, Z[:-1])
    assert "class id" in refused(home, Z[:, 0])
    assert "other views" in refused(home, np.stack([Z, Z]))


def test_numbers_that_are_no_logits_are_refused(home: Home) -> None:
    soft = np.exp(Z - Z.max(1, keepdims=True))
    soft /= soft.sum(1, keepdims=True)
    assert "holds probabilities" in refused(home, soft)
    assert "holds labels" in refused(home, np.eye(CLASSES, dtype=np.float32)[LABELS])
    assert "holds no floats" in refused(home, LABELS)
    assert "holds no floats" in refused(home, (Z * 10).astype(np.int8))
    assert "does not hold log-probabilities" in refused(home, Z, kind="log_probabilities")
    half = Z.copy()
    half[300:] = 0
    assert "500 of 800 rows" in refused(home, half)
    for value, told in ((np.nan, "NaN in view 0, row 77, class 2"), (np.inf, "infinity")):
        bad = Z.copy()
        bad[77, 2] = value
        assert told in refused(home, bad)
    huge = Z.astype(np.float64)
    huge[3, 1] = 1e300
    assert "more than float32 can hold" in refused(home, huge)


def _bomb(path: Path) -> None:
    """A header of the right shape before a thousand times as many bytes."""
    np.savez_compressed(path, logits=Z)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        head = zipfile.ZipFile(path).read("logits.npy")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", head + bytes(50_000_000))


def _cut(path: Path) -> None:
    np.save(path, Z)
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(path: Path) -> None:
    np.save(path, np.array([[1.0], [2.0, 3.0], 4], dtype=object), allow_pickle=True)


def _nulls(path: Path) -> None:
    values: list[Any] = [list(map(float, row)) for row in Z]
    values[5] = None
    pq.write_table(pa.table({"logits": values}), path)


def _ragged(path: Path) -> None:
    pq.write_table(pa.table({"logits": [list(map(float, row)) for row in Z[:-1]] + [[1.0]]}), path)


def _holes(path: Path) -> None:
    _zarr(path, 3)
    (path / "c" / "3" / "0").unlink()


def _inner_hole(path: Path) -> None:
    """A shard whose part of a class was never written: no listing tells."""
    with zarr.config.set({"array.write_empty_chunks": False}):
        array = zarr.create_array(path, shape=Z.shape, chunks=(70, 1), shards=(140, 4), dtype="f4", fill_value=0)
        array[:] = np.where(np.arange(CLASSES) == 2, 0, Z)


def _leading_out(path: Path) -> None:
    _zarr(path, 3)
    outside = path.parent / "outside"
    (path / "c" / "0" / "0").rename(outside)
    (path / "c" / "0" / "0").symlink_to(outside)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty.npy": (lambda path: path.touch(), "is empty"),
    "cut.npy": (_cut, "cannot be read as a NumPy array"),
    "pickled.npy": (_pickled, "never unpickled"),
    "a.pt": (lambda path: torch.save({"a": torch.zeros(1)}, path), "a pickle, which could run code"),
    "a.pkl": (lambda path: path.write_bytes(b"\x80\x04."), "a pickle, which could run code"),
    "a.txt": (lambda path: path.write_text("1 2 3"), "no file of logits that is read"),
    "bomb.npz": (_bomb, "bytes for an array of shape"),
    "two.npz": (lambda path: np.savez(path, a=Z, b=Z), "several arrays"),
    "cut.safetensors": (lambda path: path.write_bytes(b'\x40\0\0\0\0\0\0\0{"a":'), "as a safetensors file"),
    "nulls.parquet": (_nulls, "row 5"),
    "ragged.parquet": (_ragged, "row 799 has 1"),
    "gap.parquet": (
        lambda path: pq.write_table(pa.table({"logit_0": [1.0], "logit_2": [1.0]}), path),
        "lacks a column",
    ),
    "text.parquet": (lambda path: pq.write_table(pa.table({"logits": [["1"], ["2"]]}), path), "holds no floats"),
    "holes.zarr": (_holes, "chunks of it are missing"),
    "inner.zarr": (_inner_hole, "not finite"),
    "link.zarr": (_leading_out, "leads out of the folder"),
    "integers.zarr": (lambda path: zarr.create_array(path, shape=(3, 3), dtype="i4"), "holds no floats"),
    "folder": (lambda path: path.mkdir(), "without logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(home: Home, tmp_path: Path, name: str) -> None:
    make, told = BAD[name]
    make(tmp_path / name)
    with pytest.raises(RefusedError) as caught:
        home.bring(tmp_path / name, stores="none", key=None)
    assert told in str(caught.value)
    assert name in str(caught.value)


def test_a_file_that_is_not_there_or_far_away_is_refused(home: Home) -> None:
    with pytest.raises(RefusedError, match="there is no file of logits"):
        home.bring(home.root / "nothing.npy")
    with pytest.raises(RefusedError, match="copy the file here first"):
        home.bring("s3://bucket/logits.npy")
