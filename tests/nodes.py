"""Clusters of several raylets on this machine, as processes of their own: `python -m tests.nodes WHAT ...`.

Ray knows one cluster a process, and the tests' own is another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import akd_dist
from akd_dist.base.errors import MachineError
from akd_dist.jobs import cluster, prepare_rows, ray_train, shared
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.tasks import Task, run_tasks
from akd_dist.recipe import load_recipe

SMALL: dict[str, Any] = {"object_store_memory": 80 * 2**20, "memory": 4 * 10**9}


def start(**head: Any) -> Any:
    """A cluster of one node, to which this process is connected."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | SMALL | head)
    cluster.ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    return made


def one_more(made: Any) -> list[str]:
    """The command that is a further node of a cluster, for as long as it runs."""
    return [sys.executable, "-W", "ignore", "-m", "tests.nodes", "raylet", made.gcs_address]


def until(condition: Callable[[], bool], seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def join(recipe: str, root: Path) -> dict[str, Any]:
    """Train a recipe on one CPU, where a cohort waits and the other stands still, until a second node has joined."""
    shared.LOOK_SECONDS = 0.5
    made = start(num_cpus=1)

    joined: list[subprocess.Popen[bytes]] = []

    def begun() -> int:
        return len({path.parent for path in root.glob("runs/*/students/*/checkpoints/*.ckpt")})

    def add() -> None:
        until(lambda: begun() > 0)
        joined.append(subprocess.Popen(one_more(made)))
        until(lambda: begun() == len(load_recipe(recipe).students))
        (root / "hold").unlink()

    threading.Thread(target=add, daemon=True).start()
    places: dict[str, Any] = {
        "store_root": str(root / "stores"),
        "cache_root": str(root / "cache"),
        "run_root": str(root / "runs"),
    }
    with (root / "told").open("w") as told:
        result = akd_dist.train_students(load_recipe(recipe), console=Console(file=told, width=200), **places)
    for node in joined:
        node.terminate()
    return {"cohorts": result["cohorts"], "states": [student["state"] for student in result["students"]]}


def hidden(root: Path) -> dict[str, Any]:
    """A node that does not see a folder: told of and left alone, whether it joins, is there, or has been given work."""
    made = start(num_cpus=0)
    told, again, sent = list[str](), list[str](), list[str]()
    before = {"the run's folder": str(root)}
    (root / "cache").mkdir(parents=True)
    stop, nothing = StopFlag(), lambda *_: None
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    with shared.Shared(before, str(root / "cache"), told.append) as seeing:
        started = [subprocess.Popen(["unshare", "-m", "sh", "-c", script, "sh", str(root), *one_more(made)])]
        try:
            until(lambda: len(cluster.nodes()) == 2)
            shared.LOOK_SECONDS = 0.1
            until(lambda: not seeing.look() and bool(told))
            kept = seeing.selector() == {shared.NODE_LABEL: f"!in({','.join(seeing.bad)})"} and len(seeing.nodes()) == 1
            try:
                run_tasks(nothing, [], threads=1, gpus=0, shared=seeing, stop=stop, on_result=nothing)
                refusal = ""
            except MachineError as error:
                refusal = str(error)
            with shared.Shared(before, str(root / "cache"), again.append):
                pass
            with shared.Shared(before, str(root / "cache"), sent.append) as unaware:
                unaware.bad.clear()
                sent.clear()
                started.append(subprocess.Popen(one_more(made)))
                unaware.look = lambda *, now=False: False  # type: ignore[method-assign]
                until(lambda: len(cluster.nodes()) == 3)
                unaware.good = {node.name for node in cluster.nodes()}
                done: list[Any] = []
                tasks = [Task(str(number), None, number) for number in range(6)]
                keep = lambda _, result: done.append(result)  # noqa: E731
                run_tasks(where, tasks, threads=1, gpus=0, shared=unaware, stop=stop, on_result=keep)
        finally:
            for node in started:
                node.terminate()
                node.wait()
    left = [path.name for path in root.glob(".seen-*")]
    answer = {"told": told, "kept": kept, "refusal": refusal, "again": again, "sent": sent, "left": left}
    return answer | {"done": sorted(one[0] for one in done), "blind": [one[1] in unaware.bad for one in done]}


def travels(root: Path) -> dict[str, Any]:
    """A recipe with a module of its own is cached where its folder is not, and trained where its data are not either.

    Rows are prepared by tasks, on the one node that sees the data. The other one is left out of that, and is the only
    one that is there afterwards.
    """
    prepare_rows.SMALL = 0
    made = start(num_cpus=0)
    (root / "cache").mkdir()
    script = 'for place; do [ "$place" = -- ] && break; mount -t tmpfs none "$place"; shift; done; shift; exec "$@"'
    nodes = []
    places: dict[str, Any] = {f"{kind}_root": str(root / kind) for kind in ("store", "run", "cache")}
    try:
        for hidden in (["recipe"], ["recipe", "data", "cache"]):
            paths = [str(root / name) for name in hidden]
            nodes.append(subprocess.Popen(["unshare", "-m", "sh", "-c", script, "sh", *paths, "--", *one_more(made)]))
            until(lambda: len(cluster.nodes()) == 1 + len(nodes))
        with (root / "told").open("w") as told:
            console, recipe = Console(file=told, width=500), load_recipe(root / "recipe" / "recipe.yaml")
            roots = {name: place for name, place in places.items() if name != "run_root"}
            cached = akd_dist.cache_teacher(recipe, console=console, address=made.address, **roots)
            nodes[0].terminate()
            until(lambda: len(cluster.nodes()) == len(nodes))
            console.print("---")
            result = akd_dist.train_students(recipe, console=console, address=made.address, **places)
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    states = [student["state"] for student in result["students"]]
    return {"states": states, "told": (root / "told").read_text().split("---"), "cached": cached["shards_computed"]}


def publishes(root: Path, uri: str) -> dict[str, Any]:
    """A teacher is trained, and cached, on a node that shares no folder with the driver."""
    made = start(num_cpus=0)
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    (root / "cache").mkdir()
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", script, "sh", str(root / "cache"), *one_more(made)])
    try:
        until(lambda: len(cluster.nodes()) == 2)
        places: dict[str, Any] = {"store_root": uri, "cache_root": str(root / "cache"), "address": made.address}
        recipe = load_recipe(root / "recipe.yaml")
        document = akd_dist.cache_teacher(recipe, console=Console(stderr=True), **places)
    finally:
        node.terminate()
        node.wait()
    return {"hit": document["hit"], "computed": document["shards_computed"], "here": (root / "cache/teachers").exists()}


def where(_job: None, item: int) -> tuple[int, str]:
    time.sleep(0.3)
    return item, cluster.ray.get_runtime_context().get_node_id()


def share(root: Path) -> dict[str, Any]:
    """Two workers on half a GPU each, at the same time on the one GPU that Ray is told of; they wait for a file."""
    start(num_cpus=2, num_gpus=1)
    ray, seen = cluster.ray, root / "seen"
    from akd_dist.jobs.packing import ResourceRequest
    from akd_dist.jobs.ray_internals import without_datasets

    def work() -> list[int]:
        until(seen.exists)
        return [int(one) for one in ray.get_gpu_ids()]

    root.mkdir()
    (node,) = cluster.nodes()
    found: list[Any] = []
    scaling = ray_train.scaling(ResourceRequest(1, 1, gpus=0.5, memory=1e8))
    run = lambda: found.append(without_datasets()(work, scaling_config=scaling).fit().return_value)  # noqa: E731
    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()

    def left() -> Any:
        return next(one for one in cluster.free_nodes() if one.name == node.name)

    until(lambda: left().gpus == 0)
    free = left()
    seen.touch()
    for thread in threads:
        thread.join()
    return {"gpus": found, "cpus_free": free.cpus, "memory_taken": node.memory - free.memory}


def raylet(gcs_address: str) -> None:
    """One more node, in this process's view of the file system, until it is killed."""
    parameters = cluster.ray._private.parameter.RayParams(
        gcs_address=gcs_address, num_cpus=1, min_worker_port=0, max_worker_port=0, **SMALL
    )
    cluster.ray._private.node.Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "raylet":
        raylet(arguments[0])
    if what == "join":
        answer = join(arguments[0], Path(arguments[1]))
    elif what == "publishes":
        answer = publishes(Path(arguments[0]), arguments[1])
    elif what == "hidden":
        answer = hidden(Path(arguments[0]))
    elif what == "share":
        answer = share(Path(arguments[0]))
    else:
        answer = travels(Path(arguments[0]))
    cluster.shut_down()
    print(json.dumps(answer))
