"""Cohorts as processes of this machine: the bytes of the plain loop, through deaths of workers and of their driver."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.job import read_result
from akd_dist.jobs.executors import LocalExecutor
from akd_dist.jobs.fleet import Fleet
from akd_dist.jobs.idle import IdleWorkers, Worker, may_train_here
from akd_dist.jobs.packing import Node, ResourceRequest
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Recipe
from tests.fleets import HARD, a_recipe, a_student, stacks_of, weights

FLEET = [*(a_student(f"annealing-{seed}", seed=seed) for seed in range(3)), a_student("hard", objective=HARD)]
DEADLY = """
import os, signal, torch

class Deadly(torch.nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs, classes))

    def forward(self, x):
        if self.training and "AKD_TEST_DEADLY" in os.environ and len(x) > 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)

def deadly(input_shape, classes):
    return Deadly(input_shape[0] * input_shape[1] * input_shape[2], classes)
"""
NODE = Node("here", 2, 0, 8e9)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe(FLEET)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, stores: dict[str, str], home: Path) -> dict[str, str]:
    train_in_process(recipe, stores, run=home / "plain-local", cache_root=str(home / "cache"))
    return weights(home / "plain-local")


@pytest.fixture
def idle() -> Iterator[IdleWorkers]:
    with IdleWorkers() as workers:
        yield workers


def fleet_of(
    recipe: Recipe, stores: dict[str, str], home: Path, run: Path, idle: IdleWorkers, **changes: Any
) -> tuple[Fleet, LocalExecutor]:
    splits = prepare(recipe.data, home / "cache")
    base = fleet_job(recipe, splits, stores, run, str(home / "cache"))
    base = replace(base, stacks=stacks_of(recipe, splits, home / "cache"), patience=0.2, **changes)
    executor = LocalExecutor(NODE, idle)
    costs = CostModel(base.device, len(splits.train), probes={})
    return Fleet(base, costs, StopFlag(), Console(quiet=True), executor=executor), executor


def test_a_cohort_in_a_process_has_the_bytes_of_the_plain_loop_also_where_that_was_killed(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, undisturbed: dict[str, str], idle: IdleWorkers
) -> None:
    idle.begin(2)
    fleet, executor = fleet_of(recipe, stores, home, tmp_path, idle, checkpoint_seconds=0.05)
    first = idle.waiting[0]

    def kill() -> None:
        while not list(tmp_path.rglob("*.ckpt")):
            time.sleep(0.01)
        first.process.kill()

    killing = threading.Thread(target=kill)
    killing.start()
    begun = fleet.train([tuple(recipe.students)])
    killing.join()
    assert weights(tmp_path) == undisturbed
    # The first may have been through before it was killed.
    assert begun == len(fleet.jobs) <= 2
    assert executor.free() == [NODE]
    assert not idle.waiting or begun == 1


def test_a_worker_that_dies_again_and_again_is_given_up(
    stores: dict[str, str], home: Path, tmp_path: Path, idle: IdleWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_models.py").write_text(DEADLY)
    model = {"kind": "custom", "factory": "deadly_models:deadly"}
    recipe = a_recipe([a_student("deadly", model=model)], folder=str(tmp_path))
    run = tmp_path / "run"
    fleet, _ = fleet_of(recipe, stores, home, run, idle)
    monkeypatch.setenv("AKD_TEST_DEADLY", "1")
    fleet.train([tuple(recipe.students)])
    result = read_result(fleet.base, recipe.students[0])
    assert result is not None
    assert (result["state"], len(fleet.jobs)) == ("failed", 2)
    reason = result["reason"]
    assert "its worker died again and again" in reason
    assert "its process ended with code -9 (SIGKILL)" in reason


def test_what_a_worker_is_refused_for_ends_the_run(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, idle: IdleWorkers
) -> None:
    fleet, _ = fleet_of(recipe, stores, home, tmp_path, idle)
    fleet.base = replace(fleet.base, fingerprints={"train": "0" * 64})
    with pytest.raises(RefusedError, match="the train rows on this node are not those of the driver"):
        fleet.train([tuple(recipe.students)])


def test_whoever_leaves_leaves_no_worker(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, idle: IdleWorkers
) -> None:
    _, executor = fleet_of(recipe, stores, home, tmp_path, idle)
    worker = Worker()
    executor.running[worker] = ResourceRequest(1, 1)
    assert executor.free()[0].cpus == 1
    with executor:
        pass
    assert worker.process.wait(timeout=30) == -signal.SIGKILL
    worker.end()


def test_a_worker_leaves_with_its_driver() -> None:
    driver = (
        "import time; from akd_dist.jobs.idle import Worker; print(Worker().process.pid, flush=True); time.sleep(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver + "; time.sleep(99)"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    assert not psutil.wait_procs([worker], timeout=60)[1]


def test_a_worker_that_is_dead_answers_nothing(recipe: Recipe) -> None:
    worker = Worker()
    worker.process.kill()
    worker.process.wait()
    assert worker.ask("probe", {}) is None
    assert worker.end() == -signal.SIGKILL


def test_who_may_train_in_processes_of_this_machine(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert may_train_here(recipe, None)
    assert not may_train_here(recipe, "auto")
    assert not may_train_here(recipe.model_copy(update={"device": "cuda"}), None)
    several = recipe.students[0].model_copy(update={"workers": 2})
    assert not may_train_here(recipe.model_copy(update={"students": [several]}), None)


def test_a_small_fleet_starts_no_ray_and_a_large_one_plans_for_it(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(a_recipe(FLEET[:1], teacher={"weights": str(home / "teacher")}).to_yaml())
    places = [
        f"--store-root={Path(stores['train']).parent}",
        f"--cache-root={home / 'cache'}",
        f"--run-root={tmp_path}",
    ]

    def said(*more: str) -> Any:
        command = [sys.executable, "-m", "akd_dist.cli", "train-students", str(file), *places, "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "starting Ray" not in done.stderr
        return json.loads(done.stdout)

    plan = said("--dry-run")
    assert plan["executor"] == "processes"
    assert "its start costs 4 s" in plan["why"] or "nothing to cut" in plan["why"]
    fleet = said()
    assert {student["state"] for student in fleet["students"]} == {"done"}
    assert weights(Path(fleet["run"])) == {"annealing-0": undisturbed["annealing-0"]}
    long = said("--dry-run", "--set", "name=long", "--set", "students.0.objective.stage2_epochs=200000")
    assert long["executor"] == "ray"
