"""A cohort whose run lies in object storage: it trains in a folder of its node, and what it writes there is published.

The folder is that of a local run, and all code works in it as in one. A thread beside the training puts what is new:
a student's newest checkpoint, at most one an interval; what a student leaves when it ends; and in one object for the
whole cohort, every few seconds, how far it is, its metrics and its logs. `storage.run_objects` says why a worker that
was taken for dead can do no harm by that.

Requests of a cohort: a put a student and checkpoint interval; a put and a look for the stop mark every few seconds; a
listing (one a thousand objects) and a removal an interval.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from akd_dist.base.errors import AkdError, HeldError, MachineError
from akd_dist.base.fence import FencedWriter
from akd_dist.base.files import failpoint, replace
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.job import CohortJob, ended
from akd_dist.storage.objects import ObjectMissing
from akd_dist.storage.run_objects import CHECKPOINTS, STUDENTS, RunObjects, Standing, in_parallel

LOOK_SECONDS = 0.5
"""How often the folder is looked at."""
PUT_SECONDS = 5.0
"""The least time between two puts of a kind: of a student's checkpoints, and of the cohort's bundle."""
STOP_SECONDS = 5.0
"""How often the storage is asked whether to stop."""
PATIENCE_SECONDS = 180.0
"""How long nothing may come through before the cohort checkpoints in its folder and ends."""
LEFT = ("metrics.jsonl", "model.safetensors", "test.parquet", "model.json", "result.json")
"""What a student leaves when it ends; the result is the last to be put, since it says that it has ended."""
_LARGE_AT_ONCE = 4
_LISTINGS = 5
_NOTE = "writer"
# Of the time that a bundle takes to be put, so many times as much passes until the next one.
_BUNDLE_SHARE = 20.0


class Publisher:
    """Publishes what a cohort writes, for the time of a block; rank 0 alone does.

    Args:
        job: a cohort's, its folders on this node.
    """

    def __init__(self, job: CohortJob) -> None:
        assert job.run_uri is not None
        self.job, self.run = job, RunObjects.at(job.run_uri)
        self.since = 0
        self.fences: dict[str, FencedWriter] = {}
        self.writers: dict[str, str] = {}
        self.over = threading.Event()
        self.error: AkdError | None = None
        self._stale: set[str] = set()  # students whose folder here is not what the latest writer left
        self._there: dict[str, list[str]] = {}  # keys of the checkpoints that are there, the oldest first
        self._put_at: dict[str, float] = {}
        self._left: set[str] = set()  # students that have ended, or are somebody else's by now
        self._late = False  # whether a later worker has taken one of them over
        self._trouble_since: float | None = None
        self._asked_at = self._bundled_at = float("-inf")
        self._pause, self._bundled = PUT_SECONDS, dict[str, str]()
        self._logs_from: dict[str, int] = {}
        self._before: dict[str, str] = {}

    # ---- before the training

    def bring_results(self) -> None:
        """See which students have ended, and whether the folder here holds the state of those that have not.

        Raises:
            MachineError: the storage cannot be read.
        """
        control = self.run.control()
        self.since = control.since
        Path(self.job.control).mkdir(parents=True, exist_ok=True)
        self.job.stop_file.unlink(missing_ok=True)  # of an earlier worker here, that was ended by its own trouble
        if self.job.attempt in control.stopped:
            self.job.stop_file.touch()
        self._logs_from = {path: _size(self._place(path)) for path in self._log_paths()}
        self._before = self.run.bundled(self.job.name)
        found = self.run.students(self.since, [spec.name for spec in self.job.students])
        for spec in self.job.students:
            standing, folder = found.get(spec.name, Standing()), self._folder(spec.name)
            kept = standing.writer is not None and _read(folder / CHECKPOINTS / _NOTE) == standing.writer
            if not kept:
                self._stale.add(spec.name)
            if "result.json" in standing.files:
                replace(folder / "result.json", self.run.root.get(standing.key_of(spec.name, "result.json")))
            elif kept and (folder / "result.json").exists() and ended(self.job, spec):
                assert standing.writer is not None
                self._put_left(spec.name, standing.writer)  # it ended here, and could not be published
            else:
                (folder / "result.json").unlink(missing_ok=True)

    def claim(self, fences: dict[str, FencedWriter]) -> None:
        """Become the writer of students in the object storage, and bring their newest checkpoints here.

        Args:
            fences: their writers in the folder here.

        Raises:
            HeldError: a later worker has one of them.
            MachineError: the storage cannot be read or written.
        """
        self.fences = fences
        for name in self._stale & fences.keys():
            self._clear(name)
        for name in fences:  # of an earlier attempt: it is tried again
            (self._folder(name) / "result.json").unlink(missing_ok=True)
        self.writers = self.run.take_over(fences, self.job.attempt, self.since)
        self.bring_checkpoints(fences)
        for name, writer in self.writers.items():
            replace(self._folder(name) / CHECKPOINTS / _NOTE, writer.encode(), durable=False)
        self._round()  # what was trained here, and never came through; other workers of the cohort begin with it

    def join(self) -> None:
        """Bring what another worker of the cohort goes on from, once rank 0 is the writer of its students.

        Raises:
            MachineError: the storage cannot be read.
        """
        control = self.run.control()
        self.since = control.since
        Path(self.job.control).mkdir(parents=True, exist_ok=True)
        if self.job.attempt not in control.stopped:
            self.job.stop_file.unlink(missing_ok=True)
        names = [spec.name for spec in self.job.students]
        found = self.run.students(self.since, names)
        for name in names:
            standing, result = found.get(name, Standing()), self._folder(name) / "result.json"
            if "result.json" in standing.files:
                replace(result, self.run.root.get(standing.key_of(name, "result.json")))
            elif _read(self._folder(name) / CHECKPOINTS / _NOTE) != standing.writer:  # else rank 0 is on this node
                result.unlink(missing_ok=True)
        self.bring_checkpoints(name for name in names if "result.json" not in found.get(name, Standing()).files)

    def bring_checkpoints(self, names: Iterable[str]) -> None:
        """Bring the newest checkpoint of each student here, and the one before, where they are not.

        Raises:
            MachineError: the storage cannot be read.
        """
        names = list(names)
        for left in reversed(range(_LISTINGS)):
            found = self.run.students(self.since, names)
            try:
                in_parallel(self._bring, [(name, found.get(name, Standing())) for name in names], _LARGE_AT_ONCE)
                return
            except ObjectMissing:  # removed since it was listed, by whoever has put a newer one
                if not left:
                    raise

    def _bring(self, one: tuple[str, Standing]) -> None:
        name, standing = one
        for key, stat in standing.checkpoints[:2]:
            path = self._folder(name) / CHECKPOINTS / key.rpartition("/")[2]
            if _size(path) != stat.size:
                replace(path, self.run.root.get(key), durable=False)
        self._there[name] = [key for key, _ in reversed(standing.checkpoints)]

    # ---- beside the training

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self._keep_on, name="publisher", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish the rest. Where that cannot be for long, what was trained stays in the folder here.

        Raises:
            HeldError: a later worker has taken a student over, so what was put of it may not count.
            MachineError: the storage could not be written for a while.
        """
        self.over.set()
        self.thread.join()
        if kind is not None:
            with contextlib.suppress(AkdError, OSError):
                self._round(final=True)
            return
        while self.error is None:
            try:
                self._round(final=True)
                self.run.check_latest(self.writers, self.since)
                return
            except HeldError:
                raise
            except AkdError as error:
                self._bear(error)
            time.sleep(LOOK_SECONDS)
        with contextlib.suppress(AkdError):
            self._round(final=True)
        raise self.error

    def _keep_on(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            try:
                self._round()
                self._trouble_since = None
            except (AkdError, OSError) as error:
                self._bear(error)

    def _bear(self, error: AkdError | OSError) -> None:
        """Bear with storage that is out of reach for a while; then have the cohort checkpoint here, and end."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > PATIENCE_SECONDS and self.error is None:
            told = error.line if isinstance(error, AkdError) else str(error)
            self.error = MachineError(
                f"the run {self.job.run_uri} could not be written for {PATIENCE_SECONDS:g} s",
                got=told,
                expected="object storage that answers",
                next="the same command goes on; what was trained and could not be published is kept in "
                f"{Path(self.job.root).parent}, for workers of this node",
            )
            self.job.stop_file.touch()

    def _round(self, *, final: bool = False) -> None:
        """Put what is new and due.

        Args:
            final: whatever is new is due.
        """
        now = time.monotonic()
        if not final and now - self._asked_at >= STOP_SECONDS:
            self._asked_at = now
            if self.run.is_stopped(self.job.attempt):
                self.job.stop_file.touch()
        over, due = list[str](), dict[str, Path]()
        for name in self.writers.keys() - self._left:
            if not self._is_here(name):
                self._left.add(name)
                self._late = True
            elif (self._folder(name) / "result.json").exists():
                over.append(name)
            elif final or now - self._put_at.get(name, float("-inf")) >= PUT_SECONDS:
                due |= self._newest(name)
        if over or due:
            self._leave_lost()
            in_parallel(lambda name: self._put_left(name, self.writers[name]), {*over} - self._left, _LARGE_AT_ONCE)
            in_parallel(self._put_checkpoint, [one for one in due.items() if one[0] not in self._left], _LARGE_AT_ONCE)
            self._left |= {*over}
            self._remove_old()
        self._put_bundle(final)

    def _newest(self, name: str) -> dict[str, Path]:
        """The newest checkpoint of a student, if it is further than what is there."""
        found = checkpoints(self._folder(name) / CHECKPOINTS)
        there = {key.rpartition("/")[2] for key in self._there.get(name, ())}
        return {name: found[-1]} if found and found[-1].name not in there else {}

    def _put_checkpoint(self, one: tuple[str, Path]) -> None:
        name, path = one
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # two later ones have come meanwhile
            return
        failpoint("publisher.before_checkpoint")
        self.run.put(name, self.writers[name], f"{CHECKPOINTS}/{path.name}", data)
        failpoint("publisher.after_checkpoint")
        self._there.setdefault(name, []).append(f"{STUDENTS}/{name}/{self.writers[name]}/{CHECKPOINTS}/{path.name}")
        self._put_at[name] = time.monotonic()

    def _put_left(self, name: str, writer: str) -> None:
        for file in LEFT:
            path = self._folder(name) / file
            if path.exists():
                failpoint("publisher.before_left")
                self.run.put(name, writer, file, path.read_bytes())

    def _remove_old(self) -> None:
        """Two checkpoints of a student are kept, as in a folder."""
        old = [key for keys in self._there.values() for key in keys[:-2]]
        if old:
            self.run.root.delete_keys(old)
            self._there = {name: keys[-2:] for name, keys in self._there.items()}

    def _leave_lost(self) -> None:
        """Leave students that a later worker has taken over: the training finds that out by its fence."""
        ours = {name: self.writers[name] for name in self.writers.keys() - self._left}
        for name in self.run.later(ours, self.since):
            self.fences[name].leave()
            self._left.add(name)
            self._late = True

    def _is_here(self, name: str) -> bool:
        try:
            self.fences[name].check()
        except HeldError:
            return False
        return True

    # ---- how far the cohort is

    def _put_bundle(self, final: bool) -> None:
        now = time.monotonic()
        # What a late worker tells would be put over what the later one does, where Ray has started a job again.
        if self._late or (not final and now - self._bundled_at < self._pause):
            return
        files = self._files()
        if files != self._bundled:
            self._bundled_at = now
            self.run.bundle(self.job.name, files)
            self._bundled, self._pause = files, max(PUT_SECONDS, _BUNDLE_SHARE * (time.monotonic() - now))

    def _files(self) -> dict[str, str]:
        """What whoever watches is told, as text by path; of logs what came since this job began."""
        told = [f"control/{self.job.progress_file.name}"]
        told += [f"{STUDENTS}/{spec.name}/metrics.jsonl" for spec in self.job.students]
        files = {path: _text(self._place(path)) for path in told}
        files |= {
            path: self._before.get(path, "") + _text(self._place(path), at) for path, at in self._logs_from.items()
        }
        # Cohorts of a node share this one.
        lines = _text(self.job.renewed_file).splitlines(keepends=True)
        files["control/renewed.txt"] = "".join(line for line in lines if line.startswith(f"{self.job.name}: "))
        return {path: text for path, text in files.items() if text}

    def _log_paths(self) -> list[str]:
        return [f"logs/{name}.log" for name in (*(spec.name for spec in self.job.students), f"{self.job.name}.rank0")]

    def _place(self, path: str) -> Path:
        return Path(self.job.root).parent / path

    def _folder(self, name: str) -> Path:
        return Path(self.job.root) / name

    def _clear(self, name: str) -> None:
        """Remove what an earlier worker left of a student; who writes there stays, and so do locks."""
        folder = self._folder(name)
        for path in [*folder.iterdir(), *(folder / CHECKPOINTS).iterdir()]:
            if path.is_file() and path.name != "lock":
                path.unlink()
            elif path.is_dir() and path.parent == folder and path.name != CHECKPOINTS:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def publishing_logs(job: CohortJob, rank: int) -> Iterator[None]:
    """For the time of a block, a worker of a cohort: those other than rank 0 put their logs once, when they leave.

    That costs a read and a put, where there is something to tell. Of a worker that is killed they stay on its node.
    """
    logs = [*(job.log_of(spec.name, rank) for spec in job.students), Path(job.logs) / f"{job.name}.rank{rank}.log"]
    starts = [_size(log) for log in logs]
    try:
        yield
    finally:
        texts = {f"logs/{log.name}": _text(log, start) for log, start in zip(logs, starts, strict=True)}
        if job.run_uri is not None and rank > 0 and any(texts.values()):
            name, run = f"{job.name}.rank{rank}", RunObjects.at(job.run_uri)
            with contextlib.suppress(AkdError):
                before = run.bundled(name)  # of the same worker, before Ray started it again
                texts = {path: before.get(path, "") + text for path, text in texts.items()}
                run.bundle(name, {path: text for path, text in texts.items() if text})


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def _text(path: Path, start: int = 0) -> str:
    """What a file holds from some byte on; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read().decode(errors="backslashreplace")
    except FileNotFoundError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
