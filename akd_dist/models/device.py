"""The device that a process computes on, and everything that makes its results the same each time."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from akd_dist.base.errors import MachineError
from akd_dist.models.uncompiled import use_deterministic_algorithms
from akd_dist.recipe import Precision

# cuBLAS is deterministic only with a workspace of fixed size; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_deterministic(device: str, threads: int) -> torch.device:
    """Fix what could change the last bits of a result in this process: threads, algorithms, precision of products.

    Args:
        device: `cpu` or `cuda`, as the recipe says.
        threads: CPU threads of this process.

    Raises:
        MachineError: the recipe asks for a GPU, and this process sees none.
    """
    torch.set_num_threads(threads)
    use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time
    if device == "cuda":
        _check_gpu()
        # Benchmarking chooses kernels by a race, and so may choose others the next time.
        torch.backends.cudnn.benchmark = False
        # TF32 keeps ten bits of a fraction, so float32 would not be float32, and results would depend on the card.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


def device_name(device: str) -> str:
    """The kind of device as stores remember it: `cpu`, or `cuda:` and the card's name.

    Raises:
        MachineError: the recipe asks for a GPU, and this process sees none.
    """
    if device != "cuda":
        return device
    _check_gpu()
    return f"cuda:{torch.cuda.get_device_name()}"


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take of a device's memory, as far as the system knows."""
    if device.type != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), left_in_container(Path("/sys/fs/cgroup")))


def left_in_container(cgroup: Path) -> int:
    """Bytes that are left of a container's own limit of memory, by its folder of cgroup v2; endless without one."""
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # What is used includes caches of files, which the kernel gives back when memory is wanted.
        return sys.maxsize if limit == "max" else int(limit) - int(used) + int(counts["file"])
    except (OSError, ValueError, KeyError):
        return sys.maxsize


def gpus_of(device: str) -> int:
    """GPUs that a process on this device occupies."""
    return int(device == "cuda")


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's generators that computing on a device draws from: the CPU's, then the GPU's; uint8 [n]."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.cuda.get_rng_state(device)]


def set_generator_states(device: torch.device, states: list[torch.Tensor]) -> None:
    """Bring torch's generators to states that `generator_states` returned."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.cuda.set_rng_state(states[1], device)


def weights_dtype(precision: Precision) -> torch.dtype:
    """The dtype that weights are kept in: float64 where all is float64, else float32."""
    return torch.float64 if precision == "float64" else torch.float32


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The block in which products are computed in half precision, where the recipe says so."""
    if precision in ("bfloat16", "float16"):
        return torch.autocast(device.type, dtype=getattr(torch, precision))
    return contextlib.nullcontext()


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise MachineError(
            "the recipe computes on a GPU, and there is none here",
            got="no CUDA device that torch can use",
            expected="an NVIDIA GPU, its driver, and a torch built for CUDA",
            next="set device: cpu in the recipe (--set device=cpu), or run where there is a GPU",
        )
