"""A table with keys, and logits that others computed of its rows: what tests import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.documents.imported import ImportedDocument
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.recipe import Recipe
from tests.fleets import a_recipe, a_student

ROWS, CLASSES = 800, 4
KD = {"kind": "kd", "epochs": 2}
LABELS = np.random.default_rng(5).integers(0, CLASSES, ROWS)


def logits(seed: int = 0) -> np.ndarray:
    """Of a teacher that is right in most rows, float32 [ROWS, CLASSES]."""
    noise = np.random.default_rng(seed).normal(size=(ROWS, CLASSES))
    return (3 * np.eye(CLASSES)[LABELS] + noise).astype(np.float32)


Z = logits()
IDS = [f"row-{number:04d}" for number in np.random.default_rng(1).permutation(ROWS)]


class Home:
    """A table with keys, its recipe, and what imports say."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, root / "cache"
        numbers = np.random.default_rng(2).normal(size=(ROWS, 3)).astype(np.float32)
        table = {"id": IDS, "input": list(numbers), "label": LABELS}
        pq.write_table(pa.table(table), root / "data.parquet", row_group_size=150)

    def recipe(self, teacher: dict[str, Any] | None = None, objective: dict[str, Any] = KD, **data: Any) -> Recipe:
        source = {"train": {"kind": "parquet", "path": str(self.root / "data.parquet")}}
        taught = teacher or {"store": "0" * 64}
        return a_recipe([a_student("one", objective=objective)], data=source | data, teacher=taught, name="imported")

    def bring(
        self, file: Path | str, recipe: Recipe | None = None, stores: str = "stores", **given: Any
    ) -> ImportedDocument:
        place: dict[str, Any] = {
            "store_root": self.root / stores,
            "cache_root": self.cache,
            "console": Console(quiet=True),
        }
        return ImportedDocument.model_validate(
            akd_dist.import_logits(recipe or self.recipe(), file, **{**place, **given}), strict=False
        )

    def save(self, array: np.ndarray, name: str = "logits.npy") -> Path:
        np.save(self.root / name, array)
        return self.root / name

    def workspace(self) -> Workspace:
        return Workspace(str(self.root / "stores"), str(self.cache), console=Console(quiet=True))


def refused(home: Home, array: np.ndarray, **given: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        home.bring(home.save(array, "bad.npy"), stores="none", **given)
    assert not list((home.root / "none").glob("*/manifest.json"))
    return str(caught.value)
