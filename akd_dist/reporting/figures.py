"""The figures of a run's page, each with its numbers as a table."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.formatting import ANNEALING, CONTINUATION, HARD_LABELS, OBJECTIVE_LABELS, MetricFormat
from akd_dist.documents.fleet import EpochRecord
from akd_dist.documents.report import Estimate, TauEffect
from akd_dist.reporting.differences import Numbers
from akd_dist.reporting.drawing import DASHED, DOTTED, INK, Picture, finish, legible, logarithmic, picture
from akd_dist.reporting.results import Run, names_of
from akd_dist.reporting.seeds import SeedGroup, finished, group_label, pareto_front

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
SCHEDULES_DRAWN = 12
"""The most schedules whose curves a page draws: a figure weighs some 50 kB."""


# --- results over size ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Groups that are drawn alike: those of one objective, or of one run."""

    name: str
    colour: str
    groups: list[SeedGroup]
    scratch: bool = False
    """Whether they were trained from hard labels alone."""
    joined: bool = False
    """Whether a line leads from size to size."""


Level = tuple[str | None, float, str, Any]
"""A horizontal line: its name in the legend, if any, its height, its colour and line style."""


def size_figure(run: Run) -> Iterator[Picture]:
    """The primary metric over the number of parameters, one colour an objective."""
    groups = [group for group, _ in finished(run.groups)]
    assistants = [(f"assistant {one.model}", one.test[run.fleet.metric]) for one in run.fleet.assistants]
    levels: list[Level] = [("teacher", run.teacher, INK, DASHED)]
    levels += [(name, height, INK, DOTTED) for name, height in assistants]
    series = []
    for kind in dict.fromkeys(group.objective for group in groups):
        alike = [group for group in groups if group.objective == kind]
        # Several temperatures give several points of one size: a line through them would mean nothing.
        joined = len({group.parameters for group in alike}) == len(alike)
        colour = OBJECTIVE_COLOURS.get(kind, OTHER_COLOUR)
        series.append(Series(OBJECTIVE_LABELS.get(kind, kind), colour, alike, kind == HARD_LABELS, joined))
        if kind == HARD_LABELS and len(alike) == 1:
            levels += [(None, score.mean, colour, DASHED) for _, score in finished(alike)]
    dashed = "teacher" + (" and assistants" if assistants else "")
    dashed += ", students from scratch" if any(one.scratch for one in series) else ""
    told = f"the Pareto front, which no student beats with as few parameters; dashed: {dashed}."
    return _against_size([run], series, levels, told)


def runs_figure(runs: list[Run]) -> Iterator[Picture]:
    """All groups of several runs over the number of parameters, one colour a run, with the front of all together."""
    series: list[Series] = []
    levels: list[Level] = []
    for name, run, colour in zip(names_of(runs), runs, itertools.cycle(SIZE_COLOURS), strict=False):
        levels.append((None, run.teacher, colour, DASHED))
        for label, scratch in ((name, False), (f"{name}, from scratch", True)):
            alike = [group for group, _ in finished(run.groups) if (group.objective == HARD_LABELS) == scratch]
            series += [Series(label, colour, alike, scratch)] if alike else []
    told = "the Pareto front of all runs together; dashed: each run's teacher; squares: from scratch."
    return _against_size(runs, series, levels, told)


def _against_size(runs: list[Run], series: list[Series], levels: list[Level], told: str) -> Iterator[Picture]:
    """Mean scores over the number of parameters, with their front; nothing where nobody finished."""
    shown, several = runs[0].shown, len(runs) > 1
    if not series:
        return
    front = pareto_front(group for one in series for group in one.groups)
    on_front = {id(group) for group in front}  # a copy of a run has equal groups
    yield picture(
        f"{shown.title} against size",
        f"Test {shown.name} over the number of parameters. Bars: one standard deviation over seeds; dots: single "
        f"seeds; grey steps: {told}",
        functools.partial(_draw_sizes, shown=shown, series=series, levels=levels, front=front),
        (*["run"] * several, "student", "parameters", "objective", shown.label, "Pareto front"),
        [
            (
                *[name] * several,
                group_label(group, run.groups),
                f"{group.parameters:,}",
                group.objective_label,
                score.told(shown),
                "yes" if id(group) in on_front else "",
            )
            for name, run in zip(names_of(runs), runs, strict=True)
            for group, score in finished(run.groups)
        ],
    )


