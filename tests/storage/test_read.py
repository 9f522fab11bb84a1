"""Reading a sealed store: whatever happened to it, rows come back as they were sealed, or not at all."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.errors import AkdError, DamagedError, MachineError, RecipeError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.base.locks import file_lock, is_locked
from akd_dist.storage import node_cache, removal
from akd_dist.storage.claim import claim_store
from akd_dist.storage.decoded import open_decoded
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.node_cache import cache_folder, default_budget, make_room
from akd_dist.storage.reader import LogitStore, open_store
from tests import stores

SHARD = "logits/c/1/0/0"
OTHER = "logits/c/0/0/0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed store of the test's own."""
    shutil.copytree(stores.GOLDEN, tmp_path / "stores")
    return next((tmp_path / "stores").iterdir())


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def expected() -> np.ndarray[Any, np.dtype[np.float32]]:
    return stores.logits(stores.identity())


def all_rows(store: LogitStore) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.stack([store.rows(view, 0, store.num_rows) for view in range(store.views)])


def missing(arrays: Path) -> None:
    (arrays / SHARD).unlink()


def all_missing(arrays: Path) -> None:
    shutil.rmtree(arrays / "logits" / "c")


def empty(arrays: Path) -> None:
    (arrays / SHARD).write_bytes(b"")


def truncated(arrays: Path) -> None:
    (arrays / SHARD).write_bytes((arrays / SHARD).read_bytes()[:-1])


def grown(arrays: Path) -> None:
    (arrays / SHARD).write_bytes((arrays / SHARD).read_bytes() + b"\0")


def is_a_folder(arrays: Path) -> None:
    missing(arrays)
    (arrays / SHARD).mkdir()


def swapped(arrays: Path) -> None:
    (arrays / SHARD).rename(arrays / "aside")
    (arrays / OTHER).rename(arrays / SHARD)
    (arrays / "aside").rename(arrays / OTHER)


def flipped(arrays: Path) -> None:
    data = bytearray((arrays / SHARD).read_bytes())
    data[100] ^= 4
    (arrays / SHARD).write_bytes(data)


def another_stores(arrays: Path) -> None:
    (arrays / SHARD).write_bytes((arrays / "logits/c/1/1/0").read_bytes())


BY_SIZE = [missing, all_missing, empty, truncated, grown, is_a_folder]
BY_CONTENT = [swapped, flipped, another_stores]
Damaging = Callable[[Path], None]


# ---- rows


def test_rows_are_what_was_written_across_shards(folder: Path, expected: np.ndarray[Any, Any]) -> None:
    store = open_store(str(folder))
    for view, start, stop in [(0, 0, 300), (1, 250, 260), (0, 256, 256), (1, 299, 300), (0, 0, 1)]:
        rows = store.rows(view, start, stop)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[view, start:stop])
    assert store.shard(1, 1).shape == (44, 3)
    assert store.shard(1, 1).dtype == np.float16
    assert (store.views, store.num_rows, store.classes) == (2, 300, 3)
    for view, start, stop in [(2, 0, 1), (0, 0, 301), (0, -1, 3), (0, 5, 4)]:
        with pytest.raises(IndexError):
            store.rows(view, start, stop)


def test_a_store_travels_to_another_folder_name(folder: Path, tmp_path: Path, expected: np.ndarray[Any, Any]) -> None:
    folder.rename(tmp_path / "copied")
    np.testing.assert_array_equal(all_rows(open_store(str(tmp_path / "copied"))), expected)


# ---- damaged shards


@pytest.mark.parametrize("damage", BY_SIZE)
def test_a_shard_that_is_not_whole_is_refused_at_open(folder: Path, damage: Damaging) -> None:
    damage(folder / "arrays.zarr")
    with pytest.raises(DamagedError) as refused:
        open_store(str(folder))
    assert refused.value.code == 5
    assert "/logits/c/" in refused.value.what
    assert refused.value.next == f"akd-dist stores repair {folder.name} --store-root {folder.parent}"


