"""How long pieces of work take beside each other, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def least_seconds(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of each piece of work, the least of repeats that alternate."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.process_time()
            work()
            found[name].append(time.process_time() - began)
    return {name: min(seconds) for name, seconds in found.items()}
