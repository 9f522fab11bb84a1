"""One path for every root: a local folder and s3:// (a moto server on loopback) are written, read and mended alike."""

from __future__ import annotations

import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from akd_dist.base.errors import DamagedError, HeldError, MachineError, RecipeError, RefusedError
from akd_dist.base.places import absolute
from akd_dist.storage import catalog, removal, repair
from akd_dist.storage.claim import claim_store
from akd_dist.storage.layout import Shard
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.reader import open_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.s3 import S3Root
from akd_dist.storage.writer import create_store, missing_shards
from tests import stores


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> ObjectRoot:
    if request.param == "local":
        return open_root(tmp_path / "stores")
    return open_root(f"{bucket}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}")


def put_marker(bucket: str, key: str) -> None:
    """An empty object whose key ends with a slash, which obstore cannot put."""
    import boto3  # comes with moto

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.put_object(Bucket=urlsplit(bucket).netloc, Key=key, Body=b"")


# ---- the interface


def test_objects_are_published_create_only(root: ObjectRoot) -> None:
    root.check_writable()
    assert root.list() == {}
    assert root.put_new("a/b", b"first")
    assert not root.put_new("a/b", b"second")
    assert root.get("a/b") == b"first"
    root.put("a/c", b"x")
    before = root.list("a")
    root.put("a/c", b"y")
    after = root.list("a")
    assert list(after) == ["a/b", "a/c"]
    assert [stat.size for stat in after.values()] == [5, 1]
    assert before["a/b"] == after["a/b"]
    assert (root.exists("a/b"), root.exists("a"), root.exists("a/d")) == (True, False, False)
    with pytest.raises(ObjectMissing):
        root.get("a/d")
    assert root.move("a/b", "moved/b")
    assert not root.move("a/b", "moved/b")
    assert root.get("moved/b") == b"first"
    assert root.child("a").list().keys() == {"c"}
    assert (root.child("a").parent, root.child("a").name) == (root, "a")
    root.put("top", b"")
    assert (root.folders(), root.files()) == (["a", "moved"], ["top"])
    root.delete("top")
    root.delete("top")
    for folder in ("a", "moved", "none"):
        root.delete_folder(folder)
    assert root.list() == {}


def test_of_many_publishers_one_wins(root: ObjectRoot) -> None:
    ready = threading.Barrier(8)

    def publish(number: int) -> bool:
        ready.wait()
        return root.put_new("contested", bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, range(8)))
    assert won.count(True) == 1
    assert root.get("contested") == bytes([won.index(True)]) * 1000


@pytest.mark.parametrize("key", ["../out", "a/../../out"])
def test_no_key_leaves_its_root(root: ObjectRoot, key: str) -> None:
    for act in (root.get, root.exists, root.delete, lambda key: root.put(key, b"")):
        with pytest.raises(ValueError, match="leaves the root"):
            act(key)


@pytest.mark.parametrize("uri", ["", "file:///x", "https://host/x", "s3://", "a\0b"])
def test_a_root_is_a_folder_or_a_bucket(uri: str) -> None:
    with pytest.raises(RecipeError, match="is no place for stores"):
        open_root(uri)


@pytest.mark.parametrize(
    ("uri", "got"),
    [
        ("s3://b/a//x", "the part '' between two slashes"),
        ("s3://b/../x", "the part '..'"),
        ("s3://b/a/./b", "the part '.'"),
        ("s3://b/a/..", "the part '..'"),
        ("s3://b/a\nb", "the character '\\n'"),
        ("s3://b/\udcff", "the character '\\udcff'"),
        ("s3://b/a?x", "the character '?'"),
        ("s3://b/a#x", "the character '#'"),
        ("s3://[b/a", "the bucket '[b'"),
        ("s3:///x", "no bucket"),
        ("s3:/b/x", "s3:/ at its beginning"),
        ("gs:b/x", "gs: at its beginning"),
    ],
)
def test_a_uri_that_names_no_place_is_refused(uri: str, got: str) -> None:
    with pytest.raises(RecipeError, match="is no place") as refused:
        open_root(uri)
    assert got in str(refused.value.got)
    if not {"?", "#"} & set(uri):
        for place in (uri, f"{uri}/students/a"):
            with pytest.raises(RecipeError):
                absolute(place)


