"""Metrics against values worked out by hand and scikit-learn's; what is undefined counts as 0, and nothing warns."""

import importlib
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from akd_dist.distill.metrics import measure, predictions
from akd_dist.recipe import METRICS, Task

classification: Any = importlib.import_module("torchmetrics.functional.classification")
stats: Any = importlib.import_module("scipy.stats")  # it ships no types


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_two_classes_by_hand() -> None:
    predicted, labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])
    # 2 true positives, 1 false positive, 1 false negative, 4 true negatives:
    # accuracy 6/8, F1 = 2 * 2 / (2 * 2 + 1 + 1), Matthews (2 * 4 - 1 * 1) / sqrt(3 * 3 * 5 * 5)
    expected = {"accuracy": 0.75, "f1": 4 / 6, "matthews": 7 / 15}
    assert measure("classification", predicted, labels, 2) == pytest.approx(expected, abs=1e-6)
    # F1 is that of class 1: the classes swapped, it is that of what was class 0, 2 * 4 / (2 * 4 + 1 + 1)
    assert measure("classification", 1 - predicted, 1 - labels, 2)["f1"] == pytest.approx(0.8, abs=1e-6)


def test_three_classes_by_hand() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 1])
    # F1 of the classes: 1, 2 / (2 + 1 + 1), 2 / (2 + 1 + 1); their mean is 2/3
    expected = {"accuracy": 4 / 6, "f1": 2 / 3, "matthews": 0.5}  # (4 * 6 - 12) / (36 - 12)
    assert measure("classification", predicted, labels, 3) == pytest.approx(expected, abs=1e-6)
    # A class that nobody has counts in no mean.
    assert measure("classification", predicted, labels, 7) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_classes_as_scikit_learn_measures_them(classes: int) -> None:
    draw = np.random.default_rng(classes)
    labels = draw.integers(classes, size=500)
    predicted = np.where(draw.random(500) < 0.6, labels, draw.integers(classes, size=500))
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "f1": sklearn_metrics.f1_score(labels, predicted, average="binary" if classes == 2 else "macro"),
        "matthews": sklearn_metrics.matthews_corrcoef(labels, predicted),
    }
    found = measure("classification", torch.from_numpy(predicted), torch.from_numpy(labels), classes)
    assert found == pytest.approx(expected, abs=1e-6)
    assert measure("classification", torch.from_numpy(predicted), torch.from_numpy(labels)) == found


def test_numbers_by_hand() -> None:
    # deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6); ranks 1 2 3 and 1.5 1.5 3: 1.5 / sqrt(2 * 1.5)
    found = measure("regression", numbers(1, 2, 3), numbers(0, 0, 3))
    assert found == pytest.approx({"pearson": 3 / math.sqrt(12), "spearman": 1.5 / math.sqrt(3)}, abs=1e-6)
    assert measure("regression", numbers(1, 2, 3), numbers(9, 4, 1)) == pytest.approx(
        {"pearson": -8 / math.sqrt(2 * 98 / 3), "spearman": -1.0}, abs=1e-6
    )


def test_metrics_equal_scipys_with_very_many_ties() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(1, 4, size=200_000).astype(np.float32)  # a third of them equal: ranks that sum to 1e10
    predicted = labels + draw.normal(size=len(labels)).astype(np.float32)
    found = measure("regression", torch.from_numpy(predicted), torch.from_numpy(labels))
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, labels)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, labels)[0], abs=1e-6)


def test_scale_changes_no_correlation() -> None:
    labels = numbers(0, 1, 2, 4)
    expected = measure("regression", numbers(1, 2, 3, 9), labels)
    for factor in (1e-30, 1e-3, 1e30):
        assert measure("regression", factor * numbers(1, 2, 3, 9), labels) == expected
    assert measure("regression", 1e300 * numbers(1, 2, 3, 9).double(), labels) == expected


