"""Train rows without labels: the order of mixed batches, their loss, and cohorts whose stages show different rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill import lockstep
from akd_dist.distill.dataset import DatasetJob, DistillationBatches
from akd_dist.distill.objectives import KdStage, row_losses
from akd_dist.distill.orders import LABELLED, WINDOWS_AT_ONCE, Batches, Mix
from akd_dist.distill.stream import Batch, BatchStream
from akd_dist.distill.student import Student
from akd_dist.distill.trial import try_training
from akd_dist.documents.damage import read_result
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.windows import demands_of
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import LastBatch, NoAugmentation, Recipe, StudentSpec
from akd_dist.storage.layout import StoreLayout
from akd_dist.storage.node_cache import _used
from akd_dist.storage.reader import open_store
from tests.data.test_unlabelled import no_train
from tests.distill.test_windows import StoppedError, sizes_noted
from tests.fleets import ANNEALING, CONTINUATION, HARD, KD, a_recipe, a_student, a_teacher, stores_of, weights

MIXED = Batches(rows=100, labelled=17, batch=12, mix=Mix("all", labelled=5))


def epoch_of(batches: Batches, epoch: int, window: int | None = None) -> list[np.ndarray]:
    order = batches.order(0, epoch, window)
    starts = range(0, batches.steps * batches.batch, batches.batch)
    return [order.rows(start, int(end)) for start, end in zip(starts, batches.ends, strict=True)]


# ---- orders


@pytest.mark.parametrize("last_batch", ["keep", "drop", "merge"])
def test_an_epoch_of_mixed_batches_passes_the_rows_without_labels_once(last_batch: LastBatch) -> None:
    batches = Batches(100, 17, 12, last_batch, Mix("all", labelled=5))
    shown = epoch_of(batches, epoch=1)
    assert [int((rows < 17).sum()) for rows in shown] == [5] * batches.steps
    others = np.concatenate([rows[rows >= 17] for rows in shown])
    assert len(np.unique(others)) == len(others) == {"keep": 83, "drop": 77, "merge": 83}[last_batch]
    assert [len(rows) for rows in shown[:-1]] == [12] * (batches.steps - 1)
    assert len(shown[-1]) == {"keep": 5 + 6, "drop": 12, "merge": 12 + 6}[last_batch]


def test_those_with_labels_go_round_through_all_epochs() -> None:
    labelled = np.concatenate([rows[rows < 17] for epoch in range(4) for rows in epoch_of(MIXED, epoch)])
    rounds = [labelled[start : start + 17] for start in range(0, len(labelled) - 16, 17)]
    assert len(rounds) > 10
    assert all(sorted(one.tolist()) == list(range(17)) for one in rounds)
    assert len({one.tobytes() for one in rounds}) == len(rounds)


@pytest.mark.parametrize("window", [None, 8])
def test_workers_shares_are_the_batch_and_groups_hold_their_rows(window: int | None) -> None:
    order, step = MIXED.order(0, 2, window), 3
    start, stop = step * 12, int(MIXED.ends[step])
    whole = order.rows(start, stop)
    assert np.concatenate([order.rows(start, start + 5), order.rows(start + 5, stop)]).tolist() == whole.tolist()
    halves = [int((half < 17).sum()) for half in np.array_split(whole, 2)]
    assert max(halves) - min(halves) <= 1  # they lie evenly
    for step, end in enumerate(MIXED.ends.tolist()):
        cuts = order.cut(step * 12, end)
        assert (cuts[0][2], cuts[-1][3]) == (step * 12, end)
        for group, _, first, after in cuts:
            held = np.concatenate([np.arange(*span) for span in order.spans(group)])
            assert np.isin(order.rows(first, after), held).all()
            assert len(held) <= (100 if window is None else 17 + WINDOWS_AT_ONCE * 8)


def test_stages_on_labels_show_those_rows_alone() -> None:
    batches = Batches(100, 17, 12, mix=LABELLED)
    assert sorted(np.concatenate(epoch_of(batches, 0)).tolist()) == list(range(17))
    assert np.array_equal(epoch_of(batches, 3)[0], epoch_of(Batches(17, 17, 12), 3)[0])


# ---- the loss


def images(rows: int, labelled: int) -> Rows:
    generator = np.random.default_rng(rows)
    labels = np.where(np.arange(rows) < labelled, generator.integers(3, size=rows), -1)
    inputs = generator.integers(256, size=(rows, 1, 4, 4)).astype(np.uint8)
    return Rows(inputs, labels, 3, sha256(inputs.tobytes()), (), Path(), with_labels=labelled)


def kd_loss(z: Tensor, batch: Batch, alpha: float, temperature: float) -> Tensor:
    """KD in torch's own words: the mean of the labels' part over those that have one, of the teacher's over all."""
    known = batch.labels >= 0
    assert batch.logits is not None
    teacher = functional.log_softmax(batch.logits / temperature, dim=1)
    divergence = functional.kl_div(
        functional.log_softmax(z / temperature, dim=1), teacher, reduction="batchmean", log_target=True
    )
    labels = functional.cross_entropy(z[known], batch.labels[known]) if known.any() else torch.zeros(())
    return (1 - alpha) * labels + alpha * temperature**2 * divergence


