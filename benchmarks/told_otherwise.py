"""What students are told of a batch by stores that the product does not write: those of other systems, and its
own without the calibration. For `benchmarks.store_against_dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from akd_dist.distill.batch_targets import BatchTargets, Decoder
from akd_dist.distill.stream import Batch
from akd_dist.distill.teacher_targets import DenseTargets, Targets, Whole
from akd_dist.storage.layout import LOGITS
from akd_dist.storage.reader import LogitStore

TEMPERATURE, DRAWS = 2.0, 50
Tell = Callable[[Batch], BatchTargets | None]
"""What a student is told of a batch."""


class Made(Decoder):
    """A decoder that makes targets of a batch's arrays as another system would."""

    def __init__(self, make: Callable[[Mapping[str, Tensor]], Targets]) -> None:
        super().__init__(None, {}, "cpu")
        self.make = make

    def targets(self, arrays: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Targets:
        """As `Decoder.targets`."""
        return self.make(arrays)


@dataclass(eq=False)
class AtOneTemperature(Targets):
    """Probabilities at TEMPERATURE, and nothing else: what a store of such probabilities gives."""

    p: Tensor

    def __post_init__(self) -> None:
        self.classes, self.choice = self.p.shape[1], self.p.argmax(1)

    def distribution(self, temperature: float, rows: slice) -> Whole:
        """As `Targets.distribution`."""
        assert temperature == TEMPERATURE
        p = self.p[rows]
        return Whole(p, torch.xlogy(p, p).sum(1))

    def logits(self, rows: slice) -> Tensor:
        """There are none."""
        raise NotImplementedError


def gaussian(store: LogitStore) -> Tell:
    """The store's targets without its calibration: tails are then corrected by the variance of what is left over."""
    arrays = {name: array for name, array in store.dictionary().arrays().items() if name != "tail_calibration"}
    decoder = Decoder(store.manifest.identity.top_k, arrays, "cpu")
    return lambda batch: batch.targets and BatchTargets(batch.targets.items, batch.targets.counts, decoder)


def made_of(make: Callable[[Mapping[str, Tensor]], Targets]) -> Callable[[LogitStore], Tell]:
    """What somebody else would have stored of dense logits."""
    return lambda store: (
        lambda batch: batch.targets and BatchTargets(batch.targets.items, batch.targets.counts, Made(make))
    )


def renormalised(arrays: Mapping[str, Tensor]) -> Targets:
    """The 12 largest logits as float16, and no tail."""
    values, ids = torch.topk(arrays[LOGITS], 12, dim=1)
    head = torch.softmax(values.half().float() / TEMPERATURE, 1)
    return AtOneTemperature(torch.zeros_like(arrays[LOGITS]).scatter_(1, ids, head))


def rounded(arrays: Mapping[str, Tensor]) -> Targets:
    """All logits as float16, as the product stores them where a recipe says so: how far the smallest change of targets
    leads in the end."""
    return DenseTargets(arrays[LOGITS].half())


def tail_mean(arrays: Mapping[str, Tensor]) -> Targets:
    """The 8 largest logits, and the mean of the others in their place."""
    z = arrays[LOGITS]
    values, ids = torch.topk(z, 8, dim=1)
    mean = (z.sum(1, keepdim=True) - values.sum(1, keepdim=True)) / (z.shape[1] - 8)
    return DenseTargets(mean.expand_as(z).scatter(1, ids, values))


def sampled(store: LogitStore) -> Tell:
    """Ids drawn once from the teacher at TEMPERATURE, as RS-KD stores them: the same in every epoch."""

    def draw(row: int, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(row)
        ids = torch.multinomial(torch.softmax(z / TEMPERATURE, 1), DRAWS, replacement=True, generator=generator)
        return torch.zeros_like(z).scatter_add_(1, ids, torch.full(ids.shape, 1 / DRAWS))

    def tell(batch: Batch) -> BatchTargets:
        assert batch.targets is not None
        counts = batch.targets.counts
        parts = torch.split(batch.targets.items, counts.tolist())
        p = torch.cat([draw(int(row), z) for row, z in zip(batch.rows, parts, strict=True)])
        return BatchTargets(p, counts, Made(lambda arrays: AtOneTemperature(arrays[LOGITS])))

    return tell
