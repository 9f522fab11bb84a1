"""A cohort: students that share a stream, trained in lockstep, each batch read once for all of them.

`train_cohort` is what a Ray Train worker runs, and what a plain loop calls without Ray.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist import recipe
from akd_dist.base.errors import AkdError, CorruptCacheError, HeldError, MachineError, RefusedError
from akd_dist.base.fence import FencedWriter, take_over
from akd_dist.base.files import append, failpoint
from akd_dist.base.locks import file_lock
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.metrics import predictions
from akd_dist.distill.ranks import Ranks, told
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student, drop_doubtful, fail_from_outside, write_note
from akd_dist.documents import damage
from akd_dist.documents.status import CohortProgress, StudentProgress
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.storage.content import Content, Guard, renewing
from akd_dist.storage.node_cache import map_decoded
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.tracking.status import Pace, read_document, write_document

PROGRESS_SECONDS = 0.5
# A worker may live on for half a minute after its driver or raylet was killed (measured). So long it may take to see
# its stop file, checkpoint and leave; whoever is still there is shut out, and at most its last interval is lost.
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
    """Who trains: the same batches, one number of workers and threads for all. They and `data` carry whose code may run
    for them."""
    root: str
    """The folder of student folders."""
    logs: str
    """The folder of logs, one a student."""
    cache_root: str
    """Prepared data and decoded stores of this node."""
    stores: dict[str, str]
    """Store URI of each split, of the model that they learn from; empty where no student has a teacher."""
    control: str
    """The folder of progress files and of the stop file of this attempt."""
    teacher_test: str | None = None
    """Store URI of the teacher's logits of the test rows, for agreement; none takes that in `stores`. Students of an
    assistant are compared with the teacher as well."""
    attempt: int = 1
    """Which attempt of the run this is."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints; 0 writes one at the end of every epoch and nowhere else."""
    device: str = "cpu"
    """Where the students compute: `cpu`, or `cuda` for this worker's GPU."""
    patience: float = ZOMBIE_SECONDS
    """How long to wait for workers of earlier attempts, in seconds."""

    @property
    def attempt_file(self) -> Path:
        """What says that this attempt has begun: the next one is another."""
        return Path(self.control) / f"attempt-{self.attempt}"

    @property
    def stop_file(self) -> Path:
        """While this file exists, the attempt's cohorts checkpoint and return."""
        return Path(self.control) / f"stop-{self.attempt}"

    @property
    def leave_file(self) -> Path:
        """While this file exists, this cohort alone checkpoints and returns: its students go on elsewhere."""
        return Path(self.control) / f"leave-{self.name}"

    @property
    def renewed_file(self) -> Path:
        """A line for each time that something which was prepared or decoded had to be made anew."""
        return Path(self.control) / "renewed.txt"

    def tell_renewed(self, text: str) -> None:
        """Note in a line that something which was prepared or decoded is made anew; see `telling_damage`."""
        append(self.renewed_file, f"{self.name}: {text}\n")

    @property
    def progress_file(self) -> Path:
        """The cohort's latest progress document."""
        return Path(self.control) / f"progress-{self.name}.json"


def train_cohort(job: CohortJob, group: Ranks | None = None) -> dict[str, Any]:
    """Train the students of a cohort from wherever each of them stands.

    Returns:
        {"stopped": bool, "students": [a fleet.json entry of each student that has ended]}.

    Raises:
        RefusedError: the data of this node is not that of the driver, or a probe view's pixels differ.
        DamagedError: a store is damaged; no student has taken a step. Or what is prepared and decoded on this node was
            found corrupt again and again.
        HeldError: a later worker has taken a student over; nothing was written since.
    """
    device, workers = set_deterministic(job.device, job.students[0].threads), group or Ranks()

    def train() -> dict[str, Any]:
        splits = prepare(job.data, Path(job.cache_root), expected=job.fingerprints)
        check_fingerprints(job, splits)
        return train_on(job, splits, device, workers)

    return renewing(train, job.tell_renewed)


