"""From a recipe file with a `search:` to the students of its trials: drawn, named, and checked as any other student."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import mistakes
from akd_dist.recipe.explain import problems_of, recipe_error
from akd_dist.recipe.load import read_document
from akd_dist.recipe.recipe import Recipe, StudentSpec
from akd_dist.recipe.search import Search
from akd_dist.recipe.yaml_text import NEXT, Document, KeyPath, is_given, with_values

SUFFIX = "-tune"
"""Of the run's name."""


@dataclass(frozen=True)
class Trial:
    """Values that are tried."""

    number: int
    """From 0, in the order in which they were drawn."""
    values: dict[str, Any]
    """By the dotted keys of the search."""
    students: list[str]
    """The names of its students, one for each seed."""


@dataclass(frozen=True)
class Tuning:
    """A search: of a block of the recipe, and of each other value of that block's grid."""

    name: str
    """What the names of its students begin with."""
    search: Search
    """What is tried, and how."""
    trials: list[Trial]
    """As they were drawn."""


@dataclass(frozen=True)
class SearchRecipe:
    """A recipe with searches."""

    recipe: Recipe
    """The students of all trials; its name is that of the recipe with SUFFIX."""
    tunings: list[Tuning]
    """The searches, in the order of the file."""
    others: int
    """Students of blocks without a search, which are left out."""


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Read a recipe file with a `search:` in a block of its students or in several; see `load_recipe`.

    Raises:
        RecipeError: there is no search in it, or something is wrong with it or with the recipe.
    """
    path, document = read_document(path, overrides)
    blocks = document.data.get("students")
    blocks = blocks if isinstance(blocks, list) else []
    searched = [number for number, block in enumerate(blocks) if isinstance(block, dict) and "search" in block]
    if not searched:
        raise RecipeError(
            f"the recipe {path} has no search",
            got="blocks of students without a `search:`",
            expected="search: {optimizer.lr: {low: 1e-3, high: 1e-1, log: true}, trials: 16} in one of them",
            next="add one, or train its students: akd-dist train-students",
        )
    plain = [block for number, block in enumerate(blocks) if number not in searched]
    others = Document(document.data | {"students": plain}, document.places).expanded().data["students"]
    students: list[Any] = []
    tunings: list[Tuning] = []
    for number in searched:
        for tuning, of_trials in _of_block(document, number, {one.name for one in tunings}):
            tunings.append(tuning)
            students += of_trials
    resolved = Document(document.data | {"students": [*students, *others]}, document.places)
    try:
        recipe = Recipe.model_validate(resolved.data)
    except ValidationError as error:
        raise recipe_error(str(path), list(problems_of(error, resolved).values())) from None
    trained = {"students": recipe.students[: len(students)], "name": recipe.name + SUFFIX, "cohorts": None}
    return SearchRecipe(recipe.model_copy(update=trained), tunings, len(others))


def _of_block(document: Document, number: int, taken: set[str]) -> list[tuple[Tuning, list[dict[str, Any]]]]:
    """The searches of a block and the students of their trials: one for each value of its grid, but for seeds.

    Args:
        taken: names of the searches before.
    """
    block, path = document.data["students"][number], ("students", number, "search")
    search = _search(document, path, block["search"])
    rest = {key: value for key, value in block.items() if key not in ("search", "name")}
    for key in search.space:
        if key == "name":
            expected = "what changes a student: trials that differ in their name alone are the same"
            raise _error(document, (*path, key), "name among the keys that are searched", expected)
        if is_given(rest, tuple(key.split("."))) or key in block.get("grid", {}):
            raise _error(document, (*path, key), f"{key} in the block and in its search", "it in one of them")
    grid = document.grid(number, rest)
    seeds = grid.pop(("seed",), [rest.get("seed", 0)])
    found: list[tuple[Tuning, list[dict[str, Any]]]] = []
    for values in itertools.product(*grid.values()):
        base = with_values({**rest, "grid": None}, dict(zip(grid, values, strict=True)))
        base = {key: value for key, value in base.items() if key != "grid"}
        drawn = _valid(document, path, search, base)
        spec = drawn[0][1]
        stem = block.get("name") or f"{spec.model.label}-{spec.objective.label}"
        names = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
        name = next(one for one in names if one not in taken)
        taken.add(name)
        trials, students = [], []
        for index, (given, _) in enumerate(drawn):
            named = {f"{name}-k{index:03d}-s{seed}": seed for seed in seeds}
            trials.append(Trial(index, given, list(named)))
            students += [{**_tried(base, given), "seed": seed, "name": one} for one, seed in named.items()]
        found.append((Tuning(name, search, trials), students))
    return found


def _search(document: Document, path: KeyPath, given: Any) -> Search:
    if not isinstance(given, dict):
        raise _error(document, path, repr(given), "a mapping of dotted keys to lists or ranges")
    try:
        return Search.of(given)
    except ValidationError as error:
        raise _error(document, path, mistakes(error), "lists of values, or {low: ..., high: ..., log: true}") from None


def _valid(
    document: Document, path: KeyPath, search: Search, base: dict[str, Any]
) -> list[tuple[dict[str, Any], StudentSpec]]:
    """The draws of a search that make students; one whose values do not go together is drawn anew.

    Raises:
        RecipeError: there are not two of them.
    """
    found: list[tuple[dict[str, Any], StudentSpec]] = []
    wrong = "the space holds a single combination"
    for given in search.draws():
        try:
            found.append((given, StudentSpec.model_validate(_tried(base, given))))
        except ValidationError as error:
            wrong = f"{given}: {mistakes(error)}"
        if len(found) == search.trials:
            break
        if not found and "Extra inputs" in wrong:  # a key that no student has: no draw will mend it
            break
    if len(found) < 2:
        raise _error(document, path, wrong, "a space in which two combinations or more make a student")
    return found


def _tried(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    student: dict[str, Any] = with_values(base, {tuple(key.split(".")): value for key, value in given.items()})
    return student


def _error(document: Document, path: KeyPath, got: str, expected: str) -> RecipeError:
    key = ".".join(map(str, path))
    return RecipeError(f"{document.where(path)}: key {key} does not fit", got=got, expected=expected, next=NEXT)
