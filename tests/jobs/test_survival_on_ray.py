"""Killed under Ray: raylets, nodes, workers and drivers; every run ends with the weights of the plain loop.

A cluster of several raylets on this machine, and a command with `--address` that is its driver; or a command that has
a Ray of its own. Workers stand still at a batch of their second epoch, so that whoever is killed is killed there,
whatever the pace of the machine.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Recipe
from tests.fleets import ANNEALING, HARD, a_recipe, a_student, a_teacher
from tests.survivors import SECOND_EPOCH, marked, outcome, snapshot, standing_still, stands_still, until

pytestmark = pytest.mark.ray

MODELS = """
import os, pathlib, signal, time, torch

def unlucky(gradient):
    raise RuntimeError("out of luck in the backward pass")

class Odd(torch.nn.Module):
    def __init__(self, inputs, classes, deadly, stumbles):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, classes)
        self.deadly, self.stumbles = deadly, stumbles
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # checkpoints keep it: it is as deadly again

    def held_back(self):
        hold = os.environ.get("AKD_TEST_HOLD")
        return hold and pathlib.Path(hold).exists() and pathlib.Path(hold).read_text() == str(os.getpid())

    def forward(self, x):
        while self.held_back():
            time.sleep(0.02)
        self.steps += self.training
        if self.deadly and self.steps == 15:  # in the probe already
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        logits = self.layer(x.flatten(1))
        if self.stumbles and self.training and self.steps == 15 and torch.distributed.get_rank() == 1:
            logits.register_hook(unlucky)
        return logits

def odd(input_shape, classes, deadly=False, stumbles=False):
    return Odd(input_shape[0] * input_shape[1] * input_shape[2], classes, deadly, stumbles)
"""


def odd(name: str, workers: int = 1, **arguments: Any) -> dict[str, Any]:
    """A student that in its second epoch kills its worker, or fails in the backward pass of one."""
    model = {"kind": "custom", "factory": "odd_models:odd", "arguments": arguments}
    return a_student(name, batch=128, workers=workers, model=model)


FLEET = [
    a_student("annealing", batch=128),
    a_student("hard", batch=128, objective=HARD),
    a_student("long", batch=128, objective=ANNEALING | {"stage1_epochs": 3, "stage2_epochs": 2}),
    odd("custom"),
]


class Home:
    """A recipe, its stores, and what the plain loop makes of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache_root = root, str(root / "cache")
        (root / "odd_models.py").write_text(MODELS)
        self.teacher = a_teacher(a_recipe(FLEET), root / "teacher", root / "cache")
        self.recipe = self.recipe_for(FLEET)
        document = cache_in_process(
            self.recipe, self.teacher, store_root=str(root / "stores"), cache_root=self.cache_root
        )
        stores = {"train": document["store"]} | {name: part["store"] for name, part in document["splits"].items()}
        train_in_process(self.recipe, stores, run=root / "plain", cache_root=self.cache_root)
        self.outcome = outcome(root / "plain")

    def recipe_for(self, students: list[dict[str, Any]]) -> Recipe:
        return a_recipe(students, teacher={"weights": self.teacher}, folder=str(self.root))

    def command(self, root: Path, *more: str, recipe: Recipe | None = None) -> list[str]:
        (root / "recipe.yaml").write_text((recipe or self.recipe).to_yaml())
        places = {"store": self.root / "stores", "run": root / "runs", "cache": self.cache_root}
        options = [part for key, path in places.items() for part in (f"--{key}-root", str(path))]
        return [
            sys.executable, "-m", "tests.on_ray", "train-students", str(root / "recipe.yaml"), *options, *more
        ]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("survival-on-ray"))


