"""Whether what a process has mapped from this node's cache is still what was written there: by hash, not by time.

A `Guard` hashes everything once in the background while it is first read. Nothing may be published before that is over:
`vouch` waits for it, and from then on looks at size, times and inode of the files. What was hashed long ago it hashes
again. Where a file was touched, it vouches for nothing that was read since it was mapped: bytes that are right now may
have been wrong in between.
"""

import contextlib
import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import CorruptCacheError, TouchedCacheError
from akd_dist.base.files import canonical_json, failpoint, is_settled, partial_name, replace, sha256, stamp_of
from akd_dist.base.locks import file_lock

SHARE = 100
"""Everything is hashed again once so many times the duration of a pass have gone by: 1 % of the time, at most."""
# Between two calls of `on_wait`: a live view, and a driver that looks for signs of life, are kept up to date by it.
_WAIT_SECONDS = 0.25
# The most that is remembered of what was left: some hundred thousand files.
_REMEMBERED_BYTES = 4 * 2**20
# So short a time may be read from what comes and goes before it is hashed for the first time.
_SHORT_SECONDS = 5.0
# How often an entry with wrong bytes is met before the disk is blamed.
_TRIES = 3
# How often an entry may be touched by others although its bytes are right, before the command gives up.
_TOUCHES = 10

Returned = TypeVar("Returned")
Arrays = tuple[npt.NDArray[Any], ...]
"""Some rows of arrays that belong together."""


class Part(NamedTuple):
    """Some of what is mapped, and its hash."""

    what: str
    """For the message: `rows 0 to 4,095`."""
    arrays: tuple[npt.NDArray[Any], ...]
    """Hashed one after the other."""
    sha256: str
    """What it was when it was written."""


@dataclass(frozen=True, eq=False)
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


class _Watched:
    """A content that a guard vouches for, and what is known of it."""

    def __init__(self, content: Content, wait: float = 0.0) -> None:
        self.content = content
        # Looked at before anything is hashed: whatever changes a file after this shows.
        self.seen = [stamp_of(file) for file in content.files]
        self.marks = [_mark(file, stamp) for file, stamp in zip(content.files, self.seen, strict=True)]
        self.due: float | None = time.monotonic() + wait  # when it is to be hashed; None if it has been
        self.left = self.settled = False
        self.began_at = self.passed_at = self.seconds = 0.0

    def passes(self) -> Iterator[None]:
        """Hash it, yielding after every part."""
        began = time.monotonic()
        # A write within the same tick of the file system's clock as the one before leaves the file's time as it was.
        # Only a pass that begins after that tick is known to have read what the time stands for.
        settled = all(map(is_settled, self.seen))
        yield from self.content.verifying()
        self.settled, self.began_at, self.passed_at = settled, began, time.monotonic()
        self.seconds = self.passed_at - began

    @property
    def touched(self) -> Path | None:
        """The first file that is another one than when it was mapped, as far as that shows."""
        pairs = zip(self.content.files, self.seen, strict=True)
        return next((file for file, before in pairs if stamp_of(file) != before), None)

    def check_untouched(self) -> None:
        """Refuse what was touched: bytes that are right now may have been wrong in between."""
        if touched := self.touched:
            raise TouchedCacheError(
                f"{touched} was touched while it was in use",
                got="what was written there, but another time, inode or size of the file than when it was mapped",
                expected="a file that nothing else writes to, moves or changes the mode of",
                next="keep other programs off this --cache-root, or choose another; the same command goes on",
            )


