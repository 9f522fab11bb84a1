"""The optional Hugging Face libraries, and their hub where one can be reached. Nothing from there is ever executed."""

import importlib
import importlib.metadata
from typing import Any, Literal

from akd_dist.base.errors import MachineError, RefusedError

HUB_SECONDS = 5.0
"""How long to wait for the hub; the libraries themselves would try for most of a minute."""


def require_extra(module: str) -> Any:
    """An optional library of the extra `huggingface`.

    Raises:
        RefusedError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RefusedError(
            f"this recipe needs the library {module}",
            got=error,
            expected="akd-dist with its extra `huggingface`",
            next="pip install 'akd-dist[huggingface]'",
        ) from error


def version_of(library: str) -> str:
    """The version of a library of the extra, without importing it.

    Raises:
        RefusedError: as `require_extra`.
    """
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return str(require_extra(library).__version__)


def reach(kind: Literal["dataset", "model"], name: str) -> None:
    """Ask the hub for a dataset or a model (a tokenizer is one) before a library starts to retry for long.

    With HF_HUB_OFFLINE set nobody is asked: the libraries then look into their own caches.

    Raises:
        RefusedError: the hub answers that it has none of that name, or none for this user.
        MachineError: it cannot be reached.
    """
    hub = require_extra("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE:
        return
    api = hub.HfApi()
    try:
        (api.dataset_info if kind == "dataset" else api.model_info)(name, timeout=HUB_SECONDS)
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError) as error:
        raise RefusedError(
            f"the hub has no {kind} {name} for you",
            got=str(error).strip().partition("\n")[0],
            expected="a name as in owner/name, public or readable with your token",
            next="correct `name` in the recipe, or log in with `hf auth login`",
        ) from error
    except Exception as error:  # of whichever HTTP library it uses
        raise unreachable(kind, name, error) from error


def unreachable(kind: str, name: str, error: Exception) -> MachineError:
    """The hub did not give what was asked for."""
    return MachineError(
        f"the {kind} {name} cannot be had from the hub",
        got=str(error).strip().partition("\n")[0] or type(error).__name__,
        expected="a network that reaches it, or HF_HUB_OFFLINE=1 with the files in the library's own cache",
        next="save it to a folder on a machine that reaches the hub, and give `path` instead of `name`",
    )
