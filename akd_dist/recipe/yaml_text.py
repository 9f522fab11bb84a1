"""Recipe files as plain data: YAML with the line of every key, `--set` overrides, and grids expanded.

Only plain YAML 1.2 is read: no tags, no anchors, no merge keys. A grid expands; nothing else does.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from akd_dist.base.errors import RecipeError, encodable
from akd_dist.recipe.grid_names import names_of_grid
from akd_dist.recipe.recipe import StudentSpec

KeyPath = tuple[str | int, ...]
# Bounds of what a recipe can be in earnest, so that a hostile one ends in a message, and not in a process without
# memory.
MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_STUDENTS = 10_000
NEXT = "mend it and run the same command again; `akd-dist recipe schema` and docs/reference/recipe.md list every key"


@dataclass
class Document:
    """A recipe as plain data, and where each of its keys was written."""

    data: dict[str, Any]
    """Dicts, lists, strings, numbers, booleans and None."""
    places: dict[KeyPath, str]
    """Path of keys and indices -> `file:line`, or the `--set` it came from."""
    written: dict[int, tuple[int, tuple[KeyPath, ...]]] = field(default_factory=dict)
    """Once grids are expanded: number of a student -> number of its block, and the keys that its grid gave."""

    def where(self, path: KeyPath) -> str:
        """The place of the longest part of `path` that was written somewhere."""
        path = self.as_written(path)
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def as_written(self, path: KeyPath) -> KeyPath:
        """The path of an expanded student's key as it stands in the file."""
        if path[:1] != ("students",) or len(path) < 2 or not isinstance(path[1], int) or path[1] not in self.written:
            return path
        block, grid = self.written[path[1]]
        for key in grid:
            if path[2 : 2 + len(key)] == key:
                return ("students", block, "grid", ".".join(map(str, key)), *path[2 + len(key) :])
        return ("students", block, *path[2:])

    def override(self, text: str) -> None:
        """Apply one `a.b.0.c=value`; an unknown key is found later, with everything else that is wrong.

        Raises:
            RecipeError: it is no `key=value`, or its key leads nowhere.
        """
        place = f"--set {text}"
        dotted, equals, value_text = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise RecipeError(
                f"{place} is not key=value",
                got=text,
                expected="dotted keys, as in data.views=4 or students.0.optimizer.lr=1e-3",
                next="write it as --set key=value",
            )
        value = parse_value(value_text, place)
        node: Any = self.data
        path: KeyPath = ()
        parts = _override_keys(dotted)
        for part in parts:
            key = self._key(node, part, path, place)
            path = (*path, key)
            if len(path) == len(parts):
                node[key] = value
            elif isinstance(node, dict) and node.get(str(key)) is None:
                node[key] = {}
                self.places[path] = place
            node = node[key]
        for old in [old for old in self.places if old[: len(path)] == path]:
            del self.places[old]
        self.places[path] = place

    @staticmethod
    def _key(node: Any, part: str, path: KeyPath, place: str) -> str | int:
        """The key or index of `node` that a part of an override names."""
        if isinstance(node, dict):
            return part
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            return int(part)
        raise RecipeError(
            f"{place}: {dotted(path)} has no {part}",
            got=shown(node),
            expected=f"a number from 0 to {len(node) - 1}" if isinstance(node, list) else "a mapping",
            next=_next_of_a_part(node, dotted(path), part),
        )

    def expanded(self) -> Document:
        """The same document with every block under `students` replaced by the students that its grid stands for.

        Raises:
            RecipeError: a grid is not a mapping of dotted keys to lists, or gives a key that its block gives too.
        """
        blocks = self.data.get("students")
        if not isinstance(blocks, list):
            return self
        students: list[Any] = []
        written: dict[int, tuple[int, tuple[KeyPath, ...]]] = {}
        for number, block in enumerate(blocks):
            grid = self.grid(number, block)
            if len(students) + math.prod(map(len, grid.values())) > MAX_STUDENTS:
                where = self.where(("students", number, "grid"))
                raise RecipeError(
                    f"{where}: the grids stand for more than {MAX_STUDENTS:,} students", next="shorten their lists"
                )
            given = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            block_students = [with_values(block, values) for values in given]
            _name(block_students, given)
            written |= {len(students) + place: (number, tuple(grid)) for place in range(len(given))}
            students += block_students
        return Document(self.data | {"students": students}, self.places, written)

    def grid(self, number: int, block: Any) -> dict[KeyPath, list[Any]]:
        """The grid of a block, its keys split; empty where it has none.

        Raises:
            RecipeError: it is not a mapping of dotted keys to lists, or gives a key that its block gives too.
        """
        if not isinstance(block, dict) or "grid" not in block:
            return {}
        path: KeyPath = ("students", number, "grid")
        if not isinstance(block["grid"], dict) or not block["grid"]:
            raise self._grid_error(path, shown(block["grid"]), "a mapping of dotted keys to lists")
        grid: dict[KeyPath, list[Any]] = {}
        for dotted, values in block["grid"].items():
            key = tuple(dotted.split("."))
            if not isinstance(values, list) or not values:
                raise self._grid_error((*path, dotted), shown(values), "a list of at least one value")
            if is_given(block, key):
                raise self._grid_error(
                    ("students", number, *key),
                    f"{dotted} in the block and in its grid",
                    f"it in one of them (to override the grid: --set students.{number}.grid.{dotted}=[...])",
                )
            grid[key] = values
        return grid

    def _grid_error(self, path: KeyPath, got: str, expected: str) -> RecipeError:
        what = f"{self.where(path)}: key {dotted(path)} does not fit"
        return RecipeError(what, got=got, expected=expected, next=NEXT)


