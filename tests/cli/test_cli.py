"""The command line: exit codes, messages without tracebacks, one JSON document on stdout, and what people read."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, NoReturn

import click
import jsonschema
import pytest
from rich.console import Console

import akd_dist
from akd_dist import cli
from akd_dist.base import errors, places
from akd_dist.base.errors import AkdError
from akd_dist.base.locks import file_lock
from akd_dist.base.places import STORE_ROOT
from akd_dist.cli.show import in_words, table_of
from akd_dist.documents.cache import CacheDocument, PlanDocument
from akd_dist.documents.error import ErrorDocument
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.json_schema import schemas
from akd_dist.documents.report import CompareDocument, ReportDocument
from akd_dist.documents.stores import GcDocument, StoreDocument, StoresDocument, VerifyDocument
from akd_dist.options import CacheOptions, CompareOptions, RunOptions
from akd_dist.recipe import load_recipe, recipe_schema
from akd_dist.storage.decoded import open_decoded
from akd_dist.storage.node_cache import cache_folder
from akd_dist.storage.reader import open_store
from akd_dist.storage.uses import using
from tests import stores

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "jobs" / "digits.yaml")

PART = {
    "store": "stores/" + "ab" * 32, "id": "ab" * 32, "hit": False, "rows": 1168, "views": 4, "classes": 10,
    "encoding": "float32", "bytes": 186_880, "shards": 20, "shards_computed": 20,
}  # fmt: skip
SPLITS = {"validation": PART | {"views": 1}, "test": PART | {"views": 1}}
CACHED = PART | {"seconds": 3.25, "splits": SPLITS, "assistants": []}
ASSISTANT = PART | {
    "store": "stores/" + "ef" * 32, "model": "mlp-64", "path": "stores/teachers/9", "fingerprint": "ef" * 32,
    "splits": SPLITS,
}  # fmt: skip
PLANNED = {"rows": 1168, "views": 4, "hit": False, "shards": 20, "bytes": 186_880}
PLAN = {
    "dry_run": True, "store_root": "stores", "bytes": 560_640, "free": 10**12,
    "splits": {"train": PLANNED, "validation": PLANNED, "test": PLANNED}, "assistants": [],
}  # fmt: skip
STUDENT = {
    "name": "mlp-4-hard_labels-s0", "model": "mlp-4", "parameters": 310, "objective": "hard_labels", "tau_max": None,
    "seed": 0, "state": "done", "reason": None, "epochs": 40, "validation": {"accuracy": 0.9, "loss": 0.3},
    "test": {"accuracy": 0.91}, "agreement": 0.93, "seconds": 1.5, "path": "runs/digits/students/mlp-4-hard_labels-s0",
    "store": PART["store"], "teacher": "cd" * 32,
}  # fmt: skip
FLEET = {
    "run": "runs/digits", "store": PART["store"], "students": [STUDENT], "cohorts": 1, "seconds": 12.5,
    "task": "classification", "metric": "accuracy",
    "teacher": {"model": "cnn-32", "parameters": 19_210, "test": {"accuracy": 0.98}, "fingerprint": "cd" * 32},
}  # fmt: skip
ESTIMATE = {"n": 2, "mean": 0.9, "low": 0.88, "high": 0.92}
COMPARED = {
    "run": "runs/digits-compare", "command": "akd-dist compare r.yaml", "task": "classification", "metric": "accuracy",
    "confidence": 0.95, "rows": {"train": 1168, "validation": 269, "test": 360}, "assistants": [], "missing": ["takd"],
    "teacher": {"model": "cnn-32", "parameters": 19_210, "test": 0.98, "agreement": None},
    "table": [{
        "name": "mlp-4-kd", "model": "mlp-4", "parameters": 310, "objective": "kd", "tau_max": None, "epochs": 40,
        "seeds": [0, 1], "test": ESTIMATE, "over_scratch": ESTIMATE, "over_kd": None, "agreement": 0.93, "lost": [],
    }],
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command leaves anything in the checkout."""
    monkeypatch.chdir(tmp_path)


