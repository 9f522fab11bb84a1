"""Cache a teacher, and the assistants below it: plan the missing shards, run them as Ray tasks, verify, seal.

akd-dist cache-teacher jobs/digits.yaml
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base.errors import AkdError, MachineError, RefusedError
from akd_dist.base.files import check_folder
from akd_dist.base.trusted import Trusted
from akd_dist.data.findings import near_chance
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import SPLITS, Rows, Splits, blocks_in_common, first_difference
from akd_dist.data.views import by_content, check_augmentation
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.teacher import CacheJob, cache_shard, compute_shard, served_fingerprint
from akd_dist.distill.trial import try_teacher, try_training
from akd_dist.jobs import packing
from akd_dist.jobs.packing import Node
from akd_dist.jobs.train_teacher import (
    Run,
    Stores,
    Workspace,
    assistant_of,
    ensure_teacher,
    ensure_trained,
    is_there,
    run_in_process,
    run_on_ray,
    teacher_of,
)
from akd_dist.models.card import ModelCard
from akd_dist.models.device import device_name, gpus_of
from akd_dist.models.folder import load_card
from akd_dist.options import CacheOptions
from akd_dist.recipe import NoAugmentation, Recipe
from akd_dist.storage import catalog, removal
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.layout import CREATION_KEY, FORMAT_VERSION, RECEIPTS, SOURCE_KEY, Shard, StoreLayout
from akd_dist.storage.manifest import Computed, Creation, Identity, Manifest, Receipt, differences
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.repair import repair_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store, take_shards
from akd_dist.tracking.progress import Meter, meter, tell, tell_once


@dataclass
class SplitPlan:
    """What caching one split takes: a sealed store that serves it, or a store to write."""

    split: str
    rows: Rows
    creation: Creation
    store: LogitStore | None = None
    writer: StoreWriter | None = None
    missing: list[Shard] = field(default_factory=list)
    computed: int = 0

    @property
    def identity(self) -> Identity:
        """The identity of the store that the recipe asks for."""
        return self.creation.identity

    @property
    def missing_bytes(self) -> int:
        """Size of the shards still to be computed."""
        return sum(self.identity.layout.stored_bytes(shard) for shard in self.missing)


@dataclass
class CachedModel:
    """A model whose logits are cached, the teacher or an assistant, and what that takes, split by split."""

    name: str
    """`the teacher`, or `the assistant mlp-64`."""
    model_uri: str
    """Its model folder."""
    plans: list[SplitPlan]

    @property
    def stores(self) -> Stores:
        """Where its sealed stores lie."""
        return {plan.split: plan.store.uri for plan in self.plans if plan.store is not None}

    @property
    def taught(self) -> Identity:
        """What those who learn from it learn: the train store that the recipe asks for. One of more views may serve."""
        return next(plan.identity for plan in self.plans if plan.split == "train")

    @property
    def missing(self) -> bool:
        """Whether there are shards to compute."""
        return any(plan.missing for plan in self.plans)


Compute = Callable[[CachedModel, Recipe, Workspace], None]
"""Computes the missing shards of a hop."""


def cache_teacher(recipe: Recipe, options: CacheOptions) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for the recipe's train, validation and test rows.

    Where the teacher has assistants, each is trained from the store of the model above it, and cached alike.

    Returns:
        The document that `akd-dist cache-teacher --json` prints.

    Raises:
        AkdError: see the exit codes; nothing that was computed is lost.
    """
    from akd_dist.jobs import cluster

    started, workspace = time.monotonic(), Workspace.of(options)
    recipe.own()
    splits = prepare_shown(recipe.data, workspace.cache_root, workspace.console, again=options.prepare_again)
    check_models(recipe, splits, workspace.store_root)
    with cluster.closing():
        if workspace.address is not None:
            cluster.connect(workspace.address, tell=workspace.tell)
        plan = foresee_caching(recipe, splits, workspace)
        if options.dry_run:
            return plan
        splits.sources.begin()
        cached_models = cache_checked(recipe, splits, workspace)
    splits.sources.finish()
    return document_of(cached_models, time.monotonic() - started)


