"""The stream: rows joined with the teacher's logits -> shuffled batches that carry their position.

    for batch in stream.batches(epoch=3, start_step=17):
        z = model(batch.inputs)

The order is a pure function of (data seed, epoch), so a position (epoch, step) is all that a checkpoint has to keep. A
batch is one gather from a memory map for the inputs and one for the logits, and no other copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from akd_dist.recipe import Augmentation
from akd_dist.rows import Rows
from akd_dist.storage.errors import RefusedError
from akd_dist.storage.manifest import Manifest
from akd_dist.views import probe, view_of

WINDOWS_AT_ONCE = 4
"""How many windows a windowed shuffle mixes: reads stay within that many."""


def epoch_order(rows: int, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """The order of the rows in a 0-based epoch: a permutation, int64 [rows], that depends on the arguments alone.

    It sorts raw Philox words, which every version of NumPy draws alike; `Generator.permutation` promises no such thing.

    Args:
        rows: number of rows.
        seed: the recipe's `data.seed`.
        epoch: 0-based epoch, counted on through all stages.
        window: None shuffles globally. A number of rows keeps reads local, for memory maps larger than memory: windows
            of so many consecutive rows are shuffled, then the rows within each WINDOWS_AT_ONCE windows that follow.
    """
    generator = np.random.Philox(key=[seed, epoch + 1])  # key 0 splits the dataset
    words = generator.random_raw(rows)
    if window is None:
        return np.argsort(words, kind="stable")
    order = np.argsort(generator.random_raw(-(-rows // window)), kind="stable")
    group = np.argsort(order)[np.arange(rows) // window] // WINDOWS_AT_ONCE
    return np.lexsort((words, group))


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """One rank's share of a global batch, and where in the stream it lies."""

    epoch: int
    """0-based epoch."""
    step: int
    """0-based step within the epoch."""
    rows: np.ndarray
    """Row numbers, int64 [n]."""
    inputs: torch.Tensor
    """The rows as the epoch's view shows them: uint8 or float32 [n, *shape]."""
    labels: torch.Tensor
    """int64 [n]."""
    logits: torch.Tensor | None
    """The teacher's logits of that view in their stored dtype, [n, classes]; None in a stream without a teacher."""
    global_rows: int
    """Rows of the whole batch, over all ranks."""


@dataclass(frozen=True, eq=False)
class Stream:
    """A split and its teacher's logits as shuffled batches. Epoch e shows view e mod views.

    Raises:
        RefusedError: the logits are of other rows, or of too few views.
    """

    rows: Rows
    """The train rows."""
    logits: np.ndarray | None
    """[at least `views`, rows, classes], as `open_decoded` maps them; None for a stream without a teacher."""
    augmentation: Augmentation
    """How a view is drawn."""
    seed: int
    """The recipe's `data.seed`: order and views."""
    views: int
    """How many views the epochs go round."""
    batch: int
    """Rows of a global batch; the last one of an epoch may have fewer."""
    window: int | None = None
    """Rows of a window of the shuffle; None shuffles globally."""

    def __post_init__(self) -> None:
        if self.logits is not None and (self.logits.shape[0] < self.views or self.logits.shape[1] != len(self.rows)):
            raise RefusedError(
                "the teacher's logits are not of these rows and views",
                got=f"{self.logits.shape[0]} views of {self.logits.shape[1]:,} rows",
                expected=f"{self.views} views of {len(self.rows):,} rows",
                next="cache the teacher for this recipe: akd-dist cache-teacher",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the last one perhaps partial."""
        return -(-len(self.rows) // self.batch)

    def without_logits(self) -> Stream:
        """The same batches, for students that learn from hard labels: the logits are not read."""
        return dataclasses.replace(self, logits=None)

    def batches(self, epoch: int, start_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from a step on.

        A rank takes a contiguous slice of each global batch, so the slices of all ranks, one after the other, are the
        batch of a single rank. Sizes differ by at most one row; the slice of a small last batch may be empty.
        """
        order = epoch_order(len(self.rows), self.seed, epoch, self.window)
        view = epoch % self.views
        logits = None if self.logits is None else self.logits[view].view(np.ndarray)
        for step in range(start_step, self.steps_per_epoch):
            together = order[step * self.batch : (step + 1) * self.batch]
            rows = together[len(together) * rank // world : len(together) * (rank + 1) // world]
            yield Batch(
                epoch=epoch,
                step=step,
                rows=rows,
                inputs=view_of(self.augmentation, self.seed, self.rows.inputs.take(rows, axis=0), rows, view),
                labels=torch.from_numpy(self.rows.labels.take(rows)),
                logits=None if logits is None else torch.from_numpy(logits.take(rows, axis=0)),
                global_rows=len(together),
            )

    def check_probes(self, manifest: Manifest) -> None:
        """Compare rows and views with those that the teacher saw, as a store's manifest remembers them.

        Raises:
            RefusedError: another dataset, or a probe view whose pixels differ; names the row and the view.
        """
        self.rows.check_same(manifest.dataset)
        records = {record.key: record for record in manifest.shards}
        for shard in manifest.identity.layout.shards():
            if shard.view >= self.views:
                continue
            seen = {one.row: one.sha256 for one in records[shard.key].probes}
            for row, digest in probe(self.augmentation, self.seed, self.rows.inputs, seen, shard.view):
                if digest != seen[row]:
                    raise RefusedError(
                        f"view {shard.view} of row {row} does not show what the teacher saw",
                        got=f"pixels of sha256 {digest[:16]}",
                        expected=f"sha256 {seen[row][:16]}, as {shard} of the store remembers",
                        next="use the augmentation, data.seed and version that the store was made with, or cache anew",
                    )
