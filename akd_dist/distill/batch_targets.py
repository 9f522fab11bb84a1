"""What a store keeps of the targets of a batch, on the students' device: made into targets of losses once for all.

Everything travels as it is stored, in one piece. A part of a batch is unpacked when a student first asks for it, and
what a `top_k` store says of it at a temperature is decoded block by block within the losses; students of a cohort share
both.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from akd_dist.data.views import placed
from akd_dist.distill.sparse import SHARED_BYTES, SparseTargets, TailDictionary
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from akd_dist.storage.interleaved import Interleaved
from akd_dist.storage.layout import LOGITS
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.targets import StoredTargets
from akd_dist.storage.top_k import TopK


class Decoder:
    """Makes targets on a device of what a store keeps of them, with its dictionary where it has one.

    Args:
        encoding: of a store that describes logits; None of one that holds them.
        arrays: those of the dictionary.
        device: where targets are wanted.
    """

    def __init__(self, encoding: TopK | None, arrays: Mapping[str, Any], device: torch.device | str) -> None:
        self.encoding, self._arrays, self.device = encoding, arrays, device
        self._made: dict[torch.dtype, TailDictionary] = {}
        self._together = None if encoding is None else Interleaved.of(encoding, len(arrays["mean_logit"]))

    @classmethod
    def of(cls, store: LogitStore, device: torch.device | str) -> Decoder:
        """That of a store.

        Raises:
            DamagedError: its dictionary is not what was sealed.
        """
        identity = store.manifest.identity
        if not identity.is_top_k:
            return cls(None, {}, device)
        return cls(identity.top_k, store.dictionary().arrays(), device)

    @property
    def lowest(self) -> float:
        """The lowest temperature that targets can be asked for at."""
        return min(self.encoding.tail_temperatures) if self.encoding is not None else 0.0

    def targets(self, arrays: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Targets:
        """Targets of arrays [n, ...] on the device.

        Args:
            dtype: what is computed in: float32, or float64.
        """
        if self.encoding is None:
            return DenseTargets(arrays[LOGITS], dtype)
        return SparseTargets.of(arrays, self.encoding, self._dictionary(dtype))

    def of_items(self, items: Tensor, dtype: torch.dtype = torch.float32) -> Targets:
        """The same of what a node holds, on the device: logits [n, classes], or bytes, uint8 [n, item_bytes]."""
        return self.targets(self.arrays(items), dtype)

    def arrays(self, items: Tensor) -> dict[str, Tensor]:
        """The arrays [n, ...] of what a node holds, by name: views of it."""
        return {LOGITS: items} if self._together is None else split(items, self._together)

    def _dictionary(self, dtype: torch.dtype) -> TailDictionary:
        if dtype not in self._made:
            assert self.encoding is not None
            arrays = {name: torch.from_numpy(np.array(array)) for name, array in self._arrays.items()}
            self._made[dtype] = TailDictionary.of(arrays, self.encoding.tail_temperatures, self.device, dtype)
        return self._made[dtype]


@dataclass(eq=False)
class BatchTargets:
    """The targets of the rows of a batch."""

    items: Tensor
    """What is stored of them: logits [targets, classes], or all that describes these, uint8 [targets, item_bytes]."""
    counts: np.ndarray
    """How many each row has, int64 [rows]."""
    decoder: Decoder
    _made: dict[tuple[torch.dtype, int, int], Targets] = field(default_factory=dict, init=False, repr=False)
    _sharing: contextlib.ExitStack | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The same by array, each [targets, ...]."""
        return self.decoder.arrays(self.items)

    def of_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Targets:
        """The targets of rows start..stop - 1 of the batch; the same object to all that ask for the same."""
        key = dtype, start, stop
        if key not in self._made:
            part = self.part(start, stop)
            self._made[key] = made = self.decoder.of_items(part.items, dtype)
            if self._sharing is not None and isinstance(made, SparseTargets):
                room = SHARED_BYTES * len(part) // max(1, len(self))
                self._sharing.enter_context(made.shared(room))
        return self._made[key]

    def part(self, start: int, stop: int) -> BatchTargets:
        """Rows start..stop - 1 as a batch of their own."""
        first, count = int(self.counts[:start].sum()), int(self.counts[start:stop].sum())
        return BatchTargets(self.items[first : first + count], self.counts[start:stop], self.decoder)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A block in which what is decoded for one student is kept for the next that asks for it."""
        with contextlib.ExitStack() as self._sharing:
            yield
        self._sharing = None
        self._made.clear()

    @classmethod
    def joined(cls, parts: Sequence[BatchTargets]) -> BatchTargets:
        """Several batches as one."""
        counts = np.concatenate([one.counts for one in parts])
        return cls(torch.cat([one.items for one in parts]), counts, parts[0].decoder)


class TeacherTargets(StoredTargets):
    """The targets that a stream reads, which it gives to students.

    Args:
        device: where they are given.
        more: as of `StoredTargets`.
    """

    def __init__(
        self, store: LogitStore, cache_root: Path, views: int = 1, *, device: torch.device | str = "cpu", **more: Any
    ) -> None:
        super().__init__(store, cache_root, views, **more)
        self.decoder = Decoder.of(store, device)

    def batch(self, rows: np.ndarray) -> BatchTargets:
        """The targets of rows, int64 [n], of those that are read now."""
        items, counts = self.items(rows)
        return BatchTargets(placed(items, self.decoder.device), counts, self.decoder)


def split(items: Tensor, together: Interleaved) -> dict[str, Tensor]:
    """As `Interleaved.split`, of a tensor on any device: views of it."""
    found = {}
    for array in together.arrays:
        first = together.first[array.name]
        part = items[:, first : first + array.item_bytes].view(_dtype_of(array.dtype))
        found[array.name] = part.view(len(items), *array.shape)
    return found


@functools.cache
def _dtype_of(name: str) -> torch.dtype:
    """What torch calls a dtype of NumPy."""
    return torch.from_numpy(np.empty(0, name)).dtype


def unsaid(
    counts: np.ndarray, classes: int, described: Mapping[str, Any] | None, device: torch.device | str
) -> BatchTargets:
    """The targets of a batch of whom nobody has computed anything, to see what a step takes.

    Args:
        counts: how many each row has, int64 [rows].
        described: the encoding's config, of a store that describes logits; None of one that holds them.
    """
    count = int(counts.sum())
    if described is None:
        logits = torch.zeros(count, classes, dtype=torch.float16, device=device)
        return BatchTargets(logits, counts, Decoder(None, {}, device))
    encoding = TopK(**{key: value for key, value in described.items() if key != "name"})
    even = np.full((len(encoding.tail_temperatures), classes), 1 / classes, np.float32)
    vector, basis = np.zeros(classes, np.float32), np.zeros((classes, encoding.rank), np.float16)
    tables = {"mean_logit": vector, "tail_prior": even, "basis": basis, "tail_calibration": 0 * even}
    items = torch.zeros((count, Interleaved.of(encoding, classes).item_bytes), dtype=torch.uint8, device=device)
    return BatchTargets(items, counts, Decoder(encoding, tables, device))
