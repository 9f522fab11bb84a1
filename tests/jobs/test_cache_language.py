"""Logits of language models, and of classifiers with many classes: cached, described, resumed, mended, refused."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console

import akd_dist
from akd_dist import recipe as recipes
from akd_dist.base.errors import AkdError, DamagedError, RecipeError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill import target_shards
from akd_dist.distill.cards import MEASURED, MEASURED_ROWS, fidelity_warnings, mass_warnings
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.target_shards import FEWEST_TARGETS
from akd_dist.distill.target_teacher import LanguageTeacher
from akd_dist.distill.teacher import probe_rows
from akd_dist.documents.check import TeacherCheck
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.language import check_pretrained
from akd_dist.jobs.repair import repair
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard, blocks_of
from akd_dist.models.folder import read_model, save_model
from akd_dist.recipe import Recipe
from akd_dist.storage import catalog
from akd_dist.storage.decoder import probabilities
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.targets import StoredTargets
from akd_dist.storage.top_k import TopK
from tests.fleets import a_recipe, a_student, a_teacher, store_bytes, weights
from tests.survivors import FORKS
from tests.tokenizers import a_byte_pair_tokenizer

pytestmark = pytest.mark.usefixtures("own_process_state")

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "after", "red", "green", "blue", "of")
TOP_K = {"kind": "top_k", "k": 4, "rank": 4, "probe_rows": 8}
QUIET = Console(quiet=True)
SHORT = a_student(
    "one",
    model={"kind": "causal_lm", "width": 16, "depth": 1, "heads": 2},
    objective={"kind": "kd", "epochs": 1, "temperature": 2.0},
    batch=8,
)


@pytest.fixture(scope="module")
def corpus(home: Path) -> Path:
    """Some documents, one a line's file, and a teacher of random weights that has something to say."""
    draw = random.Random(0)
    (home / "texts").mkdir()
    for number in range(60):
        text = " ".join(draw.choices(WORDS, k=draw.randint(20, 120)))
        (home / "texts" / f"{number:02}.txt").write_text(text + ("x" if number == 40 else ""))
    rows = rows_of(home)
    card = ModelCard.of(recipes.CausalLm(width=32, depth=1, heads=2, tied=False), rows, None)
    module = build(card, seed=7)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(4.0)
    save_model(home / "teacher", module, card)
    with torch.no_grad():
        module.get_parameter("embed_tokens.weight")[ord("x")] = float("nan")
    save_model(home / "nan", module, card)
    return home


def of(home: Path, encoding: Any = TOP_K, **changes: Any) -> Recipe:
    document = {
        "name": "lm",
        "data": {
            "task": "language_model",
            "train": {"kind": "text", "path": str(home / "texts"), "input": "text"},
            "text": {"kind": "bytes", "length": 64},
            "validation": 0.2,
            "test": 0.2,
        },
        "teacher": {"weights": str(home / "teacher")},
        "cache": {"encoding": encoding, "batch_rows": 8},
        "students": [a_student("one", model={"kind": "causal_lm", "width": 16, "depth": 1, "heads": 2})],
    }
    return Recipe.model_validate(document | changes).own()


def rows_of(home: Path) -> Rows:
    return prepare(of(home).data, home / "cache").train


def cached(home: Path, root: Path | str, encoding: Any = TOP_K, **changes: Any) -> dict[str, Any]:
    places = {"store_root": str(root), "cache_root": str(home / "cache")}
    return cache_in_process(of(home, encoding, **changes), str(home / "teacher"), **places)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> Path:
    """A root with the stores of all splits."""
    cached(corpus, corpus / "stores")
    return corpus / "stores"


def train_store(root: Path, home: Path) -> LogitStore:
    found = [one for one in catalog.list_stores(str(root)) if one.dataset == rows_of(home).fingerprint]
    return open_store(f"{root}/{found[0].id}")


def stores_in(root: str, home: Path) -> dict[str, str]:
    """Those of all splits."""
    said = {one.dataset: f"{root}/{one.id}" for one in catalog.list_stores(root)}
    return {split: said[of_split] for split, of_split in prepare(of(home).data, home / "cache").fingerprints.items()}


def gathered(store: LogitStore, home: Path) -> dict[str, np.ndarray]:
    """All arrays of the first view."""
    targets = StoredTargets(store, home / "cache")
    targets.move(0, [(0, store.num_rows)])
    found, _ = targets.gather(np.arange(store.num_rows))
    targets.close()
    return found


