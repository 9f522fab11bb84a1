"""Rows prepared once for a cluster: planned by one process, written block by block by many, sealed under a store root.

`row_blocks.write_run` is what a Ray task runs; a plain loop does the same without Ray:

    ensure_rows(data, store_root, lambda plan, take: [take(write_run(plan.job, run)) for run in plan.runs])

A block is BLOCK_ROWS rows of a split, which is what one digest of a fingerprint is over: so the fingerprint of the rows
is that of `row_cache.prepare`, whoever wrote which block.
"""

from __future__ import annotations

import base64
import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import MachineError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data import findings, splitting
from akd_dist.data.columns import NotGreyError
from akd_dist.data.documents import OpenedDocuments, count_documents, open_documents
from akd_dist.data.labels import Classes
from akd_dist.data.noted import Noted, lines_of
from akd_dist.data.origins import Origins, SourceCheck, Stamps, check_unchanged, compare, look_at, show, size_and_time
from akd_dist.data.packed import assigned_to, findings_of, layouts_of
from akd_dist.data.prepare import OpenedSource, in_colour, kept_as, kinds_of, open_sources, read_labels
from akd_dist.data.row_blocks import BlockRun, RowsJob, SourceFile
from akd_dist.data.row_cache import Progress, key_of
from akd_dist.data.row_runs import packed_runs, runs_of, segments_of
from akd_dist.data.rows import BLOCK_ROWS, SPLITS, meaning_of
from akd_dist.data.sources.base import local_files, remote_files
from akd_dist.data.splitting import (
    LEFT_OUT,
    RowCounts,
    reads_labels_first,
    rows_by_split,
    source_of_split,
    split_of_source,
)
from akd_dist.storage.layout import ROWS
from akd_dist.storage.roots import open_root
from akd_dist.storage.row_documents import (
    ENCODED_MANIFEST_FORMAT,
    ENCODED_ROWS_FORMAT,
    LABELLED_MANIFEST_FORMAT,
    MANIFEST_FORMAT,
    PACKED_ROWS_FORMAT,
)
from akd_dist.storage.rows import (
    ROWS_FORMAT,
    BlockReceipt,
    RowsCreation,
    RowsManifest,
    RowsWriter,
    SealedRows,
    SealedSplit,
    are_begun,
    begin_rows,
    find_rows,
    receipt_key,
    receipts_there,
    remove_rows,
    seal_rows,
    unseal_rows,
)


@dataclass(frozen=True)
class RowsPlan:
    """What is to be written, and what is known before it is."""

    job: RowsJob
    runs: list[BlockRun]
    """The blocks that are not there yet."""
    there: dict[str, BlockReceipt]
    """The receipts of those that are."""
    readings: Mapping[str, OpenedSource | OpenedDocuments]
    counts: np.ndarray
    """Rows by split and class, int64 [splits and what is left out, classes]; no classes for regression."""
    placed: RowCounts
    """How many rows there are of each kind."""
    lines: list[str]
    """Findings of classes."""
    origins: Origins
    stamps: Stamps
    packed: bool = False
    """Whether they are blocks of a language model."""

    @property
    def rows(self) -> int:
        """How many rows are to be written."""
        return sum(run.rows for run in self.runs)


Take = Callable[[list[BlockReceipt] | None], None]
"""Takes what `write_run` returns."""
Compute = Callable[[RowsPlan, Take], None]
"""Writes the blocks of all runs of a plan, and hands on what came of each."""


@dataclass(frozen=True)
class Prepared:
    """Rows that are sealed under a store root."""

    sealed: SealedRows
    manifest: RowsManifest
    sources: SourceCheck
    """Files that were believed, still to be read."""


