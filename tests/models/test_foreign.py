"""What comes from elsewhere: code that it names is not run, and sizes that it claims are refused in time."""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import DamagedError, RecipeError, RefusedError
from akd_dist.base.files import parse_json
from akd_dist.base.trusted import Trusted
from akd_dist.cli import main
from akd_dist.data.factories import import_factory, source_sha256
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.repair import repair
from akd_dist.jobs.results import describe_teacher
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models import folder as models
from akd_dist.models.build import build, check_memory
from akd_dist.models.card import CARD, card_bytes, parse_card
from akd_dist.models.folder import load_card, load_model, save_model
from akd_dist.serve.evaluation import evaluate
from akd_dist.serve.examples import DataRequest
from akd_dist.storage.reader import open_store
from tests.fleets import HARD, a_recipe, a_student, own, resealed
from tests.small_models import CNN, card, images

NETS = """
from torch import nn
def net(input_shape, classes, wide=False):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], classes))
other = net
"""


def a_module(folder: Path, name: str, code: str = NETS) -> Path:
    """A module that leaves a file beside itself when it is imported."""
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import pathlib\npathlib.Path(__file__ + '.ran').touch()\n{code}")
    return path


def ran(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ran"))


def a_factory(name: str, trusted: Trusted) -> recipe.Custom:
    return recipe.trust(recipe.Custom(factory=name), trusted)


def a_folder(folder: Path, spec: recipe.Model = CNN) -> Path:
    """A model folder, written by whoever had the code."""
    written = card(spec)
    if isinstance(spec, recipe.Custom):
        written = written.model_copy(update={"source_sha256": source_sha256(spec, "()")})
    save_model(folder, build(written, seed=0), written)
    return folder


def forged(folder: Path, **changes: Any) -> Path:
    """A model folder whose card says something else, with the right checksum."""
    a_folder(folder)
    document = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(resealed(document | changes)))
    return folder


# ---- whose code runs


def importable() -> list[str]:
    """Every top-level name that an import statement could begin with here."""
    found = {module.name for module in pkgutil.iter_modules()}
    return sorted(found | set(sys.stdlib_module_names) | set(sys.builtin_module_names) | {"__main__"})


@pytest.mark.parametrize("named_by", ["recipe", "model folder"])
def test_nothing_that_is_installed_is_a_factory_by_default(named_by: str, tmp_path: Path) -> None:
    names = importable()
    assert {"sympy", "fsspec", "psutil", "cloudpickle", "yaml", "requests", "pytest", "os", "torch", "akd_dist"} < {
        *names
    }
    before = set(sys.modules)
    for name in names:
        for factory in (f"{name}:run", f"{name}.inner:run"):
            said = Trusted(factories=(factory,), folder=str(tmp_path)) if named_by == "recipe" else Trusted()
            with pytest.raises((RefusedError, ValidationError)):  # ValidationError: no name that `import` takes
                import_factory(a_factory(factory, said), "()")
    assert set(sys.modules) == before


def test_a_model_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """sympy comes with torch, and `simplify` evaluates text."""
    monkeypatch.chdir(tmp_path)
    spec = {"factory": "sympy:simplify", "arguments": {"expr": "__import__('os').system('id > owned')"}}
    forged(tmp_path / "folder", model={"kind": "custom", **spec})
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "folder", "digits", "--cache-root", str(tmp_path / "cache")])
    assert left.value.code == 4
    assert not (tmp_path / "owned").exists()
    said = capsys.readouterr().err
    for word in ("sympy:simplify", "model folder", "--trust sympy", "code: [sympy]"):
        assert word in said


def test_a_factory_comes_from_the_folder_or_listed_code(tmp_path: Path) -> None:
    a_module(tmp_path, "foreign_near")
    a_module(tmp_path / "foreign_pack", "deep")
    a_module(tmp_path / "elsewhere", "foreign_far")
    sys.path.append(str(tmp_path / "elsewhere"))
    for name in ("foreign_near:net", "foreign_pack.deep:net"):
        import_factory(own(recipe.Custom(factory=name), tmp_path), "()")
        import_factory(own(recipe.Custom(factory=name), tmp_path / "elsewhere" / ".."), "()")
    with pytest.raises(RefusedError, match="not one of the recipe's own") as refused:
        import_factory(own(recipe.Custom(factory="foreign_far:net"), tmp_path / "foreign_pack"), "()")
    assert "code: [foreign_far]" in str(refused.value)
    assert not ran(tmp_path / "elsewhere")
    import_factory(a_factory("foreign_far:net", Trusted(modules=("foreign_far",))), "()")


