"""One recipe under every objective and several seeds, from one store: the table of the papers.

    akd-dist compare jobs/digits.yaml

`expand` says which students that takes, `compare` makes the table of what came of them, as a document; the rest writes
it down. All of it is plain arithmetic on a recipe and on the content of `fleet.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import replace
from akd_dist.base.formatting import CUSTOM, OBJECTIVE_LABELS, SHOWN, MetricFormat, house_table, objective_label, signed
from akd_dist.documents.damage import load
from akd_dist.documents.fleet import FleetDocument, FleetStudent, FleetTeacher
from akd_dist.documents.report import ComparedModel, CompareDocument, ComparedRow, Estimate, LostStudent, SplitRows
from akd_dist.recipe import AnnealingKD, ContinuationKD, HardLabels, Kd, Objective, Recipe, StudentSpec, Takd
from akd_dist.reporting.seeds import CHOSEN_TAU, CONFIDENCE, SeedGroup, choices_of, chosen_on_validation, estimate, over

if TYPE_CHECKING:
    from rich.table import Table

SUFFIX = "-compare"
DEFAULT_SEEDS = (0, 1, 2)
JSON_NAME, MARKDOWN_NAME = "comparison.json", "comparison.md"


# --- which students -------------------------------------------------------------------------------------------------


def expand(recipe: Recipe, seeds: int | None = None) -> Recipe:
    """The recipe with every objective and several seeds for each of its student models.

    What the recipe lists is taken as listed, with further seeds. An objective that it does not list for a model is
    derived from that model's first Annealing-KD student: the same optimizer, batch and total of epochs, other settings
    at their defaults. TAKD is among them where the teacher has an assistant.

    Args:
        seeds: train with seeds 0..seeds - 1; None takes those that the recipe has for a model, if they are two or more,
            else 0, 1, 2.

    Returns:
        A recipe named `<name>-compare`, its students by model in the order of the table.

    Raises:
        RecipeError: a model has no Annealing-KD student, one seed gives no interval, or two students share a name.
    """
    if seeds is not None and seeds < 2:
        raise RecipeError(
            "an interval needs two seeds or more",
            got=f"--seeds {seeds}",
            expected="at least 2",
            next="say --seeds 3",
        )
    kinds = [kind for kind in OBJECTIVE_LABELS if kind != "takd" or recipe.teacher.assistant is not None]
    try:
        students = [
            student
            for listed in _gathered(recipe.students, lambda student: student.model)
            for student in _of_model(listed, kinds, seeds)
        ]
        # A number of cohorts was meant for the recipe's own students, and there are several times as many now.
        changes = {"name": recipe.name + SUFFIX, "students": students, "cohorts": None}
        return Recipe.model_validate(dict(recipe) | changes)
    except ValidationError as error:
        raise RecipeError(
            f"the recipe {recipe.name} cannot be compared",
            got="; ".join(problem["msg"] for problem in error.errors()),
            expected="students whose names, with `-s<seed>` at their end, stay apart",
            next="leave out `name:` of the students, or choose others",
        ) from None


def _of_model(listed: list[StudentSpec], kinds: list[str], seeds: int | None) -> list[StudentSpec]:
    """All students of one model: objective by objective, each with every seed."""
    own = sorted({student.seed for student in listed})
    numbers = list(range(seeds)) if seeds is not None else own if len(own) > 1 else list(DEFAULT_SEEDS)
    students = []
    for kind in kinds:
        given = [student for student in listed if student.objective.kind == kind]
        for alike in variants(given) or ([] if kind == CUSTOM else [[_derived(kind, listed)]]):
            students += [_with_seed(alike, seed) for seed in numbers]
    return students


def _derived(kind: str, listed: list[StudentSpec]) -> StudentSpec:
    """A student of an objective that the recipe does not list for this model."""
    for student in listed:
        if isinstance(student.objective, AnnealingKD):
            given = {name: getattr(student, name) for name in StudentSpec.model_fields if name != "name"}
            return StudentSpec(**given | {"objective": _objective(kind, student.objective)})
    label = listed[0].model.label
    raise RecipeError(
        f"the students of {label} cannot be compared: none of them learns by Annealing-KD",
        got=", ".join(dict.fromkeys(student.objective.kind for student in listed)),
        expected="an annealing_kd student of each model: missing objectives take its optimizer, batch and epochs",
        next=f"add a student of {label} with objective: {{kind: annealing_kd, tau_max: ..., stage1_epochs: ..., "
        "stage2_epochs: ...}",
    )


def _objective(kind: str, annealing: AnnealingKD) -> Objective:
    """Another objective with the same budget of epochs."""
    epochs = annealing.epochs
    match kind:
        case "hard_labels":
            return HardLabels(epochs=epochs)
        case "kd":
            return Kd(epochs=epochs)
        case "takd":
            return Takd(epochs=epochs)
        case _:
            return ContinuationKD(tau_max=annealing.tau_max, epochs=epochs, reduction=annealing.reduction)


def _with_seed(alike: list[StudentSpec], seed: int) -> StudentSpec:
    """The student of this seed: as listed, or the first of those that differ in nothing else, seeded and named anew."""
    for student in alike:
        if student.seed == seed:
            return student
    name = f"{_stem(alike[0])}-s{seed}"
    return StudentSpec.model_validate(dict(alike[0]) | {"seed": seed, "name": name})


def _stem(student: StudentSpec) -> str:
    return student.name.removesuffix(f"-s{student.seed}")


def variants(students: Iterable[StudentSpec]) -> list[list[StudentSpec]]:
    """Students that differ in nothing but seed and name, gathered: the rows of the table."""
    return _gathered(students, lambda student: student.model_copy(update={"seed": 0, "name": ""}))


def _gathered(students: Iterable[StudentSpec], of: Callable[[StudentSpec], Any]) -> list[list[StudentSpec]]:
    """Students for whom `of` gives equal models, in the order in which the first of each comes."""
    groups: dict[str, list[StudentSpec]] = {}
    for student in students:
        groups.setdefault(of(student).model_dump_json(), []).append(student)
    return list(groups.values())


# --- what came of them ----------------------------------------------------------------------------------------------


def compare(
    recipe: Recipe, fleet: FleetDocument, rows: SplitRows, command: str, unlabelled: int = 0
) -> CompareDocument:
    """The table of a fleet that an expanded recipe has trained.

    Args:
        recipe: what `expand` made, as the run has it.
        fleet: what the run's fleet.json holds.
        rows: number of rows of each split.
        command: what makes the same table again.
        unlabelled: how many of the train rows have no label.
    """
    metric, entries = recipe.data.primary_metric, {student.name: student for student in fleet.students}
    return CompareDocument(
        run=fleet.run,
        command=command,
        task=recipe.data.task,
        metric=metric,
        metric_name=fleet.metric_name,
        confidence=CONFIDENCE,
        rows=rows,
        unlabelled=unlabelled,
        teacher=_reference(fleet.teacher, metric, None),
        assistants=[_reference(assistant, metric, assistant.agreement) for assistant in fleet.assistants],
        table=[
            row
            for listed in _gathered(recipe.students, lambda student: student.model)
            for row in _rows_of_model(listed, entries, metric)
        ],
        missing=[] if recipe.teacher.assistant is not None else ["takd"],
        **({"refused": fleet.refused} if fleet.refused else {}),
    )


def _reference(model: FleetTeacher, metric: str, agreement: float | None) -> ComparedModel:
    return ComparedModel(model=model.model, parameters=model.parameters, test=model.metric(metric), agreement=agreement)


def _rows_of_model(
    listed: list[StudentSpec], entries: Mapping[str, FleetStudent], metric: str
) -> Iterator[ComparedRow]:
    """The rows of one model. Students that did not come to their end are named, and in no mean."""
    rows = []
    for alike in variants(listed):
        first = alike[0]
        tau_max = getattr(first.objective, "tau_max", None)
        students = [entries[student.name] for student in alike]
        group = SeedGroup(first.model.label, first.objective.kind, tau_max, _stem(first), metric, students)
        rows.append((first, group))
    scratch, kd = (
        next((group for _, group in rows if group.objective == kind), None) for kind in ("hard_labels", "kd")
    )
    for family in _families([first for first, _ in rows]):
        groups = [rows[at][1] for at in family]
        for at in family:
            yield _row(*rows[at], scratch, kd)
        if (chosen := chosen_on_validation(groups)) is not None:
            yield _row(rows[family[0]][0], chosen, scratch, kd).model_copy(update={"chosen": choices_of(chosen)})


def _families(firsts: list[StudentSpec]) -> Iterator[list[int]]:
    """Which rows differ in tau_max alone, the smallest first; every other row by itself. In the order of the rows."""
    alike: dict[str, list[int]] = {}
    for at, first in enumerate(firsts):
        document = first.model_dump(mode="json", exclude={"name", "seed"})
        document["objective"].pop("tau_max", None)
        alike.setdefault(json.dumps(document), []).append(at)
    for family in alike.values():
        yield sorted(family, key=lambda at: getattr(firsts[at].objective, "tau_max", 0))


def _row(first: StudentSpec, group: SeedGroup, scratch: SeedGroup | None, kd: SeedGroup | None) -> ComparedRow:
    """The row of a group.

    Args:
        first: one of its students.
        scratch, kd: the groups of its model that it is compared with.
    """
    return ComparedRow(
        **(group.described | {"parameters": group.students[0].parameters}),
        epochs=first.objective.epochs,
        seeds=sorted(group.by_seed),
        test=estimate(group.by_seed),
        over_scratch=None if group.objective == "hard_labels" else over(group, scratch),
        over_kd=None if group.objective in ("hard_labels", "kd") else over(group, kd),
        agreement=group.agreement,
        lost=[
            LostStudent(name=one.name, seed=one.seed, state=one.state, reason=one.reason)
            for one in group.students
            if one.state != "done"
        ],
    )


# --- as text --------------------------------------------------------------------------------------------------------


def read_comparison(run: Path) -> CompareDocument | None:
    """The comparison in a run's folder; None where there is none.

    Raises:
        DamagedError: the file is not what `write_comparison` writes.
    """
    path = run / JSON_NAME
    advice = "remove it, and run akd-dist compare again: what is trained is kept"
    try:
        document = load(path, CompareDocument, expected="what akd-dist compare wrote", next=advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return document.model_copy(update={"run": str(run.absolute())})


def write_comparison(run: Path, document: CompareDocument) -> None:
    """Keep a comparison in its run's folder, as JSON and as Markdown: equal results, equal bytes."""
    in_the_run = document.plain() | {"run": "."}
    replace(run / JSON_NAME, json.dumps(in_the_run, indent=1, ensure_ascii=False).encode())
    replace(run / MARKDOWN_NAME, to_markdown(document).encode())


