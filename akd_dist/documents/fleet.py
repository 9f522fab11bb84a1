"""What training leaves in a run and prints: a record for each epoch, a result for each student, `fleet.json`."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from akd_dist.documents.base import Correlation, Count, Document, FolderName, Moment, Place, Share, Told
from akd_dist.recipe import METRICS, Metric, Split, Task

Entropy = Annotated[float, Field(ge=0)]


class Metrics(Document):
    """Metrics of a model on one split: those of the task, and the loss where it was measured.

    More is better, but for cross_entropy and what is made of it, divergence and loss.
    """

    accuracy: Share | None = None
    """Classification: share of rows whose first class is the label. Language models: share of targets whose likeliest
    token is the next one."""
    f1: Share | None = None
    """Classification: F1 of class 1 where there are two classes, else the mean of all that occur."""
    matthews: Correlation | None = None
    """Classification: Matthews' correlation of predicted and true classes; 0 where it is undefined."""
    pearson: Correlation | None = None
    """Regression: Pearson's correlation of predictions and labels; 0 where it is undefined."""
    spearman: Correlation | None = None
    """Regression: Spearman's correlation, of ranks; 0 where it is undefined."""
    custom: float | None = None
    """The recipe's own metric, where it has one."""
    cross_entropy: Entropy | None = None
    """Language models: mean over targets of -log of the probability of the next token, in nats."""
    perplexity: Entropy | None = None
    """Language models: exp of the cross-entropy."""
    bits_per_byte: Entropy | None = None
    """Language models: bits for each byte of the text that targets stand for, which compares models of different
    tokenizers; null where the tokenizer does not tell its bytes."""
    agreement: Share | None = None
    """Language models: share of targets where the teacher's likeliest token is its own."""
    divergence: float | None = None
    """Language models: mean KL(teacher || model) over targets at T = 1, in nats, as the store knows the teacher."""
    loss: float | None = None
    """Mean cross-entropy, or mean squared error for regression, where it was measured and is finite."""

    def __getitem__(self, name: str) -> float:
        """A metric that was measured."""
        if (value := self.get(name)) is None:
            raise KeyError(name)
        return value

    def get(self, name: str) -> float | None:
        """A metric, or None where it was not measured."""
        value: float | None = getattr(self, name)
        return value


class EpochRecord(Document):
    """A line of a student's metrics.jsonl: an epoch behind it."""

    model_config = ConfigDict(extra="ignore")

    epoch: Count
    """Its number over all stages, from 0."""
    stage: str
    """The stage that it belongs to."""
    stage_epoch: Count = 0
    """Its number within the stage, from 0."""
    temperature: int | None = None
    """The temperature; null where nothing is annealed."""
    phi: float | None = None
    """The factor on the teacher's logits; null where nothing is annealed."""
    psi: float | None = None
    """The weight of the labels; null but in Continuation-KD."""
    lr: float | None = None
    """The learning rate at its end."""
    train_loss: float
    """Mean loss over the train rows."""
    validation: Metrics | None
    """Metrics on the validation rows."""
    seconds: float = 0.0
    """Time spent on the student's training so far."""


class FleetMember(Document):
    """One teacher of an ensemble."""

    model: str
    """Label of its architecture; `imported logits` where there is no model."""
    parameters: Count | None
    """Number of its weights; null where they are not known."""
    store: Place
    """The train store of its logits."""
    fingerprint: str
    """The sha256 of its weights and architecture; of its logits where there is no model."""
    share: Share
    """How much it counts; together 1."""


class FleetTeacher(Document):
    """The teacher of a run, as its stores describe it."""

    model: str
    """Label of its architecture; `imported logits` where there is no model."""
    parameters: Count | None
    """Number of its weights; null where they are not known."""
    test: Metrics | None
    """Its metrics on the test rows; null where it has no logits of these."""
    fingerprint: str
    """The sha256 of its weights and architecture; of its logits where there is no model; of all members of an ensemble.
    """
    members: list[FleetMember] = []
    """The teachers of an ensemble; empty for a teacher alone."""

    def metric(self, name: str) -> float | None:
        """A metric on the test rows; None where it was not measured."""
        return None if self.test is None else self.test.get(name)


class FleetAssistant(FleetTeacher):
    """A model between teacher and students, as its stores describe it."""

    agreement: Share | None
    """Share of test rows where assistant and teacher choose the same class."""
    store: Place
    """The train store of its logits."""


Stage1Loss = Literal["squared", "cross_entropy"]
"""What stage I of Annealing-KD compares logits by."""


class StudentResult(Document):
    """What a student leaves in result.json when it ends."""

    name: FolderName
    """Its folder under students/."""
    model: str
    """Label of its architecture."""
    parameters: Count | None
    """Number of its weights."""
    objective: str
    """Kind of its objective."""
    tau_max: int | None
    """The temperature that annealing starts from; null without annealing."""
    stage1_loss: Stage1Loss | None = None
    """What stage I of Annealing-KD compared logits by; null for others, and in results of earlier versions, where it
    was squared."""
    seed: int
    """Governs initialisation and dropout."""
    state: Literal["done", "diverged", "failed"]
    """How its training ended."""
    reason: Told | None
    """Why it did not succeed, and the log that says more."""
    epochs: Count
    """Epochs trained, over all stages."""
    validation: Metrics | None
    """Metrics of the delivered weights on the validation rows, which picked them."""
    test: Metrics | None
    """Metrics of the delivered weights on the test rows; measured once."""
    agreement: Share | None
    """Share of test rows where it chooses the class of the recipe's teacher, whomever it learned from; null for
    regression. Of language models the same of targets and tokens, as in `test`."""
    seconds: float
    """Time spent on its training."""
    stage1_from: str | None = None
    """The student whose stage I it went on from, which would have been the same: its name, with that of its run and a
    slash before it where that is another one. Null where it trained its own."""
    attempt: int | None = None
    """The attempt of the run, from 1, in which it ended."""
    path: Place
    """Its folder."""


