"""One contender of `benchmarks/peers.py` in a process of its own, so that its memory and its threads are its own.

    python -m benchmarks.peer_trial 5 '{"do": "passes", "name": "numpy", ...}'

The first argument is the file descriptor to which events go, one JSON document a line: `{"event": "imported", ...}`
once the contender is imported and before it has opened anything, and a last one with what was found.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.contender import Content, Tensors
from benchmarks.contenders import CONTENDERS

STRETCH = 256
"""Rows that lie beside each other, for how well a batch is mixed."""


def main() -> None:
    """Do what is asked, and tell."""
    events, asked = int(sys.argv[1]), json.loads(sys.argv[2])
    actions: dict[str, Callable[..., dict[str, Any]]] = {"write": write, "passes": passes, "order": order}

    def tell(event: str, **what: Any) -> None:
        os.write(events, json.dumps({"event": event, **what}).encode() + b"\n")

    tell("done", **actions[asked.pop("do")](tell, **asked))


def write(tell: Callable[..., None], name: str, content: str, folder: str) -> dict[str, Any]:
    """Write the content in the contender's format."""
    contender, rows = CONTENDERS[name], Content.load(Path(content))
    contender.load()
    began = time.perf_counter()
    contender.write(rows, Path(folder))
    return {"seconds": time.perf_counter() - began}


def passes(
    tell: Callable[..., None], name: str, content: str, folder: str, batch: int, workers: int, warm: int
) -> dict[str, Any]:
    """A first pass, some more, and one in which each row is compared with the content.

    Only counting rows is done with batches in those that are timed.
    """
    CONTENDERS[name].load()
    tell("imported", memory=memory_of([psutil.Process()]))
    began = time.perf_counter()
    reader = CONTENDERS[name](Path(folder), batch, workers)
    first, found = 0.0, []
    for number in range(warm + 1):
        started, busy, rows = time.perf_counter(), cpu_seconds(), 0
        for step, one in enumerate(reader.epoch(number)):
            if number == step == 0:
                first = time.perf_counter() - began
            rows += len(one["logits"])
        seconds = time.perf_counter() - (began if number == 0 else started)
        found.append({"rows": rows, "seconds": seconds, "cpu": cpu_seconds() - busy})
    checked = compared(reader.epoch(warm + 1), Content.load(Path(content)))
    reader.close()
    return {"first_batch": first, "passes": found, **checked}


def order(
    tell: Callable[..., None],
    name: str,
    folder: str,
    batch: int,
    workers: int,
    stop_after: int | None = None,
    state: Any = None,
) -> dict[str, Any]:
    """The row numbers of epoch 0, in order.

    Args:
        stop_after: end after so many batches, and tell the contender's state.
        state: go on from there.
    """
    CONTENDERS[name].load()
    reader = CONTENDERS[name](Path(folder), batch, workers)
    batches = reader.epoch(0) if state is None else reader.resumed(0, state)
    if stop_after is None:
        return {"rows": row_numbers(batches)}
    begun = iter(batches)
    rows = row_numbers(itertools.islice(begun, stop_after))
    return {"rows": rows, "state": reader.state()}


def row_numbers(batches: Iterable[Tensors]) -> list[int]:
    """The rows of batches, one after the other."""
    return [number for batch in batches for number in batch["row"].tolist()]


def compared(batches: Iterable[Tensors], content: Content) -> dict[str, Any]:
    """Whether each row came exactly once, as it was stored, and how batches are mixed."""
    seen, wrong, mixed = np.zeros(len(content), np.int64), 0, []
    kinds: set[str] = set()
    for batch in batches:
        numbers = batch["row"].numpy()
        np.add.at(seen, numbers, 1)
        mixed.append(len(np.unique(numbers // STRETCH)))
        for name in ("inputs", "labels", "logits"):
            right, got = getattr(content, name)[numbers], batch[name].numpy()
            kinds.add(f"{name} {got.dtype}")
            same = got.shape == right.shape and got.dtype == right.dtype
            axes = tuple(range(1, right.ndim))
            wrong += int(np.count_nonzero((got != right).any(axis=axes))) if same else len(numbers)
    return {
        "missing": int(np.count_nonzero(seen == 0)),
        "twice": int(np.count_nonzero(seen > 1)),
        "wrong": wrong,
        "stretches": float(np.mean(mixed)),
        "kinds": sorted(kinds),
    }


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process, and all that it has started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has started, the ended ones too."""
    times = os.times()
    ended = times.children_user + times.children_system
    return time.process_time() + ended + sum(_cpu(one) for one in tree(psutil.Process())[1:])


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def memory_of(processes: Iterable[psutil.Process]) -> dict[str, int]:
    """Bytes of their own, shared ones counted once, and bytes of files that they have mapped."""
    own = files = 0
    for process in processes:
        try:
            told = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", told, re.MULTILINE)}
        own += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
        files += sizes.get("Pss_File", 0)
    return {"own": own, "files": files}


if __name__ == "__main__":
    main()
