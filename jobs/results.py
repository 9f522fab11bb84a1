"""What became of a fleet: every student's result, the teacher's, what it cost, and the report; told and written."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base import places
from akd_dist.base.errors import DamagedError, MachineError
from akd_dist.base.files import replace
from akd_dist.base.trusted import Trusted
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.checkpoint import DAMAGED
from akd_dist.distill.cohort import stored_predictions
from akd_dist.distill.delivery import failed_entry
from akd_dist.distill.hooks import own_measure
from akd_dist.distill.job import CohortJob, read_result, renewals
from akd_dist.distill.language_metrics import bytes_of_tokens
from akd_dist.distill.metrics import measure
from akd_dist.distill.teacher_metrics import agreement_of, teacher_metrics
from akd_dist.documents.base import Document
from akd_dist.documents.damage import load
from akd_dist.documents.fleet import (
    Economics,
    FleetAssistant,
    FleetDocument,
    FleetMember,
    FleetStudent,
    FleetTeacher,
    Metrics,
)
from akd_dist.jobs.growth import Growth
from akd_dist.jobs.planning.planner import learns_from_assistant
from akd_dist.jobs.train_teacher import Trained, teacher_of
from akd_dist.models.build import build, check_memory, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.recipe import Recipe
from akd_dist.reporting.economics import StudentUsage, economics, reading
from akd_dist.reporting.page import write_report
from akd_dist.reporting.results import read_fleet
from akd_dist.storage.mean import AnyStore, MeanStore, members_of
from akd_dist.storage.reader import LogitStore
from akd_dist.storage.roots import open_root
from akd_dist.tracking.progress import tell


def finish_run(
    run: Path,
    recipe: Recipe,
    splits: Splits,
    base: CohortJob,
    stores: Sequence[Mapping[str, AnyStore]],
    parameters: dict[str, int],
    cohorts: int,
    seconds: float,
    told: Callable[[str], None] | None = None,
    growth: Growth | None = None,
    test_withheld: bool = False,
) -> FleetDocument:
    """Collect every student's result into fleet.json and the report.

    Args:
        stores: those of the teacher, then of each assistant, by split.
        told: told of each file of a student that the report has to do without.
        growth: which students of the run are left out.
        test_withheld: whether the students were not measured on the test rows.
    """
    students = []
    for spec in recipe.students:
        folder = Path(base.root) / spec.name
        result = read_result(base, spec) or failed_entry(spec, "it never ended", folder, base.attempt)
        source = (stores[-1] if learns_from_assistant(spec) else stores[0])["train"]
        where = {"path": str(folder), "store": source.uri, "teacher": source.teacher}
        students.append(FleetStudent.model_validate(result | {"parameters": parameters[spec.name]} | where))
    asked = splits.test, recipe.trusted, recipe.data.own_metric, recipe.data.text
    teacher = describe_teacher(stores[0]["train"], stores[0].get("test"), *asked)
    assistants = [describe_assistant(each, stores[0].get("test"), *asked) for each in stores[1:]]
    labels = [teacher.model, *(assistant.model for assistant in assistants)]
    beside: dict[str, Any] = {} if growth is None else growth.told
    beside |= {"test_withheld": True} if test_withheld else {}
    beside |= {"stores_named": any(one.store is not None for one in recipe.teacher.each)}
    beside |= {"metric_name": recipe.data.metric_name} if recipe.data.own_metric else {}
    fleet = FleetDocument(
        run=str(run),
        store=stores[0]["train"].uri,
        task=recipe.data.task,
        metric=recipe.data.primary_metric,
        teacher=teacher,
        assistants=assistants,
        students=students,
        cohorts=cohorts,
        seconds=round(seconds, 3),
        economics=balances(recipe, splits, labels, students, stores),
        **beside,
    )
    spelling = places.written if base.run_uri is None else places.inside
    in_the_run = places.each(fleet.plain(), functools.partial(spelling, folder=run))
    # Before the report, which is drawn from what this file says.
    replace(run / "fleet.json", json.dumps(in_the_run, indent=1).encode())
    write_report(run, tell=told)
    tidy(base)
    return read_fleet(run)


def balances(
    recipe: Recipe,
    splits: Splits,
    labels: Sequence[str],
    students: Sequence[FleetStudent],
    stores: Sequence[Mapping[str, AnyStore]],
) -> list[Economics]:
    """What the stored logits cost and saved: those of the teacher, and of the last assistant where students read it.

    Args:
        labels: what the teacher and each assistant is called.
        students: the results, in the order of the recipe.
    """
    usage: dict[bool, list[StudentUsage]] = {False: [], True: []}
    for spec, result in zip(recipe.students, students, strict=True):
        usage[learns_from_assistant(spec)].append(reading(spec, result.epochs, result.stage1_from))
    spent = training_seconds(recipe, splits, stores[0]["train"])
    found = [economics("teacher", labels[0], stores[0], usage[False], spent)]
    return found + ([economics("assistant", labels[-1], stores[-1], usage[True])] if usage[True] else [])


class _Spent(Document):
    """What is read of the result that a teacher's training left."""

    model_config = ConfigDict(extra="ignore")

    seconds: Annotated[float, Field(ge=0)]


def training_seconds(recipe: Recipe, splits: Splits, store: AnyStore) -> float | None:
    """What training the teacher took, where the recipe trained it and it left its result beside this store; of an
    ensemble the members that it trained, if it trained any."""
    took = [_took(teacher_of(recipe, splits, member), store.uri) for member in range(len(recipe.teacher.each))]
    known = [seconds for seconds in took if seconds is not None]
    return sum(known) if known else None


