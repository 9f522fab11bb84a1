"""How a teacher is run for a store, where the recipe asks for another way than torch's own: layout and compilation."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from torch import nn

from akd_dist.models.device import weights_dtype
from akd_dist.recipe import CacheSpec

COMPILERS = ("c++", "triton")
"""Names by which stores remember what compiled their teacher."""


def prepared(module: nn.Module, cache: CacheSpec, device: str, cache_root: Path) -> nn.Module:
    """A module in eval mode, as a store's logits are computed with it: moved and converted in place, then compiled.

    Args:
        cache: its precision, layout, and whether it is compiled.
        device: `cpu` or `cuda`.
        cache_root: compiled code is kept under it, for this user's other processes. It is made when a batch is first
            seen, anew for each shape.
    """
    module = module.to(torch.device(device), weights_dtype(cache.precision)).eval()
    if cache.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not cache.compile:
        return module
    import torch._inductor.config as inductor

    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler learns it, too

    # Not the temporary folder that all users of a machine share: what is found there is run.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_root.absolute() / "compiled")
    inductor.compile_threads = 1  # no pool of processes beside those of Ray
    return cast(nn.Module, torch.compile(module, dynamic=False))


def has_images(module: nn.Module) -> bool:
    """Whether a layout of images changes anything: whether a module has weights of four dimensions."""
    return any(parameter.dim() == 4 for parameter in module.parameters())


@functools.cache
def compiled_by(device: str) -> dict[str, str]:
    """What compiles a module here, by name and version: another one may change the last bits. Empty without one.

    Args:
        device: `cpu` or `cuda`.
    """
    if device == "cuda":
        try:
            return {"triton": metadata.version("triton")}
        except metadata.PackageNotFoundError:
            return {}
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return {}
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    version = (said.stdout.splitlines() or ["unknown"])[0]
    return {"c++": f"{version}, {torch.backends.cpu.get_cpu_capability()}"}
