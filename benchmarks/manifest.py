"""What opening, resuming and sealing a store of many shards costs: seconds, memory and requests.

python -m benchmarks.manifest [--shards 50000]

Objects are simulated, a few bytes for each shard of a large vocabulary: none of these steps reads one. Requests are
counted as object storage would be asked, on a folder in its place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from akd_dist.base.files import sha256
from akd_dist.storage.arrays import metadata
from akd_dist.storage.layout import ARRAYS, MANIFEST_KEY, Shard
from akd_dist.storage.manifest import Computed, Creation, Identity, Manifest
from akd_dist.storage.objects import LocalRoot
from akd_dist.storage.reader import open_store
from akd_dist.storage.receipts import Packer, put_receipt
from akd_dist.storage.records import Loss, Probe, Receipt, ShardRecord
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store

VIEWS = 100
PROBES = 32


def main() -> None:
    """Print a line of JSON for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=50_000, help="of 100 views")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.open:
        print(json.dumps(_opened(chosen.open)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = _simulated(folder, chosen.shards)
        # In a process of its own, so that its memory is that of opening alone.
        command = [sys.executable, "-m", "benchmarks.manifest", "--open", store]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_requests(folder, min(chosen.shards, 3_200))))


def _creation(shards: int) -> Creation:
    """A vocabulary of 65,536, of which a shard holds 256 rows; compressed, so that no size follows from the layout."""
    identity = Identity(
        format=3, dataset=sha256(b"rows"), rows=shards // VIEWS * 256, teacher=sha256(b"teacher"),
        augmentation={"kind": "none"}, data_seed=0, views=VIEWS, encoding={"name": "float16", "compress": "zstd"},
        classes=65_536,
    )  # fmt: skip
    computed = Computed(batch_rows=256, threads=1, device="cpu", versions={})
    return Creation(identity=identity, computed=computed, dataset={}, teacher={})


def _record(identity: Identity, shard: Shard) -> ShardRecord:
    step = max(1, identity.rows // PROBES)
    rows = [row for row in range(shard.start, shard.stop) if row % step == 0]
    sample = [number / 16 for number in range(16)]
    probes = [Probe(row=row, sha256=sha256(f"{shard} {row}".encode()), sample=sample) for row in rows]
    return ShardRecord(
        key=shard.key, size=7, sha256=sha256(str(shard).encode()), rows=shard.rows, finite=True, label_agreement=0.5,
        probes=probes, content=sha256(f"content of {shard}".encode()),
        loss=Loss(rows=len(probes), kl=1e-6 if probes else None, largest_difference=1e-3),
    )  # fmt: skip


def _simulated(root: str, shards: int) -> str:
    creation = _creation(shards)
    identity, folder = creation.identity, Path(root) / creation.identity.id
    files = {f"{ARRAYS}/{key}": data for key, data in metadata(identity).items()}
    digests = {key: sha256(data) for key, data in metadata(identity).items()}
    manifest = Manifest.seal(creation, digests, (_record(identity, shard) for shard in identity.layout.shards()))
    for key, data in {**files, MANIFEST_KEY: manifest.to_bytes()}.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    for shard in identity.layout.shards():
        path = folder / ARRAYS / shard.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"7 bytes")
    return str(folder)


def _opened(store: str) -> dict[str, Any]:
    before, began, cpu = _peak_kib(), time.perf_counter(), time.process_time()
    opened = open_store(store)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "shards": opened.layout.shard_count,
        "manifest_MB": round((Path(store) / MANIFEST_KEY).stat().st_size / 1e6, 2),
        "open_seconds": round(seconds, 2),
        "open_cpu_seconds": round(cpu, 2),
        "open_MB": round((_peak_kib() - before) / 1024, 1),
    }


def _peak_kib() -> int:
    """The most memory that this process has held; `getrusage` would count that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _requests(root: str, shards: int) -> dict[str, Any]:
    """Requests a shard of resuming a store that is half done, and of sealing it."""
    writer = create_store(root, _creation(shards))
    every = writer.layout.shards()
    with _counted() as writing:
        packer = Packer(writer.store, Receipt, always=True)
        for shard in every[::2]:
            _write(writer, shard, packer)
        packer.flush()
    with _counted() as resuming:
        missing = missing_shards(writer, deep=False)
    packer = Packer(writer.store, Receipt, always=True)
    for shard in missing:
        _write(writer, shard, packer)
    packer.flush()
    with _counted() as sealing:
        seal_store(writer)
    packs = sum(count for name, count in writing.items() if name == "put")
    return {
        "shards": len(every),
        "resume": dict(resuming),
        "resume_per_shard": round(sum(resuming.values()) / len(every), 4),
        "seal": dict(sealing),
        "seal_per_shard": round((sum(sealing.values()) + 2 * packs) / len(every), 4),
    }


def _write(writer: StoreWriter, shard: Shard, packer: Packer[Receipt]) -> None:
    record = _record(writer.creation.identity, shard)
    writer.store.put_new(f"{ARRAYS}/{shard.key}", b"7 bytes")
    receipt = Receipt.of(record, writer.creation_sha256, 1.0, "host")
    packer.add(put_receipt(writer.store, receipt))


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Count what is asked of the storage; a listing is a request for each thousand objects in it."""
    counts: Counter[str] = Counter()
    real = {name: getattr(LocalRoot, name) for name in ("get", "put", "put_new", "list", "exists", "delete")}

    def counting(name: str) -> Any:
        def asked(self: LocalRoot, *given: Any) -> Any:
            answer = real[name](self, *given)
            counts[name] += 1 + len(answer) // 1000 if name == "list" else 1
            return answer

        return asked

    for name in real:
        setattr(LocalRoot, name, counting(name))
    try:
        yield counts
    finally:
        for name, method in real.items():
            setattr(LocalRoot, name, method)


if __name__ == "__main__":
    main()