@pytest.mark.parametrize("labelled", [None, 5])
def test_the_labels_part_is_the_mean_over_rows_that_have_one(labelled: int | None, tmp_path: Path) -> None:
    rows = images(100, 17 if labelled else 4)
    logits = np.random.default_rng(1).normal(size=(1, 100, 3)).astype(np.float32)
    stream = BatchStream(rows, logits, NoAugmentation(), 0, 1, batch=12).of(Mix("all", labelled))
    spec = StudentSpec.model_validate(a_student("one", objective=KD, batch=12, labelled=labelled, gpus=1.0))
    student = Student(spec, ModelCard.of(spec.model, rows, None), tmp_path)
    seen = set()
    for batch in stream.batches(0):
        z = torch.randn(len(batch.rows), 3, requires_grad=True)
        loss = row_losses(student.stage, 0, z, batch.logits, batch.labels, batch.label_weight).sum() / batch.global_rows
        expected = kd_loss(z, batch, 0.5, 5.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z), strict=True):
            torch.testing.assert_close(ours, theirs)
        student.take_step(batch, stream.steps_per_epoch)
        seen.add(batch.global_labelled)
    assert seen == {5} if labelled else {0, 1} <= seen  # a shuffle leaves some batches without any label


def test_a_number_that_is_missing_has_neither_loss_nor_gradient() -> None:
    z = torch.tensor([[1.0], [2.0]], requires_grad=True)
    labels, teacher = torch.tensor([float("nan"), 5.0]), torch.zeros(2, 1)
    losses = row_losses(KdStage(1, softening=1.0, alpha=0.25), 0, z, teacher, labels, label_weight=2.0)
    assert losses.tolist() == [0.25, 0.75 * 2 * 9 + 0.25 * 4]
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad[:, 0].tolist() == [0.25 * 2, 0.75 * 2 * -6 + 0.25 * 4]


# ---- cohorts

