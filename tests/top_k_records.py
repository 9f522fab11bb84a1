"""Records of `top_k` stores for tests: packed by plain NumPy, number by number, and decoded in float64 the long way."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from akd_dist.distill.sparse import SparseTargets, TailDictionary

TEMPERATURES = (1.0, 4 / 3, 2.0)


@dataclass(frozen=True)
class Packing:
    """An encoding, as far as its arrays depend on it."""

    k: int
    rank: int
    value_bits: int = 6
    tail_temperatures: tuple[float, ...] = TEMPERATURES


def pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of some bits each, from the low end of each row of bytes on: one big integer a row."""
    size = -(-numbers.shape[1] * bits // 8)
    rows = [sum(int(number) << (bits * at) for at, number in enumerate(row)) for row in numbers]
    return np.array([list(row.to_bytes(size, "little")) for row in rows], np.uint8).reshape(len(numbers), size)


def pack(targets: SparseTargets, packing: Packing) -> dict[str, Tensor]:
    """The arrays of a store, of targets as they were before rounding."""
    ids, values = targets.ids.numpy(), targets.values.double().numpy()
    mean = targets.mean.numpy().astype(np.float16)
    arrays = {"mean": mean}
    if packing.k:
        top = np.stack([values[:, 0] - mean.astype(float), values[:, 0] - values[:, -1]], 1).astype(np.float16)
        arrays |= {"ids": (ids & 0xFFFF).astype(np.uint16), "top": top}
        if (high := (targets.classes - 1).bit_length() - 16) > 0:
            arrays["ids_high"] = pack_bits(ids >> 16, high)
        gaps = values[:, :1] - values[:, 1:]
        if packing.value_bits == 16:
            arrays["gaps"] = gaps.astype(np.float16)
        elif packing.k > 1:
            most = 2**packing.value_bits - 1
            scale = np.maximum(top[:, 1:].astype(float), 1e-12)
            arrays["gaps"] = pack_bits(np.clip(np.rint(gaps / scale * most), 0, most), packing.value_bits)
    arrays["tail"] = np.rint(np.maximum(targets.tail.double().numpy(), -32) * 1024).astype(np.int16)
    if packing.rank:
        arrays["coefficients"] = np.clip(np.rint(targets.coefficients.numpy() * 25.6), -128, 127).astype(np.int8)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def random_dictionary(classes: int, rank: int, seed: int = 0, *, calibrated: bool = False) -> TailDictionary:
    """Random numbers of every kind, in float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    basis = normal(classes, rank)
    return TailDictionary(
        mean_logit=2 * normal(classes), basis=basis, residual_mean=0.1 * normal(classes),
        residual_variance=normal(classes).square(), temperatures=TEMPERATURES,
        tail_prior=torch.softmax(normal(3, classes), 1),
        tail_calibration=0.3 * normal(3, classes) if calibrated else normal(0, classes),
    )  # fmt: skip


def exact_targets(z: Tensor, k: int, dictionary: TailDictionary, coefficients: Tensor) -> SparseTargets:
    """Nothing rounded: head, mean and curve of dense logits z [n, V] in float64."""
    values, ids = torch.topk(z, k, dim=1)
    rest = z.scatter(1, ids, -math.inf) - z.amax(1, keepdim=True)
    tail = torch.stack([torch.logsumexp(rest / T, 1) for T in TEMPERATURES], 1)
    return SparseTargets(ids, values, z.mean(1), tail, coefficients, TEMPERATURES, dictionary)


def decoded(targets: SparseTargets, temperature: float, mass: Tensor) -> Tensor:
    """p of targets with a tail of that mass, [n, V], class by class as the formulas have it."""
    shared, T = targets.dictionary, temperature
    head = torch.softmax(targets.values / T, 1) * (1 - mass)[:, None]
    if targets.coefficients.shape[1] == 0:
        tail = shared.tail_prior[TEMPERATURES.index(T)].expand(len(mass), -1)
    else:
        z = targets.mean[:, None] + shared.mean_logit + targets.coefficients @ shared.basis.T
        smallest = targets.values[:, -1:] if targets.k else torch.full((1, 1), math.inf, dtype=z.dtype)
        if len(shared.tail_calibration) and T in TEMPERATURES:
            x = torch.minimum(z, smallest) / T + shared.tail_calibration[TEMPERATURES.index(T)]
        else:
            x = torch.minimum(z + shared.residual_mean + shared.residual_variance / (2 * T), smallest) / T
        tail = (x - x.amax(1, keepdim=True)).exp()
    tail = tail.scatter(1, targets.ids, 0.0)
    return (tail / tail.sum(1, keepdim=True).clamp_min(1e-300) * mass[:, None]).scatter(1, targets.ids, head)
