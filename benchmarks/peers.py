"""This stream beside other ways to keep and to stream rows with logits: rows a second, bytes, memory, first batch.

    python -m benchmarks.peers                       a table for each size
    python -m benchmarks.peers --json                one JSON document
    python -m benchmarks.peers --orders              which of them give the same order again; no speed
    python -m benchmarks.peers --only numpy litdata  these alone

The peers are no dependencies of this project. They are installed beside it, in an environment of their own:

    python -m venv peers
    peers/bin/pip install -c constraints.txt -e '.[huggingface,ray-data]' torchdata
    peers/bin/pip install --no-deps -r benchmarks/peers-requirements.txt
    peers/bin/python -m benchmarks.peers

Those that are missing are left out, with a line that says so. Rows and logits are those of a store of this project:
pictures of random bytes, cached from an untrained MLP. Each contender (`benchmarks/contenders.py`) writes them in its
own format, and streams them shuffled, as its documentation recommends for speed, in batches of 256 torch tensors: row
number, input, label, logits in the dtype of the store. Each runs in a process of its own, in turns, `--repeats` times,
and may use two worker processes or threads beside the main one: as many as there are cores, and fewer where that was
faster. Of each run:

- `cold`: the first pass with nothing of its files in the page cache, from the moment on when all is imported.
- `first`: seconds from that moment until the first batch; processes, and Ray's cluster, start within them.
- `warm`: rows a second of the passes after it; and per second of CPU time of all its processes.
- `memory`: the most that its processes had together above the one process after imports, looked at four times a
  second: what is in no file, shared pages counted once (`own`), and beside it the files that are mapped (`files`),
  which the kernel can drop.
- a last pass, not timed, compares each row with what was stored, and counts from how many stretches of 256 stored
  rows a batch comes: how well it is mixed.

Medians over runs. `ratio` is the rows a second of the fastest peer to those of this stream. Needs 4 GB of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from akd_dist.data.row_cache import prepare
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Recipe
from akd_dist.storage.reader import open_store
from benchmarks.contender import Content
from benchmarks.contenders import CONTENDERS
from benchmarks.peer_trial import memory_of, tree

BATCH, SEED, LOOK_SECONDS = 256, 0, 0.25


@dataclass(frozen=True)
class Size:
    """What is stored."""

    name: str
    rows: int
    shape: tuple[int, int, int]
    classes: int
    encoding: str

    @property
    def bytes_of_row(self) -> int:
        """Of a row as it is delivered: number, input, label, logits."""
        return 16 + int(np.prod(self.shape)) + self.classes * np.dtype(self.encoding).itemsize

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{self.rows:,} rows of {shape} bytes with {self.classes:,} {self.encoding} logits"


SIZES = (
    Size("small", 50_000, (3, 32, 32), 10, "float32"),
    Size("large", 20_000, (3, 64, 64), 1_000, "float16"),
)
ORDERED = Size("ordered", 10_240, (1, 8, 8), 10, "float32")
"""What orders are compared with."""
STOP_AFTER = 15
"""Batches before the interruption, of 40."""
ROOT = Path(__file__).parents[1]
NO_PEERS = ("numpy", "akd-dist", "akd-dist, new node")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="This stream beside others.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--orders", action="store_true", help="compare orders after restarts instead")
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), help="contenders (default all)")
    parser.add_argument("--sizes", nargs="*", choices=[one.name for one in SIZES], help="sizes (default all)")
    parser.add_argument("--rows", type=int, help="rows of each size, instead of its own")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--warm", type=int, default=2, help="timed passes after a run's first (default 2)")
    parser.add_argument("--workers", type=int, help="processes beside the main one, instead of each one's best number")
    parser.add_argument("--folder", type=Path, help="where formats are kept for other runs (default: nowhere)")
    chosen = parser.parse_args()
    names = installed(chosen.only or list(CONTENDERS))
    sizes = [one for one in SIZES if one.name in (chosen.sizes or [size.name for size in SIZES])]
    if chosen.rows:
        sizes = [dataclasses.replace(one, rows=chosen.rows) for one in sizes]
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.folder or Path(made)
        if chosen.orders:
            result: dict[str, Any] = {name: orders_of(name, folder, ORDERED) for name in names}
        else:
            result = {size.name: measure(size, folder, names, chosen) for size in sizes}
    told = table_of_orders if chosen.orders else table
    print(json.dumps(result | {"versions": versions(names)}) if chosen.json else told(result, versions(names)))


def installed(names: Sequence[str]) -> list[str]:
    """Those of which all packages are there; a line for each of the others."""
    found = []
    for name in names:
        if (missing := CONTENDERS[name].missing()) is None:
            found.append(name)
        else:
            print(f"{name}: left out, since {missing} is not installed (see the top of this file)", file=sys.stderr)
    return found


def versions(names: Sequence[str]) -> dict[str, str]:
    """The version of each contender's package."""
    packages = dict.fromkeys(CONTENDERS[name].packages[0] for name in names) | {"torch": None}
    return {name: metadata.version(name) for name in packages}


