"""Students that step together: each comes to the same bits in stacks of any size, and near to what steps alone give."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import vmap
from torch.nn import functional

from akd_dist.base.files import sha256
from akd_dist.data.rows import Rows
from akd_dist.distill.stack import Stack, Stacks
from akd_dist.distill.stack_evaluation import evaluate_together
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import DivergedError, Student
from akd_dist.distill.teacher import teacher_logits
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.recipe import Mlp, NoAugmentation, StudentSpec as Spec, trust
from tests.fleets import ANNEALING, CONTINUATION, DEVICE, HARD, KD, TESTS

ON = torch.device(DEVICE)
ROWS = 90  # batches of 32, 32 and 26
MLP = {"kind": "mlp", "hidden": [12, 9]}
BATCH_NORM = {"kind": "resnet", "depth": 8, "width": 2}
OBJECTIVES: list[dict[str, Any]] = [
    ANNEALING | {"tau_max": 2, "stage1_epochs": 3, "stage2_epochs": 3},
    ANNEALING | {"tau_max": 3, "stage1_epochs": 3, "stage2_epochs": 3, "reduction": "sum"},
    HARD | {"epochs": 6},
    KD | {"epochs": 6, "temperature": 3.0, "alpha": 0.3},
    KD | {"epochs": 6, "temperature": 2.0},
    CONTINUATION | {"epochs": 6, "tau_max": 2},
    CONTINUATION | {"epochs": 6, "tau_max": 3, "margin": 0.1},
]


def some_rows(classes: int = 7) -> tuple[Rows, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, size=(ROWS, 8, 8, 1), dtype=np.uint8).transpose(0, 3, 1, 2)
    labels = random.integers(0, classes, size=ROWS)
    logits = random.normal(size=(1, ROWS, classes)).astype(np.float16)
    return Rows(np.ascontiguousarray(inputs), labels, classes, sha256(b"rows"), (), Path()), logits


def raising(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, epoch: int, epochs: int
) -> torch.Tensor:
    """An objective that works for the first batch, of 32 rows like the second, and not for the last."""
    if len(student) < 32:
        raise ValueError("not today")
    return (student - teacher).square().mean(dim=1)


TRAIN, LOGITS = some_rows()
STREAM = BatchStream(TRAIN, LOGITS, NoAugmentation(), seed=0, views=1, batch=32, device=ON)


def a_student(folder: Path, number: int, *, together: bool = True, **changes: Any) -> Student:
    optimizer = {"kind": "adamw", "lr": 0.01}
    document = {"model": MLP, "objective": HARD | {"epochs": 6}, "optimizer": optimizer, "seed": number}
    spec = trust(Spec.model_validate(document | {"name": f"student-{number}"} | changes), TESTS)
    set_deterministic(DEVICE, 1)
    card = ModelCard.of(spec.model, TRAIN, None)
    return Student(spec, card, folder / spec.name, device=ON, together=together)


def mixed(folder: Path, count: int, **changes: Any) -> list[Student]:
    """Students of one architecture that differ in all else: objective, optimizer, clipping, schedule."""
    optimizers: list[dict[str, Any]] = [
        {"kind": "adamw", "lr": 0.01, "clip": 0.5},
        {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "schedule": {"kind": "linear"}},
        {"kind": "adamw", "lr": 0.003, "schedule": {"kind": "steps"}},
        {"kind": "sgd", "lr": 0.1, "momentum": 0.0},
    ]
    return [
        a_student(
            folder,
            number,
            objective=OBJECTIVES[number % len(OBJECTIVES)],
            optimizer=optimizers[number % len(optimizers)],
            **changes,
        )
        for number in range(count)
    ]


def train(students: Sequence[Student], epochs: int = 3) -> list[dict[str, torch.Tensor]]:
    stacks = Stacks({student.spec.name: 1000 for student in students})
    for epoch in range(epochs):
        for batch in STREAM.batches(epoch):
            assert stacks.take_step(students, batch, STREAM.steps_per_epoch) == {}
        measured = evaluated(stacks, students)
        for student in students:
            student.end_epoch(TRAIN, measured[student])
    return [state_of(student) for student in students]


def evaluated(stacks: Stacks, students: Sequence[Student]) -> dict[Student, dict[str, float]]:
    """The metrics of students on the rows, evaluated in the stacks that they step in."""
    found: dict[Student, dict[str, float]] = {}

    def measure(stack: Stack) -> None:
        found.update(
            {
                student: metrics
                for student, (metrics, _) in zip(stack.students, evaluate_together(stack, TRAIN), strict=True)
            }
        )

    assert stacks.each(students, measure) == {}
    return found


def state_of(student: Student) -> dict[str, torch.Tensor]:
    """Everything that a step depends on: weights, buffers, the optimizer's state, generators; and what was recorded."""
    found = {name: one.detach().clone() for name, one in student.module.state_dict().items()}
    for state in student.optimizer.state.values():
        found |= {f"optimizer.{name}": torch.as_tensor(one).clone() for name, one in state.items() if one is not None}
    found |= {f"generator.{index}": one.clone() for index, one in enumerate(student.rng)}
    said = [[record["train_loss"], *record["validation"].values()] for record in student.history]
    return found | {"records": torch.tensor(said, dtype=torch.float64)}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    "model",
    [MLP, MLP | {"dropout": 0.3}, {"kind": "mlp", "hidden": 1}, {"kind": "mlp", "hidden": 16}],
    ids=["mlp", "dropout", "narrow", "even"],
)
def test_a_student_comes_to_the_same_bits_in_stacks_of_any_size(model: dict[str, Any], tmp_path: Path) -> None:
    together = train(mixed(tmp_path / "all", 9, model=model))
    for start, stop in ((0, 1), (3, 4), (1, 3), (2, 9)):
        others = mixed(tmp_path / f"{start}-{stop}", 9, model=model)[start:stop]
        for number, state in enumerate(train(others), start):
            assert differing(state, together[number]) == [], f"student {number} of {start} to {stop}"


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_order_within_a_stack_makes_no_difference(precision: str, tmp_path: Path) -> None:
    forward = train(mixed(tmp_path / "forward", 7, precision=precision))
    backward = train(mixed(tmp_path / "backward", 7, precision=precision)[::-1])[::-1]
    assert [differing(*two) for two in zip(forward, backward, strict=True)] == [[]] * 7


