"""The recipe: one YAML file that says everything a run depends on, as typed, frozen objects.

    akd-dist recipe check jobs/digits.yaml      read it, fill in every default, list the students
    akd-dist recipe schema                      its JSON Schema, for completion in an editor

Unknown keys are refused, numbers must be numbers, and the resolved recipe is saved beside every result. The docstring
under a field is its documentation, here and in the JSON Schema. How a file is read lies in `recipe_file`.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from akd_dist.storage import places
from akd_dist.trusted import MODULE, Trusted

# Names become folders, on any file system.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Where a run is placed, not what it computes: left out of its identity.
PLACEMENT = ("cohorts", "checkpoint_seconds", "folder", "code")

# A function of the user's, as `module:function`.
FACTORY = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"

Task = Literal["classification", "regression"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
METRICS: dict[Task, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}
"""The metrics of each task, its usual primary one first."""

Count = Annotated[int, Field(ge=1)]
# Bounds of what a document may ask for, far above any model: within them, memory decides (`models.check_memory`).
Width = Annotated[int, Field(ge=1, le=10**12)]
Layers = Annotated[int, Field(ge=1, le=2_000)]
Classes = Annotated[int, Field(ge=1, le=10**9)]
Length = Annotated[int, Field(ge=1, le=10**7)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Spec(BaseModel):
    """A part of a recipe: frozen, every key known, no silent conversion of types, no NaN."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Factory(Spec):
    """What may name code of the user's own. It runs nothing before `trust` has said on whose word it may."""

    _trusted: Trusted = PrivateAttr(default_factory=Trusted)

    if TYPE_CHECKING:  # a field of each kind, in its own place among the others
        factory: str

    @property
    def trusted(self) -> Trusted:
        """Which factories may be imported for it; no part of what it says, and gone when it is read back."""
        return self._trusted


# ---- data


class Digits(Spec):
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 grey images, 10 classes."""

    kind: Literal["digits"] = "digits"
    """Which kind of source this is."""


class Idx(Spec):
    """Images and labels in IDX files, as MNIST and its family come; plain or gzip-compressed."""

    kind: Literal["idx"] = "idx"
    """Which kind of source this is."""
    images: str
    """The file of inputs, uint8 of two dimensions or more; relative to the recipe's folder."""
    labels: str
    """The file of labels, counted from 0."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one."""


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list) else "one"


Columns = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[str], Field(min_length=1, max_length=2), Tag("several")],
    Discriminator(_one_or_several),
]


class Table(Spec):
    """Named columns: one of inputs (two of text make a pair), one of labels."""

    input: Columns = "input"
    """The column of inputs: encoded images (bytes, or a struct with bytes), text, or lists of numbers. A list of two
    names is a pair of texts."""
    label: str = "label"
    """The column of labels: class ids counted from 0, class names, or numbers where data.task is regression."""
    shape: list[Count] | None = None
    """The shape of one input, for columns of flat lists; none keeps the list as a vector."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one, or the names there are."""


class Parquet(Table):
    """A dataset in Parquet. Row order is the order of the files."""

    kind: Literal["parquet"] = "parquet"
    """Which kind of source this is."""
    path: str
    """A file, a folder or a glob; relative to the recipe's folder."""


class HuggingFaceData(Table):
    """A dataset of the Hugging Face `datasets` library (extra: akd-dist[huggingface])."""

    kind: Literal["huggingface"] = "huggingface"
    """Which kind of source this is."""
    path: str | None = None
    """A folder that `save_to_disk` wrote; relative to the recipe's folder."""
    name: str | None = None
    """A dataset on the hub, where one can be reached."""
    config: str | None = None
    """Its configuration, if it has several."""
    split: str | None = None
    """Which of its splits; needed unless the folder holds a single one."""

    @model_validator(mode="after")
    def _one_place(self) -> HuggingFaceData:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        if self.name is not None and self.split is None:
            raise ValueError("a dataset by name needs a split, such as `split: train`")
        return self


class CustomData(Table, Factory):
    """Rows by your own function, in the recipe's folder or in a module that `code:` lists.

    It returns an Arrow table, or a map-style `torch.utils.data.Dataset` whose items are (input, label).
    """

    kind: Literal["custom"] = "custom"
    """Which kind of source this is."""
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(**arguments)."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the function; `./x` in them is a path relative to the recipe's folder. A change of them, of
    what they name or of the module's file prepares the data anew."""


