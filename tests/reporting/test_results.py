"""The report: grouping and means by hand, the page offline and inert, and refusals that say what to do."""

from __future__ import annotations

import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import akd_dist
from akd_dist import cli
from akd_dist.base.errors import DamagedError, MachineError, RecipeError, RefusedError
from akd_dist.base.formatting import OBJECTIVE_LABELS, SHOWN, amount, duration, seconds, share
from akd_dist.data.predictions import encode_predictions
from akd_dist.distill.objectives import stages
from akd_dist.documents.damage import read_epochs
from akd_dist.documents.fleet import EpochRecord, FleetDocument, FleetStudent, RunIdentity
from akd_dist.documents.report import Difference, ReportDocument
from akd_dist.recipe import (
    METRICS,
    AdamW,
    AnnealingKD,
    ContinuationKD,
    CustomObjective,
    HardLabels,
    Kd,
    Mlp,
    StudentSpec,
    Takd,
)
from akd_dist.reporting.curves import stage_figures
from akd_dist.reporting.differences import read_predictions
from akd_dist.reporting.drawing import OBJECTIVE_COLOURS
from akd_dist.reporting.economics import StudentUsage, economics, reading
from akd_dist.reporting.figures import _beside_each_other, runs_figure, tau_figures
from akd_dist.reporting.page import render, tau_notes, write_report, write_reports
from akd_dist.reporting.results import Run, read_fleet, read_run
from akd_dist.reporting.seeds import (
    SeedGroup,
    Spread,
    gain_over_scratch,
    group_label,
    group_students,
    pareto_front,
    plus_minus,
)
from akd_dist.reporting.several import same_test_rows
from akd_dist.reporting.tables import fleet_table, runs_table
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.writer import create_store, seal_store, write_shard
from akd_dist.tracking.status import RunReader, driving
from akd_dist.tracking.view import next_line
from tests import stores

TRAINED: dict[str, Any] = {"optimizer": AdamW(lr=0.1)}
TAU, STAGE1, STAGE2 = 4, 12, 8
ACCURACY, PEARSON = SHOWN["accuracy"], SHOWN["pearson"]
(CONTINUATION,) = stages(ContinuationKD(epochs=STAGE1 + STAGE2, tau_max=TAU))


