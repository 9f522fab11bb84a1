"""Caching a teacher in a plain loop: what is read back is what the teacher says of each view of each row."""

import pickle
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, DamagedError, MachineError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.data import augmenters
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows, Splits
from akd_dist.data.views import view_of
from akd_dist.distill import teacher
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.teacher import (
    CacheJob,
    bands,
    cache_shard,
    cache_shards,
    compute_shard,
    load_teacher,
    served_fingerprint,
    teacher_logits,
)
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card, load_model, save_model
from akd_dist.storage.layout import FORMAT_VERSION, StoreLayout
from akd_dist.storage.manifest import Computed, Creation, Identity
from akd_dist.storage.reader import open_store
from akd_dist.storage.writer import create_store, missing_shards, seal_store, write_shard
from tests import sources
from tests.fleets import own

DATA = recipe.DataSpec(train=recipe.Digits(), views=2, augmentation=recipe.Shift(), seed=3)
CNN = recipe.Cnn(width=4)
LINEAR = """
from torch import nn
def make(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture(autouse=True)
def own_process_state() -> Any:
    """What a worker process sets for good is put back, and nothing is remembered from test to test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    teacher.forget()


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def splits(cache_root: Path) -> Splits:
    return prepare(DATA, cache_root)


@pytest.fixture
def make_job(tmp_path: Path, cache_root: Path, splits: Splits) -> Callable[..., CacheJob]:
    """A job on a store of its own, with a teacher of random weights."""

    def make(split: str = "train", *, model: recipe.Model = CNN, encoding: str = "float32", **changes: Any) -> CacheJob:
        rows: Rows = getattr(splits, split)
        folder = tmp_path / "teacher"
        card = ModelCard.of(model, rows, None)
        save_model(folder, build(card, seed=1), card)
        augmentation = DATA.augmentation if split == "train" else recipe.NoAugmentation()
        identity = Identity(
            format=FORMAT_VERSION,
            dataset=rows.fingerprint,
            rows=len(rows),
            teacher=load_card(folder).fingerprint,
            augmentation=augmentation.model_dump(mode="json"),
            data_seed=DATA.seed if split == "train" else None,
            views=DATA.views if split == "train" else 1,
            encoding={"name": encoding},
            classes=rows.classes,
        )
        creation = Creation(
            identity=identity,
            computed=Computed(batch_rows=100, threads=1, device="cpu", versions={}),
            dataset=rows.describe(),
            teacher={"fingerprint": identity.teacher, "spec": load_card(folder).model_dump(mode="json")},
        )
        job = CacheJob(
            store=create_store(str(tmp_path / "stores"), creation),
            data=DATA,
            split=split,
            teacher_uri=str(folder),
            teacher=identity.teacher,
            augmentation=augmentation,
            cache=recipe.CacheSpec(batch_rows=100),
            cache_root=str(cache_root),
        )
        return replace(job, **changes)

    return make


def cache(job: CacheJob) -> str:
    """The whole store, in a plain loop."""
    for shard in missing_shards(job.store):
        cache_shard(job, shard)
    seal_store(job.store)
    return job.store.uri


# ---- logits of a block


@pytest.mark.parametrize("spec", [CNN, recipe.Mlp(hidden=32)], ids=lambda spec: spec.label)
def test_logits_do_not_depend_on_the_rows_beside_them(spec: Any, splits: Splits) -> None:
    """A row in a full batch, in a padded one and in a shuffled one: the same bits, as each batch has the same shape."""
    module = build(ModelCard.of(spec, splits.train, None), seed=1)
    inputs = torch.from_numpy(np.array(splits.train.inputs[:250]))
    logits = teacher_logits(module, inputs, 64)
    assert logits.shape == (250, 10)
    assert logits.dtype == np.float32
    assert not module.training
    order = np.random.default_rng(0).permutation(250)
    np.testing.assert_array_equal(teacher_logits(module, inputs[order], 64), logits[order])
    np.testing.assert_array_equal(teacher_logits(module, inputs[:7], 64), logits[:7])
    plain = module(inputs).detach().numpy()
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-5)


# ---- a store


