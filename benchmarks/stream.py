"""Rows per second of the training stream against a plain NumPy gather from the same memory maps, and of a DataLoader.

    python benchmarks/stream.py             a table
    python benchmarks/stream.py --json      one JSON document whose main figure is `ratio`

60,000 rows of 784 bytes and 1,000 float16 logits each, batches of 256, shuffled globally. The sides take turns, epoch
by epoch, in one process with a warm page cache; the figures are medians of CPU time, which other work on the machine
hardly touches, and the ratios those of neighbouring epochs. `ratio` is against indexing the memory maps as
anyone would; `ratio_to_take` against `numpy.take` on bare arrays, the fastest gather that NumPy has. `loader_ratio` is
that of a `torch.utils.data.DataLoader` in the same process to the stream: of whole batches in the stream's order, as
`akd_dist.distillation_batches` gives them; `dataset_ratio` that of `akd_dist.distillation_dataset`, which is asked for
whole batches in an order that is drawn at once, and `shuffled_ratio` where the DataLoader draws row by row. Needs about
170 MB of disk and of memory, and some ten seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from akd_dist.data.rows import Rows
from akd_dist.distill.dataset import DatasetJob, DistillationBatches, DistillationDataset
from akd_dist.distill.orders import epoch_order
from akd_dist.distill.stream import BatchStream
from akd_dist.recipe import DataSpec, Digits, NoAugmentation
from akd_dist.storage.reader import LogitStore

ROWS, SHAPE, CLASSES, BATCH = 60_000, (1, 28, 28), 1_000, 256


@dataclass(frozen=True)
class Measured(DatasetJob):
    """What a dataset is opened from: the very stream that is measured."""

    made: BatchStream | None = None

    def stream(self) -> tuple[BatchStream, LogitStore | None]:
        """The stream."""
        assert self.made is not None
        return self.made, None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The training stream against a plain NumPy gather.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=15, help="epochs of each side (default 15)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.repeats)
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Alternating epochs of all sides; medians."""
    inputs, labels, logits = arrays(folder)
    rows = Rows(inputs, labels, CLASSES, fingerprint="", blocks=(), folder=folder)
    stream = BatchStream(rows, logits, NoAugmentation(), seed=0, views=1, batch=BATCH)

    bare_inputs, bare_labels, bare_logits = np.asarray(inputs), np.asarray(labels), np.asarray(logits[0])

    def index(picked: np.ndarray) -> object:
        return inputs[picked], labels[picked], logits[0, picked]

    def take(picked: np.ndarray) -> object:
        return bare_inputs.take(picked, axis=0), bare_labels.take(picked), bare_logits.take(picked, axis=0)

    def plain_epoch(gather: Callable[[np.ndarray], object], epoch: int) -> None:
        order = np.random.default_rng(epoch).permutation(ROWS)
        for start in range(0, ROWS, BATCH):
            gather(order[start : start + BATCH])

    def stream_epoch(epoch: int) -> None:
        for _ in stream.batches(epoch):
            pass

    job = Measured(DataSpec(train=Digits()), "train", {}, str(folder), None, made=stream)
    batches, dataset = DistillationBatches(job), DistillationDataset(job)

    def batches_epoch(epoch: int) -> None:
        batches.set_epoch(epoch)
        for _ in DataLoader(batches, batch_size=None):
            pass

    def dataset_epoch(epoch: int) -> None:
        dataset.set_epoch(epoch)
        order: list[Any] = np.split(epoch_order(ROWS, 0, epoch), range(BATCH, ROWS, BATCH))
        for _ in DataLoader(dataset, batch_sampler=order):
            pass

    def shuffled_epoch(epoch: int) -> None:
        dataset.set_epoch(epoch)
        for _ in DataLoader(dataset, BATCH, shuffle=True):
            pass

    rates: dict[str, list[float]] = {
        "index": [],
        "take": [],
        "stream": [],
        "batches": [],
        "dataset": [],
        "shuffled": [],
    }
    for epoch in range(repeats + 1):
        rates["index"].append(rate(functools.partial(plain_epoch, index, epoch)))
        rates["take"].append(rate(functools.partial(plain_epoch, take, epoch)))
        rates["stream"].append(rate(functools.partial(stream_epoch, epoch)))
        rates["batches"].append(rate(functools.partial(batches_epoch, epoch)))
        rates["dataset"].append(rate(functools.partial(dataset_epoch, epoch)))
        rates["shuffled"].append(rate(functools.partial(shuffled_epoch, epoch)))
    return summary({side: measured[1:] for side, measured in rates.items()}, repeats)  # the first warms the page cache


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and logits [1, rows, classes], memory-mapped from files as the node cache has them."""
    generator = np.random.default_rng(0)
    np.save(folder / "inputs.npy", generator.integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, CLASSES, ROWS))
    np.save(folder / "logits.npy", generator.standard_normal((1, ROWS, CLASSES), dtype=np.float32).astype(np.float16))
    inputs, labels, logits = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("inputs", "labels", "logits"))
    return inputs, labels, logits


def rate(epoch: Callable[[], None]) -> float:
    """Rows per CPU second of one epoch."""
    started = time.process_time()
    epoch()
    return ROWS / (time.process_time() - started)


def summary(rates: dict[str, list[float]], repeats: int) -> dict[str, float]:
    """The document: ratios, and rows per second."""

    def ratio(side: str, of: str = "stream") -> float:
        pairs = zip(rates[of], rates[side], strict=True)
        return round(statistics.median(one / other for one, other in pairs), 3)

    return {
        "ratio": ratio("index"),
        # The best epoch of each side: other work on the machine takes caches away, and so can only slow a side down.
        "ratio_of_best": round(max(rates["stream"]) / max(rates["index"]), 3),
        "ratio_to_take": ratio("take"),
        "loader_ratio": ratio("stream", of="batches"),
        "dataset_ratio": ratio("stream", of="dataset"),
        "shuffled_ratio": ratio("stream", of="shuffled"),
        "stream_rows_per_second": round(statistics.median(rates["stream"])),
        "numpy_rows_per_second": round(statistics.median(rates["index"])),
        "take_rows_per_second": round(statistics.median(rates["take"])),
        "rows": ROWS,
        "batch": BATCH,
        "repeats": repeats,
        "cores": len(os.sched_getaffinity(0)),
    }


def table(result: dict[str, float]) -> str:
    """The document for people."""
    return (
        f"{result['rows']:,} rows of 784 bytes and 1,000 float16 logits, batch {result['batch']}, global shuffle, "
        f"{result['repeats']} alternating epochs, {result['cores']} cores\n"
        f"  NumPy, memory maps indexed  {result['numpy_rows_per_second']:>12,} rows/s\n"
        f"  NumPy, take on bare arrays  {result['take_rows_per_second']:>12,} rows/s\n"
        f"  this stream                 {result['stream_rows_per_second']:>12,} rows/s\n"
        f"  ratio                       {result['ratio']:>12} (to take {result['ratio_to_take']})\n"
        f"  a DataLoader of it          {result['loader_ratio']:>12} of this stream; of rows by number "
        f"{result['dataset_ratio']}, shuffled by the DataLoader {result['shuffled_ratio']}"
    )


if __name__ == "__main__":
    main()
