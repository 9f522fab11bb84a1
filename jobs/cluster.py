"""The Ray cluster: connect to one or start one on loopback, run tasks in a bounded window, stop without losing work."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from akd_dist.jobs.room import Ask, Node, check_room
from akd_dist.storage.errors import AkdError, InterruptedByUser, MachineError, RefusedError, TerminatedError
from akd_dist.storage.files import replace

# Read by Ray when it is imported or started, so they are set before either.
_ENVIRONMENT = {
    # Only with this does every Ray process listen on 127.0.0.1 (measured with Ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Out-of-memory kills have a retry budget of their own, endless by default.
    "RAY_task_oom_retries": "3",
    # `ray.train.report` and the end of a run wait for this interval, 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers stay where they are; all our paths are absolute anyway.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Announces a change of behaviour that only concerns jobs which ask for zero GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Failed tasks are told of here. Ray tells again when their references are collected, in the middle of anything:
    # within ast.parse, Python 3.11 then raises a SystemError (seen).
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
# Ours that workers on other nodes need to know.
_PASSED_ON = ("AKD_DIST_CACHE_BUDGET",)
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside Ray, at import
    import ray as ray  # under its own name, so that other modules may take it from here: the environment is set then

POLL_SECONDS = 0.2
# `timeout` signals the command it started, and then the whole group, with that command in it: one wish and not two.
ONCE_SECONDS = 1.0
# Ray ends this process when the head of a cluster has not answered for 60 s: with a code and a message of its own.
HEAD_SECONDS = 20.0
_closers: list[str] = []  # holds one entry while a `closing` block is open: blocks inside it leave the cluster up


def connect(
    address: str | None = None, num_cpus: int | None = None, tell: Callable[[str], None] = lambda text: None
) -> None:
    """Connect to the cluster at `address`, or start one on this machine that listens on loopback only; idempotent.

    Args:
        address: `host:port` of a running cluster, or `auto` for the one that this node belongs to. If this user has a
            Ray token, it is shown to the cluster.
        num_cpus: CPUs of a cluster started here; None takes those of the machine.
        tell: told when this takes a moment.

    Raises:
        MachineError: no cluster answers there, or none can be started.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        tell("starting Ray on this machine")
        # As the environment above says, also for a ray that was imported before it was set.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        options |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    else:
        tell(f"connecting to Ray at {address}")
        if os.environ.get("RAY_AUTH_TOKEN") or Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray itself leaves it off for an explicit address
        _check_answers(address)
        passed_on = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        options |= {"address": address, "runtime_env": {"env_vars": _ENVIRONMENT | passed_on}}
    failure = _init(options)
    if failure is not None:
        told = [line for line in str(failure).strip().splitlines() if line] or [type(failure).__name__]
        raise MachineError(
            "no Ray cluster" + (f" at {address}" if address else " could be started on this machine"),
            got=told[0],
            expected="a running Ray of the same version" if address else "room for a few Ray processes",
            next="check --address; a cluster with tokens wants RAY_AUTH_MODE=token and its token in ~/.ray/auth_token"
            if address
            else "close other Ray clusters, or pass --address of one",
        ) from failure


def _init(options: dict[str, Any]) -> Exception | None:
    """`ray.init` on a thread of its own, where it leaves our signal handlers alone; returns what it raised.

    The thread lives on as long as the process: Ray's processes are told to die with the thread that started them.

    Those processes inherit its blocked SIGTERM. Service managers send that to everybody, and a driver
    whose raylet leaves is ended by Ray, without a word and with exit code 1, before or after it has seen the signal.
    As it is, the driver alone decides: workers checkpoint, and then Ray is shut down.
    """
    failures: list[Exception] = []
    tried = threading.Event()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            failures.append(error)
        tried.set()
        threading.Event().wait()

    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that a thread cannot set a handler
    threading.Thread(target=start, name="ray-parent", daemon=True).start()
    while not tried.wait(POLL_SECONDS):  # in slices, so that signals are handled meanwhile
        pass
    _take_signals_back()
    ray._private.worker._worker_logs_enabled = False  # Ray's long words on each death: we say what comes of it
    return failures[0] if failures else None


def _take_signals_back() -> None:
    """Make Python's handlers the first that a signal meets again.

    Below Python, Ray has put a handler of its own before them, which prints a stack and sets an alarm: whoever has not
    left three seconds after a SIGTERM is aborted, in the middle of a checkpoint if it must be.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (ours := signal.getsignal(number)) is not None:
                signal.signal(number, ours)


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, in seconds; Ray itself would try for a minute."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise MachineError(
            f"no Ray cluster at {address}",
            got=str(error),
            expected="host:port of a running cluster's head",
            next="check --address, or leave it out to start Ray on this machine",
        ) from None


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Shut down the cluster on the way out, if it was started inside; one that was there before stays."""
    ours = not ray.is_initialized() and not _closers
    if ours:
        _closers.append("outermost")
    try:
        yield
    finally:
        if ours:
            _closers.clear()
            if ray.is_initialized():
                shut_down()


