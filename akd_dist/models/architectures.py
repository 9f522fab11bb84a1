"""The built-in architectures: a spec, the shape of one input and the number of logits -> a `torch.nn.Module`.

Each takes preprocessed inputs, float [n, *shape] or ids of tokens, and gives logits [n, classes]. Global averages are
plain means, because torch's adaptive pooling has no deterministic gradient on a GPU.
"""

import importlib
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.text import Tokens

Images = recipe.Cnn | recipe.ResNet | recipe.PlainCnn | recipe.Timm

Shape = tuple[int, ...]


def mlp(spec: recipe.Mlp, input_shape: Shape, classes: int) -> nn.Module:
    """Linear layers on the flattened input, ReLU and dropout between them."""
    hidden = [spec.hidden] if isinstance(spec.hidden, int) else spec.hidden
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(spec: recipe.Cnn, input_shape: Shape, classes: int) -> nn.Module:
    """Stages of 3 x 3 convolution, ReLU and 2 x 2 maximum, each of twice the channels; then one linear layer.

    The last feature map is flattened, not averaged: on shifted 8 x 8 digits, width 32 and depth 2, that is worth 5
    points of test accuracy after 20 epochs of SGD (93 % against 98 %, measured).

    Raises:
        RefusedError: inputs are no images, or too small for so many halvings.
    """
    channels, height, width = _image(spec, input_shape, 2**spec.depth)
    layers: list[nn.Module] = []
    for stage in range(spec.depth):
        layers += [nn.Conv2d(channels, spec.width * 2**stage, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = spec.width * 2**stage, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, classes))


