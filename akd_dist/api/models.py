"""The verbs that use a model, or make one of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from akd_dist.api.base import taking
from akd_dist.base import places
from akd_dist.options import (
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    ModelImportOptions,
    ModelOptions,
    Options,
    PredictOptions,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from akd_dist.data.row_cache import Progress
    from akd_dist.serve.examples import DataRequest
    from akd_dist.serve.remote import Brought


def load_model(folder: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """A trained model, in eval mode, from a folder or URI with model.safetensors and model.json.

    Args:
        trust: modules of your own whose code the folder may name, on Python's path or in the working folder; others
                are not imported.

    Raises:
        RefusedError: there is no model, it names code that you do not trust, it fits no memory, or its weights would
            have to be unpickled.
        DamagedError: card and weights are not those that were written.
    """
    from akd_dist.base.trusted import Trusted
    from akd_dist.models.folder import load_model
    from akd_dist.serve.remote import brought

    options = Options(trust=trust)
    with brought(options.cache) as here:
        return load_model(here.model(places.absolute(folder)), Trusted(modules=options.modules))


@taking(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Every metric of a model on data; and of others, with how far they agree with it.

    Its arguments are the fields of `akd_dist.options.EvaluateOptions`.

    Returns:
        The document that `akd-dist evaluate --json` prints (schemas/evaluate.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import evaluate
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = evaluate(
            here.model(places.absolute(options.student)),
            _request(options, options.data, options.label, here),
            Path(options.cache),
            others=[here.model(places.absolute(other)) for other in options.others],
            device=options.device,
            on_progress=on_progress,
            on_note=_notes(options.console),
        )
        return here.named(document.plain())


@taking(PredictOptions)
def predict(options: PredictOptions) -> dict[str, Any]:
    """What a model says of every row, as a Parquet file: whole, or absent.

    Its arguments are the fields of `akd_dist.options.PredictOptions`.

    Returns:
        The document that `akd-dist predict --json` prints (schemas/predict.schema.json).

    Raises:
        AkdError: a refusal: options, model or data.
    """
    from akd_dist.serve.evaluation import predict
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = predict(
            here.model(places.absolute(options.student)),
            _request(options, options.data, options.label, here),
            places.output(options.out or f"{_name_of(options.student)}.parquet"),
            Path(options.cache),
            with_logits=options.logits,
            overwrite=options.force,
            device=options.device,
            on_progress=on_progress,
            on_note=_notes(options.console),
        )
        return here.named(document.plain())


@taking(GenerateOptions)
def generate(options: GenerateOptions) -> dict[str, Any]:
    """Text that a language model continues.

    Its arguments are the fields of `akd_dist.options.GenerateOptions`.

    Returns:
        The document that `akd-dist generate --json` prints (schemas/generate.schema.json).

    Raises:
        AkdError: a refusal: options, model or tokenizer; or the text is too long for the model.
    """
    from akd_dist.models.generation import Sampling
    from akd_dist.serve.generating import generate
    from akd_dist.serve.remote import brought

    how = Sampling(options.tokens, options.temperature, options.top_p, options.seed)
    with brought(options.cache) as here:
        document = generate(
            here.model(places.absolute(options.student)),
            options.prompt,
            how,
            tokenizer=None if options.tokenizer is None else str(options.tokenizer),
            trust=options.modules,
            chat=options.chat,
            device=options.device,
            on_text=options.on_text or (lambda piece: None),
        )
        return here.named(document.plain())


@taking(ExportOptions)
def export(options: ExportOptions) -> dict[str, Any]:
    """A model as others run it, without akd-dist; kept only if it gives the same logits as here.

    Its arguments are the fields of `akd_dist.options.ExportOptions`.

    Returns:
        The document that `akd-dist export --json` prints (schemas/export.schema.json).

    Raises:
        AkdError: a refusal: options, model or data; the model cannot be exported, or the export does not agree.
    """
    from akd_dist.serve.exports import EXPORT_SUFFIXES, export
    from akd_dist.serve.remote import brought

    with _meters(options.console) as on_progress, brought(options.cache) as here:
        document = export(
            here.model(places.absolute(options.student)),
            options.to,
            places.output(options.out or f"{_name_of(options.student)}{EXPORT_SUFFIXES.get(options.to, '')}"),
            Path(options.cache),
            asked=None if options.data is None else _request(options, options.data, "", here),
            tokenizer=None if options.tokenizer is None else str(options.tokenizer),
            trust=options.modules,
            force=options.force,
            on_progress=on_progress,
        )
        return here.named(document.plain())


@taking(ModelImportOptions)
def import_model(options: ModelImportOptions) -> dict[str, Any]:
    """A checkpoint from elsewhere as a model folder, for the inputs and classes of a recipe; nothing is unpickled.

    Its arguments are the fields of `akd_dist.options.ModelImportOptions`.

    Returns:
        The document that `akd-dist models import --json` prints (schemas/model-import.schema.json).

    Raises:
        AkdError: a refusal: options, recipe, data or checkpoint.
    """
    recipe = options.read().own()
    from akd_dist.serve.importing import import_model

    with _meters(options.console) as on_progress:
        return import_model(
            recipe,
            None if options.checkpoint is None else places.absolute(options.checkpoint),
            None if options.out is None else places.output(options.out),
            Path(options.cache),
            force=options.force,
            on_progress=on_progress,
            on_note=_notes(options.console) or (lambda line: None),
        ).plain()


def _name_of(folder: str | Path) -> str:
    """The last part of a model folder's path or URI, after which files that are made of it are named."""
    return Path(places.absolute(folder)).name


def _request(options: ModelOptions, data: str | Path, label: str | None, here: Brought) -> DataRequest:
    from akd_dist.serve.examples import DIGITS, DataRequest

    return DataRequest(
        data=DIGITS if str(data) == DIGITS else here.data(places.absolute(data)),
        split=options.split,
        input=(options.input,) if isinstance(options.input, str) else tuple(options.input or ()),
        label=label,
        tokenizer=None if options.tokenizer is None else str(options.tokenizer),
        trust=options.modules,
    )


@contextlib.contextmanager
def _meters(console: Console | None) -> Iterator[Progress | None]:
    """Progress on a console, a meter for each thing that is done, one after the other."""
    if console is None:
        yield None
        return
    from akd_dist.tracking.progress import Meter, meter

    with contextlib.ExitStack() as stack:
        shown: dict[str, Meter] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(meter(console, what, total))
                shown[what].update(0)
            shown[what].update(done)

        yield update


def _notes(console: Console | None) -> Callable[[str], None] | None:
    """Lines for whoever waits, on a console."""
    if console is None:
        return None
    from akd_dist.tracking.progress import tell

    return functools.partial(tell, console)