def said_online(home: Path, rows: Rows) -> torch.Tensor:
    """The teacher's logits of all targets, block by block and without a store."""
    module, _ = read_model(home / "teacher", blocks=blocks_of(rows))
    blocks = torch.from_numpy(np.array(rows.inputs))
    with torch.inference_mode():
        return torch.cat([module(blocks[[at]])[0, blocks[at, 2].bool()] for at in range(len(blocks))])


def test_a_store_describes_what_the_teacher_says(corpus: Path, undisturbed: Path) -> None:
    store, rows = train_store(undisturbed, corpus), rows_of(corpus)
    z, arrays = said_online(corpus, rows), gathered(store, corpus)
    assert store.manifest.targets == rows.targets == len(z)
    np.testing.assert_array_equal(store.offsets, rows.offsets)
    np.testing.assert_array_equal(arrays["ids"][:, 0], z.argmax(1).numpy())
    identity, dictionary = store.manifest.identity, store.dictionary()
    top_k = identity.top_k
    p_hat = probabilities(top_k, top_k.unpack(arrays, rows.classes), dictionary, 2.0)
    log_p_hat = torch.from_numpy(np.log(p_hat))
    kl = (torch.softmax(z.double() / 2, 1) * ((z / 2).log_softmax(1).double() - log_p_hat)).sum(1).mean()
    card = store.manifest.fidelity
    assert card is not None
    assert kl == pytest.approx(card["at"][1]["kl"], rel=0.3)  # the card is of some of them
    assert identity.tokens == {"tokenizer": rows.tokens and rows.tokens.tokenizer, "vocabulary": rows.classes}
    meant = np.array(rows.inputs)
    labels = np.concatenate([one[0, 1:][one[2, :-1] != 0] for one in meant])
    agreed = sum(record.rows * (record.label_agreement or 0) for record in store.manifest.records()) / len(z)
    assert agreed == pytest.approx((z.argmax(1).numpy() == labels).mean())
    remembered = [probe.row for probe in store.manifest.probes_of(0)]
    assert remembered == sorted(set(remembered))
    assert len(remembered) == 32
    BatchStream(rows, None, recipes.NoAugmentation(), 0, views=1, batch=8).check_probes(store.manifest)


