"""What workers tell while they train, and what `status` prints of it."""

from typing import Literal, Self

from pydantic import model_validator

from akd_dist.documents.base import Count, Document, FolderName, Moment, Told
from akd_dist.recipe import Metric


class StudentProgress(Document):
    """How far a student is."""

    name: FolderName
    """Its folder under students/."""
    state: Literal["waiting", "training", "stopped", "done", "diverged", "failed"]
    """`waiting`: it has taken no step yet; `stopped`: it has, and the next command goes on from its checkpoint."""
    waits_for: str | None = None
    """Another student that it waits for, or what else it waits for; null where that is only its turn."""
    stage: str | None = None
    """The stage that it is in, or ended in; null before its first."""
    epoch: Count = 0
    """Epochs behind it, over all stages."""
    epochs: Count
    """Epochs of all its stages."""
    until: Count | None = None
    """Epochs after which it waits for the next rung of a search; null where it goes on to its end."""
    epochs_shared: Count = 0
    """Those that another student computes for it: of a stage I that they share."""
    temperature: int | None = None
    """The temperature of its epoch; null where nothing is annealed."""
    loss: float | None = None
    """Mean train loss of the epoch so far; of the epoch before at the start of one."""
    validation: float | None = None
    """The primary metric on the validation rows after its latest epoch; of the delivered weights once it is done."""
    steps: Count = 0
    """Steps behind it; where it diverged or failed, those until then."""
    steps_total: Count
    """Steps that are planned for it: of all epochs that it computes itself, or of those before it waits."""
    rows_per_second: float = 0.0
    """Train rows that it has learned from per second, lately."""
    steps_per_second: float = 0.0
    """Steps per second, lately."""
    seconds_left: float | None = None
    """Seconds to its end at that pace; null while nothing is known of it."""
    reason: Told | None = None
    """Why it did not succeed."""

    @model_validator(mode="after")
    def _shares_what_it_has(self) -> Self:
        if self.epochs_shared > self.epochs:
            raise ValueError(f"epochs_shared: {self.epochs_shared} of {self.epochs} epochs")
        return self


class CohortProgress(Document):
    """What the worker of a cohort leaves in control/ every half second."""

    training: bool
    """Whether any of its students has steps left to take."""
    at: Moment
    """When it was written, in seconds since 1970."""
    students: list[StudentProgress]
    """Every student of the cohort that had not ended before."""


class CohortStatus(Document):
    """A cohort that does not train yet."""

    state: Literal["waiting", "starting"]
    """`starting`: its workers are, and have taken no step."""
    students: list[str]
    """Who will train in it."""
    waits_for: str | None = None
    """The room that it waits for."""


class FleetPlan(Document):
    """What the driver leaves in control/ while it trains: what there is to do, and what has not begun."""

    attempt: Count
    """Which attempt of the run this is: progress of others does not count."""
    at: Moment
    """When it was written, in seconds since 1970."""
    metric: Metric
    """The primary metric."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
    students: list[StudentProgress]
    """Every student of the recipe in its order, as if none had begun."""
    cohorts: list[CohortStatus]
    """The cohorts that do not train yet."""
    steps_behind: Count = 0
    """Steps of trials of a search that went no further, where they are not among the students."""
    steps_later: Count = 0
    """Steps of the later rungs of a search, whichever of its trials take them."""


class RunDriver(Document):
    """The process that holds a run, or that was the last to."""

    host: str
    """Its machine."""
    pid: int
    """Its process id there."""
    birth: str | None
    """What tells it from a later process of that id, where the system says so."""
    since: Moment
    """When it took the run, in seconds since 1970."""
    command: str
    """What was typed."""
    folder: str
    """Where it was typed."""
    ended: Moment | None = None
    """When it let go of the run; null while it holds it, and if it was killed."""


class StatusDocument(Document):
    """What `akd-dist status --json` prints."""

    run: str
    """The run's folder."""
    state: Literal["preparing", "training", "stopped", "done"]
    """`preparing`: it is held, and no student trains yet; `stopped`: nobody works on it, and it is not done."""
    driver: RunDriver | None
    """Who holds it, or was the last to; null where nothing says so."""
    alive: bool | None
    """Whether that process holds it now; null where that cannot be seen from here."""
    at: float | None
    """The last sign of life, in seconds since 1970; null without one."""
    metric: str | None
    """The primary metric; null before the first training."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
    steps: Count
    """Steps behind all students."""
    steps_total: Count
    """Steps that are planned for all students, from the first one on; of a search, those of all its rungs."""
    steps_per_second: float
    """Steps per second, lately, over all students."""
    rows_per_second: float
    """Train rows per second, lately, over all students."""
    seconds_left: float | None
    """Seconds to the end at that pace; null while nothing is known of it."""
    over: Count
    """Students that have ended, however they did."""
    cohorts: list[CohortStatus]
    """The cohorts that do not train yet."""
    students: list[StudentProgress]
    """Every student, in the order of the recipe."""
    problems: list[str] = []
    """What could not be read of it, one line each; the rest is told without it."""