Source = Annotated[Digits | Idx | Parquet | HuggingFaceData | CustomData, Discriminator("kind")]


class ByteText(Spec):
    """Text as its UTF-8 bytes: the built-in tokenizer, for any language and without a vocabulary file."""

    kind: Literal["bytes"] = "bytes"
    """Which kind of tokenizer this is."""
    length: Length = 256
    """Tokens of an input; longer texts are cut, shorter ones padded."""


class HuggingFaceText(Spec):
    """Text through a Hugging Face tokenizer (extra: akd-dist[huggingface])."""

    kind: Literal["huggingface"] = "huggingface"
    """Which kind of tokenizer this is."""
    path: str | None = None
    """A folder with the tokenizer's files; relative to the recipe's folder."""
    name: str | None = None
    """A tokenizer on the hub, where one can be reached."""
    length: Length = 128
    """Tokens of an input; longer texts are cut, shorter ones padded."""

    @model_validator(mode="after")
    def _one_place(self) -> HuggingFaceText:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        return self


Text = Annotated[ByteText | HuggingFaceText, Discriminator("kind")]


class Image(Spec):
    """How encoded images become pixels: one definition for teacher, students and finished models."""

    background: Annotated[list[Byte], Field(min_length=3, max_length=3)] = [255, 255, 255]
    """What is seen through transparent images: red, green and blue, 0 to 255; white as in browsers and on paper."""


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


class PadCropFlip(Spec):
    """The paper's augmentation of CIFAR: pad with zeros, crop the old size at random, flip left to right by chance."""

    kind: Literal["pad_crop_flip"] = "pad_crop_flip"
    """Which kind of augmentation this is."""
    pixels: Count = 4
    """Zeros added on each side."""
    flip: bool = True
    """Whether half of the views are mirrored."""


class RandomResizedCropFlip(Spec):
    """A random part of the image, brought back to its size by bilinear interpolation, flipped by chance."""

    kind: Literal["random_resized_crop_flip"] = "random_resized_crop_flip"
    """Which kind of augmentation this is."""
    scale: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.08, 1.0)
    """Least and largest share of the image's area."""
    ratio: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.75, 4 / 3)
    """Least and largest width divided by height, drawn evenly on a logarithmic scale."""
    flip: bool = True
    """Whether half of the views are mirrored."""

    @model_validator(mode="after")
    def _ordered(self) -> RandomResizedCropFlip:
        if self.scale[0] > self.scale[1] or self.scale[1] > 1 or self.ratio[0] > self.ratio[1]:
            raise ValueError(f"scale is {self.scale} and ratio is {self.ratio}: both must rise, and scale end by 1")
        return self


class TokenMask(Spec):
    """Each token but special ones is replaced by the tokenizer's mask by chance."""

    kind: Literal["token_mask"] = "token_mask"
    """Which kind of augmentation this is."""
    share: Share = 0.15
    """The chance of each token."""


class CustomAugmentation(Factory):
    """Your own augmentation: a draw from (seed, row, view), and how it is applied to a batch.

    The factory returns an object with `words`, `draw(words, input_shape)` and `apply(batch, params)`; see docs/data.md.
    """

    kind: Literal["custom"] = "custom"
    """Which kind of augmentation this is."""
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(**arguments)."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""


