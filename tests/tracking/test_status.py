"""`akd-dist status`: what is told of a run that goes, stopped, was killed or is done, from files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

import akd_dist
from akd_dist import cli
from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import read_progress
from akd_dist.documents.damage import read_result
from akd_dist.documents.json_schema import schemas
from akd_dist.documents.status import (
    CohortProgress,
    CohortStatus,
    FleetPlan,
    RunDriver,
    StatusDocument,
    StudentProgress,
)
from akd_dist.jobs.cluster import StopFlag
from akd_dist.jobs.fleet import Fleet
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.planner import cohort_job
from akd_dist.recipe import Recipe
from akd_dist.reporting.results import read_run
from akd_dist.tracking.status import (
    Pace,
    RunReader,
    birth_of,
    driving,
    read_document,
    read_metrics,
    standing,
    typed_command,
    write_document,
)
from tests.fleets import ANNEALING, HARD, a_recipe, a_student, a_teacher, stores_of
from tests.survivors import HELD_MODELS, a_held_model


def planned(name: str, **changes: Any) -> StudentProgress:
    return StudentProgress.model_validate({"name": name, "state": "waiting", "epochs": 4, "steps_total": 40} | changes)


def a_run(run: Path, *names: str, at: float | None = None, **changes: Any) -> None:
    """What a driver leaves while it trains."""
    plan = {"attempt": 2, "at": time.time() if at is None else at, "metric": "accuracy", "cohorts": []}
    students = [planned(name) for name in names]
    write_document(run / "control" / "plan.json", FleetPlan.model_validate(plan | {"students": students} | changes))


def tell(run: Path, cohort: str, *students: StudentProgress) -> None:
    """What a worker leaves."""
    document = CohortProgress(training=True, at=time.time(), students=list(students))
    write_document(run / "control" / f"progress-cohort-{cohort}.json", document)


def leave(run: Path, name: str, *, result: dict[str, Any] | None = None, checkpoint: str | None = None) -> None:
    folder = run / "students" / name
    (folder / "checkpoints").mkdir(parents=True)
    record = {"epoch": 0, "stage": "annealing", "temperature": 3, "train_loss": 0.5, "validation": {"accuracy": 0.25}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(a_result(name, **result)))
    if checkpoint is not None:
        (folder / "checkpoints" / f"{checkpoint}.ckpt").touch()


def a_result(name: str, **changes: Any) -> dict[str, Any]:
    """What a student leaves when it ends."""
    ended = {
        "name": name, "model": "mlp-8", "parameters": 610, "objective": "annealing_kd", "tau_max": 3, "seed": 0,
        "state": "done", "reason": None, "epochs": 4, "validation": {"accuracy": 0.75}, "test": {"accuracy": 0.7},
        "agreement": 0.8, "seconds": 1.0, "stage1_from": None, "attempt": 1, "path": ".",
    }  # fmt: skip
    return ended | changes


def a_fleet(*students: str) -> dict[str, Any]:
    """What a run that is done leaves."""
    entries = [a_result(name) | {"store": "../stores/id", "teacher": "ab"} for name in students]
    teacher = {"model": "cnn-8", "parameters": 1, "test": {"accuracy": 0.9}, "fingerprint": "ab"}
    known = {"run": ".", "store": "../stores/id", "task": "classification", "metric": "accuracy", "teacher": teacher}
    return known | {"students": entries, "cohorts": 1, "seconds": 1.0}


def by_name(status: StatusDocument) -> dict[str, StudentProgress]:
    return {student.name: student for student in status.students}


# ---- reading


def test_a_run_that_goes_is_told_from_what_its_workers_leave(tmp_path: Path) -> None:
    running = planned("one", state="training", epoch=1, steps=15, steps_per_second=5.0, seconds_left=5.0, loss=0.5)
    with driving(tmp_path):
        waiting = CohortStatus(state="waiting", students=["two"], waits_for="2 free CPUs")
        a_run(tmp_path, "one", "two", "three", cohorts=[waiting])
        tell(tmp_path, "1-0", planned("one", state="failed"))  # an earlier attempt
        tell(tmp_path, "2-0", running)
        leave(tmp_path, "two", checkpoint="000001-00000005-0001")
        leave(tmp_path, "three", result={})
        status = RunReader(tmp_path).read()
    assert (status.state, status.alive, status.over) == ("training", True, 1)
    assert by_name(status)["one"] == running
    assert (by_name(status)["two"].state, by_name(status)["two"].steps) == ("waiting", 15)
    assert (by_name(status)["three"].state, by_name(status)["three"].validation) == ("done", 0.75)
    assert (status.steps, status.steps_total) == (15 + 15 + 40, 120)
    assert status.seconds_left == (120 - 70) / 5


def test_a_cohort_that_was_started_again_knows_better(tmp_path: Path) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
        for number, steps in (("2-9", 30), ("2-10", 20)):
            tell(tmp_path, number, planned("one", state="training", steps=steps))
        assert by_name(RunReader(tmp_path).read())["one"].steps == 20


def test_a_student_the_driver_gave_up_is_failed(tmp_path: Path) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
        leave(tmp_path, "one", result={"state": "failed", "reason": "once before"})
        time.sleep(0.02)
        tell(tmp_path, "2-0", planned("one", state="training"))
        reader = RunReader(tmp_path)
        assert by_name(reader.read())["one"].state == "training"
        time.sleep(0.02)
        again = a_result("one", state="failed", reason="again and again", epochs=1, validation=None)
        (tmp_path / "students" / "one" / "result.json").write_text(json.dumps(again))
        assert by_name(reader.read())["one"].reason == "again and again"


def test_reasons_and_folders_that_are_no_utf_8_are_written_and_read(tmp_path: Path) -> None:
    """As of an OSError that names such a file: one such student ended whole fleets."""
    reason = "OSError: /data/\udcff.txt"
    leave(tmp_path, "one", result={"state": "failed", "reason": reason})
    with driving(tmp_path):
        a_run(tmp_path, "one", "two")
        tell(tmp_path, "2-0", planned("two", state="failed", reason=reason))
        status = RunReader(tmp_path).read()
        assert {name: one.reason for name, one in by_name(status).items()} == dict.fromkeys(
            ("one", "two"), "OSError: /data/\\udcff.txt"
        )
        for document in (status, CohortProgress(training=False, at=0, students=status.students)):
            write_document(tmp_path / "again.json", document)
            assert read_document(tmp_path / "again.json", type(document)) == document
    path = tmp_path / "control" / "driver.json"
    driver = read_document(path, RunDriver)
    assert driver is not None
    odd = driver.model_copy(update={"folder": "/data/\udcff"})  # a path is kept: it is to be typed again
    write_document(path, odd)
    assert read_document(path, RunDriver) == odd


@pytest.mark.parametrize("closed", ["students/two", "students", "."])
def test_a_folder_that_is_closed_takes_nothing_from_the_others(
    closed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(tempfile.mkdtemp(prefix="akd-dist-closed-"))  # others may not enter the folder of tests
    run.chmod(0o755)
    a_run(run, "one", "two")
    for name in ("one", "two"):
        leave(run, name, result={})
    (run / "fleet.json").write_text(json.dumps(a_fleet("one", "two")))
    (run / closed).chmod(0)
    try:
        if os.geteuid() == 0:
            os.seteuid(12345)  # permissions do not bind root
        if closed == ".":
            with pytest.raises(MachineError, match="cannot read"):
                RunReader(run).read()
            return
        status = RunReader(run).read()
        assert any("cannot read students/two/" in problem for problem in status.problems)
        assert [one.name for one in status.students] == ["one", "two"]
        if closed == "students/two":
            assert by_name(status)["one"].state == "done"
            assert not any("students/one" in problem for problem in status.problems)
        assert any("students/two/metrics.jsonl" in problem for problem in read_run(run).problems)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (run / closed).chmod(0o755)
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "changes", [{"metric": "auc"}, {"name": "x" * 256}, {"name": "a\0"}, {"name": ".."}, {"epochs_shared": 5}], ids=str
)
def test_a_plan_that_somebody_edited_is_none(changes: dict[str, Any], tmp_path: Path) -> None:
    a_run(tmp_path, "one")
    path = tmp_path / "control" / "plan.json"
    plan = json.loads(path.read_text())
    (plan if "metric" in changes else plan["students"][0]).update(changes)
    path.write_text(json.dumps(plan))
    assert RunReader(tmp_path).read().students == []


def test_a_checkpoint_whose_name_says_too_much_counts_as_the_last(tmp_path: Path) -> None:
    a_run(tmp_path, "one")
    leave(tmp_path, "one", checkpoint=f"{10**11}-{10**11}-0001")
    assert by_name(RunReader(tmp_path).read())["one"].steps == 40


def test_a_retried_student_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    failed = {"state": "failed", "reason": "once before", "epochs": 3}
    names = ["one", "two", "three", "over"]
    with driving(tmp_path):
        a_run(tmp_path, *names, cohorts=[CohortStatus(state="starting", students=names)])
        leave(tmp_path, "one", result=failed)
        leave(tmp_path, "two", result=failed, checkpoint="000002-00000003-0001")
        leave(tmp_path, "three", result=failed, checkpoint="000001-00000000-0002")
        tell(tmp_path, "2-0", planned("three", state="failed", reason="just before its workers died", steps=40))
        leave(tmp_path, "over", result={})  # its workers start again for the others
        status = RunReader(tmp_path).read()
    told = {student.name: (student.state, student.steps, student.reason) for student in status.students}
    assert told == {
        "one": ("waiting", 0, None),
        "two": ("waiting", 23, None),
        "three": ("waiting", 10, None),
        "over": ("done", 40, None),
    }
    assert (status.steps, status.steps_total, status.over) == (73, 160, 1)
    stopped = by_name(RunReader(tmp_path).read())
    assert {name: (one.state, one.steps, one.steps_total) for name, one in stopped.items()} == {
        name: ("done", 40, 40) if name == "over" else ("failed", 30, 40) for name in names
    }


def test_a_run_whose_driver_let_go_of_it_is_stopped(tmp_path: Path) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one", "two")
        tell(tmp_path, "2-0", planned("one", state="training", steps=25, steps_per_second=9.0))
    leave(tmp_path, "one", checkpoint="000002-00000003-0002")
    status = RunReader(tmp_path).read()
    assert (status.state, status.alive, status.steps_per_second, status.seconds_left) == ("stopped", False, 0.0, None)
    one = by_name(status)["one"]
    assert (one.state, one.epoch, one.steps, one.stage, one.temperature) == ("stopped", 2, 23, "annealing", 3)
    assert by_name(status)["two"].state == "waiting"
    assert status.driver is not None
    assert status.at == status.driver.ended


def test_a_killed_driver_is_gone_though_its_pid_is_reused(tmp_path: Path) -> None:
    with driving(tmp_path):
        driver = read_document(tmp_path / "control" / "driver.json", RunDriver)
    assert driver is not None
    assert driver.birth is not None
    a_run(tmp_path, "one")
    for changes, alive in (
        ({"ended": None}, True),
        ({"ended": None, "birth": "1"}, False),
        ({"ended": None, "pid": 2**22 + 1}, False),
    ):
        write_document(tmp_path / "control" / "driver.json", driver.model_copy(update=changes))
        status = RunReader(tmp_path).read()
        assert (status.alive, status.state) == (alive, "training" if alive else "stopped")
    assert birth_of(os.getpid()) == driver.birth


def test_a_driver_that_is_dead_but_not_buried_is_gone(tmp_path: Path) -> None:
    """Its parent has not asked for its end, as the first process of many containers never does."""
    child = subprocess.Popen(["sleep", "60"])
    with driving(tmp_path):
        driver = read_document(tmp_path / "control" / "driver.json", RunDriver)
    assert driver is not None
    its = {"pid": child.pid, "birth": birth_of(child.pid), "ended": None}
    write_document(tmp_path / "control" / "driver.json", driver.model_copy(update=its))
    a_run(tmp_path, "one")
    assert RunReader(tmp_path).read().state == "training"
    child.kill()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    status = RunReader(tmp_path).read()
    child.wait()
    assert (status.alive, status.state) == (False, "stopped")


def test_a_run_is_done_since_its_results_were_written(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps(a_fleet()))
    os.utime(tmp_path / "fleet.json", (1e9, 1e9))
    with driving(tmp_path):  # it tries again who failed, or only shows the results
        assert RunReader(tmp_path).read().state == "preparing"
        (tmp_path / "fleet.json").touch()
        assert RunReader(tmp_path).read().state == "done"
        os.utime(tmp_path / "fleet.json", (1e9, 1e9))
    status = RunReader(tmp_path).read()
    assert (status.state, status.at) == ("done", 1e9)


@pytest.mark.parametrize(("silent", "state"), [(1.0, "training"), (3600.0, "stopped")])
def test_a_remote_driver_lives_while_it_gives_signs(tmp_path: Path, silent: float, state: str) -> None:
    with driving(tmp_path):
        driver = read_document(tmp_path / "control" / "driver.json", RunDriver)
    assert driver is not None
    elsewhere = {"host": "somewhere-else", "ended": None, "since": time.time() - 7200}
    write_document(tmp_path / "control" / "driver.json", driver.model_copy(update=elsewhere))
    a_run(tmp_path, "one", at=time.time() - silent)
    status = RunReader(tmp_path).read()
    assert (status.alive, status.state) == (None, state)


def test_a_run_that_is_resumed_is_prepared_until_it_trains_again(tmp_path: Path) -> None:
    a_run(tmp_path, "one", at=time.time() - 100)
    leave(tmp_path, "one", checkpoint="000001-00000000-0001")
    with driving(tmp_path):
        status = RunReader(tmp_path).read()
        assert (status.state, by_name(status)["one"].state) == ("preparing", "stopped")
        a_run(tmp_path, "one")
        status = RunReader(tmp_path).read()
        assert (status.state, by_name(status)["one"].state) == ("training", "waiting")


def test_documents_of_another_version_count_as_not_there(tmp_path: Path) -> None:
    with driving(tmp_path):
        for name in ("plan", "driver"):
            (tmp_path / "control" / f"{name}.json").write_text('{"of": "another version"}')
        assert RunReader(tmp_path).read().state == "stopped"


def test_nothing_is_written_and_nobody_is_locked_out(tmp_path: Path) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
        tell(tmp_path, "2-0", planned("one", state="training"))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        RunReader(tmp_path).read()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_did_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(folder: Path, *arguments: Any) -> StudentProgress:
        read.append(folder.name)
        return standing(folder, *arguments)

    monkeypatch.setattr("akd_dist.tracking.status.standing", counted)
    a_run(tmp_path, "one", "two")
    leave(tmp_path, "one", result={})
    reader = RunReader(tmp_path)
    for _ in range(3):
        reader.read()
    assert read == ["one", "two"]


def test_a_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace(0, 100.0)
    assert pace.per_second(10, 101.0) == 10
    for second in range(102, 140):
        pace.per_second(10 + second - 101, float(second))
    assert pace.per_second(49, 140.0) == 1
    slow = Pace(0, 0.0)
    assert slow.per_second(1, 30.0) == 1 / 30  # steps that take longer than that count as well


def test_the_command_is_told_as_one_would_type_it() -> None:
    given = ["train-students", "my recipe.yaml", "--fresh"]  # which would not go on, but start over again
    for program in ("/env/bin/akd-dist", "/env/lib/akd_dist/cli/__main__.py"):
        assert typed_command([program, *given], ["python", "x"]) == "akd-dist train-students 'my recipe.yaml'"
    assert typed_command(["mine.py"], ["python", "-u", "mine.py"]) == "python -u mine.py"


# ---- what a cohort tells


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("status")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    students = [a_student("annealing"), a_student("hard", objective=HARD)]
    return a_recipe(students, teacher={"weights": a_teacher(a_recipe(students), home / "teacher", home / "cache")})


@pytest.fixture(scope="module")
def stores(home: Path, recipe: Recipe) -> dict[str, str]:
    return stores_of(recipe, str(home / "teacher"), home)


def test_a_cohort_tells_of_every_student_as_it_goes(
    home: Path, recipe: Recipe, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("akd_dist.distill.progress.PROGRESS_SECONDS", 0.0)
    told: list[CohortProgress] = []
    monkeypatch.setattr("akd_dist.distill.progress.write_document", lambda _path, document: told.append(document))
    splits = prepare(recipe.data, home / "cache")
    base = fleet_job(recipe, splits, stores, tmp_path, str(home / "cache"))
    train_cohort(cohort_job(base, tuple(recipe.students), {}))

    first, last = told[0], told[-1]
    assert [student.state for student in first.students] == ["training", "training"]
    assert [student.state for student in last.students] == ["done", "done"]
    story = [document.students[0] for document in told]
    assert {student.temperature for student in story if student.stage == "annealing"} == {2, 1}
    assert {student.temperature for student in story if student.stage == "hard_labels"} == {None}
    assert [student.steps for student in story] == sorted(student.steps for student in story)
    assert story[-1].steps == story[-1].steps_total
    middle = story[len(story) // 2]
    assert middle.loss is not None
    assert middle.validation is not None
    assert middle.rows_per_second > 0
    assert middle.seconds_left is not None
    assert middle.rows_per_second == pytest.approx(middle.steps_per_second * len(splits.train) * 3 / middle.steps_total)
    result = json.loads((tmp_path / "students" / "annealing" / "result.json").read_bytes())
    assert story[-1].validation == result["validation"]["accuracy"]


def test_a_shared_stage_is_counted_once(
    home: Path, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = [ANNEALING | {"stage2_epochs": epochs} for epochs in (1, 2, 3)]
    students = [a_student(f"fork-{index}", objective=one) for index, one in enumerate(objectives)]
    recipe = a_recipe(students, teacher={"weights": str(home / "teacher")})
    splits = prepare(recipe.data, home / "cache")
    base = fleet_job(recipe, splits, stores, tmp_path, str(home / "cache"))
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), StopFlag(), Console(quiet=True))
    fleet.waiting = [tuple(recipe.students)]
    before = fleet._plan()
    told: list[CohortProgress] = []
    monkeypatch.setattr("akd_dist.distill.progress.PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("akd_dist.distill.progress.write_document", lambda _path, document: told.append(document))
    train_cohort(cohort_job(base, tuple(recipe.students), {}))
    fleet.waiting = []
    resumed = fleet._plan()
    stage1 = recipe.students[0].objective.epochs - 1
    own = [stage1 + 1, 2, 3]
    per_epoch = fleet.costs.steps_until(recipe.students[0], 1)
    documents: list[FleetPlan | CohortProgress] = [before, *told, resumed]
    for document in documents:
        assert [student.steps_total for student in document.students] == [per_epoch * epochs for epochs in own]
    write_document(tmp_path / "control" / "plan.json", before)
    after = RunReader(tmp_path).read()
    assert (after.steps, after.steps_total) == (per_epoch * sum(own), per_epoch * sum(own))
    assert {student.epochs_shared for student in after.students[1:]} == {stage1}


def test_what_was_planned_stays_although_a_leader_fails(tmp_path: Path) -> None:
    rider = {"epochs": 4, "epochs_shared": 3, "steps_total": 10}
    a_run(tmp_path, students=[planned(name, **rider) for name in ("rode", "alone", "unmade", "rides", "began")])
    leave(tmp_path, "rode", result={"stage1_from": "first"})
    leave(tmp_path, "alone", result={"stage1_from": None})
    leave(tmp_path, "unmade", result={"stage1_from": None, "epochs": 0, "state": "failed"})
    leave(tmp_path, "rides", checkpoint="000003-000002-1")
    leave(tmp_path, "began", checkpoint="000002-000005-1")
    students = by_name(RunReader(tmp_path).read())
    counts = {name: (one.steps, one.steps_total) for name, one in students.items()}
    assert counts == {"rode": (10, 10), "alone": (10, 10), "unmade": (0, 10), "rides": (2, 10), "began": (6, 10)}


def test_what_a_cohort_wrote_is_what_is_read(
    home: Path, recipe: Recipe, stores: dict[str, str], tmp_path: Path
) -> None:
    splits = prepare(recipe.data, home / "cache")
    job = cohort_job(fleet_job(recipe, splits, stores, tmp_path, str(home / "cache")), tuple(recipe.students), {})
    assert read_progress(job) is None
    train_cohort(job)
    document = read_progress(job)
    assert document is not None
    assert not document.training
    assert [student.name for student in document.students] == ["annealing", "hard"]


# ---- the command


def status_of(run: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(run), *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_where_there_is_no_run_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        code, out, err = status_of(run, capsys=capsys)
        assert (code, out) == (4, "")
        assert f"there is no run in {run}" in err
    with pytest.raises(RefusedError):
        RunReader(tmp_path).read()


def test_a_stopped_run_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
    code, out, _ = status_of(tmp_path, capsys=capsys)
    assert code == 0
    assert f"{tmp_path} stopped at " in out
    assert "the same command goes on: " in out
    assert "one" in out
    assert status_of(tmp_path, "--watch", capsys=capsys)[1] == out  # there is nothing to wait for


def test_json_is_a_document_of_its_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one", "two")
        tell(tmp_path, "2-0", planned("one", state="training"))
        code, out, _ = status_of(tmp_path, "--json", capsys=capsys)
    assert code == 0
    jsonschema.validate(json.loads(out), schemas()["status"])
    assert StatusDocument.model_validate_json(out).state == "training"


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
    code = (
        "import sys\nfrom akd_dist.cli import main\n"
        f"try:\n    main(['status', {str(tmp_path)!r}])\nexcept SystemExit:\n"
        "    print(*[name for name in ('torch', 'ray', 'zarr', 'numpy', 'pyarrow') if name in sys.modules], sep='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


# ---- a real fleet, watched


@pytest.mark.ray
def test_a_fleet_is_watched_while_it_trains(
    home: Path, recipe: Recipe, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "held_models.py").write_text(HELD_MODELS)
    hold, run = tmp_path / "hold", tmp_path / "runs" / "fleet"
    hold.touch()
    students = [a_student(f"s{seed}", seed=seed, objective=HARD | {"epochs": 8}) for seed in range(2)]
    students.append(a_student("held", objective=HARD | {"epochs": 8}, model=a_held_model(at=150)))
    fleet = a_recipe(students, teacher={"weights": recipe.teacher.weights}, folder=str(tmp_path))
    seen: list[StatusDocument] = []
    over = threading.Event()

    def watch() -> None:
        reader = RunReader(run)
        while not over.wait(0.1):
            try:
                seen.append(reader.read())
            except RefusedError:
                continue
            training = [one for one in seen[-1].students if one.state == "training"]
            if any(one.rows_per_second > 0 and one.loss is not None for one in training):
                hold.unlink(missing_ok=True)  # until here, a student of them waits

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open(tmp_path / "err", "w") as err:
        trained = akd_dist.train_students(
            fleet,
            store_root=str(home / "stores"),
            run_root=str(tmp_path / "runs"),
            cache_root=str(home / "cache"),
            trackers=["mlflow"],
            console=Console(file=err, width=80),
        )
    over.set()
    watcher.join()
    assert {student["state"] for student in trained["students"]} == {"done"}
    states = list(dict.fromkeys(status.state for status in seen))
    assert states[:2] == ["preparing", "training"]
    assert any(cohort.state == "starting" for status in seen for cohort in status.cohorts)
    assert not hold.exists(), "nobody was seen to train"
    done = RunReader(run).read()
    assert (done.state, done.over, done.steps) == ("done", 3, done.steps_total)

    told = (tmp_path / "err").read_text()
    assert "\r" not in told
    assert "training 3 students in 1 cohort" in told
    assert "s1 is done after 8 of 8 epochs: validation accuracy" in told
    for name in ("s0", "s1", "held"):
        events = EventAccumulator(str(run / "students" / name / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(8))
        assert len(events.Scalars("test/accuracy")) == 1
    assert len(list((run / "mlruns").glob("*/*/tags/akd_dist.student"))) == 3


# ---- documents from elsewhere


BRACKETS = b"[" * 200_000
FOREIGN: dict[str, bytes | dict[str, Any] | None] = {
    "no JSON": b'{"state": "do',
    "brackets": BRACKETS,
    "brackets in a key": b'{"name": "one", "state": ' + BRACKETS,
    "another shape": b"[1, 2]",
    "a number": b"3",
    "a misspelt key": {"epohcs": 4},
    "another type": {"epochs": "four"},
    "a number without end": b'{"epochs": ' + b"9" * 100_000 + b"}",
    "a huge number": {"epochs": 10**30},
    "not a number": {"seconds": float("nan")},
    "no end": {"seconds": float("inf")},
    "another student's": {"name": "two"},
    "a folder": None,
}


# What is no JSON at all was cut by a loss of power: the student goes on from its last checkpoint.
TORN = ("no JSON", "brackets", "brackets in a key", "a number without end")
CONTROL = ("driver", "plan", "progress-cohort-2-0")


def put(path: Path, content: bytes | dict[str, Any] | None, whole: dict[str, Any]) -> None:
    """A document as somebody else would leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(whole | content))


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_result_is_a_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one", "two")
    leave(tmp_path, "two", result={})
    put(tmp_path / "students" / "one" / "result.json", FOREIGN[case], a_result("one"))
    code, out, err = status_of(tmp_path, capsys=capsys)
    assert code == 0
    assert ("one", "waiting") in [tuple(line.split()[:2]) for line in out.splitlines()]
    assert ("two", "done") in [tuple(line.split()[:2]) for line in out.splitlines()]
    result = tmp_path / "students" / "one" / "result.json"
    if case in TORN:
        assert err == ""
        assert read_result(result.parent) is None
        return
    assert err.startswith("warning: ")
    assert err.count("\n") == 1
    assert ("epohcs" if case == "a misspelt key" else "students/one/result.json") in err
    with pytest.raises((DamagedError, MachineError)):
        read_result(result.parent)


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("name", ["fleet.json", *(f"control/{name}.json" for name in CONTROL)])
def test_status_tells_what_it_can_whatever_a_document_holds(
    name: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
        tell(tmp_path, "2-0", planned("one", state="training"))
    leave(tmp_path, "one", checkpoint="000001-00000005-0001")
    (tmp_path / "fleet.json").write_text(json.dumps(a_fleet("one")))
    path = tmp_path / name
    whole = json.loads(path.read_bytes())
    path.unlink()
    put(path, FOREIGN[case], whole)
    code, _, err = status_of(tmp_path, capsys=capsys)
    assert code == 0
    assert "error" not in err


@pytest.mark.parametrize("moment", [1e30, -1.0, 1e18])
def test_a_time_that_no_calendar_has_is_not_believed(
    moment: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one")
    path = tmp_path / "control" / "driver.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"since": moment}))
    assert status_of(tmp_path, capsys=capsys)[0] == 0


def test_files_that_only_look_like_ours_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one", cohorts=[CohortStatus(state="starting", students=["one"])])
        (tmp_path / "control" / "progress-cohort-2-mine.json").write_text("{}")
        leave(tmp_path, "one", checkpoint="mine")
        os.mkfifo(tmp_path / "students" / "one" / "result.json")
        assert by_name(RunReader(tmp_path).read())["one"].state == "waiting"


LINES = {
    "brackets": BRACKETS,
    "another shape": b"[1]",
    "a misspelt key": b'{"epohc": 0, "stage": "kd", "train_loss": 0.5, "validation": null}',
    "not a number": b'{"epoch": 0, "stage": "kd", "train_loss": NaN, "validation": null}',
    "no validation": b'{"epoch": 0, "stage": "kd", "train_loss": 0.5, "validation": 3}',
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_of_metrics_is_a_line_of_status(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driving(tmp_path):
        a_run(tmp_path, "one", "two")
    for name in ("one", "two"):
        leave(tmp_path, name, result={})
    (tmp_path / "students" / "one" / "metrics.jsonl").write_bytes(LINES[case] + b"\n")
    code, out, err = status_of(tmp_path, capsys=capsys)
    assert code == 0
    assert out.count(" done ") == 2
    assert err.startswith("warning: students/one/metrics.jsonl is damaged: line 1: ")
    assert err.count("\n") == 1
    assert read_metrics(tmp_path / "students" / "one") == []
