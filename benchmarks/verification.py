"""What it costs that nothing is believed: training and a warm start with and without the hashing of what is mapped.

    python -m benchmarks.verification             tables
    python -m benchmarks.verification --json      one JSON document whose main figure is `ratio`

60,000 rows of 784 bytes in IDX files, a teacher's 500 logits in float16 under four views: some 280 MB that a training
process maps. With and without take turns, round by round, in processes of their own; the figures are medians of the
rounds' ratios, with / without. `ratio` is that of the CPU time of training, all threads counted: what is hashed beside
the training costs no wall time as long as a core is idle, and CPU time depends less on what else the machine does. A
warm start is a process from its first import to its first batch, with rows prepared and logits decoded, and until its
sources have been read. `share` is the CPU time of the hashing alone, as its threads count it, over that of training
without it: the same thing measured in another way, and hardly noisy. `Without` takes the very code away in the process;
there is no such option. Needs 700 MB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, SIDE, CLASSES, VIEWS, EPOCHS = 60_000, 28, 500, 4, 4
SIDES = ("with", "without")
MODELS = {"cnn-8": {"kind": "cnn", "width": 8}, "mlp-128": {"kind": "mlp", "hidden": 128}}
"""A student that computes little for each row, and one that computes hardly anything."""
OPTIMIZER = {"kind": "adamw", "lr": 1e-3}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What verification costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each pair (default 5)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=["start", *MODELS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(one(arguments.folder, arguments.what, arguments.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.rounds)
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """All pairs, in turn; medians over the rounds."""
    set_up(folder)
    seen: dict[str, dict[str, list[dict[str, float]]]] = {
        what: {side: [] for side in SIDES} for what in ("start", *MODELS)
    }
    for number in range(rounds):
        for what, sides in seen.items():
            for side in SIDES if number % 2 else reversed(SIDES):
                sides[side].append(in_a_process(folder, what, side))
    found: dict[str, Any] = {}
    for what, sides in seen.items():
        hashing = _median(sides["with"], "hashing")
        found[what] = {"hashing": hashing} | {
            side: {key: _median(sides[side], key) for key in ("cpu", "wall")} for side in SIDES
        }
        for key in ("cpu", "wall"):
            pairs = zip(*(sides[side] for side in SIDES), strict=True)
            found[what]["share"] = round(hashing / found[what]["without"]["cpu"], 4)
            found[what][f"{key}_ratio"] = round(statistics.median(one[key] / other[key] for one, other in pairs), 4)
    return {
        "ratio": found["cnn-8"]["cpu_ratio"],
        "share": found["cnn-8"]["share"],
        "start_ratio": found["start"]["cpu_ratio"],
        "measured": found,
        "bytes": seen["start"]["with"][0]["bytes"],
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
    }


def _median(values: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(value[key] for value in values), 3)


def set_up(folder: Path) -> None:
    """Sources, the recipe, its store, prepared rows and decoded logits; then wait until no file is new any more."""
    from akd_dist.data.row_cache import prepare
    from akd_dist.jobs.cache_teacher import cache_in_process
    from akd_dist.models.build import build
    from akd_dist.models.card import ModelCard
    from akd_dist.models.folder import save_model
    from akd_dist.recipe import Mlp

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (ROWS, SIDE, SIDE), dtype=np.uint8)
    (folder / "images").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes())
    labels = generator.integers(0, CLASSES, ROWS).astype(">i4")
    (folder / "labels").write_bytes(struct.pack(">HBBI", 0, 0x0C, 1, ROWS) + labels.tobytes())
    recipe = recipe_of(folder)
    splits = prepare(recipe.data, folder / "cache")
    card = ModelCard.of(Mlp(kind="mlp", hidden=8), splits.train, None)
    save_model(folder / "teacher", build(card, seed=0), card)
    cached = cache_in_process(
        recipe, str(folder / "teacher"), store_root=str(folder / "stores"), cache_root=str(folder / "cache")
    )
    stores = {"train": cached["store"]} | {split: part["store"] for split, part in cached["splits"].items()}
    (folder / "stores.json").write_text(json.dumps(stores))
    in_a_process(folder, "start", "with")  # decodes
    time.sleep(3)  # a file that is a moment old is read again, since its times say nothing yet


def recipe_of(folder: Path, model: str = "cnn-8") -> Any:
    """A student that learns by Annealing-KD."""
    from akd_dist.recipe import Recipe

    objective = {"kind": "annealing_kd", "tau_max": EPOCHS - 1, "stage1_epochs": EPOCHS - 1, "stage2_epochs": 1}
    return Recipe.model_validate(
        {
            "name": "verification",
            "data": {
                "train": {
                    "kind": "idx",
                    "images": str(folder / "images"),
                    "labels": str(folder / "labels"),
                    "classes": CLASSES,
                },
                "validation": 0.02,
                "test": 0.02,
                "views": VIEWS,
                "augmentation": {"kind": "shift", "pixels": 1},
            },
            "teacher": {"weights": str(folder / "teacher")},
            "cache": {"encoding": "float16"},
            "students": [
                {
                    "name": "student",
                    "model": MODELS[model],
                    "objective": objective,
                    "optimizer": OPTIMIZER,
                    "batch": 128,
                }
            ],
        }
    )


def in_a_process(folder: Path, what: str, side: str) -> dict[str, float]:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.verification"]
    command += ["--folder", str(folder), "--what", what, "--side", side]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return measured


def one(folder: Path, what: str, side: str) -> dict[str, float]:
    """A warm start, or a training after one: seconds of CPU and of wall time in this process."""
    spent = counting() if side == "with" else without()
    measured = start(folder) if what == "start" else train(folder, what)
    return measured | {"hashing": sum(spent)}


def counting() -> list[float]:
    """CPU seconds of each hashing from here on, in whatever thread."""
    from akd_dist.data import origins
    from akd_dist.storage import content

    spent: list[float] = []

    def counted(act: Callable[[Any], str]) -> Callable[[Any], str]:
        def timed(given: Any) -> str:
            began = time.thread_time()
            try:
                return act(given)
            finally:
                spent.append(time.thread_time() - began)

        return timed

    content.digest, origins.sha256_of = counted(content.digest), counted(origins.sha256_of)  # type: ignore[assignment]
    return spent


def start(folder: Path) -> dict[str, float]:
    """From this process's begin to its first batch, and until its sources have been read."""
    from akd_dist.data.row_cache import prepare
    from akd_dist.jobs.planning.caching import check_students

    recipe = recipe_of(folder)
    splits = prepare(recipe.data, folder / "cache")
    splits.sources.begin()
    check_students(recipe, splits)
    stream, contents = opened(folder, recipe, splits)
    next(stream.batches(0))
    splits.sources.finish()
    return {
        "cpu": time.process_time(),
        "wall": time.time() - born(),
        "bytes": sum(file.stat().st_size for content in contents for file in content.files),
    }


