"""Cache a teacher: plan the missing shards, run them as Ray tasks, verify, seal.

akd-dist cache-teacher jobs/digits.yaml
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.device import device_name, gpus_of
from akd_dist.jobs.progress import Meter, meter, tell
from akd_dist.jobs.train_teacher import TEACHERS, ensure_teacher, teacher_key
from akd_dist.models import ModelCard, add_folder, load_card
from akd_dist.recipe import NoAugmentation, Recipe
from akd_dist.rows import SPLITS, Rows, Splits, blocks_in_common, first_difference, prepare
from akd_dist.storage import catalog
from akd_dist.storage.claim import claim_store
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.errors import MachineError, RefusedError
from akd_dist.storage.layout import CREATION_KEY, FORMAT_VERSION, Shard, StoreLayout
from akd_dist.storage.manifest import Computed, Creation, Identity, Manifest, Receipt, differences
from akd_dist.storage.objects import open_root
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store, take_shards
from akd_dist.teacher import CacheJob, cache_shard, compute_shard, served_fingerprint
from akd_dist.views import check_augmentation


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


def cache_teacher(
    recipe: Recipe,
    *,
    store_root: str,
    cache_root: str,
    address: str | None = None,
    wait: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for the recipe's train, validation and test rows.

    Args:
        store_root: folder or URI under which stores lie.
        cache_root: folder of this node's prepared data.
        address: a Ray cluster; None starts one on this machine if there is anything to compute.
        wait: wait for somebody else's claim instead of leaving.
        dry_run: only say what would be computed, and refuse what cannot fit.
        console: where progress is told; stderr by default.

    Returns:
        The document that `akd-dist cache-teacher --json` prints.

    Raises:
        AkdError: see the exit codes; nothing that was computed is lost.
    """
    from akd_dist.jobs import cluster

    console = console or Console(stderr=True)
    started = time.monotonic()
    add_folder(recipe.folder)
    splits = prepare_shown(recipe.data, cache_root, console)
    check_augmentation(recipe.data.augmentation, recipe.data.seed, splits.train.inputs, splits.train.tokens)
    if dry_run:
        return _dry_run(recipe, splits, store_root)
    with cluster.closing(), cluster.stop_on_signals(lambda text: tell(console, text)) as stop:
        teacher_uri = ensure_teacher(
            recipe,
            splits,
            store_root=store_root,
            cache_root=cache_root,
            address=address,
            wait=wait,
            stop=stop,
            console=console,
        )
        plans = plan_splits(recipe, splits, teacher_uri)
        claim = functools.partial(
            claim_store, store_root, wait=wait, on_wait=lambda text: tell(console, text), on_poll=stop.check
        )
        for plan in plans:
            plan.store = catalog.find_store(store_root, plan.identity)
        with contextlib.ExitStack() as claims:
            for plan in plans:
                if plan.store is None:
                    claims.enter_context(claim(plan.identity.id))
                    _open_for_writing(plan, recipe, store_root, console)
            if any(plan.missing for plan in plans):
                check_room(store_root, sum(plan.missing_bytes for plan in plans))
                cluster.connect(address, tell=lambda text: tell(console, text))
                stop.check()
                _compute(plans, recipe, teacher_uri, cache_root, stop, console)
            if stop:
                told = f"stopped; the {sum(plan.computed for plan in plans)} shards that this run computed are kept"
                raise stop.error(told, "the same command carries on with the missing shards")
            for plan in plans:
                if plan.writer is not None:
                    seal_store(plan.writer)
                    plan.store = catalog.find_store(store_root, plan.identity)
    return _document(plans, time.monotonic() - started)