@pytest.mark.parametrize(("encoding", "dtype"), [("float32", np.float32), ("float16", np.float16)])
def test_a_store_holds_what_the_teacher_says_of_every_view(
    encoding: str, dtype: Any, make_job: Callable[..., CacheJob], splits: Splits
) -> None:
    job = make_job(encoding=encoding)
    store = open_store(cache(job))
    module = load_model(job.teacher_uri)
    rows = np.arange(len(splits.train))
    assert (store.views, store.num_rows, store.classes) == (2, len(rows), 10)
    for view in range(2):
        seen = view_of(DATA.augmentation, DATA.seed, np.array(splits.train.inputs), rows, view)
        expected = teacher_logits(module, seen, 100).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(store.rows(view, 0, len(rows)), expected)
    assert (store.rows(0, 0, len(rows)) != store.rows(1, 0, len(rows))).any(axis=1).mean() > 0.5


def test_receipts_tell_agreement_and_probes_that_a_stream_checks(
    make_job: Callable[..., CacheJob], splits: Splits
) -> None:
    store = open_store(cache(make_job()))
    records = {record.key: record for record in store.manifest.records()}
    seen = [int(place) for place in np.linspace(0, store.num_rows - 1, 32)]  # evenly spaced, the first and the last too
    for shard in store.layout.shards():
        chosen = store.rows(shard.view, shard.start, shard.stop).argmax(axis=1)
        agreement = np.mean(chosen == splits.train.labels[shard.start : shard.stop])
        record = records[shard.key]
        assert record.label_agreement == pytest.approx(float(agreement))
        assert [probe.row for probe in record.probes] == [row for row in seen if shard.start <= row < shard.stop]
    BatchStream(splits.train, None, DATA.augmentation, DATA.seed, views=2, batch=64).check_probes(store.manifest)


def test_validation_rows_are_cached_once_and_unaugmented(make_job: Callable[..., CacheJob], splits: Splits) -> None:
    job = make_job("validation")
    store = open_store(cache(job))
    inputs = torch.from_numpy(np.array(splits.validation.inputs))
    assert store.views == 1
    np.testing.assert_array_equal(
        store.rows(0, 0, len(inputs)), teacher_logits(load_model(job.teacher_uri), inputs, 100)
    )


