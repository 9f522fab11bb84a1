"""Models tried before anything starts: on real rows, in the mode and on the smallest batch that they will meet.

What a worker would find out at the last step of an epoch, or a caching task after the teacher was trained, is known
here within a second. A command and its `--dry-run` call the same functions, so they refuse the same.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.formatting import counted
from akd_dist.data.rows import Rows
from akd_dist.distill import hooks
from akd_dist.distill.batch_norm import has_batch_norm, refuse_own_batch_norms
from akd_dist.distill.capture import capture_logits
from akd_dist.distill.dictionary import check_rank
from akd_dist.distill.language_trial import check_some_batch, try_language_model
from akd_dist.distill.objectives import mix_of, stages_of
from akd_dist.distill.orders import ALL, LABELLED, Batches, Mix
from akd_dist.distill.teacher import teacher_logits
from akd_dist.models.build import check_model, check_output, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.device import weights_dtype
from akd_dist.models.inference import compiled_by, has_images, prepared
from akd_dist.models.language import LanguageModel
from akd_dist.models.output_layer import output_layer
from akd_dist.models.outputs import are_probabilities
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.top_k import TopK, top_k_from_config

log = logging.getLogger(__name__)

_LABELS = 256  # rows whose labels a metric of the user's own is tried on
# How far logits may be from those of another way to compute the same, as a share of the largest.
_CLOSE: dict[recipe.Precision, float] = {"float32": 1e-3, "float64": 1e-8, "bfloat16": 0.1, "float16": 0.02}
_SEVERAL = 8  # rows, to see that a model gives logits for each of more than two

_REMEDIES: tuple[tuple[recipe.LastBatch, str], ...] = (
    ("merge", "merge (its rows join the batch before)"),
    ("drop", "drop (they are left out)"),
)


def try_training(
    model: recipe.Model,
    trainings: Iterable[tuple[str, recipe.Training]],
    rows: Rows,
    data: recipe.DataSpec,
) -> int:
    """Build a model that is to be trained, and run it as its trainings will.

    Args:
        model: what is trained.
        trainings: how, each with whose it is, for the message: `teacher.train`, `the student mlp-8`.
        rows: the train rows.
        data: how the recipe has them.

    Returns:
        How many trained numbers it has.

    Raises:
        RefusedError: it does not fit memory, cannot be built, does not give a logit per class, or cannot be trained on
            batches of the size that it will meet.
    """
    card = ModelCard.of(model, rows, data.normalize, data.image)
    module = check_model(card)
    if isinstance(module, LanguageModel):
        for whose, training in trainings:
            _try_hooks(rows, training)
            try_language_model(module, card, rows, whose, training)
        return num_parameters(module)
    _warn_of_probabilities(check_output(module.eval(), card, _some(rows, 2)), card)
    tried = set()
    if data.own_metric is not None and rows.labelled:
        hooks.try_metric(data.own_metric, rows.labels[: min(_LABELS, rows.labelled)], rows.classes)
    for whose, training in trainings:
        _check_labels(rows, whose, training)
        _try_hooks(rows, training)
        for mix in _mixes(training, rows):
            if (alike := (training.batch, training.last_batch, _workers(training), mix)) not in tried:
                _try_batches(module, card, rows, whose, training, mix)
                tried.add(alike)
    return num_parameters(module)


def _mixes(training: recipe.Training, rows: Rows) -> list[Mix]:
    """The mixes of rows that its stages show; a teacher is trained on labels."""
    if not isinstance(training, recipe.Learning):
        return [LABELLED]
    found = [mix_of(stage, training.labelled) for stage in stages_of(training)]
    return list(dict.fromkeys(found if rows.unlabelled else [ALL]))


def _check_labels(rows: Rows, whose: str, training: recipe.Training) -> None:
    """Refuse a mix that these rows cannot fill."""
    wanted = training.labelled if isinstance(training, recipe.Learning) else None
    if wanted is not None and (not rows.unlabelled or wanted > rows.labelled):
        raise RefusedError(
            f"batches with labelled: {wanted} cannot be made",
            got=f"{rows.labelled:,} train rows with labels, {rows.unlabelled:,} without",
            expected=f"at least {wanted:,} with labels, and some without",
            next=f"change `labelled` in {whose}, or leave it out",
        )


def _try_hooks(rows: Rows, training: recipe.Training) -> None:
    """Refuse functions of the user's own that do not give what they should."""
    objective = getattr(training, "objective", None)  # a teacher's is always the labels
    if isinstance(objective, recipe.CustomObjective):
        hooks.try_objective(objective, rows.classes, rows.task, _workers(training)[0], unlabelled=rows.unlabelled > 0)
    if isinstance(training, recipe.StudentSpec) and training.on_epoch_end is not None:
        hooks.function_of(training.on_epoch_end, hooks.CALLBACK)


