"""The page of a run, and writing it; that of several runs is made in `runs_page`.

Each is one HTML file that opens offline: figures are inline SVG, there are no scripts, and its content policy forbids
loading anything. The same results give the same bytes.
"""

import functools
import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from akd_dist.base.errors import AkdError, DamagedError, MachineError, RecipeError, RefusedError
from akd_dist.base.files import replace
from akd_dist.base.formatting import (
    ANNEALING,
    CONTINUATION,
    OBJECTIVE_LABELS,
    MetricFormat,
    amount,
    duration,
    objective_label,
    percent,
    share,
    thousands,
)
from akd_dist.base.places import inside, written
from akd_dist.documents.error import Refusal
from akd_dist.documents.report import ReportDocument, RunsCompared, TauChoice, TauEffect
from akd_dist.reporting import curves, figures
from akd_dist.reporting.comparison import cells, columns, remarks
from akd_dist.reporting.differences import Classes, Numbers
from akd_dist.reporting.drawing import OBJECTIVE_COLOURS, OTHER_COLOUR
from akd_dist.reporting.rendering import owner, template
from akd_dist.reporting.results import Run, read_run
from akd_dist.reporting.runs_page import render_runs
from akd_dist.reporting.seeds import (
    CHOSEN_TAU,
    SAME,
    SeedGroup,
    best_of,
    gain_over_scratch,
    group_label,
    interval,
    pareto_front,
    plus_minus,
    unfinished,
)
from akd_dist.reporting.several import (
    check_comparable,
    differences_of_runs,
    pool_notes,
    pooled,
    same_test_rows,
    warnings_of,
)
from akd_dist.reporting.tables import left_out
from akd_dist.storage.run_copy import is_copy

PAGE = "report.html"
PAPERS = {
    ANNEALING: (
        "Jafari, Rezagholizadeh, Sharma, Ghodsi",
        "Annealing Knowledge Distillation",
        "EACL 2021, arXiv 2104.07163",
    ),
    CONTINUATION: ("Jafari et al.", "Continuation KD", "EMNLP 2022, arXiv 2212.05998"),
    "takd": ("Mirzadeh et al.", "Improved Knowledge Distillation via Teacher Assistant", "AAAI 2020, arXiv 1902.03393"),
    "kd": ("Hinton, Vinyals, Dean", "Distilling the Knowledge in a Neural Network", "2015, arXiv 1503.02531"),
}
"""Authors, title, and where it appeared."""
MATRIX_CLASSES = 20
"""The most classes that a matrix shows; of more, only the most frequent pairs."""
GROUPS_IN_FULL = 24
"""The most groups whose pairs or scatters a page shows, the best ones; all are in the table."""
PAIRS_SHOWN, HEAT_LEVELS = 10, 5
FEW_SEEDS, NAMED = 5, 3


# --- writing ----------------------------------------------------------------------------------------------------------


def write_report(run_folder: Path, out: Path | None = None, tell: Callable[[str], None] | None = None) -> Path:
    """Write a run's page, `report.html` in its folder or `out`, in place of an older one.

    Args:
        tell: told of each file of a student that cannot be read, and that the page does without.

    Returns:
        The page's path.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: its results are not what training wrote.
        MachineError: the page cannot be written.
    """
    run_folder = Path(run_folder)
    path = out or run_folder / PAGE
    run = read_run(run_folder)
    replace(path, render(run).encode())
    if tell is not None:
        for problem in run.problems:
            tell(f"warning: {problem}")
    return path


