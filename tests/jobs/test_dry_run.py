"""What a fleet would do, before it does: its plan, what cannot fit, and the probe that the estimates come from."""

import io
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.cli import main
from akd_dist.cli.plans import plan_lines, plan_table
from akd_dist.data.factories import import_factory
from akd_dist.data.row_cache import prepare
from akd_dist.distill import probe as probes
from akd_dist.distill.probe import guessed, probe
from akd_dist.documents.plan import FleetPlanDocument
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.caching import check_room, check_students
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.drawing import bytes_streamed
from akd_dist.jobs.planning.plan import last_attempt
from akd_dist.jobs.planning.planner import groups_of
from akd_dist.jobs.planning.probing import Prober, measure_all, measure_there, scaled
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Custom
from akd_dist.storage.objects import LocalRoot
from tests.fleets import ADAMW, ANNEALING, DEVICE, HARD, a_recipe, a_student, a_teacher

LONGER = ANNEALING | {"stage2_epochs": 2}


class Place:
    """A folder with a recipe file of three students, and the dry run of it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        students = [a_student("a"), a_student("b", objective=LONGER), a_student("c", objective=HARD, batch=32)]
        teacher = a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache")
        self.recipe = a_recipe(students, teacher={"weights": teacher})
        (root / "recipe.yaml").write_text(self.recipe.to_yaml())

    def run(self, *arguments: str, verb: str = "train-students") -> tuple[int, str, str]:
        """Exit code, stdout and stderr; checked to leave the run root alone."""
        roots = [f"--{name}-root={self.root / folder}" for name, folder in (("store", "stores"), ("cache", "cache"))]
        before = sorted(self.root.glob("runs/**/*"))
        run_root = f"--run-root={self.root / 'runs'}"
        with pytest.raises(SystemExit) as left:
            main([verb, str(self.root / "recipe.yaml"), *roots, run_root, "--dry-run", *arguments])
        assert sorted(self.root.glob("runs/**/*")) == before
        out, err = self.capsys.readouterr()
        return int(left.value.code or 0), out, err

    def plan(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.run("--json", *arguments)
        assert code == 0, err
        FleetPlanDocument.model_validate_json(out)
        document: dict[str, Any] = json.loads(out)
        return document


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, capsys)


def test_a_plan_says_what_would_be_done_and_why(place: Place) -> None:
    plan = place.plan()
    assert not (place.root / "runs").exists()
    assert "are to be cached" in plan["teacher"]
    students = {student["name"]: student for cohort in plan["cohorts"] for student in cohort["students"]}
    steps = 20  # of an epoch of 1,293 rows, in batches of 64
    per_epoch = -(-len(prepare(place.recipe.data, place.root / "cache").train) // 64)
    assert per_epoch in (steps, steps + 1, steps - 1)
    assert students["a"]["steps"] == 3 * per_epoch
    assert (students["b"]["rides"], students["b"]["steps"]) == ("a", 2 * per_epoch)
    assert students["a"]["parameters"] == sum((64 * 8, 8, 8 * 10, 10))
    assert [cohort["steps"] for cohort in plan["cohorts"] if len(cohort["students"]) == 2] == [4 * per_epoch]
    assert "2 students share batches of 64" in " ".join(cohort["why"] for cohort in plan["cohorts"])
    assert "do not mix" in plan["why"]
    rows = len(prepare(place.recipe.data, place.root / "cache").train)
    two = next(cohort for cohort in plan["cohorts"] if len(cohort["students"]) == 2)
    row = 64 + 8  # a digit and its label; its logits in the two epochs of stage I
    assert two["bytes_streamed"] == rows * (4 * row + 2 * 40)
    assert plan["checkpoint_bytes"] == pytest.approx(
        (2 * 3 + len(plan["cohorts"])) * 4 * students["a"]["parameters"] * 4, rel=0.01
    )
    assert (
        place.plan("--set", "cohorts=9")["why"]
        == "2 cohorts: the recipe's `cohorts` says 9, but nothing more can be cut"
    )
    assert plan["seconds"] >= max(cohort["ends"] for cohort in plan["cohorts"]) - 0.1


def test_a_plan_tells_ended_resumed_and_new_students(place: Place) -> None:
    cached = cache_in_process(
        place.recipe, str(place.root / "teacher"), store_root=str(place.root / "stores"),
        cache_root=str(place.root / "cache"),
    )  # fmt: skip
    stores = {"train": cached["store"]} | {split: part["store"] for split, part in cached["splits"].items()}
    run = place.root / "runs" / "fleet"
    train_in_process(place.recipe, stores, run=run, cache_root=str(place.root / "cache"))
    (run / "students" / "b" / "result.json").unlink()  # it had just taken its last step
    plan = place.plan()
    assert plan["teacher"] == "cached: it is not needed"
    assert [student["name"] for student in plan["ended"]] == ["a", "c"]
    (only,) = [student for cohort in plan["cohorts"] for student in cohort["students"]]
    assert (only["name"], only["standing"], only["rides"]) == ("b", "resumes", None)
    assert only["steps"] <= 20 * 2
    assert plan["removes"] is None
    fresh = place.plan("--fresh")
    assert {one["standing"] for cohort in fresh["cohorts"] for one in cohort["students"]} == {"new"}
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert fresh["removes"] == {"students": 2, "bytes": there}
    assert f"2 trained students and everything else in {run}" in place.run("--fresh")[1]


def test_a_comparison_is_planned_like_any_run(place: Place) -> None:
    code, out, err = place.run("--seeds", "2", "--set", "students.2.batch=64", "--json", verb="compare")
    assert code == 0, err
    plan = FleetPlanDocument.model_validate_json(out)
    assert plan.run == str(place.root / "runs" / "fleet-compare")
    planned = {student.objective for cohort in plan.cohorts for student in cohort.students}
    assert planned == {"hard_labels", "kd", "annealing_kd", "continuation_kd"}
    assert "what training would do" in place.run("--seeds", "2", verb="compare")[1]


def test_stray_files_of_a_run_are_no_attempts(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    for name in ("attempt-3", "attempt-1.bak", "attempt-", "attempt-x", "attempt-99999999999999999999"):
        (tmp_path / "control" / name).touch()
    assert last_attempt(tmp_path) == 3
    (tmp_path / "control" / "attempt-999999").touch()
    with pytest.raises(DamagedError, match=r"control/attempt-999999 is damaged(.|\n)*the latest attempt is 3"):
        last_attempt(tmp_path)


def test_a_plan_as_text(place: Place) -> None:
    code, out, err = place.run()
    assert code == 0, err
    for told in ("stage I of a", "= cohort 1", "teacher", "cluster", "disk", "time", "nothing was trained"):
        assert told in out
    assert f"stores in {place.root / 'stores'}, the run in {place.root / 'runs' / 'fleet'}\n" in out
    assert "removes" not in out


def test_a_plan_fits_eighty_columns(place: Place) -> None:
    plan = place.plan()
    names = {"a": "mlp-8-annealing_kd-t5-m20-s0", "b": "mlp-8-annealing_kd-t5-m40-s0", "c": "from-scratch"}
    for cohort in plan["cohorts"]:
        cohort |= {"begins": 3000.0, "ends": 6500.0, "steps": 40_000}
        for student in cohort["students"]:
            leader = names.get(student["rides"])
            student |= {"name": names[student["name"]], "rides": leader, "steps": 40_000, "parameters": 250_000}
    console = Console(file=io.StringIO(), width=80)
    console.print(plan_table(FleetPlanDocument.model_validate(plan)))
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert set(told.split()) >= set(names.values())  # none of them cut or folded
    assert "  stage I of" in told
    assert "58 min 20 s" in told


def test_what_cannot_fit_is_refused_before_anything_starts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = place.run("--set", "students.2.threads=999")
    assert (code, "999 CPUs" in err) == (6, True), err
    code, _, err = place.run("--set", "cohorts=1")
    assert (code, "at least 2" in err) == (2, True), err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(LocalRoot, "free_bytes", lambda _root: 10**9)
    full = SimpleNamespace(disk_usage=lambda _path: usage(10**9, 10**9, 1000))
    monkeypatch.setattr("akd_dist.jobs.planning.drawing.shutil", full)  # the cache has a disk of its own
    code, _, err = place.run()
    assert (code, "do not fit in" in err, "--run-root" in err) == (6, True, True), err
    assert not (place.root / "stores").exists()


@pytest.mark.parametrize(
    ("encoding", "advice", "not_advised"),
    [
        ({"kind": "float32"}, "kind: float16", "rank"),
        ({"kind": "top_k", "k": 4, "rank": 2}, "a smaller k or rank", "float16"),
        ({"kind": "float16", "compress": "blosc"}, "fewer data.views", "float16"),
    ],
)
def test_advice_on_room_fits_the_encoding(
    encoding: dict[str, Any], advice: str, not_advised: str, tmp_path: Path
) -> None:
    recipe = a_recipe([a_student("one")], cache={"encoding": encoding})
    with pytest.raises(MachineError) as told:
        check_room(str(tmp_path), 10**18, recipe)
    assert advice in str(told.value.next)
    assert not_advised not in str(told.value.next)
    assert "--store-root" in str(told.value.next)


def test_logits_and_checkpoints_on_one_disk_must_fit_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = place.plan()
    students = plan["checkpoint_bytes"] + plan["model_bytes"]
    usage = namedtuple("usage", "total used free")
    for free, code in ((students + plan["cache_bytes"], 0), (max(students, plan["cache_bytes"]), 6)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: usage(10**9, 0, free))
        left, _, err = place.run()
        assert left == code, err
    assert "of logits on the same disk" in err


def test_what_an_interrupted_run_cached_is_not_counted_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = place.plan()["cache_bytes"]
    roots = {"store_root": str(place.root / "stores"), "cache_root": str(place.root / "cache")}
    train = Path(cache_in_process(place.recipe, str(place.root / "teacher"), **roots)["store"])
    for name in ("manifest.json", "receipts/0-0.json"):
        (train / name).unlink()
    left = place.plan()["cache_bytes"]
    assert 0 < left < everything / 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(LocalRoot, "free_bytes", lambda _root: left)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, 10**8))
    code, _, err = place.run()
    assert code == 0, err


def test_a_plan_without_probes_claims_no_time(place: Place) -> None:
    plan = place.plan()
    assert "about" in plan_lines(FleetPlanDocument.model_validate(plan))[-1]
    plan["cohorts"][0]["students"][0]["seconds"] = None
    assert "more than" in plan_lines(FleetPlanDocument.model_validate(plan))[-1]
    assert plan["cohorts"][0]["students"][0]["name"] in plan_lines(FleetPlanDocument.model_validate(plan))[-1]


# ---- the probe

MODELS = """
import os, time, torch

