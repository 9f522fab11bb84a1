"""The verbs that train: what the command line adds to them."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import akd_dist
from akd_dist.base import errors, places
from akd_dist.documents.cache import CacheDocument, PlanDocument
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.report import CompareDocument
from akd_dist.options import CacheOptions, CompareOptions, RunOptions
from akd_dist.recipe import load_recipe
from tests.told import ASSISTANT, CACHED, COMPARED, DIGITS, FLEET, PART, PLAN, ROOT, STUDENT

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_options_reach_the_verb(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(akd_dist, "train_students", lambda recipe, **given: seen.update(given, recipe=recipe) or FLEET)
    outcome = run(
        "train-students", "r.yaml", "--set", "a=1", "--set", "b=2", "--store-root", "s3://b/s", "--run-root", "r",
        "--cache-root", "c", "--address", "auto", "--wait-for-nodes", "--fresh", "--wait", "--tracker", "wandb",
        "--json", "--trust", "mine",
    )  # fmt: skip
    assert outcome.document == FLEET
    assert seen.pop("console").stderr
    assert seen == {
        "recipe": "r.yaml", "overrides": ("a=1", "b=2"), "store_root": "s3://b/s", "run_root": "r", "cache_root": "c",
        "address": "auto", "wait_for_nodes": True, "fresh": True, "wait": True, "trackers": ("wandb",),
        "trust": ("mine",), "prepare_again": False, "dry_run": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "taken"),
    [("cache-teacher", CacheOptions), ("train-students", RunOptions), ("compare", CompareOptions)],
)
def test_the_help_has_every_option(verb: str, taken: type[Any], run: Any) -> None:
    shown = run(verb, "--help").out
    flags = [one.metadata["flag"] for one in dataclasses.fields(taken) if "flag" in one.metadata]
    assert [flag for flag in flags if f"  {flag} " not in shown] == []
    assert len(flags) > 8


def test_roots_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert places.absolute("stores") == str(tmp_path / "stores")
    assert places.absolute("~/stores") == "/somewhere/stores"
    assert places.absolute("s3://bucket/stores") == "s3://bucket/stores"
    with pytest.raises(errors.RecipeError, match=r"the home folder in ~nobody-of-this-name/stores is not known"):
        places.absolute("~nobody-of-this-name/stores")


def test_runs_are_found_under_the_home_folder(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave a ~ alone that stands in quotes, or after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for verb in ("status", "report"):
        outcome = run(verb, "~/runs/mine")
        assert outcome.code == 4
        assert str(tmp_path / "home" / "runs" / "mine") in outcome.err


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("diverged", 1), ("failed", 1)])
def test_a_fleet_is_shown_and_judged(state: str, code: int, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = STUDENT | {"state": state, "reason": "see its log", "name": "mlp-4-hard_labels-s1", "seed": 1}
    fleet = FLEET | {"students": [STUDENT, lost], "stores_named": False}
    FleetDocument.model_validate(fleet)
    monkeypatch.setattr(akd_dist, "train_students", lambda *_, **__: fleet)
    outcome = run("train-students", "my recipe.yaml", "--set", "cohorts=2", "--store-root", "there")
    assert outcome.code == code
    assert "310" in outcome.out
    assert f"store   {PART['store']}" in outcome.out
    assert "report  runs/digits/report.html" in outcome.out
    assert "  akd-dist stores show abababababab --store-root there\n" in outcome.out
    assert "  akd-dist train-students 'my recipe.yaml' --set cohorts=2 --set data.seed=1" in outcome.out
    assert "Traceback" not in outcome.err


def test_quickstart_runs_the_recipe_that_ships(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(akd_dist, "train_students", lambda recipe, **_: seen.update(recipe=recipe) or FLEET)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    outcome = run("quickstart")
    assert outcome.code == 0
    assert ("source .venv/bin/activate " in outcome.out) == (shutil.which("akd-dist") is None)
    monkeypatch.setenv("PATH", str(tmp_path))  # as of `make`, which names the program by its path
    assert "next\n  source .venv/bin/activate " in run("quickstart").out
    assert Path(seen["recipe"]).samefile(ROOT / "jobs" / "digits_unlabelled.yaml")
    assert f"cp {seen['recipe']} my-digits.yaml" in outcome.out
    assert "akd-dist train-students my-digits.yaml --set name=my-digits\n" in outcome.out


def test_a_comparison_is_a_table_and_says_where_it_lies(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    CompareDocument.model_validate(COMPARED)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(akd_dist, "compare", lambda recipe, **given: seen.update(given, recipe=recipe) or COMPARED)
    outcome = run("compare", "r.yaml", "--seeds", "2", "--set", "data.views=2", "--run-root", "r")
    assert outcome.code == 0
    assert (seen["recipe"], seen["seeds"], seen["overrides"], seen["run_root"]) == ("r.yaml", 2, ("data.views=2",), "r")
    assert re.search(r"KD +2 +90\.00 ± 2\.00 +\+90\.00 ± 2\.00 +93\.00", outcome.out)
    assert "table   runs/digits-compare/comparison.md" in outcome.out
    assert run("compare", "r.yaml", "--json").document == COMPARED
    assert seen["seeds"] is None


def test_a_comparison_that_lost_students_exits_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"name": "mlp-4-kd-s1", "seed": 1, "state": "diverged", "reason": "the loss is nan"}
    document = COMPARED | {"table": [COMPARED["table"][0] | {"seeds": [0], "lost": [lost]}]}  # type: ignore[index]
    CompareDocument.model_validate(document)
    monkeypatch.setattr(akd_dist, "compare", lambda *_, **__: document)
    outcome = run("compare", "r.yaml")
    assert outcome.code == 1
    assert "1 of 2" in outcome.out
    assert "mlp-4-kd-s1 diverged" in outcome.out


@pytest.mark.parametrize("hit", [False, True])
def test_a_cached_teacher_is_summed_up(hit: bool, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = CACHED | {"hit": hit}
    CacheDocument.model_validate(document)
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: document)
    outcome = run("cache-teacher", "r.yaml", "--set", "data.views=4")
    assert outcome.code == 0
    for words in (
        "1,168 rows x 4 views x 10 classes, float32",
        "560.6 kB in 60 shards",
        "a hit: it was there already" if hit else "60 of 60 shards computed now",
        "akd-dist train-students r.yaml --set data.views=4",
    ):
        assert words in outcome.out
    assert run("cache-teacher", "r.yaml", "--json").document == document


def test_cached_assistants_are_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = CACHED | {"assistants": [ASSISTANT]}
    CacheDocument.model_validate(document)
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: document)
    outcome = run("cache-teacher", "r.yaml")
    assert re.search(rf"assistant mlp-64 +{ASSISTANT['store']}\n", outcome.out)
    assert "1.1 MB in 120 shards" in outcome.out


@pytest.mark.parametrize("command", [("cache-teacher", DIGITS), ("recipe", "check", DIGITS)])
def test_the_next_command_has_a_name_that_no_other_recipe_has(
    command: tuple[str, ...], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: CACHED)

    def named(*more: str) -> list[str]:
        """The overrides of the command that is to be typed next."""
        words = shlex.split(run(*command, *more).out.splitlines()[-1])
        return [word for word in words if "=" in word]

    for name, views in (("digits", 4), ("digits-2", 5), ("digits-3", 6)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "identity.json").touch()
        (folder / "recipe.yaml").write_text(
            load_recipe(DIGITS, [f"name={name}", f"data.views={views}"]).to_yaml(folder)
        )
    assert named() == []
    assert named("--set", "data.views=6") == ["data.views=6", "name=digits-3"]
    assert named("--set", "name=digits", "--set", "data.views=7") == ["data.views=7", "name=digits-4"]
    assert named("--set", "name=new", "--set", "data.views=7") == ["name=new", "data.views=7"]
    (tmp_path / "runs" / "digits" / "recipe.yaml").write_text("{")
    assert named("--set", "data.views=7") == ["data.views=7"]


def test_a_plan_is_a_table(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    PlanDocument.model_validate(PLAN)
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **given: PLAN if given["dry_run"] else CACHED)
    outcome = run("cache-teacher", "r.yaml", "--dry-run")
    assert outcome.code == 0
    assert re.search(r"validation +1,168 +4 +20 +186\.9 kB", outcome.out)
    assert "needs 560.6 kB under stores, free 1.0 TB; nothing was stored" in outcome.out
    planned = PLAN | {"assistants": [{"model": "mlp-64", "trained": False, "splits": PLAN["splits"]}]}
    PlanDocument.model_validate(planned)
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: planned)
    assert re.search(r"mlp-64, test +1,168 +4 +20 +186\.9 kB", run("cache-teacher", "r.yaml", "--dry-run").out)
