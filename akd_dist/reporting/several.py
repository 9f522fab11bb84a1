"""Several runs together: whether they can be compared, what differs, and students of other seeds pooled.

Students are the same if their recipes are, seed and name apart, and the content of their data and of their teacher is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json
from akd_dist.base.formatting import some_of
from akd_dist.documents.fleet import FleetStudent
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

    def document(self) -> PooledGroup:
        """As JSON has it."""
        group = self.group
        return PooledGroup(
            name=group.stem,
            model=group.model,
            parameters=group.parameters,
            objective=group.objective,
            tau_max=group.tau_max,
            runs=[run.place for run in self.runs],
            seeds=sorted(group.by_seed),
            twice=self.twice,
            differing=self.differing,
            test=estimate(group.by_seed),
            agreement=group.agreement,
        )


def pooled(runs: Sequence[Run]) -> list[Pool]:
    """The students of all runs, seeds gathered over them; each student and seed counts once.

    A run that does not say how it was made has its groups for itself.
    """
    found: dict[str, list[tuple[Run, FleetStudent]]] = {}
    groups: dict[str, SeedGroup] = {}
    for run in runs:
        for group in run.groups:
            for student in group.students:
                key = _content(run, student) or f"{run.place} {group.stem}"
                groups.setdefault(key, group)
                found.setdefault(key, []).append((run, student))
    pools = [_pool(groups[key], members) for key, members in found.items()]
    place = {id(group): at for at, group in enumerate(in_order([pool.group for pool in pools]))}
    return sorted(pools, key=lambda pool: place[id(pool.group)])


def _pool(like: SeedGroup, members: Sequence[tuple[Run, FleetStudent]]) -> Pool:
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
    )


def _differ(alike: Sequence[FleetStudent], metric: str) -> bool:
    """Whether those that finished came to different results, although they should be the same."""
    scores = [one.test[metric] for one in alike if one.state == "done" and one.test]
    return bool(scores) and max(scores) - min(scores) > SAME


def _content(run: Run, student: FleetStudent) -> str | None:
    """What makes a student what it is but for its seed, as text; None of a run that does not say."""
    known = run.identity and run.identity.students.get(student.name)
    if run.identity is None or not known:
        return None
    of_run = {key: value for key, value in (run.identity.model_extra or {}).items() if key != "name"}
    plain = {key: value for key, value in known.items() if key not in ("name", "seed")}
    return canonical_json(
        of_run | {"dataset": run.identity.dataset, "teacher": student.teacher, "student": plain}
    ).decode()


def pool_notes(pools: Sequence[Pool]) -> list[str]:
    """What numbers of pooled seeds rest on, a line each."""
    counted = [f"{pool.group.stem}, seeds {_seeds(pool.twice)}" for pool in pools if pool.twice]
    notes = [f"in several runs, and counted once: {some_of(counted)}"] * bool(counted)
    differing = [f"{pool.group.stem}, seeds {_seeds(pool.differing)}" for pool in pools if pool.differing]
    return notes + [
        f"the same student came to other results in another run (other versions or machines): {some_of(differing)}"
    ] * bool(differing)


def _seeds(seeds: Sequence[int]) -> str:
    return some_of([str(seed) for seed in seeds])
