"""The queue of cohorts: start them where there is room, follow them, retry and split those whose workers die."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace as replaced
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist.base.errors import AkdError
from akd_dist.base.formatting import counted
from akd_dist.distill.delivery import forked_from, write_note
from akd_dist.distill.job import CohortJob, ended, read_progress, stop_attempts
from akd_dist.distill.objectives import stages
from akd_dist.documents.status import CohortStatus, FleetPlan, StudentProgress
from akd_dist.jobs.demand import Demand, never_held
from akd_dist.jobs.executors import Executor, RayExecutor
from akd_dist.jobs.packing import ResourceRequest, next_to_start
from akd_dist.jobs.planning.costs import Cohort, CostModel
from akd_dist.jobs.planning.plan import position
from akd_dist.jobs.planning.planner import cohort_job
from akd_dist.jobs.ray_train import OUT_OF_STEP
from akd_dist.jobs.run_folder import LocalRun
from akd_dist.jobs.shared import GONE_SECONDS, nodes_lost
from akd_dist.jobs.stopping import GRACE_SECONDS, POLL_SECONDS, StopFlag
from akd_dist.jobs.worker import worker_log
from akd_dist.jobs.working_dir import WorkingDir
from akd_dist.recipe import StudentSpec
from akd_dist.storage.mean import Stores, uris_of
from akd_dist.tracking.progress import FleetMeter, tell
from akd_dist.tracking.status import written

# How often a cohort's run may fail. Ray starts the workers of a run again once, so they have died four times by then.
DEATHS_BEFORE_SPLIT = 2


@dataclass(eq=False)
class RunningCohort:
    """A cohort that has been started, and the thread that sees it through."""

    job: CohortJob
    """The job that runs for it now. After a death it is another one, of all of its students or of half of them."""
    ask: ResourceRequest
    """What it occupies."""
    thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.thread is not None and self.thread.is_alive()


class Fleet:
    """The driver's side of a run: its cohorts, their threads and what came of them.

    Args:
        base: what all cohorts have in common.
        costs: what students take, as far as that was measured.
        stop: once it is up, running cohorts checkpoint and return, and no other is started.
        assistant: the stores of the last assistant, for cohorts that learn from it; the base has the teacher's.
        look: called several times a second; what it raises ends the run once the cohorts have checkpointed.
        executor: what the cohorts run on; None for the nodes of the Ray cluster that is connected.
        run: the run, where it is not just a folder.
    """

    def __init__(
        self,
        base: CohortJob,
        costs: CostModel,
        stop: StopFlag,
        console: Console,
        assistant: Stores | None = None,
        *,
        look: Callable[[], None] = lambda: None,
        executor: Executor | None = None,
        run: LocalRun | None = None,
    ) -> None:
        self.run = run or LocalRun(Path(base.root).parent)
        self.base, self.costs, self.stop, self.console = base, costs, stop, console
        self.assistant, self.look = assistant or {}, look
        self.executor = executor or ray_executor(base, self.assistant, console)
        self.waiting: list[Cohort] = []
        self.running: list[RunningCohort] = []
        self.jobs: list[CohortJob] = []
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()
        self.alive_at = time.monotonic()
        self.moved_at = self.alive_at
        self.last_told: list[int] = []
        self.waiting_told = ""

    def train(self, cohorts: list[Cohort]) -> int:
        """Train all cohorts to their end, or until the stop flag.

        Returns:
            The number of cohorts that were begun, those that were begun again among them.

        Raises:
            AkdError: what a cohort was refused for; the others have checkpointed.
            MachineError: a cohort does not fit the nodes that see the run's folders, or the cluster was lost.
        """
        control = Path(self.base.control)
        control.mkdir(parents=True, exist_ok=True)
        # Before the first worker starts: the next command is then another attempt, whose workers can shut these out.
        self.base.attempt_file.touch()
        stop_attempts(control, self.base.attempt - 1)
        self.run.begin(self.base.attempt)
        title = f"training {counted(sum(map(len, cohorts)), 'student')} in {counted(len(cohorts), 'cohort')}"
        self.waiting = list(cohorts)
        with (
            warnings.catch_warnings(action="ignore"),  # deprecations inside Ray Train; it is the whole process's
            self.executor,
            FleetMeter(self.console, control, self._plan(), title, self._is_over) as shown,
            # Innermost, so that what ends the loop finds nodes still watched and the meter still up while cohorts
            # checkpoint.
            self._stopping_on_errors(),
        ):
            if not self.executor.demand.waits:
                for cohort in cohorts:
                    self._check_room_for(cohort)
            self.alive_at = self.moved_at = time.monotonic()  # nodes may have been waited for
            while self._keep_busy():
                self._follow(shown)
                self._wait()
                self.look()
                self.run.check_current()
            self._follow(shown)
        if self.errors:
            raise self.errors[0]
        return len(self.jobs)

    def _is_over(self) -> bool:
        """Whether no cohort is started any more: the user stops, or one was refused."""
        return bool(self.stop or self.errors)

    def _plan(self) -> FleetPlan:
        """The plan that `status` and the live view read: every student of the run, as if none had begun.

        Steps of a stage I that another student computes count there.
        """
        followers = {name for cohort in self.waiting for name in self.costs.leaders(cohort)}
        students = []
        for spec in self.base.students:
            follows = spec.name in followers or spec.name in self.costs.stages1
            follows = follows or forked_from(Path(self.base.root) / spec.name) is not None
            shared, until = stages(spec.objective)[0].epochs if follows else 0, self._until(spec)
            last = spec.objective.epochs if until is None else until
            steps = self.costs.steps_until(spec, last) - self.costs.steps_until(spec, shared)
            students.append(
                StudentProgress(
                    name=spec.name,
                    state="waiting",
                    epochs=spec.objective.epochs,
                    until=until,
                    epochs_shared=shared,
                    steps_total=max(0, steps),
                )
            )
        return FleetPlan(
            attempt=self.base.attempt,
            at=time.time(),
            metric=self.base.data.primary_metric,
            metric_name=self.base.data.metric_name if self.base.data.own_metric else None,
            students=students,
            cohorts=[],
            steps_behind=round(self.base.epochs_behind * self._steps_per_epoch()),
            steps_later=round(self.base.epochs_later * self._steps_per_epoch()),
        )

    def _until(self, spec: StudentSpec) -> int | None:
        """After how many epochs a trial of a search waits; one that goes no further waits where it is."""
        pause = self.base.pauses.get(spec.name)
        if pause is None:
            return None
        epoch, _ = position(Path(self.base.root) / spec.name / "checkpoints") or (0, 0)
        return min(max(pause, epoch), spec.objective.epochs)

    def _steps_per_epoch(self) -> float:
        """Steps of an epoch, the mean over all students: trials of a search may differ in their batches."""
        epochs = sum(spec.objective.epochs for spec in self.base.students)
        return sum(self.costs.steps_until(spec, spec.objective.epochs) for spec in self.base.students) / max(epochs, 1)

    def _not_training(self) -> list[CohortStatus]:
        """The cohorts that wait for room, and those whose workers start."""
        starting = [
            CohortStatus(state="starting", students=[spec.name for spec in one.job.students])
            for one in self.running
            if one.alive and not one.job.progress_file.exists()
        ]
        return starting + [
            CohortStatus(
                state="waiting", students=[spec.name for spec in cohort], waits_for=str(self.costs.ask(cohort))
            )
            for cohort in self.waiting
        ]

    @contextlib.contextmanager
    def _stopping_on_errors(self) -> Iterator[None]:
        """Whatever ends the driver's loop, let running cohorts checkpoint first, as long as they answer."""
        try:
            yield
        except KeyboardInterrupt:
            raise  # the second Ctrl-C, which stops at once
        except BaseException:
            self.base.stop_file.touch()
            with contextlib.suppress(AkdError):
                while any(one.alive for one in self.running):
                    self._watch(stopping=True)
                    time.sleep(POLL_SECONDS)
            raise

    # ---- the queue

    def _keep_busy(self) -> bool:
        """Start the waiting cohorts that there is room for; whether there is still something to wait for."""
        self.running = [one for one in self.running if one.alive]
        if self._is_over():
            self.waiting.clear()
        else:
            if time.monotonic() - self.moved_at > GONE_SECONDS:
                self._check_room()
            self.executor.look()
            self._start_what_fits()
            self._ask_for_room()
        return bool(self.waiting or self.running)

    def _start_what_fits(self) -> None:
        """Start waiting cohorts, the first in line that fits, and so on as long as one does."""
        nodes, free = self.executor.nodes(), self.executor.free()
        while self.waiting:
            asks = [self.costs.ask(cohort) for cohort in self.waiting]
            # Ray may still count as free what cohorts occupy whose workers it has not placed yet.
            unplaced = [one.ask for one in self.running] if self._starting() else []
            chosen = next_to_start(asks, free, nodes, unplaced)
            if chosen is None:
                break
            self._start(self.waiting.pop(chosen), asks[chosen])
        self._tell_who_waits()

    def _ask_for_room(self) -> None:
        """Have the autoscaler, where there is one, see to nodes for what runs and for what waits.

        Raises:
            MachineError: nothing runs, and no node that it may bring holds the first in line.
        """
        if not self.executor.demand.autoscaled:
            return
        running = [self.costs.ask(one.job.students) for one in self.running if one.alive]
        waiting = [self.costs.ask(cohort) for cohort in self.waiting]
        self.executor.ask_for([*waiting, *running])
        if self.executor.demand.refused and waiting and not running:
            raise never_held(waiting[0], f"the cohort of {self.waiting[0][0].name}")

    def _start(self, cohort: Cohort, ask: ResourceRequest) -> None:
        one = RunningCohort(self._new_job(cohort), ask)
        # A daemon, so that a command that is told twice to stop does not wait for Ray to end a run.
        one.thread = threading.Thread(target=self._see_through, args=(one,), daemon=True)
        one.thread.start()
        self.running.append(one)

    def _starting(self) -> bool:
        """Whether there are cohorts whose workers do not train yet."""
        return any(one.alive and not one.job.progress_file.exists() for one in self.running)

    def _tell_who_waits(self) -> None:
        """Say which cohort waits for what: once, and again when that has changed."""
        if self._starting():
            return
        told = ""
        if self.waiting:
            first, others = self.waiting[0], len(self.waiting) - 1
            told = f"{first[0].name} and its cohort wait for {self.costs.ask(first)}"
            told += f"; {counted(others, 'cohort')} behind it" if others else ""
        if told and told != self.waiting_told:
            tell(self.console, told)
        self.waiting_told = told

    def _new_job(self, cohort: Cohort) -> CohortJob:
        # Each cohort has a thread that may begin a job, and the number of jobs is part of a job's name.
        with self.lock:
            # With the attempt, so that nobody takes the progress of an earlier one for that of this job.
            name = f"cohort-{self.base.attempt}-{len(self.jobs)}"
            job = replaced(cohort_job(self.base, cohort, self.assistant), name=name)
            self.jobs.append(job)
        return job

    def _follow(self, shown: FleetMeter) -> None:
        """Show how far all cohorts are, and pass the stop flag on."""
        if self._is_over():
            self.base.stop_file.touch()
        shown.update(self._not_training())
        self._watch(stopping=self._is_over())

    def _wait(self) -> None:
        """Until it is time to look again, or the first cohort of those that run has ended: nobody waits for the rest of
        a poll when the last one has.
        """
        thread = next((one.thread for one in self.running if one.alive), None)
        if thread is None:
            time.sleep(POLL_SECONDS)
        else:
            thread.join(POLL_SECONDS)

    def _watch(self, *, stopping: bool) -> None:
        """Do not wait for ever for a cluster that is gone nor, once stopping, for workers without a sign of life."""
        self.executor.check_alive(self.stop)
        # Over a copy, since the threads of cohorts add jobs meanwhile.
        told = [written(job.progress_file) for job in list(self.jobs)]
        now = time.monotonic()
        self.moved_at = now if told != self.last_told else self.moved_at
        # Patience begins with the stop: before it, an evaluation or a large checkpoint may take as long as it likes.
        if told != self.last_told or not stopping:
            self.alive_at, self.last_told = now, told
        if now - self.alive_at > GRACE_SECONDS:
            if self.errors and not self.stop:
                raise self.errors[0]
            silent = "stopped; the workers did not answer any more, so only earlier checkpoints are kept"
            if not any(one.alive and read_progress(one.job) for one in self.running):
                silent = "stopped while workers were starting; none had begun to train, so nothing is lost"
            raise self.stop.error(silent, "the same command goes on from there")

    def _check_room(self) -> None:
        """Give up if the nodes that are left can never hold a cohort that runs or waits, and no others will join.

        Raises:
            MachineError: there are too few CPUs or GPUs, or too little memory; or every node was left out.
        """
        if self.executor.demand.waits:
            return
        for cohort in [*(one.job.students for one in self.running if one.alive), *self.waiting]:
            try:
                self._check_room_for(cohort)
            except AkdError as error:
                doing = f"{cohort[0].name} and its cohort trained, or waited to"
                raise nodes_lost(doing, f"for {GONE_SECONDS:g} s: {error.line}", error.expected) from error

    def _check_room_for(self, cohort: Cohort) -> None:
        self.executor.check_room(self.costs.ask(cohort), f"the cohort of {cohort[0].name}")

    def _see_through(self, one: RunningCohort) -> None:
        """See a cohort through, off the main thread (on it, Ray would take over Ctrl-C)."""
        try:
            self._train_or_split(one, one.job)
        except BaseException as error:
            self.errors.append(error)

    def _train_or_split(self, one: RunningCohort, job: CohortJob) -> None:
        """Run a cohort; after two deaths cut it in half, until only the guilty student fails."""
        reason = self._fit(one, job)
        for _death in range(DEATHS_BEFORE_SPLIT - 1):
            if not reason or self._is_over():
                return
            tell(self.console, f"the workers of {job.name} died and are started again: {reason}")
            job = self._new_job(job.students)
            reason = self._fit(one, job)
        left = tuple(spec for spec in job.students if not ended(self.base, spec))
        if not reason or self._is_over() or not left:
            return
        if len(left) == 1:
            self._give_up(left[0], job, reason)
            return
        tell(self.console, f"the workers of {job.name} died again: its {len(left)} students go on in two halves")
        # One half after the other, since each asks for as many workers and CPUs as the whole cohort has.
        for half in (left[: len(left) // 2], left[len(left) // 2 :]):
            if self._is_over():
                return
            self._train_or_split(one, self._new_job(half))

    def _fit(self, one: RunningCohort, job: CohortJob) -> str:
        one.job = job
        while not self._is_over():
            reason = self.executor.run(job, self.costs.ask(job.students))
            if reason is not None:
                self.run.bring()
                return reason
        return ""

    def _give_up(self, spec: Any, job: CohortJob, reason: str) -> None:
        hint = "" if reason.startswith(OUT_OF_STEP) else "memory may have run out. "
        told = f"its worker died again and again; {hint}{reason}"
        write_note(self.base.log_of(spec.name), f"failed: {told}\nsee also {worker_log(job, 0)}")
        self.run.give_up(spec, job, told)


def ray_executor(
    base: CohortJob,
    assistant: Stores,
    console: Console,
    demand: Demand | None = None,
    folder: WorkingDir | None = None,
) -> RayExecutor:
    """The nodes that see the run's folder and the stores that its students learn from.

    A store is content under its own name and sealed, so a node may as well have a copy of its own.

    Args:
        demand, folder: as for `Shared`.
    """
    stores = {f"the store {Path(uri).name[:12]}": f"{uri}/manifest.json" for uri in uris_of(base.stores, assistant)}
    folders = {"the run's folder": base.run_uri or base.control}
    return RayExecutor(folders, base.cache_root, lambda text: tell(console, text), stores, demand, folder)
