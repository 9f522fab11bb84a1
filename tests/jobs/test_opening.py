"""The rows and stores of a recipe or a run, opened for trainers of others, and the examples that train with them."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

import akd_dist
from akd_dist.base.errors import MachineError, RecipeError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.cache_teacher import compute_in_process, walk_chain
from akd_dist.jobs.prepare_rows import rows_of_recipe
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.jobs.train_teacher import Workspace, run_in_process
from akd_dist.recipe import Recipe, load_recipe
from akd_dist.storage.catalog import list_stores
from tests import sources
from tests.fleets import a_recipe, a_student, a_teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The quickstart's, with a smaller teacher."""
    small = ["teacher.model.width=8", "teacher.model.depth=2", "teacher.train.epochs=12", "data.views=2"]
    return load_recipe(ROOT / "jobs" / "digits.yaml", small).own()


@pytest.fixture(scope="module")
def file(recipe: Recipe, home: Path) -> Path:
    """Its file, beside the stores of its teacher."""
    workspace = Workspace(str(home / "stores"), str(home / "cache"), console=Console(quiet=True))
    splits = prepare(recipe.data, home / "cache")
    walk_chain(recipe, splits, [], workspace, run_in_process, compute_in_process)
    path = home / "digits.yaml"
    path.write_text(recipe.to_yaml())
    return path


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    monkeypatch.chdir(home)
    monkeypatch.setenv("AKD_DIST_CACHE", str(home / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_distils(file: Path) -> None:
    assert example("plain_pytorch").main(str(file), epochs=12) > 0.75


@pytest.mark.filterwarnings("ignore")  # of libraries of others
def test_the_trainer_of_hugging_face_distils(file: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module = example("hugging_face_trainer")
    seen = []
    keep = akd_dist.distillation_dataset(str(file))
    told = type(keep).set_epoch

    class Watched(type(keep)):  # type: ignore[misc]
        def set_epoch(self, epoch: int) -> None:
            seen.append(epoch)
            told(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("akd_dist.jobs.opening.DistillationDataset", Watched)
        assert module.main(str(file), epochs=12) > 0.75
    assert sorted(set(seen)) == list(range(12)), "the Trainer tells of each epoch, which shows its view"


@pytest.mark.filterwarnings("ignore")  # of libraries of others
def test_lightning_distils(file: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    assert example("lightning_module").main(str(file), epochs=12) > 0.75


def test_no_ray_is_needed(file: Path) -> None:
    code = (
        "import sys, akd_dist\n"
        f"assert len(akd_dist.distillation_dataset({str(file)!r})) == 1168\n"
        "assert 'ray' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)


def test_all_splits_are_there_and_a_use_is_noted(file: Path, home: Path) -> None:
    test = akd_dist.distillation_dataset(file, split="test")
    assert set(test[0]) == {"inputs", "labels", "teacher_logits", "row"}
    batches = akd_dist.distillation_batches(file, 64, split="validation", rank=1, world=2)
    assert sum(len(batch["row"]) for batch in batches) == len(batches.rows) // 2
    used = [store for store in list_stores(str(home / "stores")) if any(use.run == str(home) for use in store.uses)]
    assert {store.rows for store in used} >= {len(test), len(batches.rows)}


def test_a_recipe_object_is_one_too(recipe: Recipe, file: Path, home: Path) -> None:
    ours, theirs = akd_dist.distillation_dataset(recipe), akd_dist.distillation_dataset(file)
    assert torch.equal(ours[[3, 5]]["teacher_logits"], theirs[[3, 5]]["teacher_logits"])


def a_run(recipe: Recipe, run: Path, cache_root: Path) -> None:
    run.mkdir(parents=True)
    begin_run(run, recipe, run_identity(recipe, prepare(recipe.data, cache_root)))


def test_a_run_gives_what_its_recipe_does(recipe: Recipe, file: Path, home: Path) -> None:
    a_run(recipe, home / "runs" / "digits", home / "cache")
    ours, theirs = akd_dist.distillation_dataset(home / "runs" / "digits"), akd_dist.distillation_dataset(file)
    assert torch.equal(ours[[3, 5]]["teacher_logits"], theirs[[3, 5]]["teacher_logits"])


def test_a_run_whose_data_have_changed_is_refused(recipe: Recipe, file: Path, home: Path) -> None:
    run = home / "runs" / "changed"
    a_run(recipe, run, home / "cache")
    identity = json.loads((run / "identity.json").read_text())
    identity["rows"]["train"]["blocks"][0] = identity["rows"]["train"]["fingerprint"] = "0" * 64
    (run / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(RefusedError, match="the dataset is not the one the store was made from"):
        akd_dist.distillation_dataset(run)


def test_a_run_runs_no_code_that_nobody_trusts(tmp_path: Path, home: Path) -> None:
    source = sources.dataset(tmp_path, torch.zeros(30, 4), [0, 1] * 15)
    recipe = a_recipe([a_student("pupil")], data={"train": source.model_dump(mode="json"), "views": 1})
    recipe = recipe.model_copy(update={"folder": str(tmp_path)}).own()
    a_run(recipe, tmp_path / "run", home / "cache")
    with pytest.raises(RefusedError, match=r"is not run: the recipe .*recipe\.yaml names it"):
        akd_dist.distillation_dataset(tmp_path / "run")


def test_what_is_not_sealed_is_refused_with_the_command_that_seals_it(file: Path, tmp_path: Path, home: Path) -> None:
    with pytest.raises(RefusedError, match="the train rows are not there") as refused:
        akd_dist.distillation_dataset(file, store_root=tmp_path / "none")
    assert refused.value.got == f"no teacher under {tmp_path / 'none'}"
    assert refused.value.next == f"akd-dist cache-teacher {file} --store-root {tmp_path / 'none'}"
    recipe = a_recipe([a_student("pupil")])
    other = recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"model": None, "train": None})}
    ).model_dump(mode="json")
    other["teacher"]["weights"] = a_teacher(recipe, tmp_path / "teacher", home / "cache")
    with pytest.raises(RefusedError, match="the train rows are not there") as refused:
        akd_dist.distillation_dataset(Recipe.model_validate(other), store_root=tmp_path)
    assert refused.value.got is not None
    assert refused.value.got.startswith("no store ")
    assert set(akd_dist.distillation_dataset(file, split="test", store_root=tmp_path)[0]) == {"inputs", "labels", "row"}


def test_arguments_are_checked(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the argument split"):
        akd_dist.distillation_dataset(file, split="all")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="the argument batch"):
        akd_dist.distillation_batches(file, 0)
    with pytest.raises(RecipeError, match="there is no recipe"):
        akd_dist.distillation_dataset(tmp_path / "nothing.yaml")


def in_order(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return [row for batch in batches for row in batch["row"].tolist()]


def test_a_window_of_the_recipe_decides_the_order(recipe: Recipe, file: Path, home: Path) -> None:
    (teacher,) = (home / "stores" / "teachers").glob("*/")
    given = recipe.model_dump(mode="json")
    given["teacher"] = {"weights": str(teacher)}  # one that is trained here would be another with this window
    given["data"]["window"] = 128
    windowed = in_order(akd_dist.distillation_batches(Recipe.model_validate(given), 64))
    whole = in_order(akd_dist.distillation_batches(file, 64))
    assert windowed != whole
    assert sorted(windowed) == sorted(whole)


def test_a_cache_without_room_is_refused_as_training_refuses_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "170000")
    with pytest.raises(MachineError, match="no room for what students read at a time"):
        akd_dist.distillation_batches(file, 64, cache_root=tmp_path)
    # Any row, in any order, takes all rows of the split and a whole view.
    assert len(akd_dist.distillation_dataset(file, cache_root=tmp_path)) == 1168
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "100000")
    with pytest.raises(MachineError, match="no room"):
        akd_dist.distillation_dataset(file, cache_root=tmp_path)


def test_a_teacher_that_learned_from_more_rows_is_found(tmp_path: Path, home: Path) -> None:
    small = ["teacher.model={kind: mlp, hidden: 8}", "teacher.train.epochs=1"]
    recipe = load_recipe(ROOT / "jobs" / "digits_unlabelled.yaml", small).own()
    (tmp_path / "few.yaml").write_text(recipe.to_yaml())
    workspace = Workspace(str(tmp_path / "stores"), str(home / "cache"), console=Console(quiet=True))
    splits = rows_of_recipe(recipe, workspace)
    walk_chain(recipe, splits, [], workspace, run_in_process, compute_in_process)
    dataset = akd_dist.distillation_dataset(tmp_path / "few.yaml", store_root=tmp_path / "stores")
    assert len(dataset) == len(splits.train)
    assert int(dataset[len(dataset) - 1]["labels"]) == -1
