"""Batches made ahead: while students take a step, a thread makes the next batches.

It gathers their rows, replays their view and gathers their logits; for a GPU it copies all of that there from pinned
memory, and augments it there, on a CUDA stream of its own. The batches, and their order, are those of the stream. What
a batch raises, or the reading of it, is raised where the batch would have come.

On a CPU no thread is started: it takes as much CPU time as it saves (docs/explanation/performance.md). The part for a
GPU has not been run on one yet; `make test-gpu` and `benchmarks/gpu.py` do that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator

import torch

from akd_dist.base.threads import made_ahead
from akd_dist.distill.orders import Mix
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stream import Batch, BatchStream
from akd_dist.recipe import CustomAugmentation

AHEAD = {"cpu": 0, "cuda": 2}
"""How many batches are made before they are wanted, by the kind of device; 0 makes each when it is its turn."""


@contextlib.contextmanager
def prefetched(
    stream: BatchStream, epoch: int, start_step: int, ranks: Ranks, then: tuple[int, Mix] | None = None
) -> Iterator[Iterator[Batch]]:
    """The batches of `BatchStream.batches`, made ahead where that is of use. As a context, it ends the thread.

    Whoever leaves waits for the batch that is just being made; with rows or logits that are fetched from elsewhere
    this may be a fetch, which whoever asks for the next batch would have waited for as well.

    Args:
        stream: read by that thread alone as long as the context lasts.
        epoch, start_step, then: as of `BatchStream.batches`.
        ranks: the workers that share its batches; this one's part is made.
    """
    batches, count = stream.batches(epoch, start_step, ranks.rank, ranks.world, then), batches_ahead(stream)
    device = torch.device(stream.device)
    if count == 0:
        with contextlib.closing(batches):
            yield batches
    elif device.type == "cuda":
        side = _side_stream(torch.cuda.current_device() if device.index is None else device.index)
        side.wait_stream(torch.cuda.current_stream(device))  # whatever was prepared for views until now is there
        with contextlib.closing(made_ahead(_made_on(side, batches), "batches", count)) as ahead:
            yield (_handed_over(batch, ready) for batch, ready in ahead)
    else:
        with contextlib.closing(made_ahead(batches, "batches", count)) as ahead:
            yield ahead


def batches_ahead(stream: BatchStream) -> int:
    """How many batches of a stream are made ahead.

    An augmentation of the user's own is not called by another thread: it may draw from torch's generator after seeding
    it, which a student's dropout draws from at the same time.
    """
    if isinstance(stream.augmentation, CustomAugmentation):
        return 0
    return AHEAD[torch.device(stream.device).type]


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """The CUDA stream of a GPU on which batches are made.

    One for the whole process: memory that was once used on a stream is only used again on the same one.
    """
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _made_on(
    side: torch.cuda.Stream, batches: Generator[Batch, None, None]
) -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
    """Batches, each with an event that comes to pass once the GPU has made it."""
    with contextlib.closing(batches):
        while True:
            # Entered for each batch: the current stream belongs to a thread, and another one may close this generator.
            with torch.cuda.stream(side):
                batch = next(batches, None)
                ready = side.record_event()
            if batch is None:
                return
            yield batch, ready


def _handed_over(batch: Batch, ready: torch.cuda.Event) -> Batch:
    """A batch that was made on another CUDA stream, for the current one.

    What the current stream is given from now on begins once the batch is made. And its memory is not given to a later
    batch before the current stream has done what it was given until the batch was let go.
    """
    current = torch.cuda.current_stream(batch.inputs.device)
    current.wait_event(ready)
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    for value in [*values, None if batch.targets is None else batch.targets.items]:
        if isinstance(value, torch.Tensor):
            value.record_stream(current)
    return batch