def prepare_shown(data: recipes.Data, cache_root: str, console: Console) -> Splits:
    """`rows.prepare`, with a meter for each source and each fingerprint, one after the other."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Meter] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(meter(console, f"preparing {what}", total))
                shown[what].update(0)
            shown[what].update(done)

        return prepare(data, Path(cache_root), on_progress=update)


def plan_splits(recipe: Recipe, splits: Splits, teacher_uri: str) -> list[SplitPlan]:
    """What the recipe asks for, split by split."""
    card = load_card(teacher_uri)
    plans = []
    for split in SPLITS:
        rows: Rows = getattr(splits, split)
        plans.append(SplitPlan(split, rows, creation_of(recipe, rows, split, card)))
    return plans


def creation_of(
    recipe: Recipe, rows: Rows, split: str, card: ModelCard, store_format: int = FORMAT_VERSION
) -> Creation:
    """The identity of a split's store and how it is to be computed. Only train rows are augmented."""
    augmentation = recipe.data.augmentation if split == "train" else NoAugmentation()
    plain = isinstance(augmentation, NoAugmentation)
    fingerprint = served_fingerprint(card, recipe.cache.precision)
    identity = Identity(
        format=store_format,
        dataset=rows.fingerprint,
        rows=len(rows),
        teacher=fingerprint,
        augmentation=augmentation.model_dump(mode="json"),
        data_seed=None if plain else recipe.data.seed,
        views=recipe.data.views if split == "train" else 1,
        encoding={"name": recipe.cache.encoding},
        classes=rows.classes,
    )
    computed = Computed(
        batch_rows=recipe.cache.batch_rows,
        threads=recipe.cache.threads,
        device=device_name(recipe.device),
        versions={name: version(name) for name in ("akd-dist", "numpy", "torch", "zarr")},
    )
    teacher = {"fingerprint": fingerprint, "spec": card.model_dump(mode="json")}
    return Creation(identity=identity, computed=computed, dataset=rows.describe(), teacher=teacher)


def _open_for_writing(plan: SplitPlan, recipe: Recipe, store_root: str, console: Console) -> None:
    """Once the claim is held: whoever held it before may have sealed the store, or left part of it."""
    plan.store = catalog.find_store(store_root, plan.identity)
    if plan.store is None:
        open_root(store_root).check_writable()
        hint = {"recipe": json.loads(recipe.model_dump_json()), "split": plan.split}
        plan.writer = create_store(store_root, plan.creation, hint)
        plan.missing = missing_shards(plan.writer)
        if narrower := catalog.narrower_stores(store_root, plan.identity):
            _take_views(plan, plan.writer, narrower, console)
        else:
            _tell_of_other_rows(plan, store_root, console)


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


def _compute(
    plans: list[SplitPlan], recipe: Recipe, teacher_uri: str, cache_root: str, stop: Any, console: Console
) -> None:
    """Run the missing shards of all splits as one bounded stream of tasks."""
    from akd_dist.jobs import cluster

    tasks = []
    for plan in plans:
        if plan.missing:
            job = cache_job(plan, recipe, teacher_uri, cache_root)
            tasks += [cluster.Task(f"{plan.split} rows, {shard}", job, shard) for shard in plan.missing]
    by_split = {plan.split: plan for plan in plans}
    done = 0
    with meter(console, "caching the teacher", sum(task.item.rows for task in tasks)) as shown:

        def count(task: cluster.Task, _receipt: Receipt) -> None:
            nonlocal done
            by_split[task.job.split].computed += 1
            done += task.item.rows
            shown.update(done)

        shown.update(0)
        cluster.run_tasks(
            cache_shard,
            tasks,
            threads=recipe.cache.threads,
            gpus=gpus_of(recipe.device),
            stop=stop,
            on_result=count,
        )


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
        folder=recipe.folder,
        device=recipe.device,
    )


def cache_in_process(recipe: Recipe, teacher_uri: str, *, store_root: str, cache_root: str) -> dict[str, Any]:
    """The same stores by a plain loop in this process, without Ray; the bytes are those of the Ray run."""
    console = Console(stderr=True)
    started = time.monotonic()
    splits = prepare(recipe.data, Path(cache_root))
    plans = plan_splits(recipe, splits, teacher_uri)
    for plan in plans:
        with claim_store(store_root, plan.identity.id, wait=False):
            _open_for_writing(plan, recipe, store_root, console)
            if plan.writer is None:
                continue
            job = cache_job(plan, recipe, teacher_uri, cache_root)
            for shard in plan.missing:
                cache_shard(job, shard)
                plan.computed += 1
            seal_store(plan.writer)
            plan.store = catalog.find_store(store_root, plan.identity)
    return _document(plans, time.monotonic() - started)


