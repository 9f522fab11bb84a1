"""What a model from elsewhere says of rows whose labels are known, before its logits are stored."""

from typing import Literal

from akd_dist.documents.base import Count, Document, Share


class TeacherCheck(Document):
    """How far a teacher that no recipe trained agrees with labels; what has no meaning for its task is null."""

    name: str = "the teacher"
    """Which teacher: of an ensemble, which member."""
    rows: Count
    """How many of `asked_of` it was asked of."""
    asked_of: Literal["rows", "tokens"] = "rows"
    """Validation rows; or of a language model the next tokens of these."""
    accuracy: Share | None = None
    """Share of them where the class, or token, that it finds likeliest is the label, or the next token."""
    cross_entropy: float | None = None
    """Of a language model: its mean cross-entropy of these tokens, in nats."""
    correlation: float | None = None
    """Of a regression: Pearson's correlation of its values with the labels."""
    warnings: list[str] = []
    """What to look at, where it knows hardly anything of the labels."""

    @property
    def line(self) -> str:
        """That in a line, for people."""
        if self.asked_of == "tokens":
            return self._of_tokens
        rows = f"{self.rows:,} validation rows" if self.rows != 1 else "1 validation row"
        if self.accuracy is not None:
            return f"{self.name} chooses the label of {self.accuracy:.1%} of {rows}"
        if self.correlation is not None:
            return f"the values of {self.name} correlate with the labels of {rows} by {self.correlation:.3f}"
        return f"the values of {self.name}, or the labels, are the same for all of {rows}: nothing can be said of it"

    @property
    def _of_tokens(self) -> str:
        tokens = f"{self.rows:,} next tokens" if self.rows != 1 else "1 next token"
        if self.accuracy is None:
            return f"{self.name} was asked for no next token: the validation rows have none to learn"
        told = "" if self.cross_entropy is None else f", cross-entropy {self.cross_entropy:.3f}"
        return f"{self.name} chooses {self.accuracy:.1%} of {tokens} of the validation rows{told}"
