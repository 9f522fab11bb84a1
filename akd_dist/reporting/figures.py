"""The figures of a run's page: inline SVG by matplotlib, each with its numbers as a table.

Text stays text and takes the page's font; ink is the page's own colour, so a figure reads on light and on dark.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.formatting import ANNEALING, CONTINUATION, HARD_LABELS, OBJECTIVE_LABELS, MetricFormat
from akd_dist.reporting.differences import Numbers
from akd_dist.reporting.results import Metrics, Run, SeedGroup, Spread, group_label, names_of, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVE_COLOURS = {
    HARD_LABELS: "#e07a2f",
    "kd": "#1fa187",
    "takd": "#9a62d3",
    ANNEALING: "#3b82d6",
    CONTINUATION: "#d14f7c",
}
# One hue per student size, smallest first; mid-tones that read on white and on near-black.
SIZE_COLOURS = ("#d14f7c", "#9a62d3", "#3f8fd0", "#1fa187", "#8aa52b", "#d9902f")
OTHER_COLOUR = "#7d8794"
TEMPERATURE_COLOUR = "#b0602a"
# Stands for "the colour of the page's text" in what matplotlib draws; the page's style sheet decides what that is.
INK = "#010203"
LEGEND_ENTRIES, LEGEND_LETTERS = 12, 22  # letters of a label that still fit three beside each other
SCHEDULES_DRAWN = 12
"""The most schedules whose curves a page draws: a figure weighs some 50 kB."""
DASHED, DOTTED = (0, (5, 4)), (0, (1, 1.5))


@dataclass(frozen=True)
class Picture:
    """One figure of the page, and the numbers that it shows."""

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def picture(
    title: str, caption: str, fill: Callable[[Axes], None], columns: Sequence[str] = (), rows: Sequence[Any] = ()
) -> Picture:
    """Draw a figure; its title and caption are also what is read where it is not seen."""
    return Picture(title, caption, _draw(fill, f"{title}. {caption}"), tuple(columns), tuple(map(tuple, rows)))


# --- results over size ------------------------------------------------------------------------------------------------


def size_figures(run: Run) -> Iterator[Picture]:
    """The primary metric and the agreement over the number of parameters."""
    shown, metric = run.shown, run.fleet["metric"]
    finished = [group for group in run.groups if group.score is not None]
    if finished:
        front = pareto_front(run.groups)
        lines = reference_lines(run)
        yield picture(
            f"{shown.title} against size",
            f"Test {shown.name} over the number of parameters. Bars: one standard deviation over seeds; dots: single "
            "seeds; grey steps: the Pareto front, which no student beats with as few parameters; dashed: teacher"
            + (" and assistants" if len(lines) > 1 else "")
            + (", students from scratch." if any(one.objective == HARD_LABELS for one in finished) else "."),
            lambda axes: _against_size(
                axes,
                finished,
                lambda student: student["test"][metric],
                f"test {shown.label}",
                scale=shown.scale,
                lines=lines,
                front=front,
            ),
            ("student", "parameters", "objective", shown.label, "Pareto front"),
            [
                (
                    group_label(group, run.groups),
                    f"{group.parameters:,}",
                    group.objective_label,
                    group.score.told(shown) if group.score else "-",
                    "yes" if group in front else "",
                )
                for group in finished
            ],
        )
    agreeing = [group for group in finished if group.agreement is not None]
    if agreeing:
        yield picture(
            "Agreement with the teacher",
            "Share of test rows for which student and teacher choose the same class, over the number of parameters.",
            lambda axes: _against_size(
                axes, agreeing, lambda student: student["agreement"], "test agreement, %", scale=100.0
            ),
            ("student", "parameters", "objective", "agreement, %"),
            [
                (
                    group_label(group, run.groups),
                    f"{group.parameters:,}",
                    group.objective_label,
                    f"{100 * group.agreement.mean:.2f}" if group.agreement else "-",
                )
                for group in agreeing
            ],
        )


def reference_lines(run: Run) -> list[tuple[str, float]]:
    """Teacher and assistants: (name, primary metric on the test rows)."""
    metric = run.fleet["metric"]
    assistants = [(f"assistant {one['model']}", one["test"][metric]) for one in run.fleet.get("assistants", [])]
    return [("teacher", run.fleet["teacher"]["test"][metric]), *assistants]


def _against_size(
    axes: Axes,
    groups: list[SeedGroup],
    value: Callable[[dict[str, Any]], float | None],
    label: str,
    *,
    scale: float,
    lines: Sequence[tuple[str, float]] = (),
    front: Sequence[SeedGroup] = (),
) -> None:
    places = _beside_each_other(groups)
    if front:
        _draw_front(axes, front, scale, max(group.parameters for group in groups))
    for objective in dict.fromkeys(group.objective for group in groups):
        colour = OBJECTIVE_COLOURS.get(objective, OTHER_COLOUR)
        of_kind = [group for group in groups if group.objective == objective]
        found = [(group, [scale * one for one in map(value, group.done) if one is not None]) for group in of_kind]
        for group, values in found:
            across = [places[id(group)]] * len(values)
            axes.plot(across, values, "o", color=colour, alpha=0.35, markersize=3.5, mew=0)
        line = [(group, spread) for group, values in found if (spread := Spread.of(values))]
        if not line:
            continue
        scratch = objective == HARD_LABELS
        sizes = {group.parameters for group, _ in line}
        axes.errorbar(
            [places[id(group)] for group, _ in line],
            [spread.mean for _, spread in line],
            yerr=[spread.deviation or 0.0 for _, spread in line],
            color=colour,
            # Several temperatures give several points of one size: a line through them would mean nothing.
            linestyle=((DASHED if scratch else "-") if len(sizes) == len(line) else "none"),
            marker="s" if scratch else "o",
            markersize=6,
            linewidth=1.8,
            capsize=3,
            label=OBJECTIVE_LABELS.get(objective, objective),
        )
        if scratch and len(line) == 1:
            axes.axhline(line[0][1].mean, color=colour, linestyle=DASHED, linewidth=1.2)
    for number, (name, level) in enumerate(lines):
        style = DOTTED if number else DASHED
        axes.axhline(scale * level, color=INK, linestyle=style, linewidth=1.2, label=name)
    _size_axis(axes, groups)
    axes.set_ylabel(label)
    _legend_above(axes)


def _beside_each_other(groups: Sequence[SeedGroup]) -> dict[int, float]:
    """Where on the axis each group is drawn, by its id(): those of one size a little apart, or their bars would hide
    each other.
    """
    sizes: dict[int, list[SeedGroup]] = {}
    for group in groups:
        sizes.setdefault(group.parameters, []).append(group)
    return {
        id(group): size * (1 + min(0.03, 0.2 / len(alike))) ** (number - (len(alike) - 1) / 2)
        for size, alike in sizes.items()
        for number, group in enumerate(alike)
    }


def _draw_front(axes: Axes, front: Sequence[SeedGroup], scale: float, right: int) -> None:
    """The best that there is with so many parameters or fewer: a step up at each group of the front."""
    sizes = [group.parameters for group in front] + [right]
    means = [scale * group.score.mean for group in front if group.score]
    axes.step(
        sizes,
        [*means, means[-1]],
        where="post",
        color=OTHER_COLOUR,
        alpha=0.5,
        linewidth=5,
        solid_capstyle="round",
        label="Pareto front",
        zorder=1,
    )


def _size_axis(axes: Axes, groups: Sequence[SeedGroup]) -> None:
    sizes = [group.parameters for group in groups]
    if min(sizes) > 0 and max(sizes) > min(sizes):
        axes.set_xscale("log")
        _name_sizes(axes, sorted(set(sizes)))
    axes.set_xlabel("parameters")


def _name_sizes(axes: Axes, sizes: list[int]) -> None:
    """Tick the sizes there are, as numbers, unless two lie too close to be read."""
    gaps = [math.log(b / a) for a, b in itertools.pairwise(sizes)]
    if min(gaps) > 0.12 * math.log(sizes[-1] / sizes[0]):
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()


# --- the effect of tau_max --------------------------------------------------------------------------------------------


def tau_figures(effects: list[dict[str, Any]], shown: MetricFormat) -> Iterator[Picture]:
    """The primary metric over tau_max, and its paired differences; nothing where no family has two temperatures."""
    families: dict[str, list[dict[str, Any]]] = {}
    for effect in effects:
        families.setdefault(effect["family"], []).append(effect)
    several = {name: family for name, family in families.items() if len(family) > 1}
    for key, title, caption, ylabel in (
        (
            "test",
            f"{shown.title} over tau_max",
            f"Mean test {shown.name} over seeds. Bars: 95 % interval (Student's t), where there are two seeds or more.",
            f"test {shown.label}",
        ),
        (
            "over_smallest",
            "Difference to the smallest tau_max",
            "Mean over seeds of the difference between students of one seed, so what a seed brings cancels. Bars: 95 % "
            "interval of the paired differences; an interval that leaves out 0 is a difference beyond the seeds.",
            f"difference, {shown.difference}",
        ),
    ):
        if any(effect[key] is not None for family in several.values() for effect in family):
            yield picture(
                title,
                caption,
                functools.partial(_draw_taus, families=several, key=key, label=ylabel, scale=shown.scale),
            )


def _draw_taus(axes: Axes, families: dict[str, list[dict[str, Any]]], key: str, label: str, scale: float) -> None:
    colours = itertools.cycle(SIZE_COLOURS)
    taus = sorted({effect["tau_max"] for family in families.values() for effect in family})
    gap = min(b - a for a, b in itertools.pairwise(taus)) if len(taus) > 1 else 1
    for number, (name, family) in enumerate(families.items()):
        # Beside each other, or their bars would hide one another.
        shift = gap * 0.05 * (number - (len(families) - 1) / 2) * min(1.0, 6 / len(families))
        known = [effect for effect in family if effect[key] is not None]
        colour = next(colours)
        means = [scale * effect[key]["mean"] for effect in known]
        if key == "over_smallest":
            axes.plot([family[0]["tau_max"] + shift], [0.0], "o", color=colour, markerfacecolor="none")
        halves = [
            scale * (effect[key]["high"] - effect[key]["mean"]) if effect[key]["high"] is not None else 0.0
            for effect in known
        ]
        axes.errorbar(
            [effect["tau_max"] + shift for effect in known],
            means,
            yerr=halves,
            color=colour,
            marker="o",
            linewidth=1.4,
            capsize=3,
            label=_legible(name),
        )
    if key == "over_smallest":
        axes.axhline(0.0, color=INK, linewidth=1.0, alpha=0.5)
    axes.set_xticks(taus, [str(tau) for tau in taus])
    axes.set_xlabel("tau_max")
    axes.set_ylabel(label)
    _legend_above(axes)


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A quantity over epochs, averaged over seeds, with the lowest and highest seed."""

    group: SeedGroup
    colour: str
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


