"""Train a fleet: look, plan, cache, train, collect.

akd-dist train-students jobs/digits.yaml
"""

import contextlib
import functools
import importlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base import places
from akd_dist.base.errors import AkdError
from akd_dist.base.files import check_folder
from akd_dist.base.formatting import counted
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import Splits
from akd_dist.distill.cohort import check_fingerprints, open_stream, train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.jobs.cache_teacher import cache_planned
from akd_dist.jobs.executors import Executor, LocalExecutor
from akd_dist.jobs.growth import Growth, settle
from akd_dist.jobs.idle import IdleWorkers
from akd_dist.jobs.packing import fits
from akd_dist.jobs.planning import windows
from akd_dist.jobs.planning.caching import Inputs, open_rows, with_models
from akd_dist.jobs.planning.costs import Cohort
from akd_dist.jobs.planning.language import fidelity_lines
from akd_dist.jobs.planning.models import CachedModel, fingerprints, levels_of
from akd_dist.jobs.planning.plan import RunPlan, fleet_job, plan_run
from akd_dist.jobs.planning.planner import (
    cohort_job,
    groups_of,
    learns_from_assistant,
    least_asks,
    nodes_to_come,
    plan_cohorts,
)
from akd_dist.jobs.planning.stacking import Stackings, kept_by, stacks_in_process
from akd_dist.jobs.prepare_rows import prepare_shown, rows_of_machine
from akd_dist.jobs.remote_run import RemoteRun, copy_of
from akd_dist.jobs.results import finish_run, tell_failures, telling_damage
from akd_dist.jobs.run_folder import (
    LocalRun,
    as_told_now,
    begin_run,
    check_same_run,
    run_identity,
    saved_results,
    with_stores_found,
)
from akd_dist.jobs.stopping import stop_on_signals
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.options import RunOptions
from akd_dist.recipe import Recipe
from akd_dist.storage.content import renewing
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.mean import Stores, uris_of
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import REPORTED
from akd_dist.storage.uses import using
from akd_dist.tracking.follower import forwarding
from akd_dist.tracking.status import driving
from akd_dist.tracking.trackers import Tracked


