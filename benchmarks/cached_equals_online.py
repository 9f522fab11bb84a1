"""Training from the store is the same computation as training with the teacher in the loop; and what is not.

    python benchmarks/cached_equals_online.py                       the figures of its page in docs/explanation
    python benchmarks/cached_equals_online.py --plot docs/figures   ... and its plots; --json prints a document
    python benchmarks/cached_equals_online.py --device cuda         the same claim on a GPU, and nothing else

`online` is the other side of the claim: a plain loop, as short as can be, that calls the teacher on every batch. It
shares with the package only what defines the run: the views, the order of rows, the first weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from akd_dist import recipe as recipes
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.data.views import view_of
from akd_dist.distill.beginnings import seeded_states
from akd_dist.distill.cohort import open_stream
from akd_dist.distill.job import CohortJob
from akd_dist.distill.metrics import evaluate
from akd_dist.distill.orders import epoch_order
from akd_dist.distill.schedules import phi, temperature
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.distill.teacher import teacher_logits
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.train_teacher import Workspace, ensure_trained, run_in_process, teacher_of
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.device import generator_states, set_deterministic, set_generator_states, weights_dtype
from akd_dist.models.folder import load_model, save_model
from akd_dist.models.inference import prepared
from akd_dist.recipe import Recipe
from akd_dist.reporting.seeds import estimate
from akd_dist.storage.decoded import open_decoded
from akd_dist.storage.mean import uris_of
from akd_dist.storage.reader import open_store

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


def annealing_recipe(
    data: dict[str, Any], teacher: Any, student: Any, optimizer: Any, *, precision: str, device: str
) -> Recipe:
    """A recipe of one student with one view per epoch of stage I."""
    objective = {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": 4, "stage2_epochs": 2}
    block = {"name": "student", "model": student, "objective": objective, "optimizer": optimizer}
    return Recipe.model_validate(
        {
            "name": "equality",
            "data": {"views": 4, **data},
            "teacher": {"model": teacher, "train": {"epochs": 1, "optimizer": optimizer}},
            "students": [block | {"batch": 48, "seed": 3, "precision": precision}],
            "cache": {"precision": precision},
            "device": device,
            "folder": str(Path(__file__).parent),
        }
    ).own()


def cases(precision: str = "float32", device: str = "cpu") -> dict[str, Recipe]:
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
            device=device,
        ),
        "text": annealing_recipe(
            text | {"text": {"kind": "bytes", "length": 48}, "augmentation": {"kind": "token_mask", "share": 0.1}},
            transformer | {"width": 32},
            transformer | {"width": 16, "dropout": 0.1},
            ADAMW,
            precision=precision,
            device=device,
        ),
        "regression": annealing_recipe(
            numbers | {"augmentation": noise},
            mlp | {"hidden": 32},
            mlp | {"hidden": 8},
            ADAMW,
            precision=precision,
            device=device,
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
    dtype, device = weights_dtype(spec.precision), torch.device(recipe.device)
    set_generator_states(device, seeded_states(device, spec.seed, 0, 0))
    module = build(ModelCard.of(spec.model, rows, data.normalize)).to(device, dtype)
    losses: list[float] = []
    best: dict[str, torch.Tensor] = {}
    for stage, (first, epochs) in enumerate(
        [(0, objective.stage1_epochs), (objective.stage1_epochs, objective.stage2_epochs)]
    ):
        if stage == 1:
            module.load_state_dict(best)
            set_generator_states(device, seeded_states(device, spec.seed, 1, 0))
        shown = len(rows) if stage == 0 else rows.labelled  # stage II has labels alone to learn from
        optimizer, total = plain_optimizer(module, spec.optimizer), epochs * math.ceil(shown / spec.batch)
        best_metric, step = -math.inf, 0
        for epoch in range(first, first + epochs):
            order, view = epoch_order(shown, data.seed, epoch), epoch % data.views
            module.train()
            for start in range(0, shown, spec.batch):
                batch = order[start : start + spec.batch]
                inputs = view_of(data.augmentation, data.seed, rows.inputs[batch], batch, view, rows.tokens, device)
                outputs, labels = module(inputs), torch.from_numpy(rows.labels[batch]).to(device)
                if stage == 0:
                    said = teacher_logits(teacher, inputs, pad_to or len(batch), recipe.cache.precision)
                    targets = torch.from_numpy(said).to(device)
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
            metric = evaluate(module, splits.validation, device)[0][data.primary_metric]
            if metric > best_metric:
                best_metric = metric
                best = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(best)
    return Trace(losses, best, evaluate(module, splits.test, device)[0][data.primary_metric])


def plain_optimizer(module: nn.Module, spec: recipes.Optimizer) -> torch.optim.Optimizer:
    """torch's own, with the settings of the recipe."""
    if isinstance(spec, recipes.Sgd):
        return torch.optim.SGD(
            module.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        module.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True
    )


