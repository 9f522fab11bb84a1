"""What the `stores` commands print."""

from typing import Any

from akd_dist.documents.base import Count, Document
from akd_dist.recipe import LogitKind


class StoreUse(Document):
    """A run that used a store on some day."""

    run: str
    """Path of the run's folder, or of the folder of a model that was trained from the store."""
    host: str
    """Where its driver ran."""
    user: str | None
    """Whose it was; null where the user has no name."""
    time: str
    """When it began to use the store, the first time on that day: ISO 8601, UTC."""
    command: str
    """The command line."""
    lock: str | None
    """A file that the run holds locked while it lives."""


class StoreEntry(Document):
    """A store in a list."""

    id: str
    """The sha256 of its identity."""
    sealed: bool
    """Whether all of it is there."""
    problem: str | None
    """Why it cannot be read, if so; the numbers are zero then."""
    model: str | None
    """Label of its teacher's architecture; null where it does not say."""
    imported: LogitKind | None
    """What its logits are if they were computed elsewhere; null for those of a model."""
    teacher: str
    """Fingerprint of its teacher; of the logits themselves if they were computed elsewhere."""
    data: str | None
    """The dataset's source and the split, as the recipe had them; null where that is not known."""
    split: str | None
    """Which rows it was made for; null where that is not known."""
    dataset: str
    """Fingerprint of its rows."""
    rows: Count
    """Rows of the dataset."""
    targets: Count | None
    """Targets of these rows, where a row has several; null where each has one."""
    views: Count
    """Augmented views of each row."""
    augmentation: dict[str, Any]
    """What the views are drawn by."""
    classes: Count
    """Logits a row."""
    encoding: str
    """Precision of the stored logits."""
    bytes: Count
    """Size of the shards that are there."""
    shards: Count
    """Number of shards of the whole store."""
    shards_done: Count
    """How many of them are there, with a receipt."""
    partials: Count
    """Files in the making, their writers alive or dead."""
    modified: str
    """When it was sealed, or its last object written if it is not: ISO 8601, UTC, by the storage's clock."""
    runs: list[str]
    """The runs that used it, the latest first."""
    last_used: str | None
    """When a run last began to use it; null if there is no record of any."""
    uses: list[StoreUse]
    """The records of its use, one a run and day, the latest first."""


class StoresDocument(Document):
    """What `akd-dist stores list --json` prints."""

    store_root: str
    """Where the stores lie."""
    stores: list[StoreEntry]
    """Every store, those of one teacher together, the teacher used last first."""


class StoreReceipts(Document):
    """What the writers of a store's shards said, in short."""

    seconds: float
    """Time that the teacher took for its logits, over all shards that were computed for this store."""
    hosts: dict[str, Count]
    """How many shards each host wrote."""


class StoreDecoded(Document):
    """The decoded, memory-mapped copy of a store on this node."""

    bytes: Count
    """Bytes that it takes."""
    in_use: bool
    """Whether a process of this node has it mapped."""


class StoreDocument(StoreEntry):
    """What `akd-dist stores show --json` prints."""

    store: str
    """Path or URI of its folder."""
    receipts: StoreReceipts
    """What its shards took, and who wrote them."""
    decoded: StoreDecoded | None
    """Its decoded copy under the cache root; null if there is none."""
    manifest: dict[str, Any] | None
    """The seal; null for an unsealed store."""


class StoreDamage(Document):
    """A part of a store that is not what was sealed."""

    key: str
    """The object, relative to the store's folder."""
    problem: str
    """What is wrong with it."""


class VerifyDocument(Document):
    """What `akd-dist stores verify --json` prints, damaged or not."""

    id: str
    """The store's id."""
    damages: list[StoreDamage]
    """What is damaged; empty for a store that is what was sealed."""


class RepairDocument(Document):
    """What `akd-dist stores repair --json` prints."""

    id: str
    """The store's id."""
    repaired: list[str]
    """Keys of the shards that were computed again, relative to the store's arrays."""


class StoreRemoval(Document):
    """A store that `akd-dist stores gc` was asked for."""

    id: str
    """Its id."""
    bytes: Count
    """Size of its shards."""
    kept: str | None
    """Why it stays; null if it went, or would go."""


class StoreProblem(Document):
    """What could not be looked at; everything else was."""

    id: str
    """Its name under the store root."""
    problem: str
    """Why it could not."""


class GcDocument(Document):
    """What `akd-dist stores gc --json` prints."""

    dry_run: bool
    """Whether nothing was removed."""
    removed: list[str]
    """Keys of what interrupted runs had left."""
    stores: list[StoreRemoval]
    """Stores as old, or unused for as long, as was asked for."""
    problems: list[StoreProblem]
    """What could not be read or removed: damaged, or not this user's."""
