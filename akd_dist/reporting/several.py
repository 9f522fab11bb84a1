"""Several runs together: whether they can be compared, what differs, and students of other seeds pooled.

Students are the same if their recipes are, seed and name apart, and the content of their data and of their teacher is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json
from akd_dist.base.formatting import HARD_LABELS, some_of
from akd_dist.documents.fleet import FleetStudent, FleetTeacher
from akd_dist.documents.report import PooledGroup, RunDifference
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import SAME, SeedGroup, estimate, in_order, over


def same_test_rows(runs: Iterable[Run]) -> bool | None:
    """Whether runs were measured on the same test rows, by fingerprint; None where one does not say."""
    found = [run.identity and run.identity.dataset.get("test") for run in runs]
    return None if None in found else len(set(found)) == 1


def check_comparable(runs: list[Run]) -> None:
    """Refuse runs whose primary metrics differ: no axis holds both.

    Raises:
        RefusedError: names two of them.
    """
    first = runs[0]
    for run in runs:
        if run.fleet.metric != first.fleet.metric:
            raise RefusedError(
                "these runs cannot be compared: they were measured by different metrics",
                got=f"{first.folder}: {first.fleet.metric}; {run.folder}: {run.fleet.metric}",
                expected="runs of one primary metric",
                next="report them one by one",
            )


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """Why numbers of these runs may not be comparable, a sentence each."""
    found = []
    match same_test_rows(runs):
        case False:
            found.append("These runs were measured on different test rows: their numbers are not of the same thing.")
        case None:
            found.append("A run does not say which test rows it was measured on, so they may differ.")
    if len({run.fleet.teacher.fingerprint for run in runs}) > 1:
        found.append("Their teachers differ.")
    return found


def differences_of_runs(runs: list[Run]) -> list[RunDifference]:
    """Every group of every run, with its difference to the same group of the first run."""
    firsts = {group.stem: group for group in runs[0].groups}
    return [
        RunDifference(
            run=run.place,
            name=group.stem,
            test=estimate(group.by_seed),
            over_first=None if run is runs[0] else over(group, firsts.get(group.stem)),
        )
        for run in runs
        for group in run.groups
    ]


def names_of(runs: list[Run]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where two share it."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


# --- seeds of several runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Students that differ in nothing but their seed, gathered from several runs."""

    group: SeedGroup
    """One of each seed."""
    runs: list[Run]
    """The runs that have some of them."""
    twice: list[int]
    """Seeds that several of the runs have."""
    differing: list[int]
    """Those of them whose results are not the same in all of the runs."""
    content: Mapping[str, Any] | None = None
    """What its students are but for the seed; None of a run that does not say."""

    @property
    def teacher(self) -> FleetTeacher | None:
        """Whom they learned from, or were compared with; None where the run does not describe it."""
        fleet, known = self.runs[0].fleet, self.group.students[0].teacher
        return next((one for one in (fleet.teacher, *fleet.assistants) if one.fingerprint == known), None)

    def document(self) -> PooledGroup:
        """As JSON has it."""
        group = self.group
        return PooledGroup(
            **group.described,
            teacher=self.teacher.model if self.teacher else None,
            teacher_fingerprint=group.students[0].teacher,
            runs=[run.place for run in self.runs],
            seeds=sorted(group.by_seed),
            twice=self.twice,
            differing=self.differing,
            test=estimate(group.by_seed),
            # With one teacher: students from scratch are pooled whoever that is.
            agreement=group.agreement if len({student.teacher for student in group.students}) == 1 else None,
        )


def pooled(runs: Sequence[Run]) -> list[Pool]:
    """The students of all runs, seeds gathered over them; each student and seed counts once.

    A run that does not say how it was made has its groups for itself.
    """
    found: dict[str, list[tuple[Run, FleetStudent]]] = {}
    groups: dict[str, SeedGroup] = {}
    contents: dict[str, dict[str, Any] | None] = {}
    for run in runs:
        for group in run.groups:
            for student in group.students:
                content = _content(run, student)
                key = f"{run.place} {group.stem}" if content is None else canonical_json(content).decode()
                groups.setdefault(key, group)
                contents[key] = content
                found.setdefault(key, []).append((run, student))
    pools = [_pool(groups[key], members, contents[key]) for key, members in found.items()]
    place = {id(group): at for at, group in enumerate(in_order([pool.group for pool in pools]))}
    return sorted(pools, key=lambda pool: place[id(pool.group)])


