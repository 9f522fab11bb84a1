"""A finished language model at work: how likely it finds texts, how near it is to others, and what it says of tokens.

Nothing of size [targets, vocabulary] is there beyond a chunk, however many models are compared.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from akd_dist.data.packing import IDS, SEGMENTS, TARGETS
from akd_dist.data.predictions import predictions_file
from akd_dist.data.row_cache import Progress
from akd_dist.data.rows import Rows
from akd_dist.distill.language_step import states_at
from akd_dist.distill.output_head import Head, chunk_targets, parts
from akd_dist.distill.sparse_losses import judged_logits
from akd_dist.distill.teacher_targets import DenseTargets
from akd_dist.documents.fleet import Metrics
from akd_dist.documents.use import EvaluatedModel, EvaluationDocument, OtherModel, PredictionDocument
from akd_dist.models.build import num_parameters
from akd_dist.models.device import autocast
from akd_dist.models.language import LanguageModel
from akd_dist.serve.examples import DataRequest
from akd_dist.serve.language_data import BATCH_TOKENS, Batch, Texts, open_texts
from akd_dist.serve.served import Served, as_in_training

_MOST = 700.0  # of a cross-entropy, whose exponential floats still hold


def evaluate_texts(
    models: Sequence[Served],
    asked: DataRequest,
    cache_root: Path,
    *,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> EvaluationDocument:
    """Every metric of a language model on texts; and of others, with how far they say the same.

    Args:
        models: the one that is asked for, then the others, of the same tokenizer.
        asked, cache_root, on_progress, on_note: as for `evaluation.evaluate`.

    Raises:
        RecipeError, RefusedError, DamagedError, MachineError: as `language_data.open_texts` and `Texts.prepare`.
    """
    started = time.monotonic()
    texts = open_texts(asked, models[0], cache_root, on_progress=on_progress)
    for model in models:
        texts.prepare(model)
    tallies = [_Tally(model) for model in models]
    counts = np.zeros(texts.blocks.vocabulary, np.int64)
    with as_in_training(models[0]):
        for _, blocks in _shown(texts, "evaluating", on_progress, on_note):
            counts += _tell(tallies, blocks, texts.blocks.vocabulary)
    text = None if texts.token_bytes is None else int((counts * texts.token_bytes).sum())
    first, *rest = tallies
    return EvaluationDocument(
        student=first.measured(text),
        others=[other.compared(text) for other in rest],
        data=texts.name,
        split=texts.split,
        rows=texts.rows,
        targets=first.targets,
        task="language_model",
        device="cuda" if models[0].device.type == "cuda" else "cpu",
        seconds=round(time.monotonic() - started, 3),
    )


def metrics_of_rows(model: Served, rows: Rows) -> Metrics:
    """Metrics of a language model on the prepared blocks that it was made for; without bits per byte."""
    tally, size = _Tally(model), max(1, BATCH_TOKENS // rows.shape[-1])
    with as_in_training(model):
        for start in range(0, len(rows), size):
            inputs, _ = rows.read(start, min(start + size, len(rows)))
            _tell([tally], np.asarray(inputs), rows.classes)
    return tally.measured(None).metrics


def _tell(tallies: Sequence[_Tally], blocks: np.ndarray, vocabulary: int) -> np.ndarray:
    """Have every model say what it finds of the targets of blocks; how often each id is one, int64 [vocabulary]."""
    places, labels = targets_of(blocks)
    said = [chunks(tally.model, blocks, places, vocabulary) for tally in tallies]
    for part, *logits in zip(parts(0, len(places), chunk_targets(vocabulary)), *said, strict=True):
        truth = torch.from_numpy(labels[part]).to(logits[0].device)
        ours: torch.Tensor | None = None
        for tally, its in zip(tallies, logits, strict=True):
            ours = tally.add(its, truth, logits[0], ours)
    return np.bincount(labels, minlength=vocabulary)


def targets_of(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks int32 [n, 3, length] have targets, in all positions one after the other, and the tokens after these;
    both int64 [targets].
    """
    places = np.flatnonzero(blocks[:, TARGETS])
    # A target is never the last position of a block, so what follows it is of the same row.
    return places, blocks[:, IDS].reshape(-1)[np.minimum(places + 1, blocks[:, IDS].size - 1)].astype(np.int64)


