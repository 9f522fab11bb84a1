"""Schemas of tables: which columns there are, and what each may be used as."""

import difflib
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError


def input_kind(kind: Any) -> str | None:
    """What a column of this Arrow type may be as an input: images, text or numbers; None if nothing."""
    kind = _stored(kind)
    # The `datasets` library writes an image as a struct of its bytes and its path.
    if pa.types.is_struct(kind):
        return input_kind(kind.field("bytes").type) if kind.get_field_index("bytes") >= 0 else None
    if _is_any(kind, "binary", "large_binary", "binary_view", "fixed_size_binary"):
        return "images"
    if _is_text(kind):
        return "text"
    inner = kind
    while is_list(inner):
        inner = _stored(inner.value_type)
    number = pa.types.is_integer(inner) or pa.types.is_floating(inner)
    return "numbers" if number and inner is not kind else None


def label_kind(kind: Any) -> str | None:
    """What a column of this Arrow type may be as a label: ids, names or numbers; None if nothing."""
    kind = _stored(kind)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "ids"
    if _is_text(kind):
        return "names"
    return "numbers" if pa.types.is_floating(kind) else None


def document_kind(kind: Any) -> str | None:
    """What a column of this Arrow type is to a language model: text; None if nothing."""
    return "text" if _is_text(_stored(kind)) else None


def chat_kind(kind: Any) -> str | None:
    """The same of a column of messages: lists of structs with a role."""
    kind = _stored(kind)
    inner = _stored(kind.value_type) if is_list(kind) else kind
    named = inner is not kind and pa.types.is_struct(inner) and inner.get_field_index("role") >= 0
    return "chat" if named else None


# What each kind of inputs is called where a column is none.
_INPUTS: dict[Callable[[Any], str | None], str] = {
    input_kind: "encoded images (binary), text, or lists of numbers",
    document_kind: "text, a document in each row",
    chat_kind: "lists of messages, structs with `role` and `content`",
}


def check_schema(
    schema: Any,
    spec: recipe.Table,
    what: str,
    first: Any = None,
    inputs: Callable[[Any], str | None] = input_kind,
) -> None:
    """Refuse a table without the columns that a recipe names, or with columns of a kind that nothing can be made of.

    Args:
        first: the schema of the source's first file, whose kinds of columns all others must have.
        inputs: what a column of inputs may be: `input_kind`, `document_kind` or `chat_kind`.

    Raises:
        RefusedError: names the column and `what` it is missing from.
    """
    for key, names, kind_of in (("input", input_columns(spec), inputs), ("label", label_columns(spec), label_kind)):
        for name in names:
            _check_column(schema, key, name, what, first, kind_of)


def _check_column(
    schema: Any, key: str, name: str, what: str, first: Any, kind_of: Callable[[Any], str | None]
) -> None:
    if (count := schema.names.count(name)) != 1:
        near = difflib.get_close_matches(name, schema.names, n=1)
        raise RefusedError(
            f"{what} has {f'{count} columns' if count else 'no column'} {name}",
            got=f"the columns {', '.join(schema.names)}",
            expected=f"the column that `{key}` names",
            next=f"set `{key}` to {near[0] if near else 'one of these'}",
        )
    kind = schema.field(name).type
    if kind_of(kind) is None:
        raise RefusedError(
            f"column {name} of {what} cannot be the {key}",
            got=f"type {kind}",
            expected="integers, class names, or numbers where data.task is regression"
            if key == "label"
            else _INPUTS[kind_of],
            next=_advice(key, kind) if kind_of in (input_kind, label_kind) else "set `input` to another column",
        )
    if first is not None and kind_of(kind) != kind_of(first.field(name).type):
        raise RefusedError(
            f"column {name} of {what} is not what it is in the files before",
            got=f"type {kind}",
            expected=f"type {first.field(name).type}",
            next="write all files with one schema",
        )


def _advice(key: str, kind: Any) -> str:
    """What to do about a column of a type that nothing can be made of."""
    inner = _stored(kind)
    while is_list(inner):
        inner = _stored(inner.value_type)
    if key == "input" and inner is _stored(kind) and (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
        return "write the numbers of a row into one column of lists"
    if pa.types.is_decimal(inner):
        floats = "floats (pyarrow: float64)"
        return (
            f"cast decimals to {'integers (int64) if they are class ids, else to ' if key == 'label' else ''}{floats}"
        )
    if pa.types.is_temporal(inner):
        return f"write dates and times as numbers, such as days as integers, or set `{key}` to another column"
    if pa.types.is_boolean(inner):
        return "cast booleans to uint8 or to floats"
    if key == "input" and inner is not _stored(kind) and _is_text(inner):
        return "write numbers as numbers, not as text"
    if pa.types.is_null(inner):
        return f"fill the column in: all its values are missing; or set `{key}` to another column"
    return f"set `{key}` to another column"


def input_columns(spec: recipe.Table) -> tuple[str, ...]:
    """The one or two columns of inputs."""
    return (spec.input,) if isinstance(spec.input, str) else tuple(spec.input)


def label_columns(spec: recipe.Table) -> tuple[str, ...]:
    """The column of labels; none where the spec names none, as for rows that are only predicted."""
    return (spec.label,) if spec.label else ()


def class_label_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The names of class ids, where the `datasets` library left them in an Arrow schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def _stored(kind: Any) -> Any:
    """The type beneath an extension or a dictionary."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def plain(column: Any) -> Any:
    """A column of its stored type, as one array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    while True:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        else:
            return column


def _is_text(kind: Any) -> bool:
    return _is_any(kind, "string", "large_string", "string_view")


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    return _is_any(kind, "list", "large_list", "fixed_size_list")


def _is_any(kind: Any, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)
