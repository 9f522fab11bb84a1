"""What each `cache.encoding` makes of logits: bytes a logit, what rounding changes, and the speed of a core.

python -m benchmarks.encodings [--store URI]

Without a store the logits are those of a synthetic head of 1,000 classes: 512 features through a rectifier, and a
random linear layer. Whole shards are encoded and decoded, as the store does it, checksums included, on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from akd_dist.base.files import sha256
from akd_dist.storage.arrays import decode_shard, encode_shard
from akd_dist.storage.layout import LOGITS
from akd_dist.storage.manifest import Identity
from akd_dist.storage.reader import open_store
from akd_dist.storage.records import Loss

ENCODINGS: list[dict[str, Any]] = [
    {"name": name} | bits | compress
    for name in ("float32", "float16")
    for bits in ({}, {"keep_bits": 7})
    for compress in ({}, {"compress": "zstd"}, {"compress": "blosc"})
]
ROWS = 4096


def main() -> None:
    """Print a line of JSON for each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="logits of this store, instead of synthetic ones")
    chosen = parser.parse_args()
    logits = _synthetic() if chosen.store is None else open_store(chosen.store).rows(0, 0, ROWS)
    for config in ENCODINGS:
        print(json.dumps(_measured(logits, config)))


def _synthetic() -> np.ndarray:
    random = np.random.Generator(np.random.Philox(0))
    features = np.maximum(random.standard_normal((ROWS, 512), np.float32), 0)
    head = random.standard_normal((512, 1000), np.float32) / np.float32(512**0.5)
    return np.asarray(features @ head * 4, np.float32)


def _measured(logits: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    identity = Identity(
        format=3, dataset=sha256(b"rows"), rows=len(logits), teacher=sha256(b"teacher"), augmentation={"kind": "none"},
        data_seed=0, views=1, encoding=config, classes=logits.shape[1],
    )  # fmt: skip
    stored, encoding, decoding, kept = 0, 0.0, 0.0, []
    for shard in identity.layout.shards():
        began = time.process_time()
        data = encode_shard(identity, shard, identity.codec.encode(logits[shard.start : shard.stop], shard.start))
        between = time.process_time()
        decoded = decode_shard(identity, shard, data)
        encoding, decoding = encoding + between - began, decoding + time.process_time() - between
        stored += len(data)
        kept.append(identity.codec.decode({LOGITS: decoded}))
    loss = Loss.between(logits, np.concatenate(kept), classification=True)
    megabytes = identity.layout.nbytes / 1e6
    return {
        "encoding": str(identity.codec),
        "bytes_per_logit": round(stored / logits.size, 3),
        "kl": loss.kl,
        "largest_difference": loss.largest_difference,
        "encode_MB_per_s": round(megabytes / encoding),
        "decode_MB_per_s": round(megabytes / decoding),
    }


if __name__ == "__main__":
    main()