# ---- what is stored


def written(name: str, size: Size, folder: Path) -> Path:
    """The contender's files of a size, made if they are not there.

    Raises:
        SystemExit: it could not write them.
    """
    of_size = folder / f"{size.name}-{size.rows}"
    own = CONTENDERS[name].format or name
    if not (of_size / "numpy").exists():
        make_content(size, of_size)
    if not (of_size / own).exists():
        trial({"do": "write", "name": own, "content": str(of_size / "numpy"), "folder": str(of_size / own)})
    return of_size / own


def make_content(size: Size, folder: Path) -> None:
    """Rows and a sealed store of this project, and the same as NumPy arrays."""
    ours = folder / "akd-dist"
    ours.mkdir(parents=True)
    write_rows(size, ours)
    made = recipe_of(size, ours)
    (ours / "recipe.yaml").write_text(made.to_yaml())
    rows = prepare(made.data, ours / "cache").train
    card = ModelCard.of(made.students[0].model, rows, None)
    save_model(ours / "teacher", build(card, seed=SEED), card)
    cache_in_process(made, str(ours / "teacher"), store_root=str(ours / "stores"), cache_root=str(ours / "cache"))
    store = next(one for one in map(open_store, sorted(map(str, (ours / "stores").iterdir()))) if len(one) == len(rows))
    logits = store.rows(0, 0, len(rows)).astype(size.encoding)
    Content(np.arange(len(rows)), rows.inputs, rows.labels, logits).save(folder / "numpy")


def write_rows(size: Size, folder: Path) -> None:
    """Pictures of random bytes as IDX files."""
    draw = np.random.default_rng(SEED)
    for split, count in (("train", size.rows), ("validation", 256), ("test", 256)):
        images = draw.integers(0, 256, (count, *size.shape), dtype=np.uint8)
        labels = np.arange(count, dtype=np.int32) % size.classes
        for name, array, kind in (("images", images, 8), ("labels", labels.astype(">i4"), 12)):
            header = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{split}-{name}").write_bytes(header + array.tobytes())


def recipe_of(size: Size, folder: Path) -> Recipe:
    """Those rows, without augmentation, and an MLP as the teacher and as a student."""
    sources = {
        split: {"kind": "idx", "images": str(folder / f"{split}-images"), "labels": str(folder / f"{split}-labels")}
        for split in ("train", "validation", "test")
    }
    student = {
        "model": {"kind": "mlp", "hidden": 256},
        "objective": {"kind": "kd", "epochs": 1},
        "optimizer": {"kind": "sgd", "lr": 0.1},
    }
    return Recipe.model_validate(
        {
            "name": "peers",
            "data": sources,
            "teacher": {"weights": str(folder / "teacher")},
            "cache": {"encoding": size.encoding},
            "students": [student],
        }
    )


# ---- one run


