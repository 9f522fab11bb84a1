"""The built-in language model: documents apart, bits of a row its own, and the numbers of a Llama."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.models import build as building
from akd_dist.models.build import build, check_memory, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.decoder import CausalDecoder, llama_config, llama_state
from akd_dist.models.language import as_blocks, document_mask, plain_logits, positions_of, starts_of
from tests.language_models import BLOCKS, VOCABULARY, decoder, some_blocks
from tests.tiny_transformers import library

SPEC = recipe.CausalLm(width=32, depth=2, heads=4)


def test_positions_and_masks_start_anew_at_every_document() -> None:
    segments = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0], [4, 4, 4, 0, 0, 4]])
    starts = starts_of(segments)
    assert starts.tolist() == [[0, 0, 2, 3, 3, 3], [0] * 6, [0, 0, 0, 3, 3, 5]]
    assert positions_of(starts).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    mask = document_mask(starts)
    assert mask.shape == (3, 1, 6, 6)
    for row, begins in enumerate(starts.tolist()):
        for at in range(6):
            seen = mask[row, 0, at].nonzero().flatten().tolist()
            assert seen == list(range(begins[at], at + 1))


def test_logits_are_hidden_states_times_the_output_layer() -> None:
    for tied in (True, False):
        model = decoder(tied=tied)
        hidden = model.hidden(some_blocks())
        assert hidden.shape == (4, 16, 32)
        assert model.output_weight.shape == (VOCABULARY, 32)
        torch.testing.assert_close(model(some_blocks()), hidden @ model.output_weight.T)
        assert model.linear_head


def test_a_document_does_not_see_its_neighbour_and_is_the_same_alone() -> None:
    model, blocks, others = decoder(), some_blocks(), some_blocks()
    others[:, 0, :6] = (others[:, 0, :6] + 1) % VOCABULARY
    ours, theirs = model(blocks), model(others)
    assert torch.equal(ours[:, 6:], theirs[:, 6:])
    assert not torch.equal(ours[:, :6], theirs[:, :6])
    torch.testing.assert_close(plain_logits(model, blocks[:, 0, 6:]), ours[:, 6:])


def test_whole_blocks_are_plain_causal() -> None:
    model = decoder(blocks=BLOCKS.model_copy(update={"attention": "block"}))
    blocks, others = some_blocks(), some_blocks()
    others[:, 1] = 0
    assert torch.equal(model(blocks), model(others))
    others[:, 0, :6] = (others[:, 0, :6] + 1) % VOCABULARY
    assert not torch.equal(model(blocks)[:, 6:], model(others)[:, 6:])
    others = some_blocks()
    others[:, 0, 10:] = (others[:, 0, 10:] + 1) % VOCABULARY
    assert torch.equal(model(blocks)[:, :10], model(others)[:, :10])


def test_bits_of_a_row_depend_on_no_other_and_on_no_place() -> None:
    model, blocks = decoder(width=64), some_blocks(8)
    logits = model(blocks)
    others = some_blocks(8, seed=1)
    for row in range(8):
        among = others.clone()
        among[7 - row] = blocks[row]
        assert torch.equal(model(among)[7 - row], logits[row])


def test_the_same_seed_gives_the_same_bits_and_steps() -> None:
    def trained() -> dict[str, torch.Tensor]:
        model = decoder(seed=3).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(3):
            loss: Any = torch.nn.functional.cross_entropy(
                model(some_blocks(seed=step))[:, :-1].flatten(0, 1), some_blocks(seed=step)[:, 0, 1:].long().flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict()

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        one, again = trained(), trained()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], decoder(seed=3).state_dict()["embed_tokens.weight"])
    assert not torch.equal(decoder(seed=3).output_weight, decoder(seed=4).output_weight)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(dropout: float) -> None:
    def gradients(on: bool) -> list[torch.Tensor]:
        model = decoder(dropout=dropout, tied=False).train()
        model.gradient_checkpointing_enable(on)
        torch.manual_seed(5)
        model(some_blocks()).square().mean().backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    plain, kept = gradients(False), gradients(True)
    assert len(plain) == 2 * 9 + 3
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))


def test_dropout_is_on_only_where_asked_for_and_while_training() -> None:
    for share, same in ((0.0, True), (0.5, False)):
        model = decoder(dropout=share)
        assert torch.equal(model(some_blocks()), model(some_blocks()))
        model.train()
        assert torch.equal(model(some_blocks()), model(some_blocks())) == same


def test_bfloat16_keeps_weights_states_and_logits_in_float32() -> None:
    model = decoder()
    exact = model(some_blocks())
    with torch.autocast("cpu", torch.bfloat16):
        hidden, logits = model.hidden(some_blocks()), model(some_blocks())
    assert hidden.dtype == logits.dtype == torch.float32
    logits.sum().backward()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.parameters())
    assert 0 < float((logits - exact).detach().abs().max()) < 0.05 * float(exact.detach().abs().max())


def test_float64_is_float64_throughout() -> None:
    model = decoder().double()
    assert model(some_blocks()).dtype == torch.float64
    torch.testing.assert_close(model(some_blocks()).float(), decoder()(some_blocks()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"key_value_heads": 2, "hidden": 40}], ids=str)
def test_its_weights_are_those_of_a_llama(changes: dict[str, Any]) -> None:
    model = decoder(**changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)), alpha=0.2)
    assert isinstance(model, CausalDecoder)
    spec = recipe.CausalLm(width=32, depth=2, heads=4, **changes)
    llama = library().LlamaForCausalLM(library().LlamaConfig(**llama_config(spec, BLOCKS))).eval()
    missing, unexpected = llama.load_state_dict(llama_state(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    llama.tie_weights()
    ids = some_blocks()[:, 0].long()
    torch.testing.assert_close(plain_logits(model, ids), llama(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert num_parameters(model) == num_parameters(llama)


def test_keys_and_values_that_are_kept_change_nothing() -> None:
    model = decoder(key_value_heads=2)
    ids = some_blocks()[:1, 0].long()
    whole = plain_logits(model, ids)[0]
    with torch.inference_mode():
        logits, cache = model.continued(ids[:, :5])
        torch.testing.assert_close(logits, whole[4])
        for at in range(5, 8):
            logits, cache = model.continued(ids[:, at : at + 1], cache)
            torch.testing.assert_close(logits, whole[at])
        logits, _ = model.continued(ids[:, 8:12], cache)
        torch.testing.assert_close(logits, whole[11])


def test_first_logits_are_small_so_that_training_starts_at_the_logarithm_of_the_vocabulary() -> None:
    blocks = some_blocks(16)
    logits = decoder()(blocks)[:, :-1].flatten(0, 1)
    loss = float(torch.nn.functional.cross_entropy(logits, blocks[:, 0, 1:].long().flatten()).detach())
    assert abs(loss - math.log(VOCABULARY)) < 0.1


def test_a_few_steps_learn_what_always_follows() -> None:
    model = decoder(seed=1).train()
    ids = (torch.arange(16) + torch.arange(8)[:, None]) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        loss: Any = torch.nn.functional.cross_entropy(
            plain_logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


# ---- sizes


def test_what_does_not_go_together_is_refused_by_the_recipe() -> None:
    for given, said in (
        ({"width": 30, "heads": 4}, "even multiple"),
        ({"width": 12, "heads": 4}, "even multiple"),
        ({"width": 32, "heads": 4, "key_value_heads": 3}, "multiple of key_value_heads"),
        ({"width": 32, "dropout": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValidationError, match=said):
            recipe.CausalLm(**given)
    assert recipe.CausalLm(width=256).units == 704
    assert recipe.CausalLm(width=256, depth=4).label == "causal-256x4"


def test_memory_is_looked_at_before_layers_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "CausalDecoder", None)  # not called
    huge = recipe.CausalLm(width=2**20, depth=2000, heads=64)
    with pytest.raises(RefusedError, match="does not fit the memory"):
        check_memory(ModelCard.of_blocks(huge, BLOCKS))


def test_it_is_for_blocks_alone() -> None:
    from tests.tiny_transformers import rows

    with pytest.raises(RefusedError, match="continues text, and does not classify it"):
        ModelCard.of(SPEC, rows(), None)
    with pytest.raises(ValidationError, match="blocks"):
        ModelCard(model=SPEC, input_shape=(3, 16), input_dtype="int32", classes=VOCABULARY)
    with pytest.raises(ValidationError, match="inputs"):
        ModelCard(
            model=SPEC,
            input_shape=(3, 8),
            input_dtype="int32",
            classes=VOCABULARY,
            task="language_model",
            blocks=BLOCKS,
        )
    assert build(ModelCard.of_blocks(SPEC, BLOCKS), 0).training
    assert as_blocks(torch.zeros(2, 4)).tolist()[0] == [[0] * 4, [0] * 4, [1, 1, 1, 0]]
