"""What encodings of a teacher's logits take and how well they describe it, on some rows, before anything is cached.

akd-dist plan jobs/language_model.yaml --budget 40GB
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.blocks import default_threads
from akd_dist.data.rows import SPLITS, Rows
from akd_dist.distill import cards
from akd_dist.distill.dictionary import HiddenProbe, LogitProbe, Probe
from akd_dist.distill.fidelity import Card, TopKOnly
from akd_dist.distill.output_head import parts
from akd_dist.distill.target_shards import dictionary_of_probe, drawn_rows, rows_for, teacher_for
from akd_dist.distill.target_teacher import TargetTeacher
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from akd_dist.documents.encodings import AtTemperature, EncodingsDocument, PlannedEncoding
from akd_dist.jobs.planning.caching import Inputs, open_inputs
from akd_dist.jobs.planning.creations import identity_of
from akd_dist.jobs.planning.language import temperatures_asked
from akd_dist.jobs.planning.models import CachedModel
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.card import blocks_of
from akd_dist.models.device import set_deterministic
from akd_dist.models.folder import read_model
from akd_dist.models.inference import prepared
from akd_dist.options import PlanOptions
from akd_dist.recipe import EncodingSpec, Recipe
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.top_k import TopK, top_k_from_config
from akd_dist.tracking.progress import Meter, meter

SIZES = ((6, 8), (8, 8), (16, 16), (64, 32))
"""k and rank of what is compared."""
PEERS = (8, 32)
"""Logits of what other systems store."""
_FITTED = 1024  # targets that dictionaries are made from here: enough to compare
_HELD_BYTES = 2**29  # of logits that are held, where the teacher would have to be run for them again and again
_MOST_TEMPERATURES = 6


def plan_encodings(recipe: Recipe, options: PlanOptions) -> dict[str, Any]:
    """Measure several encodings with the real teacher, in this process; nothing is stored.

    Returns:
        The document that `akd-dist plan --json` prints.

    Raises:
        RecipeError: the budget is no size.
        RefusedError: there is no teacher yet, or none but stores; no encoding fits the budget.
    """
    budget = _budget_of(options.budget)
    recipe, console = recipe.own(), options.console or Console(stderr=True)
    workspace = Workspace(options.stores, options.cache, console=console)
    inputs = open_inputs(recipe, workspace, students=False, again=False, only_look=True)
    teacher = _teacher(inputs, workspace)
    temperatures = temperatures_of(recipe)
    top_k = _own(recipe) or TopK()
    fitted, probe, rows_measured = _probes(teacher, top_k, console)
    targets = _candidates(recipe, teacher, fitted, probe, temperatures, console)
    found = _measured(probe, {name: one for name, (_, _, one) in targets.items()}, temperatures, teacher, console)
    count = sum(_targets(recipe, split, getattr(inputs.splits, split)) for split in SPLITS)
    own = recipe.cache.encoding.config()
    rows = [_planned(name, *targets[name][:2], card, count, own) for name, card in found.items()]
    rows = _marked(sorted(rows, key=lambda one: (one.bytes_per_target, one.error)))
    best = None if budget is None else _best(rows, budget)
    ours = next((one for one in rows if one.own), None)
    card = None if ours is None else {"targets": len(cards.chosen(probe)), "at": [one.plain() for one in ours.at]}
    return EncodingsDocument(
        classes=teacher.classes,
        targets=count,
        rows_measured=rows_measured,
        targets_measured=len(cards.chosen(probe)),
        temperatures=list(temperatures),
        encodings=rows,
        budget=budget,
        chosen=None if best is None else best.name,
        line=None if best is None else _line(best.encoding or {}),
        warnings=[*cards.fidelity_warnings(card, temperatures), *cards.mass_warnings(card)],
    ).plain()


def temperatures_of(recipe: Recipe) -> tuple[float, ...]:
    """1, and the temperatures of the teacher that the recipe's students ask for: of long annealings some of them."""
    ordered = sorted({1.0}.union(*(temperatures_asked(spec.objective) for spec in recipe.students)))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _MOST_TEMPERATURES)).round().astype(int))
    return tuple(ordered[place] for place in places)


