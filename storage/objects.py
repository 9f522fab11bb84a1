"""Bytes by key under a root: one interface for a local folder (here) and for s3:// (storage/s3.py).

A new object is published create-only: whole or not at all, never over another one.
"""

# ruff: noqa: D102 -- the methods are documented at ObjectRoot

import contextlib
import errno
import os
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from akd_dist.base.errors import DamagedError, MachineError, is_limit, limit_reached
from akd_dist.base.files import PARTIAL_SUFFIX, fsync_folder, link_new, publish_new, replace

# The last second of the year 9999: a file's time may lie beyond what a date can say.
_LAST_SECOND = 253_402_300_799.0
# A store of 21,000 classes and ten views of a million rows has a manifest of 0.4 GB; nothing else comes near that.
MOST_DOCUMENT = 1 << 30
"""Bytes of the largest JSON document that is read."""
Keys = list[str]
Entries = list[os.DirEntry[str]]


class ObjectMissing(KeyError):  # noqa: N818
    """There is no object of this key."""


class Stat(NamedTuple):
    """What a listing tells of an object."""

    size: int
    """Bytes."""
    token: str
    """Changes whenever the object does."""
    modified: float
    """When it was written, in seconds since 1970 by the storage's clock; for people, and for what is old."""


@dataclass(frozen=True)
class ObjectRoot(ABC):
    """Objects under one root; a small value that travels to other processes.

    Every method raises MachineError, naming the key, when the disk or the object storage does not do what it should.
    """

    uri: str
    """Absolute path of the folder, or s3://bucket/prefix, without a slash at its end."""

    def child(self, name: str) -> Self:
        """The root one folder further down."""
        return type(self)(f"{self.uri}/{name}")

    @property
    def parent(self) -> Self:
        """The root one folder further up."""
        return type(self)(self.uri.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part of the URI."""
        return self.uri.rpartition("/")[2]

    def path_of(self, key: str) -> str:
        """Where an object is, for messages."""
        return f"{self.uri}/{key}"

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Publish create-only and durably; False if there was an object already, whatever it holds."""

    def link_new(self, source: str, key: str, data: bytes) -> bool:
        """Publish what another key holds, `data`, as `put_new` does; by a hard link where there are such."""
        return self.put_new(key, data)

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write an object, over an older one if there is one; readers see the one or the other."""

    @abstractmethod
    def get(self, key: str, most: int | None = None) -> bytes:
        """The whole object; ObjectMissing if there is none.

        Args:
            most: bytes that it may have; more are not read, but a DamagedError.
        """

    @abstractmethod
    def get_start(self, key: str, most: int) -> bytes:
        """The first bytes of an object, as many as it has of these; ObjectMissing if there is none."""

    def document(self, key: str) -> bytes:
        """A JSON document, as `get`: none of ours is as large as what would fill this machine's memory."""
        return self.get(key, MOST_DOCUMENT)

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, Stat]:
        """Objects under a folder by key, sorted; without files in the making."""

    @abstractmethod
    def partials(self, prefix: str = "") -> Keys:
        """Keys of files in the making, their writers alive or dead."""

    @abstractmethod
    def folders(self) -> Keys:
        """Names of the folders directly under the root, sorted."""

    @abstractmethod
    def files(self) -> Keys:
        """Names of the objects directly under the root, files in the making included, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; none is as well."""

    def delete_keys(self, keys: Iterable[str]) -> None:
        """Remove objects, as `delete`; where it can, in few requests."""
        for key in keys:
            self.delete(key)

    @abstractmethod
    def delete_folder(self, prefix: str) -> None:
        """Remove everything under a folder."""

    @abstractmethod
    def move(self, key: str, to: str) -> bool:
        """Give an object another key; False if it is gone already."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes free for this user; None where there is no such limit."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """The object's file; None in object storage."""

    def check_writable(self) -> None:
        """Publish an object and fail to publish it again, as every later step will need.

        Raises:
            MachineError: the root cannot be written, or has no create-only publishing.
        """
        for _ in range(2):  # `stores gc` may take what we try with for left behind, and remove it in between
            probe = f".check-{secrets.token_hex(6)}{PARTIAL_SUFFIX}"
            try:
                created = self.put_new(probe, b"1")
                again = self.put_new(probe, b"2")
            finally:
                with contextlib.suppress(MachineError):  # what could not be written is not there
                    self.delete(probe)
            if created and not again:
                return
        raise MachineError(
            f"{self.uri} cannot publish an object without overwriting one",
            got="a second create-only put of the same key went through" if again else "a new key was refused",
            expected="hard links or O_EXCL on a file system, conditional puts (If-None-Match) in object storage",
            next="choose another --store-root",
        )


