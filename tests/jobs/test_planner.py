"""The planner: who shares a cohort, how many there are, what fits where, and what a running one is cut into."""

import random
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from akd_dist.base.errors import MachineError, RecipeError, RefusedError
from akd_dist.distill.job import CohortJob
from akd_dist.distill.objectives import stages
from akd_dist.distill.probe import Measured
from akd_dist.jobs.packing import Node, ResourceRequest, fits, next_to_start, pack, timetable
from akd_dist.jobs.planning.costs import PROCESS_BYTES, START_SECONDS, CostModel, families_of
from akd_dist.jobs.planning.planner import Load, allocate, cohort_job, groups_of, plan_cohorts, split_evenly
from akd_dist.recipe import Recipe
from tests.fleets import ADAMW, ANNEALING, HARD, a_recipe, a_student


def nodes(*cpus: float, gpus: float = 0, memory: float = float("inf")) -> list[Node]:
    return [Node(str(index), each, gpus, memory) for index, each in enumerate(cpus)]


def cut(seconds: list[float], cpus_each: list[int], cpus: int, wanted: int | None) -> list[int]:
    loads = [Load(total, ResourceRequest(1, each)) for total, each in zip(seconds, cpus_each, strict=True)]
    return allocate(loads, nodes(cpus), wanted)[0]


def end(cohorts: list[tuple[float, int]], cpus: int) -> float:
    return max(
        stop for _, stop in timetable([(seconds, ResourceRequest(1, each)) for seconds, each in cohorts], nodes(cpus))
    )


def costs_for(recipe: Recipe, **measured: Any) -> CostModel:
    """CostModel of a recipe's students that nobody measured, or as given: 1 s a step unless said otherwise."""
    known: dict[str, Any] = {"step": 1.0, "stream": 0.0, "evaluation": 0.0, "start": 0.0, "keeping": 0.0}
    known |= dict.fromkeys(("weights", "gradients", "optimizer", "step_memory", "evaluation_memory"), 0) | measured
    names = [spec.name for spec in recipe.students]
    return CostModel(
        recipe.device, 100, parameters=dict.fromkeys(names, 10), probes=dict.fromkeys(names, Measured(**known))
    )


def test_small_fleets_are_one_cohort_large_ones_fill_all() -> None:
    assert cut([START_SECONDS], [1], cpus=8, wanted=None) == [1]
    assert cut([100 * START_SECONDS], [1], cpus=4, wanted=None) == [4]
    assert cut([4 * START_SECONDS], [1], cpus=8, wanted=None) == [2]  # a third would save 2/3 of a start
    assert cut([100 * START_SECONDS, 1.0], [1, 2], cpus=4, wanted=None) == [4, 1]  # the small one waits
    assert sum(cut([1.0, 2.0], [1, 1], cpus=2, wanted=5)) == 5


def test_groups_of_unequal_length_leave_no_cpu_idle() -> None:
    """One cohort of each group would take 100 starts, with a CPU idle for most of it; each group is halved instead."""
    start = START_SECONDS
    assert cut([100 * start, 25 * start], [1, 1], cpus=2, wanted=None) == [2, 2]
    assert cut([100 * start, 100 * start], [1, 1], cpus=4, wanted=None) == [2, 2]  # one cut alone would save nothing
    halves = [(51 * start, 1), (51 * start, 1), (13.5 * start, 1), (13.5 * start, 1)]
    assert end(halves, cpus=2) == 64.5 * start
    assert end([(30.0, 1), (10.0, 1), (10.0, 1), (10.0, 1)], cpus=2) == 30.0
    assert end([(10.0, 2), (10.0, 1), (10.0, 1)], cpus=2) == 20.0
    assert end([(10.0, 8)], cpus=2) == 10.0


def test_what_another_cohort_saves_is_bounded() -> None:
    ask = ResourceRequest(1, 1)
    longest = Load(100 * START_SECONDS, ask, longest=90 * START_SECONDS, parts=5)
    assert allocate([longest], nodes(8), None)[0] == [2]
    counts, tried = allocate([Load(10 * START_SECONDS, ask, stream=50 * START_SECONDS)], nodes(8), None)
    assert counts == [3]
    assert [one.cohorts for one in tried][:3] == [1, 2, 3]


