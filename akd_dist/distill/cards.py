"""The card of an encoding of a teacher: what it costs and how well it describes, on some targets of some rows.

`cache-teacher` measures that of its own encoding and seals it; `plan` compares several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from akd_dist.distill.capture import Captured, capture, capture_logits
from akd_dist.distill.dictionary import HiddenProbe, Probe
from akd_dist.distill.fidelity import AtTemperature, Card, measure_fidelity
from akd_dist.distill.output_head import parts
from akd_dist.distill.sparse import SparseTargets, TailDictionary
from akd_dist.distill.target_teacher import TargetTeacher
from akd_dist.distill.teacher_targets import Targets
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.top_k import Described, TopK

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
"""At which a store's card is measured: the same for all recipes, since recipes of other students find the same."""
MEASURED = 384
"""Targets that a card is measured on, evenly spaced among those of its rows."""
MEASURED_ROWS = 32
"""Rows that these targets are taken from; more where so few rows have fewer targets. The teacher sees each whole."""
MOST_DIVERGENCE = 0.5
"""KL in nats, and total variation, above which users are warned of what students would be taught."""
MOST_MASS = 0.01
"""Mean error of the tail's mass above which a temperature should be among those that are stored."""
_DIGITS = 5


def card_of(teacher: TargetTeacher, numbers: np.ndarray, top_k: TopK, dictionary: Dictionary) -> dict[str, Any]:
    """The card of a store's encoding, as it is sealed: a pure function of the store's inputs.

    Args:
        numbers: rows that it is measured on.
    """
    probe = teacher.probe(numbers)
    tensors = tail_dictionary(dictionary, top_k, teacher.device)
    stored = stored_targets(probe, chosen(probe), top_k, tensors, teacher.chunk)
    measured = measure(probe, {"store": stored}, TEMPERATURES, teacher)
    return plain_card(measured["store"], len(stored))


def measure(
    probe: Probe,
    candidates: Mapping[str, Targets],
    temperatures: Iterable[float],
    teacher: TargetTeacher,
    done: Callable[[int], None] = lambda targets: None,
) -> dict[str, Card]:
    """The cards of several encodings of the probe's chosen targets; `done` as of `measure_fidelity`."""
    given: dict[str, Any] = {"head": teacher.head, "chunk": teacher.chunk, "done": done}
    return measure_fidelity(probe, candidates, tuple(temperatures), numbers=chosen(probe), **given)


def chosen(probe: Probe) -> torch.Tensor:
    """Numbers of the targets that are measured, int64."""
    count = min(len(probe), MEASURED)
    return torch.linspace(0, len(probe) - 1, count, dtype=torch.float64).round().long().to(probe.device)


def stored_targets(
    probe: Probe, numbers: torch.Tensor, top_k: TopK, dictionary: TailDictionary, chunk: int
) -> SparseTargets:
    """Targets of a probe as a store has them, rounding and all."""
    found = captured_of(probe, numbers, top_k.k, top_k.tail_temperatures, dictionary, chunk)
    arrays = top_k.pack(Described(**found.arrays()), probe.classes)
    tensors = {name: torch.from_numpy(array).to(probe.device) for name, array in arrays.items()}
    return SparseTargets.of(tensors, top_k, dictionary)


def captured_of(
    probe: Probe,
    numbers: torch.Tensor,
    k: int,
    temperatures: Iterable[float],
    dictionary: TailDictionary | None,
    chunk: int,
) -> Captured:
    """What there is to store of targets of a probe, before it is rounded."""
    given: dict[str, Any] = {"k": k, "temperatures": tuple(temperatures), "classes": probe.classes}
    if isinstance(probe, HiddenProbe) and probe.head.linear:
        return capture(probe.h[numbers], probe.head, dictionary, chunk=chunk, **given)
    found = [capture_logits(probe.logits(numbers[part]), dictionary, **given) for part in parts(0, len(numbers), chunk)]
    fields = ("ids", "values", "mean", "tail", "coefficients")
    return Captured(*(torch.cat([getattr(one, name) for one in found]) for name in fields))


def tail_dictionary(dictionary: Dictionary, top_k: TopK, device: torch.device) -> TailDictionary:
    """A dictionary as it describes targets on a device: of its stored arrays, rounded as they are."""
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in dictionary.arrays().items()}
    return TailDictionary.of(arrays, top_k.tail_temperatures, device)


def bytes_of(top_k: TopK, classes: int) -> int:
    """Bytes of one target."""
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in top_k.arrays(classes).values())


# ---- as JSON


def plain_card(card: Card, targets: int) -> dict[str, Any]:
    """A card as manifests and documents have it: what is infinite is null."""
    return {
        "targets": targets,
        "agreement": _short(card.agreement),
        "unexplained": _short(card.unexplained),
        "at": [plain_at(one) for one in card.at],
    }


def plain_at(one: AtTemperature) -> dict[str, Any]:
    """What a card says of one temperature; errors behind the head are left out where there is no linear one."""
    return {name: _short(value) for name, value in vars(one).items() if value is not None}


def _short(value: float) -> float | None:
    """As many digits as mean something."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


# ---- what training says of it


def fidelity_warnings(card: Mapping[str, Any] | None, temperatures: Iterable[float]) -> list[str]:
    """A line for each temperature at which a store describes its teacher badly.

    Args:
        card: the `fidelity` of its manifest; None where nothing was measured.
        temperatures: those that a student asks for.
    """
    if card is None:
        return []
    lines = []
    for temperature in sorted(set(temperatures)):
        kl, distance = (_between(card["at"], name, temperature) for name in ("kl", "total_variation"))
        if kl > MOST_DIVERGENCE or distance > MOST_DIVERGENCE:
            lines.append(
                f"at temperature {temperature:g} the store describes its teacher badly: KL {kl:.2f} nats, total "
                f"variation {distance:.2f}, on {card['targets']} targets; `akd-dist plan RECIPE` shows what other "
                "encodings take"
            )
    return lines


def mass_warnings(card: Mapping[str, Any] | None) -> list[str]:
    """A line for each temperature of a card that lies too far from those at which the tail's mass is stored."""
    return [
        f"at temperature {one['temperature']:g} the tail's mass is off by {one['mass_error']:.3f} on average, as it is "
        "interpolated between cache.encoding.tail_temperatures: put this temperature among them, at 2 bytes a target"
        for one in ([] if card is None else card["at"])
        if (one.get("mass_error") or 0.0) > MOST_MASS
    ]


def _between(at: list[dict[str, Any]], name: str, temperature: float) -> float:
    """A figure of a card at any temperature, linear in 1 / T between those that were measured."""
    known = sorted((1 / one["temperature"], math.inf if one[name] is None else one[name]) for one in at)
    places, values = zip(*known, strict=True)
    return float(np.interp(1 / temperature, places, values))
