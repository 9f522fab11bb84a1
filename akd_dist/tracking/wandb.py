"""A run of Weights & Biases for each student."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import read_json, replace
from akd_dist.tracking.trackers import Log, Record, Tracked, end_of, final_scalars, run_key, scalars


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
