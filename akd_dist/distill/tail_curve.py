"""The mass of a tail at any temperature, from its log-mass at a few.

L(b) is the log of the sum over the tail of exp(b (z_j - max z)), and b is 1 / T. The curve is smooth and convex, its
value at 0 is the log of how many classes the tail has, and its slope at 0 the tail's mean logit below the largest one:
so the polynomial through these and a few stored nodes comes close.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError

LOWEST = -32.0
"""The smallest L that can be stored: a mass of e^-32 of the largest class."""


def check_temperature(temperature: float, stored: Sequence[float]) -> None:
    """Whether a store can be asked for a temperature.

    Raises:
        RefusedError: it is no number, or below the first one that is stored: nothing tells the tail's mass there.
    """
    first = min(stored, default=1.0)
    if not (math.isfinite(temperature) and temperature >= first - 1e-9):
        raise RefusedError(
            "the tail of this store is not described at such a temperature",
            got=f"temperature {temperature:g}",
            expected=f"{first:g} or more, the first of its tail_temperatures",
            next="choose a higher temperature, or cache anew with encoding float16, which serves any",
        )


def log_mass(temperature: float, stored: Sequence[float], values: Tensor, log_size: float, slope: Tensor) -> Tensor:
    """L(1 / T) of each target by Newton's divided differences, through a double node at 0 and the stored ones.

    Args:
        stored: the temperatures of the nodes.
        values: L at these, float [n, t].
        log_size: L(0), the log of how many classes the tail has.
        slope: L'(0), [n]: the mean logit of the tail less the largest logit.

    Returns:
        float64 [n]; exactly what is stored where T is a node.

    Raises:
        RefusedError: as `check_temperature`.
    """
    check_temperature(temperature, stored)
    node = _node(temperature, stored)
    if node is not None:
        return values[:, node].double()
    places = [0.0, 0.0, *(1 / one for one in stored)]
    start = torch.full_like(slope, log_size, dtype=torch.float64)
    column = [start, start, *values.double().unbind(1)]
    found, basis, b = start, 1.0, 1 / temperature
    for order in range(1, len(places)):
        column = [
            slope.double()
            if places[i] == places[i + order]
            else (column[i + 1] - column[i]) / (places[i + order] - places[i])
            for i in range(len(places) - order)
        ]
        basis *= b - places[order - 1]
        found = found + column[0] * basis
    return found


def _node(temperature: float, stored: Sequence[float]) -> int | None:
    return next((at for at, one in enumerate(stored) if math.isclose(one, temperature, rel_tol=1e-9)), None)