def try_teacher(module: nn.Module, card: ModelCard, rows: Rows, cache: recipe.CacheSpec) -> None:
    """Run trained weights on two rows, as they will be for a store; in float32 where that is in half precision.

    Args:
        module: in eval mode; left as it is.

    Raises:
        RefusedError: it returns no logits, not one for each class, or such as cannot be stored, or described.
    """
    wanted = weights_dtype(cache.precision)  # which is not half: autocast lacks some kernels on a CPU
    if any(one.dtype != wanted for one in module.parameters()):
        module = copy.deepcopy(module).to(wanted)
    inputs = _some(rows, 2)
    _warn_of_probabilities(check_output(module, card, inputs), card)
    logits = teacher_logits(module, inputs, len(inputs))
    config = cache.encoding.config()
    if config["name"] == TopK.name:
        top_k = top_k_from_config(config)
        if (output := output_layer(module, inputs)) is not None:
            check_rank(top_k.rank, output.layer.in_features)
        given = torch.from_numpy(logits)
        capture_logits(given, None, k=top_k.k, temperatures=top_k.tail_temperatures, named="row {}".format)
    else:
        encoding_from_config(config).encode(logits, first_row=0)


def try_inference(
    module: nn.Module, card: ModelCard, rows: Rows, cache: recipe.CacheSpec, device: str, cache_root: Path
) -> None:
    """Run a teacher in the way that a recipe asks for beside torch's own: on a whole batch, as for a store.

    What it says of a row may not depend on where in a batch the row stands, or a student would not learn from the
    stored logits what it would from the teacher itself; and it has to be close to what is said without that way.

    Args:
        module: in eval mode; left as it is.
        device: `cpu` or `cuda`. Without such a device here, the first task finds out.
        cache_root: where compiled code is kept.

    Raises:
        RefusedError: the way cannot work for this model or these rows.
        MachineError: there is no compiler here.
    """
    if not cache.inference or (device == "cuda" and not torch.cuda.is_available()):
        return
    if cache.channels_last and not (len(rows.shape) == 3 and has_images(module)):
        what = "inputs that are images" if len(rows.shape) != 3 else "a model with convolutions"
        raise RefusedError(
            "cache.channels_last lays out nothing here",
            got=f"{card.model.label} on inputs of shape {list(rows.shape)}",
            expected=what,
            next="leave cache.channels_last out",
        )
    if cache.compile and not compiled_by(device):
        raise MachineError(
            "cache.compile needs a compiler, and there is none here",
            got="no g++ (or what CXX names)" if device == "cpu" else "no Triton beside torch",
            expected="a C++ compiler for a CPU, Triton for a GPU",
            next="install one, or leave cache.compile out",
        )
    inputs, size, asked = _some(rows, cache.batch_rows), cache.batch_rows, " and cache.".join(cache.inference)
    usual = recipe.CacheSpec(precision=cache.precision)
    try:
        placed = prepared(copy.deepcopy(module), cache, device, cache_root)
        said, turned = (teacher_logits(placed, one, size, cache.precision) for one in (inputs, inputs.roll(1, 0)))
        first = inputs[: min(size, _SEVERAL)]
        plain = teacher_logits(prepared(copy.deepcopy(module), usual, device, cache_root), first, size, cache.precision)
    except Exception as error:  # compilers raise all kinds
        raise RefusedError(
            f"the model {card.model.label} cannot be run with cache.{asked}",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            expected="logits of a batch",
            next=f"leave cache.{asked} out",
        ) from error
    apart, most = float(np.abs(said[: len(plain)] - plain).max()), float(np.abs(plain).max())
    problem = None
    if not np.array_equal(np.roll(said, 1, axis=0), turned):
        problem = "other logits for a row in another place of the batch", "the same, to the bit"
    elif not apart <= _CLOSE[cache.precision] * max(1.0, most):
        problem = (
            f"logits that differ by {apart:.2g} from those without it",
            f"logits close to them, of up to {most:.2g}",
        )
    if problem is not None:
        raise RefusedError(
            f"cache.{asked} changes what {card.model.label} says",
            got=problem[0],
            expected=problem[1],
            next=f"leave cache.{asked} out",
        )


def _some(rows: Rows, count: int) -> torch.Tensor:
    """The first rows, over again where there are fewer: raw inputs [count, *shape]."""
    return torch.from_numpy(np.asarray(rows.inputs.take(np.arange(count) % len(rows), axis=0)))


