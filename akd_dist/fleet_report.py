"""What a fleet came to: a table for the terminal, and one self-contained HTML page per run.

    akd-dist report runs/digits        writes runs/digits/report.html

Both read what training left behind, `fleet.json` and each student's `metrics.jsonl`, and compute nothing but means and
spreads over seeds. The page opens offline: figures are inline SVG, and its content policy forbids loading anything.
"""

from __future__ import annotations

import functools
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

from akd_dist.comparison import cells, columns, read_comparison, remarks
from akd_dist.storage.errors import DamagedError, RefusedError
from akd_dist.storage.files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

ANNEALING, CONTINUATION, HARD_LABELS = "annealing_kd", "continuation_kd", "hard_labels"
# In the order of a table's rows: what this is about, what came after it, its baselines.
OBJECTIVE_LABELS = {
    ANNEALING: "Annealing-KD",
    CONTINUATION: "Continuation-KD",
    "takd": "TAKD",
    "kd": "KD",
    HARD_LABELS: "hard labels",
}
OBJECTIVE_COLOURS = {
    ANNEALING: "#3b82d6",
    CONTINUATION: "#d14f7c",
    "takd": "#9a62d3",
    "kd": "#1fa187",
    HARD_LABELS: "#e07a2f",
}
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
# One hue per student size, smallest first; mid-tones that read on white and on near-black.
SIZE_COLOURS = ("#d14f7c", "#9a62d3", "#3f8fd0", "#1fa187", "#8aa52b", "#d9902f")
OTHER_COLOUR = "#7d8794"
# Stands for "the colour of the page's text" in what matplotlib draws; the page's style sheet decides what that is.
INK = "#010203"
LEGEND_ENTRIES, LEGEND_LETTERS = 12, 22  # letters of a label that still fit three beside each other

Metrics = list[dict[str, Any]]


# --- how a metric is told ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A metric as a reader meets it: shares of rows in percent, correlations between -1 and 1 as they are."""

    name: str
    """As it stands in a sentence."""
    short: str
    """As it heads a narrow column."""
    percent: bool
    """Whether it is shown in percent."""

    @property
    def title(self) -> str:
        """Its name as a title begins with it."""
        return self.name[0].upper() + self.name[1:]

    @property
    def label(self) -> str:
        """Its name with its unit, for columns and axes."""
        return f"{self.name}, %" if self.percent else self.name

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    def text(self, value: float | None) -> str:
        """0.98333 as `98.33` in percent, else as `0.9833`; a missing number as a dash."""
        if self.percent or value is None or not math.isfinite(value):
            return percent(value)
        return f"{value:.4f}"

    def with_unit(self, text: str) -> str:
        """A text of these numbers with its unit, where it stands alone."""
        return f"{text} %" if self.percent else text

    def plus_minus(self, spread: Spread | None) -> str:
        """`97.41 ± 0.23`; the mean alone for one seed; a dash for none."""
        if spread is None or spread.deviation is None:
            return self.text(spread.mean if spread else None)
        return f"{self.text(spread.mean)} ± {self.text(spread.deviation)}"

    def gain(self, value: float | None) -> str:
        """A difference with its sign, in percentage points or as it is; a dash for none."""
        if value is None:
            return "-"
        return f"{100 * value:+.2f}" if self.percent else f"{value:+.4f}"


SHOWN = {
    "accuracy": Shown("accuracy", "accuracy", percent=True),
    "f1": Shown("F1", "F1", percent=True),
    "matthews": Shown("Matthews' correlation", "Matthews", percent=False),
    "pearson": Shown("Pearson's correlation", "Pearson", percent=False),
    "spearman": Shown("Spearman's correlation", "Spearman", percent=False),
}


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
    metric: str = "accuracy"
    """The run's primary metric."""
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
    def score(self) -> Spread | None:
        """The primary metric on the test rows, over seeds."""
        return Spread.of(student["test"][self.metric] for student in self.done)

    @cached_property
    def agreement(self) -> Spread | None:
        """Share of test rows where student and teacher choose the same class, over seeds, 0 to 1."""
        return Spread.of(student["agreement"] for student in self.done if student["agreement"] is not None)

    @cached_property
    def seconds(self) -> float | None:
        """Mean training time of one student."""
        return statistics.fmean(student["seconds"] for student in self.done) if self.done else None


