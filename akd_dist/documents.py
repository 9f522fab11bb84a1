"""The JSON documents that commands print and runs leave behind, and the JSON Schemas that ship with the package.

python -m akd_dist.documents        writes akd_dist/schemas/*.schema.json afresh
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from akd_dist.recipe import Metric, Precision, Task, recipe_schema

SCHEMAS = Path(__file__).parent / "schemas"

Share = Annotated[float, Field(ge=0, le=1)]
Correlation = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=0)]


class Document(BaseModel):
    """A JSON document of a fixed shape."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class CachedSplit(Document):
    """One sealed store of logits."""

    store: str
    """Path or URI of the store's `<id>` folder."""
    id: str
    """The sha256 of the store's identity."""
    hit: bool
    """Whether it was there already."""
    rows: Count
    """Rows of the split."""
    views: Count
    """Augmented views of each row; at least as many as the recipe asks for."""
    classes: Count
    """Logits a row."""
    encoding: str
    """Precision of the stored logits."""
    bytes: Count
    """Size of all shards."""
    shards: Count
    """Number of shards."""
    shards_computed: Count
    """How many of them this command computed."""


class CachedSplits(Document):
    """The stores of the rows that nobody trains on."""

    validation: CachedSplit
    """The validation rows, one view, not augmented."""
    test: CachedSplit
    """The test rows, one view, not augmented."""


class CachedAssistant(CachedSplit):
    """An assistant, and the stores of its logits: the train store, and those of the other splits."""

    model: str
    """Label of its architecture."""
    path: str
    """Its model folder."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    splits: CachedSplits
    """The same for the validation and test rows."""


class CacheDocument(CachedSplit):
    """What `akd-dist cache-teacher --json` prints: the train store, and those of the other splits."""

    hit: bool
    """Whether all stores were there already, those of the assistants too."""
    seconds: float
    """Wall-clock time of the command."""
    splits: CachedSplits
    """The same for the validation and test rows."""
    assistants: list[CachedAssistant] = []
    """The stores of the teacher's assistants, from the one below the teacher to the last."""


class PlannedSplit(Document):
    """What one store would take."""

    rows: Count
    """Rows of the split."""
    views: Count
    """Augmented views of each row."""
    hit: bool
    """Whether a store is there that serves it, so that nothing is to be computed."""
    shards: Count
    """Number of shards to compute."""
    bytes: Count
    """Size of these shards."""


PlannedSplits = dict[Literal["train", "validation", "test"], PlannedSplit]


class PlannedAssistant(Document):
    """What an assistant and its stores would take."""

    model: str
    """Label of its architecture."""
    trained: bool
    """Whether it is there, so that it need not be trained."""
    splits: PlannedSplits
    """What each split would take."""


class PlanDocument(Document):
    """What `akd-dist cache-teacher --dry-run --json` prints."""

    dry_run: Literal[True]
    """Nothing was computed."""
    store_root: str
    """Where the stores would lie."""
    bytes: Count
    """Size of all that is to be computed."""
    free: Count | None
    """Bytes free there; null for object storage."""
    splits: PlannedSplits
    """What each split would take."""
    assistants: list[PlannedAssistant] = []
    """The same for the teacher's assistants."""


class PlannedStudent(Document):
    """A student, and what is before it."""

    name: str
    """Its folder under students/."""
    model: str
    """Label of its architecture."""
    objective: str
    """Kind of its objective."""
    parameters: Count
    """Number of its weights."""
    standing: Literal["new", "resumes", "ended"]
    """Whether it starts, resumes from a checkpoint, or has ended already."""
    rides: str | None
    """Whose stage I it goes on from; null if it computes its own."""
    steps: Count
    """Steps that it still computes."""
    seconds: float | None
    """What it adds to its cohort; null if its probe failed."""


