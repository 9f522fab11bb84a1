"""Who used a store: a small record beside its shards for each run and day, written before the run opens the store.

A courtesy to people and to `stores gc`: nothing that is read or trained depends on it, it is outside the seal, and a
root that cannot be written stops nobody. Times are the writers' own.
"""

import contextlib
import getpass
import logging
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.base.locks import is_locked
from akd_dist.base.places import absolute, found, written
from akd_dist.storage.claim import holder_of, repeating
from akd_dist.storage.layout import MANIFEST_KEY
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.records import Document
from akd_dist.storage.roots import open_root

USES = "uses"
# The mark of a removal, beside the store that is about to be removed. A run that begins to use the store meanwhile
# waits until the mark is gone, and then sees whether the store is.
REMOVING_SUFFIX = ".removing"
# The lock of a run on another host cannot be seen: it counts as going on for so long after its last record.
REMOTE_RUN_SECONDS = 2 * 86_400.0
# A run that goes on for days looks this often whether a new day wants its record: without it, another host would take
# the run for over after two days, and `stores gc` there would remove the store under it.
_AGAIN_SECONDS = 6 * 3600.0
# Between its mark and the first object that it deletes, a removal only looks once more for users, which takes
# milliseconds. A mark that stands for so long was left by a process that died.
_PATIENCE_SECONDS = 5.0

log = logging.getLogger("akd_dist.storage")
Text = Annotated[str, StringConstraints(max_length=4096)]


class Use(Document):
    """A run that used a store on some day."""

    run: Text
    """The run's folder, or the folder of a model that was trained from the store: in the record relative to the store.
    A name in its cache for a command that only caches.
    """
    host: Text
    user: Text | None
    time: str
    """When the run began to use it, the first time on that day: ISO 8601, UTC."""
    command: str
    """The command line."""
    lock: Text | None
    """A file that the run holds locked while it lives, in the record relative to the store; None where there is none.
    """

    @property
    def at(self) -> float:
        """Seconds since 1970; 0 for a time that cannot be read, or that lies in the future: nobody has used it yet."""
        try:
            seconds = datetime.fromisoformat(self.time).timestamp()
        except (ValueError, OverflowError):
            return 0.0
        return seconds if seconds < time.time() + REMOTE_RUN_SECONDS else 0.0

    @property
    def key(self) -> str:
        """Relative to the store: one a run and day."""
        return f"{USES}/{self.time[:10]}-{sha256(f'{self.host} {self.run}'.encode())[:16]}.json"

    def is_going_on(self, now: float) -> bool:
        """Whether the run lives: by its lock on this host; elsewhere it is taken to, for two days."""
        if self.lock is not None and self.host == socket.gethostname():
            return is_locked(Path(self.lock))
        return now - self.at < REMOTE_RUN_SECONDS


@contextlib.contextmanager
def using(uris: Iterable[str], *, run: str, lock: Path | None = None) -> Iterator[None]:
    """Record that a run uses stores; to be entered before it opens them. While it goes on, each day has its record.

    Args:
        uris: paths or URIs of sealed stores.
        run: the run's folder.
        lock: a file that the run holds locked while it lives.

    Raises:
        RefusedError: a store was removed just now.
    """
    stores = [open_root(uri) for uri in dict.fromkeys(uris)]
    for store in stores:
        _begin(store, run, lock)

    def note_all() -> None:
        for store in stores:
            _note(store, _use(store, run, lock))

    with repeating(note_all, _AGAIN_SECONDS, "store-uses"):
        yield


def note_use(store: ObjectRoot, *, run: str, lock: Path | None = None) -> None:
    """Record that a run has used what is read at once, and so needs no record before; args as of `using`.

    Args:
        store: where the record goes: for an object, the folder of its name.
    """
    _note(store, _use(store, run, lock))


def uses_of(store: ObjectRoot) -> list[Use]:
    """The records of a store, their places absolute, the latest first; what cannot be read as one is passed over."""
    uses = []
    for key in store.list(USES):
        with contextlib.suppress(ObjectMissing, AkdError):
            use = Use.from_bytes(store.document(key), store.path_of(key))
            lock = None if use.lock is None else found(use.lock, store.uri)
            uses.append(use.model_copy(update={"run": found(use.run, store.uri), "lock": lock}))
    return sorted(uses, key=lambda use: use.at, reverse=True)


def _use(store: ObjectRoot, run: str, lock: Path | None) -> Use:
    """The record as it is written: a store and its runs may be moved together."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in some containers
        user = None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lock_path = None if lock is None else written(absolute(lock), store.uri)
    return Use(
        run=written(absolute(run), store.uri),
        host=socket.gethostname(),
        user=user,
        time=now,
        command=_command(),
        lock=lock_path,
    )


def _command() -> str:
    """The command line of this process, without the folder of its program."""
    program, *arguments = sys.argv or [""]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = ["python", "-m", module.parent] if module is not None and module.parent else [Path(program).name]
    return shlex.join([*words, *arguments])


def _begin(store: ObjectRoot, run: str, lock: Path | None) -> None:
    """Leave a record, then see that nobody is removing the store.

    Who removes one puts up his mark before he looks for records; here the record comes first. So one of the two sees
    the other. Without a mark, or with one whose owner is gone, it is settled whether the store is there.
    """
    use = _use(store, run, lock)
    ours = store.exists(MANIFEST_KEY) and _note(store, use)
    root, patience = store.parent, time.monotonic() + _PATIENCE_SECONDS
    while root.exists(f"{store.name}{REMOVING_SUFFIX}") and holder_of(root.uri, store.name) is not None:
        if time.monotonic() > patience:
            break
        time.sleep(0.05)
    if store.exists(MANIFEST_KEY):
        return
    if ours:
        # The record would be all that is left of the store, and would keep its folder.
        store.delete(use.key)
    raise RefusedError(
        f"the store {store.uri} is gone",
        got=f"no {MANIFEST_KEY}: it was removed while the run began",
        expected="a sealed store",
        next="run the same command again: what it held is made anew",
    )


def _note(store: ObjectRoot, use: Use) -> bool:
    """Leave a record; whether this made it."""
    try:
        return store.put_new(use.key, use.to_bytes())
    except (AkdError, OSError) as error:  # OSError: its folder was removed under it
        log.info("no record of the use of %s: %s", store.uri, error)
        return False
