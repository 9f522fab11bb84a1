"""Causal language models of transformers: a config.json -> a module that takes packed blocks, its head looked into.

What a model does between its hidden states and its logits is found out, not believed: known numbers are put in place of
what its output layer gives, and what comes out of the model is compared. A constant factor and a bias are folded into
hidden states and output layer; anything else, such as softcapping, is told by `head_refusal`.

Nothing that comes with a model is executed: no remote code, no attention kernels by name, weights as safetensors only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.models.huggingface import load_pretrained, some
from akd_dist.models.huggingface_config import CONTINUES, bad_config, changed_config, configuration, quiet
from akd_dist.models.language import Blocks, LanguageModel, as_blocks, document_mask, positions_of, starts_of

TOLERANCE = 1e-4
"""How far logits may be from hidden states times the output layer, as a share of the largest of them."""
_SPREAD = 50.0  # of the numbers that stand for what the output layer gives: softcapping bends them
_TRIED = 6  # tokens of a document in a trial


def resolve(spec: recipe.HuggingFaceLm, blocks: Blocks) -> recipe.HuggingFaceLm:
    """The spec with its whole configuration in it, from its folder or the hub, so that a card needs neither again.

    Raises:
        RefusedError: there is no configuration, it is of no causal language model, or does not fit the blocks; or
            transformers is not installed.
        MachineError: the hub cannot be reached.
    """
    config = changed_config(spec, CONTINUES)
    check_blocks(spec, configuration(config, spec.label, CONTINUES), blocks)
    return spec.model_copy(update={"config": config})


def body(
    spec: recipe.HuggingFaceLm,
    blocks: Blocks,
    *,
    pretrained: bool = False,
    state: dict[str, torch.Tensor] | None = None,
) -> HuggingFaceDecoder:
    """The module of a resolved spec.

    Args:
        spec: as `resolve` gives it.
        blocks: what it is to take.
        pretrained: load the weights that lie in its folder or at the hub, as far as the spec asks for them. Otherwise
            all are drawn from torch's generator.
        state: all its weights, by the names that transformers gives them, instead.

    Raises:
        RefusedError: the configuration makes no model, blocks do not fit it, or weights are missing or of another
            shape; names them.
    """
    config = configuration(spec.config, spec.label, CONTINUES)
    check_blocks(spec, config, blocks)
    model_class = _model_class(config)
    how = "sdpa" if model_class._supports_sdpa else "eager"
    if state is not None or (pretrained and spec.pretrained):
        place = None if state is not None else spec.path or spec.name
        given = {"use_safetensors": True} if state is None else {"state_dict": state}
        model, found = load_pretrained(model_class, config, spec.label, place, attn_implementation=how, **given)
        _check_loaded(found, spec.label)
    else:
        try:
            with quiet():
                model = model_class._from_config(config, dtype=torch.float32, attn_implementation=how)
        except Exception as error:
            raise bad_config(spec.label, error) from error
    return HuggingFaceDecoder(model, blocks, spec.label)


class HuggingFaceDecoder(LanguageModel):
    """A causal language model of transformers on packed blocks."""

    def __init__(self, model: Any, blocks: Blocks, label: str) -> None:
        super().__init__()
        self.model, self.label, self.attention, self.scale = model, label, blocks.attention, 1.0
        # transformers gives padding no gradient. Here padding is in no loss, and where it is also what ends a document
        # that has to be learnt.
        model.get_input_embeddings().padding_idx = None
        self.adds_mask = model.config._attn_implementation == "eager"  # others take who sees whom as it is
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise RefusedError(
                f"the model {label} has no output layer that can be used",
                got=f"{type(head).__name__} as its output embeddings",
                expected="a linear layer, as Llama and GPT-2 have",
                next="choose another model",
            )
        self.most_positions = getattr(model.config, "max_position_embeddings", None)
        if (
            self.attention == "document"
            and "position_ids" not in inspect.signature(model.base_model.forward).parameters
        ):
            raise _crosses(label, f"a {model.config.model_type}, which takes no positions")
        # Other names of one tensor, such as a tied output layer: written once, and found again when weights are read.
        self._tied = {f"model.{name}": f"model.{other}" for name, other in _tied_names(model).items()}
        self.register_state_dict_post_hook(_without_tied)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_tied)  # type: ignore[no-untyped-call]

    def hidden(self, blocks: torch.Tensor) -> torch.Tensor:
        """States [n, length, d] of blocks int32 [n, 3, length]; d is one more than the model's where the head has a
        bias: its last number is 1.
        """
        states = self.model.base_model(**self._inputs(blocks), use_cache=False).last_hidden_state
        if self.scale != 1.0:
            states = states * self.scale
        if self.model.get_output_embeddings().bias is None:
            return torch.as_tensor(states)
        return torch.cat([states, torch.ones_like(states[..., :1])], dim=-1)

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer [V_s, d], its bias as a last column where it has one."""
        head = self.model.get_output_embeddings()
        return head.weight if head.bias is None else torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Logits [n, length, V_s] of blocks int32 [n, 3, length], as the model itself gives them."""
        logits: torch.Tensor = self.model(**self._inputs(blocks), use_cache=False).logits
        return logits.to(self.model.get_output_embeddings().weight.dtype)

    def continued(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits [V_s] of the token after ids int64 [1, m], which follow those of the cache; and the new cache."""
        takes = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"  # as transformers called it before 5.24
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        said = self.model(input_ids=ids, use_cache=True, **{name: cache}, **last)
        return said.logits[0, -1], said[name]

    def gradient_checkpointing_enable(self, on: bool = True) -> None:
        """While training, keep the states between layers alone, and compute what is within them again backward.

        Raises:
            RefusedError: transformers cannot do so for this architecture.
        """
        if on and not self.model.supports_gradient_checkpointing:
            raise RefusedError(
                f"the model {self.label} cannot compute states again",
                got=f"a {self.model.config.model_type}, of which transformers has no checkpointing",
                expected="gradient_checkpointing: false",
                next="leave it out, or choose another model",
            )
        new = hasattr(self.model, "activation_checkpointing_enable")  # transformers called it otherwise before 5.24
        verb = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
        getattr(self.model, verb)(*[{"use_reentrant": False}] * on)

    def _inputs(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = blocks[:, 0].long()
        if self.attention == "block":
            return {"input_ids": ids}
        starts = starts_of(blocks[:, 1])
        # Always a mask: transformers would make one of positions only where some row of the batch has two documents,
        # so that the bits of a row would depend on its neighbours.
        mask = document_mask(starts)
        if self.adds_mask:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return {"input_ids": ids, "position_ids": positions_of(starts), "attention_mask": mask}


# ---- what it is found to do


def look_into(module: HuggingFaceDecoder, label: str) -> None:
    """Find out what stands between hidden states and logits, and see that documents do not see each other.

    Args:
        module: in eval mode, with numbers; `scale` and `head_refusal` are set.

    Raises:
        RefusedError: a document's logits change with its neighbour, or are not those that it has alone.
    """
    with torch.no_grad():
        _look_into_head(module)
        if module.attention == "document":
            _check_documents(module, label)


def _look_into_head(module: HuggingFaceDecoder) -> None:
    head, ids = module.model.get_output_embeddings(), _some_ids(module, _TRIED)
    shown: list[torch.Tensor] = []
    put: list[torch.Tensor] = []

    def exchange(_head: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        shown.append(inputs[0])
        spread = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        put.append(_SPREAD * spread.view(output.shape))
        return put[-1]

    hook = head.register_forward_hook(exchange)
    try:
        logits = module.model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    module.scale, module.head_refusal = 1.0, None
    if len(shown) != 1 or logits.shape != put[0].shape:
        module.head_refusal = "logits that do not come from the output layer alone"
        return
    states = module.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    before, after = _factor(shown[0], states), _factor(logits, put[0])
    if after is None:
        capped = [name for name in vars(module.model.config) if "softcap" in name and "attn" not in name]
        cause = f"softcapping ({capped[0]} in its configuration)" if capped else "a function that is no factor"
        module.head_refusal = f"{cause} behind the output layer"
    elif before is None:
        module.head_refusal = "another layer between the last norm and the output layer"
    elif head.bias is not None and (before, after) != (1.0, 1.0):
        module.head_refusal = f"a factor of {before * after:g} and a bias of the output layer"
    else:
        module.scale = before * after


def _factor(found: torch.Tensor, given: torch.Tensor) -> float | None:
    """The number that one is of the other, everywhere; None where there is none. Exactly 1 for the same numbers."""
    if found.shape != given.shape:
        return None
    if torch.equal(found, given):
        return 1.0
    one, other = found.double().flatten(), given.double().flatten()
    factor = float(one @ other / (other @ other))
    largest = float(one.abs().max())
    return factor if float((one - factor * other).abs().max()) <= TOLERANCE * largest else None


def _check_documents(module: HuggingFaceDecoder, label: str) -> None:
    """See that a document has the same logits behind two others, and alone as the model itself computes them."""
    first, other, ours = (_some_ids(module, _TRIED, turn) for turn in range(3))
    ours = ours[:, : _TRIED - 1]
    blocks = as_blocks(torch.cat([torch.cat([one, ours], dim=1) for one in (first, other)]))
    blocks[:, 1, _TRIED:] = 1
    try:
        behind = module(blocks)[:, _TRIED:]
        alone = module.model(input_ids=ours, use_cache=False).logits
    except Exception as error:  # of any architecture's code, on a mask that it does not know
        raise _crosses(label, f"{type(error).__name__}: {error}") from error
    allowed = TOLERANCE * max(float(alone.abs().max()), 1e-6)
    moved = float((behind[0] - behind[1]).abs().max())
    if not moved <= allowed:
        raise _crosses(label, f"logits that change by {moved:.2g} with the document before")
    if not float((behind[:1] - alone).abs().max()) <= allowed:
        raise _crosses(label, "logits of a document that are others than those it has alone")


def _crosses(label: str, got: str) -> RefusedError:
    return RefusedError(
        f"the model {label} cannot keep the documents of a block apart",
        got=got,
        expected="attention that takes a mask, and positions that start anew",
        next="set data.packing.attention: block, or choose another model",
    )


def _some_ids(module: HuggingFaceDecoder, tokens: int, turn: int = 0) -> torch.Tensor:
    """Ids int64 [1, tokens] that are all over the vocabulary, others at each turn."""
    rows = module.model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, tokens + 1) * 7919 * (turn + 1) + 31 * turn).remainder(rows).unsqueeze(0)


