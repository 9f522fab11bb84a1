"""Which keys of a recipe are paths, and how they are changed together."""

import re
from collections.abc import Callable
from typing import Any

START = "one that is not absolute starts from the recipe's folder, or from the working folder if --set gives it"
"""Where paths start, as refusals of a path that leads nowhere say it."""
# Keys whose values are paths.
_PATHS = ("path", "images", "labels", "weights", "folder")
# Sealed stores are named by their id or its beginning, which is no path, or by the path of their folder.
_STORES = "store"
STORE_NAME = re.compile("[0-9a-f]{1,64}")
"""A store's id, or the beginning of one."""


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
        elif parts[-1] == _STORES and isinstance(value, str | dict):
            named = {split: _change_store(name, change) for split, name in _by_split(value).items()}
            node[key] = named if isinstance(value, dict) else named["train"]
        else:
            change_paths(value, change)


def _by_split(value: str | dict[str, Any]) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"train": value}


def _change_store(name: Any, change: Callable[[str], str]) -> Any:
    return change(name) if isinstance(name, str) and not STORE_NAME.fullmatch(name) else name
