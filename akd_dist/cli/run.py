"""The verbs that compute: quickstart, cache-teacher, train-students, compare."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import akd_dist
from akd_dist.base.errors import RecipeError
from akd_dist.cli.options import json_option, taking
from akd_dist.cli.plans import print_encodings, print_fleet_plan, print_plan
from akd_dist.cli.recipes import command_to_train
from akd_dist.cli.show import (
    SHORT_ID,
    command_line,
    counted,
    print_facts,
    print_json,
    print_table,
    progress_console,
    short_path,
    size,
    stdout_for_results,
)
from akd_dist.options import CacheOptions, CompareOptions, PlanOptions, RunOptions

if TYPE_CHECKING:
    from akd_dist.documents.cache import CacheDocument
    from akd_dist.documents.fleet import FleetDocument

Given = dict[str, Any]
"""The options that a command was given, by name."""


@click.command("quickstart")
@taking(CompareOptions, without=("recipe", "seeds"))
@json_option
def quickstart(as_json: bool, **given: Any) -> int:
    """The whole story on real digits.

    Trains a teacher, caches it, trains students that have few labels from the store and shows how they do, in about a
    minute.
    """
    return _train(given | {"recipe": _packaged_recipe()}, as_json, closing=after_quickstart)


@click.command("cache-teacher")
@taking(CacheOptions)
@json_option
def cache_teacher(as_json: bool, **given: Any) -> None:
    """Run the teacher once, store its logits.

    A store that is there already is a hit; one that an interrupted run left behind is completed.
    """
    from akd_dist.documents.cache import CacheDocument, PlanDocument

    with stdout_for_results():
        document = akd_dist.cache_teacher(**given, console=progress_console())
    if as_json:
        print_json(document)
    elif given["dry_run"]:
        print_plan(PlanDocument.model_validate(document))
    else:
        print_cached(CacheDocument.model_validate(document), command_to_train(**given))


@click.command("plan")
@taking(PlanOptions)
@json_option
def plan(as_json: bool, **given: Any) -> None:
    """Compare ways to store a teacher's logits.

    Runs it on a few rows, for many classes: bytes, divergence and errors of gradients at the temperatures that
    students of the recipe ask for. Nothing is stored.
    """
    from akd_dist.documents.encodings import EncodingsDocument

    with stdout_for_results():
        document = akd_dist.plan(**given, console=progress_console())
    if as_json:
        print_json(document)
    else:
        print_encodings(EncodingsDocument.model_validate(document))


@click.command("train-students")
@taking(RunOptions)
@json_option
def train_students(as_json: bool, **given: Any) -> int:
    """Train students from the stored logits.

    Caches the teacher first if its store is missing. The same command again resumes, or shows the saved results.
    """
    return _train(given, as_json, closing=after_training)


def _train(given: Given, as_json: bool, *, closing: Callable[[FleetDocument, Given], list[str]]) -> int:
    from akd_dist.documents.fleet import FleetDocument
    from akd_dist.documents.plan import FleetPlanDocument

    with stdout_for_results():
        document = akd_dist.train_students(**given, console=progress_console())
    if as_json:
        print_json(document)
    elif given.get("dry_run"):
        print_fleet_plan(FleetPlanDocument.model_validate(document))
    else:
        fleet = FleetDocument.model_validate(document)
        print_fleet(fleet, closing(fleet, given))
    if document.get("refused"):
        return RecipeError.code
    return int(any(student["state"] != "done" for student in document.get("students", ())))


def _packaged_recipe() -> str:
    """The quickstart's recipe as it ships, by the shortest path that leads there from here."""
    from importlib.resources import files

    path = Path(str(files("akd_dist.jobs") / "digits_unlabelled.yaml")).resolve()
    return short_path(path)


