"""Receipts and their packs: few requests for many shards, and nothing believed that is not so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from akd_dist.storage import receipts
from akd_dist.storage.objects import LocalRoot
from akd_dist.storage.receipts import Packer, intact_receipts
from akd_dist.storage.records import Receipt
from akd_dist.storage.writer import StoreWriter, create_store, missing_shards, seal_store
from tests import stores

MANY = stores.creation(views=60)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing was asked of the storage."""
    counts: Counter[str] = Counter()
    for name in ("get", "put", "put_new", "list"):
        real = getattr(LocalRoot, name)

        def counting(self: LocalRoot, *given: Any, real: Any = real, name: str = name) -> Any:
            counts[name] += 1
            return real(self, *given)

        monkeypatch.setattr(LocalRoot, name, counting)
    return counts


@pytest.fixture
def packed(tmp_path: Path) -> StoreWriter:
    """A store of 120 shards, all written, their receipts packed."""
    writer = create_store(str(tmp_path), MANY)
    packer = Packer(writer.store, Receipt, always=True)
    for shard in writer.layout.shards():
        stores.write(writer, shard)
        packer.add(intact_receipts_of(writer, shard.receipt_key))
    packer.flush()
    return writer


def intact_receipts_of(writer: StoreWriter, key: str) -> Any:
    found = receipts.intact_receipt(writer.store, key, Receipt)
    assert found is not None
    return found


def test_resuming_by_listings_reads_no_object(packed: StoreWriter, asked: Counter[str]) -> None:
    assert missing_shards(packed, deep=False) == []
    assert (asked["get"], asked["list"]) == (0, 2)
    (Path(packed.uri) / "arrays.zarr" / packed.layout.shard(3, 1).key).write_bytes(b"torn")
    (Path(packed.uri) / "arrays.zarr" / packed.layout.shard(5, 0).key).unlink()
    assert missing_shards(packed, deep=False) == [packed.layout.shard(3, 1), packed.layout.shard(5, 0)]


def test_sealing_reads_packs_instead_of_receipts(packed: StoreWriter, asked: Counter[str]) -> None:
    seal_store(packed)
    assert asked["get"] <= packed.layout.shard_count / 32  # the pack, and metadata that was there
    assert stores.build(packed.root_uri, MANY).verify() == []


def test_packs_change_no_byte_of_the_seal(packed: StoreWriter, tmp_path: Path) -> None:
    seal_store(packed)
    stores.build(tmp_path / "plain", MANY)
    assert stores.sealed_files(Path(packed.root_uri) / packed.id) == stores.sealed_files(tmp_path / "plain" / packed.id)


def test_a_damaged_pack_is_passed_over(packed: StoreWriter) -> None:
    (pack,) = (Path(packed.uri) / "receipts").glob("packed-*.json")
    pack.write_bytes(pack.read_bytes()[:-9])
    assert len(intact_receipts(packed.store)) == packed.layout.shard_count
    pack.write_bytes(b'{"receipts":[]}')
    assert len(intact_receipts(packed.store)) == packed.layout.shard_count


def test_a_shard_that_is_written_anew_is_vouched_for_by_its_own_receipt(packed: StoreWriter) -> None:
    """A pack of before would vouch for bytes that are gone."""
    shard = packed.layout.shard(0, 0)
    path = Path(packed.uri) / "arrays.zarr" / shard.key
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the same size
    assert missing_shards(packed, deep=True) == [shard]
    assert list((Path(packed.uri) / "receipts").glob("packed-*.json")) == []
    stores.write(packed, shard)
    seal_store(packed)
    assert path.read_bytes() == data


def test_a_folder_needs_no_packs(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), MANY)
    packer = Packer(writer.store, Receipt)
    shard = writer.layout.shard(0, 0)
    stores.write(writer, shard)
    packer.add(intact_receipts_of(writer, shard.receipt_key))
    packer.flush()
    assert [path.name for path in (Path(writer.uri) / "receipts").iterdir()] == ["0-0.json"]
