"""The training loop: students of a cohort in lockstep, each batch read once for all of them."""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist.base.errors import AkdError, CorruptCacheError
from akd_dist.base.files import failpoint
from akd_dist.data.rows import Splits
from akd_dist.distill.delivery import deliver, end_by, epoch_end, write_metrics, write_note
from akd_dist.distill.hooks import tell_epoch_end
from akd_dist.distill.job import CohortJob
from akd_dist.distill.objectives import Stage
from akd_dist.distill.orders import Mix
from akd_dist.distill.prefetch import prefetched
from akd_dist.distill.progress import Progress
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stack import Stack, Stacks
from akd_dist.distill.stack_evaluation import evaluate_together
from akd_dist.distill.stage1 import publish_stage1, stage1_leader, take_stage1
from akd_dist.distill.stream import Batch, BatchStream
from akd_dist.distill.student import Student
from akd_dist.storage.content import Guard

METRICS_SECONDS, METRICS_EACH = 1.0, 0.02
"""How often the epochs of a student are written for whoever watches, besides with each checkpoint and at its end: small
students end many epochs a second. And how much less often for each student of the cohort, in seconds.
"""


@dataclass
class Lockstep:
    """The loop over epochs and batches, as one rank runs it."""

    job: CohortJob
    ranks: Ranks
    students: list[Student]
    """Those that have not ended, each at its newest checkpoint."""
    stream: BatchStream
    splits: Splits
    teacher_said: np.ndarray | None
    """What the teacher says of each test row, as `metrics.predictions`; None without a teacher."""
    guard: Guard
    """Of all files that rows and logits of this rank lie in."""

    def __post_init__(self) -> None:
        metric = self.job.data.primary_metric
        self.progress = Progress(self.job.progress_file, self.students, self.stream, metric, self.ranks.rank)
        self.stacks = Stacks(self.job.stacks)
        self.saved_at = time.monotonic()

    def run(self) -> bool:
        """Train until every student has ended; True if the stop file was there before."""
        for student in self.active:
            # No recipe can ask for that; benchmarks do, to see what a fleet costs without its steps.
            if student.epochs == 0:
                with self._failing_alone(student):
                    student.keep_initial(self.splits.validation)
                    self._deliver(student)
        self._take_stages()
        self.progress.tell(force=True)
        stopped = False
        while not stopped and (stepping := self.stepping):
            # Students that resumed may stand further on than others. The stream begins with the one that is furthest
            # behind, and each joins when the stream comes to the step that it stands at.
            epoch = min(student.epoch for student in stepping)
            at = [student for student in stepping if student.epoch == epoch]
            # Where rows have no labels, stages may show other rows: those of each mix pass once, one after the other.
            stream = self._shown(at[0], at[0].stage)
            here = [student for student in at if self._shown(student, student.stage) is stream]
            first = min(student.step for student in here)
            # An epoch in which all learn from labels alone reads no logits.
            stream = stream if any(one.stage.needs_logits for one in here) else stream.without_logits()
            then = self._read_next(epoch, [one for one in at if one not in here], logits=stream.logits is not None)
            with prefetched(stream, epoch, first, self.ranks, then) as batches:
                for batch in batches:
                    now = [student for student in here if student.training and student.step == batch.step]
                    self._take_step(now, batch, stream.steps_per_epoch)
                    if not any(student.training for student in here):
                        break  # all of them have failed or diverged: the rest of the epoch is not read
                    if stopped := self._stops_after_batch():
                        break
            if not stopped:
                self._end_epoch(here)
        self.progress.tell(force=True)
        return stopped

    def _take_step(self, students: list[Student], batch: Batch, steps_per_epoch: int) -> None:
        """One step of each student: in stacks those that are stacked, the others one after the other."""
        alone = [student for student in students if student.packed is None]
        several = batch.targets is not None and sum(student.stage.needs_logits for student in alone) > 1
        with batch.targets.shared() if several and batch.targets is not None else contextlib.nullcontext():
            for student in alone:
                with self._failing_alone(student):
                    student.take_step(batch, steps_per_epoch)
        together = [student for student in students if student.training and student.packed is not None]
        for student, error in self.stacks.take_step(together, batch, steps_per_epoch).items():
            with self._failing_alone(student):
                raise error

    def _take_stages(self) -> None:
        """Have those that have not begun go on from a stage I that was trained before, in this run or another."""
        for student in self.active:
            with self._failing_alone(student):
                if take_stage1(student, self.job, functools.partial(self._note, student)):
                    write_metrics(student)
                    student.save()

    @property
    def active(self) -> list[Student]:
        """Those that have not ended."""
        return [student for student in self.students if student.training]

    @property
    def stepping(self) -> list[Student]:
        """Those that take steps; the others wait until the stage I that they share with one of these is over."""
        active = self.active
        leading = [student for student in active if stage1_leader(student, active) is None]
        return [student for student in leading if not self._is_paused(student)]

    def _is_paused(self, student: Student) -> bool:
        """Whether a student has come to where it waits for another command."""
        return student.epoch >= self.job.pauses.get(student.spec.name, student.epochs + 1)

    def _shown(self, student: Student, stage: Stage) -> BatchStream:
        """The stream as a student is shown it in one of its stages."""
        return self.stream.of(student.mix_in(stage))

    def _read_next(self, epoch: int, others: list[Student], *, logits: bool) -> tuple[int, Mix] | None:
        """The epoch that is read after this one, and its mix; if logits are read now, only one that needs them as well.

        Args:
            others: who trains in the same epoch on other rows.
            logits: whether logits are read now.
        """
        following = [(epoch + 1, student, student.stage_of(epoch + 1)) for student in self.active]
        for number, student, stage in [*((epoch, one, one.stage) for one in others), *following]:
            if stage is not None and (stage.needs_logits or not logits):
                return number, student.mix_in(stage)
        return None

    def _stops_after_batch(self) -> bool:
        """Tell, checkpoint when that is due, and say whether to stop. The ranks decide together."""
        failpoint("cohort.after_batch")
        self.progress.tell()
        due = 0 < self.job.checkpoint_seconds < time.monotonic() - self.saved_at
        # Both in one exchange, since each step of several workers waits for it.
        stop, due = self.ranks.any(self.job.stop_file.exists(), due)
        if stop or due:
            self._save()
        return stop

    def _end_epoch(self, students: list[Student]) -> None:
        measured = self._measured_together([one for one in students if one.training and one.packed is not None])
        waiting = [one for one in self.active if one.not_started and one.stage1 is not None]
        for student in students:
            if student.training:
                with self._failing_alone(student):
                    self._end_epoch_of(student, measured.get(student), waiting)
                self.progress.tell()
        if paused := [student for student in students if student.training and self._is_paused(student)]:
            self._save(paused)
        if self.job.checkpoint_seconds == 0:
            self._save()

    def _measured_together(self, students: list[Student]) -> dict[Student, dict[str, float]]:
        """The validation metrics of students that step in stacks, which are evaluated in stacks as well."""
        found: dict[Student, dict[str, float]] = {}

        def measure(stack: Stack) -> None:
            started = time.perf_counter()
            evaluated = evaluate_together(stack, self.splits.validation, self.job.data.own_metric)
            each = (time.perf_counter() - started) / len(stack.students)
            for student, (metrics, _) in zip(stack.students, evaluated, strict=True):
                found[student] = metrics
                student.seconds += each
            self.progress.tell()

        for student, error in self.stacks.each(students, measure).items():
            with self._failing_alone(student):
                raise error
        return found

    def _end_epoch_of(self, student: Student, measured: dict[str, float] | None, waiting: list[Student]) -> None:
        """End a student's epoch.

        Args:
            measured: its metrics, where it was evaluated together with others.
            waiting: who may be waiting for the end of its stage I.
        """
        active = self.active if waiting else []
        followers = [other for other in waiting if stage1_leader(other, active) is student]
        record, metric = student.end_epoch(self.splits.validation, measured), self.job.data.primary_metric
        failpoint("student.before_metrics")
        write_metrics(student, every=max(METRICS_SECONDS, METRICS_EACH * len(self.students)))
        self._note(
            student,
            f"epoch {record['epoch']}: {record['stage']}, T {record['temperature']}, loss {record['train_loss']:.5f}, "
            f"validation {self.job.data.metric_name} {record['validation'][metric]:.4f}",
        )
        if student.stage_index == 1 and student.stage_epoch == 0 and self.job.stages is not None:
            self.vouch()
            publish_stage1(student, self.job, functools.partial(self._note, student))
        self._tell_callback(student, record)
        if student.stage_index > 0:  # stage I is over, and is the same for those that have waited for it
            for follower in followers:
                with self._failing_alone(follower):
                    follower.fork_from(student)
                    write_metrics(follower)
                    self._note(follower, f"goes on from the stage I of {student.spec.name}, which is the same")
            # Only once all have gone on: while bytes are vouched for, progress is told, and whoever still waited would
            # have nobody to wait for.
            for follower in followers:
                if follower.training:
                    with self._failing_alone(follower):
                        follower.save(self.vouch())
        if student.epoch == student.epochs:
            self._deliver(student)

    def _tell_callback(self, student: Student, record: dict[str, Any]) -> None:
        """Tell whoever the recipe names of the epoch's end, on rank 0; where that fails, on all ranks alike."""
        if (callback := student.spec.on_epoch_end) is None:
            return
        with self.ranks.agree():
            if self.ranks.rank == 0:
                tell_epoch_end(callback, epoch_end(student, record))

    def _deliver(self, student: Student) -> None:
        test = self.splits.test if self.job.reads_test else None
        deliver(student, test, self.teacher_said, self._log(student), self.vouch)

    @contextlib.contextmanager
    def _failing_alone(self, student: Student) -> Iterator[None]:
        """A block whose exception ends this student and no other; but an `AkdError` is no fault of a student."""
        try:
            yield
        except AkdError:
            raise
        except (Exception, SystemExit) as error:  # the latter of a user's own model: it would end the others as well
            self.ranks.check_agreed(error, student.spec.name)
            self.vouch()  # raises where the bytes that it was trained on were wrong: then it is to be trained again
            end_by(student, error, self._log(student))

    def vouch(self) -> str | None:
        """As `Guard.vouch`, for the bytes of all ranks: what one publishes depends on those of the others.

        Returns:
            None where everything was hashed since the call; else the marks of the files that it rests on.

        Raises:
            CorruptCacheError: something that was prepared or decoded has changed, on this rank's node or another's.
        """
        corrupt, resting = None, list[str]()
        try:
            resting = self.guard.vouch(self.progress.tell)
        except CorruptCacheError as error:
            corrupt = error
        found, stale = self.ranks.any(corrupt is not None, bool(resting))
        if found:
            raise corrupt or CorruptCacheError(
                "what another worker's node has prepared or decoded is no longer what was written there",
                got=f"found by another worker than {self.ranks.rank}",
            )
        return " ".join(filter(None, self.ranks.from_all(" ".join(resting)))) if stale else None

    def _save(self, students: list[Student] | None = None) -> None:
        """Checkpoint these students; by default all that take steps."""
        rests_on = self.vouch()
        # Those that wait for somebody else's stage I have taken no step, so they have nothing to keep.
        for student in self.stepping if students is None else students:
            with self._failing_alone(student):
                write_metrics(student)
                student.save(rests_on)
            self.progress.tell()  # a driver that stops gives up on workers that show no progress for a while
        self.saved_at = time.monotonic()

    def _log(self, student: Student) -> Path:
        return self.job.log_of(student.spec.name, self.ranks.rank)

    def _note(self, student: Student, text: str) -> None:
        write_note(self._log(student), text)
