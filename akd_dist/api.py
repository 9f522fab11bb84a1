"""The verbs of akd-dist, as functions: what the commands do, and no more. See `akd_dist`.

What a verb takes, as arguments and as options of its command, is written once, in `akd_dist.options`. Importing this
module is instant: each verb imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from akd_dist.base import places
from akd_dist.options import (
    BatchesOptions,
    CacheOptions,
    CompareOptions,
    DatasetOptions,
    EvaluateOptions,
    ExportOptions,
    FleetOptions,
    ImportLogitsOptions,
    ModelImportOptions,
    ModelOptions,
    Options,
    PredictOptions,
    RayDatasetOptions,
    RunOptions,
    SplitOptions,
    TuneOptions,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from akd_dist.data.row_cache import Progress
    from akd_dist.data.source_rows import SourceRows
    from akd_dist.distill.dataset import DistillationBatches, DistillationDataset
    from akd_dist.jobs.planning.plan import RunPlan
    from akd_dist.jobs.ray_data import Dataset
    from akd_dist.recipe import Recipe
    from akd_dist.serve.examples import DataRequest
    from akd_dist.serve.remote import Brought
    from akd_dist.storage.reader import LogitStore

Arguments = ParamSpec("Arguments")
Given = TypeVar("Given", bound=Options)
Result = TypeVar("Result")


def _taking(
    options: Callable[Arguments, Given],
) -> Callable[[Callable[[Given], Result]], Callable[Arguments, Result]]:
    """Let a verb take the fields of its options as arguments; type checkers, editors and `help` see them so."""

    def decorate(verb: Callable[[Given], Result]) -> Callable[Arguments, Result]:
        @functools.wraps(verb)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return verb(options(*args, **kwargs))

        returns = verb.__annotations__["return"]
        call.__dict__["__signature__"] = inspect.signature(options).replace(return_annotation=returns)
        return call

    return decorate


@_taking(CacheOptions)
def cache_teacher(options: CacheOptions) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for a recipe's train, validation and test rows.

    Its arguments are the fields of `akd_dist.options.CacheOptions`.

    Returns:
        The document that `akd-dist cache-teacher --json` prints (schemas/cache.schema.json).

    Raises:
        AkdError: a refusal; nothing that was computed is lost.
    """
    recipe = options.read()  # a mistake in it is told before the heavy imports
    from akd_dist.jobs.cache_teacher import cache_teacher

    return cache_teacher(recipe, options)


@_taking(ImportLogitsOptions)
def import_logits(options: ImportLogitsOptions) -> dict[str, Any]:
    """Make sealed stores of logits that others computed for a recipe's rows; no teacher model is needed from then on.

    The same logits again are a hit. The recipe may leave out its `teacher`. The arguments are the fields of
    `akd_dist.options.ImportLogitsOptions`.

    Returns:
        The document that `akd-dist stores import --json` prints (schemas/stores-import.schema.json); its
        `teacher` is what the recipe has to say to use them.

    Raises:
        AkdError: a refusal: of a file that is damaged, of other rows or classes, in another order, or not of logits.
    """
    recipe = options.read()
    from akd_dist.jobs.import_logits import import_logits

    return import_logits(recipe, options)


@_taking(RunOptions)
def train_students(options: RunOptions) -> dict[str, Any]:
    """Train a recipe's students from the teacher's stored logits, caching these first if they are missing.

    The same recipe again resumes what is unfinished, or returns the saved results when all is done. Its arguments are
    the fields of `akd_dist.options.RunOptions`.

    Returns:
        The content of fleet.json (schemas/fleet.schema.json); of a dry run the plan (schemas/fleet-plan.schema.json).

    Raises:
        AkdError: a refusal; nothing that was trained is lost.
    """
    _, fleet = _run(options.read(), options)
    return fleet


