"""Folders of pictures and tar files that no rows can be made of: each refused with the file, the row or the key."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from akd_dist.base.errors import RefusedError
from akd_dist.data import prepare as preparing, row_cache
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_store import RowsPlan, Take, ensure_rows
from akd_dist.data.sources import webdataset
from akd_dist.data.sources.kinds import kind_of
from akd_dist.recipe import DataSpec, ImageFolder, WebDataset
from tests.pictures import jpeg, of_classes, samples, tar, write
from tests.sources import refused_whole

COUNT = 30
Made = ImageFolder | WebDataset | DataSpec
Case = tuple[Callable[[Path], Made], list[str]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several blocks, and a tar file is several parts."""
    monkeypatch.setattr(preparing, "_READ_ROWS", 4)
    monkeypatch.setattr(webdataset, "_PART_BYTES", 7000)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 81 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD_PICTURES: dict[str, tuple[bytes, list[str]]] = {
    "cut off": (jpeg(1)[:-100], ["cannot decode the image in row"]),
    "text": (b"this is no picture", ["cannot decode the image in row", "18 bytes: of none of these formats"]),
    "of 16 bits": (png(np.zeros((8, 8), np.uint16)), ["cannot decode the image in row", "8 bits"]),
    "a bomb": (bomb(), ["cannot decode the image in row", "9,000 x 9,000 pixels are too many"]),
    "of another size": (jpeg(1, 9), ["another shape in row", "[3, 9, 9]", "[3, 8, 8]"]),
    "empty": (b"", ["0 bytes"]),
}


# ---- folders


def classes_with(change: Callable[[Path], object], **options: Any) -> Callable[[Path], ImageFolder]:
    """A folder for each class, changed."""

    def make(folder: Path) -> ImageFolder:
        place = of_classes(folder / "pictures", COUNT)
        change(place)
        return ImageFolder(path=str(place), **options)

    return make