@pytest.mark.parametrize("uri", ["s3://b", "s3://b/", "s3://b/a", "s3://b/a//", "s3://b/ a/~x/..."])
def test_a_uri_may_end_with_slashes(uri: str) -> None:
    assert open_root(absolute(uri)).uri == uri.rstrip("/")


def test_an_empty_object_for_a_folder_is_nothing_in_it(bucket: str) -> None:
    """As consoles of object storage put them."""
    root = open_root(f"{bucket}/marked")
    root.put("receipts/one", b"1")
    for key in ("marked/", "marked/receipts/", "marked/none/"):
        put_marker(bucket, key)
    assert list(root.list("receipts")) == ["receipts/one"]
    assert root.list("none") == {}
    assert root.files() == []
    assert isinstance(root, S3Root)
    assert list(root.below("receipts")) == ["receipts/one"]


# ---- a store's life


def test_a_stores_life_is_the_same_everywhere(root: ObjectRoot, tmp_path: Path) -> None:
    assert catalog.find_store(root.uri, stores.identity()) is None
    writer = create_store(root.uri, stores.creation(), hint={"split": "train"})
    stores.write(writer, writer.layout.shard(0, 0))
    with pytest.raises(RefusedError, match="is not sealed"):
        open_store(writer.uri)
    assert len(missing_shards(writer)) == 3
    with pytest.raises(RefusedError, match="begun in another way"):
        create_store(root.uri, stores.creation(stores.COMPUTED.model_copy(update={"threads": 2})))

    stores.build(root.uri)  # goes on, and seals
    golden = {name.partition("/")[2]: data for name, data in stores.sealed_files(stores.GOLDEN).items()}
    assert {name: writer.store.get(name) for name in golden} == golden
    store = catalog.find_store(root.uri, stores.identity(views=1))
    assert store is not None
    expected = stores.logits(stores.identity())
    np.testing.assert_array_equal(store.rows(1, 250, 260), expected[1, 250:260])
    np.testing.assert_array_equal(stores.decoded(store, tmp_path / "cache"), expected)
    assert [summary.shards_done for summary in catalog.list_stores(root.uri)] == [4]
    assert catalog.resolve_id(root.uri, store.id[:8]) == store.id

    key = "arrays.zarr/logits/c/1/0/0"
    data = writer.store.get(key)
    writer.store.put(key, data[:-1] + b"!")
    with pytest.raises(DamagedError, match="logits/c/1/0/0"):
        stores.decoded(store, tmp_path / "cache")
    writer.store.delete(key)
    with pytest.raises(DamagedError, match="logits/c/1/0/0"):
        open_store(writer.uri)
    assert [entry.key for entry in repair.verify_store(root.uri, store.id)] == [key]
    mended = repair.repair_store(root.uri, store.id, lambda shard, _: stores.recompute(stores.identity(), shard))
    assert mended == [Shard(1, 0, 0, 256)]
    assert {name: writer.store.get(name) for name in golden} == golden
    assert root.folders() == [store.id]
    assert root.files() == []


def test_damage_before_the_seal_is_set_aside_and_collected(root: ObjectRoot) -> None:
    writer = create_store(root.uri, stores.creation())
    shard = writer.layout.shard(0, 1)
    stores.write(writer, shard)
    writer.store.put(f"arrays.zarr/{shard.key}", b"torn")
    assert shard in missing_shards(writer)
    assert len(root.list(f"{writer.id}.damaged")) == 1
    stores.build(root.uri)
    assert len(removal.gc(root.uri)) == 1
    assert root.folders() == [writer.id]


