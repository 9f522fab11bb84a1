"""Files of others in object storage, s3:// or gs://: found, and read by range; nothing is ever written there."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from akd_dist.base.errors import RefusedError
from akd_dist.base.places import check_uri
from akd_dist.storage.objects import ObjectMissing
from akd_dist.storage.s3 import GcsRoot, S3Root

_ROOTS = {"s3": S3Root, "gs": GcsRoot}


@dataclass(frozen=True, order=True)
class RemoteFile:
    """An object, as it was when it was looked at."""

    uri: str
    size: int
    """Bytes."""
    tag: str
    """Its entity tag, which changes whenever it does."""

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.uri.rpartition("/")[2]

    def open(self, buffer: int = 0) -> io.RawIOBase | io.BufferedReader:
        """The object as a file that is read by range; reading refuses where it is another one by now.

        Args:
            buffer: bytes that are read ahead; 0 for readers that read ahead by themselves.
        """
        parts = _Parts(self)
        return io.BufferedReader(parts, buffer) if buffer else parts


def is_remote(path: str) -> bool:
    """Whether a path is the URI of a place in object storage that can be read."""
    scheme, _, rest = path.partition("://")
    return scheme in _ROOTS and bool(rest.partition("/")[0])


def find_file(uri: str) -> RemoteFile | None:
    """The object at a URI; None where there is none.

    Raises:
        MachineError: the storage does not answer, or does not let this user in.
    """
    root, key = _root(uri)
    seen = root.look(key) if key else None
    return None if seen is None else RemoteFile(uri, *seen)


def files_below(uri: str) -> list[RemoteFile]:
    """The objects under a folder, in the order of their keys; as `find_file`."""
    root, key = _root(uri)
    return [RemoteFile(f"{root.uri}/{name}", *seen) for name, seen in root.below(key).items()]


def _root(uri: str) -> tuple[S3Root, str]:
    """The bucket of a URI, and the key.

    Raises:
        RecipeError: it names no place.
    """
    check_uri(uri)
    parts = urlsplit(uri, allow_fragments=False)
    scheme, _, rest = uri.partition("://")
    return _ROOTS[parts.scheme](f"{scheme}://{parts.netloc}"), rest.partition("/")[2].rstrip("/")


class _Parts(io.RawIOBase):
    """An object as a file."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._at = file, 0
        self._root, self._key = _root(file.uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._at)
        if size <= 0:
            return 0
        try:
            data = self._root.get_part(self._key, self._at, size, self._file.tag)
        except ObjectMissing:
            data = None
        if data is None:
            raise RefusedError(
                f"{self._file} was written while it was read",
                got="another object than when it was looked at, or none",
                expected="a file that nobody writes to",
                next="run the same command again once it is whole",
            )
        buffer[:size] = data
        self._at += size
        return size
