"""What is refused of language models and of encodings that describe logits, before a teacher is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from akd_dist import recipe as recipes
from akd_dist.base.errors import RefusedError
from akd_dist.base.formatting import some_of
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.data.tokenizers import check_same_meaning, language_tokenizer, used_ids
from akd_dist.distill.agreement import check_in_store
from akd_dist.distill.cards import fidelity_warnings
from akd_dist.distill.dictionary import check_rank
from akd_dist.distill.language_check import check_on_blocks
from akd_dist.distill.target_teacher import LanguageTeacher
from akd_dist.models.card import blocks_of
from akd_dist.models.folder import read_model
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Recipe
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.top_k import TopK, top_k_from_config

if TYPE_CHECKING:
    from akd_dist.jobs.planning.models import CachedModel
    from akd_dist.jobs.train_teacher import Workspace

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def check_can_be_cached(recipe: Recipe, splits: Splits) -> None:
    """Refuse what no store can be made of, whatever the teacher is.

    Raises:
        RefusedError: an ensemble of logits that are described, or of language models; an encoding that does not fit the
            classes or the rows; a way to run a teacher that language models do not have.
    """
    cache, language = recipe.cache, splits.train.task == "language_model"
    described = cache.encoding.kind == TopK.name
    if recipe.teacher.members is not None and (described or language):
        what = "described by cache.encoding: top_k" if described else "of several targets a row"
        raise RefusedError(
            f"an ensemble cannot learn from logits {what}",
            got=f"{len(recipe.teacher.each)} teachers, whose mean has no largest logits that one of their stores has"
            if described
            else f"{len(recipe.teacher.each)} teachers",
            expected="one teacher",
            next="name one teacher"
            + ("; or cache.encoding: float16, of which means are taken" if not language else ""),
        )
    if language and cache.inference:
        asked = next(iter(cache.inference))
        raise RefusedError(
            f"cache.{asked} is not for language models",
            got=f"cache.{asked}: true",
            expected="it left out",
            next=f"leave cache.{asked} out, or set cache.precision: bfloat16 to be faster",
        )
    if described:
        top_k = top_k_from_config(cache.encoding.config())
        top_k.arrays(splits.train.classes)
        for split in SPLITS:
            _check_targets(getattr(splits, split), split, top_k)


def _check_targets(rows: Rows, split: str, top_k: TopK) -> None:
    needed = max(2, 2 * top_k.rank)
    if rows.targets < needed:
        raise RefusedError(
            f"the {split} rows are too few for the dictionary of their store",
            got=f"{rows.targets:,} targets for rank {top_k.rank}",
            expected=f"at least {needed:,}, better eight times the rank",
            next=f"lower cache.encoding.rank, or give data.{split} more rows",
        )


def check_language_teacher(model: CachedModel, recipe: Recipe, splits: Splits, workspace: Workspace) -> None:
    """Compare a language model's tokenizer with that of the data, try it on a block, and ask it for next tokens.

    Raises:
        RefusedError: ids that the data uses mean something else to it; it has no logit for some; its logits are not
            finite, or cannot be stored.
    """
    assert model.card is not None
    source = model.model_uri if model.imported is None else model.imported.source
    rows, whose = splits.train, f"the teacher in {source}"
    if (folder := tokenizer_folder(model)) is not None:
        check_tokenizer(recipes.HuggingFaceText(path=str(folder)), recipe, splits, whose)
    if (store := model.opened.get("validation")) is not None and len(model.opened) == len(SPLITS):
        model.check = check_in_store(store, splits.validation, model.name)
        return
    if model.imported is not None:
        module, notes = model.imported.module(Path(workspace.cache_root)), model.imported.notes
        if notes:
            workspace.tell(f"{model.imported.source}: {'; '.join(notes)}")
    else:
        module, _ = read_model(model.model_uri, recipe.trusted, blocks=blocks_of(rows))
    if not isinstance(module, LanguageModel):
        raise RefusedError(f"{whose} is no language model", got=model.card.model.label, expected="causal_lm")
    try_language_teacher(module, rows, recipe.cache)
    model.check = check_on_blocks(module, rows_asked(splits.validation), rows.classes, model.name)


def try_language_teacher(module: LanguageModel, rows: Rows, cache: recipes.CacheSpec) -> None:
    """Ask a model for what is stored of the first block that has targets, in float32.

    Args:
        module: in eval mode, on the CPU.

    Raises:
        RefusedError: logits that are not finite, or cannot be stored; names row and position.
    """
    plain = recipes.CacheSpec(batch_rows=1)
    teacher = LanguageTeacher(module.float(), rows, plain, most=1)
    first = int(np.argmax(np.diff(rows.offsets) > 0))
    batch, config = teacher.batch(np.array([first]), 0), cache.encoding.config()

    def named(place: int) -> str:
        return teacher.named(batch, place)

    if config["name"] == TopK.name:
        top_k = top_k_from_config(config)
        if teacher.head is not None:
            check_rank(top_k.rank, teacher.head.weight.shape[1])
        teacher.described(batch, top_k.k, top_k.tail_temperatures, None)
    else:
        encoding_from_config(config).encode(teacher.logits(batch).cpu().numpy(), 0, named)


def temperatures_asked(objective: recipes.Objective) -> set[float]:
    """The temperatures of the teacher that an objective asks for, from 1 on: Phi z is the teacher at 1 / Phi."""
    if isinstance(objective, recipes.AnnealingKD | recipes.ContinuationKD):
        return {objective.tau_max / j for j in range(1, objective.tau_max + 1)}
    temperature = getattr(objective, "temperature", None)
    return {float(temperature)} if temperature is not None and temperature >= 1 else set()


def fidelity_lines(recipe: Recipe, teacher: CachedModel) -> list[str]:
    """What students of a teacher should know of its train store: where it describes the teacher badly."""
    store = teacher.opened.get("train")
    card = None if store is None else store.manifest.fidelity
    students: dict[str, list[str]] = {}
    for spec in recipe.students:
        if spec.objective.learns_from == "teacher":
            for line in fidelity_warnings(card, temperatures_asked(spec.objective)):
                students.setdefault(line, []).append(spec.name)
    return [f"{some_of(names, most=3)}: {line}" for line, names in students.items()]


def rows_asked(rows: Rows) -> np.ndarray:
    """Blocks of rows, wherever these lie: int32 [n, 3, length]."""
    from akd_dist.distill.language_check import ASKED

    numbers = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ASKED)).astype(np.int64))
    return np.asarray(rows.inputs.take(numbers, axis=0))


def tokenizer_folder(model: CachedModel) -> Path | None:
    """The folder with the files of a model's tokenizer, where it came with one."""
    source = model.model_uri if model.imported is None else model.imported.source
    return None if "://" in source else _with_tokenizer(Path(source))