class ResNet(nn.Module):
    """The residual network of He et al. for CIFAR (2016, arXiv 1512.03385, section 4.2), 6n + 2 layers.

    A 3 x 3 stem, three thirds of n basic blocks with 1, 2 and 4 times the stem's channels on images halved between
    them, the mean over pixels, one linear layer. Shortcuts are the paper's option A, which has no parameters: 269,722
    of them in ResNet-20 of 10 classes. (The code of the distillation papers has 1 x 1 convolutions there, option B:
    272,474.) Convolutions start as in He et al. 2015, normal of variance 2 / fan_out; the last layer as torch has it.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _conv3x3(channels, width)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        for third in range(3):
            for number in range((depth - 2) // 6):
                first = third > 0 and number == 0
                before = width * 2 ** (third - first)
                blocks.append(BasicBlock(before, width * 2**third, stride=2 if first else 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of images [n, channels, height, width]."""
        if images.device.type == "cpu":  # a fifth faster there (measured), and as reproducible
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.blocks(F.relu(self.norm(self.stem(images))))
        logits: torch.Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which takes every other pixel and adds channels of zeros (option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = _conv3x3(before, after, stride), nn.BatchNorm2d(after)
        self.second, self.norm2 = _conv3x3(after, after), nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Feature maps [n, after, height / stride, width / stride] of feature maps [n, before, height, width]."""
        shortcut = images
        if self.stride > 1:
            shortcut = F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        residual = self.norm2(self.second(F.relu(self.norm1(self.first(images)))))
        return F.relu(residual + shortcut)


def resnet(spec: recipe.ResNet, input_shape: Shape, classes: int) -> nn.Module:
    """See `ResNet`.

    Raises:
        RefusedError: inputs are no images of 8 pixels a side or more.
    """
    channels, _, _ = _image(spec, input_shape, 8)
    return ResNet(spec.depth, spec.width, channels, classes)


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


# ---- plain networks

# Numbers are channels of a 3 x 3 convolution with BatchNorm and ReLU, "max" halves the image, ("linear", n) is a hidden
# layer with ReLU. What comes last, a linear layer to the classes, is left out.
_MAX = "max"
_Layer = int | str | tuple[str, int]
_PLAIN_10: dict[int, list[_Layer]] = {
    2: [16, _MAX, 16, _MAX],
    4: [16, 16, _MAX, 32, 32, _MAX],
    6: [16, 16, _MAX, 32, 32, _MAX, 64, 64, _MAX],
    8: [16, 16, _MAX, 32, 32, _MAX, 64, 64, _MAX, 128, 128, _MAX, ("linear", 64)],
    10: [32, 32, _MAX, 64, 64, _MAX, 128, 128, _MAX, 256, 256, 256, 256, _MAX, ("linear", 128)],
}
_PLAIN_100: dict[int, list[_Layer]] = {
    2: [32, _MAX, 32, _MAX],
    4: [32, 32, _MAX, 64, 64, _MAX],
    6: [32, 32, _MAX, 64, 64, _MAX, 128, 128],
    8: [32, 32, _MAX, 64, 64, _MAX, 128, 128, _MAX, 256, 256, _MAX, ("linear", 64)],
    10: [32, 32, _MAX, 64, 64, _MAX, 128, 128, _MAX, 256, 256, 256, 256, _MAX, ("linear", 512)],
}


def plain_cnn(spec: recipe.PlainCnn, input_shape: Shape, classes: int) -> nn.Module:
    """The plain networks of TAKD (Mirzadeh et al., AAAI 2020, arXiv 1902.03393) and of the Annealing-KD paper.

    The layers are those of `plain_cnn_cifar.py` in the authors' code (imirzadeh/Teacher-Assistant-Knowledge-
    Distillation, the same file in huawei-noah/Efficient-NLP): one list for CIFAR-10 and a wider one for CIFAR-100. Up
    to 10 classes take the first here, more take the second. As there, convolutions keep the bias that BatchNorm makes
    idle, and all weights start as torch has it.

    Raises:
        RefusedError: inputs are no images, or too small for so many halvings.
    """
    plan = (_PLAIN_10 if classes <= 10 else _PLAIN_100)[spec.layers]
    channels, height, width = _image(spec, input_shape, 2 ** plan.count(_MAX))
    layers: list[nn.Module] = []
    size = 0
    for layer in plan:
        if isinstance(layer, int):
            layers += [nn.Conv2d(channels, layer, 3, padding=1), nn.BatchNorm2d(layer), nn.ReLU()]
            channels = layer
        elif isinstance(layer, str):
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers += [nn.Flatten(), nn.Linear(channels * height * width, layer[1]), nn.ReLU()]
            size = layer[1]
    if not size:
        layers.append(nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(size or channels * height * width, classes))


class TextTransformer(nn.Module):
    """A transformer encoder over ids of tokens, with learned positions, normalisation before each part of a block.

    Padding is left out of attention and of the mean. The mean over real tokens is taken after the linear layer, which
    is the same number as before it; but so every product has a row for each token, and a text gets the same bits alone
    and in a batch of texts. A row of nothing but padding counts its first token as real.

    Embeddings start normal with standard deviation 0.02, as in BERT; linear layers as torch has it.
    """

    def __init__(self, spec: recipe.TextTransformer, tokens: Tokens, input_shape: Shape, classes: int) -> None:
        super().__init__()
        self.padding = tokens.padding
        self.tokens = nn.Embedding(tokens.vocabulary, spec.width)
        self.positions = nn.Parameter(torch.empty(input_shape[-1], spec.width))
        self.types = nn.Embedding(2, spec.width) if len(input_shape) == 2 else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, classes)
        for table in (self.tokens.weight, self.positions, *([self.types.weight] if self.types else [])):
            nn.init.normal_(table, std=0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of ids int32 [n, length], or [n, 2, length] with token types in the second row."""
        ids = inputs if self.types is None else inputs[:, 0]
        real = ids != self.padding
        # Attention over nothing at all would be NaN.
        real[:, 0] = True
        embedded = self.tokens(ids) + self.positions[: ids.shape[1]]
        if self.types is not None:
            embedded = embedded + self.types(inputs[:, 1])
        states = self.dropout(embedded)
        for block in self.blocks:
            states = block(states, real)
        weights = real / real.sum(dim=1, keepdim=True)
        scores: torch.Tensor = self.head(self.norm(states))
        logits: torch.Tensor = (scores * weights.to(scores.dtype).unsqueeze(2)).sum(dim=1)
        return logits


