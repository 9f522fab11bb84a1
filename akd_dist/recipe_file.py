"""From a recipe file to a `Recipe`: YAML with line numbers, overrides, grids, paths; messages name file and line.

    text -> plain data and the line of every key -> overrides -> grids expanded -> Recipe, or a RecipeError

Only plain YAML 1.2 is read: no tags, no anchors, no merge keys. A grid expands; nothing else does.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from akd_dist.grid_names import names_of_grid
from akd_dist.recipe import Recipe, Student
from akd_dist.storage import places
from akd_dist.storage.errors import RecipeError
from akd_dist.storage.files import expanded

KeyPath = tuple[str | int, ...]
_NOT_RIGHT = " is not right"

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_STUDENTS = 10_000
SHOWN_PROBLEMS = 20
NEXT = "mend it and run the same command again; `akd-dist recipe schema` and docs/recipes.md list every key"

# Keys whose values are paths.
_PATHS = ("path", "images", "labels", "weights", "folder")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, expand and check; see `recipe.load_recipe`.

    Raises:
        RecipeError: everything that is wrong, in one message.
    """
    document = parse(_read(path), str(path))
    folder = path.resolve().parent
    if (folder / "identity.json").is_file():  # a run left it: its paths become the very ones that the run was given
        change_paths(document.data, functools.partial(places.found, folder=folder))
    _make_paths_absolute(document.data, folder)
    for override in overrides:
        document.override(override)
    _make_paths_absolute(document.data, Path.cwd())
    document.data["folder"] = document.data.get("folder") or str(folder)
    expanded = document.expanded()
    try:
        return Recipe.model_validate(expanded.data)
    except ValidationError as error:
        raise _recipe_error(str(path), list(_problems(error, expanded).values())) from None


@dataclass
class Problem:
    """One thing that is wrong with a recipe."""

    where: str
    what: str
    got: str | None = None
    expected: str | None = None

    def __str__(self) -> str:
        if self.what.endswith(_NOT_RIGHT):  # what is expected is a sentence of its own
            return f"{self.where}: {self.what}: {self.expected}"
        said = [f"got {self.got}"] if self.got and self.got not in self.what else []
        said += [f"expected {self.expected}"] if self.expected else []
        return f"{self.where}: {self.what}" + (f" ({', '.join(said)})" if said else "")


def _recipe_error(name: str, problems: list[Problem]) -> RecipeError:
    if len(problems) == 1:
        (problem,) = problems
        return RecipeError(f"{problem.where}: {problem.what}", got=problem.got, expected=problem.expected, next=NEXT)
    shown = [f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return RecipeError(f"{name} has {len(problems)} problems:{''.join(shown)}{more}", next=NEXT)


# ---- text to plain data


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
            f"{place}: {_dotted(path)} has no {part}",
            got=_shown(node),
            expected=f"a number from 0 to {len(node) - 1}" if isinstance(node, list) else "a mapping",
            next="entries of a list count from 0, as in --set students.0.batch=32",
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
            grid = self._grid(number, block)
            if len(students) + math.prod(map(len, grid.values())) > MAX_STUDENTS:
                where = self.where(("students", number, "grid"))
                raise RecipeError(
                    f"{where}: the grids stand for more than {MAX_STUDENTS:,} students", next="shorten their lists"
                )
            given = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            block_students = [_with_values(block, values) for values in given]
            _name(block_students, given)
            written |= {len(students) + place: (number, tuple(grid)) for place in range(len(given))}
            students += block_students
        return Document(self.data | {"students": students}, self.places, written)

    def _grid(self, number: int, block: Any) -> dict[KeyPath, list[Any]]:
        """The grid of a block, its keys split; empty where it has none."""
        if not isinstance(block, dict) or "grid" not in block:
            return {}
        path: KeyPath = ("students", number, "grid")
        if not isinstance(block["grid"], dict) or not block["grid"]:
            raise self._grid_error(path, _shown(block["grid"]), "a mapping of dotted keys to lists")
        grid: dict[KeyPath, list[Any]] = {}
        for dotted, values in block["grid"].items():
            key = tuple(dotted.split("."))
            if not isinstance(values, list) or not values:
                raise self._grid_error((*path, dotted), _shown(values), "a list of at least one value")
            if _given(block, key):
                raise self._grid_error(
                    ("students", number, *key),
                    f"{dotted} in the block and in its grid",
                    f"it in one of them (to override the grid: --set students.{number}.grid.{dotted}=[...])",
                )
            grid[key] = values
        return grid

    def _grid_error(self, path: KeyPath, got: str, expected: str) -> RecipeError:
        what = f"{self.where(path)}: key {_dotted(path)} does not fit"
        return RecipeError(what, got=got, expected=expected, next=NEXT)


def _override_keys(dotted: str) -> list[str]:
    parts = dotted.split(".")
    if parts[0] == "students" and parts[2:3] == ["grid"]:
        # The keys of a grid are dotted themselves.
        return [*parts[:3], *filter(None, [".".join(parts[3:])])]
    return parts


def _given(block: dict[str, Any], key: KeyPath) -> bool:
    node: Any = block
    for part in key:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _with_values(block: Any, values: dict[KeyPath, Any]) -> Any:
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
    """Name the students of a block where their default names are not enough to tell them apart."""
    if len(students) == 1 or any("name" in student for student in students):
        return
    try:
        defaults = [Student.model_validate(student).name for student in students]
    except ValidationError:
        return  # told with everything else that is wrong
    keys = [{tuple(map(str, key)): value for key, value in values.items()} for values in given]
    for student, default, name in zip(students, defaults, names_of_grid(defaults, keys), strict=True):
        if name != default:
            student["name"] = name


def _read(path: Path) -> str:
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read", got=error.strerror, expected="a file this user may read"
        ) from None
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
            got=_shown(data),
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
            if not isinstance(key, str):
                raise RecipeError(f"{place}: a key must be a word", got=_shown(key), expected="a word", next=NEXT)
            places[(*path, key)] = place
            result[str(key)] = _plain(value, (*path, key), places, name)
        return result
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            places[(*path, index)] = _at(name, node.lc.item(index)[0])
        return [_plain(value, (*path, index), places, name) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind) and not (isinstance(node, float) and not math.isfinite(node)):
            return kind(node)
    if node is None:
        return None
    place = places[path]
    raise RecipeError(
        f"{place}: key {_dotted(path)} has a value of a kind that no key takes",
        got=str(node),
        expected="text, a finite number, true, false or null",
        next="put it in quotes if it is meant as text",
    )


