"""Models: a spec in a recipe -> a `torch.nn.Module` on raw inputs, for teachers and students alike.

A model folder holds `model.safetensors` and `model.json` (the card: what was built, and for which inputs). Nothing in
it is ever unpickled.

    module = load_model("runs/digits/students/mlp-16-annealing_kd-t4-s0")
    logits = module(inputs)
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
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
from safetensors import SafetensorError
from torch import nn

from akd_dist import architectures, huggingface, recipe
from akd_dist.device import free_memory
from akd_dist.factories import call_factory, source_sha256
from akd_dist.outputs import EXPECTED, NoLogitsError, logits_of
from akd_dist.rows import Rows
from akd_dist.storage.errors import DamagedError, RefusedError
from akd_dist.storage.files import canonical_json, mistakes, parse_json, replace, sha256
from akd_dist.storage.objects import ObjectMissing, open_root
from akd_dist.text import Tokens
from akd_dist.trusted import Trusted
from akd_dist.wording import some_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Of model.json: a checksum of its own since 2."""
MOST_INPUT = 2**33
"""The most numbers that one input may have; within that, memory decides."""
WEIGHTS, CARD = huggingface.WEIGHTS, "model.json"
NOBODY = Trusted()
Shape = tuple[int, ...]
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_SIGNATURE = "(input_shape, classes, ...) -> torch.nn.Module"
# Where a model's first weights came from; what they became is known by their sha256.
_ORIGIN = {"huggingface": ("path", "name", "pretrained"), "timm": ("pretrained",)}


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
            image=image,
        )
        if isinstance(model, recipe.HuggingFaceModel):
            return card.model_copy(update={"model": huggingface.resolve(model, _asked(card))})
        if isinstance(model, recipe.Custom):
            return card.model_copy(update={"source_sha256": source_sha256(model, _SIGNATURE)})
        return card

    @model_serializer(mode="wrap")
    def _as_before(self, document: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Cards and manifests of before knew no `image`: at its default it is left out, and they keep their bytes."""
        said: dict[str, Any] = document(self)
        return said if self.image != recipe.Image() else {name: said[name] for name in said if name != "image"}

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
        ours = _in_words(self.input_dtype, self.input_shape, self.classes, self.task, self.tokens)
        shape = self.input_shape if self._takes_shorter(rows.shape) else rows.shape
        theirs = _in_words(rows.inputs.dtype, shape, rows.classes, rows.task, rows.tokens)
        if ours != theirs:
            raise RefusedError(
                f"{what} was made for other data",
                got=ours,
                expected=f"{_in_words(rows.inputs.dtype, rows.shape, rows.classes, rows.task, rows.tokens)}, "
                "as the dataset has them",
                next="choose a model of the same inputs and classes, or the dataset it was trained on",
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

    def _takes_shorter(self, shape: tuple[int, ...]) -> bool:
        masked = isinstance(self.model, recipe.TextTransformer | recipe.HuggingFaceModel)
        return masked and shape[:-1] == self.input_shape[:-1] and shape[-1:] <= self.input_shape[-1:]


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
        # Losses and stores want more than the half precision that autocast leaves.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def build(card: ModelCard, seed: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised module in training mode; the same bits from the same seed in any process.

    Args:
        card: what to build.
        seed: seeds the initialisation, and leaves torch's own generator alone; None draws from torch's generator.
        pretrained: start from pretrained weights where the card's model has any; only what they lack is drawn.

    Raises:
        RefusedError: the model does not fit the inputs, gives other than [n, classes], or its factory fails; pretrained
            weights are missing or of another shape; an optional library is not installed.
    """
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(card, pretrained=pretrained)
    module = Classifier(_body(card, pretrained), card)
    check_output(module.eval(), card)
    return module.train()


def try_out(card: ModelCard) -> nn.Module:
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
    body = _without_numbers(card)
    if body is None:
        _refuse_beyond_memory(card, 0, rows)
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in body.state_dict().items()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in body.state_dict().values())
    _refuse_beyond_memory(card, weights, rows)
    _refuse_beyond_memory(card, weights, rows + 2 * _largest_output(body, card))
    return shapes


def _without_numbers(card: ModelCard) -> nn.Module | None:
    """A model's body on torch's meta device, which has shapes and takes no memory."""
    if isinstance(card.model, recipe.Custom):
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
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


def _largest_output(body: nn.Module, card: ModelCard) -> int:
    """Bytes of the largest output of a layer for two rows; 0 for models of libraries, which may look at values."""
    if isinstance(card.model, recipe.HuggingFaceModel | recipe.Timm):
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


def state_bytes(module: nn.Module) -> bytes:
    """The weights as the bytes of a safetensors file, a pure function of names and values."""
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    return safetensors.torch.save(state)


