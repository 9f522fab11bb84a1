"""A run's folder: who holds it, what it was made from, and what an earlier command left there."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base import places
from akd_dist.base.errors import DamagedError, RecipeError, RefusedError
from akd_dist.base.fence import take_over
from akd_dist.base.files import canonical_json, read_json, replace
from akd_dist.base.locks import file_lock, refuse_held
from akd_dist.data.rows import SPLITS, Rows, Splits, first_difference
from akd_dist.distill import hooks
from akd_dist.distill.cohort import wait_for_lock
from akd_dist.distill.delivery import fail_from_outside
from akd_dist.distill.job import ZOMBIE_SECONDS, CohortJob, stop_attempts
from akd_dist.documents.damage import load
from akd_dist.documents.fleet import FleetDocument, RunIdentity
from akd_dist.jobs.growth import Growth
from akd_dist.jobs.planning.models import CachedModel
from akd_dist.jobs.planning.plan import last_attempt
from akd_dist.models.build import by_content
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.reporting.results import read_fleet
from akd_dist.tracking.progress import tell

DIFFERENCES_SHOWN = 12
_BESIDE = ("students", "taken_out", "history", "rows", "stacking")
"""What an identity holds that may differ between two commands of one run."""


@contextlib.contextmanager
def held(run: Path, *, wait: bool, console: Console, only_look: bool = False) -> Iterator[None]:
    """Hold the run's lock; somebody else's is waited for, or refused with its holder named.

    Args:
        only_look: refuse what is held, and hold nothing.
    """
    if only_look:
        if not wait:
            refuse_held(run / "lock", what=f"the run {run.name}")
        yield
        return
    note = f"process {os.getpid()} on {socket.gethostname()}"
    patience = None if wait else 0

    def waiting(holder: str) -> None:
        tell(console, f"waiting for {holder}")

    with file_lock(run / "lock", what=f"the run {run.name}", wait=patience, note=note, on_wait=waiting):
        yield


class LocalRun:
    """A run in a folder, as its driver has it; `RemoteRun` adds what one in object storage takes."""

    uri: str | None = None
    """The run, where it lies in object storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """What the driver works in: the run, or its copy here."""

    @property
    def local(self) -> Path | None:
        """The folder, where that is the run: it may be moved, together with what its recipe names."""
        return self.folder

    @property
    def names(self) -> dict[str, str]:
        """What the folder is called in documents and refusals, where that is not its path."""
        return {}

    def check(self) -> None:
        """Refuse a place where a run cannot lie, before anything expensive."""

    @contextlib.contextmanager
    def held(self, *, wait: bool, console: Console, only_look: bool = False) -> Iterator[None]:
        """Hold the run against other drivers; args as of the function `held`, which holds its folder.

        Raises:
            HeldError: somebody else drives the run.
        """
        with held(self.folder, wait=wait, console=console, only_look=only_look):
            yield

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """For the time of a block, have in the folder what workers elsewhere tell, and tell what the driver says."""
        yield

    def begin(self, attempt: int) -> None:
        """Begin an attempt before its first worker starts."""

    def check_current(self) -> None:
        """Leave if another driver has gone on with the run."""

    def bring(self) -> None:
        """Have in the folder which students have ended, and what they left."""

    def give_up(self, spec: StudentSpec, job: CohortJob, reason: str) -> None:
        """End a student as failed whose workers die again and again.

        Its last worker may be alive although it counts as dead: from here on it can publish nothing.
        """
        writer = take_over(Path(job.root) / spec.name / "checkpoints", job.attempt, f"the student {spec.name}")
        fail_from_outside(spec, Path(job.root) / spec.name, reason, job.attempt, writer)

    def publish(self) -> None:
        """Let others see the documents that have changed."""

    def withdraw(self, name: str) -> None:
        """Remove what others see of a document that holds no longer, and lies in the folder no more."""

    def start_over(self) -> None:
        """Have nothing count of an earlier run, and remove it."""
        forget(self.folder)


def run_identity(recipe: Recipe, splits: Splits, taught: Sequence[str] = ()) -> dict[str, Any]:
    """What makes two runs the same, as JSON: the resolved recipe without placement and paths, and what these lead to.

    Args:
        taught: the fingerprints of the teacher and of its assistants; unless all are known, they are left out.
    """
    rows: dict[str, Rows] = {split: getattr(splits, split) for split in SPLITS}
    document = recipe.identity() | {"dataset": {split: rows[split].fingerprint for split in SPLITS}}
    # Not compared, but by it a difference is found: the fingerprints say only that there is one.
    document["rows"] = {split: rows[split].describe() for split in SPLITS}
    for spec in recipe.students:
        document["students"][spec.name]["model"] = by_content(spec.model)
        document["students"][spec.name]["objective"] |= hooks.objective_by_content(spec.objective)
    if recipe.data.own_metric is not None:
        document["data"]["metric"] = hooks.metric_by_content(recipe.data.own_metric)
    node = document["teacher"]
    if recipe.teacher.model is not None:
        node["model"] = by_content(recipe.teacher.model)
    for number, member in enumerate(recipe.teacher.members or ()):
        if member.model is not None:
            node["members"][number]["model"] = by_content(member.model)
    for assistant in recipe.teacher.chain:
        node = node["assistant"]
        node["model"] = by_content(assistant.model)
        node["objective"] |= hooks.objective_by_content(assistant.objective)
    if len(taught) > len(recipe.teacher.chain):
        teacher, *assistants = taught
        document["teacher"] |= {"fingerprint": teacher, "assistant_fingerprints": assistants}
    plain: dict[str, Any] = json.loads(canonical_json(document))
    return plain


