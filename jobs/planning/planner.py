"""Plan cohorts: which students share a stream and a worker, and whether another cohort is worth its start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from akd_dist.base.errors import RecipeError
from akd_dist.distill.job import CohortJob
from akd_dist.jobs.packing import Node, ResourceRequest, check_room, fits, timetable, with_more
from akd_dist.jobs.planning.costs import START_SECONDS, Cohort, CostModel, families_of
from akd_dist.models.device import gpus_of
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.mean import Stores

MORE_NODES = 16
"""So many nodes that are not there are counted on for students that share a stream, where there is an autoscaler."""


def groups_of(students: Sequence[StudentSpec], device: str = "cpu") -> list[Cohort]:
    """Students that can share a stream and a worker: those of the same batches, number of workers, threads and store.

    Those that learn from labels alone ride with the teacher's store. On GPUs a worker's share of one counts too.
    """
    groups = defaultdict(list)
    for spec in students:
        gpus = spec.gpus * gpus_of(device)
        batches = spec.batch, spec.last_batch, spec.epoch_steps
        groups[batches, spec.workers, spec.threads, gpus, learns_from_assistant(spec)].append(spec)
    return [tuple(group) for group in groups.values()]


def learns_from_assistant(spec: StudentSpec) -> bool:
    """Whether a student reads the store of the last assistant, not the teacher's."""
    return spec.objective.learns_from == "assistant"


def cohort_job(base: CohortJob, cohort: Cohort, assistant: Stores) -> CohortJob:
    """The job of a cohort: its students, and the stores that they learn from."""
    return replace(base, students=cohort, stores=assistant if learns_from_assistant(cohort[0]) else base.stores)


@dataclass(frozen=True)
class Alternative:
    """A number of cohorts that was tried."""

    cohorts: int
    """How many."""
    seconds: float
    """When the fleet would end, starts included."""


@dataclass(frozen=True)
class Load:
    """A group of students that can share a stream: what is known of it where it is cut into cohorts."""

    seconds: float
    """What its students take together."""
    ask: ResourceRequest
    """What a cohort of it occupies."""
    stream: float = 0.0
    """What every cohort of it takes, however few students it has."""
    shared: float = 0.0
    """What the steps of all stacks take however many students are in them: a cohort pays this for each architecture of
    which it has students, so all of it where it has students of every one."""
    whole: tuple[float, ...] = ()
    """What each stack takes with all of its students, and what those take that step alone; empty without stacks."""
    longest: float = 0.0
    """What its dearest student takes, which cannot be cut."""
    parts: int = 1_000_000
    """Into how many cohorts it can be cut."""
    least: int = 1
    """Into how many it must be cut, for memory."""
    start: float = START_SECONDS
    """What each cohort takes to start and to stop; the same for all groups."""

    def each(self, count: int) -> float:
        """Seconds of one of so many cohorts, its start included."""
        mixed = self.shared + max(self.seconds / count, self.longest)
        return self.start + self.stream + min([mixed, *([max(deal(self.whole, count)[1])] if self.whole else [])])


def plan_cohorts(
    recipe: Recipe, students: Sequence[StudentSpec], nodes: Sequence[Node], costs: CostModel
) -> tuple[list[Cohort], list[Alternative]]:
    """Cut the students into cohorts, the longest first: as few as can be, one more only where it saves time.

    Returns:
        The cohorts, and what fewer and more of them would have come to.

    Raises:
        RecipeError: `cohorts` is less than the number of groups that cannot share a stream or a node's memory, or a
            student's share of a GPU is none that workers can have.
        MachineError: a cohort of a single student cannot fit the cluster.
        RefusedError: a student needs more memory than any node has.
    """
    groups = groups_of(students, recipe.device)
    for group in groups:
        check_gpus(group[0], recipe.device)
    if recipe.cohorts is not None and recipe.cohorts < len(groups):
        raise RecipeError(
            f"the students cannot be trained in {recipe.cohorts} cohorts",
            got=f"cohorts: {recipe.cohorts}",
            expected=f"at least {len(groups)}: other batch, workers, threads, gpus or store mean another stream",
            next="leave `cohorts` out, or give all students the same batches, workers and threads; takd stays apart",
        )
    loads = [_load(group, nodes, costs) for group in groups]
    least = sum(load.least for load in loads)
    if recipe.cohorts is not None and recipe.cohorts < least:
        raise RecipeError(
            f"the students do not fit the memory of a node in {recipe.cohorts} cohorts",
            got=f"cohorts: {recipe.cohorts}",
            expected=f"at least {least}",
            next="leave `cohorts` out, or raise it",
        )
    counts, tried = allocate(loads, nodes, recipe.cohorts)
    cohorts = [
        cohort for group, count in zip(groups, counts, strict=True) for cohort in cut(group, count, nodes, costs)
    ]
    return sorted(cohorts, key=costs.cohort_seconds, reverse=True), tried  # as `timetable` counts on


