"""What a run left, read back: refusals say what to do, and damage is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from akd_dist import cli
from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.documents.damage import read_epochs
from akd_dist.reporting.page import write_report
from akd_dist.reporting.results import read_fleet, read_run
from akd_dist.tracking.status import RunReader, driving
from akd_dist.tracking.view import next_line
from tests.made_runs import epochs_of, small_fleet, student, write_run


def test_links_in_a_circle_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for run in ("loop", "loop/below"):
        with pytest.raises(SystemExit) as left:
            cli.main(["report", str(tmp_path / run)])
        assert left.value.code in (4, 6)
        capsys.readouterr()


def test_documents_name_the_run_absolutely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    printed = []
    for words in (["report", "one", "two"], ["report", "one", "--out", "page.html"], ["status", "one"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--json"])
        assert left.value.code == 0
        printed.append(json.loads(capsys.readouterr().out))
    both, one, status = printed
    here = [str(tmp_path / name) for name in ("one", "two")]
    assert [each["run"] for each in both["runs"]] == here
    assert {each["run"] for each in both["comparison"]["groups"]} == set(here)
    assert one["runs"][0]["report"] == str(tmp_path / "page.html")
    assert status["run"] == here[0]


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no run in") as caught:
        write_report(tmp_path / "nowhere")
    assert caught.value.next is not None
    assert "akd-dist train-students" in caught.value.next


def test_of_a_folder_of_runs_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "identity.json").touch()
    with pytest.raises(RefusedError, match="there is no run in") as caught:
        write_report(tmp_path)
    assert caught.value.got == "a folder of runs: a, b"
    assert caught.value.next == f"name {tmp_path / 'a'}, or another of these"


def test_a_run_that_stopped_is_refused_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["akd-dist", "train-students", "digits.yaml", "--run-root", str(tmp_path)])
    run = tmp_path / "digits"
    (run / "students").mkdir(parents=True)
    with driving(run), pytest.raises(RefusedError, match=r"there are no results in .* yet") as caught:
        write_report(run)
    assert caught.value.next == f"wait for it; akd-dist status {run} follows it"
    with pytest.raises(RefusedError) as caught:
        write_report(run)
    assert f"{run} stopped" in str(caught.value.got)
    assert caught.value.next == next_line(RunReader(run).read())
    assert f"akd-dist train-students digits.yaml --run-root {tmp_path}" in str(caught.value.next)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": "x"}', "\udcff"])
def test_a_damaged_fleet_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "fleet.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedError, match=r"fleet\.json is damaged"):
        read_fleet(tmp_path)


def test_a_damaged_field_is_named(tmp_path: Path) -> None:
    fleet = small_fleet()
    fleet["students"][3]["state"] = "asleep"
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    with pytest.raises(DamagedError, match=r"(?s)students\.3\.state"):
        read_fleet(tmp_path)


def edited(path: list[str | int], value: Any) -> dict[str, Any]:
    """A fleet's document in which somebody wrote."""
    fleet = node = small_fleet()
    for key in path[:-1]:
        node = node[key]  # type: ignore[index]
    node[path[-1]] = value  # type: ignore[index]
    return fleet


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["metric"], "pearson", "metric"),
        (["metric"], "f1", r"teacher\.test"),
        (["teacher", "test"], {}, r"teacher\.test"),
        (["students", 3, "test"], {}, r"students\.3\.test"),
        (["students", 3, "test"], None, r"students\.3\.test"),
        (["students", 2, "name"], "x" * 5000, r"students\.2\.name"),
        (["students", 2, "name"], "../../..", r"students\.2\.name"),
        (["students", 2, "name"], "a\0", r"students\.2\.name"),
        (["students", 2, "path"], "a\0", r"students\.2\.path"),
        (["store"], "a\0", "store"),
        (["run"], "/a\0", "run"),
    ],
)
def test_a_fleet_that_contradicts_itself_is_refused_by_field(
    path: list[str | int], value: Any, field: str, tmp_path: Path
) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps(edited(path, value)))
    with pytest.raises(DamagedError, match=field):
        read_run(tmp_path)


def test_places_that_are_none_are_as_places_that_are_gone(tmp_path: Path) -> None:
    fleet = edited(["store"], "x" * 5000) | {"run": "/somewhere/" + "y" * 300}
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    assert read_run(tmp_path).fleet.store.endswith("x" * 5000)


def test_an_identity_without_an_objective_is_refused_by_field(tmp_path: Path) -> None:
    write_run(tmp_path)
    identity = {"teacher": {}, "dataset": {}, "students": {"a": {"objective": "x"}}}
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(DamagedError, match=r"students.*a\.objective"):
        read_run(tmp_path)


def test_metrics_drop_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    first, second, third = epochs_of(student("mlp-8", "kd", 0))[:3]
    path.write_text("\n".join(map(json.dumps, (first, second, third)))[:-20])
    assert [record.plain() for record in read_epochs(path.parent)] == [first, second]
    assert read_epochs(tmp_path / "students" / "b") == []


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"epoch": 1}', b"\xff\xfe", "loss"])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes | str) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    first, second = epochs_of(student("mlp-8", "kd", 0))[:2]
    if isinstance(line, str):
        line = json.dumps(dict(second, train_loss=line)).encode()
    path.write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n")
    with pytest.raises(DamagedError, match="damaged") as caught:
        read_epochs(path.parent)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"students": 3, "dataset": {}}', '{"dataset": {}}'])
def test_a_damaged_identity_is_named(tmp_path: Path, text: str) -> None:
    write_run(tmp_path)
    assert read_run(tmp_path).identity is None
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(DamagedError, match=r"identity\.json is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["fleet.json", "comparison.json", "identity.json"])
def test_what_cannot_be_read_is_no_bug(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(MachineError, match=f"cannot read .*{name}|{name} cannot be read"):
        read_run(tmp_path)
