"""Batches made ahead: those of the stream, in its order, by a thread that nobody leaves behind.

That students come to the same weights, stop, go on, and find what has rotted is tested in `test_windows` and in
`tests/data/test_verification.py`, with and without.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from akd_dist.distill import prefetch
from akd_dist.distill.prefetch import batches_ahead, prefetched
from akd_dist.distill.ranks import Ranks
from akd_dist.distill.stream import Batch, BatchStream, Gathered
from akd_dist.recipe import CustomAugmentation, PadCropFlip
from tests.distill.test_stream import a_stream, same
from tests.fleets import DEVICE

AHEAD = 2
CROP = PadCropFlip(pixels=1)


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as well."""
    monkeypatch.setattr(prefetch, "AHEAD", {"cpu": AHEAD, "cuda": AHEAD})


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No test leaves a thread that makes batches."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")] == []


def taken(stream: BatchStream, epoch: int = 1, start: int = 0, ranks: Ranks | None = None) -> list[Batch]:
    with prefetched(stream, epoch, start, ranks or Ranks()) as batches:
        return list(batches)


@pytest.mark.parametrize("start", [0, 3, 7])
@pytest.mark.parametrize("changes", [{}, {"window": 8}, {"last_batch": "merge"}, {"augmentation": CROP}])
def test_they_are_the_batches_of_the_stream(changes: dict[str, Any], start: int) -> None:
    stream = a_stream(device=DEVICE, **changes)
    for ranks in (Ranks(), Ranks(1, 3)):
        expected = list(stream.batches(1, start, ranks.rank, ranks.world))
        made = taken(stream, 1, start, ranks)
        assert len(made) == len(expected)
        assert all(same(one, other) for one, other in zip(made, expected, strict=True))


def watched(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None] = lambda number: None) -> list[str]:
    """The threads that gather, each time before they do."""
    threads, gather = list[str](), BatchStream.gather

    def noted(self: BatchStream, *given: Any) -> Gathered:
        act(len(threads))
        threads.append(threading.current_thread().name.partition("_")[0])
        return gather(self, *given)

    monkeypatch.setattr(BatchStream, "gather", noted)
    monkeypatch.setattr("akd_dist.distill.stream.STEPS_AT_ONCE", 1)
    return threads


def test_a_few_are_made_ahead_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = watched(monkeypatch)
    with prefetched(a_stream(device=DEVICE), 0, 0, Ranks()) as batches:
        for number, _ in enumerate(batches, 1):
            until = time.monotonic() + 10
            while len(threads) < min(number + AHEAD, 7) and time.monotonic() < until:
                time.sleep(0.001)
            assert len(threads) == min(number + AHEAD, 7)
    assert set(threads) == {"batches"}


def test_what_making_one_raises_comes_when_it_is_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        if number == 4:
            raise ValueError("the fifth")

    watched(monkeypatch, fail)
    with prefetched(a_stream(device=DEVICE), 0, 0, Ranks()) as batches:
        assert [next(batches).step for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="the fifth"):
            next(batches)


def test_whoever_leaves_early_leaves_no_thread() -> None:
    """Which the fixture looks for: of a loop that is stopped, and of one that fails."""
    with prefetched(a_stream(device=DEVICE), 0, 0, Ranks()) as batches:
        next(batches)
    with pytest.raises(KeyError), prefetched(a_stream(device=DEVICE), 0, 0, Ranks()) as batches:
        raise KeyError(next(batches).step)


def test_an_augmentation_of_ones_own_is_called_by_the_loop() -> None:
    """It may draw from torch's generator, as a student's dropout does at the same time."""
    stream = a_stream()
    assert batches_ahead(stream) == AHEAD
    assert batches_ahead(a_stream(augmentation=CustomAugmentation(factory="somebody:s"))) == 0


def test_no_tensor_of_a_batch_is_forgotten_when_it_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls alone; whether the GPU keeps to it is for the test below."""
    told = list[Any]()

    class Current:
        def wait_event(self, ready: object) -> None:
            told.append(ready)

    current = Current()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append((id(tensor), stream)))
    *_, batch = a_stream().batches(0, 6, 2, 100)
    assert batch.spare is not None
    ready: Any = object()
    assert prefetch._handed_over(batch, ready) is batch
    assert told[0] is ready
    tensors = [batch.inputs, batch.labels, batch.logits, batch.spare]
    assert sorted(map(str, told[1:])) == sorted(str((id(tensor), current)) for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_that_is_late_reads_what_it_was_given() -> None:
    """The loop's CUDA stream is kept waiting, while batches are let go and others made in their place."""
    stream = a_stream(device="cuda", augmentation=CROP)
    sums = list[torch.Tensor]()
    for epoch in range(20):
        with prefetched(stream, epoch, 0, Ranks()) as batches:
            for batch in batches:
                torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
                assert batch.logits is not None
                sums.append(torch.stack([batch.inputs.sum(), batch.labels.sum(), batch.logits.long().sum()]))
                del batch
    torch.cuda.synchronize()
    plain = a_stream(augmentation=CROP)
    expected = [one for epoch in range(20) for one in plain.batches(epoch)]
    for found, batch in zip(sums, expected, strict=True):
        assert batch.logits is not None
        assert found.tolist() == [int(one.long().sum()) for one in (batch.inputs, batch.labels, batch.logits)]
