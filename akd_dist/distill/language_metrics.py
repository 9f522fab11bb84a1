"""Evaluation of a language model on a split: how likely it finds the next tokens, and how near it is to its teacher."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from akd_dist.base.errors import AkdError
from akd_dist.data.rows import Rows
from akd_dist.data.tokenizers import language_tokenizer, token_bytes
from akd_dist.distill.batch_targets import TeacherTargets
from akd_dist.distill.language_step import Scored, logits_at, states_at
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse_losses import Judged, judged, judged_logits
from akd_dist.distill.teacher_targets import Targets
from akd_dist.models.device import weights_dtype
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Precision, Text

EVALUATION_TOKENS = 8192
"""Of the blocks that are computed together: fixed, so that evaluation gives the same bits everywhere."""
_MOST = 700.0  # of a cross-entropy, whose exponential floats still hold


@dataclass(frozen=True, eq=False)
class Known:
    """What language models are measured by, beside rows."""

    stored: Mapping[str, TeacherTargets] = field(default_factory=dict)
    """What their teacher says of rows, by the fingerprint of these."""
    token_bytes: np.ndarray | None = None
    """How many bytes of text each id stands for, int64 [vocabulary]; None where nobody can tell."""


@torch.inference_mode()
def evaluate_language(
    model: LanguageModel, rows: Rows, device: torch.device, precision: Precision = "float32", known: Known | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """What a language model says of all targets of rows; no more logits are there at once than losses have.

    Args:
        model: on `device`.

    Returns:
        `cross_entropy` in nats a target and `perplexity`, its exponential; `bits_per_byte`, where the bytes of tokens
        are known; `accuracy` of the likeliest token; where the teacher is known `agreement`, the share of targets where
        that is also the teacher's, and `divergence`, KL(teacher || model) at T = 1 in nats; and `loss`, which is the
        cross-entropy. And the likeliest token of each target, int64 [targets].
    """
    model.eval()
    known = known or Known()
    stored, size = known.stored.get(rows.fingerprint), blocks_at_once(rows)
    if stored is not None:
        stored.move(0, [(0, len(rows))])
    found = _Sums()
    for start in range(0, len(rows), size):
        inputs, _ = rows.read(start, min(start + size, len(rows)))
        blocks = torch.from_numpy(np.array(inputs)).to(device)
        scored, targets, divergent = Scored.of(blocks), None, False
        if not len(scored.labels):
            continue
        if stored is not None:
            batch = stored.batch(np.arange(start, start + len(blocks)))
            targets = batch.of_rows(0, len(blocks), weights_dtype(precision))
            divergent = stored.decoder.lowest <= 1
        said = _judged(model, blocks, scored, rows.classes, precision, targets if divergent else None)
        found.add(said, scored, None if targets is None else targets.choice)
    return found.metrics(known.token_bytes), np.concatenate(found.chosen) if found.chosen else np.empty(0, np.int64)


def blocks_at_once(rows: Rows) -> int:
    """Blocks that are evaluated together."""
    return max(1, EVALUATION_TOKENS // rows.shape[-1])


def _judged(
    model: LanguageModel,
    blocks: torch.Tensor,
    scored: Scored,
    classes: int,
    precision: Precision,
    targets: Targets | None,
) -> Judged:
    if model.linear_head:
        states = states_at(model, blocks, scored.places, precision)
        return judged(states, Head(model.output_weight), scored.labels, targets, classes=classes)
    return judged_logits(logits_at(model, blocks, scored, classes, precision), scored.labels, targets)


class _Sums:
    """What was found of targets so far: sums in float64, and the labels as counts by id."""

    def __init__(self) -> None:
        self.targets, self.right, self.agreed = 0, 0, 0
        self.entropy, self.divergence = 0.0, 0.0
        self.judged, self.compared = False, False
        self.labels: list[np.ndarray] = []
        self.chosen: list[np.ndarray] = []

    def add(self, said: Judged, scored: Scored, teacher: torch.Tensor | None) -> None:
        """Some targets more.

        Args:
            teacher: the teacher's choice, where it is known.
        """
        self.targets += len(scored.labels)
        self.entropy += float(said.cross_entropy.double().sum())
        self.right += int((said.choice == scored.labels).sum())
        self.labels.append(scored.labels.cpu().numpy())
        self.chosen.append(said.choice.cpu().numpy())
        if teacher is not None:
            self.compared, self.agreed = True, self.agreed + int((said.choice == teacher).sum())
        if said.divergence is not None:
            self.judged, self.divergence = True, self.divergence + float(said.divergence.double().sum())

    def metrics(self, token_bytes: np.ndarray | None) -> dict[str, float]:
        """The means."""
        count = max(1, self.targets)
        entropy = self.entropy / count
        found = {"cross_entropy": entropy, "perplexity": math.exp(min(entropy, _MOST))}
        text = 0 if token_bytes is None else sum(int(token_bytes[labels].sum()) for labels in self.labels)
        if text:
            found["bits_per_byte"] = self.entropy / math.log(2) / text
        found["accuracy"] = self.right / count
        if self.compared:
            found["agreement"] = self.agreed / count
        if self.judged:
            found["divergence"] = self.divergence / count
        return found | {"loss": entropy}


def bytes_of_tokens(text: Text | None, rows: Rows) -> np.ndarray | None:
    """How many bytes each id of a tokenizer stands for, int64 [vocabulary].

    Special tokens, such as that at the end of a text, are no text and have none. None where the tokenizer cannot be
    read here, does not say, or is another one than that of the rows.
    """
    if text is None or rows.tokens is None:
        return None
    with contextlib.suppress(AkdError, OSError):
        tokenizer = language_tokenizer(text)
        if tokenizer.tokens.tokenizer != rows.tokens.tokenizer:
            return None
        return token_bytes(tokenizer)
    return None
