"""Objects in S3 and its like, through obstore: conditional puts, bounded retries, errors that name the key."""

# ruff: noqa: D102 -- the methods are documented at ObjectRoot

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import GCSStore, S3Store

from akd_dist.base.errors import MachineError, RecipeError
from akd_dist.base.files import PARTIAL_SUFFIX
from akd_dist.storage.objects import Keys, ObjectMissing, ObjectRoot, Stat, storage_error, too_large
from akd_dist.storage.s3_refusals import has_no_credentials, refusal

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta

T = TypeVar("T")
# obstore says "not found" with either of these.
_MISSING = (NotFoundError, FileNotFoundError)
# S3 takes 5 GB in one request.
_MOST_IN_ONE_PUT = 4 * 2**30
# Storage that has not answered for so long is given up. After half of it, the request is made once more.
_TIMEOUT_SECONDS = 30.0
# Storage that has answered this process before is given so many times as long: a network that is cut for half a minute
# ends nobody's work, and a mistyped endpoint is still told within seconds.
_PATIENCE = 2
# A request that fails at once, as where nobody listens, is repeated so often: at first sight, and where storage has
# answered before. Then the time is what ends it.
_RETRIES, _PATIENT_RETRIES = 6, 100
# A request with a body has more time: what a line of this speed takes for it.
_SLOWEST_BYTES_PER_SECOND = 256 * 2**10
# The time of one answer as a whole, however slowly its body comes.
_ANSWER_SECONDS = 600.0

log = logging.getLogger("akd_dist.storage")
# When an endpoint was found not to answer, by endpoint and thread. The requests by which a thread tidies up after such
# an error fail at once, instead of waiting as long as the first one.
_silent: dict[tuple[str, int], float] = {}
# The endpoints that have answered this process.
_answered: set[str] = set()


