"""Models: the same bits from the same seed, built-in ones and the user's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import sha256
from akd_dist.data.text import Tokens
from akd_dist.models.build import build, by_content, num_parameters
from akd_dist.models.card import CARD, ModelCard
from akd_dist.models.folder import load_model, save_model, state_bytes
from tests.fleets import own, resealed
from tests.small_models import CNN, MLP, SPECS, TOKENS, card, images, rows, texts


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> recipe.Custom:
    """A module of the user's own with a good factory and bad ones."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"custom_{sha256(str(tmp_path).encode())[:8]}"
    (tmp_path / f"{name}.py").write_text(
        """
from torch import nn
def linear(input_shape, classes, bias=True):
    size = 1
    for side in input_shape:
        size *= side
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes, bias=bias))
def stubborn(input_shape, classes):
    return linear(input_shape, 7)
def nothing(input_shape, classes):
    return None
def failing(input_shape, classes):
    raise ValueError("my own mistake")
"""
    )
    return own(recipe.Custom(factory=f"{name}:linear"), tmp_path)


# ---- building


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_seed_gives_the_same_bits_in_any_process(spec: recipe.Model) -> None:
    here = sha256(state_bytes(build(card(spec), seed=3)))
    code = f"""
import torch
torch.set_num_threads(2)
torch.rand(100)
from akd_dist.models.card import ModelCard
from akd_dist.models.build import build
from akd_dist.models.folder import state_bytes
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.text import Tokens
from tests.fleets import own, resealed
print(sha256(state_bytes(build(ModelCard.model_validate_json({card(spec).model_dump_json()!r}), seed=3))))
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there
    assert here != sha256(state_bytes(build(card(spec), seed=4)))


def test_a_seed_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seeded = build(card(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert state_bytes(build(card())) == state_bytes(seeded)
    assert not torch.equal(torch.get_rng_state(), state)


def test_layers_are_those_of_the_spec() -> None:
    shapes = {
        "mlp-6x5d0.1": [(6, 64), (6,), (5, 6), (5,), (10, 5), (10,)],
        "cnn-4": [(4, 1, 3, 3), (4,), (8, 4, 3, 3), (8,), (10, 32), (10,)],
    }
    for spec in (MLP, CNN):
        module = build(card(spec), seed=0)
        assert [tuple(tensor.shape) for tensor in module.state_dict().values()] == shapes[spec.label]
        assert num_parameters(module) == sum(np.prod(shape) for shape in shapes[spec.label])
        assert module.training
    assert sum(isinstance(layer, nn.Dropout) for layer in build(card(MLP)).modules()) == 2


def test_preprocessing_is_inside() -> None:
    normalize = recipe.Normalize(mean=[0.5, 0.1], std=[0.2, 0.3])
    shape = {"input_shape": (2, 4, 4), "normalize": normalize}
    raw = torch.randint(0, 256, (5, 2, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (normalize.mean, normalize.std))
    plain = build(card(CNN, input_shape=(2, 4, 4), input_dtype="float32"), seed=0)
    expected = plain((raw / 255 - mean) / std)
    torch.testing.assert_close(build(card(CNN, **shape), seed=0)(raw), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        build(card(CNN, **shape, input_dtype="float32"), seed=0)(raw / 255), expected, rtol=1e-5, atol=1e-6
    )
    assert expected.dtype == torch.float32


def test_one_step_is_the_same_under_deterministic_algorithms() -> None:
    def stepped() -> bytes:
        module = build(card(), seed=0)
        module(images(16)).square().mean().backward()
        torch.optim.SGD(module.parameters(), 0.1).step()
        return state_bytes(module)

    torch.use_deterministic_algorithms(True)
    try:
        assert stepped() == stepped()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": CNN, "input_shape": (64,)}, "cnn-4 does not fit"),
        ({"model": recipe.Cnn(width=2, depth=4)}, "cnn-2d4 does not fit"),
        ({"normalize": recipe.Normalize(mean=[0.0] * 3, std=[1.0] * 3)}, "data.normalize does not fit"),
    ],
    ids=["vector", "too deep", "channels"],
)
def test_a_model_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        build(card(**changes))


# ---- custom models


def test_a_custom_model_is_built_saved_and_loaded(custom: recipe.Custom, tmp_path: Path) -> None:
    spec = custom.model_copy(update={"arguments": {"bias": False}})
    module = build(card(spec), seed=0)
    assert num_parameters(module) == 640
    save_model(tmp_path / "model", module, card(spec))
    assert torch.equal(load_model(tmp_path / "model", custom.trusted)(images()), module(images()))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("stubborn", ["another number of classes", "[2, 7]", "[2, 10]"]),
        ("nothing", ["something else than a model", "NoneType"]),
        ("failing", ["factory", "my own mistake", "Traceback"]),
        ("liner", ["has no function liner", "linear"]),
    ],
)
def test_a_custom_model_is_refused(custom: recipe.Custom, function: str, words: list[str]) -> None:
    spec = own(recipe.Custom(factory=custom.factory.replace("linear", function)), Path(str(custom.trusted.folder)))
    with pytest.raises(RefusedError) as refused:
        build(card(spec))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:model", "cannot be imported"),
        ("os:system", "is not one of the recipe's own"),
        ("torch.hub:load", "is not one of the recipe's own"),
        ("transformers:pipeline", "is not one of the recipe's own"),
    ],
)
def test_a_factory_that_cannot_be_is_refused(factory: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=message):
        build(card(own(recipe.Custom(factory=factory), tmp_path)))


def test_a_model_folder_cannot_have_torch_run_code(tmp_path: Path) -> None:
    """`torch.hub:load` takes any keyword, and runs the hubconf.py that it is pointed at."""
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    save_model(tmp_path / "model", build(card(), seed=0), card())
    document = json.loads((tmp_path / "model" / CARD).read_text())
    arguments = {"repo_or_dir": str(tmp_path), "model": "model", "source": "local"}
    spec = {"kind": "custom", "factory": "torch.hub:load", "arguments": arguments}
    (tmp_path / "model" / CARD).write_text(json.dumps(resealed(document | {"model": spec})))
    with pytest.raises(RefusedError, match=r"torch.hub:load is not run: the model folder .* names it"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_the_source_of_a_custom_model_is_part_of_it(
    custom: recipe.Custom, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / f"{custom.factory.partition(':')[0]}.py"
    first = ModelCard.of(custom, rows(), None)
    assert first.source_sha256 == sha256(source.read_bytes())
    save_model(tmp_path / "model", build(first, seed=0), first)
    load_model(tmp_path / "model", custom.trusted)
    assert not caplog.records
    source.write_text(source.read_text() + "# another line\n")
    assert ModelCard.of(custom, rows(), None).fingerprint != first.fingerprint
    assert by_content(custom)["source"] == sha256(source.read_bytes()) != first.source_sha256
    load_model(tmp_path / "model", custom.trusted)
    (record,) = caplog.records
    assert f"{custom.factory} has changed" in record.getMessage()


def test_only_pretrained_models_are_asked_for_weights() -> None:
    assert state_bytes(build(card(), seed=1, pretrained=True)) == state_bytes(build(card(), seed=1))


def test_tied_weights_are_kept(custom: recipe.Custom, tmp_path: Path) -> None:
    module = build(card(custom), seed=0)
    assert isinstance(module, nn.Module)
    body = module.get_submodule("body.1")
    module.register_parameter("again", body.weight)  # type: ignore[arg-type]
    assert len(state_bytes(module)) > 2 * 640 * 4


@pytest.mark.parametrize("tokens", [TOKENS, Tokens(vocabulary=5, padding=0, special=(0, 1))])
def test_custom_models_on_text_are_tried_with_ordinary_tokens(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"texts_{sha256(str(tmp_path).encode())[:8]}"
    (tmp_path / f"{name}.py").write_text(
        """
