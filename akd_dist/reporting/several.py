"""Several runs together: whether they can be compared, and how."""

from __future__ import annotations

from collections.abc import Iterable

from akd_dist.base.errors import RefusedError
from akd_dist.documents.report import RunDifference
from akd_dist.reporting.results import Run
from akd_dist.reporting.seeds import estimate, over


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
