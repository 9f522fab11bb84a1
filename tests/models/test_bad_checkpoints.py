"""Files that are no checkpoints, refused unread and never unpickled; and weights that do not fit, with the nearest."""

from __future__ import annotations

import argparse
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.models import checkpoint_files
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from tests.models.test_checkpoints import HEAD, RESNET, ROWS, Tensors, in_shards, opened, refused, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def cut(path: Path, name: str) -> None:
    state = weights()
    save_file(state, path) if name == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_kind(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def squeezed(path: Path) -> None:
    """A bomb: what torch would unpack is far larger than the file."""
    torch.save({"a": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def an_index(path: Path, names: Any) -> None:
    path.with_name("model.safetensors.index.json").write_text(json.dumps(names))
    path.symlink_to("model.safetensors.index.json")


def archive_of_numpy(path: Path) -> None:
    held = io.BytesIO()
    np.savez(held, a=np.zeros(3))
    path.write_bytes(held.getvalue())


OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda path: None, ["there is no checkpoint", "nothing there"]),
    "a link that leads nowhere": (lambda path: path.symlink_to("gone"), ["a link that leads nowhere"]),
    "a link to itself": (lambda path: path.symlink_to(path.name), ["the checkpoint", "cannot be read"]),
    "a folder": (Path.mkdir, ["without a checkpoint of a usual name", "an empty folder", "name the file itself"]),
    "a device": (lambda path: path.symlink_to("/dev/zero"), ["is no file"]),
    "empty": (Path.touch, ["an empty file"]),
    "text": (lambda path: path.write_text("hello, weights"), ["text, which begins 'hello, weights'"]),
    "JSON": (lambda path: path.write_text('{"a": 1, {"b": 2}}' * 9), ["text, which begins"]),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), ["a web page: the download went wrong"]),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        ["Git LFS", "git lfs pull"],
    ),
    "Keras": (lambda path: of_another_kind(path, b"\x89HDF\r\n\x1a\n" + bytes(100)), ["HDF5, as Keras writes it"]),
    "ONNX": (lambda path: of_another_kind(path, b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(100)), ["ONNX"]),
    "an array": (lambda path: of_another_kind(path, b"\x93NUMPY\x01\x00" + bytes(100)), ["an array of NumPy"]),
    "arrays": (archive_of_numpy, ["an archive of NumPy without what torch.save writes"]),
    "noise": (lambda path: of_another_kind(path, bytes(range(200, 256))), ["unknown kind", "c8 c9 ca"]),
    "cut safetensors": (lambda path: cut(path, "safetensors"), ["damaged or cut off", "fetch the file again"]),
    "a cut archive": (lambda path: cut(path, "zip"), ["an archive that is damaged or cut off", "fetch the file again"]),
    "a huge header": (
        lambda path: of_another_kind(path, (1 << 40).to_bytes(8, "little") + b'{"a": 1}'),
        ["damaged or cut off", "header too large"],
    ),
    "TorchScript": (scripted, ["TorchScript", "torch.jit.load(", ".state_dict()"]),
    "a bomb": (squeezed, ["compressed entries"]),
    "code": (
        lambda path: torch.save({"state_dict": weights(), "run": Runs(path.parent / "ran")}, path),
        ["nothing is unpickled", "posix.mkdir", "where you trust it", "save_file("],
    ),
    "code of before": (
        lambda path: torch.save(Runs(path.parent / "ran"), path, _use_new_zipfile_serialization=False),
        ["nothing is unpickled", "posix.mkdir"],
    ),
    "a whole module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        ["torch.nn.modules.linear.Linear", ".state_dict()", "weights_only=False"],
    ),
    "settings of argparse": (
        lambda path: torch.save({"state_dict": weights(), "args": argparse.Namespace(lr=0.1)}, path),
        ["argparse.Namespace", "isinstance(state.get(key), dict)"],
    ),
    "settings beside a model": (
        lambda path: torch.save({"model": weights(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path),
        ["argparse.Namespace", "'model'"],
    ),
    "a number of NumPy": (
        lambda path: torch.save({"state_dict": weights(), "best": np.float64(0.9)}, path),
        ["numpy", "nothing is unpickled"],
    ),
    "an optimizer": (
        lambda path: torch.save({"epoch": 1, "optimizer": OPTIMIZER}, path),
        ["the state of an optimizer and no weights"],
    ),
    "an optimizer alone": (lambda path: torch.save(OPTIMIZER, path), ["the state of an optimizer and no weights"]),
    "an empty state dict": (lambda path: torch.save({}, path), ["an empty state dict"]),
    "numbers": (lambda path: torch.save({"epoch": 1, "loss": 0.1}, path), ["no tensors by name, under epoch, loss"]),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), ["a Tensor"]),
    "an index of nothing": (lambda path: an_index(path, {}), ["text, which begins"]),  # by another name it is a text
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    write, told = BAD[what]
    write(tmp_path / "given")
    said = refused(tmp_path / "given", kind=MachineError if "itself" in what else RefusedError)
    for words in (*told, str(tmp_path / "given")):
        assert words in said
    assert not (tmp_path / "ran").exists(), "it was unpickled"


