"""Every refusal of akd-dist: what happened, what was got, what was expected, what to do next, and an exit code.

The classes lie on the lowest floor so that every floor can raise them; the command line turns one into a single message
and its exit code, and a Ray task may raise one (they pickle).
"""

import errno
import re
from typing import Any, ClassVar, TypeVar

# All but line feeds and tabs, of both sets.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

LONGEST = 20_000
"""Characters of the longest text that is shown of anything: some are taken from documents that somebody else wrote."""
LONGEST_LINE = 1_000
"""Characters of the longest line in a list."""


class AkdError(Exception):
    """A refusal with an exit code; never shown as a traceback.

    Args:
        what: one sentence that says what is wrong and names the thing (file, row, field, shard, student).
        got: what was found, if it helps to see it.
        expected: what would have been right.
        next: what to do about it, as a command where there is one.
    """

    code: ClassVar[int] = 70

    def __init__(self, what: str, *, got: object = None, expected: object = None, next: str | None = None) -> None:
        super().__init__(what)
        self.what = _cut(what)
        self.got = None if got is None else _cut(str(got))
        self.expected = None if expected is None else _cut(str(expected))
        self.next = None if next is None else _cut(next)

    def __str__(self) -> str:
        labelled = (("got", self.got), ("expected", self.expected), ("next", self.next))
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in labelled if text is not None)])

    @property
    def line(self) -> str:
        """What is wrong and what was got, on one line: for a list in which the other entries are well."""
        told = f"{self.what}: {self.got}" if self.got else self.what
        return _cut("; ".join(line.strip() for line in told.splitlines()), LONGEST_LINE)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.got, self.expected, self.next))

    def to_json(self) -> dict[str, Any]:
        """The value of `error` in the JSON document that a refused command prints."""
        return {
            "code": self.code,
            "what": self.what,
            "got": self.got,
            "expected": self.expected,
            "next": self.next,
        }


def printable(text: str) -> str:
    """A text whose control characters are written as escapes: from a foreign document, a terminal would obey them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def encodable(text: str) -> str:
    """A text that UTF-8 can write: names of files that are no UTF-8 reach us as lone surrogates, which become escapes.

    For what is told; a path that is to be opened again keeps them.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def _cut(text: str, most: int = LONGEST) -> str:
    """A text without its middle, where it is longer than anybody reads."""
    if len(text) <= most:
        return printable(text)
    return printable(f"{text[: most // 2]} [... {len(text) - most:,} characters ...] {text[-most // 2 :]}")


def _rebuild(cls: type[AkdError], what: str, got: str | None, expected: str | None, next_step: str | None) -> AkdError:
    return cls(what, got=got, expected=expected, next=next_step)


class RecipeError(AkdError):
    """The recipe or an option is wrong; found before any data is opened."""

    code = 2


class HeldError(AkdError):
    """Somebody else holds the store, the run or the student."""

    code = 3


class RefusedError(AkdError):
    """Data, a teacher or a student is refused, missing files included."""

    code = 4


class DamagedError(AkdError):
    """A sealed store or a checkpoint is not what it was when it was written."""

    code = 5


class CorruptCacheError(DamagedError):
    """What this node prepared or decoded is not what it was when it was written. It can be made anew."""


class TouchedCacheError(CorruptCacheError):
    """What this node prepared or decoded was touched while it was in use. It holds what it should, but may not have
    held it all the time."""


class MachineError(AkdError):
    """The environment: disk, permission, cluster, a worker lost after its retries."""

    code = 6


class InterruptedByUser(AkdError):  # noqa: N818
    """Ctrl-C: what was done is kept, and the message says how to go on."""

    code = 130


class TerminatedError(InterruptedByUser):
    """SIGTERM: as Ctrl-C, with its own exit code."""

    code = 143


Kind = TypeVar("Kind", bound=AkdError)


def is_limit(error: OSError) -> bool:
    """Whether a file could not be opened for a reason that has nothing to do with it: too many others are open."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def limit_reached(error: Exception) -> MachineError:
    """What to say where this machine lets the command have no more files, processes or threads."""
    return MachineError(
        "this machine lets the command have no more files, processes or threads",
        got=str(error),
        expected="limits that leave room for a few hundred files and some dozen threads",
        next="raise the limits of open files (ulimit -n) and of processes (ulimit -u), or end what is not "
        "needed; then run the same command again: what is done is kept",
    )


def unreadable(
    kind: type[Kind], place: object, error: OSError, *, expected: str, next: str | None = None
) -> Kind | MachineError:
    """What to say of a file or a folder that cannot be read; the advice is the caller's.

    Args:
        kind: whose exit code it has, where it is the file's fault.
        place: the path, with a word of what it is where that helps.
    """
    if is_limit(error):
        return limit_reached(error)
    return kind(f"{place} cannot be read", got=error.strerror or str(error), expected=expected, next=next)
