"""What `plan` prints: what encodings of a teacher's logits take, and how well each describes it."""

from typing import Any

from akd_dist.documents.base import Count, Document, Share


class AtTemperature(Document):
    """What an encoding says at one temperature, beside the teacher: means over targets."""

    temperature: float
    kl: float | None
    """KL divergence of the teacher's probabilities from those that are decoded, nats; null where it is infinite."""
    total_variation: float | None
    """Half the sum of absolute differences of probabilities."""
    unigram_error: float | None
    """Error of the gradient in the logits, over the gradient, at a student that says the mean of all targets."""
    other_error: float | None
    """The same at a student that says what the teacher says of another target."""
    unigram_hidden_error: float | None = None
    """The first behind the teacher's output layer; left out where there is no linear one."""
    other_hidden_error: float | None = None
    """The second there."""
    mass_error: float | None = None
    """Of the tail's mass, mean absolute error; left out where none is stored."""


class PlannedEncoding(Document):
    """One encoding: what it takes, and its card."""

    name: str
    """In words."""
    encoding: dict[str, Any] | None
    """What `cache.encoding` would say; null of what other systems store, which is here to be compared."""
    bytes_per_target: Count
    bytes: Count
    """Of all splits and views, without checksums."""
    own: bool
    """Whether it is the recipe's."""
    dominated: bool
    """Whether another one, that `cache.encoding` can name, takes no more bytes and describes no worse."""
    error: float
    """The mean of its gradients' errors over all temperatures, behind the output layer where there is a linear one: by
    this encodings are compared."""
    agreement: Share
    """Share of targets whose first class is known."""
    unexplained: float | None
    """Share of the energy of centred logits that is left over: what stage I by squared error does not see."""
    at: list[AtTemperature]


class EncodingsDocument(Document):
    """What `akd-dist plan --json` prints."""

    classes: Count
    """Logits of a target."""
    targets: Count
    """Of all splits and views."""
    rows_measured: Count
    targets_measured: Count
    """On which the figures rest."""
    temperatures: list[float]
    """1, and those that the recipe's students ask for."""
    encodings: list[PlannedEncoding]
    """By bytes, the smallest first."""
    budget: Count | None
    """Bytes that all stores together may take, as `--budget` said."""
    chosen: str | None
    """The name of the one that describes best within the budget; null without one."""
    line: str | None
    """What to put under `cache:` for it."""
    warnings: list[str]
    """Temperatures at which the recipe's own encoding describes the teacher badly."""
