"""Rows that a command prepares for a cluster: nodes work with them as with their own, and need none of the sources."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from akd_dist.base.errors import HeldError, MachineError, RefusedError
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.distill import teacher as teachers
from akd_dist.distill.cohort import train_cohort
from akd_dist.jobs import cache_teacher, prepare_rows
from akd_dist.jobs.cache_teacher import cache_in_process, compute_in_process, walk_chain
from akd_dist.jobs.planning.caching import check_models, look_up, model_at, models_there, open_rows
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.models import CachedModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.probing import measure_all
from akd_dist.jobs.train_teacher import Workspace, run_in_process
from akd_dist.jobs.working_dir import WorkingDir
from akd_dist.recipe import Recipe, TeacherSpec
from akd_dist.storage.claim import claim_store
from akd_dist.storage.removal import disused, remove_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import uses_of
from tests.fleets import HARD, a_recipe, a_student, a_teacher, store_bytes, stores_of, weights
from tests.sources import source


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    random = np.random.default_rng(0)
    rows = source(
        "parquet", tmp_path / "data", random.integers(0, 256, (300, 1, 8, 8), dtype=np.uint8), [0, 1, 2] * 100
    )
    data = {"train": rows.model_dump(mode="json"), "views": 1, "augmentation": {"kind": "none"}}
    return a_recipe([a_student("one"), a_student("two", objective=HARD, seed=1)], data=data)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """That of a command on a cluster, which does nothing here but to be there."""
    monkeypatch.setattr("akd_dist.jobs.cluster.check_address", lambda address: None)
    return Workspace(str(tmp_path / "stores"), str(tmp_path / "driver"), "cluster:1", console=Console(quiet=True))


def rows_of(recipe: Recipe, workspace: Workspace, *, again: bool = False, only_look: bool = False) -> Splits:
    return open_rows(recipe, workspace, students=False, again=again, only_look=only_look).splits


@contextlib.contextmanager
def elsewhere(recipe: Recipe, folder: Path) -> Iterator[Recipe]:
    """As on a node that has none of the data, and has prepared nothing."""
    file = Path(recipe.data.train.path)  # type: ignore[union-attr, arg-type]
    file.rename(folder / "aside")
    teachers.forget()
    try:
        yield recipe
    finally:
        (folder / "aside").rename(file)
        teachers.forget()


def test_a_node_caches_and_trains_without_the_data(recipe: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache")
    stores = stores_of(recipe, teacher, tmp_path / "alone")
    alone = fleet_job(
        recipe, prepare(recipe.data, tmp_path / "cache"), stores, tmp_path / "alone", str(tmp_path / "cache")
    )
    Path(alone.control).mkdir(parents=True)
    train_cohort(alone)

    splits = rows_of(recipe, workspace)
    node = replace(workspace, cache_root=str(tmp_path / "node"), address=None)
    with elsewhere(recipe, tmp_path):
        model = model_at("the teacher", teacher, recipe, splits)
        look_up(model, recipe, node)
        (cached,) = walk_chain(recipe, splits, [model], node, run_in_process, compute_in_process)
        job = fleet_job(recipe, splits, cached.stores, tmp_path / "run", node.cache_root)
        Path(job.control).mkdir(parents=True)
        train_cohort(job)
        measured = measure_all(recipe, recipe.students, {"one": 1, "two": 1}, node.cache_root, splits.train.sealed)
    assert all(one is not None and one.step > 0 for one in measured.values())
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    ours = {key: value for key, value in store_bytes(tmp_path / "stores").items() if not key.startswith("rows/")}
    assert ours == store_bytes(tmp_path / "alone" / "stores")


def test_rows_that_somebody_caches_from_are_not_removed(recipe: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    root, cache = workspace.store_root, tmp_path / "driver"
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache")
    splits = rows_of(recipe, workspace)
    assert splits.train.sealed is not None
    rows_id, node = f"rows/{Path(splits.train.sealed.uri).name}", replace(workspace, address=None)
    kept = list[str | None]()

    def compute(model: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
        kept.extend(one.kept for one in disused(root, cache, older_than=0.0) if one.store.id == rows_id)
        kept.append(remove_store(root, rows_id, cache))
        compute_in_process(model, recipe, workspace)

    def cached() -> None:
        model = model_at("the teacher", teacher, recipe, splits)
        look_up(model, recipe, node)
        walk_chain(recipe, splits, [model], node, run_in_process, compute)

    cached()
    assert len(kept) == 2
    assert all(str(line).startswith(f"in use by the run {cache}") for line in kept)
    (use,) = uses_of(open_root(splits.train.sealed.uri))
    assert use.lock is not None
    assert not Path(use.lock).exists()
    cached()  # all is there: nothing is read of the rows
    assert len(uses_of(open_root(splits.train.sealed.uri))) == 1
    assert remove_store(root, rows_id, cache) is None
    shutil.rmtree(Path(root))
    with pytest.raises(RefusedError, match="is gone"):
        cached()


def test_rows_that_a_machine_caches_from_are_not_removed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its cache has no room for them, and they are kept under the store root."""
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "whole")
    root, cache, kept = str(tmp_path / "stores"), tmp_path / "cache", list[str | None]()

    def compute(model: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
        kept.extend(one.kept for one in disused(root, cache, older_than=0.0) if one.store.id.startswith("rows/"))
        compute_in_process(model, recipe, workspace)

    monkeypatch.setattr(cache_teacher, "compute_in_process", compute)
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "18kB")  # train rows alone take 17
    cache_in_process(recipe, teacher, store_root=root, cache_root=str(cache))
    (line,) = kept
    assert str(line).startswith(f"in use by the run {cache}")


