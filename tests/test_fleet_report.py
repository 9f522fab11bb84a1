"""The report: grouping and means by hand, the page offline and inert, and refusals that say what to do."""

from __future__ import annotations

import html
import html.parser
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from akd_dist.documents import FleetDocument
from akd_dist.fleet_report import (
    OBJECTIVE_COLOURS,
    OBJECTIVE_LABELS,
    SHOWN,
    Group,
    Spread,
    fleet_table,
    gain_over_hard_labels,
    group_label,
    group_students,
    read_fleet,
    read_metrics,
    render,
    seconds,
    share,
    write_report,
)
from akd_dist.objectives import stages
from akd_dist.recipe import METRICS, AnnealingKD, ContinuationKD, HardLabels, Kd, Takd
from akd_dist.storage.errors import DamagedError, RefusedError

TAU, STAGE1, STAGE2 = 4, 12, 8
ACCURACY, PEARSON = SHOWN["accuracy"], SHOWN["pearson"]
(CONTINUATION,) = stages(ContinuationKD(epochs=STAGE1 + STAGE2, tau_max=TAU))


def student(model: str, objective: str, seed: int, accuracy: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    tau = TAU if objective in ("annealing_kd", "continuation_kd") else None
    middle = f"-t{tau}" if tau else ""
    done = accuracy is not None
    entry: dict[str, Any] = {
        "name": f"{model}-{objective}{middle}-s{seed}",
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


def write_run(folder: Path, fleet: dict[str, Any] | None = None) -> dict[str, Any]:
    fleet = fleet or small_fleet()
    for entry in fleet["students"]:
        path = folder / "students" / entry["name"] / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in epochs_of(entry)))
    (folder / "fleet.json").write_text(json.dumps(fleet))
    return fleet


