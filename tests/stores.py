"""Small stores for the tests of the storage floor: logits by formula, so that every byte is known beforehand.

python -m tests.stores ROOT             writes and seals one, as a process of its own that a test can kill
python -m tests.stores ROOT VIEWS       the same with so many views, those that a sealed store has taken from it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.files import sha256
from akd_dist.storage.catalog import narrower_stores
from akd_dist.storage.claim import claim_store
from akd_dist.storage.decoded import open_decoded
from akd_dist.storage.layout import FORMAT_VERSION, Shard
from akd_dist.storage.manifest import Computed, Creation, Identity
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.records import Loss, Probe
from akd_dist.storage.writer import (
    StoreWriter,
    adopt_shard,
    create_store,
    missing_shards,
    seal_store,
    take_shards,
    write_shard,
)

GOLDENS = {version: Path(__file__).parent / "golden" / f"v{version}" for version in range(1, FORMAT_VERSION + 1)}
GOLDEN = GOLDENS[FORMAT_VERSION]
LABEL_AGREEMENT = 0.75
COMPUTED = Computed(batch_rows=256, threads=1, device="cpu", versions={"torch": "2.13.0", "numpy": "2.3.5"})


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "dataset": sha256(b"dataset"),
        "rows": 300,
        "teacher": sha256(b"teacher"),
        "augmentation": {"kind": "shift", "pixels": 1},
        "data_seed": 0,
        "views": 2,
        "encoding": {"name": "float16"},
        "classes": 3,
    }
    return Identity(**{**fields, **changes})


def creation(computed: Computed = COMPUTED, **changes: Any) -> Creation:
    described = identity(**changes)
    return Creation(
        identity=described,
        computed=computed,
        dataset={"fingerprint": described.dataset, "rows": described.rows, "block_rows": 4096, "blocks": ["0" * 64]},
        teacher={"fingerprint": described.teacher, "spec": {"kind": "mlp", "hidden": [16]}},
    )


def logits(described: Identity) -> npt.NDArray[np.float32]:
    """[views, rows, classes] of eighths between -6 and 6, exact in float16, no two shards alike."""
    view, row, klass = np.indices((described.views, described.rows, described.classes))
    eighths: npt.NDArray[np.float32] = ((view * 29 + row * 7 + klass * 13) % 97 - 48).astype(np.float32)
    return eighths / np.float32(8)


def probes(shard: Shard) -> list[Probe]:
    sample = [shard.index, 255] if shard.view == 0 else [0.5, -1.0]  # of whole numbers, and of others
    return [Probe(row=shard.start, sha256=sha256(str(shard).encode()), sample=sample)]


def recompute(
    described: Identity, shard: Shard
) -> tuple[npt.NDArray[np.float32], float | None, Sequence[Probe], Loss | None]:
    return logits(described)[shard.view, shard.start : shard.stop], LABEL_AGREEMENT, probes(shard), None


def write(writer: StoreWriter, shard: Shard) -> None:
    """What a task does: adopt what an interrupted one left, or compute."""
    computed, label_agreement, seen, _ = recompute(writer.creation.identity, shard)
    adopted = adopt_shard(writer, shard)
    write_shard(
        writer,
        shard,
        computed if adopted is None else adopted,
        label_agreement=label_agreement,
        probes=seen,
        seconds=0.0,
    )


def build(root: Path | str, created: Creation | None = None) -> LogitStore:
    """What a driver does: create or go on, write what is missing, seal, open."""
    created = created or creation()
    with claim_store(str(root), created.identity.id):
        writer = create_store(str(root), created, hint={"split": "train"})
        for shard in missing_shards(writer):
            write(writer, shard)
        seal_store(writer)
    return open_store(writer.uri)


def extend(root: Path | str, created: Creation) -> tuple[LogitStore, list[Shard]]:
    """As `build`, but takes what the widest narrower store has; the store, and the shards that had to be computed."""
    with claim_store(str(root), created.identity.id):
        writer = create_store(str(root), created, hint={"split": "train"})
        missing = missing_shards(writer)
        taken = take_shards(writer, narrower_stores(str(root), created.identity)[0], missing)
        rest = [shard for shard in missing if shard not in taken]
        for shard in rest:
            write(writer, shard)
        seal_store(writer)
    return open_store(writer.uri), rest


def decoded(store: LogitStore, cache_root: Path, **given: Any) -> list[npt.NDArray[Any]]:
    """All views of a store, decoded on this node."""
    return [open_decoded(store, cache_root, view, **given) for view in range(store.views)]


def sealed_files(root: Path) -> dict[str, bytes]:
    """Every file that must be the same after any history: arrays.zarr, manifest and creation document."""
    kept = ("arrays.zarr/", "manifest.json", "creation.json")
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if any(part in name for part in kept) and path.suffix != ".partial"
    }


def litter(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.name.endswith((".partial", ".claim", ".damaged"))]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        build(sys.argv[1])
    else:
        extend(sys.argv[1], creation(views=int(sys.argv[2])))
