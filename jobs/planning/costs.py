"""What students take, alone and in a cohort: steps, seconds, memory, what their stream passes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from akd_dist.data.encoded import bytes_in_memory, rows_ahead
from akd_dist.data.row_fetch import bytes_ahead
from akd_dist.data.rows import Splits
from akd_dist.distill.objectives import Stage, mix_of, stages_of
from akd_dist.distill.orders import ALL, Batches
from akd_dist.distill.probe import Measured, guessed
from akd_dist.distill.stacking import most_together
from akd_dist.jobs.packing import ResourceRequest
from akd_dist.models.device import gpus_of
from akd_dist.recipe import Recipe, StudentSpec

UNKNOWN_SECONDS = 1e-6  # of a step; not 0, by which all students would land in one cohort and leave the others empty
# A worker beside its students: Python, our modules, and what torch loads for a first step (measured: 580 to 630 MB).
PROCESS_BYTES = 650_000_000
GPU_PROCESS_BYTES = 1_500_000_000
"""The same with CUDA, cuBLAS and cuDNN loaded (measured: 1.27 to 1.43 GB, torch 2.11, CUDA 13, H200)."""

START_SECONDS = 14.0
"""What starting and stopping one Ray Train run costs, whatever it trains (measured: 9 to 14 s on 2 cores, Ray 2.60)."""

# What a student takes besides steps, evaluations and checkpoints, however small it is (measured on 2 cores): to note an
# epoch, and to write its model, predictions and result.
EPOCH_SECONDS = 0.0006
DELIVERY_SECONDS = 0.01

Cohort = tuple[StudentSpec, ...]


def families_of(students: Sequence[StudentSpec]) -> list[Cohort]:
    """Students that differ in nothing but stage II share one stage I, and so belong into one cohort; most are alone."""
    families = defaultdict(list)
    for spec in students:
        families[spec.stage1 or spec.name].append(spec)
    return [tuple(family) for family in families.values()]


# ---- what students cost


class Passage(NamedTuple):
    """Epochs of a stream that are alike."""

    epochs: int
    """How many."""
    skipped: int
    """Batches at the start of each that nobody trains on any more."""
    logits: bool
    """Whether somebody needs the teacher's logits."""
    batches: Batches
    """How each is cut."""

    @property
    def rows(self) -> int:
        """Rows that are read in all of them."""
        return self.epochs * max(0, self.batches.shown - self.skipped * self.batches.batch)


class _Leg(NamedTuple):
    """A stage of a student."""

    end: int
    """The epoch after its last."""
    logits: bool
    """Whether it needs logits."""
    batches: Batches


