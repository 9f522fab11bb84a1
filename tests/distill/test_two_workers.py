"""Two data-parallel workers, in plain processes over gloo, against one worker and against themselves resumed."""

import math
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_norm import synchronise_batch_norms
from akd_dist.distill.delivery import deliver
from akd_dist.distill.ranks import OutOfStepError, PeerFailedError, Ranks, joined
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import DivergedError, Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import load_model
from akd_dist.recipe import NoAugmentation, StudentSpec as Spec, trust
from tests.fleets import ANNEALING, CONTINUATION, HARD, KD, TESTS
from tests.survivors import FORKS

BATCH = 32
OBJECTIVES: dict[str, dict[str, Any]] = {
    "annealing": ANNEALING | {"stage1_epochs": 3, "stage2_epochs": 2},
    "hard": HARD,
    "kd": KD,
    "takd": KD | {"kind": "takd"},
    "continuation": CONTINUATION | {"margin": 0.1},
    "own": {"kind": "custom", "factory": "tests.distill.test_two_workers:fading", "epochs": 3},
}
SGD = {"kind": "sgd", "lr": 0.2, "weight_decay": 1e-3, "clip": 0.2, "schedule": {"kind": "steps"}}
ADAMW = {"kind": "adamw", "lr": 0.01, "schedule": {"kind": "linear"}}
# The last batch of an epoch: three full batches, and then 5 rows, cut into 2 and 3; or 1 row, so that rank 0 has none.
LAST = {"partial": 3 * BATCH + 5, "single": 3 * BATCH + 1}
LABELLED = 30


def fading(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, epoch: int, epochs: int) -> torch.Tensor:
    """An objective as a user may write one: from the teacher's logits to the labels."""
    share = 1 - epoch / epochs
    distances = (student - teacher).square().mean(dim=1)
    return share * distances + (1 - share) * nn.functional.cross_entropy(student, labels, reduction="none")


def images(rows: int, seed: int) -> Rows:
    """Images of 8 x 8 whose class is told by where they are bright."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=rows)
    inputs = generator.integers(96, size=(rows, 1, 8, 8))
    inputs[np.arange(rows), 0, labels, labels] += 128
    return Rows(inputs.astype(np.uint8), labels, 3, sha256(inputs.tobytes()), (), Path())


VALIDATION, TEST = images(40, 1), images(40, 2)


def stream_of(last: str) -> BatchStream:
    rows = images(LAST[last.removesuffix(" unlabelled")], 0)
    logits = np.random.default_rng(3).normal(size=(2, len(rows), 3)) + 3 * np.eye(3)[rows.labels]
    if last.endswith("unlabelled"):
        labels = np.where(np.arange(len(rows)) < LABELLED, rows.labels, -1)
        rows = replace(rows, labels=labels, with_labels=LABELLED)
    return BatchStream(rows, logits.astype(np.float32), NoAugmentation(), seed=0, views=2, batch=BATCH)


class Normed(nn.Module):
    """Batch statistics, running statistics and dropout. From its third training step on, one of a kind may fail."""

    def __init__(self, classes: int, norm: type[nn.Module], fail: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, bias=False), norm(4)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(144, classes)
        self.fail, self.steps = fail, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.fail and self.steps == 3 and torch.distributed.get_rank() == 1:
            raise RuntimeError("out of luck")
        return self.last(self.drop(self.norm(self.first(x)).relu().flatten(1)))  # type: ignore[no-any-return]


class Reshaping(nn.Module):
    """A model that cannot be shown a batch of no rows, as those of `transformers` cannot."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.view(x.shape[0], -1, 16)).mean(dim=1)  # type: ignore[no-any-return]


