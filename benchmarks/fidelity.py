"""How well encodings of a real language model's logits describe it: their cards, as `akd-dist plan` prints them.

python -m benchmarks.fidelity --teacher FOLDER [--blocks 32] [--json]
python -m benchmarks.fidelity --teacher FOLDER --recipe RECIPE --stores STORES [--json]

The teacher is a Hugging Face folder of a causal language model with a linear head; the text is the Python standard
library's own source files, in blocks of 256 tokens. Dictionaries are made from the first half of the blocks, and cards
are measured on targets of the second half. Ours are shown with what is captured rounded as a store rounds its
coefficients; the few bits of head and curve are left out. Bytes are of whole targets, vocabularies up to 65,536.
`batch` is the error of the head's gradient summed over all targets, at a student that says the mean of all and has the
teacher's hidden states.

With a recipe, what its sealed train store holds is read back, decoded, and compared with its teacher, on the rows that
the store's own card was measured on; the card that is sealed is shown beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from akd_dist.data.row_cache import prepare
from akd_dist.distill import cards
from akd_dist.distill.batch_targets import Decoder
from akd_dist.distill.capture import capture
from akd_dist.distill.dictionary import HiddenProbe, make_dictionary
from akd_dist.distill.fidelity import TopKOnly, measure_fidelity
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse import COEFFICIENT_STEP, SparseTargets, TailDictionary
from akd_dist.distill.target_shards import drawn_rows
from akd_dist.distill.target_teacher import LanguageTeacher
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from akd_dist.models.card import blocks_of
from akd_dist.models.folder import read_model
from akd_dist.recipe import load_recipe
from akd_dist.storage import catalog
from akd_dist.storage.node_cache import cache_folder
from akd_dist.storage.reader import open_store
from akd_dist.storage.targets import StoredTargets

NODES, TEMPERATURES, LENGTH = (1.0, 4 / 3, 2.0), (1.0, 2.0, 4.0), 256


def main() -> None:
    """Print a row for each encoding and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--targets", type=int, default=256, help="that cards are measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", help="whose sealed train store is read back")
    parser.add_argument("--stores", default="stores", help="where that lies")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.recipe is not None:
        read_back(chosen.recipe, chosen.teacher, chosen.stores)
        return
    h, head = _hidden_states(chosen.teacher, chosen.blocks)
    half = len(h) // 2
    every = (len(h) - half) // chosen.targets
    held_out = h[half:][::every][: chosen.targets]
    encodings = candidates(h[:half], held_out, head)
    decoded = {name: targets for name, (_, targets) in encodings.items()}
    measured = measure_fidelity(HiddenProbe(held_out, head, len(head.weight)), decoded, TEMPERATURES, head=head)
    batch = {T: _batch_errors(held_out, head, decoded, T) for T in TEMPERATURES}
    for name, card in measured.items():
        row: dict[str, Any] = {"encoding": name, "bytes": encodings[name][0], **dataclasses.asdict(card)}
        row["batch"] = {T: batch[T][name] for T in TEMPERATURES}
        if chosen.json:
            print(json.dumps(row))
            continue
        print(f"{name:<26} {row['bytes']:>6} B  agreement {card.agreement:.3f}  unexplained {card.unexplained:.3f}")
        for at in card.at:
            print(f"    {_figures(dataclasses.asdict(at))}  batch {row['batch'][at.temperature]:.3f}")


def _figures(at: Mapping[str, Any]) -> str:
    def figure(name: str) -> str:
        value = at.get(name)
        return "inf" if value is None else f"{value:.3f}"

    return (
        f"T = {at['temperature']:<5.3g} KL {figure('kl')}  TV {figure('total_variation')}  "
        f"unigram {figure('unigram_error')} / {figure('unigram_hidden_error')}  "
        f"other {figure('other_error')} / {figure('other_hidden_error')}"
    )


def read_back(recipe_file: str, teacher_folder: str, stores: str) -> None:
    """What a sealed store of a recipe's train rows holds, beside its teacher and its own card."""
    recipe = load_recipe(recipe_file)
    rows = prepare(recipe.data, cache_folder()).train
    found = next(one for one in catalog.list_stores(stores) if one.dataset == rows.fingerprint and one.sealed)
    store = open_store(f"{stores}/{found.id}")
    numbers = drawn_rows(rows, store.manifest.identity.top_k)[1]
    module, _ = read_model(teacher_folder, blocks=blocks_of(rows))
    teacher = LanguageTeacher(module.eval(), rows, recipe.cache, recipe.cache.batch_rows)
    probe = teacher.probe(numbers)
    targets = StoredTargets(store, cache_folder())
    targets.move(0, [(0, store.num_rows)])
    arrays, _ = targets.gather(numbers)
    kept = cards.chosen(probe)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array))[kept] for name, array in arrays.items()}
    decoded = {"store": Decoder.of(store, "cpu").targets(tensors)}
    card = cards.plain_card(cards.measure(probe, decoded, cards.TEMPERATURES, teacher)["store"], len(kept))
    targets.close()
    sealed = store.manifest.fidelity or {"at": []}
    bytes_per_target = sum(store.manifest.sizes().values()) / (store.manifest.targets or 1)
    print(f"{bytes_per_target:.1f} bytes a target, dictionary included; {len(kept)} targets of {len(numbers)} rows")
    for here, there in zip(card["at"], sealed["at"], strict=True):
        print(f"read back {_figures(here)}")
        print(f"sealed    {_figures(there)}")


