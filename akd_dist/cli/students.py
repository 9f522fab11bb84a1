"""`akd-dist evaluate`, `predict`, `export` and `models import`: finished models, at work and on their way to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import akd_dist
from akd_dist.base.formatting import SHOWN
from akd_dist.cli.options import Group, json_option, taking
from akd_dist.cli.show import (
    as_yaml,
    path_from,
    print_facts,
    print_json,
    print_table,
    progress_console,
    short_path,
    size,
    stdout_for_results,
    table_of,
)
from akd_dist.options import EvaluateOptions, ExportOptions, GenerateOptions, ModelImportOptions, PredictOptions

if TYPE_CHECKING:
    from rich.table import Table

    from akd_dist.documents.use import EvaluatedModel, EvaluationDocument, ExportDocument, PredictionDocument


@click.command("evaluate")
@taking(EvaluateOptions)
@json_option
def evaluate(as_json: bool, **chosen: Any) -> None:
    """Measure a student on data.

    Every metric, and agreement with other models. STUDENT is a model folder, such as runs/NAME/students/STUDENT. DATA
    is a recipe or a run's folder; Parquet (a file, folder, glob or s3://), a folder of pictures, tar files of pictures;
    for language models also JSON Lines or .txt files; or the word digits.
    """
    from akd_dist.documents.use import EvaluationDocument

    with stdout_for_results():
        document = akd_dist.evaluate(**chosen, console=progress_console())
    if as_json:
        print_json(document)
    else:
        _print_evaluation(EvaluationDocument.model_validate(document))


@click.command("predict")
@taking(PredictOptions)
@click.option("--no-label", is_flag=True, help="Read no labels, although there is such a column.")
@json_option
def predict(no_label: bool, label: str | None, as_json: bool, **chosen: Any) -> None:
    """Write what a student says of each row.

    Class, probability, logits, and the label where the data have one, row by row to Parquet; of language models the
    log-probability of each token. STUDENT and DATA are as for evaluate; DATA may lack labels.
    """
    from akd_dist.documents.use import PredictionDocument

    with stdout_for_results():
        document = akd_dist.predict(**chosen, label="" if no_label else label, console=progress_console())
    if as_json:
        print_json(document)
        return
    written = PredictionDocument.model_validate(document)
    print_facts(
        {
            "written": f"{short_path(written.out)}, {size(written.bytes)}",
            "rows": _data(written),
            "columns": ", ".join(written.columns),
            "took": f"{written.seconds:.1f} s",
        }
    )


@click.command("generate")
@taking(GenerateOptions)
@json_option
def generate(as_json: bool, **chosen: Any) -> None:
    """Have a language model continue a text.

    The prompt and what follows, as it comes; with --chat the answer alone. MODEL is a model folder, such as
    runs/NAME/students/STUDENT, or a folder of a causal language model as transformers saves it.
    """
    if as_json:
        with stdout_for_results():
            document = akd_dist.generate(**chosen)
        print_json(document)
        return
    # Shown with the first piece, as a refusal comes before; an answer in a chat stands for itself.
    prompt: list[str] = [] if chosen["chat"] else [chosen["prompt"]]

    def show(piece: str) -> None:
        click.echo("".join(prompt) + piece, nl=False)
        prompt.clear()

    akd_dist.generate(**chosen, on_text=show)
    click.echo("".join(prompt))


@click.command("export")
@taking(ExportOptions)
@json_option
def export(as_json: bool, **chosen: Any) -> None:
    """Hand a student to those without akd-dist.

    The export runs on real rows, and is kept only if its logits are those of torch. Preprocessing is inside. STUDENT
    and DATA are as for evaluate.
    """
    from akd_dist.documents.use import ExportDocument

    with stdout_for_results():
        document = akd_dist.export(**chosen, console=progress_console())
    if as_json:
        print_json(document)
    else:
        _print_export(ExportDocument.model_validate(document))


@click.group("models", cls=Group)
def models() -> None:
    """Bring models from elsewhere."""


@models.command("import")
@taking(ModelImportOptions)
@json_option
def models_import(as_json: bool, **chosen: Any) -> None:
    """Make a model folder of a checkpoint.

    CHECKPOINT is a file of safetensors or a torch state dict, a folder with one, or an s3:// URI of a file; without it,
    the recipe's teacher.weights. RECIPE names its architecture in teacher.model, and what it takes in data. The folder
    serves as teacher.weights, and for evaluate, predict and export. Nothing is unpickled.
    """
    from akd_dist.documents.use import ModelImportDocument

    with stdout_for_results():
        document = akd_dist.import_model(**chosen, console=progress_console())
    if as_json:
        print_json(document)
        return
    written = ModelImportDocument.model_validate(document)
    print_facts(
        {
            "written": f"{short_path(written.out)}, {size(written.bytes)}",
            "model": f"{written.model}, {written.parameters:,} parameters, fingerprint {written.fingerprint[:12]}",
            "labels" if written.check.cross_entropy is None else "tokens": written.check.line,
        }
    )
    recipe = chosen["recipe"]
    click.echo(
        f"next: put {'this line' if not written.code else 'these lines'} into {recipe}, in place of its teacher:"
    )
    click.echo(f"teacher: {as_yaml({'weights': path_from(recipe, written.out)})}")
    if written.code:  # a folder runs no code unless a recipe lists it
        click.echo(f"code: {as_yaml(written.code)}")


def _print_evaluation(document: EvaluationDocument) -> None:
    from akd_dist.documents.fleet import Metrics
    from akd_dist.documents.use import OtherModel

    models: list[EvaluatedModel] = [document.student, *document.others]
    measured = [name for name in Metrics.model_fields if any(model.metrics.get(name) is not None for model in models)]
    if document.task == "language_model":
        measured.remove("loss")  # it is the cross-entropy
    targets = "" if document.targets is None else f", {document.targets:,} targets"
    title = f"{_data(document)}{targets}, {document.seconds:.1f} s"
    table = _named("model", title)
    agreeing = bool(document.others) and document.task != "regression"
    apart = any(other.divergence is not None for other in document.others)
    for heading in ("parameters", *measured, *["agreement"] * agreeing, *["KL to it"] * apart):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        values = [model.metrics.get(name) for name in measured]
        figures = [_figure(name, value) for name, value in zip(measured, values, strict=True)]
        shared = [f"{model.agreement:.4f}" if isinstance(model, OtherModel) else ""] if agreeing else []
        shared += [_divergence(model)] if apart else []
        table.add_row(Path(model.path).name, f"{model.parameters:,}", *figures, *shared)
    print_table(table)
    if agreeing:
        _print_shared(document)


def _figure(name: str, value: float | None) -> str:
    """A metric: nats as tables of runs show them, all else to four digits."""
    shown = SHOWN.get(name)
    if value is None:
        return "infinite"
    return shown.text(value) if shown is not None and shown.lowest else f"{value:.4f}"


def _divergence(model: EvaluatedModel) -> str:
    from akd_dist.documents.use import OtherModel

    return "" if not isinstance(model, OtherModel) or model.divergence is None else f"{model.divergence:.4f}"


def _named(first: str, title: str | None = None) -> Table:
    """A table of models, whose long names are folded before a figure is cut off."""
    return table_of(first, title=title)


def _print_shared(document: EvaluationDocument) -> None:
    """Who is right where, against each other model."""
    table = _named("the student and")
    for heading in ("both right", "student alone", "other alone", "both wrong"):
        table.add_column(heading, justify="right", no_wrap=True)
    for other in document.others:
        counts = [other.both_right, other.student_right, other.other_right, other.both_wrong]
        table.add_row(Path(other.path).name, *(f"{count:,}" for count in counts))
    print_table(table)


def _print_export(document: ExportDocument) -> None:
    facts = {
        "written": f"{short_path(document.out)}, {size(document.bytes)}",
        "inputs": document.inputs,
        "outputs": document.outputs,
        "compared": f"on {_data(document)}: logits differ by {document.difference:.2g} at most, "
        f"{document.tolerance:.2g} is allowed",
    }
    if document.same_class is not None:
        facts["classes"] = f"the same for {document.same_class} of {document.rows}"
    print_facts(facts)
    for note in document.notes:
        click.echo(f"note: {note}")


def _data(document: EvaluationDocument | PredictionDocument | ExportDocument) -> str:
    if document.data is None:
        return f"{document.rows} random inputs"
    split = f"{document.split} " if document.split else ""
    rows = "row" if document.rows == 1 else "rows"
    return f"{document.rows:,} {split}{rows} of {short_path(document.data)}"
