"""Configurations of transformers models: read, checked, kept whole in the card, and never a key that would run code."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from akd_dist import recipe
from akd_dist.base.errors import AkdError, RefusedError, is_limit, limit_reached
from akd_dist.base.files import parse_json
from akd_dist.data import hub
from akd_dist.data.text import Tokens
from akd_dist.models.architectures import check_numbers

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# What the data decides, what is no architecture, and what would load code or weights from elsewhere.
_LEFT_OUT = {
    "architectures",
    "attn_implementation",
    "attribute_map",
    "auto_map",
    "dtype",
    "experts_implementation",
    "fusion_config",
    "id2label",
    "kernel_config",
    "label2id",
    "name_or_path",
    "num_labels",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
    "use_kernels",
}
_BY_DATA = ("num_labels", "problem_type")


@dataclass(frozen=True)
class Purpose:
    """What a model of transformers is for, and which types of models there are for it."""

    mapping: str
    """The name of transformers' own table, from types of models to classes."""
    cannot: str
    """What to say of a model that is for something else."""
    task: str
    """What transformers calls it."""
    such_as: str
    """Types of models that are for it."""
    instead: str
    """What to do."""


CLASSIFIES = Purpose(
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "cannot classify text",
    "sequence classification",
    "bert or roberta",
    "choose another model; for a class of your own, choose kind: custom",
)
CONTINUES = Purpose(
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "is no causal language model",
    "causal language models",
    "llama or gpt2",
    "choose another model",
)


@dataclass(frozen=True)
class Interface:
    """What the data asks of a model."""

    input_shape: tuple[int, ...]
    """[length], or [2, length] with token types."""
    classes: int
    """Number of logits."""
    task: recipe.Task
    """What they are."""
    tokens: Tokens
    """What ids mean."""


def resolve(spec: recipe.HuggingFaceModel, asked: Interface) -> recipe.HuggingFaceModel:
    """The spec with its whole configuration in it, from its folder or the hub, so that a card needs neither again.

    Raises:
        RefusedError: there is no configuration, it is not of sequence classification, or does not fit the tokens; or
            transformers is not installed.
        MachineError: the hub cannot be reached.
    """
    config = changed_config(spec, CLASSIFIES) | by_data(asked)
    check_tokens(spec, configuration(config, spec.label), asked.tokens)
    return spec.model_copy(update={"config": config})


def changed_config(spec: recipe.HuggingFaceModel | recipe.HuggingFaceLm, purpose: Purpose) -> dict[str, Any]:
    """The configuration in a spec's folder or on the hub, with the changes that the spec asks for.

    Raises:
        RefusedError, MachineError: as `resolve`.
    """
    found = _read_config(spec)
    defaults = _config_class(found, spec.label, purpose)()
    names: dict[str, str] = getattr(defaults, "attribute_map", {})
    changes = {names.get(key, key): value for key, value in spec.config.items()}
    _check_changes(spec, changes, {*defaults.to_dict(), *found})
    return kept(found) | changes


def by_data(asked: Interface) -> dict[str, Any]:
    """What the data decides of a configuration."""
    kind = "regression" if asked.task == "regression" else "single_label_classification"
    return {"num_labels": asked.classes, "problem_type": kind}


def _read_config(spec: recipe.HuggingFaceModel | recipe.HuggingFaceLm) -> dict[str, Any]:
    """config.json as it is."""
    if spec.path is not None:
        path = Path(spec.path) / CONFIG
        try:
            return parse_config(path.read_bytes(), path)
        except OSError as error:
            raise no_folder(spec, error) from error
    assert spec.name is not None
    hub.reach("model", spec.name)
    try:
        with quiet():
            found: dict[str, Any] = hub.require_extra("transformers").PretrainedConfig.get_config_dict(spec.name)[0]
    except Exception as error:
        raise hub.unreachable("model", spec.name, error) from error
    return found


def parse_config(document: bytes, where: object) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        RefusedError: it is not JSON, or names no model type.
    """
    try:
        found = parse_json(document)
    except ValueError as error:
        raise RefusedError(f"{where} is not JSON", got=error, expected=f"a {CONFIG} of transformers") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise RefusedError(
            f"{where} does not say what model it is of",
            got=f"no `model_type` in {str(found)[:80]}",
            expected=f"a {CONFIG} of transformers",
        )
    return found


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what is left out, at any depth."""
    return {
        key: kept(value) if isinstance(value, dict) else value for key, value in config.items() if not _left_out(key)
    }


