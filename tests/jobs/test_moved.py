"""A run, its stores and its data, moved together: every command says where they are now, and nothing names the past."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from akd_dist import cli
from akd_dist.base import places
from akd_dist.base.files import read_json
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.results import finish_run
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Recipe, load_recipe
from akd_dist.reporting.results import read_fleet
from akd_dist.storage.reader import open_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import uses_of, using
from akd_dist.tracking.status import RunReader, driving
from akd_dist.tracking.view import next_line
from tests.fleets import HARD, a_recipe, a_student, a_teacher, stores_of

# ---- how a place is written down


@pytest.mark.parametrize(
    ("place", "folder", "text"),
    [
        ("/data/stores/id", "/data/runs/one", "../../stores/id"),
        ("/data/runs/one", "/data/runs/one", "."),
        ("/data/runs/one/students/a", "/data/runs/one", "students/a"),
        ("/data/runs", "/data/runs/one", ".."),
        ("/stores/id", "/data/runs/one", "/stores/id"),  # nothing in common: they are not moved together
        ("s3://bucket/stores/id", "/data/runs/one", "s3://bucket/stores/id"),
        ("/data/runs/one", "s3://bucket/stores/id", "/data/runs/one"),
        ("../data", "/data/runs/one", "../data"),
    ],
)
def test_a_place_is_named_relative_to_the_document(place: str, folder: str, text: str) -> None:
    assert places.written(place, folder) == text
    if Path(place).is_absolute() or "://" in place:
        assert places.found(text, folder) == place


def test_a_path_of_a_recipe_comes_back_as_it_was_given() -> None:
    given, run = "/data/recipes/../rows.parquet", "/data/runs/one"
    assert places.written(given, run) == "../../rows.parquet"
    assert places.written(given, run, verbatim=True) == "../../recipes/../rows.parquet"
    assert places.found("../../recipes/../rows.parquet", run) == given


def test_links_are_followed_before_a_place_is_named(tmp_path: Path) -> None:
    for name in ("disk/runs/one", "home", "disk/stores/id"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "home" / "stores").symlink_to(tmp_path / "disk" / "stores")
    text = places.written(tmp_path / "home" / "stores" / "id", tmp_path / "home" / "runs" / "one")
    for run in ("home/runs/one", "disk/runs/one"):
        assert Path(places.found(text, tmp_path / run)) == tmp_path / "disk" / "stores" / "id"


# ---- a run that is moved


class Moved:
    """A run in `<root>/a`, with its data, recipe, teacher and stores, after that folder was renamed to `b`."""

    def __init__(self, root: Path) -> None:
        self.cache, before = root / "cache", root / "a"
        images, labels = load_digits(return_X_y=True)
        table = {"input": list(images[:200].astype("uint8")), "label": labels[:200]}
        (before / "data").mkdir(parents=True)
        pq.write_table(pa.table(table), before / "data" / "rows.parquet")
        data = {"train": {"kind": "parquet", "path": str(before / "data" / "rows.parquet"), "shape": [1, 8, 8]}}
        students = [a_student("annealing"), a_student("hard", objective=HARD)]
        teacher = a_teacher(a_recipe(students, data=data), before / "teacher", self.cache)
        recipe = a_recipe(students, data=data, teacher={"weights": teacher}, folder=str(before))
        (before / "recipe.yaml").write_text(recipe.to_yaml(before))
        self.train(recipe, before, stores_of(recipe, teacher, before))
        shutil.rmtree(before / "cache")
        self.place = root / "b"
        before.rename(self.place)
        self.run, self.stores = self.place / "runs" / "fleet", self.place / "stores"

    def train(self, recipe: Recipe, place: Path, stores: dict[str, str]) -> None:
        """What `train-students` does, without Ray."""
        run, splits = place / "runs" / "fleet", prepare(recipe.data, self.cache)
        opened = {split: open_store(uri) for split, uri in stores.items()}
        begin_run(run, recipe, run_identity(recipe, splits, [opened["train"].manifest.identity.teacher]))
        with driving(run), using(stores.values(), run=str(run), lock=run / "lock"):
            train_in_process(recipe, stores, run=run, cache_root=str(self.cache))
            base = fleet_job(recipe, splits, stores, run, str(self.cache))
            parameters = {spec.name: 1 for spec in recipe.students}
            finish_run(run, recipe, splits, base, [opened], parameters, 1, 1.0)

    @property
    def roots(self) -> list[str]:
        return ["--store-root", str(self.stores), "--run-root", str(self.run.parent), "--cache-root", str(self.cache)]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    return Moved(tmp_path_factory.mktemp("moved"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "error:" not in captured.err, captured.err
        return int(ended.value.code or 0), captured.out

    return run


def test_no_file_names_the_place_of_before(moved: Moved) -> None:
    past = str(moved.place.parent / "a").encode()
    assert [path for path in moved.place.rglob("*") if path.is_file() and past in path.read_bytes()] == []


COMMANDS: dict[str, list[str]] = {
    "train-students": ["train-students", "{place}/recipe.yaml", "{roots}"],
    "report": ["report", "{run}"],
    "status": ["status", "{run}"],
    "evaluate": ["evaluate", "{run}/students/hard", "{run}", "--cache-root", "{cache}"],
    "evaluate a recipe": ["evaluate", "{run}/students/hard", "{run}/recipe.yaml", "--cache-root", "{cache}"],
    "predict": ["predict", "{run}/students/hard", "{run}", "--out", "{place}/made", "--cache-root", "{cache}"],
    "export": ["export", "{run}/students/hard", "--to=torch-export", "--out={place}/made", "--cache-root", "{cache}"],
    "stores list": ["stores", "list", "--store-root", "{place}/stores"],
    "stores show": ["stores", "show", "{id}", "--store-root", "{place}/stores", "--cache-root", "{cache}"],
    "stores gc": ["stores", "gc", "--older-than", "0h", "--dry-run", "--store-root", "{place}/stores"],
    "recipe check": ["recipe", "check", "{run}/recipe.yaml"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_works_and_names_where_it_is_now(
    name: str, moved: Moved, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(moved.place)
    known = {"place": moved.place, "run": moved.run, "cache": moved.cache, "id": read_store(moved).name}
    words = [part for word in COMMANDS[name] for part in (moved.roots if word == "{roots}" else [word.format(**known)])]
    code, document = command(*words, "--json")
    assert code == 0
    assert f"{moved.place.parent}/a/" not in document
    assert str(moved.place) in document or name in ("stores gc", "recipe check")
    (moved.place / "made").unlink(missing_ok=True)
    code, plain = command(*words)
    (moved.place / "made").unlink(missing_ok=True)
    assert code == 0
    assert f"{moved.place.parent}/a/" not in plain


def read_store(moved: Moved) -> Path:
    return Path(read_fleet(moved.run).store)


def test_documents_are_resolved_where_they_lie(moved: Moved) -> None:
    fleet = read_fleet(moved.run)
    assert Path(fleet.run) == moved.run
    assert Path(fleet.store).parent == moved.stores
    assert open_store(fleet.store).manifest.id == Path(fleet.store).name
    assert [one.path for one in fleet.students] == [
        str(moved.run / "students" / name) for name in ("annealing", "hard")
    ]
    use = uses_of(open_root(fleet.store))[0]
    assert (use.run, use.lock) == (str(moved.run), str(moved.run / "lock"))
    driver = RunReader(moved.run).read().driver
    assert driver is not None
    assert Path(driver.folder).is_dir()


def test_the_recipe_of_a_moved_run_is_the_same_recipe(moved: Moved) -> None:
    ours, theirs = load_recipe(moved.run / "recipe.yaml"), load_recipe(moved.place / "recipe.yaml")
    assert ours.identity() == theirs.identity()
    assert ours.data.train == theirs.data.train
    assert ours.folder == str(moved.place)
    assert ours.teacher.weights == str(moved.place / "teacher")


def test_a_moved_store_is_repaired_by_what_lies_beside_it(
    moved: Moved, command: Callable[..., tuple[int, str]]
) -> None:
    store = read_store(moved)
    shard = next(path for path in (store / "arrays.zarr").rglob("c/0/0/0"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    roots = ["--store-root", str(moved.stores), "--cache-root", str(moved.cache)]
    assert command("stores", "repair", store.name, *roots)[0] == 0
    assert shard.read_bytes() == whole


def test_a_live_run_keeps_its_stores_wherever_both_were_moved_to(moved: Moved, tmp_path: Path) -> None:
    """What `gc` sees is the lock of the run, and by a path that leads from the store to it."""
    copy = tmp_path / "c"
    shutil.copytree(moved.place, copy, ignore=shutil.ignore_patterns("tensorboard"))
    (copy / "runs" / "fleet" / "lock").touch()
    store = copy / "stores" / read_store(moved).name
    with open(copy / "runs" / "fleet" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert uses_of(open_root(str(store)))[0].is_going_on(now=1e12)
    assert not uses_of(open_root(str(store)))[0].is_going_on(now=1e12)


def as_before(run: Path, was: Path) -> None:
    """Rewrite results as older versions did: every place absolute, `was` being the folder of runs and stores then."""
    fleet = read_json(run / "fleet.json")
    then = was / "runs" / run.name
    absolute = places.each(fleet, lambda place: places.found(place, then) if not Path(place).is_absolute() else place)
    (run / "fleet.json").write_text(json.dumps(absolute))


def test_moved_results_of_older_versions_are_found(
    moved: Moved, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    copy = tmp_path / "new"
    shutil.copytree(moved.place, copy)
    as_before(copy / "runs" / "fleet", tmp_path / "old")
    assert f'"{tmp_path}/old/stores/' in (copy / "runs" / "fleet" / "fleet.json").read_text()
    fleet = read_fleet(copy / "runs" / "fleet")
    assert Path(fleet.store).parent == copy / "stores"
    assert Path(fleet.students[0].store).parent == copy / "stores"
    assert Path(fleet.run) == copy / "runs" / "fleet"


@pytest.mark.parametrize("older", [False, True])
def test_a_moved_store_is_named_where_it_is_found(
    older: bool, moved: Moved, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    copy = tmp_path / "new"
    shutil.copytree(moved.place, copy)
    (copy / "stores").rename(copy / "kept")
    if older:
        as_before(copy / "runs" / "fleet", tmp_path / "old")
    roots = ["--store-root", copy / "kept", "--run-root", copy / "runs", "--cache-root", moved.cache]
    _, printed = command("train-students", copy / "recipe.yaml", *roots, "--json")
    document = json.loads(printed)
    found = [document["store"], *(one["store"] for one in [*document["students"], *document["economics"]])]
    assert {Path(place).parent for place in found} == {copy / "kept"}
    assert Path(document["run"]) == copy / "runs" / "fleet"


def test_a_stopped_run_that_was_moved_tells_where_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["akd-dist", "train-students", "r.yaml", "--run-root", "a/ru"])
    with driving(tmp_path / "a" / "ru" / "one"):
        pass
    told = next_line(RunReader(tmp_path / "a" / "ru" / "one").read())
    assert told == f"the same command goes on: akd-dist train-students r.yaml --run-root a/ru (in {tmp_path})"
    (tmp_path / "a").rename(tmp_path / "b")
    told = next_line(RunReader(tmp_path / "b" / "ru" / "one").read())
    assert told is not None
    assert f"goes on with --run-root {tmp_path / 'b' / 'ru'}, and" in told


def test_a_command_is_told_with_the_roots_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AKD_DIST_RUN_ROOT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["akd-dist", "train-students", "r.yaml"])
    with driving(tmp_path / "one"):
        pass
    driver = RunReader(tmp_path / "one").read().driver
    assert driver is not None
    assert driver.command == f"akd-dist train-students r.yaml --run-root {tmp_path}"