def least_asks(
    recipe: Recipe, students: Sequence[StudentSpec], costs: CostModel
) -> list[tuple[Cohort, ResourceRequest]]:
    """What cannot be cut any further: of each group of students that share a stream, the largest family and its ask."""
    largest = [max(families_of(group), key=costs.memory) for group in groups_of(students, recipe.device)]
    return [(family, costs.ask(family)) for family in largest]


def nodes_to_come(
    recipe: Recipe, students: Sequence[StudentSpec], nodes: Sequence[Node], costs: CostModel
) -> list[Node]:
    """The nodes to plan for where more may come: some for every student, up to MORE_NODES.

    Where they do not come, cohorts wait for their turn: that each saves more than its start costs keeps this cheap.
    """
    for _, ask in least_asks(recipe, students, costs):
        nodes = with_more(nodes, ask, max(ask.workers, min(ask.workers * len(students), MORE_NODES)))
    return list(nodes)


def check_gpus(spec: StudentSpec, device: str) -> None:
    """Refuse shares of GPUs that cannot be had.

    Raises:
        RecipeError: more than one GPU and a fraction; or several workers on one GPU, which NCCL refuses.
    """
    if not gpus_of(device):
        return
    if spec.gpus > 1 and spec.gpus != int(spec.gpus):
        raise RecipeError(
            f"{spec.name} asks for {spec.gpus:g} GPUs",
            got=f"gpus: {spec.gpus:g}",
            expected="a share of one GPU (0.5), or whole GPUs",
            next="change `gpus` of that student",
        )
    if spec.gpus < 1 and spec.workers > 1:
        raise RecipeError(
            f"the workers of {spec.name} could come to share a GPU, and NCCL does not let them talk there",
            got=f"workers: {spec.workers}, gpus: {spec.gpus:g}",
            expected="gpus: 1 where there are several workers",
            next="set `workers: 1` or `gpus: 1` for that student",
        )


def _load(group: Cohort, nodes: Sequence[Node], costs: CostModel) -> Load:
    families, wholes = families_of(group), costs.wholes_of(group)
    seconds = [costs.family_seconds(family) for family in families]
    least = _least_parts(group, nodes, costs)
    # The part that asks for most stands for all of them, so that no timetable counts on room that is not there.
    part = max(split_evenly(group, families, least, costs.family_seconds), key=costs.memory)
    return Load(
        sum(seconds),
        costs.ask(part),
        costs.stream_seconds(group),
        costs.stack_seconds(group),
        whole=tuple(map(costs.stepping_seconds, wholes)) if len(wholes) < len(families) else (),
        longest=max(seconds),
        parts=len(families),
        least=least,
        start=costs.starting,
    )


def _least_parts(group: Cohort, nodes: Sequence[Node], costs: CostModel) -> int:
    """Into how many cohorts a group must be cut so that each fits the cluster.

    Raises:
        AkdError: one of them would not even fit alone; as `check_room`.
    """
    families = families_of(group)
    largest = max(families, key=costs.memory)  # all else they ask for is the same
    check_room_for(largest, costs, nodes)
    count = 1
    while not _all_fit(split_evenly(group, families, count, costs.family_seconds), nodes, costs):
        count += 1  # each family alone fits
    return count


def _all_fit(parts: Sequence[Cohort], nodes: Sequence[Node], costs: CostModel) -> bool:
    return all(fits(nodes, costs.ask(part)) for part in parts)


def cut(group: Cohort, count: int, nodes: Sequence[Node], costs: CostModel) -> list[Cohort]:
    """Cut a group into so many cohorts of about equal time, each of which fits the cluster: stacks stay whole where it
    then ends sooner.

    More parts are not always smaller ones: they are of equal time, and students that take little of it and much memory
    may come together where they were apart. Then the longest parts of a cut that fits are halved instead.
    """
    families = _fitting_cut(group, families_of(group), count, costs.family_seconds, nodes, costs)
    stacks = _fitting_cut(group, costs.wholes_of(group), count, costs.stepping_seconds, nodes, costs)
    parts = min(filter(None, (families, stacks)), key=lambda parts: max(map(costs.cohort_seconds, parts)))
    while len(parts) < count:
        longest = max((part for part in parts if len(families_of(part)) > 1), key=costs.cohort_seconds)
        parts.remove(longest)
        parts += split_evenly(longest, families_of(longest), 2, costs.family_seconds)
    return parts


