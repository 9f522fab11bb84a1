"""Clusters of several nodes: those that join are used, those that see no shared folder are not; GPUs are shared."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.jobs.train_students import train_in_process
from akd_dist.storage.roots import open_root
from tests.fleets import ADAMW, HARD, a_recipe, a_student, a_teacher, stores_of, weights
from tests.sources import source
from tests.survivors import HELD_MODELS, a_held_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def short() -> Iterator[str]:
    """A folder for Ray: the paths of its sockets must be short."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def on_nodes(short: str, *arguments: str) -> dict[str, Any]:
    """What a cluster of its own says, in a process of its own."""
    environment = os.environ | {"RAY_TMPDIR": short, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.nodes", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def unshare_works() -> bool:
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


def test_a_node_that_does_not_see_a_folder_gets_no_work(short: str, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or not unshare_works():
        pytest.skip("hiding a folder from one process takes unshare and mount, which are not permitted here")
    place = tmp_path / "hidden"
    answer = on_nodes(short, "hidden", str(place))
    for told in (answer["told"], answer["again"], answer["sent"]):
        assert len(told) == 1, answer
        assert "gets no work" in told[0]
        assert f"the run's folder: no {place}" in told[0]
    assert answer["kept"]
    for part in ("no node that has room", "the run's folder", str(place), "--run-root", "s3://"):
        assert part in answer["refusal"]
    assert answer["done"] == list(range(6)), "work that was sent to it is done elsewhere"
    assert not any(answer["blind"])
    assert answer["left"] == []


NETS = """
import pathlib
import torch

WIDTH = int((pathlib.Path(__file__).parent / "width.txt").read_text())


def net(input_shape, classes, words):
    assert pathlib.Path(words).read_text() == "beside the recipe"
    inputs = input_shape[0] * input_shape[1] * input_shape[2]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs, WIDTH), torch.nn.Linear(WIDTH, classes))
"""


@pytest.mark.slow
def test_the_recipe_s_folder_travels_and_who_lacks_the_data_trains_on_prepared_rows(short: str, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or not unshare_works():
        pytest.skip("hiding a folder from one process takes unshare and mount, which are not permitted here")
    folder, data, random = tmp_path / "recipe", tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for name, text in {"nets.py": NETS, "width.txt": "5", "words.txt": "beside the recipe"}.items():
        (folder / name).write_text(text)
    rows = source("parquet", data, random.integers(0, 256, (300, 4, 4, 1), dtype=np.uint8), np.arange(300) % 3)
    model = {"kind": "custom", "factory": "nets:net", "arguments": {"words": "./words.txt"}}
    teacher = {"model": model, "train": {"epochs": 1, "optimizer": ADAMW}}
    students = [a_student("one", model=model), a_student("two", model=model, seed=1, objective=HARD)]
    given = {"train": rows.model_dump(mode="json"), "views": 1, "augmentation": {"kind": "none"}}
    recipe = a_recipe(students, teacher=teacher, data=given, folder=str(folder))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    answer = on_nodes(short, "travels", str(tmp_path))
    assert answer["states"] == ["done", "done"]
    assert answer["cached"] > 0
    caching, training = answer["told"]
    (left_out,) = [line for line in caching.splitlines() if "gets no work" in line]
    assert "the recipe's data.parquet: no " in left_out, "while the rows are prepared, and no longer"
    assert "gets no work" not in training
    (rows,) = (tmp_path / "store" / "rows").iterdir()
    assert (rows / "manifest.json").exists()
    (unpacked,) = (tmp_path / "cache" / "recipes").iterdir()
    assert sorted(path.name for path in unpacked.iterdir() if path.is_file()) == [
        "nets.py",
        "recipe.yaml",
        "width.txt",
        "words.txt",
    ]


@pytest.mark.slow
def test_a_teacher_is_trained_on_a_node_that_shares_no_folder(short: str, tmp_path: Path, bucket: str) -> None:
    if shutil.which("unshare") is None or not unshare_works():
        pytest.skip("hiding a folder from one process takes unshare and mount, which are not permitted here")
    (tmp_path / "recipe.yaml").write_text(a_recipe([a_student("one")]).to_yaml())
    answer = on_nodes(short, "publishes", str(tmp_path), f"{bucket}/stores")
    assert answer["hit"] is False
    assert answer["computed"] > 0
    assert not answer["here"], "the driver has nothing of the teacher"
    published = [key for key in open_root(f"{bucket}/stores").list() if key.startswith("teachers/")]
    assert sorted(key.rpartition("/")[2] for key in published) == ["model.json", "model.safetensors"]


@pytest.mark.slow
def test_cohorts_share_the_gpu_that_ray_is_told_of(short: str, tmp_path: Path) -> None:
    answer = on_nodes(short, "share", str(tmp_path / "share"))
    assert answer["gpus"] == [[0], [0]]
    assert answer["cpus_free"] == 0
    assert answer["memory_taken"] == 2e8


@pytest.mark.slow
def test_a_node_that_joins_gets_work_and_changes_no_weight(short: str, tmp_path: Path) -> None:
    (tmp_path / "held_models.py").write_text(HELD_MODELS)
    (tmp_path / "hold").touch()  # until students of both cohorts have checkpoints
    model = a_held_model(at=20, pause=0.15)
    students = [a_student(f"s{seed}", seed=seed, model=model, objective=HARD) for seed in range(4)]
    teacher = a_teacher(a_recipe([a_student("any")]), tmp_path / "teacher", tmp_path / "cache")
    recipe = a_recipe(students, teacher={"weights": teacher}, folder=str(tmp_path), checkpoint_seconds=1.0, cohorts=2)
    stores = stores_of(recipe, teacher, tmp_path)
    train_in_process(recipe, stores, run=tmp_path / "plain", cache_root=str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    answer = on_nodes(short, "join", str(tmp_path / "recipe.yaml"), str(tmp_path))
    assert answer["states"] == ["done"] * 4
    assert answer["cohorts"] == 2
    assert "and its cohort wait for 1 CPU" in (tmp_path / "told").read_text()
    assert weights(tmp_path / "runs" / recipe.name) == weights(tmp_path / "plain")
