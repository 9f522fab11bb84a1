"""The stores under a root, and who holds one: find, list, verify, repair, gc, claims."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from akd_dist.base.errors import DamagedError, HeldError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage import catalog, removal, repair
from akd_dist.storage.claim import claim_store
from akd_dist.storage.layout import Shard
from akd_dist.storage.objects import LocalRoot
from akd_dist.storage.reader import open_store
from akd_dist.storage.records import Loss, Probe
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import create_store
from tests import stores

ROOT = Path(__file__).parents[2]
STORE = "a" * 64


class Recomputing:
    """Recomputes shards of the golden store, and counts."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.asked = error, list[Shard]()

    def __call__(
        self, shard: Shard, adopted: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[np.float32], float | None, Sequence[Probe], Loss | None]:
        logits, label_agreement, probes, loss = stores.recompute(stores.identity(), shard)
        if adopted is not None:
            return adopted, label_agreement, probes, loss
        self.asked.append(shard)
        return logits + self.error, label_agreement, probes, loss


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the golden store in it."""
    shutil.copytree(stores.GOLDEN, tmp_path / "stores")
    return tmp_path / "stores"


@pytest.fixture
def folder(root: Path) -> Path:
    return next(root.iterdir())


# ---- find, list, resolve


def test_a_hit_has_the_same_identity_and_enough_views(tmp_path: Path) -> None:
    for views in (4, 3):
        stores.build(tmp_path, stores.creation(views=views))
    create_store(str(tmp_path), stores.creation(views=2))  # begun, not sealed
    for wanted, found in [(1, 3), (2, 3), (3, 3), (4, 4)]:
        store = catalog.find_store(str(tmp_path), stores.identity(views=wanted))
        assert store is not None
        assert store.views == found
    assert catalog.find_store(str(tmp_path), stores.identity(views=5)) is None
    for changed in ({"teacher": "other"}, {"dataset": "other"}, {"data_seed": 1}, {"encoding": {"name": "float32"}}):
        assert catalog.find_store(str(tmp_path), stores.identity(**changed)) is None
    assert catalog.find_store(str(tmp_path / "none"), stores.identity()) is None


def test_a_hit_that_is_damaged_is_refused_not_passed_over(root: Path, folder: Path) -> None:
    (folder / "arrays.zarr/logits/c/0/0/0").unlink()
    with pytest.raises(DamagedError, match="logits/c/0/0/0"):
        catalog.find_store(str(root), stores.identity())


def test_a_store_under_another_stores_name_is_no_hit(root: Path, folder: Path) -> None:
    wanted = stores.identity(data_seed=7)
    folder.rename(root / wanted.id)
    with pytest.raises(DamagedError, match="is another store's"):
        catalog.find_store(str(root), wanted)
    assert [entry.key for entry in repair.verify_store(str(root), wanted.id)] == ["manifest.json"]


def test_stores_are_listed_with_what_is_done(root: Path, folder: Path) -> None:
    writer = create_store(str(root), stores.creation(views=3))
    stores.write(writer, writer.layout.shard(0, 0))
    (root / ("b" * 64)).mkdir()
    (root / ("b" * 64) / "creation.json").write_text("{")
    (root / "notes").mkdir()
    listed = {summary.id: summary for summary in catalog.list_stores(str(root))}
    assert list(listed) == sorted([folder.name, writer.id, "b" * 64])
    sealed, begun = listed[folder.name], listed[writer.id]
    assert (sealed.sealed, sealed.shards, sealed.shards_done, sealed.bytes) == (True, 4, 4, 4 * 1560)
    assert (begun.sealed, begun.shards, begun.shards_done, begun.bytes) == (False, 6, 1, 1560)
    assert (sealed.rows, sealed.views, sealed.classes, sealed.encoding) == (300, 2, 3, "float16")
    assert "creation.json is damaged" in str(listed["b" * 64].problem)


def test_an_id_is_known_by_its_beginning(root: Path, folder: Path) -> None:
    assert catalog.resolve_id(str(root), folder.name[:6]) == folder.name
    for prefix in ("0000", "", "../"):
        with pytest.raises(RefusedError, match="no store begins with") as refused:
            catalog.resolve_id(str(root), prefix)
        assert folder.name[:16] in str(refused.value.got)
    (root / f"{folder.name[:-1]}0").mkdir()
    with pytest.raises(RefusedError, match="several stores begin with"):
        catalog.resolve_id(str(root), folder.name[:6])


def test_gc_stops_no_run_that_begins_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run tries out whether it can publish; what it tries with looks as if somebody had left it."""
    publish, collected = LocalRoot.put_new, list[str]()

    def put_new(self: LocalRoot, key: str, data: bytes) -> bool:
        made = publish(self, key, data)
        collected.extend([] if collected else removal.gc(str(root)))
        return made

    monkeypatch.setattr(LocalRoot, "put_new", put_new)
    open_root(root).check_writable()
    assert len(collected) == 1
    assert collected[0].startswith(".check-")


