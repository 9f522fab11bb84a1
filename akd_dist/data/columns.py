"""Columns of inputs -> arrays: encoded images, text, lists of numbers. Which columns there are, and what they hold.

A converter is made from the first row of a source and called with blocks of rows, by several threads at a time. What
it refuses in a block it blames on the block's first row: callers narrow a block that fails down to one row.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import framing, pictures
from akd_dist.data.encoded import COLUMNS, EncodedPictures, Given
from akd_dist.data.noted import MixedSizesError, Noted, lines_of
from akd_dist.data.schemas import input_kind, is_list, plain
from akd_dist.data.text import Tokenizer, Tokens

T = TypeVar("T")
TEXT_HINT = "say how text becomes tokens, with `data: text: {kind: bytes, length: 256}`"


@dataclass(frozen=True)
class Place:
    """Where values stand, for messages."""

    where: Callable[[int], str]
    """A row of the source."""
    columns: tuple[str, ...] = ()
    """Their columns, if they have names."""

    def __call__(self, row: int) -> str:
        """`row 7 of birds.parquet, column image`."""
        if not self.columns:
            return self.where(row)
        return f"{self.where(row)}, column{'s' * (len(self.columns) > 1)} {' and '.join(self.columns)}"

    def alone(self, number: int) -> Place:
        """One of its columns."""
        return Place(self.where, self.columns[number : number + 1])


class Inputs(Protocol):
    """One source's inputs -> arrays."""

    dtype: np.dtype[Any]
    """uint8, float32 or int32."""
    shape: tuple[int, ...]
    """Of one input."""
    tokens: Tokens | None
    """What ids mean, where inputs are text."""

    def __call__(self, columns: Sequence[Any], rows: np.ndarray) -> np.ndarray:
        """Inputs of these rows: [n, *shape]."""


class NotGreyError(Exception):
    """A coloured picture came after grey ones only: all of them are to be converted again, `Images.in_colour`."""


def inputs_of(
    columns: Sequence[Any],
    row: int,
    place: Place,
    shape: Sequence[int] | None,
    tokenizer: Tokenizer | None,
    image: recipe.Image,
) -> Inputs:
    """The converter of a source's inputs.

    Args:
        columns: the first row of each, of one array or two.
        row: its number, for messages.
        place: for messages.
        shape: what the recipe says one input has, if it does.
        tokenizer: None where the recipe says nothing of text.
        image: how images become pixels.

    Raises:
        RefusedError: nothing can be made of the columns, or not what the recipe says.
    """
    kind = _kind_of_values(columns[0])
    if kind is None:
        raise RefusedError(
            f"nothing can be made of the input in {place(row)}",
            got=f"type {getattr(columns[0], 'type', None) or columns[0].dtype}",
            expected="encoded images, text, or arrays of numbers",
        )
    if (kind == "text") != (tokenizer is not None) or (len(columns) == 2 and kind != "text"):
        raise _not_what_text_says(kind, len(columns), place, row)
    if tokenizer is not None:
        return _Texts(tokenizer, place)
    of_one = (columns[0], row, place, tuple(shape) if shape else None)
    return Images(*of_one, image) if kind == "images" else _Numbers(*of_one)


def _kind_of_values(column: Any) -> str | None:
    if isinstance(column, pa.Array | pa.ChunkedArray):
        return input_kind(column.type)
    if isinstance(column[0], Image.Image):
        return "images"
    return "numbers" if np.asarray(column[0]).dtype.kind in "uif" else None


def _not_what_text_says(kind: str, columns: int, place: Place, row: int) -> RefusedError:
    got = f"{kind} in {place(row)}"
    if kind == "text":
        return RefusedError(
            "the inputs are text, and data.text is missing", got=got, expected="data.text", next=TEXT_HINT
        )
    if columns == 2:
        return RefusedError(
            "two columns of inputs make a pair of texts, and these are no texts",
            got=got,
            expected="two columns of text",
            next="name one column in `input`",
        )
    return RefusedError(
        "data.text is given, and the inputs are not text",
        got=got,
        expected="a column of text",
        next="leave out data.text, or name the column of text in `input`",
    )


