"""The whole story as a newcomer runs it: one command, its table, its folders, and the same command again.

Where that is possible, it is run as a user without a home or a name: whoever has them has it easier.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from akd_dist.cli import main
from akd_dist.documents.json_schema import SCHEMAS
from tests.nobody import POSSIBLE, as_nobody

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in which any user may write, below none that he may not look into."""
    with tempfile.TemporaryDirectory(prefix="quickstart-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    if POSSIBLE:
        # By PATH it knows whether the shell knows akd-dist; Ray's variables are for a busy machine.
        given = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("RAY_")}
        done = as_nobody(folder, "quickstart", AKD_DIST_CACHE=str(folder / "cache"), **given)
    else:
        command = [sys.executable, "-m", "akd_dist.cli", "quickstart"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    for word in ("Traceback", "arning"):
        assert word not in done.stderr
    return done


def test_it_ends_with_a_table_and_says_where_things_lie(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    for shown in (
        "teacher",
        "mlp-8",
        "mlp-64",
        "Annealing-KD",
        "KD",
        "from scratch",
        "report  runs/digits_unlabelled/report.html",
    ):
        assert shown in first.stdout
    assert first.stdout.count("akd-dist train-students") + first.stdout.count("cp ") >= 2
    assert (folder / "runs" / "digits_unlabelled" / "report.html").exists()
    for shown in ("the teacher is trained", "training 27 students"):
        assert shown in first.stderr


def test_it_trains_what_it_promises_in_two_runs(folder: Path, first: subprocess.CompletedProcess[str]) -> None:
    fleet = json.loads((folder / "runs" / "digits_unlabelled" / "fleet.json").read_bytes())
    assert fleet["cohorts"] <= 2
    done = Counter(
        (student["model"], student["objective"]) for student in fleet["students"] if student["state"] == "done"
    )
    assert len(done) == 9
    assert set(done.values()) == {3}
    assert fleet["teacher"]["test"]["accuracy"] > 0.95
    best = max(student["test"]["accuracy"] for student in fleet["students"])
    assert best > 0.93
    # What the table shows: most rows have no label, and the teacher's word of them is worth several points.
    accuracy = {
        kind: [
            student["test"]["accuracy"]
            for student in fleet["students"]
            if (student["model"], student["objective"]) == ("mlp-64", kind)
        ]
        for kind in ("hard_labels", "kd", "annealing_kd")
    }
    assert min(accuracy["kd"]) > max(accuracy["hard_labels"]) + 0.03
    assert min(accuracy["annealing_kd"]) > max(accuracy["hard_labels"]) + 0.01


def test_again_it_is_a_hit_and_trains_nobody(
    folder: Path,
    first: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as left:
        main(["quickstart"])
    out, err = capsys.readouterr()
    assert not left.value.code
    for shown in ("is a hit", "is done"):
        assert shown in err
    for missing in ("training", "Ray", "arning"):
        assert missing not in err
    assert out == first.stdout


def test_cache_teacher_then_is_a_hit(
    folder: Path,
    first: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    recipe = str(Path(__file__).parents[2] / "jobs" / "digits_unlabelled.yaml")

    def cached(*options: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main(["cache-teacher", recipe, "--json", *options])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    document = cached()
    jsonschema.validate(document, json.loads((SCHEMAS / "cache.schema.json").read_text()))
    assert (document["hit"], document["rows"], document["unlabelled"]) == (True, 1168, 1068)
    assert document["shards_computed"] == 0
    fleet = json.loads((folder / "runs" / "digits_unlabelled" / "fleet.json").read_bytes())
    jsonschema.validate(fleet, json.loads((SCHEMAS / "fleet.schema.json").read_text()))
