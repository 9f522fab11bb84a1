"""A checkpoint of others -> a model folder, which everything else here takes: as teacher, to evaluate, to export.

import_model(recipe, "resnet18.pth", Path("resnet18"), cache_root)
"""

import time
from collections.abc import Callable
from pathlib import Path

from akd_dist.base.errors import RecipeError
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.text import save_tokenizer
from akd_dist.data.tokenizers import save_language_tokenizer
from akd_dist.distill.agreement import check_on_rows
from akd_dist.distill.language_check import check_on_blocks
from akd_dist.distill.trial import try_teacher
from akd_dist.documents.use import ModelImportDocument
from akd_dist.models.build import num_parameters
from akd_dist.models.card import CARD, WEIGHTS
from akd_dist.models.folder import save_model
from akd_dist.models.imported import open_checkpoint
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Custom, HuggingFaceText, Recipe
from akd_dist.serve.export_files import refuse_existing


def import_model(
    recipe: Recipe,
    checkpoint: str | None,
    out: Path | None,
    cache_root: Path,
    *,
    force: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> ModelImportDocument:
    """Write a checkpoint's weights as a model folder for a recipe's inputs and classes, tried on its rows.

    Args:
        recipe: of the user's own; `teacher.model` is the architecture, `data` says what the model takes.
        checkpoint: absolute, or the `s3://` URI of a file; None takes the recipe's.
        out: the folder; None takes the checkpoint's name without its ending, in the working folder.
        cache_root: where rows are prepared.
        force: whether another model folder may be overwritten.
        on_progress: told while rows are prepared.
        on_note: told what is to be known of the model, a line each.

    Raises:
        RecipeError: the recipe names no architecture, or there is no checkpoint; or `out` is there already.
        RefusedError: as `models.imported.open_checkpoint` and `trial.try_teacher`; nothing is left.
        MachineError: a file may not be read or written.
    """
    started = time.monotonic()
    model, source = recipe.teacher.model, checkpoint or recipe.teacher.checkpoint
    if model is None or source is None:
        raise _not_told(recipe, "no teacher.model" if model is None else "no checkpoint")
    out = out or Path(Path(source.rstrip("/")).name).absolute().with_suffix("")
    refuse_existing(out, force, instead_of=CARD)
    splits = prepare(recipe.data, cache_root, on_progress=on_progress)
    splits.sources.begin()
    imported = open_checkpoint(model, source, splits.train, recipe.data, cache_root)
    module = imported.module(cache_root)
    if isinstance(module, LanguageModel):
        check = check_on_blocks(module, splits.validation.inputs, splits.validation.classes, name="the model")
    else:
        try_teacher(module, imported.card, splits.train, recipe.cache)
        check = check_on_rows(module, splits.validation, name="the model")
    for line in ["; ".join(imported.notes), *check.warnings]:
        if line:
            on_note(line)
    refuse_existing(out, force, instead_of=CARD)  # it may have come meanwhile
    save_model(out, module, imported.card)
    if isinstance(recipe.data.text, HuggingFaceText) and imported.card.tokens is not None:
        save_tokenizer(recipe.data.text, imported.card.tokens, out)
    if isinstance(recipe.data.text, HuggingFaceText) and (blocks := imported.card.blocks) is not None:
        save_language_tokenizer(recipe.data.text, blocks.vocabulary, blocks.tokenizer, out)
    splits.sources.finish()
    return ModelImportDocument(
        out=str(out),
        checkpoint=source,
        model=imported.card.model.label,
        parameters=num_parameters(module),
        fingerprint=imported.card.fingerprint,
        bytes=sum((out / name).stat().st_size for name in (WEIGHTS, CARD)),
        code=[model.factory.partition(":")[0]] if isinstance(model, Custom) else [],
        notes=imported.notes,
        check=check,
        seconds=round(time.monotonic() - started, 3),
    )


def _not_told(recipe: Recipe, got: str) -> RecipeError:
    return RecipeError(
        f"the recipe {recipe.name} does not say what is to be imported",
        got=got,
        expected="the architecture in teacher.model, and a checkpoint",
        next="write teacher: {model: {kind: ...}, weights: FILE} in it, or --set teacher='{model: ..., weights: ...}'",
    )
