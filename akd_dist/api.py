"""The verbs of akd-dist, as functions: what the commands do, and no more. See `akd_dist`.

Importing this module is instant: each verb imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akd_dist.base import places
from akd_dist.base.places import RUN_ROOT, STORE_ROOT

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from akd_dist.data.row_cache import Progress
    from akd_dist.recipe import Recipe
    from akd_dist.serve.examples import DataRequest
    from akd_dist.storage.reader import LogitStore


def cache_teacher(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    store_root: str | Path | None = None,
    cache_root: str | Path | None = None,
    address: str | None = None,
    wait: bool = False,
    dry_run: bool = False,
    prepare_again: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for a recipe's train, validation and test rows.

    Args:
        recipe: a recipe, or the path of its file.
        overrides: `key=value` for a recipe file, as the command's --set.
        trust: modules that may run besides those under the recipe's `code`, as the command's --trust.
        store_root: folder or `s3://` URI under which stores lie; None takes $AKD_DIST_STORE_ROOT, or `stores`.
        cache_root: folder of this machine's prepared data; by default in the user's cache folder.
        address: a Ray cluster; None starts one on this machine if there is anything to compute.
        wait: wait for somebody else who writes the same store, instead of leaving.
        dry_run: only say what would be computed, and refuse what the command would.
        prepare_again: prepare this machine's data afresh, whatever was prepared before.
        console: where progress is told; stderr by default.

    Returns:
        The document that `akd-dist cache-teacher --json` prints (schemas/cache.schema.json).

    Raises:
        AkdError: a refusal; nothing that was computed is lost.
    """
    recipe = _recipe(recipe, overrides, trust)  # a mistake in it is told before the heavy imports
    from akd_dist.jobs.cache_teacher import cache_teacher

    return cache_teacher(
        recipe,
        store_root=STORE_ROOT.chosen(store_root),
        cache_root=_cache_root(cache_root),
        address=address,
        wait=wait,
        dry_run=dry_run,
        prepare_again=prepare_again,
        console=console,
    )


