"""docs/tutorial/index.md as a reader follows it: its files are written, its commands run, in order, in one folder.

In `make test` the lines of `akd-dist` are given to it in this process, and trained on the session's Ray by processes
that are forked; `make test-slow` runs the page in a shell, each line with all that it starts.

What the page shows below a command must hold of what it prints: line by line, numbers aside, since they vary with the
machine; `...` stands for what is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from akd_dist.cli import main
from tests.survivors import forked_cohorts

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "index.md"
QUICKSTART = "make quickstart"  # a checkout, a minute: tests/cli/test_quickstart.py runs what the Makefile does for it

pytestmark = pytest.mark.ray


class Block(NamedTuple):
    """A fenced block: a file, if it has a title; commands (bash); or what the commands before it print (text)."""

    language: str
    title: str | None
    text: str


def blocks() -> list[Block]:
    found = re.findall(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(language, title or None, text) for language, title, text in found]


def in_a_shell(command: str, folder: Path) -> str:
    """What a shell line prints in this folder, with this Python's programs first; it must succeed."""
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", COLUMNS="200")
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert "arning" not in done.stdout
    return done.stdout


def in_this_process(command: str, folder: Path) -> str:
    """What a shell line prints in this folder, and prints here if it is one of `akd-dist`."""
    program, *arguments = shlex.split(command)
    if program != "akd-dist":
        return in_a_shell(command, folder)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as left:
            main(arguments)
    printed.seek(0)
    text = printed.read()
    assert not left.value.code, f"{command}\n{text}"
    assert "arning" not in text
    return text


def shape(line: str) -> str:
    """A line without what varies: numbers, ids, spaces, rules."""
    return " ".join(re.sub(r"[0-9a-f]{12,}|[\d.,]*\d", "0", line).replace("─", "").split())


def missing(shown: str, printed: str) -> list[str]:
    """The lines of a page that a command did not print, in this order; the end of a line may be left out, too."""
    rest: Iterator[str] = iter([shape(line) for line in printed.splitlines()])
    expected = {line: shape(line.removesuffix("...")) for line in shown.splitlines()}
    return [
        line
        for line, begins in expected.items()
        if begins and not any(found == begins or (line.endswith("...") and found.startswith(begins)) for found in rest)
    ]


def test_the_page_works_and_prints_what_it_shows(ray_cluster: None, tmp_path: Path) -> None:
    with forked_cohorts():
        follow(tmp_path, in_this_process)


@pytest.mark.slow
def test_the_page_works_in_a_shell(tmp_path: Path) -> None:
    follow(tmp_path, in_a_shell)


def follow(tmp_path: Path, run: Callable[[str, Path], str]) -> None:
    """Do what the page says, in this folder, and compare what is printed with what it shows."""
    printed = ""
    for language, title, text in blocks():
        if title is not None:
            (tmp_path / title).write_text(text)
        elif language == "bash":
            printed = "".join(run(line, tmp_path) for line in text.splitlines() if line != QUICKSTART)
        else:
            assert language == "text", f"nobody runs this block: {text}"
            assert missing(text, printed) == [], f"the page shows other lines than these:\n{printed}"
    assert (tmp_path / "runs" / "shapes-kd" / "report.html").exists()


def test_the_quickstart_of_the_page_is_the_makefiles() -> None:
    assert blocks()[0].text == f"{QUICKSTART}\n"
    assert "quickstart: $(VENV)/.installed" in (PAGE.parents[2] / "Makefile").read_text()


@pytest.mark.parametrize("printed", ["a store\nis sealed: 3 shards", "is sealed: 4 shards\nis a hit: the store 17"])
def test_a_line_that_is_not_printed_or_too_early_is_missing(printed: str) -> None:
    shown = "is a hit: the store 18\n...\nis sealed: 24 shards\n"
    assert missing(shown, printed)
    assert missing("...\nis sealed: 24 shards", printed) == []
