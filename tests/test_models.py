"""Models: the same bits from the same seed, folders that are whole or refused, and nothing ever unpickled."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.models import (
    CARD,
    WEIGHTS,
    ModelCard,
    add_folder,
    build,
    load_card,
    load_model,
    num_parameters,
    save_model,
    state_bytes,
    teacher_fingerprint,
)
from akd_dist.rows import Rows
from akd_dist.storage.errors import AkdError, DamagedError, RefusedError
from akd_dist.storage.files import sha256

MLP = recipe.Mlp(hidden=[6, 5], dropout=0.1)
CNN = recipe.Cnn(width=4)
SPECS: list[recipe.Mlp | recipe.Cnn] = [MLP, CNN, recipe.Mlp(hidden=8), recipe.Cnn(width=2, depth=3)]


def card(model: Any = CNN, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {"input_shape": (1, 8, 8), "input_dtype": "uint8", "classes": 10}
    return ModelCard(model=model, **fields | changes)


def images(n: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))


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
    add_folder(str(tmp_path))
    return recipe.Custom(factory=f"{name}:linear")


# ---- building


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_seed_gives_the_same_bits_in_any_process(spec: recipe.Mlp | recipe.Cnn) -> None:
    here = sha256(state_bytes(build(card(spec), seed=3)))
    code = f"""
import torch
torch.set_num_threads(2)
torch.rand(100)
from akd_dist.models import ModelCard, build, state_bytes
from akd_dist.storage.files import sha256
print(sha256(state_bytes(build(ModelCard.model_validate_json({card(spec).model_dump_json()!r}), seed=3))))
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there
    assert here != sha256(state_bytes(build(card(spec), seed=4)))


def test_a_seed_leaves_the_generator_alone_and_none_draws_from_it() -> None:
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
    assert torch.equal(load_model(tmp_path / "model")(images()), module(images()))


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
    spec = recipe.Custom(factory=custom.factory.replace("linear", function))
    with pytest.raises(RefusedError) as refused:
        build(card(spec))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("factory", "message"), [("no_such_module:model", "cannot be imported"), ("os:system", "not a factory")]
)
def test_a_factory_that_cannot_be_is_refused(factory: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        build(card(recipe.Custom(factory=factory)))


# ---- folders


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_folder_gives_back_the_very_model(spec: recipe.Mlp | recipe.Cnn, tmp_path: Path) -> None:
    normalize = recipe.Normalize(mean=[0.3], std=[0.37])
    written = card(spec, normalize=normalize)
    module = build(written, seed=1)
    save_model(tmp_path / "model", module, written)
    state = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert state_bytes(loaded) == state_bytes(module)
    assert torch.equal(loaded(images()), module.eval()(images()))
    read = load_card(str(tmp_path / "model"))
    assert read.weights_sha256 == sha256((tmp_path / "model" / WEIGHTS).read_bytes())
    assert read.model_copy(update={"weights_sha256": None}) == written
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CARD, WEIGHTS]


def test_tied_weights_are_kept(custom: recipe.Custom, tmp_path: Path) -> None:
    module = build(card(custom), seed=0)
    assert isinstance(module, nn.Module)
    body = module.get_submodule("body.1")
    module.register_parameter("again", body.weight)  # type: ignore[arg-type]
    assert len(state_bytes(module)) > 2 * 640 * 4


def test_the_fingerprint_changes_with_one_bit_and_with_the_preprocessing(tmp_path: Path) -> None:
    def of(module: nn.Module, written: ModelCard) -> str:
        save_model(tmp_path, module, written)
        return teacher_fingerprint(tmp_path)

    module = build(card(), seed=0)
    first = of(module, card())
    assert first == of(module, card())
    normalized = of(module, card(normalize=recipe.Normalize(mean=[0.0], std=[1.0])))
    with torch.no_grad():
        weight = next(module.parameters())
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    assert len({first, normalized, of(module, card())}) == 3


class Canary:
    """Unpickled, it would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def as_zip(path: Path, canary: Canary) -> None:
    torch.save({"weight": canary}, path)


def as_pickle(path: Path, canary: Canary) -> None:
    path.write_bytes(pickle.dumps(canary))


@pytest.mark.parametrize("write", [as_zip, as_pickle])
@pytest.mark.parametrize("name", ["model.pt", "weights", "folder/model.pt", f"folder/{WEIGHTS}"])
def test_a_pickle_is_never_unpickled(name: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, canary = tmp_path / name, tmp_path / "canary"
    path.parent.mkdir(exist_ok=True)
    write(path, Canary(canary))
    if path.name == WEIGHTS:
        written = card().model_copy(update={"weights_sha256": sha256(path.read_bytes())})
        (path.parent / CARD).write_text(written.model_dump_json())
    for read in (load_model, load_card, teacher_fingerprint):
        with pytest.raises(RefusedError, match="never unpickled"):
            read(path.parent if "/" in name else path)
    assert not canary.exists()


def missing_card(folder: Path) -> None:
    (folder / CARD).unlink()


def missing_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def a_file(folder: Path) -> None:
    missing_folder(folder)
    folder.write_text("text")


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])


def broken_card(folder: Path) -> None:
    (folder / CARD).write_text("{")


def unknown_key(folder: Path) -> None:
    edit_card(folder, hidden_layers=3)


def newer_format(folder: Path) -> None:
    edit_card(folder, format=2)


def other_model(folder: Path) -> None:
    edit_card(folder, model={"kind": "cnn", "width": 5})


def edit_card(folder: Path, **changes: Any) -> None:
    (folder / CARD).write_text(json.dumps(json.loads((folder / CARD).read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (missing_card, RefusedError, "not a model folder"),
        (missing_folder, RefusedError, "not a model folder"),
        (a_file, RefusedError, "is a file"),
        (flipped_bit, DamagedError, "not those that were saved"),
        (cut_weights, DamagedError, "not those that were saved"),
        (broken_card, DamagedError, "cannot be read"),
        (unknown_key, DamagedError, "cannot be read"),
        (newer_format, RefusedError, "newer akd-dist"),
        (other_model, RefusedError, "do not fit the model"),
    ],
)
def test_a_bad_folder_is_refused(damage: Any, kind: type[AkdError], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, build(card(), seed=0), card())
    damage(folder)
    with pytest.raises(kind, match=message):
        load_model(folder)


def test_other_rows_are_refused_with_both_sides(tmp_path: Path) -> None:
    rows = Rows(np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64), 10, "", (), tmp_path)
    assert ModelCard.of(CNN, rows, None) == card()
    card().check_rows(rows, "the teacher")
    with pytest.raises(RefusedError) as refused:
        card(classes=11).check_rows(rows, "the teacher")
    assert "11 classes" in str(refused.value.got)
    assert "10 classes" in str(refused.value.expected)