@_taking(CompareOptions)
def compare(options: CompareOptions) -> dict[str, Any]:
    """Train a recipe's student models under every objective with several seeds, from one store, and compare them.

    Each model of the recipe needs an Annealing-KD student. The run is `<run_root>/<recipe.name>-compare/`, resumed like
    any other; comparison.json and comparison.md lie there. The arguments are the fields of
    `akd_dist.options.CompareOptions`.

    Returns:
        The content of comparison.json (schemas/compare.schema.json); of a dry run the plan of its students
        (schemas/fleet-plan.schema.json).

    Raises:
        AkdError: a refusal; nothing that was trained is lost.
    """
    read = options.read()
    from akd_dist.documents.fleet import FleetDocument
    from akd_dist.reporting import comparison

    expanded = comparison.expand(read, options.seeds)
    plan, fleet = _run(expanded, RunOptions(**{one.name: getattr(options, one.name) for one in fields(FleetOptions)}))
    if options.dry_run:
        return fleet
    splits = plan.inputs.splits
    words = ["akd-dist", "compare", f"{read.name}.yaml" if read is options.recipe else str(options.recipe)]
    words += [word for override in options.overrides for word in ("--set", override)]
    words += [word for module in options.modules for word in ("--trust", module)]
    words += [] if options.seeds is None else ["--seeds", str(options.seeds)]
    document = comparison.compare(
        plan.recipe,
        FleetDocument.model_validate(fleet),
        {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        shlex.join(words),
        splits.train.unlabelled,
    )
    comparison.write_comparison(plan.run, document)
    report(plan.run)  # now with the table
    if "://" in fleet["run"]:
        from akd_dist.storage.run_copy import put_documents

        put_documents(fleet["run"], plan.run)
    return document.plain()


@_taking(TuneOptions)
def tune(options: TuneOptions) -> dict[str, Any]:
    """Search what the `search:` blocks of a recipe name, by successive halving, and measure the best on the test rows.

    The run is `<run_root>/<recipe.name>-tune/`, resumed like any other; tune.json lies there. The arguments are the
    fields of `akd_dist.options.TuneOptions`.

    Returns:
        The content of tune.json (schemas/tune.schema.json); of a dry run what would be tried.

    Raises:
        AkdError: a refusal; nothing that was trained is lost.
    """
    given = options.read_search()
    if options.trackers:
        from akd_dist.tracking.follower import check_trackers

        check_trackers(options.trackers)
    from akd_dist.jobs.tune import tune

    return tune(given, RunOptions(**{one.name: getattr(options, one.name) for one in fields(FleetOptions)})).plain()


def _run(recipe: Recipe, options: RunOptions) -> tuple[RunPlan, dict[str, Any]]:
    if options.trackers:
        from akd_dist.tracking.follower import check_trackers

        check_trackers(options.trackers)
    from akd_dist.jobs.train_students import run_recipe

    return run_recipe(recipe, options)


def open_store(uri: str | Path) -> LogitStore:
    """Open a sealed store, its presence and sizes checked: `.rows(view, start, stop)` -> float32 [n, classes].

    Raises:
        RefusedError: there is no store, or it is not sealed.
        DamagedError: it is not what was sealed.
    """
    from akd_dist.storage.reader import open_store

    return open_store(places.absolute(uri))


@_taking(DatasetOptions)
def distillation_dataset(options: DatasetOptions) -> DistillationDataset:
    """A split of a recipe or a run with the teacher's stored logits, as a map-style dataset of torch.

        loader = DataLoader(akd_dist.distillation_dataset("digits.yaml"), batch_size=256, shuffle=True)

    For trainers of your own, of Hugging Face or Lightning; see docs/howto/trainers.md. Rows are prepared on this
    machine if they are not yet; the teacher never runs, and neither does Ray. Its arguments are the fields of
    `akd_dist.options.DatasetOptions`.

    Raises:
        AkdError: a refusal: there is no sealed store of train rows, rows or pixels are not those that the teacher saw,
            or the cache has no room for all rows and a view of logits.
    """
    from akd_dist.jobs.opening import open_dataset

    return open_dataset(options)


@_taking(BatchesOptions)
def distillation_batches(options: BatchesOptions) -> DistillationBatches:
    """The same as an iterable of whole batches, in the order of our own training, by rank and from a position.

        loader = DataLoader(akd_dist.distillation_batches("digits.yaml", batch=256), batch_size=None)

    Rows that the cache has no room for are read window by window, as training does. The arguments are the fields of
    `akd_dist.options.BatchesOptions`.

    Raises:
        AkdError: as `distillation_dataset`.
    """
    from akd_dist.jobs.opening import open_batches

    return open_batches(options)


@_taking(RayDatasetOptions)
def ray_dataset(options: RayDatasetOptions) -> Dataset:
    """The teacher's logits as a dataset of Ray Data, read shard by shard where its tasks run.

    Of a store: `view`, `row` and `logits`, all views. Of a recipe or a run also what a row of `distillation_dataset`
    has, as each view shows it, with the logits as `teacher_logits`. Every node has to see the store, and the data. Its
    arguments are the fields of `akd_dist.options.RayDatasetOptions`.

    Raises:
        AkdError: a refusal: there is no sealed store; Ray Data is not installed, or no cluster answers.
    """
    from akd_dist.jobs.ray_data import ray_dataset

    return ray_dataset(options)


@_taking(SplitOptions)
def source_rows(options: SplitOptions) -> SourceRows:
    """Which row of which file each row of a split was: `.where(row)` -> (file, row in it).

    Rows of a split are counted as in stores, datasets and predictions. Its arguments are the fields of
    `akd_dist.options.SplitOptions`.

    Raises:
        AkdError: a refusal: the recipe, or a source that cannot be opened.
    """
    from akd_dist.jobs.opening import source_rows_of

    return source_rows_of(options)


def load_model(folder: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """A trained model, in eval mode, from a folder or URI with model.safetensors and model.json.

    Args:
        trust: modules of your own whose code the folder may name, on Python's path or in the working folder; others
                are not imported.

    Raises:
        RefusedError: there is no model, it names code that you do not trust, it fits no memory, or its weights would
            have to be unpickled.
        DamagedError: card and weights are not those that were written.
    """
    from akd_dist.base.trusted import Trusted
    from akd_dist.models.folder import load_model
    from akd_dist.serve.remote import brought

    options = Options(trust=trust)
    with brought(options.cache) as here:
        return load_model(here.model(places.absolute(folder)), Trusted(modules=options.modules))


def report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Write runs' report.html afresh from what lies in their folders; for several runs, one more that compares them.

    Args:
        runs: folders of runs, or their `s3://` URIs.
        out: where the page that is returned goes: by default `report.html` in the run's folder, or beside the first of
            several.

    Returns:
        The path of the run's page; of several runs, of the one that compares them. Of a run in object storage, that of
        a copy in this machine's cache: the page itself is put where the run is.

    Raises:
        RecipeError: no run is named, or one twice.
        RefusedError: there is no run, it is not finished, or several cannot be compared.
        DamagedError: results are not what training wrote.
    """
    from akd_dist.reporting.remote import at_hand, write_reports_of

    with at_hand(runs) as found:
        document = write_reports_of(found, None if out is None else places.output(out))
        page: str = document.comparison.report if document.comparison else document.runs[0].report
        return Path(page)


@_taking(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Every metric of a model on data; and of others, with how far they agree with it.

    Its arguments are the fields of `akd_dist.options.EvaluateOptions`.

    Returns:
        The document that `akd-dist evaluate --json` prints (schemas/evaluate.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import evaluate
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = evaluate(
            here.model(places.absolute(options.student)),
            _request(options, options.data, options.label, here),
            Path(options.cache),
            others=[here.model(places.absolute(other)) for other in options.others],
            device=options.device,
            on_progress=on_progress,
            on_note=_notes(options.console),
        )
        return here.named(document.plain())


@_taking(PredictOptions)
def predict(options: PredictOptions) -> dict[str, Any]:
    """What a model says of every row, as a Parquet file: whole, or absent.

    Its arguments are the fields of `akd_dist.options.PredictOptions`.

    Returns:
        The document that `akd-dist predict --json` prints (schemas/predict.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import predict
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = predict(
            here.model(places.absolute(options.student)),
            _request(options, options.data, options.label, here),
            places.output(options.out or f"{_name_of(options.student)}.parquet"),
            Path(options.cache),
            with_logits=options.logits,
            overwrite=options.force,
            device=options.device,
            on_progress=on_progress,
            on_note=_notes(options.console),
        )
        return here.named(document.plain())


@_taking(ExportOptions)
def export(options: ExportOptions) -> dict[str, Any]:
    """A model as others run it, without akd-dist; kept only if it gives the same logits as here.

    Its arguments are the fields of `akd_dist.options.ExportOptions`.

    Returns:
        The document that `akd-dist export --json` prints (schemas/export.schema.json).

    Raises:
        AkdError: a refusal: options, model or data; the model cannot be exported, or the export does not agree.
    """
    from akd_dist.serve.exports import EXPORT_SUFFIXES, export
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = export(
            here.model(places.absolute(options.student)),
            options.to,
            places.output(options.out or f"{_name_of(options.student)}{EXPORT_SUFFIXES.get(options.to, '')}"),
            Path(options.cache),
            asked=None if options.data is None else _request(options, options.data, "", here),
            tokenizer=None if options.tokenizer is None else str(options.tokenizer),
            trust=options.modules,
            force=options.force,
            on_progress=on_progress,
        )
        return here.named(document.plain())


@_taking(ModelImportOptions)
def import_model(options: ModelImportOptions) -> dict[str, Any]:
    """A checkpoint from elsewhere as a model folder, for the inputs and classes of a recipe; nothing is unpickled.

    Its arguments are the fields of `akd_dist.options.ModelImportOptions`.

    Returns:
        The document that `akd-dist models import --json` prints (schemas/model-import.schema.json).

    Raises:
        AkdError: a refusal: options, recipe, data or checkpoint.
    """
    recipe = options.read().own()
    from akd_dist.serve.importing import import_model

    with _meters(options.console) as on_progress:
        return import_model(
            recipe,
            None if options.checkpoint is None else places.absolute(options.checkpoint),
            None if options.out is None else places.output(options.out),
            Path(options.cache),
            force=options.force,
            on_progress=on_progress,
            on_note=_notes(options.console) or (lambda line: None),
        ).plain()


def _name_of(folder: str | Path) -> str:
    """The last part of a model folder's path or URI, after which files that are made of it are named."""
    return Path(places.absolute(folder)).name


def _request(options: ModelOptions, data: str | Path, label: str | None, here: Brought) -> DataRequest:
    from akd_dist.serve.examples import DIGITS, DataRequest

    return DataRequest(
        data=DIGITS if str(data) == DIGITS else here.data(places.absolute(data)),
        split=options.split,
        input=(options.input,) if isinstance(options.input, str) else tuple(options.input or ()),
        label=label,
        tokenizer=None if options.tokenizer is None else str(options.tokenizer),
        trust=options.modules,
    )


@contextlib.contextmanager
def _meters(console: Console | None) -> Iterator[Progress | None]:
    """Progress on a console, a meter for each thing that is done, one after the other."""
    if console is None:
        yield None
        return
    from akd_dist.tracking.progress import Meter, meter

    with contextlib.ExitStack() as stack:
        shown: dict[str, Meter] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(meter(console, what, total))
                shown[what].update(0)
            shown[what].update(done)

        yield update


def _notes(console: Console | None) -> Callable[[str], None] | None:
    """Lines for whoever waits, on a console."""
    if console is None:
        return None
    from akd_dist.tracking.progress import tell

    return functools.partial(tell, console)