@dataclass(frozen=True)
class S3Root(ObjectRoot):
    """Objects under a prefix of a bucket; credentials and endpoint from the usual AWS_* environment."""

    SETTINGS: ClassVar[str] = "AWS_"
    """How the variables of the environment begin that say how to reach it."""

    def put_new(self, key: str, data: bytes) -> bool:
        path = self._path(key)

        def publish(store: S3Store | GCSStore) -> None:
            # A retry after a lost answer meets its own object and gets False: callers compare, so that is no loss.
            obstore.put(store, path, data, mode="create", use_multipart=False)

        try:
            self._ask("write", key, publish, AlreadyExistsError, body=len(data))
        except AlreadyExistsError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        # In one request, but where that cannot be: parts of an upload that breaks off would stay, unseen and paid for.
        parts = len(data) > _MOST_IN_ONE_PUT
        self._ask("write", key, lambda store: obstore.put(store, path, data, use_multipart=parts), body=len(data))

    def get(self, key: str, most: int | None = None) -> bytes:
        return self.get_tagged(key, most)[0]

    def get_tagged(self, key: str, most: int | None = None) -> tuple[bytes, str]:
        """The whole object and its entity tag; `most` and errors as for `get`."""

        path = self._path(key)

        def read(store: S3Store | GCSStore) -> tuple[bytes, ObjectMeta]:
            answer = obstore.get(store, path)
            # The size is known before the body comes, so an object that is too large is never fetched.
            fits = most is None or answer.meta["size"] <= most
            return bytes(answer.bytes()) if fits else b"", answer.meta

        try:
            data, meta = self._ask("read", key, read, *_MISSING)
        except _MISSING:
            raise ObjectMissing(key) from None
        if most is not None and meta["size"] > most:
            raise too_large(self.path_of(key), meta["size"], most)
        if len(data) != meta["size"]:
            raise storage_error("read", self.path_of(key), f"{len(data)} of {meta['size']} bytes came")
        return data, meta["e_tag"] or ""

    def get_start(self, key: str, most: int) -> bytes:
        path = self._path(key)

        def read(store: S3Store | GCSStore) -> bytes:
            return bytes(obstore.get(store, path, options={"range": (0, most)}).bytes())

        try:
            return self._ask("read", key, read, *_MISSING)
        except _MISSING:
            raise ObjectMissing(key) from None

    def get_part(self, key: str, start: int, size: int, tag: str) -> bytes | None:
        """Bytes start..start + size - 1 of the object that has this entity tag; None if it has another one by now.

        Raises:
            ObjectMissing: there is none.
        """
        path, options = self._path(key), {"range": (start, start + size), **({"if_match": tag} if tag else {})}
        try:
            # Copied out of the answer here: its body may be cut short, and is then asked for again.
            data = self._ask(
                "read",
                key,
                lambda store: bytes(obstore.get(store, path, options=cast(Any, options)).bytes()),
                PreconditionError,
                *_MISSING,
            )
        except PreconditionError:
            return None
        except _MISSING:
            raise ObjectMissing(key) from None
        if len(data) != size:
            raise storage_error("read", self.path_of(key), f"{len(data)} of {size} bytes came")
        return data

    def look(self, key: str) -> tuple[int, str] | None:
        """Size and entity tag of an object; None if there is none."""
        path = self._path(key)
        try:
            meta = self._ask("read", key, lambda store: obstore.head(store, path), *_MISSING)
        except _MISSING:
            return None
        return meta["size"], meta["e_tag"] or ""

    def below(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Size and entity tag of the objects under a folder by key, sorted; placeholders of folders are left out."""
        path = self._path(prefix) or None
        metas = self._ask("list", prefix, lambda store: obstore.list(store, path).collect())
        found = {key: (meta["size"], meta["e_tag"] or "") for key, meta in self._inside(path, metas)}
        return {key: found[key] for key in sorted(found)}

    def put_if_unchanged(self, key: str, data: bytes, tag: str) -> str | None:
        """Overwrite the object that has this entity tag; the new tag, or None if it has another one by now."""
        path = self._path(key)
        try:
            put = self._ask(
                "write",
                key,
                lambda store: obstore.put(store, path, data, mode={"e_tag": tag}),
                PreconditionError,
                *_MISSING,
            )
        except (PreconditionError, *_MISSING):
            return None
        return put["e_tag"] or ""

    def list(self, prefix: str = "") -> dict[str, Stat]:
        path = self._path(prefix) or None
        # obstore compares prefixes by whole parts of a path, so `a/b` lists nothing of `a/bc`.
        metas = self._ask("list", prefix, lambda store: obstore.list(store, path).collect())
        found = {
            key: Stat(
                meta["size"],
                f"{meta['e_tag']}-{meta['last_modified'].isoformat()}",
                meta["last_modified"].timestamp(),
            )
            for key, meta in self._inside(path, metas)
        }
        return {key: found[key] for key in sorted(found) if not key.endswith(PARTIAL_SUFFIX)}

    def partials(self, prefix: str = "") -> Keys:
        return []  # a put is whole or nothing

    def folders(self) -> Keys:
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in self._top_level()["common_prefixes"])

    def files(self) -> Keys:
        objects = self._inside(self._prefix.rstrip("/"), self._top_level()["objects"])
        return sorted(key.rpartition("/")[2] for key, _ in objects)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(*_MISSING):
            self._ask("delete", key, lambda store: obstore.delete(store, path), *_MISSING)

    def delete_keys(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        if paths:
            with contextlib.suppress(*_MISSING):
                self._ask("delete", "", lambda store: obstore.delete(store, paths), *_MISSING)

    def delete_folder(self, prefix: str) -> None:
        self.delete_keys(self.list(prefix))

    def move(self, key: str, to: str) -> bool:
        source, target = self._path(key), self._path(to)
        try:
            # S3 has no rename: this copies and deletes, and a process that is killed in between leaves both.
            self._ask("move", key, lambda store: obstore.rename(store, source, target), *_MISSING)
        except _MISSING:
            return False
        return True

    def exists(self, key: str) -> bool:
        path = self._path(key)
        try:
            self._ask("read", key, lambda store: obstore.head(store, path), *_MISSING)
        except _MISSING:
            return False
        return True

    def free_bytes(self) -> int | None:
        return None

    def local_path(self, key: str) -> Path | None:
        return None

    @property
    def _prefix(self) -> str:
        path = urlsplit(self.uri).path.strip("/")
        return f"{path}/" if path else ""

    def _inside(self, folder: str | None, metas: Iterable[ObjectMeta]) -> Iterator[tuple[str, ObjectMeta]]:
        """What a listing has within a folder, by key.

        Consoles of object storage put an empty object `folder/` for a folder, which obstore lists as `folder`.
        """
        within = f"{folder}/" if folder else ""
        for meta in metas:
            if meta["path"].startswith(within) and meta["path"]:
                yield meta["path"].removeprefix(self._prefix), meta

    def _path(self, key: str) -> str:
        if ".." in key.split("/"):
            raise ValueError(f"key {key!r} leaves the root")
        return f"{self._prefix}{key}".rstrip("/")

    def _client(
        self, bucket: str, environment: tuple[tuple[str, str], ...], limit: float, attempt: float, retries: int
    ) -> S3Store | GCSStore:
        return _s3_store(bucket, environment, limit, attempt, retries)

    def _top_level(self) -> ListResult[Sequence[ObjectMeta]]:
        return self._ask("list", "", lambda store: obstore.list_with_delimiter(store, self._prefix or None))

    def _ask(
        self, verb: str, key: str, call: Callable[[S3Store | GCSStore], T], *answers: type[Exception], body: int = 0
    ) -> T:
        """Ask the storage for something, and again where it may be asked again, in bounded time.

        Args:
            answers: errors that the caller knows what to make of; every other one becomes a refusal.
            body: bytes that are sent.
        """
        # Part of the key by which clients are kept: other credentials or another endpoint make another client.
        environment = tuple(
            sorted((name, value) for name, value in os.environ.items() if name.startswith(self.SETTINGS))
        )
        bucket = urlsplit(self.uri).netloc
        endpoint = dict(environment).get("AWS_ENDPOINT_URL") or f"the endpoint of {bucket}"
        patient = endpoint in _answered
        limit = timeout_seconds() * (_PATIENCE if patient else 1)
        attempt = limit / 2 + _sending_seconds(body)
        me = (endpoint, threading.get_ident())
        if time.monotonic() - _silent.get(me, -math.inf) < limit:
            raise _unanswered(verb, self.path_of(key), f"{endpoint} did not answer just now")
        retries = _PATIENT_RETRIES if patient else _RETRIES
        client, started = self._client(bucket, environment, limit, attempt, retries), time.monotonic()
        with _told_if_silent(endpoint, attempt, attempt + limit / 2):
            for asked in itertools.count(1):
                began = time.monotonic()
                try:
                    found = call(client)
                except (BaseError, OSError, TimeoutError) as error:
                    # A bucket that is not there answers "not found" as well, and that is a wrong root and no missing
                    # object.
                    if isinstance(error, answers) and "NoSuchBucket" not in str(error):
                        _answered.add(endpoint)
                        raise
                    if has_no_credentials(error):
                        raise refusal(verb, self.path_of(key), error) from error
                    now = time.monotonic()
                    # A refused connection fails with the same words, but at once: only what took its time was left
                    # without an answer.
                    silent = "error sending request" in str(error) and now - began > 0.9 * _connect_seconds(limit)
                    if _worth_repeating(error, silent, asked) and now - started < attempt + limit / 2:
                        continue
                    if not silent:
                        raise refusal(verb, self.path_of(key), error) from error
                    _silent[me] = now
                    told = f"no answer from {endpoint} within {now - started:.3g} s, in {asked + _repeats(error)} tries"
                    raise _unanswered(verb, self.path_of(key), told) from error
                _silent.pop(me, None)
                _answered.add(endpoint)
                return found
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class GcsRoot(S3Root):
    """The same in Google Cloud Storage; credentials from the usual GOOGLE_* environment. For sources of rows alone."""

    SETTINGS: ClassVar[str] = "GOOGLE_"

    def _client(
        self, bucket: str, environment: tuple[tuple[str, str], ...], limit: float, attempt: float, retries: int
    ) -> S3Store | GCSStore:
        return _gcs_store(bucket, environment, limit, attempt, retries)


def _worth_repeating(error: Exception, silent: bool, asked: int) -> bool:
    """Whether to ask once more: obstore repeats a request that failed, but no answer whose body was cut short, and no
    create-only put that was not answered. Every write here may be made twice.
    """
    if "response body" in str(error):
        return asked < 4
    return silent and asked < 2 and not _repeats(error)


def _repeats(error: Exception) -> int:
    """How often obstore has repeated a request."""
    told = re.search(r"after (\d+) retries", str(error))
    return int(told[1]) if told else 0


def timeout_seconds() -> float:
    """$AKD_DIST_S3_TIMEOUT: seconds after which storage that does not answer is given up; 30 by default.

    Raises:
        RecipeError: it is no positive number.
    """
    text = os.environ.get("AKD_DIST_S3_TIMEOUT", "").strip()
    seconds = math.nan
    with contextlib.suppress(ValueError):
        # `float` would take 3_0 and digits of other scripts as well.
        seconds = float(text or _TIMEOUT_SECONDS) if text.isascii() and "_" not in text else math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(
            "AKD_DIST_S3_TIMEOUT is no time", got=text, expected="seconds, such as 30", next="correct or unset it"
        )
    return seconds


def _sending_seconds(body: int) -> float:
    """What sending so many bytes may take beside the answer: a power of two, so that few clients are made; 0 for small
    ones.
    """
    seconds = body / _SLOWEST_BYTES_PER_SECOND
    return 2.0 ** math.ceil(math.log2(seconds)) if seconds > 1 else 0.0


@contextlib.contextmanager
def _told_if_silent(endpoint: str, after: float, until: float) -> Iterator[None]:
    """A line for the person who waits, if that takes longer."""
    told = f"no answer from {endpoint} for {after:g} s: asking again, until {until:g} s are over"
    timer = threading.Timer(after, log.warning, (told,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unanswered(verb: str, where: str, reason: str) -> MachineError:
    error = storage_error(verb, where, reason)
    error.next = "check AWS_ENDPOINT_URL and the network; for a slow one, set AKD_DIST_S3_TIMEOUT to more seconds"
    return error


def _connect_seconds(limit: float) -> float:
    """Seconds that a connection may take."""
    return min(10.0, limit / 2)


@functools.lru_cache(maxsize=16)
def _s3_store(
    bucket: str, environment: tuple[tuple[str, str], ...], limit: float, attempt: float, retries: int
) -> S3Store:
    """A client.

    Args:
        limit: seconds after which storage that does not answer is given up.
        attempt: seconds for each attempt until an answer begins, and between two parts of it.
        retries: how often a request that failed is repeated, within that time.
    """
    endpoint = dict(environment).get("AWS_ENDPOINT_URL", "")
    return S3Store(
        bucket,
        # obstore refuses plain HTTP unless it is asked for, which only the user's own endpoint does.
        client_options=_client_options(limit, attempt) | {"allow_http": endpoint.startswith("http://")},
        retry_config=_retry_config(limit, attempt, retries),
    )


@functools.lru_cache(maxsize=16)
def _gcs_store(
    bucket: str, environment: tuple[tuple[str, str], ...], limit: float, attempt: float, retries: int
) -> GCSStore:
    """As `_s3_store`."""
    return GCSStore(
        bucket,
        client_options=_client_options(limit, attempt),
        retry_config=_retry_config(limit, attempt, retries),
    )


def _client_options(limit: float, attempt: float) -> Any:
    return {
        "connect_timeout": timedelta(seconds=_connect_seconds(limit)),
        "read_timeout": timedelta(seconds=attempt),
        "timeout": timedelta(seconds=max(_ANSWER_SECONDS, 2 * attempt)),
    }


def _retry_config(limit: float, attempt: float, retries: int) -> Any:
    return {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=0.7 * (attempt + limit / 2)),  # over before a third attempt would begin
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