def _draw_sizes(
    axes: Axes, shown: MetricFormat, series: list[Series], levels: list[Level], front: list[SeedGroup]
) -> None:
    every = [group for one in series for group in one.groups]
    places = _beside_each_other(every)
    _draw_front(axes, front, shown.scale, max(group.parameters for group in every))
    for one in series:
        for group in one.groups:
            values = [shown.scale * value for value in group.by_seed.values()]
            across = [places[id(group)]] * len(values)
            axes.plot(across, values, "o", color=one.colour, alpha=0.35, markersize=3.5, mew=0)
        points = finished(one.groups)
        axes.errorbar(
            [places[id(group)] for group, _ in points],
            [shown.scale * score.mean for _, score in points],
            yerr=[shown.scale * (score.deviation or 0.0) for _, score in points],
            color=one.colour,
            linestyle=(DASHED if one.scratch else "-") if one.joined else "none",
            marker="s" if one.scratch else "o",
            capsize=3,
            label=legible(one.name),
        )
    for name, height, colour, style in levels:
        axes.axhline(shown.scale * height, color=colour, linestyle=style, linewidth=1.2, label=name)
    sizes = sorted({group.parameters for group in every})
    if sizes[0] > 0 and len(sizes) > 1:
        axes.set_xscale("log")
        # Tick the sizes there are, as numbers, unless two lie too close to be read.
        gaps = [math.log(b / a) for a, b in itertools.pairwise(sizes)]
        if min(gaps) > 0.12 * math.log(sizes[-1] / sizes[0]):
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
    finish(axes, "parameters", f"test {shown.label}")


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
    means = [scale * score.mean for _, score in finished(front)]
    axes.step(
        [*(group.parameters for group in front), right],
        [*means, means[-1]],
        where="post",
        color=OTHER_COLOUR,
        alpha=0.5,
        linewidth=5,
        solid_capstyle="round",
        label="Pareto front",
        zorder=1,
    )


# --- the effect of tau_max --------------------------------------------------------------------------------------------


def tau_figures(effects: list[TauEffect], shown: MetricFormat) -> Iterator[Picture]:
    """The primary metric over tau_max, and its paired differences; nothing where no family has two temperatures."""
    families: dict[str, list[TauEffect]] = {}
    for effect in effects:
        families.setdefault(effect.family, []).append(effect)
    several = {name: family for name, family in families.items() if len(family) > 1}
    kinds: tuple[tuple[Callable[[TauEffect], Estimate | None], str, str, str], ...] = (
        (
            lambda effect: effect.test,
            f"{shown.title} over tau_max",
            f"Mean test {shown.name} over seeds. Bars: 95 % interval (Student's t), where there are two seeds or more.",
            f"test {shown.label}",
        ),
        (
            lambda effect: effect.over_smallest,
            "Difference to the smallest tau_max",
            "Mean over seeds of the difference between students of one seed, so what a seed brings cancels. Bars: 95 % "
            "interval of the paired differences; an interval that leaves out 0 is a difference beyond the seeds.",
            f"difference, {shown.difference}",
        ),
    )
    for value, title, caption, ylabel in kinds:
        if any(value(effect) for family in several.values() for effect in family):
            fill = functools.partial(_draw_taus, families=several, value=value, ylabel=ylabel, scale=shown.scale)
            yield picture(title, caption, fill)


def _draw_taus(
    axes: Axes,
    families: dict[str, list[TauEffect]],
    value: Callable[[TauEffect], Estimate | None],
    ylabel: str,
    scale: float,
) -> None:
    taus = sorted({effect.tau_max for family in families.values() for effect in family})
    gap = min((b - a for a, b in itertools.pairwise(taus)), default=1)
    for number, ((name, family), colour) in enumerate(zip(families.items(), itertools.cycle(SIZE_COLOURS))):
        # Beside each other, or their bars would hide one another.
        shift = gap * 0.05 * (number - (len(families) - 1) / 2) * min(1.0, 6 / len(families))
        known = [(effect.tau_max + shift, found) for effect in family if (found := value(effect)) is not None]
        if value(family[0]) is None:  # what the others are compared with
            axes.plot([family[0].tau_max + shift], [0.0], "o", color=colour, markerfacecolor="none")
            axes.axhline(0.0, color=INK, linewidth=1.0, alpha=0.5)
        axes.errorbar(
            [across for across, _ in known],
            [scale * found.mean for _, found in known],
            yerr=[0.0 if found.high is None else scale * (found.high - found.mean) for _, found in known],
            color=colour,
            marker="o",
            linewidth=1.4,
            capsize=3,
            label=legible(name),
        )
    axes.set_xticks(taus, [str(tau) for tau in taus])
    finish(axes, "tau_max", ylabel)


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


