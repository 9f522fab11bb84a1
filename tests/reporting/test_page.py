"""The page of a run: whole, offline and inert."""

from __future__ import annotations

import html
import html.parser
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.formatting import OBJECTIVE_LABELS
from akd_dist.documents.fleet import FleetDocument
from akd_dist.reporting.curves import stage_figures
from akd_dist.reporting.figures import _beside_each_other, runs_figure, tau_figures
from akd_dist.reporting.page import render, write_report
from akd_dist.reporting.results import Run, read_run
from akd_dist.reporting.tables import fleet_table
from tests.made_runs import (
    ACCURACY,
    Page,
    check_offline,
    fleet_of,
    grouped,
    leave,
    regression_of,
    run_of,
    small_fleet,
    student,
    write_run,
)


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text()


def test_page_is_whole_and_loads_nothing(page_text: str) -> None:
    check_offline(page_text)


@pytest.mark.parametrize(
    "loading",
    [
        '<img src="https://example.org/a.png">',
        '<p style="background: url(//example.org/a.png)"></p>',
        "<style>@import 'a.css';</style>",
        '<svg><image xlink:href="a.png"/></svg>',
        '<svg><use href="a.svg#b"/></svg>',
        '<a href="/elsewhere">x</a>',
    ],
)
def test_the_offline_test_sees_what_it_should(page_text: str, loading: str) -> None:
    with pytest.raises(AssertionError):
        check_offline(page_text.replace("</main>", f"{loading}</main>"))


def test_page_shows_results_figures_and_losses(page_text: str) -> None:
    for title in ("Accuracy against size", "Loss: Annealing-KD, τ 4, 12 + 8 epochs", "Validation accuracy"):
        assert f"<h3>{title}</h3>" in page_text
    assert "the loss was not finite at epoch 3" in page_text
    assert "22 of 24" in page_text
    assert "2 of 3" in page_text
    assert "currentColor" in page_text
    assert "#010203" not in page_text


def all_objectives() -> dict[str, Any]:
    return fleet_of(
        *(
            student(f"mlp-{width}", objective, 0, 0.9 + 0.01 * number)
            for width in (8, 16)
            for number, objective in enumerate(OBJECTIVE_LABELS)
        )
    )


def test_the_page_shows_every_objective(tmp_path: Path) -> None:
    write_run(tmp_path, all_objectives())
    text = write_report(tmp_path).read_text()
    for label in ("Annealing-KD, τ 4", "Continuation-KD, τ 4", "TAKD", "KD", "from scratch"):
        assert f"</span>{label}</td>" in text
    for label, length in (
        ("Annealing-KD, τ 4", "12 + 8"),
        ("Continuation-KD, τ 4", "20"),
        ("TAKD", "20"),
        ("KD", "20"),
        ("from scratch", "20"),
    ):
        assert f"<h3>Loss: {label}, {length} epochs</h3>" in text
    assert "with weight ψ, which climbs to 1" in text
    for paper in ("2104.07163", "2212.05998", "1902.03393", "1503.02531"):
        assert paper in text
    assert Page(text).open == []


def test_page_has_the_assistants_and_their_stores(tmp_path: Path) -> None:
    fleet = small_fleet()
    assistant = {
        "model": "mlp-99",
        "parameters": 5000,
        "agreement": 0.97,
        "store": "stores/1a",
        "fingerprint": "9e" * 32,
    }
    fleet["assistants"] = [fleet["teacher"] | assistant]
    write_run(tmp_path, fleet)
    text = write_report(tmp_path).read_text()
    row = re.search(r"<tr>\s*<td class=\"text\">assistant, mlp-99</td>.*?</tr>", text, re.DOTALL)
    assert row is not None
    assert re.findall(r">([^<>\s][^<>]*)</td>", row.group())[1:] == ["5,000", "25 %", "98.00", "97.00"]
    assert f"<code>{'9e' * 32}</code>, store <code>stores/1a</code>" in text
    assert Page(text).open == []


def test_page_of_a_regression_speaks_of_its_metric(tmp_path: Path) -> None:
    fleet = regression_of(all_objectives())
    write_run(tmp_path, fleet)
    for path in tmp_path.glob("students/*/metrics.jsonl"):
        path.write_text(path.read_text().replace('"accuracy"', '"pearson"'))
    text = render(read_run(tmp_path))
    assert "0.9800" in text
    assert "Pearson's correlation against size" in html.unescape(text)
    assert "Validation Pearson's correlation" in html.unescape(text)
    assert "Squared error on training rows" in text
    shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    for absent in ("accuracy", "Accuracy", "greement", "ross-entropy", "%</th>"):
        assert absent not in shown


