"""What a lost node costs: a node of two is killed while the teacher is cached, and while students train.

    python -m benchmarks.lost_node             a table
    python -m benchmarks.lost_node --json      one JSON document whose main figure is `ratio`
    ... --runs training windows                only these, and the undisturbed one

A Ray cluster on this machine, its head without CPUs, two nodes with one CPU each. Every run is one `train-students` of
the same recipe into fresh roots: digits, each of them many times and moved by up to a pixel, under four views; a CNN as
the teacher, its weights there and drawn at random; four students in two cohorts, one on each node, and a checkpoint
every two seconds.

- undisturbed: nothing happens.
- caching: once half of the shards have their receipts, a node at work is killed: SIGKILL to its raylet and all its
  workers. Another one of the same size joins --join-after seconds later.
- training: the same, once every student has a checkpoint of half of its epochs.
- windows: as training, with AKD_DIST_CACHE_BUDGET so small that rows and logits are read in windows. The recipe's
  `data.window` is the same in all runs, so the weights have to be, too.

For each run: `seconds` of the command; `ratio`, these over the undisturbed ones; when the last store was sealed, and
what came after that; `back_seconds` from the kill to the first batch on the node that joined, none if it got none.
Teacher and students count their batches in files, one byte each: `batches_again` and `steps_again` are those beyond the
undisturbed run's, and `shards_again` is how many shards such batches fill at least. `same_stores` and `same_weights`:
manifests and weights are those of the undisturbed run, to the bit. The `ratio` of the document is the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.recipe import Recipe

SIDE, CLASSES, VIEWS, BATCH_ROWS = 8, 10, 4, 256
TRAIN, OTHERS, WINDOW, BUDGET = 65_536, 4_096, 4_096, 8_500_000
"""Rows of the train split, of each other one, of a window, and bytes of the cache in the run `windows`.

The nodes are on one machine and share its cache, so there has to be room in it for what both hold at a time.
"""
COUNTED = "AKD_LOST_NODE"
"""Where models count. Only the nodes have it: what the driver tries out does not count."""
KILLS = {"caching": "caching", "training": "training", "windows": "training"}
MODELS = """
import os, torch

