"""The stores under a root: found by identity, listed, summed up.

A store that is damaged, foreign or not ours to read stands in nobody's way but of those who ask for that very store.
"""

import logging
import os
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from akd_dist.base.errors import AkdError, DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, parse_json
from akd_dist.base.places import STORE_ROOT, absolute
from akd_dist.storage.layout import ARRAYS, CREATION_KEY, FORMAT_VERSION, MANIFEST_KEY, RECEIPTS, SOURCE_KEY
from akd_dist.storage.manifest import Creation, Identity, Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.reader import LogitStore, read_manifest
from akd_dist.storage.receipts import is_single, told_receipts
from akd_dist.storage.records import Receipt
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import USES, Use, uses_of

T = TypeVar("T")
STORE_ID = re.compile(r"[0-9a-f]{64}")
_ID_BEGINS = re.compile(r"[0-9a-f]{1,64}")
Progress = Callable[[int, int], None]
# What is said of a folder with nothing in it. A removal leaves such a one for a moment, so `list_stores` passes over
# it.
_NOTHING = "has nothing in it"
log = logging.getLogger("akd_dist.storage")
# Stores of this format and later hold the same logits where the rest of their identity is the same.
_SAME_LOGITS_SINCE = 2


@dataclass(frozen=True)
class StoreSummary:
    """A store in a list."""

    id: str
    sealed: bool
    partials: int
    """Files in the making, their writers alive or dead."""
    modified: float
    """When it was sealed, or its last object written if it is not; seconds since 1970, by the storage's clock."""
    uses: list[Use]
    """Which runs used it on which days, the latest first."""
    rows: int = 0
    targets: int | None = None
    """Targets of all rows of a view, where a row has several."""
    views: int = 0
    classes: int = 0
    encoding: str = ""
    bytes: int = 0
    """Bytes of the shards that are there."""
    shards: int = 0
    shards_done: int = 0
    """Shards with a receipt."""
    teacher: str = ""
    """Fingerprint."""
    teacher_spec: dict[str, Any] = field(default_factory=dict)
    """The teacher in words."""
    imported: str | None = None
    """What logits are that were computed elsewhere, as `logits` or `log_probabilities`; None for those of a model."""
    dataset: str = ""
    """Fingerprint."""
    augmentation: dict[str, Any] = field(default_factory=dict)
    """Specification of what the views are drawn by."""
    hint: dict[str, Any] = field(default_factory=dict)
    """How it was asked for, as the recipe and the split, where that is known."""
    problem: str | None = None
    """Why the store cannot be read, if so; the numbers are zero then."""

    @property
    def last_used(self) -> float | None:
        """When a run last began to use it, in seconds since 1970; None if there is no record of any."""
        return self.uses[0].at if self.uses else None

    @property
    def runs(self) -> list[str]:
        """The runs that used it, each once, the latest first."""
        return list(dict.fromkeys(use.run for use in self.uses))


def find_store(root_uri: str, identity: Identity) -> LogitStore | None:
    """A sealed store that holds what `identity` describes: the same but for as many views or more; the fewest of these.

    One of format 2 serves as well: its logits are the same, and less is said of them.

    Raises:
        DamagedError: the very store is there, and is not what was sealed. One of more views is passed over, with a
            warning.
    """
    root = open_root(root_uri)
    # The very store first: its place is known, while others are found by reading every store's creation document.
    older = [identity.model_copy(update={"format": _SAME_LOGITS_SINCE})] if identity.format == FORMAT_VERSION else []
    for same in (identity, *older):
        if root.exists(f"{same.id}/{MANIFEST_KEY}"):
            return _open_as(root, same.id)
    # A store is decoded as a whole, so of those that serve the one with the fewest views takes least of the cache.
    wider = [
        found
        for found in _sealed_alike(root, identity, "views", "format")
        if found.views > identity.views and found.format >= _SAME_LOGITS_SINCE
    ]
    opened = (_unless_bad(_open_as, root, found.id) for found in sorted(wider, key=lambda found: found.views))
    return next((store for store in opened if store is not None), None)


def narrower_stores(root_uri: str, identity: Identity) -> list[Manifest]:
    """The seals of stores that hold some of what `identity` describes: the same but for fewer views; the most first.

    One that is damaged is passed over, with a warning.
    """
    root = open_root(root_uri)
    narrower = [found for found in _sealed_alike(root, identity, "views") if found.views < identity.views]
    seals = [_unless_bad(_manifest, root, found.id) for found in sorted(narrower, key=lambda found: -found.views)]
    return [seal for seal in seals if seal is not None]


def stores_of_other_rows(root_uri: str, identity: Identity, split: str) -> list[Creation]:
    """What sealed stores are that differ from `identity` in their dataset alone, and were made for the same split."""
    root = open_root(root_uri)
    seals = [
        _unless_bad(_manifest, root, found.id)
        for found in _sealed_alike(root, identity, "dataset", "rows", "items", "views")
        if found.dataset != identity.dataset and found.views >= identity.views and _split(root, found.id) == split
    ]
    return [seal.creation() for seal in seals if seal is not None]


