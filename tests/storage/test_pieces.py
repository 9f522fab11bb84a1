"""Arrays in pieces: what a node holds of them is what they are, once, within its budget; anything else is fetched."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from akd_dist.base.errors import CorruptCacheError, MachineError
from akd_dist.data.rows import BLOCK_ROWS, fingerprint
from akd_dist.storage.content import digest
from akd_dist.storage.node_cache import make_room
from akd_dist.storage.pieces import Arrays, Field, Held, PieceArray, Pieces, hold_pieces

N, PIECE = 1000, 64
INPUTS = np.random.default_rng(0).integers(0, 256, (N, 2, 3), dtype=np.uint8)
LABELS = np.arange(N) * 7


@dataclass
class Source:
    """Where pieces lie; it notes which are fetched."""

    token: dict[int, str] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)
    fails_at: int | None = None

    def piece(self, number: int) -> Arrays:
        rows = slice(number * PIECE, (number + 1) * PIECE)
        return INPUTS[rows], LABELS[rows]

    def fetch(self, numbers: Sequence[int]) -> Iterator[Arrays]:
        for number in numbers:
            if number == self.fails_at:
                raise MachineError("the storage does not answer")
            self.fetched.append(number)
            yield self.piece(number)

    def pieces(self, folder: Path, *, known: bool = True) -> Pieces:
        return Pieces(
            folder / "rows",
            "k",
            N,
            PIECE,
            (Field("inputs", "uint8", (2, 3)), Field("labels", "int64", ())),
            self.fetch,
            lambda numbers: [digest(self.piece(number)) if known else None for number in numbers],
            lambda numbers: [self.token.get(number, "") for number in numbers],
        )


ALL = list(range(-(-N // PIECE)))


def same(held: Held, rows: np.ndarray) -> bool:
    """Whether rows of what is held are those of the arrays."""
    return np.array_equal(held.take("inputs", rows), INPUTS[rows]) and np.array_equal(
        held.take("labels", rows), LABELS[rows]
    )


@pytest.mark.parametrize("known", [True, False], ids=["known digests", "unknown"])
def test_all_pieces_are_one_array(known: bool, tmp_path: Path) -> None:
    source = Source()
    pieces, steps = source.pieces(tmp_path, known=known), list[tuple[int, int]]()
    held = hold_pieces(pieces, ALL, on_progress=lambda done, of: steps.append((done, of)))
    np.testing.assert_array_equal(held.arrays["inputs"], INPUTS)
    np.testing.assert_array_equal(held.arrays["labels"], LABELS)
    assert not held.arrays["inputs"].flags.writeable
    assert same(held, np.random.default_rng(1).permutation(N))
    held.content.verify()
    again = hold_pieces(source.pieces(tmp_path), ALL)
    assert same(again, np.arange(N))
    assert source.fetched == ALL
    assert steps == [(done, len(ALL)) for done in range(1, len(ALL) + 1)]
    assert {path.name for path in (tmp_path / "rows" / "k").iterdir()} == {
        "in-use",
        "inputs.npy",
        "labels.npy",
        "verified.json",
    }


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, len(ALL) - 1), min_size=1))
def test_some_pieces_are_gathered_by_the_number_of_the_row(
    tmp_path_factory: pytest.TempPathFactory, wanted: set[int]
) -> None:
    source = Source()
    pieces = source.pieces(tmp_path_factory.mktemp("cache"))
    held = hold_pieces(pieces, sorted(wanted))
    there = np.concatenate([np.arange(*pieces.span(number)) for number in sorted(wanted)])
    assert same(held, np.random.default_rng(0).permutation(there))
    assert held.has(there)
    held.content.verify()
    for row in set(range(N)) - set(there.tolist()):
        assert not held.has(np.array([row]))
    missing = np.setdiff1d(np.arange(N), there)[:1]
    if len(missing):
        with pytest.raises(IndexError):
            held.take("labels", np.append(there, missing))
    assert source.fetched == sorted(wanted)


def test_which_pieces_hold_which_rows(tmp_path: Path) -> None:
    pieces = Source().pieces(tmp_path)
    assert pieces.count == 16
    assert pieces.span(15) == (960, 1000)
    assert pieces.of_spans([(0, 1), (63, 65), (640, 641)]) == [0, 1, 10]
    assert pieces.of_spans([(0, N)]) == ALL
    assert pieces.nbytes(ALL) == INPUTS.nbytes + LABELS.nbytes + 2 * 4096
    names = {pieces.entry([one]).name for one in ALL} | {pieces.entry(ALL).name}
    assert len(names) == 17


def test_a_piece_is_what_a_block_of_rows_hashes_to(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (BLOCK_ROWS + 5, 2), dtype=np.uint8), np.arange(BLOCK_ROWS + 5)
    _, blocks = fingerprint(*rows, classes=10**6)
    pieces = Pieces(
        tmp_path,
        "k",
        BLOCK_ROWS + 5,
        BLOCK_ROWS,
        (Field("inputs", "uint8", (2,)), Field("labels", "int64", ())),
        lambda numbers: ((rows[0][s : s + BLOCK_ROWS], rows[1][s : s + BLOCK_ROWS]) for s in (0, BLOCK_ROWS)),
        lambda numbers: [blocks[number] for number in numbers],
    )
    hold_pieces(pieces, [0, 1]).content.verify()


# ---- as an array


def test_an_array_in_pieces_reads_as_an_array(tmp_path: Path) -> None:
    source = Source()
    pieces = source.pieces(tmp_path)
    now: list[Held | None] = [None]
    inputs, labels = (PieceArray(pieces, name, lambda: now[0]) for name in ("inputs", "labels"))
    rows = np.random.default_rng(2).integers(0, N, 300)
    for now[0] in (None, hold_pieces(pieces, [0, 5]), hold_pieces(pieces, ALL)):
        for array, whole in ((inputs, INPUTS), (labels, LABELS)):
            assert (array.shape, array.dtype, array.ndim, array.nbytes, len(array)) == (
                whole.shape,
                whole.dtype,
                whole.ndim,
                whole.nbytes,
                N,
            )
            np.testing.assert_array_equal(array.take(rows, axis=0), whole[rows])
            np.testing.assert_array_equal(np.take(array, rows, axis=0), whole[rows])
            for part in (slice(3, 70), slice(None, 5), slice(990, 2000), slice(0, 0), slice(0, 100, 7)):
                np.testing.assert_array_equal(array[part], whole[part])
            np.testing.assert_array_equal(array[rows], whole[rows])
            np.testing.assert_array_equal(array[[7]], whole[[7]])
            np.testing.assert_array_equal(array[-1], whole[-1])
    source.fetched.clear()
    inputs.take(rows)
    assert source.fetched == []  # all is held
    now[0] = None
    inputs.take([3, 70, 4])
    assert source.fetched == [0, 1]
    for wrong in ([N], [-1]):
        with pytest.raises(IndexError):
            inputs.take(wrong)
    with pytest.raises(TypeError):
        np.asarray(inputs)
    with pytest.raises(TypeError):
        inputs.take([0], axis=1)


# ---- what may happen


def test_a_flip_is_found_and_the_pieces_are_fetched_again(tmp_path: Path) -> None:
    source = Source()
    pieces = source.pieces(tmp_path)
    hold_pieces(pieces, [2, 3])
    path = pieces.entry([2, 3]) / "inputs.npy"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-5] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CorruptCacheError, match=r"inputs\.npy .* is no longer") as refused:
        hold_pieces(pieces, [2, 3]).content.verify()
    assert "rows 192 to 255" in str(refused.value.got)
    hold_pieces(pieces, [2, 3]).content.verify()
    assert source.fetched == [2, 3] * 2


def test_files_that_were_changed_are_made_anew(tmp_path: Path) -> None:
    source = Source()
    pieces = source.pieces(tmp_path)
    for spoil in ("cut", "touched", "note", "gone"):
        hold_pieces(pieces, [1])
        source.fetched.clear()
        entry = pieces.entry([1])
        (entry / "labels.npy").chmod(0o644)
        match spoil:
            case "cut":
                os.truncate(entry / "labels.npy", 200)
            case "touched":
                os.utime(entry / "labels.npy", (1, 1))
            case "note":
                (entry / "verified.json").write_text("{}")
            case "gone":
                (entry / "inputs.npy").unlink()
        held = hold_pieces(pieces, [1])
        assert source.fetched == [1], spoil
        assert same(held, np.arange(64, 128))


def test_a_piece_of_another_object_is_fetched_again_and_only_it(tmp_path: Path) -> None:
    source = Source()
    hold_pieces(source.pieces(tmp_path), ALL)
    source.token[3] = "another"
    for _ in range(2):
        hold_pieces(source.pieces(tmp_path), ALL)
    assert source.fetched == [*ALL, 3]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    source = Source(fails_at=7)
    pieces = source.pieces(tmp_path)
    with pytest.raises(MachineError, match="does not answer"):
        hold_pieces(pieces, ALL)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["k.lock"]
    left = tmp_path / "rows" / "k.0123456789ab.partial"
    left.mkdir()
    source.fails_at = None
    assert same(hold_pieces(pieces, ALL), np.arange(N))
    assert not left.exists()


def test_pieces_are_fetched_once_for_all_that_ask(tmp_path: Path) -> None:
    source, found = Source(), list[bool]()
    ask = lambda: found.append(same(hold_pieces(source.pieces(tmp_path), [4, 9]), np.arange(256, 320)))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
    assert source.fetched == [4, 9]


def test_pieces_keep_within_the_budget(tmp_path: Path) -> None:
    source = Source()
    pieces = source.pieces(tmp_path)
    budget = pieces.nbytes([0]) + 2000  # what is there takes less than is asked for: 1,300 bytes, and its note
    kept = hold_pieces(pieces, [0], budget=budget).arrays["labels"][3:5]  # a view of it keeps it as well
    for number in (1, 2):
        hold_pieces(pieces, [number], budget=budget)
        gc.collect()
    assert [pieces.entry([number]).exists() for number in (0, 1, 2)] == [True, False, True]
    with pytest.raises(MachineError) as refused:
        hold_pieces(pieces, ALL, budget=budget)
    assert f"{pieces.nbytes(ALL):,} bytes within a budget of {budget:,}" in str(refused.value.expected)
    assert kept.tolist() == LABELS[3:5].tolist()
    del kept
    gc.collect()
    make_room(tmp_path, budget, budget)
    assert not list((tmp_path / "rows").glob("*/labels.npy"))


def test_other_content_is_never_taken_for_what_is_asked(tmp_path: Path) -> None:
    """As where somebody put another cache's folder in place: what must be known beforehand is compared."""
    source = Source()
    hold_pieces(source.pieces(tmp_path), [0])
    other = replace(source.pieces(tmp_path), digests=lambda numbers: ["0" * 64 for _ in numbers])
    hold_pieces(other, [0])
    assert source.fetched == [0, 0]