@pytest.mark.parametrize("damage", BY_CONTENT)
def test_a_shard_of_other_content_is_refused_by_name(folder: Path, damage: Damaging) -> None:
    damage(folder / "arrays.zarr")
    store = open_store(str(folder))
    with pytest.raises(DamagedError, match=SHARD):
        store.rows(1, 0, 1)
    assert {entry.key for entry in store.verify(deep=True)} >= {f"arrays.zarr/{SHARD}"}
    assert store.verify(deep=False) == []


@pytest.mark.parametrize("damage", BY_SIZE + BY_CONTENT)
@pytest.mark.parametrize("decoded", [False, True], ids=["no decoded copy", "decoded copy"])
def test_a_damaged_store_is_refused_though_decoded(
    folder: Path, cache_root: Path, damage: Damaging, decoded: bool
) -> None:
    store = open_store(str(folder))
    if decoded:
        stores.decoded(store, cache_root)
    damage(folder / "arrays.zarr")
    with pytest.raises(DamagedError, match=r"logits/c/\d/0/0 is damaged"):
        stores.decoded(store, cache_root)
    if not decoded:
        assert not list(cache_root.rglob("*-1/logits.npy*"))


def test_every_bit_flip_is_found(folder: Path, expected: np.ndarray[Any, Any]) -> None:
    """300 seeded flips over all sealed files: refused, or (never seen) harmless; wrong rows, never."""
    flips = random.Random(7)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "arrays.zarr" in str(path)]
    files.append(folder / "manifest.json")
    caught = 0
    for _ in range(300):
        path = flips.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[flips.randrange(len(bad))] ^= 1 << flips.randrange(8)
        path.write_bytes(bad)
        try:
            np.testing.assert_array_equal(all_rows(open_store(str(folder))), expected)
        except AkdError:
            caught += 1
        path.write_bytes(good)
    assert caught == 300


# ---- damaged documents


@pytest.mark.parametrize("key", ["zarr.json", "logits/zarr.json"])
def test_edited_zarr_metadata_is_refused(folder: Path, key: str) -> None:
    path = folder / "arrays.zarr" / key
    path.write_text(path.read_text().replace("zarr_format", "zarr_fornat"))
    with pytest.raises(DamagedError, match=rf"arrays\.zarr/{key} is damaged"):
        open_store(str(folder))
    path.unlink()
    with pytest.raises(DamagedError, match=rf"arrays\.zarr/{key} is damaged"):
        open_store(str(folder))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value[:-1]}0" if value[-1:] != "0" else f"{value[:-1]}1"


MANIFEST = json.loads(next(stores.GOLDEN.glob("*/manifest.json")).read_bytes())


@pytest.mark.parametrize("reseal", [False, True], ids=["edited", "edited and hashed again"])
def test_no_edited_field_of_a_manifest_is_accepted(folder: Path, reseal: bool) -> None:
    """Hashed again, only what the reader has no second account of can pass: what was computed how, and about what."""
    vouched_by_the_hash_alone = ("computed", "dataset", "teacher", "finite", "label_agreement", "probes", "shards")
    for path in leaves(MANIFEST):
        manifest = json.loads(json.dumps(MANIFEST))
        holder = manifest
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = changed(holder[path[-1]])
        if reseal:
            if path[0] in vouched_by_the_hash_alone or path == ("sha256",):
                continue
            rest = {key: value for key, value in manifest.items() if key != "sha256"}
            manifest["sha256"] = sha256(canonical_json(rest))
        (folder / "manifest.json").write_bytes(canonical_json(manifest))
        with pytest.raises((DamagedError, RefusedError)) as refused:
            open_store(str(folder))
        named = ("manifest.json", "arrays.zarr", "encoding") if reseal else ("manifest.json",)
        assert any(name in refused.value.what for name in named), path


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda manifest: manifest | {"note": "x"}, "note: Extra inputs are not permitted"),
        (lambda manifest: {key: value for key, value in manifest.items() if key != "id"}, "id: Field required"),
        (lambda manifest: manifest | {"id": 7}, "id: Input should be a valid string"),
        (lambda manifest: manifest | {"shards": []}, "sha256: "),
        (lambda manifest: [], "the document: "),
    ],
)
def test_a_manifest_of_other_fields_is_refused_by_field(folder: Path, spoil: Callable[[Any], Any], got: str) -> None:
    (folder / "manifest.json").write_bytes(canonical_json(spoil(MANIFEST)))
    with pytest.raises(DamagedError) as refused:
        open_store(str(folder))
    assert str(refused.value.got).startswith(got)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null", canonical_json(MANIFEST) + b"\n"])