# ---- repair


@pytest.mark.parametrize("damage", ["missing", "flipped", "folder", "swapped"])
def test_repair_computes_the_damaged_shard_alone(root: Path, folder: Path, damage: str) -> None:
    path = folder / "arrays.zarr/logits/c/1/1/0"
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(data[:50] + b"!" + data[51:])
    elif damage == "folder":
        path.mkdir()
    elif damage == "swapped":
        path.write_bytes((folder / "arrays.zarr/logits/c/0/1/0").read_bytes())
    assert [entry.key for entry in repair.verify_store(str(root), folder.name)] == ["arrays.zarr/logits/c/1/1/0"]
    recomputing, steps = Recomputing(), list[tuple[int, int]]()
    mended = repair.repair_store(str(root), folder.name, recomputing, lambda done, of: steps.append((done, of)))
    assert mended == recomputing.asked == [Shard(1, 1, 256, 300)]
    assert steps == [(1, 1)]
    assert stores.sealed_files(root) == stores.sealed_files(stores.GOLDEN)
    assert stores.litter(root) == []
    assert repair.verify_store(str(root), folder.name) == []


def test_a_repair_that_comes_out_different_changes_nothing(root: Path, folder: Path) -> None:
    path = folder / "arrays.zarr/logits/c/0/1/0"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    before = stores.sealed_files(root)
    with pytest.raises(DamagedError, match=r"view 0, shard 1 .* came out different") as refused:
        repair.repair_store(str(root), folder.name, Recomputing(error=0.125))
    assert str(refused.value.got).startswith("sha256 ")
    assert str(refused.value.expected).startswith("sha256 5077ab13")
    assert stores.sealed_files(root) == before
    assert stores.litter(root) == []


