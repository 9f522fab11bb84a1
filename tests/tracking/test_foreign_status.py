"""Whatever the documents of a run hold, `status` tells what it can."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import DamagedError, MachineError
from akd_dist.documents.damage import read_result
from akd_dist.documents.status import CohortStatus
from akd_dist.tracking.status import RunReader, driving, read_metrics
from tests.run_folders import a_fleet, a_result, a_run, by_name, leave, planned, status_of, tell

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