def printed(fleet: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(fleet_table(fleet))
        return console.export_text()


# --- grouping and numbers ---------------------------------------------------------------------------------------------


def test_the_fleet_made_up_here_is_what_a_run_writes() -> None:
    FleetDocument.model_validate(small_fleet())
    FleetDocument.model_validate(regression_of(small_fleet()))


def test_seeds_are_grouped_and_averaged() -> None:
    accuracies = (0.90, 0.92, 0.97)
    (group,) = group_students(student("mlp-8", "annealing_kd", seed, value) for seed, value in enumerate(accuracies))
    assert group.score is not None
    assert group.score.mean == pytest.approx(0.93)
    assert group.score.deviation == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert group.seconds == 2.5


def test_a_student_that_did_not_finish_counts_in_no_mean() -> None:
    (group,) = group_students([student("mlp-8", "annealing_kd", 0, 0.9), student("mlp-8", "annealing_kd", 1, None)])
    assert group.score == Spread(0.9, None)
    (group,) = group_students([student("mlp-8", "annealing_kd", 1, None)])
    assert (group.score, group.agreement, group.seconds) == (None, None, None)


def test_only_names_that_end_in_their_seed_are_averaged() -> None:
    fleet = [student("mlp-8", "annealing_kd", seed, name=f"rate-{seed}") for seed in (1, 2)]
    groups = group_students(fleet)
    assert [group_label(group, groups) for group in groups] == ["rate-1", "rate-2"]


def test_smallest_first_and_annealing_before_its_baselines() -> None:
    order = ["hard_labels", "kd", "takd", "continuation_kd", "annealing_kd"]
    pairs = [("mlp-64", "hard_labels"), *(("mlp-8", objective) for objective in order)]
    groups = group_students(student(model, objective, 0) for model, objective in pairs)
    assert [(group.model, group.objective) for group in groups] == pairs[::-1]


def test_every_objective_has_a_label_and_a_colour_of_its_own() -> None:
    kinds = {
        objective.model_fields["kind"].default for objective in (AnnealingKD, HardLabels, Kd, Takd, ContinuationKD)
    }
    assert set(OBJECTIVE_LABELS) == set(OBJECTIVE_COLOURS) == kinds
    assert len(set(OBJECTIVE_LABELS.values())) == len(set(OBJECTIVE_COLOURS.values())) == len(kinds)
    assert set(SHOWN) == {metric for metrics in METRICS.values() for metric in metrics}


def test_gain_needs_exactly_one_baseline() -> None:
    annealed, plain = student("mlp-8", "annealing_kd", 0, 0.95), student("mlp-8", "hard_labels", 0, 0.93)
    groups = group_students([annealed, plain])
    assert gain_over_hard_labels(groups[0], groups) == pytest.approx(0.02)
    assert gain_over_hard_labels(groups[1], groups) is None
    assert gain_over_hard_labels(groups[0], groups[:1]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (share(20_000, 20_000), "100 %"),
        (share(1_810, 20_000), "9.1 %"),
        (share(8, 20_000), "0.04 %"),
        (share(8, 0), "-"),
        (ACCURACY.plus_minus(Spread(0.97414, 0.00226)), "97.41 ± 0.23"),
        (ACCURACY.plus_minus(Spread(0.5, None)), "50.00"),
        (ACCURACY.plus_minus(None), "-"),
        (PEARSON.plus_minus(Spread(0.91234, 0.00226)), "0.9123 ± 0.0023"),
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
        (ACCURACY.gain(0.0123), "+1.23"),
        (ACCURACY.gain(-0.0123), "-1.23"),
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
    assert text.count("hard labels") == 4
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
    assert "0.9695 ± 0.0030" in text  # mlp-64, hard labels: 0.985 - 0.8 / 64 less 0, 0.003 and 0.006
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


class Page(html.parser.HTMLParser):
    """Collects what a browser would load or run, ids, and whether tags balance."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data") and value:
                self.references.append(value)
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


def test_page_is_whole_and_loads_nothing(page_text: str) -> None:
    page = Page(page_text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\((?!#)", page_text)
    assert "default-src 'none'" in page_text
    # Namespace names are the only addresses, and nobody fetches those.
    assert set(re.findall(r"https?://[^\s\"'<]+", page_text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_page_shows_results_figures_and_losses(page_text: str) -> None:
    assert page_text.count("<svg") == 6
    for title in ("Accuracy against size", "Agreement with the teacher", "Annealing schedule", "Stage I loss"):
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


def test_page_shows_every_objective_and_the_schedule_of_continuation_kd(tmp_path: Path) -> None:
    write_run(tmp_path, all_objectives())
    text = write_report(tmp_path).read_text()
    for label in ("Annealing-KD, τ 4", "Continuation-KD, τ 4", "TAKD", "KD", "hard labels"):
        assert f"</span>{label}</td>" in text
    for title in ("Stage I loss", "Continuation-KD loss", "KD loss", "Hard-label loss", "Annealing schedule"):
        assert f"<h3>{title}</h3>" in text
    assert "ψ (Continuation-KD, τ 4, 20 epochs)" in text
    assert "T (Annealing-KD, τ 4, 12 epochs)" in text
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
    records = {
        entry["name"]: json.loads(json.dumps(epochs_of(entry)).replace('"accuracy"', '"pearson"'))
        for entry in fleet["students"]
    }
    text = render(fleet, records)
    assert "0.9800" in text
    assert "Pearson's correlation against size" in html.unescape(text)
    assert "Validation Pearson's correlation" in html.unescape(text)
    assert "Squared error on training rows" in text
    shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    for absent in ("accuracy", "Accuracy", "greement", "ross-entropy", "%</th>"):
        assert absent not in shown


def test_same_results_same_bytes(page_text: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    assert write_report(tmp_path).read_text() == page_text


def test_figures_that_have_no_data_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, fleet_of(student("mlp-8", "hard_labels", 0)))
    text = write_report(tmp_path).read_text()
    assert "Annealing schedule" not in text
    assert "Hard-label loss" in text
    lost = fleet_of(student("mlp-8", "annealing_kd", 0, None))
    assert "<svg" not in render(lost, {})


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x^2$&"
    fleet = fleet_of(
        student("mlp-8", "annealing_kd", 0) | {"model": evil},
        student("mlp-9", "hard_labels", 0, None, reason=evil),
    )
    fleet["run"] = "runs/" + evil.replace("/", "")
    page = render(fleet, {entry["name"]: epochs_of(entry) for entry in fleet["students"]})
    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;") >= 4


def test_every_kind_of_fleet_draws_without_a_warning() -> None:
    one_size = fleet_of(*(student("mlp-8", "annealing_kd", 0, tau_max=tau, name=f"t{tau}") for tau in (2, 4)))
    two_close = fleet_of(student("mlp-100", "hard_labels", 0), student("mlp-101", "hard_labels", 0))
    many = fleet_of(*(student(f"mlp-{width}", "hard_labels", 0) for width in range(1, 15)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fleet in (one_size, two_close, many):
            metrics = {entry["name"]: epochs_of(entry) for entry in fleet["students"]}
            metrics[fleet["students"][0]["name"]] = [
                dict(record, train_loss=math.nan, validation=None) for record in epochs_of(fleet["students"][0])
            ][:1]
            assert Page(render(fleet, metrics)).open == []


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there are no results in") as caught:
        write_report(tmp_path / "nowhere")
    assert caught.value.next is not None
    assert "akd-dist train-students" in caught.value.next


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


def test_metrics_keep_the_last_word_on_an_epoch_and_drop_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"epoch": 0, "n": 1}\n{"epoch": 1, "n": 2}\n{"epoch": 0, "n": 3}\n{"epoch": 2, "n"')
    assert read_metrics(tmp_path, "a") == [{"epoch": 0, "n": 3}, {"epoch": 1, "n": 2}]
    assert read_metrics(tmp_path, "b") == []


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}'])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "students" / "a" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"epoch": 0}}\n{line}\n')
    with pytest.raises(DamagedError, match="damaged") as caught:
        read_metrics(tmp_path, "a")
    assert "line 2" in str(caught.value)


def test_groups_carry_what_the_table_shows() -> None:
    students = [student("mlp-8", "annealing_kd", 0)]
    group = Group("mlp-8", "annealing_kd", 4, "mlp-8-annealing_kd-t4", students=students)
    assert group.objective_label == "Annealing-KD, τ 4"
    assert group.parameters == 610
