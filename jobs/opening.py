"""The rows and the stores of a recipe or a run, opened to be read by others: nothing is computed, and without Ray."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from akd_dist.base.errors import RefusedError
from akd_dist.base.places import STORE_ROOT, absolute
from akd_dist.base.trusted import Trusted
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.data.source_rows import SourceRows, source_rows
from akd_dist.distill.dataset import DatasetJob, DistillationBatches, DistillationDataset
from akd_dist.documents.damage import load
from akd_dist.documents.fleet import RunIdentity
from akd_dist.jobs.planning.caching import models_there
from akd_dist.jobs.planning.models import CachedModel, SplitPlan
from akd_dist.jobs.planning.windows import choose, demands_of, room_for
from akd_dist.jobs.prepare_rows import rows_of_recipe
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.options import BatchesOptions, DatasetOptions, SplitOptions, StoredOptions
from akd_dist.recipe import LastBatch, Recipe, Split, load_recipe, trust
from akd_dist.reporting.results import read_fleet
from akd_dist.serve.remote import brought
from akd_dist.storage import catalog
from akd_dist.storage.content import renewing
from akd_dist.storage.layout import CREATION_KEY
from akd_dist.storage.mean import AnyStore, MeanStore, members_of
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import using


@dataclass(frozen=True)
class Named:
    """A recipe as somebody named it: by itself, its file, or the run that was made from it."""

    recipe: Recipe
    """It, with as much trust as its place deserves."""
    place: str | None
    """Its file, for commands that are advised; None for an object."""
    run: Path | None
    """The folder of the run."""


@dataclass(frozen=True)
class Found:
    """What is there of a recipe."""

    named: Named
    workspace: Workspace
    splits: Splits
    teachers: Sequence[CachedModel]
    """The teacher, or those of an ensemble, if they are there; what their stores are is known, and they are not looked
    for. None if one is not there."""

    def store(self, split: str) -> AnyStore | None:
        """The sealed store of the teacher's logits of a split, or those of an ensemble; None where one is lacking."""
        found = [self._store_of(plan) for plan in self.plans(split)]
        stores = [store for store in found if store is not None]
        if not stores or len(stores) < len(self.teachers):
            return None
        teacher = self.named.recipe.teacher
        return stores[0] if teacher.members is None else MeanStore(tuple(stores), teacher.shares, teacher.average)

    def plans(self, split: str) -> list[SplitPlan]:
        """What the stores of a split are, of each teacher; without those that are a store of other splits alone."""
        return [plan for teacher in self.teachers for plan in teacher.plans if plan.split == split]

    def _store_of(self, plan: SplitPlan) -> LogitStore | None:
        return plan.store or catalog.find_store(self.workspace.store_root, plan.identity)

    def needed(self, split: str) -> AnyStore:
        """The same store, which has to be there.

        Raises:
            RefusedError: it is not, or not yet.
        """
        if (store := self.store(split)) is not None:
            return store
        root = self.workspace.store_root
        got = f"no teacher under {root}"
        lacking = [plan for plan in self.plans(split) if self._store_of(plan) is None]
        if lacking:
            store_id = lacking[0].identity.id
            begun = open_root(root).exists(f"{store_id}/{CREATION_KEY}")
            got = (
                f"the store {store_id[:12]} that is not sealed yet" if begun else f"no store {store_id[:12]} in {root}"
            )
        recipe = self.named.place or "RECIPE"
        raise RefusedError(
            f"the teacher's logits of the {split} rows are not there",
            got=got,
            expected="a sealed store for just these rows, views and this teacher",
            next=shlex.join(["akd-dist", "cache-teacher", recipe, "--store-root", root]),
        )


@contextlib.contextmanager
def found(options: StoredOptions) -> Iterator[Found]:
    """The rows of a recipe or a run, prepared on this machine if they are not yet, and its teacher, if it is there.

    Raises:
        AkdError: the recipe, the run or the rows are refused, as training refuses them.
    """
    with named(options) as given:
        refuse_described(given.recipe)
        root = options.stores if options.store_root is not None else _root_of_run(given) or options.stores
        console = options.console or Console(quiet=True)
        workspace = Workspace(root, options.cache, console=console)
        splits = rows_of_recipe(given.recipe, workspace)
        if given.run is not None:
            _check_same_rows(given.run, splits)
        models = models_there(given.recipe, splits, workspace)
        count = len(given.recipe.teacher.each)
        yield Found(given, workspace, splits, models[:count] if len(models) >= count else [])


