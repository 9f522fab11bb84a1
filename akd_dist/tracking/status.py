"""How far a run is, from what lies in its folder: nothing is locked, nothing is written, and no one is asked.

akd-dist status runs/digits

While it trains, the driver leaves a plan in control/ and the worker of each cohort its progress. What these do not tell
of is read from the students' folders, so that a run is seen as well after its driver was killed.
"""

import contextlib
import os
import re
import shlex
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from akd_dist.base import places
from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.base.files import is_there, parse_json, read_json, read_small, replace
from akd_dist.base.formatting import some_of
from akd_dist.documents.base import Document
from akd_dist.documents.damage import AnyDocument, load, read_epochs, read_result
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.status import CohortProgress, FleetPlan, RunDriver, StatusDocument, StudentProgress
from akd_dist.storage.objects import storage_error

# A pace is that of the last seconds: students that end make room for the others.
PACE_SECONDS = 10.0
# How long a driver on another machine may be silent before it counts as gone; it writes every few seconds.
SILENT_SECONDS = 60.0
ENDED = ("done", "diverged", "failed")
CHECKPOINT = re.compile(r"(\d{1,12})-(\d{1,12})-.*\.ckpt")


class Pace:
    """How fast a count grows, over the last seconds."""

    def __init__(self, count: float, now: float) -> None:
        self.samples = deque([(now, count)])

    def per_second(self, count: float, now: float) -> float:
        """Take the count in, and say by how much it grew in each of the last seconds; by `time.monotonic()`."""
        self.samples.append((now, count))
        # The oldest sample goes once the one after it is old enough, so that what is kept always spans the whole time.
        while len(self.samples) > 2 and now - self.samples[1][0] > PACE_SECONDS:
            self.samples.popleft()
        since, before = self.samples[0]
        return (count - before) / (now - since) if now > since else 0.0


@contextlib.contextmanager
def driving(run: Path, *, moves: bool = True) -> Iterator[None]:
    """Say for the time of the block who drives a run; whoever does holds its lock.

    Args:
        moves: whether the run may be moved together with this process's working folder; not out of object storage.
    """
    driver = RunDriver(
        host=socket.gethostname(),
        pid=os.getpid(),
        birth=birth_of(os.getpid()),
        since=time.time(),
        command=typed_command(sys.argv, sys.orig_argv),
        folder=places.written(Path.cwd(), run) if moves else str(Path.cwd()),
    )
    path = run / "control" / "driver.json"
    write_document(path, driver)
    try:
        yield
    finally:
        write_document(path, driver.model_copy(update={"ended": time.time()}))


def typed_command(words: list[str], original: list[str]) -> str:
    """What this process was started with, as one would type it to go on: with --fresh that would start over again.

    Args:
        words: as in sys.argv.
        original: the same with the interpreter, as in sys.orig_argv; for programs that are not ours.
    """
    program = Path(words[0])
    # By `python -m`, what runs is a __main__.py: the package's, or that of its command line.
    ours = program.name == "akd-dist" or (program.name == "__main__.py" and "akd_dist" in program.parts[-3:-1])
    if not ours:
        return shlex.join(original)
    typed = [word for word in words[1:] if word != "--fresh"]
    for option, root in (("--store-root", places.STORE_ROOT), ("--run-root", places.RUN_ROOT)):
        if (chosen := os.environ.get(root.variable)) and not any(word.split("=")[0] == option for word in typed):
            typed += [option, chosen]  # another shell may not have the variable
    return shlex.join(["akd-dist", *typed])


def birth_of(pid: int) -> str | None:
    """When a process of this machine was started, in the system's own terms; None where that is not to be known.

    Nor is it of a process that is dead, although its parent has not asked for its end yet.
    """
    # Not psutil's `create_time`: that is ticks since boot plus the time of boot by the clock as it is set now. When the
    # clock is set, another process reads another birth, and would take a driver that lives for dead.
    try:
        # The name of the program stands in brackets and may hold anything; the 20th field after it is the start.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else fields[18]
    except (OSError, ValueError, IndexError):
        return None