def flat(table: str | None, name: str = "metadata.csv", **options: Any) -> Callable[[Path], ImageFolder]:
    """Pictures a.jpg, b.jpg, ... with a table of labels."""

    def make(folder: Path) -> ImageFolder:
        place = write(folder / "pictures", {f"{chr(97 + number)}.jpg": jpeg(number) for number in range(COUNT // 2)})
        if table is not None:
            (place / name).write_text(table)
        return ImageFolder(path=str(place), **options)

    return make


GOOD = "file_name,label\n" + "".join(f"{chr(97 + number)}.jpg,{number % 3}\n" for number in range(COUNT // 2))


def add(name: str, data: bytes = b"x") -> Callable[[Path], object]:
    return lambda place: write(place, {name: data})


def link(name: str, to: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        write(place.parent, {"elsewhere/x.jpg": jpeg(1)})
        (place / name).symlink_to(to.replace("HERE", str(place)))

    return make


def listening(place: Path) -> None:
    """A socket among the pictures."""
    path = os.path.relpath(place / "cat" / "x.jpg")  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def as_splits(folder: Path) -> ImageFolder:
    for split in ("train", "val"):
        of_classes(folder / "pictures" / split, COUNT)
    return ImageFolder(path=str(folder / "pictures"))


def other_classes(folder: Path) -> DataSpec:
    train, test = of_classes(folder / "train", COUNT), of_classes(folder / "test", COUNT)
    (test / "dog").rename(test / "doge")
    return DataSpec(train=ImageFolder(path=str(train)), test=ImageFolder(path=str(test)))


FOLDERS: dict[str, Case] = {
    "missing": (lambda folder: ImageFolder(path=str(folder / "pictues")), ["no folder of pictures at", "near it"]),
    "a URI": (lambda _: ImageFolder(path="https://host/x"), ["rows are not read from https://host/x"]),
    "a file": (lambda f: ImageFolder(path=str(write(f, {"x.zip": b"x"}) / "x.zip")), ["x.zip is no folder", "unpack"]),
    "a tar file": (lambda f: ImageFolder(path=str(tar(f / "x.tar", []))), ["x.tar is no folder", "kind: webdataset"]),
    "empty": (lambda f: ImageFolder(path=str(write(f / "p", {".x": b""}))), ["no pictures in", "an empty folder"]),
    "no pictures": (lambda f: ImageFolder(path=str(write(f, {"p/a.txt": b""}) / "p")), ["no pictures in", "a.txt"]),
    "an empty class": (classes_with(lambda p: (p / "fox").mkdir()), ["a folder in", "holds no pictures", "fox: empty"]),
    "a class of others": (classes_with(add("fox/a.heic")), ["holds no pictures", "fox: other files: fox/a.heic"]),
    "loose": (classes_with(add("loose.jpg")), ["some pictures in", "have no label", "loose.jpg", "labels: labels.csv"]),
    "flat without labels": (flat(None), ["the pictures in", "have no label", "no folders: a.jpg, b.jpg, c.jpg"]),
    "splits": (as_splits, ["called as splits, and not as classes", "train, val", "pictures/train"]),
    "a link out": (classes_with(link("cat/x.jpg", "../../elsewhere/x.jpg")), ["cat/x.jpg leads out of", "cp -rL"]),
    "a folder out": (classes_with(link("fox", "../elsewhere")), ["fox leads out of the folder", "elsewhere"]),
    "a circle": (classes_with(link("cat/more", "../../pictures")), ["cat/more leads to a folder which it lies in"]),
    "a link to itself": (classes_with(link("cat/more", "more")), ["cat cannot be read", "symbolic links"]),
    "a table out": (classes_with(link("metadata.csv", "../elsewhere/x.jpg")), ["metadata.csv leads out of the folder"]),
    "a broken link": (classes_with(link("cat/x.jpg", "HERE/gone.jpg")), ["cat/x.jpg is no regular file", "to nothing"]),
    "a socket": (classes_with(listening), ["cat/x.jpg is no regular file", "a socket"]),
    "not UTF-8": (
        classes_with(lambda p: (p / "cat" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")),
        ["is not UTF-8", "rename it"],
    ),
    "other classes in test": (
        other_classes,
        ["unknown class name in row 10 of", "(doge/001.jpg)", "to dog"],
    ),
    "several tables": (
        classes_with(lambda p: write(p, {"metadata.csv": b"", "metadata.jsonl": b""})),
        ["several tables of labels", "metadata.csv, metadata.jsonl"],
    ),
    "columns of no table": (
        classes_with(lambda _: None, label="species"),
        ["there is no table of labels in", "the columns file_name and species", "labels: labels.csv"],
    ),
    "no such table": (flat(None, labels="/nowhere/labels.csv"), ["no table of labels at /nowhere/labels.csv"]),
    "a table of another kind": (
        lambda f: flat(None, labels=str(write(f, {"labels.xlsx": b"x"}) / "labels.xlsx"))(f),
        ["nothing can be made of the table", ".xlsx"],
    ),
    "an empty table": (flat(""), ["metadata.csv cannot be read", "it is empty"]),
    "a table without rows": (flat("file_name,label\n"), ["metadata.csv lists no files"]),
    "a cut table": (flat("file_name,label\na.jpg,1\nb.jpg"), ["metadata.csv cannot be read", "Expected 2 columns"]),
    "a cut Parquet table": (flat("PAR1", "metadata.parquet"), ["metadata.parquet cannot be read"]),
    "no JSON Lines": (flat("{", "metadata.jsonl"), ["metadata.jsonl cannot be read"]),
    "no column of files": (flat(GOOD.replace("file_name", "file")), ["no column file_name", "set `file` to file"]),
    "no column of labels": (flat(GOOD, label="lable"), ["no column lable", "set `label` to label"]),
    "two columns": (flat(GOOD.replace("file_name,label", "label,label")), ["no column file_name"]),
    "semicolons": (
        flat(GOOD.replace(",", ";")),
        ["not separated by commas", "semicolons in its first line: file_name;"],
    ),
    "tabs": (flat(GOOD.replace(",", "\t")), ["not separated by commas", "tabs in its first line", "again with commas"]),
    "decimal commas": (flat(GOOD.replace(",", ";").replace(";1\n", ";1,5\n")), ["semicolons in its first line"]),
    "no label": (
        flat(GOOD.replace("c.jpg,2", "c.jpg,")),
        ["no value in row 2 of", "(c.jpg), column label of"],
    ),
    "no file": (flat(GOOD.replace("c.jpg,2", ",2")), ["no file in row 2 of", "metadata.csv"]),
    "a picture that is missing": (flat(GOOD + "z.jpg,1\n"), ["row 15 of", "metadata.csv names a picture", "z.jpg"]),
    "without an ending": (flat(GOOD.replace("c.jpg", "c")), ["row 2 of", "write names with their ending: c.jpg"]),
    "in another folder": (flat(GOOD.replace("c.jpg", "x/c.jpg")), ["row 2 of", "x/c.jpg", "correct it to c.jpg"]),
    "a picture without a row": (flat(GOOD.replace("c.jpg,2\n", "")), ["have no label", "1 of 15, such as c.jpg"]),
    "listed twice": (flat(GOOD + "./c.jpg,1\n"), ["a file is listed twice", "c.jpg in rows 2 and 15"]),
    "climbing out": (flat(GOOD.replace("c.jpg", "../c.jpg")), ["row 2 of", "outside of the folder", "../c.jpg"]),
    "an absolute path": (flat(GOOD.replace("c.jpg", "/p/c.jpg")), ["row 2 of", "by an absolute path", "/p/c.jpg"]),
    "a path of Windows": (flat(GOOD.replace("c.jpg", "C:\\c.jpg")), ["row 2 of", "by an absolute path"]),
    "a negative label": (flat(GOOD.replace("c.jpg,2", "c.jpg,-1")), ["range in row 2 of", "(c.jpg)", "metadata.csv"]),
    "files that are numbers": (
        flat('{"file_name": 1, "label": 2}\n', "metadata.jsonl"),
        ["column file_name of", "cannot be the file", "int64"],
    ),
    "labels of lists": (
        flat('{"file_name": "a.jpg", "label": [2]}\n', "metadata.jsonl"),
        ["column label of", "cannot be the label", "list"],
    ),
    "quantities as classes": (flat(GOOD.replace(",2", ",2.5")), ["row 0 of", "(a.jpg)", "data.task: regression"]),
    "regression of classes": (
        lambda f: DataSpec(train=classes_with(lambda _: None)(f), task="regression"),
        ["labels that do not go with data.task: regression", "cat"],
    ),
    "too few classes": (classes_with(lambda _: None, classes=2), ["another number of classes", "3 names"]),
    **{
        f"a picture {kind}": (classes_with(add("cat/003.jpg", data)), [*words, "row 1 of", "cat/003.jpg"])
        for kind, (data, words) in BAD_PICTURES.items()
    },
}


# ---- tar files


def archive(change: Callable[[list[Any]], Any], **options: Any) -> Callable[[Path], WebDataset]:
    """Two tar files, the second of which has other members."""

    def make(folder: Path) -> WebDataset:
        tar(folder / "shards" / "a.tar", samples(range(COUNT)))
        members: list[Any] = samples(range(100, 100 + COUNT))
        tar(folder / "shards" / "b.tar", change(members) or members)
        return WebDataset(path=str(folder / "shards"), **options)

    return make


def damaged(change: Callable[[bytes], bytes], name: str = "b.tar") -> Callable[[Path], WebDataset]:
    def make(folder: Path) -> WebDataset:
        made = archive(lambda members: None)(folder)
        whole = Path(made.path, "b.tar").read_bytes()
        Path(made.path, "b.tar").unlink()
        Path(made.path, name).write_bytes(change(whole))
        return made

    return make


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def with_json(value: object, label: str = "id") -> Callable[[Path], WebDataset]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return archive(lambda members: [*members[:9], ("0102.json", data), *members[10:]], label=label)


def cut_at_a_member(data: bytes) -> bytes:
    """Without all that follows a whole member: what is left reads well, but for the end of the archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return data[: opened.getmembers()[40].offset]


def flipped(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        at = opened.getmembers()[40].offset + 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def linked_shard(to: str, glob: str = "", link: str = "b.tar") -> Callable[[Path], WebDataset]:
    """A tar file, and beside it a link."""

    def make(folder: Path) -> WebDataset:
        for name in ("shards/a.tar", "elsewhere/x.tar"):
            tar(folder / name, samples(range(COUNT)))
        (folder / "shards" / link).symlink_to(to)
        return WebDataset(path=f"{folder}/shards{glob}")

    return make


def of_names(path: str, *names: str) -> Callable[[Path], WebDataset]:
    def make(folder: Path) -> WebDataset:
        for name in names:
            tar(folder / name, samples(range(COUNT)))
        return WebDataset(path=f"{folder}/{path}")

    return make


SHARDS: dict[str, Case] = {
    "missing": (of_names("b.tar", "a.tar"), ["no tar file at", "near it: a.tar"]),
    "no match": (of_names("b*.tar", "a.tar"), ["no tar file at", "a glob"]),
    "one of an expression is missing": (of_names("s-{0..2}.tar", "s-0.tar", "s-2.tar"), ["no tar file at", "s-1.tar"]),
    "a range backwards": (of_names("s-{2..0}.tar"), ["cannot be expanded", "2..0 runs backwards"]),
    "too many": (of_names("{0..999}{0..999}.tar"), ["cannot be expanded", "1,000,000 paths"]),
    "no tar files": (lambda f: WebDataset(path=str(write(f / "s", {"a.txt": b""}))), ["no tar file at", "a.txt"]),
    "a broken link": (linked_shard("gone.tar"), ["b.tar is no regular file", "a link to nothing: gone.tar"]),
    "a broken link of a glob": (linked_shard("gone.tar", "/*.tar"), ["b.tar is no regular file", "a link to nothing"]),
    "a link out": (linked_shard("../elsewhere/x.tar"), ["b.tar leads out of the folder", "cp -rL", "one by one"]),
    "a link out of a glob": (linked_shard("../elsewhere/x.tar", "/*.tar"), ["b.tar leads out of the folder"]),
    "a folder out": (linked_shard("../elsewhere", link="more"), ["more leads out of the folder", "elsewhere"]),
    "gzip by its name": (damaged(gzip.compress, "b.tar.gz"), ["b.tar.gz looks like a compressed tar", "gunzip"]),
    "gzip": (damaged(gzip.compress), ["b.tar is compressed", "gzip", "decompress it"]),
    "under way": (damaged(bytes, "b.tar.part"), ["b.tar.part looks like", "a copy that is under way"]),
    "0 bytes": (damaged(lambda _: b""), ["b.tar is no whole tar file", "0 bytes"]),
    "other bytes": (damaged(lambda _: b"no tar" * 999), ["b.tar is no whole tar file"]),
    "cut within a picture": (
        damaged(lambda data: data[:-11000]),
        ["b.tar is no whole tar file", "end of data"],
    ),
    "cut behind a member": (damaged(cut_at_a_member), ["b.tar is no whole tar file, behind its member", "cut off"]),
    "a damaged header": (damaged(flipped), ["b.tar is no whole tar file, behind its member '0109.txt'", "header"]),
    "a hole of 68 KiB": (damaged(lambda data: data + bytes(68 << 10) + data), ["b.tar is no whole tar file", "joined"]),
    "an end of 3 MiB": (damaged(lambda data: data + bytes(3 << 20)), ["b.tar is no whole tar file", "more zeros"]),
    "two in one": (damaged(lambda data: data + data), ["b.tar is no whole tar file", "joined by cat"]),
    "no samples": (archive(lambda _: [member("x", tarfile.DIRTYPE)]), ["b.tar holds no samples"]),
    "climbing out": (archive(lambda m: [*m, ("../x.jpg", b"x")]), ["'../x.jpg'", "climbs out of the archive"]),
    "an absolute path": (archive(lambda m: [*m, ("/etc/x.jpg", b"x")]), ["'/etc/x.jpg'", "an absolute path"]),
    "a symbolic link": (
        archive(lambda m: [*m, member("x.jpg", tarfile.SYMTYPE, "/etc/passwd")]),
        ["b.tar holds what does not belong", "'x.jpg'", "a link to /etc/passwd"],
    ),
    "a hard link": (archive(lambda m: [*m, member("x.jpg", tarfile.LNKTYPE, "0101.jpg")]), ["a link to 0101.jpg"]),
    "a device": (archive(lambda m: [*m, member("x.jpg", tarfile.CHRTYPE)]), ["'x.jpg'", "a device"]),
    "a pipe": (archive(lambda m: [*m, member("x.jpg", tarfile.FIFOTYPE)]), ["'x.jpg'", "a pipe"]),
    "no picture": (archive(lambda m: m.pop(10) and None), ["the sample 0102 of", "b.tar has no picture", "0102.cls"]),
    "two pictures": (
        archive(lambda m: [*m[:11], ("0102.png", b"x"), *m[11:]]),
        ["the sample 0102 of", "more than one picture", "0102.jpg, 0102.png"],
    ),
    "two labels": (archive(lambda m: [m[8], *m[8:]]), ["the sample 0102 of", "two members of the same kind"]),
    "not adjacent": (archive(lambda m: [*m, ("0102.more", b"x")]), ["do not lie together in", "b.tar", "0102.more"]),
    "a key twice": (archive(lambda m: [*m, *m[8:12]]), ["do not lie together in", "0102.cls"]),
    "no label": (
        archive(lambda m: m.pop(8) and None),
        ["sample 0102 of", "has no label", "0102.cls"],
    ),
    "no cls anywhere": (
        lambda f: WebDataset(path=str(tar(f / "a.tar", [one for one in samples(range(3)) if "cls" not in one[0]]))),
        ["the sample 0000 of", "has no label", "set `label` to a key of 0000.json: name, id, share"],
    ),
    "no json": (archive(lambda m: m.pop(9) and None, label="id"), ["the sample 0102 of", "has no label", "label: cls"]),
    "a name as cls": (archive(lambda m: [*m[:8], ("0102.cls", b"cat"), *m[9:]]), ["the sample 0102 of", "b'cat'"]),
    "a fraction as cls": (archive(lambda m: [*m[:8], ("0102.cls", b"1.5"), *m[9:]]), ["0102 of", "an integer"]),
    **{
        f"{text!r} as cls": (
            archive(lambda m, text=text: [*m[:8], ("0102.cls", text.encode()), *m[9:]]),  # type: ignore[misc]
            ["the sample 0102 of", "an integer, the class id"],
        )
        for text in ("1_0", "+1", "0x1", "1 0", "--1", "\u0661", "")
    },
    "a huge cls": (archive(lambda m: [*m[:8], ("0102.cls", b"9" * 30), *m[9:]]), ["0102 of", "an integer"]),
    "a negative cls": (archive(lambda m: [*m[:8], ("0102.cls", b"-1"), *m[9:]]), ["range in row 32 of", "0102.jpg"]),
    "json without the key": (with_json({"ID": 3}), ["sample 0102 of", "0102.json with ID", "the key id in each json"]),
    "json of a list": (with_json([3]), ["sample 0102 of", "0102.json with list"]),
    "no JSON": (with_json(b"{"), ["sample 0102 of", "0102.json, which is no JSON"]),
    "deep JSON": (with_json(b"[" * 100_000), ["sample 0102 of", "which is no JSON"]),
    "a label of nothing": (with_json({"id": None}), ["sample 0102 of", "id: null", "a class id, a class name"]),
    "a label of true": (with_json({"id": True}), ["sample 0102 of", "id: true"]),
    "a name among ids": (
        with_json({"id": "cat"}),
        ["0102.jpg of", "b.tar is of another type", "as 0 of 0000.jpg"],
    ),
    **{
        f"a picture {kind}": (
            archive(lambda m, data=data: [*m[:10], ("0102.jpg", data), *m[11:]]),  # type: ignore[misc]
            [*words, "0102"],
        )
        for kind, (data, words) in BAD_PICTURES.items()
    },
}
CASES = {f"folder, {name}": case for name, case in FOLDERS.items()} | {
    f"shards, {name}": case for name, case in SHARDS.items()
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    refused_whole(*CASES[case], tmp_path)


def test_an_archive_that_is_cut_anywhere_or_has_a_wrong_header_loses_no_row(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", samples(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as opened:
        headers = [one.offset for one in opened.getmembers()]
        end = opened.offset
    spoilt = [whole[:size] for size in range(0, end, tarfile.BLOCKSIZE)]
    spoilt += [whole[:size] for size in (1, 511, 513, end - 1, end + 1)]
    for at in (0, 100, 124, 148, 156, 257):  # name, mode, size, checksum, type and magic
        spoilt += [whole[: start + at] + b"\xff" + whole[start + at + 1 :] for start in headers]
    for data in spoilt:
        path.write_bytes(data)
        with pytest.raises(RefusedError, match=r"a\.tar"):
            kind_of(WebDataset(path=str(path))).open()
    path.write_bytes(whole)
    assert kind_of(WebDataset(path=str(path))).open().rows == 4


AT_HAND = ("folder, other classes in test", "folder, a negative label", "shards, a negative cls")


@pytest.mark.parametrize("case", AT_HAND)
def test_labels_are_refused_before_pictures_are_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = CASES[case]
    made = make(tmp_path)
    monkeypatch.delattr(row_cache, "write_source")
    with pytest.raises(RefusedError):
        prepare(made if isinstance(made, DataSpec) else DataSpec(train=made), tmp_path / "cache")


@pytest.mark.parametrize("case", ["folder, a picture cut off", "shards, a picture cut off"])
def test_tasks_name_the_file_as_well(case: str, tmp_path: Path) -> None:
    def loop(plan: RowsPlan, take: Take) -> None:
        for run in plan.runs:
            take(write_run(plan.job, run))

    make, words = CASES[case]
    made = make(tmp_path)
    assert not isinstance(made, DataSpec)
    with pytest.raises(RefusedError) as caught:
        ensure_rows(DataSpec(train=made), str(tmp_path / "stores"), loop)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can go on as a user who may not read a file")
@pytest.mark.parametrize("what", ["pictures/cat/003.jpg", "pictures/cat", "shards/a.tar"])
def test_what_may_not_be_read_is_named(what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # unlike those of pytest, it can be opened to everybody
        place = Path(folder)
        place.chmod(0o755)
        source: ImageFolder | WebDataset = ImageFolder(path=str(of_classes(place / "pictures", COUNT)))
        if "shards" in what:
            source = WebDataset(path=str(tar(place / "shards" / "a.tar", samples(range(COUNT)))))
        (place / what).chmod(0)
        os.seteuid(12345)
        try:
            with pytest.raises(RefusedError, match=rf"{what}(.|\n)*(Permission denied|may not read)"):
                kind_of(source).open()
        finally:
            os.seteuid(0)
