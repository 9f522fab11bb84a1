"""What people read: consoles, tables, facts, sizes, and the commands to type next."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import select
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from akd_dist.base.errors import printable
from akd_dist.base.formatting import counted as counted, size as size, uncut
from akd_dist.cli.options import DEFAULT_ROOTS
from akd_dist.options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Enough of a store's id to tell stores apart, and accepted wherever an id is.
SHORT_ID = 12
# Columns whose digits stand below each other.
UNLIMITED = 1_000_000
NUMBERS = {"rows", "views", "classes", "shards", "size", "epochs", "batch", "workers", "runs"}


_BYTES_OR_ESCAPES = "akd_dist.bytes_or_escapes"


def _bytes_or_escapes(error: UnicodeError) -> tuple[bytes, int]:
    """What to write where UTF-8 has no character: the byte that a file's name had there, else an escape.

    Half a surrogate pair from elsewhere, such as a recipe's `"\\ud800"`, stands for no byte.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    bytes_of = (
        bytes([ord(one) - 0xDC00]) if 0xDC80 <= ord(one) <= 0xDCFF else one.encode("ascii", "backslashreplace")
        for one in wrong
    )
    return b"".join(bytes_of), error.end


codecs.register_error(_BYTES_OR_ESCAPES, _bytes_or_escapes)


def stdout_for_results() -> contextlib.AbstractContextManager[object]:
    """Send whatever libraries print meanwhile to stderr: Ray reports dead workers on stdout, where documents belong."""
    return contextlib.redirect_stdout(sys.stderr)


def settle_streams() -> None:
    """Make stdout and stderr fit to print on, whatever the shell handed down.

    A stream that is closed becomes /dev/null: else the next file that is opened would take its place. Where the locale
    says ASCII, or nothing, UTF-8 is written, and names of files that are no UTF-8 byte by byte. What another encoding
    cannot show is written as an escape (`\\xe9`), instead of ending the command.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if codecs.lookup(stream.encoding).name in ("ascii", "utf-8"):
                stream.reconfigure(encoding="utf-8", errors=_BYTES_OR_ESCAPES)
            else:
                stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more, as in `akd-dist stores list | head -1`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence_streams() -> None:
    """Let whatever is still to be written to a pipe without a reader vanish, so that nothing complains at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def plain_output() -> bool:
    """Whether the user wants no colours: NO_COLOR is set, or the terminal knows none."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def _console(*, stderr: bool = False, width: int | None = None) -> Console:
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would leave with 1; `main` decides

    # rich honours NO_COLOR itself. A dumb terminal cannot go back over what it shows, so it gets plain lines.
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return _Console(stderr=stderr, width=width, force_terminal=False if dumb else None)


def progress_console() -> Console:
    """Where progress is told: stderr."""
    return _console(stderr=True)


def result_console(*, stderr: bool = False) -> Console:
    """Where tables go: stdout, or stderr. A pipe or a file has no width, so that nothing is ever cut there."""
    stream = sys.stderr if stderr else sys.stdout
    return _console(stderr=stderr, width=None if stream is not None and stream.isatty() else UNLIMITED)


def print_table(table: Table, *, stderr: bool = False) -> None:
    """A table; where it does not fit the terminal, its text is folded and nothing is cut off."""
    console = result_console(stderr=stderr)
    console.print(uncut(table, console.width))


def table_of(first: str, *others: str, title: str | None = None) -> Table:
    """An empty table in the style of the house."""
    from akd_dist.base.formatting import house_table

    table = house_table(title)
    for column in (first, *others):
        number = column in NUMBERS
        table.add_column(column, no_wrap=number, justify="right" if number else "left")
    return table


def print_json(document: Any) -> None:
    """A document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # JSON has escapes of its own
        text = json.dumps(document, indent=2)
    click.echo(text)


def print_facts(facts: dict[str, Any]) -> None:
    """Names and values below each other."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name:<{width}}{printable(in_words(value))}")


def in_words(value: Any) -> str:
    """A document on one line, for reading: `kind mlp, hidden [16], ...`; of what has a kind, it comes first."""
    if not isinstance(value, dict):
        return str(value)
    value = {"kind": value["kind"]} | value if "kind" in value else value
    shown = {key: f"({in_words(inner)})" if isinstance(inner, dict) else inner for key, inner in value.items()}
    return ", ".join(f"{key} {inner}" for key, inner in shown.items())


def as_yaml(value: Any) -> str:
    """Plain data as YAML on one line, to be put into a recipe.

    Text is quoted unless it is a plain path or a name; ids are, of which one of digits alone would be a number.
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"(\.{0,2}/)?[A-Za-z_][\w./-]*", value, re.ASCII)
    reserved = str(value).lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    is_id = isinstance(value, str) and re.fullmatch("[0-9a-f]{12,}", value)
    return value if plain and not reserved and not is_id else json.dumps(value, ensure_ascii=False)


def path_from(recipe: str | Path, path: str | Path) -> str:
    """A path as a recipe's file would name it: from the file's folder where it lies below that, else as it is."""
    folder = Path(recipe).resolve().parent
    here = Path(path)
    return str(here.relative_to(folder)) if here.is_relative_to(folder) else str(path)


# What commands have in common: the next one works on the same, in the same places.
KEPT = ("overrides", "trust", "store_root", "run_root", "cache_root", "address")
FLAGS = {one.name: one.metadata["flag"] for one in fields(RunOptions) if one.name in KEPT}


def command_line(verb: str, recipe: str, **given: Any) -> str:
    """A command to type next, with what this one was given that it takes as well."""
    words = ["akd-dist", *verb.split(), recipe]
    for name in KEPT:
        value = given.get(name)
        if value not in (None, DEFAULT_ROOTS.get(name)):
            values = [value] if isinstance(value, str) else value
            words += [word for one in values for word in (FLAGS[name], one)]
    return shlex.join(words)


def short_path(path: str | Path) -> str:
    """A path below the working directory without it; anything else, and a URI, as it is."""
    here = f"{Path.cwd()}/"
    return str(path).removeprefix(here)
