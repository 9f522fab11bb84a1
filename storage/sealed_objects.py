"""The objects of a sealed store against its manifest: which are missing, cut, or hold something that was not sealed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from akd_dist.base.files import sha256
from akd_dist.storage.arrays import decode_shard, metadata, rows_within
from akd_dist.storage.content import digest
from akd_dist.storage.layout import ARRAYS, Shard, StoredArray
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot, Stat
from akd_dist.storage.records import ObjectRecord
from akd_dist.storage.tables import sealed_documents


@dataclass(frozen=True)
class Damage:
    """One object that is not what was sealed."""

    key: str
    """Relative to the store."""
    problem: str


def damages_of(
    store: ObjectRoot, manifest: Manifest, *, deep: bool, on_progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Everything of a store that is not what was sealed; empty for a good one. As `LogitStore.verify`."""
    objects = store.child(ARRAYS)
    found = [Damage(f"{ARRAYS}/{key}", problem) for key, problem in metadata_problems(objects, manifest)]
    stats = objects.list()
    for record in table_records(manifest):
        if problem := table_problem(objects, record, stats.get(record.key), deep=deep):
            found.append(Damage(f"{ARRAYS}/{record.key}", problem))
    for number, shard in enumerate(manifest.identity.layout.shards(), 1):
        for array in manifest.identity.layout.fields:
            key = key_of(shard, array)
            if problem := shard_problem(objects, manifest, shard, array, stats.get(key), deep=deep):
                found.append(Damage(f"{ARRAYS}/{key}", problem))
        if on_progress is not None:
            on_progress(number, manifest.identity.layout.shard_count)
    return [*found, *_document_damages(store, manifest)]


def key_of(shard: Shard, array: StoredArray) -> str:
    """The key of one of a shard's objects, relative to `arrays.zarr`."""
    return array.key(shard.view, shard.index)


def table_records(manifest: Manifest) -> list[ObjectRecord]:
    """What is sealed of the objects of all tables."""
    return [record for objects in (manifest.tables or {}).values() for record in objects]


def decode_sealed(manifest: Manifest, shard: Shard, array: StoredArray, data: bytes) -> npt.NDArray[Any]:
    """What an object of a shard holds, [shard.rows, ...] in the stored dtype.

    Another version of a compressor may write other bytes for the same logits: a repair may leave such an object, and
    the sealed digest of the decoded logits vouches for it.

    Raises:
        ValueError: that is not what was sealed.
    """
    record = manifest.record(shard)
    sealed = record.digests[key_of(shard, array)]
    same = sha256(data) == sealed
    if not same and (record.content is None or manifest.identity.object_bytes(shard) is not None):
        raise ValueError(f"sha256 {sha256(data)} instead of {sealed}")
    if same and (written := rows_within(manifest.identity, shard, data, array)) is not None:
        return written
    logits = decode_shard(manifest.identity, shard, data, array)
    if not same and (found := digest([logits])) != record.content:
        raise ValueError(f"sha256 {found} of its logits instead of {record.content}")
    return logits


def shard_problem(
    objects: ObjectRoot, manifest: Manifest, shard: Shard, array: StoredArray, stat: Stat | None, *, deep: bool
) -> str | None:
    """What is wrong with an object of a shard, as far as its size or, if need be, its content tells."""
    key, record = key_of(shard, array), manifest.record(shard)
    if stat is None:
        return missing(objects, key)
    size = record.sizes[key]
    if stat.size != size and manifest.identity.object_bytes(shard) is not None:
        return f"{stat.size:,} bytes instead of {size:,}"
    if not deep and stat.size == size:
        return None
    try:
        data = objects.get(key)
        if sha256(data) != record.digests[key]:
            decode_sealed(manifest, shard, array, data)
    except ObjectMissing:
        return missing(objects, key)
    except ValueError as error:
        return str(error)
    return None


def table_problem(objects: ObjectRoot, record: ObjectRecord, stat: Stat | None, *, deep: bool) -> str | None:
    """What is wrong with an object of a table, as far as its size or, if asked for, its bytes tell."""
    if stat is None:
        return missing(objects, record.key)
    if stat.size != record.size:
        return f"{stat.size:,} bytes instead of {record.size:,}"
    if not deep:
        return None
    try:
        found = sha256(objects.get(record.key))
    except ObjectMissing:
        return missing(objects, record.key)
    return None if found == record.sha256 else f"sha256 {found} instead of {record.sha256}"


def metadata_problems(objects: ObjectRoot, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What is wrong with the Zarr metadata, by key."""
    for key in metadata(manifest.identity):
        try:
            found = sha256(objects.document(key))
        except ObjectMissing:
            yield key, missing(objects, key)
            continue
        if found != (sealed := manifest.zarr_json.get(key)):
            yield key, f"sha256 {found} instead of {sealed}"


def missing(objects: ObjectRoot, key: str) -> str:
    """What is wrong with an object that is not there."""
    path = objects.local_path(key)
    # For zarr a folder in the place of a shard is absent as well, and reads as the fill value without an error.
    return "is a folder" if path is not None and path.is_dir() else "is missing"


def _document_damages(store: ObjectRoot, manifest: Manifest) -> Iterator[Damage]:
    for key, sealed in sealed_documents(manifest).items():
        try:
            data = store.document(key)
        except ObjectMissing:
            yield Damage(key, "is missing")
            continue
        if data != sealed:
            yield Damage(key, "is not what the manifest was sealed from")
