"""What a store is and how it is computed: settled before the first number is known, and never changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage.encodings import Encoding, encoding_from_config
from akd_dist.storage.layout import FORMAT_VERSION, LOGITS, TARGETS_FORMAT, Shard, StoredArray, StoreLayout
from akd_dist.storage.records import Count, Document, Json, damaged, short
from akd_dist.storage.top_k import TopK, top_k_from_config

# A field, what it holds, and what follows from the fields beside it.
Account = tuple[str, object, object]


def format_of(encoding: Mapping[str, Any], items: int | None = None) -> int:
    """The format of a store: that of before, unless it is `top_k` or its rows have several targets.

    Args:
        encoding: the encoding's config.
        items: targets of all rows, where a row has several.
    """
    return FORMAT_VERSION if items is None and encoding.get("name") != TopK.name else TARGETS_FORMAT


class Identity(Document):
    """What the logits are. Its hash is the store's id, known before anything is computed."""

    format: int = Field(ge=1, le=TARGETS_FORMAT)
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
    items: Count | None = None
    """Targets of all rows of a view, where a row has several: `offsets` tells which are whose. Format 4."""
    tokens: Json | None = None
    """The tokenizer's fingerprint and its vocabulary, where rows are text of several targets. Format 4."""

    @model_validator(mode="after")
    def _in_its_format(self) -> Self:
        if (self.format == TARGETS_FORMAT) != (format_of(self.encoding, self.items) == TARGETS_FORMAT):
            raise ValueError(f"format {self.format} is not that of {self.encoding.get('name')} with items {self.items}")
        if self.tokens is not None and self.items is None:
            raise ValueError("tokens are of rows that have several targets: items is missing")
        return self

    @model_serializer(mode="wrap")
    def _as_before_where_nothing_is_new(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        late = ("items", "tokens")
        return {field: value for field, value in spell(self).items() if value is not None or field not in late}

    @property
    def id(self) -> str:
        """64 hexadecimal digits: the sha256 of the canonical JSON."""
        return sha256(self.to_bytes())

    @property
    def encoded(self) -> Encoding | TopK:
        """The encoding as an object."""
        return top_k_from_config(self.encoding) if self.is_top_k else encoding_from_config(self.encoding)

    @property
    def is_top_k(self) -> bool:
        """Whether it describes logits, instead of holding them."""
        return self.encoding.get("name") == TopK.name

    @property
    def top_k(self) -> TopK:
        """The encoding of a store that describes logits.

        Raises:
            RefusedError: this one holds logits.
        """
        if isinstance(encoded := self.encoded, TopK):
            return encoded
        raise RefusedError("the store holds logits", got=str(encoded), expected="a store of encoding top_k")

    @property
    def codec(self) -> Encoding:
        """The encoding of a store that holds logits.

        Raises:
            RefusedError: this one describes them.
        """
        if isinstance(encoded := self.encoded, Encoding):
            return encoded
        raise RefusedError(
            f"the store holds no logits, but what describes those of {self.classes:,} classes",
            got=str(encoded),
            expected="a store of encoding float32 or float16",
            next="read its targets (StoredTargets), or set cache.encoding: float16 to cache logits",
        )

    @property
    def layout(self) -> StoreLayout:
        """How the store is cut into shards."""
        if self.format < TARGETS_FORMAT:
            return StoreLayout(self.views, self.rows, self.classes, self.codec.dtype)
        encoded = self.encoded
        if isinstance(encoded, TopK):
            arrays = [StoredArray(name, *kept) for name, kept in encoded.arrays(self.classes).items()]
        else:
            arrays = [StoredArray(LOGITS, encoded.dtype, (self.classes,))]
        dtype = "" if isinstance(encoded, TopK) else encoded.dtype
        items = self.rows if self.items is None else self.items
        return StoreLayout(self.views, items, self.classes, dtype, tuple(arrays), several=self.items is not None)

    @property
    def tables(self) -> tuple[str, ...]:
        """What the store has once for all shards: see `tables`."""
        several = ("offsets",) if self.items is not None else ()
        return (*several, "dictionary") if self.is_top_k else several

    def object_sizes(self, shard: Shard) -> list[int] | None:
        """The exact size of each of a shard's objects; None where they are compressed, and no arithmetic tells."""
        return self.layout.object_sizes(shard) if self.encoded.compress == "none" else None

    def object_bytes(self, shard: Shard) -> int | None:
        """The exact size of a shard's objects together; None as of `object_sizes`."""
        sizes = self.object_sizes(shard)
        return None if sizes is None else sum(sizes)

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
        for field, got, expected in described(creation.identity, creation.dataset, creation.teacher):
            if got != expected:
                raise damaged(where, f"{field}: {got}", expected)
        return creation

    @property
    def sha256(self) -> str:
        """The sha256 of its bytes, which the receipts of the store name."""
        return sha256(self.to_bytes())


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


def described(identity: Identity, dataset: dict[str, Any], teacher: dict[str, Any]) -> Iterator[Account]:
    """What the descriptions of dataset and teacher repeat of the identity, as far as they do."""
    yield "dataset.fingerprint", dataset.get("fingerprint", identity.dataset), identity.dataset
    yield "teacher.fingerprint", teacher.get("fingerprint", identity.teacher), identity.teacher
    yield "dataset.rows", dataset.get("rows", identity.rows), identity.rows
    for field, part in (("dataset.meaning", dataset.get("meaning", {})), ("teacher.spec", teacher.get("spec", {}))):
        yield field, part if not isinstance(part, dict) else {}, {}
        if field == "teacher.spec" and identity.tokens is not None:
            continue  # an output layer may have more rows than the data has ids
        yield f"{field}.classes", part.get("classes", identity.classes), identity.classes
    blocks = dataset.get("blocks", [])
    plain = isinstance(blocks, list) and all(isinstance(block, str) for block in blocks)
    yield "dataset.blocks", "digests" if plain else blocks, "digests"
