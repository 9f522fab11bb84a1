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

from akd_dist.storage.layout import CRC_BYTES, GROUP_KEY, INDEX_ENTRY_BYTES, LOGITS, Shard, StoredArray
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
_NUMBERS: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM = {"name": "crc32c"}
# zarr's configuration is global: two threads that pin it at once would undo each other.
_pinning = threading.RLock()


@contextlib.contextmanager
def pinned_zarr() -> Iterator[None]:
    """zarr with the settings this format needs, whatever the user's own are."""
    with _pinning, zarr.config.set(_PINNED):
        yield


def metadata(identity: Identity) -> dict[str, bytes]:
    """The metadata files of arrays.zarr by key: spelled here, so that no zarr version can change a byte of them.

    Those of tables are among the tables' own objects, see `table_objects`.
    """
    attributes = {"akd_dist": {"format": identity.format, "identity": identity.model_dump(mode="json")}}
    arrays = {array.metadata_key: _array_metadata(identity, array) for array in identity.layout.fields}
    return {GROUP_KEY: _spelled(_group(attributes)), **arrays}


def _array_metadata(identity: Identity, array: StoredArray) -> bytes:
    layout = identity.layout
    checked = [_NUMBERS, _CHECKSUM]
    sharding = {
        "chunk_shape": [1, layout.chunk, *array.shape],
        "codecs": [_NUMBERS, *_compressors(identity, array), _CHECKSUM],
        "index_codecs": checked,
        # A file that was cut short loses an index at its end, which is noticed. With the index at the start, zarr takes
        # what was cut off for empty, and reads the fill value.
        "index_location": "end",
    }
    last = "class" if array.name == LOGITS else array.name
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.views, layout.rows, *array.shape],
        "data_type": array.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, layout.shard_rows, *array.shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        # No number that is stored is ever NaN, so what reads as this fill value is known to be missing.
        "fill_value": _fill_value(array.dtype),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": ["view", "target" if layout.several else "row", *(last for _ in array.shape)],
        "storage_transformers": [],
    }
    return _spelled(document)


def _compressors(identity: Identity, array: StoredArray) -> list[dict[str, Any]]:
    """The codec that makes chunks smaller, if any: of those that Zarr v3 itself names, so that every reader has them.

    Blosc shuffles bytes before it compresses: the high bytes of neighbouring logits are alike.
    """
    if identity.encoded.compress == "zstd":
        return [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}]
    if identity.encoded.compress == "blosc":
        typesize = np.dtype(array.dtype).itemsize
        shuffled = {"cname": "zstd", "clevel": _LEVEL, "shuffle": "shuffle", "typesize": typesize}
        return [{"name": "blosc", "configuration": shuffled | {"blocksize": 0}}]
    return []


