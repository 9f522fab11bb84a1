"""Small language-model recipes on a made corpus, and their stores: a teacher of random weights, captured in a loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist import recipe as recipes
from akd_dist.base.files import sha256
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.data.views import shown_digests
from akd_dist.distill.capture import capture_logits
from akd_dist.distill.dictionary import LogitProbe, make_dictionary
from akd_dist.distill.language_step import Scored
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse import TailDictionary
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.language import LanguageModel
from akd_dist.recipe import Recipe
from akd_dist.storage.claim import claim_store
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.identity import format_of
from akd_dist.storage.manifest import Creation, Identity
from akd_dist.storage.tables import put_dictionary, put_fidelity, put_offsets
from akd_dist.storage.top_k import Described
from akd_dist.storage.writer import create_store, missing_shards, seal_store, write_shard
from tests import stores

LENGTH = 32
TOP_K = {"kind": "top_k", "k": 8, "rank": 4, "probe_rows": 8}
ADAMW = {"kind": "adamw", "lr": 5e-3, "schedule": {"kind": "linear"}}
SMALL = {"kind": "causal_lm", "width": 16, "depth": 1, "heads": 2, "dropout": 0.1}
ANNEALING = {"kind": "annealing_kd", "tau_max": 2, "stage1_epochs": 2, "stage2_epochs": 1}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "some", "dog", "ran", "after", "that", "bird", "over", "hills")


def a_corpus(folder: Path, documents: int = 90) -> Path:
    """Documents of words, as JSON Lines."""
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(4, 30))) for _ in range(documents)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def a_student(name: str, **changes: Any) -> dict[str, Any]:
    """A student block with small defaults."""
    defaults = {"model": SMALL, "objective": ANNEALING, "optimizer": ADAMW, "batch": 16}
    return {"name": name} | defaults | changes


def a_recipe(corpus: Path, students: list[dict[str, Any]], **changes: Any) -> Recipe:
    """A recipe of bytes in blocks, with a teacher that nobody has trained."""
    document = {
        "name": "language",
        "data": {
            "train": {"kind": "text", "path": str(corpus), "input": "text"},
            "task": "language_model",
            "text": {"kind": "bytes", "length": LENGTH},
            "validation": 0.2,
            "test": 0.2,
        },
        "teacher": {"weights": str(corpus.parent / "teacher")},
        "cache": {"encoding": TOP_K, "batch_rows": 8},
        "students": students,
        "checkpoint_seconds": 0,
    }
    return Recipe.model_validate(document | changes).own()


def a_teacher(rows: Rows, **changes: Any) -> LanguageModel:
    """A language model of random, far from equal chances, in eval mode."""
    model = recipes.CausalLm(**{"width": 32, "depth": 1, "heads": 2, **changes})
    module = build(ModelCard.of(model, rows, None), 3)
    assert isinstance(module, LanguageModel)
    with torch.no_grad():
        module.output_weight.mul_(20)
    return module.eval()


def logits_of(teacher: LanguageModel, blocks: torch.Tensor, classes: int) -> torch.Tensor:
    """The teacher's logits of the targets of blocks, block by block: float32 [targets, classes]."""
    found = []
    with torch.inference_mode():
        for block in blocks:
            states = teacher.hidden(block[None])[0].index_select(0, Scored.of(block[None]).places)
            found.append(Head(teacher.output_weight).cut(classes).logits(states))
    return torch.cat(found)


def write_store(root: Path, rows: Rows, encoding: recipes.EncodingSpec, logits: torch.Tensor, *, views: int = 1) -> str:
    """A sealed store of logits [targets, classes], the same for all views; gives its URI."""
    several = rows.task == "language_model"
    config = encoding.config()
    items = rows.targets if several else None
    assert rows.tokens is not None or not several
    tokens = {"tokenizer": rows.tokens.tokenizer, "vocabulary": rows.classes} if several and rows.tokens else None
    teacher = sha256(logits.numpy().tobytes())
    identity = Identity(
        format=format_of(config, items),
        dataset=rows.fingerprint,
        rows=len(rows),
        teacher=teacher,
        augmentation={"kind": "none"},
        data_seed=None,
        views=views,
        encoding=config,
        classes=rows.classes,
        items=items,
        tokens=tokens,
    )
    created = Creation(
        identity=identity,
        computed=stores.COMPUTED,
        dataset=rows.describe(),
        teacher={"fingerprint": teacher, "spec": {}},
    )
    with claim_store(str(root), identity.id):
        writer = create_store(str(root), created, hint={"split": "train"})
        if several:
            put_offsets(writer, rows.offsets)
        said, tail = None, None
        if identity.is_top_k:
            top_k = identity.top_k
            form: dict[str, Any] = {"k": top_k.k, "temperatures": top_k.tail_temperatures}
            arrays = make_dictionary(LogitProbe(logits[: max(64, 4 * top_k.rank)]), rank=top_k.rank, **form)
            said = put_dictionary(writer, Dictionary.from_arrays({name: one.numpy() for name, one in arrays.items()}))
            tail = TailDictionary.of(arrays, top_k.tail_temperatures)
        for shard in missing_shards(writer):
            part = logits[shard.start : shard.stop]
            if identity.is_top_k:
                captured = capture_logits(part, tail, **form).arrays()
                kept = identity.top_k.pack(Described(**captured), rows.classes)
            else:
                kept = identity.codec.encode(part.numpy(), shard.start)
            first = np.array([int(np.searchsorted(rows.offsets, shard.start, side="right")) - 1])
            seen = shown_digests(
                recipes.NoAugmentation(), 0, np.asarray(rows.inputs.take(first, axis=0)), first, shard.view
            )
            write_shard(writer, shard, kept, label_agreement=0.5, probes=seen, seconds=0.0, dictionary=said)
        if identity.is_top_k:
            put_fidelity(writer, {"temperatures": [1.0], "kl": [0.1]})
        seal_store(writer)
    return str(writer.uri)


def stores_of(recipe: Recipe, folder: Path, teacher: LanguageModel | None = None) -> dict[str, str]:
    """The stores of a recipe's splits."""
    splits = prepare(recipe.data, folder / "cache")
    teacher = teacher or a_teacher(splits.train)
    found = {}
    for split in ("train", "validation", "test"):
        rows: Rows = getattr(splits, split)
        logits = logits_of(teacher, torch.from_numpy(np.array(rows.inputs)), rows.classes)
        found[split] = write_store(folder / "stores", rows, recipe.cache.encoding, logits)
    return found
