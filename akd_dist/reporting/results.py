"""What a fleet came to: its results read, its numbers, and the table for the terminal.

    akd-dist report runs/digits        writes runs/digits/report.html

All of it comes from what training left behind: `fleet.json`, each student's `metrics.jsonl` and `test.parquet`.
Nothing is computed but means, spreads, intervals and counts. `page` makes the page of it.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from akd_dist.base import places
from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, is_there
from akd_dist.base.formatting import BESIDE, HARD_LABELS, SHOWN, MetricFormat, metric_format, objective_label
from akd_dist.distill.delivery import TEST_NAME
from akd_dist.documents.damage import load, read_epochs
from akd_dist.documents.fleet import EpochRecord, FleetDocument, FleetStudent, RunIdentity
from akd_dist.documents.report import CompareDocument, Difference, ReportedGroup, ReportedRun, TauChoice, TauEffect
from akd_dist.reporting.comparison import read_comparison
from akd_dist.reporting.differences import Classes, Numbers, StoredPredictions, classes_of, numbers_of, read_predictions
from akd_dist.reporting.seeds import (
    SeedGroup,
    baseline,
    choices_of,
    chosen_on_validation,
    estimate,
    group_students,
    over,
    pareto_front,
    unfinished,
)
from akd_dist.tracking.status import RunReader
from akd_dist.tracking.view import headline, next_line

PAIRS_TOLD = 20
"""The most pairs of classes that a document names of each group."""


@dataclass(frozen=True)
class Run:
    """A run's results, read from its folder."""

    folder: Path
    fleet: FleetDocument
    """What fleet.json holds."""
    metrics: dict[str, list[EpochRecord]]
    """Student -> its epochs."""
    comparison: CompareDocument | None = None
    """What comparison.json holds, where objectives were compared."""
    identity: RunIdentity | None = None
    """What made the run what it is: the resolved recipe by student, and the rows; older runs did not keep it."""
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
        """Its name, unique in a run root: the last part of its folder."""
        return Path(self.fleet.run).name

    @property
    def place(self) -> str:
        """Its folder as documents name it."""
        return str(self.folder.absolute())

    @property
    def shown(self) -> MetricFormat:
        """The primary metric."""
        return metric_format(self.fleet.metric, self.fleet.metric_name)

    @property
    def teacher(self) -> float | None:
        """The teacher's primary metric on the test rows; None where it was not measured."""
        return self.fleet.teacher.metric(self.fleet.metric)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.fleet.task == "regression"

    @property
    def language(self) -> bool:
        """Whether its models are language models."""
        return self.fleet.task == "language_model"

    @property
    def agreeing(self) -> bool:
        """Whether tables have a column of agreement."""
        return agreeing(self.fleet)

    @property
    def beside(self) -> list[tuple[str, MetricFormat]]:
        """What tables show beside the primary metric."""
        return beside(self.fleet)

    @property
    def done(self) -> int:
        """How many of its students finished."""
        return len(self.fleet.students) - len(unfinished(self.fleet.students))

    @cached_property
    def groups(self) -> list[SeedGroup]:
        """Its students, seeds gathered."""
        return group_students(self.fleet.students, self.fleet.metric)

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

    def _said(self, student: FleetStudent) -> StoredPredictions | None:
        found: list[StoredPredictions | None] = [None]
        with self.without_damaged():
            found.append(read_predictions(self.folder / "students" / student.name / TEST_NAME))
        return found[-1]

    @cached_property
    def tau_families(self) -> dict[str, list[SeedGroup]]:
        """Groups of one model and objective that differ in tau_max alone, the smallest first, by what they share."""
        families: dict[str, list[SeedGroup]] = {}
        for group in self.groups:  # by tau_max already, as far as all else is equal
            if group.tau_max is not None:
                families.setdefault(self._but_for_tau(group), []).append(group)
        named = {}
        for family in families.values():
            first = family[0]
            same = [
                other[0].stem_without_tau for other in families.values() if _trained_as(other[0]) == _trained_as(first)
            ]
            apart = first.stem_without_tau if same.count(first.stem_without_tau) == 1 else first.stem
            stem = f"{first.model}, {objective_label(first.objective, first.stage1_loss)}"
            named[stem if len(same) == 1 else f"{stem}: {apart}"] = family
        return named

    def _but_for_tau(self, group: SeedGroup) -> str:
        """What two groups share if they differ in tau_max alone: by the run's identity, else by their names."""
        known = self.identity and self.identity.students.get(group.students[0].name)
        if not known:
            return f"{group.model} {group.objective} {group.stem_without_tau}"
        plain = {key: value for key, value in known.items() if key not in ("name", "seed")}
        plain["objective"] = {key: value for key, value in known["objective"].items() if key != "tau_max"}
        return canonical_json(plain).decode()

    @cached_property
    def tau_effects(self) -> list[TauEffect]:
        """The effect of tau_max: differences between students of one seed, then over seeds."""
        return [
            TauEffect(
                family=name,
                model=group.model,
                objective=group.objective,
                tau_max=group.tau_max,
                seeds=sorted(group.by_seed),
                test=estimate(group.by_seed),
                over_smallest=over(group, family[0]),
                over_scratch=over(group, baseline(group, self.groups, HARD_LABELS)),
                over_kd=over(group, baseline(group, self.groups, "kd")),
            )
            for name, family in self.tau_families.items()
            for group in family
            if group.tau_max is not None
        ]

    @cached_property
    def chosen(self) -> dict[str, SeedGroup]:
        """The students of each family whose tau_max is the best on the validation rows, by what the family shares."""
        found = {name: chosen_on_validation(family) for name, family in self.tau_families.items()}
        return {name: chosen for name, chosen in found.items() if chosen is not None}

    @property
    def tau_choices(self) -> list[TauChoice]:
        """What choosing tau_max on the validation rows comes to."""
        return [
            TauChoice(
                family=name,
                model=group.model,
                objective=group.objective,
                chosen=choices_of(group),
                test=estimate(group.by_seed),
                over_smallest=over(group, self.tau_families[name][0]),
                over_scratch=over(group, baseline(group, self.groups, HARD_LABELS)),
                over_kd=over(group, baseline(group, self.groups, "kd")),
            )
            for name, group in self.chosen.items()
        ]

    @property
    def rows_per_second(self) -> float | None:
        """Rows that students trained on by the second of their own time; None where the rows are not known."""
        spent = sum(student.seconds for student in self.fleet.students)
        return self.epochs * self.fleet.economics[0].rows / spent if self.fleet.economics and spent else None

    @property
    def epochs(self) -> int:
        """Epochs that were trained, those that students shared counted once."""
        followers = (student.name for student in self.fleet.students if student.stage1_from)
        shared = sum(one.stage == "annealing" for name in followers for one in self.metrics.get(name, []))
        return sum(student.epochs for student in self.fleet.students) - shared

    @property
    def passes_saved(self) -> str:
        """Passes of teacher and assistant that the run did without; a dash for an older run."""
        balances = self.fleet.economics
        return f"{sum(one.passes_saved for one in balances):,}" if balances else "-"

    def document(self, named: str, report: Path) -> ReportedRun:
        """What the page says, as numbers."""
        rate, front = self.rows_per_second, pareto_front(self.groups)
        return ReportedRun(
            run=named,
            report=str(report),
            task=self.fleet.task,
            metric=self.fleet.metric,
            metric_name=self.fleet.metric_name,
            teacher=self.teacher,
            done=self.done,
            students=len(self.fleet.students),
            cohorts=self.fleet.cohorts,
            seconds=self.fleet.seconds,
            rows_per_second=None if rate is None else round(rate, 1),
            groups=[_reported(group, group in front, self.beside) for group in self.groups],
            tau_max=self.tau_effects,
            tau_max_chosen=self.tau_choices,
            differences=[
                _counted(stem, found) for stem, found in self.differences.items() if isinstance(found, Classes)
            ],
            economics=self.fleet.economics,
            problems=self.problems,
        )


