"""What a caching task computes of a store, whatever it keeps: all logits of a row, or what its targets have.

prepare_store(job)                                   once, before the first shard
cache_shards(job, missing_shards(job.store))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from akd_dist.distill import target_shards, teacher
from akd_dist.distill.teacher import CacheJob
from akd_dist.storage.layout import TARGETS_FORMAT, Shard
from akd_dist.storage.records import Loss, Probe, Receipt

Kept = np.ndarray | Mapping[str, np.ndarray]


def prepare_store(job: CacheJob, item: object = None) -> None:
    """Make what a store has once for all shards: harmless to repeat.

    Args:
        item: nothing; a task has one.

    Raises:
        AkdError: as `target_shards.make_tables`.
    """
    if job.store.creation.identity.tables:
        target_shards.make_tables(job)


def cache_shard(job: CacheJob, shard: Shard) -> Receipt:
    """Compute a shard and publish it, with its receipt; as `cache_shards`."""
    return cache_shards(job, [shard])[0]


def cache_shards(job: CacheJob, shards: Sequence[Shard]) -> list[Receipt]:
    """Compute shards and publish each with its receipt. Harmless to repeat, and to do twice at once.

    Raises:
        AkdError: as `teacher.cache_shards` and `target_shards.cache_target_shards`.
    """
    new = job.store.creation.identity.format >= TARGETS_FORMAT
    return target_shards.cache_target_shards(job, shards) if new else teacher.cache_shards(job, shards)


def compute_shard(
    job: CacheJob, shard: Shard, adopted: np.ndarray | None = None
) -> tuple[Kept, float | None, list[Probe], Loss | None]:
    """What is stored of a shard, and what is said of it, down to the last bit; as `storage.repair` wants it."""
    if job.store.creation.identity.format >= TARGETS_FORMAT:
        return target_shards.compute_target_shard(job, shard)
    return teacher.compute_shard(job, shard, adopted)


def make_table(job: CacheJob, name: str) -> dict[str, Any]:
    """A table of a store by its name, made anew to the same bytes."""
    return dict(target_shards.make_table(job, name))
