"""Training from the store is the computation that runs the teacher on every batch: same losses, same weights.

The other side is the plain loop of benchmarks/cached_equals_online.py, which shares no training code with the package.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from akd_dist.data.row_cache import prepare
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import load_model
from akd_dist.recipe import AnnealingKD, Recipe
from benchmarks.cached_equals_online import (
    array_of,
    both,
    cached,
    cases,
    difference,
    job_of,
    online,
    own_generator,
    with_all,
    with_logits,
)
from tests.fleets import DEVICE

CASES = tuple(cases())


@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit_where_the_loop_pads_the_teachers_batches(tmp_path: Path, name: str) -> None:
    recipe = cases(device=DEVICE)[name]
    ours, loop = both(recipe, tmp_path, padded=True)
    steps = -(-len(prepare(recipe.data, tmp_path / "cache").train) // recipe.students[0].batch)
    assert len(ours.losses) == steps * recipe.students[0].objective.epochs
    assert ours.losses == loop.losses
    assert all(torch.equal(ours.weights[key], loop.weights[key]) for key in loop.weights)
    assert ours.metric == loop.metric


def test_bit_for_bit_where_most_rows_have_no_label(tmp_path: Path) -> None:
    """Stage I over all rows, stage II over the labelled ones."""
    recipe = cases(device=DEVICE)["images"]
    data = recipe.data.model_copy(update={"subset": 90, "unlabelled": "rest"})
    ours, loop = both(recipe.model_copy(update={"data": data}), tmp_path, padded=True)
    batch, objective = recipe.students[0].batch, recipe.students[0].objective
    assert isinstance(objective, AnnealingKD)
    train = prepare(data, tmp_path / "cache").train
    assert (train.labelled, train.unlabelled > 900) == (90, True)
    assert len(ours.losses) == objective.stage1_epochs * -(-len(train) // batch) + objective.stage2_epochs * -(
        -90 // batch
    )
    assert ours.losses == loop.losses
    assert all(torch.equal(ours.weights[key], loop.weights[key]) for key in loop.weights)


@pytest.mark.parametrize("name", CASES)
def test_the_first_epochs_losses_where_it_does_not(tmp_path: Path, name: str) -> None:
    recipe = cases(device=DEVICE)[name]
    ours, loop = both(recipe, tmp_path, padded=False)
    assert difference(ours, loop, recipe.students[0].objective.epochs).first_epoch <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_final_weights_in_float64(tmp_path: Path, name: str) -> None:
    ours, loop = both(cases("float64", DEVICE)[name], tmp_path, padded=False)
    assert next(iter(loop.weights.values())).dtype == torch.float64
    assert max(float((ours.weights[key] - loop.weights[key]).abs().max()) for key in loop.weights) <= 1e-9


def test_the_student_that_is_delivered_is_that_of_the_loop(tmp_path: Path) -> None:
    """The whole way: stores on disk, a cohort, the weights of model.safetensors."""
    recipe = cases(device=DEVICE)["images"]
    _, loop = both(recipe, tmp_path, padded=True)
    splits = prepare(recipe.data, tmp_path / "cache")
    job = job_of(recipe, str(tmp_path / "teacher"), splits, tmp_path)
    train_in_process(recipe, job.stores, run=tmp_path / "whole", cache_root=str(tmp_path / "cache"))
    delivered = load_model(tmp_path / "whole" / "students" / "student").state_dict()
    assert all(torch.equal(delivered[key], loop.weights[key].cpu()) for key in delivered)


@pytest.mark.parametrize("wrong", ["another view's logits", "another order"])
def test_the_comparison_sees_what_it_should(tmp_path: Path, wrong: str) -> None:
    recipe = cases(device=DEVICE)["images"]
    ours, _ = both(recipe, tmp_path, padded=True)
    splits = prepare(recipe.data, tmp_path / "cache")
    job = dataclasses.replace(job_of(recipe, str(tmp_path / "teacher"), splits, tmp_path), root=str(tmp_path / "other"))
    stream = with_all(job, splits)
    other = with_logits(stream, array_of(stream)[:1])
    if wrong == "another order":
        other = dataclasses.replace(stream, logits=array_of(stream)[:, ::-1])
    theirs = cached(job, splits, other)
    assert not difference(ours, theirs, recipe.students[0].objective.epochs).identical


def test_the_loop_really_runs_the_teacher(tmp_path: Path) -> None:
    recipe: Recipe = cases(device=DEVICE)["regression"]
    ours, _ = both(recipe, tmp_path, padded=True)
    splits = prepare(recipe.data, tmp_path / "cache")
    device = set_deterministic(DEVICE, 1)
    teacher = load_model(tmp_path / "teacher").to(device)
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.01)
    with own_generator(device):
        assert online(recipe, teacher, splits, pad_to=recipe.cache.batch_rows).losses != ours.losses
