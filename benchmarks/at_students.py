"""Errors of gradients from encodings of a real language model's logits, at students: what cards cannot know.

    python -m benchmarks.at_students --recipe RECIPE [--run RUN] [--all] [--probe-rows 32] [--steps 0 120] [--json]

A card is measured at the student that says the mean of all targets, behind the teacher's head. Here the same errors,
p^ - p over q - p, are taken at others: `causal_lm` of width 64 and two layers after some steps on labels (lr 3e-3, two
blocks a step), and the students of a finished run of the recipe. Dictionaries are made of train rows, and errors are
measured on targets of test rows, which no student has seen.

For each student: `logits` is the root mean square of the error over that of the gradient, `teacher's head` and
`own head` are the same behind these heads, as a backbone of that head would receive it, and `batch` is the error of the
own head's gradient summed over all targets. `mean, own head` is the error behind that head at a student that says the
mean: it differs from the mean student's in the head alone, and from the `own head` in what is said alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill.cards import chosen
from akd_dist.distill.fidelity import TopKOnly
from akd_dist.distill.language_step import Scored, states_at
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse_losses import Labels, loss_of
from akd_dist.distill.target_shards import drawn_rows
from akd_dist.distill.target_teacher import LanguageTeacher
from akd_dist.distill.teacher_targets import Targets
from akd_dist.models.build import build_language_model
from akd_dist.models.card import ModelCard, blocks_of
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import read_model
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import CausalLm, Recipe, load_recipe
from akd_dist.storage.node_cache import cache_folder
from akd_dist.storage.top_k import TopK
from benchmarks.fidelity import candidates

TEMPERATURES = (1.0, 2.0, 4.0)
TEST_ROWS = 48
"""That targets are chosen of."""
BATCH, RATE = 2, 3e-3
MEAN = "the mean of all"


@dataclass(frozen=True, eq=False)
class Judge:
    """A student at the targets."""

    name: str
    h: Tensor
    """[n, d]: its states."""
    weight: Tensor
    """[V, d]: of its head."""

    def q(self, p: Tensor, temperature: float) -> Tensor:
        """What it says, [n, V]; p is the teacher's."""
        if self.name == MEAN:
            return p.mean(0).expand_as(p)
        return torch.softmax(self.h @ self.weight.T / temperature, 1)


@dataclass(frozen=True)
class Lengths:
    """Of a gradient in the logits [n, V], or of its error, as a judge and the teacher see it."""

    logits: float
    teacher: float
    own: float
    batch: float

    @classmethod
    def of(cls, e: Tensor, judge: Judge, teacher: Tensor) -> Lengths:
        """As there; the norm of the head's gradient, the sum of e h', comes of two small matrices of products."""
        products = (e @ e.T).mul_(judge.h @ judge.h.T)
        return cls(rms(e), rms(e @ teacher), rms(e @ judge.weight), math.sqrt(max(0.0, float(products.sum()))))

    def over(self, other: Lengths) -> dict[str, float]:
        """Each of them over another's."""
        return {name: getattr(self, name) / getattr(other, name) for name in ("logits", "teacher", "own", "batch")}


def rms(e: Tensor) -> float:
    """The root of the mean over targets of the squared norm of e [n, width]."""
    return math.sqrt(float(e.double().square().sum(1).mean()))


def measured(
    z: Tensor, judges: Sequence[Judge], encodings: Mapping[str, tuple[int, Targets]], teacher: Tensor
) -> Iterator[dict[str, Any]]:
    """A row for each temperature, student and encoding.

    Args:
        z: logits of the teacher, [n, V].
        teacher: its head.
    """
    everything = slice(0, len(z))
    for temperature in TEMPERATURES:
        p = torch.softmax(z / temperature, 1)
        for judge in judges:
            q = judge.q(p, temperature)
            gradient = Lengths.of(q - p, judge, teacher)
            mean = rms((p.mean(0) - p) @ judge.weight)
            for name, (size, one) in encodings.items():
                p_hat = (
                    one.beside(q, temperature, everything).p
                    if isinstance(one, TopKOnly)
                    else one.probabilities(temperature, everything)
                )
                error = Lengths.of(p_hat - p, judge, teacher)
                row = {"T": temperature, "student": judge.name, "encoding": name, "bytes": size, **error.over(gradient)}
                yield row | {"mean_own": error.own / mean}


# ---- students and targets


def states(model: LanguageModel, blocks: Tensor) -> Tensor:
    """Of all targets of some blocks, [n, d]."""
    scored = Scored.of(blocks)
    with torch.inference_mode():
        return torch.cat(
            [states_at(model, part, Scored.of(part).places, "float32") for part in torch.split(blocks, 8)]
        )[: len(scored.places)]


