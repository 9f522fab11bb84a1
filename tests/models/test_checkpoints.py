"""Checkpoints of others: the same weights are one model however they came, and what is none is refused unread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model as save_with_ties
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.data.rows import Rows
from akd_dist.models import imported
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.checkpoint_files import digest_of, read_parts
from akd_dist.models.folder import load_model, save_model, state_bytes
from akd_dist.models.imported import Imported, open_checkpoint
from tests import sources
from tests.fleets import own

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]
RESNET = recipe.ResNet(depth=8, width=4)
DATA = recipe.DataSpec(train=recipe.Digits())
HEAD = "head.weight"
ROWS = Rows(np.zeros((8, 1, 8, 8), np.uint8), np.arange(8), 10, "", (), Path())


def weights(spec: recipe.Model = RESNET, seed: int = 5) -> Tensors:
    module = build(ModelCard.of(spec, ROWS, None), seed=seed)
    assert isinstance(module.body, nn.Module)
    return dict(module.body.state_dict())


def opened(path: Path, spec: recipe.Model = RESNET, rows: Rows = ROWS) -> Imported:
    return open_checkpoint(spec, str(path), rows, DATA, path.parent / "cache")


def refused(path: Path, spec: recipe.Model = RESNET, kind: type[AkdError] = RefusedError) -> str:
    with pytest.raises(kind) as error:
        opened(path, spec)
    assert not list((path.parent / "cache").glob("**/*.json")), "what was refused is not remembered"
    return str(error.value)


def before(state: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


# ---- one model, however it came


def whole(path: Path, state: Tensors) -> None:
    save_file(state, path)


def in_shards(path: Path, state: Tensors) -> None:
    """Two files and an index beside them, as Hugging Face writes large models."""
    path.mkdir()
    names = list(state)
    files = {"model-1-of-2.safetensors": names[:7], "model-2-of-2.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def of_lightning(path: Path, state: Tensors) -> None:
    said = {"epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}, "callbacks": {}}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    torch.save(said | {"state_dict": before(state, "model."), "optimizer_states": [optimizer.state_dict()]}, path)


def of_a_folder(path: Path, state: Tensors) -> None:
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")


def of_ours(path: Path, state: Tensors) -> None:
    """The weights of a model folder of ours, taken out of it."""
    card = ModelCard.of(RESNET, ROWS, None)
    save_model(path.parent / "ours", build(card, seed=5), card)
    path.write_bytes((path.parent / "ours" / "model.safetensors").read_bytes())


def by_a_link(path: Path, state: Tensors) -> None:
    (path.parent / "blobs").mkdir()
    save_file(state, path.parent / "blobs" / "4f2a")
    path.symlink_to(Path("blobs", "4f2a"))


WRITTEN: dict[str, Callable[[Path, Tensors], object]] = {
    "safetensors": whole,
    "a state dict": lambda path, state: torch.save(state, path),
    "a state dict of before": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "under state_dict": lambda path, state: torch.save({"epoch": 1, "state_dict": state}, path),
    "under model": lambda path, state: torch.save(
        {"model": state, "optimizer": {"state": {}, "param_groups": []}}, path
    ),
    "under model_state_dict": lambda path, state: torch.save({"model_state_dict": state, "loss": 0.1}, path),
    "under net, in parallel": lambda path, state: torch.save({"net": before(state, "module.")}, path),
    "compiled, in parallel": lambda path, state: torch.save(before(state, "module._orig_mod."), path),
    "as parameters": lambda path, state: torch.save(
        {name: nn.Parameter(one) if one.is_floating_point() else one for name, one in state.items()}, path
    ),
    "with a backbone before it": lambda path, state: whole(path, before(state, "backbone.")),
    "of Lightning": of_lightning,
    "in shards": in_shards,
    "of a folder": of_a_folder,
    "of ours": of_ours,
    "by a link": by_a_link,
    "without counters": lambda path, state: whole(
        path, {name: one for name, one in state.items() if not name.endswith("num_batches_tracked")}
    ),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_the_same_weights_are_one_model(how: str, tmp_path: Path) -> None:
    state = weights()
    card = ModelCard.of(RESNET, ROWS, None)
    save_model(tmp_path / "trained", build(card, seed=5), card)
    WRITTEN[how](tmp_path / "given", state)
    found = opened(tmp_path / "given")
    found.publish(str(tmp_path / "published"), tmp_path)
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "published" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()
    inputs = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    assert torch.equal(found.module(tmp_path)(inputs), load_model(tmp_path / "trained")(inputs))


def test_what_was_done_is_told_in_a_line_each(tmp_path: Path) -> None:
    state = weights()
    averaged = {"ema": weights(seed=6)}
    torch.save(
        averaged | {"state_dict": before(state, "model.") | {"criterion.weight": torch.ones(10)}}, tmp_path / "a"
    )
    found = opened(tmp_path / "a")
    assert found.notes == [
        "taken from `state_dict` in the file",
        "`model.` was taken off the names of its weights",
        "left out, since the model has no such part: criterion.weight",
        "the file has weights of the same names under `ema`, too; to take those, save them as a file of their own",
    ]
    torch.save({name: one.half() if one.is_floating_point() else one for name, one in state.items()}, tmp_path / "b")
    (said,) = opened(tmp_path / "b").notes
    assert said == f"{sum(one.is_floating_point() for one in state.values())} weights of float16 became float32"
    assert {one.dtype for one in opened(tmp_path / "b").module(tmp_path).parameters()} == {torch.float32}


def test_a_student_beside_a_teacher_of_one_kind_is_not_taken_without_a_word(tmp_path: Path) -> None:
    torch.save(before(weights(), "student.") | before(weights(seed=6), "teacher."), tmp_path / "both.ckpt")
    assert any("under `teacher`" in line for line in opened(tmp_path / "both.ckpt").notes)


def test_weights_in_float64_stay_so(tmp_path: Path) -> None:
    save_file(
        {name: one.double() if one.is_floating_point() else one for name, one in weights().items()}, tmp_path / "a"
    )
    found = opened(tmp_path / "a")
    assert found.notes == []
    assert found.module(tmp_path)(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).dtype == torch.float64
    found.publish(str(tmp_path / "published"), tmp_path)
    assert load_model(tmp_path / "published")(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).dtype == torch.float64


def test_a_few_weights_in_float64_are_told_to_be_rounded(tmp_path: Path) -> None:
    state = weights()
    save_file(state | {HEAD: state[HEAD].double()}, tmp_path / "a")
    assert opened(tmp_path / "a").notes == ["1 weight of float64 became float32"]


def test_a_file_that_is_known_is_hashed_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    card = opened(tmp_path / "a.safetensors").card
    monkeypatch.setattr(imported, "read_parts", lambda files: pytest.fail("the file was loaded"))
    (tmp_path / "a.safetensors").rename(tmp_path / "moved.safetensors")
    hashed: list[Any] = []

    def counted(files: Any) -> str:
        hashed.append(files)
        return digest_of(files)

    monkeypatch.setattr(imported, "digest_of", counted)
    assert opened(tmp_path / "moved.safetensors").card == card
    assert len(hashed) == 1


def test_a_memory_that_is_damaged_is_no_memory(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    card = opened(tmp_path / "a.safetensors").card
    (memory,) = (tmp_path / "cache" / "imports").iterdir()
    memory.write_bytes(memory.read_bytes().replace(str(card.weights_sha256).encode()[:4], b"0000"))
    assert opened(tmp_path / "a.safetensors").card == card


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file(weights(), path)

    def read_late(files: Any) -> Any:
        found = read_parts(files)
        save_file(weights(seed=6), tmp_path / "new")
        (tmp_path / "new").replace(path)
        return found

    monkeypatch.setattr(imported, "read_parts", read_late)
    assert "was written while it was read" in refused(path)
    monkeypatch.setattr(imported, "read_parts", read_parts)
    known = opened(path)
    known._module = None
    save_file(weights(seed=7), path)
    with pytest.raises(RefusedError, match="was written while it was read"):
        known.module(tmp_path)


TIED = """
from torch import nn
class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, classes)
    def forward(self, x):
        return {"logits": self.head(self.second(self.first(x.flatten(1)))), "features": x}
