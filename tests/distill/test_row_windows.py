"""Rows that the cache has no room for are kept as blocks, and read window by window: to the same weights and stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from akd_dist.base.errors import MachineError
from akd_dist.data import row_entry, row_store, rows
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import RowWindows, bytes_ahead, fetch_rows, held_splits
from akd_dist.distill import lockstep, teacher
from akd_dist.jobs import prepare_rows
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning import windows
from akd_dist.jobs.planning.caching import open_rows
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.storage import layout
from akd_dist.storage.content import Guard
from akd_dist.storage.layout import StoreLayout
from tests.distill.test_windows import StoppedError, sizes_noted
from tests.fleets import HARD, a_recipe, a_student, a_teacher, weights

WINDOW, BLOCK = 32, 24
STUDENTS = [a_student("annealing", batch=64), a_student("hard", batch=64, objective=HARD | {"epochs": 1})]


class Home:
    """A recipe, and what its students come to where there is room for everything."""

    def __init__(self, root: Path) -> None:
        teacher.forget()
        data = {
            "train": {"kind": "digits"},
            "views": 2,
            "augmentation": {"kind": "shift", "pixels": 1},
            "window": WINDOW,
        }
        self.root, self.model = root, a_teacher(a_recipe(STUDENTS), root / "teacher", root / "cache")
        self.recipe = a_recipe(STUDENTS, teacher={"weights": self.model}, data=data, checkpoint_seconds=0.001)
        self.stores = self.cache("whole")
        self.expected = self.train("whole")
        sizes = {name: getattr(prepare(self.recipe.data, root / "whole"), name).nbytes for name in rows.SPLITS}
        # All rows do not fit, and train rows not beside the others.
        self.budget = sum(sizes.values()) * 2 // 3

    def cache(self, name: str) -> dict[str, str]:
        """Cache the teacher with a cache and a store root of this name; the stores."""
        teacher.forget()
        roots = {"store_root": str(self.root / f"{name}-stores"), "cache_root": str(self.root / name)}
        document = cache_in_process(self.recipe, self.model, **roots)
        teacher.forget()
        return {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}

    def train(self, name: str) -> dict[str, str]:
        run = self.root / f"{name}-run"
        stores = {split: uri.replace("whole-stores", f"{name}-stores") for split, uri in self.stores.items()}
        train_in_process(self.recipe, stores, run=run, cache_root=str(self.root / name))
        return weights(run)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreLayout, "chunk_rows", 16)
        patch.setattr(layout, "_SHARDS_OF_A_SMALL_VIEW", 64)
        for module in (rows, row_entry, row_store, windows):
            patch.setattr(module, "BLOCK_ROWS", BLOCK)
        yield Home(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def peak(home: Home, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lies in the cache each time that something new is there; it has no room for the rows."""
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(home.budget))
    return sizes_noted(monkeypatch)


