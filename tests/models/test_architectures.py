"""The built-in architectures: published sizes, shortcuts without parameters, texts whose padding does not matter."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.text import Tokens
from akd_dist.models.architectures import BasicBlock
from akd_dist.models.build import build, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = Tokens(vocabulary=40, padding=3, mask=4, special=(3, 4))
RESNET = recipe.ResNet(depth=8)
PLAIN = recipe.PlainCnn(layers=4)
TEXT = recipe.TextTransformer(width=16, heads=2)


def images(model: Any, shape: tuple[int, ...] = (3, 32, 32), classes: int = 10) -> ModelCard:
    return ModelCard(model=model, input_shape=shape, input_dtype="uint8", classes=classes)


def text(model: Any = TEXT, shape: tuple[int, ...] = (12,), classes: int = 3) -> ModelCard:
    return ModelCard(model=model, input_shape=shape, input_dtype="int32", classes=classes, tokens=TOKENS)


def pixels(n: int, shape: tuple[int, ...] = (3, 32, 32)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8))


def sentences(n: int = 16, length: int = 12) -> torch.Tensor:
    """Ids int32 [n, length]: row i has i % length + 1 tokens, then padding."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(5, 40, (n, length), dtype=np.int32))
    ids[torch.arange(length) > torch.arange(n).unsqueeze(1) % length] = TOKENS.padding
    return ids


@pytest.mark.parametrize("model", [RESNET, PLAIN, TEXT, recipe.Cnn(width=4), recipe.Mlp(hidden=8, dropout=0.5)])
def test_a_worker_without_rows_takes_its_part_in_the_step(model: Any) -> None:
    """The last batch may have fewer rows than there are workers; the gradient of none of them is zero."""
    module = build(text() if model is TEXT else images(model), seed=0).train()
    before = state_bytes(module)
    logits = module(sentences(1)[:0] if model is TEXT else pixels(1)[:0])
    assert logits.shape == (0, 3 if model is TEXT else 10)
    logits.sum().backward()
    assert all(one.grad is not None and not one.grad.any() for one in module.parameters())
    for key in module.state_dict():  # running statistics do not move
        if "running" in key:
            assert torch.isfinite(module.state_dict()[key]).all()
    assert isinstance(model, recipe.ResNet | recipe.PlainCnn) or state_bytes(module) == before


# ---- residual networks


@pytest.mark.parametrize(("depth", "parameters"), [(8, 75_290), (20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_residual_networks_have_their_published_size(depth: int, parameters: int) -> None:
    """0.27 M, 0.85 M and 1.7 M in He et al., table 6."""
    module = build(images(recipe.ResNet(depth=depth)), seed=0)
    assert num_parameters(module) == parameters
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in module.modules()) == depth


def test_a_shortcut_takes_every_other_pixel_and_adds_zeros() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.norm2.weight)
    maps = torch.rand(3, 2, 9, 8)
    out = block(maps)
    assert out.shape == (3, 4, 5, 4)
    assert torch.equal(out[:, :2], maps[:, :, ::2, ::2])
    assert not out[:, 2:].any()


def test_convolutions_start_with_the_variance_of_he() -> None:
    module = build(images(recipe.ResNet(depth=20)), seed=0)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            assert float(layer.weight.detach().std()) == pytest.approx(
                math.sqrt(2 / (9 * layer.out_channels)), rel=0.06
            )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (4, 28, 28)])
def test_images_of_other_sizes_fit(shape: tuple[int, ...]) -> None:
    for model in (RESNET, PLAIN):
        module = build(images(model, shape, classes=7), seed=0)
        assert module(pixels(2, shape)).shape == (2, 7)


# ---- plain networks

PLAIN_10 = {2: 13_082, 4: 37_338, 6: 82_778, 8: 327_962, 10: 2_487_850}
PLAIN_100 = {2: 215_172, 4: 475_652, 6: 1_107_204, 8: 1_246_276, 10: 2_931_460}


@pytest.mark.parametrize("layers", [2, 4, 6, 8, 10])
def test_plain_networks_have_the_size_of_the_authors_lists(layers: Any) -> None:
    """Counted from the lists in their code, convolutions with bias and BatchNorm."""
    for classes, sizes in ((10, PLAIN_10), (100, PLAIN_100)):
        module = build(images(recipe.PlainCnn(layers=layers), classes=classes), seed=0)
        assert num_parameters(module) == sizes[layers]
        assert sum(isinstance(layer, nn.Conv2d) for layer in module.modules()) == layers


# ---- text


@pytest.mark.parametrize("types", [False, True], ids=["ids", "token types"])
def test_a_text_has_the_same_logits_alone_and_in_a_batch(types: bool) -> None:
    inputs = sentences()
    if types:
        inputs = torch.stack([inputs, inputs % 2], dim=1)
    module = build(text(shape=tuple(inputs.shape[1:])), seed=0).eval()
    with torch.inference_mode():
        together = module(inputs)
        assert all(torch.equal(together[i : i + 1], module(inputs[i : i + 1])) for i in range(len(inputs)))
        assert torch.equal(together[3:10], module(inputs[3:10]))


