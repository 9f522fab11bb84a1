"""Whether an epoch shuffles all rows together, or in windows: so that a node need hold no more than its cache may.

It decides the order of the rows, and so the weights: it is settled when a run begins, and belongs to its identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from akd_dist.base.errors import MachineError
from akd_dist.base.files import read_json
from akd_dist.base.formatting import size
from akd_dist.data.row_fetch import held_splits, holding_rooms
from akd_dist.data.rows import BLOCK_ROWS, SPLITS, Rows, Splits
from akd_dist.distill.orders import WINDOWS_AT_ONCE
from akd_dist.jobs.packing import Node
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.identity import Identity, format_of
from akd_dist.storage.interleaved import interleaved
from akd_dist.storage.layout import TARGETS_FORMAT, StoreLayout
from akd_dist.storage.node_cache import room_in

_ANSWER_SECONDS = 60.0
_MORE_ROOM = "raise AKD_DIST_CACHE_BUDGET, free some space, or choose another --cache-root"


@dataclass(frozen=True)
class Shuffle:
    """How an epoch shuffles its rows."""

    window: int | None
    """Rows of a window; None shuffles all rows together."""
    why: str
    """Why, in a line."""


@dataclass(frozen=True)
class Demands:
    """What training reads, by which a window is chosen: bytes of a node's cache."""

    splits: Mapping[str, int]
    """Each split's rows."""
    input_row: int
    """One row's input and label."""
    input_rows: int
    """Rows that are fetched together; 0 where the nodes hold all rows as they prepared them."""
    view: int
    """One view's logits."""
    views: int
    """How many are read."""
    row: int
    """One row of a view."""
    piece_rows: int
    """Rows of a view that are fetched together."""
    sharing: int = 1
    """How many cohorts may read on one node at a time, each at its own place."""
    beside: int = 0
    """Rows that are at hand beside each group of windows: those with labels, where batches are mixed."""

    @property
    def whole(self) -> int:
        """What shuffling all rows together takes: the rows, and views that are read at a time."""
        return sum(self.splits.values()) + min(self.views, 2 * self.sharing) * self.view

    def window(self, room: int) -> int | None:
        """The rows of a window where a node's cache may have so many bytes; None where whole views fit.

        It is coarse, a power of two times the rows of a piece, so that nodes of about one size agree. Two groups of
        windows, the one at hand and the next, take half of what is left at most: one that was read is hashed once more
        before it goes.

        Raises:
            ValueError: not even the smallest fits.
        """
        if self.whole <= room:
            return None
        held = self.held(room)
        window = self._smallest(held)
        if self._needs(held, window) > room:
            raise ValueError
        while 2 * window < self._rows and self._needs(held, 2 * window) <= room:
            window *= 2
        return window

    def least(self, room: int) -> int:
        """The smallest room, of this size or larger, for which `window` finds a way: all rows together, or windows."""
        windows = self._least_room(room, lambda held: self._needs(held, self._smallest(held)))
        return min(max(room, self.whole), windows)

    def at_least(self, room: int, window: int | None, groups: int = 1) -> int:
        """The smallest room, of this size or larger, for what one cohort has to have there at once: where rows are read
        by windows of so many, so many groups of them, beside what is held all the time. With no more room than that,
        nothing is fetched ahead.
        """
        if window is None:
            return max(room, sum(self.splits.values()) + min(self.views, 1) * self.view)
        return self._least_room(room, lambda held: self._held_bytes(held) + groups * self._group(held, window))

    def fitting(self, room: int, groups: int = 1) -> int | None:
        """A window for which this room is enough: that of `window`, else a small one by which nothing is fetched ahead;
        None where there is no such window.
        """
        with contextlib.suppress(ValueError):
            if (window := self.window(room)) is not None:
                return window
        # No window touches less than one of these two: all others have a part of one more piece of logits or of rows.
        smallest = sorted({self.piece_rows, self.input_rows or self.piece_rows}, reverse=True)
        return next((window for window in smallest if self.at_least(room, window, groups) == room), None)

    def held(self, room: int) -> set[str]:
        """The splits that are there all the time, in a cache of so many bytes."""
        return held_splits(self.splits, room, windowed=True) if self.input_rows else set(self.splits)

    def _least_room(self, room: int, needs: Callable[[Collection[str]], int]) -> int:
        """The smallest room, of this size or larger, that is enough for what is needed.

        A larger room may need more, since more splits are held in it: so each range of rooms in which the same splits
        are held is looked at by itself.

        Args:
            needs: bytes that are needed where these splits are held.
        """
        larger = sorted(start for start in holding_rooms(self.splits) if start > room)
        found = ((self.held(start), max(start, needs(self.held(start)))) for start in (room, *larger))
        return next(enough for held, enough in found if self.held(enough) == held)

    def _held_bytes(self, held: Collection[str]) -> int:
        return sum(self.splits[name] for name in held)

    def _smallest(self, held: Collection[str]) -> int:
        return self.piece_rows if "train" in held else max(self.piece_rows, self.input_rows)

    def _needs(self, held: Collection[str], window: int) -> int:
        return self._held_bytes(held) + 2 * 2 * self._group(held, window) * self.sharing

    def _group(self, held: Collection[str], window: int) -> int:
        kinds = [(self.piece_rows, self.row)] if self.views else []
        if "train" not in held:
            kinds.append((self.input_rows, self.input_row))
        return sum(self._rows_of_group(window, piece) * row for piece, row in kinds)

    def _rows_of_group(self, window: int, piece: int) -> int:
        """How many rows lie in the pieces that a group of windows touches."""
        # Where windows do not end with pieces, each has a part of one more.
        pieces = -(-window // piece) + (window % piece > 0)
        beside = -(-self.beside // piece)
        return min((WINDOWS_AT_ONCE * pieces + beside) * piece, -(-self._rows // piece) * piece)

    @property
    def _rows(self) -> int:
        return self.view // self.row


def demands_of(
    recipe: Recipe, splits: Splits, todo: Sequence[StudentSpec], nodes: Sequence[Node], *, blocks: bool = False
) -> Demands:
    """What the students that are not done read.

    Args:
        blocks: whether rows will lie as blocks under the store root, if they do not yet.
    """
    row, piece_rows = row_and_piece(recipe, splits.train)
    epochs = max((spec.objective.epochs for spec in todo), default=0)
    slots = [int(node.cpus // spec.threads) for node in nodes for spec in todo]
    return Demands(
        splits={name: getattr(splits, name).nbytes for name in SPLITS},
        input_row=splits.train.row_bytes,
        input_rows=BLOCK_ROWS if blocks or splits.train.sealed is not None else 0,
        view=len(splits.train) * row,
        views=min(recipe.data.views, epochs),
        row=row,
        piece_rows=piece_rows,
        sharing=max(1, min(len(todo), max(slots, default=1))),
        beside=splits.train.labelled if any(one.labelled for one in (*todo, *recipe.teacher.chain)) else 0,
    )


def row_and_piece(recipe: Recipe, rows: Rows) -> tuple[int, int]:
    """What a row of a view takes of a node's cache, in bytes, and how many rows are fetched together.

    Of rows with several targets both are means.
    """
    return read_at_once(recipe, len(rows), rows.classes, rows.targets if rows.task == "language_model" else None)


def read_at_once(recipe: Recipe, rows: int, classes: int, targets: int | None) -> tuple[int, int]:
    """The same of so many rows.

    Args:
        targets: of all of them, where they have several each.
    """
    config = recipe.cache.encoding.config()
    if format_of(config, targets) < TARGETS_FORMAT:
        layout = StoreLayout(1, rows, classes, encoding_from_config(config).dtype)
        return classes * np.dtype(dtype_read(recipe)).itemsize, layout.shard_rows
    said = {"augmentation": {}, "data_seed": None, "views": 1, "encoding": config, "classes": classes}
    whose = {"dataset": "", "rows": rows, "teacher": "", "items": targets}
    layout = Identity.model_validate({"format": TARGETS_FORMAT, **whose, **said}).layout
    together = interleaved(layout)
    item_bytes = layout.item_bytes if together is None else together.item_bytes
    row = -(-item_bytes * layout.rows // max(1, rows))
    return row, max(1, layout.shard_rows * rows // max(1, layout.rows))


def dtype_read(recipe: Recipe) -> str:
    """The dtype of logits as they are decoded: that of the stores, and float32 where several are averaged."""
    return "float32" if recipe.teacher.members else str(encoding_from_config(recipe.cache.encoding.config()).dtype)


def check_chain(recipe: Recipe, splits: Splits, workspace: Workspace, there: int) -> None:
    """Refuse to train the next model of the chain where a node has no room for what it reads.

    A window changes its weights, and so what it is found by: it is not chosen from the room that there happens to be.

    Args:
        there: how many models of the chain, the teacher first, are trained already.

    Raises:
        MachineError: no room; names need, room and a window that fits.
    """
    blocks = workspace.address is not None or splits.train.sealed is not None
    if not blocks and not there:  # rows that were prepared here have their room
        return
    if workspace.address is None:
        nodes: Sequence[Node] = []
    else:
        from akd_dist.jobs import cluster

        workspace.join()
        nodes = cluster.all_nodes()
    room, demands = room_for(workspace, nodes), demands_of(recipe, splits, [], nodes, blocks=blocks)
    reads = replace(demands, views=1 if there else 0)
    if recipe.data.window is not None:
        check_window(reads, Shuffle(recipe.data.window, "as the recipe's data.window says"), room)
        return
    if reads.whole <= room:
        return
    demands = replace(demands, views=1)  # students will read logits by the same windows
    if (window := demands.fitting(room)) is not None:
        advice = (
            f"set data.window in the recipe, to {window} for example, so that rows are shuffled in windows; "
            f"or {_MORE_ROOM}"
        )
    else:
        advice = f"{_MORE_ROOM}: no data.window would do with less than {_exactly(demands.least(room))}"
    raise MachineError(
        f"{'an assistant' if there else 'the teacher'} is trained on rows that are shuffled together, and the "
        "cache of a node has no room for them",
        got=f"{size(room)} that it may have",
        expected=_exactly(reads.whole),
        next=advice,
    )


def settled(recipe: Recipe, run: Path, *, fresh: bool) -> Shuffle | None:
    """How a run shuffles, as far as that is settled: its recipe says so, or it has begun. None where it is not."""
    if recipe.data.window is not None:
        return Shuffle(recipe.data.window, "as the recipe's data.window says")
    begun = None if fresh else read_json(run / "identity.json")
    data = begun.get("data") if isinstance(begun, dict) else None
    if not isinstance(data, dict):
        return None
    window = data.get("window")
    return Shuffle(window if isinstance(window, int) and window > 0 else None, "as this run began")


def with_window(recipe: Recipe, shuffle: Shuffle) -> Recipe:
    """The recipe as a run with this shuffle has it."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"window": shuffle.window})})


def choose(demands: Demands, room: int) -> Shuffle:
    """How a run that begins shuffles, where the smallest cache among the nodes may have so many bytes.

    Raises:
        MachineError: not even the smallest window fits; names need and budget.
    """
    try:
        window = demands.window(room)
    except ValueError:
        raise MachineError(
            "the cache of a node has no room for what students read at a time",
            got=f"{size(room)} that it may have",
            expected=f"{_exactly(demands.least(room))} for a few windows of rows and logits, and rows that are held",
            next=_MORE_ROOM,
        ) from None
    if window is None:
        return Shuffle(None, "all that is read at a time fits the cache")
    return Shuffle(window, f"{size(demands.whole)} would not fit the {size(room)} that the cache of a node may have")


def check_window(demands: Demands, shuffle: Shuffle, room: int, *, workers: int = 1) -> None:
    """Refuse a shuffle that was settled before, where a node's cache has no room for what one cohort reads at once.

    The message says how a run that begins would fit this room, if there is a way.

    Args:
        workers: the most workers of a student: those of a node may stand in two groups of windows.

    Raises:
        MachineError: it does not fit; names need and budget.
    """
    groups = min(workers, 2)
    if (need := demands.at_least(room, shuffle.window, groups)) > room:
        what = (
            "all rows and a view" if shuffle.window is None else f"{WINDOWS_AT_ONCE} windows of {shuffle.window:,} rows"
        )
        raise MachineError(
            f"the cache of a node has no room for {what}, by which this run shuffles",
            got=f"{size(room)} that it may have",
            expected=f"{_exactly(need)}, with all that is held beside",
            next=f"{_MORE_ROOM}; {_another_shuffle(demands, room, groups)}",
        )


def _another_shuffle(demands: Demands, room: int, groups: int) -> str:
    """How a run that begins would fit this room."""
    if demands.whole <= room:
        return "a run that begins fits as it is without data.window in the recipe: its rows are shuffled all together"
    if (window := demands.fitting(room, groups)) is None:
        return "no data.window would do with as little as there is"
    return f"a run that begins fits with another data.window in the recipe, {window} for example"


def _exactly(count: int) -> str:
    """Bytes as people say them, and to the last one: a budget that was rounded down would be refused again."""
    return f"{size(count)} ({count:,} bytes)"


def room_for(workspace: Workspace, nodes: Sequence[Node]) -> int:
    """The bytes that the cache may have on the smallest of the nodes that may train."""
    if workspace.address is None:
        return room_in(Path(workspace.cache_root))
    from akd_dist.jobs.cluster import ray

    asked = []
    for node in nodes:
        if node.cpus >= 1:
            pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.name, soft=False)
            remote = ray.remote(room_here).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
            asked.append(remote.remote(workspace.cache_root))
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else ([], [])
    found = []
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # a node that left, or has no such folder: others tell
            found.append(ray.get(answer))
    # With no node that trains yet, the driver's own has to stand for them.
    return min(found) if found else room_in(Path(workspace.cache_root))


def room_here(cache_root: str) -> int:
    """The same of the node that this runs on."""
    return room_in(Path(cache_root))
