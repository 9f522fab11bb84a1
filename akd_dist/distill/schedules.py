"""The schedules as pure functions: temperatures and what follows from them by the epoch, learning rates by the step."""

import math

from akd_dist.base.errors import RecipeError
from akd_dist.recipe import Cosine, Linear, Schedule, Steps


def temperature(i: int, n: int, tau_max: int) -> int:
    """T_i = max(1, tau_max - floor((i - 1) * tau_max / n)): the temperature of epoch i = 1..n of stage I.

    It starts at tau_max, falls in steps as even as whole epochs allow, and always lands on 1. Where tau_max divides n
    it equals the schedule of the authors' code (Jafari et al., EACL 2021), which overshoots elsewhere.

    Raises:
        RecipeError: n < tau_max, where the temperature could not reach 1.
    """
    _check_reaches_one(n, tau_max, "stage1_epochs")
    return max(1, tau_max - (i - 1) * tau_max // n)


def continuation_temperature(i: int, n: int, tau_max: int) -> int:
    """The temperature of epoch i = 1..n of Continuation-KD: it falls by 1 every k = floor(n / tau_max) epochs, to 1.

    T_i = max(1, tau_max - floor((i - 1) / k)). Where tau_max does not divide n, the epochs left over have T = 1 too.

    Raises:
        RecipeError: n < tau_max, where the temperature could not reach 1.
    """
    _check_reaches_one(n, tau_max, "epochs")
    return max(1, tau_max - (i - 1) // (n // tau_max))


def _check_reaches_one(n: int, tau_max: int, name: str) -> None:
    if n < tau_max:
        raise RecipeError(
            "there are too few epochs for the temperatures",
            got=f"{name} = {n}, tau_max = {tau_max}",
            expected=f"{name} at least tau_max: every temperature from tau_max to 1 needs an epoch",
            next=f"raise {name} or lower tau_max",
        )


def phi(temperature: int, tau_max: int) -> float:
    """Phi(T) = 1 - (T - 1) / tau_max, the paper's annealing function: from 1 / tau_max at T = tau_max to 1 at T = 1."""
    return 1 - (temperature - 1) / tau_max


def psi(i: int, ramp: int, until: int) -> float:
    """psi_i = min(1, i / ramp) up to epoch i = `until` and 1 after it: the weight of the labels in Continuation-KD.

    In the paper's settings (arXiv 2212.05998) ramp = until = 150 for CIFAR, and ramp = 40, until = 20 for GLUE.
    """
    return min(1.0, i / ramp) if i <= until else 1.0


def learning_rate(base: float, schedule: Schedule, step: int, total: int) -> float:
    """The learning rate of a 0-based step in a stage of `total` steps."""
    match schedule:
        case Steps():
            drops = sum(step >= share * total for share in schedule.at)
            return float(base * schedule.factor**drops)
        case Linear() | Cosine():
            rising = schedule.warmup * total
            if step < rising:
                return base * (step + 1) / (math.floor(rising) + 1)
            done = (step - rising) / (total - rising)
            return base * (1 - done) if isinstance(schedule, Linear) else base * (1 + math.cos(math.pi * done)) / 2
        case _:
            return base
