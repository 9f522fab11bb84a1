"""A cluster that grows and shrinks by Ray's own autoscaler, its nodes being processes of this machine.

Not by `ray.cluster_utils.AutoscalingCluster`: Ray 2.60's wheel lacks the file that it reads, and its start ends every
Ray of this machine. Node types say nothing of memory, since a node of this provider that is told of it does not start.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HEAD_ID = "f" * 51 + "00000"
"""The id that Ray's provider takes the head to have."""
HEAD_TYPE = "ray.head.default"
"""And its type."""
EMPTY = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
OBJECT_STORE = 80 * 2**20


@dataclass
class Autoscaled:
    """Such a cluster, as it is seen from outside."""

    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    logs: Path

    def ask(self, expression: str) -> Any:
        """What an expression comes to in a process that has joined; it may name ray, cluster and ray_internals."""
        script = (
            "import json; from akd_dist.jobs import cluster, ray_internals; ray = cluster.ray; "
            f"cluster.connect({self.address!r}); print(json.dumps({expression})); cluster.shut_down()"
        )
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    def workers(self) -> int:
        """Nodes beside the head: raylets that run below it."""
        found = 0
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE
        return found - 1

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        """Wait for something; what the autoscaler logged is shown if it never comes."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                told = "".join(path.read_text()[-3000:] for path in self.logs.glob("session_latest/logs/monitor*"))
                raise AssertionError(f"never: {what}\n{told}")
            time.sleep(0.2)


@contextlib.contextmanager
def autoscaled(
    folder: Path, types: Mapping[str, Mapping[str, Any]], *, head: Mapping[str, float], most: int, idle_minutes: float
) -> Iterator[Autoscaled]:
    """Start such a cluster, with nothing but its head.

    Args:
        folder: for its files and sockets; its path must be short.
        types: node types beside the head, as an autoscaler's configuration has them.
        head: resources of the head.
        most: workers.
        idle_minutes: after which a node goes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "gcs_address": address}
    known: dict[str, dict[str, Any]] = {HEAD_TYPE: {"resources": dict(head), "node_config": {}, "max_workers": 0}}
    known |= {name: {"node_config": {}} | dict(one) for name, one in types.items()}
    for one in known.values():
        one["resources"] = {"object_store_memory": OBJECT_STORE} | one["resources"]
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": provider | {"launch_multiple": True, "head_node_id": HEAD_ID},
        "available_node_types": known,
        "head_node_type": HEAD_TYPE,
        **{f"{name}_commands": [] for name in EMPTY},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment = os.environ | own
    for_head = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [
        *(sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"),
        *(f"--num-cpus={head['CPU']:g}", f"--object-store-memory={OBJECT_STORE}"),
        *(f"--temp-dir={folder / 'r'}", f"--autoscaling-config={folder / 'config.json'}"),
    ]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment | for_head, stdout=log, stderr=log, start_new_session=True)
    made = Autoscaled(address, environment, process, folder / "r")
    try:
        made.until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), "the head is up")
        yield made
    finally:
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