def _make_paths_absolute(node: Any, folder: Path) -> None:
    """Workers change directory, so no relative path leaves this module. URIs stay as they are, and so do arguments."""
    change_paths(node, functools.partial(_absolute, folder=folder))


def change_paths(node: Any, change: Callable[[str], str]) -> None:
    """Change every path of a recipe as plain data, in place; arguments of functions are none."""
    if isinstance(node, list):
        for entry in node:
            change_paths(entry, change)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        parts = str(key).split(".")  # in a grid, a dotted key with a list of values
        if "arguments" in parts:
            continue
        if parts[-1] in _PATHS:
            several = value if isinstance(value, list) else [value]
            changed = [change(one) if isinstance(one, str) else one for one in several]
            node[key] = changed if isinstance(value, list) else changed[0]
        else:
            change_paths(value, change)


def _absolute(path: str, folder: Path) -> str:
    return path if "://" in path else str(folder.joinpath(expanded(path)))


# ---- pydantic's errors to problems


def _problems(error: ValidationError, document: Document) -> dict[str, Problem]:
    """Each problem once, in the order of the file; a grid repeats its problems for every student.

    Of a block with an unknown kind pydantic looks at nothing else: its other keys are checked as of the kind that was
    meant. Where that cannot be told, only those are named that no kind knows.
    """
    found: dict[str, Problem] = {}
    guessed: set[KeyPath] = set()
    for _ in range(MAX_DEPTH):
        meant: dict[KeyPath, str] = {}
        for details in error.errors(include_url=False):
            # Follows from another error of the same student.
            if details["type"] == "default_factory_not_called":
                continue
            path = _keys(details["loc"], document.data)
            if of_kind := details["type"] in ("union_tag_invalid", "union_tag_not_found"):
                meant[path], sure = _meant_kind(path, document.data)
                if not sure:
                    guessed.add(path)
            block = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in guessed), None)
            if block is None or of_kind:
                problem = _problem(details, document)
            elif details["type"] != "extra_forbidden" or (told := _of_no_kind(block, path, document)) is None:
                continue
            else:
                problem = told
            found.setdefault(str(problem), problem)
        if not meant:
            break
        document = _with_kinds(document, meant)
        try:
            Recipe.model_validate(document.data)
            break
        except ValidationError as further:
            error = further
    order: dict[str, int] = {}
    for place in document.places.values():
        order.setdefault(place, len(order))
    return dict(sorted(found.items(), key=lambda item: order[item[1].where]))


def _meant_kind(path: KeyPath, data: Any) -> tuple[str, bool]:
    """The kind that a block with an unknown one, or with none, probably is of; and whether its name says so.

    Else it is the one that knows most of the block's keys.
    """
    choices = _choices_at(path, data)
    block = data
    for element in path:
        block = block[element]
    names = [str(model.model_fields["kind"].default) for model in choices]
    if near := difflib.get_close_matches(str(block.get("kind")), names, n=1):
        return near[0], True
    best = max(choices, key=lambda model: len(block.keys() & model.model_fields.keys()))
    return str(best.model_fields["kind"].default), False


