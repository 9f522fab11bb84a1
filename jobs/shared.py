"""The nodes that see what a command works on: others get no work."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from akd_dist.base.errors import MachineError
from akd_dist.base.files import replace
from akd_dist.base.locks import try_lock
from akd_dist.jobs import cluster
from akd_dist.jobs.cluster import ray
from akd_dist.jobs.packing import Node

LOOK_SECONDS = 2.0
"""How often the cluster is asked for nodes that have joined."""
ANSWER_SECONDS = 60.0
"""How long a node is given to say what it sees, before a command begins without it."""


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
        self.locks: list[int] = []
        self.good: set[str] = set()
        self.asked: dict[str, tuple[Node, Any, float]] = {}  # the node, its answer, since when
        self.silent: set[str] = set()
        self.bad: set[str] = set()
        self.looked_at = 0.0

    def __enter__(self) -> Shared:
        """Look at every node that is there. One that does not answer gets no work until it does.

        Raises:
            MachineError: a node does not see a folder.
        """
        try:
            while self.look(strict=True):
                time.sleep(cluster.POLL_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *leaving: object) -> None:
        for token in self.tokens.values():
            token.unlink(missing_ok=True)
        while self.locks:
            os.close(self.locks.pop())

    def look(self, *, strict: bool = False) -> bool:
        """Look at nodes that have joined; whether an answer is still waited for. Does not wait for it.

        Raises:
            MachineError: if `strict`, where a node does not see a folder.
        """
        now = time.monotonic()
        if strict or now - self.looked_at > LOOK_SECONDS:
            self.looked_at = now
            there = {node.name: node for node in cluster.nodes()}
            self.good |= {
                ray.get_runtime_context().get_node_id()
            } & there.keys() - self.bad  # the tokens were written on this node
            for name in there.keys() - self.good - self.bad - self.asked.keys():
                self.asked[name] = (there[name], self._ask(name), now)
            # A node that comes back has another id, so one that is gone can be forgotten.
            self.good &= there.keys()
        for name, (node, answer, asked_at) in list(self.asked.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self.asked[name]
                self._judge(node, answer, strict)
            elif now - asked_at > ANSWER_SECONDS and name not in self.silent:
                self.silent.add(name)
                self.tell(f"no answer for {ANSWER_SECONDS:g} s, so no work until there is one: {node.address}")
        return bool(self.asked.keys() - self.silent)

    def nodes(self) -> list[Node]:
        """The nodes that may be given work, with all that they have."""
        return [node for node in cluster.nodes() if node.name in self.good]

    def free(self) -> list[Node]:
        """The same nodes with what is free now."""
        return [node for node in cluster.free_nodes() if node.name in self.good]

    def stay_here(self) -> None:
        """Use no node but the driver's: what is made there is read there."""
        self.good &= {ray.get_runtime_context().get_node_id()}
        self.bad |= {node.name for node in cluster.nodes()} - self.good

    def selector(self) -> dict[str, str]:
        """The label selector by which Ray keeps work on these nodes."""
        return {"ray.io/node-id": f"in({','.join(sorted(self.good))})"}

    def _ask(self, name: str) -> Any:
        # Not `soft`: where the node is gone, a task that Ray ran elsewhere would tell what another node sees.
        pinned: Any = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(name, soft=False)
        # Without a CPU, so that a node answers although others keep all of its CPUs busy.
        remote = ray.remote(not_seen).options(num_cpus=0, max_retries=1, scheduling_strategy=pinned)
        tokens = {what: str(token) for what, token in self._tokens().items()}
        return remote.remote(self.files | tokens, self.cache_root)

    def _tokens(self) -> dict[str, Path]:
        """What other nodes must see; written for the first of them, since a driver that is alone needs none."""
        for what, folder in self.folders.items():
            # Named as a file in the making, which `stores gc` removes from a store root if this process dies.
            token = self.tokens.setdefault(what, Path(folder) / f".seen-{secrets.token_hex(8)}.partial")
            # Again for each node that joins: somebody on another machine may have taken us for dead.
            if not token.exists():
                replace(token, b"", durable=False)
                with contextlib.suppress(OSError):  # a file system without locks
                    self.locks.append(os.open(token, os.O_RDONLY | os.O_CLOEXEC))
                    try_lock(self.locks[-1])  # by which `stores gc` sees that we live
        return self.tokens

    def _judge(self, node: Node, answer: Any, strict: bool) -> None:
        try:
            missing, where = ray.get(answer), node.address
        except ray.exceptions.RayTaskError as error:
            missing, where = [f"a task there failed: {str(error).strip().splitlines()[-1]}"], node.address
        except ray.exceptions.RayError:
            return  # the node left again before it answered
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