def _pool(
    like: SeedGroup, members: Sequence[tuple[Run, FleetStudent]], content: Mapping[str, Any] | None = None
) -> Pool:
    by_seed: dict[int, list[FleetStudent]] = {}
    for _, student in members:
        by_seed.setdefault(student.seed, []).append(student)
    counted = [next((one for one in alike if one.state == "done"), alike[0]) for _, alike in sorted(by_seed.items())]
    twice = {seed: alike for seed, alike in sorted(by_seed.items()) if len(alike) > 1}
    return Pool(
        SeedGroup(like.model, like.objective, like.tau_max, like.stem, like.metric, counted),
        list({run.place: run for run, _ in members}.values()),
        list(twice),
        [seed for seed, alike in twice.items() if _differ(alike, like.metric)],
        content,
    )


def _differ(alike: Sequence[FleetStudent], metric: str) -> bool:
    """Whether those that finished came to different results, although they should be the same."""
    scores = [one.test[metric] for one in alike if one.state == "done" and one.test]
    return bool(scores) and max(scores) - min(scores) > SAME


def _content(run: Run, student: FleetStudent) -> dict[str, Any] | None:
    """What makes a student what it is but for its seed; None of a run that does not say."""
    known = run.identity and run.identity.students.get(student.name)
    if run.identity is None or not known:
        return None
    of_run = {key: value for key, value in (run.identity.model_extra or {}).items() if key != "name"}
    plain = {key: value for key, value in known.items() if key not in ("name", "seed")}
    # From scratch it is the same one whoever the teacher is, and however that one's logits are stored.
    objective = known["objective"]
    if objective.get("kind") == HARD_LABELS or objective.get("learns_from") == "labels":
        of_run.pop("cache", None)
        return of_run | {"dataset": run.identity.dataset, "student": plain}
    return of_run | {"dataset": run.identity.dataset, "teacher": student.teacher, "student": plain}


def told_apart(pools: Sequence[Pool]) -> dict[str, list[str]]:
    """Further columns, heading -> cells, where students of one name are not the same: whose they are, in which runs."""
    families: dict[str, list[Pool]] = {}
    for pool in pools:
        families.setdefault(pool.group.stem, []).append(pool)
    if len(families) == len(pools):
        return {}
    columns = {}
    if any(len({pool.group.students[0].teacher for pool in family}) > 1 for family in families.values()):
        columns["teacher"] = [_teacher_of(pool, pools) for pool in pools]
    names = {run.place: name for run, name in _named(pools)}
    columns["of"] = [some_of([names[run.place] for run in pool.runs], most=3) for pool in pools]
    return columns


def _named(pools: Sequence[Pool]) -> Iterable[tuple[Run, str]]:
    runs = list({run.place: run for pool in pools for run in pool.runs}.values())
    return zip(runs, names_of(runs), strict=True)


def _teacher_of(pool: Pool, pools: Sequence[Pool]) -> str:
    """The label of a pool's teacher, with the beginning of its fingerprint where another one has the same label."""
    known, label = pool.group.students[0].teacher, _label(pool)
    others = {one.group.students[0].teacher for one in pools if _label(one) == label}
    return label if len(others) == 1 else f"{label} {known[:6]}"


def _label(pool: Pool) -> str:
    return pool.teacher.model if pool.teacher else "teacher"


_WHAT = {
    "student": "how they are trained",
    "teacher": "the teacher",
    "dataset": "the rows",
    "cache": "the stored logits",
}


def _apart_notes(pools: Sequence[Pool]) -> list[str]:
    """In what students of one name differ, in one line."""
    first: dict[str, Pool] = {}
    why: dict[str, list[str]] = {}
    for pool in pools:
        if (like := first.setdefault(pool.group.stem, pool)) is not pool:
            why.setdefault(pool.group.stem, []).append(_difference(like, pool))
    told = [f"{stem} differ in {', '.join(dict.fromkeys(reasons))}" for stem, reasons in why.items()]
    return [f"students of one name that are not the same stand apart: {some_of(told, most=3)}"] if told else []


def _difference(one: Pool, other: Pool) -> str:
    if one.content is None or other.content is None:
        return "what a run does not say"
    keys = sorted(one.content.keys() | other.content.keys())
    found = [_WHAT.get(key, key) for key in keys if one.content.get(key) != other.content.get(key)]
    return " and ".join(found) or "nothing that is known"


def pool_notes(pools: Sequence[Pool]) -> list[str]:
    """What numbers of pooled seeds rest on, a line each."""
    counted = [f"{pool.group.stem}, seeds {_seeds(pool.twice)}" for pool in pools if pool.twice]
    notes = [f"in several runs, and counted once: {some_of(counted)}"] * bool(counted)
    differing = [f"{pool.group.stem}, seeds {_seeds(pool.differing)}" for pool in pools if pool.differing]
    notes += _apart_notes(pools)
    return notes + [
        f"the same student came to other results in another run (other versions or machines): {some_of(differing)}"
    ] * bool(differing)


def _seeds(seeds: Sequence[int]) -> str:
    return some_of([str(seed) for seed in seeds])
