"""Threads ahead and behind: in order, bounded, and whatever goes wrong in one of them is raised where it is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from akd_dist.base.threads import Behind, made_ahead, within


def test_items_are_made_ahead_by_another_thread_and_no_more_than_so_many() -> None:
    made: list[int] = []
    threads: set[str] = set()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            threads.add(threading.current_thread().name)
            yield number

    with contextlib.closing(made_ahead(items(), "views", 2)) as ahead:
        for number in ahead:
            assert len(made) <= number + 3  # this one, and two that were begun
    assert made == list(range(6))
    assert {name.partition("_")[0] for name in threads} == {"views"}


def test_an_error_is_raised_in_its_turn_with_its_cause() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise SystemExit("stop") from ValueError("why")

    ahead = made_ahead(items(), "views")
    assert next(ahead) == 0
    with pytest.raises(SystemExit, match="stop") as raised:
        next(ahead)
    assert isinstance(raised.value.__cause__, ValueError)
    assert not _alive("views")


def test_whoever_leaves_early_leaves_no_thread_and_closes_what_was_read() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1_000)
        finally:
            closed.set()

    with contextlib.closing(made_ahead(items(), "views")) as ahead:
        next(ahead)
    assert closed.is_set()
    assert not _alive("views")


def test_work_behind_is_done_in_order_and_waited_for() -> None:
    done: list[int] = []
    with Behind(2, "publishing") as behind:
        for number in range(5):
            behind.put(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == list(range(5))
    assert not _alive("publishing")


def test_whoever_brings_more_than_is_behind_waits() -> None:
    gate, done = threading.Event(), list[int]()
    with Behind(1, "publishing") as behind:
        behind.put(_waits(gate, done))
        late = threading.Thread(target=behind.put, args=[lambda: done.append(1)])
        late.start()
        late.join(0.05)
        assert late.is_alive()
        gate.set()
        late.join()
    assert done == [0, 1]


@pytest.mark.parametrize("more", [0, 10])
def test_nothing_is_done_after_an_error(more: int) -> None:
    """What waits may rest on what failed: rows that turned out to be wrong."""
    gate, done = threading.Event(), list[int]()

    def fail() -> None:
        gate.wait()
        raise ValueError("wrong rows")

    def work() -> None:
        with Behind(3, "publishing") as behind:
            behind.put(fail)
            behind.put(lambda: done.append(1))
            gate.set()
            for _ in range(more):
                behind.put(lambda: done.append(2))

    with pytest.raises(ValueError, match="wrong rows"):
        work()
    assert not done
    assert not _alive("publishing")


def test_an_error_of_its_own_drops_what_was_not_begun() -> None:
    gate, done = threading.Event(), list[int]()

    def work() -> None:
        with Behind(3, "publishing") as behind:
            behind.put(_waits(gate, done))
            behind.put(lambda: done.append(1))
            threading.Timer(0.05, gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert done == [0]


def _waits(gate: threading.Event, done: list[int]) -> Callable[[], None]:
    def act() -> None:
        gate.wait()
        done.append(0)

    return act


def _alive(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{name}_")]


def test_code_of_others_is_ended_where_it_computes_for_too_long() -> None:
    def around() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"more than 0\.1 seconds"):
        within(0.1, around)
    while _alive("within"):  # it is ended between two of its instructions
        pass
    assert within(0.1, lambda: 3) == 3
    with pytest.raises(SystemExit, match="stop"):
        within(0.1, lambda: exec("raise SystemExit('stop')"))
