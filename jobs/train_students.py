"""Train a fleet: plan cohorts, run each as one Ray Train run, retry what died, collect the results.

akd-dist train-students jobs/digits.yaml
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
import warnings
from collections import defaultdict
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.cohort import CohortJob, open_stream, read_result, train_cohort
from akd_dist.fleet_report import write_report
from akd_dist.jobs.cache_teacher import SPLITS, cache_teacher, prepare_shown, read_progress
from akd_dist.models import ModelCard, add_folder, build, num_parameters
from akd_dist.recipe import Recipe
from akd_dist.rows import Splits
from akd_dist.storage.errors import AkdError, MachineError, RecipeError
from akd_dist.storage.files import canonical_json, file_lock, replace
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.student import Group, entry

# What starting and stopping one Ray Train run costs, whatever it trains (measured: 9 to 14 s on 2 cores, Ray 2.60).
START_SECONDS = 14.0
DEATHS_BEFORE_SPLIT = 2


def train_students(
    recipe: Recipe,
    *,
    store_root: str,
    run_root: str,
    cache_root: str,
    address: str | None = None,
    fresh: bool = False,
    wait: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every student of the recipe from the teacher's stored logits, caching these first if they are missing.

    The same recipe again resumes what is unfinished, or returns the saved results when all is done.

    Args:
        store_root: folder or URI under which stores lie.
        run_root: folder of runs; results go to `<run_root>/<recipe.name>/`.
        cache_root: folder of this node's prepared data and decoded stores.
        address: a Ray cluster; None starts one on this machine if there is anything to do.
        fresh: forget an earlier run of this name.
        wait: wait for somebody else's claim instead of leaving.
        console: where progress is told; stderr by default.

    Returns:
        The content of fleet.json.

    Raises:
        AkdError: see the exit codes; nothing that was trained is lost.
    """
    from akd_dist.jobs import cluster

    console = console or Console(stderr=True)
    started = time.monotonic()
    add_folder(recipe.folder)
    run = Path(run_root) / recipe.name
    splits = prepare_shown(recipe.data, cache_root, console)
    parameters = check_students(recipe, splits)
    with contextlib.ExitStack() as stack:
        note = f"{socket.gethostname()} process {os.getpid()}"
        stack.enter_context(file_lock(run / "lock", what=f"the run {recipe.name}", wait=None if wait else 0, note=note))
        if fresh:
            forget(run)
        check_same_run(run, recipe, splits)
        stack.enter_context(cluster.closing())
        cached = cache_teacher(
            recipe, store_root=store_root, cache_root=cache_root, address=address, wait=wait, console=console
        )
        console.print(f"the store {cached['id'][:12]} {_how_cached(cached)}", highlight=False)
        stores = {"train": cached["store"]} | {split: cached["splits"][split]["store"] for split in SPLITS[1:]}
        begin_run(run, recipe, splits)
        base = fleet_job(recipe, splits, stores, run, cache_root)
        todo = [spec for spec in recipe.students if not _ended(base, spec)]
        earlier: dict[str, Any] | None = _read_json(run / "fleet.json")
        if not todo and earlier is not None:
            console.print(f"the run {recipe.name} is done: these are its saved results", highlight=False)
            return earlier
        open_stream(base, splits)  # decode once, and refuse a damaged store before anything starts
        cohorts = 0
        if todo:
            cluster.connect(address)
            with cluster.stop_on_signals(console.print) as stop:
                fleet = _Fleet(base, recipe, stop, console)
                cohorts = fleet.train(plan_cohorts(recipe, todo, fleet.cpus, len(splits.train), splits))
                if stop:
                    raise stop.error(
                        f"stopped; every student of {recipe.name} has a checkpoint",
                        "the same command goes on from there",
                    )
        fleet_document = finish_run(run, recipe, base, stores, parameters, cohorts, time.monotonic() - started)
        tell_failures(fleet_document, base, console)
        return fleet_document


def train_in_process(recipe: Recipe, stores: dict[str, str], *, run: Path, cache_root: str) -> dict[str, Any]:
    """The recipe's students by a plain loop in this process, without Ray; the weights are those of the Ray run."""
    from akd_dist.rows import prepare

    splits = prepare(recipe.data, Path(cache_root))
    run.mkdir(parents=True, exist_ok=True)
    base = fleet_job(recipe, splits, stores, run, cache_root)
    groups = cohort_groups(list(recipe.students))
    return {
        result["name"]: result
        for group in groups
        for result in train_cohort(replaced(base, students=group))["students"]
    }


# ---- before anything starts


