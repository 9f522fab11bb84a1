"""The stores under a root: find one by identity, list, verify and repair.

A store that is damaged, foreign or not ours to read stands in nobody's way but of those who ask for that very store.
"""

from __future__ import annotations

import contextlib
import logging
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import AkdError, DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, parse_json, sha256
from akd_dist.storage.arrays import metadata
from akd_dist.storage.claim import claim_store
from akd_dist.storage.layout import (
    ARRAYS,
    CREATION_KEY,
    DAMAGED_SUFFIX,
    LOGITS,
    MANIFEST_KEY,
    RECEIPTS,
    SOURCE_KEY,
    Shard,
)
from akd_dist.storage.manifest import Computed, Creation, Identity, Manifest, Probe, Receipt, differences
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.reader import Damage, LogitStore, open_store, read_manifest
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import USES, Use, uses_of
from akd_dist.storage.writer import (
    StoreWriter,
    adopt_shard,
    begun_as,
    encode_logits,
    missing_shards,
    seal_store,
    set_aside,
    write_shard,
)

T = TypeVar("T")
STORE_ID = re.compile(r"[0-9a-f]{64}")

# Computes a shard anew: logits float32 [shard.rows, classes], label agreement, probes, as for `write_shard`. Given the
# logits as they are stored, it adds the rest alone.
Recompute = Callable[
    [Shard, npt.NDArray[np.float32] | None], tuple[npt.NDArray[np.float32], float | None, Sequence[Probe]]
]
Progress = Callable[[int, int], None]
# A store's folder with nothing in it, as a removal leaves for a moment.
_NOTHING = "has nothing in it"

log = logging.getLogger("akd_dist.storage")


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
        DamagedError: the very store is there, and is not what was sealed. One of more views is passed over, with a
            warning.
    """
    root = open_root(root_uri)
    if root.exists(f"{identity.id}/{MANIFEST_KEY}"):
        return _open_as(root, identity.id)
    wider = [found for found in _sealed_alike(root, identity, "views") if found.views > identity.views]
    opened = (_unless_bad(_open_as, root, found.id) for found in sorted(wider, key=lambda found: found.views))
    return next((store for store in opened if store is not None), None)


def narrower_stores(root_uri: str, identity: Identity) -> list[Manifest]:
    """The seals of stores that hold some of what `identity` describes: the same but for fewer views; the most first.

    One that is damaged is passed over, with a warning.
    """
    root = open_root(root_uri)
    narrower = [found for found in _sealed_alike(root, identity, "views") if found.views < identity.views]
    seals = [_unless_bad(_manifest, root, found.id) for found in sorted(narrower, key=lambda found: -found.views)]
    return [seal for seal in seals if seal is not None]


def stores_of_other_rows(root_uri: str, identity: Identity, split: str) -> list[Creation]:
    """What sealed stores are that differ from `identity` in their dataset alone, and were made for the same split."""
    root = open_root(root_uri)
    seals = [
        _unless_bad(_manifest, root, found.id)
        for found in _sealed_alike(root, identity, "dataset", "rows", "views")
        if found.dataset != identity.dataset and found.views >= identity.views and _split(root, found.id) == split
    ]
    return [seal.creation() for seal in seals if seal is not None]


def list_stores(root_uri: str) -> list[StoreSummary]:
    """Every store under a root, sealed or not; one that cannot be read is among them, with its problem."""
    root = open_root(root_uri)
    found = (_summary(root, store_id) for store_id in _ids(root))
    return [one for one in found if one.problem != _NOTHING]  # not the folders of one just removed


def summary_of(root_uri: str, store_id: str) -> StoreSummary:
    """One store as in a list."""
    return _summary(open_root(root_uri), store_id)


def hint_of(root_uri: str, store_id: str) -> dict[str, Any]:
    """How a store was asked for, as the recipe and the split; nothing where that is not known."""
    return _hint(open_root(root_uri), store_id)


def identity_of(root_uri: str, store_id: str) -> Identity | None:
    """What a store holds, as its creation document says; None where that is missing, damaged or another store's."""
    return _identity(open_root(root_uri), store_id)