@dataclass(frozen=True)
class Schedule:
    """How students were trained, as far as their curves have it in common."""

    objective: str
    tau_max: int | None
    epochs: int
    """All of them."""
    steps: tuple[tuple[int, float], ...]
    """Temperature and Φ of the annealed epochs, which come first; none where nothing is annealed."""

    @property
    def boundary(self) -> float | None:
        """Where stage II begins, between two epochs; None without one."""
        return len(self.steps) + 0.5 if 0 < len(self.steps) < self.epochs else None

    @property
    def name(self) -> str:
        """As a title has it."""
        tau = "" if self.tau_max is None else f", τ {self.tau_max}"
        length = f"{len(self.steps)} + {self.epochs - len(self.steps)}" if self.boundary else f"{self.epochs}"
        return f"{OBJECTIVE_LABELS.get(self.objective, self.objective)}{tau}, {length} epochs"

    @property
    def told(self) -> str:
        """What a caption says of it."""
        if not self.steps:
            return ""
        (hot, low), (cold, high) = self.steps[0], self.steps[-1]
        told = f" Steps, on the right axis: the temperature T, from {hot} to {cold} in {len(self.steps)} epochs"
        told += f", so that Φ(T) = 1 - (T - 1) / τ climbs from {low:.3g} to {high:.3g}"
        return told + ("; vertical: where stage II begins." if self.boundary else ".")


def schedules_of(run: Run) -> dict[Schedule, list[SeedGroup]]:
    """Every schedule by which students were trained to their end, and the groups that were."""
    found: dict[Schedule, list[SeedGroup]] = {}
    for group in run.groups:
        for student in group.done:
            if records := run.metrics.get(student.name):
                steps = tuple((one.temperature, one.phi or 0.0) for one in records if one.temperature is not None)
                groups = found.setdefault(Schedule(group.objective, group.tau_max, len(records), steps), [])
                groups += [] if group in groups else [group]
    return dict(sorted(found.items(), key=lambda one: (one[0].objective, one[0].tau_max or 0, one[0].epochs)))


def stage_figures(run: Run) -> Iterator[Picture]:
    """The training loss of each schedule, and the validation metric where it is annealed, with the temperature."""
    losses = _losses(run.regression)
    for schedule, groups in itertools.islice(schedules_of(run).items(), SCHEDULES_DRAWN):
        caption = f"{losses.get(schedule.objective, 'On training rows.')} {BAND}{schedule.told}{_shared(groups)}"
        curves = _curves(run, groups, lambda record: record.train_loss)
        fill = functools.partial(_draw_curves, curves=curves, ylabel="training loss", schedule=schedule)
        yield picture(f"Loss: {schedule.name}", caption, fill, *_numbers(curves))
        if schedule.steps:
            yield from _validation(run, groups, schedule)


def validation_figure(run: Run) -> Iterator[Picture]:
    """The validation metric of all students, however they were trained."""
    return _validation(run, run.groups)


def _validation(run: Run, groups: list[SeedGroup], schedule: Schedule | None = None) -> Iterator[Picture]:
    metric, shown = run.fleet.metric, run.shown
    curves = _curves(
        run, groups, lambda record: record.validation.get(metric) if record.validation else None, shown.scale
    )
    told = f"{schedule.told}{_shared(groups)}" if schedule else " Dashed: from scratch."
    if curves:
        yield picture(
            f"Validation {shown.name}" + (f": {schedule.name}" if schedule else ""),
            f"It picks the best epoch of each stage; the test set is read once, at the end. {BAND}{told}",
            functools.partial(_draw_curves, curves=curves, ylabel=f"validation {shown.label}", schedule=schedule),
            *_numbers(curves),
        )


BAND = "Mean over seeds, its band from the lowest to the highest seed."


def _losses(regression: bool) -> dict[str, str]:
    """What the training loss of each objective is."""
    labels = "squared error" if regression else "cross-entropy"
    apart = "squared distance to the {}" if regression else "divergence from the {}'s softened classes"
    mixed = f"The {labels} and the {apart}, mixed, on training rows."
    return {
        ANNEALING: "Squared distance between the student's logits and Φ times the teacher's, on training rows; a step "
        f"of Φ may raise it. In stage II the {labels} alone.",
        CONTINUATION: f"The {labels} with weight ψ, which climbs to 1, and the distance to Φ times the teacher's "
        "logits with the rest of it.",
        "kd": mixed.format("teacher"),
        "takd": mixed.format("assistant"),
        HARD_LABELS: f"{labels.capitalize()} on training rows.",
    }


def _shared(groups: list[SeedGroup]) -> str:
    """Which students went on from another's stage I."""
    followers, done = (sum(map(len, each)) for each in zip(*((one.followers, one.done) for one in groups), strict=True))
    if not followers:
        return ""
    return (
        f" Diamonds at the boundary: {followers} of {done} students shared another student's stage I, which would have "
        "been the same."
    )


