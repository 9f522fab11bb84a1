"""A run that grows: the students that a recipe has now beside those that the run has, each looked at for itself.

New ones are trained in the run, those that it has are left as they are, and those that the recipe has no more stay on
disk. One that has changed is refused, and the others go on without it. Students are found again by what they are: a
grid that varies one key more gives them other names.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from akd_dist import recipe as recipes
from akd_dist.base.errors import RecipeError
from akd_dist.base.files import canonical_json
from akd_dist.base.formatting import counted, some_of
from akd_dist.documents.fleet import RefusedStudent, RunChange, RunIdentity
from akd_dist.recipe import Recipe
from akd_dist.storage.run_copy import is_copy

Students = Mapping[str, dict[str, Any]]
"""Students as a run's identity has them, by name."""
LENGTHS = ("epochs", "stage1_epochs", "stage2_epochs")
ADVICE = "give it another name, or train it in another run"
_OF_A_SEED = re.compile(r"(?P<stem>.+)-s[0-9]+")


@dataclass(frozen=True)
class Growth:
    """What becomes of the students of a run, by name; empty for a run that begins."""

    kept: list[str] = field(default_factory=list)
    """Those that the run has as the recipe says."""
    added: list[str] = field(default_factory=list)
    """Those that it has not yet."""
    taken_out: list[str] = field(default_factory=list)
    """Those that it has, and the recipe has no more: they stay on disk, and no table has them."""
    refused: list[RefusedStudent] = field(default_factory=list)
    """Those that it has otherwise: they are left as they are, and out of the tables as well."""
    renamed: dict[str, str] = field(default_factory=dict)
    """What the recipe calls students that the run has by another name -> that name."""
    again: dict[str, str] = field(default_factory=dict)
    """New ones that differ from one that the run has in the lengths of their training -> that one, and the lengths."""
    out: Students = field(default_factory=dict)
    """All that the run has and this recipe does not train, as they were when they were in it."""
    history: list[RunChange] = field(default_factory=list)
    """When students came and went, this time included."""

    @property
    def told(self) -> dict[str, Any]:
        """What documents say of it; nothing where there is nothing to say."""
        said = {"taken_out": self.taken_out, "refused": self.refused, "renamed": self.renamed}
        return {key: value for key, value in said.items() if value}

    def into(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity of the run with what it keeps beside its students."""
        kept = {"taken_out": dict(self.out), "history": [change.plain() for change in self.history]}
        return identity | {key: value for key, value in kept.items() if value}

    @property
    def lines(self) -> list[str]:
        """What people are told, a line each; of a run that is as the recipe says, nothing."""
        lines = [f"{counted(len(self.added), 'student')} new, {len(self.kept)} kept"] if self.added else []
        if self.taken_out:
            lines.append(f"taken out, and left on disk: {some_of(self.taken_out)}")
        if self.renamed:
            pairs = [f"{new} is {old}" for new, old in self.renamed.items()]
            lines.append(f"by the names that students have in this run: {some_of(pairs, most=3)}")
        if self.again:
            pairs = [f"{name}, like {other}" for name, other in self.again.items()]
            lines.append(f"trained from their start, since their schedules are others: {some_of(pairs, most=3)}")
        return lines + [f"refused: {one.told}: {ADVICE}" for one in self.refused]


def settle(
    run: Path, saved: RunIdentity, recipe: Recipe, students: Students, *, search: bool = False
) -> tuple[Recipe, Growth]:
    """The recipe as the run can have it: its students by their names there, without those that have changed.

    Args:
        run: its folder, or the copy of it.
        saved: what it was made from.
        students: those of the recipe, as its identity has them.
        search: whether they are the trials of a search, which is that of the run as a whole or not at all.

    Raises:
        RecipeError: each student of the recipe has changed; of a search, any has. Names how. Or a new one's name is one
            that the run has but for the case of its letters.
    """
    before: dict[str, dict[str, Any]] = saved.taken_out | saved.students
    names = names_in_run(saved.students | before, students)  # those of its tables before those that were taken out
    _check_case(run, before, names)
    now = {names[name]: student | {"name": names[name]} for name, student in students.items()}
    changed = {
        name: recipes.differences(before[name], student)
        for name, student in now.items()
        if name in before and before[name] != student and has_begun(run, name)
    }
    refused = [RefusedStudent(name=name, differences=told) for name, told in changed.items()]
    if search and (refused or any(given != name for given, name in names.items())):
        raise another_search(run, refused, names)
    if len(refused) == len(now):
        raise refusal(run, recipe.name, refused)
    specs = [spec.model_copy(update={"name": names[spec.name]}) for spec in recipe.students]
    left = [spec for spec in specs if spec.name not in changed]
    current = [spec.name for spec in left]
    out = {name: student for name, student in before.items() if name not in current}
    added = [name for name in current if before.get(name) != now[name]]
    growth = Growth(
        kept=[name for name in current if before.get(name) == now[name]],
        added=added,
        taken_out=[name for name in out if name not in changed],
        refused=refused,
        renamed={given: name for given, name in names.items() if given != name and name in current},
        again=_other_lengths({name: now[name] for name in added}, before),
        out=out,
        history=_history(saved, current),
    )
    return recipe.model_copy(update={"students": left}), growth


def names_in_run(before: Students, now: Students) -> dict[str, str]:
    """What the run calls each student of the recipe: a student of another name that is the same goes by its old one.

    Further seeds of such students are named like these, so that the run has one name for all of them.
    """
    known: dict[bytes, list[str]] = {}
    for name, student in before.items():
        if name not in now:
            known.setdefault(_content(student), []).append(name)
    names = {name: name for name in now}
    for name, student in now.items():
        # An old name serves one student: of several that are equal, the first of the recipe.
        if name not in before and (alike := known.get(_content(student))):
            names[name] = alike.pop(0)
    stems = {stem: _stem(name) for given, name in names.items() if given != name and (stem := _stem(given))}
    taken = {*before, *names.values()}
    for name, student in now.items():
        if name in before or names[name] != name or (stem := stems.get(_stem(name) or "")) is None:
            continue
        if (like := f"{stem}-s{student['seed']}") not in taken:
            names[name] = like
            taken.add(like)
    return names


def _check_case(run: Path, before: Students, names: Mapping[str, str]) -> None:
    """Refuse names that are one folder with another student's where file systems do not tell cases apart."""
    known = {name.casefold(): name for name in before}
    alike = {name: known[name.casefold()] for name in names.values() if name not in before and name.casefold() in known}
    if alike:
        raise RecipeError(
            f"the run in {run} has students whose names differ from new ones by the case of letters alone",
            got=some_of([f"{name}, and the run has {other}" for name, other in alike.items()], most=3),
            expected="names that are different folders on every file system",
            next="write these names as the run has them, or give the students others",
        )


def _content(student: Mapping[str, Any]) -> bytes:
    return canonical_json({key: value for key, value in student.items() if key != "name"})


def _stem(name: str) -> str | None:
    found = _OF_A_SEED.fullmatch(name)
    return None if found is None else found["stem"]


def _other_lengths(added: Students, before: Students) -> dict[str, str]:
    """New students that one could think go on from one that the run has, which was trained for longer or less.

    Where stage I is of the same length, they do, from what that one left of its stage I: they are not among these.

    Returns:
        Name of the new one -> name of the other, and how their lengths differ.
    """
    alike: dict[bytes, list[str]] = {}
    for name, student in before.items():
        alike.setdefault(_content(_without_lengths(student)), []).append(name)
    found: dict[str, str] = {}
    for name, student in added.items():
        for other in alike.get(_content(_without_lengths(student)), []):
            ours, theirs = student["objective"], before[other]["objective"]
            differing = [key for key in LENGTHS if ours.get(key) != theirs.get(key)]
            if differing not in ([], ["stage2_epochs"]):
                told = ", ".join(f"{key}: {theirs[key]} -> {ours[key]}" for key in differing)
                found.setdefault(name, f"{other} but for {told}")
    return found


def _without_lengths(student: Mapping[str, Any]) -> dict[str, Any]:
    objective = {key: value for key, value in student["objective"].items() if key not in LENGTHS}
    return {**student, "objective": objective}


def has_begun(run: Path, name: str) -> bool:
    """Whether a student of the run may have been trained: one that never was has nothing that would not fit.

    What lies in object storage is not listed here in full, so there every student counts as begun.
    """
    return is_copy(run) or (run / "students" / name).exists()


def refusal(run: Path, name: str, refused: Sequence[RefusedStudent]) -> RecipeError:
    """Why there is nothing to train: every student of the recipe has changed; those that changed alike share a line."""
    alike: dict[str, list[str]] = {}
    for one in refused:
        alike.setdefault("; ".join(one.differences), []).append(one.name)
    return RecipeError(
        f"the run {name} in {run} has these students, and was given others of the same names",
        got="\n       ".join(f"students {some_of(names)}: {told}" for told, names in alike.items()),
        expected="students as the run has them, or others beside them: both values in a block's grid, for example",
        next=f"give them names of their own, or this run: --set name={name}-2 "
        "(or --fresh to start over, which removes what is there)",
    )


def another_search(run: Path, refused: Sequence[RefusedStudent], names: Mapping[str, str]) -> RecipeError:
    """Why a search cannot go on in a run: its trials are others than those that lie there."""
    told = [one.told for one in refused] + [f"{new} is {old}" for new, old in names.items() if new != old]
    return RecipeError(
        f"the run in {run} holds another search",
        got="\n       ".join(told[:6]),
        expected="the search that it was begun with, or more trials of it",
        next="give this one another name: --set name=... (or --fresh to start over, which removes what is there)",
    )


def _history(saved: RunIdentity, current: Sequence[str]) -> list[RunChange]:
    """The changes so far, and this one if it is one."""
    added = [name for name in current if name not in saved.students]
    taken_out = [name for name in saved.students if name not in current]
    if not added and not taken_out:
        return saved.history
    return [*saved.history, RunChange(at=round(time.time(), 3), added=added, taken_out=taken_out)]
