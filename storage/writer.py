"""Writing a store: create it, ask what is missing, write whole shards, seal it.

A shard's object is encoded in memory, published create-only, and only then receipted, so a killed writer leaves a whole
shard or none. Every step may be repeated, by another process as well: resuming is asking what is missing.
"""

import functools
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, failpoint, sha256
from akd_dist.storage.arrays import decode_shard, encode_shard, metadata
from akd_dist.storage.content import digest
from akd_dist.storage.layout import (
    ARRAYS,
    CREATION_KEY,
    DAMAGED_SUFFIX,
    LOGITS,
    MANIFEST_KEY,
    RECEIPTS,
    SOURCE_KEY,
    Shard,
    StoreLayout,
)
from akd_dist.storage.manifest import Creation, Identity, Manifest, differences
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.receipts import (
    drop_packs,
    intact_receipt,
    intact_receipts,
    is_receipt_of,
    put_receipt,
    receipt_of,
)
from akd_dist.storage.records import Loss, Probe, Receipt, ShardRecord
from akd_dist.storage.roots import open_root


@dataclass(frozen=True)
class StoreWriter:
    """A store being written: where, and all that was settled when it was created. Small, and travels to tasks."""

    root_uri: str
    creation: Creation

    @property
    def id(self) -> str:
        """The store's id: the hash of its identity."""
        return self.creation.identity.id

    @property
    def layout(self) -> StoreLayout:
        """How the store is cut into shards."""
        return self.creation.identity.layout

    @functools.cached_property
    def creation_sha256(self) -> str:
        """The sha256 of the creation document: the receipts of this store name it."""
        return self.creation.sha256

    @property
    def store(self) -> ObjectRoot:
        """The store's own folder."""
        return open_root(self.root_uri).child(self.id)

    @property
    def uri(self) -> str:
        """Path or URI of the store's folder."""
        return self.store.uri


def create_store(root_uri: str, creation: Creation, hint: dict[str, Any] | None = None) -> StoreWriter:
    """Create a store, or open the one of the same identity to go on with it.

    Args:
        hint: how to recompute it, kept beside the store and not part of what is hashed.

    Raises:
        RefusedError: the store is there, computed in another way (batch rows, threads, device, library versions).
        DamagedError: the store is there, and its description or Zarr metadata are not what was written.
        MachineError: the root cannot be written.
    """
    root = open_root(root_uri)
    writer = StoreWriter(root.uri, creation)
    store = writer.store
    if not store.put_new(CREATION_KEY, creation.to_bytes()):
        _check_same_creation(store, creation)
    _put_metadata(store, creation.identity)
    if hint is not None:
        store.put(SOURCE_KEY, canonical_json(hint))
    return writer


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
    return [
        shard
        for shard in writer.layout.shards()
        if shard.receipt_key not in receipts or not there(writer, shard, sizes)
    ]


def adopt_shard(writer: StoreWriter, shard: Shard) -> npt.NDArray[np.float32] | None:
    """The logits of a shard that was published but not receipted, as an interrupted writer leaves one.

    Returns:
        float32 [shard.rows, classes], to be handed to `write_shard`; None if there is none, or none that is whole: that
        one is moved to `<id>.damaged/`. None as well where stored logits are rounded, and the receipt has to say by how
        much: they are computed again.
    """
    try:
        data = writer.store.get(f"{ARRAYS}/{shard.key}")
    except ObjectMissing:
        return None
    identity = writer.creation.identity
    try:
        # Decoded as a whole, since without a receipt there is no sha256 to compare with.
        stored = decode_shard(identity, shard, data)
    except ValueError:
        _set_aside(writer, shard)
        return None
    if identity.format > 2 and identity.codec.rounds:
        return None  # its receipt says what rounding changed: the logits before it are needed
    return identity.codec.decode({LOGITS: stored})