def _trained_as(group: SeedGroup) -> tuple[str, str, str | None]:
    return group.model, group.objective, group.stage1_loss


def agreeing(fleet: FleetDocument) -> bool:
    """Whether tables have a column of agreement: of tokens where it was measured, of classes always."""
    if fleet.task != "language_model":
        return fleet.task == "classification"
    return any(one.agreement is not None or (one.test and one.test.agreement is not None) for one in fleet.students)


def beside(fleet: FleetDocument) -> list[tuple[str, MetricFormat]]:
    """What tables show of a language model beside its primary metric, as far as it was measured; of others nothing."""
    if fleet.task != "language_model":
        return []
    tests = [fleet.teacher.test, *(one.test for one in fleet.assistants), *(one.test for one in fleet.students)]
    names = [name for name in ("cross_entropy", *BESIDE) if name != fleet.metric]
    return [(name, SHOWN[name]) for name in names if any(one and one.get(name) is not None for one in tests)]


def _reported(group: SeedGroup, pareto: bool, beside: list[tuple[str, MetricFormat]]) -> ReportedGroup:
    told = {name: mean for name, _ in beside if (mean := group.mean_of(name)) is not None}
    more: dict[str, Any] = {"beside": told} if told else {}
    return ReportedGroup(
        **group.described,
        students=len(group.students),
        seeds=sorted(group.by_seed),
        test=estimate(group.by_seed),
        agreement=group.agreement,
        seconds=group.seconds,
        pareto=pareto,
        **more,
    )