def cache_checked(recipe: Recipe, splits: Splits, workspace: Workspace) -> list[CachedModel]:
    """Cache what is missing, once `check_models` and `foresee_caching` have passed: train, compute and seal on Ray.

    Args:
        place: where; whoever stops it is found here.
    """
    from akd_dist.jobs import cluster

    with cluster.closing(), cluster.stop_on_signals(workspace.tell) as stop:
        workspace = replace(workspace, stop=stop)
        teacher_uri = ensure_teacher(recipe, splits, workspace, run_on_ray)
        return walk_chain(recipe, splits, teacher_uri, workspace, run_on_ray, compute_on_ray)


def cache_in_process(recipe: Recipe, teacher_uri: str, *, store_root: str, cache_root: str) -> dict[str, Any]:
    """The same stores by a plain loop in this process, without Ray; the bytes are those of the Ray run."""
    started = time.monotonic()
    splits = prepare(recipe.own().data, Path(cache_root))
    workspace = Workspace(store_root, cache_root, console=Console(stderr=True))
    cached_models = walk_chain(recipe, splits, teacher_uri, workspace, run_in_process, compute_in_process)
    splits.sources.finish()
    return document_of(cached_models, time.monotonic() - started)


def walk_chain(
    recipe: Recipe, splits: Splits, teacher_uri: str, workspace: Workspace, run: Run, compute: Compute
) -> list[CachedModel]:
    """Cache the teacher; then train each assistant from the store of the model above it, and cache it in turn.

    Args:
        run: trains a model.
        compute: computes the missing shards of a hop.
    """
    cached_models = [cache_model("the teacher", teacher_uri, recipe, splits, workspace, compute)]
    for assistant in recipe.teacher.chain:
        trained = assistant_of(recipe, splits, assistant, cached_models[-1].taught, cached_models[-1].stores)
        uri = ensure_trained(trained, recipe, splits, workspace, run)
        cached_models.append(cache_model(trained.name, uri, recipe, splits, workspace, compute))
    return cached_models


def cache_model(
    name: str, uri: str, recipe: Recipe, splits: Splits, workspace: Workspace, compute: Compute
) -> CachedModel:
    """Sealed stores of one model's logits for every split; what is there already is not touched."""
    cached = CachedModel(name, uri, plan_splits(recipe, splits, uri, recipe.device))
    _fill(cached, recipe, workspace, compute)
    for plan in cached.plans:
        if plan.split == "train" and plan.store is not None:
            _tell_of_chance(name, plan.rows, plan.store, workspace.console)
    return cached


def _fill(cached: CachedModel, recipe: Recipe, workspace: Workspace, compute: Compute) -> None:
    """Find the stores of a hop, and compute and seal those that are not there."""
    for plan in cached.plans:
        plan.store = catalog.find_store(workspace.store_root, plan.identity)
        if plan.store is not None:
            workspace.sweep(plan.identity.id)
    wanted = [plan for plan in cached.plans if plan.store is None]
    if not wanted:
        return
    with contextlib.ExitStack() as claims:
        for plan in wanted:
            claims.enter_context(workspace.claim(plan.identity.id))
        device = workspace.device(recipe.device)
        claims.push(functools.partial(_leave_nothing, wanted, workspace.store_root))
        for plan in wanted:
            plan.creation = computed_on(device, plan.creation)
            _open_for_writing(plan, recipe, workspace.store_root, workspace.console)
        if cached.missing:
            check_room(workspace.store_root, sum(plan.missing_bytes for plan in cached.plans))
            compute(cached, recipe, workspace)
        for plan in cached.plans:
            if plan.writer is not None:
                seal_store(plan.writer)
                plan.store = catalog.find_store(workspace.store_root, plan.identity)


def _tell_of_chance(name: str, rows: Rows, store: LogitStore, console: Console) -> None:
    """Say so if a model, by what the shards of its train store say, knows hardly anything of the labels."""
    agreed = [(shard.rows, shard.label_agreement) for shard in store.manifest.shards]
    if any(share is None for _, share in agreed):
        return  # regression
    agreement = sum(n * (share or 0.0) for n, share in agreed) / sum(n for n, _ in agreed)
    line = near_chance(name, agreement, np.bincount(rows.labels, minlength=rows.classes))
    if line is not None:
        tell_once(console, line)