def test_steps_together_are_steps_alone_but_for_rounding(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"precision": "float64", "model": BATCH_NORM}
    together, alone = mixed(tmp_path, 8, **changes), mixed(tmp_path, 8, together=False, **changes)
    stack = Stack(together)
    for batch in itertools.islice(STREAM.batches(0), 3):
        assert stack.take_step(batch, STREAM.steps_per_epoch) == {}
        for student in alone:
            student.take_step(batch, STREAM.steps_per_epoch)
    for one, other in zip(together, alone, strict=True):
        assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-12)
        states = one.module.state_dict(), other.module.state_dict()
        assert all(torch.allclose(states[0][name], states[1][name], rtol=1e-9, atol=1e-12) for name in states[0])


NORMED = {"kind": "custom", "factory": "tests.distill.test_stacking:normed"}


@pytest.mark.parametrize("model", [BATCH_NORM, NORMED], ids=["2d", "1d"])
def test_each_student_has_batch_statistics_of_its_own(model: dict[str, Any], tmp_path: Path) -> None:
    """Those of its own activations: as alone, whatever the others have; and none of a step that it did not take."""
    changes: dict[str, Any] = {"precision": "float64", "model": model}
    wild = {"kind": "sgd", "lr": 1e300}
    together = [a_student(tmp_path, number, **changes) for number in range(3)]
    together.append(a_student(tmp_path, 3, optimizer=wild, **changes))
    alone = [a_student(tmp_path, number, together=False, **changes) for number in range(3)]
    with torch.no_grad():  # activations of the second are other ones by orders of magnitude
        for students in (together, alone):
            next(one for one in students[1].module.parameters() if one.dim() > 1).mul_(1000)
    stacks, failed = Stacks({f"student-{n}": 9 for n in range(4)}), dict[Student, BaseException]()
    last = list[dict[str, torch.Tensor]]()  # the wild one's, before each step
    for batch in STREAM.batches(0):
        going = [student for student in together if student not in failed]
        last.append(statistics(together[3]))
        failed |= stacks.take_step(going, batch, STREAM.steps_per_epoch)
        for student in alone:
            student.take_step(batch, STREAM.steps_per_epoch)
    found = [statistics(student) for student in together]
    for one, other in zip(found, map(statistics, alone), strict=False):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-12) for name in one)
    assert list(failed) == [together[3]]
    steps = next(int(one) for name, one in found[3].items() if name.endswith("num_batches_tracked"))
    assert 1 <= steps < STREAM.steps_per_epoch
    assert all(torch.equal(one, last[steps][name]) for name, one in found[3].items())
    for name in found[0]:
        if name.endswith("running_mean"):
            assert not any(torch.equal(found[0][name], found[n][name]) for n in (1, 2))