class PlannedCohort(Document):
    """Students that train in lockstep, and what that takes."""

    students: list[PlannedStudent]
    """Who they are."""
    why: str
    """What they share."""
    waits: str | None
    """What it waits for; null if it starts at once."""
    workers: Count
    """Data-parallel workers."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    memory: Count
    """Bytes of main memory of each worker, as estimated; memory maps that the whole node shares are not in it."""
    steps: Count
    """Steps of the stream."""
    bytes_streamed: Count
    """Inputs, labels and logits that the stream reads, once for all students."""
    begins: float
    """Seconds from the first start."""
    ends: float
    """Seconds from the first start."""


class FleetPlanDocument(Document):
    """What `akd-dist train-students --dry-run --json` prints."""

    dry_run: Literal[True]
    """Nothing was computed."""
    run: str
    """The run's folder."""
    device: str
    """Where it would compute."""
    teacher: str
    """What has to be done before students can start."""
    cache_bytes: Count
    """Logits that are still to be computed."""
    nodes: Count
    """Nodes of the cluster."""
    cpus: float
    """Their CPUs."""
    gpus: float
    """Their GPUs."""
    memory: Count | None
    """Main memory that they give to workers, in bytes; null where it is not known."""
    why: str
    """Why there are so many cohorts: what fewer and what more of them would come to."""
    cohorts: list[PlannedCohort]
    """In the order in which they queue."""
    ended: list[PlannedStudent]
    """Students that need no more training."""
    checkpoint_bytes: Count
    """The most that lies there of checkpoints at a time."""
    model_bytes: Count
    """What is delivered."""
    free_bytes: Count
    """Free under the run root."""
    seconds: float
    """From the first start to the end of the last cohort; without the teacher and its caching."""


class StoreUse(Document):
    """A run that used a store on some day."""

    run: str
    """Path of the run's folder, or of the folder of a model that was trained from the store."""
    host: str
    """Where its driver ran."""
    user: str | None
    """Whose it was; null where the user has no name."""
    time: str
    """When it began to use the store, the first time on that day: ISO 8601, UTC."""
    command: str
    """The command line."""
    lock: str | None
    """A file that the run holds locked while it lives."""


class StoreEntry(Document):
    """A store in a list."""

    id: str
    """The sha256 of its identity."""
    sealed: bool
    """Whether all of it is there."""
    problem: str | None
    """Why it cannot be read, if so; the numbers are zero then."""
    model: str | None
    """Label of its teacher's architecture; null where it does not say."""
    teacher: str
    """Fingerprint of its teacher."""
    data: str | None
    """The dataset's source and the split, as the recipe had them; null where that is not known."""
    split: str | None
    """Which rows it was made for; null where that is not known."""
    dataset: str
    """Fingerprint of its rows."""
    rows: Count
    """Rows of the dataset."""
    views: Count
    """Augmented views of each row."""
    augmentation: dict[str, Any]
    """What the views are drawn by."""
    classes: Count
    """Logits a row."""
    encoding: str
    """Precision of the stored logits."""
    bytes: Count
    """Size of the shards that are there."""
    shards: Count
    """Number of shards of the whole store."""
    shards_done: Count
    """How many of them are there, with a receipt."""
    partials: Count
    """Files in the making, their writers alive or dead."""
    modified: str
    """When it was sealed, or its last object written if it is not: ISO 8601, UTC, by the storage's clock."""
    runs: list[str]
    """The runs that used it, the latest first."""
    last_used: str | None
    """When a run last began to use it; null if there is no record of any."""
    uses: list[StoreUse]
    """The records of its use, one a run and day, the latest first."""


class StoresDocument(Document):
    """What `akd-dist stores list --json` prints."""

    store_root: str
    """Where the stores lie."""
    stores: list[StoreEntry]
    """Every store, those of one teacher together, the teacher used last first."""


class StoreReceipts(Document):
    """What the writers of a store's shards said, in short."""

    seconds: float
    """Time that the teacher took for its logits, over all shards that were computed for this store."""
    hosts: dict[str, Count]
    """How many shards each host wrote."""