def write_reports(
    folders: Sequence[Path], out: Path | None = None, *, refused: list[AkdError] | None = None
) -> ReportDocument:
    """Write the page of each run, and of several runs one more that compares them.

    Args:
        out: where that one goes; None takes `report.html` beside the first run's folder. Of a single run, its page.
        refused: takes the refusals of runs that cannot be read, so that the others are reported all the same; without
            it, or if no run can be read, the first is raised.

    Raises:
        RecipeError: a run is named twice.
        RefusedError: a run has no results (yet), or several cannot be compared.
        DamagedError: results are not what training wrote.
        MachineError: a page cannot be written.
    """
    if len(set(map(os.path.realpath, folders))) < max(len(folders), 1):
        raise RecipeError(
            "no run is named" if not folders else "a run is named twice",
            got=", ".join(map(str, folders)),
            expected="folders of runs, each once",
            next="akd-dist report runs/digits",
        )
    runs, failures = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (RefusedError, DamagedError, MachineError) as error:
            failures.append(error)
    if failures and (refused is None or not runs):
        raise failures[0]
    if refused is not None:
        refused += failures
    check_comparable(runs)
    together = (out or folders[0].absolute().parent / PAGE).absolute() if len(runs) > 1 else None
    comparison = None
    if together is not None:
        rows, groups = same_test_rows(runs), differences_of_runs(runs)
        pools = pooled(runs)
        comparison = RunsCompared(
            report=str(together),
            same_test_rows=rows,
            warnings=warnings_of(runs),
            groups=groups,
            pooled=[pool.document() for pool in pools],
            notes=pool_notes(pools),
        )
    documents = []
    for run in runs:
        path = out if out is not None and together is None else run.folder / PAGE
        replace(path, render(run).encode())
        documents.append(run.document(run.place, path.absolute()))
    if together is not None:
        replace(together, render_runs(runs).encode())
    told = [Refusal.model_validate(error.to_json()) for error in failures]
    return ReportDocument(runs=documents, comparison=comparison, refused=told)


# --- a run's page -----------------------------------------------------------------------------------------------------


def render(run: Run) -> str:
    """A run's page as text."""
    fleet, shown, groups = run.fleet, run.shown, run.groups
    effects, choices, differences = run.tau_effects, run.tau_choices, _differences(run)
    text: str = template("report.html.j2").render(
        run=run.name,
        fleet=fleet,
        written=functools.partial(inside if is_copy(run.folder) else written, folder=run.folder),
        shown=shown,
        agreeing=run.agreeing,
        language=run.language,
        beside=run.beside,
        thousands=thousands,
        share=share,
        rows=list(_table_rows(run)),
        tiles=_tiles(run),
        unfinished=unfinished(fleet.students),
        left_out=left_out(fleet),
        comparison=run.comparison and (columns(run.comparison), cells(run.comparison), remarks(run.comparison)),
        size_figures=list(figures.size_figure(run)),
        effects=list(_effect_rows(effects, choices, shown)),
        tau_notes=tau_notes(effects),
        tau_figures=list(figures.tau_figures(effects, shown)),
        curve_figures=[*curves.stage_figures(run), *curves.validation_figure(run)],
        schedules_left=max(0, len(curves.schedules_of(run)) - curves.SCHEDULES_DRAWN),
        schedules_drawn=curves.SCHEDULES_DRAWN,
        differences=differences,
        problems=run.problems,
        economics=[(owner(one), one) for one in fleet.economics],
        totals=list(_totals(run)),
        objective_labels=OBJECTIVE_LABELS,
        objective_label=objective_label,
        papers={kind: paper for kind, paper in PAPERS.items() if any(group.objective == kind for group in groups)},
    )
    return text