DATA = {
    "train": {"kind": "digits"},
    "views": 2,
    "augmentation": {"kind": "shift", "pixels": 1},
    "subset": 150,
    "unlabelled": "rest",
}
FLEET = [
    a_student("annealing", objective=ANNEALING),
    a_student("other-annealing", objective=ANNEALING | {"stage2_epochs": 2}),
    a_student("hard", objective=HARD),
    a_student("kd", objective=KD),
    a_student("mixed", objective=KD, labelled=16),
    a_student("continuation", objective=CONTINUATION, labelled=16),
    a_student("stage1", objective=ANNEALING | {"stage2_epochs": 0}),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe(FLEET, data=DATA, checkpoint_seconds=0.001)


@pytest.fixture(scope="module")
def together(recipe: Recipe, stores: dict[str, str], home: Path) -> dict[str, str]:
    train_in_process(recipe, stores, run=home / "run", cache_root=str(home / "cache"))
    return weights(home / "run")


def test_weights_are_the_same_alone(
    recipe: Recipe, stores: dict[str, str], together: dict[str, str], home: Path
) -> None:
    for name in ("mixed", "hard", "annealing"):
        alone = a_recipe([one for one in FLEET if one["name"] == name], data=DATA)
        train_in_process(alone, stores, run=home / name, cache_root=str(home / "cache"))
        assert weights(home / name)[name] == together[name]


@pytest.mark.parametrize("nth", [40, 75, 130])
def test_a_run_goes_on_in_the_middle_of_any_epoch(
    nth: int, recipe: Recipe, stores: dict[str, str], together: dict[str, str], home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, passed = home / f"cut-{nth}", list[str]()

    def failpoint(site: str) -> None:
        passed.append(site)
        if passed.count("cohort.after_batch") == nth:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(lockstep, "failpoint", failpoint)
        with pytest.raises(StoppedError):
            train_in_process(recipe, stores, run=run, cache_root=str(home / "cache"))
    train_in_process(recipe, stores, run=run, cache_root=str(home / "cache"))
    assert weights(run) == together


def test_batches_for_other_trainers_have_as_many_labels_as_they_are_asked_for(
    recipe: Recipe, stores: dict[str, str], home: Path
) -> None:
    """In the very batches of our own stages."""
    splits = prepare(recipe.data, home / "cache")
    job = DatasetJob(recipe.data, "train", splits.fingerprints, str(home / "cache"), stores["train"], batch=64)
    ours = BatchStream(splits.train, None, NoAugmentation(), recipe.data.seed, 2, batch=64)
    for labelled, mix in ((None, Mix("all")), (16, Mix("all", 16)), (64, LABELLED)):
        batches = DistillationBatches(replace(job, labelled=labelled), epoch=3)
        expected = [batch.rows.tolist() for batch in ours.of(mix).batches(3)]
        assert [batch["row"].tolist() for batch in batches] == expected
        assert len(batches) == len(expected)
    for labelled in (0, 65):
        with pytest.raises(RecipeError, match="the argument labelled"):
            len(DistillationBatches(replace(job, labelled=labelled)))
    with pytest.raises(RecipeError, match="some have a label and others have none") as refused:
        len(DistillationBatches(replace(job, split="test", store=None, labelled=16)))
    assert "test rows with a label, 0 without" in str(refused.value.got)


def test_the_stream_passes_each_mix_once(recipe: Recipe, home: Path) -> None:
    """What the planner counts is what the loop reads."""
    splits = prepare(recipe.data, home / "cache")
    costs, rows, steps = CostModel.of(recipe, splits, {}, {}), splits.train, 0
    for mix, epochs in ((Mix("all"), 3), (LABELLED, 3 + 1), (Mix("all", 16), 3)):
        steps += epochs * Batches(len(rows), rows.labelled, 64, mix=mix).steps
    assert rows.labelled == 150
    assert costs.stream_steps(tuple(recipe.students)) == steps
    by_name = {spec.name: spec for spec in recipe.students}
    all_rows = -(-len(rows) // 64)
    assert costs.steps_left(by_name["annealing"]) == 2 * all_rows + 3
    assert costs.steps_left(by_name["hard"]) == 3 * 3
    assert costs.steps_left(by_name["mixed"]) == 3 * -(-rows.unlabelled // 48)
    assert costs.steps_left(by_name["stage1"]) == 2 * all_rows


def test_windows_give_the_same_weights_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that holds no whole view: the rows with labels lie in it beside each group of windows."""
    monkeypatch.setattr(StoreLayout, "chunk_rows", 16)
    students = [one for one in FLEET if one["name"] in ("mixed", "hard")]
    recipe = a_recipe(students, data=DATA | {"window": 16})
    stores = stores_of(recipe, a_teacher(recipe, tmp_path / "teacher", tmp_path / "cache"), tmp_path)
    train_in_process(recipe, stores, run=tmp_path / "run", cache_root=str(tmp_path / "cache"))
    splits = prepare(recipe.data, tmp_path / "rows")
    budget = _used(tmp_path / "rows") + len(splits.train) * 4 * 9  # nine tenths of a view
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(budget))
    sizes = sizes_noted(monkeypatch)
    train_in_process(recipe, stores, run=tmp_path / "windows", cache_root=str(tmp_path / "small"))
    assert weights(tmp_path / "windows") == weights(tmp_path / "run")
    assert len(sizes) > 10
    assert max(sizes) <= budget
    demands = demands_of(recipe, splits, recipe.students, [])
    assert demands.beside == 150
    assert demands.at_least(budget, 16) == budget


def test_agreement_with_labels_is_of_the_rows_that_have_some(
    recipe: Recipe, stores: dict[str, str], home: Path
) -> None:
    store, rows = open_store(stores["train"]), prepare(recipe.data, home / "cache").train
    for shard, record in zip(store.layout.shards(), store.manifest.records(), strict=True):
        said = store.rows(shard.view, shard.start, shard.stop).argmax(axis=1)
        known = rows.labels[shard.start : shard.stop] >= 0
        expected = float(np.mean(said[known] == rows.labels[shard.start : shard.stop][known])) if known.any() else None
        assert record.label_agreement == expected
    assert store.manifest.dataset["labelled"] == 150


# ---- no labels at all


def test_rows_without_any_label(tmp_path: Path) -> None:
    learned = {"kind": "mlp", "hidden": 8}
    students = [
        a_student("kd", model=learned, objective=KD | {"alpha": 1.0}, batch=16),
        a_student("stage1", model=learned, objective=ANNEALING | {"stage2_epochs": 0}, batch=16),
    ]
    data = no_train(tmp_path).model_dump(mode="json")
    recipe = a_recipe(students, data=data, teacher={"weights": str(tmp_path / "teacher")})
    card = ModelCard.of(recipe.students[0].model, prepare(recipe.data, tmp_path / "cache").train, None)
    save_model(tmp_path / "teacher", build(card, seed=7), card)
    stores = stores_of(recipe, str(tmp_path / "teacher"), tmp_path)
    train_in_process(recipe, stores, run=tmp_path / "run", cache_root=str(tmp_path / "cache"))
    for name in ("kd", "stage1"):
        result = read_result(tmp_path / "run" / "students" / name)
        assert result is not None
        assert result.state == "done"


# ---- what is refused


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"objective": KD, "labelled": 60}, ["labelled: 60 cannot be made", "5 train rows with labels"]),
        ({"objective": HARD, "last_batch": "drop"}, ["there is no batch", "5 train rows with labels, batch: 64"]),
    ],
)
def test_batches_that_cannot_be_made(student: dict[str, Any], words: list[str]) -> None:
    spec = StudentSpec.model_validate(a_student("one", **student))
    data = a_recipe(FLEET, data=DATA).data
    with pytest.raises(RefusedError) as caught:
        try_training(spec.model, [("the student one", spec)], images(100, 5), data)
    for word in words:
        assert word in str(caught.value)


def test_a_mix_of_rows_that_all_have_labels() -> None:
    spec = StudentSpec.model_validate(a_student("one", objective=KD, labelled=4))
    with pytest.raises(RefusedError, match="labelled: 4 cannot be made"):
        try_training(spec.model, [("the student one", spec)], images(100, 100), a_recipe(FLEET, data=DATA).data)