def ensure_rows(
    data: recipe.DataSpec,
    store_root: str,
    compute: Compute,
    *,
    again: bool = False,
    hold: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
    on_progress: Progress | None = None,
) -> Prepared:
    """The rows of a recipe as sealed blocks under `<store_root>/rows/<id>/`, written if they are not there.

    What is there of them is not written again. The rows, their fingerprints and what is refused are those of
    `row_cache.prepare`; of several bad rows any may be named. The planning process reads labels alone, where the kind
    of source allows it, and holds about 40 bytes for each row of the source; a task holds one block.

    Args:
        data: sources, split and seed.
        store_root: folder or URI.
        compute: writes blocks.
        again: write all blocks anew, whatever is there.
        hold: called with the name under which they are held while they are written, as `claim_store` takes it.
        on_progress: as of `row_cache.prepare`.

    Raises:
        RecipeError, RefusedError: as `row_cache.prepare`.
        DamagedError: a block that was sealed is gone or cut; names it.
        HeldError: somebody else is writing them.
        MachineError: the root cannot be written, or has no room.
    """
    look = _Looked(data, store_root)
    tell = on_progress or (lambda what, done, total: None)
    if not again and (found := look.find()) is not None:
        return found
    with hold(f"{ROWS}/{look.ids[False]}"):
        # Whoever held them before may have sealed them.
        if not again and (found := look.find()) is not None:
            return found
        for colour in (False, True):
            if again or look.changed:
                unseal_rows(store_root, look.ids[colour])
        open_root(store_root).check_writable()
        if not are_begun(store_root, look.ids[True]):
            with contextlib.suppress(NotGreyError):
                return _write(look, compute, tell, colour=False)
            remove_rows(store_root, look.ids[False])
        # An image has colours and those before it were grey, so one channel was planned for all: begun again with
        # three, and the next command begins with these.
        return _write(look, compute, lambda what, done, total: tell(f"{what}, in colour", done, total), colour=True)


def find_prepared(data: recipe.DataSpec, store_root: str) -> Prepared | None:
    """The rows that `ensure_rows` would find there; None where it would write any. Nothing is changed."""
    return _Looked(data, store_root).find()


class _Looked:
    """The sources of a recipe's data, looked at and not opened."""

    def __init__(self, data: recipe.DataSpec, store_root: str) -> None:
        self.data, self.root = data, store_root
        self.kinds = kinds_of(data)
        keys = {name: kind.key() for name, kind in self.kinds.items()}
        self.files, self.objects = local_files(self.kinds, keys), remote_files(keys)
        key = {"rows_format": ROWS_FORMAT, **key_of(data, keys)}
        self.source = {False: key, True: key | {"colour": True}}
        self.ids = {colour: sha256(canonical_json(source)) for colour, source in self.source.items()}
        self.changed = False
        """Whether rows were found that were made from other content of the same files."""

    def find(self) -> Prepared | None:
        """The rows that are sealed, if their sources are not seen to have changed since."""
        for rows_id in (self.ids[True], self.ids[False]):
            if (found := find_rows(self.root, rows_id)) is not None:
                sealed, manifest = found
                origins, believed = compare(manifest.origins, self.files, self.kinds)
                if origins is None:
                    self.changed = True
                    return None
                forget = functools.partial(unseal_rows, self.root, rows_id)
                return Prepared(sealed, manifest, SourceCheck(believed, forget))
        return None


def _write(look: _Looked, compute: Compute, tell: Progress, *, colour: bool) -> Prepared:
    plan = _plan(look, tell, colour)
    receipts = dict(plan.there)

    def take(written: list[BlockReceipt] | None) -> None:
        if written is None:
            raise NotGreyError
        receipts.update({receipt.receipt_key: receipt for receipt in written})

    if plan.runs:
        _check_room(plan)
        compute(plan, take)
    sealed, manifest = _seal(plan, receipts)
    return Prepared(sealed, manifest, SourceCheck({}, lambda: None))


