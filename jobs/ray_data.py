"""Stores as Ray Data: rows with the teacher's logits, read shard by shard on whichever nodes there are."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from akd_dist.base.errors import RefusedError
from akd_dist.base.places import absolute
from akd_dist.distill.dataset import DatasetJob, named_tensors
from akd_dist.distill.stream import BatchStream
from akd_dist.jobs import cluster
from akd_dist.jobs.opening import found, job_of
from akd_dist.options import RayDatasetOptions
from akd_dist.recipe import Recipe
from akd_dist.storage.layout import MANIFEST_KEY
from akd_dist.storage.mean import AnyStore, StoreRef, open_logits
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.roots import open_root

if TYPE_CHECKING:
    from ray.data import Dataset as Dataset

Columns = dict[str, np.ndarray]


def ray_dataset(options: RayDatasetOptions) -> Dataset:
    """`akd_dist.ray_dataset`."""
    store = _store(options)
    if store is not None:
        store.check_logits()  # before Ray is asked for anything
        return _read(store, functools.partial(read_logits, store.uri), options)
    with found(options.of_recipe()) as there:
        needed = there.needed(options.split)
        job = job_of(there, options.split)
        return _read(needed, functools.partial(read_rows, dataclasses.replace(job, store=None), needed.ref), options)


def _store(options: RayDatasetOptions) -> LogitStore | None:
    """The store that is named, if it is one."""
    if isinstance(options.source, LogitStore):
        return options.source
    if isinstance(options.source, Recipe):
        return None
    place = absolute(options.source)
    return open_store(place) if open_root(place).exists(MANIFEST_KEY) else None


def _read(store: AnyStore, read: Any, options: RayDatasetOptions) -> Dataset:
    try:
        import ray.data
    except ImportError as error:
        raise RefusedError(
            "ray.data cannot be imported", got=error, expected="Ray Data", next="pip install 'akd-dist[ray-data]'"
        ) from error
    cluster.connect(options.address)
    shards = ray.data.range(store.layout.shard_count, override_num_blocks=store.layout.shard_count)
    return shards.map_batches(read, batch_size=1, zero_copy_batch=True)


def read_logits(uri: str, shards: Columns) -> Columns:
    """Shards of a store, by number: columns `view`, `row`, `logits`."""
    store = _opened(uri)
    parts = [_of_shard(store, int(number)) for number in shards["id"]]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_rows(job: DatasetJob, ref: StoreRef, shards: Columns) -> Columns:
    """The same, with inputs as the view shows them, and labels; the logits are `teacher_logits`."""
    stream, store = _stream(job), _opened(ref)
    parts = []
    for number in shards["id"]:
        logits = _of_shard(store, int(number))
        inputs, labels, _ = stream.gather(logits["row"], int(logits["view"][0]), None)
        shown = named_tensors(stream.rows, logits["row"], inputs, labels, None)
        part = {name: values.numpy() for name, values in shown.items()}
        parts.append(part | {"view": logits["view"], "teacher_logits": logits["logits"]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _of_shard(store: AnyStore, number: int) -> Columns:
    shard = store.layout.shard(*divmod(number, store.layout.shards_per_view))
    row = np.arange(shard.start, shard.stop)
    logits = store.rows(shard.view, shard.start, shard.stop)
    return {"view": np.full(len(row), shard.view, dtype=np.int32), "row": row, "logits": logits}


# A worker of Ray reads many shards of few stores.
_opened = functools.lru_cache(maxsize=4)(open_logits)


_STREAMS: dict[str, BatchStream] = {}


def _stream(job: DatasetJob) -> BatchStream:
    """The rows of a job as this process has them mapped."""
    key = repr(job)
    if key not in _STREAMS:
        _STREAMS.clear()
        _STREAMS[key], _ = job.stream()
    return _STREAMS[key]
