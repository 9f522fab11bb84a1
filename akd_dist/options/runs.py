"""The options of the verbs that cache, import and train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from akd_dist.base import places
from akd_dist.base.places import RUN_ROOT
from akd_dist.options.base import FillingOptions, RecipeOptions, StoredOptions, is_path, option, wrong_kind

if TYPE_CHECKING:
    from akd_dist.recipe import LogitKind, Recipe, SearchRecipe, Split


@dataclass(frozen=True, kw_only=True)
class CacheOptions(RecipeOptions):
    """What `cache_teacher` takes."""

    prepare_again: bool = option(
        False, "--prepare-again", is_flag=True, help="Prepare the data afresh, whatever was prepared before."
    )
    """Prepare this machine's data afresh, whatever was prepared before."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(StoredOptions):
    """What `plan` takes."""

    budget: str | None = option(
        None, "--budget", metavar="SIZE", help="Choose what describes best within it, as 40GB, for all stores together."
    )
    """Bytes that all stores together may take, such as `40GB`: the best encoding within it is chosen."""


@dataclass(frozen=True, kw_only=True)
class ImportLogitsOptions(FillingOptions):
    """What `import_logits` takes."""

    file: str | Path = field(kw_only=False, metadata={"argument": "LOGITS"})
    """The file of logits: `.npy`, `.npz`, `.safetensors` or Parquet, or a Zarr folder; float [rows, classes] or
    [views, rows, classes]."""
    split: Split | None = option(
        None,
        "--split",
        metavar="SPLIT",
        choices=("train", "validation", "test"),
        help="Whose logits they are: train, validation or test.  [default: train, and what is a share of its source]",
    )
    """Whose logits they are; None takes the train rows, and those of splits that are shares of the same source if the
    file has a row for each row of the source."""
    key: str | None = option(
        None,
        "--key",
        metavar="COLUMN",
        help="Join rows by this column of data and file, not by their order.",
    )
    """The column of the data, and the column or array of the file, by which rows are joined; None takes their order."""
    kind: LogitKind | None = option(
        None,
        "--kind",
        choices=("logits", "log_probabilities"),
        help="What they are; told by looking at them if left out.",
    )
    """`logits` or `log_probabilities`; None leaves it to what is seen."""

    def _from_file(self, load: Callable[..., Recipe]) -> Recipe:
        # The recipe can name these logits only once they are imported.
        return load(self.recipe, self.overrides, teacher={"store": "0" * 64})


@dataclass(frozen=True, kw_only=True)
class FleetOptions(RecipeOptions):
    """What every verb takes that trains students."""

    run_root: str | Path | None = option(
        None, "--run-root", metavar="URI", root=RUN_ROOT, folder=True, help="Where runs lie: a folder or s3://..."
    )
    """Folder or `s3://` URI of runs, this one is `<run_root>/<recipe.name>/`; None takes $AKD_DIST_RUN_ROOT or `runs`.
    """
    fresh: bool = option(
        False, "--fresh", is_flag=True, help="Remove an earlier run of this name, trained students and all; start over."
    )
    """Remove an earlier run of this name, its trained students too, and start over; nobody is asked. Stores stay."""
    trackers: Sequence[str] = option(
        (),
        "--tracker",
        choices=("mlflow", "wandb"),
        multiple=True,
        help="Forward every student's metrics there too; repeatable.",
    )
    """Where the students' metrics are forwarded besides TensorBoard: `mlflow`, `wandb`."""

    @property
    def runs(self) -> str:
        """The run root: the absolute path of a folder, or `s3://bucket/prefix`.

        Raises:
            RecipeError: it is a URI of another kind, or its name is not UTF-8.
        """
        chosen = RUN_ROOT.chosen(self.run_root)
        if chosen.startswith("s3://") and chosen.removeprefix("s3://").strip("/"):
            return places.nameable(chosen.rstrip("/"), "--run-root")
        seen = "a folder, or s3://bucket/prefix; with several nodes, a folder that every node sees"
        return str(places.folder(chosen, holds="runs", option="--run-root", expected=seen))


@dataclass(frozen=True, kw_only=True)
class RunOptions(FleetOptions, CacheOptions):
    """What `train_students` takes."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(FleetOptions):
    """What `compare` takes."""

    seeds: int | None = option(
        None, "--seeds", metavar="N", type=int, help="Seeds 0..N-1.  [default: the recipe's if several, else 0, 1, 2]"
    )
    """Train with seeds 0..seeds - 1; None takes the recipe's, if a model has two or more, else 0, 1, 2."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(FleetOptions):
    """What `tune` takes."""

    def read_search(self) -> SearchRecipe:
        """The recipe and its searches, read from its file.

        Raises:
            RecipeError: there is none, it is no file, or something is wrong with it.
        """
        from akd_dist.recipe import load_search

        if not is_path(self.recipe):
            raise wrong_kind("recipe", self.recipe, "the path of a recipe's file: a `search:` is no part of an object")
        found = load_search(str(self.recipe), self.overrides)
        code = [*found.recipe.code, *self.modules] if self.trust else found.recipe.code
        return replace(found, recipe=found.recipe.model_copy(update={"code": code}))