def student(model: str, objective: str, seed: int, accuracy: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    tau = TAU if objective in ("annealing_kd", "continuation_kd") else None
    middle = f"-t{tau}" if tau else ""
    done = accuracy is not None
    entry: dict[str, Any] = {
        "name": f"{model.replace('/', '')}-{objective}{middle}-s{seed}",
        "model": model,
        "parameters": 75 * int(model.split("-")[-1]) + 10,
        "objective": objective,
        "tau_max": tau,
        "seed": seed,
        "state": "done" if done else "diverged",
        "reason": None if done else "the loss was not finite at epoch 3",
        "epochs": STAGE1 + STAGE2 if done else 3,
        "validation": {"accuracy": accuracy} if done else None,
        "test": {"accuracy": accuracy} if done else None,
        "agreement": accuracy,
        "seconds": 2.5,
        "path": f"students/{model}",
        "store": "stores/0f",
        "teacher": "7c",
    }
    return entry | changes


def grouped(students: Iterable[dict[str, Any]]) -> list[SeedGroup]:
    return group_students(map(FleetStudent.model_validate, students))


def fleet_of(*students: dict[str, Any]) -> dict[str, Any]:
    teacher = {"model": "cnn-32", "parameters": 20_000, "test": {"accuracy": 0.98}, "fingerprint": "7c" * 32}
    return {
        "run": "runs/digits",
        "store": "stores/0f",
        "task": "classification",
        "metric": "accuracy",
        "teacher": teacher,
        "students": list(students),
        "cohorts": 1,
        "seconds": 61.0,
    }


def small_fleet() -> dict[str, Any]:
    """Four sizes, two objectives, three seeds; one student diverged and one failed."""
    students = [
        student(f"mlp-{width}", objective, seed, 0.985 - gap / width - 0.003 * seed)
        for width in (8, 16, 32, 64)
        for objective, gap in (("annealing_kd", 0.5), ("hard_labels", 0.8))
        for seed in range(3)
    ]
    students[5] = student("mlp-8", "hard_labels", 2, None)
    students[8] = student("mlp-16", "annealing_kd", 2, None, state="failed", reason="no memory; see logs/a.log")
    return fleet_of(*students)


def regression_of(fleet: dict[str, Any]) -> dict[str, Any]:
    """The same fleet as if it were one of a regression, its accuracies Pearson's correlations."""
    told = json.loads(json.dumps(fleet).replace('"accuracy": 0', '"pearson": 0'))
    for entry in told["students"]:
        entry["agreement"] = None
    return dict(told, task="regression", metric="pearson")


def stage_of(entry: dict[str, Any], epoch: int) -> str:
    if entry["objective"] == "annealing_kd":
        return "annealing" if epoch < STAGE1 else "hard_labels"
    return {"kd": "kd", "takd": "kd", "continuation_kd": "continuation"}.get(entry["objective"], "hard_labels")


def epochs_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Made-up epochs in the shape that training writes; only the schedules are the true ones."""
    records = []
    for epoch in range(entry["epochs"]):
        stage = stage_of(entry, epoch)
        temperature = max(1, TAU - epoch * TAU // STAGE1) if stage == "annealing" else None
        phi = 1 - (temperature - 1) / TAU if temperature else None
        if stage == "continuation":
            temperature, phi = CONTINUATION.temperature(epoch), CONTINUATION.phi(epoch)
        records.append(
            {
                "epoch": epoch,
                "stage": stage,
                "stage_epoch": epoch - STAGE1 if stage == "hard_labels" and entry["tau_max"] is not None else epoch,
                "temperature": temperature,
                "phi": phi,
                "psi": CONTINUATION.psi(epoch) if stage == "continuation" else None,
                "lr": 0.1,
                "train_loss": (1 + 0.1 * entry["seed"]) * math.exp(-epoch / 6) * 800 / entry["parameters"] ** 0.8,
                "validation": {"accuracy": 0.97 - 0.6 * math.exp(-epoch / 3) - 8 / entry["parameters"], "loss": 0.2},
                "seconds": 0.1,
            }
        )
    return records


def records_of(entry: dict[str, Any]) -> list[EpochRecord]:
    return [EpochRecord.model_validate(record) for record in epochs_of(entry)]


def write_run(folder: Path, fleet: dict[str, Any] | None = None) -> dict[str, Any]:
    fleet = fleet or small_fleet()
    for entry in fleet["students"]:
        path = folder / "students" / entry["name"] / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in epochs_of(entry)))
    (folder / "fleet.json").write_text(json.dumps(fleet))
    return fleet


def run_of(fleet: dict[str, Any], **changes: Any) -> Run:
    """A run that left no files beside its fleet.json and metrics."""
    metrics = {entry["name"]: records_of(entry) for entry in fleet["students"]}
    return Run(Path(fleet["run"]), FleetDocument.model_validate(fleet), metrics, **changes)


def printed(fleet: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(fleet_table(FleetDocument.model_validate(fleet)))
        return console.export_text()


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
    assert set(SHOWN) == {"custom", *(metric for metrics in METRICS.values() for metric in metrics)}


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


# --- the page ---------------------------------------------------------------------------------------------------------


# Attributes whose value a browser fetches or goes to.
LOADING = (
    "src",
    "srcset",
    "href",
    "xlink:href",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "ping",
    "cite",
)


class Page(html.parser.HTMLParser):
    """Collects what a browser would load or run, ids, and whether tags balance."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.styles: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in LOADING and value:
                self.references.append(value)
            elif name == "style" and value:
                self.styles.append(value)
            assert not name.startswith("on"), f"an event handler: {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text()


def check_offline(text: str) -> None:
    """Nothing in a page is loaded from anywhere, nothing runs, and its tags balance."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "image", "base", "form", "foreignobject"} & set(
        page.tags
    )
    assert all(reference.startswith("#") for reference in page.references)
    assert {f"#{name}" for name in re.findall(r' id="([^"]+)"', text)} >= set(page.references)
    assert not re.search(r"url\((?![\"']?#)", text)
    assert "@import" not in text
    assert 'http-equiv="refresh"' not in text
    assert "default-src 'none'" in text
    # Namespace names are the only addresses, and nobody fetches those.
    assert set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


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


# --- reading ----------------------------------------------------------------------------------------------------------


def test_links_in_a_circle_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for run in ("loop", "loop/below"):
        with pytest.raises(SystemExit) as left:
            cli.main(["report", str(tmp_path / run)])
        assert left.value.code in (4, 6)
        capsys.readouterr()


def test_documents_name_the_run_absolutely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    printed = []
    for words in (["report", "one", "two"], ["report", "one", "--out", "page.html"], ["status", "one"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--json"])
        assert left.value.code == 0
        printed.append(json.loads(capsys.readouterr().out))
    both, one, status = printed
    here = [str(tmp_path / name) for name in ("one", "two")]
    assert [each["run"] for each in both["runs"]] == here
    assert {each["run"] for each in both["comparison"]["groups"]} == set(here)
    assert one["runs"][0]["report"] == str(tmp_path / "page.html")
    assert status["run"] == here[0]


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no run in") as caught:
        write_report(tmp_path / "nowhere")
    assert caught.value.next is not None
    assert "akd-dist train-students" in caught.value.next


def test_of_a_folder_of_runs_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "identity.json").touch()
    with pytest.raises(RefusedError, match="there is no run in") as caught:
        write_report(tmp_path)
    assert caught.value.got == "a folder of runs: a, b"
    assert caught.value.next == f"name {tmp_path / 'a'}, or another of these"


def test_a_run_that_stopped_is_refused_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["akd-dist", "train-students", "digits.yaml", "--run-root", str(tmp_path)])
    run = tmp_path / "digits"
    (run / "students").mkdir(parents=True)
    with driving(run), pytest.raises(RefusedError, match=r"there are no results in .* yet") as caught:
        write_report(run)
    assert caught.value.next == f"wait for it; akd-dist status {run} follows it"
    with pytest.raises(RefusedError) as caught:
        write_report(run)
    assert f"{run} stopped" in str(caught.value.got)
    assert caught.value.next == next_line(RunReader(run).read())
    assert f"akd-dist train-students digits.yaml --run-root {tmp_path}" in str(caught.value.next)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": "x"}', "\udcff"])
def test_a_damaged_fleet_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "fleet.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedError, match=r"fleet\.json is damaged"):
        read_fleet(tmp_path)


def test_a_damaged_field_is_named(tmp_path: Path) -> None:
    fleet = small_fleet()
    fleet["students"][3]["state"] = "asleep"
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    with pytest.raises(DamagedError, match=r"(?s)students\.3\.state"):
        read_fleet(tmp_path)


def edited(path: list[str | int], value: Any) -> dict[str, Any]:
    """A fleet's document in which somebody wrote."""
    fleet = node = small_fleet()
    for key in path[:-1]:
        node = node[key]  # type: ignore[index]
    node[path[-1]] = value  # type: ignore[index]
    return fleet


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["metric"], "pearson", "metric"),
        (["metric"], "f1", r"teacher\.test"),
        (["teacher", "test"], {}, r"teacher\.test"),
        (["students", 3, "test"], {}, r"students\.3\.test"),
        (["students", 3, "test"], None, r"students\.3\.test"),
        (["students", 2, "name"], "x" * 5000, r"students\.2\.name"),
        (["students", 2, "name"], "../../..", r"students\.2\.name"),
        (["students", 2, "name"], "a\0", r"students\.2\.name"),
        (["students", 2, "path"], "a\0", r"students\.2\.path"),
        (["store"], "a\0", "store"),
        (["run"], "/a\0", "run"),
    ],
)
def test_a_fleet_that_contradicts_itself_is_refused_by_field(
    path: list[str | int], value: Any, field: str, tmp_path: Path
) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps(edited(path, value)))
    with pytest.raises(DamagedError, match=field):
        read_run(tmp_path)


