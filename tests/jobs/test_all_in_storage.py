"""Stores and runs in object storage: ensembles, runs that grow, shared stages I, searches, all as in local folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
from akd_dist.data.row_cache import prepare
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.jobs import cache_teacher, train_students
from akd_dist.jobs.cache_teacher import compute_in_process
from akd_dist.jobs.idle import IdleWorkers
from akd_dist.jobs.planning.plan import RunPlan
from akd_dist.jobs.planning.planner import cohort_job, groups_of
from akd_dist.jobs.run_folder import LocalRun
from akd_dist.jobs.train_teacher import Workspace, run_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Cnn
from akd_dist.storage.mean import Stores
from akd_dist.storage.removal import disused, gc, remove_store
from akd_dist.storage.roots import open_root
from tests.fleets import ANNEALING, a_recipe, a_student
from tests.jobs.test_tune import RECIPE

pytestmark = pytest.mark.usefixtures("own_process_state")

LONGER = ANNEALING | {"stage2_epochs": 2}
CONSTANT = {"kind": "sgd", "lr": 0.05}
SHORT, LONG = (
    a_student("short", optimizer=CONSTANT, batch=256),
    a_student("long", objective=LONGER, optimizer=CONSTANT, batch=256),
)
TAKD = a_student("takd", objective={"kind": "takd", "epochs": 1}, batch=256)
ASSISTANT = {
    "model": {"kind": "mlp", "hidden": 16},
    "objective": {"kind": "kd", "epochs": 1},
    "optimizer": CONSTANT,
    "batch": 256,
}


def train_here(
    base: CohortJob, plan: RunPlan, assistant: Stores, workspace: Workspace, run: LocalRun, idle: IdleWorkers
) -> int:
    """What a fleet does on Ray, cohort after cohort in this process."""
    Path(base.control).mkdir(parents=True, exist_ok=True)
    run.begin(base.attempt)
    base.attempt_file.touch()
    groups = groups_of(list(plan.todo))
    for number, group in enumerate(groups):
        train_cohort(replace(cohort_job(base, group, assistant), name=f"cohort-{base.attempt}-{number}"))
    return len(groups)


@contextlib.contextmanager
def all_here() -> Iterator[None]:
    """Teachers, shards and cohorts in this process: where the bucket is, is known only to processes begun later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_teacher, "run_in_task", run_in_process)
        patch.setattr(cache_teacher, "compute_in_tasks", compute_in_process)
        patch.setattr(train_students, "_train", train_here)
        yield


class Place:
    """Roots of stores and runs in one place, a cache for each."""

    def __init__(self, root: str, home: Path, name: str) -> None:
        self.stores, self.runs, self.cache = f"{root}/stores", f"{root}/runs", home / f"cache-{name}"
        self.options: dict[str, Any] = {
            "store_root": self.stores,
            "run_root": self.runs,
            "cache_root": self.cache,
            "console": Console(quiet=True),
        }
        card = ModelCard.of(Cnn(kind="cnn", width=4), prepare(a_recipe([SHORT]).data, self.cache).train, None)
        self.teachers = [str(home / f"teacher-{seed}") for seed in range(2)]
        for seed, path in enumerate(self.teachers):
            save_model(Path(path), build(card, seed=seed), card)

    def train(self, *students: dict[str, Any], name: str = "fleet", **teacher: Any) -> dict[str, Any]:
        members = {"members": [{"weights": path} for path in self.teachers]}
        recipe = a_recipe(list(students), name=name, teacher=members | teacher)
        with all_here():
            return akd_dist.train_students(recipe, **self.options)

    def tune(self, folder: Path) -> dict[str, Any]:
        (folder / "recipe.yaml").write_text(RECIPE.format(teacher=self.teachers[0], trials=2))
        with all_here():
            return akd_dist.tune(folder / "recipe.yaml", **self.options)


def journey(place: Place, folder: Path) -> list[Any]:
    """What somebody does who begins with one student, and what it comes to but for times and places."""
    fleets = [
        place.train(SHORT),
        place.train(SHORT, LONG),
        place.train(SHORT, LONG, TAKD, assistant=ASSISTANT),
        place.train(LONG, name="other"),
    ]
    told = [
        {
            one["name"]: [one["validation"], one["test"], one["agreement"], one["stage1_from"]]
            for one in fleet["students"]
        }
        for fleet in fleets
    ]
    (search,) = place.tune(folder)["searches"]
    return [*told, search]


@pytest.mark.slow
def test_all_is_as_in_a_local_folder(bucket: str, tmp_path: Path) -> None:
    here, there = Place(str(tmp_path), tmp_path, "here"), Place(bucket, tmp_path, "there")
    found = journey(there, tmp_path)
    assert found == journey(here, tmp_path)
    assert [fleet["long"][3] for fleet in (found[1], found[3])] == ["short", "fleet/short"]
    assert gc(there.stores, dry_run=True) == []
    stages = [one for one in disused(there.stores, there.cache, older_than=0) if one.store.id.startswith("stages/")]
    assert all(one.store.bytes > 0 for one in stages)
    used = [one for one in stages if one.store.uses]
    assert [use.run for use in used[0].store.uses] == [f"{there.runs}/other", f"{there.runs}/fleet"]
    assert "in use by the run" in str(remove_store(there.stores, used[0].store.id, there.cache))
    (unused, *_) = [one for one in stages if not one.store.uses]
    assert remove_store(there.stores, unused.store.id, there.cache) is None
    assert f"{unused.store.id}.ckpt" not in open_root(there.stores).list("stages")
