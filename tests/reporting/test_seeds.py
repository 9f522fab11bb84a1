"""The report's groups, means and tables, by hand."""

from __future__ import annotations

import html
import html.parser
import math
import re

import pytest

from akd_dist.base.formatting import BESIDE, OBJECTIVE_LABELS, SHOWN, amount, duration, seconds, share
from akd_dist.documents.fleet import FleetDocument, RunIdentity
from akd_dist.recipe import METRICS, AnnealingKD, ContinuationKD, CustomObjective, HardLabels, Kd, Takd
from akd_dist.reporting.curves import stage_figures
from akd_dist.reporting.drawing import OBJECTIVE_COLOURS
from akd_dist.reporting.page import render, tau_notes
from akd_dist.reporting.seeds import Spread, gain_over_scratch, group_label, pareto_front, plus_minus
from tests.made_runs import (
    ACCURACY,
    PEARSON,
    fleet_of,
    grouped,
    printed,
    regression_of,
    run_of,
    small_fleet,
    student,
    temperatures,
)

# --- grouping and numbers ---------------------------------------------------------------------------------------------


def test_the_fleet_made_up_here_is_what_a_run_writes() -> None:
    FleetDocument.model_validate(small_fleet())
    FleetDocument.model_validate(regression_of(small_fleet()))


def test_seeds_are_grouped_and_averaged() -> None:
    accuracies = (0.90, 0.92, 0.97)
    (group,) = grouped(student("mlp-8", "annealing_kd", seed, value) for seed, value in enumerate(accuracies))
    assert group.score is not None
    assert group.score.mean == pytest.approx(0.93)
    assert group.score.deviation == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert group.seconds == 2.5


def test_a_student_that_did_not_finish_counts_in_no_mean() -> None:
    (group,) = grouped([student("mlp-8", "annealing_kd", 0, 0.9), student("mlp-8", "annealing_kd", 1, None)])
    assert group.score == Spread(0.9, None)
    (group,) = grouped([student("mlp-8", "annealing_kd", 1, None)])
    assert (group.score, group.agreement, group.seconds) == (None, None, None)


def test_only_names_that_end_in_their_seed_are_averaged() -> None:
    fleet = [student("mlp-8", "annealing_kd", seed, name=f"rate-{seed}") for seed in (1, 2)]
    groups = grouped(fleet)
    assert [group_label(group, groups) for group in groups] == ["rate-1", "rate-2"]


def test_smallest_first_and_objectives_as_in_the_papers() -> None:
    order = ["hard_labels", "kd", "takd", "annealing_kd", "continuation_kd"]
    pairs = [*(("mlp-8", objective) for objective in order), ("mlp-64", "hard_labels")]
    groups = grouped(student(model, objective, 0) for model, objective in reversed(pairs))
    assert [(group.model, group.objective) for group in groups] == pairs


def test_every_objective_has_a_label_and_a_colour_of_its_own() -> None:
    objectives = (AnnealingKD, HardLabels, Kd, Takd, ContinuationKD, CustomObjective)
    kinds = {objective.model_fields["kind"].default for objective in objectives}
    assert set(OBJECTIVE_LABELS) == set(OBJECTIVE_COLOURS) == kinds
    assert len(set(OBJECTIVE_LABELS.values())) == len(set(OBJECTIVE_COLOURS.values())) == len(kinds)
    assert set(SHOWN) - {*BESIDE, "agreement"} == {
        "custom",
        *(metric for metrics in METRICS.values() for metric in metrics if metric not in BESIDE),
    }


