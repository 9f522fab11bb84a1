"""Who holds an unsealed store: a claim beside it, `<id>.claim`.

A courtesy that spares two drivers from computing the same shards; nothing breaks without it, since shards are published
create-only. On one host an flock tells whether the holder lives. A holder on another host, or of a store in object
storage, counts as gone when the counter in its claim has stood still for a while on the observer's own clock.
"""

import contextlib
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from akd_dist.base.errors import AkdError, HeldError, MachineError
from akd_dist.base.files import canonical_json, parse_json
from akd_dist.base.locks import is_locked, try_lock
from akd_dist.storage.objects import ObjectMissing, storage_error
from akd_dist.storage.roots import open_root
from akd_dist.storage.s3 import S3Root

CLAIM_SUFFIX = ".claim"
# A lock held on another host does not keep us from reading, so a claim may be read while it is written: it is read
# again, so many times and so many seconds later.
_READS, _READ_AGAIN = 5, 0.02
# How long a block waits at its end for a call that is still on its way.
_LAST_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds a store. `since` is for the reader of a message; nothing is decided by it."""

    host: str
    pid: int
    since: str
    token: str
    counter: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


# A holder whose claim was caught half written.
_UNREAD = Holder("this host", 0, "just now", "")


@contextlib.contextmanager
def claim_store(
    root_uri: str,
    store_id: str,
    *,
    wait: bool = False,
    on_wait: Callable[[str], None] | None = None,
    # Twelve counts have to be missed: a host or a storage that stalls for a moment is not dead.
    stale_after: float = 60.0,
    beat_every: float = 5.0,
    poll_every: float = 1.0,
    on_poll: Callable[[], None] = lambda: None,
    watch: bool = False,
) -> Iterator[None]:
    """Hold a store while it is written; no claim is left afterwards.

    Args:
        wait: wait for another holder to be done, or to be found dead; otherwise leave at once.
        on_wait: called once, with a sentence that names the holder.
        stale_after: seconds that a remote holder's counter must stand still.
        beat_every: seconds between two of our own counts.
        poll_every: seconds between two looks at another's claim.
        on_poll: called at every look; may raise, to wait no longer.
        watch: where nobody is to be waited for, do not leave before a holder is seen to live: a dead one is waited out.

    Raises:
        HeldError: somebody else holds the store; names host, process and since when.
        MachineError: the claim cannot be written.
    """
    claim = _claim_on(root_uri, store_id)
    seen = _Watch(stale_after)
    told = False
    while (holder := claim.take(seen.stale)) is not None:
        if not wait and (not watch or seen.lives(holder)):
            raise HeldError(
                f"{store_id} under {root_uri} is held by someone else",
                got=holder,
                expected="nobody holding it",
                next="run again with --wait: it waits until that process is done, or found to be gone",
            )
        if on_wait is not None and not told:
            on_wait(f"waiting for {holder}" if wait else f"seeing whether it lives: {holder}")
        told = True
        seen.see(holder)
        on_poll()
        time.sleep(poll_every)
    try:
        with repeating(claim.beat, beat_every, "store-claim"):
            yield
    finally:
        claim.release()


def holder_of(root_uri: str, store_id: str) -> Holder | None:
    """Who holds a store, as far as a look tells, which changes nothing; None if nobody does, or a dead process of this
    host. A holder on another host may be dead: only its counter would tell.
    """
    root, key = open_root(root_uri), f"{store_id}{CLAIM_SUFFIX}"
    try:
        holder = _parse(root.document(key)) or _UNREAD
    except ObjectMissing:
        return None
    path = root.local_path(key)
    if path is not None and holder.host in (socket.gethostname(), _UNREAD.host) and not is_locked(path):
        return None
    return holder


class _Claim(Protocol):
    def take(self, stale: Holder | None) -> Holder | None:
        """Take the claim, also from `stale`; None if it is ours now, else its holder."""

    def beat(self) -> None:
        """Count one on."""

    def release(self) -> None:
        """Give the claim back."""


@dataclass
class _Watch:
    """Watches a holder's counter on our own monotonic clock."""

    stale_after: float
    _seen: Holder | None = None
    _since: float = 0.0

    def see(self, holder: Holder) -> None:
        if holder != self._seen:
            self._seen, self._since = holder, time.monotonic()

    def lives(self, holder: Holder) -> bool:
        """Whether a holder has counted on since it was seen, or is another one than was seen."""
        return self._seen is not None and holder != self._seen

    @property
    def stale(self) -> Holder | None:
        stood = self._seen is not None and time.monotonic() - self._since >= self.stale_after
        return self._seen if stood else None


def _myself() -> Holder:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(socket.gethostname(), os.getpid(), since, secrets.token_hex(8))


def _claim_on(root_uri: str, store_id: str) -> _Claim:
    root, key = open_root(root_uri), f"{store_id}{CLAIM_SUFFIX}"
    if isinstance(root, S3Root):
        return _ObjectClaim(root, key)
    path = root.local_path(key)
    assert path is not None, "a root is a folder or object storage"
    return _FileClaim(path)