def test_no_more_cuts_are_tried_than_can_pay() -> None:
    """Or planning would take minutes where there are hundreds of CPUs."""
    counts, tried = allocate([Load(300 * 400.0, ResourceRequest(1, 1), longest=400.0, parts=300)], nodes(256), None)
    assert counts == [93]
    assert len(tried) < 200
    assert len(allocate([Load(1.0, ResourceRequest(1, 1))], nodes(256), None)[1]) == 2  # of which the plan tells


# ---- room


def test_a_worker_needs_its_cpus_on_one_node() -> None:
    assert fits(nodes(1, 1), ResourceRequest(2, 1))
    assert not fits(nodes(1, 1), ResourceRequest(1, 2))
    assert not fits(nodes(3, 3), ResourceRequest(3, 2))
    assert fits(nodes(2, 2, 2), ResourceRequest(3, 2))
    assert not fits(nodes(8, memory=5.0), ResourceRequest(2, 1, memory=3.0))
    assert fits(nodes(8, 8, memory=5.0), ResourceRequest(2, 1, memory=3.0))


def test_cohorts_share_a_gpu_by_fractions() -> None:
    gpu = nodes(16, gpus=1)
    assert pack(gpu, [ResourceRequest(1, 1, gpus=0.25)] * 4) is not None
    assert pack(gpu, [ResourceRequest(1, 1, gpus=0.1)] * 10) is not None  # which floats do not add up to 1
    assert pack(gpu, [ResourceRequest(1, 1, gpus=0.25)] * 5) is None
    assert pack(gpu, [ResourceRequest(1, 1, gpus=0.5), ResourceRequest(1, 1, gpus=1)]) is None
    assert pack(nodes(1, 1, gpus=1), [ResourceRequest(2, 1, gpus=1)]) is not None


def test_the_first_that_fits_is_started() -> None:
    cluster, large, small = nodes(4), ResourceRequest(1, 3), ResourceRequest(1, 1)
    free = [replace(cluster[0], cpus=2.0)]  # two CPUs are taken by others, who will end
    assert next_to_start([large, small], free, cluster) == 1
    assert next_to_start([large, small], [replace(cluster[0], cpus=0.0)], cluster) is None
    assert next_to_start([small, large], free, cluster) == 0
    assert next_to_start([large, small], cluster, cluster) == 0
    assert next_to_start([small], free, cluster, unplaced=[large, small]) is None  # free only until they are placed
    spans = timetable([(10.0, ResourceRequest(1, 2)), (10.0, large), (30.0, small), (5.0, small)], cluster)
    assert spans == [(0.0, 10.0), (10.0, 20.0), (0.0, 30.0), (0.0, 5.0)]


# ---- memory


def test_cohorts_are_cut_until_they_fit_the_memory_of_a_node() -> None:
    recipe = a_recipe([a_student(f"s{seed}", seed=seed) for seed in range(4)])
    students = list(recipe.students)
    costs = costs_for(recipe, step=1e-3, weights=100_000_000, gradients=100_000_000, optimizer=200_000_000)
    alone = costs.memory((students[0],))
    assert alone == PROCESS_BYTES + 500_000_000 + 3 * 400_000_000
    assert costs.memory(tuple(students)) == alone + 3 * 500_000_000
    wide, _ = plan_cohorts(recipe, students, nodes(4, memory=1e12), costs)
    assert [len(cohort) for cohort in wide] == [4]
    narrow, _ = plan_cohorts(recipe, students, nodes(4, memory=alone + 600e6), costs)
    assert [len(cohort) for cohort in narrow] == [2, 2]
    with pytest.raises(RefusedError, match=r"(?s)s0 does not fit the memory.*2\.0 GB.*2\.\d GB"):
        plan_cohorts(recipe, students, nodes(4, 4, memory=2e9), costs)
    one = recipe.model_copy(update={"cohorts": 1})
    with pytest.raises(RecipeError, match="at least 2"):
        plan_cohorts(one, students, nodes(4, memory=alone + 600e6), costs)