def _table_rows(run: Run) -> Iterator[dict[str, Any]]:
    previous, groups, shown, front = None, run.groups, run.shown, pareto_front(run.groups)
    for group in groups:
        gain = gain_over_scratch(group, groups)
        yield {
            "label": group_label(group, groups),
            "group": group,
            "score": plus_minus(shown, group.score),
            "share": share(group.parameters, run.fleet.teacher.parameters),
            "gain": None if gain is None else shown.gain(gain),
            "tone": "" if gain is None or abs(gain) < SAME else "up" if shown.standing(gain) > 0 else "down",
            "front": group in front,
            "colour": OBJECTIVE_COLOURS.get(group.objective, OTHER_COLOUR),
            "first_of_model": group.model != previous,
        }
        previous = group.model


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The page's headline figures: (number, what it is, one line more)."""
    groups, shown, teacher = run.groups, run.shown, run.fleet.teacher
    tiles = [
        (
            "-" if run.teacher is None else shown.with_unit(shown.text(run.teacher)),
            f"teacher's test {shown.name}",
            teacher.model + ("" if teacher.parameters is None else f", {teacher.parameters:,} parameters"),
        ),
        (
            f"{run.done} of {len(run.fleet.students)}",
            "students trained",
            f"{len({group.model for group in groups})} sizes",
        ),
    ]
    best = best_of(groups)
    if best is not None:
        number = shown.with_unit(plus_minus(shown, best.score))
        tiles.append((number, "best student", f"{best.model}, {best.objective_label}"))
    gains = [gain for group in groups if (gain := gain_over_scratch(group, groups)) is not None]
    if gains:
        ahead = sum(shown.standing(gain) > SAME for gain in gains)
        told = f"mean of {len(gains)}, ahead in {ahead}"
        what = "points over from scratch" if shown.percent else f"{shown.short} over from scratch"
        tiles.append((shown.gain(statistics.fmean(gains)), what, told))
    for balance in run.fleet.economics[:1]:
        after = balance.break_even_students
        more = f"{balance.passes_run} run for {balance.epochs:,} epochs"
        more += "" if after is None else f"; paid for after {amount(after)} students"
        tiles.append((f"{balance.passes_saved:,}", "teacher passes saved", more))
    return tiles


# --- the effect of tau_max --------------------------------------------------------------------------------------------


def _effect_rows(effects: list[TauEffect], choices: list[TauChoice], shown: MetricFormat) -> Iterator[dict[str, Any]]:
    """The table's rows; below each family the one whose tau_max is chosen on the validation rows."""
    chosen = {choice.family: choice for choice in choices}
    for family, alike in itertools.groupby(effects, key=lambda effect: effect.family):
        for number, effect in enumerate(alike):
            yield _effect_row(effect, str(effect.tau_max), len(effect.seeds), shown) | {"first": number == 0}
        if (choice := chosen.get(family)) is not None:
            took = Counter(one.tau_max for one in choice.chosen)
            told = ", ".join(f"{tau_max} x {took[tau_max]}" for tau_max in sorted(took))
            yield _effect_row(choice, f"{CHOSEN_TAU}: {told}", len(choice.chosen), shown) | {"first": False}


def _effect_row(effect: TauEffect | TauChoice, tau_max: str, seeds: int, shown: MetricFormat) -> dict[str, Any]:
    return {
        "family": effect.family,
        "tau_max": tau_max,
        "seeds": seeds,
        "test": interval(shown, effect.test),
        "over": [
            interval(shown, one, signed=True) for one in (effect.over_smallest, effect.over_scratch, effect.over_kd)
        ],
    }


def tau_notes(effects: list[TauEffect]) -> list[str]:
    """What numbers of so few seeds or temperatures cannot say."""
    notes = []
    if effects and len({effect.family for effect in effects}) == len(effects):
        notes.append("Every family has one tau_max only: its effect cannot be seen in this run")
    for fewest, told in (
        (0, "Nobody finished of {}"),
        (1, "Too few seeds of {}: with one there is no interval, and a difference may be chance"),
        (FEW_SEEDS - 1, "Few seeds of {}: the intervals are wide, and rest on scores that are normally distributed"),
    ):
        few = [
            f"{effect.family}, τ {effect.tau_max}"
            for effect in effects
            if len(effect.seeds) == fewest or 2 <= len(effect.seeds) <= fewest
        ]
        if few:
            of_some = "; ".join(few) if len(few) <= NAMED else f"{len(few)} of {len(effects)} groups"
            notes.append(told.format("every group" if len(few) == len(effects) else of_some))
    return notes


# --- where student and teacher differ ---------------------------------------------------------------------------------