def test_a_driver_holds_no_rows(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache")
    recipe = recipe.model_copy(update={"teacher": TeacherSpec(weights=teacher)})
    own = prepare(recipe.data, tmp_path / "cache")
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "1kB")
    with pytest.raises(MachineError, match="no room"):
        prepare(recipe.data, tmp_path / "driver")
    inputs = open_rows(recipe, workspace, students=True, again=False)
    splits = inputs.splits
    assert set(inputs.parameters) == {"one", "two"}
    check_models(recipe, splits, models_there(recipe, splits, workspace), workspace)
    measured = measure_all(recipe, recipe.students, inputs.parameters, workspace.cache_root, splits.train.sealed)
    costs = CostModel.of(recipe, splits, inputs.parameters, measured)
    assert (costs.row_bytes, costs.rows, costs.evaluated) == (72, len(own.train), len(own.validation))
    for name in SPLITS:
        mine, theirs = getattr(splits, name), getattr(own, name)
        assert mine.describe() == theirs.describe()
        np.testing.assert_array_equal(mine.all_labels(), theirs.labels)
        np.testing.assert_array_equal(mine.class_counts(), theirs.class_counts())
        np.testing.assert_array_equal(mine.inputs[[5, 1]], theirs.inputs[[5, 1]])
        np.testing.assert_array_equal(mine.read(3, 9)[1], theirs.read(3, 9)[1])
    assert not list((tmp_path / "driver").rglob("*.npy"))
    with pytest.raises(MachineError, match="no room"):
        rows_for(recipe.data, tmp_path / "driver", {}, splits.train.sealed)


def test_a_command_that_only_looks_writes_nothing_and_finds_what_is_there(
    recipe: Recipe, workspace: Workspace, tmp_path: Path
) -> None:
    looked = rows_of(recipe, workspace, only_look=True)
    assert looked.train.sealed is None
    assert not (tmp_path / "stores").exists()
    made = rows_of(recipe, workspace)
    assert made.fingerprints == looked.fingerprints
    assert made.train.sealed is not None
    assert rows_of(recipe, workspace, only_look=True).train.sealed == made.train.sealed


def test_two_commands_do_not_write_the_same_rows(
    recipe: Recipe, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    real = write_run

    def meanwhile(job: Any, run: Any, threads: int) -> Any:
        if not written:
            with pytest.raises(HeldError, match="rows/"):
                rows_of(recipe, workspace)
            with claim_store(workspace.store_root, "another"):
                written.append(run)
        return real(job, run, threads)

    monkeypatch.setattr(prepare_rows, "write_run", meanwhile)
    rows_of(recipe, workspace)
    assert written
    assert rows_of(recipe, workspace).train.sealed is not None


def test_nodes_are_looked_at_for_data_while_rows_are_prepared_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    path = recipe.data.train.path  # type: ignore[union-attr]
    weights = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": str(tmp_path / "w")})})
    folder = WorkingDir.of(weights, [])
    assert folder.needed == [path, str(tmp_path / "w")]
    assert folder.for_rows().needed == [path]
    folder.leave_out_sources()
    assert folder.needed == [str(tmp_path / "w")]
    both = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": path})})
    folder = WorkingDir.of(both, [])
    folder.leave_out_sources()
    assert folder.needed == [path]
