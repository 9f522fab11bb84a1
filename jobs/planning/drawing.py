"""A plan as people read it: every cohort with its figures and its reasons, and what it takes of the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from akd_dist.base.errors import MachineError
from akd_dist.base.formatting import counted, duration, size
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.documents.cache import PlanDocument
from akd_dist.documents.plan import FleetPlanDocument, PlannedCohort, PlannedStudent
from akd_dist.jobs.packing import Node, ResourceRequest, fits, timetable
from akd_dist.jobs.planning import windows
from akd_dist.jobs.planning.caching import Inputs
from akd_dist.jobs.planning.costs import Cohort, CostModel
from akd_dist.jobs.planning.planner import Alternative, groups_of, learns_from_assistant
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import is_copy


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
