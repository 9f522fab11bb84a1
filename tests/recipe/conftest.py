"""What tests of recipes share: a file with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe_texts import TEXT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file