def test_places_that_are_none_are_as_places_that_are_gone(tmp_path: Path) -> None:
    fleet = edited(["store"], "x" * 5000) | {"run": "/somewhere/" + "y" * 300}
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    assert read_run(tmp_path).fleet.store.endswith("x" * 5000)


def test_an_identity_without_an_objective_is_refused_by_field(tmp_path: Path) -> None:
    write_run(tmp_path)
    identity = {"teacher": {}, "dataset": {}, "students": {"a": {"objective": "x"}}}
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(DamagedError, match=r"students.*a\.objective"):
        read_run(tmp_path)


def test_metrics_drop_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    first, second, third = epochs_of(student("mlp-8", "kd", 0))[:3]
    path.write_text("\n".join(map(json.dumps, (first, second, third)))[:-20])
    assert [record.plain() for record in read_epochs(path.parent)] == [first, second]
    assert read_epochs(tmp_path / "students" / "b") == []


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"epoch": 1}', b"\xff\xfe", "loss"])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes | str) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    first, second = epochs_of(student("mlp-8", "kd", 0))[:2]
    if isinstance(line, str):
        line = json.dumps(dict(second, train_loss=line)).encode()
    path.write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n")
    with pytest.raises(DamagedError, match="damaged") as caught:
        read_epochs(path.parent)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"students": 3, "dataset": {}}', '{"dataset": {}}'])
