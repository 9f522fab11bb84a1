"""What a language model's teacher says of a split, by its stored targets: it is not run again.

Of `top_k` stores that is what the store knows: the label's probability is exact to some bits where it is among the
stored classes, and spread over the others as the store does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from akd_dist.data.packing import IDS, TARGETS
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_targets import Decoder
from akd_dist.distill.output_head import blocks
from akd_dist.distill.teacher_targets import Targets
from akd_dist.storage.reader import LogitStore

_TOKENS = 8192  # of the blocks that are looked at together
_TINY = 1e-30  # below any probability of a float32 softmax


def teacher_metrics(store: LogitStore, rows: Rows, token_bytes: np.ndarray | None = None) -> dict[str, float] | None:
    """Metrics of a teacher on the rows of a language model, as its store has it.

    Args:
        store: of the targets of these rows.
        token_bytes: how many bytes of text each id stands for, int64 [vocabulary]; None where nobody can tell.

    Returns:
        `accuracy`, `cross_entropy` in nats, `perplexity`, and `bits_per_byte` where bytes are known. None where the
        store does not say what probabilities at T = 1 are, or there is no target.

    Raises:
        DamagedError: a shard, or the dictionary, is not what was sealed.
    """
    identity = store.manifest.identity
    if identity.is_top_k and min(identity.top_k.tail_temperatures) > 1:
        return None
    made = _made(store)
    right, entropy, text, at = 0, 0.0, 0, 0
    size = max(1, _TOKENS // rows.shape[-1])
    for start in range(0, len(rows), size):
        labels = _labels(rows, start, min(start + size, len(rows)))
        targets = made(at, at + len(labels))
        at += len(labels)
        truth = torch.from_numpy(labels)
        right += int((targets.choice == truth).sum())
        for part in blocks(slice(0, len(labels)), targets.classes, torch.device("cpu")):
            said = targets.probabilities(1.0, part).gather(1, truth[part, None])
            entropy -= float(said.double().clamp_min(_TINY).log().sum())
        text += 0 if token_bytes is None else int(token_bytes[labels].sum())
    if not at:
        return None
    found = {"accuracy": right / at, "cross_entropy": entropy / at, "perplexity": math.exp(entropy / at)}
    return found | ({"bits_per_byte": entropy / math.log(2) / text} if text else {})


def agreement_of(ours: LogitStore, theirs: LogitStore) -> float:
    """The share of targets where two stores of the same rows choose the same token."""
    one, other, same, count = _made(ours), _made(theirs), 0, ours.layout.rows
    for start in range(0, count, _TOKENS):
        stop = min(start + _TOKENS, count)
        same += int((one(start, stop).choice == other(start, stop).choice).sum())
    return same / max(1, count)


def _labels(rows: Rows, start: int, stop: int) -> np.ndarray:
    """The labels of the targets of some rows, int64 [targets]: the tokens behind them."""
    inputs = np.asarray(rows.read(start, stop)[0])
    # A target is never the last position of a block.
    labels: np.ndarray = inputs[:, IDS, 1:][inputs[:, TARGETS, :-1] != 0].astype(np.int64)
    return labels


def _made(store: LogitStore) -> Callable[[int, int], Targets]:
    """Consecutive targets of a store, by their first and last number."""
    decoder = Decoder.of(store, "cpu")

    def made(start: int, stop: int) -> Targets:
        stored = store.targets(0, start, stop)
        return decoder.targets({name: torch.from_numpy(array) for name, array in stored.items()})

    return made