@pytest.mark.parametrize(
    ("task", "predicted", "labels"),
    [
        ("classification", torch.tensor([1, 1, 1, 1]), torch.tensor([0, 1, 1, 1])),
        ("classification", torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 0, 1])),
        ("classification", torch.tensor([2, 2, 2, 2]), torch.tensor([0, 1, 2, 2])),
        ("classification", torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 1, 1])),
        ("regression", numbers(0.1, 0.1, 0.1), numbers(1, 2, 3)),
        ("regression", numbers(1, 2, 3), numbers(0.1, 0.1, 0.1)),
        ("regression", numbers(1, math.nan, 3), numbers(1, 2, 3)),
        ("regression", numbers(1, math.inf, 3), numbers(1, 2, 3)),
        ("regression", numbers(1), numbers(1)),
    ],
)
def test_an_undefined_correlation_is_zero(task: Task, predicted: torch.Tensor, labels: torch.Tensor) -> None:
    found = measure(task, predicted, labels, 3)
    assert all(found[name] == 0.0 for name in ("matthews", "pearson", "spearman") if name in found)
    assert set(found) == set(METRICS[task])


def test_one_class_alone_is_measured() -> None:
    zeros = torch.zeros(4, dtype=torch.int64)
    assert measure("classification", zeros, zeros, 1) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}


def test_predictions() -> None:
    assert predictions("classification", torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])).tolist() == [1, 0]
    assert predictions("regression", torch.tensor([[2.5], [-1.0]])).tolist() == [2.5, -1.0]


def confusion_matrix(measured: Any, predicted: torch.Tensor, labels: torch.Tensor, classes: int, **how: Any) -> float:
    """What torchmetrics makes of the whole confusion matrix."""
    return float(measured(predicted, labels, num_classes=max(classes, 2), **how))


@pytest.mark.parametrize("seed", range(60))
def test_counts_per_class_say_what_the_confusion_matrix_says(seed: int) -> None:
    """Also where classes do not occur, where hardly a row is there, and where all or none of them are right."""
    draw = torch.Generator().manual_seed(seed)
    rows, classes = (int(torch.randint(1, high, (), generator=draw)) for high in (60, 12))
    labels, predicted = (torch.randint(classes, (rows,), generator=draw) for _ in range(2))
    if seed % 3:
        predicted = torch.where(torch.rand(rows, generator=draw) < seed % 7 / 6, labels, predicted)
    found = measure("classification", predicted, labels, classes)
    micro = confusion_matrix(classification.multiclass_accuracy, predicted, labels, classes, average="micro")
    assert found["accuracy"] == round(micro, 7)
    if classes > 2:
        macro = confusion_matrix(classification.multiclass_f1_score, predicted, labels, classes, average="macro")
        assert found["f1"] == round(macro, 7)
    varied = len(set(labels.tolist())) > 1 and len(set(predicted.tolist())) > 1
    expected = confusion_matrix(classification.multiclass_matthews_corrcoef, predicted, labels, classes)
    assert found["matthews"] == pytest.approx(expected if varied else 0.0, abs=2e-6)
    if varied:
        assert found["matthews"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predicted), abs=1e-7)


def test_memory_and_time_do_not_grow_with_classes_squared() -> None:
    """A table of a million by a million would take 8 TB; determinism, where torchmetrics compares rows with classes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        labels = torch.arange(20_000) * 50
        assert measure("classification", labels, labels, 1_000_000) == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
        assert measure("classification", labels.flip(0), labels, 1_000_000)["accuracy"] == 0.0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_workers_import_no_library_of_metrics() -> None:
    program = (
        "import sys, torch, akd_dist.distill.cohort; from akd_dist.distill.metrics import measure; "
        "labels = torch.arange(3); measure('classification', labels, labels, 3); "
        "measure('regression', labels.double(), labels.double()); "
        "sys.exit(bool({'torchmetrics', 'sklearn', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