class StoreDecoded(Document):
    """The decoded, memory-mapped copy of a store on this node."""

    bytes: Count
    """Bytes that it takes."""
    in_use: bool
    """Whether a process of this node has it mapped."""


class StoreDocument(StoreEntry):
    """What `akd-dist stores show --json` prints."""

    store: str
    """Path or URI of its folder."""
    receipts: StoreReceipts
    """What its shards took, and who wrote them."""
    decoded: StoreDecoded | None
    """Its decoded copy under the cache root; null if there is none."""
    manifest: dict[str, Any] | None
    """The seal; null for an unsealed store."""


class StoreDamage(Document):
    """A part of a store that is not what was sealed."""

    key: str
    """The object, relative to the store's folder."""
    problem: str
    """What is wrong with it."""


class VerifyDocument(Document):
    """What `akd-dist stores verify --json` prints, damaged or not."""

    id: str
    """The store's id."""
    damages: list[StoreDamage]
    """What is damaged; empty for a store that is what was sealed."""


class RepairDocument(Document):
    """What `akd-dist stores repair --json` prints."""

    id: str
    """The store's id."""
    repaired: list[str]
    """Keys of the shards that were computed again, relative to the store's arrays."""


class StoreRemoval(Document):
    """A store that `akd-dist stores gc` was asked for."""

    id: str
    """Its id."""
    bytes: Count
    """Size of its shards."""
    kept: str | None
    """Why it stays; null if it went, or would go."""


class StoreProblem(Document):
    """What could not be looked at; everything else was."""

    id: str
    """Its name under the store root."""
    problem: str
    """Why it could not."""


class GcDocument(Document):
    """What `akd-dist stores gc --json` prints."""

    dry_run: bool
    """Whether nothing was removed."""
    removed: list[str]
    """Keys of what interrupted runs had left."""
    stores: list[StoreRemoval]
    """Stores as old, or unused for as long, as was asked for."""
    problems: list[StoreProblem]
    """What could not be read or removed: damaged, or not this user's."""


class Metrics(Document):
    """Metrics of a model on one split: those of the task, and the loss where it was measured. Higher is better."""

    accuracy: Share | None = None
    """Classification: share of rows whose first class is the label."""
    f1: Share | None = None
    """Classification: F1 of class 1 where there are two classes, else the mean of all that occur."""
    matthews: Correlation | None = None
    """Classification: Matthews' correlation of predicted and true classes; 0 where it is undefined."""
    pearson: Correlation | None = None
    """Regression: Pearson's correlation of predictions and labels; 0 where it is undefined."""
    spearman: Correlation | None = None
    """Regression: Spearman's correlation, of ranks; 0 where it is undefined."""
    loss: float | None = None
    """Mean cross-entropy, or mean squared error for regression, where it was measured and is finite."""


class EpochRecord(Document):
    """A line of a student's metrics.jsonl: an epoch behind it."""

    model_config = ConfigDict(extra="ignore")

    epoch: Count
    """Its number over all stages, from 0."""
    stage: str
    """The stage that it belongs to."""
    temperature: int | None = None
    """The temperature; null where nothing is annealed."""
    phi: float | None = None
    """The factor on the teacher's logits; null where nothing is annealed."""
    psi: float | None = None
    """The weight of the labels; null but in Continuation-KD."""
    train_loss: float
    """Mean loss over the train rows."""
    validation: Metrics | None
    """Metrics on the validation rows."""


class FleetTeacher(Document):
    """The teacher of a run, as its stores describe it."""

    model: str
    """Label of its architecture."""
    parameters: Count
    """Number of its weights."""
    test: Metrics
    """Its metrics on the test rows."""
    fingerprint: str
    """The sha256 of its weights and architecture."""


