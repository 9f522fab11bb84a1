"""Arrays that a store has once for all shards: `offsets`, where a row has several targets, and the `dictionary`.

A table is written before the first shard, object by object and create-only, and then its receipt, `<name>.json`.
Nothing of it follows from the store's identity alone, so the manifest names the hash of each of its objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import failpoint, sha256
from akd_dist.storage.arrays import decode_table, table_objects
from akd_dist.storage.begun import StoreWriter
from akd_dist.storage.dictionary import DICTIONARY, Dictionary
from akd_dist.storage.identity import Identity
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, FIDELITY_KEY
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.publishing import publish
from akd_dist.storage.records import Json, ObjectRecord, Sha256, Signed, joined

OFFSETS = "offsets"
"""int64 [rows + 1]: row r has the targets from offsets[r] up to, not including, offsets[r + 1]."""
Table = Mapping[str, npt.NDArray[Any]]
"""Arrays by name."""


class TableReceipt(Signed):
    """What the writer of a table says of it: nothing of when or where, so that the seal can make it again."""

    name: str
    objects: list[ObjectRecord]
    """In the order that they were published in."""
    creation: Sha256
    """sha256 of the creation document that it was made under."""

    @property
    def sha256(self) -> str:
        """That of all its objects, which shards and the manifest name."""
        return joined(self.objects)


class Fidelity(Signed):
    """What was measured of how well the store describes its teacher, on its way into the seal."""

    card: Json
    creation: Sha256
    """sha256 of the creation document that it was measured under."""


def table_key(name: str) -> str:
    """Where the receipt of a table lies, relative to the store."""
    return f"{name}.json"


def put_offsets(writer: StoreWriter, offsets: npt.NDArray[np.int64]) -> None:
    """Publish which targets are whose, in a store whose rows have several: before the first shard; harmless to repeat.

    Args:
        offsets: int64 [rows + 1]: row r has the targets from offsets[r] up to, not including, offsets[r + 1].

    Raises:
        RefusedError: they are not those of this store's rows and targets.
    """
    put_table(writer, OFFSETS, {OFFSETS: offsets})


def find_dictionary(writer: StoreWriter) -> tuple[Dictionary, str] | None:
    """The dictionary that the store is written with, and its sha256; None where there is none, or it is damaged."""
    receipt = find_table(writer.store, writer.creation_sha256, DICTIONARY)
    if receipt is None:
        return None
    try:
        arrays = read_table(writer.store, DICTIONARY, receipt.objects)
    except DamagedError:
        return None
    return Dictionary.from_arrays(arrays), receipt.sha256


def put_dictionary(writer: StoreWriter, dictionary: Dictionary) -> str:
    """Publish what a `top_k` store's shards are described by: before the first of them; harmless to repeat.

    Another one that is there is set aside, and shards that were described by it count as missing.

    Returns:
        Its sha256, which `write_shard` takes.

    Raises:
        RefusedError: it is not one of this store's encoding and classes, or not finite.
        DamagedError: the store is sealed, with another one.
    """
    return put_table(writer, DICTIONARY, dictionary.arrays())


def put_table(writer: StoreWriter, name: str, arrays: Table) -> str:
    """Publish a table, then its receipt; its sha256. One that is there and differs is set aside."""
    identity, store = writer.creation.identity, writer.store
    if name not in identity.tables:
        raise RefusedError(f"{writer.uri} has no {name}", got=str(identity.encoded), expected="a store that needs one")
    check_table(identity, name, arrays)
    objects = table_objects(name, arrays)
    for key, data in objects.items():
        failpoint("table.before_object")
        publish(store, f"{ARRAYS}/{key}", data)
    receipt = receipt_of_table(name, ObjectRecord.of(objects), writer.creation_sha256)
    failpoint("table.before_receipt")
    publish(store, table_key(name), receipt.to_bytes())
    return receipt.sha256


def receipt_of_table(name: str, objects: list[ObjectRecord], creation: str) -> TableReceipt:
    """The receipt of a table with these objects."""
    return TableReceipt(name=name, objects=objects, creation=creation).signed()


def dictionary_sha256(writer: StoreWriter) -> str | None:
    """The sha256 of the dictionary, as its receipt says; None where there is none."""
    if not writer.creation.identity.is_top_k:
        return None
    receipt = find_table(writer.store, writer.creation_sha256, DICTIONARY)
    return None if receipt is None else receipt.sha256


def find_table(store: ObjectRoot, creation: str, name: str) -> TableReceipt | None:
    """The receipt of a table that was made under this creation document; None if there is none to be believed."""
    try:
        receipt = TableReceipt.from_bytes(store.document(table_key(name)), store.path_of(table_key(name)))
    except (ObjectMissing, DamagedError, RefusedError):
        return None
    return receipt if receipt.is_intact and (receipt.name, receipt.creation) == (name, creation) else None


def find_tables(writer: StoreWriter) -> dict[str, TableReceipt]:
    """The tables of a store that are whole: receipted, and every object what its receipt says."""
    found = {}
    for name in writer.creation.identity.tables:
        receipt = find_table(writer.store, writer.creation_sha256, name)
        with contextlib.suppress(DamagedError):
            if receipt is not None:
                read_table(writer.store, name, receipt.objects)
                found[name] = receipt
    return found


def read_table(store: ObjectRoot, name: str, objects: list[ObjectRecord]) -> Table:
    """The arrays of a table by name, known to be those whose objects are named.

    Raises:
        DamagedError: an object is missing or another one; names it.
    """
    found = {}
    for record in objects:
        found[record.key] = _get(store, record)
    try:
        return decode_table(name, found)
    except ValueError as error:
        raise damaged_table(store, name, error) from error


def check_table(identity: Identity, name: str, arrays: Table) -> None:
    """Refuse what is not a table of such a store.

    Raises:
        RefusedError: arrays are missing, of another shape or dtype, or do not say what they must.
    """
    if name == DICTIONARY:
        _dictionary_of(arrays).check(identity.top_k, identity.classes)
        return
    offsets = arrays.get(OFFSETS, np.zeros(0))
    right = offsets.dtype == np.int64 and offsets.shape == (identity.rows + 1,)
    if not (right and offsets[0] == 0 and offsets[-1] == identity.items and (np.diff(offsets) >= 0).all()):
        raise RefusedError(
            f"the offsets are not those of {identity.items} targets in {identity.rows} rows",
            got=f"{offsets.dtype} {list(offsets.shape)}, up to {offsets[-1] if len(offsets) else 'nothing'}",
            expected=f"int64 [{identity.rows + 1}], from 0 to {identity.items}, never falling",
        )


def _dictionary_of(arrays: Table) -> Dictionary:
    try:
        return Dictionary.from_arrays(arrays)
    except TypeError as error:
        raise RefusedError("these are not the arrays of a dictionary", got=", ".join(arrays)) from error


def put_fidelity(writer: StoreWriter, card: dict[str, Any]) -> None:
    """Keep what was measured of a store, as JSON, until `seal_store` takes it into the seal; what was kept before gives
    way."""
    failpoint("table.before_fidelity")
    writer.store.put(FIDELITY_KEY, fidelity_bytes(writer.creation_sha256, card))


def fidelity_bytes(creation: str, card: dict[str, Any]) -> bytes:
    """How it is kept."""
    return Fidelity(card=card, creation=creation).signed().to_bytes()


def find_fidelity(store: ObjectRoot, creation: str) -> dict[str, Any] | None:
    """What was measured of a store under this creation document; None where nothing was, or it is damaged."""
    try:
        found = Fidelity.from_bytes(store.document(FIDELITY_KEY), store.path_of(FIDELITY_KEY))
    except (ObjectMissing, DamagedError, RefusedError):
        return None
    return found.card if found.is_intact and found.creation == creation else None


def sealed_documents(manifest: Manifest) -> dict[str, bytes]:
    """The documents of a sealed store that its manifest repeats, by key: what they have to be."""
    creation = manifest.creation()
    found = {CREATION_KEY: creation.to_bytes()}
    for name, objects in (manifest.tables or {}).items():
        found[table_key(name)] = receipt_of_table(name, objects, creation.sha256).to_bytes()
    if manifest.fidelity is not None:
        found[FIDELITY_KEY] = fidelity_bytes(creation.sha256, manifest.fidelity)
    return found


def damaged_table(store: ObjectRoot, name: str, problem: object) -> AkdError:
    """The refusal that names a table and how to mend it."""
    return DamagedError(
        f"the {name} of {store.uri} is damaged",
        got=problem,
        expected="what was sealed",
        next=f"akd-dist stores repair {store.name} --store-root {store.parent.uri}",
    )


def _get(store: ObjectRoot, record: ObjectRecord) -> bytes:
    try:
        data = store.get(f"{ARRAYS}/{record.key}")
    except ObjectMissing:
        raise damaged_table(store, record.key, "is missing") from None
    if sha256(data) != record.sha256:
        raise damaged_table(store, record.key, f"sha256 {sha256(data)} instead of {record.sha256}")
    return data
