"""Tar files of samples, as WebDataset writes them: which there are, and what is in one. Nothing is ever unpacked.

A sample is the members of one key, one beside the other: `cats/017.jpg` and `cats/017.cls` have the key `cats/017`.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from akd_dist.base.errors import AkdError, RefusedError, unreadable
from akd_dist.data.folder_walk import Walk, is_leftover
from akd_dist.data.parquet_files import check_scheme, matches, nothing_at
from akd_dist.data.picture_files import is_picture
from akd_dist.recipe.paths import expand_braces
from akd_dist.storage.remote import RemoteFile, files_below, find_file, is_remote

Shard = Path | RemoteFile
# Bytes that are read ahead: an object answers a request after some 30 ms, whatever it brings; a disk at once.
_BUFFER_BYTES, _REMOTE_BUFFER_BYTES = 1 << 16, 1 << 23
# First bytes of compressed files.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
# What may lie beside a shard under its name, as train-000.tar.md5, or as train-000.json of img2dataset.
_COMPANIONS = (".crc", ".md5", ".sha1", ".sha256", ".json", ".txt", ".idx", ".index", ".parquet", ".csv")
# Key and ending, as the webdataset library has them: a folder may have dots, and a key has none.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
# What a writer may leave in an archive about itself, as the webdataset library has it.
_ABOUT = re.compile(r"__[^/]*__(/|$)")
# So much is read at a time of what follows the end of an archive.
_AFTER_END = 1 << 16
# The most zeros there: tar pads to 10,240 bytes, and with a large --blocking-factor to a megabyte.
_MOST_PADDING = 2 << 20


@dataclass(frozen=True)
class Member:
    """A file within an archive."""

    name: str
    key: str
    ending: str
    """In small letters: jpg, cls, json."""
    offset: int
    """Where its header begins."""
    data: int
    """Where its content begins."""
    size: int
    """Bytes of the content."""

    @property
    def end(self) -> int:
        """Where the next header may begin."""
        return self.data - (-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """The members of a key."""

    key: str
    picture: Member
    others: dict[str, Member]
    """By ending."""

    @property
    def offset(self) -> int:
        """Where its first header begins."""
        return min(one.offset for one in (self.picture, *self.others.values()))

    @property
    def end(self) -> int:
        """Where the next sample may begin."""
        return max(one.end for one in (self.picture, *self.others.values()))


@dataclass(frozen=True)
class FoundShards:
    """The tar files that a path names."""

    files: list[Shard]
    """In the order of their names, folder by folder; those of a brace expression in its own."""
    left_out: tuple[str, ...] = ()
    """Names of other files there."""


# ---- which there are


def find_shards(path: str) -> FoundShards:
    """The tar files that a path, a folder, a glob or a brace expression names.

    Raises:
        RefusedError: there is none, or not one of those that an expression names; one is compressed, or a copy that may
            be under way.
        MachineError: object storage does not answer, or does not let this user in.
    """
    check_scheme(path)
    try:
        several = [path] if _is_there(path) else expand_braces(path)
    except ValueError as error:
        raise RefusedError(f"{path} cannot be expanded", got=error, expected="such as train-{000..099}.tar") from error
    found = [_named(one) for one in several]
    files = list(dict.fromkeys(file for one in found for file in one.files))
    return FoundShards(files, tuple(name for one in found for name in one.left_out))


def _is_there(path: str) -> bool:
    return "{" not in path or (Path(path).exists() if not is_remote(path) else find_file(path) is not None)


def _named(path: str) -> FoundShards:
    pattern = glob.has_magic(path)
    files: list[Shard]
    if is_remote(path):
        files, base, whole = _in_storage(path.rstrip("/"))
    elif (place := Path(path)).is_dir():
        files, base, whole = _in_folder(place), path, True
    elif pattern and not place.exists():
        files, base, whole = _matching(path), "", True
    else:
        files, base, whole = [place] if place.is_file() else [], "", False
    if not whole:  # one file may have any name
        kept, others = files, []
    else:
        files = [one for one in files if not any(map(is_leftover, _below(one, base).split("/")))]
        kept = [one for one in files if _is_shard(one)]
        others = [_below(one, base) for one in files if one not in set(kept)]
    if not kept:
        expected = "a tar file, a folder of them, a glob, or an expression such as train-{000..099}.tar"
        raise nothing_at(path if is_remote(path) else Path(path), "tar file", expected, others)
    return FoundShards(kept, tuple(others))


def _in_folder(folder: Path) -> list[Shard]:
    """The files in a folder and below it, folder by folder.

    Raises:
        RefusedError: as `Walk.files`.
    """
    return [*sorted(Path(entry.path) for entry, _ in _walk(folder).files())]


def _matching(pattern: str) -> list[Shard]:
    """The files that match a pattern, folder by folder.

    Raises:
        RefusedError: a link leads out of the folder in which the pattern looks, or to nothing.
    """
    parts = Path(pattern).parts
    walk = _walk(Path(*parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))]))
    found = [Path(one) for one in glob.glob(pattern, recursive=True)]  # noqa: PTH207  # it may be absolute
    for file in found:
        if _is_called_shard(file.name):
            walk.check_file(str(file))
    return [*sorted(file for file in found if file.is_file())]


def _walk(folder: Path) -> Walk:
    advice = "; shards that are named one by one, as train-{000..099}.tar, may be links"
    return Walk(str(folder), "tar files", _is_called_shard, advice, each_once=True)


def _is_called_shard(name: str) -> bool:
    return name.lower().endswith(".tar")


def _in_storage(uri: str) -> tuple[list[Shard], str, bool]:
    if (one := find_file(uri)) is not None:
        return [one], "", False
    parts = uri.split("/")
    first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    base = "/".join(parts[:first])
    below = files_below(base)
    if first < len(parts):
        below = [one for one in below if matches(_below(one, base).split("/"), parts[first:])]
    files: list[Shard] = [*sorted(below, key=lambda one: one.uri.split("/"))]
    return files, base, True


def _below(file: Shard, base: str) -> str:
    return str(file).removeprefix(base).lstrip("/") if base else file.name


def _is_shard(file: Shard) -> bool:
    """Whether a file of a folder is read.

    Raises:
        RefusedError: it may be a shard that is compressed, or on its way.
    """
    name = file.name.lower()
    if _is_called_shard(name):
        return True
    if (".tar" in name or name.endswith(".tgz")) and not name.endswith(_COMPANIONS):
        raise RefusedError(
            f"{file} looks like a compressed tar file, or like a copy that is under way",
            got=f"a name that ends in {name[name.rfind('.') :]}",
            expected="tar files that are whole and not compressed, each once",
            next="decompress it (gunzip, unzstd), wait for the copy, remove it, or name the files with a glob: *.tar",
        )
    return False


# ---- what is in one


def open_shard(shard: Shard) -> IO[bytes]:
    """A shard, to be read from its beginning.

    Raises:
        RefusedError: it cannot be read, is empty, or is compressed.
    """
    with contextlib.ExitStack() as closing:
        try:
            opened: Any
            opened = shard.open("rb", _BUFFER_BYTES) if isinstance(shard, Path) else shard.open(_REMOTE_BUFFER_BYTES)
            closing.callback(opened.close)
            start = opened.read(tarfile.BLOCKSIZE)
            opened.seek(0)
        except OSError as error:
            raise _unreadable(shard, error) from error
        kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
        if kind is not None:
            raise RefusedError(
                f"{shard} is compressed",
                got=kind,
                expected="a tar file as it is, so that samples can be read from anywhere in it",
                next="decompress it: pictures are hardly larger without",
            )
        if not start:
            raise _damaged(shard, None, "0 bytes")
        closing.pop_all()
        return opened  # type: ignore[no-any-return]


def read_samples(opened: IO[bytes], shard: Shard, *, whole: bool = True) -> Iterator[Sample]:
    """The samples of an archive; what lies in them is not read.

    Args:
        opened: the archive, or a part of it that begins with a sample.
        shard: for messages.
        whole: whether it is all of the archive, whose end is looked at then.

    Raises:
        RefusedError: it is cut off or damaged; a member is a link or a device, is called by an absolute path, or one
            that climbs out; a key has no picture, or two; its members do not lie together. Names the shard and the key.
    """
    seen: set[str] = set()
    key, members = None, list[Member]()
    for member in _members(opened, shard, whole=whole):
        if member.key != key:
            if members:
                yield _sample(shard, members)
            if member.key in seen:
                raise RefusedError(
                    f"the members of a sample do not lie together in {shard}",
                    got=f"{member.name} after members of other keys",
                    expected="all members of a key one beside the other, and each key once",
                    next="write the archive sorted by name (tar --sort=name)",
                )
            key, members = member.key, []
            seen.add(member.key)
        members.append(member)
    if members:
        yield _sample(shard, members)


def _sample(shard: Shard, members: Sequence[Member]) -> Sample:
    pictures = [one for one in members if is_picture(f"x.{one.ending}") and "." not in one.ending]
    others = {one.ending: one for one in members if one not in pictures}
    if len(pictures) != 1 or len(others) + 1 < len(members):
        raise RefusedError(
            f"the sample {members[0].key} of {shard} has {'no' if not pictures else 'more than one'} picture"
            if len(pictures) != 1
            else f"the sample {members[0].key} of {shard} has two members of the same kind",
            got=", ".join(one.name for one in members),
            expected="one picture for each key, such as key.jpg, key.png or key.webp",
            next="correct the archive, or write the samples as sources of their own",
        )
    return Sample(members[0].key, pictures[0], others)


def _members(opened: IO[bytes], shard: Shard, *, whole: bool) -> Iterator[Member]:
    """The files of an archive that belong to samples."""
    last = None
    try:
        archive = tarfile.TarFile(fileobj=opened, mode="r", encoding="utf-8")
        at = -1
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # `tarfile` would keep them all
            if archive.offset <= at:
                raise _damaged(shard, last, "a header that leads backwards")
            at = archive.offset
            if (member := _member(shard, info)) is not None:
                yield member
            last = info.name
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _damaged(shard, last, error) from error
    if whole:
        _check_end(opened, archive.offset, shard, last)


def _member(shard: Shard, info: tarfile.TarInfo) -> Member | None:
    """A file of an archive; None for folders, and for what is no part of a sample."""
    name = info.name.removeprefix("./")
    parts = name.split("/")
    reason = None
    if info.name.startswith("/") or ".." in parts:
        reason = "an absolute path" if info.name.startswith("/") else "a path that climbs out of the archive"
    elif info.issym() or info.islnk():
        reason = f"a link to {info.linkname}"
    elif not (info.isreg() or info.isdir()) or info.issparse():
        reason = "a device, a pipe, or a sparse file"
    elif any("\ud800" <= character <= "\udfff" for character in name):
        reason = "a name that is not UTF-8"
    if reason is not None:
        raise RefusedError(
            f"{shard} holds what does not belong into a dataset: {info.name!a}",
            got=reason,
            expected="regular files below the archive's own root",
            next="do not trust this archive; write it again from the pictures",
        )
    if info.isdir() or any(map(is_leftover, parts)) or _ABOUT.match(name):
        return None
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Member(name, found[1], found[2].lower(), info.offset, info.offset_data, info.size)


def key_of(name: str) -> str:
    """The key of a member by its name."""
    found = _NAME.fullmatch(name)
    return name if found is None else found[1]


def _check_end(opened: IO[bytes], end: int, shard: Shard, last: str | None) -> None:
    """Refuse an archive that has no proper end: `tarfile` takes a damaged header for one."""
    opened.seek(end)
    first = opened.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise _damaged(shard, last, "no end-of-archive after it: the archive is cut off")
    if first.strip(b"\0"):
        raise _damaged(shard, last, "a damaged header after it")
    zeros = 0
    while rest := opened.read(_AFTER_END):
        zeros += len(rest)
        if rest.strip(b"\0"):
            raise _damaged(shard, last, "something after the end of the archive, as where two were joined by cat")
        if zeros > _MOST_PADDING:
            raise _damaged(shard, last, "more zeros after it than tar pads with, as in a download that has not ended")


def _damaged(shard: Shard, last: str | None, got: object) -> RefusedError:
    return RefusedError(
        f"{shard} is no whole tar file" + (f", behind its member {last!a}" if last else ""),
        got=got,
        expected="a tar file that reads to its end",
        next="copy it again, or write it again",
    )


def content(opened: IO[bytes], shard: Shard, member: Member) -> bytes:
    """What a member holds.

    Raises:
        RefusedError: the archive ends before it does.
    """
    opened.seek(member.data)
    data = opened.read(member.size)
    if len(data) < member.size:
        raise _damaged(shard, member.name, f"{member.size - len(data):,} bytes of it are missing")
    return data


def bytes_of(shard: Shard, start: int, stop: int) -> io.BytesIO:
    """A part of an archive, in one request.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        with open(shard, "rb", 0) if isinstance(shard, Path) else shard.open() as opened:
            opened.seek(start)
            data = opened.read(stop - start) or b""
    except OSError as error:
        raise _unreadable(shard, error) from error
    if len(data) < stop - start:
        raise _damaged(shard, None, f"{stop - start - len(data):,} bytes are missing since it was looked at")
    return io.BytesIO(data)


def _unreadable(shard: Shard, error: OSError) -> AkdError:
    return unreadable(RefusedError, shard, error, expected="a tar file that this user can read")