def test_a_damaged_identity_is_named(tmp_path: Path, text: str) -> None:
    write_run(tmp_path)
    assert read_run(tmp_path).identity is None
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(DamagedError, match=r"identity\.json is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["fleet.json", "comparison.json", "identity.json"])
def test_what_cannot_be_read_is_no_bug(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(MachineError, match=f"cannot read .*{name}|{name} cannot be read"):
        read_run(tmp_path)


def test_groups_carry_what_the_table_shows() -> None:
    (group,) = grouped([student("mlp-8", "annealing_kd", 0)])
    assert group.objective_label == "Annealing-KD, τ 4"
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


def temperatures(seeds: int) -> dict[str, Any]:
    """Two temperatures and from scratch; τ 8 is better by 0.01, 0.02, ... than τ 2, seed by seed."""
    made = []
    for seed in range(seeds):
        base = 0.8 + 0.03 * seed * (-1) ** seed
        for tau, score in ((2, base), (8, base + 0.01 * (seed + 1))):
            name = f"mlp-8-annealing_kd-t{tau}-s{seed}"
            made.append(student("mlp-8", "annealing_kd", seed, score, tau_max=tau, name=name))
        made.append(student("mlp-8", "hard_labels", seed, base - 0.05))
    return fleet_of(*made)


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


# --- where student and teacher differ ---------------------------------------------------------------------------------


def leave(folder: Path, entry: dict[str, Any], label: Any, said: Any, teacher: Any) -> None:
    columns = {"row": np.arange(len(label)), "label": label, "student": said, "teacher": teacher}
    path = folder / "students" / entry["name"] / "test.parquet"
    path.write_bytes(encode_predictions(columns))


def test_differences_are_counted_by_hand(tmp_path: Path) -> None:
    entries = [student("mlp-8", "kd", seed) for seed in range(2)]
    write_run(tmp_path, fleet_of(*entries))
    label, teacher = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 2, 1, 1])
    for entry in entries:
        #                               right  alone  both  student  alike  apart
        leave(tmp_path, entry, label, np.array([0, 1, 1, 1, 1, 0]), teacher)
    (found,) = read_run(tmp_path).document("x", tmp_path).differences
    assert found == Difference(
        name="mlp-8-kd",
        rows=12,
        both_right=4,
        teacher_alone=2,
        student_alone=2,
        both_wrong_alike=2,
        both_wrong_apart=2,
        pairs=[(0, 1, 2), (1, 0, 2), (2, 1, 2)],
    )
    text = write_report(tmp_path).read_text()
    assert "differs from the teacher in 6 of 12 answers, 2 seeds together" in text
    assert text.count('<table class="matrix">') == 1
    check_offline(text)


def test_many_classes_make_pairs_and_no_matrix(tmp_path: Path) -> None:
    entry = student("mlp-8", "kd", 0)
    write_run(tmp_path, fleet_of(entry))
    label = np.arange(100)
    leave(tmp_path, entry, label, np.roll(label, 1), label)
    text = write_report(tmp_path).read_text()
    assert '<table class="matrix">' not in text
    assert "Most frequent pairs, mlp-8, KD" in text


def test_runs_that_left_nothing_say_so(page_text: str) -> None:
    assert "no student of this run left what it says of each test row" in page_text
    assert "Not measured: this run was made by an older version" in page_text


