"""Room on a cluster, as plain arithmetic: what a cohort asks for, what nodes have, and when a queue of cohorts runs.

The driver starts cohorts by `next_to_start`, and the planner foretells the same queue by `timetable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.formatting import size

_DUST = 1e-6  # fractions of GPUs do not add up to 1 exactly
NODES_SHOWN = 5


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what it has: all of it, or what is free now."""

    name: str
    """Its id in the cluster."""
    cpus: float
    """CPUs."""
    gpus: float = 0.0
    """GPUs."""
    memory: float = float("inf")
    """Bytes that Ray gives to workers."""
    address: str = ""
    """Where it is, for people."""

    def holds(self, ask: ResourceRequest) -> bool:
        """Whether one worker fits here."""
        return self.cpus + _DUST >= ask.cpus and self.gpus + _DUST >= ask.gpus and self.memory + _DUST >= ask.memory

    def without(self, ask: ResourceRequest, workers: int = 1) -> Node:
        """What is left beside so many workers; a negative number gives their room back."""
        return replace(
            self,
            cpus=self.cpus - workers * ask.cpus,
            gpus=self.gpus - workers * ask.gpus,
            memory=self.memory - workers * ask.memory,
        )


@dataclass(frozen=True)
class ResourceRequest:
    """What a cohort occupies: a number of workers, each of them whole on some node."""

    workers: int
    """Data-parallel workers."""
    cpus: float
    """CPUs of each."""
    gpus: float = 0.0
    """GPUs of each; a fraction where cohorts share one."""
    memory: float = 0.0
    """Bytes of each."""

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} {'CPU' if self.cpus == 1 else 'CPUs'}"]
        parts += [f"{self.gpus:g} {'GPU' if self.gpus == 1 else 'GPUs'}"] if self.gpus else []
        parts += [f"{size(self.memory)} of memory"] if self.memory else []
        each = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]
        return f"{each} on one node" if self.workers == 1 else f"{self.workers} workers, each with {each} on one node"


def pack(nodes: Sequence[Node], asks: Iterable[ResourceRequest]) -> list[Node] | None:
    """What is left of the nodes with all asks placed, one after the other; None if one does not fit.

    For a single ask that is exact; for several it may miss a packing that exists.
    """
    left = list(nodes)
    for ask in asks:
        if _take(left, ask) is None:
            return None
    return left


def _take(left: list[Node], ask: ResourceRequest) -> list[int] | None:
    """Take an ask from nodes, in place: the index of each worker's node. None, and nothing taken, if it does not fit.

    Each worker goes to the fullest node that holds it, so that large holes stay.
    """
    taken: list[int] = []
    for _ in range(ask.workers):
        holding = [index for index, node in enumerate(left) if node.holds(ask)]
        if not holding:
            _give_back(left, ask, taken)
            return None
        # GPUs count first: work that needs none goes to nodes without any, and leaves the others to those that do.
        chosen = min(holding, key=lambda index: (left[index].gpus, left[index].cpus, left[index].memory))
        left[chosen] = left[chosen].without(ask)
        taken.append(chosen)
    return taken


def _give_back(left: list[Node], ask: ResourceRequest, taken: Iterable[int]) -> None:
    for index in taken:
        left[index] = left[index].without(ask, -1)


def fits(nodes: Sequence[Node], ask: ResourceRequest) -> bool:
    """Whether the nodes hold an ask."""
    return pack(nodes, [ask]) is not None


def with_more(nodes: Sequence[Node], ask: ResourceRequest, count: int) -> list[Node]:
    """The nodes, and so many more as an autoscaler may bring: like the smallest that holds a worker now.

    Where none does, of just a worker's size, and of any memory.
    """
    holding = [node for node in nodes if node.holds(ask)]
    like = min(holding, key=lambda node: (node.gpus, node.cpus, node.memory), default=Node("", ask.cpus, ask.gpus))
    return [*nodes, *([replace(like, name="", address="a node that may join")] * count)]


def check_room(nodes: Sequence[Node], ask: ResourceRequest, what: str) -> None:
    """Refuse what would wait for ever.

    Args:
        what: who asks, for the message.

    Raises:
        MachineError: the nodes have too few CPUs or GPUs, or none of them has enough of both together.
        RefusedError: they have, and it is the memory that no node has.
    """
    if fits(nodes, ask):
        return
    bare = replace(ask, memory=0.0)
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    if ask.gpus * ask.workers > gpus:
        raise MachineError(
            f"the cluster has too few GPUs for {what}",
            got=f"{gpus:g} GPUs in all",
            expected=f"{ask.gpus * ask.workers:g} GPUs, as the recipe says device: cuda",
            next="set device: cpu in the recipe (--set device=cpu), lower `workers` or `gpus`, or join nodes with GPUs",
        )
    if not fits(nodes, bare):
        largest = ", ".join(f"{node.cpus:g}" for node in sorted(nodes, key=lambda node: -node.cpus)[:NODES_SHOWN])
        raise MachineError(
            f"the cluster is too small for {what}",
            got=f"{cpus:g} CPUs in all; on its nodes: {largest}" + (f"; {gpus:g} GPUs" if ask.gpus else ""),
            expected=str(bare),
            next="lower `threads` or `workers` in the recipe, or join more or larger nodes",
        )
    raise RefusedError(
        f"{what} does not fit the memory of the cluster",
        got=f"nodes that give workers {', '.join(size(node.memory) for node in nodes[:NODES_SHOWN])}",
        expected=f"{size(ask.memory)} for each of its workers ({ask.workers}), as a probe estimates it",
        next="lower its batch or take a smaller model; or join a node with more memory",
    )


def next_to_start(
    waiting: Sequence[ResourceRequest],
    free: Sequence[Node],
    nodes: Sequence[Node],
    unplaced: Sequence[ResourceRequest] = (),
) -> int | None:
    """Which of the waiting cohorts starts now, as an index: the first in line that fits; None if none does.

    A smaller one may so start before a larger one that came first. The queue only ever gets shorter, so the larger one
    waits at most until the smaller ones are through, and no CPU is idle meanwhile that one of them could use.

    Args:
        waiting: in the order of the queue.
        free: what the nodes have free.
        nodes: what they have in all.
        unplaced: the cohorts that run, where some of them are not placed yet and still count as free.
    """
    for ask in dict.fromkeys(waiting):  # a long queue holds few different asks
        if fits(free, ask) and (not unplaced or pack(nodes, [*unplaced, ask]) is not None):
            return waiting.index(ask)
    return None


def timetable(cohorts: Sequence[tuple[float, ResourceRequest]], nodes: Sequence[Node]) -> list[tuple[float, float]]:
    """When each cohort begins and ends, in seconds, if all of them queue now in this order on an empty cluster.

    Args:
        cohorts: seconds and ask of each. One that the cluster cannot hold is taken to have all of it.
    """
    waiting = list(range(len(cohorts)))
    times = [(0.0, 0.0)] * len(cohorts)
    running: dict[int, list[int]] = {}  # cohort -> the nodes of its workers
    free, now = list(nodes), 0.0
    while waiting:
        chosen = next_to_start([cohorts[index][1] for index in waiting], free, nodes)
        if chosen is None and running:
            done = min(running, key=lambda index: times[index][1])
            now = times[done][1]
            _give_back(free, cohorts[done][1], running.pop(done))
            continue
        index = waiting.pop(chosen or 0)
        seconds, ask = cohorts[index]
        times[index] = (now, now + seconds)
        taken = _take(free, ask)
        if taken is None:  # larger than the cluster
            now += seconds
        else:
            running[index] = taken
    return times
