"""Results of runs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from akd_dist.base.formatting import (
    MetricFormat,
    house_table,
    metric_format,
    percent,
    seconds,
    share,
    some_of,
    thousands,
)
from akd_dist.documents.fleet import FleetDocument
from akd_dist.reporting.results import Run, agreeing, beside
from akd_dist.reporting.seeds import (
    SeedGroup,
    best_of,
    estimate,
    group_label,
    group_students,
    has_spread,
    interval,
    plus_minus,
    unfinished,
)
from akd_dist.reporting.several import names_of, pool_notes, pooled, told_apart

if TYPE_CHECKING:
    from rich.table import Table

_SPREAD = ", mean ± standard deviation over seeds"


def fleet_table(fleet: FleetDocument, chosen: Iterable[SeedGroup] = ()) -> Table:
    """The results of a run as a table for the terminal: the teacher, then its students, seeds grouped.

    Args:
        chosen: of its families of tau_max, the students that the validation rows choose; below the others.
    """
    from rich.text import Text

    teacher, shown = fleet.teacher, metric_format(fleet.metric, fleet.metric_name)
    groups, agrees, more = group_students(fleet.students, fleet.metric), agreeing(fleet), beside(fleet)
    lost = [f"{one.name} {one.state}: {one.reason or 'no reason recorded'}" for one in unfinished(fleet.students)]
    spread = _SPREAD if has_spread(groups) else ""
    caption = Text("\n").join([*(Text(line, style="red") for line in lost), *map(Text, left_out(fleet))])
    table = house_table(f"{Path(fleet.run).name}: test results{spread}", caption if caption.plain else None)
    table.add_column("student", overflow="fold")
    table.add_column("para-\nmeters", justify="right", no_wrap=True)
    table.add_column("of\nteacher", justify="right", no_wrap=True)
    table.add_column("objective", no_wrap=True)
    headings = [f"test\n{shown.with_unit(shown.short)}", *(one.with_unit(one.short) for _, one in more)]
    for heading in (*headings, *["agree-\nment %"] * agrees, "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    _add_teachers(table, fleet, shown, more, agrees=agrees)
    previous = None
    models = list(dict.fromkeys(group.model for group in groups))
    rows = sorted([*groups, *chosen], key=lambda group: models.index(group.model))
    for group in rows:
        if group.model != previous:
            table.add_section()
        table.add_row(
            Text(group_label(group, rows)),
            f"{group.parameters:,}",
            share(group.parameters, teacher.parameters),
            Text(group.objective_label),
            plus_minus(shown, group.score),
            *(one.text(group.mean_of(name)) for name, one in more),
            *[percent(group.agreement)] * agrees,
            seconds(group.seconds),
        )
        previous = group.model
    return table


def _add_teachers(
    table: Table, fleet: FleetDocument, shown: MetricFormat, more: list[tuple[str, MetricFormat]], *, agrees: bool
) -> None:
    """Rows for the teacher, the members of an ensemble, and the assistants.

    Args:
        more: further metrics that have a column.
        agrees: whether there is a column for agreement with the teacher.
    """
    from rich.text import Text

    teacher = fleet.teacher
    best, whole = shown.text(teacher.metric(fleet.metric)), share(teacher.parameters, teacher.parameters)
    ensemble = f", mean of {len(teacher.members)}" if teacher.members else ""
    counted = f"teacher{ensemble}", thousands(teacher.parameters), whole
    table.add_row(*counted, "", best, *(one.text(teacher.metric(name)) for name, one in more), style="bold")
    for member in teacher.members:
        counts = thousands(member.parameters), share(member.parameters, teacher.parameters)
        table.add_row(Text(f"  {member.share:.0%} of it {member.model}"), *counts)
    for assistant in fleet.assistants:
        table.add_row(
            Text(f"assistant {assistant.model}"),
            thousands(assistant.parameters),
            share(assistant.parameters, teacher.parameters),
            "",
            shown.text(assistant.metric(fleet.metric)),
            *(one.text(assistant.metric(name)) for name, one in more),
            *[percent(assistant.agreement)] * agrees,
        )


def pooled_table(runs: list[Run]) -> Table:
    """The students of several runs for the terminal, seeds of the same student gathered over them."""
    from rich.text import Text

    shown, pools = runs[0].shown, pooled(runs)
    notes, apart = pool_notes(pools), told_apart(pools)
    table = house_table(
        f"{len(runs)} runs together: mean ± 95 % interval over seeds", Text("\n".join(notes)) if notes else None
    )
    table.add_column("student", overflow="fold")
    table.add_column("objective", no_wrap=True)
    for heading in apart:
        table.add_column(heading, overflow="fold")
    for heading in ("runs", "seeds", f"test\n{shown.with_unit(shown.short)}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, pool in enumerate(pools):
        group, told = pool.group, [Text(cells[number]) for cells in apart.values()]
        test = interval(shown, estimate(group.by_seed))
        cells = (str(len(pool.runs)), str(len(group.by_seed)), test)
        table.add_row(Text(group.stem), Text(group.objective_label), *told, *cells)
    return table


def left_out(fleet: FleetDocument) -> list[str]:
    """Which students of the run's folder no table has, and why; a line each."""
    how = "stopped before their end" if fleet.test_withheld else "taken out of the recipe, and still in the run"
    out = [f"{how}: {some_of(fleet.taken_out)}"] if fleet.taken_out else []
    if fleet.test_withheld:
        out.append("trials of a search, which do not read the test rows: tune.json has their validation metrics")
    return out + [f"left out: {one.told}" for one in fleet.refused]


def runs_table(runs: list[Run]) -> Table:
    """Several runs as a table for the terminal, one row each."""
    from rich.text import Text

    shown, best = runs[0].shown, [best_of(run.groups) for run in runs]
    table = house_table(f"{len(runs)} runs" + (_SPREAD if has_spread(filter(None, best)) else ""))
    table.add_column("run", overflow="fold")
    for heading in (f"teacher\n{shown.with_unit(shown.short)}", f"best student\n{shown.with_unit(shown.short)}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    for heading in ("done", "seconds", "passes\nsaved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run, its in zip(names_of(runs), runs, best, strict=True):
        table.add_row(
            Text(name),
            shown.text(run.teacher),
            plus_minus(shown, its.score if its else None),
            Text(f"{its.model}, {its.objective_label}" if its else "-"),
            f"{run.done} of {len(run.fleet.students)}",
            seconds(run.fleet.seconds),
            run.passes_saved,
        )
    return table
