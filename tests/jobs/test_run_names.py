"""One run, one recipe, one driver: what a command says to a second driver, another recipe, and torn documents of a run.

All of it without Ray: either the command is sent away before, or every student is done.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from akd_dist.base.locks import is_locked
from akd_dist.cli import main
from akd_dist.jobs import results
from akd_dist.jobs.run_folder import held, saved_results
from akd_dist.jobs.shared import Shared
from akd_dist.recipe import Recipe
from akd_dist.storage import removal
from tests.fleets import a_recipe
from tests.survivors import FLEET, Place, counted, snapshot


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="module")
def done(place: Place) -> Path:
    """A folder of runs with one whose students are done, and its results collected."""
    runs = place.root / "runs"
    assert place.train(place.job(runs / "fleet")) == 0
    with pytest.raises(SystemExit) as left:
        main(place.command("train-students", runs))
    assert left.value.code == 0
    return runs


@pytest.fixture
def runs(done: Path, tmp_path: Path) -> Path:
    """That folder, to do as one likes with."""
    shutil.copytree(done, tmp_path / "runs")
    return tmp_path / "runs"


def refused(code: int, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The error document of a command that has to leave with this code."""
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert left.value.code == code, err
    assert "Traceback" not in err
    error: dict[str, Any] = json.loads(out)["error"]
    assert all(error[part] for part in ("what", "got", "expected", "next"))
    return error


def again(place: Place, students: list[dict[str, Any]], **changes: Any) -> Recipe:
    return a_recipe(students, teacher={"weights": place.teacher}, folder=str(place.root), **changes)


