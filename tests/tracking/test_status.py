"""`akd-dist status`: what is told of a run that goes, stopped, was killed or is done, from files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.documents.json_schema import schemas
from akd_dist.documents.status import CohortProgress, CohortStatus, RunDriver, StatusDocument, StudentProgress
from akd_dist.reporting.results import read_run
from akd_dist.tracking.status import (
    Pace,
    RunReader,
    birth_of,
    driving,
    read_document,
    standing,
    typed_command,
    write_document,
)
from tests.run_folders import a_fleet, a_result, a_run, by_name, leave, planned, status_of, tell


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
