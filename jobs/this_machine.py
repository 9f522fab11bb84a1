"""This machine as the only node that work may be given, and its workers that are busy with some."""

from __future__ import annotations

import threading
from typing import Any, Self

from akd_dist.jobs.idle import IdleWorkers, Worker
from akd_dist.jobs.packing import Node


class LeftError(Exception):
    """Nobody waits for this work any more, so no worker is taken for it."""


class ThisMachine:
    """A node of its own. Use it as a context: whoever leaves ends what still runs.

    Args:
        node: what this machine has.
        idle: its workers that wait for something to do.
    """

    def __init__(self, node: Node, idle: IdleWorkers) -> None:
        self.node, self.idle = node, idle
        self.busy: dict[Worker, Any] = {}
        """Workers that are taken, each with what it was taken for."""
        self.lock = threading.Lock()
        self.left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        """End what still runs: it publishes whole, or not at all."""
        with self.lock:
            self.left = True
            for worker in self.busy:
                worker.kill()

    def nodes(self) -> list[Node]:
        """This machine, with all that it has."""
        return [self.node]

    def take(self, work: Any = None) -> Worker:
        """A worker for some work; it is busy until `drop`.

        Raises:
            LeftError: the block was left.
        """
        with self.lock:
            if self.left:
                raise LeftError
            worker = self.idle.take()
            self.busy[worker] = work
        return worker

    def drop(self, worker: Worker) -> None:
        """Have a worker count as busy no more."""
        with self.lock:
            self.busy.pop(worker, None)
