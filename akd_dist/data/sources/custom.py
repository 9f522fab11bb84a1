"""A map-style dataset, or arrays, that a function of the user's own returns."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import sha256
from akd_dist.base.tracebacks import whole
from akd_dist.data import pictures
from akd_dist.data.arguments import listing, named, placed
from akd_dist.data.blocks import Block
from akd_dist.data.factories import call_factory, source_of
from akd_dist.data.schemas import check_schema
from akd_dist.data.sources.base import Source, row_of, slices, stats_of
from akd_dist.data.sources.tables import columns_of, columns_of_table, source_of_table

_SAMPLE_ROWS = 18


class CustomSource:
    """What a function of the user's own returns: an Arrow table, or a map-style dataset of (input, label)."""

    SIGNATURE = "(...) -> pyarrow.Table or torch.utils.data.Dataset"

    def __init__(self, spec: recipe.CustomData) -> None:
        self.spec = spec

    def key(self) -> dict[str, Any]:
        """The module's own file stands for its code, and what its arguments name for what it reads.

        What else it imports or reads is not looked at.
        """
        file = source_of(self.spec, self.SIGNATURE)
        files, folders = named(placed(self.spec.arguments, self.spec.trusted.place))
        key = {**self.spec.model_dump(mode="json"), "files": stats_of([*([file] if file else []), *files])}
        return key | ({"folders": [listing(folder) for folder in folders]} if folders else {})

    def open(self) -> Source:
        """Look at the rows, without reading them."""
        made = call_factory(self.spec, self.SIGNATURE, self.spec.arguments)
        if hasattr(made, "__arrow_c_stream__"):
            return self._of_table(self._read(made))
        if hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            items = _Items(made, self.spec)
            where, classes = items.where, self.spec.classes
            return Source(items.name, items.rows, items.blocks, where, classes=classes, sample=items.sample)
        raise RefusedError(
            f"the factory {self.spec.factory} returned something else than data",
            got=type(made).__name__,
            expected="a pyarrow.Table, or a map-style torch.utils.data.Dataset",
        )

    def _read(self, made: Any) -> Any:
        """A stream of the user's own may still fail."""
        try:
            return made if isinstance(made, pa.Table) else pa.table(made)
        except Exception as error:
            raise RefusedError(
                f"what the factory {self.spec.factory} returned cannot be read", got=whole(error), expected="Arrow data"
            ) from error

    def _of_table(self, table: Any) -> Source:
        name = f"the table of {self.spec.factory}"
        check_schema(table.schema, self.spec, name)

        def blocks(spec: recipe.Table, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            def read(first: int, last: int) -> tuple[list[Any], Any]:
                return columns_of_table(spec, table.slice(first, last - first))

            return slices(len(table), read, most, start, stop)

        def sample() -> str:
            rows = [table.select(columns_of(self.spec)).slice(row, 1).to_pylist() for row in _few(len(table))]
            return sha256(repr(rows).encode())

        source = source_of_table(self.spec, name, len(table), blocks, row_of(name), table.schema)
        return dataclasses.replace(source, sample=sample)


class _Items:
    """A map-style dataset. One thread at a time asks it for items, as it may not expect more."""

    def __init__(self, items: Any, spec: recipe.CustomData) -> None:
        self.items = items
        self.name = f"the dataset of {spec.factory}"
        self.where = row_of(self.name)
        self.rows = self._ask(len, "when asked how many rows it has")
        self.types: list[type] | None = None  # of the first item
        self.labelled = bool(spec.label)

    def blocks(self, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """Items start..stop - 1."""
        stop = self.rows if stop is None else min(stop, self.rows)
        for first in range(start, stop, most):
            yield _block_of_items(first, [self._item(row) for row in range(first, min(first + most, stop))])

    def sample(self) -> str:
        """A hash of a few items."""
        hashed = hashlib.sha256()
        for row in _few(self.rows):
            inputs, label = self._item(row)
            for value in inputs:
                if isinstance(value, Image.Image):  # with its palette, and turned
                    value = np.asarray(pictures.shown(value, recipe.Image()))
                plain = isinstance(value, str)
                hashed.update(repr(value if plain else (value.dtype.str, value.shape)).encode())
                hashed.update(b"" if plain else value.tobytes())
            hashed.update(repr(label).encode())
        return hashed.hexdigest()

    def _item(self, row: int) -> tuple[list[Any], Any]:
        """An item as one array, one image, one string or two, and a label: int, float, bool or str."""
        item = self._ask(lambda items: items[row], f"at row {row}")
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise self._useless("item", row, type(item).__name__, "a pair (input, label)")
        pair = isinstance(item[0], tuple | list) and len(item[0]) == 2 and all(isinstance(one, str) for one in item[0])
        inputs = [self._input(one, row) for one in (item[0] if pair else [item[0]])]
        if not self.labelled:  # whatever stands for one, such as None
            return inputs, -1
        label = item[1].item() if hasattr(item[1], "item") and getattr(item[1], "ndim", 0) == 0 else item[1]
        label = self._input(label, row) if isinstance(label, str) else label
        if type(label) not in (int, float, bool, str) or (type(label) is int and abs(label) >= 2**63):
            raise self._useless("label", row, type(label).__name__, "a class id, a class name or a number")
        types = [Image.Image if isinstance(one, Image.Image) else type(one) for one in (*inputs, label)]
        self.types = self.types or types
        if types != self.types:
            names = [[one.__name__ for one in several] for several in (types, self.types)]
            raise self._useless("item", row, names[0], f"{names[1]}, as the first item has")
        return inputs, label

    def _input(self, value: Any, row: int) -> Any:
        if isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise self._useless("text", row, "half a surrogate pair", "text that UTF-8 can hold")
            return value
        if hasattr(value, "detach"):  # a tensor, known without importing torch
            value = self._array(value, row)
        if isinstance(value, Image.Image):
            return self._decoded(value, row)
        if isinstance(value, np.generic | int | float):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif":
            got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise self._useless("input", row, got, "a tensor or array of numbers, a PIL image, or text")
        return value

    def _decoded(self, image: Image.Image, row: int) -> Image.Image:
        """Loaded here: the dataset may give the same image again, and threads must not load it at once."""
        try:
            pictures.check(image)
            pictures.decode(image)
        except Exception as error:  # of many kinds: it may not have been read yet
            raise self._useless("input", row, error, "an image of 8 bits a channel, or an array") from error
        return image

    def _array(self, tensor: Any, row: int) -> np.ndarray:
        """A tensor's numbers, float32 where they are floats: NumPy has no bfloat16."""
        try:
            plain = tensor.detach().cpu()
            array: np.ndarray = (plain.float() if plain.is_floating_point() else plain).numpy()
        except (TypeError, RuntimeError) as error:  # sparse ones, quantised ones
            raise self._useless("input", row, error, "a dense tensor of numbers") from error
        return array

    def _ask(self, question: Callable[[Any], Any], when: str) -> Any:
        try:
            return question(self.items)
        except Exception as error:
            raise RefusedError(
                f"{self.name} fails {when}", got=whole(error), expected="an answer", next="mend the dataset's code"
            ) from error

    def _useless(self, what: str, row: int, got: object, expected: str) -> RefusedError:
        return RefusedError(
            f"nothing can be made of the {what} in {self.where(row)}",
            got=got,
            expected=expected,
            next="let the dataset return pairs (input, label), all of the same types",
        )


def _few(rows: int) -> list[int]:
    """Which rows of a source are a sample: the first, the last and some between."""
    return [int(row) for row in np.unique(np.linspace(0, rows - 1, _SAMPLE_ROWS).astype(np.int64))]


def _block_of_items(start: int, items: list[tuple[list[Any], Any]]) -> Block:
    columns = [list(column) for column in zip(*(inputs for inputs, _ in items), strict=True)]
    inputs = [pa.array(column, pa.large_string()) if isinstance(column[0], str) else column for column in columns]
    return Block(start, inputs, pa.array([label for _, label in items]))
