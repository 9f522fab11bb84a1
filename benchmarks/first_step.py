"""What a small fleet takes besides its steps: until the first of them, and from the last one to the table.

    python -m benchmarks.first_step             jobs/digits.yaml, whose store is cached beforehand
    python -m benchmarks.first_step --json      one JSON document whose main figure is `ratio`

Measured by turns, each in a process of its own, from its start:

- bare Ray: `ray.init`, then Ray Train's plain data-parallel trainer with one worker and an empty function, until that
  function is entered. Ray's own settings are those of the fleet.
- the fleet: `akd-dist train-students`, with no Ray up, until the first student's first epoch is noted (19 steps, some
  tenths of a second after the first), then from the last student's result until the table is printed, and until the
  process has left.

`ratio` is the fleet's first over that of bare Ray, medians of `--repeats`; it should stay under 1.5,
and `table_seconds` under 2.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.by_hand import RECIPE, ROOT, akd_dist

LIMIT, TABLE_LIMIT = 1.5, 2.0
_POLL = 0.02
BARE = """
import sys
from akd_dist.jobs.ray_internals import ray
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train import RunConfig, ScalingConfig

def enter(config):
    open(config["mark"], "w").close()

ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
folder = sys.argv[1]
run = RunConfig(name="bare", storage_path=folder + "/ray")
DataParallelTrainer(
    enter, train_loop_config={"mark": folder + "/entered"}, scaling_config=ScalingConfig(num_workers=1), run_config=run
).fit()
"""


@click.command()
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of each, by turns.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(repeats: int, as_json: bool) -> None:
    """Time the first step of a small fleet against bare Ray, and its end."""
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), repeats)
    click.echo(json.dumps(result) if as_json else table(result))


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Both, by turns."""
    akd_dist(folder, "cache-teacher", str(RECIPE))
    found: dict[str, list[float]] = {"bare": [], "first": [], "table": [], "left": []}
    for number in range(repeats):
        found["bare"].append(bare(folder / f"bare-{number}"))
        for name, seconds in fleet(folder, f"fleet-{number}").items():
            found[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in found.items()}
    return {
        "ratio": round(medians["first"] / medians["bare"], 3),
        "limit": LIMIT,
        "bare_seconds": round(medians["bare"], 2),
        "first_seconds": round(medians["first"], 2),
        "table_seconds": round(medians["table"], 2),
        "left_seconds": round(medians["left"], 2),
        "each": {name: [round(one, 2) for one in each] for name, each in found.items()},
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
    }


def bare(folder: Path) -> float:
    """Seconds until Ray Train has entered an empty function."""
    folder.mkdir()
    process, started = started_process("-c", BARE, str(folder), cwd=folder), time.time()
    entered = awaited(process, lambda: (folder / "entered").exists())
    process.communicate()
    return entered - started


def fleet(folder: Path, run: str) -> dict[str, float]:
    """Seconds until the first epoch is noted; from the last result to the table; and until the process has left."""
    arguments = ("-m", "akd_dist.cli", "train-students", str(RECIPE), "--set", f"name={run}")
    process, started = started_process(*arguments, cwd=folder), time.time()
    students, printed = folder / "runs" / run / "students", list[float]()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("report"):
                printed.append(time.time())

    listening = threading.Thread(target=listen)
    listening.start()
    first = awaited(process, lambda: any(students.glob("*/metrics.jsonl")))
    process.wait()
    listening.join()
    left = time.time()
    last = max(path.stat().st_mtime for path in students.glob("*/result.json"))
    return {"first": first - started, "table": printed[0] - last, "left": left - last}


def started_process(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """A Python process that finds this checkout."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def awaited(process: subprocess.Popen[str], there: Any) -> float:
    """When something is there first.

    Raises:
        ClickException: the process ends before.
    """
    while not there():
        if process.poll() not in (None, 0):
            raise click.ClickException(f"a process ended with {process.returncode}")
        time.sleep(_POLL)
    return time.time()


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    return (
        f"24 MLPs on digits, {result['cores']} cores, medians of {result['repeats']}\n"
        f"  bare Ray until an empty function      {result['bare_seconds']:>6.1f} s\n"
        f"  the fleet until its first epoch       {result['first_seconds']:>6.1f} s, "
        f"{result['ratio']} times as long (limit {result['limit']})\n"
        f"  from the last result to the table     {result['table_seconds']:>6.1f} s (limit {TABLE_LIMIT:g})\n"
        f"  and until the process has left        {result['left_seconds']:>6.1f} s"
    )


if __name__ == "__main__":
    main()
