"""Text: strings -> arrays of token ids, all of one length."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Tokens(BaseModel):
    """What models and views need to know of token ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: int
    """Ids are 0 to vocabulary - 1."""
    padding: int
    """The id that fills inputs up to their length; attention leaves it out."""
    mask: int | None = None
    """The id that stands for a hidden token; None if the tokenizer has none."""
    special: tuple[int, ...] = ()
    """Ids that are never masked, padding among them."""
