"""How well encodings of a real language model's logits describe it: their cards, as `akd-dist plan` prints them.

python -m benchmarks.fidelity --teacher FOLDER [--blocks 32] [--json]

The teacher is a Hugging Face folder of a causal language model with a linear head; the text is the Python standard
library's own source files, in blocks of 256 tokens. Dictionaries are made from the first half of the blocks, and cards
are measured on targets of the second half. Ours are shown with what is captured rounded as a store rounds its
coefficients; the few bits of head and curve are left out. Bytes are of whole targets, vocabularies up to 65,536.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from akd_dist.distill.capture import capture
from akd_dist.distill.dictionary import HiddenProbe, make_dictionary
from akd_dist.distill.fidelity import TopKOnly, measure_fidelity
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse import COEFFICIENT_STEP, SparseTargets, TailDictionary
from akd_dist.distill.teacher_targets import DenseTargets, Targets

NODES, TEMPERATURES, LENGTH = (1.0, 4 / 3, 2.0), (1.0, 2.0, 4.0), 256


def main() -> None:
    """Print a row for each encoding and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--targets", type=int, default=256, help="that cards are measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    h, head = _hidden_states(chosen.teacher, chosen.blocks)
    half = len(h) // 2
    every = (len(h) - half) // chosen.targets
    held_out = h[half:][::every][: chosen.targets]
    candidates = _candidates(h[:half], held_out, head)
    decoded = {name: targets for name, (_, targets) in candidates.items()}
    cards = measure_fidelity(HiddenProbe(held_out, head, len(head.weight)), decoded, TEMPERATURES, head=head)
    for name, card in cards.items():
        row: dict[str, Any] = {"encoding": name, "bytes": candidates[name][0], **dataclasses.asdict(card)}
        if chosen.json:
            print(json.dumps(row))
            continue
        print(f"{name:<26} {row['bytes']:>6} B  agreement {card.agreement:.3f}  unexplained {card.unexplained:.3f}")
        for at in card.at:
            errors = (at.unigram_error, at.unigram_hidden_error or 0, at.other_error, at.other_hidden_error or 0)
            print(
                f"    T = {at.temperature:g}  KL {at.kl:.3f}  TV {at.total_variation:.3f}  "
                f"unigram {errors[0]:.3f} / {errors[1]:.3f}  other {errors[2]:.3f} / {errors[3]:.3f}"
            )


def _candidates(fit: Tensor, held_out: Tensor, head: Head) -> dict[str, tuple[int, Targets]]:
    classes = len(head.weight)
    found: dict[str, tuple[int, Targets]] = {"dense float16": (2 * classes, DenseTargets(head.logits(held_out).half()))}
    for k, rank in ((16, 16), (6, 8), (8, 0)):
        arrays = make_dictionary(HiddenProbe(fit, head, classes), k=k, rank=rank, temperatures=NODES)
        dictionary = TailDictionary.of(arrays, NODES)
        captured = capture(held_out, head, dictionary, k=k, temperatures=NODES, classes=classes)
        rounded = (captured.coefficients / COEFFICIENT_STEP).round().clamp(-128, 127) * COEFFICIENT_STEP
        targets = dataclasses.replace(captured, coefficients=rounded).targets(NODES, dictionary)
        size = 2 * k + 4 + -(-(k - 1) * 6 // 8) + 2 + 2 * len(NODES) + rank
        found[f"top {k}, rank {rank}"] = (size, targets)
        if rank == 16:
            found[f"top {k}, rank {rank}, Gaussian"] = (size, _gaussian(targets))
    plain = capture(held_out, head, None, k=8, temperatures=TEMPERATURES, classes=classes)
    for name, tail, size in (
        ("renormalised", "none", 32),
        ("uniform tail", "uniform", 34),
        ("ghost tail", "ghost", 34),
    ):
        found[f"top 8, {name}"] = (size, TopKOnly(plain, TEMPERATURES, classes, tail))  # type: ignore[arg-type]
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