def test_a_claim_is_held_counted_waited_for_and_given_back(root: ObjectRoot) -> None:
    with claim_store(root.uri, "store", beat_every=0.02):
        with pytest.raises(HeldError, match="is held by someone else") as refused, claim_store(root.uri, "store"):
            pass
        assert socket.gethostname() in str(refused.value.got)
        first = root.get("store.claim")
        while root.get("store.claim") == first:
            pass
    assert root.files() == []


# ---- what only object storage has


def test_a_dead_holders_claim_is_taken_over(bucket: str) -> None:
    root = open_root(f"{bucket}/stale")
    root.put("store.claim", b'{"host":"elsewhere","pid":1,"since":"2026-01-01","token":"t","counter":5}')
    told: list[str] = []
    with claim_store(root.uri, "store", wait=True, on_wait=told.append, stale_after=0.2, poll_every=0.02):
        assert b"elsewhere" not in root.get("store.claim")
    assert told == ["waiting for process 1 on elsewhere, since 2026-01-01"]
    assert root.files() == []


def test_storage_that_never_overwrites_on_condition_is_no_endless_wait(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_root(f"{bucket}/stubborn")
    theirs = b'{"host":"elsewhere","pid":1,"since":"2026-01-01","token":"t","counter":5}'
    root.put("store.claim", theirs)
    monkeypatch.setattr(S3Root, "put_if_unchanged", lambda *_: None)  # as Ceph 16 answers every If-Match
    with (
        pytest.raises(MachineError, match=r"store\.claim of a process without a sign"),
        claim_store(root.uri, "store", wait=True, stale_after=0.2, poll_every=0.02),
    ):
        pass
    assert root.get("store.claim") == theirs


def test_a_claim_taken_from_us_is_not_given_back_by_us(bucket: str) -> None:
    root = open_root(f"{bucket}/lost")
    theirs = b'{"host":"elsewhere","pid":1,"since":"2026-01-01","token":"t","counter":5}'
    with claim_store(root.uri, "store", beat_every=0.02):
        root.put("store.claim", theirs)
        threading.Event().wait(0.1)
    assert root.get("store.claim") == theirs


def test_an_object_is_overwritten_only_under_its_tag(bucket: str) -> None:
    root = S3Root(f"{bucket}/tagged")
    root.put("key", b"one")
    _, tag = root.get_tagged("key")
    newer = root.put_if_unchanged("key", b"two", tag)
    assert newer not in (None, tag)
    assert root.put_if_unchanged("key", b"three", tag) is None
    assert root.get("key") == b"two"


def test_a_bucket_that_is_not_there_is_named_without_secrets(bucket: str) -> None:
    root = open_root("s3://no-such-bucket/stores")
    with pytest.raises(MachineError) as refused:
        root.check_writable()
    assert refused.value.code == 6
    assert "s3://no-such-bucket/stores" in refused.value.what
    assert "canary-secret" not in str(refused.value)


def test_storage_that_does_not_answer_is_told_in_bounded_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(MachineError, match=f"cannot read {bucket}/key"):
        open_root(bucket).get("key")


def test_shards_of_object_storage_are_fetched_ahead(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request is on its way before the first is answered; damage is named by the shard that it is in."""
    store = stores.build(f"{bucket}/ahead", stores.creation(views=3))
    real, meeting = S3Root.get, threading.Barrier(2, timeout=60)

    def get(self: S3Root, key: str, most: int | None = None) -> bytes:
        if key.startswith("logits/c/0/"):
            meeting.wait()  # both shards of view 0, or the test fails
        return real(self, key, most)

    monkeypatch.setattr(S3Root, "get", get)
    shards = store.layout.shards()
    for shard, logits in zip(shards, store.shards(shards), strict=True):
        expected = stores.logits(store.manifest.identity)[shard.view, shard.start : shard.stop]
        np.testing.assert_array_equal(logits, expected)
    open_root(store.uri).put(f"arrays.zarr/{shards[3].key}", b"torn")
    with pytest.raises(DamagedError, match=r"logits/c/1/1/0 is damaged"):
        list(store.shards(shards))
