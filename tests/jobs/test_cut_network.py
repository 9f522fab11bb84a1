"""A network that is cut for half a minute in the middle of a command: between it, its workers and object storage.

A proxy stands before the storage. While it is cut, nothing goes through: connections stay open and say nothing, as
where packets are lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from akd_dist.base.errors import MachineError
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Custom, Recipe
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import MODEL, RunCopy
from tests.fleets import HARD, KD, a_recipe, a_student, own, stores_of, weights
from tests.survivors import HELD_MODELS, a_held_model, marked, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = 30.0
STUDENTS = [
    a_student("hard", objective=HARD | {"epochs": 3}, model=a_held_model(at=30)),
    a_student("kd", objective=KD | {"epochs": 3}),
]
# The teacher waits for a file of its own.
TEACHERS = HELD_MODELS.replace('with_name("hold")', 'with_name("hold-teacher")')


class Cut:
    """A proxy of TCP connections that can be cut, and mended."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream, self.open, self.over = upstream, threading.Event(), threading.Event()
        self.open.set()
        self.held = 0
        """How often somebody had something to say that did not go through."""
        self.server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def cut(self, seconds: float, begun: Callable[[], None]) -> None:
        """Let nothing through for a time; `begun` is called once that is so."""
        self.open.clear()
        begun()
        time.sleep(seconds)
        self.open.set()

    def close(self) -> None:
        self.over.set()
        self.open.set()
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.server.accept()[0]
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Carry what either side says to the other one, until one of them is done."""
        with contextlib.suppress(OSError), client, socket.create_connection(self.upstream) as server:
            sides = {client: server, server: client}
            while not self.over.is_set():
                for side in select.select([*sides], [], [], 0.5)[0]:
                    data = side.recv(1 << 16)
                    self.held += not self.open.is_set()
                    self.open.wait()
                    if not data:
                        return
                    sides[side].sendall(data)


@pytest.fixture
def cut(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    proxy = Cut((str(server.hostname), int(server.port or 80)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


def test_a_cut_of_half_a_minute_while_caching_and_while_training(bucket: str, cut: Cut, tmp_path: Path) -> None:
    """The teacher, and then a student, stand still in the middle of their work until the network is cut."""
    recipe = a_fleet(tmp_path)
    stores, runs, cache = f"{bucket}/stores", f"{bucket}/runs", tmp_path / "cache"
    command = [sys.executable, "-m", "tests.on_ray", "train-students", str(tmp_path / "recipe.yaml")]
    command += ["--store-root", stores, "--run-root", runs, "--cache-root", str(cache)]
    errors, environment = tmp_path / "stderr", os.environ | {"AKD_TEST_MARKER": str(tmp_path)}
    with errors.open("w") as told:
        process = subprocess.Popen(
            command, stdout=told, stderr=told, text=True, start_new_session=True, env=environment
        )
    try:
        for root, part, hold in ((stores, "/receipts/", "hold-teacher"), (runs, ".ckpt", "hold")):
            until(functools.partial(found, root, part), process, errors)
            asked = cut.held
            cut.cut(SECONDS, (tmp_path / hold).unlink)
            assert cut.held > asked, f"nothing was asked of the storage in {SECONDS:g} s"
        assert process.wait(timeout=900) == 0, errors.read_text()
    finally:
        for one in marked(tmp_path):
            one.kill()
        process.wait()
    copy = RunCopy(f"{runs}/fleet", tmp_path / "copy")
    copy.refresh(MODEL)
    plain = stores_of(recipe, str(tmp_path / "teacher"), tmp_path)
    train_in_process(recipe, plain, run=tmp_path / "run", cache_root=str(cache))
    assert weights(copy.folder) == weights(tmp_path / "run")
    assert arrays(stores) == arrays(str(tmp_path / "stores"))


def a_fleet(folder: Path) -> Recipe:
    """A recipe in a folder, with its teacher, both of which will stand still."""
    (folder / "held_models.py").write_text(HELD_MODELS)
    (folder / "held_teachers.py").write_text(TEACHERS)
    spec = a_held_model(at=3) | {"factory": "held_teachers:held"}
    recipe = a_recipe(
        STUDENTS, teacher={"weights": str(folder / "teacher")}, folder=str(folder), code=["held_teachers"]
    )
    card = ModelCard.of(own(Custom(**spec), folder), prepare(recipe.data, folder / "cache").train, None)
    save_model(folder / "teacher", build(card, seed=1), card)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    for name in ("hold", "hold-teacher"):
        (folder / name).touch()
    return recipe


def found(root: str, part: str) -> list[str]:
    """The keys under a root that have this part; the test itself may have been cut off, too."""
    with contextlib.suppress(MachineError):
        return [key for key in open_root(root).list() if part in key]
    return []


def arrays(root: str) -> dict[str, bytes]:
    """What lies in the arrays of the stores of a root, by key."""
    opened = open_root(root)
    return {key: opened.get(key) for key in opened.list() if "/arrays.zarr/" in key}
