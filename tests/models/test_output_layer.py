"""The layer that logits come from: found where they are what it gave, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from akd_dist import recipe as recipes
from akd_dist.data.rows import Rows
from akd_dist.distill.capture import capture_logits
from akd_dist.distill.dictionary import HiddenProbe
from akd_dist.distill.target_teacher import WideTeacher
from akd_dist.models.build import Classifier
from akd_dist.models.card import ModelCard
from akd_dist.models.output_layer import output_layer, states_of

ROWS = Rows(
    np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32), np.arange(50) % 40, 40, "0" * 64, (), Path()
)
INPUTS = torch.from_numpy(ROWS.inputs)
CARD = ModelCard.of(recipes.Mlp(kind="mlp", hidden=8), ROWS, None)


class Body(nn.Module):
    """A layer of 8 numbers, the last one, and what is done with its logits."""

    def __init__(self, after: Any, calls: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 40)
        self.after, self.calls = after, calls

    def forward(self, inputs: Tensor) -> Any:
        states = self.first(inputs).relu()
        return self.after([self.last(states) for _ in range(self.calls)][-1])


def of(body: nn.Module) -> Classifier:
    return Classifier(body, CARD).eval()


@pytest.mark.parametrize(
    "after", [lambda z: z, lambda z: {"loss": z.sum(), "logits": z}, lambda z: (z, None), lambda z: z.view(-1, 40)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_logits(after: Any, dtype: torch.dtype) -> None:
    module = of(Body(after))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = output_layer(module, INPUTS[:1])
        assert found is not None
        assert found.layer is module.body.last
        states = states_of(module, found, INPUTS)
        logits = module(INPUTS)
    assert (states.dtype, found.dtype) == (dtype, dtype)
    weight, bias = found.layer.weight.to(dtype), found.layer.bias.to(dtype)
    assert torch.equal(nn.functional.linear(states, weight, bias).float(), logits)
    assert not found.layer._forward_hooks
    assert not found.layer._forward_pre_hooks


@pytest.mark.parametrize(
    "after",
    [
        torch.tanh, lambda z: z.clamp(-1e9, 1e9), lambda z: z.clamp_(-1e9, 1e9), lambda z: 2 * z, lambda z: z.mul_(2.0),
        lambda z: z[:, torch.arange(40)], lambda z: z[:, :-1],
    ],
)  # fmt: skip
def test_whoever_works_on_the_logits_has_none(after: Any) -> None:
    """Even if it changed nothing in the row that was shown."""
    assert output_layer(of(Body(after)), INPUTS[:1]) is None


def test_other_models_have_none() -> None:
    assert output_layer(of(Body(lambda z: z, calls=2)), INPUTS[:1]) is None
    hooked = Body(lambda z: z)
    hooked.last.register_forward_hook(lambda layer, given, out: out + 1)
    assert output_layer(of(hooked), INPUTS[:1]) is None
    assert output_layer(nn.Sequential(nn.Linear(6, 40)), INPUTS[:1]) is None  # as one that is compiled
    derived = Body(lambda z: z)
    derived.last = type("Scaled", (nn.Linear,), {})(8, 40)
    assert output_layer(of(derived), INPUTS[:1]) is None


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("after", [lambda z: z, torch.tanh])
def test_what_is_stored_is_what_the_teacher_says(after: Any, precision: recipes.Precision) -> None:
    """With a layer that is known and without: batches that are not whole, and more logits than the data has classes."""
    rows = Rows(ROWS.inputs, ROWS.labels % 39, 39, ROWS.fingerprint, (), Path())
    torch.manual_seed(1)
    module = of(Body(after)).to(torch.float64 if precision == "float64" else torch.float32)
    for parameter in module.parameters():
        parameter.data *= 3
    teacher = WideTeacher(
        module, rows, recipes.CacheSpec(batch_rows=17, precision=precision), 50, recipes.NoAugmentation(), 0
    )
    assert (teacher.head is None) == (after is torch.tanh)
    with torch.autocast("cpu", enabled=precision == "bfloat16"), torch.no_grad():
        z = module(INPUTS)[:, :39].float()
    want = capture_logits(z, None, k=5, temperatures=(1.0, 2.0))
    near = 0.05 if precision == "bfloat16" else 1e-5
    at = 0
    for batch in teacher.batches(0, 0, 50):
        found, part = teacher.described(batch, 5, (1.0, 2.0), None), slice(at, at + len(batch.targets))
        for name in ("values", "mean", "tail"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name)[part], atol=near, rtol=near)
        torch.testing.assert_close(teacher.logits(batch), z[part], atol=near, rtol=near)
        at += len(batch.targets)
    assert at == 50
    probe = teacher.probe(np.arange(3, 40, 2))
    assert isinstance(probe, HiddenProbe) == (after is not torch.tanh)
    torch.testing.assert_close(probe.logits(torch.tensor([0, 7, 18])), z[[3, 17, 39]], atol=near, rtol=near)
