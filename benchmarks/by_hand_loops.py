"""What a good engineer would write to train the students of `by_hand` without this project: plain PyTorch on arrays.

    python -m benchmarks.by_hand_loops ARRAYS.npz processes    as many processes as cores, each with its share
    python -m benchmarks.by_hand_loops ARRAYS.npz stacked      one process, students of one size in one go

ARRAYS.npz holds what a cache of the teacher's views would: `views` float32 [views, rows, pixels], `logits` float32
[views, rows, classes], `labels`, and `validation` and `test` with their labels. Both keep the best weights of each
stage by validation accuracy, as the method asks, and print the mean test accuracy. Nothing is saved.
"""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

BATCH, RATE, TAU_MAX = 64, 1e-2, 5
STAGE1, STAGE2 = 30, 10

Arrays = dict[str, torch.Tensor]


@dataclass(frozen=True)
class One:
    """A student."""

    hidden: int
    seed: int
    distilled: bool
    """Annealing-KD, or from the labels alone."""


def students_of(seeds: int) -> list[One]:
    """Four sizes, two objectives, so many seeds."""
    return [
        One(hidden, seed, distilled)
        for distilled in (True, False)
        for hidden in (8, 16, 32, 64)
        for seed in range(seeds)
    ]


def stages_of(one: One) -> list[tuple[bool, int]]:
    """Whether a stage learns from the teacher, and its epochs."""
    return [(True, STAGE1), (False, STAGE2)] if one.distilled else [(False, STAGE1 + STAGE2)]


def phi_of(epoch: int) -> float:
    """The annealing factor of an epoch of stage I."""
    temperature = max(1, TAU_MAX - epoch * TAU_MAX // STAGE1)
    return 1 - (temperature - 1) / TAU_MAX


def mlp(one: One, pixels: int, classes: int) -> nn.Module:
    """Its model."""
    torch.manual_seed(one.seed)
    return nn.Sequential(nn.Linear(pixels, one.hidden), nn.ReLU(), nn.Linear(one.hidden, classes))


def load(path: str) -> Arrays:
    """The arrays as tensors."""
    with np.load(path) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def batches(epoch: int, rows: int) -> list[torch.Tensor]:
    """The rows of each batch: the same order for everyone."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
    return list(order.split(BATCH))  # type: ignore[no-untyped-call]


# ---- one after the other


def train_one(one: One, arrays: Arrays) -> float:
    """Its test accuracy."""
    views, logits, labels = arrays["views"], arrays["logits"], arrays["labels"]
    model = mlp(one, views.shape[2], logits.shape[2])
    passed = 0
    for from_teacher, epochs in stages_of(one):
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        steps, total, best, kept = 0, epochs * math.ceil(len(labels) / BATCH), -1.0, None
        for epoch in range(epochs):
            view = passed % len(views)
            for rows in batches(passed, len(labels)):
                optimizer.param_groups[0]["lr"] = RATE * (1 - steps / total)
                z = model(views[view, rows])
                if from_teacher:
                    loss = functional.mse_loss(z, phi_of(epoch) * logits[view, rows])
                else:
                    loss = functional.cross_entropy(z, labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
            passed += 1
            if (accuracy := measured(model, arrays, "validation")) > best:
                best, kept = accuracy, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert kept is not None
        model.load_state_dict(kept)
    return measured(model, arrays, "test")


@torch.no_grad()
def measured(model: nn.Module, arrays: Arrays, split: str) -> float:
    """Accuracy on a split."""
    return float((model(arrays[split]).argmax(1) == arrays[f"{split}_labels"]).float().mean())


def share(job: tuple[str, list[One]]) -> list[float]:
    """What one process trains."""
    torch.set_num_threads(1)
    arrays = load(job[0])
    return [train_one(one, arrays) for one in job[1]]


def in_processes(path: str, students: list[One]) -> list[float]:
    """All of them, in as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("fork")) as pool:
        parts = list(pool.map(share, [(path, students[start::cores]) for start in range(cores)]))
    return [accuracy for part in parts for accuracy in part]


# ---- in one go


def stacked(arrays: Arrays, students: list[One]) -> list[float]:
    """Students of one size and objective in one go."""
    torch.set_num_threads(1)
    found = []
    for hidden in sorted({one.hidden for one in students}):
        for distilled in (True, False):
            found += train_stack(
                [one for one in students if (one.hidden, one.distilled) == (hidden, distilled)], arrays
            )
    return found


def train_stack(students: list[One], arrays: Arrays) -> list[float]:
    """Their test accuracies."""
    views, logits, labels = arrays["views"], arrays["logits"], arrays["labels"]
    models = [mlp(one, views.shape[2], logits.shape[2]) for one in students]
    weights, _ = stack_module_state(models)
    base, passed = models[0], 0

    def said(weights: Any, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = vmap(lambda one: functional_call(base, one, (inputs,)))(weights)
        return found

    def accuracies(weights: Any, split: str) -> torch.Tensor:
        with torch.no_grad():
            return (said(weights, arrays[split]).argmax(2) == arrays[f"{split}_labels"]).float().mean(1)

    for from_teacher, epochs in stages_of(students[0]):
        optimizer = torch.optim.AdamW(weights.values(), lr=RATE, fused=True)
        steps, total = 0, epochs * math.ceil(len(labels) / BATCH)
        best, kept = torch.full((len(students),), -1.0), {name: one.detach().clone() for name, one in weights.items()}
        for epoch in range(epochs):
            view = passed % len(views)
            for rows in batches(passed, len(labels)):
                optimizer.param_groups[0]["lr"] = RATE * (1 - steps / total)
                z = said(weights, views[view, rows])
                if from_teacher:
                    losses = (z - phi_of(epoch) * logits[view, rows]).square().mean((1, 2))
                else:
                    several = labels[rows].expand(len(students), -1).flatten()
                    losses = functional.cross_entropy(z.flatten(0, 1), several, reduction="none").view(z.shape[:2])
                    losses = losses.mean(1)
                optimizer.zero_grad()
                losses.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
            passed += 1
            now = accuracies(weights, "validation")
            better = now > best
            best = torch.where(better, now, best)
            for name, tensor in kept.items():
                tensor[better] = weights[name].detach()[better]
        weights = {name: one.clone().requires_grad_() for name, one in kept.items()}
    return accuracies(weights, "test").tolist()


if __name__ == "__main__":
    file, way, count = sys.argv[1:]
    everyone = students_of(int(count))
    results = in_processes(file, everyone) if way == "processes" else stacked(load(file), everyone)
    print(json.dumps({"students": len(results), "accuracy": float(np.mean(results))}))