def test_a_regression_has_errors_and_scatters(tmp_path: Path) -> None:
    fleet = regression_of(fleet_of(student("mlp-8", "hard_labels", 0)))
    write_run(tmp_path, fleet)
    label = np.linspace(0, 1, 9)
    leave(tmp_path, fleet["students"][0], label, label + 0.5, label + np.array([1, -1, 1, -1, 0, 1, -1, 1, -1]))
    path = tmp_path / "students" / fleet["students"][0]["name"] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracy"', '"pearson"'))
    text = write_report(tmp_path).read_text()
    assert "Student against teacher: mlp-8, from scratch" in text
    assert "<td>0.5</td><td>0.9428</td>" in text  # sqrt(8 / 9)
    check_offline(text)


@pytest.mark.parametrize("content", [b"", b"PAR1 and so on", None])
def test_damaged_answers_are_named(tmp_path: Path, content: bytes | None) -> None:
    entry = student("mlp-8", "kd", 0)
    write_run(tmp_path, fleet_of(entry))
    path = tmp_path / "students" / entry["name"] / "test.parquet"
    if content is None:
        path.write_bytes(encode_predictions({"row": np.arange(3)}))
    else:
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"test\.parquet is damaged"):
        read_predictions(path)
    told: list[str] = []
    page = write_report(tmp_path, tell=told.append).read_text()
    assert f"students/{entry['name']}/test.parquet is damaged" in page
    assert [line.partition(": ")[2].partition(" is ")[0] for line in told] == [f"students/{entry['name']}/test.parquet"]


def test_one_damaged_run_takes_nothing_from_the_report_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "bad"):
        write_run(tmp_path / name)
    metrics = next((tmp_path / "two" / "students").glob("*/metrics.jsonl"))
    metrics.write_bytes(b"[" * 200_000 + b"\n")
    fleet = json.loads((tmp_path / "bad" / "fleet.json").read_bytes())
    (tmp_path / "bad" / "fleet.json").write_text(json.dumps(fleet | {"cohots": 1}))
    folders = [str(tmp_path / name) for name in ("one", "bad", "two", "gone")]
    code, out, err = report_of(*folders, capsys=capsys)
    assert code == 5
    assert [line.split()[0] for line in err.splitlines()] == ["warning:", "error:", "error:"]
    assert "cohots" in err
    for name in ("one", "two"):
        assert (tmp_path / name / "report.html").exists()
    assert not (tmp_path / "bad" / "report.html").exists()
    code, out, _ = report_of(*folders, "--json", capsys=capsys)
    document = ReportDocument.model_validate(json.loads(out))
    assert code == 5
    assert [one.code for one in document.refused] == [5, 4]
    assert [len(run.problems) for run in document.runs] == [0, 1]
    assert report_of(str(tmp_path / "bad"), capsys=capsys)[0] == 5
    with pytest.raises(DamagedError):
        akd_dist.report(*folders)


