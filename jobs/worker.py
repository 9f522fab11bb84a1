"""What a worker of a cohort does, whoever started it: Ray Train, or this machine's driver as a process of its own.

The process knows nothing of Ray, so that it starts quickly. `idle.Worker` is its other end:

    python -m akd_dist.jobs.worker QUESTIONS LIFE      (file descriptors)
"""

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from akd_dist.base.errors import AkdError
from akd_dist.base.files import write_error
from akd_dist.base.tracebacks import in_full
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.delivery import write_note
from akd_dist.distill.job import CohortJob
from akd_dist.distill.publisher import publishing_logs
from akd_dist.distill.ranks import OutOfStepError, Ranks
from akd_dist.distill.teacher import load_teacher
from akd_dist.jobs.planning.probing import answer_here

IMPORTING = 50_000
"""So many objects more before garbage is looked for: importing makes many, and none is garbage."""


def work(job: CohortJob, rank: int, joining: contextlib.AbstractContextManager[Ranks]) -> dict[str, Any] | AkdError:
    """Train a cohort as one of its workers.

    Args:
        joining: this worker and the others of its cohort, for the time of a block.

    Returns:
        As `train_cohort`; or a refusal, which is not raised: running the job again would change nothing.

    Raises:
        OutOfStepError: the workers have to start again.
    """
    with publishing_logs(job, rank):
        log = worker_log(job, rank)
        try:
            keep_log(log)
            with joining as ranks:
                return train_cohort(job, ranks)
        except AkdError as error:
            _note(log, str(error))
            return error
        except OutOfStepError as error:
            _note(log, "".join(traceback.format_exception(error)))
            raise  # counts as a death of the workers: they start again, and the guilty student is found
        except Exception as error:
            _note(log, "".join(traceback.format_exception(error)))
            return AkdError(
                "a training worker failed in a way that akd-dist did not foresee; this is a bug in it",
                got=f"{type(error).__name__}: {error}",
                next=f"report it with the log {log}; the same command goes on from the last checkpoints",
            )


def _note(log: Path, text: str) -> None:
    """As `write_note`, where there is room: on a full disk the driver still is told what went wrong first."""
    with contextlib.suppress(AkdError):
        write_note(log, text)


def worker_log(job: CohortJob, rank: int) -> Path:
    """Where a worker's warnings and crashes are told."""
    return Path(job.logs) / f"{job.name}.rank{rank}.log"


def keep_log(path: Path) -> None:
    """Send this worker's warnings, and its stack if it crashes, to a file that stays with the run.

    Raises:
        MachineError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115  # faulthandler writes to it until the process ends
    except OSError as error:
        raise write_error(error, path, 1) from error
    faulthandler.enable(file)
    logging.getLogger("akd_dist").addHandler(logging.StreamHandler(file))


# ---- a process of its own


def main() -> None:
    """Answer the driver's questions, see `idle.Worker`; leave once a cohort is trained, or when the driver leaves."""
    gc.set_threshold(IMPORTING)
    driver, life = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_leave_with_driver, args=(life,), daemon=True).start()
    # The driver alone decides: a service manager sends SIGTERM to everybody, and a terminal SIGINT. By a function and
    # not SIG_IGN, which programs that a user's code starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _keep_to_itself(driver.fileno(), life)
    with contextlib.suppress(OSError):  # not on Linux
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this process that goes
    kind = ""
    with contextlib.suppress(EOFError, OSError):
        while kind != "train":
            kind, content = driver.recv()
            driver.send(_ANSWERS[kind](content))
    os._exit(0)  # all is written; the modules of torch would take a while to go


def _keep_to_itself(*descriptors: int) -> None:
    """See that processes which a user's code starts here have none of these descriptors: while one of them held the
    connection, the driver would wait for this worker even after it had died. And let such processes be ended by
    signals, as `multiprocessing` ends its own.
    """

    told = {signal.SIGINT, signal.SIGTERM}

    def part() -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        for number in told:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, told)

    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    # A signal that comes before the child has set its handlers waits until it has.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, told),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, told),
        after_in_child=part,
    )


def _trained(job: CohortJob) -> Any:
    load_teacher.cache_clear()  # of what was cached before: its memory is for the students now
    return work(job.on_node(), 0, contextlib.nullcontext(Ranks()))


def _called(content: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
    """How a call ended, and what it gave: `done`, `refused` by an error of ours, or `raised`, with the whole trace."""
    function, arguments = content
    try:
        return "done", function(*arguments)
    except AkdError as error:
        return "refused", error
    except (Exception, SystemExit) as error:
        return "raised", in_full(error)


_ANSWERS: dict[str, Callable[[Any], Any]] = {"probe": answer_here, "call": _called, "train": _trained}


def _leave_with_driver(life: int) -> None:
    """End this process once the driver is gone: its end of the pipe closes then, however it died. With it ends what it
    has forked.
    """
    os.read(life, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