def shut_down() -> None:
    """Leave the cluster, and end every process of one that was started here.

    Not left to `ray.shutdown`, which asks each with a SIGTERM and waits a second: they have it blocked. A raylet that
    is killed leaves its agents behind for a minute.
    """
    node: Any = ray._private.worker._global_node
    ray._private.worker._global_node = None
    raylets = [one.process for one in node.all_processes.get("raylet", [])] if node is not None else []
    below = []
    for raylet in raylets:
        if raylet.poll() is None:  # else its number may be another's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                below += psutil.Process(raylet.pid).children(recursive=True)
    try:
        ray.shutdown()
    finally:
        if raylets:
            node.destroy_external_storage()
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class StopFlag:
    """Set by the first Ctrl-C or SIGTERM; loops read it, finish what they hold and leave."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Leave where nothing has begun that would have to be kept."""
        if self:
            raise self.error("stopped; what was done is kept", "the same command goes on from there")

    def error(self, what: str, next_step: str) -> InterruptedByUser:
        """The error that ends the command once everything is safe."""
        kind = TerminatedError if self.signal == signal.SIGTERM else InterruptedByUser
        return kind(what, next=next_step)


@contextlib.contextmanager
def stop_on_signals(tell: Callable[[str], None]) -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; one that comes ONCE_SECONDS later or more stops at once.

    Signals can only be handled on the main thread: elsewhere the flag stays down.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    first = 0.0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if flag and time.monotonic() - first < ONCE_SECONDS:
            return
        if flag:
            raise KeyboardInterrupt
        flag.signal, first = number, time.monotonic()
        tell("stopping: keeping what is done (once more to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Task:
    """One call of a Ray task: `function(job, item)`."""

    name: str
    """Names the item in messages."""
    job: Any
    """What many items have in common; shipped to the cluster once."""
    item: Any
    """What this one is about; small."""


@dataclass
class _Head:
    """Watches whether the head of a cluster that was joined still listens."""

    address: str = ""
    looked_at: float = 0.0
    answered_at: float = 0.0

    def check(self) -> None:
        now, here = time.monotonic(), str(ray.get_runtime_context().gcs_address)
        if here != self.address:
            self.address, self.answered_at = here, now
        if now - self.looked_at < HEAD_SECONDS / 4:
            return
        self.looked_at = now
        host, _, port = here.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            self.answered_at = now
        except OSError as error:
            if now - self.answered_at > HEAD_SECONDS:
                raise MachineError(
                    f"the head of the Ray cluster at {here} was lost",
                    got=str(error),
                    expected="a cluster that stays up",
                    next="start it again; the same command goes on from what was done",
                ) from None


_head = _Head()


def check_alive(stop: StopFlag) -> None:
    """Notice that the Ray that was started here, or the head of the cluster that was joined, is gone.

    Raises:
        InterruptedByUser: while the command stops.
        MachineError: otherwise.
    """
    node: Any = ray._private.worker._global_node
    if node is not None and not node.all_processes:
        _head.check()
    if node is None or node.remaining_processes_alive():
        return
    if stop:
        raise stop.error(
            "stopped, and Ray with it; what was done before is kept", "the same command goes on from there"
        )
    raise MachineError(
        "the Ray cluster on this machine was lost",
        got=", ".join(sorted({kind for kind, _ in node.dead_processes()})) + " died",
        expected="a cluster that stays up",
        next="see whether memory ran out; the same command goes on from what was done",
    )


def run_tasks(
    function: Callable[[Any, Any], Any],
    tasks: Iterable[Task],
    *,
    threads: int,
    gpus: int = 0,
    stop: StopFlag,
    on_result: Callable[[Task, Any], None],
    retries: int = 3,
    shared: Shared | None = None,
) -> None:
    """Run Ray tasks, a bounded number in flight; hand on results as they come.

    A worker process is reused (max_calls=0), so whatever it loaded for one item it keeps for the next; on a GPU too,
    where Ray would start a new process for each. A task whose worker died is run again up to `retries` times; one that
    raised is not, since its inputs would be the same.

    Args:
        function: called as function(job, item) in a worker.
        threads: CPUs that a task occupies.
        gpus: GPUs that a task has to itself.
        stop: once it is up, no other task is started and those in flight are dropped: they have published or not.
        shared: the nodes that tasks may run on; None takes all.

    Raises:
        AkdError: as raised by a task.
        RefusedError: a task raised something else, as a user's own model may; names the item, shows it whole.
        MachineError: an item's worker died more often than `retries` (names the item), or tasks need more threads or
            GPUs than the cluster has.
    """
    check_room(_may_use(shared), Ask(1, threads, gpus), "tasks of so many threads")
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries, max_calls=0)(function)
    shipped: dict[int, Any] = {}
    waiting = iter(tasks)
    flying: dict[Any, Task] = {}
    try:
        while True:
            if shared is not None:
                shared.look()
            window = 2 * _at_once(threads, gpus)  # nodes may join
            while not stop and len(flying) < window and (task := next(waiting, None)) is not None:
                if id(task.job) not in shipped:
                    shipped[id(task.job)] = ray.put(task.job)
                here = remote if shared is None else remote.options(label_selector=shared.selector())
                flying[here.remote(shipped[id(task.job)], task.item)] = task
            if not flying or stop:
                return
            check_alive(stop)
            done, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                task = flying.pop(reference)
                on_result(task, _result(reference, task.name, retries))
    finally:
        for reference in flying:
            ray.cancel(reference, force=False)


