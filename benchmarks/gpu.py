"""What a GPU gains by stacks, and what the stream takes of a step there.

    python -m benchmarks.gpu                    a table; some minutes on an idle GPU
    python -m benchmarks.gpu --json             one JSON document
    python -m benchmarks.gpu --device cpu       a dry run of this script, on a few tiny rows; its figures mean nothing

ResNet-8, as many seeds as `--students` says, random pictures of 3 x 32 x 32 in batches of 128, padded, cropped and
flipped:

- `stacked`: steps of all students one after the other over those of one stack, in seconds; the aim is 4 or more. The
  two loops take turns, over the stream's own batches, and the GPU is waited for at the end of each.
- `verdict`: what `train-students` would find of such a student (`distill/stacking.py`), and why: a model that comes to
  other bits in stacks of other sizes is not stacked there, be it faster or not.
- `share`: the share of a single student's loop that goes when all its steps take the same batch; the aim is 5 % or
  less. `share_in_turn` is the same with batches that are made when it is their turn, and not ahead by a thread.

No figure of a GPU has been taken with this script yet. Correctness is for `make test-gpu`, which should be run first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from akd_dist import recipe as recipes
from akd_dist.base.errors import MachineError
from akd_dist.data.rows import Splits
from akd_dist.distill.prefetch import prefetched
from akd_dist.distill.probe import probe
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stack import Stack
from akd_dist.distill.stream import Batch, BatchStream
from akd_dist.distill.student import Student
from akd_dist.models.device import device_name, set_deterministic
from benchmarks.stream_share import AUGMENTATION, a_stream, a_student, loops_in_turn, timed

STACKED_AIM, SHARE_AIM = 4.0, 0.05


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    rows: int
    shape: tuple[int, int, int]
    batch: int
    width: int
    """Channels of the ResNet's first stage; 16 in the papers."""
    steps: int
    """Steps of a loop."""
    rounds: int
    """Loops of each kind, beside a first one that does not count."""


SIZES = {
    "cuda": Sizes(rows=25_600, shape=(3, 32, 32), batch=128, width=16, steps=100, rounds=5),
    "cpu": Sizes(rows=128, shape=(3, 8, 8), batch=16, width=2, steps=2, rounds=1),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Stacks and the stream on a GPU.")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda", help="cpu is a dry run of tiny sizes")
    parser.add_argument("--students", type=int, default=8, help="seeds in a stack (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measure(Path(folder), arguments.device, arguments.students)
        except MachineError as error:
            raise SystemExit(f"error: {error}") from None
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, on: str, count: int) -> dict[str, Any]:
    """All figures.

    Args:
        folder: an empty one.
        on: `cuda`, or `cpu` for a dry run.
        count: students of a stack.

    Raises:
        MachineError: there is no such GPU here.
    """
    sizes, device = SIZES[on], set_deterministic(on, 1)
    stream = a_stream(folder / "rows", 10, device, rows=sizes.rows, shape=sizes.shape, batch=sizes.batch)
    student = functools.partial(
        a_student,
        stream.rows,
        device=device,
        model=recipes.ResNet(depth=8, width=sizes.width),
        batch=sizes.batch,
    )
    single = student(folder / "single", 0)
    share = loops_in_turn(stream, lambda one: single.take_step(one, 1 << 30), sizes.steps, sizes.rounds)
    alone = [student(folder / "alone", seed) for seed in range(count)]
    stack = Stack([student(folder / "stack", seed, together=True) for seed in range(count)])
    return {
        **stacked(stream, alone, stack, sizes),
        "stacked_aim": STACKED_AIM,
        **verdict(stream, single, folder / "probe", on),
        "share": share["paid_ahead"],
        "share_in_turn": share["paid"],
        "share_aim": SHARE_AIM,
        "student_ms": share["step_ms"],
        "students": count,
        **dataclasses.asdict(sizes),
        "device": device_name(on),
        "dry_run": on == "cpu",
        "memory": torch.cuda.max_memory_allocated() if on == "cuda" else None,
        "torch": str(torch.__version__),
        "cores": len(os.sched_getaffinity(0)),
    }


def stacked(stream: BatchStream, alone: list[Student], stack: Stack, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a step of all students, one after the other and in a stack, and their ratio: medians."""

    def one_after_the_other(batch: Batch) -> None:
        for student in alone:
            student.take_step(batch, 1 << 30)

    def together(batch: Batch) -> None:
        for error in stack.take_step(batch, 1 << 30).values():
            raise error

    def seconds(step: Callable[[Batch], None], epoch: int) -> float:
        def run() -> None:
            with prefetched(stream, epoch, 0, Ranks()) as batches:
                for _, batch in zip(range(sizes.steps), batches, strict=False):
                    step(batch)

        return timed(run)[0]

    acts = (one_after_the_other, together)
    rounds = [[seconds(act, number) for act in acts] for number in range(sizes.rounds + 1)][1:]
    plain, in_stack = (1000 * statistics.median(one[at] for one in rounds) / sizes.steps for at in (0, 1))
    ratio = statistics.median(one[0] / one[1] for one in rounds)
    return {"alone_ms": round(plain, 4), "stack_ms": round(in_stack, 4), "stacked": round(ratio, 3)}


def verdict(stream: BatchStream, student: Student, folder: Path, on: str) -> dict[str, Any]:
    """What a trial finds of such a student, as that of `train-students`."""
    rows = stream.rows
    data = recipes.DataSpec(train=recipes.Digits(), augmentation=AUGMENTATION)  # whose rows are not read
    found = probe(data, on, student.spec, Splits(rows, rows, rows), folder, "auto")
    return {"verdict": found.stacked, "why": found.why}


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    met = {True: "met", False: "NOT met"}
    lines = [
        f"ResNet-8 of width {result['width']}, {' x '.join(map(str, result['shape']))}, batch {result['batch']}, "
        f"{result['device']}, torch {result['torch']}, {result['cores']} cores",
        f"  {result['students']} students one after the other   {result['alone_ms']:>9.2f} ms a step of all",
        f"  {result['students']} students in a stack            {result['stack_ms']:>9.2f} ms",
        f"  stacked: {result['stacked']:.2f} (aim {STACKED_AIM:g}: {met[result['stacked'] >= STACKED_AIM]})",
        f"  verdict: {'in stacks' if result['verdict'] else 'one after the other'}; {result['why']}",
        f"  share of the stream for one student: {result['share']:.2%} (aim {SHARE_AIM:.0%}: "
        f"{met[result['share'] <= SHARE_AIM]}); {result['share_in_turn']:.2%} without a thread ahead",
    ]
    if result["dry_run"]:
        lines.append("  a dry run on a CPU, with tiny sizes: these figures mean nothing")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
