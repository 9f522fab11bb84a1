"""A sealed store that is damaged: what is wrong with it, and how it is brought back to the bytes that were sealed."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage.arrays import encode_objects, metadata, table_objects
from akd_dist.storage.catalog import Progress, creation_document
from akd_dist.storage.claim import claim_store
from akd_dist.storage.content import digest
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, DAMAGED_SUFFIX, LOGITS, MANIFEST_KEY, Shard
from akd_dist.storage.manifest import Computed, Creation, Manifest, differences
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.publishing import get_whatever, set_aside
from akd_dist.storage.reader import open_store, read_manifest
from akd_dist.storage.records import Loss, ObjectRecord, Probe, joined
from akd_dist.storage.roots import open_root
from akd_dist.storage.sealed_objects import Damage, damages_of
from akd_dist.storage.tables import Table, dictionary_sha256, find_tables, put_table, sealed_documents
from akd_dist.storage.writer import (
    Kept,
    StoreWriter,
    adopt_shard,
    begun_as,
    encode_arrays,
    missing_shards,
    seal_store,
    write_shard,
)

log = logging.getLogger("akd_dist.storage")

# Computes a shard anew: logits float32 [shard.rows, classes], or its arrays; label agreement, probes and what storing
# changes, as `write_shard` takes them.
# Where the stored logits are whole, it is given them, and adds agreement and probes alone.
Recompute = Callable[[Shard, npt.NDArray[np.float32] | None], tuple[Kept, float | None, Sequence[Probe], Loss | None]]
# Makes a table anew by its name, `offsets` or `dictionary`: its arrays by name.
Remake = Callable[[str], Table]


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
    return damages_of(open_root(uri), manifest, deep=deep, on_progress=on_progress)


def repair_store(
    root_uri: str,
    store_id: str,
    recompute: Recompute,
    on_progress: Progress | None = None,
    *,
    computed: Computed | None = None,
    remake: Remake | None = None,
) -> list[Shard]:
    """Mend a sealed store: damaged shards are computed again, and must arrive at the bytes that were sealed.

    What the store has once for all shards, its tables, is made again before.

    Args:
        recompute: called for each damaged shard, and for no other.
        on_progress: called with how many shards are mended, and of how many.
        computed: how `recompute` computes; None where that is known to be how the store was computed.
        remake: called for each damaged table, and for no other; None where a store has none.

    Returns:
        The shards that were computed again.

    Raises:
        DamagedError: a shard or table came out different (the store is left as it was), or the manifest cannot be made
            again.
        RefusedError: manifest and shards are damaged, and these would be computed in another way: no seal would tell.
        HeldError: somebody else is writing the store.
    """
    root = open_root(root_uri)
    store = root.child(store_id)
    with claim_store(root.uri, store_id):
        damages = {damage.key for damage in verify_store(root.uri, store_id)}
        if MANIFEST_KEY in damages:
            mended = _finish_again(root, store_id, recompute, on_progress, computed, remake)
        else:
            manifest = read_manifest(store.uri)
            _mend_documents(store, manifest, damages)
            _mend_tables(store, manifest, damages, remake)
            mended = [
                shard
                for shard in manifest.identity.layout.shards()
                if not damages.isdisjoint(f"{ARRAYS}/{key}" for key in shard.keys)
            ]
            for number, shard in enumerate(mended, 1):
                _mend_shard(store, manifest, shard, recompute)
                if on_progress is not None:
                    on_progress(number, len(mended))
        open_store(store.uri)
        # Only once the store opens: until then, what was set aside may be the last copy of something.
        root.delete_folder(f"{store_id}{DAMAGED_SUFFIX}")
    return mended


def _finish_again(
    root: ObjectRoot,
    store_id: str,
    recompute: Recompute,
    on_progress: Progress | None,
    how: Computed | None,
    remake: Remake | None,
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
        tables = find_tables(writer)
        for name in writer.creation.identity.tables:
            if name not in tables:
                put_table(writer, name, _remade(writer.uri, name, remake))
        missing = missing_shards(writer)
        dictionary = dictionary_sha256(writer)
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
            write_shard(
                writer,
                shard,
                logits,
                label_agreement=label_agreement,
                probes=probes,
                seconds=0.0,
                loss=loss,
                dictionary=dictionary,
            )
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
    """Put back what is a function of the manifest: the Zarr metadata, and the documents that it repeats."""
    files = {f"{ARRAYS}/{key}": data for key, data in metadata(manifest.identity).items()}
    for key, data in (files | sealed_documents(manifest)).items():
        if key in damages:
            set_aside(store, key)
            store.put_new(key, data)


def _mend_shard(store: ObjectRoot, manifest: Manifest, shard: Shard, recompute: Recompute) -> None:
    sealed = manifest.record(shard)
    logits, *_ = recompute(shard, None)
    arrays = encode_arrays(manifest.identity, shard, logits)
    objects = encode_objects(manifest.identity, shard, arrays)
    found = {key: sha256(data) for key, data in objects.items()}
    same = found == sealed.digests
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
            got=f"sha256 {', '.join(found.values())}",
            expected=f"sha256 {', '.join(sealed.digests.values())}",
            next=f"repair it as it was computed ({manifest.computed.model_dump_json()}), or delete {store.uri}",
        )
    _put_back(store, objects)


def _mend_tables(store: ObjectRoot, manifest: Manifest, damages: set[str], remake: Remake | None) -> None:
    for name, sealed in (manifest.tables or {}).items():
        if damages.isdisjoint(f"{ARRAYS}/{one.key}" for one in sealed):
            continue
        objects = table_objects(name, _remade(store.uri, name, remake))
        if ObjectRecord.of(objects) != sealed:
            raise DamagedError(
                f"the {name} of {store.uri} was made again and came out different: it is left as it was",
                got=f"sha256 {joined(ObjectRecord.of(objects))}",
                expected=f"sha256 {joined(sealed)}",
                next=f"repair it as it was made ({manifest.computed.model_dump_json()}), or delete {store.uri}",
            )
        _put_back(store, objects)


def _put_back(store: ObjectRoot, objects: Mapping[str, bytes]) -> None:
    """Put the sealed bytes in the place of whatever lies there; what is right stays untouched."""
    for key, data in objects.items():
        place = f"{ARRAYS}/{key}"
        if len(objects) == 1 or get_whatever(store, place) != data:
            set_aside(store, place)
            store.put_new(place, data)


def _remade(uri: str, name: str, remake: Remake | None) -> Table:
    if remake is None:
        raise RefusedError(
            f"the {name} of {uri} is damaged",
            got="nothing that makes it again",
            expected="the recipe, the data and the teacher that the store was made from",
            next=f"bring arrays.zarr/{name} back from a copy, or delete {uri} to compute it anew",
        )
    return remake(name)
