"""The schedules and the losses against values worked out by hand, and against torch used in the simplest way."""

import math

import pytest
import torch
from torch.nn import functional

from akd_dist.base.errors import RecipeError
from akd_dist.distill.losses import annealing_losses, label_losses, softened_losses
from akd_dist.distill.objectives import (
    AnnealingStage,
    ContinuationStage,
    HardLabelStage,
    KdStage,
    Stage,
    row_losses,
    stages,
)
from akd_dist.distill.schedules import continuation_temperature, learning_rate, phi, psi, temperature
from akd_dist.recipe import AnnealingKD, Constant, ContinuationKD, HardLabels, Kd, Linear, Objective, Steps, Takd

# ---- schedules


def test_temperature_by_hand() -> None:
    assert [temperature(i, 10, 5) for i in range(1, 11)] == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [temperature(i, 7, 3) for i in range(1, 8)] == [3, 3, 3, 2, 2, 1, 1]
    assert [phi(t, 4) for t in (4, 3, 2, 1)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("n", range(1, 40))
def test_temperature_starts_at_tau_max_falls_and_ends_at_one(n: int) -> None:
    for tau_max in range(1, n + 1):
        for schedule in (temperature, continuation_temperature):
            fall = [schedule(i, n, tau_max) for i in range(1, n + 1)]
            assert fall[0] == tau_max
            assert fall[-1] == 1
            assert set(fall) == set(range(1, tau_max + 1))
            assert fall == sorted(fall, reverse=True)


@pytest.mark.parametrize(("n", "tau_max"), [(200, 10), (14, 7), (20, 20), (12, 1)])
def test_temperature_equals_the_authors_counter(n: int, tau_max: int) -> None:
    counter, theirs = 1, []
    for epoch in range(n):  # their counter t climbs by one every n / tau_max epochs, and Phi = t / tau_max
        if epoch and epoch % (n // tau_max) == 0:
            counter += 1
        theirs.append(counter / tau_max)
    assert [phi(temperature(i, n, tau_max), tau_max) for i in range(1, n + 1)] == pytest.approx(theirs)


def test_too_few_epochs_are_refused_naming_both_numbers() -> None:
    with pytest.raises(RecipeError, match=r"(?s)stage1_epochs = 4.*tau_max = 5"):
        temperature(1, 4, 5)
    with pytest.raises(RecipeError, match=r"(?s)epochs = 4.*tau_max = 5"):
        continuation_temperature(1, 4, 5)


def test_continuation_kd_on_cifar_as_in_the_paper() -> None:
    """n = 200, tau_max = 20, psi = min(1, i / 150): k = floor(200 / 20) = 10 epochs for each temperature."""
    (stage,) = stages(ContinuationKD(epochs=200, tau_max=20))
    assert [stage.temperature(i - 1) for i in (1, 10, 11, 20, 21, 190, 191, 200)] == [20, 20, 19, 19, 18, 2, 1, 1]
    assert [stage.phi(i - 1) for i in (1, 11, 200)] == pytest.approx([1 / 20, 2 / 20, 1])
    assert [stage.psi(i - 1) for i in (1, 75, 149, 150, 151, 200)] == pytest.approx([1 / 150, 0.5, 149 / 150, 1, 1, 1])


def test_continuation_kd_on_glue_as_in_the_paper() -> None:
    """n = 30, tau_max = 10, psi = i / 40 up to i = 20 and 1 afterwards: k = 3."""
    (stage,) = stages(ContinuationKD(epochs=30, tau_max=10, ramp=40, ramp_until=20))
    assert [stage.temperature(i - 1) for i in (1, 3, 4, 27, 28, 30)] == [10, 10, 9, 2, 1, 1]
    assert [stage.psi(i - 1) for i in (1, 10, 20, 21, 30)] == pytest.approx([1 / 40, 0.25, 0.5, 1, 1])


def test_continuation_kd_with_an_odd_tau_max() -> None:
    # k = floor(7 / 3) = 2
    assert [continuation_temperature(i, 7, 3) for i in range(1, 8)] == [3, 3, 2, 2, 1, 1, 1]
    (stage,) = stages(ContinuationKD(epochs=7, tau_max=3))  # ramp = floor(3/4 * 7) = 5
    assert [stage.psi(epoch) for epoch in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert [psi(i, 4, 2) for i in (1, 2, 3)] == [0.25, 0.5, 1]
    (single,) = stages(ContinuationKD(epochs=1, tau_max=1))
    assert (single.psi(0), single.phi(0)) == (1, 1)


def test_learning_rates() -> None:
    steps = Steps(kind="steps")
    assert [learning_rate(1.0, steps, s, 8) for s in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [learning_rate(2.0, Linear(kind="linear"), s, 4) for s in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert learning_rate(0.3, Constant(kind="constant"), 7, 8) == 0.3


# ---- losses, by hand

LOG2, LOG3 = math.log(2), math.log(3)
EVEN = torch.tensor([[0.0, 0.0]])  # softmax 1/2, 1/2
ONE_TO_THREE = torch.tensor([[0.0, LOG3]])  # softmax 1/4, 3/4


def test_annealing_loss_by_hand() -> None:
    z_s, z_t = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 8.0]])
    # 0.5 z_t = (1, 4): squares 0 and 4
    assert annealing_losses(z_s, z_t, 0.5).tolist() == [2.0]
    assert annealing_losses(z_s, z_t, 0.5, "sum").tolist() == [4.0]


def test_label_losses_by_hand() -> None:
    losses = label_losses(torch.cat([EVEN, ONE_TO_THREE]), torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([LOG2, math.log(4 / 3)])  # -log 1/2 and -log 3/4
    # a regression: (5 - 3)^2 and (-1 - 2)^2
    assert label_losses(torch.tensor([[3.0], [2.0]]), torch.tensor([5.0, -1.0])).tolist() == [4.0, 9.0]


def test_softened_loss_by_hand() -> None:
    # T = 1: KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 log(1/2) + 3/4 log(3/2) = 3/4 log 3 - log 2
    assert softened_losses(EVEN, ONE_TO_THREE, 1).tolist() == pytest.approx([0.75 * LOG3 - LOG2])
    # the other way round it is another number: 1/2 log 2 + 1/2 log(2/3) = log 2 - 1/2 log 3
    assert softened_losses(ONE_TO_THREE, EVEN, 1).tolist() == pytest.approx([LOG2 - 0.5 * LOG3])
    # T = 2 halves the logits (0, 2 log 3) to (0, log 3), and the loss is multiplied by T^2 = 4
    assert softened_losses(EVEN, 2 * ONE_TO_THREE, 2).tolist() == pytest.approx([4 * (0.75 * LOG3 - LOG2)])


def test_kd_by_hand() -> None:
    labels = torch.tensor([1])
    # 3/4 of the label's -log 1/2, and 1/4 of the teacher's 4 (3/4 log 3 - log 2), as above
    stage = KdStage(5, softening=2, alpha=0.25)
    expected = 0.75 * LOG2 + 0.25 * 4 * (0.75 * LOG3 - LOG2)
    assert row_losses(stage, 0, EVEN, 2 * ONE_TO_THREE, labels).tolist() == pytest.approx([expected])
    # a regression: 3/4 (5 - 3)^2 + 1/4 (3 - 7)^2 = 3 + 4, whatever the temperature
    z_s, z_t = torch.tensor([[3.0]]), torch.tensor([[7.0]])
    assert row_losses(stage, 0, z_s, z_t, torch.tensor([5.0])).tolist() == [7.0]


def test_continuation_by_hand() -> None:
    # tau_max 2 over 4 epochs: Phi = 1/2, 1/2, 1, 1; psi = 1/4, 1/2, 3/4, 1
    stage = ContinuationStage(4, tau_max=2, ramp=4, ramp_until=4, margin=1.0)
    z_t, labels = torch.tensor([[4.0, 8.0]]), torch.tensor([0])
    # Phi z_t = (2, 4), as far as (2, 4) from (0, 0): mean of squares 10, less m Phi = 1/2; CE is log 2
    assert row_losses(stage, 0, EVEN, z_t, labels).tolist() == pytest.approx([0.25 * LOG2 + 0.75 * 9.5])
    # Phi = 1: squares 16 and 64, mean 40, less 1
    assert row_losses(stage, 2, EVEN, z_t, labels).tolist() == pytest.approx([0.75 * LOG2 + 0.25 * 39])
    assert row_losses(stage, 3, EVEN, z_t, labels).tolist() == pytest.approx([LOG2])  # psi = 1: labels alone
    summed = ContinuationStage(4, tau_max=2, ramp=4, ramp_until=4, margin=1.0, reduction="sum")
    assert row_losses(summed, 0, EVEN, z_t, labels).tolist() == pytest.approx([0.25 * LOG2 + 0.75 * 19.5])


def test_a_distance_below_the_margin_costs_nothing() -> None:
    stage = ContinuationStage(4, tau_max=1, ramp=4, ramp_until=4, margin=2.0)  # Phi = 1 in every epoch
    z_s, z_t = torch.zeros(2, 1, requires_grad=True), torch.tensor([[1.0], [2.0]])
    labels = torch.tensor([0.0, 0.0])
    # squares 1 and 4: 1 is below the margin of 2, and 4 is 2 above it; the labels are met
    losses = row_losses(stage, 0, z_s, z_t, labels)
    assert losses.tolist() == [0.0, 0.75 * 2]
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert z_s.grad is not None
    assert z_s.grad.tolist() == [[0.0], [0.75 * -4.0]]  # d/dz (z - 2)^2 = -4 at 0


def test_continuation_for_regression_by_hand() -> None:
    stage = ContinuationStage(4, tau_max=2, ramp=4, ramp_until=4, margin=2.0)
    # psi = 1/4: 1/4 (5 - 3)^2 + 3/4 max(0, (3 - 1/2 * 10)^2 - 2 * 1/2) = 1 + 3/4 * 3
    losses = row_losses(stage, 0, torch.tensor([[3.0]]), torch.tensor([[10.0]]), torch.tensor([5.0]))
    assert losses.tolist() == [3.25]


# ---- losses, by torch


def test_mean_reduction_is_torchs_mse_loss() -> None:
    z_s, z_t = torch.randn(7, 5), torch.randn(7, 5)
    assert torch.allclose(annealing_losses(z_s, z_t, 0.3).mean(), functional.mse_loss(z_s, 0.3 * z_t))


def test_kd_is_torchs_kl_div_and_cross_entropy() -> None:
    z_s, z_t, labels = torch.randn(7, 5), torch.randn(7, 5), torch.arange(7) % 5
    divergence = functional.kl_div(
        functional.log_softmax(z_s / 5, 1), functional.softmax(z_t / 5, 1), reduction="batchmean"
    )
    expected = 0.7 * functional.cross_entropy(z_s, labels) + 0.3 * 25 * divergence
    assert torch.allclose(row_losses(KdStage(1, 5.0, 0.3), 0, z_s, z_t, labels).mean(), expected, atol=1e-6)


def test_continuation_is_torchs_cross_entropy_and_hinge() -> None:
    z_s, z_t, labels = torch.randn(7, 5), torch.randn(7, 5), torch.arange(7) % 5
    stage = ContinuationStage(6, tau_max=3, ramp=5, ramp_until=5, margin=1.5)
    # epoch 3 of 6: T = 2, Phi = 2/3, psi = 3/5
    hinge = functional.relu(functional.mse_loss(z_s, 2 / 3 * z_t, reduction="none").mean(1) - 1.5 * 2 / 3)
    expected = 0.6 * functional.cross_entropy(z_s, labels) + 0.4 * hinge.mean()
    assert torch.allclose(row_losses(stage, 2, z_s, z_t, labels).mean(), expected, atol=1e-6)


# ---- stages

EVERY: list[Objective] = [
    AnnealingKD(tau_max=2, stage1_epochs=2, stage2_epochs=1),
    HardLabels(epochs=2),
    Kd(epochs=2),
    Takd(epochs=2),
    ContinuationKD(tau_max=2, epochs=4, ramp=2),
]


def test_stages_of_annealing_kd() -> None:
    first, second = stages(AnnealingKD(kind="annealing_kd", tau_max=4, stage1_epochs=8, stage2_epochs=3))
    assert (first.name, first.epochs, first.needs_logits) == ("annealing", 8, True)
    assert (second.name, second.epochs, second.needs_logits) == ("hard_labels", 3, False)
    assert [first.phi(epoch) for epoch in (0, 7)] == [0.25, 1.0]
    assert (second.temperature(0), second.phi(0), second.psi(0)) == (None, None, None)
    assert stages(HardLabels(kind="hard_labels", epochs=5)) == (HardLabelStage(5),)


def test_takd_is_kd() -> None:
    settings = {"epochs": 4, "temperature": 3.0, "alpha": 0.9}
    assert stages(Takd.model_validate(settings)) == stages(Kd.model_validate(settings)) == (KdStage(4, 3.0, 0.9),)


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: objective.kind)
def test_stages_last_as_long_as_their_objective(objective: Objective) -> None:
    assert sum(stage.epochs for stage in stages(objective)) == objective.epochs
    assert any(stage.needs_logits for stage in stages(objective)) == (objective.learns_from != "labels")


def test_row_losses_use_the_epochs_phi() -> None:
    stage, z = AnnealingStage(4, tau_max=4), torch.ones(2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    assert row_losses(stage, 0, z, 4 * z, labels).tolist() == [0.0, 0.0]  # Phi = 1/4
    assert row_losses(stage, 3, z, 4 * z, labels).tolist() == [9.0, 9.0]  # Phi = 1


@pytest.mark.parametrize(
    "stage", [stage for objective in EVERY for stage in stages(objective)], ids=lambda one: one.name
)
@pytest.mark.parametrize("regression", [False, True], ids=["classification", "regression"])
def test_losses_are_at_least_float32_whatever_goes_in(stage: Stage, regression: bool) -> None:
    classes = 1 if regression else 3
    labels = torch.tensor([0.5, 2.0]) if regression else torch.tensor([0, 2])
    z_s, z_t = torch.randn(2, classes), torch.randn(2, classes).half()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        losses = row_losses(stage, 0, z_s.to(dtype), z_t if stage.needs_logits else None, labels)
        assert losses.shape == (2,)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The same as in float64 of these very numbers: nothing was rounded to half on the way.
        exact = row_losses(stage, 0, z_s.to(dtype).double(), z_t if stage.needs_logits else None, labels)
        assert torch.allclose(losses.double(), exact, rtol=1e-5, atol=1e-6)
