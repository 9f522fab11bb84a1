"""Comparisons: which students they take, statistics against scipy and by hand, and one from recipe to table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

import akd_dist
from akd_dist.base.errors import DamagedError, RecipeError
from akd_dist.base.formatting import CUSTOM, OBJECTIVE_LABELS
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.report import CompareDocument, ComparedRow, Estimate, SplitRows
from akd_dist.recipe import Recipe, ResNet
from akd_dist.recipe.load import load_recipe
from akd_dist.reporting.comparison import cells, compare, comparison_table, expand, read_comparison, to_markdown
from akd_dist.reporting.seeds import estimate
from tests.fleets import ADAMW, ANNEALING, a_recipe, a_student
from tests.survivors import forked_cohorts

SGD = {"kind": "sgd", "lr": 0.1}
TAKD = {"kind": "takd", "epochs": 4, "temperature": 2.0}
ASSISTANT = {"model": {"kind": "mlp", "hidden": 16}, "objective": {"kind": "kd", "epochs": 2}, "optimizer": ADAMW}
TEACHER = {"model": {"kind": "cnn", "width": 8}, "train": {"epochs": 1, "optimizer": ADAMW}}


def unnamed(objective: dict[str, Any], hidden: int = 8, **changes: Any) -> dict[str, Any]:
    """A student block that takes its default name."""
    block = a_student("", model={"kind": "mlp", "hidden": hidden}, objective=objective, **changes)
    del block["name"]
    return block


# ---- which students


def test_what_is_missing_is_derived_from_annealing_kd() -> None:
    expanded = expand(a_recipe([unnamed(ANNEALING, batch=32, threads=2, precision="float64", optimizer=SGD)]))
    assert expanded.name == "fleet-compare"
    assert [spec.name for spec in expanded.students] == [
        f"mlp-8-{kind}-s{seed}"
        for kind in ("hard_labels", "kd", "annealing_kd-t2", "continuation_kd-t2")
        for seed in (0, 1, 2)
    ]
    for spec in expanded.students:
        assert (spec.batch, spec.threads, spec.precision, spec.optimizer.lr) == (32, 2, "float64", 0.1)
        assert spec.objective.epochs == 3, "every row has the budget of both stages"


def test_the_papers_table_of_cifar10_is_one_command_with_as_many_seeds_as_asked() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "jobs" / "cifar10.yaml")
    assert isinstance(recipe.teacher.model, ResNet)
    assert recipe.teacher.assistant is not None
    assert isinstance(recipe.teacher.assistant.model, ResNet)
    assert (recipe.teacher.model.depth, recipe.teacher.assistant.model.depth) == (110, 20)
    students = expand(recipe, 8).students
    assert {spec.model.label for spec in students} == {"resnet-8"}
    found = {
        kind: [spec for spec in students if spec.objective.kind == kind]
        for kind in ("hard_labels", "kd", "takd", "annealing_kd", "continuation_kd")
    }
    assert {kind: sorted(spec.seed for spec in specs) for kind, specs in found.items()} == {
        kind: list(range(8)) for kind in found
    }
    assert len(students) == 40
    settings = {kind: {(s.objective.epochs, s.batch, s.optimizer.lr) for s in specs} for kind, specs in found.items()}
    assert settings.pop("continuation_kd") == {(200, 32, 0.2)}
    assert all(one == {(320, 128, 0.1)} for one in settings.values())


def test_a_chain_adds_takd_for_every_model() -> None:
    students = [
        unnamed(ANNEALING | {"reduction": "sum"}),
        unnamed(TAKD, optimizer=SGD),
        unnamed(ANNEALING, hidden=4),
    ]
    expanded = expand(a_recipe(students, teacher=TEACHER | {"assistant": ASSISTANT}))
    assert [spec.model.label for spec in expanded.students] == ["mlp-8"] * 15 + ["mlp-4"] * 15
    assert [spec.objective.kind for spec in expanded.students[::3]] == 2 * KINDS
    takd = [spec for spec in expanded.students if spec.objective.kind == "takd"]
    assert [(spec.objective.epochs, spec.optimizer.kind) for spec in takd] == [(4, "sgd")] * 3 + [(3, "adamw")] * 3
    continuation = next(spec.objective for spec in expanded.students if spec.objective.kind == "continuation_kd")
    assert continuation.model_dump(include={"tau_max", "epochs", "reduction"}) == {
        "tau_max": 2,
        "epochs": 3,
        "reduction": "sum",
    }


def test_several_settings_of_one_objective_are_several_rows() -> None:
    grid = [ANNEALING | {"tau_max": tau, "stage1_epochs": 4} for tau in (1, 2, 4)]
    expanded = expand(a_recipe([unnamed(objective) for objective in grid]), seeds=2)
    annealing = [spec.name for spec in expanded.students if spec.objective.kind == "annealing_kd"]
    assert annealing == [f"mlp-8-annealing_kd-t{tau}-s{seed}" for tau in (1, 2, 4) for seed in (0, 1)]
    assert len(expanded.students) == 12


@pytest.mark.parametrize(
    ("listed", "asked", "expected"),
    [
        ([0], None, [0, 1, 2]),
        ([5], None, [0, 1, 2]),
        ([3, 7], None, [3, 7]),
        ([3, 7], 3, [0, 1, 2]),
        ([0, 1, 2, 3], 2, [0, 1]),
    ],
)
def test_seeds(listed: list[int], asked: int | None, expected: list[int]) -> None:
    expanded = expand(a_recipe([unnamed(ANNEALING, seed=seed) for seed in listed]), asked)
    for kind in ("hard_labels", "kd", "annealing_kd", "continuation_kd"):
        assert [spec.seed for spec in expanded.students if spec.objective.kind == kind] == expected


def test_seeds_of_all_objectives_are_paired() -> None:
    expanded = expand(a_recipe([unnamed(ANNEALING, seed=4), unnamed({"kind": "kd", "epochs": 9}, seed=2)]))
    assert [spec.seed for spec in expanded.students] == [2, 4] * 4


def test_names_that_were_given_are_kept_and_carried_on() -> None:
    recipe = a_recipe([a_student("mine"), a_student("his-s1", seed=1, objective={"kind": "kd", "epochs": 9})])
    named = {spec.objective.kind: [] for spec in expand(recipe).students}  # type: dict[str, list[str]]
    for spec in expand(recipe).students:
        named[spec.objective.kind].append(spec.name)
    assert named["annealing_kd"] == ["mine", "mine-s1"]
    assert named["kd"] == ["his-s0", "his-s1"]


@pytest.mark.parametrize(
    ("students", "seeds", "told"),
    [
        ([unnamed({"kind": "hard_labels", "epochs": 3})], None, "none of them learns by Annealing-KD"),
        ([unnamed(ANNEALING), unnamed({"kind": "kd", "epochs": 3}, hidden=4)], None, "mlp-4"),
        ([unnamed(ANNEALING)], 1, "two seeds or more"),
        ([unnamed(ANNEALING), a_student("mlp-8-kd-s0", model={"kind": "mlp", "hidden": 9})], None, "mlp-8-kd-s0"),
        ([unnamed(ANNEALING)], 0, "two seeds or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(students: list[dict[str, Any]], seeds: int | None, told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        expand(a_recipe(students), seeds)
    assert told in str(refused.value)
    assert refused.value.next


def test_a_name_that_grows_too_long_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be compared"):
        expand(a_recipe([unnamed(ANNEALING)], name="n" * 99))


# ---- statistics


def test_an_interval_by_hand() -> None:
    # Three values, s = 0.01, two degrees of freedom: t = 4.302653.
    found = estimate({2: 0.90, 0: 0.91, 7: 0.92})
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.n == 3
    assert found.mean == pytest.approx(0.91)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert estimate({3: 0.5}) == Estimate(n=1, mean=0.5, low=None, high=None)
    assert estimate({}) is None


def entry(name: str, seed: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    done = accuracy is not None
    return {
        "name": name,
        "model": "mlp-8",
        "seed": seed,
        "parameters": 610,
        "objective": "kd",
        "tau_max": None,
        "epochs": 3,
        "validation": None,
        "seconds": 1.0,
        "path": f"students/{name}",
        "store": "stores/0f",
        "teacher": "7c",
        "state": "done" if done else "diverged",
        "reason": None if done else "the loss is nan",
        "test": {"accuracy": accuracy} if done else None,
        "agreement": 0.9 if done else None,
    } | changes


def fleet_of(recipe: Recipe, accuracies: dict[str, list[float | None]]) -> FleetDocument:
    """What fleet.json holds: a comparison reads names, states and metrics. Accuracies by objective, one a seed."""
    students = []
    left = {kind: list(values) for kind, values in accuracies.items()}
    for spec in recipe.students:
        students.append(entry(spec.name, spec.seed, left[spec.objective.kind].pop(0)))
    teacher = {"model": "cnn-8", "parameters": 5000, "test": {"accuracy": 0.98}, "fingerprint": "7c"}
    below = {"model": "mlp-16", "parameters": 1210, "test": {"accuracy": 0.95}, "fingerprint": "9e"}
    assistants = [below | {"agreement": 0.94, "store": "stores/1a"}] if recipe.teacher.assistant else []
    return FleetDocument.model_validate(
        {
            "run": f"runs/{recipe.name}",
            "store": "stores/0f",
            "task": "classification",
            "metric": "accuracy",
            "teacher": teacher,
            "assistants": assistants,
            "students": students,
            "cohorts": 1,
            "seconds": 61.0,
        }
    )


KINDS = [kind for kind in OBJECTIVE_LABELS if kind != CUSTOM]  # an own objective is compared where it is listed
ROWS: SplitRows = {"train": 1258, "validation": 180, "test": 359}
RESULTS: dict[str, list[float | None]] = {
    "hard_labels": [0.80, 0.82, 0.81, 0.84],
    "kd": [0.81, 0.85, 0.80, 0.86],
    "annealing_kd": [0.86, 0.85, 0.88, 0.87],
    "continuation_kd": [0.87, None, 0.85, 0.89],
}


@pytest.fixture(scope="module")
def four_seeds() -> CompareDocument:
    recipe = expand(a_recipe([unnamed(ANNEALING)]), 4)
    return compare(recipe, fleet_of(recipe, RESULTS), ROWS, "akd-dist compare digits.yaml --seeds 4")


def row(document: CompareDocument, objective: str) -> ComparedRow:
    return next(one for one in document.table if one.objective == objective)


def estimated(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


@pytest.mark.parametrize(("key", "baseline"), [("over_scratch", "hard_labels"), ("over_kd", "kd")])
def test_differences_are_those_of_the_paired_t_test(four_seeds: CompareDocument, key: str, baseline: str) -> None:
    mine, base = (np.array(RESULTS[kind], dtype=float) for kind in ("annealing_kd", baseline))
    interval = stats.ttest_rel(mine, base).confidence_interval(0.95)
    found = estimated(getattr(row(four_seeds, "annealing_kd"), key))
    assert found.n == 4
    assert [found.low, found.mean, found.high] == pytest.approx([interval.low, np.mean(mine - base), interval.high])


def test_a_mean_is_that_of_the_one_sample_t_test(four_seeds: CompareDocument) -> None:
    interval = stats.ttest_1samp(RESULTS["kd"], 0.0).confidence_interval(0.95)
    found = estimated(row(four_seeds, "kd").test)
    assert [found.low, found.high] == pytest.approx([interval.low, interval.high])


def test_a_student_that_diverged_is_counted_named_and_in_no_mean(four_seeds: CompareDocument) -> None:
    found = row(four_seeds, "continuation_kd")
    assert found.seeds == [0, 2, 3]
    assert estimated(found.test).mean == pytest.approx((0.87 + 0.85 + 0.89) / 3)
    assert estimated(found.over_kd).mean == pytest.approx((0.06 + 0.05 + 0.03) / 3), "pairs are those of the seeds left"
    assert [(one.name, one.state) for one in found.lost] == [("mlp-8-continuation_kd-t2-s1", "diverged")]
    for text in (to_markdown(four_seeds), printed(four_seeds)):
        assert "3 of 4" in text
        assert "mlp-8-continuation_kd-t2-s1 diverged, and is in no mean: the loss is nan" in text


def test_a_baseline_has_no_difference_to_itself(four_seeds: CompareDocument) -> None:
    assert row(four_seeds, "hard_labels").over_scratch is None
    assert row(four_seeds, "hard_labels").over_kd is None
    assert row(four_seeds, "kd").over_kd is None
    assert estimated(row(four_seeds, "kd").over_scratch).mean == pytest.approx(0.0125)


def test_nobody_finished() -> None:
    recipe = expand(a_recipe([unnamed(ANNEALING)]))
    document = compare(recipe, fleet_of(recipe, {kind: [None] * 3 for kind in KINDS}), ROWS, "akd-dist compare")
    assert "0 of 3" in printed(document)


# ---- as text


def printed(document: CompareDocument, width: int = 80) -> str:
    console = Console(width=width, record=True, quiet=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.quiet = False
    console.print(comparison_table(document))
    console.file.close()
    return console.export_text()


def test_the_table_fits_a_terminal(four_seeds: CompareDocument) -> None:
    text = printed(four_seeds)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"Annealing-KD +4 +86\.50 ± 2\.05 +\+4\.75 ± 3\.28 +\+3\.50 ± 5\.88 +90\.00", text)
    assert "teacher cnn-8" in text


def test_the_markdown_says_how_it_came_about(four_seeds: CompareDocument) -> None:
    text = to_markdown(four_seeds)
    lines = text.splitlines()
    assert lines[0] == "`akd-dist compare digits.yaml --seeds 4`"
    assert "1,258 train rows, 180 validation rows that pick the epoch, 359 test rows" in text
    assert "Seeds 0, 1, 2, 3" in text
    assert "| cnn-8 (5,000) | teacher |  | 98.00 |  |  |  |" in lines
    assert "| mlp-8 (610) | from scratch | 4 | 81.75 ± 2.72 |  |  | 90.00 |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert text == to_markdown(CompareDocument.model_validate_json(json.dumps(four_seeds.plain())))


def test_without_an_assistant_a_line_says_what_takd_needs(four_seeds: CompareDocument) -> None:
    assert "TAKD is missing: give the recipe a teacher.assistant" in to_markdown(four_seeds)
    recipe = expand(a_recipe([unnamed(ANNEALING), unnamed(TAKD)], teacher=TEACHER | {"assistant": ASSISTANT}))
    document = compare(recipe, fleet_of(recipe, {kind: [0.8, 0.81, 0.82] for kind in KINDS}), ROWS, "akd-dist compare")
    text = to_markdown(document)
    assert "TAKD is missing" not in text
    assert "| mlp-16 (1,210) | assistant |  | 95.00 |  |  | 94.00 |" in text
    assert [one.objective for one in document.table] == KINDS


def test_a_regression_has_no_agreement(four_seeds: CompareDocument) -> None:
    numbers = four_seeds.model_copy(update={"task": "regression", "metric": "pearson"})
    assert "agreement" not in to_markdown(numbers)
    assert "agree" not in printed(numbers)
    assert "pearson x 100" in to_markdown(numbers)
    widths = {line.count("|") for line in to_markdown(numbers).splitlines() if line.startswith("|")}
    assert widths == {7}


def test_rows_of_one_objective_are_told_apart() -> None:
    recipe = expand(a_recipe([unnamed(ANNEALING), unnamed(ANNEALING | {"tau_max": 1})]), 2)
    results: dict[str, list[float | None]] = {kind: [0.8, 0.81] for kind in ("hard_labels", "kd", "continuation_kd")}
    fleet = fleet_of(recipe, results | {"annealing_kd": [0.8, 0.81, 0.82, 0.83]})
    text = to_markdown(compare(recipe, fleet, ROWS, "akd-dist compare"))
    assert "Annealing-KD: mlp-8-annealing_kd-t1 |" in text
    assert "Annealing-KD: mlp-8-annealing_kd-t2 |" in text


# ---- the whole way


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("compared")
    students = [unnamed(ANNEALING, hidden=4, seed=seed) for seed in (0, 1)] + [unnamed(TAKD, hidden=4)]
    recipe = a_recipe(students, teacher=TEACHER | {"assistant": ASSISTANT}, name="tiny")
    (root / "tiny.yaml").write_text(recipe.to_yaml())
    with forked_cohorts():
        return root, again(root)


def again(root: Path) -> dict[str, Any]:
    return akd_dist.compare(
        root / "tiny.yaml",
        store_root=root / "stores",
        run_root=root / "runs",
        cache_root=root / "cache",
        console=Console(quiet=True),
    )


@pytest.mark.ray
def test_a_comparison_from_recipe_to_table(compared: tuple[Path, dict[str, Any]]) -> None:
    root, printed = compared
    document = CompareDocument.model_validate(printed)
    run = root / "runs" / "tiny-compare"
    assert json.loads((run / "comparison.json").read_bytes()) == printed | {"run": "."}
    assert (run / "comparison.md").read_text() == to_markdown(document)
    assert [one.objective for one in document.table] == KINDS
    assert {tuple(one.seeds) for one in document.table} == {(0, 1)}
    fleet = json.loads((run / "fleet.json").read_bytes())
    assert document.teacher.test == fleet["teacher"]["test"]["accuracy"]
    scratch = [one["test"]["accuracy"] for one in fleet["students"] if one["objective"] == "hard_labels"]
    assert estimated(row(document, "hard_labels").test).mean == pytest.approx(sum(scratch) / 2)
    assert document.command == f"akd-dist compare {root / 'tiny.yaml'}"
    assert document.rows == ROWS
    page = (run / "report.html").read_text()
    assert "Objectives compared" in page
    assert "assistant, mlp" in page
    for cell in (cell for line in cells(document) for cell in line):
        assert cell in page


def test_a_damaged_comparison_is_refused(tmp_path: Path) -> None:
    assert read_comparison(tmp_path) is None
    (tmp_path / "comparison.json").write_text('{"run": 3}')
    with pytest.raises(DamagedError, match=r"comparison\.json is damaged"):
        read_comparison(tmp_path)


@pytest.mark.ray
def test_the_second_time_it_only_reads(compared: tuple[Path, dict[str, Any]]) -> None:
    root, document = compared
    run = root / "runs" / "tiny-compare"
    before = {name: (run / name).read_bytes() for name in ("comparison.json", "comparison.md", "fleet.json")}
    attempts = sorted(run.glob("control/attempt-*"))
    assert again(root) == document
    assert {name: (run / name).read_bytes() for name in before} == before
    assert sorted(run.glob("control/attempt-*")) == attempts != []  # nobody was trained
