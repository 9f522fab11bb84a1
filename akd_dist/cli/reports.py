"""`akd-dist report`: what runs came to."""

from pathlib import Path

import click

from akd_dist.base import places
from akd_dist.base.errors import AkdError
from akd_dist.cli.options import complete_folder, json_option
from akd_dist.cli.show import print_json, print_table, short_path


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(), shell_complete=complete_folder)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    help="Where the page goes that compares several runs (default: report.html beside the first), or a run's page.",
)
@json_option
def report(runs: tuple[str, ...], out: str | None, as_json: bool) -> int:
    """Print the tables of runs, write report.html.

    Each page is one file that opens offline. With several runs there is one page more, which compares them; a run that
    cannot be read takes nothing from the others.
    """
    from akd_dist.reporting.remote import at_hand, write_reports_of
    from akd_dist.reporting.results import read_run
    from akd_dist.reporting.tables import fleet_table, pooled_table, runs_table

    refused: list[AkdError] = []
    page = None if out is None else places.output(out)
    with at_hand(runs) as found:
        document = write_reports_of(found, page, refused=refused)
        code = refused[0].code if refused else 0
        if as_json:
            print_json(found.named(document.plain()))
            return code
        read = [read_run(Path(one.run)) for one in document.runs]
        for run, written in zip(read, document.runs, strict=True):
            print_table(fleet_table(run.fleet, run.chosen.values()))
            click.echo(f"report  {short_path(found.named(written.report))}")
            for problem in written.problems:
                click.echo(f"warning: {short_path(found.named(str(run.folder)))}: {problem}", err=True)
        if document.comparison is not None:
            print_table(pooled_table(read))
            print_table(runs_table(read))
            for warning in document.comparison.warnings:
                click.echo(f"warning: {warning}", err=True)
            click.echo(f"report  {short_path(found.named(document.comparison.report))}")
        for error in refused:
            click.echo(f"error: {found.in_words(f'{error.what}: {error.got}')}", err=True)
    return code
