"""The planner: who shares a cohort, and how many cohorts there are."""

from pathlib import Path

import pytest

from akd_dist.cohort import CohortJob
from akd_dist.jobs.planner import START_SECONDS, allocate, cohort_job, groups_of, makespan, plan_cohorts, split_evenly
from akd_dist.rows import prepare
from akd_dist.storage.errors import RecipeError
from tests.fleets import ADAMW, HARD, a_recipe, a_student


def test_a_small_fleet_is_one_cohort_and_a_large_one_fills_the_cluster() -> None:
    assert allocate([START_SECONDS], [1], cpus=8, wanted=None) == [1]
    assert allocate([100 * START_SECONDS], [1], cpus=4, wanted=None) == [4]
    assert allocate([4 * START_SECONDS], [1], cpus=8, wanted=None) == [2]  # a third would save 2/3 of a start
    assert allocate([100 * START_SECONDS, 1.0], [1, 2], cpus=4, wanted=None) == [4, 1]  # the small one waits
    assert sum(allocate([1.0, 2.0], [1, 1], cpus=2, wanted=5)) == 5


def test_groups_of_unequal_length_leave_no_cpu_idle() -> None:
    """One cohort of each group would take 100 starts, with a CPU idle for most of it; each group is halved instead."""
    start = START_SECONDS
    assert allocate([100 * start, 25 * start], [1, 1], cpus=2, wanted=None) == [2, 2]
    halves = [(51 * start, 1), (51 * start, 1), (13.5 * start, 1), (13.5 * start, 1)]
    assert makespan(halves, cpus=2) == 64.5 * start
    assert makespan([(30.0, 1), (10.0, 1), (10.0, 1), (10.0, 1)], cpus=2) == 30.0
    assert makespan([(10.0, 2), (10.0, 1), (10.0, 1)], cpus=2) == 20.0
    assert makespan([(10.0, 8)], cpus=2) == 10.0


def test_students_that_cannot_share_a_stream_are_apart() -> None:
    recipe = a_recipe([a_student("a"), a_student("b", batch=32), a_student("c"), a_student("d", threads=2)])
    assert [[spec.name for spec in group] for group in groups_of(list(recipe.students))] == [["a", "c"], ["b"], ["d"]]


def test_students_of_an_assistant_read_another_stream_and_labels_ride_with_the_teachers(tmp_path: Path) -> None:
    assistant = {"model": {"kind": "mlp", "hidden": 4}, "objective": {"kind": "kd", "epochs": 1}, "optimizer": ADAMW}
    takd = {"kind": "takd", "epochs": 1}
    students = [a_student("a", objective=takd), a_student("b", objective=HARD), a_student("c")]
    students += [a_student("d", objective=takd), a_student("e", objective=takd, batch=32)]
    teacher = {"weights": "somewhere", "assistant": assistant}
    recipe = a_recipe(students, teacher=teacher)
    groups = groups_of(list(recipe.students))
    assert [[spec.name for spec in group] for group in groups] == [["a", "d"], ["b", "c"], ["e"]]
    base = CohortJob(
        name="fleet", data=recipe.data, fingerprints={}, students=(), root="", logs="", cache_root="", folder=None,
        control="", stores={"train": "teacher's"}, teacher_test="teacher's test",
    )  # fmt: skip
    jobs = [cohort_job(base, group, {"train": "assistant's"}) for group in groups]
    assert [job.stores["train"] for job in jobs] == ["assistant's", "teacher's", "assistant's"]
    assert {job.teacher_test for job in jobs} == {"teacher's test"}
    assert [job.students for job in jobs] == groups
    with pytest.raises(RecipeError, match="at least 3"):
        plan_cohorts(
            a_recipe(students, teacher=teacher, cohorts=2), list(recipe.students), 2, prepare(recipe.data, tmp_path)
        )


def test_a_cohort_too_few_is_refused(tmp_path: Path) -> None:
    recipe = a_recipe([a_student("a"), a_student("b", batch=32)], cohorts=1)
    with pytest.raises(RecipeError, match="at least 2"):
        plan_cohorts(recipe, list(recipe.students), 2, prepare(recipe.data, tmp_path))


def test_parts_cost_about_the_same_and_keep_their_order() -> None:
    recipe = a_recipe([a_student(str(cost)) for cost in (5, 1, 4, 2, 3)])
    parts = split_evenly(tuple(recipe.students), 2, lambda spec: float(spec.name))
    assert [[spec.name for spec in part] for part in parts] == [["5", "1", "2"], ["4", "3"]]
    assert len(split_evenly(tuple(recipe.students), 9, lambda spec: 1.0)) == 5


def test_two_sizes_of_one_factory_have_two_labels() -> None:
    students = [
        {"model": {"kind": "custom", "factory": "m:wide", "arguments": {"width": width}}} | common
        for width in (4, 400)
        for common in [{key: value for key, value in a_student("x").items() if key not in ("name", "model")}]
    ]
    assert [spec.name for spec in a_recipe(students).students] == [
        "wide-width4-annealing_kd-t2-s0",
        "wide-width400-annealing_kd-t2-s0",
    ]