def check_students(recipe: Recipe, splits: Splits) -> dict[str, int]:
    """Build each distinct model once, so that one that does not fit is refused before the teacher runs.

    Returns:
        The number of parameters by model label.

    Raises:
        RefusedError: a model cannot be built, or does not give a logit per class.
    """
    distinct = {spec.model.label: spec.model for spec in recipe.students}
    cards = {label: ModelCard.of(model, splits.train, recipe.data.normalize) for label, model in distinct.items()}
    return {label: num_parameters(build(card, seed=0)) for label, card in cards.items()}


def run_identity(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """What makes two runs the same: the resolved recipe without placement and paths, and the content of the data."""
    fingerprints = {split: getattr(splits, split).fingerprint for split in SPLITS}
    return recipe.identity() | {"dataset": fingerprints}


def check_same_run(run: Path, recipe: Recipe, splits: Splits) -> None:
    """Refuse to continue a run of this name that was made from another recipe or other data."""
    saved = _read_json(run / "identity.json")
    identity = json.loads(canonical_json(run_identity(recipe, splits)))
    if saved is not None and saved != identity:
        raise RecipeError(
            f"the run {recipe.name} in {run} was made from another recipe",
            got="\n       ".join(recipes.differences(saved, identity)[:12]),
            expected="the recipe that the run was started with",
            next=f"give this one another name: --set name={recipe.name}-2 (or --fresh to start over)",
        )


def begin_run(run: Path, recipe: Recipe, splits: Splits) -> None:
    """Write down what the run is, before its first step."""
    run.mkdir(parents=True, exist_ok=True)
    replace(run / "identity.json", canonical_json(run_identity(recipe, splits)))
    replace(run / "recipe.yaml", recipe.to_yaml().encode())


def forget(run: Path) -> None:
    """Remove an earlier run; the lock that is held stays."""
    for path in run.iterdir() if run.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def fleet_job(recipe: Recipe, splits: Splits, stores: dict[str, str], run: Path, cache_root: str) -> CohortJob:
    """What all cohorts of the run have in common; its students are all of them."""
    control = run / "control"
    control.mkdir(parents=True, exist_ok=True)
    attempt = 1 + max((int(path.name.split("-")[1]) for path in control.glob("attempt-*")), default=0)
    return CohortJob(
        name="fleet",
        data=recipe.data,
        fingerprints={split: getattr(splits, split).fingerprint for split in SPLITS},
        students=tuple(recipe.students),
        root=str(run / "students"),
        logs=str(run / "logs"),
        cache_root=cache_root,
        stores=stores,
        folder=recipe.folder,
        control=str(control),
        attempt=attempt,
        checkpoint_seconds=recipe.checkpoint_seconds,
    )


# ---- planning


def cohort_groups(students: list[recipes.Student]) -> list[tuple[recipes.Student, ...]]:
    """Students that can share a stream and a worker: same batch, workers and threads."""
    groups = defaultdict(list)
    for spec in students:
        groups[spec.batch, spec.workers, spec.threads].append(spec)
    return [tuple(group) for group in groups.values()]


def plan_cohorts(
    recipe: Recipe, students: list[recipes.Student], cpus: int, rows: int, splits: Splits
) -> list[tuple[recipes.Student, ...]]:
    """Cut the students into cohorts: as few as can be, one more only where it saves more time than its start costs."""
    seconds = {label: probe_step(recipe, splits, label) for label in {spec.model.label for spec in students}}

    def cost(spec: recipes.Student) -> float:
        return seconds[spec.model.label] * math.ceil(rows / spec.batch) * spec.objective.epochs / spec.workers

    planned: list[tuple[recipes.Student, ...]] = []
    for group in cohort_groups(students):
        total = sum(cost(spec) for spec in group)
        at_once = max(1, cpus // (group[0].workers * group[0].threads))
        wanted = recipe.cohorts or best_count(total, at_once)
        planned += split_evenly(group, min(wanted, len(group)), cost)
    return planned


def best_count(seconds: float, at_once: int) -> int:
    """How many cohorts: one more is worth it while it saves more time than it takes to start."""
    count = 1
    while count < at_once and seconds / count - seconds / (count + 1) > START_SECONDS:
        count += 1
    return count


def split_evenly(group: tuple[recipes.Student, ...], count: int, cost: Any) -> list[tuple[recipes.Student, ...]]:
    """Cut a group into `count` parts of about equal cost: the dearest first, each to the part with the least so far."""
    parts: list[list[recipes.Student]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for spec in sorted(group, key=cost, reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest].append(spec)
        loads[lightest] += cost(spec)
    order = {spec.name: index for index, spec in enumerate(group)}
    return [tuple(sorted(part, key=lambda spec: order[spec.name])) for part in parts]


def probe_step(recipe: Recipe, splits: Splits, label: str) -> float:
    """Seconds of one forward and backward pass of a model on one batch, measured here and now."""
    spec = next(spec for spec in recipe.students if spec.model.label == label)
    module = build(ModelCard.of(spec.model, splits.train, recipe.data.normalize), seed=0)
    import torch

    inputs = torch.from_numpy(splits.train.read(0, min(spec.batch, len(splits.train)))[0].copy())
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        module(inputs).square().mean().backward()
        best = min(best, time.perf_counter() - started)
    return 1.5 * best  # an optimizer step and its bookkeeping come on top


# ---- running


class _Fleet:
    """The driver's side of running cohorts: start them where there is room, follow them, retry and split what died."""

    def __init__(self, base: CohortJob, recipe: Recipe, stop: Any, console: Console) -> None:
        from akd_dist.jobs import cluster

        self.base, self.recipe, self.stop, self.console = base, recipe, stop, console
        self.cpus = int(cluster.total_cpus())
        self.jobs: list[CohortJob] = []
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.count = 0

    def train(self, cohorts: list[tuple[recipes.Student, ...]]) -> int:
        """Train all cohorts to their end, or until the stop flag; the number of Ray Train runs it took."""
        from akd_dist.jobs import cluster
        from akd_dist.jobs.progress import meter

        control = Path(self.base.control)
        (control / f"attempt-{self.base.attempt}").touch()
        for earlier in range(1, self.base.attempt):
            (control / f"stop-{earlier}").touch()  # a zombie of a dead driver sees it and leaves
        names = sum(len(cohort) for cohort in cohorts)
        title = f"training {names} students in {len(cohorts)} cohort{'s' if len(cohorts) > 1 else ''}"
        with meter(self.console, title, total=1, unit="steps") as shown:
            for cohort in cohorts:
                needed = cohort[0].workers * cohort[0].threads
                cluster.wait_for_cpus(needed, self.stop, self.console.print)
                thread = threading.Thread(target=self._carry, args=(cohort,), daemon=True)
                thread.start()
                self.threads.append(thread)
                while self._starting(thread) and len(cohorts) > 1:
                    self._follow(shown)
            while any(thread.is_alive() for thread in self.threads):
                self._follow(shown)
            self._follow(shown)
        if self.errors:
            raise self.errors[0]
        return self.count

    def _starting(self, thread: threading.Thread) -> bool:
        """Whether the newest cohort has not taken its CPUs yet, so that free CPUs still count as free."""
        return thread.is_alive() and read_progress(self.jobs[-1]) is None if self.jobs else thread.is_alive()

    def _follow(self, shown: Any) -> None:
        if self.stop:
            self.base.stop_file.touch()
        told = [progress for job in self.jobs if (progress := read_progress(job))]
        if told:
            done = sum(progress["done"] for progress in told)
            total = sum(progress["total"] for progress in told)
            rate = sum(progress["rows_per_second"] for progress in told)
            ended = sum(student["state"] != "training" for progress in told for student in progress["students"])
            shown.update(done, total=total, note=f"{rate:,.0f} student rows/s, {ended} students done")
        time.sleep(0.2)

    def _carry(self, cohort: tuple[recipes.Student, ...]) -> None:
        """See a cohort through, off the main thread (on it, Ray would take over Ctrl-C)."""
        from akd_dist.jobs.cluster import ray

        try:
            self._train_or_split(cohort)
        except ray.exceptions.RayError as error:
            lost = MachineError(
                "the Ray cluster was lost while students trained",
                got=" ".join(str(error).split())[:300],
                expected="a cluster that stays up",
                next="the same command goes on from the last checkpoints",
            )
            self.errors.append(lost)
        except BaseException as error:
            self.errors.append(error)

    def _train_or_split(self, cohort: tuple[recipes.Student, ...]) -> None:
        """Run a cohort; after two deaths cut it in half, until only the guilty student fails."""
        reason = ""
        for _death in range(DEATHS_BEFORE_SPLIT):
            reason = self._run(cohort)
            if not reason or self.stop:
                return
        left = tuple(spec for spec in cohort if not _ended(self.base, spec))
        if len(left) > 1:
            half = len(left) // 2
            self._train_or_split(left[:half])
            self._train_or_split(left[half:])
        elif left:
            self._give_up(left[0], reason)

    def _give_up(self, spec: recipes.Student, reason: str) -> None:
        folder = Path(self.base.root) / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        result = entry(spec, "failed", f"its worker died again and again: {reason}", folder)
        replace(folder / "result.json", json.dumps(result, indent=1).encode())

    def _run(self, cohort: tuple[recipes.Student, ...]) -> str:
        """One Ray Train run; '' if it came to its end, else why it died."""
        job = replaced(self.base, name=f"cohort-{self.base.attempt}-{len(self.jobs)}", students=cohort)
        self.jobs.append(job)
        self.count += 1
        outcome = fit(job, Path(self.base.control) / "ray")
        if isinstance(outcome, AkdError):
            raise outcome
        return outcome if isinstance(outcome, str) else ""


def fit(job: CohortJob, storage: Path) -> dict[str, Any] | AkdError | str:
    """Run a cohort as one Ray Train run: what `train_cohort` returned, a refusal it raised, or why its workers died."""
    from akd_dist.jobs.cluster import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside Ray Train
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        name = f"{job.name}-{os.getpid()}-{time.time_ns()}"  # an old name would resume an old run's state
        spec = job.students[0]
        trainer = TorchTrainer(
            run_worker,  # type: ignore[arg-type]  # what it returns is the run's return value
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(num_workers=spec.workers, resources_per_worker={"CPU": spec.threads}),
            run_config=RunConfig(
                name=name, storage_path=str(storage.absolute()), failure_config=FailureConfig(max_failures=1)
            ),
        )
        try:
            outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except ray.train.TrainingFailedError as error:
            return " ".join(str(error).split())[:400] or type(error).__name__
        finally:
            shutil.rmtree(storage / name, ignore_errors=True)
    assert isinstance(outcome, dict | AkdError)
    return outcome


def run_worker(config: dict[str, Any]) -> dict[str, Any] | AkdError:
    """What a Ray Train worker runs. A refusal is returned, not raised: running it again would change nothing."""
    from akd_dist.jobs.cluster import ray

    context = ray.train.get_context()
    job, group = config["job"], Group(context.get_world_rank(), context.get_world_size())
    keep_log(Path(job.logs) / f"{job.name}.rank{group.rank}.log")
    try:
        return train_cohort(job, group)
    except AkdError as error:
        return error


def keep_log(path: Path) -> None:
    """Send this worker's warnings, and its stack if it crashes, to a file that stays with the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  # faulthandler writes to it until the process ends
    faulthandler.enable(file)
    logging.getLogger("akd_dist").addHandler(logging.StreamHandler(file))


# ---- afterwards


def finish_run(
    run: Path,
    recipe: Recipe,
    base: CohortJob,
    stores: dict[str, str],
    parameters: dict[str, int],
    cohorts: int,
    seconds: float,
) -> dict[str, Any]:
    """Collect every student's result into fleet.json and the report."""
    store = open_store(stores["train"])
    results = []
    for spec in recipe.students:
        folder = Path(base.root) / spec.name
        result = read_result(base, spec) or entry(spec, "failed", "it never ended", folder)
        result["parameters"] = parameters[spec.model.label]
        results.append(result | {"store": stores["train"], "teacher": store.manifest.identity.teacher})
    fleet = {
        "run": str(run),
        "store": stores["train"],
        "teacher": describe_teacher(store, open_store(stores["test"])),
        "students": results,
        "cohorts": cohorts,
        "seconds": round(seconds, 3),
    }
    replace(run / "fleet.json", json.dumps(fleet, indent=1).encode())
    write_report(run)
    for progress in Path(base.control).glob("progress-*.json"):
        progress.unlink()
    return fleet


def tell_failures(fleet: dict[str, Any], base: CohortJob, console: Console) -> None:
    """Name the log of every student that did not come to its end."""
    for student in fleet["students"]:
        if student["state"] != "done":
            log = Path(base.logs) / f"{student['name']}.log"
            console.print(f"{student['name']} {student['state']}: {student['reason']}; log: {log}", highlight=False)


def describe_teacher(train: LogitStore, test: LogitStore) -> dict[str, Any]:
    """The teacher's row of the table, from what the stores say of it: it is not run again."""
    card = ModelCard.model_validate(train.manifest.teacher["spec"])
    agreeing = sum(shard.label_agreement * shard.rows for shard in test.manifest.shards)
    return {
        "model": card.model.label,
        "parameters": num_parameters(build(card, seed=0)),
        "test": {"accuracy": agreeing / test.num_rows},
        "fingerprint": train.manifest.identity.teacher,
    }


def _how_cached(cached: dict[str, Any]) -> str:
    if cached["hit"]:
        return "is a hit: the teacher is not needed"
    computed = cached["shards_computed"] + sum(part["shards_computed"] for part in cached["splits"].values())
    return f"is sealed: {computed} shards computed"


def _ended(job: CohortJob, spec: recipes.Student) -> bool:
    result = read_result(job, spec)
    return result is not None and result["state"] in ("done", "diverged")


def _read_json(path: Path) -> Any | None:
    return json.loads(path.read_bytes()) if path.exists() else None