def write_document(path: Path, document: Document) -> None:
    """A document that is worth nothing once the run is over: whole, but not made durable."""
    replace(path, document.spelled(), durable=False)


def read_document(path: Path, kind: type[AnyDocument]) -> AnyDocument | None:
    """A document of control/; None where there is none, or one that another version of akd-dist wrote."""
    try:
        return kind.model_validate(parse_json(read_small(path)))
    except (OSError, ValueError):  # ValueError is what pydantic raises, too
        return None


def is_alive(driver: RunDriver) -> bool | None:
    """Whether the process still holds the run; None where that cannot be seen from this machine."""
    if driver.ended is not None:
        return False
    if driver.host != socket.gethostname():
        return None
    if driver.birth is not None:
        return birth_of(driver.pid) == driver.birth
    try:
        os.kill(driver.pid, 0)
    except ProcessLookupError:
        return False
    # A process of another user may not be signalled, but it is there.
    except PermissionError:
        pass
    return True


class RunReader:
    """Reads how far a run is, again and again; of students that have not changed since, nothing is read again."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._kept: dict[str, tuple[Any, StudentProgress, list[str]]] = {}

    def read(self) -> StatusDocument:
        """How far it is now.

        Raises:
            RefusedError: there is no run.
            MachineError: its folder cannot be looked into.
        """
        self._check_is_there()
        driver = read_document(self.run / "control" / "driver.json", RunDriver)
        if driver is not None:
            driver = driver.model_copy(update={"folder": places.found(driver.folder, self.run)})
        plan = read_document(self.run / "control" / "plan.json", FleetPlan)
        problems: list[str] = []
        saved = self._saved(problems)
        told = self._told(plan) if plan else []
        at = _last_sign(driver, plan, [progress for progress, _ in told])
        alive = is_alive(driver) if driver else None
        held = alive if alive is not None else at is not None and time.time() - at < SILENT_SECONDS
        # A plan that is older than its driver is an earlier attempt's.
        current = driver is not None and plan is not None and plan.at >= driver.since
        training = held and current and saved is None
        ended_at = written(self.run / "fleet.json") / 1e9 if saved is not None else None
        # Results that lay there when the driver began are an earlier attempt's: it tries those that failed again.
        preparing = held and not training and (ended_at is None or (driver is not None and ended_at < driver.since))
        queued = {name for cohort in plan.cohorts for name in cohort.students} if plan and training else set()
        students = self._students(plan, saved, told if training else [], queued)
        if training:
            students = _in_line(students, queued)
        problems += [problem for _, _, told_of in self._kept.values() for problem in told_of]
        behind, later = (plan.steps_behind, plan.steps_later) if plan and saved is None else (0, 0)
        return StatusDocument(
            run=str(self.run),
            state="training" if training else "preparing" if preparing else "stopped" if saved is None else "done",
            driver=driver,
            alive=alive,
            at=at if ended_at is None or preparing else ended_at,
            metric=plan.metric if plan else saved.metric if saved else None,
            metric_name=plan.metric_name if plan else saved.metric_name if saved else None,
            steps=sum(student.steps for student in students) + behind,
            steps_total=sum(student.steps_total for student in students) + behind + later,
            steps_per_second=sum(student.steps_per_second for student in students),
            rows_per_second=sum(student.rows_per_second for student in students),
            seconds_left=_seconds_left(students, later),
            over=sum(student.state in ENDED for student in students),
            cohorts=plan.cohorts if plan and training else [],
            students=students,
            problems=problems,
        )

    def _saved(self, problems: list[str]) -> FleetDocument | None:
        """The results of a run that is done; None where there are none, or none that can be read."""
        path = self.run / "fleet.json"
        try:
            return None if read_json(path) is None else load(path, FleetDocument, next="")
        except AkdError as error:
            problems.append(_one_line(error, self.run))
            return None

    def _check_is_there(self) -> None:
        try:
            there = any((self.run / name).exists() for name in ("control", "identity.json", "fleet.json"))
            below = [] if there else sorted(path.parent.name for path in self.run.glob("*/identity.json"))
        except OSError as error:  # its folder, or one above it, is closed
            raise storage_error("read", str(self.run), error) from error
        if not there:
            holds = f"a folder of runs: {some_of(below)}" if below else "a folder that holds none"
            raise RefusedError(
                f"there is no run in {self.run}",
                got=holds if is_there(self.run) else "no such folder",
                expected="the folder of a run: its run root, and the name of its recipe",
                next=f"name {self.run / below[0]}, or another of these"
                if below
                else "akd-dist train-students RECIPE begins one, in runs/ unless told otherwise",
            )

    def _told(self, plan: FleetPlan) -> list[tuple[CohortProgress, int]]:
        """What the cohorts of the plan's attempt tell, in the order in which they began, and when they did."""
        paths = (self.run / "control").glob(f"progress-cohort-{plan.attempt}-*.json")
        numbered = {path: path.stem.rsplit("-", 1)[1] for path in paths}
        # By number, since as text 10 comes before 9.
        ordered = sorted((path for path, number in numbered.items() if number.isdecimal()), key=_number_of)
        return [(told, written(path)) for path in ordered if (told := read_document(path, CohortProgress))]

    def _students(
        self,
        plan: FleetPlan | None,
        saved: FleetDocument | None,
        told: list[tuple[CohortProgress, int]],
        queued: set[str],
    ) -> list[StudentProgress]:
        # After a worker's death a student stands in the progress of two cohorts: the later one tells how far it is now.
        live = {student.name: (student, when) for progress, when in told for student in progress.students}
        metric = plan.metric if plan else saved.metric if saved else ""
        # A plan that was made before students were taken out still has them.
        kept = None if saved is None else {student.name for student in saved.students}
        found = []
        for planned in plan.students if plan else _saved_students(saved):
            if kept is not None and planned.name not in kept:
                continue
            progress, when = live.get(planned.name, (None, 0))
            again = planned.name in queued
            if again and progress is not None and progress.state == "failed":
                progress = None
            # A student whose workers died again and again is ended by the driver; no worker writes its end.
            if progress is not None and when >= written(self.run / "students" / planned.name / "result.json"):
                found.append(_by_plan(progress, planned))
            else:
                found.append(_by_plan(self._standing(planned, metric, again), planned))
        return found

    def _standing(self, planned: StudentProgress, metric: str, again: bool) -> StudentProgress:
        """How far a student is by its folder."""
        folder = self.run / "students" / planned.name
        names: list[str] = []
        with contextlib.suppress(OSError):  # there is none, or it is closed, of which what is read below tells
            names = [path.name for path in (folder / "checkpoints").iterdir()]
        checkpoint = max((name for name in names if CHECKPOINT.fullmatch(name)), default=None)
        stamp = (planned, checkpoint, again, *(written(folder / name) for name in ("result.json", "metrics.jsonl")))
        if (kept := self._kept.get(planned.name)) is None or kept[0] != stamp:
            problems: list[AkdError] = []
            found = standing(folder, planned, metric, checkpoint, again, problems)
            told = [_one_line(error, self.run) for error in problems]
            kept = self._kept[planned.name] = stamp, found, told
        return kept[1]


