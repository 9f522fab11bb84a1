"""Progress of long work, with rate and time left: a live bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0


class Meter:
    """How far a piece of work is: `update(done)` as often as you like."""

    def __init__(self, console: Console, title: str, total: float, unit: str) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done = 0.0
        self.first: float | None = None
        self.started = self.told = time.monotonic()
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
            self.first, self.started = done, time.monotonic()
        self.done = done
        elapsed = time.monotonic() - self.started
        rate = (done - self.first) / elapsed if elapsed > 0.2 else 0.0
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, rate=self._rate(rate), note=note)
        elif time.monotonic() - self.told >= LINE_SECONDS:
            self.told = time.monotonic()
            left = f", {self._rate(rate)}, {duration((self.total - done) / rate)} left" if rate > 0 else ""
            share = f"{done / self.total:.0%}" if self.total else ""
            line = f"{self.title}: {done:,.0f} of {self.total:,.0f} {self.unit} ({share}){left}"
            tell(self.console, line + (f"; {note}" if note else ""))

    def _rate(self, rate: float) -> str:
        return f"{rate:,.0f} {self.unit}/s"


def tell(console: Console, text: str) -> None:
    """A line for the person who waits: never folded, so that paths in it can be copied, and never taken for markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def meter(console: Console, title: str, total: float, unit: str = "rows") -> Iterator[Meter]:
    """A meter that is shown while the block runs."""
    shown = Meter(console, title, total, unit)
    with shown.bar or contextlib.nullcontext():
        yield shown


def duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
