"""Folders of pictures and tar files of them: the rows of the same pictures in Parquet, however they are read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data import blocks, prepare as preparing, row_store, rows
from akd_dist.data.encoded import encoded_of
from akd_dist.data.file_sets import FileSet
from akd_dist.data.keys import key_column
from akd_dist.data.labels import Classes
from akd_dist.data.origins import SourceCheck
from akd_dist.data.picture_files import PictureFiles
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_store import RowsPlan, Take, ensure_rows
from akd_dist.data.rows import Splits
from akd_dist.data.source_rows import source_rows
from akd_dist.data.sources import webdataset
from akd_dist.data.sources.kinds import kind_of
from akd_dist.recipe import DataSpec, Image, ImageFolder, Parquet, RandomResizedCropFlip, WebDataset
from akd_dist.recipe.paths import expand_braces
from akd_dist.storage.roots import open_root
from tests import sources
from tests.pictures import CLASSES, jpeg, of_classes, samples, tar, write

COUNT = 90


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several blocks, and a tar file is several parts."""
    monkeypatch.setattr(preparing, "_READ_ROWS", 4)
    monkeypatch.setattr(webdataset, "_PART_BYTES", 7000)
    for module in (rows, row_store):
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr("akd_dist.data.row_entry.BLOCK_ROWS", 16)


def all_rows(source: Any, cache: Path, **data: Any) -> Splits:
    return prepare(DataSpec(train=source, **data), cache)


def in_parquet(folder: Path, numbers: Sequence[int], labels: Sequence[Any]) -> Parquet:
    table = pa.table({"input": [jpeg(number) for number in numbers], "label": list(labels)})
    return sources.parquet(folder / "as-parquet", table)


def check_same(source: Any, tmp_path: Path, numbers: Sequence[int], labels: Sequence[Any]) -> Splits:
    """The rows of a source are those of a Parquet file of these pictures."""
    made = all_rows(source, tmp_path / "cache")
    expected = all_rows(in_parquet(tmp_path, numbers, labels), tmp_path / "cache")
    assert made.fingerprints == expected.fingerprints
    assert made.train.class_names == expected.train.class_names
    return made


def by_class(count: int = COUNT) -> list[int]:
    """Numbers of pictures in the order of a folder for each class."""
    return sorted(range(count), key=lambda number: (number % 3, number))


def names_of(numbers: Sequence[int]) -> list[str]:
    return [CLASSES[number % 3] for number in numbers]


# ---- folders


def as_torchvision(folder: Path) -> list[tuple[str, str]]:
    """Files and classes as torchvision.datasets.ImageFolder orders them."""
    found = []
    for one in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        for place, _, names in sorted(os.walk(folder / one, followlinks=True)):
            found += [(os.path.relpath(Path(place, name), folder), one) for name in sorted(names)]
    return found


def test_a_folder_for_each_class_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    folder = of_classes(tmp_path / "pictures", COUNT)
    splits = check_same(ImageFolder(path=str(folder)), tmp_path, by_class(), names_of(by_class()))
    assert splits.train.class_names == CLASSES
    source = kind_of(ImageFolder(path=f"{folder}/")).open()
    assert source.names is not None
    assert source.names(0, source.rows) == [name for name, _ in as_torchvision(folder)]
    assert not splits.findings


def test_names_are_ordered_by_their_bytes_folder_by_folder(tmp_path: Path) -> None:
    names = ["a/b/z.png", "a/b.jpg", "a-b/x.jpg", "B/é.JPG", "B/z.jpeg", "B/~.webp", "a/B/10.jpg", "a/B/9.jpg"]
    folder = write(tmp_path / "pictures", {name: jpeg(1) for name in names})
    source = kind_of(ImageFolder(path=str(folder))).open()
    assert source.names is not None
    ordered = ["B/z.jpeg", "B/~.webp", "B/é.JPG", "a/B/10.jpg", "a/B/9.jpg", "a/b/z.png", "a/b.jpg", "a-b/x.jpg"]
    assert source.names(0, source.rows) == ordered
    labels = [label for block in source.blocks(3) for label in block.labels.to_pylist()]
    assert labels == ["B"] * 3 + ["a"] * 4 + ["a-b"]


