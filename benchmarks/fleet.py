"""Sixteen small students: as one fleet, as sixteen Ray Train runs, and each in a loop with the teacher in it.

    python -m benchmarks.fleet                         wall times of the three, on scikit-learn's digits
    python -m benchmarks.fleet --data fashion_mnist    the same on Fashion-MNIST, where its Debian package is installed
    python -m benchmarks.fleet --steps-zero            what a fleet costs that takes no step: of sixteen, and of one
    ... --json                                         one JSON document whose main figure is `ratio`

The students are MLPs of four sizes x two tau_max x two seeds, trained by Annealing-KD. The teacher is trained and
cached beforehand, and Ray is started once, before any clock runs; one small fleet goes first, uncounted, since the
first one pays for imports. What is timed, each from nothing in its run folder to its last test metric:

- fleet: `akd_dist.train_students`, planned as usual. Includes planning, checkpoints, results and report.
- separate: the same with `cohorts: 16`: sixteen Ray Train runs of one student, as many at a time as there are CPUs.
- loop: for each student a plain loop that calls the teacher on every batch (`online` of cached_equals_online.py: same
  views, order, losses and steps; no checkpoints, no report), as many processes at a time as there are CPUs, one thread
  each; the start of these processes counts.

`ratio` is separate / fleet and `loop_ratio` loop / fleet, wall times; the time that caching took is told beside them,
since the loop does without. `estimate_ratio` is what a dry run of the fleet foresaw over what it took. With
--steps-zero, `ratio` (also `overhead_ratio`) is the wall time of a fleet of sixteen whose students have no epochs, over
that of a fleet of one such: each from the start of a process of its own to its end, without Ray, as a command trains
fleets of this size; medians of --repeats. `warm_ratio` is the same in a process that has imported everything before.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import akd_dist
from akd_dist.recipe import AnnealingKD, Recipe, StudentSpec, load_recipe

JOBS = Path(__file__).parent.parent / "jobs"
# Recipe of data and teacher, views, and epochs of both stages: a view for each epoch of stage I.
DATA: dict[str, tuple[str, int, int]] = {
    "digits": ("digits.yaml", 16, 4),
    "fashion_mnist": ("fashion_mnist.yaml", 4, 1),
}
SIZES, TAUS, SEEDS = (8, 16, 32, 64), (2, 4), (0, 1)
LIMIT = 1.05


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), default="digits", show_default=True)
@click.option(
    "--epochs",
    type=click.IntRange(min=max(TAUS)),
    help="Epochs of stage I, and views.  [default: 16, or 4 on fashion_mnist]",
)
@click.option("--steps-zero", is_flag=True, help="Measure what fleets cost that take no step.")
@click.option("--overhead-epochs", type=int, default=0, show_default=True, help="With --steps-zero: 0, or 4 and more.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Fleets of each size with --steps-zero.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(data: str, epochs: int | None, steps_zero: bool, overhead_epochs: int, repeats: int, as_json: bool) -> None:
    """Time sixteen small students as one fleet against other ways to train them."""
    # Ray tells of its workers on stdout, where the document belongs.
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(Path(name), data, epochs, ray=not steps_zero)
        result = overhead(bench, overhead_epochs, repeats) if steps_zero else wall_times(bench)
    click.echo(json.dumps(result) if as_json else (overhead_table if steps_zero else wall_table)(result))


class Bench:
    """The recipe, its store, cached, and a Ray that is up and warm where one is wanted."""

    def __init__(self, folder: Path, data: str, epochs: int | None, *, ray: bool = True) -> None:
        from akd_dist.jobs import cluster

        self.folder, self.data = folder, data
        file, stage1, stage2 = DATA[data]
        self.recipe = recipe_of(JOBS / file, epochs or stage1, stage2)
        self.roots: dict[str, Any] = {"store_root": str(folder / "stores"), "cache_root": str(folder / "cache")}
        self.options: dict[str, Any] = {**self.roots, "run_root": str(folder / "runs")}
        if ray:
            cluster.connect()
        self.cpus = int(sum(node.cpus for node in (cluster.nodes() if ray else [cluster.this_machine()])))
        started = time.perf_counter()
        document = akd_dist.cache_teacher(self.recipe, **self.roots, console=Console(quiet=True))
        self.teacher_seconds = time.perf_counter() - started
        self.cache_seconds = seconds_of_passes(document)
        self.train("warm-up", with_epochs(self.recipe.students[:1], max(TAUS)))

    def train(self, name: str, students: list[StudentSpec], **changes: Any) -> tuple[float, dict[str, Any]]:
        """Seconds of a fleet, and its fleet.json."""
        recipe = self.recipe.model_copy(update={"name": name, "students": students, **changes})
        started = time.perf_counter()
        fleet = akd_dist.train_students(recipe, **self.options, console=Console(quiet=True))
        seconds = time.perf_counter() - started
        lost = [student["name"] for student in fleet["students"] if student["state"] != "done"]
        if lost:
            raise click.ClickException(f"{name}: {', '.join(lost)} did not succeed, so nothing can be compared")
        return seconds, fleet


def recipe_of(file: Path, stage1: int, stage2: int) -> Recipe:
    """Data and teacher of a recipe that ships, with sixteen students."""
    read = load_recipe(file, [f"data.views={stage1}"])
    students = [
        StudentSpec.model_validate(
            {
                "model": {"kind": "mlp", "hidden": size},
                "objective": {"kind": "annealing_kd", "tau_max": tau, "stage1_epochs": stage1, "stage2_epochs": stage2},
                "optimizer": {"kind": "adamw", "lr": 5e-3, "schedule": {"kind": "linear"}},
                "seed": seed,
            }
        )
        for size in SIZES
        for tau in TAUS
        for seed in SEEDS
    ]
    teacher = read.teacher.model_copy(update={"assistant": None})
    return read.model_copy(update={"students": students, "teacher": teacher})


def with_epochs(students: list[StudentSpec], epochs: int) -> list[StudentSpec]:
    """Students of so many epochs, all in stage I; 0 for such that take no step, which no recipe file may ask for."""
    changed = []
    for spec in students:
        assert isinstance(spec.objective, AnnealingKD)
        stages = {"stage1_epochs": epochs, "stage2_epochs": min(epochs, 1)}
        changed.append(spec.model_copy(update={"objective": spec.objective.model_copy(update=stages)}))
    return changed


def seconds_of_passes(document: dict[str, Any]) -> float:
    """Seconds of teacher passes over all splits, from the receipts of their shards."""
    from akd_dist.storage.catalog import receipts_of

    uris = [document["store"], *(part["store"] for part in document["splits"].values())]
    return sum(receipt.seconds for uri in uris for receipt in receipts_of(*uri.rsplit("/", 1)))


# ---- wall times


def wall_times(bench: Bench) -> dict[str, Any]:
    """One fleet, sixteen runs, sixteen loops."""
    students = list(bench.recipe.students)
    estimate = estimated_seconds(bench)
    fleet, together = bench.train("fleet", students)
    separate, apart = bench.train("separate", students, cohorts=len(students))
    loop, accuracies = in_loops(bench)
    return {
        "ratio": round(separate / fleet, 3),
        "loop_ratio": round(loop / fleet, 3),
        "fleet_seconds": round(fleet, 2),
        "separate_seconds": round(separate, 2),
        "loop_seconds": round(loop, 2),
        "cache_seconds": round(bench.cache_seconds, 2),
        "teacher_and_cache_seconds": round(bench.teacher_seconds, 2),
        "estimated_seconds": round(estimate, 2),
        "estimate_ratio": round(estimate / fleet, 3),
        "students": len(students),
        "cohorts": {"fleet": together["cohorts"], "separate": apart["cohorts"]},
        "steps": len(students) * steps_of(bench),
        "accuracy": {
            "fleet": statistics.mean(student["test"]["accuracy"] for student in together["students"]),
            "separate": statistics.mean(student["test"]["accuracy"] for student in apart["students"]),
            "loop": statistics.mean(accuracies),
        },
        "data": bench.data,
        "epochs": students[0].objective.epochs,
        "cpus": bench.cpus,
    }


def estimated_seconds(bench: Bench) -> float:
    """What `train-students --dry-run` says of the fleet before it is trained."""
    recipe = bench.recipe.model_copy(update={"name": "fleet"})
    plan = akd_dist.train_students(recipe, **bench.options, dry_run=True, console=Console(quiet=True))
    return float(plan["seconds"])


def steps_of(bench: Bench) -> int:
    """Steps of one student."""
    from akd_dist.data.row_cache import prepare

    spec = bench.recipe.students[0]
    rows = len(prepare(bench.recipe.data, Path(bench.roots["cache_root"])).train)
    return spec.objective.epochs * math.ceil(rows / spec.batch)


def in_loops(bench: Bench) -> tuple[float, list[float]]:
    """Seconds of all students with the teacher in the loop, and their test accuracies."""
    teacher = next((bench.folder / "stores" / "teachers").glob("*/model.json")).parent
    jobs = [
        (bench.recipe.model_copy(update={"students": [spec]}), str(teacher), bench.roots["cache_root"])
        for spec in bench.recipe.students
    ]
    started = time.perf_counter()
    with ProcessPoolExecutor(bench.cpus, mp_context=multiprocessing.get_context("spawn")) as pool:
        accuracies = list(pool.map(one_loop, jobs))
    return time.perf_counter() - started, accuracies


def one_loop(job: tuple[Recipe, str, str]) -> float:
    """Train one student with the teacher called on every batch; its test accuracy."""
    from akd_dist.data.row_cache import prepare
    from akd_dist.models.device import set_deterministic
    from akd_dist.models.folder import load_model
    from benchmarks.cached_equals_online import online

    recipe, teacher, cache_root = job
    set_deterministic("cpu", recipe.students[0].threads)
    return online(recipe, load_model(teacher), prepare(recipe.data, Path(cache_root)), pad_to=None).metric


def wall_table(result: dict[str, Any]) -> str:
    """The document for people."""
    cohorts, accuracy = result["cohorts"], result["accuracy"]
    rows = [
        ("one fleet", "fleet", f"{cohorts['fleet']} Ray Train runs"),
        ("sixteen runs", "separate", f"{cohorts['separate']} Ray Train runs"),
        ("teacher in the loop", "loop", "plain processes"),
    ]
    lines = [
        f"{result['students']} MLPs on {result['data']}, {result['epochs']} epochs each, {result['steps']:,} steps "
        f"together, {result['cpus']} CPUs; the store was cached beforehand in {result['cache_seconds']} s of passes"
    ]
    for title, key, how in rows:
        seconds = result[f"{key}_seconds"]
        times = seconds / result["fleet_seconds"]
        lines.append(f"  {title:<20} {seconds:>8.1f} s  {times:>6.2f} x  mean test accuracy {accuracy[key]:.4f}  {how}")
    estimate = f"{result['estimated_seconds']} s, {result['estimate_ratio']} x the truth"
    lines.append(f"  ratio {result['ratio']}, loop_ratio {result['loop_ratio']}; the dry run estimated {estimate}")
    return "\n".join(lines)


# ---- what a fleet costs that takes no step


def overhead(bench: Bench, epochs: int, repeats: int) -> dict[str, Any]:
    """Fleets of sixteen and of one, in turns; medians."""
    if 0 < epochs < max(TAUS):
        raise click.BadParameter(f"--overhead-epochs {epochs}: 0, or {max(TAUS)} and more")
    students = with_epochs(list(bench.recipe.students), epochs)
    seconds: dict[str, list[float]] = {"one": [], "sixteen": [], "one, warm": [], "sixteen, warm": []}
    cohorts = 0
    for number in range(repeats):
        for name, some in (("one", students[:1]), ("sixteen", students)):
            seconds[name].append(in_own_process(bench, f"{name}-{number}", some))
            taken, fleet = bench.train(f"{name}-{number}-warm", some)
            seconds[f"{name}, warm"].append(taken)
        cohorts = fleet["cohorts"]
    one, sixteen, warm_one, warm_sixteen = (statistics.median(measured) for measured in seconds.values())
    return {
        "ratio": round(sixteen / one, 3),
        "overhead_ratio": round(sixteen / one, 3),
        "warm_ratio": round(warm_sixteen / warm_one, 3),
        "limit": LIMIT,
        "one_seconds": round(one, 2),
        "sixteen_seconds": round(sixteen, 2),
        "each": {size: [round(second, 2) for second in measured] for size, measured in seconds.items()},
        "cohorts": cohorts,
        "epochs": students[0].objective.epochs,
        "repeats": repeats,
        "data": bench.data,
        "cpus": bench.cpus,
        "cores": len(os.sched_getaffinity(0)),
    }


def in_own_process(bench: Bench, name: str, students: list[StudentSpec]) -> float:
    """Seconds of a process that trains a fleet, from its start to its end.

    No command line can ask for students without epochs, so the process is told by an object, and calls what
    `akd-dist train-students` calls.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=train_here, args=(bench.recipe.model_copy(update={"name": name, "students": students}), bench.options)
    )
    started = time.perf_counter()
    process.start()
    process.join()
    taken = time.perf_counter() - started
    if process.exitcode:
        raise click.ClickException(f"{name}: the process ended with code {process.exitcode}")
    return taken


def train_here(recipe: Recipe, options: dict[str, Any]) -> None:
    """What the process does."""
    fleet = akd_dist.train_students(recipe, **options, console=Console(quiet=True))
    if any(student["state"] != "done" for student in fleet["students"]):
        raise click.ClickException(f"{recipe.name}: not all students succeeded, so nothing can be compared")


def overhead_table(result: dict[str, Any]) -> str:
    """The document for people."""
    verdict = "within" if result["ratio"] <= result["limit"] else "NOT within"
    return (
        f"fleets on {result['data']} whose students have {result['epochs']} epochs, medians of {result['repeats']}, "
        f"{result['cpus']} CPUs\n"
        f"  of one      {result['one_seconds']:>7.2f} s\n"
        f"  of sixteen  {result['sixteen_seconds']:>7.2f} s in {result['cohorts']} cohorts\n"
        f"  ratio       {result['ratio']:>7.2f}, {verdict} {result['limit']}\n"
        f"  ratio in a process that has imported everything: {result['warm_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
