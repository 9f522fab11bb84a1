"""Ray, imported with its environment set, and every private name of it that is used here: as it is in Ray 2.60.0.

Ray promises nothing of these names. So they stand in one file, each with the reason for which the public API does not
do, and `tests/jobs/test_ray_internals.py` fails, naming the version of Ray, when one is gone or is called otherwise.
"""

import logging
import os
import warnings
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
