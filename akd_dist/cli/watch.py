"""`akd-dist status`: how far a run is, seen from another terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from akd_dist.base import places
from akd_dist.cli.options import complete_folder, json_option
from akd_dist.cli.show import print_json, result_console

if TYPE_CHECKING:
    from rich.console import Console

    from akd_dist.documents.status import StatusDocument
    from akd_dist.tracking.status import RunReader

LOOK_SECONDS, LINE_SECONDS = 1.0, 10.0
GOING = ("preparing", "training")


@click.command("status")
@click.argument("run", metavar="RUN", type=click.Path(), shell_complete=complete_folder)
@click.option("--watch", is_flag=True, help="Follow it until it ends or stops.")
@json_option
def status(run: str, watch: bool, as_json: bool) -> None:
    """How far a run is, live or not.

    RUN is its folder, such as runs/NAME, or s3://BUCKET/RUNS/NAME. Only files are read, so that it may be asked from
    anywhere, at any time.
    """
    from akd_dist.base.files import expanded
    from akd_dist.tracking.remote import reader_of

    reader = reader_of(run if "://" in run else expanded(run))
    found = reader.read()
    if watch:
        found = _follow(reader, found, quiet=as_json)
    if as_json:
        print_json(found.model_dump(mode="json") | {"run": places.absolute(run).rstrip("/")})
    else:
        _print(found)


def _follow(reader: RunReader, found: StatusDocument, *, quiet: bool) -> StatusDocument:
    """Show a run until nothing happens to it any more, or Ctrl-C; how far it is then."""
    console = result_console()
    shown = _lines if quiet or not console.is_terminal else _table
    with contextlib.suppress(KeyboardInterrupt), shown(console, quiet) as show:
        while found.state in GOING:
            show(found)
            time.sleep(LOOK_SECONDS)
            found = reader.read()
    return found


@contextlib.contextmanager
def _table(console: Console, _quiet: bool) -> Iterator[Callable[[StatusDocument], None]]:
    from rich.live import Live

    from akd_dist.tracking.view import FleetView, headline

    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda found: live.update(FleetView(found, headline(found), fit=True), refresh=True)


@contextlib.contextmanager
def _lines(_console: Console, quiet: bool) -> Iterator[Callable[[StatusDocument], None]]:
    """A line every ten seconds, or more rarely while nothing moves; none where a document is to come."""
    from akd_dist.tracking.view import Ticker, headline, moved, total_line

    ticker = Ticker(LINE_SECONDS, -math.inf)

    def show(found: StatusDocument) -> None:
        if not quiet and (still := ticker.due(moved(found), time.monotonic())) is not None:
            click.echo(f"{headline(found)}; {total_line(found)}{still}")

    yield show


def _print(found: StatusDocument) -> None:
    from akd_dist.tracking.view import FleetView, headline, next_line

    # Not a line of the table: commands and paths in it are to be copied.
    click.echo(headline(found))
    result_console().print(FleetView(found))
    for problem in found.problems:
        click.echo(f"warning: {problem}", err=True)
    if told := next_line(found):
        click.echo(told)
