"""Nobody is trained, cached or measured on bytes that are not what was prepared, whatever sizes and times say."""

import contextlib
import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import CorruptCacheError, RefusedError
from akd_dist.base.files import stamp_of
from akd_dist.data import origins
from akd_dist.data.arguments import placed
from akd_dist.data.prepare import open_sources
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.distill import cohort, lockstep, teacher
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.student import Student
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import CustomData, DataSpec, Parquet, Recipe
from akd_dist.serve import evaluation
from akd_dist.serve.examples import DataRequest
from akd_dist.storage import content
from akd_dist.storage.decoded import hold_view
from akd_dist.storage.reader import open_store
from tests import sources
from tests.fleets import HARD, a_recipe, a_student, a_teacher, own, store_bytes, stores_of, weights

STUDENTS = [a_student("annealing", batch=128), a_student("hard", batch=128, objective=HARD | {"epochs": 2})]
PREPARED = [f"{split}-{part}" for split in SPLITS for part in ("inputs", "labels")]
END = 128
"""Where the values of an array begin in its file."""


class Home:
    """A recipe, its stores and what its students come to undisturbed; each test has a copy of the cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        teacher = a_teacher(a_recipe(STUDENTS), root / "teacher", root / "cache")
        self.recipe = a_recipe(STUDENTS, teacher={"weights": teacher})
        self.teacher, self.stores = teacher, stores_of(self.recipe, teacher, root)
        self.expected = self.train(root / "cache", root / "run")

    def train(self, cache: Path, run: Path) -> dict[str, Any]:
        """Weights and figures of the students."""
        results = train_in_process(self.recipe, self.stores, run=run, cache_root=str(cache))
        figures = {name: (one["test"], one["validation"], one["agreement"]) for name, one in results.items()}
        return {"weights": weights(run), "figures": figures}

    def cache(self, folder: Path) -> Path:
        """A copy of its prepared rows and decoded logits, as a backup restores them."""
        shutil.copytree(self.root / "cache", folder)
        return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("verification"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    teacher.forget()


def flip(path: Path, at: int = -1) -> None:
    """Turn a bit in place, and put the time back."""
    stat = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 64]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def entry_file(cache: Path, name: str) -> Path:
    return min(cache.glob(f"*/*/{name}"))  # of logits the first view's


def renewed(run: Path) -> list[str]:
    path = run / "control" / "renewed.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", [f"{one}.npy" for one in PREPARED] + ["logits.npy"])
def test_a_flip_in_what_is_mapped_changes_no_student(name: str, home: Home, tmp_path: Path) -> None:
    cache = home.cache(tmp_path / "cache")
    flip(entry_file(cache, name), END if "labels" in name else -1)
    assert home.train(cache, tmp_path / "run") == home.expected
    (line,) = renewed(tmp_path / "run")
    assert name in line
    for split in SPLITS:  # made anew, and right
        getattr(prepare(home.recipe.data, cache), split).content().verify()


@pytest.mark.parametrize("name", ["index.json", "verified.json"])
def test_a_flip_in_what_is_noted_of_them_changes_no_student(name: str, home: Home, tmp_path: Path) -> None:
    cache = home.cache(tmp_path / "cache")
    flip(entry_file(cache, name), entry_file(cache, name).stat().st_size // 2)
    assert home.train(cache, tmp_path / "run") == home.expected


def test_every_flip_in_the_index_is_found_when_it_is_opened(home: Home, tmp_path: Path) -> None:
    cache, generator = home.cache(tmp_path / "cache"), np.random.default_rng(0)
    before, index = prepare(home.recipe.data, cache), entry_file(cache, "index.json")
    for at in generator.integers(0, index.stat().st_size, 25):
        flip(index, int(at))
        again = prepare(home.recipe.data, cache)
        assert [told(getattr(again, split)) for split in SPLITS] == [told(getattr(before, split)) for split in SPLITS]


@pytest.mark.parametrize("name", ["train-inputs.npy", "train-labels.npy", "logits.npy"])
def test_no_flip_in_the_head_of_an_array_changes_what_it_says(name: str, home: Home, tmp_path: Path) -> None:
    """Least of all `<i8` to `>i8`, a single bit, by which labels would be other numbers of the same bytes."""
    cache = home.cache(tmp_path / "cache")
    path = entry_file(cache, name)
    orders = [at for at, byte in enumerate(path.read_bytes()[:END]) if byte in b"<"]
    for at in [*orders, 3, 20, 60, 75]:
        stat = path.stat()
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.seek(at)
            value = file.read(1)[0]
            file.seek(at)
            file.write(bytes([value ^ 2]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        found, again = prepare(home.recipe.data, cache), home.train(cache, tmp_path / f"run-{at}")
        assert (found.train.labels.dtype, again) == (np.dtype(np.int64), home.expected)
        path = entry_file(cache, name)


def told(rows: Rows) -> object:
    return rows.fingerprint, rows.blocks, rows.classes, rows.task, rows.class_names, rows.inputs.tobytes()


@pytest.mark.parametrize(("name", "batch"), [("train-inputs.npy", 1), ("logits.npy", 3), ("validation-labels.npy", 17)])
def test_a_flip_while_students_train_changes_none(
    name: str, batch: int, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home.cache(tmp_path / "cache")
    at_batch(monkeypatch, {batch: lambda: flip(entry_file(cache, name))})
    assert home.train(cache, tmp_path / "run") == home.expected
    assert len(renewed(tmp_path / "run")) == 1


def at_batch(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], object]]) -> list[str]:
    """Act after the nth batch that is trained on; the list of places that were passed."""
    passed: list[str] = []

    def failpoint(site: str) -> None:
        passed.append(site)
        if site == "cohort.after_batch" and (act := acts.pop(passed.count(site), None)) is not None:
            act()

    monkeypatch.setattr(lockstep, "failpoint", failpoint)
    return passed


@pytest.mark.parametrize(("name", "batches"), [("train-inputs.npy", (2, 5)), ("logits.npy", (3, 5))])
def test_what_was_wrong_for_a_while_changes_no_student(
    name: str, batches: tuple[int, int], home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are put back before anybody looks are right again: what was trained on them in between is not."""
    cache = home.cache(tmp_path / "cache")
    path = entry_file(cache, name)

    def turn() -> None:
        data, stat = path.read_bytes(), path.stat()
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.seek(END)
            file.write(bytes(byte ^ 8 for byte in data[END:]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    at_batch(monkeypatch, dict.fromkeys(batches, turn))
    assert home.train(cache, tmp_path / "run") == home.expected
    (line,) = renewed(tmp_path / "run")
    assert "was touched while it was in use" in line


def test_files_that_are_touched_all_the_time_end_the_run(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home.cache(tmp_path / "cache")
    monkeypatch.setattr(lockstep, "failpoint", lambda site: entry_file(cache, "train-inputs.npy").chmod(0o600))
    with pytest.raises(CorruptCacheError, match="was touched while it was in use"):
        home.train(cache, tmp_path / "run")
    assert len(renewed(tmp_path / "run")) == 9


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[content.Guard]:
    """Those that students are trained under, the last one at the end."""
    made: list[content.Guard] = []

    class Noted(content.Guard):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(cohort, "Guard", Noted)
    return made


class StoppedError(BaseException):
    """Leaves a run as a killed process does, but for its locks."""


@pytest.mark.parametrize("between", ["nothing", "evicted", "found by another"])
@pytest.mark.parametrize("name", ["train-labels.npy", "train-inputs.npy", "logits.npy"])
def test_nobody_goes_on_from_a_checkpoint_of_rotten_bytes(
    name: str,
    between: str,
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guards: list[content.Guard],
) -> None:
    """Wherever they are found, or if they are gone unfound: a probe, another command, or an eviction may be first."""
    cache, run = home.cache(tmp_path / "cache"), tmp_path / "run"
    stamps = {path: [0, 10**18, 10**18, path.stat().st_ino] for path in cache.rglob("*")}
    path = entry_file(cache, name)

    def rot() -> None:
        guards[-1].settle()
        path.chmod(0o644)
        array = np.load(path, mmap_mode="r+")
        array[...] = (array + 1) % 10

    def stop() -> None:
        raise StoppedError

    with monkeypatch.context() as patch:  # nothing shows, and nobody looks again
        patch.setattr(content, "stamp_of", lambda path: stamps.get(path) or stamp_of(path))
        patch.setattr(content, "SHARE", 1e9)
        at_batch(patch, {1: rot, 18: stop})
        with pytest.raises(StoppedError):
            home.train(cache, run)
        assert list(run.rglob("*.ckpt"))
        if between == "evicted":
            shutil.rmtree(path.parent, ignore_errors=True)  # or found already, as of a view that is over
        elif between == "found by another":
            for one in [*prepare(home.recipe.data, cache).contents(), decoded_content(home, cache)]:
                with contextlib.suppress(CorruptCacheError):
                    one.verify()
    assert home.train(cache, run) == home.expected


def decoded_content(home: Home, cache: Path) -> content.Content:
    return hold_view(open_store(home.stores["train"]), cache).content


def test_a_lying_disk_costs_what_was_kept_since_a_pass(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guards: list[content.Guard]
) -> None:
    """Nothing shows in sizes, times or inodes: only a pass finds it, and it cannot say since when."""
    cache, run = home.cache(tmp_path / "cache"), tmp_path / "run"
    stamps = {path: [0, 10**18, 10**18, path.stat().st_ino] for path in cache.rglob("*")}
    monkeypatch.setattr(content, "stamp_of", lambda path: stamps.get(path) or stamp_of(path))
    monkeypatch.setattr(content, "SHARE", 1e9)  # the first pass is the last, ...
    kept: list[str] = []

    def rot() -> None:
        guards[-1].settle()
        flip(entry_file(cache, "train-inputs.npy"))

    def pass_again() -> None:
        kept.extend(path.name for path in checkpoints(run / "students" / "annealing" / "checkpoints"))
        monkeypatch.setattr(content, "SHARE", 0.0)  # ... until here

    passed = at_batch(monkeypatch, {1: rot, 12: pass_again})
    assert home.train(cache, run) == home.expected
    assert kept == ["000001-00000000-0001.ckpt"]  # it rests on the flip
    assert passed.count("cohort.after_batch") == 20 + 30  # so all was trained again


def test_what_stays_corrupt_is_told_and_not_delivered(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = home.cache(tmp_path / "cache"), tmp_path / "run"

    def prepare_badly(*arguments: Any, **named: Any) -> Splits:
        splits = rows_for(*arguments, **named)
        flip(splits.train.files[0])
        return splits

    monkeypatch.setattr(cohort, "rows_for", prepare_badly)
    with pytest.raises(CorruptCacheError, match=r"train-inputs\.npy") as refused:
        home.train(cache, run)
    assert (refused.value.code, "check the disk" in str(refused.value.next)) == (5, True)
    assert not list(run.rglob("*.ckpt")) + list(run.rglob("result.json")) + list(run.rglob("model.safetensors"))


def test_no_checkpoint_is_published_before_everything_was_hashed(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    verifying = content.Content.verifying

    def noted(self: content.Content) -> Any:
        yield from verifying(self)
        events.append("hashed")

    def saved(*given: Any) -> None:
        events.append("saved")
        save(*given)

    save = Student.save
    monkeypatch.setattr(content.Content, "verifying", noted)
    monkeypatch.setattr(Student, "save", saved)
    home.train(home.cache(tmp_path / "cache"), tmp_path / "run")
    assert events.index("saved") >= 4  # three splits and the logits
    assert events.count("saved") >= 3


# ---- stores and figures


def test_no_store_is_made_from_rows_that_changed(home: Home, tmp_path: Path) -> None:
    cache = home.cache(tmp_path / "cache")
    for name in ("train-inputs.npy", "test-labels.npy"):
        flip(entry_file(cache, name), END + 8 * 5)
    stores_of(home.recipe, home.teacher, tmp_path)
    assert store_bytes(tmp_path / "stores") == store_bytes(home.root / "stores")


def test_no_figure_is_told_of_rows_that_changed(home: Home, tmp_path: Path) -> None:
    cache, run = home.cache(tmp_path / "cache"), tmp_path / "run"
    home.train(cache, run)
    begin_run(run, home.recipe, run_identity(home.recipe, prepare(home.recipe.data, cache)))
    gc.collect()
    flip(entry_file(cache, "test-inputs.npy"))
    asked = str(run / "students" / "hard"), DataRequest(str(run)), cache
    with pytest.raises(CorruptCacheError, match=r"test-inputs\.npy"):
        evaluation.evaluate(*asked)
    metrics = evaluation.evaluate(*asked).student.metrics.plain()
    assert metrics == home.expected["figures"]["hard"][0]


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
