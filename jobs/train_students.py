"""Train a fleet: plan cohorts, run each as one Ray Train run, retry what died, collect the results.

akd-dist train-students jobs/digits.yaml
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base import places
from akd_dist.base.errors import AkdError, RecipeError, RefusedError
from akd_dist.base.files import canonical_json, check_folder, read_json, replace
from akd_dist.base.locks import file_lock, refuse_held
from akd_dist.base.trusted import Trusted
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import SPLITS, Rows, Splits, first_difference
from akd_dist.distill.checkpoint import DAMAGED
from akd_dist.distill.cohort import (
    check_fingerprints,
    open_stream,
    stored_predictions,
    train_cohort,
    wait_for_lock,
)
from akd_dist.distill.delivery import failed_entry
from akd_dist.distill.job import ZOMBIE_SECONDS, CohortJob, ended, read_result, renewals, stop_attempts
from akd_dist.distill.metrics import measure
from akd_dist.distill.teacher import served_fingerprint
from akd_dist.distill.trial import try_training
from akd_dist.documents.damage import load, read_epochs
from akd_dist.documents.fleet import RunIdentity
from akd_dist.jobs.cache_teacher import (
    cache_checked,
    check_models,
    document_of,
    foresee_caching,
    model_uris,
    prepare_shown,
)
from akd_dist.jobs.planning.dry_run import costs_of, draw_up
from akd_dist.jobs.planning.plan import Plan
from akd_dist.jobs.planning.planner import Costs, cohort_job, groups_of, learns_from_assistant
from akd_dist.jobs.train_teacher import Stores, Workspace, is_there, teacher_of
from akd_dist.models.build import build, by_content, check_memory, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card
from akd_dist.options import RunOptions
from akd_dist.recipe import Recipe
from akd_dist.reporting.economics import StudentUsage, economics, reading
from akd_dist.reporting.page import write_report
from akd_dist.reporting.results import read_fleet
from akd_dist.storage.content import renewing
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import using
from akd_dist.tracking.follower import forwarding
from akd_dist.tracking.progress import tell
from akd_dist.tracking.status import driving
from akd_dist.tracking.trackers import Tracked

Chain = list[Stores]
"""The stores of the teacher's logits, then of each assistant's: students learn from the first or from the last."""

DIFFERENCES_SHOWN = 12
NAMES_SHOWN = 6


def train_students(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Train every student of the recipe from the teacher's stored logits, caching these first if they are missing.

    The same recipe again resumes what is unfinished, or returns the saved results when all is done.

    Returns:
        The content of fleet.json; of a dry run the plan.

    Raises:
        AkdError: see the exit codes; nothing that was trained is lost.
    """
    from akd_dist.jobs import cluster

    workspace, began = Workspace.of(options), time.monotonic()
    recipe = recipe.own()
    run = options.runs / recipe.name
    splits = prepare_shown(recipe.data, workspace.cache_root, workspace.console, again=options.prepare_again)
    splits.sources.begin()
    parameters = check_students(recipe, splits)
    check_models(recipe, splits, workspace.store_root)
    check_folder(run)
    if options.dry_run:
        if not options.wait:
            refuse_held(run / "lock", what=f"the run {run.name}")
        if not options.fresh:
            check_same_run(run, recipe, foreseen_identity(recipe, splits, workspace.store_root))
        with cluster.closing():
            return _foresee(recipe, splits, parameters, run, options.fresh, workspace)[0].document()
    with held(run, options.wait, workspace.console):
        if not options.fresh:  # before `driving`: whoever is sent away is not who goes on with the run
            check_same_run(run, recipe, foreseen_identity(recipe, splits, workspace.store_root))
        with driving(run), cluster.closing():
            return _train_held(recipe, splits, parameters, run, options, workspace, began)


