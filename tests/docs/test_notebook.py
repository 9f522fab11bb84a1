"""docs/tutorial/tutorial.ipynb runs from top to bottom; the file that is committed holds no outputs.

In `make test` its cells run in this process, on the session's Ray, and students train in processes that are forked;
`make test-slow` runs it in a kernel, as Jupyter does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from tests.docs.notebook import NOTEBOOK
from tests.survivors import forked_cohorts


def read() -> Any:
    return nbformat.reads(NOTEBOOK.read_text(), as_version=4)  # type: ignore[no-untyped-call]  # it has no annotations


def test_the_committed_notebook_has_no_outputs() -> None:
    """They depend on the machine, and a change of them would hide the change of a cell. The page shows the code."""
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.ray
def test_it_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = {}
    shell: Any = cast(Any, InteractiveShell)()  # it has no annotations
    with forked_cohorts():
        for cell in read().cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
                printed[cell.source] = capsys.readouterr().out
    holds(printed, tmp_path)


@pytest.mark.slow
@pytest.mark.ray
def test_it_runs_in_a_kernel(tmp_path: Path) -> None:
    notebook = read()
    # A kernel takes a second to start, and on a busy machine more than the minute that is allowed by default.
    NotebookClient(notebook, startup_timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = {cell.source: "".join(map(text_of, cell.outputs)) for cell in cells}
    holds(printed, tmp_path)


def text_of(output: Any) -> str:
    shown: str = output.text if output.output_type == "stream" and output.name == "stdout" else ""
    return shown


def holds(printed: dict[str, str], folder: Path) -> None:
    """What the page says of what its cells print, and of what they leave."""
    (cached,) = [shown for source, shown in printed.items() if "cache_teacher" in source]
    assert "'hit': True" in cached
    (logits,) = [shown for source, shown in printed.items() if "store.rows(view" in source]
    rows = re.findall(r"\[([^\[\]]+)\]", logits)
    assert len(set(rows)) == len(rows) == 6, "the page says that the logits of two views differ"
    assert (folder / "runs" / "notebook" / "report.html").exists()
