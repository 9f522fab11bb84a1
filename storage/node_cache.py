"""What a node keeps of data that lie elsewhere: memory-mapped, shared by every process there, within a budget.

The cache's folder holds entries `<kind>/<key>/`, each made whole or not at all. A process keeps an entry from being
evicted with a shared lock on the entry's `in-use` file, for as long as it has the arrays mapped.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import platformdirs
from pydantic import ByteSize, TypeAdapter, ValidationError

from akd_dist.base import places
from akd_dist.base.errors import MachineError, RecipeError
from akd_dist.base.files import PARTIAL_SUFFIX, partial_name
from akd_dist.base.locks import file_lock, is_locked
from akd_dist.storage.content import lock_of

IN_USE = "in-use"
HEADER_BYTES = 4096
"""Room for the header of a .npy file: 128 bytes today, and a page at most."""

Progress = Callable[[int, int], None]


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder that was given, else $AKD_DIST_CACHE, else in the user's cache folder; absolute.

    Raises:
        MachineError: the user has no home, as in a container whose user is a bare number.
        RecipeError: it is a URI: what lies there is mapped into memory.
    """
    try:
        chosen = given or os.environ.get("AKD_DIST_CACHE") or platformdirs.user_cache_path("akd-dist")
        return places.folder(
            chosen, holds="a cache", option="--cache-root", expected="a folder on a disk of each node's own"
        )
    except RuntimeError as error:
        raise MachineError(
            "there is no folder for prepared data and decoded stores",
            got=str(error),
            expected="a user with a home, or a folder that is named",
            next="pass --cache-root, or set AKD_DIST_CACHE or HOME",
        ) from None


def ensure_home(cache_root: Path) -> None:
    """Have a HOME in this process and all that it starts: Ray and others look for one when they are imported, and fail.

    A user without any, as in a container whose user is a bare number, gets one below the cache root.
    """
    if not os.environ.get("HOME"):
        try:
            home = Path.home()  # as the system knows it
        except RuntimeError:
            home = cache_root / "home"
        os.environ["HOME"] = str(home)


def default_budget() -> int | None:
    """$AKD_DIST_CACHE_BUDGET in bytes (`50GB`, `1.5 TiB`), or None for as much as is free.

    Raises:
        RecipeError: it says something else.
    """
    text = os.environ.get("AKD_DIST_CACHE_BUDGET", "").strip()
    if not text:
        return None
    try:
        return TypeAdapter(ByteSize).validate_python(text if text.isascii() else None)
    except ValidationError:
        raise RecipeError(
            "AKD_DIST_CACHE_BUDGET is not a size", got=text, expected="bytes, such as 50GB", next="correct or unset it"
        ) from None


class NoRoomError(MachineError):
    """The cache has no room for an entry, with everything evicted that nobody uses."""


class Keep:
    """A shared lock on an entry; hand it to `until_unmapped` to keep it beyond the `with` block."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def until_unmapped(self, array: npt.NDArray[Any]) -> None:
        """Keep the entry until this memory map, and every view of it, is gone."""
        if self._descriptor is not None:
            # The mmap object below the array, which every view of it keeps alive, even after the array itself is gone.
            mapped = array.base
            weakref.finalize(mapped, os.close, self._descriptor)
            self._descriptor = None

    def release(self) -> None:
        """Let the entry go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def hold(entry: Path) -> Iterator[Keep]:
    """Keep an entry from being evicted, if it is there, and note that it was used."""
    keep = Keep(_shared_lock(entry / IN_USE))
    try:
        yield keep
    finally:
        keep.release()


def name_entry(building: Path, entry: Path) -> Keep:
    """Give a whole entry its name, held: between the name and a later hold, somebody could evict it."""
    (building / IN_USE).touch()
    keep = Keep(_shared_lock(building / IN_USE))
    try:
        building.rename(entry)
    except BaseException:
        keep.release()
        raise
    return keep


