"""What a command runs and waits for, as the autoscaler of its cluster is told; where none is, nobody is asked.

Ray holds one request for the whole cluster, and an autoscaler sees to nodes that hold all of it or none: so of several
things that wait, as many are asked for as it says that nodes can be had for.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from akd_dist.base.errors import AkdError, MachineError
from akd_dist.jobs import cluster, ray_internals
from akd_dist.jobs.packing import Node, ResourceRequest, check_room

ASK_SECONDS = 2.0
"""How often the autoscaler is asked, and its answer read."""
MOST = 256
"""So many things are asked for at a time: the autoscaler packs them one by one, again and again."""


@dataclass(eq=False)
class Demand:
    """What is asked of the cluster's autoscaler. Use it as a context: at its end nothing is asked for any more."""

    patient: bool = False
    """Whether the user says that nodes will come: somebody else's doing, where no autoscaler is seen."""
    never: bool = False
    """Whether it waits for nothing, whatever there is."""
    refused: bool = False
    """Whether the autoscaler says that no node which it may bring holds the first of what was asked for."""
    bare: bool = False
    """Whether it says so of nodes with that much memory: then they are asked for without. Of many node types it is not
    known how much memory they have, and that counts as none."""
    _bundles: list[dict[str, float]] = field(default_factory=list)
    _selector: dict[str, str] = field(default_factory=dict)
    _version: int = 0
    _count: int = 0
    _asks: tuple[ResourceRequest, ...] = ()
    _held: int = 0
    _too_many: int = MOST + 1
    _asked_at: float = float("-inf")

    @functools.cached_property
    def autoscaled(self) -> bool:
        """Whether the cluster has an autoscaler that may bring nodes."""
        joined = cluster.ray.is_initialized() and not cluster.started_here()
        return not self.never and joined and ray_internals.has_autoscaler()

    @property
    def waits(self) -> bool:
        """Whether nodes may come that are not there: then a command waits where it would refuse otherwise."""
        return not self.never and (self.patient or self.autoscaled)

    def __enter__(self) -> Demand:
        return self

    def __exit__(self, *leaving: object) -> None:
        if self._bundles:
            self._bundles = []
            with contextlib.suppress(Exception):  # the cluster may be gone; what ended the block is what to tell
                ray_internals.request([], {})

    def ask(self, asks: Sequence[ResourceRequest], selector: dict[str, str]) -> None:
        """Ask for room for all of these together, beside nothing else: for what runs and for what waits.

        Args:
            selector: the labels of the nodes that are of use.
        """
        if not self.autoscaled or not asks or time.monotonic() - self._asked_at < ASK_SECONDS:
            return
        self._asked_at = time.monotonic()
        with contextlib.suppress(cluster.ray.exceptions.RayError):  # the head is busy, or gone, which others notice
            self._ask(asks, selector)

    def _ask(self, asks: Sequence[ResourceRequest], selector: dict[str, str]) -> None:
        shapes, state = tuple(dict.fromkeys(asks)), ray_internals.autoscaling()
        ours = state is not None and state.asked == ray_internals.shapes_of(self._bundles)
        if shapes != self._asks:  # what was learnt is of others
            self._asks, self._held, self._too_many, self.refused, self.bare = shapes, 0, MOST + 1, False, False
        elif state is not None and ours and state.answered >= self._version:
            self._learn(infeasible=state.infeasible)
        count = min(len(asks), MOST)
        if count >= self._too_many:
            count = max(1, self._held, (self._held + self._too_many) // 2)
        bundles = [bundle for ask in asks[:count] for bundle in _bundles_of(ask, self.bare)]
        if (bundles, selector) != (self._bundles, self._selector) or not ours:
            ray_internals.request(bundles, selector)
            self._bundles, self._selector, self._count = bundles, selector, count
            state = ray_internals.autoscaling()
            self._version = 0 if state is None else state.version

    def _learn(self, *, infeasible: bool) -> None:
        """Take in what the autoscaler says of so many things."""
        if not infeasible:
            self._held = max(self._held, self._count)
            return
        self._too_many = min(self._too_many, self._count)
        if self._too_many > 1:
            return
        if any(ask.memory for ask in self._asks) and not self.bare:
            self.bare, self._held, self._too_many = True, 0, MOST + 1
        else:
            self.refused = True


def _bundles_of(ask: ResourceRequest, bare: bool) -> list[dict[str, float]]:
    """What an ask's workers take, each on one node."""
    each = {"CPU": ask.cpus, "GPU": ask.gpus, "memory": 0.0 if bare else ask.memory}
    return [{name: number for name, number in each.items() if number}] * ask.workers


def foreseen(nodes: Sequence[Node], ask: ResourceRequest, what: str, demand: Demand) -> str | None:
    """What a command would wait for that needs this room; None where it is there already.

    Raises:
        AkdError: as `check_room`, where nothing is waited for.
    """
    try:
        check_room(nodes, ask, what)
    except AkdError as error:
        if demand.waits:
            return str(ask)
        raise waiting_is_possible(error) from error
    return None


def waits_for(what: str, ask: ResourceRequest) -> str:
    """The line that says what a command waits for."""
    return f"waiting for nodes, for {what}: {ask}"


def waiting_is_possible(error: AkdError) -> AkdError:
    """A refusal for want of room on a cluster that was joined, with the option that waits instead."""
    if isinstance(error, MachineError) and not cluster.started_here() and cluster.ray.is_initialized():
        error.next = f"{error.next}; --wait-for-nodes waits for nodes that are about to join"
    return error


def never_held(ask: ResourceRequest, what: str) -> MachineError:
    """The error where the autoscaler says that no node type holds what is waited for."""
    return MachineError(
        f"no node that the cluster's autoscaler may bring holds {what}",
        got="its answer: infeasible, by its node types and how many it may have of each",
        expected=str(ask),
        next="lower `threads`, `workers` or `gpus` in the recipe; or add a larger node type, or raise max_workers",
    )
