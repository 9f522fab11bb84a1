"""Cache a teacher, and the assistants below it: plan the missing shards, run them as tasks, verify, seal.

akd-dist cache-teacher jobs/digits.yaml
"""

import contextlib
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base.errors import AkdError
from akd_dist.base.locks import file_lock
from akd_dist.data.rows import Rows, Splits, blocks_in_common, first_difference
from akd_dist.distill.caching import cache_shard, cache_shards
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.teacher import CacheJob
from akd_dist.documents.cache import CachedAssistant, CachedMember, CacheDocument, CachedSplit, CachedSplits
from akd_dist.jobs.idle import IdleWorkers
from akd_dist.jobs.planning.caching import (
    Inputs,
    check_room,
    checks_of,
    foresee_caching,
    given_teacher,
    look_up,
    model_at,
    next_below,
    open_inputs,
    source_of,
    tell_of_chance,
)
from akd_dist.jobs.planning.creations import computed_on
from akd_dist.jobs.planning.models import CachedModel, SplitPlan, count_of, levels_of
from akd_dist.jobs.planning.windows import check_chain
from akd_dist.jobs.prepare_rows import rows_of_machine
from akd_dist.jobs.stopping import stop_on_signals
from akd_dist.jobs.train_teacher import Run, Workspace, ensure_trained, run_in_process, run_in_task
from akd_dist.models.device import gpus_of
from akd_dist.options import CacheOptions
from akd_dist.recipe import NoAugmentation, Recipe
from akd_dist.storage import catalog, removal
from akd_dist.storage.layout import RECEIPTS
from akd_dist.storage.manifest import Manifest, differences
from akd_dist.storage.receipts import Packer
from akd_dist.storage.records import Receipt
from akd_dist.storage.roots import open_root
from akd_dist.storage.tables import find_fidelity, find_tables
from akd_dist.storage.uses import using
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store, take_shards
from akd_dist.tracking.progress import meter, tell

Compute = Callable[[CachedModel, Recipe, Workspace], None]
"""Computes the missing shards of a model."""


