"""A split with the teacher's logits as datasets of torch: the rows, views, order and positions of our own stream."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from akd_dist.base.errors import CorruptCacheError, MachineError, RecipeError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.dataset import DatasetJob, DistillationBatches, DistillationDataset, Items, Tensors, collate
from akd_dist.recipe import ByteText, CustomData, DataSpec, Image, ImageFolder, RandomResizedCropFlip, Recipe
from tests import pictures, sources
from tests.fleets import a_recipe, a_student, own

BATCH = 100


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe([a_student("pupil")])


@pytest.fixture(scope="module")
def job(recipe: Recipe, stores: dict[str, str], home: Path) -> DatasetJob:
    """The train rows of the module's recipe."""
    splits = prepare(recipe.data, home / "cache")
    return DatasetJob(recipe.data, "train", splits.fingerprints, str(home / "cache"), stores["train"], batch=BATCH)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def whole(job: DatasetJob, epoch: int = 0, **given: Any) -> list[Tensors]:
    return list(DistillationBatches(job, epoch, **given))


def test_a_row_is_what_the_stream_shows_of_it(job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    for epoch in (0, 1, 3):
        dataset.set_epoch(epoch)
        batch = next(job.stream()[0].batches(epoch))
        row = int(batch.rows[0])
        assert batch.logits is not None
        assert torch.equal(dataset[row]["inputs"], batch.inputs[0])
        assert torch.equal(dataset[row]["teacher_logits"], batch.logits[0])
        assert int(dataset[row]["labels"]) == int(batch.labels[0])
        assert int(dataset[row]["row"]) == row
    assert len(dataset) == len(dataset.rows) == 1258
    dataset.verify()


def test_rows_are_asked_for_alone_together_and_from_the_end(job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    batch = dataset[[5, 3, -1]]
    assert batch["row"].tolist() == [5, 3, len(dataset) - 1]
    assert batch["teacher_logits"].shape == (3, 10)
    assert same(dataset[3], {name: values[1] for name, values in batch.items()})
    assert same(dataset[[]], {name: values[:0] for name, values in batch.items()})
    for wrong in (len(dataset), [0, len(dataset)], [-len(dataset) - 1]):
        with pytest.raises(IndexError, match="1,258"):
            dataset[wrong]


def test_rows_are_taken_by_whole_numbers_and_slices(job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    assert same(dataset[3:6], dataset[[3, 4, 5]])
    assert same(dataset[torch.tensor(3)], dataset[3])
    for wrong in (np.arange(len(dataset)) > 3, torch.ones(4, dtype=torch.bool), [1.9, 2.9], True, "3"):
        with pytest.raises(TypeError, match="by their numbers"):
            dataset[wrong]


def test_a_data_loader_gets_whole_batches_whichever_collation_it_has(job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    items = dataset.__getitems__([1, 2, 7])
    assert isinstance(items, Items)
    assert [int(item["row"]) for item in items[1:]] == [2, 7]
    assert same(dict(items[-1]), dataset[7])
    order = [[7, 1], [0, 9]]
    expected = [dataset[rows] for rows in order]
    loaders: list[dict[str, Any]] = [
        {"batch_sampler": order},
        {"batch_sampler": order, "collate_fn": collate},
        {"batch_sampler": order, "collate_fn": lambda rows: collate([dict(row) for row in rows])},
        {"sampler": order, "batch_size": None},
    ]
    for loader in loaders:
        assert all(map(same, DataLoader(dataset, **loader), expected))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_map_for_themselves_and_see_the_next_epoch(context: str, job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    sampler = BatchSampler(range(len(dataset)), 500, drop_last=False)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=2 if context == "fork" else 1,  # each that is spawned imports torch
        persistent_workers=True,
        multiprocessing_context=context,
    )
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        for rows, batch in zip(sampler, loader, strict=True):
            assert same(batch, dataset[rows])
    assert len(pickle.dumps(dataset)) < 4096, "a worker maps files and gets no copy of them"


def test_batches_are_those_of_our_stream(job: DatasetJob) -> None:
    for epoch in (0, 1):
        stream = job.stream()[0].batches(epoch)
        for ours, batch in zip(stream, whole(job, epoch), strict=True):
            assert np.array_equal(ours.rows, batch["row"].numpy())
            assert torch.equal(ours.inputs, batch["inputs"])
            assert ours.logits is not None
            assert torch.equal(ours.logits, batch["teacher_logits"])


def test_ranks_share_each_batch_and_a_position_begins_within_an_epoch(job: DatasetJob) -> None:
    alone = whole(job)
    shares = [whole(job, rank=rank, world=3) for rank in range(3)]
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shares]
        assert same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})
    assert all(map(same, whole(job, start_step=9), alone[9:]))
    assert len(DistillationBatches(job)) == len(alone) == 13
    dropped = dataclasses.replace(job, last_batch="drop")
    assert len(whole(dropped)) == len(DistillationBatches(dropped)) == 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on a machine of two cores
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_several_workers_keep_the_order_and_give_each_batch_once(workers: int, job: DatasetJob) -> None:
    batches = DistillationBatches(job).open()
    options: dict[str, Any] = {"persistent_workers": True} if workers else {}
    loader = DataLoader(batches, batch_size=None, num_workers=workers, **options)
    for epoch, start in ((0, 0), (1, 4), (1, 0)):
        batches.set_epoch(epoch, start)
        given = [batch["row"].tolist() for batch in loader]
        assert given == [batch["row"].tolist() for batch in whole(job, epoch)[start:]]
    batches.verify()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls what torch 2.13 deprecates
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_where_another_one_stopped(workers: int, job: DatasetJob) -> None:
    def loader() -> Any:
        return StatefulDataLoader(DistillationBatches(job, epoch=0), batch_size=None, num_workers=workers)

    first = loader()
    first.dataset.set_epoch(1)
    began = [batch["row"].tolist() for _, batch in zip(range(5), first, strict=False)]
    state = first.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert began + [batch["row"].tolist() for batch in again] == [batch["row"].tolist() for batch in whole(job, 1)]
    # The epoch after it begins at its beginning.
    again.dataset.set_epoch(2)
    assert [batch["row"].tolist() for batch in again] == [batch["row"].tolist() for batch in whole(job, 2)]


def test_a_position_is_the_next_batch(job: DatasetJob) -> None:
    batches = DistillationBatches(job, epoch=3, start_step=2)
    assert batches.state_dict() == {"epoch": 3, "step": 2}
    given = iter(batches)
    next(given)
    next(given)
    assert batches.state_dict() == {"epoch": 3, "step": 4}


def test_rows_in_windows_are_read_window_by_window(job: DatasetJob) -> None:
    windowed = dataclasses.replace(job, window=256)
    for epoch in (0, 1):
        stream = windowed.stream()[0].batches(epoch)
        assert [ours.rows.tolist() for ours in stream] == [batch["row"].tolist() for batch in whole(windowed, epoch)]


def test_what_is_shown_of_itself_is_short(job: DatasetJob) -> None:
    dataset = DistillationDataset(job, epoch=2).open()
    assert repr(dataset) == "DistillationDataset(train rows, epoch 2)"
    assert repr(DistillationBatches(job)) == "DistillationBatches(train rows, epoch 0)"
    rows = f"Rows(1,258 rows of uint8 [1, 8, 8], 10 classes, fingerprint {dataset.rows.fingerprint[:12]})"
    assert repr(dataset.rows) == rows
    assert rows in repr(prepare(job.data, Path(job.cache_root)))


def test_without_a_store_there_are_no_logits(recipe: Recipe, job: DatasetJob, stores: dict[str, str]) -> None:
    test = dataclasses.replace(job, split="test", store=None)
    assert set(DistillationDataset(test).open()[0]) == {"inputs", "labels", "row"}
    assert set(whole(test)[0]) == {"inputs", "labels", "row"}
    with_store = dataclasses.replace(test, store=stores["test"])
    dataset = DistillationDataset(with_store, epoch=5).open()
    assert dataset.view == 0, "only train rows are augmented"
    assert torch.equal(dataset[4]["inputs"], torch.from_numpy(np.array(dataset.rows.inputs[4])))


@pytest.fixture
def text_job(tmp_path: Path) -> Callable[..., DatasetJob]:
    def make(pair: bool) -> DatasetJob:
        texts = [(f"text {number}", "other") if pair else f"text {number}" for number in range(20)]
        made = own(sources.dataset(tmp_path, texts, [number % 2 for number in range(20)]), tmp_path)
        assert isinstance(made, CustomData)
        data = DataSpec(train=made, validation=0.2, test=0.2, text=ByteText(length=12))
        return DatasetJob(data, "train", prepare(data, tmp_path / "cache").fingerprints, str(tmp_path / "cache"), None)

    return make


@pytest.mark.parametrize("pair", [False, True])
def test_text_is_ids_and_a_mask(pair: bool, text_job: Callable[..., DatasetJob]) -> None:
    dataset = DistillationDataset(text_job(pair)).open()
    batch = dataset[[0, 1]]
    types = {"token_type_ids"} if dataset.rows.shape != (12,) else set()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row"} | types
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 12)
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert dataset.rows.tokens is not None
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == dataset.rows.tokens.padding)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 2, "world": 2}, "rank"),
        ({"world": 0}, "world"),
        ({"start_step": -1}, "start_step"),
        ({"epoch": 1.5}, "epoch"),
    ],
)
def test_what_is_out_of_range_is_refused(given: dict[str, Any], named: str, job: DatasetJob) -> None:
    with pytest.raises(RecipeError, match=f"the argument {named} is not what it takes"):
        DistillationBatches(job, **given)