def _leave_nothing(plans: list[SplitPlan], store_root: str, kind: type[BaseException] | None, *_: object) -> None:
    """After a refusal: stores that were begun, and have no shard yet, would only be in the way."""
    if kind is not None:
        for plan in plans:
            with contextlib.suppress(AkdError):  # the first error is the one to tell
                removal.discard_if_empty(store_root, plan.identity.id)


def check_models(recipe: Recipe, splits: Splits, store_root: str) -> None:
    """Try the teacher and its assistants on these rows before anything is trained or cached.

    What is trained already is not tried again, and weights whose logits are stored are not loaded.

    Raises:
        RefusedError: a model cannot be built or read, is for other rows, does not give a logit per class, lacks its
            pretrained weights, fits no memory, or cannot be trained on its batches; or an augmentation does not fit.
        DamagedError: weights or a store are not what was written.
    """
    rows, data = splits.train, recipe.data
    if (uri := recipe.teacher.weights) is not None:
        load_card(uri, recipe.trusted).check_rows(rows, f"the teacher in {uri}")
        plans = plan_splits(recipe, splits, uri, recipe.device)
        if any(catalog.find_store(store_root, plan.identity) is None for plan in plans):
            try_teacher(uri, rows, recipe.cache, recipe.trusted)
    elif (teacher := teacher_of(recipe, splits)) is not None and not is_there(teacher.uri(store_root)):
        assert recipe.teacher.train is not None
        try_training(teacher.spec.model, [(teacher.setting, recipe.teacher.train)], rows, data)
    for number, assistant in enumerate(recipe.teacher.chain, 1):
        try_training(assistant.model, [("teacher" + number * ".assistant", assistant)], rows, data)
    check_augmentation(data.augmentation, data.seed, rows.inputs, rows.tokens)


