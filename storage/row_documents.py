"""The documents of prepared rows under a store root: what they are, the receipts of their blocks, the seal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.content import Arrays
from akd_dist.storage.layout import RECEIPTS
from akd_dist.storage.records import Count, Document, Json, Sha256, Signed, Told

ROWS_FORMAT = 1
"""The format of prepared rows whose inputs all have one size (docs/reference/store-format.md)."""
ENCODED_ROWS_FORMAT = 2
"""That of rows whose inputs stay encoded."""
PACKED_ROWS_FORMAT = 3
"""That of the blocks of a language model, and the newest that this version reads."""
MANIFEST_FORMAT = 2
"""The format of their manifests: those of format 1 have no checksum."""
ENCODED_MANIFEST_FORMAT = 3
"""That of the manifests of rows that stay encoded."""
LABELLED_MANIFEST_FORMAT = 4
"""That of the manifests of rows of which some have no label, encoded or not; and the newest that this version reads."""
SPLITS = ("train", "validation", "test")
"""The names of the splits."""
INDEX_COLUMNS = 3
"""What is said of each input that stays encoded: its bytes, and the height and width that it is shown in."""
INDEX_BYTES = INDEX_COLUMNS * 8


class RowsCreation(Document):
    """What prepared rows are, as far as it is known before any is read but for its label."""

    newest: ClassVar[int] = PACKED_ROWS_FORMAT

    format: Annotated[int, Field(ge=1, le=PACKED_ROWS_FORMAT)] = ROWS_FORMAT
    source: Json
    """What they are made from, and how: sources, split, task, tokenizer, how images become pixels."""
    content: Sha256
    """Of the content of the sources' local files: blocks that were written of another are not gone on with."""
    dtype: Literal["|u1", "<f4", "<i4"]
    """That of inputs."""
    shape: list[Count]
    """Of one input."""
    labels: Literal["<i8", "<f4"]
    """The dtype of labels; of a language model, that of the number of targets of each row."""
    block_rows: Count
    """Rows of a block; the last one of a split may have fewer."""
    rows: dict[str, Count]
    """How many, by split."""
    meaning: Json
    """What labels and ids mean, and how encoded pictures become inputs."""
    encoded: Count | None = None
    """Bytes of one input, roughly, where they stay encoded; None, and left out, where each has the same."""

    @model_serializer(mode="wrap")
    def _as_before_any_were_encoded(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None or field != "encoded"}

    @model_validator(mode="after")
    def _says_so_by_its_format(self) -> Self:
        if (self.format == ENCODED_ROWS_FORMAT) != (self.encoded is not None):
            raise ValueError(f"format {self.format} with{'out' if self.encoded is None else ''} encoded inputs")
        if (self.format == PACKED_ROWS_FORMAT) != (self.meaning.get("task") == "language_model"):
            raise ValueError(f"format {self.format} and the task {self.meaning.get('task')}")
        return self

    @cached_property
    def sha256(self) -> str:
        """Of its canonical bytes: receipts name it."""
        return sha256(self.to_bytes())

    def blocks(self, split: str) -> int:
        """How many blocks a split has."""
        return -(-self.rows[split] // self.block_rows)

    def rows_of(self, split: str, number: int) -> int:
        """How many rows a block has."""
        return min(self.block_rows, self.rows[split] - number * self.block_rows)

    def fingerprint(self, split: str, blocks: Sequence[str]) -> str:
        """The fingerprint of a split whose blocks have these digests, in this order."""
        shape = (self.rows[split], *self.shape)
        return fingerprint_of(self.dtype, shape, self.block_rows, self.meaning, blocks)

    def bytes_of(self, rows: int) -> int:
        """Bytes of the object of so many rows; roughly, where inputs stay encoded."""
        return rows * (self.row_bytes + np.dtype(self.labels).itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one input; roughly, where they stay encoded."""
        if self.encoded is not None:
            return self.encoded + INDEX_BYTES
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def arrays(self, data: bytes | bytearray, rows: int) -> Arrays:
        """Inputs [rows, *shape] and labels [rows] within the bytes of a block, without a copy.

        Of inputs that stay encoded: their index, int64 [rows, INDEX_COLUMNS], their bytes, uint8, and labels.
        """
        if self.encoded is not None:
            first, last = rows * INDEX_BYTES, len(data) - rows * np.dtype(self.labels).itemsize
            index = np.frombuffer(data, "<i8", rows * INDEX_COLUMNS).reshape(rows, INDEX_COLUMNS)
            encoded = np.frombuffer(data, np.uint8, last - first, offset=first)
            return index, encoded, np.frombuffer(data, self.labels, rows, offset=last)
        inputs = np.frombuffer(data, self.dtype, rows * math.prod(self.shape)).reshape(rows, *self.shape)
        return inputs, np.frombuffer(data, self.labels, rows, offset=rows * self.row_bytes)


class SealedSplit(Document):
    """The blocks of a split."""

    rows: Count
    fingerprint: Sha256
    blocks: list[Sha256]
    """The sha256 of each block, in the order of rows: the keys of their objects under `blocks/`."""
    classes: list[Annotated[int, Field(ge=0)]]
    """How many rows each class has; empty where there are no classes."""
    sizes: list[Count] | None = None
    """Bytes of each block's object where inputs stay encoded; left out where they follow from the rows."""
    labelled: Annotated[int, Field(ge=0)] | None = None
    """How many rows have labels, the first ones; left out where all have."""
    targets: list[Annotated[int, Field(ge=0)]] | None = None
    """Of a language model how many targets the rows of each block have; left out for others."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_others(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = ("sizes", "labelled", "targets")
        return {field: value for field, value in spell(self).items() if value is not None or field not in later}


class RowsManifest(Signed):
    """The seal of prepared rows: all that whoever reads them has to know."""

    newest: ClassVar[int] = LABELLED_MANIFEST_FORMAT

    format: Annotated[int, Field(ge=1, le=LABELLED_MANIFEST_FORMAT)] = MANIFEST_FORMAT
    creation: RowsCreation
    splits: dict[str, SealedSplit]
    findings: list[str]
    """What a user should know of the rows, a line each."""
    origins: Json
    """What the sources held when they were read."""

    @model_serializer(mode="wrap")
    def _as_in_its_format(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value is not None or field != "checksum"}

    @cached_property
    def sha256(self) -> str:
        """Of its canonical bytes."""
        return sha256(self.to_bytes())

    def block_bytes(self, split: str, number: int) -> int:
        """Bytes of a block's object."""
        sizes = self.splits[split].sizes
        return self.creation.bytes_of(self.creation.rows_of(split, number)) if sizes is None else sizes[number]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the rows of each split."""
        numbers = {split: range(self.creation.blocks(split)) for split in self.splits}
        return {split: sum(self.block_bytes(split, number) for number in numbers[split]) for split in self.splits}

    def accounts(self, rows_id: str) -> Iterator[tuple[str, object, object]]:
        """Each thing that is known twice: its field, what the manifest says, and what follows from all the rest.

        Whoever compares them stops at the first that differs: what comes later builds on those before.

        Args:
            rows_id: the name of the folder that it lies in.
        """
        creation, meaning = self.creation, self.creation.meaning
        yield "checksum", self.checksum, self.digest() if self.format > 1 else None
        yield "creation.source", sha256(canonical_json(creation.source)), rows_id
        yield "creation.rows", sorted(creation.rows), sorted(SPLITS)
        yield "splits", sorted(self.splits), sorted(SPLITS)
        classes, task = meaning.get("classes"), meaning.get("task", "classification")
        of_classes = task == "classification"
        yield "creation.meaning.classes", type(classes).__name__, "int"
        yield "creation.meaning.task", task != "regression", creation.labels == "<i8"
        for name, split in self.splits.items():
            yield f"splits.{name}.rows", split.rows, creation.rows[name]
            yield f"splits.{name}.blocks", len(split.blocks), creation.blocks(name)
            known = None if creation.encoded is None else creation.blocks(name)
            yield f"splits.{name}.sizes", None if split.sizes is None else len(split.sizes), known
            known = creation.blocks(name) if task == "language_model" else None
            yield f"splits.{name}.targets", None if split.targets is None else len(split.targets), known
            yield f"splits.{name}.classes", len(split.classes), classes if of_classes else 0
            labelled = split.rows if split.labelled is None else split.labelled
            yield f"splits.{name}.labelled", labelled < split.rows, split.labelled is not None
            yield f"splits.{name}.labelled", split.labelled is None or self.format == LABELLED_MANIFEST_FORMAT, True
            yield f"splits.{name}.classes", sum(split.classes), labelled if of_classes else 0
            yield f"splits.{name}.fingerprint", split.fingerprint, creation.fingerprint(name, split.blocks)


class BlockReceipt(Told):
    """What the writer of a block says of it."""

    split: str
    number: int = Field(ge=0)
    frames: int = Field(ge=0)
    """Pictures of which only the first of several frames was taken."""
    enlarged: Annotated[int, Field(ge=0)] = 0
    """Pictures that were smaller than the size that they were brought to; left out where there are none."""
    targets: Annotated[int, Field(ge=0)] = 0
    """How many targets the rows of a language model have; left out where there are none."""
    hashes: str
    """A hash of each row's input, by which rows are found that stand in two splits: int64 [rows], in base64."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_sizes(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if value or field not in ("enlarged", "targets")}

    @property
    def receipt_key(self) -> str:
        """By split and number."""
        return receipt_key(self.split, self.number)


def receipt_key(split: str, number: int) -> str:
    """The key of a block's receipt."""
    return f"{RECEIPTS}/{split}-{number}.json"


def fingerprint_of(
    dtype: str, shape: Sequence[int], block_rows: int, meaning: dict[str, Any], blocks: Sequence[str]
) -> str:
    """The fingerprint of rows whose blocks have these digests.

    Args:
        dtype: of inputs.
        shape: of all inputs, [rows, ...].
        block_rows: rows of a block.
        meaning: what labels and ids mean.
    """
    header = {"dtype": dtype, "shape": list(shape[1:]), "rows": shape[0], "block_rows": block_rows, **meaning}
    return sha256(canonical_json({**header, "blocks": list(blocks)}))
