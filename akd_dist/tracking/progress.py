"""Progress of long work, with rate and time left: a live bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from akd_dist.base.formatting import duration
from akd_dist.documents.status import CohortStatus, FleetPlan, StatusDocument
from akd_dist.tracking.status import ENDED, RunReader, write_document
from akd_dist.tracking.view import FleetView, Ticker, ended_line, metric_of, moved, total_line, waiting_lines

LINE_SECONDS = 5.0
# A fleet's documents are read once a second; without a terminal its lines come every ten.
READ_SECONDS, FLEET_LINE_SECONDS = 1.0, 10.0
READ_SHARE = 0.02
"""The share of the time that may go into reading how far students are."""
# How often the plan is written although it has not changed: by that a driver on another machine is seen to live.
BEAT_SECONDS = 5.0


class Meter:
    """How far a piece of work is: `update(done)` as often as you like."""

    def __init__(
        self, console: Console, title: str, total: float, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.title, self.total, self.unit, self.clock = console, title, total, unit, clock
        self.done = 0.0
        self.first: float | None = None
        self.started = clock()
        self.ticker = Ticker(LINE_SECONDS, self.started)
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(title, total=total, rate="", note="")

    def update(self, done: float, *, total: float | None = None, note: str = "") -> None:
        """Say how much is done; what was done before the first call counts as done, not as speed."""
        self.total = total or self.total
        if self.first is None:
            self.first, self.started = done, self.clock()
        self.done = done
        now = self.clock()
        elapsed = now - self.started
        rate = (done - self.first) / elapsed if elapsed > 0.2 else 0.0
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, rate=self._rate(rate), note=note)
        elif (still := self.ticker.due((done, self.total), now)) is not None:
            left = f", {self._rate(rate)}, {duration((self.total - done) / rate)} left" if rate > 0 else ""
            share = f"{done / self.total:.0%}" if self.total else ""
            line = f"{self.title}: {done:,.0f} of {self.total:,.0f} {self.unit} ({share}){left}"
            tell(self.console, line + (f"; {note}" if note and not still else "") + still)

    def _rate(self, rate: float) -> str:
        return f"{rate:,.0f} {self.unit}/s" if rate >= 1 or rate == 0 else f"{rate:.2g} {self.unit}/s"


def tell(console: Console, text: str) -> None:
    """A line for the person who waits: never folded, so that paths in it can be copied, and never taken for markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


_told: weakref.WeakKeyDictionary[Console, set[str]] = weakref.WeakKeyDictionary()


def tell_once(console: Console, text: str) -> None:
    """`tell`, but what a console has told already it does not tell again: a command may pass here several times."""
    told = _told.setdefault(console, set())
    if text not in told:
        told.add(text)
        tell(console, text)


@contextlib.contextmanager
def meter(console: Console, title: str, total: float, unit: str = "rows") -> Iterator[Meter]:
    """A meter that is shown while the block runs."""
    shown = Meter(console, title, total, unit)
    with shown.bar or contextlib.nullcontext():
        yield shown


class FleetMeter:
    """How far a fleet is, while it trains: a table in a terminal, a few lines elsewhere.

    Args:
        control: the run's control folder, where what the driver plans is left for `akd-dist status`.
        plan: what there is to do; the cohorts that have not begun are told by `update`.
        title: what the work is called.
        stopping: whether it is to stop, and is only waited for.
        clock: seconds, by a clock that does not go back.
    """

    def __init__(
        self,
        console: Console,
        control: Path,
        plan: FleetPlan,
        title: str,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.control, self.plan, self.title, self.clock = console, control, plan, title, clock
        self.stopping, self.stopped_at = stopping, math.inf
        self.reader = RunReader(control.parent)
        self.read_at = self.written_at = -math.inf
        self.pause = READ_SECONDS
        self.begun = clock()
        self.ticker = Ticker(FLEET_LINE_SECONDS, self.begun)
        self.ended: set[str] | None = None
        self.status: StatusDocument | None = None
        self.live: Live | None = None

    def __enter__(self) -> FleetMeter:
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self._view, transient=True, refresh_per_second=2)
            self.live.start()
        else:
            tell(self.console, self.title)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the sum of it all on the screen."""
        if self.live is not None:
            self.live.stop()
        if kind is None:
            self.update([], now=True)
            assert self.status is not None
            took = duration(self.clock() - self.begun)
            at_rest = self.status.model_copy(update={"steps_per_second": 0.0, "seconds_left": None})
            tell(self.console, f"{self.title} took {took}: {total_line(at_rest)}")

    def update(self, cohorts: list[CohortStatus], *, now: bool = False) -> None:
        """Show how far the fleet is; call it as often as you like.

        Args:
            cohorts: those that do not train yet.
        """
        moment = self.clock()
        if moment - self.read_at < self.pause and not now:
            return
        self.read_at, reading = moment, time.process_time()
        if self.stopping():
            self.stopped_at = min(self.stopped_at, moment)
        if cohorts != self.plan.cohorts or moment - self.written_at >= BEAT_SECONDS:
            self.written_at = moment
            self.plan = self.plan.model_copy(update={"at": time.time(), "cohorts": cohorts})
            write_document(self.control / "plan.json", self.plan)
        self.status = self.reader.read()
        # What hundreds of students leave takes a while to read, on a processor that these may be training on.
        self.pause = max(READ_SECONDS, (time.process_time() - reading) / READ_SHARE)
        if self.live is None:
            self._tell_lines(moment)

    def _view(self) -> RenderableType:
        if self.status is None:
            return ""
        return FleetView(self.status, self._since(self.clock()) or self.title, fit=True)

    def _since(self, moment: float) -> str | None:
        """That it is stopping, and for how long: workers that start are heard of only once they have started."""
        if self.stopped_at > moment:
            return None
        return f"stopping for {duration(moment - self.stopped_at)}: workers leave when they have kept what they did"

    def _tell_lines(self, moment: float) -> None:
        self._tell_ended()
        since, status = self._since(moment), self.status
        if status is not None and (still := self.ticker.due((moved(status), since), moment)) is not None:
            told = [total_line(status), *waiting_lines(status)]
            tell(self.console, "; ".join(told) + still if since is None else "; ".join([since, *told]))

    def _tell_ended(self) -> None:
        """A line for each student that has ended since the last time; none the first time."""
        assert self.status is not None
        over = {student.name: student for student in self.status.students if student.state in ENDED}
        for name, student in over.items():
            if self.ended is not None and name not in self.ended:
                tell(self.console, ended_line(student, metric_of(self.status)))
        self.ended = set(over)
