"""Searches in recipes: what is drawn, how trials are named, which rungs there are, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from akd_dist.base.errors import RecipeError
from akd_dist.recipe import Range, Search, load_recipe, load_search, rung_count, rung_epochs

RECIPE = """
name: digits
data: {train: {kind: digits}}
teacher: {model: {kind: mlp, hidden: 8}, train: {epochs: 1, optimizer: {kind: sgd, lr: 0.1}}}
students:
  - model: {kind: mlp, hidden: 8}
    objective: {kind: annealing_kd, stage2_epochs: 2}
    optimizer: {kind: sgd}
    %(grid)s
    search: {%(search)s}
  - model: {kind: mlp, hidden: 8}
    objective: {kind: hard_labels, epochs: 3}
    optimizer: {kind: sgd, lr: 0.1}
"""
LENGTHS = "objective.tau_max: [1, 4], objective.stage1_epochs: {low: 2, high: 9}"
SPACE = f"{LENGTHS}, optimizer.lr: {{low: 1e-3, high: 1, log: true}}"


def write(folder: Path, search: str, grid: str = "batch: 32") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE % {"search": search, "grid": grid})
    return path


def test_trials_are_students_of_one_run(tmp_path: Path) -> None:
    found = load_search(write(tmp_path, f"{SPACE}, trials: 6", "grid: {seed: [0, 3]}"))
    (tuning,) = found.tunings
    assert (found.recipe.name, found.others, tuning.name) == ("digits-tune", 1, "mlp-8-annealing_kd")
    assert [trial.students for trial in tuning.trials][:2] == [
        ["mlp-8-annealing_kd-k000-s0", "mlp-8-annealing_kd-k000-s3"],
        ["mlp-8-annealing_kd-k001-s0", "mlp-8-annealing_kd-k001-s3"],
    ]
    assert [spec.name for spec in found.recipe.students] == [name for one in tuning.trials for name in one.students]
    specs = {spec.name: spec for spec in found.recipe.students}
    for trial in tuning.trials:
        for name in trial.students:
            objective: Any = specs[name].objective
            assert objective.tau_max == trial.values["objective.tau_max"]
            assert objective.stage1_epochs == trial.values["objective.stage1_epochs"] >= objective.tau_max
            assert specs[name].optimizer.lr == trial.values["optimizer.lr"]


def test_neither_names_nor_seeds_of_students_are_searched(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"students\.0\.search\.name does not fit") as refused:
        load_search(write(tmp_path, f"{LENGTHS}, name: [a, b]"))
    assert "differ in their name alone" in str(refused.value.expected)
    with pytest.raises(RecipeError, match=r"students\.0\.search does not fit"):  # it is that of the draws
        load_search(write(tmp_path, f"{LENGTHS}, seed: [0, 1]"))


def test_more_trials_are_the_same_and_further_ones(tmp_path: Path) -> None:
    few, more = (load_search(write(tmp_path, f"{SPACE}, trials: {count}")).tunings[0].trials for count in (5, 12))
    assert more[:5] == few
    assert len({repr(trial.values) for trial in more}) == 12
    other = load_search(write(tmp_path, f"{SPACE}, trials: 5, seed: 1")).tunings[0].trials
    assert [one.values for one in other] != [one.values for one in few]


def test_a_further_key_changes_no_draw_of_the_others() -> None:
    one = Search.of({"optimizer.lr": {"low": 0.001, "high": 1.0, "log": True}, "trials": 5})
    two = Search.of({"optimizer.lr": {"low": 0.001, "high": 1.0, "log": True}, "batch": [16, 32], "trials": 5})
    assert [draw["optimizer.lr"] for draw, _ in zip(one.draws(), range(5), strict=False)] == [
        draw["optimizer.lr"] for draw, _ in zip(two.draws(), range(5), strict=False)
    ]


def test_of_a_few_combinations_each_is_tried_once(tmp_path: Path) -> None:
    search = "objective.tau_max: [1, 2], objective.stage1_epochs: [2, 4], optimizer.lr: [0.1]"
    (tuning,) = load_search(write(tmp_path, search)).tunings
    assert len(tuning.trials) == 4
    assert [trial.values["objective.stage1_epochs"] for trial in tuning.trials] == [2, 4, 2, 4]


def test_a_grid_of_models_is_a_search_for_each(tmp_path: Path) -> None:
    path = write(tmp_path, f"{SPACE}, trials: 3", "grid: {batch: [16, 32], seed: [0, 1]}")
    found = load_search(path)
    assert [tuning.name for tuning in found.tunings] == ["mlp-8-annealing_kd", "mlp-8-annealing_kd-2"]
    assert len(found.recipe.students) == 2 * 3 * 2


@pytest.mark.parametrize(("low", "high", "log"), [(0.001, 1.0, True), (0.5, 2.5, False), (1, 8, False), (1, 64, True)])
def test_ranges_hold_what_is_drawn(low: float, high: float, log: bool) -> None:
    space = Range(low=low, high=high, log=log)
    found = [space.at((number + 0.5) / 1000) for number in range(1000)]
    assert min(found) == pytest.approx(low, rel=0.01)
    assert max(found) == pytest.approx(high, rel=0.01)
    assert all(low <= value <= high for value in found)
    assert {type(value) for value in found} == {type(low)}
    middle = math.sqrt(low * high) if log else (low + high) / 2
    share = sum(value < middle for value in found) / 1000
    assert 0.38 < share < 0.62


def test_whole_numbers_are_equally_likely() -> None:
    space = Range(low=1, high=4)
    found = [space.at((number + 0.5) / 1000) for number in range(1000)]
    assert [found.count(value) for value in (1, 2, 3, 4)] == [250] * 4


@pytest.mark.parametrize(
    ("epochs", "trials", "reduction", "expected"),
    [
        (27, 27, 3, [1, 3, 9, 27]),
        (30, 27, 3, [1, 3, 10, 30]),
        (100, 9, 3, [11, 33, 100]),
        (5, 100, 3, [1, 5]),
        (2, 100, 3, [2]),
        (64, 16, 4, [4, 16, 64]),
        (10, 2, 3, [10]),
    ],
)
def test_rungs(epochs: int, trials: int, reduction: int, expected: list[int]) -> None:
    count = rung_count(epochs, trials, reduction)
    assert rung_epochs(epochs, count, reduction) == expected


# ---- bad input

BAD = {
    "objective.tau_max: [1, 2], optimiser.lr: [0.1, 0.2]": "optimiser",
    "optimizer.lr: {low: 1, high: 0.1}": "low must be less",
    "optimizer.lr: {low: 0.0, high: 0.1, log: true}": "needs a number above 0",
    "optimizer.lr: {low: 0.1, high: 0.2, step: 0.1}": "step",
    "optimizer.lr: []": "at least 1 item",
    "optimizer.lr: 0.1": "optimizer.lr",
    "trials: 4": "at least 1 item",
    "optimizer.lr: [0.1, 0.2], trials: 1": "greater than or equal to 2",
    "optimizer.lr: [0.1, 0.2], reduction: 1": "greater than or equal to 2",
    "optimizer.lr: [0.1, 0.2], batch: [16, 32]": "batch in the block and in its search",
    "objective.tau_max: [8], objective.stage1_epochs: [2, 4], optimizer.lr: [0.1]": "stage I needs at least tau_max",
    "objective.tau_max: [2], objective.stage1_epochs: [4], optimizer.lr: [0.1]": "single combination",
    "objective.tau_max: [2], objective.stage1_epochs: [4], optimizer.lr: [-0.1, -0.2]": "optimizer.sgd.lr",
}


@pytest.mark.parametrize("search", BAD)
def test_a_search_that_is_none_is_refused_with_its_line(tmp_path: Path, search: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_search(write(tmp_path, search))
    assert BAD[search] in str(refused.value)
    assert "recipe.yaml:" in str(refused.value)


def test_students_and_searches_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, f"{SPACE}, trials: 3")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:10: this block is a search") as refused:
        load_recipe(path)
    assert "akd-dist tune" in str(refused.value.next)
    path.write_text(path.read_text().replace("search", "grid").replace("{low: 2, high: 9}", "[4]"))
    with pytest.raises(RecipeError, match="has no search"):
        load_search(path, ["students.0.grid={batch: [8]}"])


def test_what_else_is_wrong_is_told_as_ever(tmp_path: Path) -> None:
    path = write(tmp_path, f"{SPACE}, trials: 3")
    path.write_text(path.read_text().replace("kind: hard_labels, epochs: 3", "kind: hard_labels, epohcs: 3"))
    with pytest.raises(RecipeError, match="epohcs"):
        load_search(path)
    with pytest.raises(ValidationError):
        Search.of({"optimizer.lr": [float("nan")], "trials": 0.5})
