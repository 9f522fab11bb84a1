"""Whether a student's steps are taken in a stack: by trying it, in groups of several sizes, and by the time it takes.

How a student is computed is a property of the student alone: of its model, batch and precision, of the device and the
versions there. A run keeps what was found, so it holds for every later command of that run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from akd_dist import recipe
from akd_dist.distill.beginnings import copy_of
from akd_dist.distill.ranks import reason_of
from akd_dist.distill.stack import Stack
from akd_dist.distill.stack_evaluation import shown
from akd_dist.distill.stream import Batch
from akd_dist.distill.student import Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, free_memory

GROUP = 7
"""The largest group that is tried; beside it one, and two."""
LEAST_GAIN = 1.25
"""How many times as fast a step in such a group has to be for each student, unless the recipe says `always`."""
LONG_STEP = 0.02
"""Seconds of a step on a processor above which nothing is tried: it is arithmetic then, and not calls, that takes them.
"""
STACK_BYTES = {"cpu": 500_000_000, "cuda": 8_000_000_000}
"""What the activations of a stack may take on a device; more students go in several stacks."""
_TRIED_SECONDS = 0.05
_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2}
"""How far gradients may be from those of a step alone, as a share of their norm."""
_RATE = 1e-4


@dataclass(frozen=True)
class Judged:
    """What was found of a model."""

    stacked: bool
    """Whether its steps are taken in stacks."""
    why: str
    """What speaks for it, or against."""
    once: float = 0.0
    """Seconds of a step of a stack, however many students it has."""
    each: float = 0.0
    """Seconds that each student adds to that."""
    evaluation: float = 0.0
    """Seconds of a row that is evaluated, for each student."""


def most_together(step_memory: int, device: str) -> int:
    """How many students step together at most.

    Args:
        step_memory: bytes that a step of one needs beside its state, and gives back.
        device: `cpu` or `cuda`.
    """
    return max(1, STACK_BYTES[device] // max(step_memory, 1))


def judge(
    spec: recipe.StudentSpec,
    card: ModelCard,
    folder: Path,
    batch: Batch,
    last: int,
    alone: float,
    step_memory: int,
    device: torch.device,
    *,
    wanted: bool = False,
) -> Judged:
    """Try a student's steps in stacks.

    Args:
        folder: an empty one, for students' files.
        batch: a whole batch.
        last: rows of an epoch's last batch.
        alone: seconds of its step by itself.
        step_memory: bytes that this step needs, and gives back.
        wanted: whether it is stacked wherever it can be, be it faster or not.
    """
    if spec.workers > 1:
        return Judged(False, "several workers share its batches")
    if spec.precision == "float16":
        return Judged(False, "in float16 each student scales its losses by itself")
    if device.type == "cpu" and alone > LONG_STEP and not wanted:
        return Judged(False, f"a step of {alone * 1e3:.0f} ms is work, of which a stack saves nothing")
    if GROUP * step_memory > free_memory(device):
        return Judged(False, f"the memory does not hold {GROUP} of its steps")
    still = {"lr": _RATE, "schedule": recipe.Constant()}

    def make(number: int, *, together: bool = True, dropping: bool = True) -> Student:
        update = {"seed": number, "name": f"tried-{number}", "optimizer": spec.optimizer.model_copy(update=still)}
        student = Student(spec.model_copy(update=update), card, folder / str(number), device=device, together=together)
        for layer in student.module.modules() if not dropping else ():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        return student

    logits = None
    if batch.logits is not None:
        drawn = torch.randn(batch.logits.shape, generator=torch.Generator().manual_seed(0))
        logits = drawn.to(batch.inputs.device)
    whole = dataclasses.replace(batch, logits=logits)
    try:
        if found := _difference(make, whole, max(1, min(last, len(batch.rows))), _TOLERANCE[spec.precision]):
            return Judged(False, found)
        return _timed(make, whole, wanted=wanted)
    # Whatever torch says of a model that it cannot batch; an error of the model itself is told when it is trained.
    except (Exception, SystemExit) as error:
        return Judged(False, f"torch cannot batch it over students: {reason_of(error)}"[:300])


Make = Callable[..., Student]


def _difference(make: Make, batch: Batch, last: int, tolerance: float) -> str | None:
    """What of a student depends on who else is in its stack, or is other than a step alone gives; None if all is well.

    The groups are of one, of two and of all; the batches a whole one, the last of an epoch and another whole one.
    """
    batches = [batch, _part(batch, last), batch]
    everyone = _stepped([make(number) for number in range(GROUP)], batches)
    for group in ([0], [GROUP - 1], [0, GROUP - 2]):
        for number, state in zip(group, _stepped([make(number) for number in group], batches), strict=True):
            if not all(torch.equal(one, other) for one, other in zip(state, everyone[number], strict=True)):
                return f"its last bits are other ones in a stack of {GROUP} than in one of {len(group)}"
    plain, stacked = make(0, together=False, dropping=False), make(0, dropping=False)
    before = copy_of(dict(plain.module.named_buffers()))
    plain.take_step(batches[1], 1 << 30)
    Stack([stacked]).take_step(batches[1], 1 << 30)
    assert stacked.packed is not None
    assert stacked.packed.vector.grad is not None
    apart = total = 0.0
    for name, slot in stacked.packed.slots.items():
        alone = dict(plain.module.named_parameters())[name].grad
        if alone is None:
            return f"no gradient reaches its parameter {name}"
        apart += float((slot.of(stacked.packed.vector.grad) - alone).double().square().sum())
        total += float(alone.double().square().sum())
    if not apart <= tolerance**2 * total:
        off = (apart / total) ** 0.5 if total else 1.0
        return f"its gradients in a stack are {off:.1g} of their size off those alone"
    for name, moved in plain.module.named_buffers():
        if _moved_otherwise(before[name], moved, stacked.module.get_buffer(name), tolerance):
            return f"its buffer {name} is not in a stack what it becomes alone"
    with torch.no_grad(), autocast(plain.device, plain.spec.precision):
        said = plain.module.eval()(batch.inputs).double()
        others = Stack([stacked]).logits(batch.inputs)[0].double()
    if not float((others - said).square().sum()) <= tolerance**2 * float(said.square().sum()):
        return "what it says of rows in a stack is not what it says alone"
    return None


def _moved_otherwise(before: torch.Tensor, alone: torch.Tensor, stacked: torch.Tensor, tolerance: float) -> bool:
    """Whether a step in a stack changes a buffer, as of running statistics, otherwise than a step alone.

    That it changes it at all is asked for however small the change is: what a model assigns anew instead of writing
    into it is lost in a stack, and would be so in every step.
    """
    if torch.equal(alone, before) or torch.equal(stacked, before):
        return not torch.equal(alone, stacked)
    rounding = 4 * torch.finfo(alone.dtype).eps if alone.is_floating_point() else 0.0
    most = tolerance * (alone - before).double().norm() + rounding * alone.double().norm()
    return not float((alone - stacked).double().norm()) <= float(most)


def _part(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch as a batch of its own."""
    return dataclasses.replace(
        batch,
        rows=batch.rows[:rows],
        inputs=batch.inputs[:rows],
        labels=batch.labels[:rows],
        logits=None if batch.logits is None else batch.logits[:rows],
        global_rows=rows,
    )


