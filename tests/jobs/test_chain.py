"""Chains of assistants: every hop a store, found again by content; the same bytes with and without Ray, and kills."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.factories import read_beside
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.distill.student import Student
from akd_dist.documents.cache import CacheDocument, PlanDocument
from akd_dist.documents.fleet import FleetDocument
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.caching import models_there
from akd_dist.jobs.repair import repair
from akd_dist.jobs.run_folder import run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace, teacher_of
from akd_dist.models.folder import load_model
from akd_dist.recipe import CustomAugmentation, Recipe
from akd_dist.reporting.results import read_fleet
from akd_dist.storage.catalog import list_stores
from akd_dist.storage.claim import claim_store
from akd_dist.storage.reader import open_store
from tests import sources
from tests.fleets import ADAMW, ANNEALING, HARD, a_recipe, a_student, a_teacher, chain_of, store_bytes, weights
from tests.survivors import FORKS, forked_cohorts

KD = {"kind": "kd", "epochs": 2}
TAKD = {"kind": "takd", "epochs": 2}
STUDENTS = [
    a_student("annealing"),
    a_student("hard", objective=HARD),
    a_student("takd", objective=TAKD),
    a_student("takd-1", objective=TAKD, seed=1),
]


def an_assistant(hidden: int, objective: dict[str, Any] = KD, **changes: Any) -> dict[str, Any]:
    return {"model": {"kind": "mlp", "hidden": hidden}, "objective": objective, "optimizer": ADAMW} | changes


DATA = {"train": {"kind": "digits"}, "views": 2, "augmentation": {"kind": "shift", "pixels": 1}}
CHAIN = an_assistant(32, assistant=an_assistant(16, ANNEALING, seed=5))


class Home:
    """One folder with a teacher, and what the plain loop makes of a chain below it."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache_root = root, str(root / "cache")
        self.teacher = a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache")
        self.recipe = self.recipe_for()
        self.splits: Splits = prepare(self.recipe.data, root / "cache")
        self.cached = self.cache(root / "plain")
        self.chain = chain_of(self.cached)
        self.results = train_in_process(
            self.recipe, self.chain[0], run=root / "plain-run", cache_root=self.cache_root, assistant=self.chain[-1]
        )

    def recipe_for(self, chain: dict[str, Any] = CHAIN, **changes: Any) -> Recipe:
        document = {"students": STUDENTS, "teacher": {"weights": self.teacher, "assistant": chain}} | changes
        return a_recipe(document.pop("students"), **document)

    def cache(self, stores: Path, recipe: Recipe | None = None) -> dict[str, Any]:
        return cache_in_process(recipe or self.recipe, self.teacher, store_root=str(stores), cache_root=self.cache_root)

    def options(self, root: Path) -> dict[str, Any]:
        return {"store_root": str(root / "stores"), "cache_root": self.cache_root, "console": Console(quiet=True)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("chain"))


def assistants(stores: Path) -> dict[str, bytes]:
    """The weights of every model that was trained for a store root."""
    return {path.parent.name: path.read_bytes() for path in stores.glob("teachers/*/model.safetensors")}


# ---- what a chain leaves


def test_each_hop_is_a_store_of_its_own_model(home: Home) -> None:
    CacheDocument.model_validate(home.cached)
    assert [one["model"] for one in home.cached["assistants"]] == ["mlp-32", "mlp-16"]
    for one, stores in zip(home.cached["assistants"], home.chain[1:], strict=True):
        assert open_store(stores["train"]).manifest.identity.teacher == one["fingerprint"]
        for split in ("validation", "test"):
            rows = getattr(home.splits, split)
            store = open_store(stores[split])
            inputs, _ = rows.read(0, len(rows))
            logits = load_model(one["path"])(torch.from_numpy(inputs.copy())).detach().numpy()
            np.testing.assert_allclose(store.rows(0, 0, len(rows)), logits, atol=1e-5)