@dataclass(frozen=True)
class LocalRoot(ObjectRoot):
    """Files under a folder."""

    def put_new(self, key: str, data: bytes) -> bool:
        return publish_new(self._path(key), data)

    def link_new(self, source: str, key: str, data: bytes) -> bool:
        return link_new(self._path(source), self._path(key), data)

    def put(self, key: str, data: bytes) -> None:
        replace(self._path(key), data)

    def get(self, key: str, most: int | None = None) -> bytes:
        try:
            with open(os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):  # a folder; a pipe would be waited for
                    raise ObjectMissing(key)
                if most is not None and status.st_size > most:
                    raise too_large(self.path_of(key), status.st_size, most)
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectMissing(key) from None
        except OSError as error:
            raise storage_error("read", self.path_of(key), error) from error
        except MemoryError as error:
            raise storage_error("read", self.path_of(key), "more bytes than there is memory") from error

    def get_start(self, key: str, most: int) -> bytes:
        return self.get(key)[:most]

    def list(self, prefix: str = "") -> dict[str, Stat]:
        return {key: stat for key, stat in self._walk(prefix) if not key.endswith(PARTIAL_SUFFIX)}

    def partials(self, prefix: str = "") -> Keys:
        return [key for key, _ in self._walk(prefix) if key.endswith(PARTIAL_SUFFIX)]

    def folders(self) -> Keys:
        return [entry.name for entry in self._entries("") if _leads_to(entry.is_dir)]

    def files(self) -> Keys:
        return [entry.name for entry in self._entries("") if _leads_to(entry.is_file)]

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError as error:
            raise storage_error("delete", self.path_of(key), error) from error

    def delete_folder(self, prefix: str) -> None:
        for attempts_left in (2, 1, 0):
            try:
                shutil.rmtree(self._path(prefix))
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno == errno.ENOTEMPTY and attempts_left:  # somebody put something into it just now
                    continue
                raise storage_error("delete", self.path_of(prefix), error) from error
            return

    def move(self, key: str, to: str) -> bool:
        source, target = self._path(key), self._path(to)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            # Durable where it was: after a loss of power, what was set aside must not be back in its place.
            fsync_folder(source.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error("move", self.path_of(key), error) from error
        return True

    def exists(self, key: str) -> bool:
        try:
            return stat.S_ISREG(self._path(key).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise storage_error("read", self.path_of(key), error) from error

    def free_bytes(self) -> int | None:
        folder = Path(self.uri)
        try:
            # The root may not have been made yet: what counts is the disk that it will lie on.
            while not folder.exists():
                folder = folder.parent
            return shutil.disk_usage(folder).free
        except OSError as error:
            raise storage_error("read", str(folder), error) from error

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        if ".." in key.split("/"):
            raise ValueError(f"key {key!r} leaves the root")
        return Path(self.uri, key)

    def _entries(self, prefix: str) -> Entries:
        try:
            return sorted(os.scandir(self._path(prefix)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise storage_error("read", self.path_of(prefix), error) from error

    def _walk(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        for entry in self._entries(prefix):
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            # A link to a folder is not followed: it may lead out of the root, or round in a circle.
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(key)
            else:
                try:
                    found = entry.stat()
                except FileNotFoundError:  # gone since the listing
                    continue
                except OSError as error:
                    raise storage_error("read", self.path_of(key), error) from error
                # With ctime, which no program can set: a copy that was restored with its old mtime still has another
                # token.
                token = f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}-{found.st_ctime_ns}"
                yield key, Stat(found.st_size, token, min(max(found.st_mtime, 0.0), _LAST_SECOND))


def _leads_to(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; one that cannot be followed is of none."""
    try:
        return kind()
    except OSError:
        return False


def storage_error(verb: str, where: str, reason: object, next: str | None = None) -> MachineError:
    """The refusal for storage that did not do what it should.

    Args:
        next: what to do about it, where that is known.
    """
    if isinstance(reason, OSError) and is_limit(reason):
        return limit_reached(reason)
    return MachineError(
        f"cannot {verb} {where}",
        got=(reason.strerror or str(reason)) if isinstance(reason, OSError) else reason,
        expected="storage that this user can reach, read and write",
        next=next or "check the path, its permissions and the AWS_* settings, then run the same command again",
    )


def too_large(where: str, size: int, most: int) -> DamagedError:
    """The error for a document that nobody wrote in earnest."""
    return DamagedError(
        f"{where} is damaged",
        got=f"{size:,} bytes",
        expected=f"a JSON document of {most:,} bytes at most",
        next="bring the file back from a copy",
    )