@torch.inference_mode()
def chunks(model: Served, blocks: np.ndarray, places: np.ndarray, vocabulary: int) -> Iterator[torch.Tensor]:
    """The logits of targets, [m, vocabulary] at a time and in their order, in what the model computes with."""
    module, device = model.module, model.device
    assert isinstance(module, LanguageModel)
    torch.set_num_threads(model.threads)
    given, at = torch.from_numpy(np.array(blocks)).to(device), torch.from_numpy(places).to(device)
    size = chunk_targets(vocabulary)
    if not module.linear_head:
        yield from _of_rows(model, module, given, at, vocabulary, size)
        return
    states = states_at(module, given, at, model.precision)
    head = Head(module.output_weight).cut(vocabulary)
    for part in parts(0, len(at), size):
        torch.set_num_threads(model.threads)
        yield _wide(head.logits(states[part]))


def _of_rows(
    model: Served, module: LanguageModel, given: torch.Tensor, at: torch.Tensor, vocabulary: int, size: int
) -> Iterator[torch.Tensor]:
    """The same of a model whose logits are not states times the output layer: block by block."""
    length, held = given.shape[2], torch.empty(0, vocabulary, device=given.device)
    for number, block in enumerate(given[:, None]):
        mine = at[(at >= number * length) & (at < (number + 1) * length)] - number * length
        with autocast(model.device, model.precision):
            logits = module(block)[0].index_select(0, mine)[:, :vocabulary]
        held = torch.cat([held.to(logits.dtype), logits])
        while len(held) >= size:
            yield _wide(held[:size])
            held = held[size:]
    if len(held):
        yield _wide(held)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _Tally:
    """What a model has said so far: sums in float64, and counts."""

    def __init__(self, model: Served) -> None:
        self.model = model
        self.targets, self.right, self.entropy = 0, 0, 0.0
        self.agreed, self.both, self.alone, self.divergence = 0, 0, 0, 0.0

    def add(
        self, logits: torch.Tensor, labels: torch.Tensor, student: torch.Tensor, ours: torch.Tensor | None
    ) -> torch.Tensor:
        """Some targets more.

        Args:
            logits: what this model says of them, [m, vocabulary].
            labels: the next tokens, int64 [m].
            student: what the one says that was asked for, which may be the same.
            ours: that one's likeliest tokens, int64 [m]; None for itself.

        Returns:
            The student's likeliest tokens.
        """
        said = judged_logits(logits, labels)
        right = said.choice == labels
        self.targets += len(labels)
        self.right += int(right.sum())
        self.entropy += float(said.cross_entropy.double().sum())
        if ours is None:
            return said.choice
        self.agreed += int((said.choice == ours).sum())
        self.both += int((right & (ours == labels)).sum())
        self.alone += int((ours == labels).sum())  # of the student: with those that both get right
        divergence = judged_logits(student, labels, DenseTargets(logits, _dtype(student))).divergence
        assert divergence is not None
        self.divergence += float(divergence.double().sum())
        return ours

    def measured(self, text: int | None) -> EvaluatedModel:
        """The model and its metrics.

        Args:
            text: bytes of text that the targets stand for; None where nobody knows.
        """
        card, count = self.model.card, max(1, self.targets)
        entropy = self.entropy / count
        found = {"accuracy": self.right / count, "cross_entropy": entropy}
        found |= {"perplexity": math.exp(min(entropy, _MOST)) if math.isfinite(entropy) else math.inf}
        found |= {"bits_per_byte": self.entropy / math.log(2) / text} if text else {}
        found |= {"loss": entropy}
        return EvaluatedModel(
            path=self.model.home.uri,
            model=card.model.label,
            parameters=num_parameters(self.model.module),
            fingerprint=card.fingerprint,
            precision=self.model.precision,
            metrics=Metrics(**{name: value for name, value in found.items() if math.isfinite(value)}),
        )

    def compared(self, text: int | None) -> OtherModel:
        """Another model, how far it says the same, and who is right."""
        count, divergence = max(1, self.targets), self.divergence / max(1, self.targets)
        return OtherModel(
            **dict(self.measured(text)),
            agreement=self.agreed / count,
            divergence=divergence if math.isfinite(divergence) else None,
            both_right=self.both,
            student_right=self.alone - self.both,
            other_right=self.right - self.both,
            both_wrong=self.targets - self.right - self.alone + self.both,
        )


