"""What a dry run says, as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from akd_dist.base.formatting import counted, duration, house_table, size, some_of
from akd_dist.cli.show import print_table, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from akd_dist.documents.cache import PlanDocument
    from akd_dist.documents.encodings import EncodingsDocument
    from akd_dist.documents.plan import FleetPlanDocument, PlannedCohort


def print_plan(plan: PlanDocument) -> None:
    """What caching would compute, as a table."""
    table = table_of("split", "rows", "views", "shards to compute", "size", title="what caching would compute")
    models = [("", plan.splits), *((f"{one.model}, ", one.splits) for one in plan.assistants)]
    for split, part in [(whose + split, part) for whose, splits in models for split, part in splits.items()]:
        shards = "none: a hit" if part.hit else f"{part.shards:,}"
        rows = f"{part.rows:,}" + (f", {part.unlabelled:,} without labels" if part.unlabelled else "")
        table.add_row(split, rows, str(part.views), shards, size(part.bytes))
    print_table(table)
    for check in plan.teacher_checks:
        click.echo(check.line)
    free = "unknown" if plan.free is None else size(plan.free)
    if plan.waits_for is not None:
        click.echo(f"waits for nodes: {plan.waits_for}")
    click.echo(f"needs {size(plan.bytes)} under {plan.store_root}, free {free}; nothing was stored")


def print_encodings(plan: EncodingsDocument) -> None:
    """What encodings take, and how well they describe the teacher, each a table; dominated ones are grey."""
    takes, describes = table_of("encoding", title="what encodings take"), table_of("encoding", title="what they lose")
    for figure in ("B/target", "in all", "top 1", "unexplained"):
        takes.add_column(figure, no_wrap=True, justify="right")
    for what in ("KL at", "error"):
        for at, temperature in enumerate(plan.temperatures):
            describes.add_column(f"{'' if at else what}\n{temperature:.3g}", no_wrap=True, justify="right")
    for one in plan.encodings:
        errors = [at.unigram_error if at.unigram_hidden_error is None else at.unigram_hidden_error for at in one.at]
        marks = " (the recipe's)" * one.own + " (chosen)" * (one.name == plan.chosen)
        sizes = (f"{one.bytes_per_target:,}", size(one.bytes), f"{one.agreement:.3f}", _figure(one.unexplained))
        style = "bright_black" if one.dominated else None
        takes.add_row(one.name + marks, *sizes, style=style)
        describes.add_row(one.name, *map(_figure, [*(at.kl for at in one.at), *errors]), style=style)
    print_table(takes)
    print_table(describes)
    click.echo(
        f"on {plan.targets_measured:,} targets of {plan.rows_measured:,} train rows, of {plan.targets:,} targets in "
        "all, at each temperature; KL in nats; error: of the gradient at a student that says the mean, over that "
        "gradient; what is grey is no better than something smaller"
    )
    for warning in plan.warnings:
        click.echo(warning)
    if plan.line is not None:
        click.echo(f"within {size(plan.budget or 0)}: {plan.chosen}; put under `cache:`\n  {plan.line}")


def _figure(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}"


def print_fleet_plan(plan: FleetPlanDocument) -> None:
    """What training would do, as a table, and why."""
    print_table(plan_table(plan))
    for line in plan_lines(plan):
        click.echo(line)


def plan_table(plan: FleetPlanDocument) -> Table:
    """The cohorts of a plan's document and their students, a line each."""
    table = house_table("what training would do")
    table.add_column("student", overflow="fold")
    for column in ("parameters", "steps", "takes", "state"):
        table.add_column(column, no_wrap=True, justify="left" if column == "state" else "right")
    for number, cohort in enumerate(plan.cohorts, 1):
        for student in cohort.students:
            takes = "unknown" if student.seconds is None else duration(student.seconds)
            name = student.name + (f"\n  stage I of {student.rides}" if student.rides else "")
            figures = (f"{student.parameters:,}", f"{student.steps:,}", takes)
            table.add_row(name, *figures, student.standing)
        took = duration(cohort.ends - cohort.begins)
        table.add_row(f"= cohort {number}", "", f"{cohort.steps:,}", took, "", end_section=True)
    for student in plan.ended:
        table.add_row(student.name, f"{student.parameters:,}", "0", "", "ended")
    return table


