"""Training from the store is the same computation as training with the teacher in the loop; and what is not.

    python benchmarks/cached_equals_online.py                       the figures of docs/cached-equals-online.md
    python benchmarks/cached_equals_online.py --plot docs/figures   ... and its plots; --json prints a document

`online` is the other side of the claim: a plain loop, as short as can be, that calls the teacher on every batch. It
shares with the package only what defines the run: the views, the order of rows, the first weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from akd_dist import recipe as recipes
from akd_dist.cohort import CohortJob, open_stream
from akd_dist.device import settle, weights_dtype
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.train_students import fleet_job
from akd_dist.models import ModelCard, build, load_model, save_model
from akd_dist.objectives import phi, temperature
from akd_dist.recipe import Recipe
from akd_dist.rows import Splits, prepare
from akd_dist.stream import Stream, epoch_order
from akd_dist.student import Student, evaluate, seeded_state
from akd_dist.teacher import teacher_logits
from akd_dist.views import view_of

CPU = torch.device("cpu")
MODULE = Path(__file__).stem
SGD = {"kind": "sgd", "lr": 0.02, "weight_decay": 1e-4, "schedule": {"kind": "linear"}}
ADAMW = {"kind": "adamw", "lr": 2e-3, "clip": 1.0, "schedule": {"kind": "linear"}}


@dataclass
class Trace:
    """What training left: the mean loss of every step, the delivered weights, and how they do on the test rows."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    metric: float


# ---- the cases


