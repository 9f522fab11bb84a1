"""Model folders: they give back the very model, are whole or refused, and are never unpickled."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.models.build import build
from akd_dist.models.card import CARD, WEIGHTS, ModelCard
from akd_dist.models.folder import load_card, load_model, save_model, state_bytes
from tests.fleets import resealed
from tests.small_models import SPECS, TEXT, TOKENS, card, images, texts


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_folder_gives_back_the_very_model(spec: recipe.Model, tmp_path: Path) -> None:
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


def test_the_fingerprint_changes_with_one_bit(tmp_path: Path) -> None:
    def of(module: nn.Module, written: ModelCard) -> str:
        save_model(tmp_path, module, written)
        return load_card(tmp_path).fingerprint

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
    for read in (load_model, load_card):
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
    edit_card(folder, format=3)


def other_model(folder: Path) -> None:
    edit_card(folder, model={"kind": "cnn", "width": 5})


def edit_card(folder: Path, **changes: Any) -> None:
    (folder / CARD).write_text(json.dumps(resealed(json.loads((folder / CARD).read_text()) | changes)))


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


def test_float64_weights_stay_so(tmp_path: Path) -> None:
    module = build(card(), seed=0).double().eval()
    save_model(tmp_path, module, card())
    assert torch.equal(load_model(tmp_path)(images()), module(images()))
    assert load_model(tmp_path)(images()).dtype == torch.float64


def test_a_text_model_is_saved_and_loaded(tmp_path: Path) -> None:
    of_text = ModelCard.of(TEXT, texts(), None)
    module = build(of_text, seed=0).eval()
    save_model(tmp_path, module, of_text)
    ids = torch.arange(24, dtype=torch.int32).view(3, 8)
    assert torch.equal(load_model(tmp_path)(ids), module(ids))
    assert load_card(tmp_path).tokens == TOKENS
