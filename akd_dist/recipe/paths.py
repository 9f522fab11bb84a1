"""Which keys of a recipe are paths, and how they are changed together."""

import itertools
import math
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
MOST_EXPANDED = 100_000
"""The most paths that a brace expression may stand for."""
_BRACES = re.compile(r"\{([0-9]+\.\.[0-9]+|[^{}/]*,[^{}/]*)\}")


def expand_braces(path: str) -> list[str]:
    """The paths that a brace expression stands for, in their order, as shells have it: `a-{08..11}.tar`, `{a,b}.tar`.

    A path without one is itself.

    Raises:
        ValueError: they are too many, or a range runs backwards.
    """
    parts = _BRACES.split(path)  # text and the inside of braces by turns
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    if (count := math.prod(map(len, choices))) > MOST_EXPANDED:
        raise ValueError(f"it stands for {count:,} paths, and {MOST_EXPANDED:,} are the most")
    return ["".join(one) for one in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    ends = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if ends is None:
        return inside.split(",")
    first, last = (int(end) for end in ends.groups())
    if first > last:
        raise ValueError(f"the range {inside} runs backwards")
    if last - first >= MOST_EXPANDED:
        raise ValueError(f"the range {inside} has {last - first + 1:,} numbers, and {MOST_EXPANDED:,} are the most")
    # As wide as the ends are written: 008 to 011.
    width = max(map(len, ends.groups())) if any(end.startswith("0") and len(end) > 1 for end in ends.groups()) else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]


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