def _took(trained: Trained | None, store: str) -> float | None:
    folder = None if trained is None else open_root(trained.uri(open_root(store).parent.uri)).local_path("")
    if folder is None:
        return None
    # A footnote of the balance, of a file that the run does not own: whatever is wrong with it ends no run.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, DamagedError, MachineError):
        return load(folder / "result.json", _Spent, next="").seconds
    return None


def tidy(base: CohortJob) -> None:
    """Remove what only a running fleet needs. The attempts stay, for late workers of theirs."""
    for path in Path(base.control).glob("progress-*.json"):
        path.unlink()
    shutil.rmtree(Path(base.control) / "ray", ignore_errors=True)
    for log in Path(base.logs).glob("cohort-*.log"):
        if log.stat().st_size == 0:
            log.unlink()


def tell_failures(fleet: FleetDocument, base: CohortJob, console: Console) -> None:
    """Name the log of every student that did not come to its end."""
    for student in fleet.students:
        if student.state != "done":
            log = Path(base.logs) / f"{student.name}.log"
            tell(console, f"{student.name} {student.state}: {student.reason}; log: {log}")


@contextlib.contextmanager
def telling_damage(base: CohortJob, students: list[recipes.StudentSpec], console: Console) -> Iterator[None]:
    """Name what is found damaged meanwhile: checkpoints, in whose place the one before was taken; caches, made anew."""

    def aside() -> dict[Path, tuple[str, int]]:
        folders = {spec.name: Path(base.root) / spec.name / "checkpoints" for spec in students}
        found = ((path, name) for name, folder in folders.items() for path in sorted(folder.glob(f"*{DAMAGED}")))
        return {path: (name, path.stat().st_mtime_ns) for path, name in found}

    before, lines = aside(), len(renewals(base))
    try:
        yield
    finally:
        for line in renewals(base)[lines:]:
            tell(console, f"warning: {line}")
        for path, (name, _) in sorted(aside().items() - before.items()):
            tell(console, f"warning: a checkpoint of {name} was damaged, the one before it was taken; it is {path}")


def describe_teacher(
    train: AnyStore,
    test: AnyStore | None,
    rows: Rows,
    trusted: Trusted,
    own: recipes.CustomMetric | None = None,
    text: recipes.Text | None = None,
) -> FleetTeacher:
    """The teacher's row of the table, from its stored logits of the test rows: it is not run again.

    Args:
        test: None where a teacher is a store, and there is none of the test rows.
        own: a metric of the user's own, measured beside the others.
        text: of language models, how text becomes tokens.
    """
    described = [_described(store, trusted) for store in members_of(train)]
    labels_of, counts = [label for label, _ in described], [count for _, count in described]
    parameters = None if None in counts else sum(count or 0 for count in counts)
    members = [
        FleetMember(model=label, parameters=count, store=store.uri, fingerprint=store.teacher, share=share)
        for (label, count), store, share in zip(described, members_of(train), _shares(train), strict=True)
    ]
    metrics = None
    if rows.task == "language_model":
        metrics = _of_language(test, rows, text)
    elif test is not None:
        labels = torch.from_numpy(rows.all_labels())
        measured = measure(rows.task, stored_predictions(test, rows), labels, rows.classes)
        if own is not None:
            measured["custom"] = own_measure(own, torch.from_numpy(test.rows(0, 0, len(rows))), labels)
        metrics = Metrics(**measured)
    model = labels_of[0] if len(members) == 1 else f"mean of {', '.join(labels_of)}"
    teacher = FleetTeacher(model=model, parameters=parameters, test=metrics, fingerprint=train.teacher)
    return teacher if len(members) == 1 else teacher.model_copy(update={"members": members})


def _of_language(test: AnyStore | None, rows: Rows, text: recipes.Text | None) -> Metrics | None:
    """What a language model's teacher says of the test rows; bits for each byte where its tokenizer is here."""
    if not isinstance(test, LogitStore):
        return None
    found = teacher_metrics(test, rows, bytes_of_tokens(text, rows))
    return None if found is None else Metrics(**found)


def _shares(store: AnyStore) -> tuple[float, ...]:
    return store.shares if isinstance(store, MeanStore) else (1.0,)


def _described(store: LogitStore, trusted: Trusted) -> tuple[str, int | None]:
    """The label of a teacher's architecture, and the number of its weights; None where there is no model."""
    if (spec := store.manifest.teacher.get("spec")) is None:
        return "imported logits", None
    card = ModelCard.model_validate(spec)
    recipes.trust(card.model, trusted.seen_from(f"the store {store.uri}"))
    # It is built below to count its weights, and what fits no memory would take the driver with it.
    check_memory(card)
    return card.model.label, num_parameters(build(card, seed=0))


def describe_assistant(
    stores: Mapping[str, AnyStore],
    teacher_test: AnyStore | None,
    rows: Rows,
    trusted: Trusted,
    own: recipes.CustomMetric | None = None,
    text: recipes.Text | None = None,
) -> FleetAssistant:
    """An assistant's row: as the teacher's, with its agreement with the teacher, and the store of its logits."""
    agreement, test = None, stores["test"]
    if rows.task == "language_model" and isinstance(teacher_test, LogitStore) and isinstance(test, LogitStore):
        agreement = agreement_of(test, teacher_test)
    if rows.task == "classification" and teacher_test is not None:
        ours, theirs = (stored_predictions(store, rows) for store in (test, teacher_test))
        agreement = float((ours == theirs).double().mean())
    described = dict(describe_teacher(stores["train"], test, rows, trusted, own, text))
    return FleetAssistant(**described, agreement=agreement, store=stores["train"].uri)
