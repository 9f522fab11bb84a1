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
from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.rows import Rows
from akd_dist.data.text import Tokens
from akd_dist.models.build import build, by_content, num_parameters
from akd_dist.models.card import CARD, WEIGHTS, ModelCard
from akd_dist.models.folder import load_card, load_model, save_model, state_bytes
from tests.fleets import own, resealed

MLP = recipe.Mlp(hidden=[6, 5], dropout=0.1)
CNN = recipe.Cnn(width=4)
SPECS: list[recipe.Model] = [
    MLP,
    CNN,
    recipe.Mlp(hidden=8),
    recipe.Cnn(width=2, depth=3),
    recipe.ResNet(depth=8, width=4),
    recipe.PlainCnn(layers=2),
]


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


# ---- folders


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


def test_tied_weights_are_kept(custom: recipe.Custom, tmp_path: Path) -> None:
    module = build(card(custom), seed=0)
    assert isinstance(module, nn.Module)
    body = module.get_submodule("body.1")
    module.register_parameter("again", body.weight)  # type: ignore[arg-type]
    assert len(state_bytes(module)) > 2 * 640 * 4


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


# ---- cards

TOKENS = Tokens(vocabulary=300, padding=256, mask=257, special=(256, 257))


def rows(inputs: np.ndarray | None = None, classes: int = 10, **more: Any) -> Rows:
    inputs = np.zeros((4, 1, 8, 8), np.uint8) if inputs is None else inputs
    labels = np.zeros(4, np.float32 if more.get("task") == "regression" else np.int64)
    return Rows(inputs, labels, classes, "", (), Path(), **more)


def texts(length: int = 8, **more: Any) -> Rows:
    return rows(np.full((4, length), 7, np.int32), **{"tokens": TOKENS, **more})


TEXT = recipe.TextTransformer(width=8)


def test_a_card_says_what_the_data_says() -> None:
    assert ModelCard.of(CNN, rows(), None) == card()
    of_text = ModelCard.of(TEXT, texts(class_names=tuple("abcdefghij")), None)
    assert (of_text.input_dtype, of_text.input_shape, of_text.tokens) == ("int32", (8,), TOKENS)
    assert of_text.class_names == tuple("abcdefghij")
    assert ModelCard.of(MLP, rows(classes=1, task="regression"), None).task == "regression"


@pytest.mark.parametrize(
    ("data", "ours", "theirs"),
    [
        (rows(classes=11), "10 classes", "11 classes"),
        (rows(np.zeros((4, 1, 8, 9), np.uint8)), "[1, 8, 8]", "[1, 8, 9]"),
        (rows(np.zeros((4, 1, 8, 8), np.float32)), "uint8", "float32"),
        (rows(classes=1, task="regression"), "10 classes", "1 value (regression)"),
        (texts(), "uint8", "int32 [8], 300 tokens with padding 256"),
    ],
    ids=["classes", "shape", "dtype", "task", "tokens"],
)
def test_other_rows_are_refused_with_both_sides(data: Rows, ours: str, theirs: str) -> None:
    card().check_rows(rows(), "the teacher")
    with pytest.raises(RefusedError, match="the teacher was made for other data") as refused:
        card().check_rows(data, "the teacher")
    assert ours in str(refused.value.got)
    assert theirs in str(refused.value.expected)


@pytest.mark.parametrize(
    "data",
    [
        texts(tokens=TOKENS.model_copy(update={"vocabulary": 301})),
        texts(tokens=TOKENS.model_copy(update={"padding": 0})),
        texts(length=9),
        rows(np.full((4, 2, 8), 7, np.int32), tokens=TOKENS),
    ],
    ids=["vocabulary", "padding", "longer", "token types"],
)
def test_other_texts_are_refused_and_shorter_ones_are_not(data: Rows) -> None:
    of_text = ModelCard.of(TEXT, texts(), None)
    of_text.check_rows(texts(), "the teacher")
    of_text.check_rows(texts(length=5), "the teacher")
    with pytest.raises(RefusedError, match="the teacher was made for other data"):
        of_text.check_rows(data, "the teacher")


def test_classes_in_another_order_are_refused_with_both_lists() -> None:
    named = card(classes=3, class_names=("cat", "dog", "eel"))
    for fine in (("cat", "dog", "eel"), None):
        named.check_rows(rows(classes=3, class_names=fine), "the teacher")
    with pytest.raises(RefusedError, match="another order") as refused:
        named.check_rows(rows(classes=3, class_names=("dog", "cat", "eel")), "the teacher")
    assert "cat, dog, eel" in str(refused.value.got)
    assert "dog, cat, eel" in str(refused.value.expected)
    many = tuple(f"person {number}" for number in range(1000))
    other = (*many[:500], "nobody", *many[501:])
    with pytest.raises(RefusedError) as refused:
        card(classes=1000, class_names=many).check_rows(rows(classes=1000, class_names=other), "the teacher")
    assert refused.value.got == f"classes ..., {', '.join(many[500:510])}, ... (1,000 in all)"
    assert "classes ..., nobody, person 501" in str(refused.value)


def test_a_card_without_the_later_fields_still_reads(tmp_path: Path) -> None:
    """As the first ones were written."""
    save_model(tmp_path, build(card(), seed=0), card())
    document = json.loads((tmp_path / CARD).read_text()) | {"format": 1}
    del document["sha256"]
    earlier = ("format", "model", "input_shape", "input_dtype", "classes", "normalize", "weights_sha256")
    (tmp_path / CARD).write_text(json.dumps({key: document[key] for key in earlier}))
    whole = ModelCard.model_validate(document)
    assert load_card(tmp_path) == whole
    assert load_card(tmp_path).fingerprint == whole.fingerprint
    assert (whole.task, whole.tokens, whole.class_names) == ("classification", None, None)


def test_a_fingerprint_leaves_out_defaults_of_the_card() -> None:
    document = {
        "format": 1,
        "model": {"kind": "cnn", "width": 4, "depth": 2},
        "input_shape": [1, 8, 8],
        "input_dtype": "uint8",
        "classes": 10,
    }
    assert card().fingerprint == sha256(canonical_json(document))
    others: list[dict[str, Any]] = [
        {"task": "regression"},
        {"class_names": tuple("abcdefghij")},
        {"tokens": TOKENS},
        {"source_sha256": "0"},
        {"normalize": recipe.Normalize(mean=[0.0], std=[1.0])},
        {"model": recipe.Cnn(width=4, depth=1)},
    ]
    prints = {card(**changes).fingerprint for changes in others}
    assert len(prints | {card().fingerprint}) == len(others) + 1


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
