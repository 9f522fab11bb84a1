"""What a fleet came to: its results read, its numbers, and the table for the terminal.

    akd-dist report runs/digits        writes runs/digits/report.html

All of it comes from what training left behind: `fleet.json`, each student's `metrics.jsonl` and `test.parquet`.
Nothing is computed but means, spreads, intervals and counts. `report_page` makes the page of it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akd_dist.base import places
from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, parse_json, read_small
from akd_dist.base.formatting import (
    HARD_LABELS,
    OBJECTIVE_LABELS,
    SHOWN,
    MetricFormat,
    house_table,
    percent,
    seconds,
    share,
)
from akd_dist.distill.delivery import TEST_NAME
from akd_dist.documents.damage import load, read_epochs, reading
from akd_dist.documents.fleet import FleetDocument
from akd_dist.reporting.comparison import estimate, paired, read_comparison
from akd_dist.reporting.differences import Classes, Numbers, StoredPredictions, classes_of, numbers_of, read_predictions

if TYPE_CHECKING:
    from rich.table import Table

SAME = 5e-7
"""Scores that differ by less are the same: metrics are kept to seven digits."""
PAIRS_TOLD = 20
"""The most pairs of classes that a document names of each group."""

Metrics = list[dict[str, Any]]


# --- results, seeds grouped -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; a single seed has no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of `values`, or None if there are none."""
        present = list(values)
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None)

    def told(self, shown: MetricFormat) -> str:
        """`97.41 ± 0.23`; the mean alone for one seed."""
        return shown.text(self.mean) + ("" if self.deviation is None else f" ± {shown.text(self.deviation)}")


def plus_minus(shown: MetricFormat, spread: Spread | None) -> str:
    """A spread in a metric's terms; a dash for none."""
    return "-" if spread is None else spread.told(shown)


@dataclass(frozen=True)
class SeedGroup:
    """The students that differ in nothing but their seed: one row of the table, one point of a figure."""

    model: str
    objective: str
    tau_max: int | None
    stem: str
    metric: str = "accuracy"
    """The run's primary metric."""
    students: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> list[dict[str, Any]]:
        """Those that finished; only they count in a mean."""
        return [student for student in self.students if student["state"] == "done"]

    @property
    def riders(self) -> list[dict[str, Any]]:
        """Those that went on from another student's stage I."""
        return [student for student in self.students if student.get("stage1_from")]

    @property
    def parameters(self) -> int:
        """Number of weights of one student."""
        return int(self.students[0]["parameters"] or 0)

    @property
    def objective_label(self) -> str:
        """How the students were trained, as a reader says it."""
        label = OBJECTIVE_LABELS.get(self.objective, self.objective)
        return f"{label}, τ {self.tau_max}" if self.tau_max is not None else label

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The primary metric on the test rows of those that finished, by seed."""
        return {student["seed"]: student["test"][self.metric] for student in self.done}

    @cached_property
    def score(self) -> Spread | None:
        """The primary metric on the test rows, over seeds."""
        return Spread.of(student["test"][self.metric] for student in self.done)

    @cached_property
    def agreement(self) -> Spread | None:
        """Share of test rows where student and teacher choose the same class, over seeds, 0 to 1."""
        return Spread.of(student["agreement"] for student in self.done if student["agreement"] is not None)

    @cached_property
    def seconds(self) -> float | None:
        """Mean training time of one student."""
        return statistics.fmean(student["seconds"] for student in self.done) if self.done else None


def group_students(students: Iterable[dict[str, Any]], metric: str = "accuracy") -> list[SeedGroup]:
    """Students that differ only in their seed, gathered; smallest model first, objectives as in the papers' tables.

    Only a name that ends in `-s<seed>` says that nothing but the seed differs; any other student is a group of its own.
    """
    groups: dict[tuple[Any, ...], SeedGroup] = {}
    for student in students:
        stem = str(student["name"]).removesuffix(f"-s{student['seed']}")
        key = (student["model"], student["objective"], student["tau_max"], stem, metric)
        groups.setdefault(key, SeedGroup(*key)).students.append(student)
    order = list(OBJECTIVE_LABELS)
    return sorted(
        groups.values(),
        key=lambda group: (
            group.parameters,
            group.model,
            order.index(group.objective) if group.objective in order else len(order),
            group.tau_max or 0,
            group.stem,
        ),
    )


def group_label(group: SeedGroup, groups: Iterable[SeedGroup]) -> str:
    """The model's label, or the students' common name where the label does not tell two groups apart."""
    alike = [
        other
        for other in groups
        if (other.model, other.objective, other.tau_max) == (group.model, group.objective, group.tau_max)
    ]
    return group.model if len(alike) == 1 else group.stem


def baseline(group: SeedGroup, groups: Iterable[SeedGroup], kind: str) -> SeedGroup | None:
    """The one group of the same model that was trained in this other way; None where there is none, or several."""
    found = [other for other in groups if (other.model, other.objective) == (group.model, kind) and other.done]
    return found[0] if len(found) == 1 and group.objective != kind else None


def gain_over_scratch(group: SeedGroup, groups: Iterable[SeedGroup]) -> float | None:
    """Mean score less that of the same model trained from hard labels; None without exactly one such baseline."""
    scratch = baseline(group, groups, HARD_LABELS)
    if group.score is None or scratch is None or scratch.score is None:
        return None
    return group.score.mean - scratch.score.mean


def pareto_front(groups: Iterable[SeedGroup]) -> list[SeedGroup]:
    """The groups that no other beats: better with as few parameters, or as good with fewer. Smallest first.

    Of one size those that are equally good are all on it.
    """
    front: list[SeedGroup] = []
    best, size = -math.inf, 0
    scored = [(group, group.score.mean) for group in groups if group.score is not None]
    for group, mean in sorted(scored, key=lambda pair: (pair[0].parameters, -pair[1])):
        if mean > best + SAME or (mean > best - SAME and group.parameters == size):
            front.append(group)
            best, size = max(best, mean), group.parameters
    return front


def run_name(fleet: dict[str, Any]) -> str:
    """The run's name: the last part of its folder."""
    return Path(fleet["run"]).name