def _fitting_cut(
    group: Cohort,
    units: Sequence[Cohort],
    count: int,
    cost: Callable[[Cohort], float],
    nodes: Sequence[Node],
    costs: CostModel,
) -> list[Cohort] | None:
    """Units dealt out into so many parts, or as many fewer as it takes for all of them to fit; None if none do."""
    cuts = (split_evenly(group, units, fewer, cost) for fewer in range(count, 0, -1))
    return next((parts for parts in cuts if _all_fit(parts, nodes, costs)), None)


def check_room_for(cohort: Cohort, costs: CostModel, nodes: Sequence[Node]) -> None:
    """Refuse a cohort that would wait for ever; as `check_room`."""
    check_room(nodes, costs.ask(cohort), f"the cohort of {cohort[0].name}")


def allocate(loads: Sequence[Load], nodes: Sequence[Node], wanted: int | None) -> tuple[list[int], list[Alternative]]:
    """How many cohorts each group is cut into: so that the fleet ends soonest, where each start must save its cost.

    Cuts are tried one by one, each where the fleet then ends soonest, and the best of them by end and starts together
    is taken; or the one of as many cohorts as `wanted`. There may be more than run at a time: others wait their turn.
    It is over when the starts alone of one more would cost what the best of them saves; one more is always tried.

    Returns:
        The counts, and each number of cohorts that was tried, with the seconds to the end.
    """

    def end(cut: list[int]) -> tuple[float, float]:
        queue = sorted(
            ((load.each(count), load.ask) for load, count in zip(loads, cut, strict=True) for _ in range(count)),
            key=lambda one: one[0],
            reverse=True,
        )
        ends = [stop for _, stop in timetable(queue, nodes)]
        return max(ends), sum(ends)

    counts = [load.least for load in loads]
    best, tried = counts, [Alternative(sum(counts), end(counts)[0])]
    # More cohorts may pay only once they fill another round on all CPUs, so as many as that are tried beyond the best.
    slots = 1 + sum(int(node.cpus) for node in nodes)
    work = sum(load.seconds * load.ask.workers * load.ask.cpus for load in loads)
    # However they are cut, students end no sooner than all work shared out over all CPUs, or than the dearest alone.
    soonest = max(work / sum(node.cpus for node in nodes), *(load.each(load.parts) for load in loads))
    start = loads[0].start
    lowest = tried[0].seconds + start * sum(counts)

    def goes_on(total: int) -> bool:
        if wanted is not None:
            return total < wanted
        return total <= sum(best) or (total < sum(best) + slots and soonest + start * (total + 1) < lowest)

    while goes_on(sum(counts)):
        finer = [
            [count + (index == chosen) for index, count in enumerate(counts)]
            for chosen, load in enumerate(loads)
            if counts[chosen] < load.parts
        ]
        if not finer:
            break
        (seconds, _), counts = min(((end(cut), cut) for cut in finer), key=lambda one: one[0])
        tried.append(Alternative(sum(counts), seconds))
        cost = tried[-1].seconds + start * sum(counts)
        if wanted is not None or cost < lowest:
            best, lowest = counts, cost
    return best, tried


def split_evenly(group: Cohort, units: Sequence[Cohort], count: int, cost: Callable[[Cohort], float]) -> list[Cohort]:
    """Cut a group into at most `count` parts of about equal cost, the students of each in the order of the group.

    Args:
        units: its students, by those who stay together, as those of a stage I do.
        cost: of a unit.
    """
    dealt, _ = deal([cost(unit) for unit in units], min(count, len(units)))
    parts = [[spec for index in one for spec in units[index]] for one in dealt]
    order = {spec.name: index for index, spec in enumerate(group)}
    return [tuple(sorted(part, key=lambda spec: order[spec.name])) for part in parts]


def deal(costs: Sequence[float], count: int) -> tuple[list[list[int]], list[float]]:
    """Deal out things to so many parts, the dearest first, each where there is least yet.

    Returns:
        The indices of each part's things, and what they cost together.
    """
    parts, sums = [list[int]() for _ in range(count)], [0.0] * count
    for index in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        lightest = sums.index(min(sums))
        parts[lightest].append(index)
        sums[lightest] += costs[index]
    return parts, sums
