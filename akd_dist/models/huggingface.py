"""Hugging Face sequence classification: a config.json -> a card's configuration -> a module, with pretrained weights.

The extra `akd-dist[huggingface]` is imported only inside functions. Nothing that comes with a model is executed: no
remote code, no attention kernels by name, and weights only as safetensors.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.text import Tokens, tokenizer_of
from akd_dist.models.huggingface_config import (
    CONFIG,
    WEIGHTS,
    Interface,
    bad_config,
    by_data,
    check_tokens,
    configuration,
    kept,
    no_folder,
    parse_config,
    quiet,
)


class SequenceClassifier(nn.Module):
    """A transformers model on ids of tokens: the attention mask is where ids are not padding."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of ids int32 [n, length], or [n, 2, length] with token types in the second row."""
        ids, *types = [inputs] if inputs.dim() == 2 else inputs.unbind(dim=1)
        extra = {"token_type_ids": types[0].long()} if types else {}
        mask = (ids != self.padding).long()
        logits: torch.Tensor = self.model(input_ids=ids.long(), attention_mask=mask, return_dict=True, **extra).logits
        return logits


def content(spec: recipe.HuggingFaceModel | recipe.HuggingFaceLm) -> str | None:
    """sha256 over what a spec takes from its folder: configuration and, where pretrained, weights. None for the hub.

    Raises:
        RefusedError: the folder has no configuration.
    """
    if spec.path is None:
        return None
    digest = hashlib.sha256()
    weights = sorted(Path(spec.path).glob("*.safetensors")) if spec.pretrained else []
    try:
        for path in [Path(spec.path) / CONFIG, *weights]:
            with open(path, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    except OSError as error:
        raise no_folder(spec, error) from error
    return digest.hexdigest()


def body(spec: recipe.HuggingFaceModel, asked: Interface, *, pretrained: bool = False) -> nn.Module:
    """The module of a resolved spec.

    Args:
        spec: as `resolve` gives it.
        asked: what the data asks of it.
        pretrained: load the weights that lie in its folder or at the hub, as far as the spec asks for them; a new head
            is drawn from torch's generator. Otherwise all weights are.

    Raises:
        RefusedError: the configuration makes no model, texts are too long for it, or weights are missing or of another
            shape; names them.
    """
    config = configuration(spec.config, spec.label)
    _check_inputs(spec, config, asked)
    model_class = _model_class(config)
    if pretrained and spec.pretrained:
        place = spec.path or spec.name
        model, info = load_pretrained(model_class, config, spec.label, place, use_safetensors=True)
        _check_loaded(info, spec.label, model.base_model_prefix, new_head=True)
    else:
        with quiet():
            model = model_class._from_config(config, dtype=torch.float32)
    return SequenceClassifier(model, asked.tokens.padding)


def trained_body(spec: recipe.HuggingFaceModel, asked: Interface, weights: bytes) -> nn.Module:
    """The module of a resolved spec with all its weights, head included, from the bytes of a safetensors file.

    Raises:
        RefusedError: as `body`; or the head is missing, as in models that were only pretrained.
    """
    try:
        state = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise _unreadable(spec.label, error) from error
    return body_of_state(spec, asked, state)


def body_of_state(spec: recipe.HuggingFaceModel, asked: Interface, state: dict[str, torch.Tensor]) -> nn.Module:
    """The module of a resolved spec with all its weights, head included, by the names that transformers gives them.

    Raises:
        RefusedError: as `trained_body`.
    """
    config = configuration(spec.config, spec.label)
    model, info = load_pretrained(_model_class(config), config, spec.label, None, state_dict=state)
    _check_loaded(info, spec.label, model.base_model_prefix, new_head=False)
    return SequenceClassifier(model, asked.tokens.padding)


def load_pretrained(
    model_class: Any, config: Any, label: str, place: str | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with weights, in float32, and what was found of them.

    Raises:
        RefusedError: they cannot be read.
    """
    try:
        with quiet():
            loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
                place,
                config=config,
                dtype=torch.float32,
                # Shapes are compared by `_check_loaded`, which knows a head from the rest; transformers would refuse
                # either.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:
        raise _unreadable(label, error) from error
    return loaded


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def _check_loaded(info: dict[str, Any], label: str, prefix: str, *, new_head: bool) -> None:
    """Refuse weights that are not there or have another shape. A pooler belongs to the head: it is trained with it."""

    def forgiven(name: str) -> bool:
        return new_head and (not name.startswith(f"{prefix}.") or ".pooler." in name)

    missing = sorted(name for name in info["missing_keys"] if not forgiven(name))
    other = sorted(
        f"{name} {list(there)} instead of {list(here)}"
        for name, there, here in info["mismatched_keys"]
        if not forgiven(name)
    )
    if not missing and not other:
        return
    found = [f"{what}: {some(names)}" for what, names in (("missing", missing), ("of another shape", other)) if names]
    if new_head:
        but, advice = " but its head", "check `path` or `name`, and `config`"
    else:
        but, advice = ", its head included", f"fine-tune it first, or let the recipe do it:\n{recipe_lines('...')}"
    raise RefusedError(
        f"the weights of {label} do not fit its configuration",
        got="; ".join(found),
        expected=f"a weight for every part of the model{but}",
        next=advice,
    )


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _check_inputs(spec: recipe.HuggingFaceModel, config: Any, asked: Interface) -> None:
    length, most = asked.input_shape[-1], _positions(config, spec.label)
    if most is not None and length > most:
        raise RefusedError(
            f"the model {spec.label} does not take texts of this length",
            got=f"{length} tokens",
            expected=f"at most {most}",
            next=f"set data.text.length to {most} or less",
        )
    if len(asked.input_shape) == 2 and getattr(config, "type_vocab_size", 0) < 2:
        raise RefusedError(
            f"the model {spec.label} takes no token types",
            got=f"inputs of shape {list(asked.input_shape)}, ids and token types",
            expected="ids alone",
            next="use the model's own tokenizer as data.text",
        )


def _positions(config: Any, label: str) -> int | None:
    """The longest text that a model was made for, None where it does not say.

    In models of RoBERTa's kind the positions of tokens come after the one of padding.

    Raises:
        RefusedError: the configuration makes no model; found here because a model without numbers costs nothing.
    """
    try:
        with quiet(), torch.device("meta"):
            model = _model_class(config)._from_config(config)
    except Exception as error:
        raise bad_config(label, error) from error
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    most: int | None = getattr(config, "max_position_embeddings", None)
    return most


def describe_folder(folder: Path, document: bytes) -> tuple[recipe.HuggingFaceModel, Interface, tuple[str, ...] | None]:
    """What a folder with a fine-tuned model and its tokenizer is for: resolved spec, interface, names of classes.

    Args:
        folder: where config.json, model.safetensors and the tokenizer's files lie.
        document: the content of its config.json.

    Raises:
        RefusedError: the tokenizer is missing, or the configuration makes no model of classification or regression.
    """
    found = parse_config(document, folder / CONFIG)
    spec = recipe.HuggingFaceModel(path=folder.name)
    config = configuration(kept(found) | {"num_labels": _labels(found)}, spec.label)
    tokens, types = _tokenizer(folder)
    check_tokens(spec, config, tokens)
    length = _positions(config, spec.label)
    if length is None:
        raise RefusedError(
            f"{folder} does not tell how long texts may be",
            got=f"a {found['model_type']}, which has no longest text",
            expected="a model with positions, such as BERT or RoBERTa",
            next=f"let the recipe name its architecture:\n{recipe_lines(str(folder))}",
        )
    classes, kind = config.num_labels, found.get("problem_type")
    if kind == "multi_label_classification" or (kind == "regression" and classes > 1):
        raise RefusedError(
            f"{folder} has a model of another task",
            got=f"{kind} with {classes} labels, as its {CONFIG} says",
            expected="one class of several, or one number",
            next="choose another teacher",
        )
    task: recipe.Task = "regression" if kind == "regression" or classes == 1 else "classification"
    asked = Interface((2, length) if types else (length,), classes, task, tokens)
    whole = kept(found) | by_data(asked)
    return spec.model_copy(update={"config": whole}), asked, _class_names(found, classes)


def names_of_classes(spec: recipe.HuggingFaceModel) -> tuple[str, ...] | None:
    """The names of the classes in order, as the folder of a fine-tuned model has them; None where it has none.

    Raises:
        RefusedError: its configuration is not one.
    """
    if spec.path is None or not (path := Path(spec.path) / CONFIG).is_file():
        return None
    found = parse_config(path.read_bytes(), path)
    return _class_names(found, _labels(found))


def _labels(found: Mapping[str, Any]) -> int:
    """The number of classes; transformers writes their names only, and no names where there are two unnamed ones.

    Raises:
        RefusedError: it is no number of classes.
    """
    names = found.get("id2label")
    number = len(names) if isinstance(names, dict) else found.get("num_labels", 2)
    if type(number) is not int or number < 1:
        raise RefusedError(
            f"{CONFIG} does not say how many classes the model has",
            got=f"num_labels: {number!r}",
            expected="a whole number, 1 or more",
            next="correct it, or copy the folder again",
        )
    return number


def _class_names(found: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """The names of the classes in order; None where they are the ones that transformers makes up."""
    names = found.get("id2label")
    if not isinstance(names, dict) or classes == 1:
        return None
    ordered = tuple(str(names.get(str(number))) for number in range(classes))
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(ordered)) else ordered


def _tokenizer(folder: Path) -> tuple[Tokens, bool]:
    """What a folder's tokenizer makes: its tokens, and whether token types come with them."""
    try:
        if not (folder / "tokenizer_config.json").exists():  # without it transformers makes up an empty tokenizer
            raise FileNotFoundError("no tokenizer_config.json")
        with quiet():
            tokenizer = tokenizer_of(recipe.HuggingFaceText(path=str(folder)), pair=False)
    except (OSError, RefusedError) as error:
        raise RefusedError(
            f"{folder} has no tokenizer, so nobody knows what its ids mean",
            got=error,
            expected=f"the tokenizer's files beside {CONFIG}",
            next="save it there (tokenizer.save_pretrained), or let the recipe train the teacher:\n"
            + recipe_lines(str(folder)),
        ) from error
    return tokenizer.tokens, len(tokenizer.shape) == 2


def recipe_lines(path: str) -> str:
    """How a recipe fine-tunes a pretrained model as its teacher."""
    return (
        f"    teacher:\n      model: {{kind: huggingface, path: {path}}}\n"
        "      train: {epochs: 3, batch: 32, optimizer: {kind: adamw, lr: 2e-5, schedule: {kind: linear}}}"
    )


def _unreadable(label: str, error: Exception) -> RefusedError:
    return RefusedError(
        f"the weights of {label} cannot be read",
        got=f"{type(error).__name__}: {error}",
        expected=f"{WEIGHTS}; pickles (pytorch_model.bin) are never unpickled",
        next="where you trust it, load the model yourself and save it with model.save_pretrained",
    )
