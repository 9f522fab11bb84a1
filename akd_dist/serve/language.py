"""A finished language model at work: how likely it finds texts, and how near it is to others.

Nothing of size [targets, vocabulary] is there beyond a chunk, however many models are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from akd_dist.data.packing import IDS, TARGETS
from akd_dist.data.row_cache import Progress
from akd_dist.data.rows import Rows
from akd_dist.distill.language_step import states_at
from akd_dist.distill.output_head import Head, chunk_targets, parts
from akd_dist.distill.sparse_losses import judged_logits
from akd_dist.distill.teacher_targets import DenseTargets
from akd_dist.documents.fleet import Metrics
from akd_dist.documents.use import EvaluatedModel, EvaluationDocument, OtherModel
from akd_dist.models.device import autocast
from akd_dist.models.language import LanguageModel
from akd_dist.serve.examples import DataRequest
from akd_dist.serve.language_data import BATCH_TOKENS, open_texts
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
        for _, blocks in texts.shown("evaluating", on_progress, on_note):
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
        count = max(1, self.targets)
        entropy = self.entropy / count
        found = {"accuracy": self.right / count, "cross_entropy": entropy}
        found |= {"perplexity": math.exp(min(entropy, _MOST)) if math.isfinite(entropy) else math.inf}
        found |= {"bits_per_byte": self.entropy / math.log(2) / text} if text else {}
        found |= {"loss": entropy}
        return self.model.measured(found)

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
