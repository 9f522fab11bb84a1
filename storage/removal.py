"""Stores that nobody needs any more, and what interrupted commands left: what keeps it, and removing it safely.

A store goes manifest first, so that what is left of it after a crash is an unsealed store: never taken for a whole one,
and gone after the same command. Who opens it meanwhile is refused by name, as for any missing shard.
"""

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from akd_dist.base.errors import AkdError, DamagedError, HeldError, MachineError, RefusedError
from akd_dist.base.files import PARTIAL_SUFFIX, failpoint
from akd_dist.base.locks import is_locked
from akd_dist.storage.catalog import STORE_ID, StoreSummary, list_stores, warn, wider_unsealed
from akd_dist.storage.claim import CLAIM_SUFFIX, claim_store, holder_of
from akd_dist.storage.decoded import drop_decoded, find_decoded
from akd_dist.storage.dictionary import DICTIONARY
from akd_dist.storage.layout import (
    ARRAYS,
    BLOCKS,
    CREATION_KEY,
    DAMAGED_SUFFIX,
    FIDELITY_KEY,
    GROUP_KEY,
    MANIFEST_KEY,
    RECEIPTS,
    ROWS,
    SOURCE_KEY,
    STAGES,
    TEACHERS,
)
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.reader import read_manifest
from akd_dist.storage.roots import open_root
from akd_dist.storage.tables import OFFSETS, table_key
from akd_dist.storage.uses import REMOVING_SUFFIX, USES, uses_of

# A model that a recipe trained, under the folder TEACHERS.
_MODEL_ID = re.compile(r"[0-9a-f]{32}")

_STAGE = re.compile(STAGES + r"/[0-9a-f]{64}\.ckpt")

# Told of what cannot be read or removed: its name, and why.
Problem = Callable[[str, AkdError], None]


@dataclass(frozen=True)
class Candidate:
    """A store that is as old, or unused for as long, as was asked for."""

    store: StoreSummary
    kept: str | None
    """Why it stays nevertheless; None if it may go."""


def disused(
    root_uri: str,
    cache_root: Path,
    *,
    older_than: float | None = None,
    unused_for: float | None = None,
    ids: Collection[str] = (),
) -> list[Candidate]:
    """Stores of some age or without use, sealed or not, and what keeps some of them. Nothing is changed.

    Rows that were prepared for a cluster are among them, as `rows/<id>`, and stages I that students left for others, as
    `stages/<id>`.

    Args:
        cache_root: decoded copies of this node: a store whose copy is mapped is in use.
        older_than: seconds since it was sealed; since its last shard, for an unsealed one.
        unused_for: seconds since a run last began to use it; since it was sealed, if none ever did.
        ids: only these; none means all.
    """
    now = time.time()
    found = [
        store
        for store in [*list_stores(root_uri), *_prepared_rows(open_root(root_uri)), *_stages(open_root(root_uri))]
        if (not ids or store.id in ids)
        and (older_than is None or now - store.modified >= older_than)
        and (unused_for is None or now - max(store.last_used or 0.0, store.modified) >= unused_for)
    ]
    root = open_root(root_uri)
    candidates: dict[str, Candidate] = {}
    # Unsealed stores first: a sealed store is kept for the unsealed one that takes views from it, unless that goes,
    # too.
    for store in sorted(found, key=lambda store: store.sealed):
        going = {one.store.id for one in candidates.values() if one.kept is None}
        try:
            unseen = store.problem if not store.modified else None  # its age is not known
            kept = (
                unseen or _held(root, store.id) or _used(root, store.id, cache_root) or _needed(root, store.id, going)
            )
        except MachineError as error:
            kept = error.line
        candidates[store.id] = Candidate(store, kept)
    return [candidates[store.id] for store in found]