def encode_objects(identity: Identity, shard: Shard, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    """The bytes of a shard's objects by key, in the order that they are published in.

    Args:
        arrays: by name, [shard.rows, ...] in the stored dtypes.
    """
    fields = zip(shard.keys, identity.layout.fields, strict=True)
    return {key: _encode_object(identity, shard, array, arrays[array.name]) for key, array in fields}


def encode_shard(identity: Identity, shard: Shard, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bytes of a shard's object, in a store of one array.

    Args:
        arrays: `logits` [shard.rows, classes] in the stored dtype.
    """
    (data,) = encode_objects(identity, shard, arrays).values()
    return data


def _encode_object(identity: Identity, shard: Shard, array: StoredArray, items: npt.NDArray[Any]) -> bytes:
    memory: dict[str, Any] = {}
    with pinned_zarr():
        # zarr reads a shard before it replaces it, even whole. This memory holds none, so the bytes depend on these
        # arrays alone.
        _open(metadata(identity), array.name, memory)[shard.view, shard.start : shard.stop] = items
    return bytes(memory[array.key(shard.view, shard.index)].to_bytes())


def decode_shard(identity: Identity, shard: Shard, data: bytes, array: StoredArray | None = None) -> npt.NDArray[Any]:
    """What a shard's object holds, [shard.rows, ...] in the stored dtype; every checksum is checked.

    Args:
        array: of which it is the object; None in a store of one array.

    Raises:
        ValueError: the bytes are not a whole shard, with what is wrong with them.
    """
    array = array or identity.layout.fields[0]
    expected = _expected_size(identity, shard, array)
    if expected is not None and len(data) != expected:
        raise ValueError(f"{len(data):,} bytes instead of {expected:,}")
    memory: dict[str, Any] = {array.key(shard.view, shard.index): default_buffer_prototype().buffer.from_bytes(data)}
    try:
        with pinned_zarr():
            opened = _open(metadata(identity), array.name, memory)
            items = np.asarray(opened[shard.view, shard.start : shard.stop])
    except Exception as error:  # damaged bytes come out of zarr as errors of many kinds
        raise ValueError(f"does not decode: {error}") from error
    # An index entry that says "no chunk here" reads as the fill value: NaN, which shows, or zero, which does not.
    if np.issubdtype(items.dtype, np.integer) and rows_within(identity, shard, data, array) is None:
        raise ValueError("has chunks in another order, or lacks some")
    if not np.isfinite(items).all():
        raise ValueError("holds NaN or infinity, which is never written")
    return items


def rows_within(
    identity: Identity, shard: Shard, data: bytes, array: StoredArray | None = None
) -> npt.NDArray[Any] | None:
    """The numbers within the bytes of a shard's object that are known to be those that were written: no checksum is
    looked at, and nothing is decoded. None where chunks are compressed, or do not follow one another.

    Args:
        array: as of `decode_shard`.

    Returns:
        [shard.rows, ...] in the stored dtype.
    """
    layout = identity.layout
    array = array or layout.fields[0]
    if _expected_size(identity, shard, array) != len(data):
        return None
    chunk, used = layout.chunk * array.item_bytes + CRC_BYTES, -(-shard.rows // layout.chunk)
    entries = layout.shard_rows // layout.chunk
    index = np.frombuffer(data, "<u8", 2 * entries, len(data) - CRC_BYTES - INDEX_ENTRY_BYTES * entries)
    # Offset and size of each chunk, as zarr wrote them.
    if not np.array_equal(index[: 2 * used].reshape(used, 2), [(place * chunk, chunk) for place in range(used)]):
        return None
    kind = np.dtype(array.dtype).newbyteorder("<")
    strides = (chunk, array.item_bytes, *(kind.itemsize for _ in array.shape))  # no array has more than one axis more
    chunks = np.ndarray((used, layout.chunk, *array.shape), kind, data, strides=strides)
    return chunks.reshape(-1, *array.shape)[: shard.rows]


def _expected_size(identity: Identity, shard: Shard, array: StoredArray) -> int | None:
    sizes = identity.object_sizes(shard)
    return None if sizes is None else sizes[identity.layout.fields.index(array)]


def table_objects(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    """The objects of arrays that a store has once, by key relative to arrays.zarr: metadata, and one chunk of each.

    Args:
        arrays: by name, not empty. One array of the table's own name stands for itself; others make a group of that
            name.
    """
    found = {} if list(arrays) == [name] else {f"{name}/{GROUP_KEY}": _spelled(_group({}))}
    for inner, array in arrays.items():
        path = name if inner == name else f"{name}/{inner}"
        files = {f"{path}/{GROUP_KEY}": _table_metadata(array)}
        memory: dict[str, Any] = {}
        with pinned_zarr():
            _open(files, path, memory)[...] = array
        key = f"{path}/c/{'/'.join('0' for _ in array.shape)}"
        found |= files | {key: bytes(memory[key].to_bytes())}
    return found


def decode_table(name: str, objects: Mapping[str, bytes]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a table's objects, by name; every checksum is checked.

    Raises:
        ValueError: they are not what `table_objects` makes.
    """
    files = {key: data for key, data in objects.items() if key.endswith(f"/{GROUP_KEY}")}
    paths = [key.removesuffix(f"/{GROUP_KEY}") for key in files if b'"array"' in files[key]]
    buffer = default_buffer_prototype().buffer
    found = {}
    for path in paths:
        chunks = {key: buffer.from_bytes(data) for key, data in objects.items() if key.startswith(f"{path}/c/")}
        try:
            with pinned_zarr():
                found[path.rpartition("/")[2]] = np.asarray(_open(files, path, dict(chunks))[...])
        except Exception as error:
            raise ValueError(f"{path} does not decode: {error}") from error
    if table_objects(name, found) != dict(objects):
        raise ValueError(f"{name} is not as it is written here")
    return found


def _table_metadata(array: npt.NDArray[Any]) -> bytes:
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _fill_value(array.dtype.name),
        "codecs": [_NUMBERS, _CHECKSUM],
        "attributes": {},
        "storage_transformers": [],
    }
    return _spelled(document)


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _fill_value(dtype: str) -> str | int:
    return "NaN" if np.issubdtype(dtype, np.floating) else 0


def _open(files: Mapping[str, bytes], path: str, memory: dict[str, Any]) -> zarr.Array[Any]:
    buffer = default_buffer_prototype().buffer
    memory.update({key: buffer.from_bytes(data) for key, data in files.items()})
    return zarr.open_array(MemoryStore(memory), path=path, mode="r+", zarr_format=3)


def _spelled(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
