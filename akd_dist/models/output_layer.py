"""The last layer of a classifier that gives logits as a linear function of what it takes: found by what it does.

Names of layers say little, so a row is shown to the model: the layer is the one whose output is what the body returns,
the same memory, with nothing done to it since. Where there is none, a classifier is known by its logits alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from akd_dist.models.build import Classifier
from akd_dist.models.outputs import logits_of


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """A layer of a classifier, and how it computes."""

    layer: nn.Linear
    dtype: torch.dtype
    """Of its logits: that of its weights, or half precision under autocast."""


class _Reached(BaseException):  # a model that catches errors must not catch this
    """The forward pass has come to the last layer."""


def output_layer(module: nn.Module, inputs: Tensor) -> OutputLayer | None:
    """The layer of a classifier in eval mode that its logits come from; None where there is none, or it is compiled.

    Args:
        inputs: raw, [n, *shape], of any rows, on the module's device; under autocast if those of a store are.
    """
    if not isinstance(module, Classifier):
        return None
    seen: list[tuple[nn.Linear, Tensor, Tensor, int]] = []
    returned: list[Tensor] = []

    def passed(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        seen.append((layer, given[0], out, out._version))

    with contextlib.ExitStack() as hooks, torch.no_grad():  # which counts changes of a tensor, unlike inference mode
        for layer in _linear_layers(module):
            hooks.enter_context(layer.register_forward_hook(passed))
        hooks.enter_context(module.body.register_forward_hook(lambda body, given, out: returned.append(logits_of(out))))
        module(inputs)
        for layer, given, out, version in seen:
            alone = sum(layer is other for other, *_ in seen) == 1
            if alone and _is_untouched(out, version, returned[-1]) and _is_linear(layer, given, out):
                return OutputLayer(layer, out.dtype)
    return None


def states_of(module: nn.Module, output: OutputLayer, inputs: Tensor) -> Tensor:
    """What the last layer takes, [n, d], in the dtype that it computes in; the layer itself is not run."""
    caught: list[Tensor] = []

    def stop(layer: nn.Module, given: tuple[Any, ...]) -> None:
        caught.append(given[0])
        raise _Reached

    with output.layer.register_forward_pre_hook(stop), contextlib.suppress(_Reached):
        module(inputs)
    return caught[0].to(output.dtype)


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """Those that are nothing but linear: a class derived of it may do anything."""
    return (layer for layer in module.modules() if type(layer) is nn.Linear)


def _is_untouched(out: Tensor, version: int, returned: Tensor) -> bool:
    """Whether what is returned is what a layer gave, which nobody has worked on since."""
    same_place = out.data_ptr() == returned.data_ptr() and out.stride() == returned.stride()
    return same_place and out.shape == returned.shape and out.dim() == 2 and returned._version == version


def _is_linear(layer: nn.Linear, given: Tensor, out: Tensor) -> bool:
    """Whether a layer gave what its weights say, to the last bit: hooks of others may have had a hand in it."""
    return given.dim() == 2 and torch.equal(nn.functional.linear(given, layer.weight, layer.bias), out)
