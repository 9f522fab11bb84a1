"""Tokens per second of a language model's training stream against a NumPy memory map of the same records.

    python -m benchmarks.language_stream [--length 1024] [--classes 151936] [--fully-scored] [--json]

A sealed `top_k` store of random bytes (k = rank = 16), and blocks of random tokens, of several documents each unless
`--fully-scored`. The stream is the product's: blocks in the order of an epoch, and all that is stored of their targets,
as tensors. The memory map is what one would write by hand: one record a target, the records of a block one after the
other, blocks shuffled, and both made into tensors. Where all blocks have equally many targets it is indexed by block,
else it is sliced block by block. The sides take turns, epoch by epoch, with a warm page cache; figures are medians of
CPU time, and `ratio` that of neighbouring epochs: the stream's tokens per second over the memory map's. Needs some 400
MB of disk and ten seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist.base.files import sha256
from akd_dist.data.packing import TARGETS, target_counts
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_targets import TeacherTargets, split
from akd_dist.distill.stream import BatchStream
from akd_dist.recipe import NoAugmentation
from akd_dist.storage.claim import claim_store
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.layout import TARGETS_FORMAT, Shard
from akd_dist.storage.manifest import Computed, Creation, Identity
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.tables import put_dictionary, put_fidelity, put_offsets
from akd_dist.storage.top_k import TopK
from akd_dist.storage.writer import create_store, seal_store, write_shard

ENCODING = TopK(k=16, rank=16)
DOCUMENTS = 3
"""Of a block, on average."""
Sides = dict[str, Callable[[int], Iterator[Any]]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--tokens", type=int, default=2**21, help="of all blocks (default 2,097,152)")
    parser.add_argument("--classes", type=int, default=49_152)
    parser.add_argument("--batch", type=int, default=64, help="blocks of a batch")
    parser.add_argument("--fully-scored", action="store_true", help="one document a block")
    parser.add_argument("--repeats", type=int, default=15, help="epochs of each side")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), chosen)
    print(json.dumps(found) if chosen.json else table(found))


@dataclass(frozen=True, eq=False)
class ByHand:
    """The same blocks and records, as one would keep them by hand."""

    blocks: np.memmap[Any, Any]
    """int32 [blocks, 3, length]."""
    records: np.memmap[Any, Any]
    """uint8 [targets, bytes]: all arrays of the store, one after the other."""
    offsets: np.ndarray

    def epoch(self, number: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and records of shuffled batches."""
        order, offsets = np.random.default_rng(number).permutation(len(self.blocks)), self.offsets.tolist()
        each = len(self.records) // len(self.blocks)
        of_blocks = None
        if (np.diff(self.offsets) == each).all():
            of_blocks = self.records.reshape(len(self.blocks), -1)
        for start in range(0, len(order), batch):
            picked = order[start : start + batch]
            if of_blocks is not None:
                said = of_blocks[picked]
            else:
                said = np.concatenate([self.records[offsets[one] : offsets[one + 1]] for one in picked.tolist()])
            yield torch.from_numpy(self.blocks[picked]), torch.from_numpy(said)


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Alternating epochs of both sides; medians."""
    rows = made_rows(folder, chosen.tokens // chosen.length, chosen.length, chosen.classes, chosen.fully_scored)
    store = made_store(folder, rows)
    targets = TeacherTargets(store, folder / "cache")
    batch = chosen.batch
    stream = BatchStream(rows, targets, NoAugmentation(), seed=0, views=1, batch=batch)
    by_hand = ByHand(np.load(folder / "blocks.npy", mmap_mode="r"), made_records(folder, store), rows.offsets)
    check(stream, by_hand)
    sides: Sides = {"stream": stream.batches, "numpy": lambda epoch: by_hand.epoch(epoch, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(chosen.repeats + 1):
        for name, side in sides.items():
            began = time.process_time()
            for _ in side(number):
                pass
            if number:  # the first maps the files
                seconds[name].append(time.process_time() - began)
    targets.close()
    pairs = zip(seconds["numpy"], seconds["stream"], strict=True)
    return {
        "ratio": round(statistics.median(one / other for one, other in pairs), 3),
        "ratio_of_best": round(min(seconds["numpy"]) / min(seconds["stream"]), 3),
        **{f"{name}_tokens_per_second": round(chosen.tokens / statistics.median(seconds[name])) for name in sides},
        "length": chosen.length, "blocks": len(rows), "batch": batch, "classes": chosen.classes,
        "targets": rows.targets, "bytes_per_target": store.layout.item_bytes, "fully_scored": chosen.fully_scored,
    }  # fmt: skip


def made_rows(folder: Path, count: int, length: int, classes: int, fully_scored: bool) -> Rows:
    """Blocks of random tokens and documents, mapped into memory."""
    generator = np.random.default_rng(0)
    blocks = np.zeros((count, 3, length), np.int32)
    blocks[:, 0] = generator.integers(classes, size=(count, length))
    ends = np.zeros((count, length), bool)
    if not fully_scored:
        ends[:, :-1] = generator.random((count, length - 1)) < (DOCUMENTS - 1) / length
    blocks[:, 1, 1:] = np.cumsum(ends[:, :-1], axis=1)
    blocks[:, TARGETS] = ~ends
    blocks[:, TARGETS, -1] = 0
    np.save(folder / "blocks.npy", blocks)
    np.save(folder / "labels.npy", target_counts(blocks))
    inputs, labels = (np.load(folder / name, mmap_mode="r") for name in ("blocks.npy", "labels.npy"))
    # As the product gives them: plain arrays on memory maps.
    arrays = np.asarray(inputs), np.asarray(labels)
    return Rows(*arrays, classes, sha256(b"blocks"), (), folder, task="language_model")


def made_store(folder: Path, rows: Rows) -> LogitStore:
    """A sealed store of random bytes."""
    identity = Identity.model_validate(
        {
            "format": TARGETS_FORMAT, "dataset": rows.fingerprint, "rows": len(rows), "items": rows.targets,
            "tokens": {"tokenizer": sha256(b"tokens"), "vocabulary": rows.classes}, "teacher": sha256(b"teacher"),
            "augmentation": {"kind": "none"}, "data_seed": None, "views": 1, "classes": rows.classes,
            "encoding": ENCODING.config(),
        }
    )  # fmt: skip
    created = Creation(
        identity=identity,
        computed=Computed(batch_rows=8, threads=1, device="cpu", versions={}),
        dataset={"fingerprint": rows.fingerprint, "rows": len(rows)},
        teacher={"fingerprint": identity.teacher, "spec": {}},
    )
    generator = np.random.default_rng(1)
    with claim_store(str(folder / "stores"), identity.id):
        writer = create_store(str(folder / "stores"), created, hint={"split": "train"})
        put_offsets(writer, rows.offsets)
        nothing = np.zeros(rows.classes, np.float32)
        basis = np.zeros((rows.classes, ENCODING.rank), np.float16)
        said = put_dictionary(
            writer, Dictionary(nothing, basis=basis, residual_mean=nothing, residual_variance=nothing)
        )
        for shard in writer.layout.shards():
            arrays = random_arrays(generator, shard)
            given: dict[str, Any] = {"label_agreement": None, "probes": [], "seconds": 0.0}
            write_shard(writer, shard, arrays, **given, dictionary=said)
        put_fidelity(writer, {})
        seal_store(writer)
    return open_store(writer.uri)


def random_arrays(generator: np.random.Generator, shard: Shard) -> dict[str, np.ndarray]:
    """Any bytes for each array of a shard."""
    return {
        array.name: np.frombuffer(generator.bytes(shard.rows * array.item_bytes), array.dtype).reshape(
            shard.rows, *array.shape
        )
        for array in shard.arrays
    }


def made_records(folder: Path, store: LogitStore) -> np.memmap[Any, Any]:
    """All that is stored of each target one after the other, mapped into memory: uint8 [targets, bytes]."""
    arrays = store.targets(0, 0, store.layout.rows).values()
    parts = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in arrays]
    np.save(folder / "records.npy", np.concatenate(parts, axis=1))
    found: np.memmap[Any, Any] = np.load(folder / "records.npy", mmap_mode="r")
    return found


def check(stream: BatchStream, by_hand: ByHand) -> None:
    """Refuse to measure sides that do not give the same."""
    batch = next(iter(stream.batches(0)))
    assert batch.targets is not None
    assert isinstance(stream.logits, TeacherTargets)
    assert stream.logits.together is not None
    ours = split(batch.targets.items, stream.logits.together)
    places = [np.arange(by_hand.offsets[row], by_hand.offsets[row + 1]) for row in batch.rows]
    theirs = by_hand.records[np.concatenate(places)]
    joined = [one.contiguous().view(len(theirs), -1).view(torch.uint8).numpy() for one in ours.values()]
    assert np.array_equal(np.concatenate(joined, axis=1), theirs)
    assert np.array_equal(batch.inputs.numpy(), by_hand.blocks[batch.rows])


def table(found: dict[str, Any]) -> str:
    """The document for people."""
    scored = "one document" if found["fully_scored"] else f"about {DOCUMENTS} documents"
    return (
        f"{found['blocks']:,} blocks of {found['length']:,} tokens with {scored} each, {found['classes']:,} classes, "
        f"{found['bytes_per_target']} bytes a target, batches of {found['batch']} blocks\n"
        f"  NumPy memory map {found['numpy_tokens_per_second']:>14,} tokens/s\n"
        f"  this stream      {found['stream_tokens_per_second']:>14,} tokens/s\n"
        f"  ratio            {found['ratio']:>14} (of the best epochs {found['ratio_of_best']})"
    )


if __name__ == "__main__":
    main()
