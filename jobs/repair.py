"""Recompute the damaged shards of a sealed store, to the very bytes that were sealed."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base import places
from akd_dist.base.errors import RefusedError
from akd_dist.base.trusted import Trusted
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.distill.caching import compute_shard, make_table
from akd_dist.jobs.cache_teacher import cache_job
from akd_dist.jobs.planning.caching import models_there
from akd_dist.jobs.planning.creations import computed_on, creation_of, formats_of
from akd_dist.jobs.planning.models import CachedModel, SplitPlan
from akd_dist.jobs.prepare_rows import rows_of_recipe
from akd_dist.jobs.train_teacher import Workspace, teacher_of
from akd_dist.models.device import device_name
from akd_dist.models.folder import load_card
from akd_dist.recipe import Recipe
from akd_dist.storage import catalog
from akd_dist.storage.layout import CREATION_KEY, SOURCE_KEY
from akd_dist.storage.repair import repair_store
from akd_dist.storage.tables import Table
from akd_dist.storage.writer import StoreWriter


def repair(
    store_root: str,
    store_id: str,
    recipe: Recipe | None,
    cache_root: str,
    console: Console | None = None,
    *,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Recompute the damaged shards of a sealed store, and what it has once for all of them where that is damaged, and
    only these; they must arrive at the manifest's sha256.

    Args:
        recipe: how to recompute; None takes the recipe that the store was made with.
        trust: modules that the store's recipe may name: it is not the user's word, as `recipe` is.

    Raises:
        RefusedError: the data or the teacher is not what the store was made from, or nobody knows the recipe.
        DamagedError: the recomputed bytes differ from the sealed ones.
    """
    console = console or Console(stderr=True)
    hint = catalog.hint_of(store_root, store_id)
    _refuse_imported(store_root, store_id, hint)
    if recipe is None:
        recipe = _recipe_of(store_root, store_id, hint)
        told = Trusted(modules=tuple(trust)).seen_from(f"the store {store_id[:12]}", recipe.folder)
        recipe = recipes.trust(recipe, told)
    else:
        recipe = recipe.own()
    workspace = Workspace(store_root, cache_root, console=console)
    splits = rows_of_recipe(recipe, workspace)
    known = [hint["split"]] if hint.get("split") in SPLITS else SPLITS
    model, plan = _plan_of(store_id, known, recipe, splits, workspace)
    if model.imported is not None:
        model.imported.publish(model.model_uri, Path(cache_root))
    plan.creation = computed_on(device_name(recipe.device), plan.creation)  # it is this process that computes
    plan.writer = StoreWriter(store_root, plan.creation)
    job = cache_job(plan, recipe, model.model_uri, cache_root)
    recompute = functools.partial(compute_shard, job)
    tables = list[str]()

    def remake(name: str) -> Table:
        tables.append(name)
        return make_table(job, name)

    repaired = repair_store(store_root, store_id, recompute, computed=plan.creation.computed, remake=remake)
    return {"id": store_id, "repaired": tables + [key for shard in repaired for key in shard.keys]}


def _refuse_imported(store_root: str, store_id: str, hint: dict[str, Any]) -> None:
    """Refuse a store of logits that were computed elsewhere: nothing here could compute them again."""
    summary = catalog.summary_of(store_root, store_id)
    if summary.imported is None and "logits" not in hint:
        return
    file = places.found(str(hint["logits"]), f"{store_root}/{store_id}") if "logits" in hint else "LOGITS"
    raise RefusedError(
        f"the store {store_id[:12]} holds logits that were imported: they cannot be computed again",
        got="no teacher that they came from",
        expected="the file of logits",
        next=f"import the same logits once more, which mends the store: akd-dist stores import RECIPE {file}",
    )


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
    store_id: str, names: Iterable[str], recipe: Recipe, splits: Splits, workspace: Workspace
) -> tuple[CachedModel, SplitPlan]:
    """Which model of the chain a store holds the logits of, and how the split is cached, one of `names`."""
    models = models_there(recipe, splits, workspace)
    if not models and (teacher := teacher_of(recipe, splits)) is not None:
        load_card(teacher.uri(workspace.store_root))  # says that there is none
    plans = [
        (model, SplitPlan(split, rows, creation_of(recipe, rows, split, model.card, recipe.device, number)))
        for split, rows in ((name, getattr(splits, name)) for name in names)
        for model in models
        if model.card is not None
        # In older formats too: the id of a store depends on its format, and the store may be an older one.
        for number in formats_of(recipe, rows)
    ]
    found = next(((model, plan) for model, plan in plans if plan.identity.id == store_id), None)
    if found is not None:
        return found
    sealed = catalog.identity_of(workspace.store_root, store_id)
    unknown = [f"another id, and no {CREATION_KEY} that says why"]
    differing = [plan.identity.differences(sealed) if sealed else unknown for _, plan in plans]
    raise RefusedError(
        f"the store {store_id[:12]} cannot be recomputed from this data and teacher",
        got="; ".join(sorted(differing, key=len)[0]),
        expected="the data and the teacher that the store was made from",
        next="pass --recipe with their present places",
    )
