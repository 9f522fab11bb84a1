"""Shards of stores that describe logits, or keep those of several targets a row: computed and published by tasks.

Before the first of them a task makes what the store has once: offsets, and of `top_k` the dictionary with its card.

    make_tables(job)
    cache_target_shards(job, missing_shards(job.store))
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, RefusedError
from akd_dist.base.memory import keep_freed_memory
from akd_dist.base.threads import Behind
from akd_dist.data.rows import Rows
from akd_dist.data.views import view_digests
from akd_dist.distill.cards import MEASURED, MEASURED_ROWS, card_of, tail_dictionary
from akd_dist.distill.dictionary import Probe as DictionaryProbe, make_dictionary
from akd_dist.distill.target_teacher import Batch, LanguageTeacher, TargetTeacher, WideTeacher
from akd_dist.distill.teacher import CacheJob, check_device, load_teacher, probe_rows, rows_of, verify_rows
from akd_dist.models.card import blocks_of
from akd_dist.models.device import set_deterministic
from akd_dist.models.language import LanguageModel
from akd_dist.storage.content import renewing
from akd_dist.storage.dictionary import DICTIONARY, Dictionary
from akd_dist.storage.layout import LOGITS, Shard, StoreLayout
from akd_dist.storage.records import Loss, Probe, Receipt
from akd_dist.storage.tables import OFFSETS, find_dictionary, find_fidelity, put_dictionary, put_fidelity, put_offsets
from akd_dist.storage.top_k import Described, TopK
from akd_dist.storage.writer import receipt_there, write_shard

log = logging.getLogger(__name__)

FEWEST_TARGETS = 4096
"""Targets that a dictionary is made from at least, as far as there are so many, where few rows have fewer."""
Arrays = Mapping[str, np.ndarray]


class Computed(NamedTuple):
    """A shard as `write_shard` takes it."""

    arrays: Arrays
    label_agreement: float | None
    """Share of its targets with a label whose label the teacher chooses; None where none has one."""
    probes: list[Probe]
    loss: Loss | None


def cache_target_shards(job: CacheJob, shards: Sequence[Shard]) -> list[Receipt]:
    """Compute shards and publish each with its receipt; a thread behind publishes while the teacher goes on.

    Harmless to repeat, and to do twice at once.

    Raises:
        RefusedError: data or teacher are not what the store is for, logits are not finite (names row and position), or
            the store has no dictionary yet.
        MachineError, DamagedError, CorruptCacheError: as `teacher.cache_shards`.
    """
    done = {shard: receipt for shard in shards if (receipt := receipt_there(job.store, shard)) is not None}

    def publish(shard: Shard, found: Computed, dictionary: str | None, seconds: float) -> None:
        arrays, agreement, probes, loss = found
        told: dict[str, Any] = {"label_agreement": agreement, "probes": probes, "seconds": seconds, "loss": loss}
        done[shard] = write_shard(job.store, shard, arrays, dictionary=dictionary, **told)

    def rest() -> None:
        with Behind(1, "publishing") as behind:
            for shard in shards:
                if shard not in done:
                    began, loaded = time.perf_counter(), _loaded_for(job)
                    found = loaded.compute(shard)
                    behind.put(
                        functools.partial(publish, shard, found, loaded.dictionary_sha256, time.perf_counter() - began)
                    )

    renewing(rest, log.warning)
    return [done[shard] for shard in shards]


def compute_target_shard(job: CacheJob, shard: Shard) -> Computed:
    """A shard's arrays and what is said of them: a pure function of the job and the shard, down to the last bit."""
    return _loaded_for(job).compute(shard)


def make_tables(job: CacheJob) -> None:
    """Publish what a store has once for all shards; harmless to repeat: what is there is left alone.

    Raises:
        RefusedError: there are too few targets for a dictionary, or logits are not finite.
    """

    def make() -> None:
        identity, writer = job.store.creation.identity, job.store
        if identity.items is not None:
            put_offsets(writer, make_table(job, OFFSETS)[OFFSETS])
        if not identity.is_top_k:
            return
        if (found := find_dictionary(writer)) is None:
            found = Dictionary.from_arrays(make_table(job, DICTIONARY)), ""
            put_dictionary(writer, found[0])
        if find_fidelity(writer.store, writer.creation_sha256) is None:
            teacher, top_k = _teacher_of(job), identity.top_k
            _, measured = drawn_rows(rows_of(job), top_k)
            put_fidelity(writer, card_of(teacher, measured, top_k, found[0]))

    renewing(make, log.warning)


