"""One student, on rows made by hand: regression under every objective, clipping, half precision, the primary metric."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist.base.files import sha256
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.cohort import train_on
from akd_dist.distill.delivery import deliver
from akd_dist.distill.job import CohortJob
from akd_dist.distill.metrics import evaluate
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.documents.fleet import Metrics
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import load_model
from akd_dist.recipe import (
    AdamW,
    DataSpec,
    Digits,
    HardLabels,
    Mlp,
    NoAugmentation,
    Precision,
    Sgd,
    StudentSpec as Spec,
    trust,
)
from tests.fleets import ANNEALING, CONTINUATION, DEVICE, HARD, KD, TESTS, newest_tree

ON = torch.device(DEVICE)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "annealing": ANNEALING | {"stage1_epochs": 4, "stage2_epochs": 4},
    "hard": HARD | {"epochs": 8},
    "kd": KD | {"epochs": 8},
    "takd": KD | {"kind": "takd", "epochs": 8},
    "continuation": CONTINUATION | {"epochs": 8},
}


def some_rows(count: int, seed: int) -> Rows:
    """Rows of four numbers, each labelled with a curved function of them."""
    inputs = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    labels = (inputs @ np.array([1.0, -2.0, 0.5, 0.0], np.float32) + np.abs(inputs[:, 3]) + 3).astype(np.float32)
    return Rows(inputs, labels, 1, sha256(inputs.tobytes()), (), Path(), task="regression")


SPLITS = Splits(some_rows(256, 0), some_rows(64, 1), some_rows(64, 2))
# A teacher that is right but for a little noise, in the store's narrow dtype, at two views that are the same.
NOISE = np.random.default_rng(3).normal(scale=0.1, size=(2, 256, 1))
LOGITS = (SPLITS.train.labels[None, :, None] + NOISE).astype(np.float16)
STREAM = BatchStream(SPLITS.train, LOGITS, NoAugmentation(), seed=0, views=2, batch=32, device=ON)


def a_spec(objective: dict[str, Any], **changes: Any) -> Spec:
    document = {"model": {"kind": "mlp", "hidden": 16, "dropout": 0.1}, "objective": objective, "name": "student"}
    optimizer = {"kind": "adamw", "lr": 0.02, "schedule": {"kind": "linear"}, "clip": 5.0}
    return trust(Spec.model_validate(document | {"optimizer": optimizer} | changes), TESTS)


def a_student(spec: Spec, folder: Path) -> Student:
    set_deterministic(DEVICE, 1)
    card = ModelCard.of(spec.model, SPLITS.train, None)
    return Student(spec, card, folder, metric="spearman", device=ON)


def train(student: Student, epochs: int | None = None) -> Student:
    for _ in range(epochs or student.epochs - student.epoch):
        for batch in STREAM.batches(student.epoch, student.step):
            student.take_step(batch, STREAM.steps_per_epoch)
        student.end_epoch(SPLITS.validation)
    return student


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_regression_is_learned_under_every_objective(name: str, precision: Precision, tmp_path: Path) -> None:
    student = train(a_student(a_spec(OBJECTIVES[name], precision=precision), tmp_path))
    deliver(student, SPLITS.test, None, tmp_path / "log")
    result = student.result
    assert result is not None
    assert (result["state"], result["agreement"]) == ("done", None)
    assert set(result["test"]) == {"pearson", "spearman", "loss"}
    Metrics.model_validate(result["test"])
    assert result["test"]["pearson"] > 0.9
    said = load_model(tmp_path)(torch.from_numpy(SPLITS.test.inputs))[:, 0].detach().numpy()
    assert result["test"]["pearson"] == pytest.approx(np.corrcoef(said, SPLITS.test.labels)[0, 1], abs=1e-6)
    assert result["test"]["loss"] == pytest.approx(np.mean((said - SPLITS.test.labels) ** 2), rel=1e-5)
    # The delivered weights are those of the last stage's best epoch by the metric that the data names.
    last = [record for record in student.history if record["stage"] == student.stages[-1].name]
    best = max(last, key=lambda record: record["validation"]["spearman"])
    assert result["validation"] == best["validation"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_regression_resumes_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    spec = a_spec(OBJECTIVES[name])
    whole = train(a_student(spec, tmp_path / "whole"))
    begun = train(a_student(spec, tmp_path / "cut"), 3)
    for batch in STREAM.batches(3):
        if batch.step < 4:
            begun.take_step(batch, STREAM.steps_per_epoch)
    begun.save()
    resumed = a_student(spec, tmp_path / "cut")
    assert resumed.resume()
    train(resumed)
    assert all(
        torch.equal(tensor, resumed.module.state_dict()[key]) for key, tensor in whole.module.state_dict().items()
    )
    for ours, theirs in zip(whole.history, resumed.history, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_a_cohort_trains_a_regression(tmp_path: Path) -> None:
    """The whole loop, without a teacher, as a regression's teacher is trained."""
    job = CohortJob(
        name="teacher",
        data=DataSpec(train=Digits(), task="regression"),
        fingerprints={},
        students=(a_spec(OBJECTIVES["hard"]), replaced(a_spec(OBJECTIVES["hard"]), "other", seed=1)),
        root=str(tmp_path),
        logs=str(tmp_path / "logs"),
        cache_root=str(tmp_path),
        stores={},
        control=str(tmp_path),
        checkpoint_seconds=0,
        device=DEVICE,
    )
    first, second = train_on(job, SPLITS, set_deterministic(DEVICE, 1), Ranks())["students"]
    assert first["test"]["pearson"] > 0.8
    assert "validation pearson" in (tmp_path / "logs" / "student.log").read_text()
    alone = train_on(replace(job, root=str(tmp_path / "alone")), SPLITS, set_deterministic(DEVICE, 1), Ranks())[
        "students"
    ]
    assert [one["test"] for one in alone] == [first["test"], second["test"]]


