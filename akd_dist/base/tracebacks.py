"""Exceptions of the user's own code, told from the line on that called it.

The frames before it are ours and Python's, and lead nobody to the mistake; logs have them as well, at the end.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

_OURS = Path(__file__).resolve().parents[1]
# `akd_dist/storage` and `akd_dist/jobs` are links to folders beside the package.
_HOMES = tuple(str(folder) + "/" for folder in (_OURS, *((_OURS / name).resolve() for name in ("storage", "jobs"))))
_STDLIB = sysconfig.get_path("stdlib") + "/"
_INSTALLED = ("site-packages", "dist-packages")


def whole(error: BaseException) -> str:
    """An exception with its traceback from the first frame of the user's own on; of one without, all but ours."""
    told = traceback.TracebackException.from_exception(error)
    _trim(told)
    return "".join(told.format()).rstrip()


def in_full(error: BaseException) -> str:
    """For a log: the same, and below it the traceback with the frames that led there, if there are more."""
    own, full = whole(error), "".join(traceback.format_exception(error)).rstrip()
    return full if own == full else f"{own}\n\nin full:\n{full}"


def _trim(told: traceback.TracebackException) -> None:
    """Leave out the frames before the user's own, of an exception and of those that it came from."""
    first = _first(told.stack, _is_users)
    if first is None:
        first = _first(told.stack, lambda file: not _is_ours(file))
    told.stack = traceback.StackSummary.from_list(told.stack[len(told.stack) if first is None else first :])
    for before in (told.__cause__, told.__context__):
        if before is not None:
            _trim(before)


def _first(stack: traceback.StackSummary, wanted: Callable[[str], bool]) -> int | None:
    return next((number for number, frame in enumerate(stack) if wanted(frame.filename)), None)


def _is_ours(file: str) -> bool:
    """Whether a frame is akd-dist's, or of the machinery by which Python imports a module."""
    return file.startswith((*_HOMES, "<frozen ", f"{_STDLIB}importlib/")) or _OURS in Path(file).resolve().parents


def _is_users(file: str) -> bool:
    installed = file.startswith(_STDLIB) or any(part in _INSTALLED for part in Path(file).parts)
    return not installed and not _is_ours(file)