def test_what_is_no_picture_is_left_out_in_one_line(tmp_path: Path) -> None:
    extra = {"notes.txt": b"x", "cat/list.csv": b"x", "dog/raw.heic": b"x", "eel/x.xml": b"x"}
    silent = dict.fromkeys((".DS_Store", "cat/Thumbs.db", "__MACOSX/cat/._0.jpg", "dog/.hidden.jpg", ".x/y.jpg"), b"x")
    folder = of_classes(tmp_path / "pictures", COUNT, **extra, **silent)
    splits = check_same(ImageFolder(path=str(folder)), tmp_path, by_class(), names_of(by_class()))
    line = f"left out of {folder}, as by their names they are no pictures: cat/list.csv, dog/raw.heic, eel/x.xml and 1"
    assert splits.findings == (f"{line} more",)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = of_classes(tmp_path / "pictures", COUNT)
    (folder / "dog").rename(folder / ".dogs")
    (folder / "dog").symlink_to(".dogs")
    (folder / "cat" / "000.jpg").rename(folder / ".first")
    (folder / "cat" / "000.jpg").symlink_to("../.first")
    (tmp_path / "link").symlink_to(folder)  # what is named may itself be a link
    check_same(ImageFolder(path=str(tmp_path / "link")), tmp_path, by_class(), names_of(by_class()))