def test_a_manifest_of_other_bytes_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        open_store(str(folder))


def test_a_manifest_that_leads_out_of_the_store_is_refused(folder: Path) -> None:
    manifest = json.loads(next(stores.GOLDENS[2].glob("*/manifest.json")).read_bytes())  # later ones name no keys
    manifest["shards"][0]["key"] = "../../../../etc/passwd"
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    (folder / "manifest.json").write_bytes(canonical_json({**rest, "sha256": sha256(canonical_json(rest))}))
    with pytest.raises(DamagedError, match="damaged"):
        open_store(str(folder))


@pytest.mark.parametrize("newer", [{"format": 5}, {"format": 5, "something": "new"}])
def test_a_newer_format_is_refused_naming_both_versions(folder: Path, newer: dict[str, Any]) -> None:
    (folder / "manifest.json").write_bytes(canonical_json({**MANIFEST, **newer}))
    with pytest.raises(RefusedError) as refused:
        open_store(str(folder))
    assert (refused.value.code, refused.value.got, refused.value.expected) == (4, "format 5", "format 4 or older")


def test_manifests_know_their_shards_and_creation() -> None:
    manifest = Manifest.from_bytes(canonical_json(MANIFEST), "manifest.json")
    assert manifest.creation() == stores.creation()
    for shard in manifest.identity.layout.shards():
        assert manifest.record(shard).key == shard.key


# ---- the decoded copy


def test_decoded_is_the_stored_array_once_per_node(
    folder: Path, cache_root: Path, expected: np.ndarray[Any, Any]
) -> None:
    store = open_store(str(folder))
    steps: list[tuple[int, int]] = []
    first = stores.decoded(store, cache_root, on_progress=lambda done, of: steps.append((done, of)))
    assert steps == [(1, 2), (2, 2)] * 2
    assert (first[0].dtype, first[0].flags.writeable) == (np.dtype(np.float16), False)
    np.testing.assert_array_equal(first, expected)
    again = stores.decoded(store, cache_root, on_progress=lambda done, of: steps.append((done, of)))
    np.testing.assert_array_equal(again, expected)
    assert len(steps) == 4  # nothing was read again
    assert len(list(cache_root.glob("logits/*/logits.npy"))) == 2


def test_a_view_that_nobody_reads_is_not_decoded(folder: Path, cache_root: Path) -> None:
    store = open_store(str(folder))
    (folder / "arrays.zarr" / OTHER).write_bytes(bytes((folder / "arrays.zarr" / OTHER).stat().st_size))
    np.testing.assert_array_equal(open_decoded(store, cache_root, 1)[:44], store.rows(1, 0, 44))
    with pytest.raises(DamagedError, match=OTHER):
        open_decoded(store, cache_root, 0)


def test_a_shard_touched_since_is_read_again_and_only_it(folder: Path, cache_root: Path) -> None:
    store = open_store(str(folder))
    stores.decoded(store, cache_root)
    path = folder / "arrays.zarr" / SHARD
    path.write_bytes(path.read_bytes())  # another object, the same content
    steps: list[tuple[int, int]] = []
    for _ in range(2):
        stores.decoded(store, cache_root, on_progress=lambda done, of: steps.append((done, of)))
    assert steps == [(1, 1)]