def trial(asked: dict[str, Any]) -> dict[str, Any]:
    """What a contender in a process of its own tells, and the most memory that it took.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    receive, send = os.pipe()
    told: dict[str, Any] = {"event": "nothing"}
    words = [sys.executable, "-m", "benchmarks.peer_trial", str(send), json.dumps(asked)]
    quiet = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAY_DEDUP_LOGS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, pass_fds=[send], env=quiet, cwd=ROOT)
        os.close(send)
        watch = Watch(process.pid)
        with open(receive) as events:
            for line in events:
                told = json.loads(line)
                if told["event"] == "imported":
                    watch.begin(told["memory"])
        process.wait()
        watch.end()
        if process.returncode or told["event"] != "done":
            log.seek(0)
            raise SystemExit(f"{log.read().decode()[-3000:]}\n{asked['name']} failed: see above")
    return told | {"memory": watch.peak}


class Watch(threading.Thread):
    """Looks at the memory of a process and of all that it has started, until the end."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.done = psutil.Process(pid), threading.Event()
        self.before = {"own": 0, "files": 0}
        self.peak = {"own": 0, "files": 0}

    def begin(self, before: dict[str, int]) -> None:
        """From now on, above what there is now."""
        self.before = before
        self.start()

    def run(self) -> None:
        """Look."""
        while not self.done.wait(LOOK_SECONDS):
            now = memory_of(tree(self.root))
            self.peak = {kind: max(self.peak[kind], now[kind] - self.before[kind]) for kind in now}

    def end(self) -> None:
        """Stop looking."""
        self.done.set()
        if self.is_alive():
            self.join()


