"""Text continued by a language model, token by token: greedy or drawn, by a seed, until it ends or is long enough.

    for token in generate(model, ids, Sampling(tokens=50)):
        ...

Keys and values of the tokens before are kept, so a token costs one step of the model whatever stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.models.language import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    tokens: int = 100
    """The most tokens to make."""
    temperature: float = 0.0
    """What logits are divided by before one is drawn; 0 takes the most likely."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int = 0
    """Of the draws."""
    end: int | None = None
    """The id that ends the text, which is not made; None goes on."""

    def __post_init__(self) -> None:
        """Wrong numbers are told at once.

        Raises:
            RecipeError: names the number.
        """
        for name, value, fits, expected in (
            ("tokens", self.tokens, self.tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more; 0 takes the most likely"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, and at most 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not fits:
                raise RecipeError(f"no text can be generated so: {name}", got=value, expected=expected)


def generate(model: LanguageModel, ids: Sequence[int], how: Sampling, vocabulary: int) -> Iterator[int]:
    """The tokens that follow others, one by one; the same ones from the same seed.

    Args:
        model: in eval mode.
        ids: the tokens before, at least one.
        how: how to choose.
        vocabulary: ids are below; further rows of an output layer are padding, and never chosen.

    Raises:
        RefusedError: there is no token to begin with, one is unknown, or the whole is longer than the model's
            positions reach.
    """
    _check(model, ids, how, vocabulary)
    device = model.output_weight.device
    draws = torch.Generator().manual_seed(how.seed)
    given, cache = torch.tensor([list(ids)], dtype=torch.int64, device=device), None
    for _ in range(how.tokens):
        logits, cache = _step(model, given, cache)
        token = chosen(logits[:vocabulary].float().cpu(), how, draws)
        if token == how.end:
            return
        yield token
        given = torch.tensor([[token]], dtype=torch.int64, device=device)


def _step(model: LanguageModel, given: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """One step; modes are entered anew, since a generator runs in those of whoever asks for the next token."""
    with torch.inference_mode():
        return model.continued(given, cache)


def chosen(logits: torch.Tensor, how: Sampling, draws: torch.Generator) -> int:
    """The id of the next token, of its logits float32 [vocabulary] on the CPU; of ties the smallest."""
    if how.temperature == 0:
        return int(logits.argmax())
    ordered, order = torch.softmax(logits / how.temperature, dim=0).sort(descending=True, stable=True)
    # A token is kept where those before it do not have enough yet, so there is always one.
    kept = ordered.cumsum(0) - ordered < how.top_p
    return int(order[torch.multinomial(ordered * kept, 1, generator=draws)])


def _check(model: LanguageModel, ids: Sequence[int], how: Sampling, vocabulary: int) -> None:
    if not ids:
        raise RefusedError(
            "there is nothing to continue",
            got="a prompt of no tokens",
            expected="one token or more",
            next="write a word with --prompt",
        )
    beyond = [number for number in ids if not 0 <= number < vocabulary]
    if beyond:
        raise RefusedError(
            "the prompt has a token that the model does not know",
            got=f"id {beyond[0]}",
            expected=f"ids 0 to {vocabulary - 1}",
            next="choose the tokenizer that the model was trained with",
        )
    most = model.most_positions
    if most is not None and len(ids) + how.tokens > most:
        raise RefusedError(
            "the text would be longer than the model's positions reach",
            got=f"{len(ids):,} tokens of the prompt and {how.tokens:,} more",
            expected=f"at most {most:,} in all",
            next=f"shorten the prompt, or set --tokens to {max(most - len(ids), 0)} or less",
        )