def reshaping(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The factory of `Reshaping`."""
    return Reshaping(classes)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm that computes something of its own."""


def normed(
    input_shape: tuple[int, ...], classes: int, own: bool = False, fail: bool = False, unmade: bool = False
) -> nn.Module:
    """The factory of `Normed`, as a recipe names it."""
    if unmade and torch.distributed.get_rank() == 1:
        raise RuntimeError("only on worker 1")
    return Normed(classes, OwnNorm if own else nn.BatchNorm2d, fail)


def normed_model(**arguments: bool) -> dict[str, Any]:
    return {"kind": "custom", "factory": "tests.distill.test_two_workers:normed", "arguments": arguments}


MLP = {"kind": "mlp", "hidden": [12, 8]}
RESNET = {"kind": "resnet", "depth": 8, "width": 4}


def spec_of(objective: str, **changes: Any) -> Spec:
    document = {"name": "student", "model": MLP, "objective": OBJECTIVES[objective], "optimizer": SGD, "batch": BATCH}
    return trust(Spec.model_validate(document | changes), TESTS)


def made(spec: Spec, folder: Path, ranks: Ranks, rows: Rows) -> Student:
    set_deterministic("cpu", 1)
    return Student(spec, ModelCard.of(spec.model, rows, None), folder, ranks=ranks)


def train(student: Student, stream: BatchStream, until: tuple[int, int] | None = None) -> Student:
    """Train on; before the step (epoch, step), stop."""
    ranks = student.ranks
    while student.epoch < student.epochs:
        its = stream.of(student.mix_in(student.stage))
        for batch in its.batches(student.epoch, student.step, ranks.rank, ranks.world):
            if (student.epoch, student.step) == until:
                return student
            student.take_step(batch, its.steps_per_epoch)
        student.end_epoch(VALIDATION)
    return student


# ---- what is trained on one worker here, and on two in processes of their own

FLOAT64 = {
    **{
        f"{objective}-{last}": (spec_of(objective, precision="float64"), last)
        for objective in OBJECTIVES
        for last in LAST
    },
    # Rows without labels: each rank's share of the labels' part is of those that the whole batch has.
    **{
        f"{objective}-unlabelled": (spec_of(objective, precision="float64"), "single unlabelled")
        for objective in ("annealing", "kd", "continuation")
    },
    "kd-mixed": (spec_of("kd", precision="float64", labelled=5), "partial unlabelled"),
    "adamw-single": (spec_of("annealing", precision="float64", optimizer=ADAMW), "single"),
    "reshaping-single": (
        spec_of(
            "annealing",
            precision="float64",
            model={"kind": "custom", "factory": "tests.distill.test_two_workers:reshaping"},
        ),
        "single",
    ),
    "cnn-single": (spec_of("annealing", precision="float64", model={"kind": "cnn", "width": 4}), "single"),
    **{
        f"synchronised-{last}": (spec_of("annealing", precision="float64", model=RESNET, sync_batchnorm=True), last)
        for last in LAST
    },
}


def train_float64(name: str, folder: Path, ranks: Ranks) -> None:
    """Train to the end and deliver."""
    spec, last = FLOAT64[name]
    stream = stream_of(last)
    deliver(train(made(spec, folder, ranks, stream.rows), stream), TEST, None, folder / "log")


def first_gradients(objective: str, folder: Path, ranks: Ranks) -> None:
    """The gradients of the first step, in float32."""
    stream = stream_of("partial")
    student = made(spec_of(objective, optimizer=ADAMW), folder, ranks, stream.rows)
    student.take_step(next(stream.batches(0, 0, ranks.rank, ranks.world)), stream.steps_per_epoch)
    gradients = {name: one.grad for name, one in student.module.named_parameters() if one.grad is not None}
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(gradients, folder / "gradients.safetensors")


def state_of(student: Student) -> list[torch.Tensor]:
    """Everything that decides what this rank does next, but for the optimizer."""
    return [*student.module.state_dict().values(), *student.rng, torch.tensor([student.loss_sum, student.loss_rows])]


def resumes(place: str, folder: Path, ranks: Ranks) -> None:
    """A student with batch statistics and dropout, taken up from a checkpoint in the middle, ends as if undisturbed."""
    synchronised, position = place.split()
    epoch, step = map(int, position.split("."))
    spec = spec_of("annealing", model=normed_model(), sync_batchnorm=synchronised == "synchronised")
    stream = stream_of("partial")
    whole = train(made(spec, folder / "whole", ranks, stream.rows), stream)
    begun = train(made(spec, folder / "cut", ranks, stream.rows), stream, until=(epoch, step))
    begun.save()
    train(begun, stream, until=(epoch, step + 2))  # as far as it came before it was killed
    resumed = made(spec, folder / "cut", ranks, stream.rows)
    assert resumed.resume()
    assert (resumed.epoch, resumed.step) == (epoch, step)
    train(resumed, stream)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state_of(whole), state_of(resumed), strict=True))
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    generators = ranks.gather(whole.rng[0])
    assert not torch.equal(generators[0], generators[1])  # ranks drop other units
    deliver(whole, TEST, None, folder / "log")
    deliver(resumed, TEST, None, folder / "log")


