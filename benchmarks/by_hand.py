"""A fleet of small students against what one would write by hand, from the start of a process to the last test metric.

    python -m benchmarks.by_hand                 jobs/digits.yaml: 24 MLPs
    python -m benchmarks.by_hand --seeds 30      the same with 30 seeds instead of three: 240 MLPs
    ... --json                                   one JSON document: `processes_ratio`, `stacked_ratio`

By hand are the two ways of `by_hand_loops.py`: (a) plain loops in as many processes as there are cores, and (b) one
process that trains students of one size together by `torch.func.vmap`. Both read one file of arrays: the views, the
teacher's logits, validation and test rows. The fleet is `akd-dist train-students` on a store that was cached
beforehand, with everything that it does besides: planning, Ray, checkpoints, models, predictions, results, report.

Each is a process of its own, timed from its start to its end, by turns, `--repeats` times; ratios are of medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from akd_dist.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "jobs" / "digits.yaml"
LIMITS = {24: 2.0, 240: 0.5}
"""Of the fleet's time over that of plain loops, by the number of students."""


@click.command()
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of each kind of student."
)
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of each way, by turns.")
@click.option("--set", "overrides", multiple=True, help="A further override of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(seeds: int, repeats: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Time a fleet of small students against loops that are written by hand."""
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), seeds, repeats, list(overrides))
    click.echo(json.dumps(result) if as_json else table(result))


def measure(folder: Path, seeds: int, repeats: int, overrides: list[str]) -> dict[str, Any]:
    """All three ways, by turns."""
    given = [f"students.{block}.grid.seed=[{','.join(map(str, range(seeds)))}]" for block in (0, 1)] + overrides
    sets = [part for one in given for part in ("--set", one)]
    akd_dist(folder, "cache-teacher", str(RECIPE), *sets)
    arrays = folder / "arrays.npz"
    np.savez(arrays, allow_pickle=False, **arrays_of(folder, given))
    seconds: dict[str, list[float]] = {"fleet": [], "processes": [], "stacked": []}
    accuracy: dict[str, float] = {}
    for number in range(repeats):
        run = f"fleet-{number}"
        started = time.perf_counter()
        said = json.loads(akd_dist(folder, "train-students", str(RECIPE), *sets, "--set", f"name={run}", "--json"))
        seconds["fleet"].append(time.perf_counter() - started)
        accuracy["fleet"] = statistics.mean(student["test"]["accuracy"] for student in said["students"])
        for way in ("processes", "stacked"):
            started = time.perf_counter()
            told = json.loads(python("-m", "benchmarks.by_hand_loops", str(arrays), way, str(seeds)))
            seconds[way].append(time.perf_counter() - started)
            accuracy[way] = told["accuracy"]
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    students = len(said["students"])
    return {
        "processes_ratio": round(medians["fleet"] / medians["processes"], 3),
        "stacked_ratio": round(medians["fleet"] / medians["stacked"], 3),
        "limit": LIMITS.get(students),
        "students": students,
        "seconds": {way: round(median, 2) for way, median in medians.items()},
        "each": {way: [round(one, 2) for one in each] for way, each in seconds.items()},
        "accuracy": {way: round(mean, 4) for way, mean in accuracy.items()},
        "cohorts": said["cohorts"],
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[1],
    }


def arrays_of(folder: Path, overrides: list[str]) -> dict[str, np.ndarray]:
    """What the students read, as arrays: the views as the teacher saw them, scaled as the models scale them."""
    import akd_dist as library

    recipe = load_recipe(RECIPE, overrides)
    roots: dict[str, Any] = {"store_root": str(folder / "stores"), "cache_root": str(folder / "cache")}
    normalize = recipe.data.normalize
    assert normalize is not None

    def whole(split: Any, epoch: int = 0) -> dict[str, np.ndarray]:
        dataset = library.distillation_dataset(recipe, split=split, epoch=epoch, **roots)
        return {name: np.asarray(tensor) for name, tensor in dataset[range(len(dataset))].items()}

    def scaled(pixels: np.ndarray) -> np.ndarray:
        flat = pixels.reshape(len(pixels), -1).astype(np.float32)
        return (flat / 255 - normalize.mean[0]) / normalize.std[0]

    views = [whole("train", view) for view in range(recipe.data.views)]
    arrays = {
        "views": np.stack([scaled(view["inputs"]) for view in views]),
        "logits": np.stack([view["teacher_logits"] for view in views]).astype(np.float32),
        "labels": views[0]["labels"],
    }
    for split in ("validation", "test"):
        rows = whole(split)
        arrays |= {split: scaled(rows["inputs"]), f"{split}_labels": rows["labels"]}
    return arrays


def akd_dist(folder: Path, *arguments: str) -> str:
    """A command in that folder; what it prints."""
    return python("-m", "akd_dist.cli", *arguments, cwd=folder)


def python(*arguments: str, cwd: Path | None = None) -> str:
    """What a Python process prints.

    Raises:
        ClickException: it fails; says its last words.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd or ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [f"{result['students']} MLPs on digits, {result['cores']} cores; medians of {result['repeats']}"]
    ways = {
        "fleet": "akd-dist train-students",
        "processes": "(a) loops, a process a core",
        "stacked": "(b) one stacked loop",
    }
    for way, title in ways.items():
        lines.append(
            f"  {title:<28} {result['seconds'][way]:>8.1f} s  mean test accuracy {result['accuracy'][way]:.4f}"
        )
    limit = "" if result["limit"] is None else f" (limit {result['limit']})"
    lines.append(f"  fleet over (a) {result['processes_ratio']}{limit}, over (b) {result['stacked_ratio']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
