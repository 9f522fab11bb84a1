"""A command looks once and plans once: the driver prepares rows, opens stores and checks each thing once.

What students are trained by makes no difference to that: here by forked processes.
"""

import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
import akd_dist.jobs.train_students  # so that all that is counted is imported
from akd_dist.base.errors import RefusedError
from akd_dist.jobs import run_folder
from akd_dist.storage.reader import LogitStore
from tests.fleets import ANNEALING, HARD, a_recipe, a_student
from tests.survivors import forked_cohorts

ONCE = ("prepare", "check_students", "check_models", "check_same_run", "foresee_caching", "plan_run", "cache_planned")


class Calls:
    """What is called in this process; workers are others."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: dict[str, Any] = {"store_root": root / "stores", "cache_root": root / "cache"}
        self.runs, self.made, self.opened = root / "runs", Counter[str](), Counter[str]()
        for module in [module for name, module in sys.modules.items() if name.startswith("akd_dist.")]:
            for name in (*ONCE, "creation_of"):
                if name in vars(module):
                    monkeypatch.setattr(module, name, self.counting(name, vars(module)[name]))
        check = LogitStore.check

        def opened(store: LogitStore) -> None:
            self.opened[store.id] += 1
            check(store)

        monkeypatch.setattr(LogitStore, "check", opened)

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made[name] += 1
            return function(*args, **kwargs)

        return call

    def of(self, verb: Callable[..., dict[str, Any]], recipe: Any, **options: Any) -> dict[str, int]:
        """How often what is to happen once did, in one command; a store is opened once, and planned once a split."""
        self.made.clear()
        self.opened.clear()
        verb(recipe, console=Console(quiet=True), **self.places, **options)
        assert set(self.opened.values()) <= {1}, self.opened
        assert self.made.pop("creation_of", 0) in (0, 3)
        return dict(self.made)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_command_looks_and_plans_once(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, runs = Calls(tmp_path, monkeypatch), {"run_root": tmp_path / "runs"}
    recipe = a_recipe([a_student("one", objective=ANNEALING), a_student("two", objective=HARD)])
    train, everything = akd_dist.train_students, dict.fromkeys(ONCE, 1)
    planned = everything.copy()
    del planned["cache_planned"]
    with forked_cohorts():
        assert calls.of(train, recipe, dry_run=True, **runs) == planned
        assert calls.of(train, recipe, **runs) == everything
        assert len(calls.opened) == 3
        assert calls.of(train, recipe, **runs) == everything, "a hit"
        assert calls.of(train, recipe, dry_run=True, **runs) == planned
        shutil.rmtree(tmp_path / "runs" / "fleet" / "students" / "two")
        assert calls.of(train, recipe, **runs) == everything, "resumed"
        assert len(calls.opened) == 3
        cached = {"prepare": 1, "check_models": 1, "foresee_caching": 1, "cache_planned": 1}
        assert calls.of(akd_dist.cache_teacher, recipe) == cached
        assert calls.of(akd_dist.compare, recipe, seeds=2, **runs) == everything


@pytest.mark.parametrize(("wait", "order"), [(True, ["held", "looked up"]), (False, ["looked up"])])
def test_who_waited_looks_up_stores_once_the_run_is_held(
    wait: bool, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was waited for may have cached them. Without waiting, a refusal comes first and leaves no folder."""
    module: Any = akd_dist.jobs.train_students
    seen = list[str]()
    held = run_folder.held

    @contextlib.contextmanager
    def holding(*args: Any, **kwargs: Any) -> Iterator[None]:
        with held(*args, **kwargs):
            seen.append("held")
            yield

    def looking_up(*_: Any) -> Any:
        seen.append("looked up")
        raise RefusedError("far enough")

    monkeypatch.setattr(run_folder, "held", holding)
    monkeypatch.setattr(module, "with_models", looking_up)
    places: dict[str, Any] = {f"{kind}_root": tmp_path / kind for kind in ("store", "run", "cache")}
    with pytest.raises(RefusedError, match="far enough"):
        akd_dist.train_students(
            a_recipe([a_student("one", objective=HARD)]), console=Console(quiet=True), wait=wait, **places
        )
    assert seen == order
    assert (tmp_path / "run" / "fleet").exists() == wait