def comparison_table(document: CompareDocument) -> Table:
    """A comparison as a table for a terminal of eighty columns."""
    from rich.text import Text

    told = remarks(document)
    table = house_table(
        f"{Path(document.run).name}: {_title(document)}, mean ± 95 % interval over seeds",
        Text("\n".join(told)) if told else None,
    )
    table.add_column("trained by", overflow="fold")
    agreeing, shown = _agreeing(document), _shown(document)
    for heading in ("seeds", "test", "over\nscratch", "over KD", *["agree-\nment %"] * agreeing):
        table.add_column(heading, justify="right", no_wrap=True)
    for role, model in _references(document):
        table.add_row(Text(f"{role} {model.model}"), *_reference_cells(model, shown)[: 4 + agreeing], style="bold")
    previous = None
    for row in document.table:
        if row.model != previous:
            table.add_section()
            table.add_row(Text(_sized(row)), style="bold")
            previous = row.model
        table.add_row(Text("  " + _label(row, document.table)), *_cells(row, shown)[: 4 + agreeing])
    return table


def to_markdown(document: CompareDocument) -> str:
    """A comparison as a GitHub table, with all that is needed to make it again."""
    rows, seeds = document.rows, sorted({seed for row in document.table for seed in row.seeds})
    without = f", {document.unlabelled:,} of them without labels" if document.unlabelled else ""
    lines = [
        f"`{document.command}`",
        "",
        f"{rows['train']:,} train rows{without}, {rows['validation']:,} validation rows that pick the epoch, "
        f"{rows['test']:,} test rows that are read once. Seeds {', '.join(map(str, seeds))}: mean ± half of the 95 % "
        "interval (Student's t); differences are paired by seed.",
        "",
        _markdown_row(columns(document)),
        "|---|---|" + "--:|" * (len(columns(document)) - 2),
        *map(_markdown_row, cells(document)),
    ]
    lines += ["", *(f"- {remark}" for remark in remarks(document))] if remarks(document) else []
    return "\n".join(lines) + "\n"


