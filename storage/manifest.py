"""The documents of a store: its identity, how it was computed, the manifest that seals it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.encodings import Encoding, encoding_from_config
from akd_dist.storage.layout import ARRAY_KEY, FORMAT_VERSION, GROUP_KEY, Shard, StoreLayout
from akd_dist.storage.records import (
    Count,
    Document,
    Json,
    Loss,
    Probe,
    Sha256,
    ShardColumns,
    ShardRecord,
    damaged,
    short,
)

# A field, what it holds, and what follows from the fields beside it.
Account = tuple[str, object, object]


class Identity(Document):
    """What the logits are. Its hash is the store's id, known before anything is computed."""

    format: int = Field(ge=1, le=FORMAT_VERSION)
    """Version of the store's format."""
    dataset: str
    """Fingerprint of the rows: content and order."""
    rows: Count
    teacher: str
    """Fingerprint of the teacher: weights and architecture."""
    augmentation: Json
    """Specification of the augmentation that the views are drawn from."""
    data_seed: int | None
    """Seed of the views; None where there is no augmentation."""
    views: Count
    encoding: Json
    """Config of the encoding."""
    classes: Count

    @property
    def id(self) -> str:
        """64 hexadecimal digits: the sha256 of the canonical JSON."""
        return sha256(self.to_bytes())

    @property
    def codec(self) -> Encoding:
        """The encoding as an object."""
        return encoding_from_config(self.encoding)

    @property
    def layout(self) -> StoreLayout:
        """How the store is cut into shards."""
        return StoreLayout(self.views, self.rows, self.classes, self.codec.dtype)

    def object_bytes(self, shard: Shard) -> int | None:
        """The exact size of a shard's object; None where it is compressed, and no arithmetic tells."""
        return self.layout.stored_bytes(shard) if self.codec.compress == "none" else None

    def differences(self, other: Identity) -> list[str]:
        """Fields that differ, as "field: ours != theirs"."""
        return differences(self, other)


class Computed(Document):
    """How the logits were computed: pinned at creation, since another batch size or library may change a last bit."""

    batch_rows: Count
    threads: Count
    device: str
    """Kind of device, as "cpu" or "cuda:NVIDIA H200"."""
    versions: dict[str, str]
    """Versions of the libraries that touch the numbers."""


class Creation(Document):
    """Everything that is settled when a store is created."""

    identity: Identity
    computed: Computed
    dataset: Json
    """The dataset in words and block digests: fingerprint, rows, block_rows, blocks, meaning."""
    teacher: Json
    """The teacher in words: fingerprint, spec."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for name in ("dataset", "teacher"):
            told = getattr(self, name).get("fingerprint")
            if told is not None and told != getattr(self.identity, name):
                raise ValueError(f"{name}.fingerprint is not identity.{name}")
        return self

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a creation document, and check what its parts repeat of each other; refusals as of every document."""
        creation = super().from_bytes(data, where)
        for field, got, expected in _described(creation.identity, creation.dataset, creation.teacher):
            if got != expected:
                raise damaged(where, f"{field}: {got}", expected)
        return creation

    @property
    def sha256(self) -> str:
        """The sha256 of its bytes, which the receipts of the store name."""
        return sha256(self.to_bytes())