def test_the_bytes_do_not_depend_on_order_or_on_the_process(make_job: Callable[..., CacheJob], tmp_path: Path) -> None:
    def digests(job: CacheJob) -> dict[str, str]:
        return {record.key: record.sha256 for record in open_store(job.store.uri).manifest.records()}

    job = make_job()
    cache(job)
    first = digests(job)
    shutil.rmtree(tmp_path / "stores")
    torch.set_num_threads(2)
    teacher.forget()
    again = pickle.loads(pickle.dumps(make_job()))
    for shard in reversed(missing_shards(again.store)):
        cache_shard(again, shard)
    seal_store(again.store)
    assert digests(again) == first


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_shards_together_have_the_bytes_of_shards_alone(
    encoding: str, make_job: Callable[..., CacheJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are taken once for both views, and hashed once; more shards than one wait to be published."""
    job = make_job(encoding=encoding)
    alone = Path(cache(job), "manifest.json").read_bytes()
    shutil.rmtree(job.store.uri)
    again = replace(job, store=create_store(job.store.root_uri, job.store.creation))
    rows, taken = teacher.rows_of(again), list[int]()
    seen = np.asarray(rows.inputs).view(Taken)
    seen.taken = taken
    monkeypatch.setitem(teacher._rows, rows.fingerprint, replace(rows, inputs=seen))
    shards = missing_shards(again.store)
    assert [receipt.key for receipt in cache_shards(again, shards)] == [shard.key for shard in shards]
    seal_store(again.store)
    assert Path(job.store.uri, "manifest.json").read_bytes() == alone
    assert sum(taken) == len(rows)


class Taken(np.ndarray):
    """Rows that count how many are taken."""

    taken: list[int]

    def take(self, indices: Any, *given: Any, **named: Any) -> Any:
        self.taken.append(len(indices))
        return np.asarray(self).take(indices, *given, **named)


def test_bands_are_of_the_same_rows_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = StoreLayout(views=5, rows=1_000, classes=10, dtype="float32")
    shards = layout.shards()
    assert [len(band) for band in bands(shards, 10)] == [5] * layout.shards_per_view
    monkeypatch.setattr(teacher, "BAND_BYTES", 2 * shards[0].rows * 10 * 4)
    found = bands(shards, 10)
    assert [len(band) for band in found[:3]] == [2, 2, 1]
    assert all(len({(shard.start, shard.stop) for shard in band}) == 1 for band in found)
    assert sorted(shard.key for band in found for shard in band) == sorted(shard.key for shard in shards)


def test_a_task_that_is_run_again_computes_only_what_is_missing(
    make_job: Callable[..., CacheJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where logits are rounded, and what is stored could not be adopted without its receipt."""
    job = make_job(encoding="float16")
    shards = missing_shards(job.store)[:3]
    first = cache_shards(job, shards[:2])
    monkeypatch.setattr(teacher, "teacher_logits", counted := Counted(teacher_logits))
    again = cache_shards(job, shards)
    assert again[:2] == first
    assert counted.rows == shards[2].rows
    (Path(job.store.uri) / "arrays.zarr" / shards[0].key).write_bytes(b"torn")
    assert cache_shards(job, shards)[0].record() == first[0].record()
    assert counted.rows == shards[2].rows + shards[0].rows


class Counted:
    """Counts the rows that a teacher is shown."""

    def __init__(self, plain: Callable[..., np.ndarray]) -> None:
        self.plain, self.rows = plain, 0

    def __call__(self, module: Any, inputs: torch.Tensor, *given: Any) -> np.ndarray:
        self.rows += len(inputs)
        return self.plain(module, inputs, *given)


def test_an_error_while_views_are_made_or_shards_published_is_the_tasks(
    make_job: Callable[..., CacheJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the thread ahead and from the one behind; what was published before is kept, and no thread is left."""
    job = make_job()
    shards = missing_shards(job.store)

    def full(writer: Any, shard: Any, *given: Any, **named: Any) -> Any:
        if shard == shards[1]:
            raise MachineError("the disk is full")
        return write_shard(writer, shard, *given, **named)

    monkeypatch.setattr(teacher, "write_shard", full)
    with pytest.raises(MachineError, match="the disk is full"):
        cache_shards(job, shards)
    monkeypatch.undo()
    assert shards[1] in missing_shards(job.store)
    assert shards[0] not in missing_shards(job.store)

    def spoilt(*given: Any) -> Any:
        raise CorruptCacheError("the picture of row 7 can no longer be decoded")

    monkeypatch.setattr(teacher, "begin_views", spoilt)
    with pytest.raises(CorruptCacheError, match="row 7"):
        cache_shards(job, shards)
    monkeypatch.undo()
    assert not [one for one in threading.enumerate() if one.name.startswith(("views", "publishing"))]
    cache(job)


def test_a_shard_is_adopted_without_the_teacher(make_job: Callable[..., CacheJob]) -> None:
    job = make_job()
    shard = job.store.layout.shards()[0]
    receipt = cache_shard(job, shard)
    (Path(job.store.uri) / shard.receipt_key).unlink()
    shutil.rmtree(job.teacher_uri)
    load_teacher.cache_clear()
    assert shard in missing_shards(job.store)
    assert cache_shard(job, shard).record() == receipt.record()
    assert shard not in missing_shards(job.store)


def test_a_shard_is_computed_alone_for_repair(make_job: Callable[..., CacheJob]) -> None:
    job = make_job()
    store = open_store(cache(job))
    shard = job.store.layout.shards()[-1]
    logits, agreement, probes, loss = compute_shard(job, shard)
    np.testing.assert_array_equal(logits, store.rows(shard.view, shard.start, shard.stop))
    record = list(store.manifest.records())[-1]
    assert (record.label_agreement, record.probes, record.loss) == (agreement, probes, loss)


def test_own_augmentations_are_found_for_adopted_shards(
    make_job: Callable[..., CacheJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh worker that finds a published shard needs the recipe's folder too: it makes the probe views."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"negative_{sha256(str(tmp_path).encode())[:8]}"
    (tmp_path / f"{name}.py").write_text(
        """
class Negative:
    words = 0
    def draw(self, words, input_shape):
        return {}
    def apply(self, batch, params):
        return 255 - batch
def negative():
    return Negative()
"""
    )
    job = make_job(augmentation=own(recipe.CustomAugmentation(factory=f"{name}:negative"), tmp_path))
    shard = job.store.layout.shards()[0]
    receipt = cache_shard(job, shard)
    (Path(job.store.uri) / shard.receipt_key).unlink()
    teacher.forget()
    augmenters._custom.cache_clear()
    sys.modules.pop(name)
    sys.path.remove(str(tmp_path))
    assert cache_shard(job, shard).record() == receipt.record()


def test_regression_agrees_with_no_label(make_job: Callable[..., CacheJob], monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    rows = teacher.rows_of(job)
    monkeypatch.setitem(teacher._rows, rows.fingerprint, replace(rows, task="regression"))
    assert cache_shard(job, job.store.layout.shards()[0]).label_agreement is None


# ---- refusals


def test_a_teacher_that_says_nan_is_refused_with_the_rows(
    make_job: Callable[..., CacheJob], splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"moody_{sha256(str(tmp_path).encode())[:8]}"
    (tmp_path / f"{name}.py").write_text(
        """
import torch
class Moody(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = torch.nn.Linear(64, classes)
    def forward(self, inputs):
        logits = self.last(inputs.flatten(1))
        return torch.where(inputs[:, 0, 2, 2:3] == 1, torch.nan, logits)  # where this pixel is full
def moody(input_shape, classes):
    return Moody(classes)
"""
    )
    model = own(recipe.Custom(factory=f"{name}:moody"), tmp_path)
    job = make_job("validation", model=model, trusted=model.trusted)
    full = np.flatnonzero(splits.validation.inputs[:, 0, 2, 2] == 255)
    shard = next(shard for shard in job.store.layout.shards() if ((shard.start <= full) & (full < shard.stop)).any())
    rows = full[(shard.start <= full) & (full < shard.stop)]
    with pytest.raises(RefusedError) as refused:
        cache_shard(job, shard)
    for row in rows[:8]:
        assert str(row) in refused.value.what
    assert f"{len(rows)} row" in refused.value.what
    assert shard in missing_shards(job.store)


def test_another_teacher_in_the_same_folder_is_refused(make_job: Callable[..., CacheJob], splits: Splits) -> None:
    job = make_job()
    card = ModelCard.of(CNN, splits.train, None)
    save_model(Path(job.teacher_uri), build(card, seed=2), card)
    with pytest.raises(RefusedError, match=r"the teacher in .* has changed"):
        cache_shard(job, job.store.layout.shards()[0])


def test_a_teacher_whose_code_has_changed_is_another_one(
    make_job: Callable[..., CacheJob], splits: Splits, tmp_path: Path
) -> None:
    """Its logits may have changed with it, and its card does not know."""
    name = sources.module(tmp_path / "own", LINEAR)
    model = own(recipe.Custom(factory=f"{name}:make"), tmp_path / "own")
    job = make_job(model=model, trusted=model.trusted)
    shard = job.store.layout.shards()[0]
    compute_shard(job, shard)
    (tmp_path / "own" / f"{name}.py").write_text(f"{LINEAR}# another line\n")
    teacher.forget()
    with pytest.raises(RefusedError, match=r"the teacher in .* has changed"):
        compute_shard(job, shard)
    card = load_card(job.teacher_uri, model.trusted)
    now = served_fingerprint(card, recipe.CacheSpec())
    assert len({job.teacher, now, served_fingerprint(card, recipe.CacheSpec(precision="float64"))}) == 3
    compute_shard(replace(job, teacher=now), shard)


def test_damaged_weights_are_refused(make_job: Callable[..., CacheJob]) -> None:
    job = make_job()
    weights = Path(job.teacher_uri) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(DamagedError, match="not those that were saved"):
        cache_shard(job, job.store.layout.shards()[0])


def test_other_data_is_refused(make_job: Callable[..., CacheJob]) -> None:
    job = make_job(data=DATA.model_copy(update={"seed": 4}))
    with pytest.raises(RefusedError, match="not the one the store was made from"):
        cache_shard(job, job.store.layout.shards()[0])
