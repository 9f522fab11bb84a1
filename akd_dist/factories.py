"""Code of the user's own, named in a recipe as `module:function`: models, data and augmentations."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from akd_dist.storage.errors import RefusedError
from akd_dist.storage.files import sha256

# What akd-dist itself brings: no place for a factory, and some of it fetches and runs code (torch.hub:load).
_LIBRARIES = {
    *("akd_dist", "click", "datasets", "huggingface_hub", "joblib", "matplotlib", "numpy", "pandas", "pip", "pyarrow"),
    *("ray", "safetensors", "scipy", "setuptools", "sklearn", "timm", "tokenizers", "torch", "torchmetrics"),
    *("transformers", "zarr"),
}


def import_factory(name: str, signature: str) -> Callable[..., object]:
    """The function that `module:function` names. Never one of Python or of our libraries, which a model could abuse.

    Its folder must be on `sys.path` (see `models.add_folder`), or its package installed.

    Args:
        name: as the recipe has it.
        signature: what the function should look like, for messages: `(input_shape, classes, ...) -> torch.nn.Module`.

    Raises:
        RefusedError: no such module or function, or the module fails to import; its exception is shown whole.
    """
    module_name, _, function = name.partition(":")
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names or top in _LIBRARIES:
        whose = "Python itself" if top in sys.stdlib_module_names else "a library of akd-dist's"
        raise RefusedError(f"{name} is not a factory", got=f"a module of {whose}", expected="a module of your own")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "\0")
        raise RefusedError(
            f"the factory {name} cannot be imported",
            got=error if missing else whole(error),
            expected=f"a module {module_name} that imports",
            next=f"put {module_name.partition('.')[0]}.py beside the recipe, or name its place with `folder:`",
        ) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        names = [one for one in vars(module) if not one.startswith("_")]
        raise RefusedError(
            f"the module {module_name} has no function {function}",
            got=", ".join(difflib.get_close_matches(function, names)) or "no similar name",
            expected=f"def {function}{signature}",
            next="correct `factory` in the recipe, or write that function",
        )
    return factory  # type: ignore[no-any-return]


def source_of(name: str, signature: str) -> Path | None:
    """The file of the module that `module:function` names, which stands for its code; None where it has none.

    Raises:
        RefusedError: as `import_factory`.
    """
    import_factory(name, signature)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return None if file is None else Path(file)


def source_sha256(name: str, signature: str) -> str | None:
    """sha256 of the file that a factory lies in; None where its module has none.

    Raises:
        RefusedError: as `import_factory`.
    """
    file = source_of(name, signature)
    return None if file is None else sha256(file.read_bytes())


def call_factory(name: str, signature: str, arguments: Mapping[str, Any]) -> object:
    """What the function that `module:function` names returns for these keyword arguments.

    Raises:
        RefusedError: as `import_factory`; or the function fails, and its exception is shown whole.
    """
    factory = import_factory(name, signature)
    try:
        return factory(**arguments)
    except (Exception, SystemExit) as error:  # whose code would be taken for one of ours
        raise RefusedError(f"the factory {name} failed", got=whole(error), expected=f"a function{signature}") from error


def whole(error: BaseException) -> str:
    """An exception of the user's own code with its traceback, as they need it to find their mistake."""
    return "".join(traceback.format_exception(error)).rstrip()
