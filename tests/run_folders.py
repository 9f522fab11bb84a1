"""Folders of runs as drivers and workers leave them, made up for the tests of `status`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from akd_dist import cli
from akd_dist.documents.status import CohortProgress, FleetPlan, StatusDocument, StudentProgress
from akd_dist.tracking.status import write_document


def planned(name: str, **changes: Any) -> StudentProgress:
    return StudentProgress.model_validate({"name": name, "state": "waiting", "epochs": 4, "steps_total": 40} | changes)


def a_run(run: Path, *names: str, at: float | None = None, **changes: Any) -> None:
    """What a driver leaves while it trains."""
    plan = {"attempt": 2, "at": time.time() if at is None else at, "metric": "accuracy", "cohorts": []}
    students = [planned(name) for name in names]
    write_document(run / "control" / "plan.json", FleetPlan.model_validate(plan | {"students": students} | changes))


def tell(run: Path, cohort: str, *students: StudentProgress) -> None:
    """What a worker leaves."""
    document = CohortProgress(training=True, at=time.time(), students=list(students))
    write_document(run / "control" / f"progress-cohort-{cohort}.json", document)


def leave(run: Path, name: str, *, result: dict[str, Any] | None = None, checkpoint: str | None = None) -> None:
    folder = run / "students" / name
    (folder / "checkpoints").mkdir(parents=True)
    record = {"epoch": 0, "stage": "annealing", "temperature": 3, "train_loss": 0.5, "validation": {"accuracy": 0.25}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(a_result(name, **result)))
    if checkpoint is not None:
        (folder / "checkpoints" / f"{checkpoint}.ckpt").touch()


def a_result(name: str, **changes: Any) -> dict[str, Any]:
    """What a student leaves when it ends."""
    ended = {
        "name": name, "model": "mlp-8", "parameters": 610, "objective": "annealing_kd", "tau_max": 3, "seed": 0,
        "state": "done", "reason": None, "epochs": 4, "validation": {"accuracy": 0.75}, "test": {"accuracy": 0.7},
        "agreement": 0.8, "seconds": 1.0, "stage1_from": None, "attempt": 1, "path": ".",
    }  # fmt: skip
    return ended | changes


def a_fleet(*students: str) -> dict[str, Any]:
    """What a run that is done leaves."""
    entries = [a_result(name) | {"store": "../stores/id", "teacher": "ab"} for name in students]
    teacher = {"model": "cnn-8", "parameters": 1, "test": {"accuracy": 0.9}, "fingerprint": "ab"}
    known = {"run": ".", "store": "../stores/id", "task": "classification", "metric": "accuracy", "teacher": teacher}
    return known | {"students": entries, "cohorts": 1, "seconds": 1.0}


def by_name(status: StatusDocument) -> dict[str, StudentProgress]:
    return {student.name: student for student in status.students}


def status_of(run: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(run), *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