class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The refusal's document, checked against the schema that ships."""
        jsonschema.validate(self.document, schemas()["error"])
        assert self.document["error"]["code"] == self.code
        return ErrorDocument.model_validate(self.document).error.model_dump()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return command


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group as the words that call it."""
    found = [path]
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


# ---- help


@pytest.mark.parametrize("words", commands(cli.cli), ids=" ".join)
def test_every_command_has_help_that_fits(words: tuple[str, ...], run: Any) -> None:
    outcome = run(*words, "--help")
    assert outcome.code == 0
    assert "Usage: akd-dist" in outcome.out
    assert "..." not in re.sub(r"(s3://|RUN|\[ARGS\])\.\.\.", "", outcome.out), "a summary is cut off"
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("words", [(), ("models",), ("stores",), ("recipe",)], ids=" ".join)
def test_a_group_alone_shows_its_help(words: tuple[str, ...], run: Any) -> None:
    outcome = run(*words)
    assert outcome.code == 0
    assert outcome.out == run(*words, "--help").out


def test_commands_stand_in_the_order_of_their_story(run: Any) -> None:
    listed = re.findall(r"^  ([a-z-]+)  ", run("--help").out.split("Commands:")[1], flags=re.MULTILINE)
    assert listed == [
        "quickstart", "cache-teacher", "train-students", "compare", "tune", "status", "report", "evaluate", "predict",
        "export", "models", "stores", "recipe",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words", [("--help",), ("train-students", "--help"), ("stores", "list", "--help")], ids=" ".join
)
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        f"import sys\nfrom akd_dist.cli import main\ntry:\n    main({list(words)!r})\nexcept SystemExit:\n"
        "    print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "ray", "zarr", "numpy", "pydantic", "rich", "ruamel", "sklearn", "pyarrow"}


def test_the_version(run: Any) -> None:
    assert re.fullmatch(r"akd-dist \d+\.\d+\.\d+\n", run("--version").out)


# ---- refusals


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("cache-techer",), "Did you mean 'cache-teacher'?"),
        (("cache-teacher",), "Missing argument 'RECIPE'"),
        (("train-students", "x.yaml", "--frsh"), "Did you mean"),
        (("stores", "shw"), "No such command 'shw'"),
        (("train-students", "x.yaml"), "there is no recipe x.yaml"),
        (("train-students", DIGITS, "--set", "data.vews=3"), "--set data.vews=3: key data.vews is not known"),
        (("cache-teacher", DIGITS, "--set", "data.views"), "is not key=value"),
        (("compare", DIGITS, "--seeds", "1"), "an interval needs two seeds or more"),
        (("compare", DIGITS, "--seeds", "some"), "'some' is not a valid integer"),
        (("stores", "repair", "abc", "--set", "a=1"), "--set changes a recipe and none is given"),
    ],
    ids=lambda value: " ".join(value).replace(str(ROOT), "") if isinstance(value, tuple) else None,
)
def test_wrong_options_and_recipes_exit_2_before_anything(words: tuple[str, ...], what: str, run: Any) -> None:
    plain = run(*words)
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.startswith("error: ")
    assert what in plain.err
    assert "next: " in plain.err
    if "cache-techer" not in words and "shw" not in words:  # where it is unknown what --json would mean
        assert what in run(*words, "--json").error["what"]
    assert not list(Path.cwd().iterdir())


def test_a_refusal_with_json_is_one_document_on_stdout(run: Any) -> None:
    outcome = run("recipe", "check", DIGITS, "--set", "data.views=0", "--json")
    assert outcome.code == 2
    assert outcome.error["got"] == "0"
    assert outcome.error["expected"] == "greater than or equal to 1"
    assert "data.views" in outcome.err


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AkdError)],
    ids=lambda kind: kind.__name__,
)
def test_every_refusal_has_its_exit_code(kind: type[AkdError], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise kind("it is so", got="this", expected="that", next="do this")

    monkeypatch.setattr(akd_dist, "cache_teacher", refuse)
    outcome = run("cache-teacher", DIGITS, "--json")
    assert outcome.code == kind.code
    assert outcome.error == {
        "code": kind.code,
        "what": "it is so",
        "got": "this",
        "expected": "that",
        "next": "do this",
    }
    assert outcome.err == "error: it is so\n  got: this\n  expected: that\n  next: do this\n"


def test_a_bug_names_the_log_that_holds_its_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: 1 // 0)
    outcome = run("cache-teacher", DIGITS, "--set", "name=a b", "--json")
    assert outcome.code == 70
    assert outcome.error["got"] == "ZeroDivisionError: integer division or modulo by zero"
    log = re.search(r"the log (\S+\.log)", outcome.err)
    assert log is not None
    text = Path(log[1]).read_text()
    assert "Traceback (most recent call last)" in text
    assert "akd-dist cache-teacher" in text
    assert "'name=a b'" in text


def test_a_bug_with_half_a_character_in_it_is_kept_and_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> NoReturn:
        raise ZeroDivisionError("a name with \ud800")

    monkeypatch.setattr(akd_dist, "cache_teacher", broken)
    outcome = run("cache-teacher", DIGITS)
    assert outcome.code == 70
    log = Path(outcome.err.split("the log ")[1].split(";")[0])
    assert "ZeroDivisionError: a name with \\ud800" in log.read_text()


@pytest.mark.parametrize("setting", ['name="\\ud800"', 'data.train="\\udcff"', '"\\ud800"=1'])
def test_half_a_character_in_a_recipe_is_refused(setting: str, run: Any) -> None:
    for words in (["recipe", "check", DIGITS], ["train-students", DIGITS, "--dry-run", "--json"]):
        outcome = run(*words, "--set", setting)
        assert outcome.code == 2
        assert "--set" in outcome.err


def test_a_bug_is_told_where_no_log_folder_can_be_made(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").absolute()))
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: 1 // 0)
    outcome = run("cache-teacher", DIGITS)
    assert outcome.code == 70
    assert Path(outcome.err.split("the log ")[1].split(";")[0]).exists()


def test_an_interrupt_exits_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(akd_dist, "train_students", interrupted)
    outcome = run("train-students", DIGITS, "--json")
    assert outcome.code == 130
    assert "run the same command again" in outcome.error["next"]


# ---- the two verbs: what the command line adds to them


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
    fleet = FLEET | {"students": [STUDENT, lost]}
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


# ---- stores


def test_what_a_document_is_of_comes_first() -> None:
    model = {"depth": 3, "kind": "cnn"}
    assert in_words({"flip": True, "kind": "x", "model": model}) == "kind x, flip True, model (kind cnn, depth 3)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store root with one sealed store."""
    shutil.copytree(stores.GOLDEN, tmp_path / "stores")
    return tmp_path / "stores"