def write_table(path: Path, files: list[str], labels: list[Any]) -> None:
    """A table of labels, of the kind that its name says."""
    both = list(zip(files, labels, strict=True))
    match path.suffix:
        case ".csv":
            lines = [f'"1,{one}",{one},{"" if label is None else label}' for one, label in both]
            path.write_text("\n".join(["\ufeffid,file_name,label", *lines, ""]))
        case ".jsonl":
            path.write_text("".join(json.dumps({"file_name": one, "label": label}) + "\n" for one, label in both))
        case _:
            pq.write_table(pa.table({"file_name": files, "label": labels}), path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("named", [True, False])
def test_a_table_gives_the_label_of_each_file(kind: str, named: bool, tmp_path: Path) -> None:
    files = [f"{number:03}.jpg" if number % 2 else f"more/{number:03}.jpg" for number in range(COUNT)]
    folder = write(tmp_path / "pictures", {name: jpeg(number) for number, name in enumerate(files)})
    shuffled = np.random.default_rng(0).permutation(COUNT).tolist()  # the order of the table says nothing
    labels = names_of(shuffled) if named else [number % 3 for number in shuffled]
    write_table(folder / f"metadata.{kind}", [f"./{files[number]}" for number in shuffled], labels)
    ordered = [*range(1, COUNT, 2), *range(0, COUNT, 2)]
    expected = names_of(ordered) if named else [number % 3 for number in ordered]
    splits = check_same(ImageFolder(path=str(folder)), tmp_path, ordered, expected)
    assert not splits.findings
    # The same table anywhere, with columns of other names.
    shutil.move(folder / f"metadata.{kind}", tmp_path / f"labels.{kind}")
    named_table = ImageFolder(path=str(folder), labels=str(tmp_path / f"labels.{kind}"))
    assert all_rows(named_table, tmp_path / "cache").fingerprints == splits.fingerprints


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", ["ids", "names"])
def test_a_table_may_leave_labels_out(kind: str, labels: str, tmp_path: Path) -> None:
    """Where the recipe says that rows without are for the teacher alone."""
    names = [f"{number:03}.jpg" for number in range(COUNT)]
    folder = write(tmp_path / "pictures", {name: jpeg(number) for number, name in enumerate(names)})
    said: list[Any] = [number % 3 if labels == "ids" else CLASSES[number % 3] for number in range(COUNT)]
    said = [None if number % 4 == 0 else one for number, one in enumerate(said)]
    write_table(folder / f"metadata.{kind}", names, said)
    data = DataSpec(train=ImageFolder(path=str(folder)), validation=0.2, test=0.2, unlabelled="missing")
    splits = prepare(data, tmp_path / "cache")
    assert splits.train.class_names == (None if labels == "ids" else CLASSES)
    assert (splits.train.classes, splits.train.unlabelled) == (3, 23)
    located = source_rows(data)["train"]
    for row in range(len(splits.train)):
        number = int(Path(located.where(row)[0]).stem)
        assert splits.train.labels[row] == (-1 if number % 4 == 0 else number % 3)
    assert any("23 of" in line and "train rows have no label" in line for line in splits.findings)
    there = ensure_rows(data, str(tmp_path / "stores"), loop).manifest
    assert {name: split.fingerprint for name, split in there.splits.items()} == splits.fingerprints
    with pytest.raises(RefusedError, match="no value in row 0 of") as refused:
        prepare(data.model_copy(update={"unlabelled": None}), tmp_path / "cache")
    assert "set data.unlabelled: missing" in str(refused.value.next)


def test_numbers_with_zeros_in_front_are_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", {f"{number:03}.jpg": jpeg(number) for number in range(COUNT)})
    lines = [f"{number:03}.jpg,{number % 3:03}" for number in range(COUNT)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert all_rows(ImageFolder(path=str(folder)), tmp_path / "cache").train.class_names == ("000", "001", "002")


def test_a_table_may_name_a_part_of_the_folder_if_it_is_meant_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", {f"{number:03}.jpg": jpeg(number) for number in range(COUNT)})
    for name, numbers in (("train", range(60)), ("test", range(60, COUNT))):
        lines = [f"{number:03}.jpg,{CLASSES[number % 3]}" for number in numbers]
        (tmp_path / f"{name}.csv").write_text("\n".join(["file_name,label", *lines]))
    parts = {
        name: ImageFolder(path=str(folder), labels=str(tmp_path / f"{name}.csv"), unlisted="leave_out")
        for name in ("train", "test")
    }
    splits = prepare(DataSpec(train=parts["train"], test=parts["test"]), tmp_path / "cache")
    assert len(splits.train) + len(splits.validation) == 60
    assert len(splits.test) == 30
    for name, missing in (("train", 30), ("test", 60)):
        line = f"left out of {folder}, as {tmp_path}/{name}.csv does not list them: {missing} pictures"
        assert line in splits.findings


def test_quantities_are_read_for_regression(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", {f"{number:03}.jpg": jpeg(number) for number in range(30)})
    lines = [f"{number:03}.jpg,{number / 4}" for number in range(30)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    path = tar(tmp_path / "a.tar", samples(range(30)))
    for source, share in ((ImageFolder(path=str(folder)), 4), (WebDataset(path=str(path), label="share"), 2)):
        splits = prepare(DataSpec(train=source, task="regression"), tmp_path / "cache")
        labels = np.concatenate([splits.train.labels, splits.validation.labels, splits.test.labels])
        assert sorted(labels.tolist()) == [number / share for number in range(30)]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pictures_of_all_sizes_come_to_the_one_that_the_recipe_says(kind: str, tmp_path: Path) -> None:
    pictures = {f"{number:03}.jpg": jpeg(number, 8 + number % 5) for number in range(30)}
    source: Any = ImageFolder(
        path=str(write(tmp_path / "pictures", {f"a/{name}": one for name, one in pictures.items()}))
    )
    if kind == "tar":
        members = [part for name, one in pictures.items() for part in ((name, one), (f"{name[:3]}.cls", b"0"))]
        source = WebDataset(path=str(tar(tmp_path / "a.tar", members)))
    with pytest.raises(RefusedError, match=r"(?s)another shape in row 1 of .*001.jpg\).*image: \{size"):
        all_rows(source, tmp_path / "cache")
    splits = all_rows(source, tmp_path / "cache", image=Image(size=16))
    assert splits.train.shape == (3, 16, 16)


# ---- tar files


def shards(folder: Path, count: int = COUNT, each: int = 30) -> Path:
    for number, start in enumerate(range(0, count, each)):
        tar(folder / f"train-{number:03}.tar", samples(range(start, start + each)))
    return folder


def test_shards_may_be_links_that_are_named_or_stay_in_the_folder(tmp_path: Path) -> None:
    there = shards(tmp_path / "there")
    (tmp_path / "named").symlink_to(there)
    (tmp_path / "links").mkdir()
    for shard in there.iterdir():
        (tmp_path / "links" / shard.name).symlink_to(shard)
    expected = all_rows(WebDataset(path=str(there)), tmp_path / "cache").fingerprints
    for spelt in ("named", "links/train-{000..002}.tar", "*/train-*.tar"):
        found = webdataset.WebDatasetSource(WebDataset(path=f"{tmp_path}/{spelt}"))
        assert len(found.files) == (9 if "*" in spelt else 3)
        if "*" not in spelt:
            assert all_rows(found.spec, tmp_path / "cache").fingerprints == expected
    # What a linked folder leads to is found where it lies, and not a second time.
    (there / "again").symlink_to(there)
    assert len(webdataset.WebDatasetSource(WebDataset(path=str(there))).files) == 3


@pytest.mark.parametrize("spelt", ["", "/train-*.tar", "/train-{000..002}.tar", "/{train-000,train-001,train-002}.tar"])
@pytest.mark.parametrize("label", ["cls", "name", "id"])
def test_samples_of_tar_files_are_rows_in_their_order(spelt: str, label: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    (folder / "train-000.json").write_text("{}")
    labels = names_of(range(COUNT)) if label == "name" else [number % 3 for number in range(COUNT)]
    splits = check_same(WebDataset(path=f"{folder}{spelt}", label=label), tmp_path, range(COUNT), labels)
    line = f"left out of {folder}, as they are no tar files: train-000.json"
    assert splits.findings == ((line,) if not spelt else ())


def test_a_sample_may_have_what_a_row_does_not_need(tmp_path: Path) -> None:
    members = samples(range(COUNT))
    members[4:4] = [("0000.seg.png", b"mask"), ("README", b"about"), ("._0000.jpg", b"apple"), (".DS_Store", b"x")]
    named = [(f"./a.b/{name}", data) for name, data in members]
    path = tar(tmp_path / "any-name", [("__about__/x.json", b"{}"), *named])
    check_same(WebDataset(path=str(path)), tmp_path, range(COUNT), [number % 3 for number in range(COUNT)])
    source = kind_of(WebDataset(path=str(path))).open()
    assert source.names is not None
    assert source.names(1, 3) == ["any-name/a.b/0001.jpg", "any-name/a.b/0002.jpg"]


def test_long_names_and_headers_of_their_own_are_part_of_a_sample(tmp_path: Path) -> None:
    long = [(f"{'é' * 120}/{name}", data) for name, data in samples(range(COUNT))]
    path = tar(tmp_path / "a.tar", long)
    check_same(WebDataset(path=str(path)), tmp_path, range(COUNT), [number % 3 for number in range(COUNT)])


def test_braces_are_expanded_as_in_shells() -> None:
    assert expand_braces("a-{08..11}.tar") == [f"a-{number:02}.tar" for number in range(8, 12)]
    assert expand_braces("{b,a}/{0..1}") == ["b/0", "b/1", "a/0", "a/1"]
    assert expand_braces("a{b}c{x..y}") == ["a{b}c{x..y}"]


# ---- however they are read


def a_folder(folder: Path) -> ImageFolder:
    return ImageFolder(path=str(of_classes(folder / "pictures", COUNT)))


def some_shards(folder: Path) -> WebDataset:
    return WebDataset(path=str(shards(folder / "shards")), label="name")


BOTH = pytest.mark.parametrize("make", [a_folder, some_shards])


def loop(plan: RowsPlan, take: Take) -> None:
    """As tasks do it: what they are given, and what they return, comes and goes as bytes."""
    for run in plan.runs:
        take(pickle.loads(pickle.dumps(write_run(*pickle.loads(pickle.dumps((plan.job, run)))))))


@BOTH
def test_rows_are_the_same_whatever_the_threads(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, found = make(tmp_path), []
    for threads in (1, 2, 7):
        for module in (blocks, preparing, webdataset):
            monkeypatch.setattr(module, "default_threads", lambda threads=threads: threads)
        found.append(all_rows(source, tmp_path / f"cache-{threads}").fingerprints)
    assert found[0] == found[1] == found[2]


@BOTH
def test_rows_may_be_read_from_anywhere(make: Callable[[Path], Any], tmp_path: Path) -> None:
    source = kind_of(make(tmp_path)).open()
    pictures = [picture for block in source.blocks(7) for picture in block.inputs[0].to_pylist()]
    labels = [label for block in source.blocks(7) for label in block.labels.to_pylist()]
    assert source.label_blocks is not None
    for start, stop in ((0, COUNT), (1, 2), (13, 77), (29, 31), (88, 200)):
        parts = list(source.blocks(5, start, stop))
        assert [row for block in parts for row in block.rows] == list(range(start, min(stop, COUNT)))
        assert max(map(len, parts)) <= 5
        assert [one for block in parts for one in block.inputs[0].to_pylist()] == pictures[start:stop]
        alone = list(source.label_blocks(5, start, stop))
        assert [one for block in alone for one in block.labels.to_pylist()] == labels[start:stop]


@BOTH
@pytest.mark.parametrize("data", [{}, {"stratify": True, "subset": 40}])
def test_a_cluster_writes_the_same_rows(make: Callable[[Path], Any], data: dict[str, Any], tmp_path: Path) -> None:
    source = make(tmp_path)
    alone = all_rows(source, tmp_path / "cache", **data)
    sealed = ensure_rows(DataSpec(train=source, **data), str(tmp_path / "stores"), loop).manifest
    assert {name: split.fingerprint for name, split in sealed.splits.items()} == alone.fingerprints
    assert tuple(sealed.findings) == alone.findings


def test_tasks_do_not_look_for_samples_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_index(plan: RowsPlan, take: Take) -> None:
        with monkeypatch.context() as patch:
            patch.delattr(webdataset, "open_shard")
            loop(plan, take)

    ensure_rows(DataSpec(train=some_shards(tmp_path)), str(tmp_path / "stores"), without_index)


@BOTH
def test_labels_are_read_without_pictures(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSpec(train=make(tmp_path))
    reading = preparing.open_sources(data, preparing.kinds_of(data))["train"]
    monkeypatch.delattr(PictureFiles, "read")
    monkeypatch.delattr(webdataset, "bytes_of")
    classes, labels = preparing.read_labels(reading, "classification", Classes(), lambda done, total: None)
    assert classes.names == CLASSES
    assert np.bincount(labels).tolist() == [30, 30, 30]


@pytest.mark.parametrize(
    "source",
    [
        lambda root: ImageFolder(path=f"{root}/pictures"),
        lambda root: ImageFolder(path=f"{root}/flat/"),
        lambda root: ImageFolder(path=f"{root}/flat", labels=f"{root}/flat/metadata.csv"),
        lambda root: WebDataset(path=f"{root}/shards"),
        lambda root: WebDataset(path=f"{root}/shards/train-*.tar", label="name"),
        lambda root: WebDataset(path=f"{root}/shards/train-{{000..002}}.tar"),
        lambda root: WebDataset(path=f"{root}/shards/train-001.tar"),
    ],
)
def test_objects_give_the_rows_of_the_same_files(source: Callable[[Any], Any], bucket: str, tmp_path: Path) -> None:
    of_classes(tmp_path / "data" / "pictures", COUNT, **{"about.txt": b"x", ".DS_Store": b"x"})
    shards(tmp_path / "data" / "shards")
    flat = write(tmp_path / "data" / "flat", {f"{number:03}.jpg": jpeg(number) for number in range(30)})
    (flat / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n:03}.jpg,{n % 3}\n" for n in range(30)))
    uri = f"{bucket}/{tmp_path.name}"
    for file in sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        open_root(uri).put(str(file.relative_to(tmp_path / "data")), file.read_bytes())
    local, remote = (all_rows(source(root), tmp_path / "cache") for root in (tmp_path / "data", uri))
    assert local.fingerprints == remote.fingerprints
    assert [line.replace(uri, str(tmp_path / "data")) for line in remote.findings] == list(local.findings)
    sealed = ensure_rows(DataSpec(train=source(uri)), str(tmp_path / "stores"), loop).manifest
    assert {name: split.fingerprint for name, split in sealed.splits.items()} == local.fingerprints


def test_rows_are_joined_with_others_by_their_files(tmp_path: Path) -> None:
    folder, tars = a_folder(tmp_path), some_shards(tmp_path)
    data = DataSpec(train=folder, test=tars)
    names = [name for name, _ in as_torchvision(Path(folder.path))]
    for column in ("file", "file_name"):
        assert key_column(data, "train", column).to_pylist() == names
    assert key_column(data, "test", "file").to_pylist()[30] == "train-001.tar/0030.jpg"
    assert key_column(data, "test", "__key__").to_pylist() == [f"{number:04}" for number in range(COUNT)]
    with pytest.raises(RefusedError, match=r"(?s)no column id that could be a key.*known by file or file_name"):
        key_column(data, "train", "id")


@BOTH
def test_pictures_that_stay_encoded_are_those_of_parquet(make: Callable[[Path], Any], tmp_path: Path) -> None:
    source = make(tmp_path)
    numbers = by_class() if isinstance(source, ImageFolder) else list(range(COUNT))
    changes: dict[str, Any] = {
        "image": Image(size=6, keep="encoded"),
        "augmentation": RandomResizedCropFlip(),
        "views": 2,
    }
    found = []
    for one in (source, in_parquet(tmp_path, numbers, names_of(numbers))):
        splits = all_rows(one, tmp_path / "cache", **changes)
        assert encoded_of(splits.train.inputs) is not None
        found.append(splits.fingerprints)
    sealed = ensure_rows(DataSpec(train=source, **changes), str(tmp_path / "stores"), loop).manifest
    assert found[0] == found[1] == {name: split.fingerprint for name, split in sealed.splits.items()}


# ---- what is noticed


def test_no_document_names_every_picture(tmp_path: Path) -> None:
    source = a_folder(tmp_path)
    splits = all_rows(source, tmp_path / "cache")
    sizes: list[int] = []

    def compute(plan: RowsPlan, take: Take) -> None:
        sizes.append(len(pickle.dumps(plan.job)))
        loop(plan, take)

    ensure_rows(DataSpec(train=source), str(tmp_path / "stores"), compute)
    documents = [*splits.train.folder.glob("*.json"), *(tmp_path / "stores").rglob("*.json")]
    assert len(documents) >= 3
    for document in documents:
        assert "000.jpg" not in document.read_text()
    assert sizes[0] < 4000


@pytest.mark.parametrize("change", ["content", "added", "renamed", "removed", "table"])
def test_a_change_is_noticed(change: str, tmp_path: Path) -> None:
    source = a_folder(tmp_path)
    before = all_rows(source, tmp_path / "cache")
    first, table = Path(source.path, "cat", "000.jpg"), Path(source.path, "metadata.csv")
    match change:
        case "content":
            first.write_bytes(jpeg(300))
        case "added":
            first.with_name("zzz.jpg").write_bytes(jpeg(300))
        case "renamed":
            first.rename(first.with_name("zzz.jpg"))
        case "removed":
            first.unlink()
        case "table":
            names = [name for name, _ in as_torchvision(Path(source.path))]
            table.write_text("file_name,label\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(names)))
    assert all_rows(source, tmp_path / "cache").fingerprints != before.fingerprints


def test_pictures_that_were_believed_are_read_in_the_background(tmp_path: Path) -> None:
    source = a_folder(tmp_path)
    all_rows(source, tmp_path / "cache").sources.finish()
    files = FileSet(source.path, [name for name, _ in as_torchvision(Path(source.path))])
    SourceCheck({files: files.sha256(1)}, lambda: None).finish()
    before, stamp = files.sha256(2), files.stamp()
    first = Path(source.path, "cat", "000.jpg")
    first.write_bytes(bytes(reversed(first.read_bytes())))
    os.utime(first, ns=(0, 0))
    assert files.stamp() != stamp  # by the time of the inode, which nobody can set
    with pytest.raises(RefusedError, match=r"pictures \(90 files, \w+\) has changed since its rows were prepared"):
        SourceCheck({files: before}, lambda: None).finish()


def test_a_copy_with_other_inodes_is_the_same(tmp_path: Path) -> None:
    source = a_folder(tmp_path)
    before = all_rows(source, tmp_path / "cache").train.folder.stat()
    shutil.copytree(source.path, tmp_path / "copy", copy_function=shutil.copy2)
    shutil.rmtree(source.path)
    (tmp_path / "copy").rename(source.path)
    assert all_rows(source, tmp_path / "cache").train.folder.stat().st_ino == before.st_ino


def test_other_files_on_a_node_are_refused(tmp_path: Path) -> None:
    source = a_folder(tmp_path)

    def changed(plan: RowsPlan, take: Take) -> None:
        Path(source.path, "cat", "000.jpg").write_bytes(jpeg(0)[:-2] + b"zz")
        loop(plan, take)

    with pytest.raises(RefusedError, match=r"(?s)not those of the driver.*pictures \(90 files, .* with sha256"):
        ensure_rows(DataSpec(train=source), str(tmp_path / "stores"), changed)
