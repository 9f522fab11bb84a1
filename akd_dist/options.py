"""The options of the verbs, each written once: commands, functions of `akd_dist` and jobs take them from here.

A field is a keyword argument of the function, and an option of the command if it names a flag. What it says to whoever
reads `--help` stands in `help`; what it says to a programmer stands below it. Importing this module is instant.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from akd_dist.base import places
from akd_dist.base.errors import RecipeError
from akd_dist.base.places import RUN_ROOT, STORE_ROOT

if TYPE_CHECKING:
    from rich.console import Console

    from akd_dist.recipe import Device, LastBatch, LogitKind, Recipe, SearchRecipe, Split, Target
    from akd_dist.storage.reader import LogitStore

Default = TypeVar("Default")


def option(default: Default, flag: str, **shown: Any) -> Default:
    """A keyword argument that is an option of the command line: its default, its flag, and click's arguments."""
    chosen: Default = field(default=default, metadata={"flag": flag, **shown})
    return chosen


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_list(value: object, of: Callable[[object], bool] = lambda one: isinstance(one, str)) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(of, value))


def _wrong_kind(name: str, value: object, expected: str) -> RecipeError:
    got = f"{type(value).__name__}: {value!r}"
    return RecipeError(
        f"the argument {name} is not what it takes", got=got, expected=expected, next="pass such a value"
    )


# What a field of some annotation takes: in words, and as a check. Commands have click look at most of it.
_TAKES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "str | Path": ("a path", _is_path),
    "str | Sequence[str]": ("text, or a list of texts", lambda value: isinstance(value, str) or _is_list(value)),
    "Sequence[str]": ("a list of texts", _is_list),
    "Sequence[str | Path]": ("a list of paths", functools.partial(_is_list, of=_is_path)),
}
_TAKES |= dict.fromkeys(("Device", "LastBatch", "LogitKind", "Split", "Target"), _TAKES["str"])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb takes.

    Raises:
        RecipeError: an argument is of a kind that it cannot be.
    """

    trust: Sequence[str] = option(
        (),
        "--trust",
        metavar="MODULE",
        multiple=True,
        help="Let a model folder, a store or a run name code of this module; repeatable.",
    )
    """Modules of your own, on Python's path or in the working folder, that a recipe, a model folder or a run may name;
    others do not run."""
    cache_root: str | Path | None = option(
        None,
        "--cache-root",
        metavar="DIR",
        folder=True,
        help="Prepared data.  [default: AKD_DIST_CACHE, or the user's cache folder]",
    )
    """Folder of this machine's prepared data and decoded stores; by default in the user's cache folder."""
    console: Console | None = None
    """Where progress is told; None is stderr for verbs that train, and nowhere for those that use a model."""

    def __post_init__(self) -> None:
        """A wrong kind is told at once: later it would be a mistake in the middle of the work, or not be noticed."""
        for one in fields(self):
            value, annotation = getattr(self, one.name), str(one.type)
            kind = annotation.removesuffix(" | None")
            if (value is None and kind != annotation) or kind not in _TAKES:
                continue
            expected, fits = _TAKES["str | Sequence[str]" if one.name == "trust" else kind]
            if (choices := one.metadata.get("choices")) is not None:
                expected = f"{expected}: {', '.join(choices)}"
            if not fits(value) or (choices and not set([value] if isinstance(value, str) else value) <= set(choices)):
                raise _wrong_kind(one.name, value, expected)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are trusted, their names checked.

        Raises:
            RecipeError: one is no module's name.
        """
        from akd_dist.base.trusted import check_module

        names = (self.trust,) if isinstance(self.trust, str) else tuple(self.trust)
        for name in names:
            check_module(name)
        return names

    @property
    def cache(self) -> str:
        """The cache root, absolute.

        Raises:
            RecipeError: it is a URI: what lies there is mapped into memory.
        """
        from akd_dist.storage.node_cache import cache_folder, ensure_home

        root = cache_folder(self.cache_root)
        ensure_home(root)
        return str(root)


