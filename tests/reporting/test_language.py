"""Language models in tables and pages: less cross-entropy is better everywhere, and nothing of it is in per cent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.formatting import SHOWN
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.report import ComparedModel, CompareDocument, ComparedRow, Estimate
from akd_dist.recipe import LOWEST_IS_BEST, METRICS
from akd_dist.reporting.comparison import comparison_table, to_markdown
from akd_dist.reporting.page import render, write_reports
from akd_dist.reporting.results import Run, read_run
from akd_dist.reporting.seeds import best_of, chosen_on_validation, group_students, pareto_front
from tests.made_runs import check_offline, fleet_of, printed, records_of, student, write_run


def measured(cross_entropy: float, **more: float) -> dict[str, float]:
    """What training leaves of a language model on a split."""
    told = {"accuracy": 0.3, "cross_entropy": cross_entropy, "perplexity": 2.718281828**cross_entropy}
    return told | {"bits_per_byte": cross_entropy / 3, **more, "loss": cross_entropy}


def language_student(model: str, objective: str, seed: int, cross_entropy: float, **changes: Any) -> dict[str, Any]:
    test = measured(cross_entropy, agreement=0.4, divergence=0.5)
    split = {"validation": measured(cross_entropy + 0.1), "test": test, "agreement": 0.4}
    return student(model, objective, seed, 0.5) | split | changes


def a_fleet() -> dict[str, Any]:
    """Two sizes; the larger one is no better from scratch."""
    students = [
        language_student(f"causal-{width}", objective, seed, base + 0.01 * seed)
        for width, objective, base in ((8, "annealing_kd", 3.2), (8, "hard_labels", 3.5), (16, "annealing_kd", 3.0))
        for seed in range(3)
    ]
    students += [language_student("causal-16", "hard_labels", seed, 3.6 + 0.01 * seed) for seed in range(3)]
    teacher = {"model": "causal-64", "parameters": 90_000, "test": measured(2.5), "fingerprint": "7c" * 32}
    return fleet_of(*students) | {"task": "language_model", "metric": "cross_entropy", "teacher": teacher}


def run_of(fleet: dict[str, Any]) -> Run:
    metrics = {entry["name"]: records_of(entry) for entry in fleet["students"]}
    for records in metrics.values():
        records[:] = [
            one.model_copy(update={"validation": one.validation.model_validate(measured(4 - 0.01 * one.epoch))})
            for one in records
            if one.validation is not None
        ]
    return Run(Path(fleet["run"]), FleetDocument.model_validate(fleet), metrics)


def test_what_is_shown_as_less_is_better_is_what_recipes_rank_so() -> None:
    ranked = {name for metrics in METRICS.values() for name in metrics}
    assert {name for name in ranked if SHOWN[name].lowest} == LOWEST_IS_BEST


def test_the_best_is_the_lowest_and_the_front_goes_down() -> None:
    groups = group_students(FleetDocument.model_validate(a_fleet()).students, "cross_entropy")
    best = best_of(groups)
    assert best is not None
    assert (best.model, best.objective) == ("causal-16", "annealing_kd")
    front = [(group.model, group.objective) for group in pareto_front(groups)]
    assert front == [("causal-8", "annealing_kd"), ("causal-16", "annealing_kd")]


def test_the_temperature_of_the_lowest_validation_is_chosen() -> None:
    made = [
        language_student("causal-8", "annealing_kd", 0, value, tau_max=tau, name=f"causal-8-annealing_kd-t{tau}-s0")
        for tau, value in ((2, 3.4), (4, 3.1), (8, 3.3))
    ]
    chosen = chosen_on_validation(group_students(FleetDocument.model_validate(a_fleet() | {"students": made}).students,
                                                 "cross_entropy"))  # fmt: skip
    assert chosen is not None
    assert [one.tau_max for one in chosen.students] == [4]


def test_the_table_says_nats_to_three_digits_and_what_is_beside_them() -> None:
    text = printed(a_fleet(), width=200)
    assert re.search(r"teacher +90,000 +100 % +2\.500 +12\.18 +0\.833 +30\.00", text)
    assert re.search(r"causal-16.*Annealing-KD, τ 4 +3\.010 ± 0\.010 +20\.29 +1\.003 +30\.00 +0\.500 +40\.00", text)
    assert re.search(r"cross-entropy +perplexity +bits/byte +accuracy % +divergence", text)


def test_the_page_says_which_way_is_better(tmp_path: Path) -> None:
    page = render(run_of(a_fleet()))
    check_offline(page)
    assert "<h3>Cross-entropy against size</h3>" in page
    assert "less is better" in page
    assert "validation cross-entropy, nats" in page
    assert "301." not in page, "nats are no per cent"
    # Less than from scratch is the better colour.
    assert '<span class="up">-0.300</span>' in page
    assert re.search(r"<b>-0\.450</b>cross-entropy over from scratch<small>mean of 2, ahead in 2", page)
    assert "choose the same token" in page
    assert "not kept token by token" in page


def test_runs_are_compared_by_it(tmp_path: Path) -> None:
    for name, shift in (("one", 0.0), ("two", -0.2)):
        fleet = a_fleet() | {"run": f"runs/{name}"}
        fleet["students"] = [
            one | {"test": measured(one["test"]["cross_entropy"] + shift)} for one in fleet["students"]
        ]
        write_run(tmp_path / name, fleet)
    document = write_reports([tmp_path / "one", tmp_path / "two"])
    group = next(one for one in document.runs[0].groups if one.pareto)
    assert set(group.beside) == {"perplexity", "bits_per_byte", "accuracy"}
    assert document.comparison is not None
    assert document.comparison.groups[-1].over_first is not None
    assert document.comparison.groups[-1].over_first.mean == pytest.approx(-0.2)
    text = (tmp_path / "report.html").read_text()
    check_offline(text)
    assert "Less of cross-entropy is better" in text
    assert read_run(tmp_path / "two").document("two", tmp_path).metric == "cross_entropy"


def test_a_comparison_is_in_nats() -> None:
    def row(objective: str, mean: float, over: float | None) -> ComparedRow:
        difference = None if over is None else Estimate(n=2, mean=over, low=over - 0.02, high=over + 0.02)
        test = Estimate(n=2, mean=mean, low=mean - 0.05, high=mean + 0.05)
        return ComparedRow(name=f"causal-8-{objective}", model="causal-8", parameters=610, objective=objective,
                           tau_max=None, epochs=4, seeds=[0, 1], test=test, over_scratch=difference, over_kd=None,
                           agreement=0.4, lost=[])  # fmt: skip

    document = CompareDocument(
        run="runs/a-compare", command="akd-dist compare a.yaml", task="language_model", metric="cross_entropy",
        confidence=0.95, rows={"train": 9, "validation": 9, "test": 9}, assistants=[], missing=[],
        teacher=ComparedModel(model="causal-64", parameters=90_000, test=2.5, agreement=None),
        table=[row("hard_labels", 3.5, None), row("kd", 3.25, -0.25)],
    )  # fmt: skip
    text = to_markdown(document)
    assert "cross-entropy, nats (less is better)" in text
    assert "| 3.250 ± 0.050 | -0.250 ± 0.020 |" in text
    assert "| 40.00 |" in text
    assert "x 100" not in text
    assert comparison_table(document).row_count == 4


def test_documents_of_classifiers_do_not_change() -> None:
    fleet = fleet_of(student("mlp-8", "kd", 0))
    assert FleetDocument.model_validate(fleet).plain() == fleet
    assert "beside" not in json.dumps(run_of_classes(fleet))


def run_of_classes(fleet: dict[str, Any]) -> dict[str, Any]:
    from tests.made_runs import run_of as of_classes

    return of_classes(fleet).document("runs/a", Path("report.html")).plain()
