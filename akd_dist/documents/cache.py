"""What `cache-teacher` prints: the stores that there are now, and what `--dry-run` foresees."""

from typing import Literal

from akd_dist.documents.base import Count, Document, StoredSplit
from akd_dist.documents.check import TeacherCheck
from akd_dist.recipe import Split


class CachedSplit(StoredSplit):
    """One sealed store of logits."""

    views: Count
    """Augmented views of each row; at least as many as the recipe asks for."""
    shards_computed: Count
    """How many of them this command computed."""
    unlabelled: Count = 0
    """How many of the rows have no label."""
    targets: Count | None = None
    """How many targets the rows have, where a row has several."""


class CachedSplits(Document):
    """The stores of the rows that nobody trains on."""

    validation: CachedSplit | None
    """The validation rows, one view, not augmented; null where the teacher is a store, and there is none of these."""
    test: CachedSplit | None
    """The test rows, likewise."""


class CachedAssistant(CachedSplit):
    """An assistant, and the stores of its logits: the train store, and those of the other splits."""

    model: str
    """Label of its architecture."""
    path: str
    """Its model folder."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    splits: CachedSplits
    """The same for the validation and test rows."""


class CachedMember(CachedSplit):
    """One teacher of an ensemble, and the stores of its logits."""

    name: str
    """As messages call it."""
    share: float
    """How much it counts; together 1."""
    splits: CachedSplits
    """The same for the validation and test rows."""


class CacheDocument(CachedSplit):
    """What `akd-dist cache-teacher --json` prints: the train store, and those of the other splits; of an ensemble those
    of its first member."""

    hit: bool
    """Whether all stores were there already, those of the assistants too."""
    seconds: float
    """Wall-clock time of the command."""
    splits: CachedSplits
    """The same for the validation and test rows."""
    members: list[CachedMember] = []
    """Each teacher of an ensemble; empty for a teacher alone."""
    assistants: list[CachedAssistant] = []
    """The stores of the teacher's assistants, from the one below the teacher to the last."""


class PlannedSplit(Document):
    """What one store would take."""

    rows: Count
    """Rows of the split."""
    views: Count
    """Augmented views of each row."""
    hit: bool
    """Whether a store is there that serves it, so that nothing is to be computed."""
    shards: Count
    """Number of shards to compute."""
    bytes: Count
    """Size of these shards."""
    unlabelled: Count = 0
    """How many of the rows have no label."""
    targets: Count | None = None
    """How many targets the rows have, where a row has several."""


PlannedSplits = dict[Split, PlannedSplit]
"""What each split would take."""


class PlannedAssistant(Document):
    """What an assistant and its stores would take."""

    model: str
    """Label of its architecture."""
    trained: bool
    """Whether it is there, so that it need not be trained."""
    splits: PlannedSplits
    """What each split would take."""


class PlanDocument(Document):
    """What `akd-dist cache-teacher --dry-run --json` prints."""

    dry_run: Literal[True]
    """Nothing was computed."""
    store_root: str
    """Where the stores would lie."""
    bytes: Count
    """Size of all that is to be computed."""
    free: Count | None
    """Bytes free there; null for object storage."""
    splits: PlannedSplits
    """What each split would take; of an ensemble, all members together."""
    members: list[PlannedSplits] = []
    """The same for each member of an ensemble; empty for a teacher alone."""
    assistants: list[PlannedAssistant] = []
    """The same for the teacher's assistants."""
    teacher_checks: list[TeacherCheck] = []
    """What the teacher says of labelled rows, or each member of an ensemble; nothing of those that the recipe trains.
    """
    waits_for: str | None = None
    """The room that the command would wait for, on nodes that are not there yet; null where what is there will do."""
