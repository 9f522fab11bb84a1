"""What language models have in common: packed blocks in, hidden states and the output layer out, logits on request.

A block is int32 [3, length]: ids of tokens; segments, the number of the document that a token is of; and scored, 1
where the next token is a target, which is a matter of losses and not of models. Logits at a position are about the next
token. Losses and stores never want all logits at once, so they take `hidden` and `output_weight` and go in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError

CHANNELS = 3
"""Of a block: ids, segments, scored."""


class Blocks(BaseModel):
    """What a language model takes: how blocks are packed, and which tokenizer their ids come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: Annotated[int, Field(ge=1, le=10**7)]
    """Tokens of a block."""
    vocabulary: recipe.Classes
    """Ids are 0 to vocabulary - 1: the tokenizer's last id plus one."""
    tokenizer: str = ""
    """The tokenizer's fingerprint; empty where nobody knows it."""
    attention: recipe.Attention = "document"
    """Whether attention and positions start anew at every document of a block."""
    end_of_text: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """The id that ends a document, and generated text; None where there is none."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of one block: [3, length]."""
        return (CHANNELS, self.length)

    def in_words(self) -> str:
        """For refusals and exports."""
        known = f" of tokenizer {self.tokenizer[:12]}" if self.tokenizer else ""
        return f"blocks of {self.length} tokens, ids 0 to {self.vocabulary - 1}{known}, attention: {self.attention}"


class LanguageModel(nn.Module, ABC):
    """Blocks int32 [n, 3, length] -> hidden states, by which the output layer gives logits of the next token.

    Row i of `hidden(blocks) @ output_weight.T` are the logits, up to rounding, where `head_refusal` is None. An output
    layer may have more rows than there are tokens (it is padded to a round number): who uses it cuts
    `output_weight[:vocabulary]`.
    """

    attention: recipe.Attention
    head_refusal: str | None = None
    """Why logits are not hidden states times the output layer, such as softcapping; None where they are."""
    most_positions: int | None = None
    """The longest text that positions reach to; None where there is no end."""

    @abstractmethod
    def hidden(self, blocks: torch.Tensor) -> torch.Tensor:
        """States [n, length, d] of blocks int32 [n, 3, length], behind the last norm, for the output layer."""

    @property
    @abstractmethod
    def output_weight(self) -> torch.Tensor:
        """The output layer [V_s, d], through which gradients flow; of a tied model its embeddings."""

    @abstractmethod
    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Logits [n, length, V_s] of blocks int32 [n, 3, length]; float32 under autocast."""

    @abstractmethod
    def continued(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits [V_s] of the token after ids int64 [1, m], which follow those of a cache; and the new cache."""

    @abstractmethod
    def gradient_checkpointing_enable(self, on: bool = True) -> None:
        """While training, keep states between blocks of layers alone and compute the others again going backward."""

    @property
    def linear_head(self) -> bool:
        """Whether logits are hidden states times the output layer."""
        return self.head_refusal is None


def starts_of(segments: torch.Tensor) -> torch.Tensor:
    """Where the document of each position begins, int64 [n, length], of segments [n, length]."""
    places = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(first, places, 0).cummax(dim=1).values


def positions_of(starts: torch.Tensor) -> torch.Tensor:
    """Positions int64 [n, length] that start anew at every document, of its starts [n, length]."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def document_mask(starts: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool [n, 1, length, length]: a position those before it in its own document, and itself."""
    same = starts[:, :, None] == starts[:, None, :]
    return (same & same.new_ones(same.shape[1:]).tril()).unsqueeze(1)


def as_blocks(ids: torch.Tensor) -> torch.Tensor:
    """Ids [n, length] as blocks int32 [n, 3, length] of one document each, with all but the last token scored."""
    ids = ids.to(torch.int32)
    scored = torch.ones_like(ids)
    scored[:, -1] = 0
    return torch.stack([ids, torch.zeros_like(ids), scored], dim=1)


def plain_logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, length, V_s] of ids [n, length], each row one document."""
    logits: torch.Tensor = model(as_blocks(ids))
    return logits


def check_linear_head(model: LanguageModel, what: str) -> None:
    """Refuse a model whose logits are not hidden states times the output layer.

    Args:
        what: who needs them to be, at the beginning of the message.

    Raises:
        RefusedError: says what stands between.
    """
    if model.head_refusal is not None:
        raise RefusedError(
            f"{what} needs logits that are hidden states times the output layer",
            got=model.head_refusal,
            expected="a plain linear output layer, such as Llama's or GPT-2's",
            next="choose another model, or one that computes from logits",
        )
