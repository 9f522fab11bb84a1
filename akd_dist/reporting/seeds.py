"""Students that differ in nothing but their seed: gathered into groups, their means, intervals and differences.

A dozen plain lines each, on typed results: with pandas, keys and order of the groups would be written all the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from akd_dist.base.formatting import HARD_LABELS, OBJECTIVE_LABELS, SHOWN, MetricFormat, objective_label
from akd_dist.documents.fleet import FleetStudent, Stage1Loss
from akd_dist.documents.report import ChosenTau, Estimate

CONFIDENCE = 0.95
CHOSEN_TAU = "τ chosen on validation"
"""How a row is called whose tau_max is chosen on the validation rows, seed by seed."""
SAME = 5e-7
"""Scores that differ by less are the same: metrics are kept to seven digits."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; a single seed has no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of `values`, or None if there are none."""
        present = list(values)
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None)

    def told(self, shown: MetricFormat) -> str:
        """`97.41 ± 0.23`; the mean alone for one seed."""
        return shown.text(self.mean) + ("" if self.deviation is None else f" ± {shown.text(self.deviation)}")


def has_spread(groups: Iterable[SeedGroup]) -> bool:
    """Whether any group has a deviation over seeds, which a table then has to explain."""
    return any(group.score is not None and group.score.deviation is not None for group in groups)


def plus_minus(shown: MetricFormat, spread: Spread | None) -> str:
    """A spread in a metric's terms; a dash for none."""
    return "-" if spread is None else spread.told(shown)


def interval(shown: MetricFormat, value: Estimate | None, *, signed: bool = False) -> str:
    """`97.41 ± 0.57`, the mean and half of its interval; the mean alone for one seed; nothing for none."""
    if value is None:
        return ""
    mean = shown.gain(value.mean) if signed else shown.text(value.mean)
    return mean if value.high is None else f"{mean} ± {shown.text(value.high - value.mean)}"


def estimate(by_seed: Mapping[int, float]) -> Estimate | None:
    """Mean and 95 % confidence interval over seeds, by Student's t with n - 1 degrees of freedom; None for no seed.

    mean -+ t(0.975, n - 1) s / sqrt(n), with s the sample standard deviation; a single seed has no interval. Of
    differences between pairs this is the interval of the paired t-test.
    """
    from scipy.stats import t

    # Summed in the order of the seeds, whichever ended first: the same results give the same bytes.
    values = [by_seed[seed] for seed in sorted(by_seed)]
    if not values:
        return None
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Estimate(n=1, mean=mean, low=None, high=None)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(n=count, mean=mean, low=mean - half, high=mean + half)


