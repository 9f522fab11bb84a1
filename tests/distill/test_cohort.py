"""Students in a plain loop: lockstep equals solo, resumes equal undisturbed runs, and one student's end is its own."""

import json
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.distill.ranks import OutOfStepError, Ranks
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.folder import load_model
from akd_dist.recipe import Recipe, Sgd, Takd
from tests.fleets import ADAMW, ANNEALING, CONTINUATION, HARD, KD, a_recipe, a_student, stacks_of, stores_of, weights
from tests.survivors import FORKS, train

FLEET = [
    *(a_student(f"annealing-{seed}", seed=seed) for seed in range(3)),
    *(a_student(f"hard-{seed}", seed=seed, objective=HARD) for seed in range(2)),
    a_student("wide", model={"kind": "mlp", "hidden": 24}),
    a_student("cnn", model={"kind": "cnn", "width": 4}),
    a_student("long", objective=ANNEALING | {"stage1_epochs": 3, "stage2_epochs": 2}),
    a_student("kd", objective=KD),
    a_student("continuation", objective=CONTINUATION),
    a_student("float64", objective=KD, precision="float64"),
    a_student("bfloat16", precision="bfloat16"),
    a_student("float16", objective=CONTINUATION, precision="float16"),
    a_student("clipped", optimizer={"kind": "sgd", "lr": 0.1, "clip": 0.05}),
]


EXPLODING = ADAMW | {"lr": 1e30, "schedule": {"kind": "constant"}}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe(FLEET)


def job_of(recipe: Recipe, stores: dict[str, str], home: Path, run: Path, **changes: Any) -> CohortJob:
    (run / "control").mkdir(parents=True, exist_ok=True)  # as a driver does when it begins
    splits = prepare(recipe.data, home / "cache")
    stacks = stacks_of(recipe, splits, home / "cache")
    return replace(fleet_job(recipe, splits, stores, run, str(home / "cache")), **{"stacks": stacks, **changes})


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, stores: dict[str, str], home: Path) -> dict[str, str]:
    train_in_process(recipe, stores, run=home / "undisturbed", cache_root=str(home / "cache"))
    return weights(home / "undisturbed")


def test_a_student_in_a_cohort_ends_as_it_would_alone(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    assert len(undisturbed) == len(FLEET)
    for spec in recipe.students:
        train_cohort(job_of(recipe, stores, home, tmp_path, students=(spec,)))
    assert weights(tmp_path) == undisturbed
    assert len(set(undisturbed.values())) == len(FLEET)


def test_what_a_student_leaves(recipe: Recipe, home: Path, undisturbed: dict[str, str]) -> None:
    folder = home / "undisturbed" / "students" / "annealing-0"
    result = json.loads((folder / "result.json").read_bytes())
    assert (result["state"], result["epochs"], result["tau_max"]) == ("done", 3, 2)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["temperature"], record["phi"]) for record in records] == [
        ("annealing", 2, 0.5),
        ("annealing", 1, 1.0),
        ("hard_labels", None, None),
    ]
    test = prepare(recipe.data, home / "cache").test
    module = load_model(str(folder))
    with torch.inference_mode():
        chosen = module(torch.from_numpy(np.array(test.inputs))).argmax(1).numpy()
    assert result["test"]["accuracy"] == pytest.approx(float(np.mean(chosen == test.labels)), abs=1e-6)
    assert set(result["test"]) == {"accuracy", "f1", "matthews", "loss"}
    assert 0 <= result["agreement"] <= 1
    delivered = max(records[2:], key=lambda record: record["validation"]["accuracy"])
    assert result["validation"] == delivered["validation"]


def test_psi_is_recorded_where_there_is_one(home: Path, undisturbed: dict[str, str]) -> None:
    lines = (home / "undisturbed" / "students" / "continuation" / "metrics.jsonl").read_text().splitlines()
    told = [tuple(json.loads(line)[key] for key in ("stage", "temperature", "phi", "psi")) for line in lines]
    # k = floor(3 / 2) = 1 epoch a temperature; the ramp takes floor(3/4 * 3) = 2 epochs
    assert told == [("continuation", 2, 0.5, 0.5), ("continuation", 1, 1.0, 1.0), ("continuation", 1, 1.0, 1.0)]


