"""How a teacher's logits are computed and stored."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic_core import CoreSchema

from akd_dist.recipe.base import Count, NotRightError, Spec
from akd_dist.recipe.training import Precision

Temperature = Annotated[float, Field(ge=1, le=100)]

# The curve through what is stored of a tail is a polynomial: of many places, or of some that nearly are one, it swings.
_MOST_TEMPERATURES = 8
_APART = 1.01
_DENSE = ("keep_bits", "compress")
_OF_TOP_K = ("k", "rank", "value_bits", "tail_temperatures", "probe_rows")


class EncodingSpec(Spec):
    """How logits are stored, in full: `encoding: float16` says the same as `encoding: {kind: float16}`."""

    kind: Literal["float32", "float16", "top_k"] = "float32"
    """Precision of all logits of a target; or `top_k`, the largest ones and what describes the others, for many
    classes."""
    keep_bits: Annotated[int, Field(ge=1, le=22)] | None = None
    """Bits of the mantissa to keep, of 10 or 23: the others are rounded to zero, which compresses better. 7 changes
    logits by less than 0.4 %."""
    compress: Literal["none", "zstd", "blosc"] = "none"
    """Codec of the stored chunks; `blosc` shuffles bytes first, which makes logits smaller still."""
    k: Count = 16
    """Of top_k: how many of the largest logits are stored, each with its class."""
    rank: Annotated[int, Field(ge=0)] = 16
    """Of top_k: how many coefficients describe the other logits, in a basis that the store holds once."""
    value_bits: Literal[4, 6, 8, 16] = 6
    """Of top_k: bits of each stored logit."""
    tail_temperatures: Annotated[tuple[Temperature, ...], Field(strict=False, min_length=1)] = (1.0, 4 / 3, 2.0)
    """Of top_k: the temperatures, 1 and above, at which the probability of the other classes is stored; at others it
    follows from these."""
    probe_rows: Count = 64
    """Of top_k: of how many rows of its split the basis is made, or more where these have few targets."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> EncodingSpec:
        strange = _DENSE if self.kind == "top_k" else _OF_TOP_K
        if given := [key for key in strange if key in self.model_fields_set]:
            fits = "float32 and float16" if self.kind == "top_k" else "top_k"
            raise NotRightError(f"it is for {fits}, and kind is {self.kind}", "it left out", (given[0],))
        return self

    @model_validator(mode="after")
    def _temperatures_apart(self) -> EncodingSpec:
        ordered = sorted(self.tail_temperatures)
        if len(ordered) > _MOST_TEMPERATURES:
            raise NotRightError("there are too many", f"{_MOST_TEMPERATURES} at most", ("tail_temperatures",))
        for one, other in itertools.pairwise(ordered):
            if other < one * _APART:
                same = "a temperature stands there twice" if one == other else f"{one} and {other} are nearly the same"
                raise NotRightError(same, "temperatures at least 1 % apart", ("tail_temperatures",))
        return self

    @model_validator(mode="after")
    def _fewer_bits_than_there_are(self) -> EncodingSpec:
        if self.kind == "top_k":
            return self
        most = {"float16": 10, "float32": 23}[self.kind]
        if self.keep_bits is not None and self.keep_bits >= most:
            raise ValueError(f"keep_bits: {self.keep_bits} keeps all: {self.kind} has {most} bits of mantissa")
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_a_word(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @model_serializer(mode="plain")
    def _as_short_as_it_was_before_there_was_more(self) -> str | dict[str, Any]:
        # Two spellings of the same are one recipe, and runs of before are the same runs.
        config = self.config()
        return self.kind if len(config) == 1 else {"kind": self.kind} | {k: v for k, v in config.items() if k != "name"}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        return {"anyOf": [{"enum": ["float32", "float16", "top_k"], "type": "string"}, schema]}

    def config(self) -> dict[str, Any]:
        """The encoding as a store's identity has it: what is not used is left out."""
        if self.kind == "top_k":
            temperatures = sorted(self.tail_temperatures)
            return {"name": self.kind} | {key: getattr(self, key) for key in _OF_TOP_K} | {_OF_TOP_K[3]: temperatures}
        bits = {} if self.keep_bits is None else {"keep_bits": self.keep_bits}
        return {"name": self.kind} | bits | ({} if self.compress == "none" else {"compress": self.compress})


class CacheSpec(Spec):
    """How the teacher's logits are computed and stored."""

    encoding: EncodingSpec = EncodingSpec()
    """Precision of the stored logits, and how they are made smaller."""
    batch_rows: Count = 256
    """Rows that the teacher sees at once. Part of how a store is computed: another number may change the last bits."""
    threads: Count = 1
    """CPU threads of each caching task. As batch_rows, part of how a store is computed."""
    precision: Precision = "float32"
    """Numbers that the teacher computes with; another precision is another teacher, with a store of its own."""
    channels_last: bool = False
    """Whether images are laid out with their channels last, which convolutions often compute faster. As precision, it
    makes another teacher, with a store of its own."""
    compile: bool = False
    """Whether the teacher is compiled by torch.compile, which takes a while to begin with. As precision, it makes
    another teacher, with a store of its own."""

    @property
    def inference(self) -> dict[str, bool]:
        """How the teacher is run, as stores remember it: what is as by default is left out."""
        return {name: True for name in ("channels_last", "compile") if getattr(self, name)}