def save_model(
    folder: Path, module: nn.Module, card: ModelCard, *, write: Callable[[Path, bytes], None] = replace
) -> None:
    """Write a module as a model folder. The card comes last, so a folder with a card is whole.

    Args:
        write: gives a file its content, atomically.

    Raises:
        MachineError: the folder cannot be written.
    """
    weights = state_bytes(module)
    write(folder / WEIGHTS, weights)
    written = card.model_copy(update={"model": _placeless(card.model), "weights_sha256": sha256(weights)})
    write(folder / CARD, card_bytes(written))


def card_bytes(card: ModelCard) -> bytes:
    """The content of model.json: the card, and the checksum of what the card says."""
    fields = card.model_dump(mode="json") | {"format": FORMAT_VERSION}
    return json.dumps(fields | {"sha256": sha256(canonical_json(fields))}, indent=1).encode() + b"\n"


def load_model(uri: str | Path, trusted: Trusted = NOBODY) -> nn.Module:
    """The module of a model folder, in eval mode: raw inputs [n, *shape] -> logits [n, classes], in float32.

    Weights that were trained in float64 stay so, and give float64.

    Args:
        uri: a folder, local or `s3://`; or a local folder with a fine-tuned Hugging Face model and its tokenizer.
        trusted: which factories may be imported: a model of kind `custom` names one.

    Raises:
        RefusedError: it is not a model folder, its factory is not trusted, it fits no memory, or it offers a pickle;
            nothing is ever unpickled.
        DamagedError: card and weights are not those that were written.
    """
    return read_model(uri, trusted)[0]


def read_model(uri: str | Path, trusted: Trusted = NOBODY) -> tuple[nn.Module, ModelCard]:
    """The module of a model folder, in eval mode, and its card, from one reading of the files.

    Args:
        trusted: as for `load_model`.

    Raises:
        RefusedError, DamagedError: as `load_model`.
    """
    card, weights, foreign = _read(uri, trusted)
    shapes = check_memory(card)
    if foreign:
        assert isinstance(card.model, recipe.HuggingFaceModel)
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = Classifier(huggingface.trained_body(card.model, _asked(card), weights), card)
        check_output(module.eval(), card)
        return module, card
    _warn_of_other_source(card, uri)
    try:
        tensors = safetensors.torch.load(weights)
        _check_shapes(shapes, tensors)
        module = build(card, seed=0)
        if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
            module.double()  # else loading would round them
        module.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise RefusedError(
            f"the weights in {uri} do not fit the model that its {CARD} describes",
            got=error,
            expected=f"the tensors of {card.model.label}",
            next="use a folder that akd-dist wrote; for a custom model, the code it was trained with",
        ) from error
    return module.eval(), card


