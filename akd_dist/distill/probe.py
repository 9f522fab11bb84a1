"""A short measured probe of a student: seconds of its step, of the stream and of evaluation, and the memory it takes.

The step is the student's own (its module, loss, optimizer and precision), on a share of a batch of the real rows.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.memory import keep_freed_memory
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.batch_targets import unsaid
from akd_dist.distill.language_metrics import blocks_at_once
from akd_dist.distill.metrics import evaluation_rows
from akd_dist.distill.objectives import mix_of, stages_of
from akd_dist.distill.orders import Batches
from akd_dist.distill.output_head import chunk_targets
from akd_dist.distill.sparse import SHARED_BYTES
from akd_dist.distill.stacking import Judged, judge
from akd_dist.distill.stream import Batch, BatchStream
from akd_dist.distill.student import DivergedError, Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, free_memory, set_deterministic, weights_dtype
from akd_dist.storage.top_k import TopK

FIRST_ROWS = 16
"""Rows of a first step, by which it is seen whether a step on the whole batch is short enough to be measured."""
PROBE_SECONDS, PROBE_STEPS = 0.25, 100
"""How long the timed steps of one model take at most, or one step of the first rows where that takes longer; and how
many they are at most.
"""
KEPT_BYTES = 64_000_000
"""The largest weights that a probe writes to the disk, to see what that takes."""


@dataclass(frozen=True)
class Measured:
    """What a probe found: seconds and bytes of one worker."""

    step: float
    """Seconds of a step of one student, on a worker's share of a batch."""
    stream: float
    """Seconds in which the stream makes that share; once for all students of a cohort."""
    evaluation: float
    """Seconds of one row of the validation or test rows."""
    start: float
    """Seconds in which the student is set up."""
    keeping: float
    """Seconds in which a checkpoint is written; 0 for one of more than KEPT_BYTES, which is not written for a probe."""
    weights: int
    """Bytes of all weights and buffers."""
    gradients: int
    """Bytes of all gradients."""
    optimizer: int
    """Bytes of the optimizer's state."""
    step_memory: int
    """Bytes that a step needs beside these, and gives back."""
    evaluation_memory: int
    """Bytes that evaluating a block of rows needs, and gives back."""
    stacked: bool = False
    """Whether its steps are taken together with those of others, see `stacking`."""
    why: str = "it was not tried"
    """What speaks for that, or against."""
    stack: float = 0.0
    """Seconds of a step of a stack, however many students it has."""
    together: float = 0.0
    """Seconds that each student adds to that."""

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, the best weights, the optimizer's state."""
        return 2 * self.weights + self.optimizer

    def resident(self, workers: int) -> int:
        """Bytes that a student keeps on its device as long as it trains: as a checkpoint, and gradients.

        With several workers DistributedDataParallel exchanges gradients through buckets, another copy of them.
        """
        return self.checkpoint + self.gradients * (1 if workers == 1 else 2)

    @property
    def writing(self) -> int:
        """Bytes that writing a checkpoint takes for a moment: the tensors cloned, as safetensors, and with a head."""
        return 3 * self.checkpoint


def largest_optimizer(spec: recipe.StudentSpec) -> recipe.Optimizer:
    """Of the optimizers of its stages the one that keeps most: all of it has to fit."""
    return max((stage.optimizer or spec.optimizer for stage in stages_of(spec)), key=moments)


def moments(optimizer: recipe.Optimizer) -> int:
    """How many numbers an optimizer keeps for each weight."""
    return 2 if isinstance(optimizer, recipe.AdamW) else int(optimizer.momentum > 0)


def guessed(spec: recipe.StudentSpec, parameters: int) -> Measured:
    """What is known of a student whose probe failed: bytes of weights and optimizer, by their number. Times are 0."""
    weights = parameters * weights_dtype(spec.precision).itemsize
    return Measured(0.0, 0.0, 0.0, 0.0, 0.0, weights, weights, moments(largest_optimizer(spec)) * weights, 0, 0)


