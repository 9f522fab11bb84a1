"""The recipe: one YAML file that says everything a run depends on, as typed, frozen objects.

    akd-dist recipe check jobs/digits.yaml      read it, fill in every default, list the students
    akd-dist recipe schema                      its JSON Schema, for completion in an editor

Unknown keys are refused, numbers must be numbers, and the resolved recipe is saved beside every result. The docstring
under a field is its documentation, here and in the JSON Schema. How a file is read lies in `recipe_file`.
"""

from __future__ import annotations

import copy
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

# Names become folders, on any file system.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Where a run is placed, not what it computes: left out of its identity.
PLACEMENT = ("cohorts", "checkpoint_seconds", "folder")

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Spec(BaseModel):
    """A part of a recipe: frozen, every key known, no silent conversion of types, no NaN."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# ---- data


class Digits(Spec):
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 grey images, 10 classes."""

    kind: Literal["digits"] = "digits"
    """Which kind of source this is."""


class Parquet(Spec):
    """A dataset in Parquet: one column of inputs, one of integer labels. Row order is the order of the files."""

    kind: Literal["parquet"] = "parquet"
    """Which kind of source this is."""
    path: str
    """A file, a folder or a glob; relative to the recipe's folder."""
    input: str
    """The column of inputs: encoded images (bytes, or a struct with bytes) or lists of numbers."""
    label: str
    """The column of integer labels, counted from 0."""
    shape: list[Count] | None = None
    """The shape of one input, for columns of flat lists; none keeps the list as a vector."""
    classes: Count | None = None
    """How many classes there are; none takes the largest label plus one."""


Source = Annotated[Digits | Parquet, Discriminator("kind")]


class NoAugmentation(Spec):
    """Rows are used as they are."""

    kind: Literal["none"] = "none"
    """Which kind of augmentation this is."""


class Shift(Spec):
    """Each view moves the image by a random whole number of pixels each way, filled with zeros."""

    kind: Literal["shift"] = "shift"
    """Which kind of augmentation this is."""
    pixels: Count = 1
    """The farthest move in each direction, in pixels."""


Augmentation = Annotated[NoAugmentation | Shift, Discriminator("kind")]