def _check_shapes(shapes: dict[str, Shape] | None, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse weights of other names and shapes than a body has, before the module is made, if these are known.

    Raises:
        RuntimeError: as `load_state_dict` would.
    """
    found = {name.removeprefix("body."): tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes is None or found == shapes:
        return
    different = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    told = [f"{name} {found.get(name, 'missing')} instead of {shapes.get(name, 'nothing')}" for name in different[:3]]
    raise RuntimeError("; ".join(told) + (f"; and {len(different) - 3} more" if len(different) > 3 else ""))


def load_card(uri: str | Path, trusted: Trusted = NOBODY) -> ModelCard:
    """The card of a model folder. Nothing is imported for it; what it names may be later, as far as it is trusted.

    Raises:
        RefusedError, DamagedError: as `load_model`.
    """
    return _read(uri, trusted)[0]


def by_content(model: recipe.Model) -> dict[str, Any]:
    """A spec as JSON, for keys of what is trained from it: what lies in files is named by content, not by place.

    Raises:
        RefusedError: a factory cannot be imported, or a folder has no configuration.
    """
    document = model.model_dump(mode="json")
    if isinstance(model, recipe.HuggingFaceModel) and model.path is not None:
        return document | {"path": huggingface.content(model)}
    if isinstance(model, recipe.Custom):
        return document | {"source": source_sha256(model, _SIGNATURE)}
    return document


def changed_source(card: ModelCard) -> str | None:
    """sha256 of the file of a custom model's factory, where that is no longer the one that the model was saved with.

    Raises:
        RefusedError: the factory cannot be imported.
    """
    if not isinstance(card.model, recipe.Custom) or card.source_sha256 is None:
        return None
    now = source_sha256(card.model, _SIGNATURE)
    return None if now == card.source_sha256 else now


# ---- building


def _body(card: ModelCard, pretrained: bool) -> nn.Module:
    model, shape, classes = card.model, card.input_shape, card.classes
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
            return huggingface.body(model, _asked(card), pretrained=pretrained)
        case recipe.Timm():
            return architectures.timm_model(model, shape, classes, pretrained=pretrained and model.pretrained)
        case recipe.Custom():
            return _custom(model, shape, classes)


def _asked(card: ModelCard) -> huggingface.Interface:
    assert card.tokens is not None
    return huggingface.Interface(card.input_shape, card.classes, card.task, card.tokens)


def _custom(spec: recipe.Custom, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    arguments = {"input_shape": input_shape, "classes": classes, **spec.arguments}
    module = call_factory(spec, _SIGNATURE, arguments)
    if not isinstance(module, nn.Module):
        raise RefusedError(
            f"the model factory {spec.factory} returned something else than a model",
            got=type(module).__name__,
            expected="a torch.nn.Module",
        )
    return module


def _warn_of_other_source(card: ModelCard, uri: str | Path) -> None:
    if isinstance(card.model, recipe.Custom) and changed_source(card):
        log.warning("the file of %s has changed since the model in %s was saved", card.model.factory, uri)


def _placeless(model: recipe.Model) -> recipe.Model:
    """A spec without folders of this machine: a card says of a local folder its name alone."""
    if isinstance(model, recipe.HuggingFaceModel) and model.path is not None:
        return model.model_copy(update={"path": Path(model.path).name})
    return model


def _per_channel(values: Sequence[float], unit: float, card: ModelCard) -> torch.Tensor:
    """Constants as float32 that broadcast over [n, *shape]: one for all, or one for each channel."""
    channels = card.input_shape[0] if card.input_shape else 1
    if len(values) not in (1, channels):
        raise RefusedError(
            "data.normalize does not fit the inputs",
            got=f"{len(values)} values for inputs of shape {list(card.input_shape)}",
            expected="one value" if channels == 1 else f"1 or {channels} values in mean and in std",
        )
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
        except Exception as error:
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


# ---- reading


def _read(uri: str | Path, trusted: Trusted) -> tuple[ModelCard, bytes, bool]:
    """Card and weights of a model folder, checked against each other, and whether it is one of Hugging Face."""
    _refuse_other_than_folder(uri)
    root = open_root(uri)
    if (foreign := not root.exists(CARD) and root.exists(huggingface.CONFIG)) and "://" in str(uri):
        raise RefusedError(
            f"{uri} is a Hugging Face model, which is read from a local folder only",
            got=huggingface.CONFIG,
            expected=f"{WEIGHTS} and {CARD}, or a local folder",
            next="copy it to this machine",
        )
    try:
        weights, document = root.get(WEIGHTS), root.document(huggingface.CONFIG if foreign else CARD)
    except ObjectMissing as error:
        raise RefusedError(
            f"{uri} is not a model folder",
            got=f"no {error.args[0]}" if "://" in str(uri) or Path(uri).exists() else "nothing there",
            expected=f"a folder with {WEIGHTS} and {CARD}",
            next="name a student's folder (runs/<name>/students/<student>), or let the recipe train the teacher",
        ) from error
    if _is_pickle(weights):
        raise _pickle_refused(f"{uri}/{WEIGHTS}")
    if foreign:
        return _card_of_huggingface(Path(uri), document, weights), weights, True
    card = _parse(document, uri)
    recipe.trust(card.model, trusted.seen_from(f"the model folder {uri}"))
    if sha256(weights) != card.weights_sha256:
        raise DamagedError(
            f"the weights {uri}/{WEIGHTS} are not those that were saved",
            got=f"sha256 {sha256(weights)[:16]}",
            expected=f"sha256 {(card.weights_sha256 or 'none')[:16]}, as {CARD} says",
            next="copy the folder again, or train the model again",
        )
    return card, weights, False


def _card_of_huggingface(folder: Path, document: bytes, weights: bytes) -> ModelCard:
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


def _parse(document: bytes, uri: str | Path) -> ModelCard:
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


def _refuse_other_than_folder(uri: str | Path) -> None:
    path = Path(uri)
    if path.is_file():
        with open(path, "rb") as handle:
            head = handle.read(9)
        if path.suffix in _PICKLE_SUFFIXES or _is_pickle(head):
            raise _pickle_refused(str(uri))
        raise RefusedError(f"{uri} is a file", got="a file", expected=f"a folder with {WEIGHTS} and {CARD}")
    if path.is_dir() and not (path / WEIGHTS).exists():
        pickles = sorted(one for one in path.iterdir() if one.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise _pickle_refused(str(pickles[0]))


def _is_pickle(head: bytes) -> bool:
    """Whether bytes start like a pickle, or like torch's zip of pickles."""
    if head[8:9] == b"{":  # safetensors: eight bytes of length, which may look like anything, then JSON
        return False
    return head.startswith((b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6))))


def _pickle_refused(where: str) -> RefusedError:
    return RefusedError(
        f"{where} is a pickle, and weights are never unpickled: loading one runs whatever code is in it",
        got="a pickle",
        expected=f"a folder with {WEIGHTS} and {CARD}",
        next="where you trust it, load it into your model and save that with akd_dist.models.save_model",
    )
