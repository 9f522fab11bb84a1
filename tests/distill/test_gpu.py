"""On a real GPU: it computes what a CPU does, cohorts share it, and the driver needs none of its own.

That a GPU's students are the same alone, in a cohort, killed, or trained with the teacher in the loop is shown by the
tests of all that: `make test-gpu` runs them there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import akd_dist
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.device import device_name
from akd_dist.recipe import Recipe
from akd_dist.storage.reader import open_store
from tests.fleets import ADAMW, ANNEALING, KD, a_recipe, a_student, a_teacher, stores_of, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
SETTINGS = {
    "annealing": a_student("annealing", model={"kind": "mlp", "hidden": 8}),
    "kd": a_student("kd", model={"kind": "cnn", "width": 4}, objective=KD),
}


def on(device: str, precision: str, **changes: Any) -> Recipe:
    """Students without chance of their own, in one precision, as is their teacher."""
    students = [student | {"precision": precision, "gpus": 1.0} for student in SETTINGS.values()]
    teacher = {"model": {"kind": "cnn", "width": 8}, "train": {"epochs": 1, "optimizer": ADAMW, "precision": precision}}
    cache = {"precision": precision}
    return a_recipe(students, **{"teacher": teacher, "cache": cache, "device": device} | changes)


def trained(recipe: Recipe, root: Path, teacher: str) -> Path:
    """A run of the recipe in a plain loop."""
    stores = stores_of(recipe, teacher, root)
    train_in_process(recipe, stores, run=root / "run", cache_root=str(root / "cache"))
    assert open_store(stores["train"]).manifest.computed.device == device_name(recipe.device)
    return root / "run"


@pytest.mark.parametrize(("precision", "within"), [("float64", 1e-9), ("float32", 1e-3)])
def test_a_gpu_computes_what_a_cpu_does(precision: str, within: float, tmp_path: Path) -> None:
    teacher = a_teacher(on("cpu", precision), tmp_path / "teacher", tmp_path / "cache")
    here, there = (trained(on(device, precision), tmp_path / device, teacher) for device in ("cpu", "cuda"))
    for name in SETTINGS:
        ours, theirs = (
            safetensors.torch.load_file(run / "students" / name / "model.safetensors") for run in (here, there)
        )
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= within
        results = [json.loads((run / "students" / name / "result.json").read_text()) for run in (here, there)]
        assert results[0]["test"]["accuracy"] == pytest.approx(results[1]["test"]["accuracy"], abs=0.01)


def test_a_student_of_a_gpu_is_evaluated_on_either(tmp_path: Path) -> None:
    recipe = on("cuda", "float32")
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache")
    run = trained(recipe, tmp_path, teacher)
    result = json.loads((run / "students" / "kd" / "result.json").read_text())
    found = {
        device: akd_dist.evaluate(result["path"], "digits", cache_root=tmp_path / "cache", device=device)["student"]
        for device in ("cpu", "cuda")
    }
    assert found["cuda"]["metrics"]["loss"] == pytest.approx(found["cpu"]["metrics"]["loss"], rel=1e-4)


def test_cohorts_share_a_gpu_that_the_driver_lacks(tmp_path: Path) -> None:
    """The whole line, command by command, on a cluster that was started with the GPU, by drivers that do not see it."""
    from ray.cluster_utils import Cluster

    import akd_dist.jobs.cluster  # noqa: F401  # sets what Ray reads of the environment

    students = [
        a_student(f"s{seed}", seed=seed, gpus=0.25, objective=ANNEALING | {"stage1_epochs": 4}) for seed in range(4)
    ]
    recipe = a_recipe(students, device="cuda", cohorts=4)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    blind = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1, "include_dashboard": False})
    roots = [
        "--store-root",
        str(tmp_path / "stores"),
        "--cache-root",
        str(tmp_path / "cache"),
        "--address",
        nodes.address,
    ]
    try:
        train = ["train-students", "--run-root", str(tmp_path / "runs")]
        for command in (["cache-teacher"], [*train, "--dry-run"], train):
            line = [sys.executable, "-m", "akd_dist.cli", *command, str(tmp_path / "recipe.yaml"), *roots]
            told = subprocess.run(line, env=blind, capture_output=True, text=True, check=False)
            assert told.returncode == 0, told.stderr
            assert "not known" not in told.stderr  # the students were probed where the GPU is
    finally:
        nodes.shutdown()  # type: ignore[no-untyped-call]
    document = json.loads((tmp_path / "runs" / "fleet" / "fleet.json").read_text())
    assert document["cohorts"] == 4
    (teacher,) = (path for path in (tmp_path / "stores" / "teachers").iterdir() if path.is_dir())
    stores, alone = stores_of(recipe, str(teacher), tmp_path), tmp_path / "alone"
    assert stores["train"] == document["store"]
    train_in_process(recipe, stores, run=alone, cache_root=str(tmp_path / "cache"))
    assert weights(tmp_path / "runs" / "fleet") == weights(alone)