def _next_of_a_part(node: Any, key: str, part: str) -> str:
    """What to do where an override names a part of a value that has no such part."""
    if isinstance(node, str):
        whole = f"{{kind: {node}, {part}: ...}}"
        return f"give the whole of it, as in --set '{key}={whole}'"
    return "entries of a list count from 0, as in --set students.0.batch=32"


def _override_keys(dotted: str) -> list[str]:
    parts = dotted.split(".")
    if parts[0] == "students" and parts[2:3] == ["grid"]:
        # The keys of a grid are dotted themselves.
        return [*parts[:3], *filter(None, [".".join(parts[3:])])]
    return parts


def is_given(block: dict[str, Any], key: KeyPath) -> bool:
    """Whether a block has a key already."""
    node: Any = block
    for part in key:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def with_values(block: Any, values: dict[KeyPath, Any]) -> Any:
    """A copy of the block without its grid, with a value for each of the grid's keys."""
    if not values:
        return block
    student = copy.deepcopy({key: value for key, value in block.items() if key != "grid"})
    for (*parents, last), value in values.items():
        node = student
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = copy.deepcopy(value)
    return student


def _name(students: list[Any], given: list[dict[KeyPath, Any]]) -> None:
    """Name the students of a block where their default names are not enough to tell them apart.

    A name that the block gives to several of them stands before the names that they have without it: so blocks that
    differ in nothing that default names hold can be told apart.
    """
    if len(students) == 1 or any(("name",) in values for values in given):
        return
    unnamed = [{key: value for key, value in student.items() if key != "name"} for student in students]
    first = students[0].get("name")
    try:
        defaults = [StudentSpec.model_validate(student).name for student in unnamed]
    except ValidationError:
        return  # told with everything else that is wrong
    keys = [{tuple(map(str, key)): value for key, value in values.items()} for values in given]
    for student, default, name in zip(students, defaults, names_of_grid(defaults, keys), strict=True):
        if isinstance(first, str):
            student["name"] = f"{first}-{name}"
        elif name != default:
            student["name"] = name