class FleetAssistant(FleetTeacher):
    """A model between teacher and students, as its stores describe it."""

    agreement: Share | None
    """Share of test rows where assistant and teacher choose the same class."""
    store: str
    """The train store of its logits."""


class FleetStudent(Document):
    """One student of a run."""

    name: str
    """Its folder under students/."""
    model: str
    """Label of its architecture."""
    parameters: Count | None
    """Number of its weights."""
    objective: str
    """Kind of its objective."""
    tau_max: int | None
    """The temperature that annealing starts from; null without annealing."""
    seed: int
    """Governs initialisation and dropout."""
    state: Literal["done", "diverged", "failed"]
    """How its training ended."""
    reason: str | None
    """Why it did not succeed, and the log that says more."""
    epochs: Count
    """Epochs trained, over all stages."""
    validation: Metrics | None
    """Metrics of the delivered weights on the validation rows, which picked them."""
    test: Metrics | None
    """Metrics of the delivered weights on the test rows; measured once."""
    agreement: Share | None
    """Share of test rows where it chooses the class of the recipe's teacher, whomever it learned from; null for
    regression."""
    seconds: float
    """Time spent on its training."""
    stage1_from: str | None = None
    """The student whose stage I it went on from, which would have been the same; null where it trained its own."""
    attempt: int | None = None
    """The attempt of the run, from 1, in which it ended."""
    path: str
    """Its folder."""
    store: str
    """The store that it was trained from."""
    teacher: str
    """Fingerprint of the model that it learned from: the teacher, or its last assistant."""


class EconomicsOfViews(Document):
    """What a store with so many views costs and saves with the run's students."""

    views: Count
    """Views of each train row, each of them one pass of the model."""
    cache_seconds: float
    """Computing such a store, with those of the validation and test rows."""
    seconds_saved: float
    """What training with the model in the loop would have taken more; less than nothing where it does not pay."""
    break_even_students: float | None
    """Students after which it is paid for; null where none read logits."""


class Economics(Document):
    """What storing one model's logits cost, and what it saved, from measured times. See docs/report.md for formulas.

    Times are seconds of work in the tasks that computed shards, with `threads` threads each, not wall-clock time.
    """

    role: Literal["teacher", "assistant"]
    """Whose logits."""
    model: str
    """Label of its architecture."""
    store: str
    """The train store of its logits."""
    rows: Count
    """Train rows: one pass goes over them once."""
    views: Count
    """Views in the store."""
    students: Count
    """Students that trained on its logits themselves."""
    epochs: Count
    """Epochs that read its logits, over all students; each would have been a pass with the model in the loop."""
    shared_epochs: Count
    """Such epochs that students did not train because another's stage I was theirs; not in `epochs`."""
    passes_run: Count
    """Passes that filled the store: one for each view."""
    passes_saved: int
    """`epochs` less `passes_run`."""
    threads: Count
    """Threads that the model computed with."""
    device: str
    """Kind of device that it computed on."""
    hosts: list[str]
    """Machines that computed timed shards."""
    timed_rows: Count
    """Rows of the train store whose time was measured, each view counted."""
    seconds_per_pass: float | None
    """One pass over the train rows, at the speed of the median shard; null where nothing was timed, as what follows."""
    other_seconds: float
    """Measured time of the validation and test rows."""
    cache_seconds: float | None
    """What `passes_run` passes took, with what was loaded for them, and the validation and test rows."""
    in_the_loop_seconds: float | None
    """`epochs` passes: what the model would have taken in the loop."""
    seconds_saved: float | None
    """`in_the_loop_seconds` less `cache_seconds`."""
    break_even_students: float | None
    """Students after which the cache is paid for, at this run's epochs a student; null where none read logits."""
    break_even_epochs: float | None
    """Epochs after which it is paid for."""
    training_seconds: float | None
    """What training the model took, where it was trained here; in no other number, as it has to exist anyhow."""
    by_views: list[EconomicsOfViews]
    """The same with one view stored, and with as many as are."""


