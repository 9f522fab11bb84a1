"""What every part of a recipe is made of: frozen objects that know every key, and types with bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from akd_dist.base.trusted import Trusted

# A function of the user's, as `module:function`.
FACTORY = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Task = Literal["classification", "regression", "language_model"]
Device = Literal["cpu", "cuda"]
Split = Literal["train", "validation", "test"]
LogitKind = Literal["logits", "log_probabilities"]
"""What a row of stored logits is: raw logits, or less a constant of the row that makes them log-probabilities."""
Target = Literal["onnx", "torch-export", "huggingface"]
"""What a model is exported to."""
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "cross_entropy", "custom"]
METRICS: dict[Task, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "language_model": ("cross_entropy", "accuracy"),
}
"""The metrics of each task, its usual primary one first. One of the user's own, `custom`, is there for those of rows
with one label each."""
LOWEST_IS_BEST: frozenset[Metric] = frozenset({"cross_entropy"})
"""The metrics of which less is better."""
Count = Annotated[int, Field(ge=1)]
# Bounds of what a document may ask for, far above any model: within them, memory decides (`models.build.check_memory`).
Width = Annotated[int, Field(ge=1, le=10**12)]
Layers = Annotated[int, Field(ge=1, le=2_000)]
Classes = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Length = Annotated[int, Field(ge=1, le=10**7)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Byte = Annotated[int, Field(ge=0, le=255)]

# What a block's `kind` may be; `ModelKind[Literal["mlp"]]` and its like add the description that editors show.
Name = TypeVar("Name")


class NotRightError(ValueError):
    """What is wrong with a key, apart from what would be right, where the two are not the value's own.

    Args:
        why: what is wrong.
        expected: what would be right.
        key: where it stands below the part of the recipe that finds it.
    """

    def __init__(self, why: str, expected: str, key: tuple[str | int, ...] = ()) -> None:
        super().__init__(f"{why}: {expected}")
        self.why, self.expected, self.key = why, expected, key


class Spec(BaseModel):
    """A part of a recipe: frozen, every key known, no silent conversion of types, no NaN."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Growing(Spec):
    """A part that has learnt keys since recipes began to be kept. Where these hold their defaults they are left out of
    what it is written as, so that runs and models of before are found by what their recipes said."""

    later: ClassVar[tuple[str, ...]] = ()
    """Those keys."""

    @model_serializer(mode="wrap")
    def _as_before_where_nothing_is_new(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value
            for key, value in spell(self).items()
            if key not in self.later or getattr(self, key) != fields[key].default
        }


class Factory(Spec):
    """What may name code of the user's own. It runs nothing before `trust` has said on whose word it may."""

    _trusted: Trusted = PrivateAttr(default_factory=Trusted)

    if TYPE_CHECKING:  # fields of each kind, in their own place among the others
        factory: str
        arguments: dict[str, JsonValue]

    @property
    def trusted(self) -> Trusted:
        """Which factories may be imported for it; no part of what it says, and gone when it is read back."""
        return self._trusted


def label_of(text: str) -> str:
    """Text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:60]


def one_or_several(value: object) -> str:
    """The tag of a value of which there may be a list."""
    return "several" if isinstance(value, list) else "one"


def label_of_call(factory: str, arguments: Mapping[str, object]) -> str:
    """The function that a factory names, and its arguments as far as they are plain, as part of a folder's name."""
    plain = {key: value for key, value in arguments.items() if isinstance(value, str | int | float)}
    return label_of("-".join([factory.partition(":")[2], *(f"{key}{value}" for key, value in plain.items())]))
