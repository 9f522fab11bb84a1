"""Receipts of what is being written: one a shard or block, and packs of them, so that sealing asks for few objects.

A pack only repeats what the single receipts say. It may be missing or be removed at any time.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeGuard, TypeVar

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.storage.layout import RECEIPTS, Shard
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.records import Document, Receipt, Told

PER_PACK = 256
"""Receipts that a pack takes: with one put and one get for so many, sealing costs next to no requests a shard."""
_PACK = "packed-"
# Object storage answers many requests at once, and each takes some 30 ms.
_AT_ONCE = 32


R = TypeVar("R", bound=Told)


class Pack(Document, Generic[R]):
    """Several receipts in one object."""

    receipts: list[R]


class Packer(Generic[R]):
    """Packs receipts as they come in. For object storage only: reading a small file costs nothing.

    Args:
        kind: of the receipts.
        always: whether to pack in a folder as well.
    """

    def __init__(self, store: ObjectRoot, kind: type[R], *, always: bool = False) -> None:
        self._store, self._kind, self._waiting = store, kind, list[R]()
        self._packs = always or store.local_path("") is None

    def add(self, receipt: R) -> None:
        """Take a receipt that its writer has put."""
        if self._packs:
            self._waiting.append(receipt)
            if len(self._waiting) >= PER_PACK:
                self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting:
            pack = _pack(self._kind)(receipts=self._waiting)
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
    return {receipt.key: receipt for receipt in receipts_by_key(store, Receipt).values()}


def receipts_by_key(store: ObjectRoot, kind: type[R]) -> dict[str, R]:
    """Every receipt under a root that is what was written, by its own key."""
    keys = list(store.list(RECEIPTS))
    found = {one.receipt_key: one for key in keys if not is_single(key) for one in _unpacked(store, key, kind)}
    singles = [key for key in keys if is_single(key) and key not in found]
    return found | {one.receipt_key: one for one in _read(store, singles, kind) if one is not None}


def told_receipts(store: ObjectRoot) -> dict[str, Receipt]:
    """As `intact_receipts`, and those of earlier versions, which have no checksum, as they are."""
    keys = [key for key in store.list(RECEIPTS) if is_single(key)]
    found = intact_receipts(store)
    known = {receipt.receipt_key for receipt in found.values()}
    for key in keys:
        if key not in known:
            with contextlib.suppress(ObjectMissing, DamagedError, RefusedError):
                receipt = Receipt.from_bytes(store.document(key), store.path_of(key))
                if receipt.checksum is None:
                    found[receipt.key] = receipt
    return found


def receipt_of(store: ObjectRoot, creation: str, shard: Shard) -> Receipt | None:
    """The shard's own receipt; None if there is none, or none that can be believed."""
    receipt = intact_receipt(store, shard.receipt_key, Receipt)
    return receipt if is_receipt_of(receipt, creation, shard) else None


def intact_receipt(store: ObjectRoot, key: str, kind: type[R]) -> R | None:
    """A receipt that is what was written; None for any other, one of before checksums included."""
    try:
        receipt = kind.from_bytes(store.document(key), store.path_of(key))
    except (ObjectMissing, DamagedError, RefusedError):
        return None
    return receipt if receipt.is_intact else None


def is_receipt_of(receipt: Receipt | None, creation: str, shard: Shard) -> TypeGuard[Receipt]:
    """Whether it is of this shard, and of this way to compute it: the sha256 of the creation document."""
    if receipt is None:
        return False
    told = (receipt.key, receipt.rows, receipt.finite, receipt.creation)
    return told == (shard.key, shard.rows, True, creation)


def put_receipt(store: ObjectRoot, receipt: R) -> R:
    """Publish a receipt; another writer's of the same bytes, if it is there already."""
    key = receipt.receipt_key
    if store.put_new(key, receipt.to_bytes()):
        return receipt
    there = intact_receipt(store, key, type(receipt))
    if there is not None and _vouches(there) == _vouches(receipt):
        return there
    # What lies there is damaged, or vouches for other bytes than those that are in place now.
    store.put(key, receipt.to_bytes())
    return receipt


def _vouches(receipt: Told) -> tuple[str, str, int, str | None]:
    """For what, and for which way to compute it."""
    return receipt.key, receipt.sha256, receipt.rows, receipt.creation


def _pack(kind: type[R]) -> type[Pack[R]]:
    return Pack[kind]  # type: ignore[valid-type]


def _read(store: ObjectRoot, keys: Iterable[str], kind: type[R]) -> Iterator[R | None]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(lambda key: intact_receipt(store, key, kind), keys)


def _unpacked(store: ObjectRoot, key: str, kind: type[R]) -> list[R]:
    """The receipts of a pack; none where it is damaged, since the single ones are there as well."""
    try:
        pack = _pack(kind).from_bytes(store.document(key), store.path_of(key))
    except (ObjectMissing, DamagedError, RefusedError):
        return []
    return [receipt for receipt in pack.receipts if receipt.is_intact]