def train_on(job: CohortJob, splits: Splits, device: torch.device, group: Ranks) -> dict[str, Any]:
    """`train_cohort` on rows that are at hand, in a process that `set_deterministic` has settled.

    Raises:
        CorruptCacheError: they, or the decoded logits, are not what was written; they are to be prepared anew.
    """
    stream, teacher_said, contents = open_stream(job, splits)
    with Guard(contents) as guard, contextlib.ExitStack() as locks:
        writers = claim_students(job, locks) if group.rank == 0 else {}
        group.any(False)  # nobody reads a checkpoint before rank 0 is the only one to write
        lockstep = _Lockstep(job, group, guard, stream, splits, teacher_said)
        for name, writer in writers.items():
            drop_doubtful(Path(job.root) / name, writer, lockstep.mark)
        opened = [
            open_student(job, spec, splits.train, group, device, writers.get(spec.name), lockstep.vouch)
            for spec in job.students
        ]
        lockstep.students = [student for student in opened if student is not None]
        torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler: not on a student's clock
        failpoint("cohort.before_first_step")
        try:
            stopped = lockstep.run()
        except CorruptCacheError:
            for name, writer in writers.items():
                drop_doubtful(Path(job.root) / name, writer)
            raise
    return {"stopped": stopped, "students": [result for spec in job.students if (result := read_result(job, spec))]}


def claim_students(job: CohortJob, locks: contextlib.ExitStack) -> dict[str, FencedWriter]:
    """Become the writer of each student that has not ended: once its earlier worker has left, or by shutting it out.

    Raises:
        HeldError: a later attempt has one of them.
    """
    writers, until = {}, time.monotonic() + job.patience
    for spec in job.students:
        if not ended(job, spec):
            folder, what = Path(job.root) / spec.name / "checkpoints", f"the student {spec.name}"
            wait_for_lock(folder / "lock", what, until, locks)
            writers[spec.name] = take_over(folder, job.attempt, what)
    return writers


def wait_for_lock(lock: Path, what: str, until: float, locks: contextlib.ExitStack) -> None:
    """Give whoever holds a student's lock until then, by the monotonic clock, to checkpoint and leave."""
    with contextlib.suppress(HeldError):  # it does not answer: stopped, or cut off
        locks.enter_context(file_lock(lock, what=what, wait=max(0.0, until - time.monotonic())))


def stop_attempts(control: Path, last: int) -> None:
    """Tell the workers of earlier attempts to leave: a zombie of a dead driver sees its stop file."""
    for attempt in range(1, last + 1):
        (control / f"stop-{attempt}").touch()


def check_fingerprints(job: CohortJob, splits: Splits) -> None:
    """Refuse to train on rows other than those the driver planned with."""
    for split, expected in job.fingerprints.items():
        rows: Rows = getattr(splits, split)
        if rows.fingerprint != expected:
            raise RefusedError(
                f"the {split} rows on this node are not those of the driver",
                got=f"fingerprint {rows.fingerprint[:16]}",
                expected=f"fingerprint {expected[:16]}",
                next="make the same files visible on every node",
            )


def open_stream(job: CohortJob, splits: Splits) -> tuple[BatchStream, np.ndarray | None, list[Content]]:
    """The cohort's stream, and what the teacher says of each test row, as `stored_predictions`: both from stores.

    And the content of all that is mapped for it.
    """
    logits, teacher_said, contents = None, None, splits.contents()
    if job.stores:
        test = open_store(job.teacher_test or job.stores["test"])
        teacher_said = stored_predictions(test, splits.test).numpy()
        logits, decoded = map_decoded(open_store(job.stores["train"]), Path(job.cache_root))
        contents.append(decoded)
    stream = BatchStream(
        splits.train,
        logits,
        job.data.augmentation,
        seed=job.data.seed,
        views=job.data.views,
        batch=job.students[0].batch,
        last_batch=job.students[0].last_batch,
        window=job.data.window,
        device=job.device,
    )
    if job.stores:
        stream.check_probes(open_store(job.stores["train"]).manifest)
    return stream, teacher_said, contents


def stored_predictions(store: LogitStore, rows: Rows) -> torch.Tensor:
    """What the teacher says of each row of a store without augmentation, as `metrics.predictions`; shard by shard."""
    shards = (shard for shard in store.layout.shards() if shard.view == 0)
    blocks = (torch.from_numpy(store.rows(0, shard.start, shard.stop)) for shard in shards)
    return torch.cat([predictions(rows.task, block) for block in blocks])


