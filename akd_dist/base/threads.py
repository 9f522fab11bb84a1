"""Work on another thread, ahead of this one, behind it, or for so long: bounded, and its errors are raised here.

Such a thread is never left alone: whoever leaves waits for what it does just now, and drops what it has not begun.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")
_END: Any = object()
_LOOK = 0.25  # seconds between two looks at how long a thread has computed


def made_ahead(items: Iterator[T], name: str, count: int = 1) -> Generator[T, None, None]:
    """What an iterator gives, in its order, made on a thread of its own, so many before they are wanted.

    Close it where it is not read to its end: then the iterator is closed as well, on this thread.

    Args:
        items: read by that thread alone.
        name: of the thread.

    Raises:
        BaseException: what making an item raised, when it is its turn.
    """
    with contextlib.ExitStack() as leaving:
        leaving.callback(getattr(items, "close", lambda: None))
        pool = leaving.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))
        waiting = deque(pool.submit(next, items, _END) for _ in range(count))
        leaving.callback(_drop, waiting)
        while (one := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield one


class Behind:
    """A thread that works behind this one, on one thing after the other. As a context, it waits for all of it.

    Args:
        most: how many things it may be behind: whoever brings another one waits.
        name: of the thread.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._waiting, self._failed = most, deque[Future[None]](), False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def __enter__(self) -> Self:
        return self

    def put(self, act: Callable[[], None]) -> None:
        """Have something done.

        Raises:
            BaseException: what was raised by something brought before; nothing after that is begun.
        """
        while self._waiting and (len(self._waiting) >= self._most or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, act))

    def _do(self, act: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True  # unless it turns out otherwise: what waits may rest on what was done before
            act()
            self._failed = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            _drop(self._waiting)
            self._pool.shutdown()


def within(seconds: float, act: Callable[[], T]) -> T:
    """Run code of somebody else on a thread of its own and return what it returns; end it once its time is up.

    It is ended between two instructions of Python: a single call into a library is waited for.

    Args:
        seconds: of that thread's own time, where the system tells: a machine that is busy, or paused, does not count.

    Raises:
        TimeoutError: it took longer.
        BaseException: what it raised.
    """
    done: Future[T] = Future()
    began = time.monotonic()
    thread = threading.Thread(target=_run, args=(done, act), name="within_time", daemon=True)
    thread.start()
    thread.join(_LOOK)
    while thread.is_alive():
        if _spent(thread, began) > seconds and thread.is_alive():
            assert thread.ident is not None  # it has started
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            raise TimeoutError(f"more than {seconds:g} seconds")
        thread.join(_LOOK)
    return done.result()


def _run(done: Future[T], act: Callable[[], T]) -> None:
    try:
        done.set_result(act())
    except BaseException as error:  # whoever waits raises it
        done.set_exception(error)


def _spent(thread: threading.Thread, began: float) -> float:
    """Seconds that a thread has computed for; since it began, where the system does not tell."""
    try:
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - began
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _drop(waiting: deque[Future[Any]]) -> None:
    for one in waiting:
        one.cancel()