def prepare_shown(data: recipes.DataSpec, cache_root: str, console: Console, *, again: bool = False) -> Splits:
    """`rows.prepare`, with a meter for each source and each fingerprint, and a line for each finding."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Meter] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(meter(console, f"preparing {what}", total))
                shown[what].update(0)
            shown[what].update(done)

        splits = prepare(data, Path(cache_root), on_progress=update, again=again)
    for line in splits.findings:
        tell_once(console, line)
    return splits


def plan_splits(recipe: Recipe, splits: Splits, teacher_uri: str, device: str) -> list[SplitPlan]:
    """What the recipe asks for, split by split; `device` as in `creation_of`."""
    card = load_card(teacher_uri, recipe.trusted)
    plans = []
    for split in SPLITS:
        rows: Rows = getattr(splits, split)
        plans.append(SplitPlan(split, rows, creation_of(recipe, rows, split, card, device)))
    return plans


def creation_of(
    recipe: Recipe, rows: Rows, split: str, card: ModelCard, device: str, store_format: int = FORMAT_VERSION
) -> Creation:
    """The identity of a split's store and how it is to be computed. Only train rows are augmented.

    Args:
        device: as `device_name` says it, where a store is to be written; no part of its identity.
    """
    augmentation = recipe.data.augmentation if split == "train" else NoAugmentation()
    plain = isinstance(augmentation, NoAugmentation)
    fingerprint = served_fingerprint(card, recipe.cache.precision)
    identity = Identity(
        format=store_format,
        dataset=rows.fingerprint,
        rows=len(rows),
        teacher=fingerprint,
        augmentation=by_content(augmentation),
        data_seed=None if plain else recipe.data.seed,
        views=recipe.data.views if split == "train" else 1,
        encoding={"name": recipe.cache.encoding},
        classes=rows.classes,
    )
    computed = Computed(
        batch_rows=recipe.cache.batch_rows,
        threads=recipe.cache.threads,
        device=device,
        versions={name: version(name) for name in ("akd-dist", "numpy", "torch", "zarr")},
    )
    teacher = {"fingerprint": fingerprint, "spec": card.model_dump(mode="json")}
    return Creation(identity=identity, computed=computed, dataset=rows.describe(), teacher=teacher)


def computed_on(device: str, creation: Creation) -> Creation:
    """The same store, computed on this device."""
    return creation.model_copy(update={"computed": creation.computed.model_copy(update={"device": device})})


def _open_for_writing(plan: SplitPlan, recipe: Recipe, store_root: str, console: Console) -> None:
    """Once the claim is held: whoever held it before may have sealed the store, or left part of it."""
    plan.store = catalog.find_store(store_root, plan.identity)
    if plan.store is None:
        narrower = catalog.narrower_stores(store_root, plan.identity)
        if (source := _source(plan, narrower)) is not None:
            _check_views(source, plan.rows, recipe.data)
        open_root(store_root).check_writable()
        hint = {"recipe": recipe.document(f"{store_root}/{plan.identity.id}"), "split": plan.split}
        plan.writer = create_store(store_root, plan.creation, hint)
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
    source = _source(plan, narrower)
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


def _source(plan: SplitPlan, narrower: list[Manifest]) -> Manifest | None:
    """The widest of narrower stores that was computed as this one is to be."""
    return next((one for one in narrower if one.computed == plan.creation.computed), None)


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


def compute_on_ray(cached: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
    """Run the missing shards of all splits as one bounded stream of tasks."""
    from akd_dist.jobs.tasks import Task, run_tasks

    stop = workspace.connect()
    tasks = []
    for plan in cached.plans:
        if plan.missing:
            job = cache_job(plan, recipe, cached.model_uri, workspace.cache_root)
            tasks += [Task(f"{plan.split} rows of {cached.name}, {shard}", job, shard) for shard in plan.missing]
    by_split = {plan.split: plan for plan in cached.plans}
    done = 0
    rows = sum(task.item.rows for task in tasks)
    with workspace.shared() as shared, meter(workspace.console, f"caching {cached.name}", rows) as shown:

        def count(task: Task, _receipt: Receipt) -> None:
            nonlocal done
            by_split[task.job.split].computed += 1
            done += task.item.rows
            shown.update(done)

        shown.update(0)
        run_tasks(
            cache_shard,
            tasks,
            threads=recipe.cache.threads,
            gpus=gpus_of(recipe.device),
            stop=stop,
            on_result=count,
            shared=shared,
        )
    if stop:
        told = f"stopped; the {sum(plan.computed for plan in cached.plans)} shards that this run computed are kept"
        raise stop.error(told, "the same command carries on with the missing shards")


def compute_in_process(cached: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
    """The missing shards in a plain loop."""
    for plan in cached.plans:
        if plan.missing:
            job = cache_job(plan, recipe, cached.model_uri, workspace.cache_root)
            for shard in plan.missing:
                cache_shard(job, shard)
                plan.computed += 1


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
    )


# ---- repair


def repair(
    store_root: str,
    store_id: str,
    recipe: Recipe | None,
    cache_root: str,
    console: Console | None = None,
    *,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Recompute the damaged shards of a sealed store, and only these; they must arrive at the manifest's sha256.

    Args:
        recipe: how to recompute; None takes the recipe that the store was made with.
        trust: modules that the store's recipe may name: it is not the user's word, as `recipe` is.

    Raises:
        RefusedError: the data or the teacher is not what the store was made from, or nobody knows the recipe.
        DamagedError: the recomputed bytes differ from the sealed ones.
    """
    console = console or Console(stderr=True)
    hint = catalog.hint_of(store_root, store_id)
    if recipe is None:
        recipe = _recipe_of(store_root, store_id, hint)
        told = Trusted(modules=tuple(trust)).seen_from(f"the store {store_id[:12]}", recipe.folder)
        recipe = recipes.trust(recipe, told)
    else:
        recipe = recipe.own()
    splits = prepare_shown(recipe.data, cache_root, console)
    known = [hint["split"]] if hint.get("split") in SPLITS else SPLITS
    uri, plan = _plan_of(store_id, known, recipe, splits, store_root)
    plan.creation = computed_on(device_name(recipe.device), plan.creation)  # it is this process that computes
    plan.writer = StoreWriter(store_root, plan.creation)
    job = cache_job(plan, recipe, uri, cache_root)
    recompute = functools.partial(compute_shard, job)
    repaired = repair_store(store_root, store_id, recompute, computed=plan.creation.computed)
    return {"id": store_id, "repaired": [shard.key for shard in repaired]}