def test_a_decoded_copy_that_was_changed_is_decoded_again(
    folder: Path, cache_root: Path, expected: np.ndarray[Any, Any]
) -> None:
    store = open_store(str(folder))
    open_decoded(store, cache_root)
    path = next(cache_root.glob("logits/*/logits.npy"))
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-6] + bytes(6))
    np.testing.assert_array_equal(open_decoded(store, cache_root), expected[0])
    next(cache_root.glob("logits/*/verified.json")).write_text("{}")
    np.testing.assert_array_equal(open_decoded(store, cache_root), expected[0])


def test_entries_in_use_stay_and_others_go_when_room_is_needed(tmp_path: Path, cache_root: Path) -> None:
    open_stores = [stores.build(tmp_path, stores.creation(data_seed=seed)) for seed in range(3)]
    entries = [cache_root / "logits" / f"{store.manifest.sha256[:32]}-0" for store in open_stores]
    oldest = open_decoded(open_stores[0], cache_root)[5:7]  # a slice of the map keeps it, too
    open_decoded(open_stores[1], cache_root)
    os.utime(entries[1] / "in-use", (1, 1))
    gc.collect()
    open_decoded(open_stores[2], cache_root, budget=8_500)
    assert [entry.exists() for entry in entries] == [True, False, True]
    with pytest.raises(MachineError) as refused:
        make_room(cache_root, 10_000, budget=12_000, keep=[entries[2]])
    assert "10,000 bytes within a budget of 12,000" in str(refused.value.expected)
    assert [entry.exists() for entry in entries] == [True, False, True]
    del oldest
    gc.collect()
    make_room(cache_root, 10_000, budget=12_000)
    assert not any(entry.exists() for entry in entries)


def test_what_can_never_fit_evicts_nothing(folder: Path, cache_root: Path) -> None:
    """Checkpoints may rest on what is there."""
    open_decoded(open_store(str(folder)), cache_root)
    gc.collect()
    (entry,) = cache_root.glob("logits/*-0")
    with pytest.raises(MachineError, match="no room in the cache"):
        make_room(cache_root, 12_001, budget=12_000)
    assert entry.exists()
    make_room(cache_root, 12_000, budget=12_000)
    assert not entry.exists()


def test_what_cannot_fit_is_refused_with_need_free_and_budget(folder: Path, cache_root: Path) -> None:
    with pytest.raises(MachineError) as refused:
        open_decoded(open_store(str(folder)), cache_root, budget=1000)
    assert refused.value.code == 6
    assert "bytes free" in str(refused.value.got)
    assert str(refused.value.expected) == "5,896 bytes within a budget of 1,000"
    with pytest.raises(MachineError):
        make_room(cache_root, 2**62, budget=None)


@pytest.mark.parametrize(("text", "size"), [("", None), ("1500", 1500), ("50GB", 50 * 10**9), ("1.5KiB", 1536)])
def test_the_default_budget(monkeypatch: pytest.MonkeyPatch, text: str, size: int | None) -> None:
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", text)
    assert default_budget() == size


@pytest.mark.parametrize("text", ["much", "5 XB", "-1", "1_0GB", "\u0661\u0660GB"])
def test_a_budget_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, cache_root: Path, text: str) -> None:
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", text)
    with pytest.raises(RecipeError, match="AKD_DIST_CACHE_BUDGET"):
        make_room(cache_root, 1, None)


def test_what_a_killed_decoder_left_is_removed(folder: Path, cache_root: Path) -> None:
    store = open_store(str(folder))
    left = cache_root / "logits" / f"{store.manifest.sha256[:32]}-0.0123456789ab.partial"
    left.mkdir(parents=True)
    (left / "logits.npy").write_bytes(b"half")
    open_decoded(store, cache_root)
    assert not left.exists()


