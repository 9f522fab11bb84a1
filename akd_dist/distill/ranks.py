"""The data-parallel workers of a cohort: what they exchange, and how they agree when one of them fails."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil
import torch
from torch import nn
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # as its documentation has it

from akd_dist.base.errors import MachineError

# How long a rank waits for the others in one exchange: rank 0 may write a large checkpoint, or evaluate, meanwhile.
EXCHANGE_TIMEOUT = timedelta(minutes=30)
# How long they may take to meet; all of them are there already.
MEETING_TIMEOUT = timedelta(minutes=2)


class AgreedError(Exception):
    """A failure that every rank of a student knows of: it can end that student alone."""


class PeerFailedError(AgreedError):
    """Another rank of this student failed, where all of them have to go on together."""


class OutOfStepError(Exception):
    """This rank failed where others wait for it, so they cannot agree: all of them have to start again."""


@dataclass(frozen=True)
class Ranks:
    """The data-parallel workers of a cohort, as this one sees them; alone by default."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    """Where what they exchange has to lie: NCCL, the backend of GPUs, takes nothing else."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank: how ranks agree before one of them leaves the step."""
        if self.world == 1:
            return flags
        shared = torch.tensor(flags, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in shared)

    def go_on(self) -> None:
        """Before ranks exchange something within a step: raises if one of them has failed and will not take part.

        Raises:
            PeerFailedError: on every rank but the one that failed; they have agreed by this.
        """
        if self.any(False)[0]:
            raise PeerFailedError("another worker of this student failed")

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """A block that this rank computes without the others; if it fails on any rank, every rank raises at its end.

        Raises:
            PeerFailedError: it failed on another rank, not here; says on which, and why.
        """
        if self.world == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        # A rank that was in `go_on` knows of the failure already: the exchange that it waited in there was answered by
        # the failed rank here. It must not begin another exchange, which nobody would answer.
        heard = isinstance(failure, AgreedError)
        if not heard and not self.any(failure is not None)[0]:
            return
        reasons: list[str | None] = [None] * self.world
        torch.distributed.all_gather_object(reasons, None if failure is None or heard else reason_of(failure))
        if failure is not None and not heard:
            failure.agreed = True  # type: ignore[attr-defined]  # read by `check_agreed`
            raise failure
        raise PeerFailedError("; ".join(f"on worker {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))

    def check_agreed(self, error: BaseException, who: str) -> None:
        """Before a student ends by an error: refuse where the other ranks do not know of it, and would train it on.

        Raises:
            OutOfStepError: this rank may be the only one that failed.
        """
        agreed = isinstance(error, AgreedError) or getattr(error, "agreed", False)
        if self.world > 1 and not agreed:
            raise OutOfStepError(f"{who}: {reason_of(error)}") from error

    def sum(self, value: float) -> float:
        """The sum of a number over the ranks."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared)
        return float(shared)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value of something small."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def from_all(self, value: str) -> list[str]:
        """Something small of every rank, in rank order."""
        if self.world == 1:
            return [value]
        gathered = [value] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def share_state(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0: batch statistics differ between ranks."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def sum_gradients(self, module: nn.Module) -> None:
        """Give every rank the sums of all gradients over the ranks; a rank that has none adds nothing."""
        if self.world == 1:
            return
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A tensor from every rank, in rank order, each on the device that this one lies on."""
        if self.world == 1:
            return [tensor]
        sent = tensor.to(self.device)
        gathered = [torch.empty_like(sent) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, sent)
        return [received.to(tensor.device) for received in gathered]


@contextlib.contextmanager
def joined(rank: int, world: int, device: str, host: str, broadcast: Callable[[Any], Any]) -> Iterator[Ranks]:
    """The ranks of a cohort's workers, for the time of the block; one that is alone needs no process group.

    Args:
        rank: of this worker.
        world: how many there are.
        device: where they compute: `cpu` lets them talk by gloo, `cuda` by NCCL.
        host: this node's own address. Rank 0 listens there and nowhere else; if it is a loopback address, whatever
            the workers say to each other stays on loopback.
        broadcast: hands rank 0's value of something small to every rank, and returns it; whatever the others pass.

    Raises:
        MachineError: they cannot reach each other.
    """
    if world == 1:
        yield Ranks(rank, world, device)
        return
    if ip_address(host).is_loopback:
        (interface,) = (name for name, has in psutil.net_if_addrs().items() if host in [one.address for one in has])
        # With a "=" NCCL takes the whole name; without it, every interface whose name begins so.
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    store = _meeting_point(rank, world, host, broadcast)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=EXCHANGE_TIMEOUT)
    yield Ranks(rank, world, device)
    # Not after an error: the others would fail by a connection that was lost, before anybody hears of the reason.
    torch.distributed.destroy_process_group()


def _meeting_point(rank: int, world: int, host: str, broadcast: Callable[[Any], Any]) -> TCPStore:
    """The store by which ranks find each other. Left to itself, torch listens on all of a node's interfaces."""
    listening, place = None, None
    if rank == 0:
        # The socket is opened here, on one address and a port that the system picks, and handed to torch as it is.
        listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        place = host, listening.getsockname()[1]
    host, port = broadcast(place)
    fd = None if listening is None else listening.detach()  # torch closes it
    try:
        store = TCPStore(host, port, world, is_master=rank == 0, timeout=MEETING_TIMEOUT, master_listen_fd=fd)
    except DistError as error:
        raise MachineError(
            "the workers of a student cannot reach each other",
            got=str(error).strip().partition("\n")[0],
            expected=f"a connection to {host}, port {port}, from every node that they lie on",
            next="see whether a firewall is between them, and whether Ray knows each node by an address that all reach",
        ) from error
    store.set_timeout(EXCHANGE_TIMEOUT)
    return store


def reason_of(error: BaseException) -> str:
    """An error as the reason for which a student failed, as results and logs have it."""
    short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    said = type(error).__name__ + (f": {error}" if str(error) else "")
    return f"out of memory: {said}" if short else said
