"""The teacher: logits of a block of rows, and of a whole shard of a store.

`cache_shard` is what a Ray task runs; a plain loop does the same without Ray:

    for shard in missing_shards(job.store):
        cache_shard(job, shard)
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.base.trusted import Trusted
from akd_dist.data.encoded import ahead, batches_ahead
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import Rows
from akd_dist.data.views import begin_view, view_digests
from akd_dist.models.build import changed_source
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, device_name, set_deterministic, weights_dtype
from akd_dist.models.folder import NOBODY, read_model
from akd_dist.storage.content import renewing
from akd_dist.storage.layout import Shard
from akd_dist.storage.manifest import Identity
from akd_dist.storage.records import Loss, Probe, Receipt
from akd_dist.storage.rows import SealedRows
from akd_dist.storage.writer import StoreWriter, adopt_shard, as_stored, write_shard

log = logging.getLogger(__name__)

PROBES = 32
"""Rows of each view that are remembered, evenly spaced: their augmented pixels, and what storing changed in logits."""
_PROBES_OF_A_SHARD = 4  # before format 3, where each shard had its own


@dataclass(frozen=True)
class CacheJob:
    """What a task needs to compute any shard of a store: small, picklable, every path absolute."""

    store: StoreWriter
    """Where the logits go, and the identity they must have."""
    data: recipe.DataSpec
    """The dataset; prepared on the worker's node if it is not there yet."""
    split: str
    """`train`, `validation` or `test`."""
    teacher_uri: str
    """The teacher's model folder."""
    teacher: str
    """The teacher's fingerprint as the driver saw it, see `served_fingerprint`."""
    augmentation: recipe.Augmentation
    """How the split's views are drawn; none for validation and test."""
    cache: recipe.CacheSpec
    """Batch rows, threads and precision."""
    cache_root: str
    """Prepared data of this node."""
    trusted: Trusted = NOBODY
    """Which factories the teacher's folder may name, as the driver's recipe has it."""
    device: str = "cpu"
    """Where the teacher computes: `cpu`, or `cuda` for this process's GPU."""
    rows: SealedRows | None = None
    """Where the rows lie for every node; None where each prepares them."""


def teacher_logits(
    module: nn.Module, inputs: torch.Tensor, batch_rows: int, precision: recipe.Precision = "float32"
) -> np.ndarray:
    """The teacher's raw logits, float32 [n, classes] whatever it computes with, of inputs [n, *shape].

    Every batch has the same number of rows, the last one padded with copies of its first row: kernels choose their
    order of summation by the batch's shape, so batches of another size may differ in the last bit.

    Args:
        module: on any device, its weights in `weights_dtype(precision)`.
        inputs: on any device.
    """
    module.eval()
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    blocks = []
    with torch.inference_mode():
        for start in range(0, len(inputs), batch_rows):
            batch = inputs[start : start + batch_rows].to(device)
            padding = batch[:1].expand(batch_rows - len(batch), *batch.shape[1:])
            with autocast(device, precision):
                logits = module(torch.cat([batch, padding]))
            blocks.append(logits[: len(batch)].float().cpu().numpy())
    return np.concatenate(blocks)


def served_fingerprint(card: ModelCard, precision: recipe.Precision) -> str:
    """The teacher as stores know it: its own fingerprint in float32, and by the code that it was saved with.

    In another precision it is another teacher; so it is where the file of its factory has changed, as its logits may.

    Raises:
        RefusedError: its factory cannot be imported.
    """
    found = card.fingerprint if precision == "float32" else sha256(canonical_json([card.fingerprint, precision]))
    source = changed_source(card)
    return found if source is None else sha256(canonical_json([found, {"source": source}]))


@functools.lru_cache(maxsize=2)
def load_teacher(
    uri: str,
    fingerprint: str,
    precision: recipe.Precision = "float32",
    device: str = "cpu",
    trusted: Trusted = NOBODY,
) -> nn.Module:
    """The teacher in eval mode, on a device and in the dtype of a precision, loaded once in a process.

    Raises:
        RefusedError: the folder holds another teacher than `fingerprint` says, or none.
        DamagedError: its weights are not those that were saved.
    """
    module, card = read_model(uri, trusted)
    found = served_fingerprint(card, precision)
    if found != fingerprint:
        raise RefusedError(
            f"the teacher in {uri} has changed",
            got=f"fingerprint {found[:16]}",
            expected=f"fingerprint {fingerprint[:16]}, as when the store was begun",
            next="run the same command again: another teacher makes another store",
        )
    return module.to(torch.device(device), weights_dtype(precision))


def cache_shard(job: CacheJob, shard: Shard) -> Receipt:
    """Compute a shard and publish it, with its receipt. Harmless to repeat, and to do twice at once.

    Raises:
        RefusedError: data or teacher are not what the store is for, or logits are not finite; names the rows.
        MachineError: this process has not the device that the store is computed on.
        DamagedError, MachineError: as `write_shard`.
        CorruptCacheError: the rows are not what was prepared, and were not when they were prepared anew.
    """
    started = time.perf_counter()
    adopted = adopt_shard(job.store, shard)
    logits, agreement, probes, loss = renewing(functools.partial(compute_shard, job, shard, adopted), log.warning)
    seconds = time.perf_counter() - started if adopted is None else 0.0  # what was found was not timed
    return write_shard(job.store, shard, logits, label_agreement=agreement, probes=probes, seconds=seconds, loss=loss)