def receipt_there(writer: StoreWriter, shard: Shard) -> Receipt | None:
    """The receipt of a shard that is published and receipted, as a task finds it that is run again; else None."""
    key = f"{ARRAYS}/{shard.key}"
    receipt = receipt_of(writer.store, writer.creation_sha256, shard) if writer.store.exists(key) else None
    try:
        return receipt if receipt is not None and sha256(writer.store.get(key)) == receipt.sha256 else None
    except ObjectMissing:
        return None


def take_shards(writer: StoreWriter, source: Manifest, missing: Sequence[Shard]) -> list[Shard]:
    """Give a store the shards that it lacks and a sealed store under the same root has; harmless to repeat.

    The caller answers for `source` holding the same views, computed in the same way. Its objects are linked where there
    are hard links, else copied, and are otherwise left alone.

    Returns:
        The shards taken. Those of the source's views that are not among them are damaged there, and still missing.
    """
    return [shard for shard in missing if shard.view < source.identity.views and _take_shard(writer, shard, source)]


def _take_shard(writer: StoreWriter, shard: Shard, source: Manifest) -> bool:
    record, key = source.record(shard), f"{source.id}/{ARRAYS}/{shard.key}"
    try:
        data = writer.store.parent.get(key)
    except ObjectMissing:
        return False
    # Read and hashed even where it is only linked: a link would carry damage on into this store.
    if sha256(data) != record.sha256 or source.format != writer.creation.identity.format:
        return False
    receipt = Receipt.of(record, writer.creation_sha256, 0.0, socket.gethostname())
    published = _publish(writer, shard, data, linked_to=key)
    failpoint("shard.before_receipt")
    if published is None:
        put_receipt(writer.store, receipt)
    return True


def write_shard(
    writer: StoreWriter,
    shard: Shard,
    logits: npt.NDArray[np.float32],
    *,
    label_agreement: float | None,
    probes: Sequence[Probe],
    seconds: float,
    loss: Loss | None = None,
) -> Receipt:
    """Publish a shard, then its receipt; harmless to repeat, and to do twice at once.

    Args:
        logits: float32 [shard.rows, classes].
        label_agreement: share of the rows where the teacher's first class is the label, of the logits as they are
            stored (`as_stored`), so that whoever finds the shard without its receipt arrives at the same; None for
            regression.
        probes: augmented views of a few rows, as digests and samples.
        seconds: how long the logits took, for the receipt; 0 for those of `adopt_shard`.
        loss: by how much the logits differ from the teacher's, on the rows of the probes; None for no difference.

    Returns:
        The receipt; the other writer's if the shard was published and receipted already.

    Raises:
        RefusedError: logits of another shape, or not finite in the stored dtype; names the rows.
        DamagedError: the store is sealed, and this shard is not what was sealed.
        MachineError: the disk is full or cannot be written.
    """
    identity = writer.creation.identity
    arrays = encode_arrays(identity, shard, logits)
    data = encode_shard(identity, shard, arrays)
    remembered = _as_in_format(identity.format, probes)
    record = ShardRecord(
        key=shard.key,
        size=len(data),
        sha256=sha256(data),
        rows=shard.rows,
        finite=True,
        label_agreement=None if label_agreement is None else float(label_agreement),
        probes=remembered,
        content=digest([arrays[LOGITS]]) if identity.format > 2 else None,
        loss=(loss or Loss.none(len(remembered), identity.classes)) if identity.format > 2 else None,
    )
    receipt = Receipt.of(record, writer.creation_sha256, float(seconds), socket.gethostname())
    if not writer.store.exists(CREATION_KEY):  # removed by whoever took this writer for dead: leave no loose end
        raise RefusedError(f"the store {writer.uri} is gone", next="run the same command again: it is begun anew")
    # The object before its receipt: a receipt vouches for bytes that are there. Killed in between, whoever comes next
    # finds the object without a receipt and adopts it.
    failpoint("shard.before_publish")
    published = _publish(writer, shard, data)
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
    receipts = [_complete_receipt(writer, shard, sizes, found.get(shard.key)) for shard in writer.layout.shards()]
    # The seal vouches for these files too, and the store may have been begun days ago: they are compared once more.
    digests = _put_metadata(store, writer.creation.identity)
    manifest = Manifest.seal(writer.creation, digests, (receipt.record() for receipt in receipts))
    for key in store.partials():  # of writers that were killed; a live one writes its file again
        store.delete(key)
    # Last, since a store is whole for every reader from the moment that its manifest is there.
    failpoint("seal.before_manifest")
    _put_same(store, MANIFEST_KEY, manifest.to_bytes())
    return manifest


