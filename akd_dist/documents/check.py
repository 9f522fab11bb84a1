"""What a model from elsewhere says of rows whose labels are known, before its logits are stored."""

from akd_dist.documents.base import Count, Document, Share


class TeacherCheck(Document):
    """How far a teacher that no recipe trained agrees with labels; what has no meaning for its task is null."""

    name: str = "the teacher"
    """Which teacher: of an ensemble, which member."""
    rows: Count
    """Validation rows that it was asked of; of a language model, tokens."""
    accuracy: Share | None = None
    """Share of them where its first class is the label."""
    cross_entropy: float | None = None
    """Of a language model: its mean cross-entropy of these tokens, in nats."""
    correlation: float | None = None
    """Of a regression: Pearson's correlation of its values with the labels."""
    warnings: list[str] = []
    """What to look at, where it knows hardly anything of the labels."""

    @property
    def line(self) -> str:
        """That in a line, for people."""
        rows = f"{self.rows:,} validation rows" if self.rows != 1 else "1 validation row"
        if self.cross_entropy is not None:
            return (
                f"{self.name} chooses {self.accuracy or 0:.1%} of {self.rows:,} next tokens of validation rows, "
                f"cross-entropy {self.cross_entropy:.3f}"
            )
        if self.accuracy is not None:
            return f"{self.name} chooses the label of {self.accuracy:.1%} of {rows}"
        if self.correlation is not None:
            return f"the values of {self.name} correlate with the labels of {rows} by {self.correlation:.3f}"
        return f"the values of {self.name}, or the labels, are the same for all of {rows}: nothing can be said of it"
