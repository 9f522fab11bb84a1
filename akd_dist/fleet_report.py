"""What a fleet came to: a table for the terminal, and one self-contained HTML page per run.

    akd-dist report runs/digits        writes runs/digits/report.html

Both read what training left behind, `fleet.json` and each student's `metrics.jsonl`, and compute nothing but means and
spreads over seeds. The page opens offline: figures are inline SVG, and its content policy forbids loading anything.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from akd_dist.storage.errors import DamagedError, RefusedError
from akd_dist.storage.files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

ANNEALING, HARD_LABELS = "annealing_kd", "hard_labels"
OBJECTIVE_LABELS = {ANNEALING: "Annealing-KD", HARD_LABELS: "hard labels"}
OBJECTIVE_COLOURS = {ANNEALING: "#3b82d6", HARD_LABELS: "#e07a2f"}
# One hue per student size, smallest first; mid-tones that read on white and on near-black.
SIZE_COLOURS = ("#d14f7c", "#9a62d3", "#3f8fd0", "#1fa187", "#8aa52b", "#d9902f")
OTHER_COLOUR = "#7d8794"
# Stands for "the colour of the page's text" in what matplotlib draws; the page's style sheet decides what that is.
INK = "#010203"
LEGEND_ENTRIES = 12

Metrics = list[dict[str, Any]]


# --- results, seeds grouped -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; a single seed has no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of `values`, or None if there are none."""
        present = list(values)
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None)


@dataclass(frozen=True)
class Group:
    """The students that differ in nothing but their seed: one row of the table, one point of a figure."""

    model: str
    objective: str
    tau_max: int | None
    stem: str
    students: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> list[dict[str, Any]]:
        """Those that finished; only they count in a mean."""
        return [student for student in self.students if student["state"] == "done"]

    @property
    def parameters(self) -> int:
        """Number of weights of one student."""
        return int(self.students[0]["parameters"] or 0)

    @property
    def objective_label(self) -> str:
        """How the students were trained, as a reader says it."""
        label = OBJECTIVE_LABELS.get(self.objective, self.objective)
        return f"{label}, τ {self.tau_max}" if self.tau_max is not None else label

    @cached_property
    def accuracy(self) -> Spread | None:
        """Test accuracy over seeds, 0 to 1."""
        return Spread.of(student["test"]["accuracy"] for student in self.done)

    @cached_property
    def agreement(self) -> Spread | None:
        """Share of test rows where student and teacher choose the same class, over seeds, 0 to 1."""
        return Spread.of(student["agreement"] for student in self.done if student["agreement"] is not None)

    @cached_property
    def seconds(self) -> float | None:
        """Mean training time of one student."""
        return statistics.fmean(student["seconds"] for student in self.done) if self.done else None


def group_students(students: Iterable[dict[str, Any]]) -> list[Group]:
    """Students that differ only in their seed, gathered; smallest model first, Annealing-KD before its baselines.

    Only a name that ends in `-s<seed>` says that nothing but the seed differs; any other student is a group of its own.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for student in students:
        stem = str(student["name"]).removesuffix(f"-s{student['seed']}")
        key = (student["model"], student["objective"], student["tau_max"], stem)
        groups.setdefault(key, Group(*key)).students.append(student)
    order = {ANNEALING: 0, HARD_LABELS: 2}
    return sorted(
        groups.values(),
        key=lambda group: (
            group.parameters,
            group.model,
            order.get(group.objective, 1),
            group.tau_max or 0,
            group.stem,
        ),
    )


def group_label(group: Group, groups: Iterable[Group]) -> str:
    """The model's label, or the students' common name where the label does not tell two groups apart."""
    alike = [
        other
        for other in groups
        if (other.model, other.objective, other.tau_max) == (group.model, group.objective, group.tau_max)
    ]
    return group.model if len(alike) == 1 else group.stem


def run_name(fleet: dict[str, Any]) -> str:
    """The run's name: the last part of its folder."""
    return Path(fleet["run"]).name


