"""What capture for a `top_k` store costs beside the bare teacher with its head, and what it consists of.

python -m benchmarks.capture [--dtype bfloat16] [--threads 2] [--teacher FOLDER] [--json]

Without a folder the teacher is a Llama of SmolLM2-135M's shape (30 layers, width 576, 49,152 classes) with random
weights: what is measured does not depend on them. The bare teacher makes logits of all scored positions, in the same
chunks, and drops them; capture makes of them what is stored at k = 16, rank 16 and three temperatures. `ratio` is the
second over the first in CPU time, the least of several alternating repeats, in one run. Reading text and writing shards
are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from akd_dist.distill.capture import capture, capture_chunk, largest, log_masses
from akd_dist.distill.output_head import Head, blocks, parts
from akd_dist.distill.sparse import TailDictionary
from benchmarks.timing import least_seconds

K, RANK, TEMPERATURES = 16, 16, (1.0, 4 / 3, 2.0)


def main() -> None:
    """Print a table, or a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a Hugging Face folder of a causal language model with a linear head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found = _measured(chosen)
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<44} {value:.4g}" if isinstance(value, float) else f"{name:<44} {value}")


def _measured(chosen: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, chosen.dtype)
    model = _teacher(chosen.teacher).to(dtype).eval()
    head = Head(model.get_output_embeddings().weight.detach())
    classes, width = head.weight.shape
    dictionary = _dictionary(classes, width)
    tokens = torch.randint(0, classes, (chosen.blocks, chosen.length))

    def body() -> Tensor:
        found: Tensor = model.model(tokens).last_hidden_state
        return found.flatten(0, 1)

    def logits(h: Tensor) -> None:
        for part in parts(0, len(h), capture_chunk(classes)):
            head.logits(h[part])

    def captured(h: Tensor) -> None:
        capture(h, head, dictionary, k=K, temperatures=TEMPERATURES, classes=classes)

    with torch.inference_mode():
        h = body()
        z = head.logits(h[: min(len(h), capture_chunk(classes))])

        def each(work: Callable[[Tensor], object]) -> None:
            for rows in blocks(slice(0, len(z)), classes, z.device):
                work(z[rows].float())

        share = len(h) / len(z)
        times = least_seconds(
            {
                "teacher": body, "head": lambda: logits(h), "capture": lambda: captured(h),
                "largest": lambda: each(lambda one: largest(one, K)), "mean": lambda: each(lambda one: one.mean(1)),
                "curve": lambda: each(lambda one: log_masses(one, one[:, 0], TEMPERATURES)),
            },
            chosen.repeats,
        )  # fmt: skip
    bare = times["teacher"] + times["head"]
    found: dict[str, Any] = {"dtype": chosen.dtype, "threads": chosen.threads, "targets": len(h), "classes": classes}
    found["ratio"] = (times["teacher"] + times["capture"]) / bare
    found["capture over head"] = times["capture"] / times["head"]
    found["teacher without its head, heads"] = times["teacher"] / times["head"]
    for name in ("largest", "mean", "curve"):
        found[f"of these, {name}, heads"] = times[name] * share / times["head"]
    found["nanoseconds a logit, head"] = 1e9 * times["head"] / (len(h) * classes)
    found["nanoseconds a logit, capture less head"] = 1e9 * (times["capture"] - times["head"]) / (len(h) * classes)
    return found


def _teacher(folder: str | None) -> Any:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, initializer_range=0.12,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _dictionary(classes: int, width: int) -> TailDictionary:
    arrays = {
        "mean_logit": torch.randn(classes),
        "basis": torch.randn(classes, RANK),
        "projection": torch.randn(RANK, width + 1),
    }
    return TailDictionary.of(arrays, TEMPERATURES)


if __name__ == "__main__":
    main()