class Counted(torch.nn.Module):
    '''Leaves a byte in a file of its process for each batch that the teacher serves, or a student takes a step on.'''

    def __init__(self, layers, name):
        super().__init__()
        self.layers, self.name, self.log = layers, name, None

    def forward(self, x):
        if "AKD_LOST_NODE" in os.environ and self.training == (self.name != "teacher"):
            if self.log is None:
                self.log = os.open(os.path.join(os.environ["AKD_LOST_NODE"], f"{self.name}.{os.getpid()}"),
                                   os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(self.log, b".")
        return self.layers(x)

def counted(input_shape, classes, name, width):
    nn, (channels, height, breadth) = torch.nn, input_shape
    if name == "teacher":
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        return Counted(nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * breadth, classes)), name)
    layers = [nn.Flatten(), nn.Linear(channels * height * breadth, width), nn.ReLU(), nn.Linear(width, classes)]
    return Counted(nn.Sequential(*layers), name)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a lost node costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--runs", nargs="+", choices=list(KILLS), default=list(KILLS), help="which (default: all)")
    parser.add_argument("--join-after", type=float, default=5.0, help="seconds until another node joins (default 5)")
    parser.add_argument("--width", type=int, default=64, help="channels of the teacher (default 64)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each student (default 8)")
    arguments = parser.parse_args()
    # Ray's sockets lie below its folder, and their paths have to be short.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="ray-") as short:
        # As a cluster should have one.
        os.environ |= {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        result = measure(Path(folder), arguments.width, arguments.epochs, arguments.join_after, arguments.runs)
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, width: int, epochs: int, join_after: float, wanted: list[str]) -> dict[str, Any]:
    """All of it."""
    recipe = prepared(folder, width, epochs)
    runs = {"undisturbed": a_run(folder, recipe, "undisturbed", join_after)}
    first = runs["undisturbed"]
    for name in wanted:
        found = runs[name] = a_run(folder, recipe, name, join_after)
        of_shard = -(-first["shard_rows"] // BATCH_ROWS)
        found["batches_again"] = found["batches"] - first["batches"]
        found["shards_again"] = math.ceil(found["batches_again"] / of_shard)
        found["steps_again"] = found["steps"] - first["steps"]
        found["ratio"] = round(found["seconds"] / first["seconds"], 3)
        found["same_stores"] = found["stores"] == first["stores"]
        found["same_weights"] = found["weights"] == first["weights"]
    return {
        "ratio": max(runs[name]["ratio"] for name in wanted),
        "runs": {
            name: {key: value for key, value in one.items() if key not in ("stores", "weights")}
            for name, one in runs.items()
        },
        "rows": TRAIN,
        "views": VIEWS,
        "join_after": join_after,
        "checkpoint_seconds": recipe.checkpoint_seconds,
        "cores": len(os.sched_getaffinity(0)),
    }


def prepared(folder: Path, width: int, epochs: int) -> Recipe:
    """Data, teacher and recipe, as files in a folder."""
    from sklearn.datasets import load_digits

    from akd_dist import recipe as recipes
    from akd_dist.base.trusted import Trusted
    from akd_dist.data.row_cache import prepare
    from akd_dist.models.build import build
    from akd_dist.models.card import ModelCard
    from akd_dist.models.folder import save_model

    (folder / "counted_models.py").write_text(MODELS)
    digits, generator = load_digits(), np.random.default_rng(0)
    for split, rows in (("train", TRAIN), ("validation", OTHERS), ("test", OTHERS)):
        chosen = generator.integers(0, len(digits.target), rows)
        pixels = np.pad(digits.images[chosen].astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
        down, right = generator.integers(0, 3, (2, rows))
        places = np.arange(SIDE)
        moved = pixels[
            np.arange(rows)[:, None, None], (down[:, None] + places)[:, :, None], right[:, None, None] + places
        ]
        images = pa.FixedSizeListArray.from_arrays(pa.array(moved.ravel()), SIDE * SIDE)
        pq.write_table(pa.table({"input": images, "label": digits.target[chosen]}), folder / f"{split}.parquet")
    recipe = recipe_of(folder, epochs)
    model = recipes.Custom(
        kind="custom", factory="counted_models:counted", arguments={"name": "teacher", "width": width}
    )
    named = Trusted(factories=(model.factory,), folder=str(folder), named_by="the recipe")
    card = ModelCard.of(recipes.trust(model, named), prepare(recipe.data, folder / "whole").train, None)
    save_model(folder / "teacher", build(card, seed=0), card)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe


def recipe_of(folder: Path, epochs: int) -> Recipe:
    """The recipe, on files in a folder."""
    students = [
        {
            "name": f"student-{number}",
            "model": {
                "kind": "custom",
                "factory": "counted_models:counted",
                "arguments": {"name": f"student-{number}", "width": 256},
            },
            "objective": {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": epochs - 1, "stage2_epochs": 1},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "batch": BATCH_ROWS,
            "seed": number,
        }
        for number in range(4)
    ]
    document = {
        "name": "lost",
        "folder": str(folder),
        "data": {
            **{
                split: {"kind": "parquet", "path": str(folder / f"{split}.parquet"), "shape": [1, SIDE, SIDE]}
                for split in ("train", "validation", "test")
            },
            "augmentation": {"kind": "shift", "pixels": 1},
            "views": VIEWS,
            "window": WINDOW,
        },
        "teacher": {"weights": str(folder / "teacher")},
        "cache": {"batch_rows": BATCH_ROWS},
        "students": students,
        "cohorts": 2,
        "checkpoint_seconds": 2,
    }
    return Recipe.model_validate(document).own()


class Nodes:
    """A cluster whose nodes count what models do on them."""

    def __init__(self, counts: Path) -> None:
        from akd_dist.jobs import cluster  # sets what Ray reads when it starts

        assert cluster.ray
        from ray.cluster_utils import Cluster

        self.counts = counts
        counts.mkdir(parents=True)
        os.environ[COUNTED] = str(counts)
        small = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=small)
        for _ in range(2):
            self.join()

    def join(self) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def at_work(self, names: str) -> Any:
        """A node on which a model of such a name has counted, and whose process lives; None where there is none."""
        for node in self.cluster.worker_nodes:
            if any(self._pid_of(path) in processes_of(node) for path in self.counts.glob(f"{names}.*")):
                return node
        return None

    def _pid_of(self, path: Path) -> int:
        return int(path.suffix[1:])

    def kill(self, node: Any) -> None:
        """As if its machine were gone: the raylet, and all that it has started."""
        for pid in processes_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.cluster.remove_node(node, allow_graceful=False)

    def counted(self, names: str) -> int:
        """Batches of models of such a name."""
        return sum(path.stat().st_size for path in self.counts.glob(f"{names}.*"))

    def shut_down(self) -> None:
        """End all of it."""
        self.cluster.shutdown()
        del os.environ[COUNTED]


def processes_of(node: Any) -> list[int]:
    """The raylet of a node, and all that it has started, by their ids."""
    raylet = int(node.all_processes["raylet"][0].process.pid)
    try:
        return [raylet, *(child.pid for child in psutil.Process(raylet).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [raylet]


def a_run(folder: Path, recipe: Recipe, name: str, join_after: float) -> dict[str, Any]:
    """The command on a cluster of its own, into fresh roots, and what came of it."""
    root = folder / name
    nodes = Nodes(root / "counts")
    try:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("AKD_")}
        if name == "windows":
            environment["AKD_DIST_CACHE_BUDGET"] = str(BUDGET)
        roots = [part for kind in ("store", "run", "cache") for part in (f"--{kind}-root", str(root / kind))]
        command = [sys.executable, "-m", "akd_dist.cli", "train-students", str(folder / "recipe.yaml"), *roots]
        started, at = time.perf_counter(), time.time()
        with open(root / "told", "w") as told:
            process = subprocess.Popen(
                [*command, "--address", nodes.cluster.address], stdout=told, stderr=told, env=environment
            )
            try:
                back = disturb(nodes, process, root, recipe, KILLS.get(name), join_after)
                if process.wait():
                    raise SystemExit(f"{name}: exit code {process.returncode}\n{(root / 'told').read_text()}")
            finally:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        manifests = sorted((root / "store").glob("[0-9a-f]*/manifest.json"))
        cached = max(path.stat().st_mtime for path in manifests) - at
        return {
            "seconds": round(seconds, 1),
            "until_cached": round(cached, 1),
            "after_that": round(seconds - cached, 1),
            "back_seconds": None if back is None else round(back, 1),
            "batches": nodes.counted("teacher"),
            "steps": nodes.counted("student-*"),
            "shard_rows": shard_rows(),
            "shards": len(list((root / "store").glob("*/arrays.zarr/logits/c/*/*/0"))),
            "stores": {path.parent.name: digest(path) for path in manifests},
            "weights": {
                path.parent.name: digest(path) for path in sorted(root.glob("run/*/students/*/model.safetensors"))
            },
        }
    finally:
        nodes.shut_down()
        shutil.rmtree(root / "cache", ignore_errors=True)


def disturb(
    nodes: Nodes, process: subprocess.Popen[bytes], root: Path, recipe: Recipe, when: str | None, join_after: float
) -> float | None:
    """Kill a node at a place of the run and have another one join; seconds until that one has computed something."""
    if when is None:
        return None
    names = "teacher" if when == "caching" else "student-*"
    reached = half_cached if when == "caching" else half_trained
    until(lambda: reached(root, recipe), process, root)
    node = until(lambda: nodes.at_work(names), process, root)
    killed = time.perf_counter()
    nodes.kill(node)
    print("a node is killed", file=sys.stderr, flush=True)
    time.sleep(join_after)
    joined = nodes.join()

    def works() -> bool:
        mine = processes_of(joined)
        return any(int(path.suffix[1:]) in mine for path in nodes.counts.iterdir())

    while process.poll() is None:
        if works():
            return time.perf_counter() - killed
        time.sleep(0.05)
    return None


def half_cached(root: Path, recipe: Recipe) -> bool:
    """Whether half of the shards of the train rows have their receipts."""
    return len(list((root / "store").glob("[0-9a-f]*/receipts/*.json"))) >= VIEWS * (TRAIN // shard_rows()) // 2


def half_trained(root: Path, recipe: Recipe) -> bool:
    """Whether every student has a checkpoint of half of its epochs, or more."""
    found = root.glob("run/*/students/*/checkpoints/*.ckpt")
    half = {
        path.parents[1].name
        for path in found
        if int(path.stem.split("-")[0]) >= recipe.students[0].objective.epochs // 2
    }
    return len(half) == len(recipe.students)


def shard_rows() -> int:
    """Rows of a shard of the train rows."""
    from akd_dist.storage.layout import StoreLayout

    return StoreLayout(VIEWS, TRAIN, CLASSES, "float32").shard_rows


def until(ready: Callable[[], Any], process: subprocess.Popen[bytes], root: Path) -> Any:
    """What `ready` gives once it gives something."""
    while not (found := ready()):
        if process.poll() is not None:
            raise SystemExit(f"the command ended before its node was killed\n{(root / 'told').read_text()}")
        time.sleep(0.05)
    return found


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [
        f"{result['rows']:,} train rows under {result['views']} views, two nodes of one CPU, another one "
        f"{result['join_after']:g} s after one was killed, checkpoints every {result['checkpoint_seconds']:g} s, "
        f"{result['cores']} cores",
        f"{'':14}{'seconds':>9}{'ratio':>8}{'cached':>9}{'trained':>9}{'back':>7}{'batches again':>15}{'shards':>8}"
        f"{'steps again':>13}{'same stores':>13}{'same weights':>14}",
    ]
    for name, one in result["runs"].items():
        line = f"  {name:<12}{one['seconds']:>9.1f}{one.get('ratio', 1.0):>8.2f}{one['until_cached']:>9.1f}"
        line += f"{one['after_that']:>9.1f}"
        if name in KILLS:
            back = "-" if one["back_seconds"] is None else f"{one['back_seconds']:.1f}"
            line += f"{back:>7}{one['batches_again']:>15,}{one['shards_again']:>8,}{one['steps_again']:>13,}"
            line += f"{one['same_stores']!s:>13}{one['same_weights']!s:>14}"
        lines.append(line)
    first = result["runs"]["undisturbed"]
    lines.append(f"  undisturbed: {first['batches']:,} batches of the teacher and {first['steps']:,} steps of students")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
