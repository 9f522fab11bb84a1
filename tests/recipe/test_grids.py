"""Grids of students: expanded, and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from akd_dist import recipe as recipes
from akd_dist.base.errors import RecipeError
from akd_dist.recipe import load_recipe
from akd_dist.recipe.grid_names import names_of_grid
from tests.recipe_texts import MLP, SEED, TEXT


def test_a_grid_expands_as_a_product_in_file_order(path: Path) -> None:
    assert [student.name for student in load_recipe(path).students] == [
        *(f"mlp-{hidden}-annealing_kd-t2-s{seed}" for hidden in (4, 8) for seed in (0, 1, 2)),
        "cnn-2-hard_labels-s0",
    ]


def names_of(path: Path, *grids: dict[str, list[Any]]) -> list[str]:
    """Names of the students of blocks with these grids; what a grid does not give is as usual."""
    blocks = []
    for grid in grids:
        block: dict[str, Any] = {
            "model": {"kind": "mlp", "hidden": 4},
            "objective": {"kind": "annealing_kd", "tau_max": 2, "stage1_epochs": 4, "stage2_epochs": 1},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
        }
        for key in grid:
            first, _, second = key.partition(".")
            (block.get(first, {}) if second else block).pop(second or first, None)
        blocks.append(block | {"grid": grid})
    path.write_text(TEXT.split("students:")[0] + f"students: {json.dumps(blocks)}\n")
    return [student.name for student in load_recipe(path).students]


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        ({"batch": [32, 64]}, ["batch32", "batch64"]),
        ({"batch": [32, 64], "threads": [1]}, ["batch32", "batch64"]),
        ({"optimizer.lr": [1, 0.01]}, ["lr1", "lr0.01"]),
        ({"objective.stage1_epochs": [10, 20]}, ["n10", "n20"]),
        ({"objective.stage2_epochs": [5, 6], "batch": [2, 3]}, ["m5-batch2", "m5-batch3", "m6-batch2", "m6-batch3"]),
        ({"precision": ["float32", "float64"]}, ["precision_float32", "precision_float64"]),
        ({"optimizer.schedule.kind": ["linear", "constant"]}, ["schedule_linear", "schedule_constant"]),
        ({"optimizer.clip": [None, 0.5]}, ["clip_none", "clip0.5"]),
        ({"sync_batchnorm": [True, False]}, ["sync_batchnorm_true", "sync_batchnorm_false"]),
        ({"optimizer.betas": [[0.9, 0.99], [0.9, 0.999]]}, ["betas0.9x0.99", "betas0.9x0.999"]),
        ({"optimizer.weight_decay": [1e-5, 100.0, 0.1234567891]}, ["wd1e-05", "wd100", "wd0.1234567891"]),
        (
            {"objective.stage2_optimizer": [None, {"kind": "sgd", "lr": 0.1}]},
            ["stage2_optimizer_none", "stage2_optimizer_sgd-lr0.1"],
        ),
    ],
)
def test_names_of_a_grid_tell_what_default_names_do_not(
    path: Path, grid: dict[str, list[Any]], more: list[str]
) -> None:
    assert names_of(path, grid) == [f"{MLP}-{one}-{SEED}" for one in more]


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        # These are as they always were: default names tell them apart.
        ({"seed": [0, 1], "model": [{"kind": "mlp", "hidden": [4]}]}, [f"{MLP}-s0", f"{MLP}-s1"]),
        ({"model.hidden": [[4], [8]], "seed": [3]}, [f"mlp-{hidden}-annealing_kd-t2-s3" for hidden in (4, 8)]),
        (
            {"model.hidden": [4], "model.dropout": [0, 0.5]},
            [f"mlp-{label}-annealing_kd-t2-s0" for label in ("4", "4d0.5")],
        ),
        # The seed stays last, and what is told is not told twice.
        (
            {"optimizer.lr": [0.01, 0.1], "model": [{"kind": "mlp", "hidden": 4}, {"kind": "cnn", "width": 2}]},
            [f"{model}-annealing_kd-t2-lr{lr}-s0" for lr in ("0.01", "0.1") for model in ("mlp-4", "cnn-2")],
        ),
        (
            {"objective.tau_max": [2, 3], "seed": [0, 7], "objective.stage1_epochs": [3, 6]},
            [f"mlp-4-annealing_kd-t{tau}-n{n}-s{seed}" for tau in (2, 3) for seed in (0, 7) for n in (3, 6)],
        ),
        # Students without a key go without it.
        (
            {
                "objective": [
                    {"kind": "kd", "epochs": 3},
                    {"kind": "kd", "epochs": 3, "alpha": 0.1},
                    {"kind": "hard_labels", "epochs": 4},
                ]
            },
            ["mlp-4-kd-s0", "mlp-4-kd-alpha0.1-s0", "mlp-4-hard_labels-s0"],
        ),
        # Keys that end alike are told apart.
        (
            {
                "optimizer": [{"kind": "sgd", "lr": lr} for lr in (0.1, 1)],
                "objective.stage2_optimizer": [{"kind": "sgd", "lr": 1e-8}, {"kind": "sgd", "lr": 0.5}],
            },
            [
                f"{MLP}-optimizer_lr{first}-stage2_optimizer_lr{second}-s0"
                for first in ("0.1", "1")
                for second in ("1e-08", "0.5")
            ],
        ),
    ],
)
def test_names_of_a_grid_hold_no_more_than_they_must(path: Path, grid: dict[str, list[Any]], names: list[str]) -> None:
    assert names_of(path, grid) == names


def test_a_name_depends_on_its_block_alone(path: Path) -> None:
    first = names_of(path, {"batch": [1, 2]})
    second = [f"{MLP}-s{seed}" for seed in (3, 4)]
    assert names_of(path, {"batch": [1, 2]}, {"threads": [3], "seed": [3, 4]}) == first + second
    with pytest.raises(RecipeError, match=r"several students are named .*-batch2-s0.*a default name holds"):
        names_of(path, {"batch": [1, 2]}, {"batch": [2, 3]})


def test_a_name_of_a_block_stands_before_those_of_its_grid(path: Path) -> None:
    students: list[dict[str, Any]] = []
    for name in (None, "low", "one"):
        model = {"kind": "mlp", "hidden": 4}
        block = {"model": model, "objective": {"kind": "hard_labels", "epochs": 1}}
        block |= {"optimizer": {"kind": "sgd", "lr": 0.1}, "grid": {"seed": [0] if name == "one" else [0, 1]}}
        students.append(block if name is None else {"name": name} | block)
    path.write_text(TEXT.split("students:")[0] + f"students: {json.dumps(students)}\n")
    plain = [f"mlp-4-hard_labels-s{seed}" for seed in (0, 1)]
    names = [student.name for student in load_recipe(path).students]
    assert names == [*plain, *(f"low-{one}" for one in plain), "one"]
    students[1]["name"] = 3
    path.write_text(TEXT.split("students:")[0] + f"students: {json.dumps(students)}\n")
    with pytest.raises(RecipeError, match="name"):
        load_recipe(path)


def test_long_and_strange_values_make_names_of_folders() -> None:
    strange: list[Any] = ["x/y", "x:y", "z" * 200, "z" * 201, ["é", 1], {}, True]
    given: list[dict[tuple[str, ...], Any]] = [{("model", "arguments", "a b"): value} for value in strange]
    names = names_of_grid(["net-kd-s7"] * len(given), given)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(recipes.NAME.fullmatch(name) for name in names)
    assert names[0].startswith("net-kd-a_b_x_y.")
    assert names[-2:] == ["net-kd-s7", "net-kd-a_b_true-s7"]
    many: list[dict[tuple[str, ...], Any]] = [
        {("model", f"quite_a_long_key_{key}"): value + key for key in range(9)} for value in (0, 1)
    ]
    names = names_of_grid(["net-kd-s7"] * 2, many)
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"net-kd-[0-9a-f]{8}-s7", name) for name in names)