def remove_store(root_uri: str, store_id: str, cache_root: Path) -> str | None:
    """Remove a store with its decoded copy on this node; None if it went, else why it stays.

    Safe at any moment to die in, and against a run that begins to use the store meanwhile: that one finds it whole, or
    is told that it is gone.
    """
    root = open_root(root_uri)
    if store_id.startswith(f"{STAGES}/"):  # read whole, at once, by whoever takes it, or not there
        if (kept := _used(root, store_id, cache_root)) is None:
            root.delete(f"{store_id}.ckpt")
            root.delete_folder(store_id)
        return kept
    mark = f"{store_id}{REMOVING_SUFFIX}"
    try:
        with claim_store(root_uri, store_id):
            # The mark before the look for users; a run leaves its record before it looks for a mark. So of the two, one
            # at least sees the other.
            root.put(mark, b"")
            try:
                failpoint("remove.marked")
                if (kept := _used(root, store_id, cache_root)) is None:
                    _remove(root, store_id, cache_root)
            finally:
                root.delete(mark)
    except HeldError as error:
        return f"held by {error.got}"
    except MachineError as error:  # of this store: the others may go
        return error.line
    return kept


def _remove(root: ObjectRoot, store_id: str, cache_root: Path) -> None:
    manifest = _manifest(root, store_id)
    root.delete(f"{store_id}/{MANIFEST_KEY}")
    failpoint("remove.unsealed")
    if manifest is not None:
        # Only now that the seal is gone: nobody opens the store any more, and decodes it again.
        drop_decoded(manifest, cache_root)
    # Receipts go before what they vouch for: a shard without its receipt is read again, and is no damage.
    for folder in (RECEIPTS, ARRAYS):
        root.delete_folder(f"{store_id}/{folder}")
    failpoint("remove.emptied")
    # Last go the documents that say whose logits these were and who used them. If the removal is killed before, the
    # same command finds the store again by them.
    root.delete_folder(store_id)
    root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")


def _prepared_rows(root: ObjectRoot) -> Iterator[StoreSummary]:
    """The rows that were prepared for a cluster; what cannot be listed is left out."""
    with contextlib.suppress(AkdError):
        for name in root.child(ROWS).folders():
            store = root.child(ROWS).child(name)
            written = {key: stat for key, stat in store.list().items() if not key.startswith(f"{USES}/")}
            if STORE_ID.fullmatch(name) and written:
                yield StoreSummary(
                    id=f"{ROWS}/{name}",
                    sealed=MANIFEST_KEY in written,
                    partials=len(store.partials()),
                    modified=max(stat.modified for stat in written.values()),
                    uses=uses_of(store),
                    bytes=sum(stat.size for key, stat in written.items() if key.startswith(f"{BLOCKS}/")),
                )


def _stages(root: ObjectRoot) -> Iterator[StoreSummary]:
    """What students left of a stage I for others, as `stages/<id>`; what cannot be listed is left out."""
    with contextlib.suppress(AkdError):
        for key, stat in root.list(STAGES).items():
            if _STAGE.fullmatch(key):
                name = key.removesuffix(".ckpt")
                uses = uses_of(root.child(name))
                yield StoreSummary(id=name, sealed=True, partials=0, modified=stat.modified, uses=uses, bytes=stat.size)


def _held(root: ObjectRoot, store_id: str) -> str | None:
    holder = holder_of(root.uri, store_id)
    return None if holder is None else f"held by {holder}"


def _used(root: ObjectRoot, store_id: str, cache_root: Path) -> str | None:
    now = time.time()
    for use in uses_of(root.child(store_id)):
        if use.is_going_on(now):
            return f"in use by the run {use.run} on {use.host}"
    manifest = _manifest(root, store_id)
    decoded = None if manifest is None else find_decoded(manifest, cache_root)
    if decoded is not None and decoded.in_use:
        return "in use: a process on this machine reads its decoded copy"
    return None


def _needed(root: ObjectRoot, store_id: str, going: Collection[str]) -> str | None:
    needing = [wider for wider in wider_unsealed(root.uri, store_id) if wider not in going]
    return f"the unsealed store {needing[0][:12]} takes views from it" if needing else None


def _manifest(root: ObjectRoot, store_id: str) -> Manifest | None:
    try:
        return read_manifest(root.child(store_id).uri)
    except (RefusedError, DamagedError):
        return None