def statistics(student: Student) -> dict[str, torch.Tensor]:
    """The buffers of its batch norms, by name."""
    return {name: one.clone() for name, one in student.module.named_buffers() if "running" in name or "tracked" in name}


def test_torch_refuses_batch_statistics_that_students_would_share() -> None:
    """A stack rests on that where batch norms are: statistics that are not one a student are an error, no mixture."""
    inputs, own = torch.randn(3, 8, 5, device=ON), torch.zeros(3, 5, device=ON)

    def normed(inputs: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(inputs, mean, variance, training=True)

    vmap(normed)(inputs, own, own + 1)
    assert torch.allclose(own, 0.1 * inputs.mean(dim=1), atol=1e-6)
    with pytest.raises(RuntimeError, match="updated in place, were not batched"):
        vmap(normed, in_dims=(0, None, None))(inputs, own[0], own[0] + 1)


def test_an_evaluation_together_is_that_of_each_alone_but_for_rounding(tmp_path: Path) -> None:
    students = mixed(tmp_path, 5, model=MLP | {"dropout": 0.3})
    stack = Stack(students)
    for student, (metrics, said) in zip(students, evaluate_together(stack, TRAIN), strict=True):
        alone, chosen = student.evaluate(TRAIN)
        assert metrics.keys() == alone.keys()
        assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert (said == chosen).mean() > 0.97
        assert metrics["accuracy"] == pytest.approx(float(np.mean(said == TRAIN.labels)), abs=1e-6)


def test_dropout_drops_its_share_and_other_units_of_each_student(tmp_path: Path) -> None:
    students = [a_student(tmp_path, number, model=MLP | {"dropout": 0.25}) for number in range(2)]
    stack = Stack(students)
    masks = stack._masks(next(STREAM.batches(0)).inputs)
    for mask in masks.values():
        assert sorted(set(mask.flatten().tolist())) == [0, pytest.approx(1 / 0.75)]
        assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.06)
        assert not torch.equal(mask[0], mask[1])


def test_one_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    wild = {"kind": "sgd", "lr": 1e30}
    students = mixed(tmp_path / "together", 4)
    students.insert(2, a_student(tmp_path / "wild", 9, optimizer=wild))
    stacks, failed = Stacks({student.spec.name: 100 for student in students}), dict[Student, BaseException]()
    for epoch in range(2):
        for batch in STREAM.batches(epoch):
            going = [student for student in students if student not in failed]
            failed |= stacks.take_step(going, batch, STREAM.steps_per_epoch)
        left = [student for student in students if student not in failed]
        measured = evaluated(stacks, left)
        for student in left:
            student.end_epoch(TRAIN, measured[student])
    assert [student.spec.name for student in failed] == ["student-9"]
    assert isinstance(failed[students[2]], DivergedError)
    assert "at lr 1e+30" in str(failed[students[2]])
    alone = train(mixed(tmp_path / "alone", 4), epochs=2)
    states = [state_of(student) for student in students if student not in failed]
    assert [differing(*two) for two in zip(states, alone, strict=True)] == [[]] * 4


