"""A card -> a freshly initialised torch module on raw inputs, seen to fit the memory and to give a logit per class."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.factories import call_factory, source_sha256
from akd_dist.models import architectures, huggingface, huggingface_lm
from akd_dist.models.card import SIGNATURE, ModelCard, Shape, interface_of
from akd_dist.models.decoder import CausalDecoder
from akd_dist.models.device import free_memory
from akd_dist.models.language import LanguageModel
from akd_dist.models.outputs import EXPECTED, NoLogitsError, logits_of
from akd_dist.models.uncompiled import WithoutNumbers

CONSTANTS = frozenset({"offset", "scale"})
"""The names of a classifier's buffers that follow from its card, and never change."""


class Classifier(nn.Module):
    """Raw inputs [n, *shape] -> logits [n, classes]: preprocessing and a body, in one module.

    The constants are in the module and not in its weights: they belong to the card. Ids of tokens go to the body as
    they are.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(self, body: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.body, self.on_tokens = body, card.input_dtype == "int32"
        if self.on_tokens:
            return
        mean, std = (card.normalize.mean, card.normalize.std) if card.normalize else ([0.0], [1.0])
        unit = 255.0 if card.input_dtype == "uint8" else 1.0
        self.register_buffer("offset", _per_channel(mean, unit, card), persistent=False)
        self.register_buffer("scale", _per_channel(std, unit, card), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of raw inputs [n, *shape], in the dtype of the weights; float32 under autocast.

        Raises:
            NoLogitsError: the body returns something else, see `outputs.logits_of`.
        """
        if not self.on_tokens:
            inputs = (inputs.to(self.scale.dtype) - self.offset) / self.scale
        logits = logits_of(self.body(inputs))
        # Autocast leaves logits in half precision; losses and stores take float32.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def build(card: ModelCard, seed: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised module in training mode; the same bits from the same seed in any process.

    A card with `blocks` gives a `language.LanguageModel`, any other a `Classifier`.

    Args:
        card: what to build.
        seed: seeds the initialisation, and leaves torch's own generator alone; None draws from torch's generator.
        pretrained: start from pretrained weights where the card's model has any; only what they lack is drawn.

    Raises:
        RefusedError: the model does not fit the inputs, gives other than [n, classes], or its factory fails; pretrained
            weights are missing or of another shape; an optional library is not installed.
    """
    if seed is not None:
        # No GPU's generator is forked: weights are drawn on the CPU, and forking one would start CUDA.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(card, pretrained=pretrained)
    if card.blocks is not None:
        return build_language_model(card, pretrained=pretrained)
    module = Classifier(_body(card, pretrained), card)
    # In eval mode, in which a run leaves the statistics of batch norm as they are.
    check_output(module.eval(), card)
    return module.train()


def build_language_model(card: ModelCard, *, pretrained: bool = False) -> LanguageModel:
    """A language model as `build` gives it, drawn from torch's generator, and seen to keep documents apart.

    Raises:
        RefusedError: as `build`.
    """
    module = _body(card, pretrained)
    assert isinstance(module, LanguageModel)
    if isinstance(module, huggingface_lm.HuggingFaceDecoder):
        huggingface_lm.look_into(module.eval(), card.model.label)
    module.train()
    return module


def weights_of(module: nn.Module) -> nn.Module:
    """The part of a module that has the weights, by the names that its library gives them."""
    return module.body if isinstance(module, Classifier) else module


def check_model(card: ModelCard) -> nn.Module:
    """Build a model once, to see that it can be; in training mode.

    Raises:
        RefusedError: it does not fit memory, cannot be built, or does not give a logit per class.
    """
    check_memory(card)
    return build(card, seed=0, pretrained=True)


def check_memory(card: ModelCard) -> dict[str, Shape] | None:
    """Refuse what free memory cannot hold before it takes it, and the process with it: weights, and a run of two rows.

    Returns:
        The shapes of the weights by name; None where nothing can be known of a model before its code runs: of a user's
        own, and of those of timm that cannot be built without numbers.

    Raises:
        RefusedError: too little is free; or a built-in model, or one of transformers, cannot be built.
    """
    rows = 8 * math.prod(card.input_shape)  # two, in float32
    if isinstance(card.model, recipe.CausalLm):
        _refuse_beyond_memory(card, _decoder_bytes(card.model, card.classes), rows)  # before so many layers are made
    body = _without_numbers(card)
    if body is None:
        _refuse_beyond_memory(card, 0, rows)
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in body.state_dict().items()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in body.state_dict().values())
    _refuse_beyond_memory(card, weights, rows)
    # No layer gives more numbers at a place of an input than it has weights. Where even that much is little, no run has
    # to be tried, for which torch would import its compiler.
    most = 2 * weights * math.prod(card.input_shape)
    if 4 * most > free_memory(torch.device("cpu")):
        _refuse_beyond_memory(card, weights, rows + 2 * _largest_output(body, card))
    return shapes


def _without_numbers(card: ModelCard) -> nn.Module | None:
    """A model's body on torch's meta device, which has shapes and takes no memory."""
    if isinstance(card.model, recipe.Custom):
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), WithoutNumbers():
            return _body(card, pretrained=False)
    except Exception as error:  # of torch, where sizes are beyond its integers; of timm, where values are looked at
        if isinstance(card.model, recipe.Timm):
            return None
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(
            f"the model {card.model.label} cannot be built",
            got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            expected="sizes whose product torch can count",
            next="take a smaller one",
        ) from error


def _decoder_bytes(spec: recipe.CausalLm, vocabulary: int) -> int:
    """Bytes of a built-in language model's weights in float32, without its norms."""
    shared = (spec.key_value_heads or spec.heads) * (spec.width // spec.heads)
    layer = 2 * spec.width**2 + 2 * spec.width * shared + 3 * spec.width * spec.units
    return 4 * (spec.depth * layer + (1 if spec.tied else 2) * vocabulary * spec.width)


def _largest_output(body: nn.Module, card: ModelCard) -> int:
    """Bytes of the largest output of a layer for two rows; 0 for models of libraries, which may look at values, and for
    language models, whose users choose how much they take at a time.
    """
    if isinstance(card.model, recipe.HuggingFaceModel | recipe.LanguageModel | recipe.Timm):
        return 0
    largest = 0

    def measure(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(measure) for module in body.modules()]
    dtype = torch.int32 if card.input_dtype == "int32" else torch.float32
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # what does not fit is told when it runs
        body.eval()(torch.empty((2, *card.input_shape), dtype=dtype, device="meta"))
    for hook in hooks:
        hook.remove()
    return largest


def _refuse_beyond_memory(card: ModelCard, weights: int, rows: int) -> None:
    free = free_memory(torch.device("cpu"))
    if weights + rows <= free:
        return
    of_rows = "" if weights > free else f"{' and ' if weights else ''}{rows / 1e9:,.1f} GB for two rows"
    raise RefusedError(
        f"the model {card.model.label} does not fit the memory of this machine",
        got=(f"{weights / 1e9:,.1f} GB of weights" if weights else "") + of_rows,
        expected=f"at most the {free / 1e9:,.1f} GB that are free",
        next="take a smaller one, or train where there is more memory",
    )


def num_parameters(module: nn.Module) -> int:
    """How many trained numbers a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def by_content(model: recipe.Model) -> dict[str, Any]:
    """A spec as JSON, for keys of what is trained from it: what lies in files is named by content, not by place.

    Raises:
        RefusedError: a factory cannot be imported, or a folder has no configuration.
    """
    document = model.model_dump(mode="json")
    if isinstance(model, recipe.HuggingFaceModel | recipe.HuggingFaceLm) and model.path is not None:
        return document | {"path": huggingface.content(model)}
    if isinstance(model, recipe.Custom):
        return document | {"source": source_sha256(model, SIGNATURE)}
    return document


def changed_source(card: ModelCard) -> str | None:
    """sha256 of the file of a custom model's factory, where that is no longer the one that the model was saved with.

    Raises:
        RefusedError: the factory cannot be imported.
    """
    if not isinstance(card.model, recipe.Custom) or card.source_sha256 is None:
        return None
    now = source_sha256(card.model, SIGNATURE)
    return None if now == card.source_sha256 else now


def _body(card: ModelCard, pretrained: bool) -> nn.Module:
    model, shape, classes = card.model, card.input_shape, card.classes
    if card.blocks is not None:
        return _language_body(card, pretrained)
    architectures.refuse_inputs(model, card.tokens, shape)
    match model:
        case recipe.Mlp():
            return architectures.mlp(model, shape, classes)
        case recipe.Cnn():
            return architectures.cnn(model, shape, classes)
        case recipe.ResNet():
            return architectures.resnet(model, shape, classes)
        case recipe.PlainCnn():
            return architectures.plain_cnn(model, shape, classes)
        case recipe.TextTransformer():
            assert card.tokens is not None
            return architectures.text_transformer(model, card.tokens, shape, classes)
        case recipe.HuggingFaceModel():
            return huggingface.body(model, interface_of(card), pretrained=pretrained)
        case recipe.Timm():
            return architectures.timm_model(model, shape, classes, pretrained=pretrained and model.pretrained)
        case recipe.Custom():
            return _custom(model, shape, classes)
        case recipe.CausalLm() | recipe.HuggingFaceLm():
            raise AssertionError("a card of a language model has blocks")


def _language_body(card: ModelCard, pretrained: bool) -> LanguageModel:
    assert card.blocks is not None
    if isinstance(card.model, recipe.CausalLm):
        return CausalDecoder(card.model, card.blocks)
    assert isinstance(card.model, recipe.HuggingFaceLm)
    return huggingface_lm.body(card.model, card.blocks, pretrained=pretrained)


def _custom(spec: recipe.Custom, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    arguments = {"input_shape": input_shape, "classes": classes, **spec.arguments}
    module = call_factory(spec, SIGNATURE, arguments)
    if not isinstance(module, nn.Module):
        raise RefusedError(
            f"the model factory {spec.factory} returned something else than a model",
            got=type(module).__name__,
            expected="a torch.nn.Module",
        )
    return module


def _per_channel(values: Sequence[float], unit: float, card: ModelCard) -> torch.Tensor:
    """Constants as float32 that broadcast over [n, *shape]: one for all, or one for each channel."""
    channels = card.input_shape[0] if card.input_shape else 1
    if len(values) not in (1, channels):
        raise RefusedError(
            "data.normalize does not fit the inputs",
            got=f"{len(values)} values for inputs of shape {list(card.input_shape)}",
            expected="one value" if channels == 1 else f"1 or {channels} values in mean and in std",
        )
    # In float64, so that a constant of the recipe is rounded to float32 once, after it was scaled.
    scaled = torch.tensor(values, dtype=torch.float64) * unit
    return scaled.float().view(1, -1, *[1] * (len(card.input_shape) - 1))


def check_output(module: nn.Module, card: ModelCard, inputs: torch.Tensor | None = None) -> torch.Tensor:
    """Run a few rows: the cheapest way to see that any model, a custom one too, fits inputs and classes.

    Args:
        module: in the mode that it is to be tried in.
        inputs: raw inputs [n, *shape] on its device; None takes two blank rows.

    Returns:
        Its logits [n, classes].

    Raises:
        RefusedError: it raises, returns no logits, or another number of them.
    """
    inputs = torch.from_numpy(_two_rows(card)) if inputs is None else inputs
    # A model may draw random numbers here, which must not change those that its caller draws afterwards.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits: torch.Tensor = module(inputs)
        except NoLogitsError as error:
            raise RefusedError(
                f"the model {card.model.label} returns something else than logits",
                got=error,
                expected=EXPECTED,
                next="let its forward return the logits",
            ) from error
        except (Exception, SystemExit) as error:  # the latter of a user's own code: it would end the command in silence
            raise RefusedError(
                f"the model {card.model.label} does not take these inputs",
                got=f"{type(error).__name__}: {error}",
                expected=f"a model of {card.input_dtype} inputs of shape {list(card.input_shape)}",
            ) from error
    if logits.shape != (len(inputs), card.classes):
        other = (
            "has another number of classes than the data"
            if logits.dim() == 2
            else "does not give one row of logits for each input"
        )
        raise RefusedError(
            f"the model {card.model.label} {other}",
            got=f"logits of shape {list(logits.shape)} for {len(inputs)} rows",
            expected=f"[{len(inputs)}, {card.classes}]",
            next="let the factory use its argument `classes` for the last layer",
        )
    return logits


def _two_rows(card: ModelCard) -> np.ndarray:
    """Blank rows; of text, the first and the last ordinary token, and all token types."""
    rows = np.zeros((2, *card.input_shape), dtype=card.input_dtype)
    if isinstance(card.model, recipe.HuggingFaceModel):  # it has checked the length, and long texts take their time
        rows = rows[..., :64]
    if card.tokens is not None:
        special = {card.tokens.padding, *card.tokens.special}
        ids = rows if rows.ndim == 2 else rows[:, 0]
        every = range(card.tokens.vocabulary)
        ids[0] = next((number for number in every if number not in special), 0)
        ids[1] = next((number for number in reversed(every) if number not in special), 0)
        if rows.ndim == 3:
            rows[1, 1] = 1
    return rows