class Guard:
    """Vouches for what this process has mapped. As a context, it ends its thread.

    What is read from comes and goes: `add` it before, and `leave` it after. What was left is hashed once more, after
    the last byte was read, and let go only then; from then on nothing rests on it.

    Args:
        contents: what is mapped already.
        vouched: a file that remembers what was left and found right, by mark: it may be evicted, and whatever was kept
            of it before stays good. None remembers nothing.
    """

    def __init__(self, contents: Sequence[Content], vouched: Path | None = None) -> None:
        self._watched = [_Watched(content) for content in contents]
        self._vouched = vouched
        self._change, self._leaving = threading.Condition(), threading.Event()
        self._error: Exception | None = None
        self._hashing: _Watched | None = None
        self._thread = threading.Thread(target=self._run, name="verification", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        with self._change:
            self._leaving.set()
            self._change.notify_all()
        self._thread.join()

    def add(self, content: Content) -> None:
        """Vouch for this as well, from before the first byte of it is read."""
        with self._change:
            # What is read for so short a time is hashed once, when it is left; unless somebody asks before.
            self._watched.append(_Watched(content, _SHORT_SECONDS))
            self._change.notify_all()

    def leave(self, content: Content) -> None:
        """No byte of this is read any more, unless it is added again."""
        with self._change:
            for one in self._watched:
                if one.content is content:
                    one.due, one.left = 0.0, True
            self._change.notify_all()

    def look(self) -> None:
        """Refuse to go on if it is known by now that something is not what was written; see `settle`.

        Raises:
            CorruptCacheError: so it is.
        """
        if self._error is not None:
            raise self._error

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Return once everything was hashed that is watched now: what was left until now is let go then.

        Raises:
            CorruptCacheError: it is not what was written.
        """
        self._settled(on_wait)

    def _settled(self, on_wait: Callable[[], None]) -> list[_Watched]:
        """As `settle`; what of it is watched still. Meanwhile and afterwards another thread may add, and leave."""
        with self._change:
            watched = list(self._watched)
            for one in watched:
                one.due = None if one.due is None else 0.0
            self._change.notify_all()
            while self._hashing in watched or any(one.due is not None for one in watched):
                if self._error is not None or self._leaving.is_set():
                    break
                self._change.wait(_WAIT_SECONDS)
                self._change.release()
                try:
                    on_wait()
                finally:
                    self._change.acquire()
            watched = [one for one in watched if one in self._watched]
        if self._error is not None:
            raise self._error
        return watched

    def vouch(self, on_wait: Callable[[], None] = lambda: None) -> list[str]:
        """Return once everything that was read so far is known to be what was written.

        Args:
            on_wait: called several times a second while that takes.

        Returns:
            The marks (`marks_of`) of files that were hashed before the call and are untouched since: what was read of
            them meanwhile rests on that. None where everything was hashed since the call.

        Raises:
            CorruptCacheError: it is not what was written.
        """
        called = time.monotonic()
        watched = self._settled(on_wait)
        # Size, times and inode show what a program wrote, and not what a failing disk or memory does: so the bytes
        # themselves are read again from time to time, all of them together for no more than a share of it.
        share = SHARE * sum(one.seconds for one in watched)
        resting, told = [], time.monotonic()
        for one in watched:
            if time.monotonic() - one.passed_at < share and one.settled and not one.touched:
                resting += one.marks if one.began_at < called else []
                continue
            for _ in one.passes() if one.began_at < called else ():
                if time.monotonic() - told > _WAIT_SECONDS:
                    on_wait()
                    told = time.monotonic()
            one.check_untouched()
        return resting

    @property
    def marks(self) -> list[str]:
        """Of everything that is mapped: each names its very files, and is another one after each change that shows."""
        return [mark for one in self._watched for mark in one.marks]

    def remembers(self, marks: Collection[str]) -> set[str]:
        """Which of these were left and found right before, by this process or another of this node."""
        if self._vouched is None or not self._vouched.exists():
            return set()
        return set(marks) & set(self._vouched.read_text().split())

    def _run(self) -> None:
        failpoint("verification.before_pass")
        while True:
            with self._change:
                self._hashing = None
                self._change.notify_all()
                while not self._leaving.is_set() and (wait := self._until_due()) > 0:
                    self._change.wait(min(wait, threading.TIMEOUT_MAX))
                if self._leaving.is_set():
                    return
                one = next(one for one in self._watched if one.due is not None and one.due <= time.monotonic())
                self._hashing, one.due, left = one, None, one.left
            try:
                for _ in one.passes():
                    if self._leaving.is_set():
                        return
                if left:
                    one.check_untouched()
                    self._remember(one.marks)
            except Exception as error:
                with self._change:
                    self._error, self._hashing = error, None
                    self._change.notify_all()
                return
            if left:
                with self._change:
                    self._watched.remove(one)
            del one  # and with it the last reference to what is mapped

    def _until_due(self) -> float:
        """Seconds until something is to be hashed; without an end where nothing is."""
        return min((one.due for one in self._watched if one.due is not None), default=math.inf) - time.monotonic()

    def _remember(self, marks: Iterable[str]) -> None:
        if self._vouched is None:
            return
        with contextlib.suppress(OSError):  # a note that is lost costs some steps, after a kill
            if self._vouched.exists() and self._vouched.stat().st_size > _REMEMBERED_BYTES:
                kept = self._vouched.read_text().split()
                replace(self._vouched, "".join(f"{mark}\n" for mark in kept[len(kept) // 2 :]).encode(), durable=False)
            with open(self._vouched, "a") as notes:
                notes.write("".join(f"{mark}\n" for mark in marks))


def marks_of(files: Iterable[Path]) -> list[str]:
    """What names some files as they are now: of each another one after each change that shows."""
    return [_mark(file, stamp_of(file)) for file in files]


def _mark(file: Path, stamp: list[int] | None) -> str:
    return sha256(canonical_json([str(file), stamp]))[:20]