@dataclass
class _FileClaim:
    """A locked file. The lock dies with its holder; the counter is for observers whom the lock does not reach (NFS)."""

    path: Path
    me: Holder = field(default_factory=_myself)
    _descriptor: int = -1

    def take(self, stale: Holder | None) -> Holder | None:
        # The lock is on the file and not on its name: a holder that leaves removes the name, and then a lock on the old
        # file would guard nothing. So the file that was locked must be the one that still has the name.
        while True:
            descriptor = self._open()
            if not try_lock(descriptor):
                holder = _parse(os.pread(descriptor, 4096, 0)) or _UNREAD
                os.close(descriptor)
                return holder
            if _is_still_at(descriptor, self.path):
                break
            os.close(descriptor)  # its last holder removed it between our open and our lock
        left = _left_by_another(descriptor)
        # The lock has settled it for holders on this host; one on another host may be out of its reach, and alive.
        if left is not None and left.host != self.me.host and left != stale:
            os.close(descriptor)
            return left
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        self._write()
        return None

    def beat(self) -> None:
        self.me = replace(self.me, counter=self.me.counter + 1)
        self._write()

    def release(self) -> None:
        # The name goes while the lock is still held: once it is given back, the file may be somebody else's.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise storage_error("write", str(self.path), error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise storage_error("write", str(self.path), "it is no file")
        return descriptor

    def _write(self) -> None:
        os.pwrite(self._descriptor, canonical_json(asdict(self.me)), 0)  # in place: the lock is on this very file


@dataclass
class _ObjectClaim:
    """An object, taken create-only and counted on under its entity tag."""

    root: S3Root
    key: str
    me: Holder = field(default_factory=_myself)
    _tag: str | None = None

    def take(self, stale: Holder | None) -> Holder | None:
        while True:
            # Whether the put went through is not asked: where its answer was lost, a repeated put meets our own claim.
            # Who holds the store is what the claim says when it is read.
            self.root.put_new(self.key, self._bytes())
            try:
                data, tag = self.root.get_tagged(self.key)
            except ObjectMissing:  # released just now
                continue
            holder = _parse(data) or Holder("unknown", 0, "unknown", "")
            if holder.token == self.me.token:
                self._tag = tag
                return None
            if holder != stale:
                return holder
            # Of several who find the same holder dead, the entity tag lets one through.
            self._tag = self.root.put_if_unchanged(self.key, self._bytes(), tag)
            if self._tag is not None:
                return None
            with contextlib.suppress(ObjectMissing):
                if self.root.get_tagged(self.key) == (data, tag):  # so nobody else was faster: it would never end
                    raise _no_takeover(self.root.path_of(self.key))

    def beat(self) -> None:
        if self._tag is None:
            return  # somebody took us for dead: the claim is theirs
        self.me = replace(self.me, counter=self.me.counter + 1)
        # A put whose answer was lost may have gone through: then the claim still stands, under a tag that has to be
        # read.
        self._tag = self.root.put_if_unchanged(self.key, self._bytes(), self._tag) or self._own_tag()

    def release(self) -> None:
        with contextlib.suppress(AkdError):  # what was done is done; a claim left behind goes stale
            if self._own_tag() is not None:
                self.root.delete(self.key)

    def _own_tag(self) -> str | None:
        try:
            data, tag = self.root.get_tagged(self.key)
        except ObjectMissing:
            return None
        holder = _parse(data)
        return tag if holder is not None and holder.token == self.me.token else None

    def _bytes(self) -> bytes:
        return canonical_json(asdict(self.me))


def _no_takeover(path: str) -> MachineError:
    """Seen with Ceph 16, which compares entity tags with the quotes that the header has and its records have not."""
    return MachineError(
        f"the claim {path} of a process without a sign of life cannot be taken over",
        got="the storage refuses to overwrite an object that is unchanged",
        expected="object storage with conditional puts of both kinds (If-None-Match and If-Match)",
        next="remove that object, if its holder is dead; then the same command goes on",
    )


@contextlib.contextmanager
def repeating(act: Callable[[], object], every: float, name: str) -> Iterator[None]:
    """Call `act` every so many seconds during the block, on a thread of its own; a time that fails is left out."""
    done = threading.Event()

    def go_on() -> None:
        while not done.wait(every):
            with contextlib.suppress(AkdError, OSError):
                act()

    thread = threading.Thread(target=go_on, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_LAST_SECONDS)  # storage that does not answer holds nobody up: what comes late does no harm


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _left_by_another(descriptor: int) -> Holder | None:
    """What a claim file says that was there before; read again where a holder on another host was just writing it."""
    for _ in range(_READS):
        if (holder := _parse(os.pread(descriptor, 4096, 0))) is not None:
            return holder
        time.sleep(_READ_AGAIN)
    return None


def _parse(data: bytes) -> Holder | None:
    try:
        holder = Holder(**parse_json(data))
    except (ValueError, TypeError):  # caught between two writes
        return None
    kinds = {"host": str, "pid": int, "since": str, "token": str, "counter": int}
    return holder if all(isinstance(getattr(holder, name), kind) for name, kind in kinds.items()) else None