@dataclass(frozen=True)
class CostModel:
    """What each student has before it, and what it takes: measured, and guessed where it could not be."""

    device: str
    """Where the students compute."""
    rows: int
    """Train rows."""
    labelled: int | None = None
    """How many of them have labels; None where all have."""
    evaluated: int = 0
    """Validation rows."""
    tested: int = 0
    """Test rows."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of each student, by name."""
    probes: Mapping[str, Measured | None] = field(default_factory=dict)
    """The probe of each student, by name."""
    row_bytes: int = 0
    """Bytes of one row's inputs and label."""
    classes: int = 0
    """Logits of a row, or of a target."""
    targets: int | None = None
    """Of all train rows, where these have several each."""
    behind: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(epoch, step) of the last checkpoint of those that resume."""
    stages1: Mapping[str, str] = field(default_factory=dict)
    """Of those that begin with stage II, since their stage I was trained before: where it lies under the store root."""
    pauses: Mapping[str, int] = field(default_factory=dict)
    """After how many epochs students wait for another command, by name; all others go on to their end."""
    fetching: int = 0
    """Bytes of rows that a worker has in its memory, on their way into the node's cache."""
    decoding: int = 0
    """Bytes of one row that is decoded ahead; 0 where none are."""
    starting: float = START_SECONDS
    """Seconds that each cohort takes to start and to stop."""
    each_epoch: bool = False
    """Whether a checkpoint is written at the end of every epoch, which may take small students longer than the epoch;
    those at intervals of time hardly count."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        splits: Splits,
        parameters: Mapping[str, int],
        measured: Mapping[str, Measured | None],
        behind: Mapping[str, tuple[int, int]] | None = None,
        stages1: Mapping[str, str] | None = None,
    ) -> CostModel:
        """The costs of a recipe's students on these rows."""
        train = splits.train
        return cls(
            recipe.device,
            len(train),
            labelled=train.with_labels,
            evaluated=len(splits.validation),
            tested=len(splits.test),
            parameters=parameters,
            probes=measured,
            row_bytes=train.row_bytes,
            classes=train.classes,
            targets=train.targets if train.task == "language_model" else None,
            behind=behind or {},
            stages1=stages1 or {},
            fetching=0 if train.sealed is None else bytes_ahead(train.row_bytes),
            decoding=bytes_in_memory(train.inputs),
            each_epoch=recipe.checkpoint_seconds == 0,
        )

    def measured(self, spec: StudentSpec) -> Measured:
        """What was measured of a student, or is known of it without."""
        found = self.probes.get(spec.name)
        return found if found is not None else guessed(spec, self.parameters.get(spec.name, 0))

    def batches(self, spec: StudentSpec, stage: Stage) -> Batches:
        """How the epochs of a student's stage are cut."""
        mix = ALL if self.labelled is None else mix_of(stage, spec.labelled)
        labelled = self.rows if self.labelled is None else self.labelled
        return Batches(self.rows, labelled, spec.batch, spec.last_batch, mix, spec.epoch_steps)

    def steps_until(self, spec: StudentSpec, epoch: int, step: int = 0) -> int:
        """The steps of a student before a place in its epochs, from its first one on."""
        steps = step
        for stage in stages_of(spec):
            here = min(stage.epochs, epoch)
            steps, epoch = steps + here * self.batches(spec, stage).steps, epoch - here
        return steps

    def starts_at(self, spec: StudentSpec, follows: bool = False) -> tuple[int, int]:
        """(epoch, step) from which a student computes; one that follows computes no stage I."""
        skips = follows or spec.name in self.stages1
        return (stages_of(spec)[0].epochs, 0) if skips else self.behind.get(spec.name, (0, 0))

    def ends_at(self, spec: StudentSpec) -> int:
        """After how many epochs a student ends, or waits."""
        return min(spec.objective.epochs, self.pauses.get(spec.name, spec.objective.epochs))

    def steps_left(self, spec: StudentSpec, follows: bool = False) -> int:
        """Steps that a student still computes."""
        done = self.steps_until(spec, *self.starts_at(spec, follows))
        return max(0, self.steps_until(spec, self.ends_at(spec)) - done)

    def seconds(self, spec: StudentSpec, follows: bool = False) -> float:
        """Seconds that a student adds to its cohort: steps, evaluations, checkpoints, and its setting up."""
        one, steps = self.measured(spec), self.steps_left(spec, follows)
        epoch, step = self.starts_at(spec, follows)
        legs = self._legs(spec)
        # No recipe can ask for no epochs; benchmarks do, to see what a fleet costs without its steps.
        per_epoch = next((leg.batches.steps for leg in legs if epoch < leg.end), legs[-1].batches.steps if legs else 1)
        epochs = max(0.0, self.ends_at(spec) - epoch - step / per_epoch)
        evaluated, kept = epochs * self.evaluated + self.tested, epochs if self.each_epoch else 0.0
        # In a stack what all of its students share is counted once, by `stack_seconds`.
        stepping = steps * ((one.together if one.stacked else one.step) or UNKNOWN_SECONDS)
        noted = epochs * EPOCH_SECONDS + DELIVERY_SECONDS
        return one.start + stepping + one.evaluation * evaluated + one.keeping * kept + noted

    def leaders(self, cohort: Cohort) -> dict[str, str]:
        """Who goes on from whose stage I, by name: those that have not begun, from who of their family is furthest."""
        found: dict[str, str] = {}
        for family in families_of(cohort):
            at_stage1 = [spec for spec in family if not self._is_past_stage1(spec)]
            if len(at_stage1) > 1:
                first = max(at_stage1, key=lambda spec: self.behind.get(spec.name, (0, 0)))  # of equals the first one
                followers = [spec for spec in at_stage1 if spec is not first and spec.name not in self.behind]
                found |= {spec.name: first.name for spec in followers}
        return found

    def _is_past_stage1(self, spec: StudentSpec) -> bool:
        epoch, _ = self.starts_at(spec)
        return epoch >= stages_of(spec)[0].epochs

    def family_seconds(self, family: Cohort) -> float:
        """The same for students that share a stage I: one of them computes it for those that have not begun."""
        followers = self.leaders(family)
        return sum(self.seconds(spec, follows=spec.name in followers) for spec in family)

    def streamed(self, cohort: Cohort) -> list[Passage]:
        """What a cohort's stream still passes, in runs of epochs that are alike.

        Students that stand at different places join where the stream reaches them.
        """
        followers = self.leaders(cohort)
        # Students that differ in no more than names and models stand at the same place.
        paths = {(*self.starts_at(spec, spec.name in followers), self._legs(spec)) for spec in cohort}
        # Between two of these the same students train, in the same stages; in its first epoch one may be halfway.
        cuts = {cut for begins, _, legs in paths for cut in (begins, begins + 1, *(leg.end for leg in legs))}
        found = []
        for first, after in itertools.pairwise(sorted(cuts)):
            there = defaultdict(list)
            for begins, step, legs in paths:
                if legs and begins <= first < legs[-1].end:
                    leg = next(leg for leg in legs if first < leg.end)
                    skipped = min(step, leg.batches.steps) if first == begins else 0
                    there[leg.batches].append((skipped, leg.logits))
            for batches, those in there.items():
                skipped = min(step for step, _ in those)
                found.append(Passage(after - first, skipped, any(need for _, need in those), batches))
        return found

    def _legs(self, spec: StudentSpec) -> tuple[_Leg, ...]:
        """Its stages, as far as they come before it ends or waits."""
        ends, until = [0, *itertools.accumulate(one.epochs for one in stages_of(spec))], self.ends_at(spec)
        begun = zip(itertools.pairwise(ends), stages_of(spec), strict=True)
        return tuple(
            _Leg(min(end, until), stage.needs_logits, self.batches(spec, stage))
            for (begin, end), stage in begun
            if begin < until
        )

    def stream_steps(self, cohort: Cohort) -> int:
        """Batches of a cohort's stream, each of them once for all of its students."""
        return sum(one.epochs * (one.batches.steps - one.skipped) for one in self.streamed(cohort))

    def stream_seconds(self, cohort: Cohort) -> float:
        """Seconds of the stream, once for all students of a cohort."""
        return max(self.measured(spec).stream for spec in cohort) * self.stream_steps(cohort)

    def stacks_of(self, cohort: Cohort) -> list[Cohort]:
        """The students of a cohort whose steps are taken together: those of one architecture."""
        found = defaultdict(list)
        for spec in cohort:
            if self.measured(spec).stacked:
                found[spec.model.model_dump_json(), spec.precision].append(spec)
        return [tuple(stack) for stack in found.values()]

    def wholes_of(self, cohort: Cohort) -> list[Cohort]:
        """The students of a cohort by stacks; those that step alone by families, which never have two architectures."""
        stacks = {spec.name: number for number, stack in enumerate(self.stacks_of(cohort)) for spec in stack}
        found = defaultdict[tuple[str, int], list[StudentSpec]](list)
        for number, family in enumerate(families_of(cohort)):
            stacked = [stacks[spec.name] for spec in family if spec.name in stacks]
            found[("stack", stacked[0]) if stacked else ("family", number)].extend(family)
        return [tuple(whole) for whole in found.values()]

    def stack_seconds(self, cohort: Cohort) -> float:
        """Seconds that the stacks of a cohort take, however few students they have."""
        followers = self.leaders(cohort)
        total = 0.0
        for stack in self.stacks_of(cohort):
            steps = max(self.steps_left(spec, spec.name in followers) for spec in stack)
            parts = -(-len(stack) // self.most_together(stack[0]))
            total += parts * steps * max(self.measured(spec).stack for spec in stack)
        return total

    def most_together(self, spec: StudentSpec) -> int:
        """How many students such as this one step together at most; 1 where it steps alone."""
        one = self.measured(spec)
        return most_together(one.step_memory, self.device) if one.stacked else 1

    def stepping_seconds(self, cohort: Cohort) -> float:
        """Seconds of the students of a cohort, and of their stacks."""
        return self.stack_seconds(cohort) + sum(map(self.family_seconds, families_of(cohort)))

    def cohort_seconds(self, cohort: Cohort) -> float:
        """Seconds of a cohort, without its start."""
        return self.stream_seconds(cohort) + self.stepping_seconds(cohort)

    def memory(self, cohort: Cohort) -> int:
        """Bytes of main memory of each worker of a cohort, beside memory maps that the whole node shares.

        Students keep their state all the time, step by stacks, and evaluate and write one after the other. On a GPU the
        state lies there, and only checkpoints pass through main memory.
        """
        measured = [self.measured(spec) for spec in cohort]
        streaming = self.fetching + self.decoding * rows_ahead(-(-cohort[0].batch // cohort[0].workers))
        if gpus_of(self.device):
            return GPU_PROCESS_BYTES + streaming + max(one.writing for one in measured)
        passing = max(max(one.step_memory, one.evaluation_memory, one.writing) for one in measured)
        for stack in self.stacks_of(cohort):
            many = min(len(stack), max(map(self.most_together, stack)))
            passing = max(passing, many * max(self.measured(spec).step_memory for spec in stack))
        return PROCESS_BYTES + streaming + sum(one.resident(cohort[0].workers) for one in measured) + passing

    def ask(self, cohort: Cohort) -> ResourceRequest:
        """What a cohort occupies."""
        spec = cohort[0]
        return ResourceRequest(spec.workers, spec.threads, spec.gpus * gpus_of(self.device), self.memory(cohort))


# ---- cutting
