"""The teacher: logits of a block of rows, and of whole shards of a store.

`cache_shards` is what a Ray task runs; a plain loop does the same without Ray:

    cache_shards(job, missing_shards(job.store))
"""

import collections
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.base.memory import keep_freed_memory
from akd_dist.base.threads import Behind, made_ahead
from akd_dist.base.trusted import Trusted
from akd_dist.data.encoded import ahead, batches_ahead
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import Rows
from akd_dist.data.views import begin_views, digest_of, view_digests
from akd_dist.models.build import changed_source
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, device_name, set_deterministic
from akd_dist.models.folder import NOBODY, read_model
from akd_dist.models.inference import COMPILERS, compiled_by, prepared
from akd_dist.models.language import Blocks
from akd_dist.storage.content import renewing
from akd_dist.storage.layout import Shard
from akd_dist.storage.manifest import Identity
from akd_dist.storage.records import Loss, Probe, Receipt
from akd_dist.storage.rows import SealedRows
from akd_dist.storage.writer import StoreWriter, adopt_shard, as_stored, receipt_there, write_shard

log = logging.getLogger(__name__)

PROBES = 32
"""Rows of each view that are remembered, evenly spaced: their augmented pixels, and what storing changed in logits."""
BAND_BYTES = 64 * 2**20
"""Logits of shards that are computed together, in float32; and as many may wait until they are published."""
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


def served_fingerprint(card: ModelCard, cache: recipe.CacheSpec) -> str:
    """The teacher as stores know it: its own fingerprint in float32, and by the code that it was saved with.

    In another precision it is another teacher; so it is where it is run in another way, and where the file of its
    factory has changed, as its logits may.

    Raises:
        RefusedError: its factory cannot be imported.
    """
    found, source = card.fingerprint, changed_source(card)
    if cache.precision != "float32":
        found = sha256(canonical_json([found, cache.precision]))
    if cache.inference:
        found = sha256(canonical_json([found, {"inference": cache.inference}]))
    return found if source is None else sha256(canonical_json([found, {"source": source}]))


@functools.lru_cache(maxsize=2)
def load_teacher(
    uri: str,
    fingerprint: str,
    cache: recipe.CacheSpec,
    device: str = "cpu",
    cache_root: str = "",
    trusted: Trusted = NOBODY,
    blocks: Blocks | None = None,
) -> nn.Module:
    """The teacher as a store's logits are computed with it, see `models.inference.prepared`: loaded once in a process.

    Args:
        blocks: of a language model, what it is to take.

    Raises:
        RefusedError: the folder holds another teacher than `fingerprint` says, or none.
        DamagedError: its weights are not those that were saved.
    """
    module, card = read_model(uri, trusted, blocks=blocks)
    found = served_fingerprint(card, cache)
    if found != fingerprint:
        raise RefusedError(
            f"the teacher in {uri} has changed",
            got=f"fingerprint {found[:16]}",
            expected=f"fingerprint {fingerprint[:16]}, as when the store was begun",
            next="run the same command again: another teacher makes another store",
        )
    return prepared(module, cache, device, Path(cache_root))


def cache_shard(job: CacheJob, shard: Shard) -> Receipt:
    """Compute a shard and publish it, with its receipt; as `cache_shards`."""
    return cache_shards(job, [shard])[0]


def cache_shards(job: CacheJob, shards: Sequence[Shard]) -> list[Receipt]:
    """Compute shards and publish each with its receipt. Harmless to repeat, and to do twice at once.

    A thread ahead makes the views of the next batch, and one behind encodes and publishes, while the teacher computes.
    Shards of the same rows are computed together, so that these are read and decoded once for all their views.

    Raises:
        RefusedError: data or teacher are not what the store is for, or logits are not finite; names the rows.
        MachineError: this process has not the device that the store is computed on.
        DamagedError, MachineError: as `write_shard`.
        CorruptCacheError: the rows are not what was prepared, and were not when they were prepared anew.
    """
    done = {shard: receipt for shard in shards if (receipt := receipt_there(job.store, shard)) is not None}

    def rest() -> None:
        _cache(job, [shard for shard in shards if shard not in done], done)

    renewing(rest, log.warning)
    return [done[shard] for shard in shards]


