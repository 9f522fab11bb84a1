"""The Ray cluster: connect to one or start one on loopback, see what it has, leave it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from akd_dist.base.errors import MachineError
from akd_dist.jobs import ray_internals
from akd_dist.jobs.packing import Node
from akd_dist.jobs.ray_internals import ray as ray  # others take it from here
from akd_dist.jobs.stopping import GRACE_SECONDS, POLL_SECONDS, StopFlag

# Variables of akd-dist that the workers on other nodes need as well.
_PASSED_ON = ("AKD_DIST_CACHE_BUDGET",)
# Ray ends this process with a code and a message of its own once the head of a cluster has been silent for 60 s. Before
# that, the command ends with ours.
HEAD_SECONDS = 20.0
# How long Ray may take to start or to be joined. On a machine with many times the load it can bear, half a minute was
# seen.
START_SECONDS = 120.0
_begun: list[_Start] = []  # a start that nobody has waited for yet
_given_up: list[_Start] = []  # those whose processes died before Ray's own code noticed
_closers: list[str] = []  # holds one entry while a `closing` block is open: blocks inside it leave the cluster up


def connect(
    address: str | None = None,
    num_cpus: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
    travels: str | None = None,
) -> None:
    """Connect to the cluster at `address`, or start one on this machine that listens on loopback only; idempotent.

    Args:
        address: `host:port` of a running cluster, or `auto` for the one that this node belongs to. If this user has a
            Ray token, it is shown to the cluster.
        num_cpus: CPUs of a cluster started here; None takes those of the machine.
        tell: told when this takes a moment.
        travels: the recipe's folder, where it travels to the nodes: workers look for modules in what came with it.

    Raises:
        MachineError: no cluster answers there, or none can be started.
    """
    if _begun:
        tell("starting Ray on this machine")
        failure = _begun.pop().wait()
    elif ray.is_initialized():
        return
    elif address is None:
        tell("starting Ray on this machine")
        failure = _start_here(num_cpus, travels).wait()
    else:
        tell(f"connecting to Ray at {address}")
        check_address(address)
        passed_on = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        environment = {"env_vars": ray_internals.ENVIRONMENT | passed_on}
        failure = _Start({"address": address, "runtime_env": environment}, travels).wait()
    if failure is not None:
        reason = failure.__cause__ or failure  # Ray's own wrapper says only that it failed
        lines = [line for line in str(reason).strip().splitlines() if line]
        raise MachineError(
            "no Ray cluster" + (f" at {address}" if address else " could be started on this machine"),
            got=": ".join([type(reason).__name__, *lines[:1]]),
            expected="a running Ray of the same version" if address else "room for a few Ray processes",
            next="check --address; a cluster with tokens wants RAY_AUTH_MODE=token and its token in ~/.ray/auth_token"
            if address
            else "see whether memory or disk ran out, and Ray's logs in "
            f"{ray_internals.logs_folder()} (RAY_TMPDIR moves them); or pass --address of a cluster that runs",
        ) from failure


def begin() -> None:
    """Begin to start a Ray on this machine, for a `connect` without an address that is sure to come: within `closing`.

    Ray starts processes of its own, and takes seconds for it, in which this one can do something else.
    """
    if not ray.is_initialized() and not _begun:
        _begun.append(_start_here(None, None))


def is_still_starting() -> bool:
    """Whether a start was given up, as its processes had died, while Ray's own code still waits for it on its thread:
    the interpreter may then crash as it ends.
    """
    return any(not one.tried.is_set() for one in _given_up)


def _start_here(num_cpus: int | None, travels: str | None) -> _Start:
    ray_internals.listen_on_loopback()
    ray_internals.leave_job()
    _ensure_token()
    return _Start({"address": "local", "include_dashboard": False, "num_cpus": num_cpus}, travels)


def _ensure_token() -> None:
    """Where Ray could not keep the token of a cluster that it starts in the user's home, have one that is kept nowhere.

    Ray goes by HOME alone. Without it, or where it cannot be written, Ray would not start.
    """
    if ray_internals.has_token() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if home := os.environ.get("HOME"):
        with contextlib.suppress(OSError):
            folder = Path(home, ".ray")
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class _Start:
    """`ray.init` on a thread of its own, where it leaves our signal handlers alone.

    The thread lives on as long as the process: Ray's processes are told to die with the thread that started them.

    Those processes inherit its blocked SIGTERM. Service managers send that to everybody, and a driver
    whose raylet leaves is ended by Ray, without a word and with exit code 1, before or after it has seen the signal.
    As it is, the driver alone decides: workers checkpoint, and then Ray is shut down.
    """

    def __init__(self, options: dict[str, Any], travels: str | None) -> None:
        job = ray_internals.job_with_path(ray_internals.DriversPath(travels))
        logs = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        self.options = {**options, **logs, "job_config": job}
        self.failures: list[BaseException] = []
        self.tried = threading.Event()
        ray_internals.quiet(connected=False)
        self.before = {child.pid for child in psutil.Process().children()}
        self.began = time.monotonic()
        threading.Thread(target=self._start, name="ray-parent", daemon=True).start()

    def _start(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(**self.options)
        except BaseException as error:  # Ray raises plain exceptions, too; and here nobody else would hear of any
            self.failures.append(error)
        self.tried.set()
        if not self.failures:
            threading.Event().wait()

    def wait(self) -> BaseException | None:
        """Wait until it is up.

        Returns:
            Why it failed, whatever that was; then nothing of Ray is left. None where Ray is up.
        """
        up = False
        try:
            failure = self._wait() or (self.failures[0] if self.failures else None)
            up = failure is None
        finally:
            if not up:
                _end_what_was_started(self.before)
                if not self.tried.is_set():
                    _given_up.append(self)
        _take_signals_back()
        ray_internals.quiet(connected=True)
        return failure

    def _wait(self) -> BaseException | None:
        """Wait for `ray.init` to come back; a reason not to wait any longer, if there is one before.

        In slices, so that signals are handled meanwhile.
        """
        while not self.tried.wait(POLL_SECONDS):
            if dead := [
                child.name() for child in _started_since(self.before) if child.status() == psutil.STATUS_ZOMBIE
            ]:
                return RuntimeError(
                    f"its {dead[0]} ended as soon as it was started"
                )  # Ray would wait for half a minute
            if time.monotonic() - self.began > START_SECONDS:
                return TimeoutError(f"it did not answer within {START_SECONDS:g} s")
        return None


def _started_since(before: set[int]) -> list[psutil.Process]:
    """The children of this process that Ray has started and that were not there before."""
    ours = ("raylet", "gcs_server")
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # Its helpers are Python programs of its own folder; of one that is dead, only the name is left.
            if child.pid not in before and (child.name() in ours or ray.__path__[0] in " ".join(child.cmdline())):
                found.append(child)
    return found


def _end_what_was_started(before: set[int]) -> None:
    """End the processes of a Ray that failed to start, and have none be taken for one that is up."""
    atexit.unregister(ray.shutdown)  # it waits for a `ray.init` that has not come back, and this process would with it
    for child in _started_since(before):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*child.children(recursive=True), child]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            child.wait(timeout=GRACE_SECONDS)
    ray_internals.forget_node()


def _take_signals_back() -> None:
    """Make Python's handlers the first that a signal meets again.

    Below Python, Ray has put a handler of its own before them, which prints a stack and sets an alarm: whoever has not
    left three seconds after a SIGTERM is aborted, in the middle of a checkpoint if it must be.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (ours := signal.getsignal(number)) is not None:
                signal.signal(number, ours)


