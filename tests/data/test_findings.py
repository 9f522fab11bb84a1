"""Splits and labels that mislead: a class without a train row is refused, what else is odd is told in a line."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.data.findings import in_two_splits, near_chance, of_classes
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.data.splitting import LEFT_OUT, count, split_of_rows, stratified_split, stratified_subset
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import DataSpec, Digits, Mlp, Parquet, Recipe
from tests import sources
from tests.fleets import a_recipe, a_student
from tests.sources import KINDS, source

RNG = np.random.default_rng(0)


def labels_of(splits: Splits) -> dict[str, list[int]]:
    """Rows of each class, by split."""
    return {name: np.bincount(getattr(splits, name).labels).tolist() for name in SPLITS}


def data(folder: Path, labels: Any, inputs: Any = None, **options: Any) -> DataSpec:
    """Rows that differ from each other, and these labels."""
    given = np.arange(4.0 * len(labels)).reshape(-1, 4) if inputs is None else inputs
    made = pa.table({"input": pa.array(given.tolist(), pa.list_(pa.float32())), "label": labels})
    return DataSpec(train=sources.parquet(folder / "data", made), **options)


# ---- a class without a train row


def a_class_that_train_loses() -> list[int]:
    """Labels of 90 rows and one of class 3, which is a test row."""
    row = int(np.flatnonzero(split_of_rows(91, 0.1, 0.2, seed=0) == 2)[0])
    others = [0, 1, 2] * 30
    return [*others[:row], 3, *others[row:]]


def test_a_class_without_a_train_row_is_refused_or_repaired(tmp_path: Path) -> None:
    given = data(tmp_path, a_class_that_train_loses())
    with pytest.raises(RefusedError, match="a class has no row in the train split") as refused:
        prepare(given, tmp_path / "cache")
    assert refused.value.got == "3 (1 test)"
    assert "set data.stratify: true" in str(refused.value.next)
    assert not list(tmp_path.glob("cache/rows/*/index.json"))
    splits = prepare(given.model_copy(update={"stratify": True}), tmp_path / "cache")
    assert labels_of(splits) == {"train": [21, 21, 21, 1], "validation": [3, 3, 3], "test": [6, 6, 6]}


def test_names_are_those_of_train(tmp_path: Path) -> None:
    """A name that validation alone has is no class of the model's, until a train row has it."""
    names = [f"class {label}" for label in a_class_that_train_loses()]
    with pytest.raises(RefusedError, match="a class has no row in the train split") as refused:
        prepare(data(tmp_path, names), tmp_path / "cache")
    assert refused.value.got == "class 3 (1 test)"


def test_a_subset_that_loses_a_class_is_refused_or_repaired(tmp_path: Path) -> None:
    given = data(tmp_path, [0] * 97 + [1] * 3, validation=0.02, test=0.02, stratify=False, subset=6)
    with pytest.raises(RefusedError, match="no row in the train split") as refused:
        prepare(given, tmp_path / "cache")
    assert "outside of data.subset" in str(refused.value.got)
    few, more = (
        prepare(given.model_copy(update={"stratify": True, "subset": n}), tmp_path / "cache").train for n in (2, 50)
    )
    assert [np.bincount(rows.labels).tolist() for rows in (few, more)] == [[1, 1], [48, 2]]
    assert {row.tobytes() for row in few.inputs} <= {row.tobytes() for row in more.inputs}
    with pytest.raises(RefusedError, match=r"data\.subset is smaller than the number of classes"):
        prepare(given.model_copy(update={"stratify": True, "subset": 1}), tmp_path / "cache")


def test_a_class_of_the_test_source_alone_is_refused(tmp_path: Path) -> None:
    train, test = (
        data(tmp_path / name, labels).sources["train"] for name, labels in (("a", [0, 2] * 10), ("b", [0, 1, 2]))
    )
    with pytest.raises(RefusedError, match="no row in the train split") as refused:
        prepare(DataSpec(train=train, validation=test, test=test), tmp_path / "cache")
    assert refused.value.got == "1 (1 validation, 1 test)"
    assert refused.value.next == "add such rows to data.train, or remove them from data.validation and data.test"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_is_stratified_and_refused_alike(kind: str, tmp_path: Path) -> None:
    labels = a_class_that_train_loses()
    inputs = RNG.integers(0, 256, (91, 1, 2, 3), dtype=np.uint8)
    spec = source(kind, tmp_path, inputs, labels)
    with pytest.raises(RefusedError, match="no row in the train split"):
        prepare(DataSpec(train=spec), tmp_path / "cache")
    splits = prepare(DataSpec(train=spec, stratify=True), tmp_path / "cache")
    expected = stratified_split(np.array(labels), 0.1, 0.2, seed=0)
    for number, name in enumerate(SPLITS):
        np.testing.assert_array_equal(getattr(splits, name).inputs, inputs[expected == number])


