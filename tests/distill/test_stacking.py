"""Which models step in stacks, as a trial finds, and what a run keeps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.rows import Splits
from akd_dist.distill.probe import Measured, probe
from akd_dist.distill.stacking import STACK_BYTES, most_together
from akd_dist.documents.fleet import Stacking
from akd_dist.jobs.planning.probing import scaled
from akd_dist.jobs.planning.stacking import key_of, settle_stacking, stacks_of
from akd_dist.recipe import DataSpec, Digits, Stacked, StudentSpec
from tests.distill.test_stack import MLP, TRAIN, a_student

MODULE = "tests.distill.test_stacking"
SPLITS = Splits(TRAIN, TRAIN, TRAIN)


def found(folder: Path, stacked: Stacked = "always", **changes: Any) -> Measured:
    spec = a_student(folder, 0, together=False, **changes).spec
    data = DataSpec.model_validate({"train": {"kind": "digits"}})
    assert isinstance(data.train, Digits)
    return probe(data, "cpu", spec, SPLITS, folder / "probe", stacked)


def own(name: str) -> dict[str, str]:
    return {"kind": "custom", "factory": f"{MODULE}:{name}"}


class Branches(nn.Module):
    """Looks at values to decide what to do."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.layer(inputs.flatten(1))
        return logits if logits.sum() > 0 else 2 * logits


