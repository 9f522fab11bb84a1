"""Functions of the user's own in training: an objective, a metric, and who is told of the end of an epoch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.base.tracebacks import in_full
from akd_dist.data.row_cache import prepare
from akd_dist.distill.hooks import EpochEnd, own_measure, try_metric, try_objective
from akd_dist.distill.objectives import row_losses, stages
from akd_dist.distill.trial import try_training
from akd_dist.jobs.run_folder import run_identity
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import CustomMetric, CustomObjective, Recipe
from akd_dist.reporting.comparison import expand
from tests.fleets import KD, a_recipe, a_student, own, weights
from tests.sources import module

CODE = """
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

def soft(student, teacher, labels, epoch, epochs, temperature=2.0):
    share = 1 - epoch / epochs
    ours, theirs = (log_softmax(one / temperature, dim=1) for one in (student, teacher))
    softened = kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    return share * softened + (1 - share) * cross_entropy(student, labels, reduction="none")

def distances(student, teacher, labels, epoch, epochs):
    return (student - teacher).square().mean(dim=1)

def plain(student, teacher, labels, epoch, epochs):
    assert teacher is None
    return cross_entropy(student, labels, reduction="none")

def squares(student, teacher, labels, epoch, epochs):
    return (student[:, 0] - labels) ** 2

def spoils(student, teacher, labels, epoch, epochs):
    losses = cross_entropy(student, labels.clone(), reduction="none")
    labels.zero_()
    teacher.zero_()
    torch.manual_seed(7)
    return losses

def averaged(student, teacher, labels, epoch, epochs):
    return cross_entropy(student, labels)

def normed(student, teacher, labels, epoch, epochs):
    losses = cross_entropy(student, labels, reduction="none")
    return losses / losses.sum()

def detached(student, teacher, labels, epoch, epochs):
    return cross_entropy(student, labels, reduction="none").detach()

def halved(student, teacher, labels, epoch, epochs):
    return cross_entropy(student, labels, reduction="none").half()

def endless(student, teacher, labels, epoch, epochs):
    return cross_entropy(student, labels, reduction="none") / 0

def drawn(student, teacher, labels, epoch, epochs):
    return cross_entropy(student, labels, reduction="none") * torch.rand(len(labels))

def rooted(student, teacher, labels, epoch, epochs):
    return (student - student).sum(dim=1).sqrt()

def in_place(student, teacher, labels, epoch, epochs):
    student.data.mul_(2)
    return cross_entropy(student, labels, reduction="none")

def no_tensor(student, teacher, labels, epoch, epochs):
    return [0.0] * len(student)

def stacked(student, teacher, labels, epoch, epochs):
    return torch.stack([cross_entropy(one, label) for one, label in zip(student, labels)])

def deep(student, teacher, labels, epoch, epochs):
    return mistaken(student)

def mistaken(student):
    raise ValueError("in my own line")

def late(student, teacher, labels, epoch, epochs):
    if epoch == epochs - 1:
        raise KeyError("the last epoch")
    return cross_entropy(student, labels, reduction="none")

def leaves(student, teacher, labels, epoch, epochs):
    raise SystemExit(3)

def fails_later(student, teacher, labels, epoch, epochs):
    losses = cross_entropy(student, labels, reduction="none")
    return losses if epoch in (0, epochs - 1) else losses.sum()

def exits_later(student, teacher, labels, epoch, epochs):
    if epoch not in (0, epochs - 1):
        raise SystemExit(3)
    return cross_entropy(student, labels, reduction="none")

def last_class(logits, labels):
    return float((logits.argmax(axis=1) == 9).mean())

def nothing(logits, labels):
    return float("nan")

def words(logits, labels):
    return "well"

def random_metric(logits, labels):
    import os
    return int.from_bytes(os.urandom(6), "big")

def told(epoch_end, file):
    with open(file, "a") as notes:
        notes.write(f"{epoch_end.student} {epoch_end.epoch} {epoch_end.stage} {epoch_end.epochs}\\n")