class FleetDocument(Document):
    """What `akd-dist train-students --json` prints, and what a run keeps in fleet.json."""

    run: str
    """The run's folder."""
    store: str
    """The train store."""
    task: Task
    """What a label is."""
    metric: Metric
    """The primary metric: it picked the best epochs, and heads the tables."""
    teacher: FleetTeacher
    """Whom the students learned from."""
    assistants: list[FleetAssistant] = []
    """The models between it and the students of objective takd, from the one below the teacher to the last."""
    students: list[FleetStudent]
    """Every student of the recipe, in its order."""
    cohorts: Count
    """Ray Train runs that it took."""
    seconds: float
    """Wall-clock time of the command that finished the run."""
    economics: list[Economics] = []
    """What the stored logits cost and saved: those of the teacher, and of the last assistant where students read them.
    """


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


class ComparedModel(Document):
    """The teacher, or an assistant, of a comparison."""

    model: str
    """Label of its architecture."""
    parameters: Count
    """Number of its weights."""
    test: float
    """Its primary metric on the test rows."""
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
    reason: str | None
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


class CompareDocument(Document):
    """What `akd-dist compare --json` prints, and what its run keeps in comparison.json."""

    run: str
    """The run's folder."""
    command: str
    """What makes the same table again."""
    task: Literal["classification", "regression"]
    """What a label is."""
    metric: str
    """The primary metric, which all numbers of the table are of."""
    confidence: float
    """Of the intervals."""
    rows: dict[Literal["train", "validation", "test"], Count]
    """Rows of each split."""
    teacher: ComparedModel
    """Whom the students learned from."""
    assistants: list[ComparedModel]
    """The models between it and the students of objective takd."""
    table: list[ComparedRow]
    """The rows, model by model; from scratch, KD, TAKD, Annealing-KD, Continuation-KD."""
    missing: list[Literal["takd"]]
    """Objectives that the recipe cannot be compared under."""


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
    students: Count
    """How many there are."""
    seeds: list[int]
    """Seeds of those that finished."""
    test: Estimate | None
    """The primary metric on the test rows."""
    agreement: Share | None
    """Mean share of test rows where student and teacher choose the same class."""
    seconds: float | None
    """Mean training time of one."""
    pareto: bool
    """Whether no other group is better with as few parameters, or as good with fewer."""


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
    teacher: float
    """The teacher's, on the test rows."""
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
    differences: list[Difference]
    """Where students and teacher differ; empty for regression, and for runs that did not keep it."""
    economics: list[Economics]
    """What the stored logits cost and saved; empty for runs that did not measure it."""


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


class RunsCompared(Document):
    """Several runs beside each other."""

    report: str
    """The page."""
    same_test_rows: bool | None
    """Whether all were measured on the same test rows; null where a run does not say."""
    groups: list[RunDifference]
    """The groups of all runs; those of one name are the same students in other runs."""


class ReportDocument(Document):
    """What `akd-dist report --json` prints."""

    runs: list[ReportedRun]
    """The runs, in the order in which they were named."""
    comparison: RunsCompared | None
    """Several runs in one page; null for a single run."""


