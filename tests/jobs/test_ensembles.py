"""Several teachers, each with a store of its own, read as one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.cohort import open_stream
from akd_dist.distill.job import CohortJob
from akd_dist.jobs.cache_teacher import compute_in_process, document_of, walk_chain
from akd_dist.jobs.planning.caching import Inputs, foresee_caching, open_inputs
from akd_dist.jobs.planning.models import fingerprints, levels_of
from akd_dist.jobs.planning.plan import fleet_job, plan_run
from akd_dist.jobs.run_folder import run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace, run_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Cnn, Recipe
from akd_dist.storage.catalog import list_stores
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.manifest import Creation
from akd_dist.storage.mean import AnyStore, MeanStore, mean_logits, open_logits, uris_of
from akd_dist.storage.reader import open_store
from akd_dist.storage.writer import create_store, seal_store, write_shard
from tests.fleets import ADAMW, ANNEALING, a_recipe, a_student, store_bytes
from tests.survivors import FORKS

pytestmark = pytest.mark.usefixtures("own_process_state")

KD = {"kind": "kd", "epochs": 2}


class Home:
    """Teachers with random weights, and what caching makes of ensembles of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = prepare(a_recipe([a_student("any")]).data, root / "cache").train
        card = ModelCard.of(Cnn(kind="cnn", width=4), rows, None)
        for seed, name in enumerate(("a", "b", "c")):
            save_model(root / name, build(card, seed=seed), card)
        self.workspace = Workspace(str(root / "stores"), str(root / "cache"), console=Console(quiet=True))

    def member(self, name: str, **more: Any) -> dict[str, Any]:
        return {"weights": str(self.root / name)} | more

    def recipe(self, teacher: Any, objective: dict[str, Any] = KD, **changes: Any) -> Recipe:
        return a_recipe([a_student("one", objective=objective)], teacher=teacher, **changes)

    def open(self, recipe: Recipe) -> Inputs:
        return open_inputs(recipe, self.workspace, students=True, again=False)

    def cache(self, recipe: Recipe) -> Inputs:
        """By a plain loop, and opened again."""
        inputs = self.open(recipe)
        walk_chain(recipe, inputs.splits, inputs.models, self.workspace, run_in_process, compute_in_process)
        return self.open(recipe)

    def job(self, recipe: Recipe, inputs: Inputs) -> CohortJob:
        return fleet_job(recipe, inputs.splits, inputs.levels[0].stores, self.root / "run", str(self.root / "cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("ensembles"))


def test_the_mean_of_logits_is_theirs_in_float64(home: Home) -> None:
    recipe = home.recipe([home.member("a"), home.member("b", share=3.0)])
    inputs = home.cache(recipe)
    parts = [open_store(uri) for uri in uris_of({"train": inputs.levels[0].stores["train"]})]
    a, b = (part.rows(1, 0, 50).astype(np.float64) for part in parts)
    mean = open_logits(inputs.levels[0].stores["train"])
    assert np.array_equal(mean.rows(1, 0, 50), (0.25 * a + 0.75 * b).astype(np.float32))
    stream, said = open_stream(home.job(recipe, inputs), inputs.splits)
    assert isinstance(stream.logits, StoredLogits)
    (batch, *_) = stream.batches(1)
    whole = mean.rows(1, 0, len(inputs.splits.train))
    assert batch.logits is not None
    assert np.array_equal(batch.logits.numpy(), whole[batch.rows])
    test = open_logits(inputs.levels[0].stores["test"]).rows(0, 0, len(inputs.splits.test))
    assert np.array_equal(np.asarray(said), test.argmax(1))
    stream.logits.close()


def cache_and_die(recipe: Recipe, root: str, cache_root: str, failpoint: str | None = None) -> None:
    """What a forked process runs; without a failpoint it does not die."""
    workspace = Workspace(root, cache_root, console=Console(quiet=True))
    if failpoint is not None:
        os.environ["AKD_FAILPOINT"] = failpoint
    inputs = open_inputs(recipe, workspace, students=True, again=False)
    walk_chain(recipe, inputs.splits, inputs.models, workspace, run_in_process, compute_in_process)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["shard.before_publish", "shard.before_receipt"])
def test_killed_in_the_second_member_it_goes_on_to_the_same_bytes(home: Home, tmp_path: Path, site: str) -> None:
    recipe = home.recipe([home.member("a"), home.member("b")])
    killed, clean, cache = (str(tmp_path / "killed"), str(tmp_path / "clean"), str(home.root / "cache"))
    cache_and_die(recipe, clean, cache)
    shards = len(list((tmp_path / "clean").rglob("c/*/*/*"))) // 2
    driver = FORKS.Process(target=cache_and_die, args=(recipe, killed, cache, f"{site}:{shards + 3}"))
    driver.start()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("c/*/*/*")}
    assert len(done) == shards + 2 + (site == "shard.before_receipt")
    cache_and_die(recipe, killed, cache)
    assert store_bytes(tmp_path / "killed") == store_bytes(tmp_path / "clean")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.suffix in (".claim", ".partial")]