def unfinished(students: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The students that did not finish, in the fleet's order."""
    return [student for student in students if student["state"] != "done"]


# --- a run and its numbers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run's results, read from its folder."""

    folder: Path
    fleet: dict[str, Any]
    """The document of fleet.json."""
    metrics: dict[str, Metrics]
    """Student -> its epochs, as `read_metrics` gives them."""
    comparison: dict[str, Any] | None = None
    """The document of comparison.json, where objectives were compared."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What made the run what it is: the resolved recipe by student, and the rows."""
    problems: list[str] = field(default_factory=list)
    """Files of students that could not be read, one line each: one that is damaged takes nothing from the others."""

    @contextlib.contextmanager
    def without_damaged(self) -> Iterator[None]:
        """Leave out what this block reads, and note the problem, if it is not what training wrote."""
        try:
            yield
        except (DamagedError, MachineError) as error:
            told = f"{error.what}: {error.got}".replace(f"{self.folder}/", "")
            if told not in self.problems:
                self.problems.append(told)

    @property
    def name(self) -> str:
        """Its name, unique in a run root."""
        return run_name(self.fleet)

    @property
    def shown(self) -> MetricFormat:
        """The primary metric."""
        return SHOWN[self.fleet["metric"]]

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return bool(self.fleet["task"] == "regression")

    @cached_property
    def groups(self) -> list[SeedGroup]:
        """Its students, seeds gathered."""
        return group_students(self.fleet["students"], self.fleet["metric"])

    @cached_property
    def differences(self) -> dict[str, Classes | Numbers]:
        """Where the finished students of each group and the teacher differ, by stem; older runs did not keep it."""
        found: dict[str, Classes | Numbers] = {}
        for group in self.groups:
            said = (one for one in map(self._said, group.done) if one is not None)
            counted = numbers_of(said) if self.regression else classes_of(said)
            if counted is not None:
                found[group.stem] = counted
        return found

    def _said(self, student: dict[str, Any]) -> StoredPredictions | None:
        found: list[StoredPredictions | None] = [None]
        with self.without_damaged():
            found.append(read_predictions(self.folder / "students" / student["name"] / TEST_NAME))
        return found[-1]

    @cached_property
    def tau_families(self) -> dict[str, list[SeedGroup]]:
        """Groups of one model and objective that differ in tau_max alone, the smallest first, by what they share."""
        families: dict[str, list[SeedGroup]] = {}
        for group in self.groups:
            if group.tau_max is not None:
                families.setdefault(self._but_for_tau(group), []).append(group)
        named = {}
        for family in families.values():
            family.sort(key=lambda group: group.tau_max or 0)
            stem = f"{family[0].model}, {OBJECTIVE_LABELS.get(family[0].objective, family[0].objective)}"
            alike = [other for other in families.values() if other[0].model == family[0].model]
            same = [other for other in alike if other[0].objective == family[0].objective]
            common = [_without_tau(other[0]) for other in same]
            unique = common.count(_without_tau(family[0])) == 1
            apart = _without_tau(family[0]) if unique else family[0].stem
            named[stem if len(same) == 1 else f"{stem}: {apart}"] = family
        return named

    def _but_for_tau(self, group: SeedGroup) -> str:
        """What two groups share if they differ in tau_max alone: by the run's identity, else by their names."""
        known = self.identity.get("students", {}).get(group.students[0]["name"])
        if known is None:
            return f"{group.model} {group.objective} {_without_tau(group)}"
        plain = {key: value for key, value in known.items() if key not in ("name", "seed")}
        plain["objective"] = {key: value for key, value in known["objective"].items() if key != "tau_max"}
        return canonical_json(plain).decode()

    @property
    def rows_per_second(self) -> float | None:
        """Rows that students trained on by the second of their own time; None where the rows are not known."""
        if not self.fleet.get("economics"):
            return None
        spent = sum(student["seconds"] for student in self.fleet["students"])
        return self.epochs * self.fleet["economics"][0]["rows"] / spent if spent else None

    @property
    def epochs(self) -> int:
        """Epochs that were trained, those that students shared counted once."""
        return sum(self.own_epochs(student) for student in self.fleet["students"])

    def own_epochs(self, student: dict[str, Any]) -> int:
        """Epochs that a student trained itself."""
        if not student.get("stage1_from"):
            return int(student["epochs"])
        shared = [record for record in self.metrics.get(student["name"], []) if record["stage"] == "annealing"]
        return int(student["epochs"]) - len(shared)

    def document(self, named: str, report: Path) -> dict[str, Any]:
        """What the page says, as numbers: documents.ReportedRun."""
        students = self.fleet["students"]
        rate = self.rows_per_second
        return {
            "run": named,
            "report": str(report),
            "task": self.fleet["task"],
            "metric": self.fleet["metric"],
            "teacher": self.fleet["teacher"]["test"][self.fleet["metric"]],
            "done": len(students) - len(unfinished(students)),
            "students": len(students),
            "cohorts": self.fleet["cohorts"],
            "seconds": self.fleet["seconds"],
            "rows_per_second": None if rate is None else round(rate, 1),
            "groups": [_reported(group, self.groups) for group in self.groups],
            "tau_max": tau_effects(self),
            "differences": [
                {
                    "name": stem,
                    "rows": counted.rows,
                    **{name: getattr(counted, name) for name in CASES},
                    "pairs": counted.top(PAIRS_TOLD),
                }
                for stem, counted in self.differences.items()
                if isinstance(counted, Classes)
            ],
            "economics": self.fleet.get("economics", []),
            "problems": self.problems,
        }


CASES = ("both_right", "teacher_alone", "student_alone", "both_wrong_alike", "both_wrong_apart")


def _without_tau(group: SeedGroup) -> str:
    return group.stem.replace(f"-t{group.tau_max}", "", 1)


def _reported(group: SeedGroup, groups: list[SeedGroup]) -> dict[str, Any]:
    return {
        "name": group.stem,
        "model": group.model,
        "parameters": group.parameters,
        "objective": group.objective,
        "tau_max": group.tau_max,
        "students": len(group.students),
        "seeds": sorted(group.by_seed),
        "test": estimate_of(group.by_seed),
        "agreement": group.agreement.mean if group.agreement else None,
        "seconds": group.seconds,
        "pareto": group in pareto_front(groups),
    }


def estimate_of(by_seed: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean and 95 % interval over seeds, see `comparison.estimate`."""
    return estimate([by_seed[seed] for seed in sorted(by_seed)])


def tau_effects(run: Run) -> list[dict[str, Any]]:
    """The effect of tau_max, as documents.TauEffect: differences between students of one seed, then over seeds."""
    return [
        {
            "family": name,
            "model": group.model,
            "objective": group.objective,
            "tau_max": group.tau_max,
            "seeds": sorted(group.by_seed),
            "test": estimate_of(group.by_seed),
            "over_smallest": None if group is family[0] else paired(group.by_seed, family[0].by_seed),
            "over_scratch": _over(group, run.groups, HARD_LABELS),
            "over_kd": _over(group, run.groups, "kd"),
        }
        for name, family in run.tau_families.items()
        for group in family
    ]


def _over(group: SeedGroup, groups: list[SeedGroup], kind: str) -> dict[str, Any] | None:
    other = baseline(group, groups, kind)
    return None if other is None else paired(group.by_seed, other.by_seed)


# --- several runs -----------------------------------------------------------------------------------------------------


def same_test_rows(runs: Iterable[Run]) -> bool | None:
    """Whether runs were measured on the same test rows, by fingerprint; None where one does not say."""
    found = [run.identity.get("dataset", {}).get("test") for run in runs]
    return None if None in found else len(set(found)) == 1


def check_comparable(runs: list[Run]) -> None:
    """Refuse runs whose primary metrics differ: no axis holds both.

    Raises:
        RefusedError: names two of them.
    """
    first = runs[0]
    for run in runs:
        if run.fleet["metric"] != first.fleet["metric"]:
            raise RefusedError(
                "these runs cannot be compared: they were measured by different metrics",
                got=f"{first.folder}: {first.fleet['metric']}; {run.folder}: {run.fleet['metric']}",
                expected="runs of one primary metric",
                next="report them one by one",
            )


def differences_of_runs(runs: list[Run]) -> list[dict[str, Any]]:
    """Every group of every run, as documents.RunDifference, with its difference to the same group of the first run."""
    firsts = {group.stem: group for group in runs[0].groups}
    return [
        {
            "run": str(run.folder),
            "name": group.stem,
            "test": estimate_of(group.by_seed),
            "over_first": paired(group.by_seed, firsts[group.stem].by_seed)
            if run is not runs[0] and group.stem in firsts
            else None,
        }
        for run in runs
        for group in run.groups
    ]


def names_of(runs: list[Run]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where two share it."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


# --- the terminal's tables --------------------------------------------------------------------------------------------


def fleet_table(fleet: dict[str, Any]) -> Table:
    """The results of a run as a table for the terminal: the teacher, then its students, seeds grouped.

    Args:
        fleet: the document of `fleet.json`.
    """
    from rich.text import Text

    teacher, shown = fleet["teacher"], SHOWN[fleet["metric"]]
    groups, agreeing = group_students(fleet["students"], fleet["metric"]), fleet["task"] == "classification"
    lost = unfinished(fleet["students"])
    table = house_table(
        f"{run_name(fleet)}: test results, mean ± standard deviation over seeds",
        Text("\n".join(_obituary(student) for student in lost), style="red") if lost else None,
    )
    table.add_column("student", overflow="fold")
    table.add_column("para-\nmeters", justify="right", no_wrap=True)
    table.add_column("of\nteacher", justify="right", no_wrap=True)
    table.add_column("objective", no_wrap=True)
    table.add_column(f"test\n{shown.with_unit(shown.short)}", justify="right", no_wrap=True)
    if agreeing:
        table.add_column("agree-\nment %", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    best = shown.text(teacher["test"][fleet["metric"]])
    table.add_row("teacher", f"{teacher['parameters']:,}", "100 %", "", best, style="bold")
    for assistant in fleet.get("assistants", []):
        table.add_row(
            Text(f"assistant {assistant['model']}"),
            f"{assistant['parameters']:,}",
            share(assistant["parameters"], teacher["parameters"]),
            "",
            shown.text(assistant["test"][fleet["metric"]]),
            *([percent(assistant["agreement"])] if agreeing else []),
        )
    previous = None
    for group in groups:
        if group.model != previous:
            table.add_section()
        table.add_row(
            Text(group_label(group, groups)),
            f"{group.parameters:,}",
            share(group.parameters, teacher["parameters"]),
            Text(group.objective_label),
            plus_minus(shown, group.score),
            *([percent(group.agreement.mean if group.agreement else None)] if agreeing else []),
            seconds(group.seconds),
        )
        previous = group.model
    return table


def _obituary(student: dict[str, Any]) -> str:
    return f"{student['name']} {student['state']}: {student['reason'] or 'no reason recorded'}"


def runs_table(runs: list[Run]) -> Table:
    """Several runs as a table for the terminal, one row each."""
    from rich.text import Text

    shown = runs[0].shown
    table = house_table(f"{len(runs)} runs")
    table.add_column("run", overflow="fold")
    for heading in (f"teacher\n{shown.with_unit(shown.short)}", f"best student\n{shown.with_unit(shown.short)}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    for heading in ("done", "seconds", "passes\nsaved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in zip(names_of(runs), runs, strict=True):
        best, students = best_of(run.groups), run.fleet["students"]
        table.add_row(
            Text(name),
            shown.text(run.fleet["teacher"]["test"][run.fleet["metric"]]),
            plus_minus(shown, best.score if best else None),
            Text(f"{best.model}, {best.objective_label}" if best else "-"),
            f"{len(students) - len(unfinished(students))} of {len(students)}",
            seconds(run.fleet["seconds"]),
            passes_saved(run),
        )
    return table


def best_of(groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """The group of the highest mean; None where none finished."""
    finished = [group for group in groups if group.score is not None]
    return max(finished, key=lambda group: group.score.mean if group.score else -math.inf, default=None)


def passes_saved(run: Run) -> str:
    """Passes of teacher and assistant that the run did without; a dash for an older run."""
    balances = run.fleet.get("economics", [])
    return f"{sum(one['passes_saved'] for one in balances):,}" if balances else "-"


# --- reading a run ----------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """All that a run left of its results; what of its students cannot be read is left out, and told in `problems`.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: they are not what training wrote.
    """
    fleet = read_fleet(folder)
    run = Run(folder, fleet, {}, read_comparison(folder), read_identity(folder))
    for student in fleet["students"]:
        with run.without_damaged():
            run.metrics[student["name"]] = read_metrics(folder, student["name"])
    return run


def read_fleet(run_folder: Path) -> dict[str, Any]:
    """The document of `fleet.json`, its places absolute: those of the run as it lies here.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: the file is not the JSON document that a run writes.
    """
    path = run_folder / "fleet.json"
    try:
        fleet = load(path, FleetDocument, next="akd-dist train-students RECIPE collects it again from the students")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedError(
            f"there are no results in {run_folder}",
            got="no fleet.json",
            expected="the folder of a run that has ended, for example runs/digits",
            next=f"akd-dist train-students {run_folder / 'recipe.yaml'}",
        ) from error
    return _located(fleet, run_folder.absolute())


def _located(fleet: dict[str, Any], run: Path) -> dict[str, Any]:
    """The document with its places resolved.

    Runs of older versions named them as absolute paths: where such a store is not there any more, it is looked for
    where it lay as seen from the run, which may have been moved together with it.
    """
    before = fleet["run"]

    def here(place: str) -> str:
        now = places.found(place, run)
        if "://" in now or not Path(before).is_absolute() or Path(now).exists():
            return now
        moved = places.found(places.written(now, before), run)
        return moved if Path(moved).exists() else now

    fleet = {**places.each(fleet, here), "run": str(run)}
    for student in fleet["students"]:
        student["path"] = str(run / "students" / student["name"])
    return fleet


def read_identity(run_folder: Path) -> dict[str, Any]:
    """What made a run what it is; nothing where it did not keep it.

    Raises:
        DamagedError: the file is not the JSON document that a run writes.
    """
    path = run_folder / "identity.json"
    if not path.exists():
        return {}
    advice = "restore it; or remove it: students are then told apart by their names"
    with reading(path, expected="what train-students wrote", next=advice):
        identity: dict[str, Any] = parse_json(read_small(path))
        if not all(isinstance(identity[part], dict) for part in ("students", "dataset")):
            raise TypeError("students and dataset are no objects")
    return identity


def read_metrics(run_folder: Path, student: str) -> Metrics:
    """A student's epochs in order, one dict each; none if it never finished one.

    Raises:
        DamagedError: as `read_epochs`.
    """
    return read_epochs(run_folder / "students" / student)
