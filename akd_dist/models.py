"""Models: a spec in a recipe -> a `torch.nn.Module` on raw inputs, for teachers and students alike.

A model folder holds `model.safetensors` and `model.json` (the card: what was built, and for which inputs). Nothing in
it is ever unpickled.

    module = load_model("runs/digits/students/mlp-16-annealing_kd-t4-s0")
    logits = module(inputs)
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import nn

from akd_dist import architectures, huggingface, recipe
from akd_dist.device import free_memory
from akd_dist.factories import call_factory, source_sha256
from akd_dist.outputs import EXPECTED, NoLogitsError, logits_of
from akd_dist.rows import Rows
from akd_dist.storage.errors import DamagedError, RefusedError
from akd_dist.storage.files import canonical_json, replace, sha256
from akd_dist.storage.objects import ObjectMissing, open_root
from akd_dist.text import Tokens
from akd_dist.wording import some_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
WEIGHTS, CARD = huggingface.WEIGHTS, "model.json"
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_SIGNATURE = "(input_shape, classes, ...) -> torch.nn.Module"
# Where a model's first weights came from; what they became is known by their sha256.
_ORIGIN = {"huggingface": ("path", "name", "pretrained"), "timm": ("pretrained",)}


class ModelCard(BaseModel):
    """What a model folder says of itself: everything needed to build the module again. The content of `model.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT_VERSION
    """Version of this document."""
    model: recipe.Model
    """The spec, as the recipe has it."""
    input_shape: tuple[int, ...]
    """Shape of one raw input."""
    input_dtype: Literal["uint8", "float32", "int32"]
    """Dtype of raw inputs; uint8 is divided by 255 inside the module, int32 are ids of tokens."""
    classes: int
    """Number of logits: 1 for regression."""
    task: recipe.Task = "classification"
    """What the logits are: scores of classes, or a value."""
    class_names: tuple[str, ...] | None = None
    """The names of classes 0, 1, ..., where the data has names."""
    tokens: Tokens | None = None
    """What ids mean, where inputs are text."""
    normalize: recipe.Normalize | None = None
    """Mean and standard deviation taken out inside the module."""
    source_sha256: str | None = None
    """sha256 of the file of a custom model's factory."""
    weights_sha256: str | None = None
    """sha256 of `model.safetensors`; None before there are weights."""

    @classmethod
    def of(cls, model: recipe.Model, rows: Rows, normalize: recipe.Normalize | None) -> ModelCard:
        """The card of a model for the inputs and classes of a dataset.

        Raises:
            RefusedError: the model is not for such inputs, its configuration or its factory cannot be read, or an
                optional library is not installed.
            MachineError: its configuration is on the hub, which cannot be reached.
        """
        architectures.refuse_inputs(model, rows.tokens, rows.shape)
        dtype: Any = rows.inputs.dtype.name
        card = cls(
            model=model,
            input_shape=rows.shape,
            input_dtype=dtype,
            classes=rows.classes,
            task=rows.task,
            class_names=rows.class_names,
            tokens=rows.tokens,
            normalize=normalize,
        )
        if isinstance(model, recipe.HuggingFaceModel):
            return card.model_copy(update={"model": huggingface.resolve(model, _asked(card))})
        if isinstance(model, recipe.Custom):
            return card.model_copy(update={"source_sha256": source_sha256(model.factory, _SIGNATURE)})
        return card

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
    _check_memory(card)
    return build(card, seed=0, pretrained=True)


def _check_memory(card: ModelCard) -> None:
    """Refuse weights that free memory cannot hold before they take it, and the process with it.

    Nothing is known of models by other people's code before it runs.
    """
    if isinstance(card.model, recipe.HuggingFaceModel | recipe.Timm | recipe.Custom):
        return
    with torch.device("meta"):  # without memory
        needed = 4 * num_parameters(_body(card, pretrained=False))
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise RefusedError(
            f"the model {card.model.label} does not fit the memory of this machine",
            got=f"{needed / 1e9:,.1f} GB of weights",
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
    write(folder / CARD, json.dumps(written.model_dump(mode="json"), indent=1).encode() + b"\n")


def load_model(uri: str | Path) -> nn.Module:
    """The module of a model folder, in eval mode: raw inputs [n, *shape] -> logits [n, classes], in float32.

    Weights that were trained in float64 stay so, and give float64.

    A model of kind `custom` imports its factory, so its folder must be on `sys.path` (see `add_folder`).

    Args:
        uri: a folder, local or `s3://`; or a local folder with a fine-tuned Hugging Face model and its tokenizer.

    Raises:
        RefusedError: it is not a model folder, or offers a pickle; nothing is ever unpickled.
        DamagedError: the weights are not those that the card describes.
    """
    return read_model(uri)[0]


def read_model(uri: str | Path) -> tuple[nn.Module, ModelCard]:
    """The module of a model folder, in eval mode, and its card, from one reading of the files.

    Raises:
        RefusedError, DamagedError: as `load_model`.
    """
    card, weights, foreign = _read(uri)
    if foreign:
        assert isinstance(card.model, recipe.HuggingFaceModel)
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = Classifier(huggingface.trained_body(card.model, _asked(card), weights), card)
        check_output(module.eval(), card)
        return module, card
    _warn_of_other_source(card, uri)
    module = build(card, seed=0)
    try:
        tensors = safetensors.torch.load(weights)
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


def load_card(uri: str | Path) -> ModelCard:
    """The card of a model folder.

    Raises:
        RefusedError, DamagedError: as `load_model`.
    """
    return _read(uri)[0]


def by_content(model: recipe.Model) -> dict[str, Any]:
    """A spec as JSON, for keys of what is trained from it: what lies in files is named by content, not by place.

    Raises:
        RefusedError: a factory cannot be imported, or a folder has no configuration.
    """
    document = model.model_dump(mode="json")
    if isinstance(model, recipe.HuggingFaceModel) and model.path is not None:
        return document | {"path": huggingface.content(model)}
    if isinstance(model, recipe.Custom):
        return document | {"source": source_sha256(model.factory, _SIGNATURE)}
    return document


def changed_source(card: ModelCard) -> str | None:
    """sha256 of the file of a custom model's factory, where that is no longer the one that the model was saved with.

    Raises:
        RefusedError: the factory cannot be imported.
    """
    if not isinstance(card.model, recipe.Custom) or card.source_sha256 is None:
        return None
    now = source_sha256(card.model.factory, _SIGNATURE)
    return None if now == card.source_sha256 else now


def add_folder(folder: str | None) -> None:
    """Let custom models be imported from a folder. Last on the path, so that it hides no installed module."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


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
    module = call_factory(spec.factory, _SIGNATURE, arguments)
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
        ordinary = [number for number in range(card.tokens.vocabulary) if number not in special] or [0]
        ids = rows if rows.ndim == 2 else rows[:, 0]
        ids[0], ids[1] = ordinary[0], ordinary[-1]
        if rows.ndim == 3:
            rows[1, 1] = 1
    return rows