class Broken(torch.nn.Module):
    def __init__(self, inputs, classes, deadly):
        super().__init__()
        self.layer, self.deadly = torch.nn.Linear(inputs, classes), deadly

    def forward(self, x):
        if len(x) > 2:
            os.write(1, bytes([255, 10]))  # no text
            print("what a model prints is no answer", flush=True)
            if self.deadly:
                if os.fork() == 0:  # outlives its parent, and holds what it inherited
                    while not os.path.exists(os.path.join(os.path.dirname(__file__), "over")):
                        time.sleep(0.1)
                    os._exit(0)
                os.kill(os.getpid(), 9)
            raise ZeroDivisionError("a mistake of the user's own")
        return self.layer(x.flatten(1))

def broken(input_shape, classes, deadly):
    return Broken(input_shape[0] * input_shape[1] * input_shape[2], classes, deadly)

class Counting(torch.nn.Linear):
    seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x.flatten(1))

def counting(input_shape, classes):
    return Counting(input_shape[0] * input_shape[1] * input_shape[2], classes)
"""


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "probed_models.py").write_text(MODELS)
    yield tmp_path
    (tmp_path / "over").touch()


@pytest.mark.parametrize("deadly", [False, True])
def test_a_model_that_fails_in_the_probe_or_kills_it_is_unknown(
    deadly: bool, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"kind": "custom", "factory": "probed_models:broken", "arguments": {"deadly": deadly}}
    recipe = a_recipe([a_student("b", model=broken), a_student("a", threads=2)], folder=str(models))
    splits = prepare(recipe.data, models / "cache")
    found = measure_all(recipe, recipe.students, {"a": 610, "b": 650}, str(models / "cache"))
    died = "its process ended with code -9: what a model prints is no answer"
    assert (died if deadly else "a mistake of the user's own") in caplog.text
    assert found["b"] is None
    assert found["a"] is not None
    assert found["a"].weights == found["a"].gradients == 4 * 610
    assert found["a"].optimizer == pytest.approx(2 * 4 * 610, rel=0.01)
    assert 0 < found["a"].step < 1
    twice = scaled(found["a"], 2.0)
    assert (twice.weights, twice.step, twice.stream) == (8 * 610, 2 * found["a"].step, found["a"].stream)
    costs = CostModel.of(recipe, splits, {"a": 610, "b": 650}, found)
    assert costs.measured(recipe.students[0]).checkpoint == 2 * 4 * 650 + 2 * 4 * 650


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_students_are_probed_where_the_gpus_are(models: Path) -> None:
    broken = {"kind": "custom", "factory": "probed_models:broken", "arguments": {"deadly": True}}
    recipe = a_recipe([a_student("b", model=broken), a_student("a")], folder=str(models), device="cpu")
    parameters, cache, told = {"a": 610, "b": 650}, str(models / "cache"), list[str]()
    # As a task, which needs no GPU on a CPU.
    found = measure_there(recipe, recipe.students, parameters, cache, told.append)
    assert found["a"] is not None
    assert found["a"].weights == 4 * 610
    assert (found["b"], told) == (None, [])
    if not torch.cuda.is_available():
        on_gpu = recipe.model_copy(update={"device": "cuda"})
        found = measure_there(on_gpu, recipe.students, parameters, cache, told.append)
        assert found == {"a": None, "b": None}
        assert told == ["how long the students take is not known: no GPU is free to probe the students on"]


def test_a_student_that_takes_no_step_is_probed_all_the_same(tmp_path: Path) -> None:
    """No recipe has one; `benchmarks.fleet --steps-zero` does."""
    recipe = a_recipe([a_student("one")])
    (one,) = recipe.students
    stages = {"stage1_epochs": 0, "stage2_epochs": 0}
    none = one.model_copy(update={"objective": one.objective.model_copy(update=stages)})
    found = measure_all(recipe, [none], {"one": 650}, str(tmp_path / "cache"))["one"]
    assert found is not None
    assert found.step > 0
    assert found.keeping > 0


def test_a_batch_that_memory_would_not_hold_is_not_tried(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = {"kind": "custom", "factory": "probed_models:counting"}
    recipe = a_recipe([a_student("one", model=counting)], folder=str(models))
    splits = prepare(recipe.data, models / "cache")
    (model,) = [spec.model for spec in recipe.students if isinstance(spec.model, Custom)]
    seen = import_factory(model, "").__globals__["Counting"].seen
    measured = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(probes, "free_memory", lambda _device, free=free: free)
        scratch = models / f"{free}"
        scratch.mkdir()
        seen.clear()
        measured.append(probe(recipe.data, DEVICE, recipe.students[0], splits, scratch))
        assert (64 in seen) == bool(free)
    assert measured[0].step_memory == measured[1].step_memory > 0


def test_weights_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    recipe = a_recipe([a_student("one", model={"kind": "mlp", "hidden": 10**11})])
    with pytest.raises(RefusedError, match="mlp-100000000000 does not fit the memory") as refused:
        check_students(recipe, prepare(recipe.data, tmp_path))
    assert "30,000.0 GB of weights" in str(refused.value.got)


def test_a_learning_rate_that_diverges_is_probed_all_the_same(tmp_path: Path) -> None:
    wild = {"kind": "sgd", "lr": 1e30}
    recipe = a_recipe([a_student("wild", optimizer=wild)])
    assert probe(recipe.data, DEVICE, recipe.students[0], prepare(recipe.data, tmp_path), tmp_path).step > 0


def test_the_larger_optimizer_of_two_stages_counts(tmp_path: Path) -> None:
    objective = ANNEALING | {"stage2_optimizer": ADAMW}
    (spec,) = a_recipe([a_student("one", objective=objective, optimizer={"kind": "sgd", "lr": 0.1})]).students
    data = a_recipe([a_student("one")]).data
    found = probe(data, DEVICE, spec, prepare(data, tmp_path), tmp_path)
    assert found.optimizer == pytest.approx(2 * found.weights, rel=0.01)
    assert guessed(spec, 610).optimizer == 2 * 4 * 610


def test_a_plan_counts_the_memory_and_the_steps_of_a_last_batch(tmp_path: Path) -> None:
    """1,258 train rows in batches of 700: the last has 558, or joins the first, or is left out."""
    students = [a_student(how, batch=700, last_batch=how, objective=HARD) for how in ("keep", "merge", "drop")]
    recipe = a_recipe(students)
    splits = prepare(recipe.data, tmp_path / "cache")
    rows, found = len(splits.train), {}
    for spec in recipe.students:
        (tmp_path / spec.name).mkdir()
        found[spec.name] = probe(recipe.data, DEVICE, spec, splits, tmp_path / spec.name)
    memory = {name: one.step_memory for name, one in found.items()}
    assert memory["merge"] == pytest.approx(memory["keep"] * rows / 700, rel=0.01)
    assert memory["drop"] == memory["keep"]
    costs = CostModel.of(recipe, splits, dict.fromkeys(found, 1), dict(found))
    assert [costs.steps_left(spec) for spec in recipe.students] == [6, 3, 3]
    assert len(groups_of(recipe.students)) == 3
    streamed = [bytes_streamed(recipe, (spec,), costs) for spec in recipe.students]
    assert streamed == [3 * (64 + 8) * shown for shown in (rows, rows, 700)]


def test_students_that_cost_the_same_are_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe([a_student(f"{seed}", seed=seed, objective=LONGER) for seed in range(50)] + [a_student("other")])
    probed: list[str] = []
    monkeypatch.setattr(Prober, "probe", lambda _prober, spec: probed.append(spec.name))
    measure_all(recipe, recipe.students, {str(one): 1 for one in range(50)} | {"other": 1}, str(tmp_path))
    assert probed == ["0"]


@pytest.mark.parametrize("hidden", [100_000, pytest.param(8, marks=pytest.mark.slow)])
def test_the_estimate_of_memory_is_near_what_training_takes(hidden: int, tmp_path: Path) -> None:
    model = {"kind": "mlp", "hidden": hidden}
    student = a_student("one", model=model, objective={"kind": "hard_labels", "epochs": 1}, optimizer=ADAMW)
    recipe = a_recipe([student])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "tests.resident", str(tmp_path / "recipe.yaml"), str(tmp_path)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    splits = prepare(recipe.data, tmp_path / "cache")
    parameters = {"one": hidden * 75 + 10}
    costs = CostModel.of(
        recipe, splits, parameters, measure_all(recipe, recipe.students, parameters, str(tmp_path / "cache"))
    )
    assert 0.8 < costs.memory(tuple(recipe.students)) / measured < 1.6
