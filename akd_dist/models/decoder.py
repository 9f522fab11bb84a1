"""The built-in language model: a decoder of RMSNorm, rotary positions and SwiGLU, whose weights are Llama's by name.

Its state dict is that of `LlamaForCausalLM` but for the prefix `model.`, with the same conventions (rotation of halves,
query and key in float32 or as autocast has them, no biases), so that it is exported as one without a change of numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # its usual name
from torch.utils.checkpoint import checkpoint

from akd_dist import recipe
from akd_dist.models.language import Blocks, LanguageModel, document_mask, positions_of, starts_of

EPSILON = 1e-5
"""Of every norm."""
ROTARY_BASE = 10_000.0
"""Of the wavelengths of rotary positions."""
_SPREAD = 0.02  # standard deviation of first weights, as in GPT-2


@dataclass
class KeyValues:
    """Keys and values [1, heads, m, head width] of the tokens before, one pair a layer, filled in place."""

    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens they are of."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def joined(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, with those of the next tokens behind them."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            before = self.layers[layer]
            self.layers[layer] = (torch.cat([before[0], key], 2), torch.cat([before[1], value], 2))
        return self.layers[layer]


@dataclass(frozen=True)
class _Seen:
    """What attention needs besides states: rotations [.., length, head width], who sees whom, and the tokens before."""

    cosine: torch.Tensor
    sine: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    before: KeyValues | None = None


class CausalDecoder(LanguageModel):
    """See the module. Linear layers and embeddings start normal with standard deviation 0.02, those that end a branch
    smaller by the root of the number of branches, as in GPT-2; dropout, where asked for, is on branches and embeddings.
    """

    frequencies: torch.Tensor

    def __init__(self, spec: recipe.CausalLm, blocks: Blocks) -> None:
        super().__init__()
        self.attention, self.checkpointing = blocks.attention, False
        self.embed_tokens = nn.Embedding(blocks.vocabulary, spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(DecoderLayer(spec, number) for number in range(spec.depth))
        self.norm = nn.RMSNorm(spec.width, eps=EPSILON)
        self.lm_head = None if spec.tied else nn.Linear(spec.width, blocks.vocabulary, bias=False)
        size = spec.width // spec.heads
        frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        self.register_buffer("frequencies", frequencies, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=_SPREAD / math.sqrt(2 * spec.depth) if ends_branch else _SPREAD)

    def hidden(self, blocks: torch.Tensor) -> torch.Tensor:
        """States [n, length, width] of blocks int32 [n, 3, length], behind the last norm."""
        ids, length = blocks[:, 0], blocks.shape[2]
        if self.attention == "block":
            positions = torch.arange(length, device=ids.device).unsqueeze(0)
            return self._states(ids, self._seen(positions, None))
        starts = starts_of(blocks[:, 1])
        return self._states(ids, self._seen(positions_of(starts), document_mask(starts)))

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer [vocabulary, width]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Logits [n, length, vocabulary] of blocks int32 [n, 3, length]; float32 under autocast."""
        return F.linear(self.hidden(blocks), self.output_weight).to(self.output_weight.dtype)

    def continued(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits [vocabulary] of the token after ids int64 [1, m], which follow those of the cache; the cache."""
        before: KeyValues = KeyValues() if cache is None else cache
        if before.tokens and ids.shape[1] > 1:  # one by one: a mask that begins in the middle is not worth its code
            _, before = self.continued(ids[:, :-1], before)
            ids = ids[:, -1:]
        positions = before.tokens + torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        seen = self._seen(positions, None, before)
        last = self._states(ids, seen)[0, -1]
        return F.linear(last, self.output_weight), before

    def gradient_checkpointing_enable(self, on: bool = True) -> None:
        """While training, keep the states between layers alone, and compute what is within them again backward."""
        self.checkpointing = on

    def _seen(self, positions: torch.Tensor, mask: torch.Tensor | None, before: KeyValues | None = None) -> _Seen:
        angles = positions.unsqueeze(-1) * self.frequencies
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        causal = mask is None and not (before is not None and before.tokens)
        return _Seen(angles.cos(), angles.sin(), mask, causal, before)

    def _states(self, ids: torch.Tensor, seen: _Seen) -> torch.Tensor:
        states = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            if self.checkpointing and self.training:
                states = checkpoint(layer, states, seen, use_reentrant=False)
            else:
                states = layer(states, seen)
        normed: torch.Tensor = self.norm(states)
        return normed


class DecoderLayer(nn.Module):
    """Self-attention, then a gated layer; each normalised before and added to what comes in."""

    def __init__(self, spec: recipe.CausalLm, number: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.width, eps=EPSILON)
        self.self_attn = SelfAttention(spec, number)
        self.post_attention_layernorm = nn.RMSNorm(spec.width, eps=EPSILON)
        self.mlp = GatedLayer(spec)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, states: torch.Tensor, seen: _Seen) -> torch.Tensor:
        """States [n, length, width] of states [n, length, width]."""
        states = states + self.dropout(self.self_attn(self.input_layernorm(states), seen))
        after: torch.Tensor = states + self.dropout(self.mlp(self.post_attention_layernorm(states)))
        return after


class SelfAttention(nn.Module):
    """Attention with rotary positions; several heads may share keys and values."""

    def __init__(self, spec: recipe.CausalLm, number: int) -> None:
        super().__init__()
        self.number, self.size, self.share = number, spec.width // spec.heads, spec.dropout
        shared = (spec.key_value_heads or spec.heads) * self.size
        self.q_proj = nn.Linear(spec.width, spec.width, bias=False)
        self.k_proj = nn.Linear(spec.width, shared, bias=False)
        self.v_proj = nn.Linear(spec.width, shared, bias=False)
        self.o_proj = nn.Linear(spec.width, spec.width, bias=False)

    def forward(self, states: torch.Tensor, seen: _Seen) -> torch.Tensor:
        """Mixed states [n, length, width] of states [n, length, width]."""
        value = self._heads(self.v_proj(states))
        query = _turned(self._heads(self.q_proj(states)), seen).to(value.dtype)
        key = _turned(self._heads(self.k_proj(states)), seen).to(value.dtype)
        if seen.before is not None:
            key, value = seen.before.joined(self.number, key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(
            query, key, value, seen.mask, dropout_p=self.share if self.training else 0.0, is_causal=seen.causal
        )
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """[n, length, heads x size] as [n, heads, length, size]."""
        return states.view(*states.shape[:2], -1, self.size).transpose(1, 2)


class GatedLayer(nn.Module):
    """SwiGLU (Shazeer, 2020): a linear layer whose units are gated by another's."""

    def __init__(self, spec: recipe.CausalLm) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.width, spec.units, bias=False)
        self.up_proj = nn.Linear(spec.width, spec.units, bias=False)
        self.down_proj = nn.Linear(spec.units, spec.width, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [n, length, width] of states [n, length, width]."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return out


def _turned(heads: torch.Tensor, seen: _Seen) -> torch.Tensor:
    """Queries or keys [n, heads, length, size], each pair (i, i + size / 2) turned by the angle of its position."""
    first, second = heads.chunk(2, dim=-1)
    return heads * seen.cosine + torch.cat([-second, first], dim=-1) * seen.sine


def llama_config(spec: recipe.CausalLm, blocks: Blocks) -> dict[str, Any]:
    """The config.json, as plain data, of the Llama that such a decoder is."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": blocks.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": spec.units,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_value_heads or spec.heads,
        "hidden_act": "silu",
        "max_position_embeddings": blocks.length,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "rope_theta": ROTARY_BASE,
        "tie_word_embeddings": spec.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": blocks.end_of_text,
        "pad_token_id": None,
        "dtype": "float32",
    }


def llama_state(module: CausalDecoder) -> dict[str, torch.Tensor]:
    """The weights of a decoder by the names of `LlamaForCausalLM`."""
    state = module.state_dict()
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in state.items()}
