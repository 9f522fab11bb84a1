"""Students' metrics, forwarded to where people follow experiments: TensorBoard always, MLflow and W&B on request.

Nobody who trains knows of it. A thread of the driver reads each student's metrics.jsonl and forwards what a tracker
does not have yet, so that a slow or missing server slows no worker and workers need no credentials. How much a tracker
has it is asked itself: that is how a resumed run continues where it was, without a point too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import read_json, replace
from akd_dist.documents.damage import read_result
from akd_dist.tracking.status import read_metrics, written

TrackerName = Literal["mlflow", "wandb"]
POLL_SECONDS = 2.0
# A tracker that failed is tried again after a while, and once more at the end; there it may be silent for so long.
RETRY_SECONDS, PATIENCE_SECONDS = 30.0, 60.0
FAILURES_IN_ROW = 3

Record = dict[str, Any]


@dataclass(frozen=True)
class Tracked:
    """A student as trackers know it."""

    name: str
    """Its name within the run."""
    run: str
    """The name of the run."""
    folder: Path
    """Its folder, with metrics.jsonl and result.json."""
    params: dict[str, str | int | float | bool]
    """What tells it from the others."""
    recipe: str
    """What the recipe says of it, as text."""
    metric: str
    """The primary metric, by which trackers compare students."""

    @property
    def title(self) -> str:
        """What its tracker run is called."""
        return f"{self.run}/{self.name}"


class Log(Protocol):
    """Where one tracker keeps one student."""

    epochs: int
    """How many epochs it has."""
    ended: str | None
    """The end that it was told of last, as `end_of` says it."""

    def epoch(self, record: Record) -> None:
        """Take in the record of the next epoch."""

    def end(self, result: Record) -> None:
        """Take in how the student ended."""


class Tracker(Protocol):
    """One kind of tracker."""

    name: str
    """What it is called in messages."""

    def open(self, student: Tracked) -> Log:
        """Its log of a student, as far as it got before."""

    def close(self) -> None:
        """Let go of everything; `open` begins afresh, and asks again what is there."""


def scalars(record: Record) -> dict[str, float]:
    """The numbers of an epoch's record, under the names by which every tracker shows them."""
    named = {"train/loss": record["train_loss"], "schedule/lr": record["lr"]}
    named |= {f"schedule/{name}": record[name] for name in ("temperature", "phi", "psi")}
    named |= {f"validation/{name}": value for name, value in record["validation"].items()}
    return {name: float(value) for name, value in named.items() if value is not None}


def final_scalars(result: Record) -> dict[str, float]:
    """The numbers that a student ended with: its test metrics, and its agreement with the teacher."""
    named = {f"test/{name}": value for name, value in (result["test"] or {}).items()}
    if result["agreement"] is not None:
        named["test/agreement"] = result["agreement"]
    return {name: float(value) for name, value in named.items()}


def end_of(result: Record) -> str:
    """A student's end in short. One that failed is tried again, and may end again."""
    return f"{result['state']} after {result['epochs']} epochs" + (f": {result['reason']}" if result["reason"] else "")


# ---- TensorBoard


class TensorBoard:
    """An event file in each student's folder; written by tensorboardX, which needs neither torch nor TensorFlow."""

    name = "TensorBoard"

    def open(self, student: Tracked) -> Log:
        """What its event file holds."""
        return EventFile(student)

    def close(self) -> None:
        """Nothing is left open."""


