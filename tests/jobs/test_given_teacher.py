"""A checkpoint from elsewhere as the teacher: asked of labels, cached once however it comes, and found again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import akd_dist
from akd_dist import recipe as recipes
from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.cli import main
from akd_dist.data.row_cache import prepare
from akd_dist.distill import teacher
from akd_dist.documents.json_schema import schemas
from akd_dist.jobs.cache_teacher import compute_in_process, walk_chain
from akd_dist.jobs.planning.caching import open_inputs
from akd_dist.jobs.planning.models import CachedModel
from akd_dist.jobs.repair import repair
from akd_dist.jobs.run_folder import run_identity
from akd_dist.jobs.train_teacher import Workspace, run_in_process
from akd_dist.jobs.working_dir import WorkingDir
from akd_dist.models import imported
from akd_dist.models.folder import load_model
from akd_dist.recipe import Recipe
from akd_dist.storage.reader import open_store
from akd_dist.storage.roots import open_root
from tests.fleets import HARD, a_recipe, a_student, a_teacher, store_bytes

pytestmark = pytest.mark.usefixtures("own_process_state")

CNN = {"kind": "cnn", "width": 8}


@pytest.fixture(scope="module")
def given(home: Path) -> Path:
    """A teacher that was trained a little elsewhere: its weights as others write them."""
    recipe = a_recipe([a_student("one")])
    folder = Path(a_teacher(recipe, home / "ours", home / "cache"))
    module, rows = load_model(folder).train(), prepare(recipe.data, home / "cache").train
    inputs, labels = (torch.from_numpy(part.take(range(len(rows)), axis=0)) for part in (rows.inputs, rows.labels))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    state = {name.removeprefix("body."): tensor.detach() for name, tensor in module.state_dict().items()}
    save_file(state, home / "plain.safetensors")
    torch.save({"state_dict": {f"module.{name}": one for name, one in state.items()}}, home / "parallel.pth")
    head = [name for name, one in state.items() if one.shape[:1] == (10,)]
    torch.save(state | {name: state[name].roll(1, 0) for name in head}, home / "rolled.pt")
    return home


def of(path: Path | str, **changes: Any) -> Recipe:
    return a_recipe([a_student("one")], teacher={"model": CNN, "weights": str(path)}, **changes)


def cached(recipe: Recipe, home: Path, root: str | Path) -> tuple[list[CachedModel], str]:
    """The models with their sealed stores, by a plain loop, and what was told."""
    console = Console(record=True, width=400, file=io.StringIO())
    workspace = Workspace(str(root), str(home / "cache"), console=console)
    inputs = open_inputs(recipe, workspace, students=False, again=False)
    models = walk_chain(recipe, inputs.splits, inputs.models, workspace, run_in_process, compute_in_process)
    return models, console.export_text()


def test_one_teacher_one_store_however_it_comes(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,), said = cached(of(given / "parallel.pth"), given, tmp_path)
    assert f"{given}/parallel.pth: taken from `state_dict` in the file; `module.` was taken off" in said
    assert first.card is not None
    assert first.model_uri == f"{tmp_path}/teachers/{first.card.fingerprint[:32]}"
    assert first.check is not None
    assert first.check.accuracy is not None
    assert first.check.accuracy > 0.9
    before = store_bytes(tmp_path)
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: pytest.fail("the teacher was run again"))
    (again,), _ = cached(of(given / "plain.safetensors"), given, tmp_path)
    as_folder = a_recipe([a_student("one")], teacher={"weights": first.model_uri})
    (folder,), _ = cached(as_folder, given, tmp_path)
    assert again.stores == folder.stores == first.stores
    assert store_bytes(tmp_path) == before
    identities = [run_identity(one, prepare(one.data, given / "cache")) for one in (of("a"), of("b"))]
    assert identities[0] == identities[1]


def test_a_hit_loads_nothing_and_tells_the_accuracy_from_the_store(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of(given / "plain.safetensors")
    (first,), _ = cached(recipe, given, tmp_path)
    monkeypatch.setattr(imported, "read_parts", lambda files: pytest.fail("the file was loaded"))
    plan = akd_dist.cache_teacher(
        recipe, store_root=tmp_path, cache_root=given / "cache", dry_run=True, console=Console(quiet=True)
    )
    (check,) = plan["teacher_checks"]
    assert first.check is not None
    assert (check["rows"], check["warnings"]) == (180, [])
    assert check["accuracy"] == pytest.approx(first.check.accuracy, abs=1e-6)


def test_a_teacher_in_another_order_is_told_before_anything_is_stored(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(of(given / "rolled.pt").to_yaml())
    places = [f"--store-root={tmp_path / 'stores'}", f"--cache-root={given / 'cache'}"]
    with pytest.raises(SystemExit) as left:
        main(["cache-teacher", str(tmp_path / "recipe.yaml"), "--dry-run", *places])
    out, err = capsys.readouterr()
    assert left.value.code == 0
    assert "the teacher chooses the label of" in out
    assert err.count("is near chance") == 1
    assert "1 means 0" in err
    assert not (tmp_path / "stores").exists()


def test_every_teacher_that_no_recipe_trains_is_asked(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"weights": str(given / "ours")}  # of random weights
    recipe = a_recipe([a_student("one", objective=HARD)], teacher=teacher)
    places: dict[str, Any] = {"store_root": tmp_path, "cache_root": given / "cache", "dry_run": True}
    plan = akd_dist.train_students(recipe, run_root=tmp_path / "runs", **places)
    (check,) = plan["teacher_checks"]
    assert check["accuracy"] < 0.3
    (warning,) = check["warnings"]
    assert "data.normalize" in warning
    assert warning in capsys.readouterr().err.replace("\n", "")
    trained = akd_dist.cache_teacher(a_recipe([a_student("one")]), **places, console=Console(quiet=True))
    assert trained["teacher_checks"] == []


def test_a_store_of_an_imported_teacher_is_repaired(given: Path, tmp_path: Path) -> None:
    (model,), _ = cached(of(given / "parallel.pth"), given, tmp_path)
    for path in sorted(Path(model.model_uri).iterdir()):  # nobody needs it any more, and it comes again
        path.unlink()
    store = Path(model.opened["train"].uri)
    shard = store / "arrays.zarr" / "logits" / "c" / "0" / "1" / "0"
    sealed = shard.read_bytes()
    shard.unlink()
    teacher.forget()
    repair(str(tmp_path), store.name, None, str(given / "cache"), Console(quiet=True))
    assert shard.read_bytes() == sealed
    assert open_store(str(store)).verify() == []


def test_it_lies_where_every_node_finds_it(given: Path, bucket: str) -> None:
    """And the checkpoint itself in object storage, too."""
    root = open_root(f"{bucket}/given")
    root.put_new("weights/plain.safetensors", (given / "plain.safetensors").read_bytes())
    uri = f"{bucket}/given/weights/plain.safetensors"
    (model,), _ = cached(of(uri), given, f"{bucket}/stores")
    assert sorted(open_root(model.model_uri).list()) == ["model.json", "model.safetensors"]
    assert not list((given / "cache").glob("import-*")), "what was fetched is not kept"
    (again,), _ = cached(of(given / "parallel.pth"), given, f"{bucket}/stores")
    assert again.stores == model.stores
    with pytest.raises(RefusedError, match="there is no checkpoint") as refused:
        cached(of(f"{bucket}/given/weights"), given, f"{bucket}/stores")
    assert "name the file itself" in str(refused.value)


def test_nodes_need_not_see_the_checkpoint(given: Path, tmp_path: Path) -> None:
    recipe = of(given / "plain.safetensors", folder=str(tmp_path))
    assert str(given / "plain.safetensors") not in WorkingDir.of(recipe, []).needed
    folder = a_recipe([a_student("one")], teacher={"weights": str(given / "ours")}, folder=str(tmp_path))
    assert str(given / "ours") in WorkingDir.of(folder, []).needed


def test_a_regression_is_asked_by_its_values(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    pq.write_table(pa.table({"input": list(inputs), "label": inputs.sum(axis=1)}), tmp_path / "rows.parquet")
    layer = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(layer.weight)
    (tmp_path / "sums.py").write_text(
        "from torch import nn\ndef net(input_shape, classes): return nn.Sequential(nn.Linear(4, classes))\n"
    )
    save_file({f"0.{name}": one.detach() for name, one in layer.named_parameters()}, tmp_path / "a.safetensors")
    data = {"train": {"kind": "parquet", "path": str(tmp_path / "rows.parquet")}, "task": "regression"}
    recipe = a_recipe(
        [a_student("one")],
        data=data,
        teacher={"model": {"kind": "custom", "factory": "sums:net"}, "weights": str(tmp_path / "a.safetensors")},
        folder=str(tmp_path),
    )
    found = [cached(recipe, tmp_path, tmp_path / "stores")[0][0].check for _ in range(2)]
    assert all(one is not None and one.correlation == pytest.approx(1.0) for one in found)
    assert all(one is not None and not one.warnings for one in found)


def test_an_assistant_learns_from_it(given: Path, tmp_path: Path) -> None:
    assistant = {"model": {"kind": "mlp", "hidden": 8}, "objective": {"kind": "kd", "epochs": 1}}
    optimizer = {"kind": "sgd", "lr": 0.1}
    recipe = a_recipe(
        [a_student("one", objective={"kind": "takd", "epochs": 1})],
        teacher={
            "model": CNN,
            "weights": str(given / "plain.safetensors"),
            "assistant": assistant | {"optimizer": optimizer},
        },
    )
    models, _ = cached(recipe, given, tmp_path)
    assert [one.name for one in models] == ["the teacher", "the assistant mlp-8"]


# ---- as a folder


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0), *capsys.readouterr()


def test_models_import_makes_what_every_other_command_takes(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jsonschema

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(a_recipe([a_student("one")]).to_yaml())  # it trains a cnn of that width
    cache = f"--cache-root={given / 'cache'}"
    code, out, err = run(capsys, "models", "import", "recipe.yaml", str(given / "parallel.pth"), cache, "--json")
    assert code == 0, err
    document = json.loads(out)
    jsonschema.validate(document, schemas()["model-import"])
    assert document["out"] == str(tmp_path / "parallel")
    assert "`module.` was taken off" in err
    code, _, err = run(capsys, "models", "import", "recipe.yaml", str(given / "parallel.pth"), cache)
    assert (code, "is there already" in err, "--force" in err) == (2, True, True)
    code, out, _ = run(capsys, "models", "import", "recipe.yaml", str(given / "parallel.pth"), cache, "--force")
    assert (code, "the model chooses the label of" in out) == (0, True)
    code, out, _ = run(capsys, "evaluate", "parallel", "recipe.yaml", cache, "--json")
    assert (code, json.loads(out)["student"]["fingerprint"]) == (0, document["fingerprint"])
    code, _, _ = run(capsys, "predict", "parallel", "recipe.yaml", cache, "--out", "said.parquet")
    assert code == 0
    (model,), _ = cached(of(given / "plain.safetensors"), given, tmp_path / "stores")
    assert model.card is not None
    assert model.card.fingerprint == document["fingerprint"]
    same = akd_dist.import_model("recipe.yaml", given / "plain.safetensors", "again", cache_root=given / "cache")
    assert same["fingerprint"] == document["fingerprint"]


def test_what_cannot_be_imported_leaves_nothing(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(a_recipe([a_student("one")], teacher={"weights": str(given / "ours")}).to_yaml())
    cache = f"--cache-root={given / 'cache'}"
    code, _, err = run(capsys, "models", "import", "recipe.yaml", str(given / "plain.safetensors"), cache)
    assert (code, "no teacher.model" in err, "--set teacher=" in err) == (2, True, True)
    model = "teacher={model: {kind: cnn, width: 8}, train: {epochs: 1, optimizer: {kind: sgd, lr: 0.1}}}"
    code, _, err = run(capsys, "models", "import", "recipe.yaml", cache, "--set", model)
    assert (code, "no checkpoint" in err) == (2, True)
    wrong = model.replace("width: 8", "width: 9")
    code, _, err = run(
        capsys, "models", "import", "recipe.yaml", str(given / "plain.safetensors"), cache, "--set", wrong
    )
    assert (code, "do not fit the model cnn-9" in err) == (4, True)
    code, _, err = run(capsys, "models", "import", "recipe.yaml", "gone.pth", cache, "--set", model)
    assert (code, "there is no checkpoint" in err) == (4, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_file_without_an_architecture_is_refused_with_the_way(given: Path, tmp_path: Path) -> None:
    for name in ("plain.safetensors", "parallel.pth"):
        recipe = a_recipe([a_student("one")], teacher={"weights": str(given / name)})
        with pytest.raises(RefusedError) as refused:
            cached(recipe, given, tmp_path)
        assert "teacher: {model: {kind: ...}, weights: " in str(refused.value)
        assert "akd-dist models import" in str(refused.value)


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({"model": CNN}, "give either weights"),
        (
            {"model": CNN, "weights": "a", "train": {"epochs": 1, "optimizer": {"kind": "sgd", "lr": 0.1}}},
            "got weights",
        ),
        ({"model": {"kind": "huggingface", "name": "roberta-base"}}, "give either weights"),
        ({"model": {"kind": "huggingface", "path": "a", "pretrained": False}}, "give either weights"),
    ],
)
def test_a_recipe_says_one_way(teacher: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        recipes.TeacherSpec.model_validate(teacher)


def test_a_dry_run_and_the_command_refuse_alike(given: Path, tmp_path: Path) -> None:
    wrong = {"model": CNN | {"width": 9}, "weights": str(given / "plain.safetensors")}
    recipe = a_recipe([a_student("one")], teacher=wrong)
    told = []
    for dry_run in (True, False):
        with pytest.raises(AkdError) as refused:
            akd_dist.cache_teacher(
                recipe, store_root=tmp_path, cache_root=given / "cache", dry_run=dry_run, console=Console(quiet=True)
            )
        told.append(str(refused.value))
    assert told[0] == told[1]
    assert list(tmp_path.iterdir()) == []
