"""Tasks as calls in processes of this machine, where there is no cluster: Ray would take longer to start than they do.

What they raise comes back as it is, and what kills them is named, as for Ray tasks; `tasks.run_tasks` and `run_one`
come here by themselves.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.jobs import cluster
from akd_dist.jobs.idle import IdleWorkers, how_it_ended
from akd_dist.jobs.packing import ResourceRequest, check_room
from akd_dist.jobs.stopping import GRACE_SECONDS, POLL_SECONDS, StopFlag
from akd_dist.jobs.this_machine import ThisMachine

# As often as Ray would by itself; said here because a message tells of it.
RETRIES = 3
# The answer of a thread that has nothing left to do.
_LEFT = object()


class Call(Protocol):
    """A task, as `tasks.Task`."""

    @property
    def name(self) -> str:
        """Names it in messages."""

    @property
    def job(self) -> Any:
        """What it has in common with others."""

    @property
    def item(self) -> Any:
        """What it is about."""


class LocalTasks(ThisMachine):
    """Tasks in workers of this machine, which are given back when nothing is left to do.

    Args:
        idle: its workers.
    """

    def __init__(self, idle: IdleWorkers) -> None:
        super().__init__(cluster.this_machine(), idle)

    def run_tasks(
        self,
        function: Callable[[Any, Any], Any],
        tasks: Iterable[Any],
        at_once: int,
        threads: int,
        stop: StopFlag,
        on_result: Callable[[Any, Any], None],
    ) -> None:
        """As `tasks.run_tasks`; so many at a time. Results are handed on by the thread that calls this."""
        check_room(self.nodes(), ResourceRequest(1, threads), "tasks of so many threads")
        waiting, lock = iter(tasks), threading.Lock()
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

        def next_task() -> Any:
            with lock:
                return None if stop else next(waiting, None)

        def work() -> None:
            # Only who has something to do starts a worker: there may be many CPUs, and few tasks.
            if (task := next_task()) is None:
                return
            with self._worker() as ask:
                while task is not None:
                    answers.put((task, ask(task.name, function, task.job, task.item)))
                    task = next_task()

        threads_of_workers = [threading.Thread(target=_telling, args=(work, answers)) for _ in range(at_once)]
        for one in threads_of_workers:
            one.daemon = True  # a command that is told twice to stop waits for nobody
            one.start()
        left = 0
        while left < at_once:
            with contextlib.suppress(queue.Empty):
                task, result = answers.get(timeout=POLL_SECONDS)
                if isinstance(result, BaseException):
                    raise result
                if result is _LEFT:
                    left += 1
                else:
                    on_result(task, result)
            if stop:
                return

    def run_one(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        threads: int,
        stop: StopFlag,
        on_poll: Callable[[], None],
        name: str,
    ) -> Any:
        """As `tasks.run_one`."""
        check_room(self.nodes(), ResourceRequest(1, threads), name)
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

        def work() -> None:
            with self._worker() as ask:
                answers.put((None, ask(name, function, *arguments)))

        threading.Thread(target=_telling, args=(work, answers), daemon=True).start()
        going_at = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                _, result = answers.get(timeout=POLL_SECONDS)
                if isinstance(result, BaseException):
                    raise result
                return result
            on_poll()
            going_at = going_at if stop else time.monotonic()
            if time.monotonic() - going_at > GRACE_SECONDS:
                raise unanswered(name, stop)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Callable[..., Any]]:
        """A function that is called as (name, function, *arguments), for one thread; its worker may be another one
        after each death.
        """
        worker = self.take()

        def ask(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal worker
            for _ in range(1 + RETRIES):
                answer = worker.ask("call", (function, arguments))
                if answer is not None:
                    kind, result = answer
                    if kind == "raised":
                        raise raised(name, result)
                    if kind == "refused":
                        raise result
                    return result
                self.drop(worker)
                code = worker.end()
                worker = self.take()
            raise died(name, how_it_ended(code))

        try:
            yield ask
        finally:
            self.drop(worker)
            self.idle.give_back(worker)


def _telling(work: Callable[[], None], answers: queue.Queue[tuple[Any, Any]]) -> None:
    """Do something on a thread, and tell whoever waits for its answers of an error instead, and that it is over."""
    try:
        work()
    except BaseException as error:
        answers.put((None, error))
    finally:
        answers.put((None, _LEFT))


def raised(name: str, told: str) -> RefusedError:
    """The error of a task that raised something other than a refusal, as a user's own model may."""
    return RefusedError(
        f"{name}: computing this raised an error",
        got=told,
        expected="code that runs",
        next="mend it, then run the same command again: what is done is kept",
    )


def died(name: str, told: str) -> MachineError:
    """The error of a task whose workers died."""
    return MachineError(
        f"{name}: its worker died again and again",
        got=told,
        expected=f"a worker that survives, within {RETRIES} retries",
        next="see whether memory ran out; the same command carries on with what is missing",
    )


def unanswered(name: str, stop: StopFlag) -> BaseException:
    """The error of a task that was to stop, and gave no sign of it."""
    return stop.error(
        f"stopped; {name} did not answer any more, so only earlier checkpoints are kept",
        "the same command goes on from there",
    )