def unfinished(students: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The students that did not finish, in the fleet's order."""
    return [student for student in students if student["state"] != "done"]


# --- the terminal's table ---------------------------------------------------------------------------------------------


def fleet_table(fleet: dict[str, Any]) -> Table:
    """The results of a run as a table for the terminal: the teacher, then its students, seeds grouped.

    Args:
        fleet: the document of `fleet.json`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    teacher, groups = fleet["teacher"], group_students(fleet["students"])
    lost = unfinished(fleet["students"])
    table = Table(
        title=f"{run_name(fleet)}: test results, mean ± standard deviation over seeds",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        # Narrow enough for a terminal of eighty columns.
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption=Text("\n".join(_obituary(student) for student in lost), style="red") if lost else None,
        caption_justify="left",
    )
    table.add_column("student", overflow="fold")
    table.add_column("para-\nmeters", justify="right", no_wrap=True)
    table.add_column("of\nteacher", justify="right", no_wrap=True)
    table.add_column("objective", no_wrap=True)
    table.add_column("test\naccuracy %", justify="right", no_wrap=True)
    table.add_column("agree-\nment %", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_row(
        "teacher", f"{teacher['parameters']:,}", "100 %", "", percent(teacher["test"]["accuracy"]), "", "", style="bold"
    )
    previous = None
    for group in groups:
        if group.model != previous:
            table.add_section()
        table.add_row(
            Text(group_label(group, groups)),
            f"{group.parameters:,}",
            share(group.parameters, teacher["parameters"]),
            Text(group.objective_label),
            plus_minus(group.accuracy),
            percent(group.agreement.mean if group.agreement else None),
            seconds(group.seconds),
        )
        previous = group.model
    return table


def _obituary(student: dict[str, Any]) -> str:
    return f"{student['name']} {student['state']}: {student['reason'] or 'no reason recorded'}"


# --- numbers as text --------------------------------------------------------------------------------------------------


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.98333 as `98.33`; a missing number as a dash."""
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f}"


def plus_minus(spread: Spread | None) -> str:
    """`97.41 ± 0.23` in percent; the mean alone for one seed; a dash for none."""
    if spread is None or spread.deviation is None:
        return percent(spread.mean if spread else None)
    return f"{percent(spread.mean)} ± {percent(spread.deviation)}"


def share(parameters: int, of: int) -> str:
    """A student's size as a percentage of its teacher's, to two significant digits below ten."""
    part = 100 * parameters / of if of else math.nan
    if not math.isfinite(part):
        return "-"
    return f"{part:.0f} %" if part >= 10 else f"{part:.2g} %"


def seconds(value: float | None) -> str:
    """Seconds to one decimal below a hundred, whole above; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def points(gain: float | None) -> str:
    """A difference of two accuracies in percentage points, with its sign."""
    return "-" if gain is None else f"{100 * gain:+.2f}"


# --- reading a run ----------------------------------------------------------------------------------------------------


def read_fleet(run_folder: Path) -> dict[str, Any]:
    """The document of `fleet.json`.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: the file is not the JSON document that a run writes.
    """
    from akd_dist.documents import FleetDocument

    path = run_folder / "fleet.json"
    try:
        fleet: dict[str, Any] = json.loads(path.read_bytes())
        FleetDocument.model_validate(fleet)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedError(
            f"there are no results in {run_folder}",
            got="no fleet.json",
            expected="the folder of a run that has ended, for example runs/digits",
            next=f"akd-dist train-students {run_folder / 'recipe.yaml'}",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return fleet


def read_metrics(run_folder: Path, student: str) -> Metrics:
    """A student's epochs in order, one dict each; none if it never finished one.

    A last line without its newline is a writer that died, and is left out. An epoch that was trained again after a
    resume counts once, as it was trained last.

    Raises:
        DamagedError: a line is not a JSON object with an epoch.
    """
    path = run_folder / "students" / student / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            epochs[int(record["epoch"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"line {number}: {line.strip()[:80]}") from error
    return [epochs[epoch] for epoch in sorted(epochs)]


def _damaged(path: Path, got: str) -> DamagedError:
    return DamagedError(
        f"{path} is damaged",
        got=got,
        expected="what train-students wrote",
        next="akd-dist train-students RECIPE --fresh trains the run again",
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder, in place of an older one.

    Returns:
        The page's path.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: its results are not what training wrote.
    """
    run_folder = Path(run_folder)
    fleet = read_fleet(run_folder)
    metrics = {student["name"]: read_metrics(run_folder, student["name"]) for student in fleet["students"]}
    path = run_folder / "report.html"
    replace(path, render(fleet, metrics).encode())
    return path