Augmentation = Annotated[
    NoAugmentation | Shift | PadCropFlip | RandomResizedCropFlip | TokenMask | CustomAugmentation,
    Discriminator("kind"),
]


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
    Annotated[Share, Tag("share")]
    | Annotated[Digits, Tag("digits")]
    | Annotated[Idx, Tag("idx")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[HuggingFaceData, Tag("huggingface")]
    | Annotated[CustomData, Tag("custom")],
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
    subset: Count | None = None
    """Train on so many of the train rows, drawn by the seed; none takes all. Validation and test stay as they are."""
    stratify: bool = False
    """Whether shares and subsets are drawn class by class, each with at least one train row; for classification. It is
    another split than without."""
    seed: Seed = 0
    """Governs the split, the order of rows and the views, for all students alike."""
    task: Task = "classification"
    """What a label is: one of some classes, or a number."""
    metric: Metric | None = None
    """What picks the best epoch and heads the tables; none takes accuracy, or Pearson's correlation for regression."""
    text: Text | None = None
    """How text becomes tokens; needed where inputs are text."""
    image: Image = Image()
    """How encoded images become pixels."""
    views: Count = 1
    """How many augmented views of each train row the teacher is cached on; epoch e trains on view e mod views."""
    augmentation: Augmentation = NoAugmentation()
    """How a view is drawn from a row; a pure function of (seed, row, view)."""
    window: Count | None = None
    """Rows that are shuffled as one window, for data larger than memory; none shuffles all rows together."""
    normalize: Normalize | None = None
    """Applied inside the models; none leaves inputs between 0 and 1 (uint8) or as they are (float)."""

    @property
    def primary_metric(self) -> Metric:
        """The metric that picks the best epoch: the higher the better."""
        return self.metric or METRICS[self.task][0]

    @model_validator(mode="after")
    def _metric_fits(self) -> Data:
        if self.primary_metric not in METRICS[self.task]:
            raise ValueError(
                f"metric {self.metric} is not one of {self.task}, which has {', '.join(METRICS[self.task])}"
            )
        return self

    @model_validator(mode="after")
    def _fits_text(self) -> Data:
        if self.text is None and isinstance(self.augmentation, TokenMask):
            raise ValueError("the augmentation token_mask is for text; say how text becomes tokens with data.text")
        if self.text is not None and self.normalize is not None:
            raise ValueError("normalize is for images and numbers; leave it out where data.text is given")
        if self.text is not None and self.image != Image():
            raise ValueError("image is for encoded images; leave it out where data.text is given")
        return self

    @model_validator(mode="after")
    def _numbers_have_no_classes(self) -> Data:
        given = {name: getattr(getattr(self, name), "classes", None) for name in ("train", "validation", "test")}
        if self.task == "regression" and any(given.values()):
            names = " and ".join(name for name, classes in given.items() if classes)
            raise ValueError(f"{names} says how many classes there are, but task is regression: leave `classes` out")
        return self

    @model_validator(mode="after")
    def _numbers_are_not_stratified(self) -> Data:
        if self.task == "regression" and self.stratify:
            raise ValueError("stratify draws rows class by class, but task is regression: leave it out")
        return self

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
        Annotated[Width, Tag("one")] | Annotated[list[Width], Field(min_length=1, max_length=2_000), Tag("several")],
        Discriminator(_one_or_several),
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
    width: Width
    """Channels of the first block."""
    depth: Annotated[int, Field(ge=1, le=30)] = 2
    """Number of blocks."""

    @property
    def label(self) -> str:
        """`cnn-8`, or `cnn-8d3` where the depth is not 2."""
        return f"cnn-{self.width}" + ("" if self.depth == 2 else f"d{self.depth}")


class ResNet(Spec):
    """The residual network of He et al. (2016) for 32 x 32 images: 6n + 2 layers, shortcuts without parameters."""

    kind: Literal["resnet"] = "resnet"
    """Which kind of model this is."""
    depth: Layers
    """Number of layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110."""
    width: Width = 16
    """Channels of the first third; the others have twice and four times as many."""

    @field_validator("depth")
    @classmethod
    def _is_6n_plus_2(cls, depth: int) -> int:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2, as 8, 14, 20, 32, 44, 56 or 110 are")
        return depth

    @property
    def label(self) -> str:
        """`resnet-8`, or `resnet-8w32` where the width is not 16."""
        return f"resnet-{self.depth}" + ("" if self.width == 16 else f"w{self.width}")


class PlainCnn(Spec):
    """A plain network of the papers on teacher assistants (Mirzadeh et al., 2020): 3 x 3 convolutions, then linear."""

    kind: Literal["plain_cnn"] = "plain_cnn"
    """Which kind of model this is."""
    layers: Literal[2, 4, 6, 8, 10]
    """Number of convolutions."""

    @property
    def label(self) -> str:
        """`plain-2`."""
        return f"plain-{self.layers}"


class TextTransformer(Spec):
    """A small transformer encoder over tokens, trained from nothing."""

    kind: Literal["text_transformer"] = "text_transformer"
    """Which kind of model this is."""
    width: Width
    """Numbers that stand for a token; a multiple of the heads."""
    depth: Layers = 2
    """Number of encoder blocks."""
    heads: Width = 4
    """Attention heads of each block."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of units dropped while training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TextTransformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads, {self.heads}")
        return self

    @property
    def label(self) -> str:
        """`transformer-64x2`: width and depth; `transformer-64x2d0.1` with dropout."""
        return f"transformer-{self.width}x{self.depth}" + (f"d{self.dropout:g}" if self.dropout else "")


class HuggingFaceModel(Spec):
    """Sequence classification by the Hugging Face `transformers` library (extra: akd-dist[huggingface])."""

    kind: Literal["huggingface"] = "huggingface"
    """Which kind of model this is."""
    path: str | None = None
    """A folder with config.json and, for pretrained models, model.safetensors; relative to the recipe's folder."""
    name: str | None = None
    """A model on the hub, where one can be reached."""
    pretrained: bool = True
    """Whether training starts from its weights; else from random ones. Only safetensors are read."""
    config: dict[str, JsonValue] = {}
    """Keys of its configuration that are set otherwise. A trained model's card holds the whole configuration here."""

    @model_validator(mode="after")
    def _one_place(self) -> HuggingFaceModel:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        return self

    @property
    def label(self) -> str:
        """The last part of its name or path."""
        return _label((self.name or self.path or "").rstrip("/").rpartition("/")[2])


class Timm(Spec):
    """An image model of the `timm` library (extra: akd-dist[timm])."""

    kind: Literal["timm"] = "timm"
    """Which kind of model this is."""
    name: str
    """Its name there, as `timm.list_models()` has it."""
    pretrained: bool = False
    """Whether training starts from its published weights, where the hub can be reached."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of `timm.create_model`."""

    @field_validator("arguments")
    @classmethod
    def _name_no_weights(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        given = [name for name in arguments if name == "checkpoint_path" or name.startswith("pretrained")]
        if given:
            raise ValueError(
                f"arguments cannot have {' and '.join(given)}: weights come by `pretrained: true`, never from a pickle"
            )
        return arguments

    @property
    def label(self) -> str:
        """Its name."""
        return _label(self.name)


class Custom(Factory):
    """Your own model, built by a function in the recipe's folder or in a module that `code:` lists."""

    kind: Literal["custom"] = "custom"
    """Which kind of model this is."""
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(input_shape=..., classes=..., **arguments); returns a torch.nn.Module."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""

    @property
    def label(self) -> str:
        """The function's name, and its arguments as far as they are plain: `resnet-depth8`."""
        plain = {key: value for key, value in self.arguments.items() if isinstance(value, str | int | float)}
        words = [self.factory.partition(":")[2], *(f"{key}{value}" for key, value in plain.items())]
        return _label("-".join(words))


def _label(text: str) -> str:
    """Text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:60]


Model = Annotated[
    Mlp | Cnn | PlainCnn | ResNet | TextTransformer | HuggingFaceModel | Timm | Custom, Discriminator("kind")
]


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
    clip: Positive | None = None
    """The largest norm of the gradient over all weights; longer ones are scaled down to it. None does not clip."""
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
    clip: Positive | None = None
    """The largest norm of the gradient over all weights; longer ones are scaled down to it. None does not clip."""
    schedule: Schedule = Constant()
    """How the learning rate changes within a stage."""


Optimizer = Annotated[Sgd | AdamW, Discriminator("kind")]


# ---- objectives

# Whose word a student takes: the labels alone, or also the logits of the teacher or of its last assistant.
LearnsFrom = Literal["labels", "teacher", "assistant"]


class AnnealingKD(Spec):
    """Annealing-KD (Jafari et al., EACL 2021, arXiv 2104.07163): stage I on logits, stage II on labels."""

    learns_from: ClassVar[LearnsFrom] = "teacher"

    kind: Literal["annealing_kd"] = "annealing_kd"
    """Which kind of objective this is."""
    tau_max: Count
    """The temperature of the first epoch; it falls to 1 over stage I."""
    stage1_epochs: Count
    """Epochs of stage I, at least tau_max."""
    stage2_epochs: Count
    """Epochs of stage II, which starts from stage I's best validation epoch."""
    stage2_optimizer: Optimizer | None = None
    """The optimizer of stage II, whose loss is another one; none takes the student's."""
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
    """The labels alone (cross-entropy; squared error for regression): from scratch, and how a teacher is trained."""

    learns_from: ClassVar[LearnsFrom] = "labels"

    kind: Literal["hard_labels"] = "hard_labels"
    """Which kind of objective this is."""
    epochs: Count
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class Distilled(Spec):
    """What KD and TAKD have in common: labels and softened logits, mixed."""

    epochs: Count
    """Epochs; as many as both stages of Annealing-KD make a fair comparison."""
    temperature: Positive = 5.0
    """What logits of student and teacher are divided by before the softmax."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher in the loss; the rest is the labels'."""


class Kd(Distilled):
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531): labels and softened teacher, mixed.

    For regression, where there is no softmax, the squared errors to the label and to the teacher, mixed.
    """

    learns_from: ClassVar[LearnsFrom] = "teacher"

    kind: Literal["kd"] = "kd"
    """Which kind of objective this is."""

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class Takd(Distilled):
    """KD from the last assistant of `teacher.assistant` (TAKD: Mirzadeh et al., AAAI 2020, arXiv 1902.03393)."""

    learns_from: ClassVar[LearnsFrom] = "assistant"

    kind: Literal["takd"] = "takd"
    """Which kind of objective this is."""

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


class ContinuationKD(Spec):
    """Continuation-KD (Jafari et al., EMNLP 2022, arXiv 2212.05998): one stage, from annealed logits to the labels."""

    learns_from: ClassVar[LearnsFrom] = "teacher"

    kind: Literal["continuation_kd"] = "continuation_kd"
    """Which kind of objective this is."""
    tau_max: Count
    """The temperature of the first epoch; it falls by 1 every floor(epochs / tau_max) epochs."""
    epochs: Count
    """Epochs, at least tau_max."""
    ramp: Count | None = None
    """psi, the weight of the labels, is i / ramp in epoch i = 1, 2, ...; none takes three quarters of the epochs."""
    ramp_until: Count | None = None
    """The last epoch of the ramp, after which psi is 1; none takes the epoch in which it arrives there."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """m: distances to the teacher's logits below m * Phi cost nothing."""
    reduction: Literal["mean", "sum"] = "mean"
    """The squared norm over classes, to which the margin applies: `mean` or `sum`."""

    @model_validator(mode="after")
    def _reaches_one(self) -> ContinuationKD:
        if self.epochs < self.tau_max:
            raise ValueError(
                f"epochs is {self.epochs} and tau_max is {self.tau_max}: "
                "at least tau_max epochs are needed for the temperature to reach 1"
            )
        return self

    @property
    def label(self) -> str:
        """The objective as it stands in a student's name."""
        return self.kind


Objective = Annotated[AnnealingKD | HardLabels | Kd | Takd | ContinuationKD, Discriminator("kind")]


# ---- who is trained

Precision = Literal["float32", "float64", "bfloat16", "float16"]
LastBatch = Literal["keep", "drop", "merge"]


class Training(Spec):
    """What every training run has."""

    optimizer: Optimizer
    """The optimizer, made afresh for each stage."""
    batch: Count = 64
    """Rows of a global batch, over all workers."""
    last_batch: LastBatch = "keep"
    """What becomes of an epoch's last batch where fewer rows are left for it than `batch` says: it is kept; or dropped,
    so that other rows are left out in each epoch; or merged with the batch before it."""
    seed: Seed = 0
    """Governs initialisation and dropout; the order of rows belongs to data.seed."""
    threads: Count = 1
    """CPU threads of each worker. Part of the result: another number may change the last bits of the weights."""
    precision: Precision = "float32"
    """Numbers that it computes with: float32 or float64 throughout, or bfloat16 or float16 where autocast allows it,
    on weights kept in float32."""


class TeacherTraining(Training):
    """How the teacher is trained, from hard labels, before it is cached."""

    epochs: Count
    """Epochs; the best validation epoch is kept."""


class Assistant(Training):
    """A model between teacher and students: it learns from the teacher's store and is cached like a teacher."""

    model: Model
    """Its architecture."""
    objective: Objective
    """What it is trained on: the logits of the model it stands under, or labels."""
    assistant: Assistant | None = None
    """A further one, which learns from this one; students of objective `takd` learn from the last of the chain."""

    @field_validator("objective")
    @classmethod
    def _not_takd(cls, objective: Objective) -> Objective:
        if isinstance(objective, Takd):
            raise ValueError("an assistant learns from the model it stands under: use kind: kd")
        return objective


class Teacher(Spec):
    """The teacher: weights that lie somewhere, or a model that the recipe trains first."""

    weights: str | None = None
    """A folder or URI with model.safetensors and model.json, such as a student's; relative to the recipe's folder."""
    model: Model | None = None
    """The architecture of a teacher that this recipe trains."""
    train: TeacherTraining | None = None
    """How this recipe trains it."""
    assistant: Assistant | None = None
    """A model of a size between, for students of objective `takd`."""

    @property
    def chain(self) -> list[Assistant]:
        """The assistants, from the one under the teacher to the last."""
        found, link = [], self.assistant
        while link is not None:
            found.append(link)
            link = link.assistant
        return found

    @model_validator(mode="after")
    def _one_way(self) -> Teacher:
        given = [name for name in ("weights", "model", "train") if getattr(self, name) is not None]
        if given not in (["weights"], ["model", "train"]):
            raise ValueError(f"give either weights, or model and train; got {' and '.join(given) or 'neither'}")
        return self


def _student_name(student: dict[str, Any]) -> str:
    objective = student["objective"]
    tau = f"-t{objective.tau_max}" if isinstance(objective, AnnealingKD | ContinuationKD) else ""
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
    sync_batchnorm: bool = False
    """Whether the workers take batch statistics over the global batch; otherwise each over its own share."""
    gpus: Positive = 1.0
    """GPUs of each worker, where the recipe's device is cuda; cohorts share one by fractions. Changes no result."""
    name: str = Field(default_factory=_student_name, validate_default=True)
    """Its folder in the run; by default `<model>-<objective>-t<tau_max>-s<seed>`, with what else its grid varies before
    the seed. Unique in the recipe."""

    _valid_name = field_validator("name")(_folder_name)

    @property
    def stage1(self) -> str | None:
        """What students that train the same stage I have in common; None where no further stage follows."""
        if not isinstance(self.objective, AnnealingKD):
            return None
        document = self.model_dump(mode="json", exclude={"name", "gpus"})
        del document["objective"]["stage2_epochs"], document["objective"]["stage2_optimizer"]
        return json.dumps(document)


class Cache(Spec):
    """How the teacher's logits are computed and stored."""

    encoding: Literal["float32", "float16"] = "float32"
    """Precision of the stored logits."""
    batch_rows: Count = 256
    """Rows that the teacher sees at once. Part of how a store is computed: another number may change the last bits."""
    threads: Count = 1
    """CPU threads of each caching task. As batch_rows, part of how a store is computed."""
    precision: Precision = "float32"
    """Numbers that the teacher computes with; another precision is another teacher, with a store of its own."""


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
    device: Literal["cpu", "cuda"] = "cpu"
    """Where teacher and students compute. Part of the result: the last bits of the weights differ."""
    cohorts: Count | None = None
    """How many groups of students train at the same time; none leaves it to the planner. Changes no result."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0
    """Time between checkpoints; 0 writes one at the end of every epoch. Changes no result."""
    folder: str | None = None
    """Where modules of your own lie, which `factory` may name; by default the recipe's own folder."""
    code: list[Annotated[str, Field(pattern=MODULE)]] = []
    """Modules elsewhere that `factory` may name as well, such as an installed package of your own, with all that lies
    below them. A teacher in `weights` may name them, too."""

    _trusted: Trusted = PrivateAttr(default_factory=Trusted)

    _valid_name = field_validator("name")(_folder_name)

    @property
    def trusted(self) -> Trusted:
        """Which factories may be imported for it, as `trust` was told; nothing until then."""
        return self._trusted

    def own(self) -> Self:
        """This recipe, given by the user to a command: what it names may be imported from its folder and from `code`.

        A recipe that a store or a run holds is not the user's word; see `trust`.
        """
        factories = tuple(sorted({part.factory for part in _factories(self)}))
        own = Trusted(factories=factories, folder=self.folder, modules=tuple(self.code), named_by="the recipe")
        return trust(self, own)

    @field_validator("students")
    @classmethod
    def _unique_names(cls, students: list[Student]) -> list[Student]:
        # Two names that differ only in case are one folder on some file systems.
        twice = [name for name, count in Counter(student.name.casefold() for student in students).items() if count > 1]
        if twice:
            raise ValueError(
                f"several students are named {', '.join(twice[:3])}; a default name holds model, objective, tau_max "
                "and seed, and whatever else its block's grid varies, so students of different blocks that differ in "
                "anything else need blocks with a `name:` of their own"
            )
        return students

    @model_validator(mode="after")
    def _assistant_and_takd(self) -> Recipe:
        taught = [student.name for student in self.students if student.objective.learns_from == "assistant"]
        if taught and self.teacher.assistant is None:
            raise ValueError(f"{taught[0]} learns by takd, which needs a teacher.assistant")
        if self.teacher.assistant is not None and not taught:
            raise ValueError("teacher.assistant is there and no student has the objective takd: nobody would use it")
        return self

    def identity(self) -> dict[str, Any]:
        """What the run computes, as JSON: the resolved recipe without placement and without paths.

        Paths are left out because data and teacher are known by their content, wherever they lie.
        """
        document = self.model_dump(mode="json", exclude=set(PLACEMENT))
        for source in (document["data"][split] for split in ("train", "validation", "test")):
            if isinstance(source, dict):
                for key in ("path", "images", "labels"):
                    source.pop(key, None)
        if document["data"]["text"] is not None:
            document["data"]["text"].pop("path", None)
        if not self.data.stratify:  # as recipes of before say nothing of it
            del document["data"]["stratify"]
        # Runs of before knew no such key: what is as by default is left out, each key for itself.
        document["data"]["image"] = self.data.image.model_dump(mode="json", exclude_defaults=True)
        if not document["data"]["image"]:
            del document["data"]["image"]
        del document["teacher"]["weights"]
        for training in _trainings(document):
            forget_later_keys(training)
        for student in document["students"]:
            del student["gpus"]
        document["students"] = {student["name"]: student for student in document["students"]}
        return document

    def document(self, folder: str | Path) -> dict[str, Any]:
        """The resolved recipe as JSON for a document in `folder`, its places as `storage.places.written` names them."""
        from akd_dist.recipe_file import change_paths

        document = self.model_dump(mode="json")
        # Verbatim: prepared rows are known by the path that they were asked for.
        change_paths(document, functools.partial(places.written, folder=folder, verbatim=True))
        return document

    @classmethod
    def of_document(cls, document: dict[str, Any], folder: str | Path) -> Recipe:
        """What `document` gave, read back in the same folder, wherever that has been moved to.

        Raises:
            ValidationError: it is none.
        """
        from akd_dist.recipe_file import change_paths

        document = copy.deepcopy(document)
        change_paths(document, functools.partial(places.found, folder=folder))
        return cls.model_validate(document)

    def to_yaml(self, folder: Path | None = None) -> str:
        """The resolved recipe as a file that `load_recipe` reads back, every default written out.

        Args:
            folder: where the file will lie, so that its places can be named relative to it; None names them absolutely.
        """
        from ruamel.yaml import YAML

        document = self.model_dump(mode="json") if folder is None else self.document(folder)
        document["students"] = [{"name": student.pop("name"), **student} for student in document["students"]]
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
        yaml.width = 120
        text = io.StringIO()
        text.write("# The resolved recipe: every default and every derived value written out.\n")
        yaml.dump(document, text)
        return text.getvalue()


def forget_later_keys(training: dict[str, Any]) -> None:
    """Take out of a dumped `Training` what recipes had not from the start, where it holds its default.

    Runs and trained models are found by what their recipe says: they stay the same when recipes learn a new key.
    """
    if training["last_batch"] == "keep":
        del training["last_batch"]


def _trainings(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every `Training` of a dumped recipe."""
    yield from document["students"]
    if (train := document["teacher"]["train"]) is not None:
        yield train
    link = document["teacher"]["assistant"]
    while link is not None:
        yield link
        link = link["assistant"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, expand grids, and resolve every path and default.

    Paths in the file are relative to its folder, paths in overrides to the working directory.

    Raises:
        RecipeError: the file or an override is wrong; names file, line and key, and the nearest known key.
    """
    from akd_dist.recipe_file import read_recipe
    from akd_dist.storage.files import expanded

    return read_recipe(expanded(path), overrides)


Part = TypeVar("Part", bound=BaseModel)


def trust(part: Part, trusted: Trusted) -> Part:
    """The same object, all of whose factories may run as far as `trusted` says: a recipe, or a part of one."""
    if isinstance(part, Recipe):
        part._trusted = trusted
    for one in _factories(part):
        one._trusted = trusted
    return part


def _factories(part: object) -> Iterator[Factory]:
    """Every factory in a recipe, or in a part of one."""
    if isinstance(part, Factory):
        yield part
    elif isinstance(part, BaseModel):
        for name in type(part).model_fields:
            yield from _factories(getattr(part, name))
    elif isinstance(part, list):
        for one in part:
            yield from _factories(one)


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
