"""How torch is kept from importing its compiler where nothing is compiled: it takes a process more than a second.

What torch does by itself is not changed: where this finds another torch than it knows, the compiler is imported.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_COMPILER = "torch._dynamo"
_FILLING = frozenset(
    getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "bernoulli_", "exponential_", "random_")
)


def use_deterministic_algorithms(strict: bool) -> None:
    """As torch's function of that name, which imports the compiler to tell it, too."""
    if _COMPILER in sys.modules:
        torch.use_deterministic_algorithms(strict)
    else:
        torch.set_deterministic_debug_mode("error" if strict else "default")


def prepare_optimizers() -> None:
    """Have optimizers be made without the compiler, which they import to have it turned off for what they do."""
    if _COMPILER in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None:
            plain.__dynamo_disable = plain  # where torch keeps the function with the compiler turned off


def step_plainly(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer step without what torch lays around it: the compiler again, and hooks, which nobody sets."""
    plain = inspect.unwrap(type(optimizer).step)
    optimizer.step = torch.no_grad()(functools.partial(plain, optimizer))  # type: ignore[method-assign]


class WithoutNumbers(TorchFunctionMode):
    """While it lasts, tensors on torch's meta device, which hold nothing, are not filled with random numbers: torch
    would import its compiler for their shapes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls for each function of tensors."""
        if func in _FILLING and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