def _plan(look: _Looked, tell: Progress, colour: bool) -> RowsPlan:
    data = look.data
    if data.task == "language_model":
        return _plan_packed(look, tell)
    origins, stamps = look_at(look.files)
    readings = open_sources(data, look.kinds)
    readings = in_colour(readings) if colour else readings

    splits, classes, counts = _split(data, readings, tell)
    rows = rows_by_split(splits)
    lines = findings.of_classes(counts[0], classes.names) if data.task == "classification" and rows.labelled else []
    lines += findings.of_unlabelled(data, rows.labelled, rows.unlabelled)
    lead = next(iter(readings.values()))
    inputs, encoded = lead.inputs, kept_as(lead)
    creation = RowsCreation(
        format=ROWS_FORMAT if encoded is None else ENCODED_ROWS_FORMAT,
        source=look.source[colour],
        content=sha256(canonical_json([origins["files"][str(path)]["sha256"] for path in look.files])),
        dtype=cast(Any, inputs.dtype.str),
        shape=list(inputs.shape),
        labels="<i8" if data.task == "classification" else "<f4",
        block_rows=BLOCK_ROWS,
        rows={split: rows.of(split) for split in SPLITS},
        meaning=meaning_of(classes.number or 1, data.task, classes.names, inputs.tokens, encoded),
        encoded=None if encoded is None else lead.encoded,
    )
    writer = RowsWriter(open_root(look.root).uri, look.ids[colour], creation)
    begin_rows(writer)
    there = receipts_there(writer)
    job = _job(look, writer, classes, colour, readings, origins, stamps)
    runs = [run for split in SPLITS for run in runs_of(split, segments_of(split, readings, splits), creation, there)]
    return RowsPlan(job, runs, there, readings, counts, rows, lines, origins, stamps)


def _split(
    data: recipe.DataSpec, readings: Mapping[str, OpenedSource], tell: Progress
) -> tuple[dict[str, np.ndarray], Classes, np.ndarray]:
    """Which split each row of each source is of, the classes, and how many rows of each class a split has, int64
    [splits + 1, classes]: labels are read where one of these takes them.

    Raises:
        RefusedError: as `splitting.check_classes`.
    """

    def drawn(labels: np.ndarray | None) -> dict[str, np.ndarray]:
        return {name: split_of_source(name, data, one.source, labels) for name, one in readings.items()}

    splits = {} if reads_labels_first(data) else drawn(None)
    classes, labels = Classes(1, complete=True), dict[str, np.ndarray]()
    if data.task != "classification":
        if not splits:
            told = functools.partial(tell, "the labels of data.train")
            _, labels["train"] = read_labels(readings["train"], data.task, classes, told)
        return splits or drawn(labels["train"]), classes, np.zeros((len(SPLITS) + 1, 0), dtype=np.int64)
    classes = Classes()
    for name, reading in readings.items():
        told = functools.partial(tell, f"the labels of data.{name}")
        classes, labels[name] = read_labels(reading, data.task, classes, told)
    splits = splits or drawn(labels["train"])
    counts = np.sum([splitting.count(splits[name], labels[name], classes.number or 0) for name in readings], axis=0)
    splitting.check_classes(data, counts, classes.names)
    return splits, classes, counts


def _job(
    look: _Looked,
    writer: RowsWriter,
    classes: Classes,
    colour: bool,
    readings: Mapping[str, OpenedSource | OpenedDocuments],
    origins: Origins,
    stamps: Stamps,
) -> RowsJob:
    files = [
        SourceFile(*seen, origins["files"][str(path)]["sha256"])
        for path in stamps
        if (seen := size_and_time(path)) is not None
    ]
    known = {name: one.source.known for name, one in readings.items()}
    return RowsJob(writer, look.data, classes, colour, tuple(files), look.objects, known)