def test_the_stratified_split_is_pinned() -> None:
    """A change here would make another dataset of every recipe that asks for it."""
    labels = np.array([0, 0, 1, 0, 1, 0, 0, 2, 0, 1, 0, 0, 3, 0, 1, 0, 0, 1, 0, 0])
    assert stratified_split(labels, 0.2, 0.3, seed=5).tolist() == PINNED
    assert np.flatnonzero(stratified_subset(labels, 7, seed=5)).tolist() == PINNED_SUBSET


PINNED = [0, 1, 2, 2, 1, 1, 0, 0, 0, 2, 2, 0, 0, 2, 0, 2, 0, 0, 0, 1]
PINNED_SUBSET = [5, 6, 7, 11, 12, 14, 16]


@pytest.mark.parametrize("seed", range(3))
def test_stratified_shares_are_exact_and_leave_train_rows(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(30, 2000, p=np.arange(1, 31) / 465)
    split = stratified_split(labels, 0.1, 0.25, seed)
    assert np.bincount(split).tolist() == [1300, 200, 500]
    counts = count(split, labels, 30)[:LEFT_OUT]
    assert (counts[0] > 0).all()
    expected = np.outer([0.65, 0.1, 0.25], np.bincount(labels))
    assert np.abs(counts - expected).max() <= 1.5
    assert (split != stratified_split(labels, 0.1, 0.25, seed + 1)).any()


def test_rows_of_classes_of_one_row_stay_in_train() -> None:
    labels = np.array([*range(20), *[20] * 4])
    split = stratified_split(labels, 0.2, 0.2, seed=0)  # wants five and five, and three can be spared
    assert np.bincount(split).tolist() == [21, 2, 1]
    assert (split[:20] == 0).all()


def test_a_recipe_that_does_not_stratify_is_the_recipe_it_was(tmp_path: Path) -> None:
    """Its identity, and the folder of its prepared rows, say nothing of the new key."""
    digits = {"train": {"kind": "digits"}}
    plain, stratified = (a_recipe([a_student("one")], data=digits | more) for more in ({}, {"stratify": True}))
    assert "stratify" not in plain.identity()["data"]
    assert stratified.identity()["data"]["stratify"] is True
    folders = {prepare(one.data, tmp_path).train.folder for one in (plain, stratified)}
    assert len(folders) == 2
    own = DataSpec(train=Digits(), validation=Digits(), test=Digits())  # nothing is drawn
    folders = {prepare(own.model_copy(update={"stratify": on}), tmp_path).train.folder for on in (False, True)}
    assert len(folders) == 1


def test_numbers_are_not_stratified() -> None:
    with pytest.raises(ValidationError, match="stratify draws rows class by class, but task is regression"):
        DataSpec(train=Digits(), task="regression", stratify=True)


# ---- what is told


CLASSES: dict[str, tuple[list[int], list[str]]] = {
    "all there": ([3, 1, 2], []),
    "from one": ([0, 3, 3], ["class 0 has no row in the train split: are labels counted from 1?"]),
    "a gap": ([1, 0, 1], ["class 1 has no row in the train split"]),
    "a mark": (
        [4, 5, *[0] * 253, 2],
        [
            "253 of 256 classes have no row in the train split: 2, 3, 4, 5, 6 and 248 more: "
            "is 255 a mark of rows without a label?"
        ],
    ),
    "one class": ([7], ["all 7 train rows are of one class, 0: there is nothing to learn"]),
    "one class of two": (
        [0, 7],
        [
            "class 0 has no row in the train split: are labels counted from 1?",
            "all 7 train rows are of one class, 1: there is nothing to learn",
        ],
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_that_are_odd_are_told(case: str) -> None:
    counts, lines = CLASSES[case]
    assert of_classes(np.array(counts), None) == lines


def test_names_that_are_odd_are_told() -> None:
    assert of_classes(np.array([1, 1]), ("ant", "nan")) == ["a class is called 'nan': are these rows without a label?"]
    [line] = of_classes(np.array([1, 1, 1]), ("1", "10", "2"))
    assert line.startswith("class names are numbers, and are in the order of text: 1, 10, 2")
    assert of_classes(np.array([1, 1, 1]), ("1", "2", "3")) == []
    assert of_classes(np.array([1, 0]), ("ant", "bee"))[0] == "class bee has no row in the train split"


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32])
def test_rows_that_occur_in_train_and_elsewhere_are_counted(dtype: Any) -> None:
    rows = RNG.permutation(5 * 3000).reshape(3000, 5).astype(dtype) if dtype != np.uint8 else None
    rows = RNG.integers(0, 256, (3000, 9), dtype=np.uint8) if rows is None else rows
    told: list[tuple[int, int]] = []
    splits = {"train": rows[:2000], "validation": rows[2000:2500], "test": rows[2500:]}
    assert in_two_splits(splits, lambda *how: told.append(how)) == []
    assert told[-1] == (3000, 3000)
    splits["test"] = np.concatenate([rows[2500:2990], rows[5:15]])
    [line] = in_two_splits(splits, lambda *_: None)
    assert line.startswith("10 of 500 test rows have the very inputs of a train row")
    splits["validation"] = rows[1999:2499]
    [line] = in_two_splits(splits, lambda *_: None)
    assert line.startswith("1 of 500 validation rows and 10 of 500 test rows have the very inputs of a train row")


def test_what_is_told_is_kept_with_the_prepared_rows(tmp_path: Path) -> None:
    inputs = np.repeat(np.arange(20.0), 4).reshape(-1, 1)
    given = data(tmp_path, [1, 2] * 40, inputs)
    first = prepare(given, tmp_path / "cache")
    assert len(first.findings) == 2
    assert "counted from 1?" in first.findings[0]
    assert "have the very inputs of a train row" in first.findings[1]
    assert prepare(given, tmp_path / "cache").findings == first.findings


CHANCE: dict[str, tuple[float, list[int], bool]] = {
    "of ten": (0.12, [500] * 10, True),
    "a poor one of ten": (0.2, [500] * 10, False),
    "of a thousand": (0.0012, [50] * 1000, True),
    "a poor one of a thousand": (0.01, [50] * 1000, False),
    "of two": (0.51, [5000, 5000], True),
    "always the same": (0.9, [900, 100], True),
    "better than that": (0.95, [900, 100], False),
    "few rows": (0.6, [10, 10], True),
    "one class": (1.0, [10], False),
    "worse than chance": (0.01, [500] * 10, True),
}


@pytest.mark.parametrize("case", CHANCE)
def test_a_teacher_near_chance_is_told(case: str) -> None:
    agreement, counts, near = CHANCE[case]
    line = near_chance("the teacher", agreement, np.array(counts))
    assert (line is not None) == near
    if line is not None:
        assert line.startswith(f"the teacher is near chance: it agrees with the labels of {agreement:.1%}")


def a_teacher(recipe: Recipe, root: Path) -> None:
    """A model that was never trained."""
    rows = prepare(recipe.data, root / "cache").train
    card = ModelCard.of(Mlp(hidden=4), rows, None)
    save_model(root / "teacher", build(card, seed=0), card)


def test_a_command_tells_each_finding_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run of rows that are prepared and of a store that is there, on stderr."""
    made = data(tmp_path, [1, 2] * 40, np.repeat(np.arange(20.0), 4).reshape(-1, 1))
    train = made.train
    assert isinstance(train, Parquet)
    teacher = {"weights": str(tmp_path / "teacher")}
    recipe = a_recipe([a_student("one")], data={"train": train.model_dump()}, teacher=teacher)
    a_teacher(recipe, tmp_path)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # what a plain loop tells
    roots: dict[str, Any] = {"store_root": str(tmp_path / "stores"), "cache_root": str(tmp_path / "cache")}
    cache_in_process(recipe, str(tmp_path / "teacher"), **roots)
    for _ in range(2):
        shown = io.StringIO()
        console = Console(file=shown, width=80)
        for _ in range(2):  # as train-students passes here for its plan, and again
            assert akd_dist.cache_teacher(recipe, dry_run=True, console=console, **roots)["splits"]["train"]["hit"]
        lines = shown.getvalue().splitlines()
        assert [sum(word in line for line in lines) for word in ("from 1?", "very inputs", "near chance")] == [1, 1, 1]
    assert not capsys.readouterr().out
