"""docs/tutorial/tutorial.ipynb runs from top to bottom; the file that is committed holds no outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.notebook import NOTEBOOK


def read() -> Any:
    return nbformat.reads(NOTEBOOK.read_text(), as_version=4)  # type: ignore[no-untyped-call]  # it has no annotations


def test_the_committed_notebook_has_no_outputs() -> None:
    """They depend on the machine, and a change of them would hide the change of a cell. The page shows the code."""
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_it_runs(tmp_path: Path) -> None:
    notebook = read()
    # A kernel takes a second to start, and on a busy machine more than the minute that is allowed by default.
    NotebookClient(notebook, startup_timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "'hit': True" in printed
    (shown,) = [cell.outputs[0].text for cell in notebook.cells if "store.rows(view" in cell.source]
    rows = re.findall(r"\[([^\[\]]+)\]", shown)
    assert len(set(rows)) == len(rows) == 6, "the page says that the logits of two views differ"
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()
