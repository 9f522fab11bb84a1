"""The rows of a recipe: where they come from, how they are split, read and augmented."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from akd_dist.recipe.base import (
    FACTORY,
    METRICS,
    Byte,
    Count,
    Factory,
    Length,
    Metric,
    Name,
    Positive,
    Seed,
    Share,
    Spec,
    Task,
    one_or_several,
)
from akd_dist.recipe.language import Packing, Scored, why_not_a_language_model
from akd_dist.recipe.sources import Idx, ShareOrSource, Source, Unlabelled

TokenizerKind = Annotated[Name, Field(description="Which kind of tokenizer this is.")]
AugmentationKind = Annotated[Name, Field(description="Which kind of augmentation this is.")]

Side = Annotated[int, Field(ge=1, le=8192)]


class ByteText(Spec):
    """Text as its UTF-8 bytes: the built-in tokenizer, for any language and without a vocabulary file."""

    kind: TokenizerKind[Literal["bytes"]] = "bytes"
    length: Length = 256
    """Tokens of an input; longer texts are cut, shorter ones padded."""


class HuggingFaceText(Spec):
    """Text through a Hugging Face tokenizer (extra: akd-dist[huggingface])."""

    kind: TokenizerKind[Literal["huggingface"]] = "huggingface"
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


Size = Annotated[
    Annotated[Side, Tag("one")] | Annotated[list[Side], Field(min_length=2, max_length=2), Tag("several")],
    Discriminator(one_or_several),
]


class Image(Spec):
    """How encoded images become pixels: one definition for teacher, students and finished models."""

    background: Annotated[list[Byte], Field(min_length=3, max_length=3)] = [255, 255, 255]
    """What is seen through transparent images and beside smaller ones: red, green and blue, 0 to 255; white as in
    browsers and on paper."""
    size: Size | None = None
    """The size that all images are brought to: one number for a square, or [height, width]; none takes them as they
    are, all of one size."""
    resize: Literal["shorter", "longer", "stretch", "none"] = "shorter"
    """How they are resized: until they cover `size`, which a square's shorter side then is; until they lie within it,
    on the background; each side for itself, which changes their proportions; or not at all."""
    crop: Literal["center", "none"] = "center"
    """What becomes of pixels beyond `size`: those around the center are kept; `none` has no such pixels, and needs
    `resize: longer` or `stretch`."""
    channels: Literal[1, 3] | None = None
    """1 takes all images as grey, 3 as coloured; none takes 1 if all of them are grey, else 3."""

    keep: Literal["auto", "encoded", "pixels"] = "auto"
    """How prepared rows hold them: as pixels, decoded once; or encoded as they come, decoded whenever they are read. A
    random resized crop is then one of the whole image. `auto` keeps them encoded where there is a size and the
    augmentation is such a crop."""

    @property
    def frame(self) -> tuple[int, int] | None:
        """Height and width of all images; None where they are taken as they are."""
        if self.size is None:
            return None
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @property
    def pads(self) -> bool:
        """Whether the background may be seen beside an image."""
        return self.size is not None and self.resize in ("longer", "none")

    def said(self) -> dict[str, Any]:
        """What is not as by default, as JSON: two spellings of a size are one."""
        size = {} if self.frame is None else {"size": list(self.frame)}
        return self.model_dump(mode="json", exclude_defaults=True) | size

    def written(self) -> dict[str, Any]:
        """How they become pixels, and the background always: as keys and cards had it when there was nothing else."""
        said = self.said()
        said.pop("keep", None)
        return {"background": self.background} | said

    @model_validator(mode="after")
    def _gives_one_size(self) -> Image:
        if self.size is None and (self.resize, self.crop) != ("shorter", "center"):
            raise ValueError("resize and crop say how images come to one size: give `size` as well, as in `size: 224`")
        if self.crop == "none" and self.resize == "shorter":
            raise ValueError(
                "with `resize: shorter` and `crop: none` images of other proportions keep sizes of their own: "
                "leave out `crop`, or take `resize: longer` or `resize: stretch`"
            )
        if self.crop == "none" and self.resize == "none":
            raise ValueError(
                "with `resize: none` and `crop: none` larger images keep sizes of their own: leave out one of them"
            )
        return self


class NoAugmentation(Spec):
    """Rows are used as they are."""

    kind: AugmentationKind[Literal["none"]] = "none"


class Shift(Spec):
    """Each view moves the image by a random whole number of pixels each way, filled with zeros."""

    kind: AugmentationKind[Literal["shift"]] = "shift"
    pixels: Count = 1
    """The farthest move in each direction, in pixels."""


class PadCropFlip(Spec):
    """The paper's augmentation of CIFAR: pad with zeros, crop the old size at random, flip left to right by chance."""

    kind: AugmentationKind[Literal["pad_crop_flip"]] = "pad_crop_flip"
    pixels: Count = 4
    """Zeros added on each side."""
    flip: bool = True
    """Whether half of the views are mirrored."""


