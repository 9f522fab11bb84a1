"""What Parquet files and Hugging Face datasets have in common: Arrow tables with columns of inputs and labels."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.data.blocks import Block
from akd_dist.data.schemas import class_label_names, input_columns, label_columns
from akd_dist.data.sources.base import Source


def columns_of(spec: recipe.Table) -> list[str]:
    """The names of all columns that a recipe reads of a table, each once."""
    return list(dict.fromkeys([*input_columns(spec), *label_columns(spec)]))


def columns_of_table(spec: recipe.Table, table: Any) -> tuple[list[Any], Any]:
    """The columns of inputs of a table, and the one of labels: nulls where it has none."""
    labels = [table.column(name) for name in label_columns(spec)] or [pa.nulls(len(table))]
    return [table.column(name) for name in input_columns(spec)], labels[0]


def labels_alone(spec: recipe.Table) -> recipe.Table:
    """The same table without its inputs."""
    return spec.model_copy(update={"input": []})


class TableReader(Protocol):
    """Reads rows of a table."""

    def __call__(self, spec: recipe.Table, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """As `blocks.Reader`, the columns that a spec names."""


def source_of_table(
    spec: recipe.Table, name: str, rows: int, blocks: TableReader, where: Callable[[int], str], schema: Any,
    notes: tuple[str, ...] = (), cuts: np.ndarray | None = None,
) -> Source:  # fmt: skip
    """A source of a table."""
    return Source(
        name,
        rows,
        functools.partial(blocks, spec),
        where,
        label_blocks=functools.partial(blocks, labels_alone(spec)),
        notes=notes,
        inputs=input_columns(spec),
        label=label_columns(spec),
        class_names=class_label_names(schema, spec.label),
        classes=spec.classes,
        cuts=cuts,
    )
