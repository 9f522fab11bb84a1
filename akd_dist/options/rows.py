"""The options of the verbs that hand rows and stored logits to trainers of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akd_dist.options.base import Options, StoredOptions

if TYPE_CHECKING:
    from akd_dist.recipe import LastBatch, Recipe, Split
    from akd_dist.storage.reader import LogitStore


@dataclass(frozen=True, kw_only=True)
class SplitOptions(StoredOptions):
    """What `source_rows` takes, where `recipe` may also be the folder or `s3://` URI of a run."""

    split: Split = field(default="train", metadata={"choices": ("train", "validation", "test")})
    """Which rows: `train`, `validation` or `test`."""


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(SplitOptions):
    """What `distillation_dataset` takes. Only train rows are augmented, and only they need a store."""

    epoch: int = 0
    """The epoch that is shown first, from 0: train rows in view `epoch` modulo `data.views`."""


@dataclass(frozen=True, kw_only=True)
class BatchesOptions(DatasetOptions):
    """What `distillation_batches` takes."""

    batch: int = field(kw_only=False)
    """Rows of a global batch."""
    last_batch: LastBatch = field(default="keep", metadata={"choices": ("keep", "drop", "merge")})
    """What becomes of a last batch that is not full."""
    labelled: int | None = None
    """How many of a batch's rows have labels, where train rows have none (`data.unlabelled`): what `labelled` of a
    student says, which is not asked for here. As many as `batch` shows the rows with labels alone, as a stage that
    learns from labels does; None takes the rows as they fall when all are shuffled together."""
    rank: int = 0
    """Which of the data-parallel processes this is: it gets a slice of each global batch."""
    world: int = 1
    """How many there are."""
    start_step: int = 0
    """The step, from 0, with which the first epoch begins."""


@dataclass(frozen=True, kw_only=True)
class RayDatasetOptions(Options):
    """What `ray_dataset` takes."""

    source: LogitStore | Recipe | str | Path = field(kw_only=False)
    """A store, open or by its path or URI; or a recipe, its file, or a run's folder or URI."""
    overrides: Sequence[str] = ()
    """`key=value` for a recipe file."""
    store_root: str | Path | None = None
    """Folder or `s3://` URI under which the stores of a recipe lie; None takes $AKD_DIST_STORE_ROOT, or `stores`."""
    split: Split = field(default="train", metadata={"choices": ("train", "validation", "test")})
    """Of a recipe: `train`, `validation` or `test`."""
    address: str | None = None
    """A Ray cluster, whose nodes see the store and the data; None starts one on this machine, unless one is connected.
    """

    def of_recipe(self) -> DatasetOptions:
        """The same of a recipe."""
        given: Any = {one.name: getattr(self, one.name) for one in fields(Options)}
        return DatasetOptions(
            recipe=self.source,  # type: ignore[arg-type]  # whoever has a store does not ask
            overrides=self.overrides,
            store_root=self.store_root,
            split=self.split,
            **given,
        )
