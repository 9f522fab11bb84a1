"""What is read comes and goes: the next is fetched meanwhile, what is left is hashed once more, and then let go."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.errors import CorruptCacheError, MachineError
from akd_dist.base.files import stamp_of
from akd_dist.storage import content, holder as holder_module
from akd_dist.storage.content import Guard, marks_of
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.holder import Holder
from akd_dist.storage.node_cache import _used, evict
from akd_dist.storage.pieces import Pieces, hold_pieces, resting
from akd_dist.storage.reader import open_store
from tests import stores
from tests.storage.test_pieces import Source, same


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def pieces(source: Source, tmp_path: Path) -> Pieces:
    return source.pieces(tmp_path)


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    with Guard([], tmp_path / "vouched") as made:
        yield made


def files_of(pieces: Pieces, numbers: list[int]) -> list[Path]:
    return [pieces.entry(numbers) / f"{field.name}.npy" for field in pieces.fields]


def flip(path: Path) -> None:
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that no time tells anything of: as where a disk lies."""

    def stamp(path: Path) -> Any:
        found = stamp_of(path)
        return found and [found[0], 10**18, 10**18, found[3]]

    monkeypatch.setattr(content, "stamp_of", stamp)
    monkeypatch.setattr(content, "SHARE", 1e9)


# ---- a guard of what comes and goes


@pytest.mark.usefixtures("settled")
def test_what_is_left_is_hashed_once_more_and_let_go(pieces: Pieces, guard: Guard) -> None:
    held = hold_pieces(pieces, [1, 2])
    guard.add(held.content)
    marks = marks_of(files_of(pieces, [1, 2]))
    assert guard.vouch() == []  # hashed since it was asked
    assert guard.vouch() == marks == guard.marks  # and this time before
    guard.leave(held.content)
    del held
    assert guard.vouch() == guard.marks == []
    assert guard.remembers([*marks, "another"]) == set(marks)
    gc.collect()
    evict(pieces.entry([1, 2]))  # nobody holds it
    assert not pieces.entry([1, 2]).exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("left", [False, True])
def test_bytes_that_rotted_while_they_were_read_are_found(left: bool, pieces: Pieces, guard: Guard) -> None:
    held = hold_pieces(pieces, [1, 2])
    guard.add(held.content)
    guard.settle()
    flip(files_of(pieces, [1, 2])[0])
    if left:
        guard.leave(held.content)
        with pytest.raises(CorruptCacheError, match=r"inputs\.npy"):
            guard.vouch()
        assert guard.remembers(marks_of(files_of(pieces, [1, 2]))) == set()
    else:  # nobody looks again so soon, and whoever keeps something is told what it rests on
        assert guard.vouch() == marks_of(files_of(pieces, [1, 2]))


