"""A run on one machine listens on loopback only: every socket of every process, while a teacher and students train.

They are held by a model that waits for a file, so that what is looked at does not hang on the machine's pace.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import akd_dist
from tests.fleets import ADAMW, HARD, a_recipe, a_student

pytestmark = pytest.mark.ray

MODEL = """
import os, pathlib, time
import ray, torch

class Waiting(torch.nn.Module):
    def __init__(self, inputs, classes, name):
        super().__init__()
        self.layer, self.name = torch.nn.Linear(inputs, classes), name

    def forward(self, x):
        if ray._private.worker.global_worker.mode == ray.WORKER_MODE:  # elsewhere it is only tried out, or probed
            folder = pathlib.Path(__file__).parent
            (folder / f"{self.name}-waits-{os.getpid()}").touch()
            while not (folder / f"{self.name}-goes-on").exists():
                time.sleep(0.05)
        return self.layer(x.flatten(1))

def waiting(input_shape, classes, name):
    return Waiting(input_shape[0] * input_shape[1] * input_shape[2], classes, name)
"""


def a_waiting_model(name: str) -> dict[str, Any]:
    return {"kind": "custom", "factory": "waiting_model:waiting", "arguments": {"name": name}}


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def reachable_from_outside() -> tuple[int, list[str]]:
    """How many sockets of this process and all below it take what comes in, and those that are not on loopback."""
    taking, outside = 0, []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name, sockets = process.name(), process.net_connections("inet")
        except psutil.Error:
            continue  # it has just ended
        for one in sockets:
            # TCP that listens, and UDP that is bound but to nobody in particular.
            takes = one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and one.laddr and not one.raddr)
            taking += bool(takes)
            if takes and not is_loopback(one.laddr.ip):
                outside.append(f"{name}: {one.type.name} {one.laddr.ip}:{one.laddr.port}")
    return taking, outside


def until_wait(folder: Path, name: str, workers: int, run: threading.Thread) -> None:
    deadline = time.monotonic() + 900
    while len(list(folder.glob(f"{name}-waits-*"))) < workers:
        assert run.is_alive(), f"the run ended before {name} trained"
        assert time.monotonic() < deadline, f"{name} never trained"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def seen(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, list[str]]]]:
    """What is reachable while each of the models is held in a step, by its name."""
    root = tmp_path_factory.mktemp("loopback")
    (root / "waiting_model.py").write_text(MODEL)
    workers = {"teacher": 1, "pair": 2}
    students = [a_student("pair", model=a_waiting_model("pair"), workers=2, objective=HARD | {"epochs": 1}, batch=256)]
    teacher = {"model": a_waiting_model("teacher"), "train": {"epochs": 1, "optimizer": ADAMW}}
    recipe = a_recipe(students, teacher=teacher, folder=str(root))
    places: dict[str, Any] = {f"{kind}_root": str(root / kind) for kind in ("store", "run", "cache")}
    ended: list[dict[str, Any]] = []

    def train() -> None:
        ended.append(akd_dist.train_students(recipe, console=Console(quiet=True), **places))

    run, found = threading.Thread(target=train, daemon=True), {}
    run.start()
    for name in workers:
        until_wait(root, name, workers[name], run)
        found[name] = reachable_from_outside()
        (root / f"{name}-goes-on").touch()
    yield found
    run.join(900)
    assert [student["state"] for student in ended[0]["students"]] == ["done"]


@pytest.mark.parametrize("name", ["teacher", "pair"])
def test_a_run_on_one_machine_listens_on_loopback_only(name: str, seen: dict[str, tuple[int, list[str]]]) -> None:
    taking, outside = seen[name]
    assert taking > 0, "Ray's own processes take connections"
    assert outside == []
