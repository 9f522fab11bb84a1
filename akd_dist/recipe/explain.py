"""What is wrong with a recipe, in the words of its file: pydantic's errors with line, key and the nearest known key."""

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from akd_dist.base.errors import RecipeError
from akd_dist.recipe.base import NotRightError
from akd_dist.recipe.recipe import Recipe
from akd_dist.recipe.yaml_text import MAX_DEPTH, NEXT, Document, KeyPath, dotted, shown

_NOT_RIGHT = " is not right"
SHOWN_PROBLEMS = 20
# What JSON Schema's types of values are called.
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
}


@dataclass
class Problem:
    """One thing that is wrong with a recipe."""

    where: str
    what: str
    got: str | None = None
    expected: str | None = None

    def __str__(self) -> str:
        # Of what is not right the reason is told, and the value, which may be a whole block, stands in the file.
        said = [f"got {self.got}"] if self.got and self.got not in self.what and _NOT_RIGHT not in self.what else []
        said += [f"expected {self.expected}"] if self.expected else []
        return f"{self.where}: {self.what}" + (f" ({', '.join(said)})" if said else "")


def recipe_error(name: str, problems: list[Problem]) -> RecipeError:
    """The one message that tells all problems of a recipe."""
    if len(problems) == 1:
        (problem,) = problems
        # Of what is not right the reason says it: what is expected is anything else.
        expected = problem.expected or "values for which that does not hold"
        return RecipeError(f"{problem.where}: {problem.what}", got=problem.got, expected=expected, next=NEXT)
    shown = [f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return RecipeError(f"{name} has {len(problems)} problems:{''.join(shown)}{more}", next=NEXT)


def problems_of(error: ValidationError, document: Document) -> dict[str, Problem]:
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
    key = f"key {dotted(document.as_written(path))}"
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
    key = f"key {dotted(document.as_written(path))}" if path else "the recipe"
    got, context = shown(details["input"]), details.get("ctx", {})
    where = document.where(path)
    match details["type"]:
        case "missing":
            model = _model_at(path[:-1], document.data)
            return Problem(where, f"{key} is missing", None, _wanted(model, str(path[-1])) if model else None)
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
            return _not_right(path, details, document)
        case "model_type" | "model_attributes_type" | "dict_type":
            return Problem(where, f"{key} cannot be {got}", got, "a mapping")
        case _:
            expected = details["msg"].removeprefix("Input should be ")
            return Problem(where, f"{key} cannot be {got}", got, expected)


def _not_right(path: KeyPath, details: ErrorDetails, document: Document) -> Problem:
    """What a check of ours says of a value: the reason beside the key, and apart from it what would be right."""
    error = details.get("ctx", {}).get("error")
    expected: str | None = None
    value: Any = details["input"]
    why = details["msg"].removeprefix("Value error, ")
    if isinstance(error, NotRightError):
        path, why, expected = (*path, *error.key), error.why, error.expected
        value = document.data
        for element in path:
            value = value[element]
    key = f"key {dotted(document.as_written(path))}" if path else "the recipe"
    return Problem(document.where(path), f"{key}{_NOT_RIGHT}: {why}", shown(value), expected)


def _wanted(model: type[BaseModel], key: str) -> str:
    """What a key takes, and then what it means: `a whole number of at least 1: epochs of stage I, ...`."""
    schema = model.model_json_schema()["properties"][key]
    told = _TYPES.get(schema.get("type", ""), "a mapping")
    if "enum" in schema:
        told = f"one of {', '.join(map(str, schema['enum']))}"
    if "minimum" in schema:
        told += f" of at least {schema['minimum']:g}"
    if "exclusiveMinimum" in schema:
        told += f" above {schema['exclusiveMinimum']:g}"
    means = schema.get("description", "").rstrip(".")
    return f"{told}: {means[:1].lower() if means[1:2].islower() else means[:1]}{means[1:]}" if means else told


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
