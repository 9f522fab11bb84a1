"""The nodes that see what a command works on: others get no work.

A node is looked at twice. When it has joined, by a task of its own: until it has answered it is left out, and if it
misses something, for good. And by every task and worker, before it works: Ray may have sent it to a node that joined
a moment ago, since work names the nodes that it must not run on, not those that it may. Only so does an autoscaler see
that a further node would be of use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from akd_dist.base.errors import AkdError, MachineError, RefusedError
from akd_dist.base.files import replace
from akd_dist.base.locks import try_lock
from akd_dist.jobs import cluster
from akd_dist.jobs.cluster import ray
from akd_dist.jobs.demand import Demand, never_held, waiting_is_possible, waits_for
from akd_dist.jobs.packing import Node, ResourceRequest, check_room, fits
from akd_dist.jobs.stopping import POLL_SECONDS, StopFlag
from akd_dist.jobs.working_dir import Packed, WorkingDir, moved, there
from akd_dist.storage.objects import ObjectMissing
from akd_dist.storage.roots import open_root

LOOK_SECONDS = 2.0
"""How often the cluster is asked for nodes that have joined."""
ANSWER_SECONDS = 60.0
"""How long a node is given to say what it sees, before a command begins without it."""
GONE_SECONDS = 60.0
"""How long Ray may look for room for work whose node died, before the nodes count as gone; it would look for ever."""
_SAME_VERSIONS = ("akd-dist", "numcodecs", "numpy", "pillow", "pyarrow", "torch", "zarr")
"""What has to be of one version on all nodes: another may change pixels, last bits of logits, or bytes of a shard."""
Given = TypeVar("Given")
NODE_LABEL = "ray.io/node-id"
"""By which Ray's label selectors name nodes."""