def plan_lines(plan: FleetPlanDocument) -> list[str]:
    """What a table does not say: the reasons, and the sums."""
    cohorts = [f"cohort {number}: {_about(cohort)}" for number, cohort in enumerate(plan.cohorts, 1)]
    waits = [f"cohort {number} waits: {cohort.waits}" for number, cohort in enumerate(plan.cohorts, 1) if cohort.waits]
    unknown = [one.name for cohort in plan.cohorts for one in cohort.students if one.seconds is None]
    memory = "" if plan.memory is None else f", {size(plan.memory)} of memory for workers"
    gpus = f", {plan.gpus:g} GPU{'' if plan.gpus == 1 else 's'}" if plan.gpus else ""
    return [
        f"teacher  {plan.teacher}",
        *(f"labels   {check.line}" for check in plan.teacher_checks),
        *cohorts,
        plan.why,
        *waits,
        *([f"shuffle  in windows of {plan.window:,} rows: {plan.shuffle}"] if plan.window else []),
        f"cluster  {counted(plan.nodes, 'node')} with {plan.cpus:g} CPUs{gpus}{memory}{_on_what(plan)}",
        *([] if plan.waits_for is None else [f"nodes    it waits for some: {plan.waits_for}"]),
        f"disk     {size(plan.checkpoint_bytes)} of checkpoints and {size(plan.model_bytes)} of models at most, "
        f"{size(plan.free_bytes)} free",
        f"places   stores in {plan.store_root}, the run in {plan.run}",
        *_removed(plan),
        *_growing(plan),
        f"time     {_how_long(plan, unknown)}, after the teacher; nothing was trained or stored",
    ]


def _on_what(plan: FleetPlanDocument) -> str:
    """What is said where Ray has nothing to do."""
    return "; in processes of this machine, as Ray's start would not pay" if plan.executor == "processes" else ""


def _removed(plan: FleetPlanDocument) -> list[str]:
    """The line that says what `--fresh` would remove, if there is anything."""
    if plan.removes is None:
        return []
    students = counted(plan.removes.students, "trained student")
    return [f"removes  {students} and everything else in {plan.run}, {size(plan.removes.bytes)}"]


def _growing(plan: FleetPlanDocument) -> list[str]:
    """Lines for the students that the run has, and would not train."""
    lines = [f"leaves   {some_of(plan.taken_out)} on disk, and out of the tables"] if plan.taken_out else []
    renamed = [f"{given} is {name}" for given, name in plan.renamed.items()]
    lines += [f"names    in this run: {some_of(renamed, most=3)}"] if renamed else []
    return lines + [f"refuses  {one.told}" for one in plan.refused]


def _about(cohort: PlannedCohort) -> str:
    each = f"{cohort.cpus:g} CPU" + (f" + {cohort.gpus:g} GPU" if cohort.gpus else "")
    when = f"{duration(cohort.begins)} to {duration(cohort.ends)}"
    where = f"{cohort.workers} x ({each}, {size(cohort.memory)})"
    return f"{when} on {where}, reads {size(cohort.bytes_streamed)}; {cohort.why}"


def _how_long(plan: FleetPlanDocument, unknown: list[str]) -> str:
    if not unknown:
        return f"about {duration(plan.seconds)} from the first start, by a short probe"
    whose = f"{unknown[0]} and {len(unknown) - 1:,} more" if unknown[1:] else unknown[0]
    return f"more than {duration(plan.seconds)} from the first start: {whose} could not be probed"