def open_student(
    job: CohortJob,
    spec: recipe.StudentSpec,
    rows: Rows,
    group: Ranks,
    device: torch.device,
    writer: FencedWriter | None = None,
    vouch: Callable[[], str | None] = lambda: None,
) -> Student | None:
    """The student at its newest checkpoint; None if it has ended before, or ends here because it cannot be set up."""
    if ended(job, spec):
        return None
    folder, log = Path(job.root) / spec.name, Path(job.logs) / f"{spec.name}.log"
    try:
        card = group.agree(lambda: ModelCard.of(spec.model, rows, job.data.normalize, job.data.image))
        student = Student(
            spec,
            card,
            folder,
            log=log,
            attempt=job.attempt,
            group=group,
            writer=writer,
            metric=job.data.primary_metric,
            device=device,
            vouch=vouch,
        )
        student.resume()
    except (MachineError, HeldError):
        raise
    except Exception as error:
        group.check_agreed(error, spec.name)
        write_note(group.log_beside(log), "".join(traceback.format_exception(error)))
        if group.rank == 0:
            fail_from_outside(spec, folder, told(error), job.attempt, writer or FencedWriter())
        return None
    return student


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


def renewals(job: CohortJob) -> list[str]:
    """What cohorts noted of what was corrupt on their nodes, a line each, oldest first."""
    return job.renewed_file.read_text().splitlines() if job.renewed_file.exists() else []


def read_progress(job: CohortJob) -> CohortProgress | None:
    """The latest progress document of a cohort; None before its first."""
    return read_document(job.progress_file, CohortProgress)