def cached(job: CohortJob, splits: Splits, stream: BatchStream) -> Trace:
    """The job's first student from the store, as a worker trains it; every step's loss is kept."""
    spec = job.students[0]
    card = ModelCard.of(spec.model, splits.train, job.data.normalize)
    device = torch.device(job.device)
    student = Student(spec, card, Path(job.root) / spec.name, device=device)
    losses = []
    while student.epoch < student.epochs:
        its = stream.of(student.mix_in(student.stage))
        for batch in its.batches(student.epoch):
            student.loss_sum = 0.0
            student.take_step(batch, its.steps_per_epoch)
            losses.append(student.loss_sum / batch.global_rows)
        student.end_epoch(splits.validation)
    assert student.best is not None
    student.module.load_state_dict(student.best)
    return Trace(losses, student.best, evaluate(student.module, splits.test, device)[0][job.data.primary_metric])


# ---- the claim


def both(recipe: Recipe, folder: Path, *, padded: bool) -> tuple[Trace, Trace]:
    """The recipe's student from the store, and with the teacher in the loop; under a teacher with random weights.

    Args:
        padded: whether the loop pads the teacher's batches to the store's batch rows.
    """
    splits = prepare(recipe.data, folder / "cache")
    device = set_deterministic(recipe.device, 1)
    model = recipe.teacher.model
    assert model is not None
    card = ModelCard.of(model, splits.train, recipe.data.normalize)
    save_model(folder / "teacher", build(card, seed=7), card)
    job = job_of(recipe, str(folder / "teacher"), splits, folder)
    teacher = prepared(load_model(folder / "teacher"), recipe.cache, recipe.device, folder / "cache")
    with own_generator(device):
        loop = online(recipe, teacher, splits, pad_to=recipe.cache.batch_rows if padded else None)
    return cached(job, splits, open_stream(job, splits)[0]), loop