def cache_teacher(recipe: Recipe, options: CacheOptions, idle: IdleWorkers | None = None) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for the recipe's train, validation and test rows.

    Where the teacher has assistants, each is trained from the store of the model above it, and cached alike.

    Args:
        idle: workers of this machine that were started for it.

    Returns:
        The document that `akd-dist cache-teacher --json` prints.

    Raises:
        AkdError: see the exit codes; nothing that was computed is lost.
    """
    from akd_dist.jobs import cluster

    started, recipe = time.monotonic(), recipe.own()
    workspace = Workspace.of(options, recipe, idle=idle)
    inputs = open_inputs(recipe, workspace, students=False, again=options.prepare_again, only_look=options.dry_run)
    with cluster.closing():
        if workspace.address is not None:
            workspace.join()
        plan = foresee_caching(inputs, workspace)
        if options.dry_run:
            return plan.plain()
        models = cache_planned(inputs, workspace)
    inputs.splits.sources.finish()
    return document_of(inputs.recipe, models, time.monotonic() - started).plain()


def cache_planned(inputs: Inputs, workspace: Workspace) -> list[CachedModel]:
    """Cache what is missing, once `foresee_caching` has found nothing to refuse: train, compute and seal."""
    from akd_dist.jobs import cluster

    for check in checks_of(inputs.models):
        workspace.tell(check.line)
    with cluster.closing(), stop_on_signals(workspace.tell) as stop:
        workspace = replace(workspace, stop=stop)
        return walk_chain(inputs.recipe, inputs.splits, inputs.models, workspace, run_in_task, compute_in_tasks)


def cache_in_process(recipe: Recipe, teacher_uri: str, *, store_root: str, cache_root: str) -> dict[str, Any]:
    """The same stores by a plain loop in this process; the bytes are those of the tasks."""
    started = time.monotonic()
    workspace = Workspace(store_root, cache_root, console=Console(stderr=True))
    splits = rows_of_machine(recipe.own().data, workspace)
    teacher = model_at("the teacher", teacher_uri, recipe, splits)
    look_up(teacher, recipe, workspace)
    models = walk_chain(recipe, splits, [teacher], workspace, run_in_process, compute_in_process)
    splits.sources.finish()
    return document_of(recipe, models, time.monotonic() - started).plain()


def walk_chain(
    recipe: Recipe, splits: Splits, there: Sequence[CachedModel], workspace: Workspace, run: Run, compute: Compute
) -> list[CachedModel]:
    """Cache the teacher; then train each assistant from the store of the model above it, and cache it in turn.

    Args:
        there: the models that need no training, looked up: from the teacher on.
        run: trains a model.
        compute: computes the missing shards of a model.
    """
    complete = len(there) == count_of(recipe) and all(len(one.opened) == len(one.plans) for one in there)
    with contextlib.nullcontext() if complete else _using_rows(splits, workspace):
        return _walk_chain(recipe, splits, there, workspace, run, compute)


@contextlib.contextmanager
def _using_rows(splits: Splits, workspace: Workspace) -> Iterator[None]:
    """Say of rows that are sealed under a store root that they are in use, so that nobody removes them meanwhile.

    There may be no run yet, and other commands may work with the same rows: what stands for this one is a lock of its
    own in this node's cache.

    Raises:
        RefusedError: they were removed just now.
    """
    if (sealed := splits.train.sealed) is None:
        yield
        return
    run = Path(workspace.cache_root, "caching", f"{os.getpid()}-{secrets.token_hex(4)}").absolute()
    lock = run.with_suffix(".lock")
    with file_lock(lock, what="the caching"), using([sealed.uri], run=str(run), lock=lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _walk_chain(
    recipe: Recipe, splits: Splits, there: Sequence[CachedModel], workspace: Workspace, run: Run, compute: Compute
) -> list[CachedModel]:
    models: list[CachedModel] = []
    while len(models) < count_of(recipe):
        trained = next_below(recipe, splits, models)
        if len(models) < len(there):
            model = there[len(models)]
            if trained is not None:
                workspace.sweep(trained.claim)
        elif trained is None:  # of an ensemble, where one before it was still to be trained
            model = given_teacher(recipe, len(models), splits, workspace)
            look_up(model, recipe, workspace)
        else:
            check_chain(recipe, splits, workspace, len(levels_of(recipe, models)))
            uri = ensure_trained(trained, recipe, splits, workspace, run)
            model = model_at(trained.name, uri, recipe, splits)
            look_up(model, recipe, workspace)
        _fill(model, recipe, workspace, compute)
        tell_of_chance(model, workspace.console)
        models.append(model)
    return models


def _fill(model: CachedModel, recipe: Recipe, workspace: Workspace, compute: Compute) -> None:
    """Compute and seal the stores of a model that were not found; those that are there are not touched."""
    for plan in model.plans:
        if plan.store is not None:
            workspace.sweep(plan.identity.id)
    wanted = [plan for plan in model.plans if plan.store is None]
    if not wanted:
        return
    with contextlib.ExitStack() as claims:
        for plan in wanted:
            # In the order of the splits, always: two commands never hold what the other one waits for.
            claims.enter_context(workspace.claim(plan.identity.id))
        # Asked only now that something has to be computed: on a cluster this takes a task on a GPU.
        device = workspace.device(recipe.device)
        # Pushed last, so that it runs first, while the claims are still held.
        claims.push(functools.partial(_leave_nothing, wanted, workspace.store_root))
        for plan in wanted:
            plan.creation = computed_on(device, plan.creation)
            _open_for_writing(plan, recipe, workspace.store_root, workspace.console)
        if model.missing:
            check_room(workspace.store_root, sum(plan.missing_bytes for plan in model.plans), recipe)
            if model.imported is not None:
                model.imported.publish(model.model_uri, Path(workspace.cache_root))
            compute(model, recipe, workspace)
        for plan in wanted:
            if plan.writer is not None:
                seal_store(plan.writer)
                plan.store = catalog.find_store(workspace.store_root, plan.identity)


def _leave_nothing(plans: list[SplitPlan], store_root: str, kind: type[BaseException] | None, *_: object) -> None:
    """After a refusal: stores that were begun, and have no shard yet, would only be in the way."""
    if kind is not None:
        for plan in plans:
            with contextlib.suppress(AkdError):  # the first error is the one to tell
                removal.discard_if_empty(store_root, plan.identity.id)


def _open_for_writing(plan: SplitPlan, recipe: Recipe, store_root: str, console: Console) -> None:
    """Once the claim is held: whoever held it before may have sealed the store, or left part of it."""
    plan.store, plan.missing = catalog.find_store(store_root, plan.identity), []
    if plan.store is None:
        narrower = [] if plan.identity.tables else catalog.narrower_stores(store_root, plan.identity)
        if (source := source_of(plan, narrower)) is not None:
            _check_views(source, plan.rows, recipe.data)
        # Refused here, and not by the first task, after the teacher has been loaded and run.
        open_root(store_root).check_writable()
        hint = {"recipe": recipe.document(f"{store_root}/{plan.identity.id}"), "split": plan.split}
        plan.writer = create_store(store_root, plan.creation, hint)
        plan.unprepared = not _is_prepared(plan.writer)
        if plan.unprepared:  # what is missing is known once it is known what shards are to be described by
            done = set(plan.writer.store.list(RECEIPTS))
            plan.missing = [shard for shard in plan.identity.layout.shards() if shard.receipt_key not in done]
        else:
            plan.missing = missing_shards(plan.writer)
        if narrower:
            _take_views(plan, plan.writer, narrower, console)
        else:
            _tell_of_other_rows(plan, store_root, console)


def _check_views(source: Manifest, rows: Rows, data: recipes.DataSpec) -> None:
    """Refuse to put new views beside those of a store that were drawn otherwise.

    An identity knows the file of a user's own augmentation, and not what it imports.

    Raises:
        RefusedError: as `Stream.check_probes`.
    """
    stream = BatchStream(rows, None, data.augmentation, data.seed, views=source.identity.views, batch=1)
    stream.check_probes(source)


def _take_views(plan: SplitPlan, writer: StoreWriter, narrower: list[Manifest], console: Console) -> None:
    """Take what a sealed store of fewer views has: a view's shards do not depend on how many views there are."""
    source = source_of(plan, narrower)
    if source is None:
        nearest = narrower[0]
        differing = "; ".join(differences(plan.creation.computed, nearest.computed))
        there = f"store {nearest.id[:12]} has {_views(0, nearest.identity.views)}, computed in another way"
        tell(console, f"{there} ({differing}): all views are computed anew")
        return
    taken = set(take_shards(writer, source, plan.missing))
    plan.missing = [shard for shard in plan.missing if shard not in taken]
    views = source.identity.views
    if taken:
        there = f"taken from store {source.id[:12]}: {_views(0, views)}"
        tell(console, f"{there}; to be computed: {_views(views, plan.identity.views)}")
    for shard in plan.missing:
        if shard.view < views:
            mend = f"akd-dist stores repair {source.id[:12]} --store-root {writer.root_uri}"
            tell(console, f"{shard} of store {source.id[:12]} is damaged, and is computed anew; to mend it: {mend}")