class Normalize(Spec):
    """(x - mean) / std for each channel, inside every model; x is the input, divided by 255 where it is uint8."""

    mean: list[float] = Field(min_length=1)
    """One number a channel, or one for all."""
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """One number a channel, or one for all; above 0."""

    @model_validator(mode="after")
    def _same_length(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers and std has {len(self.std)}; they need as many")
        return self


def _share_or_source(value: object) -> str | None:
    """Tell a share from a source by its shape, so that an error speaks of the one that was meant."""
    if isinstance(value, Mapping):
        return value.get("kind")
    return getattr(value, "kind", "share")


ShareOrSource = Annotated[
    Annotated[Share, Tag("share")] | Annotated[Digits, Tag("digits")] | Annotated[Parquet, Tag("parquet")],
    Discriminator(_share_or_source),
]


class Data(Spec):
    """The rows that teacher and students see, how they are split and how augmented. One for the whole recipe."""

    train: Source
    """The rows to train on; validation and test rows are split off where they have no source of their own."""
    validation: ShareOrSource = 0.1
    """Rows that pick the best epoch: a share of the train source, or a source of their own."""
    test: ShareOrSource = 0.2
    """Rows that are reported once: a share of the train source, or a source of their own."""
    seed: Seed = 0
    """Governs the split, the order of rows and the views, for all students alike."""
    views: Count = 1
    """How many augmented views of each train row the teacher is cached on; epoch e trains on view e mod views."""
    augmentation: Augmentation = NoAugmentation()
    """How a view is drawn from a row; a pure function of (seed, row, view)."""
    window: Count | None = None
    """Rows that are shuffled as one window, for data larger than memory; none shuffles all rows together."""
    normalize: Normalize | None = None
    """Applied inside the models; none leaves inputs between 0 and 1 (uint8) or as they are (float)."""

    @model_validator(mode="after")
    def _leaves_train_rows(self) -> Data:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation and test take {' + '.join(map(str, shares))} of the rows; train needs some")
        return self

    @model_validator(mode="after")
    def _views_differ(self) -> Data:
        if self.views > 1 and isinstance(self.augmentation, NoAugmentation):
            raise ValueError(f"views is {self.views} without an augmentation: all views of a row would be the same")
        return self


# ---- models


class Mlp(Spec):
    """A multilayer perceptron on the flattened input, with ReLU between layers."""

    kind: Literal["mlp"] = "mlp"
    """Which kind of model this is."""
    hidden: Annotated[
        Annotated[Count, Tag("one")] | Annotated[list[Count], Field(min_length=1), Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
    ]
    """Units of the hidden layer, or a list: one entry a layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of hidden units dropped while training."""

    @property
    def label(self) -> str:
        """`mlp-16`, `mlp-32x16`, `mlp-16d0.1` with dropout."""
        widths = self.hidden if isinstance(self.hidden, list) else [self.hidden]
        return "mlp-" + "x".join(map(str, widths)) + (f"d{self.dropout:g}" if self.dropout else "")


class Cnn(Spec):
    """Blocks of 3 x 3 convolution and ReLU, image halved and channels doubled between them; then a linear layer."""

    kind: Literal["cnn"] = "cnn"
    """Which kind of model this is."""
    width: Count
    """Channels of the first block."""
    depth: Count = 2
    """Number of blocks."""

    @property
    def label(self) -> str:
        """`cnn-8`, or `cnn-8d3` where the depth is not 2."""
        return f"cnn-{self.width}" + ("" if self.depth == 2 else f"d{self.depth}")


class Custom(Spec):
    """Your own model, built by a function in the recipe's folder or in an installed package."""

    kind: Literal["custom"] = "custom"
    """Which kind of model this is."""
    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`, called as function(input_shape=..., classes=..., **arguments); returns a torch.nn.Module."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function."""

    @property
    def label(self) -> str:
        """The function's name, and its arguments as far as they are plain: `resnet-depth8`."""
        plain = {key: value for key, value in self.arguments.items() if isinstance(value, str | int | float)}
        words = [self.factory.partition(":")[2], *(f"{key}{value}" for key, value in plain.items())]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:60]


Model = Annotated[Mlp | Cnn | Custom, Discriminator("kind")]


# ---- optimizers


class Constant(Spec):
    """The learning rate stays as it is."""

    kind: Literal["constant"] = "constant"
    """Which kind of schedule this is."""


class Steps(Spec):
    """The learning rate is multiplied by `factor` at each of the given shares of every stage."""

    kind: Literal["steps"] = "steps"
    """Which kind of schedule this is."""
    at: list[Share] = Field(default=[0.5, 0.75], min_length=1)
    """Shares of the stage, rising."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What the learning rate is multiplied by."""

    @field_validator("at")
    @classmethod
    def _rising(cls, at: list[float]) -> list[float]:
        if sorted(set(at)) != at:
            raise ValueError("the shares must rise")
        return at


class Linear(Spec):
    """The learning rate falls to 0 along a straight line over every stage."""

    kind: Literal["linear"] = "linear"
    """Which kind of schedule this is."""


Schedule = Annotated[Constant | Steps | Linear, Discriminator("kind")]


class Sgd(Spec):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    """Which kind of optimizer this is."""
    lr: LearningRate
    """Learning rate at the start of each stage."""
    momentum: Momentum = 0.9
    """Momentum."""
    weight_decay: Decay = 0.0
    """Weight decay, added to the gradient."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    schedule: Schedule = Constant()
    """How the learning rate changes within a stage."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Spec):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    """Which kind of optimizer this is."""
    lr: LearningRate
    """Learning rate at the start of each stage."""
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the running mean and of the running square."""
    weight_decay: Decay = 0.01
    """Weight decay, apart from the gradient."""
    schedule: Schedule = Constant()
    """How the learning rate changes within a stage."""


Optimizer = Annotated[Sgd | AdamW, Discriminator("kind")]


# ---- objectives


class AnnealingKD(Spec):
    """Annealing-KD (Jafari et al., EACL 2021, arXiv 2104.07163): stage I on logits, stage II on labels."""

    kind: Literal["annealing_kd"] = "annealing_kd"
    """Which kind of objective this is."""
    tau_max: Count
    """The temperature of the first epoch; it falls to 1 over stage I."""
    stage1_epochs: Count
    """Epochs of stage I, at least tau_max."""
    stage2_epochs: Count
    """Epochs of stage II, which starts from stage I's best validation epoch."""
    reduction: Literal["mean", "sum"] = "mean"
    """The squared norm over classes: `mean` as in the authors' code, to which their learning rates belong, or `sum` as
    in the paper."""

    @model_validator(mode="after")
    def _reaches_one(self) -> AnnealingKD:
        if self.stage1_epochs < self.tau_max:
            raise ValueError(
                f"stage1_epochs is {self.stage1_epochs} and tau_max is {self.tau_max}: "
                "stage I needs at least tau_max epochs for the temperature to reach 1"
            )
        return self

    @property
    def epochs(self) -> int:
        """Epochs of both stages."""
        return self.stage1_epochs + self.stage2_epochs

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class HardLabels(Spec):
    """Cross-entropy on the labels alone: training from scratch, and how a teacher is trained here."""

    kind: Literal["hard_labels"] = "hard_labels"
    """Which kind of objective this is."""
    epochs: Count
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


Objective = Annotated[AnnealingKD | HardLabels, Discriminator("kind")]


# ---- who is trained


class Training(Spec):
    """What every training run has."""

    optimizer: Optimizer
    """The optimizer, made afresh for each stage."""
    batch: Count = 64
    """Rows of a global batch, over all workers."""
    seed: Seed = 0
    """Governs initialisation and dropout; the order of rows belongs to data.seed."""
    threads: Count = 1
    """CPU threads of each worker. Part of the result: another number may change the last bits of the weights."""


class TeacherTraining(Training):
    """How the teacher is trained, from hard labels, before it is cached."""

    epochs: Count
    """Epochs; the best validation epoch is kept."""


class Teacher(Spec):
    """The teacher: weights that lie somewhere, or a model that the recipe trains first."""

    weights: str | None = None
    """A folder or URI with model.safetensors and model.json, such as a student's; relative to the recipe's folder."""
    model: Model | None = None
    """The architecture of a teacher that this recipe trains."""
    train: TeacherTraining | None = None
    """How this recipe trains it."""

    @model_validator(mode="after")
    def _one_way(self) -> Teacher:
        given = [name for name in ("weights", "model", "train") if getattr(self, name) is not None]
        if given not in (["weights"], ["model", "train"]):
            raise ValueError(f"give either weights, or model and train; got {' and '.join(given) or 'neither'}")
        return self


def _student_name(student: dict[str, Any]) -> str:
    objective = student["objective"]
    tau = f"-t{objective.tau_max}" if isinstance(objective, AnnealingKD) else ""
    return f"{student['model'].label}-{objective.label}{tau}-s{student['seed']}"


def _folder_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a folder's name: use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


class Student(Training):
    """One student. In the file, a block may have a `grid:` and then stands for several."""

    model: Model
    """Its architecture."""
    objective: Objective
    """What it is trained on."""
    workers: Count = 1
    """Data-parallel workers that share each batch."""
    name: str = Field(default_factory=_student_name, validate_default=True)
    """Its folder in the run; by default `<model>-<objective>-t<tau_max>-s<seed>`. Unique in the recipe."""

    _valid_name = field_validator("name")(_folder_name)


class Cache(Spec):
    """How the teacher's logits are computed and stored."""

    encoding: Literal["float32", "float16"] = "float32"
    """Precision of the stored logits."""
    batch_rows: Count = 256
    """Rows that the teacher sees at once. Part of how a store is computed: another number may change the last bits."""
    threads: Count = 1
    """CPU threads of each caching task. As batch_rows, part of how a store is computed."""


class Recipe(Spec):
    """Everything a run depends on."""

    name: str
    """The run's folder under --run-root."""
    data: Data
    """The rows that everyone sees."""
    teacher: Teacher
    """Whose logits are cached."""
    cache: Cache = Cache()
    """How its logits are stored."""
    students: list[Student] = Field(min_length=1)
    """Who is trained, in this order."""
    cohorts: Count | None = None
    """How many groups of students train at the same time; none leaves it to the planner. Changes no result."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0
    """Time between checkpoints; 0 writes one at the end of every epoch. Changes no result."""
    folder: str | None = None
    """Put on the path of Python for custom models; by default the recipe's own folder."""

    _valid_name = field_validator("name")(_folder_name)

    @field_validator("students")
    @classmethod
    def _unique_names(cls, students: list[Student]) -> list[Student]:
        # Two names that differ only in case are one folder on some file systems.
        twice = [name for name, count in Counter(student.name.casefold() for student in students).items() if count > 1]
        if twice:
            raise ValueError(
                f"several students are named {', '.join(twice[:3])}; a default name holds model, objective, tau_max "
                "and seed, so students that differ in anything else need blocks with a `name:` of their own"
            )
        return students

    def identity(self) -> dict[str, Any]:
        """What the run computes, as JSON: the resolved recipe without placement and without paths.

        Paths are left out because data and teacher are known by their content, wherever they lie.
        """
        document = self.model_dump(mode="json", exclude=set(PLACEMENT))
        for source in (document["data"][split] for split in ("train", "validation", "test")):
            if isinstance(source, dict):
                source.pop("path", None)
        del document["teacher"]["weights"]
        document["students"] = {student["name"]: student for student in document["students"]}
        return document

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `load_recipe` reads back, every default written out."""
        from ruamel.yaml import YAML

        document = self.model_dump(mode="json")
        document["students"] = [{"name": student.pop("name"), **student} for student in document["students"]]
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
        yaml.width = 120
        text = io.StringIO()
        text.write("# The resolved recipe: every default and every derived value written out, paths absolute.\n")
        yaml.dump(document, text)
        return text.getvalue()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, expand grids, and resolve every path and default.

    Paths in the file are relative to its folder, paths in overrides to the working directory.

    Raises:
        RecipeError: the file or an override is wrong; names file, line and key, and the nearest known key.
    """
    from akd_dist.recipe_file import read_recipe

    return read_recipe(Path(path), overrides)


def differences(ours: Any, theirs: Any) -> list[str]:
    """Where two documents differ, as `data.seed: 0 -> 1`; named entries of a list are compared by name."""
    left, right = dict(_leaves(ours)), dict(_leaves(theirs))
    return [
        f"{key}: {left.get(key, 'nothing')} -> {right.get(key, 'nothing')}"
        for key in left | right
        if key not in left or key not in right or left[key] != right[key]
    ]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, list) and all(isinstance(entry, Mapping) and "name" in entry for entry in node):
        items = [(entry["name"], entry) for entry in node]
    else:
        yield prefix, node
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


# ---- schema


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file; a block under `students` that has a grid may leave out what the grid gives."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for definition in definitions.values():
        _require_kind(definition)
    partial = {name: _partial(definitions[name]) for name in sorted(_reachable(definitions, "Student"))}
    partial["Student"]["properties"]["grid"] = {
        "description": "Dotted keys of this block, each with a list of values; expands to their product in file order.",
        "type": "object",
        "additionalProperties": {"type": "array", "minItems": 1},
        "minProperties": 1,
    }
    partial["Student"]["required"] = ["grid"]
    definitions |= {f"{name}InGrid": definition for name, definition in partial.items()}
    schema["properties"]["students"]["items"] = {
        "anyOf": [{"$ref": "#/$defs/Student"}, {"$ref": "#/$defs/StudentInGrid"}]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "An akd-dist recipe"}


def _require_kind(definition: dict[str, Any]) -> None:
    """In a file `kind` must be written, since it is what tells the variants apart."""
    if "const" in definition.get("properties", {}).get("kind", {}):
        del definition["properties"]["kind"]["default"]
        definition["required"] = ["kind", *definition.get("required", [])]


def _reachable(definitions: dict[str, Any], name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += re.findall(r"'#/\$defs/(\w+)'", str(definitions[current]))
    return found


def _partial(definition: dict[str, Any]) -> dict[str, Any]:
    """The same keys, none of them required, also further down; variants by kind become a plain choice."""

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        node = {key: convert(value) for key, value in node.items() if key != "discriminator"}
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        if "$ref" in node:
            node["$ref"] += "InGrid"
        return node

    loose: dict[str, Any] = convert(copy.deepcopy(definition))
    loose.pop("required", None)
    return loose
