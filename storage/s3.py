"""Objects in S3 and its like, through obstore: conditional puts, bounded retries, errors that name the key."""

# ruff: noqa: D102 -- the methods are documented at ObjectRoot

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import S3Store

from akd_dist.storage.files import PARTIAL_SUFFIX
from akd_dist.storage.objects import Keys, ObjectMissing, ObjectRoot, Stat, storage_error

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta

T = TypeVar("T")
# obstore says "not found" with either of these.
_MISSING = (NotFoundError, FileNotFoundError)


@dataclass(frozen=True)
class S3Root(ObjectRoot):
    """Objects under a prefix of a bucket; credentials and endpoint from the usual AWS_* environment."""

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            with self._errors("write", key, AlreadyExistsError):
                # A retry after a lost answer meets its own object and gets False: callers compare, so that is no loss.
                obstore.put(self._store, self._path(key), data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        with self._errors("write", key):
            obstore.put(self._store, self._path(key), data, use_multipart=False)

    def get(self, key: str) -> bytes:
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """The whole object and its entity tag; ObjectMissing if there is none."""

        def read() -> tuple[bytes, ObjectMeta]:
            answer = obstore.get(self._store, self._path(key))
            return bytes(answer.bytes()), answer.meta

        try:
            with self._errors("read", key, *_MISSING):
                data, meta = _whole(read)
        except _MISSING:
            raise ObjectMissing(key) from None
        if len(data) != meta["size"]:
            raise storage_error("read", self.path_of(key), f"{len(data)} of {meta['size']} bytes came")
        return data, meta["e_tag"] or ""

    def put_if_unchanged(self, key: str, data: bytes, tag: str) -> str | None:
        """Overwrite the object that has this entity tag; the new tag, or None if it has another one by now."""
        try:
            with self._errors("write", key, PreconditionError, *_MISSING):
                return obstore.put(self._store, self._path(key), data, mode={"e_tag": tag})["e_tag"] or ""
        except (PreconditionError, *_MISSING):
            return None

    def list(self, prefix: str = "") -> dict[str, Stat]:
        with self._errors("list", prefix):
            metas = _whole(lambda: obstore.list(self._store, self._path(prefix) or None).collect())
        found = {
            meta["path"].removeprefix(self._prefix): Stat(
                meta["size"],
                f"{meta['e_tag']}-{meta['last_modified'].isoformat()}",
                meta["last_modified"].timestamp(),
            )
            for meta in metas
        }
        return {key: found[key] for key in sorted(found) if not key.endswith(PARTIAL_SUFFIX)}

    def partials(self, prefix: str = "") -> Keys:
        return []  # a put is whole or nothing

    def folders(self) -> Keys:
        with self._errors("list", ""):
            found = self._top_level()["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)

    def files(self) -> Keys:
        with self._errors("list", ""):
            found = self._top_level()["objects"]
        return sorted(meta["path"].rpartition("/")[2] for meta in found)

    def delete(self, key: str) -> None:
        with contextlib.suppress(*_MISSING), self._errors("delete", key, *_MISSING):
            obstore.delete(self._store, self._path(key))

    def delete_folder(self, prefix: str) -> None:
        keys = [self._path(key) for key in self.list(prefix)]
        if keys:
            with contextlib.suppress(*_MISSING), self._errors("delete", prefix, *_MISSING):
                obstore.delete(self._store, keys)

    def move(self, key: str, to: str) -> bool:
        try:
            with self._errors("move", key, *_MISSING):
                obstore.rename(self._store, self._path(key), self._path(to))
        except _MISSING:
            return False
        return True

    def exists(self, key: str) -> bool:
        try:
            with self._errors("read", key, *_MISSING):
                obstore.head(self._store, self._path(key))
        except _MISSING:
            return False
        return True

    def free_bytes(self) -> int | None:
        return None

    def local_path(self, key: str) -> Path | None:
        return None

    @property
    def _store(self) -> S3Store:
        environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        return _s3_store(urlsplit(self.uri).netloc, environment)

    @property
    def _prefix(self) -> str:
        path = urlsplit(self.uri).path.strip("/")
        return f"{path}/" if path else ""

    def _path(self, key: str) -> str:
        if ".." in key.split("/"):
            raise ValueError(f"key {key!r} leaves the root")
        return f"{self._prefix}{key}".rstrip("/")

    def _top_level(self) -> ListResult[Sequence[ObjectMeta]]:
        return _whole(lambda: obstore.list_with_delimiter(self._store, self._prefix or None))

    @contextlib.contextmanager
    def _errors(self, verb: str, key: str, *answers: type[Exception]) -> Iterator[None]:
        """Let the answers through that the caller knows what to make of; everything else becomes one refusal."""
        try:
            yield
        except (BaseError, OSError, TimeoutError) as error:
            if isinstance(error, answers) and "NoSuchBucket" not in str(error):
                raise
            raise storage_error(verb, self.path_of(key), _reason(error)) from error


def _whole(read: Callable[[], T]) -> T:
    """Read again where an answer's body was cut short: obstore repeats a request that failed, not such a one."""
    for _ in range(3):
        try:
            return read()
        except BaseError as error:
            if "response body" not in str(error):
                raise
    return read()


def _reason(error: Exception) -> str:
    """The first line of a failure, and the code in the server's answer: the rest is a dump of the request."""
    first = str(error).strip().partition("\n")[0].partition(": <?xml")[0]
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{first} ({code[1]})" if code else first


@functools.lru_cache(maxsize=8)
def _s3_store(bucket: str, environment: tuple[tuple[str, str], ...]) -> S3Store:
    endpoint = dict(environment).get("AWS_ENDPOINT_URL", "")
    return S3Store(
        bucket,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=10),
            "timeout": timedelta(seconds=60),
        },
        retry_config={
            "max_retries": 6,
            "retry_timeout": timedelta(seconds=90),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
        },
    )