def test_an_assistant_learns_from_the_one_above_it(home: Home) -> None:
    """The second, trained from the store of the first as a student is, has the very weights."""
    (last,) = [one for one in home.cached["assistants"] if one["model"] == "mlp-16"]
    same = a_recipe([a_student("same", **an_assistant(16, ANNEALING, seed=5))], stacked="never")  # as assistants are
    train_in_process(same, home.chain[1], run=home.root / "as-student", cache_root=home.cache_root)
    trained = home.root / "as-student" / "students" / "same" / "model.safetensors"
    assert trained.read_bytes() == (Path(last["path"]) / "model.safetensors").read_bytes()


def test_takd_learns_from_the_last_assistant(home: Home) -> None:
    """What a takd student is, told without takd: a kd student in a recipe whose teacher is the assistant."""
    last = home.cached["assistants"][-1]
    below = a_recipe([a_student("takd", objective=KD)], teacher={"weights": last["path"]})
    train_in_process(below, home.chain[-1], run=home.root / "as-kd", cache_root=home.cache_root)
    plain = weights(home.root / "plain-run")
    assert weights(home.root / "as-kd")["takd"] == plain["takd"]
    assert len(set(plain.values())) == len(plain) == 4
    test = open_store(home.chain[0]["test"])
    inputs, _ = home.splits.test.read(0, test.num_rows)
    student = load_model(home.root / "plain-run" / "students" / "takd")
    chosen = student(torch.from_numpy(inputs.copy())).argmax(dim=1).numpy()
    teacher = test.rows(0, 0, test.num_rows).argmax(axis=1)
    assert home.results["takd"]["agreement"] == pytest.approx(float(np.mean(chosen == teacher)))


def test_an_assistants_training_is_recorded_with_its_stores(home: Home) -> None:
    stores = {store.id: store for store in list_stores(str(home.root / "plain"))}
    above = [home.cached, *home.cached["assistants"]]
    for taught, assistant in zip(above, home.cached["assistants"], strict=False):
        for part in (taught, *taught["splits"].values()):
            assert stores[part["id"]].runs == [assistant["path"]]
    assert stores[above[-1]["id"]].runs == []


def test_nothing_is_done_twice(home: Home) -> None:
    root = home.root / "plain"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    again = home.cache(root)
    assert again["hit"]
    assert [one["path"] for one in again["assistants"]] == [one["path"] for one in home.cached["assistants"]]
    assert all(one["hit"] and not one["shards_computed"] for one in again["assistants"])
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


# ---- found by content


@pytest.mark.parametrize(
    ("changed", "same_first", "same_second"),
    [
        ({"name": "another", "checkpoint_seconds": 5.0, "cohorts": 4}, True, True),
        ({"students": [a_student("other", objective=TAKD, batch=32)]}, True, True),
        ({"chain": CHAIN | {"seed": 1}}, False, False),
        ({"chain": CHAIN | {"batch": 32}}, False, False),
        ({"chain": CHAIN | {"objective": KD | {"alpha": 0.4}}}, False, False),
        ({"chain": CHAIN | {"assistant": an_assistant(16, ANNEALING, seed=6)}}, True, False),
        ({"cache": {"encoding": "float16"}}, False, False),
        ({"data": DATA | {"window": 64}}, False, False),
        ({"data": DATA | {"views": 1}}, False, False),
    ],
    ids=str,
)
def test_an_assistant_is_found_by_all_that_its_weights_depend_on(
    home: Home, changed: dict[str, Any], same_first: bool, same_second: bool
) -> None:
    recipe = home.recipe_for(**changed)
    splits = prepare(recipe.data, Path(home.cache_root))
    known = [one["path"] for one in home.cached["assistants"]]
    _, *found = [
        model.model_uri for model in models_there(recipe, splits, Workspace(str(home.root / "plain"), home.cache_root))
    ]
    assert found == known[: same_first + same_second], "what lies below a model that is not there cannot be known"


