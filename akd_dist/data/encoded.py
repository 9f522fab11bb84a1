"""Pictures as their files have them, an array-like of the pixels that they become: decoded when they are read.

A pool of threads decodes. Whoever reads batch after batch begins a few of them ahead (`ahead`), so that pixels are
there when they are wanted; which thread decodes what changes no bit and no order.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import PIL.Image
from PIL import features

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError
from akd_dist.data import pictures
from akd_dist.data.blocks import default_threads
from akd_dist.data.pictures import Crop
from akd_dist.storage.content import Arrays
from akd_dist.storage.pieces import Held, Pieces
from akd_dist.storage.row_documents import INDEX_COLUMNS

T = TypeVar("T")

COLUMNS = INDEX_COLUMNS
"""What the index says of each picture: its bytes, and the height and width that it is shown in."""
# Pictures that a thread decodes at a time: some milliseconds.
_TOGETHER = 4
# The fewest pictures that are decoded ahead for each thread, and the fewest batches.
_AHEAD_OF_THREAD, _BATCHES_AHEAD = 8, 2


class Stored(Protocol):
    """Where encoded pictures lie."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, and of their index."""

    @property
    def held(self) -> bool:
        """Whether all of them are on this node."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Given:
        """Pictures by number, int64 [n], in the order asked for: copied, so that their place is not read later."""

    def part(self, start: int, stop: int) -> Arrays:
        """Pictures start..stop - 1 as their digest goes over them: index, and bytes."""


@dataclass(frozen=True, eq=False)
class Given:
    """Encoded pictures in memory."""

    index: np.ndarray
    """int64 [n, COLUMNS]."""
    data: list[bytes]
    """Of each."""
    rows: np.ndarray
    """What they are called in messages, int64 [n]."""

    held = True

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, and of their index."""
        return sum(map(len, self.data)) + self.index.nbytes

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: np.ndarray) -> Given:
        """As `Stored.take`."""
        return Given(self.index[rows], [self.data[row] for row in rows.tolist()], self.rows[rows])

    def part(self, start: int, stop: int) -> Arrays:
        """As `Stored.part`."""
        return self.index[start:stop], np.frombuffer(b"".join(self.data[start:stop]), np.uint8)


@dataclass(frozen=True, eq=False)
class Mapped:
    """Encoded pictures one after the other in an array, and their index: both mapped into memory."""

    index: np.ndarray
    """int64 [n, COLUMNS]."""
    data: np.ndarray
    """uint8 [bytes]."""
    ends: np.ndarray | None = None
    """Where each ends, int64 [n], if somebody has reckoned that."""

    held = True

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, and of their index."""
        return self.data.nbytes + self.index.nbytes

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.index[:, 0]) if self.ends is None else self.ends

    def take(self, rows: np.ndarray) -> Given:
        """As `Stored.take`."""
        index, ends = self.index[rows], self._ends[rows]
        data = [
            self.data[end - size : end].tobytes() for end, size in zip(ends.tolist(), index[:, 0].tolist(), strict=True)
        ]
        return Given(index, data, rows)

    def part(self, start: int, stop: int) -> Arrays:
        """As `Stored.part`."""
        index = self.index[start:stop]
        first = int(self._ends[start - 1]) if start else 0
        return index, self.data[first : first + int(index[:, 0].sum())]


class InPieces:
    """Encoded pictures that lie elsewhere in pieces: those that are held are taken, others are fetched each time.

    Args:
        pieces: with the fields `index` and `inputs`.
        held: gives what is held now.
    """

    held = False

    def __init__(self, pieces: Pieces, held: Callable[[], Held | None] = lambda: None) -> None:
        self._pieces, self._now = pieces, held

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all of them, and of their index."""
        return self._pieces.field_bytes("index") + self._pieces.field_bytes("inputs")

    def __len__(self) -> int:
        return self._pieces.rows

    def take(self, rows: np.ndarray) -> Given:
        """As `Stored.take`."""
        held = self._now()
        if held is not None and held.has(rows):
            places = held.places(rows)
            found = Mapped(held.arrays["index"], held.arrays["inputs"], held.ends).take(places)
            return Given(found.index, found.data, rows)
        return self._fetched(rows)

    def part(self, start: int, stop: int) -> Arrays:
        """As `Stored.part`."""
        return self.take(np.arange(start, min(stop, len(self)))).part(0, stop - start)

    def _fetched(self, rows: np.ndarray) -> Given:
        index, data = np.empty((len(rows), COLUMNS), np.int64), [b""] * len(rows)
        owners = rows // self._pieces.piece_rows
        numbers = np.unique(owners).tolist()
        for number, arrays in zip(numbers, self._pieces.fetch(numbers), strict=True):
            wanted = np.flatnonzero(owners == number)
            found = Mapped(*arrays[:2]).take(rows[wanted] - self._pieces.span(number)[0])
            index[wanted] = found.index
            for at, one in zip(wanted.tolist(), found.data, strict=True):
                data[at] = one
        return Given(index, data, rows)