def refuses(epoch_end):
    from akd_dist.base.errors import RefusedError
    if epoch_end.epoch == 1:
        raise RefusedError("enough")
"""


@pytest.fixture(scope="module")
def code(home: Path) -> str:
    return module(home, CODE)


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    return a_recipe([a_student("pupil")])


def objective(code: str, home: Path, function: str, **given: Any) -> CustomObjective:
    return own(CustomObjective(factory=f"{code}:{function}", **{"epochs": 3} | given), home)


def metric(code: str, home: Path, function: str) -> CustomMetric:
    return own(CustomMetric(factory=f"{code}:{function}"), home)


# ---- tried before anything starts


def test_a_loss_for_each_row_passes(code: str, home: Path) -> None:
    try_objective(objective(code, home, "soft", arguments={"temperature": 4.0}), 10, "classification", workers=3)
    try_objective(objective(code, home, "plain", learns_from="labels"), 10, "classification")
    try_objective(objective(code, home, "squares"), 1, "regression")
    try_objective(objective(code, home, "stacked"), 10, "classification")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("averaged", r"returned a tensor \[\] for logits \[8, 10\], instead of one loss a row"),
        ("normed", "another loss for a row beside others than for the row alone"),
        ("detached", "no gradient reaches them"),
        ("halved", "losses of torch.float16 for logits of torch.float32"),
        ("endless", "not finite"),
        ("drawn", "another loss for the same rows when asked again"),
        ("rooted", "without a finite gradient"),
        ("in_place", "changed the student's logits in place"),
        ("no_tensor", "list instead of a tensor"),
        ("late", "KeyError: 'the last epoch'"),
        ("leaves", "SystemExit: 3"),
        ("plain", "AssertionError"),
        ("absent", "no similar name"),
    ],
)
def test_what_is_no_loss_for_each_row_is_refused(function: str, told: str, code: str, home: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        try_objective(objective(code, home, function), 10, "classification")
    assert told.replace("\\", "") in str(refused.value.got)


def test_with_workers_an_objective_takes_no_rows_as_well(code: str, home: Path) -> None:
    with pytest.raises(RefusedError, match="stacked cannot be used"):
        try_objective(objective(code, home, "stacked"), 10, "classification", workers=2)


def test_a_traceback_begins_in_the_users_own_file(code: str, home: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        try_objective(objective(code, home, "deep"), 10, "classification")
    told = str(caught.value.got)
    frames = [line for line in told.splitlines() if line.startswith('  File "')]
    assert [frame.rpartition(" in ")[2] for frame in frames] == ["deep", "mistaken"]
    assert all(str(home) in frame for frame in frames)
    assert told.endswith("ValueError: in my own line")
    error = caught.value.__cause__
    assert error is not None
    log = in_full(error)
    assert log.startswith(told), "a log begins alike, and has the way there below it"
    assert "akd_dist/distill/hooks.py" in log.removeprefix(told)


def test_an_objective_that_is_shown_rows_without_labels_is_tried_on_some(code: str, home: Path) -> None:
    try_objective(objective(code, home, "distances"), 10, "classification", unlabelled=True)
    try_objective(objective(code, home, "plain", learns_from="labels"), 10, "classification", unlabelled=True)
    with pytest.raises(RefusedError, match="late cannot be used"):
        try_objective(objective(code, home, "late"), 10, "classification", unlabelled=True)


@pytest.mark.parametrize("function", ["nothing", "words", "random_metric", "told"])
def test_what_is_no_metric_is_refused(function: str, code: str, home: Path) -> None:
    with pytest.raises(RefusedError, match=f"the metric {code}:{function} cannot be used"):
        try_metric(metric(code, home, function), np.arange(20) % 10, 10)


def test_a_metric_is_given_logits_and_labels(code: str, home: Path) -> None:
    logits = torch.eye(10)[[9, 9, 3, 9]]
    assert own_measure(metric(code, home, "last_class"), logits, torch.zeros(4, dtype=torch.int64)) == 0.75


def test_nobody_elses_word_is_enough(code: str) -> None:
    named = CustomObjective(factory=f"{code}:plain", epochs=2)
    with pytest.raises(RefusedError, match="is not run"):
        try_objective(named, 10, "classification")


def test_all_are_tried_with_the_students(code: str, home: Path, recipe: Recipe) -> None:
    rows = prepare(recipe.data, home / "cache").train

    def tried(data: dict[str, Any] | None = None, **student: Any) -> None:
        given = a_recipe([a_student("pupil", **student)], folder=str(home), **({"data": data} if data else {}))
        spec = given.students[0]
        try_training(spec.model, [("the student pupil", spec)], rows, given.data)

    named = {"kind": "custom", "epochs": 2}
    tried(objective=named | {"factory": f"{code}:soft"})
    with pytest.raises(RefusedError, match=r"the objective .*:averaged cannot be used"):
        tried(objective=named | {"factory": f"{code}:averaged"})
    with pytest.raises(RefusedError, match="has no function missing"):
        tried(on_epoch_end={"factory": f"{code}:missing"})
    with pytest.raises(RefusedError, match=r"the metric .*:nothing cannot be used"):
        tried(data={"train": {"kind": "digits"}, "metric": {"factory": f"{code}:nothing"}})


# ---- while students train


def train(students: list[dict[str, Any]], home: Path, stores: dict[str, str], run: str, **data: Any) -> dict[str, Any]:
    plain = a_recipe([a_student("pupil")]).data.model_dump(mode="json")
    recipe = a_recipe(students, folder=str(home), data=plain | data)
    return train_in_process(recipe, stores, run=home / "runs" / run, cache_root=str(home / "cache"))


def custom(code: str, function: str, **given: Any) -> dict[str, Any]:
    return {"kind": "custom", "factory": f"{code}:{function}", "epochs": 3} | given


def test_students_of_own_code_train_the_same_alone_and_beside_others(
    code: str, home: Path, stores: dict[str, str]
) -> None:
    students = [
        a_student("soft", objective=custom(code, "soft")),
        a_student("spoils", objective=custom(code, "spoils")),
        a_student("plain", objective=custom(code, "plain", learns_from="labels")),
        a_student("kd", objective=KD, on_epoch_end={"factory": f"{code}:told", "arguments": {"file": "/dev/null"}}),
    ]
    together = train(students, home, stores, "together")
    assert [one["state"] for one in together.values()] == ["done"] * 4
    assert together["soft"]["objective"] == "custom"
    del students[3]["on_epoch_end"]
    for student in students:
        train([student], home, stores, f"alone-{student['name']}")
        alone = weights(home / "runs" / f"alone-{student['name']}")
        assert alone == {name: told for name, told in weights(home / "runs" / "together").items() if name in alone}


def test_own_code_that_fails_ends_its_student_alone(code: str, home: Path, stores: dict[str, str]) -> None:
    students = [
        a_student("later", objective=custom(code, "fails_later")),
        a_student("exits", objective=custom(code, "exits_later")),
        a_student("told", objective=KD, on_epoch_end={"factory": f"{code}:refuses"}),
        a_student("well", objective=KD),
    ]
    found = train(students, home, stores, "failing")
    assert [one["state"] for one in found.values()] == ["failed", "failed", "failed", "done"]
    assert "the objective ended by SystemExit: 3" in found["exits"]["reason"]
    assert "the objective returned a tensor []" in found["later"]["reason"]
    assert found["later"]["epochs"] == 1
    assert "on_epoch_end" in found["told"]["reason"]
    assert "RefusedError: enough" in found["told"]["reason"]
    assert found["told"]["epochs"] == 2


def test_a_callback_is_told_of_every_epoch_in_order(code: str, home: Path, stores: dict[str, str]) -> None:
    notes = home / "notes.txt"
    told = {"factory": f"{code}:told", "arguments": {"file": str(notes)}}
    train([a_student("pupil", on_epoch_end=told)], home, stores, "told")
    stages_of = ["annealing", "annealing", "hard_labels"]
    assert notes.read_text().splitlines() == [f"pupil {epoch} {stage} 3" for epoch, stage in enumerate(stages_of)]


def test_what_a_callback_is_told_cannot_be_changed(tmp_path: Path) -> None:
    ended = EpochEnd("pupil", 0, 3, "kd", 1.0, (("accuracy", 0.5),), tmp_path, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ended.epoch = 4  # type: ignore[misc]


def test_an_own_metric_picks_the_best_epoch(code: str, home: Path, stores: dict[str, str]) -> None:
    found = train([a_student("pupil", objective=KD)], home, stores, "metric", metric={"factory": f"{code}:last_class"})
    lines = (home / "runs/metric/students/pupil/metrics.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    measured = [record["validation"]["custom"] for record in records]
    assert found["pupil"]["validation"]["custom"] == max(measured)
    assert {"accuracy", "f1", "matthews", "loss", "custom"} == set(records[0]["validation"])
    assert 0 <= found["pupil"]["test"]["custom"] <= 1


# ---- identities


def test_the_code_of_an_objective_and_a_metric_belongs_to_the_run(tmp_path: Path, home: Path) -> None:
    name = module(tmp_path, CODE)
    plain = a_recipe([a_student("pupil")]).data.model_dump(mode="json")

    def identity() -> dict[str, Any]:
        recipe = a_recipe(
            [a_student("pupil", objective=custom(name, "soft"))],
            folder=str(tmp_path),
            data=plain | {"metric": {"factory": f"{name}:last_class"}},
        )
        return run_identity(recipe, prepare(recipe.data, home / "cache"))

    before = identity()
    (tmp_path / f"{name}.py").write_text(CODE + "\n# changed\n")
    after = identity()
    assert before["students"]["pupil"]["objective"]["source"] != after["students"]["pupil"]["objective"]["source"]
    assert before["data"]["metric"]["source"] != after["data"]["metric"]["source"]


def test_a_callback_changes_no_identity(recipe: Recipe) -> None:
    told = a_recipe([a_student("pupil", on_epoch_end={"factory": "notes:told"})])
    assert told.identity() == recipe.identity()
    assert "on_epoch_end" not in recipe.identity()["students"]["pupil"]
    assert told.students[0].stage1 == recipe.students[0].stage1


def test_names_and_stages_of_own_objectives(code: str) -> None:
    recipe = a_recipe(
        [{**a_student("x", objective=custom(code, "soft", arguments={"temperature": 4}))} | {"name": "a"}]
    )
    given = recipe.students[0].model_dump(mode="json", exclude={"name"})
    assert (
        Recipe.model_validate(recipe.model_dump(mode="json") | {"students": [given]}).students[0].name
        == "mlp-8d0.1-soft-temperature4-s0"
    )
    (stage,) = stages(recipe.students[0].objective)
    assert (stage.name, stage.needs_logits, stage.epochs) == ("custom", True, 3)
    (plain,) = stages(CustomObjective(factory=f"{code}:plain", epochs=2, learns_from="labels"))
    assert not plain.needs_logits


def test_own_objectives_of_higher_precision_stay_in_it(code: str, home: Path) -> None:
    (stage,) = stages(objective(code, home, "soft"))
    z = torch.randn(4, 10, dtype=torch.float64)
    assert row_losses(stage, 0, z, z.float(), torch.arange(4)).dtype == torch.float64


def test_a_comparison_takes_own_objectives_as_they_are_listed(code: str) -> None:
    listed = a_recipe([a_student("annealing"), a_student("own", objective=custom(code, "soft"))])
    kinds = [student.objective.kind for student in expand(listed, 2).students]
    assert kinds.count("custom") == 2
    assert "custom" not in [one.objective.kind for one in expand(a_recipe([a_student("annealing")]), 2).students]