def test_float64_is_delivered_in_float64(recipe: Recipe, home: Path, undisturbed: dict[str, str]) -> None:
    folder = home / "undisturbed" / "students" / "float64"
    saved, module = safetensors.torch.load_file(folder / "model.safetensors"), load_model(str(folder))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float64}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    assert any(not torch.equal(tensor, tensor.float().double()) for tensor in saved.values())
    inputs = torch.from_numpy(np.array(prepare(recipe.data, home / "cache").test.inputs[:5]))
    assert module(inputs).dtype == torch.float64


def test_half_precision_keeps_its_weights_in_float32(home: Path, undisturbed: dict[str, str]) -> None:
    for name in ("bfloat16", "float16"):
        saved = safetensors.torch.load_file(home / "undisturbed" / "students" / name / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.half().float()) for tensor in saved.values())


def test_takd_is_kd_from_whoever_fills_the_store(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    spec = next(spec for spec in recipe.students if spec.name == "kd")
    takd = spec.model_copy(update={"objective": Takd(epochs=3)})
    train_cohort(job_of(recipe, stores, home, tmp_path, students=(takd,)))
    assert weights(tmp_path) == {"kd": undisturbed["kd"]}


def test_the_best_epoch_is_the_first_of_the_best(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path
) -> None:
    still = {"kind": "sgd", "lr": 1e-30}  # every epoch is as good as the first
    spec = recipe.students[0].model_copy(update={"optimizer": Sgd.model_validate(still)})
    data = recipe.data.model_copy(update={"metric": "matthews"})
    train_cohort(job_of(recipe, stores, home, tmp_path, students=(spec,), data=data))
    train_cohort(job_of(recipe, stores, home, tmp_path, students=(recipe.students[0],), data=data))
    folder = tmp_path / "students" / spec.name
    result = json.loads((folder / "result.json").read_bytes())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["validation"] == records[1]["validation"]
    assert result["validation"] == records[2]["validation"]


@pytest.mark.parametrize("nth", [1, 7, 18, 19, 40, 55, 90])
def test_sigkill_then_the_same_call_ends_with_the_very_weights(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path, nth: int
) -> None:
    # Half a student's time between checkpoints also falls inside epochs.
    job = job_of(recipe, stores, home, tmp_path, checkpoint_seconds=0.05)
    process = FORKS.Process(target=train, args=(job, f"cohort.after_batch:{nth}"))
    process.start()
    process.join(900)
    assert process.exitcode == -signal.SIGKILL
    train_cohort(job)
    assert weights(tmp_path) == undisturbed
    records = (tmp_path / "students" / "long" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in records] == list(range(5))


def test_the_stop_file_checkpoints_inside_an_epoch(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(recipe, stores, home, tmp_path)
    job.stop_file.touch()
    for _ in range(3):  # each call takes one step, checkpoints and leaves
        assert train_cohort(job) == {"stopped": True, "students": []}
    names = [path.name for path in checkpoints(tmp_path / "students" / "cnn" / "checkpoints")]
    assert names == ["000000-00000002-0001.ckpt", "000000-00000003-0001.ckpt"]
    job.stop_file.unlink()
    assert not train_cohort(job)["stopped"]
    assert weights(tmp_path) == undisturbed


def test_students_join_when_the_stream_reaches_them(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    ahead = job_of(recipe, stores, home, tmp_path, students=(recipe.students[0],))
    ahead.stop_file.touch()
    for _ in range(2):
        train_cohort(ahead)
    ahead.stop_file.unlink()
    train_cohort(job_of(recipe, stores, home, tmp_path))
    assert weights(tmp_path) == undisturbed


def test_diverging_and_failing_students_disturb_nobody(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "exploding_student.py").write_text(
        "import torch\n"
        "class Exploding(torch.nn.Module):\n"
        "    def __init__(self, inputs, classes):\n"
        "        super().__init__(); self.layer = torch.nn.Linear(inputs, classes); self.calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += self.training\n"
        "        if self.calls == 25: raise RuntimeError('out of luck')\n"
        "        return self.layer(x.flatten(1))\n"
        "def exploding(input_shape, classes):\n"
        "    return Exploding(input_shape[0] * input_shape[1] * input_shape[2], classes)\n"
    )
    bad = [
        a_student("diverging", optimizer=EXPLODING),
        a_student("diverging-kd", objective=KD, optimizer=EXPLODING),
        a_student("failing", model={"kind": "custom", "factory": "exploding_student:exploding"}),
    ]
    fleet = a_recipe([*bad, *FLEET], folder=str(tmp_path))
    results = train_in_process(fleet, stores, run=tmp_path / "run", cache_root=str(home / "cache"))
    for name in ("diverging", "diverging-kd"):
        assert results[name]["state"] == "diverged"
        assert "loss is" in results[name]["reason"]
    assert (results["failing"]["state"], results["failing"]["reason"]) == ("failed", "RuntimeError: out of luck")
    assert checkpoints(tmp_path / "run" / "students" / "failing" / "checkpoints")
    assert "out of luck" in (tmp_path / "run" / "logs" / "failing.log").read_text()
    assert weights(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("where", ["take_step", "end_epoch", "save"])
def test_a_worker_that_fails_alone_ends_all_workers(
    where: str, recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start again; which student is to blame is found by cutting the cohort. Who trains alone fails alone."""

    def short(*_: object) -> None:
        raise MemoryError("here and nowhere else")

    monkeypatch.setattr(Student, where, short)
    # Students that share their batches with other workers step one after the other.
    job, check = job_of(recipe, stores, home, tmp_path, checkpoint_seconds=1e-6, stacks={}), Ranks.check_agreed
    with monkeypatch.context() as patched:
        patched.setattr(Ranks, "check_agreed", lambda _alone, error, who: check(Ranks(0, 2), error, who))
        with pytest.raises(OutOfStepError, match=r"^annealing-0: out of memory: MemoryError: here and nowhere else"):
            train_cohort(job)
    assert not list(tmp_path.rglob("result.json"))
    results = train_cohort(job)["students"]
    assert [result["state"] for result in results] == ["failed"] * len(recipe.students)
    monkeypatch.undo()
    assert train_cohort(job)["students"] == results  # workers of the same attempt that were started again
    next_attempt = train_cohort(replace(job, attempt=2))["students"]
    assert [(result["state"], result["attempt"]) for result in next_attempt] == [("done", 2)] * len(recipe.students)
    assert {result["reason"] for result in results} == {"out of memory: MemoryError: here and nowhere else"}


def test_nobody_left_in_an_epoch_ends_its_stream(
    stores: dict[str, str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe([a_student("one", optimizer=EXPLODING)])
    made, batches = [], BatchStream.batches

    def counted(*arguments: Any) -> Any:
        for batch in batches(*arguments):
            made.append(batch.step)
            yield batch

    monkeypatch.setattr(BatchStream, "batches", counted)
    (result,) = train_cohort(job_of(recipe, stores, home, tmp_path))["students"]
    assert result["state"] == "diverged"
    assert f"step {made[-1]}," in result["reason"]


def test_a_student_without_an_intact_checkpoint_fails_alone(
    recipe: Recipe, stores: dict[str, str], home: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(recipe, stores, home, tmp_path)
    job.stop_file.touch()
    train_cohort(job)
    job.stop_file.unlink()
    for path in checkpoints(tmp_path / "students" / "wide" / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-1])
    results = {result["name"]: result for result in train_cohort(job)["students"]}
    assert results["wide"]["state"] == "failed"
    assert "intact" in results["wide"]["reason"]
    assert weights(tmp_path) == {name: digest for name, digest in undisturbed.items() if name != "wide"}


def test_a_swapped_shard_is_refused_though_decoded_before(recipe: Recipe, home: Path, tmp_path: Path) -> None:
    stores = stores_of(recipe, str(home / "teacher"), tmp_path)
    stop = job_of(recipe, stores, tmp_path, tmp_path / "first")
    stop.stop_file.touch()
    train_cohort(stop)  # decodes the store
    first, second = (Path(stores["train"]) / "arrays.zarr" / "logits" / "c" / "0" / str(n) / "0" for n in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DamagedError, match="logits/c/0/0/0") as refused:
        train_cohort(job_of(recipe, stores, tmp_path, tmp_path / "run"))
    assert refused.value.code == 5
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_stores_in_object_storage_train_the_same_students(
    recipe: Recipe, home: Path, undisturbed: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    root = {"store_root": f"{bucket}/stores", "cache_root": str(tmp_path / "cache")}
    document = cache_in_process(recipe, str(home / "teacher"), **root)
    assert document["store"].startswith("s3://")
    stores = {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}
    train_in_process(recipe, stores, run=tmp_path / "run", cache_root=root["cache_root"])
    assert weights(tmp_path / "run") == undisturbed
    assert cache_in_process(recipe, str(home / "teacher"), **root)["hit"]


def test_other_data_than_the_drivers_is_refused(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="not those of the driver"):
        train_cohort(job_of(recipe, stores, home, tmp_path, fingerprints={"train": "0" * 64}))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def both_ranks(worker: Callable[..., None], *arguments: Any) -> None:
    processes = [FORKS.Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def two_ranks(rank: int, port: int, job: CohortJob) -> None:
    """One of two data-parallel workers, as Ray Train would start it."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    train_cohort(job, Ranks(rank, 2))
    torch.distributed.destroy_process_group()


def shared_state(rank: int, port: int) -> None:
    """Ranks with other weights and batch statistics end up with those of rank 0."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    group = Ranks(rank, 2)
    torch.manual_seed(rank)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module(torch.randn(8, 3))
    group.share_state(module)
    flat = torch.cat([tensor.flatten().double() for tensor in module.state_dict().values()])
    mine, theirs = group.gather(flat)
    assert torch.equal(mine, theirs)
    assert group.from_first({"rank": rank}) == {"rank": 0}
    assert group.any(rank == 1, False) == (True, False)
    assert group.sum(rank + 1.0) == 3.0
    torch.distributed.destroy_process_group()


def test_ranks_share_state_decisions_and_sums(free_port: int) -> None:
    both_ranks(shared_state, free_port)


def test_two_workers_follow_one_worker(home: Path, tmp_path: Path, free_port: int) -> None:
    plain: dict[str, Any] = {"model": {"kind": "mlp", "hidden": 8}, "workers": 2}
    sgd = {"kind": "sgd", "lr": 0.1}
    students = [
        *(a_student(f"s{seed}", seed=seed, **plain) for seed in range(2)),
        a_student("kd", objective=KD, **plain),
        # Not by Adam, which makes a whole step of a gradient that is nothing but rounding.
        a_student("continuation", objective=CONTINUATION, optimizer=sgd, **plain),
        a_student("clipped", optimizer=sgd | {"clip": 0.02}, **plain),
        a_student("float64", optimizer=sgd, precision="float64", **plain),
    ]
    recipe = a_recipe(students)
    stores = stores_of(recipe, str(home / "teacher"), home)
    train_in_process(recipe, stores, run=tmp_path / "one", cache_root=str(home / "cache"))
    job = job_of(recipe, stores, home, tmp_path / "two")
    both_ranks(two_ranks, free_port, job)
    for spec in recipe.students:
        alone = load_model(str(tmp_path / "one" / "students" / spec.name)).state_dict()
        together = load_model(str(tmp_path / "two" / "students" / spec.name)).state_dict()
        for name, tensor in alone.items():
            assert torch.allclose(tensor, together[name], atol=1e-9 if spec.name == "float64" else 1e-4), name
