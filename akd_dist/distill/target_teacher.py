"""A teacher asked for what a store of targets keeps: a language model of blocks, or a classifier of many classes.

Rows are shown in batches of one shape, the last one padded with copies of its first row, as kernels choose their order
of summation by the shape. Logits exist for a chunk of targets, or for one batch where they are no linear function of
hidden states that could be told apart.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.packing import IDS, TARGETS
from akd_dist.data.rows import Rows
from akd_dist.data.views import view_of
from akd_dist.distill.capture import Captured, capture, capture_chunk, capture_logits
from akd_dist.distill.dictionary import ComputedProbe, HiddenProbe, Probe
from akd_dist.distill.output_head import Head, parts
from akd_dist.distill.sparse import TailDictionary
from akd_dist.models.device import autocast
from akd_dist.models.language import LanguageModel
from akd_dist.models.output_layer import OutputLayer, output_layer, states_of

MOST_TOKENS = 16_384
"""Tokens that a language model sees at once, whatever `cache.batch_rows` says; one block at least."""
_LOGIT_BYTES = 2**28  # of a batch's logits in float32, where they have to be there all at once


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows as the teacher sees them, and those of their targets that are asked for."""

    inputs: Tensor
    """[n, *shape], raw, on any device."""
    places: np.ndarray
    """int64 [m]: where the targets stand, row after row: n * length positions of blocks, or n rows."""
    targets: np.ndarray
    """int64 [m]: their numbers in the split."""
    labels: np.ndarray
    """int64 [m]: the next tokens, or the labels, -1 for none."""

    def within(self, start: int, stop: int) -> Batch:
        """The same rows, asked for targets start..stop - 1 alone."""
        kept = (self.targets >= start) & (self.targets < stop)
        return Batch(self.inputs, self.places[kept], self.targets[kept], self.labels[kept])


