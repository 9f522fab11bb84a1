"""What is said of each shard: its probes, a record of it, the receipt of its writer; and how every document is spelled.

Documents are JSON in one canonical spelling, so that equal documents are equal bytes, and typed strictly: an unknown
field, a missing one or a number where text should be is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import canonical_json, parse_json, sha256
from akd_dist.storage.layout import RECEIPTS, TARGETS_FORMAT


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
    newest: ClassVar[int] = TARGETS_FORMAT
    """The newest format of such documents that is read."""

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
            _refuse_newer(data, where, cls.newest)
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the document"
            expected = f"a document of format {cls.newest} or older"
            raise damaged(where, f"{field}: {first['msg']}", expected) from error
        # A document is known by its hash, so another spelling of the same fields would be another document.
        if document.to_bytes() != data:
            raise damaged(where, "other bytes than its fields spell", "canonical JSON, as it was written")
        return document


class Probe(Document):
    """The augmented view of one row as a digest, by which changed pixels are found out, and a sample of its values."""

    row: int = Field(ge=0)
    sha256: Sha256
    sample: list[int] | list[float] | None = None
    """Some of its values, evenly spaced, by which a change is measured; left out in format 1."""

    @model_serializer(mode="wrap")
    def _as_format_1_without_a_sample(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None}


class Loss(Document):
    """By how much the stored logits of a few rows, those of the probes, differ from the teacher's float32 logits."""

    rows: int = Field(ge=0)
    """How many rows were compared."""
    kl: float | None = Field(ge=0)
    """Mean over these rows of KL(softmax of the teacher's || softmax of the stored), in nats; None for regression."""
    largest_difference: float = Field(ge=0)
    """Largest absolute difference of two logits."""

    @classmethod
    def none(cls, rows: int, classes: int) -> Loss:
        """That of logits which are stored as they are."""
        return cls(rows=rows, kl=0.0 if rows and classes > 1 else None, largest_difference=0.0)

    @classmethod
    def between(
        cls, teacher: npt.NDArray[np.float32], stored: npt.NDArray[np.float32], *, classification: bool
    ) -> Loss:
        """That of the same rows as the teacher gives them and as they are stored, both float32 [n, classes]."""
        z, kept = teacher.astype(np.float64), stored.astype(np.float64)
        kl = None
        if classification and len(z):
            log_p, log_q = (each - np.logaddexp.reduce(each, axis=1, keepdims=True) for each in (z, kept))
            # The difference of nearly equal numbers may come out below zero by its last bits.
            kl = max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))
        return cls(rows=len(z), kl=kl, largest_difference=float(np.abs(z - kept).max(initial=0.0)))

    @classmethod
    def together(cls, parts: Iterable[Loss]) -> Loss:
        """That of all rows of several."""
        some = [part for part in parts if part.rows]
        rows = sum(part.rows for part in some)
        kl = None if any(part.kl is None for part in some) else sum((part.kl or 0.0) * part.rows for part in some)
        return cls(
            rows=rows,
            kl=kl if kl is None or not rows else kl / rows,
            largest_difference=max((part.largest_difference for part in some), default=0.0),
        )


class ObjectRecord(Document):
    """One of several objects that belong together."""

    key: str
    """Relative to `arrays.zarr`."""
    size: Count
    sha256: Sha256

    @classmethod
    def of(cls, objects: Mapping[str, bytes]) -> list[ObjectRecord]:
        """Those of some objects by key, in order."""
        return [cls(key=key, size=len(data), sha256=sha256(data)) for key, data in objects.items()]


def joined(objects: Iterable[ObjectRecord]) -> str:
    """The sha256 of several objects together: that of theirs, as text, one after the other."""
    return sha256("".join(one.sha256 for one in objects).encode())