def _train_held(
    recipe: Recipe,
    splits: Splits,
    parameters: dict[str, int],
    run: Path,
    options: RunOptions,
    asked: Workspace,
    began: float,
) -> dict[str, Any]:
    """The whole way of a run that is held: cache, train who has not ended, collect; the content of fleet.json."""
    # Refuses what cannot fit, before anything expensive starts.
    _, costs = _foresee(recipe, splits, parameters, run, options.fresh, asked)
    chain = _cache(recipe, splits, asked)
    identity = run_identity(recipe, splits, chain)
    if options.fresh:
        forget(run)
    check_same_run(run, recipe, identity)
    base = fleet_job(recipe, splits, chain[0], run, asked.cache_root)
    followed = [tracked(recipe, spec, base, parameters[spec.name]) for spec in recipe.students]
    forward = functools.partial(forwarding, run, followed, options.trackers, asked.tell)
    todo = [spec for spec in recipe.students if not ended(base, spec)]
    saved = None if todo else saved_results(run, identity)
    if saved is not None:
        saved = _with_stores_found(saved, chain)
        asked.tell(f"the run {recipe.name} is done: these are its saved results")
        with forward():
            return saved
    with using(
        [uri for stores in chain for uri in stores.values()],
        run=str(run.absolute()),
        lock=(run / "lock").absolute(),
    ):
        begin_run(run, recipe, identity)
        # Decode once, and refuse a damaged store before anything starts; the driver may have no GPU.
        for one in {learns_from_assistant(spec): spec for spec in todo}.values():
            job = replaced(cohort_job(base, (one,), chain[-1]), device="cpu")
            renewing(functools.partial(_open_here, job), asked.tell)
        with forward(), _going_on(options.fresh):
            cohorts = _train(base, recipe, todo, chain, costs, splits, asked) if todo else 0
        splits.sources.finish()
        splits = renewing(functools.partial(_with_sound_test_rows, base), asked.tell)
        took = time.monotonic() - began
        fleet = finish_run(run, recipe, splits, base, chain, parameters, cohorts, took, asked.tell)
    tell_failures(fleet, base, asked.console)
    return fleet


def _open_here(job: CohortJob) -> None:
    """Open what a cohort reads, on this machine.

    Raises:
        CorruptCacheError: rows are seen not to be what was prepared.
    """
    splits = prepare(job.data, Path(job.cache_root), expected=job.fingerprints)
    check_fingerprints(job, splits)
    open_stream(job, splits)


def _with_sound_test_rows(base: CohortJob) -> Splits:
    """The splits, of which the driver itself measures on the test rows.

    Raises:
        CorruptCacheError: these are not what was prepared.
    """
    splits = prepare(base.data, Path(base.cache_root), expected=base.fingerprints)
    check_fingerprints(base, splits)
    splits.test.content().verify()
    return splits


def _foresee(
    recipe: Recipe, splits: Splits, parameters: dict[str, int], run: Path, fresh: bool, asked: Workspace
) -> tuple[Plan, Costs]:
    """The plan of the fleet and what its students cost; refuses what cannot fit. Writes nothing under the run root."""
    from akd_dist.jobs import cluster

    if asked.address is not None:
        cluster.connect(asked.address, tell=asked.tell)
    cache = foresee_caching(recipe, splits, asked)
    base = fleet_job(recipe, splits, {}, run, asked.cache_root)
    todo = [spec for spec in recipe.students if fresh or not ended(base, spec)]
    if todo:
        asked.tell("probing what the students take")
    costs = costs_of(recipe, todo, splits, parameters, None if fresh else Path(base.root), asked)
    trained = is_there(model_uris(recipe, splits, asked.store_root)[0])
    return draw_up(recipe, todo, cluster.all_nodes(), costs, run, cache, trained), costs


def _cache(recipe: Recipe, splits: Splits, asked: Workspace) -> Chain:
    """Cache what is missing, and say what came of it."""
    started = time.monotonic()
    cached = document_of(cache_checked(recipe, splits, asked), time.monotonic() - started)
    for model in (cached, *cached["assistants"]):
        asked.tell(_how_cached(model))
    return chain_of(cached)


def _train(
    base: CohortJob,
    recipe: Recipe,
    todo: list[recipes.StudentSpec],
    chain: Chain,
    costs: Costs,
    splits: Splits,
    asked: Workspace,
) -> int:
    """Train those that have not ended; the number of Ray Train runs it took."""
    from akd_dist.jobs import cluster
    from akd_dist.jobs.fleet import Fleet
    from akd_dist.jobs.planning.planner import plan_cohorts

    with cluster.stop_on_signals(asked.tell) as stop:
        replaced(asked, stop=stop).connect()
        cohorts, _ = plan_cohorts(recipe, todo, cluster.nodes(), costs)
        with telling_damage(base, todo, asked.console):
            fleet = Fleet(base, costs, stop, asked.console, chain[-1], look=splits.sources.look)
            count = fleet.train(cohorts)
        if stop:
            told = f"stopped; the students of {recipe.name} that had begun have checkpoints"
            raise stop.error(told, "the same command goes on from there")
    return count


