"""A reader of `top_k` stores written from the page of the format, with json, sha256 and NumPy, and nothing of ours."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def sharded(folder: Path, name: str, digests: list[str]) -> npt.NDArray[Any]:
    """An array [views, items, ...] of the store; every object has the sealed sha256."""
    about = json.loads((folder / name / "zarr.json").read_bytes())
    (views, items, *rest), dtype = about["shape"], np.dtype(about["data_type"]).newbyteorder("<")
    shard = about["chunk_grid"]["configuration"]["chunk_shape"][1]
    chunk = about["codecs"][0]["configuration"]["chunk_shape"][1]
    per_view, found = -(-items // shard), np.zeros((views, items, *rest), dtype)
    for number, digest in enumerate(digests):
        view, index = divmod(number, per_view)
        data = folder.joinpath(name, "c", str(view), str(index), *("0" for _ in rest)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        entries = np.frombuffer(data[-16 * (shard // chunk) - 4 : -4], "<u8").reshape(-1, 2)
        for place, (offset, size) in enumerate(entries.tolist()):
            if offset < 2**64 - 1:  # the last four bytes of a chunk are its crc32c
                first = index * shard + place * chunk
                numbers = np.frombuffer(data[offset : offset + size - 4], dtype).reshape(chunk, *rest)
                found[view, first : first + chunk] = numbers[: items - first]
    return found


def table(folder: Path, objects: list[dict[str, Any]]) -> Arrays:
    """Arrays that the store has once, by name; each is one chunk."""
    held = {one["key"]: (folder / one["key"]).read_bytes() for one in objects}
    assert all(hashlib.sha256(held[one["key"]]).hexdigest() == one["sha256"] for one in objects)
    found = {}
    for key, data in held.items():
        about = json.loads(data) if key.endswith("zarr.json") else {}
        if about.get("node_type") == "array":
            path = key[: -len("/zarr.json")]
            chunk, dtype = held["/".join([path, "c", *("0" for _ in about["shape"])])], np.dtype(about["data_type"])
            found[path.split("/")[-1]] = np.frombuffer(chunk[:-4], dtype.newbyteorder("<")).reshape(about["shape"])
    return found


def read(folder: Path) -> tuple[dict[str, Any], Arrays, dict[str, Arrays]]:
    """The identity, the arrays and the tables of a sealed store of format 4 without compression."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    arrays, shards = folder / "arrays.zarr", manifest["shards"]
    kept = {name: sharded(arrays, name, digests) for name, digests in shards["sha256"].items()}
    return manifest["identity"], kept, {name: table(arrays, it) for name, it in manifest["tables"].items()}


def bits(packed: npt.NDArray[Any], width: int, count: int) -> Any:
    """Whole numbers [n, count] of so many bits, from the low end of each row on."""
    each = np.unpackbits(packed, axis=-1, bitorder="little")[:, : count * width].reshape(len(packed), count, width)
    return (each.astype(np.int64) << np.arange(width)).sum(-1)


def unpacked(identity: dict[str, Any], kept: Arrays) -> Arrays:
    """Classes and logits of the head, mean, curve of the tail and coefficients of targets [n, ...]."""
    coding, high, f64 = identity["encoding"], (identity["classes"] - 1).bit_length() - 16, np.float64
    k, width, ids = coding["k"], coding["value_bits"], kept["ids"].astype(np.int64)
    if high > 0:
        ids += bits(kept["ids_high"], high, k) << 16
    mean, top, below = kept["mean"].astype(f64), kept["top"].astype(f64), np.zeros(ids.shape)
    if k > 1:
        gaps = kept["gaps"].astype(f64) if width == 16 else bits(kept["gaps"], width, k - 1) / (2**width - 1)
        below[:, 1:] = gaps if width == 16 else gaps * top[:, 1:]
    values = ((mean + top[:, 0])[:, None] - below).astype(np.float32)
    c = kept.get("coefficients", np.zeros((len(ids), 0))) / 25.6
    parts: Arrays = {"values": values, "mean": mean, "tail": kept["tail"] / 1024, "coefficients": c}
    return {"ids": ids} | {name: part.astype(np.float32) for name, part in parts.items()}


def probabilities(identity: dict[str, Any], kept: Arrays, said: Arrays, t: float) -> Any:
    """p at a stored temperature t of targets [n, V], in float64, for a rank above 0 and a calibrated dictionary."""
    one, said = unpacked(identity, kept), {name: array.astype(np.float64) for name, array in said.items()}
    ids, (values, mean, tail, c) = one.pop("ids"), (array.astype(np.float64) for array in one.values())
    classes, smallest, nodes = identity["classes"], values[:, -1:], identity["encoding"]["tail_temperatures"]
    first, others, n = values[:, 0], classes - ids.shape[1], len(ids)
    slope = np.minimum((classes * mean - values.sum(1)) / others, smallest[:, 0]) - first
    at, row = [0.0, 0.0, *(1 / node for node in nodes)], [np.full(n, np.log(others))] * 2 + list(tail.T)
    curve, product = row[0], 1.0
    for order in range(1, len(at)):
        pairs = [(i, i + order) for i in range(len(at) - order)]
        row = [(row[i + 1] - row[i]) / (at[j] - at[i]) if at[j] != at[i] else slope for i, j in pairs]
        product *= 1 / t - at[order - 1]
        curve = curve + row[0] * product
    head = np.exp((values - values[:, :1]) / t)
    mass = 1 / (1 + np.exp(np.log(head.sum(1)) - curve))
    weights = np.minimum(mean[:, None] + said["mean_logit"] + c @ said["basis"].T, smallest) / t
    weights += said["tail_calibration"][nodes.index(t)]
    np.put_along_axis(weights, ids, -np.inf, 1)
    e = np.exp(weights - weights.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True) * mass[:, None]
    np.put_along_axis(p, ids, head / head.sum(1, keepdims=True) * (1 - mass)[:, None], 1)
    return p