def report_of(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_flipped_bit_of_the_answers_is_told_or_harmless(tmp_path: Path) -> None:
    path, generator = tmp_path / "test.parquet", np.random.default_rng(0)
    label, said, teacher = generator.integers(0, 10, (3, 300))
    whole = encode_predictions({"row": np.arange(300), "label": label, "student": said, "teacher": teacher})
    told = 0
    for place in generator.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_predictions(path)
        except DamagedError:
            told += 1
            continue
        assert found is not None
        for read, written in ((found.label, label), (found.student, said), (found.teacher, teacher)):
            assert np.array_equal(read, written), f"byte {place}"
    assert told > 30


# --- economics --------------------------------------------------------------------------------------------------------


def test_what_a_student_read_of_its_teacher() -> None:
    annealed = StudentSpec(
        model=Mlp(hidden=8), objective=AnnealingKD(tau_max=4, stage1_epochs=12, stage2_epochs=8), **TRAINED
    )
    assert reading(annealed, 20, None) == StudentUsage(12, 0)
    assert reading(annealed, 5, None) == StudentUsage(5, 0)  # one that diverged
    assert reading(annealed, 20, "leader") == StudentUsage(0, 12)
    plain = StudentSpec(model=Mlp(hidden=8), objective=HardLabels(epochs=20), **TRAINED)
    assert reading(plain, 20, None) == StudentUsage(0, 0)
    kd = StudentSpec(model=Mlp(hidden=8), objective=Kd(epochs=3), **TRAINED)
    assert reading(kd, 3, None) == StudentUsage(3, 0)


def store_of(root: Path, rows: int, views: int, times: list[float]) -> LogitStore:
    """A sealed store whose shards took these seconds."""
    creation = stores.creation(rows=rows, views=views)
    writer = create_store(str(root), creation)
    for shard, time in zip(writer.layout.shards(), times, strict=True):
        logits = np.zeros((shard.rows, creation.identity.classes), np.float32)
        write_shard(writer, shard, logits, label_agreement=0.5, probes=[], seconds=time)
    seal_store(writer)
    return open_store(writer.uri)


def test_economics_by_hand(tmp_path: Path) -> None:
    """Shards of 4, 1 and 1 s: the first one loaded the teacher, which a pass in the loop does not do."""
    train = store_of(tmp_path / "train", 100, 3, [4.0, 1.0, 1.0])
    test = store_of(tmp_path / "test", 50, 1, [0.5])
    readings = [StudentUsage(12, 0), StudentUsage(8, 0), StudentUsage(0, 12), StudentUsage(0, 0)]
    balance = economics("teacher", "cnn-8", {"train": train, "test": test}, readings, 7.0)
    assert (balance.passes_run, balance.epochs, balance.passes_saved) == (3, 20, 17)
    assert (balance.students, balance.shared_epochs) == (2, 12)
    assert (balance.seconds_per_pass, balance.cache_seconds) == (1.0, 6.5)
    assert (balance.in_the_loop_seconds, balance.seconds_saved) == (20.0, 13.5)
    assert balance.break_even_students == 0.65  # 6.5 s, at 10 s a student
    assert balance.break_even_epochs == 6.5
    one, whole = balance.by_views
    assert (one.cache_seconds, one.break_even_students) == (2.5, 0.25)
    assert whole.cache_seconds == balance.cache_seconds
    text = render(run_of(dict(fleet_of(student("mlp-8", "kd", 0, None)), economics=[balance.plain()])))
    assert "<strong>0.65 students</strong>" in text
    assert "<strong>14 s</strong>" in text
    assert "with one view stored instead of 3" in text


def test_a_store_that_nobody_read_or_timed(tmp_path: Path) -> None:
    unread = economics("teacher", "cnn", {"train": store_of(tmp_path, 100, 1, [1.0])}, [StudentUsage(0, 0)])
    assert (unread.break_even_students, unread.seconds_saved) == (None, -1.0)
    untimed = economics("teacher", "cnn", {"train": store_of(tmp_path / "b", 100, 2, [0.0, 0.0])}, [StudentUsage(3, 0)])
    assert (untimed.seconds_per_pass, untimed.cache_seconds, untimed.by_views) == (None, None, [])
    assert untimed.passes_saved == 1
    quick = economics(
        "teacher", "cnn", {"train": store_of(tmp_path / "c", 100, 2, [0.0003, 0.002])}, [StudentUsage(3, 0)]
    )
    assert quick.timed_rows == 200, "a shard of less than a millisecond was timed, too"
    text = render(run_of(dict(fleet_of(student("mlp-8", "kd", 0, None)), economics=[unread.plain(), untimed.plain()])))
    assert text.count("never: nobody read it") == 1
    assert text.count("No shard of this store was timed") == 1


# --- several runs -----------------------------------------------------------------------------------------------------


def two_runs(root: Path) -> list[Path]:
    for name, shift in (("one", 0.0), ("two", 0.01)):
        fleet = fleet_of(*(student("mlp-8", "kd", seed, 0.8 + 0.03 * seed + shift) for seed in range(3)))
        fleet["run"] = f"runs/{name}"
        write_run(root / name, fleet)
        (root / name / "identity.json").write_text(
            json.dumps({"teacher": {}, "dataset": {"test": "ab"}, "students": {}})
        )
    return [root / "one", root / "two"]


def test_runs_are_compared_in_one_page(tmp_path: Path) -> None:
    folders = two_runs(tmp_path)
    document = write_reports(folders)
    assert ReportDocument.model_validate_json(json.dumps(document.plain())) == document
    assert document.comparison is not None
    assert document.comparison.same_test_rows is True
    first, second = document.comparison.groups
    assert first.over_first is None
    assert second.over_first is not None
    assert second.over_first.mean == pytest.approx(0.01)
    assert second.over_first.high == pytest.approx(0.01)  # seed by seed the same
    page = tmp_path / "report.html"
    assert document.comparison.report == str(page)
    assert all((folder / "report.html").exists() for folder in folders)
    text = page.read_text()
    check_offline(text)
    assert "2 runs compared" in text
    assert "less one" in text
    assert "+1.00 ± 0.00" in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(runs_table([read_run(folder) for folder in folders]))
    assert "two" in console.export_text()


def test_runs_that_differ_are_told_apart_or_refused(tmp_path: Path) -> None:
    one, two = two_runs(tmp_path)
    (two / "identity.json").write_text(json.dumps({"teacher": {}, "dataset": {"test": "cd"}, "students": {}}))
    write_reports([one, two], tmp_path / "out.html")
    assert "different test rows" in (tmp_path / "out.html").read_text()
    (two / "identity.json").unlink()
    assert same_test_rows([read_run(one), read_run(two)]) is None
    write_run(two, regression_of(fleet_of(student("mlp-8", "hard_labels", 0))))
    with pytest.raises(RefusedError, match="different metrics"):
        write_reports([one, two])
    with pytest.raises(RecipeError, match="named twice"):
        write_reports([one, one / ".." / "one"])
    with pytest.raises(RecipeError, match="no run is named"):
        write_reports([])


def test_a_single_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    one, _ = two_runs(tmp_path)
    document = write_reports([one], tmp_path / "one.html")
    assert document.runs[0].report == str(tmp_path / "one.html")
    assert not (one / "report.html").exists()


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


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NARROW, WIDE = 375, 1600
# Shows a page in frames of two widths, opens what is folded, and writes down how wide each has become.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><title>harness</title><body>
<script>
const said = {violations: [], frames: []};
let left = %(widths)s.length;
for (const width of %(widths)s) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `border: 0; height: 2000px; width: ${width}px`;
  frame.onload = () => {
    const page = frame.contentDocument;
    page.addEventListener("securitypolicyviolation", event => said.violations.push(event.blockedURI));
    page.querySelectorAll("details").forEach(one => { one.open = true; });
    said.frames.push({
      asked: width, width: page.documentElement.scrollWidth, figures: page.querySelectorAll("figure svg").length,
      shown: [...page.querySelectorAll("figure svg")].every(svg => svg.getBoundingClientRect().height > 100),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      title: page.title
    });
    if (--left === 0) {
      const told = document.createElement("pre");
      told.textContent = JSON.stringify(said);
      document.body.replaceChildren(told);
    }
  };
  frame.src = "%(page)s";
  document.body.append(frame);
}
</script>"""


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


def opened(page: Path, folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """What a headless browser says of a page: the harness's findings, its log, and every address it asked for."""
    harness, requests = folder / "harness.html", folder / "requests.json"
    harness.write_text(HARNESS % {"page": page.as_uri(), "widths": [NARROW, WIDE]})
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={requests}", "--window-size=1700,2400",
        "--virtual-time-budget=20000", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, f"the harness did not finish: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return json.loads(html.unescape(found.group(1))), done.stderr, asked_for(requests)