def _cache(job: CacheJob, shards: Sequence[Shard], done: dict[Shard, Receipt]) -> None:
    """Publish shards, each noted as done once its receipt is there."""

    def publish(answered: _Answered) -> None:
        logits, agreement, probes, loss = _said(job, answered)
        done[answered.shard] = write_shard(
            job.store,
            answered.shard,
            logits,
            label_agreement=agreement,
            probes=probes,
            seconds=answered.seconds,
            loss=loss,
        )

    found = {shard: adopt_shard(job.store, shard) for shard in shards}
    missing = [shard for shard, logits in found.items() if logits is None]
    together = bands(missing, job.store.layout.classes)
    most = max((len(band) for band in together), default=1)
    with Behind(most, "publishing") as behind, contextlib.closing(_answers(job, together)) as answers:
        # Read by this thread alone before another one begins to.
        adopted = [_adopted(job, shard, logits) for shard, logits in found.items() if logits is not None]
        for answered in itertools.chain(adopted, answers):
            behind.put(functools.partial(publish, answered))


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
        return _said(job, _adopted(job, shard, adopted))
    with contextlib.closing(_answers(job, [[shard]])) as answers:
        return _said(job, next(answers))


@dataclass(frozen=True, eq=False)
class _Shown:
    """A batch of a shard's rows, as its view shows them to the teacher."""

    shard: Shard
    inputs: torch.Tensor
    labels: np.ndarray
    probes: list[Probe]
    """Those of its rows that the receipt remembers."""


@dataclass(frozen=True, eq=False)
class _Answered:
    """A shard whose logits are there, and what is known of its rows."""

    shard: Shard
    logits: np.ndarray
    """Float32 [shard.rows, classes]: as the teacher gave them, or as they were found stored."""
    labels: np.ndarray
    probes: list[Probe]
    seconds: float
    """How long they took; 0 of those that were found, which were not timed."""
    adopted: bool = False
    verify: bool = True
    """Whether its rows are still to be verified: those of a band are, with its first shard."""


