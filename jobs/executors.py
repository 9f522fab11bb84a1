"""What a fleet's cohorts run on: Ray Train runs on the nodes of a cluster, or processes of this machine.

Both run the same worker, which tells how far it is by files, so nothing else of a fleet knows which of them it has.
Starting Ray takes longer than a small fleet trains. Then its cohorts are processes of this machine, as whoever writes
a loop by hand would have them; a larger fleet has Ray, which watches over the memory of the machine as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from akd_dist.base.errors import AkdError, MachineError
from akd_dist.distill.job import CohortJob
from akd_dist.jobs import cluster, ray_train
from akd_dist.jobs.demand import Demand
from akd_dist.jobs.idle import IdleWorkers, how_it_ended
from akd_dist.jobs.packing import Node, ResourceRequest, check_room, pack
from akd_dist.jobs.shared import Shared, UnseenError
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.this_machine import LeftError, ThisMachine
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


class LocalExecutor(ThisMachine):
    """Cohorts as processes of this machine, one each."""

    def __init__(self, node: Node, idle: IdleWorkers) -> None:
        super().__init__(node, idle)
        self.demand = Demand(never=True)

    def look(self) -> None:
        """This machine stays what it is."""

    def free(self) -> list[Node]:
        """As the protocol says."""
        with self.lock:
            return pack([self.node], self.busy.values()) or []

    def check_room(self, ask: ResourceRequest, what: str) -> None:
        """As the protocol says."""
        check_room([self.node], ask, what)

    def ask_for(self, asks: Sequence[ResourceRequest]) -> None:
        """No other machine will come."""

    def check_alive(self, stop: StopFlag) -> None:
        """There is no cluster that could be lost."""

    def run(self, job: CohortJob, ask: ResourceRequest) -> str:
        """As the protocol says."""
        try:
            worker = self.take(ask)
        except LeftError:  # the thread of a cohort that was ended, and would begin it again
            return ""
        try:
            outcome = worker.ask("train", job)
        finally:
            self.drop(worker)
            code = worker.end()
        if outcome is None:
            return _how_it_ended(code, job)
        if isinstance(outcome, AkdError):
            raise outcome
        return ""


def _how_it_ended(code: int, job: CohortJob) -> str:
    log = worker_log(job, 0)
    return how_it_ended(code) + (f", see {log}" if log.exists() and log.stat().st_size else "")