def test_a_teacher_trained_on_views_of_other_code_is_another_one(home: Home, tmp_path: Path) -> None:
    name = sources.module(tmp_path, "def make(): ...\n")
    own = {"kind": "custom", "factory": f"{name}:make"}
    recipe = a_recipe(STUDENTS[:1], data=DATA | {"augmentation": own}, folder=str(tmp_path))
    assert recipe.teacher.train is not None
    before = teacher_of(recipe, home.splits)
    (tmp_path / f"{name}.py").write_text("def make(): return 1\n")
    after = teacher_of(recipe, home.splits)
    assert before is not None
    assert after is not None
    assert before.spec.name != after.spec.name


def test_a_teacher_is_known_by_what_its_code_reads_too(tmp_path: Path) -> None:
    """Files that arguments name, and modules beside the recipe, count by content, wherever the folder lies."""
    name = sources.module(tmp_path / "one", "import own_blocks, torch\ndef make(input_shape, classes, **given): ...\n")
    one, splits = tmp_path / "one", prepare(a_recipe(STUDENTS[:1]).data, tmp_path / "cache")
    (one / "own_blocks.py").write_text("width = 8\n")
    (one / "weights").mkdir()
    for file in ("w.npz", "weights/a", "other"):
        (one / file).write_text(file)

    def found(place: Path = one, /, **arguments: Any) -> str:
        model = {"kind": "custom", "factory": f"{name}:make", "arguments": arguments}
        teacher = {"model": model, "train": {"epochs": 1, "optimizer": ADAMW}}
        trained = teacher_of(a_recipe(STUDENTS[:1], teacher=teacher, code=[name], folder=str(place)), splits)
        assert trained is not None
        return trained.spec.name

    given: list[dict[str, Any]] = [{}, {"file": "w.npz"}, {"folder": ["./weights"]}, {"depth": 3, "act": "relu"}]
    before = [found(**arguments) for arguments in given]
    two = shutil.copytree(one, tmp_path / "two")
    assert [found(two, **arguments) for arguments in given] == before, "the same content elsewhere"
    (two / "other").write_text("nobody names it")
    assert [found(two, **arguments) for arguments in given] == before
    (two / "w.npz").write_text("other weights")
    (two / "weights" / "b").write_text("one more")
    assert [found(two, **arguments) != key for arguments, key in zip(given, before, strict=True)] == [0, 1, 1, 0]
    assert found(one, folder=".") == found(one, folder=".")
    assert found(one, folder=".") != found(two, folder="."), "where commands write as well, the place counts"
    (one / "own_blocks.py").write_text("width = 16\n")
    assert all(found(**arguments) != key for arguments, key in zip(given, before, strict=True))


def test_a_function_that_reads_nothing_beside_its_file_is_known_as_ever(tmp_path: Path) -> None:
    name = sources.module(tmp_path, "import torch, json\ndef make(): ...\n")
    spec = a_recipe(
        STUDENTS[:1],
        data=DATA | {"augmentation": {"kind": "custom", "factory": f"{name}:make", "arguments": {"by": "nothing"}}},
        folder=str(tmp_path),
    ).data.augmentation
    assert isinstance(spec, CustomAugmentation)
    assert read_beside(spec) == {}


def test_another_assistant_is_another_run(home: Home) -> None:
    fingerprints = [open_store(stores["train"]).manifest.identity.teacher for stores in home.chain]
    known = run_identity(home.recipe, home.splits, fingerprints)
    assert known["teacher"]["assistant_fingerprints"] == [one["fingerprint"] for one in home.cached["assistants"]]
    assert run_identity(home.recipe, home.splits, [*fingerprints[:2], "0" * 64]) != known


# ---- before anything runs


