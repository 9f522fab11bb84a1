"""What a process holds of data in pieces: those that it reads now, and those that it reads next, on their way."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from akd_dist.base.errors import CorruptCacheError, MachineError
from akd_dist.storage.content import Guard
from akd_dist.storage.node_cache import NoRoomError, room_in
from akd_dist.storage.pieces import Held, Pieces, Span, hold_pieces

PATIENCE_SECONDS = 10.0
"""How long others of this node are waited for, where the cache has no room for what is read next."""
_POLL_SECONDS = 0.1


class Moving(Protocol):
    """What is read a view at a time, or a few windows of one."""

    def watch(self, guard: Guard) -> None:
        """Have what is read from now on vouched for."""

    def move(self, view: int, spans: Sequence[Span]) -> None:
        """Have these spans of a view's rows at hand from now on, and nothing else."""

    def expect(self, view: int, spans: Sequence[Span]) -> None:
        """Fetch these meanwhile, which are read next."""

    def resting(self, marks: Collection[str]) -> list[Held]:
        """What this node has of it in files of these marks."""

    def close(self) -> None:
        """Let everything go."""


class _LeftError(Exception):
    """Nobody waits for these pieces any more."""


class Holder:
    """One set of pieces at a time, and the next one, fetched by a thread meanwhile.

    Args:
        budget: bytes that everything in the cache may take; None for the default budget.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.now: Held | None = None
        """What is read now."""
        self.guard: Guard | None = None
        """Vouches for it from its first byte on."""
        self._budget = budget
        self._ahead: tuple[tuple[str, tuple[int, ...]], Future[Held]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._closed = threading.Event()

    def move(self, pieces: Pieces, numbers: Sequence[int], on_wait: Callable[[], None] = lambda: None) -> Held:
        """Read these pieces from now on, and those before no more.

        Raises:
            AkdError: as `hold_pieces`.
        """
        wanted = pieces.key, tuple(numbers)
        if self.now is not None and (self.now.pieces.key, self.now.numbers) == wanted:
            return self.now
        self.leave()
        found = None
        if self._ahead is not None:
            (fetched, future), self._ahead = self._ahead, None
            if fetched == wanted:
                # Asked for and not raised here: an error keeps the frames that it was raised through and their callers,
                # and with those what is read now, until Python looks for cycles. Its place is wanted before that.
                if not isinstance(future.exception(), MachineError):  # else what was read until now was in its place
                    found = future.result()
            elif not future.cancel():
                future.exception()  # waited for; nobody wants it any more, so nobody is told how it ended
            del future  # and what it fetched, if that is not wanted: its place may be needed below
        if found is None:
            found = self._fetch(pieces, numbers, on_wait, PATIENCE_SECONDS)
        if self.guard is not None:
            self.guard.add(found.content)
        self.now = found
        return found

    def expect(self, pieces: Pieces, numbers: Sequence[int]) -> None:
        """Fetch these pieces meanwhile, which are read next."""
        wanted = pieces.key, tuple(numbers)
        if (self._ahead is not None and self._ahead[0] == wanted) or self._closed.is_set():
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ahead = wanted, self._pool.submit(self._fetch, pieces, numbers)

    def leave(self) -> None:
        """Read nothing any more."""
        if self.now is not None and self.guard is not None:
            self.guard.leave(self.now.content)
        self.now = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self.now = self._ahead = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fetch(
        self,
        pieces: Pieces,
        numbers: Sequence[int],
        on_wait: Callable[[], None] = lambda: None,
        patience: float = 0.0,
    ) -> Held:
        try:
            return hold_pieces(pieces, numbers, budget=self._budget, on_progress=self._go_on)
        except NoRoomError:
            if self.guard is None:
                raise
        # What was left is let go once it is hashed, and gives its place. If it is found wrong, whoever asks the guard
        # is told, before anything is kept.
        with contextlib.suppress(CorruptCacheError):
            self.guard.settle(on_wait)
        until = time.monotonic() + patience
        while True:
            try:
                return hold_pieces(pieces, numbers, budget=self._budget, on_progress=self._go_on)
            except NoRoomError:
                never = pieces.nbytes(numbers) > room_in(pieces.folder.parent, self._budget)
                if never or time.monotonic() > until or self._closed.is_set():
                    raise
            # Other processes of this node may hold what they are about to leave: another worker of this cohort does.
            on_wait()
            time.sleep(_POLL_SECONDS)

    def _go_on(self, done: int, of: int) -> None:
        if self._closed.is_set():
            raise _LeftError