def _teacher(inputs: Inputs, workspace: Workspace) -> TargetTeacher:
    """The recipe's teacher, as its logits would be computed, on the train rows.

    Raises:
        RefusedError: it is still to be trained, there are several, or only stores.
    """
    recipe, rows = inputs.recipe, inputs.splits.train
    model = inputs.models[0] if inputs.models else None
    if model is None or model.card is None or recipe.teacher.members is not None:
        got = "several teachers" if recipe.teacher.members is not None else "stores of logits alone"
        raise RefusedError(
            "there is no teacher to be asked",
            got="one that this recipe trains, and has not trained yet" if model is None else got,
            expected="one model whose weights are there",
            next="run akd-dist cache-teacher first, which trains it" if model is None else "name one model as teacher",
        )
    if rows.task == "regression":
        raise RefusedError("a regression has one number a row, and no encodings to choose from", got="regression")
    set_deterministic(recipe.device, default_threads())  # nothing of it is stored, so all cores may share it
    module = prepared(_module(model, recipe, rows, workspace), recipe.cache, recipe.device, Path(workspace.cache_root))
    layout = identity_of(recipe, rows, "train", "").layout
    return teacher_for(module, rows, recipe.cache, layout, recipe.data.augmentation, recipe.data.seed)


def _module(model: CachedModel, recipe: Recipe, rows: Rows, workspace: Workspace) -> torch.nn.Module:
    if model.imported is not None:
        return model.imported.module(Path(workspace.cache_root))
    blocks = blocks_of(rows) if rows.task == "language_model" else None
    return read_model(model.model_uri, recipe.trusted, blocks=blocks)[0]


def _probes(teacher: TargetTeacher, top_k: TopK, console: Console) -> tuple[Probe, Probe, int]:
    """Targets that dictionaries are made from, no more than are needed to compare, and others that are measured; and
    how many rows those are of."""
    rows, (fitted, measured) = teacher.rows, drawn_rows(teacher.rows, top_k)
    fewest = cards.MEASURED_ROWS if teacher.head is not None else 1  # whose hidden states are kept, not its logits
    fitted = _spread(fitted, max(fewest, rows_for(rows, fitted, _FITTED)))
    with meter(console, "running the teacher", len(fitted) + len(measured)) as shown:
        done = _adding(shown)
        made = _held(teacher, fitted, done), _held(teacher, measured, done)
    if isinstance(made[0], HiddenProbe):
        kept = torch.from_numpy(_spread(np.arange(len(made[0])), _FITTED))
        return dataclasses.replace(made[0], h=made[0].h[kept]), made[1], len(measured)
    return *made, len(measured)


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """So many of some numbers, evenly spaced; all if there are no more."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(np.int64)
    return numbers[places]


def _adding(shown: Meter) -> Callable[[float], None]:
    """What tells a meter how much more is done."""
    done = 0.0

    def add(more: float) -> None:
        nonlocal done
        done += more
        shown.update(done)

    add(0)
    return add


def _held(teacher: TargetTeacher, numbers: np.ndarray, done: Callable[[float], None]) -> Probe:
    """The targets of some rows, for which the teacher is run once if what it says of them can be held."""
    probe = teacher.probe(numbers, done)
    if isinstance(probe, HiddenProbe):
        return probe
    each = torch.arange(len(probe), device=teacher.device)
    if 4 * len(probe) * teacher.classes > _HELD_BYTES:
        done(len(numbers))
        return probe
    found = []
    for part in torch.split(each, teacher.size):
        found.append(probe.logits(part))
        done(len(part) * len(numbers) / len(each))
    return LogitProbe(torch.cat(found))


def _measured(
    probe: Probe, targets: dict[str, Targets], temperatures: Sequence[float], teacher: TargetTeacher, console: Console
) -> dict[str, Card]:
    count = len(targets) * len(temperatures) * len(cards.chosen(probe))
    with meter(console, "comparing what is decoded", count, "targets") as shown:
        return cards.measure(probe, targets, temperatures, teacher, _adding(shown))


Candidate = tuple[dict[str, Any] | None, int, Targets]
"""The encoding as `cache.encoding` has it, or None; bytes of a target; what is decoded of the measured targets."""


def _candidates(
    recipe: Recipe,
    teacher: TargetTeacher,
    fitted: Probe,
    probe: Probe,
    temperatures: Sequence[float],
    console: Console,
) -> dict[str, Candidate]:
    """Encodings by name, each once."""
    numbers, classes = cards.chosen(probe), teacher.classes
    found: dict[str, Candidate] = {}
    own = _own(recipe)
    dense = ["float16"] + ([] if own is not None else [recipe.cache.encoding.kind])
    for kind in dict.fromkeys(dense):
        dtype = torch.float16 if kind == "float16" else torch.float32
        each = [probe.logits(numbers[part]).to(dtype) for part in parts(0, len(numbers), teacher.chunk)]
        size = np.dtype(kind).itemsize * classes
        config = recipe.cache.encoding.config() if kind == recipe.cache.encoding.kind else {"name": kind}
        found[str(encoding_from_config(config))] = (config, size, DenseTargets(torch.cat(each)))
    width = probe.h.shape[1] if isinstance(probe, HiddenProbe) else classes
    settings = [] if own is None else [own]
    settings += [dataclasses.replace(own or TopK(), k=k, rank=rank) for k, rank in SIZES]
    fitting = [one for one in dict.fromkeys(settings) if one.k < classes and one.rank <= min(width, len(fitted) // 2)]
    with meter(console, "making dictionaries", len(fitting) * len(fitted), "targets") as shown:
        done = _adding(shown)
        for one in fitting:
            made = cards.tail_dictionary(dictionary_of_probe(fitted, one, teacher.chunk), one, teacher.device)
            stored_as = cards.stored_targets(probe, numbers, one, made, teacher.chunk)
            found[str(one)] = (one.config(), cards.bytes_of(one, classes), stored_as)
            done(len(fitted))
    return found | _peers(probe, numbers, classes, temperatures, teacher.chunk)


def _peers(
    probe: Probe, numbers: torch.Tensor, classes: int, temperatures: Sequence[float], chunk: int
) -> dict[str, Candidate]:
    """The largest probabilities alone, as other systems store them."""
    found: dict[str, Candidate] = {}
    for k in PEERS:
        if k < classes:
            plain = cards.captured_of(probe, numbers, k, temperatures, None, chunk)
            size = k * (2 + (2 if classes <= 1 << 16 else 4))
            given = (plain, tuple(temperatures), classes)
            found[f"top {k} alone, renormalised"] = (None, size, TopKOnly(*given, "none"))
            found[f"top {k} and a ghost of the rest"] = (None, size + 2, TopKOnly(*given, "ghost"))
    return found


def _own(recipe: Recipe) -> TopK | None:
    """The recipe's own encoding, where that describes logits."""
    config = recipe.cache.encoding.config()
    return top_k_from_config(config) if config["name"] == TopK.name else None