def _may_use(shared: Shared | None) -> list[Node]:
    return nodes() if shared is None else shared.nodes()


def _at_once(cpus: float, gpus: float) -> int:
    """How many tasks the cluster runs at a time."""
    return max(1, int(total_cpus() // cpus if gpus == 0 else min(total_cpus() // cpus, total_gpus() // gpus)))


def run_one(
    function: Callable[..., Any],
    *arguments: Any,
    threads: int,
    gpus: int = 0,
    stop: StopFlag,
    on_poll: Callable[[], None],
    name: str,
    retries: int = 3,
    shared: Shared | None = None,
) -> Any:
    """Run one Ray task and wait for it, calling `on_poll` several times a second; errors as in `run_tasks`."""
    check_room(_may_use(shared), Ask(1, threads, gpus), name)
    once = 1 if gpus else 0  # a process that ends gives back the memory of its GPU
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries, max_calls=once)(function)
    here = remote if shared is None else remote.options(label_selector=shared.selector())
    reference = here.remote(*arguments)
    while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
        check_alive(stop)
        on_poll()
    return _result(reference, name, retries)


def _result(reference: Any, name: str, retries: int) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, AkdError):
            raise cause from None
        raise RefusedError(
            f"{name}: computing this raised an error",
            got=str(error),
            expected="code that runs",
            next="mend it, then run the same command again: what is done is kept",
        ) from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise MachineError(
            f"{name}: its worker died again and again",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            expected=f"a worker that survives, within {retries} retries",
            next="see whether memory ran out; the same command carries on with what is missing",
        ) from error


# ---- room


def this_machine() -> Node:
    """What a Ray that is started here would have, without starting it."""
    import torch

    utils = ray._private.utils
    available = int(utils.estimate_available_memory())  # type: ignore[no-untyped-call]
    memory = available - utils.resolve_object_store_memory(available)
    return Node("", float(utils.get_num_cpus()), float(torch.cuda.device_count()), float(memory), "this machine")


def all_nodes() -> list[Node]:
    """The nodes of the cluster: of the one that is connected, or would be started here."""
    return nodes() if ray.is_initialized() else [this_machine()]


def nodes() -> list[Node]:
    """The nodes that are alive, and what they have in all."""
    found = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [_node(node["NodeID"], node["Resources"], _address(node)) for node in found]


def free_nodes() -> list[Node]:
    """What the nodes have free now, as far as Ray has heard."""
    has = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [_node(name, free) for name, free in has.items()]


def _node(name: str, has: dict[str, float], address: str = "") -> Node:
    return Node(name, has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0), address)