def test_the_mean_of_probabilities_is_given_as_its_logarithm() -> None:
    generator = np.random.default_rng(0)
    z = [generator.normal(size=(20, 5)).astype(np.float32) * 30 for _ in range(3)]
    shares = (0.2, 0.3, 0.5)
    found = mean_logits(z, shares, "probabilities")
    soft = [torch.softmax(torch.from_numpy(one).double(), 1).numpy() for one in z]
    expected = np.log(sum(share * one for share, one in zip(shares, soft, strict=True)))
    assert np.allclose(found, expected, atol=1e-5)
    shifted = [one + np.float32(7) for one in z]  # a softmax sees no constant
    assert np.allclose(mean_logits(shifted, shares, "probabilities"), found, atol=1e-4)


def test_one_more_member_computes_one_store(home: Home) -> None:
    home.cache(home.recipe([home.member("a"), home.member("b")]))
    before = {one.id for one in list_stores(home.workspace.store_root)}
    larger = home.recipe([home.member("a"), home.member("b"), home.member("c")])
    inputs = home.open(larger)
    plan = foresee_caching(inputs, home.workspace)
    assert [member["train"].hit for member in plan.members] == [True, True, False]
    assert plan.splits["train"].shards == plan.members[2]["train"].shards > 0
    models = walk_chain(larger, inputs.splits, inputs.models, home.workspace, run_in_process, compute_in_process)
    document = document_of(larger, models, 1.0)
    assert [member.hit for member in document.members] == [True, True, False]
    assert not document.hit
    assert len({one.id for one in list_stores(home.workspace.store_root)} - before) == 3  # of its three splits


def test_order_shares_and_average_belong_to_the_run(home: Home) -> None:
    def identity(teacher: Any) -> str:
        recipe = home.recipe(teacher)
        inputs = home.cache(recipe)
        return fingerprints(levels_of(recipe, inputs.models))[0]

    a, b = home.member("a"), home.member("b")
    found = [
        identity(given)
        for given in ([a, b], [b, a], [a, b | {"share": 2.0}], {"members": [a, b], "average": "probabilities"}, a)
    ]
    assert len(set(found)) == len(found)
    assert identity([a | {"share": 2.0}, b | {"share": 2.0}]) == found[0]
    recipe = home.recipe([a, b])
    document = run_identity(recipe, home.open(recipe).splits, [found[0]])
    assert str(home.root) not in str(document["teacher"])
    assert document["teacher"]["fingerprint"] == found[0]


def test_students_learn_from_the_mean_as_from_a_store_that_holds_it(home: Home, tmp_path: Path) -> None:
    recipe = home.recipe([home.member("a"), home.member("b")], ANNEALING)
    stores = home.cache(recipe).levels[0].stores
    cache_root = str(home.root / "cache")
    train_in_process(recipe, stores, run=tmp_path / "mean", cache_root=cache_root)
    held = {split: stored(open_logits(ref), tmp_path / "stores") for split, ref in stores.items()}
    train_in_process(recipe, held, run=tmp_path / "held", cache_root=cache_root)
    weights = [(tmp_path / run / "students/one/model.safetensors").read_bytes() for run in ("mean", "held")]
    assert weights[0] == weights[1]


