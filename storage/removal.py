"""Stores that nobody needs any more: which they are, what keeps one from going, and removing it safely.

A store goes manifest first, so that what is left of it after a crash is an unsealed store: never taken for a whole one,
and gone after the same command. Who opens it meanwhile is refused by name, as for any missing shard.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from akd_dist.storage.catalog import StoreSummary, list_stores, wider_unsealed
from akd_dist.storage.claim import claim_store, holder_of
from akd_dist.storage.errors import DamagedError, HeldError, RefusedError
from akd_dist.storage.files import failpoint
from akd_dist.storage.layout import ARRAYS, DAMAGED_SUFFIX, MANIFEST_KEY, RECEIPTS
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.node_cache import drop_decoded, find_decoded
from akd_dist.storage.objects import ObjectRoot, open_root
from akd_dist.storage.reader import read_manifest
from akd_dist.storage.uses import REMOVING_SUFFIX, uses_of


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

    Args:
        cache_root: decoded copies of this node: a store whose copy is mapped is in use.
        older_than: seconds since it was sealed; since its last shard, for an unsealed one.
        unused_for: seconds since a run last began to use it; since it was sealed, if none ever did.
        ids: only these; none means all.
    """
    now = time.time()
    found = [
        store
        for store in list_stores(root_uri)
        if (not ids or store.id in ids)
        and (older_than is None or now - store.modified >= older_than)
        and (unused_for is None or now - max(store.last_used or 0.0, store.modified) >= unused_for)
    ]
    root = open_root(root_uri)
    candidates: dict[str, Candidate] = {}
    for store in sorted(found, key=lambda store: store.sealed):  # an unsealed one that goes needs nobody's views
        kept = _held(root, store.id) or _used(root, store.id, cache_root)
        going = {one.store.id for one in candidates.values() if one.kept is None}
        candidates[store.id] = Candidate(store, kept or _needed(root, store.id, going))
    return [candidates[store.id] for store in found]


def remove_store(root_uri: str, store_id: str, cache_root: Path) -> str | None:
    """Remove a store with its decoded copy on this node; None if it went, else why it stays.

    Safe at any moment to die in, and against a run that begins to use the store meanwhile: that one finds it whole, or
    is told that it is gone.
    """
    root = open_root(root_uri)
    mark = f"{store_id}{REMOVING_SUFFIX}"
    try:
        with claim_store(root_uri, store_id):
            root.put(mark, b"")
            try:
                failpoint("remove.marked")
                if (kept := _used(root, store_id, cache_root)) is None:
                    _remove(root, store_id, cache_root)
            finally:
                root.delete(mark)
    except HeldError as error:
        return f"held by {error.got}"
    return kept


def _remove(root: ObjectRoot, store_id: str, cache_root: Path) -> None:
    manifest = _manifest(root, store_id)
    root.delete(f"{store_id}/{MANIFEST_KEY}")
    failpoint("remove.unsealed")
    if manifest is not None:
        drop_decoded(manifest, cache_root)
    for folder in (RECEIPTS, ARRAYS):
        root.delete_folder(f"{store_id}/{folder}")
    failpoint("remove.emptied")
    # Last what says whose logits these were, and who used them: by these the rest is found again after a crash.
    root.delete_folder(store_id)
    root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")


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