def paired(results: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The difference to a baseline, over the seeds that both have."""
    return estimate({seed: results[seed] - baseline[seed] for seed in results.keys() & baseline.keys()})


@dataclass(frozen=True)
class SeedGroup:
    """The students that differ in nothing but their seed: one row of the table, one point of a figure."""

    model: str
    objective: str
    tau_max: int | None
    stem: str
    """What the students' names begin with."""
    metric: str = "accuracy"
    """The run's primary metric."""
    students: list[FleetStudent] = field(default_factory=list)
    chosen: bool = False
    """Whether these are students of several tau_max, of each seed the one that is best on the validation rows."""

    def standing(self, value: float) -> float:
        """A value of its metric so that more is better."""
        return SHOWN[self.metric].standing(value)

    def mean_of(self, metric: str) -> float | None:
        """The mean of any metric on the test rows over those that finished; None where it was not measured."""
        found = [student.test.get(metric) for student in self.done if student.test]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None

    @property
    def described(self) -> dict[str, Any]:
        """Which students they are, as documents say it."""
        return {
            "name": self.stem,
            "model": self.model,
            "parameters": self.parameters,
            "objective": self.objective,
            "tau_max": self.tau_max,
            "stage1_loss": self.stage1_loss,
        }

    @property
    def done(self) -> list[FleetStudent]:
        """Those that finished; only they count in a mean."""
        return [student for student in self.students if student.state == "done"]

    @property
    def followers(self) -> list[FleetStudent]:
        """Those that finished, and went on from another student's stage I."""
        return [student for student in self.done if student.stage1_from]

    @property
    def stem_without_tau(self) -> str:
        """What their names have in common with those of another temperature."""
        return self.stem.replace(f"-t{self.tau_max}", "", 1)

    @property
    def parameters(self) -> int:
        """Number of weights of one student."""
        return self.students[0].parameters or 0

    @property
    def stage1_loss(self) -> Stage1Loss | None:
        """What stage I of Annealing-KD compared logits by; None of others."""
        return self.students[0].stage1_loss if self.students else None

    @property
    def objective_label(self) -> str:
        """How the students were trained, as a reader says it."""
        label = objective_label(self.objective, self.stage1_loss)
        if self.chosen:
            return f"{label}, {CHOSEN_TAU}"
        return f"{label}, τ {self.tau_max}" if self.tau_max is not None else label

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The primary metric on the test rows of those that finished, by seed."""
        return {student.seed: student.test[self.metric] for student in self.done if student.test}

    @cached_property
    def score(self) -> Spread | None:
        """The primary metric on the test rows, over seeds."""
        return Spread.of(student.test[self.metric] for student in self.done if student.test)

    @cached_property
    def agreement(self) -> float | None:
        """Mean share of test rows where student and teacher choose the same class, 0 to 1; None for regression."""
        agreements = [student.agreement for student in self.done if student.agreement is not None]
        return statistics.fmean(agreements) if agreements else self.mean_of("agreement")

    @cached_property
    def seconds(self) -> float | None:
        """Mean training time of one student."""
        return statistics.fmean(student.seconds for student in self.done) if self.done else None


def group_students(students: Iterable[FleetStudent], metric: str = "accuracy") -> list[SeedGroup]:
    """Students that differ only in their seed, gathered; smallest model first, objectives as in the papers' tables.

    Only a name that ends in `-s<seed>` says that nothing but the seed differs; any other student is a group of its own.
    """
    groups: dict[tuple[str, str, int | None, str], SeedGroup] = {}
    for student in students:
        # The name as well, since grids may vary what stands in none of the other three.
        key = (student.model, student.objective, student.tau_max, student.name.removesuffix(f"-s{student.seed}"))
        groups.setdefault(key, SeedGroup(*key, metric)).students.append(student)
    return in_order(groups.values())


def in_order(groups: Iterable[SeedGroup]) -> list[SeedGroup]:
    """Smallest model first, objectives as in the papers' tables."""
    order = list(OBJECTIVE_LABELS)
    return sorted(
        groups,
        key=lambda group: (
            group.parameters,
            group.model,
            order.index(group.objective) if group.objective in order else len(order),
            group.tau_max or 0,
            group.stem,
        ),
    )


def group_label(group: SeedGroup, groups: Iterable[SeedGroup]) -> str:
    """The model's label, or the students' common name where the label does not tell two groups apart."""
    alike = [other for other in groups if (other.model, other.objective_label) == (group.model, group.objective_label)]
    return group.model if len(alike) == 1 else group.stem


def chosen_on_validation(family: Sequence[SeedGroup]) -> SeedGroup | None:
    """Of groups that differ in tau_max alone, for each seed the student of the best validation metric, as one group.

    So the papers tune tau_max. The test rows are read once, of the student that was chosen. Seeds of which some student
    did not finish are left out; of equal students the one of the smallest tau_max is taken. None for a single tau_max.
    """
    first = family[0]
    found = [{one.seed: one for one in group.done if one.test and one.validation} for group in family]
    if len(found) < 2 or not (seeds := set.intersection(*map(set, found))):
        return None
    chosen = SeedGroup(first.model, first.objective, None, first.stem_without_tau, first.metric, chosen=True)
    for seed in sorted(seeds):
        chosen.students.append(max((of[seed] for of in found), key=lambda one: _validated(one, first.metric)))
    return chosen


def _validated(student: FleetStudent, metric: str) -> float:
    value = student.validation.get(metric) if student.validation else None
    return -math.inf if value is None else SHOWN[metric].standing(value)


def choices_of(chosen: SeedGroup) -> list[ChosenTau]:
    """Which tau_max it is, seed by seed."""
    return [ChosenTau(seed=one.seed, tau_max=one.tau_max) for one in chosen.students if one.tau_max is not None]


def baseline(group: SeedGroup, groups: Iterable[SeedGroup], kind: str) -> SeedGroup | None:
    """The one group of the same model that was trained in this other way; None where there is none, or several."""
    found = [other for other in groups if (other.model, other.objective) == (group.model, kind) and other.done]
    return found[0] if len(found) == 1 and group.objective != kind else None


def over(group: SeedGroup, other: SeedGroup | None) -> Estimate | None:
    """The difference to another group, paired by seed; None where there is none, or it is the same one."""
    return None if other is None or other is group else paired(group.by_seed, other.by_seed)


def gain_over_scratch(group: SeedGroup, groups: Iterable[SeedGroup]) -> float | None:
    """Mean score less that of the same model trained from hard labels; None without exactly one such baseline."""
    scratch = baseline(group, groups, HARD_LABELS)
    if group.score is None or scratch is None or scratch.score is None:
        return None
    return group.score.mean - scratch.score.mean


def finished(groups: Iterable[SeedGroup]) -> list[tuple[SeedGroup, Spread]]:
    """The groups of which any student finished, each with its score."""
    return [(group, group.score) for group in groups if group.score is not None]


def best_of(groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """The group of the best mean; None where none finished."""
    return max(finished(groups), key=lambda pair: pair[0].standing(pair[1].mean), default=(None, None))[0]


def pareto_front(groups: Iterable[SeedGroup]) -> list[SeedGroup]:
    """The groups that no other beats: better with as few parameters, or as good with fewer. Smallest first.

    Of one size those that are equally good are all on it.
    """
    front: list[SeedGroup] = []
    best, size = -math.inf, 0
    ranked = [(group.parameters, group.standing(score.mean), group) for group, score in finished(groups)]
    for parameters, standing, group in sorted(ranked, key=lambda one: (one[0], -one[1])):
        if standing > best + SAME or (standing > best - SAME and parameters == size):
            front.append(group)
            best, size = max(best, standing), parameters
    return front


def unfinished(students: Sequence[FleetStudent]) -> list[FleetStudent]:
    """The students that did not finish, in the fleet's order."""
    return [student for student in students if student.state != "done"]