def _differences(run: Run) -> dict[str, Any]:
    """The section's tables and figures; `older` where students left nothing to compare."""
    found = run.differences
    best = sorted(
        (group for group in run.groups if group.stem in found),
        key=lambda group: -group.standing(group.score.mean) if group.score else math.inf,
    )
    section: dict[str, Any] = {
        "older": not found,
        "left": len(best[GROUPS_IN_FULL:]),
        "in_full": GROUPS_IN_FULL,
        "rows": [_differing(group, run.groups, found[group.stem]) for group in run.groups if group.stem in found],
        "matrices": [],
        "figures": [],
    }
    for group in best[:GROUPS_IN_FULL]:
        match found[group.stem]:
            case Classes() as counted:
                section["matrices"].append(_pairs(group, run.groups, counted))
            case Numbers() as told if group is best[0]:
                section["figures"] += figures.scatter_figure(_name(group, run.groups), told)
    return section


def _name(group: SeedGroup, groups: list[SeedGroup]) -> str:
    return f"{group_label(group, groups)}, {group.objective_label}"


def _differing(group: SeedGroup, groups: list[SeedGroup], found: Classes | Numbers) -> tuple[str, ...]:
    """A group's row: who is right in percent of the rows, or the errors of a regression."""
    if isinstance(found, Classes):
        cells = [percent(count / found.rows) for count in found.cases]
    else:
        errors = (found.student_error, found.teacher_error, found.apart, found.correlation)
        cells = ["-" if number is None else f"{number:.4g}" for number in errors]
    return (group_label(group, groups), group.objective_label, str(found.students), *cells)


def _pairs(group: SeedGroup, groups: list[SeedGroup], counted: Classes) -> dict[str, Any]:
    """The most frequent pairs of different classes, and the whole matrix where it can be read."""
    differing = counted.rows - sum(number for (a, b), number in counted.pairs.items() if a == b)
    matrix = None
    if counted.classes <= MATRIX_CLASSES:
        most = max((number for (a, b), number in counted.pairs.items() if a != b), default=0)
        matrix = [
            [_cell(counted.pairs[theirs, ours], theirs == ours, most) for ours in range(counted.classes)]
            for theirs in range(counted.classes)
        ]
    return {
        "name": _name(group, groups),
        "students": counted.students,
        "differing": differing,
        "rows": counted.rows,
        "pairs": [
            (theirs, ours, number, percent(number / differing, 1)) for theirs, ours, number in counted.top(PAIRS_SHOWN)
        ],
        "matrix": matrix,
    }


def _cell(number: int, same: bool, most: int) -> tuple[str, str]:
    """A cell's text and its shade: `same` on the diagonal, else 0 to HEAT_LEVELS."""
    if same:
        return f"{number:,}", "same"
    level = -(-HEAT_LEVELS * number // most) if most else 0
    return (f"{number:,}" if number else "·"), f"heat{level}"


# --- totals -----------------------------------------------------------------------------------------------------------


def _totals(run: Run) -> Iterator[tuple[str, str]]:
    """What the run took, by name."""
    students = run.fleet.students
    states = {state: sum(one.state == state for one in students) for state in ("done", "diverged", "failed")}
    yield "students", ", ".join(f"{count:,} {state}" for state, count in states.items() if count or state == "done")
    yield "wall-clock time of the command that finished the run", duration(run.fleet.seconds)
    yield "cohorts (Ray Train runs) that it took", f"{run.fleet.cohorts:,}"
    yield "time of the students' own training, together", duration(sum(one.seconds for one in students))
    yield "epochs trained, shared ones once", f"{run.epochs:,}"
    if run.rows_per_second is not None:
        rows = "blocks" if run.language else "rows"
        yield f"{rows} a student trains on in a second of its own time", f"{run.rows_per_second:,.0f}"
    if shared := [one for one in students if one.stage1_from]:
        yield "students that shared another's stage I", f"{len(shared):,}"
