"""Classifiers from stores that describe logits: as from logits where all are kept, and measured alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist.data.row_cache import prepare
from akd_dist.distill.cohort import open_stream, stored_predictions, train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.distill.metrics import EVALUATION_ROWS, evaluation_rows
from akd_dist.distill.probe import probe
from akd_dist.distill.sparse import SparseTargets
from akd_dist.distill.student import Student
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.windows import row_and_piece
from akd_dist.models.card import ModelCard
from akd_dist.recipe import Recipe
from akd_dist.storage.reader import open_store
from tests.fleets import ANNEALING, CONTINUATION, HARD, KD, a_recipe, a_student
from tests.language_stores import write_store

OBJECTIVES: dict[str, dict[str, Any]] = {
    "squared": ANNEALING,
    "centred": ANNEALING | {"center": True, "reduction": "sum"},
    "entropy": ANNEALING | {"stage1_loss": "cross_entropy"},
    "kd": KD,
    "continuation": CONTINUATION,
    "hard": HARD,
}
ENCODINGS: dict[str, Any] = {
    "logits": "float32",
    "all": {"kind": "top_k", "k": 10, "rank": 0, "value_bits": 16},
    "some": {"kind": "top_k", "k": 3, "rank": 2},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, CohortJob]]:
    """The same students from each of the stores of one made teacher."""
    home, found = tmp_path_factory.mktemp("described"), {}
    for name, encoding in ENCODINGS.items():
        students = [a_student(one, objective=objective, batch=128) for one, objective in OBJECTIVES.items()]
        recipe = a_recipe(students, data={"train": {"kind": "digits"}}, cache={"encoding": encoding})
        splits, stores = prepare(recipe.data, home / "cache"), {}
        for split in ("train", "validation", "test"):
            rows = getattr(splits, split)
            logits = torch.randn(len(rows), 10, generator=torch.Generator().manual_seed(0))
            logits += 6 * torch.nn.functional.one_hot(torch.from_numpy(rows.all_labels()), 10)
            stores[split] = write_store(home / "stores", rows, recipe.cache.encoding, logits)
        (home / name / "control").mkdir(parents=True)
        found[name] = recipe, fleet_job(recipe, splits, stores, home / name, str(home / "cache"))
        train_cohort(found[name][1])
    return found


def records(job: CohortJob, name: str) -> list[dict[str, Any]]:
    lines = (Path(job.root) / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_all_logits_are_kept_it_learns_as_from_logits(
    jobs: dict[str, tuple[Recipe, CohortJob]], name: str
) -> None:
    exact, kept, some = (records(jobs[which][1], name) for which in ENCODINGS)
    for one, other in zip(exact, kept, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=5e-3)
    assert some[-1]["validation"]["accuracy"] > 0.15
    result = json.loads((Path(jobs["some"][1].root) / name / "result.json").read_bytes())
    assert result["state"] == "done"
    assert 0 < result["agreement"] <= 1
    assert set(result["test"]) == {"accuracy", "f1", "matthews", "loss"}


def test_the_teachers_choice_is_the_largest_logit(jobs: dict[str, tuple[Recipe, CohortJob]]) -> None:
    recipe, job = jobs["some"]
    splits = prepare(recipe.data, Path(job.cache_root))
    ours = stored_predictions(open_store(str(job.stores["test"])), splits.test)
    logits = open_store(str(jobs["logits"][1].stores["test"])).rows(0, 0, len(splits.test))
    assert np.array_equal(ours.numpy(), logits.argmax(1))


def test_students_of_a_cohort_share_what_is_decoded(jobs: dict[str, tuple[Recipe, CohortJob]]) -> None:
    recipe, job = jobs["some"]
    splits = prepare(recipe.data, Path(job.cache_root))
    batch = next(iter(open_stream(job, splits)[0].batches(0)))
    assert batch.logits is None
    assert batch.targets is not None
    with batch.targets.shared():
        made = batch.targets.of_rows(0, len(batch.rows))
        assert made is batch.targets.of_rows(0, len(batch.rows))
        assert isinstance(made, SparseTargets)
        assert made.distribution(2.0, slice(0, 9)) is made.distribution(2.0, slice(0, 9))
    assert made.distribution(2.0, slice(0, 9)) is not made.distribution(2.0, slice(0, 9))


def test_such_students_step_alone_and_their_probe_says_why(
    jobs: dict[str, tuple[Recipe, CohortJob]], tmp_path: Path
) -> None:
    recipe, job = jobs["some"]
    splits = prepare(recipe.data, Path(job.cache_root))
    found = probe(recipe.data, "cpu", recipe.students[0], splits, tmp_path, "auto", recipe.cache.encoding.config())
    assert (found.stacked, "decoded within the loss" in found.why) == (False, True)
    assert row_and_piece(recipe, splits.train)[0] < 40


def test_blocks_of_an_evaluation_are_smaller_where_classes_are_many() -> None:
    assert [evaluation_rows(classes) for classes in (10, 32_768, 100_000)] == [EVALUATION_ROWS, EVALUATION_ROWS, 167]


def test_rows_without_labels_count_as_in_a_store_of_logits(
    jobs: dict[str, tuple[Recipe, CohortJob]], tmp_path: Path
) -> None:
    found = []
    for which in ("logits", "all"):
        recipe, job = jobs[which]
        splits = prepare(recipe.data, Path(job.cache_root))
        batch = next(iter(open_stream(job, splits)[0].batches(0)))
        labels = torch.where(torch.arange(len(batch.rows)) % 4 == 0, batch.labels, -1)
        batch = dataclasses.replace(batch, labels=labels, global_labelled=int((labels >= 0).sum()))
        spec = next(one for one in recipe.students if one.name == "kd")
        student = Student(spec, ModelCard.of(spec.model, splits.train, None), tmp_path / which)
        found.append(student._gradients(batch, 0.0)[0])
    assert found[0] == pytest.approx(found[1], rel=5e-3)