def test_another_recipe_is_refused_before_anything_starts(
    place: Place, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, driver = snapshot(runs / "fleet" / "students"), runs / "fleet" / "control" / "driver.json"
    whose = driver.read_bytes()
    other = again(place, FLEET, data=place.recipe.data.model_copy(update={"views": 3}).model_dump())
    error = refused(2, place.command("train-students", runs, recipe=other), capsys)
    assert "data.views: 2 -> 3" in error["got"]
    assert "--set name=fleet-2" in error["next"]
    assert snapshot(runs / "fleet" / "students") == before
    assert driver.read_bytes() == whose  # by which `status` tells what command goes on


def test_students_that_changed_in_the_same_way_share_a_line(
    place: Place, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"kind": "adamw", "lr": 1e-3, "schedule": {"kind": "linear"}}
    before = snapshot(runs / "fleet" / "students")
    students = [counted(block["name"], **_given(block), optimizer=rate) for block in FLEET[:4]]
    students.append(FLEET[4] | {"seed": 5})
    error = refused(2, place.command("train-students", runs, recipe=again(place, students)), capsys)
    told = [line.strip() for line in error["got"].splitlines()]
    assert told == [
        "students annealing, annealing-1, hard, kd: optimizer.lr: 0.005 -> 0.001",
        "students long: seed: 0 -> 5",
    ]
    assert snapshot(runs / "fleet" / "students") == before


def _given(block: dict[str, Any]) -> dict[str, Any]:
    return {key: block[key] for key in ("objective", "seed") if key in block}


@pytest.mark.parametrize("left", [b"", b"{}", b'{"data": {"aug'])
def test_a_torn_identity_is_told_and_not_believed(
    place: Place, runs: Path, capsys: pytest.CaptureFixture[str], left: bytes
) -> None:
    identity = runs / "fleet" / "identity.json"
    kept = identity.read_bytes()
    identity.write_bytes(left)
    error = refused(5, place.command("train-students", runs), capsys)
    assert "identity.json is damaged" in error["what"]
    assert "remove that file to go on" in error["next"]
    before = snapshot(runs / "fleet" / "students")
    identity.unlink()  # as it says
    with pytest.raises(SystemExit) as over:
        main(place.command("train-students", runs))
    assert over.value.code == 0
    # How its students stepped is not known any more; nor is it needed, as they are done.
    assert json.loads(identity.read_bytes()) == json.loads(kept) | {"stacking": {}}
    assert snapshot(runs / "fleet" / "students") == before


FOREIGN_IDENTITIES = {
    "brackets": (b"[" * 200_000, "nested too deeply"),
    "teacher": (b'{"teacher": 3, "dataset": {}, "students": {}}', "teacher: Input should be"),
    "rows": (
        b'{"teacher": {}, "dataset": {}, "students": {}, "rows": {"train": {"fingerprint": "ab"}}}',
        "rows.train.blocks",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_IDENTITIES)
def test_a_damaged_identity_names_its_field(
    case: str, place: Place, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, field = FOREIGN_IDENTITIES[case]
    (runs / "fleet" / "identity.json").write_bytes(content)
    assert field in refused(5, place.command("train-students", runs), capsys)["got"]


def test_a_damaged_result_names_its_field(place: Place, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "fleet" / "students" / "hard" / "result.json"
    path.write_text(path.read_text().replace('"epochs"', '"epohcs"'))
    before = snapshot(runs / "fleet" / "students")
    error = refused(5, place.command("train-students", runs), capsys)
    assert "hard/result.json is damaged" in error["what"]
    assert "epochs: Field required; epohcs: Extra inputs" in error["got"]
    assert "remove it" in error["next"]
    assert snapshot(runs / "fleet" / "students") == before


@pytest.mark.parametrize("left", [b"", b'{"students": ['])
def test_torn_results_are_collected_again(place: Place, runs: Path, left: bytes) -> None:
    before, fleet = snapshot(runs / "fleet" / "students"), json.loads((runs / "fleet" / "fleet.json").read_bytes())
    (runs / "fleet" / "fleet.json").write_bytes(left)
    with pytest.raises(SystemExit) as over:
        main(place.command("train-students", runs))
    assert over.value.code == 0
    after = json.loads((runs / "fleet" / "fleet.json").read_bytes())
    for document in (fleet, after):
        for student in document["students"]:
            del student["store"]  # named from the folder, which was copied
    assert after["students"] == fleet["students"]
    assert snapshot(runs / "fleet" / "students") == before


def hold(folder: Path) -> None:
    """A driver that holds a run and stands still."""
    with held(folder, wait=False, console=Console(quiet=True)):
        os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def first_driver(place: Place, folder: Path) -> Iterator[Any]:
    """A process that holds a run until it is killed, at the latest in the end."""
    process = place.forks.Process(target=hold, args=(folder,))
    process.start()
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(("command", "name"), [("train-students", "fleet"), ("compare", "fleet-compare")])
def test_a_second_driver_leaves_with_3_and_names_the_first(
    place: Place, runs: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    with first_driver(place, runs / name) as first:
        error = refused(3, place.command(command, runs, recipe=again(place, FLEET[:1])), capsys)
        assert error["what"].startswith(f"the run {name} is held by someone else")
        assert error["got"] == f"process {first.pid} on {socket.gethostname()}"
        assert "--wait" in error["next"]
    with held(runs / name, wait=False, console=Console(quiet=True)):
        pass


def test_wait_waits_until_the_first_driver_is_gone(place: Place, runs: Path) -> None:
    arguments = [sys.executable, "-m", "akd_dist.cli", *place.command("train-students", runs, "--wait")]
    with (
        first_driver(place, runs / "fleet") as first,
        subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as second,
    ):
        assert second.stderr is not None
        assert any(f"waiting for process {first.pid}" in line for line in second.stderr)
        time.sleep(0.5)
        assert second.poll() is None
        first.kill()
        second.communicate(timeout=900)
        assert second.returncode == 0


# ---- what a run left, edited or torn


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"metric": "pearson"}'])
def test_results_that_are_damaged_are_collected_again(text: str, tmp_path: Path) -> None:
    """As the refusal of `report` says: the students have all that they said."""
    (tmp_path / "fleet.json").write_text(text)
    (tmp_path / "report.html").touch()
    assert saved_results(tmp_path, {"students": {}}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"seconds": 2, "name": "teacher"}', 2.0),
        *((text, None) for text in ("{}", "null", "{", "[]", '{"seconds": 1e999}', '{"seconds": -1}')),
        *((text, None) for text in ('{"seconds": "long"}', '{"seconds": null}', '{"seconds": 1' + "0" * 400 + "}")),
    ],
)
def test_what_training_the_teacher_took_is_null_where_nobody_knows(
    text: str, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "teacher_of", lambda *_: SimpleNamespace(uri=lambda root: f"{root}/teacher"))
    store: Any = SimpleNamespace(uri=str(tmp_path / "id"))
    recipe: Any = SimpleNamespace(teacher=SimpleNamespace(each=[None]))
    (tmp_path / "teacher").mkdir()
    assert results.training_seconds(recipe, recipe, store) is None
    (tmp_path / "teacher" / "result.json").write_text(text)
    assert results.training_seconds(recipe, recipe, store) == expected


def test_tokens_are_there_and_locked_as_long_as_their_command_lives(tmp_path: Path) -> None:
    (tmp_path / "stores").mkdir()
    shared = Shared({"the stores": str(tmp_path / "stores")}, str(tmp_path / "cache"), print)
    (token,) = map(Path, shared._tokens().values())
    assert removal.gc(str(tmp_path / "stores")) == []
    token.unlink()  # by somebody on a machine that our lock does not reach
    assert shared._tokens() == {"the stores": str(token)}
    assert is_locked(token)
    shared.__exit__()
    assert list((tmp_path / "stores").iterdir()) == []
