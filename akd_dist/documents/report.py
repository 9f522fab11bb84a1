"""What `compare` and `report` print."""

from typing import Literal

from akd_dist.documents.base import Count, Document, Share, Told
from akd_dist.documents.error import Refusal
from akd_dist.documents.fleet import Economics, RefusedStudent, Stage1Loss
from akd_dist.recipe import Metric, Split, Task


class Estimate(Document):
    """A mean over seeds and its 95 % interval by Student's t."""

    n: Count
    """Number of seeds."""
    mean: float
    """Their mean."""
    low: float | None
    """Lower end of the interval; null for one seed."""
    high: float | None
    """Upper end of the interval; null for one seed."""


class ChosenTau(Document):
    """What the validation rows chose for a seed."""

    seed: int
    """The seed of the students that were compared."""
    tau_max: int
    """That of the student with the best validation metric; of equal ones the smallest."""


class ComparedModel(Document):
    """The teacher, or an assistant, of a comparison."""

    model: str
    """Label of its architecture."""
    parameters: Count | None
    """Number of its weights; null where they are not known."""
    test: float | None
    """Its primary metric on the test rows; null where it was not measured."""
    agreement: Share | None
    """Share of test rows where it chooses the teacher's class; null for the teacher."""


class LostStudent(Document):
    """A student that did not come to its end, and so is in no mean."""

    name: str
    """Its folder under students/."""
    seed: int
    """Its seed."""
    state: Literal["diverged", "failed"]
    """How it ended."""
    reason: Told | None
    """Why."""


class ComparedRow(Document):
    """One student model under one objective, over its seeds."""

    name: str
    """What the names of its students begin with."""
    model: str
    """Label of its architecture."""
    parameters: Count | None
    """Number of its weights."""
    objective: str
    """Kind of its objective."""
    tau_max: int | None
    """The temperature that annealing starts from; null without annealing."""
    stage1_loss: Stage1Loss | None = None
    """What stage I of Annealing-KD compared logits by; null for others."""
    epochs: Count
    """Epochs over all stages."""
    seeds: list[int]
    """Seeds of the students that finished."""
    test: Estimate | None
    """The primary metric on the test rows."""
    over_scratch: Estimate | None
    """The difference to the same model from hard labels alone, paired by seed; null for that one itself."""
    over_kd: Estimate | None
    """The difference to the same model trained by KD, paired by seed; null for that one and from hard labels."""
    agreement: Share | None
    """Mean share of test rows where student and teacher choose the same class."""
    lost: list[LostStudent]
    """Students that diverged or failed."""
    chosen: list[ChosenTau] = []
    """Of the row whose tau_max the validation rows choose, seed by seed: what they chose. Empty for all others."""


SplitRows = dict[Split, Count]


class CompareDocument(Document):
    """What `akd-dist compare --json` prints, and what its run keeps in comparison.json."""

    run: str
    """The run's folder."""
    command: str
    """What makes the same table again."""
    task: Task
    """What a label is."""
    metric: str
    """The primary metric, which all numbers of the table are of."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
    confidence: float
    """Of the intervals."""
    rows: SplitRows
    """Rows of each split."""
    unlabelled: Count = 0
    """How many of the train rows have no label."""
    teacher: ComparedModel
    """Whom the students learned from."""
    assistants: list[ComparedModel]
    """The models between it and the students of objective takd."""
    table: list[ComparedRow]
    """The rows, model by model; from scratch, KD, TAKD, Annealing-KD, Continuation-KD."""
    missing: list[Literal["takd"]]
    """Objectives that the recipe cannot be compared under."""
    refused: list[RefusedStudent] = []
    """Students that the run has otherwise: they are in no row."""


class ReportedGroup(Document):
    """Students that differ in nothing but their seed."""

    name: str
    """What their names begin with."""
    model: str
    """Label of their architecture."""
    parameters: Count
    """Number of weights of one."""
    objective: str
    """Kind of their objective."""
    tau_max: int | None
    """The temperature that annealing starts from; null without annealing."""
    stage1_loss: Stage1Loss | None = None
    """What stage I of Annealing-KD compared logits by; null for others."""
    students: Count
    """How many there are."""
    seeds: list[int]
    """Seeds of those that finished."""
    test: Estimate | None
    """The primary metric on the test rows."""
    agreement: Share | None
    """Mean share of test rows where student and teacher choose the same class; of language models, of targets where
    they choose the same token."""
    seconds: float | None
    """Mean training time of one."""
    pareto: bool
    """Whether no other group is better with as few parameters, or as good with fewer."""
    beside: dict[str, float] = {}
    """Of language models, the means of further metrics on the test rows; empty for others."""


class TauEffect(Document):
    """Students of one tau_max, beside others that differ in tau_max alone. Differences are paired by seed."""

    family: str
    """What the groups have in common."""
    model: str
    """Label of their architecture."""
    objective: str
    """Kind of their objective."""
    tau_max: int
    """The temperature that annealing starts from."""
    seeds: list[int]
    """Seeds of those that finished."""
    test: Estimate | None
    """The primary metric on the test rows."""
    over_smallest: Estimate | None
    """The difference to the smallest tau_max of the family; null for that one."""
    over_scratch: Estimate | None
    """The difference to the same model from hard labels alone, where the run has one such group."""
    over_kd: Estimate | None
    """The difference to the same model trained by KD, where the run has one such group."""


class TauChoice(Document):
    """Of students that differ in tau_max alone, for each seed the one that is best on the validation rows."""

    family: str
    """What the groups have in common."""
    model: str
    """Label of their architecture."""
    objective: str
    """Kind of their objective."""
    chosen: list[ChosenTau]
    """What was chosen, seed by seed."""
    test: Estimate | None
    """The primary metric on the test rows, of those that were chosen."""
    over_smallest: Estimate | None
    """The difference to the smallest tau_max of the family, paired by seed."""
    over_scratch: Estimate | None
    """The difference to the same model from hard labels alone, where the run has one such group."""
    over_kd: Estimate | None
    """The difference to the same model trained by KD, where the run has one such group."""


class Difference(Document):
    """Where the finished students of a group and the teacher differ on the test rows, all seeds together."""

    name: str
    """What the students' names begin with."""
    rows: Count
    """Test rows times students."""
    both_right: Count
    """Both choose the label."""
    teacher_alone: Count
    """Only the teacher does."""
    student_alone: Count
    """Only the student does."""
    both_wrong_alike: Count
    """Neither does, and they choose the same class."""
    both_wrong_apart: Count
    """Neither does, and they choose different classes."""
    pairs: list[tuple[int, int, int]]
    """The most frequent pairs of different classes: the teacher's, the student's, how often."""


