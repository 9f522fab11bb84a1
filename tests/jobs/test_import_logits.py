"""Logits that others computed become sealed stores: from every kind of file, and never from the wrong one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import akd_dist
from akd_dist.base import files
from akd_dist.base.errors import RefusedError
from akd_dist.cli import main
from akd_dist.cli.show import print_table
from akd_dist.data.row_cache import prepare
from akd_dist.data.source_rows import source_rows
from akd_dist.documents.fleet import FleetDocument
from akd_dist.documents.imported import ImportedDocument
from akd_dist.jobs.cache_teacher import cache_teacher
from akd_dist.jobs.planning.caching import open_inputs
from akd_dist.jobs.train_students import train_in_process
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.options import CacheOptions
from akd_dist.recipe import CacheSpec, EncodingSpec, load_recipe
from akd_dist.reporting.tables import fleet_table
from akd_dist.storage.reader import open_store
from akd_dist.storage.repair import verify_store
from tests.fleets import ANNEALING, a_recipe, a_student, store_bytes
from tests.imported_logits import CLASSES, IDS, KD, LABELS, ROWS, Home, Z, logits, refused

pytestmark = pytest.mark.usefixtures("own_process_state")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("imports"))


@pytest.fixture(scope="module")
def imported(home: Home) -> ImportedDocument:
    """All rows of the source, as .npy."""
    return home.bring(home.save(Z, "all.npy"))


def beside(folder: Path) -> dict[str, Any]:
    """Roots in a folder."""
    return {"store_root": folder / "stores", "cache_root": folder / "cache", "console": Console(quiet=True)}


# ---- what becomes of them


def test_each_split_holds_its_rows_of_the_file(home: Home, imported: ImportedDocument) -> None:
    where = source_rows(home.recipe().data)
    rows = prepare(home.recipe().data, home.cache)
    assert list(imported.splits) == ["train", "validation", "test"]
    assert not imported.left_out
    for split, part in imported.splits.items():
        store = open_store(part.store)
        assert np.array_equal(store.rows(0, 0, part.rows), Z[where[split].rows])
        assert np.array_equal(LABELS[where[split].rows], getattr(rows, split).labels)
        right = Z[where[split].rows].argmax(1) == LABELS[where[split].rows]
        assert part.agreement == pytest.approx(right.mean())
        assert store.manifest.teacher["imported"] == {"kind": "logits"}
    assert imported.kind == "logits"
    assert imported.shape == [ROWS, CLASSES]
    assert imported.dtype == "float32"


def test_the_same_logits_are_a_hit_and_the_same_bytes(home: Home, imported: ImportedDocument) -> None:
    before = store_bytes(Path(imported.splits["train"].store))
    again = home.bring(home.save(Z.astype(np.float64), "double.npy"))
    assert all(part.hit and part.shards_written == 0 for part in again.splits.values())
    assert again.teacher == imported.teacher
    assert store_bytes(Path(imported.splits["train"].store)) == before
    elsewhere = home.bring(home.save(Z), stores="elsewhere")
    assert store_bytes(Path(elsewhere.splits["train"].store)) == before
    assert not home.bring(home.save(logits(1)), stores="elsewhere").splits["train"].hit


def test_the_rows_of_the_split_alone_will_do(home: Home, imported: ImportedDocument) -> None:
    where = source_rows(home.recipe().data)
    train = home.bring(home.save(Z[where["train"].rows]))
    assert [part.id for part in train.splits.values()] == [imported.splits["train"].id]
    assert train.teacher == {"store": imported.splits["train"].id[:16]}
    assert "train rows alone" in train.left_out["test"]
    test = home.bring(home.save(Z[where["test"].rows]), split="test")
    assert [part.id for part in test.splits.values()] == [imported.splits["test"].id]


def test_rows_of_two_sources_are_no_rows_of_the_first(home: Home) -> None:
    train = source_rows(home.recipe().data)["train"].rows
    others = ROWS - len(train)  # so that the train rows of both are as many as the rows of the first
    numbers = np.random.default_rng(3).normal(size=(others, 3)).astype(np.float32)
    pq.write_table(pa.table({"input": list(numbers), "label": LABELS[:others]}), home.root / "others.parquet")
    recipe = home.recipe(unlabelled={"kind": "parquet", "path": str(home.root / "others.parquet")})
    z = np.concatenate([Z[train], logits(7)[:others]])
    assert len(z) == ROWS
    found = home.bring(home.save(z), recipe)
    assert np.array_equal(open_store(found.splits["train"].store).rows(0, 0, ROWS), z)
    assert "those of data.train that train, then those of data.unlabelled" in found.joined_by
    assert list(found.splits) == ["train"]
    assert "--split test" in found.left_out["test"]
    assert "then those of data.unlabelled" in refused(home, z[:-1], recipe=recipe)
    test = home.bring(home.save(Z), recipe, split="test")
    assert test.joined_by == "order: all rows of data.train"


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_key_joins_rows_in_any_order(home: Home, imported: ImportedDocument, kind: str) -> None:
    order = np.random.default_rng(9).permutation(ROWS)
    ids, z = np.array(IDS)[order], Z[order]
    path = home.root / f"keyed.{kind}"
    if kind == "npz":
        np.savez(path, logits=z, id=ids)
    else:
        pq.write_table(pa.table({"id": ids, "z": list(z)}), path)
    found = home.bring(path, key="id")
    assert {split: part.id for split, part in found.splits.items()} == {
        split: part.id for split, part in imported.splits.items()
    }
    assert found.joined_by == "the key id"


def test_keys_that_do_not_fit_are_named(home: Home) -> None:
    def keyed(ids: Any, z: np.ndarray) -> str:
        pq.write_table(pa.table({"id": ids, "z": list(z)}), home.root / "keys.parquet")
        with pytest.raises(RefusedError) as caught:
            home.bring(home.root / "keys.parquet", key="id")
        return str(caught.value)

    train = source_rows(home.recipe().data)["train"].rows
    lost = int(train[3])
    rest = [row for row in range(ROWS) if row != lost]
    assert f"no id {IDS[lost]}" in keyed([IDS[row] for row in rest], Z[rest])
    assert f"{IDS[0]} several times" in keyed([*IDS[1:], IDS[0], IDS[0]], np.concatenate([Z[1:], Z[:1], Z[:1]]))
    assert "id row-x" in keyed([*IDS, "row-x"], np.concatenate([Z, Z[:1]]))
    assert "not of one kind" in keyed(np.arange(ROWS), Z)
    assert "nulls" in keyed([None, *IDS[1:]], Z)
    with pytest.raises(RefusedError, match="has no label, by which"):
        home.bring(home.root / "keys.parquet", key="label")
    with pytest.raises(RefusedError, match=r"neither .*keys\.parquet nor data\.train has idd") as neither:
        home.bring(home.root / "keys.parquet", key="idd")
    assert neither.value.next == "name it: --key id"
    assert "input" in str(neither.value.got)
    with pytest.raises(RefusedError, match="no room for a key"):
        home.bring(home.save(Z), key="id")


def test_integers_of_any_kind_join_rows(home: Home) -> None:
    order = np.random.default_rng(9).permutation(ROWS)
    large = np.arange(ROWS, dtype=np.uint64) + np.uint64(2**64 - ROWS)
    table = pq.read_table(home.root / "data.parquet")
    keyed = table.append_column("large", pa.array(large)).append_column("small", pa.array(np.arange(ROWS)))
    pq.write_table(keyed, home.root / "keyed-data.parquet")
    recipe = home.recipe(train={"kind": "parquet", "path": str(home.root / "keyed-data.parquet")})

    def bring(key: str, keys: np.ndarray) -> ImportedDocument:
        arrays: dict[str, Any] = {"logits": Z[order], key: keys[order]}
        np.savez(home.root / "keys.npz", **arrays)
        return home.bring(home.root / "keys.npz", recipe, key=key, dry_run=True)

    small = np.arange(ROWS)
    ids = [
        {split: part.id for split, part in bring(key, keys).splits.items()}
        for key, keys in (
            ("large", large),
            ("large", large.astype(">u8")),
            ("small", small.astype(">i4")),
            ("small", small.astype(np.uint64)),
            ("id", np.array(IDS).astype(">U8")),
        )
    ]
    assert all(one == ids[0] for one in ids)
    with pytest.raises(RefusedError, match=r"rows that data\.train does not have"):
        bring("small", large)


def test_an_interrupted_import_goes_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sites = home.save(logits(3), "stopped.npy"), []

    def stop(site: str) -> None:
        sites.append(site)
        if sites.count("shard.before_publish") == 2:
            raise KeyboardInterrupt

    from akd_dist.storage import writer

    monkeypatch.setattr(writer, "failpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        home.bring(path)
    monkeypatch.setattr(writer, "failpoint", files.failpoint)
    found = home.bring(path)
    part = found.splits["train"]
    assert 0 < part.shards_written < part.shards
    assert not part.hit
    assert verify_store(str(home.root / "stores"), part.id) == []


def test_what_describes_logits_takes_none(home: Home) -> None:
    described = home.recipe().model_copy(update={"cache": CacheSpec(encoding=EncodingSpec(kind="top_k", k=2, rank=0))})
    assert "cache.encoding: top_k only describes them" in refused(home, Z, recipe=described)


def test_float16_is_checked_before_anything_is_written(home: Home) -> None:
    half = home.recipe().model_copy(update={"cache": home.recipe().cache.model_copy(update={"encoding": _half()})})
    large = Z.copy()
    large[7, LABELS[7]] = 70_000
    assert "not finite as float16" in refused(home, large, recipe=half)
    found = home.bring(home.save(Z), half)
    assert found.splits["train"].encoding == "float16"
    named = half.model_copy(update={"teacher": home.recipe(found.teacher).teacher})
    assert named.cache.encoding.kind == "float16"
    open_inputs(named, home.workspace(), students=False, again=False)
    with pytest.raises(RefusedError, match=r"cache\.encoding: float16"):
        open_inputs(home.recipe(found.teacher), home.workspace(), students=False, again=False)


def test_logits_that_an_encoding_loses_are_refused(home: Home) -> None:
    half = home.recipe().model_copy(update={"cache": home.recipe().cache.model_copy(update={"encoding": _half()})})
    said = refused(home, Z * np.float32(1e-9), recipe=half)
    assert "say nothing as they would be stored, in float16" in said
    assert f"{ROWS} of {ROWS} rows" in said
    one = Z.copy()
    one[11] *= 1e-9
    assert "1 of 800 rows, all zero or equal in all classes once rounded: 11" in refused(home, one, recipe=half)
    assert "equal in all classes" in refused(home, 1000 + Z * np.float32(1e-3), recipe=half)
    one[11] = [5, 5.0001, 5, 5]  # a row among many whose logits half precision does not tell apart
    assert home.bring(home.save(one), half, dry_run=True).dry_run
    assert home.bring(home.save(Z * np.float32(1e-9)), dry_run=True).dry_run


def _half() -> Any:
    return EncodingSpec(kind="float16")


# ---- as the teacher of a recipe


def test_no_teacher_is_needed_from_then_on(home: Home, imported: ImportedDocument) -> None:
    recipe = home.recipe(imported.teacher)
    options = CacheOptions(recipe, store_root=home.root / "stores", cache_root=home.cache, console=Console(quiet=True))
    cached = cache_teacher(recipe, options)
    assert cached["hit"]
    assert cached["id"] == imported.splits["train"].id
    assert cached["splits"]["test"]["id"] == imported.splits["test"].id


def test_a_store_of_train_rows_alone_will_do(home: Home, imported: ImportedDocument) -> None:
    recipe = home.recipe({"store": imported.splits["train"].id})
    (model,) = open_inputs(recipe, home.workspace(), students=True, again=False).models
    assert list(model.opened) == ["train"]
    by_path = home.recipe({"store": imported.splits["train"].store})
    (same,) = open_inputs(by_path, home.workspace(), students=False, again=False).models
    assert same.taught == model.taught


def test_log_probabilities_are_for_softmax_alone(home: Home) -> None:
    found = home.bring(home.save(Z - np.logaddexp.reduce(Z, axis=1, keepdims=True)))
    assert found.kind == "log_probabilities"
    assert not found.warnings
    open_inputs(home.recipe(found.teacher), home.workspace(), students=True, again=False)
    annealing = {"kind": "annealing_kd", "tau_max": 1, "stage1_epochs": 1, "stage2_epochs": 1}
    for objective in (annealing, {"kind": "continuation_kd", "tau_max": 1, "epochs": 1}):
        with pytest.raises(RefusedError, match="the student one cannot learn from log-probabilities"):
            open_inputs(home.recipe(found.teacher, objective), home.workspace(), students=True, again=False)
    warned = home.bring(home.save(Z - np.logaddexp.reduce(Z, axis=1, keepdims=True)), home.recipe(objective=annealing))
    assert "cannot learn from log-probabilities" in warned.warnings[0]


def test_a_softmax_sees_no_constant_at_any_temperature() -> None:
    from akd_dist.distill.losses import annealing_losses, softened_losses

    z, student = torch.from_numpy(Z).double(), torch.from_numpy(logits(4)).double()
    log_p = torch.log_softmax(z, dim=1)
    for temperature in (0.5, 1.0, 5.0, 40.0):
        ours, theirs = (softened_losses(student, one, temperature) for one in (z, log_p))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    c, phi = torch.logsumexp(z, dim=1), 0.3
    ours, theirs = (annealing_losses(student, one, phi, "sum") for one in (z, log_p))
    added = 2 * phi * c * (student - phi * z).sum(1) + CLASSES * (phi * c) ** 2
    torch.testing.assert_close(theirs - ours, added, rtol=1e-9, atol=1e-9)


def test_a_store_of_other_rows_is_refused(home: Home, imported: ImportedDocument) -> None:
    other = home.recipe(imported.teacher, seed=4)
    with pytest.raises(RefusedError, match="is not of the recipe's train rows"):
        open_inputs(other, home.workspace(), students=False, again=False)
    swapped = home.recipe({"store": {"train": imported.splits["test"].id}})
    with pytest.raises(RefusedError, match="is not of the recipe's train rows"):
        open_inputs(swapped, home.workspace(), students=False, again=False)
    with pytest.raises(RefusedError, match="no store begins with 'abc123'"):
        open_inputs(home.recipe({"store": "abc123"}), home.workspace(), students=False, again=False)


def test_views_need_logits_of_their_own(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    z = (3 * np.eye(10)[labels] + np.random.default_rng(0).normal(size=(len(labels), 10))).astype(np.float32)
    shifted = {"views": 2, "augmentation": {"kind": "shift", "pixels": 1}}
    recipe = a_recipe([a_student("one")], data={"train": {"kind": "digits"}, **shifted}, teacher={"store": "0" * 64})
    place: dict[str, Any] = {
        "store_root": tmp_path / "stores",
        "cache_root": tmp_path / "cache",
        "console": Console(quiet=True),
    }
    np.save(tmp_path / "one.npy", z)
    with pytest.raises(RefusedError, match=r"set data\.augmentation: none"):
        akd_dist.import_logits(recipe, tmp_path / "one.npy", **place)
    np.save(tmp_path / "two.npy", np.stack([z, z + 0.25]))
    found = ImportedDocument.model_validate(akd_dist.import_logits(recipe, tmp_path / "two.npy", **place), strict=False)
    assert "taken at your word" in found.warnings[0]
    assert list(found.splits) == ["train"]
    rows = source_rows(recipe.data)["train"].rows
    assert np.array_equal(open_store(found.splits["train"].store).rows(1, 0, len(rows)), z[rows] + np.float32(0.25))
    test = akd_dist.import_logits(recipe, tmp_path / "one.npy", split="test", **place)
    assert list(test["splits"]) == ["test"]


def test_regression_takes_one_column(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 3)).astype(np.float32)
    label = x.sum(1)
    pq.write_table(pa.table({"input": list(x), "label": label}), tmp_path / "data.parquet")
    data = {"train": {"kind": "parquet", "path": str(tmp_path / "data.parquet")}, "task": "regression"}
    recipe = a_recipe([a_student("one", objective=KD)], data=data, teacher={"store": "0" * 64})
    place: dict[str, Any] = {
        "store_root": tmp_path / "stores",
        "cache_root": tmp_path / "cache",
        "console": Console(quiet=True),
    }
    said = label + 0.1 * generator.normal(size=400)
    np.save(tmp_path / "z.npy", said)
    found = akd_dist.import_logits(recipe, tmp_path / "z.npy", **place)
    assert found["splits"]["train"]["agreement"] > 0.95
    np.save(tmp_path / "s.npy", generator.permutation(said))
    with pytest.raises(RefusedError, match="look shuffled"):
        akd_dist.import_logits(recipe, tmp_path / "s.npy", **place)


# ---- stores as any other


def test_an_import_mends_a_damaged_store(home: Home) -> None:
    path = home.save(logits(6), "mended.npy")
    part = home.bring(path).splits["train"]
    before = store_bytes(Path(part.store))
    (shard, *_) = sorted(Path(part.store).glob("arrays.zarr/logits/c/0/*/0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(bytes(data))
    again = home.bring(path).splits["train"]
    assert again.repaired == ["logits/c/0/0/0"]
    assert store_bytes(Path(part.store)) == before


def test_commands_know_imported_stores(
    home: Home, imported: ImportedDocument, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: cli\ndata:\n  train: {{kind: parquet, path: {home.root / 'data.parquet'}}}\nstudents:\n"
        "- {model: {kind: mlp, hidden: 8}, objective: {kind: kd, epochs: 1}, optimizer: {kind: adamw, lr: 1e-3}}\n"
    )
    store_id, file = imported.splits["train"].id, str(home.root / "all.npy")

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["stores", *words, "--store-root", str(home.root / "stores")])
        assert left.value.code == 0
        return capsys.readouterr().out

    cached = ("--cache-root", str(home.cache))
    told = call("import", str(recipe), file, *cached)
    assert "a hit" in told
    pasted, line = told.splitlines()[-3].removeprefix("next: "), told.splitlines()[-1]
    assert line.startswith(f'teacher: {{store: {{train: "{store_id[:16]}"')
    assert "which has no teacher yet" in told
    words = shlex.split(pasted)
    assert words[:3] == ["akd-dist", "train-students", str(recipe)]
    assert words[words.index("--store-root") + 1] == str(home.root / "stores")
    taught = load_recipe(recipe, [words[words.index("--set") + 1]]).teacher
    recipe.write_text(f"{recipe.read_text()}{line}\n")
    assert load_recipe(recipe).teacher == taught
    assert taught.store is not None
    assert taught.store.train == store_id[:16]
    alone = home.save(Z[source_rows(home.recipe().data)["test"].rows], "test.npy")
    assert "in place of its teacher" in call("import", str(recipe), str(alone), "--split", "test", *cached)
    recipe.write_text(recipe.read_text().replace(line, ""))
    told = call("import", str(recipe), str(alone), "--split", "test", *cached)
    assert "import the logits of the train rows as well" in told
    assert json.loads(call("import", str(recipe), file, "--dry-run", "--json", *cached))["dry_run"] is True
    assert "imported logits" in call("show", store_id, *cached)
    listed = json.loads(call("list", "--json"))["stores"]
    assert next(one for one in listed if one["id"] == store_id)["imported"] == "logits"
    assert "is what was sealed" in call("verify", store_id)


def test_repair_says_to_import_again(home: Home, imported: ImportedDocument) -> None:
    from akd_dist.jobs.repair import repair

    with pytest.raises(RefusedError, match="were imported: they cannot be computed again") as caught:
        repair(str(home.root / "stores"), imported.splits["train"].id, None, str(home.cache))
    assert f"stores import RECIPE {home.root / 'all.npy'}" in str(caught.value)


@pytest.mark.ray
def test_students_are_trained_from_a_store_of_train_rows_alone(
    ray_cluster: None, home: Home, imported: ImportedDocument, tmp_path: Path
) -> None:
    """And all that would be said of a teacher on the test rows is left out."""
    recipe = home.recipe({"store": imported.splits["train"].id[:16]}, ANNEALING)
    place: dict[str, Any] = {"store_root": home.root / "stores", "cache_root": home.cache}
    fleet = akd_dist.train_students(recipe, **place, run_root=tmp_path, console=Console(quiet=True))
    assert fleet["students"][0]["state"] == "done"
    assert fleet["students"][0]["agreement"] is None
    assert fleet["teacher"] == {
        "model": "imported logits",
        "parameters": None,
        "test": None,
        "fingerprint": open_store(imported.splits["train"].store).manifest.identity.teacher,
    }
    read = FleetDocument.model_validate(fleet, strict=False)
    assert "imported logits" in (tmp_path / "imported" / "report.html").read_text()
    print_table(fleet_table(read))
    # From the very logits that a model would have said, the very weights: what it was matters to nobody.
    again = train_in_process(
        recipe, {"train": imported.splits["train"].store}, run=tmp_path / "plain", cache_root=str(home.cache)
    )
    assert again["one"]["test"] == fleet["students"][0]["test"]


def test_a_dry_run_writes_nothing(home: Home) -> None:
    found = home.bring(home.save(Z), stores="dry", dry_run=True)
    assert found.dry_run
    assert not found.splits["train"].hit
    assert not (home.root / "dry").exists()


def test_stores_of_imports_may_lie_in_object_storage(home: Home, imported: ImportedDocument, bucket: str) -> None:
    place: dict[str, Any] = {"store_root": f"{bucket}/stores", "cache_root": home.cache, "console": Console(quiet=True)}
    for hit in (False, True):
        found = akd_dist.import_logits(home.recipe(), home.root / "all.npy", **place)
        part = ImportedDocument.model_validate(found, strict=False).splits["train"]
        assert (part.id, part.hit) == (imported.splits["train"].id, hit)
    named = home.recipe({"store": part.store})
    workspace = Workspace(f"{bucket}/stores", str(home.cache), console=Console(quiet=True))
    (model,) = open_inputs(named, workspace, students=False, again=False).models
    assert model.opened["train"].id == part.id