def columns(document: CompareDocument) -> tuple[str, ...]:
    """The headings of `cells`; regression has no agreement, nor language models of which it was not measured."""
    agreement = ("agreement %",) if _agreeing(document) else ()
    return ("model", "trained by", "seeds", _title(document), "over from scratch", "over KD", *agreement)


def cells(document: CompareDocument) -> list[tuple[str, ...]]:
    """The table as text: teacher, assistants, then each model under each objective."""
    shown = _shown(document)
    rows: list[tuple[str, ...]] = [
        (_sized(model), role, *_reference_cells(model, shown)) for role, model in _references(document)
    ]
    rows += [(_sized(row), _label(row, document.table), *_cells(row, shown)) for row in document.table]
    return [row[: len(columns(document))] for row in rows]


def _markdown_row(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _title(document: CompareDocument) -> str:
    """The metric as it is shown: a hundred times as large, or in nats as it is."""
    name, shown = document.metric_name or document.metric, _shown(document)
    if shown.lowest:
        return f"{shown.label} (less is better)"
    return f"{name} %" if shown.percent else f"{name} x 100"


def _shown(document: CompareDocument) -> MetricFormat:
    return SHOWN.get(document.metric, SHOWN[CUSTOM])


def _agreeing(document: CompareDocument) -> bool:
    if document.task == "language_model":
        return any(row.agreement is not None for row in document.table)
    return document.task == "classification"


def _references(document: CompareDocument) -> list[tuple[str, ComparedModel]]:
    """Teacher and assistants."""
    return [("teacher", document.teacher), *(("assistant", one) for one in document.assistants)]


def _reference_cells(model: ComparedModel, shown: MetricFormat) -> tuple[str, str, str, str, str]:
    """Trained once, so without an interval."""
    return ("", _number(model.test, shown), "", "", _hundredfold(model.agreement))


def _cells(row: ComparedRow, shown: MetricFormat) -> tuple[str, str, str, str, str]:
    asked, done = len(row.seeds) + len(row.lost), len(row.seeds)
    return (
        str(done) if done == asked else f"{done} of {asked}",
        _plus_minus(row.test, shown),
        _plus_minus(row.over_scratch, shown, difference=True),
        _plus_minus(row.over_kd, shown, difference=True),
        _hundredfold(row.agreement),
    )


def _label(row: ComparedRow, table: list[ComparedRow]) -> str:
    """How the row was trained; where several rows of a model were trained so, also the students' common name."""
    said = row.model, row.objective, row.stage1_loss
    alike = [other for other in table if (other.model, other.objective, other.stage1_loss) == said]
    label = objective_label(row.objective, row.stage1_loss)
    if row.chosen:
        several = sum(bool(other.chosen) for other in alike) > 1
        return f"{label}, {CHOSEN_TAU}" + (f": {row.name}" if several else "")
    return label if len(alike) == 1 else f"{label}: {row.name}"


def _sized(model: ComparedModel | ComparedRow) -> str:
    return f"{model.model} ({model.parameters or 0:,})"


def _plus_minus(value: Estimate | None, shown: MetricFormat, *, difference: bool = False) -> str:
    if value is None:
        return ""
    if not difference:
        mean = _number(value.mean, shown)
    else:
        mean = shown.gain(value.mean) if shown.lowest else signed(100 * value.mean, 2)
    return mean if value.high is None else f"{mean} ± {_number(value.high - value.mean, shown)}"


def _number(value: float | None, shown: MetricFormat) -> str:
    """A correlation is shown a hundred times as large, as the papers do; nats as they are."""
    return shown.text(value) if value is not None and shown.lowest else _hundredfold(value)


def _hundredfold(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def remarks(document: CompareDocument) -> list[str]:
    """What the table does not hold, and why."""
    remarks = [
        f"{lost.name} {lost.state}, and is in no mean: {lost.reason or 'no reason recorded'}"
        for row in document.table
        for lost in row.lost
    ]
    remarks += [f"left out: {one.told}" for one in document.refused]
    if "takd" in document.missing:
        remarks.append("TAKD is missing: give the recipe a teacher.assistant, and a student of objective takd")
    return remarks