def test_a_plan_knows_what_is_there(home: Home) -> None:
    changed = home.recipe_for(CHAIN | {"assistant": an_assistant(8)})
    options = home.options(home.root) | {"store_root": str(home.root / "plain"), "dry_run": True}
    for recipe, hits in ((home.recipe, [True, True]), (changed, [True, False])):
        plan = akd_dist.cache_teacher(recipe, **options)
        PlanDocument.model_validate(plan)
        assert [one["trained"] for one in plan["assistants"]] == hits
        assert [one["splits"]["train"]["hit"] for one in plan["assistants"]] == hits
        assert plan["splits"]["train"]["hit"]
        assert (plan["bytes"] == 0) is all(hits)
    nothing = akd_dist.cache_teacher(home.recipe, **home.options(home.root / "nowhere"), dry_run=True)
    assert [one["trained"] for one in nothing["assistants"]] == [False, False]
    assert not (home.root / "nowhere").exists()


def test_an_assistant_that_does_not_fit_is_refused_first(home: Home, tmp_path: Path) -> None:
    nobody = {"kind": "custom", "factory": "nowhere_at_all:model"}
    too_large = {"kind": "mlp", "hidden": 100_000_000_000}
    for model, told in ((nobody, "nowhere_at_all"), (too_large, "does not fit the memory of this machine")):
        misfit = an_assistant(8, assistant=an_assistant(4) | {"model": model})
        with pytest.raises(RefusedError, match=told):
            akd_dist.cache_teacher(home.recipe_for(misfit), **home.options(tmp_path))
    assert not (tmp_path / "stores").exists()


def test_a_dead_drivers_claim_is_swept_a_living_ones_kept(home: Home, tmp_path: Path) -> None:
    cached = home.cache(tmp_path / "stores")
    model = Path(cached["assistants"][0]["path"])
    root, names = str(tmp_path / "stores"), [f"teachers/{model.name}", cached["assistants"][1]["id"]]
    code = (
        "import os, sys; from akd_dist.storage.claim import claim_store\nwith claim_store(*sys.argv[1:]): os._exit(0)"
    )
    for name in names:
        subprocess.run([sys.executable, "-c", code, root, name], check=True)
    assert len(list((tmp_path / "stores").rglob("*.claim"))) == 2
    with claim_store(str(tmp_path / "stores"), cached["id"]):
        assert home.cache(tmp_path / "stores")["hit"]
        assert [path.stem for path in (tmp_path / "stores").rglob("*.claim")] == [cached["id"]]


def test_an_assistant_that_diverges_ends_the_chain_with_its_log(home: Home, tmp_path: Path) -> None:
    wild = an_assistant(8, optimizer={"kind": "sgd", "lr": 1e30})
    with pytest.raises(RefusedError) as refused:
        home.cache(tmp_path / "stores", home.recipe_for(wild))
    assert "the assistant mlp-8 ended as diverged" in refused.value.what
    assert "teacher.assistant" in str(refused.value.next)
    assert Path(str(refused.value.next).split(";")[0].removeprefix("see ")).exists()
    assert not list((tmp_path / "stores").rglob("*.claim"))


