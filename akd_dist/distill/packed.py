"""The trained weights of a module in one vector, so that those of several modules can be the rows of one matrix.

The module keeps working: its parameters are views into the vector. An optimizer that is given the vector takes one
fused step over all of them, with the same arithmetic for each number as parameter by parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

_ALIGNED = 64
"""Every parameter begins at a multiple of so many numbers: at an address where vector units like to read, in whichever
row it lies."""


class NotStackableError(Exception):
    """A module whose steps cannot be taken together with those of others; says why."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the vector."""

    start: int
    """The first of its numbers."""
    shape: torch.Size
    """Its shape."""

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The parameter in vectors: [numbers] -> [*shape], or [n, numbers] -> [n, *shape]; a view."""
        chosen = rows[..., self.start : self.start + self.shape.numel()]
        return chosen.view(*rows.shape[:-1], *self.shape)


class Packed:
    """A module whose trained parameters lie in one vector.

    Args:
        module: moved there in place; what is frozen, and buffers, stay where they are.

    Raises:
        NotStackableError: nothing is trained, or in more than one dtype.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
        kinds = {(one.dtype, one.device) for one in self.trained.values()}
        if len(kinds) != 1:
            raise NotStackableError(f"its trained weights are of {len(kinds)} dtypes and devices, not of one")
        self.slots, size = dict[str, Slot](), 0
        for name, one in self.trained.items():
            self.slots[name] = Slot(size, one.shape)
            size += math.ceil(one.numel() / _ALIGNED) * _ALIGNED
        ((dtype, device),) = kinds
        self.vector = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        """float [numbers], with zeros between the parameters."""
        self.move(torch.zeros(size, dtype=dtype, device=device))

    def move(self, row: torch.Tensor) -> None:
        """Have the weights lie in this vector from now on: [numbers], whose content they overwrite."""
        for name, slot in self.slots.items():
            place = slot.of(row)
            place.copy_(self.trained[name].detach())
            self.trained[name].data = place
        self.vector.data = row

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """What else the module computes with: frozen parameters and buffers, by name."""
        frozen = {name: one for name, one in self.module.named_parameters() if not one.requires_grad}
        return frozen | dict(self.module.named_buffers())
