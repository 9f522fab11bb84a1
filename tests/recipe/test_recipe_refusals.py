"""Refusals of recipes: each names file, line and key."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from akd_dist.base.errors import RecipeError
from akd_dist.recipe import load_recipe
from tests.recipe_texts import TEXT, refusal


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("views: 2", "vews: 2", ["small.yaml:4: key data.vews is not known; did you mean views?", "one of train,"]),
        ("views: 2", "views: 0", ["small.yaml:4: key data.views cannot be 0", "greater than or equal to 1"]),
        ("views: 2", "views: 2.0", ["key data.views cannot be 2.0", "a valid integer"]),
        ("views: 2", "views: yes", ['key data.views cannot be "yes"']),
        ("views: 2", "views: true", ["key data.views cannot be true"]),
        ("views: 2", "normalize: {mean: [1], std: [1, 2]}", ["small.yaml:4", "mean has 1 numbers and std has 2"]),
        ("views: 2", "validation: 0.8\n  test: 0.2", ["0.8 + 0.2", "train needs some"]),
        (
            "views: 2",
            "validation: {path: x}",
            ["small.yaml:4: key data.validation needs a kind", "digits or idx or parquet"],
        ),
        ("views: 2", "validation: 1.5", ["key data.validation cannot be 1.5", "less than 1"]),
        ("lr: 1e-2", 'lr: "0.1"', ['small.yaml:10: key teacher.train.optimizer.lr cannot be "0.1"', "a valid number"]),
        ("lr: 1e-2", "lr: .nan", ["small.yaml:10: key teacher.train.optimizer.lr", "a finite number"]),
        (
            "stage1_epochs: 4, ",
            "",
            ["stage1_epochs is missing", "expected: a whole number of at least 1: epochs of stage I, at least tau_max"],
        ),
        ("lr: 1e-2", "momentum: 0.1", ["key teacher.train.optimizer.lr is missing", "a number above 0: learning rate"]),
        ("kind: shift", "kind: shft", ["small.yaml:5", "unknown kind; did you mean shift?", "none or shift"]),
        (
            "kind: cnn, width: 8",
            "kind: rnn",
            ["key teacher.model has an unknown kind", "mlp or cnn or plain_cnn or resnet"],
        ),
        ("  model: {kind: cnn, width: 8}", "  weights: here", ["small.yaml:6", "got weights and train"]),
        ("stage1_epochs: 4", "stage1_epochs: 1", ["small.yaml:16", "stage1_epochs is 1 and tau_max is 2"]),
        ("seed: [0, 1, 2]", "seed: [0, -1]", ["small.yaml:15: key students.0.grid.seed", "cannot be -1"]),
        ("seed: [0, 1, 2]", "seed: []", ["small.yaml:15: key students.0.grid.seed does not fit", "at least one value"]),
        ("seed: [0, 1, 2]", "batch: [2, 2]", ["mlp-4-annealing_kd-t2-s0", "blocks with a `name:` of their own"]),
        ("model.hidden: [4, 8]", "model: [4, 8]", ["model in the block and in its grid"]),
        ("name: small", "name: ../x", ["small.yaml:1", "cannot be a folder's name"]),
        ("name: small", "name: small\nname: large", ["small.yaml:2: duplicate key", "each key once"]),
        ("name: small", "name: &a small", ["small.yaml:1", "cannot have an anchor"]),
        ("name: small", "name: !!python/name:os.system small", ["small.yaml:1", "cannot have the tag"]),
        ("name: small", "<<: {name: small}", ["small.yaml:1", "cannot have a merge key"]),
        ("name: small", "name: 2020-01-01", ["small.yaml:1: key name", "put it in quotes"]),
        ("name: small", "1: small", ["small.yaml:1: a key must be a word"]),
        ("name: small", "name: [small", ["small.yaml:", "this is not YAML"]),
        ("name: small", "name: small\nextra: " + "[" * 500 + "]" * 500, ["small.yaml:2", "more than 40 levels"]),
        ("name: small", "name: small\ncohorts: " + "9" * 5000, ["small.yaml"]),
        ("students:", "students: []\nother:", ["key students is too short", "at least 1"]),
    ],
)
def test_refusals_name_file_line_and_key(path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in TEXT
    error = refusal(path, TEXT.replace(old, new, 1))
    for word in words:
        assert word in str(error)
    assert error.next


@pytest.mark.parametrize(
    ("block", "given", "why"),
    [
        ("  - model: {kind: cnn, width: 2}\n", "    labelled: 4\n", "hard_labels reads either"),
        ("    objective: {kind: hard_labels, epochs: 5}\n", "    labelled: 4\n", "batches are not mixed"),
    ],
)
def test_labelled_is_refused_at_its_key_with_the_reason_apart(path: Path, block: str, given: str, why: str) -> None:
    error = refusal(path, TEXT.replace(block, block + given, 1))
    assert "key students.1.labelled is not right" in error.what
    assert why in error.what
    assert (error.got, str(error.expected).partition(",")[0]) == ("4", "labelled left out")
    kd = "objective: {kind: kd, epochs: 5}"
    error = refusal(path, TEXT.replace("objective: {kind: hard_labels, epochs: 5}", f"{kd}\n    labelled: 4"))
    assert "small.yaml:20: key students.1.labelled" in error.what, "although the whole recipe has to be known for it"
    assert "names no rows without" in error.what
    assert "`missing` for rows of data.train whose" in str(error.expected)


def test_without_labels_every_key_that_needs_some_is_named_at_once(path: Path) -> None:
    others = [f"{name}: {{kind: parquet, path: {name}.parquet}}" for name in ("validation", "test", "unlabelled")]
    text = TEXT.replace("train: {kind: digits}", "\n  ".join(others))
    told = refusal(path, text).what
    assert "small.yaml has 3 problems" in told
    for key in ("10: key teacher.train", "18: key students.0.objective", "21: key students.1.objective"):
        assert f"small.yaml:{key} is not right" in told
    assert "its logits in `store`" in told
    assert "{" not in told, "blocks stand in the file"


def test_all_problems_of_a_file_come_in_one_message(path: Path) -> None:
    text = TEXT.replace("views: 2", "views: 0\n  sed: 1").replace("kind: shift", "kind: shift, pixel: 1")
    error = refusal(path, text, "cache.encoding=float15", "teacher.train.epochs=0", "checkpoint_seconds=-1", "name=3")
    assert "has 7 problems" in error.what
    assert "did you mean seed?" in error.what


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "kind: shift, pixels: 1",
            "kind: shft, pixel: 1",
            ["augmentation has an unknown kind; did you mean shift?", "augmentation.pixel is not known; did you mean"],
        ),
        (
            "kind: cnn, width: 8",
            "kind: cn, widht: 8",
            ["did you mean cnn?", "model.width is missing", "model.widht is not known; did you mean width?"],
        ),
        (  # not even the second is told of one only: `width` is a key of some kind
            "kind: cnn, width: 8",
            "kind: frobnicate, width: 8, hiden: 8",
            ["teacher.model has an unknown kind", "teacher.model.hiden is not known; did you mean hidden?"],
        ),
        (
            "kind: cnn, width: 8",
            "widht: 8",
            ["key teacher.model needs a kind", "widht is not known; did you mean width?"],
        ),
        (
            "kind: adamw, lr: 1e-4",
            "kind: adamw, lr: 1e-4, schedule: {kind: linaer, steps: 3}",
            ["optimizer.schedule has an unknown kind; did you mean linear?", "optimizer.schedule.steps is not known"],
        ),
    ],
)
def test_an_unknown_kind_hides_no_further_mistake(path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in TEXT
    error = refusal(path, TEXT.replace(old, new, 1))
    assert f"has {len(words)} problems" in error.what
    for word in words:
        assert word in error.what


def test_unknown_kinds_within_unknown_kinds_are_told_at_once(path: Path) -> None:
    text = TEXT.replace("kind: adamw, lr: 1e-4", "kind: adam, learn: 1e-4, schedule: {kind: linaer}")
    told = refusal(path, text).what
    for word in ("did you mean adamw?", "optimizer.learn is not known", "optimizer.lr is missing", "mean linear?"):
        assert word in told


def test_a_problem_of_a_grid_is_told_once(path: Path) -> None:
    assert str(refusal(path, TEXT.replace("tau_max: 2", "tau: 2"))).count("tau_max is missing") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is not a recipe"), (b"- 1", "is not a recipe"), (b"\xff", "UTF-8"), (b"a: \x00", "is not YAML")],
)
def test_what_is_no_recipe_at_all(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    assert words in str(refusal(path))


def test_a_missing_recipe_and_a_folder(path: Path) -> None:
    assert "no such file" in str(refusal(path.parent / "nope.yaml"))
    assert "a folder" in str(refusal(path.parent))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_text_is_read_or_refused_and_never_crashes(path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEXT) - 1))
    stop = data.draw(st.integers(start, min(len(TEXT), start + 12)))
    path.write_text(TEXT[:start] + data.draw(st.text("{}[]:,-&*!|>'\"%@#?\n \t0e.~a", max_size=6)) + TEXT[stop:])
    with contextlib.suppress(RecipeError):
        assert load_recipe(path).students