def _views(first: int, stop: int) -> str:
    return f"view {first}" if stop == first + 1 else f"views {first} to {stop - 1}"


def _tell_of_other_rows(plan: SplitPlan, store_root: str, console: Console) -> None:
    """Say so if only the rows keep a sealed store from serving: of several, the one that differs last."""
    ours = plan.creation.dataset
    alike = catalog.stores_of_other_rows(store_root, plan.identity, plan.split)
    if alike:
        nearest = max(alike, key=lambda other: blocks_in_common(ours, other.dataset))
        tell(
            console,
            f"the {plan.split} rows are not those of store {nearest.identity.id[:12]}, which differs in nothing else: "
            f"{first_difference(ours, nearest.dataset)}",
        )


def compute_in_tasks(model: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
    """Run the missing shards of all splits as one bounded stream of tasks."""
    from akd_dist.jobs.shard_tasks import ShardTasks
    from akd_dist.jobs.store_tables import prepare_in_tasks
    from akd_dist.jobs.tasks import Task, at_once, run_tasks

    stop = workspace.connect()
    threads, gpus = recipe.cache.threads, gpus_of(recipe.device)
    by_split = {plan.split: plan for plan in model.plans}
    packers = {plan.split: Packer(plan.writer.store, Receipt) for plan in model.plans if plan.writer is not None}
    done = 0
    with workspace.shared() as shared:
        tables = _unprepared(model, recipe, workspace)
        given: dict[str, Any] = {"threads": threads, "gpus": gpus, "shared": shared, "stop": stop}
        prepare_in_tasks(tables, model.name, **given, console=workspace.console)
        tasks = ShardTasks(lambda: at_once(shared.nodes(), threads, gpus))
        # All splits together, so that no CPU is idle while the last shards of one of them are computed.
        for plan in model.plans:
            if plan.missing:
                job = cache_job(plan, recipe, model.model_uri, workspace.cache_root)
                tasks.add(f"{plan.split} rows of {model.name}", job, plan.missing)
        unit = "rows" if model.plans[0].identity.items is None else "targets"
        with meter(workspace.console, f"caching {model.name}", tasks.rows, unit) as shown:

            def count(task: Task, receipts: list[Receipt]) -> None:
                nonlocal done
                for receipt in receipts:
                    packers[task.job.split].add(receipt)
                by_split[task.job.split].computed += len(receipts)
                tasks.took(receipts)
                done += sum(shard.rows for shard in task.item)
                shown.update(done)

            shown.update(0)
            try:
                run_tasks(
                    cache_shards,
                    tasks,
                    threads=threads,
                    gpus=gpus,
                    stop=stop,
                    on_result=count,
                    shared=shared,
                    count=tasks.count,
                )
            finally:
                for packer in packers.values():
                    packer.flush()
    if stop:
        told = f"stopped; the {sum(plan.computed for plan in model.plans)} shards that this run computed are kept"
        raise stop.error(told, "the same command carries on with the missing shards")


def compute_in_process(model: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
    """The missing shards in a plain loop."""
    from akd_dist.jobs.store_tables import prepare_here

    prepare_here(_unprepared(model, recipe, workspace))
    for plan in model.plans:
        if plan.missing:
            job = cache_job(plan, recipe, model.model_uri, workspace.cache_root)
            for shard in plan.missing:
                cache_shard(job, shard)
                plan.computed += 1


def _is_prepared(writer: StoreWriter) -> bool:
    """Whether a store has what it has once for all shards, its card among it: whoever makes them may die in between."""
    identity = writer.creation.identity
    if identity.is_top_k and find_fidelity(writer.store, writer.creation_sha256) is None:
        return False
    return len(find_tables(writer)) == len(identity.tables)


def _unprepared(model: CachedModel, recipe: Recipe, workspace: Workspace) -> list[tuple[SplitPlan, CacheJob]]:
    """The splits whose stores lack what they have once for all shards."""
    return [
        (plan, cache_job(plan, recipe, model.model_uri, workspace.cache_root))
        for plan in model.plans
        if plan.unprepared
    ]


def cache_job(plan: SplitPlan, recipe: Recipe, teacher_uri: str, cache_root: str) -> CacheJob:
    """What a task needs beside its shard."""
    assert plan.writer is not None
    return CacheJob(
        store=plan.writer,
        data=recipe.data,
        split=plan.split,
        teacher_uri=teacher_uri,
        teacher=plan.identity.teacher,
        augmentation=recipe.data.augmentation if plan.split == "train" else NoAugmentation(),
        cache=recipe.cache,
        cache_root=cache_root,
        trusted=recipe.trusted,
        device=recipe.device,
        rows=plan.rows.sealed,
    )


def document_of(recipe: Recipe, models: Sequence[CachedModel], seconds: float) -> CacheDocument:
    """What `cache-teacher` prints of the stores of all models."""
    count = len(recipe.teacher.each)
    teachers, assistants = models[:count], models[count:]
    hit = all(plan.writer is None for model in models for plan in model.plans)
    below = [
        CachedAssistant(
            **_stores(one), model=one.card.model.label, path=one.model_uri, fingerprint=one.card.fingerprint
        )
        for one in assistants
        if one.card is not None
    ]
    members = [
        CachedMember(**_stores(one), name=one.name, share=share)
        for one, share in zip(teachers, recipe.teacher.shares, strict=True)
        if recipe.teacher.members is not None
    ]
    whole = {"hit": hit, "seconds": round(seconds, 3), "members": members, "assistants": below}
    return CacheDocument(**_stores(teachers[0]) | whole)


def _stores(model: CachedModel) -> dict[str, Any]:
    """The train store of a model, and those of the other splits, as fields."""
    parts = {plan.split: _sealed(plan) for plan in model.plans}
    train = {name: value for name, value in parts["train"] if name in parts["train"].model_fields_set}
    return train | {"splits": CachedSplits(validation=parts.get("validation"), test=parts.get("test"))}


def _sealed(plan: SplitPlan) -> CachedSplit:
    store = plan.store
    assert store is not None
    return CachedSplit(
        store=store.uri,
        id=store.id,
        hit=plan.writer is None,
        rows=store.num_rows,
        views=store.views,
        classes=store.classes,
        encoding=str(plan.identity.encoded),
        bytes=sum(store.manifest.sizes().values()),
        shards=store.layout.shard_count,
        shards_computed=plan.computed,
        unlabelled=plan.rows.unlabelled,
        **({} if plan.identity.items is None else {"targets": plan.identity.items}),
    )
