"""Make sealed stores of logits that others computed: look at all of them, then write what is missing, shard by shard.

akd-dist stores import jobs/digits.yaml logits.npy

The file is read twice: what it holds is known, and named by its content, before anything is written. So two imports of
the same logits are one store, and one that was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from akd_dist.base import places
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, expanded, sha256
from akd_dist.data.logit_arrays import LogitFile
from akd_dist.data.logit_checks import Looks, Order, Stored, check_order, look_at_order, unsure
from akd_dist.data.logit_files import check_parts, no_file, open_logits
from akd_dist.data.logit_rows import Part, Wanted, match, places_of, telling_keys
from akd_dist.data.rows import Rows
from akd_dist.data.views import by_content, view_digests
from akd_dist.distill.teacher import probe_rows
from akd_dist.documents.imported import ImportedDocument, ImportedSplit
from akd_dist.jobs.planning.caching import check_room
from akd_dist.jobs.planning.stored import cannot_learn
from akd_dist.jobs.prepare_rows import rows_of_machine
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.options import ImportLogitsOptions
from akd_dist.recipe import LogitKind, NoAugmentation, Recipe
from akd_dist.storage import removal
from akd_dist.storage.content import renewing
from akd_dist.storage.encodings import Encoding, encoding_from_config
from akd_dist.storage.layout import FORMAT_VERSION, MANIFEST_KEY, Shard, StoreLayout
from akd_dist.storage.manifest import Computed, Creation, Identity
from akd_dist.storage.reader import open_store
from akd_dist.storage.records import Loss, Probe
from akd_dist.storage.repair import repair_store, verify_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.top_k import TopK
from akd_dist.storage.writer import as_stored, create_store, missing_shards, seal_store, write_shard
from akd_dist.tracking.progress import meter

_ID = 16
"""Digits of an id that recipes are told to name."""
Written = tuple[np.ndarray, float | None, Sequence[Probe], Loss | None]
"""What `write_shard` takes of a shard."""


@dataclass
class Import:
    """A split whose logits are imported, from the look at them on."""

    part: Part
    rows: Rows
    file: LogitFile
    recipe: Recipe
    digests: dict[Shard, str] = field(default_factory=dict)
    """The sha256 of each shard's logits as float32, by which a file that changes meanwhile is noticed."""
    content: Any = field(default_factory=hashlib.sha256)
    """The hash of all of them in the order of views and rows: float32, little-endian."""
    orders: list[Order] = field(default_factory=list)
    """How well the logits of each view fit the labels of its rows."""
    kind: LogitKind = "logits"

    @property
    def layout(self) -> StoreLayout:
        """How its store is cut into shards."""
        return StoreLayout(self.file.shape[0], len(self.rows), self.rows.classes, self.codec.dtype)

    @property
    def augmentation(self) -> Any:
        """How its views are drawn."""
        return self.recipe.data.augmentation if self.part.split == "train" else NoAugmentation()

    def read(self, shard: Shard) -> np.ndarray:
        """The logits of a shard as the file has them, float32 [shard.rows, classes]."""
        return self.file.take(shard.view, self.part.numbers[shard.start : shard.stop])

    def look(self, shard: Shard, looks: Looks, stored: Stored) -> np.ndarray:
        """Look at a shard's logits; what each row says, as `Looks.add`."""
        logits, numbers = self.read(shard), self.part.numbers[shard.start : shard.stop]
        said = looks.add(logits, numbers, shard.view)
        if self.codec.rounds:  # encoding refuses what is no number in half precision
            stored.add(logits, self.codec.decode(self.codec.encode(logits, shard.start)), numbers)
        data = np.ascontiguousarray(logits, "<f4").data
        self.digests[shard] = sha256(data)
        self.content.update(data)
        return said

    @property
    def codec(self) -> Encoding:
        """How its logits are stored."""
        return encoding_from_config(self.recipe.cache.encoding.config())

    @functools.cached_property
    def creation(self) -> Creation:
        """The store as it is named by its content; once all of it was looked at."""
        data = self.recipe.data
        teacher = sha256(canonical_json({"imported": {"kind": self.kind, "logits": self.content.hexdigest()}}))
        identity = Identity(
            format=FORMAT_VERSION,
            dataset=self.rows.fingerprint,
            rows=len(self.rows),
            teacher=teacher,
            augmentation=by_content(self.augmentation),
            data_seed=None if isinstance(self.augmentation, NoAugmentation) else data.seed,
            views=self.file.shape[0],
            encoding=self.recipe.cache.encoding.config(),
            classes=self.rows.classes,
        )
        versions = {name: version(name) for name in ("akd-dist", "numcodecs", "numpy", "zarr")}
        return Creation(
            identity=identity,
            # Nothing of it was computed here: what may change a byte of a shard are the libraries that write it.
            computed=Computed(batch_rows=1, threads=1, device="imported", versions=versions),
            dataset=self.rows.describe(),
            teacher={"fingerprint": teacher, "imported": {"kind": self.kind}},
        )

    def shard(self, shard: Shard) -> Written:
        """A shard as it is written, and what is said of it.

        Raises:
            RefusedError: the file has changed since it was looked at.
            CorruptCacheError: the rows are not what was prepared.
        """
        rows, identity, logits = self.rows, self.creation.identity, self.read(shard)
        if sha256(np.ascontiguousarray(logits, "<f4").data) != self.digests[shard]:
            raise RefusedError(
                f"{self.file.name} was written while it was read",
                got="other logits than when it was looked at",
                expected="a file that nobody writes to",
                next="run the same command again once it is whole",
            )
        stored = as_stored(identity, logits, shard.start)
        numbers, classified = probe_rows(identity, shard), rows.task == "classification"
        labels = rows.labels.take(np.arange(shard.start, max(shard.start, min(shard.stop, rows.labelled))))
        agreement = None  # the first rows have labels
        if classified and len(labels):
            agreement = float(np.mean(stored[: len(labels)].argmax(axis=1) == labels))
        seed = self.recipe.data.seed
        shown = view_digests(self.augmentation, seed, rows.inputs, numbers, shard.view, rows.tokens)
        if rows.held:
            rows.content(shard.start, shard.stop).verify()
        compared = numbers - shard.start
        loss = Loss.between(logits[compared], stored[compared], classification=classified)
        return stored, agreement, shown, loss


