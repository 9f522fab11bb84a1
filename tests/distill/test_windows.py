"""Students that learn from more than the cache holds have the weights of those for whom all of it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import MachineError
from akd_dist.data.row_cache import prepare
from akd_dist.distill import lockstep, prefetch, teacher
from akd_dist.jobs.train_students import train_in_process
from akd_dist.storage import pieces
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.layout import StoreLayout
from akd_dist.storage.node_cache import _used
from tests.fleets import HARD, a_recipe, a_student, a_teacher, stores_of, weights

WINDOW = 16
STUDENTS = [a_student("annealing", batch=64), a_student("hard", batch=64, objective=HARD | {"epochs": 1})]


class Home:
    """A store of many small shards, and what students come to for whom all of it is there."""

    def __init__(self, root: Path) -> None:
        teacher.forget()
        data = {
            "train": {"kind": "digits"},
            "views": 2,
            "augmentation": {"kind": "shift", "pixels": 1},
            "window": WINDOW,
        }
        model = a_teacher(a_recipe(STUDENTS), root / "teacher", root / "cache")
        self.recipe = a_recipe(STUDENTS, teacher={"weights": model}, data=data, checkpoint_seconds=0.001)
        self.stores, self.root = stores_of(self.recipe, model, root), root
        self.expected = self.train(root / "run", root / "cache")
        splits = prepare(self.recipe.data, root / "rows")
        # The rows, and a view and a half.
        self.budget = _used(root / "rows") + 15 * len(splits.train) * 4

    def train(self, run: Path, cache: Path) -> dict[str, str]:
        train_in_process(self.recipe, self.stores, run=run, cache_root=str(cache))
        return weights(run)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreLayout, "chunk_rows", 16)
        yield Home(tmp_path_factory.mktemp("windows"))


def sizes_noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lies in a cache, in bytes, each time that something new is there."""
    sizes, make = list[int](), pieces._make

    def noted(*given: Any) -> Any:
        made = make(*given)
        sizes.append(_used(given[2].parents[1]))
        return made

    monkeypatch.setattr(pieces, "_make", noted)
    return sizes


@pytest.fixture
def peak(home: Home, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lies in the cache each time that something new is there; the cache has no room for two views."""
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(home.budget))
    return sizes_noted(monkeypatch)


@pytest.mark.usefixtures("ahead")
def test_windows_give_the_same_weights_within_the_budget(
    home: Home, peak: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list[bool]()

    class Noted(StoredLogits):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            whole.append(self.whole)

    monkeypatch.setattr("akd_dist.distill.cohort.StoredLogits", Noted)
    assert home.train(tmp_path / "run", tmp_path / "cache") == home.expected
    assert whole == [False] * len(whole)
    assert len(peak) > 10
    assert max(peak) <= home.budget


@pytest.fixture(params=[0, 2], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches made when it is their turn, and made ahead by a thread."""
    monkeypatch.setattr(prefetch, "AHEAD", {"cpu": request.param, "cuda": request.param})


class StoppedError(BaseException):
    """Leaves a run as a killed process does, but for its locks."""


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("nth", [5, 23])
def test_a_run_goes_on_in_the_middle_of_an_epoch(
    nth: int, home: Home, peak: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its last checkpoint, although the windows before it are gone; and nothing before it is fetched again."""
    passed, steps = list[str](), list[int]()

    def failpoint(site: str) -> None:
        passed.append(site)
        if passed.count("cohort.after_batch") == nth:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(lockstep, "failpoint", failpoint)
        with pytest.raises(StoppedError):
            home.train(tmp_path / "run", tmp_path / "cache")
    monkeypatch.setattr(lockstep, "failpoint", lambda site: steps.append(1) if site == "cohort.after_batch" else None)
    assert home.train(tmp_path / "run", tmp_path / "cache") == home.expected
    assert len(steps) == len(all_steps(home)) - nth + 1
    assert max(peak) <= home.budget


def all_steps(home: Home) -> list[str]:
    per_epoch = -(-len(prepare(home.recipe.data, home.root / "cache").train) // 64)
    return ["a step"] * per_epoch * max(spec.objective.epochs for spec in home.recipe.students)


def test_what_fits_in_no_way_is_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "40000")
    with pytest.raises(MachineError, match="no room in the cache"):
        home.train(tmp_path / "run", tmp_path / "cache")