@pytest.mark.usefixtures("settled")
def test_what_another_thread_leaves_meanwhile_makes_nobody_pass_over_the_rest(
    pieces: Pieces, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a thread that makes batches ahead does, between one checkpoint and the next."""
    first, second = (hold_pieces(pieces, numbers) for numbers in ([1], [2, 3]))
    for held in (first, second):
        guard.add(held.content)
    guard.settle()
    monkeypatch.setattr(content, "SHARE", 0.0)  # all is hashed again
    flip(files_of(pieces, [2, 3])[0])
    passes = content._Watched.passes

    def leaving(self: content._Watched) -> Iterator[None]:
        yield from passes(self)
        if threading.current_thread() is threading.main_thread() and self.content is first.content:
            guard.leave(first.content)
            while len(guard.marks) == 4:
                time.sleep(0.001)

    monkeypatch.setattr(content._Watched, "passes", leaving)
    with pytest.raises(CorruptCacheError, match=r"inputs\.npy"):
        guard.vouch()


def test_nobody_waits_for_what_another_thread_adds_meanwhile(
    pieces: Pieces, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (hold_pieces(pieces, numbers) for numbers in ([1], [2, 3]))
    passes = content._Watched.passes

    def adding(self: content._Watched) -> Iterator[None]:
        guard.add(second.content)
        yield from passes(self)

    monkeypatch.setattr(content._Watched, "passes", adding)
    guard.add(first.content)
    guard.settle()
    assert [one.due is None for one in guard._watched] == [True, False]


def test_what_was_touched_is_not_let_go_without_a_word(pieces: Pieces, guard: Guard) -> None:
    held = hold_pieces(pieces, [3])
    guard.add(held.content)
    guard.settle()
    files_of(pieces, [3])[1].chmod(0o600)
    guard.leave(held.content)
    with pytest.raises(CorruptCacheError, match="was touched while it was in use"):
        guard.vouch()


def test_what_is_remembered_has_a_bound(pieces: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_REMEMBERED_BYTES", 100)
    with Guard([], tmp_path / "vouched") as guard:
        for number in range(8):
            held = hold_pieces(pieces, [number])
            guard.add(held.content)
            guard.leave(held.content)
            guard.settle()
    assert (tmp_path / "vouched").stat().st_size < 200
    assert guard.remembers(marks_of(files_of(pieces, [7])))


def test_what_rests_on_files_finds_just_these(pieces: Pieces) -> None:
    for numbers in ([0], [1, 2], list(range(16))):
        hold_pieces(pieces, numbers)
    marks = [marks_of(files_of(pieces, numbers))[0] for numbers in ([1, 2], list(range(16)))]
    found = resting(pieces, marks)
    assert sorted(len(held.numbers) for held in found) == [2, 16]
    assert all(same(held, np.arange(64, 192)) for held in found)
    assert resting(pieces, ["0" * 20]) == []
    shutil.rmtree(pieces.folder)
    assert resting(pieces, marks) == []


# ---- a holder


def test_the_next_is_fetched_while_one_is_read(source: Source, pieces: Pieces, guard: Guard) -> None:
    holder = Holder()
    holder.guard = guard
    assert same(holder.move(pieces, [0, 1]), np.arange(128))
    holder.expect(pieces, [2])
    holder.expect(pieces, [2])
    assert same(holder.move(pieces, [2]), np.arange(128, 192))
    holder.move(pieces, [2])
    holder.expect(pieces, [5])
    holder.move(pieces, [7])  # something else is read than was thought
    assert source.fetched[:3] == [0, 1, 2]
    assert set(source.fetched[3:]) in ({7}, {5, 7})
    holder.leave()
    guard.vouch()
    assert guard.marks == []
    holder.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("wanted", [True, False])
def test_what_was_read_gives_its_place(
    wanted: bool, source: Source, pieces: Pieces, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for two: it is hashed before it goes, at once and not when Python looks for cycles."""
    monkeypatch.setattr(holder_module, "PATIENCE_SECONDS", 0.0)
    gc.disable()
    try:
        one_after_the_other(source, pieces, guard, wanted=wanted)
    finally:
        gc.enable()


def one_after_the_other(source: Source, pieces: Pieces, guard: Guard, *, wanted: bool) -> None:
    """Move from piece to piece; each time the next one is fetched meanwhile, or another one."""
    budget = pieces.nbytes([0]) + 800
    holder = Holder(budget)
    holder.guard = guard
    for number in range(4):
        assert same(holder.move(pieces, [number]), np.arange(*pieces.span(number)))
        holder.expect(pieces, [number + 1 if wanted else number + 5])
        assert holder._ahead is not None
        concurrent.futures.wait([holder._ahead[1]])
    holder.leave()
    guard.settle()
    holder.close()
    with pytest.raises(MachineError, match="no room in the cache"):
        Holder(200).move(pieces, [9])


def test_what_cannot_be_fetched_ahead_is_told_when_it_is_read(source: Source, pieces: Pieces) -> None:
    holder = Holder()
    holder.move(pieces, [0])
    source.fails_at = 1
    holder.expect(pieces, [1])
    with pytest.raises(MachineError, match="does not answer"):
        holder.move(pieces, [1])
    holder.close()


# ---- logits of a store


@pytest.mark.parametrize("windowed", [False, True])
def test_logits_are_those_of_the_view_whatever_is_held(windowed: bool, tmp_path: Path) -> None:
    store = stores.build(tmp_path / "stores")
    expected = stores.logits(stores.identity())
    view = 300 * 3 * 2 + 4096
    logits = StoredLogits(open_store(store.uri), tmp_path / "cache", 2, windowed=windowed, budget=2 * view - windowed)
    assert (logits.shape, logits.whole) == ((2, 300, 3), not windowed)
    with Guard([]) as guard:
        logits.watch(guard)
        for number, spans in ((0, [(0, 10)]), (1, [(250, 256)]), (0, [(280, 300)])):
            logits.move(number, spans)
            rows = np.concatenate([np.arange(*span) for span in spans])[::-1]
            np.testing.assert_array_equal(logits.take(rows), expected[number, rows])
            if windowed:
                with pytest.raises(IndexError):
                    logits.take(np.array([299 if rows[0] < 256 else 0]))  # of the other shard
        guard.vouch()
    logits.close()


def test_nothing_is_decoded_beside_what_fills_the_cache(tmp_path: Path) -> None:
    store, cache = stores.build(tmp_path / "stores"), tmp_path / "cache"
    logits = StoredLogits(open_store(store.uri), cache, 2, beside=10**6, budget=10**6 - 1)
    logits.decode()
    assert not list(cache.glob("logits/*"))
    logits.close()


def test_what_others_are_about_to_leave_is_waited_for(pieces: Pieces, guard: Guard, monkeypatch: Any) -> None:
    """Another worker of the node reads the group before, and then leaves it."""
    theirs = [hold_pieces(pieces, [0, 1])]
    room = _used(pieces.folder.parent) + pieces.nbytes([2, 3]) - 1
    waited = list[int]()

    def on_wait() -> None:
        waited.append(1)
        if len(waited) == 3:
            theirs.clear()
            gc.collect()

    monkeypatch.setattr(holder_module, "_POLL_SECONDS", 0.001)
    reading = Holder(room)
    reading.guard = guard
    assert reading.move(pieces, [2, 3], on_wait).numbers == (2, 3)
    assert len(waited) >= 3
    assert not pieces.entry([0, 1]).exists()
    reading.close()
    small = Holder(pieces.nbytes([0, 1]) - 1)
    small.guard = guard
    monkeypatch.setattr(holder_module, "PATIENCE_SECONDS", 1e9)
    with pytest.raises(MachineError, match="no room"):  # at once: it would not fit an empty cache
        small.move(pieces, [0, 1])
    small.close()