# ---- reading


def _read(uri: str | Path) -> tuple[ModelCard, bytes, bool]:
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
        weights, document = root.get(WEIGHTS), root.get(huggingface.CONFIG if foreign else CARD)
    except ObjectMissing as error:
        raise RefusedError(
            f"{uri} is not a model folder",
            got=f"no {error.args[0]}",
            expected=f"{WEIGHTS} and {CARD}",
            next="name a student's folder (runs/<name>/students/<student>), or let the recipe train the teacher",
        ) from error
    if _is_pickle(weights):
        raise _pickle_refused(f"{uri}/{WEIGHTS}")
    if foreign:
        return _card_of_huggingface(Path(uri), document, weights), weights, True
    card = _parse(document, uri)
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
    return ModelCard(
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
        fields = json.loads(document)
        if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > FORMAT_VERSION:
            raise RefusedError(
                f"{uri}/{CARD} was written by a newer akd-dist",
                got=f"format {fields['format']}",
                expected=f"format {FORMAT_VERSION}",
                next="upgrade akd-dist",
            )
        return ModelCard.model_validate(fields)
    except ValueError as error:  # of json and of pydantic
        raise DamagedError(
            f"the model card {uri}/{CARD} cannot be read",
            got=str(error),
            expected=f"a {CARD} as akd-dist writes it",
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
