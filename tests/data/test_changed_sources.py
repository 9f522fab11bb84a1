"""A source that changed is noticed, the user's own too; paths among their arguments."""

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import stamp_of
from akd_dist.data import origins
from akd_dist.data.arguments import placed
from akd_dist.data.prepare import open_sources
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import CustomData, DataSpec, Parquet, Recipe
from tests import sources
from tests.fleets import HARD, a_recipe, a_student, own

# ---- sources


def table(path: Path, shade: int) -> DataSpec:
    """Images of one shade; files of the same size for every shade."""
    rows = pa.table({"input": pa.array([[shade] * 4] * 40, pa.list_(pa.uint8())), "label": [0, 1] * 20})
    pq.write_table(rows, path, compression="none", use_dictionary=False, write_statistics=False)
    return DataSpec(train=Parquet(path=str(path)))


def put_over(path: Path, other: Path, how: str) -> None:
    """Put another file in place of one, with the same time."""
    stat = path.stat()
    if how == "in place":
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


@pytest.mark.parametrize("how", ["in place", "as a copy"])
def test_a_changed_source_is_prepared_anew(how: str, tmp_path: Path) -> None:
    data = table(tmp_path / "x.parquet", 1)
    table(tmp_path / "y.parquet", 2)
    first = prepare(data, tmp_path / "cache").train
    put_over(tmp_path / "x.parquet", tmp_path / "y.parquet", how)
    again = prepare(data, tmp_path / "cache").train
    assert (first.inputs.max(), again.inputs.max()) == (1, 2)
    assert first.fingerprint != again.fingerprint


def test_a_source_that_was_restored_is_read_and_believed(tmp_path: Path) -> None:
    data = table(tmp_path / "x.parquet", 1)
    rows = prepare(data, tmp_path / "cache").train
    shutil.copy2(tmp_path / "x.parquet", tmp_path / "copy")
    (tmp_path / "copy").replace(tmp_path / "x.parquet")
    assert prepare(data, tmp_path / "cache").train.inodes == rows.inodes


def test_a_time_that_is_no_older_than_a_tick_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within a tick of the clock look like one, inode and all."""
    path = tmp_path / "x.parquet"
    data = table(path, 1)
    stamp = stamp_of(path)
    monkeypatch.setattr(origins, "stamp_of", lambda _: stamp)
    prepare(data, tmp_path / "cache")
    table(tmp_path / "y.parquet", 2)
    put_over(path, tmp_path / "y.parquet", "in place")
    assert prepare(data, tmp_path / "cache").train.inputs.max() == 2


@pytest.fixture
def rotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSpec:
    """A source that changed after it was prepared, and nothing shows it."""
    path = tmp_path / "x.parquet"
    data = table(path, 1)
    table(tmp_path / "y.parquet", 2)
    long_ago = stamp_of(path)
    assert long_ago is not None
    long_ago[1:3] = [10**18, 10**18]
    monkeypatch.setattr(origins, "stamp_of", lambda _: long_ago)
    prepare(data, tmp_path / "cache")
    put_over(path, tmp_path / "y.parquet", "in place")
    return data


def test_a_source_that_rotted_is_found_before_results_are_told(rotten: DataSpec, tmp_path: Path) -> None:
    believed = prepare(rotten, tmp_path / "cache")
    assert believed.train.inputs.max() == 1
    with pytest.raises(RefusedError, match=r"x\.parquet has changed"):
        believed.sources.finish()
    assert prepare(rotten, tmp_path / "cache").train.inputs.max() == 2


def test_a_run_ends_if_a_source_rotted(rotten: DataSpec, tmp_path: Path) -> None:
    document = a_recipe([a_student("hard", batch=8, objective=HARD | {"epochs": 1})]).model_dump(mode="json")
    recipe = Recipe.model_validate(document | {"data": rotten.model_dump(mode="json")})
    with pytest.raises(RefusedError, match=r"x\.parquet has changed"):
        train_in_process(recipe, {}, run=tmp_path / "run", cache_root=str(tmp_path / "cache"))


def test_a_source_that_is_written_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from akd_dist.data import row_cache

    data = table(tmp_path / "x.parquet", 1)
    table(tmp_path / "y.parquet", 2)

    def written_after(*given: Any) -> Any:
        readings = open_sources(*given)
        if (tmp_path / "y.parquet").exists():
            put_over(tmp_path / "x.parquet", tmp_path / "y.parquet", "as a copy")
        return readings

    monkeypatch.setattr(row_cache, "open_sources", written_after)
    with pytest.raises(RefusedError, match="was written while it was read"):
        prepare(data, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/rows/*/index.json"))
    assert prepare(data, tmp_path / "cache").train.inputs.max() == 2


def test_rows_prepared_without_noted_sources_are_made_anew(tmp_path: Path) -> None:
    data = table(tmp_path / "x.parquet", 1)
    rows = prepare(data, tmp_path / "cache").train
    index = rows.folder / "index.json"
    old = json.loads(index.read_bytes())
    del old["origins"], old["sha256"]
    index.write_text(json.dumps(old, indent=1))
    again = prepare(data, tmp_path / "cache").train
    assert (again.fingerprint, again.folder) == (rows.fingerprint, rows.folder)
    assert "origins" in json.loads(index.read_bytes())


# ---- sources of the user's own

READER = """
import json, pathlib, random
import numpy as np