def asked_for(log: Path) -> list[str]:
    """The addresses in a network log that are a page's: the browser's own services ask with nobody as initiator."""
    document = json.loads(log.read_text())
    events = [event.get("params", {}) for event in document["events"]]
    asked = [event for event in events if "url" in event]
    return [event["url"] for event in asked if event.get("initiator", "not an origin") != "not an origin"]


@pytest.mark.browser
@pytest.mark.parametrize("page", ["run", "runs"])
def test_page_in_a_browser(tmp_path: Path, page: str) -> None:
    one, two = two_runs(tmp_path)
    if page == "run":
        fleet = temperatures(2)
        fleet["students"] += small_fleet()["students"]
        write_run(one, fleet)
        label = np.arange(40) % 20
        for entry in fleet["students"]:
            leave(one, entry, label, np.roll(label, 1), label)
        path, figures = write_report(one), 8
    else:
        write_reports([one, two])
        path, figures = tmp_path / "report.html", 1
    said, log, asked = opened(path, tmp_path)
    narrow, wide = sorted(said["frames"], key=lambda frame: int(frame["asked"]))
    assert said["violations"] == []
    for frame in (narrow, wide):
        assert frame["width"] <= frame["asked"], f"wider than {frame['asked']} px"
        assert frame["figures"] >= figures
        assert frame["shown"]
        assert frame["loaded"] == []
        assert frame["title"].endswith("akd-dist")
    assert "CONSOLE" not in log
    assert [url for url in asked if not url.startswith("file:")] == []
