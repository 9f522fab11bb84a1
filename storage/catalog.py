"""The stores under a root: find one by identity, list, verify, repair, and collect what interrupted runs left."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.storage.arrays import metadata
from akd_dist.storage.claim import CLAIM_SUFFIX, claim_store, holder_of
from akd_dist.storage.errors import AkdError, DamagedError, HeldError, RefusedError
from akd_dist.storage.files import PARTIAL_SUFFIX, sha256
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, DAMAGED_SUFFIX, MANIFEST_KEY, RECEIPTS, SOURCE_KEY, Shard
from akd_dist.storage.manifest import Creation, Identity, Manifest, Probe, Receipt
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, open_root
from akd_dist.storage.reader import Damage, LogitStore, open_store, read_manifest
from akd_dist.storage.uses import REMOVING_SUFFIX, USES, Use, uses_of
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
    partials: int
    """Files in the making, their writers alive or dead."""
    modified: float
    """When it was sealed, or its last object written if it is not; seconds since 1970, by the storage's clock."""
    uses: list[Use]
    """Which runs used it on which days, the latest first."""
    rows: int = 0
    views: int = 0
    classes: int = 0
    encoding: str = ""
    bytes: int = 0
    """Bytes of the shards that are there."""
    shards: int = 0
    shards_done: int = 0
    """Shards with a receipt."""
    teacher: str = ""
    """Fingerprint."""
    teacher_spec: dict[str, Any] = field(default_factory=dict)
    """The teacher in words."""
    dataset: str = ""
    """Fingerprint."""
    augmentation: dict[str, Any] = field(default_factory=dict)
    """Specification of what the views are drawn by."""
    hint: dict[str, Any] = field(default_factory=dict)
    """How it was asked for, as the recipe and the split, where that is known."""
    problem: str | None = None
    """Why the store cannot be read, if so; the numbers are zero then."""

    @property
    def last_used(self) -> float | None:
        """When a run last began to use it, in seconds since 1970; None if there is no record of any."""
        return self.uses[0].at if self.uses else None

    @property
    def runs(self) -> list[str]:
        """The runs that used it, each once, the latest first."""
        return list(dict.fromkeys(use.run for use in self.uses))


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
    found = (_summary(root, store_id) for store_id in _ids(root))
    return [one for one in found if one.modified or one.uses or one.partials]  # not the folders of one just removed


def summary_of(root_uri: str, store_id: str) -> StoreSummary:
    """One store as in a list."""
    return _summary(open_root(root_uri), store_id)


def hint_of(root_uri: str, store_id: str) -> dict[str, Any]:
    """How a store was asked for, as the recipe and the split; nothing where that is not known."""
    return _hint(open_root(root_uri), store_id)


def receipts_of(root_uri: str, store_id: str) -> list[Receipt]:
    """What the writers of a store's shards said of them; those that are gone or cannot be read are left out."""
    store = open_root(root_uri).child(store_id)
    found = []
    for key in store.list(RECEIPTS):
        with contextlib.suppress(ObjectMissing, AkdError):
            found.append(Receipt.from_bytes(store.get(key), store.path_of(key)))
    return found


@dataclass(frozen=True)
class Spent:
    """What computing a store's shards took, as far as its receipts say."""

    seconds: float
    """Sum over the shards that were timed, of work in their tasks, not of wall-clock time."""
    rows: int
    """Rows of these shards, each view counted."""
    row_seconds: float | None
    """Seconds a row in the median shard, so that what is loaded once in a task does not weigh; None if none was timed.
    """
    hosts: tuple[str, ...]
    """Where they were computed, sorted."""


def time_spent(uri: str) -> Spent:
    """What computing a store took. Shards that were taken from another store were not computed, and do not count."""
    root = open_root(uri)
    timed = [receipt for receipt in receipts_of(root.parent.uri, root.name) if receipt.seconds > 0]
    return Spent(
        seconds=sum(receipt.seconds for receipt in timed),
        rows=sum(receipt.rows for receipt in timed),
        row_seconds=statistics.median(receipt.seconds / receipt.rows for receipt in timed) if timed else None,
        hosts=tuple(sorted({receipt.host for receipt in timed})),
    )


