"""Writing a store: create it, ask what is missing, write whole shards, seal it.

A shard's object is encoded in memory, published create-only, and only then receipted, so a killed writer leaves a whole
shard or none. Every step may be repeated, by another process as well: resuming is asking what is missing.
"""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import failpoint, sha256
from akd_dist.storage.arrays import decode_shard, encode_objects
from akd_dist.storage.begun import (
    StoreWriter as StoreWriter,
    begun_as as begun_as,
    create_store as create_store,
    put_metadata,
)
from akd_dist.storage.content import digest
from akd_dist.storage.dictionary import DICTIONARY
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, LOGITS, MANIFEST_KEY, RECEIPTS, TARGETS_FORMAT, Shard
from akd_dist.storage.manifest import Identity, Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.publishing import publish, put_same, set_aside_unsealed
from akd_dist.storage.receipts import (
    drop_packs,
    intact_receipt,
    intact_receipts,
    is_receipt_of,
    put_receipt,
    receipt_of,
)
from akd_dist.storage.records import Loss, ObjectRecord, Probe, Receipt, ShardRecord, joined
from akd_dist.storage.tables import dictionary_sha256, find_fidelity, find_table, read_table

Kept = npt.NDArray[np.float32] | Mapping[str, npt.NDArray[Any]]
"""Logits float32 [n, classes]; or all arrays of the store by name, [n, ...] in the stored dtypes, as `Encoding.encode`
and `TopK.pack` give them."""


def missing_shards(writer: StoreWriter, *, deep: bool | None = None) -> list[Shard]:
    """Shards still to be computed: all but those with a valid receipt. A sealed store misses none.

    A shard that is not what its receipt says, or was computed in another way, is moved to `<id>.damaged/` and counts as
    missing; one without a receipt, or with a damaged one, stays where it is, for `adopt_shard`.

    Args:
        deep: read every receipt and every shard, and compare their sha256. Otherwise listings are believed: object and
            receipt are there, and of the right size where that is known; whoever reads the object verifies it.
            None is deep for a folder, and not for object storage, where it would fetch the whole store again.
    """
    store = writer.store
    if store.exists(MANIFEST_KEY):
        return []
    deep = store.local_path("") is not None if deep is None else deep
    sizes = {key: stat.size for key, stat in store.list(ARRAYS).items()}
    # Two listings instead of two looks at each shard: in object storage each look is a request.
    receipts = set(store.list(RECEIPTS))
    there = _keeps_its_receipt if deep else _is_listed
    dictionary = dictionary_sha256(writer)
    return [
        shard
        for shard in writer.layout.shards()
        if shard.receipt_key not in receipts or not there(writer, shard, sizes, dictionary)
    ]


def adopt_shard(writer: StoreWriter, shard: Shard) -> npt.NDArray[np.float32] | None:
    """The logits of a shard that was published but not receipted, as an interrupted writer leaves one.

    Returns:
        float32 [shard.rows, classes], to be handed to `write_shard`; None if there is none, or none that is whole: that
        one is moved to `<id>.damaged/`. None as well where stored logits are rounded, and the receipt has to say by how
        much: they are computed again. So they are from format 4 on, whatever lies there: what equals it stays in its
        place.
    """
    if writer.creation.identity.format >= TARGETS_FORMAT:
        return None
    try:
        data = writer.store.get(f"{ARRAYS}/{shard.key}")
    except ObjectMissing:
        return None
    identity = writer.creation.identity
    try:
        # Decoded as a whole, since without a receipt there is no sha256 to compare with.
        stored = decode_shard(identity, shard, data)
    except ValueError:
        set_aside_unsealed(writer.store, [f"{ARRAYS}/{key}" for key in shard.keys], str(shard))
        return None
    if identity.format > 2 and identity.codec.rounds:
        return None  # its receipt says what rounding changed: the logits before it are needed
    return identity.codec.decode({LOGITS: stored})


def receipt_there(writer: StoreWriter, shard: Shard) -> Receipt | None:
    """The receipt of a shard that is published and receipted, as a task finds it that is run again; else None."""
    there = writer.store.exists(f"{ARRAYS}/{shard.keys[-1]}")
    receipt = receipt_of(writer.store, writer.creation_sha256, shard) if there else None
    return receipt if receipt is not None and _holds(writer.store, receipt) else None


