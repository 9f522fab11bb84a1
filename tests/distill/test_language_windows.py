"""Language students whose store is larger than a node's cache have the weights of those for whom all of it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from akd_dist.data.row_cache import prepare
from akd_dist.jobs.train_students import train_in_process
from akd_dist.storage.node_cache import _used
from akd_dist.storage.targets import StoredTargets
from tests.distill.test_windows import sizes_noted
from tests.fleets import weights
from tests.language_stores import ANNEALING, a_corpus, a_recipe, a_student, stores_of


def test_windows_give_the_same_weights_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 tokens, pieces of 320 targets, in which windows and even blocks begin and end anywhere."""
    monkeypatch.setattr("akd_dist.storage.layout._CHUNK_TARGETS", 64)
    students = [a_student("entropy"), a_student("squared", objective=ANNEALING | {"stage1_loss": "squared"})]
    plain = a_recipe(a_corpus(tmp_path, documents=900), students)
    data = plain.data.model_copy(update={"window": 16})
    recipe = plain.model_copy(update={"data": data, "checkpoint_seconds": 0.001})
    stores, rows = stores_of(recipe, tmp_path), prepare(recipe.data, tmp_path / "rows")
    train_in_process(recipe, stores, run=tmp_path / "whole", cache_root=str(tmp_path / "cache"))

    budget = _used(tmp_path / "rows") + 38 * rows.train.targets * 9 // 10
    sizes, moved = sizes_noted(monkeypatch), StoredTargets.move
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(budget))
    held = list[bool]()

    def noted(self: StoredTargets, view: int, spans: list[tuple[int, int]]) -> None:
        moved(self, view, spans)
        held.extend([self.whole] if self.targets == rows.train.targets else [])  # evaluations read the other splits

    monkeypatch.setattr(StoredTargets, "move", noted)
    train_in_process(recipe, stores, run=tmp_path / "windows", cache_root=str(tmp_path / "small"))
    assert len(weights(tmp_path / "whole")) == 2
    assert weights(tmp_path / "windows") == weights(tmp_path / "whole")
    assert (set(held), len(sizes) > 8) == ({False}, True)
    assert max(sizes) <= budget
