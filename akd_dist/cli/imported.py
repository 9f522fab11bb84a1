"""What an import of logits came to, as people read it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from akd_dist.base.errors import AkdError
from akd_dist.cli.recipes import load
from akd_dist.cli.show import as_yaml, command_line, counted, print_facts, short_path, size

if TYPE_CHECKING:
    from akd_dist.documents.imported import ImportedDocument, ImportedSplit
    from akd_dist.recipe import TeacherSpec


def print_imported(document: ImportedDocument, recipe: str, **given: Any) -> None:
    """The stores of an import, what to know of them, and what the recipe has to say to use them.

    Args:
        recipe: the path of its file.
        given: what else the command was given, for the one to type next.
    """
    shape = " x ".join(f"{length:,}" for length in document.shape)
    facts = {
        "logits": short_path(document.logits),
        "holds": f"{document.dtype} {shape}, {document.kind.replace('_', '-')}, joined by {document.joined_by}",
        "recipe": ", ".join(f"{count:,} {split}" for split, count in document.rows.items()) + " rows",
        **{split: _one(part, dry_run=document.dry_run) for split, part in document.splits.items()},
        **{f"{split} store": short_path(part.store) for split, part in document.splits.items()},
        **{f"no {split}": why for split, why in document.left_out.items()},
        "took": f"{document.seconds:.1f} s" + ("; nothing was stored" if document.dry_run else ""),
    }
    print_facts(facts)
    for line in document.warnings:
        click.echo(f"warning: {line}", err=True)
    if not document.dry_run:
        _print_next(document.teacher["store"], recipe, given)


def _print_next(imported: str | dict[str, str], recipe: str, given: dict[str, Any]) -> None:
    """The command that trains from these stores, and the recipe's line that says the same; each to be pasted as it is.

    Stores of one split more are named beside those that the recipe names already.
    """
    overrides = given.pop("overrides", ())
    now = _teacher_of(recipe, overrides)
    stores = {"train": imported} if isinstance(imported, str) else imported
    if "train" not in stores and now is not None and now.store is not None:
        stores = {split: name for split, name in now.store if name is not None} | stores
    if "train" not in stores:
        click.echo(f"next: import the logits of the train rows as well, and name these beside them in {recipe}:")
        click.echo(f"teacher: {as_yaml({'store': {'train': '...'} | stores})}")
        return
    line = as_yaml({"store": stores["train"] if list(stores) == ["train"] else stores})
    kept = [one for one in overrides if not one.startswith(("teacher=", "teacher."))]
    command = command_line("train-students", recipe, overrides=[*kept, f"teacher={line}"], **given)
    where = "which has no teacher yet" if now is None else "in place of its teacher"
    click.echo(f"next: {command}")
    click.echo(f"or, for good, put this line into {recipe}, {where}:")
    click.echo(f"teacher: {line}")


def _teacher_of(recipe: str, overrides: Sequence[str]) -> TeacherSpec | None:
    """The teacher that a recipe names; None where it names none, which alone keeps it from being read here."""
    with contextlib.suppress(AkdError):
        return load(recipe, overrides).teacher
    return None


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
