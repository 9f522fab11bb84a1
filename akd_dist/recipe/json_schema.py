"""The JSON Schema of a recipe file, for completion in an editor."""

import copy
import re
from typing import Any

from akd_dist.recipe.recipe import Recipe
from akd_dist.recipe.search import SETTINGS, Search


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file; a block under `students` that has a grid may leave out what the grid gives."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for definition in definitions.values():
        _require_kind(definition)
    partial = {name: _partial(definitions[name]) for name in sorted(_reachable(definitions, "StudentSpec"))}
    partial["StudentSpec"]["properties"]["grid"] = {
        "description": "Dotted keys of this block, each with a list of values; expands to their product in file order.",
        "type": "object",
        "additionalProperties": {"type": "array", "minItems": 1},
        "minProperties": 1,
    }
    partial["StudentSpec"]["properties"]["search"] = _search(definitions)
    partial["StudentSpec"]["anyOf"] = [{"required": ["grid"]}, {"required": ["search"]}]
    definitions |= {f"{name}InGrid": definition for name, definition in partial.items()}
    schema["properties"]["students"]["items"] = {
        "anyOf": [{"$ref": "#/$defs/StudentSpec"}, {"$ref": "#/$defs/StudentSpecInGrid"}]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "An akd-dist recipe"}


def _search(definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a search: its settings beside dotted keys, each with a list or a range."""
    schema = Search.model_json_schema()
    definitions |= schema["$defs"]
    settings = {key: schema["properties"][key] for key in SETTINGS}
    space: dict[str, Any] = schema["properties"]["space"]["additionalProperties"]
    return {
        "description": "What `akd-dist tune` tries: dotted keys of this block, each with a list of values or a range.",
        "type": "object",
        "properties": settings,
        "additionalProperties": space,
        "minProperties": 1,
    }


def _require_kind(definition: dict[str, Any]) -> None:
    """In a file `kind` must be written, since it is what tells the variants apart."""
    if "const" in definition.get("properties", {}).get("kind", {}):
        del definition["properties"]["kind"]["default"]
        definition["required"] = ["kind", *definition.get("required", [])]


def _reachable(definitions: dict[str, Any], name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += re.findall(r"'#/\$defs/(\w+)'", str(definitions[current]))
    return found


def _partial(definition: dict[str, Any]) -> dict[str, Any]:
    """The same keys, none of them required, also further down; variants by kind become a plain choice."""

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        node = {key: convert(value) for key, value in node.items() if key != "discriminator"}
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        if "$ref" in node:
            node["$ref"] += "InGrid"
        return node

    loose: dict[str, Any] = convert(copy.deepcopy(definition))
    loose.pop("required", None)
    return loose
