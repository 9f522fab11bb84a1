"""docs/tutorial/tutorial.ipynb as a page of the site: a hook of mkdocs, named in mkdocs.yml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial" / "tutorial.ipynb"
PAGE = "tutorial/notebook.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds tutorial/notebook.md, which lies on no disk; the notebook itself is copied beside it."""
    files.append(File.generated(config, PAGE, content=markdown(json.loads(NOTEBOOK.read_text()))))
    return files


def markdown(notebook: dict[str, Any]) -> str:
    """Cells of text as they are, cells of code in fences. Outputs are not in the committed file."""
    return "\n\n".join(
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in notebook["cells"]
    )


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Other pages link to the notebook's file, for those who read them as files; on the site they lead to its page."""
    return markdown if page.file.src_uri == PAGE else markdown.replace("tutorial.ipynb)", "notebook.md)")