Step = tuple[int, int, float, float | None]
"""An epoch from 1, its temperature, Phi, and psi where there is one."""


@dataclass(frozen=True)
class Schedule:
    """How students are annealed: what their curves have in common."""

    objective: str
    tau_max: int
    epochs: int
    """All of them."""
    steps: tuple[Step, ...]
    """The annealed ones."""

    @property
    def boundary(self) -> float | None:
        """Where stage II begins, between two epochs; None without one."""
        return len(self.steps) + 0.5 if self.epochs > len(self.steps) else None

    @property
    def name(self) -> str:
        """As a title has it."""
        rest = self.epochs - len(self.steps)
        length = f"{len(self.steps)} + {rest}" if rest else f"{len(self.steps)}"
        return f"{OBJECTIVE_LABELS.get(self.objective, self.objective)}, τ {self.tau_max}, {length} epochs"


def schedules_of(run: Run) -> dict[Schedule, list[SeedGroup]]:
    """Every schedule by which students were annealed to their end, and the groups that were."""
    found: dict[Schedule, list[SeedGroup]] = {}
    for group in run.groups:
        if group.tau_max is None:
            continue
        for student in group.done:
            records = run.metrics.get(student["name"], [])
            steps = tuple(
                (record["epoch"] + 1, record["temperature"], record["phi"], record.get("psi"))
                for record in records
                if record.get("temperature") is not None
            )
            if steps:
                groups = found.setdefault(Schedule(group.objective, group.tau_max, len(records), steps), [])
                groups += [] if group in groups else [group]
    return found


