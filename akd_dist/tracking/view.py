"""How far a fleet is, as people see it: a table that fits a terminal, or a plain line. Pure: from documents to text."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from akd_dist.base.formatting import NARROWEST, SHOWN, duration, house_table, shortened, uncut
from akd_dist.base.places import RUN_ROOT
from akd_dist.documents.status import StatusDocument, StudentProgress

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

# The order of students where a terminal has no room for all: those that train, those that ended badly, and last those
# to which nothing happens now.
ORDER = ("training", "stopped", "failed", "diverged", "waiting", "done")
STYLES = {"failed": "red", "diverged": "red", "stopped": "yellow", "waiting": "dim", "done": "green"}
HEAD_LINES, CURSOR_LINES = 2, 1
WAITING_SHOWN = 3
GAP = 2
# A log without a terminal repeats what stands still after so long, so that a reader knows that it lives.
STILL_SECONDS = 600.0


@dataclass(frozen=True)
class FleetView:
    """A status as `rich` prints it: a table of students, who waits for what, and the sum of it all.

    A live view has one line for each student, its name cut in the middle where it is too long; printed once, nothing is
    cut and long lines are folded.
    """

    status: StatusDocument
    """How far the fleet is."""
    title: str | None = None
    """A line above the table."""
    fit: bool = False
    """Live: show no more students than the terminal has lines for, and how many more there are; one line for each."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The parts from top to bottom; no line is wider than the terminal."""
        from rich.text import Text

        below = [*waiting_lines(self.status), total_line(self.status)] if self.status.students else []
        shown = list(self.status.students)
        if self.fit:
            shown.sort(key=lambda student: ORDER.index(student.state))
            room = console.size.height - HEAD_LINES - CURSOR_LINES - len(below) - (self.title is not None)
            if len(shown) > max(room, 0):
                del shown[max(room - 1, 0) :]
        if self.title is not None:
            yield Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        if shown:
            yield _table(shown, metric_of(self.status) or "validation", options.max_width, fit=self.fit)
        if hidden := len(self.status.students) - len(shown):
            yield Text(f"and {hidden:,} more", style="dim")
        for line in below:
            style = "dim" if line is not below[-1] else ""
            yield Text(line, style=style, no_wrap=self.fit, overflow="ellipsis" if self.fit else "fold")


class Ticker:
    """When a log is told how far something is: every few seconds while it moves, else ever more rarely.

    What stands still is told again after twice as long each time, with how long it has stood: a log shows that somebody
    is there, and is not filled with the same line.

    Args:
        every: seconds between two lines while it moves.
        now: when it began, by any clock that does not go back.
    """

    def __init__(self, every: float, now: float) -> None:
        self.every = self.wait = every
        self.told_at = self.moved_at = now
        self.state: object = None
        self.told: object = None

    def due(self, state: object, now: float) -> str | None:
        """What to add to the line that is to be told now, with a semicolon before it, if anything; None if none is.

        Args:
            state: how far it is; the same as before means that nothing has moved.
        """
        if state != self.state:
            self.state, self.moved_at, self.wait = state, now, self.every
        if now - self.told_at < self.wait:
            return None
        self.told_at = now
        if state != self.told:
            self.told = state
            return ""
        self.wait = min(2 * self.wait, STILL_SECONDS)
        return f"; nothing has moved for {duration(now - self.moved_at)}"


def moved(status: StatusDocument) -> object:
    """How far a fleet is, to be compared with how far it was: without rates, which change while it stands."""
    return status.state, status.steps, status.over, waiting_lines(status)


def _table(students: list[StudentProgress], metric: str, width: int, *, fit: bool) -> Table:
    from rich.text import Text

    headings = ("stage", "epoch", "T", "loss", metric, "rows/s", "left")
    rows = [cells_of(student, metric) for student in students]
    widths = [max(map(len, column)) + GAP for column in zip(headings, *rows, strict=True)]
    names = [student.name for student in students]
    if fit:
        names = shortened(names, max(width - sum(widths), NARROWEST))
    table = house_table()
    table.add_column("student", no_wrap=fit)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="left" if heading == "stage" else "right")
    for student, name, (stage, *numbers) in zip(students, names, rows, strict=True):
        table.add_row(Text(name), Text(stage, style=STYLES.get(student.state, "")), *numbers)
    return table if fit else uncut(table, width)


def cells_of(student: StudentProgress, metric: str | None = None) -> tuple[str, ...]:
    """Stage or state, epoch of total, temperature, loss, validation metric, rows per second and time left."""
    training = student.state == "training"
    epoch = min(student.epoch + training, student.epochs)
    return (
        (student.stage or "training") if training else student.state,
        f"{epoch}/{student.epochs}",
        "-" if student.temperature is None else str(student.temperature),
        _number(student.loss),
        _measured(student.validation, metric) or _number(student.validation),
        f"{student.rows_per_second:,.0f}" if training else "-",
        "-" if student.seconds_left is None or not training else clock(student.seconds_left),
    )


