"""What losses need to know of a teacher's logits, however these are stored; and logits that are stored whole."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Distribution(ABC):
    """The teacher's probabilities p of m targets at one temperature."""

    negentropy: Tensor
    """The sum of p log p, float [m]."""

    @abstractmethod
    def dot(self, s: Tensor) -> Tensor:
        """The sum of p s over classes, [m], for s [m, classes]."""

    @abstractmethod
    def take_from(self, q: Tensor) -> None:
        """Subtract p from q [m, classes], in place."""


class Targets(ABC):
    """The teacher's side of n targets on a device. Students read from it, none changes it."""

    classes: int
    """How many logits a target has."""
    choice: Tensor
    """The class of the largest logit, int64 [n]; the smallest of those that are tied."""

    def __len__(self) -> int:
        return len(self.choice)

    @abstractmethod
    def distribution(self, temperature: float, rows: slice) -> Distribution:
        """The probabilities of a block of targets.

        Raises:
            RefusedError: what is stored does not say what they are at this temperature.
        """

    def probabilities(self, temperature: float, rows: slice) -> Tensor:
        """p of a block of targets as an array, float [m, classes]; shared, so nobody changes it."""
        found = self.distribution(temperature, rows)
        if isinstance(found, Whole):
            return found.p
        zeros = torch.zeros(
            len(found.negentropy), self.classes, dtype=found.negentropy.dtype, device=self.choice.device
        )
        found.take_from(zeros)
        return zeros.neg_()

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """The logits of a block of targets as they are known, float [m, classes]; the caller's own to change."""


@dataclass(frozen=True, eq=False)
class Whole(Distribution):
    """Probabilities that are all there."""

    p: Tensor
    """float [m, classes]; shared, so nobody changes it."""
    negentropy: Tensor

    def dot(self, s: Tensor) -> Tensor:
        """As `Distribution.dot`."""
        return row_dots(self.p, s)

    def take_from(self, q: Tensor) -> None:
        """As `Distribution.take_from`."""
        q.sub_(self.p)


@dataclass(eq=False)
class DenseTargets(Targets):
    """Logits that are stored whole: of float32 or float16 stores, or of a teacher in the loop."""

    stored: Tensor
    """[n, classes], of any float dtype."""
    dtype: torch.dtype = torch.float32
    """What is computed in."""

    def __post_init__(self) -> None:
        self.classes = self.stored.shape[1]

    @functools.cached_property
    def choice(self) -> Tensor:  # type: ignore[override]
        """As `Targets.choice`."""
        return self.stored.argmax(1)

    def __len__(self) -> int:
        return len(self.stored)

    def distribution(self, temperature: float, rows: slice) -> Whole:
        """softmax(z / T)."""
        z = self.logits(rows).div_(temperature)
        p, lse = softmax_and_lse(z)
        return Whole(p, row_dots(p, z) - lse)

    def logits(self, rows: slice) -> Tensor:
        """z."""
        return self.stored[rows].to(self.dtype, copy=True)


def softmax_and_lse(s: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [m, classes] of logits, and the log of the sum of the exponentials, [m].

    The latter is read off the largest probability, which is at least 1 / classes: there is one exponential a logit.
    """
    q = torch.softmax(s, dim=1)
    return q, s.amax(1) - q.amax(1).log()


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b along each row, [m]; of blocks, whose product stays in the cache."""
    return (a * b).sum(1)
