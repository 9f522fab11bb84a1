"""Places: where stores and runs lie by default, and how what is left behind names a place so that both can be moved.

A document names a place on the same file system relative to its own folder: `../../stores/<id>`. Move a run and its
stores together, and every document is right as it is. What shares no folder with the document, and a URI, is named as
it is.
"""

# ruff: noqa: PTH100, PTH117, PTH118  -- places are text, and may be URIs: only os.path leaves them as they are

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from akd_dist.base.errors import AkdError, RecipeError
from akd_dist.base.files import expanded

_OBJECT_STORAGE = ("s3", "gs")
_SLASH_MISSING = re.compile(r"(s3|gs):(?!//)/?")
_BUCKET = re.compile(r"[A-Za-z0-9._:$-]+")
_NO_KEY = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check_uri(text: str, holds: str | None = None, option: str | None = None) -> None:
    """Refuse a URI of object storage that names no place there; anything else passes.

    Args:
        holds: what lies there: `runs`; None where that is not known.
        option: the option that names it; None where it is an argument.

    Raises:
        RecipeError: it has no bucket, or a part that no key has; or a slash is missing, and it would be a folder here.
    """
    scheme, separator, rest = text.partition("://")
    bucket, *parts = rest.rstrip("/").split("/")
    meant = f"write {scheme}://BUCKET/PREFIX"
    if mistyped := _SLASH_MISSING.match(text):
        got = f"{mistyped[0]} at its beginning (a Path of Python leaves one slash out of a URI: give a text)"
        meant = f"write {mistyped[1]}://{text[mistyped.end() :]}; a folder of this name is ./{text}"
    elif not separator or scheme.lower() not in _OBJECT_STORAGE:
        return
    elif not bucket:
        got = "no bucket"
    elif not _BUCKET.fullmatch(bucket):
        got = f"the bucket {bucket!r}"
    elif wrong := [part for part in (bucket, *parts) if part in ("", ".", "..")]:
        got = f"the part {wrong[0]!r} between two slashes" if not wrong[0] else f"the part {wrong[0]!r}"
        meant = "write it without that part: names in object storage are taken as they are"
    elif found := _NO_KEY.search(rest):
        got = f"the character {found[0]!r}"
    else:
        return
    raise RecipeError(
        f"{text!r} is no place {f'for {holds}' if holds else 'in object storage'}",
        got=got,
        expected="s3://bucket/prefix",
        next=f"for {option}, {meant}" if option else meant,
    )


def absolute(place: str | Path, holds: str | None = None, option: str | None = None) -> str:
    """A local place as an absolute path, before any worker changes directory; a URI as it is.

    Args, Raises: as `check_uri`.
    """
    text = os.fspath(place)
    check_uri(text, holds, option)
    return text if "://" in text else str(expanded(text).absolute())


def folder(place: str | Path, *, holds: str, option: str, expected: str) -> Path:
    """A place that has to be a local folder, as an absolute path; nothing is looked at.

    Args:
        holds: what lies there: `runs`.
        option: the option that names it.
        expected: which folders would do.

    Raises:
        RecipeError: it is a URI, which as a path would be a folder here, named after the URI's scheme; or not UTF-8.
    """
    text = os.fspath(place)
    scheme, separator, _ = text.partition("://")
    mistyped = _SLASH_MISSING.match(text)
    if separator or mistyped:
        raise RecipeError(
            f"{text!r} is no place for {holds}",
            got=mistyped[0] if mistyped else f"{scheme}://",
            expected=expected,
            next=f"give another {option}; what may lie in s3:// are stores (--store-root) and runs (--run-root)",
        )
    return Path(nameable(absolute(text), option))


def nameable(place: str, option: str) -> str:
    """A place that is in UTF-8, as the documents are that name it.

    Args:
        option: what gave it.

    Raises:
        RecipeError: it is not.
    """
    try:
        place.encode()
    except UnicodeEncodeError:
        raise RecipeError(
            f"nothing can be written under {place!r}",
            got="a name that is not UTF-8",
            expected="a path in UTF-8: documents name it, and they are",
            next=f"rename the folder, or give another {option}",
        ) from None
    return place


