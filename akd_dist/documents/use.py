"""What `evaluate`, `predict`, `export` and `models import` print."""

from typing import Literal

from akd_dist.documents.base import Count, Document, Share
from akd_dist.documents.check import TeacherCheck
from akd_dist.documents.fleet import Metrics
from akd_dist.recipe import Device, Precision, Split, Target, Task

Column = Literal[
    "row",
    "file",
    "predicted",
    "class_name",
    "probability",
    "logits",
    "label",
    "tokens",
    "segments",
    "log_probabilities",
    "targets",
    "log_probability",
]


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
    """A model that was compared with the student; nothing is counted for regression. Of language models targets are
    counted, and tokens are what they choose."""

    agreement: Share | None
    """Share of rows where both choose the same class."""
    divergence: float | None = None
    """Language models: mean KL(this model || the student) over targets at T = 1, in nats."""
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
    split: Split | None
    """Of a recipe; else null."""
    rows: Count
    """How many: of language models blocks of a recipe, or documents of files."""
    targets: Count | None = None
    """Language models: how many tokens were predicted."""
    task: Task
    """What a label is."""
    device: Device
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
    split: Split | None
    """Of a recipe; else null."""
    out: str
    """The Parquet file."""
    rows: Count
    """How many."""
    columns: list[Column]
    """What the file holds of each row."""
    bytes: Count
    """Size of the file."""
    device: Device
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
    to: Target
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
    split: Split | None
    """Of a recipe; else null."""
    rows: Count
    """How many of them; of a language model, how many tokens."""
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


class GenerationDocument(Document):
    """What `akd-dist generate --json` prints."""

    student: str
    """The model's folder or URI."""
    model: str
    """Label of its architecture."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    prompt: str
    """The text that it continued."""
    text: str
    """What it made."""
    prompt_tokens: Count
    """Tokens of the prompt."""
    tokens: Count
    """Tokens that it made."""
    ended: Literal["text", "tokens"]
    """Why it stopped: the text came to its end, or it had as many tokens as were asked for."""
    temperature: float
    """What logits were divided by; 0 took the most likely."""
    top_p: float
    """The share of probability that was drawn from."""
    seed: int
    """Of the draws."""
    device: Device
    """Where it was computed."""
    seconds: float
    """Wall-clock time."""


class ModelImportDocument(Document):
    """What `akd-dist models import --json` prints."""

    out: str
    """The model folder."""
    checkpoint: str
    """The file, folder or URI that it was made from."""
    model: str
    """Label of its architecture."""
    parameters: Count
    """Number of its weights."""
    fingerprint: str
    """The sha256 of its weights and architecture."""
    bytes: Count
    """Size of the folder."""
    code: list[str]
    """What the `code` of a recipe that names the folder has to list, or `--trust` to say; none of built-in models."""
    notes: list[str]
    """What was taken off, left out and widened; empty where the file had been imported here before."""
    check: TeacherCheck
    """What it says of labelled rows."""
    seconds: float
    """Wall-clock time."""
