"""From pictures as they lie on a disk to trained students and what they say of each file, in a plain loop."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

import akd_dist
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import load_recipe
from akd_dist.storage.reader import open_store
from tests.fleets import DEVICE, a_teacher, stores_of
from tests.pictures import of_classes, samples, tar

RECIPE = """
name: pictures
data:
  train: {kind: image_folder, path: pictures/train}
  validation: {kind: image_folder, path: pictures, labels: validation.csv, unlisted: leave_out}
  test: {kind: webdataset, path: "shards/test-{0..1}.tar", label: name}
  views: 2
  augmentation: {kind: shift}
teacher: {weights: teacher}
students:
  - name: small
    model: {kind: mlp, hidden: 16}
    objective: {kind: hard_labels, epochs: 4}
    optimizer: {kind: adamw, lr: 0.01}
    batch: 32
"""


def test_from_pictures_to_predictions(tmp_path: Path) -> None:
    of_classes(tmp_path / "pictures" / "train", 120)
    of_classes(tmp_path / "pictures" / "more", 30)
    lines = [f"more/{name}/{number:03}.jpg,{name}" for name, number in (("eel", 2), ("dog", 4), ("cat", 6), ("cat", 9))]
    (tmp_path / "validation.csv").write_text("\n".join(["file_name,label", *lines]))
    for number in range(2):
        tar(tmp_path / "shards" / f"test-{number}.tar", samples(range(200 + number * 15, 215 + number * 15)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml").model_copy(update={"device": DEVICE})
    teacher = a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache")
    stores, run = stores_of(recipe, teacher, tmp_path), tmp_path / "runs" / "pictures"
    rows = {name: open_store(uri).manifest.identity.rows for name, uri in stores.items()}
    assert rows == {"train": 120, "validation": 4, "test": 30}
    places = {"store_root": str(tmp_path / "stores"), "cache_root": str(tmp_path / "other-cache")}
    again = cache_in_process(recipe, teacher, **places)
    assert (again["store"], again["hit"]) == (stores["train"], True)
    results = train_in_process(recipe, stores, run=run, cache_root=str(tmp_path / "cache"))
    assert results["small"]["test"]["accuracy"] > 0.9  # each class has a colour
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    student = run / "students" / "small"
    measured = akd_dist.evaluate(student, f"{tmp_path}/shards", label="name")["student"]["metrics"]
    assert measured["accuracy"] == results["small"]["test"]["accuracy"]
    akd_dist.predict(student, tmp_path / "shards", tmp_path / "said.parquet")
    said = pq.read_table(tmp_path / "said.parquet")
    assert said["file"].to_pylist()[14:16] == ["test-0.tar/0214.jpg", "test-1.tar/0215.jpg"]
