"""Time that the stream takes out of a training step.

    python benchmarks/stream_share.py             a table
    python benchmarks/stream_share.py --json      one JSON document whose main figure is `ratio`
    python benchmarks/stream_share.py --device cuda     on a GPU, which is waited for after each part

Students are ResNet-8 on images of 3 x 32 x 32 in batches of 128, padded, cropped and flipped, as the training loop of a
worker sees them: the stream's own batches, the students' own steps on one thread. A step is `next(batch)` and then a
step of each student; `ratio` is the share of the first in both, the largest of all settings. Rows are made from a seed,
and their content changes neither side. Beside it, what a batch is made of, each part timed by itself on the same rows:
the gather of inputs and labels, the view, the gather of the logits. The first steps are left out: they warm the page
cache and the memory of the allocator. The order of an epoch, which is drawn with its first batch, is timed by itself
and added to every step in equal parts.

A GPU computes while the host makes the next batch, so the share is an upper bound there. Beside it stands
what is really paid: how much longer steps take with a new batch each than with the same batch again and again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist import recipe as recipes
from akd_dist.data.rows import Rows
from akd_dist.data.views import view_of
from akd_dist.distill.orders import epoch_order
from akd_dist.distill.stream import STEPS_AT_ONCE, Batch, BatchStream
from akd_dist.distill.student import Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import device_name, set_deterministic
from akd_dist.recipe import PadCropFlip

ROWS, SHAPE, BATCH, SEED, WARM = 25_600, (3, 32, 32), 128, 0, 2 * STEPS_AT_ONCE
# Classes, and students in lockstep.
SETTINGS = ((10, 1), (100, 1), (10, 2), (100, 2))
AUGMENTATION = PadCropFlip(pixels=4)
LIMIT = 0.05


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time that the stream takes out of a training step.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--steps", type=int, default=64, help="steps that count, for each setting (default 64)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where students and views are computed"
    )
    arguments = parser.parse_args()
    device = set_deterministic(arguments.device, 1)
    with tempfile.TemporaryDirectory() as folder:
        measured = [measure(Path(folder), device, arguments.steps, *setting) for setting in SETTINGS]
    result = {
        "ratio": max(one["ratio"] for one in measured),
        "limit": LIMIT,
        "settings": measured,
        "device": device_name(arguments.device),
        "rows": ROWS,
        "batch": BATCH,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, device: torch.device, steps: int, classes: int, students: int) -> dict[str, Any]:
    """One setting: means over steps, and the share over all of them."""
    stream = a_stream(folder, classes, device)
    trained = [a_student(stream.rows, folder, seed, device) for seed in range(students)]
    order = timed(functools.partial(epoch_order, ROWS, SEED, 2))[0] / stream.steps_per_epoch
    waited, stepped, parts = list[float](), list[float](), dict[str, list[float]]()
    batches = stream.batches(epoch=0)
    for number in range(WARM + steps):
        seconds, batch = timed(functools.partial(next, batches))
        training, _ = timed(functools.partial(step_all, trained, batch, stream.steps_per_epoch))
        if number >= WARM:
            waited.append(seconds + order)
            stepped.append(training)
    for number in range(WARM + steps):
        for name, one in by_parts(stream, number).items():
            if number >= WARM:
                parts.setdefault(name, []).append(one)
    return {
        "classes": classes,
        "students": students,
        "ratio": round(sum(waited) / (sum(waited) + sum(stepped)), 5),
        "next_ms": milliseconds(waited),
        "students_ms": milliseconds(stepped),
        "order_ms": milliseconds([order]),
        "parts_ms": {name: milliseconds(seconds) for name, seconds in parts.items()},
        "paid": None if device.type == "cpu" else round(paid(stream, trained, steps), 5),
    }


def paid(stream: BatchStream, students: list[Student], steps: int) -> float:
    """The share of a loop's time that goes when all its steps take the same batch; the median of five tries in turn."""
    same = next(stream.batches(epoch=0))

    def loop(batches: Iterable[Batch]) -> float:
        def run() -> None:
            for batch in batches:
                step_all(students, batch, stream.steps_per_epoch)

        return timed(run)[0]

    tries = [
        1 - loop([same] * steps) / loop(itertools.islice(stream.batches(epoch=number), steps)) for number in range(5)
    ]
    return statistics.median(tries)