def gc(root_uri: str, *, dry_run: bool = False, on_problem: Problem = warn) -> list[str]:
    """Remove what interrupted runs left behind: partial files, shards set aside, claims of the dead, empty stores.

    What somebody holds is left alone.

    Args:
        dry_run: only look.
        on_problem: called with the name and the error of what cannot be read or removed; the others are collected.

    Returns:
        The keys removed; a folder's end in a slash.
    """
    root = open_root(root_uri)
    removed = []
    names = _names(root, STORE_ID)
    for folder, kind in ((TEACHERS, _MODEL_ID), (ROWS, STORE_ID)):
        try:
            names += [f"{folder}/{name}" for name in _names(root.child(folder), kind)]
        except AkdError as error:
            on_problem(folder, error)
    for name in names:
        try:
            removed += _littering(root, name) if dry_run else _collect(root, name)
        except AkdError as error:
            on_problem(name, error)
    # No claim covers what lies beside the stores; whoever publishes an object there begins again if its file is gone.
    for name in [*root.files(), *root.partials(STAGES)]:
        path = root.local_path(name)
        # One that is locked says of a command that lives where its nodes work; see `jobs.shared`.
        if name.endswith(PARTIAL_SUFFIX) and (path is None or not is_locked(path)):
            removed.append(name)
            if not dry_run:
                root.delete(name)
    return removed


def _names(root: ObjectRoot, kind: re.Pattern[str]) -> list[str]:
    """Stores, or models that were trained for them, that are there or have something beside them."""
    names = {name.removesuffix(DAMAGED_SUFFIX) for name in root.folders()}
    names |= {name.removesuffix(CLAIM_SUFFIX).removesuffix(REMOVING_SUFFIX) for name in root.files()}
    return [name for name in sorted(names) if kind.fullmatch(name)]


def _littering(root: ObjectRoot, name: str) -> list[str]:
    """What `_collect` would remove."""
    if holder_of(root.uri, name) is not None:
        return []
    claim = f"{name}{CLAIM_SUFFIX}"
    return [*([claim] if root.exists(claim) else []), *_litter(root, name)]


def _collect(root: ObjectRoot, name: str) -> list[str]:
    if not _littering(root, name):
        return []
    claim = f"{name}{CLAIM_SUFFIX}"
    left = [claim] if root.exists(claim) else []
    try:
        with claim_store(root.uri, name):  # which takes a dead holder's claim, and leaves none
            # Looked up again under the claim: a moment ago it may have been somebody's, who has finished it since.
            litter = _litter(root, name)
            for key in litter:
                root.delete_folder(key.rstrip("/")) if key.endswith("/") else root.delete(key)
            root.delete_folder(f"{name}{DAMAGED_SUFFIX}")
    except HeldError:
        return []
    return left + litter


def _litter(root: ObjectRoot, name: str) -> list[str]:
    """What is of no use of a store, or of a model, that nobody holds."""
    mark = f"{name}{REMOVING_SUFFIX}"
    found = [mark] if root.exists(mark) else []
    found += root.partials(name)
    found += root.list(f"{name}{DAMAGED_SUFFIX}")
    there = root.list(name)
    if f"{name}/model.json" in there:
        # The model is trained and written: its checkpoints have served.
        found += [key for key in there if key.startswith(f"{name}/checkpoints/")]
    parent, _, last = name.rpartition("/")
    if not any(_is_of_use(key.removeprefix(f"{name}/")) for key in there):
        found += [f"{name}/"] if last in (root.child(parent) if parent else root).folders() else []
    return found


def _is_of_use(key: str) -> bool:
    """Whether an object is worth something by itself: descriptions of a store, and who used it, are not."""
    documents = {CREATION_KEY, SOURCE_KEY, FIDELITY_KEY, table_key(OFFSETS), table_key(DICTIONARY)}
    metadata = key.startswith(f"{ARRAYS}/") and key.rpartition("/")[2] == GROUP_KEY
    # Which targets are whose is worked out from the rows in no time; a dictionary takes a teacher.
    offsets = key.startswith(f"{ARRAYS}/{OFFSETS}/")
    return not (key in documents or metadata or offsets or key.startswith(f"{USES}/"))


def discard_if_empty(root_uri: str, store_id: str) -> None:
    """Remove a store that was begun and has no shard; for whoever holds its claim, and leaves with an error."""
    root = open_root(root_uri)
    if f"{store_id}/" in _litter(root, store_id):
        root.delete_folder(store_id)
