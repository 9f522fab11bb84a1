"""Small stores of format 4, by formula: rows of several targets, dense and described, and a classifier's, described.

python -m tests.target_stores ROOT KIND     writes and seals one, as a process of its own that a test can kill
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.base.files import sha256
from akd_dist.storage.claim import claim_store
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.layout import TARGETS_FORMAT, Shard
from akd_dist.storage.manifest import Creation, Identity
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.records import Loss, Probe
from akd_dist.storage.tables import find_dictionary, put_dictionary, put_fidelity, put_offsets
from akd_dist.storage.top_k import Described, TopK
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store, write_shard
from tests import stores

GOLDEN = Path(__file__).parent / "golden" / f"v{TARGETS_FORMAT}"
ROWS = 90
DESCRIBED = TopK(k=4, rank=2, value_bits=6, tail_temperatures=(1.0, 2.0), probe_rows=8)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"classes": 5, "encoding": {"name": "float16"}},
    "top_k": {"classes": 300, "encoding": DESCRIBED.config()},
    "classifier": {
        "classes": 1000,
        "encoding": TopK(k=3, rank=0, value_bits=8, tail_temperatures=(1.0, 4 / 3, 2.0), probe_rows=8).config(),
        "rows": 300,
        "views": 2,
        "augmentation": {"kind": "shift", "pixels": 1},
        "data_seed": 0,
        "items": None,
        "tokens": None,
    },
}
FIDELITY = {"temperatures": [1.0, 2.0], "kl": [0.25, 0.125]}


def offsets() -> npt.NDArray[np.int64]:
    """Rows of 22 to 81 targets, and some without any; a few more in all than the 4,096 of a chunk."""
    row = np.arange(ROWS)
    counts = np.where(row % 13 == 5, 0, row * 7 % 60 + 22)
    return np.concatenate([[0], np.cumsum(counts)])


def identity(kind: str, **changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "format": TARGETS_FORMAT,
        "dataset": sha256(b"blocks"),
        "rows": ROWS,
        "items": int(offsets()[-1]),
        "tokens": {"tokenizer": sha256(b"tokenizer"), "vocabulary": KINDS[kind]["classes"]},
        "teacher": sha256(b"teacher"),
        "augmentation": {"kind": "none"},
        "data_seed": None,
        "views": 1,
    }
    return Identity(**{**fields, **KINDS[kind], **changes})


def creation(kind: str, **changes: Any) -> Creation:
    described = identity(kind, **changes)
    return Creation(
        identity=described,
        computed=stores.COMPUTED,
        dataset={"fingerprint": described.dataset, "rows": described.rows},
        teacher={"fingerprint": described.teacher, "spec": {"kind": "causal_lm"}},
    )


def dictionary(described: Identity) -> Dictionary:
    """Exact in its dtypes, and the same on every machine: no exponential is taken."""
    top_k, klass = described.top_k, np.arange(described.classes)
    weights = (klass[None] * (1 + np.arange(len(top_k.tail_temperatures)))[:, None] % 7 + 1).astype(np.float64)
    prior = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    mean_logit = ((klass * 29 % 17 - 8) / 8).astype(np.float32)
    if not top_k.rank:
        return Dictionary(mean_logit, prior)
    basis = ((klass[:, None] * (3 + 8 * np.arange(top_k.rank)) % 23 - 11) / 8).astype(np.float16)
    some = ((klass % 5 - 2) / 16).astype(np.float32)
    calibration = np.stack([some * np.float32(2.0**-place) for place in range(len(top_k.tail_temperatures))])
    projection = np.eye(top_k.rank, 3, dtype=np.float32)
    return Dictionary(mean_logit, prior, basis, some, np.abs(some), calibration, projection)


def coefficients(described: Identity, items: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """[n, rank] in the steps that are stored."""
    steps = items[:, None] * (5 + np.arange(described.top_k.rank)) % 101 - 50
    result: npt.NDArray[np.float32] = (steps / 25.6).astype(np.float32)
    return result


def logits(described: Identity, view: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """[stop - start, classes] of eighths, and of what the dictionary says where there is one; no two rows alike."""
    items = np.arange(start, stop)
    klass = np.arange(described.classes)
    # The largest are among the upper half of the classes.
    spread = (view * 29 + items[:, None] * 7 + klass * 13) % 97 - 48 + klass * 2 // described.classes
    found = spread.astype(np.float64) / 8 + items[:, None] % 3
    if described.is_top_k and described.top_k.rank:
        said = dictionary(described)
        assert said.basis is not None
        found = found / 16 + said.mean_logit + coefficients(described, items) @ said.basis.T.astype(np.float64)
    result: npt.NDArray[np.float32] = found.astype(np.float32)
    return result


def describe(top_k: TopK, z: npt.NDArray[np.float32], given: npt.NDArray[np.float32] | None = None) -> Described:
    """What `top_k` keeps of logits [n, V], in NumPy."""
    ids = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)[:, : top_k.k]
    values = np.take_along_axis(z, ids, axis=1)
    others = z.astype(np.float64) - values[:, :1]
    np.put_along_axis(others, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = [np.log(np.exp(others / one).sum(axis=1)) for one in top_k.tail_temperatures]
    mean = z.astype(np.float64).mean(axis=1).astype(np.float32)
    none = np.zeros((len(z), top_k.rank), np.float32)
    return Described(ids, values, mean, np.stack(tail, axis=1).astype(np.float32), none if given is None else given)


def arrays_of(described: Identity, shard: Shard) -> Mapping[str, npt.NDArray[Any]]:
    """What a task computes of a shard."""
    z = logits(described, shard.view, shard.start, shard.stop)
    if not described.is_top_k:
        return described.codec.encode(z, shard.start)
    top_k = described.top_k
    found = describe(top_k, z, coefficients(described, np.arange(shard.start, shard.stop)))
    return top_k.pack(found, described.classes)


def probes(described: Identity, shard: Shard) -> list[Probe]:
    """One of each shard, with a sample."""
    row = shard.start if described.items is None else int(np.searchsorted(offsets(), shard.start))
    return [Probe(row=row, sha256=sha256(str(shard).encode()), sample=[shard.index, 255])]


Recomputed = tuple[Mapping[str, npt.NDArray[Any]], float | None, list[Probe], Loss | None]


def recompute(described: Identity, shard: Shard) -> Recomputed:
    return arrays_of(described, shard), 0.75, probes(described, shard), None


def remake(described: Identity, name: str) -> Mapping[str, npt.NDArray[Any]]:
    return {"offsets": offsets()} if name == "offsets" else dictionary(described).arrays()


def begin(root: Path | str, created: Creation) -> tuple[StoreWriter, str | None]:
    """Create or go on: the store with its tables, and the sha256 of its dictionary."""
    writer, described = create_store(str(root), created, hint={"split": "train"}), created.identity
    if described.items is not None:
        put_offsets(writer, offsets())
    if not described.is_top_k:
        return writer, None
    found = find_dictionary(writer)
    return writer, put_dictionary(writer, dictionary(described)) if found is None else found[1]


def write(writer: StoreWriter, shard: Shard, said: str | None) -> None:
    kept, agreement, seen, _ = recompute(writer.creation.identity, shard)
    write_shard(writer, shard, kept, label_agreement=agreement, probes=seen, seconds=0.0, dictionary=said)


def build(root: Path | str, created: Creation) -> LogitStore:
    """What a driver does: begin or go on, write what is missing, seal, open."""
    with claim_store(str(root), created.identity.id):
        writer, said = begin(root, created)
        for shard in missing_shards(writer):
            write(writer, shard, said)
        if created.identity.is_top_k:
            put_fidelity(writer, FIDELITY)
        seal_store(writer)
    return open_store(writer.uri)


def golden_of(kind: str) -> Path:
    return GOLDEN / identity(kind).id


def copied(kind: str, root: Path) -> LogitStore:
    """A golden store, to be damaged."""
    shutil.copytree(golden_of(kind), root / golden_of(kind).name)
    return LogitStore(str(root / golden_of(kind).name), open_store(str(golden_of(kind))).manifest)


def sealed_files(folder: Path) -> dict[str, bytes]:
    names = ("arrays.zarr/**/*", "*.json")
    files = [path for name in names for path in folder.glob(name) if path.is_file() and path.name != "source.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".partial"}


def expected(identity: Identity, view: int = 0) -> Mapping[str, npt.NDArray[Any]]:
    """All that is stored of a view."""
    layout = identity.layout
    parts = [arrays_of(identity, shard) for shard in layout.shards() if shard.view == view]
    return {array.name: np.concatenate([part[array.name] for part in parts]) for array in layout.fields}


if __name__ == "__main__":
    build(sys.argv[1], creation(sys.argv[2]))