def inside(place: str, folder: str | Path) -> str:
    """How a document in a folder of object storage names a place: relative to it if it lies there, else as it is.

    Args:
        folder: the copy of it that is worked on here.
    """
    here = f"{os.fspath(folder)}/"
    return place.removeprefix(here) if place.startswith(here) else "." if place == os.fspath(folder) else place


def output(place: str | Path) -> Path:
    """Where `--out` says that a file or folder goes, as an absolute path.

    Raises:
        RecipeError: as `folder`.
    """
    return folder(place, holds="what is written", option="--out", expected="a path on this machine")


@dataclass(frozen=True)
class Root:
    """A folder that commands and functions share when none is named: a variable of the environment, or a default."""

    variable: str
    """The variable; empty counts as not set."""
    default: str
    """Relative to the working folder; its name is also what the root holds."""
    option: str
    """The option that names it."""

    @property
    def is_set(self) -> bool:
        """Whether the environment names it."""
        return bool(os.environ.get(self.variable))

    def chosen(self, given: str | Path | None = None) -> str:
        """What was given, else the variable, else the default; a local one as an absolute path, a URI as it is.

        Raises:
            RecipeError: as `check_uri`.
        """
        from_variable = not given and os.environ.get(self.variable)
        option = self.variable if from_variable else self.option
        return absolute(given or from_variable or self.default, self.default, option)


STORE_ROOT = Root("AKD_DIST_STORE_ROOT", "stores", "--store-root")
"""Where stores lie."""
RUN_ROOT = Root("AKD_DIST_RUN_ROOT", "runs", "--run-root")
"""Where runs lie."""


def written(place: str | Path, folder: str | Path, *, verbatim: bool = False) -> str:
    """How a document in `folder` names a place: relative to it, if the two share more than the root of all files.

    Args:
        verbatim: whether `found` is to give back the very text, `..` in the middle of it included.
    """
    there, here = os.fspath(place), os.fspath(folder)
    if "://" in there or "://" in here or not os.path.isabs(there):
        return there
    head, *rest = there.split("/../", 1) if verbatim else [there]
    head, here = _real(head or os.sep), os.path.realpath(here)
    # Two places that share only the root of all files will not be moved together, so nothing is gained by a relative
    # path.
    if os.path.commonpath([head, here]) == os.sep:
        return there
    return "/../".join([os.path.relpath(head, here), *rest])


def found(place: str, folder: str | Path) -> str:
    """The place that a document in `folder` names, absolute; also one that was written as an absolute path."""
    here = os.fspath(folder)
    if "://" in place or "://" in here or os.path.isabs(place):
        return place
    parent, parts = Path(os.path.realpath(here)), Path(place).parts
    up = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    above = [parent, *parent.parents]
    return str(above[min(up, len(above) - 1)].joinpath(*parts[up:]))


def each(document: Any, change: Callable[[str], str]) -> Any:
    """A copy of a run's JSON document with every place in it changed: what stands under `run`, `store` and `path`."""
    if isinstance(document, list):
        return [each(entry, change) for entry in document]
    if not isinstance(document, dict):
        return document
    return {
        key: change(value) if key in ("run", "store", "path") and isinstance(value, str) else each(value, change)
        for key, value in document.items()
    }


def renamed(document: Any, names: Mapping[str, str]) -> Any:
    """A copy of a document in which a place, at the beginning of a text, has another name.

    Args:
        names: folders, and what they are called: what lies in object storage is worked on in a copy here.
    """
    if isinstance(document, Mapping):
        return {key: renamed(value, names) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [renamed(value, names) for value in document]
    if isinstance(document, str):
        for folder, name in names.items():
            if document == folder or document.startswith(f"{folder}/"):
                return name + document[len(folder) :]
    return document


@contextlib.contextmanager
def named_in_errors(names: Mapping[str, str]) -> Iterator[None]:
    """A block whose refusals call places by other names, wherever they stand; see `renamed`."""
    try:
        yield
    except AkdError as error:
        for field in ("what", "got", "expected", "next"):
            text = getattr(error, field)
            for folder, name in names.items():
                text = text and text.replace(folder, name)
            setattr(error, field, text)
        error.args = (error.what,)
        raise


def _real(path: str) -> str:
    """A path whose folders are no links, so that `..` leads back; what it leads to keeps its name."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)