class Items:
    asked = []

    def __init__(self, folder):
        Items.asked.append(folder)
        self.files = sorted(pathlib.Path(folder).iterdir())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        return np.frombuffer(self.files[row].read_bytes(), np.uint8), row % 2

class Random(Items):
    def __getitem__(self, row):
        return np.array([random.randrange(256) for _ in range(4)], np.uint8), row % 2

def named(folder):
    return Items(folder)

def hidden():
    return Items(pathlib.Path(__file__).with_name("pictures"))

def drawn():
    return Random(pathlib.Path(__file__).with_name("pictures"))
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of four bytes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03}").write_bytes(bytes([number] * 4))
    return folder


def custom(tmp_path: Path, factory: str, **arguments: Any) -> tuple[DataSpec, Any]:
    name = sources.module(tmp_path, READER)
    spec = own(CustomData(factory=f"{name}:{factory}", arguments=arguments), tmp_path)
    return DataSpec(train=spec), importlib.import_module(name)


@pytest.mark.parametrize("what", ["replaced", "added", "removed", "renamed"])
def test_what_changes_in_a_folder_that_arguments_name_is_noticed(what: str, pictures: Path, tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "named", folder=str(pictures))
    before = prepare(data, tmp_path / "cache")
    assert prepare(data, tmp_path / "cache").train.folder == before.train.folder
    picture = pictures / "007"  # in no sample
    match what:
        case "replaced":
            put_over(picture, pictures / "008", "in place")
        case "added":
            (pictures / "040").write_bytes(b"more")
        case "removed":
            picture.unlink()
        case "renamed":
            picture.rename(pictures / "999")
    assert prepare(data, tmp_path / "cache").fingerprints != before.fingerprints


def test_a_folder_that_arguments_name_may_hold_a_name_that_is_not_utf_8(pictures: Path, tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "named", folder=str(pictures))
    before = prepare(data, tmp_path / "cache")
    (pictures / "odd\udcff").write_bytes(b"more")
    assert prepare(data, tmp_path / "cache").fingerprints != before.fingerprints


@pytest.mark.parametrize("what", ["replaced", "added"])
def test_what_a_source_shows_of_itself_is_noticed(what: str, pictures: Path, tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "hidden")
    before = prepare(data, tmp_path / "cache")
    assert prepare(data, tmp_path / "cache").train.inodes == before.train.inodes
    (pictures / ("000" if what == "replaced" else "040")).write_bytes(b"more")
    assert prepare(data, tmp_path / "cache").fingerprints != before.fingerprints


def test_a_table_of_the_users_own_shows_itself_too(tmp_path: Path) -> None:
    code = "import pathlib, pyarrow.parquet\n"
    code += "def table():\n    return pyarrow.parquet.read_table(pathlib.Path(__file__).with_name('x.parquet'))\n"
    table(tmp_path / "x.parquet", 1)
    data = DataSpec(train=own(CustomData(factory=f"{sources.module(tmp_path, code)}:table"), tmp_path))
    assert prepare(data, tmp_path / "cache").train.inputs.max() == 1
    table(tmp_path / "x.parquet", 2)
    assert prepare(data, tmp_path / "cache").train.inputs.max() == 2


@pytest.mark.usefixtures("pictures")
def test_items_drawn_at_random_do_not_count_as_changed(tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "drawn")
    before = prepare(data, tmp_path / "cache").train
    assert prepare(data, tmp_path / "cache").train.inodes == before.inodes


