"""`akd-dist evaluate`, `predict` and `export`: finished models, at work and on their way to others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import akd_dist
from akd_dist.cli.options import cache_root_option, complete_folder, json_option, options, trust_option
from akd_dist.cli.show import (
    print_facts,
    print_json,
    print_table,
    progress_console,
    short_path,
    size,
    stdout_for_results,
    table_of,
)

if TYPE_CHECKING:
    from rich.table import Table

SPLITS = ["train", "validation", "test"]

student_argument = click.argument("student", metavar="STUDENT", type=click.Path(), shell_complete=complete_folder)
data_argument = click.argument("data", metavar="DATA", type=click.Path())
split_option = click.option(
    "--split", metavar="SPLIT", type=click.Choice(SPLITS), help="Of a recipe: train, validation or test (the default)."
)
input_option = click.option(
    "--input", "input", metavar="COLUMN", multiple=True, help="Column of inputs; twice for a pair of texts."
)
label_option = click.option("--label", metavar="COLUMN", help="Column of labels.")
tokenizer_option = click.option("--tokenizer", metavar="FOLDER", help="Of a model of text, where nobody knows it.")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
force_option = click.option("--force", is_flag=True, help="Overwrite what is there.")


@click.command("evaluate")
@options(student_argument, data_argument)
@click.option(
    "--with",
    "others",
    metavar="MODEL",
    multiple=True,
    shell_complete=complete_folder,
    help="Another model to compare with; repeatable.",
)
@options(split_option, input_option, label_option, tokenizer_option, trust_option, device_option, cache_root_option)
@json_option
def evaluate(student: str, data: str, as_json: bool, **chosen: Any) -> None:
    """Measure a student on data.

    Every metric, and agreement with other models. STUDENT is a model folder, such as runs/NAME/students/STUDENT. DATA
    is a recipe or a run's folder, Parquet (a file, folder, glob or s3://), or the word digits.
    """
    with stdout_for_results():
        document = akd_dist.evaluate(student, data, **chosen, console=progress_console())
    if as_json:
        print_json(document)
    else:
        _print_evaluation(document)


@click.command("predict")
@options(student_argument, data_argument)
@click.option("--out", metavar="FILE", help="The file to write.  [default: the student's name and .parquet, here]")
@click.option("--no-logits", is_flag=True, help="Leave out the column of logits, the largest of many classes.")
@click.option("--no-label", is_flag=True, help="Read no labels, although there is such a column.")
@options(split_option, input_option, label_option, tokenizer_option, trust_option, device_option, cache_root_option)
@options(force_option, json_option)
def predict(
    student: str,
    data: str,
    out: str | None,
    no_logits: bool,
    no_label: bool,
    label: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Write what a student says of each row.

    Class, probability, logits, and the label where the data have one, row by row to Parquet. STUDENT and DATA are as
    for evaluate; DATA may lack labels.
    """
    with stdout_for_results():
        document = akd_dist.predict(
            student,
            data,
            out,
            label="" if no_label else label,
            logits=not no_logits,
            **chosen,
            console=progress_console(),
        )
    if as_json:
        print_json(document)
        return
    print_facts(
        {
            "written": f"{short_path(document['out'])}, {size(document['bytes'])}",
            "rows": _data(document),
            "columns": ", ".join(document["columns"]),
            "took": f"{document['seconds']:.1f} s",
        }
    )


@click.command("export")
@student_argument
@click.option(
    "--to", type=click.Choice(["onnx", "torch-export", "huggingface"]), required=True, help="The format to write."
)
@click.option(
    "--out",
    metavar="PATH",
    help="The file to write; a folder for huggingface.  [default: the student's name and .onnx, .pt2 or -huggingface, "
    "here]",
)
@click.option("--data", metavar="DATA", help="Rows to compare logits on.  [default: those of the student's run]")
@options(split_option, input_option, tokenizer_option, trust_option, cache_root_option, force_option, json_option)
def export(student: str, as_json: bool, **chosen: Any) -> None:
    """Hand a student to those without akd-dist.

    The export runs on real rows, and is kept only if its logits are those of torch. Preprocessing is inside. STUDENT
    and DATA are as for evaluate.
    """
    with stdout_for_results():
        document = akd_dist.export(student, **chosen, console=progress_console())
    if as_json:
        print_json(document)
    else:
        _print_export(document)


def _print_evaluation(document: dict[str, Any]) -> None:
    models = [document["student"], *document["others"]]
    measured = list(dict.fromkeys(name for model in models for name in model["metrics"]))
    title = f"{_data(document)}, {document['seconds']:.1f} s"
    table = _named("model", title)
    agreeing = bool(document["others"]) and document["task"] == "classification"
    for heading in ("parameters", *measured, *["agreement"] * agreeing):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        figures = [f"{model['metrics'][name]:.4f}" if name in model["metrics"] else "infinite" for name in measured]
        shared = [f"{model['agreement']:.4f}" if "agreement" in model else ""] if agreeing else []
        table.add_row(Path(model["path"]).name, f"{model['parameters']:,}", *figures, *shared)
    print_table(table)
    if agreeing:
        _print_shared(document)


def _named(first: str, title: str | None = None) -> Table:
    """A table of models, whose long names are folded before a figure is cut off."""
    return table_of(first, title=title)


def _print_shared(document: dict[str, Any]) -> None:
    """Who is right where, against each other model."""
    table = _named("the student and")
    for heading in ("both right", "student alone", "other alone", "both wrong"):
        table.add_column(heading, justify="right", no_wrap=True)
    for other in document["others"]:
        counts = [other[name] for name in ("both_right", "student_right", "other_right", "both_wrong")]
        table.add_row(Path(other["path"]).name, *(f"{count:,}" for count in counts))
    print_table(table)


def _print_export(document: dict[str, Any]) -> None:
    rows = f"{document['rows']} random inputs" if document["data"] is None else _data(document)
    facts = {
        "written": f"{short_path(document['out'])}, {size(document['bytes'])}",
        "inputs": document["inputs"],
        "outputs": document["outputs"],
        "compared": f"on {rows}: logits differ by {document['difference']:.2g} at most, "
        f"{document['tolerance']:.2g} is allowed",
    }
    if document["same_class"] is not None:
        facts["classes"] = f"the same for {document['same_class']} of {document['rows']}"
    print_facts(facts)
    for note in document["notes"]:
        click.echo(f"note: {note}")


def _data(document: dict[str, Any]) -> str:
    split = f"{document['split']} " if document["split"] else ""
    rows = "row" if document["rows"] == 1 else "rows"
    return f"{document['rows']:,} {split}{rows} of {short_path(document['data'])}"
