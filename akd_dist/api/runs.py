"""The verbs that work from a recipe: cache, import, train, compare, tune, report."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akd_dist.api.base import taking
from akd_dist.base import places
from akd_dist.options import (
    CacheOptions,
    CompareOptions,
    FleetOptions,
    ImportLogitsOptions,
    PlanOptions,
    RunOptions,
    TuneOptions,
)

if TYPE_CHECKING:
    from akd_dist.jobs.planning.plan import RunPlan
    from akd_dist.recipe import Recipe


@taking(CacheOptions)
def cache_teacher(options: CacheOptions) -> dict[str, Any]:
    """Make sure that sealed stores of the teacher's logits exist for a recipe's train, validation and test rows.

    Its arguments are the fields of `akd_dist.options.CacheOptions`.

    Returns:
        The document that `akd-dist cache-teacher --json` prints (schemas/cache.schema.json).

    Raises:
        AkdError: a refusal; nothing that was computed is lost.
    """
    recipe = options.read()  # a mistake in it is told before the heavy imports
    from akd_dist.jobs.idle import begun_for

    with begun_for(recipe, options) as idle:  # they import what caching needs while this process does
        from akd_dist.jobs.cache_teacher import cache_teacher

        return cache_teacher(recipe, options, idle)


@taking(PlanOptions)
def plan(options: PlanOptions) -> dict[str, Any]:
    """Measure what encodings of a recipe's teacher take, and how well each describes it at the students' temperatures.

    The teacher is run on a few rows in this process, and nothing is stored. Its arguments are the fields of
    `akd_dist.options.PlanOptions`.

    Returns:
        The document that `akd-dist plan --json` prints (schemas/plan.schema.json).

    Raises:
        AkdError: a refusal: of a budget that nothing fits, or of a teacher that is not there.
    """
    recipe = options.read()
    from akd_dist.jobs.plan_encodings import plan_encodings

    return plan_encodings(recipe, options)


@taking(ImportLogitsOptions)
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


@taking(RunOptions)
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


@taking(CompareOptions)
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


@taking(TuneOptions)
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
    from akd_dist.jobs.idle import begun_for

    with begun_for(recipe, options) as idle:  # they import what training needs while this process does
        from akd_dist.jobs.train_students import run_recipe

        return run_recipe(recipe, options, idle=idle)


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
