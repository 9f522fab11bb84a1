"""A sealed store that is damaged: what is wrong with it, and how it is brought back to the bytes that were sealed."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage.arrays import encode_shard, metadata
from akd_dist.storage.catalog import Progress, creation_document
from akd_dist.storage.claim import claim_store
from akd_dist.storage.content import digest
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, DAMAGED_SUFFIX, LOGITS, MANIFEST_KEY, Shard
from akd_dist.storage.manifest import Computed, Creation, Manifest, differences
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.reader import Damage, LogitStore, open_store, read_manifest
from akd_dist.storage.records import Loss, Probe
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import (
    StoreWriter,
    adopt_shard,
    begun_as,
    encode_arrays,
    missing_shards,
    seal_store,
    set_aside,
    write_shard,
)

log = logging.getLogger("akd_dist.storage")

# Computes a shard anew: logits float32 [shard.rows, classes], label agreement, probes and what storing changes, as
# `write_shard` takes them.
# Where the stored logits are whole, it is given them, and adds agreement and probes alone.
Recompute = Callable[
    [Shard, npt.NDArray[np.float32] | None], tuple[npt.NDArray[np.float32], float | None, Sequence[Probe], Loss | None]
]


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
        # Only once the store opens: until then, what was set aside may be the last copy of something.
        root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")
    return mended


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
    # Without its seal the store is one that was interrupted, and is finished as such a one is.
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
            logits, label_agreement, probes, loss = recompute(shard, adopted)
            write_shard(writer, shard, logits, label_agreement=label_agreement, probes=probes, seconds=0.0, loss=loss)
            computed += [shard] if adopted is None else []
            if on_progress is not None:
                on_progress(number, len(missing))
        seal_store(writer)
    except BaseException:
        # After Ctrl-C too: a store that was sealed is not left as an unfinished one.
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
        creation = creation_document(root, store_id)
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
    sealed = manifest.record(shard)
    logits, *_ = recompute(shard, None)
    arrays = encode_arrays(manifest.identity, shard, logits)
    data = encode_shard(manifest.identity, shard, arrays)
    same = sha256(data) == sealed.sha256
    # Compressed bytes may differ between versions of the compressor: the logits in them must not.
    compressed = manifest.identity.object_bytes(shard) is None
    if not same and compressed and digest([arrays[LOGITS]]) == sealed.content:
        log.warning(
            "%s of %s holds the sealed logits in other bytes: its compressor was of another version (%s)",
            shard, store.uri, manifest.computed.versions.get("numcodecs", "unknown"),
        )  # fmt: skip
    elif not same:
        raise DamagedError(
            f"{shard} of {store.uri} was computed again and came out different: it is left as it was",
            got=f"sha256 {sha256(data)}",
            expected=f"sha256 {sealed.sha256}",
            next=f"repair it as it was computed ({manifest.computed.model_dump_json()}), or delete {store.uri}",
        )
    set_aside(store, f"{ARRAYS}/{shard.key}")
    store.put_new(f"{ARRAYS}/{shard.key}", data)