def test_same_results_same_bytes(page_text: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run0")
    assert write_report(tmp_path / "run0").read_text() == page_text


def test_figures_that_have_no_data_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, fleet_of(student("mlp-8", "hard_labels", 0)))
    text = write_report(tmp_path).read_text()
    assert "temperature T" not in text
    assert "Loss: from scratch" in text
    lost = fleet_of(student("mlp-8", "annealing_kd", 0, None))
    assert "<svg" not in render(Run(tmp_path, FleetDocument.model_validate(lost), {}))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x^2$&"
    fleet = fleet_of(
        student("mlp-8", "annealing_kd", 0) | {"model": evil},
        student("mlp-9", "hard_labels", 0, None, reason=evil),
    )
    fleet["run"] = "runs/" + evil.replace("/", "")
    page = render(run_of(fleet))
    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;") >= 4


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path: Path) -> None:
    fleet = fleet_of(
        *(student("mlp-8", "annealing_kd", 0, tau_max=tau, name=f"a-t{tau}-s0") | {"model": "_own"} for tau in (2, 4))
    )
    (figure,) = runs_figure([run_of(dict(fleet, run=f"runs/{name}")) for name in ("_one", "two")])
    assert [name for name in ("_one", "two") if name in figure.svg] == ["_one", "two"]
    assert "_own</text>" in next(stage_figures(run_of(fleet))).svg
    assert "_own, Annealing-KD" in next(tau_figures(run_of(fleet).tau_effects, ACCURACY)).svg


def test_groups_of_one_size_stand_beside_each_other() -> None:
    drawn = [student("mlp-8", "kd", 0), student("mlp-8", "hard_labels", 0), student("mlp-64", "kd", 0)]
    groups = grouped(drawn)
    places = _beside_each_other(groups)
    assert len(set(places.values())) == 3
    assert all(places[id(group)] == pytest.approx(group.parameters, rel=0.02) for group in groups)


def test_every_kind_of_fleet_draws_without_a_warning() -> None:
    one_size = fleet_of(*(student("mlp-8", "annealing_kd", 0, tau_max=tau, name=f"t{tau}") for tau in (2, 4)))
    two_close = fleet_of(student("mlp-100", "hard_labels", 0), student("mlp-101", "hard_labels", 0))
    many = fleet_of(*(student(f"mlp-{width}", "hard_labels", 0) for width in range(1, 15)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fleet in (one_size, two_close, many):
            run = run_of(fleet)
            first = fleet["students"][0]["name"]
            run.metrics[first] = [one.model_copy(update={"validation": None}) for one in run.metrics[first][:1]]
            assert Page(render(run)).open == []


def test_no_deviation_is_explained_where_none_is_shown() -> None:
    several = [student("mlp-8", "annealing_kd", seed, 0.9 + seed / 100) for seed in range(2)]
    for students, told in ((several, True), (several[:1], False)):
        fleet = fleet_of(*students)
        assert ("± standard deviation" in str(fleet_table(FleetDocument.model_validate(fleet)).title)) == told
        assert ("mean ± standard deviation" in render(run_of(fleet))) == told
    assert "τ: tau_max, from which the temperature falls" in render(run_of(fleet_of(*several)))
    assert "τ: tau_max" not in render(run_of(fleet_of(student("mlp-8", "kd", 0))))


def test_runs_that_left_nothing_say_so(page_text: str) -> None:
    assert "no student of this run left what it says of each test row" in page_text
    assert "Not measured: this run was made by an older version" in page_text


def test_a_fleet_of_two_hundred_stays_light(tmp_path: Path) -> None:
    students = [
        student(f"mlp-{width}", "annealing_kd", seed, 0.9, tau_max=tau, name=f"mlp-{width}-annealing_kd-t{tau}-s{seed}")
        for width in (8, 16, 32, 64, 128)
        for tau in (2, 4, 8, 16)
        for seed in range(10)
    ]
    fleet = fleet_of(*students)
    write_run(tmp_path, fleet)
    generator = np.random.default_rng(0)
    label = generator.integers(0, 20, 300)
    for entry in students:
        leave(tmp_path, entry, label, generator.integers(0, 20, 300), label)
    text = write_report(tmp_path).read_text()
    assert len(text.encode()) < 3_000_000
    assert "200 students, one row each" in text
    check_offline(text)