def _recipe_of(store_root: str, store_id: str, hint: dict[str, Any]) -> Recipe:
    """The recipe that a store was asked for with."""
    try:
        return Recipe.of_document(hint["recipe"], f"{store_root}/{store_id}")
    except (KeyError, ValidationError) as error:
        raise RefusedError(
            f"nobody knows which recipe the store {store_id[:12]} was made with",
            got=f"no {SOURCE_KEY} beside its shards that says so",
            expected="the recipe: it names the data and the teacher",
            next="add --recipe RECIPE",
        ) from error


def _plan_of(
    store_id: str, names: Iterable[str], recipe: Recipe, splits: Splits, store_root: str
) -> tuple[str, SplitPlan]:
    """Which model of the chain a store holds the logits of: its folder, and how the split is cached, one of `names`."""
    uris = model_uris(recipe, splits, store_root)
    known = uris if is_there(uris[-1]) else uris[:-1] or uris
    cards = {uri: load_card(uri, recipe.trusted) for uri in known}
    plans = [
        (uri, SplitPlan(split, rows, creation_of(recipe, rows, split, cards[uri], recipe.device, number)))
        for split, rows in ((name, getattr(splits, name)) for name in names)
        for uri in known
        for number in range(FORMAT_VERSION, 0, -1)
    ]
    found = next(((uri, plan) for uri, plan in plans if plan.identity.id == store_id), None)
    if found is not None:
        return found
    sealed = catalog.identity_of(store_root, store_id)
    unknown = [f"another id, and no {CREATION_KEY} that says why"]
    differing = [plan.identity.differences(sealed) if sealed else unknown for _, plan in plans]
    raise RefusedError(
        f"the store {store_id[:12]} cannot be recomputed from this data and teacher",
        got="; ".join(sorted(differing, key=len)[0]),
        expected="the data and the teacher that the store was made from",
        next="pass --recipe with their present places",
    )


def model_uris(recipe: Recipe, splits: Splits, store_root: str) -> list[str]:
    """Where the models of the chain lie, from the teacher on, as far as that is known; the last may not be there yet.

    An assistant is found by what it learns from, so its place is not known before the model above it is there.
    """
    teacher = teacher_of(recipe, splits)
    uris = [teacher.uri(store_root) if teacher else str(recipe.teacher.weights)]
    for assistant in recipe.teacher.chain:
        if not is_there(uris[-1]):
            break
        card = load_card(uris[-1], recipe.trusted)
        above = creation_of(recipe, splits.train, "train", card, recipe.device).identity
        uris.append(assistant_of(recipe, splits, assistant, above, {}).uri(store_root))
    return uris


# ---- what it says


def check_nodes(recipe: Recipe, nodes: Sequence[Node]) -> None:
    """Refuse a cluster on which the teacher could not be trained or cached.

    Raises:
        MachineError: no node has the CPUs or the GPU for one of its tasks.
    """
    threads = [recipe.cache.threads, *(one.threads for one in recipe.teacher.chain)]
    threads += [recipe.teacher.train.threads] if recipe.teacher.train else []
    packing.check_room(
        nodes, packing.ResourceRequest(1, max(threads), gpus_of(recipe.device)), "training or caching the teacher"
    )


def check_room(store_root: str, needed: int) -> None:
    """Refuse before the teacher runs what the disk cannot hold. Object stores do not say how much is free."""
    free = open_root(store_root).free_bytes()
    if free is not None and needed > free:
        raise MachineError(
            f"the logits do not fit in {store_root}",
            got=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            next="use cache.encoding=float16, fewer data.views, or another --store-root",
        )


def foresee_caching(recipe: Recipe, splits: Splits, workspace: Workspace) -> dict[str, Any]:
    """What caching would compute: nothing of the stores and views that are there, as far as their models are.

    Returns:
        The document that `akd-dist cache-teacher --dry-run --json` prints.

    Raises:
        MachineError: there is something to compute, and the disk, the store root or the cluster cannot take it; on
            this machine without an `address`, else on the cluster that is connected.
    """
    from akd_dist.jobs import cluster

    store_root = workspace.store_root
    uris = model_uris(recipe, splits, store_root)
    known: list[str | None] = [uri for uri in uris if uri == recipe.teacher.weights or is_there(uri)]
    unknown: list[str | None] = [None] * (1 + len(recipe.teacher.chain) - len(known))
    names = ["the teacher", *(f"the assistant {one.model.label}" for one in recipe.teacher.chain)]
    teacher, *assistants = [
        _planned(name, recipe, splits, uri, workspace) for name, uri in zip(names, known + unknown, strict=True)
    ]
    needed = sum(split["bytes"] for splits in (teacher, *assistants) for split in splits.values())
    if needed:
        check_folder(open_root(store_root).local_path(""))
        check_room(store_root, needed)
        check_nodes(recipe, cluster.all_nodes())
    return {
        "dry_run": True,
        "store_root": store_root,
        "bytes": needed,
        "free": open_root(store_root).free_bytes(),
        "splits": teacher,
        "assistants": [
            {"model": assistant.model.label, "trained": number + 1 < len(known), "splits": planned}
            for number, (assistant, planned) in enumerate(zip(recipe.teacher.chain, assistants, strict=True))
        ],
    }


