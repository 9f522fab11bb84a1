"""What a language model from elsewhere says of blocks: in seconds, before its logits are stored."""

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  # its usual name

from akd_dist.documents.check import TeacherCheck
from akd_dist.models.language import LanguageModel

ASKED = 32
"""The most blocks that a model is asked of."""
_SECONDS = 20.0  # of a large model: fewer blocks are asked, one at least
_CHUNK = 512  # targets whose logits are there at once


def check_on_blocks(
    model: LanguageModel, inputs: np.ndarray, vocabulary: int, name: str = "the teacher"
) -> TeacherCheck:
    """Ask a language model for the next tokens of blocks, as many as some seconds allow.

    Args:
        model: in eval mode.
        inputs: blocks int32 [n, 3, length], of validation rows.
        vocabulary: ids are below; further rows of an output layer are padding.
        name: of the model, for warnings.
    """
    began = time.monotonic()
    numbers = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), ASKED)).astype(np.int64))
    targets, right, total = 0, 0, 0.0
    with torch.inference_mode():
        for number in np.random.default_rng(0).permutation(numbers):
            blocks = torch.from_numpy(np.array(inputs[number : number + 1]))
            for logits, meant in _targets(model, blocks, vocabulary):
                targets += len(meant)
                right += int((logits.argmax(1) == meant).sum())
                total += float(F.cross_entropy(logits, meant, reduction="sum"))
            if time.monotonic() - began > _SECONDS:
                break
    if not targets:
        return TeacherCheck(name=name, rows=0, asked_of="tokens")
    loss = total / targets
    warnings = []
    if not loss < math.log(vocabulary):  # NaN, too
        warnings.append(
            f"{name} says less of the next token than somebody who knows nothing: its cross-entropy is {loss:.2f}, and "
            f"that of equal chances {math.log(vocabulary):.2f}. Likely it was made for another tokenizer"
        )
    told = loss if math.isfinite(loss) else None
    return TeacherCheck(
        name=name, rows=targets, asked_of="tokens", accuracy=right / targets, cross_entropy=told, warnings=warnings
    )


def _targets(
    model: LanguageModel, blocks: torch.Tensor, vocabulary: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits float32 [m, vocabulary] and next tokens int64 [m] of a block's targets, some at a time."""
    at = blocks[0, 2].nonzero().flatten()
    meant = blocks[0, 0, at + 1].long()
    if model.linear_head:
        states, head = model.hidden(blocks)[0, at], model.output_weight[:vocabulary]
        pieces: Iterator[torch.Tensor] = (F.linear(some, head) for some in torch.split(states, _CHUNK))
    else:
        pieces = iter(torch.split(model(blocks)[0, at, :vocabulary], _CHUNK))
    for logits, tokens in zip(pieces, torch.split(meant, _CHUNK), strict=True):
        yield logits.float(), tokens
