"""Models whose logits are cached, and what that takes: a teacher, the members of an ensemble, the assistants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from akd_dist.data.rows import SPLITS, Rows
from akd_dist.documents.check import TeacherCheck
from akd_dist.models.card import ModelCard
from akd_dist.models.imported import Imported
from akd_dist.recipe import Recipe
from akd_dist.storage.layout import Shard
from akd_dist.storage.manifest import Creation, Identity
from akd_dist.storage.mean import AnyStore, Average, MeanStore, Stores, mean_fingerprint
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.writer import StoreWriter


@dataclass
class SplitPlan:
    """What caching one split takes: a sealed store that serves it, or a store to write."""

    split: str
    rows: Rows
    creation: Creation
    store: LogitStore | None = None
    writer: StoreWriter | None = None
    missing: list[Shard] = field(default_factory=list)
    """Shards to compute; without a claim, others may compute them as well."""
    computed: int = 0
    unprepared: bool = False
    """Whether its store lacks what it has once for all shards: see `storage.tables`."""

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
    """Its model folder; empty where there are only stores."""
    card: ModelCard | None
    """What is built there; None where there are only stores."""
    plans: list[SplitPlan]
    """Of each split; of a teacher of whom there are only stores, of those that have one."""
    imported: Imported | None = None
    """The checkpoint that it comes from; None of a model folder."""
    check: TeacherCheck | None = None
    """What was found of it on labelled rows; None of a model that the recipe trains."""

    @property
    def opened(self) -> dict[str, LogitStore]:
        """Its sealed stores, by split."""
        return {plan.split: plan.store for plan in self.plans if plan.store is not None}

    @property
    def stores(self) -> Stores:
        """Where its sealed stores lie."""
        return {split: store.uri for split, store in self.opened.items()}

    @property
    def reads(self) -> dict[str, AnyStore]:
        """What those who learn from it read, by split."""
        return dict(self.opened)

    @property
    def taught(self) -> Identity:
        """What those who learn from it learn: the train store that the recipe asks for. One of more views may serve."""
        return next(plan.identity for plan in self.plans if plan.split == "train")

    @property
    def missing(self) -> bool:
        """Whether there is something to compute."""
        return any(plan.missing or plan.unprepared for plan in self.plans)


@dataclass(frozen=True)
class CachedEnsemble:
    """Several teachers that are read as one."""

    members: Sequence[CachedModel]
    shares: tuple[float, ...]
    average: Average

    @property
    def name(self) -> str:
        """As messages call it."""
        return "the teacher"

    @property
    def reads(self) -> dict[str, AnyStore]:
        """What those who learn from it read, by split: the splits of which each member has a store."""
        opened = [one.opened for one in self.members]
        return {
            split: MeanStore(tuple(stores[split] for stores in opened), self.shares, self.average)
            for split in SPLITS
            if all(split in stores for stores in opened)
        }

    @property
    def stores(self) -> Stores:
        """Where these lie."""
        return {split: store.ref for split, store in self.reads.items()}

    @property
    def taught(self) -> Identity:
        """What those who learn from it learn: the members' train stores, and a teacher that stands for all of them."""
        taught = [one.taught for one in self.members]
        teacher = mean_fingerprint([one.teacher for one in taught], self.shares, self.average)
        return taught[0].model_copy(update={"teacher": teacher})


Level = CachedModel | CachedEnsemble
"""Whom others learn from: the teacher, be it one or several, or an assistant."""


def levels_of(recipe: Recipe, models: Sequence[CachedModel]) -> list[Level]:
    """The teacher, then each assistant, as far as they are there.

    Args:
        models: the teachers, then the assistants, as far as they are there.
    """
    count = len(recipe.teacher.each)
    if len(models) < count:
        return []
    if recipe.teacher.members is None:
        return list(models)
    return [CachedEnsemble(models[:count], recipe.teacher.shares, recipe.teacher.average), *models[count:]]


def fingerprints(levels: Sequence[Level]) -> list[str]:
    """What students or assistants learn from: each one's fingerprint, as its stores have it."""
    return [level.taught.teacher for level in levels]


def count_of(recipe: Recipe) -> int:
    """How many models there are once all are trained."""
    return len(recipe.teacher.each) + len(recipe.teacher.chain)
