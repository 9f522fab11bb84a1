"""The planner: who shares a cohort, and how many cohorts there are."""

from pathlib import Path

import pytest

from akd_dist.jobs.planner import START_SECONDS, allocate, groups_of, plan_cohorts, split_evenly
from akd_dist.rows import prepare
from akd_dist.storage.errors import RecipeError
from tests.fleets import a_recipe, a_student


def test_a_small_fleet_is_one_cohort_and_a_large_one_fills_the_cluster() -> None:
    assert allocate([START_SECONDS], [1], cpus=8, wanted=None) == [1]
    assert allocate([100 * START_SECONDS], [1], cpus=4, wanted=None) == [4]
    assert allocate([4 * START_SECONDS], [1], cpus=8, wanted=None) == [2]  # a third would save 2/3 of a start
    assert allocate([100 * START_SECONDS, 1.0], [1, 2], cpus=4, wanted=None) == [2, 1]
    assert allocate([1.0, 2.0], [1, 1], cpus=2, wanted=5) == [2, 3]


def test_students_that_cannot_share_a_stream_are_apart() -> None:
    recipe = a_recipe([a_student("a"), a_student("b", batch=32), a_student("c"), a_student("d", threads=2)])
    assert [[spec.name for spec in group] for group in groups_of(list(recipe.students))] == [["a", "c"], ["b"], ["d"]]


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