@contextlib.contextmanager
def _going_on(fresh: bool) -> Iterator[None]:
    """Where a refusal says that the same command goes on, leave `--fresh` out of it: that would start over again."""
    try:
        yield
    except AkdError as error:
        if fresh and error.next is not None:
            error.next = error.next.replace("the same command", "the same command without --fresh")
        raise


def train_in_process(
    recipe: Recipe, stores: Stores, *, run: Path, cache_root: str, assistant: Stores | None = None
) -> dict[str, Any]:
    """The recipe's students by a plain loop in this process, without Ray; the weights are those of the Ray run.

    Args:
        stores: those of the teacher.
        assistant: those of the last assistant, where there are students of objective `takd`.
    """
    splits = prepare(recipe.own().data, Path(cache_root))
    base = fleet_job(recipe, splits, stores, run, cache_root)
    Path(base.control).mkdir(parents=True, exist_ok=True)
    base.attempt_file.touch()
    jobs = [cohort_job(base, group, assistant or {}) for group in groups_of(list(recipe.students))]
    splits.sources.begin()
    results = [result for job in jobs for result in train_cohort(job)["students"]]
    splits.sources.finish()
    return {result["name"]: result | {"path": str(Path(base.root) / result["name"])} for result in results}


# ---- before anything starts


@contextlib.contextmanager
def held(run: Path, wait: bool, console: Console) -> Iterator[None]:
    """Hold the run's lock; somebody else's is waited for, or refused with its holder named."""
    note = f"process {os.getpid()} on {socket.gethostname()}"
    patience = None if wait else 0

    def waiting(holder: str) -> None:
        tell(console, f"waiting for {holder}")

    with file_lock(run / "lock", what=f"the run {run.name}", wait=patience, note=note, on_wait=waiting):
        yield


def check_students(recipe: Recipe, splits: Splits) -> dict[str, int]:
    """Build each distinct model once, so that one that does not fit is refused before the teacher runs.

    Returns:
        The number of parameters by student.

    Raises:
        RefusedError: as `trial.try_training`.
    """
    alike: dict[str, list[recipes.StudentSpec]] = {}
    for spec in recipe.students:
        alike.setdefault(spec.model.model_dump_json(), []).append(spec)
    counts: dict[str, int] = {}
    for group in alike.values():
        trainings = [(f"the student {spec.name}", spec) for spec in group]
        count = try_training(group[0].model, trainings, splits.train, recipe.data)
        counts |= {spec.name: count for spec in group}
    return {spec.name: counts[spec.name] for spec in recipe.students}


def chain_of(cached: dict[str, Any]) -> Chain:
    """The stores of the teacher and of its assistants, from the document that `cache_teacher` returns."""
    return [
        {"train": model["store"]} | {split: part["store"] for split, part in model["splits"].items()}
        for model in (cached, *cached["assistants"])
    ]


def foreseen_identity(recipe: Recipe, splits: Splits, store_root: str) -> dict[str, Any]:
    """What `run_identity` will be, as far as it is known before anything is trained: teachers that are there count."""
    document, uris = run_identity(recipe, splits), model_uris(recipe, splits, store_root)
    if len(uris) > len(recipe.teacher.chain) and is_there(uris[-1]):
        document["teacher"] |= _taught_by(
            served_fingerprint(load_card(uri, recipe.trusted), recipe.cache.precision) for uri in uris
        )
    return document


def run_identity(recipe: Recipe, splits: Splits, chain: Chain | None = None) -> dict[str, Any]:
    """What makes two runs the same, as JSON: the resolved recipe without placement and paths, and what these lead to.

    Args:
        chain: the stores, for the fingerprints of teacher and assistants; without them these are left out.
    """
    rows: dict[str, Rows] = {split: getattr(splits, split) for split in SPLITS}
    document = recipe.identity() | {"dataset": {split: rows[split].fingerprint for split in SPLITS}}
    # Not compared, but by it a difference is found: the fingerprints say only that there is one.
    document["rows"] = {split: rows[split].describe() for split in SPLITS}
    for spec in recipe.students:
        document["students"][spec.name]["model"] = by_content(spec.model)
    node = document["teacher"]
    if recipe.teacher.model is not None:
        node["model"] = by_content(recipe.teacher.model)
    for assistant in recipe.teacher.chain:
        node = node["assistant"]
        node["model"] = by_content(assistant.model)
    if chain is not None:
        document["teacher"] |= _taught_by(open_store(each["train"]).manifest.identity.teacher for each in chain)
    plain: dict[str, Any] = json.loads(canonical_json(document))
    return plain


