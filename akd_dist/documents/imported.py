"""What `stores import` prints: what the logits are, and the stores that they are now."""

from typing import Any

from akd_dist.documents.base import Correlation, Count, Document, StoredSplit
from akd_dist.recipe import LogitKind, Split


class ImportedSplit(StoredSplit):
    """The store of one split."""

    store: str
    """Path or URI of the store's `<id>` folder; of a dry run, where it would lie."""
    bytes: Count
    """Size of all shards, as far as they are there."""
    shards_written: Count
    """How many of them this command wrote."""
    repaired: list[str]
    """Keys of shards that were damaged, and are what was sealed again."""
    agreement: Correlation
    """Share of the rows whose first class is the label, in the first view; Pearson's correlation for regression."""


class ImportedDocument(Document):
    """What `akd-dist stores import --json` prints."""

    dry_run: bool
    """Whether nothing was stored."""
    logits: str
    """The file that was read."""
    shape: list[Count]
    """Its shape as it is written."""
    dtype: str
    """Its dtype as it is written."""
    kind: LogitKind
    """What the rows are."""
    joined_by: str
    """How rows were found: by their order, or by a key."""
    rows: dict[Split, Count]
    """How many rows each split of the recipe has."""
    splits: dict[Split, ImportedSplit]
    """The stores, by split."""
    left_out: dict[Split, str]
    """Splits that the file has no logits of, and why."""
    warnings: list[str]
    """What a user should know of the logits, a line each."""
    teacher: dict[str, Any]
    """What the recipe's `teacher` has to say to use them."""
    seconds: float
    """Wall-clock time of the command."""