def test_padding_changes_nothing_and_order_does() -> None:
    module = build(text(), seed=0).eval()
    ids = sentences()
    for row in (2, 5):
        torch.testing.assert_close(module(ids[row : row + 1, : row + 1]), module(ids[row : row + 1]), rtol=0, atol=1e-6)
    turned = ids[11:12].flip(1)
    assert (module(turned) - module(ids[11:12])).abs().max() > 1e-4


def test_token_types_are_seen() -> None:
    module = build(text(shape=(2, 12)), seed=0).eval()
    ids = sentences()
    first, second = (torch.stack([ids, torch.full_like(ids, kind)], dim=1) for kind in (0, 1))
    assert (module(first) - module(second)).abs().min() > 1e-6


def test_a_row_of_padding_has_finite_logits() -> None:
    module = build(text(), seed=0)
    logits = module(torch.full((2, 12), TOKENS.padding, dtype=torch.int32))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_dropout_follows_the_seed() -> None:
    module = build(text(recipe.TextTransformer(width=16, heads=2, dropout=0.5)), seed=0)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        logits: torch.Tensor = module(sentences())
        return logits

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


# ---- all of them

SMALL = (3, 12, 12)
ALL = [
    *(images(model, SMALL) for model in (RESNET, PLAIN, recipe.Mlp(hidden=8), recipe.Cnn(width=4))),
    text(),
]


def inputs_of(card: ModelCard) -> torch.Tensor:
    return sentences() if card.tokens else pixels(16, SMALL)


@pytest.mark.parametrize("card", ALL, ids=lambda card: card.model.label)
def test_a_few_steps_are_the_same_each_time_and_lower_the_loss(card: ModelCard) -> None:
    inputs, labels = inputs_of(card), torch.arange(16) % card.classes

    def trained() -> tuple[bytes, float, float]:
        module = build(card, seed=0)
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
        losses = []
        for _ in range(8):
            loss: Any = nn.functional.cross_entropy(module(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return state_bytes(module), losses[0], losses[-1]

    torch.use_deterministic_algorithms(True)
    try:
        first, again = trained(), trained()
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == again
    assert first[2] < first[1]


@pytest.mark.parametrize("card", ALL, ids=lambda card: card.model.label)
def test_other_precisions_work(card: ModelCard) -> None:
    inputs = inputs_of(card)
    single, double = build(card, seed=0).eval(), build(card, seed=0).double().eval()
    assert double(inputs).dtype == torch.float64
    torch.testing.assert_close(double(inputs).float(), single(inputs), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = single(inputs)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single(inputs), rtol=0.1, atol=0.1)
    assert not torch.equal(half, single(inputs))


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (images(RESNET, (3, 7, 32)), ["resnet-8 does not fit", "[3, 7, 32]", "at least 8 pixels"]),
        (images(RESNET, (64,)), ["resnet-8 does not fit", "[64]", "images"]),
        (images(recipe.PlainCnn(layers=8), (3, 15, 16)), ["plain-8 does not fit", "at least 16 pixels"]),
        (images(TEXT, (1, 8, 8)), ["transformer-16x2 does not fit", "images or numbers", "data.text"]),
        (text(RESNET), ["resnet-8 does not fit", "ids of tokens of shape [12]", "text_transformer"]),
        (text(recipe.Mlp(hidden=4)), ["mlp-4 does not fit", "ids of tokens"]),
    ],
    ids=lambda value: value.model.label if isinstance(value, ModelCard) else None,
)
def test_inputs_of_another_kind_are_refused(card: ModelCard, words: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        build(card)
    assert all(word in str(refused.value) for word in words)


# ---- timm


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RefusedError, match=r"pip install 'akd-dist\[timm\]'"):
        build(images(recipe.Timm(name="resnet18")))


def test_timm_models_are_built_and_refused() -> None:
    pytest.importorskip("timm", reason="timm needs torchvision, which the CPU build of torch comes without")
    card = images(recipe.Timm(name="resnet10t"), (1, 32, 32), classes=7)
    module = build(card, seed=0)
    assert module(pixels(2, (1, 32, 32))).shape == (2, 7)
    assert state_bytes(module) == state_bytes(build(card, seed=0))
    for name in ("no_such_model", "hf-hub:someone/something"):
        with pytest.raises(RefusedError, match="timm has no model"):
            build(images(recipe.Timm(name=name)))
    with pytest.raises(RefusedError, match="timm cannot make"):
        build(images(recipe.Timm(name="resnet10t", arguments={"no_such": 1})))