def parse(text: str, name: str) -> Document:
    """Plain data of a YAML text, with the line of every key.

    Raises:
        RecipeError: not YAML 1.2, a key that stands twice, a tag, an anchor, or no mapping.
    """
    yaml = YAML(typ="rt", pure=True)
    try:
        _check_events(yaml.parse(text), name)
        loaded = yaml.load(text)
    except MarkedYAMLError as error:
        raise _syntax_error(error, name) from None
    except (YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(
            f"{name} is not YAML", got=str(error).splitlines()[0], expected="YAML 1.2", next=NEXT
        ) from None
    places: dict[KeyPath, str] = {(): name}
    data = _plain(loaded, (), places, name)
    if not isinstance(data, dict):
        raise RecipeError(
            f"{name} is not a recipe",
            got=shown(data),
            expected="a mapping with name, data, teacher, students",
            next=NEXT,
        )
    return Document(data, places)


def parse_value(text: str, place: str) -> Any:
    """The value of an override, read as in a file: `1e-4` is a number, `[1, 2]` a list."""
    return parse(f"value: {text}" if text.strip() else "value:", place).data["value"]


def _at(name: str, line: int) -> str:
    """A 0-based line of a file; an override has but one line."""
    return name if name.startswith("--set") else f"{name}:{line + 1}"


def _check_events(events: Iterable[Any], name: str) -> None:
    """Refuse what makes YAML more than data, before anything is built from it."""
    depth = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        found = None
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            found = "an anchor"
        elif getattr(event, "tag", None):
            found = f"the tag {event.tag}"
        elif isinstance(event, DocumentStartEvent) and event.version:
            found = "a %YAML directive"
        elif isinstance(event, ScalarEvent) and event.value == "<<":
            found = "a merge key"
        elif depth > MAX_DEPTH:
            found = f"more than {MAX_DEPTH} levels"
        if found:
            raise RecipeError(
                f"{_at(name, event.start_mark.line)}: a recipe is plain YAML and cannot have {found}",
                got=found,
                expected="mappings, lists and values; `grid:` expands a block of students",
                next="write the value out where it is used",
            )


def _syntax_error(error: MarkedYAMLError, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line = _at(name, mark.line) if mark else name
    problem = (error.problem or error.context or "not YAML").splitlines()[0]
    if problem.startswith("found duplicate key"):
        return RecipeError(
            f"{line}: {problem.split(' with ')[0].removeprefix('found ')}", expected="each key once", next=NEXT
        )
    return RecipeError(f"{line}: this is not YAML", got=problem, expected="YAML 1.2", next=NEXT)


def _plain(node: Any, path: KeyPath, places: dict[KeyPath, str], name: str) -> Any:
    """Built-in types only; notes the line of every key on the way."""
    if isinstance(node, CommentedMap):
        result: dict[str, Any] = {}
        for key, value in node.items():
            place = _at(name, node.lc.key(key)[0])
            if not isinstance(key, str) or encodable(key) != key:
                raise RecipeError(f"{place}: a key must be a word", got=shown(key), expected="a word", next=NEXT)
            places[(*path, key)] = place
            result[str(key)] = _plain(value, (*path, key), places, name)
        return result
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*path, index)] = _at(name, node.lc.item(index)[0])
        return [_plain(value, (*path, index), places, name) for index, value in enumerate(node)]
    # YAML's "\ud800" is half a character: no file, page or name of a folder can hold it.
    known = encodable(node) == node if isinstance(node, str) else not isinstance(node, float) or math.isfinite(node)
    for kind in (bool, int, float, str):
        if known and isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    place = places[path]
    raise RecipeError(
        f"{place}: key {dotted(path)} has a value of a kind that no key takes",
        got=encodable(str(node)),
        expected="text that UTF-8 can hold, a finite number, true, false or null",
        next="put it in quotes if it is meant as text",
    )


def dotted(path: KeyPath) -> str:
    """A path of keys as `--set` takes it."""
    return ".".join(map(str, path))


def shown(value: Any) -> str:
    """A value as it would be written, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