class EncoderBlock(nn.Module):
    """Self-attention, then a layer four times as wide with GELU; each normalised before and added to what comes in."""

    def __init__(self, spec: recipe.TextTransformer) -> None:
        super().__init__()
        self.heads, self.share = spec.heads, spec.dropout
        self.norm1, self.norm2 = nn.LayerNorm(spec.width), nn.LayerNorm(spec.width)
        self.mix, self.out = nn.Linear(spec.width, 3 * spec.width), nn.Linear(spec.width, spec.width)
        self.widen, self.narrow = nn.Linear(spec.width, 4 * spec.width), nn.Linear(4 * spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """States [n, length, width] of states [n, length, width], attending where `real` bool [n, length]."""
        states = states + self.dropout(self._attend(self.norm1(states), real))
        widened = self.dropout(F.gelu(self.widen(self.norm2(states))))
        after: torch.Tensor = states + self.dropout(self.narrow(widened))
        return after

    def _attend(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        n, length, width = states.shape
        mixed = self.mix(states).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        share = self.share if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, real[:, None, None, :], dropout_p=share)
        mixed_heads: torch.Tensor = self.out(attended.transpose(1, 2).reshape(n, length, width))
        return mixed_heads


def text_transformer(spec: recipe.TextTransformer, tokens: Tokens, input_shape: Shape, classes: int) -> nn.Module:
    """See `TextTransformer`."""
    return TextTransformer(spec, tokens, input_shape, classes)


def timm_model(spec: recipe.Timm, input_shape: Shape, classes: int, *, pretrained: bool) -> nn.Module:
    """A model of the timm library, for so many channels and classes; a new last layer where its own does not fit.

    Args:
        pretrained: load its published weights, from the hub's safetensors only.

    Raises:
        RefusedError: timm is not installed, has no such model, or no safetensors to start from; or the model does not
            take these arguments.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:  # also where torchvision is missing, which timm needs
        raise RefusedError(
            "this recipe needs the library timm",
            got=error,
            expected="akd-dist with its extra `timm`",
            next="pip install 'akd-dist[timm]'",
        ) from error
    channels, _, _ = _image(spec, input_shape, 1)
    # A prefix such as hf-hub: would read the architecture from the hub each time.
    if ":" in spec.name or not timm.is_model(spec.name):
        raise RefusedError(
            f"timm has no model {spec.name}",
            got=f"timm {timm.__version__}",
            expected="a name that timm.list_models() lists",
            next="correct `name`, or install a timm that has it",
        )
    check_numbers(spec.arguments, f"arguments of the model {spec.label}")
    options = dict(spec.arguments)
    if pretrained:
        published = timm.get_pretrained_cfg(spec.name)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": _safetensors_of(spec.name, published)}}
    try:
        module: nn.Module = timm.create_model(spec.name, num_classes=classes, in_chans=channels, **options)
    except Exception as error:
        raise RefusedError(
            f"timm cannot make {spec.name}",
            got=f"{type(error).__name__}: {error}",
            expected=f"a model of {channels} channels and {classes} classes",
            next="correct `arguments` in the recipe",
        ) from error
    return module


def _safetensors_of(name: str, published: Any) -> str:
    """The local path of a model's published safetensors: timm itself would fall back to pickles."""
    import huggingface_hub

    try:
        if published is None or not published.hf_hub_id or published.custom_load:
            raise FileNotFoundError("timm lists no weights of it on the hub")
        return str(huggingface_hub.hf_hub_download(published.hf_hub_id, "model.safetensors"))
    except Exception as error:
        raise RefusedError(
            f"the published weights of {name} cannot be had",
            got=f"{type(error).__name__}: {error}",
            expected="a model.safetensors on the hub, or in its cache on this machine",
            next="check the connection, or set pretrained: false",
        ) from error


# ---- refusals

# A library builds as many layers as a configuration claims, one by one, and a foreign one may claim any number.
MOST_LAYERS = 2_000
_COUNTS = re.compile(r"layer|depth|block|stage|group|expert|repeat")


def check_numbers(settings: Mapping[str, Any], what: str) -> None:
    """Refuse numbers for a library's model that no model has, before anything is made of them.

    Args:
        settings: as a config.json or a recipe has them, at any depth.
        what: names them, for messages.

    Raises:
        RefusedError: names the first key.
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_numbers(value, what)
        most = MOST_LAYERS if _COUNTS.search(key) else 2**31 - 1
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise RefusedError(
                    f"{what} have a number that no model has",
                    got=f"{key}: {number}",
                    expected=f"at most {most:,}",
                    next=f"correct {key}",
                )


def refuse_inputs(spec: recipe.Model, tokens: Tokens | None, input_shape: Shape) -> None:
    """Refuse a model of text on other inputs, and a model of numbers on text.

    Raises:
        RefusedError: the kind of model does not take this kind of inputs.
    """
    if isinstance(spec, recipe.LanguageModel):
        raise RefusedError(
            f"the model {spec.label} continues text, and does not classify it",
            got=f"kind {spec.kind} for rows with labels",
            expected="blocks of a data.task: language_model",
            next="choose kind: text_transformer or huggingface, or data.task: language_model",
        )
    if isinstance(spec, recipe.Custom):
        return
    for_text = isinstance(spec, recipe.TextTransformer | recipe.HuggingFaceModel)
    if for_text == (tokens is not None) and input_shape:
        return
    theirs = "ids of tokens" if tokens is not None else "images or numbers" if input_shape else "single numbers"
    advice = "data.text says how text becomes tokens" if for_text else "for text, choose kind: text_transformer"
    raise RefusedError(
        f"the model {spec.label} does not fit the inputs",
        got=f"{theirs} of shape {list(input_shape)}",
        expected="ids of tokens" if for_text else "images or numbers",
        next=f"choose a model for {'images or numbers' if for_text else 'text'}; {advice}",
    )


def _image(spec: Images, input_shape: Shape, least: int) -> tuple[int, int, int]:
    """Channels, height and width of images that are large enough for a model."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise RefusedError(
            f"the model {spec.label} does not fit the inputs",
            got=f"inputs of shape {list(input_shape)}",
            expected=f"images [channels, height, width] of at least {least} pixels a side",
            next="choose fewer layers, choose kind: mlp, or give data.train.shape",
        )
    channels, height, width = input_shape
    return channels, height, width
