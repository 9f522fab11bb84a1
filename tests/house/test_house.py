"""The house keeps its shape: floors import downwards, nothing is unpickled, imports are instant, versions pinned."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
# Every module once, by the folder that it really lies in: the symlinks in akd_dist are not followed.
ROOMS = sorted(path.parent for path in (ROOT / "akd_dist").glob("*/__init__.py"))
MODULES = sorted(
    path
    for folder in ("akd_dist", "storage", "jobs")
    for path in (ROOT / folder).rglob("*.py")
    if not {"akd_dist/storage", "akd_dist/jobs"} & set(map(str, path.relative_to(ROOT).parents))
)
# What may lie in akd_dist/ itself, beside the rooms.
FLAT = {"__init__.py", "__main__.py"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; `from a import b` may mean the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import relative to its package"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


# --- rooms, and what they may import ----------------------------------------------------------------------------------


def lint_imports(*more: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([script, "--no-cache", *more], cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_imports_keep_the_contracts() -> None:
    """As in pyproject.toml: rooms import downwards, no module in a circle, ray only in jobs, zarr only in storage."""
    done = lint_imports()
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_the_contracts_see_what_they_should(tmp_path: Path) -> None:
    """Turned upside down, the very first one is broken: it is not kept because nothing was looked at."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = "\n    ".join(["", *reversed(contract["layers"])])
    config = tmp_path / "upside-down.ini"
    config.write_text(
        "[importlinter]\nroot_package = akd_dist\n"
        f"[importlinter:contract:1]\nname = floors\ntype = layers\ncontainers =\n    akd_dist\nlayers ={layers}\n"
    )
    done = lint_imports("--config", str(config))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "akd_dist.storage is not allowed to import akd_dist.base" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_modules_have_one_name(path: Path) -> None:
    """`import storage` would make a second copy of every class, and `except AkdError` would miss half of them."""
    roots = {name.split(".")[0] for _, name in imports(ast.parse(path.read_text()))}
    assert not roots & {"storage", "jobs"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_belongs_there(room: Path) -> None:
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


def test_modules_lie_in_rooms() -> None:
    flat = {path.name for path in (ROOT / "akd_dist").glob("*.py")}
    assert flat == FLAT


def test_tests_lie_in_folders_of_the_same_names() -> None:
    """Beside `house`, for what is of no room, the docs and the ways in; shared helpers lie above them."""
    assert not list((ROOT / "tests").glob("test_*.py"))
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - {room.name for room in ROOMS} <= {"house", "docs", "deploy"}


# --- nothing is executed that was data --------------------------------------------------------------------------------

UNSAFE_CALLS = {"eval", "exec", "__import__"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"), ("joblib", "load"), ("os", "system"), ("os", "popen"),
}  # fmt: skip
# PyYAML's `load` builds objects; recipes are read with ruamel.yaml, which does so only as YAML(typ="unsafe").
UNSAFE_MODULES = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "yaml")


def unsafe(tree: ast.AST, *, tensors: bool = False) -> Iterator[str]:
    """What could run code that data bring.

    Args:
        tensors: whether `torch.load` may be called, with `weights_only=True` written beside it.
    """
    allowed = {node.func for node in ast.walk(tree) if tensors and isinstance(node, ast.Call) and takes_tensors(node)}
    for line, name in imports(tree):
        if under(name, UNSAFE_MODULES):
            yield f"line {line}: import of {name}"
        if tuple(name.rsplit(".", 1)) in UNSAFE_ATTRIBUTES:
            yield f"line {line}: import of {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in UNSAFE_CALLS:
                yield f"line {node.lineno}: {function.id}()"
            if any(keyword.arg == "allow_pickle" and not is_false(keyword.value) for keyword in node.keywords):
                yield f"line {node.lineno}: allow_pickle"
            if any(keyword.arg == "typ" and is_unsafe(keyword.value) for keyword in node.keywords):
                yield f"line {node.lineno}: an unsafe YAML loader"
            if any(keyword.arg == "shell" and not is_false(keyword.value) for keyword in node.keywords):
                yield f"line {node.lineno}: shell"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in allowed:
            pair = (node.value.id, node.attr)
            if pair in UNSAFE_ATTRIBUTES:
                yield f"line {node.lineno}: {pair[0]}.{pair[1]}"


def takes_tensors(call: ast.Call) -> bool:
    """Whether torch's own loader is told to take tensors and plain containers, and nothing that runs."""
    said = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
    return ast.unparse(call.func) == "torch.load" and isinstance(said, ast.Constant) and said.value is True


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_unsafe(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and node.value in ("rt", "safe", "pure"))


CHECKPOINTS = ROOT / "akd_dist" / "models" / "checkpoint_files.py"
"""The one module that reads what torch.save wrote."""
SHIPPED = MODULES + sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not list(unsafe(ast.parse(path.read_text()), tensors=path == CHECKPOINTS))