def replaced(spec: Spec, name: str, **changes: Any) -> Spec:
    return spec.model_copy(update={"name": name} | changes)


class Dropping(torch.nn.Module):
    """A model that drops units whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.nn.functional.dropout(x, 0.5, training=True))  # type: ignore[no-any-return]


def dropping(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """The factory of `Dropping`."""
    return Dropping()


def test_a_model_that_draws_numbers_in_evaluations_draws_its_own(tmp_path: Path) -> None:
    """Else its best epoch would depend on who is evaluated beside it."""
    spec = a_spec(HARD, model={"kind": "custom", "factory": "tests.distill.test_student:dropping"})
    found = []
    for others in (0, 1):
        student = a_student(spec, tmp_path / str(others))
        torch.manual_seed(others)
        found.append([record["validation"] for record in train(student).history])
    assert found[0] == found[1]


def test_a_constant_model_scores_zero_and_writes_no_nan(tmp_path: Path) -> None:
    student = a_student(a_spec(HARD), tmp_path)
    for parameter in student.module.parameters():
        parameter.data.zero_()
    metrics, said = evaluate(student.module, SPLITS.test, ON)
    assert (metrics["pearson"], metrics["spearman"]) == (0.0, 0.0)
    assert said.tolist() == [0.0] * 64
    # A loss beyond float64's range is left out of what is written: JSON has no infinity.
    train(student, 1)
    deliver(student, replace(SPLITS.test, labels=np.full(64, np.inf, np.float32)), None, tmp_path / "log")
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert set(written["test"]) == {"pearson", "spearman"}


# ---- the step


@pytest.mark.parametrize("clip", [0.01, 0.5, 1e6])
def test_a_clipped_step_is_no_longer_than_the_clip(clip: float, tmp_path: Path) -> None:
    lengths = []
    for name, limit in (("free", None), ("clipped", clip)):
        optimizer = Sgd(lr=1.0, momentum=0.0, clip=limit)
        student = a_student(a_spec(HARD).model_copy(update={"optimizer": optimizer}), tmp_path / name)
        before = torch.nn.utils.parameters_to_vector(student.module.parameters()).detach().clone()
        student.take_step(next(STREAM.batches(0)), STREAM.steps_per_epoch)
        after = torch.nn.utils.parameters_to_vector(student.module.parameters()).detach()
        lengths.append(float((after - before).norm()))
    assert lengths[0] > 0.5
    assert lengths[1] == pytest.approx(min(clip, lengths[0]), rel=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_float32(precision: Precision, tmp_path: Path) -> None:
    small = a_spec(HARD | {"epochs": 8}, model={"kind": "mlp", "hidden": 16})
    full = train(a_student(small, tmp_path / "full"))
    half = train(a_student(small.model_copy(update={"precision": precision}), tmp_path / "half"))
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float32}
    ours, theirs = (one.history[-1]["validation"]["pearson"] for one in (half, full))
    assert ours != theirs
    assert ours == pytest.approx(theirs, abs=0.02)


def test_float16_scales_its_loss_and_keeps_the_scale(tmp_path: Path) -> None:
    student = a_student(a_spec(HARD, precision="float16"), tmp_path)
    before = student.scaler.get_scale()
    train(student, 1)
    assert student.scaler.get_scale() < before  # it begins at 65,536, too much for float16, and finds what fits
    student.save()
    tree = newest_tree(tmp_path / "checkpoints")
    assert tree["scaler"]["scale"] == student.scaler.get_scale()
    again = a_student(a_spec(HARD, precision="float16"), tmp_path)
    assert again.resume()
    assert again.scaler.state_dict() == student.scaler.state_dict()
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_a_new_stage_starts_afresh(tmp_path: Path) -> None:
    spec = a_spec(OBJECTIVES["annealing"], precision="float16")
    student = train(a_student(spec, tmp_path), 3)
    student.scaler.update(2.0)
    train(student, 1)
    assert student.stage.name == "hard_labels"
    assert student.optimizer.state_dict()["state"] == {}
    assert student.scaler.get_scale() == 65536.0


def test_the_learning_rate_starts_again_with_each_stage(tmp_path: Path) -> None:
    """x0.1 at 1/2 and 3/4 of each stage, here of four epochs each."""
    optimizer = Sgd.model_validate({"lr": 0.01, "schedule": {"kind": "steps"}})
    spec = a_spec(OBJECTIVES["annealing"]).model_copy(update={"optimizer": optimizer})
    rates = [record["lr"] for record in train(a_student(spec, tmp_path)).history]
    assert rates == pytest.approx(2 * [0.01, 0.01, 0.001, 0.0001])


def test_without_a_metric_the_usual_one_picks(tmp_path: Path) -> None:
    spec = Spec(model=Mlp(hidden=4), objective=HardLabels(epochs=1), optimizer=AdamW(lr=0.01), name="plain")
    student = Student(spec, ModelCard.of(spec.model, SPLITS.train, None), tmp_path, device=ON)
    record = train(student).history[0]
    assert math.isfinite(record["validation"]["pearson"])
    assert student.best_record == record
