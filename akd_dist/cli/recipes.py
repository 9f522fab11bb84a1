"""`akd-dist recipe`: check a recipe, or print the schema of all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from akd_dist.base.errors import AkdError
from akd_dist.base.places import RUN_ROOT
from akd_dist.cli.options import Group, json_option, shared
from akd_dist.cli.show import command_line, print_facts, print_json, print_table, table_of

if TYPE_CHECKING:
    from akd_dist.recipe import AssistantSpec, Recipe, Source, TeacherSpec

STUDENTS_SHOWN = 200


@click.group("recipe", cls=Group)
def recipe() -> None:
    """Check a recipe, or print its JSON Schema."""


@recipe.command("check")
@shared("recipe", "overrides")
@json_option
def recipe_check(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Read a recipe and list its students.

    Every default is filled in and every key checked; no data is opened.
    """
    checked = load(recipe, overrides)
    if as_json:
        print_json({"recipe": checked.model_dump(mode="json"), "students": [one.name for one in checked.students]})
        return
    print_facts(_recipe_facts(checked))
    table = table_of("student", "epochs", "optimizer", "batch", "workers")
    for one in checked.students[:STUDENTS_SHOWN]:
        optimizer = f"{one.optimizer.kind}, lr {one.optimizer.lr:g}, {one.optimizer.schedule.kind}"
        table.add_row(one.name, str(one.objective.epochs), optimizer, str(one.batch), str(one.workers))
    print_table(table)
    if len(checked.students) > STUDENTS_SHOWN:
        click.echo(f"and {len(checked.students) - STUDENTS_SHOWN:,} more")
    click.echo(f"next: {command_to_train(recipe, overrides)}")


@recipe.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes.

    For completion and checks in an editor.
    """
    from akd_dist.recipe import recipe_schema as schema

    print_json(schema())


def load(recipe_path: str, overrides: Sequence[str]) -> Recipe:
    """A recipe from its file, checked."""
    from akd_dist.recipe import load_recipe

    return load_recipe(recipe_path, overrides)


def command_to_train(recipe: str, overrides: Sequence[str], **given: Any) -> str:
    """The command that trains from a recipe; under another name, if its own is that of a run from another recipe.

    Recipes alone are compared, without a look at the data: what these lead to, the command itself finds out.
    """
    with contextlib.suppress(AkdError):  # a recipe that was changed meanwhile spoils no result: its name is left alone
        ours = load(recipe, overrides)
        names = itertools.chain([ours.name], (f"{ours.name}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if not _is_another(Path(RUN_ROOT.chosen()) / name, ours))
        if name != ours.name:
            overrides = [*(one for one in overrides if not one.startswith("name=")), f"name={name}"]
    return command_line("train-students", recipe, overrides=overrides, **given)


def _is_another(run: Path, ours: Recipe) -> bool:
    """Whether a run lies there that was made from another recipe; one that cannot be read counts as none."""
    path = run / "recipe.yaml"
    try:
        theirs = load(str(path), ()) if path.is_file() else None
    except AkdError:
        return False
    if theirs is None:
        return False
    before, now = (one.identity() | {"name": ""} for one in (theirs, ours))
    old, new = before.pop("students"), now.pop("students")
    # Students may come and go in a run, and stay as they are.
    return before != now or any(old[name] != new[name] for name in old.keys() & new.keys())


def _recipe_facts(checked: Recipe) -> dict[str, Any]:
    data, teacher = checked.data, checked.teacher
    encoding = ", ".join(
        f"{value}" if key == "name" else f"{key} {value}" for key, value in checked.cache.encoding.config().items()
    )
    return {
        "recipe": checked.name,
        "train": "no labels" if data.train is None else _source(data.train),
        **({} if data.unlabelled is None else {"unlabelled": _source(data.unlabelled)}),
        "validation": _source(data.validation),
        "test": _source(data.test),
        "views": f"{data.views}, augmentation {data.augmentation.kind}, seed {data.seed}",
        "teacher": _teacher(teacher),
        **{
            "assistant" if number == 1 else f"assistant {number}": _assistant(one)
            for number, one in enumerate(teacher.chain, 1)
        },
        "cache": f"{encoding}, {checked.cache.batch_rows} rows at once",
        "students": len(checked.students),
        "epochs": f"{sum(one.objective.epochs for one in checked.students):,} over all students",
        "cohorts": checked.cohorts or "as planned",
    }


def _teacher(teacher: TeacherSpec) -> str:
    if teacher.members is not None:
        members = ", ".join(_teacher(one) for one in teacher.members)
        return f"mean of the {teacher.average} of {len(teacher.members)}: {members}"
    if teacher.store is not None:
        return f"the store {teacher.store.train}"
    if teacher.model is None:
        return str(teacher.weights)
    if teacher.train is None:
        return f"{teacher.model.label}, weights in {teacher.checkpoint}"
    return f"{teacher.model.label}, trained for {teacher.train.epochs} epochs"


def _assistant(one: AssistantSpec) -> str:
    return f"{one.model.label}, {one.objective.kind} for {one.objective.epochs} epochs"


def _source(source: float | str | Source) -> str:
    if isinstance(source, float):
        return f"{source:g} of the train source"
    if isinstance(source, str):
        return {"rest": "what subset leaves out", "missing": "where the label is missing"}[source]
    from akd_dist.recipe import ImageFolder, Parquet, WebDataset

    return source.path if isinstance(source, Parquet | ImageFolder | WebDataset) else source.kind