def waiting_lines(status: StatusDocument) -> list[str]:
    """Who waits for what: cohorts without room, workers that start, students that wait for another one."""
    waits = [
        (cohort.students, f"starting: {_names(cohort.students)}")
        if cohort.state == "starting"
        else (cohort.students, _wait_for(cohort.students, cohort.waits_for or "their turn"))
        for cohort in status.cohorts
    ]
    leaders: dict[str, list[str]] = {}
    for student in status.students:
        if student.state == "waiting" and student.waits_for is not None:
            leaders.setdefault(student.waits_for, []).append(student.name)
    waits += [(names, _wait_for(names, leader)) for leader, names in leaders.items()]
    lines = [line for _, line in waits[:WAITING_SHOWN]]
    if more := waits[WAITING_SHOWN:]:
        count = sum(len(names) for names, _ in more)
        lines.append(f"and {count:,} more {'student waits' if count == 1 else 'students wait'}")
    return lines


def total_line(status: StatusDocument) -> str:
    """The sum over all students: steps, their rate, time left, and how many are over."""
    share = f" ({status.steps / status.steps_total:.0%})" if status.steps_total else ""
    parts = [f"{status.steps:,} of {status.steps_total:,} steps{share}"]
    if status.steps_per_second > 0:
        parts.append(f"{status.steps_per_second:,.0f} steps/s")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    states = Counter(student.state for student in status.students)
    bad = [f"{states[state]:,} {state}" for state in ("failed", "diverged") if states[state]]
    over = [f"{status.over:,} of {len(status.students):,} students over", *bad]
    return ", ".join(parts) + f"; {', '.join(over)}"


def metric_of(status: StatusDocument) -> str | None:
    """What the primary metric is called."""
    return status.metric_name or status.metric


def ended_line(student: StudentProgress, metric: str | None) -> str:
    """What is told of a student when it ends."""
    told = f"{student.name} is {student.state}" if student.state == "done" else f"{student.name} {student.state}"
    told += f" after {student.epoch} of {student.epochs} epochs"
    if student.reason:
        return f"{told}: {student.reason}"
    if student.validation is None:
        return told
    return f"{told}: validation {metric} {_measured(student.validation, metric) or f'{student.validation:.4f}'}"


def headline(status: StatusDocument) -> str:
    """What is going on with a run, and who does it."""
    driver, name = status.driver, status.run
    who = f"process {driver.pid} on {driver.host}" if driver else "nobody that is known"
    match status.state:
        case "training":
            return f"{name} trains: {who}, since {_when(driver.since if driver else None)}"
        case "preparing":
            return f"{name} is prepared (data, teacher, store): {who}, since {_when(driver.since if driver else None)}"
        case "done":
            return f"{name} is done" + (f", since {_when(status.at)}" if status.at else "")
    if driver is None:
        return f"{name} stopped at {_when(status.at)}, and nothing tells who worked on it"
    how = "let go of it" if driver.ended else "is gone" if status.alive is False else ""
    return f"{name} stopped at {_when(status.at)}: {who} {how or 'has not been heard of since'}"


def next_line(status: StatusDocument) -> str | None:
    """What goes on with a run that stopped; None for others."""
    if status.state != "stopped":
        return None
    if status.driver is None:
        return "the command that it was started with goes on: akd-dist train-students RECIPE"
    command = f"{status.driver.command} (in {status.driver.folder})"
    if "://" in status.run:  # it is where it was begun
        return f"the same command goes on: {command}"
    run, ours = Path(os.path.realpath(status.run)), status.driver.command.startswith("akd-dist ")
    if not ours or os.path.realpath(Path(status.driver.folder, _run_root(status.driver.command))) == str(run.parent):
        return f"the same command goes on: {command}"
    roots = f"--run-root {run.parent}, and with --store-root where its stores are now"
    return f"the run was moved since it was started: the same command goes on with {roots}: {command}"


def _run_root(command: str) -> str:
    """Where a command that was typed has its runs."""
    root, words = RUN_ROOT.default, shlex.split(command)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--run-root":
            root = value if equals else following
    return root


def clock(seconds: float) -> str:
    """Seconds in little room: 0:48, 3:20, 2:05:00."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _measured(value: float | None, metric: str | None) -> str | None:
    """A metric of language models as tables show it; None for those that are shown to four digits."""
    shown = SHOWN.get(metric or "")
    return shown.text(value) if shown is not None and shown.lowest else None


def _names(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _wait_for(names: list[str], what: str) -> str:
    return f"{_names(names)} {'wait' if len(names) > 1 else 'waits'} for {what}"


def _when(moment: float | None) -> str:
    """A time of day, with its date if that is not today."""
    if moment is None:
        return "a time that nothing tells of"
    then = datetime.fromtimestamp(moment)
    today = then.date() == datetime.fromtimestamp(time.time()).date()
    return f"{then:%H:%M:%S}" if today else f"{then:%Y-%m-%d %H:%M:%S}"
