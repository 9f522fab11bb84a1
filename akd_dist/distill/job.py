"""The job of a cohort, where its files lie, and what the driver reads of them while it trains and afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from akd_dist import recipe
from akd_dist.base.files import append
from akd_dist.documents import damage
from akd_dist.documents.status import CohortProgress
from akd_dist.storage.mean import StoreRef, Stores
from akd_dist.storage.rows import SealedRows
from akd_dist.storage.run_copy import scratch
from akd_dist.tracking.status import read_document

# A worker lives on for up to half a minute after its driver or raylet was killed (measured). It gets this long to see
# its stop file, checkpoint and leave. One that is still there afterwards is shut out: no more than the steps since its
# last checkpoint are lost.
ZOMBIE_SECONDS = 20.0


@dataclass(frozen=True)
class CohortJob:
    """What a worker needs to train a cohort: small, picklable, every path absolute."""

    name: str
    """Names the cohort in its progress file and log."""
    data: recipe.DataSpec
    """The dataset; prepared on the worker's node if it is not there yet."""
    fingerprints: dict[str, str]
    """The dataset fingerprint of each split as the driver saw it."""
    students: tuple[recipe.StudentSpec, ...]
    """The students: of the same batches, number of workers and threads. They and `data` name the code of the user's own
    that may be imported."""
    root: str
    """The folder of student folders."""
    logs: str
    """The folder of logs, one a student."""
    cache_root: str
    """Prepared data and decoded stores of this node."""
    stores: Stores
    """The store of each split, of the model that they learn from; empty where no student has a teacher."""
    control: str
    """The folder of progress files and of the stop file of this attempt."""
    teacher_test: StoreRef | None = None
    """The store of the teacher's logits of the test rows, for agreement; None takes the one in `stores`, an empty one
    stands for a teacher without. Students that learn from an assistant are compared with the teacher, too."""
    attempt: int = 1
    """Which attempt of the run this is."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints; 0 writes one at the end of every epoch and nowhere else."""
    device: str = "cpu"
    """Where the students compute: `cpu`, or `cuda` for this worker's GPU."""
    rows: SealedRows | None = None
    """Where the rows lie for every node; None where each prepares them."""
    patience: float = ZOMBIE_SECONDS
    """How long to wait for workers of earlier attempts, in seconds."""
    run_uri: str | None = None
    """The run, where it lies in object storage; root, logs and control are then folders of whoever has the job."""
    stages: str | None = None
    """The store root under which stages I are left for others, and found; None shares none but within the cohort."""

    def on_node(self) -> Self:
        """The job of a worker: where the run lies in object storage, with folders in the cache of its node."""
        if self.run_uri is None:
            return self
        place = scratch(self.cache_root, self.run_uri, "worker")
        return replace(self, root=str(place / "students"), logs=str(place / "logs"), control=str(place / "control"))

    pauses: Mapping[str, int] = field(default_factory=dict)
    """After how many epochs students checkpoint and wait for another command, by name; who is not here goes on to its
    end."""
    stacks: Mapping[str, int] = field(default_factory=dict)
    """Whose steps are taken in stacks, by name, and how many students at most in one; who is not here steps alone."""
    epochs_behind: int = 0
    """Epochs of trials that went no further, and are not among the students."""
    epochs_later: int = 0
    """Epochs that trials of a search are to train after these pauses, all of them together."""
    reads_test: bool = True
    """Whether students that are done are measured on the test rows; those of a search are not."""

    @property
    def run_name(self) -> str:
        """The last part of the run's folder or URI."""
        return Path(self.root).parent.name if self.run_uri is None else self.run_uri.rstrip("/").rpartition("/")[2]

    @property
    def attempt_file(self) -> Path:
        """Exists once this attempt has begun: the next command is another attempt."""
        return Path(self.control) / f"attempt-{self.attempt}"

    @property
    def stop_file(self) -> Path:
        """While this file exists, the attempt's cohorts checkpoint and return."""
        return Path(self.control) / f"stop-{self.attempt}"

    @property
    def renewed_file(self) -> Path:
        """A line for each time that something which was prepared or decoded had to be made anew."""
        return Path(self.control) / "renewed.txt"

    def tell_renewed(self, text: str) -> None:
        """Note in a line that something which was prepared or decoded is made anew; see `telling_damage`."""
        append(self.renewed_file, f"{self.name}: {text}\n")

    def log_of(self, student: str, rank: int = 0) -> Path:
        """The log of a student, by name. Rank 0 has the one that people read, each other rank one of its own."""
        return Path(self.logs) / (f"{student}.log" if rank == 0 else f"{student}.rank{rank}.log")

    @property
    def progress_file(self) -> Path:
        """The cohort's latest progress document."""
        return Path(self.control) / f"progress-{self.name}.json"


def stop_attempts(control: Path, last: int) -> None:
    """Tell the workers of earlier attempts to leave: a zombie of a dead driver sees its stop file."""
    for attempt in range(1, last + 1):
        (control / f"stop-{attempt}").touch()


def ended(job: CohortJob, spec: recipe.StudentSpec) -> bool:
    """Whether a student needs no more training in this attempt.

    One that failed is tried again by the next attempt, since its reason may be gone by then.
    """
    result = read_result(job, spec)
    if result is None:
        return False
    return result["state"] in ("done", "diverged") or result.get("attempt") == job.attempt


def read_result(job: CohortJob, spec: recipe.StudentSpec) -> dict[str, Any] | None:
    """The fleet.json entry that a student left when it ended, None if it has not ended.

    Raises:
        DamagedError: as `damage.read_result`.
    """
    found = damage.read_result(Path(job.root) / spec.name)
    return None if found is None else found.plain()


def forget_failures(job: CohortJob) -> None:
    """Let models that failed be tried again, although the attempt is the same: their reason may be gone."""
    for spec in job.students:
        if (result := read_result(job, spec)) is not None and result["state"] == "failed":
            (Path(job.root) / spec.name / "result.json").unlink()


def renewals(job: CohortJob) -> list[str]:
    """What cohorts noted of what was corrupt on their nodes, a line each, oldest first."""
    return job.renewed_file.read_text().splitlines() if job.renewed_file.exists() else []


def read_progress(job: CohortJob) -> CohortProgress | None:
    """The latest progress document of a cohort; None before its first."""
    return read_document(job.progress_file, CohortProgress)