class RandomResizedCropFlip(Spec):
    """A random part of the image, brought back to its size by bilinear interpolation, flipped by chance."""

    kind: AugmentationKind[Literal["random_resized_crop_flip"]] = "random_resized_crop_flip"
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

    kind: AugmentationKind[Literal["token_mask"]] = "token_mask"
    share: Share = 0.15
    """The chance of each token."""


class CustomAugmentation(Factory):
    """Your own augmentation: a draw from (seed, row, view), and how it is applied to a batch.

    The factory returns an object with `words`, `draw(words, input_shape)` and `apply(batch, params)`, as
    docs/howto/data.md shows.
    """

    kind: AugmentationKind[Literal["custom"]] = "custom"
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(**arguments)."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""


Augmentation = Annotated[
    NoAugmentation | Shift | PadCropFlip | RandomResizedCropFlip | TokenMask | CustomAugmentation,
    Discriminator("kind"),
]


class CustomMetric(Factory):
    """Your own metric, by which the best epoch is picked: the higher the better.

    It is called as function(logits, labels, **arguments), as docs/howto/models.md shows.
    """

    factory: str = Field(pattern=FACTORY)
    """`module:function`; it returns a number."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""


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


class DataSpec(Spec):
    """The rows that teacher and students see, how they are split and how augmented. One for the whole recipe."""

    train: Source | None = None
    """The rows to train on; validation and test rows are split off where they have no source of their own. Left out
    where no train row has a label: then `unlabelled` names them all."""
    unlabelled: Unlabelled | None = None
    """Train rows without labels, which students learn from the teacher alone: a source, whose labels are not read; or
    `rest`, the train rows that `subset` leaves out; or `missing`, the rows of the train source whose label is null, NaN
    or -1."""
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
    """What a label is: one of some classes, a number, or the next token of a text."""
    metric: Metric | CustomMetric | None = None
    """What picks the best epoch and heads the tables; none takes accuracy, Pearson's correlation for regression, or the
    cross-entropy of a token for language models. Or a function of your own."""
    text: Text | None = None
    """How text becomes tokens; needed where inputs are text."""
    packing: Packing = Packing()
    """How documents share the blocks of a language model."""
    scored: Scored = "all"
    """Which tokens a language model learns to predict: all, or those that the assistant of a chat has written."""
    image: Image = Image()
    """How encoded images become pixels."""
    views: Count = 1
    """How many augmented views of each train row the teacher is cached on; epoch e trains on view e mod views."""
    augmentation: Augmentation = NoAugmentation()
    """How a view is drawn from a row; a pure function of (seed, row, view)."""
    window: Count | None = None
    """Rows that are shuffled as one window, for data larger than a node; none shuffles all rows together, unless the
    nodes' caches have no room for what that takes."""
    normalize: Normalize | None = None
    """Applied inside the models; none leaves inputs between 0 and 1 (uint8) or as they are (float)."""

    @property
    def primary_metric(self) -> Metric:
        """The metric that picks the best epoch: the higher the better, but for those of LOWEST_IS_BEST."""
        if isinstance(self.metric, CustomMetric):
            return "custom"
        return self.metric or METRICS[self.task][0]

    @property
    def own_metric(self) -> CustomMetric | None:
        """The function that measures it, where it is one of the user's own."""
        return self.metric if isinstance(self.metric, CustomMetric) else None

    @property
    def metric_name(self) -> str:
        """What the primary metric is called: one of the user's own as the recipe names it, `module:function`."""
        return self.primary_metric if self.own_metric is None else self.own_metric.factory

    @property
    def sources(self) -> dict[str, Source]:
        """The sources by what they give: those with labels first, the train rows before the others."""
        given = {name: getattr(self, name) for name in ("train", "validation", "test", "unlabelled")}
        return {name: source for name, source in given.items() if not isinstance(source, float | str | None)}

    @model_validator(mode="after")
    def _has_train_rows(self) -> DataSpec:
        if self.train is None and not isinstance(self.unlabelled, Spec):
            missing = InitErrorDetails(type="missing", loc=("train",), input=self)
            raise ValidationError.from_exception_data("DataSpec", [missing])
        if self.train is None:
            shares = [name for name in ("validation", "test") if isinstance(getattr(self, name), float)]
            if shares:
                raise ValueError(
                    f"without data.train there are no rows with labels to take {' and '.join(shares)} from: "
                    "give them sources of their own"
                )
            if self.subset is not None or self.stratify:
                raise ValueError("subset and stratify are for rows with labels, and data.train is left out")
        return self

    @model_validator(mode="after")
    def _fits_its_task(self) -> DataSpec:
        changed = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        if (why := why_not_a_language_model(self, changed)) is not None:
            raise why
        return self

    @model_validator(mode="after")
    def _rest_is_left(self) -> DataSpec:
        if self.unlabelled == "rest" and self.subset is None:
            raise ValueError("unlabelled: rest are the train rows that `subset` leaves out: set subset as well")
        return self

    @model_validator(mode="after")
    def _labels_where_they_are_read(self) -> DataSpec:
        for name, source in self.sources.items():
            if name != "unlabelled" and isinstance(source, Idx) and source.labels is None:
                raise ValueError(f"{name}.labels is missing: only the rows of `unlabelled` need none")
        return self

    @property
    def asks_for_encoded(self) -> bool:
        """Whether encoded images are to be kept so in prepared rows, where they come encoded."""
        whole = self.image.size is not None and isinstance(self.augmentation, RandomResizedCropFlip)
        return self.image.keep == "encoded" or (self.image.keep == "auto" and whole)

    @model_validator(mode="after")
    def _metric_fits(self) -> DataSpec:
        if self.own_metric is None and self.primary_metric not in METRICS[self.task]:
            raise ValueError(
                f"metric {self.metric} is not one of {self.task}, which has {', '.join(METRICS[self.task])}"
            )
        return self

    @model_validator(mode="after")
    def _fits_text(self) -> DataSpec:
        if self.text is None and isinstance(self.augmentation, TokenMask):
            raise ValueError("the augmentation token_mask is for text; say how text becomes tokens with data.text")
        if self.text is not None and self.normalize is not None:
            raise ValueError("normalize is for images and numbers; leave it out where data.text is given")
        if self.text is not None and self.image != Image():
            raise ValueError("image is for encoded images; leave it out where data.text is given")
        return self

    @model_validator(mode="after")
    def _shape_is_that_of_images(self) -> DataSpec:
        known = (self.image.channels, *(self.image.frame or (None, None)))
        for name, source in self.sources.items():
            shape = getattr(source, "shape", None)
            if shape is None or known == (None, None, None):
                continue
            if len(shape) != 3 or any(ours not in (None, said) for ours, said in zip(known, shape, strict=True)):
                raise ValueError(f"{name}.shape is {shape}, and image says something else: leave out `shape`")
        return self

    @model_validator(mode="after")
    def _numbers_have_no_classes(self) -> DataSpec:
        given = {name: getattr(getattr(self, name), "classes", None) for name in ("train", "validation", "test")}
        if self.task == "regression" and any(given.values()):
            names = " and ".join(name for name, classes in given.items() if classes)
            raise ValueError(f"{names} says how many classes there are, but task is regression: leave `classes` out")
        return self

    @model_validator(mode="after")
    def _numbers_are_not_stratified(self) -> DataSpec:
        if self.task == "regression" and self.stratify:
            raise ValueError("stratify draws rows class by class, but task is regression: leave it out")
        return self

    @model_validator(mode="after")
    def _leaves_train_rows(self) -> DataSpec:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation and test take {' + '.join(map(str, shares))} of the rows; train needs some")
        return self

    @model_validator(mode="after")
    def _views_differ(self) -> DataSpec:
        if self.views > 1 and isinstance(self.augmentation, NoAugmentation):
            raise ValueError(f"views is {self.views} without an augmentation: all views of a row would be the same")
        return self
