"""Run cohorts: each as one Ray Train run, where there is room; follow them, retry and split what died."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist.cohort import CohortJob, ended, read_progress, stop_attempts, train_cohort
from akd_dist.device import gpus_of
from akd_dist.documents import CohortProgress, CohortStatus, FleetPlan, StudentProgress
from akd_dist.jobs import cluster
from akd_dist.jobs.planner import Cohort, cohort_job, cpus_of
from akd_dist.jobs.progress import FleetMeter, tell
from akd_dist.jobs.train_teacher import Stores
from akd_dist.storage.errors import AkdError, MachineError
from akd_dist.storage.fence import take_over
from akd_dist.student import Group, OutOfStepError, entry, write_note

DEATHS_BEFORE_SPLIT = 2
# How long stopped cohorts may take to checkpoint without a sign of life, before the cluster counts as lost.
GRACE_SECONDS = 30.0
# How long Ray may look for room for workers whose node died, before the nodes count as gone; it would look for ever.
GONE_SECONDS = 60.0


class Fleet:
    """The driver's side of a run: its cohorts, their threads and what came of them.

    Args:
        base: what all cohorts have in common.
        rows: train rows, from which the number of steps follows.
        stop: once it is up, running cohorts checkpoint and return, and no other is started.
        assistant: the stores of the last assistant, for cohorts that learn from it; the base has the teacher's.
    """

    def __init__(
        self, base: CohortJob, rows: int, stop: cluster.StopFlag, console: Console, assistant: Stores | None = None
    ) -> None:
        self.base, self.rows, self.stop, self.console, self.assistant = base, rows, stop, console, assistant or {}
        self.waiting: list[Cohort] = []
        self.jobs: list[CohortJob] = []
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()
        self.alive_at = time.monotonic()
        self.moved_at = self.alive_at
        self.last_told: list[CohortProgress] = []
        self.running: list[CohortJob] = []

    def train(self, cohorts: list[Cohort]) -> int:
        """Train all cohorts to their end, or until the stop flag.

        Returns:
            The number of Ray Train runs that it took.

        Raises:
            AkdError: what a cohort was refused for; the others have checkpointed.
            MachineError: a cohort does not fit the cluster, or the cluster was lost.
        """
        for cohort in cohorts:
            cluster.check_fits(cpus_of(cohort), f"the cohort of {cohort[0].name}", gpus=self._gpus(cohort))
        self._begin_attempt()
        students = [spec for cohort in cohorts for spec in cohort]
        title = f"training {_counted(len(students), 'student')} in {_counted(len(cohorts), 'cohort')}"
        control = Path(self.base.control)
        with FleetMeter(self.console, control, self._plan(), title) as shown, self._stopping_on_errors():
            self.waiting = list(cohorts)
            while self.waiting:
                self._start_when_free(self.waiting[0], shown)
            while any(thread.is_alive() for thread in self.threads):
                self._follow(shown)
            self._follow(shown)
        if self.errors:
            raise self.errors[0]
        return len(self.jobs)

    def _plan(self) -> FleetPlan:
        """What there is to do, for those who watch: every student of the run, as if none had begun."""
        students = [
            StudentProgress(
                name=spec.name,
                state="waiting",
                epochs=spec.objective.epochs,
                steps_total=spec.objective.epochs * math.ceil(self.rows / spec.batch),
            )
            for spec in self.base.students
        ]
        metric = self.base.data.primary_metric
        return FleetPlan(attempt=self.base.attempt, at=time.time(), metric=metric, students=students, cohorts=[])

    def _not_training(self) -> list[CohortStatus]:
        """The cohorts that wait for room, and those whose workers start."""
        starting = [
            CohortStatus(state="starting", students=[spec.name for spec in job.students])
            for job in list(self.running)
            if not job.progress_file.exists()
        ]
        return starting + [
            CohortStatus(state="waiting", students=[spec.name for spec in cohort], waits_for=self._wants(cohort))
            for cohort in self.waiting
        ]

    def _wants(self, cohort: Cohort) -> str:
        gpus = self._gpus(cohort)
        return f"{cpus_of(cohort)} free CPUs" + (f" and {gpus} free GPUs" if gpus else "")

    def _begin_attempt(self) -> None:
        control = Path(self.base.control)
        (control / f"attempt-{self.base.attempt}").touch()
        stop_attempts(control, self.base.attempt - 1)

    @contextlib.contextmanager
    def _stopping_on_errors(self) -> Iterator[None]:
        """Whatever ends the driver's loop, let running cohorts checkpoint first, as long as they answer."""
        try:
            yield
        except BaseException:
            self.base.stop_file.touch()
            with contextlib.suppress(AkdError):
                while any(thread.is_alive() for thread in self.threads):
                    self._watch(stopping=True)
                    time.sleep(cluster.POLL_SECONDS)
            raise

    def _start_when_free(self, cohort: Cohort, shown: FleetMeter) -> None:
        """Start a cohort once the cluster has room for it; not after a stop or an error."""
        told, cpus, gpus = False, cpus_of(cohort), self._gpus(cohort)
        while not self.stop and not self.errors and not cluster.are_free(cpus, gpus):
            if not told:
                tell(self.console, f"{cohort[0].name} and its cohort wait for {self._wants(cohort)}")
                told = True
            self._follow(shown)
        self.waiting.pop(0)
        if self.stop or self.errors:
            return
        job = self._new_job(cohort)
        thread = threading.Thread(target=self._carry, args=(job,), daemon=True)
        thread.start()
        self.threads.append(thread)
        # Until it trains its CPUs still count as free, and the next one would be started into them.
        while thread.is_alive() and read_progress(job) is None:
            self._follow(shown)

    def _gpus(self, cohort: Cohort) -> int:
        """GPUs that a cohort occupies: one a worker."""
        return cohort[0].workers * gpus_of(self.base.device)

    def _new_job(self, cohort: Cohort) -> CohortJob:
        with self.lock:
            name = f"cohort-{self.base.attempt}-{len(self.jobs)}"
            job = replaced(cohort_job(self.base, cohort, self.assistant), name=name)
            self.jobs.append(job)
        return job

    def _follow(self, shown: FleetMeter) -> None:
        """Show how far all cohorts are, and pass the stop flag on."""
        if self.stop or self.errors:
            self.base.stop_file.touch()
        shown.update(self._not_training())
        self._watch(stopping=bool(self.stop or self.errors))
        time.sleep(cluster.POLL_SECONDS)

    def _watch(self, *, stopping: bool) -> None:
        """Do not wait for ever for a cluster that is gone nor, once stopping, for workers without a sign of life."""
        cluster.check_alive(self.stop)
        told = [progress for job in list(self.jobs) if (progress := read_progress(job))]
        now = time.monotonic()
        self.moved_at = now if told != self.last_told else self.moved_at
        if now - self.moved_at > GONE_SECONDS:
            self._check_room()
        if told != self.last_told or not stopping:
            self.alive_at, self.last_told = now, told
        if time.monotonic() - self.alive_at > GRACE_SECONDS:
            if self.errors and not self.stop:
                raise self.errors[0]
            raise self.stop.error(
                "stopped; the workers did not answer any more, so only earlier checkpoints are kept",
                "the same command goes on from there",
            )

    def _check_room(self) -> None:
        """Give up if the nodes that are left can never hold a cohort that was running.

        Raises:
            MachineError: there are too few CPUs or GPUs.
        """
        for job in list(self.running):
            try:
                cluster.check_fits(cpus_of(job.students), "what was training", gpus=self._gpus(job.students))
            except MachineError as error:
                raise MachineError(
                    f"nodes were lost while {job.students[0].name} and its cohort trained",
                    got=f"{error.got}, for {GONE_SECONDS:g} s",
                    expected=error.expected,
                    next="bring the nodes back; the same command goes on from the last checkpoints",
                ) from error

    def _carry(self, job: CohortJob) -> None:
        """See a cohort through, off the main thread (on it, Ray would take over Ctrl-C)."""
        try:
            self._train_or_split(job)
        except cluster.ray.exceptions.RayError as error:
            lost = MachineError(
                "the Ray cluster was lost while students trained",
                got=" ".join(str(error).split())[:300],
                expected="a cluster that stays up",
                next="the same command goes on from the last checkpoints",
            )
            self.errors.append(lost)
        except BaseException as error:
            self.errors.append(error)

    def _train_or_split(self, job: CohortJob) -> None:
        """Run a cohort; after two deaths cut it in half, until only the guilty student fails."""
        reason = self._fit(job)
        for _death in range(DEATHS_BEFORE_SPLIT - 1):
            if not reason or self.stop:
                return
            tell(self.console, f"the workers of {job.name} died and are started again: {reason}")
            job = self._new_job(job.students)
            reason = self._fit(job)
        left = tuple(spec for spec in job.students if not ended(self.base, spec))
        if not reason or self.stop or not left:
            return
        if len(left) == 1:
            self._give_up(left[0], job, reason)
            return
        tell(self.console, f"the workers of {job.name} died again: its {len(left)} students go on in two halves")
        for half in (left[: len(left) // 2], left[len(left) // 2 :]):
            if self.stop:
                return
            self._train_or_split(self._new_job(half))

    def _fit(self, job: CohortJob) -> str:
        self.running.append(job)
        try:
            return fit(job)
        finally:
            self.running.remove(job)

    def _give_up(self, spec: Any, job: CohortJob, reason: str) -> None:
        folder = Path(self.base.root) / spec.name
        told = f"its worker died again and again; memory may have run out. Ray says: {reason}"
        write_note(Path(self.base.logs) / f"{spec.name}.log", f"failed: {told}\nsee also {worker_log(job, 0)}")
        writer = take_over(folder / "checkpoints", job.attempt, f"the student {spec.name}")
        writer.replace(folder / "result.json", json.dumps(entry(spec, "failed", told, folder), indent=1).encode())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def fit(job: CohortJob) -> str:
    """Run a cohort as one Ray Train run.

    Returns:
        Why its workers died; nothing if it came to its end.

    Raises:
        AkdError: what a worker was refused for.
    """
    ray = cluster.ray
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside Ray Train
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        storage = (Path(job.control) / "ray").absolute()
        name = f"{job.name}-{os.getpid()}-{time.time_ns()}"  # an old name would resume an old run's state
        spec = job.students[0]
        trainer = TorchTrainer(
            run_worker,  # type: ignore[arg-type]  # what it returns is the run's return value
            train_loop_config={"job": job},
            # With a GPU for each worker, Ray Train makes it torch's current one and lets the workers talk by NCCL.
            scaling_config=ScalingConfig(
                num_workers=spec.workers,
                use_gpu=bool(gpus_of(job.device)),
                resources_per_worker={"CPU": spec.threads},
            ),
            run_config=RunConfig(name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=1)),
        )
        try:
            outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except ray.train.TrainingFailedError as error:
            outcome = _refusal_among(getattr(error, "worker_failures", {}).values())
            if outcome is None:
                return _cause(" ".join(str(error).split())) or type(error).__name__
        finally:
            shutil.rmtree(storage / name, ignore_errors=True)
    if isinstance(outcome, AkdError):
        raise outcome
    return ""


def _cause(text: str) -> str:
    """The part of Ray's account of a death that says why: what its own exception says, or else the end of the trace."""
    start = text.find("ray.exceptions.")
    return text[start : start + 400] if start >= 0 else text[-400:]


def _refusal_among(failures: Any) -> AkdError | None:
    """The refusal that a worker raised, however Ray wrapped it."""
    for failure in failures:
        cause: Any = failure
        while cause is not None:
            if isinstance(cause, AkdError):
                return cause
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
    return None


def run_worker(config: dict[str, Any]) -> dict[str, Any] | AkdError:
    """What a Ray Train worker runs.

    A refusal is returned, not raised: running it again would change nothing. Where there are other ranks it is raised,
    so that Ray ends them too and none waits for this one.
    """
    context = cluster.ray.train.get_context()
    job = config["job"]
    group = Group(context.get_world_rank(), context.get_world_size(), job.device)
    log = worker_log(job, group.rank)
    keep_log(log)
    try:
        return train_cohort(job, group)
    except AkdError as error:
        write_note(log, str(error))
        refusal = error
    except OutOfStepError as error:
        write_note(log, "".join(traceback.format_exception(error)))
        raise  # counts as a death of the workers: they start again, and the guilty student is found
    except Exception as error:
        write_note(log, "".join(traceback.format_exception(error)))
        refusal = AkdError(
            "a training worker failed in a way that akd-dist did not foresee; this is a bug in it",
            got=f"{type(error).__name__}: {error}",
            next=f"report it with the log {log}; the same command goes on from the last checkpoints",
        )
    if group.world > 1:
        raise refusal
    return refusal


def worker_log(job: CohortJob, rank: int) -> Path:
    """Where a worker's warnings and crashes are told."""
    return Path(job.logs) / f"{job.name}.rank{rank}.log"


def keep_log(path: Path) -> None:
    """Send this worker's warnings, and its stack if it crashes, to a file that stays with the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  # faulthandler writes to it until the process ends
    faulthandler.enable(file)
    logging.getLogger("akd_dist").addHandler(logging.StreamHandler(file))