def test_a_failed_assistant_is_tried_again(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = home.recipe_for(an_assistant(9))
    with monkeypatch.context() as today:
        today.setattr(Student, "take_step", lambda *_: (_ for _ in ()).throw(MemoryError("not today")))
        with pytest.raises(RefusedError, match=r"(?s)the assistant mlp-9 ended as failed.*not today"):
            home.cache(tmp_path / "stores", recipe)
    assert home.cache(tmp_path / "stores", recipe)["assistants"]


def test_an_assistants_store_is_repaired_to_the_same_bytes(home: Home, tmp_path: Path) -> None:
    cached = home.cache(tmp_path / "stores")
    for one in cached["assistants"]:
        shard = next(path for path in Path(one["store"]).glob("arrays.zarr/logits/c/1/*/0"))
        sealed = shard.read_bytes()
        shard.unlink()
        mended = repair(str(tmp_path / "stores"), one["id"], None, home.cache_root, Console(quiet=True))
        assert len(mended["repaired"]) == 1
        assert shard.read_bytes() == sealed


# ---- on Ray


@pytest.fixture(scope="module")
def trained(home: Home, ray_cluster: None) -> tuple[Path, dict[str, Any]]:
    """The chain trained and cached on the session's cluster, and its students from that; with nothing killed.

    Students know of no chain, but of the stores that their cohort is given: test_fleet_on_ray.py has cohorts on Ray.
    """
    root = home.root / "on-ray"
    with forked_cohorts():
        return root, akd_dist.train_students(home.recipe, run_root=str(root / "runs"), **home.options(root))


@pytest.mark.ray
def test_a_chain_on_ray_has_the_bytes_of_the_plain_loop(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, _ = trained
    assert assistants(root / "stores") == assistants(home.root / "plain")
    assert store_bytes(root / "stores") == store_bytes(home.root / "plain")
    assert weights(root / "runs" / "fleet") == weights(home.root / "plain-run")
    assert not [path for path in root.rglob("*") if path.suffix in (".claim", ".partial")]


@pytest.mark.ray
def test_the_fleet_names_every_hop(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, fleet = trained
    FleetDocument.model_validate(fleet)
    assert [one["model"] for one in fleet["assistants"]] == ["mlp-32", "mlp-16"]
    for one, cached, stores in zip(fleet["assistants"], home.cached["assistants"], home.chain[1:], strict=True):
        assert one["fingerprint"] == cached["fingerprint"]
        assert Path(one["store"]).name == cached["id"]
        test = open_store(stores["test"])
        chosen = test.rows(0, 0, test.num_rows).argmax(axis=1)
        labels = home.splits.test.labels
        assert one["test"]["accuracy"] == pytest.approx(float(np.mean(chosen == labels)))
    learned = {one["name"]: (one["store"], one["teacher"]) for one in fleet["students"]}
    teacher = (fleet["store"], fleet["teacher"]["fingerprint"])
    last = (fleet["assistants"][-1]["store"], fleet["assistants"][-1]["fingerprint"])
    assert learned == {"annealing": teacher, "hard": teacher, "takd": last, "takd-1": last}
    assert fleet["cohorts"] == 2, "students of two stores cannot share a stream"
    assert read_fleet(root / "runs" / "fleet").plain() == fleet


@pytest.mark.ray
def test_after_caching_nothing_is_left_to_run_but_students(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (root / "stores").rglob("*") if path.is_file()}
    document = akd_dist.cache_teacher(home.recipe, **home.options(root))
    assert document["hit"]
    assert {path: path.stat().st_mtime_ns for path in (root / "stores").rglob("*") if path.is_file()} == before


@pytest.mark.ray
def test_another_chain_under_the_same_name_is_refused(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, _ = trained
    other = home.recipe_for(CHAIN | {"seed": 3})
    with pytest.raises(RecipeError, match=r"teacher\.assistant\.seed: 0 -> 3"):
        akd_dist.train_students(other, run_root=str(root / "runs"), **home.options(root))


# ---- killed


def cache_and_die(recipe: Recipe, teacher: str, stores: str, cache_root: str, failpoint: str) -> None:
    os.environ["AKD_FAILPOINT"] = failpoint
    cache_in_process(recipe, teacher, store_root=stores, cache_root=cache_root)


# In the second epoch of the first assistant and of the second; between the hops, as the sixth of nine stores is sealed.
@pytest.mark.parametrize("failpoint", ["cohort.after_batch:25", "seal.before_manifest:6", "cohort.after_batch:70"])
def test_killed_in_the_chain_it_goes_on_to_the_same_bytes(home: Home, tmp_path: Path, failpoint: str) -> None:
    stores = tmp_path / "stores"
    arguments = (home.recipe, home.teacher, str(stores), home.cache_root, failpoint)
    driver = FORKS.Process(target=cache_and_die, args=arguments)
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    home.cache(stores)
    assert assistants(stores) == assistants(home.root / "plain")
    assert store_bytes(stores) == store_bytes(home.root / "plain")
    assert not [path for path in stores.rglob("*") if path.suffix in (".claim", ".partial")]