def receipts_of(root_uri: str, store_id: str) -> list[Receipt]:
    """What the writers of a store's shards said of them; those that are gone or damaged are left out.

    Receipts of earlier versions have no checksum. They are told as they are: nothing but times depends on that here.
    """
    store = open_root(root_uri).child(store_id)
    found = []
    for key in store.list(RECEIPTS):
        with contextlib.suppress(ObjectMissing, AkdError):
            receipt = Receipt.from_bytes(store.document(key), store.path_of(key))
            if receipt.checksum is None or receipt.is_intact:
                found.append(receipt)
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
    """What computing a store took. Shards that were taken from another store, or found, do not count."""
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
    root_uri: str,
    store_id: str,
    recompute: Recompute,
    on_progress: Progress | None = None,
    *,
    computed: Computed | None = None,
) -> list[Shard]:
    """Mend a sealed store: damaged shards are computed again, and must arrive at the bytes that were sealed.

    Args:
        recompute: called for each damaged shard, and for no other.
        on_progress: called with how many shards are mended, and of how many.
        computed: how `recompute` computes; None where that is known to be how the store was computed.

    Returns:
        The shards that were computed again.

    Raises:
        DamagedError: a shard came out different (the store is left as it was), or the manifest cannot be made again.
        RefusedError: manifest and shards are damaged, and these would be computed in another way: no seal would tell.
        HeldError: somebody else is writing the store.
    """
    root = open_root(root_uri)
    store = root.child(store_id)
    with claim_store(root.uri, store_id):
        damages = {damage.key for damage in verify_store(root.uri, store_id)}
        if MANIFEST_KEY in damages:
            mended = _finish_again(root, store_id, recompute, on_progress, computed)
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


def _ids(root: ObjectRoot) -> list[str]:
    return [name for name in root.folders() if STORE_ID.fullmatch(name)]


def _unless_bad(read: Callable[[ObjectRoot, str], T], root: ObjectRoot, store_id: str) -> T | None:
    """What is read of a store; None, with a warning, where it is damaged or cannot be read."""
    try:
        return read(root, store_id)
    except AkdError as error:
        warn(store_id, error)
        return None


def warn(name: str, error: AkdError) -> None:
    """Say that something is bad and nothing else waits for it."""
    log.warning("%s is passed over: %s%s", name[:12], error.line, f" ({error.next})" if error.next else "")


def _creation(root: ObjectRoot, store_id: str) -> Creation:
    key = f"{store_id}/{CREATION_KEY}"
    return Creation.from_bytes(root.document(key), root.path_of(key))


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
        hint = parse_json(root.document(f"{store_id}/{SOURCE_KEY}"))
        canonical_json(hint)  # which refuses what could not be shown either
    except (ObjectMissing, MachineError, ValueError, RecursionError):
        return {}
    if not isinstance(hint, dict) or not isinstance(hint.get("recipe", {}), dict):
        return {}
    if not isinstance(hint.get("recipe", {}).get("data", {}), dict):
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
    """A store in a list, whatever state it is in."""
    try:
        return _read_summary(root, store_id)
    except AkdError as error:
        return StoreSummary(id=store_id, sealed=False, partials=0, modified=0.0, uses=[], problem=error.line)


def _read_summary(root: ObjectRoot, store_id: str) -> StoreSummary:
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
        identity, encoding, shards = creation.identity, creation.identity.codec, creation.identity.layout.shard_count
    except ObjectMissing:
        return replace(bare, problem=f"has no {CREATION_KEY}" if found or bare.partials else _NOTHING)
    except AkdError as error:
        return replace(bare, problem=error.line)
    if identity.id != store_id:
        return replace(bare, problem=f"its {CREATION_KEY} is that of store {identity.id}")
    # What is there is counted, and not looked for: how many shards there should be, a foreign document may say.
    there = [stat.size for key, stat in found.items() if key.startswith(f"{ARRAYS}/{LOGITS}/c/")]
    spec = creation.teacher.get("spec")
    return replace(
        bare,
        rows=identity.rows,
        views=identity.views,
        classes=identity.classes,
        encoding=encoding.name,
        bytes=sum(there),
        shards=shards,
        shards_done=sum(key.startswith(f"{RECEIPTS}/") for key in found),
        teacher=identity.teacher,
        teacher_spec=spec if isinstance(spec, dict) else {},
        dataset=identity.dataset,
        augmentation=identity.augmentation,
    )


