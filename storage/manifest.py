"""The documents of a store: its identity, how it was computed, a receipt for each shard, the manifest that seals it.

They are JSON in one canonical spelling, so that equal documents are equal bytes, and typed strictly: an unknown field,
a missing one or a number where text should be is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import canonical_json, parse_json, sha256
from akd_dist.storage.encodings import Encoding, encoding_from_config
from akd_dist.storage.layout import ARRAY_KEY, FORMAT_VERSION, GROUP_KEY, Shard, StoreLayout

# A field, what it holds, and what follows from the fields beside it.
Account = tuple[str, object, object]


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    # What cannot be spelled canonically (NaN, a tuple, a Path) must not get into something that is hashed.
    if parse_json(canonical_json(value)) != value:
        raise ValueError("holds something that JSON does not keep as it is")
    return value


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
Json = Annotated[dict[str, Any], AfterValidator(_plain_json)]


class Document(BaseModel):
    """A frozen, strict JSON document."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """The canonical bytes that are stored and hashed."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a document back; the very bytes must be canonical.

        Raises:
            RefusedError: it was written in a newer format.
            DamagedError: not JSON, a field wrong, or another spelling; names `where` and the field.
        """
        try:
            document = cls.model_validate_json(data)
        except ValidationError as error:
            # A newer format may have fields that are unknown here, which is no damage.
            _refuse_newer(data, where)
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the document"
            expected = f"a document of format {FORMAT_VERSION} or older"
            raise _damaged(where, f"{field}: {first['msg']}", expected) from error
        # A document is known by its hash, so another spelling of the same fields would be another document.
        if document.to_bytes() != data:
            raise _damaged(where, "other bytes than its fields spell", "canonical JSON, as it was written")
        return document


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
                raise _damaged(where, f"{field}: {got}", expected)
        return creation

    @property
    def sha256(self) -> str:
        """The sha256 of its bytes, which the receipts of the store name."""
        return sha256(self.to_bytes())


class Probe(Document):
    """The augmented view of one row as a digest, by which changed pixels are found out, and a sample of its values."""

    row: int = Field(ge=0)
    sha256: Sha256
    sample: list[int] | list[float] | None = None
    """Some of its values, evenly spaced, by which a change is measured; left out in format 1."""

    @model_serializer(mode="wrap")
    def _as_format_1_without_a_sample(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None}


class ShardRecord(Document):
    """What the seal says of a shard."""

    key: str
    size: Count
    sha256: Sha256
    rows: Count
    finite: bool
    label_agreement: float | None = Field(ge=0, le=1)
    """Share of the shard's rows where the teacher's first class is the label; None for regression, from format 2 on."""
    probes: list[Probe]


class Receipt(ShardRecord):
    """What the writer of a shard says of it, once it is durable."""

    seconds: float = Field(ge=0)
    """What computing the shard took; 0 where it was found, or taken from another store."""
    host: str
    creation: Sha256 | None = None
    """sha256 of the creation document that it was written under."""
    checksum: Sha256 | None = None
    """sha256 of the canonical JSON of all the other fields. Receipts of earlier versions have neither."""

    @classmethod
    def of(cls, record: ShardRecord, creation: str, seconds: float, host: str) -> Receipt:
        """The receipt of a shard that was written under the creation document of this sha256."""
        told = cls(**record.model_dump(), seconds=round(seconds, 6), host=host, creation=creation)
        return told.model_copy(update={"checksum": told._digest()})

    def record(self) -> ShardRecord:
        """The part that goes into the seal: nothing of when and where."""
        return ShardRecord.model_validate(self.model_dump(include=set(ShardRecord.model_fields)))

    @property
    def is_intact(self) -> bool:
        """Whether it is what was written. One without a checksum is not known to be."""
        return self.checksum is not None and self.checksum == self._digest()

    def _digest(self) -> str:
        return sha256(canonical_json(self.model_dump(mode="json", exclude={"checksum"})))

    @model_serializer(mode="wrap")
    def _as_before_without_a_checksum(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Receipts of before these fields have to spell as they were written: other bytes would count as damage.
        late = ("creation", "checksum")
        return {field: value for field, value in spell(self).items() if value is not None or field not in late}


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
    shards: list[ShardRecord]
    """Every shard, view by view, in row order."""
    sha256: Sha256
    """sha256 of the canonical JSON of all the other fields."""

    @classmethod
    def seal(cls, creation: Creation, zarr_json: Mapping[str, str], shards: Iterable[ShardRecord]) -> Manifest:
        """The manifest of a complete store."""
        fields = {
            "format": creation.identity.format,
            "id": creation.identity.id,
            **creation.model_dump(mode="json"),
            "zarr_json": dict(zarr_json),
            "shards": [shard.model_dump(mode="json") for shard in shards],
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
                raise _damaged(where, f"{field}: {got}", expected)
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
        yield "shards", f"{len(self.shards)} of them", f"{layout.shard_count} of them"
        for number, (record, shard) in enumerate(zip(self.shards, layout.shards(), strict=True)):
            where = f"shards.{number}"
            yield f"{where}.key", record.key, shard.key
            yield f"{where}.rows", record.rows, shard.rows
            yield f"{where}.size", record.size, layout.stored_bytes(shard)
            yield f"{where}.finite", record.finite, True
            rows = [probe.row for probe in record.probes]
            yield f"{where}.probes", rows, [row for row in rows if shard.start <= row < shard.stop]

    def record(self, shard: Shard) -> ShardRecord:
        """What the seal says of a shard."""
        return self.shards[shard.view * self.identity.layout.shards_per_view + shard.index]

    def creation(self) -> Creation:
        """The creation document this manifest was sealed from."""
        return Creation(identity=self.identity, computed=self.computed, dataset=self.dataset, teacher=self.teacher)


def differences(ours: BaseModel, theirs: BaseModel) -> list[str]:
    """Fields, nested ones by dotted name, in which two documents differ, as "field: ours != theirs"."""
    mine, others = (dict(_flat(document.model_dump(mode="json"))) for document in (ours, theirs))
    return [
        f"{field}: {_short(mine.get(field))} != {_short(others.get(field))}"
        for field in dict.fromkeys([*mine, *others])
        if mine.get(field) != others.get(field)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def _refuse_newer(data: bytes, where: str) -> None:
    try:
        fields = parse_json(data)
    except ValueError:
        return
    inner = fields.get("identity") if isinstance(fields, dict) else None
    # A manifest says its format at the top, a creation document within its identity.
    for holder in (fields, inner):
        version = holder.get("format") if isinstance(holder, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise RefusedError(
                f"{where} is in a newer format than this version of akd-dist reads",
                got=f"format {version}",
                expected=f"format {FORMAT_VERSION} or older",
                next="update akd-dist, or read the store with the version that wrote it",
            )


def _damaged(where: str, got: object, expected: object) -> AkdError:
    return DamagedError(
        f"{where} is damaged",
        got=_short(got),
        expected=_short(expected),
        next="bring the file back from a copy of the store",
    )