def stored(mean: AnyStore, root: Path) -> str:
    """A store of its own of what a mean reads."""
    assert isinstance(mean, MeanStore)
    begun = mean.members[0].manifest.creation()
    identity = begun.identity.model_copy(update={"teacher": mean.teacher})
    creation = Creation(identity=identity, computed=begun.computed, dataset=begun.dataset, teacher={})
    writer = create_store(str(root), creation)
    for shard, logits in zip(mean.layout.shards(), mean.shards(mean.layout.shards()), strict=True):
        probes = mean.members[0].manifest.record(shard).probes
        write_shard(writer, shard, logits, label_agreement=0.5, probes=probes, seconds=0.0)
    seal_store(writer)
    return writer.uri


def test_a_run_of_an_ensemble_is_planned(home: Home, tmp_path: Path) -> None:
    """Stage I is looked for by what all members say."""
    recipe = home.recipe([home.member("a"), home.member("b")], ANNEALING)
    plan = plan_run(home.cache(recipe), tmp_path, home.workspace, fresh=False)
    assert plan.document.teacher == "cached: it is not needed"
    assert plan.document.cache_bytes == 0


def test_an_assistant_learns_from_the_ensemble(home: Home) -> None:
    assistant = {"model": {"kind": "mlp", "hidden": 8}, "objective": {"kind": "kd", "epochs": 1}, "optimizer": ADAMW}
    teacher = {"members": [home.member("a"), home.member("b")], "assistant": assistant}
    recipe = home.recipe(teacher, {"kind": "takd", "epochs": 1})
    inputs = home.cache(recipe)
    assert [level.name for level in inputs.levels] == ["the teacher", "the assistant mlp-8"]
    assert inputs.complete


def test_members_may_be_trained_imported_and_given(home: Home, tmp_path: Path) -> None:
    trained = {"model": {"kind": "mlp", "hidden": 4}, "train": {"epochs": 1, "optimizer": ADAMW}}
    recipe = home.recipe([trained, home.member("a")])
    before = home.open(recipe)
    assert not before.models  # the first is to be trained
    assert len(home.cache(recipe).models) == 2
    (given,) = home.open(home.recipe(home.member("a"))).models
    stored = home.recipe([{"store": given.opened["train"].id}, home.member("b")])
    same = home.recipe([home.member("a"), home.member("b")])
    assert home.open(stored).levels[0].taught == home.open(same).levels[0].taught
    other = trained | {"train": {"epochs": 2, "optimizer": ADAMW}}
    plan = foresee_caching(home.open(home.recipe([other, home.member("a")])), home.workspace)
    assert [member["train"].hit for member in plan.members] == [False, True], "although the first is to be trained"
    assert plan.bytes == sum(split.bytes for split in plan.members[0].values())
    missing = home.recipe([other, home.member("nobody")])
    with pytest.raises(RefusedError, match="nobody"):  # before the first is trained
        home.open(missing)


def test_mean_probabilities_are_no_raw_logits(home: Home) -> None:
    teacher = {"members": [home.member("a"), home.member("b")], "average": "probabilities"}
    home.open(home.recipe(teacher))
    with pytest.raises(RefusedError, match="cannot learn from log-probabilities") as caught:
        home.open(home.recipe(teacher, ANNEALING))
    assert "average logits" in str(caught.value)


def test_ensembles_that_make_no_sense_are_refused(home: Home) -> None:
    a = home.member("a")
    for given, told in (
        ([a], "at least 2"),
        ({"members": [a, a], "weights": "x"}, "no weights of its own"),
        (a | {"average": "probabilities"}, "give its members"),
        ([a, {"members": [a, a]}], "no members"),
        ([a, a | {"share": 0.0}], "greater than 0"),
        ([a | {"share": 1e308}, a | {"share": 1e308}], "without a weight"),
        ([a | {"share": 1e-320}, a | {"share": 1e300}], "without a weight"),
    ):
        with pytest.raises(ValidationError, match=told):
            home.recipe(given)
