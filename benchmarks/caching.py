"""`akd-dist cache-teacher` against a bare loop of the same teacher over the same views.

    python -m benchmarks.caching             a table
    python -m benchmarks.caching --json      one JSON document whose main figure is `ratio`
    ... --parts                              only what the work is made of, in seconds of CPU time

Pictures of 3 x 32 x 32 bytes from a seed, as an .npy file, under several views of `pad_crop_flip`; a ResNet with random
weights; 100 classes. Both sides use all cores: tasks of `--threads` threads each (by default all cores, so one task at
a time) against as many processes of a bare loop. The loop maps the file, and for every batch of rows and every view it
makes the view, calls the teacher on it in `torch.inference_mode`, and keeps the logits; at the end it writes them with
`np.save`, without fsync. It shares with the package the augmentation and the model, and nothing else: no fingerprint,
no verification, no checksum, nothing that survives a kill.

`ratio` is the time of `cache-teacher` over that of the loop, both from the start of a process to its end: for us rows
are prepared, fingerprinted and verified, the teacher is tried, Ray is started and stopped; for the loop torch is
imported. `inner_ratio` leaves the loop's imports out, so it charges us with our own. `cpu_ratio` is the same by CPU
time, of all processes that each side starts, as far as they are seen: /proc is read several times a second. Sides take
turns; the ratio is that of neighbouring runs, the median of all pairs.

Parts, in a further run: `seconds` of the driver by step, and CPU seconds of the work by step, in the plain loop that
gives the same bytes without Ray.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CLASSES, SHAPE, BATCH_ROWS, OTHERS, SEED = 100, (3, 32, 32), 256, 512, 0
LOOK_SECONDS = 0.2
HEAD_BYTES = 4 + 4 * 4
"""What an IDX file of four dimensions begins with."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Caching a teacher against a bare loop.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rows", type=int, default=20_000, help="train rows (default 20,000)")
    parser.add_argument("--views", type=int, default=8, help="views of each (default 8)")
    parser.add_argument("--depth", type=int, default=20, help="depth of the ResNet (default 20)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a task (default: cores)")
    parser.add_argument("--parts", action="store_true", help="only what the work is made of")
    parser.add_argument("--loop", nargs=3, metavar=("FOLDER", "NUMBER", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--told", metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        print(json.dumps(loop(Path(given.loop[0]), int(given.loop[1]), int(given.loop[2]))))
    elif given.told:
        print(json.dumps(told_driver(Path(given.told))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Path(folder), given)
        print(json.dumps(result) if given.json else table(result))


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    write_rows(folder, given.rows)
    write_recipe(folder, given.views, given.depth, given.threads)
    pairs = []
    for _ in range(0 if given.parts else given.repeats):
        theirs = by_hand(folder, given.threads)
        fresh(folder)
        ours = watched([[sys.executable, "-m", "akd_dist", *command(folder)]])
        pairs.append((ours, theirs))
    fresh(folder)
    result: dict[str, Any] = {}
    if pairs:
        result = {
            "ratio": median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs),
            "inner_ratio": median(ours["seconds"] / theirs["inner"] for ours, theirs in pairs),
            "cpu_ratio": median(ours["cpu"] / theirs["cpu"] for ours, theirs in pairs),
            "ratios": [round(ours["seconds"] / theirs["seconds"], 3) for ours, theirs in pairs],
            "seconds": median(ours["seconds"] for ours, _ in pairs),
            "loop_seconds": median(theirs["seconds"] for _, theirs in pairs),
            "cpu": median(ours["cpu"] for ours, _ in pairs),
            "loop_cpu": median(theirs["cpu"] for _, theirs in pairs),
        }
    driver = watched([[sys.executable, "-m", "benchmarks.caching", "--told", str(folder)]])
    return result | {
        "driver": json.loads(driver["said"][0].splitlines()[-1]),
        "work": work(folder),
        "rows": given.rows,
        "views": given.views,
        "depth": given.depth,
        "threads": given.threads,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "repeats": given.repeats,
    }


def median(values: Iterator[float]) -> float:
    """To three digits."""
    return round(statistics.median(values), 3)


# ---- what both sides work on


def write_rows(folder: Path, rows: int) -> None:
    """IDX files of random pictures and labels, and of a few for validation and test."""
    rng = np.random.default_rng(SEED)
    for name, count in (("train", rows), ("validation", OTHERS), ("test", OTHERS)):
        with open(folder / f"{name}-images", "wb") as file:
            file.write(struct.pack(">I4I", 0x0804, count, *SHAPE))
            file.write(rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8).tobytes())
        labels = (np.arange(count) % CLASSES).astype(np.uint8)  # a train row of every class
        (folder / f"{name}-labels").write_bytes(struct.pack(">II", 0x0801, count) + labels.tobytes())


def write_recipe(folder: Path, views: int, depth: int, threads: int) -> None:
    """The recipe, and the folder of a teacher with random weights."""
    from akd_dist.data.row_cache import prepare
    from akd_dist.models.build import build
    from akd_dist.models.card import ModelCard
    from akd_dist.models.folder import save_model
    from akd_dist.recipe import Recipe

    def rows(name: str) -> dict[str, Any]:
        return {"kind": "idx", "images": str(folder / f"{name}-images"), "labels": str(folder / f"{name}-labels")}

    recipe = Recipe.model_validate(
        {
            "name": "caching",
            "data": {name: rows(name) for name in ("train", "validation", "test")}
            | {"views": views, "augmentation": {"kind": "pad_crop_flip", "pixels": 4}},
            "teacher": {"weights": str(folder / "teacher")},
            "cache": {"batch_rows": BATCH_ROWS, "threads": threads},
            "students": [
                {"model": {"kind": "resnet", "depth": depth}, "objective": {"kind": "kd", "epochs": 1}}
                | {"optimizer": {"kind": "sgd", "lr": 0.1}}
            ],
        }
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    splits = prepare(recipe.data, folder / "looked-at")
    card = ModelCard.of(recipe.students[0].model, splits.train, None)
    save_model(folder / "teacher", build(card, seed=SEED), card)
    shutil.rmtree(folder / "looked-at")


def command(folder: Path) -> list[str]:
    """What a user types."""
    roots = ["--store-root", str(folder / "stores"), "--cache-root", str(folder / "cache")]
    return ["cache-teacher", str(folder / "recipe.yaml"), *roots, "--json"]


def fresh(folder: Path) -> None:
    """Nothing prepared, nothing cached."""
    for name in ("stores", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


# ---- the other side


def by_hand(folder: Path, threads: int) -> dict[str, Any]:
    """Bare loops, as many processes as leave no core idle, each over its share of the rows."""
    count = max(1, len(os.sched_getaffinity(0)) // threads)
    this = [sys.executable, "-m", "benchmarks.caching", "--loop", str(folder)]
    run = watched([[*this, str(number), str(count)] for number in range(count)])
    return run | {"inner": max(json.loads(said)["seconds"] for said in run["said"])}


def loop(folder: Path, number: int, count: int) -> dict[str, float]:
    """One of them: what one would write without the package, but for the view and the model."""
    import torch

    from akd_dist.data.views import view_of
    from akd_dist.models.folder import load_model
    from akd_dist.recipe import NoAugmentation
    from akd_dist.recipe.load import load_recipe

    started = time.perf_counter()
    recipe = load_recipe(str(folder / "recipe.yaml"))
    torch.set_num_threads(recipe.cache.threads)
    module = load_model(folder / "teacher").eval()
    for name, views in (("train", recipe.data.views), ("validation", 1), ("test", 1)):
        rows = np.memmap(folder / f"{name}-images", np.uint8, "r", HEAD_BYTES).reshape(-1, *SHAPE)
        numbers = np.array_split(np.arange(len(rows)), count)[number]
        augmentation = recipe.data.augmentation if name == "train" else NoAugmentation()
        logits = np.empty((views, len(numbers), CLASSES), np.float32)
        with torch.inference_mode():
            for first in range(0, len(numbers), BATCH_ROWS):
                batch = numbers[first : first + BATCH_ROWS]
                inputs = rows[batch]
                for view in range(views):
                    shown = view_of(augmentation, recipe.data.seed, inputs, batch, view)
                    logits[view, first : first + len(batch)] = module(shown).numpy()
        np.save(folder / f"by-hand-{name}-{number}.npy", logits)
    return {"seconds": time.perf_counter() - started}


# ---- seconds of processes


def watched(commands: list[list[str]]) -> dict[str, Any]:
    """Run processes at once: seconds until the last has ended, CPU seconds of all that they started, what they said."""
    started = time.perf_counter()
    running = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
    used = dict[tuple[int, float], float]()
    done = threading.Event()
    watching = threading.Thread(target=look, args=([one.pid for one in running], used, done))
    watching.start()
    said = [one.communicate() for one in running]
    seconds = time.perf_counter() - started
    done.set()
    watching.join()
    for one, (_, complaint) in zip(running, said, strict=True):
        if one.returncode:
            raise SystemExit(f"{' '.join(one.args)} failed:\n{complaint}")  # type: ignore[arg-type]
    return {"seconds": seconds, "cpu": sum(used.values()), "said": [out for out, _ in said]}


def look(roots: list[int], used: dict[tuple[int, float], float], done: threading.Event) -> None:
    """Keep the CPU time of processes and of all below them, by number and start, as long as they live."""
    known = dict[int, psutil.Process]()
    while not done.wait(LOOK_SECONDS):
        for pid in roots:
            try:
                root = psutil.Process(pid)
                known |= {one.pid: one for one in [root, *root.children(recursive=True)]}
            except psutil.Error:
                continue
        for one in known.values():
            try:
                times = one.cpu_times()
                used[one.pid, one.create_time()] = times.user + times.system
            except psutil.Error:
                continue


# ---- parts


class Clock:
    """Seconds by name, of functions that are wrapped while it is on: by the clock, and of their own thread's CPU."""

    def __init__(self) -> None:
        self.seconds, self.cpu = dict[str, float](), dict[str, float]()
        self._lock = threading.Lock()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        started, busy = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.cpu[name] = self.cpu.get(name, 0.0) + time.thread_time() - busy

    def wrap(self, module: Any, function: str, name: str) -> None:
        """Measure each call of a function of a module, or of a class."""
        plain: Callable[..., Any] = getattr(module, function)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return plain(*args, **kwargs)

        setattr(module, function, timed)

    def told(self) -> dict[str, dict[str, float]]:
        """All of it, rounded."""
        return {
            name: {"seconds": round(self.seconds[name], 2), "cpu": round(self.cpu[name], 2)} for name in self.seconds
        }


def told_driver(folder: Path) -> dict[str, Any]:
    """`cache-teacher` in this process, with the steps of the driver measured."""
    began = psutil.Process().create_time()
    clock = Clock()
    with clock.of("imports"):
        import akd_dist
        from akd_dist.jobs import cache_teacher, cluster
        from akd_dist.jobs.planning import caching
    imported = time.time() - began
    clock.wrap(caching, "open_rows", "rows prepared")
    clock.wrap(caching, "with_models", "stores looked up, teacher tried")
    clock.wrap(cluster, "connect", "Ray started")
    clock.wrap(cache_teacher, "compute_in_tasks", "tasks, Ray included")
    clock.wrap(cache_teacher, "seal_store", "stores sealed")
    with clock.of("cache_teacher"):
        akd_dist.cache_teacher(
            str(folder / "recipe.yaml"), store_root=str(folder / "stores"), cache_root=str(folder / "cache")
        )
    return {"until imported": round(imported, 2), **clock.told()}


def work(folder: Path) -> dict[str, Any]:
    """The same stores in a plain loop without Ray, with the steps of a caching task measured."""
    from akd_dist.data import views
    from akd_dist.distill import teacher
    from akd_dist.jobs.cache_teacher import cache_in_process
    from akd_dist.recipe.load import load_recipe
    from akd_dist.storage import content, writer

    clock = Clock()
    clock.wrap(teacher, "teacher_logits", "inference")
    clock.wrap(views, "_apply", "views")
    clock.wrap(views, "_draw", "views")
    clock.wrap(content.Content, "verify", "rows verified")
    clock.wrap(teacher, "view_digests", "probes")
    clock.wrap(writer, "encode_arrays", "encoding")
    clock.wrap(writer, "encode_objects", "encoding")
    clock.wrap(teacher, "as_stored", "encoding")
    clock.wrap(writer, "_publish", "publishing")
    clock.wrap(writer, "put_receipt", "publishing")
    roots = {"store_root": str(folder / "loop-stores"), "cache_root": str(folder / "cache")}
    busy = time.process_time()
    with clock.of("all"):
        cache_in_process(load_recipe(str(folder / "recipe.yaml")), str(folder / "teacher"), **roots)
    return clock.told() | {"cpu of all threads": round(time.process_time() - busy, 2)}


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [
        f"ResNet-{result['depth']}, {result['rows']:,} rows of {SHAPE} under {result['views']} views, "
        f"{result['threads']} threads a task, {result['cores']} cores, load {result['load']}"
    ]
    if "ratio" in result:
        lines += [
            f"  cache-teacher {result['seconds']:>9.1f} s, {result['cpu']:.1f} s of CPU time",
            f"  a bare loop   {result['loop_seconds']:>9.1f} s, {result['loop_cpu']:.1f} s of CPU time",
            f"  ratio         {result['ratio']:>9} of {result['ratios']}; without the loop's imports "
            f"{result['inner_ratio']}; by CPU time {result['cpu_ratio']}",
        ]
    for title, parts in (("the driver", result["driver"]), ("the work, in a plain loop", result["work"])):
        lines.append(title)
        for name, part in parts.items():
            seconds, cpu = (part["seconds"], part["cpu"]) if isinstance(part, dict) else (part, None)
            lines.append(f"  {name:34} {seconds:>8.2f} s" + ("" if cpu is None else f"  {cpu:>8.2f} s of CPU time"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
