"""What a student begins a stage with: its optimizer, the states of its generators, and weights that are its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.files import sha256
from akd_dist.models.uncompiled import prepare_optimizers, step_plainly


def seeded_states(device: torch.device, seed: int, stage: int, rank: int) -> list[torch.Tensor]:
    """The states of all generators that computing on a device draws from, in the order of `generator_states`.

    A stage starts with them: they depend on the student's seed, the stage and the rank alone.
    """
    digest = sha256(f"student {seed} stage {stage} rank {rank}".encode())  # ranks drop other units
    devices = dict.fromkeys(("cpu", device.type))
    # 60 bits of the digest: a seed that torch takes as a positive number, whatever kind of generator it is for.
    return [torch.Generator(one).manual_seed(int(digest[:15], 16)).get_state() for one in devices]


def make_optimizer(trained: Iterable[nn.Parameter], spec: recipe.Optimizer) -> torch.optim.Optimizer:
    """A fresh optimizer of these parameters.

    The fused kernels are several times faster on small models and just as deterministic.
    """
    prepare_optimizers()
    both: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "fused": True}
    optimizer: torch.optim.Optimizer
    if isinstance(spec, recipe.Sgd):
        optimizer = torch.optim.SGD(trained, momentum=spec.momentum, nesterov=spec.nesterov, **both)
    else:
        optimizer = torch.optim.AdamW(trained, betas=spec.betas, eps=spec.eps, **both)
    step_plainly(optimizer)
    return optimizer


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}