def _holds(store: ObjectRoot, receipt: Receipt) -> bool:
    """Whether every object is there that a receipt vouches for, byte for byte."""
    try:
        return all(sha256(store.get(f"{ARRAYS}/{key}")) == digest for key, digest in receipt.digests.items())
    except ObjectMissing:
        return False


def take_shards(writer: StoreWriter, source: Manifest, missing: Sequence[Shard]) -> list[Shard]:
    """Give a store the shards that it lacks and a sealed store under the same root has; harmless to repeat.

    The caller answers for `source` holding the same views, computed in the same way. Its objects are linked where there
    are hard links, else copied, and are otherwise left alone.

    Returns:
        The shards taken. Those of the source's views that are not among them are damaged there, and still missing.
    """
    return [shard for shard in missing if shard.view < source.identity.views and _take_shard(writer, shard, source)]


def _take_shard(writer: StoreWriter, shard: Shard, source: Manifest) -> bool:
    record, folder = source.record(shard), f"{source.id}/{ARRAYS}"
    try:
        objects = {key: writer.store.parent.get(f"{folder}/{key}") for key in shard.keys}
    except ObjectMissing:
        return False
    # Read and hashed even where they are only linked: a link would carry damage on into this store.
    same = {key: sha256(data) for key, data in objects.items()} == record.digests
    if not same or source.format != writer.creation.identity.format or record.dictionary != dictionary_sha256(writer):
        return False
    receipt = Receipt.of(record, writer.creation_sha256, 0.0, socket.gethostname())
    published = _publish(writer, shard, objects, linked_to=folder)
    failpoint("shard.before_receipt")
    if published is None:
        put_receipt(writer.store, receipt)
    return True


def write_shard(
    writer: StoreWriter,
    shard: Shard,
    logits: Kept,
    *,
    label_agreement: float | None,
    probes: Sequence[Probe],
    seconds: float,
    loss: Loss | None = None,
    dictionary: str | None = None,
) -> Receipt:
    """Publish a shard object by object, then its receipt; harmless to repeat, and to do twice at once.

    Args:
        logits: float32 [shard.rows, classes]; or, already encoded, all arrays of the shard by name.
        label_agreement: share of the rows where the teacher's first class is the label, of the logits as they are
            stored (`as_stored`), so that whoever finds the shard without its receipt arrives at the same; None for
            regression.
        probes: augmented views of a few rows, as digests and samples.
        seconds: how long the logits took, for the receipt; 0 for those of `adopt_shard`.
        loss: by how much the logits differ from the teacher's, on the rows of the probes; None for no difference, and
            where no logits are stored.
        dictionary: sha256 of what a `top_k` shard was described by, as `put_dictionary` and `find_dictionary` say.

    Returns:
        The receipt; the other writer's if the shard was published and receipted already.

    Raises:
        RefusedError: logits of another shape, or not finite in the stored dtype; names the rows.
        DamagedError: the store is sealed, and this shard is not what was sealed.
        MachineError: the disk is full or cannot be written.
    """
    identity = writer.creation.identity
    if identity.is_top_k != (dictionary is not None):
        raise RefusedError(f"{shard} needs {'a' if identity.is_top_k else 'no'} dictionary", got=dictionary)
    arrays = encode_arrays(identity, shard, logits)
    objects = encode_objects(identity, shard, arrays)
    records = ObjectRecord.of(objects)
    remembered = _as_in_format(identity.format, probes)
    lossy = identity.format > 2 and not identity.is_top_k
    record = ShardRecord(
        key=shard.key,
        size=sum(one.size for one in records),
        sha256=joined(records) if shard.arrays else records[0].sha256,
        rows=shard.rows,
        finite=True,
        label_agreement=None if label_agreement is None else float(label_agreement),
        probes=remembered,
        content=digest([arrays[array.name] for array in identity.layout.fields]) if identity.format > 2 else None,
        loss=(loss or Loss.none(len(remembered), identity.classes)) if lossy else None,
        objects=records if shard.arrays else None,
        dictionary=dictionary,
    )
    receipt = Receipt.of(record, writer.creation_sha256, float(seconds), socket.gethostname())
    if not writer.store.exists(CREATION_KEY):  # removed by whoever took this writer for dead: leave no loose end
        raise RefusedError(f"the store {writer.uri} is gone", next="run the same command again: it is begun anew")
    # The objects before their receipt: a receipt vouches for bytes that are there. Killed in between, whoever comes
    # next finds objects without a receipt and adopts them.
    failpoint("shard.before_publish")
    published = _publish(writer, shard, objects)
    failpoint("shard.before_receipt")
    return published or put_receipt(writer.store, receipt)