class StudentProgress(Document):
    """How far a student is."""

    name: str
    """Its folder under students/."""
    state: Literal["waiting", "training", "stopped", "done", "diverged", "failed"]
    """`waiting`: it has taken no step yet; `stopped`: it has, and the next command goes on from its checkpoint."""
    waits_for: str | None = None
    """Another student that it waits for, or what else it waits for; null where that is only its turn."""
    stage: str | None = None
    """The stage that it is in, or ended in; null before its first."""
    epoch: Count = 0
    """Epochs behind it, over all stages."""
    epochs: Count
    """Epochs of all its stages."""
    epochs_shared: Count = 0
    """Those that another student computes for it: of a stage I that they share."""
    temperature: int | None = None
    """The temperature of its epoch; null where nothing is annealed."""
    loss: float | None = None
    """Mean train loss of the epoch so far; of the epoch before at the start of one."""
    validation: float | None = None
    """The primary metric on the validation rows after its latest epoch; of the delivered weights once it is done."""
    steps: Count = 0
    """Steps behind it; all of them once it has ended, however it did."""
    steps_total: Count
    """Steps of all epochs that it computes itself."""
    rows_per_second: float = 0.0
    """Train rows that it has learned from per second, lately."""
    steps_per_second: float = 0.0
    """Steps per second, lately."""
    seconds_left: float | None = None
    """Seconds to its end at that pace; null while nothing is known of it."""
    reason: str | None = None
    """Why it did not succeed."""


class CohortProgress(Document):
    """What the worker of a cohort leaves in control/ every half second."""

    training: bool
    """Whether any of its students has steps left to take."""
    at: float
    """When it was written, in seconds since 1970."""
    students: list[StudentProgress]
    """Every student of the cohort that had not ended before."""


class CohortStatus(Document):
    """A cohort that does not train yet."""

    state: Literal["waiting", "starting"]
    """`starting`: its workers are, and have taken no step."""
    students: list[str]
    """Who will train in it."""
    waits_for: str | None = None
    """The room that it waits for."""


class FleetPlan(Document):
    """What the driver leaves in control/ while it trains: what there is to do, and what has not begun."""

    attempt: Count
    """Which attempt of the run this is: progress of others does not count."""
    at: float
    """When it was written, in seconds since 1970."""
    metric: str
    """The primary metric."""
    students: list[StudentProgress]
    """Every student of the recipe in its order, as if none had begun."""
    cohorts: list[CohortStatus]
    """The cohorts that do not train yet."""


class RunDriver(Document):
    """The process that holds a run, or that was the last to."""

    host: str
    """Its machine."""
    pid: int
    """Its process id there."""
    birth: str | None
    """What tells it from a later process of that id, where the system says so."""
    since: float
    """When it took the run, in seconds since 1970."""
    command: str
    """What was typed."""
    folder: str
    """Where it was typed."""
    ended: float | None = None
    """When it let go of the run; null while it holds it, and if it was killed."""


class StatusDocument(Document):
    """What `akd-dist status --json` prints."""

    run: str
    """The run's folder."""
    state: Literal["preparing", "training", "stopped", "done"]
    """`preparing`: it is held, and no student trains yet; `stopped`: nobody works on it, and it is not done."""
    driver: RunDriver | None
    """Who holds it, or was the last to; null where nothing says so."""
    alive: bool | None
    """Whether that process holds it now; null where that cannot be seen from here."""
    at: float | None
    """The last sign of life, in seconds since 1970; null without one."""
    metric: str | None
    """The primary metric; null before the first training."""
    steps: Count
    """Steps behind all students."""
    steps_total: Count
    """Steps of all students."""
    steps_per_second: float
    """Steps per second, lately, over all students."""
    rows_per_second: float
    """Train rows per second, lately, over all students."""
    seconds_left: float | None
    """Seconds to the end at that pace; null while nothing is known of it."""
    over: Count
    """Students that have ended, however they did."""
    cohorts: list[CohortStatus]
    """The cohorts that do not train yet."""
    students: list[StudentProgress]
    """Every student, in the order of the recipe."""