def job_of(recipe: Recipe, teacher: str, splits: Splits, folder: Path) -> CohortJob:
    """The recipe's cohort, its stores filled by the teacher in a folder."""
    roots = {"store_root": str(folder / "stores"), "cache_root": str(folder / "cache")}
    document = cache_in_process(recipe, teacher, **roots)
    stores = {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}
    return fleet_job(recipe, splits, stores, folder / "run", roots["cache_root"])


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were."""
    before = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(device, before)


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


def equality(folder: Path, device: str) -> dict[str, dict[str, Difference]]:
    """Each case under the three forms of the claim."""
    forms = {
        "float32, teacher's batches padded": ("float32", True),
        "float32, not padded": ("float32", False),
        "float64, not padded": ("float64", False),
    }
    found: dict[str, dict[str, Difference]] = {}
    for name in cases():
        for form, (precision, padded) in forms.items():
            recipe = cases(precision, device)[name]
            ours, theirs = both(recipe, folder / f"{name}-{precision}-{padded}", padded=padded)
            found.setdefault(name, {})[form] = difference(ours, theirs, recipe.students[0].objective.epochs)
    return found


# ---- what goes wrong otherwise

SEEDS = range(10)
WAYS = {
    "a view per epoch": "each epoch a new view, on the teacher's logits of that view",
    "one view": "one view for all epochs, on its logits",
    "one view's logits": "each epoch a new view, on the logits of the first",
    "plain logits": "each epoch a new view, on the logits of the row as it is",
}


def harm_recipe(seed: int) -> Recipe:
    """A student of shifted digits, with as many views as stage I has epochs."""
    adamw = {"kind": "adamw", "lr": 5e-3, "schedule": {"kind": "linear"}}
    objective = {"kind": "annealing_kd", "tau_max": 5, "stage1_epochs": 30, "stage2_epochs": 5}
    student = {"name": "student", "model": {"kind": "cnn", "width": 4}, "objective": objective, "optimizer": adamw}
    return Recipe.model_validate(
        {
            "name": "harm",
            "data": {"train": {"kind": "digits"}, "views": 30, "augmentation": {"kind": "shift", "pixels": 2}},
            "teacher": {
                "model": {"kind": "cnn", "width": 32, "depth": 3},
                "train": {"epochs": 60, "optimizer": adamw},
            },
            "students": [student | {"seed": seed}],
        }
    )


def harm(folder: Path) -> dict[str, dict[str, Any]]:
    """How students do that are trained in each of the WAYS, over SEEDS; and how alike the logits are, as a cosine."""
    recipe = harm_recipe(0)
    splits = prepare(recipe.data, folder / "cache")
    set_deterministic("cpu", 1)
    place = Workspace(str(folder / "stores"), str(folder / "cache"))
    trained = teacher_of(recipe, splits)
    assert trained is not None
    teacher = ensure_trained(trained, recipe, splits, place, run_in_process)
    still = recipe.data.model_copy(update={"views": 1, "augmentation": recipes.NoAugmentation()})
    plain = stored_logits(recipe.model_copy(update={"data": still}), teacher, splits, folder)
    found: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        job = dataclasses.replace(job_of(harm_recipe(seed), teacher, splits, folder), root=str(folder / f"run-{seed}"))
        stream = with_all(job, splits)
        streams = {
            "a view per epoch": stream,
            "one view": dataclasses.replace(stream, views=1),
            "one view's logits": with_logits(stream, array_of(stream)[:1]),
            "plain logits": with_logits(stream, plain[:1]),
        }
        for way, other in streams.items():
            alike = found.setdefault(way, {"accuracy": [], "cosine": cosine(stream, other)})
            alike["accuracy"].append(cached(job, splits, other).metric)
    return found


def with_all(job: CohortJob, splits: Splits) -> BatchStream:
    """A cohort's stream, with the logits of all views in an array [views, rows, classes]."""
    stream, store = open_stream(job, splits)[0], open_store(uris_of(job.stores)[0])
    views = [open_decoded(store, Path(job.cache_root), view) for view in range(stream.views)]
    return dataclasses.replace(stream, logits=np.stack(views))


def array_of(stream: BatchStream) -> np.ndarray:
    """The logits of a stream that has them in an array."""
    assert isinstance(stream.logits, np.ndarray)
    return stream.logits


def with_logits(stream: BatchStream, one: np.ndarray) -> BatchStream:
    """The same batches, with one view's logits [1, rows, classes] in every epoch."""
    return dataclasses.replace(stream, logits=np.broadcast_to(one, (stream.views, *one.shape[1:])))


def cosine(true: BatchStream, other: BatchStream) -> float:
    """Mean cosine of the logits that the student is shown and those of the teacher for the very view it sees."""
    shown = array_of(other)[: other.views].astype(np.float64)
    right = array_of(true)[: other.views].astype(np.float64)
    lengths = np.linalg.norm(shown, axis=2) * np.linalg.norm(right, axis=2)
    return float(((shown * right).sum(axis=2) / lengths).mean())


def stored_logits(recipe: Recipe, teacher: str, splits: Splits, folder: Path) -> np.ndarray:
    """The teacher's logits of the train rows, [views, rows, classes]."""
    return array_of(with_all(job_of(recipe, teacher, splits, folder), splits))