@pytest.mark.parametrize(
    ("listed", "allowed"), [("mine", True), ("mine.nets", True), ("mine.net", False), ("min", False)]
)
def test_listed_code_is_a_module_and_what_lies_below(listed: str, allowed: bool) -> None:
    assert Trusted(modules=(listed,)).lists("mine.nets") is allowed
    assert Trusted(modules=(listed,)).lists("mine.nets.deep") is allowed


def test_a_file_named_like_an_installed_module_is_refused(tmp_path: Path) -> None:
    for name in ("yaml", "sympy", "colorsys"):
        a_module(tmp_path, name)
        loaded = name in sys.modules
        with pytest.raises(RefusedError, match=r"not the one in the recipe's folder") as refused:
            import_factory(own(recipe.Custom(factory=f"{name}:net"), tmp_path), "()")
        assert "another name" in str(refused.value.next)
        assert (name in sys.modules) == loaded
    assert not ran(tmp_path)


def test_an_environment_in_the_folder_is_not_the_recipes(tmp_path: Path) -> None:
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    a_module(packages, "foreign_installed")
    a_module(packages / "foreign_parent", "__init__")
    a_module(packages / "foreign_parent", "inner")
    sys.path.append(str(packages))
    for folder in (tmp_path, packages):
        for name in ("foreign_installed:net", "foreign_parent.inner:net"):
            with pytest.raises(RefusedError):
                import_factory(own(recipe.Custom(factory=name), folder), "()")
    assert not ran(tmp_path)


