"""The rows of a command: prepared in this node's cache, or as blocks under the store root. Those serve all nodes of a
cluster, and any number of them fits one machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.data.blocks import default_threads
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.row_fetch import distant_rows
from akd_dist.data.row_store import Prepared, RowsPlan, Take, ensure_rows, find_prepared
from akd_dist.data.rows import Splits
from akd_dist.jobs.stopping import stop_on_signals
from akd_dist.storage.node_cache import NoRoomError, default_budget
from akd_dist.storage.receipts import Packer
from akd_dist.storage.rows import BlockReceipt
from akd_dist.tracking.progress import Meter, meter, tell_once

if TYPE_CHECKING:
    from akd_dist.jobs.train_teacher import Workspace

SMALL = 64 * 2**20
"""Bytes of rows that the driver writes by itself: a moment, for which no node need be there."""


def prepare_shown(
    data: recipes.DataSpec, cache_root: str, console: Console, *, again: bool = False, most: int | None = None
) -> Splits:
    """`row_cache.prepare`, with a meter for each source and each fingerprint, and a line for each finding."""
    with _metered(console, "preparing") as update:
        splits = prepare(data, Path(cache_root), on_progress=update, again=again, most=most)
    return _told(splits, console)


def rows_of_recipe(
    recipe: recipes.Recipe, workspace: Workspace, *, again: bool = False, only_look: bool = False
) -> Splits:
    """The rows of a recipe, and those of its teacher where it learns from more: on this machine, or for a cluster.

    Args:
        again, only_look: as of `rows_of_cluster`.

    Raises:
        AkdError: as `rows_of_machine` and `rows_of_cluster`.
    """

    def rows_of(data: recipes.DataSpec) -> Splits:
        if workspace.address is None:
            return rows_of_machine(data, workspace, again=again)
        return rows_of_cluster(data, workspace, again=again, only_look=only_look)

    splits = rows_of(recipe.data)
    if recipe.data_of_teachers is None:
        return splits
    return dataclasses.replace(splits, of_teacher=rows_of(recipe.data_of_teachers))


def rows_of_machine(data: recipes.DataSpec, workspace: Workspace, *, again: bool = False) -> Splits:
    """The rows of a command on this machine: in its cache; or as sealed blocks under the store root where the cache has
    no room for all of them, or where they would take more than half of $AKD_DIST_CACHE_BUDGET.

    Raises:
        AkdError: as `row_cache.prepare` and `row_store.ensure_rows`.
    """
    budget = default_budget()
    try:
        most = None if budget is None else budget // 2
        return prepare_shown(data, workspace.cache_root, workspace.console, again=again, most=most)
    except NoRoomError as error:
        workspace.tell(f"{error.what}, and are kept under the store root: {error.got}, {error.expected}")
    return _sealed(data, workspace, again=again)


def rows_of_cluster(data: recipes.DataSpec, workspace: Workspace, *, again: bool, only_look: bool) -> Splits:
    """The rows of a command on a cluster: sealed blocks under the store root, of which this node holds none.

    Nodes need no sources then, but for those that write blocks. A command that only looks, and finds no such rows,
    prepares them here.

    Args:
        again: prepare them afresh, whatever was prepared before.
        only_look: write nothing but to this node's cache.

    Raises:
        AkdError: as `row_store.ensure_rows` and `row_fetch.distant_rows`; what was written is kept.
    """
    console = workspace.console
    if only_look:
        prepared = None if again else find_prepared(data, workspace.store_root)
        if prepared is None:
            try:
                return prepare_shown(data, workspace.cache_root, console, again=again)
            except NoRoomError as error:
                error.next = "run the command itself, which needs no room for rows on the driver; or " + str(error.next)
                raise
        splits = _opened(prepared, console)
    else:
        splits = _sealed(data, workspace, again=again)
    if workspace.folder is not None:
        workspace.folder.leave_out_sources()
    return splits


def _sealed(data: recipes.DataSpec, workspace: Workspace, *, again: bool) -> Splits:
    """The rows as sealed blocks under the store root, of which this node holds none; written as far as they miss."""
    with _metered(workspace.console, "preparing") as update:
        prepared = ensure_rows(
            data,
            workspace.store_root,
            functools.partial(_write, workspace),
            again=again,
            hold=functools.partial(_hold, workspace),
            on_progress=update,
        )
    return _opened(prepared, workspace.console)


def _opened(prepared: Prepared, console: Console) -> Splits:
    return _told(dataclasses.replace(distant_rows(prepared.sealed), sources=prepared.sources), console)


def _hold(workspace: Workspace, name: str) -> contextlib.AbstractContextManager[None]:
    """Hold rows that are about to be written.

    Few are written without the cluster, which has to be there all the same.
    """
    if workspace.address is not None:
        from akd_dist.jobs import cluster

        cluster.check_address(workspace.address)
    return workspace.claim(name)


def _write(workspace: Workspace, plan: RowsPlan, take: Take) -> None:
    """Write the blocks that are missing: here on one machine, or if they are few; else by tasks on the nodes that see
    the sources."""
    packer = Packer(plan.job.writer.store, BlockReceipt)
    done = 0
    with meter(workspace.console, "preparing the rows", plan.rows) as shown:

        def count(written: list[BlockReceipt] | None) -> None:
            nonlocal done
            for receipt in written or ():
                packer.add(receipt)
                done += receipt.rows
            shown.update(done)
            take(written)

        shown.update(0)
        try:
            if workspace.address is None or plan.job.writer.creation.bytes_of(plan.rows) <= SMALL:
                for run in plan.runs:
                    count(write_run(plan.job, run, threads=default_threads()))
            else:
                _write_on_ray(workspace, plan, count)
        finally:
            packer.flush()


def _write_on_ray(workspace: Workspace, plan: RowsPlan, take: Take) -> None:
    from akd_dist.jobs import cluster
    from akd_dist.jobs.shared import Shared
    from akd_dist.jobs.tasks import Task, run_tasks

    # The cluster is left again: what the command does next begins by looking, and may refuse.
    with cluster.closing(), stop_on_signals(workspace.tell) as stop:
        working = dataclasses.replace(workspace, stop=stop)
        working.connect()
        folder = None if workspace.folder is None else workspace.folder.for_rows()
        folders = {"the store root": workspace.store_root}
        with Shared(folders, workspace.cache_root, workspace.tell, demand=workspace.demand(), folder=folder) as shared:
            run_tasks(
                write_run,
                [Task(str(run), plan.job, run) for run in plan.runs],
                threads=1,
                gpus=0,
                shared=shared,
                stop=stop,
                on_result=lambda _, written: take(written),
                count=len(plan.runs),
            )
        if stop:
            told = "stopped; the blocks of rows that were written are kept"
            raise stop.error(told, "the same command goes on with the missing blocks")


@contextlib.contextmanager
def _metered(console: Console, doing: str) -> Iterator[Progress]:
    """What shows a meter for each thing that is done."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Meter] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(meter(console, f"{doing} {what}", total))
                shown[what].update(0)
            shown[what].update(done)

        yield update


def _told(splits: Splits, console: Console) -> Splits:
    for line in splits.findings:
        tell_once(console, line)
    return splits
