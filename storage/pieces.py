"""Long arrays of rows that lie elsewhere cut into pieces, of which this node's cache holds some.

A node holds what it uses: all pieces, or those of a few windows of the shuffle. What is held at a time lies in one file
for each array, made whole or not at all, so that a gather is one `take` from one memory map; and it is an entry of the
cache like any other: within its budget, shared by the processes of the node, not evicted while one has it mapped.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.files import PARTIAL_SUFFIX, partial_name, replace, sha256, with_checksum, without_checksum
from akd_dist.base.locks import file_lock
from akd_dist.storage.content import Arrays as Arrays, Content, Part, digest, inodes_of, lock_of, map_array, marks_of
from akd_dist.storage.node_cache import HEADER_BYTES, Keep, Progress, hold, make_room, name_entry, no_room

VERIFIED_FILE = "verified.json"
# Sets of pieces come and go, and locks are files that stay: so many of them for each array.
_LOCKS = 16

Span = tuple[int, int]
"""Consecutive rows: the first, and the one after the last."""


@dataclass(frozen=True)
class Field:
    """One of the arrays that are cut into pieces together."""

    name: str
    """Names its file."""
    dtype: str
    """As NumPy spells it."""
    shape: tuple[int, ...]
    """Of one row."""
    ragged: bool = False
    """Whether rows have different numbers of elements: the first column of the field `index` says how many."""

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of a row; of an element, where rows have different numbers of them."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Pieces:
    """Arrays of so many rows that lie elsewhere, cut into pieces of consecutive rows."""

    folder: Path
    """Where the cache holds what it does of them: `<cache root>/<kind>`."""
    key: str
    """Names their content, and the entries in that folder; without a dot."""
    rows: int
    """Rows of all pieces."""
    piece_rows: int
    """Rows of a piece; the last one may have fewer."""
    fields: tuple[Field, ...]
    """The arrays. The bytes of a piece are those of its rows of the first field, then of the second, and so on; unless
    `hashed` says otherwise."""
    fetch: Callable[[Sequence[int]], Iterator[Arrays]]
    """Whole pieces by number, in the order asked for: each field's rows of one, known to be what they should."""
    digests: Callable[[Sequence[int]], Sequence[str | None]]
    """The sha256 of each piece's bytes; None where it is not known before the piece is there."""
    tokens: Callable[[Sequence[int]], Sequence[str]] = lambda numbers: [""] * len(numbers)
    """What names each piece's object as it is now: one that has another than when it was fetched is fetched again."""
    what: str = "rows"
    """For messages: `the logits of view 3, rows`."""
    elements: Callable[[int], int] = lambda number: 0
    """How many elements the rows of a piece have of a ragged field."""
    hashed: Callable[[Arrays], Arrays] = lambda arrays: arrays
    """What the digest of a piece is over, of its rows of each field."""

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return -(-self.rows // self.piece_rows)

    def span(self, number: int) -> Span:
        """The rows of a piece."""
        return number * self.piece_rows, min((number + 1) * self.piece_rows, self.rows)

    def of_spans(self, spans: Sequence[Span]) -> list[int]:
        """The pieces that hold some spans of rows, ascending."""
        found = set[int]()
        for start, stop in spans:
            found.update(range(start // self.piece_rows, -(-stop // self.piece_rows)))
        return sorted(found)

    def nbytes(self, numbers: Sequence[int]) -> int:
        """Bytes that some pieces take in the cache."""
        return sum(self.length(field, numbers) * field.row_bytes + HEADER_BYTES for field in self.fields)

    def field_bytes(self, name: str) -> int:
        """Bytes of all rows of a field."""
        (field,) = (one for one in self.fields if one.name == name)
        return self.length(field, range(self.count)) * field.row_bytes

    def length(self, field: Field, numbers: Sequence[int]) -> int:
        """Rows of some pieces; of a ragged field their elements."""
        if field.ragged:
            return sum(map(self.elements, numbers))
        return sum(stop - start for start, stop in map(self.span, numbers))

    def entry(self, numbers: Sequence[int]) -> Path:
        """Where the cache holds just these."""
        if len(numbers) == self.count:
            return self.folder / self.key
        name = sha256(np.asarray(numbers, dtype="<i8").tobytes())[:24]
        return self.folder / f"{self.key}-{int(name[:2], 16) % _LOCKS}.{name}"


@dataclass(frozen=True, eq=False)
class Held:
    """Some pieces as this node holds them, mapped into memory; not evicted while one of the arrays is alive."""

    pieces: Pieces
    numbers: tuple[int, ...]
    """Which ones, ascending."""
    arrays: dict[str, npt.NDArray[Any]]
    """By field: the rows of these pieces, one piece after the other."""
    content: Content
    """What they must hash to: hashed by a `Guard`, and not here."""

    @property
    def whole(self) -> bool:
        """Whether all pieces are there, so that a row stands where its number says."""
        return self._first is None

    @functools.cached_property
    def _first(self) -> npt.NDArray[np.int64] | None:
        """What to add to a row of each piece to have its place in the arrays; None where all pieces are there."""
        if len(self.numbers) == self.pieces.count:
            return None
        first = np.full(self.pieces.count, np.iinfo(np.int64).min)
        numbers = np.asarray(self.numbers)
        first[numbers] = (np.arange(len(numbers)) - numbers) * self.pieces.piece_rows
        return first

    def take(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of a field by number, in the order asked for.

        Raises:
            IndexError: some are not held.
        """
        return self.arrays[name].take(self.places(rows), axis=0)

    def places(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where rows stand in the arrays.

        Some that are not held have places that are none.
        """
        first = self._first
        return rows if first is None else rows + first[rows // self.pieces.piece_rows]

    @functools.cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where the elements of each row end in a ragged field, in the order of the arrays."""
        return np.cumsum(self.arrays["index"][:, 0])

    def has(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether all of some rows are held."""
        first = self._first
        return first is None or bool((first[rows // self.pieces.piece_rows] > np.iinfo(np.int64).min).all())


class PieceArray:
    """A field of pieces as an array of all its rows: those that are held are gathered, others are fetched each time.

    Args:
        pieces: of which it is one field.
        field: which.
        held: gives what is held now.
    """

    def __init__(self, pieces: Pieces, field: str, held: Callable[[], Held | None] = lambda: None) -> None:
        (self._field,) = (one for one in pieces.fields if one.name == field)
        self._place, self._pieces, self._held = pieces.fields.index(self._field), pieces, held

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (self._pieces.rows, *self._field.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As of an array."""
        return np.dtype(self._field.dtype)

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """As of an array."""
        return self._pieces.rows * self._field.row_bytes

    def __len__(self) -> int:
        return self._pieces.rows

    def __array__(self, *given: Any, **named: Any) -> npt.NDArray[Any]:
        raise TypeError("an array in pieces is read by rows, and not as a whole")

    def take(
        self, indices: npt.ArrayLike, axis: int | None = 0, out: None = None, mode: str = "raise"
    ) -> npt.NDArray[Any]:
        """Rows by number, in the order asked for, as `ndarray.take` along the first axis; negative ones are refused.

        Raises:
            IndexError: there is no such row.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if (axis or 0) != 0 or (axis is None and self.ndim > 1) or out is not None or mode != "raise" or rows.ndim != 1:
            raise TypeError("of an array in pieces rows are taken, by a list of their numbers")
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        held = self._held()
        if held is not None and held.has(rows):
            return held.take(self._field.name, rows)
        return self._fetched(rows)

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        if isinstance(key, slice):
            return self.take(np.arange(*key.indices(len(self))))
        if isinstance(key, int | np.integer):
            row: npt.NDArray[Any] = self.take([range(len(self))[int(key)]])[0]
            return row
        return self.take(key)

    def _fetched(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of which some are not held: their pieces are fetched for this, one after the other, and not kept."""
        found = np.empty((len(rows), *self._field.shape), self.dtype)
        owners = rows // self._pieces.piece_rows
        numbers = np.unique(owners).tolist()
        for number, arrays in zip(numbers, self._pieces.fetch(numbers), strict=True):
            wanted = owners == number
            found[wanted] = arrays[self._place].take(rows[wanted] - self._pieces.span(number)[0], axis=0)
        return found


def hold_pieces(
    pieces: Pieces, numbers: Sequence[int], *, budget: int | None = None, on_progress: Progress | None = None
) -> Held:
    """Pieces by number, ascending, as this node holds them: fetched unless they are there, once for all processes.

    The sources are looked at every time, as far as tokens tell: a piece that has another than when it was fetched is
    fetched again, and is refused where it is no longer what it was. What is held is not read here.

    Args:
        budget: bytes that all entries of the cache together may take; None for the default budget.
        on_progress: called with how many pieces are fetched, and of how many.

    Raises:
        AkdError: what `fetch` raises.
        MachineError: no room within the budget or on the disk; names need, free and budget.
    """
    entry = pieces.entry(numbers)
    # One process fetches; the others of this node wait here, and then find what it fetched.
    with file_lock(lock_of(entry), what=f"{pieces.what} in {entry.parent}"):
        # Held before it is looked at, so that no other process evicts the entry between the look and the mapping.
        with hold(entry) as keep:
            noted = _noted(pieces, numbers, entry)
            if noted is not None:
                _check_again(pieces, numbers, entry, noted, on_progress)
                return _mapped(pieces, numbers, entry, noted)
        # The hold was given back before: a new entry has a new `in-use` file, of which a lock on the old one says
        # nothing.
        noted, keep = _make(pieces, numbers, entry, budget, on_progress)
        try:
            return _mapped(pieces, numbers, entry, noted)
        finally:
            keep.release()


def resting(pieces: Pieces, marks: Collection[str]) -> list[Held]:
    """What is held of pieces in files that have some of these marks, see `content.marks_of`; nothing is fetched."""
    found = []
    for entry in pieces.folder.glob(f"{pieces.key}*"):
        of_these = entry.name == pieces.key or entry.name.startswith(f"{pieces.key}-")
        files = [_file(entry, field) for field in pieces.fields]
        if entry.name.endswith((PARTIAL_SUFFIX, ".lock")) or not of_these or not set(marks_of(files)) & set(marks):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError), hold(entry):
            numbers = without_checksum((entry / VERIFIED_FILE).read_bytes())["pieces"]
            if (noted := _noted(pieces, numbers, entry)) is not None:
                found.append(_mapped(pieces, numbers, entry, noted))
    return found


def _make(
    pieces: Pieces, numbers: Sequence[int], entry: Path, budget: int | None, on_progress: Progress | None
) -> tuple[dict[str, Any], Keep]:
    """Fetch pieces into a new entry; what was noted of it, and the hold that keeps it."""
    for left in entry.parent.glob(f"{entry.name}.*{PARTIAL_SUFFIX}"):  # ours is the only live one: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(entry, ignore_errors=True)  # somebody may be evicting it
    need, building = pieces.nbytes(numbers), partial_name(entry)
    try:
        make_room(entry.parent.parent, need, budget, reserve=lambda: _allocate(pieces, numbers, building))
        tokens = list(pieces.tokens(numbers))  # before reading, so that no change is missed
        digests = _fill(pieces, numbers, building, on_progress)
        noted = {"files": _tokens_of(pieces, building), "tokens": tokens, "digests": digests, "pieces": list(numbers)}
        # Noted before the entry has its name, so that whoever finds the entry finds its hashes in it.
        _note(building, noted)
        return noted, name_entry(building, entry)
    except OSError as error:
        raise no_room(error, entry, need) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _allocate(pieces: Pieces, numbers: Sequence[int], folder: Path) -> None:
    """Make each field's file, with its header, as large as it will be: where the disk is full, that is told at once."""
    folder.mkdir(parents=True)
    for field in pieces.fields:
        length = pieces.length(field, numbers)
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(field.dtype)), "fortran_order": False}
        with open(_file(folder, field), "xb") as handle:
            np.lib.format.write_array_header_1_0(handle, {**head, "shape": (length, *field.shape)})
            handle.flush()
            os.posix_fallocate(handle.fileno(), 0, handle.tell() + length * field.row_bytes)


def _fill(pieces: Pieces, numbers: Sequence[int], folder: Path, on_progress: Progress | None) -> list[str]:
    """Write each field's rows behind its header; the sha256 of each piece."""
    with contextlib.ExitStack() as files:
        handles = []
        for field in pieces.fields:
            handle = files.enter_context(open(_file(folder, field), "r+b"))
            np.lib.format.read_magic(handle)
            np.lib.format.read_array_header_1_0(handle)
            handles.append(handle)
        digests = []
        fetched = zip(numbers, pieces.digests(numbers), pieces.fetch(numbers), strict=True)
        for done, (_, known, arrays) in enumerate(fetched, 1):
            for handle, array in zip(handles, arrays, strict=True):
                handle.write(np.ascontiguousarray(array).data)
            digests.append(known or digest(pieces.hashed(arrays)))
            if on_progress is not None:
                on_progress(done, len(numbers))
    for field in pieces.fields:
        # From here on a stray write is refused, unless it is root's.
        _file(folder, field).chmod(0o444)
    return digests


def _check_again(
    pieces: Pieces, numbers: Sequence[int], entry: Path, noted: dict[str, Any], on_progress: Progress | None
) -> None:
    """Fetch every piece again whose object is another one than when it was fetched."""
    tokens = list(pieces.tokens(numbers))
    changed = [number for number, now, then in zip(numbers, tokens, noted["tokens"], strict=True) if now != then]
    for done, _ in enumerate(pieces.fetch(changed), 1):
        if on_progress is not None:
            on_progress(done, len(changed))
    if changed:
        _note(entry, noted | {"tokens": tokens})


def _note(entry: Path, noted: dict[str, Any]) -> None:
    # Not durable: where a loss of power takes the note, the pieces are fetched once more.
    replace(entry / VERIFIED_FILE, with_checksum(noted), durable=False)


def _noted(pieces: Pieces, numbers: Sequence[int], entry: Path) -> dict[str, Any] | None:
    """What was noted of an entry; None where there is none, not a whole one, or not the files that were written.

    Whether the files hold what they should is not looked at.
    """
    try:
        noted = without_checksum((entry / VERIFIED_FILE).read_bytes())
        for field in pieces.fields:
            array, length = map_array(_file(entry, field)), pieces.length(field, numbers)
            if (array.shape, array.dtype) != ((length, *field.shape), np.dtype(field.dtype)):
                return None
        whole = len(noted["digests"]) == len(noted["tokens"]) == len(numbers)
        known = zip(pieces.digests(numbers), noted["digests"], strict=True)
        right = whole and noted["pieces"] == list(numbers) and all(one in (None, other) for one, other in known)
        return noted if right and noted["files"] == _tokens_of(pieces, entry) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tokens_of(pieces: Pieces, entry: Path) -> list[list[int]]:
    stats = [_file(entry, field).stat() for field in pieces.fields]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _file(entry: Path, field: Field) -> Path:
    return entry / f"{field.name}.npy"


def _mapped(pieces: Pieces, numbers: Sequence[int], entry: Path, noted: dict[str, Any]) -> Held:
    files = tuple(_file(entry, field) for field in pieces.fields)
    arrays = {}
    for field, file in zip(pieces.fields, files, strict=True):
        with hold(entry) as keep:
            mapped = map_array(file)
            keep.until_unmapped(mapped)
        # A plain array: whatever is taken from an `np.memmap` is made a new object of its class.
        arrays[field.name] = np.asarray(mapped)

    def parts() -> Iterator[Part]:
        ends = [0] * len(pieces.fields)
        for number, sealed in zip(numbers, noted["digests"], strict=True):
            start, stop = pieces.span(number)
            firsts, ends = (
                ends,
                [end + pieces.length(field, [number]) for field, end in zip(pieces.fields, ends, strict=True)],
            )
            places = zip(arrays.values(), firsts, ends, strict=True)
            of_piece = tuple(one[first:end] for one, first, end in places)
            yield Part(f"{pieces.what} {start:,} to {stop - 1:,}", pieces.hashed(of_piece), sealed)

    return Held(pieces, tuple(numbers), arrays, Content(files, parts, inodes_of(files)))