def test_the_same_again_is_a_hit_and_a_dry_run_foresees(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {"cache_root": corpus / "cache", "dry_run": True, "console": QUIET}
    before = store_bytes(undisturbed)
    assert cached(corpus, undisturbed)["hit"]
    assert store_bytes(undisturbed) == before
    there = akd_dist.cache_teacher(of(corpus), store_root=undisturbed, **places)
    assert all(one["hit"] for one in there["splits"].values())
    (check,) = there["teacher_checks"]
    assert (check["asked_of"], check["cross_entropy"]) == ("tokens", None)
    assert " next tokens of the validation rows" in TeacherCheck(**check).line
    plan = akd_dist.cache_teacher(of(corpus), store_root=tmp_path / "none", **places)
    store = train_store(undisturbed, corpus)
    assert plan["splits"]["train"]["targets"] == store.manifest.targets
    assert plan["splits"]["train"]["bytes"] == sum(store.manifest.sizes().values())
    assert plan["teacher_checks"][0]["cross_entropy"] > 0


def test_dense_targets_are_the_teachers_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    """Rows in other batches, and as many at once as there are."""
    cached(corpus, tmp_path, "float32")
    store = train_store(tmp_path, corpus)
    z = said_online(corpus, rows_of(corpus)).numpy()
    np.testing.assert_array_equal(gathered(store, corpus)["logits"], z)
    assert store.manifest.loss is not None
    assert store.manifest.loss.largest_difference == 0
    other = cached(corpus, tmp_path / "half", "float16")
    loss = open_store(other["store"]).manifest.loss
    assert loss is not None
    assert 0 < loss.largest_difference < 0.01


def die(home: Path, root: Path, failpoint: str) -> None:
    os.environ["AKD_FAILPOINT"] = failpoint
    cached(home, root)


@pytest.mark.parametrize(
    "failpoint",
    [
        "table.before_object:5",
        "table.before_fidelity:1",
        "shard.before_object:10",
        pytest.param("table.before_receipt:2", marks=pytest.mark.slow),
        pytest.param("shard.before_receipt:1", marks=pytest.mark.slow),
    ],
)
def test_killed_between_two_objects_it_goes_on(corpus: Path, undisturbed: Path, tmp_path: Path, failpoint: str) -> None:
    process = FORKS.Process(target=die, args=(corpus, tmp_path, failpoint))
    process.start()
    process.join()
    assert process.exitcode not in (0, None)
    cached(corpus, tmp_path)
    assert store_bytes(tmp_path) == store_bytes(undisturbed)


def test_what_is_lost_is_made_again(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "stores")
    store = Path(train_store(tmp_path / "stores", corpus).uri)
    shutil.rmtree(store / "arrays.zarr" / "dictionary" / "basis" / "c")
    (store / "arrays.zarr" / "offsets" / "c" / "0").unlink()
    (store / "arrays.zarr" / "ids" / "c" / "0" / "1" / "0").write_bytes(b"other")
    mended = repair(str(tmp_path / "stores"), store.name, of(corpus), str(corpus / "cache"), QUIET)
    assert set(mended["repaired"][:2]) == {"dictionary", "offsets"}
    assert "ids/c/0/1/0" in mended["repaired"]
    assert store_bytes(tmp_path / "stores") == store_bytes(undisturbed)


def test_a_dictionary_that_is_lost_before_the_seal(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Shards are kept, since the one that is made again is the same."""
    shutil.copytree(undisturbed, tmp_path / "stores")
    store = Path(train_store(tmp_path / "stores", corpus).uri)
    (store / "manifest.json").unlink()
    shutil.rmtree(store / "arrays.zarr" / "dictionary")
    again = cached(corpus, tmp_path / "stores")
    assert again["shards_computed"] == 0
    assert store_bytes(tmp_path / "stores") == store_bytes(undisturbed)


def test_on_ray_the_same_bytes(ray_cluster: None, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    akd_dist.cache_teacher(of(corpus), store_root=tmp_path, cache_root=corpus / "cache", console=QUIET)
    assert store_bytes(tmp_path) == store_bytes(undisturbed)


def test_in_object_storage_the_same(corpus: Path, undisturbed: Path, bucket: str, tmp_path: Path) -> None:
    """Cached, an object lost, mended, and read by students."""
    root, here = f"{bucket}/stores", train_store(undisturbed, corpus)
    found, recipe = cached(corpus, root), of(corpus, students=[SHORT])
    assert open_store(found["store"]).manifest.sha256 == here.manifest.sha256
    open_root(found["store"]).delete("arrays.zarr/dictionary/basis/c/0/0")
    open_root(found["store"]).delete("arrays.zarr/gaps/c/0/0/0")
    with pytest.raises(DamagedError, match="gaps/c/0/0/0 is damaged"):
        open_store(found["store"])
    mended = repair(root, here.id, of(corpus), str(corpus / "cache"), QUIET)
    assert "gaps/c/0/0/0" in mended["repaired"]
    assert open_store(found["store"]).verify() == []
    for name, stores in (("far", stores_in(root, corpus)), ("near", stores_in(str(undisturbed), corpus))):
        train_in_process(recipe, stores, run=tmp_path / name, cache_root=str(tmp_path / f"cache-{name}"))
    assert weights(tmp_path / "far") == weights(tmp_path / "near") != {}


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_on_ray_come_to_what_one_does(
    ray_cluster: None, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """In float64; Ray Train runs each cohort, and starts its workers."""
    found = []
    for workers in (1, 2):
        students = [SHORT | {"precision": "float64", "workers": workers, "batch": 7, "micro_batch": 2}]
        akd_dist.train_students(
            of(corpus, students=students), store_root=undisturbed, cache_root=corpus / "cache",
            run_root=tmp_path / str(workers), console=QUIET,
        )  # fmt: skip
        found.append(safetensors.torch.load_file(tmp_path / str(workers) / "lm" / "students/one/model.safetensors"))
    for name, array in found[0].items():
        torch.testing.assert_close(array, found[1][name], rtol=0, atol=1e-9)


def test_bits_of_a_target_depend_on_its_shard_alone(corpus: Path, undisturbed: Path) -> None:
    """A row that two shards share is run for both, and says the same."""
    rows = rows_of(corpus)
    module, _ = read_model(corpus / "teacher", blocks=blocks_of(rows))
    teacher = LanguageTeacher(module, rows, recipes.CacheSpec(batch_rows=4), most=4)
    middle = int(rows.offsets[3]) + 5
    assert teacher.span(0, middle) == range(4)
    assert teacher.span(middle, middle + 1) == range(3, 4)
    parts = [
        np.concatenate([batch.targets for batch in teacher.batches(0, *ends)]) for ends in ((0, middle), (middle, 900))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(900))


# ---- bad input


@pytest.mark.parametrize("encoding", [TOP_K, "float16"])
def test_nan_at_one_position_is_named(corpus: Path, tmp_path: Path, encoding: Any) -> None:
    rows = rows_of(corpus)
    row = int(np.nonzero(np.array(rows.inputs)[:, 0] == ord("x"))[0][0])
    places = {"store_root": str(tmp_path), "cache_root": str(corpus / "cache")}
    with pytest.raises(RefusedError) as caught:
        cache_in_process(of(corpus, encoding), str(corpus / "nan"), **places)
    said = f"{caught.value.what} {caught.value.got}"
    # Where one token is no number, nothing that its block says is: softmax gives it a share of 0, which is none.
    assert f"row {row}, position 0" in said
    assert "not finite" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoding": TOP_K | {"k": 261}}, "keeps 261 logits of each target, and there are 260 classes"),
        ({"encoding": TOP_K | {"rank": 33}}, "the rank is larger than the teacher's hidden state"),
        ({"encoding": TOP_K, "cache": {"compile": True}}, "cache.compile is not for language models"),
        ({"encoding": "float16", "cache": {"channels_last": True}}, "cache.channels_last is not for language models"),
        ({"encoding": TOP_K, "teacher": "members"}, "an ensemble cannot learn from logits described by"),
    ],
)
def test_what_cannot_be_cached_is_refused_by_the_dry_run(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    one = {"weights": str(corpus / "teacher")}
    given = {"teacher": {"members": [one, one]}} if "teacher" in changes else {}
    given |= {"cache": {"encoding": changes["encoding"]} | changes["cache"]} if "cache" in changes else {}
    recipe = of(corpus, changes["encoding"], **given)
    for dry_run in (True, False):
        with pytest.raises(AkdError) as caught:
            akd_dist.cache_teacher(
                recipe, store_root=tmp_path, cache_root=corpus / "cache", dry_run=dry_run, console=QUIET
            )
        assert said in caught.value.what
    assert not list(tmp_path.iterdir())


# ---- classifiers with many classes


def test_a_classifier_is_described_view_by_view(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_shards, "FEWEST_TARGETS", 64)
    recipe = a_recipe([a_student("one")], cache={"encoding": TOP_K | {"k": 3}})
    teacher, places = a_teacher(recipe, home / "cnn", home / "cache"), {"cache_root": str(home / "cache")}
    found = cache_in_process(recipe, teacher, store_root=str(tmp_path / "described"), **places)
    dense = cache_in_process(recipe.model_copy(update={"cache": recipes.CacheSpec()}), teacher,
                             store_root=str(tmp_path / "dense"), **places)  # fmt: skip
    described, whole = open_store(found["store"]), open_store(dense["store"])
    assert (described.views, "targets" in found) == (2, False)
    rows = prepare(recipe.data, home / "cache").train
    targets = StoredTargets(described, home / "cache", views=2)
    for view in range(2):
        targets.move(view, [(0, len(rows))])
        arrays, counts = targets.gather(np.arange(len(rows)))
        z = whole.rows(view, 0, len(rows))
        np.testing.assert_array_equal(arrays["ids"][:, 0], z.argmax(1))
        np.testing.assert_allclose(arrays["mean"], z.mean(1), atol=1e-3)
        assert (counts == 1).all()
    targets.close()
    assert [one.row for one in described.manifest.probes_of(1)] == [one.row for one in whole.manifest.probes_of(1)]
    assert described.manifest.probes_of(1) == whole.manifest.probes_of(1)
    assert probe_rows(described.manifest.identity, described.layout.shards()[0])[0] == 0


# ---- plan


def test_a_plan_compares_encodings(corpus: Path, tmp_path: Path) -> None:
    objective = {"kind": "kd", "temperature": 4, "epochs": 1}
    model = {"kind": "causal_lm", "width": 16, "depth": 1, "heads": 2}
    recipe = of(corpus, students=[a_student("one", model=model, objective=objective)])
    places: dict[str, Any] = {"store_root": tmp_path, "cache_root": corpus / "cache", "console": QUIET}
    plan = akd_dist.plan(recipe, budget="100MB", **places)
    found = {one["name"]: one for one in plan["encodings"]}
    assert plan["temperatures"] == [1.0, 4.0]
    assert [one["bytes_per_target"] for one in plan["encodings"]] == sorted(
        one["bytes_per_target"] for one in plan["encodings"]
    )
    own = next(one for one in plan["encodings"] if one["own"])
    assert own["encoding"]["k"] == 4
    assert own["bytes"] == own["bytes_per_target"] * plan["targets"]
    assert (plan["chosen"], plan["line"]) == ("float16", "encoding: float16")
    assert found["float16"]["at"][0]["kl"] < 1e-4
    bare, ghost = (found[f"top 8 {how}"] for how in ("alone, renormalised", "and a ghost of the rest"))
    assert bare["at"][0]["kl"] is None
    assert bare["at"][1]["unigram_error"] > 2 * found["top 8 logits of 6 bits, rank 8"]["at"][1]["unigram_error"]
    assert ghost["bytes_per_target"] == bare["bytes_per_target"] + 2
    small = akd_dist.plan(recipe, budget=str(own["bytes"]), **places)
    assert small["chosen"] == own["name"]
    assert small["line"] == "encoding: {kind: top_k, k: 4, rank: 4, probe_rows: 8}"
    with pytest.raises(RefusedError, match="no encoding fits the budget"):
        akd_dist.plan(recipe, budget="1kB", **places)
    with pytest.raises(RecipeError, match="--budget is not a size"):
        akd_dist.plan(recipe, budget="much", **places)
    assert not list(tmp_path.iterdir())


def test_warnings_of_a_card() -> None:
    at = [
        {"temperature": 1.0, "kl": 0.6, "total_variation": 0.2},
        {"temperature": 2.0, "kl": 0.2, "total_variation": 0.2},
        {"temperature": 4.0, "kl": 0.1, "total_variation": 0.7},
    ]
    card = {"targets": 10, "at": at}
    assert fidelity_warnings(card, [2.0]) == fidelity_warnings(None, [1.0]) == []
    first, last = fidelity_warnings(card, [8.0, 1.0, 2.0])
    assert first.startswith("at temperature 1 the store describes its teacher badly: KL 0.60 nats")
    assert last.startswith("at temperature 8 ")
    between = [{"temperature": T, "mass_error": off} for T, off in ((1.0, 0.0), (1.5, 0.02), (4.0, 0.01))]
    (line,) = mass_warnings({"targets": 10, "at": between})
    assert line.startswith("at temperature 1.5 the tail's mass is off by 0.020 on average")
    assert mass_warnings(None) == mass_warnings(card) == []


def test_cards_rest_on_few_rows_of_their_own(corpus: Path) -> None:
    """As many as their targets need, and none that the dictionary was made from while there are others."""
    rows = rows_of(corpus)
    fitted, measured = target_shards.drawn_rows(rows, TopK(k=4, rank=4, probe_rows=8))
    targets = np.diff(rows.offsets)
    assert targets[fitted].sum() >= min(FEWEST_TARGETS, rows.targets)
    assert len(measured) <= max(MEASURED_ROWS, target_shards.rows_for(rows, measured, MEASURED))
    few = target_shards.rows_for(rows, fitted, 3)
    assert targets[fitted[: few - 1]].sum() < 3 <= targets[fitted[:few]].sum()


def test_the_default_recipe_is_told_of_nothing(corpus: Path, undisturbed: Path) -> None:
    card = train_store(undisturbed, corpus).manifest.fidelity
    assert card is not None
    assert [one["temperature"] for one in card["at"]] == [1.0, 2.0, 4.0, 8.0]
    assert card["agreement"] == 1.0


def test_weights_to_start_from_are_of_the_tokenizer_of_the_data(corpus: Path, tmp_path: Path) -> None:
    folder, splits = a_byte_pair_tokenizer(tmp_path / "student"), prepare(of(corpus).data, corpus / "cache")
    model = recipes.HuggingFaceLm(path=str(folder))
    with pytest.raises(RefusedError, match="the tokenizer of the student small is not that of the data"):
        check_pretrained(model, of(corpus), splits, "the student small")
    # Of the architecture alone it does not matter what was said by it once.
    check_pretrained(model.model_copy(update={"pretrained": False}), of(corpus), splits, "the student small")
