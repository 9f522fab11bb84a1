"""The plan of a run: made once, printed by `--dry-run`, executed by the command. What cannot fit is refused here."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from akd_dist.base.errors import MachineError
from akd_dist.base.files import read_json
from akd_dist.base.formatting import counted, duration, size
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.distill.checkpoint import checkpoints, numbers_of
from akd_dist.distill.job import CohortJob, ended
from akd_dist.distill.stage1 import stages1_there
from akd_dist.documents.cache import PlanDocument
from akd_dist.documents.plan import FleetPlanDocument, PlannedCohort, PlannedStudent, RemovedRun
from akd_dist.jobs.idle import IdleWorkers, may_train_here
from akd_dist.jobs.packing import Node, ResourceRequest, fits, timetable
from akd_dist.jobs.planning import windows
from akd_dist.jobs.planning.caching import Inputs, foresee_caching
from akd_dist.jobs.planning.costs import Cohort, CostModel
from akd_dist.jobs.planning.planner import (
    Alternative,
    cohort_job,
    groups_of,
    learns_from_assistant,
    nodes_to_come,
    plan_cohorts,
)
from akd_dist.jobs.planning.probing import measure_all, measure_there
from akd_dist.jobs.planning.stacking import Found, Stackings, key_of, settle_stacking, stacks_of
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.device import gpus_of
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.mean import Stores
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import is_copy
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
        demands = windows.demands_of(recipe, splits, todo, nodes, blocks=workspace.address is not None)
        room = windows.room_for(workspace, nodes)
        if shuffle is None:
            shuffle = windows.choose(demands, room)
            if shuffle.window is not None:
                workspace.tell(f"rows are shuffled in windows of {shuffle.window:,}: {shuffle.why}")
        windows.check_window(demands, shuffle, room, workers=max((spec.workers for spec in todo), default=1))
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


def draw_up(
    inputs: Inputs,
    todo: Sequence[StudentSpec],
    nodes: Sequence[Node],
    planned_for: Sequence[Node],
    cohorts: Sequence[Cohort],
    tried: Sequence[Alternative],
    costs: CostModel,
    run: Path,
    cache: PlanDocument,
    shuffle: windows.Shuffle,
) -> FleetPlanDocument:
    """A plan as `--dry-run` prints it.

    Args:
        todo: the students that are not done.
        nodes: what the cluster has.
        planned_for: what it may come to have.
        tried: what fewer and more cohorts would have come to.
        cache: what caching would compute.
        shuffle: how epochs shuffle.

    Raises:
        MachineError: checkpoints and models do not fit the disk.
    """
    recipe = inputs.recipe
    asks = [costs.ask(cohort) for cohort in cohorts]
    kept, delivered = disk(cohorts, costs)
    free = check_disk(run, todo, kept + delivered, cache)
    queue = [(costs.starting + costs.cohort_seconds(cohort), ask) for cohort, ask in zip(cohorts, asks, strict=True)]
    times = timetable(queue, planned_for)
    left = {spec.name for spec in todo}
    planned = [
        planned_cohort(recipe, cohort, ask, span, costs) for cohort, ask, span in zip(cohorts, asks, times, strict=True)
    ]
    memory = sum(node.memory for node in nodes)
    return FleetPlanDocument(
        dry_run=True,
        run=str(run),
        store_root=cache.store_root,
        removes=None,
        device=recipe.device,
        teacher=_about_teacher(inputs, cache),
        teacher_checks=cache.teacher_checks,
        cache_bytes=cache.bytes,
        nodes=len(nodes),
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        memory=round(memory) if memory < float("inf") else None,
        waits_for=cache.waits_for or next((str(ask) for ask in asks if not fits(nodes, ask)), None),
        window=shuffle.window,
        shuffle=shuffle.why,
        why=why_so_many(recipe, todo, tried, len(cohorts), costs.starting),
        cohorts=_say_who_waits(planned, asks),
        ended=[planned_student(spec, costs, None, "ended") for spec in recipe.students if spec.name not in left],
        checkpoint_bytes=kept,
        model_bytes=delivered,
        free_bytes=free,
        seconds=round(max((end for _, end in times), default=0.0), 1),
    )


def disk(cohorts: Sequence[Cohort], costs: CostModel) -> tuple[int, int]:
    """Bytes of checkpoints, the most at a time, and of delivered models. Both stay with the run.

    Two checkpoints of each student are kept, and each cohort may be writing one.
    """
    measured = [[costs.measured(spec) for spec in cohort] for cohort in cohorts]
    sizes = [[one.checkpoint for one in cohort] for cohort in measured]
    return sum(2 * sum(each) + max(each) for each in sizes), sum(one.weights for cohort in measured for one in cohort)


def check_disk(run: Path, todo: Sequence[StudentSpec], needed: int, cache: PlanDocument) -> int:
    """Refuse what the disk cannot hold beside what lies there already; the bytes that are free.

    Args:
        needed: bytes of checkpoints and models.
        cache: what caching would compute: its logits may go to the same disk.

    Raises:
        MachineError: too little is free under the run root.
    """
    there = sum(
        path.stat().st_size for spec in todo for path in checkpoints(run / "students" / spec.name / "checkpoints")
    )
    folder = _nearest(run)
    free = shutil.disk_usage(folder).free
    logits = cache.bytes if _same_disk(folder, cache.store_root) else 0
    # Checkpoints that lie there are replaced as training goes on, so their room counts as free.
    if needed - there + logits > free:
        raise MachineError(
            f"checkpoints and models of the students do not fit in {run.parent}",
            got=f"{size(free)} free",
            expected=f"{size(needed - there)}" + (f", and {size(logits)} of logits on the same disk" if logits else ""),
            next=f"free space there, or choose another {'--cache-root' if is_copy(run) else '--run-root'}",
        )
    return free


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _same_disk(folder: Path, store_root: str) -> bool:
    there = open_root(store_root).local_path("")
    return there is not None and _nearest(there).stat().st_dev == folder.stat().st_dev


def planned_cohort(
    recipe: Recipe, cohort: Cohort, ask: ResourceRequest, span: tuple[float, float], costs: CostModel
) -> PlannedCohort:
    """A cohort with its figures."""
    leaders = costs.leaders(cohort)
    students = [planned_student(spec, costs, leaders.get(spec.name)) for spec in cohort]
    return PlannedCohort(
        students=students,
        why=why_together(cohort, costs),
        waits=None,
        workers=ask.workers,
        cpus=ask.cpus,
        gpus=ask.gpus,
        memory=round(ask.memory),
        steps=costs.stream_steps(cohort),
        bytes_streamed=bytes_streamed(recipe, cohort, costs),
        begins=round(span[0], 1),
        ends=round(span[1], 1),
    )


def planned_student(
    spec: StudentSpec, costs: CostModel, leader: str | None, standing: Literal["ended"] | None = None
) -> PlannedStudent:
    """A student with its figures."""
    known = costs.probes.get(spec.name) is not None
    return PlannedStudent(
        name=spec.name,
        model=spec.model.label,
        objective=spec.objective.kind,
        parameters=costs.parameters[spec.name],
        standing=standing or ("resumes" if spec.name in costs.behind else "new"),
        rides=leader or _short(costs.stages1.get(spec.name)),
        steps=0 if standing == "ended" else costs.steps_left(spec, leader is not None),
        seconds=round(costs.seconds(spec, leader is not None), 3) if known else None,
    )


def _short(key: str | None) -> str | None:
    """What lies under the store root, as a store is called by the first digits of its id."""
    return None if key is None else key.removesuffix(".ckpt")[:-52]


def bytes_streamed(recipe: Recipe, cohort: Cohort, costs: CostModel) -> int:
    """Inputs, labels and logits that a cohort's stream reads over its epochs; logits only where somebody needs them."""
    plain = costs.row_bytes
    logits, _ = windows.read_at_once(recipe, costs.rows, costs.classes, costs.targets)
    return sum(one.rows * (plain + logits * one.logits) for one in costs.streamed(cohort))


