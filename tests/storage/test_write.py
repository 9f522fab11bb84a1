"""Writing: interrupted anywhere, twice at once, resumed under other settings; always the same store or a refusal."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.base.files import publish_new
from akd_dist.storage.catalog import receipts_of
from akd_dist.storage.layout import Shard
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import LocalRoot
from akd_dist.storage.reader import open_store
from akd_dist.storage.records import Receipt
from akd_dist.storage.repair import repair_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import StoreWriter, adopt_shard, create_store, missing_shards, seal_store, write_shard
from tests import stores

ROOT = Path(__file__).parents[2]
# Every step of writing the golden store at which a process can die; its shards and receipts are published 4th to 11th.
FAILPOINTS = [
    "publish.before_link:1",  # the creation document
    "publish.before_link:3",  # the array's metadata
    "publish.before_link:4",  # a shard
    "publish.before_link:5",  # its receipt
    "publish.before_link:12",  # the manifest
    "shard.before_publish:1",
    "shard.before_publish:4",
    "shard.before_receipt:1",
    "shard.before_receipt:4",
    "seal.before_manifest:1",
]


def run_writer(root: Path, failpoint: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "AKD_FAILPOINT": failpoint}
    return subprocess.Popen([sys.executable, "-m", "tests.stores", str(root)], cwd=ROOT, env=environment)


# ---- killed and resumed


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_at_a_failpoint_then_resumed_is_the_same_store(tmp_path: Path, failpoint: str) -> None:
    assert run_writer(tmp_path, failpoint).wait() == -signal.SIGKILL
    assert not list(tmp_path.rglob("manifest.json"))
    stores.build(tmp_path)
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)
    assert stores.litter(tmp_path) == []


def test_killed_at_random_then_resumed_is_the_same_store(tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(4):
        process = run_writer(tmp_path)
        time.sleep(moments.uniform(0.3, 0.8))
        process.kill()
        process.wait()
    stores.build(tmp_path)
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)
    assert stores.litter(tmp_path) == []


def test_a_shard_without_receipt_is_adopted(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation(encoding={"name": "float32"}))
    shard = missing_shards(writer)[0]
    stores.write(writer, shard)
    writer.store.delete(shard.receipt_key)
    before = (Path(writer.uri) / "arrays.zarr" / shard.key).stat()
    assert shard in missing_shards(writer)
    adopted = adopt_shard(writer, shard)
    np.testing.assert_array_equal(adopted, stores.logits(writer.creation.identity)[0, :256])
    stores.write(writer, shard)
    assert shard not in missing_shards(writer)
    assert (Path(writer.uri) / "arrays.zarr" / shard.key).stat().st_mtime_ns == before.st_mtime_ns
    assert adopt_shard(writer, missing_shards(writer)[0]) is None


# ---- two at once


def race(root: str, start: float) -> str:
    """One of several drivers that take no claim: all shards, then the seal."""
    writer = create_store(root, stores.creation())
    while time.time() < start:
        pass
    for shard in writer.layout.shards():
        stores.write(writer, shard)
    return seal_store(writer).sha256


@pytest.fixture(scope="module")
def two_processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * 2))  # both are up before the first race
        yield pool


def test_two_writers_of_the_same_shards_make_one_store(tmp_path: Path, two_processes: ProcessPoolExecutor) -> None:
    golden = stores.sealed_files(stores.GOLDEN)
    for attempt in range(6):
        root = tmp_path / str(attempt)
        sealed = list(two_processes.map(race, [str(root)] * 2, [time.time() + 0.1] * 2))
        assert len(set(sealed)) == 1
        assert stores.sealed_files(root) == golden
        assert stores.litter(root) == []


def publish(path: str, content: bytes, start: float) -> bool:
    while time.time() < start:
        pass
    return publish_new(Path(path), content)


def test_create_only_publishing_has_one_winner_whose_bytes_stay(
    tmp_path: Path, two_processes: ProcessPoolExecutor
) -> None:
    contents = [bytes([letter]) * 100_000 for letter in b"ab"]
    for attempt in range(20):
        path = tmp_path / str(attempt)
        won = list(two_processes.map(publish, [str(path)] * 2, contents, [time.time() + 0.02] * 2))
        assert sorted(won) == [False, True]
        assert path.read_bytes() == contents[won.index(True)]
    assert stores.litter(tmp_path) == []


def test_a_zombies_other_bytes_never_replace_a_receipted_shard(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    shard = missing_shards(writer)[0]
    stores.write(writer, shard)
    other = stores.logits(writer.creation.identity)[0, :256] + 1
    receipt = write_shard(writer, shard, other, label_agreement=0.5, probes=[], seconds=0.0)
    assert receipt.label_agreement == stores.LABEL_AGREEMENT  # the first writer's receipt
    assert shard not in missing_shards(writer)


def test_a_partial_file_that_was_swept_away_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, calls = os.link, []

    def sweep_first(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 1:
            source.unlink()
        link(source, target)

    monkeypatch.setattr(os, "link", sweep_first)
    assert publish_new(tmp_path / "object", b"data")
    assert ((tmp_path / "object").read_bytes(), len(calls)) == (b"data", 2)


# ---- damage before the seal


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "swapped", "folder", "bad receipt"])
def test_a_shard_that_fails_its_receipt_is_redone(tmp_path: Path, damage: str) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    for shard in writer.layout.shards():
        stores.write(writer, shard)
    shard = writer.layout.shard(1, 0)
    path = Path(writer.uri) / "arrays.zarr" / shard.key
    if damage == "bad receipt":
        (Path(writer.uri) / shard.receipt_key).write_text("{}")
    else:
        spoil(path, damage)
    assert missing_shards(writer) == [shard]
    stores.write(writer, shard)
    seal_store(writer)
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.touch()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "swapped":
        path.write_bytes(path.parents[2].joinpath("0/0/0").read_bytes())
    elif damage == "folder":
        path.mkdir()


@pytest.mark.parametrize("length", [0, 1, 255, 1500, 1555, 1556, 1559])
def test_a_torn_shard_without_receipt_is_set_aside(tmp_path: Path, length: int) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    shard = writer.layout.shard(0, 1)
    stores.write(writer, shard)
    writer.store.delete(shard.receipt_key)
    path = Path(writer.uri) / "arrays.zarr" / shard.key
    path.write_bytes(path.read_bytes()[:length])
    assert adopt_shard(writer, shard) is None
    assert not path.exists()
    assert len(list((tmp_path / f"{writer.id}.damaged").iterdir())) == 1


def test_a_sealed_store_is_never_written_over(tmp_path: Path) -> None:
    store = stores.build(tmp_path)
    writer = StoreWriter(str(tmp_path), stores.creation())
    shard = writer.layout.shard(0, 0)
    path = Path(store.uri) / "arrays.zarr" / shard.key
    spoil(path, "flipped")
    damaged = path.read_bytes()
    assert missing_shards(writer) == []
    with pytest.raises(DamagedError, match="is sealed, and view 0, shard 0") as refused:
        stores.write(writer, shard)
    assert refused.value.next == f"akd-dist stores repair {store.id} --store-root {tmp_path}"
    assert path.read_bytes() == damaged


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"batch_rows": 128}, "computed.batch_rows: 128 != 256"),
        ({"threads": 2}, "computed.threads: 2 != 1"),
        ({"device": "cuda"}, "computed.device: cuda != cpu"),
        ({"versions": {"torch": "2.14.0", "numpy": "2.3.5"}}, "computed.versions.torch: 2.14.0 != 2.13.0"),
    ],
)
def test_a_resume_under_other_pins_is_refused_with_both_sides(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    create_store(str(tmp_path), stores.creation())
    with pytest.raises(RefusedError) as refused:
        create_store(str(tmp_path), stores.creation(stores.COMPUTED.model_copy(update=change)))
    assert refused.value.code == 4
    assert field in str(refused.value.got)


def test_non_finite_logits_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    shard = writer.layout.shard(1, 1)
    logits = stores.logits(writer.creation.identity)[1, 256:].copy()
    logits[5, 2] = 70_000
    with pytest.raises(RefusedError, match="not finite as float16: row 261"):
        write_shard(writer, shard, logits, label_agreement=0.5, probes=[], seconds=0.0)
    with pytest.raises(RefusedError, match="wrong shape") as refused:
        write_shard(writer, shard, logits[:, :2], label_agreement=0.5, probes=[], seconds=0.0)
    assert (refused.value.got, refused.value.expected) == ("(44, 2)", "(44, 3)")
    assert len(missing_shards(writer)) == 4
    assert not list(tmp_path.rglob("c/*"))


def test_an_incomplete_store_is_not_sealed_nor_read(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    stores.write(writer, writer.layout.shard(0, 0))
    with pytest.raises(RefusedError, match=r"cannot be sealed: view 0, shard 1 \(rows 256 to 300\) is missing"):
        seal_store(writer)
    with pytest.raises(RefusedError, match="is not sealed") as refused:
        open_store(writer.uri)
    assert "akd-dist cache-teacher" in str(refused.value.next)
    with pytest.raises(RefusedError, match="there is no store at"):
        open_store(str(tmp_path / "nothing"))


def test_a_seal_finds_a_shard_whose_size_changed(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    for shard in writer.layout.shards():
        stores.write(writer, shard)
    spoil(Path(writer.uri) / "arrays.zarr" / "logits/c/1/1/0", "truncated")
    with pytest.raises(DamagedError, match="view 1, shard 1"):
        seal_store(writer)
    assert not list(tmp_path.rglob("manifest.json"))


def test_foreign_metadata_is_refused(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    path = Path(writer.uri) / "arrays.zarr" / "logits" / "zarr.json"
    path.write_text(path.read_text().replace("float16", "int16"))
    with pytest.raises(DamagedError, match=r"logits/zarr\.json is not what"):
        create_store(str(tmp_path), stores.creation())


def test_receipts_and_not_manifests_tell_host_and_seconds(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    shard = writer.layout.shard(0, 0)
    stores.write(writer, shard)
    receipt = Receipt.from_bytes(writer.store.get(shard.receipt_key), "receipt")
    assert receipt.host
    assert set(receipt.model_dump()) - set(receipt.record().model_dump()) == {"host", "seconds", "creation", "checksum"}
    for rest in writer.layout.shards()[1:]:
        stores.write(writer, rest)
    assert seal_store(writer) == Manifest.from_bytes(writer.store.get("manifest.json"), "manifest")


# ---- the environment


def test_a_full_disk_is_told_with_path_and_bytes(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from tests import stores\n"
        "from akd_dist.base.errors import MachineError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))\n"
        "try: stores.build(sys.argv[1])\n"
        "except MachineError as error: print(error); sys.exit(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "no room to write" in done.stdout
    assert "logits/c/0/0/0" in done.stdout
    assert "1,560 bytes free" in done.stdout
    stores.build(tmp_path)  # with room again
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)
    assert stores.litter(tmp_path) == []


def test_a_root_that_cannot_publish_create_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(tmp_path / "root")
    root.check_writable()
    assert list((tmp_path / "root").iterdir()) == []
    monkeypatch.setattr(LocalRoot, "put_new", lambda root, key, data: True)
    with pytest.raises(MachineError, match="without overwriting"):
        root.check_writable()
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with pytest.raises(MachineError, match="cannot write"):
        open_root(tmp_path / "file" / "root").check_writable()


def test_without_hard_links_o_excl_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    stores.build(tmp_path)
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)
    assert not publish_new(next(tmp_path.rglob("manifest.json")), b"other")


# ---- receipts, and what they say of the creation document


def flipped(data: bytes, position: int) -> bytes:
    """The same with one character changed, to another one of its kind: such a change is no syntax error."""
    alike = {range(48, 58): b"0123456789", range(97, 123): b"abcdef", range(65, 91): b"ABCDEF"}
    letters = next((letters for kind, letters in alike.items() if data[position] in kind), b"!?")
    other = letters[(letters.find(data[position : position + 1]) + 1) % len(letters)]
    return data[:position] + bytes([other]) + data[position + 1 :]


@pytest.fixture
def unsealed(tmp_path: Path) -> StoreWriter:
    """A store whose shards are all there, and not sealed."""
    writer = create_store(str(tmp_path / "stores"), stores.creation())
    for shard in writer.layout.shards():
        stores.write(writer, shard)
    return writer


def test_a_receipt_with_any_change_counts_as_missing(unsealed: StoreWriter) -> None:
    """Every position is found; for each field, all ends as undisturbed: in a shard of whole numbers, and of others."""
    for shard in (unsealed.layout.shard(0, 0), unsealed.layout.shard(1, 1)):
        path = Path(unsealed.uri) / shard.receipt_key
        data, object_time = path.read_bytes(), (Path(unsealed.uri) / "arrays.zarr" / shard.key).stat().st_mtime_ns
        for position in range(len(data)):
            path.write_bytes(flipped(data, position))
            assert missing_shards(unsealed) == [shard], flipped(data, position)
        for field in set(Receipt.model_fields) - {"objects", "dictionary"}:  # of stores of targets
            path.write_bytes(flipped(data, data.index(f'"{field}":'.encode()) + len(field) + 4))
            assert missing_shards(unsealed) == [shard]
            stores.write(unsealed, shard)
            assert path.read_bytes() == data
        assert (Path(unsealed.uri) / "arrays.zarr" / shard.key).stat().st_mtime_ns == object_time
    seal_store(unsealed)
    assert stores.sealed_files(Path(unsealed.root_uri)) == stores.sealed_files(stores.GOLDEN)


def test_a_damaged_receipt_is_not_sealed(unsealed: StoreWriter) -> None:
    path = Path(unsealed.uri) / unsealed.layout.shard(1, 0).receipt_key
    path.write_bytes(path.read_bytes().replace(b'"label_agreement":0.75', b'"label_agreement":0.74'))
    with pytest.raises(RefusedError, match=r"view 1, shard 0 .* is missing"):
        seal_store(unsealed)


def test_a_receipt_of_before_checksums_counts_as_not_there(tmp_path: Path) -> None:
    old = stores.creation(format=2)
    unsealed = create_store(str(tmp_path), old)
    for shard in unsealed.layout.shards():
        stores.write(unsealed, shard)
    shutil.rmtree(Path(unsealed.uri) / "receipts")
    shutil.copytree(next(stores.GOLDENS[2].iterdir()) / "receipts", Path(unsealed.uri) / "receipts")
    assert missing_shards(unsealed) == unsealed.layout.shards()
    stores.build(unsealed.root_uri, old)
    assert stores.sealed_files(Path(unsealed.root_uri)) == stores.sealed_files(stores.GOLDENS[2])
    golden = next(stores.GOLDENS[2].iterdir())
    told = receipts_of(str(golden.parent), golden.name)  # of a sealed store it is told all the same
    assert [receipt.host for receipt in told] == ["golden"] * 4


def test_a_shard_that_was_computed_in_another_way_is_set_aside(tmp_path: Path) -> None:
    """As where somebody removed `creation.json` and began again with other pins: a last bit may differ."""
    writer = create_store(str(tmp_path), stores.creation(stores.COMPUTED.model_copy(update={"threads": 2})))
    stores.write(writer, writer.layout.shard(0, 0))
    writer.store.delete("creation.json")
    writer = create_store(str(tmp_path), stores.creation())
    assert missing_shards(writer) == writer.layout.shards()
    assert adopt_shard(writer, writer.layout.shard(0, 0)) is None
    stores.build(tmp_path)
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDEN)


def test_a_changed_creation_is_put_back_by_its_receipts(unsealed: StoreWriter) -> None:
    path = Path(unsealed.uri) / "creation.json"
    data = path.read_bytes()
    for position in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(flipped(data, position))
        create_store(unsealed.root_uri, unsealed.creation)
        assert path.read_bytes() == data
    path.unlink()
    path.mkdir()
    create_store(unsealed.root_uri, unsealed.creation)
    assert path.read_bytes() == data
    shutil.rmtree(path.parent / "receipts")  # nothing vouches for what was settled any more
    for spoilt in (b"", data[:-1], flipped(data, data.index(b"threads") + 9)):
        path.write_bytes(spoilt)
        with pytest.raises((DamagedError, RefusedError), match=r"creation\.json is damaged|begun in another way"):
            create_store(unsealed.root_uri, unsealed.creation)


def test_repair_needs_receipts_that_name_the_creation(unsealed: StoreWriter) -> None:
    """The manifest is damaged, and a digit of how the logits were computed has changed: nothing wrong is sealed."""
    seal_store(unsealed)
    root, folder = Path(unsealed.root_uri), Path(unsealed.uri)
    seal, data = folder / "manifest.json", (folder / "creation.json").read_bytes()
    (folder / "manifest.json").write_bytes(b"{")
    for field in (b'"batch_rows":256', b'"threads":1', b'"torch":"2.13.0"', b'"block_rows":4096', b'"hidden":[16]'):
        assert field in data
        (folder / "creation.json").write_bytes(
            data.replace(field, flipped(field, max(i for i, byte in enumerate(field) if 48 <= byte < 58)))
        )
        with pytest.raises(DamagedError, match=r"creation\.json is damaged, and manifest\.json as well"):
            repair_store(unsealed.root_uri, unsealed.id, never)
        assert seal.read_bytes() == b"{"
        assert not list(root.glob("*.claim"))
    (folder / "creation.json").write_bytes(data)
    assert repair_store(unsealed.root_uri, unsealed.id, never) == []
    assert stores.sealed_files(root) == stores.sealed_files(stores.GOLDEN)


def test_a_repair_that_is_refused_leaves_the_store_as_it_was(unsealed: StoreWriter) -> None:
    seal_store(unsealed)
    (Path(unsealed.uri) / "manifest.json").write_bytes(b"{")
    (Path(unsealed.uri) / "arrays.zarr/logits/c/0/0/0").unlink()
    with pytest.raises(RefusedError, match="no data"):
        repair_store(unsealed.root_uri, unsealed.id, never)
    assert (Path(unsealed.uri) / "manifest.json").read_bytes() == b"{"


def never(_shard: Shard, _adopted: object) -> Any:
    raise RefusedError("no data to compute it from")
