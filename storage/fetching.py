"""Objects of a store as they are fetched: several at a time where each takes its time."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from akd_dist.storage.layout import Shard, StoredArray

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
