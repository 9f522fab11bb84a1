"""Runs that are killed or suspended at a named place of the code, in processes forked from one that has imported torch.

Killing in a process of its own is the only honest way; forking makes it cheap, some hundred milliseconds a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from akd_dist.base.errors import AkdError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.distill.ranks import Ranks
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.recipe import Recipe
from tests.fleets import ANNEALING, HARD, KD, a_recipe, a_student, a_teacher, stores_of

# Rows of a batch, so that an epoch of the digits' 1,149 train rows takes nine steps.
BATCH = 128
STEPS = "AKD_TEST_STEPS"
# Where a worker stands still in its second epoch, in batches of that size or of twice as few rows.
SECOND_EPOCH = "cohort.after_batch:12:STOP"
# What a result says of where and when it was computed.
ELSEWHERE = ("seconds", "path", "stage1_from", "attempt")
# Imported by all of them, late; imported before the fork, they cost nothing. There is one such server for all tests, so
# whoever forks takes this context: the list of another one is not looked at once the server has started.
PRELOADED = ["tests.survivors", "torch._inductor", "sklearn.datasets"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)

MODELS = """
import os, torch

class Counted(torch.nn.Module):
    '''Leaves one byte in a file of its own for every training step, also if it is killed in the next moment.'''

    def __init__(self, inputs, classes, name):
        super().__init__()
        self.name = name
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(inputs, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
            torch.nn.Dropout(0.1), torch.nn.Linear(8, classes),
        )

    def forward(self, x):
        if self.training and "AKD_TEST_STEPS" in os.environ:
            with open(os.path.join(os.environ["AKD_TEST_STEPS"], self.name), "ab", buffering=0) as log:
                log.write(b".")
        return self.layers(x)

def counted(input_shape, classes, name):
    return Counted(input_shape[0] * input_shape[1] * input_shape[2], classes, name)
"""


def counted(name: str, **changes: Any) -> dict[str, Any]:
    """A student whose steps are counted."""
    model = {"kind": "custom", "factory": "counted_models:counted", "arguments": {"name": name}}
    return a_student(name, batch=BATCH, model=model, **changes)


FLEET = [
    counted("annealing"),
    counted("annealing-1", seed=1),
    counted("hard", objective=HARD | {"epochs": 2}),
    counted("kd", objective=KD),
    counted("long", objective=ANNEALING | {"stage1_epochs": 3, "stage2_epochs": 2}),
]


class Place:
    """One recipe and its stores, and any number of runs of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache_root = root, root / "cache"
        (root / "counted_models.py").write_text(MODELS)
        self.teacher = a_teacher(a_recipe(FLEET), root / "teacher", self.cache_root)
        self.recipe = a_recipe(FLEET, teacher={"weights": self.teacher}, folder=str(root))
        self.stores = stores_of(self.recipe, self.teacher, root)
        self.forks = FORKS

    def job(self, run: Path, recipe: Recipe | None = None, **changes: Any) -> CohortJob:
        recipe = recipe or self.recipe
        splits = prepare(recipe.data, self.cache_root)
        job = fleet_job(recipe, splits, self.stores, run, str(self.cache_root))
        return replace(job, **({"patience": 0.2} | changes))

    def command(self, name: str, run_root: Path, *more: str, recipe: Recipe | None = None) -> list[str]:
        """Arguments of `akd-dist` for this recipe, its file beside the runs."""
        run_root.mkdir(parents=True, exist_ok=True)
        file = run_root / "recipe.yaml"
        file.write_text((recipe or self.recipe).to_yaml())
        places = {"store": self.root / "stores", "run": run_root, "cache": self.cache_root}
        return [
            name,
            str(file),
            *(part for key, path in places.items() for part in (f"--{key}-root", str(path))),
            *more,
        ]

    def start(self, job: CohortJob, failpoint: str | None = None) -> Any:
        """Train in a process of its own that dies, or is suspended, at a failpoint."""
        process = self.forks.Process(target=train, args=(job, failpoint))
        process.start()
        return process

    def train(self, job: CohortJob, failpoint: str | None = None) -> int | None:
        """The exit code of a process that trains, negative if it was killed."""
        process = self.start(job, failpoint)
        process.join(900)
        code: int | None = process.exitcode
        return code


def train(job: CohortJob, failpoint: str | None) -> None:
    """What a forked process runs; it leaves with the code that a command would."""
    os.environ |= {STEPS: str(steps_folder(job))} | ({"AKD_FAILPOINT": failpoint} if failpoint else {})
    try:
        train_cohort(job)
    except AkdError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


@contextlib.contextmanager
def forked_cohorts() -> Iterator[None]:
    """The cohorts of this process's commands train in forked processes, one worker each, instead of as Ray Train runs.

    For tests that are not about these: Ray Train starts four processes for each, every one of which imports torch. All
    else of a command is as always; teachers and shards are its tasks on Ray.
    """
    from akd_dist.jobs import ray_train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train, "fit", _fit)
        yield


