"""Prepared rows as blocks under a store root: written once for a cluster by many tasks, sealed, read by its nodes.

The object of a block is the bytes of its inputs, then those of its labels, and its key is their sha256. So whoever
writes a block writes the same object, and what is read is compared with its own name. Blocks are published
create-only and then receipted, as the shards of logits are; the manifest comes last.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from akd_dist.base.errors import AkdError, DamagedError, MachineError, RefusedError
from akd_dist.base.files import failpoint, is_there, sha256
from akd_dist.storage.layout import BLOCKS, CREATION_KEY, MANIFEST_KEY, RECEIPTS, ROWS
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.receipts import drop_packs, put_receipt, receipts_by_key
from akd_dist.storage.records import damaged, short
from akd_dist.storage.roots import open_root
from akd_dist.storage.row_documents import (
    MANIFEST_FORMAT as MANIFEST_FORMAT,
    ROWS_FORMAT as ROWS_FORMAT,
    SPLITS as SPLITS,
    BlockReceipt as BlockReceipt,
    RowsCreation as RowsCreation,
    RowsManifest as RowsManifest,
    SealedSplit as SealedSplit,
    fingerprint_of as fingerprint_of,
    receipt_key as receipt_key,
)

_NEXT = "run the command again with --prepare-again: the rows are prepared anew"


@dataclass(frozen=True)
class SealedRows:
    """Where prepared rows lie, and what their manifest was: small, and travels to workers."""

    uri: str
    sha256: str
    """That of the manifest."""

    def manifest(self) -> RowsManifest:
        """Their manifest.

        Raises:
            DamagedError: it is gone, or not what was sealed.
        """
        manifest = _read_manifest(open_root(self.uri))
        if manifest is None or manifest.sha256 != self.sha256:
            raise DamagedError(
                f"the prepared rows {self.uri} are not those that this command began with",
                got="no manifest" if manifest is None else f"a manifest with sha256 {manifest.sha256[:16]}",
                expected=f"sha256 {self.sha256[:16]}",
                next="run the same command again",
            )
        return manifest


@dataclass(frozen=True)
class RowsWriter:
    """Prepared rows that are being written: where, and what they are. Small, and travels to tasks."""

    root_uri: str
    id: str
    """The hash of what they are made from."""
    creation: RowsCreation

    @property
    def store(self) -> ObjectRoot:
        """Their own folder."""
        return rows_root(self.root_uri, self.id)


def rows_root(root_uri: str, rows_id: str) -> ObjectRoot:
    """The folder of prepared rows under a store root."""
    return open_root(root_uri).child(ROWS).child(rows_id)


def find_rows(root_uri: str, rows_id: str) -> tuple[SealedRows, RowsManifest] | None:
    """The prepared rows of this id, if they are sealed; None if they are not, or were begun.

    Raises:
        DamagedError: the manifest is not what was written, or a block is missing or has another size.
        RefusedError: the manifest is in a newer format.
    """
    store = rows_root(root_uri, rows_id)
    if (manifest := _read_manifest(store)) is None:
        return None
    sizes = {key: stat.size for key, stat in store.list(BLOCKS).items()}
    for split, sealed in manifest.splits.items():
        for number, digest in enumerate(sealed.blocks):
            expected = manifest.block_bytes(split, number)
            if sizes.get(f"{BLOCKS}/{digest}") != expected:
                raise _damaged(store, f"{BLOCKS}/{digest}", sizes.get(f"{BLOCKS}/{digest}"), f"{expected:,} bytes")
    return SealedRows(store.uri, manifest.sha256), manifest


def are_begun(root_uri: str, rows_id: str) -> bool:
    """Whether somebody has begun to write these rows, or sealed them."""
    return rows_root(root_uri, rows_id).exists(CREATION_KEY)


def begin_rows(writer: RowsWriter) -> None:
    """Begin to write rows, or go on with those that are begun. What was written of other rows is not believed.

    Raises:
        DamagedError: the place of the creation document is taken by what is no file.
        MachineError: the root cannot be written.
    """
    store, ours = writer.store, writer.creation.to_bytes()
    if not store.put_new(CREATION_KEY, ours) and _document(store, CREATION_KEY) != ours:
        store.delete_folder(RECEIPTS)
        store.put(CREATION_KEY, ours)


def remove_rows(root_uri: str, rows_id: str) -> None:
    """Remove rows that are of no use. Whoever still writes blocks of them is refused."""
    store = rows_root(root_uri, rows_id)
    store.delete(MANIFEST_KEY)
    store.delete(CREATION_KEY)
    store.parent.delete_folder(rows_id)


def unseal_rows(root_uri: str, rows_id: str) -> None:
    """Have all blocks written anew. Those that lie there are compared, and put in place again where they differ."""
    store = rows_root(root_uri, rows_id)
    store.delete(MANIFEST_KEY)
    store.delete_folder(RECEIPTS)


def receipts_there(writer: RowsWriter) -> dict[str, BlockReceipt]:
    """The receipts of blocks that are written, by their keys; as far as listings tell, the blocks are there.

    The blocks themselves are not read: whoever reads one compares it with its name.
    """
    store, creation = writer.store, writer.creation.sha256
    sizes = {key: stat.size for key, stat in store.list(BLOCKS).items()}
    there, doubtful = dict[str, BlockReceipt](), list[str]()
    for key, receipt in receipts_by_key(store, BlockReceipt).items():
        whole = receipt.creation == creation and sizes.get(receipt.key) == receipt.size
        there |= {key: receipt} if whole else {}
        doubtful += [] if whole else [key]
    if doubtful:
        drop_packs(store)
        for key in doubtful:
            store.delete(key)
    return there


def write_block(
    writer: RowsWriter,
    split: str,
    number: int,
    data: bytes,
    *,
    frames: int,
    hashes: str,
    seconds: float,
    enlarged: int = 0,
    targets: int = 0,
) -> BlockReceipt:
    """Publish a block, then its receipt; harmless to repeat, and to do twice at once.

    Args:
        data: inputs, then labels.
        frames, hashes, enlarged, targets: as of the receipt.
        seconds: how long the block took.

    Raises:
        RefusedError: the rows are gone.
        MachineError: the disk is full or cannot be written.
    """
    store, digest = writer.store, sha256(data)
    if not store.exists(CREATION_KEY):  # removed by whoever took this writer for dead: leave no loose end
        raise RefusedError(f"the prepared rows {store.uri} are gone", next="run the same command again")
    failpoint("block.before_publish")
    _publish(store, f"{BLOCKS}/{digest}", data, digest)
    failpoint("block.before_receipt")
    receipt = BlockReceipt(
        key=f"{BLOCKS}/{digest}",
        size=len(data),
        sha256=digest,
        rows=writer.creation.rows_of(split, number),
        seconds=round(seconds, 6),
        host=socket.gethostname(),
        creation=writer.creation.sha256,
        split=split,
        number=number,
        frames=frames,
        enlarged=enlarged,
        targets=targets,
        hashes=hashes,
    )
    return put_receipt(store, receipt.signed())


def seal_rows(writer: RowsWriter, manifest: RowsManifest) -> SealedRows:
    """Write the manifest of complete rows, signed, last; that of whoever sealed the same rows before stays.

    Raises:
        RefusedError: a block is missing.
    """
    store, manifest = writer.store, manifest.signed()
    sizes = store.list(BLOCKS)
    keys = {f"{BLOCKS}/{digest}" for split in manifest.splits.values() for digest in split.blocks}
    if missing := sorted(keys - sizes.keys()):
        raise RefusedError(
            f"the prepared rows {store.uri} cannot be sealed",
            got=f"no {missing[0]}",
            expected=f"{len(keys):,} blocks",
            next="run the same command again: it writes what is missing",
        )
    for key in [*sizes.keys() - keys, *store.partials()]:  # of sources that have changed since, and of killed writers
        store.delete(key)
    failpoint("seal.before_manifest")
    if not store.put_new(MANIFEST_KEY, manifest.to_bytes()):
        there = _read_manifest(store)
        if there is not None and (there.creation, there.splits) == (manifest.creation, manifest.splits):
            return SealedRows(store.uri, there.sha256)
        store.put(MANIFEST_KEY, manifest.to_bytes())
    return SealedRows(store.uri, manifest.sha256)


def read_block(uri: str, manifest: RowsManifest, split: str, number: int) -> bytes:
    """A block as it was sealed.

    Raises:
        DamagedError: it is gone, or other bytes; names its key.
    """
    store, digest = open_root(uri), manifest.splits[split].blocks[number]
    size = manifest.block_bytes(split, number)
    key = f"{BLOCKS}/{digest}"
    try:
        data = store.get(key, size)
    except ObjectMissing:
        raise _damaged(store, key, None, f"{size:,} bytes") from None
    if (found := sha256(data)) != digest:
        raise _damaged(store, key, f"sha256 {found[:16]}", f"sha256 {digest[:16]}")
    return data


def _read_manifest(store: ObjectRoot) -> RowsManifest | None:
    """The manifest, if there is one, compared with itself."""
    if (data := _document(store, MANIFEST_KEY)) is None:
        return None
    where = store.path_of(MANIFEST_KEY)
    try:
        manifest = RowsManifest.from_bytes(data, where)
        for field, told, expected in manifest.accounts(store.name):
            if told != expected:
                raise damaged(where, f"{field}: {short(told)}", expected)
    except DamagedError as error:
        error.next = _NEXT
        raise
    return manifest


def _document(store: ObjectRoot, key: str) -> bytes | None:
    """A document of prepared rows; None where nothing lies in its place."""
    try:
        return store.document(key)
    except ObjectMissing:
        path = store.local_path(key)
        if path is None or not is_there(path):
            return None
    raise DamagedError(
        f"{path} is damaged",
        got="a folder, or something else that is no file",
        expected="a file",
        next=f"remove the folder {store.uri}, and run the command again: the rows are prepared anew",
    )


def _publish(store: ObjectRoot, key: str, data: bytes, digest: str) -> None:
    """Bring a block into place. What lies there under its name and is other bytes is damage, and goes."""
    # Three times: what is there may be put there again by another writer.
    for _ in range(3):
        if store.put_new(key, data):
            return
        try:
            if sha256(store.get(key, len(data))) == digest:
                return
        except (ObjectMissing, DamagedError):
            pass
        store.delete(key)
    raise MachineError(
        f"{store.path_of(key)} cannot be published",
        got="other bytes in its place, three times",
        expected="a place that keeps what is written",
        next="check the disk, or see who else writes there",
    )


def _damaged(store: ObjectRoot, key: str, got: object, expected: str) -> AkdError:
    found = "nothing there" if got is None else f"{got:,} bytes" if isinstance(got, int) else got
    return DamagedError(f"{store.path_of(key)} is damaged", got=found, expected=expected, next=_NEXT)