def _of_no_kind(block: KeyPath, path: KeyPath, document: Document) -> Problem | None:
    """A key that none of the kinds knows that a block could be of; None if one of them does."""
    known = list(dict.fromkeys(key for model in _choices_at(block, document.data) for key in model.model_fields))
    if len(path) != len(block) + 1 or path[-1] in known:
        return None
    key = f"key {_dotted(document.as_written(path))}"
    what = f"{key} is not known{_nearest(str(path[-1]), known)}"
    return Problem(document.where(path), what, str(path[-1]), f"one of {', '.join(known)}")


def _with_kinds(document: Document, kinds: dict[KeyPath, str]) -> Document:
    """A copy whose blocks at these paths are of these kinds."""
    data = copy.deepcopy(document.data)
    for path, kind in kinds.items():
        node: Any = data
        for element in path:
            node = node[element]
        node["kind"] = kind
    return Document(data, document.places, document.written)


def _problem(details: ErrorDetails, document: Document) -> Problem:
    path = _keys(details["loc"], document.data)
    key = f"key {_dotted(document.as_written(path))}" if path else "the recipe"
    got, context = _shown(details["input"]), details.get("ctx", {})
    where = document.where(path)
    match details["type"]:
        case "missing":
            model = _model_at(path[:-1], document.data)
            described = model.model_fields[str(path[-1])].description if model else None
            return Problem(where, f"{key} is missing", None, described and described.rstrip("."))
        case "extra_forbidden":
            known, hint = _known_keys(path, document.data)
            return Problem(where, f"{key} is not known{hint}", str(path[-1]), f"one of {', '.join(known)}")
        case "union_tag_not_found":
            return Problem(where, f"{key} needs a kind", got, _kinds(path, document.data))
        case "union_tag_invalid":
            hint = _nearest(str(context["tag"]), _kind_names(path, document.data))
            return Problem(where, f"{key} has an unknown kind{hint}", str(context["tag"]), _kinds(path, document.data))
        case "literal_error":
            choices = str(context["expected"])
            hint = _nearest(
                str(details["input"]), [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")]
            )
            return Problem(where, f"{key} cannot be {got}{hint}", got, choices)
        case "too_short":
            return Problem(where, f"{key} is too short", got, f"at least {context['min_length']} in the list")
        case "value_error":
            return Problem(where, f"{key}{_NOT_RIGHT}", got, details["msg"].removeprefix("Value error, "))
        case "model_type" | "model_attributes_type" | "dict_type":
            return Problem(where, f"{key} cannot be {got}", got, "a mapping")
        case _:
            expected = details["msg"].removeprefix("Input should be ")
            return Problem(where, f"{key} cannot be {got}", got, expected)


def _keys(location: tuple[str | int, ...], data: Any) -> KeyPath:
    """Pydantic's location without the names of union members that it puts between the keys."""
    path: list[str | int] = []
    node = data
    for element in location:
        if isinstance(node, dict):
            if node.get("kind") == element and element not in node:
                continue
            node = node.get(str(element))
        elif isinstance(node, list) and isinstance(element, int):
            node = node[element] if element < len(node) else None
        else:
            continue
        path.append(element)
    return tuple(path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _choices_at(path: KeyPath, data: Any) -> list[type[BaseModel]]:
    """The models that the value at `path` could be."""
    choices: list[type[BaseModel]] = [Recipe]
    node = data
    for depth, element in enumerate(path):
        if isinstance(element, str):
            model = _model_at(path[:depth], data)
            choices = list(_models(model.model_fields[element].annotation)) if model else []
            node = node.get(element) if isinstance(node, dict) else None
        else:
            node = node[element]
    return choices


def _model_at(path: KeyPath, data: Any) -> type[BaseModel] | None:
    """The model of the mapping at `path`, chosen by its kind where there are several."""
    choices = _choices_at(path, data)
    if len(choices) == 1:
        return choices[0]
    for element in path:
        data = data[element]
    return next((model for model in choices if model.model_fields["kind"].default == data.get("kind")), None)


def _known_keys(path: KeyPath, data: Any) -> tuple[list[str], str]:
    """The keys that could stand in place of the unknown one at `path`, and a hint at the one that was meant."""
    *parent, key = path
    model = _model_at(tuple(parent), data)
    known = list(model.model_fields) if model else []
    if hint := _nearest(str(key), known):
        return known, hint
    for name in known:
        for inner in _choices_at((*parent, name), data):
            if key in inner.model_fields:
                return known, f"; did you mean {name}.{key}?"
    return known, ""


def _kind_names(path: KeyPath, data: Any) -> list[str]:
    return [model.model_fields["kind"].default for model in _choices_at(path, data)]


def _kinds(path: KeyPath, data: Any) -> str:
    return "kind: " + " or ".join(_kind_names(path, data))


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _shown(value: Any) -> str:
    """A value as it would be written, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