class ReportedRun(Document):
    """What a run's page says, as numbers."""

    run: str
    """The run's folder, as it was named."""
    report: str
    """Its page."""
    task: Task
    """What a label is."""
    metric: Metric
    """The primary metric."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
    teacher: float | None
    """The teacher's, on the test rows; null where it was not measured."""
    done: Count
    """Students that finished."""
    students: Count
    """Students of the run."""
    cohorts: Count
    """Ray Train runs that it took."""
    seconds: float
    """Wall-clock time of the command that finished the run."""
    rows_per_second: float | None
    """Rows that students trained on by the second of their own time; null where it cannot be told."""
    groups: list[ReportedGroup]
    """The students, seeds gathered."""
    tau_max: list[TauEffect]
    """The effect of tau_max."""
    tau_max_chosen: list[TauChoice] = []
    """The same where tau_max is chosen on the validation rows, family by family."""
    differences: list[Difference]
    """Where students and teacher differ; empty for regression, and for runs that did not keep it."""
    economics: list[Economics]
    """What the stored logits cost and saved; empty for runs that did not measure it."""
    problems: list[str] = []
    """Files of students that could not be read, one line each; the page does without them."""


class RunDifference(Document):
    """A group that two runs have, and its difference, paired by seed."""

    run: str
    """The run's folder, as it was named."""
    name: str
    """What the students' names begin with."""
    test: Estimate | None
    """The primary metric on the test rows."""
    over_first: Estimate | None
    """The difference to the first run that has the group; null in that one, or where they share no seed."""


class PooledGroup(Document):
    """Students that differ in nothing but their seed, of all runs that have some of them."""

    name: str
    """What their names begin with, in the first of the runs."""
    model: str
    """Label of their architecture."""
    parameters: Count
    """Number of weights of one."""
    objective: str
    """Kind of their objective."""
    tau_max: int | None
    """The temperature that annealing starts from; null without annealing."""
    stage1_loss: Stage1Loss | None = None
    """What stage I of Annealing-KD compared logits by; null for others."""
    teacher: str | None = None
    """Label of the model that they learned from, or are compared with; null where it is not described."""
    teacher_fingerprint: str | None = None
    """Its fingerprint; from scratch, that of the first of the runs."""
    runs: list[str]
    """The runs that have some of them."""
    seeds: list[int]
    """Seeds of those that finished, each once."""
    twice: list[int]
    """Seeds that several runs have: each counts once, as in the first of these runs in which it finished."""
    differing: list[int]
    """Those of them whose test metric is not the same in all of these runs."""
    test: Estimate | None
    """The primary metric on the test rows."""
    agreement: Share | None
    """Mean share of test rows where student and teacher choose the same class; null where teachers differ."""


class RunsCompared(Document):
    """Several runs beside each other."""

    report: str
    """The page."""
    same_test_rows: bool | None
    """Whether all were measured on the same test rows; null where a run does not say."""
    warnings: list[str] = []
    """Why their numbers may not be of the same thing, a sentence each."""
    groups: list[RunDifference]
    """The groups of all runs; those of one name are the same students in other runs."""
    pooled: list[PooledGroup] = []
    """The groups of all runs together: students that are the same but for the seed, by the recipes that the runs keep
    and by the content of data and teacher, whatever they are called."""
    notes: list[str] = []
    """What the numbers of `pooled` rest on, and in what students of one name differ, a line each."""


class ReportDocument(Document):
    """What `akd-dist report --json` prints."""

    runs: list[ReportedRun]
    """The runs, in the order in which they were named."""
    comparison: RunsCompared | None
    """Several runs in one page; null for a single run."""
    refused: list[Refusal] = []
    """Runs that could not be reported, and why; the others were."""
