"""What a model returns -> its logits: one rule for training, caching, evaluation and exports alike.

    logits = logits_of(body(inputs))

Libraries differ in what `forward` gives: a tensor; a tuple or list that begins with the logits; a dict, a named tuple
or an object such as transformers' ModelOutput that calls them `logits`. A name counts for more than a place: a named
tuple of (loss, logits) begins with something else.
"""

from collections.abc import Mapping
from typing import Any

import torch

NAME = "logits"
"""What a dict or an object calls them."""
EXPECTED = f"a tensor of floats; a tuple or list that begins with it; or a dict or an object that calls it `{NAME}`"
"""What a model may return, for messages."""
SUM_TOLERANCE = 1e-3
"""How far the sum of a row may be from 1 to count as one of probabilities; half precision is that coarse."""
_SHOWN = 8


class NoLogitsError(TypeError):
    """A model returned something in which there are no logits; says what it was, by type."""


def logits_of(returned: Any) -> torch.Tensor:
    """The logits in what a model's `forward` returned.

    Raises:
        NoLogitsError: there are none.
    """
    found = returned
    if isinstance(returned, Mapping):
        found = returned.get(NAME)
    elif not isinstance(returned, torch.Tensor):
        first = returned[0] if isinstance(returned, tuple | list) and returned else None
        found = getattr(returned, NAME, first)
    if isinstance(found, torch.Tensor) and found.is_floating_point():
        return found
    raise NoLogitsError(_in_words(returned))


def are_probabilities(logits: torch.Tensor) -> bool:
    """Whether every row looks like a softmax was taken of it: [n, classes], none negative, all summing to 1.

    Logarithms of probabilities are nothing to warn of: they are logits, shifted by a number for each row.
    """
    sums = logits.double().sum(dim=1)
    return bool((logits >= 0).all() and ((sums - 1).abs() <= SUM_TOLERANCE).all())


def _in_words(returned: Any) -> str:
    """What something is, and what it holds, by type."""
    kind = type(returned).__name__
    if isinstance(returned, torch.Tensor):
        return f"a tensor of {str(returned.dtype).removeprefix('torch.')}, of shape {list(returned.shape)}"
    if isinstance(returned, Mapping):
        held = [f"{key}: {type(value).__name__}" for key, value in list(returned.items())[:_SHOWN]]
    elif isinstance(returned, tuple | list):
        held = [
            _in_words(item) if isinstance(item, torch.Tensor) else type(item).__name__ for item in returned[:_SHOWN]
        ]
    elif hasattr(returned, NAME):
        held = [f"{NAME}: {type(getattr(returned, NAME)).__name__}"]
    else:
        return f"a {kind}"
    more = f", and {len(returned) - _SHOWN} more" if hasattr(returned, "__len__") and len(returned) > _SHOWN else ""
    return f"a {kind} of {', '.join(held)}{more}" if held else f"a {kind} of nothing"