def in_training(rows: Rows, most: int) -> Iterator[tuple[int, LanguageModel]]:
    """The same student after each step on labels, from the first weights on."""
    card = ModelCard.of(CausalLm(width=64, depth=2, heads=4), rows, None)
    torch.manual_seed(0)
    model = build_language_model(card)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95))
    random = np.random.Generator(np.random.PCG64(0))
    for step in itertools.count():
        yield step, model
        if step == most:
            return
        blocks = torch.from_numpy(np.array(rows.inputs.take(random.integers(0, len(rows), BATCH), axis=0)))
        scored = Scored.of(blocks)
        h = states_at(model, blocks, scored.places, "float32")
        optimizer.zero_grad()
        loss_of(h, Head(model.output_weight), Labels(scored.labels, rows.classes)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def students(rows: Rows, steps: Sequence[int], run: Path | None) -> Iterator[tuple[str, LanguageModel]]:
    """Those in training, and those of a run."""
    for step, model in in_training(rows, max(steps)) if steps else ():
        if step in steps:
            yield f"labels, {step} steps", model.eval()
            model.train()
    for folder in sorted((run / "students").iterdir()) if run else ():
        found = read_model(folder)[0]
        assert isinstance(found, LanguageModel)
        yield folder.name, found


def probes(recipe: Recipe, probe_rows: int) -> tuple[Any, Any, Tensor]:
    """Of the teacher: what dictionaries are made from, what errors are measured on, and the blocks of the latter."""
    splits = prepare(recipe.data, cache_folder())
    assert splits.test is not None
    module = read_model(str(recipe.teacher.weights), blocks=blocks_of(splits.train))[0].eval()
    assert isinstance(module, LanguageModel)
    fitted, _ = drawn_rows(splits.train, TopK(k=16, rank=16, probe_rows=probe_rows))
    numbers = np.unique(np.linspace(0, len(splits.test) - 1, TEST_ROWS).round().astype(np.int64))
    made = [
        LanguageTeacher(module, rows, recipe.cache, recipe.cache.batch_rows).probe(wanted)
        for rows, wanted in ((splits.train, fitted), (splits.test, numbers))
    ]
    return made[0], made[1], torch.from_numpy(np.array(splits.test.inputs.take(numbers, axis=0)))


def main() -> None:
    """Print a table, or a line of JSON for each row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run", type=Path, help="a folder of finished students")
    parser.add_argument("--all", action="store_true", help="encodings, and not the default alone")
    parser.add_argument("--probe-rows", type=int, default=32, help="train blocks that dictionaries are made from")
    parser.add_argument("--steps", type=int, nargs="*", default=[0, 120])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    set_deterministic("cpu", given.threads)
    recipe = load_recipe(given.recipe)
    fitted, probe, blocks = probes(recipe, given.probe_rows)
    with torch.inference_mode():
        numbers = chosen(probe)
        head, h = probe.head, probe.h[numbers]
        encodings = candidates(fitted.h, h, head, every=given.all)
        z, teacher = head.logits(h).float(), head.weight.float()
        labels = Scored.of(blocks).labels[numbers]
        judges = [Judge(MEAN, h.float(), teacher)]
    print(f"dictionaries from {len(fitted):,} targets, errors on {len(numbers)}; cross-entropy of the teacher "
          f"{_cross_entropy(z, labels):.3f}")  # fmt: skip
    for name, model in students(prepare(recipe.data, cache_folder()).train, given.steps, given.run):
        judges.append(Judge(name, states(model, blocks)[numbers], model.output_weight.detach()[: z.shape[1]].clone()))
        print(f"{name}: cross-entropy {_cross_entropy(judges[-1].h @ judges[-1].weight.T, labels):.3f}")
    columns = ("logits", "teacher", "own", "batch", "mean_own")
    print("| T | student | encoding | bytes | logits | teacher's head | own head | batch | mean, own head |")
    print("|--:|---|---|--:|--:|--:|--:|--:|--:|")
    with torch.inference_mode():
        for row in measured(z, judges, encodings, teacher):
            figures = " | ".join(f"{row[name]:.3f}" for name in columns)
            told = f"| {row['T']:g} | {row['student']} | {row['encoding']} | {row['bytes']} | {figures} |"
            print(json.dumps(row) if given.json else told, flush=True)


def _cross_entropy(s: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(s, labels))


if __name__ == "__main__":
    main()
