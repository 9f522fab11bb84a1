"""Classifiers of 100,000 classes from a store that describes logits: what a step takes, and what stays off the disk.

    python benchmarks/many_classes.py                         100,000 classes, a table; --json prints a document
    python benchmarks/many_classes.py --classes 20000         another number

Every objective is measured in a process of its own, on a batch that a stream would give: seconds of a step, and what a
step adds to the peak of memory beyond the state of the student. The same from logits that are stored whole stands
beside it, and the bare step of torch: its own cross-entropy to the labels.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from akd_dist import recipe as recipes
from akd_dist.base.files import sha256
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_targets import unsaid
from akd_dist.distill.metrics import evaluate
from akd_dist.distill.stream import Batch
from akd_dist.distill.student import Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic

ENCODING = recipes.EncodingSpec(kind="top_k", k=16, rank=16).config()
OBJECTIVES: dict[str, dict[str, Any]] = {
    "labels": {"kind": "hard_labels", "epochs": 1},
    "kd": {"kind": "kd", "epochs": 1, "temperature": 2.0},
    "annealing, squared": {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": 4, "stage2_epochs": 0},
    "annealing, cross-entropy": {
        "kind": "annealing_kd",
        "tau_max": 4,
        "stage1_epochs": 4,
        "stage2_epochs": 0,
        "stage1_loss": "cross_entropy",
    },
    "continuation": {"kind": "continuation_kd", "tau_max": 4, "epochs": 100},
}
STEPS = 5


def rows_of(classes: int, count: int) -> Rows:
    """Rows of 32 numbers, and any labels."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(count, 32)).astype(np.float32)
    labels = generator.integers(classes, size=count)
    return Rows(inputs, labels, classes, sha256(inputs.tobytes()), (), Path())


def measure(classes: int, batch: int, width: int, objective: str, described: bool) -> dict[str, float]:
    """Seconds of a step and of a row's evaluation, and bytes of peak memory, in a process that has done nothing yet."""
    device, rows = set_deterministic("cpu", 1), rows_of(classes, 512)
    spec = recipes.StudentSpec.model_validate(
        {
            "name": "student",
            "model": {"kind": "mlp", "hidden": width},
            "objective": OBJECTIVES[objective],
            "optimizer": {"kind": "sgd", "lr": 1e-3},
            "batch": batch,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        student = Student(spec, ModelCard.of(spec.model, rows, None), Path(folder), device=device)
        inputs, labels = torch.from_numpy(rows.inputs[:batch].copy()), torch.from_numpy(rows.labels[:batch].copy())
        place: dict[str, Any] = {"targets": unsaid(np.ones(batch, np.int64), classes, ENCODING, "cpu")}
        if not described:
            place = {"targets": None}
        logits = None if described else torch.zeros(batch, classes, dtype=torch.float16)
        made = Batch(0, 0, np.arange(batch), inputs, labels, logits, batch, **place)
        # The state that it keeps is there after an optimizer has stepped once.
        for parameter in student.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        student.optimizer.step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        student.take_step(made, 1 << 30)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        started = time.perf_counter()
        for _ in range(STEPS):
            student.take_step(made, 1 << 30)
        step = (time.perf_counter() - started) / STEPS
        started = time.perf_counter()
        evaluate(student.module, rows, device)
        evaluated = (time.perf_counter() - started) / len(rows)
        added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"step": step, "peak": 1024 * peak, "evaluated": evaluated, "with_evaluation": 1024 * added}


@click.command()
@click.option("--classes", default=100_000)
@click.option("--batch", default=256)
@click.option("--width", default=256, help="Numbers that the last layer takes.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--one", hidden=True)
def main(classes: int, batch: int, width: int, as_json: bool, one: str | None) -> None:
    """Print the table."""
    if one is not None:
        objective, _, how = one.rpartition("/")
        print(json.dumps(measure(classes, batch, width, objective, how == "described")))
        return
    found: dict[str, dict[str, float]] = {}
    sizes = ["--classes", str(classes), "--batch", str(batch), "--width", str(width)]
    for how in ("described", "whole"):
        for objective in OBJECTIVES:
            command = [sys.executable, __file__, *sizes, "--one", f"{objective}/{how}"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{objective}/{how}"] = json.loads(answer)
    if as_json:
        print(json.dumps({"classes": classes, "batch": batch, "width": width, "found": found}, indent=1))
        return
    one_array = 4 * batch * classes
    print(f"{classes:,} classes, batches of {batch}, one array of logits: {one_array / 1e6:.0f} MB in float32")
    for name, said in found.items():
        arrays = said["peak"] / one_array
        print(
            f"{name:<36} {said['step'] * 1e3:7.0f} ms a step, {said['peak'] / 1e6:6.0f} MB more ({arrays:.1f} arrays), "
            f"{said['evaluated'] * 1e3:.2f} ms a row evaluated, {said['with_evaluation'] / 1e6:.0f} MB with that"
        )


if __name__ == "__main__":
    main()
