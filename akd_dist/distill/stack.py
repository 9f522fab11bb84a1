"""Students of one architecture that step together: their weights as the rows of one matrix, one forward and backward.

    weights [students, numbers] -> vmap(module)(weights, batch) -> logits [students, n, classes] -> losses [students, n]

Small models on a processor spend their steps on calls, not on arithmetic; so many in one go cost little more than one.
What a student computes does not depend on who else is in the stack: products are batched over students, everything else
works on single numbers or along one row, and optimizers step on one row at a time. `stacking.judge` looks whether that
is so, bit for bit, before a model is trained this way; a student that is alone is a stack of one.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from akd_dist.distill.batch_norm import has_batch_norm
from akd_dist.distill.beginnings import make_optimizer
from akd_dist.distill.losses import at_least_float32
from akd_dist.distill.packed import NotStackableError, Packed
from akd_dist.distill.schedules import learning_rate
from akd_dist.distill.stack_losses import Alike, alike, losses_together
from akd_dist.distill.stream import Batch
from akd_dist.distill.student import DivergedError, Student
from akd_dist.models.build import CONSTANTS
from akd_dist.models.device import autocast

_ALIGNED = 16
"""Numbers in the widest vectors of a processor, and in a line of its cache."""

Failures = dict[Student, BaseException]
"""Who could not take a step, and why. Their weights are as they were."""


class Stack:
    """Some students at the same step of one stream, each in the stack in which `take_step` takes it further.

    Args:
        students: of one architecture, each of them packed.

    Raises:
        NotStackableError: their modules are not alike, or draw random numbers where nobody can give each its own.
    """

    def __init__(self, students: Sequence[Student]) -> None:
        self.students = list(students)
        packed = [_packed(student) for student in self.students]
        _check_alike(packed)
        self.slots, device = packed[0].slots, self.students[0].device
        width = packed[0].vector.numel()
        rows = torch.empty(len(packed), width, dtype=packed[0].vector.dtype, device=device)
        self.gradients = torch.zeros_like(rows)
        for one, row, gradient in zip(packed, rows, self.gradients, strict=True):
            one.move(row)
            one.vector.grad = gradient
        self.vectors = [one.vector for one in packed]
        # Leaves of a graph of their own: what autograd sees of the rows that the optimizers change.
        self.leaves = {name: slot.of(rows).detach().requires_grad_() for name, slot in self.slots.items()}
        self.constants = {name: packed[0].held[name] for name in packed[0].held if name in CONSTANTS}
        self.held = _stacked(
            [{name: one for name, one in each.held.items() if name not in CONSTANTS} for each in packed]
        )
        self.template, self.dropouts = _template(self.students[0].module)
        self.generators = [_generator(student) for student in self.students] if self.dropouts else []
        self.looks_across_rows = has_batch_norm(self.students[0].module)
        self.shapes: dict[torch.Size, dict[str, torch.Size]] = {}
        self.parts: tuple[int, list[Alike]] | None = None
        self.clips = [
            (index, clip)
            for index, student in enumerate(self.students)
            if (clip := student.optimizer_spec.clip) is not None
        ]
        self.broken = False  # whether somebody has failed in it, whose gradient is gone
        self.optimizers = self._shared_optimizers()
        self.made_for = [student.optimizer for student in self.students]

    def is_of(self, students: Sequence[Student]) -> bool:
        """Whether it is the stack of these students as they are now: a new stage begins with another optimizer."""
        return (
            not self.broken
            and self.students == list(students)
            and all(made is student.optimizer for made, student in zip(self.made_for, students, strict=True))
        )

    def take_step(self, batch: Batch, steps_per_epoch: int) -> Failures:
        """One optimizer step of each student on a batch; as `Student.take_step`.

        Returns:
            Who took none: a loss that is not finite (`DivergedError`), or whatever its own objective raised.

        Raises:
            Exception: what the forward pass raises; nobody has taken a step.
        """
        started = time.perf_counter()
        held = {name: one.clone() for name, one in self.held.items()}  # until it is known who has taken the step
        inputs = self._aligned(batch.inputs)
        self.template.train()
        logits = self._forward(held | self._masks(inputs), inputs)[:, : len(batch.rows)]
        losses, errors = losses_together(self._alike(), logits, batch.logits, batch.labels, batch.label_weight)
        sums = losses.sum(dim=1)
        values = sums.tolist()
        leaves = list(self.leaves.values())
        # Of a sum, not of each with a gradient that is given: for that torch would import its symbolic shapes.
        found = torch.autograd.grad((sums * (1 / batch.global_rows)).sum(), leaves)
        for slot, gradient in zip(self.slots.values(), found, strict=True):
            slot.of(self.gradients).copy_(gradient)

        self._set_rates(steps_per_epoch)
        failed = self._failures(values, errors)
        for index, clip in self.clips:
            nn.utils.clip_grad_norm_([self.vectors[index]], clip)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self._keep(held, failed)
        self.broken = bool(failed)

        seconds = (time.perf_counter() - started) / len(self.students)
        for student, value in zip(self.students, values, strict=True):
            if student not in failed:
                student.stepped(value, len(batch.rows), seconds)
        return failed

    def _failures(self, values: Sequence[float], errors: Mapping[int, BaseException]) -> Failures:
        """Who takes no step: an optimizer passes over what has no gradient, and weights stay as they were."""
        failed: Failures = {}
        if errors or not all(map(math.isfinite, values)):
            for index, (student, value) in enumerate(zip(self.students, values, strict=True)):
                if index in errors:
                    failed[student] = errors[index]
                elif not math.isfinite(value):
                    rate = student.optimizer.param_groups[0]["lr"]
                    told = f"the loss is {value} in epoch {student.epoch}, step {student.step}, at lr {rate:g}"
                    failed[student] = DivergedError(told)
                if student in failed:
                    self.vectors[index].grad = None
        return failed

    def _alike(self) -> list[Alike]:
        """The students by the formulas of their losses, whose numbers are those of one epoch."""
        epoch = self.students[0].epoch  # they are all at the same step
        if self.parts is None or self.parts[0] != epoch:
            standing = [(student.stage, student.stage_epoch) for student in self.students]
            self.parts = epoch, alike(standing, at_least_float32(self.vectors[0].detach()[:0]))
        return self.parts[1]

    def _aligned(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs with a row again at the end, see `_Linear`; not where it would count in statistics of the batch."""
        more = -len(inputs) % _ALIGNED
        if more == 0 or self.looks_across_rows:
            return inputs
        return torch.cat([inputs, inputs[:1].expand(more, *inputs.shape[1:])])

    def _forward(self, more: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        def one(weights: dict[str, torch.Tensor]) -> Any:
            return functional_call(self.template, (weights, self.constants), (inputs,))

        with autocast(self.students[0].device, self.students[0].spec.precision):
            logits: torch.Tensor = vmap(one)(self.leaves | more)
        return logits

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each student says of some rows, as it does once it is trained: [students, n, classes]."""
        self.template.eval()
        return self._forward(self.held, self._aligned(inputs))[:, : len(inputs)]

    # ---- random numbers

    def _masks(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each student's dropout multiplies by, drawn from its own generator: [students, *shape], by name."""
        if not self.dropouts:
            return {}
        shapes, like = self._dropped_shapes(inputs), self.vectors[0]
        drawn = [
            {f"{name}.mask": _mask(shapes[name], one.share, like, generator) for name, one in self.dropouts.items()}
            for generator in self.generators
        ]
        return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}

    def _dropped_shapes(self, inputs: torch.Tensor) -> dict[str, torch.Size]:
        """Of what comes to each dropout in a batch of such inputs, by name; looked at once for each shape of inputs."""
        if (known := self.shapes.get(inputs.shape)) is None:
            for one in self.dropouts.values():
                one.seen = []
            first = {name: weights.detach()[0] for name, weights in (self.leaves | self.held).items()}
            with torch.no_grad():
                functional_call(self.template, (_copies(first), self.constants), (inputs,))
            if any(len(one.seen) != 1 for one in self.dropouts.values()):
                raise NotStackableError("a dropout of it is not called once in each step")
            known = self.shapes[inputs.shape] = {name: one.seen[0] for name, one in self.dropouts.items()}
        return known

    def _keep(self, held: dict[str, torch.Tensor], failed: Failures) -> None:
        """Keep what the forward pass has changed of buffers and generators, of those that have taken the step."""
        if not (held or self.generators):
            return
        for index, student in enumerate(self.students):
            if student not in failed:
                for name, one in held.items():
                    self.held[name][index].copy_(one[index])
                if self.generators:
                    student.rng[-1] = self.generators[index].get_state()

    # ---- optimizers

    def _shared_optimizers(self) -> list[tuple[torch.optim.Optimizer, list[list[int]]]]:
        """An optimizer for all students of one kind; the state of each stays in its own, where checkpoints find it.

        Those whose learning rate moves alike are one group of parameters. Each vector is stepped by itself, so it makes
        no difference to the bits who else is in a group.

        Returns:
            Each, and the students of its groups, by index.
        """
        kinds: dict[type, dict[tuple[str, int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, student in enumerate(self.students):
            spec = student.optimizer_spec
            kinds[type(spec)][spec.model_dump_json(), student.stage.epochs, student.stage_epoch].append(index)
        made = []
        for paths in kinds.values():
            groups = list(paths.values())
            each = [
                make_optimizer([self.vectors[index] for index in members], self.students[members[0]].optimizer_spec)
                for members in groups
            ]
            shared = each[0]
            for other in each[1:]:
                shared.add_param_group(other.param_groups[0])
            for index in itertools.chain(*groups):
                shared.state[self.vectors[index]] = self.students[index].optimizer.state[self.vectors[index]]
            made.append((shared, groups))
        return made

    def _set_rates(self, steps_per_epoch: int) -> None:
        """The learning rate of each group in this step, also where its students' own optimizers say it."""
        for optimizer, groups in self.optimizers:
            for group, members in zip(optimizer.param_groups, groups, strict=True):
                first = self.students[members[0]]
                spec, steps = first.optimizer_spec, first.stage.epochs * steps_per_epoch
                step = first.stage_epoch * steps_per_epoch + first.step
                rate = learning_rate(spec.lr, spec.schedule, step, steps)
                if group["lr"] != rate or step == 0:
                    group["lr"] = rate
                    for index in members:
                        self.students[index].optimizer.param_groups[0]["lr"] = rate


class Stacks:
    """The stacks of a cohort: made for those that step, and made anew where one joins, leaves or enters a stage.

    Args:
        most: how many step together at most, by the name of the student; who is not here steps alone.
    """

    def __init__(self, most: Mapping[str, int]) -> None:
        self.most = dict(most)
        self.made: dict[str, list[Stack]] = {}
        self.grouped: tuple[list[tuple[Student, int]], dict[str, list[Student]]] = ([], {})

    def take_step(self, students: Iterable[Student], batch: Batch, steps_per_epoch: int) -> Failures:
        """One step of each student on a batch.

        Where the forward pass fails of several, as where memory runs out, each half tries by itself from then on: so
        one that fails does so alone.

        Returns:
            Who has failed, and why.
        """
        failed: Failures = {}

        def step(stack: Stack) -> None:
            failed.update(stack.take_step(batch, steps_per_epoch))

        return failed | self.each(students, step)

    def each(self, students: Iterable[Student], act: Callable[[Stack], None]) -> Failures:
        """Do something with each stack of some students; where it fails of several, with each half, and so on.

        Returns:
            Of whom it failed alone, and why.
        """
        failed: Failures = {}
        for kind, members in self._by_architecture(list(students)).items():
            failed |= self._each(kind, members, act)
        return failed

    def _each(self, kind: str, members: list[Student], act: Callable[[Stack], None]) -> Failures:
        failed: Failures = {}
        for stack in self._stacks_of(kind, members):
            try:
                act(stack)
            except (Exception, SystemExit) as error:
                if len(stack.students) == 1:
                    failed[stack.students[0]] = error
                    continue
                for student in stack.students:
                    self.most[student.spec.name] = len(stack.students) // 2
                failed |= self._each(kind, stack.students, act)
        return failed

    def _by_architecture(self, students: list[Student]) -> dict[str, list[Student]]:
        """The students that may step together; grouped anew where others step, or one has entered a stage."""
        now = [(student, student.stage_index) for student in students]
        if self.grouped[0] != now:
            self.grouped = now, _by_architecture(students)
        return self.grouped[1]

    def _stacks_of(self, kind: str, members: list[Student]) -> list[Stack]:
        most = min(self.most.get(student.spec.name, 1) for student in members)
        parts = [members[start : start + most] for start in range(0, len(members), most)]
        before = self.made.get(kind, [])
        there = [next((stack for stack in before if stack.is_of(part)), None) for part in parts]
        if None not in there:
            return [stack for stack in there if stack is not None]
        made = [stack or Stack(part) for stack, part in zip(there, parts, strict=True)]
        self.made[kind] = made
        return made


class _Linear(nn.Module):
    """A linear layer that pads its weights, so that each student's matrices begin where vector units like to read.

    MKL gives a product other last bits where one of its matrices begins elsewhere, or has a single column; and where a
    student's begin in a stack depends on how many come before it. Batches are padded for the same reason.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., n, fan in] -> [..., n, fan out]."""
        fan_out, fan_in = self.weight.shape
        wide = _ALIGNED if fan_in == 1 else fan_in
        high = fan_out if fan_out > 1 and fan_out * wide % _ALIGNED == 0 else _padded(fan_out)
        if (high, wide) == (fan_out, fan_in):
            return functional.linear(inputs, self.weight, self.bias)
        weight = functional.pad(self.weight, (0, wide - fan_in, 0, high - fan_out))
        bias = None if self.bias is None else functional.pad(self.bias, (0, high - fan_out))
        inputs = inputs if wide == fan_in else functional.pad(inputs, (0, wide - fan_in))
        return functional.linear(inputs, weight, bias)[..., :fan_out]


def _padded(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


class _Dropout(nn.Module):
    """A dropout whose mask is drawn by others: from the generator of each student of a stack."""

    mask: torch.Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.seen = share, list[torch.Size]()
        self.register_buffer("mask", torch.empty(0), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs times the mask, of the same shape; where there is none, inputs as they are, whose shape is noted."""
        if not self.training:
            return inputs
        if not self.mask.numel():
            self.seen.append(inputs.shape)
            return inputs
        return inputs * self.mask


def _mask(shape: torch.Size, share: float, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What `torch.nn.Dropout` multiplies by: 0 for a share of the numbers, and more than 1 for the others."""
    kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - share, generator=generator)
    return kept.div_(1 - share) if share < 1 else kept


def _template(module: nn.Module) -> tuple[nn.Module, dict[str, _Dropout]]:
    """A copy of a module that is called with the weights of others, and its dropouts by name."""
    template, dropouts = copy.deepcopy(module), dict[str, _Dropout]()
    for name, layer in list(template.named_modules()):
        if type(layer) is nn.Linear:
            template.set_submodule(name, _Linear(layer))
        elif type(layer) is nn.Dropout and layer.p > 0:
            dropouts[name] = _Dropout(layer.p)
            template.set_submodule(name, dropouts[name])
    return template, dropouts


def _generator(student: Student) -> torch.Generator:
    """A student's own generator of its device, where it stands."""
    generator = torch.Generator(student.device)
    generator.set_state(student.rng[-1])
    return generator


def _packed(student: Student) -> Packed:
    assert student.packed is not None
    return student.packed


def _by_architecture(students: Iterable[Student]) -> dict[str, list[Student]]:
    found = defaultdict(list)
    for student in students:
        found[f"{student.spec.model.model_dump_json()} {student.spec.precision}"].append(student)
    # Those of one formula in a row: its losses are then computed from one block of the stack.
    return {kind: sorted(members, key=lambda one: repr(one.stage.alike)) for kind, members in found.items()}


def _check_alike(packed: Sequence[Packed]) -> None:
    """Refuse what is of one specification and yet not alike, as a function may make it.

    Raises:
        NotStackableError: names, shapes or dtypes differ.
    """
    first, *others = [
        {name: (one.shape, one.dtype) for name, one in (each.trained | each.held).items()} for each in packed
    ]
    if any(other != first for other in others):
        raise NotStackableError("two of its models have weights of other shapes")


def _stacked(each: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of modules in one, [modules, *shape], by name; those of the modules are its rows from now on."""
    together = {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}
    for name, rows in together.items():
        for one, row in zip(each, rows, strict=True):
            one[name].data = row
    return together


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in tensors.items()}
