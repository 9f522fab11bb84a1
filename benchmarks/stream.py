"""Rows per second of the training stream against a plain NumPy gather from the same memory maps.

    python benchmarks/stream.py             a table
    python benchmarks/stream.py --json      one JSON document whose main figure is `ratio`

60,000 rows of 784 bytes and 1,000 float16 logits each, batches of 256, shuffled globally. The two take turns epoch by epoch in
one process; the figures are medians. Needs about 170 MB of disk and of page cache, and some ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from akd_dist.recipe import NoAugmentation
from akd_dist.rows import Rows
from akd_dist.stream import Stream

ROWS, SHAPE, CLASSES, BATCH = 60_000, (1, 28, 28), 1_000, 256


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
    """Alternating epochs of both sides; medians, in rows per second."""
    inputs, labels, logits = arrays(folder)
    rows = Rows(inputs, labels, CLASSES, fingerprint="", blocks=(), folder=folder)
    stream = Stream(rows, logits, NoAugmentation(), seed=0, views=1, batch=BATCH)

    def plain_epoch(epoch: int) -> int:
        order, total = np.random.default_rng(epoch).permutation(ROWS), 0
        for start in range(0, ROWS, BATCH):
            picked = order[start : start + BATCH]
            batch = inputs[picked], labels[picked], logits[0, picked]
            total += len(batch[0])
        return total

    def stream_epoch(epoch: int) -> int:
        return sum(len(batch.inputs) for batch in stream.batches(epoch))

    plain, streamed = [], []
    for epoch in range(repeats + 1):
        plain.append(rate(plain_epoch, epoch))
        streamed.append(rate(stream_epoch, epoch))
    # The first epoch of each warms the page cache.
    return summary(plain[1:], streamed[1:])


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and logits [1, rows, classes], memory-mapped from files as the node cache has them."""
    generator = np.random.default_rng(0)
    np.save(folder / "inputs.npy", generator.integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8))
    np.save(folder / "labels.npy", generator.integers(0, CLASSES, ROWS))
    np.save(folder / "logits.npy", generator.standard_normal((1, ROWS, CLASSES), dtype=np.float32).astype(np.float16))
    inputs, labels, logits = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("inputs", "labels", "logits"))
    return inputs, labels, logits


def rate(epoch_of: Callable[[int], int], epoch: int) -> float:
    """Rows per second of one epoch."""
    started = time.perf_counter()
    rows = epoch_of(epoch)
    return rows / (time.perf_counter() - started)


def summary(plain: list[float], streamed: list[float]) -> dict[str, float]:
    """The document: medians, the ratio of medians, and the spread of the ratios of neighbouring epochs."""
    ratios = sorted(ours / theirs for ours, theirs in zip(streamed, plain, strict=True))
    return {
        "ratio": round(statistics.median(streamed) / statistics.median(plain), 3),
        "ratio_lowest": round(ratios[0], 3),
        "ratio_highest": round(ratios[-1], 3),
        "stream_rows_per_second": round(statistics.median(streamed)),
        "numpy_rows_per_second": round(statistics.median(plain)),
        "rows": ROWS,
        "batch": BATCH,
        "repeats": len(ratios),
        "cores": len(os.sched_getaffinity(0)),
    }


def table(result: dict[str, float]) -> str:
    """The document for people."""
    return (
        f"{result['rows']:,} rows of 784 bytes and 1,000 float16 logits, batch {result['batch']}, global shuffle, "
        f"{result['repeats']} alternating epochs on {result['cores']} cores\n"
        f"  NumPy memory maps  {result['numpy_rows_per_second']:>12,} rows/s\n"
        f"  this stream        {result['stream_rows_per_second']:>12,} rows/s\n"
        f"  ratio              {result['ratio']:>12} (epoch by epoch {result['ratio_lowest']} to {result['ratio_highest']})"
    )


if __name__ == "__main__":
    main()
