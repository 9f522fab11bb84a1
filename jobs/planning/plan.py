"""A fleet before it is trained: its plan as typed objects, and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from akd_dist.base.formatting import counted, duration, house_table, size

if TYPE_CHECKING:
    from rich.table import Table

Standing = Literal["new", "resumes", "ended"]


@dataclass(frozen=True)
class Alternative:
    """A number of cohorts that the planner tried."""

    cohorts: int
    """So many."""
    seconds: float
    """When the fleet would end, starts included."""


@dataclass(frozen=True)
class PlannedStudent:
    """A student, and what is before it."""

    name: str
    """Its folder under students/."""
    model: str
    """Label of its architecture."""
    objective: str
    """Kind of its objective."""
    parameters: int
    """Number of its weights."""
    standing: Standing
    """Whether it starts, resumes from a checkpoint, or has ended already."""
    rides: str | None
    """Whose stage I it goes on from; none if it computes its own."""
    steps: int
    """Steps that it still computes."""
    seconds: float | None
    """What it adds to its cohort; none if its probe failed."""


@dataclass(frozen=True)
class PlannedCohort:
    """Students that train in lockstep, and what that takes."""

    students: tuple[PlannedStudent, ...]
    """Who they are."""
    why: str
    """What they share."""
    waits: str | None
    """What it waits for, unless it starts at once."""
    workers: int
    """Data-parallel workers."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    memory: int
    """Bytes of main memory of each worker, as estimated; memory maps that the whole node shares are not in it."""
    steps: int
    """Steps of the stream."""
    bytes_streamed: int
    """Inputs, labels and logits that the stream reads, once for all students."""
    begins: float
    """Seconds from the first start."""
    ends: float
    """Seconds from the first start."""


@dataclass(frozen=True)
class Plan:
    """What training a fleet would do."""

    run: str
    """The run's folder."""
    device: str
    """Where it computes."""
    teacher: str
    """What has to be done before students can start."""
    cache_bytes: int
    """Logits that are still to be computed."""
    nodes: int
    """Nodes of the cluster."""
    cpus: float
    """Their CPUs."""
    gpus: float
    """Their GPUs."""
    memory: int | None
    """Main memory that they give to workers, in bytes; none where it is not known."""
    why: str
    """Why there are so many cohorts: what fewer and what more of them would come to."""
    cohorts: tuple[PlannedCohort, ...]
    """In the order in which they queue."""
    ended: tuple[PlannedStudent, ...]
    """Students that need no more training."""
    checkpoint_bytes: int
    """The most that lies there of checkpoints at a time."""
    model_bytes: int
    """What is delivered."""
    free_bytes: int
    """Free under the run root."""
    seconds: float
    """From the first start to the end of the last cohort; without the teacher and its caching."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        plain = asdict(self)
        plain["cohorts"] = [cohort | {"students": list(cohort["students"])} for cohort in plain["cohorts"]]
        return {"dry_run": True} | plain | {"ended": list(plain["ended"])}


def plan_table(plan: dict[str, Any]) -> Table:
    """The cohorts of a plan's document and their students, a line each."""
    table = house_table("what training would do")
    table.add_column("student", overflow="fold")
    for column in ("parameters", "steps", "takes", "state"):
        table.add_column(column, no_wrap=True, justify="left" if column == "state" else "right")
    for number, cohort in enumerate(plan["cohorts"], 1):
        for student in cohort["students"]:
            takes = "unknown" if student["seconds"] is None else duration(student["seconds"])
            name = student["name"] + (f"\n  stage I of {student['rides']}" if student["rides"] else "")
            figures = (f"{student['parameters']:,}", f"{student['steps']:,}", takes)
            table.add_row(name, *figures, student["standing"])
        took = duration(cohort["ends"] - cohort["begins"])
        table.add_row(f"= cohort {number}", "", f"{cohort['steps']:,}", took, "", end_section=True)
    for student in plan["ended"]:
        table.add_row(student["name"], f"{student['parameters']:,}", "0", "", "ended")
    return table


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a table does not say: the reasons, and the sums."""
    cohorts = [f"cohort {number}: {_about(cohort)}" for number, cohort in enumerate(plan["cohorts"], 1)]
    waits = [
        f"cohort {number} waits: {cohort['waits']}"
        for number, cohort in enumerate(plan["cohorts"], 1)
        if cohort["waits"]
    ]
    unknown = [one["name"] for cohort in plan["cohorts"] for one in cohort["students"] if one["seconds"] is None]
    memory = "" if plan["memory"] is None else f", {size(plan['memory'])} of memory for workers"
    gpus = f", {plan['gpus']:g} GPU{'' if plan['gpus'] == 1 else 's'}" if plan["gpus"] else ""
    return [
        f"teacher  {plan['teacher']}",
        *cohorts,
        plan["why"],
        *waits,
        f"cluster  {counted(plan['nodes'], 'node')} with {plan['cpus']:g} CPUs{gpus}{memory}",
        f"disk     {size(plan['checkpoint_bytes'])} of checkpoints and {size(plan['model_bytes'])} of models at most, "
        f"{size(plan['free_bytes'])} free",
        f"time     {_how_long(plan, unknown)}; nothing was computed",
    ]


def _about(cohort: dict[str, Any]) -> str:
    each = f"{cohort['cpus']:g} CPU" + (f" + {cohort['gpus']:g} GPU" if cohort["gpus"] else "")
    when = f"{duration(cohort['begins'])} to {duration(cohort['ends'])}"
    where = f"{cohort['workers']} x ({each}, {size(cohort['memory'])})"
    return f"{when} on {where}, reads {size(cohort['bytes_streamed'])}; {cohort['why']}"


def _how_long(plan: dict[str, Any], unknown: list[str]) -> str:
    if not unknown:
        return f"about {duration(plan['seconds'])} from the first start, by a short probe"
    whose = f"{unknown[0]} and {len(unknown) - 1:,} more" if unknown[1:] else unknown[0]
    return f"more than {duration(plan['seconds'])} from the first start: {whose} could not be probed"