# ---- refusals before it is made


def check_blocks(spec: recipe.HuggingFaceLm, config: Any, blocks: Blocks) -> None:
    """Refuse blocks that are too long for a configuration, and ids beyond its vocabulary.

    Raises:
        RefusedError: says which number is too large.
    """
    rows = int(getattr(config, "vocab_size", 0))
    if rows < blocks.vocabulary:
        raise RefusedError(
            f"the model {spec.label} has fewer tokens than the data",
            got=f"vocab_size {rows:,}",
            expected=f"{blocks.vocabulary:,} or more: the tokenizer's last id is {blocks.vocabulary - 1:,}",
            next="use the model's own tokenizer as data.text; where pretrained is false, "
            f"config: {{vocab_size: {blocks.vocabulary}}} will do",
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and blocks.length > most:
        raise RefusedError(
            f"the model {spec.label} does not take blocks of this length",
            got=f"{blocks.length:,} tokens",
            expected=f"at most {most:,}",
            next=f"set data.text.length to {most} or less",
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and blocks.length > window:
        raise RefusedError(
            f"the model {spec.label} sees a window of tokens only, which blocks are longer than",
            got=f"blocks of {blocks.length:,} tokens, a window of {window:,}",
            expected=f"blocks of at most {window:,} tokens: masks of documents have no windows",
            next=f"set data.text.length to {window} or less",
        )


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _check_loaded(found: dict[str, Any], label: str) -> None:
    other = sorted(f"{name} {list(there)} instead of {list(here)}" for name, there, here in found["mismatched_keys"])
    wrong = {"missing": sorted(found["missing_keys"]), "of another shape": other}
    if any(wrong.values()):
        raise RefusedError(
            f"the weights of {label} do not fit its configuration",
            got="; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names),
            expected="a weight for every part of the model, its output layer included",
            next="check `path` or `name`, and `config`; pretrained: false takes the architecture alone",
        )


# ---- tied weights


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Names of weights that are other names of one before, and that one's name."""
    first: dict[int, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(weight), name) != name:
            tied[name] = first[id(weight)]
    return tied


def _without_tied(module: Any, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name in module._tied:
        state.pop(prefix + name, None)


def _with_tied(module: Any, state: dict[str, Any], prefix: str, *_more: object) -> None:
    for name, other in module._tied.items():
        if prefix + other in state:
            state.setdefault(prefix + name, state[prefix + other])
