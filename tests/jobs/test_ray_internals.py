"""A canary: the private names of Ray that are used here are there, and are called as they were."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import MachineError
from akd_dist.jobs import cluster, ray_internals
from akd_dist.jobs.ray_internals import SEEN_WITH, ray

ROOT = Path(__file__).parents[2]
VERSION = f"of Ray {ray.__version__} (ray_internals.py was written for {SEEN_WITH})"


def test_a_token_is_shown_though_ray_is_imported_already(tmp_path: Path) -> None:
    """Ray reads once how it shows who it is."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    script = (
        "from akd_dist.jobs import ray_internals\n"
        "raylet = ray_internals.ray._raylet\n"
        "modes = [raylet.get_authentication_mode()]\n"
        "assert ray_internals.has_token()\n"
        "ray_internals.show_token()\n"
        "modes.append(raylet.get_authentication_mode())\n"
        "assert modes == [raylet.AuthenticationMode.DISABLED, raylet.AuthenticationMode.TOKEN], modes"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("mode", "answers", "got"),
    [
        (None, [False], None),  # a cluster without tokens is shown none
        (None, [True, False], None),
        (None, [True, True], "a token that is not the cluster's"),
        ("token", [True], "a token that is not the cluster's"),
        ("disabled", [True], "no token"),
    ],
)
def test_a_token_is_shown_where_a_cluster_asks_for_one(
    mode: str | None, answers: list[bool], got: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    left, shown = list(answers), list[str]()

    def show() -> None:
        shown.append("a token")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")

    monkeypatch.setattr(ray_internals, "refuses_token", lambda _address: left.pop(0))
    monkeypatch.setattr(ray_internals, "has_token", lambda: True)
    monkeypatch.setattr(ray_internals, "show_token", show)
    if got is None:
        cluster._check_token("head:6379")
    else:
        with pytest.raises(MachineError) as refused:
            cluster._check_token("head:6379")
        assert refused.value.got == got
    assert left == []
    assert len(shown) == len(answers) - 1


USED: dict[str, tuple[Callable[[], Any], str]] = {
    "kill_all_processes": (
        lambda: ray._private.node.Node.kill_all_processes,
        "(self, check_alive: bool = True, allow_graceful: bool = False, wait: bool = False)",
    ),
    "destroy_external_storage": (lambda: ray._private.node.Node.destroy_external_storage, "(self)"),
    "remaining_processes_alive": (lambda: ray._private.node.Node.remaining_processes_alive, "(self)"),
    "dead_processes": (lambda: ray._private.node.Node.dead_processes, "(self)"),
    "estimate_available_memory": (lambda: ray._private.utils.estimate_available_memory, "()"),
    "resolve_object_store_memory": (
        lambda: ray._private.utils.resolve_object_store_memory,
        "(available_memory_bytes: int, object_store_memory: Optional[int] = None) -> int",
    ),
    "get_num_cpus": (
        lambda: ray._private.utils.get_num_cpus,
        "(override_docker_cpu_warning: bool = False, truncate: bool = True) -> float",
    ),
    "_enable_token_auth": (
        lambda: ray._private.authentication.authentication_token_setup._enable_token_auth,
        "() -> None",
    ),
    "available_resources_per_node": (lambda: ray._private.state.available_resources_per_node, "()"),
    "canonicalize_bootstrap_address": (
        lambda: ray._private.services.canonicalize_bootstrap_address,
        "(addr: str, temp_dir: Optional[str] = None) -> Optional[str]",
    ),
    "is_autoscaler_v2": (
        lambda: importlib.import_module("ray.autoscaler.v2.utils").is_autoscaler_v2,
        "(fetch_from_server: bool = False, gcs_client: Optional[ray._raylet.GcsClient] = None) -> bool",
    ),
    "_create_default_callbacks": (
        lambda: (
            importlib.import_module(
                "ray.train.v2.api.data_parallel_trainer"
            ).DataParallelTrainer._create_default_callbacks
        ),
        "(self) -> List[ray.train.v2.api.callback.RayTrainCallback]",
    ),
    "get_default_ray_temp_dir": (lambda: ray._common.utils.get_default_ray_temp_dir, "()"),
}
SET: dict[str, Callable[[], Any]] = {
    "DatasetsCallback": lambda: importlib.import_module("ray.train.v2._internal.callbacks.datasets").DatasetsCallback,
    "ENABLE_RAY_CLUSTER": lambda: ray._private.ray_constants.ENABLE_RAY_CLUSTER,
    "_global_node": lambda: ray._private.worker._global_node,
    "_worker_logs_enabled": lambda: ray._private.worker._worker_logs_enabled,
    "DEBUG_AUTOSCALING_STATUS": lambda: ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS,
    "get_cluster_status": lambda: ray._raylet.InnerGcsClient.get_cluster_status,  # type: ignore[attr-defined]
    "internal_kv_get": lambda: ray._raylet.InnerGcsClient.internal_kv_get,  # type: ignore[attr-defined]
    "_py_driver_sys_path": lambda: ray.job_config.JobConfig()._py_driver_sys_path,
}


@pytest.mark.parametrize("name", USED)
def test_it_is_called_as_before(name: str) -> None:
    find, expected = USED[name]
    try:
        got = str(inspect.signature(find()))
    except AttributeError as error:
        pytest.fail(f"{name} is gone {VERSION}: {error}")
    assert got == expected, f"{name} has another signature {VERSION}"


@pytest.mark.parametrize("name", SET)
def test_it_is_there_to_be_set(name: str) -> None:
    try:
        SET[name]()
    except AttributeError as error:
        pytest.fail(f"{name} is gone {VERSION}: {error}")


def test_the_autoscaler_tells_what_is_read_of_it() -> None:
    told: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    used = {
        "ClusterResourceState": ["node_states", "cluster_resource_constraints", "cluster_resource_state_version"],
        "AutoscalingState": ["last_seen_cluster_resource_state_version", "infeasible_cluster_resource_constraints"],
        "NodeState": ["instance_id", "status"],
        "ClusterResourceConstraint": ["resource_requests"],
        "ResourceRequestByCount": ["request", "count"],
        "ResourceRequest": ["resources_bundle"],
        "GetClusterStatusReply": ["cluster_resource_state", "autoscaling_state"],
    }
    for message, names in used.items():
        assert set(names) <= {one.name for one in getattr(told, message).DESCRIPTOR.fields}, f"{message} {VERSION}"
    assert told.NodeStatus.Value("DEAD") == ray_internals._DEAD


def test_nodes_know_their_processes() -> None:
    assert "self.all_processes" in inspect.getsource(ray._private.node.Node.__init__), f"renamed {VERSION}"


def test_workers_look_where_a_job_says() -> None:
    """The list itself is extended, by `extend`: that is where folders of the driver are turned away."""
    source = inspect.getsource(ray._private.worker.connect)
    assert "_py_driver_sys_path.extend(" in source, f"it is no longer extended {VERSION}"


def test_a_job_is_handed_on_by_that_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = ray._private.worker
    name: str = worker.RAY_JOB_CONFIG_JSON_ENV_VAR
    monkeypatch.setenv(name, "{}")
    ray_internals.leave_job()
    assert name not in os.environ, f"it is called {name} {VERSION}"


def test_no_other_module_uses_private_names() -> None:
    files = [*ROOT.glob("akd_dist/**/*.py"), *ROOT.glob("jobs/**/*.py"), *ROOT.glob("storage/**/*.py")]
    assert len(files) > 80
    users = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            private = isinstance(node, ast.Attribute) and node.attr in ("_private", "_common")
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("ray._", "ray.train._"))
            if private or imported:
                users.add(file.name)
    assert users == {Path(ray_internals.__file__).name}