def test_a_link_out_of_the_recipes_folder_is_not_the_recipes_own(tmp_path: Path) -> None:
    a_module(tmp_path / "elsewhere", "foreign_linked")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "foreign_linked.py").symlink_to(tmp_path / "elsewhere" / "foreign_linked.py")
    with pytest.raises(RefusedError, match="not one of the recipe's own"):
        import_factory(own(recipe.Custom(factory="foreign_linked:net"), tmp_path / "recipe"), "()")
    (tmp_path / "recipe" / "foreign_pack").mkdir()
    (tmp_path / "recipe" / "foreign_pack" / "deep.py").symlink_to(tmp_path / "elsewhere" / "foreign_linked.py")
    with pytest.raises(RefusedError, match="not one of the recipe's own"):
        import_factory(own(recipe.Custom(factory="foreign_pack.deep:net"), tmp_path / "recipe"), "()")
    assert not ran(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # but the folder itself may be one
    import_factory(own(recipe.Custom(factory="foreign_linked:net"), tmp_path / "link"), "()")


def test_a_model_folder_runs_what_the_recipe_names(tmp_path: Path) -> None:
    a_module(tmp_path, "foreign_same")
    said = own(recipe.Custom(factory="foreign_same:net"), tmp_path).trusted
    mine = a_folder(tmp_path / "mine", a_factory("foreign_same:net", said))
    theirs = forged(tmp_path / "theirs", model={"kind": "custom", "factory": "foreign_same:other", "arguments": {}})
    sys.modules.pop("foreign_same")
    (marker,) = ran(tmp_path)
    marker.unlink()
    for folder, trusted in ((mine, Trusted()), (theirs, said)):
        with pytest.raises(RefusedError, match="is not run: the model folder"):
            load_model(folder, trusted)
    assert not ran(tmp_path)
    assert load_model(mine, said)(images()).shape == (3, 10)
    with pytest.raises(RefusedError, match="is not run"):
        akd_dist.load_model(mine)
    assert akd_dist.load_model(mine, trust="foreign_same")(images()).shape == (3, 10)
    with pytest.raises(RecipeError, match="name of a module"):
        akd_dist.load_model(mine, trust=("foreign_same:net",))


def test_a_run_is_not_the_users_word_and_a_recipe_file_is(tmp_path: Path) -> None:
    a_module(tmp_path, "foreign_run")
    student = a_student("one", model={"kind": "custom", "factory": "foreign_run:net"}, objective=HARD)
    fleet = a_recipe([student], folder=str(tmp_path))
    run, cache = tmp_path / "runs" / "mine", str(tmp_path / "cache")
    train_in_process(fleet, {}, run=run, cache_root=cache)
    for path in (run / "recipe.yaml", tmp_path / "recipe.yaml"):
        path.write_text(fleet.to_yaml())
    folder = run / "students" / "one"
    for data in (str(run), "digits"):
        with pytest.raises(RefusedError, match=r"foreign_run:net is not run: the model folder"):
            evaluate(str(folder), DataRequest(data), Path(cache))
        trusting = evaluate(str(folder), DataRequest(data, trust=("foreign_run",)), Path(cache))
        assert trusting.student.model == "net"
    found = evaluate(str(folder), DataRequest(str(tmp_path / "recipe.yaml")), Path(cache))
    assert found.split == "test"


@pytest.mark.parametrize("link", ["linked/sub/__init__.py", "linked/mid", "linked/sub/leaf.py", "linked/__init__.py"])
def test_no_link_on_the_way_to_a_module_leads_out_of_the_folder(link: str, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for package in ("linked", "linked/sub", "linked/mid"):
        for name in ("__init__", "leaf"):
            a_module(mine / package, name)
            a_module(theirs / package, name)
    path = mine / link
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(theirs / link)
    module = "linked.mid.leaf" if "mid" in link else "linked.sub.leaf"
    said = Trusted(factories=(f"{module}:net",), folder=str(mine))
    with pytest.raises(RefusedError, match=r"is not (one of the recipe's own|the one in)"):
        import_factory(a_factory(f"{module}:net", said), "()")
    assert not ran(tmp_path)


def test_a_foreign_run_gives_the_trusted_module_alone(tmp_path: Path) -> None:
    """Libraries look for modules that may be missing here, such as triton: those of the folder would run."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for name in ("foreign_listed", "foreign_optional"):
        a_module(theirs, name)
    a_module(mine, "foreign_installed")
    sys.path.append(str(mine))
    try:
        for name in ("foreign_listed", "foreign_installed"):
            trusted = Trusted(modules=(name,)).seen_from("the run", str(theirs))
            import_factory(a_factory(f"{name}:net", trusted), "()")
        assert str(theirs) not in sys.path
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("foreign_optional")
        assert ran(tmp_path) == [mine / "foreign_installed.py.ran", theirs / "foreign_listed.py.ran"]
    finally:
        sys.path.remove(str(mine))


def test_a_recipe_without_folder_takes_no_foreign_code(tmp_path: Path) -> None:
    a_module(tmp_path, "foreign_beside")
    said = Trusted(factories=("foreign_beside:net",)).seen_from("the run", str(tmp_path))
    with pytest.raises(RefusedError, match="cannot be imported"):
        import_factory(a_factory("foreign_beside:net", said), "()")
    assert not ran(tmp_path)


def test_a_runs_own_data_are_not_read_by_its_code(tmp_path: Path) -> None:
    code = "import pyarrow as pa\nTABLE = pa.table({'input': [[1.0] * 4] * 20, 'label': [0, 1] * 10})\n"
    code += "def rows():\n    return TABLE\n"
    a_module(tmp_path, "foreign_rows", code)
    data = {"train": {"kind": "custom", "factory": "foreign_rows:rows"}, "validation": 0.2, "test": 0.2}
    fleet = a_recipe([a_student("one", objective=HARD)], data=data, folder=str(tmp_path))
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(fleet.to_yaml())
    written = card(recipe.Mlp(hidden=2), input_shape=(4,), input_dtype="float32", classes=2)
    save_model(tmp_path / "model", build(written, seed=0), written)
    with pytest.raises(RefusedError, match=r"foreign_rows:rows is not run: the recipe"):
        evaluate(str(tmp_path / "model"), DataRequest(str(run)), tmp_path / "cache")
    assert not ran(tmp_path)
    assert (
        evaluate(str(tmp_path / "model"), DataRequest(str(run), trust=("foreign_rows",)), tmp_path / "cache").rows == 4
    )


def test_a_teacher_and_a_store_are_run_on_the_recipes_word(tmp_path: Path) -> None:
    """The folder of a teacher, the manifest of its store, and the recipe that a store keeps for repairs."""
    a_module(tmp_path, "foreign_teacher")
    module = "foreign_teacher"
    said = own(recipe.Custom(factory=f"{module}:net"), tmp_path).trusted
    teacher = a_folder(tmp_path / "teacher", a_factory(f"{module}:net", said))
    stores, cache = str(tmp_path / "stores"), str(tmp_path / "cache")
    plain = a_recipe([a_student("one")], teacher={"weights": str(teacher)}, folder=str(tmp_path))
    with pytest.raises(RefusedError, match="is not run: the model folder"):
        akd_dist.cache_teacher(plain, store_root=stores, cache_root=cache, dry_run=True)
    listing = a_recipe([a_student("one")], teacher={"weights": str(teacher)}, folder=str(tmp_path), code=[module])
    assert listing.identity() == plain.identity()
    plan = akd_dist.cache_teacher(listing, store_root=stores, cache_root=cache, dry_run=True)
    assert plan["splits"]["train"]["shards"]
    store = cache_in_process(listing, str(teacher), store_root=stores, cache_root=cache)
    opened, rows = open_store(store["store"]), prepare(listing.data, tmp_path / "cache").test
    test = open_store(store["splits"]["test"]["store"])
    with pytest.raises(RefusedError, match="is not run: the store"):
        describe_teacher(opened, test, rows, plain.own().trusted)
    assert describe_teacher(opened, test, rows, listing.trusted).parameters == 650
    (shard,) = [path for path in Path(store["store"]).rglob("*") if path.is_file() and "c" in path.parts][:1]
    shard.unlink()
    with pytest.raises(RefusedError, match="is not run: the model folder"):
        repair(stores, store["id"], None, cache)
    assert repair(stores, store["id"], None, cache, trust=(module,))["repaired"]


def test_trust_goes_to_other_processes_not_into_documents(tmp_path: Path) -> None:
    fleet = a_recipe([a_student("one", model={"kind": "custom", "factory": "m:net"})], folder=str(tmp_path))
    (spec,) = pickle.loads(pickle.dumps(fleet.students))  # as Ray sends them
    assert isinstance(spec.model, recipe.Custom)
    assert spec.model.trusted == fleet.trusted
    assert fleet.trusted.factories == ("m:net",)
    (read,) = recipe.Recipe.model_validate_json(fleet.model_dump_json()).students
    assert isinstance(read.model, recipe.Custom)
    assert read.model.trusted == Trusted()


# ---- a card vouches for itself


def test_any_flip_in_a_card_is_found(tmp_path: Path) -> None:
    written = card(recipe.Mlp(hidden=2), normalize=recipe.Normalize(mean=[0.305], std=[0.376]))
    save_model(tmp_path, build(written, seed=0), written)
    whole, read = (tmp_path / CARD).read_bytes(), load_card(tmp_path)
    same = 0
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            try:
                assert parse_card(bytes(flipped), tmp_path) == read
                same += 1
            except DamagedError:
                pass
    assert same < whole.count(b"\n") * 8  # white space for white space
    (tmp_path / CARD).write_bytes(whole.replace(b"0.376", b"0.336"))
    with pytest.raises(DamagedError, match="cannot be read") as damaged:
        load_model(tmp_path)
    assert damaged.value.code == 5


def test_a_foreign_or_unsigned_card_is_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        save_model(tmp_path / name, build(card(), seed=seed), card())
    whole = (tmp_path / "one" / CARD).read_bytes()
    document = json.loads(whole)
    (tmp_path / "two" / CARD).write_bytes(whole)
    with pytest.raises(DamagedError, match="not those that were saved"):
        load_model(tmp_path / "two")
    bare = {key: value for key, value in document.items() if key != "sha256"}
    twice = whole.decode().replace('"classes": 10', '"classes": 11, "classes": 10')
    for changed in (json.dumps(bare), json.dumps(bare | {"format": 1, "sha256": document["sha256"]}), twice):
        (tmp_path / "one" / CARD).write_text(changed)
        with pytest.raises(DamagedError, match="cannot be read"):
            load_model(tmp_path / "one")
    (tmp_path / "one" / CARD).write_text(json.dumps(bare | {"format": 1}))  # as it was before cards had one
    assert card_bytes(load_card(tmp_path / "one")) == whole


# ---- sizes from elsewhere

HUGE = [
    ({"classes": -3}, "classes"),
    ({"classes": 10**19}, "classes"),
    ({"input_shape": [1, 10**5, 10**5]}, "input_shape"),
    ({"input_shape": [1, 0, 8]}, "input_shape"),
    ({"input_shape": [1] * 100}, "input_shape"),
    ({"input_shape": [10**30]}, "input_shape"),
    ({"model": {"kind": "mlp", "hidden": [1] * 10**5}}, "hidden"),
    ({"model": {"kind": "mlp", "hidden": 10**19}}, "hidden"),
    ({"model": {"kind": "cnn", "width": 8, "depth": 10**19}}, "depth"),
    ({"model": {"kind": "resnet", "depth": 6 * 10**5 + 2}}, "depth"),
    ({"model": {"kind": "text_transformer", "width": 8, "depth": 10**5}}, "depth"),
    ({"tokens": {"vocabulary": 10**12, "padding": 0}}, "vocabulary"),
    ({"class_names": ["a", "b"]}, "class_names"),
]


@pytest.mark.parametrize(("changes", "field"), HUGE, ids=[f"{field}-{place}" for place, (_, field) in enumerate(HUGE)])
def test_sizes_that_no_model_has_are_refused_with_their_field(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(DamagedError, match=field) as damaged:
        load_model(forged(tmp_path / "folder", **changes))
    assert len(str(damaged.value)) < 3_000


@pytest.mark.parametrize(
    "changes",
    [{"class_names": list(range(10**5))}, {"format": "a" * 10**6}, {f"key{number}": 0 for number in range(10**4)}],
    ids=["a wrong name for each class", "a long value", "many keys"],
)
def test_what_is_told_of_a_card_is_short(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="cannot be read") as damaged:
        load_model(forged(tmp_path / "folder", **changes))
    assert len(str(damaged.value)) < 25_000


def test_a_model_of_single_numbers_is_refused(tmp_path: Path) -> None:
    folder = forged(tmp_path / "folder", input_shape=[], model=recipe.Mlp(hidden=4).model_dump(mode="json"))
    with pytest.raises(RefusedError, match="does not fit the inputs"):
        load_model(folder)


BEYOND_MEMORY: list[dict[str, Any]] = [
    {"model": recipe.Mlp(hidden=10**11)},
    {"model": recipe.Mlp(hidden=[10**12, 10**12, 10**12])},
    {"model": CNN, "classes": 10**9, "input_shape": (3, 10_000, 10_000)},
    {"model": recipe.ResNet(depth=8, width=10**6)},
    {"model": recipe.ResNet(depth=8, width=512), "input_shape": (1, 80_000, 80_000)},
]


@pytest.mark.parametrize("changes", BEYOND_MEMORY, ids=range(len(BEYOND_MEMORY)))
def test_what_no_memory_holds_is_refused_before_a_model_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "folder")
    written = load_card(folder).model_copy(update=changes)
    (folder / CARD).write_bytes(card_bytes(written))
    with pytest.raises(RefusedError, match=r"does not fit the memory|cannot be built"):
        load_model(folder)


def test_weights_of_other_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forged(tmp_path / "folder", model={"kind": "mlp", "hidden": 10})
    monkeypatch.setattr(models, "build", lambda *_, **__: pytest.fail("it was made"))
    with pytest.raises(RefusedError, match=r"do not fit the model") as refused:
        load_model(folder)
    assert "0.weight (4, 1, 3, 3) instead of nothing" in str(refused.value.got)
    assert "1.bias missing instead of (10,)" in str(refused.value.got)


def test_the_memory_of_ordinary_models_is_known_beforehand() -> None:
    for spec in (
        CNN,
        recipe.Mlp(hidden=[6, 5], dropout=0.1),
        recipe.ResNet(depth=8, width=4),
        recipe.PlainCnn(layers=2),
    ):
        state = torch.get_rng_state()
        shapes = check_memory(card(spec))
        assert torch.equal(torch.get_rng_state(), state)
        module = build(card(spec), seed=0)
        assert {f"body.{name}": shape for name, shape in (shapes or {}).items()} == {
            name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
        }


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers", "vocab_size"])
def test_bad_numbers_of_a_configuration_are_refused(key: str) -> None:
    from akd_dist.models import huggingface_config

    with pytest.raises(RefusedError, match="a number that no model has") as refused:
        huggingface_config.configuration({"model_type": "bert", key: 10**12}, "theirs")
    assert key in str(refused.value.got)


ODD_JSON = [b"[" * 200_000, b'{"a":' * 200_000, b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}']


@pytest.mark.parametrize("data", ODD_JSON, ids=["brackets", "braces", "twice", "twice within"])
def test_json_that_no_two_readers_take_alike_is_no_json(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|stands twice"):
        parse_json(data)
    folder = a_folder(tmp_path / "folder")
    (folder / CARD).write_bytes(data)
    with pytest.raises(DamagedError, match="cannot be read"):
        load_card(folder)
