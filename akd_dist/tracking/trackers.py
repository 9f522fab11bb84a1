"""What all trackers share: the student that they are told of, its numbers and its end, and what a tracker has to do.

A thread of the driver forwards metrics (`follower`), so that a slow or missing server slows no worker and workers need
no credentials. How much a tracker has already is asked of the tracker itself: that is how a resumed run goes on where
it was, with no point missing and none twice.
"""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from akd_dist.base.files import read_json, replace

TrackerName = Literal["mlflow", "wandb"]
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


def run_key(run: Path) -> str:
    """What a run is known by to trackers on other machines: drawn once, and anew when it is started over."""
    path = run / "trackers.json"
    noted = read_json(path)
    if not isinstance(noted, dict) or not isinstance(noted.get("key"), str):
        noted = {"key": secrets.token_hex(16)}
        replace(path, json.dumps(noted).encode())
    key: str = noted["key"]
    return key
