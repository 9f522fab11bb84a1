"""What every change of the code must leave as it is: the bytes of stores, and of the students' weights.

python -m tests.golden_bytes FOLDER      caches and trains there; prints the sha256 of what came of it
python -m tests.golden_bytes             writes what this processor comes to into tests/golden/bytes.json afresh: only
                                         where bytes are meant to change, and then on a processor of Intel and another
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "bytes.json"
# Other instruction sets take sums in another order. These variables hold torch to AVX2, which every x86 processor of
# the last ten years has. oneDNN is left out: even where it is held to AVX2, it cuts convolutions by the sizes of the
# processor's caches.
ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_NUM_THREADS": "1"}


def mkl_mode() -> str:
    """The value of MKL_CBWR by which MKL computes the same on processors of a kind.

    It holds to an instruction set on Intel's only; on others it does as it likes, except in the mode COMPATIBLE.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return "AVX2" if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text() else "COMPATIBLE"


def by_sha256(folder: Path) -> dict[str, Any]:
    """Cache and train recipes that between them have most objectives, models and augmentations."""
    import torch

    from akd_dist.jobs.train_students import train_in_process
    from tests import fleets

    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    cnn = {"kind": "cnn", "width": 4}
    sgd = {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": {"kind": "steps"}}
    students = [
        fleets.a_student("annealing"),
        fleets.a_student("annealing-sgd", objective=fleets.ANNEALING | {"stage2_optimizer": sgd}),
        fleets.a_student("labels", objective=fleets.HARD, model=cnn),
        fleets.a_student("kd", objective=fleets.KD, optimizer=sgd),
        fleets.a_student("continuation", objective=fleets.CONTINUATION, model={"kind": "resnet", "depth": 8}),
    ]
    stacked = {"annealing": fleets.ANNEALING, "kd": fleets.KD, "continuation": fleets.CONTINUATION}
    crops = {"augmentation": {"kind": "random_resized_crop_flip"}, "seed": 3, "stratify": True}
    recipes = {
        "shift-float32": fleets.a_recipe(students, stacked="never"),
        "crop-float16": fleets.a_recipe(
            [fleets.a_student("annealing", model=cnn), fleets.a_student("kd", objective=fleets.KD)],
            data={"train": {"kind": "digits"}, "views": 1} | crops,
            cache={"encoding": "float16"},
            name="crops",
            stacked="never",
        ),
        "stacked": fleets.a_recipe(
            [fleets.a_student(name, objective=objective) for name, objective in stacked.items()],
            name="stacked",
            stacked="always",
        ),
    }
    found: dict[str, Any] = {"torch": torch.__version__.split("+")[0]}
    for name, recipe in recipes.items():
        home = folder / name
        teacher = fleets.a_teacher(recipe, home / "teacher", home / "cache")
        stores = fleets.stores_of(recipe, teacher, home)
        train_in_process(recipe, stores, run=home / "run", cache_root=str(home / "cache"))
        found[name] = {"stores": fleets.store_bytes(home / "stores"), "weights": fleets.weights(home / "run")}
    return found


def in_a_process_of_its_own(folder: Path) -> dict[str, Any]:
    """The same, where nothing has yet chosen the instructions that torch uses."""
    line = [sys.executable, "-m", "tests.golden_bytes", str(folder)]
    done = subprocess.run(
        line,
        env=os.environ | ENVIRONMENT | {"MKL_CBWR": mkl_mode()},
        capture_output=True,
        text=True,
        timeout=900,
        cwd=GOLDEN.parents[2],
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(by_sha256(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            golden = json.loads(GOLDEN.read_text()) | {mkl_mode(): in_a_process_of_its_own(Path(temporary))}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
