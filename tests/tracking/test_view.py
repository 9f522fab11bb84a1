"""The view of a fleet: a table of eighty columns and as many lines as there are, and the lines without a terminal."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from akd_dist.base.formatting import duration, shortened
from akd_dist.documents.status import CohortStatus, FleetPlan, RunDriver, StatusDocument, StudentProgress
from akd_dist.tracking import progress
from akd_dist.tracking.progress import FleetMeter, tell
from akd_dist.tracking.status import driving
from akd_dist.tracking.view import (
    STILL_SECONDS,
    FleetView,
    Ticker,
    cells_of,
    clock,
    ended_line,
    headline,
    next_line,
    total_line,
    waiting_lines,
)


def a_student(name: str, state: str = "training", **changes: Any) -> StudentProgress:
    document = {
        "name": name, "state": state, "stage": "annealing", "epoch": 11, "epochs": 40, "temperature": 7,
        "loss": 0.12345678, "validation": 0.93456, "steps": 110, "steps_total": 400, "rows_per_second": 45_678.9,
        "steps_per_second": 12.0, "seconds_left": 200.4,
    }  # fmt: skip
    return StudentProgress.model_validate(document | changes)


def a_status(*students: StudentProgress, **changes: Any) -> StatusDocument:
    document = {
        "run": "runs/fleet", "state": "training", "driver": None, "alive": True, "at": None, "metric": "accuracy",
        "steps": 1_234, "steps_total": 10_000, "steps_per_second": 120.0, "rows_per_second": 99.0,
        "seconds_left": 3000.0, "over": 1, "cohorts": [], "students": list(students),
    }  # fmt: skip
    return StatusDocument.model_validate(document | changes)


def shown(view: FleetView, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_student_is_a_line_with_all_there_is_to_know() -> None:
    head, _, line, total = shown(FleetView(a_status(a_student("mlp-64-annealing_kd-t10-s0"))))
    assert head.split() == ["student", "stage", "epoch", "T", "loss", "accuracy", "rows/s", "left"]
    assert line.split() == [
        "mlp-64-annealing_kd-t10-s0",
        "annealing",
        "12/40",
        "7",
        "0.1235",
        "0.9346",
        "45,679",
        "3:20",
    ]
    assert total == "1,234 of 10,000 steps (12%), 120 steps/s, 50 min 0 s left; 1 of 1 students over"


def test_what_is_not_known_yet_is_a_dash() -> None:
    nothing = {"stage": None, "temperature": None, "loss": None, "validation": None, "epoch": 0, "seconds_left": None}
    line = shown(FleetView(a_status(a_student("one", "waiting", **nothing))))[2]
    assert line.split() == ["one", "waiting", "0/40", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize("height", [10, 24, 50])
def test_a_fleet_of_hundreds_fits_the_terminal(height: int) -> None:
    states = ["done"] * 100 + ["waiting"] * 100 + ["failed"] * 2 + ["training"] * 30
    students = [a_student(f"a-student-with-quite-a-long-name-t10-s{n}", state) for n, state in enumerate(states)]
    cohorts = [CohortStatus(state="waiting", students=["x", "y", "z"], waits_for="2 free CPUs")]
    lines = shown(FleetView(a_status(*students, cohorts=cohorts), "training", fit=True), height=height)
    assert len(lines) == height - 1  # the cursor stands on the last one
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("a-student")]
    assert lines[3 + len(rows)] == f"and {232 - len(rows)} more"
    assert all("annealing" in line for line in rows[:30])  # those that train come first
    if height == 50:
        assert [line.split()[1] for line in rows[30:33]] == ["failed", "failed", "waiting"]


def test_of_a_run_that_is_prepared_there_are_no_sums() -> None:
    assert shown(FleetView(a_status(state="preparing", steps=0, steps_total=0), "training", fit=True)) == ["training"]


def test_without_a_height_everybody_is_listed() -> None:
    students = [a_student(f"s{n}", "done" if n % 2 else "training") for n in range(99)]
    lines = shown(FleetView(a_status(*students)), width=160)
    assert [line.split()[0] for line in lines[2:-1]] == [f"s{n}" for n in range(99)]


@pytest.mark.parametrize("height", [1, 3, 5])
def test_a_tiny_terminal_breaks_nothing(height: int) -> None:
    students = [a_student(f"student-{n}") for n in range(9)]
    assert "and 9 more" in "\n".join(shown(FleetView(a_status(*students), "training", fit=True), 40, height))


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    name = "resnet-110-annealing_kd-with-much-to-say-t10-s12"
    assert shortened([name], 60) == [name]
    (short,) = shortened([name], 20)
    assert len(short) == 20
    assert short.startswith("resnet")
    assert short.endswith("t10-s12")


@pytest.mark.parametrize("room", [12, 16, 20, 31])
@pytest.mark.parametrize(
    "pattern",
    [
        "{}-annealing_kd-with-much-to-say-t10-s12",
        "resnet-110-annealing_kd-with-much-{}-to-say",
        "resnet-110-annealing_kd-with-much-to-say-s{}",
        "resnet-110-width-{}-annealing_kd-with-more-to-say-than-there-is-room-t10-s12",
    ],
)
def test_names_that_differ_are_cut_where_they_do_not(pattern: str, room: int) -> None:
    short = shortened([pattern.format(word) for word in ("10", "11", "200", "2")], room)
    assert len(set(short)) == 4
    assert max(map(len, short)) <= room


@pytest.mark.parametrize("width", [80, 40, 20])
def test_printed_once_nothing_is_cut(width: int) -> None:
    names = [f"resnet-110-width-{number}-annealing_kd-with-much-to-say-t10-s12" for number in (10, 11)]
    lines = shown(FleetView(a_status(*map(a_student, names))), width)
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    folded = max(line.find("  ") for line in lines if line[:6] == names[0][:6]) if width == 80 else 0
    if folded:
        assert all(name in "".join(line[:folded].strip() for line in lines[2:]) for name in names)


def test_names_are_not_taken_for_markup() -> None:
    assert shown(FleetView(a_status(a_student("a[red]b"))))[2].startswith("a[red]b")


def test_who_waits_for_what() -> None:
    riders = [a_student(f"rider-{n}", "waiting", waits_for="leader") for n in range(4)]
    cohorts = [
        CohortStatus(state="starting", students=["a", "b"]),
        CohortStatus(state="waiting", students=["c", "d", "e"], waits_for="2 free CPUs"),
    ]
    assert waiting_lines(a_status(a_student("leader"), *riders, cohorts=cohorts)) == [
        "starting: a and 1 more",
        "c and 2 more wait for 2 free CPUs",
        "rider-0 and 3 more wait for leader",
    ]
    many = [CohortStatus(state="waiting", students=[str(n), "x"], waits_for="4 free CPUs") for n in range(30)]
    lines = waiting_lines(a_status(cohorts=many))
    assert len(lines) == 4
    assert lines[-1] == "and 54 more students wait"
    four = [CohortStatus(state="waiting", students=[str(n)], waits_for="4 free CPUs") for n in range(4)]
    assert waiting_lines(a_status(cohorts=four))[-1] == "and 1 more student waits"


def test_those_without_success_are_counted() -> None:
    students = [a_student("a", "done"), a_student("b", "failed"), a_student("c", "diverged")]
    assert total_line(a_status(*students, over=3)).endswith("3 of 3 students over, 1 failed, 1 diverged")


def test_nats_are_shown_to_three_digits() -> None:
    student = a_student("small", "done", epoch=40, validation=3.14159)
    assert ended_line(student, "cross_entropy").endswith("validation cross_entropy 3.142")
    assert cells_of(student, "cross_entropy")[4] == "3.142"
    assert cells_of(student, "accuracy")[4] == "3.1416"


def test_the_end_of_a_student_is_a_line() -> None:
    assert ended_line(a_student("a", "done", epoch=40), "accuracy") == (
        "a is done after 40 of 40 epochs: validation accuracy 0.9346"
    )
    told = ended_line(a_student("a", "diverged", reason="the loss is nan"), "accuracy")
    assert told == "a diverged after 11 of 40 epochs: the loss is nan"


DRIVER = RunDriver(
    host="far-away", pid=4711, birth=None, since=1e9, command="akd-dist train-students r.yaml", folder=str(Path.cwd())
)


@pytest.mark.parametrize(
    ("changes", "said", "goes_on"),
    [
        ({"state": "training"}, "runs/fleet trains: process 4711 on far-away, since 2001-09-", False),
        ({"state": "preparing"}, "runs/fleet is prepared (data, teacher, store): process 4711 on far-away", False),
        ({"state": "done", "at": 1e9}, "runs/fleet is done, since 2001-09-", False),
        ({"state": "stopped", "at": 1e9, "alive": False}, "process 4711 on far-away is gone", True),
        ({"state": "stopped", "at": 1e9, "alive": None}, "4711 on far-away has not been heard of since", True),
    ],
)
def test_the_headline_says_what_goes_on_and_who_does_it(changes: dict[str, Any], said: str, goes_on: bool) -> None:
    status = a_status(driver=DRIVER, **changes)
    assert said in headline(status)
    expected = f"the same command goes on: akd-dist train-students r.yaml (in {Path.cwd()})" if goes_on else None
    assert next_line(status) == expected


def test_a_run_that_nobody_is_known_to_have_driven() -> None:
    told = headline(a_status(state="stopped", at=1e9, alive=None))
    assert told.startswith("runs/fleet stopped at 2001-09-")
    assert told.endswith(", and nothing tells who worked on it")


def test_seconds_in_little_room() -> None:
    assert [clock(seconds) for seconds in (0, 48.4, 200, 7500)] == ["0:00", "0:48", "3:20", "2:05:00"]


# ---- while it runs


def a_plan(*names: str) -> FleetPlan:
    students = [StudentProgress(name=name, state="waiting", epochs=2, steps_total=20) for name in names]
    return FleetPlan(attempt=1, at=0.0, metric="accuracy", students=students, cohorts=[])


def follow(console: Console, run: Path, monkeypatch: pytest.MonkeyPatch, times: int = 4) -> str:
    """A meter over a folder where one student ends, with messages told meanwhile; what the console got."""
    monkeypatch.setattr(progress, "READ_SECONDS", 0.0)
    monkeypatch.setattr(progress, "FLEET_LINE_SECONDS", 0.0)
    (run / "control").mkdir(parents=True)
    waiting = [CohortStatus(state="waiting", students=["two"], waits_for="1 free CPUs")]
    with driving(run), FleetMeter(console, run / "control", a_plan("one", "two"), "training 2 students") as meter:
        for count in range(times):
            meter.update(waiting)
            tell(console, f"message {count}")
            if count == 1:
                (run / "students" / "one").mkdir(parents=True)
                result = {
                    "name": "one", "model": "mlp-8", "parameters": 1, "objective": "kd", "tau_max": None, "seed": 0,
                    "state": "failed", "reason": "it broke", "epochs": 1, "validation": None, "test": None,
                    "agreement": None, "seconds": 1.0, "path": ".",
                }  # fmt: skip
                (run / "students" / "one" / "result.json").write_text(json.dumps(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = follow(Console(file=io.StringIO(), width=80), tmp_path / "run", monkeypatch)
    assert "\r" not in out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "training 2 students"
    assert lines.count("one failed after 1 of 2 epochs: it broke") == 1
    assert "0 of 40 steps (0%); 0 of 2 students over; two waits for 1 free CPUs" in lines
    assert lines[-1].startswith("training 2 students took ")
    assert lines[-1].endswith("10 of 40 steps (25%); 1 of 2 students over, 1 failed")


def test_without_a_terminal_lines_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = progress.FLEET_LINE_SECONDS
    assert seconds >= 5
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(progress, "READ_SECONDS", 0.0)
    (tmp_path / "run" / "control").mkdir(parents=True)
    with driving(tmp_path / "run"), FleetMeter(console, tmp_path / "run" / "control", a_plan("one"), "title") as meter:
        for _ in range(20):
            meter.update([])
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2


def test_what_stands_still_is_told_ever_more_rarely(tmp_path: Path) -> None:
    console, now, run = Console(file=io.StringIO(), width=80), 1000.0, tmp_path / "run"
    (run / "control").mkdir(parents=True)
    starting = [CohortStatus(state="starting", students=["one"])]
    with driving(run):
        meter = FleetMeter(console, run / "control", a_plan("one"), "title", clock=lambda: now)
        for _ in range(200):
            now += 1
            meter.update(starting)
        now += 1
        meter.update([])  # something moves, and is told without waiting for what was to be the next line
    assert isinstance(console.file, io.StringIO)
    still = "0 of 20 steps (0%); 0 of 1 students over; starting: one"
    assert console.file.getvalue().splitlines() == [
        still,
        f"{still}; nothing has moved for {duration(19)}",
        f"{still}; nothing has moved for {duration(39)}",
        f"{still}; nothing has moved for {duration(79)}",
        f"{still}; nothing has moved for {duration(159)}",
        "0 of 20 steps (0%); 0 of 1 students over",
    ]


def test_a_fleet_that_stops_says_so_while_it_is_waited_for(tmp_path: Path) -> None:
    console, now, run, asked = Console(file=io.StringIO(), width=200), 1000.0, tmp_path / "run", False
    (run / "control").mkdir(parents=True)
    starting = [CohortStatus(state="starting", students=["one"])]
    with driving(run):
        meter = FleetMeter(console, run / "control", a_plan("one"), "title", lambda: asked, lambda: now)
        for second in range(50):
            now, asked = now + 1, second >= 20
            meter.update(starting)
    assert isinstance(console.file, io.StringIO)
    told = "workers leave when they have kept what they did; 0 of 20 steps (0%); 0 of 1 students over; starting: one"
    assert console.file.getvalue().splitlines()[-3:] == [
        f"stopping for {duration(seconds)}: {told}" for seconds in (9, 19, 29)
    ]
    view = meter._view()
    assert isinstance(view, FleetView)
    assert str(view.title).startswith(f"stopping for {duration(29)}: ")


def test_a_meter_tells_that_it_moves_and_that_it_stands() -> None:
    console, now = Console(file=io.StringIO(), width=80), 0.0
    shown = progress.Meter(console, "reading", 100, "rows", clock=lambda: now)
    for done in (*range(21), *[20] * 40):
        shown.update(done, note="here")
        now += 1
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" of ")[0] for line in lines] == [f"reading: {done}" for done in (5, 10, 15, 20, 20, 20, 20)]
    for seconds, line in zip((5, 15, 35), lines[-3:], strict=True):
        assert line.endswith(f"; nothing has moved for {duration(seconds)}")
    assert "nothing" not in "".join(lines[:4])


def test_the_longest_silence_has_an_end() -> None:
    ticker, told = Ticker(10.0, 0.0), list[int]()
    for second in range(20_000):
        if ticker.due("the same", float(second)) is not None:
            told.append(second)
    assert max(later - earlier for earlier, later in itertools.pairwise(told)) == STILL_SECONDS


def test_in_a_terminal_messages_stand_whole_and_the_table_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    out = follow(console, tmp_path / "run", monkeypatch)
    screen = on_screen(out)
    assert screen[:-1] == [f"message {count}" for count in range(4)]
    assert screen[-1].startswith("training 2 students took ")
    assert "student" in out  # the table was there


def on_screen(out: str) -> list[str]:
    """What is left on a screen: the few control sequences that rich's Live uses, followed."""
    import re

    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", out):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif (up := re.fullmatch(r"\x1b\[(\d+)A", token)) is not None:
            row = max(row - int(up[1]), 0)
        elif token.startswith("\x1b"):
            assert re.fullmatch(r"\x1b\[\?25[lh]", token), repr(token)
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]
