"""What `train-students --dry-run` prints."""

from typing import Literal

from akd_dist.documents.base import Count, Document
from akd_dist.documents.check import TeacherCheck
from akd_dist.documents.fleet import RefusedStudent, Stacking


class PlannedStudent(Document):
    """A student, and what is before it."""

    name: str
    """Its folder under students/."""
    model: str
    """Label of its architecture."""
    objective: str
    """Kind of its objective."""
    parameters: Count
    """Number of its weights."""
    standing: Literal["new", "resumes", "ended"]
    """Whether it starts, resumes from a checkpoint, or has ended already."""
    rides: str | None
    """Whose stage I it goes on from; `stages/<id>`, where it was trained before and lies under the store root; null if
    it computes its own."""
    steps: Count
    """Steps that it still computes."""
    seconds: float | None
    """What it adds to its cohort; null if its probe failed."""


class PlannedCohort(Document):
    """Students that train in lockstep, and what that takes."""

    students: list[PlannedStudent]
    """Who they are."""
    why: str
    """What they share."""
    waits: str | None
    """What it waits for; null if it starts at once."""
    workers: Count
    """Data-parallel workers."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    memory: Count
    """Bytes of main memory of each worker, as estimated; memory maps that the whole node shares are not in it."""
    steps: Count
    """Steps of the stream."""
    bytes_streamed: Count
    """Inputs, labels and logits that the stream reads, once for all students."""
    begins: float
    """Seconds from the first start."""
    ends: float
    """Seconds from the first start."""


class RemovedRun(Document):
    """What `--fresh` would remove."""

    students: Count
    """Students of it that are done."""
    bytes: Count
    """What lies in the run's folder."""


class FleetPlanDocument(Document):
    """What `akd-dist train-students --dry-run --json` prints."""

    dry_run: Literal[True]
    """Nothing was computed."""
    run: str
    """The run's folder."""
    store_root: str
    """Where stores lie."""
    removes: RemovedRun | None
    """What `--fresh` would remove before training begins; null without it, or where no run is."""
    device: str
    """Where it would compute."""
    teacher: str
    """What has to be done before students can start."""
    teacher_checks: list[TeacherCheck] = []
    """What the teacher says of labelled rows, or each member of an ensemble; nothing of those that the recipe trains.
    """
    cache_bytes: Count
    """Logits that are still to be computed."""
    nodes: Count
    """Nodes of the cluster."""
    cpus: float
    """Their CPUs."""
    gpus: float
    """Their GPUs."""
    memory: Count | None
    """Main memory that they give to workers, in bytes; null where it is not known."""
    waits_for: str | None = None
    """The room that the command would wait for, on nodes that are not there yet; null where what is there will do."""
    window: Count | None = None
    """Rows of a window of the shuffle; null where all rows are shuffled together."""
    shuffle: str = ""
    """Why: chosen from what a node's cache may hold, unless the recipe says so or the run has begun."""
    why: str
    """Why there are so many cohorts: what fewer and what more of them would come to."""
    executor: Literal["ray", "processes"] = "ray"
    """What cohorts run on: Ray, or processes of this machine, where training ends before Ray would be worth its start.
    """
    cohorts: list[PlannedCohort]
    """In the order in which they queue."""
    ended: list[PlannedStudent]
    """Students that need no more training."""
    stacking: list[Stacking] = []
    """How the steps of each architecture are taken."""
    taken_out: list[str] = []
    """Students of the run that the recipe has no more: they would stay on disk, and be left out of its tables."""
    refused: list[RefusedStudent] = []
    """Students of the recipe that the run has otherwise: they would be left as they are, and out of its tables."""
    renamed: dict[str, str] = {}
    """What the recipe calls students that the run has by another name -> that name."""
    checkpoint_bytes: Count
    """The most that lies there of checkpoints at a time."""
    model_bytes: Count
    """What is delivered."""
    free_bytes: Count
    """Free under the run root."""
    seconds: float
    """From the first start to the end of the last cohort; without the teacher and its caching."""
