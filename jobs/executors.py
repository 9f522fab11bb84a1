"""What a fleet's cohorts run on: Ray Train runs on the nodes of a cluster, or processes of this machine.

Both run the same worker, which tells how far it is by files, so nothing else of a fleet knows which of them it has.
Starting Ray takes longer than a small fleet trains. Then its cohorts are processes of this machine, as whoever writes
a loop by hand would have them; a larger fleet has Ray, which watches over the memory of the machine as well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol, Self

from akd_dist.base.errors import AkdError, MachineError
from akd_dist.distill.job import CohortJob
from akd_dist.jobs import cluster, ray_train
from akd_dist.jobs.demand import Demand
from akd_dist.jobs.idle import IdleWorkers, Worker, how_it_ended
from akd_dist.jobs.packing import Node, ResourceRequest, check_room, pack
from akd_dist.jobs.shared import Shared, UnseenError
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.worker import worker_log


class Executor(Protocol):
    """Where cohorts run. Use it as a context."""

    demand: Demand
    """What is asked of an autoscaler."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *leaving: object) -> None: ...

    def look(self) -> object:
        """Notice nodes that have come or gone."""

    def nodes(self) -> list[Node]:
        """The nodes that may be given work, with all that they have."""

    def free(self) -> list[Node]:
        """The same nodes with what is free now."""

    def check_room(self, ask: ResourceRequest, what: str) -> None:
        """Refuse what these nodes can never hold; as `packing.check_room`."""

    def ask_for(self, asks: Sequence[ResourceRequest]) -> None:
        """Ask the autoscaler, where there is one, for nodes that hold all of these."""

    def run(self, job: CohortJob, ask: ResourceRequest) -> str | None:
        """Run a cohort to its end.

        Returns:
            Why its workers died; nothing if it came to its end. None if it has not begun: it was sent to a node that
            lacks something, which gets no work any more.

        Raises:
            AkdError: what a worker was refused for.
            MachineError: the cluster was lost.
        """

    def check_alive(self, stop: StopFlag) -> None:
        """Notice that the cluster is gone; as `cluster.check_alive`."""


class RayExecutor(Shared):
    """Cohorts as Ray Train runs, on the nodes that see what the fleet works on."""

    def run(self, job: CohortJob, ask: ResourceRequest) -> str | None:
        """As the protocol says."""
        try:
            return ray_train.fit(job, ask, self.selector(), self.needed())
        except UnseenError as error:
            self.leave_out(error.unseen)
            return None
        except cluster.ray.exceptions.RayError as error:
            raise MachineError(
                "the Ray cluster was lost while students trained",
                got=" ".join(str(error).split())[:300],
                expected="a cluster that stays up",
                next="the same command goes on from the last checkpoints",
            ) from error

    def check_alive(self, stop: StopFlag) -> None:
        """As the protocol says."""
        cluster.check_alive(stop)


class LocalExecutor:
    """Cohorts as processes of this machine, one each.

    Args:
        node: what this machine has.
        idle: the processes that were started for it.
    """

    def __init__(self, node: Node, idle: IdleWorkers) -> None:
        self.node, self.idle = node, idle
        self.demand = Demand(never=True)
        self.lock = threading.Lock()
        self.running: dict[Worker, ResourceRequest] = {}
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        """End what still runs: whoever leaves has waited for as long as he wanted to."""
        with self.lock:
            self.closed = True
            for worker in self.running:
                worker.kill()

    def look(self) -> None:
        """This machine stays what it is."""

    def nodes(self) -> list[Node]:
        """As the protocol says."""
        return [self.node]

    def free(self) -> list[Node]:
        """As the protocol says."""
        with self.lock:
            return pack([self.node], self.running.values()) or []

    def check_room(self, ask: ResourceRequest, what: str) -> None:
        """As the protocol says."""
        check_room([self.node], ask, what)

    def ask_for(self, asks: Sequence[ResourceRequest]) -> None:
        """No other machine will come."""

    def check_alive(self, stop: StopFlag) -> None:
        """There is no cluster that could be lost."""

    def run(self, job: CohortJob, ask: ResourceRequest) -> str:
        """As the protocol says."""
        with self.lock:
            if self.closed:  # the thread of a cohort that was ended, and would begin it again
                return ""
            worker = self.idle.take()
            self.running[worker] = ask
        try:
            outcome = worker.ask("train", job)
        finally:
            with self.lock:
                del self.running[worker]
            code = worker.end()
        if outcome is None:
            return _how_it_ended(code, job)
        if isinstance(outcome, AkdError):
            raise outcome
        return ""


def _how_it_ended(code: int, job: CohortJob) -> str:
    log = worker_log(job, 0)
    return how_it_ended(code) + (f", see {log}" if log.exists() and log.stat().st_size else "")