import torch
from torch import nn
class Bag(nn.Module):
    def __init__(self, classes, vocabulary, special):
        super().__init__()
        self.table, self.special = nn.Embedding(vocabulary, classes), special
    def forward(self, ids):
        assert ids.dtype == torch.int32 and ids.shape[1:] == (8,)
        assert not torch.isin(ids, torch.tensor(self.special)).any()
        return self.table(ids).mean(1)
def bag(input_shape, classes, vocabulary, special):
    return Bag(classes, vocabulary, special)
"""
    )
    arguments: dict[str, Any] = {"vocabulary": tokens.vocabulary, "special": list(tokens.special)}
    spec = own(recipe.Custom(factory=f"{name}:bag", arguments=arguments), tmp_path)
    build(ModelCard.of(spec, texts(tokens=tokens), None), seed=0)
    arguments["vocabulary"] -= 3  # ids beyond it are refused before training
    with pytest.raises(RefusedError, match="does not take these inputs"):
        build(ModelCard.of(spec.model_copy(update={"arguments": arguments}), texts(tokens=tokens), None))


def test_a_model_that_exits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not end the command with a code of its own and without a word."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"leaves_{sha256(str(tmp_path).encode())[:8]}"
    (tmp_path / f"{name}.py").write_text(
        """
import sys
from torch import nn
class Leaves(nn.Module):
    def forward(self, inputs):
        sys.exit(3)
def leaves(input_shape, classes):
    return Leaves()
"""
    )
    spec = own(recipe.Custom(factory=f"{name}:leaves"), tmp_path)
    with pytest.raises(RefusedError, match="does not take these inputs") as refused:
        build(ModelCard.of(spec, texts(), None))
    assert refused.value.got == "SystemExit: 3"
