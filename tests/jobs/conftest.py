"""What tests of jobs share: a process that is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def own_process_state() -> Iterator[None]:
    """What a worker process sets for good is put back, and no teacher is remembered from test to test."""
    import torch  # here, as most tests of the room need neither

    from akd_dist.distill import teacher

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    teacher.forget()
