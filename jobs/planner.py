"""Plan cohorts: which students share a stream and a worker, and whether another cohort is worth its start."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

from akd_dist.cohort import CohortJob
from akd_dist.device import autocast, gpus_of, weights_dtype
from akd_dist.jobs.train_teacher import Stores
from akd_dist.models import ModelCard, build
from akd_dist.recipe import Recipe, Student
from akd_dist.rows import Splits
from akd_dist.storage.errors import RecipeError

# What starting and stopping one Ray Train run costs, whatever it trains (measured: 9 to 14 s on 2 cores, Ray 2.60).
START_SECONDS = 14.0
PROBE_STEPS = 4
UNKNOWN_SECONDS = 1e-6  # not 0, by which all students would land in one cohort and leave the others empty

Cohort = tuple[Student, ...]
log = logging.getLogger(__name__)


def groups_of(students: list[Student]) -> list[Cohort]:
    """Students that can share a stream and a worker: those of one batch size, number of workers, threads and store.

    Those that learn from labels alone ride with the teacher's store.
    """
    groups = defaultdict(list)
    for spec in students:
        groups[spec.batch, spec.workers, spec.threads, learns_from_assistant(spec)].append(spec)
    return [tuple(group) for group in groups.values()]


def learns_from_assistant(spec: Student) -> bool:
    """Whether a student reads the store of the last assistant, not the teacher's."""
    return spec.objective.learns_from == "assistant"


def cohort_job(base: CohortJob, cohort: Cohort, assistant: Stores) -> CohortJob:
    """The job of a cohort: its students, and the stores that they learn from."""
    return replace(base, students=cohort, stores=assistant if learns_from_assistant(cohort[0]) else base.stores)


def cpus_of(cohort: Cohort) -> int:
    """CPUs that a cohort occupies."""
    return cohort[0].workers * cohort[0].threads


def plan_cohorts(recipe: Recipe, students: list[Student], cpus: int, splits: Splits, gpus: int = 0) -> list[Cohort]:
    """Cut the students into cohorts, the longest first: as few as can be, one more only where it saves time.

    Args:
        cpus: CPUs of the whole cluster.
        gpus: its GPUs; where the recipe computes on these, they are what cohorts are planned for.

    Raises:
        RecipeError: `cohorts` is less than the number of groups that cannot share a stream.
    """
    groups = groups_of(students)
    if recipe.cohorts is not None and recipe.cohorts < len(groups):
        raise RecipeError(
            f"the students cannot be trained in {recipe.cohorts} cohorts",
            got=f"cohorts: {recipe.cohorts}",
            expected=f"at least {len(groups)}: other batch, workers, threads or store mean another stream",
            next="leave `cohorts` out, or give all students the same batch, workers and threads; takd stays apart",
        )
    cost = _costs(recipe, students, splits)
    seconds = [sum(cost(spec) for spec in group) for group in groups]
    if gpus_of(recipe.device):
        counts = allocate(seconds, [group[0].workers for group in groups], gpus, recipe.cohorts)
    else:
        counts = allocate(seconds, [cpus_of(group) for group in groups], cpus, recipe.cohorts)
    parts = (split_evenly(group, count, cost) for group, count in zip(groups, counts, strict=True))
    cohorts = [cohort for part in parts for cohort in part]
    return sorted(cohorts, key=lambda cohort: sum(map(cost, cohort)), reverse=True)  # as `makespan` counts on


def allocate(seconds: list[float], cpus_each: list[int], cpus: int, wanted: int | None) -> list[int]:
    """How many cohorts each group is cut into.

    Every group has one; the next one goes where the fleet then ends soonest, while that is sooner by more than a start
    costs; or until there are as many as `wanted`. There may be more cohorts than run at a time: others wait their turn.

    Args:
        seconds: what the students of each group take together.
        cpus_each: CPUs (or GPUs, where these are counted) of one cohort of each group.
        cpus: those of the cluster.
    """
    counts = [1] * len(seconds)

    def end(cut: list[int]) -> float:
        return makespan(
            [
                (total / count + START_SECONDS, each)
                for total, each, count in zip(seconds, cpus_each, cut, strict=True)
                for _ in range(count)
            ],
            cpus,
        )

    while wanted is None or sum(counts) < wanted:
        finer = [[count + (index == chosen) for index, count in enumerate(counts)] for chosen in range(len(counts))]
        best = min(finer, key=end)
        if wanted is None and end(counts) - end(best) <= START_SECONDS:
            break
        counts = best
    return counts


def makespan(cohorts: list[tuple[float, int]], cpus: int) -> float:
    """When the last cohort ends, if the longest start first and each starts once there are CPUs for it.

    Args:
        cohorts: (seconds, CPUs) of each.
        cpus: those of the cluster; a cohort that wants more is taken to have them all.
    """
    free_at = [0.0] * max(cpus, 1)
    for seconds, each in sorted(cohorts, reverse=True):
        wanted = min(each, len(free_at))
        free_at.sort()
        free_at[:wanted] = [free_at[wanted - 1] + seconds] * wanted
    return max(free_at)


def split_evenly(group: Cohort, count: int, cost: Callable[[Student], float]) -> list[Cohort]:
    """Cut a group into at most `count` parts of about equal cost: the dearest first, each where there is least yet."""
    parts: list[list[Student]] = [[] for _ in range(min(count, len(group)))]
    loads = [0.0] * len(parts)
    for spec in sorted(group, key=cost, reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest].append(spec)
        loads[lightest] += cost(spec)
    place = {spec.name: index for index, spec in enumerate(group)}
    return [tuple(sorted(part, key=lambda spec: place[spec.name])) for part in parts]


def _costs(recipe: Recipe, students: list[Student], splits: Splits) -> Callable[[Student], float]:
    """Seconds that a student will train, from a probe of each distinct model and batch on this machine."""
    probed: dict[str, float] = {}
    for spec in students:
        if (key := _probe_key(spec)) not in probed:
            probed[key] = _probe(recipe, spec, splits)

    def cost(spec: Student) -> float:
        steps = math.ceil(len(splits.train) / spec.batch) * spec.objective.epochs
        return probed[_probe_key(spec)] * steps / spec.workers

    return cost


def _probe_key(spec: Student) -> str:
    return f"{spec.model.model_dump_json()} {spec.batch} {spec.threads} {spec.precision}"


def _probe(recipe: Recipe, spec: Student, splits: Splits) -> float:
    """Seconds of one training step, measured here and now.

    A model that fails counts as next to nothing, and its worker will tell of it; so does every model of a recipe for
    GPUs where this machine has none, and then all count alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    device = torch.device(recipe.device)
    try:
        module = build(ModelCard.of(spec.model, splits.train, recipe.data.normalize), seed=0)
        module.to(device, weights_dtype(spec.precision))
        inputs = torch.from_numpy(splits.train.read(0, min(spec.batch, len(splits.train)))[0].copy()).to(device)
        best = math.inf
        for _ in range(PROBE_STEPS):
            started = time.perf_counter()
            with autocast(device, spec.precision):
                logits = module(inputs)
            loss = logits.float().square().mean()
            loss.backward()
            loss.item()  # waits for a GPU
            best = min(best, time.perf_counter() - started)
    except Exception as error:
        log.warning("the probe of %s failed: %s", spec.name, error)
        return UNKNOWN_SECONDS
    finally:
        torch.set_num_threads(threads)
    return 1.5 * best  # an optimizer step and its bookkeeping come on top