def render(fleet: dict[str, Any], metrics: dict[str, Metrics]) -> str:
    """The page as text; the same results give the same bytes.

    Args:
        fleet: the document of `fleet.json`.
        metrics: student name -> its epochs, as `read_metrics` gives them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, plus_minus=plus_minus, seconds=seconds, points=points)
    groups = group_students(fleet["students"])
    return environment.get_template("report.html.j2").render(
        run=run_name(fleet),
        fleet=fleet,
        teacher=fleet["teacher"],
        rows=_table_rows(fleet["teacher"], groups),
        tiles=_tiles(fleet, groups),
        unfinished=unfinished(fleet["students"]),
        figures=list(_figures(fleet["teacher"], groups, metrics)),
        objective_labels=OBJECTIVE_LABELS,
    )


def _table_rows(teacher: dict[str, Any], groups: list[Group]) -> Iterator[dict[str, Any]]:
    previous = None
    for group in groups:
        yield {
            "label": group_label(group, groups),
            "group": group,
            "share": share(group.parameters, teacher["parameters"]),
            "gain": gain_over_hard_labels(group, groups),
            "colour": OBJECTIVE_COLOURS.get(group.objective, OTHER_COLOUR),
            "first_of_model": group.model != previous,
        }
        previous = group.model


def gain_over_hard_labels(group: Group, groups: Iterable[Group]) -> float | None:
    """Mean accuracy less that of the same model trained from hard labels; None without exactly one such baseline."""
    baselines = [
        other.accuracy
        for other in groups
        if (other.model, other.objective) == (group.model, HARD_LABELS) and other.accuracy
    ]
    if group.objective == HARD_LABELS or group.accuracy is None or len(baselines) != 1:
        return None
    return group.accuracy.mean - baselines[0].mean


def _tiles(fleet: dict[str, Any], groups: list[Group]) -> list[tuple[str, str, str]]:
    """The page's headline figures: (number, what it is, one line more)."""
    teacher, students = fleet["teacher"], fleet["students"]
    finished = [group for group in groups if group.accuracy is not None]
    done = len(students) - len(unfinished(students))
    tiles = [
        (
            f"{percent(teacher['test']['accuracy'])} %",
            "teacher's test accuracy",
            f"{teacher['model']}, {teacher['parameters']:,} parameters",
        ),
        (f"{done} of {len(students)}", "students trained", f"{len({group.model for group in groups})} sizes"),
    ]
    if finished:
        best = max(finished, key=lambda group: group.accuracy.mean if group.accuracy else 0.0)
        tiles.append((f"{plus_minus(best.accuracy)} %", "best student", f"{best.model}, {best.objective_label}"))
    gains = [gain for group in groups if (gain := gain_over_hard_labels(group, groups)) is not None]
    if gains:
        ahead = sum(gain > 0 for gain in gains)
        told = f"mean of {len(gains)}, ahead in {ahead}"
        tiles.append((points(statistics.fmean(gains)), "points over hard labels", told))
    return tiles


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    svg: str


def _figures(teacher: dict[str, Any], groups: list[Group], metrics: dict[str, Metrics]) -> Iterator[Picture]:
    finished = [group for group in groups if group.accuracy is not None]
    if finished:
        yield Picture(
            "Accuracy against size",
            "Test accuracy over the number of parameters. Bars: one standard deviation over seeds; dots: single seeds; "
            "dashed: the teacher.",
            _draw(lambda axes: _against_size(axes, finished, "accuracy", teacher["test"]["accuracy"])),
        )
    if any(group.agreement is not None for group in finished):
        yield Picture(
            "Agreement with the teacher",
            "Share of test rows for which student and teacher choose the same class, over the number of parameters.",
            _draw(lambda axes: _against_size(axes, finished, "agreement", None)),
        )
    schedules = _schedules(groups, metrics)
    if schedules:
        yield Picture(
            "Annealing schedule",
            "The temperature T falls to 1 in stage I, so the factor Φ on the teacher's logits climbs to exactly 1. "
            "Stage II has hard labels alone.",
            _draw(lambda axes: _draw_schedules(axes, schedules)),
        )
    yield from _loss_figures(groups, metrics)


