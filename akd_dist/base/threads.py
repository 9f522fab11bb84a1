"""Work on another thread, ahead of this one or behind it: bounded, in order, and its errors are raised here.

Such a thread is never left alone: whoever leaves waits for what it does just now, and drops what it has not begun.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

T = TypeVar("T")
_END: Any = object()


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


def _drop(waiting: deque[Future[Any]]) -> None:
    for one in waiting:
        one.cancel()
