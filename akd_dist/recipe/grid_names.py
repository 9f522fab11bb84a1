"""Names of the students of a grid: what their default names do not tell apart is added to them.

    mlp-16-annealing_kd-t5-s0  ->  mlp-16-annealing_kd-t5-lr0.01-n20-s0

A name depends on its block alone, so other blocks may come and go.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from akd_dist.base.files import sha256

MAX_LETTERS = 100
"""Of a whole name."""
MAX_LETTERS_OF_A_VALUE = 24
_SHORT = {"stage1_epochs": "n", "stage2_epochs": "m", "weight_decay": "wd"}

Key = tuple[str, ...]


def names_of_grid(defaults: Sequence[str], values: Sequence[Mapping[Key, Any]]) -> list[str]:
    """The names of a block's students.

    Args:
        defaults: the default name of each, which ends in `-s<seed>`.
        values: what the grid gives each of them.

    Returns:
        The defaults, where they are all different. Else each with those keys of the grid, in its order and before
        `-s<seed>`, in which students of the same default name differ. Equal students keep equal names.
    """
    leaves = [dict(_leaves(given)) for given in values]
    untold = [key for key in dict.fromkeys(itertools.chain(*leaves)) if not _told(key, defaults, leaves)]
    names = []
    for default, given in zip(defaults, leaves, strict=True):
        stem, _, seed = default.rpartition("-s")
        more = "".join(f"-{_word(_short(key, untold), given[key])}" for key in untold if key in given)
        if len(stem + more) + len(seed) + 2 > MAX_LETTERS:
            more = f"-{sha256(more.encode())[:8]}"
        names.append(f"{stem}{more}-s{seed}")
    return names


def _leaves(given: Mapping[Key, Any]) -> Iterator[tuple[Key, str]]:
    """The single values that mappings are made of, as text; a `kind` is the value of the key that it is the kind of."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _leaves({(*key, str(inner)): one for inner, one in value.items()})
        else:
            yield (key[:-1] if key[-1] == "kind" and len(key) > 1 else key), _text(value)


def _told(key: Key, defaults: Sequence[str], leaves: Sequence[Mapping[Key, str]]) -> bool:
    """Whether students of the same default name have the same value of a key."""
    found = defaultdict[str, set[str | None]](set)
    for default, given in zip(defaults, leaves, strict=True):
        found[default].add(given.get(key))
    return all(len(values) == 1 for values in found.values())


def _short(key: Key, others: Sequence[Key]) -> str:
    """The last parts of a key, as few as no other key ends in."""
    ends = (key[-length:] for length in range(1, len(key) + 1))
    alone = next((end for end in ends if not any(o != key and o[-len(end) :] == end for o in others)), key)
    return _SHORT.get(alone[0], alone[0]) if len(alone) == 1 else "_".join(alone)


def _text(value: Any) -> str:
    if isinstance(value, float):
        short = f"{value:g}"
        return (short if float(short) == value else repr(value)).replace("+", "")
    if isinstance(value, list):
        return "x".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


def _word(key: str, text: str) -> str:
    """`lr0.01`, `precision_float64`; a value that no folder's name can hold is cut, and told apart by its digest."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", text)
    if clean != text or len(text) > MAX_LETTERS_OF_A_VALUE:
        clean = f"{clean[:16]}.{sha256(text.encode())[:6]}"
    joint = "" if clean[:1].isdigit() else "_"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", key) + joint + clean
