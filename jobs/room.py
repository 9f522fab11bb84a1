"""Room on a cluster, as plain arithmetic: what a cohort asks for, what nodes have, and when a queue of cohorts runs.

The driver starts cohorts by `next_to_start`, and the planner foretells the same queue by `timetable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_DUST = 1e-6  # fractions of GPUs do not add up to 1 exactly


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

    def holds(self, ask: Ask) -> bool:
        """Whether one worker fits here."""
        has, wanted = (self.cpus, self.gpus, self.memory), (ask.cpus, ask.gpus, ask.memory)
        return all(have + _DUST >= want for have, want in zip(has, wanted, strict=True))

    def without(self, ask: Ask, workers: int = 1) -> Node:
        """What is left beside so many workers; a negative number gives their room back."""
        return replace(
            self,
            cpus=self.cpus - workers * ask.cpus,
            gpus=self.gpus - workers * ask.gpus,
            memory=self.memory - workers * ask.memory,
        )


@dataclass(frozen=True)
class Ask:
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
        parts += [f"{in_units(self.memory)} of memory"] if self.memory else []
        each = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]
        return f"{each} on one node" if self.workers == 1 else f"{self.workers} workers, each with {each} on one node"


def in_units(size: float) -> str:
    """Bytes as people say them: 812 B, 34.5 kB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def place(nodes: Sequence[Node], asks: Iterable[Ask]) -> list[Node] | None:
    """What is left of the nodes with all asks placed, one after the other; None if one does not fit.

    For a single ask that is exact; for several it may miss a packing that exists.
    """
    left = list(nodes)
    for ask in asks:
        if _take(left, ask) is None:
            return None
    return left


def _take(left: list[Node], ask: Ask) -> list[int] | None:
    """Take an ask from nodes, in place: the index of each worker's node. None, and nothing taken, if it does not fit.

    Each worker goes to the fullest node that holds it, so that large holes stay.
    """
    taken: list[int] = []
    for _ in range(ask.workers):
        holding = [index for index, node in enumerate(left) if node.holds(ask)]
        if not holding:
            _give_back(left, ask, taken)
            return None
        chosen = min(holding, key=lambda index: (left[index].gpus, left[index].cpus, left[index].memory))
        left[chosen] = left[chosen].without(ask)
        taken.append(chosen)
    return taken


def _give_back(left: list[Node], ask: Ask, taken: Iterable[int]) -> None:
    for index in taken:
        left[index] = left[index].without(ask, -1)


def fits(nodes: Sequence[Node], ask: Ask) -> bool:
    """Whether the nodes hold an ask."""
    return place(nodes, [ask]) is not None


def next_to_start(
    waiting: Sequence[Ask],
    overtook: Sequence[Ask],
    free: Sequence[Node],
    nodes: Sequence[Node],
    running: Sequence[Ask] = (),
) -> int | None:
    """Which of the waiting cohorts starts now, as an index; None if none does.

    The first in line goes first. Another one that fits now may overtake it only if the first one would still fit on
    the empty cluster beside all that overtook it: then it waits for nobody but those who ran before it came first.

    Args:
        waiting: in the order of the queue.
        overtook: running cohorts that overtook the first one.
        free: what the nodes have free.
        nodes: what they have in all.
        running: the cohorts that run, where some of them are not placed yet and still count as free.
    """
    hopeless = bool(waiting) and not fits(nodes, waiting[0])  # a node was lost: it waits for another one to join
    refused: set[Ask] = set()  # a long queue holds few different asks
    for index, ask in enumerate(waiting):
        if ask in refused:
            continue
        has_room = fits(free, ask) and (not running or place(nodes, [*running, ask]) is not None)
        if has_room and (index == 0 or hopeless or place(nodes, [waiting[0], *overtook, ask]) is not None):
            return index
        refused.add(ask)
    return None


def timetable(cohorts: Sequence[tuple[float, Ask]], nodes: Sequence[Node]) -> list[tuple[float, float]]:
    """When each cohort begins and ends, in seconds, if all of them queue now in this order on an empty cluster.

    Args:
        cohorts: seconds and ask of each. One that the cluster cannot hold is taken to have all of it.
    """
    waiting = list(range(len(cohorts)))
    times = [(0.0, 0.0)] * len(cohorts)
    running: dict[int, list[int]] = {}  # cohort -> the nodes of its workers
    overtook: list[int] = []
    free, now = list(nodes), 0.0
    while waiting:
        asks = [cohorts[index][1] for index in waiting]
        chosen = next_to_start(asks, [cohorts[index][1] for index in overtook], free, nodes)
        if chosen is None and running:
            done = min(running, key=lambda index: times[index][1])
            now = times[done][1]
            _give_back(free, cohorts[done][1], running.pop(done))
            overtook = [index for index in overtook if index in running]
            continue
        index = waiting.pop(chosen or 0)
        overtook = [*overtook, index] if chosen else []
        seconds, ask = cohorts[index]
        times[index] = (now, now + seconds)
        taken = _take(free, ask)
        if taken is None:  # larger than the cluster
            now += seconds
        else:
            running[index] = taken
    return times