class Driver:
    """A command that trains, in a session of its own; it and all that it started are gone in the end."""

    def __init__(self, command: list[str], root: Path, **environment: str) -> None:
        self.root, self.errors = root, root / f"stderr-{time.monotonic_ns()}"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env=os.environ | {"AKD_TEST_MARKER": str(root)} | environment,
            )  # fmt: skip

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        for process in marked(self.root):
            process.kill()

    def until(self, ready: Callable[[], Any]) -> Any:
        """What `ready` gives once it gives something."""
        return until(ready, self.process, self.errors)

    def end(self, seconds: float = 900) -> int:
        self.process.communicate(timeout=seconds)
        return int(self.process.returncode)


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head trains nothing, and that has two nodes with one CPU each, where workers stand still once."""
    from akd_dist.jobs import cluster  # sets what Ray reads when it starts

    assert cluster.ray
    monkeypatch.setenv("AKD_FAILPOINT", SECOND_EPOCH)
    monkeypatch.setenv("AKD_TEST_HOLD", str(tmp_path_factory.mktemp("hold") / "pid"))  # whom `custom` keeps waiting
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            started.add_node(num_cpus=1)
        yield started
    finally:
        started.shutdown()  # type: ignore[no-untyped-call]


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def held(cluster: Any, *, lost: Any = None) -> tuple[Any, psutil.Process] | None:
    """The node whose worker stands still in its second epoch, and that worker; `lost` is a node that does not count."""
    for node in cluster.worker_nodes - {lost}:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(raylet_of(node)).children():
                if stands_still(process):
                    return node, process
    return None


def kill(raylet: int) -> None:
    """Kill a raylet, and come back once it is gone."""
    parent = psutil.Process(raylet)
    parent.kill()

    def is_gone() -> bool:
        try:
            return not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # somebody took note of its end between the two looks
            return True

    while not is_gone():
        time.sleep(0.01)


def worker_logs(run: Path) -> str:
    return "".join(path.read_text() for path in run.glob("logs/cohort-*.log"))


@pytest.mark.slow
def test_a_raylet_dies_and_its_worker_wakes_up_later(home: Home, nodes: Any, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "fleet"
    with Driver(home.command(tmp_path, "--address", nodes.address), tmp_path) as driver:
        node, worker = driver.until(lambda: held(nodes))
        # The kernel wakes suspended processes whose parent is gone. This one gets no further than its next batch.
        hold = Path(os.environ["AKD_TEST_HOLD"])
        hold.write_text(str(worker.pid))
        kill(raylet_of(node))
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.suspend()
        _, second = driver.until(lambda: held(nodes, lost=node))  # on the other node, and stands still in its turn
        for folder in run.glob("students/*"):
            assert list(folder.glob("checkpoints/writer-*-000002-*")), f"nobody has taken over {folder.name}"
        hold.unlink()
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends such a process, sooner or later
            worker.resume()
        driver.until(lambda: not worker.is_running() or "taken over by a later worker" in worker_logs(run))
        second.resume()
        assert driver.end() == 0, driver.errors.read_text()
    assert outcome(run) == home.outcome


@pytest.mark.slow
def test_a_node_dies_with_its_worker_and_the_other_goes_on(home: Home, nodes: Any, tmp_path: Path) -> None:
    with Driver(home.command(tmp_path, "--address", nodes.address), tmp_path) as driver:
        node, worker = driver.until(lambda: held(nodes))
        worker.kill()
        nodes.remove_node(node, allow_graceful=False)
        _, second = driver.until(lambda: held(nodes, lost=node))
        driver.until(lambda: "is gone; what it worked on goes on elsewhere" in driver.errors.read_text())
        second.resume()
        assert driver.end() == 0, driver.errors.read_text()
    assert outcome(tmp_path / "runs" / "fleet") == home.outcome


@pytest.mark.slow
def test_without_a_node_left_the_next_command_resumes(
    home: Home, nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Driver(home.command(tmp_path, "--address", nodes.address), tmp_path) as driver:
        node, worker = driver.until(lambda: held(nodes))
        other = next(one for one in nodes.worker_nodes if one is not node)
        nodes.remove_node(other, allow_graceful=False)
        worker.kill()
        nodes.remove_node(node, allow_graceful=False)
        assert driver.end() == 6, driver.errors.read_text()
        assert "nodes were lost" in driver.errors.read_text()
        assert "goes on from what was kept" in driver.errors.read_text()
    monkeypatch.delenv("AKD_FAILPOINT")
    nodes.add_node(num_cpus=1)
    with Driver(home.command(tmp_path, "--address", nodes.address), tmp_path) as driver:
        assert driver.end() == 0, driver.errors.read_text()
    assert outcome(tmp_path / "runs" / "fleet") == home.outcome


@pytest.mark.slow
def test_a_teacher_whose_node_is_lost_goes_on_elsewhere(
    home: Home, nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"kind": "custom", "factory": "odd_models:odd", "arguments": {}}
    train = {"epochs": 2, "optimizer": {"kind": "adamw", "lr": 1e-3}, "batch": 128}
    recipe = a_recipe(FLEET[:1], teacher={"model": model, "train": train}, folder=str(home.root), checkpoint_seconds=0)
    command = [*home.command(tmp_path, "--address", nodes.address, recipe=recipe), "--store-root", str(tmp_path / "s")]
    with Driver(command, tmp_path) as driver:
        driver.until(lambda: held(nodes))
        for node in list(nodes.worker_nodes):
            nodes.remove_node(node, allow_graceful=False)
        assert driver.end() == 6, driver.errors.read_text()
        assert "nodes were lost while the teacher ran" in driver.errors.read_text()
    assert list(tmp_path.glob("s/teachers/**/*.ckpt"))
    monkeypatch.delenv("AKD_FAILPOINT")
    nodes.add_node(num_cpus=1)
    with Driver(command, tmp_path) as driver:
        assert driver.end() == 0, driver.errors.read_text()


@pytest.mark.slow
def test_a_student_that_kills_its_worker_fails_alone(home: Home, tmp_path: Path) -> None:
    recipe = home.recipe_for([FLEET[0], odd("deadly", deadly=True), FLEET[1]])
    with Driver(home.command(tmp_path, "--json", recipe=recipe), tmp_path) as driver:
        out, _ = driver.process.communicate(timeout=900)
        told = driver.errors.read_text()
        assert driver.process.returncode == 1, told
    entries = {entry["name"]: entry for entry in json.loads(out)["students"]}
    assert entries["deadly"]["state"] == "failed"
    assert "memory may have run out. Ray says: Worker exit detail: " in entries["deadly"]["reason"]
    assert entries["deadly"]["epochs"] == 1
    assert "deadly.log" in told
    assert list((tmp_path / "runs" / "fleet" / "students" / "deadly" / "checkpoints").glob("000001-*.ckpt"))
    found = outcome(tmp_path / "runs" / "fleet")
    del found["deadly"]
    assert found == {name: home.outcome[name] for name in ("annealing", "hard")}


@pytest.mark.slow
def test_a_student_whose_workers_lose_step_fails_alone(home: Home, tmp_path: Path) -> None:
    recipe = home.recipe_for([odd("steady", workers=2), odd("stumbling", workers=2, stumbles=True)])
    with Driver(home.command(tmp_path, "--json", recipe=recipe), tmp_path) as driver:
        out, _ = driver.process.communicate(timeout=900)
        assert driver.process.returncode == 1, driver.errors.read_text()
    entries = {entry["name"]: entry for entry in json.loads(out)["students"]}
    assert (entries["steady"]["state"], entries["steady"]["epochs"]) == ("done", 3)
    assert (entries["stumbling"]["state"], entries["stumbling"]["epochs"]) == ("failed", 1)
    reason = entries["stumbling"]["reason"]
    assert reason.startswith("its worker died again and again; its workers fell out of step: stumbling: RuntimeError: ")
    assert "out of luck in the backward pass" in reason


@pytest.mark.slow
def test_a_waiting_driver_carries_on_from_a_killed_one(home: Home, tmp_path: Path) -> None:
    """A driver dies, its worker stands still, and a third driver waits."""
    run, waiting = tmp_path / "runs" / "fleet", tmp_path / "waiting"
    waiting.mkdir()
    with Driver(home.command(tmp_path), tmp_path, AKD_FAILPOINT=SECOND_EPOCH) as first:
        (worker,) = first.until(lambda: standing_still(first.process))
        assert "starting Ray" in first.errors.read_text()
        second = subprocess.run(home.command(tmp_path), capture_output=True, text=True, check=False)
        assert second.returncode == 3
        assert f"process {first.process.pid} on {socket.gethostname()}" in second.stderr
        with Driver(home.command(tmp_path, "--wait"), waiting) as third:
            third.until(lambda: "waiting for" in third.errors.read_text())
            first.process.kill()
            assert third.end() == 0, third.errors.read_text()
        assert outcome(run) == home.outcome
        before = snapshot(run / "students")
        with contextlib.suppress(psutil.NoSuchProcess):  # swept up by what is left of Ray
            worker.resume()
        psutil.wait_procs([worker], timeout=900)
        assert not worker.is_running()
        assert snapshot(run / "students") == before