def make_table(job: CacheJob, name: str) -> Arrays:
    """The arrays of a table by its name, `offsets` or `dictionary`: a pure function of the job."""
    rows = rows_of(job)
    if name == OFFSETS:
        return {OFFSETS: np.asarray(rows.offsets, np.int64)}
    teacher, top_k = _teacher_of(job), job.store.creation.identity.top_k
    made = dictionary_of_probe(teacher.probe(drawn_rows(rows, top_k)[0]), top_k, teacher.chunk)
    verify_rows(rows, 0, len(rows))
    return made.arrays()


def dictionary_of_probe(probe: DictionaryProbe, top_k: TopK, chunk: int) -> Dictionary:
    """The dictionary that an encoding has of some targets."""
    made = make_dictionary(probe, k=top_k.k, rank=top_k.rank, temperatures=top_k.tail_temperatures, chunk=chunk)
    return Dictionary.from_arrays({name: array.cpu().numpy() for name, array in made.items()})


def drawn_rows(rows: Rows, top_k: TopK) -> tuple[np.ndarray, np.ndarray]:
    """Rows that the dictionary is made from, and fewer others that its card is measured on: int64, ascending.

    They are drawn by the number of rows alone, since the identity of a store has no seed where no view is drawn. Where
    there are too few rows for both, they share them.
    """
    order = np.random.Generator(np.random.Philox(len(rows))).permutation(len(rows))
    order = order[np.diff(rows.offsets)[order] > 0]
    count = max(top_k.probe_rows, rows_for(rows, order, FEWEST_TARGETS))
    fitted, others = order[:count], order[count:]
    others = others if len(others) else fitted
    return np.sort(fitted), np.sort(others[: max(MEASURED_ROWS, rows_for(rows, others, MEASURED))])


def rows_for(rows: Rows, numbers: np.ndarray, targets: int) -> int:
    """How many of some rows, from the first on, have so many targets."""
    return int(np.searchsorted(np.cumsum(np.diff(rows.offsets)[numbers]), targets)) + 1


def teacher_for(
    module: torch.nn.Module,
    rows: Rows,
    cache: recipe.CacheSpec,
    layout: StoreLayout,
    augmentation: recipe.Augmentation,
    seed: int,
) -> TargetTeacher:
    """A teacher that is asked for targets of some rows.

    Args:
        module: prepared, see `models.inference.prepared`.
        layout: of the store that it is asked for.
    """
    if isinstance(module, LanguageModel):
        starts = np.arange(0, layout.rows, layout.shard_rows)
        stops = np.minimum(starts + layout.shard_rows, layout.rows)
        first = np.searchsorted(rows.offsets, starts, "right") - 1
        most = int((np.searchsorted(rows.offsets, stops, "left") - first).max())
        return LanguageTeacher(module, rows, cache, most)
    most = min(layout.shard_rows, layout.rows)
    return WideTeacher(module, rows, cache, most, augmentation, seed)


def _teacher_of(job: CacheJob) -> TargetTeacher:
    keep_freed_memory()
    set_deterministic(job.device, job.cache.threads)
    check_device(job)
    rows = rows_of(job)
    blocks = blocks_of(rows) if rows.task == "language_model" else None
    module = load_teacher(job.teacher_uri, job.teacher, job.cache, job.device, job.cache_root, job.trusted, blocks)
    return teacher_for(module, rows, job.cache, job.store.layout, job.augmentation, job.data.seed)


def _loaded_for(job: CacheJob) -> _Loaded:
    """The teacher and the dictionary of a store, loaded once for all shards that this process computes.

    Raises:
        RefusedError: a `top_k` store without a dictionary.
    """
    if (kept := _loaded.get(job.store.creation_sha256)) is not None and kept.rows is rows_of(job):
        return kept
    identity, found = job.store.creation.identity, None
    if identity.is_top_k and (found := find_dictionary(job.store)) is None:
        raise RefusedError(
            f"the store {job.store.uri} has no dictionary yet",
            got="none that its shards could be described by",
            expected="one, made before the first shard",
            next="run akd-dist cache-teacher again",
        )
    _loaded.clear()
    _loaded[job.store.creation_sha256] = _Loaded(job, _teacher_of(job), found)
    return _loaded[job.store.creation_sha256]


