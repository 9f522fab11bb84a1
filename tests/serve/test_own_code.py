"""A model of the user's own, brought with its code: what they are told to write, and where a trusted module may lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.base.trusted import Trusted
from akd_dist.cli import main
from akd_dist.models.folder import load_model
from akd_dist.recipe import load_recipe
from tests.fleets import a_recipe, a_student

NETS = """
from pathlib import Path
from torch import nn
Path(__file__ + ".ran").touch()
def net(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has met no module of the test, and forgets those that it met."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = set(sys.modules)
    yield monkeypatch
    for name in set(sys.modules) - before:
        if name.startswith("nets_"):
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([*words, "--cache-root=cache"])
    return int(left.value.code or 0), *capsys.readouterr()


def brought(folder: Path, module: str) -> Path:
    """A module, its weights, and a recipe that names both."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(NETS)
    torch.save({"1.weight": torch.eye(10, 64), "1.bias": torch.zeros(10)}, folder / "net.pth")
    taught = {"model": {"kind": "custom", "factory": f"{module}:net"}, "weights": "net.pth"}
    recipe = a_recipe([a_student("one")], teacher=taught)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder


def test_an_import_says_which_code_its_recipe_has_to_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh: pytest.MonkeyPatch
) -> None:
    folder = brought(tmp_path / "mine", "nets_told")
    fresh.chdir(tmp_path)
    code, out, err = run(capsys, "models", "import", "mine/recipe.yaml", "mine/net.pth", "--out", "mine/a net")
    assert code == 0, err
    *_, advice, taught, listed = out.splitlines()
    assert advice == "next: put these lines into mine/recipe.yaml, in place of its teacher:"
    assert (taught, listed) == ('teacher: {weights: "a net"}', "code: [nets_told]")
    (folder / "used.yaml").write_text(
        f"name: used\ndata: {{train: {{kind: digits}}}}\n{taught}\n{listed}\nstudents:\n"
        "- {model: {kind: mlp, hidden: 8}, objective: {kind: kd, epochs: 1}, optimizer: {kind: adamw, lr: 1e-3}}\n"
    )
    used = load_recipe(folder / "used.yaml").own()
    assert used.teacher.weights == str(folder / "a net")
    assert load_model(used.teacher.weights, used.trusted)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    code, out, err = run(capsys, "models", "import", "mine/recipe.yaml", "mine/net.pth", "--out", "net", "--json")
    assert (code, json.loads(out)["code"]) == (0, ["nets_told"]), err


def test_a_trusted_module_may_lie_in_the_working_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh: pytest.MonkeyPatch
) -> None:
    folder = brought(tmp_path / "mine", "nets_here")
    akd_dist.import_model(folder / "recipe.yaml", folder / "net.pth", tmp_path / "net", cache_root=tmp_path / "cache")
    del sys.modules["nets_here"]
    sys.path.remove(str(folder))
    (folder / "nets_here.py.ran").unlink()
    commands = (
        ("evaluate", "../net", "digits", "--json"),
        ("predict", "../net", "digits", "--out", "said.parquet"),
    )
    fresh.chdir(folder)
    for command in commands:
        code, _, err = run(capsys, *command)
        assert (code, "is not run" in err, "--trust nets_here" in err) == (4, True, True)
    assert not (folder / "nets_here.py.ran").exists()
    (folder / "json5.py").write_text("raise SystemExit('only what is listed may be imported from here')")
    for command in commands:
        code, _, err = run(capsys, *command, "--trust", "nets_here")
        assert code == 0, err
    assert (folder / "nets_here.py.ran").exists()
    assert str(folder) not in sys.path
    with pytest.raises(ModuleNotFoundError):
        __import__("json5")
    assert akd_dist.load_model("../net", trust="nets_here")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_trusted_module_that_is_nowhere_is_told_where_to_put(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    folder = brought(tmp_path / "mine", "nets_gone")
    akd_dist.import_model(folder / "recipe.yaml", folder / "net.pth", tmp_path / "net", cache_root=tmp_path / "cache")
    del sys.modules["nets_gone"]
    sys.path.remove(str(folder))
    fresh.chdir(tmp_path)
    with pytest.raises(RefusedError, match=r"put nets_gone\.py here, or on Python's path"):
        akd_dist.load_model("net", trust="nets_gone")
    assert Trusted().working == str(tmp_path)
