"""`train-students`, `status`, `report` and `compare` with a run root in object storage; cohorts in this process."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import DamagedError, HeldError, MachineError, RecipeError, RefusedError
from akd_dist.cli import main
from akd_dist.data.row_cache import prepare
from akd_dist.documents.status import CohortProgress, FleetPlan, StudentProgress
from akd_dist.jobs import ray_train
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.ray_train import run_worker
from akd_dist.jobs.remote_run import RemoteRun
from akd_dist.jobs.results import finish_run
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.options import RunOptions
from akd_dist.recipe import Recipe
from akd_dist.storage.claim import claim_store
from akd_dist.storage.reader import open_store
from akd_dist.storage.run_copy import MODEL, RunCopy
from akd_dist.storage.run_objects import RunObjects
from akd_dist.storage.s3 import S3Root
from akd_dist.tracking.remote import RemoteReader, reader_of
from akd_dist.tracking.status import driving, write_document
from tests.fleets import HARD, KD, a_recipe, a_student, weights

STUDENTS = [a_student("a", objective=HARD | {"epochs": 1}), a_student("b", objective=KD | {"epochs": 1})]


@pytest.fixture
def uri(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}/digits"


QUIET = Console(quiet=True)


# ---- two drivers


def test_a_run_is_held_by_one_driver(uri: str, tmp_path: Path) -> None:
    first, second = (RemoteRun(uri, tmp_path / name) for name in ("one", "two"))
    first.check()
    with first.held(wait=False, console=QUIET):
        with (
            pytest.raises(HeldError, match="is held by someone else") as caught,
            second.held(wait=False, console=QUIET, only_look=True),
        ):
            pass
        assert f"process {os.getpid()}" in str(caught.value)
    with second.held(wait=False, console=QUIET):
        pass


def test_a_holder_that_lives_is_refused_and_a_dead_one_is_taken_over(bucket: str) -> None:
    root = f"{bucket}/claims"

    def hold(stale_after: float) -> Any:
        return claim_store(root, "digits", watch=True, stale_after=stale_after, poll_every=0.01)

    with claim_store(root, "digits", beat_every=0.05), pytest.raises(HeldError, match="is held by"), hold(60.0):
        pass
    with claim_store(root, "digits", beat_every=60.0), hold(0.05):
        pass


def test_a_driver_whose_run_was_taken_on_leaves(uri: str, tmp_path: Path) -> None:
    early, late = (RemoteRun(uri, tmp_path / name) for name in ("one", "two"))
    early.begin(1)
    late.begin(2)
    assert early.objects.is_stopped(1)
    with pytest.raises(HeldError, match="taken on by another command"):
        early.publish()
    with pytest.raises(HeldError, match="taken on by another command"):
        early.check_current()
    with pytest.raises(HeldError, match="taken on by another command"):
        early.begin(2)
    late.publish()


# ---- what is told


def test_the_driver_puts_what_changes_and_no_more(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, asked = S3Root.put, list[str]()

    def counted(root: S3Root, key: str, data: bytes) -> None:
        asked.append(key)
        put(root, key, data)

    monkeypatch.setattr(S3Root, "put", counted)
    run = RemoteRun(uri, tmp_path)
    run.begin(1)
    (run.folder / "control").mkdir(parents=True, exist_ok=True)
    (run.folder / "control" / "plan.json").write_text("{}")
    for _ in range(3):
        run._tell(now=True)
    (run.folder / "identity.json").write_text("{}")
    run.publish()
    run.publish()
    assert asked == ["control/plan.json", "identity.json"]
    run.withdraw("identity.json")
    assert "identity.json" not in run.objects.root.list()
    (run.folder / "control" / "stop-1").touch()
    run._tell()
    assert run.objects.is_stopped(1)


def test_a_student_that_is_given_up_has_failed_for_everybody(uri: str, tmp_path: Path) -> None:
    recipe = a_recipe([a_student("a", objective=HARD)])
    run = RemoteRun(uri, tmp_path)
    run.begin(1)
    early = run.objects.take_over(["a"], 1)
    job = type("Job", (), {"attempt": 1})()
    run.give_up(recipe.students[0], job, "its worker died again and again")
    assert run.objects.later(early)
    result = json.loads((run.folder / "students/a/result.json").read_bytes())
    assert (result["state"], result["reason"]) == ("failed", "its worker died again and again")


# ---- refusals


@pytest.mark.parametrize("root", ["gs://bucket/runs", "s3://", "https://bucket/runs"])
def test_other_places_are_refused(root: str) -> None:
    with pytest.raises(RecipeError, match="is no place for runs"):
        _ = RunOptions("recipe.yaml", run_root=root).runs


@pytest.mark.parametrize("root", ["s3:///x", "s3:/bucket/runs", "s3://bucket/a//b", "s3://bucket/../b", "s3://b/./c"])
def test_a_run_root_that_is_no_place_is_refused_by_its_name(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"{root!r} is no place for runs")) as refused:
        _ = RunOptions("recipe.yaml", run_root=root).runs
    assert "--run-root" in str(refused.value.next)
    with pytest.raises(RecipeError, match=re.escape(f"{root!r} is no place for stores")) as refused:
        _ = RunOptions("recipe.yaml", store_root=root).stores
    assert "--store-root" in str(refused.value.next)
    with pytest.raises(RecipeError, match=re.escape(f"{root!r} is no place for a cache")) as refused:
        _ = RunOptions("recipe.yaml", cache_root=root).cache
    assert "--cache-root" in str(refused.value.next)
    monkeypatch.setenv("AKD_DIST_RUN_ROOT", root)
    with pytest.raises(RecipeError) as refused:
        _ = RunOptions("recipe.yaml").runs
    assert "AKD_DIST_RUN_ROOT" in str(refused.value.next)


@pytest.mark.parametrize("run", ["s3://bucket/runs/../digits", "s3://bucket//digits", "s3:/bucket/digits", "s3:///x"])
def test_a_place_that_a_command_is_given_is_refused_at_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        pytest.fail("the storage was asked")

    monkeypatch.setattr(S3Root, "_ask", asked)
    student = f"{run}/students/a"
    for words in (
        ("status", run),
        ("report", run),
        ("evaluate", student, "--data", "digits"),
        ("predict", student, "--data", "digits"),
        ("evaluate", "nowhere", "--data", run),
        ("export", student, "--to", "onnx"),
        ("stores", "list", "--store-root", run),
    ):
        assert command(*words) == RecipeError.code, words
    assert command("export", "s3://bucket/runs/mini/students/../x", "--to", "onnx") == RecipeError.code


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_with_a_mark_of_no_attempt_is_damaged(uri: str, tmp_path: Path, dry_run: bool) -> None:
    remote = RemoteRun(uri, tmp_path / "cache")
    remote.objects.root.put("control/attempt-999999", b"")
    held = remote.held(wait=False, console=QUIET, only_look=dry_run)
    with pytest.raises(DamagedError, match="control/attempt-999999 is damaged"), held:
        pass
    remote.objects.root.delete("control/attempt-999999")
    with remote.held(wait=False, console=QUIET, only_look=dry_run):
        assert not list(remote.folder.glob("control/attempt-*")), "the copy remembers nothing of it"


def test_a_place_is_refused_before_anything_is_prepared(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_expensive(*_: Any, **__: Any) -> Any:
        pytest.fail("rows were looked at")

    monkeypatch.setattr("akd_dist.jobs.train_students.open_rows", nothing_expensive)
    recipe = a_recipe([a_student("a")])
    places: dict[str, Any] = {"store_root": tmp_path / "stores", "cache_root": tmp_path / "cache"}
    before = RunObjects.at(bucket).root.list()
    for dry_run in (False, True):
        with pytest.raises(MachineError, match="NoSuchBucket"):
            akd_dist.train_students(recipe, run_root="s3://no-such-bucket/runs", dry_run=dry_run, **places)
        with monkeypatch.context() as patch:
            patch.setattr(S3Root, "put_new", lambda root, key, data: bool(root.put(key, data)) or True)
            with pytest.raises(MachineError, match="without overwriting"):
                akd_dist.train_students(recipe, run_root=f"{bucket}/runs", dry_run=dry_run, **places)
    assert RunObjects.at(bucket).root.list() == before


def test_where_there_is_no_run_that_is_said(bucket: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(f"there is no run in {bucket}/runs/none")):
        reader_of(f"{bucket}/runs/none").read()
    assert command("status", f"{bucket}/runs/none") == RefusedError.code


# ---- a run that is done, without Ray


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe(STUDENTS)


@pytest.fixture(scope="module")
def done(recipe: Recipe, stores: dict[str, str], home: Path, bucket: str) -> str:
    """What a driver comes to whose cohorts were trained by a plain loop."""
    uri, cache = f"{bucket}/done/fleet", home / "cache"
    train_in_process(recipe, stores, run=uri, cache_root=str(cache))
    splits = prepare(recipe.data, cache)
    remote = RemoteRun(uri, cache)
    with remote.held(wait=False, console=QUIET), remote.followed(), driving(remote.folder, moves=False):
        base = replace(fleet_job(recipe, splits, stores, remote.folder, str(cache)), run_uri=uri)
        begin_run(remote.folder, recipe, run_identity(recipe, splits), moves=False)
        remote.bring()
        opened = [{split: open_store(store) for split, store in stores.items()}]
        finish_run(remote.folder, recipe, splits, base, opened, {"a": 1, "b": 1}, 1, 1.0)
        remote.publish()
    return uri


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The document that a command prints; nothing that it tells names the copy on this machine."""
    assert command(*words, "--json") == 0
    out, err = capsys.readouterr()
    assert "/reader/" not in out + err
    return json.loads(out)