def test_a_batch_has_rows(job: DatasetJob) -> None:
    with pytest.raises(RecipeError, match="the argument batch"):
        DistillationBatches(dataclasses.replace(job, batch=0)).open()


def test_other_rows_than_those_of_the_store_are_refused(job: DatasetJob, recipe: Recipe) -> None:
    data = recipe.data.model_copy(update={"seed": 1})
    other = dataclasses.replace(job, data=data)
    with pytest.raises(RefusedError, match="rows on this node are not those"):
        DistillationDataset(other)[0]
    splits = prepare(data, Path(job.cache_root))
    with pytest.raises(RefusedError, match="the dataset is not the one the store was made from"):
        DistillationDataset(dataclasses.replace(other, fingerprints=splits.fingerprints)).open()


def test_pixels_that_the_teacher_did_not_see_are_refused(job: DatasetJob, recipe: Recipe) -> None:
    other = {"augmentation": recipe.data.augmentation.model_copy(update={"pixels": 2})}
    data = recipe.data.model_copy(update=other)
    with pytest.raises(RefusedError, match="does not show what the teacher saw"):
        DistillationDataset(dataclasses.replace(job, data=data)).open()


def test_a_cache_without_room_for_a_view_is_told(job: DatasetJob, tmp_path: Path, monkeypatch: Any) -> None:
    prepare(job.data, tmp_path / "cache")
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", "40000")  # a view takes 50 kB
    with pytest.raises(MachineError, match="no room"):
        DistillationDataset(dataclasses.replace(job, cache_root=str(tmp_path / "cache"))).open()