@dataclass(eq=False)
class TargetTeacher(ABC):
    """A model that is asked for targets of rows: what `LanguageTeacher` and `WideTeacher` have in common.

    Raises:
        RefusedError: by all that asks, logits that are not finite; names the target.
    """

    module: nn.Module
    """In eval mode, on its device."""
    rows: Rows
    cache: recipe.CacheSpec
    most: int
    """Rows that a batch has at most: more than a shard has rows would all be padding."""

    def __post_init__(self) -> None:
        self.classes = self.rows.classes
        self.device = next(self.module.parameters()).device
        self.size, self.head = min(self.cache.batch_rows, self.most), self._head()
        self.chunk = capture_chunk(self.classes)
        self._logits: Tensor | None = None  # memory for a chunk of them

    def _head(self) -> Head | None:
        """What makes logits of hidden states, where that is a linear function."""
        return None

    @abstractmethod
    def span(self, start: int, stop: int) -> range:
        """The rows that targets start..stop - 1 are of."""

    @abstractmethod
    def batch(self, numbers: np.ndarray, view: int) -> Batch:
        """Rows with these numbers, and all of their targets."""

    @abstractmethod
    def named(self, batch: Batch, place: int) -> str:
        """What a message calls the target at a place of a batch."""

    def batches(self, view: int, start: int, stop: int) -> Iterator[Batch]:
        """Batches of targets start..stop - 1, from the row on that has the first of them: what stands beside a row in
        its batch depends on these alone."""
        span = self.span(start, stop)
        for first in range(span.start, span.stop, self.size):
            yield self.batch(np.arange(first, min(first + self.size, span.stop)), view).within(start, stop)

    def described(
        self, batch: Batch, k: int, temperatures: Sequence[float], dictionary: TailDictionary | None
    ) -> Captured:
        """What there is to store of a batch's targets where logits are described.

        Args:
            k: how many logits.
            temperatures: where the tail's mass is asked for.
        """
        given: dict[str, Any] = {"k": k, "temperatures": temperatures, "classes": self.classes}
        given["named"] = lambda place: self.named(batch, place)
        if self.head is None:
            return capture_logits(self._whole(batch), dictionary, **given)
        h = self.states(batch)
        if self._logits is None:
            self._logits = torch.empty(self.chunk, self.classes, dtype=h.dtype, device=h.device)
        return capture(h, self.head, dictionary, chunk=self.chunk, out=self._logits, **given)

    def logits(self, batch: Batch) -> Tensor:
        """All logits of a batch's targets, float32 [m, classes]."""
        if self.head is None:
            return self._whole(batch)[:, : self.classes].float()
        h, found = self.states(batch), []
        with torch.inference_mode():
            for part in parts(0, len(h), self.chunk):
                given = h[part]
                padding = given[:1].expand(self.chunk - len(given), -1)
                found.append(self.head.logits(torch.cat([given, padding]))[: len(given)].float())
        return torch.cat(found) if found else torch.zeros(0, self.classes, device=self.device)

    def probe(self, numbers: np.ndarray, done: Callable[[int], None] = lambda rows: None) -> Probe:
        """The targets of some rows, as often as their logits are asked for.

        Args:
            done: told how many more rows were run, where hidden states are kept of them.
        """
        if self.head is not None:
            found = []
            for batch in self._some(numbers):
                found.append(self._finite(self.states(batch), batch))
                done(len(batch.inputs))
            return HiddenProbe(torch.cat(found), self.head, self.classes)
        counts = np.diff(self.rows.offsets)[numbers]
        row_of, first_of = np.repeat(numbers, counts), np.cumsum(counts) - counts

        def compute(wanted: Tensor, out: Tensor) -> Tensor:
            asked = wanted.cpu().numpy()
            found = out[: len(asked)]
            for batch in self._some(np.unique(row_of[asked])):
                # Numbers among the probe's targets, of those that the rows of this batch have.
                rows = np.unique(np.searchsorted(self.rows.offsets, batch.targets, "right") - 1)
                first = np.searchsorted(numbers, rows)
                ours = np.concatenate([np.arange(first_of[at], first_of[at] + counts[at]) for at in first])
                here, at, place = np.intersect1d(asked, ours, return_indices=True)
                if len(here):
                    found[torch.from_numpy(at)] = self._whole(batch)[torch.from_numpy(place), : self.classes].float()
            return found

        return ComputedProbe(compute, int(counts.sum()), self.classes, self.device)

    def states(self, batch: Batch) -> Tensor:
        """The hidden states of a batch's targets, [m, d]; where there is a head."""
        raise NotImplementedError

    @abstractmethod
    def _whole(self, batch: Batch) -> Tensor:
        """The logits of a batch's targets all at once, [m, columns], of the dtype that is computed in."""

    def _finite(self, h: Tensor, batch: Batch) -> Tensor:
        wrong = (~torch.isfinite(h).all(1)).nonzero()
        if len(wrong):
            raise RefusedError(
                "the teacher's hidden states are not finite",
                got=f"{self.named(batch, int(wrong[0, 0]))}, and {len(wrong) - 1:,} more of {len(h):,} targets",
                expected="finite numbers",
                next="compute the teacher in float32 or bfloat16, and check its weights",
            )
        return h

    def _some(self, numbers: np.ndarray) -> Iterator[Batch]:
        return (self.batch(numbers[part], 0) for part in parts(0, len(numbers), self.size))

    def _run(self, function: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """What a function of inputs says of a batch, padded to its shape: [size, ...]."""
        inputs = batch.inputs.to(self.device)
        padding = inputs[:1].expand(self.size - len(inputs), *inputs.shape[1:])
        with torch.inference_mode(), autocast(self.device, self.cache.precision):
            return function(torch.cat([inputs, padding]))

    def _at(self, batch: Batch) -> Tensor:
        return torch.from_numpy(batch.places).to(self.device)


class LanguageTeacher(TargetTeacher):
    """A language model: the targets of a block are its scored positions."""

    module: LanguageModel

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.rows.shape[-1]
        tokens = MOST_TOKENS if self.head is not None else min(MOST_TOKENS, _LOGIT_BYTES // (4 * self.classes))
        self.size = max(1, min(self.size, tokens // length))
        # No more of a chunk is padding than has to be: small vocabularies would have chunks larger than a batch.
        self.chunk = min(capture_chunk(self.classes), 1 << (self.size * length - 1).bit_length())

    def _head(self) -> Head | None:
        return Head(self.module.output_weight.detach()).cut(self.classes) if self.module.linear_head else None

    def span(self, start: int, stop: int) -> range:
        """As `TargetTeacher.span`: a row may be of two shards."""
        offsets = self.rows.offsets
        return range(int(np.searchsorted(offsets, start, "right")) - 1, int(np.searchsorted(offsets, stop, "left")))

    def batch(self, numbers: np.ndarray, view: int) -> Batch:
        """As `TargetTeacher.batch`; blocks have one view."""
        blocks = np.array(self.rows.inputs.take(numbers, axis=0))
        places = np.flatnonzero(blocks[:, TARGETS])
        counts, offsets = blocks[:, TARGETS].astype(bool).sum(1), self.rows.offsets[numbers]
        targets = np.repeat(offsets - (np.cumsum(counts) - counts), counts) + np.arange(len(places))
        # A target is never the last position of its block.
        labels = blocks[:, IDS].reshape(-1)[places + 1].astype(np.int64)
        return Batch(torch.from_numpy(blocks), places, targets, labels)

    def named(self, batch: Batch, place: int) -> str:
        """By row and position."""
        target, position = int(batch.targets[place]), int(batch.places[place]) % self.rows.shape[-1]
        return f"row {int(np.searchsorted(self.rows.offsets, target, 'right')) - 1}, position {position}"

    def states(self, batch: Batch) -> Tensor:
        """As `TargetTeacher.states`."""
        return self._run(self.module.hidden, batch).flatten(0, 1)[self._at(batch)]

    def _whole(self, batch: Batch) -> Tensor:
        return self._run(self.module, batch).flatten(0, 1)[self._at(batch)]


@dataclass(eq=False)
class WideTeacher(TargetTeacher):
    """A classifier: each row is a target, which has a view."""

    augmentation: recipe.Augmentation
    seed: int
    """Of the views."""
    output: OutputLayer | None = field(default=None, init=False)
    """What its logits come from, where that is a linear layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Chunks of a size, so that none of a whole batch is padding.
        chunks = -(-self.size // self.chunk)
        self.chunk = -(-self.size // chunks)

    def _head(self) -> Head | None:
        inputs = self.batch(np.arange(1), 0).inputs.to(self.device)
        with autocast(self.device, self.cache.precision):
            self.output = output_layer(self.module, inputs)
        if self.output is None:
            return None
        weight, bias = (
            None if one is None else one.detach().to(self.output.dtype)
            for one in (self.output.layer.weight, self.output.layer.bias)
        )
        assert weight is not None
        return Head(weight, bias).cut(self.classes)

    def span(self, start: int, stop: int) -> range:
        """As `TargetTeacher.span`."""
        return range(start, stop)

    def batch(self, numbers: np.ndarray, view: int) -> Batch:
        """As `TargetTeacher.batch`."""
        block = self.rows.inputs.take(numbers, axis=0)
        inputs = view_of(self.augmentation, self.seed, block, numbers, view, self.rows.tokens, self.device)
        labels = np.asarray(self.rows.labels.take(numbers))
        return Batch(inputs, np.arange(len(numbers)), numbers, labels)

    def named(self, batch: Batch, place: int) -> str:
        """By row."""
        return f"row {int(batch.targets[place])}"

    def states(self, batch: Batch) -> Tensor:
        """What goes into the output layer, for each target of the batch: [targets, d]."""
        assert self.output is not None
        return self._run(functools.partial(states_of, self.module, self.output), batch)[self._at(batch)]

    def _whole(self, batch: Batch) -> Tensor:
        return self._run(self.module, batch)[self._at(batch)]
