"""Model folders: `model.safetensors` and `model.json`, written whole and read without unpickling anything.

module = load_model("runs/digits/students/mlp-16-annealing_kd-t4-s0")
logits = module(inputs)
"""

import logging
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import DamagedError, RefusedError
from akd_dist.base.files import replace, sha256
from akd_dist.base.trusted import Trusted
from akd_dist.models import huggingface, huggingface_config
from akd_dist.models.build import Classifier, build, changed_source, check_memory, check_output
from akd_dist.models.card import (
    CARD,
    WEIGHTS,
    ModelCard,
    Shape,
    card_bytes,
    card_of_huggingface,
    interface_of,
    parse_card,
    placeless,
)
from akd_dist.models.language import Blocks
from akd_dist.models.language_folder import card_of_folder, is_language_folder, read_folder
from akd_dist.storage.objects import ObjectMissing
from akd_dist.storage.roots import open_root

log = logging.getLogger(__name__)
NOBODY = Trusted()
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


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
    written = card.model_copy(update={"model": placeless(card.model), "weights_sha256": sha256(weights)})
    write(folder / CARD, card_bytes(written))


def load_model(uri: str | Path, trusted: Trusted = NOBODY) -> nn.Module:
    """The module of a model folder, in eval mode: raw inputs [n, *shape] -> logits [n, classes], in float32.

    A language model is a `language.LanguageModel`: blocks [n, 3, length] -> logits [n, length, rows of its output].
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


def read_model(
    uri: str | Path, trusted: Trusted = NOBODY, *, blocks: Blocks | None = None
) -> tuple[nn.Module, ModelCard]:
    """The module of a model folder, in eval mode, and its card, from one reading of the files.

    Args:
        trusted: as for `load_model`.
        blocks: of a language model, what it is to take: their length and attention become those of the card. None
            takes it as it was made.

    Raises:
        RefusedError, DamagedError: as `load_model`; or the model is not for such blocks.
    """
    if is_language_folder(uri):
        return read_folder(uri, blocks)
    card, weights, foreign = _read(uri, trusted)
    if blocks is not None:
        card = card.on_blocks(blocks, f"the model {uri}")
    shapes = check_memory(card)
    if foreign:
        assert isinstance(card.model, recipe.HuggingFaceModel)
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = Classifier(huggingface.trained_body(card.model, interface_of(card), weights), card)
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


def load_card(uri: str | Path, trusted: Trusted = NOBODY, *, blocks: Blocks | None = None) -> ModelCard:
    """The card of a model folder. Nothing is imported for it; what it names may be later, as far as it is trusted.

    Args:
        trusted: as for `load_model`.
        blocks: as for `read_model`.

    Raises:
        RefusedError, DamagedError: as `read_model`.
    """
    if is_language_folder(uri):
        return card_of_folder(uri, blocks)
    card = _read(uri, trusted)[0]
    return card if blocks is None else card.on_blocks(blocks, f"the model {uri}")


def _warn_of_other_source(card: ModelCard, uri: str | Path) -> None:
    if isinstance(card.model, recipe.Custom) and changed_source(card):
        log.warning("the file of %s has changed since the model in %s was saved", card.model.factory, uri)


def _read(uri: str | Path, trusted: Trusted) -> tuple[ModelCard, bytes, bool]:
    """Card and weights of a model folder, checked against each other, and whether it is one of Hugging Face."""
    _refuse_other_than_folder(uri)
    root = open_root(uri)
    if (foreign := not root.exists(CARD) and root.exists(huggingface_config.CONFIG)) and "://" in str(uri):
        raise RefusedError(
            f"{uri} is a Hugging Face model, which is read from a local folder only",
            got=huggingface_config.CONFIG,
            expected=f"{WEIGHTS} and {CARD}, or a local folder",
            next="copy it to this machine",
        )
    try:
        weights, document = root.get(WEIGHTS), root.document(huggingface_config.CONFIG if foreign else CARD)
    except ObjectMissing as error:
        raise RefusedError(
            f"{uri} is not a model folder",
            got=f"no {error.args[0]}" if "://" in str(uri) or Path(uri).exists() else "nothing there",
            expected=f"a folder with {WEIGHTS} and {CARD}",
            next="name a student's folder (runs/<name>/students/<student>), or let the recipe train the teacher",
        ) from error
    # The name says nothing: a pickle may be called model.safetensors, and then it is told as what it is.
    if _is_pickle(weights):
        raise _pickle_refused(f"{uri}/{WEIGHTS}")
    if foreign:
        return card_of_huggingface(Path(uri), document, weights), weights, True
    card = parse_card(document, uri)
    recipe.trust(card.model, trusted.seen_from(f"the model folder {uri}"))
    if sha256(weights) != card.weights_sha256:
        raise DamagedError(
            f"the weights {uri}/{WEIGHTS} are not those that were saved",
            got=f"sha256 {sha256(weights)[:16]}",
            expected=f"sha256 {(card.weights_sha256 or 'none')[:16]}, as {CARD} says",
            next="copy the folder again, or train the model again",
        )
    return card, weights, False


def _refuse_other_than_folder(uri: str | Path) -> None:
    path = Path(uri)
    if path.is_file():
        with open(path, "rb") as handle:
            head = handle.read(9)
        if path.suffix in _PICKLE_SUFFIXES or _is_pickle(head):
            raise _pickle_refused(str(uri))
        raise RefusedError(
            f"{uri} is a file", got="a file", expected=f"a folder with {WEIGHTS} and {CARD}", next=_by_architecture(uri)
        )
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
        next=_by_architecture(where),
    )


def _by_architecture(place: str | Path) -> str:
    """How weights that lie about without a card become a model."""
    return (
        f"name the architecture beside it in a recipe, teacher: {{model: {{kind: ...}}, weights: {place}}}, or let "
        "`akd-dist models import` make such a folder: tensors are taken out of it, and nothing is unpickled"
    )
