"""Ray, imported with its environment set, and every private name of it that is used here: as it is in Ray 2.60.0.

Ray promises nothing of these names. So they stand in one file, each with the reason for which the public API does not
do, and `tests/jobs/test_ray_internals.py` fails, naming the version of Ray, when one is gone or is called otherwise.
"""

import json
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

SEEN_WITH = "2.60.0"
"""The version of Ray whose private names these are."""
# Read by Ray when it is imported or started, so they are set before either.
ENVIRONMENT = {
    # Only with this does every Ray process listen on 127.0.0.1 (measured with Ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Out-of-memory kills have a retry budget of their own, endless by default.
    "RAY_task_oom_retries": "3",
    # `ray.train.report` and the end of a run wait for this interval, 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Several workers of a node see each other's GPUs, so that NCCL can move data from one to the other.
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",
    # It holds a run up in the two minutes before its node is taken away. Here checkpoints are there all the time, and a
    # cohort whose node is gone goes on elsewhere; so its process, one a cohort, is spared.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers stay where they are; all our paths are absolute anyway.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Announces a change of behaviour that only concerns jobs which ask for zero GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Failed tasks are told of here. Ray tells again when their references are collected, in the middle of anything:
    # within ast.parse, Python 3.11 then raises a SystemError (seen).
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside Ray, at import
    import ray as ray  # under its own name, so that other modules may take it from here: the environment is set then


def listen_on_loopback() -> None:
    """Say what the environment above says once more, for a ray that somebody imported before it was set."""
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


def leave_job() -> None:
    """Have a Ray that is started here know nothing of the job that this process is part of, after `ray job submit`.

    Ray hands a job's environment on by a variable: its folder, as it lies in the cluster that the job was submitted to.
    Another Ray has no such folder, and starts no worker.
    """
    os.environ.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)


class DriversPath(list[str]):
    """Folders that workers look for modules in, besides those of their Python.

    Ray adds the driver's working directory, and has workers look there first: whatever lies in it under the name of a
    module that a library looks for would run. It stays away, unless this process itself looks there.

    Args:
        apart: the recipe's folder, where it travels: a node that sees the driver's, too, would find each module twice.
    """

    def __init__(self, apart: str | None = None) -> None:
        super().__init__()
        self.apart = apart

    def extend(self, folders: Iterable[str]) -> None:
        """Add those of these that this process looks in."""
        looked_in = {os.path.realpath(place or os.curdir) for place in sys.path}
        looked_in -= {os.path.realpath(self.apart)} if self.apart is not None else set()
        super().extend(folder for folder in folders if os.path.realpath(folder) in looked_in)


def job_with_path(folders: list[str]) -> Any:
    """A job whose workers look for modules in a list of folders, which Ray extends by those of the driver."""
    job = ray.job_config.JobConfig()
    job._py_driver_sys_path = folders  # not by the constructor, which takes an empty list for none
    return job


def quiet(*, connected: bool) -> None:
    """Silence what Ray prints by itself: before `ray.init`, about signal handlers; after it, about dead workers."""
    if connected:
        ray._private.worker._worker_logs_enabled = False  # long words on each death; what comes of it is said here
    else:
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # a thread cannot set a handler: so it is


def logs_folder() -> Path:
    """Where the Ray that was started last on this machine writes its logs."""
    return Path(cast(Any, ray._common.utils).get_default_ray_temp_dir(), "session_latest", "logs")


def without_datasets() -> Any:
    """Ray Train's trainer for any framework, without its manager of Ray datasets: a process for each cohort that takes
    seconds to start, and whose datasets nobody here uses. The constructor starts it whether there are any or not.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()
            return [one for one in made if not isinstance(one, DatasetsCallback)]

    return Trainer


def started_node() -> Any:
    """Ray's own object for what this process started or joined; None where it did neither.

    Used of it: `all_processes`, `remaining_processes_alive`, `dead_processes`, `destroy_external_storage` and
    `kill_all_processes`. There is no public way to ask whether the processes of a local Ray live, or to end them.
    """
    return ray._private.worker._global_node


def forget_node() -> None:
    """Have Ray end nothing of its own accord, neither in `ray.shutdown` nor at exit."""
    ray._private.worker._global_node = None


def machine_resources() -> tuple[float, float]:
    """CPUs and bytes of memory that a Ray started here would offer to tasks, without starting it."""
    utils = cast(Any, ray._private.utils)
    available = int(utils.estimate_available_memory())
    return float(utils.get_num_cpus()), float(available - utils.resolve_object_store_memory(available))


def free_resources() -> dict[str, dict[str, float]]:
    """What each node has free now, by its id: the public `ray.available_resources` is a sum over all nodes."""
    free: dict[str, dict[str, float]] = cast(Any, ray._private.state).available_resources_per_node()
    return free


def has_token() -> bool:
    """Whether this user has a token to show to a cluster; whether it is the cluster's is not known."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return True
    try:
        return Path("~/.ray/auth_token").expanduser().exists()
    except (OSError, RuntimeError):  # a user without a home, or with somebody else's
        return False


