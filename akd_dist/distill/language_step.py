"""A language model's share of a step: the gradient of the loss over all targets of the global batch.

Blocks go through the model a micro-batch at a time, and only the states at targets through the head, in chunks. The
loss is the sum over targets divided by how many all workers have in the whole batch: so it does not matter how blocks,
which may have more or fewer targets, are cut into micro-batches and workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from akd_dist.data.packing import IDS, TARGETS
from akd_dist.distill.objectives import Stage
from akd_dist.distill.output_head import Head
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.sparse_losses import losses_of_logits
from akd_dist.distill.stream import Batch
from akd_dist.models.device import autocast, weights_dtype
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Precision


@dataclass(frozen=True, eq=False)
class Scored:
    """Where blocks have targets."""

    places: Tensor
    """int64 [n], in all positions [rows x length] one after the other: in the order in which targets are numbered."""
    labels: Tensor
    """int64 [n]: the next tokens."""

    @classmethod
    def of(cls, blocks: Tensor) -> Scored:
        """Of blocks int32 [rows, 3, length]."""
        places = blocks[:, TARGETS].flatten().nonzero()[:, 0]
        # A target is never the last position of a block, so what follows it is of the same row.
        labels = blocks[:, IDS].flatten()[places + 1].long()
        return cls(places, labels)


def states_at(model: LanguageModel, blocks: Tensor, places: Tensor, precision: Precision) -> Tensor:
    """The hidden states of targets, [n, d], in the dtype that the head is computed in; places as of `Scored`."""
    with autocast(blocks.device, precision):
        states: Tensor = model.hidden(blocks).flatten(0, 1).index_select(0, places)
    # Gradients of float16 are scaled on their way back, and those through the head are made before: so in float32.
    return states.to(torch.bfloat16 if precision == "bfloat16" else weights_dtype(precision))


def logits_at(model: LanguageModel, blocks: Tensor, scored: Scored, classes: int, precision: Precision) -> Tensor:
    """The logits of targets, [n, classes], of a model whose logits are not hidden states times the output layer."""
    with autocast(blocks.device, precision):
        logits: Tensor = model(blocks).flatten(0, 1).index_select(0, scored.places)
    return logits[:, :classes]


@dataclass(frozen=True, eq=False)
class Step:
    """What a step of a language model is."""

    stage: Stage
    epoch: int
    """0-based epoch of the stage."""
    classes: int
    """Logits of a target; rows of the output layer behind them are padding."""
    precision: Precision
    micro_batch: int | None
    """Blocks that are computed at a time; None for all."""
    ranks: Ranks
    scaler: torch.amp.GradScaler

    def gradients(self, model: LanguageModel, batch: Batch) -> tuple[float, int]:
        """Add the gradient of this rank's part of the mean loss over the global batch to those of the parameters.

        Returns:
            The sum of the losses of this rank's targets, and how many these are.
        """
        counts = batch.labels.tolist()
        own, total = sum(counts), 0.0
        # How many there are in the whole batch, of which no block may have any.
        everywhere = max(1.0, self.ranks.sum(float(own)))
        size = self.micro_batch or max(1, len(counts))
        with self.ranks.agree():  # if this fails on one rank, all of them raise; else they would wait for it
            for start in range(0, len(counts), size):
                stop = min(start + size, len(counts))
                if sum(counts[start:stop]):
                    loss = self._loss(model, batch, start, stop, everywhere)
                    total += float(loss.detach())
                    self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return total * everywhere, own

    def _loss(self, model: LanguageModel, batch: Batch, start: int, stop: int, total: float) -> Tensor:
        """The part of the mean loss that a micro-batch has."""
        blocks, scored, targets = batch.inputs[start:stop], Scored.of(batch.inputs[start:stop]), None
        if batch.targets is not None and self.stage.needs_logits:
            targets = batch.targets.of_rows(start, stop, weights_dtype(self.precision))
        if model.linear_head:
            head, states = Head(model.output_weight), states_at(model, blocks, scored.places, self.precision)
            return self.stage.through_head(self.epoch, states, head.cut(self.classes), targets, scored.labels, total)
        logits = logits_at(model, blocks, scored, self.classes, self.precision)
        return losses_of_logits(logits, self.stage.term(self.epoch, targets, scored.labels)).sum() / total