def why_together(cohort: Cohort, costs: CostModel) -> str:
    """What the students of a cohort share."""
    spec = cohort[0]
    store = "the last assistant's store" if learns_from_assistant(spec) else "the teacher's store"
    worker = f"{spec.workers} worker{'' if spec.workers == 1 else 's'} of {counted(spec.threads, 'thread')}"
    last = {"keep": "", "drop": ", the last dropped,", "merge": ", the last merged,"}[spec.last_batch]
    alike = f"batches of {spec.batch}{last} from {store} and {worker}"
    if len(cohort) == 1:
        return f"a student on its own: {alike}"
    followers = len(costs.leaders(cohort))
    forked = f"; {followers} of them go on from another one's stage I" if followers else ""
    apart = "" if costs.labelled is None else " that trains on its rows, with labels or without"
    return (
        f"{len(cohort)} students share {alike}: each batch is read once for all{apart}{forked}{_stacked(cohort, costs)}"
    )


def _stacked(cohort: Cohort, costs: CostModel) -> str:
    """How many of them step together."""
    sizes = [len(stack) for stack in costs.stacks_of(cohort) if len(stack) > 1]
    if not sizes:
        return ""
    return f"; {sum(sizes)} of them step together, in {counted(len(sizes), 'stack')} of one architecture each"