def _batch_errors(h: Tensor, head: Head, encodings: Mapping[str, Targets], temperature: float) -> dict[str, float]:
    """Of the head's gradient, the sum of e h' over targets: its norm comes of two small matrices of products."""
    p = torch.softmax(head.logits(h).float() / temperature, 1)
    q, products = p.mean(0).expand_as(p), h.float() @ h.float().T

    def norm(e: Tensor) -> float:
        return float((e @ e.T).mul_(products).sum().clamp_min(0).sqrt())

    found, whole, rows = {}, norm(q - p), slice(0, len(p))
    for name, one in encodings.items():
        p_hat = (
            one.beside(q, temperature, rows).p if isinstance(one, TopKOnly) else one.probabilities(temperature, rows)
        )
        found[name] = norm(p_hat - p) / whole
    return found


def candidates(fit: Tensor, held_out: Tensor, head: Head, *, every: bool = True) -> dict[str, tuple[int, Targets]]:
    """Encodings of targets by name: bytes a target, and what is decoded.

    Args:
        fit: hidden states of the teacher that dictionaries are made from, [m, d].
        held_out: those of the targets, [n, d].
        every: those of other sizes and of others, and not the default alone.
    """
    classes = len(head.weight)
    found: dict[str, tuple[int, Targets]] = {}
    if every:
        found["dense float16"] = (2 * classes, DenseTargets(head.logits(held_out).half()))
    for k, rank in ((16, 16), (8, 8), (6, 8), (8, 0)) if every else ((16, 16),):
        arrays = make_dictionary(HiddenProbe(fit, head, classes), k=k, rank=rank, temperatures=NODES)
        dictionary = TailDictionary.of(arrays, NODES)
        captured = capture(held_out, head, dictionary, k=k, temperatures=NODES, classes=classes)
        rounded = (captured.coefficients / COEFFICIENT_STEP).round().clamp(-128, 127) * COEFFICIENT_STEP
        targets = dataclasses.replace(captured, coefficients=rounded).targets(NODES, dictionary)
        size = 2 * k + 4 + -(-(k - 1) * 6 // 8) + 2 + 2 * len(NODES) + rank
        found[f"top {k}, rank {rank}"] = (size, targets)
        if every and rank == 16:
            found[f"top {k}, rank {rank}, Gaussian"] = (size, _gaussian(targets))
    return found | (_of_others(held_out, head) if every else {})


def _of_others(held_out: Tensor, head: Head) -> dict[str, tuple[int, Targets]]:
    classes = len(head.weight)
    found: dict[str, tuple[int, Targets]] = {}
    peers: tuple[tuple[int, Literal["none", "uniform", "ghost"]], ...]
    peers = ((128, "none"), (12, "none"), (32, "ghost"), (8, "ghost"), (8, "uniform"))
    for k, tail in peers:
        plain = capture(held_out, head, None, k=k, temperatures=TEMPERATURES, classes=classes)
        what = "renormalised" if tail == "none" else f"{tail} tail"
        found[f"top {k}, {what}"] = (4 * k + 2 * (tail != "none"), TopKOnly(plain, TEMPERATURES, classes, tail))
    return found


def _gaussian(targets: SparseTargets) -> SparseTargets:
    none = targets.dictionary.tail_calibration[:0]
    return dataclasses.replace(targets, dictionary=dataclasses.replace(targets.dictionary, tail_calibration=none))


def _hidden_states(folder: str, count: int) -> tuple[Tensor, Head]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model.eval()
    head = Head(model.get_output_embeddings().weight.detach())
    tokens: list[int] = []
    # Every 13th file, so that there are many kinds, and a few thousand letters of each.
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))[::13]:
        tokens += [*tokenizer(path.read_text(errors="replace")[:6000]).input_ids, tokenizer.eos_token_id]
        if len(tokens) >= count * LENGTH:
            break
    blocks = torch.tensor(tokens[: count * LENGTH // LENGTH * LENGTH]).view(-1, LENGTH)
    with torch.inference_mode():
        found = [model.model(blocks[at : at + 4]).last_hidden_state for at in range(0, len(blocks), 4)]
    return torch.cat(found)[:, 8:-1].flatten(0, 1), head


if __name__ == "__main__":
    main()
