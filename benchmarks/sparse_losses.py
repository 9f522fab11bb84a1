"""A student's head at a large vocabulary: memory and time of a step of each loss, beside logits made whole.

python -m benchmarks.sparse_losses [--classes 151936] [--width 576] [--targets 1024] [--threads 2] [--json]

Memory is the most bytes of tensors that are alive at once beyond weights, hidden states and targets, as torch's
profiler counts them; the last column is what is beyond the gradients of head and hidden states, in chunks of logits.
Time is CPU time, forward and backward, the least of several repeats that alternate in one run. `ratio` is the squared
error without a vocabulary over the same in chunks, `ratio_to_autograd` over the same as torch's autograd does it with
the logits of a chunk; `--dense` adds that, and KD with all logits at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from akd_dist.distill.output_head import Head, chunk_targets, parts
from akd_dist.distill.sparse import SparseTargets, TailDictionary
from akd_dist.distill.sparse_losses import Annealed, Labels, Softened, Squared, loss_of
from akd_dist.distill.squared_losses import SquaredForm, squared_without_vocabulary
from benchmarks.timing import least_seconds

TEMPERATURES = (1.0, 4 / 3, 2.0)
DENSE = "KD, logits made whole (autograd)"
CHUNKS, WITHOUT = "squared, in chunks", "squared, without a vocabulary"
AUTOGRAD = "squared, in chunks by autograd"


def main() -> None:
    """Print a table, or a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--targets", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--chunk", type=int, help="targets that go through the head together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dense", action="store_true", help="also by plain autograd")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    works = _works(chosen)
    seconds = least_seconds(works, chosen.repeats)
    chunk = min(chosen.targets, chosen.chunk or chunk_targets(chosen.classes))
    buffer, gradients = 4 * chunk * chosen.classes, 4 * chosen.width * (chosen.classes + chosen.targets)
    rows = [
        {"loss": name, "seconds": round(seconds[name], 3), "peak_MiB": round((peak := peak_bytes(work)) / 2**20, 1),
         "chunks_beyond_gradients": round((peak - gradients) / buffer, 2)}
        for name, work in works.items()
    ]  # fmt: skip
    found = {
        "classes": chosen.classes, "width": chosen.width, "targets": chosen.targets, "chunk": chunk,
        "chunk_MiB": round(buffer / 2**20, 1), "gradients_MiB": round(gradients / 2**20, 1), "threads": chosen.threads,
        "ratio": round(seconds[WITHOUT] / seconds[CHUNKS], 4), "rows": rows,
    }  # fmt: skip
    if chosen.dense:
        found["ratio_to_autograd"] = round(seconds[WITHOUT] / seconds[AUTOGRAD], 4)
    if chosen.json:
        print(json.dumps(found))
        return
    print({name: value for name, value in found.items() if name != "rows"})
    for row in rows:
        print(f"{row['loss']:<40} {row['seconds']:>8} s  {row['peak_MiB']:>9} MiB  {row['chunks_beyond_gradients']:>6}")


def _works(chosen: argparse.Namespace) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    n, classes, width = chosen.targets, chosen.classes, chosen.width
    h = torch.randn(n, width, requires_grad=True)
    head = Head(torch.randn(classes, width).div_(width**0.5).requires_grad_())
    targets, prior = _targets(n, classes, chosen.rank), _targets(n, classes, 0)
    labels = torch.randint(0, classes, (n,))

    def through(term: Any) -> Callable[[], object]:
        return lambda: _step(loss_of(h, head, term, chunk=chosen.chunk), h, head)

    def dense() -> object:
        p = targets.probabilities(2.0, slice(0, n))
        q = functional.log_softmax(h @ head.weight.T / 2, 1)
        return _step(4 * (torch.xlogy(p, p) - p * q).sum(1).mean(), h, head)

    def by_autograd() -> None:
        for part in parts(0, n, chosen.chunk or chunk_targets(classes)):
            s, z = h[part] @ head.weight.T, targets.logits(part)
            e = (s - s.mean(1, keepdim=True)) - 0.5 * (z - z.mean(1, keepdim=True))
            _step(e.square().mean(), h, head)

    works: dict[str, Callable[[], object]] = {
        "labels": through(Labels(labels, classes)),
        "KD at T = 2, rank 0": through(Softened(prior, 2.0)),
        f"KD at T = 2, rank {chosen.rank}": through(Softened(targets, 2.0)),
        f"annealed, Phi = 1 / 4, rank {chosen.rank}": through(Annealed(targets, 0.25)),
        CHUNKS: through(Squared(targets, 0.5)),
        WITHOUT: lambda: _step(squared_without_vocabulary(h, head, targets, SquaredForm(0.5)), h, head),
    }
    return works | ({AUTOGRAD: by_autograd, DENSE: dense} if chosen.dense else {})


def _targets(n: int, classes: int, rank: int) -> SparseTargets:
    dictionary = TailDictionary.of(
        {"mean_logit": torch.randn(classes), "basis": torch.randn(classes, rank),
         "tail_prior": torch.softmax(torch.randn(3, classes), 1), "tail_calibration": 0.1 * torch.randn(3, classes)},
        TEMPERATURES,
    )  # fmt: skip
    values, ids = (5 + 5 * torch.rand(n, 16)).sort(1, descending=True).values, torch.randint(0, classes // 16, (n, 16))
    ids += torch.arange(16) * (classes // 16)
    tail = torch.tensor([1.0, 3.0, 6.0]).expand(n, 3)
    return SparseTargets(ids, values, torch.zeros(n), tail, torch.randn(n, rank), TEMPERATURES, dictionary)


def _step(loss: Tensor, h: Tensor, head: Head) -> object:
    return torch.autograd.grad(loss, (h, head.weight))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were made and alive at once in a piece of work, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    alive, most = 0, 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


if __name__ == "__main__":
    main()