def make_room(
    cache_root: Path,
    need: int,
    budget: int | None,
    keep: Collection[Path] = (),
    reserve: Callable[[], object] = lambda: None,
) -> None:
    """Evict entries that nobody holds, least recently used first, until `need` bytes fit the budget and the disk.

    Args:
        need: bytes about to be written under `cache_root`.
        budget: bytes that all entries together may take; None for the default budget.
        keep: entries that stay whatever happens.
        reserve: called once there is room, before anybody else is given any: takes it, with files of that size.

    Raises:
        NoRoomError: they do not fit with everything evicted that can be; names need, free and budget.
    """
    cache_root.mkdir(parents=True, exist_ok=True)
    budget = default_budget() if budget is None else budget
    with file_lock(cache_root / "evict.lock", what="the cache"):
        # One process at a time: two would evict for the same need, and remove more than either wants.
        for left in _unfinished(cache_root):
            # Whoever makes an entry holds its lock meanwhile; what lay there before, and has no maker, was killed.
            if not is_locked(lock_of(left)):
                shutil.rmtree(left, ignore_errors=True)
        # What would not fit an empty cache evicts nothing.
        possible = need <= room_in(cache_root, budget)
        entries = sorted((entry for entry in _entries(cache_root) if entry not in keep), key=_last_used)
        while possible and entries and not _fits(cache_root, need, budget):
            evict(entries.pop(0))
        if not _fits(cache_root, need, budget):
            raise NoRoomError(
                f"no room in the cache {cache_root}",
                got=f"{shutil.disk_usage(cache_root).free:,} bytes free, {_used(cache_root):,} in entries in use",
                expected=f"{need:,} bytes" + ("" if budget is None else f" within a budget of {budget:,}"),
                next="free some space, raise AKD_DIST_CACHE_BUDGET, or choose another --cache-root",
            )
        reserve()


def _shared_lock(path: Path) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # Waits only while somebody evicts this very entry, which takes no longer than removing a few files.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.utime(descriptor)  # recency, for make_room
                return descriptor
        os.close(descriptor)  # evicted between our open and our lock


def evict(entry: Path) -> None:
    """Remove an entry unless somebody holds it."""
    try:
        descriptor = os.open(entry / IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another entry may have the name by now: this one was discarded between our open and our lock.
        if os.path.samestat(os.fstat(descriptor), (entry / IN_USE).stat()):
            # Renamed first: a removal that is killed half way leaves a partial folder, and never an entry that lacks
            # files.
            gone = partial_name(entry)
            entry.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    except (BlockingIOError, FileNotFoundError):  # in use, or discarded just now
        pass
    finally:
        os.close(descriptor)


def _entries(cache_root: Path) -> list[Path]:
    # An entry in the making has this file before its name; it belongs to whoever is at work on it.
    return [path.parent for path in cache_root.glob(f"*/*/{IN_USE}") if not path.parent.name.endswith(PARTIAL_SUFFIX)]


def _unfinished(cache_root: Path) -> list[Path]:
    """Entries in the making, and those that somebody was making or removing when it was killed."""
    return [path for path in cache_root.glob(f"*/*{PARTIAL_SUFFIX}") if path.is_dir()]


def _last_used(entry: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return (entry / IN_USE).stat().st_mtime
    return 0.0


def _used(cache_root: Path) -> int:
    total = 0
    for entry in (*_entries(cache_root), *_unfinished(cache_root)):
        for folder, _, names in os.walk(entry):  # which passes over what is removed meanwhile
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += Path(folder, name).stat().st_size
    return total


def room_in(cache_root: Path, budget: int | None = None) -> int:
    """Bytes that entries may take in all, if everything there now is evicted."""
    cache_root.mkdir(parents=True, exist_ok=True)
    budget = default_budget() if budget is None else budget
    most = shutil.disk_usage(cache_root).free + _used(cache_root)
    return most if budget is None else min(budget, most)


def _fits(cache_root: Path, need: int, budget: int | None) -> bool:
    within = budget is None or _used(cache_root) + need <= budget
    return within and need <= shutil.disk_usage(cache_root).free


def no_room(error: OSError, entry: Path, need: int) -> MachineError:
    """What to say when `need` bytes could not be written to an entry."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (NoRoomError if full else MachineError)(
        f"no room to write {entry}" if full else f"cannot write {entry}",
        got=error.strerror or str(error),
        expected=f"{need:,} bytes free" if full else "a folder that this user can write to",
        next="free some space, or choose another --cache-root",
    )