def show_token() -> None:
    """Show this user's token to clusters from now on; by itself Ray shows it to none but one that it starts.

    `RAY_AUTH_MODE` in the environment would not do: Ray has read it when it was imported. A cluster without tokens must
    not be joined so: its processes have none to show to this one.
    """
    cast(Any, ray)._private.authentication.authentication_token_setup._enable_token_auth()


def refuses_token(address: str, seconds: float = 10.0) -> bool:
    """Whether the head at an address (`host:port`, or `auto`) turns this user's token away, or misses one.

    `ray.init` would find out as well, after 20 seconds in which Ray's C++ part prints a line for each attempt. Here
    these go nowhere, though they are written below Python, on the file descriptor of stderr.

    Args:
        seconds: how long to wait for an answer; without one, joining is left to find out what is wrong.
    """
    refused: list[bool] = []

    def ask() -> None:
        try:
            found = cast(Any, ray)._private.services.canonicalize_bootstrap_address(address)
            if found is not None:
                client = cast(Any, ray)._raylet.GcsClient(address=found)
                client.internal_kv_get(b"session_name", b"session", timeout=seconds)
        except ray.exceptions.AuthenticationError:
            refused.append(True)
        except Exception:
            refused.append(False)

    shown = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
    finally:
        os.dup2(shown, 2)
        os.close(shown)
    return any(refused)


# ---- the autoscaler

Shapes = Counter[frozenset[tuple[str, float]]]
"""How often each bundle of resources is asked for."""
_READ_ONLY = "node_"  # how the autoscaler's stand-in, which only reports, names the type of each node


@dataclass(frozen=True)
class Autoscaling:
    """What the autoscaler (v2) is asked for, by whoever asked last, and what it says of it."""

    asked: Shapes
    """What it is asked for."""
    version: int
    """Of the cluster's state, in which this stands."""
    answered: int
    """The version of the state that its answer is to."""
    infeasible: bool
    """Its answer: whether no nodes that it may have can hold all of that."""


def shapes_of(bundles: Iterable[Mapping[str, float]]) -> Shapes:
    """Bundles, counted."""
    return Counter(frozenset((name, float(number)) for name, number in bundle.items()) for bundle in bundles)


def has_autoscaler() -> bool:
    """Whether the connected cluster has an autoscaler that brings nodes. Ray has no public way to ask.

    Every head runs the autoscaler's process, and reports by it; one that was given no node types only reports. Nodes
    of one that has some know by which name the cloud calls them (v2), or are of a type that has a name (v1).
    """
    if _is_v2():
        alive = [node for node in _status().cluster_resource_state.node_states if node.status != _DEAD]
        return any(node.instance_id for node in alive)
    from ray.experimental.internal_kv import _internal_kv_get

    said = _internal_kv_get(ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS)
    report = (json.loads(said).get("autoscaler_report") or {}) if said else {}
    types = {**(report.get("active_nodes") or {}), **(report.get("idle_nodes") or {})}
    return any(not name.startswith(_READ_ONLY) for name in types)


def autoscaling() -> Autoscaling | None:
    """What the autoscaler was asked and answers; None of v1, which does not say."""
    if not _is_v2():
        return None
    status = _status()
    cluster, own = status.cluster_resource_state, status.autoscaling_state
    asked: Shapes = Counter()
    for constraint in cluster.cluster_resource_constraints:
        for one in constraint.resource_requests:
            asked.update({frozenset(one.request.resources_bundle.items()): one.count})
    return Autoscaling(
        asked=asked,
        version=cluster.cluster_resource_state_version,
        answered=own.last_seen_cluster_resource_state_version,
        infeasible=bool(own.infeasible_cluster_resource_constraints),
    )


def request(bundles: list[dict[str, float]], selector: dict[str, str]) -> None:
    """Ask the autoscaler for nodes that hold all bundles, in place of what it was asked before; of none for nothing."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles, bundle_label_selectors=[selector] * len(bundles) if bundles else None)


_DEAD = 2  # NodeStatus.DEAD of Ray's autoscaler.proto


def _is_v2() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def _status() -> Any:
    """The state of nodes, of what is asked for, and of the autoscaler, as the head has it."""
    from ray.core.generated import autoscaler_pb2

    reply = cast(Any, autoscaler_pb2).GetClusterStatusReply()
    client = cast(Any, ray)._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return reply
