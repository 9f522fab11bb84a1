"""The benchmark beside peers: what it compares is whole, what it finds wrong is wrong, who is missing is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import contenders, peer_trial, peers
from benchmarks.contender import NAMES, Content, Tensors


@pytest.fixture
def content() -> Content:
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (700, 3, 4, 4), dtype=np.uint8)
    logits = draw.standard_normal((700, 5), np.float32).astype(np.float16)
    return Content(np.arange(700), pictures, np.arange(700) % 5, logits)


def batches(content: Content, numbers: np.ndarray) -> Iterator[Tensors]:
    for start in range(0, len(numbers), 100):
        picked = numbers[start : start + 100]
        yield {name: torch.from_numpy(getattr(content, name)[picked]) for name in NAMES}


def test_each_row_once_is_complete(content: Content) -> None:
    found = peer_trial.compared(batches(content, np.arange(700)), content)
    assert (found["missing"], found["twice"], found["wrong"]) == (0, 0, 0)
    assert found["stretches"] == 9 / 7  # two batches of seven cross a border of 256 rows


def test_a_row_that_is_missing_or_comes_twice_is_counted(content: Content) -> None:
    found = peer_trial.compared(batches(content, np.r_[0:650, 0:3]), content)
    assert (found["missing"], found["twice"], found["wrong"]) == (50, 3, 0)


def test_logits_of_another_row_are_wrong(content: Content) -> None:
    logits = content.logits.copy()
    logits[[3, 4]] = logits[[4, 3]]
    found = peer_trial.compared(batches(dataclasses.replace(content, logits=logits), np.arange(700)), content)
    assert (found["missing"], found["twice"], found["wrong"]) == (0, 0, 2)


def test_another_dtype_is_wrong(content: Content) -> None:
    wider = dataclasses.replace(content, logits=content.logits.astype(np.float32))
    found = peer_trial.compared(batches(wider, np.arange(700)), content)
    assert found["wrong"] == 700
    assert "logits float32" in found["kinds"]


@pytest.mark.parametrize("name", ["numpy", "zarr"])
def test_every_row_comes_once(name: str, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BUFFER", 256)  # so that rows of one buffer wait for those of the next
    monkeypatch.setattr(contenders.Zarr, "stretch", 64)
    kind = contenders.CONTENDERS[name]
    kind.write(content, tmp_path / "own")
    reader = kind(tmp_path / "own", 100, kind.workers)
    sizes = [len(batch["row"]) for batch in reader.epoch(0)]
    assert sizes == [100] * 7
    for number in (0, 1):
        found = peer_trial.compared(reader.epoch(number), content)
        assert (found["missing"], found["twice"], found["wrong"]) == (0, 0, 0)


def test_this_stream_gives_the_content_of_its_store(tmp_path: Path) -> None:
    size = peers.Size("tiny", 600, (1, 4, 4), 3, "float16")
    place = peers.written("akd-dist", size, tmp_path)
    told: list[str] = []

    def tell(event: str, **what: Any) -> None:
        told.append(event)

    for name in ("akd-dist", "akd-dist, new node"):
        found = peer_trial.passes(tell, name, str(place.parent / "numpy"), str(place), 256, 0, 1)
        assert (found["missing"], found["twice"], found["wrong"]) == (0, 0, 0)
        assert [one["rows"] for one in found["passes"]] == [600, 600]
        assert found["kinds"] == ["inputs uint8", "labels int64", "logits float16"]
    assert told == ["imported"] * 2
    assert 600 * (16 + 6) < peers.bytes_on_disk("akd-dist", place) < 100_000


def test_who_is_not_installed_is_left_out_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders.LitData, "packages", ("no-such-package",))
    assert peers.installed(["numpy", "litdata"]) == ["numpy"]
    assert capsys.readouterr().err == (
        "litdata: left out, since no-such-package is not installed (see the top of this file)\n"
    )
