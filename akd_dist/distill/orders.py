"""The order of the rows in an epoch, and its batches: pure functions of (data seed, epoch).

Where train rows have no labels, an epoch shows all rows, those with labels, or a mix of both in each batch:

    Batches(rows=51_000, labelled=1_000, batch=64, mix=Mix("all", labelled=16)).order(seed=0, epoch=3).rows(0, 64)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from akd_dist.recipe import LastBatch

WINDOWS_AT_ONCE = 4
"""How many windows a windowed shuffle mixes: reads stay within so many of them."""
# The keys of the generators that order the rows with labels, round by round, where batches are mixed. Keys from 0 on
# split the dataset and order epochs, and 1 << 62 draws a subset.
_ROUND_KEY = 1 << 61


@dataclass(frozen=True)
class Mix:
    """Which of the train rows an epoch shows."""

    rows: Literal["all", "labelled"]
    """All of them, or those with labels alone."""
    labelled: int | None = None
    """How many of a batch's rows have labels; None takes all as they fall in one shuffle."""


ALL, LABELLED = Mix("all"), Mix("labelled")


class Order(Protocol):
    """Rows at places 0, 1, ... of an epoch, in groups of windows."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at places start..stop - 1, which are of one batch: int64."""

    def cut(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """As `EpochOrder.cut`."""

    def spans(self, group: int) -> list[tuple[int, int]]:
        """What a group shows, as spans of consecutive rows (first, after the last); none of a group after the last."""


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch, cut from rows of which the first have labels."""

    rows: int
    labelled: int
    batch: int
    """Rows of a batch; the last one may have fewer or more, as `last_batch` says."""
    last_batch: LastBatch = "keep"
    mix: Mix = ALL
    epoch_steps: int | None = None
    """Batches of an epoch, where these are not those of a pass over the rows."""

    @property
    def passed(self) -> int:
        """Rows that an epoch passes once, if none are left over: of mixed batches those without labels."""
        if self.mix.labelled is not None:
            return self.rows - self.labelled
        return self.labelled if self.mix.rows == "labelled" else self.rows

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Where they end, int64 [steps]: batch number s begins at place s * batch.

        Of mixed batches only the rows without labels run out: the last batch has as many with labels as any other.
        """
        share = self.mix.labelled or 0
        ends = batch_ends(self.passed, self.batch - share, self.last_batch)
        return ends + share * np.arange(1, len(ends) + 1)

    @property
    def steps(self) -> int:
        """How many an epoch has."""
        return self.epoch_steps if self.epoch_steps is not None and len(self.ends) else len(self.ends)

    @property
    def shown(self) -> int:
        """Rows that an epoch shows; where it is no whole pass, on average."""
        shown = int(self.ends[-1]) if len(self.ends) else 0
        return shown if self.steps == len(self.ends) else round(shown * self.steps / len(self.ends))

    def order(self, seed: int, epoch: int, window: int | None = None) -> Order:
        """The order of a 0-based epoch; see `EpochOrder` for the arguments."""
        if self.mix.labelled is not None:
            return MixedOrder(self, seed, epoch, window)
        return EpochOrder(self.passed, seed, epoch, window)


def epoch_order(rows: int, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """The order of the rows in a 0-based epoch, all of it: int64 [rows]; see `EpochOrder`."""
    return EpochOrder(rows, seed, epoch, window).rows(0, rows)


class EpochOrder:
    """The order of the rows in a 0-based epoch: a permutation that depends on the arguments alone.

    It sorts raw Philox words, which every version of NumPy draws alike; `Generator.permutation` promises no such thing.

    Args:
        rows: number of rows.
        seed: the recipe's `data.seed`.
        epoch: 0-based epoch, counted on through all stages.
        window: None shuffles globally. A number of rows keeps reads local, for rows larger than memory or disk: windows
            of so many consecutive rows are shuffled, then the rows within each WINDOWS_AT_ONCE windows that follow.
            Such an order is drawn group by group, with the memory of one.
    """

    def __init__(self, rows: int, seed: int, epoch: int, window: int | None = None) -> None:
        self._rows, self._key = rows, [seed, epoch + 1]  # key 0 splits the dataset
        self.window = window or max(rows, 1)
        windows = -(-rows // self.window)
        # One group of one window is the global shuffle. Stable, here and below, so that equal words, rare as they are,
        # have the same order on every machine.
        order = np.argsort(self._words(rows, windows), kind="stable") if window is not None else np.arange(windows)
        sizes = np.minimum((order + 1) * self.window, rows) - order * self.window
        self._windows = [order[first : first + WINDOWS_AT_ONCE] for first in range(0, windows, WINDOWS_AT_ONCE)]
        self.ends = np.cumsum(sizes)[np.append(np.arange(WINDOWS_AT_ONCE, windows, WINDOWS_AT_ONCE), windows) - 1]
        """Where groups end in the order, int64 [groups]."""
        self._drawn: tuple[int, np.ndarray] | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at places start..stop - 1 of the order, int64; those before are not drawn for it."""
        if len(self.ends) == 1:
            return self._group(0)[start:stop]
        parts = [
            self._group(group)[first - begins : after - begins] for group, begins, first, after in self.cut(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def cut(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Places start..stop - 1 by groups: each group, where it begins, and the first and after the last place in it.

        Where start is stop, the group that begins or goes on there.
        """
        if len(self.ends) == 1:
            return [(0, 0, start, stop)]
        first, last = np.searchsorted(self.ends, [start, max(start, stop - 1)], side="right").tolist()
        found = []
        for group in range(min(first, len(self.ends) - 1), min(last, len(self.ends) - 1) + 1):
            begins = int(self.ends[group - 1]) if group else 0
            found.append((group, begins, max(start, begins), min(stop, int(self.ends[group]))))
        return found

    def spans(self, group: int) -> list[tuple[int, int]]:
        """What a group shows, as spans of consecutive rows (first, after the last); none of a group after the last."""
        windows = sorted(self._windows[group].tolist()) if group < len(self._windows) else []
        return [(one * self.window, min((one + 1) * self.window, self._rows)) for one in windows]

    def _group(self, group: int) -> np.ndarray:
        if self._drawn is None or self._drawn[0] != group:
            self._drawn = None  # before the next is drawn, so that there is never more than one
            spans = self.spans(group)
            words = np.concatenate([self._words(start, stop - start) for start, stop in spans])
            places = np.argsort(words, kind="stable")
            if places.size < self._rows:  # else a place among them is the row itself
                places = np.concatenate([np.arange(start, stop) for start, stop in spans])[places]
            self._drawn = group, places
        return self._drawn[1]

    def _words(self, start: int, count: int) -> np.ndarray:
        """Words start..start + count - 1 of the epoch's generator: it counts, so none before are drawn."""
        generator = np.random.Philox(key=self._key)
        generator.advance(start // 4)  # each count gives four words
        return generator.random_raw(start % 4 + count)[start % 4 :]


class MixedOrder:
    """Batches of which so many rows have labels: an epoch is one pass over the others.

    Those with labels go round: each time that all were shown, they are shuffled anew, across epochs too. They lie
    evenly among the others, so that every worker's part of a batch has its share. With a window, the rows without
    labels are shuffled by windows, and all with labels are at hand beside them.

    Args:
        batches: how the rows are cut; its `mix` says how many of a batch have labels.
        seed, epoch, window: as of `EpochOrder`.
    """

    def __init__(self, batches: Batches, seed: int, epoch: int, window: int | None = None) -> None:
        assert batches.mix.labelled is not None
        self._batches, self._seed, self._share = batches, seed, batches.mix.labelled
        self._shown_before = epoch * batches.steps * self._share  # of those with labels
        self._others = EpochOrder(batches.passed, seed, epoch, window)
        self._round = functools.lru_cache(maxsize=2)(self._round_of)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at places start..stop - 1, which are of one batch: int64."""
        step, here = self._batch(start), slice(start, stop)
        first = step * self._batches.batch
        have = self._have_labels(step)
        before = int(have[: start - first].sum())
        have = have[start - first : stop - first]
        rows = np.empty(len(have), dtype=np.int64)
        rows[have] = self._labelled(step * self._share + before, int(have.sum()))
        begins = step * (self._batches.batch - self._share) + (here.start - first - before)
        rows[~have] = self._batches.labelled + self._others.rows(begins, begins + int((~have).sum()))
        return rows

    def cut(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Places of one batch by groups of windows of the rows without labels; see `EpochOrder.cut`."""
        if len(self._others.ends) == 1:
            return [(0, 0, start, stop)]
        step = self._batch(start)
        first, number = step * self._batches.batch, step * (self._batches.batch - self._share)
        places = first + np.flatnonzero(~self._have_labels(step))
        begins, ends = np.searchsorted(places, [start, stop]).tolist()
        cuts = self._others.cut(number + begins, number + ends)
        firsts = [start, *(int(places[other - number]) for _, _, other, _ in cuts[1:]), stop]
        return [(cut[0], 0, firsts[at], firsts[at + 1]) for at, cut in enumerate(cuts)]

    def spans(self, group: int) -> list[tuple[int, int]]:
        """What a group shows: all rows with labels, and windows of the others; none of a group after the last."""
        labelled = self._batches.labelled
        windows = [(labelled + start, labelled + stop) for start, stop in self._others.spans(group)]
        return [(0, labelled), *windows] if windows else []

    def _batch(self, place: int) -> int:
        return min(place // self._batches.batch, self._batches.steps - 1)  # a merged last batch is longer

    def _have_labels(self, step: int) -> np.ndarray:
        """Which places of a batch have rows with labels, bool [rows of the batch]."""
        rows = int(self._batches.ends[step]) - step * self._batches.batch
        return _spread(self._share, rows - self._share)

    def _labelled(self, start: int, count: int) -> np.ndarray:
        """Rows with labels: so many from the one on that is shown as number `start` of this epoch."""
        numbers = self._shown_before + start + np.arange(count)
        rounds, places = np.divmod(numbers, self._batches.labelled)
        parts = [self._round(number)[places[rounds == number]] for number in np.unique(rounds).tolist()]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _round_of(self, number: int) -> np.ndarray:
        words = np.random.Philox(key=[self._seed, _ROUND_KEY + number]).random_raw(self._batches.labelled)
        return np.argsort(words, kind="stable")


@functools.lru_cache(maxsize=8)
def _spread(some: int, others: int) -> np.ndarray:
    """Which of some + others places the former take, evenly among the latter: bool."""
    at = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in (some, others)])
    return np.argsort(at, kind="stable") < some


def batch_ends(rows: int, batch: int, last_batch: LastBatch = "keep") -> np.ndarray:
    """Where the batches of an epoch end, int64 [steps]: the first begins at 0, each other where the one before ended.

    What `drop` leaves over, and all of an epoch that is shorter than a batch, is in none. An epoch that short has no
    batch before the last, so `merge` keeps it.
    """
    ends = np.arange(batch, rows + 1, batch)
    if rows % batch == 0 or last_batch == "drop":
        return ends
    return np.append(ends if last_batch == "keep" else ends[:-1], rows)
