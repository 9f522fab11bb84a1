"""Recipes that were resolved, what belongs to their identity, and rows without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from akd_dist import recipe as recipes
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.train_teacher import teacher_of
from akd_dist.recipe import Recipe, load_recipe
from tests.fleets import ADAMW, KD, a_recipe, a_student

# ---- resolved recipes


def test_a_resolved_recipe_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["students.1.optimizer.lr=1e-20", "name=on", "data.normalize={mean: [0], std: [1e16]}"])
    saved = tmp_path / "runs" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(recipe.to_yaml())
    assert saved.read_text().startswith("# ")
    assert load_recipe(saved) == recipe
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_identity_leaves_out_placement_and_paths(path: Path) -> None:
    parquet = "data.train={kind: parquet, path: %s, input: image, label: label}"
    placed = ["cohorts=3", "checkpoint_seconds=1", "folder=there"]
    here = load_recipe(path, [parquet % "here", "teacher={weights: here}"])
    there = load_recipe(path, [parquet % "there", "teacher={weights: there}", *placed])
    assert here.identity() == there.identity()
    assert here != there


def test_differences_name_keys_and_students(path: Path) -> None:
    ours, theirs = load_recipe(path), load_recipe(path, ["data.seed=1", "students.1.batch=32", "students.1.name=x"])
    told = recipes.differences(ours.identity(), theirs.identity())
    assert "data.seed: 0 -> 1" in told
    assert "students.x.batch: nothing -> 32" in told
    assert "students.cnn-2-hard_labels-s0.batch: 64 -> nothing" in told
    assert recipes.differences(ours.identity(), ours.identity()) == []


def test_a_later_key_leaves_earlier_results_as_they_are(tmp_path: Path) -> None:
    """The identity of a run and the name of a trained teacher, as they were before there was `last_batch`."""
    plain = {"model": {"kind": "mlp", "hidden": 4}, "objective": KD, "optimizer": ADAMW}
    train: dict[str, Any] = {"epochs": 1, "optimizer": ADAMW}
    teacher: dict[str, Any] = {"model": {"kind": "cnn", "width": 8}, "train": train, "assistant": plain}
    students = [a_student("one"), a_student("two", objective={"kind": "takd", "epochs": 1})]
    ours = a_recipe(students, teacher=teacher, device="cpu")
    assert sha256(canonical_json(ours.identity())) == IDENTITY
    splits = prepare(ours.data, tmp_path)

    def name_of(recipe: Recipe) -> str:
        trained = teacher_of(recipe, splits)
        assert trained is not None
        return trained.spec.name

    assert name_of(ours) == TEACHER
    other = a_recipe(students, teacher=teacher | {"train": train | {"last_batch": "merge"}}, device="cpu")
    assert name_of(other) != TEACHER
    dropped = {"last_batch": "drop"}
    for changed in (
        other,
        a_recipe([students[0], students[1] | dropped], teacher=teacher, device="cpu"),
        a_recipe(students, teacher=teacher | {"assistant": plain | dropped}, device="cpu"),
    ):
        assert changed.identity() != ours.identity()


IDENTITY = "912f106014aee16c112d96b3a47001167847f0eec0add1d73e51af1123bf1d3e"
TEACHER = "0d51d787c8d43c532c5978ec845f75dd"


# ---- rows without labels

UNLABELLED = {"train": {"kind": "digits"}, "subset": 100, "unlabelled": "rest"}
TABLES = {name: {"kind": "parquet", "path": f"{name}.parquet"} for name in ("validation", "test", "unlabelled")}
WEIGHTS = {"weights": "teacher"}


def learner(**changes: Any) -> dict[str, Any]:
    optimizer = {"kind": "adamw", "lr": 1e-3}
    return {"model": {"kind": "mlp", "hidden": 8}, "optimizer": optimizer, "name": "one"} | changes


@pytest.mark.parametrize(
    ("data", "student", "words"),
    [
        ({"train": {"kind": "digits"}, "unlabelled": "rest"}, {}, "set subset as well"),
        (TABLES | {"validation": 0.1}, {}, "no rows with labels to take validation from"),
        (TABLES | {"subset": 5}, {}, "subset and stratify are for rows with labels"),
        (UNLABELLED | {"train": {"kind": "idx", "images": "a"}}, {}, "train.labels is missing"),
        (UNLABELLED, {"labelled": 64}, "labelled is 64 and batch is 64"),
        (UNLABELLED, {"labelled": 4, "objective": {"kind": "hard_labels", "epochs": 3}}, "labelled left out"),
        ({"train": {"kind": "digits"}}, {"labelled": 4}, "data.unlabelled names no rows without labels"),
        (TABLES, {}, "kd learns from labels, and no train row has one"),
        (TABLES, {"objective": {"kind": "hard_labels", "epochs": 3}}, "kd with alpha: 1"),
    ],
)
def test_rows_without_labels_are_refused_where_they_make_no_sense(
    data: dict[str, Any], student: dict[str, Any], words: str
) -> None:
    student = learner(objective={"kind": "kd", "epochs": 3}) | student
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"name": "r", "data": data, "teacher": WEIGHTS, "students": [student]})
    assert words in str(caught.value)


def test_without_labels_a_teacher_cannot_be_trained_here() -> None:
    kd = learner(objective={"kind": "kd", "epochs": 3, "alpha": 1.0})
    train = {"model": {"kind": "mlp", "hidden": 8}, "train": {"epochs": 1, "optimizer": {"kind": "adamw", "lr": 1e-3}}}
    with pytest.raises(ValidationError, match="training a teacher needs labels"):
        Recipe.model_validate({"name": "r", "data": TABLES, "teacher": train, "students": [kd]})
    valid = Recipe.model_validate({"name": "r", "data": TABLES, "teacher": WEIGHTS, "students": [kd]})
    assert list(valid.data.sources) == ["validation", "test", "unlabelled"]


def test_a_teacher_of_all_rows_needs_a_subset_that_leaves_some_out() -> None:
    kd = learner(objective={"kind": "kd", "epochs": 3})
    optimizer = {"kind": "adamw", "lr": 1e-3}
    train = {"rows": "all", "epochs": 1, "optimizer": optimizer}
    document = {"name": "r", "teacher": {"model": {"kind": "mlp", "hidden": 8}, "train": train}, "students": [kd]}
    with pytest.raises(ValidationError, match=r"teacher\.train\.rows\n.* rows that data\.subset leaves out"):
        Recipe.model_validate(document | {"data": {"train": {"kind": "digits"}}})
    recipe = Recipe.model_validate(document | {"data": UNLABELLED})
    assert recipe.data_of_teachers is not None
    assert (recipe.data_of_teachers.subset, recipe.data_of_teachers.unlabelled) == (None, None)


def test_what_is_not_asked_for_is_not_in_an_identity() -> None:
    """Runs of before are the same runs."""
    kd = learner(objective={"kind": "kd", "epochs": 3})
    plain = Recipe.model_validate(
        {"name": "r", "data": {"train": {"kind": "digits"}}, "teacher": WEIGHTS, "students": [kd]}
    ).identity()
    assert "unlabelled" not in plain["data"]
    assert "labelled" not in plain["students"]["one"]
    given = Recipe.model_validate(
        {"name": "r", "data": UNLABELLED, "teacher": WEIGHTS, "students": [kd | {"labelled": 3}]}
    ).identity()
    assert given["data"]["unlabelled"] == "rest"
    assert given["students"]["one"]["labelled"] == 3
