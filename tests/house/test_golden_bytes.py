"""Stores and weights have the bytes that they had before the code was last moved about."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

from tests import golden_bytes


@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded with the instructions of x86-64 processors")
def test_stores_and_weights_keep_their_bytes(tmp_path: Path) -> None:
    golden = json.loads(golden_bytes.GOLDEN.read_text())[golden_bytes.mkl_mode()]
    if importlib.metadata.version("torch").split("+")[0] != golden["torch"]:
        pytest.skip(f"recorded with torch {golden['torch']}, whose sums others need not share")
    found = golden_bytes.in_a_process_of_its_own(tmp_path)
    assert golden.keys() >= {"shift-float32", "crop-float16"}
    for part in golden.keys() - {"torch"}:
        for kind in ("stores", "weights"):
            assert found[part][kind] == golden[part][kind], f"{kind} of {part}"