def seal_store(writer: StoreWriter) -> Manifest:
    """Write the manifest of a complete store, last and create-only; the same one again if it is sealed already.

    Raises:
        RefusedError: shards are missing; names the first.
        DamagedError: a shard's size is not its receipt's, or the store is sealed with another manifest.
    """
    store = writer.store
    sizes = {key: stat.size for key, stat in store.list(ARRAYS).items()}
    found = intact_receipts(store)
    tables = {name: _complete_table(writer, name) for name in writer.creation.identity.tables}
    dictionary = joined(tables[DICTIONARY]) if DICTIONARY in tables else None
    receipts = [
        _complete_receipt(writer, shard, sizes, found.get(shard.key), dictionary) for shard in writer.layout.shards()
    ]
    # The seal vouches for these files too, and the store may have been begun days ago: they are compared once more.
    digests = put_metadata(store, writer.creation.identity)
    fidelity = find_fidelity(store, writer.creation_sha256) if tables else None
    manifest = Manifest.seal(writer.creation, digests, (receipt.record() for receipt in receipts), tables, fidelity)
    for key in store.partials():  # of writers that were killed; a live one writes its file again
        store.delete(key)
    # Last, since a store is whole for every reader from the moment that its manifest is there.
    failpoint("seal.before_manifest")
    put_same(store, MANIFEST_KEY, manifest.to_bytes())
    return manifest


def as_stored(identity: Identity, logits: npt.NDArray[np.float32], first_row: int) -> npt.NDArray[np.float32]:
    """Logits as a reader of the store will have them, float32 [n, classes]: encoded, and decoded again.

    Args:
        first_row: the dataset row number of `logits[0]`, for the message.

    Raises:
        RefusedError: they are not finite in the stored dtype; names the rows.
    """
    return identity.codec.decode(identity.codec.encode(logits, first_row))


def encode_arrays(identity: Identity, shard: Shard, logits: Kept) -> Mapping[str, npt.NDArray[Any]]:
    """The arrays that a shard's objects hold, by name.

    Raises:
        RefusedError: logits of another shape, or not finite in the stored dtype; other arrays than the store's.
    """
    if isinstance(logits, Mapping):
        found = {name: (str(array.dtype), array.shape) for name, array in logits.items()}
        needed = {array.name: (array.dtype, (shard.rows, *array.shape)) for array in identity.layout.fields}
        if found != needed:
            raise RefusedError(f"the arrays of {shard} are not those of its store", got=found, expected=needed)
        return logits
    expected = (shard.rows, identity.classes)
    if logits.shape != expected:
        raise RefusedError(f"logits of {shard} have the wrong shape", got=logits.shape, expected=expected)
    return identity.codec.encode(logits, shard.start)


def _is_listed(writer: StoreWriter, shard: Shard, sizes: dict[str, int], dictionary: str | None) -> bool:
    """Whether the objects of a shard that has a receipt are there, as far as a listing tells.

    By which dictionary it was described is told when the store is sealed.
    """
    found = [sizes.get(f"{ARRAYS}/{key}", 0) for key in shard.keys]
    exact = writer.creation.identity.object_sizes(shard)
    there = all(found) and exact in (None, found)
    if not there:
        if any(f"{ARRAYS}/{key}" in sizes for key in shard.keys):
            set_aside_unsealed(writer.store, [f"{ARRAYS}/{key}" for key in shard.keys], str(shard))
        drop_packs(writer.store)
        writer.store.delete(shard.receipt_key)
    return there


