"""The figures of a run's page, each with its numbers as a table."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.formatting import HARD_LABELS, OBJECTIVE_LABELS, MetricFormat
from akd_dist.documents.report import Estimate, TauEffect
from akd_dist.reporting.differences import Numbers
from akd_dist.reporting.drawing import (
    DASHED,
    DOTTED,
    INK,
    OBJECTIVE_COLOURS,
    OTHER_COLOUR,
    SIZE_COLOURS,
    Picture,
    finish,
    legible,
    picture,
)
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import SeedGroup, finished, group_label, pareto_front
from akd_dist.reporting.several import names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    assistants = [(f"assistant {one.model}", one.metric(run.fleet.metric)) for one in run.fleet.assistants]
    levels: list[Level] = [] if run.teacher is None else [("teacher", run.teacher, INK, DASHED)]
    levels += [(name, height, INK, DOTTED) for name, height in assistants if height is not None]
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
        levels += [] if run.teacher is None else [(None, run.teacher, colour, DASHED)]
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
        f"Test {shown.name} over the number of parameters{shown.aside}. Bars: one standard deviation over seeds; dots: "
        f"single seeds; grey steps: {told}",
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
    """The best that there is with so many parameters or fewer: a step at each group of the front."""
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
            f"Mean test {shown.name} over seeds{shown.aside}. Bars: 95 % interval (Student's t), where there are two "
            "seeds or more.",
            f"test {shown.label}",
        ),
        (
            lambda effect: effect.over_smallest,
            "Difference to the smallest tau_max",
            "Mean over seeds of the difference between students of one seed, so what a seed brings cancels. Bars: 95 % "
            "interval of the paired differences; an interval that leaves out 0 is a difference beyond the seeds."
            + (" Below 0 is better." if shown.lowest else ""),
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