class Images:
    """Images, encoded or of Pillow -> uint8 [channels, height, width], all of one size, as `pictures` shows them.

    They have one channel if all of them are grey, else three. The first one stands for all until a coloured one comes.
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)
    tokens: Tokens | None = None

    def __init__(self, column: Any, row: int, place: Place, shape: tuple[int, ...] | None, image: recipe.Image) -> None:
        self._place, self._shape_said, self.image = place, shape is not None, image
        if shape is None:
            shape = self._read(self._given(column, row)[0], row, self._shape_of)
        self.shape: tuple[int, ...] = shape
        self.may_turn = not self._shape_said and shape[0] == 1 and image.channels is None
        """Whether a coloured image raises `NotGreyError`; else one is refused where the shape is that of grey ones."""
        self.come_encoded = not isinstance(column, list)
        """Whether they are bytes, and no images of Pillow."""
        self.encoded = False
        """Whether they stay as they are: decoded to see that they can be, and not made pixels."""
        self.noted = Noted()
        """Of those converted."""
        # Blocks are converted by several threads, and adding to a number is not one step.
        self._counting = threading.Lock()

    def in_colour(self) -> Images:
        """The same with three channels, unless the recipe says how many there are."""
        return self._turned((self.image.channels or 3, *self.shape[1:]))

    def as_first(self) -> Images:
        """The same that stays grey if its first image is: the others have to be as well."""
        return self._turned(self.shape)

    def afresh(self) -> Images:
        """The same, whose counts begin anew."""
        turned = self._turned(self.shape)
        turned.may_turn = self.may_turn
        return turned

    def kept_encoded(self) -> Images:
        """The same that stay encoded."""
        kept = self.afresh()
        kept.encoded = True
        return kept

    def mean_bytes(self, columns: Sequence[Any], rows: np.ndarray) -> int:
        """Bytes of encoded pictures, on average."""
        return max(1, sum(map(len, self._given(columns[0], rows[0]))) // len(rows))

    def _turned(self, shape: tuple[int, ...]) -> Images:
        turned = copy.copy(self)
        turned.shape, turned.may_turn, turned.noted = shape, False, Noted()
        turned._counting = threading.Lock()
        return turned

    def __call__(self, columns: Sequence[Any], rows: np.ndarray) -> np.ndarray:
        """Decode; memory is taken for images of the right size only.

        Raises:
            RefusedError: an image cannot be decoded, or has another size.
            NotGreyError: an image has colours, and all before it were grey.
        """
        given, noted = self._given(columns[0], rows[0]), Noted()
        if self.encoded:
            index = np.empty((len(rows), COLUMNS), np.int64)
            for number, row in enumerate(rows.tolist()):
                size, its = self._read(given[number], row, functools.partial(self._looked_at, row))
                index[number], noted = (len(given[number]), *size), noted + its
            made = EncodedPictures(Given(index, given, rows), self.shape, self.image).as_array()
        else:
            pixels = np.empty((len(rows), *self.shape[1:], self.shape[0]), dtype=self.dtype)
            for number, row in enumerate(rows.tolist()):
                decoded, its = self._read(given[number], row, functools.partial(self._decoded, row))
                pixels[number], noted = decoded.reshape(pixels.shape[1:]), noted + its
            made = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        with self._counting:
            self.noted += noted
        return made

    def sizes(self, columns: Sequence[Any], rows: np.ndarray) -> list[framing.Size]:
        """Height and width of pictures as they are, by their headers.

        Raises:
            RefusedError: there is no picture, or not one that can be read.
        """
        given = self._given(columns[0], rows[0])
        return [self._read(one, row, pictures.size) for one, row in zip(given, rows.tolist(), strict=True)]

    def _given(self, column: Any, row: int) -> list[Any]:
        """Images as the source has them: bytes, or those of Pillow."""
        if isinstance(column, list):
            return column
        column = plain(column)
        refuse_nulls(column, self._place, row)
        if pa.types.is_struct(column.type):
            column = plain(pc.struct_field(column, "bytes"))
            refuse_nulls(column, self._place, row, "where a struct holds a path alone, save it with the bytes embedded")
        encoded: list[bytes] = column.to_pylist()
        return encoded

    def _read(self, given: Any, row: int, read: Callable[[Image.Image], T]) -> T:
        try:
            if isinstance(given, Image.Image):
                return read(given)
            with pictures.open_picture(given) as picture:
                return read(picture)
        except (RefusedError, NotGreyError):
            raise
        except Exception as error:  # spoilt images make decoders raise all kinds
            reason = "of none of these formats" if isinstance(error, UnidentifiedImageError) else error
            raise RefusedError(
                f"cannot decode the image in {self._place(row)}",
                got=f"{len(given):,} bytes: {reason}" if isinstance(given, bytes) else reason,
                expected=f"an image of at most {pictures.MAX_PIXELS:,} pixels and 8 bits a channel, as "
                + ", ".join(pictures.FORMATS),
                next="remove the row, or write the image again",
            ) from error

    def _shape_of(self, picture: Image.Image) -> tuple[int, int, int]:
        shown = pictures.shown(picture, self.image)
        return (1 if shown.mode == "L" else 3, shown.height, shown.width)

    def _looked_at(self, row: int, picture: Image.Image) -> tuple[tuple[int, int], Noted]:
        """Height and width of a whole picture that can be decoded, and what is to be noted of it."""
        grey, noted = self._checked(row, picture)
        whole = pictures.whole(picture, self.image)
        self._check_size(row, grey, self.image.frame or (whole.height, whole.width))
        return (whole.height, whole.width), noted

    def _decoded(self, row: int, picture: Image.Image) -> tuple[np.ndarray, Noted]:
        """uint8 [height, width] or [height, width, 3], and what is to be noted of it."""
        grey, noted = self._checked(row, picture)
        shown = pictures.shown(picture, self.image)
        self._check_size(row, grey, (shown.height, shown.width))
        mode = "L" if grey else "RGB"
        return np.asarray(shown if shown.mode == mode else shown.convert(mode)), noted

    def _check_size(self, row: int, grey: bool, size: tuple[int, int]) -> None:
        """A PNG may tell at its end that its header lies."""
        if size != self.shape[1:]:
            raise self._mixed(row, (1 if grey else 3, *size))

    def _checked(self, row: int, picture: Image.Image) -> tuple[bool, Noted]:
        """Whether a picture becomes grey, and what is to be noted of it; it is refused if it is of no use."""
        # By the header first: no memory is taken for the pixels of an image that would be refused for its size anyway.
        grey = self.shape[0] == 1 and pictures.is_grey(picture, self.image)
        stored = pictures.size(picture)
        size = (1 if grey else 3, *(self.image.frame or stored))
        turns = self.may_turn and not grey
        expected = (3, *self.shape[1:]) if turns else self.shape
        if expected not in (size, (size[0], size[2], size[1])):
            raise self._mixed(row, size)
        if turns:
            raise NotGreyError
        return grey, Noted(int(pictures.has_frames(picture)), int(framing.enlarges(stored, self.image)))

    def _mixed(self, row: int, got: tuple[int, ...]) -> RefusedError:
        """What to say of another shape than that of all; of another size also how all are brought to one."""
        error = _mixed(self._place, row, got, self.shape, self._shape_said)
        if got[1:] == self.shape[1:] or self._shape_said:
            return error
        advice = framing.advice([min(got[1:]), min(self.shape[1:])])
        return MixedSizesError(error.what, got=error.got, expected=error.expected, next=advice)


def notes_of(inputs: Inputs, source: str) -> list[str]:
    """What a converter has done without refusing it, a line each; `source` is where the inputs come from."""
    return lines_of(inputs.noted, inputs.image, source) if isinstance(inputs, Images) else []


class _Texts:
    """Strings -> int32 ids, by the tokenizer of the recipe."""

    dtype: np.dtype[Any] = np.dtype(np.int32)

    def __init__(self, tokenizer: Tokenizer, place: Place) -> None:
        self._encode, self._place = tokenizer.encode, place
        self.shape: tuple[int, ...] = tokenizer.shape
        self.tokens: Tokens | None = tokenizer.tokens

    def __call__(self, columns: Sequence[Any], rows: np.ndarray) -> np.ndarray:
        """Tokenize."""
        return self._encode([self._texts(column, rows, self._place.alone(n)) for n, column in enumerate(columns)])

    @staticmethod
    def _texts(column: Any, rows: np.ndarray, place: Place) -> list[str]:
        column = plain(column)
        refuse_nulls(column, place, rows[0])
        try:
            texts: list[str] = column.to_pylist()
        except UnicodeDecodeError as error:
            raise RefusedError(f"text that is not UTF-8 in {place(rows[0])}", got=error, expected="UTF-8") from error
        if not all(text.strip() for text in texts):
            raise RefusedError(
                f"empty text in {place(rows[0])}",
                got=repr(texts[0]),
                expected="at least one character that is not a space",
                next="remove the row, or fill it in",
            )
        return texts


class _Numbers:
    """Lists and arrays of numbers, all of one shape: uint8 if they are stored so, else float32."""

    tokens: Tokens | None = None

    def __init__(self, column: Any, row: int, place: Place, shape: tuple[int, ...] | None) -> None:
        self._place, self._shape_said = place, shape is not None
        first = self._values(column, row)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if first.dtype == np.uint8 else np.float32)
        self.shape: tuple[int, ...] = shape or first.shape[1:]
        if not math.prod(self.shape) or first.ndim == 1:
            raise RefusedError(
                f"the input is {'a single number' if first.ndim == 1 else 'empty'} in {place(row)}",
                got=f"shape {list(first.shape[1:])}",
                expected="an array of numbers",
                next="give each row one list of all its numbers",
            )

    def __call__(self, columns: Sequence[Any], rows: np.ndarray) -> np.ndarray:
        """Cast, and bring to shape."""
        values = self._values(columns[0], rows[0])
        if math.prod(values.shape[1:]) != math.prod(self.shape):
            raise _mixed(self._place, rows[0], values.shape[1:], self.shape, self._shape_said)
        if not self._shape_said and values.shape[1:] != self.shape:
            raise _mixed(self._place, rows[0], values.shape[1:], self.shape, False)
        if (values.dtype == np.uint8) != (self.dtype == np.uint8):
            raise self._other_type(rows[0], values.dtype, self.dtype)
        if self.dtype == np.float32:
            refuse_inexact(values, self._place, rows[0], "input")
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused below
            values = values.astype(self.dtype, copy=False)
        if self.dtype == np.float32 and not np.isfinite(values).all():
            raise self._not_finite(rows[0])
        return values.reshape(len(rows), *self.shape)

    def _values(self, column: Any, row: int) -> np.ndarray:
        """[n, *shape] as stored."""
        if isinstance(column, np.ndarray):
            return column
        if isinstance(column, list):
            if len({values.shape for values in column}) > 1:
                raise _mixed(self._place, row, column[-1].shape, column[0].shape, False)
            if len({values.dtype == np.uint8 for values in column}) > 1:  # stacked, they would all be floats
                raise self._other_type(row, column[-1].dtype, column[0].dtype)
            return np.stack(column)
        column = plain(column)
        refuse_nulls(column, self._place, row)
        shape = [len(column)]
        while is_list(column.type):
            if column.null_count:
                raise self._not_finite(row)
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            if (lengths != lengths[:1]).any():
                raise _mixed(self._place, row, tuple(np.unique(lengths)), tuple(lengths[:1]), False)
            shape.append(int(lengths[0]) if len(lengths) else 0)
            column = plain(column.flatten())
        if column.null_count:
            raise self._not_finite(row)
        values: np.ndarray = column.to_numpy(zero_copy_only=False)
        return values.reshape(shape)

    def _other_type(self, row: int, got: np.dtype[Any], expected: np.dtype[Any]) -> RefusedError:
        """Bytes go from 0 to 255, and models divide them by it; other numbers are taken as they are."""
        return RefusedError(
            f"an input of another type than the first in {self._place(row)}",
            got=got,
            expected="uint8" if expected == np.uint8 else "not uint8",
            next="bring all inputs to one type",
        )

    def _not_finite(self, row: int) -> RefusedError:
        return RefusedError(
            f"an input that is not finite in float32 in {self._place(row)}",
            got="null, NaN or infinity",
            expected="finite numbers",
            next="remove the row, or fill it in",
        )


def _mixed(place: Place, row: int, got: tuple[int, ...], expected: tuple[int, ...], shape_said: bool) -> RefusedError:
    return RefusedError(
        f"an input of another shape in {place(row)}",
        got=[int(size) for size in got],
        expected=f"{list(expected)}, as " + ("`shape` says" if shape_said else "the first row has"),
        next="bring all inputs to one shape",
    )


def refuse_inexact(values: np.ndarray, place: Place, row: int, what: str) -> None:
    """Refuse integers that float32 cannot hold: rounded, neighbours become one. Floats are always rounded."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 4:
        return
    # There and back: an integer that float32 holds exactly returns as itself.
    with np.errstate(invalid="ignore"):
        wrong = values.astype(np.float32).astype(values.dtype) != values
    if wrong.any():
        raise RefusedError(
            f"an integer {what} that float32 cannot hold exactly in {place(row)}",
            got=int(values[wrong][0]),
            expected="integers up to 16,777,216 (2^24), or floats",
            next="scale the numbers, or split them; cast them to floats where rounding is meant",
        )


def refuse_nulls(column: Any, place: Place, row: int, hint: str = "remove the row, or fill it in") -> None:
    """Refuse an Arrow array that has no value somewhere."""
    if column.null_count:
        raise RefusedError(f"no value in {place(row)}", got="null", expected="a value in every row", next=hint)
