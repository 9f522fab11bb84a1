"""Run tasks: one, or a bounded window of many; what they raise comes back as it is, what kills them is named.

They are tasks of Ray, or where there is no cluster calls in workers of this machine (`local_tasks`).

No Ray task is ever cancelled: Ray 2.60 aborts the whole driver if a task is cancelled just as it ends (within 60 tries,
where `ray.cancel` follows `ray.wait`). Those in flight when a command leaves end with it, like all of its job.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from akd_dist.base.errors import AkdError
from akd_dist.jobs.cluster import check_alive, ray
from akd_dist.jobs.demand import MOST, waits_for
from akd_dist.jobs.local_tasks import RETRIES, LocalTasks, died, raised, unanswered
from akd_dist.jobs.packing import Node, ResourceRequest, fits
from akd_dist.jobs.shared import GONE_SECONDS, Shared, Unseen, look_first, nodes_lost
from akd_dist.jobs.stopping import GRACE_SECONDS, POLL_SECONDS, StopFlag


@dataclass(frozen=True)
class Task:
    """One call, `function(job, item)`, in a worker."""

    name: str
    """Names the item in messages."""
    job: Any
    """What many items have in common; shipped to the cluster once."""
    item: Any
    """What this one is about; small."""
    size: int = 1
    """How many things it is about, by the count of `run_tasks`."""


def run_tasks(
    function: Callable[[Any, Any], Any],
    tasks: Iterable[Task],
    *,
    threads: int,
    gpus: int,
    shared: Shared | LocalTasks,
    stop: StopFlag,
    on_result: Callable[[Task, Any], None],
    count: int = 1,
) -> None:
    """Run tasks, a bounded number in flight; hand on results as they come.

    A worker process is reused (max_calls=0), so whatever it loaded for one item it keeps for the next; on a GPU too,
    where Ray would start a new process for each. A task whose worker died is run again up to RETRIES times; one that
    raised is not, since its inputs would be the same. One that came to a node that misses something is sent elsewhere.

    Args:
        function: called as function(job, item) in a worker.
        threads: CPUs that a task occupies.
        gpus: GPUs that a task has to itself.
        shared: the nodes that tasks may run on; those that join are used too.
        stop: once it is up, no other task is started and those in flight are left alone: they publish whole, or not.
        count: how many things there are to be done, see `Task.size`: room is asked for so many tasks, where there is an
            autoscaler.

    Raises:
        AkdError: as raised by a task.
        RefusedError: a task raised something else, as a user's own model may; names the item, shows it whole.
        MachineError: an item's worker died more often than that (names the item); or tasks need more threads or
            GPUs than the cluster has, or has left after a loss of nodes.
    """
    if isinstance(shared, LocalTasks):
        shared.run_tasks(function, tasks, at_once(shared.nodes(), threads, gpus), threads, stop, on_result)
        return
    ask = ResourceRequest(1, threads, gpus)
    shared.wait_for_room(ask, "tasks of so many threads", stop)
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(look_first)
    needed, shipped = shared.needed(), dict[int, tuple[Any, Any]]()
    waiting, again = iter(tasks), list[Task]()
    flying: dict[Any, Task] = {}
    room = _Room(shared, ask)
    while True:
        shared.look()
        # Twice what runs at a time, so that no CPU waits for the driver; asked each time, since nodes join and leave.
        window = 2 * at_once(shared.nodes(), threads, gpus)
        while not stop and len(flying) < window and (task := again.pop() if again else next(waiting, None)) is not None:
            # What tasks have in common goes to the object store once; each task carries a reference and its own item.
            if id(task.job) not in shipped:
                shipped[id(task.job)] = task.job, ray.put(task.job)  # kept: the id of what is gone may be given again
            here = remote.options(name=function.__name__, label_selector=shared.selector())
            flying[here.remote(needed, function, shipped[id(task.job)][1], task.item)] = task
        if not flying or stop:
            return
        check_alive(stop)
        done, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            task = flying.pop(reference)
            if isinstance(result := _result(reference, task.name), Unseen):
                shared.leave_out(result)
                again.append(task)
            else:
                on_result(task, result)
                count -= task.size
        if flying:
            room.check(next(iter(flying.values())).name)
            shared.ask_for([ask] * min(max(count, 1), MOST))


class _Room:
    """Notices that no node is left which could hold a task: Ray would look for one for ever."""

    def __init__(self, shared: Shared, ask: ResourceRequest) -> None:
        self.shared, self.ask, self.seen_at, self.told = shared, ask, time.monotonic(), False

    def check(self, name: str) -> bool:
        """Whether there is one. Where more may come they are waited for; else one has GONE_SECONDS to be there again.

        Args:
            name: the task that runs there, or waits to, for the message.

        Raises:
            MachineError: none was.
        """
        if fits(self.shared.nodes(), self.ask):
            self.seen_at, self.told = time.monotonic(), False
            return True
        if time.monotonic() - self.seen_at > GONE_SECONDS:
            if self.shared.demand.waits:
                if not self.told:
                    self.shared.tell(waits_for(name, self.ask))
                self.told = True
                return False
            try:
                self.shared.check_room(self.ask, name)
            except AkdError as error:
                doing = f"{name} ran, or waited to"
                raise nodes_lost(doing, f"for {GONE_SECONDS:g} s: {error.line}", error.expected) from error
        return False


def at_once(nodes: list[Node], threads: int, gpus: int) -> int:
    """How many tasks run at a time on nodes; one at least, where nodes are lost and may come back."""
    fit = [min(node.cpus // threads, node.gpus // gpus if gpus else node.cpus) for node in nodes]
    return max(1, int(sum(fit)))


def run_one(
    function: Callable[..., Any],
    *arguments: Any,
    threads: int,
    gpus: int,
    shared: Shared | LocalTasks,
    stop: StopFlag,
    on_poll: Callable[[], None],
    name: str,
) -> Any:
    """Run one task and wait for it, calling `on_poll` several times a second; errors as in `run_tasks`.

    Once `stop` is up, it is the task that ends, with what it returns; it has GRACE_SECONDS.

    Raises:
        InterruptedByUser: it did not end in that time, or had not even begun.
    """
    if isinstance(shared, LocalTasks):
        return shared.run_one(function, *arguments, threads=threads, stop=stop, on_poll=on_poll, name=name)
    ask = ResourceRequest(1, threads, gpus)
    shared.wait_for_room(ask, name, stop)
    once = 1 if gpus else 0  # a process that ends gives back the memory of its GPU
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES, max_calls=once)(look_first)
    needed, room = shared.needed(), _Room(shared, ask)
    while True:
        here = remote.options(name=function.__name__, label_selector=shared.selector())
        reference = here.remote(needed, function, *arguments)
        going_at = time.monotonic()
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            check_alive(stop)
            on_poll()
            shared.look()
            shared.ask_for([ask])
            there = room.check(name)
            going_at = going_at if stop else time.monotonic()
            if time.monotonic() - going_at > GRACE_SECONDS or (stop and not there):
                raise unanswered(name, stop)
        if not isinstance(result := _result(reference, name), Unseen):
            return result
        shared.leave_out(result)


def _result(reference: Any, name: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, AkdError):
            # The refusal alone: Ray's wrapper would put the worker's traceback around it.
            raise cause from None
        raise raised(name, str(error)) from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise died(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
