"""Stores as Ray Data, on a real Ray."""

from pathlib import Path

import numpy as np
import pytest

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.jobs.ray_data import read_logits
from akd_dist.recipe import Recipe
from tests.fleets import a_recipe, a_student, a_teacher, stores_of

pytest.importorskip("ray.data")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    plain = a_recipe([a_student("pupil")])
    given = plain.model_dump(mode="json")
    given["teacher"] = {"weights": a_teacher(plain, home / "teacher", home / "cache")}
    return Recipe.model_validate(given).own()


@pytest.fixture(scope="module")
def stores(recipe: Recipe, home: Path) -> dict[str, str]:
    return stores_of(recipe, str(recipe.teacher.weights), home)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # of Ray Data
def test_a_recipe_is_a_dataset_of_ray(ray_cluster: None, recipe: Recipe, stores: dict[str, str], home: Path) -> None:
    found = akd_dist.ray_dataset(recipe, store_root=home / "stores", cache_root=home / "cache").take_all()
    store = akd_dist.open_store(stores["train"])
    everything = {(view, row) for view in range(store.views) for row in range(len(store))}
    assert {(one["view"], one["row"]) for one in found} == everything
    assert len(found) == len(everything)
    dataset = akd_dist.distillation_dataset(recipe, store_root=home / "stores", cache_root=home / "cache")
    for one in found[::211]:
        dataset.set_epoch(int(one["view"]))
        row = dataset[int(one["row"])]
        assert np.array_equal(one["inputs"], row["inputs"].numpy())
        assert np.array_equal(one["teacher_logits"], row["teacher_logits"].numpy())
        assert one["labels"] == int(row["labels"])


def test_shards_of_a_store_are_read_by_number(recipe: Recipe, stores: dict[str, str], home: Path) -> None:
    store = akd_dist.open_store(stores["train"])
    columns = read_logits(stores["train"], {"id": np.arange(store.layout.shard_count)})
    assert np.array_equal(columns["logits"], store[:].reshape(-1, store.classes))
    assert np.array_equal(columns["row"], np.tile(np.arange(len(store)), store.views))
    assert np.array_equal(columns["view"], np.repeat(np.arange(store.views), len(store)))


def test_logits_that_are_not_there_are_refused(recipe: Recipe, stores: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the test rows are not there"):
        akd_dist.ray_dataset(recipe, split="test", store_root=tmp_path)
