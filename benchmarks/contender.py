"""What `benchmarks/peers.py` compares: the content that all contenders store, and what each of them can do."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
NAMES = ("row", "inputs", "labels", "logits")


@dataclass(frozen=True)
class Content:
    """What all of them store: memory-mapped arrays, [rows, ...] each."""

    row: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Content:
        """The content that lies in a folder."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES})

    def save(self, folder: Path) -> None:
        """Write it as NumPy arrays."""
        folder.mkdir(parents=True)
        for name in NAMES:
            np.save(folder / f"{name}.npy", getattr(self, name))

    def __len__(self) -> int:
        return len(self.row)

    def at(self, row: int) -> dict[str, Any]:
        """One row, as a peer's writer takes it."""
        return {
            "row": int(self.row[row]),
            "inputs": np.array(self.inputs[row]),
            "labels": int(self.labels[row]),
            "logits": np.array(self.logits[row]),
        }

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start..stop - 1."""
        return {name: np.array(getattr(self, name)[start:stop]) for name in NAMES}


class Contender:
    """One way to keep rows with logits, and to stream them.

    Args:
        folder: where `write` has put them.
        batch: rows of a batch.
        workers: processes, or threads, beside the one that asks for batches; 0 for none.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that it needs; the first one's version is told."""
    imports: ClassVar[tuple[str, ...]] = ()
    """What `load` imports, beside torch and NumPy; memory and time are counted from then on."""
    workers: ClassVar[int] = 2
    """The number with which it was the fastest on two cores."""
    shuffle: ClassVar[str] = "global"
    """What is shuffled together."""
    format: ClassVar[str] = ""
    """The contender whose files it reads; by default its own."""

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        self.folder, self.batch, self.workers_used = folder, batch, workers

    @classmethod
    def missing(cls) -> str | None:
        """The first package that is not installed."""
        for name in cls.packages:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                return name
        return None

    @classmethod
    def load(cls) -> None:
        """Import it."""
        for name in cls.imports:
            importlib.import_module(name)

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Write the content in its own format."""
        raise NotImplementedError

    def epoch(self, number: int) -> Iterable[Tensors]:
        """The batches of an epoch."""
        raise NotImplementedError

    def state(self) -> Any:
        """Its own word for where it is, as JSON; None where it has none."""
        return None

    def resumed(self, number: int, state: Any) -> Iterable[Tensors]:
        """The rest of an epoch from such a position on."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it has started."""
