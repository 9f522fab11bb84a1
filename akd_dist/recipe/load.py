"""From a recipe file to a `Recipe`: YAML with line numbers, overrides, grids, paths; messages name file and line.

    text -> plain data and the line of every key -> overrides -> grids expanded -> Recipe, or a RecipeError

Only plain YAML 1.2 is read: no tags, no anchors, no merge keys. A grid expands; nothing else does.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from akd_dist.base import places
from akd_dist.base.errors import RecipeError, unreadable
from akd_dist.base.files import expanded
from akd_dist.recipe.explain import problems_of, recipe_error
from akd_dist.recipe.paths import change_paths
from akd_dist.recipe.recipe import Recipe
from akd_dist.recipe.yaml_text import MAX_BYTES, Document, parse


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, teacher: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, expand grids, and resolve every path and default.

    Paths in the file are relative to its folder, paths in overrides to the working directory.

    Args:
        teacher: what stands in for the key, for a command that needs none, where the file leaves it out.

    Raises:
        RecipeError: everything that is wrong with the file or an override, in one message; names file, line and key,
            and the nearest known key.
    """
    path, document = read_document(path, overrides)
    for number, block in enumerate(document.data.get("students") or ()):
        if isinstance(block, dict) and "search" in block:
            where = document.where(("students", number, "search"))
            raise RecipeError(
                f"{where}: this block is a search, and no students",
                got="search",
                expected="students, as a grid may list them",
                next="akd-dist tune searches, and tells the block that it found best; or take `search:` out",
            )
    if teacher is not None:
        document.data.setdefault("teacher", teacher)
    resolved = document.expanded()
    try:
        return Recipe.model_validate(resolved.data)
    except ValidationError as error:
        raise recipe_error(str(path), list(problems_of(error, resolved).values())) from None


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, Document]:
    """A recipe file as plain data with overrides applied and paths resolved, before grids expand; and its path.

    Raises:
        RecipeError: it cannot be read, is no YAML, or an override leads nowhere.
    """
    path = expanded(path)
    document = parse(_read(path), str(path))
    folder = path.resolve().parent
    places.nameable(str(folder), "RECIPE")
    if (folder / "identity.json").is_file():  # a run left it: its paths become the very ones that the run was given
        change_paths(document.data, functools.partial(places.found, folder=folder))
    _make_paths_absolute(document.data, folder)
    for override in overrides:
        document.override(override)
    _make_paths_absolute(document.data, Path.cwd())
    document.data["folder"] = document.data.get("folder") or str(folder)
    return path, document


def _read(path: Path) -> str:
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise unreadable(RecipeError, f"the recipe {path}", error, expected="a file that this user may read") from None
    if data is None:
        raise RecipeError(
            f"there is no recipe {path}",
            got="a folder" if path.is_dir() else "no such file",
            expected="a YAML file",
            next="check the path; `akd-dist quickstart` names a recipe that you can copy",
        )
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data):,} bytes")
        return data.decode()
    except ValueError as error:
        raise RecipeError(
            f"{path} is not a recipe", got=error, expected=f"UTF-8 text of at most {MAX_BYTES:,} bytes"
        ) from None


def _make_paths_absolute(node: Any, folder: Path) -> None:
    """Workers change directory, so no relative path leaves this module. URIs stay as they are, and so do arguments."""
    change_paths(node, functools.partial(_absolute, folder=folder))


def _absolute(path: str, folder: Path) -> str:
    if "://" in path:
        return path
    places.check_uri(path)  # s3:/bucket would be a folder here
    return str(folder.joinpath(expanded(path)))
