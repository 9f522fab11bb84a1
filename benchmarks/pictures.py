"""Views of encoded pictures: rows per second against a torch DataLoader, and how long training waits for them.

    python -m benchmarks.pictures             a table
    python -m benchmarks.pictures --json      one JSON document whose main figure is `ratio`

JPEGs of about 500 x 375 pixels become random resized crops of 224 x 224, flipped by chance. The peer is what a
careful user writes: a map-style dataset of files, decoded, cropped, resized and flipped by Pillow as here, under a
DataLoader of as many worker processes as this stream has threads, one for each core. The sides take turns, epoch by
epoch, with a warm page cache; `ratio` is the median of neighbouring epochs, and `cpu_ratio` that of CPU time, which
other work on the machine hardly touches.

Then a student of ResNet-18's size is trained from the stream. `waiting` is the share of its time that it spent in
`next(batch)`, which is to stay under 5 % where the cores suffice: where it takes no more rows a second than the stream
gives. The peak of memory is that of the streaming process above what it took before, over one epoch and over three: it
does not grow. Needs 250 MB of disk, 2 GB of memory and some minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from akd_dist import recipe
from akd_dist.data.blocks import default_threads
from akd_dist.data.row_cache import prepare
from akd_dist.distill.stream import BatchStream

ROWS, SIDE, BATCH = 1_024, 224, 64
CROP = recipe.RandomResizedCropFlip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Encoded pictures against a torch DataLoader.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each side (default 5)")
    parser.add_argument("--steps", type=int, default=8, help="steps of training (default 8)")
    parser.add_argument("--train-batch", type=int, default=16, help="rows of a step of training (default 16)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where training is (default cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stream = opened(Path(folder))
        result = rates(stream, Path(folder) / "files", arguments.repeats)
        result |= memory(stream)
        result |= training(stream, arguments.steps, arguments.train_batch, arguments.device)
    print(json.dumps(result) if arguments.json else table(result))


def opened(folder: Path) -> BatchStream:
    """The stream over pictures, which also lie in a folder of files for the peer."""
    (folder / "files").mkdir()
    encoded = list(pictures())
    for number, one in enumerate(encoded):
        (folder / "files" / f"{number:05}.jpg").write_bytes(one)
    labels = [row % 10 for row in range(len(encoded))]
    pq.write_table(pa.table({"x": encoded, "y": labels}), folder / "rows.parquet", row_group_size=128)
    source = recipe.Parquet(path=str(folder / "rows.parquet"), input="x", label="y")
    data = recipe.DataSpec(
        train=source, validation=0.01, test=0.01, image=recipe.Image(size=SIDE), augmentation=CROP, views=8
    )
    rows = prepare(data, folder / "cache").train
    return BatchStream(rows, None, CROP, seed=0, views=8, batch=BATCH)


def pictures() -> Iterator[bytes]:
    """JPEGs with edges and noise, of some 40 to 80 kB as photographs of this size have."""
    draw = np.random.default_rng(0)
    for _ in range(ROWS):
        width, height = (int(side) for side in draw.integers((440, 330), (561, 421)))
        coarse = draw.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + draw.integers(-14, 15, smooth.shape, dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


class Files(Dataset[tuple[torch.Tensor, int]]):
    """The peer: files, decoded by Pillow, cropped as torchvision's RandomResizedCrop, resized and flipped."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[row]) as opened:
            picture = opened.convert("RGB")
        top, left, height, width = self._part(picture.height, picture.width)
        part = picture.crop((left, top, left + width, top + height))
        shown = part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if torch.rand(()) < 0.5:
            shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(shown)).permute(2, 0, 1), row % 10

    @staticmethod
    def _part(height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * float(torch.empty(()).uniform_(*CROP.scale))
            ratio = math.exp(float(torch.empty(()).uniform_(math.log(CROP.ratio[0]), math.log(CROP.ratio[1]))))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                top = int(torch.randint(0, height - tall + 1, ()))
                return top, int(torch.randint(0, width - wide + 1, ())), tall, wide
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def rates(stream: BatchStream, files: Path, repeats: int) -> dict[str, Any]:
    """Rows per second of both sides, in turns."""
    workers = default_threads()
    loader = DataLoader(Files(files), BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    ours, theirs = list[Rate](), list[Rate]()
    for epoch in range(repeats + 1):
        theirs.append(rate(loader))
        ours.append(rate(stream.batches(epoch)))
    ours, theirs = ours[1:], theirs[1:]  # the first warms the page cache, and starts the processes
    return {
        "ratio": ratio(ours, theirs, "by_clock"),
        "cpu_ratio": ratio(ours, theirs, "by_cpu"),
        "stream_rows_per_second": round(statistics.median(one.by_clock for one in ours)),
        "loader_rows_per_second": round(statistics.median(one.by_clock for one in theirs)),
        "stream_rows_per_cpu_second": round(statistics.median(one.by_cpu for one in ours)),
        "loader_rows_per_cpu_second": round(statistics.median(one.by_cpu for one in theirs)),
        "rows": len(stream.rows),
        "encoded_bytes_of_row": stream.rows.row_bytes,
        "pixel_bytes_of_row": stream.rows.input_bytes,
        "workers": workers,
        "repeats": repeats,
    }


class Rate(NamedTuple):
    """Rows per second of an epoch, and per second of CPU time, that of worker processes as well."""

    by_clock: float
    by_cpu: float


def rate(batches: Any) -> Rate:
    """Those of an epoch."""
    started, busy, rows = time.perf_counter(), cpu_seconds(batches), 0
    for batch in batches:
        inputs = batch.inputs if hasattr(batch, "inputs") else batch[0]
        rows += len(inputs)
    return Rate(rows / (time.perf_counter() - started), rows / (cpu_seconds(batches) - busy))


def ratio(ours: list[Rate], theirs: list[Rate], by: str) -> float:
    """The median of neighbouring epochs."""
    pairs = zip(ours, theirs, strict=True)
    return round(float(statistics.median(getattr(one, by) / getattr(other, by) for one, other in pairs)), 3)


def cpu_seconds(batches: Any) -> float:
    """CPU time of this process, and of a loader's workers."""
    workers = getattr(getattr(batches, "_iterator", None), "_workers", ())
    ticks = 0
    for worker in workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory(stream: BatchStream) -> dict[str, Any]:
    """The peak of the process's own memory while it streams, above that before: over one epoch, and over three."""
    found = []
    for epochs in (1, 3):
        before, peak, done = own_bytes(), [0], threading.Event()

        def look(before: int = before, peak: list[int] = peak, done: threading.Event = done) -> None:
            while not done.wait(0.01):
                peak[0] = max(peak[0], own_bytes() - before)

        looking = threading.Thread(target=look)
        looking.start()
        for epoch in range(epochs):
            for _ in stream.batches(epoch):
                pass
        done.set()
        looking.join()
        found.append(peak[0])
    return {"peak_bytes": found[0], "peak_bytes_of_three": found[1]}


def own_bytes() -> int:
    """Bytes of this process that are in no file."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def training(stream: BatchStream, steps: int, batch: int, device: str) -> dict[str, Any]:
    """Steps of a student of ResNet-18's size, one thread of its own on a CPU, and how long it waited for batches."""
    module = resnet18().to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    own = BatchStream(stream.rows, None, CROP, seed=0, views=8, batch=batch, device=device)
    waited = stepped = 0.0
    taken, batches = 0, (one for epoch in range(1_000) for one in own.batches(epoch))
    while taken < steps + 2:
        started = time.perf_counter()
        one = next(batches)
        got = time.perf_counter()
        loss = nn.functional.cross_entropy(module(one.inputs.float() / 255), one.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # waits for a GPU
        taken += 1
        if taken > 2:  # the first ones allocate
            waited, stepped = waited + got - started, stepped + time.perf_counter() - got
    return {
        "waiting": round(waited / (waited + stepped), 4),
        "step_seconds": round(stepped / steps, 4),
        "wait_seconds": round(waited / steps, 5),
        "steps": steps,
        "train_batch": batch,
        "device": device,
    }


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] -> [n, out, h / stride, w / stride]."""
        return nn.functional.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for ten classes: 11.2 million weights, 1.8 billion products for a picture."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    parts += [nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        parts += [Block(channels, out, stride), Block(out, out, 1)]
        channels = out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    by_cpu = [result[f"{side}_rows_per_cpu_second"] for side in ("stream", "loader")]
    encoded, pixels = (result[f"{kind}_bytes_of_row"] / 1e3 for kind in ("encoded", "pixel"))
    return (
        f"{result['rows']:,} JPEGs of {encoded:.0f} kB on average -> random resized crops of {SIDE} x {SIDE} "
        f"({pixels:.0f} kB), batch {BATCH}, {result['repeats']} alternating epochs\n"
        f"  DataLoader, {result['workers']} processes  {result['loader_rows_per_second']:>7,} rows/s\n"
        f"  this stream, {result['workers']} threads   {result['stream_rows_per_second']:>7,} rows/s\n"
        f"  ratio                     {result['ratio']:>7} (by CPU time {result['cpu_ratio']}: {by_cpu[0]:,} rows a "
        f"CPU second against {by_cpu[1]:,})\n"
        f"  memory above that before  {result['peak_bytes'] / 1e6:>7.0f} MB over an epoch, "
        f"{result['peak_bytes_of_three'] / 1e6:.0f} MB over three\n"
        f"ResNet-18 on {result['device']}, batch {result['train_batch']}, {result['steps']} steps\n"
        f"  a step {result['step_seconds'] * 1e3:.0f} ms, of waiting {result['wait_seconds'] * 1e3:.1f} ms: "
        f"{result['waiting']:.1%}"
    )


if __name__ == "__main__":
    main()
