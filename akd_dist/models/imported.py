"""A checkpoint of others as a model of ours: known by the content of its weights, found again by its file.

The same weights make the same model folder, whatever file, format and wrapping they came in. What a file's weights came
to is remembered in the node's cache by the file's content, so that a command that finds all stores loads nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.files import canonical_json, is_settled, replace, sha256, stamp_of, with_checksum, without_checksum
from akd_dist.data.rows import Rows
from akd_dist.models import huggingface, huggingface_lm
from akd_dist.models.build import Classifier, build, check_memory, check_output, weights_of
from akd_dist.models.card import CARD, WEIGHTS, ModelCard, card_bytes, interface_of, placeless
from akd_dist.models.checkpoint_files import Tensors, digest_of, find_files, read_parts
from akd_dist.models.fitting import Fit, best_fit, check_values, described, load_fit
from akd_dist.models.folder import state_bytes
from akd_dist.storage.remote import RemoteFile, find_file, is_remote
from akd_dist.storage.roots import open_root

IMPORTS = "imports"
"""The folder of the node's cache that remembers which weights a file came to."""
_CHUNK = 1 << 24
_VERSION = 1  # of how names are brought onto a module's: what another one made is made anew


@dataclass
class Imported:
    """A checkpoint of others, and the model that it makes."""

    source: str
    """The file, folder or URI, as it was named."""
    card: ModelCard
    """What is built, with the sha256 of its weights."""
    notes: list[str] = field(default_factory=list)
    """What was taken off, left out and widened, a line each; empty where the file was known."""
    _module: nn.Module | None = None

    def module(self, cache_root: Path) -> nn.Module:
        """Its module in eval mode: raw inputs [n, *shape] -> logits [n, classes]; loaded once.

        Raises:
            RefusedError: the file has changed since it was looked at; else as `open_checkpoint`.
        """
        if self._module is None:
            fresh = self.card.model_copy(update={"weights_sha256": None})
            self._module, self.notes = _loaded(fresh, self.source, cache_root)
            if sha256(state_bytes(self._module)) != self.card.weights_sha256:
                raise _changed(self.source)
        return self._module

    def publish(self, uri: str, cache_root: Path) -> None:
        """Have its model folder lie at a URI, create-only; the card comes last, so a folder with a card is whole.

        From then on the folder is what is read: the module is let go of, since a driver lives as long as its run.

        Raises:
            MachineError: it cannot be written.
        """
        root = open_root(uri)
        if not root.exists(CARD):
            root.put_new(WEIGHTS, state_bytes(self.module(cache_root)))
            root.put_new(CARD, card_bytes(self.card))
        self._module = None


def open_checkpoint(model: recipe.Model, source: str, rows: Rows, data: recipe.DataSpec, cache_root: Path) -> Imported:
    """A checkpoint of others for an architecture, on the inputs and classes of a dataset.

    Args:
        model: the architecture; of a factory, one that is trusted.
        source: a file, a folder, or the `s3://` URI of a file.
        rows: what the model is to take.
        data: how inputs become what it takes: `normalize` and `image`.
        cache_root: of this node.

    Raises:
        RefusedError: it cannot be read, or does not fit; nothing is ever unpickled.
        MachineError: it may not be read, or object storage does not answer.
    """
    card = ModelCard.of(model, rows, data.normalize, data.image)
    _check_class_names(card, rows, source)
    return open_for_card(card, source, cache_root)


def open_for_card(card: ModelCard, source: str, cache_root: Path) -> Imported:
    """A checkpoint of others as the model of a card, whose weights it becomes; as `open_checkpoint`.

    Args:
        card: without weights; of a language model as `ModelCard.of_blocks` gives it.
        source: a file, a folder, or the `s3://` URI of a file.
        cache_root: of this node.

    Raises:
        RefusedError, MachineError: as `open_checkpoint`.
    """
    card = card.model_copy(update={"model": placeless(card.model)})
    before = _stamp(source)
    key = _key(card, source)
    path = cache_root / IMPORTS / f"{key}.json"
    if (known := _remembered(path)) is not None:
        return Imported(source, card.model_copy(update={"weights_sha256": known}))
    module, notes = _loaded(card, source, cache_root)
    weights = sha256(state_bytes(module))
    if _stamp(source) != before or (not all(map(is_settled, before)) and _key(card, source) != key):
        raise _changed(source)
    with contextlib.suppress(MachineError):  # the next command reads the file again
        replace(path, with_checksum({"weights_sha256": weights}), durable=False)
    return Imported(source, card.model_copy(update={"weights_sha256": weights}), notes, module)


def _stamp(source: str) -> list[list[int] | None]:
    """What changes with the files of a checkpoint; of what lies in object storage its tag is part of the key."""
    return [] if is_remote(source) else [stamp_of(file) for file in find_files(source)]


