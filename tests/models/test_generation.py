"""Text that is continued: the likeliest, or drawn by a seed, with an end and within bounds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.models.folder import read_model
from akd_dist.models.generation import Sampling, chosen, generate
from akd_dist.models.language import LanguageModel, plain_logits
from tests.language_models import VOCABULARY, decoder, saved


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    found = {"own": decoder(key_value_heads=2)}
    for name in ("llama", "gpt2"):
        module, _ = read_model(saved(tmp_path_factory.mktemp("generation") / name, name))
        assert isinstance(module, LanguageModel)
        found[name] = module
    return found


@pytest.mark.parametrize("name", ["own", "llama", "gpt2"])
def test_the_likeliest_token_each_time_as_without_a_cache(models: dict[str, LanguageModel], name: str) -> None:
    model, ids = models[name], [3, 1, 4]
    made = list(generate(model, ids, Sampling(tokens=10), VOCABULARY))
    assert len(made) == 10
    for token in made:
        with torch.no_grad():
            assert token == int(plain_logits(model, torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]
    stop = Sampling(tokens=10, end=made[4])
    assert list(generate(model, [3, 1, 4], stop, VOCABULARY)) == made[: made.index(made[4])]


def test_draws_are_of_the_seed(models: dict[str, LanguageModel]) -> None:
    def made(**how: Any) -> list[int]:
        return list(generate(models["llama"], [3], Sampling(tokens=20, **how), VOCABULARY))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert made(temperature=1.0) == made(temperature=1.0) != made(temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert made(temperature=1.0, top_p=1e-9) == made()
    assert made(temperature=1e-6) == made()


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    logits, draws = torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), torch.Generator().manual_seed(0)

    def shares(how: Sampling) -> torch.Tensor:
        drawn = torch.tensor([chosen(logits, how, draws) for _ in range(4000)])
        return drawn.bincount(minlength=4) / 4000

    torch.testing.assert_close(
        shares(Sampling(temperature=1.0)), torch.tensor([0.1, 0.5, 0.15, 0.25]), atol=0.03, rtol=0
    )
    kept = shares(Sampling(temperature=1.0, top_p=0.75))
    torch.testing.assert_close(kept, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=0.03, rtol=0)
    squared = torch.tensor([0.1, 0.5, 0.15, 0.25]) ** 2
    torch.testing.assert_close(shares(Sampling(temperature=0.5)), squared / squared.sum(), atol=0.03, rtol=0)
    assert chosen(torch.tensor([1.0, 2.0, 2.0]), Sampling(), draws) == 1


def test_padding_rows_of_a_head_are_never_chosen(tmp_path: Path) -> None:
    model, _ = read_model(saved(tmp_path, "padded"))
    assert isinstance(model, LanguageModel)
    how = Sampling(tokens=28, temperature=50.0)
    assert max(generate(model, [1], how, 5)) < 5
    assert max(generate(model, [1], how, 64)) > VOCABULARY


@pytest.mark.parametrize(
    ("given", "said"),
    [({"tokens": 0}, "tokens"), ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
     ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Sampling(**given)


def test_prompts_that_cannot_be_are_refused(models: dict[str, LanguageModel]) -> None:
    for ids, how, said in (
        ([], Sampling(), "nothing to continue"),
        ([VOCABULARY], Sampling(), "does not know"),
        ([-1], Sampling(), "does not know"),
        ([1] * 10, Sampling(tokens=23), "longer than the model's positions"),
    ):
        with pytest.raises(RefusedError, match=said):
            next(generate(models["gpt2"], ids, how, VOCABULARY))
    assert len(list(generate(models["gpt2"], [1] * 10, Sampling(tokens=22), VOCABULARY))) == 22
