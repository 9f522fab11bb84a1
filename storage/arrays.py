"""The Zarr side of a store: its metadata files, and shard objects encoded and decoded in memory.

zarr-python does the encoding, through a memory store that holds the store's own metadata; publishing the bytes is not
its business. Every setting that changes bytes, or what a reader gets for missing ones, is fixed here and not left to a
user's zarr configuration.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from akd_dist.storage.layout import ARRAY_KEY, CRC_BYTES, GROUP_KEY, INDEX_ENTRY_BYTES, LOGITS, Shard
from akd_dist.storage.manifest import Identity

_PINNED = {
    # Other pipelines (zarrs) skip the checksum on partial reads and write shards in place.
    "codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "codec_pipeline.batch_size": 1,
    "codecs.bytes": "zarr.codecs.bytes.BytesCodec",
    "codecs.crc32c": "zarr.codecs.crc32c_.Crc32cCodec",
    "codecs.zstd": "zarr.codecs.zstd.ZstdCodec",
    "codecs.blosc": "zarr.codecs.blosc.BloscCodec",
    "codecs.sharding_indexed": "zarr.codecs.sharding.ShardingCodec",
    "buffer": "zarr.buffer.cpu.Buffer",
    "ndbuffer": "zarr.buffer.cpu.NDBuffer",
    # By default a chunk that equals the fill value is not stored, and not distinguishable from a lost one.
    "array.write_empty_chunks": True,
    "array.order": "C",
}
# zstd's default: more takes several times as long and gains little on logits (benchmarks/encodings.py).
_LEVEL = 3
# zarr's configuration is global: two threads that pin it at once would undo each other.
_pinning = threading.RLock()


@contextlib.contextmanager
def pinned_zarr() -> Iterator[None]:
    """zarr with the settings this format needs, whatever the user's own are."""
    with _pinning, zarr.config.set(_PINNED):
        yield


def metadata(identity: Identity) -> dict[str, bytes]:
    """The metadata files of arrays.zarr by key: spelled here, so that no zarr version can change a byte of them."""
    layout = identity.layout
    numbers, checksum = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    checked = [numbers, checksum]
    sharding = {
        "chunk_shape": [1, layout.chunk_rows, layout.classes],
        "codecs": [numbers, *_compressors(identity), checksum],
        "index_codecs": checked,
        # A file that was cut short loses an index at its end, which is noticed. With the index at the start, zarr takes
        # what was cut off for empty, and reads the fill value.
        "index_location": "end",
    }
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.views, layout.rows, layout.classes],
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, layout.shard_rows, layout.classes]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        # No logit that is stored is ever NaN, so what reads as the fill value is known to be missing.
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": ["view", "row", "class"],
        "storage_transformers": [],
    }
    attributes = {"akd_dist": {"format": identity.format, "identity": identity.model_dump(mode="json")}}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return {GROUP_KEY: _spelled(group), ARRAY_KEY: _spelled(array)}


def _compressors(identity: Identity) -> list[dict[str, Any]]:
    """The codec that makes chunks smaller, if any: of those that Zarr v3 itself names, so that every reader has them.

    Blosc shuffles bytes before it compresses: the high bytes of neighbouring logits are alike.
    """
    if identity.codec.compress == "zstd":
        return [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}]
    if identity.codec.compress == "blosc":
        shuffled = {"cname": "zstd", "clevel": _LEVEL, "shuffle": "shuffle", "typesize": identity.layout.itemsize}
        return [{"name": "blosc", "configuration": shuffled | {"blocksize": 0}}]
    return []


def encode_shard(identity: Identity, shard: Shard, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bytes of a shard's object.

    Args:
        arrays: `logits` [shard.rows, classes] in the stored dtype.
    """
    memory: dict[str, Any] = {}
    with pinned_zarr():
        # zarr reads a shard before it replaces it, even whole. This memory holds none, so the bytes depend on these
        # arrays alone.
        _open(identity, memory)[shard.view, shard.start : shard.stop] = arrays[LOGITS]
    return bytes(memory[shard.key].to_bytes())


def decode_shard(identity: Identity, shard: Shard, data: bytes) -> npt.NDArray[Any]:
    """The logits of a shard's object, [shard.rows, classes] in the stored dtype; every checksum is checked.

    Raises:
        ValueError: the bytes are not a whole shard, with what is wrong with them.
    """
    expected = identity.object_bytes(shard)
    if expected is not None and len(data) != expected:
        raise ValueError(f"{len(data):,} bytes instead of {expected:,}")
    memory: dict[str, Any] = {shard.key: default_buffer_prototype().buffer.from_bytes(data)}
    try:
        with pinned_zarr():
            logits = np.asarray(_open(identity, memory)[shard.view, shard.start : shard.stop])
    except Exception as error:  # damaged bytes come out of zarr as errors of many kinds
        raise ValueError(f"does not decode: {error}") from error
    if not np.isfinite(logits).all():  # an index entry that says "no chunk here" reads as the fill value, NaN
        raise ValueError("holds NaN or infinity, which is never written")
    return logits


def rows_within(identity: Identity, shard: Shard, data: bytes) -> npt.NDArray[Any] | None:
    """The logits within the bytes of a shard's object that are known to be those that were written: no checksum is
    looked at, and nothing is decoded. None where chunks are compressed, or do not follow one another.

    Returns:
        [shard.rows, classes] in the stored dtype.
    """
    layout = identity.layout
    if identity.object_bytes(shard) != len(data):
        return None
    row = layout.classes * layout.itemsize
    chunk, used = layout.chunk_rows * row + CRC_BYTES, -(-shard.rows // layout.chunk_rows)
    entries = layout.shard_rows // layout.chunk_rows
    index = np.frombuffer(data, "<u8", 2 * entries, len(data) - CRC_BYTES - INDEX_ENTRY_BYTES * entries)
    # Offset and size of each chunk, as zarr wrote them.
    if not np.array_equal(index[: 2 * used].reshape(used, 2), [(place * chunk, chunk) for place in range(used)]):
        return None
    kind = np.dtype(layout.dtype).newbyteorder("<")
    strides = (chunk, row, layout.itemsize)
    chunks = np.ndarray((used, layout.chunk_rows, layout.classes), kind, data, strides=strides)
    return chunks.reshape(-1, layout.classes)[: shard.rows]


def _open(identity: Identity, memory: dict[str, Any]) -> zarr.Array[Any]:
    buffer = default_buffer_prototype().buffer
    memory.update({key: buffer.from_bytes(data) for key, data in metadata(identity).items()})
    return zarr.open_array(MemoryStore(memory), path=LOGITS, mode="r+", zarr_format=3)


def _spelled(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