def _dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ---- predictions


def predict_texts(
    model: Served,
    asked: DataRequest,
    out: Path,
    cache_root: Path,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictionDocument:
    """What a language model says of every token, as a Parquet file: whole, or absent.

    A row is a document of files, or a block of a recipe's split. Columns: `row` int64, counted from 0; `file`, where
    documents lie in several; `tokens`, int32 [length]; of blocks `segments`, int32 [length], the document of a block
    that each token is of; `log_probabilities`, float32 [length], natural logarithms: of each token given those before
    it, null where it is no target, as the first of a document; `targets` int64, how many there are; and
    `log_probability`, float64, their sum. The file's metadata say under `akd_dist` which model it was, and the
    fingerprint of the tokenizer. Memory does not grow with the rows.

    Args:
        model: opened.
        asked, out, cache_root, overwrite, on_progress, on_note: as for `evaluation.predict`.

    Raises:
        RecipeError, RefusedError, DamagedError, MachineError: as `language_data.open_texts` and `Texts.prepare`; or
            `out` cannot be written.
    """
    started = time.monotonic()
    texts = open_texts(asked, model, cache_root, on_progress=on_progress)
    texts.prepare(model)
    schema = _schema(model, texts)
    with as_in_training(model), predictions_file(out, schema, overwrite=overwrite) as write:
        rows = _Rows(texts, schema)
        for owners, blocks in _shown(texts, "predicting", on_progress, on_note):
            found = _log_probabilities(model, blocks, texts.blocks.vocabulary)
            if (done := rows.add(owners, blocks, found)) is not None:
                write(done)
        if (rest := rows.rest()) is not None:
            write(rest)
    return PredictionDocument(
        student=model.home.uri,
        model=model.card.model.label,
        fingerprint=model.card.fingerprint,
        data=texts.name,
        split=texts.split,
        out=str(out),
        rows=texts.rows,
        columns=schema.names,
        bytes=out.stat().st_size,
        device="cuda" if model.device.type == "cuda" else "cpu",
        seconds=round(time.monotonic() - started, 3),
    )


def _schema(model: Served, texts: Texts) -> pa.Schema:
    fields = [("row", pa.int64()), ("tokens", pa.list_(pa.int32()))]
    if texts.files is not None:
        fields.insert(1, ("file", pa.string()))
    if texts.split is not None:
        fields.append(("segments", pa.list_(pa.int32())))
    fields += [("log_probabilities", pa.list_(pa.float32())), ("targets", pa.int64())]
    fields.append(("log_probability", pa.float64()))
    told = {
        "model": model.card.model.label,
        "fingerprint": model.card.fingerprint,
        "task": "language_model",
        "tokenizer": texts.blocks.tokenizer,
    }
    return pa.schema(fields, metadata={"akd_dist": json.dumps(told)})


def _log_probabilities(model: Served, blocks: np.ndarray, vocabulary: int) -> np.ndarray:
    """Of each token given those before it, float64 [n, length]; NaN where it is no target."""
    places, labels = targets_of(blocks)
    found = np.full(len(blocks) * blocks.shape[2], np.nan)
    pieces = [
        judged_logits(logits, torch.from_numpy(labels[part]).to(logits.device)).cross_entropy.neg().double().cpu()
        for part, logits in zip(
            parts(0, len(places), chunk_targets(vocabulary)), chunks(model, blocks, places, vocabulary), strict=True
        )
    ]
    if pieces:
        found[places + 1] = torch.cat(pieces).numpy()
    return found.reshape(len(blocks), -1)


class _Rows:
    """Rows of the file, as blocks come: those of one row are joined, and rows without any are empty."""

    def __init__(self, texts: Texts, schema: pa.Schema) -> None:
        self.texts, self.schema, self.next = texts, schema, 0
        self.held: list[tuple[int, list[np.ndarray]]] = []

    def add(self, owners: np.ndarray, blocks: np.ndarray, found: np.ndarray) -> pa.Table | None:
        """Take in blocks; the rows that are whole by now, if there are any: the last one may go on."""
        for owner, block, its in zip(owners.tolist(), blocks, found, strict=True):
            columns = [block[IDS], block[SEGMENTS], its]
            if self.texts.split is None:  # what fills a block up is no part of a document
                columns = [column[: int((block[SEGMENTS] == 0).sum())] for column in columns]
            if self.held and self.held[-1][0] == owner:  # it begins with the last token of the part before
                before = self.held[-1][1]
                self.held[-1] = owner, [np.concatenate([a, b[1:]]) for a, b in zip(before, columns, strict=True)]
            else:
                self.held.append((owner, columns))
        whole, self.held = self.held[:-1], self.held[-1:]
        return self._table(whole, whole[-1][0] + 1) if whole else None

    def rest(self) -> pa.Table | None:
        """The last rows, those without tokens among them."""
        whole, self.held = self.held, []
        return self._table(whole, self.texts.rows) if self.next < self.texts.rows else None

    def _table(self, whole: list[tuple[int, list[np.ndarray]]], stop: int) -> pa.Table:
        """Rows up to `stop`, in order; those that did not come have no tokens."""
        there, nothing = dict(whole), [np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)]
        numbers, self.next = range(self.next, stop), stop
        ids, segments, found = zip(*(there.get(number, nothing) for number in numbers), strict=True)
        known = [np.isnan(one) for one in found]
        columns = {
            "row": pa.array(numbers, pa.int64()),
            "file": None if self.texts.files is None else pa.array([self.texts.files(number) for number in numbers]),
            "tokens": _lists(ids, pa.int32()),
            "segments": _lists(segments, pa.int32()),
            "log_probabilities": _lists(found, pa.float32(), known),
            "targets": pa.array([int((~none).sum()) for none in known], pa.int64()),
            "log_probability": pa.array([float(np.nansum(one)) for one in found], pa.float64()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def _lists(values: Sequence[np.ndarray], kind: pa.DataType, nulls: Sequence[np.ndarray] | None = None) -> pa.ListArray:
    """Arrays as one column of lists."""
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    mask = None if nulls is None else np.concatenate([np.empty(0, np.bool_), *nulls])
    together = np.concatenate([np.empty(0), *values]) if nulls is not None else np.concatenate(values)
    return pa.ListArray.from_arrays(ends, pa.array(together, kind, mask=mask))


def _shown(
    texts: Texts, what: str, on_progress: Progress | None, on_note: Callable[[str], None] | None
) -> Iterator[Batch]:
    """The batches, each told of once it is done with; what is to be known of the texts is told at the end."""
    for owners, blocks in texts.batches():
        yield owners, blocks
        if on_progress is not None:
            on_progress(what, int(owners[-1]) + 1, texts.rows)
    if on_note is not None:
        for note in texts.notes():
            on_note(note)