class _Loaded:
    """The teacher of a store and its dictionary, in memory."""

    def __init__(self, job: CacheJob, teacher: TargetTeacher, found: tuple[Dictionary, str] | None) -> None:
        self.job, self.teacher, self.rows = job, teacher, teacher.rows
        self.identity = job.store.creation.identity
        self.dictionary_sha256 = None if found is None else found[1]
        self._dictionary = None if found is None else tail_dictionary(found[0], self.identity.top_k, teacher.device)

    def compute(self, shard: Shard) -> Computed:
        """See `compute_target_shard`."""
        parts, chosen, labels, first = [], [], [], []
        span = self.teacher.span(shard.start, shard.stop)
        numbers = self._probed(shard)
        starts = self.rows.offsets[numbers]
        for batch in self.teacher.batches(shard.view, shard.start, shard.stop):
            if not len(batch.targets):
                continue
            arrays, ids, logits = self._kept(batch)
            parts.append(arrays)
            chosen.append(ids)
            labels.append(batch.labels)
            if logits is not None:
                at = np.flatnonzero(np.isin(batch.targets, starts))
                first.append((logits[at], arrays[LOGITS][at].astype(np.float32)))
        self._verify(span)
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Computed(
            joined,
            _agreement(np.concatenate(chosen), np.concatenate(labels)),
            self._digests(numbers, shard.view),
            _loss(first) if first else None,
        )

    def _digests(self, numbers: np.ndarray, view: int) -> list[Probe]:
        job, rows = self.job, self.rows
        return view_digests(job.augmentation, job.data.seed, rows.inputs, numbers, view, rows.tokens, job.device)

    def _kept(self, batch: Batch) -> tuple[Arrays, np.ndarray, np.ndarray | None]:
        """What is stored of a batch's targets, the class that the teacher chooses, and logits where they are stored."""
        teacher, encoded = self.teacher, self.identity.encoded
        named = functools.partial(teacher.named, batch)
        if isinstance(encoded, TopK):
            found = teacher.described(batch, encoded.k, encoded.tail_temperatures, self._dictionary)
            described = Described(**found.arrays())
            return encoded.pack(described, self.identity.classes, named), described.ids[:, 0], None
        logits = teacher.logits(batch).cpu().numpy()
        arrays = encoded.encode(logits, 0, named)
        return arrays, encoded.decode(arrays).argmax(1), logits

    def _probed(self, shard: Shard) -> np.ndarray:
        """Rows that its receipt remembers: those of the view's whose first target is in the shard."""
        if self.identity.items is None:
            return probe_rows(self.identity, shard)
        whole = Shard(shard.view, 0, 0, self.identity.rows)
        numbers, offsets = probe_rows(self.identity, whole), self.rows.offsets
        first = offsets[numbers]
        inside = (shard.start <= first) & (first < shard.stop) & (offsets[numbers + 1] > first)
        found: np.ndarray = numbers[inside]
        return found

    def _verify(self, span: range) -> None:
        try:
            verify_rows(self.rows, span.start, span.stop)
        except CorruptCacheError:
            _loaded.clear()  # it holds the rows that are opened again
            raise


_loaded: dict[str, _Loaded] = {}
"""Of the store that this process works on."""


def forget() -> None:
    """Let go of the teacher and dictionary that this process keeps."""
    _loaded.clear()


def _agreement(chosen: np.ndarray, labels: np.ndarray) -> float | None:
    labelled = labels >= 0
    return float(np.mean(chosen[labelled] == labels[labelled])) if labelled.any() else None


def _loss(first: Sequence[tuple[np.ndarray, np.ndarray]]) -> Loss:
    """Of the first target of each row that is remembered."""
    logits, stored = (np.concatenate(parts) for parts in zip(*first, strict=True))
    return Loss.between(logits, stored, classification=True)
