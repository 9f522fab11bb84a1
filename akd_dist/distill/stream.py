"""The stream: rows joined with the teacher's logits -> shuffled batches that carry their position.

    for batch in stream.batches(epoch=3, start_step=17):
        z = model(batch.inputs)

The order is a pure function of (data seed, epoch), so a position (epoch, step) is all that a checkpoint has to keep. A
batch is one gather from a memory map for the inputs and one for the logits. Of small ones several are made in one go.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.data.encoded import ahead, batches_ahead, encoded_of
from akd_dist.data.rows import Rows
from akd_dist.data.views import begin_view, drawn_by, placed, view_of
from akd_dist.distill.batch_targets import BatchTargets, TeacherTargets
from akd_dist.distill.orders import ALL, LABELLED, Batches, Mix, Order
from akd_dist.distill.probes import PROBES_CHECKED, SeenViews
from akd_dist.models.device import device_name
from akd_dist.recipe import Augmentation, LastBatch
from akd_dist.storage.checked import once
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.holder import Moving
from akd_dist.storage.manifest import Manifest

STEPS_AT_ONCE = 8
"""Batches that are made in one go: a small one alone takes hardly more than the calls, or the launches of kernels."""
BYTES_AT_ONCE = {"cpu": 250_000, "cuda": 64_000_000}
"""The most that the inputs of such batches, and what describes their targets, may take together, by the kind of device;
of larger ones fewer are made in one go. On a processor they are to stay in its cache."""
Said = torch.Tensor | BatchTargets
"""What a teacher says of some rows: logits, or what is stored of targets."""
Gathered = tuple[torch.Tensor, torch.Tensor, Said | None]
"""Inputs, labels, and what the teacher says of some rows."""
Stored = np.ndarray | StoredLogits | TeacherTargets
"""Where that is read."""


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
    """The rows as the epoch's view shows them: uint8, float32 or int32 [n, *shape]."""
    labels: torch.Tensor
    """int64 [n]; float32 for regression."""
    logits: torch.Tensor | None
    """The teacher's logits of that view in their stored dtype, [n, classes]; None in a stream without a teacher."""
    global_rows: int
    """Rows of the whole batch, over all ranks."""
    spare: torch.Tensor | None = None
    """Where this rank has no rows: one row of the batch as input, for models that cannot take a batch of none."""
    global_labelled: int | None = None
    """Rows of the whole batch that have labels; None where all have."""
    targets: BatchTargets | None = None
    """In place of logits, of a store that describes them, or of rows with several targets each: what it keeps."""

    @property
    def label_weight(self) -> float:
        """What the labels' part of a row's loss counts, so that the mean over all rows of the whole batch is the mean
        over those that have labels.
        """
        if self.global_labelled is None:
            return 1.0
        return self.global_rows / self.global_labelled if self.global_labelled else 0.0


BegunBatch = Callable[[], Batch]
"""A batch whose pictures are on their way: called, it waits for them."""