def annealing_recipe(data: dict[str, Any], teacher: Any, student: Any, optimizer: Any, **changes: Any) -> Recipe:
    """A recipe of one student with one view per epoch of stage I."""
    objective = {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": 4, "stage2_epochs": 2}
    block = {"name": "student", "model": student, "objective": objective, "optimizer": optimizer} | changes
    return Recipe.model_validate(
        {
            "name": "equality",
            "data": {"views": 4, **data},
            "teacher": {"model": teacher, "train": {"epochs": 1, "optimizer": optimizer}},
            "students": [block | {"batch": 48, "seed": 3}],
            "cache": {"precision": changes.get("precision", "float32")},
            "folder": str(Path(__file__).parent),
        }
    )


def cases(precision: str = "float32") -> dict[str, Recipe]:
    """Images with augmentation, text, and regression; each on data that come with Python or scikit-learn."""
    text = {"train": {"kind": "custom", "factory": f"{MODULE}:passages", "input": "text", "label": "package"}}
    numbers = {"train": {"kind": "custom", "factory": f"{MODULE}:diabetes"}, "task": "regression"}
    noise = {"kind": "custom", "factory": f"{MODULE}:Noise", "arguments": {"scale": 0.02}}
    transformer = {"kind": "text_transformer", "depth": 1, "heads": 2}
    mlp = {"kind": "mlp", "dropout": 0.1}
    return {
        "images": annealing_recipe(
            {"train": {"kind": "digits"}, "augmentation": {"kind": "pad_crop_flip", "pixels": 1}},
            {"kind": "resnet", "depth": 8, "width": 8},
            {"kind": "resnet", "depth": 8, "width": 4},
            SGD,
            precision=precision,
        ),
        "text": annealing_recipe(
            text | {"text": {"kind": "bytes", "length": 48}, "augmentation": {"kind": "token_mask", "share": 0.1}},
            transformer | {"width": 32},
            transformer | {"width": 16, "dropout": 0.1},
            ADAMW,
            precision=precision,
        ),
        "regression": annealing_recipe(
            numbers | {"augmentation": noise}, mlp | {"hidden": 32}, mlp | {"hidden": 8}, ADAMW, precision=precision
        ),
    }


def passages() -> Any:
    """A tenth of the passages of Python's standard library, as an Arrow table of `text` and `package`."""
    from akd_dist.jobs.stdlib_texts import corpus

    table = corpus()
    return table.take(list(range(0, len(table), 10)))


def diabetes() -> Any:
    """scikit-learn's 442 patients: ten measurements, and the progress of their illness, as an Arrow table."""
    import pyarrow as pa
    from sklearn.datasets import load_diabetes

    inputs, labels = load_diabetes(return_X_y=True)
    return pa.table({"input": list(inputs.astype(np.float32)), "label": (labels / 100).astype(np.float32)})


class Noise:
    """A custom augmentation: each number moves by up to `scale`, evenly."""

    words = 10

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def draw(self, words: np.ndarray, _input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Where in -1 to 1 each number's move lies: float32 [n, 10]."""
        return {"move": (words / 2**31 - 1).astype(np.float32)}

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        """The numbers, moved."""
        return batch + self.scale * params["move"]


# ---- the two sides


def online(recipe: Recipe, teacher: nn.Module, splits: Splits, *, pad_to: int | None) -> Trace:
    """Annealing-KD with the teacher called on every batch.

    Args:
        teacher: in eval mode.
        pad_to: rows that a batch is padded to before the teacher sees it; None shows it the batch as it is.
    """
    spec, data = recipe.students[0], recipe.data
    objective, rows = spec.objective, splits.train
    assert isinstance(objective, recipes.AnnealingKD)
    dtype = weights_dtype(spec.precision)
    torch.set_rng_state(seeded_state(spec.seed, 0, 0))
    module = build(ModelCard.of(spec.model, rows, data.normalize)).to(dtype)
    losses: list[float] = []
    best: dict[str, torch.Tensor] = {}
    for stage, (first, epochs) in enumerate(
        [(0, objective.stage1_epochs), (objective.stage1_epochs, objective.stage2_epochs)]
    ):
        if stage == 1:
            module.load_state_dict(best)
            torch.set_rng_state(seeded_state(spec.seed, 1, 0))
        optimizer, total = plain_optimizer(module, spec.optimizer), epochs * math.ceil(len(rows) / spec.batch)
        best_metric, step = -math.inf, 0
        for epoch in range(first, first + epochs):
            order, view = epoch_order(len(rows), data.seed, epoch), epoch % data.views
            module.train()
            for start in range(0, len(rows), spec.batch):
                batch = order[start : start + spec.batch]
                inputs = view_of(data.augmentation, data.seed, rows.inputs[batch], batch, view, tokens=rows.tokens)
                outputs, labels = module(inputs), torch.from_numpy(rows.labels[batch])
                if stage == 0:
                    targets = torch.from_numpy(
                        teacher_logits(teacher, inputs, pad_to or len(batch), recipe.cache.precision)
                    )
                    factor = phi(temperature(epoch + 1, epochs, objective.tau_max), objective.tau_max)
                    each = (outputs - factor * targets.to(dtype)).square().mean(dim=1)
                elif data.task == "regression":
                    each = (outputs[:, 0] - labels.to(dtype)).square()
                else:
                    each = nn.functional.cross_entropy(outputs, labels, reduction="none")
                loss = each.sum() / len(batch)
                for group in optimizer.param_groups:
                    group["lr"] = spec.optimizer.lr * (1 - step / total)
                optimizer.zero_grad()
                loss.backward()
                if spec.optimizer.clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), spec.optimizer.clip)
                optimizer.step()
                losses.append(float(each.detach().sum()) / len(batch))
                step += 1
            metric = evaluate(module, splits.validation, CPU)[0][data.primary_metric]
            if metric > best_metric:
                best_metric = metric
                best = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(best)
    return Trace(losses, best, evaluate(module, splits.test, CPU)[0][data.primary_metric])


def plain_optimizer(module: nn.Module, spec: recipes.Optimizer) -> torch.optim.Optimizer:
    """torch's own, with the settings of the recipe."""
    if isinstance(spec, recipes.Sgd):
        return torch.optim.SGD(
            module.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        module.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True
    )


