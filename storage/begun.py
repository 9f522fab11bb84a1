"""A store that was begun: where it lies and what was settled then; whoever goes on with it does so in the same way."""

import functools
from dataclasses import dataclass
from typing import Any

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.arrays import metadata
from akd_dist.storage.identity import Creation, Identity, differences
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, SOURCE_KEY, StoreLayout
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.publishing import get_whatever, put_same, set_aside
from akd_dist.storage.receipts import intact_receipts
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
    put_metadata(store, creation.identity)
    if hint is not None:
        store.put(SOURCE_KEY, canonical_json(hint))
    return writer


def _check_same_creation(store: ObjectRoot, creation: Creation) -> None:
    """Refuse to go on with a store that was begun in another way.

    Where the receipts say that it was begun in this very way, it is the document that was damaged: it is put back.
    """
    data, ours = get_whatever(store, CREATION_KEY), creation.to_bytes()
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


def put_metadata(store: ObjectRoot, identity: Identity) -> dict[str, str]:
    """Publish the Zarr metadata files, or find them as they should be; their sha256 by key."""
    files = metadata(identity)
    for key, data in files.items():
        put_same(store, f"{ARRAYS}/{key}", data)
    return {key: sha256(data) for key, data in files.items()}