def test_more_cohorts_fit_where_fewer_do() -> None:
    """Cut in three by time, the two large ones would share what fits neither: `a`, `b` and `c, d`."""
    recipe = a_recipe([a_student(name, seed=seed) for seed, name in enumerate("abcd")], cohorts=3)
    long, large = (costs_for(recipe, **each).probes["a"] for each in ({"step": 9.0}, {"step": 0.1, "weights": 10**9}))
    costs = replace(costs_for(recipe), probes={"a": long, "b": long, "c": large, "d": large})
    cluster = nodes(4, memory=costs.memory(tuple(recipe.students)[2:3]) + 1e8)
    cohorts, _ = plan_cohorts(recipe, list(recipe.students), cluster, costs)
    assert len(cohorts) == 3
    assert all(fits(cluster, costs.ask(cohort)) for cohort in cohorts)
    assert sorted(spec.name for cohort in cohorts for spec in cohort) == list("abcd")


def test_one_too_large_is_found_at_once_among_many() -> None:
    recipe = a_recipe([a_student(f"s{seed}", seed=seed) for seed in range(400)])
    with pytest.raises(RefusedError, match="the cohort of s0 does not fit the memory"):
        plan_cohorts(recipe, list(recipe.students), nodes(8, memory=1e9), costs_for(recipe, weights=10**12))


@pytest.mark.parametrize(("changes", "told"), [({"threads": 3}, "3 CPUs on one node"), ({"workers": 9}, "9 workers")])
def test_what_can_never_fit_is_refused(changes: dict[str, Any], told: str) -> None:
    recipe = a_recipe([a_student("a"), a_student("b", **changes)])
    with pytest.raises(MachineError, match=f"(?s)too small for the cohort of b.*{told}"):
        plan_cohorts(recipe, list(recipe.students), nodes(2, 2), costs_for(recipe))


# ---- GPUs


def test_shares_of_a_gpu_keep_students_apart_on_gpus_only() -> None:
    recipe = a_recipe([a_student("a", gpus=0.5), a_student("b", gpus=0.25), a_student("c", gpus=0.5)])
    students = list(recipe.students)
    assert [len(group) for group in groups_of(students)] == [3]
    assert [len(group) for group in groups_of(students, "cuda")] == [2, 1]
    on_gpu = recipe.model_copy(update={"device": "cuda"})
    costs = costs_for(on_gpu)
    asks = [costs.ask(cohort) for cohort in plan_cohorts(on_gpu, students, nodes(8, gpus=1), costs)[0]]
    assert sorted(ask.gpus for ask in asks) == [0.25, 0.5]
    assert {costs_for(recipe).ask(tuple(students)).gpus} == {0.0}


@pytest.mark.parametrize("changes", [{"gpus": 1.5}, {"gpus": 0.5, "workers": 2}])
def test_shares_of_gpus_that_cannot_be_had(changes: dict[str, Any]) -> None:
    recipe = a_recipe([a_student("a", **changes)], device="cuda")
    with pytest.raises(RecipeError, match="gpus"):
        plan_cohorts(recipe, list(recipe.students), nodes(8, gpus=4), costs_for(recipe))
    on_cpu = recipe.model_copy(update={"device": "cpu"})
    plan_cohorts(on_cpu, list(recipe.students), nodes(9), costs_for(on_cpu))


# ---- who shares a cohort


def test_students_that_cannot_share_a_stream_are_apart() -> None:
    recipe = a_recipe([a_student("a"), a_student("b", batch=32), a_student("c"), a_student("d", threads=2)])
    assert [[spec.name for spec in group] for group in groups_of(list(recipe.students))] == [["a", "c"], ["b"], ["d"]]


