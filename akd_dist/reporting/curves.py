"""Curves over epochs: training loss and validation metric, with the temperature that students were annealed by."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.formatting import ANNEALING, CONTINUATION, HARD_LABELS, objective_label
from akd_dist.documents.fleet import EpochRecord, Stage1Loss
from akd_dist.reporting.drawing import (
    DASHED,
    DOTTED,
    INK,
    SIZE_COLOURS,
    TEMPERATURE_COLOUR,
    Picture,
    finish,
    legible,
    logarithmic,
    picture,
)
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import SeedGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEDULES_DRAWN = 12
"""The most schedules whose curves a page draws: a figure weighs some 50 kB."""
BAND = "Mean over seeds, its band from the lowest to the highest seed."


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
    stage1_loss: Stage1Loss | None
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
        return f"{objective_label(self.objective, self.stage1_loss)}{tau}, {length} epochs"

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
                schedule = Schedule(group.objective, group.stage1_loss, group.tau_max, len(records), steps)
                groups = found.setdefault(schedule, [])
                groups += [] if group in groups else [group]
    return dict(sorted(found.items(), key=lambda one: (one[0].objective, one[0].tau_max or 0, one[0].epochs)))


def stage_figures(run: Run) -> Iterator[Picture]:
    """The training loss of each schedule, and the validation metric where it is annealed, with the temperature."""
    losses = _of_language() if run.language else _losses(run.regression)
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
            f"It picks the best epoch of each stage{shown.aside}; the test set is read once, at the end. {BAND}{told}",
            functools.partial(_draw_curves, curves=curves, ylabel=f"validation {shown.label}", schedule=schedule),
            *_numbers(curves),
        )


def _of_language() -> dict[str, str]:
    """What the training loss of each objective is, of language models: over tokens that are targets."""
    mixed = "The cross-entropy and the divergence from the {}'s softened distribution, mixed, over training tokens."
    return {
        ANNEALING: "In stage I the distance to the teacher's annealed distribution or logits, over training tokens; a "
        "step of Φ may raise it. In stage II the cross-entropy alone.",
        CONTINUATION: "The cross-entropy with weight ψ, which climbs to 1, and the distance to Φ times the teacher's "
        "centred logits with the rest of it.",
        "kd": mixed.format("teacher"),
        "takd": mixed.format("assistant"),
        HARD_LABELS: "Cross-entropy over training tokens, in nats.",
    }


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