def why_so_many(
    recipe: Recipe, todo: Sequence[StudentSpec], tried: Sequence[Alternative], count: int, starting: float
) -> str:
    """Why there are neither fewer nor more cohorts."""
    if not todo:
        return "no cohort: all students have ended"
    if recipe.cohorts is not None:
        if count < recipe.cohorts:
            return (
                f"{counted(count, 'cohort')}: the recipe's `cohorts` says {recipe.cohorts}, but nothing more can be cut"
            )
        return f"{counted(count, 'cohort')}, as the recipe's `cohorts` says"
    end = {one.cohorts: one.seconds for one in tried}
    groups = len(groups_of(todo, recipe.device))
    start = duration(starting)
    if count - 1 in end:
        saved = end[count - 1] - end[count]
        fewer = f"one fewer would end {duration(max(saved, 0))} later, and a start costs {start}"
    elif count == groups:
        fewer = "one has to be" if groups == 1 else "fewer cannot be: other batch, workers, threads or store do not mix"
    else:
        fewer = "fewer would not fit the memory of a node"
    if count + 1 in end:
        saved = end[count] - end[count + 1]
        more = f"one more would end {duration(saved)} sooner" if saved > 0.5 else "one more would end no sooner"
        more += f", and its start costs {start}"
    else:
        more = "no more are possible: each student has its own" if count > 1 else "there is nothing to cut"
    return f"{counted(count, 'cohort')}: {fewer}; {more}"


def _say_who_waits(cohorts: Sequence[PlannedCohort], asks: Sequence[ResourceRequest]) -> list[PlannedCohort]:
    said = []
    for cohort, ask in zip(cohorts, asks, strict=True):
        ended = [str(number) for number, other in enumerate(cohorts, 1) if other.ends == cohort.begins]
        waits = f"for {ask}, which is free at the end of cohort {' and '.join(ended)}" if cohort.begins > 0 else None
        said.append(cohort.model_copy(update={"waits": waits}))
    return said


def _beside_hits(cache: PlanDocument) -> str:
    """What of an ensemble is there already."""
    hits = sum(all(part.hit for part in member.values()) for member in cache.members)
    return f", as the stores of {hits} of {counted(len(cache.members), 'teacher')} are a hit" if hits else ""


def _about_teacher(inputs: Inputs, cache: PlanDocument) -> str:
    """What has to be done for the teacher and its assistants first."""
    words, each = [], inputs.recipe.teacher.each
    if not inputs.levels:
        words.append("the teacher is to be trained" if len(each) == 1 else "teachers of the ensemble are to be trained")
    words += [f"the assistant {one.model} is to be trained" for one in cache.assistants if not one.trained]
    if cache.bytes:
        words.append(f"{size(cache.bytes)} of logits are to be cached" + _beside_hits(cache))
    return "; ".join(words) + ": first, and not in the time below" if words else "cached: it is not needed"
