"""What of a recipe's folder travels to nodes, and what has to be there already."""

from __future__ import annotations

import io
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.jobs import working_dir
from akd_dist.jobs.shared import Needed
from akd_dist.jobs.working_dir import Packed, WorkingDir, moved
from akd_dist.recipe import DataSpec, Recipe
from tests.fleets import HARD, a_recipe, a_student
from tests.pictures import of_classes, samples, tar

NET = {"kind": "custom", "factory": "nets:net", "arguments": {"words": "./words.txt", "width": 4}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "recipe"
    files = ["nets.py", "words.txt", "pack/__init__.py", "pack/inner/deep.py", "notes.md", ".secret", "stores/x/zarr"]
    for name in [*files, "__pycache__/nets.pyc", "venv/pyvenv.cfg", "venv/lib.py"]:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    return made


def recipe_in(folder: Path, **data: Any) -> Recipe:
    rows = {"train": {"kind": "digits"}} | data
    return a_recipe([a_student("one", model=NET, objective=HARD)], folder=str(folder), data=rows)


def test_the_folder_travels_without_what_is_not_the_recipe_s(folder: Path) -> None:
    made = WorkingDir.of(recipe_in(folder), [str(folder / "stores")])
    assert made.files == ["nets.py", "notes.md", "pack/__init__.py", "pack/inner/deep.py", "words.txt"]
    assert made.needed == []
    assert made.note is None


def test_of_a_large_folder_modules_and_what_is_named_travel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rows").mkdir()
    for name in ("a.parquet", "b.parquet"):
        (folder / "rows" / name).write_bytes(bytes(600))
    (folder / "weights.bin").write_bytes(bytes(5000))
    monkeypatch.setattr(working_dir, "LIMIT", 1000)
    data = {"kind": "parquet", "path": str(folder / "rows" / "*.parquet"), "input": "x", "label": "y"}
    made = WorkingDir.of(recipe_in(folder, train=data), [])
    assert made.files == ["nets.py", "pack/__init__.py", "pack/inner/deep.py", "words.txt"]
    assert made.needed == [str(folder / "rows" / "*.parquet")]
    assert made.note is not None
    assert "larger than 1.0 kB" in made.note
    assert "but not rows/*.parquet" in made.note


def test_tar_files_of_a_brace_expression_travel(folder: Path) -> None:
    for number in range(3):
        tar(folder / "shards" / f"train-{number}.tar", samples(range(2)))
    data = {"kind": "webdataset", "path": str(folder / "shards" / "train-{0..1}.tar")}
    made = WorkingDir.of(recipe_in(folder, train=data), [])
    assert {"shards/train-0.tar", "shards/train-1.tar"} <= set(made.files)
    assert made.needed == []
    assert working_dir.there(data["path"])
    (folder / "shards" / "train-1.tar").rename(folder / "shards" / "elsewhere.tar")
    data["path"] = data["path"].replace("0..1", "5..9")
    assert WorkingDir.of(recipe_in(folder, train=data), []).needed == [data["path"]]


def test_a_folder_of_pictures_with_linked_folders_is_needed_as_it_is(folder: Path) -> None:
    of_classes(folder / "pictures", 6)
    data = {"kind": "image_folder", "path": str(folder / "pictures")}
    whole = WorkingDir.of(recipe_in(folder, train=data), [])
    assert "pictures/dog/001.jpg" in whole.files
    assert whole.needed == []
    (folder / "pictures" / "dog").rename(folder / "pictures" / ".dogs")
    (folder / "pictures" / "dog").symlink_to(".dogs")
    made = WorkingDir.of(recipe_in(folder, train=data), [])
    assert made.needed == [data["path"]]
    assert not [name for name in made.files if name.startswith("pictures")]


ODD = ("pipe.py", "lost.py", "long.py", "mem.py", "odd\udcff.py", "folder.py", ".#own.py")


@pytest.fixture
def odd(folder: Path) -> Path:
    """The folder with what cannot travel, or must not."""
    os.mkfifo(folder / "pipe.py")
    (folder / "lost.py").symlink_to("nowhere")
    (folder / "long.py").symlink_to("x" * 300)
    (folder / "mem.py").symlink_to("/proc/self/mem")  # it can be opened, and not be read
    (folder / "odd\udcff.py").touch()
    (folder / "folder.py").mkdir()
    (folder / ".#own.py").symlink_to("me@host.123:456")
    (folder / ".lock" / "__init__.py").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("limit", [working_dir.LIMIT, 1000])
def test_what_cannot_travel_stays(odd: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dir, "LIMIT", limit)
    (odd / "weights.bin").write_bytes(bytes(5000))
    made = WorkingDir.of(recipe_in(odd), [str(odd / "stores")])
    assert [name for name in made.files if name.endswith(".py")] == [
        "nets.py",
        "pack/__init__.py",
        "pack/inner/deep.py",
    ]
    assert not {name for name in made.files if Path(name).name in ODD}
    with zipfile.ZipFile(io.BytesIO(working_dir._archive(odd, made.files))) as archive:
        assert archive.namelist() == made.files


@pytest.mark.parametrize("limit", [working_dir.LIMIT, 1000])
@pytest.mark.parametrize(
    ("named", "got"),
    [("pipe.py", "no regular file"), ("mem.py", "Input/output error"), ("inner", "a name that is not UTF-8")],
)
def test_what_the_recipe_names_and_cannot_travel_is_refused(
    odd: Path, named: str, got: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_dir, "LIMIT", limit)
    (odd / "weights.bin").write_bytes(bytes(5000))
    (odd / "inner").mkdir()
    (odd / "inner" / "word\udcff").touch()
    recipe = a_recipe([a_student("one", model=NET | {"arguments": {"words": f"./{named}"}})], folder=str(odd))
    with pytest.raises(RefusedError, match=rf"{named}.*, which the recipe names, cannot be sent") as refused:
        WorkingDir.of(recipe, [str(odd / "stores")])
    assert refused.value.got == got


def test_a_file_that_cannot_be_read_when_it_is_packed_is_named(odd: Path) -> None:
    """The system's error has no name where it is the reading that fails."""
    with pytest.raises(RefusedError, match=re.escape(str(odd / "mem.py"))):
        working_dir._archive(odd, ["mem.py"])


def test_nothing_travels_of_a_recipe_that_has_nothing_of_its_own(folder: Path, tmp_path: Path) -> None:
    data = {"kind": "parquet", "path": str(tmp_path / "elsewhere"), "input": "x", "label": "y"}
    made = WorkingDir.of(a_recipe([a_student("one")], folder=str(folder), data={"train": data}), [])
    assert made.files == ()
    assert made.needed == [str(tmp_path / "elsewhere")]
    missing = Needed(made.places, str(tmp_path / "cache")).missing()
    assert missing == [f"the recipe's elsewhere: no {tmp_path / 'elsewhere'}"]


@dataclass(frozen=True)
class Job:
    data: DataSpec
    students: tuple[Any, ...]
    root: str
    weights: str


def test_work_finds_the_folder_where_its_node_has_it(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "rows").mkdir(parents=True)
    for name in ("nets.py", "words.txt", "rows/a.parquet"):
        (place / name).touch()
    data = {"kind": "parquet", "path": str(folder / "rows" / "*.parquet"), "input": "x", "label": "y"}
    recipe = recipe_in(folder, train=data)
    job = Job(recipe.data, tuple(recipe.students), str(folder / "runs" / "one"), str(folder / "rows"))
    got = moved(job, Packed(str(folder), "0" * 64, None, "home", ()), place)
    train: Any = got.data.train
    assert train.path == str(place / "rows" / "*.parquet")
    assert got.students[0].model.trusted.folder == str(place)
    assert got.students[0].model.trusted.factories == recipe.trusted.factories
    assert got.students[0].model.arguments == NET["arguments"]
    assert (got.root, got.weights) == (job.root, str(place / "rows")), "what has not travelled stays"
    assert job.students[0].model.trusted.folder == str(folder), "it is a copy"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_node_unpacks_it_once(folder: Path, tmp_path: Path) -> None:
    made = WorkingDir.of(recipe_in(folder), [str(folder / "stores")])
    packed = made.packed()
    assert packed is not None
    assert packed.unpacked(str(tmp_path / "cache")) is None, "the driver's node has the folder itself"
    other = Packed(packed.folder, packed.digest, packed.archive, "another node", ("stores",))
    place = other.unpacked(str(tmp_path / "cache"))
    assert place is not None
    assert sorted(str(file.relative_to(place)) for file in place.rglob("*.py")) == [
        "nets.py",
        "pack/__init__.py",
        "pack/inner/deep.py",
    ]
    assert (place / "stores").resolve() == folder / "stores", "what does not travel is where the driver has it"
    (place / "nets.py").unlink()
    assert other.unpacked(str(tmp_path / "cache")) == place
    assert not (place / "nets.py").exists(), "it was not unpacked again"
    assert WorkingDir.of(recipe_in(folder), [str(folder / "stores")]).packed() != packed
    assert [one.name for one in place.parent.iterdir()] == [place.name]