def _stepped(students: Sequence[Student], batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
    """What students are after a step on each batch, and what they then say of rows: weights, gradients, buffers,
    losses, generators; logits of a whole block of an evaluation and of one that is cut.
    """
    stack = Stack(students)
    for batch in batches:
        for error in stack.take_step(batch, 1 << 30).values():
            raise error
    with torch.no_grad():
        said = [stack.logits(shown(batches[0].inputs, students[0].spec.batch, missing)) for missing in (0, 3)]
    return [
        [
            *(one[index] for one in said),
            *(one.detach() for one in student.module.state_dict().values()),
            stack.gradients[index],
            torch.tensor(student.loss_sum, dtype=torch.float64),
            *student.rng,
        ]
        for index, student in enumerate(students)
    ]


def _timed(make: Make, batch: Batch, *, wanted: bool) -> Judged:
    """What a step takes in a stack of one and of all, against steps alone; the shortest of several, by turns."""
    plain, one, all_of_them = make(0, together=False), Stack([make(0)]), Stack([make(n) for n in range(GROUP)])
    acts: list[Callable[[], object]] = [
        lambda: plain.take_step(batch, 1 << 30),
        lambda: one.take_step(batch, 1 << 30),
        lambda: all_of_them.take_step(batch, 1 << 30),
    ]
    shortest = [float("inf")] * len(acts)
    until = time.perf_counter() + _TRIED_SECONDS * len(acts)
    rounds = 0
    while rounds < 4 or time.perf_counter() < until:
        for index, act in enumerate(acts):
            started = time.perf_counter()
            act()
            shortest[index] = min(shortest[index], time.perf_counter() - started)
        rounds += 1
    alone, first, together = shortest
    gain = GROUP * alone / together
    each = min(max((together - first) / (GROUP - 1), 0.0), together / GROUP)
    told = f"{GROUP} at once take {gain:.1f} times as many steps a second as one after the other"
    if gain < LEAST_GAIN and not wanted:
        return Judged(False, told)
    block = shown(batch.inputs, all_of_them.students[0].spec.batch, 0)
    with torch.no_grad():
        all_of_them.logits(block)
        started = time.perf_counter()
        all_of_them.logits(block).sum().item()
        evaluation = (time.perf_counter() - started) / (GROUP * len(block))
    return Judged(True, told, max(together - GROUP * each, 0.0), each, evaluation)
