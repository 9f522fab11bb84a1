"""Blocks worked on by threads: each row once and in order, and the first mistake always the same."""

import random
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data import blocks as reading
from akd_dist.data.blocks import Block, map_blocks, read_ahead


def blocks(rows: int, most: int) -> Iterator[Block]:
    """Rows 0, 1, ... in blocks."""
    for first in range(0, rows, most):
        numbers = list(range(first, min(first + most, rows)))
        yield Block(first, [pa.array(numbers)], pa.array(numbers))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_row_is_worked_on_once_and_comes_in_order(threads: int) -> None:
    made = map_blocks(blocks(99, 4), lambda block: block.labels.to_pylist(), threads)
    assert [row for rows in made for row in rows] == list(range(99))


def test_blocks_are_worked_on_in_parallel() -> None:
    barrier = threading.Barrier(3, timeout=900)  # falls apart unless three blocks are worked on at a time
    list(map_blocks(blocks(9, 1), lambda block: void(barrier.wait()), 3))


def void(_: object) -> None:
    """So that a lambda gives nothing."""


@pytest.mark.parametrize("seed", range(20))
def test_the_first_bad_row_is_named_whatever_the_threads_do(seed: int) -> None:
    """Rows 37 and 61 are bad, and threads come to them in another order each time."""
    draw = random.Random(seed)
    pauses = [draw.random() * 0.003 for _ in range(100)]
    seen: set[int] = set()

    def work(block: Block) -> None:
        rows = block.labels.to_pylist()
        time.sleep(pauses[rows[0]])
        bad = [row for row in rows if row in (37, 61)]
        if bad:
            raise RefusedError(f"bad among {len(rows)} rows from {rows[0]}")
        seen.update(rows)

    with pytest.raises(RefusedError, match="bad among 1 rows from 37"):
        list(map_blocks(blocks(100, 4), work, 4))
    assert set(range(37)) <= seen


def test_what_cannot_be_read_is_told_after_the_rows_before_it() -> None:
    def torn() -> Iterator[Block]:
        yield from blocks(8, 4)
        raise RefusedError("torn after 8 rows")

    def work(block: Block) -> list[int]:
        time.sleep(0.01)  # the reader is through long before
        rows: list[int] = block.labels.to_pylist()
        if 5 in rows:
            raise RefusedError(f"bad among {len(rows)} rows from {rows[0]}")
        return rows

    with pytest.raises(RefusedError, match="bad among 1 rows from 5"):
        list(map_blocks(torn(), work, 4))
    made = map_blocks(torn(), lambda block: block.labels.to_pylist(), 4)
    assert [next(made), next(made)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(RefusedError, match="torn after 8 rows"):
        next(made)


def test_an_error_of_ours_is_not_hidden() -> None:
    def work(block: Block) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(map_blocks(blocks(100, 4), work, 2))


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_what_is_read_ahead_comes_in_order_and_is_bounded(
    waits: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_AHEAD_BYTES", 50)
    begun, most = 0, 0

    def read(item: int) -> int:
        nonlocal begun
        begun += 1
        return item * item

    taken: list[int] = []
    for value in read_ahead(range(99), read, lambda _: size, waits=waits):
        most = max(most, begun - len(taken))
        taken.append(value)
    assert taken == [item * item for item in range(99)]
    assert most <= max(1, min(2 * reading.MAX_THREADS, 50 // size)) + 1


def test_whoever_takes_what_is_read_ahead_may_leave_early() -> None:
    seen: list[int] = []
    first = next(read_ahead(range(10_000), seen.append, lambda _: 1, waits=True))
    assert first is None
    assert len(seen) < 1000


def test_what_cannot_be_read_is_told_after_what_comes_before() -> None:
    def read(item: int) -> int:
        if item == 7:
            raise RefusedError("seven")
        return item

    taken: list[int] = []
    with pytest.raises(RefusedError, match="seven"):
        taken.extend(read_ahead(range(99), read, lambda _: 1, waits=False))
    assert taken == list(range(7))


def test_blocks_are_worked_on_in_order_and_not_far_ahead() -> None:
    read = []

    def noted() -> Iterator[Block]:
        for block in blocks(200, 10):
            read.append(block.start)
            yield block

    made = map_blocks(noted(), lambda block: block.start, threads=2)
    assert next(made) == 0
    assert len(read) <= 3
    assert [0, *made] == list(range(0, 200, 10))

    def fail(block: Block) -> int:
        if 25 in block.rows:
            raise RefusedError(f"rows {block.rows[0]} to {block.rows[-1]}")
        return block.start

    with pytest.raises(RefusedError, match="rows 25 to 25"):
        list(map_blocks(noted(), fail, threads=2))
