"""What caching takes from stores that are there, and what it says: in a plain loop, on digits and on a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import blocks_in_common, first_difference
from akd_dist.distill.teacher import cache_shard
from akd_dist.documents.stores import RepairDocument
from akd_dist.jobs.cache_teacher import cache_in_process, cache_job
from akd_dist.jobs.planning.creations import creation_of
from akd_dist.jobs.planning.models import SplitPlan
from akd_dist.jobs.repair import repair
from akd_dist.jobs.run_folder import begin_run, check_same_run, run_identity
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card, save_model
from akd_dist.recipe import Mlp, Recipe, TeacherSpec
from akd_dist.storage.reader import open_store
from akd_dist.storage.writer import create_store, missing_shards, seal_store
from tests import sources
from tests.fleets import a_recipe, a_student, a_teacher, store_bytes

pytestmark = pytest.mark.usefixtures("own_process_state")

BATCH = {"batch_rows": 200}


class Place:
    """A root of stores, a teacher, and what caching says there."""

    def __init__(self, root: Path, cache_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.cache_root, self.capsys = root, cache_root, capsys
        self.stores = root / "stores"

    def digits(self, views: int, **changes: Any) -> Recipe:
        data = {"train": {"kind": "digits"}, "views": views, "augmentation": {"kind": "pad_crop_flip", "pixels": 1}}
        return a_recipe([a_student("one")], data=data, **changes)

    def table(self, label: np.ndarray, pixels: np.ndarray, **changes: Any) -> Recipe:
        """A recipe on a Parquet file that is written over."""
        columns = {"label": label, "input": pa.array(pixels.tolist(), type=pa.list_(pa.uint8()))}
        pq.write_table(pa.table(columns), self.root / "data.parquet")
        data = {"train": {"kind": "parquet", "path": str(self.root / "data.parquet")}, "test": 0.1}
        return a_recipe([a_student("one")], data=data, **changes)

    def cache(self, recipe: Recipe, *, root: str = "stores") -> tuple[dict[str, Any], str]:
        """What caching returns, and what it says, but that a teacher which was never trained is near chance."""
        if not (self.root / "teacher").exists():
            a_teacher(recipe, self.root / "teacher", self.cache_root)
        places = {"store_root": str(self.root / root), "cache_root": str(self.cache_root)}
        document = cache_in_process(recipe, str(self.root / "teacher"), **places)
        said = self.capsys.readouterr().err.splitlines(keepends=True)
        return document, "".join(line for line in said if "is near chance" not in line)

    def planned(self, recipe: Recipe) -> dict[str, Any]:
        """What a dry run says of each split."""
        recipe = recipe.model_copy(update={"teacher": TeacherSpec(weights=str(self.root / "teacher"))})
        places: dict[str, Any] = {"store_root": str(self.stores), "cache_root": str(self.cache_root)}
        plan = akd_dist.cache_teacher(recipe, **places, dry_run=True, console=Console(quiet=True))
        return dict(plan["splits"])


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path, cache_root: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, cache_root, capsys)


# ---- more views


def test_more_views_compute_the_new_ones_alone(place: Place) -> None:
    narrow, said = place.cache(place.digits(2))
    assert said == ""
    before = store_bytes(place.stores)
    per_view = narrow["shards"] // 2
    assert place.planned(place.digits(3))["train"]["shards"] == per_view
    wide, said = place.cache(place.digits(3))
    assert (wide["shards"], wide["shards_computed"], wide["hit"]) == (3 * per_view, per_view, False)
    assert said == f"taken from store {narrow['id'][:12]}: views 0 to 1; to be computed: view 2\n"
    assert [part["hit"] for part in wide["splits"].values()] == [True, True]
    after = store_bytes(place.stores)
    assert {name: after[name] for name in before} == before
    whole, said = place.cache(place.digits(3), root="whole")
    assert (whole["shards_computed"], said) == (3 * per_view, "")
    assert store_bytes(place.root / "whole").items() <= after.items()
    for views in (1, 2, 3):
        hit, said = place.cache(place.digits(views))
        assert (hit["hit"], hit["views"], said) == (True, max(views, 2), "")


def test_views_computed_in_another_way_are_computed_anew(place: Place) -> None:
    narrow, _ = place.cache(place.digits(1))
    wide, said = place.cache(place.digits(2, cache=BATCH))
    assert wide["shards_computed"] == wide["shards"]
    assert said == (
        f"store {narrow['id'][:12]} has view 0, computed in another way (batch_rows: 200 != 256): "
        "all views are computed anew\n"
    )


def test_views_drawn_by_other_code_are_not_extended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store of old and new views would be sealed under an id that says they are alike."""
    code = "class Move:\n    words = 1\n    def draw(self, words, input_shape): return {}\n"
    code += "    def apply(self, batch, params): return batch + STEP\nSTEP, make = 1, Move\n"
    module = sources.module(place.root, code)
    data = {"train": {"kind": "digits"}, "augmentation": {"kind": "custom", "factory": f"{module}:make"}}
    place.cache(a_recipe([a_student("one")], data=data, folder=str(place.root)))
    before = store_bytes(place.stores)
    monkeypatch.setattr(f"{module}.STEP", 2)
    with pytest.raises(RefusedError, match="view 0 of row 0 does not show what the teacher saw"):
        place.cache(a_recipe([a_student("one")], data=data | {"views": 2}, folder=str(place.root)))
    assert store_bytes(place.stores) == before