def wider_unsealed(root_uri: str, store_id: str) -> list[str]:
    """Ids of unsealed stores that differ from a store in having more views: such a one takes those that are there."""
    root = open_root(root_uri)
    if (identity := _identity(root, store_id)) is None:
        return []
    others = ((other, _identity(root, other)) for other in _ids(root) if other != store_id)
    return [
        other
        for other, found in others
        if found is not None
        and found.views > identity.views
        and found.model_copy(update={"views": identity.views}) == identity
        and not root.exists(f"{other}/{MANIFEST_KEY}")
    ]


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


def gc(root_uri: str, *, dry_run: bool = False) -> list[str]:
    """Remove what interrupted runs left behind: partial files, shards set aside, claims of dead holders.

    A store that somebody holds is left alone.

    Args:
        dry_run: only look.

    Returns:
        The keys removed.
    """
    root = open_root(root_uri)
    littered = {key.split("/")[0] for key in root.partials() if "/" in key}
    littered |= {name.removesuffix(DAMAGED_SUFFIX) for name in root.folders() if name.endswith(DAMAGED_SUFFIX)}
    for suffix in (CLAIM_SUFFIX, REMOVING_SUFFIX):
        littered |= {name.removesuffix(suffix) for name in root.files() if name.endswith(suffix)}
    collect = _littering if dry_run else _collect
    removed = [key for store_id in sorted(littered) if _ID.fullmatch(store_id) for key in collect(root, store_id)]
    for name in root.files():
        if name.endswith(PARTIAL_SUFFIX):
            removed.append(name)
            if not dry_run:
                root.delete(name)
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


def _hint(root: ObjectRoot, store_id: str) -> dict[str, Any]:
    """How a store was asked for; nothing where there is no hint, or none of its shape."""
    try:
        hint = json.loads(root.get(f"{store_id}/{SOURCE_KEY}"))
    except (ObjectMissing, ValueError):
        return {}
    if not isinstance(hint, dict) or not isinstance(hint.get("recipe", {}), dict):
        return {}
    return hint if isinstance(hint.get("split", ""), str) else {}


def _split(root: ObjectRoot, store_id: str) -> object:
    """The split that a store was made for, as its hint says; None where there is no such hint."""
    return _hint(root, store_id).get("split")


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
    seal = found.get(MANIFEST_KEY)
    written = [stat.modified for key, stat in found.items() if not key.startswith(f"{USES}/")]
    bare = StoreSummary(
        id=store_id,
        sealed=seal is not None,
        partials=len(store.partials()),
        modified=max(written, default=0.0) if seal is None else seal.modified,
        uses=uses_of(store),
        hint=_hint(root, store_id),
    )
    try:
        creation = _creation(root, store_id)
    except ObjectMissing:
        return replace(bare, problem=f"has no {CREATION_KEY}")
    except AkdError as error:
        return replace(bare, problem=str(error))
    identity = creation.identity
    shards = identity.layout.shards()
    there = [found[key].size for key in (f"{ARRAYS}/{shard.key}" for shard in shards) if key in found]
    spec = creation.teacher.get("spec")
    return replace(
        bare,
        rows=identity.rows,
        views=identity.views,
        classes=identity.classes,
        encoding=identity.codec.name,
        bytes=sum(there),
        shards=len(shards),
        shards_done=sum(shard.receipt_key in found for shard in shards),
        teacher=identity.teacher,
        teacher_spec=spec if isinstance(spec, dict) else {},
        dataset=identity.dataset,
        augmentation=identity.augmentation,
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


def _littering(root: ObjectRoot, store_id: str) -> list[str]:
    """What `_collect` would remove."""
    if holder_of(root.uri, store_id) is not None:
        return []
    claim = f"{store_id}{CLAIM_SUFFIX}"
    return [*([claim] if root.exists(claim) else []), *_litter(root, store_id)]


def _collect(root: ObjectRoot, store_id: str) -> list[str]:
    claim = f"{store_id}{CLAIM_SUFFIX}"
    left = [claim] if root.exists(claim) else []
    try:
        with claim_store(root.uri, store_id):  # which takes a dead holder's claim, and leaves none
            litter = _litter(root, store_id)
            for key in litter:
                root.delete(key)
            root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")
    except HeldError:
        return []
    return left + litter


def _litter(root: ObjectRoot, store_id: str) -> list[str]:
    mark = f"{store_id}{REMOVING_SUFFIX}"
    marks = [mark] if root.exists(mark) else []
    return [*marks, *root.partials(store_id), *root.list(f"{store_id}{DAMAGED_SUFFIX}")]