def running_mean(module: nn.Module) -> torch.Tensor:
    return next(tensor for name, tensor in module.named_buffers() if name.endswith("running_mean")).clone()


def shares_at_stage_boundaries(_: str, folder: Path, ranks: Ranks) -> None:
    """Each rank sees other rows, and goes into stage II with the weights and running statistics of rank 0."""
    stream = stream_of("partial")
    student = made(spec_of("annealing", model=normed_model()), folder, ranks, stream.rows)
    train(student, stream, until=(2, 0))
    for batch in stream.batches(2, 0, ranks.rank, ranks.world):
        student.take_step(batch, stream.steps_per_epoch)
    # Another best epoch on rank 1 must not matter either.
    student.best_record = {"validation": {"accuracy": -1.0}}
    means = ranks.gather(running_mean(student.module))
    assert not torch.equal(means[0], means[1])
    record = student.end_epoch(VALIDATION)
    assert student.stage.name == "hard_labels"
    assert ranks.from_first(record["validation"]) == record["validation"]
    for name, tensor in student.module.state_dict().items():
        ours, theirs = ranks.gather(tensor)
        assert torch.equal(ours, theirs), name
    assert torch.equal(running_mean(student.module), means[0])


def one_failure_is_everybodys(_: str, folder: Path, ranks: Ranks) -> None:
    """Rank 1 fails before a batch norm where rank 0 waits for it: both leave the step, and nobody hangs."""
    stream = stream_of("partial")
    spec = spec_of("annealing", model=normed_model(fail=True), sync_batchnorm=True)
    student = made(spec, folder, ranks, stream.rows)
    train(student, stream, until=(0, 2))
    batches = stream.batches(0, 2, ranks.rank, ranks.world)
    with pytest.raises(
        PeerFailedError if ranks.rank == 0 else RuntimeError,
        match="^on worker 1: RuntimeError: out of luck$" if ranks.rank == 0 else "^out of luck$",
    ):
        student.take_step(next(batches), stream.steps_per_epoch)
    assert ranks.sum(1.0) == 2.0  # and they understand each other still
    student.take_step(next(batches), stream.steps_per_epoch)


def one_that_cannot_be_set_up(what: str, folder: Path, ranks: Ranks) -> None:
    """Where rank 1 cannot make the model, or rank 0 cannot read the checkpoint, neither of them goes on alone."""
    guilty, model = (1, normed_model(unmade=True)) if what == "model" else (0, MLP)
    if what == "checkpoint" and ranks.rank == 0:
        (folder / "checkpoints" / "1.ckpt").mkdir(parents=True)
    with pytest.raises(
        Exception, match="IsADirectoryError|Is a directory" if what == "checkpoint" else "only on worker 1"
    ) as raised:
        made(spec_of("annealing", model=model), folder, ranks, VALIDATION).resume()
    assert (type(raised.value) is PeerFailedError) == (ranks.rank != guilty)
    assert ranks.sum(1.0) == 2.0


def a_loss_that_is_no_number_on_one(_: str, folder: Path, ranks: Ranks) -> None:
    """The reason tells the loss of the whole batch, also on the rank whose own share is fine."""
    stream = stream_of("partial")
    student = made(spec_of("annealing"), folder, ranks, stream.rows)
    student.module.register_forward_hook(lambda *called: called[-1] * (math.nan if ranks.rank == 1 else 1.0))
    with pytest.raises(DivergedError, match="the loss is nan in epoch 0, step 0"):
        student.take_step(next(stream.batches(0, 0, ranks.rank, ranks.world)), stream.steps_per_epoch)