def test_another_file_of_ones_own_augmentation_is_another_store(place: Place) -> None:
    code = "class Same:\n    words = 0\n    def draw(self, words, input_shape): return {}\n"
    code += "    def apply(self, batch, params): return batch\n"
    module = sources.module(place.root, code)
    data = {"train": {"kind": "digits"}, "augmentation": {"kind": "custom", "factory": f"{module}:Same"}}
    recipe = a_recipe([a_student("one")], data=data, folder=str(place.root))
    first, _ = place.cache(recipe)
    assert place.cache(recipe)[0]["hit"]
    with open(place.root / f"{module}.py", "a") as file:
        file.write("# another version\n")
    second, _ = place.cache(recipe)
    assert not second["hit"]
    assert second["id"] != first["id"]
    assert second["splits"]["test"]["id"] == first["splits"]["test"]["id"]  # test rows are not augmented


def test_a_damaged_shard_is_told_of_and_computed_anew(place: Place) -> None:
    narrow, _ = place.cache(place.digits(2))
    shard = Path(narrow["store"]) / "arrays.zarr" / "logits" / "c" / "1" / "3" / "0"
    sealed = shard.read_bytes()
    shard.write_bytes(b"!" + sealed[1:])
    wide, said = place.cache(place.digits(3))
    assert wide["shards_computed"] == narrow["shards"] // 2 + 1
    assert f"view 1, shard 3 (rows 768 to 1024) of store {narrow['id'][:12]} is damaged" in said
    assert f"akd-dist stores repair {narrow['id'][:12]} --store-root {place.stores}" in said
    assert (Path(wide["store"]) / shard.relative_to(narrow["store"])).read_bytes() == sealed
    assert open_store(wide["store"]).verify() == []


# ---- other rows


N = 6_000


def rows_of_a_table() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(N) % 2, np.random.default_rng(0).integers(0, 256, (N, 4), dtype=np.uint8)


def a_teacher_of_tables(recipe: Recipe, place: Place) -> None:
    card = ModelCard.of(Mlp(hidden=4), prepare(recipe.data, place.cache_root).train, None)
    save_model(place.root / "teacher", build(card, seed=1), card)


def test_rows_that_changed_are_told_of_with_the_first_block(place: Place) -> None:
    label, pixels = rows_of_a_table()
    recipe = place.table(label, pixels)
    a_teacher_of_tables(recipe, place)
    old, said = place.cache(recipe)
    assert said == ""
    label[N - 1 - np.argmax(label[::-1] == 0)] = 1  # the last 0
    document, said = place.cache(place.table(label, pixels))
    (changed,) = [split for split, part in splits_of(document).items() if not part["hit"]]
    block = f"rows {4_096 if changed == 'train' else 0:,} to {splits_of(old)[changed]['rows']:,}"
    assert said == (
        f"the {changed} rows are not those of store {splits_of(old)[changed]['id'][:12]}, "
        f"which differs in nothing else: {block} are the first that differ\n"
    )
    pixels[:, 0] ^= 1
    _, said = place.cache(place.table(label, pixels))
    assert [line.split()[1] for line in said.splitlines()] == ["train", "validation", "test"]


def test_datasets_of_the_same_rows_differ_in_what_they_mean() -> None:
    ours, theirs = ({"blocks": ["a", "b"], "meaning": {"classes": classes}} for classes in (3, 2))
    assert first_difference(ours, theirs) == "the rows are the same, but not what they mean: classes: 2 -> 3"
    assert blocks_in_common(ours, theirs) == 2
    assert first_difference({"blocks": ["a"]}, theirs) == "rows 4,096 to 8,192 are the first that differ"


