"""The page that compares several runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from akd_dist.base.formatting import MetricFormat, duration
from akd_dist.documents.report import RunDifference
from akd_dist.reporting import figures
from akd_dist.reporting.rendering import owner, template
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import best_of, estimate, interval, plus_minus, unfinished
from akd_dist.reporting.several import Pool, differences_of_runs, names_of, pool_notes, pooled, told_apart, warnings_of


def render_runs(runs: list[Run]) -> str:
    """The page that compares runs, as text."""
    shown, names = runs[0].shown, names_of(runs)
    compared = differences_of_runs(runs)
    stems = list(dict.fromkeys(difference.name for difference in compared))
    by_run = {(difference.run, difference.name): difference for difference in compared}
    shared = [stem for stem in stems if sum((run.place, stem) in by_run for run in runs) > 1]
    pools = pooled(runs)
    apart = told_apart(pools)
    text: str = template("runs.html.j2").render(
        names=names,
        shown=shown,
        rows=list(map(_run_row, names, runs)),
        warnings=warnings_of(runs),
        figures=list(figures.runs_figure(runs)),
        group_columns=[
            "students",
            f"{names[0]}, {shown.label}",
            *itertools.chain.from_iterable((f"{name}, {shown.label}", f"less {names[0]}") for name in names[1:]),
        ],
        groups=[
            [
                stem,
                *itertools.chain.from_iterable(
                    _side(by_run.get((run.place, stem)), shown, run is runs[0]) for run in runs
                ),
            ]
            for stem in shared
        ],
        alone=len(stems) - len(shared),
        pool_columns=["students", "trained by", *apart, "runs", "seeds", shown.label],
        pool_texts=2 + len(apart),
        pools=[
            _pool_row(pool, shown, [cells[number] for cells in apart.values()]) for number, pool in enumerate(pools)
        ],
        pool_notes=pool_notes(pools),
        economics=[
            (f"{name}: {owner(one)}", one) for name, run in zip(names, runs, strict=True) for one in run.fleet.economics
        ],
    )
    return text


def _run_row(name: str, run: Run) -> dict[str, Any]:
    best, shown = best_of(run.groups), run.shown
    return {
        "name": name,
        "teacher": shown.text(run.teacher),
        "model": run.fleet.teacher.model,
        "best": plus_minus(shown, best.score if best else None),
        "which": f"{best.model}, {best.objective_label}" if best else "-",
        "done": f"{run.done} of {len(run.fleet.students)}",
        "seconds": duration(run.fleet.seconds),
        "rate": "-" if run.rows_per_second is None else f"{run.rows_per_second:,.0f}",
        "saved": run.passes_saved,
        "lost": [(one.name, one.state, one.reason) for one in unfinished(run.fleet.students)],
    }


def _pool_row(pool: Pool, shown: MetricFormat, apart: list[str]) -> list[str]:
    group = pool.group
    test = interval(shown, estimate(group.by_seed))
    return [group.stem, group.objective_label, *apart, str(len(pool.runs)), str(len(group.by_seed)), test]


def _side(difference: RunDifference | None, shown: MetricFormat, first: bool) -> Iterable[str]:
    """A run's cells for a group; the first run has no difference to itself."""
    test, over = (difference.test, difference.over_first) if difference else (None, None)
    told = interval(shown, test)
    return (told,) if first else (told, interval(shown, over, signed=True))
