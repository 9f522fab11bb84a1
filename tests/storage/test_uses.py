"""Who used a store, and stores that nobody uses: records beside the seal, what keeps a store, and safe removal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.locks import file_lock
from akd_dist.storage import catalog, removal, repair, uses
from akd_dist.storage.claim import claim_store, holder_of
from akd_dist.storage.decoded import find_decoded
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.removal import disused, remove_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import Use, uses_of, using
from akd_dist.storage.writer import create_store
from tests import stores

ROOT = Path(__file__).parents[2]
DAY = 86_400.0


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> ObjectRoot:
    if request.param == "local":
        return open_root(tmp_path / "stores")
    return open_root(f"{bucket}/{request.node.name}")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def running(folder: Path, uri: str) -> Iterator[Path]:
    """A run that lives and uses a store."""
    with file_lock(folder / "lock", what="the run"), using([uri], run=str(folder), lock=folder / "lock"):
        yield folder


def elsewhere(store: LogitStore, days_ago: float) -> None:
    """A record of a run on another host."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - days_ago * DAY))
    use = Use(run="/runs/far", host="elsewhere", user="ada", time=at, command="akd-dist train-students", lock=None)
    open_root(store.uri).put(use.key, use.to_bytes())


def age(store: LogitStore, days: float) -> None:
    """As if it had been sealed that long ago."""
    then = time.time() - days * DAY
    os.utime(Path(store.uri) / "manifest.json", (then, then))


# ---- records