def born() -> float:
    """When this process began, in seconds since 1970."""
    import psutil

    return float(psutil.Process().create_time())


def opened(folder: Path, recipe: Any, splits: Any) -> Any:
    """What a cohort reads."""
    from akd_dist.distill.cohort import open_stream
    from akd_dist.jobs.planning.plan import fleet_job
    from akd_dist.storage.decoded import hold_view
    from akd_dist.storage.reader import open_store

    stores = json.loads((folder / "stores.json").read_text())
    job = fleet_job(recipe, splits, stores, folder / "run", str(folder / "cache"))
    stream, _ = open_stream(job, splits)
    return stream, [*splits.contents(), hold_view(open_store(stores["train"]), folder / "cache").content]


def train(folder: Path, model: str) -> dict[str, float]:
    """Train the student from its start to its delivery, torch and all else warm."""
    from akd_dist.data.row_cache import prepare
    from akd_dist.distill.cohort import train_cohort
    from akd_dist.jobs.planning.plan import fleet_job

    recipe = recipe_of(folder, model)
    splits = prepare(recipe.data, folder / "cache")
    stores = json.loads((folder / "stores.json").read_text())
    with tempfile.TemporaryDirectory() as run:
        job = fleet_job(recipe, splits, stores, Path(run), str(folder / "cache"))
        Path(job.control).mkdir()
        cpu, wall = time.process_time(), time.perf_counter()
        (result,) = train_cohort(job)["students"]
        assert result["state"] == "done"
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def without() -> list[float]:
    """Believe everything, as before: what is mapped is not hashed, and what sources hold is not looked at."""
    from akd_dist.data import row_cache
    from akd_dist.distill import cohort
    from akd_dist.storage import content

    class Believing(content.Guard):
        def __init__(self, contents: object, vouched: object = None) -> None:
            super().__init__([])

        def add(self, content: object) -> None:
            pass

    vars(cohort)["Guard"] = Believing
    vars(row_cache)["_believed"] = lambda splits, *_: splits
    return []


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [
        f"{result['bytes'] / 1e6:,.0f} MB are mapped; medians of {result['rounds']} rounds, {result['cores']} cores",
        f"{'':28}{'CPU with':>10}{'without':>10}{'ratio':>9}{'hashing':>10}{'share':>9}"
        f"{'wall with':>12}{'without':>10}{'ratio':>9}",
    ]
    for what, found in result["measured"].items():
        name = "a warm start" if what == "start" else f"training {what}, {EPOCHS} epochs"
        cells = [f"{name:28}"]
        for key, width in (("cpu", 10), ("wall", 12)):
            cells.append(f"{found['with'][key]:>{width - 2}.2f} s{found['without'][key]:>8.2f} s")
            cells.append(f"{found[f'{key}_ratio']:>9.3f}")
            if key == "cpu":
                cells.append(f"{found['hashing']:>8.2f} s{found['share']:>9.2%}")
        lines.append("".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