def import_logits(recipe: Recipe, options: ImportLogitsOptions) -> dict[str, Any]:
    """Make sealed stores of the logits in a file.

    Returns:
        The document that `akd-dist stores import --json` prints.

    Raises:
        AkdError: see the exit codes; shards that were written are kept.
    """
    recipe, console = recipe.own(), options.console or Console(stderr=True)
    workspace = Workspace(options.stores, options.cache, wait=options.wait, console=console)
    path = _path_of(options.file)
    return renewing(lambda: _import(recipe, options, workspace, path), workspace.tell).plain()


def _path_of(logits: str | Path) -> Path:
    if "://" in str(logits):
        raise RefusedError(
            "logits are imported from a file of this machine",
            got=str(logits),
            expected="a path: they are mapped, and read twice",
            next="copy the file here first; stores themselves may lie in s3://",
        )
    return expanded(logits).absolute()


def _refuse_described(recipe: Recipe) -> None:
    """Refuse an encoding that describes logits: its dictionary, and what its card tells, are made with the teacher."""
    if recipe.cache.encoding.kind == TopK.name:
        raise RefusedError(
            "imported logits are stored as they are, and cache.encoding: top_k only describes them",
            got="encoding: {kind: top_k}",
            expected="an encoding of float16 or float32",
            next="set cache.encoding: float16; or name the teacher in the recipe, and cache it: akd-dist cache-teacher",
        )