@dataclass(frozen=True, eq=False)
class Alike:
    """So many pictures that are all the same one: to measure with."""

    one: Given
    count: int

    held = True

    @property
    def nbytes(self) -> int:
        """Bytes that as many such pictures would take."""
        return self.one.nbytes * self.count

    def __len__(self) -> int:
        return self.count

    def take(self, rows: np.ndarray) -> Given:
        """As `Stored.take`."""
        return Given(np.repeat(self.one.index, len(rows), axis=0), self.one.data * len(rows), rows)

    def part(self, start: int, stop: int) -> Arrays:
        """As `Stored.part`."""
        return self.take(np.arange(start, min(stop, self.count))).part(0, stop - start)


class EncodedPictures:
    """Encoded pictures as an array-like of pixels, uint8 [n, channels, height, width].

    `np.asarray` decodes all of it. What is taken or sliced of it is another one, not decoded yet: a view may be drawn
    from the whole pictures (`views.view_of`), which are seldom of the size of the pixels.

    Args:
        stored: where the pictures lie.
        shape: of one input.
        image: how pictures become pixels.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, stored: Stored, shape: tuple[int, ...], image: recipe.Image) -> None:
        self.stored, self.image, self.shape = stored, image, (len(stored), *shape)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes as it is, encoded."""
        return self.stored.nbytes

    @property
    def held(self) -> bool:
        """Whether all of it is on this node."""
        return self.stored.held

    @property
    def size(self) -> int:
        """Numbers that it has once it is decoded."""
        return math.prod(self.shape)

    def take(self, indices: Any, axis: int | None = 0, out: None = None, mode: str = "raise") -> EncodedPictures:
        """Rows by number, in the order asked for.

        Raises:
            IndexError: there is no such row.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if axis != 0 or out is not None or mode != "raise" or rows.ndim != 1:
            raise TypeError("of encoded pictures rows are taken, by a list of their numbers")
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        return EncodedPictures(self.stored.take(rows), self.shape[1:], self.image)

    def __getitem__(self, key: Any) -> Any:
        """Others of the same kind; one picture, decoded, by its number."""
        if isinstance(key, slice):
            return self.take(np.arange(*key.indices(len(self))))
        if isinstance(key, int | np.integer):
            return np.asarray(self.take([range(len(self))[int(key)]]))[0]
        key = np.asarray(key)
        return self.take(np.flatnonzero(key) if key.dtype == np.bool_ else key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("encoded pictures are decoded into an array of their own")
        return self.begin()()[0].astype(dtype or self.dtype, copy=False)

    def as_array(self) -> np.ndarray:
        """The same by the type that it stands for."""
        return cast(np.ndarray, self)

    @property
    def meaning(self) -> dict[str, Any]:
        """What rows say of it, as JSON: its shape, and how pictures become pixels."""
        return meaning_of(self.shape[1:], self.image)

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths in which the whole pictures are shown, int64 [n]; they are in memory."""
        index = self._given.index
        return index[:, 1], index[:, 2]

    def begin(self, crops: Sequence[Sequence[Crop]] | None = None) -> Callable[[], list[np.ndarray]]:
        """Have the pool decode, and go on meanwhile: called, it waits for the rest, and gives the pixels.

        Args:
            crops: by view and picture, the part to be shown, of which the pixels are given for each view; None shows
                once what the recipe says. A picture is decoded once for all views that can be made from that.

        Raises:
            CorruptCacheError: when it is called: a picture cannot be decoded, which could be when it was prepared.
        """
        given = self._given
        pixels = [np.empty(self.shape, np.uint8) for _ in range(1 if crops is None else len(crops))]

        def work(first: int) -> None:
            for at in range(first, min(first + _TOGETHER, len(given))):
                parts = None if crops is None else [view[at] for view in crops]
                shown = self._decoded(given.data[at], int(given.rows[at]), parts)
                for view, one in zip(pixels, shown, strict=True):
                    view[at] = one

        working = [_pool().submit(work, first) for first in range(0, len(given), _TOGETHER)]

        def wait() -> list[np.ndarray]:
            for one in working:
                one.result()
            return pixels

        return wait

    @property
    def _given(self) -> Given:
        if isinstance(self.stored, Given):
            return self.stored
        return self.stored.take(np.arange(len(self)))

    def _decoded(self, data: bytes, row: int, crops: Sequence[Crop] | None) -> list[np.ndarray]:
        """uint8 [channels, height, width], of each crop."""
        channels, height, width = self.shape[1:]
        mode = "L" if channels == 1 else "RGB"

        def array(shown: PIL.Image.Image) -> np.ndarray:
            shown = shown if shown.mode == mode else shown.convert(mode)
            return np.asarray(shown).reshape(height, width, channels).transpose(2, 0, 1)

        try:
            if crops is not None:
                return [array(part) for part in pictures.cropped(data, self.image, crops, (height, width))]
            with pictures.open_picture(data) as picture:
                return [array(pictures.shown(picture, self.image))]
        except Exception as error:  # spoilt images make decoders raise all kinds
            raise CorruptCacheError(
                f"the picture of row {row} can no longer be decoded",
                got=f"{len(data):,} bytes: {error}",
                expected="a picture, as it was when the rows were prepared",
                next="the same command prepares the rows anew where they have changed",
            ) from error