@pytest.mark.parametrize("name", ["arrays.zarr/zarr.json", "arrays.zarr/logits/zarr.json", "creation.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_repair_makes_the_documents_again(root: Path, folder: Path, name: str, gone: bool) -> None:
    (folder / name).unlink() if gone else (folder / name).write_text("{}")
    assert [entry.key for entry in repair.verify_store(str(root), folder.name)] == [name]
    recomputing = Recomputing()
    assert repair.repair_store(str(root), folder.name, recomputing) == []
    assert recomputing.asked == []
    assert stores.sealed_files(root) == stores.sealed_files(stores.GOLDEN)


def test_repair_seals_again_from_the_receipts(root: Path, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")
    (folder / "arrays.zarr/logits/c/0/1/0").unlink()
    assert [entry.key for entry in repair.verify_store(str(root), folder.name)] == ["manifest.json"]
    assert repair.repair_store(str(root), folder.name, Recomputing()) == [Shard(0, 1, 256, 300)]
    assert stores.sealed_files(root) == stores.sealed_files(stores.GOLDEN)


def test_repair_of_a_held_or_unsealed_store_is_refused(root: Path, folder: Path) -> None:
    with claim_store(str(root), folder.name), pytest.raises(HeldError):
        repair.repair_store(str(root), folder.name, Recomputing())
    (folder / "manifest.json").unlink()
    with pytest.raises(RefusedError, match="not sealed"):
        repair.repair_store(str(root), folder.name, Recomputing())


# ---- gc


def test_gc_removes_leftovers_and_nothing_that_is_held(root: Path, folder: Path) -> None:
    held = create_store(str(root), stores.creation(views=3))
    litter = [
        root / folder.name / "arrays.zarr/logits/c/0/0/0.0123456789ab.partial",
        root / f"{folder.name}.damaged" / "logits-c-0-0-0.01234567",
        root / f"{STORE}.damaged" / "logits-c-0-0-0.01234567",  # of a store that is gone
        root / f"{STORE}.claim",  # of a process that is gone
        root / ".check-0123456789ab.partial",
    ]
    kept = [root / held.id / "manifest.json.0123456789ab.partial", root / "notes.partial" / "note.partial"]
    for path in litter + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = stores.sealed_files(root)
    with claim_store(str(root), held.id):
        removed = removal.gc(str(root))
    assert sorted(removed) == sorted(str(path.relative_to(root)) for path in litter)
    assert [path.exists() for path in litter] == [False] * len(litter)
    assert [path.exists() for path in kept] == [True] * len(kept)
    assert stores.sealed_files(root) == before
    assert removal.gc(str(root)) == [str(kept[0].relative_to(root)), f"{held.id}/"]  # it was begun, and has no shard


def test_gc_keeps_checkpoints_of_use(root: Path) -> None:
    """Models that recipes train, under `teachers/`: one trained, one half way, one not begun, one that is held."""
    trained, half, bare, held = (root / "teachers" / (letter * 32) for letter in "0123")
    kept = [trained / "model.json", trained / "model.safetensors", half / "checkpoints/000001.safetensors"]
    kept += [half / "log", held / "checkpoints/writer-000000-000001-x/a.partial"]
    litter = [
        trained / "checkpoints/000001.safetensors",
        half / "checkpoints/writer-000000-000001-x/a.partial",
        root / "teachers" / f"{'1' * 32}.claim",
        root / "teachers" / f"{'4' * 32}.claim",
    ]
    for path in kept + litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (bare / "checkpoints").mkdir(parents=True)
    with claim_store(str(root), f"teachers/{'3' * 32}"):
        would = removal.gc(str(root), dry_run=True)
        assert removal.gc(str(root)) == would
    assert sorted(would) == sorted([*(str(path.relative_to(root)) for path in litter), f"teachers/{'2' * 32}/"])
    assert [path.exists() for path in litter + kept] == [False] * len(litter) + [True] * len(kept)
    assert not bare.exists()
    assert removal.gc(str(root)) == [str(kept[-1].relative_to(root)), f"teachers/{'3' * 32}/"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_check_of_the_root_that_was_killed_is_collected(tmp_path: Path, nth: int) -> None:
    code = "import sys; from akd_dist.storage.roots import open_root; open_root(sys.argv[1]).check_writable()"
    environment = {**os.environ, "AKD_FAILPOINT": f"publish.before_link:{nth}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == nth
    assert sorted(removal.gc(str(tmp_path), dry_run=True)) == sorted(removal.gc(str(tmp_path))) == left
    assert list(tmp_path.iterdir()) == []


# ---- claims


def hold(root: str, started: Any) -> None:
    with claim_store(root, STORE):
        started.set()
        threading.Event().wait()


def test_the_second_comer_leaves_at_once_and_names_the_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), started))
    holder.start()
    assert started.wait(900)
    with pytest.raises(HeldError) as refused, claim_store(str(tmp_path), STORE):
        pass
    assert refused.value.code == 3
    assert f"process {holder.pid} on " in str(refused.value.got)
    assert ", since 20" in str(refused.value.got)
    assert "--wait" in str(refused.value.next)
    holder.kill()  # kill -9: the claim stays, its lock does not
    holder.join()
    assert (tmp_path / f"{STORE}.claim").exists()
    with claim_store(str(tmp_path), STORE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_comer_goes_on_when_the_holder_is_done(tmp_path: Path) -> None:
    order, told = list[str](), list[str]()
    held, waited_for = threading.Event(), threading.Event()

    def holder() -> None:
        with claim_store(str(tmp_path), STORE):
            held.set()
            waited_for.wait()
            order.append("holder done")

    def on_wait(text: str) -> None:
        told.append(text)
        waited_for.set()

    thread = threading.Thread(target=holder)
    thread.start()
    held.wait()
    with claim_store(str(tmp_path), STORE, wait=True, on_wait=on_wait, poll_every=0.02):
        order.append("waiter in")
    thread.join()
    assert order == ["holder done", "waiter in"]
    assert len(told) == 1
    assert told[0].startswith(f"waiting for process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_many_comers_hold_one_after_the_other(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def comer() -> None:
        with claim_store(str(tmp_path), STORE, wait=True, poll_every=0.005):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1

    threads = [threading.Thread(target=comer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert list(tmp_path.iterdir()) == []


def remote_claim(root: Path, counter: int) -> None:
    holder = {"host": "elsewhere", "pid": 12, "since": "2026-01-01T00:00:00+00:00", "token": "t", "counter": counter}
    (root / f"{STORE}.claim").write_text(json.dumps(holder))


def test_another_hosts_claim_counts_until_it_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote_claim(tmp_path, 1)
    with pytest.raises(HeldError) as refused, claim_store(str(tmp_path), STORE):
        pass
    assert str(refused.value.got) == "process 12 on elsewhere, since 2026-01-01T00:00:00+00:00"
    clock, looks = [0.0], iter(range(2, 100))
    monkeypatch.setattr(
        "akd_dist.storage.claim.time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None)
    )

    def on_poll() -> None:
        clock[0] += 1.0
        if clock[0] <= 10:
            remote_claim(tmp_path, next(looks))  # it counts on

    with claim_store(str(tmp_path), STORE, wait=True, stale_after=2.5, on_poll=on_poll):
        assert clock[0] == 13
    assert list(tmp_path.iterdir()) == []


def test_a_held_claim_counts_on(tmp_path: Path) -> None:
    path = tmp_path / f"{STORE}.claim"
    with claim_store(str(tmp_path), STORE, beat_every=0.02):
        first = json.loads(path.read_bytes())
        deadline = time.monotonic() + 900
        while json.loads(path.read_bytes())["counter"] < first["counter"] + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_killed_writers_claim_and_store_are_taken_over(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.stores", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "AKD_FAILPOINT": "shard.before_receipt:2"},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert stores.litter(tmp_path) == [f"{stores.identity().id}.claim"]
    stores.build(tmp_path)
    assert stores.litter(tmp_path) == []
    assert open_store(str(tmp_path / stores.identity().id)).verify() == []


def test_a_store_of_format_2_serves_a_request_of_today(tmp_path: Path) -> None:
    """Its logits are the same: nobody runs a teacher again because the format has moved on."""
    old = stores.build(tmp_path, stores.creation(format=2))
    found = catalog.find_store(str(tmp_path), stores.identity())
    assert found is not None
    assert (found.id, found.id != stores.identity().id) == (old.id, True)
    assert catalog.find_store(str(tmp_path), stores.identity(encoding={"name": "float16", "keep_bits": 7})) is None
    wider = stores.build(tmp_path, stores.creation(format=2, views=3, teacher=sha256(b"another")))
    found = catalog.find_store(str(tmp_path), stores.identity(teacher=sha256(b"another")))
    assert found is not None
    assert found.id == wider.id
    # Its shards are not taken for a store of today, whose manifest says more of them.
    request = stores.creation(views=4, teacher=sha256(b"another"))
    assert catalog.narrower_stores(str(tmp_path), request.identity) == []