class FleetStudent(StudentResult):
    """One student of a run."""

    store: Place
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
    """What storing one model's logits cost, and what it saved, from measured times. Formulas: docs/howto/report.md.

    Times are seconds of work in the tasks that computed shards, with `threads` threads each, not wall-clock time.
    """

    role: Literal["teacher", "assistant"]
    """Whose logits."""
    model: str
    """Label of its architecture."""
    store: Place
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


class RefusedStudent(Document):
    """A student of the recipe that the run has otherwise: nothing of it was touched."""

    name: FolderName
    """Its folder under students/."""
    differences: list[Told]
    """How it differs, as `optimizer.lr: 0.1 -> 0.2`: what the run has, and what the recipe says."""

    @property
    def told(self) -> str:
        """In a line."""
        return f"{self.name}, which the run has otherwise ({'; '.join(self.differences)})"


class FleetDocument(Document):
    """What `akd-dist train-students --json` prints, and what a run keeps in fleet.json."""

    run: Place
    """The run's folder."""
    store: Place
    """The train store."""
    stores_named: bool | None = None
    """Whether the recipe names stored logits as a teacher: there are none for the rows of another data.seed. Null in
    runs of earlier versions, which do not say."""
    task: Task
    """What a label is."""
    metric: Metric
    """The primary metric: it picked the best epochs, and heads the tables."""
    metric_name: str | None = None
    """The function that measures it, where it is one of the user's own (`custom`); null for others."""
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
    test_withheld: bool = False
    """Whether the test rows were not read, as by the trials of a search: `test` of its students is null."""
    taken_out: list[FolderName] = []
    """Students of the run that the recipe has no more: they lie in its folder, and are not in `students`."""
    refused: list[RefusedStudent] = []
    """Students of the recipe that the run has otherwise: neither trained nor in `students`."""
    renamed: dict[str, FolderName] = {}
    """What the recipe calls students that the run has by another name -> that name."""

    @model_validator(mode="after")
    def _measured_by_its_metric(self) -> Self:
        """Tables and pages show the primary metric of all whose test metrics are there, and of all that are done."""
        if self.metric not in (*METRICS[self.task], "custom"):
            raise ValueError(f"metric: {self.metric} is none of {self.task}, which has {', '.join(METRICS[self.task])}")
        # Of a teacher that is a store of train rows alone, nothing is known of the test rows.
        measured: dict[str, Metrics | None] = {} if self.teacher.test is None else {"teacher.test": self.teacher.test}
        measured |= {f"assistants.{number}.test": one.test for number, one in enumerate(self.assistants)}
        measured |= {
            f"students.{number}.test": one.test
            for number, one in enumerate(self.students)
            if one.test is not None or (one.state == "done" and not self.test_withheld)
        }
        for field, metrics in measured.items():
            if metrics is None or metrics.get(self.metric) is None:
                raise ValueError(f"{field}: no {self.metric}, which is the run's metric")
        return self


class RunRows(Document):
    """The rows of a split, by which a run is compared with another one of its name."""

    model_config = ConfigDict(extra="allow")

    fingerprint: str
    """The sha256 of their content and order."""
    blocks: list[str]
    """The sha256 of each block of rows."""
    rows: Count | None = None
    """How many rows there are."""
    meaning: dict[str, Any] = {}
    """What inputs and labels are."""


class RunChange(Document):
    """Students that came into a run, and that were taken out of it, at once."""

    at: Moment
    """When, in seconds since 1970."""
    added: list[FolderName]
    """Who came, or came back."""
    taken_out: list[FolderName]
    """Who was taken out."""


class Stacking(Document):
    """Whether steps of an architecture are taken in stacks, as a trial found when it came into the run."""

    model: str
    """Label of the architecture."""
    stacked: bool
    """Whether students of it step together, in one pass over all of them."""
    why: str
    """What speaks for it, or against."""


class RunIdentity(Document):
    """What a run keeps in identity.json: the resolved recipe without placement and places, and what these lead to."""

    model_config = ConfigDict(extra="allow")

    teacher: dict[str, Any]
    """The recipe's teacher, and its fingerprint."""
    dataset: dict[Split, str]
    """The fingerprint of each split."""
    students: dict[str, dict[str, Any]]
    """The students of the recipe, by name."""
    rows: dict[Split, RunRows] = {}
    """What is known of the rows of each split."""
    taken_out: dict[str, dict[str, Any]] = {}
    """Students that were in the recipe once and lie in the run, by name."""
    history: list[RunChange] = []
    """When students came and went, since the run began; the earliest first."""
    stacking: dict[str, Stacking] | None = None
    """How steps are taken, by a digest of what that depends on; null in a run of before, where nothing is stacked."""

    @field_validator("students", "taken_out")
    @classmethod
    def _with_objectives(cls, students: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, student in students.items():
            if not isinstance(student.get("objective"), dict):
                raise ValueError(f"{name}.objective: not a mapping")
        return students
