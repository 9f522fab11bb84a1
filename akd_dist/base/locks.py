"""Locks on files of this host, which the kernel releases when their holder dies."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from akd_dist.base.errors import HeldError
from akd_dist.base.files import write_error

# How often, and after how many seconds, a lock is tried again that may only be looked at.
_TRIES, _LOOK_SECONDS = 5, 0.01


@contextlib.contextmanager
def file_lock(
    path: Path,
    *,
    what: str,
    wait: float | None = None,
    note: str = "",
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold an flock on `path`; the kernel releases it when the holder dies, however it dies.

    Args:
        what: what the lock guards, for the message ("the run digits").
        wait: seconds to wait for it; 0 leaves at once, None waits for ever.
        note: what the lock file says of its holder.
        on_wait: called once with the holder's note when there is somebody to wait for.

    Raises:
        HeldError: someone else holds it and `wait` is over; names the holder.
        MachineError: the lock file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened without truncating it: those who wait read the holder's note from this very file.
        lock = open(path, "a+")  # noqa: SIM115  # closed by the block below; here for its refusal
    except OSError as error:
        raise write_error(error, path, 0) from error
    # The file stays when the lock is given back: were it removed, two could hold locks on two files of one name.
    with lock as handle:
        started, told = time.monotonic(), False
        while not try_lock(handle.fileno()):
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            if wait is not None and time.monotonic() - started >= wait:
                raise _held(what, holder)
            if on_wait is not None and not told:
                on_wait(holder)
                told = True
            # flock has no time limit of its own, so it is tried again until `wait` is over.
            time.sleep(0.1)
        handle.truncate(0)
        handle.write(note or f"process {os.getpid()}")
        handle.flush()
        yield


def refuse_held(path: Path, *, what: str) -> None:
    """Raise what `file_lock` would, where another process holds it now; a look that changes nothing.

    Raises:
        HeldError: so it is.
    """
    if is_locked(path):
        raise _held(what, path.read_text().strip() or "another process")


def _held(what: str, holder: str) -> HeldError:
    return HeldError(
        f"{what} is held by someone else",
        got=holder,
        expected="nobody holding it",
        next="run again with --wait, or stop that process",
    )


def is_locked(path: Path, *, shared: bool = False) -> bool:
    """Whether a living process of this host holds an flock on a file; a look that changes nothing.

    Args:
        shared: whether a shared lock counts as well.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
    except (OSError, ValueError):  # gone, not ours to see, or no path at all: no lock that we could know of
        return False
    try:
        # Closing gives back the lock that this look has taken; until then, whoever tries it finds the file locked.
        return not _tried(descriptor, fcntl.LOCK_EX if shared else fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file, if nobody holds it; whether it is locked now."""
    return _tried(descriptor, fcntl.LOCK_EX)


def _tried(descriptor: int, kind: int) -> bool:
    """Lock an open file, if nobody holds it but for a look: `status` and `stores` may look every second, and are
    through at once.
    """
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(_LOOK_SECONDS)
        else:
            return True
    return False
