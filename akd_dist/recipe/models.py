"""The models that a recipe may name, one class a kind."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from akd_dist.recipe.base import FACTORY, Factory, Layers, Name, Spec, Width, label_of, label_of_call, one_or_several

ModelKind = Annotated[Name, Field(description="Which kind of model this is.")]


class Mlp(Spec):
    """A multilayer perceptron on the flattened input, with ReLU between layers."""

    kind: ModelKind[Literal["mlp"]] = "mlp"
    hidden: Annotated[
        Annotated[Width, Tag("one")] | Annotated[list[Width], Field(min_length=1, max_length=2_000), Tag("several")],
        Discriminator(one_or_several),
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

    kind: ModelKind[Literal["cnn"]] = "cnn"
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

    kind: ModelKind[Literal["resnet"]] = "resnet"
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

    kind: ModelKind[Literal["plain_cnn"]] = "plain_cnn"
    layers: Literal[2, 4, 6, 8, 10]
    """Number of convolutions."""

    @property
    def label(self) -> str:
        """`plain-2`."""
        return f"plain-{self.layers}"


class TextTransformer(Spec):
    """A small transformer encoder over tokens, trained from nothing."""

    kind: ModelKind[Literal["text_transformer"]] = "text_transformer"
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


class OfTransformers(Spec):
    """What models of the Hugging Face `transformers` library have in common (extra: akd-dist[huggingface])."""

    kind: str
    path: str | None = None
    """A folder with config.json and, for pretrained models, safetensors; relative to the recipe's folder."""
    name: str | None = None
    """A model on the hub, where one can be reached."""
    pretrained: bool = True
    """Whether training starts from its weights; else from random ones. Only safetensors are read."""
    config: dict[str, JsonValue] = {}
    """Keys of its configuration that are set otherwise. A trained model's card holds the whole configuration here."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        return self

    @property
    def label(self) -> str:
        """The last part of its name or path."""
        return label_of((self.name or self.path or "").rstrip("/").rpartition("/")[2])


class HuggingFaceModel(OfTransformers):
    """Sequence classification by the Hugging Face `transformers` library (extra: akd-dist[huggingface])."""

    kind: ModelKind[Literal["huggingface"]] = "huggingface"


class CausalLm(Spec):
    """A decoder over packed blocks of tokens, trained from nothing: the layers of Llama, so that it exports as one."""

    kind: ModelKind[Literal["causal_lm"]] = "causal_lm"
    width: Width
    """Numbers that stand for a token; an even multiple of the heads."""
    depth: Layers = 4
    """Number of decoder blocks."""
    heads: Width = 4
    """Attention heads of each block."""
    key_value_heads: Width | None = None
    """Heads of keys and values, a divisor of `heads`: a smaller cache when text is generated; none takes `heads`."""
    hidden: Width | None = None
    """Units of each block's gated layer (SwiGLU); none takes 8/3 of the width, rounded up to a multiple of 64."""
    tied: bool = True
    """Whether the output layer is the table of embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of units dropped while training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> CausalLm:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} is not an even multiple of heads, {self.heads}: positions turn pairs of numbers"
            )
        if self.key_value_heads is not None and self.heads % self.key_value_heads:
            raise ValueError(f"heads, {self.heads}, is not a multiple of key_value_heads, {self.key_value_heads}")
        return self

    @property
    def units(self) -> int:
        """Units of each block's gated layer."""
        return self.hidden if self.hidden is not None else -(-8 * self.width // (3 * 64)) * 64

    @property
    def label(self) -> str:
        """`causal-256x4`: width and depth; `causal-256x4d0.1` with dropout."""
        return f"causal-{self.width}x{self.depth}" + (f"d{self.dropout:g}" if self.dropout else "")


class HuggingFaceLm(OfTransformers):
    """A causal language model of the Hugging Face `transformers` library (extra: akd-dist[huggingface])."""

    kind: ModelKind[Literal["huggingface_lm"]] = "huggingface_lm"


class Timm(Spec):
    """An image model of the `timm` library (extra: akd-dist[timm])."""

    kind: ModelKind[Literal["timm"]] = "timm"
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
        return label_of(self.name)


class Custom(Factory):
    """Your own model, built by a function in the recipe's folder or in a module that `code:` lists."""

    kind: ModelKind[Literal["custom"]] = "custom"
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(input_shape=..., classes=..., **arguments); returns a torch.nn.Module."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""

    @property
    def label(self) -> str:
        """The function's name, and its arguments as far as they are plain: `resnet-depth8`."""
        return label_of_call(self.factory, self.arguments)


LanguageModel = CausalLm | HuggingFaceLm
"""Kinds that take packed blocks of tokens and give logits of the next one."""
Model = Annotated[
    Mlp | Cnn | PlainCnn | ResNet | TextTransformer | HuggingFaceModel | CausalLm | HuggingFaceLm | Timm | Custom,
    Discriminator("kind"),
]
