"""A model that is trained on one node and published: create-only, its checkpoints too, so that another goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import TerminatedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill import published
from akd_dist.distill.published import fetch_checkpoints, publish_model, train_and_publish
from akd_dist.jobs.shared import look_first
from akd_dist.jobs.stopping import StopFlag
from akd_dist.jobs.train_teacher import Workspace, ensure_trained, run_in_process, run_in_task, teacher_of
from akd_dist.models.folder import load_model
from akd_dist.storage.roots import open_root
from tests.fleets import a_recipe, a_student, a_teacher


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, Any, Any]:
    recipe = a_recipe([a_student("one")])
    splits = prepare(recipe.data, tmp_path / "cache")
    teacher = teacher_of(recipe, splits)
    assert teacher is not None
    return recipe, splits, teacher


def test_it_is_published_and_nothing_is_left_on_the_node(trained: Any, bucket: str, tmp_path: Path) -> None:
    recipe, splits, teacher = trained
    local = Workspace(str(tmp_path / "stores"), str(tmp_path / "cache"))
    there = ensure_trained(teacher, recipe, splits, local, run_in_process)
    remote = Workspace(f"{bucket}/published", str(tmp_path / "cache"))
    uri = ensure_trained(teacher, recipe, splits, remote, run_in_process)
    assert sorted(open_root(uri).list()) == ["model.json", "model.safetensors"]
    for name in ("model.json", "model.safetensors"):
        assert open_root(uri).get(name) == open_root(there).get(name), "the model is the same"
    assert list((tmp_path / "cache" / "teachers").iterdir()) == []


def test_a_late_writer_publishes_over_nothing(bucket: str, tmp_path: Path) -> None:
    recipe, uri = a_recipe([a_student("one")]), f"{bucket}/late/model"
    first = Path(a_teacher(recipe, tmp_path / "first", tmp_path / "cache"))
    late = Path(a_teacher(recipe, tmp_path / "late", tmp_path / "cache"))
    weights = bytearray((late / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # as of another machine: not the same to the last bit
    (late / "model.safetensors").write_bytes(weights)
    root = open_root(uri)
    root.put_new("model.safetensors", (first / "model.safetensors").read_bytes())  # then it was killed
    publish_model(late, uri)
    load_model(uri)
    kept = {name: root.get(name) for name in ("model.json", "model.safetensors")}
    assert kept["model.safetensors"] == (first / "model.safetensors").read_bytes()
    publish_model(late, uri)
    assert {name: root.get(name) for name in kept} == kept


def test_another_node_goes_on_from_the_checkpoints(
    trained: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, splits, teacher = trained
    job = teacher.job(recipe, splits, Workspace(f"{bucket}/moving", str(tmp_path / "cache")))
    uri, control = teacher.uri(f"{bucket}/moving"), Path(job.control)

    def stopped(_job: Any) -> dict[str, Any]:
        for name in ("000001-000000-1", "000001-000010-1"):
            (control / f"{name}.ckpt").write_bytes(name.encode())
        return {"stopped": True, "students": []}

    monkeypatch.setattr(published, "train_cohort", stopped)
    assert train_and_publish(job, uri)["stopped"]
    names = ["000001-000000-1.ckpt", "000001-000010-1.ckpt"]
    assert sorted(open_root(uri).list("checkpoints")) == [f"checkpoints/{name}" for name in names]
    other = tmp_path / "other"
    other.mkdir()
    (other / "000001-000005-1.ckpt").touch()
    fetch_checkpoints(other, uri)
    assert sorted(path.name for path in other.iterdir()) == ["000001-000005-1.ckpt", names[1]]
    assert (other / names[1]).read_bytes() == b"000001-000010-1"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_shares_no_folder_stops_when_it_is_told(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("akd_dist.jobs.tasks.GRACE_SECONDS", 600.0)
    bucket_s = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def look_first_there(*given: Any) -> Any:
        """The session's Ray may be older than the bucket, and know nothing of it."""
        os.environ.update(bucket_s)
        return look_first(*given)

    monkeypatch.setattr("akd_dist.jobs.tasks.look_first", look_first_there)
    model, train = {"kind": "mlp", "hidden": 4}, {"epochs": 100_000, "optimizer": {"kind": "sgd", "lr": 1e-3}}
    recipe = a_recipe([a_student("one")], teacher={"model": model, "train": train})
    splits, stop = prepare(recipe.data, tmp_path / "cache"), StopFlag()
    teacher = teacher_of(recipe, splits)
    assert teacher is not None
    place = Workspace(f"{bucket}/stopping", str(tmp_path / "cache"), stop=stop)
    stop.signal = signal.SIGTERM
    monkeypatch.setattr(stop, "check", lambda: None)  # it comes once the task is on its way
    with pytest.raises(TerminatedError, match="the last checkpoint of the teacher is kept"):
        run_in_task(teacher, teacher.job(recipe, splits, place), place)
    kept = open_root(teacher.uri(place.store_root)).list()
    assert kept
    assert all(key.startswith("checkpoints/") for key in kept)
