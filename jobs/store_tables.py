"""What stores have once for all shards, made before the first of these: each store's by a task of its own."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from akd_dist.base.formatting import counted
from akd_dist.distill.caching import prepare_store
from akd_dist.distill.teacher import CacheJob
from akd_dist.jobs.local_tasks import LocalTasks
from akd_dist.jobs.planning.models import SplitPlan
from akd_dist.jobs.shared import Shared
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.tasks import Task, run_tasks
from akd_dist.storage.writer import missing_shards
from akd_dist.tracking.progress import meter, tell

Prepared = Sequence[tuple[SplitPlan, CacheJob]]


def prepare_in_tasks(
    prepared: Prepared,
    name: str,
    *,
    threads: int,
    gpus: int,
    shared: Shared | LocalTasks,
    stop: StopFlag,
    console: Console,
) -> None:
    """Make them by tasks, and look anew at what is missing.

    Args:
        name: of the model, for messages.
        shared: the nodes that tasks may run on, or this machine without Ray.
    """
    tasks = [Task(f"what describes the {plan.split} rows of {name}", job, None) for plan, job in prepared]
    if not tasks:
        return
    tell(console, f"describing what {name} says, once for all shards of {counted(len(tasks), 'store')}")
    with meter(console, f"describing what {name} says", len(tasks), "stores") as shown:
        done = iter(range(1, len(tasks) + 1))
        shown.update(0)
        run_tasks(
            prepare_store,
            tasks,
            threads=threads,
            gpus=gpus,
            shared=shared,
            stop=stop,
            on_result=lambda task, found: shown.update(next(done)),
            count=len(tasks),
        )
    if not stop:
        look_again(prepared)


def prepare_here(prepared: Prepared) -> None:
    """The same in a plain loop."""
    for _, job in prepared:
        prepare_store(job)
    look_again(prepared)


def look_again(prepared: Prepared) -> None:
    """Shards that were described by another dictionary than there is now count as missing."""
    for plan, _ in prepared:
        assert plan.writer is not None
        plan.unprepared, plan.missing = False, missing_shards(plan.writer)