def test_students_of_an_assistant_read_another_stream() -> None:
    assistant = {"model": {"kind": "mlp", "hidden": 4}, "objective": {"kind": "kd", "epochs": 1}, "optimizer": ADAMW}
    takd = {"kind": "takd", "epochs": 1}
    students = [a_student("a", objective=takd), a_student("b", objective=HARD), a_student("c")]
    students += [a_student("d", objective=takd), a_student("e", objective=takd, batch=32)]
    teacher = {"weights": "somewhere", "assistant": assistant}
    recipe = a_recipe(students, teacher=teacher)
    groups = groups_of(list(recipe.students))
    assert [[spec.name for spec in group] for group in groups] == [["a", "d"], ["b", "c"], ["e"]]
    base = CohortJob(
        name="fleet", data=recipe.data, fingerprints={}, students=(), root="", logs="", cache_root="",
        control="", stores={"train": "teacher's"}, teacher_test="teacher's test",
    )  # fmt: skip
    jobs = [cohort_job(base, group, {"train": "assistant's"}) for group in groups]
    assert [job.stores["train"] for job in jobs] == ["assistant's", "teacher's", "assistant's"]
    assert {job.teacher_test for job in jobs} == {"teacher's test"}
    assert [job.students for job in jobs] == groups
    with pytest.raises(RecipeError, match="at least 3"):
        plan_cohorts(a_recipe(students, teacher=teacher, cohorts=2), list(recipe.students), nodes(2), costs_for(recipe))


def test_a_cohort_too_few_is_refused() -> None:
    recipe = a_recipe([a_student("a"), a_student("b", batch=32)], cohorts=1)
    with pytest.raises(RecipeError, match="at least 2"):
        plan_cohorts(recipe, list(recipe.students), nodes(2), costs_for(recipe))


def test_checkpoints_of_every_epoch_count() -> None:
    recipe = a_recipe([a_student("one")])  # three epochs of two steps
    costs = costs_for(recipe, keeping=0.5)
    (spec,) = recipe.students
    assert (costs.seconds(spec), replace(costs, each_epoch=True).seconds(spec)) == pytest.approx(
        (6.0, 6.0 + 3 * 0.5), abs=0.1
    )


def test_parts_cost_about_the_same_and_keep_their_order() -> None:
    recipe = a_recipe([a_student(str(cost), seed=cost) for cost in (5, 1, 4, 2, 3)])
    parts = split_evenly(tuple(recipe.students), families_of(recipe.students), 2, lambda family: float(family[0].name))
    assert [[spec.name for spec in part] for part in parts] == [["5", "1", "2"], ["4", "3"]]
    assert len(split_evenly(tuple(recipe.students), families_of(recipe.students), 9, lambda family: 1.0)) == 5


def test_stacks_stay_whole_where_the_fleet_then_ends_sooner() -> None:
    """Of four architectures each of two cohorts has two, and not half the students of all: a stack takes its time
    however few students it has.
    """
    models = [{"kind": "mlp", "hidden": hidden} for hidden in (4, 8, 16, 32)]
    recipe = a_recipe([a_student(f"{m['hidden']}-{seed}", model=m, seed=seed) for seed in (0, 1) for m in models])
    students, at_once = tuple(recipe.students), nodes(2)
    stacked = {"stacked": True, "stack": 100.0, "together": 1.0}
    cohorts, _ = plan_cohorts(recipe, students, at_once, costs_for(recipe, **stacked))
    assert sorted(len({spec.model.label for spec in cohort}) for cohort in cohorts) == [2, 2]
    dear = costs_for(recipe, **stacked | {"stack": 0.01, "together": 100.0})  # then nothing is lost with a stack cut
    one = dear.probes["4-0"]
    assert one is not None
    dear = replace(dear, probes={**dear.probes, "4-0": replace(one, together=300.0)})
    cohorts, _ = plan_cohorts(recipe, students, at_once, dear)
    assert max(map(dear.cohort_seconds, cohorts)) < 1.3 * min(map(dear.cohort_seconds, cohorts))
    assert any(len({spec.model.label for spec in cohort}) > 2 for cohort in cohorts)