@click.command("compare")
@taking(CompareOptions)
@json_option
def compare(as_json: bool, **given: Any) -> int:
    """Train every objective, print the papers' table.

    Each student model of the recipe, from scratch and by KD, TAKD, Annealing-KD and Continuation-KD, with several
    seeds and from one store. What the recipe does not list takes its Annealing-KD student's optimizer and epochs. The
    run is <name>-compare; the same command again resumes, or shows the saved results.
    """
    with stdout_for_results():
        document = akd_dist.compare(**given, console=progress_console())
    if as_json:
        print_json(document)
    elif given["dry_run"]:
        from akd_dist.documents.plan import FleetPlanDocument

        print_fleet_plan(FleetPlanDocument.model_validate(document))
    else:
        from akd_dist.documents.report import CompareDocument
        from akd_dist.reporting.comparison import MARKDOWN_NAME, comparison_table

        run, table = document["run"], comparison_table(CompareDocument.model_validate(document))
        print_table(table)
        click.echo("table   " + short_path(f"{run}/{MARKDOWN_NAME}"))
        click.echo("report  " + short_path(f"{run}/report.html"))
    if document.get("refused"):
        return RecipeError.code
    return int(any(row["lost"] for row in document.get("table", ())))


def print_cached(document: CacheDocument, next_command: str) -> None:
    """What a caching command came to, and the command after it."""
    teachers: list[Any] = [*document.members] or [document]
    models = [*teachers, *document.assistants]
    parts = [part for one in models for part in (one, one.splits.validation, one.splits.test) if part is not None]
    shards, computed = (sum(getattr(part, key) for part in parts) for key in ("shards", "shards_computed"))
    how = "a hit: it was there already" if document.hit else f"{computed} of {counted(shards, 'shard')} computed now"
    shape = f"{document.rows:,} rows x {counted(document.views, 'view')} x {document.classes:,} classes"
    others = [split for split in ("validation", "test") if getattr(document.splits, split) is not None]
    beside = f"; {' and '.join(others)} rows beside it" if others else ""
    facts = {
        **({} if document.members else {"store": short_path(document.store)}),
        **{
            f"teacher {number}, {one.share:.0%}": short_path(one.store)
            for number, one in enumerate(document.members, 1)
        },
        **{f"assistant {one.model}": short_path(one.store) for one in document.assistants},
        "holds": f"{shape}, {document.encoding}{beside}",
        "size": f"{size(sum(part.bytes for part in parts))} in {counted(shards, 'shard')}",
        "took": f"{document.seconds:.1f} s; {how}",
        "next": next_command,
    }
    print_facts(facts)


def print_fleet(fleet: FleetDocument, next_commands: Iterable[str]) -> None:
    """What a fleet came to, where its report lies, and what may come next."""
    from akd_dist.reporting.tables import fleet_table

    print_table(fleet_table(fleet))
    for store in stores_of(fleet):
        click.echo(f"store   {short_path(store)}")
    click.echo("report  " + short_path(f"{fleet.run}/report.html"))
    click.echo("next")
    for command in next_commands:
        click.echo(f"  {command}")


def stores_of(fleet: FleetDocument) -> list[str]:
    """The train store of the teacher's logits, or those of all members of an ensemble."""
    return [member.store for member in fleet.teacher.members] or [fleet.store]


def after_training(fleet: FleetDocument, given: Given) -> list[str]:
    """What to type after train-students."""
    shown = command_line("stores show", Path(fleet.store).name[:SHORT_ID], store_root=given["store_root"])
    if fleet.stores_named is not False:
        return [shown]  # its logits are of the rows that this seed splits off, and there is no teacher for others
    kept = [one for one in given["overrides"] if not one.startswith(("data.seed=", "name="))]
    again = [*kept, "data.seed=1", f"name={Path(fleet.run).name}-seed1"]
    return [shown, command_line("train-students", **given | {"overrides": again})]


def after_quickstart(_fleet: FleetDocument, given: Given) -> list[str]:
    """What to type after the quickstart."""
    copy = "my-digits.yaml"
    return [
        *_to_be_at_hand(),
        shlex.join(["cp", given["recipe"], copy]) + "     # then change what you like",
        command_line(
            "train-students", **given | {"recipe": copy, "overrides": [*given["overrides"], "name=my-digits"]}
        ),
    ]


def _to_be_at_hand() -> list[str]:
    """What lets the shell find the next commands, where `make` ran this one in an environment that is not active."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("akd-dist") or not activate.exists():
        return []
    return [f"{shlex.join(['source', short_path(activate)])}     # so that the shell knows akd-dist"]