def command(*words: str) -> Any:
    """The code that a command leaves with."""
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


def test_its_documents_name_no_copy(done: str, stores: dict[str, str]) -> None:
    root = RunObjects.at(done).root
    fleet = json.loads(root.get("fleet.json"))
    assert (fleet["run"], fleet["store"]) == (".", stores["train"])
    assert [student["path"] for student in fleet["students"]] == ["students/a", "students/b"]
    for name in ("fleet.json", "identity.json", "recipe.yaml", "report.html", "control/driver.json"):
        assert b"/driver/fleet" not in root.get(name), name
    assert not [key for key in root.parent.list() if key.endswith(".claim")]


def test_status_reads_it_from_there(done: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "status", done)
    assert (found["run"], found["state"], found["over"]) == (done, "done", 2)
    assert [student["state"] for student in found["students"]] == ["done", "done"]
    assert command("status", done) == 0
    assert "fleet is done" in capsys.readouterr().out


def test_report_writes_its_page_there(done: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = RunObjects.at(done).root
    page = root.get("report.html")
    root.delete("report.html")
    found = said(capsys, "report", done)
    assert [(one["run"], one["report"], one["problems"]) for one in found["runs"]] == [
        (done, f"{done}/report.html", [])
    ]
    assert root.get("report.html") == page
    assert command("report", done) == 0
    assert f"report  {done}/report.html" in capsys.readouterr().out
    assert akd_dist.report(done, out=tmp_path / "page.html").read_bytes() == page


def test_a_student_is_used_from_there(
    done: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student, fleet = f"{done}/students/b", json.loads(RunObjects.at(done).root.get("fleet.json"))
    found = said(capsys, "evaluate", student, done, "--with", f"{done}/students/a")
    assert (found["student"]["path"], found["others"][0]["path"], found["data"]) == (
        student,
        f"{done}/students/a",
        done,
    )
    assert found["student"]["metrics"]["accuracy"] == fleet["students"][1]["test"]["accuracy"]
    found = said(capsys, "predict", student, done)
    assert (found["student"], found["out"]) == (student, str(tmp_path / "b.parquet"))
    found = said(capsys, "export", student, "--to", "torch-export")
    assert (found["student"], found["data"], (tmp_path / "b.pt2").exists()) == (student, done, True)
    module = akd_dist.load_model(student)
    assert sum(one.numel() for one in module.parameters()) > 0


def test_its_rows_are_opened_from_there(done: str, home: Path) -> None:
    """And its stores are looked for where the run says that they lie: here its teacher is not kept."""
    assert len(akd_dist.distillation_dataset(done, split="test", cache_root=home / "cache")) == 359
    with pytest.raises(RefusedError, match="the train rows are not there") as refused:
        akd_dist.distillation_dataset(done, cache_root=home / "cache")
    assert refused.value.got == f"no teacher under {home / 'stores'}"


def test_a_student_that_is_not_there(done: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", f"{done}/students/none", done) == RefusedError.code
    told = capsys.readouterr().err
    assert f"{done}/students/none is not a model folder" in told
    assert "no such student" in told
    assert f"akd-dist status {done}" in told


def test_a_live_run_is_followed(recipe: Recipe, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver and a worker that tell, and a reader on a third machine."""
    monkeypatch.setattr("akd_dist.tracking.remote.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("akd_dist.tracking.remote.copy_to_read", lambda uri: RunCopy(uri, tmp_path / "third" / "fleet"))
    remote = RemoteRun(uri, tmp_path / "driver")
    with remote.followed(), driving(remote.folder, moves=False):
        remote.begin(1)
        students = [StudentProgress(name=name, state="waiting", epochs=1, steps_total=9) for name in ("a", "b")]
        plan = FleetPlan(attempt=1, at=time.time(), metric="accuracy", students=students, cohorts=[])
        write_document(remote.folder / "control" / "plan.json", plan)
        remote._tell(now=True)
        reader = RemoteReader(uri)
        assert {student.state for student in reader.read().students} == {"waiting"}
        for steps in (3, 6):
            training = [student.model_copy(update={"state": "training", "steps": steps}) for student in students]
            told = CohortProgress(training=True, at=time.time(), students=training)
            remote.objects.bundle("cohort-1-0", {"control/progress-cohort-1-0.json": told.spelled().decode()})
            found = reader.read()
            assert (found.run, found.state, found.alive, found.steps) == (uri, "training", True, 2 * steps)
    assert reader.read().state == "stopped"


# ---- with Ray


@pytest.fixture
def ray_there(ray_cluster: None, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's Ray, which may be older than the bucket and know nothing of it."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def run_worker_there(config: dict[str, Any]) -> Any:
        os.environ.update(variables)
        return run_worker(config)

    monkeypatch.setattr(ray_train, "run_worker", run_worker_there)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_there")
def test_train_students_into_a_bucket(
    recipe: Recipe, stores: dict[str, str], home: Path, bucket: str, tmp_path: Path
) -> None:
    """The weights are those of a local run; the same command again finds it done, from another cache as well."""
    train_in_process(recipe, stores, run=home / "plain", cache_root=str(home / "cache"))
    teacher = a_recipe(STUDENTS, teacher={"weights": str(home / "teacher")})
    places: dict[str, Any] = {"store_root": home / "stores", "run_root": f"{bucket}/ray"}
    fleet = akd_dist.train_students(teacher, cache_root=home / "cache", console=QUIET, **places)
    uri = f"{bucket}/ray/fleet"
    assert fleet["run"] == uri
    assert [student["path"] for student in fleet["students"]] == [f"{uri}/students/a", f"{uri}/students/b"]
    copy = RunCopy(uri, tmp_path / "fleet")
    copy.refresh(MODEL)
    assert weights(copy.folder) == weights(home / "plain")
    again = akd_dist.train_students(teacher, cache_root=tmp_path / "cache", console=QUIET, **places)
    assert again["students"] == fleet["students"]
    assert RunObjects.at(uri).control().last == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_there", "stores")
def test_compare_into_a_bucket(home: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = a_recipe([a_student("a")], teacher={"weights": str(home / "teacher")})
    places: dict[str, Any] = {"store_root": home / "stores", "cache_root": home / "cache", "run_root": f"{bucket}/ray"}
    found = akd_dist.compare(recipe, seeds=2, console=QUIET, **places)
    uri = f"{bucket}/ray/fleet-compare"
    assert found["run"] == uri
    root = RunObjects.at(uri).root
    kept = json.loads(root.get("comparison.json"))
    assert (kept["run"], kept["table"]) == (".", found["table"])
    assert root.get("comparison.md")
    assert b"<table" in root.get("report.html")
    assert said(capsys, "report", uri)["runs"][0]["run"] == uri