def stage_figures(run: Run) -> Iterator[Picture]:
    """For each schedule, training loss and validation metric over all epochs, with the temperature."""
    metric, shown = run.fleet["metric"], run.shown
    kinds: tuple[tuple[str, str, float, Callable[[dict[str, Any]], float | None]], ...] = (
        ("training loss", "Loss", 1.0, lambda record: record["train_loss"]),
        (
            f"validation {shown.label}",
            f"Validation {shown.name}",
            shown.scale,
            lambda record: (record["validation"] or {}).get(metric),
        ),
    )
    for schedule, groups in sorted(
        schedules_of(run).items(), key=lambda found: (found[0].objective, found[0].tau_max, found[0].epochs)
    )[:SCHEDULES_DRAWN]:
        for ylabel, title, scale, value in kinds:
            curves = _curves(groups, run.metrics, None, value, run.groups)
            if curves:
                yield picture(
                    f"{title}: {schedule.name}",
                    "Mean over seeds, its band from the lowest to the highest seed; steps: the temperature T, on the "
                    "right axis" + ("; vertical: where stage II begins." if schedule.boundary else ".") + _told(groups),
                    functools.partial(
                        _draw_stages, curves=curves, schedule=schedule, ylabel=ylabel, scale=scale, title=title
                    ),
                    *_curve_table(curves, scale),
                )