def test_a_use_is_recorded_once_a_run_and_day_outside_the_seal(
    root: ObjectRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/akd-dist", "train-students", "my recipe.yaml"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    store = stores.build(root.uri)
    before = {key: stat for key, stat in open_root(store.uri).list().items() if not key.startswith("uses/")}
    for run in ("one", "one", "two"):
        with using([store.uri, store.uri], run=f"/runs/{run}", lock=tmp_path / run / "lock"):
            found = uses_of(open_root(store.uri))
    assert sorted(use.run for use in found) == ["/runs/one", "/runs/two"]
    assert found[0].host == socket.gethostname()
    assert abs(found[0].at - time.time()) < 60
    assert found[0].command == "akd-dist train-students 'my recipe.yaml'"
    assert found[0].key.startswith(f"uses/{found[0].time[:10]}-")
    after = open_root(store.uri).list()
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 2
    assert open_store(store.uri).verify() == []
    assert repair.repair_store(root.uri, store.id, lambda *_: pytest.fail("nothing is damaged")) == []
    assert removal.gc(root.uri) == []
    (summary,) = catalog.list_stores(root.uri)
    assert (summary.shards, summary.shards_done, summary.bytes) == (4, 4, 4 * 1560)
    assert summary.runs == [use.run for use in found]
    assert summary.last_used == found[0].at


def test_a_root_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    store = stores.build(tmp_path)
    (tmp_path / store.id / "uses").write_text("")  # also for root, whom no permission would stop
    with using([store.uri], run="/runs/one"):
        assert open_store(store.uri).verify() == []
    assert uses_of(open_root(store.uri)) == []


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    store = stores.build(tmp_path)
    (tmp_path / store.id / "uses").mkdir()
    (tmp_path / store.id / "uses" / "torn.json").write_text('{"run":')
    (tmp_path / store.id / "uses" / "other.json").write_text('{"run":1}')
    elsewhere(store, days_ago=1)
    assert [use.host for use in uses_of(open_root(store.uri))] == ["elsewhere"]


def test_a_store_that_is_gone_is_refused_and_leaves_no_record(root: ObjectRoot) -> None:
    store = stores.build(root.uri)
    assert remove_store(root.uri, store.id, Path("none")) is None
    with pytest.raises(RefusedError, match="is gone"), using([store.uri], run="/runs/one"):
        pass
    assert root.list() == {}
    assert catalog.list_stores(root.uri) == []


def test_a_run_of_several_days_has_a_record_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "_AGAIN_SECONDS", 0.02)
    store = stores.build(tmp_path)
    with using([store.uri], run="/runs/long"):
        (use,) = uses_of(open_root(store.uri))
        (tmp_path / store.id / use.key).unlink()  # a new day has no record yet
        deadline = time.monotonic() + 900
        while not uses_of(open_root(store.uri)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_run_goes_on_while_its_lock_is_held(tmp_path: Path) -> None:
    store, now = stores.build(tmp_path / "stores"), time.time()
    with running(tmp_path / "run", store.uri):
        (use,) = uses_of(open_root(store.uri))
        assert use.is_going_on(now)
        assert use.is_going_on(now + 30 * DAY)
    assert not use.is_going_on(now)
    far = use.model_copy(update={"host": "elsewhere"})
    assert far.is_going_on(now)
    assert not far.is_going_on(now + 2.1 * DAY)
    assert not use.model_copy(update={"host": "elsewhere", "time": "long ago"}).is_going_on(now)


# ---- which may go


def test_stores_are_picked_by_age_and_by_use(tmp_path: Path, cache: Path) -> None:
    old, used, young = (stores.build(tmp_path, stores.creation(data_seed=seed)) for seed in (1, 2, 3))
    age(old, 40)
    age(used, 40)
    elsewhere(used, days_ago=10)

    def picked(older_than: float | None = None, unused_for: float | None = None) -> set[str]:
        older, unused = (None if days is None else days * DAY for days in (older_than, unused_for))
        found = disused(str(tmp_path), cache, older_than=older, unused_for=unused)
        assert all(one.kept is None for one in found)
        return {one.store.id for one in found}

    assert picked(older_than=30) == {old.id, used.id}
    assert picked(unused_for=30) == {old.id}
    assert picked(unused_for=5) == {old.id, used.id}
    assert picked(older_than=39, unused_for=30) == {old.id}
    assert picked(older_than=50) == set()
    assert picked(older_than=0) == {old.id, used.id, young.id}
    assert [one.store.id for one in disused(str(tmp_path), cache, older_than=0, ids=[young.id])] == [young.id]


def test_a_store_that_is_held_used_mapped_or_needed_stays(tmp_path: Path, cache: Path) -> None:
    root = str(tmp_path / "stores")
    held, used, far, mapped, needed = (stores.build(root, stores.creation(data_seed=seed)) for seed in range(1, 6))
    wider = create_store(root, stores.creation(data_seed=5, views=3))
    elsewhere(far, days_ago=1)
    decoded = stores.decoded(mapped, cache)

    def kept() -> dict[str, str | None]:
        return {one.store.id: one.kept for one in disused(root, cache, older_than=0)}

    with claim_store(root, held.id), claim_store(root, wider.id), running(tmp_path / "run", used.uri):
        found = kept()
        for store in (used, far, mapped):  # looked at once more, whoever asks
            assert remove_store(root, store.id, cache) == found[store.id]
        assert str(remove_store(root, held.id, cache)).startswith(f"held by process {os.getpid()} on ")
    assert f"held by process {os.getpid()}" in str(found[held.id])
    assert found[used.id] == f"in use by the run {tmp_path / 'run'} on {socket.gethostname()}"
    assert found[far.id] == "in use by the run /runs/far on elsewhere"
    assert "reads its decoded copy" in str(found[mapped.id])
    assert found[needed.id] == f"the unsealed store {wider.id[:12]} takes views from it"
    assert all(open_store(store.uri).verify() == [] for store in (held, used, far, mapped, needed))
    assert stores.litter(tmp_path) == []

    found = kept()  # nobody writes the wider one: it goes itself, and with it the need
    assert [found[store.id] for store in (held, used, needed)] == [None] * 3
    assert found[wider.id] is None
    del decoded
    assert kept()[mapped.id] is None


# ---- removal


def test_a_store_is_removed_with_its_decoded_copy(root: ObjectRoot, cache: Path) -> None:
    gone, other = (stores.build(root.uri, stores.creation(views=views)) for views in (1, 3))
    linked, _ = stores.extend(root.uri, stores.creation(views=2))  # shares files with `gone` where there are links
    for store in (gone, other):
        stores.decoded(store, cache)
    with using([gone.uri], run="/runs/over", lock=cache / "no-lock"):
        pass
    root.put(f"{gone.id}.damaged/logits-c-0-0-0.01234567", b"")
    assert remove_store(root.uri, gone.id, cache) is None
    assert root.folders() == sorted([other.id, linked.id])
    assert root.files() == []
    assert find_decoded(gone.manifest, cache) is None
    kept = find_decoded(other.manifest, cache)
    assert kept is not None
    assert not kept.in_use
    assert kept.bytes >= other.layout.nbytes
    for store in (other, linked):
        assert open_store(store.uri).verify() == []
    with pytest.raises(DamagedError):  # whoever had it open reads nothing for zeros
        gone.rows(0, 0, 10)
    with pytest.raises(RefusedError, match="there is no store"):
        open_store(gone.uri)


@pytest.mark.parametrize("site", ["remove.marked", "remove.unsealed", "remove.emptied"])
@pytest.mark.parametrize("then", ["removed again", "computed again"])
def test_a_removal_may_die_at_any_moment(tmp_path: Path, cache: Path, site: str, then: str) -> None:
    root = tmp_path / "stores"
    store = stores.build(root)
    age(store, 40)
    code = "import sys, pathlib; from akd_dist.storage.removal import remove_store as r; "
    code += "r(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))"
    command = [sys.executable, "-c", code, str(root), store.id, str(cache)]
    died = subprocess.run(command, cwd=ROOT, env={**os.environ, "AKD_FAILPOINT": site}, check=False)
    assert died.returncode == -signal.SIGKILL
    found = catalog.find_store(str(root), stores.identity())
    assert found is None or found.verify() == [], "never half of it for a whole one"
    assert (found is not None) == (site == "remove.marked")
    if then == "removed again":
        removal.gc(str(root))
        for candidate in disused(str(root), cache, older_than=0):  # none, if all shards were gone
            assert candidate.kept is None
            assert remove_store(str(root), store.id, cache) is None
        assert list(root.iterdir()) == []
    else:
        with using([store.uri], run="/runs/new") if found else claim_store(str(root), "x"):
            stores.build(root)
        removal.gc(str(root))
        assert open_store(store.uri).verify() == []
        assert stores.sealed_files(root) == stores.sealed_files(stores.GOLDEN)
        assert stores.litter(root) == []
        assert [path.name for path in root.iterdir()] == [store.id]


def test_a_run_racing_a_removal_finds_the_store_or_is_told(tmp_path: Path, cache: Path) -> None:
    """A run and a removal at once, many times: one of them wins, and the other one knows."""
    first = list[tuple[float | None, float | None]]([(0.0, None), (None, 0.0)])
    shuffled = np.random.default_rng(0).uniform(0, 0.006, (20, 2))
    outcomes = list[tuple[bool, bool]]()
    for number, (before_run, before_removal) in enumerate([*first, *map(tuple, shuffled)]):
        root = tmp_path / f"stores-{number}"
        shutil.copytree(stores.GOLDEN, root)
        store = open_store(str(next(root.iterdir())))
        outcomes.append(race(store, tmp_path / f"run-{number}", cache, before_run, before_removal))
        shutil.rmtree(root)
    assert outcomes[0] == (True, False)
    assert outcomes[1] == (False, True)
    assert all(used != removed for used, removed in outcomes), outcomes


def wait(other: threading.Event, seconds: float | None) -> None:
    """So many seconds, or for what the other one does."""
    if seconds is None:
        other.wait()
    else:
        time.sleep(seconds)


def race(
    store: LogitStore, run: Path, cache: Path, before_run: float | None, before_removal: float | None
) -> tuple[bool, bool]:
    """(whether the run used the store, whether it was removed); None waits until the other one is there, or done."""
    root, removed, over, start = open_root(store.uri).parent, list[bool](), threading.Event(), threading.Barrier(2)
    runs = threading.Event()

    def remove() -> None:
        start.wait()
        wait(runs, before_removal)
        removed.append(remove_store(root.uri, store.id, cache) is None)
        over.set()

    thread = threading.Thread(target=remove)
    thread.start()
    start.wait()
    wait(over, before_run)
    try:
        with running(run, store.uri):
            runs.set()
            found = open_store(store.uri)
            assert found.verify() == []
            over.wait()
            assert found.verify() == []
        used = True
    except RefusedError:
        over.wait()
        assert root.list() == {}
        used = False
    thread.join()
    return used, removed[0]


# ---- claims, seen without taking one


def test_a_look_at_a_holder_changes_nothing(root: ObjectRoot) -> None:
    assert holder_of(root.uri, "store") is None
    with claim_store(root.uri, "store"):
        holder = holder_of(root.uri, "store")
        assert holder is not None
        assert holder.pid == os.getpid()
    assert holder_of(root.uri, "store") is None
    far = {"host": "elsewhere", "pid": 12, "since": "2026-01-01T00:00:00+00:00", "token": "t", "counter": 1}
    root.put("store.claim", json.dumps(far).encode())
    assert str(holder_of(root.uri, "store")).startswith("process 12 on elsewhere")
    if root.uri.startswith("/"):  # of a process of this host that is gone: its lock is
        root.put("store.claim", json.dumps({**far, "host": socket.gethostname()}).encode())
        assert holder_of(root.uri, "store") is None
    assert root.files() == ["store.claim"]
