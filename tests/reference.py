"""The key tables of docs/reference/recipe.md, from the types of a recipe.

python -m tests.reference        writes them afresh
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from akd_dist import recipe

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "recipe.md"
BEGIN, END = "## Every key\n", "## What is refused\n"
# A heading, then its parts: with the key they stand under, or none where they are told apart by their kind.
SECTIONS: dict[str, dict[type[BaseModel], str | None]] = {
    "Top level": {recipe.Recipe: "top level"},
    "Data": {
        recipe.DataSpec: "data",
        recipe.Packing: "data.packing",
        recipe.Image: "data.image",
        recipe.Normalize: "data.normalize",
        recipe.CustomMetric: "data.metric",
    },
    "Sources": dict.fromkeys(
        [
            recipe.Digits,
            recipe.Idx,
            recipe.Parquet,
            recipe.ImageFolder,
            recipe.WebDataset,
            recipe.HuggingFaceData,
            recipe.CustomData,
            recipe.TextData,
            recipe.ChatData,
        ],
        None,
    ),
    "Tokenizers": dict.fromkeys([recipe.ByteText, recipe.HuggingFaceText], None),
    "Augmentations": dict.fromkeys(
        [
            recipe.NoAugmentation,
            recipe.Shift,
            recipe.PadCropFlip,
            recipe.RandomResizedCropFlip,
            recipe.TokenMask,
            recipe.CustomAugmentation,
        ],
        None,
    ),
    "Teacher": {
        recipe.TeacherSpec: "teacher",
        recipe.TeacherMember: "teacher.members",
        recipe.TeacherTraining: "teacher.train",
        recipe.StoredTeacher: "teacher.store",
        recipe.AssistantSpec: "teacher.assistant",
    },
    "Cache": {recipe.CacheSpec: "cache", recipe.EncodingSpec: "cache.encoding"},
    "Students": {recipe.StudentSpec: "students", recipe.Callback: "students.on_epoch_end"},
    "Models": dict.fromkeys(
        [
            recipe.Mlp,
            recipe.Cnn,
            recipe.PlainCnn,
            recipe.ResNet,
            recipe.TextTransformer,
            recipe.HuggingFaceModel,
            recipe.CausalLm,
            recipe.HuggingFaceLm,
            recipe.Timm,
            recipe.Custom,
        ],
        None,
    ),
    "Objectives": dict.fromkeys(
        [
            recipe.HardLabels,
            recipe.Kd,
            recipe.Takd,
            recipe.AnnealingKD,
            recipe.ContinuationKD,
            recipe.CustomObjective,
        ],
        None,
    ),
    "Optimizers": dict.fromkeys([recipe.Sgd, recipe.AdamW], None),
    "Schedules of the learning rate": dict.fromkeys(
        [recipe.Constant, recipe.Steps, recipe.Linear, recipe.Cosine], None
    ),
}
_INTRODUCTION = """\
Unknown keys are refused, with the nearest known one. A part with a `kind` takes the keys of that kind and no others.
"""
_GRID = """\
A block under `students` may have a `grid:` beside these keys: dotted keys of the block, each with a list of values.
The block then stands for the product of the lists, in file order, the first key slowest; what the grid gives, the block
must not. Or it may have a `search:`, whose keys have lists or ranges, for `akd-dist tune`."""


def every_key() -> str:
    """The text of docs/reference/recipe.md between BEGIN and END."""
    parts = [BEGIN, _INTRODUCTION]
    for heading, specs in SECTIONS.items():
        parts += [f"### {heading}\n", *(section(spec, key) + "\n" for spec, key in specs.items())]
    return "\n".join([*parts, _GRID, ""])


def section(spec: type[BaseModel], key: str | None) -> str:
    """What the page says of a part of a recipe: its docstring, and a row for each key."""
    fields = {name: field for name, field in spec.model_fields.items() if key is not None or name != "kind"}
    rows = [f"| `{name}` | {_default(field)} | {_meaning(field.description)} |" for name, field in fields.items()]
    head = f"**`{key}`**" if key else f"**`kind: {spec.model_fields['kind'].default}`**"
    table = ["", "| key | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"{head} {_meaning(spec.__doc__)}", *table])


def _meaning(text: str | None) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "derived"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        plain: Any = field.default.model_dump(mode="json")
        if isinstance(plain, str):
            return f"`{plain}`"
        return f"`{{kind: {plain['kind']}}}`" if "kind" in plain else "its defaults"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(f'{value:.3g}' for value in field.default)}]`"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + every_key() + "\n" + END + rest.split(END)[1])
