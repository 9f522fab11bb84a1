"""What `tune` prints, and what its run keeps in tune.json."""

from typing import Any

from akd_dist.documents.base import Count, Document, FolderName, Place
from akd_dist.documents.plan import FleetPlanDocument
from akd_dist.documents.report import Estimate
from akd_dist.recipe import Metric


class TunedTrial(Document):
    """Values that were tried."""

    number: Count
    """From 0, in the order in which they were drawn."""
    values: dict[str, Any]
    """By the dotted keys of the search."""
    students: list[FolderName]
    """Its students under students/, one for each seed."""
    epochs: Count
    """Epochs of one of them, over all stages, if it goes to its end."""
    rungs: list[Count]
    """After which of them it is compared; the last is its end."""
    scores: list[float]
    """At each rung that it came to, the best validation metric until then, as the mean over seeds."""
    lost: str | None
    """Why it went no further, where that was not for its score: a student diverged or failed."""


class TunedSeed(Document):
    """A student of the best trial."""

    seed: int
    """Its seed."""
    student: FolderName
    """Its folder under students/."""
    validation: float
    """The primary metric on the validation rows."""
    test: float
    """The primary metric on the test rows, which are read once, of the best trial alone."""


class TunedSearch(Document):
    """A search, and what came of it."""

    name: str
    """What the names of its students begin with."""
    reduction: Count
    """At each rung, one of so many trials goes on; more, where several are equal."""
    trials: list[TunedTrial]
    """In the order in which they were drawn."""
    best: Count | None
    """The number of the best trial; null before the end, and where all were lost."""
    validation: float | None
    """Its primary metric on the validation rows, the mean over seeds; it was chosen by it, so it is too good."""
    seeds: list[TunedSeed]
    """Its students, measured on the test rows."""
    test: Estimate | None
    """Its primary metric on the test rows."""
    block: str
    """The block of students that a recipe takes for it, as YAML; empty where there is none."""


class TuneDocument(Document):
    """What `akd-dist tune --json` prints."""

    run: Place
    """The run's folder."""
    metric: Metric
    """The primary metric, by which trials are compared."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
    searches: list[TunedSearch]
    """The searches of the recipe, in its order."""
    epochs: Count
    """Epochs that the search trains, at most: those of a stage I that trials share count for each."""
    epochs_of_all: Count
    """What training every trial to its end would take."""
    left_out: Count
    """Students of blocks without a search."""
    dry_run: bool = False
    """Whether nothing was computed."""
    first: FleetPlanDocument | None = None
    """Of a dry run, how the first rung would be trained."""
