"""Time that the stream takes out of a training step.

    python benchmarks/stream_share.py             a table
    python benchmarks/stream_share.py --json      one JSON document whose main figure is `ratio`
    python benchmarks/stream_share.py --device cuda     on a GPU, which is waited for after each part
    python benchmarks/stream_share.py --ahead     what batches made ahead by a thread gain, be they made so there or not

Students are ResNet-8 on images of 3 x 32 x 32 in batches of 128, padded, cropped and flipped, as the training loop of a
worker sees them: the stream's own batches, the students' own steps on one thread. A step is `next(batch)` and then a
step of each student; `ratio` is the share of the first in both, the largest of all settings. Rows are made from a seed,
and their content changes neither side. Beside it, what a batch is made of, each part timed by itself on the same rows:
the gather of inputs and labels, the view, the gather of the logits. The first steps are left out: they warm the page
cache and the memory of the allocator. The order of an epoch, which is drawn with its first batch, is timed by itself
and added to every step in equal parts.

A GPU computes while the host makes the next batch, so the share is an upper bound there. Beside it stands
what is really paid: how much longer steps take with a new batch each than with the same batch again and again.

With `--ahead` three loops take turns: over the same batch again and again, over batches that are made when it is their
turn, and over batches that a thread makes ahead. `wall` and `cpu` are the seconds of the last as a ratio to the second,
medians of neighbouring loops; CPU seconds are those of all threads. On a CPU 24 small MLPs in a stack are measured
as well: their steps are short.
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
from unittest import mock

import numpy as np
import torch

from akd_dist import recipe as recipes
from akd_dist.data.rows import Rows
from akd_dist.data.views import view_of
from akd_dist.distill import prefetch
from akd_dist.distill.orders import epoch_order
from akd_dist.distill.prefetch import batches_ahead, prefetched
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stack import Stack
from akd_dist.distill.stream import STEPS_AT_ONCE, Batch, BatchStream
from akd_dist.distill.student import Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import device_name, set_deterministic
from akd_dist.recipe import PadCropFlip

ROWS, SHAPE, BATCH, SEED, WARM = 25_600, (3, 32, 32), 128, 0, 2 * STEPS_AT_ONCE
# Classes, and students in lockstep.
SETTINGS = ((10, 1), (100, 1), (10, 2), (100, 2))
AUGMENTATION = PadCropFlip(pixels=4)
RESNET = recipes.ResNet(depth=8)
LIMIT = 0.05


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time that the stream takes out of a training step.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--steps", type=int, default=64, help="steps that count, for each setting (default 64)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where students and views are computed"
    )
    parser.add_argument("--ahead", action="store_true", help="measure batches made ahead, and nothing else")
    parser.add_argument("--rounds", type=int, default=5, help="loops of each kind with --ahead (default 5)")
    arguments = parser.parse_args()
    device = set_deterministic(arguments.device, 1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.ahead:
            made = measure_ahead(Path(folder), device, arguments.steps, arguments.rounds)
            print(json.dumps(made) if arguments.json else ahead_table(made))
            return
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
    """The share of a loop's time that goes when all steps take one batch; batches are made as `train-students` does."""
    act = functools.partial(step_all, students, steps_per_epoch=stream.steps_per_epoch)
    loops = loops_in_turn(stream, act, steps, 5)
    found: float = loops["paid" if batches_ahead(stream) == 0 else "paid_ahead"]
    return found


Step = Callable[[Batch], object]