@dataclass(frozen=True, kw_only=True)
class RecipeFileOptions(Options):
    """What every verb takes that reads a recipe."""

    recipe: Recipe | str | Path = field(kw_only=False, metadata={"argument": "RECIPE"})
    """A recipe, or the path of its file."""
    overrides: Sequence[str] = option(
        (), "--set", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
    )
    """`key=value` for a recipe file."""

    def read(self) -> Recipe:
        """The recipe: read from its file, and trusting what the user trusts.

        Raises:
            RecipeError: there is none, or something is wrong with it; overrides are given for one that is no file.
        """
        from akd_dist.recipe import Recipe, load_recipe

        if not isinstance(self.recipe, Recipe) and not _is_path(self.recipe):
            raise _wrong_kind("recipe", self.recipe, "an akd_dist.recipe.Recipe, or the path of its file")
        if isinstance(self.recipe, Recipe) and self.overrides:
            raise RecipeError(
                "overrides are for the file of a recipe, and this one is an object",
                got=", ".join(self.overrides),
                expected="no overrides, or the path of the file",
                next="load_recipe(path, overrides) reads a file with them",
            )
        read = self.recipe if isinstance(self.recipe, Recipe) else self._from_file(load_recipe)
        return read.model_copy(update={"code": [*read.code, *self.modules]}) if self.trust else read

    def _from_file(self, load: Callable[..., Recipe]) -> Recipe:
        return load(self.recipe, self.overrides)


@dataclass(frozen=True, kw_only=True)
class StoredOptions(RecipeFileOptions):
    """What the verbs take that look for the stores of a recipe."""

    store_root: str | Path | None = option(
        None,
        "--store-root",
        metavar="URI",
        root=STORE_ROOT,
        folder=True,
        help="Where stores lie: a folder or s3://...",
    )
    """Folder or `s3://` URI under which stores lie; None takes $AKD_DIST_STORE_ROOT, or `stores`."""

    @property
    def stores(self) -> str:
        """The store root, absolute.

        Raises:
            RecipeError: its name is not UTF-8.
        """
        return places.nameable(STORE_ROOT.chosen(self.store_root), "--store-root")


@dataclass(frozen=True, kw_only=True)
class FillingOptions(StoredOptions):
    """What the verbs take that fill these stores."""

    wait: bool = option(
        False, "--wait", is_flag=True, help="Wait for whoever holds the store or the run, instead of leaving."
    )
    """Wait for somebody else who holds the store or the run, instead of leaving."""
    dry_run: bool = option(
        False, "--dry-run", is_flag=True, help="Say what would be done; refuse what the command would."
    )
    """Only say what would be done, and refuse what the command would; takes no lock and leaves everything as it is."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(FillingOptions):
    """What the verbs that work from a recipe take."""

    address: str | None = option(
        None, "--address", metavar="ADDRESS", help="A Ray cluster.  [default: one is started here, on loopback]"
    )
    """A Ray cluster; None starts one on this machine if there is anything to compute."""
    wait_for_nodes: bool = option(
        False,
        "--wait-for-nodes",
        is_flag=True,
        help="Wait where the cluster is too small: for whom nodes join by other means than Ray's autoscaler, as SLURM. "
        "Where there is an autoscaler, a command waits anyway.",
    )
    """Wait for nodes instead of refusing a cluster that is too small; needed where they join by other means than Ray's
    autoscaler, for which a command waits anyway."""

    @property
    def patient(self) -> bool:
        """Whether nodes are waited for.

        Raises:
            RecipeError: on a Ray that is started here, which no node joins.
        """
        if self.wait_for_nodes and self.address is None:
            from akd_dist.base.errors import RecipeError

            raise RecipeError(
                "--wait-for-nodes without --address would wait for ever",
                got="a Ray that is started on this machine, and that no node joins",
                expected="the address of a cluster that nodes join",
                next="add --address, or leave --wait-for-nodes out",
            )
        return self.wait_for_nodes


@dataclass(frozen=True, kw_only=True)
class CacheOptions(RecipeOptions):
    """What `cache_teacher` takes."""

    prepare_again: bool = option(
        False, "--prepare-again", is_flag=True, help="Prepare the data afresh, whatever was prepared before."
    )
    """Prepare this machine's data afresh, whatever was prepared before."""


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


