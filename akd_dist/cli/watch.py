"""`akd-dist status`: how far a run is, seen from another terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from akd_dist.cli.options import json_option
from akd_dist.cli.show import print_json, result_console

if TYPE_CHECKING:
    from akd_dist.documents import StatusDocument
    from akd_dist.status import RunReader

LOOK_SECONDS, LINE_SECONDS = 1.0, 10.0
GOING = ("preparing", "training")


@click.command("status")
@click.argument("run", metavar="RUN", type=click.Path())
@click.option("--watch", is_flag=True, help="Follow it until it ends or stops.")
@json_option
def status(run: str, watch: bool, as_json: bool) -> None:
    """How far a run is, live or not.

    RUN is its folder, such as runs/NAME. Only files are read, so that it may be asked from anywhere, at any time.
    """
    from akd_dist.status import RunReader

    reader = RunReader(Path(run))
    found = reader.read()
    if watch:
        found = _follow(reader, found, quiet=as_json)
    if as_json:
        print_json(json.loads(found.model_dump_json()))
    else:
        _print(found)


def _follow(reader: RunReader, found: StatusDocument, *, quiet: bool) -> StatusDocument:
    """Show a run until nothing happens to it any more: a table in a terminal, a line now and then elsewhere."""
    from rich.live import Live

    from akd_dist.fleet_view import FleetView, headline, total_line

    console = result_console()
    if console.is_terminal and not quiet:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while found.state in GOING:
                live.update(FleetView(found, headline(found), fit=True), refresh=True)
                time.sleep(LOOK_SECONDS)
                found = reader.read()
        return found
    told = 0.0
    while found.state in GOING:
        if not quiet and time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            click.echo(f"{headline(found)}; {total_line(found)}")
        time.sleep(LOOK_SECONDS)
        found = reader.read()
    return found


def _print(found: StatusDocument) -> None:
    from akd_dist.fleet_view import FleetView, headline, next_line

    # Not a line of the table: commands and paths in it are to be copied.
    click.echo(headline(found))
    result_console().print(FleetView(found))
    if told := next_line(found):
        click.echo(told)
