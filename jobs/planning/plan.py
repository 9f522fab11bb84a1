"""The plan of a run: made once, printed by `--dry-run`, executed by the command. What cannot fit is refused here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from akd_dist.base.files import read_json
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.distill.checkpoint import checkpoints, numbers_of
from akd_dist.distill.job import CohortJob, ended
from akd_dist.distill.stage1 import stages1_there
from akd_dist.documents.plan import FleetPlanDocument, RemovedRun
from akd_dist.jobs.idle import IdleWorkers, may_train_here
from akd_dist.jobs.packing import Node, timetable
from akd_dist.jobs.planning import windows
from akd_dist.jobs.planning.caching import Inputs, foresee_caching
from akd_dist.jobs.planning.costs import Cohort, CostModel
from akd_dist.jobs.planning.drawing import draw_up
from akd_dist.jobs.planning.planner import cohort_job, groups_of, nodes_to_come, plan_cohorts
from akd_dist.jobs.planning.probing import measure_all, measure_there
from akd_dist.jobs.planning.stacking import Found, Stackings, key_of, settle_stacking, stacks_of
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.device import gpus_of
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.mean import Stores
from akd_dist.storage.run_objects import MOST_ATTEMPTS, impossible_mark

# What a worker that is a process of this machine costs (measured: 4 s on 2 cores, most of it the import of torch).
LOCAL_START_SECONDS = 4.0
# From so long a training on, Ray starts on a machine that is alone, too. Its start, of about 15 s, hardly counts then,
# and whoever trains for long is glad of its watch over the memory.
RAY_PAYS_SECONDS = 90.0
# As many digits as the folders of writers have for it.
ATTEMPT = re.compile(r"attempt-([0-9]{1,6})")


@dataclass(frozen=True)
class RunPlan:
    """What is left to do of a run."""

    inputs: Inputs
    """The rows, and the models and stores that are there."""
    recipe: Recipe
    """The recipe, with the window that is settled for this run."""
    run: Path
    """The run's folder."""
    todo: list[StudentSpec]
    """The students that have not ended."""
    cohorts: list[Cohort]
    """Those students, in the cohorts that they are trained in, the longest first."""
    costs: CostModel
    """What they take."""
    nodes: list[Node]
    """The cluster that it was made for."""
    document: FleetPlanDocument
    """All of it, as `--dry-run` prints it."""
    stacking: Stackings | None = None
    """How steps are taken, as the run keeps it."""

    def kept(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity of the run, with how its students step."""
        if self.stacking is None:
            return identity
        return identity | {"stacking": {key: one.plain() for key, one in self.stacking.items()}}

    @property
    def stacks(self) -> dict[str, int]:
        """Whose steps are taken in stacks, as `CohortJob.stacks`."""
        return stacks_of(self.todo, self.costs.probes, self.recipe.device)


def measured_of(
    recipe: Recipe,
    todo: Sequence[StudentSpec],
    splits: Splits,
    parameters: dict[str, int],
    workspace: Workspace,
    idle: IdleWorkers | None,
) -> Found:
    """What the students that are not done take, from a short probe of each architecture.

    They are probed on this machine; on another one of the cluster if they take a GPU and it has none.
    """
    probed, sealed = (recipe, todo, parameters, workspace.cache_root), splits.train.sealed
    if todo and gpus_of(recipe.device) and not torch.cuda.is_available():
        return measure_there(*probed, workspace.tell, workspace.folder, sealed)
    return measure_all(*probed, sealed, idle)


def costs_of(
    recipe: Recipe,
    todo: Sequence[StudentSpec],
    splits: Splits,
    parameters: dict[str, int],
    root: Path | None,
    measured: Found,
    stages1: Mapping[str, str] | None = None,
) -> CostModel:
    """What the students that are not done take, from what was measured and from where their checkpoints stand.

    Args:
        root: the folder of student folders; None for a run that begins afresh.
        stages1: whose stage I was trained before, and where it lies.
    """
    found = {spec.name: position(root / spec.name / "checkpoints") for spec in todo} if root else {}
    places = {name: at for name, at in found.items() if at}
    there = {name: key for name, key in (stages1 or {}).items() if name not in places}
    return CostModel.of(recipe, splits, parameters, measured, places, there)


def position(folder: Path) -> tuple[int, int] | None:
    """(epoch, step) of the newest checkpoint, as its name says; None where there is none."""
    found = [numbers for path in checkpoints(folder) if len(numbers := numbers_of(path)) > 1]
    return (found[-1][0], found[-1][1]) if found else None


def _shuffle_of(
    recipe: Recipe,
    splits: Splits,
    todo: Sequence[StudentSpec],
    nodes: Sequence[Node],
    workspace: Workspace,
    settled: windows.Shuffle | None,
) -> windows.Shuffle:
    """How epochs shuffle: as is settled, or as the nodes' caches have room for.

    Raises:
        AkdError: as `windows.check_window`.
    """
    demands = windows.demands_of(recipe, splits, todo, nodes, blocks=workspace.address is not None)
    room = windows.room_for(workspace, nodes)
    shuffle = settled or windows.choose(demands, room)
    if settled is None and shuffle.window is not None:
        workspace.tell(f"rows are shuffled in windows of {shuffle.window:,}: {shuffle.why}")
    windows.check_window(demands, shuffle, room, workers=max((spec.workers for spec in todo), default=1))
    return shuffle


def plan_run(
    inputs: Inputs,
    run: Path,
    workspace: Workspace,
    *,
    fresh: bool,
    shuffle: windows.Shuffle | None = None,
    pauses: Mapping[str, int] | None = None,
    stacking: Stackings | None = None,
    idle: IdleWorkers | None = None,
) -> RunPlan:
    """Plan what is left to do of a run that is held: students are probed, and nothing is written.

    Args:
        fresh: as if the run had not begun.
        shuffle: how epochs shuffle, as far as that is settled; else it is chosen.
        pauses: after how many epochs students wait for another command; who stands there has nothing to do.
        stacking: how the run has steps taken, as `stacking.kept_by`.
        idle: workers of this machine, if the plan is executed next; what it needs of them, or a Ray, starts meanwhile.

    Raises:
        AkdError: what cannot fit the disk, the store root or the cluster.
    """
    from akd_dist.jobs import cluster

    if workspace.address is not None:
        workspace.join()
    recipe, splits, parameters = inputs.recipe, inputs.splits, inputs.parameters
    caching = foresee_caching(inputs, workspace)
    # Without stores, which may not be there yet: it serves to look at the students' folders.
    base = fleet_job(recipe, splits, {}, run, workspace.cache_root)
    todo = [spec for spec in recipe.students if fresh or not ended(base, spec)]
    nodes = cluster.all_nodes()
    if shuffle is None or todo:
        shuffle = _shuffle_of(recipe, splits, todo, nodes, workspace, shuffle)
    if pauses:
        todo = [spec for spec in todo if _goes_on(spec, Path(base.root), pauses)]
    local = bool(todo) and may_train_here(recipe, workspace.address)
    if todo and idle is not None and workspace.address is None:
        if local:
            idle.begin()
        else:
            cluster.begin()
    if todo:
        workspace.tell("probing what the students take")
    measured = measured_of(recipe, todo, splits, parameters, workspace, idle if local else None)
    measured, stacking = settle_stacking(recipe, todo, measured, stacking)
    stages1: dict[str, str] = {}
    if inputs.complete:  # else what students learn from is not known
        job = replace(base, data=windows.with_window(recipe, shuffle).data, stages=workspace.store_root)
        job = replace(job, stacks=stacks_of(todo, measured, recipe.device))
        levels = inputs.levels
        for specs in groups_of(todo, recipe.device):
            of_cohort = cohort_job(replace(job, stores=levels[0].stores), specs, levels[-1].stores)
            stages1 |= stages1_there(of_cohort, list(specs))
    costs = costs_of(recipe, todo, splits, parameters, None if fresh else Path(base.root), measured, stages1)
    costs = replace(costs, pauses=pauses or {})
    planned, quicker = nodes, replace(costs, starting=LOCAL_START_SECONDS)
    cohorts, tried = plan_cohorts(recipe, todo, nodes, quicker) if local else ([], [])
    local = local and ends_after(cohorts, nodes, quicker) < RAY_PAYS_SECONDS
    if local:
        costs = quicker
    elif todo:
        if idle is not None and workspace.address is None:
            cluster.begin()
        planned = nodes_to_come(recipe, todo, nodes, costs) if workspace.demand().waits else nodes
        cohorts, tried = plan_cohorts(recipe, todo, planned, costs)
    document = draw_up(inputs, todo, nodes, planned, cohorts, tried, costs, run, caching, shuffle)
    document = document.model_copy(update={"executor": "processes" if local else "ray"})
    if fresh:
        document = document.model_copy(update={"removes": removed_by_fresh(run)})
    kept = {key_of(spec) for spec in recipe.students}
    told = [one for key, one in (stacking or {}).items() if key in kept]
    document = document.model_copy(update={"stacking": told})
    shuffled = windows.with_window(recipe, shuffle)
    return RunPlan(inputs, shuffled, run, todo, cohorts, costs, nodes, document, stacking)


def ends_after(cohorts: Sequence[Cohort], nodes: Sequence[Node], costs: CostModel) -> float:
    """Seconds until the last cohort ends, their starts included."""
    queue = [(costs.starting + costs.cohort_seconds(cohort), costs.ask(cohort)) for cohort in cohorts]
    return max((end for _, end in timetable(queue, nodes)), default=0.0)


def _goes_on(spec: StudentSpec, root: Path, pauses: Mapping[str, int]) -> bool:
    """Whether a student is not where it waits for another command."""
    epoch, _ = position(root / spec.name / "checkpoints") or (0, 0)
    return epoch < pauses.get(spec.name, spec.objective.epochs + 1)


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
        teacher_test=stores.get("test", ""),
        control=str(run / "control"),
        attempt=1 + last_attempt(run),
        checkpoint_seconds=recipe.checkpoint_seconds,
        device=recipe.device,
        rows=splits.train.sealed,
    )


def last_attempt(run: Path) -> int:
    """The number of the run's latest attempt, 0 before the first.

    Raises:
        DamagedError: no run comes to so many.
    """
    names = (ATTEMPT.fullmatch(path.name) for path in (run / "control").glob("attempt-*"))
    found = sorted(int(name[1]) for name in names if name)
    if found and found[-1] > MOST_ATTEMPTS:
        others = [number for number in found if number <= MOST_ATTEMPTS]
        latest = f"the latest attempt is {others[-1]}" if others else "no attempt has begun"
        where = str(run / "control" / f"attempt-{found[-1]}")
        raise impossible_mark(where, f"a mark for an attempt that never was: {latest}")
    return found[-1] if found else 0


def removed_by_fresh(run: Path) -> RemovedRun | None:
    """What `--fresh` removes of a run before it begins anew; None where no run is."""
    if not (run / "identity.json").exists() and not (run / "students").exists():
        return None
    results = [read_json(path) for path in run.glob("students/*/result.json")]
    return RemovedRun(
        students=sum(isinstance(result, dict) and result.get("state") == "done" for result in results),
        bytes=sum(path.lstat().st_size for path in run.rglob("*") if not path.is_dir()),
    )
