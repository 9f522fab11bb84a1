"""`akd-dist tune`: a search over what a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import akd_dist
from akd_dist.base.formatting import MetricFormat, house_table, metric_format
from akd_dist.cli.options import json_option, taking
from akd_dist.cli.plans import print_fleet_plan
from akd_dist.cli.show import counted, print_json, print_table, progress_console, short_path, stdout_for_results
from akd_dist.options import TuneOptions

if TYPE_CHECKING:
    from rich.table import Table

    from akd_dist.documents.report import Estimate
    from akd_dist.documents.tune import TuneDocument, TunedSearch, TunedTrial

TRIALS_SHOWN = 12
# Student's t is 12.7 for two seeds.
FEWEST_OF_INTERVAL = 3


@click.command("tune")
@taking(TuneOptions)
@json_option
def tune(as_json: bool, **given: Any) -> int:
    """Search temperatures, lengths, learning rates.

    What the recipe's `search:` blocks name is tried by successive halving, from one store: trials are compared on the
    validation rows, and the best of them go on. The best of all is measured on the test rows, once. The same command
    again resumes, or shows the saved result.
    """
    from akd_dist.documents.tune import TuneDocument

    with stdout_for_results():
        document = akd_dist.tune(**given, console=progress_console())
    if as_json:
        print_json(document)
    else:
        print_tuned(TuneDocument.model_validate(document))
    return int(not document.get("dry_run") and any(search["best"] is None for search in document["searches"]))


def print_tuned(document: TuneDocument) -> None:
    """What searches came to, or what they would try."""
    for search in document.searches:
        print_table(search_table(search, document))
        if search.block:
            click.echo("best    as a block of students:")
            click.echo("".join(f"  {line}\n" for line in search.block.splitlines()), nl=False)
        if search.best is None and not document.dry_run:
            click.echo(without_result(search))
    if document.left_out:
        click.echo(f"without a search, and left out: {counted(document.left_out, 'student')}")
    if document.dry_run or any(search.best is not None for search in document.searches):
        click.echo(f"epochs  {document.epochs:,}; to the end, all trials would take {document.epochs_of_all:,}")
    if document.first is not None:
        click.echo("the first rung:")
        print_fleet_plan(document.first)
    else:
        click.echo(f"result  {short_path(f'{document.run}/tune.json')}")
        click.echo(f"report  {short_path(f'{document.run}/report.html')}")


def without_result(search: TunedSearch) -> str:
    """Why a search has no best trial, by the first that was lost, and what may be done."""
    whys = (f"k{one.number:03d}: {one.lost}" for one in search.trials if one.lost is not None)
    why = next(whys, "no validation metric was recorded")
    return (
        f"lost    {search.name}: every trial that was left ended without a result; {why}\n"
        "next    the same command tries again what failed; where trials diverged, search other values: --set name=..."
    )


def search_table(search: TunedSearch, document: TuneDocument) -> Table:
    """The trials of a search, the best first."""
    from rich.text import Text

    shown = metric_format(document.metric, document.metric_name)
    trials = sorted(search.trials, key=lambda trial: _standing(trial, search, shown), reverse=True)
    more = len(trials) - TRIALS_SHOWN
    told = [f"and {more:,} more: tune.json has all of them"] if more > 0 else []
    told += [f"k{one.number:03d} went no further: {one.lost}" for one in trials if one.lost is not None]
    if search.test is not None:
        told.append(f"test rows, k{search.best:03d} alone: {of_test_rows(search, search.test, shown)}")
    table = house_table(f"{search.name}: {counted(len(trials), 'trial')}", Text("\n".join(told)) if told else None)
    table.add_column("trial", no_wrap=True)
    table.add_column("values", overflow="fold")
    for number, _ in enumerate(trials[0].rungs, 1):
        table.add_column(f"rung {number}", justify="right", no_wrap=True)
    for trial in trials[:TRIALS_SHOWN]:
        values = ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in trial.values.items())
        cells = [shown.text(score) for score in trial.scores]
        cells += [f"epoch {epoch}" if document.dry_run else "" for epoch in trial.rungs[len(cells) :]]
        best = trial.number == search.best
        table.add_row(f"k{trial.number:03d}" + " *" * best, Text(values), *cells, style="bold" if best else None)
    return table


def of_test_rows(search: TunedSearch, test: Estimate, shown: MetricFormat) -> str:
    """The mean and what its ± is; of two seeds, whose interval says little, the standard deviation."""
    from akd_dist.reporting.seeds import Spread, interval, plus_minus

    if test.n >= FEWEST_OF_INTERVAL:
        return f"{shown.with_unit(interval(shown, test))} (95 % interval over {test.n} seeds)"
    said = shown.with_unit(plus_minus(shown, Spread.of(one.test for one in search.seeds)))
    return said if test.n == 1 else f"{said} (standard deviation over {test.n} seeds)"


def _standing(trial: TunedTrial, search: TunedSearch, shown: MetricFormat) -> tuple[bool, int, float, int]:
    score = shown.standing(trial.scores[-1]) if trial.scores else 0.0
    return trial.number == search.best, len(trial.scores), score, -trial.number


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
