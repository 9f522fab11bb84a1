"""Rows from object storage: the same as those of the same files in a folder, and what goes wrong in one message."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_store import RowsPlan, Take, ensure_rows
from akd_dist.recipe import ByteText, DataSpec, HuggingFaceData, Idx, Parquet, TextData
from akd_dist.storage.remote import RemoteFile, find_file
from akd_dist.storage.roots import open_root
from tests.sources import idx_bytes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 4, 4), dtype=np.uint8)
LABELS = np.arange(60, dtype=np.uint8) % 3


@pytest.fixture
def place(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{request.node.name.replace('[', '-').replace(']', '')}"


def vectors(start: int, stop: int, **more: Any) -> Any:
    rows = RNG.normal(size=(stop - start, 3)).astype(np.float32)
    return pa.table({"x": pa.array(rows.tolist(), pa.list_(pa.float32())), **more})


def in_folder(folder: Path) -> None:
    """Files of most kinds: Parquet in folders that name a label, beside other things; IDX, plain and compressed."""
    for number, label in enumerate(("cat", "dog", "a dog")):
        (folder / "hive" / f"y={label}".replace(" ", "%20")).mkdir(parents=True)
        for part in range(2):
            file = folder / "hive" / f"y={label}".replace(" ", "%20") / f"part-{part}.parquet"
            pq.write_table(vectors(0, 11 + number), file, row_group_size=4)
    (folder / "hive" / "README.md").write_text("about these rows")
    (folder / "hive" / "_SUCCESS").touch()
    (folder / "flat" / "_old").mkdir(parents=True)
    for name in ("b", "a", "c", "_old/a"):
        pq.write_table(vectors(0, 20, y=pa.array([0, 1] * 10)), folder / "flat" / f"{name}.parquet", row_group_size=7)
    (folder / "images").write_bytes(idx_bytes(IMAGES))
    (folder / "labels").write_bytes(idx_bytes(LABELS))
    (folder / "images.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))


def upload(folder: Path, uri: str) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        open_root(uri).put(str(file.relative_to(folder)), file.read_bytes())


TABLE: dict[str, Any] = {"input": "x", "label": "y"}
DATA: dict[str, Callable[[str], Any]] = {
    "hive": lambda root: Parquet(path=f"{root}/hive", **TABLE),
    "folder": lambda root: Parquet(path=f"{root}/flat/", **TABLE),
    "glob": lambda root: Parquet(path=f"{root}/flat/[ab]*.parquet", **TABLE),
    "deep": lambda root: Parquet(path=f"{root}/**/part-1.parquet", **TABLE),
    "hidden": lambda root: Parquet(path=f"{root}/flat/_old/*", **TABLE),
    "file": lambda root: Parquet(path=f"{root}/flat/c.parquet", **TABLE),
    "idx": lambda root: Idx(images=f"{root}/images", labels=f"{root}/labels"),
    "gzip": lambda root: Idx(images=f"{root}/images.gz", labels=f"{root}/labels"),
}


def loop(plan: RowsPlan, take: Take) -> None:
    for run in plan.runs:
        take(write_run(plan.job, run))


@pytest.mark.parametrize("which", DATA)
def test_rows_are_those_of_the_same_files_in_a_folder(which: str, place: str, tmp_path: Path) -> None:
    in_folder(tmp_path / "data")
    upload(tmp_path / "data", place)
    here, there = (DataSpec(train=DATA[which](root)) for root in (str(tmp_path / "data"), place))
    local, remote = prepare(here, tmp_path / "cache"), prepare(there, tmp_path / "cache")
    assert local.fingerprints == remote.fingerprints
    assert [line.replace(place, str(tmp_path / "data")) for line in remote.findings] == list(local.findings)
    remote.sources.finish()
    sealed = ensure_rows(there, str(tmp_path / "stores"), loop).manifest
    assert {name: split.fingerprint for name, split in sealed.splits.items()} == local.fingerprints


def test_an_object_that_changes_is_noticed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_folder(tmp_path / "data")
    upload(tmp_path / "data", place)
    data, cache = DataSpec(train=DATA["idx"](place)), tmp_path / "cache"
    before = prepare(data, cache)
    open_root(place).put("images", idx_bytes(IMAGES[::-1]))
    assert prepare(data, cache).fingerprints != before.fingerprints
    opened = RemoteFile.open

    def written_meanwhile(file: RemoteFile, buffer: int = 0) -> Any:
        open_root(place).put("images", idx_bytes(IMAGES))
        return opened(file, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFile, "open", written_meanwhile)
        with pytest.raises(RefusedError, match=f"{place}/images was written while it was read"):
            prepare(data, cache, again=True)
    assert prepare(data, cache).fingerprints == before.fingerprints


def test_other_objects_than_planned_are_not_read(place: str, tmp_path: Path) -> None:
    in_folder(tmp_path / "data")
    upload(tmp_path / "data", place)

    def changed(plan: RowsPlan, take: Take) -> None:
        open_root(place).put("images", idx_bytes(IMAGES[::-1]))
        loop(plan, take)

    with pytest.raises(RefusedError, match="not those of the driver"):
        ensure_rows(DataSpec(train=DATA["idx"](place)), str(tmp_path / "stores"), changed)


def test_what_is_not_there_is_told_in_one_message(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(train: Any) -> Any:
        with pytest.raises((RefusedError, MachineError)) as error:
            prepare(DataSpec(train=train), tmp_path)
        return error.value

    missing = refused(Parquet(path=f"{place}/no/*.parquet", **TABLE))
    assert (missing.what, missing.code) == (f"no Parquet file at {place}/no/*.parquet", 4)
    assert refused(Idx(images=f"{place}/no", labels=f"{place}/no")).what == f"no IDX file at {place}/no"
    no_bucket = refused(Parquet(path="s3://akd-no-such-bucket/rows.parquet"))
    assert no_bucket.code == 6
    assert "s3://akd-no-such-bucket" in no_bucket.what
    assert "NoSuchBucket" in str(no_bucket.got)
    assert "rows are not read from http://x/rows" in refused(Parquet(path="http://x/rows")).what
    assert "s3://" in refused(HuggingFaceData(path="s3://bucket/rows")).what
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AKD_DIST_S3_TIMEOUT", "1")
    unreachable = refused(Parquet(path=f"{place}/hive", **TABLE))
    assert unreachable.code == 6
    assert f"{place}/hive" in unreachable.what


def test_a_file_is_read_by_range(place: str) -> None:
    content = bytes(range(256)) * 4
    open_root(place).put("file", content)
    file = find_file(f"{place}/file")
    assert file is not None
    assert (file.size, file.name, find_file(f"{place}/other")) == (1024, "file", None)
    for buffer in (0, 100):
        with file.open(buffer) as opened:
            assert opened.seek(1000) == 1000
            assert opened.read(100) == content[1000:]
            assert opened.read(1) == b""
            opened.seek(-5, 2)
            assert opened.read() == content[-5:]
            assert (opened.seek(3), opened.read(4), opened.tell()) == (3, content[3:7], 7)


@pytest.mark.parametrize("name", ["a.parquet", "lines", "plain", "plain/*.txt"])
def test_documents_are_read_as_from_a_folder(name: str, place: str, tmp_path: Path) -> None:
    place = place.replace("*", "x").replace("/*.txt", "")
    texts = [f"document {number} " * (1 + number % 5) for number in range(40)]
    for folder in ("lines", "plain"):
        (tmp_path / "here" / folder).mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), tmp_path / "here" / "a.parquet", row_group_size=7)
    lines = [f'{{"text": "{text}"}}' for text in texts]
    for part in range(2):
        (tmp_path / "here" / "lines" / f"{part}.jsonl").write_text("\n".join(lines[part::2]))
    for number, text in enumerate(texts):
        (tmp_path / "here" / "plain" / f"{number:02}.txt").write_text(text)
    upload(tmp_path / "here", place)

    def data(root: str) -> DataSpec:
        return DataSpec(train=TextData(path=f"{root}/{name}"), task="language_model", text=ByteText(length=16))

    here = prepare(data(str(tmp_path / "here")), tmp_path / "cache")
    assert prepare(data(place), tmp_path / "cache").fingerprints == here.fingerprints
    sealed = ensure_rows(data(place), str(tmp_path / "stores"), loop)
    assert {split: one.fingerprint for split, one in sealed.manifest.splits.items()} == here.fingerprints