def _key(card: ModelCard, source: str) -> str:
    """What the weights of a file depend on: its content, and the architecture that they are brought onto."""
    content: object
    if is_remote(source):
        found = _remote(source)
        content = [found.uri, found.size, found.tag]
    else:
        content = digest_of(find_files(source))
    return sha256(canonical_json({"version": _VERSION, "card": card.model_dump(mode="json"), "content": content}))


def _remembered(path: Path) -> str | None:
    """The sha256 of the weights that a file came to; None where that is not known."""
    try:
        return str(without_checksum(path.read_bytes())["weights_sha256"])
    except (OSError, ValueError, KeyError):
        return None


def _loaded(card: ModelCard, source: str, cache_root: Path) -> tuple[nn.Module, list[str]]:
    """The module with the file's weights, in eval mode, and what was done to them."""
    shapes = check_memory(card)
    with _at_hand(source, cache_root) as files:
        parts = read_parts(files)
        if isinstance(card.model, recipe.HuggingFaceModel):
            wanted = {name: torch.empty(shape, device="meta") for name, shape in (shapes or {}).items()}
            module, notes = _of_huggingface(card, card.model, parts, wanted, source)
        elif isinstance(card.model, recipe.HuggingFaceLm):
            wanted = {name: torch.empty(shape, device="meta") for name, shape in (shapes or {}).items()}
            module, notes = _of_huggingface_lm(card, card.model, parts, wanted, source)
        else:
            module, notes = _of_names(card, parts, source)
    if card.blocks is None:
        check_output(module.eval(), card)
    return module.eval(), notes


def _of_names(card: ModelCard, parts: dict[str, Tensors], source: str) -> tuple[nn.Module, list[str]]:
    """A module whose weights go by the names that it has itself."""
    module = build(card, seed=0)
    fit, elsewhere = best_fit(parts, weights_of(module).state_dict())
    notes = load_fit(module, fit, card, source)
    return module, described(fit, elsewhere) + notes


def _of_huggingface(
    card: ModelCard, spec: recipe.HuggingFaceModel, parts: dict[str, Tensors], wanted: Tensors, source: str
) -> tuple[nn.Module, list[str]]:
    """A module of transformers, which knows its names of before, and which of them may be missing."""
    fit, elsewhere = best_fit(parts, wanted)
    state = {name.removeprefix("model."): tensor for name, tensor in fit.state.items()}
    notes = check_values(state, state, source, becoming=(torch.float64, torch.float16, torch.bfloat16))
    with torch.random.fork_rng(devices=[]):
        module = Classifier(huggingface.body_of_state(spec, interface_of(card), state), card)
    return module, _told_of_huggingface(fit, elsewhere) + notes


def _of_huggingface_lm(
    card: ModelCard, spec: recipe.HuggingFaceLm, parts: dict[str, Tensors], wanted: Tensors, source: str
) -> tuple[nn.Module, list[str]]:
    """A causal language model of transformers, in the same way."""
    assert card.blocks is not None
    fit, elsewhere = best_fit(parts, wanted)
    state = {name.removeprefix("model."): tensor for name, tensor in fit.state.items()}
    notes = check_values(state, state, source, becoming=(torch.float64, torch.float16, torch.bfloat16))
    with torch.random.fork_rng(devices=[]):
        module = huggingface_lm.body(spec, card.blocks, state=state)
        huggingface_lm.look_into(module.eval(), spec.label)
    return module, _told_of_huggingface(fit, elsewhere) + notes


def _told_of_huggingface(fit: Fit, elsewhere: list[str]) -> list[str]:
    return [line for line in described(fit, elsewhere) if "`model.` was put" not in line]


def _check_class_names(card: ModelCard, rows: Rows, source: str) -> None:
    """Refuse a fine-tuned model of other classes than the data have, where both have names."""
    if isinstance(card.model, recipe.HuggingFaceModel) and card.task == "classification":
        names = huggingface.names_of_classes(card.model)
        if names is not None and len(names) == card.classes:
            card.model_copy(update={"class_names": names}).check_rows(rows, f"the model in {source}")


@contextlib.contextmanager
def _at_hand(source: str, cache_root: Path) -> Iterator[list[Path]]:
    """The files of a checkpoint on this machine: what lies in object storage is fetched while it is read."""
    if not is_remote(source):
        yield find_files(source)
        return
    remote = _remote(source)
    cache_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=cache_root) as folder:
        path = Path(folder, remote.name)
        with remote.open() as reading, open(path, "wb") as writing:
            while block := reading.read(_CHUNK):
                writing.write(block)
        yield find_files(path)


def _remote(uri: str) -> RemoteFile:
    found = find_file(uri)
    if found is None:
        raise RefusedError(
            f"there is no checkpoint {uri}",
            got="no object of that name",
            expected="one file: safetensors, or a torch state dict",
            next="name the file itself; a folder in object storage is not looked through",
        )
    return found


def _changed(source: str) -> RefusedError:
    return RefusedError(
        f"the checkpoint {source} was written while it was read",
        got="other content than when it was looked at",
        expected="a file that nobody writes to",
        next="run the same command again once it is whole",
    )