def _plan_packed(look: _Looked, tell: Progress) -> RowsPlan:
    """The plan of a language model: where a document goes depends on all before it, so their tokens are counted first.

    Tasks tokenize the documents of their own blocks once more: what is counted is not held.
    """
    data = look.data
    origins, stamps = look_at(look.files)
    readings = open_documents(data, look.kinds)
    assigned, counted = assigned_to(data, readings), {}
    for name, one in readings.items():
        told = functools.partial(tell, f"the documents of data.{name}")
        counted[name] = count_documents(name, one, assigned[name] != LEFT_OUT, told)
    layouts = layouts_of(data, assigned, counted)
    documents = next(iter(readings.values())).documents
    classes = Classes(documents.tokens.vocabulary, complete=True)
    creation = RowsCreation(
        format=PACKED_ROWS_FORMAT,
        source=look.source[False],
        content=sha256(canonical_json([origins["files"][str(path)]["sha256"] for path in look.files])),
        dtype="<i4",
        shape=list(documents.shape),
        labels="<i8",
        block_rows=BLOCK_ROWS,
        rows={split: layouts[split].blocks for split in SPLITS},
        meaning=meaning_of(documents.tokens.vocabulary, data.task, None, documents.tokens),
    )
    writer = RowsWriter(open_root(look.root).uri, look.ids[False], creation)
    begin_rows(writer)
    there = receipts_there(writer)
    runs = [run for split in SPLITS for run in packed_runs(data, split, layouts[split], creation, there)]
    return RowsPlan(
        _job(look, writer, classes, False, readings, origins, stamps),
        runs,
        there,
        readings,
        np.zeros((len(SPLITS) + 1, 0), dtype=np.int64),
        RowCounts((*(layouts[split].blocks for split in SPLITS), 0, 0)),
        findings_of(data, layouts, counted),
        origins,
        stamps,
        packed=True,
    )


def _check_room(plan: RowsPlan) -> None:
    """Refuse before anything is read what the disk cannot hold. Object stores do not say how much is free."""
    writer = plan.job.writer
    needed, free = writer.creation.bytes_of(plan.rows), open_root(writer.root_uri).free_bytes()
    if free is not None and needed > free:
        raise MachineError(
            f"the prepared rows do not fit in {writer.root_uri}",
            got=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            next="free some space, or choose another --store-root",
        )


def _seal(plan: RowsPlan, receipts: dict[str, BlockReceipt]) -> tuple[SealedRows, RowsManifest]:
    creation, data = plan.job.writer.creation, plan.job.data
    # Of documents all of it was found when they were counted.
    lines = [] if plan.packed else [note for one in plan.readings.values() for note in one.source.notes]
    for name in plan.readings:
        of = [Noted(one.frames, one.enlarged) for one in receipts.values() if source_of_split(data, one.split) == name]
        lines += lines_of(sum(of, Noted()), data.image, f"data.{name}")
    lines += plan.lines
    hashes, splits = dict[str, np.ndarray](), dict[str, SealedSplit]()
    for split in creation.rows:
        mine = [receipts[receipt_key(split, number)] for number in range(creation.blocks(split))]
        hashes[split] = np.frombuffer(b"".join(base64.b64decode(one.hashes) for one in mine), "<i8").copy()
        hashes[split].sort()
        blocks = [one.sha256 for one in mine]
        found = creation.fingerprint(split, blocks)
        splits[split] = SealedSplit(
            rows=creation.rows[split],
            fingerprint=found,
            blocks=blocks,
            classes=plan.counts[SPLITS.index(split)].tolist(),
            sizes=None if creation.encoded is None else [one.size for one in mine],
            labelled=plan.placed.labelled if split == "train" and plan.placed.unlabelled else None,
            targets=[one.targets for one in mine] if plan.packed else None,
        )
    kept = sum(one.size for one in receipts.values())
    lines += findings.of_encoded(kept, sum(creation.rows.values()), creation.meaning.get("encoded"))
    lines += [] if plan.packed else findings.of_hashes({split: hashes[split] for split in SPLITS})
    origins = plan.origins | {"shown": show({name: one.source for name, one in plan.readings.items()})}
    check_unchanged(plan.origins, plan.stamps)
    manifest = RowsManifest(
        format=LABELLED_MANIFEST_FORMAT
        if plan.placed.unlabelled
        else MANIFEST_FORMAT
        if creation.encoded is None
        else ENCODED_MANIFEST_FORMAT,
        creation=creation,
        splits=splits,
        findings=list(dict.fromkeys(lines)),
        origins=origins,
    )
    sealed_rows = seal_rows(plan.job.writer, manifest)
    return sealed_rows, sealed_rows.manifest()
