"""A run in object storage, as its driver has it: a copy in the driver's cache, and what the driver puts.

All that drives a run works in the copy, as in a local run's folder. Beside it a thread brings what the workers tell,
and puts what the driver says of itself and of its plan; at its end the driver puts what the run came to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from akd_dist.base.errors import AkdError, HeldError, MachineError
from akd_dist.distill.delivery import failed_entry
from akd_dist.distill.job import CohortJob
from akd_dist.distill.publisher import PATIENCE_SECONDS
from akd_dist.documents.status import CohortProgress
from akd_dist.jobs.run_folder import LocalRun
from akd_dist.recipe import StudentSpec
from akd_dist.storage.claim import claim_store, holder_of, repeating
from akd_dist.storage.run_copy import DOCUMENTS, REPORTED, RESULTS, RunCopy, scratch
from akd_dist.storage.run_objects import CONTROL, STUDENTS
from akd_dist.tracking.progress import tell
from akd_dist.tracking.status import ENDED, read_document

LOOK_SECONDS = 3.0
"""How often what the workers tell is looked at."""
PUT_SECONDS = 5.0
"""The least time between two puts of what the driver tells."""
TOLD = (f"{CONTROL}/driver.json", f"{CONTROL}/plan.json", "trackers.json")
"""What the driver tells while it works."""


def copy_of(uri: str, cache_root: str | Path) -> RunCopy:
    """The driver's copy of a run, as far as it is known; it is brought up to date by `refresh`."""
    return RunCopy(uri, scratch(cache_root, uri, "driver"))


