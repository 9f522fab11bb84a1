"""A short measured probe of a student: seconds of its step, of the stream and of evaluation, and the memory it takes.

The step is the student's own (its module, loss, optimizer and precision), on a share of a batch of the real rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from akd_dist import recipe
from akd_dist.device import settle, weights_dtype
from akd_dist.models import ModelCard
from akd_dist.objectives import stages
from akd_dist.recipe import Recipe
from akd_dist.rows import Splits
from akd_dist.stream import Batch, Stream
from akd_dist.student import EVALUATION_ROWS, Student

FIRST_ROWS = 16
"""Rows of a first step, by which it is seen whether a step on the whole batch is short enough to be measured."""
PROBE_SECONDS = 0.25
"""How long the timed steps of one model take at most, or one step of the first rows where that takes longer."""
ALL_SECONDS = 30.0
"""How long the probes of a fleet take at most; further models are estimated from the nearest by size."""

log = logging.getLogger(__name__)


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


def measure_all(
    fleet: Recipe, students: list[recipe.Student], splits: Splits, parameters: dict[str, int]
) -> dict[str, Measured | None]:
    """What each student takes, from one probe of each distinct model, batch and optimizer on this machine.

    Once the probes have taken ALL_SECONDS, models that are still unknown are estimated from the one nearest in
    parameters, in proportion.

    Args:
        parameters: of each student, by name.

    Returns:
        By the name of the student; None where the probe failed: its worker will tell why, as it would without a probe.
    """
    found: dict[str, Measured | None] = {}
    sizes: dict[str, int] = {}
    late: dict[str, recipe.Student] = {}
    started = time.monotonic()
    for spec in students:
        key = probe_key(spec)
        if key in found or key in late:
            continue
        sizes[key] = parameters[spec.name]
        if time.monotonic() - started < ALL_SECONDS:
            found[key] = probe(fleet, spec, splits)
        else:
            late[key] = spec
    known = {key: one for key, one in found.items() if one is not None}
    for key in late:
        nearest = min(known, key=lambda other: abs(sizes[other] - sizes[key]), default=None)
        found[key] = None if nearest is None else scaled(known[nearest], sizes[key] / max(sizes[nearest], 1))
    return {spec.name: found[probe_key(spec)] for spec in students}


def probe_key(spec: recipe.Student) -> str:
    """What the cost of a student's step depends on. Neither its seed nor its learning rate nor its temperature do."""
    optimizer = largest_optimizer(spec)
    return "\n".join(
        [
            spec.model.model_dump_json(),
            f"{spec.batch} {spec.workers} {spec.threads} {spec.precision}",
            f"{optimizer.kind} {moments(optimizer)} {optimizer.clip is None}",
        ]
    )


def largest_optimizer(spec: recipe.Student) -> recipe.Optimizer:
    """Of the optimizers of its stages the one that keeps most: all of it has to fit."""
    return max((stage.optimizer or spec.optimizer for stage in stages(spec.objective)), key=moments)


def moments(optimizer: recipe.Optimizer) -> int:
    """How many numbers an optimizer keeps for each weight."""
    return 2 if isinstance(optimizer, recipe.AdamW) else int(optimizer.momentum > 0)


def scaled(known: Measured, ratio: float) -> Measured:
    """The measurement of a model that is so many times as large; the stream stays as it is."""
    seconds = {name: getattr(known, name) * ratio for name in ("step", "evaluation", "start")}
    sizes = [one.name for one in dataclasses.fields(known) if one.name not in (*seconds, "stream")]
    return dataclasses.replace(known, **seconds, **{name: round(getattr(known, name) * ratio) for name in sizes})


def guessed(spec: recipe.Student, parameters: int) -> Measured:
    """What can be said of a student whose probe failed: its weights and optimizer by their number, and no time."""
    weights = parameters * weights_dtype(spec.precision).itemsize
    return Measured(0.0, 0.0, 0.0, 0.0, weights, weights, moments(largest_optimizer(spec)) * weights, 0, 0)