def test_an_empty_root_has_no_stores(run: Any) -> None:
    assert "no stores under stores" in run("stores", "list").out
    assert run("stores", "list", "--json").document == {"store_root": str(Path.cwd() / "stores"), "stores": []}
    assert run("stores", "gc", "--json").document == {"dry_run": False, "removed": [], "stores": [], "problems": []}


@pytest.mark.parametrize("command", ["show", "verify", "repair"])
def test_a_store_that_is_not_there_is_refused(command: str, run: Any) -> None:
    outcome = run("stores", command, "abc", "--json")
    assert outcome.code == 4
    assert "no store begins with 'abc'" in outcome.error["what"]


def test_a_sealed_store_is_listed_and_shown_by_a_short_id(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    listed = run("stores", "list")
    assert re.search(
        rf"^{store.name[:12]} +sealed +mlp-16 1057a9 +train 300 b277fd +2 ", listed.out, flags=re.MULTILINE
    )
    assert max(map(len, listed.out.splitlines())) <= 160
    shown = run("stores", "show", store.name[:6])
    assert store.name in shown.out
    assert "batch_rows" in shown.out
    document = run("stores", "show", store.name[:6], "--json").document
    assert document["manifest"]["id"] == document["id"] == store.name
    assert document["store"] == str(store)


def test_a_hint_of_another_shape_stops_nothing(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    for hint in ('{"split": [1]}', '{"recipe": 4}', "[]", "{"):
        (store / "source.json").write_text(hint)
        assert run("stores", "list").code == 0, hint
        refused = run("stores", "repair", store.name[:6], "--json")
        assert (refused.code, refused.error["next"]) == (4, "add --recipe RECIPE"), hint


def test_an_unsealed_store_says_how_far_it_is(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    (store / "manifest.json").unlink()
    assert "shards" in run("stores", "list").out
    shown = run("stores", "show", store.name[:12])
    assert shown.code == 0
    assert re.search(r"state +\d+ of \d+ shards", shown.out)
    assert run("stores", "verify", store.name[:12]).code == 4


def test_a_list_fits_a_narrow_terminal_and_a_pipe_has_more(
    root: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store,) = root.iterdir()
    hint = {"split": "validation", "recipe": {"data": {"train": {"kind": "parquet", "path": "/data/birds-of-europe"}}}}
    (store / "source.json").write_text(json.dumps(hint))
    with using([str(store)], run=str(Path.cwd() / "runs" / "one")):
        pass
    assert "birds-of-europe validation 300 b277fd" in run("stores", "list").out
    narrow = re.sub("\x1b\\[[0-9;]*m", "", in_a_terminal("stores", "list"))
    assert max(len(line.rstrip()) for line in narrow.splitlines()[1:]) <= 80
    for told in (store.name[:8], "mlp-16", "1057a9", "birds-of-europe", "b277fd", "6.2 kB", "just now"):
        assert told in narrow, told
    assert "…" not in narrow


def test_documents_of_stores_say_who_used_them(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    one = Path.cwd() / "runs" / "one"
    with using([str(store)], run=str(one), lock=one / "lock"):
        pass
    listed = StoresDocument.model_validate(run("stores", "list", "--json").document)
    shown = StoreDocument.model_validate(run("stores", "show", store.name[:6], "--json").document)
    assert listed.stores[0].runs == shown.runs == [str(one)]
    assert shown.uses[0].lock == str(one / "lock")
    assert shown.model == "mlp-16"
    assert shown.receipts.hosts
    assert shown.decoded is None
    in_words = run("stores", "show", store.name[:6]).out
    assert re.search(r"^used +20\d\d-\S+ \S+ +runs/one +\S+@\S+ ", in_words, re.MULTILINE)
    open_decoded(open_store(str(store)), cache_folder())
    assert re.search(r"decoded +\S+ k?B on this machine", run("stores", "show", store.name[:6]).out)


def test_gc_removes_stores_only_when_it_may(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    assert run("stores", "gc").out == "0 files of interrupted runs removed\n"
    for words in ((store.name[:6],), ("--older-than", "0h"), ("--older-than", "3x", "--yes"), ("--unused-for", "2d")):
        assert run("stores", "gc", *words).code == 2, words
    assert "no stores to remove" in run("stores", "gc", "--older-than", "20000w", "--yes").out
    dry = run("stores", "gc", "--older-than", "0h", "--dry-run")
    assert (dry.code, "1 store, 6.2 kB" in dry.out) == (0, True)
    run_folder = Path.cwd() / "runs" / "one"
    with file_lock(run_folder / "lock", what="x"), using([str(store)], run="runs/one", lock=run_folder / "lock"):
        held = run("stores", "gc", store.name[:6], "--older-than", "0h", "--yes", "--json").document
    GcDocument.model_validate(held)
    assert f"in use by the run {run_folder} on " in held["stores"][0]["kept"]
    assert open_store(str(store)).verify() == []
    done = run("stores", "gc", "--older-than", "0h", "--yes")
    assert f"removed store {store.name[:12]}, 6.2 kB" in done.out
    assert list(root.iterdir()) == []


def test_a_bad_store_is_a_line_beside_the_others(root: Path, run: Any) -> None:
    """One whose folder cannot be listed, one of deep JSON, one whose words are markup to the table that shows them."""
    (store,) = root.iterdir()
    (store / "arrays.zarr/logits/c/0/0/0.0123456789ab.partial").touch()
    closed, deep = root / ("c" * 64), root / ("d" * 64)
    closed.mkdir()
    (closed / "creation.json").symlink_to("creation.json")  # which no user can follow
    deep.mkdir()
    (deep / "creation.json").write_bytes(b"[" * 200_000)
    source = {"kind": "parquet", "path": "/data/[/birds]"}
    (store / "source.json").write_text(json.dumps({"split": "train", "recipe": {"data": {"train": source}}}))
    listed = run("stores", "list")
    assert listed.code == 0
    assert "birds] train 300" in listed.out
    assert f"{'c' * 12}: cannot read {closed}/creation.json: Too many levels of symbolic links" in listed.err
    assert f"{'d' * 12}: {deep}/creation.json is damaged: " in listed.err
    problems = {one["id"]: one["problem"] for one in run("stores", "list", "--json").document["stores"]}
    assert problems[store.name] is None
    assert "symbolic links" in problems[closed.name]
    assert "is damaged" in problems[deep.name]
    assert run("stores", "verify", store.name[:6]).code == 0
    partial = str(next(root.rglob("*.partial")).relative_to(root))
    collected = run("stores", "gc", "--json", "--dry-run").document
    GcDocument.model_validate(collected)
    assert (collected["removed"], [one["id"] for one in collected["problems"]]) == (
        [partial, f"{'d' * 64}/"],
        ["c" * 64],
    )
    outcome = run("stores", "gc", "--older-than", "0h", "--yes")
    assert outcome.code == 0
    assert f"{'c' * 12}: cannot read" in outcome.err
    assert f"stays: {'c' * 12}, cannot read" in outcome.out
    assert [path.name for path in root.iterdir()] == ["c" * 64]


def test_gc_asks_on_a_terminal(root: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    refused = run("stores", "gc", "--older-than", "0h", "--json")
    assert (refused.code, refused.document["dry_run"], len(refused.document["stores"])) == (0, True, 1)
    for answer, left in (("n", 1), ("y", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
        outcome = run("stores", "gc", "--older-than", "0h")
        assert outcome.code == 0
        assert "remove 1 store, 6.2 kB? [y/N]" in outcome.err
        assert len(list(root.iterdir())) == left


def test_verify_finds_damage_and_exits_5(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    assert "is what was sealed" in run("stores", "verify", store.name[:12]).out
    shard = next((store / "arrays.zarr" / "logits" / "c").rglob("0"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(damaged)
    key = str(shard.relative_to(store))
    outcome = run("stores", "verify", store.name[:12])
    assert (outcome.code, outcome.out) == (5, "")
    assert key in outcome.err
    assert f"next: akd-dist stores repair {store.name[:12]}" in outcome.err
    as_json = run("stores", "verify", store.name[:12], "--json")
    assert as_json.code == 5
    assert [damage.key for damage in VerifyDocument.model_validate(as_json.document).damages] == [key]
    assert run("stores", "verify", store.name[:12], "--shallow").code == 0


# ---- report and recipe


def test_a_report_of_a_run_that_is_not_there(run: Any) -> None:
    outcome = run("report", "runs/nope", "--json")
    assert outcome.code == 4
    assert "runs/nope" in outcome.error["what"]


def test_a_report_is_written_and_named(run: Any) -> None:
    folder = Path("runs/digits")
    folder.mkdir(parents=True)
    (folder / "fleet.json").write_text(json.dumps(FLEET))
    for path in ("students/mlp-4-hard_labels-s0/metrics.jsonl",):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).touch()
    outcome = run("report", folder)
    assert outcome.code == 0
    assert "report  runs/digits/report.html" in outcome.out
    assert (folder / "report.html").exists()
    document = run("report", folder, "--json").document
    ReportDocument.model_validate_json(json.dumps(document))
    assert document["comparison"] is None
    there = folder.absolute()
    assert [(one["run"], one["report"]) for one in document["runs"]] == [(str(there), f"{there}/report.html")]
    (written,) = document["runs"][0]["groups"]
    assert written["seeds"] == [0]
    assert akd_dist.report(folder) == there / "report.html"


def test_recipe_check_lists_the_students(run: Any) -> None:
    outcome = run("recipe", "check", DIGITS)
    assert outcome.code == 0
    recipe = load_recipe(DIGITS)
    for student in recipe.students:
        assert student.name in outcome.out
    assert f"next: akd-dist train-students {DIGITS}\n" in outcome.out
    document = run("recipe", "check", DIGITS, "--json").document
    assert document["recipe"] == recipe.model_dump(mode="json")
    assert len(document["students"]) == len(recipe.students)


def test_recipe_check_of_a_large_fleet_is_short(run: Any) -> None:
    outcome = run("recipe", "check", DIGITS, "--set", f"students.0.grid.seed={list(range(500))}")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) < 250
    assert "more\n" in outcome.out


def test_recipe_schema_is_printed(run: Any) -> None:
    assert run("recipe", "schema").document == recipe_schema()


# ---- the same verbs in Python


def test_the_public_names_are_there() -> None:
    for name in akd_dist.__all__:
        assert callable(getattr(akd_dist, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        akd_dist.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_open_store_reads_rows(root: Path) -> None:
    (store,) = root.iterdir()
    opened = akd_dist.open_store(store)
    assert opened.rows(0, 0, 2).shape == (2, opened.classes)
    assert repr(opened).startswith(f"LogitStore('{store}': 2 views of ")


def test_open_store_takes_ids_as_the_commands_do(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (store,) = root.iterdir()
    for named in (f"{root}/{store.name[:6]}", root / store.name[:6], f"{root}/{store.name}/"):
        assert akd_dist.open_store(named).uri == str(store)
    assert akd_dist.open_store(store.name[:4], store_root=root).id == store.name
    monkeypatch.setenv("AKD_DIST_STORE_ROOT", str(root))
    assert akd_dist.open_store(store.name[:4]).id == akd_dist.open_store(store.name).id == store.name
    (tmp_path / "cafe").symlink_to(store)  # a folder that is there is what is meant
    monkeypatch.chdir(tmp_path)
    assert akd_dist.open_store("cafe").uri == akd_dist.open_store(tmp_path / "cafe").uri == str(tmp_path / "cafe")
    for named in ("fff0", f"{root}/fff0"):
        with pytest.raises(errors.RefusedError, match=f"no store begins with 'fff0' under {root}"):
            akd_dist.open_store(named)
    with pytest.raises(errors.RefusedError, match="no store"):
        akd_dist.open_store(root / "no-store")


# ---- streams, shells and the environment


def started(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it."""
    command = [sys.executable, "-m", "akd_dist", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)


COMPLETED = {
    "": ["quickstart", "cache-teacher", "train-students"],
    "st": ["status", "stores"],
    "stores ": ["list", "show", "import", "verify", "repair", "gc"],
    "train-students --st": ["--store-root"],
    "train-students r.yaml --tracker ": ["mlflow", "wandb"],
    "stores show a": ["ab" * 32],
    "stores gc ": ["ab" * 32, "cd" * 32],
    "stores show --store-root none ": [],
}


@pytest.mark.parametrize("typed", COMPLETED)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_stores(
    shell: str, typed: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ab" * 32, "cd" * 32, "teachers"):
        Path("kept", name).mkdir(parents=True)
    monkeypatch.setenv("AKD_DIST_STORE_ROOT", "kept")
    words = ["akd-dist", *typed.split(" ")]
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    monkeypatch.setenv("_AKD_DIST_COMPLETE", f"{shell}_complete")
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    found = lines[1::3] if shell == "zsh" else [re.split("[,\t]", line)[1] for line in lines if line]
    assert found[: len(COMPLETED[typed])] == COMPLETED[typed]
    assert typed == "" or len(found) == len(COMPLETED[typed])


@pytest.mark.parametrize(
    ("typed", "kind"),
    [("status ru", "dir"), ("train-students r", "file"), ("train-students r.yaml --run-root r", "dir")],
)
def test_a_shell_completes_paths_itself(typed: str, kind: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["akd-dist", *typed.split(" ")]
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setenv("_AKD_DIST_COMPLETE", "bash_complete")
    assert run().out == f"{kind},{words[-1]}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell(shell: str) -> None:
    done = started(env={**os.environ, "_AKD_DIST_COMPLETE": f"{shell}_source"})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_AKD_DIST_COMPLETE={shell}_complete" in done.stdout


def test_completion_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "akd-dist"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m akd_dist "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_AKD_DIST_COMPLETE=bash_source akd-dist)"\n'
        "COMP_WORDS=(akd-dist stores v) COMP_CWORD=2\n"
        '_akd_dist_completion akd-dist v stores\necho "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    assert done.stdout == "verify\n"


@pytest.mark.parametrize("words", [("-V",), ("--version",)])
def test_the_version_is_that_of_the_package(words: tuple[str, ...], run: Any) -> None:
    assert run(*words).out == f"akd-dist {akd_dist.__version__}\n"
    assert started(*words).stdout == f"akd-dist {akd_dist.__version__}\n"


def test_roots_come_from_the_environment(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def where() -> tuple[str, str]:
        return run("stores", "list", "--json").document["store_root"], STORE_ROOT.chosen()

    asked: dict[str, Any] = {}

    def train(_: Any, options: RunOptions) -> tuple[None, dict[str, Any]]:
        asked.update(store_root=options.stores, run_root=str(options.runs))
        return None, FLEET

    monkeypatch.setattr("akd_dist.jobs.train_students.run_recipe", train)
    monkeypatch.setenv("AKD_DIST_STORE_ROOT", "")
    monkeypatch.setenv("AKD_DIST_RUN_ROOT", "")
    assert where() == (str(Path.cwd() / "stores"),) * 2
    monkeypatch.setenv("AKD_DIST_STORE_ROOT", "of-all")
    monkeypatch.setenv("AKD_DIST_RUN_ROOT", "runs-of-all")
    assert where() == (str(Path.cwd() / "of-all"),) * 2
    akd_dist.train_students(DIGITS)
    expected = {"store_root": str(Path.cwd() / "of-all"), "run_root": str(Path.cwd() / "runs-of-all")}
    assert {name: asked[name] for name in expected} == expected
    asked.clear()
    assert run("train-students", DIGITS, "--json").code == 0
    assert {name: asked[name] for name in expected} == expected
    assert run("stores", "list", "--store-root", "given", "--json").document["store_root"] == str(Path.cwd() / "given")
    for words in (("stores", "list"), ("train-students",)):
        assert "AKD_DIST_STORE_ROOT" in run(*words, "--help").out


@pytest.mark.parametrize("words", [("stores", "list"), ("recipe", "schema"), ("recipe", "check", DIGITS), ("--help",)])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "akd_dist", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=900, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [("stores", "list", "--json"), ("recipe", "check", DIGITS)])
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command(words: tuple[str, ...], closed: str) -> None:
    script = f'"$0" -m akd_dist "$@" {closed}'
    done = subprocess.run(["sh", "-c", script, sys.executable, *words], capture_output=True, timeout=900, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_beyond_the_terminals_encoding_are_shown(encoding: str, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + "/Bücher-τ".encode() + (b"-\xff" if encoding == "utf-8" else b"")
    given = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} if encoding == "ascii" else {}
    environment = {**os.environ, **given} | ({"PYTHONIOENCODING": encoding} if encoding == "latin-1" else {})
    command: list[str | bytes] = [sys.executable, "-m", "akd_dist", "stores", "list", "--store-root", root]
    plain, document = (
        subprocess.run(words, env=environment, capture_output=True, timeout=900, check=True)
        for words in (command, [*command, "--json"])
    )
    shown = "Bücher-\\u03c4".encode("latin-1") if encoding == "latin-1" else root
    assert shown in plain.stdout
    assert os.fsencode(json.loads(document.stdout.decode(encoding))["store_root"]) == root
    table = subprocess.run(
        [sys.executable, "-m", "akd_dist", "recipe", "check", DIGITS], env=environment, capture_output=True, timeout=900
    )
    assert (table.returncode, table.stderr) == (0, b"")


@pytest.mark.parametrize("wanted", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_none_are_wanted(wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for name, environment in (("plain", wanted), ("coloured", {})):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            for variable in ("NO_COLOR", "FORCE_COLOR"):
                patch.delenv(variable, raising=False)
            for variable, value in environment.items():
                patch.setenv(variable, value)
            told[name] = in_a_terminal("stores", "lst") + in_a_terminal("recipe", "check", DIGITS)
    assert "\x1b[" in told["coloured"]
    assert "\x1b[3" not in told["plain"]
    assert "\x1b[38" not in told["plain"]


def in_a_terminal(*words: str, width: int = 80) -> str:
    """What a terminal gets to see of a command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "akd_dist", *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that nobody is there any more
        while data := os.read(ours, 65536):
            seen += data
    os.close(ours)
    process.wait(timeout=900)
    return seen.decode()


LONG = "a-student-with-a-name-that-is-longer-than-most-and-goes-on-and-on-until-it-ends-in"


@pytest.mark.parametrize("width", [None, 80, 40])
def test_no_table_is_cut(width: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipe check` in a pipe, in a terminal, and in a narrow one: every letter of the names is there."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"{LONG}-{end}" for end in ("one", "two")]
    recipe = tmp_path / "r.yaml"
    students = [f"  - {{name: {name}, model: {{kind: mlp, hidden: 8}}, objective: {{kind: hard_labels, epochs: 1}}, "
                "optimizer: {kind: adamw, lr: 1e-2}}" for name in names]  # fmt: skip
    recipe.write_text(Path(DIGITS).read_text().split("students:")[0] + "students:\n" + "\n".join(students))
    if width is None:
        assert all(name in started("recipe", "check", str(recipe)).stdout for name in names)
        return
    monkeypatch.delenv("COLUMNS")
    out = re.sub("\x1b\\[[0-9;]*m", "", in_a_terminal("recipe", "check", str(recipe), width=width))
    table = out.split("workers" if width == 80 else "batch")[1].split("next:")[0]
    assert "…" not in table
    letters = re.sub(
        r"[^a-z-]", "", "".join(line[: len(line) // 2] if width == 80 else line for line in table.splitlines())
    )
    assert width == 40 or all(name in letters for name in names)


def test_a_terminal_obeys_no_foreign_document() -> None:
    hostile = "\x1b]0;owned\x07\x9b2J\r plain\n\ttext é"
    error = AkdError(hostile, got=hostile)
    for told in (str(error), error.line, error.what):
        assert not set(told) & {"\x1b", "\x07", "\x9b", "\r"}
        assert "\\x1b]0;owned" in told
        assert "text é" in told
    table = table_of("name")
    table.add_row(hostile)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
