"""Follows students' metrics.jsonl on a thread of the driver, and forwards what a tracker does not have yet."""

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from akd_dist.base.errors import RecipeError
from akd_dist.documents.damage import read_result
from akd_dist.tracking.mlflow import MLflow
from akd_dist.tracking.status import read_metrics, written
from akd_dist.tracking.tensorboard import TensorBoard
from akd_dist.tracking.trackers import Log, Tracked, Tracker, TrackerName, end_of
from akd_dist.tracking.wandb import Wandb, check_login

POLL_SECONDS = 2.0
# A tracker that failed is tried again after a while.
RETRY_SECONDS = 30.0
# It is tried once more at the end, where it may be silent for so long.
PATIENCE_SECONDS = 60.0
# A tracker that takes none of so many students in a row is gone: each of thousands would wait for it in vain.
FAILURES_IN_ROW = 3
TRACKERS: dict[str, Callable[[Path], Tracker]] = {"mlflow": MLflow, "wandb": Wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that cannot work, before anything begins.

    Raises:
        RecipeError: there is no such tracker, its package is missing, or it does not know who you are.
    """
    for name in names:
        if name not in get_args(TrackerName):
            raise RecipeError("no such tracker", got=name, expected=" or ".join(get_args(TrackerName)))
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"the tracker {name} is not installed",
                got=f"no package {name}",
                expected=f"the extra akd-dist[{name}]",
                next=f"pip install 'akd-dist[{name}]'",
            )
    if "wandb" in names:
        check_login()


@dataclass
class Follower:
    """Forwards what students have done to one tracker, on a thread of its own."""

    tracker: Tracker
    students: Sequence[Tracked]
    tell: Callable[[str], None]
    """Called once with what went wrong."""
    logs: dict[str, Log] = field(default_factory=dict)
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What each student's files were when all of them was forwarded."""
    failure: str | None = None
    over: threading.Event = field(default_factory=threading.Event)
    sent_at: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Begin to follow."""
        self.thread = threading.Thread(target=self._run, name=f"{self.tracker.name} follower", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Forward what is left, as long as the tracker answers; what it did not take, it gets from the next command."""
        self.sent_at = time.monotonic()
        self.over.set()
        while self.thread.is_alive() and time.monotonic() - self.sent_at < PATIENCE_SECONDS:
            self.thread.join(0.1)
        if self.thread.is_alive() or self.failure is not None:
            self.tell(f"{self.tracker.name} does not have everything yet: the same command again forwards the rest")

    def forward(self) -> None:
        """Forward everything that the tracker does not have.

        Raises:
            Exception: whatever the tracker raised for the first student that it did not take; the others it has. If it
                takes none of the first FAILURES_IN_ROW, it is gone, and not asked for the rest.
        """
        first: Exception | None = None
        in_row = 0
        for student in self.students:
            stamp = (written(student.folder / "metrics.jsonl"), written(student.folder / "result.json"))
            # Two looks at the file system instead of reading and parsing: a fleet may have thousands of students that
            # have ended.
            if stamp == (0, 0) or self.stamps.get(student.name) == stamp:
                continue
            try:
                self._forward(student)
                self.stamps[student.name], in_row = stamp, 0
            except Exception as error:
                first, in_row = first or error, in_row + 1
                if in_row == FAILURES_IN_ROW:
                    break
        if first is not None:
            raise first

    def _forward(self, student: Tracked) -> None:
        if student.name not in self.logs:
            self.logs[student.name] = self.tracker.open(student)
        log = self.logs[student.name]
        result = read_result(student.folder)
        for record in read_metrics(student.folder)[log.epochs :]:
            log.epoch(record)
            self.sent_at = time.monotonic()
        if result is not None and end_of(result.plain()) != log.ended:
            log.end(result.plain())
            self.sent_at = time.monotonic()

    def _run(self) -> None:
        while not self.over.wait(POLL_SECONDS if self.failure is None else RETRY_SECONDS):
            self._try()
        self._try()
        with contextlib.suppress(Exception):
            self.tracker.close()

    def _try(self) -> None:
        try:
            self.forward()
            self.failure = None
        except Exception as error:
            self.logs.clear()  # what was half sent is asked for again
            with contextlib.suppress(Exception):
                self.tracker.close()
            if self.failure is None:
                said = " ".join(str(error).split())[:200]
                self.tell(
                    f"{self.tracker.name} failed, and training goes on without it: {type(error).__name__}: {said}"
                )
            self.failure = str(error)


@contextlib.contextmanager
def forwarding(
    run: Path, students: Sequence[Tracked], names: Sequence[str], tell: Callable[[str], None]
) -> Iterator[None]:
    """Forward what students do during the block to TensorBoard and to the named trackers, and the rest at its end."""
    trackers: list[Tracker] = [TensorBoard(), *(TRACKERS[name](run) for name in dict.fromkeys(names))]
    followers = [Follower(tracker, students, tell) for tracker in trackers]
    for follower in followers:
        follower.start()
    try:
        yield
    finally:
        for follower in followers:
            follower.finish()