def test_rows_that_changed_in_the_cache_are_told(job: DatasetJob, tmp_path: Path) -> None:
    prepare(job.data, tmp_path / "cache")
    dataset = DistillationDataset(dataclasses.replace(job, cache_root=str(tmp_path / "cache")))
    mapped = dataset.rows.files[0]
    mapped.chmod(0o644)
    dataset.open()
    with open(mapped, "r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptCacheError):
        dataset.verify()


def test_a_random_sampler_shows_every_row_once(job: DatasetJob) -> None:
    dataset = DistillationDataset(job).open()
    loader = DataLoader(dataset, batch_size=BATCH, sampler=RandomSampler(dataset))
    assert sorted(torch.cat([batch["row"] for batch in loader]).tolist()) == list(range(len(dataset)))


def test_workers_decode_pictures_that_stay_encoded(tmp_path: Path) -> None:
    data = DataSpec(
        train=ImageFolder(path=str(pictures.of_classes(tmp_path / "pictures", 30))),
        validation=0.2,
        test=0.2,
        image=Image(size=6, keep="encoded"),
        views=2,
        augmentation=RandomResizedCropFlip(),
    )
    splits = prepare(data, tmp_path / "cache")
    job = DatasetJob(data, "train", splits.fingerprints, str(tmp_path / "cache"), None, batch=5)
    dataset = DistillationDataset(job).open()
    expected = [dataset[list(range(first, first + 6))] for first in (0, 6)]  # with threads of this process
    loader = DataLoader(dataset, batch_size=6, num_workers=1, multiprocessing_context="fork")
    assert all(map(same, loader, expected))
    assert expected[0]["inputs"].shape == (6, 3, 6, 6)
    ours = [batch["row"].tolist() for batch in whole(job, 1)]
    batches = DataLoader(DistillationBatches(job, 1).open(), batch_size=None, num_workers=2)
    assert [batch["row"].tolist() for batch in batches] == ours
