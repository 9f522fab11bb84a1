"""Whether what a process has mapped from this node's cache is still what was written there: by hash, not by time.

A `Guard` hashes everything once in the background while training begins. Nothing may be published before that is over:
`vouch` waits for it, and from then on looks at size, times and inode of the files. Where these have changed, or where
the last pass is long ago, it hashes everything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from akd_dist.storage.errors import CorruptCacheError
from akd_dist.storage.files import PARTIAL_SUFFIX, failpoint, file_lock, is_settled, stamp_of

SHARE = 100
"""Everything is hashed again once so many times the duration of a pass have gone by: 1 % of the time, at most."""
_WAIT_SECONDS = 0.25
_TRIES = 3

Returned = TypeVar("Returned")


class Part(NamedTuple):
    """Some of what is mapped, and its hash."""

    what: str
    """For the message: `rows 0 to 4,095`."""
    arrays: tuple[npt.NDArray[Any], ...]
    """Contiguous; hashed one after the other."""
    sha256: str
    """What it was when it was written."""


@dataclass(frozen=True)
class Content:
    """What a process has mapped from an entry of the cache."""

    files: tuple[Path, ...]
    """The files of the entry that are mapped, all in its folder; none for what lies in no cache."""
    parts: Callable[[], Iterable[Part]]
    """What they hold."""
    inodes: tuple[int | None, ...]
    """Those of the files when they were mapped."""

    def verify(self) -> None:
        """Hash everything. An entry that is not what was written is removed, so that it is made anew.

        Raises:
            CorruptCacheError: it is not what was written; names the files and the part.
        """
        for _ in self.verifying():
            pass

    def verifying(self) -> Iterator[None]:
        """As `verify`, and yields after every part."""
        for part in self.parts():
            if (found := digest(part.arrays)) != part.sha256:
                discard(self.files, self.inodes)
                raise CorruptCacheError(
                    f"{' or '.join(map(str, self.files))} is no longer what was written there",
                    got=f"{part.what} with sha256 {found[:16]}",
                    expected=f"sha256 {part.sha256[:16]}",
                    next="the same command makes it anew; if this happens again, check the disk, "
                    "or choose another --cache-root",
                )
            yield


def map_array(path: Path) -> np.memmap[Any, Any]:
    """A .npy file as a read-only memory map.

    Raises:
        ValueError: its head is damaged, or it is shorter than that says.
    """
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of many kinds: whatever the literal in its head leads to
        raise ValueError(f"{path} is not an array") from error
    if not isinstance(mapped, np.memmap) or not mapped.flags.c_contiguous:
        raise ValueError(f"{path} is not an array as it is written here")
    return mapped


def digest(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """Hexadecimal sha256 of the bytes of arrays, one after the other."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def inodes_of(files: Iterable[Path]) -> tuple[int | None, ...]:
    """The inode of each file, None where there is none."""
    return tuple(None if stamp is None else stamp[-1] for stamp in map(stamp_of, files))


def discard(files: Sequence[Path], inodes: Sequence[int | None]) -> None:
    """Remove an entry of the cache, in use or not, so that it is made anew; whoever has it mapped keeps the old bytes.

    Args:
        files: of the entry, all in its folder.
        inodes: those that were found to be wrong; if the files are others by now, somebody has made it anew, and it
            stays.
    """
    entry = files[0].parent
    with file_lock(entry.with_name(f"{entry.name}.lock"), what=f"the cache entry {entry}"):
        if inodes_of(files) == tuple(inodes):
            gone = entry.with_name(f"{entry.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                entry.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def renewing(act: Callable[[], Returned], tell: Callable[[str], None]) -> Returned:
    """What `act` returns, which prepares and decodes what it needs; done again where that turned out to be corrupt.

    Args:
        tell: told in a line of each time.

    Raises:
        CorruptCacheError: it was corrupt again and again, as on a failing disk.
    """
    for left in reversed(range(_TRIES)):
        try:
            return act()
        except CorruptCacheError as error:
            if not left:
                raise
            tell(f"{error.what}: {error.got}; it is made anew, and all goes on from what was kept before")
    raise AssertionError("unreachable")


class Guard:
    """Vouches for what this process has mapped. As a context, it ends its thread.

    Args:
        contents: all of it.
    """

    def __init__(self, contents: Sequence[Content]) -> None:
        self._contents = contents
        self._leaving = threading.Event()
        self._error: Exception | None = None
        self._seconds, self._passed_at, self._seen, self._settled = 0.0, 0.0, self._look(), False
        self._thread = threading.Thread(target=self._first, name="verification", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        self._leaving.set()
        self._thread.join()

    def vouch(self, on_wait: Callable[[], None] = lambda: None) -> bool:
        """Return once everything that was read so far is known to be what was written.

        Args:
            on_wait: called several times a second while that takes.

        Returns:
            Whether everything was hashed since the call; False where it was hashed before, and the files are untouched.

        Raises:
            CorruptCacheError: it is not what was written.
        """
        while self._thread.is_alive():
            self._thread.join(_WAIT_SECONDS)
            on_wait()
        if self._error is not None:
            raise self._error
        recent = time.monotonic() - self._passed_at < SHARE * self._seconds
        if recent and self._settled and self._look() == self._seen:
            return False
        self._pass(on_wait)
        return True

    def _first(self) -> None:
        failpoint("verification.before_pass")
        try:
            self._pass(lambda: None)
        except Exception as error:
            self._error = error

    def _pass(self, on_wait: Callable[[], None]) -> None:
        # Looked at before anything is read: what is written meanwhile shows the next time.
        began, seen = time.monotonic(), self._look()
        settled, told = all(map(is_settled, seen)), began
        for content in self._contents:
            for _ in content.verifying():
                if self._leaving.is_set():
                    return
                if time.monotonic() - told > _WAIT_SECONDS:
                    on_wait()
                    told = time.monotonic()
        self._seen, self._settled, self._passed_at = seen, settled, time.monotonic()
        self._seconds = self._passed_at - began

    def _look(self) -> list[list[int] | None]:
        return [stamp_of(file) for content in self._contents for file in content.files]
