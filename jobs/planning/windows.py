"""Whether an epoch shuffles all rows together, or in windows: so that a node need hold no more than its cache may.

It decides the order of the rows, and so the weights: it is settled when a run begins, and belongs to its identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from akd_dist.base.errors import MachineError
from akd_dist.base.files import read_json
from akd_dist.base.formatting import size
from akd_dist.data.rows import Splits
from akd_dist.distill.stream import WINDOWS_AT_ONCE
from akd_dist.jobs.packing import Node
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.layout import StoreLayout
from akd_dist.storage.node_cache import room_in

_ANSWER_SECONDS = 60.0


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

    held: int
    """What has to be there all the time."""
    view: int
    """One view's logits."""
    views: int
    """How many are read."""
    row: int
    """One row of a view."""
    piece_rows: int
    """Rows that are fetched together."""
    sharing: int = 1
    """How many cohorts may read on one node at a time, each at its own place."""

    def window(self, room: int) -> int | None:
        """The rows of a window where a node's cache may have so many bytes; None where whole views fit.

        It is coarse, a power of two times the rows of a piece, so that nodes of about one size agree. Two groups of
        windows, the one at hand and the next, take half of what is left at most: one that was read is hashed once more
        before it goes.

        Raises:
            ValueError: not even the smallest fits.
        """
        if self.held + min(self.views, 2 * self.sharing) * self.view <= room:
            return None
        fitting = (room - self.held) // (2 * 2 * WINDOWS_AT_ONCE * self.row * self.piece_rows * self.sharing)
        if fitting < 1:
            raise ValueError
        return self.piece_rows << (fitting.bit_length() - 1)

    @property
    def least(self) -> int:
        """The bytes that the smallest window needs."""
        return self.held + 2 * 2 * WINDOWS_AT_ONCE * self.row * self.piece_rows * self.sharing


def demands_of(recipe: Recipe, splits: Splits, todo: Sequence[StudentSpec], nodes: Sequence[Node]) -> Demands:
    """What the students that are not done read."""
    dtype = encoding_from_config(recipe.cache.encoding.config()).dtype
    layout = StoreLayout(1, len(splits.train), splits.train.classes, dtype)
    epochs = max((spec.objective.epochs for spec in todo), default=0)
    slots = [int(node.cpus // spec.threads) for node in nodes for spec in todo]
    return Demands(
        held=splits.nbytes,
        view=layout.nbytes,
        views=min(recipe.data.views, epochs),
        row=layout.classes * layout.itemsize,
        piece_rows=layout.shard_rows,
        sharing=max(1, min(len(todo), max(slots, default=1))),
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
            expected=f"{size(demands.least)}: {size(demands.held)} of rows, and the logits of a few windows",
            next="raise AKD_DIST_CACHE_BUDGET, free some space, or choose another --cache-root",
        ) from None
    if window is None:
        return Shuffle(None, "all that is read at a time fits the cache")
    need = demands.held + min(demands.views, 2 * demands.sharing) * demands.view
    return Shuffle(window, f"{size(need)} would not fit the {size(room)} that the cache of a node may have")


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
