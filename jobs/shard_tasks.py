"""Missing shards dealt out to tasks: as many to each as take some seconds, and fewer towards the end.

What a task works on overlaps: it publishes one shard while it computes the next, and decodes rows once for all views of
them that it was given. What is lost with a task, and what others wait for at the end, grows with its size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from akd_dist.jobs.tasks import Task
from akd_dist.storage.layout import Shard
from akd_dist.storage.records import Receipt

TASK_SECONDS = 10.0
"""How long a task may take, by what shards took before; one shard at least. So much is lost where a worker dies."""
_LATEST = 64
"""Shards by which that is reckoned."""


class ShardTasks:
    """Tasks for `cache_shards`, made when they are wanted. Iterate over it once.

    Args:
        at_once: how many tasks run at a time, as it is now.
    """

    def __init__(self, at_once: Callable[[], int]) -> None:
        self._at_once = at_once
        self._waiting: list[tuple[str, Any, list[Shard]]] = []
        self._seconds: list[float] = []
        self.rows = self.count = 0

    def add(self, name: str, job: Any, shards: Sequence[Shard]) -> None:
        """Have shards computed, those of the same rows one after the other.

        Args:
            name: of what they are, for messages.
        """
        self._waiting.append((name, job, sorted(shards, key=lambda shard: (shard.index, shard.view))))
        self.rows += sum(shard.rows for shard in shards)
        self.count += len(shards)

    def took(self, receipts: Sequence[Receipt]) -> None:
        """Learn from what was computed; what was only found says nothing."""
        self._seconds += [receipt.seconds for receipt in receipts if receipt.seconds]
        del self._seconds[:-_LATEST]

    def __iter__(self) -> Iterator[Task]:
        while self._waiting:
            name, job, shards = self._waiting[0]
            size = len(_whole_bands(shards[: self._size()]))
            taken, shards[:size] = shards[:size], []
            if not shards:
                self._waiting.pop(0)
            self.count -= size
            more = "" if size == 1 else f" and {size - 1} more"
            yield Task(f"{name}, {taken[0]}{more}", job, taken, size)

    def _size(self) -> int:
        if not self._seconds:
            return 1
        # Half of what is left, shared out: the last tasks are small, and nobody waits long for the very last.
        share = -(-self.count // (2 * self._at_once()))
        return max(1, min(share, int(TASK_SECONDS / statistics.median(self._seconds))))


def _whole_bands(shards: Sequence[Shard]) -> list[Shard]:
    """The first of them, without the last rows unless they are the only ones: another task would decode them again."""
    same_rows = [list(band) for _, band in groupby(shards, key=lambda shard: shard.index)]
    return [shard for band in same_rows[: max(1, len(same_rows) - 1)] for shard in band]