class EventFile:
    """One student's event file. An epoch is one record of it, so that it holds an epoch or does not."""

    def __init__(self, student: Tracked) -> None:
        # One name for all attempts: a TensorBoard that is open goes on reading where it was.
        self.path = student.folder / "tensorboard" / "events.out.tfevents.akd-dist"
        self.epochs = 0
        self.ended: str | None = None
        if not self._take_stock():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self._write_head(student)

    def epoch(self, record: Record) -> None:
        """One event with all its numbers."""
        self._append(record["epoch"], [_scalar_summary(scalars(record))])
        self.epochs += 1

    def end(self, result: Record) -> None:
        """One event with the test metrics, where there are any, and the end as text."""
        from tensorboardX import summary

        told = _scalar_summary(final_scalars(result))
        told.MergeFrom(summary.text("end", end_of(result)))
        self._append(result["epochs"], [told])
        self.ended = end_of(result)

    def _write_head(self, student: Tracked) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        # What TensorBoard compares students by, and the recipe to read.
        compared = {f"{split}/{student.metric}": 0.0 for split in ("validation", "test")}
        self._append(0, [*summary.hparams(student.params, compared)])
        self._append(0, [summary.text("recipe", "    " + student.recipe.replace("\n", "\n    "))])

    def _append(self, step: int, summaries: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._write([Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries])

    def _write(self, events: Sequence[Any]) -> None:
        """Add events in one write. The file is opened for it alone: a fleet of thousands runs out of nothing."""
        import io

        from tensorboardX.record_writer import RecordWriter

        class InMemory(RecordWriter):  # type: ignore[misc]  # tensorboardX ships no types
            def __init__(self) -> None:
                self._writer = io.BytesIO()

        frames = InMemory()
        for event in events:
            frames.write(event.SerializeToString())
        with open(self.path, "ab") as file:
            file.write(frames._writer.getvalue())

    def _take_stock(self) -> bool:
        """See what is there and cut off what was written in part; False where the beginning is missing."""
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboardX.proto.event_pb2 import Event

        data = self.path.read_bytes() if self.path.exists() else b""
        events, whole = [], 0
        with contextlib.suppress(DecodeError):  # what follows a flipped byte is written again
            for content, end in _frames(data):
                events.append(Event.FromString(content))
                whole = end
        values = [value for event in events for value in event.summary.value]
        if not any(value.tag == "recipe/text_summary" for value in values):
            return False
        if whole < len(data):
            os.truncate(self.path, whole)
        self.epochs = sum(value.tag == "train/loss" for value in values)
        ends = [value.tensor.string_val[0].decode() for value in values if value.tag == "end/text_summary"]
        self.ended = ends[-1] if ends else None
        return True


def _frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of an event file with their ends: length (8 bytes), checksum (4), content, checksum (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        yield data[start + 12 : end - 4], end
        start = end


def _scalar_summary(numbers: dict[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])


# ---- MLflow


class MLflow:
    """An MLflow run for each student, in one experiment for the fleet.

    Where to is what MLFLOW_TRACKING_URI says, else files under the run's folder.

    Args:
        run: the run's folder.
    """

    name = "MLflow"

    def __init__(self, run: Path) -> None:
        self.run, self.key = run, run_key(run)
        self.client: Any = None
        self.found: dict[str, Any] = {}

    def open(self, student: Tracked) -> Log:
        """Its run of an earlier command, found by tag; a new one where there is none."""
        if self.client is None:
            self._connect()
        return MLflowLog(self, student, self.found.get(student.name))

    def _connect(self) -> None:
        """Find the fleet's experiment and all its runs, with one request each."""
        # MLflow itself would wait for minutes for a server that is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        uri = None
        if not mlflow.tracking.is_tracking_uri_set():  # type: ignore[no-untyped-call]
            uri = (self.run / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database; MLflow prefers one
        client = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", f"akd-dist/{self.run.name}")
        experiment = client.get_experiment_by_name(name)
        self.experiment = experiment.experiment_id if experiment else client.create_experiment(name)
        token: str | None = None
        while True:
            page = client.search_runs(
                [self.experiment], f"tags.`akd_dist.run` = '{self.key}'", max_results=1000, page_token=token
            )
            self.found |= {run.data.tags["akd_dist.student"]: run for run in page}
            if not (token := page.token):
                break
        self.client = client

    def close(self) -> None:
        """Forget what was found."""
        self.client, self.found = None, {}


class MLflowLog:
    """One student's MLflow run. How many epochs it has stands in a tag, which is sent with the metrics."""

    def __init__(self, tracker: MLflow, student: Tracked, found: Any | None) -> None:
        self.tracker, self.student, self.client = tracker, student, tracker.client
        tags = found.data.tags if found else {}
        self.id: str | None = found.info.run_id if found else None
        self.epochs = int(tags.get("akd_dist.epochs", 0))
        self.ended: str | None = tags.get("akd_dist.end")
        self.running = found is None or found.info.status == "RUNNING"

    def epoch(self, record: Record) -> None:
        """One request with all its numbers."""
        self._log(scalars(record), record["epoch"], {"akd_dist.epochs": str(self.epochs + 1)})
        self.epochs += 1

    def end(self, result: Record) -> None:
        """The test metrics, the end as a tag, and the run's status."""
        self._log(final_scalars(result), result["epochs"], {"akd_dist.end": end_of(result)})
        self.client.set_terminated(self.id, "FINISHED" if result["state"] == "done" else "FAILED")
        self.ended, self.running = end_of(result), False

    def _log(self, numbers: dict[str, float], step: int, tags: dict[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        self._begin()
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics, tags=[RunTag(name, value) for name, value in tags.items()])

    def _begin(self) -> None:
        from mlflow.entities import Param

        if self.id is None:
            tags = {"akd_dist.run": self.tracker.key, "akd_dist.student": self.student.name}
            run = self.client.create_run(self.tracker.experiment, run_name=self.student.title, tags=tags)
            self.id = run.info.run_id
        if self.epochs == 0:  # to say the same again does no harm
            params = [Param(name, str(value)) for name, value in self.student.params.items()]
            self.client.log_batch(self.id, params=params)
        if not self.running:
            self.client.update_run(self.id, "RUNNING")
        self.running = True


# ---- Weights & Biases


class Wandb:
    """A W&B run for each student, in one group for the fleet; WANDB_MODE, WANDB_PROJECT and the rest are honoured.

    Args:
        run: the run's folder; W&B's own files go to its folder `wandb`.
    """

    name = "W&B"

    def __init__(self, run: Path) -> None:
        self.run, self.key = run, run_key(run)
        self.logs: list[WandbLog] = []

    def open(self, student: Tracked) -> Log:
        """Its run of an earlier command, by its id; begun when there is something to send."""
        self.logs.append(WandbLog(self, student))
        return self.logs[-1]

    def close(self) -> None:
        """Finish the runs of students that have not ended: the next command continues them."""
        for log in self.logs:
            log.finish(0)
        self.logs.clear()


class WandbLog:
    """One student's W&B run. W&B cannot be asked while it is offline, so what it has is noted beside the student.

    It is noted when W&B has finished. A session that was killed has a part of what it was given, and nobody knows
    which: what it left offline is thrown away, and all since the last note is sent again. A server does that by itself:
    it refuses steps that it has.
    """

    def __init__(self, tracker: Wandb, student: Tracked) -> None:
        self.tracker, self.student = tracker, student
        self.id = hashlib.sha256(f"{tracker.key}/{student.name}".encode()).hexdigest()[:16]
        self.path = student.folder / "wandb.json"
        noted = read_json(self.path)
        if not isinstance(noted, dict) or noted.get("id") != self.id or not isinstance(noted.get("epochs"), int):
            noted = {}
        self.epochs: int = noted.get("epochs", 0)
        self.ended: str | None = noted.get("ended")
        self.run: Any = None
        # A note may come from elsewhere, with its run: nothing but a session of this student is deleted by its word.
        if re.fullmatch(rf"offline-run-\w+-{self.id}", session := str(noted.get("session"))):
            shutil.rmtree(tracker.run / "wandb" / session, ignore_errors=True)

    def epoch(self, record: Record) -> None:
        """One line of its history."""
        self._begin().log(scalars(record), step=record["epoch"])
        self.epochs += 1

    def end(self, result: Record) -> None:
        """The test metrics and the end as its summary."""
        self._begin().summary.update(final_scalars(result) | {"end": end_of(result)})
        self.ended = end_of(result)
        self.finish(0 if result["state"] == "done" else 1)

    def finish(self, code: int) -> None:
        """Let W&B send what it still has, and note that it has it."""
        if self.run is not None:
            self.run.finish(exit_code=code)
            self.run = None
            self._note(session=None)

    def _note(self, session: str | None) -> None:
        noted = {"id": self.id, "epochs": self.epochs, "ended": self.ended, "session": session}
        replace(self.path, json.dumps(noted).encode(), durable=False)

    def _begin(self) -> Any:
        if self.run is None:
            import wandb

            # Nothing of the machine's load, code or console: a run is a student, not a process.
            quiet = wandb.Settings(
                console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False, disable_code=True
            )
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "akd-dist"),
                dir=str(self.tracker.run),
                id=self.id,
                name=self.student.title,
                group=self.student.run,
                config=dict(self.student.params),
                resume="allow",
                reinit="create_new",
                settings=quiet,
            )
            self._note(Path(self.run.dir).parent.name)
        return self.run


# ---- which


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
        _check_wandb_login()


def _check_wandb_login() -> None:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return
    import wandb

    try:
        wandb.login()  # asks for the key in a terminal
    except wandb.errors.Error as error:
        raise RecipeError(
            "W&B does not know who you are",
            got=" ".join(str(error).split())[:200],
            expected="an API key, or WANDB_MODE=offline",
            next="wandb login",
        ) from None


def run_key(run: Path) -> str:
    """What a run is known by to trackers on other machines: drawn once, and anew when it is started over."""
    path = run / "trackers.json"
    noted = read_json(path)
    if not isinstance(noted, dict) or not isinstance(noted.get("key"), str):
        noted = {"key": secrets.token_hex(16)}
        replace(path, json.dumps(noted).encode())
    key: str = noted["key"]
    return key


# ---- forwarding


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
        if result is not None and end_of(result) != log.ended:
            log.end(result)
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
