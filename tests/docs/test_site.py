"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and leaves out no command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import akd_dist
from akd_dist.cli import cli

ROOT = Path(__file__).parents[2]
LOADS = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>|@import")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert {page.name: LOADS.findall(page.read_text()) for page in pages if LOADS.search(page.read_text())} == {}
    # The theme fetches mermaid where a page has a diagram of it; pages of the site have pictures instead.
    assert not [page for page in pages if 'class="mermaid"' in page.read_text()]


@pytest.mark.parametrize(
    "loads", ['<script src="https://a.example/b.js">', '<link rel="x" href=//a.example/b.css>', "@import url(b.css)"]
)
def test_what_is_looked_for_is_found(loads: str) -> None:
    assert LOADS.search(loads)


def test_every_function_and_command_has_its_place(site: Path) -> None:
    python = (site / "reference" / "python.html").read_text()
    verbs = [getattr(akd_dist, name) for name in akd_dist.__all__]
    assert [verb for verb in verbs if f'id="{verb.__module__}.{verb.__name__}"' not in python] == []
    commands = (site / "reference" / "command-line.html").read_text()
    assert [name for name in names(cli) if f'id="akd-dist-{name}"' not in commands] == []


def names(group: click.Group) -> list[str]:
    """Commands and those below them, as their headings are called."""
    return [
        name
        for command in group.commands.values()
        for name in [
            str(command.name),
            *(f"{command.name}-{below}" for below in (command.commands if isinstance(command, click.Group) else ())),
        ]
    ]
