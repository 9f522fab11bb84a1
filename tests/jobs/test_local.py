"""Cohorts and tasks as processes of this machine: the bytes of the plain loop, whoever dies meanwhile."""

import errno
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

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.job import read_result
from akd_dist.jobs.executors import LocalExecutor
from akd_dist.jobs.fleet import Fleet
from akd_dist.jobs.idle import IdleWorkers, Worker, may_train_here
from akd_dist.jobs.local_tasks import LocalTasks
from akd_dist.jobs.packing import Node, ResourceRequest
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.probing import Prober
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.tasks import Task, run_one, run_tasks
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Recipe
from tests.fleets import HARD, a_recipe, a_student, stacks_of, store_bytes, weights

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
    executor.busy[worker] = ResourceRequest(1, 1)
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


def test_a_worker_finds_modules_where_the_search_path_holds_what_is_no_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    worker = Worker()
    assert worker.ask("call", (os.getpid, ())) == ("done", worker.process.pid)
    worker.end()


def test_a_machine_that_starts_no_more_processes_is_refused_and_nothing_is_left(
    recipe: Recipe, home: Path, idle: IdleWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle.begin()
    (first,) = idle.waiting
    opened = len(list(Path("/proc/self/fd").iterdir()))

    def refuse(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as refusing:
        refusing.setattr(subprocess, "Popen", refuse)
        with pytest.raises(MachineError, match="a process to work in could not be started") as told:
            Worker()
        assert "ulimit -u" in str(told.value.next)
        assert len(list(Path("/proc/self/fd").iterdir())) == opened
        with Prober(recipe, str(home / "cache")) as prober, pytest.raises(MachineError, match="could not be started"):
            prober._start()
        with pytest.raises(MachineError):
            idle.begin(2)
    assert not idle.waiting
    assert first.process.poll() is not None


def test_a_worker_that_is_dead_answers_nothing(recipe: Recipe) -> None:
    worker = Worker()
    worker.process.kill()
    worker.process.wait()
    assert worker.ask("probe", {}) is None
    assert worker.end() == -signal.SIGKILL


def forked() -> int:
    """A process that has nothing but what its parent leaves it; its id."""
    child = os.fork()
    if child == 0:
        time.sleep(99)
        os._exit(0)
    return child


def ended_by_a_signal() -> int:
    """The signal that a forked process was ended by."""
    child = forked()
    os.kill(child, signal.SIGTERM)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def ends_with_a_fork() -> None:
    forked()
    os._exit(7)


def test_what_a_worker_forks_keeps_nobody_waiting_and_ends_with_it() -> None:
    worker = Worker()
    assert worker.ask("call", (ended_by_a_signal, ())) == ("done", signal.SIGTERM)
    kind, child = worker.ask("call", (forked, ()))
    assert kind == "done"
    assert worker.ask("call", (ends_with_a_fork, ())) is None  # at once, although a process of its own lives
    assert worker.end() == 7
    assert not psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=60)[1]


def test_a_worker_that_died_while_it_waited_is_given_to_nobody(idle: IdleWorkers) -> None:
    idle.begin()
    (dead,) = idle.waiting
    dead.process.kill()
    dead.process.wait()
    taken = idle.take()
    assert taken is not dead
    assert dead.connection.closed
    taken.end()


def test_a_student_is_probed_also_where_the_worker_that_was_to_look_at_it_is_dead(
    recipe: Recipe, home: Path, idle: IdleWorkers
) -> None:
    (unlike,) = a_recipe([a_student("unlike", batch=29)]).students  # no other test has had it probed
    idle.begin()
    idle.waiting[0].process.kill()
    with Prober(recipe, str(home / "cache"), idle=idle) as prober:
        assert prober.probe(unlike) is not None
    assert not idle.waiting


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


# ---- tasks


def squared(job: int, item: int) -> int:
    """A task that dies, is refused or raises where it is told to."""
    if item == 5:
        raise RefusedError("five is not squared")
    if item == 6:
        raise ValueError("six is not squared")
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * item * item


def ran(items: list[int], idle: IdleWorkers, stop: StopFlag | None = None) -> dict[str, int]:
    found: dict[str, int] = {}

    def note(task: Task, result: int) -> None:
        found[task.name] = result

    with LocalTasks(idle) as here:
        tasks = [Task(f"item {item}", 10, item) for item in items]
        run_tasks(squared, tasks, threads=1, gpus=0, shared=here, stop=stop or StopFlag(), on_result=note)
        assert not here.busy
    return found


def test_tasks_run_in_workers_that_are_used_again(idle: IdleWorkers) -> None:
    idle.begin()
    (first,) = idle.waiting
    assert ran([1], idle) == {"item 1": 10}
    assert list(idle.waiting) == [first], "for one task nobody else is started"
    assert ran([1, 2, 3], idle) == {"item 1": 10, "item 2": 40, "item 3": 90}
    assert first in idle.waiting
    with LocalTasks(idle) as here:
        one: dict[str, Any] = {"threads": 1, "gpus": 0, "stop": StopFlag(), "on_poll": lambda: None, "name": "one"}
        assert run_one(squared, 2, 4, shared=here, **one) == 32


def test_what_a_task_raises_comes_back_and_what_kills_it_is_named(idle: IdleWorkers) -> None:
    with pytest.raises(RefusedError, match="five is not squared"):
        ran([1, 5], idle)
    with pytest.raises(RefusedError, match="item 6: computing this raised an error") as told:
        ran([6], idle)
    assert "ValueError: six is not squared" in str(told.value.got)
    with pytest.raises(MachineError, match="item 7: its worker died again and again") as dead:
        ran([7], idle)
    assert "SIGKILL" in str(dead.value.got)


def test_nothing_is_begun_once_a_command_stops(idle: IdleWorkers) -> None:
    stop = StopFlag()
    stop.signal = signal.SIGINT
    assert ran([1, 2], idle, stop) == {}


def test_a_store_that_is_cached_here_has_the_bytes_of_the_plain_loop(
    recipe: Recipe, home: Path, tmp_path: Path, stores: dict[str, str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(a_recipe(FLEET[:1], teacher={"weights": str(home / "teacher")}).to_yaml())
    command = [sys.executable, "-m", "akd_dist.cli", "cache-teacher", str(file), f"--store-root={tmp_path / 'stores'}"]
    done = subprocess.run(
        [*command, f"--cache-root={home / 'cache'}", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Ray" not in done.stderr
    assert json.loads(done.stdout)["id"] == Path(stores["train"]).name
    assert store_bytes(tmp_path / "stores") == store_bytes(Path(stores["train"]).parent)