def test_students_that_share_stage_one_stay_together() -> None:
    students = [
        a_student(f"{seed}-{length}", seed=seed, objective=ANNEALING | {"stage2_epochs": length})
        for length in (1, 2)
        for seed in (0, 1)
    ]
    recipe = a_recipe(students)
    parts = split_evenly(tuple(recipe.students), families_of(recipe.students), 4, lambda family: 1.0)
    assert [[spec.name for spec in part] for part in parts] == [["0-1", "0-2"], ["1-1", "1-2"]]
    costs = costs_for(recipe)
    assert costs.steps_left(parts[0][0]) == 2 * (2 + 1)
    assert costs.steps_left(parts[0][0], follows=True) == 2 * 1
    assert costs.leaders(parts[0]) == {"0-2": "0-1"}
    assert costs.family_seconds(parts[0]) == pytest.approx(2 * (2 + 1) + 2 * 2, abs=0.1)
    resumed = replace(costs, behind={"0-2": (1, 1)})  # it has begun, so it leads; at stage II it could not
    assert resumed.leaders(parts[0]) == {"0-1": "0-2"}
    assert resumed.family_seconds(parts[0]) == pytest.approx((2 * 4 - 3) + 2 * 1, abs=0.1)
    assert (costs.stream_steps(parts[0]), resumed.stream_steps(parts[0])) == (2 * 4, 2 * 4 - 3)
    assert replace(costs, behind={"0-2": (2, 0)}).leaders(parts[0]) == {}


def test_a_stream_is_summed_up_as_if_each_epoch_were_looked_at() -> None:
    rng = random.Random(0)
    for _ in range(200):
        students = [
            a_student(str(number), objective=ANNEALING | {"stage1_epochs": rng.randint(2, 6), "stage2_epochs": 3})
            if rng.random() < 0.7
            else a_student(str(number), objective=HARD | {"epochs": rng.randint(1, 9)})
            for number in range(rng.randint(1, 5))
        ]
        recipe = a_recipe(students)
        behind = {spec.name: (rng.randint(0, 9), rng.randint(0, 2)) for spec in recipe.students if rng.random() < 0.6}
        costs, cohort = replace(costs_for(recipe), behind=behind), tuple(recipe.students)
        followers, seen = costs.leaders(cohort), dict[int, list[tuple[int, bool]]]()
        for spec in cohort:
            begins, step = costs.starts_at(spec, spec.name in followers)
            needs = [stage.needs_logits for stage in stages(spec.objective) for _ in range(stage.epochs)]
            for epoch in range(begins, len(needs)):
                seen.setdefault(epoch, []).append((step if epoch == begins else 0, needs[epoch]))
        expected = [(min(step for step, _ in one), any(need for _, need in one)) for _, one in sorted(seen.items())]
        found = costs.streamed(cohort)
        assert [(one.skipped, one.logits) for one in found for _ in range(one.epochs)] == expected
        assert costs.stream_steps(cohort) == sum(2 - step for step, _ in expected)


def test_a_plan_of_very_many_epochs_takes_no_longer() -> None:
    recipe = a_recipe([a_student("long")])
    (spec,) = recipe.students
    many = spec.model_copy(update={"objective": spec.objective.model_copy(update={"stage1_epochs": 10**15})})
    assert costs_for(recipe).stream_steps((many,)) == 2 * (10**15 + 1)


@pytest.mark.parametrize("epochs", [10**6 + 1, 10**8, 2**63, 10**30])
def test_more_epochs_than_anybody_trains_are_refused(epochs: int) -> None:
    for objective in (ANNEALING | {"stage1_epochs": epochs}, HARD | {"epochs": epochs}):
        with pytest.raises(ValidationError, match="less than or equal to 1000000"):
            a_recipe([a_student("long", objective=objective)])
    train = {"epochs": epochs, "optimizer": ADAMW}
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        a_recipe([a_student("one")], teacher={"model": {"kind": "cnn", "width": 8}, "train": train})


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
