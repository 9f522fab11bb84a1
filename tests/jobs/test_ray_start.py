"""A Ray that does not start: one message and exit code 6, nothing held, no process left, whatever went wrong.

Commands meet a Ray that really fails, by settings that its own processes die of; what else `ray.init` may do is played
in this process.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from akd_dist.base.errors import MachineError
from akd_dist.base.locks import file_lock
from akd_dist.jobs import cluster, ray_internals
from akd_dist.tracking.status import RunReader
from tests.fleets import HARD, a_recipe, a_student

pytestmark = pytest.mark.ray

# What Ray is told, by the part of it that dies of that.
DEADLY = {
    "raylet": {"RAY_raylet_client_num_connect_attempts": "0"},
    "session folder": {"RAY_TMPDIR": "/proc/nowhere"},
    "socket": {"RAY_TMPDIR": str(Path(tempfile.gettempdir()) / (100 * "x"))},
}
REASONS = {"raylet": "raylet", "session folder": "/proc/nowhere", "socket": "AF_UNIX path length"}


def processes_of(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AKD_TEST_MARKER") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("part", ["raylet", *(pytest.param(part, marks=pytest.mark.slow) for part in [*DEADLY][1:])])
def test_a_ray_that_does_not_start_holds_nothing(part: str, tmp_path: Path) -> None:
    recipe = a_recipe([a_student("one", objective=HARD, workers=2)])  # for which Ray has to start
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    places = [word for kind in ("store", "run", "cache") for word in (f"--{kind}-root", str(tmp_path / kind))]
    command = [sys.executable, "-m", "akd_dist.cli", "train-students", str(tmp_path / "recipe.yaml"), *places]
    environment = os.environ | {"AKD_TEST_MARKER": str(tmp_path)} | DEADLY[part]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert told.returncode == 6, told.stderr
    assert told.stderr.count("error:") == 1
    assert "Traceback" not in told.stderr
    assert "no Ray cluster could be started on this machine" in told.stderr
    assert REASONS[part] in told.stderr
    assert "--address" in told.stderr
    assert processes_of(str(tmp_path)) == []
    seen = RunReader(tmp_path / "run" / "fleet").read()
    assert seen.state == "stopped"
    assert seen.driver is not None
    assert seen.driver.ended is not None
    with file_lock(tmp_path / "run" / "fleet" / "lock", what="the run", wait=0):
        pass  # nobody holds it


class Odd(BaseException):
    """What no one would think of catching."""


RAISED = [Exception("it timed out"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), Odd("quite"), MemoryError()]


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Ray in this process, as far as anybody asks; one that the session has goes on."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr("atexit.unregister", lambda _function: None)
    monkeypatch.setattr(cluster.ray._private.worker, "_global_node", cluster.ray._private.worker._global_node)
    return monkeypatch


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_ray_raises_is_a_refusal(error: BaseException, unconnected: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise error

    unconnected.setattr(cluster.ray, "init", init)
    with pytest.raises(MachineError) as refused:
        cluster.connect()
    assert refused.value.code == 6
    assert type(error).__name__ in str(refused.value.got)
    assert [thread for thread in threading.enumerate() if thread.name == "ray-parent" and thread.is_alive()] == [] or (
        cluster.ray._private.worker.global_worker.connected
    )


def test_a_ray_that_never_answers_is_given_up_and_ended(unconnected: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def init(**_: Any) -> None:
        helper = f"import time; time.sleep(600)  # {cluster.ray.__path__[0]}"
        started.append(subprocess.Popen([sys.executable, "-c", helper]))
        over.wait()

    unconnected.setattr(cluster.ray, "init", init)
    unconnected.setattr(cluster, "START_SECONDS", 1.0)
    theirs = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # the user's own
    try:
        with pytest.raises(MachineError, match="within 1 s") as refused:
            cluster.connect()
        assert refused.value.code == 6
        assert not psutil.pid_exists(started[0].pid) or psutil.Process(started[0].pid).status() == "zombie"
        assert theirs.poll() is None
    finally:
        over.set()
        for process in (*started, theirs):
            process.kill()
            process.wait()


LOOKING = """
import sys
sys.path[:] = [place for place in sys.path if place]  # as where a console script is run
from akd_dist.jobs import cluster, ray_internals
cluster.connect(num_cpus=1)
try:
    print(cluster.ray.get(cluster.ray.remote(lambda: __import__("sys").path).remote()))
finally:
    cluster.shut_down()
"""


def test_workers_do_not_import_from_the_working_folder(tmp_path: Path) -> None:
    """Ray would have them look there first, and libraries look for modules that may be missing, such as triton."""
    told = subprocess.run(
        [sys.executable, "-c", LOOKING], capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    assert "site-packages" in told.stdout
    assert str(tmp_path) not in told.stdout


def test_workers_look_where_the_driver_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place, looked_in in ((str(tmp_path), True), ("", True), (None, False)):
        monkeypatch.chdir(tmp_path)
        path = [one for one in sys.path if one not in ("", str(tmp_path))]
        monkeypatch.setattr(sys, "path", path if place is None else [place, *path])
        folders = ray_internals.DriversPath()
        folders.extend([str(tmp_path)])
        assert folders == ([str(tmp_path)] if looked_in else [])


def test_workers_do_not_look_in_a_folder_that_travels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node that sees the driver's folder would find each of its modules twice, and refuse them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for apart, kept in ((str(tmp_path), []), (str(tmp_path / "recipe"), [str(tmp_path)])):
        folders = ray_internals.DriversPath(apart)
        folders.extend([str(tmp_path)])
        assert folders == kept


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]:x", ":6379", ""])
def test_an_address_takes_a_port(address: str) -> None:
    with pytest.raises(MachineError, match=f"no Ray cluster at {re.escape(address)}") as refused:
        cluster.check_address(address)
    assert refused.value.got == "an address without a port"


def test_who_has_no_token_and_shall_show_one_is_told(tmp_path: Path) -> None:
    """Ray would end the process with exit code 1, and say nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_TOKEN")}
        told = subprocess.run(
            [sys.executable, "-c", f"from akd_dist.jobs import cluster; cluster.check_address({address!r})"],
            env=environment | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
            capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
    assert "MachineError: there is no token to show to a Ray cluster" in told.stderr