def loops_in_turn(stream: BatchStream, step: Step, steps: int, rounds: int) -> dict[str, Any]:
    """Loops over one batch, over batches made in turn, and over batches made ahead, one after the other.

    Returns:
        Medians over the rounds: `wall` and `cpu`, the seconds of batches ahead over those of batches in turn; `paid`
        and `paid_ahead`, the share of either that goes with one batch; `step_ms`, a step with batches in turn.
    """
    same, found = next(stream.batches(epoch=0)), list[dict[str, float]]()

    def loop(batches: Iterable[Batch]) -> tuple[float, float]:
        def run() -> None:
            for batch in itertools.islice(batches, steps):
                step(batch)

        started = time.process_time()
        seconds = timed(run)[0]
        return seconds, time.process_time() - started

    def made(epoch: int, count: int) -> tuple[float, float]:
        given = dict.fromkeys(("cpu", "cuda"), count)
        with mock.patch.dict(prefetch.AHEAD, given), prefetched(stream, epoch, 0, Ranks()) as batches:
            return loop(batches)

    for number in range(rounds + 1):
        (one, _), (turn, turn_cpu), (thread, thread_cpu) = loop([same] * steps), made(number, 0), made(number, 2)
        ratios = {"wall": thread / turn, "cpu": thread_cpu / turn_cpu}
        found.append(ratios | {"paid": 1 - one / turn, "paid_ahead": 1 - one / thread, "step_ms": 1000 * turn / steps})
    # The first round warms the page cache and the memory of the allocator.
    return {name: round(statistics.median(one[name] for one in found[1:]), 5) for name in found[0]}


def measure_ahead(folder: Path, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    """What batches made ahead gain for one ResNet-8, and on a CPU for a stack of small MLPs."""
    stream = a_stream(folder, 10, device)
    student = a_student(stream.rows, folder, 0, device)
    found = {"a ResNet-8": loops_in_turn(stream, lambda one: student.take_step(one, 1 << 30), steps, rounds)}
    if device.type == "cpu":
        small = a_stream(folder / "small", 10, device, shape=(1, 8, 8), batch=64)
        model = recipes.Mlp(hidden=16)
        mlps = [
            a_student(small.rows, folder / "small", seed, device, model=model, batch=64, together=True)
            for seed in range(24)
        ]
        stack = Stack(mlps)
        found["24 MLPs"] = loops_in_turn(small, lambda one: stack.take_step(one, 1 << 30), 4 * steps, rounds)
    return found


def ahead_table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = ["                 a step   wall    cpu    paid in turn   paid ahead"]
    for name, one in result.items():
        lines.append(
            f"  {name:<12} {one['step_ms']:>6.2f} ms   {one['wall']:.3f}  {one['cpu']:.3f}  "
            f"{one['paid']:>11.2%}  {one['paid_ahead']:>11.2%}"
        )
    return "\n".join(lines)


def a_stream(
    folder: Path,
    classes: int,
    device: torch.device,
    *,
    rows: int = ROWS,
    shape: tuple[int, ...] = SHAPE,
    batch: int = BATCH,
) -> BatchStream:
    """Rows and one view's logits, memory-mapped from files as a node has them."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {
        "inputs": generator.integers(0, 256, (rows, *shape), dtype=np.uint8),
        "labels": generator.integers(0, classes, rows),
        "logits": generator.standard_normal((1, rows, classes), dtype=np.float32),
    }
    mapped = {}
    for name, array in arrays.items():
        path = folder / f"{name}-{classes}.npy"
        if not path.exists():
            np.save(path, array)
        mapped[name] = np.load(path, mmap_mode="r")
    made = Rows(mapped["inputs"], mapped["labels"], classes, fingerprint="", blocks=(), folder=folder)
    return BatchStream(made, mapped["logits"], AUGMENTATION, seed=SEED, views=1, batch=batch, device=device)


def a_student(
    rows: Rows,
    folder: Path,
    seed: int,
    device: torch.device,
    *,
    model: recipes.Model = RESNET,
    batch: int = BATCH,
    together: bool = False,
) -> Student:
    """A student in stage I of Annealing-KD; by default a ResNet-8."""
    objective = recipes.AnnealingKD(tau_max=4, stage1_epochs=10, stage2_epochs=1)
    spec = recipes.StudentSpec(
        name=f"student-{seed}",
        model=model,
        objective=objective,
        optimizer=recipes.Sgd(lr=0.01),
        batch=batch,
        seed=seed,
    )
    card = ModelCard.of(model, rows, None)
    return Student(spec, card, folder / spec.name, device=device, together=together)


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