def refuse_described(recipe: Recipe) -> None:
    """Refuse a recipe whose stores have no row of logits for each row of the data.

    Raises:
        RefusedError: its rows have several targets each, or its logits are described instead of stored; says what
            reads such stores.
    """
    language = recipe.data.task == "language_model"
    if not language and recipe.cache.encoding.kind != "top_k":
        return
    read = "akd_dist.open_store(STORE).targets(view, start, stop), whose arrays docs/reference/store-format.md explains"
    raise RefusedError(
        f"datasets of rows with logits cannot be made of the recipe {recipe.name}",
        got="blocks of a language model, with many targets each" if language else "cache.encoding: top_k",
        expected="stores that hold the logits of each row, as of classifiers with float16 or float32",
        next=f"read {read}" + ("; its .offsets say which targets a block has" if language else ""),
    )


@contextlib.contextmanager
def named(options: StoredOptions) -> Iterator[Named]:
    """The recipe that somebody names; for the time of a block, as refusals name places of a run in object storage.

    The recipe in a run's folder is not the user's word, named as a file or not: the run may come from anywhere.

    Raises:
        RecipeError, RefusedError: there is none, or something is wrong with it.
    """
    if isinstance(options.recipe, Recipe):
        yield Named(options.read().own(), None, None)
        return
    with brought(options.cache) as here:
        place = here.data(absolute(options.recipe))
        path = Path(place)
        file = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
        if not (file.parent / "identity.json").is_file():
            yield Named(options.read().own(), str(options.recipe), None)
            return
        recipe = load_recipe(file, options.overrides)
        trust(recipe, Trusted(modules=options.modules).seen_from(f"the recipe {file}", recipe.folder))
        yield Named(recipe, str(file), file.parent)


def open_dataset(options: DatasetOptions) -> DistillationDataset:
    """`akd_dist.distillation_dataset`."""
    with found(options) as there:
        job = job_of(there, options.split)
        # What turns out to be wrong in the cache is made anew, as training does.
        return renewing(
            lambda: DistillationDataset(job, options.epoch).open(there.splits.sources), there.workspace.tell
        )


def open_batches(options: BatchesOptions) -> DistillationBatches:
    """`akd_dist.distillation_batches`."""
    with found(options) as there:
        cut = options.batch, options.last_batch, _window(there), options.labelled
        job = job_of(there, options.split, *cut)
        begins = options.epoch, options.rank, options.world, options.start_step
        return renewing(lambda: DistillationBatches(job, *begins).open(there.splits.sources), there.workspace.tell)


def job_of(
    there: Found,
    split: Split,
    batch: int = 1,
    last_batch: LastBatch = "keep",
    window: int | None = None,
    labelled: int | None = None,
) -> DatasetJob:
    """What a process needs to open a split: of train rows with their store, of others with theirs if it is there."""
    store = there.needed("train") if split == "train" else there.store(split)
    if store is not None:
        _note_use(store)
    return DatasetJob(
        data=there.named.recipe.data,
        split=split,
        fingerprints=there.splits.fingerprints,
        cache_root=there.workspace.cache_root,
        store=None if store is None else store.ref,
        rows=there.splits.train.sealed,
        batch=batch,
        last_batch=last_batch,
        window=window,
        labelled=labelled,
    )


def _window(there: Found) -> int | None:
    """The window that a run would shuffle by which begins here; that of a run stands in its recipe."""
    recipe = there.named.recipe
    if recipe.data.window is not None or there.named.run is not None:
        return recipe.data.window
    demands = demands_of(recipe, there.splits, recipe.students, [])
    return choose(demands, room_for(there.workspace, [])).window


def _note_use(store: AnyStore) -> None:
    """Leave a record that the store is used today, from the folder that this program works in: for `stores gc`."""
    with using([one.uri for one in members_of(store)], run=str(Path.cwd())):
        pass


def _root_of_run(given: Named) -> str | None:
    """Where the stores of a run lie, as it says itself, if nobody says otherwise."""
    if given.run is None or STORE_ROOT.is_set or not (given.run / "fleet.json").is_file():
        return None
    return open_root(read_fleet(given.run).store).parent.uri


def _check_same_rows(run: Path, splits: Splits) -> None:
    """Refuse data that have changed since the run was made.

    Raises:
        RefusedError: so they have; names the first block of rows that differs.
    """
    identity = load(run / "identity.json", RunIdentity, expected="what the run wrote there", next="train it anew")
    known = identity.plain().get("rows", {})
    for split in SPLITS:
        if split in known:
            getattr(splits, split).check_same(known[split])


def source_rows_of(options: SplitOptions) -> SourceRows:
    """`akd_dist.source_rows`."""
    with named(options) as given:
        return source_rows(given.recipe.data)[options.split]
