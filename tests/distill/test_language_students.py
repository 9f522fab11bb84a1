"""Language students from stores of targets: alone and among others, resumed, cut into micro-batches and workers."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.distill.beginnings import make_optimizer, seeded_states
from akd_dist.distill.cohort import known_of_language, open_stream, train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.distill.language_step import Scored
from akd_dist.distill.language_trial import try_language_model
from akd_dist.distill.orders import epoch_order
from akd_dist.distill.output_head import Head
from akd_dist.distill.probe import probe
from akd_dist.distill.ranks import joined
from akd_dist.distill.schedules import learning_rate
from akd_dist.distill.sparse_losses import Annealed, Labels, Mixed, Softened, Squared, Term, loss_of
from akd_dist.distill.student import Student
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.windows import row_and_piece
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic, set_generator_states
from akd_dist.models.folder import load_model
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Cosine, HuggingFaceLm, Linear, Recipe
from tests.fleets import weights
from tests.language_models import LLAMA
from tests.language_stores import ANNEALING, TOP_K, a_corpus, a_recipe, a_student, a_teacher, logits_of, stores_of
from tests.survivors import FORKS, train
from tests.tiny_transformers import library

COSINE = {"kind": "cosine", "warmup": 0.2}
FLEET = [
    a_student("entropy"),
    a_student("squared", objective=ANNEALING | {"stage1_loss": "squared"}),
    a_student("uncentred", objective=ANNEALING | {"stage1_loss": "squared", "center": False}),
    a_student("kd", objective={"kind": "kd", "epochs": 2, "temperature": 2.0}),
    a_student("labels", objective={"kind": "hard_labels", "epochs": 2}),
    a_student("continuation", objective={"kind": "continuation_kd", "epochs": 3, "tau_max": 2, "margin": 0.1}),
    a_student("micro", micro_batch=4, gradient_checkpointing=True),
    a_student("bfloat16", precision="bfloat16"),
    a_student("clipped", optimizer={"kind": "sgd", "lr": 0.3, "clip": 0.1, "schedule": COSINE}),
]
EXPLODING = {"kind": "adamw", "lr": 1e30}


@dataclasses.dataclass(frozen=True)
class Home:
    """A recipe with its rows and stores."""

    folder: Path
    recipe: Recipe
    splits: Splits
    stores: dict[str, str]

    def job(self, run: Path, *names: str, **changes: Any) -> CohortJob:
        (run / "control").mkdir(parents=True, exist_ok=True)
        base = fleet_job(self.recipe, self.splits, self.stores, run, str(self.folder / "cache"))
        students = tuple(spec for spec in self.recipe.students if not names or spec.name in names)
        return dataclasses.replace(base, **{"students": students, **changes})

    def student(self, name: str, tmp_path: Path, **changes: Any) -> Student:
        spec = next(one for one in self.recipe.students if one.name == name).model_copy(update=changes)
        return Student(spec, ModelCard.of(spec.model, self.splits.train, None), tmp_path / name)


def a_home(folder: Path, encoding: Any) -> Home:
    recipe = a_recipe(a_corpus(folder), FLEET, cache={"encoding": encoding})
    return Home(folder, recipe, prepare(recipe.data, folder / "cache"), stores_of(recipe, folder))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return a_home(tmp_path_factory.mktemp("described"), TOP_K)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return a_home(tmp_path_factory.mktemp("dense"), "float32")


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> dict[str, str]:
    train_cohort(home.job(home.folder / "undisturbed"))
    return weights(home.folder / "undisturbed")


def result_of(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "students" / name / "result.json").read_bytes())
    return found


def test_a_student_among_others_ends_as_alone(home: Home, undisturbed: dict[str, str], tmp_path: Path) -> None:
    assert len(set(undisturbed.values())) == len(FLEET)
    for name in ("entropy", "squared", "kd", "continuation", "micro"):
        train_cohort(home.job(tmp_path, name))
    assert weights(tmp_path).items() <= undisturbed.items()


def test_killed_and_called_again_it_ends_with_the_very_weights(
    home: Home, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    names = ("entropy", "squared", "micro")
    job = home.job(tmp_path, *names, checkpoint_seconds=0.001)
    process = FORKS.Process(target=train, args=(job, "cohort.after_batch:6"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train_cohort(dataclasses.replace(job, attempt=2))
    assert weights(tmp_path) == {name: undisturbed[name] for name in names}


def one_of_two(rank: int, job: CohortJob, queue: multiprocessing.Queue[Any]) -> None:
    """One of two workers of a cohort."""

    def broadcast(value: Any) -> Any:
        if rank > 0:
            return queue.get()
        queue.put(value)
        return value

    with joined(rank, 2, "cpu", "127.0.0.1", broadcast) as ranks:
        train_cohort(job, ranks)


def test_two_workers_come_to_what_one_does(home: Home, tmp_path: Path) -> None:
    """In float64, with a last batch of one block, of which one worker has none; one that diverges ends on both."""
    batch = (len(home.splits.train) - 1) // 2
    model = home.recipe.students[0].model.model_copy(update={"dropout": 0.0})
    same = {"batch": batch, "precision": "float64", "model": model, "micro_batch": 5}
    named = [one for one in home.recipe.students if one.name in ("entropy", "squared", "kd", "continuation")]
    specs = [one.model_copy(update=same) for one in named]
    bad = a_recipe(home.folder / "corpus.jsonl", [a_student("bad", optimizer=EXPLODING)]).students[0]
    specs.append(bad.model_copy(update={"batch": batch}))
    assert len(home.splits.train) % batch == 1
    train_cohort(home.job(tmp_path / "one", students=tuple(specs)))
    job = home.job(tmp_path / "two", students=tuple(one.model_copy(update={"workers": 2}) for one in specs))
    queue = FORKS.Queue()
    workers = [FORKS.Process(target=one_of_two, args=(rank, job, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert result_of(tmp_path / "two", "bad")["state"] == "diverged"
    for one in named:
        alone, shared = (
            safetensors.torch.load_file(tmp_path / run / "students" / one.name / "model.safetensors")
            for run in ("one", "two")
        )
        assert all(torch.allclose(alone[key], shared[key], rtol=0, atol=1e-9) for key in alone), one.name


def test_what_it_leaves(home: Home, undisturbed: dict[str, str]) -> None:
    run = home.folder / "undisturbed"
    result = result_of(run, "entropy")
    assert result["state"] == "done"
    test, rows = result["test"], home.splits.test
    assert list(test) == [
        *("cross_entropy", "perplexity", "bits_per_byte", "accuracy", "agreement", "divergence", "loss")
    ]
    assert result["agreement"] == test["agreement"]
    module = load_model(str(run / "students" / "entropy"))
    assert isinstance(module, LanguageModel)
    z = logits_of(module, torch.from_numpy(np.array(rows.inputs)), rows.classes)
    labels = Scored.of(torch.from_numpy(np.array(rows.inputs))).labels
    entropy = torch.nn.functional.cross_entropy(z, labels)
    assert test["cross_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert test["perplexity"] == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert test["accuracy"] == pytest.approx(float((z.argmax(1) == labels).float().mean()), abs=1e-6)
    text = int((labels < 256).sum())  # ids of bytes; the end of a document is no text
    assert test["bits_per_byte"] == pytest.approx(float(entropy) * len(labels) / np.log(2) / text, rel=1e-5)
    said = logits_of(a_teacher(home.splits.train), torch.from_numpy(np.array(rows.inputs)), rows.classes)
    assert test["agreement"] == pytest.approx(float((z.argmax(1) == said.argmax(1)).float().mean()), abs=1e-6)
    assert test["divergence"] > 0
    records = [json.loads(line) for line in (run / "students" / "entropy" / "metrics.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["temperature"]) for one in records] == [
        *(("annealing", 2), ("annealing", 1), ("hard_labels", None))
    ]
    assert set(records[0]["validation"]) == set(test)
    assert not (run / "students" / "entropy" / "test.parquet").exists()


def test_the_lowest_cross_entropy_is_the_best(home: Home, tmp_path: Path) -> None:
    student = home.student("labels", tmp_path)
    scores = iter([3.0, 2.0, 2.5])
    for _ in range(2):
        student.loss_rows = 1
        value = next(scores)
        student.end_epoch(home.splits.validation, {"loss": value, "cross_entropy": value})
    assert student.best_record["validation"]["cross_entropy"] == 2.0
    student.loss_rows = 1
    student.end_epoch(home.splits.validation, {"loss": 2.5, "cross_entropy": 2.5})
    assert student.best_record["validation"]["cross_entropy"] == 2.0


def test_one_that_diverges_ends_alone(home: Home, undisturbed: dict[str, str], tmp_path: Path) -> None:
    bad = a_recipe(home.folder / "corpus.jsonl", [a_student("bad", optimizer=EXPLODING)]).students[0]
    specs = home.job(tmp_path, "entropy").students
    train_cohort(home.job(tmp_path, students=(bad, *specs)))
    assert result_of(tmp_path, "bad")["state"] == "diverged"
    assert "the loss is" in result_of(tmp_path, "bad")["reason"]
    assert weights(tmp_path) == {"entropy": undisturbed["entropy"]}


@pytest.mark.parametrize("name", ["entropy", "squared", "kd", "continuation", "labels"])
@pytest.mark.parametrize("described", [True, False])
def test_micro_batches_give_the_same_gradient(
    home: Home, dense: Home, tmp_path: Path, name: str, described: bool
) -> None:
    at = home if described else dense
    batch = next(iter(open_stream(at.job(tmp_path), at.splits)[0].batches(0)))
    found = []
    for size in (None, 1, 5):
        model = at.recipe.students[0].model.model_copy(update={"dropout": 0.0})
        student = at.student(name, tmp_path / str(size), micro_batch=size, precision="float64", model=model)
        loss, count = student._gradients(batch, 0.0)
        assert count == int(batch.labels.sum())
        found.append((loss, [one.grad.clone() for one in student.module.parameters() if one.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-12)


ONLINE: dict[str, Callable[[Targets, torch.Tensor, float], Term]] = {
    "entropy": lambda targets, labels, phi: Annealed(targets, phi),
    "squared": lambda targets, labels, phi: Squared(targets, phi, center=True),
    "kd": lambda targets, labels, phi: Mixed(((0.5, Labels(labels)), (0.5, Softened(targets, 2.0)))),
    "micro": lambda targets, labels, phi: Annealed(targets, phi),
}


@pytest.mark.parametrize(("name", "llama"), [*((name, False) for name in ONLINE), ("micro", True), ("squared", True)])
def test_from_dense_targets_it_is_the_loop_with_its_teacher(
    dense: Home, tmp_path: Path, name: str, llama: bool
) -> None:
    """Bit for bit: the loop makes the teacher's targets of every batch by the functions that caching uses."""
    spec = next(one for one in dense.recipe.students if one.name == name)
    if llama:  # whose vocabulary has ids that the data has not
        spec = spec.model_copy(update={"model": a_llama(tmp_path / "llama")})
    device, rows = set_deterministic("cpu", 1), dense.splits.train
    teacher, losses = a_teacher(rows), []
    before = torch.get_rng_state()
    set_generator_states(device, seeded_states(device, spec.seed, 0, 0))
    module = build(ModelCard.of(spec.model, rows, None))
    assert isinstance(module, LanguageModel)
    steps = -(-len(rows) // spec.batch)
    optimizer = make_optimizer(module.parameters(), spec.optimizer)
    for epoch in range(2):
        module.train()
        order = epoch_order(len(rows), 0, epoch)
        for step in range(steps):
            numbers = order[step * spec.batch : (step + 1) * spec.batch]
            whole = torch.from_numpy(np.asarray(rows.inputs.take(numbers, axis=0)))
            count, total = len(Scored.of(whole).labels), 0.0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec.optimizer.lr, spec.optimizer.schedule, epoch * steps + step, 2 * steps)
            optimizer.zero_grad()
            for blocks in torch.split(whole, spec.micro_batch or len(whole)):
                scored, targets = Scored.of(blocks), DenseTargets(logits_of(teacher, blocks, rows.classes))
                h = module.hidden(blocks).flatten(0, 1).index_select(0, scored.places)
                term = ONLINE[name](targets, scored.labels, (0.5, 1.0)[epoch])
                loss = loss_of(h, Head(module.output_weight).cut(rows.classes), term, total=float(count))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            optimizer.step()
            losses.append(total * count)
    torch.set_rng_state(before)

    stream, ours = open_stream(dense.job(tmp_path), dense.splits)[0], []
    student = Student(spec, ModelCard.of(spec.model, rows, None), tmp_path / name)
    for epoch in range(2):
        for batch in stream.batches(epoch):
            student.loss_sum = 0.0
            student.take_step(batch, stream.steps_per_epoch)
            ours.append(student.loss_sum)
        if epoch == 0:
            student.epoch, student.step = 1, 0
    assert len(losses) == 2 * steps
    assert ours == losses
    both = zip(student.module.state_dict().values(), module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


def a_llama(folder: Path) -> HuggingFaceLm:
    """A small model of transformers, to be trained from random weights."""
    library().LlamaConfig(**LLAMA | {"vocab_size": 300}).save_pretrained(folder)
    return HuggingFaceLm(path=str(folder), pretrained=False)


def test_epochs_of_some_steps_go_on_in_the_rows(home: Home, tmp_path: Path) -> None:
    job = home.job(tmp_path)
    whole = open_stream(job, home.splits)[0]
    short = dataclasses.replace(whole, epoch_steps=2)
    assert whole.steps_per_epoch > 2
    plain = [batch.rows.tolist() for epoch in range(3) for batch in whole.batches(epoch)]
    cut = [(batch.epoch, batch.step, batch.rows.tolist()) for epoch in range(5) for batch in short.batches(epoch)]
    assert [rows for _, _, rows in cut] == plain[:10]
    assert [(epoch, step) for epoch, step, _ in cut] == [(epoch, step) for epoch in range(5) for step in range(2)]
    long = dataclasses.replace(whole, epoch_steps=whole.steps_per_epoch + 3)
    assert [batch.rows.tolist() for batch in long.batches(0)] == plain[: whole.steps_per_epoch + 3]
    assert [batch.rows.tolist() for batch in long.batches(0, 5)] == plain[5 : whole.steps_per_epoch + 3]


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(1.0, Linear(warmup=0.2), step, 10) for step in range(10)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert rates[2:] == pytest.approx([1 - done / 8 for done in range(8)])
    assert [learning_rate(2.0, Cosine(), step, 4) for step in (0, 2)] == [2.0, pytest.approx(1.0)]
    assert learning_rate(0.3, Linear(), 3, 7) == 0.3 * (1 - 3 / 7)


def test_a_head_that_is_not_linear_is_refused_where_it_has_to_be(home: Home) -> None:
    card = ModelCard.of(home.recipe.students[0].model, home.splits.train, None)
    module = build(card, seed=0)
    assert isinstance(module, LanguageModel)
    module.head_refusal = "softcapping behind the output layer"
    entropy, squared = home.recipe.students[0], home.recipe.students[1]
    try_language_model(module, card, home.splits.train, "the student entropy", entropy)
    with pytest.raises(RefusedError, match="squared norm of annealing_kd in the student squared needs logits"):
        try_language_model(module, card, home.splits.train, "the student squared", squared)


def test_a_store_of_other_rows_is_refused(home: Home, tmp_path: Path) -> None:
    swapped = dataclasses.replace(home.job(tmp_path), stores=home.stores | {"train": home.stores["test"]})
    with pytest.raises(RefusedError, match="has other targets than these rows"):
        open_stream(swapped, home.splits)
    wrong = dataclasses.replace(home.job(tmp_path), stores=home.stores | {"validation": home.stores["test"]})
    with pytest.raises(RefusedError):
        known_of_language(wrong, home.splits)


def test_a_probe_counts_the_logits_of_a_chunk(home: Home, tmp_path: Path) -> None:
    spec, rows = home.recipe.students[0], home.splits.train
    found = probe(home.recipe.data, "cpu", spec, home.splits, tmp_path, "auto", home.recipe.cache.encoding.config())
    assert not found.stacked
    assert "language model" in found.why
    assert found.step_memory > 4 * rows.classes * rows.targets * spec.batch // len(rows)
    assert min(found.step, found.evaluation) > 0
    row, piece = row_and_piece(home.recipe, rows)
    assert 20 * rows.targets / len(rows) < row < 80 * rows.targets / len(rows)
    assert piece >= 1


def test_keys_of_later_are_not_in_identities() -> None:
    plain = a_recipe(Path("corpus.jsonl"), [a_student("one")])
    said = json.dumps(plain.identity())
    for key in ("micro_batch", "gradient_checkpointing", "epoch_steps", "stage1_loss", "center", "warmup", "eps"):
        assert key not in said
    changed = a_recipe(Path("corpus.jsonl"), [a_student("one", micro_batch=4)])
    assert changed.identity() != plain.identity()
    dumped = changed.model_dump(mode="json")
    assert Recipe.model_validate(dumped).model_dump(mode="json") == dumped


def test_padding_rows_of_a_head_are_cut(home: Home, tmp_path: Path) -> None:
    """A head with more rows than ids: the same losses, and no gradient in them."""
    batch = next(iter(open_stream(home.job(tmp_path), home.splits)[0].batches(0)))
    student = home.student("entropy", tmp_path)
    assert isinstance(student.module, LanguageModel)
    loss, _ = student._gradients(batch, 0.0)
    scored, classes = Scored.of(batch.inputs), student.card.classes
    h = student.module.hidden(batch.inputs).flatten(0, 1).index_select(0, scored.places).detach()
    padded = torch.cat([student.module.output_weight.detach(), torch.full((7, h.shape[1]), 9.0)]).requires_grad_()
    loss_of(h, Head(padded), Labels(scored.labels, classes)).backward()  # type: ignore[no-untyped-call]
    assert padded.grad is not None
    assert not padded.grad[classes:].any()
    assert np.isfinite(loss)


def test_micro_batches_are_for_language_models() -> None:
    with pytest.raises(ValueError, match="micro_batch is for language models"):
        a_recipe(Path("corpus.jsonl"), [a_student("one", model={"kind": "mlp", "hidden": 4}, micro_batch=2)])
    with pytest.raises(ValueError, match="center is for the squared norm"):
        a_student_of({"stage1_loss": "cross_entropy", "center": True})
    low = {"kind": "kd", "epochs": 1, "temperature": 0.5}
    with pytest.raises(ValueError, match=r"asked for at T = 0\.5"):
        a_recipe(Path("corpus.jsonl"), [a_student("one", objective=low)])
    own = {"kind": "custom", "factory": "mine:loss", "epochs": 1}
    with pytest.raises(ValueError, match="language models never hold at once"):
        a_recipe(Path("corpus.jsonl"), [a_student("one", objective=own)])


def a_student_of(changes: dict[str, Any]) -> Recipe:
    return a_recipe(Path("corpus.jsonl"), [a_student("one", objective=ANNEALING | changes)])
