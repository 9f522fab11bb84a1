"""Device and precision: a GPU that is not there is refused before anything starts, and another precision is another
teacher. What a GPU computes: tests/distill/test_gpu.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.teacher import compute_shard, load_teacher, served_fingerprint, teacher_logits
from akd_dist.jobs import cluster
from akd_dist.jobs.cache_teacher import cache_job
from akd_dist.jobs.fleet import Fleet
from akd_dist.jobs.packing import Node, ResourceRequest, check_room, fits
from akd_dist.jobs.planning.caching import model_at
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.creations import creation_of
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.planner import plan_cohorts
from akd_dist.jobs.shared import Shared
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.tasks import Task, run_one, run_tasks
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.device import (
    device_name,
    free_memory,
    generator_states,
    gpus_of,
    left_in_container,
    set_deterministic,
    set_generator_states,
    weights_dtype,
)
from akd_dist.models.folder import load_card, read_model
from akd_dist.recipe import CacheSpec, Precision, Recipe
from akd_dist.storage.reader import open_store
from akd_dist.storage.writer import StoreWriter
from tests.fleets import a_recipe, a_student, a_teacher, stores_of

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
PRECISIONS: list[Precision] = ["float32", "float64", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe([a_student("one")])


@pytest.fixture(scope="module")
def teacher(recipe: Recipe, home: Path) -> str:
    return a_teacher(recipe, home / "teacher", home / "cache")


# ---- a GPU that is not there


@without_gpu
def test_a_gpu_that_is_not_there_is_refused() -> None:
    for act in (lambda: set_deterministic("cuda", 1), lambda: device_name("cuda")):
        with pytest.raises(MachineError, match="there is none here") as refused:
            act()
        assert refused.value.code == 6
    assert (device_name("cpu"), gpus_of("cpu"), gpus_of("cuda")) == ("cpu", 0, 1)


@without_gpu
def test_a_recipe_for_a_gpu_is_refused_before_a_step(recipe: Recipe, teacher: str, home: Path, tmp_path: Path) -> None:
    stores = stores_of(recipe, teacher, home)
    on_gpu = recipe.model_copy(update={"device": "cuda"})
    with pytest.raises(MachineError, match="there is none here"):
        train_in_process(on_gpu, stores, run=tmp_path, cache_root=str(home / "cache"))
    assert not list(tmp_path.rglob("*.ckpt"))
    with pytest.raises(MachineError, match="there is none here"):
        stores_of(on_gpu, teacher, tmp_path)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_gpus_is_refused_at_once(recipe: Recipe, home: Path, tmp_path: Path) -> None:
    stop, splits = StopFlag(), prepare(recipe.data, home / "cache")
    tasks, shared = [Task("one", None, None)], Shared({}, str(tmp_path), print)
    shared.look()

    def never(*_: object) -> None:
        raise AssertionError("it started")

    with pytest.raises(MachineError, match="too few GPUs for tasks") as refused:
        run_tasks(never, tasks, threads=1, gpus=1, shared=shared, stop=stop, on_result=never)
    assert refused.value.code == 6
    with pytest.raises(MachineError, match="too few GPUs"):
        Workspace(str(tmp_path), str(tmp_path), stop=stop).device("cuda")
    with pytest.raises(MachineError, match="too few GPUs for the teacher"):
        run_one(never, threads=1, gpus=1, shared=shared, stop=stop, on_poll=never, name="the teacher")
    base = fleet_job(recipe.model_copy(update={"device": "cuda"}), splits, {}, tmp_path, str(home / "cache"))
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), stop, Console(quiet=True))
    with pytest.raises(MachineError, match=r"(?s)too few GPUs for the cohort of one.*0 GPUs.*device=cpu"):
        fleet.train([tuple(recipe.students)])
    assert not fleet.jobs
    check_room(cluster.nodes(), ResourceRequest(1, 1), "a CPU")
    assert not fits(cluster.free_nodes(), ResourceRequest(1, 1, gpus=1))


def test_cohorts_on_gpus_are_planned_by_gpus() -> None:
    recipe = a_recipe([a_student(f"s{seed}", seed=seed) for seed in range(4)], device="cuda", cohorts=2)
    costs, nodes = CostModel("cuda", 100), [Node("one", 64, gpus=1)]
    planned, _ = plan_cohorts(recipe, list(recipe.students), nodes, costs)
    assert [len(cohort) for cohort in planned] == [2, 2]  # wanted: the second waits for the GPU
    free = recipe.model_copy(update={"cohorts": None})
    assert len(plan_cohorts(free, list(recipe.students), nodes, costs)[0]) == 1


# ---- precision


def test_generator_states_come_back() -> None:
    before = generator_states(torch.device("cpu"))
    drawn = torch.rand(3)
    set_generator_states(torch.device("cpu"), before)
    assert torch.equal(torch.rand(3), drawn)


def test_another_precision_is_another_teacher(recipe: Recipe, teacher: str, home: Path) -> None:
    card, splits = load_card(teacher), prepare(recipe.data, home / "cache")
    served = {precision: served_fingerprint(card, CacheSpec(precision=precision)) for precision in PRECISIONS}
    assert served["float32"] == card.fingerprint
    assert len(set(served.values())) == 4
    for precision in PRECISIONS:
        other = recipe.model_copy(update={"cache": CacheSpec(precision=precision)})
        assert creation_of(other, splits.test, "test", card, "cpu").identity.teacher == served[precision]
        module = load_teacher(teacher, served[precision], CacheSpec(precision=precision))
        assert {tensor.dtype for tensor in module.parameters()} == {weights_dtype(precision)}
    with pytest.raises(RefusedError, match="has changed"):
        load_teacher(teacher, card.fingerprint, CacheSpec(precision="float64"))


@pytest.mark.parametrize(("precision", "within"), [("float64", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)])
def test_logits_of_every_precision_are_float32_and_close(
    precision: Precision, within: float, recipe: Recipe, teacher: str, home: Path
) -> None:
    inputs = torch.from_numpy(np.array(prepare(recipe.data, home / "cache").test.inputs))
    plain = teacher_logits(read_model(teacher)[0], inputs, 64)
    cache = CacheSpec(precision=precision)
    module = load_teacher(teacher, served_fingerprint(load_card(teacher), cache), cache)
    logits = teacher_logits(module, inputs, 64, precision)
    assert logits.dtype == np.float32
    assert not np.array_equal(logits, plain)
    np.testing.assert_allclose(logits, plain, atol=within)
    np.testing.assert_array_equal(teacher_logits(module, inputs[:7], 64, precision), logits[:7])  # padded


def test_a_store_in_another_precision_stands_beside_the_first(recipe: Recipe, teacher: str, home: Path) -> None:
    double = recipe.model_copy(update={"cache": CacheSpec(precision="float64")})
    ours, theirs = stores_of(recipe, teacher, home), stores_of(double, teacher, home)
    assert ours["test"] != theirs["test"]
    a, b = open_store(ours["test"]), open_store(theirs["test"])
    np.testing.assert_allclose(a.rows(0, 0, a.num_rows), b.rows(0, 0, b.num_rows), atol=1e-5)
    assert b.manifest.teacher["fingerprint"] == b.manifest.identity.teacher


def test_a_card_other_than_the_stores_is_refused(recipe: Recipe, teacher: str, home: Path) -> None:
    plan = model_at("the teacher", teacher, recipe, prepare(recipe.data, home / "cache")).plans[2]
    computed = plan.creation.computed.model_copy(update={"device": "cuda:another card"})
    plan.writer = StoreWriter(str(home / "stores"), plan.creation.model_copy(update={"computed": computed}))
    job = cache_job(plan, recipe, teacher, str(home / "cache"))
    with pytest.raises(MachineError, match=rf"(?s)another device.*{device_name(recipe.device)}.*cuda:another card"):
        compute_shard(job, plan.identity.layout.shards()[0])


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path: Path) -> None:
    assert left_in_container(tmp_path) == sys.maxsize
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_container(tmp_path) == sys.maxsize
    (tmp_path / "memory.max").write_text("1000\n")
    assert left_in_container(tmp_path) == 500
    assert 0 < free_memory(torch.device("cpu")) < sys.maxsize
