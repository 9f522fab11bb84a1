"""What a teacher from elsewhere says of labelled rows: told, and warned of where luck would say as much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist.data.rows import Rows
from akd_dist.distill import agreement
from akd_dist.distill.agreement import ASKED, check_of, check_on_rows


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def rows_of(labels: np.ndarray, classes: int, **more: Any) -> Rows:
    inputs = np.arange(len(labels), dtype=np.float32)[:, None]
    return Rows(inputs, labels, classes, "", (), Path(), **more)


def certain(chosen: np.ndarray, classes: int) -> np.ndarray:
    """Logits by which these classes are chosen."""
    logits: np.ndarray = np.eye(classes, dtype=np.float32)[chosen]
    return logits


def test_a_good_teacher_is_told_in_a_line_without_a_warning(random: np.random.Generator) -> None:
    labels = random.integers(0, 10, 400)
    chosen = np.where(random.random(400) < 0.9, labels, 3)
    check = check_of(certain(chosen, 10), labels, rows_of(labels, 10))
    assert check.warnings == []
    assert check.accuracy == pytest.approx((chosen == labels).mean())
    assert check.line == f"the teacher chooses the label of {check.accuracy:.1%} of 400 validation rows"


def test_a_teacher_near_chance_is_warned_of_with_likely_causes(random: np.random.Generator) -> None:
    labels = random.integers(0, 10, 400)
    check = check_of(certain(random.integers(0, 10, 400), 10), labels, rows_of(labels, 10))
    (line,) = check.warnings
    for words in ("the teacher is near chance", "400 validation rows", "data.normalize", "another order", "BGR"):
        assert words in line


@pytest.mark.parametrize("right", [1.0, 0.7])
def test_classes_in_another_order_are_noticed(right: float, random: np.random.Generator) -> None:
    labels, names = random.integers(0, 10, 400), tuple(f"kind {number}" for number in range(10))
    order = np.roll(np.arange(10), 1)
    chosen = np.where(random.random(400) < right, order[labels], random.integers(0, 10, 400))
    check = check_of(certain(chosen, 10), labels, rows_of(labels, 10, class_names=names))
    chance, ordered = check.warnings
    assert "is near chance" in chance
    for words in (
        "classes in another order",
        "output 0 means 1 (kind 1), 1 means 2 (kind 2)",
        "and 5 more",
        "last layer",
    ):
        assert words in ordered


def test_two_classes_that_are_swapped_are_noticed(random: np.random.Generator) -> None:
    labels = random.integers(0, 2, 200)
    check = check_of(certain(1 - labels, 2), labels, rows_of(labels, 2))
    assert "if its output 0 means 1, 1 means 0, it would choose the label of 100.0%" in check.warnings[-1]


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_no_order_is_seen_in_luck(classes: int, random: np.random.Generator) -> None:
    """Of 512 rows for 300 classes, some order fits most of what any teacher says: of the rows that it was made from."""
    labels = random.integers(0, classes, ASKED)
    check = check_of(certain(random.integers(0, classes, ASKED), classes), labels, rows_of(labels, classes))
    assert all("another order, as it seems" not in line for line in check.warnings)


def test_many_classes_in_another_order_are_noticed_in_few_rows(random: np.random.Generator) -> None:
    labels = random.integers(0, 300, ASKED)
    order = random.permutation(300)
    check = check_of(certain(order[labels], 300), labels, rows_of(labels, 300))
    assert "of 100.0% of rows" not in check.line
    assert "it would choose the label of" in check.warnings[-1]


@pytest.mark.parametrize("labels", [[0], [0, 1], [2] * 30])
def test_rows_that_say_little_say_nothing_wrong(labels: list[int]) -> None:
    given = np.array(labels)
    check = check_of(certain(given, 3), given, rows_of(given, 3))
    assert (check.accuracy, check.warnings) == (1.0, [])
    assert ("1 validation row" in check.line) == (len(labels) == 1)


def test_a_regression_is_told_by_its_correlation(random: np.random.Generator) -> None:
    labels = random.standard_normal(300).astype(np.float32)
    rows = rows_of(labels, 1, task="regression")
    good = check_of((3 * labels + 1)[:, None], labels, rows)
    assert good.correlation == pytest.approx(1.0)
    assert (good.accuracy, good.warnings) == (None, [])
    assert good.line == "the values of the teacher correlate with the labels of 300 validation rows by 1.000"
    (turned,) = check_of(-labels[:, None], labels, rows).warnings
    assert "sign" in turned
    (chance,) = check_of(random.standard_normal((300, 1)).astype(np.float32), labels, rows).warnings
    assert "near chance" in chance
    for values in (np.ones((300, 1), np.float32), np.full((300, 1), np.nan, np.float32)):
        nothing = check_of(values, labels, rows)
        assert nothing.correlation is None
        assert "nothing can be said" in nothing.line


class Counting(nn.Module):
    """Chooses the class of an input's number; counts the rows that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shown = nn.Parameter(torch.ones(())), list[int]()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.shown += inputs[:, 0].long().tolist()
        return nn.functional.one_hot(inputs[:, 0].long() % 4, 4) * self.scale


def test_a_large_split_is_asked_of_rows_from_end_to_end() -> None:
    labels, module = np.arange(100_000) % 4, Counting()
    check = check_on_rows(module.eval(), rows_of(labels, 4))
    assert (check.rows, check.accuracy) == (ASKED, 1.0)
    assert (min(module.shown), max(module.shown)) == (0, 99_999)
    assert module.shown != sorted(module.shown), "any first few of them stand for all"


def test_a_slow_teacher_is_asked_of_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_SECONDS", 0.0)
    check = check_on_rows(Counting().eval(), rows_of(np.arange(4000) % 4, 4))
    assert check.rows == 16
