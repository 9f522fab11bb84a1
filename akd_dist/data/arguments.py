"""The arguments of a user's own functions, as the recipe has them: which of them are paths, and what lies there.

A string that begins with `./` or `../` is a path relative to the recipe's folder, and reaches the function absolute;
the recipe keeps it as it is written, so that a folder that moves is still the same recipe. Every other string reaches
the function as it is.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RefusedError, encodable
from akd_dist.base.files import canonical_json, sha256, stamp_of
from akd_dist.data.blocks import default_threads
from akd_dist.data.file_sets import FileSet, sha256_of_file

LISTED = 100_000
"""So many files of a folder are looked at, by the order of their names."""
# A longer string is text and no path: asking the file system about it would be wasted, or fail.
_MOST_CHARACTERS = 1000


def placed(arguments: Mapping[str, Any], folder: str | None) -> dict[str, Any]:
    """Arguments as a function gets them, their relative paths absolute.

    Args:
        arguments: as the recipe has them: JSON.
        folder: the recipe's folder; None where there is none, or it is not known.

    Raises:
        RefusedError: a path is relative to a folder that is not known; or a string would be one relative to the working
            directory, where it names something else than beside the recipe.
    """
    return {name: _placed(value, folder, name) for name, value in arguments.items()}


def named(arguments: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """The files and the folders that strings among arguments name, as `placed` returns them."""
    found = [Path(text).absolute() for text in _strings(arguments) if _is_path(text) and stamp_of(Path(text))]
    return [path for path in found if not path.is_dir()], [path for path in found if path.is_dir()]


def contents(arguments: Mapping[str, Any], folder: str | None) -> dict[str, str]:
    """The sha256 of each file that strings among arguments name, by the string; of a folder that of all files below it.

    A folder in which the recipe itself lies is known by its place: what commands write may lie there, too.

    Args:
        arguments: as the recipe has them.
        folder: as of `placed`.

    Raises:
        RefusedError: a file cannot be read.
    """
    paths = {text: Path(folder or "", text) for text in _strings(arguments) if _is_path(text)}
    found = {text: _content(path, folder) for text, path in paths.items()}
    return {text: content for text, content in found.items() if content is not None}


def _content(path: Path, folder: str | None) -> str | None:
    if path.is_file():
        return sha256_of_file(path)
    if not path.is_dir():
        return None
    if Path(folder or "").resolve().is_relative_to(path.resolve()):
        return sha256(str(path.resolve()).encode())
    files = sorted(file for place, _, names in _walk(path) for name in names if (file := Path(place, name)).is_file())
    return FileSet(str(path), [str(file.relative_to(path)) for file in files]).sha256(default_threads())


def listing(folder: Path) -> str:
    """A hash of the names, sizes, times and inodes of up to LISTED files in a folder and below it; none is read."""
    files = (Path(place, name) for place, _, names in _walk(folder) for name in sorted(names))
    return sha256(canonical_json([[encodable(str(file)), stamp_of(file)] for file in itertools.islice(files, LISTED)]))


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for place, folders, names in os.walk(folder):
        # os.walk goes by this very list, and the order of a folder's entries is not the same everywhere.
        folders.sort()
        yield place, folders, names


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | Mapping):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _strings(value)


def _is_path(text: str) -> bool:
    return 0 < len(text) <= _MOST_CHARACTERS and text.isprintable() and "://" not in text


def _placed(node: Any, folder: str | None, name: str) -> Any:
    if isinstance(node, dict):
        return {key: _placed(value, folder, f"{name}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_placed(value, folder, f"{name}.{number}") for number, value in enumerate(node)]
    if not isinstance(node, str) or not _is_path(node) or Path(node).is_absolute():
        return node
    if node in (".", "..") or node.startswith(("./", "../")):
        if folder is None:
            raise RefusedError(
                f"the argument {name} is a path relative to a recipe's folder, and which that is is not known here",
                got=node,
                expected="a recipe, or an absolute path",
            )
        return os.path.normpath(Path(folder) / node)
    if folder is not None and stamp_of(Path(node)) and not _same(Path(node), Path(folder) / node):
        raise RefusedError(
            f"the argument {name} names something in the working directory",
            got=f"{node}, which is there in {Path.cwd()}, and not the same in the recipe's folder {folder}",
            expected="a path that does not depend on where the command is given",
            next=f"write ./{node} for what lies beside the recipe, or an absolute path; "
            "if it is no path, give the command elsewhere, as in the recipe's folder",
        )
    return node


def _same(one: Path, other: Path) -> bool:
    return stamp_of(other) is not None and one.samefile(other)