class _Lockstep:
    """The loop over epochs and batches; students at different positions join when the stream reaches them."""

    def __init__(
        self,
        job: CohortJob,
        group: Ranks,
        guard: Guard,
        stream: BatchStream,
        splits: Splits,
        teacher_said: np.ndarray | None,
    ) -> None:
        self.job, self.group, self.guard, self.stream, self.splits = job, group, guard, stream, splits
        self.teacher_said = teacher_said
        self.mark = "+".join(group.from_all(guard.mark))
        self.students: list[Student] = []
        self.saved_at = self.told_at = time.monotonic()
        self.paces: dict[str, Pace] = {}

    @property
    def active(self) -> list[Student]:
        return [student for student in self.students if student.training]

    @property
    def moving(self) -> list[Student]:
        """Those that take steps; others ride along until their leader's stage I is over."""
        return [student for student in self.active if self._leader(student) is None]

    def _leader(self, student: Student) -> Student | None:
        """Whose stage I a student that has not begun waits for: it would train the very same one."""
        if student.stage1 is None or not student.not_started:
            return None
        alike = [other for other in self.active if other.stage_index == 0 and other.stage1 == student.stage1]
        first = max(alike, key=lambda other: (other.epoch, other.step))  # of equals the first one
        return None if first is student else first

    def run(self) -> bool:
        """Train until every student has ended; True if the stop file ended it first."""
        for student in self.active:
            if student.epochs == 0:
                self._guarded(student, self._finish_untrained, student)
        stopped = False
        self._tell(force=True)
        while self.moving and not stopped:
            epoch = min(student.epoch for student in self.moving)
            stopped = self._epoch(epoch)
            if not stopped and self.job.checkpoint_seconds == 0:
                self._save()
        self._tell(force=True)
        return stopped

    def _epoch(self, epoch: int) -> bool:
        here = [student for student in self.moving if student.epoch == epoch]
        stream = self.stream if any(student.stage.needs_logits for student in here) else self.stream.without_logits()
        first = min(student.step for student in here)
        for batch in stream.batches(epoch, first, self.group.rank, self.group.world):
            for student in here:
                if student.training and student.step == batch.step:
                    self._guarded(student, student.take_step, batch, stream.steps_per_epoch)
            if not any(student.training for student in here):
                break
            if self._pause():
                return True
        for student in here:
            if student.training:
                self._guarded(student, self._end_epoch, student)
                self._tell()
        return False

    def _finish_untrained(self, student: Student) -> None:
        student.keep_initial(self.splits.validation)
        student.finish(self.splits.test, self.teacher_said)

    def _end_epoch(self, student: Student) -> None:
        riders = [other for other in self.active if self._leader(other) is student]
        record, metric = student.end_epoch(self.splits.validation), self.job.data.primary_metric
        student.note(
            f"epoch {record['epoch']}: {record['stage']}, T {record['temperature']}, loss {record['train_loss']:.5f}, "
            f"validation {metric} {record['validation'][metric]:.4f}"
        )
        if student.stage_index > 0:
            for rider in riders:
                self._guarded(rider, rider.fork_from, student)
        if student.epoch == student.epochs:
            student.finish(self.splits.test, self.teacher_said)

    def _guarded(self, student: Student, act: Callable[..., object], *arguments: object) -> None:
        """Let a student fail alone: its exception ends it, and nobody else."""
        try:
            act(*arguments)
        except AkdError:
            raise
        except Exception as error:
            self.group.check_agreed(error, student.spec.name)
            student.fail(error)

    def _pause(self) -> bool:
        """After each batch: tell, checkpoint when due, and say whether to stop. The ranks decide together."""
        failpoint("cohort.after_batch")
        self._tell()
        due = 0 < self.job.checkpoint_seconds < time.monotonic() - self.saved_at
        stop, due = self.group.any(self.job.stop_file.exists() or self.job.leave_file.exists(), due)
        if stop or due:
            self._save()
        return stop

    def vouch(self) -> str | None:
        """As `Guard.vouch`, for the bytes of all ranks: what one publishes depends on those of the others.

        Returns:
            None where everything was hashed since the call; else the mark of the files that it rests on.
        """
        corrupt, fresh = None, False
        try:
            fresh = self.guard.vouch(self._tell)
        except CorruptCacheError as error:
            corrupt = error
        found, stale = self.group.any(corrupt is not None, not fresh)
        if found:
            raise corrupt or CorruptCacheError(
                "what another worker's node has prepared or decoded is no longer what was written there",
                got=f"found by another worker than {self.group.rank}",
            )
        return self.mark if stale else None

    def _save(self) -> None:
        rests_on = self.vouch()
        for student in self.moving:
            self._guarded(student, student.save, rests_on)
            self._tell()  # a sign of life: a stopped driver waits for no one who gives none
        self.saved_at = time.monotonic()

    def _shared_epochs(self, student: Student, leader: Student | None) -> int:
        """Epochs that another student takes for it."""
        return student.stages[0].epochs if leader else student.epochs_shared

    def _steps_of(self, student: Student, leader: Student | None) -> tuple[int, int]:
        """Steps behind a student and in all, without those that another takes for it; all once it has ended."""
        per_epoch, shared = self.stream.steps_per_epoch, self._shared_epochs(student, leader)
        total = (student.epochs - shared) * per_epoch
        done = 0 if leader else (student.epoch - shared) * per_epoch + student.step
        return (done if student.training else total), total

    def _tell(self, *, force: bool = False) -> None:
        """Leave the cohort's progress document, every half second."""
        now = time.monotonic()
        if self.group.rank != 0 or (now - self.told_at < PROGRESS_SECONDS and not force):
            return
        self.told_at = now
        for student in self.active:
            student.writer.check()  # a worker that was taken for dead has nothing to tell any more
        students = [self._progress_of(student, now) for student in self.students]
        document = CohortProgress(training=bool(self.active), at=time.time(), students=students)
        write_document(self.job.progress_file, document)

    def _progress_of(self, student: Student, now: float) -> StudentProgress:
        leader = self._leader(student)
        steps, total = self._steps_of(student, leader)
        pace = 0.0
        if student.training and leader is None:  # who has waited would seem to be slow, once it goes
            pace = self.paces.setdefault(student.spec.name, Pace(steps, now)).per_second(steps, now)
        last: dict[str, Any] = student.history[-1] if student.history else {}
        measured = (student.result or {}).get("validation") or last.get("validation", {})
        # Past its last epoch, and before the first step of one, a student is told by the epoch behind it.
        in_epoch = student.stage_epoch < student.stage.epochs
        return StudentProgress(
            name=student.spec.name,
            state=student.result["state"] if student.result else "waiting" if leader else "training",
            waits_for=leader.spec.name if leader else None,
            stage=student.stage.name,
            epoch=student.epoch,
            epochs=student.epochs,
            epochs_shared=self._shared_epochs(student, leader),
            temperature=student.stage.temperature(student.stage_epoch) if in_epoch else last.get("temperature"),
            loss=student.loss_sum / student.loss_rows if student.loss_rows else last.get("train_loss"),
            validation=measured.get(self.job.data.primary_metric),
            steps=steps,
            steps_total=total,
            rows_per_second=pace * self.stream.rows_per_epoch / self.stream.steps_per_epoch,
            steps_per_second=pace,
            seconds_left=(total - steps) / pace if pace > 0 else None,
            reason=student.result["reason"] if student.result is not None else None,
        )