# ---- what it says


@click.command()
@click.option("--plot", "plots", type=click.Path(file_okay=False, path_type=Path), help="Write the plots here, as SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="On a GPU, only the claim itself.")
def main(plots: Path | None, as_json: bool, device: str) -> None:
    """Show that training from the store is training with the teacher in the loop, and what is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        same = equality(folder, device)
        wrong = harm(folder / "harm") if device == "cpu" else {}
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            plot_equality(plots / "cached-equals-online.svg", folder / "plot")
            plot_harm(plots / "one-view-cached.svg", wrong)
    if as_json:
        told = {
            name: {form: dataclasses.asdict(apart) for form, apart in forms.items()} for name, forms in same.items()
        }
        click.echo(json.dumps({"equality": told, "harm": wrong}, indent=1))
        return
    click.echo("| case | form | first epoch's losses | all losses | final weights | same bits |")
    click.echo("|---|---|--:|--:|--:|---|")
    for name, forms in same.items():
        for form, apart in forms.items():
            figures = f"{apart.first_epoch:.1e} | {apart.losses:.1e} | {apart.weights:.1e}"
            click.echo(f"| {name} | {form} | {figures} | {'yes' if apart.identical else 'no'} |")
    if not wrong:
        return
    click.echo("\n| what the student is shown | cosine | test accuracy % | against the first, paired |")
    click.echo("|---|--:|--:|--:|")
    first = wrong["a view per epoch"]["accuracy"]
    for way, result in wrong.items():
        apart_by_seed = [ours - theirs for ours, theirs in zip(result["accuracy"], first, strict=True)]
        paired = "" if result["accuracy"] is first else shown_estimate(apart_by_seed)
        click.echo(f"| {WAYS[way]} | {result['cosine']:.4f} | {shown_estimate(result['accuracy'])} | {paired} |")


def shown_estimate(values: list[float]) -> str:
    """Mean and half of the 95 % interval, in percent."""
    found = estimate(dict(enumerate(values)))
    assert found is not None
    assert found.high is not None
    return f"{100 * found.mean:.2f} ± {100 * (found.high - found.mean):.2f}"


def plot_equality(path: Path, folder: Path) -> None:
    """Each case's losses, step by step: a line from the store, dots with the teacher in the loop."""
    figure, panels = new_figure(len(cases()))
    for axes, (name, recipe) in zip(panels, cases().items(), strict=True):
        ours, loop = both(recipe, folder / name, padded=True)
        steps = np.arange(len(loop.losses))
        sparse = slice(None, None, max(1, len(steps) // 60))
        axes.plot(steps, ours.losses, color="#3b82d6", linewidth=1.2, label="from the store")
        axes.plot(
            steps[sparse],
            np.array(loop.losses)[sparse],
            "o",
            color="#d14f7c",
            markersize=2.5,
            label="teacher in the loop",
        )
        axes.set(title=name, xlabel="step", yscale="log")
    panels[0].set_ylabel("loss")
    panels[-1].legend(frameon=False, loc="upper left")
    save(figure, path)


def plot_harm(path: Path, wrong: dict[str, dict[str, Any]]) -> None:
    """Test accuracy of each seed, by what the student was shown."""
    figure, (axes,) = new_figure(1)
    for place, result in enumerate(wrong.values()):
        values = 100 * np.array(result["accuracy"])
        axes.plot(values, np.full(len(values), place), "o", color="#3b82d6", alpha=0.5)
        axes.plot(values.mean(), place, "|", color="black", markersize=18)
        axes.annotate(
            f"cosine {result['cosine']:.3f}",
            (values.min(), place),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(wrong)), list(wrong))
    axes.invert_yaxis()
    axes.margins(x=0.35, y=0.15)
    axes.set_xlabel("test accuracy, %")
    save(figure, path)


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure whose bytes depend on nothing but what is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {"svg.hashsalt": MODULE, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * panels if panels > 1 else 6.4, 2.8), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def save(figure: Any, path: Path) -> None:
    """As SVG without a date."""
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
