"""The stores under a root: find one by identity, list, verify, repair, and collect what interrupted runs left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from akd_dist.storage.arrays import metadata
from akd_dist.storage.claim import CLAIM_SUFFIX, claim_store
from akd_dist.storage.errors import AkdError, DamagedError, HeldError, RefusedError
from akd_dist.storage.files import PARTIAL_SUFFIX, sha256
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, DAMAGED_SUFFIX, MANIFEST_KEY, SOURCE_KEY, Shard
from akd_dist.storage.manifest import Creation, Identity, Manifest, Probe
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, open_root
from akd_dist.storage.reader import Damage, LogitStore, open_store, read_manifest
from akd_dist.storage.writer import StoreWriter, encode_logits, missing_shards, seal_store, set_aside, write_shard

_ID = re.compile(r"[0-9a-f]{64}")

# Computes a shard anew: logits float32 [shard.rows, classes], label agreement, probes, as for `write_shard`.
Recompute = Callable[[Shard], tuple[npt.NDArray[np.float32], float | None, Sequence[Probe]]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoreSummary:
    """A store in a list."""

    id: str
    sealed: bool
    rows: int
    views: int
    classes: int
    encoding: str
    bytes: int
    """Bytes of the shards that are there."""
    shards: int
    shards_done: int
    """Shards with a receipt."""
    teacher: str
    """Fingerprint."""
    dataset: str
    """Fingerprint."""
    partials: int
    """Files in the making, their writers alive or dead."""
    problem: str | None = None
    """Why the store cannot be read, if so; the numbers are zero then."""


def find_store(root_uri: str, identity: Identity) -> LogitStore | None:
    """A sealed store that holds what `identity` describes: the same but for as many views or more; the fewest of these.

    Raises:
        DamagedError: there is one, and it is not what was sealed.
    """
    root = open_root(root_uri)
    if root.exists(f"{identity.id}/{MANIFEST_KEY}"):
        return _open_as(root, identity.id)
    wider = [found for found in _sealed_alike(root, identity, "views") if found.views > identity.views]
    return _open_as(root, min(wider, key=lambda found: found.views).id) if wider else None


def narrower_stores(root_uri: str, identity: Identity) -> list[Manifest]:
    """The seals of stores that hold some of what `identity` describes: the same but for fewer views; the most first.

    Raises:
        DamagedError: a seal is not what was written.
    """
    root = open_root(root_uri)
    narrower = [found for found in _sealed_alike(root, identity, "views") if found.views < identity.views]
    return [_manifest(root, found.id) for found in sorted(narrower, key=lambda found: -found.views)]


def stores_of_other_rows(root_uri: str, identity: Identity, split: str) -> list[Creation]:
    """What sealed stores are that differ from `identity` in their dataset alone, and were made for the same split."""
    root = open_root(root_uri)
    return [
        _creation(root, found.id)
        for found in _sealed_alike(root, identity, "dataset", "rows", "views")
        if found.dataset != identity.dataset and found.views >= identity.views and _split(root, found.id) == split
    ]


def list_stores(root_uri: str) -> list[StoreSummary]:
    """Every store under a root, sealed or not."""
    root = open_root(root_uri)
    return [_summary(root, store_id) for store_id in _ids(root)]


def resolve_id(root_uri: str, prefix: str) -> str:
    """The whole id of the one store that begins with `prefix`.

    Raises:
        RefusedError: no store or several begin with it; names them.
    """
    ids = _ids(open_root(root_uri))
    found = [store_id for store_id in ids if prefix and store_id.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    raise RefusedError(
        f"{'several stores begin' if found else 'no store begins'} with {prefix!r} under {root_uri}",
        got=", ".join(store_id[:16] for store_id in found or ids) or "no stores at all",
        expected="the beginning of one store's id",
        next=f"akd-dist stores list --store-root {root_uri}",
    )


def verify_store(
    root_uri: str, store_id: str, *, deep: bool = True, on_progress: Progress | None = None
) -> list[Damage]:
    """Everything about a sealed store that is not what was sealed; empty for a good one.

    Raises:
        RefusedError: the store is not there, not sealed, or newer than this version reads.
    """
    uri = open_root(root_uri).child(store_id).uri
    try:
        manifest = read_manifest(uri)
    except DamagedError as error:
        return [Damage(MANIFEST_KEY, error.got or error.what)]
    if manifest.id != store_id:
        return [Damage(MANIFEST_KEY, f"is that of store {manifest.id}")]
    return LogitStore(uri, manifest).verify(deep=deep, on_progress=on_progress)


def repair_store(
    root_uri: str, store_id: str, recompute: Recompute, on_progress: Progress | None = None
) -> list[Shard]:
    """Mend a sealed store: damaged shards are computed again, and must arrive at the bytes that were sealed.

    Args:
        recompute: called for each damaged shard, and for no other.
        on_progress: called with how many shards are mended, and of how many.

    Returns:
        The shards that were computed again.

    Raises:
        DamagedError: a shard came out different (the store is left as it was), or the manifest cannot be made again.
        HeldError: somebody else is writing the store.
    """
    root = open_root(root_uri)
    store = root.child(store_id)
    with claim_store(root.uri, store_id):
        damages = {damage.key for damage in verify_store(root.uri, store_id)}
        if MANIFEST_KEY in damages:
            mended = _finish_again(root, store_id, recompute, on_progress)
        else:
            manifest = read_manifest(store.uri)
            _mend_documents(store, manifest, damages)
            mended = [shard for shard in manifest.identity.layout.shards() if f"{ARRAYS}/{shard.key}" in damages]
            for number, shard in enumerate(mended, 1):
                _mend_shard(store, manifest, shard, recompute)
                if on_progress is not None:
                    on_progress(number, len(mended))
        open_store(store.uri)
        root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")
    return mended


def gc(root_uri: str) -> list[str]:
    """Remove what interrupted runs left behind: partial files, shards set aside, claims of dead holders.

    A store that somebody holds is left alone. Returns the keys removed.
    """
    root = open_root(root_uri)
    littered = {key.split("/")[0] for key in root.partials() if "/" in key}
    littered |= {name.removesuffix(DAMAGED_SUFFIX) for name in root.folders() if name.endswith(DAMAGED_SUFFIX)}
    littered |= {name.removesuffix(CLAIM_SUFFIX) for name in root.files() if name.endswith(CLAIM_SUFFIX)}
    removed = [key for store_id in sorted(littered) if _ID.fullmatch(store_id) for key in _collect(root, store_id)]
    for name in root.files():
        if name.endswith(PARTIAL_SUFFIX):
            root.delete(name)
            removed.append(name)
    return removed


def _ids(root: ObjectRoot) -> list[str]:
    return [name for name in root.folders() if _ID.fullmatch(name)]


def _creation(root: ObjectRoot, store_id: str) -> Creation:
    key = f"{store_id}/{CREATION_KEY}"
    return Creation.from_bytes(root.get(key), root.path_of(key))


def _identity(root: ObjectRoot, store_id: str) -> Identity | None:
    try:
        identity = _creation(root, store_id).identity
    except (ObjectMissing, AkdError):  # somebody else's folder, or one that `list_stores` tells about
        return None
    return identity if identity.id == store_id else None


def _sealed_alike(root: ObjectRoot, identity: Identity, *but_for: str) -> Iterator[Identity]:
    """Identities of the sealed stores that are as this one, whatever these fields are."""
    same = {field: getattr(identity, field) for field in but_for}
    for store_id in _ids(root):
        found = _identity(root, store_id)
        if found is None or found.model_copy(update=same) != identity:
            continue
        if root.exists(f"{store_id}/{MANIFEST_KEY}"):
            yield found


def _split(root: ObjectRoot, store_id: str) -> object:
    """The split that a store was made for, as its hint says; None where there is no such hint."""
    try:
        hint = json.loads(root.get(f"{store_id}/{SOURCE_KEY}"))
    except (ObjectMissing, ValueError):
        return None
    return hint.get("split") if isinstance(hint, dict) else None


def _manifest(root: ObjectRoot, store_id: str) -> Manifest:
    uri = root.child(store_id).uri
    manifest = read_manifest(uri)
    if manifest.id != store_id:
        raise DamagedError(
            f"{uri}/{MANIFEST_KEY} is another store's", got=f"id {manifest.id}", expected=f"id {store_id}"
        )
    return manifest


def _open_as(root: ObjectRoot, store_id: str) -> LogitStore:
    store = LogitStore(root.child(store_id).uri, _manifest(root, store_id))
    store.check()
    return store


def _summary(root: ObjectRoot, store_id: str) -> StoreSummary:
    store = root.child(store_id)
    found = store.list()
    partials, sealed = len(store.partials()), MANIFEST_KEY in found
    try:
        identity = _creation(root, store_id).identity
    except ObjectMissing:
        return StoreSummary(store_id, sealed, 0, 0, 0, "", 0, 0, 0, "", "", partials, f"has no {CREATION_KEY}")
    except AkdError as error:
        return StoreSummary(store_id, sealed, 0, 0, 0, "", 0, 0, 0, "", "", partials, str(error))
    shards = identity.layout.shards()
    there = [found[key].size for key in (f"{ARRAYS}/{shard.key}" for shard in shards) if key in found]
    return StoreSummary(
        id=store_id,
        sealed=sealed,
        rows=identity.rows,
        views=identity.views,
        classes=identity.classes,
        encoding=identity.codec.name,
        bytes=sum(there),
        shards=len(shards),
        shards_done=sum(shard.receipt_key in found for shard in shards),
        teacher=identity.teacher,
        dataset=identity.dataset,
        partials=partials,
    )


def _finish_again(root: ObjectRoot, store_id: str, recompute: Recompute, on_progress: Progress | None) -> list[Shard]:
    """Make a damaged manifest again from what it was sealed from: the creation document and the receipts."""
    writer = StoreWriter(root.uri, _creation(root, store_id))
    root.move(f"{store_id}/{MANIFEST_KEY}", f"{store_id}{DAMAGED_SUFFIX}/{MANIFEST_KEY}")
    missing = missing_shards(writer)
    for number, shard in enumerate(missing, 1):
        logits, label_agreement, probes = recompute(shard)
        write_shard(writer, shard, logits, label_agreement=label_agreement, probes=probes, seconds=0.0)
        if on_progress is not None:
            on_progress(number, len(missing))
    seal_store(writer)
    return missing


def _mend_documents(store: ObjectRoot, manifest: Manifest, damages: set[str]) -> None:
    """Put back what is a function of the manifest: the Zarr metadata and the creation document."""
    files = {f"{ARRAYS}/{key}": data for key, data in metadata(manifest.identity).items()}
    for key, data in {**files, CREATION_KEY: manifest.creation().to_bytes()}.items():
        if key in damages:
            set_aside(store, key)
            store.put_new(key, data)


def _mend_shard(store: ObjectRoot, manifest: Manifest, shard: Shard, recompute: Recompute) -> None:
    sealed = manifest.record(shard).sha256
    logits, _, _ = recompute(shard)
    data = encode_logits(manifest.creation(), shard, logits)
    if sha256(data) != sealed:
        raise DamagedError(
            f"{shard} of {store.uri} was computed again and came out different: it is left as it was",
            got=f"sha256 {sha256(data)}",
            expected=f"sha256 {sealed}",
            next=f"repair it as it was computed ({manifest.computed.model_dump_json()}), or delete {store.uri}",
        )
    set_aside(store, f"{ARRAYS}/{shard.key}")
    store.put_new(f"{ARRAYS}/{shard.key}", data)


def _collect(root: ObjectRoot, store_id: str) -> list[str]:
    claim = f"{store_id}{CLAIM_SUFFIX}"
    left = [claim] if root.exists(claim) else []
    try:
        with claim_store(root.uri, store_id):  # which takes a dead holder's claim, and leaves none
            for key in root.partials(store_id):
                root.delete(key)
                left.append(key)
            left += root.list(f"{store_id}{DAMAGED_SUFFIX}")
            root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")
    except HeldError:
        return []
    return left
