"""What a node must have before it is given work: the same versions, and object storage that lets it in."""

import socket
from pathlib import Path

import pytest

from akd_dist.jobs.shared import Needed, _reach, versions


def test_a_node_that_cannot_reach_the_bucket_says_so(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{bucket}/stores"
    _reach.cache_clear()
    with monkeypatch.context() as patch, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        (missing,) = Needed({}, str(tmp_path), roots=(root,)).missing()
    assert missing.startswith(f"{root}: cannot read {root}/")
    assert "AWS_* settings" in missing
    assert Needed({}, str(tmp_path), roots=(root,)).missing() == []


def test_a_node_of_another_version_says_so(tmp_path: Path) -> None:
    here = dict(versions())
    assert {"torch", "numpy", "zarr"} <= here.keys()
    assert Needed({}, str(tmp_path), versions=versions()).missing() == []
    other = tuple((here | {"torch": "1.13.1"}).items())
    assert Needed({}, str(tmp_path), versions=other).missing() == [f"torch 1.13.1 (it has {here['torch']})"]