def _address(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"


def total_cpus() -> float:
    """CPUs of the whole cluster."""
    return sum(node.cpus for node in nodes())


def total_gpus() -> float:
    """GPUs of the whole cluster."""
    return sum(node.gpus for node in nodes())


# ---- folders that every node sees

LOOK_SECONDS = 2.0
"""How often the cluster is asked for nodes that have joined."""
ANSWER_SECONDS = 60.0
"""How long a command waits for the answers of all nodes before it begins without some."""


class Shared:
    """The nodes that may be given work: those that see the folders of a command. Use it as a context.

    A local folder is shared if every node sees the token that is written there on entering. Nodes that join later are
    looked at before they are used; one that does not see a folder is told of, once, and left alone.

    Args:
        folders: local folders by what they are; URIs are left out, since every node reaches them alike.
        files: local files that are there already and have to be seen, by what they are.
        cache_root: each node's own folder, which it must be able to write.
        tell: told of nodes that are left alone.
    """

    def __init__(
        self,
        folders: dict[str, str],
        cache_root: str,
        tell: Callable[[str], None],
        files: dict[str, str] | None = None,
    ) -> None:
        self.folders = {what: folder for what, folder in folders.items() if "://" not in folder}
        self.files = {what: file for what, file in (files or {}).items() if "://" not in file}
        self.cache_root, self.tell = cache_root, tell
        self.tokens: dict[str, Path] = {}
        self.good: set[str] = set()
        self.asked: dict[str, Any] = {}
        self.bad: set[str] = set()
        self.looked_at = 0.0

    def __enter__(self) -> Shared:
        """Look at every node that is there. One that does not answer gets no work until it does.

        Raises:
            MachineError: a node does not see a folder.
        """
        began = time.monotonic()
        try:
            while self.look(strict=True):
                if time.monotonic() - began > ANSWER_SECONDS:
                    silent = ", ".join(node.address for node, _ in self.asked.values())
                    self.tell(f"no answer for {ANSWER_SECONDS:g} s, so no work until there is one: {silent}")
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *leaving: object) -> None:
        for token in self.tokens.values():
            token.unlink(missing_ok=True)

    def look(self, *, strict: bool = False) -> bool:
        """Look at nodes that have joined; whether some have not answered yet. Does not wait for them.

        Raises:
            MachineError: if `strict`, where a node does not see a folder.
        """
        if strict or time.monotonic() - self.looked_at > LOOK_SECONDS:
            self.looked_at = time.monotonic()
            there = {node.name: node for node in nodes()}
            self.good |= {ray.get_runtime_context().get_node_id()} & there.keys() - self.bad  # here they were written
            for name in there.keys() - self.good - self.bad - self.asked.keys():
                self.asked[name] = (there[name], self._ask(name))
            self.good &= there.keys()
        for name, (node, answer) in list(self.asked.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self.asked[name]
                self._judge(node, answer, strict)
        return bool(self.asked)

    def nodes(self) -> list[Node]:
        """The nodes that may be given work, with all that they have."""
        return [node for node in nodes() if node.name in self.good]

    def free(self) -> list[Node]:
        """The same nodes with what is free now."""
        return [node for node in free_nodes() if node.name in self.good]

    def stay_here(self) -> None:
        """Use no node but the driver's: what is made there is read there."""
        self.good &= {ray.get_runtime_context().get_node_id()}
        self.bad |= {node.name for node in nodes()} - self.good

    def selector(self) -> dict[str, str]:
        """The label selector by which Ray keeps work on these nodes."""
        return {"ray.io/node-id": f"in({','.join(sorted(self.good))})"}

    def _ask(self, name: str) -> Any:
        pinned: Any = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(name, soft=False)
        remote = ray.remote(not_seen).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
        tokens = {what: str(token) for what, token in self._tokens().items()}
        return remote.remote(self.files | tokens, self.cache_root)

    def _tokens(self) -> dict[str, Path]:
        """What other nodes must see; written for the first of them, since a driver that is alone needs none."""
        for what, folder in self.folders.items():
            if what not in self.tokens:
                self.tokens[what] = Path(folder) / f".seen-{secrets.token_hex(8)}.partial"
                replace(self.tokens[what], b"", durable=False)
        return self.tokens

    def _judge(self, node: Node, answer: Any, strict: bool) -> None:
        try:
            missing, where = ray.get(answer), node.address
        except ray.exceptions.RayTaskError as error:
            missing, where = [f"a task there failed: {str(error).strip().splitlines()[-1]}"], node.address
        except ray.exceptions.RayError:
            return  # it left again
        if not missing:
            self.good.add(node.name)
            return
        refusal = MachineError(
            f"the node {where} does not see what this command works on",
            got="; ".join(missing),
            expected="folders that every node of the cluster sees under the same path",
            next="mount a shared folder there, or pass one (--store-root, --run-root); stores may lie in s3:// too",
        )
        if strict:
            raise refusal
        self.bad.add(node.name)
        self.tell(f"{refusal.what}, and gets no work: {refusal.got}")


def not_seen(seen: dict[str, str], cache_root: str) -> list[str]:
    """What a node misses: runs there, as a Ray task."""
    missing = [f"{what}: no {path}" for what, path in seen.items() if not Path(path).exists()]
    try:
        Path(cache_root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        missing.append(f"its cache root cannot be made: {error}")
    return missing