@pytest.mark.parametrize("arguments", ["", ", weights_only=False", ", weights_only=safe", ", **options"])
def test_where_state_dicts_are_read_they_are_read_as_tensors(arguments: str) -> None:
    assert not list(unsafe(ast.parse("torch.load(path, weights_only=True)"), tensors=True))
    assert list(unsafe(ast.parse(f"torch.load(path{arguments})"), tensors=True))
    assert list(unsafe(ast.parse("load = torch.load"), tensors=True))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "import yaml",
        "YAML(typ='unsafe')",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_safety_test_sees_what_it_should(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(ROOT / "jobs")], ids=named)
def test_no_task_is_cancelled(path: Path) -> None:
    """Ray 2.60 aborts the driver where that meets the task's end."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert "ray.cancel" not in map(ast.unparse, calls)


# --- the folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["storage", "jobs"])
def test_the_floors_are_relative_symlinks_to_top_level_folders(name: str) -> None:
    link = ROOT / "akd_dist" / name
    assert link.is_symlink()
    assert link.readlink() == Path(f"../{name}")
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


@pytest.mark.parametrize("name", ["storage", "jobs"])
def test_a_floor_refuses_its_other_name(name: str) -> None:
    done = run_python(f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert f"import akd_dist.{name}, not {name}" in done.stderr


def test_no_file_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    telling = re.compile(r"(?<![\w.])/(work|root|home/\w+|tmp/\w)/")
    found = [
        name
        for name in listed.stdout.splitlines()
        if (path := ROOT / name).suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json") and path.is_file()
        if telling.search(path.read_text())
    ]
    assert not found


# --- instant imports --------------------------------------------------------------------------------------------------


def run_python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=900)


def children_cpu() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


HEAVY = ("torch", "ray", "zarr", "obstore", "pyarrow", "sklearn", "matplotlib", "numpy", "pydantic")
REPORT_HEAVY = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"


def test_import_is_instant() -> None:
    before = children_cpu()
    done = run_python(f"import akd_dist\n{REPORT_HEAVY}")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert children_cpu() - before < 2  # a third of a second; torch alone takes longer than two


def test_help_is_instant(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom akd_dist.cli import main\nsys.argv = ['akd-dist', '--help']\n"
        f"try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n{REPORT_HEAVY}"
    )
    before = children_cpu()
    done = run_python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cache-teacher" in done.stdout
    assert "train-students" in done.stdout
    assert not {"torch", "ray", "zarr", "sklearn", "matplotlib"} & set(done.stdout.splitlines()[-1].split())
    assert children_cpu() - before < 2


# --- pins and ways in -------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "exact versions, no local labels"
    return dict(line.split("==") for line in lines)


def test_every_package_is_installed() -> None:
    """An editable install has them all, whatever is listed; a wheel, and so an image, has these alone."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert {name if name.startswith("akd_dist") else f"akd_dist.{name}" for name in folders} == set(listed)


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    extras = project["optional-dependencies"]
    tested = [text for extra, texts in extras.items() if extra != "timm" for text in texts]
    for text in [*project["dependencies"], *tested]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # the extras that tests need
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{text} refuses the pinned {version}"


def test_ci_runs_make_check_and_make_test_alone() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "make check", "exec make test"]


def test_hooks_are_valid_and_need_no_downloads() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(path)], check=True, timeout=900)
    repos = YAML(typ="safe", pure=True).load(path)["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    assert {hook["language"] for repo in repos for hook in repo["hooks"]} <= {"system", "pygrep", "fail"}


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{named(document)} links to {target}"


def test_recipes_in_the_documents_are_valid(tmp_path: Path) -> None:
    from akd_dist.recipe import load_recipe

    text = (ROOT / "docs" / "howto" / "recipes.md").read_text()
    whole, *teachers = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    paths = [tmp_path / f"{number}.yaml" for number in range(3)]
    paths[0].write_text(whole)
    for path, teacher in zip(paths[1:], teachers, strict=True):
        path.write_text(re.sub(r"^teacher:.*?(?=^\w)", teacher, whole, flags=re.DOTALL | re.MULTILINE))
    takd = "{model: {kind: resnet, depth: 8}, objective: {kind: takd, epochs: 3}, optimizer: {kind: sgd, lr: 0.1}}"
    assert len(load_recipe(paths[0]).students) == 18
    assert load_recipe(paths[1]).teacher.train is not None
    assert len(load_recipe(paths[2], [f"students=[{takd}]"]).teacher.chain) == 1


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    tree = re.search(r"^    base/.*?(?=^\S)", text, flags=re.DOTALL | re.MULTILINE)
    assert tree is not None
    room, shown = "", set()
    for line in tree.group().splitlines():
        if found := re.match(r"    ([\w/]+)/ ", line):
            room = found.group(1)
        elif found := re.match(r"      ([\w./]+\.py) ", line):
            shown.add(f"{room}/{found.group(1)}")
    real = {named(path).removeprefix("akd_dist/") for path in MODULES if path.name != "__init__.py"} - FLAT
    assert real - shown == set(), "files that docs/explanation/architecture.md does not explain"
    assert shown - real == set(), "files that docs/explanation/architecture.md explains and that are not there"