def compute_shard(
    job: CacheJob, shard: Shard, adopted: np.ndarray | None = None
) -> tuple[np.ndarray, float | None, list[Probe], Loss | None]:
    """A shard's logits, float32 [shard.rows, classes], the share of rows whose label they choose, probe views and loss.

    The logits are those that a reader of the store will have: rounded as its encoding rounds them. So the share is a
    function of the stored bytes, whoever works it out. It is None for regression, where no label is chosen, and where
    no row of the shard has a label.

    A pure function of the job and the shard, down to the last bit: threads and batch rows are fixed by the recipe.

    Args:
        adopted: the logits as they were found stored, where only what is to be said of them is missing.
    """
    if adopted is not None:
        labelled = _rows_of(job).labels[shard.start : shard.stop]
        return adopted, *_remember(job, shard, adopted, labelled), None  # only what is stored as it is can be adopted
    set_deterministic(job.device, job.cache.threads)
    _check_device(job)
    precision = job.cache.precision
    rows = _rows_of(job)
    module = load_teacher(job.teacher_uri, job.teacher, precision, job.device, job.trusted)
    blocks, labels = [], []

    def begin(start: int) -> Callable[[], torch.Tensor]:
        numbers = np.arange(start, min(start + job.cache.batch_rows, shard.stop))
        block = rows.inputs.take(numbers, axis=0)
        labels.append(rows.labels.take(numbers))
        return begin_view(job.augmentation, job.data.seed, block, numbers, shard.view, rows.tokens, job.device)

    begun = map(begin, range(shard.start, shard.stop, job.cache.batch_rows))
    for inputs in ahead(begun, batches_ahead(rows.inputs, job.cache.batch_rows)):
        blocks.append(teacher_logits(module, inputs, job.cache.batch_rows, precision))
    identity = job.store.creation.identity
    computed = np.concatenate(blocks)
    logits = as_stored(identity, computed, shard.start)
    compared = probe_rows(identity, shard) - shard.start
    loss = Loss.between(computed[compared], logits[compared], classification=rows.task == "classification")
    return logits, *_remember(job, shard, logits, np.concatenate(labels)), loss


def probe_rows(identity: Identity, shard: Shard) -> np.ndarray:
    """Row numbers of a shard that its receipt remembers, int64, perhaps none: its part of those of the view."""
    if identity.format > 2:
        numbers = np.unique(np.linspace(0, identity.rows - 1, PROBES).astype(np.int64))
        return numbers[(shard.start <= numbers) & (numbers < shard.stop)]
    return np.unique(np.linspace(shard.start, shard.stop - 1, _PROBES_OF_A_SHARD).astype(np.int64))


def _check_device(job: CacheJob) -> None:
    """Refuse a card other than the one that the store is pinned to: its last bits may differ."""
    here, pinned = device_name(job.device), job.store.creation.computed.device
    if here != pinned:
        raise MachineError(
            "this node computes on another device than the store is computed on",
            got=here,
            expected=pinned,
            next="run where every node has that device, or begin another store: another --store-root",
        )


def _remember(job: CacheJob, shard: Shard, logits: np.ndarray, labels: np.ndarray) -> tuple[float | None, list[Probe]]:
    """What a receipt says of a shard's rows: agreement with their labels, and a few views.

    Raises:
        CorruptCacheError: the rows that were read for the shard are not what was prepared.
    """
    rows = _rows_of(job)
    agreement, labelled = None, max(0, min(shard.stop, rows.labelled) - shard.start)  # the first rows have labels
    if rows.task == "classification" and labelled:
        agreement = float(np.mean(logits[:labelled].argmax(axis=1) == labels[:labelled]))
    numbers = probe_rows(job.store.creation.identity, shard)
    shown = view_digests(job.augmentation, job.data.seed, rows.inputs, numbers, shard.view, rows.tokens, job.device)
    try:
        # After they were read, and before anything is published that rests on them. Rows that were fetched for this
        # alone were compared with their hash then, and lie in no file that could have changed.
        if rows.held:
            rows.content(shard.start, shard.stop).verify()
    except CorruptCacheError:
        # The map that this process keeps shows the wrong bytes as long as it lives, so the rows are opened again.
        del _rows[rows.fingerprint]
        raise
    return agreement, shown


_rows: dict[str, Rows] = {}


def _rows_of(job: CacheJob) -> Rows:
    """The job's rows, opened once in a process."""
    fingerprint = job.store.creation.identity.dataset
    if fingerprint not in _rows:
        splits = rows_for(job.data, Path(job.cache_root), {job.split: fingerprint}, job.rows, in_order=True)
        rows: Rows = getattr(splits, job.split)
        rows.check_same(job.store.creation.dataset)
        _rows[fingerprint] = rows
    return _rows[fingerprint]


def forget() -> None:
    """Let go of the teachers and rows that this process keeps."""
    load_teacher.cache_clear()
    _rows.clear()