def decoded_by() -> dict[str, str]:
    """Names and versions of what decodes pictures: other ones may make other pixels of the same bytes."""
    found = {"pillow": PIL.__version__}
    if features.check_feature("libjpeg_turbo"):
        found["libjpeg-turbo"] = str(features.version_feature("libjpeg_turbo"))
    for name in ("zlib", "webp"):
        if (version := features.version(name)) is not None:
            found[name] = str(version)
    return found


def meaning_of(shape: Sequence[int], image: recipe.Image) -> dict[str, Any]:
    """What rows say of pictures that stay encoded, as JSON: the part of their fingerprint that pixels have not."""
    return {"shape": list(shape), "rules": pictures.RULES, **image.written()}


def pictures_of(stored: Stored, meaning: dict[str, Any]) -> EncodedPictures:
    """Encoded pictures of which rows say this.

    Raises:
        ValueError: it speaks of other rules than there are.
    """
    said = dict(meaning)
    if said.pop("rules", None) != pictures.RULES:
        raise ValueError(f"pictures by other rules than {pictures.RULES}")
    return EncodedPictures(stored, tuple(said.pop("shape")), recipe.Image.model_validate(said))


def encoded_of(inputs: object) -> EncodedPictures | None:
    """What stands for an array of inputs where pictures stay encoded; None of an array."""
    return inputs if isinstance(inputs, EncodedPictures) else None


def begin(inputs: np.ndarray) -> Callable[[], np.ndarray]:
    """Have inputs decoded, as far as they are encoded: called, it gives them as an array."""
    encoded = encoded_of(inputs)
    if encoded is None:
        return lambda: inputs
    wait = encoded.begin()
    return lambda: wait()[0]


def batches_ahead(inputs: np.ndarray, batch: int) -> int:
    """How many batches of so many rows are begun before they are wanted; none of what is not encoded."""
    if encoded_of(inputs) is None:
        return 0
    return _batches(batch)


def _batches(batch: int) -> int:
    return max(_BATCHES_AHEAD, math.ceil(_AHEAD_OF_THREAD * default_threads() / batch))


def bytes_in_memory(inputs: np.ndarray) -> int:
    """Bytes that a row takes while it is decoded ahead, on average; 0 where none are."""
    if (encoded := encoded_of(inputs)) is None or not len(encoded):
        return 0
    return math.prod(encoded.shape[1:]) + encoded.nbytes // len(encoded)


def rows_ahead(batch: int) -> int:
    """How many rows are in memory of batches of so many: the one at hand, and those begun."""
    return (_batches(batch) + 1) * batch


def ahead(begun: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """What each gives that is begun, in order, so many of them begun before they are wanted."""
    waiting: deque[Callable[[], T]] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > count:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _pool() -> ThreadPoolExecutor:
    """The threads of this process, as many as it may run on: one that was forked has none of its parent's."""
    return _pool_of(os.getpid())


@functools.cache
def _pool_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(default_threads(), thread_name_prefix="decoding")
