"""Killed anywhere, suspended, damaged: the same call again ends as if nothing had been. Without Ray.

Each case kills or suspends a process of its own at a named place of the code (`AKD_FAILPOINT`).
"""

import contextlib
import io
import itertools
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from akd_dist.base.errors import HeldError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.checkpoint import checkpoints, encode
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob, ended, read_progress
from akd_dist.distill.stream import BatchStream
from akd_dist.jobs.results import telling_damage
from tests.fleets import ANNEALING, a_recipe, a_student, newest_tree
from tests.survivors import BATCH, FLEET, Place, counted, outcome, snapshot, steps_kept, steps_taken

KILL_POINTS = [
    *("fence.before_takeover:1", "fence.before_takeover:5", "cohort.before_first_step:1"),
    *("student.before_metrics:1", "student.before_metrics:9", "student.between_stages:1", "student.between_stages:3"),
    *("checkpoint.before_save:1", "checkpoint.before_save:8", "checkpoint.after_save:2", "checkpoint.after_save:9"),
    *("student.before_model:1", "student.before_model:4", "student.before_result:2", "student.before_result:5"),
    *("student.after_result:1", "student.after_result:3"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def per_epoch(place: Place) -> int:
    rows = prepare(place.recipe.data, place.cache_root).train
    return BatchStream(rows, None, place.recipe.data.augmentation, seed=0, views=1, batch=BATCH).steps_per_epoch


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, Any]:
    run = place.root / "undisturbed"
    assert place.train(place.job(run)) == 0
    found = outcome(run)
    assert {student["result"]["state"] for student in found.values()} == {"done"}
    assert len({student["weights"] for student in found.values()}) == len(FLEET)
    return found


def kill_and_go_on(place: Place, run: Path, failpoint: str, per_epoch: int) -> int:
    """Kill a run, and check that going on repeats no more than an interval and touches nobody who is done.

    Returns:
        The number of steps that were lost.
    """
    job = place.job(run)
    assert place.train(job, failpoint) == -signal.SIGKILL, failpoint
    over = [spec.name for spec in job.students if ended(job, spec)]
    finished = {name: snapshot(run / "students" / name) for name in over}
    taken, kept = steps_taken(job), steps_kept(job, per_epoch)
    total = {spec.name: spec.objective.epochs * per_epoch for spec in job.students}
    lost = {name: taken[name] - kept[name] for name in taken if name not in finished}
    assert all(0 <= steps <= per_epoch for steps in lost.values()), lost
    assert place.train(job) == 0
    assert {name: snapshot(run / "students" / name) for name in finished} == finished
    again = {name: steps - taken[name] for name, steps in steps_taken(job).items()}
    assert again == {name: 0 if name in finished else total[name] - kept[name] for name in taken}
    assert not list(run.rglob("*.partial"))
    return sum(lost.values())


@pytest.mark.parametrize("failpoint", KILL_POINTS)
def test_killed_at_a_boundary_it_ends_as_if_undisturbed(
    place: Place, undisturbed: dict[str, Any], per_epoch: int, tmp_path: Path, failpoint: str
) -> None:
    kill_and_go_on(place, tmp_path, failpoint, per_epoch)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize(("kills", "seed"), [(8, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_killed_at_random_steps_it_ends_as_if_undisturbed(
    place: Place, undisturbed: dict[str, Any], per_epoch: int, tmp_path: Path, kills: int, seed: int
) -> None:
    draw, lost = random.Random(seed), []
    # Batches of the fleet, and files that it gives their names: each of them is as likely to be the last.
    batches = max(spec.objective.epochs for spec in place.recipe.students) * per_epoch
    sites = {"cohort.after_batch": batches, "replace.before_rename": 26}
    for number in range(kills):
        site = draw.choice(list(sites))
        run = tmp_path / str(number)
        lost.append(kill_and_go_on(place, run, f"{site}:{draw.randint(1, sites[site])}", per_epoch))
        assert outcome(run) == undisturbed
    print(f"{kills} of {kills} kills survived, {sum(lost)} student steps repeated in all, seed {seed}")


def test_killed_again_and_again_with_checkpoints_inside_epochs(
    place: Place, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    job, draw = place.job(tmp_path, checkpoint_seconds=0.01), random.Random(2)
    deaths = 0
    for _ in range(12):
        deaths += place.train(job, f"cohort.after_batch:{draw.randint(1, 12)}") == -signal.SIGKILL
    assert deaths >= 5
    assert place.train(job) == 0
    assert outcome(tmp_path) == undisturbed


def test_killed_students_of_one_stage_end_as_each_would_alone(place: Place, tmp_path: Path) -> None:
    sharing = [
        counted("shared", objective=ANNEALING | {"stage2_epochs": epochs}) | {"name": f"fork-{epochs}"}
        for epochs in (1, 2, 3)
    ]
    fleet = a_recipe([*sharing, FLEET[1], FLEET[2]], teacher={"weights": place.teacher}, folder=str(place.root))
    alone: dict[str, Any] = {}
    for spec in fleet.students:
        assert place.train(place.job(tmp_path / spec.name, fleet, students=(spec,))) == 0
        alone |= outcome(tmp_path / spec.name)
    assert len({student["weights"] for student in alone.values()}) == len(fleet.students)
    draw = random.Random(3)
    # The first enters stage II, then its two followers; checkpoints of the second follower, and of the first itself.
    boundaries = ["checkpoint.after_save:3", *(f"student.between_stages:{nth}" for nth in (1, 2, 3))]
    boundaries += ["checkpoint.before_save:5", "checkpoint.before_save:6"]
    for failpoint in [*boundaries, *(f"cohort.after_batch:{draw.randint(1, 50)}" for _ in range(3))]:
        job = place.job(tmp_path / failpoint, fleet)
        assert place.train(job, failpoint) == -signal.SIGKILL
        assert place.train(job) == 0
        assert outcome(tmp_path / failpoint) == alone


# ---- workers that were taken for dead


STOP_POINTS = [
    *("fence.before_takeover:2", "cohort.before_first_step:1", "cohort.after_batch:14", "student.before_metrics:3"),
    *("checkpoint.before_save:6", "replace.before_rename:7", "checkpoint.after_save:10", "student.before_model:1"),
    *("student.before_result:2", "replace.before_rename:22", "student.after_result:1"),
]


@contextlib.contextmanager
def suspended(place: Place, run: Path, failpoint: str) -> Iterator[psutil.Process]:
    """A worker of attempt 1 that stands still at a failpoint, its locks held, until somebody sends SIGCONT."""
    process = place.start(place.job(run, attempt=1), f"{failpoint}:STOP")
    worker = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + 900
        while worker.status() != psutil.STATUS_STOPPED:
            assert process.is_alive(), f"{failpoint} was never reached"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield worker
    finally:
        process.kill()
        process.join()


def end_of(worker: psutil.Process, place: Place) -> int:
    """Let a suspended worker go on; the code that it leaves with, by itself."""
    worker.send_signal(signal.SIGCONT)
    process = next(child for child in place.forks.active_children() if child.pid == worker.pid)
    process.join(900)
    assert process.exitcode is not None, "the worker lives on"
    return int(process.exitcode)


# Ray starts a group of workers again under the same attempt; every other place is enough for that.
@pytest.mark.parametrize(
    ("failpoint", "attempt"), [*((point, 2) for point in STOP_POINTS), *((point, 1) for point in STOP_POINTS[::2])]
)
def test_a_worker_that_wakes_up_after_its_time_writes_nothing(
    place: Place, undisturbed: dict[str, Any], tmp_path: Path, failpoint: str, attempt: int
) -> None:
    with suspended(place, tmp_path, failpoint) as worker:
        assert place.train(place.job(tmp_path, attempt=attempt)) == 0
        assert outcome(tmp_path) == undisturbed
        before = snapshot(tmp_path / "students")
        assert end_of(worker, place) == HeldError.code
        assert snapshot(tmp_path / "students") == before


def test_a_woken_worker_disturbs_no_later_one(place: Place, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with suspended(place, tmp_path, "replace.before_rename:7") as early:
        late = place.start(place.job(tmp_path, attempt=2), "cohort.after_batch:20:STOP")
        process = psutil.Process(late.pid)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.02)
        before = snapshot(tmp_path / "students")
        assert end_of(early, place) == HeldError.code
        assert snapshot(tmp_path / "students") == before
        process.send_signal(signal.SIGCONT)
        late.join(900)
        assert late.exitcode == 0
    assert outcome(tmp_path) == undisturbed


def test_an_earlier_attempt_that_comes_late_is_sent_away(
    place: Place, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    assert place.train(place.job(tmp_path, attempt=2), "cohort.after_batch:20") == -signal.SIGKILL
    before = {path: path.read_bytes() for path in (tmp_path / "students").rglob("*.*")}
    with pytest.raises(HeldError, match="taken over by a later worker"):
        train_cohort(place.job(tmp_path, attempt=1))
    assert {path: path.read_bytes() for path in (tmp_path / "students").rglob("*.*")} == before
    assert place.train(place.job(tmp_path, attempt=2)) == 0
    assert outcome(tmp_path) == undisturbed
    finished = snapshot(tmp_path / "students")
    train_cohort(place.job(tmp_path, attempt=1))  # nothing is left to do: nobody is disturbed
    assert snapshot(tmp_path / "students") == finished


# ---- students that fail, each in its own way


GUILTY = """
import torch

class Failing(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("out of luck in the backward pass")

def sparse(parameter):
    parameter.grad = parameter.grad.to_sparse()  # which no optimizer here takes

class Guilty(torch.nn.Module):
    '''Trains for an epoch and a half, then does what it is here for.'''

    def __init__(self, inputs, classes, how):
        super().__init__()
        self.layer, self.how, self.steps = torch.nn.Linear(inputs, classes), how, 0

    def forward(self, x):
        self.steps += self.training
        logits = self.layer(x.flatten(1))
        if self.training and self.steps >= 15:
            if self.how == "forward":
                raise RuntimeError("out of luck in the forward pass")
            if self.how == "backward":
                return Failing.apply(logits)
            if self.how == "optimizer":
                self.layer.bias.register_post_accumulate_grad_hook(sparse)
            if self.how == "memory":
                bytearray(1 << 60)
            if self.how == "tensor":
                torch.empty(1 << 56, device=x.device)
            if self.how == "nan":
                return logits * float("nan")
        if not self.training and self.steps >= 15:
            if self.how == "evaluation":
                raise RuntimeError("out of luck in the evaluation")
            if self.how == "nan in evaluation":
                return logits * float("nan")
        return logits

def guilty(input_shape, classes, how):
    if how == "construction":
        raise RuntimeError("out of luck in the construction")
    return Guilty(input_shape[0] * input_shape[1] * input_shape[2], classes, how)
"""
REASONS = {
    "construction": ("failed", "out of luck in the construction"),
    "forward": ("failed", "RuntimeError: out of luck in the forward pass"),
    "backward": ("failed", "RuntimeError: out of luck in the backward pass"),
    "optimizer": ("failed", "RuntimeError"),
    "evaluation": ("failed", "RuntimeError: out of luck in the evaluation"),
    "memory": ("failed", "MemoryError"),
    "tensor": ("failed", "llocate"),  # "DefaultCPUAllocator: can't allocate", "CUDA out of memory. Tried to allocate"
    "nan": ("diverged", "the loss is nan in epoch 1, step 4"),
    "nan in evaluation": ("diverged", "the validation loss is nan after epoch 1"),
}


def guilty(how: str) -> dict[str, Any]:
    """A student that fails in one of the ways above."""
    model = {"kind": "custom", "factory": "guilty_models:guilty", "arguments": {"how": how}}
    return a_student(how.replace(" ", "-"), batch=BATCH, model=model)


def test_whoever_fails_fails_alone(place: Place, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    (place.root / "guilty_models.py").write_text(GUILTY)
    pairs = itertools.zip_longest(map(guilty, REASONS), FLEET)
    fleet = a_recipe([student for pair in pairs for student in pair if student is not None], folder=str(place.root))
    assert place.train(place.job(tmp_path / "run", fleet)) == 0
    found = outcome(tmp_path / "run")
    for how, (state, reason) in REASONS.items():
        student = tmp_path / "run" / "students" / how.replace(" ", "-")
        result = found[student.name]["result"]
        assert result["state"] == state
        assert reason in result["reason"]
        assert reason.split(": ")[-1] in (tmp_path / "run" / "logs" / f"{student.name}.log").read_text()
        if how != "construction":  # the last good checkpoint: that of the first epoch
            tree = newest_tree(student / "checkpoints")
            assert (tree["epoch"], len(found[student.name]["metrics"])) == (1, 1)
            assert all(torch.isfinite(tensor).all() for tensor in tree["module"].values())
    for spec in place.recipe.students:
        assert place.train(place.job(tmp_path / spec.name, students=(spec,))) == 0
        assert found[spec.name] == outcome(tmp_path / spec.name)[spec.name] == undisturbed[spec.name]


# ---- damage


@pytest.fixture
def halfway(place: Place, tmp_path: Path) -> CohortJob:
    """A run that was killed in its third epoch, with two checkpoints of every student that still trains."""
    job = place.job(tmp_path)
    assert place.train(job, "cohort.after_batch:25") == -signal.SIGKILL
    return job


def test_a_damaged_checkpoint_falls_back_to_the_one_before(halfway: CohortJob) -> None:
    folder, draw = Path(halfway.root) / "long" / "checkpoints", random.Random(0)
    before, newest = checkpoints(folder)
    data, expected = newest.read_bytes(), before.read_bytes()
    bad = [b"", data[:1], data[:-1], *(data[: draw.randrange(len(data))] for _ in range(47))]
    for _ in range(400):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        bad.append(bytes(flipped))
    for content in bad:
        newest.write_bytes(content)
        assert encode(newest_tree(folder)) == expected
        assert checkpoints(folder) == [before]
        newest.with_suffix(".damaged").unlink()
    newest.write_bytes(data)
    assert encode(newest_tree(folder)) == data


def test_a_damaged_checkpoint_costs_an_epoch_and_is_told(
    place: Place, undisturbed: dict[str, Any], halfway: CohortJob
) -> None:
    for name in ("long", "kd"):
        newest = checkpoints(Path(halfway.root) / name / "checkpoints")[-1]
        newest.write_bytes(newest.read_bytes()[:-1])
    console = Console(record=True, file=io.StringIO())
    with telling_damage(halfway, list(place.recipe.students), console):
        assert place.train(halfway) == 0
    run = Path(halfway.root).parent
    assert outcome(run) == undisturbed
    assert "is damaged; falling back to the one before" in (run / "logs" / "long.log").read_text()
    with telling_damage(halfway, list(place.recipe.students), console):
        pass  # it has been told
    told = console.export_text()
    assert "a checkpoint of long was damaged, the one before it was taken" in told
    assert told.count("warning") == 2


def test_without_an_intact_checkpoint_a_student_fails_alone(
    place: Place, undisturbed: dict[str, Any], halfway: CohortJob
) -> None:
    folder, run = Path(halfway.root) / "long" / "checkpoints", Path(halfway.root).parent
    for path in checkpoints(folder):
        path.write_bytes(b"")
    assert place.train(halfway) == 0
    found = outcome(run)
    failed = found.pop("long")["result"]
    assert failed["state"] == "failed"
    assert "2 damaged" in failed["reason"]
    assert "remove that folder to train this student from its start" in failed["reason"]
    assert failed["epochs"] == 2  # of which its metrics are there
    assert found == {name: student for name, student in undisturbed.items() if name != "long"}
    shutil.rmtree(folder)  # as the message says
    assert place.train(replace(halfway, attempt=halfway.attempt + 1)) == 0
    assert outcome(run) == undisturbed


@pytest.mark.parametrize("left", [b"", b'{"state": "do'])
def test_torn_documents_of_a_student_are_written_again(
    place: Place, undisturbed: dict[str, Any], halfway: CohortJob, left: bytes
) -> None:
    root = Path(halfway.root)
    with open(root / "long" / "metrics.jsonl", "ab") as lines:
        lines.write(b'{"epoch": 2, "sta')
    (root / "kd" / "metrics.jsonl").write_bytes(b"")
    assert (root / "hard" / "result.json").exists()
    for name in ("annealing", "hard"):
        (root / name / "result.json").write_bytes(left)
    halfway.progress_file.write_bytes(left)
    assert read_progress(halfway) is None
    assert place.train(halfway) == 0
    assert outcome(root.parent) == undisturbed
    assert read_progress(halfway) is not None
