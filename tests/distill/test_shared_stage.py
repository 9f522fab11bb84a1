"""Students that differ only in stage II: stage I is computed once, and every weight is as if each had trained alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.delivery import failed_entry
from akd_dist.distill.job import read_progress
from akd_dist.distill.progress import Progress
from akd_dist.distill.student import Student
from akd_dist.documents.status import StudentProgress
from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import Recipe
from tests.distill.test_cohort import job_of
from tests.fleets import ADAMW, ANNEALING, HARD, a_recipe, a_student, weights

SGD = {"kind": "sgd", "lr": 0.05, "clip": 0.1, "schedule": {"kind": "steps"}}
FLEET = [
    a_student("other-seed", seed=1),
    a_student("first"),
    a_student("longer", objective=ANNEALING | {"stage2_epochs": 2}),
    a_student("from-labels", objective=HARD),
    a_student("slower", objective=ANNEALING | {"stage2_optimizer": ADAMW | {"lr": 1e-3}}),
    a_student("other-kind", objective=ANNEALING | {"stage2_optimizer": SGD}),
    a_student("other-tau", objective=ANNEALING | {"tau_max": 1}),
]
FOLLOWERS = {"longer", "slower", "other-kind"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe(FLEET, stacked="never")


@pytest.fixture(scope="module")
def apart(recipe: Recipe, stores: dict[str, str], home: Path) -> dict[str, str]:
    for spec in recipe.students:
        train_cohort(job_of(recipe, stores, home, home / "apart", students=(spec,)))
    return weights(home / "apart")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Steps that each student takes from here on."""
    taken: dict[str, int] = {}
    take_step = Student.take_step

    def counting(student: Student, *arguments: Any) -> None:
        taken[student.spec.name] = taken.get(student.spec.name, 0) + 1
        take_step(student, *arguments)

    monkeypatch.setattr(Student, "take_step", counting)
    return taken


def records(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "students" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_waiting_is_not_part_of_a_pace(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress_of, waited = Progress._of, set[str]()

    def watched(telling: Progress, student: Student, *leader_and_now: Any) -> StudentProgress:
        progress = progress_of(telling, student, *leader_and_now)
        if progress.state == "waiting":
            waited.add(student.spec.name)
            assert student.spec.name not in telling.paces
        return progress

    monkeypatch.setattr(Progress, "_of", watched)
    train_cohort(job_of(recipe, stores, home, tmp_path))
    assert waited == FOLLOWERS


def test_one_stage_for_all_and_the_weights_of_each_alone(
    recipe: Recipe, stores: dict[str, str], home: Path, apart: dict[str, str], tmp_path: Path, steps: dict[str, int]
) -> None:
    results = train_in_process(recipe, stores, run=tmp_path, cache_root=str(home / "cache"))
    assert weights(tmp_path) == apart
    assert len(set(apart.values())) == len(FLEET)
    per_epoch = steps["first"] // 3
    assert steps["longer"] == 2 * per_epoch
    assert steps["slower"] == steps["other-kind"] == per_epoch
    assert steps["other-seed"] == steps["from-labels"] == steps["other-tau"] == 3 * per_epoch
    for name, result in results.items():
        assert result["stage1_from"] == ("first" if name in FOLLOWERS else None)
        assert records(tmp_path, name) == records(home / "apart", name)
        alone = json.loads((home / "apart" / "students" / name / "result.json").read_bytes())
        assert result["test"] == alone["test"]
        assert result["epochs"] == alone["epochs"]


def test_progress_leaves_out_the_steps_that_another_takes(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path, steps: dict[str, int]
) -> None:
    job = job_of(recipe, stores, home, tmp_path)
    train_cohort(job)
    document = read_progress(job)
    assert document is not None
    told = {student.name: student for student in document.students}
    assert {name: student.steps_total for name, student in told.items()} == steps
    assert {name: student.steps for name, student in told.items()} == steps


def test_the_next_one_leads_where_the_first_fails(
    recipe: Recipe,
    stores: dict[str, str],
    home: Path,
    apart: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_step = Student.take_step

    def failing(student: Student, *arguments: Any) -> None:
        if student.spec.name == "first" and student.epoch == 1:
            raise MemoryError("of this one only")
        take_step(student, *arguments)

    monkeypatch.setattr(Student, "take_step", failing)
    results = train_in_process(recipe, stores, run=tmp_path, cache_root=str(home / "cache"))
    assert results["first"]["state"] == "failed"
    assert results["first"]["reason"].startswith("out of memory: MemoryError")
    assert weights(tmp_path) == {name: digest for name, digest in apart.items() if name != "first"}
    assert [results[name]["stage1_from"] for name in ("longer", "slower", "other-kind")] == [None, "longer", "longer"]


def test_a_failed_student_keeps_whose_stage_it_shared(
    recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path
) -> None:
    train_cohort(job_of(recipe, stores, home, tmp_path))
    for spec in recipe.students:
        given_up = failed_entry(spec, "its worker died", tmp_path / "students" / spec.name, attempt=1)
        assert given_up["stage1_from"] == ("first" if spec.name in FOLLOWERS else None)


def test_in_stacks_too_the_weights_are_those_of_each_alone(stores: dict[str, str], home: Path, tmp_path: Path) -> None:
    stacked = a_recipe(FLEET, stacked="always")
    train_in_process(stacked, stores, run=tmp_path / "together", cache_root=str(home / "cache"))
    for spec in stacked.students:
        job = job_of(stacked, stores, home, tmp_path / "apart", students=(spec,))
        assert job.stacks.keys() == {one.name for one in stacked.students}
        train_cohort(job)
    assert weights(tmp_path / "together") == weights(tmp_path / "apart")