def cached(job: CohortJob, splits: Splits, stream: Stream) -> Trace:
    """The job's first student from the store, as a worker trains it; every step's loss is kept."""
    spec = job.students[0]
    card = ModelCard.of(spec.model, splits.train, job.data.normalize)
    student = Student(spec, card, Path(job.root) / spec.name, log=Path(job.logs) / "log")
    losses = []
    while student.epoch < student.epochs:
        for batch in stream.batches(student.epoch):
            student.loss_sum = 0.0
            student.take_step(batch, stream.steps_per_epoch)
            losses.append(student.loss_sum / batch.global_rows)
        student.end_epoch(splits.validation)
    assert student.best is not None
    student.module.load_state_dict(student.best)
    return Trace(losses, student.best, evaluate(student.module, splits.test, CPU)[0][job.data.primary_metric])


# ---- the claim


def both(recipe: Recipe, folder: Path, *, padded: bool) -> tuple[Trace, Trace]:
    """The recipe's student from the store, and with the teacher in the loop; under a teacher with random weights.

    Args:
        padded: whether the loop pads the teacher's batches to the store's batch rows.
    """
    splits = prepare(recipe.data, folder / "cache")
    settle("cpu", 1)
    model = recipe.teacher.model
    assert model is not None
    card = ModelCard.of(model, splits.train, recipe.data.normalize)
    save_model(folder / "teacher", build(card, seed=7), card)
    job = cached_job(recipe, splits, folder)
    teacher = load_model(folder / "teacher").to(weights_dtype(recipe.cache.precision))
    with own_generator():
        loop = online(recipe, teacher, splits, pad_to=recipe.cache.batch_rows if padded else None)
    return cached(job, splits, open_stream(job, splits)[0]), loop


def cached_job(recipe: Recipe, splits: Splits, folder: Path) -> CohortJob:
    """The recipe's cohort, its stores filled from the teacher in `folder`."""
    roots = {"store_root": str(folder / "stores"), "cache_root": str(folder / "cache")}
    document = cache_in_process(recipe, str(folder / "teacher"), **roots)
    stores = {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}
    return fleet_job(recipe, splits, stores, folder / "run", roots["cache_root"])


@contextmanager
def own_generator() -> Iterator[None]:
    """Leave torch's generator as it was."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


@dataclass(frozen=True)
class Difference:
    """How far two traces are apart."""

    first_epoch: float
    """Largest difference of two losses in the first epoch."""
    losses: float
    """Largest difference of two losses."""
    weights: float
    """Largest difference of two weights."""
    identical: bool
    """Whether all losses and weights are the same bits."""


def difference(ours: Trace, theirs: Trace, epochs: int) -> Difference:
    """How far two traces of `epochs` epochs are apart."""
    apart = np.abs(np.array(ours.losses) - np.array(theirs.losses))
    same = [torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights]
    weights = [(ours.weights[name] - theirs.weights[name]).abs().max() for name in ours.weights]
    return Difference(
        first_epoch=float(apart[: len(apart) // epochs].max()),
        losses=float(apart.max()),
        weights=float(max(weights)),
        identical=ours.losses == theirs.losses and all(same),
    )


def equality(folder: Path) -> dict[str, dict[str, Difference]]:
    """Each case under the three forms of the claim."""
    forms = {
        "float32, teacher's batches padded": ("float32", True),
        "float32, not padded": ("float32", False),
        "float64, not padded": ("float64", False),
    }
    found: dict[str, dict[str, Difference]] = {}
    for name in cases():
        for form, (precision, padded) in forms.items():
            recipe = cases(precision)[name]
            ours, theirs = both(recipe, folder / f"{name}-{precision}-{padded}", padded=padded)
            found.setdefault(name, {})[form] = difference(ours, theirs, recipe.students[0].objective.epochs)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as f:
        for name, forms in equality(Path(f)).items():
            for form, d in forms.items():
                print(name, form, d)
