"""A finished model at work: its metrics on data, its agreement with others, and what it says of every row.

evaluate("runs/digits/students/mlp-16-annealing_kd-t5-s0", Asked("runs/digits"), cache_root)
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from akd_dist import recipe
from akd_dist.data.predictions import predictions_file
from akd_dist.data.row_cache import Progress
from akd_dist.distill.losses import label_losses
from akd_dist.distill.metrics import measure, predictions
from akd_dist.documents.use import EvaluatedModel, EvaluationDocument, OtherModel, PredictionDocument
from akd_dist.models.card import ModelCard
from akd_dist.serve.examples import Batch, DataRequest, Examples, open_examples
from akd_dist.serve.export_files import refuse_existing
from akd_dist.serve.language import evaluate_texts
from akd_dist.serve.language_predictions import predict_texts
from akd_dist.serve.served import Served, as_in_training, open_model

_SHARED = 1 << 22
"""Numbers that are made probabilities at a time."""


def evaluate(
    student: str,
    asked: DataRequest,
    cache_root: Path,
    *,
    others: Sequence[str] = (),
    device: recipe.Device = "cpu",
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> EvaluationDocument:
    """Every metric of a model on data; and of others, with how far they agree with it.

    On the test rows of its own recipe, and on the device of its run, these are the figures in fleet.json, on a CPU to
    the last bit: batches, threads and precision are the same.

    Args:
        student: a model folder, absolute or `s3://`.
        asked: the data, which must have labels.
        cache_root: where a recipe's rows are prepared.
        others: further model folders, for the same inputs and classes.
        device: `cpu` or `cuda`.
        on_progress: called with what is being done, rows done, and rows in all.
        on_note: called with a line, where something of the data is left out without being wrong.

    Raises:
        RecipeError, RefusedError, DamagedError, MachineError: as `open_model` and `examples.open_examples`.
    """
    started = time.monotonic()
    trusted = asked.trusted()
    ours, *theirs = [open_model(uri, device, trusted) for uri in (student, *others)]
    if ours.card.blocks is not None:
        return evaluate_texts([ours, *theirs], asked, cache_root, on_progress=on_progress, on_note=on_note)
    with open_examples(asked, ours.card, ours.home, cache_root, need_labels=True, on_progress=on_progress) as examples:
        for other in theirs:
            examples.check(other.card, other.home.uri)
        tallies = [_Tally(model, _Column(examples.rows)) for model in (ours, *theirs)]
        labels = _Column(examples.rows)
        with as_in_training(ours):
            for inputs, known in _shown(examples, "evaluating", on_progress, on_note):
                assert known is not None
                labels.add(known)
                for tally in tallies:
                    tally.add(inputs, known)
    truth = torch.from_numpy(labels.values)
    first, *rest = tallies
    return EvaluationDocument(
        student=first.measured(truth),
        others=[_compared(first, other, truth) for other in rest],
        data=examples.name,
        split=examples.split,
        rows=examples.rows,
        task=ours.card.task,
        device=device,
        seconds=round(time.monotonic() - started, 3),
    )


class _Column:
    """A value for each row, in one array from the start: many small ones would cut the free memory to pieces."""

    def __init__(self, rows: int) -> None:
        self.rows, self.done = rows, 0
        self.values: np.ndarray = np.empty(0)

    def add(self, values: np.ndarray) -> None:
        """The values of the next rows; the first decide on the dtype."""
        if not self.done:
            self.values = np.empty(self.rows, values.dtype)
        self.values[self.done : self.done + len(values)] = values
        self.done += len(values)


@dataclass
class _Tally:
    """What a model has said so far: class ids int64, or numbers."""

    model: Served
    said: _Column
    loss: float = 0.0

    def add(self, inputs: np.ndarray, labels: np.ndarray) -> None:
        """Run the model on a batch, with its own threads; sums go as in `student.evaluate`."""
        # Models that are compared may come of runs with other numbers of threads, on which the last bits depend.
        torch.set_num_threads(self.model.threads)
        logits = self.model.logits(inputs)
        truth = torch.from_numpy(np.array(labels)).to(logits.device)
        self.loss += float(label_losses(logits, truth).double().sum())
        self.said.add(predictions(self.model.card.task, logits).cpu().numpy())

    def measured(self, truth: torch.Tensor) -> EvaluatedModel:
        """The model and its metrics."""
        card = self.model.card
        metrics = measure(card.task, torch.from_numpy(self.said.values), truth, card.classes)
        metrics |= {"loss": self.loss / len(truth)}
        return self.model.measured(metrics)


def _compared(ours: _Tally, theirs: _Tally, truth: torch.Tensor) -> OtherModel:
    """Another model, how far it says the same, and who is right; nothing of that where there are no classes."""
    first, second, labels = ours.said.values, theirs.said.values, truth.numpy()
    right, other = first == labels, second == labels
    classes = ours.model.card.task == "classification"
    counts = [
        int(rows.sum()) if classes else None
        for rows in (right & other, right & ~other, ~right & other, ~right & ~other)
    ]
    both_right, student_right, other_right, both_wrong = counts
    return OtherModel(
        **dict(theirs.measured(truth)),
        agreement=float(np.mean(first == second)) if classes else None,
        both_right=both_right,
        student_right=student_right,
        other_right=other_right,
        both_wrong=both_wrong,
    )


def predict(
    student: str,
    asked: DataRequest,
    out: Path,
    cache_root: Path,
    *,
    with_logits: bool = True,
    overwrite: bool = False,
    device: recipe.Device = "cpu",
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictionDocument:
    """What a model says of every row, as a Parquet file: whole, or absent.

    Columns: `row` int64, counted from 0; `file`, of a folder of pictures or of tar files; `predicted`, the class id
    int64, or a number, float64, for regression; `class_name`, what that class is called, where the model's card says;
    `probability` float32, of that class, by softmax (classification); `logits`, float32 [classes]; `label`, int64 or
    float32, where the data have one. The file's metadata say under `akd_dist` which model it was, and the names of its
    classes. Memory does not grow with the rows. Of language models what they say of each token instead, see
    `language_predictions.predict_texts`.

    Args:
        student: a model folder, absolute or `s3://`.
        asked: the data, with labels or without.
        out: the file.
        cache_root: where a recipe's rows are prepared.
        with_logits: whether to write the column of logits, the largest where there are many classes.
        overwrite: whether `out` may take the place of another file.
        device: `cpu` or `cuda`.
        on_progress: called with what is being done, rows done, and rows in all.
        on_note: called with a line, where something of the data is left out without being wrong.

    Raises:
        RecipeError: `out` is there already, or options do not go together.
        RefusedError, DamagedError, MachineError: as `open_model` and `examples.open_examples`; or `out` cannot be
            written.
    """
    started = time.monotonic()
    refuse_existing(out, overwrite)
    model = open_model(student, device, asked.trusted())
    if model.card.blocks is not None:
        return predict_texts(
            model, asked, out, cache_root, overwrite=overwrite, on_progress=on_progress, on_note=on_note
        )
    with open_examples(asked, model.card, model.home, cache_root, on_progress=on_progress) as examples:
        schema = _schema(model.card, examples, with_logits)
        at = 0
        with as_in_training(model), predictions_file(out, schema, overwrite=overwrite) as write:
            for inputs, labels in _shown(examples, "predicting", on_progress, on_note):
                names = None if examples.names is None else examples.names(at, at + len(inputs))
                write(_table(schema, model, at, inputs, labels, names))
                at += len(inputs)
    return PredictionDocument(
        student=student,
        model=model.card.model.label,
        fingerprint=model.card.fingerprint,
        data=examples.name,
        split=examples.split,
        out=str(out),
        rows=examples.rows,
        columns=schema.names,
        bytes=out.stat().st_size,
        device=device,
        seconds=round(time.monotonic() - started, 3),
    )


def _schema(card: ModelCard, examples: Examples, with_logits: bool) -> Any:
    classes = card.task == "classification"
    fields = [("row", pa.int64()), ("predicted", pa.int64() if classes else pa.float64())]
    if examples.names is not None:
        fields.insert(1, ("file", pa.string()))
    if classes and card.class_names is not None:
        fields.append(("class_name", pa.string()))
    if classes:
        fields.append(("probability", pa.float32()))
    if with_logits:
        fields.append(("logits", pa.list_(pa.float32())))
    if examples.labelled:
        fields.append(("label", pa.int64() if classes else pa.float32()))
    told = {
        "model": card.model.label,
        "fingerprint": card.fingerprint,
        "task": card.task,
        "class_names": card.class_names,
    }
    return pa.schema(fields, metadata={"akd_dist": json.dumps(told)})


def _table(
    schema: Any, model: Served, start: int, inputs: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None
) -> Any:
    """A batch as the file has it."""
    logits = model.logits(inputs).cpu()
    said = predictions(model.card.task, logits)
    columns: dict[str, Any] = {
        "row": np.arange(start, start + len(inputs)),
        "file": names,
        "predicted": said.numpy(),
        "label": labels,
    }
    if "class_name" in schema.names:
        columns["class_name"] = pa.array(model.card.class_names).take(pa.array(said.numpy()))
    if "probability" in schema.names:
        columns["probability"] = _shares(logits, said).numpy()
    if "logits" in schema.names:
        ends = np.arange(len(logits) + 1, dtype=np.int32) * logits.shape[1]
        columns["logits"] = pa.ListArray.from_arrays(ends, logits.float().numpy().reshape(-1))
    arrays = [columns[one.name] for one in schema]
    return pa.table(
        [
            values if isinstance(values, pa.Array) else pa.array(values, one.type)
            for one, values in zip(schema, arrays, strict=True)
        ],
        schema=schema,
    )


def _shares(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The probability of the class that is chosen of each row, float32 [n]: some rows at a time are in float64."""
    rows = max(1, _SHARED // logits.shape[1])
    parts = zip(torch.split(logits, rows), torch.split(chosen[:, None], rows), strict=True)
    return torch.cat([part.double().softmax(dim=1).gather(1, one)[:, 0].float() for part, one in parts])


def _shown(
    examples: Examples, what: str, on_progress: Progress | None, on_note: Callable[[str], None] | None
) -> Iterator[Batch]:
    """The batches, each told of once it is done with; what was left out is told at the end."""
    done = 0
    for batch in examples.batches():
        yield batch
        done += len(batch[0])
        if on_progress is not None:
            on_progress(what, done, examples.rows)
    if on_note is not None:
        for note in examples.notes():
            on_note(note)