def _keeps_its_receipt(writer: StoreWriter, shard: Shard, sizes: dict[str, int], dictionary: str | None) -> bool:
    receipt = intact_receipt(writer.store, shard.receipt_key, Receipt)
    exact = writer.creation.identity.object_bytes(shard)
    whole = (
        is_receipt_of(receipt, writer.creation_sha256, shard)
        and receipt.dictionary == dictionary
        and _listed(receipt, sizes) == receipt.size
        and exact in (None, receipt.size)
    )
    whole = whole and receipt is not None and _holds(writer.store, receipt)
    if not whole:
        # Without a receipt that can be believed the object may still be whole, so it stays for `adopt_shard` to read.
        if receipt is not None:
            set_aside_unsealed(writer.store, [f"{ARRAYS}/{key}" for key in shard.keys], str(shard))
        writer.store.delete(shard.receipt_key)
    return whole


def _as_in_format(version: int, probes: Sequence[Probe]) -> list[Probe]:
    """Probes as a store of that format keeps them: one of format 1 may still be repaired, and has no samples."""
    return list(probes) if version > 1 else [Probe(row=probe.row, sha256=probe.sha256) for probe in probes]


def _publish(
    writer: StoreWriter, shard: Shard, objects: Mapping[str, bytes], linked_to: str | None = None
) -> Receipt | None:
    """Bring a shard's objects into place, in order; the receipt, if another writer's are there and receipted.

    Args:
        linked_to: a folder under the writer's root that holds the same objects, which may be linked.
    """
    for key, data in objects.items():
        failpoint("shard.before_object")
        receipts = list[Receipt]()

        def vouched(key: str = key, receipts: list[Receipt] = receipts) -> str | None:
            receipt = receipt_of(writer.store, writer.creation_sha256, shard)
            receipts[:] = [] if receipt is None else [receipt]
            return None if receipt is None else receipt.digests.get(key)

        source = None if linked_to is None else f"{linked_to}/{key}"
        if not publish(writer.store, f"{ARRAYS}/{key}", data, vouched=vouched, what=str(shard), linked_to=source):
            return receipts[0]
    return None


def _complete_table(writer: StoreWriter, name: str) -> list[ObjectRecord]:
    receipt = find_table(writer.store, writer.creation_sha256, name)
    if receipt is not None:
        read_table(writer.store, name, receipt.objects)
        return receipt.objects
    raise RefusedError(
        f"{writer.uri} cannot be sealed: its {name} is missing",
        got="no receipt of it",
        expected=f"a whole {name}",
        next="run akd-dist cache-teacher again: it makes what is missing",
    )


def _complete_receipt(
    writer: StoreWriter, shard: Shard, sizes: dict[str, int], receipt: Receipt | None, dictionary: str | None
) -> Receipt:
    listed = [sizes.get(f"{ARRAYS}/{key}") for key in shard.keys]
    found = None if None in listed else sum(size or 0 for size in listed)
    if not is_receipt_of(receipt, writer.creation_sha256, shard) or found is None or receipt.dictionary != dictionary:
        writer.store.delete(shard.receipt_key)  # one that cannot be believed: the shard counts as missing from now on
        raise RefusedError(
            f"{writer.uri} cannot be sealed: {shard} is missing",
            got="no object" if found is None else "no receipt",
            expected=f"{writer.layout.shard_count} shards, each with its receipt",
            next="run akd-dist cache-teacher again: it computes what is missing",
        )
    if found != receipt.size:
        writer.store.delete(shard.receipt_key)
        raise DamagedError(
            f"{writer.uri} cannot be sealed: {shard} is damaged",
            got=f"{found:,} bytes",
            expected=f"{receipt.size:,} bytes",
            next="run akd-dist cache-teacher again: it recomputes the shard",
        )
    return receipt


def _listed(receipt: Receipt, sizes: dict[str, int]) -> int:
    """Bytes that a listing has of a shard's objects."""
    return sum(sizes.get(f"{ARRAYS}/{key}", 0) for key in receipt.digests)