def test_of_a_few_rows_no_more_are_named_than_there_are() -> None:
    few, fewer = ({"blocks": [name], "rows": rows} for name, rows in (("a", 1_350), ("b", 1_168)))
    assert first_difference(few, few | {"blocks": ["c"]}) == "rows 0 to 1,350 are the first that differ"
    told = "rows 0 to 1,350 are the first that differ, of 1,168 rows now and 1,350 before"
    assert first_difference(fewer, few) == told


def splits_of(document: dict[str, Any]) -> dict[str, Any]:
    return {"train": document, **document["splits"]}


def test_a_run_on_other_rows_is_refused_with_the_first_block(place: Place) -> None:
    label, pixels = rows_of_a_table()
    recipe, run = place.table(label, pixels), place.root / "run"
    begin_run(run, recipe, run_identity(recipe, prepare(recipe.data, place.cache_root)))
    check_same_run(run, recipe, run_identity(recipe, prepare(recipe.data, place.cache_root)))
    pixels[:, 0] ^= 1
    changed = run_identity(place.table(label, pixels), prepare(recipe.data, place.cache_root))
    with pytest.raises(RefusedError) as refused:
        check_same_run(run, recipe, changed)
    got = str(refused.value.got)
    for split in ("train", "validation", "test"):
        last = min(4_096, changed["rows"][split]["rows"])
        assert f"the {split} rows: rows 0 to {last:,} are the first that differ" in got
        assert f"dataset.{split}: " in got
    assert "blocks" not in got
    saved = json.loads((run / "identity.json").read_bytes())
    del saved["rows"]  # as earlier versions wrote it
    (run / "identity.json").write_text(json.dumps(saved))
    check_same_run(run, recipe, changed | {"dataset": saved["dataset"]})
    with pytest.raises(RefusedError, match=r"dataset\.train: "):
        check_same_run(run, recipe, changed)


# ---- before anything starts


def test_an_augmentation_that_does_not_fit_is_refused_first(place: Place) -> None:
    recipe = place.digits(2)
    augmentation = recipe.data.augmentation.model_copy(update={"pixels": 8})
    data = recipe.data.model_copy(update={"augmentation": augmentation})
    with pytest.raises(RefusedError, match="out of sight"):
        akd_dist.cache_teacher(
            recipe.model_copy(update={"data": data}),
            store_root=str(place.stores),
            cache_root=str(place.cache_root),
            console=Console(quiet=True),
        )
    assert not place.stores.exists()


# ---- stores of an older format


def test_a_store_of_format_1_is_repaired_as_such(place: Place) -> None:
    recipe = place.digits(1)
    uri = a_teacher(recipe, place.root / "teacher", place.cache_root)
    recipe = recipe.model_copy(update={"teacher": TeacherSpec(weights=uri)})
    rows = prepare(recipe.data, place.cache_root).train
    creation = creation_of(recipe, rows, "train", load_card(uri), "cpu", 1)
    hint = {"recipe": json.loads(recipe.model_dump_json()), "split": "train"}
    plan = SplitPlan("train", rows, creation, writer=create_store(str(place.stores), creation, hint))
    assert plan.writer is not None
    for shard in missing_shards(plan.writer):
        cache_shard(cache_job(plan, recipe, uri, str(place.cache_root)), shard)
    sealed = seal_store(plan.writer)
    assert {probe.sample for record in sealed.records() for probe in record.probes} == {None}
    shard_file = Path(plan.writer.uri) / "arrays.zarr" / list(sealed.records())[2].key
    data = shard_file.read_bytes()
    shard_file.write_bytes(data[:-1] + b"!")
    mended = repair(str(place.stores), sealed.id, None, str(place.cache_root), Console(quiet=True))
    assert RepairDocument.model_validate(mended).repaired == [list(sealed.records())[2].key]
    assert shard_file.read_bytes() == data
    # Nothing but the recipe is missed where nobody knows any more how the store was asked for.
    hint_file = Path(plan.writer.uri) / "source.json"
    for left in (None, b"{", b'{"split": "train", "recipe": {}}'):
        shard_file.write_bytes(data[:-1] + b"!")
        hint_file.unlink(missing_ok=True)
        if left is not None:
            hint_file.write_bytes(left)
        with pytest.raises(RefusedError, match=r"(?s)nobody knows which recipe.*add --recipe"):
            repair(str(place.stores), sealed.id, None, str(place.cache_root), Console(quiet=True))
        assert repair(str(place.stores), sealed.id, recipe, str(place.cache_root), Console(quiet=True)) == mended
        assert shard_file.read_bytes() == data
    document, _ = place.cache(recipe)
    assert not document["hit"]
    assert document["id"] != sealed.id
