"""What a model may return: one rule, wherever its logits are wanted."""

import importlib
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.teacher import teacher_logits
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_model, save_model
from akd_dist.models.outputs import NoLogitsError, are_probabilities, logits_of
from akd_dist.serve.exports import export
from tests.fleets import a_recipe, a_student, own, stores_of

Z = torch.arange(6.0).view(2, 3)
LossFirst = namedtuple("LossFirst", "loss logits")
Pair = namedtuple("Pair", "first second")


def model_output() -> Any:
    """What models of transformers return."""
    return importlib.import_module("transformers.modeling_outputs").SequenceClassifierOutput(loss=Z.sum(), logits=Z)


@pytest.mark.parametrize(
    "returned",
    [
        *(Z, (Z, None), [Z], {"logits": Z, "hidden": None}, OrderedDict(logits=Z), LossFirst(Z.sum(), Z), Pair(Z, 1)),
        SimpleNamespace(logits=Z),
        model_output(),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_logits_are_found_by_name_or_come_first(returned: Any) -> None:
    assert logits_of(returned) is Z


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "a NoneType"),
        ("logits", "a str"),
        (Z.long(), "a tensor of int64, of shape [2, 3]"),
        ((), "a tuple of nothing"),
        ([3, Z], "a list of int, a tensor of float32, of shape [2, 3]"),
        ({"scores": Z, "loss": 1.0}, "a dict of scores: Tensor, loss: float"),
        ({"logits": None}, "a dict of logits: NoneType"),
        ({"logits": [Z]}, "a dict of logits: list"),
        ({str(n): n for n in range(10)}, "7: int, and 2 more"),
        (SimpleNamespace(logits=1), "a SimpleNamespace of logits: int"),
        (LossFirst(Z, None), "a LossFirst of a tensor of float32, of shape [2, 3], NoneType"),
    ],
)
def test_what_holds_no_logits_is_told_by_type(returned: Any, told: str) -> None:
    with pytest.raises(NoLogitsError) as refused:
        logits_of(returned)
    assert told in str(refused.value)


def test_probabilities_are_told_from_logits_and_their_logarithms() -> None:
    assert are_probabilities(Z.softmax(1))
    assert are_probabilities(Z.softmax(1).bfloat16().float())
    assert not are_probabilities(Z)
    assert not are_probabilities(Z.log_softmax(1))
    assert not are_probabilities(torch.tensor([[0.2, 0.8], [0.5, 0.4]]))


MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, how):
        super().__init__()
        self.layer, self.how = nn.Linear(64, classes), how

    def forward(self, x):
        z = self.layer(x.flatten(1))
        return {"plain": z, "dict": {"logits": z}, "tuple": (z, x), "half": [z.half()], "probabilities": z.softmax(1),
                "scores": {"scores": z}}[self.how]

def net(input_shape, classes, how="plain"):
    return Net(classes, how)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "returning_nets.py").write_text(MODELS)
    return folder


def net(how: str, folder: Path) -> recipe.Custom:
    return own(recipe.Custom(factory="returning_nets:net", arguments={"how": how}), folder)


def made(how: str, folder: Path) -> tuple[nn.Module, ModelCard]:
    card = ModelCard.of(net(how, folder), prepare(a_recipe([a_student("any")]).data, folder / "cache").train, None)
    return build(card, seed=3), card


@pytest.mark.parametrize("how", ["dict", "tuple", "half"])
def test_such_a_model_teaches_and_learns_like_a_plain_one(how: str, folder: Path, tmp_path: Path) -> None:
    inputs = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8))
    plain, module = made("plain", folder)[0].eval(), made(how, folder)[0]
    said = teacher_logits(module, inputs, 5)
    assert said.dtype == np.float32
    np.testing.assert_allclose(said, plain(inputs).detach().numpy(), atol=2e-3 if how == "half" else 0)
    save_model(tmp_path / "teacher", *made(how, folder))
    taught = a_recipe(
        [a_student("one", model={"kind": "custom", "factory": "returning_nets:net", "arguments": {"how": how}})],
        teacher={"weights": str(tmp_path / "teacher")},
        folder=str(folder),
    )
    stores = stores_of(taught, str(tmp_path / "teacher"), tmp_path)
    result = train_in_process(taught, stores, run=tmp_path / "run", cache_root=str(tmp_path / "cache"))["one"]
    assert (result["state"], result["test"]["accuracy"] > 0.2) == ("done", True)
    delivered = load_model(tmp_path / "run" / "students" / "one", net(how, folder).trusted)
    assert delivered(inputs).shape == (5, 10)


def test_such_a_model_is_exported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    save_model(tmp_path / "dict", *made("dict", folder))
    document = export(
        str(tmp_path / "dict"), "torch-export", tmp_path / "dict.pt2", tmp_path / "cache", trust=("returning_nets",)
    )
    assert document.difference <= document.tolerance


def test_a_model_without_logits_is_refused_when_it_is_built(folder: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        made("scores", folder)
    assert "a dict of scores: Tensor" in str(refused.value)


def test_probabilities_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from akd_dist.distill.trial import try_training

    rows = prepare(a_recipe([a_student("any")]).data, folder / "cache").train
    for how, count in (("plain", 0), ("probabilities", 1)):
        try_training(net(how, folder), [], rows, a_recipe([a_student("any")]).data)
        assert caplog.text.count("seems to return probabilities") == count
