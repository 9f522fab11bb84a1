"""How an object of a store comes into its place: create-only, and whatever else lies there is looked at first."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from akd_dist.base.errors import DamagedError, MachineError
from akd_dist.base.files import sha256
from akd_dist.storage.layout import DAMAGED_SUFFIX, MANIFEST_KEY
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.receipts import drop_packs


def publish(
    store: ObjectRoot,
    key: str,
    data: bytes,
    *,
    vouched: Callable[[], str | None] = lambda: None,
    what: str = "",
    linked_to: str | None = None,
) -> bool:
    """Bring an object into place; False if another one is there, which some receipt vouches for.

    An object with other bytes and no receipt that vouches for them is a torn or foreign one: it is set aside.

    Args:
        vouched: the sha256 of the object that a receipt vouches for, if one does.
        what: names the object in messages; its key by default.
        linked_to: a key under the store's root that holds the same bytes, and may be linked.

    Raises:
        DamagedError: the store is sealed, and the object in its place is not what was sealed.
        MachineError: others come into its place again and again.
    """
    # Three times: what was found in the place may be set aside by another writer before it is read, or put there again.
    for _ in range(3):
        if linked_to is None:
            new = store.put_new(key, data)
        else:
            new = store.parent.link_new(linked_to, f"{store.name}/{key}", data)
        if new:
            return True
        try:
            found = store.get(key)
        except ObjectMissing:  # set aside by somebody else, or a folder
            found = b""
        if found == data:
            return True
        if vouched() == sha256(found):
            return False
        set_aside_unsealed(store, [key], what or key)
    raise MachineError(
        f"{store.path_of(key)} cannot be published",
        got="other bytes in its place, three times",
        expected="one writer's bytes",
        next="see who else writes this store",
    )


def put_same(store: ObjectRoot, key: str, data: bytes) -> None:
    """Publish, or find the very same bytes.

    Raises:
        DamagedError: others are in their place.
    """
    if not store.put_new(key, data) and (found := get_whatever(store, key)) != data:
        raise DamagedError(
            f"{store.path_of(key)} is not what this store's description makes it",
            got=f"sha256 {sha256(found)}" if found else "nothing, or no file",
            expected=f"sha256 {sha256(data)}",
            next=f"delete {store.uri} to compute it anew, or bring the file back from a copy",
        )


def get_whatever(store: ObjectRoot, key: str) -> bytes:
    """What is in the place of an object: nothing, if it is a folder or a pipe."""
    try:
        return store.document(key)
    except ObjectMissing:
        return b""


def set_aside_unsealed(store: ObjectRoot, keys: list[str], what: str) -> None:
    """Move objects that are no good to `<id>.damaged/`.

    Raises:
        DamagedError: the store is sealed: only a repair moves what is in it.
    """
    if store.exists(MANIFEST_KEY):
        raise DamagedError(
            f"{store.uri} is sealed, and {what} is not what was sealed",
            next=f"akd-dist stores repair {store.name} --store-root {store.parent.uri}",
        )
    drop_packs(store)
    for key in keys:
        set_aside(store, key)


def set_aside(store: ObjectRoot, key: str) -> bool:
    """Move an object of a store to `<id>.damaged/`, under a name of its own; False if there is none."""
    # A random part, since the same object may be set aside several times, and by two writers at once.
    aside = f"{store.name}{DAMAGED_SUFFIX}/{key.replace('/', '-')}.{secrets.token_hex(4)}"
    return store.parent.move(f"{store.name}/{key}", aside)
