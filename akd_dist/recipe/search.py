"""The `search:` of a block of students: what is tried in it, and how trials are drawn.

    search: {objective.tau_max: [2, 4, 8], optimizer.lr: {low: 1e-3, high: 1e-1, log: true}, trials: 16}

A trial's values are hashes of (seed, number of the draw, key): the same on every machine, and more trials are the same
ones and further ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from akd_dist.base.files import sha256

SETTINGS = ("trials", "seed", "reduction")
"""Keys of a search that are not keys of a student."""
MAX_COMBINATIONS = 10_000
"""Of lists alone: where there are no more, each is tried once."""
_DIGITS = 4  # of numbers from ranges: nobody tells apart, or wants to copy, more


class SearchPart(BaseModel):
    """A part of a search: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Range(SearchPart):
    """Numbers between two bounds, both of them included; whole ones where both bounds are."""

    low: float | int
    """The smallest."""
    high: float | int
    """The largest."""
    log: bool = False
    """Whether it is their logarithm that is drawn uniformly, as for learning rates."""

    @model_validator(mode="after")
    def _rising(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}: low must be less")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: a logarithm needs a number above 0")
        return self

    def at(self, share: float) -> float | int:
        """The number at a share of the range, from 0 to 1 exclusive."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        # A whole number has as much room as any other: half a step beside each bound.
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (float(self.low), float(self.high))
        if self.log:
            low, high = max(low, 0.5) if whole else low, high
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        if whole:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.{_DIGITS}g}"), float(self.low)), float(self.high))


Values = Range | Annotated[list[Any], Field(min_length=1)]


class Search(SearchPart):
    """A search in a block of students."""

    space: dict[str, Values] = Field(min_length=1)
    """Dotted keys of the block, each with a list of values or a range."""
    trials: Annotated[int, Field(ge=2, le=10_000)] = 16
    """How many are drawn; of lists alone, no more than there are combinations."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At each rung, one of so many trials goes on."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Search:
        """A search as it stands in a recipe.

        Raises:
            ValidationError: it is none.
        """
        settings = {key: given[key] for key in SETTINGS if key in given}
        return cls.model_validate({"space": {key: given[key] for key in given if key not in SETTINGS}} | settings)

    def draws(self) -> Iterator[dict[str, Any]]:
        """Combinations of values, one after the other, each once: all of a few; without an end where there are more."""
        lists = [values for values in self.space.values() if isinstance(values, list)]
        if len(lists) == len(self.space) and math.prod(map(len, lists)) <= min(self.trials, MAX_COMBINATIONS):
            yield from (dict(zip(self.space, values, strict=True)) for values in itertools.product(*lists))
            return
        seen = set()
        # A space of few combinations is exhausted some time, and nobody can count what ranges of whole numbers hold.
        for number in range(100 * self.trials):
            drawn = {key: self._drawn(key, values, number) for key, values in self.space.items()}
            if (told := repr(drawn)) not in seen:
                seen.add(told)
                yield drawn

    def _drawn(self, key: str, values: Values, number: int) -> Any:
        share = int(sha256(f"{self.seed} {number} {key}".encode())[:13], 16) / 16**13
        return values[int(share * len(values))] if isinstance(values, list) else values.at(share)


def rung_count(epochs: int, trials: int, reduction: int) -> int:
    """In how many rungs so many trials come down to one, none of them before the first epoch's end.

    Args:
        epochs: of the shortest trial.
    """
    count, left = 1, trials
    while left >= reduction and epochs >= reduction**count:
        left, count = left // reduction, count + 1
    return count


def rung_epochs(epochs: int, count: int, reduction: int) -> list[int]:
    """After which epochs a trial is compared: at the end last, and at each rung before `reduction` times sooner."""
    return [max(1, epochs // reduction**further) for further in reversed(range(count))]
