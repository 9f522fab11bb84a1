"""Torch without its compiler: what trains does not import it, and comes to what torch comes to."""

import subprocess
import sys

import torch

from akd_dist import recipe
from akd_dist.distill.beginnings import make_optimizer
from akd_dist.models.uncompiled import WithoutNumbers

TRAINS = """
import sys, torch
from akd_dist import recipe
from akd_dist.distill.beginnings import make_optimizer
from akd_dist.models.device import set_deterministic
from akd_dist.models.uncompiled import WithoutNumbers
set_deterministic("cpu", 1)
assert torch.are_deterministic_algorithms_enabled()
with torch.device("meta"), WithoutNumbers():
    torch.nn.Conv2d(3, 4, 3)
layer = torch.nn.Linear(3, 2)
for spec in (recipe.AdamW(lr=0.1), recipe.Sgd(lr=0.1)):
    optimizer = make_optimizer(layer.parameters(), spec)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
"""


def test_what_trains_does_not_import_the_compiler() -> None:
    told = subprocess.run([sys.executable, "-c", TRAINS], capture_output=True, text=True, check=False)
    assert (told.stdout, told.returncode) == ("False\n", 0), told.stderr


def test_optimizers_step_as_torch_has_them_step() -> None:
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    spec = recipe.AdamW(lr=0.1, weight_decay=0.01)
    steps = [make_optimizer(ours.parameters(), spec).step]
    steps.append(torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.01, fused=True, eps=spec.eps).step)
    for _ in range(3):
        for layer, step in zip((ours, theirs), steps, strict=True):
            layer(torch.ones(4, 3)).square().sum().backward()
            step()
            layer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)


def test_only_what_holds_nothing_is_left_unfilled() -> None:
    with WithoutNumbers():
        assert torch.empty(3, device="meta").normal_().is_meta
        assert torch.zeros(100).normal_().any()
