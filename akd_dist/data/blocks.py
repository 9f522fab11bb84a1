"""A source's rows in blocks, read by one thread and worked on by several: bounded memory, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from akd_dist.base.errors import RefusedError

K = TypeVar("K")
T = TypeVar("T")

MAX_THREADS = 16
# Bytes of files that are read ahead.
_AHEAD_BYTES = 1 << 26


@dataclass(frozen=True)
class Block:
    """Consecutive rows as a source has them."""

    start: int
    """Number of the first row."""
    inputs: Sequence[Any]
    """One or two columns of as many rows: each an Arrow array, of chunks or not, a NumPy array [n, *shape], or a list
    of arrays or of images of Pillow."""
    labels: Any
    """An Arrow array, of chunks or not."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> np.ndarray:
        """Their numbers, int64 [n]."""
        return np.arange(self.start, self.start + len(self))

    def part(self, first: int, last: int) -> Block:
        """The block of its rows first..last - 1, counted from its own first row."""
        return Block(self.start + first, [column[first:last] for column in self.inputs], self.labels[first:last])


class Reader(Protocol):
    """Reads rows of a source."""

    def __call__(self, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """Rows start..stop - 1 in their order, in blocks of at most so many rows each; by default all rows."""


def default_threads() -> int:
    """As many as this process may run on, within reason."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def map_blocks(blocks: Iterable[Block], work: Callable[[Block], T], threads: int) -> Iterator[T]:
    """What `work` makes of every block, in the order of the blocks; `threads` of them are worked on ahead.

    Blocks are read by the caller's thread alone: decoding and conversion take longer than reading by far.

    Raises:
        RefusedError: names the first row that fails, whatever the threads do: results are taken in the order of rows,
            and a block that fails is worked on again row by row. What cannot be read is told after the rows before it.
    """

    def to_the_row(block: Block) -> T:
        try:
            return work(block)
        except RefusedError:
            for offset in range(len(block)):
                work(block.part(offset, offset + 1))
            raise

    ahead: deque[Future[T]] = deque()
    reading, unreadable = iter(blocks), None
    with ThreadPoolExecutor(threads) as pool:
        try:
            while unreadable is None:
                try:
                    block = next(reading)
                except StopIteration:
                    break
                except Exception as error:
                    unreadable = error
                    continue
                # Handed on before another block is sent to work, so that no more than `threads` of them are held.
                if len(ahead) == threads:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(to_the_row, block))
            while ahead:
                yield ahead.popleft().result()
            if unreadable is not None:
                raise unreadable
        finally:
            for waiting in ahead:
                # Whoever takes the results may leave early: blocks that no thread has begun are not worked on for
                # nobody.
                waiting.cancel()


def read_ahead(items: Sequence[K], read: Callable[[K], T], size_of: Callable[[K], int], *, waits: bool) -> Iterator[T]:
    """What `read` gives of items, in their order, by several threads ahead of whoever takes it.

    Args:
        items: what is read, each on its own.
        read: called by threads.
        size_of: bytes of an item; _AHEAD_BYTES, or one item, are held at a time.
        waits: whether they are objects, which answer after a while: then more are under way than there are cores.

    Raises:
        Exception: what `read` raises, in the order of items.
    """
    threads = MAX_THREADS if waits else default_threads()
    ahead: deque[tuple[int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            size = size_of(item)
            while ahead and (len(ahead) >= 2 * threads or held + size > _AHEAD_BYTES):
                taken, future = ahead.popleft()
                held -= taken
                yield future.result()
            ahead.append((size, pool.submit(read, item)))
            held += size
        while ahead:
            yield ahead.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