def test_code_would_have_run(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    torch.save(Runs(tmp_path / "ran"), tmp_path / "given")
    torch.load(tmp_path / "given", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["a whole module", "state_dict", "model"])
def test_what_is_said_to_write_weights_again_does(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = build(ModelCard.of(RESNET, ROWS, None), seed=5).body
    torch.save(body if what == "a whole module" else {what: weights(), "at": argparse.Namespace()}, "given.pth")
    lines = refused(tmp_path / "given.pth").partition("write its weights again:\n")[2].splitlines()
    exec("\n".join(line.strip() for line in lines))
    save_file(weights(), "expected.safetensors")
    assert opened(tmp_path / "weights.safetensors").card == opened(tmp_path / "expected.safetensors").card


def test_shards_lie_beside_their_index(tmp_path: Path) -> None:
    in_shards(tmp_path / "model", weights())
    index = tmp_path / "model" / "model.safetensors.index.json"
    assert opened(index).card == opened(tmp_path / "model").card
    (tmp_path / "model" / "model-2-of-2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(RefusedError, match="no model-2-of-2") as error:
        opened(tmp_path / "model")
    assert "fetch the missing files" in str(error.value)
    wrong: list[Any] = [
        {"a": "../elsewhere.safetensors"},
        {"a": str(tmp_path / "elsewhere.safetensors")},
        {"a": 3},
        {},
        [],
    ]
    for names in wrong:
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(RefusedError, match="is no index of shards"):
            opened(index)
    index.write_text("{")
    with pytest.raises(RefusedError, match="is no index of shards"):
        opened(index)


def test_a_model_folder_needs_no_architecture(tmp_path: Path) -> None:
    card = ModelCard.of(RESNET, ROWS, None)
    save_model(tmp_path / "ours", build(card, seed=5), card)
    assert "leave teacher.model out" in refused(tmp_path / "ours")


def test_a_file_that_may_not_be_read_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(weights(), tmp_path / "given")

    def closed(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_files, "open", closed, raising=False)
    said = refused(tmp_path / "given", kind=MachineError)
    assert "Permission denied" in said
    assert "a file that this user may read" in said


# ---- weights that do not fit


def changed(name: str, tensor: torch.Tensor) -> Tensors:
    state = weights()
    assert name in state
    return state | {name: tensor}


def renamed(state: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


UNFIT: dict[str, tuple[Callable[[], Tensors], list[str]]] = {
    "other classes": (
        lambda: weights() | {HEAD: torch.zeros(1000, 16), "head.bias": torch.zeros(1000)},
        ["head.weight [1000, 16] in the file, [10, 16] in the model", "a model of 1,000 classes, and the data have 10"],
    ),
    "other names": (
        lambda: renamed(weights(), "head.", "fc."),
        ["missing: head.weight [10, 16] (nearest in the file: fc.weight)", "not in the model: fc.weight [10, 16]"],
    ),
    "some missing": (
        lambda: {name: one for name, one in weights().items() if name != HEAD},
        ["missing: head.weight [10, 16]", "98%"],
    ),
    "one too many": (
        lambda: weights() | {"extra.weight": torch.ones(3)},
        ["100%", "not in the model: extra.weight [3]"],
    ),
    "another architecture": (
        lambda: {f"encoder.layer.{number}.weight": torch.ones(4, 4) for number in range(12)},
        ["0 of the model's", "0%", "of another architecture; its names begin encoder.layer.0.weight"],
    ),
    "another width": (lambda: weights(recipe.ResNet(depth=8, width=8)), ["stem.weight [8, 1, 3, 3] in the file"]),
    "NaN": (lambda: changed(HEAD, torch.full((10, 16), torch.nan)), [HEAD, "160 of 160 numbers are NaN or infinite"]),
    "no variance": (lambda: changed("norm.running_var", torch.tensor([1, torch.nan, 3, 1])), ["running_var", "1 of"]),
    "infinite": (lambda: changed("norm.weight", torch.tensor([1.0, torch.inf, 1, 1])), ["norm.weight", "1 of 4"]),
    "complex": (lambda: changed(HEAD, torch.ones(10, 16, dtype=torch.complex64)), [HEAD, "complex64"]),
    "whole numbers": (lambda: changed(HEAD, torch.ones(10, 16, dtype=torch.int8)), [HEAD, "int8", "float32"]),
    "eight bits": (lambda: changed(HEAD, torch.ones(10, 16).to(torch.float8_e4m3fn)), [HEAD, "float8_e4m3fn"]),
    "sparse": (lambda: changed(HEAD, torch.eye(10, 16).to_sparse()), [HEAD, "a sparse or quantised tensor"]),
    "empty shapes": (lambda: changed(HEAD, torch.ones(0)), ["head.weight [0] in the file"]),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_do_not_fit_are_refused_with_the_nearest(what: str, tmp_path: Path) -> None:
    state, told = UNFIT[what]
    torch.save(state(), tmp_path / "given.pt")
    said = refused(tmp_path / "given.pt")
    for words in (*told, "given.pt"):
        assert words in said


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    state = renamed(weights(), "stem.", "conv1.") | {HEAD: torch.zeros(7, 16)}
    save_file(state, tmp_path / "given")
    said = refused(tmp_path / "given")
    for words in ("of another shape: head.weight", "missing: stem.weight", "nearest in the file: conv1.weight"):
        assert words in said
    assert "correct teacher.model, so that it is the architecture" in said