def test_the_same_stores_and_weights_within_the_budget(
    home: Home, peak: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that ends in the middle of an epoch, and goes on there."""
    stores = home.cache("small")
    assert [Path(uri).name for uri in stores.values()] == [Path(uri).name for uri in home.stores.values()]
    assert bytes_of(stores["train"]) == bytes_of(home.stores["train"])
    passed = list[str]()

    def failpoint(site: str) -> None:
        passed.append(site)
        if passed.count("cohort.after_batch") == 23:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(lockstep, "failpoint", failpoint)
        with pytest.raises(StoppedError):
            home.train("small")
    assert home.train("small") == home.expected
    assert len(peak) > 10
    assert max(peak) <= home.budget
    assert list((home.root / "small-stores" / "rows").iterdir())


def bytes_of(store: str) -> dict[str, bytes]:
    shards = sorted(Path(store).glob("arrays.zarr/logits/c/*/*/*"))
    return {str(path.relative_to(store)): path.read_bytes() for path in shards}


def test_rows_are_read_from_what_is_held_or_else_fetched(home: Home, tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "stores"), str(tmp_path / "cache"), console=Console(quiet=True))
    sealed = prepare_rows._sealed(home.recipe.data, workspace, again=False).train.sealed
    assert sealed is not None
    whole = prepare(home.recipe.data, home.root / "whole")
    found = fetch_rows(sealed, tmp_path / "cache", windowed=True, budget=whole.nbytes * 3 // 2)
    assert [found.train.held, found.validation.held, found.test.held] == [False, True, True]
    assert found.held_bytes == found.validation.nbytes + found.test.nbytes < found.nbytes
    assert len(found.contents()) == 2
    assert found.fingerprints == whole.fingerprints
    costs = [CostModel.of(home.recipe, splits, {}, {}) for splits in (found, whole)]
    assert [one.fetching for one in costs] == [bytes_ahead(found.train.row_bytes), 0]
    memory = [one.memory(tuple(home.recipe.students)) for one in costs]
    assert memory[0] - memory[1] == costs[0].fetching > 0
    moving = found.train.moving
    assert isinstance(moving, RowWindows)
    with Guard(found.contents()) as guard:
        moving.watch(guard)
        moving.move(0, [(0, WINDOW), (3 * WINDOW, 4 * WINDOW)])
        for chosen in (np.array([5, 0, 31, 100]), np.array([1000, 3, 700])):
            np.testing.assert_array_equal(found.train.inputs.take(chosen, axis=0), whole.train.inputs[chosen])
            np.testing.assert_array_equal(found.train.labels.take(chosen), whole.train.labels[chosen])
        held = moving.held()
        assert held is not None
        assert held.numbers == (0, 1, 4, 5)
        moving.expect(1, [(WINDOW, 2 * WINDOW)])
        moving.move(1, [(WINDOW, 2 * WINDOW)])
        guard.settle()
        assert moving.resting([]) == []
        moving.close()
    np.testing.assert_array_equal(found.train.all_labels(), whole.train.labels)


@pytest.mark.parametrize(
    ("room", "windowed", "in_order", "held"),
    [
        (120, False, False, "train validation test"),  # too little, which the cache says
        (280, True, False, "train validation test"),
        (279, True, False, "validation test"),
        (159, True, True, ""),
        (280, False, True, "train validation test"),
        (279, False, True, "validation test"),
        (159, False, True, ""),
    ],
)
def test_which_splits_a_node_holds(room: int, windowed: bool, in_order: bool, held: str) -> None:
    sizes = {"train": 100, "validation": 20, "test": 20}
    assert held_splits(sizes, room, windowed=windowed, in_order=in_order) == set(held.split())


def test_rows_that_were_prepared_under_a_larger_budget_are_kept_as_blocks(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take half of it; what was prepared stays where it is, since others may read it."""
    workspace = Workspace(str(tmp_path / "stores"), str(tmp_path / "cache"), console=Console(quiet=True))
    whole = prepare_rows.rows_of_machine(home.recipe.data, workspace)
    assert whole.train.sealed is None
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(2 * whole.nbytes))
    assert prepare_rows.rows_of_machine(home.recipe.data, workspace).train.sealed is None
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(2 * whole.nbytes - 2))
    sealed = prepare_rows.rows_of_machine(home.recipe.data, workspace)
    assert sealed.train.sealed is not None
    assert sealed.fingerprints == whole.fingerprints
    assert whole.train.folder.exists()


def test_a_teacher_is_not_trained_where_its_rows_do_not_fit(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the recipe says by which windows: they decide what it becomes."""
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "120000")
    sgd = {"kind": "sgd", "lr": 0.1}
    own = {"model": {"kind": "mlp", "hidden": 4}, "train": {"epochs": 1, "optimizer": sgd}}
    data = home.recipe.data.model_dump(mode="json") | {"window": None}
    recipe = a_recipe(STUDENTS, teacher=own, data=data)
    workspace = Workspace(str(tmp_path / "stores"), str(tmp_path / "cache"), console=Console(stderr=True))
    inputs = open_rows(recipe, workspace, students=True, again=False)
    assert "are kept under the store root" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(MachineError, match="the teacher is trained on rows that are shuffled together") as refused:
        windows.check_chain(recipe, inputs.splits, workspace, 0)
    assert "data.window in the recipe, to 32 for example" in str(refused.value.next)
    assert f"({inputs.splits.nbytes:,} bytes)" in str(refused.value.expected)
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "5000")
    with pytest.raises(MachineError, match="the teacher is trained on rows that are shuffled together") as hopeless:
        windows.check_chain(recipe, inputs.splits, workspace, 0)
    assert "no data.window would do" in str(hopeless.value.next)
    given = a_recipe(STUDENTS, teacher=own, data=data | {"window": WINDOW})
    with pytest.raises(MachineError, match=f"no room for 4 windows of {WINDOW} rows, by which this run shuffles"):
        windows.check_chain(given, inputs.splits, workspace, 0)
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "120000")
    windows.check_chain(given, inputs.splits, workspace, 0)
