"""The models of a stack evaluated on a split together, by `metrics.measure` as one alone is.

Each block of rows passes all models in one go. As with steps, what comes of a model does not depend on who else is
there: `stacking.judge` looks at that, too.
"""

import numpy as np
import torch

from akd_dist.data.encoded import ahead, batches_ahead
from akd_dist.data.rows import Rows
from akd_dist.distill.hooks import own_measure
from akd_dist.distill.losses import at_least_float32, label_losses
from akd_dist.distill.metrics import begin_block, measure_together, predictions
from akd_dist.distill.stack import Stack
from akd_dist.recipe import CustomMetric

Evaluated = tuple[dict[str, float], np.ndarray]
"""The metrics with `loss`, and what the model says of each row; as `metrics.evaluate`."""
_BATCHES = 4
"""So many times the rows of a batch are a block: without gradients they take about the memory of a step."""


def block_rows(batch: int) -> int:
    """Rows of a block, a function of a student's own batch: so its bits are the same whoever else is there."""
    return _BATCHES * batch


@torch.no_grad()
def evaluate_together(stack: Stack, rows: Rows, own: CustomMetric | None = None) -> list[Evaluated]:
    """What comes of each student of a stack, in its order, with its weights as they are now.

    Args:
        own: the user's own metric; all logits are held for it.
    """
    size, count = block_rows(stack.students[0].spec.batch), len(stack.students)
    sums, said, true, kept = [0.0] * count, [], [], []
    begun = (begin_block(rows, start, size) for start in range(0, len(rows), size))
    for copied, labelled in ahead(begun, min(1, batches_ahead(rows.inputs, size))):
        inputs, labels = copied.to(stack.vectors[0].device), labelled.to(stack.vectors[0].device)
        true.append(labelled)
        logits = at_least_float32(stack.logits(inputs))
        flat = logits.flatten(0, 1)
        losses = label_losses(flat, labels.repeat(count)).double().view(count, -1)
        # Row by row: a sum over all rows at once may add in another order where there are others.
        sums = [total + float(one.sum()) for total, one in zip(sums, losses, strict=True)]
        said.append(predictions(rows.task, flat).view(count, -1).cpu())
        kept += [] if own is None else [logits.cpu()]
    together, labels = torch.cat(said, dim=1), torch.cat(true)
    metrics = measure_together(rows.task, together, labels, rows.classes)
    if own is not None:
        for one, logits in zip(metrics, torch.cat(kept, dim=1), strict=True):
            one["custom"] = own_measure(own, logits, labels)
    return [
        (one | {"loss": total / len(rows)}, chosen.numpy())
        for one, total, chosen in zip(metrics, sums, together, strict=True)
    ]


def shown(inputs: torch.Tensor, batch: int, missing: int) -> torch.Tensor:
    """Some inputs repeated as a block of an evaluation: [block - missing, *shape]."""
    rows = torch.arange(max(1, block_rows(batch) - missing), device=inputs.device)
    return inputs[rows % len(inputs)]