def group_students(students: Iterable[dict[str, Any]], metric: str = "accuracy") -> list[Group]:
    """Students that differ only in their seed, gathered; smallest model first, Annealing-KD before its baselines.

    Only a name that ends in `-s<seed>` says that nothing but the seed differs; any other student is a group of its own.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for student in students:
        stem = str(student["name"]).removesuffix(f"-s{student['seed']}")
        key = (student["model"], student["objective"], student["tau_max"], stem, metric)
        groups.setdefault(key, Group(*key)).students.append(student)
    order = list(OBJECTIVE_LABELS)
    return sorted(
        groups.values(),
        key=lambda group: (
            group.parameters,
            group.model,
            order.index(group.objective) if group.objective in order else len(order),
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

    teacher, shown = fleet["teacher"], SHOWN[fleet["metric"]]
    groups, agreeing = group_students(fleet["students"], fleet["metric"]), fleet["task"] == "classification"
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
    table.add_column(f"test\n{shown.with_unit(shown.short)}", justify="right", no_wrap=True)
    if agreeing:
        table.add_column("agree-\nment %", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    best = shown.text(teacher["test"][fleet["metric"]])
    table.add_row("teacher", f"{teacher['parameters']:,}", "100 %", "", best, style="bold")
    for assistant in fleet.get("assistants", []):
        table.add_row(
            Text(f"assistant {assistant['model']}"),
            f"{assistant['parameters']:,}",
            share(assistant["parameters"], teacher["parameters"]),
            "",
            shown.text(assistant["test"][fleet["metric"]]),
            *([percent(assistant["agreement"])] if agreeing else []),
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
            shown.plus_minus(group.score),
            *([percent(group.agreement.mean if group.agreement else None)] if agreeing else []),
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
    replace(path, render(fleet, metrics, read_comparison(run_folder)).encode())
    return path


def render(fleet: dict[str, Any], metrics: dict[str, Metrics], comparison: dict[str, Any] | None = None) -> str:
    """The page as text; the same results give the same bytes.

    Args:
        fleet: the document of `fleet.json`.
        metrics: student name -> its epochs, as `read_metrics` gives them.
        comparison: the document of `comparison.json`, where objectives were compared.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, seconds=seconds)
    groups, shown = group_students(fleet["students"], fleet["metric"]), SHOWN[fleet["metric"]]
    return environment.get_template("report.html.j2").render(
        run=run_name(fleet),
        fleet=fleet,
        shown=shown,
        agreeing=fleet["task"] == "classification",
        teacher=fleet["teacher"],
        assistants=fleet.get("assistants", []),
        share=share,
        rows=_table_rows(fleet["teacher"], groups),
        tiles=_tiles(fleet, groups, shown),
        unfinished=unfinished(fleet["students"]),
        comparison=comparison and (columns(comparison), cells(comparison), remarks(comparison)),
        figures=list(_figures(fleet, groups, metrics, shown)),
        objective_labels=OBJECTIVE_LABELS,
        papers={kind: paper for kind, paper in PAPERS.items() if any(group.objective == kind for group in groups)},
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
    """Mean score less that of the same model trained from hard labels; None without exactly one such baseline."""
    baselines = [
        other.score for other in groups if (other.model, other.objective) == (group.model, HARD_LABELS) and other.score
    ]
    if group.objective == HARD_LABELS or group.score is None or len(baselines) != 1:
        return None
    return group.score.mean - baselines[0].mean


def _tiles(fleet: dict[str, Any], groups: list[Group], shown: Shown) -> list[tuple[str, str, str]]:
    """The page's headline figures: (number, what it is, one line more)."""
    teacher, students = fleet["teacher"], fleet["students"]
    finished = [group for group in groups if group.score is not None]
    done = len(students) - len(unfinished(students))
    tiles = [
        (
            shown.with_unit(shown.text(teacher["test"][fleet["metric"]])),
            f"teacher's test {shown.name}",
            f"{teacher['model']}, {teacher['parameters']:,} parameters",
        ),
        (f"{done} of {len(students)}", "students trained", f"{len({group.model for group in groups})} sizes"),
    ]
    if finished:
        best = max(finished, key=lambda group: group.score.mean if group.score else -math.inf)
        number = shown.with_unit(shown.plus_minus(best.score))
        tiles.append((number, "best student", f"{best.model}, {best.objective_label}"))
    gains = [gain for group in groups if (gain := gain_over_hard_labels(group, groups)) is not None]
    if gains:
        ahead = sum(gain > 0 for gain in gains)
        told = f"mean of {len(gains)}, ahead in {ahead}"
        what = "points over hard labels" if shown.percent else f"{shown.short} over hard labels"
        tiles.append((shown.gain(statistics.fmean(gains)), what, told))
    return tiles


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    svg: str


def _figures(
    fleet: dict[str, Any], groups: list[Group], metrics: dict[str, Metrics], shown: Shown
) -> Iterator[Picture]:
    finished, metric = [group for group in groups if group.score is not None], fleet["metric"]
    if finished:
        teacher = fleet["teacher"]["test"][metric]
        yield Picture(
            f"{shown.title} against size",
            f"Test {shown.name} over the number of parameters. Bars: one standard deviation over seeds; dots: single "
            "seeds; dashed: the teacher.",
            _draw(
                lambda axes: _against_size(
                    axes,
                    finished,
                    lambda student: student["test"][metric],
                    f"test {shown.label}",
                    scale=shown.scale,
                    teacher=teacher,
                )
            ),
        )
    if any(group.agreement is not None for group in finished):
        yield Picture(
            "Agreement with the teacher",
            "Share of test rows for which student and teacher choose the same class, over the number of parameters.",
            _draw(
                lambda axes: _against_size(
                    axes, finished, lambda student: student["agreement"], "test agreement, %", scale=100.0
                )
            ),
        )
    schedules = _schedules(groups, metrics)
    if schedules:
        yield Picture(
            "Annealing schedule",
            " ".join(told for kind, told in _SCHEDULES.items() if any(kind == key[0] for key in schedules)),
            _draw(lambda axes: _draw_schedules(axes, schedules)),
        )
    yield from _loss_figures(fleet["task"], groups, metrics)
    validation = _curves(groups, metrics, None, lambda record: (record["validation"] or {}).get(metric))
    if validation:
        yield Picture(
            f"Validation {shown.name}",
            "It picks the best epoch of each stage; the test set is read once, at the end. Dashed: hard labels alone.",
            _draw(lambda axes: _draw_curves(axes, validation, f"validation {shown.label}", shown.scale)),
        )


_SCHEDULES = {
    ANNEALING: "The temperature T falls to 1 in stage I, so the factor Φ on the teacher's logits climbs to exactly 1. "
    "Stage II has hard labels alone.",
    CONTINUATION: "In Continuation-KD's one stage the weight ψ of the labels climbs to 1 as well.",
}


def _loss_figures(task: str, groups: list[Group], metrics: dict[str, Metrics]) -> Iterator[Picture]:
    regression = task == "regression"
    of_labels = "squared error" if regression else "cross-entropy"
    from_teacher = "squared distance to the teacher" if regression else "divergence from the teacher's softened classes"
    figures = {
        "annealing": (
            "Stage I loss",
            "Squared distance between the student's logits and Φ times the teacher's, on training rows. "
            "A step of Φ may raise it.",
        ),
        "continuation": (
            "Continuation-KD loss",
            f"The {of_labels} with weight ψ, and the distance to Φ times the teacher's logits with the rest of it.",
        ),
        "kd": ("KD loss", f"The {of_labels} and the {from_teacher} (TAKD: the assistant), mixed, on training rows."),
        HARD_LABELS: (
            "Hard-label loss",
            f"{of_labels.capitalize()} on training rows: stage II of Annealing-KD, and (dashed) training from hard "
            "labels alone.",
        ),
    }
    for stage, (title, caption) in figures.items():
        curves = _curves(groups, metrics, stage, lambda record: record["train_loss"])
        if curves:
            yield Picture(title, caption, _draw(functools.partial(_draw_losses, curves=curves)))


def _against_size(
    axes: Axes,
    groups: list[Group],
    value: Callable[[dict[str, Any]], float | None],
    label: str,
    *,
    scale: float,
    teacher: float | None = None,
) -> None:
    for objective in dict.fromkeys(group.objective for group in groups):
        line = []
        colour = OBJECTIVE_COLOURS.get(objective, OTHER_COLOUR)
        for group in (group for group in groups if group.objective == objective):
            values = [scale * number for one in group.done if (number := value(one)) is not None]
            axes.plot([group.parameters] * len(values), values, "o", color=colour, alpha=0.35, markersize=3.5, mew=0)
            if spread := Spread.of(values):
                line.append((group, spread))
        if not line:
            continue
        axes.errorbar(
            [group.parameters for group, _ in line],
            [spread.mean for _, spread in line],
            yerr=[spread.deviation or 0.0 for _, spread in line],
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
        axes.axhline(scale * teacher, color=INK, linestyle=(0, (5, 4)), linewidth=1.2, label="teacher")
    sizes = [group.parameters for group in groups]
    if min(sizes) > 0 and max(sizes) > min(sizes):
        axes.set_xscale("log")
        _name_sizes(axes, groups)
    axes.set_xlabel("parameters")
    axes.set_ylabel(label)
    _legend_above(axes)


def _name_sizes(axes: Axes, groups: list[Group]) -> None:
    """Tick the sizes there are, as numbers, unless two lie too close to be read."""
    sizes = sorted({group.parameters for group in groups})
    gaps = [math.log(b / a) for a, b in itertools.pairwise(sizes)]
    if min(gaps) > 0.12 * math.log(sizes[-1] / sizes[0]):
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()


Step = tuple[int, int, float, float | None]
"""An epoch from 1, its temperature, Phi, and psi where there is one."""


def _schedules(groups: list[Group], metrics: dict[str, Metrics]) -> dict[tuple[str, int, int], list[Step]]:
    """(objective, tau_max, annealed epochs) -> these epochs."""
    found: dict[tuple[str, int, int], list[Step]] = {}
    for group in groups:
        if group.tau_max is None:
            continue
        for student in group.students:
            steps = [
                (record["epoch"] + 1, record["temperature"], record["phi"], record.get("psi"))
                for record in metrics.get(student["name"], [])
                if record.get("temperature") is not None
            ]
            if steps and student["state"] == "done":
                found.setdefault((group.objective, group.tau_max, len(steps)), steps)
    return found


def _draw_schedules(axes: Axes, schedules: dict[tuple[str, int, int], list[Step]]) -> None:
    from matplotlib.ticker import MaxNLocator

    factor_axes = axes.twinx()
    factor_axes.grid(False)
    factor_axes.spines["right"].set_visible(True)
    styles: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    kinds = {objective for objective, _, _ in schedules}
    for number, ((objective, tau_max, length), steps) in enumerate(sorted(schedules.items())):
        told = [OBJECTIVE_LABELS.get(objective, objective)] if len(kinds) > 1 else []
        suffix = f" ({', '.join([*told, f'τ {tau_max}', f'{length} epochs'])})" if len(schedules) > 1 else ""
        epochs = [epoch for epoch, _, _, _ in steps]
        lines: list[tuple[Axes, str, str, Sequence[float]]] = [
            (axes, "T", "#d14f7c", [t for _, t, _, _ in steps]),
            (factor_axes, "Φ", "#1fa187", [phi for _, _, phi, _ in steps]),
            (factor_axes, "ψ", "#d9902f", [psi for _, _, _, psi in steps if psi is not None]),
        ]
        for where, name, colour, values in lines:
            if values:
                style = styles[number % len(styles)]
                where.step(
                    epochs, values, where="mid", color=colour, linestyle=style, linewidth=1.8, label=f"{name}{suffix}"
                )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, max(tau_max for _, tau_max, _ in schedules) * 1.08)
    factor_axes.set_ylim(0, 1.08)
    axes.set_xlabel("epoch of stage I" if kinds == {ANNEALING} else "epoch")
    axes.set_ylabel("temperature T")
    factor_axes.set_ylabel("Φ(T) = 1 - (T - 1) / τ" + (", and ψ" if CONTINUATION in kinds else ""))
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


def _draw_curves(axes: Axes, curves: Sequence[Curve], ylabel: str, scale: float = 1.0) -> None:
    """Colour says the size of the student, line style how it was trained."""
    styles = _line_styles(curves)
    for curve in curves:
        style, marker = styles[curve.group.objective_label], "o" if len(curve.epochs) == 1 else None
        low, mean, high = ([scale * value for value in side] for side in (curve.low, curve.mean, curve.high))
        axes.fill_between(curve.epochs, low, high, color=curve.colour, alpha=0.13, linewidth=0)
        axes.plot(curve.epochs, mean, color=curve.colour, linestyle=style, linewidth=1.6, marker=marker)
    for model, colour in {curve.group.model: curve.colour for curve in curves}.items():
        axes.plot([], [], color=colour, label=model)
    for label, style in styles.items() if len(styles) > 1 else ():
        axes.plot([], [], color=INK, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    _whole_epochs(axes)
    _legend_above(axes)


def _line_styles(curves: Sequence[Curve]) -> dict[str, Any]:
    """Objective -> line style: hard labels dashed, the first of the others solid."""
    styles = itertools.cycle(("-", (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (10, 2))))
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
    if handles and len(handles) <= LEGEND_ENTRIES:
        long = max(len(str(handle.get_label())) for handle in handles) > LEGEND_LETTERS
        axes.figure.legend(handles=handles, loc="outside upper left", ncols=2 if long else 3)


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
