"""A made teacher whose logits are like a language model's: peaked at T = 1, nearly flat at 4, few strong directions."""

import torch
from torch import Tensor

from akd_dist.distill.output_head import Head


def made_teacher(classes: int, width: int, count: int, *, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Head]:
    """Hidden states [count, width], float32, and a linear head: how often a class is chosen falls as in texts."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    strength = torch.arange(1, width + 1).float() ** -0.5
    strength *= spread / strength.square().sum().sqrt()
    weight = normal(classes, width)
    weight[:, 0] = 4 - torch.arange(1, classes + 1).log() / 2  # a direction of what is common
    h = normal(count, width) * strength
    h[:, 0] += 1
    return h, Head(weight)