# ---- repair


def repair(
    store_root: str, store_id: str, recipe: Recipe | None, cache_root: str, console: Console | None = None
) -> dict[str, Any]:
    """Recompute the damaged shards of a sealed store, and only these; they must arrive at the manifest's sha256.

    Args:
        recipe: how to recompute; None takes the recipe that the store was made with.

    Raises:
        RefusedError: the data or the teacher is not what the store was made from.
        DamagedError: the recomputed bytes differ from the sealed ones.
    """
    console = console or Console(stderr=True)
    source = json.loads(open_root(store_root).get(f"{store_id}/source.json"))
    recipe = recipe or Recipe.model_validate(source["recipe"])
    split = source["split"]
    add_folder(recipe.folder)
    splits = prepare_shown(recipe.data, cache_root, console)
    teacher_uri = recipe.teacher.weights or f"{store_root.rstrip('/')}/{TEACHERS}/{teacher_key(recipe, splits)}"
    rows: Rows = getattr(splits, split)
    card = load_card(teacher_uri)
    creations = [creation_of(recipe, rows, split, card, number) for number in range(FORMAT_VERSION, 0, -1)]
    creation = next((one for one in creations if one.identity.id == store_id), creations[0])
    if creation.identity.id != store_id:
        key = f"{store_id}/{CREATION_KEY}"
        sealed = Creation.from_bytes(open_root(store_root).get(key), key).identity
        raise RefusedError(
            f"the store {store_id[:12]} cannot be recomputed from this data and teacher",
            got="; ".join(creation.identity.differences(sealed)),
            expected="the data and the teacher that the store was made from",
            next="pass --recipe with their present places",
        )
    plan = SplitPlan(split, rows, creation, writer=StoreWriter(store_root, creation))
    job = cache_job(plan, recipe, teacher_uri, cache_root)
    repaired = catalog.repair_store(store_root, store_id, lambda shard: compute_shard(job, shard))
    return {"id": store_id, "repaired": [shard.key for shard in repaired]}


# ---- what it says


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


def _dry_run(recipe: Recipe, splits: Splits, store_root: str) -> dict[str, Any]:
    """What caching would compute: nothing of the stores and views that are there, as far as the teacher is."""
    teacher_uri = recipe.teacher.weights or f"{store_root.rstrip('/')}/{TEACHERS}/{teacher_key(recipe, splits)}"
    known = recipe.teacher.weights is not None or open_root(teacher_uri).exists("model.json")
    stores: dict[str, LogitStore | None] = dict.fromkeys(SPLITS)
    there: dict[str, Manifest | None] = dict.fromkeys(SPLITS)
    if known:
        plans = plan_splits(recipe, splits, teacher_uri)
        stores = {plan.split: catalog.find_store(store_root, plan.identity) for plan in plans}
        there = {plan.split: _source(plan, catalog.narrower_stores(store_root, plan.identity)) for plan in plans}
    dtype = str(encoding_from_config({"name": recipe.cache.encoding}).dtype)
    planned = {}
    for split, store in stores.items():
        rows: Rows = getattr(splits, split)
        views = recipe.data.views if split == "train" else 1
        layout = StoreLayout(views, len(rows), rows.classes, dtype)
        source = there[split]
        taken = 0 if source is None else source.identity.views
        shards = [] if store is not None else [shard for shard in layout.shards() if shard.view >= taken]
        size = sum(layout.stored_bytes(shard) for shard in shards)
        hit = store is not None
        planned[split] = {"rows": len(rows), "views": views, "hit": hit, "shards": len(shards), "bytes": size}
    needed = sum(plan["bytes"] for plan in planned.values())
    check_room(store_root, needed)
    free = open_root(store_root).free_bytes()
    return {"dry_run": True, "store_root": store_root, "bytes": needed, "free": free, "splits": planned}


def _document(plans: list[SplitPlan], seconds: float) -> dict[str, Any]:
    parts = {plan.split: _part(plan) for plan in plans}
    hit = all(plan.writer is None for plan in plans)
    rest = {split: parts[split] for split in ("validation", "test")}
    return parts["train"] | {"hit": hit, "seconds": round(seconds, 3), "splits": rest}


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
