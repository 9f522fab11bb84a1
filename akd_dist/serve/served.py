"""A finished model, opened for use: where it lies, what it was made for, and how it computes."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.trusted import Trusted
from akd_dist.distill.losses import at_least_float32
from akd_dist.documents.fleet import Metrics
from akd_dist.documents.use import EvaluatedModel
from akd_dist.models.build import num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, device_name, set_deterministic, weights_dtype
from akd_dist.models.folder import NOBODY, read_model
from akd_dist.models.uncompiled import use_deterministic_algorithms
from akd_dist.serve.examples import Home


@dataclass(frozen=True)
class Served:
    """A model folder, opened for use."""

    home: Home
    """Its folder, and the recipe of its run."""
    module: nn.Module
    """In eval mode, on its device: raw inputs [n, *shape] -> logits [n, classes]."""
    card: ModelCard
    """What it was made for."""
    precision: recipe.Precision
    """What it computes with: as in its run; elsewhere the precision of its weights."""
    threads: int
    """CPU threads, as in its run; elsewhere 1."""
    device: torch.device
    """Where it computes."""

    def logits(self, inputs: np.ndarray) -> torch.Tensor:
        """Logits [n, classes] of raw inputs [n, *shape], float32 or float64, on its device."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            # Copied, since torch warns of tensors over memory that is read-only, as a memory map is.
            logits: torch.Tensor = self.module(torch.from_numpy(np.array(inputs)).to(self.device))
        return at_least_float32(logits)

    def measured(self, metrics: Mapping[str, float]) -> EvaluatedModel:
        """The model with its metrics; one that is not finite is left out, since JSON has no infinite numbers."""
        return EvaluatedModel(
            path=self.home.uri,
            model=self.card.model.label,
            parameters=num_parameters(self.module),
            fingerprint=self.card.fingerprint,
            precision=self.precision,
            metrics=Metrics(**{name: value for name, value in metrics.items() if math.isfinite(value)}),
        )


def open_model(uri: str, device: recipe.Device = "cpu", trusted: Trusted = NOBODY) -> Served:
    """A model for use, computing as it did in its run where it lies in one: `<run>/students/<student>`.

    Args:
        uri: a model folder, absolute or `s3://`; or a local folder with a fine-tuned Hugging Face model.
        device: `cpu` or `cuda`.
        trusted: which factories may be imported for it. The recipe of its run has no say in that.

    Raises:
        RefusedError, DamagedError: as `models.folder.load_model`.
        RecipeError: the recipe of its run cannot be read.
        MachineError: there is no such device.
    """
    device_name(device)  # a missing GPU is told first
    run = _run_of(uri)
    if run is not None:  # it says where trusted modules may lie
        trusted = trusted.seen_from(trusted.named_by, run.folder)
    module, card = read_model(uri, trusted)
    known = {student.name: student for student in run.students} if run is not None else {}
    student = known.get(Path(uri).name)
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    precision = student.precision if student else "float64" if double else "float32"
    placed = torch.device(device)
    module = module.to(placed, weights_dtype(precision))
    return Served(Home(uri, run), module, card, precision, student.threads if student else 1, placed)


def _run_of(uri: str) -> recipe.Recipe | None:
    """The recipe of the run that a model folder lies in; None where it lies in none."""
    folder = Path(uri)
    path = folder.parent.parent / "recipe.yaml"
    if "://" in uri or folder.parent.name != "students" or not path.is_file():
        return None
    return recipe.load_recipe(path)


@contextlib.contextmanager
def as_in_training(model: Served) -> Iterator[None]:
    """Threads and algorithms as where the model was trained; afterwards as they were in this process."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_deterministic(model.device.type, model.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
