"""The manifest that seals a store: all that its documents and its shards are, in one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.identity import (
    Account,
    Computed as Computed,
    Creation as Creation,
    Identity as Identity,
    described,
    differences as differences,
)
from akd_dist.storage.layout import GROUP_KEY, LOGITS, TARGETS_FORMAT, Shard, StoreLayout
from akd_dist.storage.records import (
    Count,
    Document,
    Json,
    Loss,
    ObjectColumns,
    ObjectRecord,
    Probe,
    Sha256,
    ShardColumns,
    ShardRecord,
    damaged,
    joined,
)

T = TypeVar("T")
Columns = ShardColumns | ObjectColumns


class Manifest(Document):
    """The seal: written last, create-only, and the same bytes however disturbed the run was."""

    format: int = Field(ge=1, le=TARGETS_FORMAT)
    id: Sha256
    identity: Identity
    computed: Computed
    dataset: Json
    teacher: Json
    zarr_json: dict[str, Sha256]
    """sha256 of each metadata file, by key relative to arrays.zarr."""
    shards: list[ShardRecord] | ShardColumns | ObjectColumns = Field(union_mode="left_to_right")
    """Every shard, view by view, in row order; as columns from format 3 on."""
    tables: dict[str, list[ObjectRecord]] | None = None
    """What the store has once for all shards, by name: its objects, in order. From format 4 on."""
    targets: Count | None = None
    """Items of all views. From format 4 on."""
    fidelity: Json | None = None
    """What was measured of how well the store describes its teacher; left out where nothing was. From format 4 on."""
    probes: list[list[Probe]] | None = None
    """A few rows of each view as the teacher saw them, from format 3 on; before, they are in the shards' records."""
    sha256: Sha256
    """sha256 of the canonical JSON of all the other fields."""

    @model_serializer(mode="wrap")
    def _as_in_its_format(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None}

    @classmethod
    def seal(
        cls,
        creation: Creation,
        zarr_json: Mapping[str, str],
        shards: Iterable[ShardRecord],
        tables: Mapping[str, list[ObjectRecord]] | None = None,
        fidelity: dict[str, Any] | None = None,
    ) -> Manifest:
        """The manifest of a complete store.

        Args:
            tables: what it has once for all shards, and `fidelity` what was measured of it; from format 4 on.
        """
        records = list(shards)
        if creation.identity.format >= TARGETS_FORMAT:
            return cls._seal_targets(creation, zarr_json, records, tables or {}, fidelity)
        fields = {
            "format": creation.identity.format,
            "id": creation.identity.id,
            **creation.model_dump(mode="json"),
            "zarr_json": dict(zarr_json),
            **(_columns(creation.identity, records) if creation.identity.format > 2 else _records(records)),
        }
        return cls.model_validate({**fields, "sha256": sha256(canonical_json(fields))})

    @classmethod
    def _seal_targets(
        cls,
        creation: Creation,
        zarr_json: Mapping[str, str],
        records: list[ShardRecord],
        tables: Mapping[str, list[ObjectRecord]],
        fidelity: dict[str, Any] | None,
    ) -> Manifest:
        identity = creation.identity
        fields = {
            "format": identity.format,
            "id": identity.id,
            **creation.model_dump(mode="json"),
            "zarr_json": dict(zarr_json),
            **_object_columns(identity, records),
            "tables": {name: [one.model_dump(mode="json") for one in found] for name, found in tables.items()},
            "targets": identity.views * identity.layout.rows,
            **({} if fidelity is None else {"fidelity": fidelity}),
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
        yield from described(self.identity, self.dataset, self.teacher)
        layout = self.identity.layout
        yield "zarr_json", sorted(self.zarr_json), sorted([GROUP_KEY, *(one.metadata_key for one in layout.fields)])
        new = self.format >= TARGETS_FORMAT
        yield "shards", type(self.shards), ObjectColumns if new else ShardColumns if self.format > 2 else list
        yield "tables", sorted(self.tables or ()), sorted(self.identity.tables)
        yield "targets", self.targets, layout.views * layout.rows if new else None
        yield "fidelity", self.fidelity if not new else None, None
        yield "shards", f"{len(self.shards)} of them", f"{layout.shard_count} of them"
        if not isinstance(self.shards, list):
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

    def _column_accounts(self, columns: Columns) -> Iterator[Account]:
        layout, names = self.identity.layout, [array.name for array in self.identity.layout.fields]
        if isinstance(columns, ObjectColumns):
            for field in ("size", "sha256"):
                yield f"shards.{field}", sorted(getattr(columns, field)), sorted(names)
        lengths = {len(column) for column in _all_columns(columns)}
        yield "shards", f"columns of {sorted(lengths)}", f"columns of {[len(columns)]}"
        if self.identity.encoded.compress == "none":
            full, last = (layout.object_sizes(layout.shard(0, index)) for index in (0, layout.shards_per_view - 1))
            sizes = columns.size if isinstance(columns, ObjectColumns) else {LOGITS: columns.size}
            for name, of_full, of_last in zip(names, full, last, strict=True):
                where = "shards.size" if len(sizes) == 1 else f"shards.size.{name}"
                # All shards of a view are full but its last one.
                yield where, sizes[name], [*[of_full] * (layout.shards_per_view - 1), of_last] * layout.views
        yield "probes", len(self.probes or ()), self.identity.views
        if isinstance(columns, ObjectColumns):
            told = [sum(one) for one in _by_view(layout, columns.probed)]
            yield "shards.probed", told, [len(probes) for probes in self.probes or ()]
        for view, probes in enumerate(self.probes or ()):
            rows = [probe.row for probe in probes]
            yield f"probes.{view}", rows, sorted(row for row in set(rows) if row < self.identity.rows)

    def record(self, shard: Shard) -> ShardRecord:
        """What the seal says of a shard."""
        number = shard.view * self.identity.layout.shards_per_view + shard.index
        if isinstance(self.shards, list):
            return self.shards[number]
        if isinstance(self.shards, ObjectColumns):
            return self._record_of_objects(shard, number, self.shards)
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

    def _record_of_objects(self, shard: Shard, number: int, columns: ObjectColumns) -> ShardRecord:
        objects = [
            ObjectRecord(key=key, size=columns.size[array.name][number], sha256=columns.sha256[array.name][number])
            for array, key in zip(shard.arrays, shard.keys, strict=True)
        ]
        first = sum(columns.probed[number - shard.index : number])
        probes = self.probes_of(shard.view)[first : first + columns.probed[number]]
        kl, largest = columns.kl[number], columns.largest_difference[number]
        return ShardRecord(
            key=shard.key,
            size=sum(one.size for one in objects),
            sha256=joined(objects),
            rows=shard.rows,
            finite=True,
            label_agreement=columns.label_agreement[number],
            probes=probes,
            content=columns.content[number],
            loss=None if largest is None else Loss(rows=len(probes), kl=kl, largest_difference=largest),
            objects=objects,
            dictionary=self.table_sha256("dictionary"),
        )

    def table_sha256(self, name: str) -> str | None:
        """The sha256 of a table of the store; None if it has none of that name."""
        objects = (self.tables or {}).get(name)
        return None if objects is None else joined(objects)

    def content(self, shard: Shard) -> str | None:
        """The sha256 of a shard's decoded arrays; None in a store that does not say."""
        number = shard.view * self.identity.layout.shards_per_view + shard.index
        return self.shards[number].content if isinstance(self.shards, list) else self.shards.content[number]

    @property
    def loss(self) -> Loss | None:
        """By how much the stored logits differ from the teacher's, on the rows of the probes; None before format 3."""
        if isinstance(self.shards, list) or self.identity.is_top_k:
            return None
        return Loss.together(record.loss for record in self.records() if record.loss)

    def records(self) -> Iterator[ShardRecord]:
        """What the seal says of every shard, in order."""
        return map(self.record, self.identity.layout.shards())

    def sizes(self) -> dict[str, int]:
        """Bytes of every shard's objects by key, in order."""
        if isinstance(self.shards, list):
            return {record.key: record.size for record in self.shards}
        if isinstance(self.shards, ObjectColumns):
            columns = [self.shards.size[array.name] for array in self.identity.layout.fields]
            shards = zip(self.identity.layout.shards(), zip(*columns, strict=True), strict=True)
            return {key: size for shard, sizes in shards for key, size in zip(shard.keys, sizes, strict=True)}
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


def _object_columns(identity: Identity, records: list[ShardRecord]) -> dict[str, Any]:
    """The shards of a manifest of format 4 on, and the probes of each view."""
    objects = [record.objects or [] for record in records]
    columns = {
        field: {
            array.name: [getattr(of_shard[place], field) for of_shard in objects]
            for place, array in enumerate(identity.layout.fields)
        }
        for field in ("size", "sha256")
    }
    losses = {
        field: [None if record.loss is None else getattr(record.loss, field) for record in records]
        for field in ("kl", "largest_difference")
    }
    views = _by_view(identity.layout, [record.probes for record in records])
    return {
        "shards": {
            **columns,
            **losses,
            "content": [record.content for record in records],
            "label_agreement": [record.label_agreement for record in records],
            "probed": [len(record.probes) for record in records],
        },
        "probes": [[probe.model_dump(mode="json") for probes in view for probe in probes] for view in views],
    }


def _by_view(layout: StoreLayout, column: list[T]) -> list[list[T]]:
    """A column of all shards, cut into those of each view."""
    per_view = layout.shards_per_view
    return [column[first : first + per_view] for first in range(0, len(column), per_view)]


def _all_columns(columns: Columns) -> Iterator[list[Any]]:
    for field in type(columns).model_fields:
        column = getattr(columns, field)
        yield from column.values() if isinstance(column, dict) else (column,)