def check_address(address: str) -> None:
    """Refuse a cluster that does not answer, or does not let this user in, within seconds; without joining it.

    Raises:
        MachineError: as `connect`.
    """
    _check_answers(address)
    _check_token(address)


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, in seconds; Ray itself would try for a minute."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not (host and port.isdecimal()):
            raise ValueError("an address without a port")
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise MachineError(
            f"no Ray cluster at {address}",
            got=str(error),
            expected="host:port of a running cluster's head",
            next="check --address, or leave it out to start Ray on this machine",
        ) from None


def _check_token(address: str) -> None:
    """Refuse a cluster that does not take this user's token, or this user for having none. It is shown where a cluster
    asks for one.
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" and not ray_internals.has_token():
        raise MachineError(  # Ray would end the process, without a word
            "there is no token to show to a Ray cluster",
            got="RAY_AUTH_MODE=token, and neither RAY_AUTH_TOKEN nor ~/.ray/auth_token",
            expected="the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN",
            next="copy it from the head node (`ray get-auth-token` prints it there), then run the same command",
        )
    if address.startswith("ray://") or not ray_internals.refuses_token(address):
        return
    if "RAY_AUTH_MODE" not in os.environ and ray_internals.has_token():
        ray_internals.show_token()
        if not ray_internals.refuses_token(address):
            return
    raise MachineError(
        f"the Ray cluster at {address} does not let this user in",
        got="a token that is not the cluster's" if os.environ.get("RAY_AUTH_MODE") == "token" else "no token",
        expected="the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN",
        next="copy it from the head node (`ray get-auth-token` prints it there), then run the same command",
    )


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
            # Nobody came to need it. It has to come up first: Ray ends a process whose raylet dies while it joins it.
            if _begun:
                _begun.pop().wait()
            if ray.is_initialized():
                shut_down()


def shut_down() -> None:
    """Leave the cluster, and end every process of one that was started here.

    Not left to `ray.shutdown`, which asks each with a SIGTERM and waits a second: they have it blocked. A raylet that
    is killed leaves its agents behind for a minute.
    """
    node = ray_internals.started_node()
    ray_internals.forget_node()
    raylets = [one.process for one in node.all_processes.get("raylet", [])] if node is not None else []
    below = []
    for raylet in raylets:
        if raylet.poll() is None:  # the number of one that has ended may be another process's by now
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
        # Each look opens a connection, so the head is asked a few times within the limit and not at every poll.
        if now - self.looked_at < HEAD_SECONDS / 4:
            return
        if now - self.looked_at > HEAD_SECONDS:  # nobody has asked for a while, so nothing is known of its silence
            self.answered_at = now
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
    node = ray_internals.started_node()
    # A driver that joined a cluster has started no process of it, so it is the head that is watched.
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


# ---- room


def this_machine() -> Node:
    """What a Ray that is started here would have, without starting it."""
    import torch

    cpus, memory = ray_internals.machine_resources()
    return Node("", cpus, float(torch.cuda.device_count()), memory, "this machine")


def all_nodes() -> list[Node]:
    """The nodes of the cluster: of the one that is connected, or would be started here."""
    return nodes() if ray.is_initialized() else [this_machine()]


def nodes() -> list[Node]:
    """The nodes that are alive, and what they have in all."""
    found = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [_node(node["NodeID"], node["Resources"], _address(node)) for node in found]


def free_nodes() -> list[Node]:
    """What the nodes have free now, as far as Ray has heard."""
    return [_node(name, free) for name, free in ray_internals.free_resources().items()]


def _node(name: str, has: dict[str, float], address: str = "") -> Node:
    return Node(name, has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0), address)


def _address(node: dict[str, Any]) -> str:
    return place_of(node["NodeManagerHostname"], node["NodeManagerAddress"], node["NodeID"])


def place_of(host: str, address: str, name: str) -> str:
    """Where a node is, for people."""
    return f"{host} ({address}, node {name[:8]})"


def started_here() -> bool:
    """Whether the cluster is one that this process has started, on this machine alone; no node ever joins it."""
    node = ray_internals.started_node()
    return node is not None and bool(node.all_processes)
