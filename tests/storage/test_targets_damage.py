"""Damage to stores of format 4: found, named, and mended to the bytes that were sealed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.reader import open_store
from akd_dist.storage.repair import repair_store, verify_store
from akd_dist.storage.writer import missing_shards, receipt_there
from tests import stores, target_stores
from tests.target_stores import KINDS, copied, golden_of, sealed_files

OBJECTS = [
    "dictionary/basis/c/0/0",
    "dictionary/basis/zarr.json",
    "dictionary/zarr.json",
    "offsets/c/0",
    "tail/c/0/1/0",
]
DOCUMENTS = ["dictionary.json", "offsets.json", "fidelity.json", "creation.json", "arrays.zarr/ids/zarr.json"]


@pytest.mark.parametrize(
    ("key", "how"),
    [
        *((f"arrays.zarr/{key}", "lost") for key in OBJECTS),
        *((f"arrays.zarr/{key}", "changed") for key in OBJECTS[:1]),
        *((key, "lost") for key in DOCUMENTS[:3]),
        *((key, "changed") for key in DOCUMENTS[2:]),
    ],
)
def test_damage_is_found_named_and_repaired(tmp_path: Path, key: str, how: str) -> None:
    store = copied("top_k", tmp_path)
    path = Path(store.uri, key)
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [damage.key for damage in verify_store(str(tmp_path), store.id)] == [key]
    if how == "lost" and "arrays.zarr" in key:
        with pytest.raises(DamagedError, match="is damaged"):
            open_store(store.uri)
    identity, asked = store.manifest.identity, list[str]()

    def remake(name: str) -> Mapping[str, npt.NDArray[Any]]:
        asked.append(name)
        return target_stores.remake(identity, name)

    mended = repair_store(
        str(tmp_path), store.id, lambda shard, _: target_stores.recompute(identity, shard), remake=remake
    )
    assert [shard.keys for shard in mended] == ([identity.layout.shard(0, 1).keys] if "tail" in key else [])
    assert asked == [name for name in ("offsets", "dictionary") if key.startswith(f"arrays.zarr/{name}/")]
    assert sealed_files(Path(store.uri)) == sealed_files(golden_of("top_k"))
    assert stores.litter(tmp_path) == []


def test_a_dictionary_that_comes_out_different_is_left(tmp_path: Path) -> None:
    store = copied("top_k", tmp_path)
    lost = Path(store.uri, "arrays.zarr/dictionary/basis/c/0/0")
    lost.unlink()
    identity = store.manifest.identity
    before = sealed_files(Path(store.uri))

    def nothing(shard: Any, _: Any) -> Any:
        raise AssertionError(shard)

    with pytest.raises(RefusedError, match=r"the dictionary of .* is damaged"):
        repair_store(str(tmp_path), store.id, nothing)
    other = {**target_stores.dictionary(identity).arrays(), "mean_logit": np.zeros(300, np.float32)}
    with pytest.raises(DamagedError, match=r"the dictionary of .* was made again and came out different"):
        repair_store(str(tmp_path), store.id, nothing, remake=lambda name: other)
    assert sealed_files(Path(store.uri)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_seal_is_made_again(tmp_path: Path, kind: str) -> None:
    store = target_stores.build(tmp_path, target_stores.creation(kind))
    identity, manifest = store.manifest.identity, Path(store.uri, "manifest.json")
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    if identity.is_top_k:
        Path(store.uri, "arrays.zarr/dictionary/mean_logit/c/0").unlink()
    Path(store.uri, "arrays.zarr", identity.layout.shard(0, 1).keys[-1]).unlink()
    mended = repair_store(
        str(tmp_path),
        store.id,
        lambda shard, _: target_stores.recompute(identity, shard),
        remake=lambda name: target_stores.remake(identity, name),
    )
    assert mended == [identity.layout.shard(0, 1)]
    assert manifest.read_bytes() == whole


def test_every_field_of_the_manifest_is_guarded(tmp_path: Path) -> None:
    store = copied("top_k", tmp_path)
    path = Path(store.uri, "manifest.json")
    fields = json.loads(path.read_bytes())

    def changed(change: Any) -> bytes:
        again = json.loads(path.read_bytes())
        change(again)
        rest = {key: value for key, value in again.items() if key != "sha256"}
        return canonical_json({**rest, "sha256": sha256(canonical_json(rest))})

    changes: list[Any] = [
        lambda it: it["shards"]["size"]["ids"].__setitem__(0, 7),
        lambda it: it["shards"]["size"].pop("ids"),
        lambda it: it["shards"]["sha256"].pop("tail"),
        lambda it: it["shards"]["sha256"]["tail"].pop(),
        lambda it: it["shards"]["probed"].__setitem__(0, 2),
        lambda it: it["tables"].pop("dictionary"),
        lambda it: it.pop("tables"),
        lambda it: it.__setitem__("targets", 3),
        lambda it: it.pop("targets"),
        lambda it: it["zarr_json"].pop("ids/zarr.json"),
        lambda it: it["identity"].__setitem__("items", 4244),
        lambda it: it.__setitem__("probes", []),
    ]
    for change in changes:
        path.write_bytes(changed(change))
        with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
            open_store(store.uri)
        path.write_bytes(canonical_json(fields))
    assert open_store(store.uri).verify() == []


def test_a_receipt_with_any_change_counts_as_missing(tmp_path: Path) -> None:
    writer, said = target_stores.begin(tmp_path, target_stores.creation("top_k"))
    for shard in writer.layout.shards():
        target_stores.write(writer, shard, said)
    shard = writer.layout.shard(0, 1)
    path = Path(writer.uri, shard.receipt_key)
    data = path.read_bytes()
    for place in range(0, len(data), 29):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert missing_shards(writer) == [shard]
        assert receipt_there(writer, shard) is None
    target_stores.write(writer, shard, said)
    assert path.read_bytes() == data
    assert missing_shards(writer) == []
