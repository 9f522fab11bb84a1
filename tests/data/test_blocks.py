"""Blocks worked on by threads: each row once and in order, and the first mistake always the same."""

import random
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block, RowStream, map_blocks


def stream(start: int, stop: int, broken: int | None = None) -> RowStream:
    """Rows start..stop - 1; from row `broken` on they cannot be read."""

    def read(most: int) -> Iterator[Block]:
        for first in range(start, stop, most):
            if broken is not None and first + most > broken:
                raise RefusedError(f"unreadable after row {first}")
            rows = list(range(first, min(first + most, stop)))
            yield Block(first, [pa.array(rows)], pa.array(rows))

    return RowStream(start, read)


STREAMS = [stream(start, start + 25) for start in range(0, 100, 25)]


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("streams", [STREAMS, [stream(0, 100)]], ids=["many", "one"])
def test_every_row_is_worked_on_once(threads: int, streams: list[RowStream]) -> None:
    seen: list[int] = []
    list(map_blocks(streams, 4, lambda block: seen.extend(block.labels.to_pylist()), threads))
    assert sorted(seen) == list(range(100))


def test_a_single_stream_is_worked_on_in_parallel() -> None:
    barrier = threading.Barrier(3, timeout=900)  # falls apart unless three blocks are worked on at a time
    list(map_blocks([stream(0, 9)], 1, lambda block: void(barrier.wait()), 3))


def void(_: object) -> None:
    """So that a lambda gives nothing."""


@pytest.mark.parametrize("seed", range(20))
def test_the_first_bad_row_is_named_whatever_the_threads_do(seed: int) -> None:
    """Rows 37 and 61 are bad, in another order each time; so is the reading of a later stream."""
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
        list(map_blocks([*STREAMS[:3], stream(75, 100, broken=80)], 4, work, 4))
    assert set(range(37)) <= seen


@pytest.mark.parametrize("threads", [1, 4])
def test_rows_before_unreadable_ones_come_first(threads: int) -> None:
    def work(block: Block) -> None:
        if block.start <= 30 < block.start + len(block):
            raise RefusedError(f"bad row {block.start}")

    streams = [STREAMS[0], stream(25, 50, broken=34), *STREAMS[2:]]
    with pytest.raises(RefusedError, match="bad row 30"):
        list(map_blocks(streams, 3, work, threads))
    with pytest.raises(RefusedError, match="unreadable after row 34"):
        list(map_blocks(streams, 3, lambda block: None, threads))


def test_an_error_of_ours_is_not_hidden() -> None:
    def work(block: Block) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(map_blocks(STREAMS, 4, work, 2))