def probe(
    data: recipe.DataSpec,
    device: str,
    spec: recipe.StudentSpec,
    splits: Splits,
    folder: Path,
    stacked: recipe.Stacked = "auto",
    encoding: Mapping[str, Any] = MappingProxyType({}),
) -> Measured:
    """Take a few steps of a student, here and now; torch's settings are afterwards those of the student.

    Args:
        data: how the stream makes the rows.
        device: `cpu` or `cuda`, as the recipe says.
        folder: an empty one, for the student's files.
        stacked: as the recipe says; `never` tries no stack.
        encoding: of the stores that are read, as their identities have it; by default one of logits.

    Raises:
        DivergedError: the loss is no number.
        Exception: whatever the model raises.
    """
    still = largest_optimizer(spec).model_copy(update={"lr": 1e-12})  # weights that hardly move do not diverge
    alone = spec.model_copy(update={"workers": 1, "sync_batchnorm": False, "optimizer": still})
    keep_freed_memory()
    settled = set_deterministic(device, spec.threads)
    train, mixes = splits.train, {mix_of(stage, spec.labelled) for stage in stages_of(spec)}
    cuts = [Batches(len(train), train.labelled, spec.batch, spec.last_batch, mix) for mix in mixes]
    sizes = [np.diff(cut.ends, prepend=0) for cut in cuts]
    usual = -(-int(max(one[0] for one in sizes)) // spec.workers)
    largest = -(-int(max(one.max() for one in sizes)) // spec.workers)
    try:
        last = min(int(one[-1]) for one in sizes)
        shape = Shape(usual, largest, last, spec.workers, encoding if encoding.get("name") == TopK.name else None)
        return _measure(data, alone, splits, settled, folder, shape, stacked)
    except DivergedError:
        raise DivergedError("the loss is no number, with weights that have hardly moved") from None


@dataclass(frozen=True)
class Shape:
    """The rows of a student's steps."""

    share: int
    """Of a worker in a step, for which times are given."""
    largest: int
    """The most that it ever has at once, as in a merged last batch, by which memory is."""
    last: int
    """Of an epoch's last batch."""
    workers: int
    """How many share a batch."""
    described: Mapping[str, Any] | None
    """The encoding of stores that describe logits; None of those that hold them."""


def _why_not_stacked(stacked: recipe.Stacked, shape: Shape, *, language: bool, tried: bool) -> str | None:
    """Why no stack of this student is tried; None where one is.

    Args:
        tried: whether a whole share was measured, so that a stack of several can be.
    """
    if stacked == "never":
        return "the recipe says stacked: never"
    if language:
        return "a language model's step is arithmetic, of which a stack saves nothing"
    if shape.described is not None:
        return "what a store describes is decoded within the loss of one student at a time"
    return None if tried else "a step takes too long, or too much memory, for a trial of several"


def _measure(
    data: recipe.DataSpec,
    spec: recipe.StudentSpec,
    splits: Splits,
    device: torch.device,
    folder: Path,
    shape: Shape,
    stacked: recipe.Stacked,
) -> Measured:
    """What a student takes."""
    started, share, largest = time.perf_counter(), shape.share, shape.largest
    card = ModelCard.of(spec.model, splits.train, data.normalize, data.image)
    student = Student(spec, card, folder, device=device)
    start = time.perf_counter() - started
    made = _Made(data, splits, device, shape.described)
    first = made.batch(min(FIRST_ROWS, share))[0]
    warm = _timed(student, first)  # the first step of a process also loads what torch needs
    with _SavedTensors(student.module) as saved:
        few = min(warm, _timed(student, first))
    rows, per_step = len(first.rows), few
    values = math.prod(splits.train.shape)
    kept, language = saved.total / rows + 4 * values, splits.train.task == "language_model"
    step_memory = math.ceil(min(largest, spec.micro_batch or largest) * (kept + 2 * saved.largest / rows))
    if language or shape.described is not None:
        step_memory += bytes_of_chunks(splits.train, largest, through_head=language)
    # A share that would take long, or more memory than is free, is not tried: its time follows from the few rows.
    if few * share / rows <= PROBE_SECONDS and step_memory <= free_memory(device):
        rows = share
    batch, stream = made.batch(rows)
    if rows > len(first.rows):
        _timed(student, batch)  # allocates
        per_step = _mean_seconds(student, batch)
    block = evaluation_blocks(splits.train)
    evaluated = min(block, len(splits.validation), max(1, int(rows * PROBE_SECONDS / per_step)))
    evaluation = _evaluation_seconds(student, splits, evaluated)
    weights = _bytes_of(student.module.state_dict().values())
    why_not = _why_not_stacked(stacked, shape, language=language, tried=rows == share)
    if why_not is not None:
        judged = Judged(False, why_not)
    else:
        judged = judge(
            spec.model_copy(update={"workers": shape.workers}),
            *(card, folder / "stacks", batch, shape.last, per_step, step_memory, device),
            wanted=stacked == "always",
        )
    return Measured(
        step=per_step * share / rows,
        stream=stream * share / rows,
        evaluation=judged.evaluation if judged.stacked else evaluation / evaluated,
        start=start,
        # The shorter of two, since the first also makes the folder.
        keeping=min(_seconds(student.save), _seconds(student.save)) if weights <= KEPT_BYTES else 0.0,
        weights=weights,
        gradients=_bytes_of(one.grad for one in student.module.parameters() if one.grad is not None),
        optimizer=_bytes_of(
            value
            for state in student.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
        step_memory=step_memory,
        evaluation_memory=math.ceil(block * (2 * saved.largest / len(first.rows) + 4 * values))
        + (bytes_of_chunks(splits.train, block, through_head=True) if language else 0),
        stacked=judged.stacked,
        why=judged.why,
        stack=judged.once,
        together=judged.each,
    )


def evaluation_blocks(rows: Rows) -> int:
    """Rows that are evaluated together."""
    return blocks_at_once(rows) if rows.task == "language_model" else evaluation_rows(rows.classes)


def bytes_of_chunks(rows: Rows, count: int, *, through_head: bool) -> int:
    """Bytes of the logits that losses hold of a batch of so many rows: a chunk of them, or all of a classifier's, with
    what is decoded and shared.
    """
    targets = math.ceil(count * max(1.0, rows.targets / max(1, len(rows))))
    chunk = min(targets, chunk_targets(rows.classes)) if through_head else targets
    return 4 * rows.classes * chunk + SHARED_BYTES * min(1, targets)


@dataclass(frozen=True)
class _Made:
    """Batches with a teacher that says the same of everything."""

    data: recipe.DataSpec
    splits: Splits
    device: torch.device
    described: Mapping[str, Any] | None

    def batch(self, rows: int) -> tuple[Batch, float]:
        """A batch of so many rows, and the seconds that the stream took for it."""
        data, train = self.data, self.splits.train
        stream = BatchStream(
            train, None, data.augmentation, data.seed, data.views, batch=rows, window=data.window, device=self.device
        )
        batches = stream.batches(0)
        batch = next(batches)
        # Of those that are made in one go with the first, or ahead, the time tells nothing.
        collections.deque(itertools.islice(batches, stream.steps_at_once - 1), maxlen=0)
        started, made = time.perf_counter(), 0
        for _ in itertools.islice(batches, stream.steps_at_once + stream.ahead):
            made += 1
        if not made:  # the first were all that an epoch has
            made = sum(1 for _ in stream.batches(0))
        seconds = (time.perf_counter() - started) / made
        return dataclasses.replace(batch, **self._said(batch), global_rows=len(batch.rows)), seconds

    def _said(self, batch: Batch) -> dict[str, Any]:
        classes = self.splits.train.classes
        counts = np.ones(len(batch.rows), np.int64)
        if self.splits.train.task == "language_model":
            counts = batch.labels.cpu().numpy()
        elif self.described is None:
            return {"logits": torch.zeros(len(batch.rows), classes, device=self.device)}
        return {"targets": unsaid(counts, classes, self.described, self.device)}


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _timed(student: Student, batch: Batch) -> float:
    # An epoch without an end, so that no schedule moves the learning rate while steps are timed.
    return _seconds(lambda: student.take_step(batch, steps_per_epoch=1 << 30))  # waits for a GPU: it reads the loss


def _mean_seconds(student: Student, batch: Batch) -> float:
    started, steps = time.perf_counter(), 0
    while steps == 0 or (steps < PROBE_STEPS and time.perf_counter() - started < PROBE_SECONDS):
        _timed(student, batch)
        steps += 1
    return (time.perf_counter() - started) / steps


@torch.inference_mode()
def _evaluation_seconds(student: Student, splits: Splits, rows: int) -> float:
    student.module.eval()
    started = time.perf_counter()
    if splits.validation.task == "language_model":
        some = dataclasses.replace(
            splits.validation, inputs=splits.validation.read(0, rows)[0], labels=splits.validation.labels[:rows]
        )
        student.evaluate(some)
        return time.perf_counter() - started
    inputs = torch.from_numpy(np.array(splits.validation.read(0, rows)[0])).to(student.device)
    with autocast(student.device, student.spec.precision):
        student.module(inputs).sum().item()
    return time.perf_counter() - started


class _SavedTensors:
    """Counts the bytes that autograd keeps from the forward to the backward pass, each storage once; not weights."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
        self.total = self.largest = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor

    def __enter__(self) -> _SavedTensors:
        self.hooks.__enter__()
        return self

    def __exit__(self, *leaving: object) -> None:
        self.hooks.__exit__(*leaving)


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
