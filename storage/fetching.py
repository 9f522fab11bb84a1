"""Objects of a store as they are fetched, several at a time where each takes its time; what may be wrong with one."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from akd_dist.base.files import sha256
from akd_dist.storage.layout import Shard, StoredArray
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, Stat
from akd_dist.storage.records import ObjectRecord

Item = tuple[Shard, StoredArray]
"""One of the objects of a shard."""


def fetch_ahead(
    items: Sequence[Item], fetch: Callable[[Item], bytes], most: int
) -> Iterator[tuple[Item, Callable[[], bytes]]]:
    """Each item with what gives its bytes: fetched by threads before it is asked for, `most` of them at a time."""
    if not most or len(items) < 2:
        yield from ((item, functools.partial(fetch, item)) for item in items)
        return
    with ThreadPoolExecutor(most) as pool:
        coming = collections.deque[tuple[Item, Future[bytes]]]()
        waiting = iter(items)
        try:
            for item in itertools.islice(waiting, most):
                coming.append((item, pool.submit(fetch, item)))
            while coming:
                item, future = coming.popleft()
                yield item, future.result
                for following in itertools.islice(waiting, 1):
                    coming.append((following, pool.submit(fetch, following)))
        finally:
            for _, future in coming:  # of a shard that was no good, nobody asks for those that follow
                future.cancel()


def key_of(shard: Shard, array: StoredArray) -> str:
    """The key of one of a shard's objects, relative to `arrays.zarr`."""
    return array.key(shard.view, shard.index)


def table_problem(objects: ObjectRoot, record: ObjectRecord, stat: Stat | None, *, deep: bool) -> str | None:
    """What is wrong with an object of a table, as far as its size or, if asked for, its bytes tell."""
    if stat is None:
        return missing(objects, record.key)
    if stat.size != record.size:
        return f"{stat.size:,} bytes instead of {record.size:,}"
    if not deep:
        return None
    try:
        digest = sha256(objects.get(record.key))
    except ObjectMissing:
        return missing(objects, record.key)
    return None if digest == record.sha256 else f"sha256 {digest} instead of {record.sha256}"


def missing(objects: ObjectRoot, key: str) -> str:
    """What is wrong with an object that is not there."""
    path = objects.local_path(key)
    # For zarr a folder in the place of a shard is absent as well, and reads as the fill value without an error.
    return "is a folder" if path is not None and path.is_dir() else "is missing"