def test_a_checkpoint_is_resumed_in_any_stack(tmp_path: Path) -> None:
    whole = train(mixed(tmp_path / "whole", 5))
    begun = mixed(tmp_path / "cut", 5)
    stacks = Stacks({student.spec.name: 100 for student in begun})
    for batch in itertools.islice(STREAM.batches(0), 2):  # in the middle of an epoch
        stacks.take_step(begun, batch, STREAM.steps_per_epoch)
    for student in begun:
        student.save()
    resumed = mixed(tmp_path / "cut", 5)
    assert all(student.resume() for student in resumed)
    for part in (resumed[3:], resumed[:3]):
        parts = Stacks({student.spec.name: 100 for student in part})
        for epoch in range(3):
            for batch in STREAM.batches(epoch, 2 if epoch == 0 else 0):
                assert parts.take_step(part, batch, STREAM.steps_per_epoch) == {}
            measured = evaluated(parts, part)
            for student in part:
                student.end_epoch(TRAIN, measured[student])
    states = [state_of(student) for student in resumed]
    assert [differing(*two) for two in zip(states, whole, strict=True)] == [[]] * 5


def test_where_a_stack_does_not_go_its_halves_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, sizes = Stack._forward, list[int]()

    def limited(self: Stack, *given: Any) -> torch.Tensor:
        sizes.append(len(self.students))
        if len(self.students) > 3:
            raise RuntimeError("out of memory")
        return forward(self, *given)

    monkeypatch.setattr(Stack, "_forward", limited)
    cut = train(mixed(tmp_path / "cut", 8, model=MLP | {"dropout": 0.3}))
    assert sizes[:7] == [8, 4, 2, 2, 4, 2, 2]
    assert set(sizes[7:]) == {2}  # from then on nobody tries again what did not go
    monkeypatch.setattr(Stack, "_forward", forward)
    whole = train(mixed(tmp_path / "whole", 8, model=MLP | {"dropout": 0.3}))
    assert [differing(*two) for two in zip(cut, whole, strict=True)] == [[]] * 8


def test_from_stored_logits_as_with_the_teacher_in_the_loop(tmp_path: Path) -> None:
    """The loop steps the same way, and calls the teacher on every batch."""
    set_deterministic(DEVICE, 1)
    teacher = build(ModelCard.of(Mlp(hidden=[20]), TRAIN, None), seed=3).to(ON)
    stored = teacher_logits(teacher, torch.from_numpy(TRAIN.inputs), 32)[None]
    stream = dataclasses.replace(STREAM, logits=stored)

    def trained(students: list[Student], *, online: bool) -> list[dict[str, torch.Tensor]]:
        stacks = Stacks({student.spec.name: 100 for student in students})
        for epoch in range(3):
            for batch in stream.batches(epoch):
                said = torch.from_numpy(teacher_logits(teacher, batch.inputs, 32)).to(ON) if online else batch.logits
                shown = dataclasses.replace(batch, logits=said)
                assert stacks.take_step(students, shown, stream.steps_per_epoch) == {}
            for student in students:
                student.end_epoch(TRAIN)
        return [state_of(student) for student in students]

    cached = trained(mixed(tmp_path / "cached", 7), online=False)
    loop = trained(mixed(tmp_path / "online", 7), online=True)
    assert [differing(*two) for two in zip(cached, loop, strict=True)] == [[]] * 7


def test_one_of_many_whose_objective_raises_fails_alone(tmp_path: Path) -> None:
    own = {"kind": "custom", "factory": "tests.distill.test_stack:raising", "epochs": 6}
    students = mixed(tmp_path / "all", 240)
    students.insert(11, a_student(tmp_path / "own", 999, objective=own))
    stacks, failed = Stacks({student.spec.name: 300 for student in students}), dict[Student, BaseException]()
    for batch in STREAM.batches(0):
        going = [student for student in students if student not in failed]
        failed |= stacks.take_step(going, batch, STREAM.steps_per_epoch)
    assert [(student.spec.name, str(error)) for student, error in failed.items()] == [("student-999", "not today")]
    alone = mixed(tmp_path / "alone", 240)
    others = Stacks({student.spec.name: 300 for student in alone})
    for batch in STREAM.batches(0):
        assert others.take_step(alone, batch, STREAM.steps_per_epoch) == {}
    left = [student for student in students if student not in failed]
    assert [differing(state_of(one), state_of(other)) for one, other in zip(left, alone, strict=True)] == [[]] * 240
