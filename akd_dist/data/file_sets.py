"""Many files as one: known by a digest, so that no document has an entry for each of a hundred thousand pictures."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from akd_dist.base.errors import RefusedError, unreadable

# Files that a thread reads before it asks for more.
_TOGETHER = 64


@dataclass(frozen=True, eq=False)
class FileSet:
    """Local files of a folder."""

    folder: str
    names: Sequence[str] = field(repr=False)
    """Relative to it, in the order of their rows."""

    def __str__(self) -> str:
        return self._known_as

    @functools.cached_property
    def _known_as(self) -> str:
        return f"{self.folder} ({len(self.names):,} files, {number_of(self.names):013x})"

    @property
    def paths(self) -> list[str]:
        """Of all files."""
        return [f"{self.folder}/{name}" for name in self.names]

    def stamp(self) -> list[int] | None:
        """As `files.stamp_of`: bytes in all, the latest times of content and of inode, and a hash of all stamps."""
        seen = self._seen()
        if seen is None:
            return None
        latest = [max(time) for time in zip(*(stamp[1:3] for stamp in seen), strict=True)]
        return [sum(stamp[0] for stamp in seen), *latest, number_of(seen)]

    def size_and_time(self) -> tuple[int, int] | None:
        """Bytes in all, and a hash of names, sizes and times of content: the same for a copy that keeps the times."""
        seen = self._seen()
        if seen is None:
            return None
        told = (f"{name}\0{one[0]}\0{one[1]}" for name, one in zip(self.names, seen, strict=True))
        return sum(one[0] for one in seen), number_of(told)

    def sha256(self, threads: int) -> str:
        """Over names and contents.

        Raises:
            RefusedError: one cannot be read.
        """
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(self._digests, range(0, len(self.names), _TOGETHER))
            return digest_of(itertools.chain.from_iterable(found))

    def _digests(self, start: int) -> list[str]:
        names = self.names[start : start + _TOGETHER]
        return [f"{sha256_of_file(f'{self.folder}/{name}')} {name}" for name in names]

    def _seen(self) -> list[tuple[int, int, int, int]] | None:
        """Size, times and inode of each; None where one is gone."""
        try:
            found = map(os.stat, self.paths)
            return [(one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for one in found]
        except OSError:
            return None


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(RefusedError, path, error, expected="a file that may be read") from error


def digest_of(entries: Iterable[object]) -> str:
    """The sha256 of what names and numbers say, one after the other."""
    hashed = hashlib.sha256()
    for entry in entries:
        hashed.update(f"{entry}\0".encode())
    return hashed.hexdigest()


def number_of(entries: Iterable[object]) -> int:
    """Their digest as a number that JSON can hold."""
    return int(digest_of(entries)[:13], 16)