def _loss_figures(groups: list[Group], metrics: dict[str, Metrics]) -> Iterator[Picture]:
    stage1 = _curves(groups, metrics, "annealing", lambda record: record["train_loss"])
    if stage1:
        yield Picture(
            "Stage I loss",
            "Squared distance between the student's logits and Φ times the teacher's, on training rows. "
            "A step of Φ may raise it.",
            _draw(lambda axes: _draw_losses(axes, stage1)),
        )
    stage2 = _curves(groups, metrics, HARD_LABELS, lambda record: record["train_loss"])
    if stage2:
        yield Picture(
            "Hard-label loss",
            "Cross-entropy on training rows: stage II of Annealing-KD, and (dashed) training from hard labels alone.",
            _draw(lambda axes: _draw_losses(axes, stage2)),
        )
    validation = _curves(
        groups, metrics, None, lambda record: 100 * (record["validation"] or {}).get("accuracy", math.nan)
    )
    if validation:
        yield Picture(
            "Validation accuracy",
            "It picks the best epoch of each stage; the test set is read once, at the end. Dashed: hard labels alone.",
            _draw(lambda axes: _draw_curves(axes, validation, "validation accuracy, %")),
        )


def _against_size(axes: Axes, groups: list[Group], metric: str, teacher: float | None) -> None:
    for objective in dict.fromkeys(group.objective for group in groups):
        line = [
            (group, spread) for group in groups if group.objective == objective and (spread := getattr(group, metric))
        ]
        if not line:
            continue
        colour = OBJECTIVE_COLOURS.get(objective, OTHER_COLOUR)
        for group, _ in line:
            values = [100 * (s["test"]["accuracy"] if metric == "accuracy" else s["agreement"]) for s in group.done]
            axes.plot([group.parameters] * len(values), values, "o", color=colour, alpha=0.35, markersize=3.5, mew=0)
        axes.errorbar(
            [group.parameters for group, _ in line],
            [100 * spread.mean for _, spread in line],
            yerr=[100 * (spread.deviation or 0.0) for _, spread in line],
            color=colour,
            # Several temperatures give several points of one size: a line through them would mean nothing.
            linestyle="-" if len({group.parameters for group, _ in line}) == len(line) else "none",
            marker="s" if objective == HARD_LABELS else "o",
            markersize=6,
            linewidth=1.8,
            capsize=3,
            label=OBJECTIVE_LABELS.get(objective, objective),
        )
    if teacher is not None:
        axes.axhline(100 * teacher, color=INK, linestyle=(0, (5, 4)), linewidth=1.2, label="teacher")
    sizes = [group.parameters for group in groups]
    if min(sizes) > 0 and max(sizes) > min(sizes):
        axes.set_xscale("log")
        _name_sizes(axes, groups)
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"test {metric}, %")
    _legend_above(axes)


def _name_sizes(axes: Axes, groups: list[Group]) -> None:
    """Tick the sizes there are, as numbers, unless two lie too close to be read."""
    sizes = sorted({group.parameters for group in groups})
    gaps = [math.log(b / a) for a, b in itertools.pairwise(sizes)]
    if min(gaps) > 0.12 * math.log(sizes[-1] / sizes[0]):
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()


def _schedules(groups: list[Group], metrics: dict[str, Metrics]) -> dict[tuple[int, int], list[tuple[int, int, float]]]:
    """(tau_max, epochs of stage I) -> (epoch from 1, temperature, Phi) per epoch of stage I."""
    found: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for group in groups:
        if group.tau_max is None:
            continue
        for student in group.students:
            steps = [
                (record["epoch"] + 1, record["temperature"], record["phi"])
                for record in metrics.get(student["name"], [])
                if record.get("temperature") is not None
            ]
            if steps and student["state"] == "done":
                found.setdefault((group.tau_max, len(steps)), steps)
    return found


