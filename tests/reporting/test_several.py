"""Seeds of several runs pooled by what students are, and tau_max chosen on the validation rows."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.report import SplitRows
from akd_dist.recipe import Recipe
from akd_dist.reporting.comparison import cells, compare, comparison_table, to_markdown
from akd_dist.reporting.page import write_report, write_reports
from akd_dist.reporting.results import Run, read_run
from akd_dist.reporting.runs_page import render_runs
from akd_dist.reporting.seeds import chosen_on_validation, group_students
from akd_dist.reporting.several import pool_notes, pooled, told_apart
from akd_dist.reporting.tables import fleet_table, pooled_table
from tests.fleets import ANNEALING, HARD, KD, a_recipe, a_student
from tests.made_runs import fleet_of, student, write_run


def annealed(tau: int, seed: int, validation: float, test: float, **changes: Any) -> dict[str, Any]:
    name = f"mlp-8-annealing_kd-t{tau}-s{seed}"
    measured = {"validation": {"accuracy": validation}, "test": {"accuracy": test}}
    return student("mlp-8", "annealing_kd", seed, test, name=name, tau_max=tau, **measured | changes)


# By validation: seed 0 takes tau 4, seed 1 tau 2, seed 2 the smaller of two that are equal.
MEASURED = {2: [(0.5, 0.9), (0.7, 0.6), (0.6, 0.5)], 4: [(0.6, 0.4), (0.6, 0.9), (0.6, 0.8)]}
CHOICE = [annealed(tau, seed, *both) for tau, measured in MEASURED.items() for seed, both in enumerate(measured)]


def shown(table: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tau_max_is_chosen_by_validation_and_never_by_test() -> None:
    family = group_students(map(FleetDocument.model_validate(fleet_of(*CHOICE)).students.__getitem__, range(6)))
    chosen = chosen_on_validation(family)
    assert chosen is not None
    assert [(one.seed, one.tau_max) for one in chosen.students] == [(0, 4), (1, 2), (2, 2)]
    assert chosen.by_seed == {0: 0.4, 1: 0.6, 2: 0.5}, "although other temperatures have better test metrics"
    assert chosen_on_validation(family[:1]) is None


def test_a_seed_of_which_a_student_did_not_finish_is_left_out() -> None:
    lost = {"state": "diverged", "reason": "nan", "test": None, "validation": None, "agreement": None}
    entries = [*CHOICE[:5], CHOICE[5] | lost]
    family = group_students(FleetDocument.model_validate(fleet_of(*entries)).students)
    chosen = chosen_on_validation(family)
    assert chosen is not None
    assert sorted(chosen.by_seed) == [0, 1]


def test_page_and_table_of_a_run_have_the_row(tmp_path: Path) -> None:
    write_run(tmp_path, fleet_of(*CHOICE, *(student("mlp-8", "hard_labels", seed, 0.3) for seed in range(3))))
    run = read_run(tmp_path)
    (choice,) = run.tau_choices
    assert choice.test is not None
    assert choice.test.mean == pytest.approx(0.5)
    assert choice.over_scratch is not None
    assert choice.over_scratch.mean == pytest.approx(0.2)
    text = write_report(tmp_path).read_text()
    assert "τ chosen on validation: 2 x 2, 4 x 1" in text
    (line,) = [line for line in shown(fleet_table(run.fleet, run.chosen.values())).splitlines() if "chosen on" in line]
    assert "50.00 ± 10.00" in line
    document = write_reports([tmp_path])
    assert [(one.seed, one.tau_max) for one in document.runs[0].tau_max_chosen[0].chosen] == [(0, 4), (1, 2), (2, 2)]


ROWS: SplitRows = {"train": 1, "validation": 1, "test": 1}


def test_a_comparison_has_the_row_below_its_temperatures() -> None:
    blocks = [
        a_student(
            f"mlp-8-annealing_kd-t{tau}-s{seed}",
            model={"kind": "mlp", "hidden": 8},
            seed=seed,
            objective=ANNEALING | {"tau_max": tau, "stage1_epochs": 4},
        )
        for tau in (2, 4)
        for seed in range(3)
    ]
    blocks += [
        a_student(f"mlp-8-hard_labels-s{seed}", model={"kind": "mlp", "hidden": 8}, seed=seed, objective=HARD)
        for seed in range(3)
    ]
    fleet = fleet_of(*CHOICE, *(student("mlp-8", "hard_labels", seed, 0.3) for seed in range(3)))
    document = compare(a_recipe(blocks), FleetDocument.model_validate(fleet), ROWS, "akd-dist compare x.yaml")
    names = [(row.objective, row.tau_max, len(row.chosen)) for row in document.table]
    assert names == [
        ("annealing_kd", 2, 0),
        ("annealing_kd", 4, 0),
        ("annealing_kd", None, 3),
        ("hard_labels", None, 0),
    ]
    row = document.table[2]
    assert row.test is not None
    assert row.test.mean == pytest.approx(0.5)
    assert row.seeds == [0, 1, 2]
    assert row.over_scratch is not None
    assert row.over_scratch.mean == pytest.approx(0.2)
    assert "Annealing-KD, τ chosen on validation" in [cell for line in cells(document) for cell in line]
    assert "chosen on validation" in to_markdown(document)
    assert "chosen on" in shown(comparison_table(document))


# ---- several runs


def identity_of(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(recipe.identity()))
    return document | {"dataset": {"test": "ab"}, "teacher": {}} | changes


def a_run(
    root: Path, name: str, seeds: dict[int, float], prefix: str = "mlp", objective: Any = HARD, **changes: Any
) -> Run:
    blocks = [a_student(f"{prefix}-s{seed}", seed=seed, objective=objective) for seed in seeds]
    entries = [
        student("mlp-8", objective["kind"], seed, accuracy, name=f"{prefix}-s{seed}")
        for seed, accuracy in seeds.items()
    ]
    folder = root / name
    write_run(folder, fleet_of(*entries) | {"run": f"runs/{name}"})
    (folder / "identity.json").write_text(json.dumps(identity_of(a_recipe(blocks, name=name), **changes)))
    return read_run(folder)


def another_teacher(run: Run) -> Run:
    fleet = json.loads((run.folder / "fleet.json").read_bytes())
    fleet["teacher"]["fingerprint"] = "99"
    for one in fleet["students"]:
        one["teacher"] = "99"
    (run.folder / "fleet.json").write_text(json.dumps(fleet))
    return read_run(run.folder)


def test_seeds_of_the_same_student_are_pooled_whatever_it_is_called(tmp_path: Path) -> None:
    one = a_run(tmp_path, "one", {0: 0.8, 1: 0.82})
    two = a_run(tmp_path, "two", {1: 0.82, 2: 0.84}, prefix="other-name")
    (pool,) = pooled([one, two])
    assert pool.group.by_seed == {0: 0.8, 1: 0.82, 2: 0.84}
    assert (pool.twice, pool.differing) == ([1], [])
    assert pool_notes([pool]) == ["in several runs, and counted once: mlp, seeds 1"]
    document = pool.document()
    assert (document.seeds, document.runs) == ([0, 1, 2], [one.place, two.place])
    assert document.test is not None
    assert document.test.n == 3
    text = shown(pooled_table([one, two]))
    assert "82.00 ± 4.97" in text  # t(0.975, 2) * 0.02 / sqrt(3)
    assert "counted once" in text
    page = render_runs([one, two])
    assert "Seeds of all runs together" in page
    assert "82.00 ± 4.97" in page
    written = write_reports([one.folder, two.folder])
    assert written.comparison is not None
    assert [group.seeds for group in written.comparison.pooled] == [[0, 1, 2]]


def test_one_student_with_two_results_is_told(tmp_path: Path) -> None:
    (pool,) = pooled([a_run(tmp_path, "one", {0: 0.8, 1: 0.82}), a_run(tmp_path, "two", {1: 0.7})])
    assert pool.group.by_seed[1] == 0.82, "the first run's"
    assert pool.differing == [1]
    assert any("came to other results" in note for note in pool_notes([pool]))


@pytest.mark.parametrize("changes", [{"dataset": {"test": "cd"}}, {"data": {"seed": 4}}, {"device": "cuda"}])
def test_students_of_other_data_or_devices_are_others(tmp_path: Path, changes: dict[str, Any]) -> None:
    pools = pooled([a_run(tmp_path, "one", {0: 0.8}), a_run(tmp_path, "two", {1: 0.82}, **changes)])
    assert [sorted(pool.group.by_seed) for pool in pools] == [[0], [1]]


def test_students_of_another_teacher_are_others_and_runs_that_say_nothing_stand_alone(tmp_path: Path) -> None:
    one, two = a_run(tmp_path, "one", {0: 0.8}), another_teacher(a_run(tmp_path, "two", {1: 0.82}))
    (pool,) = pooled([one, two])
    assert pool.group.by_seed == {0: 0.8, 1: 0.82}, "from scratch, nobody learns from a teacher"
    assert pool.document().agreement is None
    assert told_apart([pool]) == {}
    one = a_run(tmp_path, "kd-one", {0: 0.8}, objective=KD)
    two = another_teacher(a_run(tmp_path, "kd-two", {1: 0.82}, objective=KD))
    pools = pooled([one, two])
    apart = told_apart(pools)
    assert list(apart) == ["teacher", "of"]
    assert apart["of"] == ["kd-one", "kd-two"]
    assert len(set(apart["teacher"])) == 2
    assert pool_notes(pools)[-1].endswith("mlp differ in the teacher")
    text = shown(pooled_table([one, two]))
    assert "kd-one" in text
    assert "kd-two" in text
    assert "differ in the teacher" in text
    page = render_runs([one, two])
    assert all(f'<td class="text">{cell}</td>' in page for cell in apart["teacher"])
    written = write_reports([one.folder, two.folder]).comparison
    assert written is not None
    assert "Their teachers differ." in written.warnings
    assert written.notes == pool_notes(pools)
    assert [group.teacher_fingerprint for group in written.pooled] == [one.fleet.students[0].teacher, "99"]
    one = a_run(tmp_path, "one-more", {0: 0.8})
    three = a_run(tmp_path, "three", {2: 0.9})
    (three.folder / "identity.json").unlink()
    assert len(pooled([one, read_run(three.folder)])) == 2


def test_a_student_that_finished_in_another_run_counts(tmp_path: Path) -> None:
    one, two = a_run(tmp_path, "one", {0: 0.8, 1: 0.9}), a_run(tmp_path, "two", {1: 0.82})
    fleet = json.loads((one.folder / "fleet.json").read_bytes())
    fleet["students"][1] |= {"state": "failed", "reason": "x", "test": None, "validation": None, "agreement": None}
    (one.folder / "fleet.json").write_text(json.dumps(fleet))
    (pool,) = pooled([read_run(one.folder), two])
    assert pool.group.by_seed == {0: 0.8, 1: 0.82}