def _warn_of_probabilities(logits: torch.Tensor, card: ModelCard) -> None:
    """Say so where a softmax seems to have been taken. It is no mistake for sure, so it is not refused."""
    if card.task == "classification" and card.classes > 1 and are_probabilities(logits):
        log.warning(
            "the model %s seems to return probabilities: each of two rows sums to 1. Losses and stores take logits, "
            "from before the softmax: leave it out of the model",
            card.model.label,
        )


def _try_batches(
    module: nn.Module, card: ModelCard, rows: Rows, whose: str, training: recipe.Training, mix: Mix
) -> None:
    """Refuse batches that a model cannot be trained on: too few rows for its batch statistics, or none at all."""
    cut = Batches(len(rows), rows.labelled, training.batch, training.last_batch, mix)
    ends, which = cut.ends, "train rows with labels" if mix == LABELLED and rows.unlabelled else "train rows"
    check_some_batch(cut, card.model.label, which, whose)
    workers, together = _workers(training)
    if together:
        refuse_own_batch_norms(module)
    module.train()
    first, last = int(ends[0]), int(np.diff(ends, prepend=0)[-1])
    # Two rows are the cheapest try. A model that wants more is refused only if its usual batch fails as well.
    two = _refusal(module, card, rows, 2)
    if two is not None and ((usual := first // workers) <= 2 or _refusal(module, card, rows, usual) is not None):
        raise two
    if isinstance(card.model, recipe.Custom):
        if (refused := _refusal(module, card, rows, max(2, min(_SEVERAL, first // workers)))) is not None:
            raise refused
        _check_trainable(module, card, rows)
    for size in {first, last}:
        for share in _few(size, workers, together):
            seen = share if share or has_batch_norm(module) else 1  # a worker without rows is shown a spare one
            if (refused := _refusal(module, card, rows, seen)) is not None:
                raise _too_few(card, cut, whose, training, size, share, refused)


def _check_trainable(module: nn.Module, card: ModelCard, rows: Rows) -> None:
    """Refuse code of the user's own that gives a loss nothing to improve, or no loss at all."""
    logits = module(_some(rows, 2))
    problem = None
    if not any(parameter.requires_grad for parameter in module.parameters()):
        problem = "no parameter that requires a gradient", "return a module with weights, not all of them frozen"
    elif not logits.requires_grad:
        problem = "logits that are cut off from the weights", "leave out detach() and torch.no_grad() in `forward`"
    elif not bool(torch.isfinite(logits).all()):
        problem = (
            "logits that are not finite, of two rows and fresh weights",
            "see how the weights are initialised",
        )
    if problem is not None:
        raise RefusedError(
            f"the model {card.model.label} cannot be trained",
            got=problem[0],
            expected="weights that a gradient reaches, and a finite loss",
            next=problem[1],
        )


def _few(size: int, workers: int, together: bool) -> set[int]:
    """The numbers of rows, 0 or 1, over which batch statistics are taken in some worker's part of a batch."""
    shares = {size // workers, -(-size // workers)}
    if together:  # a worker may have one row of several, or none
        shares = (shares & {0}) | {size}
    return {share for share in shares if share < 2}


def _workers(training: recipe.Training) -> tuple[int, bool]:
    """How many workers share a batch, and whether they take batch statistics together."""
    if not isinstance(training, recipe.StudentSpec):
        return 1, False
    return training.workers, training.sync_batchnorm and training.workers > 1


def _refusal(module: nn.Module, card: ModelCard, rows: Rows, count: int) -> RefusedError | None:
    """Why a module in training mode does not take so many rows; None where it does."""
    try:
        check_output(module, card, _some(rows, count))
    except RefusedError as error:
        return error
    return None


def _too_few(
    card: ModelCard, cut: Batches, whose: str, training: recipe.Training, size: int, share: int, why: RefusedError
) -> RefusedError:
    workers, together = _workers(training)
    which = "the last batch of an epoch has" if size < training.batch else "a batch has"
    part = "" if workers == 1 else f", and a worker's part of it {counted(share, 'row')}"
    remedies = [
        f"last_batch: {words}"
        for last_batch, words in _REMEDIES
        if len(ends := dataclasses.replace(cut, last_batch=last_batch).ends)
        and not any(_few(int(one), workers, together) for one in np.diff(ends, prepend=0))
    ]
    if workers > 1 and not together:
        remedies += ["sync_batchnorm: true"] * (size > 1) + ["fewer workers"]
    return RefusedError(
        f"the model {card.model.label} cannot be trained on {counted(share, 'row')} alone",
        got=f"{cut.passed:,} train rows in batches of {training.batch}: {which} {counted(size, 'row')}{part}; "
        f"{why.got}",
        expected="two rows or more at a time, since the model takes statistics of them",
        next=f"set {', or '.join(remedies or ['another batch'])} in {whose}",
    )
