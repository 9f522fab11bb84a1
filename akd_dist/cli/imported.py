"""What an import of logits came to, as people read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from akd_dist.cli.show import command_line, counted, print_facts, short_path, size

if TYPE_CHECKING:
    from akd_dist.documents.imported import ImportedDocument, ImportedSplit


def print_imported(document: ImportedDocument, recipe: str) -> None:
    """The stores of an import, what to know of them, and what the recipe has to say to use them."""
    shape = " x ".join(f"{length:,}" for length in document.shape)
    facts = {
        "logits": short_path(document.logits),
        "holds": f"{document.dtype} {shape}, {document.kind.replace('_', '-')}, joined by {document.joined_by}",
        **{split: _one(part, dry_run=document.dry_run) for split, part in document.splits.items()},
        **{f"{split} store": short_path(part.store) for split, part in document.splits.items()},
        **{f"no {split}": why for split, why in document.left_out.items()},
        "took": f"{document.seconds:.1f} s" + ("; nothing was stored" if document.dry_run else ""),
    }
    print_facts(facts)
    for line in document.warnings:
        click.echo(f"warning: {line}", err=True)
    if document.dry_run:
        return
    click.echo("next: have the recipe name them, and train")
    click.echo(f"  teacher: {_as_yaml(document.teacher)}")
    click.echo(f"  {command_line('train-students', recipe)}")


def _as_yaml(value: Any) -> str:
    """A mapping as YAML on one line. Ids are quoted: one of digits alone would be a number."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{key}: {_as_yaml(inner)}" for key, inner in value.items()) + "}"


def _one(part: ImportedSplit, *, dry_run: bool) -> str:
    if part.repaired:
        how = f"mended: {counted(len(part.repaired), 'shard')} written again"
    elif part.hit:
        how = "a hit: it was there already"
    else:
        how = "would be stored" if dry_run else f"{counted(part.shards_written, 'shard')} written, {size(part.bytes)}"
    views = f" x {counted(part.views, 'view')}" if part.views > 1 else ""
    said = f"{part.rows:,} rows{views}, agreement with the labels {part.agreement:.2%}"
    return f"{said}; {how}"
