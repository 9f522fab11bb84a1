"""Whether what a process has mapped from this node's cache is still what was written there: by hash, not by time.

A `Guard` hashes everything once in the background while training begins. Nothing may be published before that is over:
`vouch` waits for it, and from then on looks at size, times and inode of the files. Where the last pass is long ago, it
hashes everything again. Where a file was touched, it vouches for nothing that was read since it was mapped: bytes that
are right now may have been wrong in between.
"""

import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import CorruptCacheError, TouchedCacheError
from akd_dist.base.files import canonical_json, failpoint, is_settled, partial_name, sha256, stamp_of
from akd_dist.base.locks import file_lock

SHARE = 100
"""Everything is hashed again once so many times the duration of a pass have gone by: 1 % of the time, at most."""
# Between two calls of `on_wait`: a live view, and a driver that looks for signs of life, are kept up to date by it.
_WAIT_SECONDS = 0.25
# How often an entry with wrong bytes is met before the disk is blamed.
_TRIES = 3
# How often an entry may be touched by others although its bytes are right, before the command gives up.
_TOUCHES = 10

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
    # A file that is missing, or that this user may not read, is no damage, and is told as what it is.
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


def lock_of(entry: Path) -> Path:
    """The lock under which an entry is made, and removed where it is found wrong: that of its name up to a dot."""
    return entry.with_name(f"{entry.name.split('.')[0]}.lock")


def discard(files: Sequence[Path], inodes: Sequence[int | None]) -> None:
    """Remove an entry of the cache, in use or not, so that it is made anew; whoever has it mapped keeps the old bytes.

    Args:
        files: of the entry, all in its folder.
        inodes: those that were found to be wrong; if the files are others by now, somebody has made it anew, and it
            stays.
    """
    entry = files[0].parent
    # The lock under which entries are made: none is removed while another process makes it anew.
    with file_lock(lock_of(entry), what=f"the cache entry {entry}"):
        if inodes_of(files) == tuple(inodes):
            gone = partial_name(entry)
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                entry.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def renewing(act: Callable[[], Returned], tell: Callable[[str], None]) -> Returned:
    """What `act` returns, which prepares and decodes what it needs; done again where that turned out to be corrupt.

    Args:
        tell: told in a line of each time.

    Raises:
        CorruptCacheError: it was corrupt again and again, as on a failing disk, or touched all the time.
    """
    wrong = touched = 0
    while True:
        try:
            return act()
        except TouchedCacheError as error:
            touched += 1
            if touched == _TOUCHES:
                raise
            tell(f"{error.what}: {error.got}; all goes on from what was kept before")
        except CorruptCacheError as error:
            wrong += 1
            if wrong == _TRIES:
                raise
            tell(f"{error.what}: {error.got}; it is made anew, and all goes on from what was kept before")


class Guard:
    """Vouches for what this process has mapped. As a context, it ends its thread.

    Args:
        contents: all of it.
    """

    def __init__(self, contents: Sequence[Content]) -> None:
        self._contents = contents
        self._files = [file for content in contents for file in content.files]
        self._leaving = threading.Event()
        self._error: Exception | None = None
        # Looked at before anything is hashed: whatever changes a file after this shows.
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
        # Size, times and inode show what a program wrote, and not what a failing disk or memory does: so the bytes
        # themselves are read again from time to time.
        recent = time.monotonic() - self._passed_at < SHARE * self._seconds
        if recent and self._settled and not self._touched():
            return False
        self._pass(on_wait)
        if touched := self._touched():
            raise TouchedCacheError(
                f"{touched} was touched while it was in use",
                got="what was written there, but another time, inode or size of the file than when it was mapped",
                expected="a file that nothing else writes to, moves or changes the mode of",
                next="keep other programs off this --cache-root, or choose another; the same command goes on",
            )
        return True

    @property
    def mark(self) -> str:
        """Names the very files that are mapped: another one after each change that shows."""
        return sha256(canonical_json([[str(file), stamp] for file, stamp in zip(self._files, self._seen, strict=True)]))

    def _touched(self) -> Path | None:
        """The first file that is another one than when it was mapped, as far as that shows."""
        both = zip(self._files, self._look(), self._seen, strict=True)
        return next((file for file, now, before in both if now != before), None)

    def _first(self) -> None:
        failpoint("verification.before_pass")
        try:
            self._pass(lambda: None)
        except Exception as error:
            self._error = error

    def _pass(self, on_wait: Callable[[], None]) -> None:
        began = told = time.monotonic()
        # A write within the same tick of the file system's clock as the one before leaves the file's time as it was.
        # Only a pass that begins after that tick is known to have read what the time stands for.
        settled = all(map(is_settled, self._seen))
        for content in self._contents:
            for _ in content.verifying():
                if self._leaving.is_set():
                    return
                if time.monotonic() - told > _WAIT_SECONDS:
                    on_wait()
                    told = time.monotonic()
        self._settled, self._passed_at = settled, time.monotonic()
        self._seconds = self._passed_at - began

    def _look(self) -> list[list[int] | None]:
        return [stamp_of(file) for file in self._files]
