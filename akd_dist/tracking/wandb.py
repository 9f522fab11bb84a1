"""A run of Weights & Biases for each student."""

import hashlib
import importlib
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import read_json, replace
from akd_dist.tracking.trackers import Log, Record, Tracked, end_of, final_scalars, run_key, scalars

_WRITTEN_SECONDS = 10.0
"""So long is waited for W&B's own process to write a file of some kilobytes; it takes milliseconds."""


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
        """Let W&B send what it still has, and note that it has it.

        Offline, W&B says that it has finished before its own process has written the file: until that is whole, the
        session counts as one that was killed.
        """
        if self.run is not None:
            run, self.run = self.run, None
            run.finish(exit_code=code)
            if run.disabled or not run.offline or _comes_to_its_end(Path(run.settings.sync_file)):
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


def _comes_to_its_end(file: Path) -> bool:
    """Wait until W&B's own process has written a session's file; whether it has."""
    until = time.monotonic() + _WRITTEN_SECONDS
    while not _is_whole(file):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _is_whole(file: Path) -> bool:
    """Whether a session's file ends as that of a run that has finished."""
    record_of: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    records = list(records_of(file.read_bytes()))
    return bool(records) and bool(record_of.FromString(records[-1]).HasField("exit"))


def records_of(data: bytes) -> Iterator[bytes]:
    """The whole records of W&B's file, a LevelDB log: blocks of 32 KiB, chunks of checksum, length, type, content."""
    record, position, block = b"", 7, 32 * 1024
    while position + 7 <= len(data):
        if block - position % block < 7:  # no chunk begins there
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # whole, or its last part
            yield record
            record = b""


def check_login() -> None:
    """Refuse, before anything begins, where W&B would be asked for and does not know who you are."""
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
