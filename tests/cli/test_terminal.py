"""Commands as shells start them: streams, completion, the environment, terminals."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import AkdError
from akd_dist.base.places import STORE_ROOT
from akd_dist.cli.show import table_of
from akd_dist.options import RunOptions
from tests.told import DIGITS, FLEET, in_a_terminal, started

pytestmark = pytest.mark.usefixtures("elsewhere")

COMPLETED = {
    "": ["quickstart", "plan", "cache-teacher", "train-students"],
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

    def train(_: Any, options: RunOptions, **__: Any) -> tuple[None, dict[str, Any]]:
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
