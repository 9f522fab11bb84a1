"""What a student is taught from a `top_k` store, against the teacher in the loop, and what the store's card says of it.

    python -m benchmarks.within_card --model smollm2 --work work

The stores are those of `benchmarks.store_against_dense`, and are computed where they are not there. A card is measured
on some targets of some rows, and sealed with the store. What it bounds, at each temperature T:

- Gradients of KD and of annealed cross-entropy in the logits differ from those of the teacher in the loop by p - p^,
  times T in KD, whatever the student says. The card has the root mean square of that over the one of (mean p) - p. So a
  student whose gradient is as long as that of one that says the mean p has the card's error, and one with a shorter
  gradient has a larger one: its own is what the card says times (mean p - p) / (q - p).
- Gradients of the squared error in centred logits differ by 2 Phi / V times what the store leaves unexplained of these.
- Cross-entropies to p^ and to p differ by at most the total variation of both, times the range of the student's log q.

Here it is measured on half of the train targets, most of which are not those of the card, with a student that knows
nothing and with one that has been trained on labels.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from akd_dist.distill.cohort import known_of_language, open_stream
from akd_dist.distill.language_step import Scored, states_at
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse_losses import Softened, Term, loss_of, losses_of_logits
from akd_dist.distill.stream import Batch
from akd_dist.distill.teacher_targets import Targets
from akd_dist.models.device import set_deterministic
from akd_dist.models.language import LanguageModel
from benchmarks import cut_teacher
from benchmarks.store_against_dense import LARGE, SMALL, Stored, begin, block_of, cached, train

TEMPERATURES = (1.0, 2.0, 4.0)
BATCHES = 12
"""How many are looked at: half an epoch."""
Of = Callable[[Targets], Term]
"""The loss on targets."""


def gradient(s: Tensor, term: Term) -> Tensor:
    """The gradient of the sum of the targets' losses in a student's logits s [n, V]."""
    s = s.detach().clone().requires_grad_()
    losses_of_logits(s, term).sum().backward()  # type: ignore[no-untyped-call]
    assert s.grad is not None
    return s.grad


def rms(e: Tensor) -> float:
    """The root of the mean over targets of the squared norm of e [n, V]."""
    return math.sqrt(float(e.double().square().sum(1).mean()))


@dataclass(eq=False)
class Apart:
    """Sums over batches: squared norms of gradients from the teacher in the loop and, as `_off`, of what those from a
    store differ by."""

    logits: float = 0.0
    """Squared norms of the gradient in the logits."""
    logits_off: float = 0.0
    hidden: float = 0.0
    """The same behind the student's head."""
    hidden_off: float = 0.0
    weights: float = 0.0
    """The same in all weights, batch by batch."""
    weights_off: float = 0.0
    loss: float = 0.0
    loss_off: float = 0.0

    def add(self, model: LanguageModel, batch: Batch, stored: Targets, exact: Targets, of: Of) -> None:
        """A batch, all of whose targets are seen."""
        scored = Scored.of(batch.inputs)
        h = states_at(model, batch.inputs, scored.places, "float32")
        head = model.output_weight[: exact.classes].detach()
        s = h.detach() @ head.T
        told, true = gradient(s, of(stored)), gradient(s, of(exact))
        for name, at, off in (("logits", true, told - true), ("hidden", true @ head, (told - true) @ head)):
            self._count(name, at, off)
        (loss, whole), (exact_loss, exact_whole) = (_whole(model, h, one, of) for one in (stored, exact))
        self._count("weights", exact_whole, whole - exact_whole)
        self.loss += exact_loss
        self.loss_off += loss - exact_loss

    def error(self, where: str) -> float:
        """The error over the gradient, root mean squares."""
        found: float = math.sqrt(getattr(self, f"{where}_off") / getattr(self, where))
        return found

    def _count(self, where: str, at: Tensor, off: Tensor) -> None:
        for name, value in ((where, at), (f"{where}_off", off)):
            setattr(self, name, getattr(self, name) + float(value.detach().double().square().sum()))


def _whole(model: LanguageModel, h: Tensor, targets: Targets, of: Of) -> tuple[float, Tensor]:
    """The mean loss of targets, and its gradient in all weights as one vector."""
    loss = loss_of(h, Head(model.output_weight).cut(targets.classes), of(targets))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    return float(loss.detach()), torch.cat([one.flatten() for one in found])


def measured(model: LanguageModel, dense: Stored, top: Stored, temperature: float) -> Apart:
    """KD of one temperature on some batches, from both stores."""
    apart = Apart()
    streams = [open_stream(one.job(()), one.splits)[0].batches(0) for one in (dense, top)]
    for exact, told in itertools.islice(zip(*streams, strict=True), BATCHES):
        assert exact.targets is not None
        assert told.targets is not None
        count = len(exact.rows)
        apart.add(
            model, exact, told.targets.of_rows(0, count), exact.targets.of_rows(0, count),
            lambda targets: Softened(targets, temperature),
        )  # fmt: skip
    return apart


def students(dense: Stored) -> Mapping[str, LanguageModel]:
    """One that knows nothing, and one that was trained on labels."""
    job, known = dense.job([block_of("judge", "labels", 0, 3e-3)]), known_of_language(dense.job(()), dense.splits)
    found: dict[str, LanguageModel] = {}
    for name in ("before its first step", "trained on labels"):
        one = begin(job.students[0], dense, known, lambda batch: batch.targets)
        if found:
            train([one], open_stream(job, dense.splits)[0], dense.splits)
        assert isinstance(one.student.module, LanguageModel)
        found[name] = one.student.module.eval()
    return found


def sealed(top: Stored) -> dict[float, dict[str, Any]]:
    """What the store's card says, by temperature."""
    card = top.store.manifest.fidelity
    assert card is not None
    return {one["temperature"]: one for one in card["at"]}


def main() -> None:
    """Print a row for each store, temperature and student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    work = given.work.absolute()
    cut_teacher.make(given.model, work)
    set_deterministic("cpu", 1)
    dense = cached(work, "dense")
    judges = students(dense)
    print("| store | T | card: KL | card: unigram | student | logits | behind its head | weights, a batch | loss % |")
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|")
    for encoding in (LARGE, SMALL):
        top = cached(work, encoding)
        card = sealed(top)
        for temperature in TEMPERATURES:
            said = card.get(temperature)
            told = f"{said['kl']:.3f} | {said['unigram_error']:.3f}" if said else " | "
            for name, model in judges.items():
                apart = measured(model, dense, top, temperature)
                errors = " | ".join(f"{apart.error(where):.3f}" for where in ("logits", "hidden", "weights"))
                loss = f"{100 * apart.loss_off / apart.loss:+.2f}"
                print(f"| {encoding} | {temperature:.3g} | {told} | {name} | {errors} | {loss} |", flush=True)


if __name__ == "__main__":
    main()
