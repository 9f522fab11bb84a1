"""Resident memory of eight students in two cohorts on one node, against that of one student.

    python benchmarks/memory.py             a table
    python benchmarks/memory.py --json      one JSON document whose main figure is `ratio`

50,000 rows of 3 x 32 x 32 bytes with 100 float32 logits under four views, made from a seed in a temporary folder and
cached by an untrained teacher. `akd-dist train-students` runs three times in a process of its own: one student, two in
two cohorts, eight in two cohorts; the students are MLPs of 0.8 million weights. Meanwhile this process reads
/proc/<pid>/smaps of every worker, that is of every process but the driver which has the decoded store mapped, about
once a second. Counted is the proportional set size (PSS): a page that n processes map counts 1/n in each, so the sum
over processes counts it once. Store and dataset are summed over all processes that map them, the driver too; everything
else over the workers alone. A run goes on until each student has ended as many epochs as there are views, by when every
worker has read all of store and dataset; the largest of the samples after that stands for it. Then it is stopped as by
Ctrl-C.

`ratio` is this total with eight students over that with one. `counted` is the PSS of store and dataset as a share of
their size on disk: 1 where all of it is resident and counted once, 2 if each cohort had a copy of its own; `mapped` is
the same of the resident set size (RSS), which counts a shared page in every process. Private is what workers have
written themselves (Pss_Anon): the interpreter, torch and Ray in the first place, then their students. Ray's own
processes and what else the driver needs are in none of these. Linux only; needs two CPUs, about 1 GB of disk and a few
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist.data.row_cache import prepare
from akd_dist.documents.damage import read_epochs
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Recipe

SHAPE, CLASSES, VIEWS, BATCH, SEED = (3, 32, 32), 100, 4, 128, 0
STUDENTS, COHORTS = 8, 2
SAMPLE_SECONDS = 1.0
# Samples taken once every worker has read everything: one alone may fall between two checkpoints.
SAMPLES = 8
# Rounds over all views: more than a run is watched for.
MANY = 10_000
KIB = 1024


@dataclass
class Sample:
    """Memory of all workers at one moment, in bytes."""

    workers: int = 0
    rest: int = 0
    """PSS of the workers without store and dataset."""
    private: int = 0
    files_pss: dict[str, int] = field(default_factory=lambda: {"store": 0, "dataset": 0})
    """`store` and `dataset`: PSS of their files, over all processes."""
    files_rss: dict[str, int] = field(default_factory=lambda: {"store": 0, "dataset": 0})

    @property
    def shared(self) -> int:
        """PSS of store and dataset together."""
        return sum(self.files_pss.values())

    @property
    def total(self) -> int:
        """Everything that training takes."""
        return self.rest + self.shared


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory of eight students in two cohorts against that of one.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rows", type=int, default=50_000, help="train rows (default 50,000)")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that a run may take (default 600)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.rows, arguments.patience)
    print(json.dumps(result) if arguments.json else table(result))


def measure(folder: Path, rows: int, patience: float) -> dict[str, Any]:
    """Both runs."""
    write_rows(folder, rows)
    fleets = {name: recipe_of(folder, name, count, cohorts) for name, count, cohorts in runs()}
    teacher = folder / "teacher"
    splits = prepare(fleets["one"].data, folder / "cache")
    mlp = fleets["one"].students[0].model
    card = ModelCard.of(mlp, splits.train, None)
    save_model(teacher, build(card, seed=SEED), card)
    cache_in_process(fleets["one"], str(teacher), store_root=str(folder / "stores"), cache_root=str(folder / "cache"))
    samples = {name: watch(folder, fleets[name], cohorts, patience) for name, _, cohorts in runs()}
    sizes = sizes_on_disk(folder / "cache")
    one, two, eight = samples.values()
    return {
        "ratio": round(eight.total / one.total, 3),
        "counted": shares(eight.files_pss, sizes),
        "mapped": shares(eight.files_rss, sizes),
        "bytes_on_disk": sizes,
        "one": described(one, 1),
        "two": described(two, COHORTS),
        "eight": described(eight, STUDENTS),
        "private_of_another_student": round((eight.private - two.private) / (STUDENTS - COHORTS)),
        "rows": rows,
        "views": VIEWS,
        "cohorts": COHORTS,
        "students": STUDENTS,
        "cores": len(os.sched_getaffinity(0)),
    }


def runs() -> Iterator[tuple[str, int, int]]:
    """(name, students, cohorts) of each run."""
    yield "one", 1, 1
    yield "two", COHORTS, COHORTS
    yield "eight", STUDENTS, COHORTS


# ---- what is trained


def write_rows(folder: Path, rows: int) -> None:
    """Train, validation and test rows as IDX files."""
    generator = np.random.default_rng(SEED)
    for split, count in (("train", rows), ("validation", 500), ("test", 500)):
        images = generator.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        for name, array in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{split}-{name}").write_bytes(header + array.tobytes())


def recipe_of(folder: Path, name: str, students: int, cohorts: int) -> Recipe:
    """So many MLPs in so many cohorts."""
    sources = {
        split: {"kind": "idx", "images": str(folder / f"{split}-images"), "labels": str(folder / f"{split}-labels")}
        for split in ("train", "validation", "test")
    }
    model = {"kind": "mlp", "hidden": 256}
    objective = {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": VIEWS * MANY, "stage2_epochs": 1}
    student = {"model": model, "objective": objective, "optimizer": {"kind": "sgd", "lr": 0.001}, "batch": BATCH}
    return Recipe.model_validate(
        {
            "name": name,
            "data": {**sources, "views": VIEWS, "augmentation": {"kind": "pad_crop_flip", "pixels": 4}},
            "teacher": {"weights": str(folder / "teacher")},
            "students": [student | {"seed": seed} for seed in range(students)],
            "cohorts": cohorts,
        }
    )


# ---- watching it


def watch(folder: Path, recipe: Recipe, cohorts: int, patience: float) -> Sample:
    """Train in a process of its own, and look at its workers once they have read everything; the largest sample."""
    file, log_file = folder / f"{recipe.name}.yaml", folder / f"{recipe.name}.log"
    file.write_text(recipe.to_yaml())
    places = {"--store-root": "stores", "--run-root": "runs", "--cache-root": "cache"}
    words = [sys.executable, "-m", "akd_dist.cli", "train-students", str(file)]
    words += [word for option, place in places.items() for word in (option, str(folder / place))]
    samples: list[Sample] = []
    deadline = time.monotonic() + patience
    with open(log_file, "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        while process.poll() is None and len(samples) < SAMPLES and time.monotonic() < deadline:
            time.sleep(SAMPLE_SECONDS)
            if have_read_all(folder / "runs" / recipe.name, recipe):
                sample = sample_of(folder / "cache", process.pid)
                samples += [sample] * (sample.workers == cohorts)
        process.send_signal(signal.SIGINT)
        process.wait()
    if len(samples) < SAMPLES:
        raise SystemExit(
            f"{log_file.read_text()[-2000:]}\nthe run {recipe.name} ended before it was measured: see above"
        )
    return max(samples, key=lambda sample: sample.total)


def have_read_all(run: Path, recipe: Recipe) -> bool:
    """Whether every student has ended an epoch on each view."""
    return all(len(read_epochs(run / "students" / spec.name)) >= VIEWS for spec in recipe.students)


def sample_of(cache: Path, driver: int) -> Sample:
    """Memory of every process that has store or dataset mapped, now."""
    sample = Sample()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (told := (folder / "maps").read_text()).count(f"{cache}/"):
                worker = f"{cache}/logits/" in told and int(folder.name) not in (driver, os.getpid())
                add(sample, folder, cache, worker=worker)
        except OSError:  # another user's, or gone
            continue
    return sample


def add(sample: Sample, folder: Path, cache: Path, *, worker: bool) -> None:
    """Count one process; of one that is no worker, only store and dataset."""
    rollup = fields((folder / "smaps_rollup").read_text())
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", (folder / "smaps").read_text(), flags=re.MULTILINE)
    files = 0
    for mapping in mappings:
        path = mapping.partition("\n")[0].partition(str(cache))[2]
        if path:
            kind, found = kind_of(path), fields(mapping)
            sample.files_pss[kind] += found["Pss"]
            sample.files_rss[kind] += found["Rss"]
            files += found["Pss"]
    if worker:
        sample.workers += 1
        sample.rest += rollup["Pss"] - files
        sample.private += rollup["Pss_Anon"]


def kind_of(path: str) -> str:
    """`store` or `dataset`, from a path below the cache."""
    return "store" if path.startswith("/logits/") else "dataset"


def fields(smaps: str) -> dict[str, int]:
    """The sizes of an smaps entry, in bytes."""
    return {name: int(size) * KIB for name, size in re.findall(r"^(\w+): +(\d+) kB$", smaps, flags=re.MULTILINE)}


def sizes_on_disk(cache: Path) -> dict[str, int]:
    """Bytes of the arrays below the cache."""
    sizes = {"store": 0, "dataset": 0}
    for path in cache.rglob("*.npy"):
        sizes[kind_of(f"/{path.relative_to(cache)}")] += path.stat().st_size
    return sizes


# ---- what it says


def shares(found: dict[str, int], sizes: dict[str, int]) -> dict[str, float]:
    """Of each, and of both together, relative to their size on disk."""
    both = sum(found.values()) / sum(sizes.values())
    return {name: round(found[name] / sizes[name], 3) for name in sizes} | {"both": round(both, 3)}


def described(sample: Sample, students: int) -> dict[str, Any]:
    """A sample as part of the document."""
    return {
        "students": students,
        "workers": sample.workers,
        "total": sample.total,
        "private": sample.private,
        "private_per_student": round(sample.private / students),
        "store_pss": sample.files_pss["store"],
        "dataset_pss": sample.files_pss["dataset"],
    }


def table(result: dict[str, Any]) -> str:
    """The document for people."""
    lines = [
        f"{result['rows']:,} rows, {result['views']} views; decoded store {mb(result['bytes_on_disk']['store'])}, "
        f"prepared dataset {mb(result['bytes_on_disk']['dataset'])} on disk",
        "  students  workers       total       store     dataset     private  private a student",
    ]
    for one in (result["one"], result["two"], result["eight"]):
        sizes = [mb(one[key]) for key in ("total", "store_pss", "dataset_pss", "private", "private_per_student")]
        lines.append(f"  {one['students']:>8}  {one['workers']:>7}  " + "  ".join(f"{size:>10}" for size in sizes))
    lines += [
        f"  ratio: eight students take {result['ratio']} times the memory of one student",
        f"  store and dataset count {result['counted']['both']} times their size on disk (a sum of RSS would say "
        f"{result['mapped']['both']})",
        f"  each student beyond a cohort's first adds {mb(result['private_of_another_student'])} of private memory",
    ]
    return "\n".join(lines)


def mb(size: float) -> str:
    """Bytes in megabytes."""
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