def _told(groups: list[SeedGroup]) -> str:
    """Which students went on from another's stage I."""
    riders = [student for group in groups for student in group.riders if student["state"] == "done"]
    if not riders:
        return ""
    return (
        f" Diamonds at the boundary: {len(riders)} of {sum(len(group.done) for group in groups)} students shared "
        "another student's stage I, which would have been the same."
    )


def _draw_stages(
    axes: Axes, curves: Sequence[Curve], schedule: Schedule, ylabel: str, scale: float, title: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    heat = axes.twinx()
    heat.grid(False)
    heat.spines["right"].set_visible(True)
    epochs, heights = [float(step[0]) for step in schedule.steps], [float(step[1]) for step in schedule.steps]
    heat.step([*epochs, epochs[-1] + 0.5], [*heights, heights[-1]], where="mid", color=TEMPERATURE_COLOUR,
              linewidth=1.2, alpha=0.8, label="T")  # fmt: skip
    heat.set_ylim(0, schedule.tau_max * 1.08)
    heat.yaxis.set_major_locator(MaxNLocator(integer=True))
    heat.set_ylabel("temperature T")
    if title == "Loss" and all(low > 0 for curve in curves for low in curve.low):
        _logarithmic(axes)
    if schedule.boundary is not None:
        axes.axvline(schedule.boundary, color=INK, linestyle=DOTTED, linewidth=1.1)
        for curve in curves:
            ends = [number for number, epoch in enumerate(curve.epochs) if epoch <= schedule.boundary]
            if ends and any(student["state"] == "done" for student in curve.group.riders):
                axes.plot([curve.epochs[ends[-1]]], [scale * curve.mean[ends[-1]]], "D", color=curve.colour,
                          markersize=6, markeredgecolor=INK)  # fmt: skip
    _draw_curves(axes, curves, ylabel, scale, heat)


def _curve_table(curves: Sequence[Curve], scale: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The numbers that a reader looks for in a curve; all epochs are in metrics.jsonl."""
    columns = ("student", "objective", "epochs", "first", "lowest", "highest", "last")
    rows = [
        (
            curve.group.model,
            curve.group.objective_label,
            f"{curve.epochs[0]} to {curve.epochs[-1]}",
            *(f"{scale * one:.4g}" for one in (curve.mean[0], min(curve.mean), max(curve.mean), curve.mean[-1])),
        )
        for curve in curves
    ]
    return columns, rows


def schedule_figure(run: Run) -> Iterator[Picture]:
    """Temperatures and factors of all schedules in one figure."""
    schedules = list(schedules_of(run))
    told = [text for kind, text in _SCHEDULES.items() if any(kind == one.objective for one in schedules)]
    if schedules:
        yield picture(
            "Annealing schedule",
            " ".join(told),
            lambda axes: _draw_schedules(axes, schedules),
            ("objective", "τ", "annealed epochs", "T", "Φ"),
            [
                (
                    OBJECTIVE_LABELS.get(one.objective, one.objective),
                    str(one.tau_max),
                    str(len(one.steps)),
                    f"{one.steps[0][1]} to {one.steps[-1][1]}",
                    f"{one.steps[0][2]:.3g} to {one.steps[-1][2]:.3g}",
                )
                for one in schedules
            ],
        )


_SCHEDULES = {
    ANNEALING: "The temperature T falls to 1 in stage I, so the factor Φ on the teacher's logits climbs to exactly 1. "
    "Stage II has hard labels alone.",
    CONTINUATION: "In Continuation-KD's one stage the weight ψ of the labels climbs to 1 as well.",
}


def _draw_schedules(axes: Axes, schedules: list[Schedule]) -> None:
    from matplotlib.ticker import MaxNLocator

    factor_axes = axes.twinx()
    factor_axes.grid(False)
    factor_axes.spines["right"].set_visible(True)
    styles: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    kinds = {schedule.objective for schedule in schedules}
    ordered = sorted({(one.objective, one.tau_max, len(one.steps)): one for one in schedules}.items())
    for number, ((objective, tau_max, length), schedule) in enumerate(ordered):
        told = [OBJECTIVE_LABELS.get(objective, objective)] if len(kinds) > 1 else []
        suffix = f" ({', '.join([*told, f'τ {tau_max}', f'{length} epochs'])})" if len(ordered) > 1 else ""
        epochs = [epoch for epoch, _, _, _ in schedule.steps]
        lines: list[tuple[Axes, str, str, Sequence[float]]] = [
            (axes, "T", "#d14f7c", [t for _, t, _, _ in schedule.steps]),
            (factor_axes, "Φ", "#1fa187", [phi for _, _, phi, _ in schedule.steps]),
            (factor_axes, "ψ", "#d9902f", [psi for _, _, _, psi in schedule.steps if psi is not None]),
        ]
        for where, name, colour, values in lines:
            if values:
                style = styles[number % len(styles)]
                where.step(
                    epochs, values, where="mid", color=colour, linestyle=style, linewidth=1.8, label=f"{name}{suffix}"
                )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, max(schedule.tau_max for schedule in schedules) * 1.08)
    factor_axes.set_ylim(0, 1.08)
    axes.set_xlabel("epoch of stage I" if kinds == {ANNEALING} else "epoch")
    axes.set_ylabel("temperature T")
    factor_axes.set_ylabel("Φ(T) = 1 - (T - 1) / τ" + (", and ψ" if CONTINUATION in kinds else ""))
    _whole_epochs(axes)
    _legend_above(axes, factor_axes)


def curve_figures(run: Run) -> Iterator[Picture]:
    """Training losses by kind of stage, and the validation metric, of all students."""
    metric, shown = run.fleet["metric"], run.shown
    for stage, (title, caption) in _loss_captions(run.regression).items():
        curves = _curves(run.groups, run.metrics, stage, lambda record: record["train_loss"])
        if curves:
            fill = functools.partial(_draw_losses, curves=curves)
            yield picture(title, caption, fill, *_curve_table(curves, 1.0))
    validation = _curves(run.groups, run.metrics, None, lambda record: (record["validation"] or {}).get(metric))
    if validation:
        yield picture(
            f"Validation {shown.name}",
            "It picks the best epoch of each stage; the test set is read once, at the end. Dashed: from scratch.",
            lambda axes: _draw_curves(axes, validation, f"validation {shown.label}", shown.scale),
            *_curve_table(validation, shown.scale),
        )


def _loss_captions(regression: bool) -> dict[str, tuple[str, str]]:
    of_labels = "squared error" if regression else "cross-entropy"
    from_teacher = "squared distance to the teacher" if regression else "divergence from the teacher's softened classes"
    return {
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
            f"{of_labels.capitalize()} on training rows: stage II of Annealing-KD, and (dashed) training from scratch.",
        ),
    }


def _curves(
    groups: list[SeedGroup],
    metrics: dict[str, Metrics],
    stage: str | None,
    value: Callable[[dict[str, Any]], float | None],
    among: list[SeedGroup] | None = None,
) -> list[Curve]:
    """One curve per group with epochs in `stage` (None: all stages), over the seeds that finished.

    Args:
        among: all groups of the run, so that a model has one colour in every figure; None takes `groups`.
    """
    models = dict.fromkeys(group.model for group in among or groups)
    colours = dict(zip(models, itertools.cycle(SIZE_COLOURS), strict=False))
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


def _draw_curves(axes: Axes, curves: Sequence[Curve], ylabel: str, scale: float = 1.0, *others: Axes) -> None:
    """Colour says the size of the student, line style how it was trained."""
    styles = _line_styles(curves)
    for curve in curves:
        style, marker = styles[curve.group.objective_label], "o" if len(curve.epochs) == 1 else None
        low, mean, high = ([scale * value for value in side] for side in (curve.low, curve.mean, curve.high))
        axes.fill_between(curve.epochs, low, high, color=curve.colour, alpha=0.13, linewidth=0)
        axes.plot(curve.epochs, mean, color=curve.colour, linestyle=style, linewidth=1.6, marker=marker)
    for model, colour in {curve.group.model: curve.colour for curve in curves}.items():
        axes.plot([], [], color=colour, label=_legible(model))
    for label, style in styles.items() if len(styles) > 1 else ():
        axes.plot([], [], color=INK, linestyle=style, linewidth=1.2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    _whole_epochs(axes)
    _legend_above(axes, *others)


def _line_styles(curves: Sequence[Curve]) -> dict[str, Any]:
    """Objective -> line style: from scratch dashed, the first of the others solid."""
    styles = itertools.cycle(("-", (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (10, 2))))
    return {
        label: (0, (4, 2)) if objective == HARD_LABELS else next(styles)
        for label, objective in {curve.group.objective_label: curve.group.objective for curve in curves}.items()
    }


def _draw_losses(axes: Axes, curves: Sequence[Curve]) -> None:
    if all(low > 0 for curve in curves for low in curve.low):
        _logarithmic(axes)
    _draw_curves(axes, curves, "training loss")


# --- students against their teacher, as numbers -----------------------------------------------------------------------


def scatter_figures(name: str, found: Numbers) -> Iterator[Picture]:
    """A regression's student against its teacher, and the errors of both."""
    label, teacher, student = (list(column) for column in zip(*found.points, strict=True))
    ours, theirs = ([a - b for a, b in zip(side, label, strict=True)] for side in (student, teacher))
    for title, caption, pair, axes_names in (
        (
            f"Student against teacher: {name}",
            "Each dot is a test row; on the line both say the same.",
            (teacher, student),
            ("the teacher's number", "the student's number"),
        ),
        (
            f"Errors of both: {name}",
            "Number less label, of each test row; on the line both err alike.",
            (theirs, ours),
            ("the teacher's error", "the student's error"),
        ),
    ):
        yield picture(title, caption, functools.partial(_draw_scatter, pair=pair, names=axes_names))


def _draw_scatter(axes: Axes, pair: tuple[list[float], list[float]], names: tuple[str, str]) -> None:
    across, up = pair
    axes.plot(across, up, "o", color=SIZE_COLOURS[2], alpha=0.45, markersize=3.5, mew=0)
    low, high = min(across + up), max(across + up)
    axes.plot([low, high], [low, high], color=INK, linestyle=DASHED, linewidth=1.0)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


# --- several runs -----------------------------------------------------------------------------------------------------


def runs_figure(runs: list[Run]) -> Iterator[Picture]:
    """All groups of several runs over the number of parameters, one colour a run, with the front of all together."""
    shown, metric = runs[0].shown, runs[0].fleet["metric"]
    finished = [[group for group in run.groups if group.score] for run in runs]
    every = [group for groups in finished for group in groups]
    if not every:
        return
    front = pareto_front(every)
    names = names_of(runs)

    def fill(axes: Axes) -> None:
        _draw_front(axes, front, shown.scale, max(group.parameters for group in every))
        colours, places = itertools.cycle(SIZE_COLOURS), _beside_each_other(every)
        for name, groups, run in zip(names, finished, runs, strict=True):
            colour, level = next(colours), shown.scale * run.fleet["teacher"]["test"][metric]
            _draw_run(axes, name, groups, shown.scale, colour, places)
            axes.axhline(level, color=colour, linestyle=DASHED, linewidth=1.2)
        _size_axis(axes, every)
        axes.set_ylabel(f"test {shown.label}")
        _legend_above(axes)

    yield picture(
        f"{shown.title} against size",
        f"Test {shown.name} of every group of students; bars: one standard deviation over seeds; grey steps: the "
        "Pareto front of all runs together; dashed: each run's teacher; squares: from scratch.",
        fill,
        ("run", "student", "parameters", "objective", shown.label, "Pareto front"),
        [
            (
                name,
                group_label(group, groups),
                f"{group.parameters:,}",
                group.objective_label,
                group.score.told(shown) if group.score else "-",
                "yes" if any(group is one for one in front) else "",
            )
            for name, groups in zip(names, finished, strict=True)
            for group in groups
        ],
    )


def _draw_run(
    axes: Axes, name: str, groups: list[SeedGroup], scale: float, colour: str, places: dict[int, float]
) -> None:
    for kind, marker in ((name, "o"), (f"{name}, from scratch", "s")):
        found = [group for group in groups if (group.objective == HARD_LABELS) == (kind != name)]
        if found:
            axes.errorbar(
                [places[id(group)] for group in found],
                [scale * group.score.mean for group in found if group.score],
                yerr=[scale * (group.score.deviation or 0.0) for group in found if group.score],
                color=colour,
                linestyle="none",
                marker=marker,
                capsize=3,
                label=_legible(kind),
            )


# --- how all of them are drawn ----------------------------------------------------------------------------------------


def _legend_above(axes: Axes, *others: Axes) -> None:
    """One legend over the figure, where it hides nothing; none at all when it would be larger than the figure."""
    handles = [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
    if handles and len(handles) <= LEGEND_ENTRIES:
        long = max(len(str(handle.get_label())) for handle in handles) > LEGEND_LETTERS
        axes.figure.legend(handles=handles, loc="outside upper left", ncols=2 if long else 3)


def _legible(name: str) -> str:
    """A name as a legend takes it: what begins with an underscore would be left out of it."""
    return f"\u200b{name}" if name.startswith("_") else name


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


def _draw(fill: Callable[[Axes], None], label: str) -> str:
    """An inline `<svg>` of one pair of axes; text stays text, and ink takes the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        fill(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return inline_svg(buffer.getvalue(), label)


def inline_svg(document: str, label: str) -> str:
    """The `<svg>` element of a matplotlib document, fit for a page.

    It loses its prologue, metadata, fixed size, repeated ids and fonts: text takes the page's font and ink its colour.

    Args:
        label: what is read out in its place.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    told = f'<svg role="img" aria-label="{html.escape(label)}"'
    return svg.replace("<svg", told, 1).replace(INK, "currentColor").strip()
