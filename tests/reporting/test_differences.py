"""Where student and teacher differ, counted by hand; answers that are damaged are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import akd_dist
from akd_dist.base.errors import DamagedError
from akd_dist.data.predictions import encode_predictions
from akd_dist.documents.report import Difference, ReportDocument
from akd_dist.reporting.differences import read_predictions
from akd_dist.reporting.page import write_report
from akd_dist.reporting.results import read_run
from tests.made_runs import check_offline, fleet_of, leave, regression_of, report_of, student, write_run


def test_differences_are_counted_by_hand(tmp_path: Path) -> None:
    entries = [student("mlp-8", "kd", seed) for seed in range(2)]
    write_run(tmp_path, fleet_of(*entries))
    label, teacher = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 1, 1])
    for entry in entries:
        #                               right  alone  both  student  alike  apart
        leave(tmp_path, entry, label, np.array([0, 1, 1, 1, 1, 0]), teacher)
    (found,) = read_run(tmp_path).document("x", tmp_path).differences
    assert found == Difference(
        name="mlp-8-kd",
        rows=12,
        both_right=4,
        teacher_alone=2,
        student_alone=2,
        both_wrong_alike=2,
        both_wrong_apart=2,
        pairs=[(0, 1, 2), (1, 0, 2), (2, 1, 2)],
    )
    text = write_report(tmp_path).read_text()
    assert "differs from the teacher in 6 of 12 answers, 2 seeds together" in text
    assert text.count('<table class="matrix">') == 1
    check_offline(text)


def test_many_classes_make_pairs_and_no_matrix(tmp_path: Path) -> None:
    entry = student("mlp-8", "kd", 0)
    write_run(tmp_path, fleet_of(entry))
    label = np.arange(100)
    leave(tmp_path, entry, label, np.roll(label, 1), label)
    text = write_report(tmp_path).read_text()
    assert '<table class="matrix">' not in text
    assert "Most frequent pairs, mlp-8, KD" in text


def test_a_regression_has_errors_and_scatters(tmp_path: Path) -> None:
    fleet = regression_of(fleet_of(student("mlp-8", "hard_labels", 0)))
    write_run(tmp_path, fleet)
    label = np.linspace(0, 1, 9)
    leave(tmp_path, fleet["students"][0], label, label + 0.5, label + np.array([1, -1, 1, -1, 0, 1, -1, 1, -1]))
    path = tmp_path / "students" / fleet["students"][0]["name"] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracy"', '"pearson"'))
    text = write_report(tmp_path).read_text()
    assert "Student against teacher: mlp-8, from scratch" in text
    assert "<td>0.5</td><td>0.9428</td>" in text  # sqrt(8 / 9)
    check_offline(text)


@pytest.mark.parametrize("content", [b"", b"PAR1 and so on", None])
def test_damaged_answers_are_named(tmp_path: Path, content: bytes | None) -> None:
    entry = student("mlp-8", "kd", 0)
    write_run(tmp_path, fleet_of(entry))
    path = tmp_path / "students" / entry["name"] / "test.parquet"
    if content is None:
        path.write_bytes(encode_predictions({"row": np.arange(3)}))
    else:
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"test\.parquet is damaged"):
        read_predictions(path)
    told: list[str] = []
    page = write_report(tmp_path, tell=told.append).read_text()
    assert f"students/{entry['name']}/test.parquet is damaged" in page
    assert [line.partition(": ")[2].partition(" is ")[0] for line in told] == [f"students/{entry['name']}/test.parquet"]


def test_one_damaged_run_takes_nothing_from_the_report_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "bad"):
        write_run(tmp_path / name)
    metrics = next((tmp_path / "two" / "students").glob("*/metrics.jsonl"))
    metrics.write_bytes(b"[" * 200_000 + b"\n")
    fleet = json.loads((tmp_path / "bad" / "fleet.json").read_bytes())
    (tmp_path / "bad" / "fleet.json").write_text(json.dumps(fleet | {"cohots": 1}))
    folders = [str(tmp_path / name) for name in ("one", "bad", "two", "gone")]
    code, out, err = report_of(*folders, capsys=capsys)
    assert code == 5
    assert [line.split()[0] for line in err.splitlines()] == ["warning:", "warning:", "error:", "error:"]
    assert "cohots" in err
    for name in ("one", "two"):
        assert (tmp_path / name / "report.html").exists()
    assert not (tmp_path / "bad" / "report.html").exists()
    code, out, _ = report_of(*folders, "--json", capsys=capsys)
    document = ReportDocument.model_validate(json.loads(out))
    assert code == 5
    assert [one.code for one in document.refused] == [5, 4]
    assert [len(run.problems) for run in document.runs] == [0, 1]
    assert report_of(str(tmp_path / "bad"), capsys=capsys)[0] == 5
    with pytest.raises(DamagedError):
        akd_dist.report(*folders)


def test_a_flipped_bit_of_the_answers_is_told_or_harmless(tmp_path: Path) -> None:
    path, generator = tmp_path / "test.parquet", np.random.default_rng(0)
    label, said, teacher = generator.integers(0, 10, (3, 300))
    whole = encode_predictions({"row": np.arange(300), "label": label, "student": said, "teacher": teacher})
    told = 0
    for place in generator.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_predictions(path)
        except DamagedError:
            told += 1
            continue
        assert found is not None
        for read, written in ((found.label, label), (found.student, said), (found.teacher, teacher)):
            assert np.array_equal(read, written), f"byte {place}"
    assert told > 30