def _fit(job: CohortJob, ask: Any, selector: Mapping[str, str], needed: Any) -> str:
    """What `ray_train.fit` promises: why the worker died, or nothing; what it was refused for is raised."""
    assert (ask.workers, dict(selector)) == (1, {}), "for one worker, on this node"
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_train_cohort, args=(job, needed, there))
    process.start()
    there.close()
    try:
        refusal: BaseException | None = here.recv()
    except EOFError:  # it has died
        refusal = None
    process.join()
    if refusal is not None:
        raise refusal
    return f"exit code {process.exitcode}" if process.exitcode else ""


def _train_cohort(job: CohortJob, needed: Any, outcome: Any) -> None:
    try:
        train_cohort(needed.here(job).on_node(), Ranks())
    except AkdError as error:
        outcome.send(error)
    else:
        outcome.send(None)


def steps_folder(job: CohortJob) -> Path:
    folder = Path(job.root).parent / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def steps_taken(job: CohortJob) -> dict[str, int]:
    """Training steps of each student so far, over all processes."""
    paths = {spec.name: steps_folder(job) / spec.name for spec in job.students}
    return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}


def steps_kept(job: CohortJob, per_epoch: int) -> dict[str, int]:
    """How far each student's newest checkpoint is, in steps."""
    kept = {}
    for spec in job.students:
        found = checkpoints(Path(job.root) / spec.name / "checkpoints")
        epoch, step, _ = map(int, found[-1].stem.split("-")) if found else (0, 0, 0)
        kept[spec.name] = epoch * per_epoch + step
    return kept


def outcome(run: Path) -> dict[str, Any]:
    """What each student of a run came to, without times and places: digests of the weights, metrics, results."""
    found = {}
    for path in sorted(run.glob("students/*/result.json")):
        weights, metrics = path.with_name("model.safetensors"), path.with_name("metrics.jsonl")
        result = json.loads(path.read_bytes())
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        found[path.parent.name] = {
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
            "result": {key: value for key, value in result.items() if key not in ELSEWHERE},
            "metrics": [{key: value for key, value in record.items() if key != "seconds"} for record in records],
        }
    return found


def plant_snapshot(run: Path, content: bytes) -> None:
    """Leave a damaged snapshot of Ray Train, as a driver that was killed may: no later one takes up its run."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    folder = run / "control" / "ray" / "cohort-1-0-4711-0"
    folder.mkdir(parents=True)
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_bytes(content)


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and folder below a folder: inode, time of change and digest."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


# ---- processes that stand still

HELD_MODELS = """
import pathlib, ray, time, torch

class Held(torch.nn.Module):
    '''While a file `hold` lies beside this one: slow in Ray's workers, and from its `at`th call on it does not return.

    Elsewhere it is only tried out, probed, or trained in a plain loop.
    '''

    def __init__(self, inputs, classes, at, pause):
        super().__init__()
        self.layer, self.at, self.pause, self.calls = torch.nn.Linear(inputs, classes), at, pause, 0

    def forward(self, x):
        hold = pathlib.Path(__file__).with_name("hold")
        self.calls += 1
        if ray._private.worker.global_worker.mode == ray.WORKER_MODE and hold.exists():
            time.sleep(self.pause)
            while self.calls >= self.at and hold.exists():
                time.sleep(0.02)
        return self.layer(x.flatten(1))

def held(input_shape, classes, at, pause):
    return Held(input_shape[0] * input_shape[1] * input_shape[2], classes, at, pause)
"""


def a_held_model(at: int, pause: float = 0.02) -> dict[str, Any]:
    """A model of `held_models.py` with that content, beside the recipe."""
    return {"kind": "custom", "factory": "held_models:held", "arguments": {"at": at, "pause": pause}}


def stands_still(process: psutil.Process) -> bool:
    """Whether a process is suspended, as by a failpoint with STOP."""
    return bool(process.status() == psutil.STATUS_STOPPED)


def marked(marker: Path) -> list[psutil.Process]:
    """Living processes that have this AKD_TEST_MARKER in their environment: what a command of a test has started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AKD_TEST_MARKER") == str(marker) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def standing_still(command: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes below a command that are suspended."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(command.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if stands_still(process):
                    found.append(process)
    return found


def until(ready: Callable[[], Any], command: subprocess.Popen[str], errors: Path) -> Any:
    """What `ready` gives once it gives something; a command that ends before, or takes minutes, fails the test."""
    deadline = time.monotonic() + 900
    while not (found := ready()):
        assert command.poll() is None, errors.read_text()
        assert time.monotonic() < deadline, errors.read_text()
        time.sleep(0.2)
    return found
