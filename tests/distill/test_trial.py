"""Models tried before anything starts: the smallest batch that they will meet is known from the rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.trusted import Trusted
from akd_dist.data.rows import Rows, fingerprint
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.distill.trial import try_training
from akd_dist.models.card import ModelCard
from tests.fleets import HARD, a_student

MODELS = """
from torch import nn

def normed(input_shape, classes):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

def normed_pixels(input_shape, classes):
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(4, classes))

class Own(nn.Module):  # statistics of a batch without a layer that is known for them
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(4, classes)
    def forward(self, x):
        if self.training and len(x) < 2:
            raise ValueError("one row has no spread")
        return self.layer(x)

def own(input_shape, classes):
    return Own(classes)
"""


DATA = recipe.DataSpec(train=recipe.Digits())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "tried_nets.py").write_text(MODELS)
    return folder


def some_rows(count: int) -> Rows:
    labels = np.arange(count) % 3
    inputs = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32) + labels[:, None]
    return Rows(inputs.astype(np.float32), labels, 3, *fingerprint(inputs.astype(np.float32), labels, 3), folder=Path())


def spec_of(folder: Path, function: str, **changes: Any) -> recipe.StudentSpec:
    model = {"kind": "custom", "factory": f"tried_nets:{function}"}
    spec = recipe.StudentSpec.model_validate(a_student("one", model=model, objective=HARD) | changes)
    return recipe.trust(spec, Trusted(modules=("tried_nets",), folder=str(folder)))


def tried(folder: Path, function: str, rows: int, **changes: Any) -> int:
    spec = spec_of(folder, function, **changes)
    return try_training(spec.model, [("the student one", spec)], some_rows(rows), DATA)


FINE: list[tuple[str, int, dict[str, Any]]] = [
    ("normed", 64, {"batch": 32}),
    ("normed", 66, {"batch": 32}),
    ("normed", 65, {"batch": 32, "last_batch": "merge"}),
    ("normed", 65, {"batch": 32, "last_batch": "drop"}),
    ("normed", 20, {"batch": 32, "last_batch": "merge"}),
    ("normed_pixels", 65, {"batch": 32}),  # four values of one row have a spread
    ("normed", 68, {"batch": 32, "workers": 2}),  # two rows for each
    ("normed", 66, {"batch": 32, "workers": 2, "sync_batchnorm": True}),
    ("normed", 67, {"batch": 32, "workers": 4, "sync_batchnorm": True}),  # a worker without rows
    ("normed", 65, {"batch": 32, "workers": 2, "last_batch": "merge"}),
]
REFUSED: list[tuple[str, int, dict[str, Any], list[str]]] = [
    ("normed", 65, {"batch": 32}, ["65 train rows", "of 32", "has 1 row", "last_batch: merge", "last_batch: drop"]),
    ("own", 65, {"batch": 32}, ["one row has no spread", "last_batch: merge"]),
    ("normed", 1, {"batch": 32}, ["another batch"]),
    ("normed", 64, {"batch": 1}, ["a batch has 1 row", "another batch"]),
    ("normed", 66, {"batch": 32, "workers": 2}, ["2 rows, and a worker's part of it 1 row", "sync_batchnorm: true"]),
    ("normed", 65, {"batch": 32, "workers": 2}, ["1 row", "last_batch: merge"]),
    ("own", 65, {"batch": 32, "workers": 2}, ["part of it 0 rows", "last_batch: merge"]),  # it is shown a spare row
    ("normed", 67, {"batch": 32, "workers": 2}, ["part of it 1 row"]),  # one has two rows, and one has one
    ("normed", 65, {"batch": 32, "workers": 2, "sync_batchnorm": True}, ["has 1 row", "last_batch: merge"]),
    ("normed", 64, {"batch": 2, "workers": 2}, ["a batch has 2 rows", "sync_batchnorm: true"]),
    ("normed", 30, {"batch": 32, "last_batch": "drop"}, ["no batch", "30 train rows", "lower `batch`"]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "rows", "changes"), FINE)
def test_batches_with_a_spread_are_fine(folder: Path, function: str, rows: int, changes: dict[str, Any]) -> None:
    assert tried(folder, function, rows, **changes) > 0


@pytest.mark.parametrize(("function", "rows", "changes", "told"), REFUSED)
def test_a_batch_without_a_spread_is_refused(
    folder: Path, function: str, rows: int, changes: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(RefusedError) as refused:
        tried(folder, function, rows, **changes)
    for words in (*told, "the student one"):
        assert words in str(refused.value)


@pytest.mark.parametrize("last_batch", ["merge", "drop"])
def test_what_the_hint_says_trains(folder: Path, last_batch: recipe.LastBatch, tmp_path: Path) -> None:
    rows, spec = some_rows(65), spec_of(folder, "normed", batch=32, last_batch=last_batch)
    student = Student(spec, ModelCard.of(spec.model, rows, None), tmp_path)
    stream = BatchStream(rows, None, recipe.NoAugmentation(), seed=0, views=1, batch=32, last_batch=last_batch)
    while student.epoch < student.epochs:
        for batch in stream.batches(student.epoch):
            student.take_step(batch, stream.steps_per_epoch)
        student.end_epoch(rows)
    assert len(student.history) == 3
    assert all(torch.isfinite(value).all() for value in student.module.state_dict().values())
