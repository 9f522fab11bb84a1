"""The command line: exit codes, messages without tracebacks, one JSON document on stdout, and what people read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest

import akd_dist
from akd_dist import cli
from akd_dist.base import errors
from akd_dist.base.errors import AkdError
from akd_dist.documents.report import ReportDocument
from akd_dist.recipe import load_recipe, recipe_schema
from tests.told import DIGITS, FLEET, ROOT

pytestmark = pytest.mark.usefixtures("elsewhere")


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
        "quickstart", "plan", "cache-teacher", "train-students", "compare", "tune", "status", "report", "evaluate",
        "predict", "generate", "export", "models", "stores", "recipe",
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
