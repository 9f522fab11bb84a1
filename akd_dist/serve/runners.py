"""Exports as others run them: by ONNX Runtime, or in a Python that has no akd-dist."""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


class DoesNotRunError(Exception):
    """An export fails, for this reason."""


def _run_onnx(path: Path, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    runtime = importlib.import_module("onnxruntime")  # it ships no types
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        return [session.run(["logits"], {given.name: part})[0] for part in parts]
    except Exception as error:  # onnxruntime's own kinds, such as one for a missing kernel of float64
        raise DoesNotRunError(str(error)) from error


# Given: the export, then a file of inputs and a file for logits by turns.
_TORCH_SCRIPT = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
with torch.inference_mode():
    for given, made in zip(sys.argv[2::2], sys.argv[3::2]):
        numpy.save(made, program(torch.from_numpy(numpy.load(given))).numpy())
"""
_HUGGINGFACE_SCRIPT = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    sys.argv[1], local_files_only=True, trust_remote_code=False
).eval()
with torch.inference_mode():
    for given, made in zip(sys.argv[2::2], sys.argv[3::2]):
        inputs = torch.from_numpy(numpy.load(given)).long()
        ids, *types = [inputs] if inputs.dim() == 2 else inputs.unbind(1)
        more = {"token_type_ids": types[0]} if types else {}
        mask = (ids != model.config.pad_token_id).long()
        numpy.save(made, model(input_ids=ids, attention_mask=mask, **more).logits.numpy())
"""
_HUGGINGFACE_LM_SCRIPT = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], local_files_only=True, trust_remote_code=False, dtype="auto"
).eval()
with torch.inference_mode():
    for given, made in zip(sys.argv[2::2], sys.argv[3::2]):
        numpy.save(made, model(input_ids=torch.from_numpy(numpy.load(given))).logits.numpy())
"""


def _run_apart(script: str) -> Callable[[Path, Sequence[np.ndarray]], list[np.ndarray]]:
    """A script in a fresh Python that sees installed packages alone: no akd-dist of a checkout, no code of the user."""

    def run(path: Path, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            files = [(Path(folder) / f"inputs-{n}.npy", Path(folder) / f"logits-{n}.npy") for n in range(len(parts))]
            for (given, _), part in zip(files, parts, strict=True):
                np.save(given, part)
            places = [str(path), *(str(file) for pair in files for file in pair)]
            command = [sys.executable, "-I", "-W", "ignore", "-c", script, *places]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DoesNotRunError(done.stderr.strip()[-2000:] or f"exit code {done.returncode}")
            return [np.load(made) for _, made in files]

    return run


RUNNERS = {
    "onnx": _run_onnx,
    "torch-export": _run_apart(_TORCH_SCRIPT),
    "huggingface": _run_apart(_HUGGINGFACE_SCRIPT),
    "huggingface-lm": _run_apart(_HUGGINGFACE_LM_SCRIPT),
}
"""By format: the export and batches of inputs [n, *shape] -> logits [n, classes] of each; of language models logits of
each position."""
