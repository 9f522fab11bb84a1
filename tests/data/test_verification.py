"""Nobody is trained, cached or measured on bytes that are not what was prepared, whatever sizes and times say."""

import contextlib
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.errors import CorruptCacheError
from akd_dist.base.files import stamp_of
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.distill import cohort, lockstep, prefetch, teacher
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.student import Student
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.serve import evaluation
from akd_dist.serve.examples import DataRequest
from akd_dist.storage import content
from akd_dist.storage.decoded import hold_view
from akd_dist.storage.reader import open_store
from tests.fleets import HARD, a_recipe, a_student, a_teacher, store_bytes, stores_of, weights

STUDENTS = [a_student("annealing", batch=128), a_student("hard", batch=128, objective=HARD | {"epochs": 2})]
PREPARED = [f"{split}-{part}" for split in SPLITS for part in ("inputs", "labels")]
END = 128
"""Where the values of an array begin in its file."""


class Home:
    """A recipe, its stores and what its students come to undisturbed; each test has a copy of the cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        teacher = a_teacher(a_recipe(STUDENTS), root / "teacher", root / "cache")
        self.recipe = a_recipe(STUDENTS, teacher={"weights": teacher}, stacked="never")  # trials save students, too
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
def test_a_flip_in_what_is_mapped_changes_no_student(
    name: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = 2 * ("train" in name or "logits" in name)  # batches, by a thread, as on a GPU
    monkeypatch.setattr(prefetch, "AHEAD", {"cpu": ahead, "cuda": ahead})
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
