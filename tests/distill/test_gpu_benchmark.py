"""The benchmark of a GPU runs whole on a CPU, on tiny rows, and says that this means nothing."""

from pathlib import Path

import pytest
import torch

from akd_dist.base.errors import MachineError
from benchmarks import gpu


def test_it_runs_on_a_cpu_and_says_so(tmp_path: Path) -> None:
    result = gpu.measure(tmp_path, "cpu", 2)
    assert result["dry_run"]
    assert result["stacked"] > 0
    assert result["alone_ms"] > 0
    assert result["why"]
    assert max(result["share"], result["share_in_turn"]) < 1
    told = gpu.table(result)
    assert "these figures mean nothing" in told
    assert "2 students in a stack" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="there is none here"):
        gpu.measure(tmp_path, "cuda", 2)
