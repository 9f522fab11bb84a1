"""`akd-dist report`: what runs came to."""

from __future__ import annotations

import click

from akd_dist.cli.options import json_option
from akd_dist.cli.show import print_json, result_console, short_path


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    help="Where the page goes that compares several runs (default: report.html beside the first), or a run's page.",
)
@json_option
def report(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Print the tables of runs, write report.html.

    Each page is one file that opens offline. With several runs there is one page more, which compares them.
    """
    from akd_dist.fleet_report import fleet_table, read_run, runs_table
    from akd_dist.report_page import write_reports
    from akd_dist.storage.files import expanded

    document = write_reports([expanded(run) for run in runs], None if out is None else expanded(out).absolute())
    if as_json:
        print_json(document)
        return
    read = [read_run(expanded(run)) for run in runs]
    for run, written in zip(read, document["runs"], strict=True):
        result_console().print(fleet_table(run.fleet))
        click.echo(f"report  {short_path(written['report'])}")
    if document["comparison"] is not None:
        result_console().print(runs_table(read))
        click.echo(f"report  {short_path(document['comparison']['report'])}")