def a_stream(folder: Path, classes: int, device: torch.device) -> BatchStream:
    """Rows and one view's logits, memory-mapped from files as a node has them."""
    generator = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {
        "inputs": generator.integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8),
        "labels": generator.integers(0, classes, ROWS),
        "logits": generator.standard_normal((1, ROWS, classes), dtype=np.float32),
    }
    mapped = {}
    for name, array in arrays.items():
        path = folder / f"{name}-{classes}.npy"
        if not path.exists():
            np.save(path, array)
        mapped[name] = np.load(path, mmap_mode="r")
    rows = Rows(mapped["inputs"], mapped["labels"], classes, fingerprint="", blocks=(), folder=folder)
    return BatchStream(rows, mapped["logits"], AUGMENTATION, seed=SEED, views=1, batch=BATCH, device=device)


def a_student(rows: Rows, folder: Path, seed: int, device: torch.device) -> Student:
    """A ResNet-8 in stage I of Annealing-KD."""
    objective = recipes.AnnealingKD(tau_max=4, stage1_epochs=10, stage2_epochs=1)
    model = recipes.ResNet(depth=8)
    spec = recipes.StudentSpec(
        name=f"student-{seed}",
        model=model,
        objective=objective,
        optimizer=recipes.Sgd(lr=0.01),
        batch=BATCH,
        seed=seed,
    )
    return Student(spec, ModelCard.of(model, rows, None), folder / spec.name, device=device)


def step_all(students: list[Student], batch: Batch, steps_per_epoch: int) -> None:
    """What a cohort does with a batch."""
    for student in students:
        student.take_step(batch, steps_per_epoch)


def by_parts(stream: BatchStream, step: int) -> dict[str, float]:
    """Seconds of each part of a batch of the next epoch, made by hand."""
    assert isinstance(stream.logits, np.ndarray)
    rows = epoch_order(ROWS, SEED, 1)[step * BATCH : (step + 1) * BATCH]
    gather, inputs = timed(lambda: (stream.rows.inputs.take(rows, axis=0), stream.rows.labels.take(rows)))
    view, _ = timed(lambda: view_of(AUGMENTATION, SEED, inputs[0], rows, 0, stream.rows.tokens, stream.device))
    logits = stream.logits[0]
    taken, _ = timed(lambda: torch.from_numpy(logits.view(np.ndarray).take(rows, axis=0)).to(stream.device))
    return {"gather": gather, "view": view, "logits": taken}


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that something takes, and what it returns."""
    started = time.perf_counter()
    outcome = act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, outcome


def milliseconds(seconds: list[float]) -> float:
    """Their mean: for a GPU several batches are made in one go."""
    return round(1000 * statistics.fmean(seconds), 4)


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [
        f"ResNet-8, 3 x 32 x 32, pad_crop_flip, batch {result['batch']}, {result['steps']} steps, "
        f"{result['threads']} thread of {result['cores']} cores, {result['device']}",
        "  classes  students  next(batch)  (order  gather    view  logits)  students' steps   share"
        + ("    paid" if result["settings"][0]["paid"] is not None else ""),
    ]
    for one in result["settings"]:
        parts = one["parts_ms"]
        lines.append(
            f"  {one['classes']:>7}  {one['students']:>8}  {one['next_ms']:>8.3f} ms  "
            f"({one['order_ms']:>5.3f}  {parts['gather']:>6.3f}  {parts['view']:>6.3f}  {parts['logits']:>6.3f})  "
            f"{one['students_ms']:>12.2f} ms  {one['ratio']:>6.2%}"
            + ("" if one["paid"] is None else f"  {one['paid']:>6.2%}")
        )
    verdict = "under" if result["ratio"] < result["limit"] else "NOT under"
    return "\n".join([*lines, f"  ratio: {result['ratio']:.2%} at most, {verdict} {result['limit']:.0%}"])


if __name__ == "__main__":
    main()