def _targets(recipe: Recipe, split: str, rows: Rows) -> int:
    return rows.targets * (recipe.data.views if split == "train" else 1)


def _planned(
    name: str, config: dict[str, Any] | None, size: int, card: Card, targets: int, own: Mapping[str, Any]
) -> PlannedEncoding:
    plain = cards.plain_card(card, targets)
    errors = [
        value
        for one in card.at
        for value in (
            (one.unigram_error, one.other_error)
            if one.unigram_hidden_error is None or one.other_hidden_error is None
            else (one.unigram_hidden_error, one.other_hidden_error)
        )
    ]
    return PlannedEncoding(
        name=name,
        encoding=config,
        bytes_per_target=size,
        bytes=size * targets,
        own=config is not None and config == own,
        dominated=False,
        error=float(f"{np.mean(errors):.5g}"),
        agreement=plain["agreement"],
        unexplained=plain["unexplained"],
        at=[AtTemperature(**one) for one in plain["at"]],
    )


def _marked(rows: list[PlannedEncoding]) -> list[PlannedEncoding]:
    def better(one: PlannedEncoding, other: PlannedEncoding) -> bool:
        pair = (one.bytes_per_target, one.error), (other.bytes_per_target, other.error)
        return one.encoding is not None and pair[0] != pair[1] and all(a <= b for a, b in zip(*pair, strict=True))

    return [one.model_copy(update={"dominated": any(better(other, one) for other in rows)}) for one in rows]


def _best(rows: Sequence[PlannedEncoding], budget: int) -> PlannedEncoding:
    ours = [one for one in rows if one.encoding is not None]
    fitting = [one for one in ours if one.bytes <= budget]
    if not fitting:
        raise RefusedError(
            "no encoding fits the budget",
            got=f"{budget:,} bytes",
            expected=f"at least {ours[0].bytes:,}, which {ours[0].name} takes",
            next="raise --budget, or cache fewer rows (data.subset)",
        )
    return min(fitting, key=lambda one: (one.error, one.bytes))


def _line(config: Mapping[str, Any]) -> str:
    """What `cache:` has to say to take an encoding: what is as by default is left out."""
    kind, defaults = config["name"], EncodingSpec(kind="top_k").config()
    given = {name: value for name, value in config.items() if name != "name" and defaults.get(name) != value}
    if not given:
        return f"encoding: {kind}"
    return "encoding: {" + ", ".join(f"{name}: {value}" for name, value in {"kind": kind, **given}.items()) + "}"


def _budget_of(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(text if text.isascii() else None))
    except ValidationError:
        raise RecipeError(
            "--budget is not a size", got=text, expected="bytes, such as 40GB", next="correct it, or leave it out"
        ) from None