class RemoteRun(LocalRun):
    """The driver's side of a run in object storage: it works in a copy, whose documents it puts.

    Args:
        uri: the run.
        cache_root: where its copy lies.
    """

    def __init__(self, uri: str, cache_root: str | Path) -> None:
        self.copy = copy_of(uri, cache_root)
        super().__init__(self.copy.folder)
        self.uri, self.objects = self.copy.uri, self.copy.run
        self.attempt: int | None = None
        """The attempt that this driver has begun."""
        self._put: dict[str, bytes] = {}
        self._stopped: set[int] = set()
        self._told_at = self._looked_at = float("-inf")
        self._later: int | None = None

    @property
    def local(self) -> None:
        """It is none, and cannot be moved."""

    @property
    def names(self) -> dict[str, str]:
        """The copy goes by the name of the run."""
        return {str(self.folder): self.copy.uri}

    def check(self) -> None:
        """Refuse a place where nothing could be written, or nothing be created only once; before anything expensive.

        Raises:
            MachineError: so it is.
        """
        self.objects.root.check_writable()

    @contextlib.contextmanager
    def held(self, *, wait: bool, console: Console, only_look: bool = False) -> Iterator[None]:
        """Hold the run against other drivers, and its copy against those of this node; bring it up to date.

        A holder of whom nothing has been heard for a minute is taken for dead. Until then it is waited for; it is
        refused once it is seen to live.

        Args:
            wait: wait for a holder that lives, too.
            only_look: refuse what is held, and hold nothing.

        Raises:
            HeldError: somebody else drives the run.
            MachineError: the storage cannot be read or written.
            DamagedError: what lies there says of attempts what cannot be.
        """
        root = self.objects.root
        with contextlib.ExitStack() as holding:
            holding.enter_context(super().held(wait=wait, console=console, only_look=only_look))
            if not only_look:
                told = functools.partial(tell, console)
                holding.enter_context(claim_store(root.parent.uri, root.name, wait=wait, watch=True, on_wait=told))
            elif not wait and (holder := holder_of(root.parent.uri, root.name)) is not None:
                raise HeldError(
                    f"the run {self.uri} is held by someone else",
                    got=holder,
                    expected="nobody holding it",
                    next="wait for it, or stop that process; one that is dead is taken over by the command itself",
                )
            self.copy.refresh(heads=True)
            self.copy.control.check(root)
            yield

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """For the time of a block, bring what the workers tell, and put what the driver tells; the last of it at its
        end.
        """
        try:
            with repeating(self._look, LOOK_SECONDS / 3, "remote-run"):
                yield
        finally:
            with contextlib.suppress(AkdError, OSError):
                self._tell(now=True)

    def begin(self, attempt: int) -> None:
        """Begin an attempt before its first worker starts; those of earlier ones are told to leave.

        Raises:
            HeldError: another driver has begun it.
        """
        self.objects.begin_attempt(attempt)
        self.attempt = attempt
        with contextlib.suppress(AkdError):
            self._tell(now=True)

    def check_current(self) -> None:
        """Leave if another driver has gone on with the run.

        Raises:
            HeldError: it has.
        """
        if self._later is not None:
            raise HeldError(
                f"the run {self.uri} was taken on by another command",
                got=f"attempt {self._later} has begun",
                expected="one command at a time",
                next="let that one go on",
            )

    def bring(self) -> None:
        """Bring which students have ended, and what they left.

        Raises:
            MachineError: the storage cannot be read.
        """
        self._patiently(lambda: self.copy.refresh(REPORTED, documents=(), driver=False))

    def give_up(self, spec: StudentSpec, job: CohortJob, reason: str) -> None:
        """End a student as failed whose workers die again and again: whoever of them lives on counts no more."""
        since = self.copy.control.since
        writer = self.objects.take_over([spec.name], job.attempt, since)[spec.name]
        self.bring()
        result = failed_entry(spec, reason, self.folder / STUDENTS / spec.name, job.attempt)
        self.objects.put(spec.name, writer, "result.json", json.dumps(result, indent=1).encode())
        self.bring()

    def publish(self) -> None:
        """Put the driver's documents that have changed; the one that says which run it is comes last.

        Raises:
            HeldError: another driver has gone on with the run.
            MachineError: the storage cannot be written.
        """
        if self.attempt is not None and (last := self.objects.control().last) > self.attempt:
            self._later = last
        self.check_current()
        for name in DOCUMENTS:
            self._patiently(functools.partial(self._put_file, name))

    def withdraw(self, name: str) -> None:
        """Remove one of the driver's documents, which holds no longer."""
        self._put.pop(name, None)
        self.objects.root.delete(name)

    def start_over(self) -> None:
        """Have nothing count of what lies there and here, and remove it."""
        super().start_over()
        self.objects.start_over(DOCUMENTS)
        self._put.clear()
        shutil.rmtree(self.folder / STUDENTS, ignore_errors=True)

    # ---- on the thread

    def _look(self) -> None:
        now = time.monotonic()
        self._tell()
        if self.attempt is None or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        self.copy.refresh_control(driver=False)
        if self.copy.control.last > self.attempt:
            self._later = self.copy.control.last
        if self._ended_unseen():
            self.copy.refresh(RESULTS, documents=(), driver=False)

    def _ended_unseen(self) -> bool:
        """Whether cohorts tell of students that have ended, and whose results are not here."""
        for path in (self.folder / CONTROL).glob(f"progress-cohort-{self.attempt}-*.json"):
            for student in getattr(read_document(path, CohortProgress), "students", ()):
                result = self.folder / STUDENTS / student.name / "result.json"
                if student.state in ENDED and not result.exists():
                    return True
        return False

    def _tell(self, *, now: bool = False) -> None:
        """Pass on that the workers are to stop; and, every few seconds, what the driver says of itself."""
        control = self.folder / CONTROL
        attempt = self.attempt
        if attempt is not None and attempt not in self._stopped and (control / f"stop-{attempt}").exists():
            self.objects.stop(attempt)
            self._stopped.add(attempt)
        if now or time.monotonic() - self._told_at >= PUT_SECONDS:
            self._told_at = time.monotonic()
            for name in TOLD:
                self._put_file(name)

    def _put_file(self, path: str) -> None:
        """Put a file of the copy, where it is there and has changed since."""
        with contextlib.suppress(FileNotFoundError):
            data = (self.folder / path).read_bytes()
            if self._put.get(path) != data:
                self.objects.root.put(path, data)
                self._put[path] = data

    def _patiently(self, act: Callable[[], None]) -> None:
        """Bear with storage that is out of reach, as long as the workers do."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return act()
            except MachineError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)
