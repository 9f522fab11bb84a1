"""Classifiers of 100,000 classes from a store that describes logits: what a step takes, and what stays off the disk.

    python benchmarks/many_classes.py                         100,000 classes, a table; --json prints a document
    python benchmarks/many_classes.py --classes 20000         another number
    python benchmarks/many_classes.py --caching               what a store takes once, and what a row of it takes
    python benchmarks/many_classes.py --journey               whole commands, from caching to a report

Every objective is measured in a process of its own, on a batch that a stream would give: CPU time of a step, and what
it adds to the peak of memory beyond the state of the student. The same from logits that are stored whole stands beside
it. `ratio` is to the bare step of torch in the same process, taken in turns: the same model, torch's own cross-entropy
to the labels, the same optimizer.

`--caching` asks a teacher of random weights for what is stored of rows, in batches as caching tasks do, in CPU time
beside the bare teacher with its head on the same batches; and for what a store takes once, before the first row: its
dictionary, and the card that says how well it describes. These do not grow with the rows beyond some thousand.

`--journey` runs akd-dist's commands on made rows, each in processes of its own: CPU time, and the peak of memory of the
largest of these processes beyond that of one that has only imported torch. Beside caching stands a loop of the
same teacher over the same rows, beside training one of the same student with labels. Rows are few for that many
classes: what grows with rows x classes or with classes x classes would show in the peak.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from akd_dist import recipe as recipes
from akd_dist.base.files import sha256
from akd_dist.base.memory import keep_freed_memory
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_targets import unsaid
from akd_dist.distill.cards import MEASURED, card_of, tail_dictionary
from akd_dist.distill.metrics import evaluate
from akd_dist.distill.stream import Batch
from akd_dist.distill.student import Student
from akd_dist.distill.target_shards import dictionary_of_probe, drawn_rows
from akd_dist.distill.target_teacher import WideTeacher
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import save_model
from akd_dist.storage.top_k import Described, top_k_from_config

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
EPOCHS, LABELS = 2, 300


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
        started = time.process_time()
        evaluate(student.module, rows, device)
        evaluated = (time.process_time() - started) / len(rows)
        added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        steps, bare = in_turns(lambda: student.take_step(made, 1 << 30), bare_step(spec, rows, inputs, labels))
    ratio = statistics.median(one / other for one, other in zip(steps, bare, strict=True))
    return {
        "step": statistics.median(steps), "bare": statistics.median(bare), "ratio": ratio, "peak": 1024 * peak,
        "evaluated": evaluated, "with_evaluation": 1024 * added,
    }  # fmt: skip


def bare_step(
    spec: recipes.StudentSpec, rows: Rows, inputs: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    """A step of torch alone, of the same model and optimizer."""
    module = build(ModelCard.of(spec.model, rows, None), seed=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=spec.optimizer.lr)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    return step


def in_turns(*acts: Callable[[], object]) -> list[list[float]]:
    """Seconds of CPU time that each takes, one after the other."""
    found: list[list[float]] = [[] for _ in acts]
    for _ in range(STEPS):
        for seconds, act in zip(found, acts, strict=True):
            began = time.process_time()
            act()
            seconds.append(time.process_time() - began)
    return found


# ---- caching: what is made once, and what each row takes


def caching(classes: int, width: int, rows: int = 6_000, repeats: int = 3) -> dict[str, float]:
    """CPU seconds of one thread: of a row by the bare teacher and as it is stored, and of what a store has once."""
    keep_freed_memory()
    set_deterministic("cpu", 1)
    given, cache = rows_of(classes, rows), recipes.CacheSpec.model_validate({"encoding": {"kind": "top_k"}})
    card = ModelCard.of(recipes.Mlp(kind="mlp", hidden=width), given, None)
    teacher = WideTeacher(build(card, seed=1).eval(), given, cache, rows, recipes.NoAugmentation(), 0)
    top_k = top_k_from_config(cache.encoding.config())
    found: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = act()
        found[name] = min(found.get(name, math.inf), time.process_time() - began)
        return made

    fitted, others = drawn_rows(given, top_k)
    made = timed("dictionary", lambda: dictionary_of_probe(teacher.probe(fitted), top_k, teacher.chunk))
    timed("card", lambda: card_of(teacher, others, top_k, made))
    tensors, batches = tail_dictionary(made, top_k, teacher.device), list(teacher.batches(0, 0, min(rows, 1024)))

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                teacher.module(batch.inputs)

    def stored() -> None:
        for batch in batches:
            described = teacher.described(batch, top_k.k, top_k.tail_temperatures, tensors)
            top_k.pack(Described(**described.arrays()), classes)

    for _ in range(repeats):
        timed("bare", bare)
        timed("stored", stored)
    asked = sum(len(batch.targets) for batch in batches)
    return found | {"fitted": len(fitted), "measured": MEASURED, "bare": found["bare"] / asked,
                    "stored": found["stored"] / asked, "ratio": found["stored"] / found["bare"]}  # fmt: skip


def print_caching(found: dict[str, float]) -> None:
    """What is paid once, and by the row."""
    bare, stored = f"{found['bare'] * 1e3:.2f} ms", f"{found['stored'] * 1e3:.2f} ms"
    print(f"a row: {bare} by the teacher with its head, {stored} as it is stored ({found['ratio']:.2f} times)")
    print(
        f"once a store: {found['dictionary']:.1f} s for the dictionary, of {found['fitted']:,.0f} rows, and "
        f"{found['card']:.1f} s for the card, of {found['measured']:,.0f}"
    )


# ---- whole commands


def journey(classes: int, width: int, rows: int) -> dict[str, Any]:
    """All commands in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        recipe_of(at, classes, width, rows)
        environment = {"AKD_DIST_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        loops = [sys.executable, __file__, "--classes", str(classes), "--width", str(width)]
        akd_dist = [sys.executable, "-m", "akd_dist.cli"]
        student = "runs/many_classes/students/student"
        commands = {
            "torch alone": [sys.executable, "-c", "import torch"],
            "the teacher in a loop": [*loops, "--loop", f"{folder}/teacher"],
            "cache-teacher": [*akd_dist, "cache-teacher", "recipe.yaml"],
            "a student in a loop": [*loops, "--loop", f"{folder}/student"],
            "train-students": [*akd_dist, "train-students", "recipe.yaml"],
            "evaluate": [*akd_dist, "evaluate", student, "recipe.yaml"],
            "predict": [*akd_dist, "predict", student, "recipe.yaml", "--out", "said.parquet"],
            "report": [*akd_dist, "report", "runs/many_classes"],
        }
        found = {name: measured(command, at, environment) for name, command in commands.items()}
        apart = subprocess.run(
            [*loops, "--caching", "--json"], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        ).stdout
        stored = sum(file.stat().st_size for file in at.glob("stores/*/arrays.zarr/**/*") if file.is_file())
    return {"classes": classes, "rows": rows, "width": width, "stored": stored, "found": found,
            "caching": json.loads(apart)}  # fmt: skip


def recipe_of(folder: Path, classes: int, width: int, count: int) -> None:
    """Rows in Parquet, a teacher of random weights, and a recipe of one student."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(count, 32)).astype(np.float32)
    # Of few classes, however many there are, so that each has train rows.
    labels = generator.integers(LABELS, size=count) * (classes // LABELS)
    table = {"input": list(inputs), "label": labels}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    rows = Rows(inputs, labels, classes, sha256(inputs.tobytes()), (), folder)
    card = ModelCard.of(recipes.Mlp(kind="mlp", hidden=width), rows, None)
    save_model(folder / "teacher", build(card, seed=1), card)
    document = {
        "name": "many_classes",
        "data": {"train": {"kind": "parquet", "path": "rows.parquet", "classes": classes}},
        "teacher": {"weights": "teacher"},
        "cache": {"encoding": {"kind": "top_k"}},
        "students": [
            {"name": "student", "model": {"kind": "mlp", "hidden": width}, "batch": 256,
             "objective": {"kind": "kd", "epochs": EPOCHS, "temperature": 2.0}, "optimizer": {"kind": "sgd", "lr": 0.1}}
        ],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(document))


def loop(folder: Path, classes: int, width: int) -> None:
    """What one would write by hand: the teacher asked of all rows once, or a student trained with labels."""
    torch.set_num_threads(1)
    table = pq.read_table(folder.parent / "rows.parquet")
    inputs = torch.tensor(np.stack(table["input"].to_numpy()))
    labels = torch.tensor(table["label"].to_numpy())
    module = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.ReLU(), torch.nn.Linear(width, classes))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train = len(inputs) * 7 // 10
    for epoch in range(EPOCHS if folder.name == "student" else 0):
        for rows in torch.split(torch.randperm(train, generator=torch.Generator().manual_seed(epoch)), 256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        said(module, inputs[train:])
    if folder.name == "teacher":
        said(module, inputs)


@torch.inference_mode()
def said(module: torch.nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The class that a model chooses for each row."""
    return [module(some).argmax(1) for some in torch.split(inputs, 256)]


def measured(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """CPU seconds of a command with all its processes, and the peak of the largest of them in bytes."""
    code = (
        "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(json.dumps({'code': done.returncode, "
        "'seconds': used.ru_utime + used.ru_stime, 'peak': 1024 * used.ru_maxrss}))"
    )
    asked = [sys.executable, "-c", code, *command]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    given = {**os.environ, **environment, **paths}
    answer = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=given).stdout
    found: dict[str, float] = json.loads(answer)
    if found.pop("code"):
        raise SystemExit(f"{' '.join(command)} failed")
    return found


def print_journey(done: dict[str, Any]) -> None:
    """The table of whole commands."""
    found, classes, rows = done["found"], done["classes"], done["rows"]
    array = 4 * classes * rows
    print(f"{classes:,} classes, {rows:,} rows: [rows, classes] in float32 would be {array / 1e9:.1f} GB")
    dense = 2 * classes * rows
    print(f"stores: {done['stored'] / 1e6:.1f} MB, {done['stored'] / dense:.2%} of logits in float16")
    beside = {"cache-teacher": "the teacher in a loop", "train-students": "a student in a loop"}
    for name, one in found.items():
        more = (one["peak"] - found["torch alone"]["peak"]) / 1e6
        ratio = f", {one['seconds'] / found[beside[name]]['seconds']:.2f} times the loop" if name in beside else ""
        print(f"{name:<24} {one['seconds']:7.1f} s, {more:6.0f} MB more than torch alone{ratio}")
    print_caching(done["caching"])


@click.command()
@click.option("--classes", default=100_000)
@click.option("--batch", default=256)
@click.option("--width", default=256, help="Numbers that the last layer takes.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--journey", "whole", is_flag=True, help="Whole commands, of 6,000 rows.")
@click.option("--caching", "apart", is_flag=True, help="What a store takes once, and what each of its rows takes.")
@click.option("--one", hidden=True)
@click.option("--loop", "looped", hidden=True)
def main(
    classes: int, batch: int, width: int, as_json: bool, whole: bool, apart: bool, one: str | None, looped: str | None
) -> None:
    """Print the table."""
    if apart:
        found_apart = caching(classes, width)
        print(json.dumps(found_apart)) if as_json else print_caching(found_apart)
        return
    if looped is not None:
        loop(Path(looped), classes, width)
        return
    if whole:
        done = journey(classes, width, 6_000)
        print(json.dumps(done, indent=1)) if as_json else print_journey(done)
        return
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
    for name, one_of in found.items():
        arrays = one_of["peak"] / one_array
        print(
            f"{name:<36} {one_of['step'] * 1e3:7.0f} ms a step ({one_of['ratio']:.2f} times torch with labels), "
            f"{one_of['peak'] / 1e6:6.0f} MB more ({arrays:.1f} arrays), "
            f"{one_of['evaluated'] * 1e3:.2f} ms a row evaluated, {one_of['with_evaluation'] / 1e6:.0f} MB with that"
        )


if __name__ == "__main__":
    main()