@dataclass(frozen=True)
class Needed:
    """What work needs to see on its node: small, and travels with it."""

    places: dict[str, str]
    """Paths that have to be there, by what they are."""
    cache_root: str
    """The node's own folder, which it must be able to write."""
    folder: Packed | None = None
    """The recipe's folder, for nodes that do not have it."""
    roots: tuple[str, ...] = ()
    """URIs in object storage that it has to reach, with credentials of its own."""
    versions: tuple[tuple[str, str], ...] = ()
    """The driver's versions of what has to be alike on all nodes."""

    def missing(self) -> list[str]:
        """What this node misses."""
        here = dict(versions())
        found = [
            f"{name} {wanted} (it has {here.get(name, 'none')})"
            for name, wanted in self.versions
            if here.get(name) != wanted
        ]
        found += [f"{what}: no {path}" for what, path in self.places.items() if not there(path)]
        for root in self.roots:
            try:
                _reach(root)
            except AkdError as error:
                found.append(f"{root}: {error.line}; {error.next}")
                break  # who is not let in to one place mostly is not to the others, and for the same reason
        try:
            Path(self.cache_root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found.append(f"its cache root cannot be made: {error}")
        return found

    def here(self, given: Given) -> Given:
        """What work is given, with the paths of the recipe's folder as they are on this node."""
        place = None if self.folder is None else self.folder.unpacked(self.cache_root)
        return given if self.folder is None or place is None else moved(given, self.folder, place)


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """The versions of this process's libraries, as far as they have to be alike. Builds may differ: a head without a
    GPU has another build of torch than its nodes.
    """
    found = list[tuple[str, str]]()
    for name in _SAME_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((name, importlib.metadata.version(name).partition("+")[0]))
    return tuple(found)


@functools.cache
def _reach(root: str) -> None:
    """Ask object storage for something that is not there, once in a process: whoever may not ask is refused.

    Raises:
        MachineError: the storage does not answer, or refuses this node.
    """
    with contextlib.suppress(ObjectMissing):
        # Read and not looked for: the answer to a HEAD has no body, which would tell why.
        open_root(root).get(".is-this-node-let-in")


@dataclass(frozen=True)
class Unseen:
    """The answer of work that did not begin, because its node misses something."""

    node: str
    """The node's id in the cluster."""
    where: str
    """Where it is, for people."""
    missing: tuple[str, ...]
    """What it misses."""


class UnseenError(Exception):
    """An `Unseen` where work cannot answer: one of several workers, whom Ray has to end as well."""

    def __init__(self, unseen: Unseen) -> None:
        super().__init__(unseen)
        self.unseen = unseen


class Shared:
    """The nodes that may be given work: those that see the folders of a command. Use it as a context.

    A local folder is shared if every node sees the token that is written there on entering. One that does not is told
    of, once, and left alone.

    Args:
        folders: folders and URIs by what they are.
        files: local files that are there already and have to be seen, by what they are.
        cache_root: each node's own folder, which it must be able to write.
        tell: told of nodes that are left alone, and of what is waited for.
        demand: asks for nodes that are not there, and says whether to wait for them; None waits for nothing.
        folder: the recipe's folder, as far as it travels, and the files that have to be there because they do not.
    """

    def __init__(
        self,
        folders: dict[str, str],
        cache_root: str,
        tell: Callable[[str], None],
        files: dict[str, str] | None = None,
        demand: Demand | None = None,
        folder: WorkingDir | None = None,
    ) -> None:
        self.folders = {what: folder for what, folder in folders.items() if "://" not in folder}
        remote = [*folders.values(), *(file.rpartition("/")[0] for file in (files or {}).values())]
        self.roots = tuple(sorted({uri for uri in remote if "://" in uri}))
        self.files = {what: file for what, file in (files or {}).items() if "://" not in file}
        self.folder = folder or WorkingDir()
        self.cache_root, self.tell, self.demand = cache_root, tell, demand or Demand(never=True)
        self.tokens: dict[str, Path] = {}
        self.locks: list[int] = []
        self.good: set[str] = set()
        self.where: dict[str, str] = {}  # each node that was seen, for people
        self.asked: dict[str, tuple[Node, Any, float]] = {}  # the node, its answer, since when
        self.silent: set[str] = set()
        self.bad: dict[str, str] = {}  # what each of them misses, in a line
        self.looked_at = 0.0

    def __enter__(self) -> Shared:
        """Look at every node that is there. One that does not answer gets no work until it does."""
        try:
            self.needed()  # whoever asks for it later may be on any thread
            if self.folder.note is not None and not cluster.started_here():
                self.tell(self.folder.note)
                self.folder.note = None
            while self.look(now=True):
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *leaving: object) -> None:
        self.demand.__exit__(*leaving)
        for token in self.tokens.values():
            token.unlink(missing_ok=True)
        while self.locks:
            os.close(self.locks.pop())

    def look(self, *, now: bool = False) -> bool:
        """Look at nodes that have joined; whether an answer is still waited for. Does not wait for it.

        Args:
            now: whether the cluster is asked for nodes, however short ago it was.
        """
        time_now = time.monotonic()
        if now or time_now - self.looked_at > LOOK_SECONDS:
            self.looked_at = time_now
            there = {node.name: node for node in cluster.nodes()}
            self.good |= {
                ray.get_runtime_context().get_node_id()
            } & there.keys() - self.bad.keys()  # the tokens were written on this node
            for name in there.keys() - self.good - self.bad.keys() - self.asked.keys():
                self.asked[name] = (there[name], self._ask(name), time_now)
            self.where |= {name: node.address for name, node in there.items()}
            # A node that comes back has another id, so one that is gone can be forgotten.
            for name in self.good - there.keys():
                self.good.discard(name)
                self.tell(
                    f"the node {self.where[name]} is gone; what it worked on goes on elsewhere, from what was kept"
                )
        for name, (node, answer, asked_at) in list(self.asked.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self.asked[name]
                self._judge(node, answer)
            elif time_now - asked_at > ANSWER_SECONDS and name not in self.silent:
                self.silent.add(name)
                self.tell(f"no answer for {ANSWER_SECONDS:g} s, so no work until there is one: {node.address}")
        return bool(self.asked.keys() - self.silent)

    def nodes(self) -> list[Node]:
        """The nodes that may be given work, with all that they have."""
        return [node for node in cluster.nodes() if node.name in self.good]

    def free(self) -> list[Node]:
        """The same nodes with what is free now."""
        return [node for node in cluster.free_nodes() if node.name in self.good]

    def selector(self) -> dict[str, str]:
        """The label selector by which Ray keeps work off nodes that miss something, or have not answered yet."""
        left_out = sorted({*self.bad, *self.asked})
        return {NODE_LABEL: f"!in({','.join(left_out)})"} if left_out else {}

    def needed(self) -> Needed:
        """What work has to look for on its node, as `look_first` does."""
        if cluster.started_here():
            return Needed(self.files, self.cache_root)
        places = self.files | self.folder.places | self._tokens()
        return Needed(places, self.cache_root, self.folder.packed(), self.roots, versions())

    def leave_out(self, unseen: Unseen) -> None:
        """Give a node no work any more: it is told of, once."""
        if unseen.node not in self.bad:
            self.bad[unseen.node] = f"{unseen.where} misses {'; '.join(unseen.missing)}"
            self.tell(f"the node {unseen.where} gets no work, as it lacks {'; '.join(unseen.missing)}")
        self.good.discard(unseen.node)

    def check_room(self, ask: ResourceRequest, what: str) -> None:
        """As `packing.check_room`, on the nodes that may be given work.

        Raises:
            MachineError: also where there is a node that has the room, but not what this command works on.
        """
        if self.bad and not fits(self.nodes(), ask) and fits(cluster.nodes(), ask):
            raise MachineError(
                f"no node that has room for {what} sees what this command works on",
                got="; and ".join(self.bad.values()),
                expected="folders and files that nodes of the cluster see under the same path",
                next="mount a shared folder there, or pass one, or s3:// (--store-root, --run-root)",
            )
        check_room(self.nodes(), ask, what)

    def wait_for_room(self, ask: ResourceRequest, what: str, stop: StopFlag) -> None:
        """As `check_room`, but where nodes may come that are not there: ask for them and wait, saying so once.

        Raises:
            AkdError: as `check_room`, where no further nodes are waited for.
            MachineError: also where the autoscaler says that no node which it may bring has the room.
            InterruptedByUser: `stop` is up.
        """
        told = False
        while True:
            try:
                self.check_room(ask, what)
                return
            except AkdError as refusal:
                if not self.demand.waits or (self.demand.bare and isinstance(refusal, RefusedError)):
                    raise waiting_is_possible(refusal) from None
            if not told:
                self.tell(waits_for(what, ask))
            told = True
            self.ask_for([ask])
            if self.demand.refused:
                raise never_held(ask, what)
            stop.check()
            cluster.check_alive(stop)
            time.sleep(POLL_SECONDS)
            self.look()

    def ask_for(self, asks: Sequence[ResourceRequest]) -> None:
        """Ask the autoscaler, where there is one, for nodes that hold all of these; not ones that are left out."""
        self.demand.ask(asks, {NODE_LABEL: f"!in({','.join(sorted(self.bad))})"} if self.bad else {})

    def _ask(self, name: str) -> Any:
        # Not `soft`: where the node is gone, a task that Ray ran elsewhere would tell what another node sees.
        pinned: Any = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(name, soft=False)
        # Without a CPU, so that a node answers although others keep all of its CPUs busy.
        remote = ray.remote(missed_here).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
        return remote.remote(self.needed())

    def _tokens(self) -> dict[str, str]:
        """What other nodes must see; a driver that is alone needs none."""
        for what, folder in self.folders.items():
            # Named as a file in the making, which `stores gc` removes from a store root if this process dies.
            token = self.tokens.setdefault(what, Path(folder) / f".seen-{secrets.token_hex(8)}.partial")
            # Again for each node that joins: somebody on another machine may have taken us for dead.
            if not token.exists():
                replace(token, b"", durable=False)
                with contextlib.suppress(OSError):  # a file system without locks
                    self.locks.append(os.open(token, os.O_RDONLY | os.O_CLOEXEC))
                    try_lock(self.locks[-1])  # by which `stores gc` sees that we live
        return {what: str(token) for what, token in self.tokens.items()}

    def _judge(self, node: Node, answer: Any) -> None:
        try:
            unseen = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            told = f"anything: a task there failed: {str(error).strip().splitlines()[-1]}"
            unseen = Unseen(node.name, node.address, (told,))
        except ray.exceptions.RayError:
            return  # the node left again before it answered
        if unseen is None:
            self.good.add(node.name)
        else:
            self.leave_out(unseen)


def missed_here(needed: Needed) -> Unseen | None:
    """What the node of this task or worker misses; None where there is all."""
    if not (missing := needed.missing()):
        return None
    name = ray.get_runtime_context().get_node_id()
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return Unseen(name, cluster.place_of(socket.gethostname(), address, name), tuple(missing))


def look_first(needed: Needed, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on a node that sees what it needs: what a Ray task runs. Elsewhere its answer is an `Unseen`."""
    unseen = missed_here(needed)
    return function(*needed.here(arguments)) if unseen is None else unseen


def nodes_lost(doing: str, got: str, expected: str | None) -> MachineError:
    """The error that ends a command whose work found no node any more.

    Args:
        doing: what it did meanwhile.
    """
    return MachineError(
        f"nodes were lost while {doing}",
        got=got,
        expected=expected,
        next="the same command goes on from what was kept, once they are back or others have joined",
    )
