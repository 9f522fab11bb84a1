"""SmolLM2 with its vocabulary cut to the ids that a small corpus uses most, so that many students fit on a few cores.

    from benchmarks.cut_teacher import make
    make(Path("smollm2"), Path("work"))     writes work/teacher, a Hugging Face folder, and work/corpus.jsonl

The tokenizer keeps its bytes, the most frequent tokens of the corpus, and what these are merged from: so it is a
byte-pair tokenizer of its own, and no token falls outside. The teacher keeps the rows of its embedding at these ids, as
the tied output layer does, and all other weights. The corpus is the beginning of modules of Python's standard library.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from akd_dist.jobs.stdlib_texts import documents

VOCABULARY = 4096
DOCUMENTS, CHARACTERS = 180, 450
EMBEDDING = "model.embed_tokens.weight"
SPECIAL = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
"""Unknown, beginning and end of text."""


def make(model: Path, work: Path) -> None:
    """Write both, unless they are there.

    Args:
        model: the folder that `benchmarks.smollm2` writes.
    """
    if (work / "teacher" / "config.json").exists():
        return
    texts = excerpts()
    (work / "teacher").mkdir(parents=True, exist_ok=True)
    (work / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    kept = ids_to_keep(tokenizer, texts)
    (work / "teacher" / "tokenizer.json").write_text(json.dumps(cut_tokenizer(tokenizer, kept)))
    shutil.copy(model / "tokenizer_config.json", work / "teacher")
    state = load_file(model / "model.safetensors")
    state[EMBEDDING] = state[EMBEDDING][kept].contiguous()
    save_file(state, work / "teacher" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    ends = {key: kept.index(config[key]) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (work / "teacher" / "config.json").write_text(json.dumps(config | ends | {"vocab_size": len(kept)}))


def excerpts() -> list[str]:
    """The first lines of modules, evenly chosen among all."""
    texts = documents()["text"].to_pylist()
    return [text[:CHARACTERS] for text in texts[:: len(texts) // DOCUMENTS]][:DOCUMENTS]


def ids_to_keep(tokenizer: dict[str, Any], texts: Iterable[str]) -> list[int]:
    """VOCABULARY ids, ascending: the bytes, three special ones, and by their number in the texts others
    with all that they are merged from."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    parts = {"".join(merge): merge for merge in reversed(tokenizer["model"]["merges"])}

    def ancestors(token: str) -> set[str]:
        return {token}.union(*(ancestors(part) for part in parts.get(token, ())))

    whole = Tokenizer.from_str(json.dumps(tokenizer))
    counts = Counter(token for text in texts for token in whole.encode(text).tokens)
    kept = {*SPECIAL, *(token for token in vocabulary if len(token) == 1)}
    # Those that do not occur follow in the order of their ids, which is that of the merges.
    for token in sorted(vocabulary, key=lambda one: (-counts[one], vocabulary[one])):
        more = kept | ancestors(token)
        if len(more) <= VOCABULARY:
            kept = more
    return sorted(vocabulary[token] for token in kept)


def cut_tokenizer(tokenizer: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The same of these ids alone, numbered from 0 in their order."""
    number = {id: at for at, id in enumerate(kept)}
    vocabulary = {token: number[id] for token, id in tokenizer["model"]["vocab"].items() if id in number}
    merges = [pair for pair in tokenizer["model"]["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    added = [one | {"id": number[one["id"]]} for one in tokenizer["added_tokens"] if one["id"] in number]
    return tokenizer | {"added_tokens": added, "model": tokenizer["model"] | {"vocab": vocabulary, "merges": merges}}