def _planned(
    name: str, recipe: Recipe, splits: Splits, uri: str | None, workspace: Workspace
) -> dict[str, dict[str, Any]]:
    """What the stores of one model would still take; all of it where the model is not there yet."""
    store_root = workspace.store_root
    stores: dict[str, LogitStore | None] = dict.fromkeys(SPLITS)
    there: dict[str, Manifest | None] = dict.fromkeys(SPLITS)
    receipts: dict[str, set[str]] = {split: set() for split in SPLITS}
    if uri is not None:
        plans = plan_splits(recipe, splits, uri, recipe.device)
        receipts = {plan.split: set(StoreWriter(store_root, plan.creation).store.list(RECEIPTS)) for plan in plans}
        stores = {plan.split: catalog.find_store(store_root, plan.identity) for plan in plans}
        for plan in plans:
            if stores[plan.split] is None and workspace.address is None:
                # Which card the nodes of a cluster have is not asked: views that are there may count as missing.
                plan.creation = computed_on(device_name(recipe.device), plan.creation)
        there = {plan.split: _source(plan, catalog.narrower_stores(store_root, plan.identity)) for plan in plans}
    if (sealed := stores["train"]) is not None:
        _tell_of_chance(name, splits.train, sealed, workspace.console)
    dtype = str(encoding_from_config({"name": recipe.cache.encoding}).dtype)
    planned = {}
    for split, store in stores.items():
        rows: Rows = getattr(splits, split)
        views = recipe.data.views if split == "train" else 1
        layout = StoreLayout(views, len(rows), rows.classes, dtype)
        source = there[split]
        taken = 0 if source is None else source.identity.views
        done = receipts[split]
        missing = [one for one in layout.shards() if one.view >= taken and one.receipt_key not in done]
        shards = [] if store is not None else missing
        size = sum(layout.stored_bytes(shard) for shard in shards)
        hit = store is not None
        planned[split] = {"rows": len(rows), "views": views, "hit": hit, "shards": len(shards), "bytes": size}
    return planned


def document_of(cached_models: list[CachedModel], seconds: float) -> dict[str, Any]:
    """What `cache-teacher` prints of the stores of all models."""
    teacher, *assistants = cached_models
    hit = all(plan.writer is None for cached in cached_models for plan in cached.plans)
    return _cached(teacher) | {
        "hit": hit,
        "seconds": round(seconds, 3),
        "assistants": [_named(cached) | _cached(cached) for cached in assistants],
    }


def _named(cached: CachedModel) -> dict[str, Any]:
    card = load_card(cached.model_uri)
    return {"model": card.model.label, "path": cached.model_uri, "fingerprint": card.fingerprint}


def _cached(cached: CachedModel) -> dict[str, Any]:
    """The train store of a model, and those of the other splits."""
    parts = {plan.split: _part(plan) for plan in cached.plans}
    return parts["train"] | {"splits": {split: parts[split] for split in SPLITS if split != "train"}}


def _part(plan: SplitPlan) -> dict[str, Any]:
    store = plan.store
    assert store is not None
    return {
        "store": store.uri,
        "id": store.id,
        "hit": plan.writer is None,
        "rows": store.num_rows,
        "views": store.views,
        "classes": store.classes,
        "encoding": plan.identity.encoding["name"],
        "bytes": sum(shard.size for shard in store.manifest.shards),
        "shards": len(store.manifest.shards),
        "shards_computed": plan.computed,
    }