class ShardRecord(Document):
    """What the seal says of a shard."""

    key: str
    """Its object, relative to `arrays.zarr`; from format 4 on, where it has several, its view and index."""
    size: Count
    """Bytes of all its objects."""
    sha256: Sha256
    """That of its object; from format 4 on of all, see `joined`."""
    rows: Count
    """Items in the shard: rows, or targets where a row has several."""
    finite: bool
    label_agreement: float | None = Field(ge=0, le=1)
    """Share of the shard's rows where the teacher's first class is the label; None for regression, from format 2 on."""
    probes: list[Probe]
    content: Sha256 | None = None
    """sha256 of the decoded logits, [rows, classes] in the stored dtype, little-endian; from format 3 on. Another
    version of a compressor may write other bytes, which hold the same logits."""
    loss: Loss | None = None
    """What storing changed, on the rows of the probes; from format 3 on, of stores of logits."""
    objects: list[ObjectRecord] | None = None
    """Its objects, in the order of the layout; from format 4 on."""
    dictionary: Sha256 | None = None
    """That of the dictionary it was described by, of a `top_k` store."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of its objects, by key."""
        return {self.key: self.size} if self.objects is None else {one.key: one.size for one in self.objects}

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each of its objects, by key."""
        return {self.key: self.sha256} if self.objects is None else {one.key: one.sha256 for one in self.objects}

    @model_serializer(mode="wrap")
    def _without_what_it_has_not(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Receipts of before these fields have to spell as they were written: other bytes would count as damage.
        late = ("creation", "checksum", "content", "loss", "objects", "dictionary")
        return {field: value for field, value in spell(self).items() if value is not None or field not in late}


class ShardColumns(Document):
    """What the seal says of all shards, view by view in row order: a column for each field that does not follow from
    the layout. A store of 50,000 shards is read in a fraction of the time that a record for each would take."""

    size: list[Count]
    sha256: list[Sha256]
    content: list[Sha256]
    label_agreement: list[Annotated[float, Field(ge=0, le=1)] | None]
    kl: list[Annotated[float, Field(ge=0)] | None]
    largest_difference: list[Annotated[float, Field(ge=0)]]

    def __len__(self) -> int:
        return len(self.sha256)


class ObjectColumns(Document):
    """What the seal says of all shards, from format 4 on: as `ShardColumns`, of each array's objects."""

    size: dict[str, list[Count]]
    """By array."""
    sha256: dict[str, list[Sha256]]
    """By array."""
    content: list[Sha256]
    label_agreement: list[Annotated[float, Field(ge=0, le=1)] | None]
    probed: list[Annotated[int, Field(ge=0)]]
    """How many probes are of each shard. A row with several targets is of the shard that has the first of them."""
    kl: list[Annotated[float, Field(ge=0)] | None]
    """Null where no logits are stored, as is the next; see `fidelity` then."""
    largest_difference: list[Annotated[float, Field(ge=0)] | None]

    def __len__(self) -> int:
        return len(self.content)


class Signed(Document):
    """A document that may carry a checksum of itself, by which a changed byte is noticed."""

    checksum: Sha256 | None = None
    """sha256 of the canonical JSON of all the other fields; documents of earlier versions have none."""

    @property
    def is_intact(self) -> bool:
        """Whether it is what was written. One without a checksum is not known to be."""
        return self.checksum is not None and self.checksum == self.digest()

    def signed(self) -> Self:
        """The same with its checksum."""
        return self.model_copy(update={"checksum": self.digest()})

    def digest(self) -> str:
        """The checksum that it has to have."""
        return sha256(canonical_json(self.model_dump(mode="json", exclude={"checksum"})))


class Told(Signed):
    """What the writer of an object says of it, once it is durable."""

    key: str
    size: Count
    sha256: Sha256
    rows: Count
    seconds: float = Field(ge=0)
    """What computing the object took; 0 where it was found, or taken from another store."""
    host: str
    creation: Sha256 | None = None
    """sha256 of the creation document that it was written under. Receipts of earlier versions have none."""

    @property
    @abstractmethod
    def receipt_key(self) -> str:
        """Where it lies, relative to the store."""


class Receipt(ShardRecord, Told):
    """What the writer of a shard says of it."""

    @classmethod
    def of(cls, record: ShardRecord, creation: str, seconds: float, host: str) -> Receipt:
        """The receipt of a shard that was written under the creation document of this sha256."""
        return cls(**record.model_dump(), seconds=round(seconds, 6), host=host, creation=creation).signed()

    def record(self) -> ShardRecord:
        """The part that goes into the seal: nothing of when and where."""
        return ShardRecord(**{field: getattr(self, field) for field in ShardRecord.model_fields})

    @property
    def receipt_key(self) -> str:
        """That of the shard's object, `logits/c/<view>/<index>/0`; from format 4 on of `<view>/<index>`."""
        *_, view, index = self.key.removesuffix("/0").split("/") if self.objects is None else self.key.split("/")
        return f"{RECEIPTS}/{view}-{index}.json"


def short(value: object) -> str:
    """A value as a message shows it."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_newer(data: bytes, where: str, newest: int) -> None:
    try:
        fields = parse_json(data)
    except ValueError:
        return
    # A manifest says its format at the top, a creation document within its identity.
    inner = fields.get("identity") if isinstance(fields, dict) else None
    for holder in (fields, inner):
        version = holder.get("format") if isinstance(holder, dict) else None
        if isinstance(version, int) and version > newest:
            raise RefusedError(
                f"{where} is in a newer format than this version of akd-dist reads",
                got=f"format {version}",
                expected=f"format {newest} or older",
                next="update akd-dist, or read the store with the version that wrote it",
            )


def damaged(where: str, got: object, expected: object) -> AkdError:
    """The refusal of a document that is not what was written."""
    return DamagedError(
        f"{where} is damaged",
        got=short(got),
        expected=short(expected),
        next="bring the file back from a copy of the store",
    )