def test_gain_needs_exactly_one_baseline() -> None:
    annealed, plain = student("mlp-8", "annealing_kd", 0, 0.95), student("mlp-8", "hard_labels", 0, 0.93)
    scratch, group = groups = grouped([annealed, plain])
    assert gain_over_scratch(group, groups) == pytest.approx(0.02)
    assert gain_over_scratch(scratch, groups) is None
    assert gain_over_scratch(group, [group]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (share(20_000, 20_000), "100 %"),
        (share(1_810, 20_000), "9.1 %"),
        (share(8, 20_000), "0.04 %"),
        (share(8, 0), "-"),
        (plus_minus(ACCURACY, Spread(0.97414, 0.00226)), "97.41 ± 0.23"),
        (plus_minus(ACCURACY, Spread(0.5, None)), "50.00"),
        (plus_minus(ACCURACY, None), "-"),
        (plus_minus(PEARSON, Spread(0.91234, 0.00226)), "0.9123 ± 0.0023"),
        (PEARSON.text(-0.5), "-0.5000"),
        (PEARSON.text(None), "-"),
        (ACCURACY.text(0.91234), "91.23"),
        (ACCURACY.with_unit("91.23"), "91.23 %"),
        (PEARSON.with_unit("0.9123"), "0.9123"),
        (ACCURACY.label, "accuracy, %"),
        (SHOWN["matthews"].label, "Matthews' correlation"),
        (seconds(2.345), "2.3"),
        (seconds(1234.5), "1,234"),
        (seconds(None), "-"),
        (seconds(0.0312), "0.031"),
        (duration(None), "-"),
        (duration(0), "0 s"),
        (duration(0.0312), "0.031 s"),
        (duration(9.4), "9.4 s"),
        (duration(48.4), "48 s"),
        (duration(59.6), "1 min 0 s"),
        (duration(-200), "-3 min 20 s"),
        (duration(7500), "2 h 5 min"),
        (ACCURACY.gain(0.0123), "+1.23"),
        (ACCURACY.gain(-0.0123), "-1.23"),
        (ACCURACY.gain(-0.00001), "0.00"),
        (amount(0.654), "0.65"),
        (amount(25.81), "26"),
        (amount(1234.5), "1,234"),
        (PEARSON.gain(-0.0123), "-0.0123"),
        (PEARSON.gain(None), "-"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


# --- the terminal's table ---------------------------------------------------------------------------------------------


def test_table_has_the_teacher_every_group_and_the_lost_students() -> None:
    text = printed(small_fleet())
    assert re.search(r"teacher\s+20,000\s+100 %\s+98\.00", text)
    assert text.count("Annealing-KD, τ 4") == 4
    assert text.count("from scratch") == 4
    assert "mlp-8-hard_labels-s2 diverged: the loss was not finite at epoch 3" in text
    assert "mlp-16-annealing_kd-t4-s2 failed: no memory; see logs/a.log" in text


@pytest.mark.parametrize("regression", [False, True])
def test_table_fits_eighty_columns(regression: bool) -> None:
    fleet = small_fleet()
    fleet["students"] += [student("mlp-8", "continuation_kd", seed, 0.9, tau_max=20) for seed in range(2)]
    text = printed(regression_of(fleet) if regression else fleet, width=80)
    assert "…" not in text
    assert "Continuation-KD, τ 20" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_regressions_table_shows_correlations_and_no_agreement() -> None:
    text = printed(regression_of(small_fleet()))
    assert re.search(r"teacher\s+20,000\s+100 %\s+0\.9800", text)
    assert re.search(r"\btest\b.*\n.*\bPearson\b", text)
    assert "0.9695 ± 0.0030" in text  # mlp-64, from scratch: 0.985 - 0.8 / 64 less 0, 0.003 and 0.006
    assert "agree" not in text
    assert "accuracy" not in text


def test_table_has_the_assistants_below_the_teacher() -> None:
    fleet = small_fleet()
    fleet["assistants"] = [fleet["teacher"] | {"model": "mlp-99", "parameters": 5000, "agreement": 0.97, "store": "s"}]
    FleetDocument.model_validate(fleet)
    assert re.search(r"assistant mlp-99 +5,000 +25 % +98\.00 +97\.00", printed(fleet))


def test_table_prints_names_as_they_are() -> None:
    assert "[red]x[/red]" in printed(fleet_of(student("[red]x[/red]-8", "hard_labels", 0)))


def test_groups_carry_what_the_table_shows() -> None:
    (group,) = grouped([student("mlp-8", "annealing_kd", 0)])
    assert group.objective_label == "Annealing-KD, τ 4"
    group.students[:] = [one.model_copy(update={"stage1_loss": "cross_entropy"}) for one in group.students]
    assert group.objective_label == "Annealing-KD by cross-entropy, τ 4"
    assert group.parameters == 610


# --- fronts, temperatures ---------------------------------------------------------------------------------------------


def test_the_front_holds_what_no_group_beats() -> None:
    scores = {"mlp-8": 0.90, "mlp-16": 0.89, "mlp-32": 0.93, "mlp-64": 0.93}
    groups = grouped(student(model, "hard_labels", 0, score) for model, score in scores.items())
    assert [group.model for group in pareto_front(groups)] == ["mlp-8", "mlp-32"]
    same_size = grouped([student("mlp-8", "kd", 0, 0.9), student("mlp-8", "hard_labels", 0, 0.8)])
    assert [group.objective for group in pareto_front(same_size)] == ["kd"]
    # A third of 359 rows each, as metrics have it: equal but for the seventh digit.
    alike = [student("mlp-8", "kd", seed, 0.3342619 + seed / 1e7) for seed in range(2)]
    equal = grouped([*alike, student("mlp-8", "hard_labels", 0, 0.3342619), student("mlp-9", "kd", 0, 0.334262)])
    assert sorted((group.model, group.objective) for group in pareto_front(equal)) == [
        ("mlp-8", "hard_labels"),
        ("mlp-8", "kd"),
    ]
    assert pareto_front(grouped([student("mlp-8", "kd", 0, None)])) == []


def test_the_effect_of_tau_is_paired_by_seed() -> None:
    low, high = run_of(temperatures(3)).tau_effects
    assert (low.tau_max, high.tau_max, low.family) == (2, 8, high.family)
    assert low.over_smallest is None
    difference, over_scratch, spread = high.over_smallest, low.over_scratch, high.test
    assert difference
    assert over_scratch
    assert spread
    # 0.01, 0.02, 0.03: mean 0.02, s = 0.01, t(0.975, 2) = 4.302653.
    assert difference.mean == pytest.approx(0.02)
    assert difference.high == pytest.approx(0.02 + 4.302653 * 0.01 / math.sqrt(3))
    assert over_scratch.mean == pytest.approx(0.05)
    assert over_scratch.high == pytest.approx(0.05)
    assert low.over_kd is None
    # Unpaired, the seeds would hide it: they spread wider than the difference.
    assert (spread.high or 0.0) - spread.mean > 0.05


def test_too_few_seeds_are_told_plainly() -> None:
    one, two, many = (" ".join(tau_notes(run_of(temperatures(seeds)).tau_effects)) for seeds in (1, 2, 6))
    assert "Too few seeds of every group: with one there is no interval" in one
    assert "Few seeds of every group: the intervals are wide" in two
    assert many == ""
    lost = temperatures(1)
    lost["students"][1] |= student("mlp-8", "annealing_kd", 0, None)
    text = html.unescape(render(run_of(lost)))
    assert "Nobody finished of mlp-8, Annealing-KD, τ 4" in text
    assert "<h3>Accuracy over tau_max</h3>" in text


def test_what_differs_besides_tau_is_another_family() -> None:
    fleet = temperatures(2)
    students = {
        one["name"]: {"seed": one["seed"], "name": one["name"], "lr": 0.1, "objective": {"tau_max": one["tau_max"]}}
        for one in fleet["students"]
    }
    alike = run_of(fleet, identity=RunIdentity(teacher={}, dataset={}, students=students)).tau_effects
    assert len({effect.family for effect in alike}) == 1
    for name, spec in students.items():
        if "-t8-" in name:
            spec["lr"] = 0.2
    apart = run_of(fleet, identity=RunIdentity(teacher={}, dataset={}, students=students)).tau_effects
    assert len({effect.family for effect in apart}) == 2
    assert [effect.over_smallest for effect in apart] == [None, None]


def test_curves_show_temperature_boundary_and_stages() -> None:
    fleet = temperatures(2)
    fleet["students"][0]["stage1_from"] = "somebody"
    riding, _, plain, validation, scratch = stage_figures(run_of(fleet))
    assert scratch.title == "Loss: from scratch, 20 epochs"
    assert "temperature T" not in scratch.svg
    assert plain.title == "Loss: Annealing-KD, τ 8, 12 + 8 epochs"
    assert validation.title == "Validation accuracy: Annealing-KD, τ 8, 12 + 8 epochs"
    assert "from 4 to 1 in 12 epochs, so that Φ(T) = 1 - (T - 1) / τ climbs from 0.25 to 1" in plain.caption
    assert "vertical: where stage II begins" in plain.caption
    assert "temperature T" in plain.svg
    assert "Diamonds" not in plain.caption
    assert "Diamonds at the boundary: 1 of 2 students shared" in riding.caption
    assert plain.rows[0][:3] == ("mlp-8", "Annealing-KD, τ 8", "1 to 20")