def bands(shards: Iterable[Shard], classes: int) -> list[list[Shard]]:
    """Shards of the same rows together, as far as BAND_BYTES allow: they are computed at the same time."""
    same_rows: dict[tuple[int, int], list[Shard]] = {}
    for shard in shards:
        same_rows.setdefault((shard.start, shard.stop), []).append(shard)
    found = []
    for (start, stop), alike in same_rows.items():
        most = max(1, BAND_BYTES // (4 * classes * (stop - start)))
        found += [alike[first : first + most] for first in range(0, len(alike), most)]
    return found


def _answers(job: CacheJob, together: Sequence[Sequence[Shard]]) -> Generator[_Answered, None, None]:
    """The teacher's logits of bands of shards, while a thread ahead shows what comes next."""
    if not together:
        return
    keep_freed_memory()
    set_deterministic(job.device, job.cache.threads)
    check_device(job)
    module = load_teacher(job.teacher_uri, job.teacher, job.cache, job.device, job.cache_root, job.trusted)
    parts = collections.defaultdict[Shard, list[tuple[np.ndarray, np.ndarray, list[Probe]]]](list)
    seconds = collections.defaultdict[Shard, float](float)
    first = {band[0] for band in together}
    began = time.perf_counter()
    with contextlib.closing(made_ahead(_shown(job, together), "views")) as batches:
        for batch in batches:
            shard = batch.shard
            logits = teacher_logits(module, batch.inputs, job.cache.batch_rows, job.cache.precision)
            parts[shard].append((logits, batch.labels, batch.probes))
            began, seconds[shard] = (now := time.perf_counter()), seconds[shard] + now - began
            if sum(len(labels) for _, labels, _ in parts[shard]) == shard.rows:
                blocks, labels, probes = zip(*parts.pop(shard), strict=True)
                told = list(itertools.chain(*probes))
                yield _Answered(
                    shard,
                    np.concatenate(blocks),
                    np.concatenate(labels),
                    told,
                    seconds.pop(shard),
                    verify=shard in first,
                )
                began = time.perf_counter()


def _shown(job: CacheJob, together: Sequence[Sequence[Shard]]) -> Generator[_Shown, None, None]:
    """Batches of rows, each as the view of every shard of its band shows it: rows are taken and decoded once."""
    rows, identity = rows_of(job), job.store.creation.identity
    size = job.cache.batch_rows

    def begin(band: Sequence[Shard], start: int) -> Callable[[], Iterator[_Shown]]:
        numbers = np.arange(start, min(start + size, band[0].stop))
        block, labels = rows.inputs.take(numbers, axis=0), rows.labels.take(numbers)
        views = [shard.view for shard in band]
        begun = begin_views(job.augmentation, job.data.seed, block, numbers, views, rows.tokens, job.device)
        places = np.flatnonzero(np.isin(numbers, probe_rows(identity, band[0])))

        def shown() -> Iterator[_Shown]:
            for shard, view in zip(band, begun, strict=True):
                inputs = view()
                seen = zip(numbers[places].tolist(), inputs[places].cpu().numpy(), strict=True)
                probes = [digest_of(job.augmentation, row, one, shard.view) for row, one in seen]
                yield _Shown(shard, inputs, labels, probes)

        return shown

    begun = (begin(band, start) for band in together for start in range(band[0].start, band[0].stop, size))
    # Batches that are begun ahead are decoded for all views of a band at once.
    widest = max(map(len, together))
    for views in ahead(begun, -(-batches_ahead(rows.inputs, size) // widest)):
        yield from views


def _adopted(job: CacheJob, shard: Shard, logits: np.ndarray) -> _Answered:
    """A shard as it was found stored: only what is stored as it is can be, see `adopt_shard`."""
    rows = rows_of(job)
    numbers = probe_rows(job.store.creation.identity, shard)
    shown = view_digests(job.augmentation, job.data.seed, rows.inputs, numbers, shard.view, rows.tokens, job.device)
    return _Answered(shard, logits, rows.labels[shard.start : shard.stop], shown, 0.0, adopted=True)


def _said(job: CacheJob, answered: _Answered) -> tuple[np.ndarray, float | None, list[Probe], Loss | None]:
    """As `compute_shard`, of logits that are there.

    Raises:
        CorruptCacheError: the rows that were read for the shard are not what was prepared.
    """
    shard, rows, identity = answered.shard, rows_of(job), job.store.creation.identity
    logits, loss = answered.logits, None
    if not answered.adopted:
        logits, compared = as_stored(identity, answered.logits, shard.start), probe_rows(identity, shard) - shard.start
        loss = Loss.between(answered.logits[compared], logits[compared], classification=rows.task == "classification")
    if answered.verify:
        verify_rows(rows, shard.start, shard.stop)
    return logits, _agreement(rows, shard, logits, answered.labels), answered.probes, loss


def _agreement(rows: Rows, shard: Shard, logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The share of a shard's rows with labels whose label the teacher chooses."""
    labelled = max(0, min(shard.stop, rows.labelled) - shard.start)  # the first rows have labels
    if rows.task != "classification" or not labelled:
        return None
    return float(np.mean(logits[:labelled].argmax(axis=1) == labels[:labelled]))


def verify_rows(rows: Rows, start: int, stop: int) -> None:
    """Hash rows start..stop - 1, after they were read, and before anything is published that rests on them.

    Rows that were fetched for this alone were compared with their hash then, and lie in no file that could have
    changed.
    """
    try:
        if rows.held:
            rows.content(start, stop).verify()
    except CorruptCacheError:
        # The map that this process keeps shows the wrong bytes as long as it lives, so the rows are opened again.
        _rows.pop(rows.fingerprint, None)
        raise


def probe_rows(identity: Identity, shard: Shard) -> np.ndarray:
    """Row numbers of a shard that its receipt remembers, int64, perhaps none: its part of those of the view."""
    if identity.format > 2:
        numbers = np.unique(np.linspace(0, identity.rows - 1, PROBES).astype(np.int64))
        return numbers[(shard.start <= numbers) & (numbers < shard.stop)]
    return np.unique(np.linspace(shard.start, shard.stop - 1, _PROBES_OF_A_SHARD).astype(np.int64))


def check_device(job: CacheJob) -> None:
    """Refuse a card or a compiler other than those that the store is pinned to: the last bits may differ."""
    computed = job.store.creation.computed
    pairs = [("device", device_name(job.device), computed.device)]
    if job.cache.compile:
        here = compiled_by(job.device)
        pinned_to = {name: version for name, version in computed.versions.items() if name in COMPILERS}
        pairs += [("compiler", here.get(name, "none"), version) for name, version in pinned_to.items()]
    for what, found, pinned in pairs:
        if found != pinned:
            raise MachineError(
                f"this node computes on another {what} than the store is computed on",
                got=found,
                expected=pinned,
                next=f"run where every node has that {what}, or begin another store: another --store-root",
            )


_rows: dict[str, Rows] = {}


def rows_of(job: CacheJob) -> Rows:
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