def _curves(
    run: Run, groups: list[SeedGroup], value: Callable[[EpochRecord], float | None], scale: float = 1.0
) -> list[Curve]:
    """One curve per group, over the seeds that finished; a model has one colour in every figure of the run."""
    models = dict.fromkeys(group.model for group in run.groups)
    colours = dict(zip(models, itertools.cycle(SIZE_COLOURS), strict=False))
    curves = []
    for group in groups:
        by_epoch: dict[int, list[float]] = {}
        for student in group.done:
            for record in run.metrics.get(student.name, []):
                if (number := value(record)) is not None:
                    by_epoch.setdefault(record.epoch + 1, []).append(scale * number)
        if by_epoch:
            epochs = sorted(by_epoch)
            columns = [by_epoch[epoch] for epoch in epochs]
            low, mean, high = ([f(column) for column in columns] for f in (min, statistics.fmean, max))
            curves.append(Curve(group, colours[group.model], epochs, mean, low, high))
    return curves


def _numbers(curves: Sequence[Curve]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The numbers that a reader looks for in a curve; all epochs are in metrics.jsonl."""
    columns = ("student", "objective", "epochs", "first", "lowest", "highest", "last")
    rows = [
        (
            curve.group.model,
            curve.group.objective_label,
            f"{curve.epochs[0]} to {curve.epochs[-1]}",
            *(f"{one:.4g}" for one in (curve.mean[0], min(curve.mean), max(curve.mean), curve.mean[-1])),
        )
        for curve in curves
    ]
    return columns, rows


def _draw_curves(axes: Axes, curves: Sequence[Curve], ylabel: str, schedule: Schedule | None) -> None:
    """Colour says the size of the student, line style how it was trained."""
    from matplotlib.ticker import MaxNLocator

    others = [_draw_temperature(axes, schedule)] if schedule and schedule.steps else []
    if ylabel == "training loss" and all(low > 0 for curve in curves for low in curve.low):
        logarithmic(axes)
    kinds = {curve.group.objective_label: curve.group.objective for curve in curves}
    solid = itertools.cycle(("-", (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (10, 2))))
    styles: dict[str, Any] = {
        label: DASHED if objective == HARD_LABELS else next(solid) for label, objective in kinds.items()
    }
    for curve in curves:
        style, marker = styles[curve.group.objective_label], "o" if len(curve.epochs) == 1 else None
        axes.fill_between(curve.epochs, curve.low, curve.high, color=curve.colour, alpha=0.13, linewidth=0)
        axes.plot(curve.epochs, curve.mean, color=curve.colour, linestyle=style, linewidth=1.6, marker=marker)
        if schedule and schedule.boundary and curve.group.followers:
            last = [epoch for epoch in curve.epochs if epoch <= schedule.boundary][-1:]
            heights = [curve.mean[curve.epochs.index(epoch)] for epoch in last]
            axes.plot(last, heights, "D", color=curve.colour, markersize=6, markeredgecolor=INK)
    for model, colour in {curve.group.model: curve.colour for curve in curves}.items():
        axes.plot([], [], color=colour, label=legible(model))
    for label, style in styles.items() if len(styles) > 1 else ():
        axes.plot([], [], color=INK, linestyle=style, linewidth=1.2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, "epoch", ylabel, *others)


def _draw_temperature(axes: Axes, schedule: Schedule) -> Axes:
    """The steps of T on an axis of their own, and where stage II begins."""
    from matplotlib.ticker import MaxNLocator

    heat = axes.twinx()
    heat.grid(False)
    heat.spines["right"].set_visible(True)
    steps = [temperature for temperature, _ in schedule.steps]
    # Half an epoch more, or the last step would end in its middle.
    epochs = [*range(1, len(steps) + 1), len(steps) + 0.5]
    heat.step(epochs, [*steps, steps[-1]], where="mid", color=TEMPERATURE_COLOUR, linewidth=1.2, alpha=0.8, label="T")
    heat.set_ylim(0, max(steps) * 1.08)
    heat.yaxis.set_major_locator(MaxNLocator(integer=True))
    heat.set_ylabel("temperature T")
    if schedule.boundary is not None:
        axes.axvline(schedule.boundary, color=INK, linestyle=DOTTED, linewidth=1.1)
    return heat


# --- students against their teacher, as numbers -----------------------------------------------------------------------


def scatter_figure(name: str, found: Numbers) -> Iterator[Picture]:
    """A regression's student against its teacher."""
    across, up = [teacher for _, teacher, _ in found.points], [student for _, _, student in found.points]

    def fill(axes: Axes) -> None:
        axes.plot(across, up, "o", color=SIZE_COLOURS[2], alpha=0.45, markersize=3.5, mew=0)
        ends = [min(across + up), max(across + up)]
        axes.plot(ends, ends, color=INK, linestyle=DASHED, linewidth=1.0)
        finish(axes, "the teacher's number", "the student's number")

    yield picture(f"Student against teacher: {name}", "Each dot is a test row; on the line both say the same.", fill)
