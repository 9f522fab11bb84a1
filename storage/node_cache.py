"""One decoded, memory-mapped copy of a store per node, shared by every process there, within a budget.

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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import platformdirs
from pydantic import ByteSize, TypeAdapter, ValidationError

from akd_dist.base import places
from akd_dist.base.errors import MachineError, RecipeError
from akd_dist.base.files import PARTIAL_SUFFIX, partial_name, replace, with_checksum, without_checksum
from akd_dist.base.locks import file_lock, is_locked
from akd_dist.storage.checked import note_of
from akd_dist.storage.content import Content, Part, digest, inodes_of, lock_of, map_array
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.reader import LogitStore

IN_USE = "in-use"
_LOGITS_FILE = "logits.npy"
_VERIFIED_FILE = "verified.json"
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
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise RecipeError(
            "AKD_DIST_CACHE_BUDGET is not a size", got=text, expected="bytes, such as 50GB", next="correct or unset it"
        ) from None


def open_decoded(
    store: LogitStore, cache_root: Path, *, budget: int | None = None, on_progress: Progress | None = None
) -> np.memmap[Any, Any]:
    """The store's logits as a read-only memory map, decoded once per node; see `map_decoded`."""
    return map_decoded(store, cache_root, budget=budget, on_progress=on_progress)[0]


def map_decoded(
    store: LogitStore, cache_root: Path, *, budget: int | None = None, on_progress: Progress | None = None
) -> tuple[np.memmap[Any, Any], Content]:
    """The store's logits as a read-only memory map, decoded once per node, and what they must hash to.

    The store itself is looked at every time: a shard whose object changed since it was decoded is read again and must
    still be what was sealed, whether there is a decoded copy or not. The copy is not read here: that is for a `Guard`.

    Args:
        budget: bytes that all entries together may take; None for the default budget.
        on_progress: called with how many shards are read or checked, and of how many.

    Returns:
        [views, rows, classes] in the stored dtype. The entry is not evicted while the map is alive. And its content.

    Raises:
        DamagedError: a shard is not what was sealed; names its key.
        MachineError: no room within the budget or on the disk; names need, free and budget.
    """
    entry = _entry_of(store.manifest, cache_root)
    # One process decodes; the others of this node wait here, and then find its copy.
    with file_lock(entry.with_name(f"{entry.name}.lock"), what=f"the decoded copy of store {store.id[:12]}"):
        # Held before it is looked at, so that no other process evicts the entry between the look and the mapping.
        with hold(entry) as keep:
            verified = _verified(store, entry)
            if verified is not None:
                _check_again(store, entry, verified, on_progress)
                return _mapped(store, entry, verified, keep)
        # The hold was given back before: a new entry has a new `in-use` file, of which a lock on the old one says
        # nothing.
        verified, keep = _decode(store, entry, budget, on_progress)
        try:
            return _mapped(store, entry, verified, keep)
        finally:
            keep.release()


class Decoded(NamedTuple):
    """A store's decoded copy on this node."""

    bytes: int
    """Bytes that it takes."""
    in_use: bool
    """Whether a living process has it mapped."""


def find_decoded(manifest: Manifest, cache_root: Path) -> Decoded | None:
    """The decoded copy of a sealed store on this node, if there is one."""
    entry = _entry_of(manifest, cache_root)
    try:
        taken = (entry / _LOGITS_FILE).stat().st_size
    except OSError:
        return None
    return Decoded(taken, is_locked(entry / IN_USE, shared=True))


def drop_decoded(manifest: Manifest, cache_root: Path) -> None:
    """Remove the decoded copy of a store from this node, unless somebody has it mapped, and what was checked of it."""
    _evict(_entry_of(manifest, cache_root))
    note_of(manifest, cache_root).unlink(missing_ok=True)


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


def make_room(cache_root: Path, need: int, budget: int | None, keep: Collection[Path] = ()) -> None:
    """Evict entries that nobody holds, least recently used first, until `need` bytes fit the budget and the disk.

    Args:
        need: bytes about to be written under `cache_root`.
        budget: bytes that all entries together may take; None for the default budget.
        keep: entries that stay whatever happens.

    Raises:
        MachineError: they do not fit with everything evicted that can be; names need, free and budget.
    """
    cache_root.mkdir(parents=True, exist_ok=True)
    budget = default_budget() if budget is None else budget
    with file_lock(cache_root / "evict.lock", what="the cache"):
        # One process at a time: two would evict for the same need, and remove more than either wants.
        for left in _unfinished(cache_root):
            # Whoever makes an entry holds its lock meanwhile; what lay there before, and has no maker, was killed.
            if not is_locked(lock_of(left)):
                shutil.rmtree(left, ignore_errors=True)
        entries = sorted((entry for entry in _entries(cache_root) if entry not in keep), key=_last_used)
        while not _fits(cache_root, need, budget) and entries:
            _evict(entries.pop(0))
        if not _fits(cache_root, need, budget):
            raise MachineError(
                f"no room in the cache {cache_root}",
                got=f"{shutil.disk_usage(cache_root).free:,} bytes free, {_used(cache_root):,} in entries in use",
                expected=f"{need:,} bytes" + ("" if budget is None else f" within a budget of {budget:,}"),
                next="free some space, raise AKD_DIST_CACHE_BUDGET, or choose another --cache-root",
            )


