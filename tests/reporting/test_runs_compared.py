"""Several runs in one page."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.documents.report import ReportDocument
from akd_dist.reporting.page import write_reports
from akd_dist.reporting.results import read_run
from akd_dist.reporting.several import same_test_rows
from akd_dist.reporting.tables import runs_table
from tests.made_runs import check_offline, fleet_of, regression_of, student, two_runs, write_run


def test_runs_are_compared_in_one_page(tmp_path: Path) -> None:
    folders = two_runs(tmp_path)
    document = write_reports(folders)
    assert ReportDocument.model_validate_json(json.dumps(document.plain())) == document
    assert document.comparison is not None
    assert document.comparison.same_test_rows is True
    first, second = document.comparison.groups
    assert first.over_first is None
    assert second.over_first is not None
    assert second.over_first.mean == pytest.approx(0.01)
    assert second.over_first.high == pytest.approx(0.01)  # seed by seed the same
    page = tmp_path / "report.html"
    assert document.comparison.report == str(page)
    assert all((folder / "report.html").exists() for folder in folders)
    text = page.read_text()
    check_offline(text)
    assert "2 runs compared" in text
    assert "less one" in text
    assert "+1.00 ± 0.00" in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(runs_table([read_run(folder) for folder in folders]))
    text = console.export_text()
    assert "two" in text
    assert "mean ± standard deviation over seeds" in text


def test_runs_that_differ_are_told_apart_or_refused(tmp_path: Path) -> None:
    one, two = two_runs(tmp_path)
    (two / "identity.json").write_text(json.dumps({"teacher": {}, "dataset": {"test": "cd"}, "students": {}}))
    write_reports([one, two], tmp_path / "out.html")
    assert "different test rows" in (tmp_path / "out.html").read_text()
    (two / "identity.json").unlink()
    assert same_test_rows([read_run(one), read_run(two)]) is None
    write_run(two, regression_of(fleet_of(student("mlp-8", "hard_labels", 0))))
    with pytest.raises(RefusedError, match="different metrics"):
        write_reports([one, two])
    with pytest.raises(RecipeError, match="named twice"):
        write_reports([one, one / ".." / "one"])
    with pytest.raises(RecipeError, match="no run is named"):
        write_reports([])


def test_a_single_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    one, _ = two_runs(tmp_path)
    document = write_reports([one], tmp_path / "one.html")
    assert document.runs[0].report == str(tmp_path / "one.html")
    assert not (one / "report.html").exists()