def list_stores(root_uri: str) -> list[StoreSummary]:
    """Every store under a root, sealed or not; one that cannot be read is among them, with its problem."""
    root = open_root(root_uri)
    found = (_summary(root, store_id) for store_id in _ids(root))
    return [one for one in found if one.problem != _NOTHING]  # not the folders of one just removed


def summary_of(root_uri: str, store_id: str) -> StoreSummary:
    """One store as in a list."""
    return _summary(open_root(root_uri), store_id)


def hint_of(root_uri: str, store_id: str) -> dict[str, Any]:
    """How a store was asked for, as the recipe and the split; nothing where that is not known."""
    return _hint(open_root(root_uri), store_id)


def identity_of(root_uri: str, store_id: str) -> Identity | None:
    """What a store holds, as its creation document says; None where that is missing, damaged or another store's."""
    return _identity(open_root(root_uri), store_id)


def receipts_of(root_uri: str, store_id: str) -> list[Receipt]:
    """What the writers of a store's shards said of them; those that are gone or damaged are left out.

    Receipts of earlier versions have no checksum. They are told as they are: nothing but times depends on that here.
    """
    return list(told_receipts(open_root(root_uri).child(store_id)).values())


@dataclass(frozen=True)
class Spent:
    """What computing a store's shards took, as far as its receipts say."""

    seconds: float
    """Sum over the shards that were timed, of work in their tasks, not of wall-clock time."""
    rows: int
    """Rows of these shards, each view counted."""
    row_seconds: float | None
    """Seconds a row in the median shard, so that what is loaded once in a task does not weigh; None if none was timed.
    """
    hosts: tuple[str, ...]
    """Where they were computed, sorted."""


def time_spent(uri: str) -> Spent:
    """What computing a store took. Shards that were taken from another store, or found, do not count."""
    root = open_root(uri)
    timed = [receipt for receipt in receipts_of(root.parent.uri, root.name) if receipt.seconds > 0]
    return Spent(
        seconds=sum(receipt.seconds for receipt in timed),
        rows=sum(receipt.rows for receipt in timed),
        row_seconds=statistics.median(receipt.seconds / receipt.rows for receipt in timed) if timed else None,
        hosts=tuple(sorted({receipt.host for receipt in timed})),
    )


def wider_unsealed(root_uri: str, store_id: str) -> list[str]:
    """Ids of unsealed stores that differ from a store in having more views: such a one takes those that are there."""
    root = open_root(root_uri)
    if (identity := _identity(root, store_id)) is None:
        return []
    others = ((other, _identity(root, other)) for other in _ids(root) if other != store_id)
    return [
        other
        for other, found in others
        if found is not None
        and found.views > identity.views
        and found.model_copy(update={"views": identity.views}) == identity
        and not root.exists(f"{other}/{MANIFEST_KEY}")
    ]


