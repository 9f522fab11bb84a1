"""What a student leaves: its delivered model, what it says of the test rows, its result, its metrics, its log.

All but the log is written by rank 0, through the student's `FencedWriter`: a worker whose student another one has taken
over can publish nothing.
"""

import json
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.fence import FencedWriter
from akd_dist.base.files import append, failpoint
from akd_dist.base.tracebacks import in_full
from akd_dist.data.predictions import encode_predictions
from akd_dist.data.rows import Rows
from akd_dist.distill.checkpoint import checkpoints, read_header
from akd_dist.distill.hooks import EpochEnd
from akd_dist.distill.ranks import reason_of
from akd_dist.distill.student import DivergedError, Student
from akd_dist.models.build import num_parameters
from akd_dist.models.folder import save_model
from akd_dist.tracking.status import read_metrics

TEST_NAME = "test.parquet"
"""What student and teacher say of each test row, beside its label."""


def deliver(
    student: Student,
    test: Rows | None,
    teacher_said: np.ndarray | None,
    log: Path,
    vouch: Callable[[], object] = lambda: None,
) -> None:
    """End a student as `done`: measure the best weights of its last stage on the test rows, once, and write them.

    Args:
        test: the test rows; None leaves them unread, and the student without metrics on them.
        teacher_said: what the teacher says of each test row, as `metrics.predictions`; None without a teacher.
        vouch: as `Lockstep.vouch`: called before anything is published.
    """
    assert student.best is not None
    student.module.load_state_dict(student.best)
    if test is None:
        _deliver_unmeasured(student, log, vouch)
        return
    metrics, chosen = student.evaluate(test)
    agreement = None
    if teacher_said is not None and test.task == "classification":
        agreement = float(np.mean(chosen == teacher_said))
    elif test.task == "language_model":
        agreement = metrics.get("agreement")
    vouch()
    if student.ranks.rank == 0:
        failpoint("student.before_model")
        save_model(student.folder, student.module, student.card, write=student.writer.replace)
        if test.task != "language_model":  # whose targets are many: `akd-dist predict` writes what it says of each
            label = test.all_labels()
            columns = {"row": np.arange(len(test)), "label": label, "student": chosen, "teacher": teacher_said}
            student.writer.replace(student.folder / TEST_NAME, encode_predictions(columns))
    _conclude(
        student,
        "done",
        None,
        log,
        test={name: value for name, value in metrics.items() if math.isfinite(value)},  # JSON has no infinite loss
        validation=student.best_record["validation"],
        agreement=agreement,
    )


def _deliver_unmeasured(student: Student, log: Path, vouch: Callable[[], object]) -> None:
    """The same without a look at the test rows."""
    vouch()
    if student.ranks.rank == 0:
        failpoint("student.before_model")
        save_model(student.folder, student.module, student.card, write=student.writer.replace)
    _conclude(student, "done", None, log, validation=student.best_record["validation"])


def end_by(student: Student, error: BaseException, log: Path) -> None:
    """End a student as `diverged` or `failed`; its last good checkpoint stays."""
    state = "diverged" if isinstance(error, DivergedError) else "failed"
    write_note(log, in_full(error))
    _conclude(student, state, str(error) if state == "diverged" else reason_of(error), log)


def _conclude(student: Student, state: str, reason: str | None, log: Path, **measured: Any) -> None:
    """Write the result; what is measured of it stays, its weights and optimizer are let go of."""
    result = entry(student.spec, state, reason, student.folder, student.attempt) | {
        "parameters": num_parameters(student.module),
        "epochs": student.epoch,
        "seconds": round(student.seconds, 3),
        "stage1_from": student.stage1_from,
        **measured,
    }
    write_note(log, f"{state}: {reason or measured.get('test')}")
    write_metrics(student, durable=True)
    if student.ranks.rank == 0:
        # The result comes last: a student without one is trained on, whatever else of it lies there.
        failpoint("student.before_result")
        student.writer.replace(student.folder / "result.json", json.dumps(result, indent=1).encode())
        failpoint("student.after_result")
    student.end(result)


def epoch_end(student: Student, record: dict[str, Any]) -> EpochEnd:
    """What a callback is told of an epoch, from its record."""
    kept = checkpoints(student.folder / "checkpoints")
    return EpochEnd(
        student=student.spec.name,
        epoch=record["epoch"],
        epochs=student.epochs,
        stage=record["stage"],
        train_loss=record["train_loss"],
        validation=tuple(record["validation"].items()),
        folder=student.folder,
        checkpoint=kept[-1] if kept else None,
    )


def write_metrics(student: Student, *, durable: bool = False, every: float = 0.0) -> None:
    """All epochs so far, whole: a line that is added to a file may be cut, and may be added by a late worker.

    Args:
        every: seconds within which they are not written again.
    """
    now = time.monotonic()
    if student.ranks.rank == 0 and now - student.told_at >= every:
        student.told_at = now
        # Each record is spelled once, however often the file is written.
        del student.lines[len(student.history) :]
        student.lines += [json.dumps(record) + "\n" for record in student.history[len(student.lines) :]]
        student.writer.replace(student.folder / "metrics.jsonl", "".join(student.lines).encode(), durable=durable)


def entry(spec: recipe.StudentSpec, state: str, reason: str | None, folder: Path, attempt: int) -> dict[str, Any]:
    """A student's entry of fleet.json before anything of it was measured."""
    return {
        "name": spec.name,
        "model": spec.model.label,
        "parameters": None,
        "objective": spec.objective.kind,
        "tau_max": getattr(spec.objective, "tau_max", None),
        "stage1_loss": spec.objective.loss_of_stage1(language=spec.is_language_model)
        if isinstance(spec.objective, recipe.AnnealingKD)
        else None,
        "seed": spec.seed,
        "state": state,
        "reason": reason,
        "epochs": 0,
        "validation": None,
        "test": None,
        "agreement": None,
        "seconds": 0.0,
        "stage1_from": None,
        "attempt": attempt,
        "path": ".",  # the student's folder, relative to the document in it
    }


def failed_entry(spec: recipe.StudentSpec, reason: str, folder: Path, attempt: int) -> dict[str, Any]:
    """The entry of a student that failed and cannot say how far it was: its folder does."""
    records = read_metrics(folder)
    seconds = records[-1]["seconds"] if records else 0.0
    known = {"epochs": len(records), "seconds": seconds, "stage1_from": forked_from(folder)}
    return entry(spec, "failed", reason, folder, attempt) | known


def forked_from(folder: Path) -> str | None:
    """The student whose stage I this one went on from, by its newest checkpoint; None if it trained its own."""
    found = checkpoints(folder / "checkpoints")
    return read_header(found[-1]).get("stage1_from") if found else None


def fail_from_outside(spec: recipe.StudentSpec, folder: Path, reason: str, attempt: int, writer: FencedWriter) -> None:
    """End a student as `failed` that could not be set up, or whose worker dies again and again: the others go on."""
    result = failed_entry(spec, reason, folder, attempt)
    writer.replace(folder / "result.json", json.dumps(result, indent=1).encode())


def write_note(log: Path, text: str) -> None:
    """Add a line with its time to a log."""
    append(log, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text.rstrip()}\n")
