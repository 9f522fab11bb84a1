"""Receipts of a store that is being written: one a shard, and packs of them, so that sealing asks for few objects.

A pack only repeats what the single receipts say. It may be missing or be removed at any time.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeGuard

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.storage.layout import RECEIPTS, Shard
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.records import Document, Receipt

PER_PACK = 256
"""Receipts that a pack takes: with one put and one get for so many, sealing costs next to no requests a shard."""
_PACK = "packed-"
# Object storage answers many requests at once, and each takes some 30 ms.
_AT_ONCE = 32


class Pack(Document):
    """Receipts of several shards in one object."""

    receipts: list[Receipt]


class Packer:
    """Packs receipts as they come in. For object storage only: reading a small file costs nothing.

    Args:
        always: whether to pack in a folder as well.
    """

    def __init__(self, store: ObjectRoot, *, always: bool = False) -> None:
        self._store, self._waiting = store, list[Receipt]()
        self._packs = always or store.local_path("") is None

    def add(self, receipt: Receipt) -> None:
        """Take a receipt that its writer has put."""
        if self._packs:
            self._waiting.append(receipt)
            if len(self._waiting) >= PER_PACK:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting:
            pack = Pack(receipts=self._waiting)
            self._store.put(f"{RECEIPTS}/{_PACK}{secrets.token_hex(8)}.json", pack.to_bytes())
            self._waiting = []


def is_single(key: str) -> bool:
    """Whether a key under `receipts/` is that of one shard's receipt."""
    return not key.rpartition("/")[2].startswith(_PACK)


def drop_packs(store: ObjectRoot) -> None:
    """Remove all packs: a shard that one of them vouches for is no longer what it was."""
    for key in store.list(RECEIPTS):
        if not is_single(key):
            store.delete(key)


def intact_receipts(store: ObjectRoot) -> dict[str, Receipt]:
    """Every receipt of a store that is what was written, by the key of its shard's object."""
    keys = list(store.list(RECEIPTS))
    found = {receipt.key: receipt for key in keys if not is_single(key) for receipt in _unpacked(store, key)}
    packed = {_receipt_key(key) for key in found}
    singles = [key for key in keys if is_single(key) and key not in packed]
    return found | {receipt.key: receipt for receipt in _read(store, singles) if receipt is not None}


def told_receipts(store: ObjectRoot) -> dict[str, Receipt]:
    """As `intact_receipts`, and those of earlier versions, which have no checksum, as they are."""
    keys = [key for key in store.list(RECEIPTS) if is_single(key)]
    found = intact_receipts(store)
    known = {_receipt_key(key) for key in found}
    for key in keys:
        if key not in known:
            with contextlib.suppress(ObjectMissing, DamagedError, RefusedError):
                receipt = Receipt.from_bytes(store.document(key), store.path_of(key))
                if receipt.checksum is None:
                    found[receipt.key] = receipt
    return found


def receipt_of(store: ObjectRoot, creation: str, shard: Shard) -> Receipt | None:
    """The shard's own receipt; None if there is none, or none that can be believed."""
    receipt = intact_receipt(store, shard.receipt_key)
    return receipt if is_receipt_of(receipt, creation, shard) else None


def intact_receipt(store: ObjectRoot, key: str) -> Receipt | None:
    """A receipt that is what was written; None for any other, one of before checksums included."""
    try:
        receipt = Receipt.from_bytes(store.document(key), store.path_of(key))
    except (ObjectMissing, DamagedError, RefusedError):
        return None
    return receipt if receipt.is_intact else None


def is_receipt_of(receipt: Receipt | None, creation: str, shard: Shard) -> TypeGuard[Receipt]:
    """Whether it is of this shard, and of this way to compute it: the sha256 of the creation document."""
    if receipt is None:
        return False
    told = (receipt.key, receipt.rows, receipt.finite, receipt.creation)
    return told == (shard.key, shard.rows, True, creation)


def put_receipt(store: ObjectRoot, creation: str, shard: Shard, receipt: Receipt) -> Receipt:
    """Publish a receipt; another writer's of the same bytes, if it is there already."""
    if store.put_new(shard.receipt_key, receipt.to_bytes()):
        return receipt
    there = receipt_of(store, creation, shard)
    if there is not None and there.sha256 == receipt.sha256:
        return there
    # What lies there is damaged, or vouches for other bytes than those that are in place now.
    store.put(shard.receipt_key, receipt.to_bytes())
    return receipt


def _read(store: ObjectRoot, keys: Iterable[str]) -> Iterator[Receipt | None]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(lambda key: intact_receipt(store, key), keys)


def _unpacked(store: ObjectRoot, key: str) -> list[Receipt]:
    """The receipts of a pack; none where it is damaged, since the single ones are there as well."""
    try:
        pack = Pack.from_bytes(store.document(key), store.path_of(key))
    except (ObjectMissing, DamagedError, RefusedError):
        return []
    return [receipt for receipt in pack.receipts if receipt.is_intact]


def _receipt_key(key: str) -> str:
    """The key of the receipt of a shard's object, `logits/c/<view>/<index>/0`."""
    _, _, view, index, _ = key.split("/")
    return f"{RECEIPTS}/{view}-{index}.json"