def _import(recipe: Recipe, options: ImportLogitsOptions, workspace: Workspace, path: Path) -> ImportedDocument:
    started = time.monotonic()
    if not path.exists():  # before rows are prepared, which may take long
        raise no_file(path)
    _refuse_described(recipe)
    splits = rows_of_machine(recipe.data, workspace)
    wanted = Wanted(recipe.data, splits, places_of(recipe.data), options.split, options.key)
    scratch = Path(workspace.cache_root) / "imports"
    keyed = options.key is not None
    if not keyed:
        check_parts(path, wanted.sources[wanted.first].files)
    with (
        telling_keys(wanted),
        open_logits(path, wanted.check(str(path)), options.key, scratch, anywhere=keyed) as file,
    ):
        parts, left_out = match(file, wanted)
        imports = [Import(part, getattr(splits, part.split), file, recipe) for part in parts]
        kind, warnings = _look(imports, file, wanted, options, workspace)
        written = dict(_written(imports, path, workspace, dry_run=options.dry_run))
    if not options.dry_run:
        splits.sources.finish()
    if kind == "log_probabilities":
        warnings += cannot_learn(recipe)
    if wanted.augmented:
        warnings.append(f"that the logits are of this recipe's {recipe.data.views} views is taken at your word")
    ids: dict[str, str] = {split: one.id[:_ID] for split, one in written.items()}
    return ImportedDocument(
        dry_run=options.dry_run,
        logits=str(path),
        shape=list(file.written),
        dtype=file.dtype,
        kind=kind,
        joined_by=f"the key {wanted.key}" if keyed else f"order: {wanted.taken(file.shape[1])}",
        rows={"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        splits=written,
        left_out=left_out,
        warnings=warnings,
        teacher={"store": ids["train"] if list(ids) == ["train"] else ids},
        seconds=round(time.monotonic() - started, 3),
    )


def _look(
    imports: Sequence[Import], file: LogitFile, wanted: Wanted, options: ImportLogitsOptions, workspace: Workspace
) -> tuple[LogitKind, list[str]]:
    """Look at all logits that will be stored; what they are, and what a user should know of them.

    Raises:
        RefusedError: they are not of these rows, or no logits.
    """
    task, classes = imports[0].rows.task, imports[0].rows.classes
    looks, stored = Looks(file.name, classes, task), Stored(file.name)
    labels = np.full(file.shape[1], np.nan if task == "regression" else -1)
    for one in imports:
        labels[one.part.numbers] = one.rows.all_labels()
    orders, keyed, first = list[Order](), options.key is not None, labels
    total = math.prod(file.shape[:2])
    with meter(workspace.console, "looking at the logits", total) as shown:
        for view in range(file.shape[0]):
            said = np.full(len(labels), np.nan)
            for one in imports:
                for shard in (shard for shard in one.layout.shards() if shard.view == view):
                    said[one.part.numbers[shard.start : shard.stop]] = one.look(shard, looks, stored)
                    shown.update(looks.rows)
            first = said if view == 0 else first
            orders.append(look_at_order(said, labels, classes, task, keyed=keyed))
            for one in imports:
                mine = one.part.numbers
                one.orders.append(look_at_order(said[mine], labels[mine], classes, task, keyed=keyed))
    kind = looks.kind(options.kind)
    stored.check(str(imports[0].codec))
    hint = None if keyed else wanted.order_of_files()
    if not keyed:
        _check_split(file, wanted, first, orders[0])
    for number, order in enumerate(orders):
        name = file.name if len(orders) == 1 else f"{file.name}, view {number},"
        check_order(name, order, keyed=keyed, hint=hint)
        for one in imports:  # a small split in another order is lost among the rows of the others
            order_of_split = one.orders[number]
            if order_of_split.found_wrong or order_of_split.worse_than(order):
                check_order(f"{name} of the {one.part.split} rows", order_of_split, keyed=keyed, hint=hint)
    for one in imports:
        one.kind = kind
    line = unsure(file.name, orders[0], looks.confidence / looks.rows) if task == "classification" else None
    others = [] if keyed else wanted.taken_for(file.shape[1], informative=orders[0].informative)
    return kind, [one for one in (line, hint, *others) if one is not None]


def _check_split(file: LogitFile, wanted: Wanted, said: np.ndarray, order: Order) -> None:
    """Refuse logits that fit the labels of another split, whose source has as many rows, and not those of their own.

    Args:
        said: what each row of the file says, NaN where nobody looked.

    Raises:
        RefusedError: names the split.
    """
    rows = wanted.splits.train
    for split in wanted.may_be(len(said)) if order.found_wrong or order.at_chance else ():
        place, labels = wanted.sources[split], getattr(wanted.splits, split).all_labels()
        theirs = said[place.numbers if len(said) == place.total else slice(None)]
        seen = ~np.isnan(theirs)
        found = look_at_order(theirs[seen], labels[seen], rows.classes, rows.task, keyed=True)
        if found.better_than(order):
            raise RefusedError(
                f"{file.name} has the logits of the {split} rows, and not of the {wanted.first} rows",
                got=f"agreement {order.agreement:.1%} with the labels of the {wanted.first} rows, "
                f"{found.agreement:.1%} with those of the {split} rows",
                expected=f"the logits of {wanted.taken(len(said))}",
                next="leave --split out" if place.source == "train" else f"give --split {split}",
            )


def _written(
    imports: Sequence[Import], path: Path, workspace: Workspace, *, dry_run: bool
) -> Iterator[tuple[Any, ImportedSplit]]:
    """Have the stores sealed; what each is now."""
    root = open_root(workspace.store_root)
    for one in imports:
        store_id = one.creation.identity.id
        sealed, repaired, count = root.exists(f"{store_id}/{MANIFEST_KEY}"), list[str](), 0
        if sealed and not dry_run and verify_store(root.uri, store_id):
            how = one.creation.computed
            mended = repair_store(root.uri, store_id, lambda shard, _, one=one: one.shard(shard), computed=how)  # type: ignore[misc]
            repaired = [shard.key for shard in mended]
        elif not sealed and not dry_run:
            count = _write(one, path, workspace)
        elif not sealed:
            check_room(workspace.store_root, one.layout.nbytes, one.recipe)
        there = not dry_run or sealed
        sizes = open_store(root.child(store_id).uri).manifest.sizes() if there else {}
        yield (
            one.part.split,
            ImportedSplit(
                store=root.child(store_id).uri,
                id=store_id,
                hit=sealed,
                rows=len(one.rows),
                views=one.layout.views,
                classes=one.layout.classes,
                encoding=str(one.creation.identity.codec),
                bytes=sum(sizes.values()),
                shards=one.layout.shard_count,
                shards_written=count,
                repaired=repaired,
                agreement=one.orders[0].agreement,
            ),
        )


def _write(one: Import, path: Path, workspace: Workspace) -> int:
    """Write the shards that a store misses, and seal it; how many these were."""
    root, store_id = open_root(workspace.store_root), one.creation.identity.id
    with workspace.claim(store_id):
        if root.exists(f"{store_id}/{MANIFEST_KEY}"):  # whoever held it has sealed it
            return 0
        root.check_writable()
        place = f"{workspace.store_root}/{store_id}"
        hint = {
            "recipe": one.recipe.document(place),
            "split": one.part.split,
            "logits": places.written(str(path), place),
        }
        writer = create_store(workspace.store_root, one.creation, hint)
        try:
            missing = missing_shards(writer)
            check_room(workspace.store_root, sum(one.layout.stored_bytes(shard) for shard in missing), one.recipe)
            with meter(workspace.console, f"storing the {one.part.split} rows", len(missing), unit="shards") as shown:
                for number, shard in enumerate(missing, 1):
                    logits, agreement, probes, loss = one.shard(shard)
                    # Nothing was computed: without seconds, nobody takes the time of a copy for that of a teacher.
                    write_shard(writer, shard, logits, label_agreement=agreement, probes=probes, seconds=0.0, loss=loss)
                    shown.update(number)
        except BaseException:
            removal.discard_if_empty(workspace.store_root, store_id)
            raise
        seal_store(writer)
    return len(missing)
