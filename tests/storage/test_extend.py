"""More views of what a sealed store has: its shards are linked or copied, and only the new ones computed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from akd_dist.storage import catalog, repair
from akd_dist.storage.layout import Shard
from akd_dist.storage.manifest import Identity
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.records import Receipt
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import create_store, missing_shards, take_shards
from tests import stores

ROOT = Path(__file__).parents[2]
NARROW, WIDE = stores.creation(), stores.creation(views=4)
NEW = [shard for shard in WIDE.identity.layout.shards() if shard.view >= 2]


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> ObjectRoot:
    """A root with a sealed store of two views."""
    place = open_root(tmp_path / "stores" if request.param == "local" else f"{bucket}/{request.node.name}")
    stores.build(place.uri, NARROW)
    return place


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder with a sealed store of two views."""
    stores.build(tmp_path / "stores", NARROW)
    return tmp_path / "stores"


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store of four views that was computed whole."""
    folder = tmp_path_factory.mktemp("whole")
    stores.build(folder, WIDE)
    return stores.sealed_files(folder)


def objects(root: ObjectRoot, store_id: str) -> dict[str, bytes]:
    return {key: root.get(key) for key in root.list(store_id) if "/receipts/" not in key and "/source.json" not in key}


def recompute_of(one: Identity) -> repair.Recompute:
    return lambda shard, _: stores.recompute(one, shard)


def shard_file(root: Path, store_id: str, shard: Shard) -> Path:
    return root / store_id / "arrays.zarr" / shard.key


def test_only_the_new_views_are_computed(root: ObjectRoot, from_nothing: dict[str, bytes]) -> None:
    before = {key: (stat.size, root.get(key)) for key, stat in root.list(NARROW.identity.id).items()}
    store, computed = stores.extend(root.uri, WIDE)
    assert computed == NEW
    assert objects(root, store.id) == from_nothing
    assert store.verify() == []
    assert {key: (stat.size, root.get(key)) for key, stat in root.list(NARROW.identity.id).items()} == before
    assert root.folders() == sorted([NARROW.identity.id, store.id])
    assert root.files() == []
    for views, found in [(1, NARROW), (2, NARROW), (3, WIDE), (4, WIDE)]:
        hit = catalog.find_store(root.uri, stores.identity(views=views))
        assert hit is not None
        assert hit.id == found.identity.id


def test_shards_are_hard_links_and_receipts_are_not(local: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in local.rglob("*") if path.is_file()}
    store, _ = stores.extend(local, WIDE)
    for shard in NARROW.identity.layout.shards():
        ours, theirs = (shard_file(local, one, shard) for one in (store.id, NARROW.identity.id))
        assert ours.samefile(theirs)
        assert ours.stat().st_nlink == 2
        receipts = [
            Receipt.from_bytes((local / one / shard.receipt_key).read_bytes(), "") for one in (store.id, ours.parts[-7])
        ]
        assert receipts[0].record() == receipts[1].record()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for path in (local / NARROW.identity.id).rglob("*"):  # a store may go, and what was taken from it stays
        path.unlink() if path.is_file() else None
    assert store.verify() == []


def test_without_hard_links_shards_are_copied(
    local: Path, monkeypatch: pytest.MonkeyPatch, from_nothing: dict[str, bytes]
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store, computed = stores.extend(local, WIDE)
    assert computed == NEW
    assert objects(open_root(local), store.id) == from_nothing
    assert {shard_file(local, store.id, shard).stat().st_nlink for shard in store.layout.shards()} == {1}


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "folder", "swapped"])
def test_a_damaged_shard_is_not_taken_but_computed(local: Path, damage: str, from_nothing: dict[str, bytes]) -> None:
    shard = Shard(1, 0, 0, 256)
    path = shard_file(local, NARROW.identity.id, shard)
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "folder":
        path.mkdir()
    elif damage == "swapped":
        path.write_bytes(shard_file(local, NARROW.identity.id, Shard(0, 0, 0, 256)).read_bytes())
    store, computed = stores.extend(local, WIDE)
    assert computed == [shard, *NEW]
    assert objects(open_root(local), store.id) == from_nothing
    assert [one.key for one in repair.verify_store(str(local), NARROW.identity.id)] == [f"arrays.zarr/{shard.key}"]
    assert stores.litter(local) == []


def test_a_damaged_seal_is_passed_over_with_a_line(local: Path, caplog: pytest.LogCaptureFixture) -> None:
    (local / NARROW.identity.id / "manifest.json").write_bytes(b"{}")
    assert catalog.narrower_stores(str(local), WIDE.identity) == []
    (line,) = caplog.messages
    assert re.search(r"^\w{12} is passed over: .*manifest\.json is damaged", line)
    assert f"akd-dist stores repair {NARROW.identity.id}" in line


@pytest.mark.parametrize("failpoint", ["shard.before_receipt:1", "shard.before_receipt:3", "shard.before_receipt:6"])
def test_an_interrupted_extension_goes_on(local: Path, failpoint: str, from_nothing: dict[str, bytes]) -> None:
    killed = subprocess.run(
        [sys.executable, "-m", "tests.stores", str(local), "4"],
        cwd=ROOT,
        env={**os.environ, "AKD_FAILPOINT": failpoint},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    done = int(failpoint[-1]) - 1  # with receipts; one more shard is published without
    writer = create_store(str(local), WIDE)
    missing = missing_shards(writer)
    assert len(missing) == 8 - done
    taken = take_shards(writer, catalog.narrower_stores(str(local), WIDE.identity)[0], missing)
    assert len(taken) == max(4 - done, 0)
    store, computed = stores.extend(local, WIDE)
    assert computed == NEW[max(done - 4, 0) :]
    assert objects(open_root(local), store.id) == from_nothing
    assert stores.litter(local) == []


def test_what_stood_in_a_taken_shards_place_is_set_aside(local: Path, from_nothing: dict[str, bytes]) -> None:
    writer = create_store(str(local), WIDE)
    torn = shard_file(local, writer.id, Shard(0, 0, 0, 256))
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    store, computed = stores.extend(local, WIDE)
    assert computed == NEW
    assert objects(open_root(local), store.id) == from_nothing
    assert len(list((local / f"{store.id}.damaged").iterdir())) == 1


def test_each_of_two_linked_stores_is_repaired_for_itself(local: Path) -> None:
    store, _ = stores.extend(local, WIDE)
    shard = Shard(0, 1, 256, 300)
    path = shard_file(local, store.id, shard)
    path.write_bytes(b"!" + path.read_bytes()[1:])  # in place, so that both stores are hit
    for one in (WIDE.identity, NARROW.identity):
        assert [damage.key for damage in repair.verify_store(str(local), one.id)] == [f"arrays.zarr/{shard.key}"]
        mended = repair.repair_store(str(local), one.id, recompute_of(one))
        assert mended == [shard]
        assert repair.verify_store(str(local), one.id) == []


# ---- which stores there are to take from


def test_of_narrower_stores_the_widest_comes_first(tmp_path: Path) -> None:
    for views in (1, 3, 2, 6):
        stores.build(tmp_path, stores.creation(views=views))
    stores.build(tmp_path, stores.creation(views=4, data_seed=1))
    stores.build(tmp_path, stores.creation(views=4, format=1))  # keeps no samples
    create_store(str(tmp_path), stores.creation(views=4))  # begun, not sealed
    found = catalog.narrower_stores(str(tmp_path), stores.identity(views=5))
    assert [manifest.identity.views for manifest in found] == [3, 2, 1]
    assert catalog.narrower_stores(str(tmp_path), stores.identity(views=1)) == []


def test_stores_of_other_rows_differ_in_these_alone(tmp_path: Path) -> None:
    for dataset, rows, views in (("b", 300, 2), ("c", 299, 3), ("d", 300, 1)):
        stores.build(tmp_path, stores.creation(dataset=dataset, rows=rows, views=views))
    stores.build(tmp_path, stores.creation(dataset="e", teacher="other"))
    found = catalog.stores_of_other_rows(str(tmp_path), stores.identity(), "train")
    assert sorted(creation.identity.dataset for creation in found) == ["b", "c"]
    assert catalog.stores_of_other_rows(str(tmp_path), stores.identity(), "test") == []
    for hint in tmp_path.glob("*/source.json"):
        hint.write_text("not a hint")
    assert catalog.stores_of_other_rows(str(tmp_path), stores.identity(), "train") == []