def out_of_step(_: str, folder: Path, ranks: Ranks) -> None:
    """Rank 1 fails in the backward pass, where rank 0 waits for its gradients: only its leaving ends that."""
    stream = stream_of("partial")
    student = made(spec_of("annealing"), folder, ranks, stream.rows)

    def unlucky(gradient: torch.Tensor) -> None:
        raise RuntimeError("out of luck")

    if ranks.rank == 1:
        student.module.register_forward_hook(lambda *called: called[-1].register_hook(unlucky) and None)
    with pytest.raises(RuntimeError, match="out of luck" if ranks.rank == 1 else "") as failed:
        student.take_step(next(stream.batches(0, 0, ranks.rank, ranks.world)), stream.steps_per_epoch)
    with pytest.raises(OutOfStepError, match=r"^student: RuntimeError: "):
        ranks.check_agreed(failed.value, "student")


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), ()),
    "1d-positions": (lambda: nn.BatchNorm1d(3), (5,)),
    "2d": (lambda: nn.BatchNorm2d(3), (4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2)),
    "averaging": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 2)),
    "forgetful": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 2)),
    "plain": (lambda: nn.BatchNorm1d(3, affine=False), ()),
}


def norms_like_torch(name: str, _: Path, ranks: Ranks) -> None:
    """Outputs, gradients and running statistics of two shares, even, uneven or empty, against torch's of the whole."""
    norm, positions = NORMS[name]
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(norm()).double() for _ in range(2))
    synchronise_batch_norms(ours, ranks.go_on)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for cut in (4, 1, 0, 8):
        share = slice(0, cut) if ranks.rank == 0 else slice(cut, 8)
        batch = torch.randn(8, 3, *positions, dtype=torch.float64) * 3 + 100
        whole, mine = batch.clone().requires_grad_(), batch[share].clone().requires_grad_()
        weight = torch.randn_like(batch)
        expected, got = theirs(whole), ours(mine)
        (expected * weight).sum().backward()
        (got * weight[share]).sum().backward()
        assert mine.grad is not None
        assert whole.grad is not None
        assert torch.allclose(got, expected[share], rtol=0, atol=1e-9)
        assert torch.allclose(mine.grad, whole.grad[share], rtol=0, atol=1e-9)
    for key, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], tensor, rtol=1e-12, atol=0), key
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.distributed.all_reduce(one.grad)
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-9)
    assert torch.allclose(ours.eval()(batch), theirs.eval()(batch), rtol=0, atol=1e-9)
    if not positions:
        with pytest.raises(ValueError, match="more than one value"):
            ours.train()(batch[: 1 - ranks.rank])


# ---- both workers

POSITIONS = ("0.2", "1.0", "2.3", "3.1", "4.2")  # epoch.step, in stage I (epochs 0 to 2) and in stage II
RESUMES = [f"{kind} {position}" for kind in ("separate", "synchronised") for position in POSITIONS]
Scenario = Callable[[str, Path, Ranks], None]
SCENARIOS: dict[str, tuple[Scenario, list[str]]] = {
    "norms": (norms_like_torch, list(NORMS)),
    "float64": (train_float64, list(FLOAT64)),
    "gradients": (first_gradients, list(OBJECTIVES)),
    "resumes": (resumes, RESUMES),
    "stages": (shares_at_stage_boundaries, [""]),
    "failure": (one_failure_is_everybodys, [""]),
    "setting up": (one_that_cannot_be_set_up, ["model", "checkpoint"]),
    "no number": (a_loss_that_is_no_number_on_one, [""]),
    "out of step": (out_of_step, [""]),  # the last one: afterwards they cannot talk any more
}