def check_same_run(run: Path, recipe: Recipe, identity: dict[str, Any]) -> RunIdentity | None:
    """Refuse to continue a run of this name that was made from other data, another teacher or other settings.

    Students are not looked at: see `growth.settle`.

    Returns:
        What the run was made from; None of one that begins.

    Raises:
        RefusedError: the data are others; names the first block of rows that differs.
        RecipeError: the recipe or the teacher is another one.
        DamagedError: what says how the run was made is not whole; names the field.
    """
    if not (run / "identity.json").exists():
        return None
    advice = (
        "--fresh removes the run and starts over; if you know that the recipe is the same, remove that file to go on"
    )
    made = load(run / "identity.json", RunIdentity, expected="what the run wrote there when it began", next=advice)
    saved = made.plain()
    # Where a model of the chain is still to be trained, its fingerprint is not known: it is compared once it is.
    if "fingerprint" not in identity["teacher"]:
        for key in ("fingerprint", "assistant_fingerprints"):
            saved["teacher"].pop(key, None)
    before, now = saved.pop("rows", {}), identity["rows"]
    saved, given = ({key: one[key] for key in one if key not in _BESIDE} for one in (saved, identity))
    if saved.get("teacher", {}).get("assistant") is None:  # nobody has learned from one yet
        saved["teacher"], given["teacher"] = (_without_assistants(one["teacher"]) for one in (saved, given))
    if saved != given:
        differing = [
            f"the {split} rows: {first_difference(now[split], before[split])}"
            for split in SPLITS
            if split in before and before[split]["fingerprint"] != now[split]["fingerprint"]
        ]
        kind = RefusedError if saved["dataset"] != given["dataset"] else RecipeError
        raise kind(
            f"the run {recipe.name} in {run} was made from another recipe, data or teacher",
            got="\n       ".join(first_of([*differing, *recipes.differences(saved, given)], DIFFERENCES_SHOWN)),
            expected="those that the run was started with; students may come and go",
            next=f"give this one another name: --set name={recipe.name}-2 "
            "(or --fresh to start over, which removes what is there)",
        )
    return made


def _without_assistants(teacher: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in teacher.items() if key not in ("assistant", "assistant_fingerprints")}


def first_of(texts: list[str], count: int) -> list[str]:
    """The first texts of a list, and how many more there are."""
    return texts if len(texts) <= count else [*texts[:count], f"and {len(texts) - count} more"]


def begin_run(run: Path, recipe: Recipe, identity: dict[str, Any], *, moves: bool = True) -> None:
    """Write down what the run is, before its first step; results of an earlier attempt no longer hold.

    Args:
        moves: whether it may be moved together with what its recipe names; not out of object storage.
    """
    replace(run / "identity.json", canonical_json(identity))
    replace(run / "recipe.yaml", recipe.to_yaml(run if moves else None).encode())
    (run / "fleet.json").unlink(missing_ok=True)


def saved_results(run: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The fleet.json of a run whose students have all ended; None where it, or the report, has to be made again."""
    if read_json(run / "fleet.json") is None or not (run / "report.html").exists():
        return None
    if not (run / "identity.json").exists():  # removed by hand, as a refusal of a damaged one says
        replace(run / "identity.json", canonical_json(identity))
    try:
        saved = read_fleet(run).plain()
    except DamagedError:  # as one that was cut by a loss of power: the students have all that it said
        return None
    # Others, where students came back or were taken out, and there is nothing to train.
    return saved if {student["name"] for student in saved["students"]} == set(identity["students"]) else None


def with_stores_found(fleet: dict[str, Any], models: Sequence[CachedModel]) -> dict[str, Any]:
    """Results whose stores are named where they are now, for a run that was moved without them, or they without it."""
    now = {store.id: store.uri for model in models for store in model.opened.values()}
    return {**places.each(fleet, lambda place: now.get(Path(place).name, place)), "run": fleet["run"]}


def as_told_now(fleet: dict[str, Any], growth: Growth) -> dict[str, Any]:
    """Saved results with what this command's recipe says of the students that they leave out."""
    kept = {key: value for key, value in fleet.items() if key not in ("taken_out", "refused", "renamed")}
    return FleetDocument.model_validate(kept | growth.told).plain()


def forget(run: Path) -> None:
    """Remove an earlier run, once its workers had time to leave.

    Students go first, in one step, and the identity last: killed in between, the run cannot pass for another one's. The
    lock and the attempts stay, so that late workers of earlier attempts are still told to leave.
    """
    stop_attempts(run / "control", last_attempt(run))
    until = time.monotonic() + ZOMBIE_SECONDS
    for lock in run.glob("students/*/checkpoints/lock"):
        with contextlib.ExitStack() as locks:  # one that does not leave is shut out: its folder goes
            wait_for_lock(lock, f"the student {lock.parent.parent.name}", until, locks)
    if (run / "students").exists():
        (run / "students").rename(run / f"old-{secrets.token_hex(6)}")
    kept = ("lock", "control", "identity.json")
    for path in [path for path in run.iterdir() if path.name not in kept]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (run / "identity.json").unlink(missing_ok=True)
