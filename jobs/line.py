"""A line between a driver and a task that shares no folder with it: how far it is, and whether to stop."""

from __future__ import annotations

from typing import Any, Self

from akd_dist.distill.job import CohortJob
from akd_dist.distill.published import train_and_publish
from akd_dist.documents.status import CohortProgress
from akd_dist.jobs.cluster import ray
from akd_dist.jobs.stopping import StopFlag

TELL_SECONDS = 60.0
"""How long a task waits for its driver to take in how far it is."""


class Line:
    """The driver's end: an actor on its node, which takes no CPU and ends with the block."""

    def __init__(self, stop: StopFlag) -> None:
        self.stop = stop
        self.end: Any = None
        """The task's end."""

    def __enter__(self) -> Self:
        here: Any = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.end = ray.remote(num_cpus=0)(_Post).options(scheduling_strategy=here).remote()
        return self

    def __exit__(self, *leaving: object) -> None:
        ray.kill(self.end)

    def exchange(self) -> CohortProgress | None:
        """Pass on whether to stop; how far the task is."""
        progress: CohortProgress | None = ray.get(self.end.ask.remote(bool(self.stop)))
        return progress


class _Post:
    """What lies between the two: runs as an actor."""

    def __init__(self) -> None:
        self.progress: CohortProgress | None = None
        self.stop = False

    def ask(self, stop: bool) -> CohortProgress | None:
        self.stop = stop
        return self.progress

    def tell(self, progress: CohortProgress | None) -> bool:
        self.progress = progress
        return self.stop


def train_elsewhere(job: CohortJob, uri: str, end: Any) -> dict[str, Any]:
    """`train_and_publish` as a Ray task whose driver sees none of its files.

    Args:
        end: the task's end of a line to the driver.

    Returns:
        As `train_and_publish`; and "node", the beginning of the id of the node that it ran on.
    """

    def follow(progress: CohortProgress | None) -> bool:
        try:
            return bool(ray.get(end.tell.remote(progress), timeout=TELL_SECONDS))
        except ray.exceptions.GetTimeoutError:
            return False
        except ray.exceptions.RayError:
            return True  # the driver is gone

    node = ray.get_runtime_context().get_node_id()[:8]
    return train_and_publish(job, uri, follow) | {"node": node}