def as_stored(identity: Identity, logits: npt.NDArray[np.float32], first_row: int) -> npt.NDArray[np.float32]:
    """Logits as a reader of the store will have them, float32 [n, classes]: encoded, and decoded again.

    Args:
        first_row: the dataset row number of `logits[0]`, for the message.

    Raises:
        RefusedError: they are not finite in the stored dtype; names the rows.
    """
    return identity.codec.decode(identity.codec.encode(logits, first_row))


def encode_arrays(identity: Identity, shard: Shard, logits: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """The arrays that a shard's object holds, by name.

    Raises:
        RefusedError: logits of another shape, or not finite in the stored dtype.
    """
    expected = (shard.rows, identity.classes)
    if logits.shape != expected:
        raise RefusedError(f"logits of {shard} have the wrong shape", got=logits.shape, expected=expected)
    return identity.codec.encode(logits, shard.start)


def _check_same_creation(store: ObjectRoot, creation: Creation) -> None:
    """Refuse to go on with a store that was begun in another way.

    Where the receipts say that it was begun in this very way, it is the document that was damaged: it is put back.
    """
    data, ours = _get_whatever(store, CREATION_KEY), creation.to_bytes()
    if data == ours:
        return
    if begun_as(store) == {creation.sha256}:
        set_aside(store, CREATION_KEY)
        store.put_new(CREATION_KEY, ours)
        return
    try:
        found = Creation.from_bytes(data, store.path_of(CREATION_KEY))
    except DamagedError as error:
        error.next = f"bring the file back from a copy, or delete {store.uri} to compute it anew"
        raise
    differing = differences(creation, found)
    if differing:
        raise RefusedError(
            f"the store {store.uri} was begun in another way than this run would go on with it",
            got=f"this run against the store: {'; '.join(differing)}",
            expected="the same batch rows, threads, device and versions until the store is sealed",
            next=f"run as the store was begun, or delete {store.uri} to compute it anew",
        )


def begun_as(store: ObjectRoot) -> set[str]:
    """The sha256 of the creation document, as a store's intact receipts name it; nothing where there are none."""
    return {receipt.creation for receipt in intact_receipts(store).values() if receipt.creation is not None}


def _put_metadata(store: ObjectRoot, identity: Identity) -> dict[str, str]:
    """Publish the Zarr metadata files, or find them as they should be; their sha256 by key."""
    files = metadata(identity)
    for key, data in files.items():
        _put_same(store, f"{ARRAYS}/{key}", data)
    return {key: sha256(data) for key, data in files.items()}


def _put_same(store: ObjectRoot, key: str, data: bytes) -> None:
    """Publish, or find the very same bytes."""
    if not store.put_new(key, data) and (found := _get_whatever(store, key)) != data:
        raise DamagedError(
            f"{store.path_of(key)} is not what this store's description makes it",
            got=f"sha256 {sha256(found)}" if found else "nothing, or no file",
            expected=f"sha256 {sha256(data)}",
            next=f"delete {store.uri} to compute it anew, or bring the file back from a copy",
        )


def _get_whatever(store: ObjectRoot, key: str) -> bytes:
    """What is in the place of an object: nothing, if it is a folder or a pipe."""
    try:
        return store.document(key)
    except ObjectMissing:
        return b""


def _is_listed(writer: StoreWriter, shard: Shard, sizes: dict[str, int]) -> bool:
    """Whether the object of a shard that has a receipt is there, as far as a listing tells."""
    size, exact = sizes.get(f"{ARRAYS}/{shard.key}"), writer.creation.identity.object_bytes(shard)
    there = size is not None and size > 0 and exact in (None, size)
    if not there:
        if size is not None:
            _set_aside(writer, shard)
        drop_packs(writer.store)
        writer.store.delete(shard.receipt_key)
    return there


def _keeps_its_receipt(writer: StoreWriter, shard: Shard, sizes: dict[str, int]) -> bool:
    receipt = intact_receipt(writer.store, shard.receipt_key, Receipt)
    key, exact = f"{ARRAYS}/{shard.key}", writer.creation.identity.object_bytes(shard)
    whole = (
        is_receipt_of(receipt, writer.creation_sha256, shard)
        and sizes.get(key) == receipt.size
        and exact in (None, receipt.size)
    )
    if receipt and whole:
        try:
            whole = sha256(writer.store.get(key)) == receipt.sha256
        except ObjectMissing:
            whole = False
    if not whole:
        # Without a receipt that can be believed the object may still be whole, so it stays for `adopt_shard` to read.
        if receipt is not None:
            _set_aside(writer, shard)
        writer.store.delete(shard.receipt_key)
    return whole


def _as_in_format(version: int, probes: Sequence[Probe]) -> list[Probe]:
    """Probes as a store of that format keeps them: one of format 1 may still be repaired, and has no samples."""
    return list(probes) if version > 1 else [Probe(row=probe.row, sha256=probe.sha256) for probe in probes]


def _publish(writer: StoreWriter, shard: Shard, data: bytes, linked_to: str | None = None) -> Receipt | None:
    """Bring the shard's object into place; the receipt, if another writer's object is there and receipted.

    An object with other bytes and no receipt that vouches for them is a torn or foreign one: it is set aside.

    Args:
        linked_to: a key under the writer's root that holds the same bytes, and may be linked.
    """
    store, key = writer.store, f"{ARRAYS}/{shard.key}"
    # Three times: what was found in the place may be set aside by another writer before it is read, or put there again.
    for _ in range(3):
        if linked_to is None:
            new = store.put_new(key, data)
        else:
            new = store.parent.link_new(linked_to, f"{store.name}/{key}", data)
        if new:
            return None
        try:
            found = store.get(key)
        except ObjectMissing:  # set aside by somebody else, or a folder
            found = b""
        if found == data:
            return None
        receipt = receipt_of(store, writer.creation_sha256, shard)
        if receipt is not None and receipt.sha256 == sha256(found):
            return receipt
        _set_aside(writer, shard)
    raise MachineError(
        f"{store.path_of(key)} cannot be published",
        got="other bytes in its place, three times",
        expected="one writer's bytes",
        next="see who else writes this store",
    )


def _complete_receipt(writer: StoreWriter, shard: Shard, sizes: dict[str, int], receipt: Receipt | None) -> Receipt:
    found = sizes.get(f"{ARRAYS}/{shard.key}")
    if not is_receipt_of(receipt, writer.creation_sha256, shard) or found is None:
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


def _set_aside(writer: StoreWriter, shard: Shard) -> None:
    """Move an object that is no good to `<id>.damaged/`; never one of a sealed store."""
    if writer.store.exists(MANIFEST_KEY):
        raise DamagedError(
            f"{writer.uri} is sealed, and {shard} is not what was sealed",
            next=f"akd-dist stores repair {writer.id} --store-root {writer.root_uri}",
        )
    drop_packs(writer.store)
    set_aside(writer.store, f"{ARRAYS}/{shard.key}")


def set_aside(store: ObjectRoot, key: str) -> bool:
    """Move an object of a store to `<id>.damaged/`, under a name of its own; False if there is none."""
    # A random part, since the same shard may be set aside several times, and by two writers at once.
    aside = f"{store.name}{DAMAGED_SUFFIX}/{key.replace('/', '-')}.{secrets.token_hex(4)}"
    return store.parent.move(f"{store.name}/{key}", aside)