class Manifest(Document):
    """The seal: written last, create-only, and the same bytes however disturbed the run was."""

    format: int = Field(ge=1, le=FORMAT_VERSION)
    id: Sha256
    identity: Identity
    computed: Computed
    dataset: Json
    teacher: Json
    zarr_json: dict[str, Sha256]
    """sha256 of each metadata file, by key relative to arrays.zarr."""
    shards: list[ShardRecord] | ShardColumns
    """Every shard, view by view, in row order; as columns from format 3 on."""
    probes: list[list[Probe]] | None = None
    """A few rows of each view as the teacher saw them, from format 3 on; before, they are in the shards' records."""
    sha256: Sha256
    """sha256 of the canonical JSON of all the other fields."""

    @model_serializer(mode="wrap")
    def _as_in_its_format(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None}

    @classmethod
    def seal(cls, creation: Creation, zarr_json: Mapping[str, str], shards: Iterable[ShardRecord]) -> Manifest:
        """The manifest of a complete store."""
        records = list(shards)
        fields = {
            "format": creation.identity.format,
            "id": creation.identity.id,
            **creation.model_dump(mode="json"),
            "zarr_json": dict(zarr_json),
            **(_columns(creation.identity, records) if creation.identity.format > 2 else _records(records)),
        }
        return cls.model_validate({**fields, "sha256": sha256(canonical_json(fields))})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a manifest and check what it says of itself: its own sha256, its id, and that it names every shard.

        Raises:
            RefusedError: it was written in a newer format.
            DamagedError: anything else that is wrong, by field.
        """
        manifest = super().from_bytes(data, where)
        for field, got, expected in manifest._accounts():
            if got != expected:
                raise damaged(where, f"{field}: {got}", expected)
        return manifest

    def _accounts(self) -> Iterator[Account]:
        """What the manifest says of itself, and what follows from its other fields; its own sha256 first.

        Whoever reads on has compared what came before: shards are not enumerated before their number is known to be
        that of the records, since a foreign document may speak of any number.
        """
        yield "sha256", self.sha256, sha256(canonical_json(self.model_dump(mode="json", exclude={"sha256"})))
        yield "id", self.id, self.identity.id
        yield "format", self.format, self.identity.format
        yield from _described(self.identity, self.dataset, self.teacher)
        yield "zarr_json", sorted(self.zarr_json), sorted([GROUP_KEY, ARRAY_KEY])
        layout = self.identity.layout
        yield "shards", type(self.shards), ShardColumns if self.format > 2 else list
        yield "shards", f"{len(self.shards)} of them", f"{layout.shard_count} of them"
        if isinstance(self.shards, ShardColumns):
            yield from self._column_accounts(self.shards)
            return
        yield "probes", self.probes, None
        for number, (record, shard) in enumerate(zip(self.shards, layout.shards(), strict=True)):
            where = f"shards.{number}"
            yield f"{where}.key", record.key, shard.key
            yield f"{where}.rows", record.rows, shard.rows
            yield f"{where}.size", record.size, self.identity.object_bytes(shard)
            yield f"{where}.finite", record.finite, True
            rows = [probe.row for probe in record.probes]
            yield f"{where}.probes", rows, [row for row in rows if shard.start <= row < shard.stop]

    def _column_accounts(self, columns: ShardColumns) -> Iterator[Account]:
        lengths = {len(getattr(columns, field)) for field in ShardColumns.model_fields}
        yield "shards", f"columns of {sorted(lengths)}", f"columns of {[len(columns)]}"
        if self.identity.codec.compress == "none":
            layout = self.identity.layout
            one_view = [layout.stored_bytes(layout.shard(0, index)) for index in range(layout.shards_per_view)]
            yield "shards.size", columns.size, one_view * layout.views
        yield "probes", len(self.probes or ()), self.identity.views
        for view, probes in enumerate(self.probes or ()):
            rows = [probe.row for probe in probes]
            yield f"probes.{view}", rows, sorted(row for row in set(rows) if row < self.identity.rows)

    def record(self, shard: Shard) -> ShardRecord:
        """What the seal says of a shard."""
        number = shard.view * self.identity.layout.shards_per_view + shard.index
        if isinstance(self.shards, list):
            return self.shards[number]
        probes = [probe for probe in self.probes_of(shard.view) if shard.start <= probe.row < shard.stop]
        kl, largest = self.shards.kl[number], self.shards.largest_difference[number]
        return ShardRecord(
            key=shard.key,
            size=self.shards.size[number],
            sha256=self.shards.sha256[number],
            rows=shard.rows,
            finite=True,
            label_agreement=self.shards.label_agreement[number],
            probes=probes,
            content=self.shards.content[number],
            loss=Loss(rows=len(probes), kl=kl, largest_difference=largest),
        )

    def content(self, shard: Shard) -> str | None:
        """The sha256 of a shard's decoded logits; None in a store that does not say."""
        number = shard.view * self.identity.layout.shards_per_view + shard.index
        return self.shards[number].content if isinstance(self.shards, list) else self.shards.content[number]

    @property
    def loss(self) -> Loss | None:
        """By how much the stored logits differ from the teacher's, on the rows of the probes; None before format 3."""
        if isinstance(self.shards, list):
            return None
        return Loss.together(record.loss for record in self.records() if record.loss)

    def records(self) -> Iterator[ShardRecord]:
        """What the seal says of every shard, in order."""
        return map(self.record, self.identity.layout.shards())

    def sizes(self) -> dict[str, int]:
        """Bytes of every shard's object by key, in order."""
        if isinstance(self.shards, list):
            return {record.key: record.size for record in self.shards}
        return {shard.key: size for shard, size in zip(self.identity.layout.shards(), self.shards.size, strict=True)}

    def probes_of(self, view: int) -> list[Probe]:
        """The rows of a view that were remembered as the teacher saw them, in their order."""
        if self.probes is not None:
            return self.probes[view]
        per_view = self.identity.layout.shards_per_view
        records = self.shards[view * per_view : (view + 1) * per_view] if isinstance(self.shards, list) else []
        return [probe for record in records for probe in record.probes]

    def creation(self) -> Creation:
        """The creation document this manifest was sealed from."""
        return Creation(identity=self.identity, computed=self.computed, dataset=self.dataset, teacher=self.teacher)


