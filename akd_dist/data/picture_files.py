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
# What computers leave in folders of pictures: nobody needs to hear of it.
_LEFTOVERS = frozenset(["Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir"])


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


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or one that computers leave beside pictures."""
    return name.startswith(".") or name in _LEFTOVERS


def _on_disk(path: str) -> PictureFiles:
    if not Path(path).is_dir():
        raise _no_folder(path)
    walk = _Walk(path)
    walk.look(path, "", (walk.real,))
    files = sorted(walk.pictures, key=lambda one: _order(one[0]))
    names = [name for name, *_ in files]
    sizes, times = [size for _, size, _ in files], [time for *_, time in files]
    return PictureFiles(path, names, sizes, times, tuple(sorted(walk.folders)), tuple(sorted(walk.others)), False)


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


class _Walk:
    """A walk through a folder: links are followed as long as they stay in it."""

    def __init__(self, root: str) -> None:
        self.root, self.real = root, os.path.realpath(root)
        self.pictures: list[tuple[str, int, int]] = []
        """Name, size and time of each."""
        self.folders: list[str] = []
        self.others: list[str] = []

    def look(self, place: str, below: str, above: tuple[str, ...]) -> None:
        """Find what lies in a folder.

        Args:
            place: the folder.
            below: the same relative to the root, with a slash at its end.
            above: the real paths of this folder and those that it lies in.
        """
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if is_leftover(entry.name):
                        continue
                    if entry.is_file(follow_symlinks=False):
                        self._file(entry, below + entry.name)
                    else:
                        self._other(entry, below + entry.name, above)
        except OSError as error:
            raise unreadable(
                RefusedError,
                f"the folder {place}",
                error,
                expected="folders and pictures that this user can read",
                next="correct its permissions, or leave it out",
            ) from error

    def _file(self, entry: os.DirEntry[str], name: str) -> None:
        if is_picture(entry.name):
            self._check_name(name)
            seen = entry.stat()
            self.pictures.append((name, seen.st_size, seen.st_mtime_ns))
        else:
            self.others.append(name.encode(errors="replace").decode())

    def _other(self, entry: os.DirEntry[str], name: str, above: tuple[str, ...]) -> None:
        """A folder, a link, or something else."""
        real = self._target(entry) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
        if entry.is_dir():
            if real in above:
                raise _refused_link(entry.path, real, "to a folder which it lies in itself", "remove the link")
            self._check_name(name)
            if not name.count("/"):
                self.folders.append(name)
            self.look(entry.path, f"{name}/", (*above, real))
        elif entry.is_file():
            self._file(entry, name)
        elif is_picture(entry.name):
            raise RefusedError(
                f"{entry.path} is no regular file",
                got="a link to nothing" if entry.is_symlink() else "a device, a socket or a pipe",
                expected="pictures",
                next="remove it",
            )

    def _target(self, entry: os.DirEntry[str]) -> str:
        """Where a link leads.

        Raises:
            RefusedError: out of the folder.
        """
        real = os.path.realpath(entry.path)
        inside = real == self.real or real.startswith(f"{self.real.rstrip('/')}/")
        if not inside and (is_picture(entry.name) or entry.is_dir()):
            advice = "copy what it leads to (cp -rL), or set `path` to a folder that holds both the link and its target"
            raise _refused_link(entry.path, real, f"out of the folder {self.root}", advice)
        return real

    def _check_name(self, name: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"a name in {self.root} is not UTF-8",
                got=ascii(name),
                expected="names in UTF-8, by whose bytes rows are ordered",
                next="rename it",
            ) from error


def _refused_link(link: str, real: str, where: str, advice: str) -> RefusedError:
    return RefusedError(
        f"the link {link} leads {where}",
        got=f"it leads to {real}",
        expected="links within the folder, and not in a circle",
        next=advice,
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
