"""The output head of a language model or a wide classifier: what makes logits of hidden states.

A teacher's is captured through it, and a student's losses go through it, a few targets at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Float32 logits that exist at once, by default."""
_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}  # on a CPU what stays in the cache between one pass and the next


@dataclass(frozen=True, eq=False)
class Head:
    """Logits s = W h + b, or cap tanh((W h + b) / cap). A constant factor on logits is folded into W and b."""

    weight: Tensor
    """W, float [rows, d]; rows behind the classes of the data are padding, cut off wherever logits are made."""
    bias: Tensor | None = None
    """b, float [rows]."""
    softcap: float | None = None
    """What the logits are held within, as some models do it."""

    @property
    def linear(self) -> bool:
        """Whether logits are a linear function of the hidden state."""
        return self.softcap is None

    def cut(self, classes: int) -> "Head":
        """The head without its padding rows: as many classes as the data has."""
        bias = None if self.bias is None else self.bias[:classes]
        return Head(self.weight[:classes], bias, self.softcap)

    def logits(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [n, rows] of hidden states [n, d], of their dtype.

        Args:
            out: memory for them, where no gradient is wanted: that of a new chunk would have to be cleared each time.
        """
        weight, out = self.weight.to(h.dtype), None if out is None else out[: len(h)]
        s = (
            torch.mm(h, weight.T, out=out)
            if self.bias is None
            else torch.addmm(self.bias.to(h.dtype), h, weight.T, out=out)
        )
        return s if self.softcap is None else s.div_(self.softcap).tanh_().mul_(self.softcap)


def chunk_targets(classes: int) -> int:
    """How many targets make a chunk by default: as many as fit CHUNK_BYTES of float32 logits."""
    return max(1, CHUNK_BYTES // (4 * classes))


def parts(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` from start to stop, the last one shorter."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def blocks(part: slice, classes: int, device: torch.device) -> Iterator[slice]:
    """A chunk of targets in blocks that several passes are made over while they are in the cache.

    Their size depends on the classes and the kind of device alone, as the last bits of numbers may depend on it.
    """
    return parts(part.start, part.stop, max(1, _BLOCK_BYTES.get(device.type, 64 * 2**20) // (4 * classes)))
