"""A source's rows in blocks, worked on by several threads: bounded memory, and always the same first mistake."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from akd_dist.base.errors import RefusedError

T = TypeVar("T")

MAX_THREADS = 16
OPEN_BYTES = 1 << 28
"""What open streams may take together, where it is more than one."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows as a source has them."""

    start: int
    """Number of the first row."""
    inputs: Sequence[Any]
    """One or two columns of as many rows: each an Arrow array, a NumPy array [n, *shape], or a list of arrays or
    of images of Pillow."""
    labels: Any
    """An Arrow array."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> np.ndarray:
        """Their numbers, int64 [n]."""
        return np.arange(self.start, self.start + len(self))

    def single(self, offset: int) -> Block:
        """The block of one of its rows."""
        inputs = [column[offset : offset + 1] for column in self.inputs]
        return Block(self.start + offset, inputs, self.labels[offset : offset + 1])


@dataclass(frozen=True)
class RowStream:
    """Blocks of consecutive rows that can only be read one after the other, as those of a Parquet row group."""

    start: int
    """Number of the first row."""
    blocks: Callable[[int], Iterator[Block]]
    """The blocks, of at most so many rows each. They may be read by another thread each time."""
    open_bytes: int = 0
    """Memory that may be taken while it is open, beside its blocks."""


def default_threads() -> int:
    """As many as this process may run on, within reason."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def for_each_block(streams: Sequence[RowStream], rows: int, work: Callable[[Block], None], threads: int) -> None:
    """Call `work` once for every block of all streams, in `threads` threads and in no order.

    A thread takes the next block of a stream that nobody reads just then, and works on it while others read on. So many
    short streams are read in parallel, and the blocks of a single long one are worked on in parallel. No more than
    `threads` streams are open, and only one if two would take more than OPEN_BYTES; and `threads` blocks are held.

    Args:
        streams: in the order of their rows.
        rows: the most rows of a block.

    Raises:
        RefusedError: of the first row that fails, whatever the threads did: all blocks before it are worked on, and the
            block that fails is worked on again row by row.
    """
    reading = _Reading(streams, rows, work)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(reading.run) for _ in range(threads)]:
                done.result()
        finally:  # an interrupt, too
            reading.stop()
    if reading.error is not None:
        raise reading.error


class _Open:
    """A stream that is being read."""

    def __init__(self, stream: RowStream, rows: int) -> None:
        self.at, self.bytes = stream.start, stream.open_bytes
        self.blocks = stream.blocks(rows)

    def __lt__(self, other: _Open) -> bool:
        return self.at < other.at


class _Reading:
    """What the threads of `for_each_block` share."""

    def __init__(self, streams: Sequence[RowStream], rows: int, work: Callable[[Block], None]) -> None:
        self.waiting, self.rows, self.work = deque(streams), rows, work
        self.idle: list[_Open] = []  # a heap: the earliest rows first
        self.busy = self.bytes = 0
        self.limit: float = float("inf")  # rows from here on are not worth reading: one before them failed
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def run(self) -> None:
        """What each thread does."""
        while (block := self._take()) is not None:
            try:
                self._work_on(block)
            except Exception as error:
                self._fail(block.start, error)

    def stop(self) -> None:
        """Let the threads end with the blocks they have."""
        with self.changed:
            self.limit = -1
            self.changed.notify_all()

    def _work_on(self, block: Block) -> None:
        try:
            self.work(block)
        except RefusedError:
            for offset in range(len(block)):
                self.work(block.single(offset))
            raise

    def _fail(self, start: int, error: Exception) -> None:
        with self.changed:
            if start < self.limit:
                self.limit, self.error = start, error

    def _take(self) -> Block | None:
        """The next block of some stream; None when there are no more."""
        while (stream := self._lease()) is not None:
            block = None
            try:
                block = next(stream.blocks, None)
            except Exception as error:
                self._fail(stream.at, error)
            finally:
                self._give_back(stream, block)
            if block is not None:
                return block
        return None

    def _lease(self) -> _Open | None:
        with self.changed:
            while True:
                if self.idle and self.idle[0].at < self.limit:
                    self.busy += 1
                    return heapq.heappop(self.idle)
                if self.waiting and self.waiting[0].start < self.limit and self._fits(self.waiting[0]):
                    self.busy += 1
                    self.bytes += self.waiting[0].open_bytes
                    return _Open(self.waiting.popleft(), self.rows)
                if not self.busy:
                    return None
                self.changed.wait()

    def _fits(self, stream: RowStream) -> bool:
        return not self.bytes or self.bytes + stream.open_bytes <= OPEN_BYTES

    def _give_back(self, stream: _Open, block: Block | None) -> None:
        with self.changed:
            self.busy -= 1
            if block is None:
                self.bytes -= stream.bytes
            else:
                stream.at = block.start + len(block)
                heapq.heappush(self.idle, stream)
            self.changed.notify_all()


def map_blocks(streams: Sequence[RowStream], rows: int, work: Callable[[Block], T], threads: int) -> Iterator[T]:
    """What `work` makes of every block of all streams, in the order of rows; `threads` of them are worked on ahead.

    Args:
        streams: in the order of their rows.
        rows: the most rows of a block.

    Raises:
        RefusedError: of the first row that fails: the block that fails is worked on again row by row.
    """

    def to_the_row(block: Block) -> T:
        try:
            return work(block)
        except RefusedError:
            for offset in range(len(block)):
                work(block.single(offset))
            raise

    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for block in itertools.chain.from_iterable(stream.blocks(rows) for stream in streams):
                ahead.append(pool.submit(to_the_row, block))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def first_block(streams: Sequence[RowStream]) -> Block:
    """The first row alone: what it is like, all others must be."""
    return next(itertools.chain.from_iterable(stream.blocks(1) for stream in streams))