def both(rank: int, folder: Path, queue: "multiprocessing.Queue[Any]") -> None:
    """One of two workers: every scenario, one after the other; what went wrong in one goes into a file of its own."""

    def broadcast(value: Any) -> Any:
        if rank > 0:
            return queue.get()
        queue.put(value)
        return value

    with joined(rank, 2, "cpu", "127.0.0.1", broadcast) as ranks:
        for name, (scenario, cases) in SCENARIOS.items():
            for case in cases:
                place, problem = folder / name / case, ""
                try:
                    scenario(case, place, ranks)
                except Exception:
                    problem = traceback.format_exc()
                place.mkdir(parents=True, exist_ok=True)
                (place / f"problem-{rank}").write_text(problem)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of what two workers left."""
    folder = tmp_path_factory.mktemp("together")
    queue = FORKS.Queue()
    workers = [FORKS.Process(target=both, args=(rank, folder, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(900)
    yield folder
    for worker in workers:
        worker.kill()


def went_well(together: Path, name: str, case: str = "") -> Path:
    """The folder of a scenario, if no worker had a problem with it."""
    folder = together / name / case
    problems = [(folder / f"problem-{rank}").read_text() for rank in range(2)]
    assert problems == ["", ""], "\n".join(problems)
    return folder


def test_workers_that_cannot_reach_each_other_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("akd_dist.distill.ranks.MEETING_TIMEOUT", timedelta(seconds=1))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored afterwards
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = closed.getsockname()
    with (
        pytest.raises(MachineError, match="cannot reach each other"),
        joined(1, 2, "cpu", "127.0.0.1", lambda _: place),
    ):
        pass


@pytest.mark.parametrize("name", FLOAT64)
def test_in_float64_two_workers_deliver_what_one_does(name: str, together: Path, tmp_path: Path) -> None:
    train_float64(name, tmp_path, Ranks())
    folder = went_well(together, "float64", name)
    alone, shared = (safetensors.torch.load_file(place / "model.safetensors") for place in (tmp_path, folder))
    assert alone.keys() == shared.keys()
    assert {tensor.dtype for tensor in alone.values()} <= {torch.float64, torch.int64}
    for key, tensor in alone.items():
        assert torch.allclose(tensor, shared[key], rtol=0, atol=1e-9), key
    assert type(load_model(folder, TESTS)) is type(load_model(tmp_path, TESTS))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_float32_gradients_of_two_workers_and_one(objective: str, together: Path, tmp_path: Path) -> None:
    first_gradients(objective, tmp_path, Ranks())
    folder = went_well(together, "gradients", objective)
    alone, shared = (safetensors.torch.load_file(place / "gradients.safetensors") for place in (tmp_path, folder))
    for key, gradient in alone.items():
        assert (shared[key] - gradient).norm() <= 1e-6 * gradient.norm(), key


@pytest.mark.parametrize("place", RESUMES)
def test_two_workers_resume_to_the_bit(place: str, together: Path) -> None:
    folder = went_well(together, "resumes", place)
    whole, cut = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_stage_two_starts_from_the_state_of_rank_0(together: Path) -> None:
    went_well(together, "stages")


def test_failing_before_a_batch_norm_leaves_nobody_waiting(together: Path) -> None:
    went_well(together, "failure")


@pytest.mark.parametrize("what", ["model", "checkpoint"])
def test_failing_to_set_up_leaves_nobody_waiting(what: str, together: Path) -> None:
    went_well(together, "setting up", what)


def test_a_loss_that_is_no_number_on_one_worker_is_told_by_both(together: Path) -> None:
    went_well(together, "no number")


def test_a_failure_that_workers_cannot_agree_on_ends_the_workers(together: Path) -> None:
    went_well(together, "out of step")


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_over_workers_is_that_of_the_whole(name: str, together: Path) -> None:
    went_well(together, "norms", name)


def test_a_batch_norm_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the layer norm cannot take batch statistics") as refused:
        synchronise_batch_norms(Normed(3, OwnNorm, fail=False), Ranks().go_on)
    assert "OwnNorm" in str(refused.value.got)
    # One worker has nothing to synchronise.
    spec = spec_of("annealing", model=normed_model(own=True), sync_batchnorm=True)
    student = made(spec, tmp_path, Ranks(), VALIDATION)
    assert any(type(layer) is OwnNorm for layer in student.module.modules())
