"""A run in object storage: who may write what, which of what lies there counts, and the copy of it in a folder."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import AkdError, DamagedError, HeldError
from akd_dist.storage import run_objects
from akd_dist.storage.objects import ObjectRoot, Stat
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import MODEL, REPORTED, RunCopy, scratch
from akd_dist.storage.run_objects import RunObjects, packed, standings, unpacked


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> RunObjects:
    if request.param == "local":
        return RunObjects.at(str(tmp_path / "bucket" / "digits"))
    return RunObjects.at(f"{bucket}/{request.node.name}/digits")


def names_of(keys: list[tuple[str, Any]]) -> list[str]:
    return [key.rpartition("/")[2].removesuffix(".ckpt") for key, _ in keys]


# ---- drivers


def test_an_attempt_begins_once_and_stops_those_before(run: RunObjects) -> None:
    run.begin_attempt(1)
    assert (run.control().last, run.is_stopped(1)) == (1, False)
    run.begin_attempt(3)
    assert run.control().stopped == {1, 2}
    with pytest.raises(HeldError, match="taken on by another command"):
        run.begin_attempt(3)


def test_of_many_drivers_one_begins(tmp_path: Path) -> None:
    """In a folder: the mock of S3 looks and puts in two steps, and lets two through now and then."""
    run, ready = RunObjects.at(str(tmp_path / "digits")), threading.Barrier(6)

    def begin(_: int) -> bool:
        ready.wait()
        try:
            run.begin_attempt(1)
        except HeldError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(begin, range(6))).count(True) == 1


def test_a_put_whose_answer_was_lost_begins_the_attempt(run: RunObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new = type(run.root).put_new

    def lost(root: ObjectRoot, key: str, data: bytes) -> bool:
        put_new(root, key, data)
        return put_new(root, key, data)

    monkeypatch.setattr(type(run.root), "put_new", lost)
    run.begin_attempt(1)
    assert run.control().last == 1


def test_nothing_counts_of_a_run_that_was_started_over(run: RunObjects) -> None:
    run.begin_attempt(1)
    first = run.take_over(["a"], 1)
    run.put("a", first["a"], "checkpoints/000002-00000000-0001.ckpt", b"old")
    run.root.put("identity.json", b"{}")
    run.bundle("cohort-1-0", {"logs/a.log": "old"})
    run.start_over(["identity.json"])
    assert run.root.list().keys() == {"control/attempt-1", "control/fresh-2", "control/stop-1"}
    # A worker of the first attempt is late.
    run.put("a", first["a"], "checkpoints/000005-00000000-0001.ckpt", b"late")
    run.put("a", first["a"], "result.json", b"late")
    run.put("a", first["a"], "writer.json", b"{}")
    run.bundle("cohort-1-0", {"logs/a.log": "late"})
    control = run.control()
    assert (control.last, control.since, control.bundles()) == (1, 2, {})
    assert run.students(control.since) == {}
    run.begin_attempt(2)
    second = run.take_over(["a"], 2, control.since)
    standing = run.students(control.since)["a"]
    assert (standing.writer, standing.checkpoints, standing.files) == (second["a"], [], {})


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("attempt-999999", "the latest attempt is 1"),
        ("stop-10001", "the latest attempt is 1"),
        ("fresh-999999", "the latest attempt is 1"),
        ("fresh-3", "the latest attempt is 1"),
    ],
)
def test_a_mark_of_an_attempt_that_never_was_is_named(run: RunObjects, mark: str, says: str) -> None:
    run.begin_attempt(1)
    run.control().check(run.root)
    run.root.put(f"control/{mark}", b"")
    with pytest.raises(DamagedError, match=f"control/{mark} is damaged") as refused:
        run.control().check(run.root)
    assert says in str(refused.value.got)
    assert "remove that object" in str(refused.value.next)


def test_attempts_end_before_their_numbers_do(run: RunObjects) -> None:
    with pytest.raises(DamagedError, match="control/attempt-10000 is damaged"):
        run.begin_attempt(10_001)
    assert run.root.list() == {}


# ---- one writer a student


def test_no_writer_comes_after_the_last_number(run: RunObjects) -> None:
    """Its name would not be one, and what it puts would count for nobody."""
    last = "000001-999999-0123456789ab"
    run.put("a", last, "writer.json", b"{}")
    with pytest.raises(DamagedError, match=f"students/a/{last}/writer.json is damaged"):
        run.take_over(["a"], 1)
    assert run.take_over(["a"], 2)["a"].startswith("000002-000001-")


def test_the_latest_writer_counts(run: RunObjects) -> None:
    early = run.take_over(["a", "b"], 1)
    assert run.later(early) == {}
    for name in ("result.json", "model.json"):
        run.put("a", early["a"], name, b"early")
    run.put("a", early["a"], "checkpoints/000003-00000000-0001.ckpt", b"early")
    late = run.take_over(["a"], 1)
    assert late["a"] > early["a"]
    assert run.later(early) == {"a": late["a"]}
    standing = run.students()["a"]
    assert (standing.writer, standing.files) == (late["a"], {})
    assert names_of(standing.checkpoints) == ["000003-00000000-0001"]
    # What the early one puts now, its look behind it, is read by nobody as a result, and is resumed from by nobody once
    # there is a checkpoint of the late one.
    run.put("a", early["a"], "metrics.jsonl", b"early")
    run.put("a", early["a"], "checkpoints/000009-00000000-0001.ckpt", b"early")
    run.put("a", late["a"], "checkpoints/000004-00000000-0001.ckpt", b"late")
    standing = run.students()["a"]
    assert names_of(standing.checkpoints) == ["000004-00000000-0001", "000009-00000000-0001", "000003-00000000-0001"]
    assert standing.files == {}
    run.put("a", late["a"], "result.json", b"late")
    standing = run.students(only=["a"])["a"]
    assert run.root.get(standing.key_of("a", "result.json")) == b"late"
    with pytest.raises(HeldError, match="the student a was taken over"):
        run.take_over(["a"], 0)


def test_of_writers_that_come_at_once_one_stays(run: RunObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    met, stayed = threading.Barrier(3), list[str]()

    def all_have_looked(site: str) -> None:
        if site == "run.before_takeover":
            met.wait()  # each has listed, and none has put its name

    monkeypatch.setattr(run_objects, "failpoint", all_have_looked)

    def come(_: int) -> None:
        with contextlib.suppress(HeldError):
            stayed.append(run.take_over(["a"], 1)["a"])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come, range(3)))
    last = run.students()["a"].writer
    assert last in stayed
    assert all(run.later({"a": one}) for one in stayed if one != last)


# ---- what one object holds


def test_a_bundle_is_what_was_packed(run: RunObjects) -> None:
    files = {"logs/a.log": "é\udcff\n", "students/a/metrics.jsonl": "{}\n", "control/progress-cohort-1-0.json": "{}"}
    files |= {"control/renewed.txt": "1", f"logs/{'a' * 100}.rank3.log": "", "logs/cohort-1-0.rank12.log": ""}
    run.bundle("cohort-1-0", files)
    assert run.bundled("cohort-1-0") == files
    assert packed(files) == packed(dict(reversed(files.items())))
    assert run.bundled("cohort-1-1") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        packed({"logs/a.log": "x"})[:-4],
        packed({"../a.log": "x"}),
        packed({"/etc/passwd": "x"}),
        packed({"logs/../../a": "x"}),
        packed({"students/../metrics.jsonl": "x"}),
        packed({"students/a/b/c": "x"}),
        packed({"identity.json": "x"}),
        packed({"control/.x": "x"}),
        packed({"control/attempt-9": "x"}),
        packed({"control/stop-1": "x"}),
        packed({"control/driver.json": "x"}),
        packed({"control/progress-cohort-1.json": "x"}),
        packed({"students/a/result.json": "x"}),
        packed({"students/a/model.json": "x"}),
        packed({"students/.a/metrics.jsonl": "x"}),
        packed({"logs/a.txt": "x"}),
        packed({"logs/.log": "x"}),
        packed({f"logs/{'a' * 300}.log": "x"}),
    ],
)
def test_a_bundle_that_no_cohort_wrote_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError, match="is damaged"):
        unpacked(data, "s3://bucket/run/control/cohort-1-0.json.gz")


def test_a_bundle_that_unpacks_to_more_than_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_objects, "MOST_DOCUMENT", 1000)
    with pytest.raises(DamagedError, match="more than a document"):
        unpacked(packed({"logs/a.log": "x" * 1000}), "there")


# ---- the copy


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_copy_follows_the_run(run: RunObjects, tmp_path: Path) -> None:
    copy = RunCopy(run.root.uri, tmp_path / "copy" / "digits")
    copy.refresh()
    assert files_of(copy.folder) == {}
    run.begin_attempt(1)
    writer = run.take_over(["a"], 1)["a"]
    run.root.put("identity.json", b"{}")
    run.root.put("control/plan.json", b"{}")
    run.put("a", writer, "checkpoints/000002-00000000-0001.ckpt", b"x" * 100)
    progress = "control/progress-cohort-1-0.json"
    run.bundle("cohort-1-0", {progress: "{}", "logs/a.log": "one\n", "students/a/metrics.jsonl": "1\n"})
    copy.refresh()
    held = {
        "control/attempt-1": b"",
        "control/plan.json": b"{}",
        progress: b"{}",
        "identity.json": b"{}",
        "logs/a.log": b"one\n",
        "students/a/checkpoints/000002-00000000-0001.ckpt": bytes(100),
        "students/a/metrics.jsonl": b"1\n",
    }
    assert files_of(copy.folder) == held
    # Another worker goes on, and tells of it; then the student ends.
    later = run.take_over(["a"], 1)["a"]
    told = {"control/progress-cohort-1-1.json": "{}", "logs/a.log": "two\n", "students/a/metrics.jsonl": "1\n2\n"}
    run.bundle("cohort-1-1", told)
    copy.refresh_control()
    held |= {"control/progress-cohort-1-1.json": b"{}"}
    held |= {"logs/a.log": b"one\ntwo\n", "students/a/metrics.jsonl": b"1\n2\n"}
    assert files_of(copy.folder) == held
    for name, data in {"metrics.jsonl": b"1\n2\n3\n", "model.safetensors": b"w", "result.json": b"{}"}.items():
        run.put("a", later, name, data)
    copy.refresh()
    held |= {"students/a/metrics.jsonl": b"1\n2\n3\n", "students/a/result.json": b"{}"}
    assert files_of(copy.folder) == held
    copy.refresh(MODEL | REPORTED, only=["a"])
    held |= {"students/a/model.safetensors": b"w"}
    assert files_of(copy.folder) == held
    # What a suspended worker still tells changes none of it.
    run.bundle("cohort-1-0", {"students/a/metrics.jsonl": "1\n", "logs/a.log": "one\n"})
    run.put("a", writer, "result.json", b"late")
    copy.refresh()
    assert copy.folder.joinpath("students/a/metrics.jsonl").read_bytes() == b"1\n2\n3\n"
    assert copy.folder.joinpath("students/a/result.json").read_bytes() == b"{}"
    run.start_over(["identity.json"])
    (copy.folder / "fleet.json").write_bytes(b"of the run that is no more, written here")
    copy.refresh()
    left = {"control/attempt-1": b"", "control/stop-1": b""}
    assert files_of(copy.folder) == left


def test_no_object_is_written_outside_of_the_copy(tmp_path: Path) -> None:
    """Whoever may write the bucket may name objects as he likes; a folder could not hold some of these."""
    writer, stat = "000001-000001-0123456789ab", Stat(1, "t", 0.0)
    keys = [f"students/../{writer}/result.json", f"students/./{writer}/result.json", f"students//{writer}/result.json"]
    keys += [f"students/a/{writer}/../../../result.json", f"students/a/{writer}/checkpoints/../../x.ckpt"]
    marked = {f"students/{student}/{writer}/writer.json": stat for student in ("..", ".", "", "a")}
    found = standings(dict.fromkeys(keys, stat) | marked)
    assert found.keys() == {"a"}
    assert (found["a"].files, found["a"].checkpoints) == ({}, [])


def test_objects_that_no_worker_puts_are_passed_over() -> None:
    """Consoles of object storage put empty objects for folders; no folder could hold a name of 300 digits."""
    writer, stat = "000001-000001-0123456789ab", Stat(0, "t", 0.0)
    keys = ["students", "students/a", f"students/a/{writer}", f"students/a/{writer}/checkpoints", "control"]
    keys += [f"students/a/{writer}/checkpoints/{'9' * 300}.ckpt", f"students/a/{writer}/checkpoints/{'1-' * 150}1.ckpt"]
    found = standings(dict.fromkeys([*keys, f"students/a/{writer}/writer.json"], stat))
    assert found["a"].checkpoints == []
    assert found["a"].writer == writer


def test_nothing_is_fetched_twice(run: RunObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    get = type(run.root).get

    def counted(root: ObjectRoot, key: str, most: int | None = None) -> bytes:
        asked.append(key)
        return get(root, key, most)

    monkeypatch.setattr(type(run.root), "get", counted)
    writer = run.take_over(["a"], 1)["a"]
    run.put("a", writer, "result.json", b"{}")
    run.root.put("identity.json", b"{}")
    for _ in range(2):  # another process finds what the first one fetched
        copy = RunCopy(run.root.uri, tmp_path / "copy" / "digits")
        copy.refresh()
        copy.refresh()
    assert sorted(asked) == ["identity.json", f"students/a/{writer}/result.json"]
    run.root.put("identity.json", json.dumps({"now": 1}).encode())
    copy.refresh()
    assert asked[2:] == ["identity.json"]


def test_the_header_of_a_newest_checkpoint_is_enough(run: RunObjects, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from akd_dist.distill.checkpoint import encode, read_header

    writer = run.take_over(["a"], 1)["a"]
    data = encode({"stage1_from": "b", "module": {"w": torch.zeros(200_000)}})
    for name in ("000001-00000000-0001", "000002-00000000-0001"):
        run.put("a", writer, f"checkpoints/{name}.ckpt", data)
    copy = RunCopy(run.root.uri, tmp_path / "copy" / "digits")
    copy.refresh(heads=True)
    folder = copy.folder / "students/a/checkpoints"
    assert read_header(folder / "000002-00000000-0001.ckpt") == {"stage1_from": "b"}
    assert read_header(folder / "000001-00000000-0001.ckpt") == {}
    assert {path.stat().st_size for path in folder.glob("*.ckpt")} == {len(data)}


def test_each_run_and_role_has_a_folder_of_its_own(tmp_path: Path) -> None:
    places = {
        scratch(tmp_path, uri, role)
        for uri in ("s3://bucket/a/digits", "s3://bucket/b/digits")
        for role in ("driver", "worker", "reader")
    }
    assert len(places) == 6
    assert {place.name for place in places} == {"digits"}
    assert scratch(tmp_path, "s3://bucket/a/digits/", "driver") in places


def test_an_unreachable_bucket_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AKD_DIST_S3_TIMEOUT", "0.2")
    with pytest.raises(AkdError) as caught:
        RunCopy("s3://bucket/runs/digits", tmp_path / "copy" / "digits").refresh()
    assert "s3://bucket/runs/digits" in str(caught.value)
    assert "canary-secret" not in str(caught.value)
    assert open_root("s3://bucket/runs/digits").uri == "s3://bucket/runs/digits"