def probe(fleet: Recipe, spec: recipe.Student, splits: Splits) -> Measured | None:
    """Take a few steps of a student, here and now; None if it fails, whatever it raises.

    Threads, torch's settings and its generators are afterwards what they were, and nothing is left on the disk.
    """
    still = largest_optimizer(spec).model_copy(update={"lr": 1e-12})  # weights that hardly move do not diverge
    alone = spec.model_copy(update={"workers": 1, "sync_batchnorm": False, "optimizer": still})
    if spec.objective.epochs == 0:  # it takes no step, but the others do
        alone = alone.model_copy(update={"objective": recipe.HardLabels(epochs=1)})
    with _settings_kept(fleet.device), tempfile.TemporaryDirectory(prefix="akd-dist-probe-") as folder:
        try:
            device = settle(fleet.device, spec.threads)
            return _measure(fleet, alone, splits, device, Path(folder), share=-(-spec.batch // spec.workers))
        except Exception as error:
            log.warning("the probe of %s failed: %s", spec.name, error)
            return None


@contextlib.contextmanager
def _settings_kept(device: str) -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        # Without a GPU in the recipe none is touched: a driver would hold part of its memory.
        with torch.random.fork_rng([0] if device == "cuda" and torch.cuda.is_available() else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        torch.cuda.empty_cache()  # what the probe took of a GPU is the workers' now


def _measure(
    fleet: Recipe, spec: recipe.Student, splits: Splits, device: torch.device, folder: Path, share: int
) -> Measured:
    started = time.perf_counter()
    card = ModelCard.of(spec.model, splits.train, fleet.data.normalize)
    student = Student(spec, card, folder, log=folder / "log", device=device)
    start = time.perf_counter() - started
    share = min(share, len(splits.train))
    first = _batch(fleet, splits, min(FIRST_ROWS, share), device)[0]
    warm = _timed(student, first)  # the first step of a process also loads what torch needs
    with _SavedTensors(student.module) as saved:
        few = min(warm, _timed(student, first))
    rows, per_step = len(first.rows), few
    if few * share / rows <= PROBE_SECONDS:
        rows = share
    batch, stream = _batch(fleet, splits, rows, device)
    if rows > len(first.rows):
        _timed(student, batch)  # allocates
        per_step = _mean_seconds(student, batch)
    evaluated = min(EVALUATION_ROWS, len(splits.validation), max(1, int(rows * PROBE_SECONDS / per_step)))
    evaluation = _evaluation_seconds(student, splits, evaluated)
    values = splits.train.inputs[0].size
    kept = saved.total / len(first.rows) + 4 * values
    return Measured(
        step=per_step * share / rows,
        stream=stream * share / rows,
        evaluation=evaluation / evaluated,
        start=start,
        weights=_bytes_of(student.module.state_dict().values()),
        gradients=_bytes_of(one.grad for one in student.module.parameters() if one.grad is not None),
        optimizer=_bytes_of(
            value
            for state in student.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
        step_memory=math.ceil(share * (kept + 2 * saved.largest / len(first.rows))),
        evaluation_memory=math.ceil(EVALUATION_ROWS * (2 * saved.largest / len(first.rows) + 4 * values)),
    )


def _batch(fleet: Recipe, splits: Splits, rows: int, device: torch.device) -> tuple[Batch, float]:
    """A batch of so many rows, with logits that nobody computed, and the seconds that the stream took for it."""
    data = fleet.data
    stream = Stream(
        splits.train, None, data.augmentation, data.seed, data.views, batch=rows, window=data.window, device=device
    )
    batches = stream.batches(0)
    batch = next(batches)
    started = time.perf_counter()
    batch = next(batches, batch)
    seconds = time.perf_counter() - started
    logits = torch.zeros(len(batch.rows), splits.train.classes, device=device)
    return dataclasses.replace(batch, logits=logits, global_rows=len(batch.rows)), seconds


def _timed(student: Student, batch: Batch) -> float:
    started = time.perf_counter()
    student.take_step(batch, steps_per_epoch=1 << 30)  # waits for a GPU, since it reads the loss
    return time.perf_counter() - started


def _mean_seconds(student: Student, batch: Batch) -> float:
    started, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - started < PROBE_SECONDS:
        _timed(student, batch)
        steps += 1
    return (time.perf_counter() - started) / steps


@torch.inference_mode()
def _evaluation_seconds(student: Student, splits: Splits, rows: int) -> float:
    student.module.eval()
    started = time.perf_counter()
    inputs = torch.from_numpy(splits.validation.read(0, rows)[0].copy()).to(student.device)
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
