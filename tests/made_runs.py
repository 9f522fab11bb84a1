"""Runs made up for the tests of reports, in the form that training leaves them; and what a page may hold."""

from __future__ import annotations

import html
import html.parser
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from akd_dist import cli
from akd_dist.base.formatting import SHOWN
from akd_dist.data.predictions import encode_predictions
from akd_dist.distill.objectives import stages
from akd_dist.documents.fleet import EpochRecord, FleetDocument, FleetStudent
from akd_dist.recipe import AdamW, ContinuationKD
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import SeedGroup, group_students
from akd_dist.reporting.tables import fleet_table

TRAINED: dict[str, Any] = {"optimizer": AdamW(lr=0.1)}
TAU, STAGE1, STAGE2 = 4, 12, 8
ACCURACY, PEARSON = SHOWN["accuracy"], SHOWN["pearson"]
(CONTINUATION,) = stages(ContinuationKD(epochs=STAGE1 + STAGE2, tau_max=TAU))


def student(model: str, objective: str, seed: int, accuracy: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    tau = TAU if objective in ("annealing_kd", "continuation_kd") else None
    middle = f"-t{tau}" if tau else ""
    done = accuracy is not None
    entry: dict[str, Any] = {
        "name": f"{model.replace('/', '')}-{objective}{middle}-s{seed}",
        "model": model,
        "parameters": 75 * int(model.split("-")[-1]) + 10,
        "objective": objective,
        "tau_max": tau,
        "seed": seed,
        "state": "done" if done else "diverged",
        "reason": None if done else "the loss was not finite at epoch 3",
        "epochs": STAGE1 + STAGE2 if done else 3,
        "validation": {"accuracy": accuracy} if done else None,
        "test": {"accuracy": accuracy} if done else None,
        "agreement": accuracy,
        "seconds": 2.5,
        "path": f"students/{model}",
        "store": "stores/0f",
        "teacher": "7c",
    }
    return entry | changes


def grouped(students: Iterable[dict[str, Any]]) -> list[SeedGroup]:
    return group_students(map(FleetStudent.model_validate, students))


def fleet_of(*students: dict[str, Any]) -> dict[str, Any]:
    teacher = {"model": "cnn-32", "parameters": 20_000, "test": {"accuracy": 0.98}, "fingerprint": "7c" * 32}
    return {
        "run": "runs/digits",
        "store": "stores/0f",
        "task": "classification",
        "metric": "accuracy",
        "teacher": teacher,
        "students": list(students),
        "cohorts": 1,
        "seconds": 61.0,
    }


def small_fleet() -> dict[str, Any]:
    """Four sizes, two objectives, three seeds; one student diverged and one failed."""
    students = [
        student(f"mlp-{width}", objective, seed, 0.985 - gap / width - 0.003 * seed)
        for width in (8, 16, 32, 64)
        for objective, gap in (("annealing_kd", 0.5), ("hard_labels", 0.8))
        for seed in range(3)
    ]
    students[5] = student("mlp-8", "hard_labels", 2, None)
    students[8] = student("mlp-16", "annealing_kd", 2, None, state="failed", reason="no memory; see logs/a.log")
    return fleet_of(*students)


def regression_of(fleet: dict[str, Any]) -> dict[str, Any]:
    """The same fleet as if it were one of a regression, its accuracies Pearson's correlations."""
    told = json.loads(json.dumps(fleet).replace('"accuracy": 0', '"pearson": 0'))
    for entry in told["students"]:
        entry["agreement"] = None
    return dict(told, task="regression", metric="pearson")


def stage_of(entry: dict[str, Any], epoch: int) -> str:
    if entry["objective"] == "annealing_kd":
        return "annealing" if epoch < STAGE1 else "hard_labels"
    return {"kd": "kd", "takd": "kd", "continuation_kd": "continuation"}.get(entry["objective"], "hard_labels")


def epochs_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Made-up epochs in the shape that training writes; only the schedules are the true ones."""
    records = []
    for epoch in range(entry["epochs"]):
        stage = stage_of(entry, epoch)
        temperature = max(1, TAU - epoch * TAU // STAGE1) if stage == "annealing" else None
        phi = 1 - (temperature - 1) / TAU if temperature else None
        if stage == "continuation":
            temperature, phi = CONTINUATION.temperature(epoch), CONTINUATION.phi(epoch)
        records.append(
            {
                "epoch": epoch,
                "stage": stage,
                "stage_epoch": epoch - STAGE1 if stage == "hard_labels" and entry["tau_max"] is not None else epoch,
                "temperature": temperature,
                "phi": phi,
                "psi": CONTINUATION.psi(epoch) if stage == "continuation" else None,
                "lr": 0.1,
                "train_loss": (1 + 0.1 * entry["seed"]) * math.exp(-epoch / 6) * 800 / entry["parameters"] ** 0.8,
                "validation": {"accuracy": 0.97 - 0.6 * math.exp(-epoch / 3) - 8 / entry["parameters"], "loss": 0.2},
                "seconds": 0.1,
            }
        )
    return records


def records_of(entry: dict[str, Any]) -> list[EpochRecord]:
    return [EpochRecord.model_validate(record) for record in epochs_of(entry)]


def write_run(folder: Path, fleet: dict[str, Any] | None = None) -> dict[str, Any]:
    fleet = fleet or small_fleet()
    for entry in fleet["students"]:
        path = folder / "students" / entry["name"] / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in epochs_of(entry)))
    (folder / "fleet.json").write_text(json.dumps(fleet))
    return fleet


def run_of(fleet: dict[str, Any], **changes: Any) -> Run:
    """A run that left no files beside its fleet.json and metrics."""
    metrics = {entry["name"]: records_of(entry) for entry in fleet["students"]}
    return Run(Path(fleet["run"]), FleetDocument.model_validate(fleet), metrics, **changes)


def printed(fleet: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(fleet_table(FleetDocument.model_validate(fleet)))
        return console.export_text()


# --- the page ---------------------------------------------------------------------------------------------------------


# Attributes whose value a browser fetches or goes to.
LOADING = (
    "src",
    "srcset",
    "href",
    "xlink:href",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "ping",
    "cite",
)


class Page(html.parser.HTMLParser):
    """Collects what a browser would load or run, ids, and whether tags balance."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.styles: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in LOADING and value:
                self.references.append(value)
            elif name == "style" and value:
                self.styles.append(value)
            assert not name.startswith("on"), f"an event handler: {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check_offline(text: str) -> None:
    """Nothing in a page is loaded from anywhere, nothing runs, and its tags balance."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "image", "base", "form", "foreignobject"} & set(
        page.tags
    )
    assert all(reference.startswith("#") for reference in page.references)
    assert {f"#{name}" for name in re.findall(r' id="([^"]+)"', text)} >= set(page.references)
    assert not re.search(r"url\((?![\"']?#)", text)
    assert "@import" not in text
    assert 'http-equiv="refresh"' not in text
    assert "default-src 'none'" in text
    # Namespace names are the only addresses, and nobody fetches those.
    assert set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def temperatures(seeds: int) -> dict[str, Any]:
    """Two temperatures and from scratch; τ 8 is better by 0.01, 0.02, ... than τ 2, seed by seed."""
    made = []
    for seed in range(seeds):
        base = 0.8 + 0.03 * seed * (-1) ** seed
        for tau, score in ((2, base), (8, base + 0.01 * (seed + 1))):
            name = f"mlp-8-annealing_kd-t{tau}-s{seed}"
            made.append(student("mlp-8", "annealing_kd", seed, score, tau_max=tau, name=name))
        made.append(student("mlp-8", "hard_labels", seed, base - 0.05))
    return fleet_of(*made)


# --- where student and teacher differ ---------------------------------------------------------------------------------


def leave(folder: Path, entry: dict[str, Any], label: Any, said: Any, teacher: Any) -> None:
    columns = {"row": np.arange(len(label)), "label": label, "student": said, "teacher": teacher}
    path = folder / "students" / entry["name"] / "test.parquet"
    path.write_bytes(encode_predictions(columns))


def report_of(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


# --- several runs -----------------------------------------------------------------------------------------------------


def two_runs(root: Path) -> list[Path]:
    for name, shift in (("one", 0.0), ("two", 0.01)):
        fleet = fleet_of(*(student("mlp-8", "kd", seed, 0.8 + 0.03 * seed + shift) for seed in range(3)))
        fleet["run"] = f"runs/{name}"
        write_run(root / name, fleet)
        (root / name / "identity.json").write_text(
            json.dumps({"teacher": {}, "dataset": {"test": "ab"}, "students": {}})
        )
    return [root / "one", root / "two"]