def _taught_by(fingerprints: Iterable[str]) -> dict[str, Any]:
    teacher, *assistants = fingerprints
    return {"fingerprint": teacher, "assistant_fingerprints": assistants}


def check_same_run(run: Path, recipe: Recipe, identity: dict[str, Any]) -> None:
    """Refuse to continue a run of this name that was made from another recipe, other data or another teacher.

    Raises:
        RefusedError: the data are others; names the first block of rows that differs.
        RecipeError: the recipe or the teacher is another one.
        DamagedError: what says how the run was made is not whole; names the field.
    """
    if not (run / "identity.json").exists():
        return
    advice = "--fresh starts over; if you know that the recipe is the same, remove that file to go on"
    saved = load(
        run / "identity.json", RunIdentity, expected="what the run wrote there when it began", next=advice
    ).plain()
    if "fingerprint" not in identity["teacher"]:
        for key in ("fingerprint", "assistant_fingerprints"):
            saved["teacher"].pop(key, None)
    before, now = saved.pop("rows", {}), identity["rows"]
    identity = {key: value for key, value in identity.items() if key != "rows"}
    if saved != identity:
        differing = [
            f"the {split} rows: {first_difference(now[split], before[split])}"
            for split in SPLITS
            if split in before and before[split]["fingerprint"] != now[split]["fingerprint"]
        ]
        kind = RefusedError if saved["dataset"] != identity["dataset"] else RecipeError
        raise kind(
            f"the run {recipe.name} in {run} was made from another recipe, data or teacher",
            got="\n       ".join(first_of([*differing, *changes(saved, identity)], DIFFERENCES_SHOWN)),
            expected="those that the run was started with",
            next=f"give this one another name: --set name={recipe.name}-2 (or --fresh to start over)",
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Where two identities of runs differ; students that differ in the same way share a line."""
    old, new = before["students"], now["students"]
    lines = recipes.differences(
        *({key: value for key, value in each.items() if key != "students"} for each in (before, now))
    )
    alike: dict[str, list[str]] = {}
    for name in old:
        if name in new and (told := recipes.differences(old[name], new[name])):
            alike.setdefault("; ".join(told), []).append(name)
    groups = {
        "students only in the run": [name for name in old if name not in new],
        "students only in this recipe": [name for name in new if name not in old],
    }
    lines += [f"{told}: {', '.join(first_of(names, NAMES_SHOWN))}" for told, names in groups.items() if names]
    return lines + [f"students {', '.join(first_of(names, NAMES_SHOWN))}: {told}" for told, names in alike.items()]


def first_of(texts: list[str], count: int) -> list[str]:
    """The first texts of a list, and how many more there are."""
    return texts if len(texts) <= count else [*texts[:count], f"and {len(texts) - count} more"]


def begin_run(run: Path, recipe: Recipe, identity: dict[str, Any]) -> None:
    """Write down what the run is, before its first step; results of an earlier attempt no longer hold."""
    replace(run / "identity.json", canonical_json(identity))
    replace(run / "recipe.yaml", recipe.to_yaml(run).encode())
    (run / "fleet.json").unlink(missing_ok=True)


def saved_results(run: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The fleet.json of a run whose students have all ended; None where it, or the report, has to be made again."""
    if read_json(run / "fleet.json") is None or not (run / "report.html").exists():
        return None
    if not (run / "identity.json").exists():  # removed by hand, as a refusal of a damaged one says
        replace(run / "identity.json", canonical_json(identity))
    return read_fleet(run).plain()


def _with_stores_found(fleet: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """Results whose stores are named where they are now, for a run that was moved without them, or they without it."""
    now = {Path(uri).name: uri for stores in chain for uri in stores.values()}
    return {**places.each(fleet, lambda place: now.get(Path(place).name, place)), "run": fleet["run"]}


def forget(run: Path) -> None:
    """Remove an earlier run, once its workers had time to leave.

    Students go first, in one step, and the identity last: killed in between, the run cannot pass for another one's. The
    lock and the attempts stay, so that late workers of earlier attempts are still told to leave.
    """
    stop_attempts(run / "control", last_attempt(run))
    until = time.monotonic() + ZOMBIE_SECONDS
    for lock in run.glob("students/*/checkpoints/lock"):
        with contextlib.ExitStack() as locks:  # one that does not leave is shut out: its folder goes
            wait_for_lock(lock, f"the student {lock.parent.parent.name}", until, locks)
    if (run / "students").exists():
        (run / "students").rename(run / f"old-{secrets.token_hex(6)}")
    kept = ("lock", "control", "identity.json")
    for path in [path for path in run.iterdir() if path.name not in kept]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (run / "identity.json").unlink(missing_ok=True)


def last_attempt(run: Path) -> int:
    """The number of the run's latest attempt, 0 before the first."""
    return max((int(path.name.split("-")[1]) for path in (run / "control").glob("attempt-*")), default=0)


def fleet_job(recipe: Recipe, splits: Splits, stores: Stores, run: Path, cache_root: str) -> CohortJob:
    """What all cohorts of the run have in common; its students are all of them, its stores those of the teacher."""
    return CohortJob(
        name="fleet",
        data=recipe.data,
        fingerprints={split: getattr(splits, split).fingerprint for split in SPLITS},
        students=tuple(recipe.students),
        root=str(run / "students"),
        logs=str(run / "logs"),
        cache_root=cache_root,
        stores=stores,
        teacher_test=stores.get("test"),
        control=str(run / "control"),
        attempt=1 + last_attempt(run),
        checkpoint_seconds=recipe.checkpoint_seconds,
        device=recipe.device,
    )


def tracked(recipe: Recipe, spec: recipes.StudentSpec, base: CohortJob, parameters: int) -> Tracked:
    """A student as trackers know it."""
    said = spec.model_dump(mode="json", exclude_none=True)
    params: dict[str, str | int | float | bool] = {
        "model": spec.model.label,
        "parameters": parameters,
        "objective": spec.objective.kind,
    }
    params |= {"epochs": spec.objective.epochs, "lr": spec.optimizer.lr, "batch": spec.batch, "seed": spec.seed}
    if (tau_max := getattr(spec.objective, "tau_max", None)) is not None:
        params["tau_max"] = tau_max
    return Tracked(
        name=spec.name,
        run=recipe.name,
        folder=Path(base.root) / spec.name,
        params=params,
        recipe=json.dumps(said, indent=2),
        metric=recipe.data.primary_metric,
    )


# ---- afterwards


def finish_run(
    run: Path,
    recipe: Recipe,
    splits: Splits,
    base: CohortJob,
    chain: Chain,
    parameters: dict[str, int],
    cohorts: int,
    seconds: float,
    told: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Collect every student's result into fleet.json and the report.

    Args:
        told: told of each file of a student that the report has to do without.
    """
    stores = [{split: open_store(uri) for split, uri in each.items()} for each in chain]
    results = []
    for spec in recipe.students:
        folder = Path(base.root) / spec.name
        result = read_result(base, spec) or failed_entry(spec, "it never ended", folder, base.attempt)
        result["parameters"] = parameters[spec.name]
        source = (stores[-1] if learns_from_assistant(spec) else stores[0])["train"]
        where = {"path": str(folder), "store": source.uri}
        results.append(result | where | {"teacher": source.manifest.identity.teacher})
    fleet = {
        "run": str(run),
        "store": stores[0]["train"].uri,
        "task": recipe.data.task,
        "metric": recipe.data.primary_metric,
        "teacher": describe_teacher(stores[0]["train"], stores[0]["test"], splits.test, recipe.trusted),
        "assistants": [describe_assistant(each, stores[0]["test"], splits.test, recipe.trusted) for each in stores[1:]],
        "students": results,
        "cohorts": cohorts,
        "seconds": round(seconds, 3),
    }
    fleet["economics"] = balances(run, recipe, splits, fleet, stores)
    in_the_run = places.each(fleet, functools.partial(places.written, folder=run))
    replace(run / "fleet.json", json.dumps(in_the_run, indent=1).encode())
    write_report(run, tell=told)
    tidy(base)
    return read_fleet(run).plain()


def balances(
    run: Path, recipe: Recipe, splits: Splits, fleet: dict[str, Any], stores: list[dict[str, LogitStore]]
) -> list[dict[str, Any]]:
    """What the stored logits cost and saved: those of the teacher, and of the last assistant where students read it."""
    results = {result["name"]: result for result in fleet["students"]}
    assisted = {spec.name: learns_from_assistant(spec) for spec in recipe.students}

    def read(of_assistant: bool) -> list[StudentUsage]:
        return [
            reading(spec, read_epochs(run / "students" / spec.name), results[spec.name].get("stage1_from"))
            for spec in recipe.students
            if assisted[spec.name] == of_assistant
        ]

    spent = training_seconds(recipe, splits, stores[0]["train"])
    found = [economics("teacher", fleet["teacher"]["model"], stores[0], read(False), spent)]
    if any(assisted.values()):
        found.append(economics("assistant", fleet["assistants"][-1]["model"], stores[-1], read(True)))
    return [balance.plain() for balance in found]


def training_seconds(recipe: Recipe, splits: Splits, store: LogitStore) -> float | None:
    """What training the teacher took, where the recipe trained it and it left its result beside this store."""
    trained = teacher_of(recipe, splits)
    folder = None if trained is None else open_root(trained.uri(open_root(store.uri).parent.uri)).local_path("")
    result = None if folder is None else read_json(folder / "result.json")
    return float(result["seconds"]) if isinstance(result, dict) else None


def tidy(base: CohortJob) -> None:
    """Remove what only a running fleet needs. The attempts stay, for late workers of theirs."""
    for path in Path(base.control).glob("progress-*.json"):
        path.unlink()
    shutil.rmtree(Path(base.control) / "ray", ignore_errors=True)
    for log in Path(base.logs).glob("cohort-*.log"):
        if log.stat().st_size == 0:
            log.unlink()


def tell_failures(fleet: dict[str, Any], base: CohortJob, console: Console) -> None:
    """Name the log of every student that did not come to its end."""
    for student in fleet["students"]:
        if student["state"] != "done":
            log = Path(base.logs) / f"{student['name']}.log"
            tell(console, f"{student['name']} {student['state']}: {student['reason']}; log: {log}")


@contextlib.contextmanager
def telling_damage(base: CohortJob, students: list[recipes.StudentSpec], console: Console) -> Iterator[None]:
    """Name what is found damaged meanwhile: checkpoints, in whose place the one before was taken; caches, made anew."""

    def aside() -> dict[Path, tuple[str, int]]:
        folders = {spec.name: Path(base.root) / spec.name / "checkpoints" for spec in students}
        found = ((path, name) for name, folder in folders.items() for path in sorted(folder.glob(f"*{DAMAGED}")))
        return {path: (name, path.stat().st_mtime_ns) for path, name in found}

    before, lines = aside(), len(renewals(base))
    try:
        yield
    finally:
        for line in renewals(base)[lines:]:
            tell(console, f"warning: {line}")
        for path, (name, _) in sorted(aside().items() - before.items()):
            tell(console, f"warning: a checkpoint of {name} was damaged, the one before it was taken; it is {path}")


def describe_teacher(train: LogitStore, test: LogitStore, rows: Rows, trusted: Trusted) -> dict[str, Any]:
    """The teacher's row of the table, from its stored logits of the test rows: it is not run again."""
    card = ModelCard.model_validate(train.manifest.teacher["spec"])
    recipes.trust(card.model, trusted.seen_from(f"the store {train.uri}"))
    check_memory(card)
    labels = torch.from_numpy(np.array(rows.labels))
    return {
        "model": card.model.label,
        "parameters": num_parameters(build(card, seed=0)),
        "test": measure(rows.task, stored_predictions(test, rows), labels, rows.classes),
        "fingerprint": train.manifest.identity.teacher,
    }


def describe_assistant(
    stores: dict[str, LogitStore], teacher_test: LogitStore, rows: Rows, trusted: Trusted
) -> dict[str, Any]:
    """An assistant's row: as the teacher's, with its agreement with the teacher, and the store of its logits."""
    agreement = None
    if rows.task == "classification":
        ours, theirs = (stored_predictions(store, rows) for store in (stores["test"], teacher_test))
        agreement = float((ours == theirs).double().mean())
    described = describe_teacher(stores["train"], stores["test"], rows, trusted)
    return described | {"agreement": agreement, "store": stores["train"].uri}


def _how_cached(model: dict[str, Any]) -> str:
    """What came of the stores of the teacher, or of an assistant."""
    whose = f"the store {model['id'][:12]}" + (f" of the assistant {model['model']}" if "model" in model else "")
    computed = sum(part["shards_computed"] for part in (model, *model["splits"].values()))
    if not computed:
        return f"{whose} is a hit: {'it' if 'model' in model else 'the teacher'} is not needed"
    return f"{whose} is sealed: {computed} shards computed"
