"""How a command is told to stop: the first signal lets everybody keep what is done, the next one ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from akd_dist.base.errors import InterruptedByUser, TerminatedError

POLL_SECONDS = 0.2
# coreutils' `timeout` signals the command that it started and then its process group, which that command is in: a
# second signal within so many seconds is the same request to stop.
ONCE_SECONDS = 1.0
# How long workers that were told to stop may take to checkpoint without a sign of life, before they count as lost.
GRACE_SECONDS = 30.0


class StopFlag:
    """Set by the first Ctrl-C or SIGTERM; loops read it, finish what they hold and leave."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Leave where nothing has begun that would have to be kept."""
        if self:
            raise self.error("stopped; what was done is kept", "the same command goes on from there")

    def error(self, what: str, next_step: str) -> InterruptedByUser:
        """The error that ends the command once everything is safe."""
        kind = TerminatedError if self.signal == signal.SIGTERM else InterruptedByUser
        return kind(what, next=next_step)


@contextlib.contextmanager
def stop_on_signals(tell: Callable[[str], None]) -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; one that comes ONCE_SECONDS later or more stops at once.

    Signals can only be handled on the main thread: elsewhere the flag stays down.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    first = 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if flag and time.monotonic() - first < ONCE_SECONDS:
            return
        if flag:
            raise KeyboardInterrupt
        flag.signal, first = number, time.monotonic()
        tell("stopping: keeping what is done (once more, a second later or more, to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
