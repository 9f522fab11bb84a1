"""`top_k` targets decoded to probabilities at any temperature from the first stored one on, in NumPy and float64.

For tests, commands and readers elsewhere: an array of targets x classes is made, which training never does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import RefusedError
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.top_k import Described, TopK

Doubles = npt.NDArray[np.float64]
_SAME = 1e-9  # temperatures are quotients, and may miss a stored one by their last bits
_TINY = float(np.finfo(np.float32).tiny)


def probabilities(top_k: TopK, described: Described, dictionary: Dictionary, temperature: float) -> Doubles:
    """The teacher's probabilities at a temperature as the store has them, float64 [n, V]; each row sums up to 1.

    Exact on the stored classes, up to the bits of their logits and of the tail's mass; elsewhere the tail's mass is
    spread as `tail_logits` says.

    Raises:
        RefusedError: the temperature is below the first stored one.
    """
    classes = len(dictionary.mean_logit)
    mass = tail_mass(top_k, described, classes, temperature)
    stored = np.zeros((len(described), classes), bool)
    np.put_along_axis(stored, described.ids, True, axis=1)
    weights = tail_logits(top_k, described, dictionary, temperature)
    weights = np.where(stored, -np.inf, weights)
    found = _softmax(weights) * mass[:, None] if classes > top_k.k else np.zeros_like(weights)
    head = _softmax(described.values.astype(np.float64) / temperature) * (1 - mass)[:, None]
    np.put_along_axis(found, described.ids, head, axis=1)
    return found


def tail_logits(top_k: TopK, described: Described, dictionary: Dictionary, temperature: float) -> Doubles:
    """The log-weights of all classes in the tail, up to a constant of each target, float64 [n, V].

    z-bar + m + U c, never above the smallest stored logit, over T, plus the calibration; above the last stored
    temperature, and without one, its residuals correct it instead. At rank 0 the logarithm of the prior.
    """
    _check_temperature(top_k, temperature)
    if top_k.rank == 0:
        return np.broadcast_to(_log_prior(top_k, dictionary, temperature), (len(described), len(dictionary.mean_logit)))
    assert dictionary.basis is not None and dictionary.residual_mean is not None  # noqa: PT018 -- see Dictionary.check
    assert dictionary.residual_variance is not None
    spread = described.coefficients.astype(np.float64) @ dictionary.basis.astype(np.float64).T
    logits = described.mean.astype(np.float64)[:, None] + dictionary.mean_logit.astype(np.float64) + spread
    smallest = described.values[:, -1:].astype(np.float64)
    calibration = _calibration(top_k, dictionary, temperature)
    if calibration is not None:
        return np.minimum(logits, smallest) / temperature + calibration
    variance = dictionary.residual_variance.astype(np.float64)
    corrected = logits + dictionary.residual_mean.astype(np.float64) + variance / (2 * temperature)
    return np.minimum(corrected, smallest) / temperature


def tail_mass(top_k: TopK, described: Described, classes: int, temperature: float) -> Doubles:
    """The probability of all classes that are not stored, float64 [n].

    Raises:
        RefusedError: the temperature is below the first stored one.
    """
    _check_temperature(top_k, temperature)
    if classes == top_k.k:
        return np.zeros(len(described))
    values = described.values.astype(np.float64)
    head = np.log(np.exp((values - values[:, :1]) / temperature).sum(axis=1))
    curve = tail_curve(top_k, described, classes, 1 / temperature)
    mass: Doubles = 1 / (1 + np.exp(head - curve))
    return mass


def tail_curve(top_k: TopK, described: Described, classes: int, b: float) -> Doubles:
    """The log of the sum of exp(b (z - max z)) over the tail, float64 [n], for b = 1 / T.

    It is smooth and convex in b. What is stored are its values at the stored temperatures; at b = 0 its value is
    log(V - k), and its slope the tail's mean less the largest logit. Newton's polynomial goes through all of these.
    """
    values, tail = described.values.astype(np.float64), described.tail.astype(np.float64)
    others = classes - top_k.k
    mean = (classes * described.mean.astype(np.float64) - values.sum(axis=1)) / others
    slope = np.minimum(mean, values[:, -1]) - values[:, 0]  # a rounded mean may put the tail above the head
    at_zero = np.full(len(described), np.log(others))
    nodes = [0.0, 0.0, *(1 / one for one in top_k.tail_temperatures)]
    return _newton(nodes, [at_zero, at_zero, *tail.T], slope, b)


def _newton(nodes: Sequence[float], values: Sequence[Doubles], slope: Doubles, b: float) -> Doubles:
    """The polynomial through values at nodes, the first two of which are the same: its slope there is given."""
    table, found, product = list(values), values[0], 1.0
    for order in range(1, len(nodes)):
        table = [
            slope if nodes[i] == nodes[i + order] else (table[i + 1] - table[i]) / (nodes[i + order] - nodes[i])
            for i in range(len(nodes) - order)
        ]
        product *= b - nodes[order - 1]
        found = found + table[0] * product
    return found


def _calibration(top_k: TopK, dictionary: Dictionary, temperature: float) -> Doubles | None:
    """That of a temperature, float64 [V]: linear in 1 / T between the stored ones; None beyond them."""
    if dictionary.tail_calibration is None or temperature > top_k.tail_temperatures[-1] + _SAME:
        return None
    return _between(
        [1 / one for one in top_k.tail_temperatures], dictionary.tail_calibration.astype(np.float64), 1 / temperature
    )


def _log_prior(top_k: TopK, dictionary: Dictionary, temperature: float) -> Doubles:
    """The logarithm of the prior, float64 [V]: linear in 1 / T between the stored ones, and to a uniform one at 0."""
    assert dictionary.tail_prior is not None  # see Dictionary.check
    prior = np.log(np.maximum(dictionary.tail_prior.astype(np.float64), _TINY))
    uniform = np.full((1, prior.shape[1]), -np.log(prior.shape[1]))
    nodes = [*(1 / one for one in top_k.tail_temperatures), 0.0]
    return _between(nodes, np.concatenate([prior, uniform]), 1 / temperature)


def _between(nodes: Sequence[float], table: Doubles, b: float) -> Doubles:
    """A row of a table [nodes, V], linear between its nodes, which descend."""
    after = min(max(1, int(np.searchsorted(-np.asarray(nodes), -b))), len(nodes) - 1)
    if len(nodes) == 1:
        only: Doubles = table[0]
        return only
    share = (nodes[after - 1] - b) / (nodes[after - 1] - nodes[after])
    found: Doubles = table[after - 1] * (1 - share) + table[after] * share
    return found


def _softmax(logits: Doubles) -> Doubles:
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Doubles = found / found.sum(axis=1, keepdims=True)
    return result


def _check_temperature(top_k: TopK, temperature: float) -> None:
    first = top_k.tail_temperatures[0]
    if not (math.isfinite(temperature) and temperature >= first - _SAME):
        raise RefusedError(
            f"the store says nothing of its teacher at temperature {temperature:g}",
            got=f"T = {temperature:g}",
            expected=f"T of {first:g} or more, the first of its tail_temperatures",
            next="choose a higher temperature, or encoding float16, which serves any",
        )