def _left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.startswith("_")


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def _check_changes(
    spec: recipe.HuggingFaceModel | recipe.HuggingFaceLm, changes: Mapping[str, Any], known: set[str]
) -> None:
    for key in changes:
        if _left_out(key) or key == "model_type" or key not in known:
            usable = sorted(name for name in known if not _left_out(name))
            raise RefusedError(
                f"config of the model {spec.label} has a key that cannot be set",
                got=key,
                expected=", ".join(difflib.get_close_matches(key, usable)) or f"a key of its {CONFIG}",
                next="correct it, or leave it out: labels, classes and dtype are taken from the data and the recipe",
            )


def check_tokens(spec: recipe.HuggingFaceModel, config: Any, tokens: Tokens) -> None:
    """Refuse ids that the model would take for others than the tokenizer meant."""
    theirs = f"{tokens.vocabulary} tokens with padding {tokens.padding}"
    size, padding = getattr(config, "vocab_size", 0), getattr(config, "pad_token_id", None)
    if size < tokens.vocabulary or padding != tokens.padding:
        raise RefusedError(
            f"the model {spec.label} was made for another tokenizer",
            got=f"{size} tokens with padding {padding}, as its {CONFIG} says",
            expected=f"{theirs}, as the tokenizer makes them",
            next="use the model's own tokenizer as data.text; where pretrained is false, "
            f"config: {{vocab_size: {tokens.vocabulary}, pad_token_id: {tokens.padding}}} will do",
        )


def _config_class(config: Mapping[str, Any], label: str, purpose: Purpose) -> Any:
    """The class of a configuration, which must be one that transformers itself has a model of this purpose for."""
    hub.require_extra("transformers")
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, kinds = str(config.get("model_type")), getattr(modeling_auto, purpose.mapping)
    if kind not in kinds or kind not in CONFIG_MAPPING:
        raise RefusedError(
            f"the model {label} {purpose.cannot}",
            got=f"model_type {kind}",
            expected=f"a model type that transformers has {purpose.task} for, such as "
            + (", ".join(difflib.get_close_matches(kind, kinds)) or purpose.such_as),
            next=purpose.instead,
        )
    return CONFIG_MAPPING[kind]


def configuration(config: Mapping[str, Any], label: str, purpose: Purpose = CLASSIFIES) -> Any:
    """A card's configuration as transformers has it.

    Raises:
        RefusedError: it has a key that could load code, or values that do not go together.
    """
    unsafe = [key for key in _keys(config) if _left_out(key) and key not in _BY_DATA]
    if unsafe or "quantization_config" in config:
        raise RefusedError(
            f"the configuration of the model {label} has keys that are not taken",
            got=", ".join(unsafe or ["quantization_config"]),
            expected="the plain architecture: no code, no quantisation",
        )
    check_numbers(config, f"config.json of the model {label}: settings")
    config_class = _config_class(config, label, purpose)
    try:
        with quiet():
            return config_class.from_dict(dict(config))
    except Exception as error:
        raise bad_config(label, error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and reports: what matters of them is checked here, and told by refusals."""
    logging = hub.require_extra("transformers").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def no_folder(spec: recipe.HuggingFaceModel | recipe.HuggingFaceLm, error: OSError) -> AkdError:
    """What to say of a folder that holds no configuration."""
    if is_limit(error):
        return limit_reached(error)
    return RefusedError(
        f"there is no {CONFIG} in {spec.path}",
        got=error.strerror or error,
        expected=f"a folder that save_pretrained wrote: {CONFIG}, and {WEIGHTS} where pretrained",
        next="correct `path`; for a model of the hub, use `name`",
    )


def bad_config(label: str, error: Exception) -> RefusedError:
    """What to say of a configuration that transformers makes no model of."""
    return RefusedError(
        f"the configuration of the model {label} makes no model",
        got=f"{type(error).__name__}: {error}",
        expected="values that go together",
        next="correct `config` in the recipe",
    )