def train_students(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Train every student of the recipe from the teacher's stored logits, caching these first if they are missing.

    The same recipe again resumes what is unfinished, or returns the saved results when all is done.

    Returns:
        The content of fleet.json; of a dry run the plan.

    Raises:
        AkdError: see the exit codes; nothing that was trained is lost.
    """
    return run_recipe(recipe, options)[1]


@dataclass(frozen=True)
class Rung:
    """A part of a search: its students are the trials, and none of them is measured on the test rows."""

    pauses: dict[str, int]
    """After how many epochs trials wait for the next rung, by name."""
    epochs_behind: int
    """Epochs of trials that went no further, where the recipe has them no more."""
    epochs_later: int
    """Epochs that the rungs after this one take, of all trials together."""
    last: bool
    """Whether the trials that are left go on to their end, and are collected."""

    @property
    def counts(self) -> dict[str, Any]:
        """What the jobs of its cohorts say of it."""
        return {"pauses": self.pauses, "epochs_behind": self.epochs_behind, "epochs_later": self.epochs_later}


def run_recipe(
    recipe: Recipe, options: RunOptions, rung: Rung | None = None, idle: IdleWorkers | None = None
) -> tuple[RunPlan, dict[str, Any]]:
    """`train_students`, and the plan that it executed, or would; of a rung before the last there is no fleet.json.

    Args:
        idle: workers of this machine that were started for it.
    """
    recipe, began = recipe.own(), time.monotonic()
    root = options.runs
    place = f"{root}/{recipe.name}" if "://" in root else str(Path(root, recipe.name))
    run = RemoteRun(place, options.cache) if "://" in root else LocalRun(Path(place))
    with places.named_in_errors(run.names), idle or IdleWorkers() as workers:
        plan, document = _run_recipe(recipe, options, run, began, rung, workers)
    return plan, places.renamed(document, run.names)


def _run_recipe(
    recipe: Recipe, options: RunOptions, run: LocalRun, began: float, rung: Rung | None, idle: IdleWorkers
) -> tuple[RunPlan, dict[str, Any]]:
    """`run_recipe`, wherever the run lies."""
    from akd_dist.jobs import cluster

    workspace = Workspace.of(options, recipe, run.local, idle)
    run.check()
    inputs = open_rows(recipe, workspace, students=True, again=options.prepare_again, only_look=options.dry_run)
    # Refused before the run's folder is made, unless whoever is waited for may be caching just what is missing now.
    inputs = inputs if options.wait else with_models(inputs, workspace)
    check_folder(run.folder)
    with contextlib.ExitStack() as holding:
        holding.enter_context(run.held(wait=options.wait, console=workspace.console, only_look=options.dry_run))
        if not options.dry_run:
            holding.enter_context(run.followed())
        inputs = with_models(inputs, workspace) if options.wait else inputs
        shuffle = windows.settled(recipe, run.folder, fresh=options.fresh)
        growth, stacking = Growth(), kept_by(None)
        if not options.fresh:  # before `driving`: whoever is sent away is not who goes on with the run
            inputs, growth, stacking = _grown(run.folder, inputs, shuffle, search=rung is not None)
            for line in growth.lines if rung is None else []:
                workspace.tell(f"the run {recipe.name}: {line}")
        drives = contextlib.nullcontext() if options.dry_run else driving(run.folder, moves=run.local is not None)
        with drives, cluster.closing():
            pauses = {} if rung is None else rung.pauses
            begun: dict[str, Any] = {"fresh": options.fresh, "shuffle": shuffle, "stacking": stacking}
            begun["idle"] = None if options.dry_run else idle
            plan = plan_run(inputs, run.folder, workspace, pauses=pauses, **begun)
            if options.dry_run:
                return plan, plan.document.model_copy(update=growth.told).plain()
            return plan, _execute(plan, growth, options, workspace, began, run, rung, idle)


def _grown(
    run: Path, inputs: Inputs, shuffle: windows.Shuffle | None, *, search: bool
) -> tuple[Inputs, Growth, Stackings | None]:
    """What is trained of a recipe in a run that may have begun: its students as they are called there, and how the run
    has their steps taken.

    Raises:
        AkdError: it is another run.
    """
    recipe = inputs.recipe if shuffle is None else windows.with_window(inputs.recipe, shuffle)
    identity = run_identity(recipe, inputs.splits, fingerprints(inputs.levels))
    saved = check_same_run(run, recipe, identity)
    if saved is None:
        return inputs, Growth(), kept_by(None)
    recipe, growth = settle(run, saved, inputs.recipe, identity["students"], search=search)
    # By what the recipe calls them: a student of another name is the same one, and has as many parameters.
    parameters = inputs.parameters | {name: inputs.parameters[given] for given, name in growth.renamed.items()}
    return replace(inputs, recipe=recipe, parameters=parameters), growth, kept_by(saved)


def _execute(
    plan: RunPlan,
    growth: Growth,
    options: RunOptions,
    workspace: Workspace,
    began: float,
    run: LocalRun,
    rung: Rung | None,
    idle: IdleWorkers,
) -> dict[str, Any]:
    """Cache what is missing, train who has not ended, collect the results; the content of fleet.json."""
    recipe, splits, folder = plan.recipe, plan.inputs.splits, run.folder
    models = cache_planned(plan.inputs, workspace)
    levels = levels_of(recipe, models)
    for model in models:
        workspace.tell(_how_cached(model))
    for line in fidelity_lines(recipe, models[0]):
        workspace.tell(line)
    identity = run_identity(recipe, splits, fingerprints(levels))
    if options.fresh:
        run.start_over()
    elif not plan.inputs.complete and (folder / "identity.json").exists():  # begun once; a model was trained just now
        check_same_run(folder, recipe, identity)
    base = fleet_job(recipe, splits, levels[0].stores, folder, workspace.cache_root)
    base = replace(base, run_uri=run.uri, stages=workspace.store_root, stacks=plan.stacks)
    if rung is not None:
        base = replace(base, reads_test=False, **rung.counts)
    followed = [tracked(recipe, spec, base, plan.inputs.parameters[spec.name]) for spec in recipe.students]
    forward = functools.partial(forwarding, folder, followed, options.trackers, workspace.tell)
    if not plan.todo and (saved := saved_results(folder, plan.kept(identity))) is not None:
        workspace.tell(f"the run {recipe.name} is done: these are its saved results")
        with forward():
            return as_told_now(with_stores_found(saved, models), growth)
    stores = [level.reads for level in levels]
    used = uris_of(*(level.stores for level in levels))
    used += [base.rows.uri] if base.rows is not None else []
    with using(used, run=run.uri or str(folder.absolute()), lock=(folder / "lock").absolute()):
        # Within the record of use: from that on, nobody removes the stores that this run is about to name.
        begin_run(folder, recipe, growth.into(plan.kept(identity)), moves=run.local is not None)
        run.withdraw("fleet.json")
        run.publish()
        splits = _decode(base, plan, models, workspace)
        with forward(), _going_on(options.fresh):
            cohorts = _train(base, plan, levels[-1].stores, workspace, run, idle) if plan.todo else 0
        plan.inputs.splits.sources.finish()
        # The driver itself measures on the test rows; each block that it fetches for that is verified as it comes.
        if base.rows is None:
            splits = _with_sound_rows(base, splits, lambda found: found.test.content().verify(), workspace)
        run.bring()
        if rung is not None and not rung.last:
            run.publish()
            return {}
        took = time.monotonic() - began
        told: dict[str, Any] = {"growth": growth, "told": workspace.tell, "test_withheld": rung is not None}
        fleet = finish_run(folder, recipe, splits, base, stores, plan.inputs.parameters, cohorts, took, **told)
        run.publish()
    tell_failures(fleet, base, workspace.console)
    return fleet.plain()


def _decode(base: CohortJob, plan: RunPlan, models: list[CachedModel], workspace: Workspace) -> Splits:
    """Refuse other rows and a damaged store before anything starts; the rows that this took.

    Where the students train on this machine, what they learn from is decoded as far as it fits. Elsewhere each node
    decodes what it reads, and the driver may be a small one.
    """
    splits = plan.inputs.splits
    if base.rows is not None:  # a driver of a cluster holds neither rows nor logits: each of its nodes looks
        return splits
    opened = {store.uri: store for model in models for store in model.opened.values()}

    def look(job: CohortJob, found: Splits) -> None:
        stream, _ = open_stream(job, found, store_of=opened.__getitem__)
        if isinstance(stream.logits, StoredLogits) and workspace.address is None:
            stream.logits.decode()

    kinds = defaultdict(list)
    for spec in plan.todo:
        kinds[learns_from_assistant(spec)].append(spec)
    for specs in kinds.values():
        # The driver may have no GPU.
        job = replace(cohort_job(base, tuple(specs), levels_of(plan.recipe, models)[-1].stores), device="cpu")
        splits = _with_sound_rows(base, splits, functools.partial(look, job), workspace)
    return splits


def _with_sound_rows(base: CohortJob, splits: Splits, look: Callable[[Splits], object], workspace: Workspace) -> Splits:
    """The rows that `look` found nothing wrong with: prepared anew if these turn out not to be what was prepared."""
    # The rows at hand serve the first try; each further one prepares them again.
    at_hand = [splits]

    def act() -> Splits:
        again = functools.partial(rows_for, base.data, Path(base.cache_root), base.fingerprints, base.rows)
        found = at_hand.pop() if at_hand else again()
        check_fingerprints(base.fingerprints, found)
        look(found)
        return found

    return renewing(act, workspace.tell)


def _train(
    base: CohortJob, plan: RunPlan, assistant: Stores, workspace: Workspace, run: LocalRun, idle: IdleWorkers
) -> int:
    """Train those that have not ended; the number of cohorts that it took."""
    from akd_dist.jobs.fleet import Fleet

    with stop_on_signals(workspace.tell) as stop:
        if plan.document.executor == "processes":
            executor: Executor = LocalExecutor(plan.nodes[0], idle)
            cohorts = plan.cohorts
        else:
            idle.let_go()
            executor, cohorts = _on_ray(base, plan, assistant, replace(workspace, stop=stop, here=None))
        with telling_damage(base, plan.todo, workspace.console):
            look = plan.inputs.splits.sources.look
            asked: dict[str, Any] = {"look": look, "executor": executor, "run": run}
            fleet = Fleet(base, plan.costs, stop, workspace.console, assistant, **asked)
            threading.Thread(target=_import_what_reports_need, name="imports", daemon=True).start()
            count = fleet.train(cohorts)
        if stop:
            told = f"stopped; the students of {plan.recipe.name} that had begun have checkpoints"
            raise stop.error(told, "the same command goes on from there")
    return count


def _on_ray(base: CohortJob, plan: RunPlan, assistant: Stores, workspace: Workspace) -> tuple[Executor, list[Cohort]]:
    """The nodes of a Ray cluster, and the cohorts as they fit those that are there now."""
    from akd_dist.jobs import cluster
    from akd_dist.jobs.fleet import ray_executor

    recipe, costs = plan.inputs.recipe, plan.costs
    stop, demand = workspace.connect(), workspace.demand()
    if demand.waits:  # for one node of each kind at least: only then is it known how much memory they have
        with ray_executor(base, assistant, workspace.console, demand, workspace.folder) as shared:
            for family, ask in least_asks(recipe, plan.todo, costs):
                shared.wait_for_room(ask, f"the cohort of {family[0].name}", stop)
    nodes, cohorts = cluster.nodes(), plan.cohorts
    size = [sorted((node.cpus, node.gpus) for node in some) for some in (nodes, plan.nodes)]
    # Caching may have taken hours, in which nodes came or went.
    if size[0] != size[1] or not all(fits(nodes, costs.ask(cohort)) for cohort in cohorts):
        nodes = nodes_to_come(recipe, plan.todo, nodes, costs) if demand.waits else nodes
        cohorts, _ = plan_cohorts(recipe, plan.todo, nodes, costs)
    return ray_executor(base, assistant, workspace.console, demand, workspace.folder), cohorts


def _import_what_reports_need() -> None:
    """While workers train, the driver has nothing to do; at their end, each second of it is waited for."""
    with contextlib.suppress(Exception):  # told where the report is made
        for name in ("scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2"):
            importlib.import_module(name)


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
    recipe: Recipe, stores: Stores, *, run: str | Path, cache_root: str, assistant: Stores | None = None
) -> dict[str, Any]:
    """The recipe's students by a plain loop in this process, without Ray; the weights are those of the Ray run.

    Args:
        stores: those of the teacher.
        run: the run's folder, or its `s3://` URI.
        assistant: those of the last assistant, where there are students of objective `takd`.
    """
    data, console, remote = recipe.own().data, Console(stderr=True), None
    if stores:
        splits = rows_of_machine(data, Workspace(open_root(uris_of(stores)[0]).parent.uri, cache_root, console=console))
    else:
        splits = prepare_shown(data, cache_root, console)
    if "://" in str(run):
        remote = copy_of(str(run), cache_root)
        remote.refresh()
        run = remote.folder
    base = fleet_job(recipe, splits, stores, Path(run), cache_root)
    Path(base.control).mkdir(parents=True, exist_ok=True)
    if remote is not None:
        base = replace(base, run_uri=remote.uri)
        remote.run.begin_attempt(base.attempt)
    base.attempt_file.touch()
    base = replace(base, stacks=stacks_in_process(recipe, splits, cache_root))
    jobs = [cohort_job(base, group, assistant or {}) for group in groups_of(list(recipe.students))]
    splits.sources.begin()
    results = []
    for number, job in enumerate(jobs):
        named = job if remote is None else replace(job, name=f"cohort-{base.attempt}-{number}")
        results += train_cohort(named)["students"]
    splits.sources.finish()
    if remote is not None:
        remote.refresh(REPORTED)
    return {result["name"]: result | {"path": str(Path(base.root) / result["name"])} for result in results}


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


def _how_cached(model: CachedModel) -> str:
    """What came of the stores of the teacher, or of an assistant."""
    teacher = model.name == "the teacher"
    whose = f"the store {model.opened['train'].id[:12]}" + ("" if teacher else f" of {model.name}")
    computed = sum(plan.computed for plan in model.plans)
    if not computed:
        return f"{whose} is a hit: {'the teacher' if teacher else 'it'} is not needed"
    return f"{whose} and those of the validation and test rows are sealed: {counted(computed, 'shard')} computed"