def test_workers_and_what_takes_long_are_not_asked_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, module = custom(tmp_path, "named", folder=str(pictures))
    splits = prepare(data, tmp_path / "cache")
    asked = len(module.Items.asked)
    prepare(data, tmp_path / "cache", expected=splits.fingerprints)
    assert len(module.Items.asked) == asked
    monkeypatch.setattr(origins, "_CHEAP_SECONDS", 0.0)
    for _ in range(3):
        prepare(data, tmp_path / "cache")
    assert len(module.Items.asked) == asked + 1  # once, to see how long it takes


def test_all_is_prepared_afresh_where_that_is_asked_for(pictures: Path, tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "hidden")
    before = prepare(data, tmp_path / "cache")
    (pictures / "007").write_bytes(b"more")  # in no sample
    assert prepare(data, tmp_path / "cache").fingerprints == before.fingerprints
    assert prepare(data, tmp_path / "cache", again=True).fingerprints != before.fingerprints


def test_rows_unlike_the_drivers_are_prepared_once_more(pictures: Path, tmp_path: Path) -> None:
    data, _ = custom(tmp_path, "hidden")
    prepare(data, tmp_path / "node")
    (pictures / "007").write_bytes(b"more")
    known = prepare(data, tmp_path / "driver").fingerprints
    assert prepare(data, tmp_path / "node", expected=known).fingerprints == known


# ---- paths among arguments


def test_a_path_among_arguments_follows_the_recipes_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is given; and the recipe says the same after it was moved."""
    data, module = custom(tmp_path, "named", folder="./pictures")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pictures").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    before = prepare(data, tmp_path / "cache")
    assert module.Items.asked[-1] == str(pictures)
    assert data.model_dump()["train"]["arguments"] == {"folder": "./pictures"}
    put_over(pictures / "007", pictures / "008", "in place")
    assert prepare(data, tmp_path / "cache").fingerprints != before.fingerprints


def test_a_path_that_follows_the_working_folder_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = custom(tmp_path, "named", folder="pictures")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pictures").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(RefusedError, match="names something in the working directory") as refused:
        prepare(data, tmp_path / "cache")
    assert "./pictures" in str(refused.value.next)
    monkeypatch.chdir(pictures.parent)  # here it is what lies beside the recipe
    assert len(prepare(data, tmp_path / "cache").test) == 8


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"a": ["./x", {"b": "../y"}], "c": 1}, {"a": ["/here/folder/x", {"b": "/here/y"}], "c": 1}),
        ({"a": "."}, {"a": "/here/folder"}),
        *(
            ({"a": text},) * 2
            for text in ("train", "s3://./x", "/x", "", ".hidden", "~/x", "a\nb", "\ud800", "x" * 9999)
        ),
    ],
)
def test_only_what_says_so_is_taken_for_a_path(given: dict[str, Any], got: dict[str, Any]) -> None:
    assert placed(given, "/here/folder") == got


def test_a_path_without_a_recipes_folder_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"the argument a\.0 is a path relative to a recipe's folder"):
        placed({"a": ["./x"]}, None)


def test_models_and_augmentations_get_paths_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\ngot = []\n\nclass Still:\n    words = 0\n    def draw(self, words, shape): return {}\n"
    code += "    def apply(self, batch, params): return batch\n\n"
    code += "def still(table):\n    got.append(table)\n    return Still()\n\n"
    code += "def linear(input_shape, classes, table):\n    got.append(table)\n"
    code += "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))\n"
    name = sources.module(tmp_path, code)
    augmentation = {"kind": "custom", "factory": f"{name}:still", "arguments": {"table": "./table.csv"}}
    model = {"kind": "custom", "factory": f"{name}:linear", "arguments": {"table": "../table.csv"}}
    document = a_recipe([a_student("hard", model=model, objective=HARD | {"epochs": 1})]).model_dump(mode="json")
    document["data"]["augmentation"], document["folder"] = augmentation, str(tmp_path)
    recipe = Recipe.model_validate(document).own()
    monkeypatch.chdir("/")
    results = train_in_process(recipe, {}, run=tmp_path / "run", cache_root=str(tmp_path / "cache"))
    assert results["hard"]["state"] == "done"
    assert set(importlib.import_module(name).got) == {f"{tmp_path}/table.csv", f"{tmp_path.parent}/table.csv"}
    card = json.loads((tmp_path / "run" / "students" / "hard" / "model.json").read_bytes())
    assert card["model"]["arguments"] == {"table": "../table.csv"}