def test_a_fresh_copy_is_held_from_its_name_on(folder: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another process that makes room meanwhile takes it away again, and its maker maps nothing."""
    store = open_store(str(folder))
    entry, removed = cache_root / "logits" / f"{store.manifest.sha256[:32]}-0", shutil.rmtree

    def another_makes_room(path: Path, **how: Any) -> None:
        if entry.exists():
            node_cache.evict(entry)
        removed(path, **how)

    monkeypatch.setattr(shutil, "rmtree", another_makes_room)
    mapped = open_decoded(store, cache_root)
    monkeypatch.undo()
    assert (entry / "logits.npy").exists()
    assert np.array_equal(mapped, store.rows(0, 0, store.num_rows).astype(mapped.dtype))
    del mapped
    gc.collect()
    node_cache.evict(entry)
    assert not entry.exists()


@pytest.mark.parametrize("made_anew", [False, True])
def test_an_entry_that_is_discarded_while_it_is_evicted(
    made_anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, flock = tmp_path / "logits" / "one", fcntl.flock
    entry.mkdir(parents=True)
    (entry / "in-use").touch()

    def meanwhile(descriptor: int, kind: int) -> None:
        if kind == fcntl.LOCK_EX | fcntl.LOCK_NB and not (tmp_path / "aside").exists():
            entry.rename(tmp_path / "aside")
            if made_anew:
                entry.mkdir()
                (entry / "in-use").touch()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    node_cache.evict(entry)
    assert (tmp_path / "aside").exists()
    assert entry.exists() == made_anew


def test_what_killed_processes_left_goes_and_what_lives_counts(cache_root: Path) -> None:
    left, making = (cache_root / "rows" / f"{name}.0123456789ab.partial" for name in ("left", "making"))
    for folder in (left, making):
        folder.mkdir(parents=True)
        (folder / "train.npy").write_bytes(bytes(1000))
    with file_lock(cache_root / "rows" / "making.lock", what="the rows"):
        make_room(cache_root, 1000, budget=2000)
        assert [left.exists(), making.exists()] == [False, True]
        with pytest.raises(MachineError, match="no room in the cache"):
            make_room(cache_root, 1001, budget=2000)
    make_room(cache_root, 1001, budget=2000)
    assert not making.exists()


def test_room_is_taken_before_others_are_given_any(cache_root: Path) -> None:
    """Two that make room at once: what the first is about to write counts for the second."""
    making = cache_root / "rows" / "first.0123456789ab.partial"

    def reserve() -> None:
        making.mkdir(parents=True)
        (making / "train.npy").write_bytes(bytes(1500))

    with file_lock(cache_root / "rows" / "first.lock", what="the rows"):
        make_room(cache_root, 1500, budget=2000, reserve=reserve)
        with pytest.raises(MachineError, match="no room in the cache"):
            make_room(cache_root, 1000, budget=2000, reserve=lambda: pytest.fail("there is no room"))


@pytest.mark.parametrize("held", ["the run", "a store", "an entry"])
def test_a_look_refuses_nobody(held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks whether a file is locked has it locked meanwhile, here until the lock is tried again."""
    path = tmp_path / f"{'ab' * 32}.claim"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(descriptor, fcntl.LOCK_UN))
    if held == "an entry":
        assert not is_locked(path, shared=True)
    else:
        with file_lock(path, what=held, wait=0) if held == "the run" else claim_store(str(tmp_path), path.stem):
            pass
    os.close(descriptor)


def test_tokens_of_a_living_command_are_no_litter(tmp_path: Path) -> None:
    living, dead = (tmp_path / f".seen-{name}.partial" for name in ("living", "dead"))
    dead.touch()
    with file_lock(living, what="a token"):
        for dry_run in (True, False):
            assert removal.gc(str(tmp_path), dry_run=dry_run) == [dead.name]
        assert living.exists()
        assert not dead.exists()
    assert removal.gc(str(tmp_path)) == [living.name]


def test_the_cache_root_is_the_users_or_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AKD_DIST_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("AKD_DIST_CACHE")
    assert cache_folder().name == "akd-dist"