def _counted(name: str, found: Classes) -> Difference:
    return Difference(
        name=name,
        rows=found.rows,
        both_right=found.both_right,
        teacher_alone=found.teacher_alone,
        student_alone=found.student_alone,
        both_wrong_alike=found.both_wrong_alike,
        both_wrong_apart=found.both_wrong_apart,
        pairs=found.top(PAIRS_TOLD),
    )


# --- reading a run ----------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """All that a run left of its results; what of its students cannot be read is left out, and told in `problems`.

    Raises:
        RefusedError: the run has no results (yet).
        DamagedError: they are not what training wrote.
    """
    run = Run(folder, read_fleet(folder), {}, read_comparison(folder), read_identity(folder))
    for student in run.fleet.students:
        with run.without_damaged():
            run.metrics[student.name] = read_epochs(folder / "students" / student.name)
    return run


def read_fleet(run_folder: Path) -> FleetDocument:
    """What `fleet.json` holds, its places absolute: those of the run as it lies here.

    Raises:
        RefusedError: there is no run, or it has no results yet; says what command goes on with it.
        DamagedError: the file is not the JSON document that a run writes.
    """
    path = run_folder / "fleet.json"
    try:
        fleet = load(path, FleetDocument, next="akd-dist train-students RECIPE collects it again from the students")
    except (FileNotFoundError, NotADirectoryError) as error:
        status = RunReader(run_folder).read()  # refuses a folder that holds no run
        raise RefusedError(
            f"there are no results in {run_folder} yet",
            got=headline(status),
            expected="a run that has ended",
            next=next_line(status) or f"wait for it; {shlex.join(['akd-dist', 'status', str(run_folder)])} follows it",
        ) from error
    return _located(fleet, run_folder.absolute())


def _located(fleet: FleetDocument, run: Path) -> FleetDocument:
    """The document with its places resolved.

    Runs of older versions named them as absolute paths: where such a store is not there any more, it is looked for
    where it lay as seen from the run, which may have been moved together with it.
    """

    def here(place: str) -> str:
        now = places.found(place, run)
        if "://" in now or not Path(fleet.run).is_absolute() or is_there(now):
            return now
        moved = places.found(places.written(now, fleet.run), run)
        return moved if is_there(moved) else now

    located = places.each(fleet.plain(), here) | {"run": str(run)}
    for student in located["students"]:
        student["path"] = str(run / "students" / student["name"])
    return FleetDocument.model_validate(located)


def read_identity(run_folder: Path) -> RunIdentity | None:
    """What made a run what it is; None where it did not keep it.

    Raises:
        DamagedError: the file is not the JSON document that a run writes.
    """
    advice = "restore it; or remove it: students are then told apart by their names"
    try:
        return load(run_folder / "identity.json", RunIdentity, next=advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