@dataclass(frozen=True, kw_only=True)
class TuneOptions(FleetOptions):
    """What `tune` takes."""

    def read_search(self) -> SearchRecipe:
        """The recipe and its searches, read from its file.

        Raises:
            RecipeError: there is none, it is no file, or something is wrong with it.
        """
        from akd_dist.recipe import load_search

        if not _is_path(self.recipe):
            raise _wrong_kind("recipe", self.recipe, "the path of a recipe's file: a `search:` is no part of an object")
        found = load_search(str(self.recipe), self.overrides)
        code = [*found.recipe.code, *self.modules] if self.trust else found.recipe.code
        return replace(found, recipe=found.recipe.model_copy(update={"code": code}))


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """What every verb takes that uses a finished model."""

    student: str | Path = field(kw_only=False, metadata={"argument": "STUDENT", "folder": True})
    """A folder or URI with model.safetensors and model.json, as `<run>/students/<student>`."""
    split: Split | None = option(
        None,
        "--split",
        metavar="SPLIT",
        choices=("train", "validation", "test"),
        help="Of a recipe: train, validation or test (the default).",
    )
    """Of a recipe; None takes `test`."""
    input: str | Sequence[str] | None = option(
        None, "--input", metavar="COLUMN", multiple=True, help="Column of inputs; twice for a pair of texts."
    )
    """The column of inputs, or two of a pair of texts; None takes those of the student's run, or `input`."""
    tokenizer: str | Path | None = option(
        None, "--tokenizer", metavar="FOLDER", help="Of a model of text, where nobody knows it."
    )
    """A tokenizer's folder, or its name on the hub, where it lies neither beside the model nor in its run."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions):
    """What every verb takes that runs a model on data that the user names."""

    data: str | Path = field(kw_only=False, metadata={"argument": "DATA"})
    """A recipe file or a run's folder; Parquet: a file, a folder, a glob or `s3://`; a folder of pictures, or tar
    files of them; or `digits`."""
    label: str | None = option(None, "--label", metavar="COLUMN", help="Column of labels.")
    """The column of labels; None takes that of the student's run, or `label`, where there is one. An empty name reads
    none."""
    device: Device = option("cpu", "--device", choices=("cpu", "cuda"), show_default=True, help="Where to compute.")
    """`cpu` or `cuda`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """What `evaluate` takes."""

    others: Sequence[str | Path] = option(
        (),
        "--with",
        metavar="MODEL",
        multiple=True,
        folder=True,
        help="Another model to compare with; repeatable.",
    )
    """Further model folders, for the same inputs and classes."""


@dataclass(frozen=True, kw_only=True)
class WritingOptions(Options):
    """What every verb takes that writes what it finds."""

    force: bool = option(False, "--force", is_flag=True, help="Overwrite what is there.")
    """Whether `out` may take the place of something else."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(WritingOptions, DataOptions):
    """What `predict` takes."""

    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "FILE",
            "help": "The file to write.  [default: the student's name and .parquet, here]",
        },
    )
    """The file; None takes `<student>.parquet` in the working folder. See `evaluation.predict` for its columns."""
    logits: bool = option(True, "--no-logits", help="Leave out the column of logits, the largest of many classes.")
    """Whether to write the column of logits."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WritingOptions, ModelOptions):
    """What `export` takes."""

    to: Target = field(
        kw_only=False,
        metadata={
            "flag": "--to",
            "choices": ("onnx", "torch-export", "huggingface"),
            "required": True,
            "help": "The format to write.",
        },
    )
    """`onnx`, `torch-export` or `huggingface`."""
    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "PATH",
            "help": "The file to write; a folder for huggingface.  [default: the student's name and .onnx, .pt2 or "
            "-huggingface, here]",
        },
    )
    """The file; a folder for `huggingface`. None takes `<student>.onnx`, `<student>.pt2` or `<student>-huggingface` in
    the working folder."""
    data: str | Path | None = option(
        None, "--data", metavar="DATA", help="Rows to compare logits on.  [default: those of the student's run]"
    )
    """Rows to compare logits on; None takes those of the student's run, and random inputs outside of one."""


@dataclass(frozen=True, kw_only=True)
class ModelImportOptions(WritingOptions, RecipeFileOptions):
    """What `import_model` takes."""

    checkpoint: str | Path | None = field(
        default=None, kw_only=False, metadata={"argument": "[CHECKPOINT]", "required": False}
    )
    """A file of safetensors or a torch state dict, a folder with one, or the `s3://` URI of a file; None takes
    `teacher.weights`. Its architecture is the recipe's `teacher.model`."""
    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "FOLDER",
            "help": "The model folder to write.  [default: the checkpoint's name without its ending, here]",
        },
    )
    """The model folder; None takes the checkpoint's name without its ending, in the working folder."""