def _draw_schedules(axes: Axes, schedules: dict[tuple[int, int], list[tuple[int, int, float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    factor_axes = axes.twinx()
    factor_axes.grid(False)
    factor_axes.spines["right"].set_visible(True)
    styles: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    several = len(schedules) > 1
    for number, ((tau_max, length), steps) in enumerate(sorted(schedules.items())):
        epochs = [epoch for epoch, _, _ in steps]
        style, suffix = styles[number % len(styles)], f" (τ {tau_max}, {length} epochs)" if several else ""
        axes.step(
            epochs,
            [t for _, t, _ in steps],
            where="mid",
            color="#d14f7c",
            linestyle=style,
            linewidth=1.8,
            label=f"T{suffix}",
        )
        factor_axes.step(
            epochs,
            [phi for _, _, phi in steps],
            where="mid",
            color="#1fa187",
            linestyle=style,
            linewidth=1.8,
            label=f"Φ{suffix}",
        )
    top = max(tau_max for tau_max, _ in schedules)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, top * 1.08)
    factor_axes.set_ylim(0, 1.08)
    axes.set_xlabel("epoch of stage I")
    axes.set_ylabel("temperature T")
    factor_axes.set_ylabel("Φ(T) = 1 - (T - 1) / τ")
    _whole_epochs(axes)
    _legend_above(axes, factor_axes)


@dataclass(frozen=True)
class Curve:
    """A quantity over epochs, averaged over seeds, with the lowest and highest seed."""

    group: Group
    colour: str
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def _curves(
    groups: list[Group], metrics: dict[str, Metrics], stage: str | None, value: Callable[[dict[str, Any]], float | None]
) -> list[Curve]:
    """One curve per group with epochs in `stage` (None: all stages), over the seeds that finished."""
    colours = dict(zip(dict.fromkeys(group.model for group in groups), itertools.cycle(SIZE_COLOURS), strict=False))
    curves = []
    for group in groups:
        by_epoch: dict[int, list[float]] = {}
        for student in group.done:
            for record in metrics.get(student["name"], []):
                number = value(record)
                if stage in (None, record["stage"]) and number is not None and math.isfinite(number):
                    by_epoch.setdefault(record["epoch"] + 1, []).append(number)
        if by_epoch:
            epochs = sorted(by_epoch)
            columns = [by_epoch[epoch] for epoch in epochs]
            low, mean, high = ([f(column) for column in columns] for f in (min, statistics.fmean, max))
            curves.append(Curve(group, colours[group.model], epochs, mean, low, high))
    return curves


def _draw_curves(axes: Axes, curves: Sequence[Curve], ylabel: str) -> None:
    """Colour says the size of the student, line style how it was trained."""
    styles = _line_styles(curves)
    for curve in curves:
        style, marker = styles[curve.group.objective_label], "o" if len(curve.epochs) == 1 else None
        axes.fill_between(curve.epochs, curve.low, curve.high, color=curve.colour, alpha=0.13, linewidth=0)
        axes.plot(curve.epochs, curve.mean, color=curve.colour, linestyle=style, linewidth=1.6, marker=marker)
    for model, colour in {curve.group.model: curve.colour for curve in curves}.items():
        axes.plot([], [], color=colour, label=model)
    for label, style in styles.items() if len(styles) > 1 else ():
        axes.plot([], [], color=INK, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    _whole_epochs(axes)
    _legend_above(axes)


def _line_styles(curves: Sequence[Curve]) -> dict[str, Any]:
    """Objective -> line style: hard labels dashed, temperatures solid first."""
    styles = itertools.cycle(("-", (0, (1, 1.2)), (0, (6, 2, 1, 2))))
    return {
        label: (0, (4, 2)) if objective == HARD_LABELS else next(styles)
        for label, objective in {curve.group.objective_label: curve.group.objective for curve in curves}.items()
    }


def _draw_losses(axes: Axes, curves: Sequence[Curve]) -> None:
    if all(low > 0 for curve in curves for low in curve.low):
        _logarithmic(axes)
    _draw_curves(axes, curves, "training loss")


def _legend_above(axes: Axes, *others: Axes) -> None:
    """One legend over the figure, where it hides nothing; none at all when it would be larger than the figure."""
    handles = [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
    if len(handles) <= LEGEND_ENTRIES:
        axes.figure.legend(handles=handles, loc="outside upper left", ncols=3)


def _logarithmic(axes: Axes) -> None:
    """A log scale whose ticks are plain numbers: 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 11.5,
    "grid.alpha": 0.14,
    "grid.color": INK,
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "svg.fonttype": "none",
    # Ids are otherwise drawn at random; the same results should give the same page.
    "svg.hashsalt": "akd-dist",
    "text.color": INK,
    # A `$` in a model's name is a dollar sign.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _draw(fill: Callable[[Axes], None]) -> str:
    """An inline `<svg>` of one pair of axes; text stays text, and ink takes the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        fill(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return inline_svg(buffer.getvalue())


def inline_svg(document: str) -> str:
    """The `<svg>` element of a matplotlib document, fit for a page.

    It loses its prologue, metadata, fixed size, repeated ids and fonts: text takes the page's font and ink its colour.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.replace(INK, "currentColor").strip()