def forget(folder: Path) -> None:
    """Have no page of these files in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


# ---- speed


def measure(size: Size, folder: Path, names: Sequence[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turns; medians."""
    places = {name: written(name, size, folder) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(chosen.repeats):
        for name in names:
            shutil.rmtree(places[name] / "new-cache", ignore_errors=True)
            forget(places[name])
            asked = {
                "do": "passes",
                "name": name,
                "content": str(places[name].parent / "numpy"),
                "folder": str(places[name]),
                "batch": BATCH,
                "workers": CONTENDERS[name].workers if chosen.workers is None else chosen.workers,
                "warm": chosen.warm,
            }
            runs[name].append(trial(asked))
            progress(name, size, runs[name][-1])
    found = {name: summary(name, runs[name], places[name]) for name in names}
    return {"size": str(size), "bytes_of_row": size.bytes_of_row, "contenders": found} | ratio_of(found)


def progress(name: str, size: Size, run: dict[str, Any]) -> None:
    """A line for one run."""
    told = [f"{one['rows'] / one['seconds']:,.0f} ({one['rows'] / one['cpu']:,.0f})" for one in run["passes"]]
    bad = ", ".join(f"{run[kind]:,} {kind}" for kind in ("missing", "twice", "wrong") if run[kind])
    print(
        f"{size.name}: {name}: {', '.join(told)} rows a second (of CPU time), first batch {run['first_batch']:.2f} s, "
        f"{run['memory']['own'] / 1e6:,.0f} and {run['memory']['files'] / 1e6:,.0f} MB, "
        f"{run['stretches']:.0f} stretches{bad and f'; {bad}'}",
        file=sys.stderr,
    )


def summary(name: str, runs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Medians of a contender's runs."""

    def middle(values: Iterator[float] | list[float]) -> float:
        return round(statistics.median(values), 3)

    warm = [one for run in runs for one in run["passes"][1:]]
    cold = [run["passes"][0] for run in runs]
    bad = {kind: max(run[kind] for run in runs) for kind in ("missing", "twice", "wrong")}
    return {
        "warm_rows_per_second": round(middle([one["rows"] / one["seconds"] for one in warm])),
        "warm_from_to": [round(end([one["rows"] / one["seconds"] for one in warm])) for end in (min, max)],
        "warm_rows_per_cpu_second": round(middle([one["rows"] / one["cpu"] for one in warm])),
        "cold_rows_per_second": round(middle([one["rows"] / one["seconds"] for one in cold])),
        "first_batch_seconds": middle([run["first_batch"] for run in runs]),
        "own_bytes": round(middle([run["memory"]["own"] for run in runs])),
        "file_bytes": round(middle([run["memory"]["files"] for run in runs])),
        "bytes_on_disk": bytes_on_disk(name, folder),
        "stretches": middle([run["stretches"] for run in runs]),
        "shuffle": CONTENDERS[name].shuffle,
        "complete": not any(bad.values()),
        **bad,
        "kinds": runs[0]["kinds"],
    }


def bytes_on_disk(name: str, folder: Path) -> int:
    """What has to be kept: of this project the rows and the store, without what a node decodes for itself."""
    parts = [folder]
    if folder.name == "akd-dist":
        parts = [*folder.glob("train-*"), folder / "stores"]
    return sum(one.stat().st_size for part in parts for one in [part, *part.rglob("*")] if one.is_file())


def ratio_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest peer to this stream."""
    peers = {name: one["warm_rows_per_second"] for name, one in found.items() if name not in NO_PEERS}
    if not peers or "akd-dist" not in found:
        return {}
    fastest = max(peers, key=lambda name: peers[name])
    return {"fastest_peer": fastest, "ratio": round(peers[fastest] / found["akd-dist"]["warm_rows_per_second"], 3)}


def table(result: dict[str, Any], of: dict[str, str]) -> str:
    """The document for people."""
    lines = []
    for one in result.values():
        lines += [
            one["size"] + (f"; ratio {one['ratio']} ({one['fastest_peer']})" if "ratio" in one else ""),
            "                         warm rows/s   a CPU second   cold rows/s    first     own MB  files MB"
            "   disk MB  stretches  complete",
        ]
        for name, found in one["contenders"].items():
            lines.append(
                f"  {name:<21}{found['warm_rows_per_second']:>13,}{found['warm_rows_per_cpu_second']:>15,}"
                f"{found['cold_rows_per_second']:>14,}{found['first_batch_seconds']:>8.2f}s"
                f"{found['own_bytes'] / 1e6:>11,.0f}{found['file_bytes'] / 1e6:>10,.0f}"
                f"{found['bytes_on_disk'] / 1e6:>10,.1f}{found['stretches']:>11.1f}  {found['complete']}"
            )
    return "\n".join([*lines, ", ".join(f"{name} {version}" for name, version in of.items())])


# ---- orders


def orders_of(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Whether an epoch's order is the same in another process, with other workers, and after a stop half-way."""
    place = written(name, size, folder)
    workers = CONTENDERS[name].workers

    def asked(workers: int, **more: Any) -> dict[str, Any]:
        whole = {"do": "order", "name": name, "folder": str(place), "batch": BATCH, "workers": workers}
        return trial(whole | more)

    first, other = asked(workers)["rows"], asked(1 if workers == 2 else 2)["rows"]
    begun = asked(workers, stop_after=STOP_AFTER)
    found: dict[str, Any] = {"again": begun["rows"] == first[: len(begun["rows"])], "other_workers": other == first}
    if begun["state"] is None:
        return found | {"resumed": None}
    rest = asked(workers, state=begun["state"])["rows"]
    counts = np.bincount(begun["rows"] + rest, minlength=size.rows)
    found |= {
        "resumed": begun["rows"] + rest == first,
        "missing_after": int(np.count_nonzero(counts == 0)),
        "twice_after": int(np.count_nonzero(counts > 1)),
    }
    print(f"{name}: {found}", file=sys.stderr)
    return found


def table_of_orders(result: dict[str, Any], of: dict[str, str]) -> str:
    """The document for people."""
    lines = [f"{ORDERED}: is an epoch's order the same?", " " * 24 + "again  other workers  resumed after 15 batches"]
    for name, found in result.items():
        resumed = {None: "no state of its own"}.get(found["resumed"], found["resumed"])
        if resumed is False:
            resumed = f"False: {found['missing_after']:,} rows missing, {found['twice_after']:,} twice"
        lines.append(f"  {name:<22}{found['again']!s:>5}{found['other_workers']!s:>15}  {resumed}")
    return "\n".join([*lines, ", ".join(f"{name} {version}" for name, version in of.items())])


if __name__ == "__main__":
    main()