def resolve_id(root_uri: str, prefix: str) -> str:
    """The whole id of the one store that begins with `prefix`.

    Raises:
        RefusedError: no store or several begin with it; names them.
    """
    ids = _ids(open_root(root_uri))
    found = [store_id for store_id in ids if prefix and store_id.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    raise RefusedError(
        f"{'several stores begin' if found else 'no store begins'} with {prefix!r} under {root_uri}",
        got=", ".join(store_id[:16] for store_id in found or ids) or "no stores at all",
        expected="the beginning of one store's id",
        next=f"akd-dist stores list --store-root {root_uri}",
    )


def locate(named: str | Path, root: str | Path | None = None) -> str:
    """The folder or URI of a store as somebody names it, absolute: by its place, or by the beginning of its id.

    Args:
        named: a folder or URI, at whose end the id may be shortened; or an id alone, shortened or not.
        root: where an id alone is looked for; None takes the default.

    Raises:
        RecipeError: as `places.check_uri`.
        RefusedError: as `resolve_id`.
    """
    text = os.fspath(named).rstrip("/")
    above, _, name = text.rpartition("/")
    if _ID_BEGINS.fullmatch(name) is None:
        return absolute(named)
    if not above and (root is not None or not Path(name).exists()):
        chosen = STORE_ROOT.chosen(root)
        return open_root(chosen).child(resolve_id(chosen, name)).uri
    place = absolute(text)
    if not above or STORE_ID.fullmatch(name) or open_root(place).exists(MANIFEST_KEY):
        return place
    return open_root(absolute(above)).child(resolve_id(absolute(above), name)).uri


def _ids(root: ObjectRoot) -> list[str]:
    return [name for name in root.folders() if STORE_ID.fullmatch(name)]


def _unless_bad(read: Callable[[ObjectRoot, str], T], root: ObjectRoot, store_id: str) -> T | None:
    """What is read of a store; None, with a warning, where it is damaged or cannot be read."""
    try:
        return read(root, store_id)
    except AkdError as error:
        warn(store_id, error)
        return None


def warn(name: str, error: AkdError) -> None:
    """Say that something is bad and nothing else waits for it."""
    log.warning("%s is passed over: %s%s", name[:12], error.line, f" ({error.next})" if error.next else "")


def creation_document(root: ObjectRoot, store_id: str) -> Creation:
    """What a store was begun as; ObjectMissing or AkdError where it does not say."""
    key = f"{store_id}/{CREATION_KEY}"
    return Creation.from_bytes(root.document(key), root.path_of(key))


def _identity(root: ObjectRoot, store_id: str) -> Identity | None:
    try:
        identity = creation_document(root, store_id).identity
    except (ObjectMissing, AkdError):  # somebody else's folder, or one that `list_stores` tells about
        return None
    return identity if identity.id == store_id else None


def _sealed_alike(root: ObjectRoot, identity: Identity, *but_for: str) -> Iterator[Identity]:
    """Identities of the sealed stores that are as this one, whatever these fields are."""
    same = {field: getattr(identity, field) for field in but_for}
    for store_id in _ids(root):
        found = _identity(root, store_id)
        # The fields that may differ are taken from the one that is asked for: what is left must be equal.
        if found is None or found.model_copy(update=same) != identity:
            continue
        # Asked last, and only of stores that are alike: in object storage this is one more request for each.
        if root.exists(f"{store_id}/{MANIFEST_KEY}"):
            yield found


def _hint(root: ObjectRoot, store_id: str) -> dict[str, Any]:
    """How a store was asked for; nothing where there is no hint, or none of its shape."""
    try:
        hint = parse_json(root.document(f"{store_id}/{SOURCE_KEY}"))
        canonical_json(hint)  # which refuses what could not be shown either
    except (ObjectMissing, MachineError, ValueError, RecursionError):
        return {}
    if not isinstance(hint, dict) or not isinstance(hint.get("recipe", {}), dict):
        return {}
    if not isinstance(hint.get("recipe", {}).get("data", {}), dict):
        return {}
    return hint if isinstance(hint.get("split", ""), str) else {}


def _split(root: ObjectRoot, store_id: str) -> object:
    """The split that a store was made for, as its hint says; None where there is no such hint."""
    return _hint(root, store_id).get("split")


def _manifest(root: ObjectRoot, store_id: str) -> Manifest:
    uri = root.child(store_id).uri
    manifest = read_manifest(uri)
    if manifest.id != store_id:
        raise DamagedError(
            f"{uri}/{MANIFEST_KEY} is another store's", got=f"id {manifest.id}", expected=f"id {store_id}"
        )
    return manifest


def _open_as(root: ObjectRoot, store_id: str) -> LogitStore:
    store = LogitStore(root.child(store_id).uri, _manifest(root, store_id))
    store.check()
    return store


def _summary(root: ObjectRoot, store_id: str) -> StoreSummary:
    """A store in a list, whatever state it is in."""
    try:
        return _read_summary(root, store_id)
    except AkdError as error:
        return StoreSummary(id=store_id, sealed=False, partials=0, modified=0.0, uses=[], problem=error.line)


def _read_summary(root: ObjectRoot, store_id: str) -> StoreSummary:
    store = root.child(store_id)
    found = store.list()
    seal = found.get(MANIFEST_KEY)
    written = [stat.modified for key, stat in found.items() if not key.startswith(f"{USES}/")]
    bare = StoreSummary(
        id=store_id,
        sealed=seal is not None,
        partials=len(store.partials()),
        modified=max(written, default=0.0) if seal is None else seal.modified,
        uses=uses_of(store),
        hint=_hint(root, store_id),
    )
    try:
        creation = creation_document(root, store_id)
        identity, encoding, shards = creation.identity, creation.identity.encoded, creation.identity.layout.shard_count
    except ObjectMissing:
        return replace(bare, problem=f"has no {CREATION_KEY}" if found or bare.partials else _NOTHING)
    except AkdError as error:
        return replace(bare, problem=error.line)
    if identity.id != store_id:
        return replace(bare, problem=f"its {CREATION_KEY} is that of store {identity.id}")
    # The shards that are there are counted, instead of looking for each that should be: how many that are is told by a
    # document which may come from elsewhere, and may say a billion.
    there = [stat.size for key, stat in found.items() if key.startswith(f"{ARRAYS}/") and "/c/" in key]
    spec, imported = creation.teacher.get("spec"), creation.teacher.get("imported")
    return replace(
        bare,
        rows=identity.rows,
        targets=identity.items,
        views=identity.views,
        classes=identity.classes,
        encoding=str(encoding),
        bytes=sum(there),
        shards=shards,
        shards_done=sum(key.startswith(f"{RECEIPTS}/") and is_single(key) for key in found),
        teacher=identity.teacher,
        teacher_spec=spec if isinstance(spec, dict) else {},
        imported=str(imported.get("kind", "logits")) if isinstance(imported, dict) else None,
        dataset=identity.dataset,
        augmentation=identity.augmentation,
    )
