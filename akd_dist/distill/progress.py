"""A cohort's progress document: how far each of its students is, left for whoever watches."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from akd_dist.distill.stage1 import stage1_leader
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.documents.status import CohortProgress, StudentProgress
from akd_dist.tracking.status import Pace, write_document

PROGRESS_SECONDS = 0.5
SHARE = 0.01
"""Of the time of training that telling may take."""


class Progress:
    """Leaves the progress document of a cohort, every half second; rank 0 alone does.

    Args:
        metric: the validation metric that is shown.
    """

    def __init__(self, path: Path, students: Sequence[Student], stream: BatchStream, metric: str, rank: int) -> None:
        self.path, self.students, self.stream, self.metric, self.rank = path, students, stream, metric, rank
        self.told_at, self.pause = time.monotonic(), PROGRESS_SECONDS
        self.paces: dict[str, Pace] = {}
        self.known: dict[tuple[str, int], int] = {}

    def tell(self, *, force: bool = False) -> None:
        """Leave the document if it is time to.

        Raises:
            HeldError: a later worker has taken a student over: this one has nothing to tell any more.
        """
        now = time.monotonic()
        if self.rank != 0 or (now - self.told_at < self.pause and not force):
            return
        self.told_at = now
        active = [student for student in self.students if student.training]
        for student in active:
            # A worker that was shut out must not go on telling that it trains what another one does by now.
            student.writer.check()
        students = [self._of(student, stage1_leader(student, active), now) for student in self.students]
        document = CohortProgress(training=bool(active), at=time.time(), students=students)
        write_document(self.path, document)
        # A document of hundreds of students takes a while; it is told less often, and training is not held up.
        self.pause = max(PROGRESS_SECONDS, (time.monotonic() - now) / SHARE)

    def _of(self, student: Student, leader: Student | None, now: float) -> StudentProgress:
        """How far a student is.

        Args:
            leader: the student whose stage I it waits for, if it does; those steps count there.
        """
        stream, shared = self.stream.of(student.mix_in(student.stage)), student.epochs_shared
        if leader is not None:
            shared = student.stages[0].epochs
        before = self._steps(student, shared)
        total = self._steps(student, student.epochs) - before
        steps = 0 if leader else self._steps(student, student.epoch) - before + student.step
        pace = 0.0
        if student.training and leader is None:  # while it waits it makes no steps, which would make it look slow later
            pace = self.paces.setdefault(student.spec.name, Pace(steps, now)).per_second(steps, now)
        last: dict[str, Any] = student.history[-1] if student.history else {}
        result: dict[str, Any] = student.result or {}
        measured = result.get("validation") or last.get("validation", {})
        # Temperature and loss are those of the epoch that it is in. Once the last epoch is over, or where no step of
        # the next one has been taken, they are those of the epoch before.
        in_epoch = student.stage_epoch < student.stage.epochs
        return StudentProgress(
            name=student.spec.name,
            state=result.get("state") or ("waiting" if leader else "training"),
            waits_for=leader.spec.name if leader else None,
            stage=student.stage.name,
            epoch=student.epoch,
            epochs=student.epochs,
            epochs_shared=shared,
            temperature=student.stage.temperature(student.stage_epoch) if in_epoch else last.get("temperature"),
            loss=student.loss_sum / student.loss_rows if student.loss_rows else last.get("train_loss"),
            validation=measured.get(self.metric),
            steps=steps,
            steps_total=total,
            rows_per_second=pace * stream.rows_per_epoch / stream.steps_per_epoch,
            steps_per_second=pace,
            seconds_left=(total - steps) / pace if pace > 0 else None,
            reason=result.get("reason"),
        )

    def _steps(self, student: Student, epochs: int) -> int:
        """The steps of a student's first epochs, stage by stage: each may show other rows."""
        asked = student.spec.name, epochs
        if asked not in self.known:
            steps = 0
            for stage in student.stages:
                here = min(stage.epochs, epochs)
                steps, epochs = steps + here * self.stream.of(student.mix_in(stage)).steps_per_epoch, epochs - here
            self.known[asked] = steps
        return self.known[asked]