def _finish_again(
    root: ObjectRoot, store_id: str, recompute: Recompute, on_progress: Progress | None, how: Computed | None
) -> list[Shard]:
    """Make a damaged manifest again from what it was sealed from: the creation document and the receipts.

    Where that fails, the store is left as it was.

    Returns:
        The shards that had to be computed.
    """
    writer = StoreWriter(root.uri, _creation_as_receipted(root, store_id))
    seal, aside = f"{store_id}/{MANIFEST_KEY}", f"{store_id}{DAMAGED_SUFFIX}/{MANIFEST_KEY}"
    root.move(seal, aside)
    computed = []
    try:
        missing = missing_shards(writer)
        for number, shard in enumerate(missing, 1):
            adopted = adopt_shard(writer, shard)
            if adopted is None and how is not None and how != writer.creation.computed:
                raise RefusedError(
                    f"{shard} of {writer.uri} is damaged, and so is {MANIFEST_KEY}: it cannot be computed as it was",
                    got=f"this run against the store: {'; '.join(differences(how, writer.creation.computed))}",
                    expected="the same batch rows, threads, device and versions, since no seal tells a difference",
                    next=f"repair it as it was computed, or delete {writer.uri} to compute it anew",
                )
            logits, label_agreement, probes = recompute(shard, adopted)
            write_shard(writer, shard, logits, label_agreement=label_agreement, probes=probes, seconds=0.0)
            computed += [shard] if adopted is None else []
            if on_progress is not None:
                on_progress(number, len(missing))
        seal_store(writer)
    except BaseException:
        if not root.exists(seal):
            root.move(aside, seal)
        raise
    return computed


def _creation_as_receipted(root: ObjectRoot, store_id: str) -> Creation:
    """The creation document of a store whose manifest cannot vouch for it any more: its id and its receipts must.

    Raises:
        DamagedError: it is missing, or not what the shards were computed under.
    """
    store = root.child(store_id)
    next_step = f"bring {CREATION_KEY} or {MANIFEST_KEY} back from a copy, or delete {store.uri} to compute it anew"
    where = store.path_of(CREATION_KEY)
    try:
        creation = _creation(root, store_id)
    except ObjectMissing:
        raise DamagedError(f"{where} is missing, and {MANIFEST_KEY} is damaged as well", next=next_step) from None
    told = begun_as(store)
    if creation.identity.id != store_id or not told <= {creation.sha256}:
        raise DamagedError(
            f"{where} is damaged, and {MANIFEST_KEY} as well",
            got=f"sha256 {creation.sha256}, of store {creation.identity.id[:12]}",
            expected=f"sha256 {', '.join(told) or 'unknown'}, as the receipts say, of store {store_id[:12]}",
            next=next_step,
        )
    return creation


def _mend_documents(store: ObjectRoot, manifest: Manifest, damages: set[str]) -> None:
    """Put back what is a function of the manifest: the Zarr metadata and the creation document."""
    files = {f"{ARRAYS}/{key}": data for key, data in metadata(manifest.identity).items()}
    for key, data in {**files, CREATION_KEY: manifest.creation().to_bytes()}.items():
        if key in damages:
            set_aside(store, key)
            store.put_new(key, data)


def _mend_shard(store: ObjectRoot, manifest: Manifest, shard: Shard, recompute: Recompute) -> None:
    sealed = manifest.record(shard).sha256
    logits, _, _ = recompute(shard, None)
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