def branches(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Branches(math.prod(input_shape), classes)


class Noisy(Branches):
    """Draws by other means than a layer of dropout."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.layer(inputs.flatten(1))
        return logits + torch.rand_like(logits)


def noisy(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Noisy(math.prod(input_shape), classes)


class Hidden(Branches):
    """Has a number of its own that is neither parameter nor buffer: another one in each student."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        self.factor = float(torch.rand(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.factor * self.layer(inputs.flatten(1))
        return logits


def hidden(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Hidden(math.prod(input_shape), classes)


class Across(Branches):
    """What it says of a row depends on the rows beside it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        flat = inputs.flatten(1)
        logits: torch.Tensor = self.layer(flat - flat.mean(dim=0))
        return logits


def across(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Across(math.prod(input_shape), classes)


class Unused(Branches):
    """Has a parameter that no loss reaches."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        self.other = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.layer(inputs.flatten(1))
        return logits


def unused(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Unused(math.prod(input_shape), classes)


class Slow(Branches):
    """Assigns its running mean anew, of which a stack would keep nothing; and so slowly that one step hardly shows."""

    mean: torch.Tensor

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits."""
        flat = inputs.flatten(1)
        if self.training:
            self.mean = 0.9999 * self.mean + 0.0001 * flat.detach().mean(dim=0)
        logits: torch.Tensor = self.layer(flat - self.mean)
        return logits


def slow(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Slow(math.prod(input_shape), classes)


def normed(input_shape: tuple[int, ...], classes: int, momentum: float | None = 0.1) -> nn.Module:
    # Without the bias that the norm takes off again: its gradient is rounding alone, which AdamW makes whole steps of.
    first, norm = nn.Linear(math.prod(input_shape), 16, bias=False), nn.BatchNorm1d(16, momentum=momentum)
    return nn.Sequential(nn.Flatten(), first, norm, nn.ReLU(), nn.Linear(16, classes))


def averaged(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return normed(input_shape, classes, momentum=None)


def frozen(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    first = nn.Linear(math.prod(input_shape), 8).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(8, classes))


@pytest.mark.parametrize("model", [MLP, MLP | {"dropout": 0.2}, own("frozen")], ids=["mlp", "dropout", "frozen"])
def test_models_that_step_in_stacks(model: dict[str, Any], tmp_path: Path) -> None:
    measured = found(tmp_path, model=model)
    assert measured.stacked, measured.why
    assert "times as many steps a second" in measured.why
    assert measured.together + measured.stack > 0  # either may come out as 0 on a busy machine


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("branches", "torch cannot batch it over students"),
        ("noisy", "torch cannot batch it over students"),
        ("hidden", "its last bits are other ones in a stack of 7"),
        ("across", "its gradients in a stack are"),
        ("unused", "torch cannot batch it over students"),
        ("slow", "its buffer body.mean is not in a stack what it becomes alone"),
        ("averaged", "torch cannot batch it over students"),
    ],
)
def test_models_that_step_alone_and_why(name: str, why: str, tmp_path: Path) -> None:
    measured = found(tmp_path, model=own(name))
    assert not measured.stacked
    assert why in measured.why


def test_what_the_recipe_says_goes_first(tmp_path: Path) -> None:
    assert found(tmp_path / "a", "never").why == "the recipe says stacked: never"
    assert "several workers" in found(tmp_path / "b", workers=2).why
    assert "float16" in found(tmp_path / "c", precision="float16").why


def test_a_stack_that_memory_does_not_hold_is_cut() -> None:
    assert most_together(STACK_BYTES["cpu"], "cpu") == most_together(3 * STACK_BYTES["cpu"], "cpu") == 1
    assert most_together(STACK_BYTES["cpu"] // 10, "cpu") == 10


def a_recipe(stacked: Stacked, *specs: StudentSpec) -> Any:
    from tests.fleets import a_recipe as made

    return made([json.loads(spec.model_dump_json()) for spec in specs], stacked=stacked)


def test_a_run_keeps_how_its_students_step(tmp_path: Path) -> None:
    spec, other = (a_student(tmp_path, n, together=False, model=m).spec for n, m in ((0, MLP), (1, own("branches"))))
    measured = found(tmp_path, model=MLP)
    recipe = a_recipe("auto", spec, other)
    both: dict[str, Measured | None] = {spec.name: measured, other.name: None}
    settled, kept = settle_stacking(recipe, [spec, other], both, {})
    assert kept is not None
    assert [kept[key_of(one)].stacked for one in (spec, other)] == [True, False]
    assert stacks_of([spec, other], settled, "cpu") == {spec.name: most_together(measured.step_memory, "cpu")}

    # Whatever a later trial says, and be it the contrary.
    contrary = {key_of(spec): Stacking(model="mlp", stacked=False, why="so it was")}
    settled, again = settle_stacking(recipe, [spec], {spec.name: measured}, contrary)
    assert (again, stacks_of([spec], settled, "cpu")) == (contrary, {})
    slower: dict[str, Measured | None] = {spec.name: scaled(measured, 1.0)}
    settled, again = settle_stacking(recipe, [spec], slower, kept)
    assert again == kept
    assert spec.name in stacks_of([spec], settled, "cpu")

    # A run of before there were stacks goes on one by one, new students too.
    settled, none = settle_stacking(recipe, [spec], {spec.name: measured}, None)
    assert (none, stacks_of([spec], settled, "cpu")) == (None, {})

    with pytest.raises(RecipeError, match=r"stacked: always, and student-1 cannot step in a stack") as refused:
        settle_stacking(a_recipe("always", spec, other), [spec, other], both, {})
    assert refused.value.next == "set stacked: auto, by which such students step one after the other"


def test_the_way_of_steps_does_not_depend_on_seed_rate_or_objective(tmp_path: Path) -> None:
    from tests.fleets import KD

    plain = a_student(tmp_path, 0).spec
    others = [a_student(tmp_path, 7).spec, a_student(tmp_path, 0, objective=KD | {"epochs": 9}).spec]
    assert {key_of(spec) for spec in (plain, *others)} == {key_of(plain)}
    assert key_of(a_student(tmp_path, 0, batch=16).spec) != key_of(plain)


def test_checkpoints_of_the_other_way_are_refused(tmp_path: Path) -> None:
    a_student(tmp_path, 0, together=False).save()
    with pytest.raises(RefusedError, match="the checkpoints of student-0 cannot be gone on from") as refused:
        a_student(tmp_path, 0).resume()
    assert "were taken alone" in str(refused.value)
    assert a_student(tmp_path, 0, together=False).resume()