def net(input_shape, classes):
    return Tied(classes)
"""


def test_weights_that_are_one_come_once_or_twice(tmp_path: Path) -> None:
    """And a module that returns a dict serves as any other."""
    name = sources.module(tmp_path, TIED)
    spec = own(recipe.Custom(factory=f"{name}:net"), tmp_path)
    module = build(ModelCard.of(spec, ROWS, None), seed=5).body
    assert isinstance(module, nn.Module)
    save_with_ties(module, str(tmp_path / "once.safetensors"))
    torch.save(module.state_dict(), tmp_path / "twice.pt")
    once, twice = opened(tmp_path / "once.safetensors", spec), opened(tmp_path / "twice.pt", spec)
    assert once.card == twice.card
    assert once.module(tmp_path)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 10)
    torch.save(module.state_dict() | {"second.weight": torch.ones(64, 64)}, tmp_path / "apart.pt")
    with pytest.raises(RefusedError, match=r"second\.weight") as error:
        opened(tmp_path / "apart.pt", spec)
    assert "in the model the two are one" in str(error.value)


def test_what_is_seen_of_the_data_is_part_of_the_model(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    plain = opened(tmp_path / "a.safetensors").card
    data = DATA.model_copy(update={"normalize": recipe.Normalize(mean=[0.5], std=[0.25])})
    scaled = open_checkpoint(RESNET, str(tmp_path / "a.safetensors"), ROWS, data, tmp_path / "cache").card
    assert scaled.weights_sha256 == plain.weights_sha256
    assert scaled.fingerprint != plain.fingerprint


def test_the_bytes_of_weights_know_no_order(tmp_path: Path) -> None:
    state = weights()
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pt")
    card = ModelCard.of(RESNET, ROWS, None)
    expected = state_bytes(build(card, seed=5))
    assert state_bytes(opened(tmp_path / "reversed.pt").module(tmp_path)) == expected
