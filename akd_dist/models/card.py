"""The card of a model, `model.json`: what was built, and for which inputs; everything needed to build it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from akd_dist import recipe
from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import canonical_json, mistakes, parse_json, sha256
from akd_dist.base.formatting import some_of
from akd_dist.data.factories import source_sha256
from akd_dist.data.framing import line_for
from akd_dist.data.rows import Rows
from akd_dist.data.text import Tokens
from akd_dist.models import architectures, huggingface, huggingface_config, huggingface_lm
from akd_dist.models.language import Blocks

FORMAT_VERSION = 2
"""Of model.json: a checksum of its own since 2."""
MOST_INPUT = 2**33
"""The most numbers that one input may have; within that, memory decides."""
WEIGHTS = huggingface_config.WEIGHTS
CARD = "model.json"
Shape = tuple[int, ...]
SIGNATURE = "(input_shape, classes, ...) -> torch.nn.Module"
"""Of the function that a model of kind `custom` names."""
# Fields that say where a model's first weights came from. They are no part of what the model is: what the weights
# became is known by their sha256.
_OF_FOLDER = ("path", "name", "pretrained")
_ORIGIN = {"huggingface": _OF_FOLDER, "huggingface_lm": _OF_FOLDER, "timm": ("pretrained",)}


class ModelCard(BaseModel):
    """What a model folder says of itself: everything needed to build the module again. The content of `model.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    """Version of these fields; the file counts on, as it has a checksum besides."""
    model: recipe.Model
    """The spec, as the recipe has it."""
    input_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=16)]
    """Shape of one raw input."""
    input_dtype: Literal["uint8", "float32", "int32"]
    """Dtype of raw inputs; uint8 is divided by 255 inside the module, int32 are ids of tokens."""
    classes: recipe.Classes
    """Number of logits: 1 for regression."""
    task: recipe.Task = "classification"
    """What the logits are: scores of classes, or a value."""
    class_names: tuple[str, ...] | None = None
    """The names of classes 0, 1, ..., where the data has names."""
    tokens: Tokens | None = None
    """What ids mean, where inputs are text."""
    blocks: Blocks | None = None
    """What a language model takes; None of all other models."""
    normalize: recipe.Normalize | None = None
    """Mean and standard deviation taken out inside the module."""
    image: recipe.Image = recipe.Image()
    """How encoded images become raw inputs."""
    source_sha256: str | None = None
    """sha256 of the file of a custom model's factory."""
    weights_sha256: str | None = None
    """sha256 of `model.safetensors`; None before there are weights."""

    @field_validator("input_shape")
    @classmethod
    def _can_be_held(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(shape) > MOST_INPUT:
            raise ValueError(f"one input of shape {list(shape)} has more than {MOST_INPUT:,} numbers")
        return shape

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> ModelCard:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"class_names has {len(self.class_names):,} names for {self.classes:,} classes")
        return self

    @model_validator(mode="after")
    def _blocks_for_language_models(self) -> ModelCard:
        language = isinstance(self.model, recipe.LanguageModel)
        if not (language == (self.blocks is not None) == (self.task == "language_model")):
            raise ValueError(f"{self.model.kind} with task {self.task} and {'' if self.blocks else 'no '}blocks")
        if self.blocks is not None:
            here, theirs = (self.input_shape, self.input_dtype, self.classes), (self.blocks.shape, "int32")
            if here != (*theirs, self.blocks.vocabulary):
                raise ValueError(f"inputs {list(self.input_shape)} of {self.classes} tokens, and {self.blocks}")
        return self

    @classmethod
    def of_blocks(cls, model: recipe.LanguageModel, blocks: Blocks) -> ModelCard:
        """The card of a language model for blocks.

        Raises:
            RefusedError: the model is not for such blocks, its configuration cannot be read, or an optional library is
                not installed.
            MachineError: its configuration is on the hub, which cannot be reached.
        """
        if isinstance(model, recipe.HuggingFaceLm):
            model = huggingface_lm.resolve(model, blocks)
        return _checked(**of_language(model, blocks))

    @classmethod
    def of(
        cls,
        model: recipe.Model,
        rows: Rows,
        normalize: recipe.Normalize | None,
        image: recipe.Image = recipe.Image(),  # noqa: B008  # frozen
    ) -> ModelCard:
        """The card of a model for the inputs and classes of a dataset.

        Raises:
            RefusedError: the model is not for such inputs, its configuration or its factory cannot be read, or an
                optional library is not installed.
            MachineError: its configuration is on the hub, which cannot be reached.
        """
        if rows.task == "language_model":
            return cls.of_blocks(_language_model(model), blocks_of(rows))
        architectures.refuse_inputs(model, rows.tokens, rows.shape)
        dtype: Any = rows.inputs.dtype.name
        card = _checked(
            model=model,
            input_shape=rows.shape,
            input_dtype=dtype,
            classes=rows.classes,
            task=rows.task,
            class_names=rows.class_names,
            tokens=rows.tokens,
            normalize=normalize,
            image=image.model_copy(update={"keep": "auto"}),  # how rows were kept is no matter of the model
        )
        if isinstance(model, recipe.HuggingFaceModel):
            return card.model_copy(update={"model": huggingface_config.resolve(model, interface_of(card))})
        if isinstance(model, recipe.Custom):
            return card.model_copy(update={"source_sha256": source_sha256(model, SIGNATURE)})
        return card

    @model_serializer(mode="wrap")
    def _as_before(self, document: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Cards and manifests of before knew no `image` and no `blocks`: at the default these are left out.

        So they keep their bytes, and so do those that say no more of them than they could then.
        """
        said: dict[str, Any] = document(self)
        if "image" in said:
            said["image"] = self.image.written()
        defaults = {"image": self.image == recipe.Image(), "blocks": self.blocks is None}
        return {name: value for name, value in said.items() if not defaults.get(name)}

    @property
    def fingerprint(self) -> str:
        """sha256 over the card with its weights: changes with one bit of a weight, a layer or the preprocessing.

        Where pretrained weights came from is left out; so are fields of the card, but not of the model's spec, that
        hold their default, so that a card without a field that is added later keeps its fingerprint.
        """
        document = self.model_dump(mode="json", exclude={"model"}, exclude_defaults=True)
        model = self.model.model_dump(mode="json", exclude=set(_ORIGIN.get(self.model.kind, ())))
        return sha256(canonical_json(document | {"format": self.format, "model": model}))

    def check_rows(self, rows: Rows, what: str) -> None:
        """Refuse to use this model on rows it was not made for. Shorter texts than it was made for are fine.

        Raises:
            RefusedError: task, input shape, dtype, tokens, classes or their names differ; names both sides.
        """
        if rows.task == "language_model":
            self.on_blocks(blocks_of(rows), what)
            return
        ours = _in_words(self.input_dtype, self.input_shape, self.classes, self.task, self.tokens)
        shape = self.input_shape if self._takes_shorter(rows.shape) else rows.shape
        theirs = _in_words(rows.inputs.dtype, shape, rows.classes, rows.task, rows.tokens)
        if ours != theirs:
            raise RefusedError(
                f"{what} was made for other data",
                got=ours,
                expected=f"{_in_words(rows.inputs.dtype, rows.shape, rows.classes, rows.task, rows.tokens)}, "
                "as the dataset has them",
                next="choose a model of the same inputs and classes, or the dataset it was trained on"
                + self._other_size(rows),
            )
        names, wanted = self.class_names or (), rows.class_names or ()
        if names and wanted and names != wanted:
            first = next((at for at, pair in enumerate(zip(names, wanted, strict=False)) if pair[0] != pair[1]), 0)
            raise RefusedError(
                f"{what} was made for other classes, or for another order of them",
                got=f"classes {some_of(names, first)}",
                expected=f"classes {some_of(wanted, first)}, as the dataset has them",
                next="choose a model of the same classes, or give the labels as numbers in the model's order",
            )

    def on_blocks(self, blocks: Blocks, what: str, *, compared: bool = False) -> ModelCard:
        """The card of the same language model as it is run on blocks of a dataset: of their length and attention.

        Its own vocabulary stays: an output layer may have more rows than the data has ids.

        Args:
            what: names the model, at the beginning of a message.
            compared: whether somebody who has both tokenizers has seen that all ids in use mean the same to both.

        Raises:
            RefusedError: it is no language model, or it was made for another tokenizer or shorter blocks.
        """
        ours = self.blocks
        if ours is None:
            raise RefusedError(
                f"{what} is no language model",
                got=f"the model {self.model.label}, for {self.task}",
                expected=f"a model of {blocks.in_words()}",
                next="choose a model of kind causal_lm or huggingface_lm",
            )
        other = ours.tokenizer and blocks.tokenizer and ours.tokenizer != blocks.tokenizer and not compared
        if ours.vocabulary < blocks.vocabulary or other:
            raise RefusedError(
                f"{what} was made for another tokenizer",
                got=ours.in_words(),
                expected=f"{blocks.in_words()}, as the dataset has them",
                next="choose a model of the same tokenizer, or its tokenizer as data.text",
            )
        if ours.length < blocks.length:
            raise RefusedError(
                f"{what} was made for shorter blocks",
                got=f"blocks of {ours.length:,} tokens",
                expected=f"{blocks.length:,} tokens, as the dataset has them",
                next=f"set data.text.length to {ours.length} or less",
            )
        run = ours.model_copy(update={"length": blocks.length, "attention": blocks.attention})
        return self.model_copy(update={"blocks": run, "input_shape": run.shape})

    def check_image(self, image: recipe.Image, what: str) -> None:
        """Refuse pictures that become inputs in another way than the model's: it would see others than it was made for.

        A model that says nothing of a size was made for pictures that had it, and may be shown some that come to it.

        Raises:
            RefusedError: background, size or how pictures come to it differ; names both sides.
        """
        ours, theirs = self._way(self.image, image), self._way(image, self.image)
        if self.image != recipe.Image() and ours != theirs:
            raise RefusedError(
                f"{what} was made for pictures that become inputs in another way",
                got=f"data.image: {flow(theirs)}",
                expected=f"{flow(ours)}, as its {CARD} says",
                next=f"put this line under `data:`\n  image: {flow(ours)}\n"
                "  or name the pictures themselves as the data: they become inputs as the model says",
            )

    @staticmethod
    def _way(image: recipe.Image, other: recipe.Image) -> dict[str, Any]:
        """What makes inputs of pictures, as far as both say it: where one has no size, all pictures have it already."""
        said = image.written()
        said.pop("channels", None)  # the shape of inputs has them
        return said if image.frame and other.frame else {"background": said["background"]}

    def _other_size(self, rows: Rows) -> str:
        """How pictures of another size than the model's come to it."""
        (_, *ours), (_, *theirs) = self.input_shape, rows.shape
        if not len(ours) == len(theirs) == 2 or ours == theirs or self.input_dtype != rows.inputs.dtype:
            return ""
        return f"; encoded pictures come to its size by a recipe that has {line_for(ours)}"

    def _takes_shorter(self, shape: tuple[int, ...]) -> bool:
        masked = isinstance(self.model, recipe.TextTransformer | recipe.HuggingFaceModel)
        # These models mask padding, so a text is the same to them in a shorter frame; others have a weight for each
        # place.
        return masked and shape[:-1] == self.input_shape[:-1] and shape[-1:] <= self.input_shape[-1:]


def _language_model(model: recipe.Model) -> recipe.LanguageModel:
    if not isinstance(model, recipe.LanguageModel):
        raise RefusedError(
            f"the model {model.label} is no language model",
            got=f"kind {model.kind} for a data.task: language_model",
            expected="kind causal_lm or huggingface_lm",
            next="choose such a model",
        )
    return model


def blocks_of(rows: Rows) -> Blocks:
    """The blocks that the rows of a language model are."""
    tokens: Any = rows.tokens
    return Blocks(
        length=rows.shape[-1],
        vocabulary=rows.classes,
        tokenizer=tokens.tokenizer or "",
        attention=tokens.attention or "document",
        end_of_text=tokens.end_of_text,
    )


def of_language(model: recipe.LanguageModel, blocks: Blocks) -> dict[str, Any]:
    """The fields of a language model's card."""
    return {
        "model": model,
        "input_shape": blocks.shape,
        "input_dtype": "int32",
        "classes": blocks.vocabulary,
        "task": "language_model",
        "blocks": blocks,
    }


def _checked(**fields: Any) -> ModelCard:
    """A card of what was found elsewhere: in rows, in a config.json."""
    try:
        return ModelCard(**fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise RefusedError(
            f"there is no model {fields['model'].label} for such inputs and classes", got=problems, expected="less"
        ) from error


def _in_words(dtype: object, shape: tuple[int, ...], classes: int, task: str, tokens: Tokens | None) -> str:
    what = "1 value (regression)" if task == "regression" else f"{classes} classes"
    ids = "" if tokens is None else f", {tokens.vocabulary} tokens with padding {tokens.padding}"
    return f"inputs {dtype} {list(shape)}{ids}, {what}"


def flow(said: Mapping[str, Any]) -> str:
    """Keys and values as a line of YAML."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in said.items()) + "}"


def interface_of(card: ModelCard) -> huggingface_config.Interface:
    """What a model of transformers must take and give."""
    assert card.tokens is not None
    return huggingface_config.Interface(card.input_shape, card.classes, card.task, card.tokens)


def card_bytes(card: ModelCard) -> bytes:
    """The content of model.json: the card, and the checksum of what the card says."""
    fields = card.model_dump(mode="json") | {"format": FORMAT_VERSION}
    return json.dumps(fields | {"sha256": sha256(canonical_json(fields))}, indent=1).encode() + b"\n"


def placeless(model: recipe.Model) -> recipe.Model:
    """A spec without folders of this machine: a card says of a local folder its name alone."""
    if isinstance(model, recipe.HuggingFaceModel | recipe.HuggingFaceLm) and model.path is not None:
        return model.model_copy(update={"path": Path(model.path).name})
    return model


def card_of_huggingface(folder: Path, document: bytes, weights: bytes) -> ModelCard:
    """The card of a fine-tuned model that was saved with its tokenizer: a function of these files' content alone."""
    spec, asked, names = huggingface.describe_folder(folder, document)
    return _checked(
        model=spec,
        input_shape=asked.input_shape,
        input_dtype="int32",
        classes=asked.classes,
        task=asked.task,
        class_names=names,
        tokens=asked.tokens,
        weights_sha256=sha256(weights),
    )


def parse_card(document: bytes, uri: str | Path) -> ModelCard:
    """The card that a model.json holds.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        fields = parse_json(document)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        said, version = fields.pop("sha256", None), fields.get("format", 1)
        if said is not None and said != sha256(canonical_json(fields)):
            raise ValueError("it has changed since it was written: its sha256 is another")
        if type(version) is int and version > FORMAT_VERSION:
            raise RefusedError(
                f"{uri}/{CARD} was written by a newer akd-dist",
                got=f"format {version}",
                expected=f"format {FORMAT_VERSION}",
                next="upgrade akd-dist",
            )
        if (said is not None) != (version == FORMAT_VERSION):
            raise ValueError(f"format {version} {'without' if said is None else 'with'} a sha256")
        return ModelCard.model_validate(fields | {"format": 1} if version == FORMAT_VERSION else fields)
    except ValueError as error:  # of json and of pydantic
        raise DamagedError(
            f"the model card {uri}/{CARD} cannot be read",
            got=mistakes(error),
            expected=f"a {CARD} as akd-dist writes it",
            next="copy the folder again, or train the model again",
        ) from error