@dataclass(frozen=True, eq=False)
class BatchStream:
    """A split and its teacher's logits as shuffled batches. Epoch e shows view e mod views.

    Raises:
        RefusedError: the logits are of other rows, or of too few views.
    """

    rows: Rows
    """The train rows; those with labels are the first."""
    logits: Stored | None
    """[at least `views`, rows, classes]: an array, or a store that is decoded as it is read, or whose targets are read;
    None for a stream without a teacher."""
    augmentation: Augmentation
    """How a view is drawn."""
    seed: int
    """The recipe's `data.seed`: order and views."""
    views: int
    """How many views the epochs go round."""
    batch: int
    """Rows of a global batch; the last one of an epoch may have fewer or more, as `last_batch` says."""
    last_batch: LastBatch = "keep"
    """What becomes of a last batch that is not full."""
    window: int | None = None
    """Rows of a window of the shuffle; None shuffles globally."""
    device: torch.device | str = "cpu"
    """Where batches are wanted: rows are moved there as they are stored, and augmented there."""
    mix: Mix = ALL
    """Which rows an epoch shows; where all rows have labels, each mix is all of them."""
    epoch_steps: int | None = None
    """Batches of an epoch, where these are not those of a pass over the rows: epochs follow each other in passes."""

    def __post_init__(self) -> None:
        if self.logits is not None and (self.logits.shape[0] < self.views or self.logits.shape[1] != len(self.rows)):
            raise RefusedError(
                "the teacher's logits are not of these rows and views",
                got=f"{self.logits.shape[0]} views of {self.logits.shape[1]:,} rows",
                expected=f"{self.views} views of {len(self.rows):,} rows",
                next="cache the teacher for this recipe: akd-dist cache-teacher",
            )

    @property
    def moving(self) -> tuple[Moving, ...]:
        """All that is told which view and windows are read."""
        rows = () if self.rows.moving is None else (self.rows.moving,)
        return rows if self.logits is None or isinstance(self.logits, np.ndarray) else (*rows, self.logits)

    @functools.cached_property
    def cut_into(self) -> Batches:
        """How a pass over the rows is cut into batches."""
        cut = len(self.rows), self.rows.labelled, self.batch, self.last_batch, self.mix
        return Batches(*cut, epoch_steps=self.epoch_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the last one perhaps partial."""
        return self.cut_into.steps

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch shows: all of its mix, unless a last batch is dropped."""
        return self.cut_into.shown

    def order(self, epoch: int) -> Order:
        """The order of the rows in an epoch."""
        return self.cut_into.order(self.seed, epoch, self.window)

    def of(self, mix: Mix) -> BatchStream:
        """The same stream, whose epochs show this mix of rows; equal mixes give the same object."""
        mix = mix if self.rows.unlabelled else ALL
        return self if mix == self.mix else self._others.setdefault(mix, dataclasses.replace(self, mix=mix))

    @functools.cached_property
    def _others(self) -> dict[Mix, BatchStream]:
        return {}

    def without_logits(self) -> BatchStream:
        """The same batches, for students that learn from hard labels: the logits are not read."""
        return dataclasses.replace(self, logits=None)

    def batches(
        self,
        epoch: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        then: tuple[int, Mix] | None = None,
        stride: int = 1,
    ) -> Generator[Batch, None, None]:
        """The batches of an epoch from a step on.

        Where an epoch has another number of steps than a pass over the rows, its batches go on where the epoch before
        ended, be it in the middle of a pass.

        A rank takes a contiguous slice of each global batch, so the slices of all ranks, one after the other, are the
        batch of a single rank. Sizes differ by at most one row; the slice of a small last batch may be empty.

        Args:
            then: the epoch that is read next, and its mix: what it begins with is fetched before this one is over.
            stride: steps from one batch to the next, for processes that take turns.
        """
        if self.epoch_steps is None:
            steps = range(start_step, self.steps_per_epoch, stride)
            yield from self._of_pass(epoch, steps, rank, world, then)
            return
        whole, begins = len(self.cut_into.ends), epoch * self.epoch_steps
        at, end = begins + start_step, begins + self.epoch_steps
        while at < end:
            number, first = divmod(at, whole)
            steps = range(first, min(whole, first + end - at), stride)
            for batch in self._of_pass(number, steps, rank, world, (number + 1, self.mix)):
                yield dataclasses.replace(batch, epoch=epoch, step=number * whole + batch.step - begins)
            at += len(steps) * stride

    def _of_pass(
        self, epoch: int, all_steps: range, rank: int, world: int, then: tuple[int, Mix] | None
    ) -> Iterator[Batch]:
        """Batches of a pass over the rows."""
        if self.ahead:
            yield from ahead(self._begun(epoch, all_steps, rank, world, then), self.ahead)
            return
        reading, at_once, ends = _Reading(self, epoch, then), self.steps_at_once, self.cut_into.ends
        for first in range(0, len(all_steps), at_once):
            steps = all_steps[first : first + at_once]
            whole = [(step * self.batch, int(ends[step])) for step in steps]
            shares = [_share(*places, rank, world) for places in whole]
            for step, places, (own, gathered) in zip(steps, whole, self._cut(reading, shares), strict=True):
                spare = None
                if not len(own):
                    spare = self._view(reading.order.rows(places[0], places[0] + 1), reading.view)
                labelled = self._labelled(own if world == 1 else reading.order.rows(*places))
                yield _batch(epoch, step, own, gathered, places[1] - places[0], spare, labelled)

    def _labelled(self, rows: np.ndarray) -> int | None:
        """How many of these have labels; None where all rows have that are shown."""
        if not self.rows.unlabelled or self.mix == LABELLED:
            return None
        return int(np.count_nonzero(rows < self.rows.labelled))

    @property
    def ahead(self) -> int:
        """Batches whose pictures are decoded before they are wanted; none where none are encoded."""
        return batches_ahead(self.rows.inputs, self.batch)

    def _begun(
        self, epoch: int, steps: range, rank: int, world: int, then: tuple[int, Mix] | None
    ) -> Iterator[BegunBatch]:
        """Batches of a pass, each with its rows read and its pictures on their way."""
        reading = _Reading(self, epoch, then)
        for step in steps:
            start, stop = step * self.batch, int(self.cut_into.ends[step])
            own = _share(start, stop, rank, world)
            parts = [self._begin(rows, reading.view, reading.logits) for rows in reading.rows([own])]
            spare = None
            if own[0] == own[1]:
                spare = self._begin(reading.order.rows(start, start + 1), reading.view, None)
            rows = reading.order.rows(*own)
            labelled = self._labelled(rows if world == 1 else reading.order.rows(start, stop))
            yield functools.partial(self._joined, epoch, step, rows, parts, spare, stop - start, labelled)

    def _joined(
        self,
        epoch: int,
        step: int,
        rows: np.ndarray,
        parts: list[Callable[[], Gathered]],
        spare: Callable[[], Gathered] | None,
        count: int,
        labelled: int | None,
    ) -> Batch:
        gathered = _together([part() for part in parts])
        return _batch(epoch, step, rows, gathered, count, None if spare is None else spare()[0], labelled)

    @property
    def steps_at_once(self) -> int:
        """Batches that are made in one go; they are the same as one by one, since a view is a function of its row."""
        most, each = BYTES_AT_ONCE["cpu" if torch.device(self.device).type == "cpu" else "cuda"], self.rows.input_bytes
        if isinstance(self.logits, TeacherTargets):
            each += self.logits.row_bytes
        return max(1, min(STEPS_AT_ONCE, most // (self.batch * each)))

    def _cut(self, reading: _Reading, shares: list[tuple[int, int]]) -> Iterable[tuple[np.ndarray, Gathered]]:
        """The rows of each of several batches, and what is gathered of them all together."""
        found = [(rows, self.gather(rows, reading.view, reading.logits)) for rows in reading.rows(shares)]
        if len(found) == len(shares) == 1:
            return found
        rows, parts = zip(*found, strict=True)
        return _parts(np.concatenate(rows), _together(list(parts)), shares)

    def hold(self, view: int) -> Stored | None:
        """Have a whole view's logits at hand, for `gather`.

        Raises:
            AkdError: as `storage.pieces.hold_pieces`: they are damaged, or the cache has no room for them.
        """
        if isinstance(self.logits, StoredLogits | TeacherTargets):
            self.logits.move(view, [(0, len(self.rows))])
        return np.asarray(self.logits[view]) if isinstance(self.logits, np.ndarray) else self.logits

    def gather(self, rows: np.ndarray, view: int, stored: Stored | None) -> Gathered:
        """Inputs, labels and logits of any rows as a view shows them, in the order asked for.

        Args:
            rows: row numbers, int64 [n].
            stored: the logits of that view, as `hold` gives them.
        """
        return self._begin(rows, view, stored)()

    def _begin(self, rows: np.ndarray, view: int, stored: Stored | None) -> Callable[[], Gathered]:
        """The same, of which decoding is begun where rows are encoded: called, it waits for that."""
        inputs = self.rows.inputs.take(rows, axis=0)
        shown = begin_view(self.augmentation, self.seed, inputs, rows, view, self.rows.tokens, self.device)
        # `take` gathers faster than indexing by an array of row numbers does (benchmarks/stream.py).
        labels = placed(self.rows.labels.take(rows), self.device)
        said: Said | None = None
        if isinstance(stored, TeacherTargets):
            said = stored.batch(rows)
        elif stored is not None:
            said = placed(stored.take(rows, axis=0), self.device)
        return lambda: (shown(), labels, said)

    def check_probes(self, manifest: Manifest, cache_root: Path | None = None) -> None:
        """Compare rows and views with those that the teacher saw, as a store's manifest remembers them.

        The views are made on the stream's device, where students will see them.

        Args:
            cache_root: where it is remembered that they are the same, for all processes of a node; by default nowhere.

        Raises:
            RefusedError: another dataset, or probe views whose pixels differ; names the first, and says how far they
                have drifted.
            CorruptCacheError: they differ because the rows are not what was prepared.
        """
        self.rows.check_same(manifest.dataset)
        device = torch.device(self.device).type
        seen = SeenViews(self.rows, self.augmentation, self.seed, self.views, self.device)
        compare = functools.partial(seen.compare, manifest)
        by = drawn_by(self.augmentation, device_name(device), encoded=encoded_of(self.rows.inputs) is not None)
        if cache_root is None or by is None:
            compare()
            return
        given = by | {"rows": self.rows.fingerprint, "seed": self.seed, "views": self.views, "probes": PROBES_CHECKED}
        once(manifest, cache_root, given, compare)

    def _view(self, rows: np.ndarray, view: int) -> torch.Tensor:
        inputs = self.rows.inputs.take(rows, axis=0)
        return view_of(self.augmentation, self.seed, inputs, rows, view, self.rows.tokens, self.device)


class _Reading:
    """An epoch as a stream reads it: its order, its view, and the group of windows that is at hand.

    Args:
        stream: the stream.
        epoch: the epoch.
        then: the epoch that is read after it, and its mix, as far as somebody reads one.
    """

    def __init__(self, stream: BatchStream, epoch: int, then: tuple[int, Mix] | None) -> None:
        self.stream, self.then, self.view = stream, then, epoch % stream.views
        self.order = stream.order(epoch)
        self.group: int | None = None
        # As a plain array, since `np.memmap` makes a new object of its class for whatever is taken from it.
        stored = stream.logits
        self.logits = np.asarray(stored[self.view]) if isinstance(stored, np.ndarray) else stored

    def rows(self, shares: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The rows of some stretches of places, group by group, each once the group is at hand."""
        cuts = [cut for share in shares for cut in self.order.cut(*share)]
        if len(cuts) == 1:
            self._move(cuts[0][0])
            yield self.order.rows(*shares[0])
            return
        for group, some in itertools.groupby(cuts, key=lambda cut: cut[0]):
            self._move(group)
            parts = [self.order.rows(first, after) for _, _, first, after in some]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _move(self, group: int) -> None:
        if group == self.group:
            return
        self.group = group
        moving, order, view = self.stream.moving, self.order, self.view
        for one in moving:
            one.move(view, order.spans(group))
        following = order.spans(group + 1)
        if moving and not following and self.then is not None:
            epoch, mix = self.then
            view, following = epoch % self.stream.views, self.stream.of(mix).order(epoch).spans(0)
        for one in moving if following else ():
            one.expect(view, following)


def _batch(
    epoch: int,
    step: int,
    rows: np.ndarray,
    gathered: Gathered,
    count: int,
    spare: torch.Tensor | None,
    labelled: int | None,
) -> Batch:
    inputs, labels, said = gathered
    logits, targets = (None, said) if isinstance(said, BatchTargets) else (said, None)
    return Batch(epoch, step, rows, inputs, labels, logits, count, spare, labelled, targets)


def _together(parts: list[Gathered]) -> Gathered:
    """One batch of several parts, as there are where a group of windows ends."""
    if len(parts) == 1:
        return parts[0]
    inputs, labels, said = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels), _joined([one for one in said if one is not None])


def _parts(
    rows: np.ndarray, gathered: Gathered, shares: list[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, Gathered]]:
    """Batches that were gathered as one, each with its rows."""
    if len(shares) == 1:
        yield rows, gathered
        return
    inputs, labels, said = gathered
    end = 0
    for start, stop in shares:
        part = slice(end, end := end + stop - start)
        # Kernels may depend on where in memory a tensor begins: inputs begin one of their own.
        yield rows[part], (inputs[part].clone(), labels[part], _rows_of(said, part))


def _joined(said: Sequence[Said]) -> Said | None:
    targets = [one for one in said if isinstance(one, BatchTargets)]
    if targets:
        return BatchTargets.joined(targets)
    logits = [one for one in said if isinstance(one, torch.Tensor)]
    return torch.cat(logits) if logits else None


def _rows_of(said: Said | None, part: slice) -> Said | None:
    return said.part(part.start, part.stop) if isinstance(said, BatchTargets) else None if said is None else said[part]


def _share(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """The places of a batch that a rank takes."""
    return start + (stop - start) * rank // world, start + (stop - start) * (rank + 1) // world