def train_students(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    store_root: str | Path | None = None,
    run_root: str | Path | None = None,
    cache_root: str | Path | None = None,
    address: str | None = None,
    fresh: bool = False,
    wait: bool = False,
    dry_run: bool = False,
    prepare_again: bool = False,
    trackers: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a recipe's students from the teacher's stored logits, caching these first if they are missing.

    The same recipe again resumes what is unfinished, or returns the saved results when all is done.

    Args:
        recipe: a recipe, or the path of its file.
        overrides: `key=value` for a recipe file, as the command's --set.
        trust: modules that may run besides those under the recipe's `code`, as the command's --trust.
        store_root: folder or `s3://` URI under which stores lie; None takes $AKD_DIST_STORE_ROOT, or `stores`.
        run_root: folder of runs, this one is `<run_root>/<recipe.name>/`; None takes $AKD_DIST_RUN_ROOT, or `runs`.
        cache_root: folder of this machine's prepared data; by default in the user's cache folder.
        address: a Ray cluster; None starts one on this machine if there is anything to do.
        fresh: forget an earlier run of this name.
        wait: wait for somebody else who holds the store or the run, instead of leaving.
        dry_run: only say what would be done, and refuse what the command would.
        prepare_again: prepare this machine's data afresh, whatever was prepared before.
        trackers: where the students' metrics are forwarded besides TensorBoard: `mlflow`, `wandb`.
        console: where progress is told; stderr by default.

    Returns:
        The content of fleet.json (schemas/fleet.schema.json); of a dry run the plan (schemas/fleet-plan.schema.json).

    Raises:
        AkdError: a refusal; nothing that was trained is lost.
    """
    recipe = _recipe(recipe, overrides, trust)
    if trackers:
        from akd_dist.tracking.follower import check_trackers

        check_trackers(trackers)
    from akd_dist.jobs.train_students import train_students

    return train_students(
        recipe,
        store_root=STORE_ROOT.chosen(store_root),
        run_root=RUN_ROOT.chosen(run_root),
        cache_root=_cache_root(cache_root),
        address=address,
        fresh=fresh,
        wait=wait,
        dry_run=dry_run,
        prepare_again=prepare_again,
        trackers=trackers,
        console=console,
    )


def compare(
    recipe: Recipe | str | Path,
    *,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
    store_root: str | Path | None = None,
    run_root: str | Path | None = None,
    cache_root: str | Path | None = None,
    address: str | None = None,
    fresh: bool = False,
    wait: bool = False,
    trackers: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a recipe's student models under every objective with several seeds, from one store, and compare them.

    The run is `<run_root>/<recipe.name>-compare/`, resumed like any other; comparison.json and comparison.md lie there.

    Args:
        recipe: a recipe, or the path of its file; each model needs an Annealing-KD student.
        seeds: train with seeds 0..seeds - 1; None takes the recipe's, if a model has two or more, else 0, 1, 2.
        overrides: `key=value` for a recipe file, as the command's --set.
        trust: modules that may run besides those under the recipe's `code`, as the command's --trust.
        store_root, run_root, cache_root, address, fresh, wait, trackers, console: as for `train_students`.

    Returns:
        The content of comparison.json (schemas/compare.schema.json).

    Raises:
        AkdError: a refusal; nothing that was trained is lost.
    """
    read = _recipe(recipe, overrides, trust)
    from akd_dist.reporting import comparison

    expanded = comparison.expand(read, seeds)
    fleet = train_students(
        expanded,
        store_root=store_root,
        run_root=run_root,
        cache_root=cache_root,
        address=address,
        fresh=fresh,
        wait=wait,
        trackers=trackers,
        console=console,
    )
    from akd_dist.data.row_cache import prepare
    from akd_dist.documents.fleet import FleetDocument

    splits = prepare(expanded.data, Path(_cache_root(cache_root)), expected={})  # done already: this only looks
    words = ["akd-dist", "compare", f"{read.name}.yaml" if read is recipe else str(recipe)]
    words += [word for override in overrides for word in ("--set", override)]
    words += [word for module in _modules(trust) for word in ("--trust", module)]
    words += [] if seeds is None else ["--seeds", str(seeds)]
    document = comparison.compare(
        expanded,
        FleetDocument.model_validate(fleet),
        {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        shlex.join(words),
    )
    comparison.write_comparison(Path(fleet["run"]), document)
    report(fleet["run"])  # now with the table
    return document.plain()


def open_store(uri: str | Path) -> LogitStore:
    """Open a sealed store, its presence and sizes checked: `.rows(view, start, stop)` -> float32 [n, classes].

    Raises:
        RefusedError: there is no store, or it is not sealed.
        DamagedError: it is not what was sealed.
    """
    from akd_dist.storage.reader import open_store

    return open_store(places.absolute(uri))


def load_model(folder: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """A trained model, in eval mode, from a folder or URI with model.safetensors and model.json.

    Args:
        trust: modules of your own whose code the folder may name, on Python's path; others are not imported.

    Raises:
        RefusedError: there is no model, it names code that you do not trust, it fits no memory, or its weights would
            have to be unpickled.
        DamagedError: card and weights are not those that were written.
    """
    from akd_dist.base.trusted import Trusted
    from akd_dist.models.folder import load_model

    return load_model(places.absolute(folder), Trusted(modules=_modules(trust)))


def report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Write runs' report.html afresh from what lies in their folders; for several runs, one more that compares them.

    Args:
        runs: folders of runs.
        out: where the page that is returned goes: by default `report.html` in the run's folder, or beside the first of
            several.

    Returns:
        The path of the run's page; of several runs, of the one that compares them.

    Raises:
        RecipeError: no run is named, or one twice.
        RefusedError: there is no run, it is not finished, or several cannot be compared.
        DamagedError: results are not what training wrote.
    """
    from akd_dist.base.files import expanded
    from akd_dist.reporting.page import write_reports

    document = write_reports([expanded(run) for run in runs], None if out is None else Path(places.absolute(out)))
    return Path(document.comparison.report if document.comparison else document.runs[0].report)


def evaluate(
    student: str | Path,
    data: str | Path,
    *,
    others: Sequence[str | Path] = (),
    split: str | None = None,
    input: str | Sequence[str] | None = None,
    label: str | None = None,
    tokenizer: str | Path | None = None,
    trust: Sequence[str] = (),
    device: str = "cpu",
    cache_root: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Every metric of a model on data; and of others, with how far they agree with it.

    Args:
        student: a folder or URI with model.safetensors and model.json, as `<run>/students/<student>`.
        data: a recipe file or a run's folder; Parquet: a file, a folder, a glob or `s3://`; or `digits`.
        others: further model folders, for the same inputs and classes.
        split: of a recipe; None takes `test`.
        input: the column of inputs, or two of a pair of texts; None takes those of the student's run, or `input`.
        label: the column of labels; None takes that of the student's run, or `label`.
        tokenizer: a tokenizer's folder, or its name on the hub, where it lies neither beside the model nor in its run.
        trust: modules of your own whose code model folders and runs may name; a recipe file as `data` may name its own.
        device: `cpu` or `cuda`.
        cache_root: folder of this machine's prepared data; by default in the user's cache folder.
        console: where progress is told; None tells nothing.

    Returns:
        The document that `akd-dist evaluate --json` prints (schemas/evaluate.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import evaluate

    asked = _asked(data, split, input, label, tokenizer, trust)
    with _meters(console) as on_progress:
        return evaluate(
            places.absolute(student),
            asked,
            Path(_cache_root(cache_root)),
            others=[places.absolute(other) for other in others],
            device=device,
            on_progress=on_progress,
            on_note=_notes(console),
        )


def predict(
    student: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    input: str | Sequence[str] | None = None,
    label: str | None = None,
    tokenizer: str | Path | None = None,
    trust: Sequence[str] = (),
    logits: bool = True,
    force: bool = False,
    device: str = "cpu",
    cache_root: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What a model says of every row, as a Parquet file: whole, or absent.

    Args:
        student, data, split, input, tokenizer, trust, device, cache_root, console: as for `evaluate`.
        out: the file; None takes `<student>.parquet` in the working folder. See `evaluation.predict` for its columns.
        label: the column of labels; None takes that of the student's run, or `label`, where there is one; an empty
            name reads no labels.
        logits: whether to write the column of logits.
        force: whether `out` may take the place of another file.

    Returns:
        The document that `akd-dist predict --json` prints (schemas/predict.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import predict

    asked = _asked(data, split, input, label, tokenizer, trust)
    with _meters(console) as on_progress:
        return predict(
            places.absolute(student),
            asked,
            Path(places.absolute(out or f"{_name_of(student)}.parquet")),
            Path(_cache_root(cache_root)),
            with_logits=logits,
            overwrite=force,
            device=device,
            on_progress=on_progress,
            on_note=_notes(console),
        )


def export(
    student: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    input: str | Sequence[str] | None = None,
    tokenizer: str | Path | None = None,
    trust: Sequence[str] = (),
    force: bool = False,
    cache_root: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """A model as others run it, without akd-dist; kept only if it gives the same logits as here.

    Args:
        student: as for `evaluate`.
        to: `onnx`, `torch-export` or `huggingface`.
        out: the file; a folder for `huggingface`. None takes `<student>.onnx`, `<student>.pt2` or
            `<student>-huggingface` in the working folder.
        data: rows to compare logits on; None takes those of the student's run, and random inputs outside of one.
        split, input, tokenizer, trust, cache_root, console: as for `evaluate`.
        force: whether `out` may take the place of something else.

    Returns:
        The document that `akd-dist export --json` prints (schemas/export.schema.json).

    Raises:
        AkdError: a refusal: options, model or data; the model cannot be exported, or the export does not agree.
    """
    from akd_dist.serve.exports import EXPORT_SUFFIXES, export

    asked = None if data is None else _asked(data, split, input, "", tokenizer, trust)
    with _meters(console) as on_progress:
        return export(
            places.absolute(student),
            to,
            Path(places.absolute(out or f"{_name_of(student)}{EXPORT_SUFFIXES.get(to, '')}")),
            Path(_cache_root(cache_root)),
            asked=asked,
            tokenizer=None if tokenizer is None else str(tokenizer),
            trust=_modules(trust),
            force=force,
            on_progress=on_progress,
        )


def _name_of(folder: str | Path) -> str:
    """The last part of a model folder's path or URI, after which files that are made of it are named."""
    return Path(places.absolute(folder)).name


def _asked(
    data: str | Path,
    split: str | None,
    input: str | Sequence[str] | None,
    label: str | None,
    tokenizer: str | Path | None,
    trust: Sequence[str],
) -> DataRequest:
    from akd_dist.serve.examples import DIGITS, DataRequest

    return DataRequest(
        data=DIGITS if str(data) == DIGITS else places.absolute(data),
        split=split,
        input=(input,) if isinstance(input, str) else tuple(input or ()),
        label=label,
        tokenizer=None if tokenizer is None else str(tokenizer),
        trust=_modules(trust),
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


def _cache_root(given: str | Path | None) -> str:
    from akd_dist.storage.node_cache import default_cache_root, ensure_home

    root = places.absolute(given or default_cache_root())
    ensure_home(Path(root))
    return root


def _recipe(recipe: Recipe | str | Path, overrides: Sequence[str], trust: Sequence[str]) -> Recipe:
    from akd_dist.recipe import Recipe, load_recipe

    read = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    return read.model_copy(update={"code": [*read.code, *_modules(trust)]}) if trust else read


def _modules(trust: Sequence[str]) -> tuple[str, ...]:
    """The names of modules, checked.

    Raises:
        RecipeError: one is no module's name.
    """
    from akd_dist.base.trusted import check_module

    names = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in names:
        check_module(name)
    return names
