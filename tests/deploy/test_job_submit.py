"""`ray job submit`, end to end: two nodes that share no folder, a token, and stores in object storage.

The second node is a process of this machine that sees an empty folder where the first one has its home, cache,
temporary folder and recipe. Only it has the CPUs that caching asks for; only the first one can train the teacher.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from akd_dist.storage import catalog
from akd_dist.storage.reader import open_store
from akd_dist.storage.run_copy import MODEL, RunCopy
from akd_dist.tracking import remote as tracking
from tests.fleets import HARD, a_recipe, a_student
from tests.jobs.test_nodes import unshare_works

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))
OTHER = "another-node"
# In mounts and a host name of its own: what lies under $1 is empty there, and nothing that it mounts is seen elsewhere.
ALONE = ["unshare", "-m", "-u", "sh", "-c", 'mount -t tmpfs none "$1" && hostname "$2" && shift 2 && exec "$@"', "sh"]


class TwoNodes:
    """A cluster whose nodes meet by its ports alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ports = iter(free_ports(4))
        self.address, self.dashboard = f"127.0.0.1:{next(ports)}", f"http://127.0.0.1:{(port := next(ports))}"
        self.home = root / "home"
        self.home.mkdir()
        # Nothing of this process's own Ray: its variables would have every node listen to itself alone.
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(self.home)}
        self.env |= {"AKD_DIST_CACHE": str(root / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.env |= {"PYTHONWARNINGS": "ignore", "RAY_raylet_start_wait_time_s": "600"}
        self.nodes: list[subprocess.Popen[bytes]] = []
        gcs = self.address.rpartition(":")[2]
        self.start([], "--head", f"--port={gcs}", f"--dashboard-port={port}", cpus=1, agent=next(ports))
        self.start([*ALONE, str(root), OTHER], f"--address={self.address}", cpus=2, agent=next(ports))

    def start(self, before: list[str], *options: str, cpus: int, agent: int) -> None:
        """Start a node, and wait until it has joined."""
        command = [RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command += [f"--num-cpus={cpus}", f"--temp-dir={self.root / f'ray{cpus}'}"]  # another one on each
        command += [f"--dashboard-agent-listen-port={agent}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        log = self.root.with_name(f"{self.root.name}-{len(self.nodes)}.log")
        with log.open("w") as told:
            words = [*before, *command, *options]
            node = subprocess.Popen(words, env=self.env, cwd="/", stdout=told, stderr=subprocess.STDOUT)
        self.nodes.append(node)
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            time.sleep(0.2)

    def submit(self, folder: Path, *command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Send a folder, and run akd-dist there."""
        words = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", str(folder), "--"]
        words += [sys.executable, "-m", "akd_dist", *command]
        return subprocess.run(
            words, env=self.env | changed, cwd=self.root, capture_output=True, text=True, check=False, timeout=900
        )

    def stop(self) -> None:
        """End what was started, by its process ids."""
        below = [child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            node.wait(timeout=300)
        _, alive = psutil.wait_procs(below, timeout=60)
        for child in alive:
            child.kill()


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


@pytest.fixture(scope="module")
def two_nodes(bucket: str) -> Iterator[TwoNodes]:
    if shutil.which("unshare") is None or not unshare_works():
        pytest.skip("hiding a folder from one process takes unshare and mount, which are not permitted here")
    # Ray's sockets lie below: their paths must be shorter than those of pytest's folders.
    with tempfile.TemporaryDirectory(prefix="akd-", ignore_cleanup_errors=True) as name:
        root = Path(name) / "node"
        root.mkdir()
        started = None
        try:
            started = TwoNodes(root)
            yield started
        finally:
            if started is not None:
                started.stop()


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is sent: a recipe, and a module of its own that the teacher is built by."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "own_nets.py").write_text(
        "import torch\n\n\ndef linear(input_shape, classes):\n"
        "    size = input_shape[0] * input_shape[1] * input_shape[2]\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, classes))\n"
    )
    recipe = a_recipe([a_student("one", objective=HARD | {"epochs": 1})])
    text = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"threads": 2})}).to_yaml()
    (folder / "recipe.yaml").write_text(text)
    return folder


OWN = "teacher.model={kind: custom, factory: own_nets:linear}"


def test_a_submission_without_the_token_is_refused(two_nodes: TwoNodes, recipes: Path) -> None:
    done = two_nodes.submit(recipes, "-V", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode != 0
    assert "akd-dist" not in done.stdout.replace("akd_dist", "")
    assert two_nodes.env["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_a_teacher_is_cached_by_a_node_that_shares_nothing_but_the_bucket(
    two_nodes: TwoNodes, recipes: Path, bucket: str
) -> None:
    root = f"{bucket}/stores"
    words = ["cache-teacher", "recipe.yaml", "--set", OWN, "--address", "auto", "--store-root", root]
    done = two_nodes.submit(recipes, *words)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    sealed = [store for store in catalog.list_stores(root) if store.sealed]
    assert len(sealed) == 3
    hosts = {receipt.host for store in sealed for receipt in catalog.receipts_of(root, store.id)}
    assert hosts == {OTHER}
    for store in sealed:
        opened = open_store(f"{root}/{store.id}")
        assert opened.rows(0, 0, opened.num_rows).shape == (opened.num_rows, 10)
    for secret in (two_nodes.env["RAY_AUTH_TOKEN"], os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in told
    again = two_nodes.submit(recipes, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "a hit" in again.stdout


def test_students_train_on_the_node_of_the_job_alone(two_nodes: TwoNodes, recipes: Path, bucket: str) -> None:
    """Without `--address`, although the job's environment names the cluster."""
    runs = two_nodes.root / "own-runs"
    places = ["--store-root", f"{bucket}/stores", "--run-root", str(runs)]
    done = two_nodes.submit(recipes, "train-students", "recipe.yaml", "--set", OWN, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    fleet = json.loads((runs / "fleet" / "fleet.json").read_text())
    assert [student["state"] for student in fleet["students"]] == ["done"]
    assert fleet["store"].startswith(f"{bucket}/stores/")


def test_students_train_where_nothing_but_the_bucket_is_shared(
    two_nodes: TwoNodes, recipes: Path, bucket: str, tmp_path: Path
) -> None:
    """One that only the other node can hold; it is read, and told of, on this one."""
    places = ["--store-root", f"{bucket}/stores", "--run-root", f"{bucket}/runs"]
    words = ["train-students", "recipe.yaml", "--set", OWN, "--set", "students.0.threads=2", "--address", "auto"]
    done = two_nodes.submit(recipes, *words, *places)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "gets no work" not in told
    uri = f"{bucket}/runs/fleet"
    assert f"report  {uri}/report.html" in told
    found = tracking.reader_of(uri).read()
    assert [(student.name, student.state) for student in found.students] == [("one", "done")]
    copy = RunCopy(uri, tmp_path / "fleet")
    copy.refresh(MODEL)
    log = (copy.folder / "logs" / "one.log").read_text()
    assert "epoch 0:" in log, "the worker's log, from the other node"
    assert (copy.folder / "students" / "one" / "model.safetensors").exists()
    for secret in (two_nodes.env["RAY_AUTH_TOKEN"], os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in told
        assert not [key for key in copy.run.root.list() if secret.encode() in copy.run.root.get(key)]
    again = two_nodes.submit(recipes, *words, *places)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "these are its saved results" in again.stdout + again.stderr


def test_a_node_that_does_not_see_the_run_gets_no_work(two_nodes: TwoNodes, recipes: Path, bucket: str) -> None:
    """Students that only it could hold are refused; those that the node of the command holds are trained there."""
    runs = two_nodes.root / "runs"
    places = ["--store-root", f"{bucket}/stores", "--run-root", str(runs)]
    words = ["train-students", "recipe.yaml", "--set", OWN, "--address", "auto", *places]
    done = two_nodes.submit(recipes, *words, "--set", "students.0.threads=2", "--set", "name=wide")
    told = done.stdout + done.stderr
    assert done.returncode != 0, told
    assert f"{OTHER} (" in told
    assert "sees what this command works on" in told
    assert "--run-root" in told
    done = two_nodes.submit(recipes, *words)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert f"the node {OTHER} (" in told
    assert "gets no work" in told