def _with_tokenizer(place: Path) -> Path | None:
    """The folder of a model, or of its weights, if the files of a tokenizer lie in it."""
    folder = place if place.is_dir() else place.parent
    return folder if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def check_pretrained(model: recipes.Model | None, recipe: Recipe, splits: Splits, whose: str) -> None:
    """Refuse weights to start training from whose tokenizer means something else by ids that the data uses.

    Raises:
        RefusedError: names the first ids that differ.
    """
    if not isinstance(model, recipes.HuggingFaceLm) or not model.pretrained or splits.train.task != "language_model":
        return
    if model.path is not None and (folder := _with_tokenizer(Path(model.path))) is not None:
        check_tokenizer(recipes.HuggingFaceText(path=str(folder)), recipe, splits, whose)
    elif model.name is not None:
        check_tokenizer(recipes.HuggingFaceText(name=model.name), recipe, splits, whose)


def check_tokenizer(theirs: recipes.HuggingFaceText, recipe: Recipe, splits: Splits, whose: str) -> None:
    """Refuse a tokenizer to which ids that the data uses mean something else.

    Raises:
        RefusedError: names the first ids that differ.
    """
    assert recipe.data.text is not None
    other, tokens = language_tokenizer(theirs), splits.train.tokens
    if tokens is not None and other.tokens.tokenizer == tokens.tokenizer:
        return
    used = np.unique(np.concatenate([used_ids(rows.inputs, rows.classes) for rows in _each(splits)]))
    check_same_meaning(language_tokenizer(recipe.data.text), other, used, whose)


def _each(splits: Splits) -> Iterator[Rows]:
    return (getattr(splits, split) for split in SPLITS)
