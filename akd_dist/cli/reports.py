"""`akd-dist report`: what runs came to."""

from __future__ import annotations

from pathlib import Path

import click

import akd_dist
from akd_dist.cli.options import json_option
from akd_dist.cli.show import print_json, result_console, short_path


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@json_option
def report(runs: tuple[str, ...], as_json: bool) -> None:
    """Print the tables of runs, write report.html."""
    from akd_dist.fleet_report import fleet_table, read_fleet

    written = []
    for run in runs:
        path = akd_dist.report(run)
        written.append({"run": run, "report": str(path)})
        if not as_json:
            result_console().print(fleet_table(read_fleet(Path(run))))
            click.echo(f"report  {short_path(path)}")
    if as_json:
        print_json({"reports": written})