class EvaluatedModel(Document):
    """A model and what was measured of it."""

    path: str
    """Its folder or URI."""
    model: str
    """Label of its architecture."""
    parameters: Count
    """Number of its weights."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    precision: Precision
    """What it computed with: as in its run, where it lies in one; else the precision of its weights."""
    metrics: Metrics
    """Its metrics on the data."""


class OtherModel(EvaluatedModel):
    """A model that was compared with the student; nothing is counted for regression."""

    agreement: Share | None
    """Share of rows where both choose the same class."""
    both_right: Count | None
    """Rows that both get right."""
    student_right: Count | None
    """Rows that the student alone gets right."""
    other_right: Count | None
    """Rows that this model alone gets right."""
    both_wrong: Count | None
    """Rows that both get wrong, alike or not."""


class EvaluationDocument(Document):
    """What `akd-dist evaluate --json` prints."""

    student: EvaluatedModel
    """The model that was asked for."""
    others: list[OtherModel]
    """Those that it was compared with."""
    data: str
    """The data, as named."""
    split: Literal["train", "validation", "test"] | None
    """Of a recipe; else null."""
    rows: Count
    """How many."""
    task: Task
    """What a label is."""
    device: Literal["cpu", "cuda"]
    """Where it was computed."""
    seconds: float
    """Wall-clock time."""


class PredictionDocument(Document):
    """What `akd-dist predict --json` prints."""

    student: str
    """The model's folder or URI."""
    model: str
    """Label of its architecture."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    data: str
    """The data, as named."""
    split: Literal["train", "validation", "test"] | None
    """Of a recipe; else null."""
    out: str
    """The Parquet file."""
    rows: Count
    """How many."""
    columns: list[Literal["row", "predicted", "probability", "logits", "label"]]
    """What the file holds of each row."""
    bytes: Count
    """Size of the file."""
    device: Literal["cpu", "cuda"]
    """Where it was computed."""
    seconds: float
    """Wall-clock time."""


class ExportDocument(Document):
    """What `akd-dist export --json` prints."""

    student: str
    """The model's folder or URI."""
    model: str
    """Label of its architecture."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    to: Literal["onnx", "torch-export", "huggingface"]
    """The format."""
    out: str
    """The file, or the folder of a Hugging Face model."""
    bytes: Count
    """Its size."""
    inputs: str
    """Dtype, shape and meaning of what it takes."""
    outputs: str
    """Dtype, shape and meaning of what it gives."""
    data: str | None
    """The data that it was compared on; null for random inputs."""
    split: Literal["train", "validation", "test"] | None
    """Of a recipe; else null."""
    rows: Count
    """How many of them."""
    difference: float
    """The largest difference between a logit of the export and torch's."""
    tolerance: float
    """The largest that would have been allowed."""
    same_class: Count | None
    """Rows for which both choose the same class; null for regression."""
    notes: list[str]
    """What to know besides."""
    seconds: float
    """Wall-clock time."""


class Refusal(Document):
    """Why a command refused."""

    code: int
    """The exit code."""
    what: str
    """What is wrong, with the name of the thing."""
    got: str | None
    """What was found."""
    expected: str | None
    """What would have been right."""
    next: str | None
    """What to do about it."""


class ErrorDocument(Document):
    """What a command prints with --json when it refuses."""

    error: Refusal
    """The refusal."""


def schemas() -> dict[str, dict[str, Any]]:
    """Every JSON Schema of the package, by name."""
    documents: dict[str, type[Document]] = {
        "cache": CacheDocument,
        "cache-plan": PlanDocument,
        "fleet-plan": FleetPlanDocument,
        "stores": StoresDocument,
        "store": StoreDocument,
        "verify": VerifyDocument,
        "repair": RepairDocument,
        "gc": GcDocument,
        "fleet": FleetDocument,
        "compare": CompareDocument,
        "report": ReportDocument,
        "status": StatusDocument,
        "evaluate": EvaluationDocument,
        "predict": PredictionDocument,
        "export": ExportDocument,
        "error": ErrorDocument,
    }
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    generated = {name: dialect | document.model_json_schema() for name, document in documents.items()}
    return {"recipe": recipe_schema(), **generated}


def schema_text(name: str) -> str:
    """A schema as it ships."""
    return json.dumps(schemas()[name], indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in schemas():
        (SCHEMAS / f"{name}.schema.json").write_text(schema_text(name))
