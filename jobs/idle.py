"""Workers of this machine that wait for something to do: started early, since importing torch takes them seconds.

Importing this module takes no time, so that a command can begin a worker before it imports what it needs itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any, Literal, Self

from akd_dist.base.errors import AkdError, MachineError

if TYPE_CHECKING:
    from akd_dist.options import RecipeOptions
    from akd_dist.recipe import Recipe

Asked = Literal["probe", "call", "train"]
"""What a worker can be asked to do: `probe` a student or `call` a function, any number of times; or `train` a cohort,
after which it ends.
"""
STUDENTS_OF_ONE = 60
"""From so many students on, a second cohort is likely to pay on a machine with two CPUs."""
DYING_SECONDS = 5.0
"""How long a worker that hung up may take to end by itself: only then is it known what it died of."""


def begin_process(module: str, *arguments: str, **how: Any) -> subprocess.Popen[Any]:
    """Start a module of ours as a process that finds the modules which this one finds.

    Args:
        how: further arguments of `subprocess.Popen`.

    Raises:
        MachineError: this machine starts no more processes.
    """
    # Python's own search skips entries that are no strings, too.
    path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],  # -P: only this process's own path counts
            env=os.environ | {"PYTHONPATH": path},
            **how,
        )
    except OSError as error:
        raise MachineError(
            "a process to work in could not be started",
            got=str(error),
            expected="a machine that starts some more processes",
            next="end what is not needed, or raise the limits of processes (ulimit -u), open files (ulimit -n) or "
            "memory; the same command goes on from what is done",
        ) from None


class Worker:
    """A process of this machine that answers with what came of what it is asked.

    It is a session of its own: a terminal's Ctrl-C is for the driver alone. It leaves when the driver does.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            self.connection, questions = Pipe()
            ours.callback(self.connection.close)
            theirs.callback(questions.close)
            # Nothing is ever written there: the worker sees it end when this process is gone, however it went.
            life, self.life = os.pipe()
            ours.callback(os.close, self.life)
            theirs.callback(os.close, life)
            self.process = begin_process(
                "akd_dist.jobs.worker",
                *(str(questions.fileno()), str(life)),
                pass_fds=[questions.fileno(), life],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # warnings and stacks go to the worker's log
                start_new_session=True,
            )
            ours.pop_all()  # kept as long as the worker is

    def ask(self, kind: Asked, content: Any) -> Any:
        """What it answers; None if it has died."""
        try:
            self.connection.send((kind, content))
            return self.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DYING_SECONDS)
            return None

    def kill(self) -> None:
        """End it, and what a model of the user's own has forked there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """End it, whatever it does; the code that it ended with."""
        self.kill()
        code = self.process.wait()
        if not self.connection.closed:
            self.connection.close()
            os.close(self.life)
        return code


class IdleWorkers:
    """Workers that wait, started before it is known what for. Use it as a context."""

    def __init__(self) -> None:
        self.waiting: deque[Worker] = deque()
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        self.closed = True
        self.let_go()

    def let_go(self) -> None:
        """End those that wait: what is left to do is done elsewhere."""
        while self.waiting:
            self.waiting.popleft().end()

    def begin(self, count: int = 1) -> None:
        """See that so many wait, or none if that many cannot be started."""
        try:
            while len(self.waiting) < count:
                self.waiting.append(Worker())
        except AkdError:
            self.let_go()
            raise

    def give_back(self, worker: Worker) -> None:
        """Have one wait again, if it lives."""
        if worker.process.poll() is None and not self.closed:
            self.waiting.append(worker)
        else:
            worker.end()

    def take(self) -> Worker:
        """One of them that lives; a new one if none waits."""
        with contextlib.suppress(IndexError):  # not asked before: several threads take one at a time
            while True:
                worker = self.waiting.popleft()
                if worker.process.poll() is None:
                    return worker
                worker.end()
        return Worker()


def how_it_ended(code: int) -> str:
    """The end of a process, for people."""
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""
    return f"its process ended with code {code}{name}"


def may_work_here(device: str, address: str | None) -> bool:
    """Whether work may be done by processes of this machine: it is alone, without a Ray that is up, and needs no GPU,
    of which Ray gives each worker its own.
    """
    ray = sys.modules.get("ray")
    return address is None and not (ray is not None and ray.is_initialized()) and device == "cpu"


def may_train_here(recipe: Recipe, address: str | None) -> bool:
    """The same of training, for which each student has to do with one worker."""
    return may_work_here(recipe.device, address) and all(spec.workers == 1 for spec in recipe.students)


def begun_for(recipe: Recipe, options: RecipeOptions) -> IdleWorkers:
    """Workers that a command is likely to need, begun now: one for each cohort that may pay; none where Ray runs."""
    idle = IdleWorkers()
    if not options.dry_run and may_work_here(recipe.device, options.address):
        idle.begin(min(len(os.sched_getaffinity(0)), 1 + len(recipe.students) // STUDENTS_OF_ONE))
    return idle