def _entry_of(manifest: Manifest, cache_root: Path) -> Path:
    # By the manifest and not by the id: the same logits computed on another device, or in other batches, have other
    # bytes.
    return cache_root / "logits" / manifest.sha256[:32]


def _decode(
    store: LogitStore, entry: Path, budget: int | None, on_progress: Progress | None
) -> tuple[dict[str, Any], Keep]:
    """Decode a store into a new entry; what was noted of it, and the hold that keeps it."""
    for left in entry.parent.glob(f"{entry.name}.*{PARTIAL_SUFFIX}"):  # ours is the only live one: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(entry, ignore_errors=True)  # somebody may be evicting it
    need = store.layout.nbytes + HEADER_BYTES
    cache_root = entry.parent.parent
    make_room(cache_root, need, budget)
    building = partial_name(entry)
    try:
        building.mkdir(parents=True)
        tokens = {key: stat.token for key, stat in store.stats().items()}  # before reading, so that no change is missed
        digests = _fill(store, building / _LOGITS_FILE, on_progress)
        verified = {"decoded": _token(building / _LOGITS_FILE), "shards": tokens, "digests": digests}
        # Noted before the entry has its name, so that whoever finds the entry finds its hashes in it.
        _note_verified(building, verified)
        return verified, name_entry(building, entry)
    except OSError as error:
        raise no_room(error, entry, need) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fill(store: LogitStore, path: Path, on_progress: Progress | None) -> dict[str, str]:
    """Write all logits; the sha256 of each shard's, as they came out of the shard."""
    layout = store.layout
    shape = (layout.views, layout.rows, layout.classes)
    with open(path, "xb") as handle:
        # By hand, since `np.lib.format.open_memmap` would make a sparse file, whose room is not reserved.
        np.lib.format.write_array_header_1_0(
            handle,
            {"descr": np.lib.format.dtype_to_descr(np.dtype(layout.dtype)), "fortran_order": False, "shape": shape},
        )
        # All of it is reserved here, where a full disk is an error: a write to a memory map that finds none is a
        # SIGBUS, which ends the process without a word.
        os.posix_fallocate(handle.fileno(), 0, handle.tell() + layout.nbytes)
    decoded = np.load(path, mmap_mode="r+")
    shards, digests = layout.shards(), {}
    for number, (shard, logits) in enumerate(zip(shards, store.shards(shards), strict=True), 1):
        decoded[shard.view, shard.start : shard.stop] = logits
        digests[shard.key] = digest([logits])
        if on_progress is not None:
            on_progress(number, len(shards))
    decoded.flush()
    # From here on a stray write is refused, unless it is root's.
    path.chmod(0o444)
    return digests


def _check_again(store: LogitStore, entry: Path, verified: dict[str, Any], on_progress: Progress | None) -> None:
    """Read every shard again whose object is another one than when it was verified."""
    tokens = {key: stat.token for key, stat in store.stats().items()}
    changed = [shard for shard in store.layout.shards() if verified["shards"].get(shard.key) != tokens[shard.key]]
    for number, _ in enumerate(store.shards(changed), 1):
        if on_progress is not None:
            on_progress(number, len(changed))
    if changed:
        _note_verified(entry, verified | {"shards": tokens})


def _note_verified(entry: Path, verified: dict[str, Any]) -> None:
    # Not durable: where a loss of power takes the note, the store is decoded once more.
    replace(entry / _VERIFIED_FILE, with_checksum(verified), durable=False)


def _verified(store: LogitStore, entry: Path) -> dict[str, Any] | None:
    """What was noted of the decoded copy; None where there is none, not a whole one, or not the file that was written.

    Whether the file holds what it should is not looked at.
    """
    try:
        verified = without_checksum((entry / _VERIFIED_FILE).read_bytes())
        layout, logits = store.layout, map_array(entry / _LOGITS_FILE)
        shape = (layout.views, layout.rows, layout.classes)
        same = (logits.shape, logits.dtype) == (shape, np.dtype(layout.dtype))
        whole = verified["digests"].keys() == {shard.key for shard in layout.shards()}
        return verified if same and whole and verified["decoded"] == _token(entry / _LOGITS_FILE) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the last: digests that are none
        return None


def _token(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _mapped(
    store: LogitStore, entry: Path, verified: dict[str, Any], keep: Keep
) -> tuple[np.memmap[Any, Any], Content]:
    path = entry / _LOGITS_FILE
    mapped = map_array(path)
    keep.until_unmapped(mapped)
    # A plain array for the slices below: each slice of an `np.memmap` costs more.
    bare, digests = np.asarray(mapped), verified["digests"]

    def parts() -> Iterator[Part]:
        for shard in store.layout.shards():
            yield Part(f"the logits of {shard}", (bare[shard.view, shard.start : shard.stop],), digests[shard.key])

    return mapped, Content((path,), parts, inodes_of([path]))


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


def _evict(entry: Path) -> None:
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


def _fits(cache_root: Path, need: int, budget: int | None) -> bool:
    within = budget is None or _used(cache_root) + need <= budget
    return within and need <= shutil.disk_usage(cache_root).free


def no_room(error: OSError, entry: Path, need: int) -> MachineError:
    """What to say when `need` bytes could not be written to an entry."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return MachineError(
        f"no room to write {entry}" if full else f"cannot write {entry}",
        got=error.strerror or str(error),
        expected=f"{need:,} bytes free" if full else "a folder that this user can write to",
        next="free some space, or choose another --cache-root",
    )
