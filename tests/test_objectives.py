"""The schedule and the losses against values worked out by hand and by torch in the simplest way."""

import pytest
import torch
from torch.nn import functional

from akd_dist.objectives import (
    Stage,
    annealing_losses,
    hard_label_losses,
    learning_rate,
    phi,
    row_losses,
    stages,
    temperature,
)
from akd_dist.recipe import AnnealingKD, Constant, HardLabels, Linear, Steps
from akd_dist.storage.errors import RecipeError


def test_temperature_by_hand() -> None:
    assert [temperature(i, 10, 5) for i in range(1, 11)] == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [temperature(i, 7, 3) for i in range(1, 8)] == [3, 3, 3, 2, 2, 1, 1]
    assert [phi(t, 4) for t in (4, 3, 2, 1)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("n", range(1, 40))
def test_temperature_starts_at_tau_max_falls_and_ends_at_one(n: int) -> None:
    for tau_max in range(1, n + 1):
        fall = [temperature(i, n, tau_max) for i in range(1, n + 1)]
        assert fall[0] == tau_max
        assert fall[-1] == 1
        assert set(fall) == set(range(1, tau_max + 1))
        assert fall == sorted(fall, reverse=True)


@pytest.mark.parametrize(("n", "tau_max"), [(200, 10), (14, 7), (20, 20), (12, 1)])
def test_temperature_equals_the_authors_counter_where_tau_max_divides_n(n: int, tau_max: int) -> None:
    counter, theirs = 1, []
    for epoch in range(n):  # their counter t climbs by one every n / tau_max epochs, and Phi = t / tau_max
        if epoch and epoch % (n // tau_max) == 0:
            counter += 1
        theirs.append(counter / tau_max)
    assert [phi(temperature(i, n, tau_max), tau_max) for i in range(1, n + 1)] == pytest.approx(theirs)


def test_too_few_epochs_are_refused_naming_both_numbers() -> None:
    with pytest.raises(RecipeError, match=r"(?s)stage1_epochs = 4.*tau_max = 5"):
        temperature(1, 4, 5)


def test_annealing_loss_by_hand() -> None:
    z_s, z_t = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 8.0]], dtype=torch.float16)
    # 0.5 z_t = (1, 4): squares 0 and 4
    assert annealing_losses(z_s, z_t, 0.5).tolist() == [2.0]
    assert annealing_losses(z_s, z_t, 0.5, "sum").tolist() == [4.0]


def test_mean_reduction_is_torchs_mse_loss() -> None:
    z_s, z_t = torch.randn(7, 5), torch.randn(7, 5)
    assert torch.allclose(annealing_losses(z_s, z_t, 0.3).mean(), functional.mse_loss(z_s, 0.3 * z_t))


def test_hard_label_loss_by_hand() -> None:
    losses = hard_label_losses(torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]]), torch.tensor([0, 1]))
    assert torch.allclose(losses, torch.log(torch.tensor([2.0, 4 / 3])))


def test_stages_of_annealing_kd() -> None:
    first, second = stages(AnnealingKD(kind="annealing_kd", tau_max=4, stage1_epochs=8, stage2_epochs=3))
    assert (first.name, first.epochs, first.needs_logits) == ("annealing", 8, True)
    assert (second.name, second.epochs, second.needs_logits) == ("hard_labels", 3, False)
    assert [first.phi(epoch) for epoch in (0, 7)] == [0.25, 1.0]
    assert second.phi(0) is None
    assert stages(HardLabels(kind="hard_labels", epochs=5)) == (Stage("hard_labels", 5),)


def test_row_losses_use_the_epochs_phi() -> None:
    stage, z = Stage("annealing", 4, tau_max=4), torch.ones(2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    assert row_losses(stage, 0, z, 4 * z, labels).tolist() == [0.0, 0.0]  # Phi = 1/4
    assert row_losses(stage, 3, z, 4 * z, labels).tolist() == [9.0, 9.0]  # Phi = 1


def test_learning_rates() -> None:
    steps = Steps(kind="steps")
    assert [learning_rate(1.0, steps, s, 8) for s in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [learning_rate(2.0, Linear(kind="linear"), s, 4) for s in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert learning_rate(0.3, Constant(kind="constant"), 7, 8) == 0.3
