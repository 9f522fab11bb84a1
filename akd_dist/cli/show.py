"""What people read: consoles, tables, facts, sizes, and the commands to type next."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from akd_dist.cli.options import DEFAULT_ROOTS
from akd_dist.wording import counted as counted
from akd_dist.wording import size as size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Enough of a store's id to tell stores apart, and accepted wherever an id is.
SHORT_ID = 12
# Columns whose digits stand below each other.
NUMBERS = {"rows", "views", "classes", "shards", "size", "epochs", "batch", "workers", "runs"}


def stdout_for_results() -> contextlib.AbstractContextManager[object]:
    """Send whatever libraries print meanwhile to stderr: Ray reports dead workers on stdout, where documents belong."""
    return contextlib.redirect_stdout(sys.stderr)


def progress_console() -> Console:
    """Where progress is told: stderr."""
    from rich.console import Console

    return Console(stderr=True)


def result_console() -> Console:
    """Where tables go: stdout."""
    from rich.console import Console

    console = Console()
    # A pipe has no width: a table that is cut off would help nobody.
    return console if console.is_terminal else Console(width=max(console.width, 160))


def table_of(first: str, *others: str, title: str | None = None) -> Table:
    """An empty table in the style of the house."""
    from akd_dist.wording import house_table

    table = house_table(title)
    for column in (first, *others):
        table.add_column(column, no_wrap=True, justify="right" if column in NUMBERS else "left")
    return table


def print_json(document: Any) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_facts(facts: dict[str, Any]) -> None:
    """Names and values below each other."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name:<{width}}{in_words(value)}")


def in_words(value: Any) -> str:
    """A document on one line, for reading: `kind mlp, hidden [16], ...`."""
    if not isinstance(value, dict):
        return str(value)
    shown = {key: f"({in_words(inner)})" if isinstance(inner, dict) else inner for key, inner in value.items()}
    return ", ".join(f"{key} {inner}" for key, inner in shown.items())


def command_line(
    verb: str, target: str, overrides: Iterable[str] = (), trust: Iterable[str] = (), **roots: str | None
) -> str:
    """A command to type next, with what this one was given."""
    words = ["akd-dist", *verb.split(), target]
    for override in overrides:
        words += ["--set", override]
    for module in trust:
        words += ["--trust", module]
    for name, value in roots.items():
        if value not in (None, DEFAULT_ROOTS.get(name)):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def short_path(path: str | Path) -> str:
    """A path below the working directory without it; anything else, and a URI, as it is."""
    here = f"{Path.cwd()}/"
    return str(path).removeprefix(here)