def _by_plan(found: StudentProgress, planned: StudentProgress) -> StudentProgress:
    """A student whose steps are counted as they were planned, so that no sum changes while a fleet trains.

    Whoever computes a stage I itself that somebody else was to compute for it, or the other way round, has come as far
    in its plan as in what it does.
    """
    total, steps = planned.steps_total, min(found.steps, planned.steps_total)
    if found.state == "done":
        steps = total
    elif found.epochs_shared != planned.epochs_shared and found.steps_total:
        steps = total * found.steps // found.steps_total
    left = None if found.seconds_left is None else (total - steps) / found.steps_per_second
    return found.model_copy(update={"steps": steps, "steps_total": total, "until": planned.until, "seconds_left": left})


def _number_of(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _one_line(error: AkdError, run: Path) -> str:
    return f"{error.what}: {error.got}".replace(f"{run}/", "")


def standing(
    folder: Path,
    planned: StudentProgress,
    metric: str,
    checkpoint: str | None,
    again: bool,
    problems: list[AkdError] | None = None,
) -> StudentProgress:
    """How far a student is by what lies in its folder.

    Args:
        planned: the student as if it had not begun.
        checkpoint: the name of its newest one: `<epoch>-<step>-<attempt>.ckpt`.
        again: whether it is in line: had it failed, it will go on from its checkpoint, and what is left counts again.
        problems: takes what could not be read; the student is told of by what is left.
    """
    problems = [] if problems is None else problems
    try:
        result = read_result(folder)
    except AkdError as error:
        problems.append(error)
        result = None
    if again and result is not None and result.state == "failed":
        result = None
    try:
        records = read_epochs(folder)
    except AkdError as error:
        problems.append(error)
        records = []
    changes: dict[str, object] = {}
    if records:
        last = records[-1]
        changes = {"stage": last.stage, "temperature": last.temperature, "loss": last.train_loss}
        changes["validation"] = last.validation and last.validation.get(metric)
    until = planned.epochs if planned.until is None else planned.until
    per_epoch = planned.steps_total // max(until - planned.epochs_shared, 1)
    if result is not None:
        changes |= {"state": result.state, "reason": result.reason, "epoch": result.epochs}
        # Who was to compute its stage I may have failed before; it may itself have failed before its first step.
        shared = planned.epochs_shared if result.stage1_from or not result.epochs else 0
        total = (planned.epochs - shared) * per_epoch
        steps = total if result.state == "done" else min(max(result.epochs - shared, 0) * per_epoch, total)
        changes |= {"epochs_shared": shared, "steps": steps, "steps_total": total}
        if result.validation is not None:
            changes["validation"] = result.validation.get(metric)
    elif checkpoint is not None:
        epoch, step = (int(part) for part in checkpoint.split("-")[:2])
        shared = planned.epochs_shared if epoch >= planned.epochs_shared else 0
        total = (planned.epochs - shared) * per_epoch
        # No more than there are: the name of a file may say anything.
        steps = min((epoch - shared) * per_epoch + step, total)
        changes |= {"state": "stopped", "epoch": min(epoch, planned.epochs), "steps": steps}
        changes |= {"epochs_shared": shared, "steps_total": total}
    return planned.model_copy(update=changes)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a student's metrics.jsonl as they stand there; none before its first, nor of a damaged file.

    So it is for trackers, and for a student that failed; reports tell of a damaged one.
    """
    try:
        return [record.plain() for record in read_epochs(folder)]
    except AkdError:
        return []


def _in_line(students: list[StudentProgress], queued: set[str]) -> list[StudentProgress]:
    """Students whose turn will come wait, whatever an earlier attempt left of them."""
    waiting = {"state": "waiting", "rows_per_second": 0.0, "steps_per_second": 0.0, "seconds_left": None}
    return [
        student.model_copy(update=waiting)
        if student.state == "stopped" or (student.name in queued and student.state not in ENDED)
        else student
        for student in students
    ]


def _saved_students(saved: FleetDocument | None) -> list[StudentProgress]:
    """The students of a run that was done before plans were left."""
    entries = saved.students if saved else []
    return [StudentProgress(name=one.name, state="waiting", epochs=one.epochs, steps_total=0) for one in entries]


def _last_sign(driver: RunDriver | None, plan: FleetPlan | None, told: list[CohortProgress]) -> float | None:
    signs = [one.at for one in told] + ([plan.at] if plan else []) + ([driver.ended or driver.since] if driver else [])
    return max(signs, default=None)


def _seconds_left(students: list[StudentProgress], later: int = 0) -> float | None:
    """All steps that are left at today's pace, and no less than the student that takes longest."""
    pace = sum(student.steps_per_second for student in students)
    if pace <= 0:
        return None
    longest = max(student.seconds_left or 0.0 for student in students)
    left = sum(student.steps_total - student.steps for student in students if student.state not in ENDED)
    return max(longest, (left + later) / pace)


def written(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
