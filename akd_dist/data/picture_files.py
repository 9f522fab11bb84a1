"""Which pictures lie in a folder and below it, on a disk or in object storage; and what else lies there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RefusedError, unreadable
from akd_dist.base.formatting import some_of
from akd_dist.data.file_sets import digest_of
from akd_dist.data.folder_walk import Walk, is_leftover
from akd_dist.data.parquet_files import check_scheme, nothing_at
from akd_dist.recipe.paths import START
from akd_dist.storage.remote import RemoteFile, files_below, find_file, is_remote

EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"]
)
"""Of names of pictures, in small letters; what is in them is looked at when they are decoded."""
MOST_BYTES = 1 << 29
"""Of a picture's file: twice what the most pixels that are taken have with an alpha channel, uncompressed."""
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of labels, as Hugging Face's imagefolder finds them beside the pictures."""


@dataclass(frozen=True)
class PictureFiles:
    """The pictures of a folder, in the order of their rows: folder by folder, by the bytes of their names in UTF-8."""

    folder: str
    names: list[str] = field(repr=False)
    """Relative to the folder, with slashes."""
    sizes: list[int] = field(repr=False)
    """Bytes of each."""
    marks: list[int] | list[str] = field(repr=False)
    """The time of each in ns; of an object its entity tag."""
    folders: tuple[str, ...]
    """Names of the folders directly in it."""
    others: tuple[str, ...]
    """Other files, by their extension no pictures."""
    remote: bool
    """Whether they are objects."""

    def read(self, number: int) -> bytes:
        """What a picture's file holds.

        Raises:
            RefusedError: it cannot be read.
            MachineError: object storage does not answer.
        """
        place = f"{self.folder}/{self.names[number]}"
        try:
            if self.remote:
                return RemoteFile(place, self.sizes[number], str(self.marks[number])).open().read() or b""
            return Path(place).read_bytes()
        except OSError as error:
            raise unreadable(
                RefusedError,
                place,
                error,
                expected="a picture that stays while its rows are read",
                next="correct its permissions, or run the same command again",
            ) from error

    def check(self, rows: Sequence[int]) -> None:
        """Refuse what can be seen to be no picture, without opening it.

        Args:
            rows: numbers of pictures in the order of their rows.

        Raises:
            RefusedError: one has no bytes, or too many, or may not be read; names it and its row.
        """
        for row, number in enumerate(rows):
            size, place = self.sizes[number], f"{self.folder}/{self.names[number]}"
            got = None if 0 < size <= MOST_BYTES else f"{size:,} bytes"
            if got is None and not self.remote and not os.access(place, os.R_OK, effective_ids=True):
                got = "a file that this user may not read"
            if got is not None:
                raise RefusedError(
                    f"row {row} of {self.folder} is no picture that can be read: {place}",
                    got=got,
                    expected=f"a picture of 1 to {MOST_BYTES:,} bytes",
                    next="copy it again, or remove it",
                )

    def listing(self) -> list[Any]:
        """How many they are, bytes in all, and a digest that changes when a name, a size or a mark does."""
        entries = map("{}\0{}\0{}".format, self.names, self.sizes, self.marks)
        return [len(self.names), sum(self.sizes), digest_of(entries)]

    def left_out(self, used: Sequence[str] = ()) -> tuple[str, ...]:
        """A line on other files, but those that are used."""
        others = [name for name in self.others if name not in used]
        if not others:
            return ()
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        return (f"left out of {self.folder}, as by their names they are no pictures: {shown}",)


def find_pictures(path: str) -> PictureFiles:
    """The pictures of a folder.

    Raises:
        RefusedError: there is no such folder, or no picture in it; a link leads out of it, in a circle or nowhere; a
            name is not UTF-8; a folder cannot be read.
        MachineError: object storage does not answer, or does not let this user in.
    """
    check_scheme(path)
    found = _in_storage(path.rstrip("/")) if is_remote(path) else _on_disk(os.path.normpath(path))
    if not found.names:
        raise RefusedError(
            f"no pictures in {path}",
            got=f"other files: {some_of(found.others)}" if found.others else "an empty folder",
            expected=f"files whose names end in one of {', '.join(sorted(EXTENSIONS))}",
            next=f"correct the path; {START}",
        )
    return found


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return name.rpartition(".")[2].lower() in EXTENSIONS and "." in name


def _on_disk(path: str) -> PictureFiles:
    if not Path(path).is_dir():
        raise _no_folder(path)
    walk, pictures, others = Walk(path, "pictures", _is_of_pictures), list[tuple[str, int, int]](), list[str]()
    for entry, name in walk.files():
        if is_picture(name):
            seen = entry.stat()
            pictures.append((name, seen.st_size, seen.st_mtime_ns))
        else:
            others.append(name.encode(errors="replace").decode())
    files = sorted(pictures, key=lambda one: _order(one[0]))
    names = [name for name, *_ in files]
    sizes, times = [size for _, size, _ in files], [time for *_, time in files]
    return PictureFiles(path, names, sizes, times, tuple(sorted(walk.folders)), tuple(sorted(others)), False)


def _is_of_pictures(name: str) -> bool:
    """Whether a file is a picture, or a table of labels that is found beside them."""
    return is_picture(name) or name in TABLES


def _no_folder(path: str) -> RefusedError:
    if not Path(path).is_file():
        return nothing_at(Path(path), "folder of pictures", "a folder")
    archive = path.lower().endswith((".zip", ".tgz", ".tar.gz"))
    return RefusedError(
        f"{path} is no folder of pictures",
        got="a file",
        expected="a folder",
        next="unpack it"
        if archive
        else "use `kind: webdataset` for tar files of pictures"
        if path.lower().endswith(".tar")
        else "name the folder",
    )


def _in_storage(uri: str) -> PictureFiles:
    below = {file.uri.removeprefix(f"{uri}/"): file for file in files_below(uri)}
    kept = [name for name in below if not name.endswith("/") and not any(map(is_leftover, name.split("/")))]
    if not kept:
        if find_file(uri) is not None:
            raise RefusedError(f"{uri} is no folder of pictures", got="an object", expected="what lies below a folder")
        raise nothing_at(uri, "folder of pictures", "what lies below a folder")
    names = sorted(filter(is_picture, kept), key=_order)
    return PictureFiles(
        uri,
        names,
        [below[name].size for name in names],
        [below[name].tag for name in names],
        tuple(sorted({name.partition("/")[0] for name in kept if "/" in name})),
        tuple(sorted(name for name in kept if not is_picture(name))),
        True,
    )


def _order(name: str) -> str:
    """By which names are sorted, folder by folder: as text their order is that of their bytes in UTF-8."""
    return name.replace("/", "\0")
