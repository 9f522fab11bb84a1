"""Several arrays of the same items as one: all that is stored of an item lies together on a node, item after item.

So the targets of a row are one copy and travel to a device as one, however many arrays describe them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.storage.layout import StoredArray, StoreLayout
from akd_dist.storage.top_k import TopK

ITEMS = "items"
"""Names the one array, in a node's cache."""


@dataclass(frozen=True)
class Interleaved:
    """How arrays [n, ...] lie in one of bytes, uint8 [n, item_bytes]."""

    arrays: tuple[StoredArray, ...]

    @classmethod
    def of(cls, encoding: TopK, classes: int) -> Interleaved:
        """That of what `top_k` keeps of a target."""
        return cls(tuple(StoredArray(name, *kept) for name, kept in encoding.arrays(classes).items()))

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """That of an item, with a field for each array: every one where its own dtype may lie."""
        largest_first = sorted(self.arrays, key=lambda array: -np.dtype(array.dtype).itemsize)
        return np.dtype([(array.name, array.dtype, array.shape) for array in largest_first], align=True)

    @functools.cached_property
    def first(self) -> dict[str, int]:
        """Which byte of an item each array begins at."""
        fields: Mapping[str, Any] = self.dtype.fields or {}
        return {name: place[1] for name, place in fields.items()}

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return self.dtype.itemsize

    def join(self, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        """The items of arrays, given in the order of `arrays`; fresh memory."""
        items = np.zeros(len(arrays[0]), self.dtype)
        for stored, array in zip(self.arrays, arrays, strict=True):
            items[stored.name] = array
        return items.view(np.uint8).reshape(len(items), self.item_bytes)

    def split(self, items: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """The arrays [n, ...] of items, by name in the order of `arrays`; views that are not contiguous.

        Args:
            items: uint8 [n, item_bytes], contiguous.
        """
        of_fields = items.view(self.dtype)[:, 0]
        return {array.name: of_fields[array.name] for array in self.arrays}


def interleaved(layout: StoreLayout) -> Interleaved | None:
    """How a node holds what a store says of its items; None where that is one array, as it is."""
    return Interleaved(layout.fields) if len(layout.fields) > 1 else None