def _records(records: list[ShardRecord]) -> dict[str, Any]:
    """The shards of a manifest of formats 1 and 2."""
    return {"shards": [record.model_dump(mode="json") for record in records]}


def _columns(identity: Identity, records: list[ShardRecord]) -> dict[str, Any]:
    """The shards of a manifest of format 3 on, and the probes of each view."""
    per_view = identity.layout.shards_per_view
    views = [records[first : first + per_view] for first in range(0, len(records), per_view)]
    columns = ("size", "sha256", "content", "label_agreement")
    losses = [record.loss or Loss(rows=0, kl=None, largest_difference=0.0) for record in records]
    return {
        "shards": {column: [getattr(record, column) for record in records] for column in columns}
        | {column: [getattr(loss, column) for loss in losses] for column in ("kl", "largest_difference")},
        "probes": [[probe.model_dump(mode="json") for record in view for probe in record.probes] for view in views],
    }


def differences(ours: BaseModel, theirs: BaseModel) -> list[str]:
    """Fields, nested ones by dotted name, in which two documents differ, as "field: ours != theirs"."""
    mine, others = (dict(_flat(document.model_dump(mode="json"))) for document in (ours, theirs))
    return [
        f"{field}: {short(mine.get(field))} != {short(others.get(field))}"
        for field in dict.fromkeys([*mine, *others])
        if mine.get(field) != others.get(field)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _described(identity: Identity, dataset: dict[str, Any], teacher: dict[str, Any]) -> Iterator[Account]:
    """What the descriptions of dataset and teacher repeat of the identity, as far as they do."""
    yield "dataset.fingerprint", dataset.get("fingerprint", identity.dataset), identity.dataset
    yield "teacher.fingerprint", teacher.get("fingerprint", identity.teacher), identity.teacher
    yield "dataset.rows", dataset.get("rows", identity.rows), identity.rows
    for field, part in (("dataset.meaning", dataset.get("meaning", {})), ("teacher.spec", teacher.get("spec", {}))):
        yield field, part if not isinstance(part, dict) else {}, {}
        yield f"{field}.classes", part.get("classes", identity.classes), identity.classes
    blocks = dataset.get("blocks", [])
    plain = isinstance(blocks, list) and all(isinstance(block, str) for block in blocks)
    yield "dataset.blocks", "digests" if plain else blocks, "digests"
