"""Training from rows and a store of ten times what the cache may hold, against all of it in the cache.

    python -m benchmarks.larger_than_node             a table
    python -m benchmarks.larger_than_node --json      one JSON document whose main figure is `ratio`

Rows of 256 bytes under two views, with 128 float16 logits each: by default 524,288 of them, 138 MB, and 268 MB in the
store. Its shards have 1 MiB instead of 16, so that a view has 128 of them as one of 2 GB has. The budget is a tenth of
both together: rows are kept as blocks under the store root then, and a few windows of rows and logits are held at a
time. The recipe's `data.window` is what akd-dist chooses for that budget, on both sides, so that their weights have to
be the same.

`ratio` is rows per second of training, a multilayer perceptron on one thread, within the budget against without any;
`cpu_ratio` the same per second of CPU time, all threads together. A student that does less with each row (`--hidden`)
leaves less time to fetch and check the next ones in.
Each side is a process of its own, from its first batch to its last; they take turns, and the figures are medians.
Within the budget rows and logits are read from local disk, checked, written and hashed meanwhile; without, they were
prepared and decoded beforehand. Peaks are of everything under the cache root, looked at 50 times a second during a run
that is not timed, and of memory that is resident. At last a run within the budget is killed in the middle of an epoch,
and goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from akd_dist.recipe import Recipe
from akd_dist.storage import layout

SHARD_BYTES, SHARD_ROWS, CLASSES, SIDE, VIEWS, EPOCHS, BATCH = 2**20, 4096, 128, 16, 2, 2, 256
KILLED_AT = 1.4
"""Epochs after which a run is killed."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ten times the cache's budget, against all in the cache.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--shards", type=int, default=128, help="shards of a view (default 128)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units of the student (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Shards of 1 MiB, however many a view has.
    vars(layout).update(_SHARD_TARGET_BYTES=SHARD_BYTES, _SHARDS_OF_A_SMALL_VIEW=1 << 30)
    if arguments.train:
        print(json.dumps(train(Path(arguments.train[0]), arguments.train[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hidden.json").write_text(json.dumps(arguments.hidden))
        result = measure(Path(folder), arguments.shards, arguments.repeats)
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, shards: int, repeats: int) -> dict[str, Any]:
    """All of it."""
    budget = prepared(folder, shards)
    sides: dict[str, list[dict[str, Any]]] = {"whole": [], "windows": []}
    for number in range(repeats + 1):
        sides["whole"].append(a_run(folder, f"whole-{number}", "whole", None))
        shutil.rmtree(folder / "windows", ignore_errors=True)
        # The first of each side is not timed: it decodes, warms the page cache, and is looked at.
        sides["windows"].append(a_run(folder, f"windows-{number}", "windows", budget, look=not number))
    whole, windows = (sides[name][1:] for name in ("whole", "windows"))
    shutil.rmtree(folder / "windows")
    steps = -(-shards * SHARD_ROWS // BATCH)
    killed = a_run(folder, "killed", "windows", budget, kill=int(KILLED_AT * steps))
    resumed = a_run(folder, "killed", "windows", budget)
    rates = {
        name: statistics.median(one["rate"] for one in runs) for name, runs in (("whole", whole), ("windows", windows))
    }
    return {
        "ratio": round(rates["windows"] / rates["whole"], 3),
        "cpu_ratio": round(
            statistics.median(one["cpu"] for one in whole) / statistics.median(one["cpu"] for one in windows), 3
        ),
        "rows_per_second": {name: round(rate) for name, rate in rates.items()},
        "bytes": size_of_all(shards),
        "budget": budget,
        "window": json.loads((folder / "window.json").read_text()),
        "peak_cache": sides["windows"][0]["peak_cache"],
        "peak_resident": {name: max(one["resident"] for one in sides[name][1:]) for name in sides},
        "same_weights": len({one["weights"] for one in [*whole, *windows]}) == 1,
        "killed": killed is None or killed == {},
        "steps_after_kill": resumed["steps"],
        "steps": steps * EPOCHS,
        "same_weights_after_kill": resumed["weights"] == whole[0]["weights"],
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
    }


def recipe_of(folder: Path, window: int | None) -> Recipe:
    """The recipe, on files in a folder."""
    document = {
        "name": "larger",
        "folder": str(folder),
        "data": {
            **{
                split: {"kind": "parquet", "path": str(folder / f"{split}.parquet"), "shape": [1, SIDE, SIDE]}
                for split in ("train", "validation", "test")
            },
            "augmentation": {"kind": "shift", "pixels": 1},
            "views": VIEWS,
            "window": window,
        },
        "teacher": {
            "model": {"kind": "mlp", "hidden": 16},
            "train": {"epochs": 1, "optimizer": {"kind": "sgd", "lr": 0.1}},
        },
        "cache": {"encoding": "float16"},
        "students": [
            {
                "name": "student",
                "model": {"kind": "mlp", "hidden": json.loads((folder / "hidden.json").read_text())},
                "objective": {"kind": "kd", "epochs": EPOCHS},
                "optimizer": {"kind": "sgd", "lr": 0.01},
                "batch": BATCH,
            }
        ],
        "checkpoint_seconds": 1,
    }
    return Recipe.model_validate(document).own()


def prepared(folder: Path, shards: int) -> int:
    """Write rows and store; the budget."""
    from rich.console import Console

    from akd_dist.data.row_cache import prepare
    from akd_dist.jobs.cache_teacher import cache_in_process
    from akd_dist.jobs.packing import Node
    from akd_dist.jobs.planning.windows import choose, demands_of
    from akd_dist.jobs.prepare_rows import rows_of_machine
    from akd_dist.jobs.train_teacher import Workspace
    from akd_dist.models.build import build
    from akd_dist.models.card import ModelCard
    from akd_dist.models.folder import save_model

    generator = np.random.default_rng(0)
    for split, rows in (("train", shards * SHARD_ROWS), ("validation", SHARD_ROWS), ("test", SHARD_ROWS)):
        pixels = pa.array(generator.integers(0, 256, rows * SIDE * SIDE, dtype=np.uint8))
        images = pa.FixedSizeListArray.from_arrays(pixels, SIDE * SIDE)
        labels = np.arange(rows) % CLASSES
        pq.write_table(pa.table({"input": images, "label": labels}), folder / f"{split}.parquet")
    recipe = recipe_of(folder, None)
    train_rows = prepare(recipe.data, folder / "whole").train
    assert recipe.teacher.model is not None
    card = ModelCard.of(recipe.teacher.model, train_rows, None)
    save_model(folder / "teacher", build(card, seed=0), card)
    roots = {"store_root": str(folder / "stores"), "cache_root": str(folder / "whole")}
    document = cache_in_process(recipe, str(folder / "teacher"), **roots)
    stores = {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}
    (folder / "stores.json").write_text(json.dumps(stores))
    budget = size_of_all(shards) // 10
    os.environ["AKD_DIST_CACHE_BUDGET"] = str(budget)
    console = Console(stderr=True)
    # Kept as blocks now, since they do not fit, and found by every run within the budget.
    splits = rows_of_machine(recipe.data, Workspace(roots["store_root"], str(folder / "windows"), console=console))
    del os.environ["AKD_DIST_CACHE_BUDGET"]
    window = choose(demands_of(recipe, splits, recipe.students, [Node("here", 1)]), budget).window
    assert window is not None, "ten times the budget does not fit it"
    (folder / "window.json").write_text(json.dumps(window))
    return budget


def size_of_all(shards: int) -> int:
    """Bytes of rows and logits."""
    return shards * SHARD_ROWS * (SIDE * SIDE + 8 + CLASSES * 2 * VIEWS)


def a_run(
    folder: Path, name: str, cache: str, budget: int | None, *, kill: int | None = None, look: bool = False
) -> dict[str, Any]:
    """Train in a process of its own; what it says, or nothing of one that is killed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AKD_")}
    environment["AKD_DIST_CACHE"] = str(folder / cache)
    if budget is not None:
        environment["AKD_DIST_CACHE_BUDGET"] = str(budget)
    if look:
        environment["LOOK"] = "1"
    if kill is not None:
        environment["AKD_FAILPOINT"] = f"cohort.after_batch:{kill}"
    command = [sys.executable, "-m", "benchmarks.larger_than_node", "--train", str(folder), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if kill is not None and done.returncode == -9:
        return {}
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(folder: Path, name: str) -> dict[str, Any]:
    """Train, or go on; rates and peaks."""
    from akd_dist.distill import lockstep
    from akd_dist.jobs.train_students import train_in_process

    cache = Path(os.environ["AKD_DIST_CACHE"])
    recipe = recipe_of(folder, json.loads((folder / "window.json").read_text()))
    times, sizes, over, cpu = list[float](), [0], threading.Event(), list[float]()
    reached = vars(lockstep)["failpoint"]

    def note(site: str) -> None:
        if site == "cohort.after_batch":
            times.append(time.perf_counter())
            cpu.append(time.process_time())
        reached(site)

    def look() -> None:
        while not over.wait(0.02):
            files = [Path(place, name) for place, _, names in os.walk(cache) for name in names]
            sizes.append(sum(map(size_of, files)))

    vars(lockstep)["failpoint"] = note
    looking = threading.Thread(target=look, daemon=True)
    if "LOOK" in os.environ:
        looking.start()

    stores = json.loads((folder / "stores.json").read_text())
    train_in_process(recipe, stores, run=folder / "runs" / name, cache_root=str(cache))
    over.set()
    weights = folder / "runs" / name / "students" / "student" / "model.safetensors"
    resident = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]
    return {
        "rate": (len(times) - 1) * BATCH / (times[-1] - times[0]),
        "cpu": cpu[-1] - cpu[0],
        "steps": len(times),
        "peak_cache": max(sizes),
        "resident": 1024 * int(resident),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def size_of(path: Path) -> int:
    """Bytes of a file; of none where it is gone by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    rates, resident = result["rows_per_second"], result["peak_resident"]
    return (
        f"rows and logits of {result['bytes'] / 1e6:,.0f} MB, a budget of {result['budget'] / 1e6:,.1f} MB, windows of "
        f"{result['window']:,} rows, {result['repeats']} runs of each side, {result['cores']} cores\n"
        f"{'':22}{'rows/s':>12}{'resident':>12}{'cache':>12}\n"
        f"  all in the cache    {rates['whole']:>12,}{resident['whole'] / 1e6:>9,.0f} MB\n"
        f"  within the budget   {rates['windows']:>12,}{resident['windows'] / 1e6:>9,.0f} MB"
        f"{result['peak_cache'] / 1e6:>9,.1f} MB\n"
        f"  ratio {result['ratio']}, per second of CPU time {result['cpu_ratio']}; "
        f"the same weights: {result['same_weights']}\n"
        f"  killed after {KILLED_AT:g} epochs, {result['steps_after_kill']:,} of {result['steps']:,} steps were taken "
        f"afterwards; the same weights: {result['same_weights_after_kill']}"
    )


if __name__ == "__main__":
    main()
